"""The sums of the samples in PyTorch: how operands lie, and what is summed of an element."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref_kernels.knobs import NOTHING_AROUND, Around, sums_of
from fastpref_kernels.links import Group, Link

from .batch import Batch, Operand, Scalar, halves


class Options(NamedTuple):
    """What a loss takes besides its tensors."""

    link: Link | Group
    scalars: Sequence[Scalar]
    huber_c: Scalar | None
    reduction: str
    error_reduction: str
    around: Around = NOTHING_AROUND

    @property
    def needs(self) -> tuple[bool, bool]:
        """Whether the loss takes drifts, and cross sums."""
        return sums_of(self.link, self.around.guard, self.around.drift_weight is not None)

    @property
    def mix(self) -> Scalar | None:
        """What plus and minus are mixed by."""
        link = self.link
        return self.scalars[[*link.hyper].index(link.mixed)] if link.mixed else None

    @property
    def pair_weight(self) -> Any:
        """That of pairs, or of groups; None where there is none."""
        if isinstance(self.link, Link) and len(self.scalars) > len(self.link.hyper):
            return self.scalars[len(self.link.hyper) + 2]
        return self.around.weight


def cast(scalar: Any, dtype: torch.dtype) -> Any:
    """A tensor in the dtype of the errors, lest half precision spoil what is computed with it."""
    return scalar.to(dtype) if isinstance(scalar, Tensor) else scalar


class Side(NamedTuple):
    """Some samples of every group, (S, B, ...): all members, or of pairs one, S = 1. What a group
    shares is (1, B, ...), its predictions expanded. ref may also be errors, (S, B). huber_c, mix,
    affine: numbers, or (S or 1, B); see `Batch` for base and affine."""

    pred: Tensor
    target: Tensor
    ref: Tensor | None
    mask: Tensor | None
    huber_c: Any = None
    mix: Any = None
    anchor: Tensor | None = None
    base: Tensor | None = None
    affine: tuple[Any, ...] = ()


def sides_of(batch: Batch, options: Options) -> list[Side]:
    """All members together where all operands are whole tensors; or else, of pairs, two sides, in
    the order of pred's."""
    operands = (batch.pred, batch.target, batch.ref, batch.mask, batch.anchor, batch.base)
    numbers = [_rows_of(n, batch) for n in (options.huber_c, options.mix, *batch.affine)]
    if all(second is None for _, second in operands):
        whole = [first for first, _ in operands]
        flat = all(t is None or t.is_contiguous() for t in whole)  # all elements in one dimension
        rows = [t if t is None else _rows(t, batch, flat) for t in whole]
        return [_side(rows, numbers, batch, batch.members)]
    each = zip(*[_of_each(operand, batch.n_groups) for operand in operands], strict=True)
    return [
        _side([*rows], [_own(number, i) for number in numbers], batch, 1)
        for i, rows in enumerate(each)
    ]


def _side(rows: list[Tensor | None], numbers: list[Any], batch: Batch, members: int) -> Side:
    pred, target, ref, mask, anchor, base = rows
    huber_c, mix, *affine = numbers
    assert pred is not None
    assert target is not None
    if batch.shares_pred:
        pred = pred.expand(members, *pred.shape[1:])
    return Side(pred, target, ref, mask, huber_c, mix, anchor, base, tuple(affine))


def _rows_of(number: Any, batch: Batch) -> Any:
    """Of each sample, (S, B), or of each group, (1, B); or one."""
    return _rows(number, batch, False) if isinstance(number, Tensor) and number.dim() else number


def _own(number: Any, i: int) -> Any:
    return number[[i % len(number)]] if isinstance(number, Tensor) and number.dim() else number


def _rows(tensor: Tensor, batch: Batch, flat: bool) -> Tensor:
    """(S, B, ...), or (S, B, elements)."""
    n, rows = batch.n_groups, tensor.shape[0]
    sizes = (tensor.numel() // rows,) if flat and tensor.dim() > 1 else tensor.shape[1:]
    if batch.listed and rows != n:
        return tensor.reshape(n, rows // n, *sizes).transpose(0, 1)
    return tensor.reshape(rows // n, n, *sizes)


def _of_each(operand: Operand, n: int) -> tuple[Tensor | None, Tensor | None]:
    if operand[0] is None:
        return None, None
    first, second = halves(operand, n)
    whole = first[None]
    return whole, whole if second is first else second[None]


def samples(side: Side) -> list[Side]:
    """Each alone."""
    members, groups = side.pred.shape[:2]
    return [_part(side, s, slice(b, b + 1)) for s in range(members) for b in range(groups)]


def _part(side: Side, s: int, groups: slice = slice(None)) -> Side:
    """A member, of some groups."""

    def own(t: Any) -> Any:
        if isinstance(t, tuple):
            return tuple(map(own, t))
        if not isinstance(t, Tensor) or t.dim() == 0:
            return t
        return t[slice(s, s + 1) if len(t) > 1 else slice(None), groups]

    return Side(*map(own, side))


def cast_side(side: Side, dtype: torch.dtype) -> Side:
    """In a dtype, with the target that base and affine make of it."""
    pred, target, ref, anchor = (
        t if t is None or t.dtype == dtype else t.to(dtype) for t in (*side[:3], side.anchor)
    )
    assert pred is not None
    assert target is not None
    if side.base is not None:
        a, b = (broadcast(number, side.base) for number in side.affine)
        target = (target - a * side.base.to(dtype)) / b
    return side._replace(pred=pred, target=target, ref=ref, anchor=anchor, base=None)


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


def broadcast(scalar: Any, elements: Tensor) -> Any:
    """A number for each sample, as it goes with their elements."""
    if not isinstance(scalar, Tensor) or scalar.dim() == 0:
        return scalar
    return scalar[(...,) + (None,) * (elements.dim() - scalar.dim())]


def root(diff: Tensor, c: Any) -> Tensor:
    """sqrt(diff^2 + c^2), whose slope at 0 is 0 for c = 0 as well."""
    if not isinstance(c, Tensor) and c > 0.0:
        return (diff.square() + c * c).sqrt()
    value = diff.square() + broadcast(c, diff) ** 2
    none = value == 0.0
    return torch.where(none, 0.0, torch.where(none, 1.0, value).sqrt())


def over(value: Tensor, divisor: Tensor) -> Tensor:
    """value / divisor, where only 0 is divided by 0."""
    return value / torch.where(divisor == 0.0, 1.0, divisor)


def squares(diff: Tensor, huber_c: Any) -> Tensor:
    """Each element's part of the error: its square, or sqrt(diff^2 + c^2) - c."""
    if huber_c is None:
        return diff.square()
    return over(diff.square(), root(diff, huber_c) + broadcast(huber_c, diff))


def gaps(moved: Tensor, diff: Tensor, diff_ref: Tensor, huber_c: Any) -> Tensor:
    """Each element's part of the error less that of the reference, `moved` being pred - ref: no
    difference of two large numbers."""
    gaps = moved * (diff + diff_ref)
    return gaps if huber_c is None else over(gaps, root(diff, huber_c) + root(diff_ref, huber_c))


def mixed(off: Tensor, moved: Tensor, mix: Any) -> tuple[Tensor, Tensor]:
    """The elements of plus and minus: of the reference's distance from the target, mixed with that
    of the prediction from the reference."""
    moved = broadcast(mix, moved) * moved
    return (off + moved).abs(), (off - moved).abs()


def cross_of(sides: Sequence[Side], error_reduction: str, dtype: torch.dtype, swap: bool) -> Tensor:
    """(B,) of pairs: the mean product of what both predictions are off their targets, which both
    masks weigh, over the loser's size."""
    first, last = sides if len(sides) == 2 else (_part(sides[0], 0), _part(sides[0], 1))
    if swap:
        first, last = last, first
    first, last = cast_side(first, dtype), cast_side(last, dtype)
    product = (first.pred - first.target) * (last.pred - last.target)
    if first.mask is None or last.mask is None:
        return per_sample(product, last, error_reduction)[0]
    product = torch.where((first.mask == 0) | (last.mask == 0), 0.0, product)
    if first.mask is not last.mask:
        product = first.mask * product
    return per_sample(product, last, error_reduction)[0]


def of_members(sums: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """(members, B) of each kind of sums, from those of the sides."""
    return [*sums[0]] if len(sums) == 1 else [torch.cat(kind) for kind in zip(*sums, strict=True)]


def stats_of(kinds: Sequence[Tensor], cross: Tensor | None, scores: Sequence[Tensor]) -> Tensor:
    """(rows, B), as the kernels have them."""
    rows = [*([] if cross is None else [cross]), *scores]
    return torch.cat([*kinds, *(row[None] for row in rows)])


def swapped(two: Tensor, swap: bool) -> Tensor:
    return two.flip(0) if swap else two
