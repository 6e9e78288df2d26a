"""The losses in PyTorch's own operations, which can be differentiated twice, transformed by
torch.func and compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastpref_kernels.knobs import live, pair_losses

from .context import readable, transformed
from .pairs import Pairs
from .sums import (
    Options,
    Side,
    gaps,
    kinds_of,
    per_sample,
    reduce,
    sides_of,
    squares,
    stats_of,
    swapped,
)  # fmt: skip


def gate(value: Tensor, live: Any, size: Callable[[], Tensor]) -> Tensor:
    """The value, cut off from its gradient in the rows that are not live. Their gradient is 0
    already, but 0 times what overflows in them, or is NaN, would not be.

    live: a bool, or a tensor with the rows' dimensions, the first ones of value. size: of value's
    shape, what is in a row. Under a transform, where a derivative by the weights may be asked for,
    only rows whose size squared overflows are cut off.
    """
    if not isinstance(live, Tensor):
        if live:
            return value
        live = torch.zeros((), dtype=torch.bool, device=value.device)
    elif readable(live) and live.all():
        return value
    if transformed():
        rows = size().detach()
        if rows.dim() > 2:
            rows = rows.flatten(2).sum(dim=2)
        live = live | rows.square().isfinite()
    live = live.reshape(live.shape + (1,) * (value.dim() - live.dim()) * (live.dim() > 0))
    return torch.where(live, value, value.detach())


def _largest(pred: Tensor, target: Tensor, *ref: Tensor) -> Tensor:
    """For each element, at least what its squares and its gap come to."""
    total = (pred.detach() - target).square()
    return 4.0 * sum(((each - target).square() for each in ref), start=total)


def pair_loss_differentiably(pairs: Pairs, options: Options) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if pairs.wide else torch.float32
    uses = live(options.link, options.scalars)
    sides = sides_of(pairs)
    of_err = _of_sides((uses.err_w, uses.err_l), pairs, len(sides))
    of_gap = _of_sides((uses.gap_w, uses.gap_l), pairs, len(sides))
    sums = [_gated_sums(*each, options, dtype) for each in zip(sides, of_err, of_gap, strict=True)]
    kinds = kinds_of(sums)
    errors, gaps = (swapped(kind, pairs.swap) for kind in kinds[:2])
    per_pair, *_, margin = pair_losses(options.link, tuple(errors), tuple(gaps), options.scalars)
    return reduce(per_pair, options.reduction), stats_of(pairs, kinds, margin)


def _of_sides(live: tuple[Any, Any], pairs: Pairs, n_sides: int) -> list[Any]:
    """What is live, of winners and losers, for each side: a bool, or a tensor (S, B)."""
    first, second = live[::-1] if pairs.swap else live
    if n_sides == 1 and isinstance(first, bool) and first is second:
        return [first]

    def rows(value: Any) -> Tensor:
        like = torch.zeros(pairs.n_pairs, dtype=torch.bool, device=pairs.device)
        return like | value

    if n_sides == 1:
        return [torch.stack([rows(first), rows(second)])]
    return [each if isinstance(each, bool) else rows(each)[None] for each in (first, second)]


def _gated_sums(
    side: Side, err_live: Any, gap_live: Any, options: Options, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_sums`. Gradients go by the errors and by the gaps of the rows in which these are
    live."""
    pred, target = side.pred.to(dtype), side.target.to(dtype)
    ref = None if side.ref is None else side.ref.to(dtype)
    of_ref = [] if ref is None or ref.dim() == 2 else [ref]
    if side.mask is not None:  # what it hides may be anything, NaN too
        hidden = side.mask == 0
        if transformed():  # the mask may be differentiated by, where it is 0 too
            hidden = hidden & ~_largest(pred, target, *of_ref).isfinite()
        pred, target, *of_ref = (torch.where(hidden, 0.0, t) for t in (pred, target, *of_ref))
    huber_c = options.huber_c

    def reduced(elements: Tensor) -> Tensor:
        return per_sample(elements, side, options.error_reduction)

    if not of_ref:
        size = functools.partial(_largest, pred, target)
        gated = gate(pred, err_live | gap_live, size)
        err = reduced(squares(gated - target, huber_c))
        return err, err if ref is None else err - ref, err if ref is None else ref
    ref = of_ref[0]
    diff_ref = ref - target
    size = functools.partial(_largest, pred, target, ref)
    moving = gate(pred, gap_live, size)
    diff = moving - target
    of_gap = gaps(moving - ref, diff, diff_ref, huber_c)
    if err_live is False and gap_live is not False:  # the loss depends on the gap alone
        of_err = diff.detach()
    else:
        of_err = gate(pred, err_live, size) - target
    return (
        reduced(squares(of_err, huber_c)), reduced(of_gap),
        reduced(squares(diff_ref, huber_c)),
    )  # fmt: skip
