"""The losses in PyTorch's own operations, which can be differentiated twice, transformed by
torch.func and compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref_kernels.knobs import live
from fastpref_kernels.links import Group

from .batch import Batch
from .context import readable, transformed
from .linked import linked, reduced
from .sums import (
    Options,
    Side,
    cast_side,
    cross_of,
    gaps,
    mixed,
    of_members,
    per_sample,
    sides_of,
    squares,
    stats_of,
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


def loss_differentiably(batch: Batch, options: Options) -> tuple[Tensor, Tensor]:
    """As `reference.loss_of`."""
    dtype = torch.float64 if batch.is_fp64 else torch.float32
    kinds, cross = sums_differentiably(batch, options, _live(batch, options), dtype)
    losses, _, scores = linked(batch, options, kinds, cross)
    stats = stats_of(kinds, cross, scores)
    return reduced(losses, options), stats


def sums_differentiably(
    batch: Batch, options: Options, uses: Live, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor | None]:
    """(members, B) of each kind, and the cross sums, which are constants."""
    sides = sides_of(batch, options)
    of_err, of_gap, of_drift = (_of_sides(each, batch, len(sides)) for each in uses)
    each = zip(sides, of_err, of_gap, of_drift, strict=True)
    kinds = of_members([_gated_sums(*side, options, dtype) for side in each])
    if not options.needs[1]:
        return kinds, None
    constants = [side._replace(pred=side.pred.detach()) for side in sides]
    return kinds, cross_of(constants, options.error_reduction, dtype, batch.swap)


class Live(NamedTuple):
    """What the loss depends on of each member: through errors, gaps, and drifts or distances from
    the anchor. Each is a bool, or a tensor of shape () or (B,)."""

    err: tuple[Any, ...]
    gap: tuple[Any, ...]
    drift: tuple[Any, ...]


def _live(batch: Batch, options: Options) -> Live:
    around = options.around
    if isinstance(options.link, Group):
        uses = options.link.live(*options.scalars)
        if around.weight is not None:
            uses = uses & (around.weight != 0.0)
        each: tuple[Any, ...] = (uses,) * batch.members
        if batch.lengths is not None:
            each = tuple(uses & (batch.lengths > m) for m in range(batch.members))
        return Live(each, each, each)
    of = live(options.link, options.scalars)
    drift: tuple[Any, ...] = (False, False)
    if around.drift_weight is not None:
        drift = (around.drift_weight != 0.0,) * 2
    err, gap = (of.err_w, of.err_l), (of.gap_w, of.gap_l)
    return Live(err[::-1], gap[::-1], drift) if batch.swap else Live(err, gap, drift)


def _of_sides(live: tuple[Any, ...], batch: Batch, n_sides: int) -> list[Any]:
    """What is live, of all members or of each, for each side: a bool, or a tensor (S, B)."""
    if n_sides == 1 and isinstance(live[0], bool) and all(each is live[0] for each in live):
        return [live[0]]

    def rows(value: Any) -> Tensor:
        like = torch.zeros(batch.n_groups, dtype=torch.bool, device=batch.device)
        return like | value

    if n_sides == 1:
        return [torch.stack([*map(rows, live)])]
    return [each if isinstance(each, bool) else rows(each)[None] for each in live]


def _gated_sums(
    side: Side, err_live: Any, gap_live: Any, drift_live: Any, options: Options, dtype: torch.dtype
) -> list[Tensor]:
    """As `reference._sums`. Gradients go by the errors, by the gaps and by the drifts of the rows
    in which these are live. What is mixed is a constant."""
    side = cast_side(side, dtype)
    pred, target, ref, anchor = side.pred, side.target, side.ref, side.anchor
    of_ref = [] if ref is None or ref.dim() == 2 else [ref]
    of_anchor = [] if anchor is None else [anchor]
    if side.mask is not None:  # what it hides may be anything, NaN too
        hidden = side.mask == 0
        if transformed():  # the mask may be differentiated by, where it is 0 too
            hidden = hidden & ~_largest(pred, target, *of_ref, *of_anchor).isfinite()
        pred, target, *of_ref = (torch.where(hidden, 0.0, t) for t in (pred, target, *of_ref))
        anchor = None if anchor is None else torch.where(hidden, 0.0, anchor)
    huber_c = side.huber_c

    def reduced(elements: Tensor) -> Tensor:
        return per_sample(elements, side, options.error_reduction)

    if not of_ref:
        size = functools.partial(_largest, pred, target)
        gated = gate(pred, err_live | gap_live, size)
        err = reduced(squares(gated - target, huber_c))
        kinds = [err] if ref is None else [err, err - ref, ref]
        return kinds if anchor is None else [*kinds, reduced(_distance(pred, anchor, drift_live))]
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
    kinds = [squares(of_err, huber_c), of_gap, squares(diff_ref, huber_c)]
    if options.needs[0]:
        kinds.append(_distance(pred, ref, drift_live))
    if side.mix is not None:
        kinds += mixed(diff_ref, pred.detach() - ref, side.mix)
    if anchor is not None:
        kinds.append(_distance(pred, anchor, drift_live))
    return [*map(reduced, kinds)]


def _distance(pred: Tensor, other: Tensor, live: Any) -> Tensor:
    return (gate(pred, live, functools.partial(_largest, pred, other)) - other).square()
