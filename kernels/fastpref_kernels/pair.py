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
    plus    |r - t + c (p - r)|        minus   |r - t - c (p - r)|        c: scalar number MIX
    anchor  (p - a)^2
    count   elements that the mask does not hide
and the group, with two members, cross = (p_w - t_w) (p_l - t_l), which both masks weigh, over the
second's count.
"""
# mypy: disable-error-code="no-untyped-def, assignment, misc, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl

from .elements import (
    affine_of,
    affine_target,
    gaps,
    hubers_of,
    load,
    own,
    row_of,
    scalar_of,
    slope_of,
    squares,
    starts,
    store,
    together,
    weighted,
)
from .over import finish


@triton.jit
def _add_up(
    preds, targets, refs, masks, bases, anchors, hubers, affines, mix,
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
                goal = load(targets[m], start, lane, inside, sizes, own(target_strides, m))
                if BASE is not None:
                    x = load(bases[m], start, lane, inside, sizes, own(base_strides, m))
                    goal = affine_target(goal, x, affines[m][0], affines[m][1])
                    goal = tl.where(inside, goal, 0.0)
            if MASK is not None and (m == FROM or MASK != "shared"):
                weight = load(masks[m], start, lane, inside, sizes, own(mask_strides, m))
                if COUNTED > 0:
                    counts = counts + (together(weight, VECTOR),)  # noqa: RUF005
            if m == FROM or PRED != "shared":
                pred_m = load(preds[m], start, lane, inside, sizes, own(pred_strides, m))
            diff = pred_m - goal
            value = squares(diff, weight, hubers[m], HUBER)
            added = added + (together(value, VECTOR),)  # noqa: RUF005
            if REF is not None:
                if m == FROM or REF != "shared":
                    ref_m = load(refs[m], start, lane, inside, sizes, own(ref_strides, m))
                off = ref_m - goal
                value = gaps(pred_m, ref_m, diff, goal, weight, hubers[m], HUBER)
                added = added + (together(value, VECTOR),)  # noqa: RUF005
                value = squares(off, weight, hubers[m], HUBER)
                added = added + (together(value, VECTOR),)  # noqa: RUF005
                moved = pred_m - ref_m
                if DRIFT:
                    value = squares(moved, weight, 0.0, False)
                    added = added + (together(value, VECTOR),)  # noqa: RUF005
                if MIXED:
                    value = weighted(tl.abs(off + mix * moved), weight)
                    added = added + (together(value, VECTOR),)  # noqa: RUF005
                    value = weighted(tl.abs(off - mix * moved), weight)
                    added = added + (together(value, VECTOR),)  # noqa: RUF005
            if ANCHOR is not None:
                a = load(anchors[m], start, lane, inside, sizes, own(anchor_strides, m))
                value = squares(pred_m - a, weight, 0.0, False)
                added = added + (together(value, VECTOR),)  # noqa: RUF005
            if CROSS and m == FROM:
                first = diff
                if MASK is not None:
                    first_weight = weight
        added = added + counts
        if CROSS:
            value = weighted(first * diff, weight)
            if MASK is not None and MASK != "shared":
                value = weighted(value, first_weight)
            added = added + (together(value, VECTOR),)  # noqa: RUF005
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


@triton.jit(do_not_specialize=_COUNTS)
def pair_fwd(
    pred, target, ref, mask, base, anchor,
    loss, stats, partials, ticket, lengths, values, tensors, strides, huber, affine,
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
    DRIFT: tl.constexpr, MIX: tl.constexpr, CROSS: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """loss, stats = link(sums of the members) in one launch that reads every element once.

    Program (group, part) adds up every n_programs-th block of its group into partials
    (sum, n_groups, n_programs) and takes a ticket. Whoever draws the last ticket sees all partials,
    finishes, and leaves `ticket` at 0 for the next launch.
    stats (rows, n_groups): each sum of each member, kind by kind, without count; cross; the scores;
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
    MIXED: tl.constexpr = MIX is not None
    KINDS: tl.constexpr = 1 + 2 * PAIRED + DRIFT + 2 * MIXED + (ANCHOR is not None)
    COUNTS: tl.constexpr = (
        0 if MASK is None or not MEAN else (1 if MASK == "shared" else MEMBERS)
    )  # fmt: skip
    group = tl.program_id(0) // n_programs
    part = tl.program_id(0) % n_programs
    preds = starts(pred, pred_strides, group, n_groups, n_elements, MEMBERS, PRED)
    targets = starts(target, target_strides, group, n_groups, n_elements, MEMBERS, TARGET)
    refs = starts(ref, ref_strides, group, n_groups, n_elements, MEMBERS, REF if PAIRED else None)
    masks = starts(mask, mask_strides, group, n_groups, n_elements, MEMBERS, MASK)
    bases = starts(base, base_strides, group, n_groups, n_elements, MEMBERS, BASE)
    anchors = starts(anchor, anchor_strides, group, n_groups, n_elements, MEMBERS, ANCHOR)
    hubers = hubers_of(huber, group, MEMBERS)
    affines = affine_of(affine, group, MEMBERS)
    mix = 0.0
    if MIXED:
        mix = scalar_of(values[MIX], tensors[MIX], strides[MIX], group, True)
    # Sums of more than eight members at a time take more registers than a thread has.
    for FROM in tl.static_range(0, MEMBERS, 8):
        _add_up(
            preds, targets, refs, masks, bases, anchors, hubers, affines, mix,
            partials, group, part, n_groups, n_elements, n_programs,
            sizes, pred_strides, target_strides, ref_strides, mask_strides, base_strides,
            anchor_strides,
            FROM, FROM + 8 if FROM + 8 < MEMBERS else MEMBERS, MEMBERS, KINDS, COUNTS,
            PRED, TARGET, REF if PAIRED else None, MASK, BASE, ANCHOR, DRIFT, MIXED, CROSS,
            HUBER, VECTOR, WIDE, BLOCK,
        )  # fmt: skip
    parts = n_groups * n_programs
    if tl.atomic_add(ticket, 1, sem="acq_rel") == parts - 1:
        finish(
            loss, stats, partials, ref, lengths, values, tensors, strides,
            n_groups, n_elements, n_programs, ref_strides, group_scale,
            LINK, FIRST, SCORE, SHAPE, N_SCORE, N_HYPER, N_LINK, SFT_WEIGHT, SWAP, GUARD, WEIGHTED,
            HEATED, REDUCE, MEAN, MEMBERS, LISTED, KINDS, COUNTS, DRIFT, CROSS,
            1 + DRIFT + (ANCHOR is not None), REF, REF_ERRORS, HUBER, GROUPS, PARTS,
        )  # fmt: skip
        tl.store(ticket, 0)


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
    preds = starts(pred, pred_strides, group, n_groups, n_elements, MEMBERS, PRED)
    targets = starts(target, target_strides, group, n_groups, n_elements, MEMBERS, TARGET)
    refs = starts(ref, ref_strides, group, n_groups, n_elements, MEMBERS, REF)
    masks = starts(mask, mask_strides, group, n_groups, n_elements, MEMBERS, MASK)
    bases = starts(base, base_strides, group, n_groups, n_elements, MEMBERS, BASE)
    anchors = starts(anchor, anchor_strides, group, n_groups, n_elements, MEMBERS, ANCHOR)
    scales = ()
    for i in tl.static_range(MEMBERS * (1 + (REF is not None) + (ANCHOR is not None))):
        scales = scales + (tl.load(stats + (first_factor + i) * n_groups + group),)  # noqa: RUF005
    hubers = hubers_of(huber, group, MEMBERS)
    affines = affine_of(affine, group, MEMBERS)
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
                goal = load(targets[m], start, lane, inside, sizes, own(target_strides, m))
                if BASE is not None:
                    x = load(bases[m], start, lane, inside, sizes, own(base_strides, m))
                    goal = affine_target(goal, x, affines[m][0], affines[m][1])
            if MASK is not None and (m == 0 or MASK != "shared"):
                weight = load(masks[m], start, lane, inside, sizes, own(mask_strides, m))
            if MASK is not None:
                weights = weights + (weight,)  # noqa: RUF005
            way = scales[m]  # whatever, where no gradient is needed
            of_others = ()
            if (NEEDED >> m) % 2 == 1:
                if m == 0 or PRED != "shared":
                    pred_m = load(preds[m], start, lane, inside, sizes, own(pred_strides, m))
                way = pred_m - goal
                if REF is not None:
                    r = load(refs[m], start, lane, inside, sizes, own(ref_strides, m))
                    of_others = of_others + (pred_m - r,)  # noqa: RUF005
                if ANCHOR is not None:
                    a = load(anchors[m], start, lane, inside, sizes, own(anchor_strides, m))
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
                value = slope_of(ways[m], scale * scales[m], weight, hubers[m], HUBER)
                for d in tl.static_range(len(pulls[m])):
                    factor = scale * scales[(1 + d) * MEMBERS + m]
                    value += slope_of(pulls[m][d], factor, weight, 0.0, False)
                if PRED == "shared":
                    total = value if total is None else total + value
                    value = total
                if PRED != "shared" or m == MEMBERS - 1:
                    strides = own(grad_strides, m)
                    stride = n_elements if len(strides) == 0 else strides[0]
                    row = row_of(group, n_groups, m, MEMBERS, PRED).to(tl.int64) * stride
                    store(own(grad, m) + row, start, lane, inside, sizes, strides, value)
