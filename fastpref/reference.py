"""The losses in PyTorch: any device, any float dtype including fp64, without Triton. Gradients are
the kernels' closed form; where somebody differentiates twice, transforms or compiles, it is
differentiable operations instead."""

from __future__ import annotations

import functools
import itertools
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
)  # fmt: skip

LARGE = 2**20  # elements; above it, a CPU takes one sample at a time
SMALL = 2**17  # elements; up to it, pred - target waits for backward, and Python is most of a step
FEW = 32  # pairs; up to it, a CPU works out the link in floats
_on_cpu = functools.partial(torch.tensor, device=torch.device("cpu"))


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
    with no_autocast(batch.device):
        options = options._replace(huber_c=cast(options.huber_c, dtype))
        if batch.intercepted or transformed():
            kinds = _errors_differentiably(batch, options)
        else:
            kinds = _Errors.apply(*batch.pred, batch, options)
    return [row for kind in kinds for row in kind.unbind()]


def _errors_differentiably(batch: Batch, options: Options) -> tuple[Tensor, ...]:
    """Errors and gaps, (2, B) each."""
    dtype = torch.float64 if batch.is_fp64 else torch.float32
    everything = Live((True, True), (True, True), (False, False))
    return tuple(sums_differentiably(batch, options, everything, dtype)[0][:2])


_OPERANDS = ("pred", "target", "ref", "mask", "base", "anchor")  # of a Batch


def _save(ctx: Any, batch: Batch, options: Options, diff: Tensor | None = None) -> None:
    absent: dict[str, Any] = dict.fromkeys(_OPERANDS, (None, None))
    ctx.batch, ctx.options = batch._replace(**absent), options
    # Autograd sees it if somebody changes a constant.
    each = [t for name in _OPERANDS for t in getattr(batch, name)]
    numbers = [n for n in (options.huber_c, *batch.affine) if isinstance(n, Tensor)]
    ctx.save_for_backward(diff, *each, *numbers)
    ctx.set_materialize_grads(False)


def _saved(ctx: Any) -> tuple[Batch, Tensor | None]:
    diff, *saved = ctx.saved_tensors[: 1 + 2 * len(_OPERANDS)]
    pairs = zip(saved[::2], saved[1::2], strict=True)
    return ctx.batch._replace(**dict(zip(_OPERANDS, pairs, strict=True))), diff


def _differentiates_again(grad: Tensor) -> bool:
    """By create_graph=True, is_grads_batched=True or a transform."""
    again = torch.is_grad_enabled() or _functorch.is_legacy_batchedtensor(grad)
    return again or transformed()


class _Errors(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pred: Tensor, pred_l: Tensor | None, batch: Batch, options: Options
    ) -> tuple[Tensor, ...]:
        dtype = torch.float64 if batch.is_fp64 else torch.float32
        _save(ctx, batch._replace(pred=(pred, pred_l)), options)
        sides = sides_of(batch, options)
        return tuple(of_members([_sums(side, options, dtype) for side in sides])[:2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        given = [grad for grad in grads if grad is not None]
        if not given:
            return (None,) * 4
        given = [grad.clone() if grad._is_zerotensor() else grad for grad in given]  # no memory
        batch, _ = _saved(ctx)
        needed = ctx.needs_input_grad[:2]
        with no_autocast(batch.device):
            if any(map(_differentiates_again, given)):
                with torch.enable_grad():
                    kinds = _errors_differentiably(batch, ctx.options)
                each = [k for k, grad in zip(kinds, grads, strict=True) if grad is not None]
                made = _by_autograd(each, batch, given, needed)
            else:
                factors = given[0] if len(given) == 1 else given[0] + given[1]
                made = _closed_form(batch, ctx.options, factors[None], needed)
        return *made, None, None


class _ClosedForm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pred: Tensor, pred_l: Tensor | None, batch: Batch, options: Options
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if batch.is_fp64 else torch.float32
        sides = sides_of(batch, options)
        diff = None
        if _in_floats(batch, options):
            loss, ctx.factors, made, diff = _link_in_floats(batch, options, sides, dtype)
        else:
            kinds = of_members([_sums(side, options, dtype) for side in sides])
            cross = None
            if options.needs[1]:
                cross = cross_of(sides, options.error_reduction, dtype, batch.swap)
            losses, slopes, scores = linked(batch, options, kinds, cross)
            loss, shares = reduced(losses, options), shares_of(losses, options)
            none = torch.zeros_like(losses)
            factors = torch.stack([torch.stack([none + s for s in each]) for each in slopes])
            ctx.factors = torch.where(factors == 0.0, 0.0, factors * shares)
            made = stats_of(kinds, cross, scores)
        _save(ctx, batch._replace(pred=(pred, pred_l)), options, diff)
        ctx.mark_non_differentiable(made)
        return loss, made

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: None) -> Any:
        if grad_loss is None:
            return None, None, None, None
        if grad_loss._is_zerotensor():  # it has no memory
            grad_loss = grad_loss.clone()
        needed = ctx.needs_input_grad[:2]
        batch, diff = _saved(ctx)
        with no_autocast(batch.device):
            if _differentiates_again(grad_loss):
                grads = _again(batch, ctx.options, grad_loss, needed)
            elif diff is not None and readable(grad_loss):
                grads = [_of_small(diff, batch, ctx.options, ctx.factors, grad_loss), None]
            else:
                factors = ctx.factors
                if isinstance(factors, list):
                    factors = grad_loss.new_tensor(factors).view(1, 2, -1)
                grads = _closed_form(batch, ctx.options, factors * grad_loss, needed)
        return *grads, None, None


def _in_floats(batch: Batch, options: Options) -> bool:
    """Whether the link is worked out on numbers: of a few pairs, for which one operation on tensors
    costs more than all of a link."""
    few = batch.device.type == "cpu" and batch.n_groups <= FEW
    return few and not isinstance(options.link, Group) and options.around is NOTHING_AROUND


def _link_in_floats(
    batch: Batch, options: Options, sides: Sequence[Side], dtype: torch.dtype
) -> tuple[Tensor, list[float], Tensor, Tensor | None]:
    """(loss, factors of the first members and then of the second, stats, and of small tensors
    pred - target)"""
    diff = None
    if all(map(_is_plain, sides)):
        (kinds, diff), *second = [_plain_sums(side, options, dtype) for side in sides]
        for others, _ in second:
            kinds, diff = [w + l for w, l in zip(kinds, others, strict=True)], None
    else:
        sums = of_members([_sums(side, options, dtype) for side in sides])
        kinds = [kind.flatten().tolist() for kind in sums]
    errors, gaps = kinds[0], kinds[1 if len(kinds) > 1 else 0]
    n = batch.n_groups
    scalars = [_per_pair(scalar, n) for scalar in options.scalars]
    w, l = (n, 0) if batch.swap else (0, n)  # where winners and losers begin
    assert isinstance(options.link, Link)
    made = [
        pair_losses(
            options.link,
            (errors[w + i], errors[l + i]),
            (gaps[w + i], gaps[l + i]),
            [s[i] for s in scalars],
        )
        for i in range(n)
    ]
    losses, slope_w, slope_l, margin = zip(*made, strict=True)
    share = 1.0 / n if options.reduction == "mean" else 1.0
    slopes = (*slope_l, *slope_w) if batch.swap else (*slope_w, *slope_l)
    loss = losses if options.reduction == "none" else sum(losses) * share
    stats = _on_cpu([*itertools.chain(*kinds, margin)], dtype=dtype)
    factors = [share * slope for slope in slopes]
    return _on_cpu(loss, dtype=dtype), factors, stats.view(-1, n), diff


def _per_pair(scalar: Scalar, n_pairs: int) -> list[float]:
    if isinstance(scalar, Tensor) and scalar.dim():
        return scalar.tolist()
    return [float(scalar)] * n_pairs


def _of_small(
    diff: Tensor, batch: Batch, options: Options, factors: list[float], grad_loss: Tensor
) -> Tensor:
    """The gradient as `_closed_form` has it, of (members, B, elements) differences."""
    pred, _ = batch.pred
    assert pred is not None
    scale = 2.0 / diff.shape[2] if options.error_reduction == "mean" else 2.0
    of_loss = grad_loss.tolist()
    of_pairs = of_loss if grad_loss.dim() else [of_loss] * diff.shape[1]
    each = [scale * factor * grad for factor, grad in zip(factors, of_pairs * 2, strict=True)]
    factor = _on_cpu(each, dtype=diff.dtype)
    some_0 = 0.0 in factor.tolist()
    factor = factor.view(2, -1, 1)
    made = diff * factor
    if some_0:
        made.masked_fill_(factor == 0, 0.0)
    return made.view(pred.shape).to(pred.dtype)


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
        made.append(rows)
        of_side = factors if len(sides) == 1 else factors[:, i : i + 1]
        if _is_large(side) and not _is_product(side, of_side):
            for j, part in enumerate(samples(side)):
                at = [slice(k, k + 1) for k in divmod(j, n)]
                _fill(rows[at[0], at[1]], part, of_side[:, at[0], at[1]], options)
        else:
            _fill(rows, side, of_side, options)
    if batch.shares_pred and grads[0] is not None:
        grads[0].copy_(torch.cat(made).sum(0).view(grads[0].shape))
    return grads


def _is_product(side: Side, factors: Tensor) -> bool:
    """Whether the gradient is a factor times pred - target, as it is given."""
    return side.mask is None and side.huber_c is None and side.base is None and len(factors) == 1


def _fill(rows: Tensor, side: Side, factors: Tensor, options: Options) -> None:
    """Writes the gradients of some samples."""
    first, *others = factors
    factor = _scaled(first, side, options, 1.0 if options.huber_c is not None else 2.0)
    factor = broadcast(factor, rows)
    if _is_product(side, factors):
        if rows.dtype == factor.dtype:
            off = torch.sub(side.pred.to(factor.dtype), side.target, out=rows)
        else:
            off = side.pred.to(factor.dtype).sub_(side.target)
        off.mul_(factor)
        if _may_be_0(factor):
            off.masked_fill_(factor == 0, 0.0)
        if off is not rows:
            rows.copy_(off)
        return
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
    rows.copy_(total)


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
    with torch.enable_grad():
        loss, _ = loss_differentiably(batch, options)
    return _by_autograd([loss], batch, [grad_loss], needed)


def _by_autograd(
    values: list[Tensor], batch: Batch, grads: list[Tensor], needed: tuple[bool, bool]
) -> list[Tensor | None]:
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        given = [t for t, need in zip(batch.pred, needed, strict=True) if need and t is not None]
        found = iter(torch.autograd.grad(values, given, grads, create_graph=create_graph))
    return [next(found) if need else None for need in needed]


def _sums(side: Side, options: Options, dtype: torch.dtype) -> list[Tensor]:
    """(S, B) of each kind of sums, in the kernels' order. On a CPU, large tensors a sample at a
    time: fresh memory costs more there than arithmetic."""
    shape = side.pred.shape[:2]
    if _is_plain(side):
        kinds, _ = _plain_sums(side, options, dtype)
        return [_on_cpu(kind, dtype=dtype).view(shape) for kind in kinds]
    if _is_large(side):
        each = [_sums(sample, options, dtype) for sample in samples(side)]
        return [torch.cat(kind).view(shape) for kind in zip(*each, strict=True)]
    pred, target, ref, mask, huber_c, mix, anchor, *_ = cast_side(side, dtype)

    def of_samples(elements: Tensor) -> Tensor:
        return per_sample(elements, side, options.error_reduction)

    of_anchor = [] if anchor is None else [of_samples(_off(pred, anchor, mask).square_())]
    diff = _off(pred, target, mask)
    if ref is None:
        err = of_samples(diff.square_() if huber_c is None else squares(diff, huber_c))
        return [err, *of_anchor]
    err = of_samples(squares(diff, huber_c))
    if ref.dim() == 2:
        return [err, err - ref, ref, *of_anchor]
    moved = _off(pred, ref, mask)
    diff_ref = _off(ref, target, mask)
    gap = of_samples(gaps(moved, diff, diff_ref, huber_c))
    found = [err, gap, of_samples(squares(diff_ref, huber_c))]
    if options.needs[0]:
        found.append(of_samples(moved.square()))
    if mix is not None:
        found += map(of_samples, mixed(diff_ref, moved, mix))
    return found + of_anchor


def _is_large(side: Side) -> bool:
    pred, most = side.pred, LARGE if side.base is None else LARGE // 4
    return pred.numel() > most and pred.device.type == "cpu" and pred.shape[:2].numel() > 1


def _is_plain(side: Side) -> bool:
    """Whether its sums are `_plain_sums`."""
    plain = side.mask is None and side.huber_c is None and side.pred.device.type == "cpu"
    plain = plain and side.mix is None and side.anchor is None
    return plain and (side.ref is None or side.ref.dim() > 2) and not _is_large(side)


def _plain_sums(
    side: Side, options: Options, dtype: torch.dtype
) -> tuple[list[list[float]], Tensor | None]:
    """`_sums` on a CPU, S * B numbers of each kind, with few passes over the memory; and of small
    tensors pred - target."""
    if side.base is not None:
        side = cast_side(side, dtype)
    pred, target, ref = side.pred.to(dtype), side.target, side.ref
    size = pred.shape[2:].numel() if options.error_reduction == "mean" else 1

    def of_samples(elements: Tensor) -> list[float]:
        sums = elements.flatten(2).sum(2).tolist()
        return [each / size for of_member in sums for each in of_member]

    diff = pred - target
    kept = diff if pred.numel() <= SMALL and pred.dim() == 3 and pred.is_contiguous() else None
    free = diff if kept is None else None  # to be written over
    if ref is None:
        return [of_samples(torch.square(diff, out=free))], kept
    elements = diff.square()
    err = of_samples(elements)
    moved = torch.sub(pred, ref, out=elements)
    drift = [of_samples(moved.square())] if options.needs[0] else []
    # (pred - ref) * (pred - target + ref - target)
    gap = of_samples(torch.sub(diff, moved, alpha=0.5, out=free).mul_(moved))
    gap = [2.0 * each for each in gap]
    of_ref = [e - g for e, g in zip(err, gap, strict=True)]
    if not all(r > 1e-2 * e for r, e in zip(of_ref, err, strict=True)):  # it cancelled, or is NaN
        of_ref = of_samples((ref.to(dtype) - target).square_())
    return [err, gap, of_ref, *drift], kept
