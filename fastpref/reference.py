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

from fastpref_kernels.knobs import pair_losses
from fastpref_kernels.links import Link

from .context import no_autocast, readable, transformed
from .differentiable import pair_loss_differentiably
from .pairs import Pairs, Scalar
from .sums import (
    Options,
    Side,
    cast,
    cast_side,
    gaps,
    kinds_of,
    mask_size,
    per_sample,
    reduce,
    root,
    samples,
    sides_of,
    squares,
    stats_of,
    swapped,
)  # fmt: skip

LARGE = 2**20  # elements; above it, a CPU takes one sample at a time
FEW = 32  # pairs; up to it, a CPU works out the link in floats


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
            loss, stats = pair_loss_differentiably(pairs, options)
            return loss, stats.detach()
        loss, stats = _ClosedForm.apply(*pairs.pred, pairs, options)
        return loss, stats.data  # whoever changes a metric in place changes nothing of ours


class _ClosedForm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pred: Tensor, pred_l: Tensor | None, pairs: Pairs, options: Options
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if pairs.wide else torch.float32
        sums = kinds_of([_sums(side, options, dtype) for side in sides_of(pairs)])
        errors, gaps = (swapped(kind, pairs.swap) for kind in sums[:2])
        if pairs.device.type == "cpu" and pairs.n_pairs <= FEW:
            loss, slopes, margin = _link_in_floats(options, errors, gaps)
        else:
            per_pair, *each, margin = pair_losses(
                options.link, tuple(errors), tuple(gaps), options.scalars
            )
            loss = reduce(per_pair, options.reduction)
            slopes = torch.stack([torch.zeros_like(margin) + slope for slope in each])
        made = stats_of(pairs, sums, margin)
        ctx.slopes = swapped(slopes, pairs.swap)
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
    sides = sides_of(pairs)
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
                size = mask_size(side, factor.dtype)
                factor = torch.where(size == 0, 0.0, factor) / torch.where(size == 0, 1.0, size)
        factor = factor[(...,) + (None,) * (rows.dim() - 2)]
        plain = side.mask is None and options.huber_c is None
        if plain and grad.dtype == factor.dtype:
            torch.sub(side.pred, side.target, out=rows).mul_(factor)
        else:
            pred, target, _, mask = cast_side(side, factor.dtype)
            diff = pred - target
            if mask is not None:
                diff = torch.where(mask == 0, 0.0, diff)
            slopes = diff if options.huber_c is None else diff / root(diff, options.huber_c)
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
        loss, _ = pair_loss_differentiably(pairs, options)
        given = [t for t, need in zip(pairs.pred, needed, strict=True) if need and t is not None]
        found = iter(torch.autograd.grad(loss, given, grad_loss, create_graph=create_graph))
    return [next(found) if need else None for need in needed]


def _sums(side: Side, options: Options, dtype: torch.dtype) -> list[Tensor]:
    """(S, B) each: errors, and with a reference what they are above its own, and those. On a CPU,
    large tensors a sample at a time: fresh memory costs more there than arithmetic."""
    shape, on_cpu = side.pred.shape[:2], side.pred.device.type == "cpu"
    if side.pred.numel() > LARGE and on_cpu and shape.numel() > 1:
        each = [_sums(sample, options, dtype) for sample in samples(side)]
        return [torch.cat(kind).view(shape) for kind in zip(*each, strict=True)]
    pred, target, ref, mask = cast_side(side, dtype)
    hidden = None if mask is None else mask == 0  # what it hides may be anything, NaN too

    def off(a: Tensor, b: Tensor) -> Tensor:
        return a - b if hidden is None else torch.where(hidden, 0.0, a - b)

    def reduced(elements: Tensor) -> Tensor:
        return per_sample(elements, side, options.error_reduction)

    plain = options.huber_c is None
    diff = off(pred, target)
    if ref is None:
        return [reduced(diff.square_() if plain else squares(diff, options.huber_c))]
    elements = squares(diff, options.huber_c)
    err = reduced(elements)
    if ref.dim() == 2:
        return [err, err - ref, ref]
    if plain and on_cpu and hidden is None:
        # (pred - ref) * (pred - target + ref - target), with fewer passes over the memory
        moved = torch.sub(pred, ref, out=elements)
        gap = 2.0 * reduced(diff.sub_(moved, alpha=0.5).mul_(moved))
        of_ref = err - gap
        if not _far_from_cancelling(of_ref, err):
            of_ref = reduced((ref - target).square_())
        return [err, gap, of_ref]
    moved = off(pred, ref)
    diff_ref = off(ref, target)
    of_ref = reduced(squares(diff_ref, options.huber_c))
    return [err, reduced(gaps(moved, diff, diff_ref, options.huber_c)), of_ref]


def _far_from_cancelling(difference: Tensor, of: Tensor) -> bool:
    numbers = zip(difference.flatten().tolist(), of.flatten().tolist(), strict=True)
    return all(d > 1e-2 * o for d, o in numbers)
