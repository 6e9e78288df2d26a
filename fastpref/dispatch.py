"""Entry point of all losses: validate, choose Triton or PyTorch, return a LossOutput."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from typing_extensions import TypedDict

from fastpref_kernels import LINKS, TRITON_MISSING, Link
from fastpref_kernels.groups import ERRORS
from fastpref_kernels.knobs import NOTHING_AROUND, Around, live

from . import ops, reference
from .batch import Batch, Halves, Scalar, check_errors, check_pairs, halves
from .context import no_autocast, transformed
from .differentiable import gate
from .linked import of_pairs, reduced
from .outputs import LossOutput
from .scalars import (
    ANCHOR,
    NAMES,
    check_guard,
    check_heat,
    check_huber,
    check_scalar,
    check_scalars,
    unexpected,
)
from .sums import Options, cast

Reduction: TypeAlias = Literal["mean", "sum", "none", "dro"]
ErrorReduction: TypeAlias = Literal["mean", "sum"]
Impl: TypeAlias = Literal["auto", "triton", "torch"]
SafeguardOver: TypeAlias = Literal["batch", "pair"]


class CoreKnobs(TypedDict, total=False):
    """Keyword arguments that every loss takes; see `pair_loss`."""

    mask: Halves
    sample_weight: Scalar | tuple[Scalar, Scalar]
    pair_weight: Scalar
    logit_scale: Scalar
    sft_weight: Scalar
    loser_gradient_scale: Scalar | None
    safeguard: Scalar | None
    safeguard_over: SafeguardOver
    anchor_weight: Scalar | None
    error_reduction: ErrorReduction
    reduction: Reduction
    dro_temperature: Scalar
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
    loser_gradient_scale: Scalar | None = None,
    safeguard: Scalar | None = None,
    safeguard_over: SafeguardOver = "batch",
    anchor_weight: Scalar | None = None,
    error_reduction: ErrorReduction = "mean",
    reduction: Reduction = "mean",
    dro_temperature: Scalar = 1.0,
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
            + anchor_weight * (drift_w + drift_l) / 2
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
        huber_c: for pseudo-Huber errors, mean sqrt(d^2 + c^2) - c, instead of squares: one number,
            (B,) for one per pair, or (2B,) for one per sample, winners first. 0 is for L1 errors,
            mean |d|. sd-scripts' smooth_l1 is twice that (sample_weight=2), its huber 2 c times it.
        swap: train with the labels swapped: what is said above of winners happens to losers.
        loser_gradient_scale: what the loser's gradient is multiplied by, 0 and above, the loss
            being as without it; one number, or (B,).
        safeguard: Diffusion-SDPO's mu, in [0, 1], which chooses that factor so that a step lowers
            the winner's error by at least the share mu of what it would without the loser:
            min(1, (1 - mu) err_w / cross), cross = mean (pred_w - target_w) (pred_l - target_l),
            and 1 where cross is not above 0 (arXiv:2511.03317; github.com/AIDC-AI/Diffusion-SDPO,
            train.py, without its 1e-9). Only for errors that are squares.
        safeguard_over: "batch" takes both sums over the batch's pairs (of pair_weight above 0), as
            published, so that the factor depends on who else is in it; "pair", which is not in the
            paper, has a factor for each pair.
        anchor_weight: weight of the mean squared difference of model_pred and ref_pred (its sum,
            where error_reduction is), which it needs, and which a loss without a reference then
            takes for this alone. The loser's share of its gradient is not scaled.
        error_reduction: "mean" or "sum" over the elements of a sample; beta depends on it.
        reduction: "mean" or "sum" over pairs, "none" for one loss a pair, or "dro" for
            T log(mean(exp(loss / T))), robust optimisation under a shift of the distribution
            (DoRA, arXiv:2504.05831): pairs of high loss count for more. pair_weight multiplies the
            loss inside the exponential, so a pair of weight 0 counts as one of loss 0, and has no
            gradient. Of a batch of one it is the loss.
        dro_temperature: T; the higher, the nearer to the mean.
        impl: "auto" runs the Triton kernels on GPU tensors where Triton is there, and otherwise
            PyTorch; "triton" and "torch" run just that, or raise.
        scalars: the link's hyper-parameters by name, its defaults where none is given; and
            logit_scale (1), loser_weight (1), pair_weight (1), label_smoothing (0), sft_weight (the
            link's: 1 for mapo, orpo and sft, else 0) and prior_weight (0). Three traps:

            - loser_weight scales the loser's score, and so the loss and the margin. To scale the
              loser's gradient only, use loser_gradient_scale.
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
    _check_reference(
        chosen, "ref_pred or ref_mse", ref_pred is not None or ref_mse is not None, anchor_weight
    )
    batch = check_pairs(model_pred, target, ref_pred, ref_mse, mask, swap)
    n_pairs, device = batch.n_groups, batch.device
    numbers = check_scalars(chosen, scalars, sample_weight, n_pairs, device, swap)
    huber = None if huber_c is None else check_huber(huber_c, n_pairs, 2 * n_pairs, device)
    around = NOTHING_AROUND
    guarded = safeguard is not None or loser_gradient_scale is not None
    heated = reduction == "dro" or type(dro_temperature) is not float or dro_temperature != 1.0
    if guarded or anchor_weight is not None or heated:
        guard = check_guard(loser_gradient_scale, safeguard, safeguard_over, n_pairs, device)
        if anchor_weight is not None:
            if ref_pred is None:
                raise ValueError(
                    "anchor_weight was given, but ref_pred is missing, which it needs; for a loss "
                    f"without a reference, pass both to pair_loss(..., link={chosen.name!r})"
                )
            anchor_weight = check_scalar("anchor_weight", anchor_weight, ANCHOR, n_pairs, device)
        if safeguard is not None and huber is not None:
            raise ValueError("safeguard was given with huber_c; expected errors that are squares")
        around = Around(*guard, anchor_weight, None, check_heat(reduction, dro_temperature, device))
    options = Options(chosen, numbers, huber, reduction, error_reduction, around)
    run = ops.loss_of if takes_triton(impl, batch) else reference.loss_of
    return output_of_pairs(*run(batch, options), options, batch.ref[0] is not None)


def output_of_pairs(loss: Tensor, stats: Tensor, options: Options, has_ref: bool) -> LossOutput:
    """stats: rows of both members, of each kind of sums; the cross sums; and the margin."""
    drift, cross = options.needs
    mse_w, mse_l, *each = stats.unbind()
    if not has_ref:
        return LossOutput(loss, mse_w, mse_l, each[cross])
    drop_w, drop_l, ref_w, ref_l, *rest = each
    margin = rest[2 * drift + cross]
    return LossOutput(loss, mse_w, mse_l, margin, ref_w, ref_l, drop_w, drop_l)


def losses_from_errors(
    mse: Halves,
    *,
    link: str | Link,
    ref_mse: Halves | None = None,
    gap: Halves | None = None,
    sample_weight: Scalar | tuple[Scalar, Scalar] | None = None,
    swap: bool = False,
    loser_gradient_scale: Scalar | None = None,
    reduction: Reduction = "mean",
    dro_temperature: Scalar = 1.0,
    **scalars: Scalar,
) -> LossOutput:
    """The same losses from errors that a trainer has already: of each sample, and differentiable.

    Args:
        mse: (2B,) errors with the B winners' first, or a tuple of (B,) each; means or sums over
            elements, with whatever weights and masks. The loss is differentiated by them.
        ref_mse: the reference's, for links that need a reference; constants.
        gap: instead of ref_mse, mse less the reference's, as `pair_errors` has it, without the
            cancellation of mse - ref_mse. The loss is differentiated by it, too.
        link: a name in `fastpref_kernels.LINKS`, such as mapo or dpo_<loss_type>, or a `Link`.
            Diffusion-NPO is dpo_sigmoid with swap=True and beta=2000.

    All else is as in `pair_loss`. In PyTorch, on any device: (B,) numbers need no kernel of ours.
    """
    chosen = _check_options(link, reduction)
    accepted = [*chosen.hyper, *NAMES, "sample_weight", "swap", "loser_gradient_scale"]
    if unknown := [name for name in scalars if name not in accepted]:
        accepted += ["reduction", "dro_temperature"]
        raise TypeError(unexpected("losses_from_errors", unknown, accepted))
    if gap is not None and ref_mse is not None:
        raise ValueError("ref_mse and gap were both given; expected only one of them")
    operand, ref, n_pairs = check_errors(mse, ref_mse, gap)
    _check_reference(chosen, "ref_mse or gap", ref_mse is not None or gap is not None)
    errors = halves(operand, n_pairs)
    device = errors[0].device
    numbers = check_scalars(chosen, scalars, sample_weight, n_pairs, device, swap)
    guard = check_guard(loser_gradient_scale, None, "pair", n_pairs, device)
    given = (*errors, *(r for r in ref if r is not None))
    dtype = torch.float64 if any(e.dtype == torch.float64 for e in given) else torch.float32
    with no_autocast(device):
        heat = cast(check_heat(reduction, dro_temperature, device), dtype)
        around = Around(guard[0], cast(guard[1], dtype), heat=heat)
        numbers = [cast(number, dtype) for number in numbers]
        options = Options(chosen, numbers, None, reduction, "mean", around)
        of_err, of_gap = _live(options, swap)
        both = torch.stack([e.to(dtype) for e in errors])
        if ref[0] is None:
            kinds = [_gated(both, of_err)]
        else:
            of_ref = torch.stack([e.to(dtype) for e in halves(ref, n_pairs)])
            if gap is None:
                both = _gated(both, [e | g for e, g in zip(of_err, of_gap, strict=True)])
                kinds = [both, both - of_ref, of_ref]
            else:
                both, of_ref = _gated(both, of_err), _gated(of_ref, of_gap)
                kinds = [both, of_ref, both - of_ref]
        losses, _, (margin,) = of_pairs(options, kinds, None, swap)
        loss = reduced(losses, options)
    # Clones: an output never shares memory with an input or with what backward reads.
    each = [e.detach().clone() for kind in kinds for e in kind]
    if len(kinds) == 1:
        return LossOutput(loss, each[0], each[1], margin.detach())
    mse_w, mse_l, drop_w, drop_l, ref_w, ref_l = each
    return LossOutput(loss, mse_w, mse_l, margin.detach(), ref_w, ref_l, drop_w, drop_l)


def _live(options: Options, swap: bool) -> tuple[list[Any], list[Any]]:
    """Which errors, and which gaps, a loss depends on."""
    assert isinstance(options.link, Link)
    uses = live(options.link, options.scalars)
    err, gap = [uses.err_w, uses.err_l], [uses.gap_w, uses.gap_l]
    return (err[::-1], gap[::-1]) if swap else (err, gap)


def _gated(rows: Tensor, uses: list[Any]) -> Tensor:
    """(2, B), cut off from their gradients where nothing depends on them."""
    each = zip(rows.unbind(), uses, strict=True)
    return torch.stack([gate(row, of, row.detach) for row, of in each])


class PairErrors(NamedTuple):
    """(B,) each, differentiable: the errors of winners and losers, and with a reference their gaps,
    errors less the reference's; else None."""

    mse_w: Tensor
    mse_l: Tensor
    gap_w: Tensor | None = None
    gap_l: Tensor | None = None

    @property
    def mse(self) -> tuple[Tensor, Tensor]:
        return self.mse_w, self.mse_l

    @property
    def gap(self) -> tuple[Tensor, Tensor]:
        """Raises: ValueError without a reference."""
        if self.gap_w is None or self.gap_l is None:
            raise ValueError("pair_errors was given neither ref_pred nor ref_mse: there is no gap")
        return self.gap_w, self.gap_l


def pair_errors(
    model_pred: Halves,
    target: Halves,
    ref_pred: Halves | None = None,
    *,
    ref_mse: Halves | None = None,
    mask: Halves | None = None,
    huber_c: Scalar | None = None,
    error_reduction: ErrorReduction = "mean",
    impl: Impl = "auto",
) -> PairErrors:
    """The errors of pairs, for a loss of your own: one launch forward, and one backward.

        mse = mean (model_pred - target)^2
        gap = mse - mse of the reference, as mean (model_pred - ref_pred) * (model_pred + ref_pred -
              2 * target), which has not cancelled

    They go into `losses_from_errors`, where a number of the loss depends on the margins of the same
    batch (auto-beta, an alpha that follows the batch)::

        errors = fastpref.pair_errors(model_pred, target, ref_pred)
        beta = 0.2 / (errors.gap_l - errors.gap_w).detach().abs().mean()
        out = fastpref.losses_from_errors(
            errors.mse, gap=errors.gap, link="dpo_sigmoid", beta=beta
        )

    Args: as in `pair_loss`. Gradients are with respect to model_pred. Under torch.compile, and
    where somebody differentiates twice, they are PyTorch's own operations.
    """
    check_reductions("none", error_reduction)
    batch = check_pairs(model_pred, target, ref_pred, ref_mse, mask)
    n_pairs = batch.n_groups
    huber = None if huber_c is None else check_huber(huber_c, n_pairs, 2 * n_pairs, batch.device)
    options = Options(ERRORS, (), huber, "none", error_reduction)
    fused = takes_triton(impl, batch) and not batch.intercepted
    run = ops.errors_of if fused else reference.errors_of
    return PairErrors(*run(batch, options))


def _check_options(link: str | Link, reduction: str, error_reduction: str = "mean") -> Link:
    if isinstance(link, str):
        if link not in LINKS:
            raise ValueError(f"link is {link!r}; expected one of {', '.join(LINKS)}")
        link = LINKS[link]
    elif not isinstance(link, Link):
        raise TypeError(f"link must be a name or a Link, got a {type(link).__name__}")
    check_reductions(reduction, error_reduction)
    return link


def check_reductions(reduction: str, error_reduction: str) -> None:
    if reduction not in ("mean", "sum", "none", "dro"):
        raise ValueError(f'reduction is {reduction!r}; expected "mean", "sum", "none" or "dro"')
    if error_reduction not in ("mean", "sum"):
        raise ValueError(f'error_reduction is {error_reduction!r}; expected "mean" or "sum"')


class MissingReference(ValueError):
    """The loss needs a reference, and nobody gave it one."""


def _check_reference(
    link: Link, arguments: str, given: bool, anchor_weight: Scalar | None = None
) -> None:
    if link.score.needs_ref and not given:
        raise MissingReference(
            f"{arguments} is missing; loss {link.name!r} compares with a reference model and needs "
            "its predictions or errors"
        )
    if given and not link.score.needs_ref and anchor_weight is None:
        raise ValueError(f"{arguments} was given, but loss {link.name!r} uses no reference model")


def takes_triton(impl: str, batch: Batch) -> bool:
    """Whether the kernels run; an explicit "triton" never falls back."""
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f'impl is {impl!r}; expected "auto", "triton" or "torch"')
    if impl == "torch":
        return False
    device = batch.device.type
    if TRITON_MISSING:
        obstacle = TRITON_MISSING
    elif batch.is_fp64:
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
