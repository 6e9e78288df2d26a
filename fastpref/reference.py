"""The losses in PyTorch: any device, any float dtype including fp64, without Triton. Gradients are
the kernels' closed form; where somebody differentiates twice, transforms or compiles, it is
differentiable operations instead."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch

from fastpref_kernels.knobs import NOTHING_AROUND, Around, pair_losses
from fastpref_kernels.links import Group, Link

from .batch import Batch, Scalar
from .context import no_autocast, readable, transformed
from .differentiable import Live, loss_differentiably, sums_differentiably
from .linked import linked, reduced, shares_of
from .sums import (
    Options,
    Side,
    broadcast,
    cast,
    cast_side,
    cross_of,
    gaps,
    mask_size,
    mixed,
    of_members,
    over,
    per_sample,
    root,
    samples,
    sides_of,
    squares,
    stats_of,
    swapped,
)  # fmt: skip

LARGE = 2**20  # elements; above it, a CPU takes one sample at a time
FEW = 32  # pairs; up to it, a CPU works out the link in floats


def loss_of(batch: Batch, options: Options) -> tuple[Tensor, Tensor]:
    """(loss, stats): the loss, () or (B,) for reduction "none", and detached stats (rows, B): the
    members' errors, with a reference their gaps and its errors, and the margin.

    The scalars are the link's hyper-parameters and then, of pairs, all or none, the knobs.
    """
    dtype = torch.float64 if batch.is_fp64 else torch.float32
    with no_autocast(batch.device):
        of = functools.partial(cast, dtype=dtype)
        around = options.around
        if around is not NOTHING_AROUND:
            around = Around(around.guard, *map(of, around[1:]))
        scalars = [*map(of, options.scalars)]
        options = options._replace(scalars=scalars, huber_c=of(options.huber_c), around=around)
        if batch.affine:
            batch = batch._replace(affine=tuple(map(of, batch.affine)))
        if batch.intercepted or transformed():
            loss, stats = loss_differentiably(batch, options)
            return loss, stats.detach()
        loss, stats = _ClosedForm.apply(*batch.pred, batch, options)
        return loss, stats.data  # whoever changes a metric in place changes nothing of ours


def errors_of(batch: Batch, options: Options) -> list[Tensor]:
    """(B,) each: the members' errors and, with a reference, their gaps; differentiable."""
    dtype = torch.float64 if batch.is_fp64 else torch.float32
    everything = Live((True, True), (True, True), (False, False))
    with no_autocast(batch.device):
        options = options._replace(huber_c=cast(options.huber_c, dtype))
        kinds, _ = sums_differentiably(batch, options, everything, dtype)
    return [row for kind in kinds[:2] for row in kind.unbind()]


_OPERANDS = ("pred", "target", "ref", "mask", "base", "anchor")  # of a Batch


class _ClosedForm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pred: Tensor, pred_l: Tensor | None, batch: Batch, options: Options
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if batch.is_fp64 else torch.float32
        sides = sides_of(batch, options)
        kinds = of_members([_sums(side, options, dtype) for side in sides])
        cross = None
        if options.needs[1]:
            cross = cross_of(sides, options.error_reduction, dtype, batch.swap)
        if _in_floats(batch, options):
            loss, factors, margin = _link_in_floats(batch, options, kinds)
            scores: Sequence[Tensor] = (margin,)
        else:
            losses, slopes, scores = linked(batch, options, kinds, cross)
            loss, shares = reduced(losses, options), shares_of(losses, options)
            none = torch.zeros_like(losses)
            factors = torch.stack([torch.stack([none + s for s in each]) for each in slopes])
            factors = torch.where(factors == 0.0, 0.0, factors * shares)
        made = stats_of(kinds, cross, scores)
        ctx.factors, ctx.options = factors, options
        absent: dict[str, Any] = dict.fromkeys(_OPERANDS, (None, None))
        ctx.batch = batch._replace(**absent)  # autograd saves those
        # The constants are for autograd to see if somebody changes them.
        huber_t = options.huber_c if isinstance(options.huber_c, Tensor) else None
        of_batch = [t for name in _OPERANDS[1:] for t in getattr(batch, name)]
        ctx.save_for_backward(huber_t, pred, pred_l, *of_batch)
        ctx.mark_non_differentiable(made)
        ctx.set_materialize_grads(False)
        return loss, made

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: None) -> Any:
        if grad_loss is None:
            return None, None, None, None
        if grad_loss._is_zerotensor():  # it has no memory
            grad_loss = grad_loss.clone()
        needed = ctx.needs_input_grad[:2]
        saved = ctx.saved_tensors[1:]
        pairs = zip(saved[::2], saved[1::2], strict=True)
        batch = ctx.batch._replace(**dict(zip(_OPERANDS, pairs, strict=True)))
        with no_autocast(batch.device):
            if (
                torch.is_grad_enabled()  # create_graph=True
                or _functorch.is_legacy_batchedtensor(grad_loss)  # is_grads_batched=True
                or transformed()
            ):
                grads = _again(batch, ctx.options, grad_loss, needed)
            else:
                grads = _closed_form(batch, ctx.options, ctx.factors * grad_loss, needed)
        return *grads, None, None


def _in_floats(batch: Batch, options: Options) -> bool:
    """Whether the link is worked out on numbers: of a few pairs, for which one operation on tensors
    costs more than all of a link."""
    few = batch.device.type == "cpu" and batch.n_groups <= FEW
    return few and not isinstance(options.link, Group) and options.around is NOTHING_AROUND


def _link_in_floats(
    batch: Batch, options: Options, kinds: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, factors, margin)"""
    errors = swapped(kinds[0], batch.swap)
    (err_w, err_l), (gap_w, gap_l) = errors.tolist(), errors.tolist()
    if len(kinds) > 1:
        gap_w, gap_l = swapped(kinds[1], batch.swap).tolist()
    n_pairs = len(err_w)
    scalars = [_per_pair(scalar, n_pairs) for scalar in options.scalars]
    assert isinstance(options.link, Link)
    made = [
        pair_losses(
            options.link, (err_w[i], err_l[i]), (gap_w[i], gap_l[i]), [s[i] for s in scalars]
        )
        for i in range(n_pairs)
    ]
    loss, slope_w, slope_l, margin = zip(*made, strict=True)
    new = functools.partial(torch.tensor, dtype=errors.dtype, device=errors.device)
    share = 1.0 / n_pairs if options.reduction == "mean" else 1.0
    each = (slope_l, slope_w) if batch.swap else (slope_w, slope_l)
    rows = new([*([share * slope for slope in slopes] for slopes in each), margin])
    total = new(loss if options.reduction == "none" else sum(loss) * share)
    return total, rows[None, :2], rows[2]


def _per_pair(scalar: Scalar, n_pairs: int) -> list[float]:
    if isinstance(scalar, Tensor) and scalar.dim():
        return scalar.tolist()
    return [float(scalar)] * n_pairs


def _closed_form(
    batch: Batch, options: Options, factors: Tensor, needed: tuple[bool, bool]
) -> list[Tensor | None]:
    """grad = factor * 2 / size * (pred - target), and so by the other directions, pred - ref and
    pred - anchor, in the dtype and layout of pred.

    factors: (directions, members, B), slopes times the gradient of the loss. 0 makes a gradient 0,
    whatever the elements.
    """
    grads = [
        torch.empty_like(t) if need and t is not None else None
        for t, need in zip(batch.pred, needed, strict=True)
    ]
    sides = sides_of(batch, options)
    whole = batch.pred[1] is None
    n = batch.n_groups
    made = []
    for i, side in enumerate(sides):
        grad = grads[0] if whole else grads[i]
        if grad is None:
            continue
        if whole and len(sides) == 2 and not batch.shares_pred:
            grad = grad[i * n : (i + 1) * n]
        if batch.shares_pred:
            rows = torch.empty(side.pred.shape, dtype=factors.dtype, device=grad.device)
        else:
            rows = grad.view(side.pred.shape) if not batch.listed else _listed(grad, side.pred, n)
        first, *others = factors if len(sides) == 1 else factors[:, i : i + 1]
        factor = _scaled(first, side, options, 1.0 if options.huber_c is not None else 2.0)
        factor = broadcast(factor, rows)
        plain = side.mask is None and options.huber_c is None
        if plain and side.pred.dtype == factor.dtype and not others:
            torch.sub(side.pred, side.target, out=rows).mul_(factor)
            if _may_be_0(factor):
                rows.masked_fill_(factor == 0, 0.0)
            made.append(rows)
            continue
        cast = cast_side(side, factor.dtype)
        diff = _off(cast.pred, cast.target, side.mask)
        if options.huber_c is not None:
            diff = over(diff, root(diff, side.huber_c))
        total = _product(factor, diff if side.mask is None else side.mask * diff)
        towards = ([cast.ref] if options.needs[0] else []) + [cast.anchor]
        for slopes, other in zip(others, towards, strict=False):
            assert other is not None
            factor = broadcast(_scaled(slopes, side, options, 2.0), rows)
            moved = _off(cast.pred, other, side.mask)
            total = total + _product(factor, moved if side.mask is None else side.mask * moved)
        made.append(rows.copy_(total))
    if batch.shares_pred and grads[0] is not None:
        grads[0].copy_(torch.cat(made).sum(0).view(grads[0].shape))
    return grads


def _product(factor: Tensor, rows: Tensor) -> Tensor:
    product = factor * rows
    return torch.where(factor == 0, 0.0, product) if _may_be_0(factor) else product


def _may_be_0(factor: Tensor) -> bool:
    return not readable(factor) or 0.0 in factor.flatten().tolist()


def _listed(grad: Tensor, pred: Tensor, n: int) -> Tensor:
    """A view of the rows of lists as `sides_of` has those of pred."""
    return grad.view(n, len(pred), *pred.shape[2:]).transpose(0, 1)


def _scaled(factor: Tensor, side: Side, options: Options, scale: float) -> Tensor:
    """A factor of the gradient of means or sums."""
    if options.error_reduction == "sum":
        return factor * scale
    if side.mask is None:
        return factor * (scale / side.pred[0, 0].numel())
    size = mask_size(side, factor.dtype)
    none = (size == 0) | (factor == 0)  # a mask of what a list does not have may be NaN
    return torch.where(none, 0.0, factor * scale) / torch.where(none, 1.0, size)


def _off(a: Tensor, b: Tensor, mask: Tensor | None) -> Tensor:
    """a - b, and 0 where the mask hides what may be anything, NaN too."""
    return a - b if mask is None else torch.where(mask == 0, 0.0, a - b)


def _again(
    batch: Batch, options: Options, grad_loss: Tensor, needed: tuple[bool, bool]
) -> list[Tensor | None]:
    """The gradient with a graph of its own."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        loss, _ = loss_differentiably(batch, options)
        given = [t for t, need in zip(batch.pred, needed, strict=True) if need and t is not None]
        found = iter(torch.autograd.grad(loss, given, grad_loss, create_graph=create_graph))
    return [next(found) if need else None for need in needed]


def _sums(side: Side, options: Options, dtype: torch.dtype) -> list[Tensor]:
    """(S, B) of each kind of sums, in the kernels' order. On a CPU, large tensors a sample at a
    time: fresh memory costs more there than arithmetic."""
    shape, on_cpu = side.pred.shape[:2], side.pred.device.type == "cpu"
    if side.pred.numel() > LARGE and on_cpu and shape.numel() > 1:
        each = [_sums(sample, options, dtype) for sample in samples(side)]
        return [torch.cat(kind).view(shape) for kind in zip(*each, strict=True)]
    pred, target, ref, mask, huber_c, mix, anchor = cast_side(side, dtype)

    def of_samples(elements: Tensor) -> Tensor:
        return per_sample(elements, side, options.error_reduction)

    plain = huber_c is None
    of_anchor = [] if anchor is None else [of_samples(_off(pred, anchor, mask).square_())]
    diff = _off(pred, target, mask)
    if ref is None:
        return [of_samples(diff.square_() if plain else squares(diff, huber_c)), *of_anchor]
    elements = squares(diff, huber_c)
    err = of_samples(elements)
    if ref.dim() == 2:
        return [err, err - ref, ref, *of_anchor]
    rest = []
    if options.needs[0]:
        rest.append(of_samples(_off(pred, ref, mask).square_()))
    if mix is not None:
        rest += map(of_samples, mixed(_off(ref, target, mask), _off(pred, ref, mask), mix))
    rest += of_anchor
    if plain and on_cpu and mask is None:
        # (pred - ref) * (pred - target + ref - target), with fewer passes over the memory
        moved = torch.sub(pred, ref, out=elements)
        gap = 2.0 * of_samples(diff.sub_(moved, alpha=0.5).mul_(moved))
        of_ref = err - gap
        if not _far_from_cancelling(of_ref, err):
            of_ref = of_samples((ref - target).square_())
        return [err, gap, of_ref, *rest]
    moved = _off(pred, ref, mask)
    diff_ref = _off(ref, target, mask)
    of_ref = of_samples(squares(diff_ref, huber_c))
    return [err, of_samples(gaps(moved, diff, diff_ref, huber_c)), of_ref, *rest]


def _far_from_cancelling(difference: Tensor, of: Tensor) -> bool:
    numbers = zip(difference.flatten().tolist(), of.flatten().tolist(), strict=True)
    return all(d > 1e-2 * o for d, o in numbers)
