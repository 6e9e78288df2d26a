"""Entry point of all losses: validate, choose Triton or PyTorch, return a LossOutput."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor
from typing_extensions import TypedDict

from fastpref_kernels import LINKS, TRITON_MISSING, Link
from fastpref_kernels.knobs import live, pair_losses

from . import ops, reference
from .context import no_autocast, transformed
from .differentiable import gate
from .pairs import Halves, Pairs, Scalar, check_errors, check_pairs, halves
from .scalars import check_huber, check_scalars
from .sums import cast, reduce

Reduction: TypeAlias = Literal["mean", "sum", "none"]
ErrorReduction: TypeAlias = Literal["mean", "sum"]
Impl: TypeAlias = Literal["auto", "triton", "torch"]


class CoreKnobs(TypedDict, total=False):
    """Keyword arguments that every loss takes; see `pair_loss`."""

    mask: Halves
    sample_weight: Scalar | tuple[Scalar, Scalar]
    pair_weight: Scalar
    logit_scale: Scalar
    sft_weight: Scalar
    error_reduction: ErrorReduction
    reduction: Reduction
    impl: Impl


class CommonKnobs(CoreKnobs, total=False):
    """Of losses that have neither as an argument of their own."""

    huber_c: Scalar | None
    swap: bool


class UnsmoothedKnobs(CommonKnobs, total=False):
    """Of losses in which label_smoothing has a part of its own."""

    loser_weight: Scalar
    prior_weight: Scalar


class OneSidedKnobs(CommonKnobs, total=False):
    """Of `pso_loss`, in which loser_weight and prior_weight have."""

    label_smoothing: Scalar


class SignedKnobs(OneSidedKnobs, total=False):
    """Of `seppo_loss`, in which loser_weight has."""

    prior_weight: Scalar


class Knobs(UnsmoothedKnobs, total=False):
    """Of all others."""

    label_smoothing: Scalar


class OwnErrorKnobs(CoreKnobs, total=False):
    """Of `self_npo_loss`, which has errors of its own."""

    loser_weight: Scalar
    prior_weight: Scalar
    label_smoothing: Scalar
    swap: bool


class SwappedKnobs(CoreKnobs, total=False):
    """Of `npo_loss`, which swaps the labels."""

    loser_weight: Scalar
    prior_weight: Scalar
    label_smoothing: Scalar
    huber_c: Scalar | None


class LossOutput(NamedTuple):
    """What every loss returns, for B pairs. Only `loss` carries a gradient: to add a term of your
    own, take it from your own errors (`losses_from_errors`), or use `sft_weight` and its kin.

    loss: (), or (B,) for reduction="none".
    mse_w, mse_l: (B,) mean squared error of the prediction, winner's and loser's.
    margin: (B,) logit of the preference; > 0 where the model prefers the winner.
    ref_mse_w, ref_mse_l: (B,) the reference model's errors; None for losses without a reference.
    drop_w, drop_l: (B,) policy error minus reference error, negative where the model improved, and
        None as above. With `ref_pred` they are summed from (model_pred - ref_pred) * (model_pred +
        ref_pred - 2 * target), and so are exact where mse_w - ref_mse_w has cancelled.
    """

    loss: Tensor
    mse_w: Tensor
    mse_l: Tensor
    margin: Tensor
    ref_mse_w: Tensor | None = None
    ref_mse_l: Tensor | None = None
    drop_w: Tensor | None = None
    drop_l: Tensor | None = None

    @overload
    def metrics(
        self, *, gather: bool = False, as_floats: Literal[False] = False
    ) -> dict[str, Tensor]: ...

    @overload
    def metrics(self, *, gather: bool = False, as_floats: Literal[True]) -> dict[str, float]: ...

    def metrics(
        self, *, gather: bool = False, as_floats: bool = False
    ) -> dict[str, Tensor] | dict[str, float]:
        """Training metrics: 0-d device tensors, with no host sync. All are means over pairs, except
        for the loss with reduction="sum", which is their sum.

        accuracy: share of pairs with margin > 0; a tie counts one half.
        gradient_factor: mean sigmoid(-margin). For losses that are softplus(-margin) it is the
            share of the preference gradient that is left: 1/2 for margins of 0, near 0 once pairs
            are won (or beta is too large), near 1 if they are lost. For others it says where the
            margins are.

        Args:
            gather: average over all processes of torch.distributed's default group, weighted by
                their numbers of pairs, the loss of reduction="sum" too, which is then no sum. All
                of them must call this. Without a group it does nothing.
            as_floats: return Python floats, for a progress bar. This waits for the device once.
        """
        won = (self.margin > 0).float().mean() + (self.margin >= 0).float().mean()
        metrics = {
            "loss": self.loss.detach().mean(),
            "mse_w": self.mse_w.mean(),
            "mse_l": self.mse_l.mean(),
            "margin": self.margin.mean(),
            "accuracy": won / 2,
            "gradient_factor": torch.sigmoid(-self.margin).mean(),
        }
        for name in ("ref_mse_w", "ref_mse_l", "drop_w", "drop_l"):
            value: Tensor | None = getattr(self, name)
            if value is not None:
                metrics[name] = value.mean()
        if gather and torch.distributed.is_available() and torch.distributed.is_initialized():
            sums = self.margin.numel() * torch.stack([*metrics.values(), torch.ones_like(won)])
            torch.distributed.all_reduce(sums)
            metrics = dict(zip(metrics, (sums[:-1] / sums[-1]).unbind(), strict=True))
        if as_floats:
            return dict(zip(metrics, torch.stack([*metrics.values()]).tolist(), strict=True))
        return metrics


def pair_loss(
    model_pred: Halves,
    target: Halves,
    ref_pred: Halves | None = None,
    *,
    link: str | Link,
    ref_mse: Halves | None = None,
    mask: Halves | None = None,
    sample_weight: Scalar | tuple[Scalar, Scalar] | None = None,
    huber_c: Scalar | None = None,
    swap: bool = False,
    error_reduction: ErrorReduction = "mean",
    reduction: Reduction = "mean",
    impl: Impl = "auto",
    **scalars: Scalar,
) -> LossOutput:
    """The general entry: the loss of a link, by its name in `fastpref_kernels.LINKS` (see
    `register_link`) or as a `Link`.

    Per pair, with score and shape from the link, err the error of a sample (for the mean below,
    mean (model_pred - target)^2), and gap = err - the reference's::

        score_w = logit_scale * score(sample_weight * err_w, sample_weight * gap_w)
        score_l = logit_scale * loser_weight * score(sample_weight * err_l, sample_weight * gap_l)
        margin  = score_w - score_l
        loss    = pair_weight * (
            (1 - label_smoothing) * shape(score_w, score_l)
            + label_smoothing * shape(score_l, score_w)
            + sft_weight * sample_weight * err_w
            + prior_weight * sample_weight * err_l
        )

    All of it happens inside the one forward launch, the reference's errors too.

    Args:
        model_pred: the prediction (epsilon, v or velocity, whatever `target` is): stacked,
            (2B, ...) with the B winners first and their losers after them in the same order, or a
            tuple (winners, losers) of (B, ...) each. Any rank from 2; fp32, fp16 or bf16; any
            strides. Its gradient has its dtype and layout.
        target: what model_pred should have been, a constant: stacked, a tuple, or (B, ...) where
            the pair shares it (epsilon prediction with one noise for both: pass that noise, and it
            is read once). Its dtype and strides may differ from model_pred's.
        ref_pred: the frozen reference's prediction, stacked or a tuple, a constant; only for links
            that need a reference. Its error is subtracted element by element, so that the gap is
            right where policy and reference differ by little.
        ref_mse: instead of ref_pred, the reference's errors, (2B,) or a tuple of (B,), computed
            before with the same mask and reduction (and without sample_weight, which weighs them
            too).
        mask: weights of the elements, of model_pred's rank, with 1 for sizes that do not matter:
            stacked, a tuple, or shared by the pair; bool or float. The error is the mean over what
            it leaves: sum(mask * square) / sum(mask), and 0 for a sample it hides. What is masked
            with 0 may be anything, NaN too. A mask without channels, (2B, H, W), needs
            ``mask.unsqueeze(1)``. Code that divides the masked sum by *all* elements (sd-scripts)
            is ``sample_weight=mask.expand_as(model_pred).flatten(1).mean(1)`` beside the mask.
        sample_weight: on the errors, before the link (sigma^-2, min-SNR on errors): a number, (B,)
            for one weight per pair, (2B,) for one per sample, winners first, or a tuple. A weight
            on the *loss* of a pair, as sd-scripts' min-SNR is, goes to pair_weight: inside the
            sigmoid it is another loss altogether.
        huber_c: for pseudo-Huber errors, mean sqrt(d^2 + c^2) - c, instead of squares. sd-scripts'
            smooth_l1 is twice that (sample_weight=2), its huber 2 c times it.
        swap: train with the labels swapped: what is said above of winners happens to losers.
        error_reduction: "mean" or "sum" over the elements of a sample; beta depends on it.
        reduction: "mean" or "sum" over pairs, or "none" for one loss a pair.
        impl: "auto" runs the Triton kernels on GPU tensors where Triton is there, and otherwise
            PyTorch; "triton" and "torch" run just that, or raise.
        scalars: the link's hyper-parameters by name, its defaults where none is given; and
            logit_scale (1), loser_weight (1), pair_weight (1), label_smoothing (0), sft_weight (the
            link's: 1 for mapo, orpo and sft, else 0) and prior_weight (0). Three traps:

            - loser_weight scales the loser's score, and so the loss and the margin. To scale the
              loser's gradient only (Diffusion-SDPO), pass the losers' prediction as
              ``l.detach() + scale * (l - l.detach())``.
            - sft_weight multiplies the winner's error as it is reduced. With
              error_reduction="sum", a weight meant for a mean (SimpleTuner's) is
              ``sft_weight / n_elements``.
            - A weight of 0 adds exactly 0 to loss and gradient, whatever it weighs, NaN included.

        Each number may be a float, a 0-d tensor, or a tensor of one value a pair, (B,), on
        model_pred's device: it may change from step to step without a sync or a recompilation (and
        values on a GPU are not checked). Under torch.compile a float that changes recompiles.

    Returns:
        LossOutput. Errors and link are computed in fp32 (by PyTorch in fp64 if an input is fp64).
        Its mse_w and mse_l are without sample_weight, and of the data's winner and loser under
        swap too; its margin is that of the formula.

    Raises:
        TypeError, ValueError: bad input; it names the argument, what came and what is needed.
        RuntimeError: a second derivative through the kernels.
    """
    chosen = _check_options(link, reduction, error_reduction)
    _check_reference(chosen, "ref_pred or ref_mse", ref_pred is not None or ref_mse is not None)
    pairs = check_pairs(model_pred, target, ref_pred, ref_mse, mask, swap)
    device = pairs.device
    numbers = check_scalars(chosen, scalars, sample_weight, pairs.n_pairs, device, swap)
    huber = check_huber(huber_c, device)
    run = ops.pair_loss if _takes_triton(impl, pairs) else reference.pair_loss
    loss, stats = run(chosen, numbers, pairs, huber, reduction, error_reduction)
    if pairs.ref[0] is None:
        return LossOutput(loss, *stats.unbind()[:3])
    mse_w, mse_l, drop_w, drop_l, ref_w, ref_l, margin, *_ = stats.unbind()
    return LossOutput(loss, mse_w, mse_l, margin, ref_w, ref_l, drop_w, drop_l)


def losses_from_errors(
    mse: Halves,
    *,
    link: str | Link,
    ref_mse: Halves | None = None,
    sample_weight: Scalar | tuple[Scalar, Scalar] | None = None,
    swap: bool = False,
    reduction: Reduction = "mean",
    **scalars: Scalar,
) -> LossOutput:
    """The same losses from errors that a trainer has already: of each sample, and differentiable.

    Args:
        mse: (2B,) errors with the B winners' first, or a tuple of (B,) each; means or sums over
            elements, with whatever weights and masks. The loss is differentiated by them.
        ref_mse: the reference's, for links that need a reference; constants.
        link: a name in `fastpref_kernels.LINKS`, such as mapo or dpo_<loss_type>, or a `Link`.
            Diffusion-NPO is dpo_sigmoid with swap=True and beta=2000.

    All else is as in `pair_loss`. In PyTorch, on any device: (B,) numbers need no kernel of ours.
    """
    chosen = _check_options(link, reduction)
    operand, ref, n_pairs = check_errors(mse, ref_mse)
    _check_reference(chosen, "ref_mse", ref_mse is not None)
    errors = halves(operand, n_pairs, swap)
    device = errors[0].device
    numbers = check_scalars(chosen, scalars, sample_weight, n_pairs, device, swap)
    given = (*errors, *(r for r in ref if r is not None))
    dtype = torch.float64 if any(e.dtype == torch.float64 for e in given) else torch.float32
    with no_autocast(device):
        err_w, err_l = (e.to(dtype) for e in errors)
        numbers = [cast(number, dtype) for number in numbers]
        uses = live(chosen, numbers)
        err_w = gate(err_w, uses.err_w | uses.gap_w, err_w.detach)
        err_l = gate(err_l, uses.err_l | uses.gap_l, err_l.detach)
        gap_w, gap_l = err_w, err_l
        if ref[0] is not None:
            ref_w, ref_l = (e.to(dtype) for e in halves(ref, n_pairs, swap))
            gap_w, gap_l = err_w - ref_w, err_l - ref_l
        per_pair, _, _, margin = pair_losses(chosen, (err_w, err_l), (gap_w, gap_l), numbers)
    loss = reduce(per_pair, reduction)
    results = [(err_w, err_l)]
    if ref[0] is not None:
        results += [(ref_w, ref_l), (gap_w, gap_l)]
    # Clones: an output never shares memory with an input or with what backward reads.
    each = [e.detach().clone() for pair in results for e in (pair[::-1] if swap else pair)]
    mse_w, mse_l, *of_ref = each
    return LossOutput(loss, mse_w, mse_l, margin.detach(), *of_ref)


def _check_options(link: str | Link, reduction: str, error_reduction: str = "mean") -> Link:
    if isinstance(link, str):
        if link not in LINKS:
            raise ValueError(f"link is {link!r}; expected one of {', '.join(LINKS)}")
        link = LINKS[link]
    elif not isinstance(link, Link):
        raise TypeError(f"link must be a name or a Link, got a {type(link).__name__}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction is {reduction!r}; expected "mean", "sum" or "none"')
    if error_reduction not in ("mean", "sum"):
        raise ValueError(f'error_reduction is {error_reduction!r}; expected "mean" or "sum"')
    return link


class MissingReference(ValueError):
    """The loss needs a reference, and nobody gave it one."""


def _check_reference(link: Link, arguments: str, given: bool) -> None:
    if link.score.needs_ref and not given:
        raise MissingReference(
            f"{arguments} is missing; loss {link.name!r} compares with a reference model and needs "
            "its predictions or errors"
        )
    if given and not link.score.needs_ref:
        raise ValueError(f"{arguments} was given, but loss {link.name!r} uses no reference model")


def _takes_triton(impl: str, pairs: Pairs) -> bool:
    """Whether the kernels run; an explicit "triton" never falls back."""
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f'impl is {impl!r}; expected "auto", "triton" or "torch"')
    if impl == "torch":
        return False
    device = pairs.device.type
    if TRITON_MISSING:
        obstacle = TRITON_MISSING
    elif pairs.wide:
        obstacle = "a tensor is float64; the kernels take float32, float16 and bfloat16"
    elif transformed():
        obstacle = "torch.func or forward-mode AD is active, which needs PyTorch's own operations"
    elif device == "cpu" and not ops.INTERPRETED:
        obstacle = "tensors are on the CPU, and TRITON_INTERPRET=1 was not set before the import"
    elif device not in ("cpu", "cuda", "xpu"):
        obstacle = f"tensors are on {device}; Triton runs on cuda (NVIDIA and AMD) and xpu"
    else:  # the interpreter is for tests: auto never takes it
        return impl == "triton" or device != "cpu"
    if impl == "triton":
        raise ValueError(f'impl is "triton", but {obstacle}; expected "auto" or "torch"')
    return False
