"""The same loss in eager PyTorch: any device, any float dtype including fp64, twice differentiable,
no Triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastpref_kernels.links import Link

from .pairs import Pairs


def pair_loss(
    link: Link, hyper: Sequence[float | Tensor], pairs: Pairs, reduction: str
) -> tuple[Tensor, Tensor]:
    """(loss, stats): the loss, () or (B,) for reduction "none", and detached stats (3, B): mse_w,
    mse_l, margin."""
    dtype = (
        torch.float64 if any(t.dtype == torch.float64 for t in pairs.tensors()) else torch.float32
    )
    with torch.autocast(pairs.pred[0].device.type, enabled=False):
        pred_w, pred_l = _halves(pairs.pred, pairs.n_pairs)
        target_w, target_l = _halves(pairs.target, pairs.n_pairs)
        err_w = (pred_w.to(dtype) - target_w.to(dtype)).square().flatten(1).mean(dim=1)
        err_l = (pred_l.to(dtype) - target_l.to(dtype)).square().flatten(1).mean(dim=1)
        per_pair, margin = link.torch(err_w, err_l, *hyper)
        loss = per_pair
        if reduction != "none":
            loss = per_pair.mean() if reduction == "mean" else per_pair.sum()
    return loss, torch.stack([err_w, err_l, margin]).detach()


def _halves(operand: tuple[Tensor, Tensor | None], n_pairs: int) -> tuple[Tensor, Tensor]:
    """Winners and losers; both are the tensor itself where the pair shares it."""
    first, loser = operand
    if loser is not None:
        return first, loser
    return (first, first) if first.shape[0] == n_pairs else (first[:n_pairs], first[n_pairs:])
