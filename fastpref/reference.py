"""The losses in eager PyTorch: any device, any float dtype including fp64, twice differentiable,
under torch.func too, without Triton."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastpref_kernels.knobs import live, pair_losses
from fastpref_kernels.links import Link

from .context import no_autocast, readable, transformed
from .pairs import Operand, Pairs, Scalar, halves


def pair_loss(
    link: Link,
    scalars: Sequence[Scalar],
    pairs: Pairs,
    huber_c: Scalar | None,
    reduction: str,
    error_reduction: str,
) -> tuple[Tensor, Tensor]:
    """(loss, stats): the loss, () or (B,) for reduction "none", and detached stats (3 or 7, B):
    mse_w, mse_l, margin, and with a reference its errors and the gaps, winner's and loser's each.

    `scalars` are the link's hyper-parameters and then, all or none, the knobs.
    """
    dtype = torch.float64 if pairs.wide else torch.float32
    operands = (pairs.pred, pairs.target, pairs.ref, pairs.mask)
    with no_autocast(pairs.device):
        winners, losers = zip(*(_sides(each, pairs, dtype) for each in operands), strict=True)
        *scalars, huber_c = (cast(scalar, dtype) for scalar in (*scalars, huber_c))
        uses = live(link, scalars)
        err_w, gap_w, ref_w = _errors(winners, huber_c, error_reduction, uses.err_w, uses.gap_w)
        err_l, gap_l, ref_l = _errors(losers, huber_c, error_reduction, uses.err_l, uses.gap_l)
        per_pair, margin = pair_losses(link, (err_w, err_l), (gap_w, gap_l), scalars)
        stats = [err_w, err_l, margin]
        if pairs.ref[0] is not None:
            stats += [ref_w, ref_l, gap_w, gap_l]
    return reduce(per_pair, reduction), torch.stack(stats).detach()


def reduce(per_pair: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return per_pair
    return per_pair.mean() if reduction == "mean" else per_pair.sum()


def cast(scalar: Any, dtype: torch.dtype) -> Any:
    """A tensor in the dtype of the errors, lest half precision spoil what is computed with it."""
    return scalar.to(dtype) if isinstance(scalar, Tensor) else scalar


def gate(value: Tensor, live: Any, size: Callable[[], Tensor]) -> Tensor:
    """The value, cut off from its gradient in the rows that are not live. Their gradient is 0
    already, but 0 times what overflows in them, or is NaN, would not be.

    size: (B,) or (B, ...), what is in a row. Under a transform, where a derivative by the weights
    may be asked for, only rows whose size squared overflows are cut off.
    """
    if not isinstance(live, Tensor):
        if live:
            return value
        live = torch.zeros((), dtype=torch.bool, device=value.device)
    elif readable(live) and live.all():
        return value
    if transformed():
        rows = size().detach()
        rows = rows.flatten(1).sum(dim=1) if rows.dim() > 1 else rows
        live = live | rows.square().isfinite()
    live = live.reshape(live.shape + (1,) * (value.dim() - 1))
    return torch.where(live, value, value.detach())


def _sides(
    operand: Operand, pairs: Pairs, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    if operand[0] is None:
        return None, None
    first, second = halves(operand, pairs.n_pairs, pairs.swap)
    return first.to(dtype), second.to(dtype)


def _squares(pred: Tensor, target: Tensor, *ref: Tensor) -> Tensor:
    """For each element, at least what its squares and its gap come to."""
    total = (pred.detach() - target).square()
    return 4.0 * sum(((each - target).square() for each in ref), start=total)


def _errors(
    tensors: tuple[Any, ...], huber_c: Scalar | None, error_reduction: str, err_live: Any,
    gap_live: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of (pred, target, ref, mask), (B,) each: errors, what they are above those of the reference,
    and those. Gradients go by the errors and by the gaps of the rows in which these are live."""
    pred, target, ref, mask = tensors
    c = 0.0 if huber_c is None else huber_c
    if mask is not None:  # what it hides may be anything, NaN too
        hidden = mask == 0
        of_ref = [] if ref is None or ref.dim() == 1 else [ref]
        if transformed():  # the mask may be differentiated by, where it is 0 too
            hidden = hidden & ~_squares(pred, target, *of_ref).isfinite()
        pred, target, *of_ref = (torch.where(hidden, 0.0, t) for t in (pred, target, *of_ref))
        ref = of_ref[0] if of_ref else ref

    def per_sample(elements: Tensor) -> Tensor:
        total = (elements if mask is None else mask * elements).flatten(1).sum(dim=1)
        if error_reduction == "sum":
            return total
        if mask is None:
            return total / elements[0].numel()
        size = mask.flatten(1).sum(dim=1)
        return torch.where(size == 0, 0.0, total) / torch.where(size == 0, 1.0, size)

    def root(diff: Tensor) -> Tensor:
        return (diff.square() + c * c).sqrt()

    def squares(diff: Tensor) -> Tensor:
        return diff.square() if huber_c is None else diff.square() / (root(diff) + c)

    if ref is None or ref.dim() == 1:
        size = functools.partial(_squares, pred, target)
        err = per_sample(squares(gate(pred, err_live | gap_live, size) - target))
        return err, err if ref is None else err - ref, err if ref is None else ref
    diff_ref = ref - target
    size = functools.partial(_squares, pred, target, ref)
    moving = gate(pred, gap_live, size)
    diff = moving - target
    gaps = (moving - ref) * (diff + diff_ref)  # no difference of two large numbers
    gaps = gaps if huber_c is None else gaps / (root(diff) + root(diff_ref))
    if err_live is False and gap_live is not False:  # the loss depends on the gap alone
        of_err = diff.detach()
    else:
        of_err = gate(pred, err_live, size) - target
    return per_sample(squares(of_err)), per_sample(gaps), per_sample(squares(diff_ref))
