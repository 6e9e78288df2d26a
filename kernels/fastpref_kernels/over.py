"""What a link ranges over: from partial sums to losses, slopes and scores of pairs, samples and
lists, and what a loss takes from the whole batch."""
# mypy: disable-error-code="no-untyped-def, assignment, misc, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl

from .elements import own, row_of, scalar_of
from .knobs import log_mean, pair_losses_jit, safeguard
from .special import expm1, times


@triton.jit
def _mean(total, size, EXACT: tl.constexpr = False):
    """total / size, and 0 of a sample that is masked whole. A GPU's plain / is 2 ulp off, which
    MaPO's margin shows a thousandfold; exact division may cost stack, and so is for errors only."""
    hidden = size == 0.0
    size = tl.where(hidden, 1.0, size)
    return tl.where(hidden, 0.0, tl.div_rn(total, size) if EXACT else total / size)


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
def _group_sums(
    partials, ref, ref_strides, group, n_groups, n_elements, n_programs,
    MEMBERS: tl.constexpr, KINDS: tl.constexpr, COUNTS: tl.constexpr, CROSS: tl.constexpr,
    MEAN: tl.constexpr, REF: tl.constexpr, REF_ERRORS: tl.constexpr, SWAP: tl.constexpr,
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
            row = row_of(group, n_groups, m, MEMBERS, REF)
            of_ref = scalar_of(0.0, own(ref, m), own(ref_strides, m)[0], row, inside)
            each = (err, err - of_ref, of_ref)
        for kind in tl.static_range(1, KINDS):
            each = each + (_mean(totals[m * KINDS + kind], size),)  # noqa: RUF005
        members = members + (each,)  # noqa: RUF005
    cross = sizes[0]
    if CROSS:
        cross = _mean(totals[TOTAL - 1], sizes[0 if SWAP else MEMBERS - 1])  # over the loser's
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
def _scalars(
    values, tensors, strides, group, n_groups, FIRST: tl.constexpr, LAST: tl.constexpr
):  # fmt: skip
    found = ()
    for i in tl.static_range(FIRST, LAST):
        scalar = scalar_of(values[i], tensors[i], strides[i], group, group < n_groups)
        found = found + (scalar,)  # noqa: RUF005
    return found


@triton.jit
def _guard(
    of_batch, err_w, cross, values, tensors, strides, group, n_groups,
    AT: tl.constexpr, GUARD: tl.constexpr,
):  # fmt: skip
    """What the loser's gradient is multiplied by."""
    if GUARD == "batch":
        return of_batch
    else:
        (number,) = _scalars(values, tensors, strides, group, n_groups, AT, AT + 1)
        return safeguard(err_w, cross, number) if GUARD == "pair" else number


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
            guard = _guard(guard, err_w, cross, values, tensors, strides, group, n_groups, N_LINK,
                           GUARD)  # fmt: skip
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
        return value, (of_l, of_w) if SWAP else (of_w, of_l), (score,)
    else:
        scalars = _scalars(values, tensors, strides, group, n_groups, 0, N_LINK)
        value, slopes, scores = LINK(sums, cross, scalars, batch)
        if GUARD is not None:
            guard = _guard(guard, sums[0][0], cross, values, tensors, strides, group, n_groups,
                           N_LINK, GUARD)  # fmt: skip
            of_loser = ()
            for d in tl.static_range(len(slopes[1])):
                of_loser = of_loser + (times(guard, slopes[1][d]),)  # noqa: RUF005
            slopes = (slopes[0], of_loser)
        if WEIGHTED:
            LAST: tl.constexpr = N_LINK + (GUARD is not None)
            (weight,) = _scalars(values, tensors, strides, group, n_groups, LAST, LAST + 1)
            value = times(weight, value)
            weighted = ()
            for m in tl.static_range(MEMBERS):
                each = ()
                for d in tl.static_range(len(slopes[m])):
                    each = each + (times(weight, slopes[m][d]),)  # noqa: RUF005
                weighted = weighted + (each,)  # noqa: RUF005
            slopes = weighted
        return value, slopes, scores


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
    value, slopes, scores = LINK(sums, of_members, member, numbers, active)
    if WEIGHTED:
        (weight,) = _scalars(values, tensors, strides, group, n_groups, N_LINK, N_LINK + 1)
        value = times(weight, value)
        weighted = ()
        for d in tl.static_range(len(slopes)):
            weighted = weighted + (times((none + weight)[:, None], slopes[d]),)  # noqa: RUF005
        slopes = weighted
    return value, slopes, scores, active


@triton.jit
def _below(value, highest):
    """The difference, 0 where both are infinite."""
    return tl.where(value == highest, 0.0, value - highest)


@triton.jit
def _linked(
    group, batch, guard,
    partials, ref, lengths, values, tensors, strides, n_groups, n_elements, n_programs, ref_strides,
    LINK: tl.constexpr, SCORE: tl.constexpr, SHAPE: tl.constexpr, N_SCORE: tl.constexpr,
    N_HYPER: tl.constexpr, N_LINK: tl.constexpr, SFT_WEIGHT: tl.constexpr, SWAP: tl.constexpr,
    GUARD: tl.constexpr, WEIGHTED: tl.constexpr, MEAN: tl.constexpr, MEMBERS: tl.constexpr,
    LISTED: tl.constexpr, KINDS: tl.constexpr, COUNTS: tl.constexpr, DRIFT: tl.constexpr,
    CROSS: tl.constexpr, REF: tl.constexpr, REF_ERRORS: tl.constexpr, GROUPS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """(sums, sizes, cross, losses, slopes, scores) of some groups, from their partial sums."""
    if LISTED:
        sums, sizes = _list_sums(
            partials, ref, ref_strides, group, n_groups, n_elements, n_programs,
            MEMBERS, LISTED, KINDS, COUNTS, MEAN, REF_ERRORS, GROUPS, PARTS,
        )  # fmt: skip
        value, slopes, scores, active = _list_losses(
            sums, lengths, values, tensors, strides, group, n_groups,
            LINK, N_LINK, WEIGHTED, MEMBERS, LISTED, GROUPS,
        )  # fmt: skip
        return sums, tl.where(active, sizes, 0.0), 0.0, value, slopes, scores
    else:
        sums, sizes, cross = _group_sums(
            partials, ref, ref_strides, group, n_groups, n_elements, n_programs,
            MEMBERS, KINDS, COUNTS, CROSS, MEAN, REF, REF_ERRORS, SWAP, GROUPS, PARTS,
        )  # fmt: skip
        value, slopes, scores = _losses(
            sums, cross, batch, guard, values, tensors, strides, group, n_groups,
            LINK, SCORE, SHAPE, N_SCORE, N_HYPER, N_LINK, SFT_WEIGHT, SWAP, GUARD, DRIFT,
            WEIGHTED, REF, MEMBERS,
        )  # fmt: skip
        return sums, sizes, cross, value, slopes, scores


@triton.jit
def finish(
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
    makes of a group, the safeguard's sums, or, HEATED, the log-mean-exp of the losses."""
    batch = 0.0
    if FIRST is not None:
        total = tl.zeros([GROUPS], tl.float32)
        for first in range(0, n_groups, GROUPS):
            group = first + tl.arange(0, GROUPS)
            sums, _, _ = _group_sums(
                partials, ref, ref_strides, group, n_groups, n_elements, n_programs,
                MEMBERS, KINDS, COUNTS, CROSS, MEAN, REF, REF_ERRORS, SWAP, GROUPS, PARTS,
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
                MEMBERS, KINDS, COUNTS, CROSS, MEAN, REF, REF_ERRORS, SWAP, GROUPS, PARTS,
            )  # fmt: skip
            counted = group < n_groups
            AT: tl.constexpr = N_HYPER + 2 if LINK is None else N_LINK + 1  # of pair_weight
            if WEIGHTED or (LINK is None and N_LINK > N_HYPER):
                (weight,) = _scalars(values, tensors, strides, group, n_groups, AT, AT + 1)
                counted = counted & (weight != 0.0)
            of_winners += tl.where(counted, sums[1 if SWAP else 0][0], 0.0)
            of_both += tl.where(counted, cross, 0.0)
        one = tl.full([], 0, tl.int32)  # all groups have the same number
        (number,) = _scalars(values, tensors, strides, one, n_groups, N_LINK, N_LINK + 1)
        guard = safeguard(tl.sum(of_winners, axis=0), tl.sum(of_both, axis=0), number)
    heat, highest, of_all, excess_of_all = 1.0, 0.0, 1.0, 0.0
    if HEATED:
        LAST: tl.constexpr = len(values) - 1
        one = tl.full([], 0, tl.int32)
        (number,) = _scalars(values, tensors, strides, one, n_groups, LAST, LAST + 1)
        heat = number
        high = tl.full([GROUPS], float("-inf"), tl.float32)
        for first in range(0, n_groups, GROUPS):
            group = first + tl.arange(0, GROUPS)
            _, _, _, value, _, _ = _linked(
                group, batch, guard,
                partials, ref, lengths, values, tensors, strides, n_groups, n_elements, n_programs,
                ref_strides, LINK, SCORE, SHAPE, N_SCORE, N_HYPER, N_LINK, SFT_WEIGHT, SWAP, GUARD,
                WEIGHTED, MEAN, MEMBERS, LISTED, KINDS, COUNTS, DRIFT, CROSS, REF, REF_ERRORS,
                GROUPS, PARTS,
            )  # fmt: skip
            value = tl.where(group < n_groups, value / heat, float("-inf"))
            high = tl.where((value <= high) | (high != high), high, value)  # NaN stays NaN
        of_nan = tl.sum(tl.where(high != high, 1.0, 0.0), axis=0)
        highest = tl.where(of_nan > 0.0, float("nan"), tl.max(high, axis=0))
        total = tl.zeros([GROUPS], tl.float32)
        excess = tl.zeros([GROUPS], tl.float32)
        for first in range(0, n_groups, GROUPS):
            group = first + tl.arange(0, GROUPS)
            _, _, _, value, _, _ = _linked(
                group, batch, guard,
                partials, ref, lengths, values, tensors, strides, n_groups, n_elements, n_programs,
                ref_strides, LINK, SCORE, SHAPE, N_SCORE, N_HYPER, N_LINK, SFT_WEIGHT, SWAP, GUARD,
                WEIGHTED, MEAN, MEMBERS, LISTED, KINDS, COUNTS, DRIFT, CROSS, REF, REF_ERRORS,
                GROUPS, PARTS,
            )  # fmt: skip
            value = _below(value / heat, highest)
            total += tl.where(group < n_groups, tl.exp(value), 0.0)
            excess += tl.where(group < n_groups, expm1(value), 0.0)
        of_all = tl.sum(total, axis=0)
        excess_of_all = tl.sum(excess, axis=0) / n_groups
    total = tl.zeros([GROUPS], tl.float32)
    for first in range(0, n_groups, GROUPS):
        group = first + tl.arange(0, GROUPS)
        inside = group < n_groups
        sums, sizes, cross, value, slopes, scores = _linked(
            group, batch, guard,
            partials, ref, lengths, values, tensors, strides, n_groups, n_elements, n_programs,
            ref_strides, LINK, SCORE, SHAPE, N_SCORE, N_HYPER, N_LINK, SFT_WEIGHT, SWAP, GUARD,
            WEIGHTED, MEAN, MEMBERS, LISTED, KINDS, COUNTS, DRIFT, CROSS, REF, REF_ERRORS,
                GROUPS, PARTS,
        )  # fmt: skip
        share = group_scale
        if HEATED:
            share = tl.exp(_below(value / heat, highest)) / of_all
        rows = stats + group
        if LISTED:
            member = tl.arange(0, LISTED)[None, :]
            there = inside[:, None] & (member < MEMBERS)
            rows = rows[:, None] + member * n_groups
            for kind in tl.static_range(len(sums)):
                tl.store(rows, sums[kind], mask=there)
                rows += MEMBERS * n_groups
            for i in tl.static_range(len(scores)):
                row = stats + group + (len(sums) * MEMBERS + i) * n_groups
                tl.store(row, scores[i], mask=inside)
            rows += len(scores) * n_groups
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
            for i in tl.static_range(len(scores)):
                if i > 0:
                    rows += n_groups
                tl.store(rows, scores[i], mask=inside)
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
        tl.store(loss, heat * (highest + log_mean(excess_of_all, of_all / n_groups)))
    elif REDUCE:
        tl.store(loss, tl.sum(total, axis=0) * group_scale)
