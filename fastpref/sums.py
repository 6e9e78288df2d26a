"""The sums of the samples in PyTorch: how operands lie, what is summed of an element, and the order
of the results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref_kernels.links import Link

from .pairs import Pairs, Scalar, halves


class Options(NamedTuple):
    """What `pair_loss` takes besides the tensors of pairs."""

    link: Link
    scalars: Sequence[Scalar]
    huber_c: Scalar | None
    reduction: str
    error_reduction: str


def reduce(per_pair: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return per_pair
    return per_pair.mean() if reduction == "mean" else per_pair.sum()


def cast(scalar: Any, dtype: torch.dtype) -> Any:
    """A tensor in the dtype of the errors, lest half precision spoil what is computed with it."""
    return scalar.to(dtype) if isinstance(scalar, Tensor) else scalar


class Side(NamedTuple):
    """Some samples of every pair, (S, B, ...): winners and losers stacked, S = 2, or one of them,
    S = 1. What pairs share is (1, B, ...). ref may also be errors, (S, B)."""

    pred: Tensor
    target: Tensor
    ref: Tensor | None
    mask: Tensor | None


def sides_of(pairs: Pairs) -> list[Side]:
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


def samples(side: Side) -> list[Side]:
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


def cast_side(side: Side, dtype: torch.dtype) -> Side:
    tensors = [t if t is None or t.dtype == dtype else t.to(dtype) for t in side[:3]]
    return Side(*tensors, side.mask)  # type: ignore[arg-type, call-arg]


def per_sample(elements: Tensor, side: Side, error_reduction: str) -> Tensor:
    """(..., S, B) means or sums over the elements of each sample, (..., S, B, elements)."""
    if side.mask is not None:
        elements = side.mask * elements
    total = (elements if elements.dim() == 3 else elements.flatten(2)).sum(2)
    if error_reduction == "sum":
        return total
    if side.mask is None:
        return total / elements[0, 0].numel()
    size = mask_size(side, total.dtype)
    return torch.where(size == 0, 0.0, total) / torch.where(size == 0, 1.0, size)


def mask_size(side: Side, dtype: torch.dtype) -> Tensor:
    assert side.mask is not None
    return side.mask.to(dtype).flatten(2).sum(2)


def root(diff: Tensor, c: Any) -> Tensor:
    return (diff.square() + c * c).sqrt()


def squares(diff: Tensor, huber_c: Any) -> Tensor:
    """Each element's part of the error: its square, or sqrt(diff^2 + c^2) - c."""
    return diff.square() if huber_c is None else diff.square() / (root(diff, huber_c) + huber_c)


def gaps(moved: Tensor, diff: Tensor, diff_ref: Tensor, huber_c: Any) -> Tensor:
    """Each element's part of the error less that of the reference, `moved` being pred - ref: no
    difference of two large numbers."""
    gaps = moved * (diff + diff_ref)
    return gaps if huber_c is None else gaps / (root(diff, huber_c) + root(diff_ref, huber_c))


def kinds_of(sums: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """(2, B) of each kind of sums: errors, gaps, and errors of the reference."""
    kinds = sums[0] if len(sums) == 1 else [torch.cat(kind) for kind in zip(*sums, strict=True)]
    return [*kinds] if len(kinds) == 3 else [kinds[0]] * 3


def stats_of(pairs: Pairs, kinds: list[Tensor], margin: Tensor) -> Tensor:
    return torch.cat([*(kinds[:1] if pairs.ref[0] is None else kinds), margin[None]])


def swapped(two: Tensor, swap: bool) -> Tensor:
    return two.flip(0) if swap else two
