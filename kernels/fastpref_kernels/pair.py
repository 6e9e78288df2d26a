"""The jit kernels of every loss: forward (errors -> link -> loss) and backward (gradient). They
know no loss by name.

Both work on winner and loser of a pair together, so that what they share is read once. A row is one
sample. `..._w` and `..._l` point to winners and losers, which may be one tensor; its FORM says
which rows are whose. `..._strides` are (row stride, *inner strides) of winners and of losers, for
the inner sizes `sizes`, which is empty where all rows are dense in one order; no strides at all are
those of a contiguous tensor.
"""
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from .knobs import pair_losses_jit


@triton.jit
def _row_w(pair, n_pairs, FORM: tl.constexpr):
    """The row of a pair's winner. FORM: "stacked" (winners first), "swapped" (losers first),
    "halves" (a tensor each), "shared" (one row for both)."""
    return pair + n_pairs if FORM == "swapped" else pair


@triton.jit
def _row_l(pair, n_pairs, FORM: tl.constexpr):
    return pair + n_pairs if FORM == "stacked" else pair


@triton.jit
def _start(pointer, row, strides, n_elements):
    """Pointer to the first element of a row."""
    return pointer + row.to(tl.int64) * (n_elements if len(strides) == 0 else strides[0])


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
def _scalar(value, tensor, stride, pair, inside):
    """A scalar of some pairs in fp32: what `tensor` holds on the device, for each pair where its
    stride is not 0, or else `value`."""
    if tensor is None:
        return tl.full([], value, tl.float32)
    else:
        pointers = tensor + pair.to(tl.int64) * stride
        return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _huber(huber):
    """The constant c of pseudo-Huber errors, from (value,) or (0.0, 0-d tensor); None instead of
    the tensor is more than the jit of Triton 3.6 takes."""
    if len(huber) == 1:
        return tl.full([], huber[0], tl.float32)
    else:
        return tl.load(huber[1]).to(tl.float32)


@triton.jit
def _squares(diff, weight, c, HUBER: tl.constexpr):
    """Each element's part of the error: its square, or sqrt(diff^2 + c^2) - c."""
    value = diff * diff
    if HUBER:
        value = value / (tl.sqrt(value + c * c) + c)
    return value if weight is None else tl.where(weight == 0.0, 0.0, weight * value)


@triton.jit
def _gaps(pred, ref, diff, goal, weight, c, HUBER: tl.constexpr):
    """Each element's part of the error less that of the reference, as (p - r)(p + r - 2 goal): no
    difference of two large numbers."""
    diff_ref = ref - goal
    value = (pred - ref) * (diff + diff_ref)
    if HUBER:
        value = value / (tl.sqrt(diff * diff + c * c) + tl.sqrt(diff_ref * diff_ref + c * c))
    return value if weight is None else tl.where(weight == 0.0, 0.0, weight * value)


@triton.jit
def _together(values, VECTOR: tl.constexpr):
    """Sums of neighbours in one thread: accumulators of all elements would cost a register each."""
    return tl.sum(tl.reshape(values, [values.shape[0] // VECTOR, VECTOR]), axis=1)


@triton.jit
def _sums(
    partials, pair, n_pairs, n_programs,
    FIRST: tl.constexpr, KINDS: tl.constexpr, PAIRS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The sums of some pairs of each kind from FIRST on, in an order that does not depend on who
    came first. All kinds are read before any is added: a wait for the memory costs more than all
    else here. More than four at a time take more registers than are left."""
    totals = ()
    for _ in tl.static_range(KINDS):
        totals = totals + (tl.zeros([PAIRS, PARTS], tl.float32),)  # noqa: RUF005
    for first in range(0, n_programs, PARTS):
        part = first + tl.arange(0, PARTS)
        inside = (pair < n_pairs)[:, None] & (part < n_programs)[None, :]
        row = (FIRST * n_pairs + pair) * n_programs
        pointers = partials + (row[:, None] + part[None, :])
        more = ()
        for kind in tl.static_range(KINDS):
            # .cg: other programs wrote these during this launch; this processor's L1 may be stale
            read = tl.load(pointers, mask=inside, other=0.0, cache_modifier=".cg")
            more = more + (totals[kind] + read,)  # noqa: RUF005
            pointers += n_pairs * n_programs
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
def _finish(
    loss, stats, partials, ref_w, ref_l, values, tensors, strides, n_pairs, n_elements, n_programs,
    ref_strides, pair_scale,
    SCORE: tl.constexpr, SHAPE: tl.constexpr, N_SCORE: tl.constexpr, N_HYPER: tl.constexpr,
    SFT_WEIGHT: tl.constexpr, REDUCE: tl.constexpr, MEAN: tl.constexpr, REF: tl.constexpr,
    REF_ERRORS: tl.constexpr, MASK: tl.constexpr, HUBER: tl.constexpr,
    PAIRS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Errors -> link -> loss for all pairs, by the one program that arrived last."""
    COUNTS: tl.constexpr = 0 if MASK is None or not MEAN else (1 if MASK == "shared" else 2)
    GAPS: tl.constexpr = 2 + COUNTS
    total = tl.zeros([PAIRS], tl.float32)
    for first in range(0, n_pairs, PAIRS):
        pair = first + tl.arange(0, PAIRS)
        inside = pair < n_pairs
        sums = _sums(partials, pair, n_pairs, n_programs, 0, GAPS, PAIRS, PARTS)
        size_w = tl.zeros([PAIRS], tl.float32) + n_elements
        size_l = size_w
        if not MEAN:
            size_w = tl.full([PAIRS], 1.0, tl.float32)
            size_l = size_w
        elif MASK is not None:
            size_w = sums[2]
            size_l = sums[GAPS - 1]
        err_w, err_l = _mean(sums[0], size_w, True), _mean(sums[1], size_l, True)
        gap_w, gap_l = err_w, err_l
        if REF is not None:
            if REF_ERRORS:
                row_w, row_l = _row_w(pair, n_pairs, REF), _row_l(pair, n_pairs, REF)
                of_ref_w = _scalar(0.0, ref_w, ref_strides[0][0], row_w, inside)
                of_ref_l = _scalar(0.0, ref_l, ref_strides[1][0], row_l, inside)
                gap_w -= of_ref_w
                gap_l -= of_ref_l
            else:
                sums = _sums(partials, pair, n_pairs, n_programs, GAPS, 4, PAIRS, PARTS)
                gap_w, gap_l = _mean(sums[0], size_w), _mean(sums[1], size_l)
                of_ref_w, of_ref_l = _mean(sums[2], size_w), _mean(sums[3], size_l)
            tl.store(stats + (5 * n_pairs + pair), of_ref_w, mask=inside)
            tl.store(stats + (6 * n_pairs + pair), of_ref_l, mask=inside)
            tl.store(stats + (7 * n_pairs + pair), gap_w, mask=inside)
            tl.store(stats + (8 * n_pairs + pair), gap_l, mask=inside)
        of_score, of_shape, knobs = (), (), ()
        for i in tl.static_range(len(values)):
            scalar = _scalar(values[i], tensors[i], strides[i], pair, inside)
            if i < N_SCORE:
                of_score = of_score + (scalar,)  # noqa: RUF005 (the jit knows no unpacking)
            elif i < N_HYPER:
                of_shape = of_shape + (scalar,)  # noqa: RUF005
            else:
                knobs = knobs + (scalar,)  # noqa: RUF005
        value, slope_w, slope_l, margin = pair_losses_jit(
            err_w, err_l, gap_w, gap_l, of_score, of_shape, knobs, SCORE, SHAPE, SFT_WEIGHT
        )
        # of d err / d pred = 2 / size * (pred - target), all but the difference
        scale = pair_scale if HUBER else 2.0 * pair_scale
        slope_w, slope_l = _mean(slope_w * scale, size_w), _mean(slope_l * scale, size_l)
        tl.store(stats + pair, err_w, mask=inside)
        tl.store(stats + (n_pairs + pair), err_l, mask=inside)
        tl.store(stats + (2 * n_pairs + pair), margin, mask=inside)
        tl.store(stats + (3 * n_pairs + pair), slope_w, mask=inside)
        tl.store(stats + (4 * n_pairs + pair), slope_l, mask=inside)
        if REDUCE:
            total += tl.where(inside, value, 0.0)
        else:
            tl.store(loss + pair, value, mask=inside)
    if REDUCE:
        tl.store(loss, tl.sum(total, axis=0) * pair_scale)


# The jit would compile once more for each of these that happens to be 1 or a multiple of 16. For
# n_elements and strides it may: knowing that is what makes loads and stores 16 bytes wide.
_COUNTS = ["n_pairs", "n_programs"]


@triton.jit(do_not_specialize=_COUNTS)
def pair_fwd(
    pred_w, pred_l, target_w, target_l, ref_w, ref_l, mask_w, mask_l,
    loss, stats, partials, ticket, values, tensors, strides, huber,
    n_pairs, n_elements, n_programs,
    sizes, pred_strides, target_strides, ref_strides, mask_strides, pair_scale,
    SCORE: tl.constexpr, SHAPE: tl.constexpr, N_SCORE: tl.constexpr, N_HYPER: tl.constexpr,
    SFT_WEIGHT: tl.constexpr, REDUCE: tl.constexpr, MEAN: tl.constexpr,
    PRED: tl.constexpr, TARGET: tl.constexpr, REF: tl.constexpr, REF_ERRORS: tl.constexpr,
    MASK: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
    PAIRS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """loss, stats = link(mean((pred - target)^2)) in one launch that reads every element once.

    Program (pair, part) adds up every n_programs-th block of its pair into partials
    (kind, n_pairs, n_programs) and takes a ticket. Whoever draws the last ticket sees all partials,
    finishes, and leaves `ticket` at 0 for the next launch.
    stats (5 or 9, n_pairs): err_w, err_l, margin, the factors of the gradient (w, l), and with a
    reference its errors (w, l) and the gaps (w, l).
    loss: () or, unless REDUCE, (n_pairs,). pair_scale: 1 / n_pairs for a mean over pairs, else 1.
    values, tensors, strides: of the scalars, hyper-parameters and then knobs.
    """
    HUBER: tl.constexpr = len(huber) > 0
    # what a thread loads at once of the widest operand: `launch._threads` has as many as that takes
    PRED_BITS: tl.constexpr = pred_w.dtype.element_ty.primitive_bitwidth
    TARGET_BITS: tl.constexpr = target_w.dtype.element_ty.primitive_bitwidth
    NARROW: tl.constexpr = PRED_BITS < 32 and TARGET_BITS < 32
    VECTOR: tl.constexpr = 8 if NARROW else 4
    PAIRED: tl.constexpr = REF is not None and not REF_ERRORS  # a reference of as many elements
    pair = tl.program_id(0) // n_programs
    part = tl.program_id(0) % n_programs
    row_pred_w = _start(pred_w, _row_w(pair, n_pairs, PRED), pred_strides[0], n_elements)
    row_pred_l = _start(pred_l, _row_l(pair, n_pairs, PRED), pred_strides[1], n_elements)
    row_target_w = _start(target_w, _row_w(pair, n_pairs, TARGET), target_strides[0], n_elements)
    row_target_l = _start(target_l, _row_l(pair, n_pairs, TARGET), target_strides[1], n_elements)
    if PAIRED:
        row_ref_w = _start(ref_w, _row_w(pair, n_pairs, REF), ref_strides[0], n_elements)
        row_ref_l = _start(ref_l, _row_l(pair, n_pairs, REF), ref_strides[1], n_elements)
    if MASK is not None:
        row_mask_w = _start(mask_w, _row_w(pair, n_pairs, MASK), mask_strides[0], n_elements)
        row_mask_l = _start(mask_l, _row_l(pair, n_pairs, MASK), mask_strides[1], n_elements)
    c = _huber(huber) if HUBER else 0.0
    lane = tl.arange(0, BLOCK)
    sum_w = tl.zeros([BLOCK // VECTOR], tl.float32)
    sum_l = tl.zeros([BLOCK // VECTOR], tl.float32)
    gap_w = tl.zeros([BLOCK // VECTOR], tl.float32)
    gap_l = tl.zeros([BLOCK // VECTOR], tl.float32)
    ref_sum_w = tl.zeros([BLOCK // VECTOR], tl.float32)
    ref_sum_l = tl.zeros([BLOCK // VECTOR], tl.float32)
    count_w = tl.zeros([BLOCK // VECTOR], tl.float32)
    count_l = tl.zeros([BLOCK // VECTOR], tl.float32)
    for block in range(part, (n_elements - 1) // BLOCK + 1, n_programs):  # n + BLOCK may overflow
        start = tl.full([], block, tl.int64 if WIDE else tl.int32) * BLOCK
        inside = start + lane < n_elements
        goal = _load(row_target_w, start, lane, inside, sizes, target_strides[0])
        weight = None
        if MASK is not None:
            weight = _load(row_mask_w, start, lane, inside, sizes, mask_strides[0])
            count_w += _together(weight, VECTOR)
        pred = _load(row_pred_w, start, lane, inside, sizes, pred_strides[0])
        diff = pred - goal
        sum_w += _together(_squares(diff, weight, c, HUBER), VECTOR)
        if PAIRED:
            ref = _load(row_ref_w, start, lane, inside, sizes, ref_strides[0])
            gap_w += _together(_gaps(pred, ref, diff, goal, weight, c, HUBER), VECTOR)
            ref_sum_w += _together(_squares(ref - goal, weight, c, HUBER), VECTOR)
        if TARGET != "shared":
            goal = _load(row_target_l, start, lane, inside, sizes, target_strides[1])
        if MASK is not None and MASK != "shared":
            weight = _load(row_mask_l, start, lane, inside, sizes, mask_strides[1])
            count_l += _together(weight, VECTOR)
        pred = _load(row_pred_l, start, lane, inside, sizes, pred_strides[1])
        diff = pred - goal
        sum_l += _together(_squares(diff, weight, c, HUBER), VECTOR)
        if PAIRED:
            ref = _load(row_ref_l, start, lane, inside, sizes, ref_strides[1])
            gap_l += _together(_gaps(pred, ref, diff, goal, weight, c, HUBER), VECTOR)
            ref_sum_l += _together(_squares(ref - goal, weight, c, HUBER), VECTOR)
    parts = n_pairs * n_programs
    mine = partials + tl.program_id(0)
    tl.store(mine, tl.sum(sum_w, axis=0))
    tl.store(mine + parts, tl.sum(sum_l, axis=0))
    mine += 2 * parts
    if MASK is not None and MEAN:
        tl.store(mine, tl.sum(count_w, axis=0))
        mine += parts
        if MASK != "shared":
            tl.store(mine, tl.sum(count_l, axis=0))
            mine += parts
    if PAIRED:
        tl.store(mine, tl.sum(gap_w, axis=0))
        tl.store(mine + parts, tl.sum(gap_l, axis=0))
        tl.store(mine + 2 * parts, tl.sum(ref_sum_w, axis=0))
        tl.store(mine + 3 * parts, tl.sum(ref_sum_l, axis=0))
    if tl.atomic_add(ticket, 1, sem="acq_rel") == parts - 1:
        _finish(
            loss, stats, partials, ref_w, ref_l, values, tensors, strides,
            n_pairs, n_elements, n_programs, ref_strides, pair_scale,
            SCORE, SHAPE, N_SCORE, N_HYPER, SFT_WEIGHT, REDUCE, MEAN, REF, REF_ERRORS, MASK, HUBER,
            PAIRS, PARTS,
        )  # fmt: skip
        tl.store(ticket, 0)


@triton.jit
def _slope(diff, scale, weight, c, HUBER: tl.constexpr):
    """The gradient of one element; 0 by a factor of 0, whatever the element."""
    value = tl.where(scale == 0.0, 0.0, scale * diff)
    if HUBER:
        value = value / tl.sqrt(diff * diff + c * c)
    return value if weight is None else tl.where(weight == 0.0, 0.0, weight * value)


@triton.jit(do_not_specialize=[*_COUNTS, "grad_stride"])
def pair_bwd(
    pred_w, pred_l, target_w, target_l, mask_w, mask_l, grad_w, grad_l, grad_loss, stats,
    huber, grad_stride, n_pairs, n_elements, n_programs,
    sizes, pred_strides, target_strides, mask_strides, grad_strides,
    PRED: tl.constexpr, TARGET: tl.constexpr, MASK: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr, REVERSED: tl.constexpr,
):  # fmt: skip
    """grad = grad_loss * factor * (pred - target) in one launch.

    A half whose grad is None is neither read nor written. grad_stride: 1 for one grad_loss a pair.
    REVERSED: from the last block to the first; the last are what forward left in the L2 cache.
    """
    HUBER: tl.constexpr = len(huber) > 0
    pair = tl.program_id(0) // n_programs
    part = tl.program_id(0) % n_programs
    row_target_w = _start(target_w, _row_w(pair, n_pairs, TARGET), target_strides[0], n_elements)
    row_target_l = _start(target_l, _row_l(pair, n_pairs, TARGET), target_strides[1], n_elements)
    factor_w = tl.load(stats + 3 * n_pairs + pair)
    factor_l = tl.load(stats + 4 * n_pairs + pair)
    c = _huber(huber) if HUBER else 0.0
    lane = tl.arange(0, BLOCK)
    last = (n_elements - 1) // BLOCK  # n + BLOCK may overflow
    for round in range(part, last + 1, n_programs):
        block = last - round if REVERSED else round
        start = tl.full([], block, tl.int64 if WIDE else tl.int32) * BLOCK
        inside = start + lane < n_elements
        # All loads before the first store, so that the memory answers them together. That of
        # grad_loss is among them because the factors, else, would be waited for before the loop.
        goal_w = _load(row_target_w, start, lane, inside, sizes, target_strides[0])
        goal_l = goal_w
        weight_w = None
        weight_l = None
        if MASK is not None:
            row = _start(mask_w, _row_w(pair, n_pairs, MASK), mask_strides[0], n_elements)
            weight_w = _load(row, start, lane, inside, sizes, mask_strides[0])
            weight_l = weight_w
        if grad_w is not None:
            row = _start(pred_w, _row_w(pair, n_pairs, PRED), pred_strides[0], n_elements)
            of_w = _load(row, start, lane, inside, sizes, pred_strides[0])
        if grad_l is not None:
            if TARGET != "shared":
                goal_l = _load(row_target_l, start, lane, inside, sizes, target_strides[1])
            if MASK is not None and MASK != "shared":
                row = _start(mask_l, _row_l(pair, n_pairs, MASK), mask_strides[1], n_elements)
                weight_l = _load(row, start, lane, inside, sizes, mask_strides[1])
            row = _start(pred_l, _row_l(pair, n_pairs, PRED), pred_strides[1], n_elements)
            of_l = _load(row, start, lane, inside, sizes, pred_strides[1])
        scale = tl.load(grad_loss + pair * grad_stride).to(tl.float32)
        if grad_w is not None:
            row = _start(grad_w, _row_w(pair, n_pairs, PRED), grad_strides[0], n_elements)
            value = _slope(of_w - goal_w, scale * factor_w, weight_w, c, HUBER)
            _store(row, start, lane, inside, sizes, grad_strides[0], value)
        if grad_l is not None:
            row = _start(grad_l, _row_l(pair, n_pairs, PRED), grad_strides[1], n_elements)
            value = _slope(of_l - goal_l, scale * factor_l, weight_l, c, HUBER)
            _store(row, start, lane, inside, sizes, grad_strides[1], value)
