"""A loss from its sums, on tensors: the link, what is around it, and the reduction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref_kernels.knobs import log_mean_in_torch, pair_losses, safeguard_in_torch
from fastpref_kernels.links import Group, Link
from fastpref_kernels.special import in_torch, times

from .batch import Batch
from .sums import Options, swapped

_times = in_torch(times)


class Linked(NamedTuple):
    """losses: (B,). slopes: for each direction (pred - target, with drift pred - ref, and pred -
    anchor) those of the members, (members, B) or what broadcasts to it. scores: (B,) each, of pairs
    the margin, of groups those that the link names."""

    losses: Tensor
    slopes: list[list[Any]]
    scores: Sequence[Tensor]


def linked(batch: Batch, options: Options, kinds: Sequence[Tensor], cross: Tensor | None) -> Linked:
    """kinds: (members, B) of each kind of sums, in the kernels' order. Slopes are those of the
    losses, which autograd may differentiate instead."""
    if isinstance(options.link, Group):
        return _of_groups(options.link, batch, options, kinds, cross)
    return of_pairs(options, kinds, cross, batch.swap)


def of_pairs(options: Options, kinds: Sequence[Tensor], cross: Tensor | None, swap: bool) -> Linked:
    assert isinstance(options.link, Link)
    around, scalars = options.around, options.scalars
    errors = swapped(kinds[0], swap)
    gaps = swapped(kinds[1], swap) if len(kinds) > 1 else errors
    (err_w, err_l), (gap_w, gap_l) = errors, gaps
    guard = _guard(options, err_w, cross)
    if guard is not None:
        err_l, gap_l = _gradient_times(guard, err_l), _gradient_times(guard, gap_l)
    losses, slope_w, slope_l, margin = pair_losses(
        options.link, (err_w, err_l), (gap_w, gap_l), scalars
    )
    if guard is not None:
        slope_l = _times(guard, slope_l)
    slopes = [[slope_l, slope_w] if swap else [slope_w, slope_l]]
    if around.drift_weight is not None:
        weight = around.drift_weight
        if options.pair_weight is not None:
            weight = _times(options.pair_weight, weight)
        losses = losses + _times(weight, 0.5 * (kinds[3][0] + kinds[3][1]))
        slopes.append([0.5 * weight] * 2)
    return Linked(losses, slopes, (margin,))


def _guard(options: Options, err_w: Tensor, cross: Tensor | None) -> Any:
    """What the loser's gradient is multiplied by."""
    around = options.around
    if around.guard is None or around.guard == "given":
        return around.guard_number
    assert cross is not None
    err_w, cross = err_w.detach(), cross.detach()
    if around.guard == "batch":
        weight = options.pair_weight
        if isinstance(weight, Tensor):
            err_w, cross = (torch.where(weight == 0, 0.0, each) for each in (err_w, cross))
        err_w, cross = err_w.sum(), cross.sum()
    return safeguard_in_torch(err_w, cross, around.guard_number)


def _gradient_times(factor: Any, x: Tensor) -> Tensor:
    held = x.detach()
    return held + _times(factor, torch.where(held.isfinite(), x - held, 0.0))


def _of_groups(
    link: Group, batch: Batch, options: Options, kinds: Sequence[Tensor], cross: Tensor | None
) -> Linked:
    if link.listed:
        losses, slopes, scores = _of_lists(link, batch, options, kinds)
    else:
        sums, scalars = tuple(zip(*kinds, strict=True)), tuple(options.scalars)
        guard = _guard(options, kinds[0][0], cross)
        if guard is not None:
            sums = (sums[0], tuple(_gradient_times(guard, of_loser) for of_loser in sums[1]))
        mean: Any = 0.0
        if link.first is not None:
            mean = link.first.torch(sums, scalars).mean().detach()
        losses, of_members, scores = link.torch(sums, cross, scalars, mean)
        if guard is not None:
            of_members = (of_members[0], tuple(_times(guard, slope) for slope in of_members[1]))
        slopes = [[*each] for each in zip(*of_members, strict=True)]
    if (weight := options.around.weight) is not None:
        losses = _times(weight, losses)
        slopes = [[_times(weight, slope) for slope in each] for each in slopes]
    return Linked(losses, slopes, scores)


def _of_lists(
    link: Group, batch: Batch, options: Options, kinds: Sequence[Tensor]
) -> tuple[Tensor, list[list[Any]], tuple[Tensor, ...]]:
    *scalars, of_members = options.scalars
    assert isinstance(of_members, Tensor)
    order = torch.arange(batch.members, device=batch.device)[None]
    active = torch.ones_like(of_members, dtype=torch.bool)
    if batch.lengths is not None:  # what lies beyond may be anything
        active = order < batch.lengths[:, None]
        of_members = torch.where(active, of_members, 0.0)
    sums = [kind.T if batch.lengths is None else torch.where(active, kind.T, 0.0) for kind in kinds]
    numbers = [n[:, None] if isinstance(n, Tensor) and n.dim() else n for n in scalars]
    losses, slopes, scores = link.torch(tuple(sums), of_members, order, tuple(numbers), active)
    return losses, [[*slope.unbind(1)] for slope in slopes], scores


def reduced(losses: Tensor, options: Options) -> Tensor:
    if options.reduction == "none":
        return losses
    if options.reduction == "dro":
        heat = options.around.heat
        high, below = _below(losses / heat)
        mean = log_mean_in_torch(torch.expm1(below).mean(), torch.exp(below).mean())
        return heat * (high + mean)  # type: ignore[no-any-return]
    return losses.mean() if options.reduction == "mean" else losses.sum()


def _below(values: Tensor) -> tuple[Tensor, Tensor]:
    """The highest, a constant, and how far all are from it."""
    high = values.detach().amax(0)
    return high, torch.where(values.isinf() & (values == high), 0.0, values - high)


def shares_of(losses: Tensor, options: Options) -> Any:
    """The derivatives of the reduced loss by those of the groups."""
    if options.reduction == "dro":
        share = torch.exp(_below(losses / options.around.heat)[1])
        return share / share.sum()
    return 1.0 / len(losses) if options.reduction == "mean" else 1.0
