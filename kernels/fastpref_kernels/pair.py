"""The two jit kernels of every loss: forward (sums of samples -> link -> loss) and backward
(gradient). They know no loss by name.

A group is what a link looks at together: a pair (winner, loser), a list of k, a single sample. Its
members' elements are read by one program, so that what they share is read once. An operand is a
tuple of pointers, one for each member or one for all; its FORM says which rows are whose:
"stacked" (all first members, then all second ones), "listed" (the members of a group one after the
other), "halves" (a tensor for each member), "shared" (one row for all), None where it is absent.
Its strides are (row stride, *inner strides) for each pointer, for the inner sizes `sizes`, which is
empty where all rows are dense in one order; no strides at all are those of a contiguous tensor.

Each member has these sums, in this order, as far as the link needs them; p is its prediction, t its
target, r the reference's or an old policy's prediction, a the anchor's:

    err     (p - t)^2, or a pseudo-Huber error
    gap     the same less that of r, as (p - r) (p + r - 2 t)
    ref     (r - t)^2
    drift   (p - r)^2
    plus    |r - t + c (p - r)|        minus   |r - t - c (p - r)|        c = `mix`, a number a row
    anchor  (p - a)^2
    count   elements that the mask does not hide
and the group, with two members, cross = (p_w - t_w) (p_l - t_l), which both masks weigh, over the
second's count.
"""
# mypy: disable-error-code="no-untyped-def, assignment, misc, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl

from .knobs import pair_losses_jit, safeguard
from .special import times


@triton.jit
def _row(group, n_groups, MEMBER: tl.constexpr, MEMBERS: tl.constexpr, FORM: tl.constexpr):
    if FORM == "stacked":
        row = group + MEMBER * n_groups
    elif FORM == "listed":
        row = group * MEMBERS + MEMBER
    else:
        row = group
    return row


@triton.jit
def _own(each, MEMBER: tl.constexpr):
    """A member's of what may be one for all."""
    return each[MEMBER if len(each) > 1 else 0]


@triton.jit
def _starts(
    pointers, strides, group, n_groups, n_elements, MEMBERS: tl.constexpr, FORM: tl.constexpr
):
    """Pointers to the first elements of the members' rows."""
    rows = ()
    if FORM is not None:
        for m in tl.static_range(MEMBERS):
            stride = n_elements if len(_own(strides, m)) == 0 else _own(strides, m)[0]
            row = _row(group, n_groups, m, MEMBERS, FORM)
            rows = rows + (_own(pointers, m) + row.to(tl.int64) * stride,)  # noqa: RUF005
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
def _load(row, start, lane, inside, sizes, strides):
    pointers = _elements(row, start, lane, sizes, strides)
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(row, start, lane, inside, sizes, strides, value):
    pointers = _elements(row, start, lane, sizes, strides)
    tl.store(pointers, value.to(pointers.dtype.element_ty), mask=inside)


@triton.jit
def _scalar(value, tensor, stride, group, inside):
    """A scalar of some groups in fp32: what `tensor` holds on the device, for each group where its
    stride is not 0, or else `value`."""
    if tensor is None:
        return tl.full([], value, tl.float32)
    else:
        pointers = tensor + group.to(tl.int64) * stride
        return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _hubers(huber, group, MEMBERS: tl.constexpr):
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
def _over(value, divisor):
    """value / divisor, where only 0 is divided by 0, of L1 errors, for which c = 0."""
    return value / tl.where(divisor == 0.0, 1.0, divisor)


@triton.jit
def _weighted(value, weight):
    return value if weight is None else tl.where(weight == 0.0, 0.0, weight * value)


@triton.jit
def _squares(diff, weight, c, HUBER: tl.constexpr):
    """Each element's part of the error: its square, or sqrt(diff^2 + c^2) - c."""
    value = diff * diff
    if HUBER:
        value = _over(value, tl.sqrt(value + c * c) + c)
    return _weighted(value, weight)


@triton.jit
def _gaps(pred, ref, diff, goal, weight, c, HUBER: tl.constexpr):
    """Each element's part of the error less that of the reference, as (p - r)(p + r - 2 goal): no
    difference of two large numbers."""
    diff_ref = ref - goal
    value = (pred - ref) * (diff + diff_ref)
    if HUBER:
        value = _over(value, tl.sqrt(diff * diff + c * c) + tl.sqrt(diff_ref * diff_ref + c * c))
    return _weighted(value, weight)


@triton.jit
def _together(values, VECTOR: tl.constexpr):
    """Sums of neighbours in one thread: accumulators of all elements would cost a register each."""
    return tl.sum(tl.reshape(values, [values.shape[0] // VECTOR, VECTOR]), axis=1)


@triton.jit
def _sums(
    partials, group, n_groups, n_programs,
    FIRST: tl.constexpr, TOTAL: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The sums of some groups, four kinds at most from FIRST on, in an order that does not depend
    on who came first. All are read before any is added: a wait for the memory costs more than all
    else here. More than four at a time take more registers than are left."""
    KINDS: tl.constexpr = TOTAL - FIRST if TOTAL - FIRST < 4 else 4
    totals = ()
    for _ in tl.static_range(KINDS):
        totals = totals + (tl.zeros([GROUPS, PARTS], tl.float32),)  # noqa: RUF005
    for first in range(0, n_programs, PARTS):
        part = first + tl.arange(0, PARTS)
        inside = (group < n_groups)[:, None] & (part < n_programs)[None, :]
        row = (FIRST * n_groups + group) * n_programs
        pointers = partials + (row[:, None] + part[None, :])
        more = ()
        for kind in tl.static_range(KINDS):
            # .cg: other programs wrote these during this launch; this processor's L1 may be stale
            read = tl.load(pointers, mask=inside, other=0.0, cache_modifier=".cg")
            more = more + (totals[kind] + read,)  # noqa: RUF005
            pointers += n_groups * n_programs
        totals = more
    sums = ()
    for kind in tl.static_range(KINDS):
        sums = sums + (tl.sum(totals[kind], axis=1),)  # noqa: RUF005
    return sums


@triton.jit
def _mean(total, size, EXACT: tl.constexpr = False):
    """total / size, and 0 of a sample that is masked whole. A GPU's plain / is 2 ulp off, which
    MaPO's margin shows a thousandfold; exact division may cost stack, and so is for errors only."""
    hidden = size == 0.0
    size = tl.where(hidden, 1.0, size)
    return tl.where(hidden, 0.0, tl.div_rn(total, size) if EXACT else total / size)


@triton.jit
def _group_sums(
    partials, ref, ref_strides, group, n_groups, n_elements, n_programs,
    MEMBERS: tl.constexpr, KINDS: tl.constexpr, COUNTS: tl.constexpr, CROSS: tl.constexpr,
    MEAN: tl.constexpr, REF: tl.constexpr, REF_ERRORS: tl.constexpr,
    GROUPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """(for each member its sums, as means unless error_reduction is "sum"; their sizes; cross)."""
    TOTAL: tl.constexpr = MEMBERS * KINDS + COUNTS + CROSS
    totals = ()
    for first in tl.static_range(0, TOTAL, 4):
        totals = totals + _sums(partials, group, n_groups, n_programs, first, TOTAL, GROUPS, PARTS)
    sizes = ()
    members = ()
    for m in tl.static_range(MEMBERS):
        size = tl.full([GROUPS], 1.0, tl.float32)
        if MEAN and COUNTS > 0:
            size = totals[MEMBERS * KINDS + (m if COUNTS > 1 else 0)]
        elif MEAN:
            size = tl.zeros([GROUPS], tl.float32) + n_elements
        sizes = sizes + (size,)  # noqa: RUF005
        err = _mean(totals[m * KINDS], size, True)
        each = (err,)
        if REF_ERRORS:
            inside = group < n_groups
            row = _row(group, n_groups, m, MEMBERS, REF)
            of_ref = _scalar(0.0, _own(ref, m), _own(ref_strides, m)[0], row, inside)
            each = (err, err - of_ref, of_ref)
        for kind in tl.static_range(1, KINDS):
            each = each + (_mean(totals[m * KINDS + kind], size),)  # noqa: RUF005
        members = members + (each,)  # noqa: RUF005
    cross = _mean(totals[TOTAL - 1], sizes[MEMBERS - 1]) if CROSS else sizes[0]
    return members, sizes, cross


@triton.jit
def _list_sums(
    partials, ref, ref_strides, group, n_groups, n_elements, n_programs,
    MEMBERS: tl.constexpr, LISTED: tl.constexpr, KINDS: tl.constexpr, COUNTS: tl.constexpr,
    MEAN: tl.constexpr, REF_ERRORS: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """(kinds of sums, sizes) of lists, [GROUPS, LISTED] each; LISTED is a power of 2."""
    member = tl.arange(0, LISTED)[None, :]
    there = (group < n_groups)[:, None] & (member < MEMBERS)
    totals = ()
    for kind in tl.static_range(KINDS + (COUNTS > 0)):
        row = member * KINDS + kind
        if kind == KINDS:
            row = MEMBERS * KINDS + (member if COUNTS > 1 else 0 * member)
        rows = partials + (row * n_groups + group[:, None]) * n_programs
        total = tl.zeros([GROUPS, LISTED, PARTS], tl.float32)
        for first in range(0, n_programs, PARTS):
            part = first + tl.arange(0, PARTS)[None, None, :]
            inside = there[:, :, None] & (part < n_programs)
            total += tl.load(rows[:, :, None] + part, mask=inside, other=0.0, cache_modifier=".cg")
        totals = totals + (tl.sum(total, axis=2),)  # noqa: RUF005
    size = tl.full([GROUPS, LISTED], 1.0, tl.float32)
    if MEAN and COUNTS > 0:
        size = totals[KINDS]
    elif MEAN:
        size = tl.zeros([GROUPS, LISTED], tl.float32) + n_elements
    kinds = ()
    for kind in tl.static_range(KINDS):
        kinds = kinds + (_mean(totals[kind], size, kind == 0),)  # noqa: RUF005
    if REF_ERRORS:
        rows = ref[0] + (group[:, None].to(tl.int64) * MEMBERS + member) * ref_strides[0][0]
        of_ref = tl.load(rows, mask=there, other=0.0).to(tl.float32)
        kinds = (kinds[0], kinds[0] - of_ref, of_ref)
    return kinds, size


@triton.jit
def _list_losses(
    kinds, lengths, values, tensors, strides, group, n_groups,
    LINK: tl.constexpr, N_LINK: tl.constexpr, WEIGHTED: tl.constexpr, MEMBERS: tl.constexpr,
    LISTED: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The same of lists: losses and scores [GROUPS], slopes for each direction [GROUPS, LISTED]."""
    member = tl.arange(0, LISTED)[None, :]
    inside = (group < n_groups)[:, None]
    active = inside & (member < MEMBERS)
    if lengths is not None:
        active = active & (member < tl.load(lengths + group, mask=group < n_groups)[:, None])
    sums = ()
    for kind in tl.static_range(len(kinds)):
        sums = sums + (tl.where(active, kinds[kind], 0.0),)  # noqa: RUF005
    none = tl.zeros([GROUPS], tl.float32)
    LAST: tl.constexpr = N_LINK - 1
    scalars = _scalars(values, tensors, strides, group, n_groups, 0, LAST)
    numbers = ()
    for i in tl.static_range(LAST):
        numbers = numbers + ((none + scalars[i])[:, None],)  # noqa: RUF005
    rows = tensors[LAST] + group[:, None].to(tl.int64) * strides[LAST][0]
    of_members = tl.load(rows + member * strides[LAST][1], mask=active, other=0.0).to(tl.float32)
    value, slopes, score = LINK(sums, of_members, member, numbers, active)
    if WEIGHTED:
        (weight,) = _scalars(values, tensors, strides, group, n_groups, N_LINK, N_LINK + 1)
        value = times(weight, value)
        weighted = ()
        for d in tl.static_range(len(slopes)):
            weighted = weighted + (times((none + weight)[:, None], slopes[d]),)  # noqa: RUF005
        slopes = weighted
    return value, slopes, score


@triton.jit
def _losses(
    sums, cross, batch, guard, values, tensors, strides, group, n_groups,
    LINK: tl.constexpr, SCORE: tl.constexpr, SHAPE: tl.constexpr, N_SCORE: tl.constexpr,
    N_HYPER: tl.constexpr, N_LINK: tl.constexpr, SFT_WEIGHT: tl.constexpr, SWAP: tl.constexpr,
    GUARD: tl.constexpr, DRIFT: tl.constexpr, WEIGHTED: tl.constexpr, REF: tl.constexpr,
    MEMBERS: tl.constexpr,
):  # fmt: skip
    """(losses, slopes of each member, scores) of some groups, by the link and what is around it;
    the numbers for that follow the link's own."""
    if LINK is None:
        W: tl.constexpr = 1 if SWAP else 0  # who is the winner
        err_w, err_l = sums[W][0], sums[1 - W][0]
        gap_w, gap_l = err_w, err_l
        if REF is not None:
            gap_w, gap_l = sums[W][1], sums[1 - W][1]
        knobs = _scalars(values, tensors, strides, group, n_groups, N_HYPER, N_LINK)
        value, slope_w, slope_l, score = pair_losses_jit(
            err_w, err_l, gap_w, gap_l,
            _scalars(values, tensors, strides, group, n_groups, 0, N_SCORE),
            _scalars(values, tensors, strides, group, n_groups, N_SCORE, N_HYPER),
            knobs, SCORE, SHAPE, SFT_WEIGHT,
        )  # fmt: skip
        if GUARD is not None:
            (number,) = _scalars(values, tensors, strides, group, n_groups, N_LINK, N_LINK + 1)
            if GUARD == "pair":
                guard = safeguard(err_w, cross, number)
            elif GUARD == "given":
                guard = number
            slope_l = times(guard, slope_l)
        of_w, of_l = (slope_w,), (slope_l,)
        if DRIFT:
            AT: tl.constexpr = N_LINK + (GUARD is not None)
            (number,) = _scalars(values, tensors, strides, group, n_groups, AT, AT + 1)
            if len(knobs) > 0:
                number = times(knobs[2], number)
            value += times(number, 0.5 * (sums[0][3] + sums[1][3]))
            slope = 0.5 * number + tl.zeros_like(value)
            of_w, of_l = (slope_w, slope), (slope_l, slope)
        return value, (of_l, of_w) if SWAP else (of_w, of_l), score
    else:
        scalars = _scalars(values, tensors, strides, group, n_groups, 0, N_LINK)
        value, slopes, score = LINK(sums, cross, scalars, batch)
        if WEIGHTED:
            (weight,) = _scalars(values, tensors, strides, group, n_groups, N_LINK, N_LINK + 1)
            value = times(weight, value)
            weighted = ()
            for m in tl.static_range(MEMBERS):
                each = ()
                for d in tl.static_range(len(slopes[m])):
                    each = each + (times(weight, slopes[m][d]),)  # noqa: RUF005
                weighted = weighted + (each,)  # noqa: RUF005
            slopes = weighted
        return value, slopes, score


@triton.jit
def _finish(
    loss, stats, partials, ref, lengths, values, tensors, strides, n_groups, n_elements, n_programs,
    ref_strides, group_scale,
    LINK: tl.constexpr, FIRST: tl.constexpr, SCORE: tl.constexpr, SHAPE: tl.constexpr,
    N_SCORE: tl.constexpr, N_HYPER: tl.constexpr, N_LINK: tl.constexpr, SFT_WEIGHT: tl.constexpr,
    SWAP: tl.constexpr, GUARD: tl.constexpr, WEIGHTED: tl.constexpr, HEATED: tl.constexpr,
    REDUCE: tl.constexpr, MEAN: tl.constexpr, MEMBERS: tl.constexpr, LISTED: tl.constexpr,
    KINDS: tl.constexpr, COUNTS: tl.constexpr, DRIFT: tl.constexpr, CROSS: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    REF: tl.constexpr, REF_ERRORS: tl.constexpr, HUBER: tl.constexpr,
    GROUPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Sums -> link -> loss for all groups, by the one program that arrived last. It goes over the
    groups once more for each thing that a loss takes from the whole batch: the mean of what FIRST
    makes of a group, the safeguard's sums, or, HEATED, the log-sum-exp of the losses."""
    batch = 0.0
    if FIRST is not None:
        total = tl.zeros([GROUPS], tl.float32)
        for first in range(0, n_groups, GROUPS):
            group = first + tl.arange(0, GROUPS)
            sums, _, _ = _group_sums(
                partials, ref, ref_strides, group, n_groups, n_elements, n_programs,
                MEMBERS, KINDS, COUNTS, CROSS, MEAN, REF, REF_ERRORS, GROUPS, PARTS,
            )  # fmt: skip
            scalars = _scalars(values, tensors, strides, group, n_groups, 0, N_LINK)
            value = FIRST(sums, scalars)
            total += tl.where(group < n_groups, value, 0.0)
        batch = tl.sum(total, axis=0) / n_groups
    guard = 1.0
    if GUARD == "batch":
        of_winners = tl.zeros([GROUPS], tl.float32)
        of_both = tl.zeros([GROUPS], tl.float32)
        for first in range(0, n_groups, GROUPS):
            group = first + tl.arange(0, GROUPS)
            sums, _, cross = _group_sums(
                partials, ref, ref_strides, group, n_groups, n_elements, n_programs,
                MEMBERS, KINDS, COUNTS, CROSS, MEAN, REF, REF_ERRORS, GROUPS, PARTS,
            )  # fmt: skip
            of_winners += tl.where(group < n_groups, sums[1 if SWAP else 0][0], 0.0)
            of_both += tl.where(group < n_groups, cross, 0.0)
        one = tl.full([], 0, tl.int32)  # all groups have the same number
        (number,) = _scalars(values, tensors, strides, one, n_groups, N_LINK, N_LINK + 1)
        guard = safeguard(tl.sum(of_winners, axis=0), tl.sum(of_both, axis=0), number)
    heat = 1.0
    log_sum = 0.0
    if HEATED:
        LAST: tl.constexpr = len(values) - 1
        one = tl.full([], 0, tl.int32)
        (number,) = _scalars(values, tensors, strides, one, n_groups, LAST, LAST + 1)
        heat = number
        high = tl.full([GROUPS], float("-inf"), tl.float32)
        total = tl.zeros([GROUPS], tl.float32)
        for first in range(0, n_groups, GROUPS):
            group = first + tl.arange(0, GROUPS)
            if LISTED:
                kinds, _ = _list_sums(
                    partials, ref, ref_strides, group, n_groups, n_elements, n_programs,
                    MEMBERS, LISTED, KINDS, COUNTS, MEAN, REF_ERRORS, GROUPS, PARTS,
                )  # fmt: skip
                value, _, _ = _list_losses(
                    kinds, lengths, values, tensors, strides, group, n_groups,
                    LINK, N_LINK, WEIGHTED, MEMBERS, LISTED, GROUPS,
                )  # fmt: skip
            else:
                sums, _, cross = _group_sums(
                    partials, ref, ref_strides, group, n_groups, n_elements, n_programs,
                    MEMBERS, KINDS, COUNTS, CROSS, MEAN, REF, REF_ERRORS, GROUPS, PARTS,
                )  # fmt: skip
                value, _, _ = _losses(
                    sums, cross, batch, guard, values, tensors, strides, group, n_groups,
                    LINK, SCORE, SHAPE, N_SCORE, N_HYPER, N_LINK, SFT_WEIGHT, SWAP, GUARD, DRIFT,
                    WEIGHTED, REF, MEMBERS,
                )  # fmt: skip
            value = tl.where(group < n_groups, value / heat, float("-inf"))
            higher = tl.where(value <= high, high, value)  # NaN stays NaN
            kept = tl.where(high == higher, 1.0, tl.exp(high - higher))
            total = total * kept + tl.where(value == higher, 1.0, tl.exp(value - higher))
            total = tl.where(higher == float("-inf"), 0.0, total)
            high = higher
        highest = tl.max(high, axis=0)
        highest = tl.where(tl.sum(total, axis=0) >= 0.0, highest, float("nan"))
        log_sum = highest + tl.log(tl.sum(total * tl.exp(high - highest), axis=0))
    total = tl.zeros([GROUPS], tl.float32)
    for first in range(0, n_groups, GROUPS):
        group = first + tl.arange(0, GROUPS)
        inside = group < n_groups
        if LISTED:
            kinds, sizes = _list_sums(
                partials, ref, ref_strides, group, n_groups, n_elements, n_programs,
                MEMBERS, LISTED, KINDS, COUNTS, MEAN, REF_ERRORS, GROUPS, PARTS,
            )  # fmt: skip
            value, slopes, score = _list_losses(
                kinds, lengths, values, tensors, strides, group, n_groups,
                LINK, N_LINK, WEIGHTED, MEMBERS, LISTED, GROUPS,
            )  # fmt: skip
        else:
            sums, sizes, cross = _group_sums(
                partials, ref, ref_strides, group, n_groups, n_elements, n_programs,
                MEMBERS, KINDS, COUNTS, CROSS, MEAN, REF, REF_ERRORS, GROUPS, PARTS,
            )  # fmt: skip
            value, slopes, score = _losses(
                sums, cross, batch, guard, values, tensors, strides, group, n_groups,
                LINK, SCORE, SHAPE, N_SCORE, N_HYPER, N_LINK, SFT_WEIGHT, SWAP, GUARD, DRIFT,
                WEIGHTED, REF, MEMBERS,
            )  # fmt: skip
        share = group_scale
        if HEATED:
            share = tl.exp(value / heat - log_sum)
        rows = stats + group
        if LISTED:
            member = tl.arange(0, LISTED)[None, :]
            there = inside[:, None] & (member < MEMBERS)
            rows = rows[:, None] + member * n_groups
            for kind in tl.static_range(len(kinds)):
                tl.store(rows, kinds[kind], mask=there)
                rows += MEMBERS * n_groups
            tl.store(stats + group + len(kinds) * MEMBERS * n_groups, score, mask=inside)
            rows += n_groups
            each = (tl.zeros([GROUPS], tl.float32) + share)[:, None]
            for d in tl.static_range(DIRECTIONS):
                scale = each if HUBER and d == 0 else 2.0 * each
                tl.store(rows, _mean(times(scale, slopes[d]), sizes), mask=there)
                rows += MEMBERS * n_groups
        else:
            for kind in tl.static_range(len(sums[0])):
                for m in tl.static_range(MEMBERS):
                    tl.store(rows, sums[m][kind], mask=inside)
                    rows += n_groups
            if CROSS:
                tl.store(rows, cross, mask=inside)
                rows += n_groups
            tl.store(rows, score, mask=inside)
            for d in tl.static_range(DIRECTIONS):
                # of d err / d pred = 2 / size * (pred - target), all but the difference
                scale = share if HUBER and d == 0 else 2.0 * share
                for m in tl.static_range(MEMBERS):
                    rows += n_groups
                    factor = times(scale, slopes[m][d]) if HEATED else slopes[m][d] * scale
                    tl.store(rows, _mean(factor, sizes[m]), mask=inside)
        if REDUCE:
            total += tl.where(inside, value, 0.0)
        else:
            tl.store(loss + group, value, mask=inside)
    if HEATED:
        tl.store(loss, heat * (log_sum - tl.log(n_groups * 1.0)))
    elif REDUCE:
        tl.store(loss, tl.sum(total, axis=0) * group_scale)


@triton.jit
def _scalars(
    values, tensors, strides, group, n_groups, FIRST: tl.constexpr, LAST: tl.constexpr
):  # fmt: skip
    found = ()
    for i in tl.static_range(FIRST, LAST):
        scalar = _scalar(values[i], tensors[i], strides[i], group, group < n_groups)
        found = found + (scalar,)  # noqa: RUF005
    return found


@triton.jit
def _add_up(
    preds, targets, refs, masks, bases, anchors, hubers, affine, mix,
    partials, group, part, n_groups, n_elements, n_programs,
    sizes, pred_strides, target_strides, ref_strides, mask_strides, base_strides, anchor_strides,
    FROM: tl.constexpr, TO: tl.constexpr, MEMBERS: tl.constexpr, KINDS: tl.constexpr,
    COUNTS: tl.constexpr, PRED: tl.constexpr, TARGET: tl.constexpr, REF: tl.constexpr,
    MASK: tl.constexpr, BASE: tl.constexpr, ANCHOR: tl.constexpr, DRIFT: tl.constexpr,
    MIXED: tl.constexpr, CROSS: tl.constexpr, HUBER: tl.constexpr, VECTOR: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The partial sums of some members, and with them the counts of their elements."""
    ONCE: tl.constexpr = MASK == "shared" and FROM > 0  # counted with the first members
    COUNTED: tl.constexpr = 0 if COUNTS == 0 or ONCE else (1 if COUNTS == 1 else TO - FROM)
    lane = tl.arange(0, BLOCK)
    acc = ()
    for _ in tl.static_range((TO - FROM) * KINDS + COUNTED + CROSS):
        acc = acc + (tl.zeros([BLOCK // VECTOR], tl.float32),)  # noqa: RUF005
    for block in range(part, (n_elements - 1) // BLOCK + 1, n_programs):  # n + BLOCK may overflow
        start = tl.full([], block, tl.int64 if WIDE else tl.int32) * BLOCK
        inside = start + lane < n_elements
        added = ()
        counts = ()
        weight = None
        for m in tl.static_range(FROM, TO):
            if m == FROM or TARGET != "shared" or BASE is not None:
                goal = _load(targets[m], start, lane, inside, sizes, _own(target_strides, m))
                if BASE is not None:
                    x = _load(bases[m], start, lane, inside, sizes, _own(base_strides, m))
                    goal = _affine_target(goal, x, affine, group, n_groups, m, MEMBERS)
                    goal = tl.where(inside, goal, 0.0)
            if MASK is not None and (m == FROM or MASK != "shared"):
                weight = _load(masks[m], start, lane, inside, sizes, _own(mask_strides, m))
                if COUNTED > 0:
                    counts = counts + (_together(weight, VECTOR),)  # noqa: RUF005
            if m == FROM or PRED != "shared":
                pred_m = _load(preds[m], start, lane, inside, sizes, _own(pred_strides, m))
            diff = pred_m - goal
            value = _squares(diff, weight, hubers[m], HUBER)
            added = added + (_together(value, VECTOR),)  # noqa: RUF005
            if REF is not None:
                if m == FROM or REF != "shared":
                    ref_m = _load(refs[m], start, lane, inside, sizes, _own(ref_strides, m))
                off = ref_m - goal
                value = _gaps(pred_m, ref_m, diff, goal, weight, hubers[m], HUBER)
                added = added + (_together(value, VECTOR),)  # noqa: RUF005
                value = _squares(off, weight, hubers[m], HUBER)
                added = added + (_together(value, VECTOR),)  # noqa: RUF005
                moved = pred_m - ref_m
                if DRIFT:
                    value = _squares(moved, weight, 0.0, False)
                    added = added + (_together(value, VECTOR),)  # noqa: RUF005
                if MIXED:
                    value = _weighted(tl.abs(off + mix * moved), weight)
                    added = added + (_together(value, VECTOR),)  # noqa: RUF005
                    value = _weighted(tl.abs(off - mix * moved), weight)
                    added = added + (_together(value, VECTOR),)  # noqa: RUF005
            if ANCHOR is not None:
                a = _load(anchors[m], start, lane, inside, sizes, _own(anchor_strides, m))
                value = _squares(pred_m - a, weight, 0.0, False)
                added = added + (_together(value, VECTOR),)  # noqa: RUF005
            if CROSS and m == FROM:
                first = diff
                if MASK is not None:
                    first_weight = weight
        added = added + counts
        if CROSS:
            value = _weighted(first * diff, weight)
            if MASK is not None and MASK != "shared":
                value = _weighted(value, first_weight)
            added = added + (_together(value, VECTOR),)  # noqa: RUF005
        sums = ()
        for i in tl.static_range(len(added)):
            sums = sums + (acc[i] + added[i],)  # noqa: RUF005
        acc = sums
    parts = n_groups * n_programs
    mine = partials + tl.program_id(0) + FROM * KINDS * parts
    for i in tl.static_range(len(acc)):
        if i == (TO - FROM) * KINDS and TO - FROM < MEMBERS:
            mine = partials + tl.program_id(0) + (MEMBERS * KINDS + FROM) * parts
        tl.store(mine, tl.sum(acc[i], axis=0))
        mine += parts


# The jit would compile once more for each of these that happens to be 1 or a multiple of 16. For
# n_elements and strides it may: knowing that is what makes loads and stores 16 bytes wide.
_COUNTS = ["n_groups", "n_programs"]


@triton.jit
def _affine_target(goal, base, affine, group, n_groups, M: tl.constexpr, MEMBERS: tl.constexpr):
    """The target whose prediction takes a sampler from x to x' = a x + b pred: (x' - a x) / b."""
    row = group * MEMBERS + M
    a = _scalar(affine[0][0], affine[1][0], affine[2][0], row, True)
    inverse = _scalar(affine[0][1], affine[1][1], affine[2][1], row, True)
    return (goal - a * base) * inverse


@triton.jit(do_not_specialize=_COUNTS)
def pair_fwd(
    pred, target, ref, mask, base, anchor,
    loss, stats, partials, ticket, lengths, values, tensors, strides, huber, affine, mix,
    n_groups, n_elements, n_programs,
    sizes, pred_strides, target_strides, ref_strides, mask_strides, base_strides, anchor_strides,
    group_scale,
    LINK: tl.constexpr, FIRST: tl.constexpr, SCORE: tl.constexpr, SHAPE: tl.constexpr,
    N_SCORE: tl.constexpr, N_HYPER: tl.constexpr, N_LINK: tl.constexpr, SFT_WEIGHT: tl.constexpr,
    SWAP: tl.constexpr, GUARD: tl.constexpr, WEIGHTED: tl.constexpr, HEATED: tl.constexpr,
    REDUCE: tl.constexpr, MEAN: tl.constexpr,
    MEMBERS: tl.constexpr, LISTED: tl.constexpr,
    PRED: tl.constexpr, TARGET: tl.constexpr, REF: tl.constexpr,
    REF_ERRORS: tl.constexpr, MASK: tl.constexpr, BASE: tl.constexpr, ANCHOR: tl.constexpr,
    DRIFT: tl.constexpr, MIXED: tl.constexpr, CROSS: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """loss, stats = link(sums of the members) in one launch that reads every element once.

    Program (group, part) adds up every n_programs-th block of its group into partials
    (sum, n_groups, n_programs) and takes a ticket. Whoever draws the last ticket sees all partials,
    finishes, and leaves `ticket` at 0 for the next launch.
    stats (rows, n_groups): each sum of each member, kind by kind, without count; cross; the score;
    and the factors of the gradient, for each direction (p - t, p - r, p - a) those of each member.
    LISTED: of lists, MEMBERS up to a power of 2; their link has the members in one tensor.
    loss: () or, unless REDUCE, (n_groups,). group_scale: 1 / n_groups for a mean, else 1.
    values, tensors, strides: of the scalars, N_LINK of the link (hyper-parameters and knobs), and
    then those of what is around it: GUARD, DRIFT or WEIGHTED, HEATED.
    """
    HUBER: tl.constexpr = len(huber) > 0
    # what a thread loads at once of the widest operand: `launch._threads` has as many as that takes
    PRED_BITS: tl.constexpr = pred[0].dtype.element_ty.primitive_bitwidth
    TARGET_BITS: tl.constexpr = target[0].dtype.element_ty.primitive_bitwidth
    NARROW: tl.constexpr = PRED_BITS < 32 and TARGET_BITS < 32
    VECTOR: tl.constexpr = 8 if NARROW else 4
    PAIRED: tl.constexpr = REF is not None and not REF_ERRORS  # a reference of as many elements
    KINDS: tl.constexpr = 1 + 2 * PAIRED + DRIFT + 2 * MIXED + (ANCHOR is not None)
    COUNTS: tl.constexpr = (
        0 if MASK is None or not MEAN else (1 if MASK == "shared" else MEMBERS)
    )  # fmt: skip
    group = tl.program_id(0) // n_programs
    part = tl.program_id(0) % n_programs
    preds = _starts(pred, pred_strides, group, n_groups, n_elements, MEMBERS, PRED)
    targets = _starts(target, target_strides, group, n_groups, n_elements, MEMBERS, TARGET)
    refs = _starts(ref, ref_strides, group, n_groups, n_elements, MEMBERS, REF if PAIRED else None)
    masks = _starts(mask, mask_strides, group, n_groups, n_elements, MEMBERS, MASK)
    bases = _starts(base, base_strides, group, n_groups, n_elements, MEMBERS, BASE)
    anchors = _starts(anchor, anchor_strides, group, n_groups, n_elements, MEMBERS, ANCHOR)
    hubers = _hubers(huber, group, MEMBERS)
    # Sums of more than eight members at a time take more registers than a thread has.
    for FROM in tl.static_range(0, MEMBERS, 8):
        _add_up(
            preds, targets, refs, masks, bases, anchors, hubers, affine, mix,
            partials, group, part, n_groups, n_elements, n_programs,
            sizes, pred_strides, target_strides, ref_strides, mask_strides, base_strides,
            anchor_strides,
            FROM, FROM + 8 if FROM + 8 < MEMBERS else MEMBERS, MEMBERS, KINDS, COUNTS,
            PRED, TARGET, REF if PAIRED else None, MASK, BASE, ANCHOR, DRIFT, MIXED, CROSS,
            HUBER, VECTOR, WIDE, BLOCK,
        )  # fmt: skip
    parts = n_groups * n_programs
    if tl.atomic_add(ticket, 1, sem="acq_rel") == parts - 1:
        _finish(
            loss, stats, partials, ref, lengths, values, tensors, strides,
            n_groups, n_elements, n_programs, ref_strides, group_scale,
            LINK, FIRST, SCORE, SHAPE, N_SCORE, N_HYPER, N_LINK, SFT_WEIGHT, SWAP, GUARD, WEIGHTED,
            HEATED, REDUCE, MEAN, MEMBERS, LISTED, KINDS, COUNTS, DRIFT, CROSS,
            1 + DRIFT + (ANCHOR is not None), REF, REF_ERRORS, HUBER, GROUPS, PARTS,
        )  # fmt: skip
        tl.store(ticket, 0)


@triton.jit
def _slope(diff, scale, weight, c, HUBER: tl.constexpr):
    """The gradient of one element; 0 by a factor of 0, whatever the element."""
    value = tl.where(scale == 0.0, 0.0, scale * diff)
    if HUBER:
        value = _over(value, tl.sqrt(diff * diff + c * c))
    return _weighted(value, weight)


@triton.jit(do_not_specialize=[*_COUNTS, "grad_stride", "first_factor"])
def pair_bwd(
    pred, target, ref, mask, base, anchor, grad, grad_loss, stats,
    huber, affine, grad_stride, first_factor, n_groups, n_elements, n_programs,
    sizes, pred_strides, target_strides, ref_strides, mask_strides, base_strides, anchor_strides,
    grad_strides,
    MEMBERS: tl.constexpr, PRED: tl.constexpr, TARGET: tl.constexpr, REF: tl.constexpr,
    MASK: tl.constexpr, BASE: tl.constexpr, ANCHOR: tl.constexpr,
    NEEDED: tl.constexpr, EACH: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
    REVERSED: tl.constexpr,
):  # fmt: skip
    """grad = grad_loss * sum over directions of factor * direction, in one launch.

    NEEDED: a bit for each member; others are neither read nor written, and have any pointer for
    their grad, since None is more than Triton 3.6 takes. ref and anchor are there if they are
    directions. grad_stride: 1 for one grad_loss a group. EACH: one for each of its members,
    (MEMBERS, n_groups). first_factor: the row of stats where the factors begin.
    REVERSED: from the last block to the first; the last are what forward left in the L2 cache.
    """
    HUBER: tl.constexpr = len(huber) > 0
    group = tl.program_id(0) // n_programs
    part = tl.program_id(0) % n_programs
    preds = _starts(pred, pred_strides, group, n_groups, n_elements, MEMBERS, PRED)
    targets = _starts(target, target_strides, group, n_groups, n_elements, MEMBERS, TARGET)
    refs = _starts(ref, ref_strides, group, n_groups, n_elements, MEMBERS, REF)
    masks = _starts(mask, mask_strides, group, n_groups, n_elements, MEMBERS, MASK)
    bases = _starts(base, base_strides, group, n_groups, n_elements, MEMBERS, BASE)
    anchors = _starts(anchor, anchor_strides, group, n_groups, n_elements, MEMBERS, ANCHOR)
    scales = ()
    for i in tl.static_range(MEMBERS * (1 + (REF is not None) + (ANCHOR is not None))):
        scales = scales + (tl.load(stats + (first_factor + i) * n_groups + group),)  # noqa: RUF005
    hubers = _hubers(huber, group, MEMBERS)
    lane = tl.arange(0, BLOCK)
    last = (n_elements - 1) // BLOCK  # n + BLOCK may overflow
    for round in range(part, last + 1, n_programs):
        block = last - round if REVERSED else round
        start = tl.full([], block, tl.int64 if WIDE else tl.int32) * BLOCK
        inside = start + lane < n_elements
        # All loads before the first store, so that the memory answers them together. That of
        # grad_loss is among them because the factors, else, would be waited for before the loop.
        AGAIN: tl.constexpr = TARGET != "shared" or BASE is not None
        ways = ()  # pred - target of each member
        weights = ()
        pulls = ()
        goal = None
        weight = None
        for m in tl.static_range(MEMBERS):
            if m == 0 or (AGAIN and (NEEDED >> m) % 2 == 1):
                goal = _load(targets[m], start, lane, inside, sizes, _own(target_strides, m))
                if BASE is not None:
                    x = _load(bases[m], start, lane, inside, sizes, _own(base_strides, m))
                    goal = _affine_target(goal, x, affine, group, n_groups, m, MEMBERS)
            if MASK is not None and (m == 0 or MASK != "shared"):
                weight = _load(masks[m], start, lane, inside, sizes, _own(mask_strides, m))
            if MASK is not None:
                weights = weights + (weight,)  # noqa: RUF005
            way = scales[m]  # whatever, where no gradient is needed
            of_others = ()
            if (NEEDED >> m) % 2 == 1:
                if m == 0 or PRED != "shared":
                    pred_m = _load(preds[m], start, lane, inside, sizes, _own(pred_strides, m))
                way = pred_m - goal
                if REF is not None:
                    r = _load(refs[m], start, lane, inside, sizes, _own(ref_strides, m))
                    of_others = of_others + (pred_m - r,)  # noqa: RUF005
                if ANCHOR is not None:
                    a = _load(anchors[m], start, lane, inside, sizes, _own(anchor_strides, m))
                    of_others = of_others + (pred_m - a,)  # noqa: RUF005
            ways = ways + (way,)  # noqa: RUF005
            pulls = pulls + (of_others,)  # noqa: RUF005
        scale = tl.load(grad_loss + group * grad_stride).to(tl.float32)
        total = None
        for m in tl.static_range(MEMBERS):
            if (NEEDED >> m) % 2 == 1:
                if EACH:
                    scale = tl.load(grad_loss + group + m * n_groups).to(tl.float32)
                weight = weights[m] if MASK is not None else None
                value = _slope(ways[m], scale * scales[m], weight, hubers[m], HUBER)
                for d in tl.static_range(len(pulls[m])):
                    factor = scale * scales[(1 + d) * MEMBERS + m]
                    value += _slope(pulls[m][d], factor, weight, 0.0, False)
                if PRED == "shared":
                    total = value if total is None else total + value
                    value = total
                if PRED != "shared" or m == MEMBERS - 1:
                    strides = _own(grad_strides, m)
                    stride = n_elements if len(strides) == 0 else strides[0]
                    row = _row(group, n_groups, m, MEMBERS, PRED).to(tl.int64) * stride
                    _store(_own(grad, m) + row, start, lane, inside, sizes, strides, value)
