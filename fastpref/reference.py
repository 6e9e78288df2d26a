"""The losses in PyTorch: any device, any float dtype including fp64, without Triton. Gradients are
the kernels' closed form; where somebody differentiates twice, transforms or compiles, it is
differentiable operations instead."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch

from fastpref_kernels.knobs import live, pair_losses
from fastpref_kernels.links import Link

from .context import no_autocast, readable, transformed
from .pairs import Pairs, Scalar, halves

LARGE = 2**18  # elements; above it, a CPU takes one sample at a time
FEW = 32  # pairs; up to it, a CPU works out the link in floats


class Options(NamedTuple):
    """What `pair_loss` takes besides the tensors of pairs."""

    link: Link
    scalars: Sequence[Scalar]
    huber_c: Scalar | None
    reduction: str
    error_reduction: str


def pair_loss(
    link: Link,
    scalars: Sequence[Scalar],
    pairs: Pairs,
    huber_c: Scalar | None,
    reduction: str,
    error_reduction: str,
) -> tuple[Tensor, Tensor]:
    """(loss, stats): the loss, () or (B,) for reduction "none", and detached stats (3 or 7, B):
    mse_w and mse_l, with a reference the gaps and its errors, winner's and loser's each, and the
    margin.

    `scalars` are the link's hyper-parameters and then, all or none, the knobs.
    """
    dtype = torch.float64 if pairs.wide else torch.float32
    with no_autocast(pairs.device):
        *scalars, huber_c = (cast(scalar, dtype) for scalar in (*scalars, huber_c))
        options = Options(link, scalars, huber_c, reduction, error_reduction)
        if pairs.intercepted or transformed():
            loss, stats = _differentiable(pairs, options)
            return loss, stats.detach()
        loss, stats = _ClosedForm.apply(*pairs.pred, pairs, options)
        return loss, stats.data  # whoever changes a metric in place changes nothing of ours


def reduce(per_pair: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return per_pair
    return per_pair.mean() if reduction == "mean" else per_pair.sum()


def cast(scalar: Any, dtype: torch.dtype) -> Any:
    """A tensor in the dtype of the errors, lest half precision spoil what is computed with it."""
    return scalar.to(dtype) if isinstance(scalar, Tensor) else scalar


# The sums of the samples -------------------------------------------------------------------------


class Side(NamedTuple):
    """Some samples of every pair, (S, B, ...): winners and losers stacked, S = 2, or one of them,
    S = 1. What pairs share is (1, B, ...). ref may also be errors, (S, B)."""

    pred: Tensor
    target: Tensor
    ref: Tensor | None
    mask: Tensor | None


def _sides(pairs: Pairs) -> list[Side]:
    """Both together where all operands are whole tensors; or else two, in the order of pred's."""
    operands = (pairs.pred, pairs.target, pairs.ref, pairs.mask)
    n = pairs.n_pairs
    if all(second is None for _, second in operands):
        whole = [first for first, _ in operands]
        if all(t is None or t.is_contiguous() for t in whole):  # all elements in one dimension
            return [Side(*[t if t is None else _flat(t, n) for t in whole])]  # type: ignore[arg-type]
        return [Side(*[t if t is None else t.unflatten(0, (-1, n)) for t in whole])]  # type: ignore[arg-type]
    each = (
        (None, None) if operand[0] is None else [t[None] for t in halves(operand, n)]
        for operand in operands
    )
    return [Side(*side) for side in zip(*each, strict=True)]  # type: ignore[arg-type]


def _flat(tensor: Tensor, n: int) -> Tensor:
    if tensor.dim() == 1:
        return tensor.view(-1, n)
    rows = tensor.shape[0]
    return tensor.view(rows // n, n, tensor.numel() // rows)


def _samples(side: Side) -> list[Side]:
    """Each alone."""
    found = []
    for s in range(side.pred.shape[0]):
        for b in range(side.pred.shape[1]):
            at = (slice(s, s + 1), slice(b, b + 1))
            shared = (slice(None), at[1])
            found.append(
                Side(*[t if t is None else t[at if len(t) > s else shared] for t in side])  # type: ignore[arg-type]
            )
    return found


def _cast(side: Side, dtype: torch.dtype) -> Side:
    tensors = [t if t is None or t.dtype == dtype else t.to(dtype) for t in side[:3]]
    return Side(*tensors, side.mask)  # type: ignore[arg-type, call-arg]


def _per_sample(elements: Tensor, side: Side, error_reduction: str) -> Tensor:
    """(..., S, B) means or sums over the elements of each sample, (..., S, B, elements)."""
    if side.mask is not None:
        elements = side.mask * elements
    total = (elements if elements.dim() == 3 else elements.flatten(2)).sum(2)
    if error_reduction == "sum":
        return total
    if side.mask is None:
        return total / elements[0, 0].numel()
    size = _mask_size(side, total.dtype)
    return torch.where(size == 0, 0.0, total) / torch.where(size == 0, 1.0, size)


def _mask_size(side: Side, dtype: torch.dtype) -> Tensor:
    assert side.mask is not None
    return side.mask.to(dtype).flatten(2).sum(2)


def _root(diff: Tensor, c: Any) -> Tensor:
    return (diff.square() + c * c).sqrt()


def _squares(diff: Tensor, huber_c: Any) -> Tensor:
    """Each element's part of the error: its square, or sqrt(diff^2 + c^2) - c."""
    return diff.square() if huber_c is None else diff.square() / (_root(diff, huber_c) + huber_c)


def _gaps(moved: Tensor, diff: Tensor, diff_ref: Tensor, huber_c: Any) -> Tensor:
    """Each element's part of the error less that of the reference, `moved` being pred - ref: no
    difference of two large numbers."""
    gaps = moved * (diff + diff_ref)
    return gaps if huber_c is None else gaps / (_root(diff, huber_c) + _root(diff_ref, huber_c))


def _sums(side: Side, options: Options, dtype: torch.dtype) -> list[Tensor]:
    """(S, B) each: errors, and with a reference what they are above its own, and those. On a CPU,
    large tensors a sample at a time: fresh memory costs more there than arithmetic."""
    shape, on_cpu = side.pred.shape[:2], side.pred.device.type == "cpu"
    if side.pred.numel() > LARGE and on_cpu and shape.numel() > 1:
        each = [_sums(sample, options, dtype) for sample in _samples(side)]
        return [torch.cat(kind).view(shape) for kind in zip(*each, strict=True)]
    pred, target, ref, mask = _cast(side, dtype)
    hidden = None if mask is None else mask == 0  # what it hides may be anything, NaN too

    def off(a: Tensor, b: Tensor) -> Tensor:
        return a - b if hidden is None else torch.where(hidden, 0.0, a - b)

    def per_sample(elements: Tensor) -> Tensor:
        return _per_sample(elements, side, options.error_reduction)

    plain = options.huber_c is None
    diff = off(pred, target)
    if ref is None:
        return [per_sample(diff.square_() if plain else _squares(diff, options.huber_c))]
    err = per_sample(_squares(diff, options.huber_c))
    if ref.dim() == 2:
        return [err, err - ref, ref]
    moved = off(pred, ref)
    if plain and on_cpu:
        # (pred - ref) * (pred - target + ref - target), with one pass over the memory less
        gap = 2.0 * per_sample(diff.sub_(moved, alpha=0.5).mul_(moved))
        of_ref = err - gap
        if _far_from_cancelling(of_ref, err):
            return [err, gap, of_ref]
    diff_ref = off(ref, target)
    of_ref = per_sample(_squares(diff_ref, options.huber_c))
    if plain and on_cpu:
        return [err, gap, of_ref]
    return [err, per_sample(_gaps(moved, diff, diff_ref, options.huber_c)), of_ref]


def _far_from_cancelling(difference: Tensor, of: Tensor) -> bool:
    numbers = zip(difference.flatten().tolist(), of.flatten().tolist(), strict=True)
    return all(d > 1e-2 * o for d, o in numbers)


def _kinds(sums: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """(2, B) of each kind of sums: errors, gaps, and errors of the reference."""
    kinds = sums[0] if len(sums) == 1 else [torch.cat(kind) for kind in zip(*sums, strict=True)]
    return [*kinds] if len(kinds) == 3 else [kinds[0]] * 3


def _stats(pairs: Pairs, kinds: list[Tensor], margin: Tensor) -> Tensor:
    return torch.cat([*(kinds[:1] if pairs.ref[0] is None else kinds), margin[None]])


def _swapped(two: Tensor, swap: bool) -> Tensor:
    return two.flip(0) if swap else two


# The closed form ---------------------------------------------------------------------------------


class _ClosedForm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pred: Tensor, pred_l: Tensor | None, pairs: Pairs, options: Options
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if pairs.wide else torch.float32
        sums = _kinds([_sums(side, options, dtype) for side in _sides(pairs)])
        errors, gaps = (_swapped(kind, pairs.swap) for kind in sums[:2])
        if pairs.device.type == "cpu" and pairs.n_pairs <= FEW:
            loss, slopes, margin = _link_in_floats(options, errors, gaps)
        else:
            per_pair, *each, margin = pair_losses(
                options.link, tuple(errors), tuple(gaps), options.scalars
            )
            loss = reduce(per_pair, options.reduction)
            slopes = torch.stack([torch.zeros_like(margin) + slope for slope in each])
        made = _stats(pairs, sums, margin)
        ctx.slopes = _swapped(slopes, pairs.swap)
        ctx.rest, ctx.options = pairs[4:], options
        # The constants are for autograd to see if somebody changes them.
        ctx.save_for_backward(pred, pred_l, *pairs.target, *pairs.ref, *pairs.mask)
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
        saved = ctx.saved_tensors
        pairs = Pairs(saved[:2], saved[2:4], saved[4:6], saved[6:], *ctx.rest)
        with no_autocast(pairs.device):
            if (
                torch.is_grad_enabled()  # create_graph=True
                or _functorch.is_legacy_batchedtensor(grad_loss)  # is_grads_batched=True
                or transformed()
            ):
                grads = _again(pairs, ctx.options, grad_loss, needed)
            else:
                grads = _closed_form(pairs, ctx.options, ctx.slopes * grad_loss, needed)
        return *grads, None, None


def _link_in_floats(
    options: Options, errors: Tensor, gaps: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, slopes, margin) of a few pairs, for which one operation on tensors costs more than all
    of a link on numbers."""
    (err_w, err_l), (gap_w, gap_l) = errors.tolist(), gaps.tolist()
    n_pairs = len(err_w)
    scalars = [_per_pair(scalar, n_pairs) for scalar in options.scalars]
    made = [
        pair_losses(
            options.link, (err_w[i], err_l[i]), (gap_w[i], gap_l[i]), [s[i] for s in scalars]
        )
        for i in range(n_pairs)
    ]
    loss, slope_w, slope_l, margin = zip(*made, strict=True)
    new = functools.partial(torch.tensor, dtype=errors.dtype, device=errors.device)
    rows = new([slope_w, slope_l, margin])
    total = sum(loss) / (n_pairs if options.reduction == "mean" else 1)
    return new(loss if options.reduction == "none" else total), rows[:2], rows[2]


def _per_pair(scalar: Scalar, n_pairs: int) -> list[float]:
    if isinstance(scalar, Tensor) and scalar.dim():
        return scalar.tolist()
    return [float(scalar)] * n_pairs


def _closed_form(
    pairs: Pairs, options: Options, factors: Tensor, needed: tuple[bool, bool]
) -> list[Tensor | None]:
    """grad = factor * 2 / size * (pred - target), in the dtype and layout of pred.

    factors: (2, B), slopes times the gradient of the loss. 0 makes a gradient 0, whatever the
    elements.
    """
    scale = 1.0 / pairs.n_pairs if options.reduction == "mean" else 1.0
    scale *= 2.0 if options.huber_c is None else 1.0
    grads = [
        torch.empty_like(t) if need and t is not None else None
        for t, need in zip(pairs.pred, needed, strict=True)
    ]
    sides = _sides(pairs)
    n = pairs.n_pairs
    for i, side in enumerate(sides):
        grad = grads[0] if pairs.pred[1] is None else grads[i]
        if grad is None:
            continue
        if pairs.pred[1] is None and len(sides) == 2:
            grad = grad[i * n : (i + 1) * n]
        rows = grad.view(side.pred.shape)
        of_side = factors if len(sides) == 1 else factors[i : i + 1]
        if options.error_reduction == "mean" and side.mask is None:
            factor = of_side * (scale / side.pred[0, 0].numel())
        else:
            factor = of_side * scale
            if options.error_reduction == "mean":
                size = _mask_size(side, factor.dtype)
                factor = torch.where(size == 0, 0.0, factor) / torch.where(size == 0, 1.0, size)
        factor = factor[(...,) + (None,) * (rows.dim() - 2)]
        plain = side.mask is None and options.huber_c is None
        if plain and grad.dtype == factor.dtype:
            torch.sub(side.pred, side.target, out=rows).mul_(factor)
        else:
            pred, target, _, mask = _cast(side, factor.dtype)
            diff = pred - target
            if mask is not None:
                diff = torch.where(mask == 0, 0.0, diff)
            slopes = diff if options.huber_c is None else diff / _root(diff, options.huber_c)
            rows.copy_(factor * (slopes if side.mask is None else side.mask * slopes))
        if not readable(factor) or 0.0 in factor.flatten().tolist():
            rows.masked_fill_(factor == 0, 0.0)
    return grads


def _again(
    pairs: Pairs, options: Options, grad_loss: Tensor, needed: tuple[bool, bool]
) -> list[Tensor | None]:
    """The gradient with a graph of its own."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        loss, _ = _differentiable(pairs, options)
        given = [t for t, need in zip(pairs.pred, needed, strict=True) if need and t is not None]
        found = iter(torch.autograd.grad(loss, given, grad_loss, create_graph=create_graph))
    return [next(found) if need else None for need in needed]


# Differentiable operations -----------------------------------------------------------------------


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


def _differentiable(pairs: Pairs, options: Options) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if pairs.wide else torch.float32
    uses = live(options.link, options.scalars)
    sides = _sides(pairs)
    of_err = _of_sides((uses.err_w, uses.err_l), pairs, len(sides))
    of_gap = _of_sides((uses.gap_w, uses.gap_l), pairs, len(sides))
    sums = [_gated_sums(*each, options, dtype) for each in zip(sides, of_err, of_gap, strict=True)]
    kinds = _kinds(sums)
    errors, gaps = (_swapped(kind, pairs.swap) for kind in kinds[:2])
    per_pair, *_, margin = pair_losses(options.link, tuple(errors), tuple(gaps), options.scalars)
    return reduce(per_pair, options.reduction), _stats(pairs, kinds, margin)


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
    per_sample = functools.partial(_per_sample, side=side, error_reduction=options.error_reduction)
    if not of_ref:
        size = functools.partial(_largest, pred, target)
        gated = gate(pred, err_live | gap_live, size)
        err = per_sample(_squares(gated - target, huber_c))
        return err, err if ref is None else err - ref, err if ref is None else ref
    ref = of_ref[0]
    diff_ref = ref - target
    size = functools.partial(_largest, pred, target, ref)
    moving = gate(pred, gap_live, size)
    diff = moving - target
    gaps = _gaps(moving - ref, diff, diff_ref, huber_c)
    if err_live is False and gap_live is not False:  # the loss depends on the gap alone
        of_err = diff.detach()
    else:
        of_err = gate(pred, err_live, size) - target
    return (
        per_sample(_squares(of_err, huber_c)), per_sample(gaps),
        per_sample(_squares(diff_ref, huber_c)),
    )  # fmt: skip
