"""One public function per loss: its formula, shapes and source, and the way from checked input to
an implementation."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from fastpref_kernels import LINKS, TRITON_MISSING

from . import ops, reference
from .pairs import Halves, Pairs, check_pairs

Reduction: TypeAlias = Literal["mean", "sum", "none"]
Impl: TypeAlias = Literal["auto", "triton", "torch"]
Hyper: TypeAlias = "float | Tensor"


class LossOutput(NamedTuple):
    """What every loss returns, for B pairs. Only `loss` carries a gradient.

    loss: (), or (B,) for reduction="none".
    mse_w, mse_l: (B,) mean squared error of the prediction, winner's and loser's.
    margin: (B,) logit of the preference; > 0 where the model prefers the winner.
    ref_mse_w, ref_mse_l: (B,) the reference model's errors; None for losses without a reference.
    """

    loss: Tensor
    mse_w: Tensor
    mse_l: Tensor
    margin: Tensor
    ref_mse_w: Tensor | None = None
    ref_mse_l: Tensor | None = None

    def metrics(self) -> dict[str, Tensor]:
        """What to log, as 0-d tensors on the device: nothing here waits for it. All are means over
        pairs, but for the loss with reduction="sum", which is their sum.

        accuracy: share of pairs with margin > 0; a tie counts one half.
        gradient_factor: mean sigmoid(-margin), the share of the preference gradient that is left:
        1/2 for margins of 0, near 0 once they are won (or beta is too large), near 1 if lost.
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
        if self.ref_mse_w is not None and self.ref_mse_l is not None:
            metrics |= {"ref_mse_w": self.ref_mse_w.mean(), "ref_mse_l": self.ref_mse_l.mean()}
        return metrics


def mapo_loss(
    model_pred: Halves,
    target: Halves,
    *,
    beta: Hyper = 0.1,
    snr: Hyper = 0.5,
    num_train_timesteps: Hyper = 1000,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> LossOutput:
    """MaPO: fit the winner and widen the margin over the loser, without a reference model.

    Per pair, with mse the mean of (model_pred - target)^2 over a sample's elements::

        loss   = mse_w + beta * softplus(-margin)
        margin = num_train_timesteps * (phi(snr * mse_w) - phi(snr * mse_l))
        phi(x) = x / (exp(x) - 1)

    Args:
        model_pred: the prediction (epsilon, v or velocity, whatever `target` is): stacked,
            (2B, ...) with the B winners first and their losers after them in the same order, or a
            tuple (winners, losers) of (B, ...) each. Any rank from 2; fp32, fp16 or bf16; any
            strides. Its gradient has its dtype and layout.
        target: what model_pred should have been, a constant: stacked, a tuple, or (B, ...) where
            the pair shares it (epsilon prediction with one noise for both: pass that noise, and it
            is read once). Its dtype and strides may differ from model_pred's.
        beta: weight of the preference term. No 1/2 and no T is folded into it.
        snr: scale of the errors inside phi; the official code's `snr_value`, one constant for all
            timesteps.
        num_train_timesteps: the factor T on the margin; the noise scheduler's number of training
            timesteps. At a tie near mse = 0 the preference pulls beta * T * snr / 4 times as hard
            as the fit, 12.5 at the defaults.
        reduction: "mean" or "sum" over pairs, or "none" for one loss a pair.
        impl: "auto" runs the Triton kernels on GPU tensors where Triton is there, and otherwise
            PyTorch; "triton" and "torch" run just that, or raise.

        beta, snr and num_train_timesteps are floats above 0, or 0-d tensors on model_pred's device,
        which may change from step to step without a sync or a recompilation (and whose values are
        not checked). Under torch.compile a float that changes recompiles.

    Returns:
        LossOutput. Errors and link are computed in fp32 (by PyTorch in fp64 if an input is fp64),
        and are finite and right for every error that fp32 holds, 0 included.

    Raises:
        TypeError, ValueError: bad input; it names the argument, what came and what is needed.
        RuntimeError: a second derivative through the kernels.

    Source: Hong et al., "Margin-aware Preference Optimization for Aligning Diffusion Models without
    Reference", arXiv:2406.06424; the formula is that of the official code, `compute_loss` in
    utils.py of github.com/mapo-t2i/mapo, evaluated such that small and large errors do not break it
    (there, NaN at mse = 0 and gradients of the wrong sign near 1e-5).
    """
    hyper = {"beta": beta, "snr": snr, "num_train_timesteps": num_train_timesteps}
    return pair_loss(model_pred, target, link="mapo", reduction=reduction, impl=impl, **hyper)


def sft_loss(
    model_pred: Halves, target: Halves, *, reduction: Reduction = "mean", impl: Impl = "auto"
) -> LossOutput:
    """Supervised fine-tuning on the winners, the baseline: losers are measured, and not trained on.

    Per pair, ``loss = mse_w``, ``margin = mse_l - mse_w``. Arguments, result and errors are as in
    `mapo_loss`. Source: the simple objective of Ho et al., "Denoising Diffusion Probabilistic
    Models", arXiv:2006.11239.
    """
    return pair_loss(model_pred, target, link="sft", reduction=reduction, impl=impl)


def pair_loss(
    model_pred: Halves,
    target: Halves,
    *,
    link: str,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
    **hyper: Hyper,
) -> LossOutput:
    """The general entry: the loss that `fastpref_kernels.LINKS` holds under the name `link`.

    `hyper` are that link's hyper-parameters by name, its defaults where none is given. All else is
    as in `mapo_loss`.
    """
    if link not in LINKS:
        raise ValueError(f"link is {link!r}: one of {', '.join(LINKS)} is needed")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction is {reduction!r}: "mean", "sum" or "none" is needed')
    pairs = check_pairs(model_pred, target)
    values = _check_hyper(link, hyper, pairs.pred[0].device)
    if _takes_triton(impl, pairs):
        loss, stats = ops.pair_loss(link, values, pairs, reduction)
    else:
        loss, stats = reference.pair_loss(LINKS[link], values, pairs, reduction)
    return LossOutput(loss, *stats.unbind()[:3])


def _check_hyper(link: str, given: Mapping[str, Any], device: torch.device) -> list[Hyper]:
    """The link's hyper-parameters in its order, each a float above 0 or a 0-d tensor."""
    defaults = LINKS[link].hyper
    if unknown := sorted(given.keys() - defaults.keys()):
        known = ", ".join(defaults) or "none"
        raise TypeError(f"{', '.join(unknown)} came, but link {link!r} takes {known}")
    return [_positive(name, given.get(name, default), device) for name, default in defaults.items()]


def _positive(name: str, value: Any, device: torch.device) -> Hyper:
    if isinstance(value, Tensor):
        if value.dim() or not value.is_floating_point() or value.requires_grad:
            raise ValueError(
                f"{name} is a {value.dtype} tensor of shape {tuple(value.shape)}"
                f"{' that requires a gradient' if value.requires_grad else ''}: "
                "a float, or a constant 0-d float tensor, is needed"
            )
        if value.device == device:
            return value
        if value.device.type != "cpu":
            raise ValueError(f"{name} is on {value.device}: {device}, model_pred's, is needed")
        value = value.item()  # it is in host memory: nothing is waited for
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is a {type(value).__name__}: a float or 0-d tensor is needed")
    value = float(value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}: a finite number above 0 is needed")
    return value


def _takes_triton(impl: str, pairs: Pairs) -> bool:
    """Whether the kernels run; an explicit "triton" never falls back."""
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f'impl is {impl!r}: "auto", "triton" or "torch" is needed')
    if impl == "torch":
        return False
    device = pairs.pred[0].device.type
    if TRITON_MISSING:
        obstacle = TRITON_MISSING
    elif any(t.dtype == torch.float64 for t in pairs.tensors()):
        obstacle = "a tensor is float64; the kernels take float32, float16 and bfloat16"
    elif device == "cpu" and not ops.INTERPRETED:
        obstacle = "tensors are on the CPU, and TRITON_INTERPRET=1 was not set before the import"
    elif device not in ("cpu", "cuda", "xpu"):
        obstacle = f"tensors are on {device}; Triton runs on cuda (NVIDIA and AMD) and xpu"
    else:  # the interpreter is for tests: auto never takes it
        return impl == "triton" or device != "cpu"
    if impl == "triton":
        raise ValueError(f'impl is "triton", but {obstacle}: "auto" or "torch" is needed')
    return False


class _PairLossModule(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class MaPOLoss(_PairLossModule):
    """`mapo_loss` as a module: ``MaPOLoss(beta=0.1)(model_pred, target)``."""

    def __init__(
        self,
        *,
        beta: Hyper = 0.1,
        snr: Hyper = 0.5,
        num_train_timesteps: Hyper = 1000,
        reduction: Reduction = "mean",
        impl: Impl = "auto",
    ) -> None:
        hyper = {"beta": beta, "snr": snr, "num_train_timesteps": num_train_timesteps}
        super().__init__(**hyper, reduction=reduction, impl=impl)

    def forward(self, model_pred: Halves, target: Halves) -> LossOutput:
        return mapo_loss(model_pred, target, **self.options)


class SFTLoss(_PairLossModule):
    """`sft_loss` as a module."""

    def __init__(self, *, reduction: Reduction = "mean", impl: Impl = "auto") -> None:
        super().__init__(reduction=reduction, impl=impl)

    def forward(self, model_pred: Halves, target: Halves) -> LossOutput:
        return sft_loss(model_pred, target, **self.options)
