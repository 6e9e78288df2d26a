"""The jit kernels of every loss: forward (errors -> link -> loss) and backward (gradient). They
know no loss by name.

Both work on winner and loser of a pair together, so that a target they share is read once. A row
is one sample. Stacked halves are one tensor passed twice, and then the losers' rows do not start at
0 but at `pred_l_row` or `target_l_row`. `..._strides` are (row stride, *inner strides) of winners
and of losers, for the inner sizes `sizes`, which is empty where all rows are dense in one order.
"""
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _row(pointer, row, strides):
    """Pointer to the first element of a row."""
    return pointer + row.to(tl.int64) * strides[0]


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
def _hyper(value, tensor):
    """A hyper-parameter in fp32: what the 0-d `tensor` holds on the device, or else `value`."""
    if tensor is None:
        return tl.full([], value, tl.float32)
    else:
        return tl.load(tensor).to(tl.float32)


@triton.jit
def _sum_parts(partials, pair, n_pairs, n_programs, PAIRS: tl.constexpr, PARTS: tl.constexpr):
    """Sums of squares of some pairs, added in an order that does not depend on who came first."""
    total = tl.zeros([PAIRS, PARTS], tl.float32)
    for first in range(0, n_programs, PARTS):
        part = first + tl.arange(0, PARTS)
        inside = (pair < n_pairs)[:, None] & (part < n_programs)[None, :]
        pointers = partials + pair[:, None] * n_programs + part[None, :]
        # .cg: other programs wrote these during this launch; this processor's L1 may be stale
        total += tl.load(pointers, mask=inside, other=0.0, cache_modifier=".cg")
    return tl.sum(total, axis=1)


@triton.jit
def _finish(
    loss, stats, partials, values, tensors, n_pairs, n_elements, n_programs, pair_scale,
    LINK: tl.constexpr, REDUCE: tl.constexpr, PAIRS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Errors -> link -> loss for all pairs, by the one program that arrived last."""
    hyper = ()
    for i in tl.static_range(len(values)):
        hyper = hyper + (_hyper(values[i], tensors[i]),)  # noqa: RUF005 (the jit knows no unpacking)
    partials_l = partials + n_pairs * n_programs
    n = tl.zeros([PAIRS], tl.float32) + n_elements
    total = tl.zeros([PAIRS], tl.float32)
    for first in range(0, n_pairs, PAIRS):
        pair = first + tl.arange(0, PAIRS)
        inside = pair < n_pairs
        err_w = tl.div_rn(_sum_parts(partials, pair, n_pairs, n_programs, PAIRS, PARTS), n)
        err_l = tl.div_rn(_sum_parts(partials_l, pair, n_pairs, n_programs, PAIRS, PARTS), n)
        value, slope_w, slope_l, margin = LINK(err_w, err_l, *hyper)
        tl.store(stats + pair, err_w, mask=inside)
        tl.store(stats + n_pairs + pair, err_l, mask=inside)
        tl.store(stats + 2 * n_pairs + pair, margin, mask=inside)
        tl.store(stats + 3 * n_pairs + pair, slope_w * pair_scale, mask=inside)
        tl.store(stats + 4 * n_pairs + pair, slope_l * pair_scale, mask=inside)
        if REDUCE:
            total += tl.where(inside, value, 0.0)
        else:
            tl.store(loss + pair, value, mask=inside)
    if REDUCE:
        tl.store(loss, tl.sum(total, axis=0) * pair_scale)


# The jit would compile once more for each of these that happens to be 1 or a multiple of 16. For
# n_elements and strides it may: knowing that is what makes loads and stores 16 bytes wide.
_COUNTS = ["n_pairs", "n_programs", "pred_l_row", "target_l_row", "grad_stride"]


@triton.jit(do_not_specialize=_COUNTS[:-1])
def pair_fwd(
    pred_w, pred_l, target_w, target_l, loss, stats, partials, ticket, values, tensors,
    n_pairs, n_elements, n_programs, pred_l_row, target_l_row,
    sizes, pred_strides, target_strides, pair_scale,
    LINK: tl.constexpr, REDUCE: tl.constexpr, SHARED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr, PAIRS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """loss, stats = link(mean((pred - target)^2)) in one launch that reads every element once.

    Program (pair, part) sums the squares of every n_programs-th block of its pair into partials
    (2, n_pairs, n_programs) and takes a ticket. Whoever draws the last ticket sees all partials,
    finishes, and leaves `ticket` at 0 for the next launch.
    stats (5, n_pairs): err_w, err_l, margin, and slope_w, slope_l of the reduced loss.
    loss: () or, unless REDUCE, (n_pairs,). pair_scale: 1 / n_pairs for a mean over pairs, else 1.
    """
    pair = tl.program_id(0) // n_programs
    part = tl.program_id(0) % n_programs
    row_pred_w = _row(pred_w, pair, pred_strides[0])
    row_pred_l = _row(pred_l, pair + pred_l_row, pred_strides[1])
    row_target_w = _row(target_w, pair, target_strides[0])
    row_target_l = _row(target_l, pair + target_l_row, target_strides[1])
    lane = tl.arange(0, BLOCK)
    sum_w = tl.zeros([BLOCK], tl.float32)
    sum_l = tl.zeros([BLOCK], tl.float32)
    for block in range(part, (n_elements - 1) // BLOCK + 1, n_programs):  # n + BLOCK may overflow
        start = tl.full([], block, tl.int64 if WIDE else tl.int32) * BLOCK
        inside = start + lane < n_elements
        goal = _load(row_target_w, start, lane, inside, sizes, target_strides[0])
        diff_w = _load(row_pred_w, start, lane, inside, sizes, pred_strides[0]) - goal
        if not SHARED:
            goal = _load(row_target_l, start, lane, inside, sizes, target_strides[1])
        diff_l = _load(row_pred_l, start, lane, inside, sizes, pred_strides[1]) - goal
        sum_w += diff_w * diff_w
        sum_l += diff_l * diff_l
    tl.store(partials + tl.program_id(0), tl.sum(sum_w, axis=0))
    tl.store(partials + n_pairs * n_programs + tl.program_id(0), tl.sum(sum_l, axis=0))
    if tl.atomic_add(ticket, 1, sem="acq_rel") == n_pairs * n_programs - 1:
        _finish(
            loss, stats, partials, values, tensors, n_pairs, n_elements, n_programs, pair_scale,
            LINK, REDUCE, PAIRS, PARTS,
        )  # fmt: skip
        tl.store(ticket, 0)


@triton.jit(do_not_specialize=_COUNTS)
def pair_bwd(
    pred_w, pred_l, target_w, target_l, grad_w, grad_l, grad_loss, stats,
    n_pairs, n_elements, n_programs, pred_l_row, target_l_row, grad_stride,
    sizes, pred_strides, target_strides, grad_strides,
    SHARED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad = grad_loss * slope * 2 / N * (pred - target) in one launch.

    A half whose grad is None is neither read nor written. grad_stride: 1 for one grad_loss a pair.
    """
    pair = tl.program_id(0) // n_programs
    part = tl.program_id(0) % n_programs
    row_target_w = _row(target_w, pair, target_strides[0])
    row_target_l = _row(target_l, pair + target_l_row, target_strides[1])
    scale = tl.load(grad_loss + pair * grad_stride).to(tl.float32) * (2.0 / n_elements)
    scale_w = scale * tl.load(stats + 3 * n_pairs + pair)
    scale_l = scale * tl.load(stats + 4 * n_pairs + pair)
    lane = tl.arange(0, BLOCK)
    for block in range(part, (n_elements - 1) // BLOCK + 1, n_programs):  # n + BLOCK may overflow
        start = tl.full([], block, tl.int64 if WIDE else tl.int32) * BLOCK
        inside = start + lane < n_elements
        goal = _load(row_target_w, start, lane, inside, sizes, target_strides[0])
        if grad_w is not None:
            row = _row(pred_w, pair, pred_strides[0])
            diff = _load(row, start, lane, inside, sizes, pred_strides[0]) - goal
            row = _row(grad_w, pair, grad_strides[0])
            _store(row, start, lane, inside, sizes, grad_strides[0], scale_w * diff)
        if grad_l is not None:
            if not SHARED:
                goal = _load(row_target_l, start, lane, inside, sizes, target_strides[1])
            row = _row(pred_l, pair + pred_l_row, pred_strides[1])
            diff = _load(row, start, lane, inside, sizes, pred_strides[1]) - goal
            row = _row(grad_l, pair + pred_l_row, grad_strides[1])
            _store(row, start, lane, inside, sizes, grad_strides[1], scale_l * diff)
