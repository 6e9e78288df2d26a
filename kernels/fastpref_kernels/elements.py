"""The elements of samples: where they lie, how they are loaded, what is summed of each, and how
slopes come back to them."""
# mypy: disable-error-code="no-untyped-def, assignment, misc, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_of(group, n_groups, MEMBER: tl.constexpr, MEMBERS: tl.constexpr, FORM: tl.constexpr):
    if FORM == "stacked":
        row = group + MEMBER * n_groups
    elif FORM == "listed":
        row = group * MEMBERS + MEMBER
    else:
        row = group
    return row


@triton.jit
def own(each, MEMBER: tl.constexpr):
    """A member's of what may be one for all."""
    return each[MEMBER if len(each) > 1 else 0]


@triton.jit
def starts(
    pointers, strides, group, n_groups, n_elements, MEMBERS: tl.constexpr, FORM: tl.constexpr
):
    """Pointers to the first elements of the members' rows."""
    rows = ()
    if FORM is not None:
        for m in tl.static_range(MEMBERS):
            stride = n_elements if len(own(strides, m)) == 0 else own(strides, m)[0]
            row = row_of(group, n_groups, m, MEMBERS, FORM)
            rows = rows + (own(pointers, m) + row.to(tl.int64) * stride,)  # noqa: RUF005
    return rows


@triton.jit
def _elements(row, start, lane, sizes, strides):
    """Pointers to the elements `start + lane` of a row."""
    if len(sizes) == 0:
        return row + start + lane
    index = start + lane
    offset = index * 0
    for d in tl.static_range(len(sizes)):
        size = sizes[len(sizes) - 1 - d]
        offset += index % size * strides[len(sizes) - d]
        index = index // size
    return row + offset


@triton.jit
def load(row, start, lane, inside, sizes, strides):
    pointers = _elements(row, start, lane, sizes, strides)
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store(row, start, lane, inside, sizes, strides, value):
    pointers = _elements(row, start, lane, sizes, strides)
    tl.store(pointers, value.to(pointers.dtype.element_ty), mask=inside)


@triton.jit
def scalar_of(value, tensor, stride, group, inside):
    """A scalar of some groups in fp32: what `tensor` holds on the device, for each group where its
    stride is not 0, or else `value`."""
    if tensor is None:
        return tl.full([], value, tl.float32)
    else:
        pointers = tensor + group.to(tl.int64) * stride
        return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def hubers_of(huber, group, MEMBERS: tl.constexpr):
    """Each member's constant c of pseudo-Huber errors, from (value,) or (0.0, tensor, its stride by
    groups and by members); None instead of the tensor is more than the jit of Triton 3.6 takes."""
    found = ()
    for m in tl.static_range(MEMBERS):
        if len(huber) < 2:
            c = tl.full([], huber[0] if len(huber) == 1 else 0.0, tl.float32)
        else:
            c = tl.load(huber[1] + group * huber[2] + m * huber[3]).to(tl.float32)
        found = found + (c,)  # noqa: RUF005
    return found


@triton.jit
def affine_of(affine, group, MEMBERS: tl.constexpr):
    """(a, 1 / b) of each member, from (values, tensors, strides by groups, strides by members)."""
    found = ()
    if len(affine) > 0:
        values, tensors, by_group, by_member = affine
        for m in tl.static_range(MEMBERS):
            a = scalar_of(values[0], tensors[0], 1, group * by_group[0] + m * by_member[0], True)
            b = scalar_of(values[1], tensors[1], 1, group * by_group[1] + m * by_member[1], True)
            found = found + ((a, 1.0 / b),)  # noqa: RUF005
    return found


@triton.jit
def affine_target(goal, base, a, inverse):
    """The target whose prediction takes a sampler from x to x' = a x + b pred: (x' - a x) / b."""
    return (goal - a * base) * inverse


@triton.jit
def weighted(value, weight):
    return value if weight is None else tl.where(weight == 0.0, 0.0, weight * value)


@triton.jit
def _over(value, divisor):
    """value / divisor, where only 0 is divided by 0, of L1 errors, for which c = 0."""
    return value / tl.where(divisor == 0.0, 1.0, divisor)


@triton.jit
def squares(diff, weight, c, HUBER: tl.constexpr):
    """Each element's part of the error: its square, or sqrt(diff^2 + c^2) - c."""
    value = diff * diff
    if HUBER:
        value = _over(value, tl.sqrt(value + c * c) + c)
    return weighted(value, weight)


@triton.jit
def gaps(pred, ref, diff, goal, weight, c, HUBER: tl.constexpr):
    """Each element's part of the error less that of the reference, as (p - r)(p + r - 2 goal): no
    difference of two large numbers."""
    diff_ref = ref - goal
    value = (pred - ref) * (diff + diff_ref)
    if HUBER:
        value = _over(value, tl.sqrt(diff * diff + c * c) + tl.sqrt(diff_ref * diff_ref + c * c))
    return weighted(value, weight)


@triton.jit
def slope_of(diff, scale, weight, c, HUBER: tl.constexpr):
    """The gradient of one element; 0 by a factor of 0, whatever the element."""
    value = tl.where(scale == 0.0, 0.0, scale * diff)
    if HUBER:
        value = _over(value, tl.sqrt(diff * diff + c * c))
    if weight is not None:
        value = tl.where(scale == 0.0, 0.0, weighted(value, weight))
    return value


@triton.jit
def together(values, VECTOR: tl.constexpr):
    """Sums of neighbours in one thread: accumulators of all elements would cost a register each."""
    return tl.sum(tl.reshape(values, [values.shape[0] // VECTOR, VECTOR]), axis=1)
