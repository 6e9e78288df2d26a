"""What a trainer may hand in, and what is refused: model_pred and target in all their forms."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

Halves: TypeAlias = "Tensor | tuple[Tensor, Tensor]"

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Pairs(NamedTuple):
    """Predictions and targets of B pairs: each (stacked (2B, ...), None) or (winners, losers), or,
    for a target that pairs share, ((B, ...), None)."""

    pred: tuple[Tensor, Tensor | None]
    target: tuple[Tensor, Tensor | None]
    n_pairs: int

    def tensors(self) -> list[Tensor]:
        return [t for t in (*self.pred, *self.target) if t is not None]


def check_pairs(model_pred: Halves, target: Halves) -> Pairs:
    """Raises TypeError or ValueError that names the argument, what came, and what is needed."""
    pred_w, pred_l = _operand("model_pred", model_pred)
    target_w, target_l = _operand("target", target)
    n_samples, *sample = pred_w.shape
    if pred_w.numel() == 0:
        raise ValueError(
            f"model_pred is empty, shape {tuple(pred_w.shape)}: "
            "at least one pair of one element is needed"
        )
    if pred_l is None and n_samples % 2:
        raise ValueError(
            f"model_pred stacks {n_samples} samples, an odd number: "
            "as many losers as winners are needed, torch.cat([winners, losers])"
        )
    n_pairs = n_samples // 2 if pred_l is None else n_samples
    # no `in`: Dynamo gets it wrong for symbolic sizes
    shared_or_half = target_w.shape[0] == n_pairs
    stacked = target_l is None and target_w.shape[0] == 2 * n_pairs
    if list(target_w.shape[1:]) != sample or not (shared_or_half or stacked):
        leading = (2 * n_pairs, n_pairs) if target_l is None else (n_pairs,)
        needed = " or ".join(str((n, *sample)) for n in leading)
        each = "" if target_l is None else " in each half"
        raise ValueError(
            f"target has shape {tuple(target_w.shape)}{each}, but model_pred holds {n_pairs} "
            f"pair(s) of {tuple(sample)}: {needed} is needed"
        )
    for name, tensor in (("model_pred[1]", pred_l), ("target", target_w), ("target[1]", target_l)):
        if tensor is not None and tensor.device != pred_w.device:
            raise ValueError(
                f"{name} is on {tensor.device}, but model_pred is on {pred_w.device}: "
                "one device is needed"
            )
        constant = tensor is None or tensor is pred_l or not tensor.requires_grad
        if not constant and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires a gradient, but a loss is differentiated by model_pred only: "
                f"{name}.detach() is needed"
            )
    return Pairs((pred_w, pred_l), (target_w, None if target_l is target_w else target_l), n_pairs)


def _operand(name: str, value: object) -> tuple[Tensor, Tensor | None]:
    """One tensor, or winners and losers, of a floating dtype and at least two dimensions."""
    if isinstance(value, Tensor):
        return _tensor(name, value), None
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        what = type(value).__name__
        what += f" of {len(value)}" if isinstance(value, (tuple, list)) else ""
        raise TypeError(f"{name} is a {what}: a tensor or a tuple (winners, losers) is needed")
    winner, loser = _tensor(f"{name}[0]", value[0]), _tensor(f"{name}[1]", value[1])
    if winner.shape != loser.shape:
        raise ValueError(
            f"{name} has winners of shape {tuple(winner.shape)} and losers of shape "
            f"{tuple(loser.shape)}: equal shapes are needed"
        )
    return winner, loser


def _tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}: a torch.Tensor is needed")
    if value.dtype not in _DTYPES:
        raise TypeError(
            f"{name} has dtype {value.dtype}: float32, float16, bfloat16 or float64 is needed"
        )
    if not torch.compiler.is_compiling() and value.is_neg():
        value = value.resolve_neg()  # a lazily negated view, whose memory holds the opposite
    if value.dim() < 2:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}: at least two dimensions, (samples, ...), "
            "are needed"
        )
    return value
