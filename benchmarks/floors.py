"""Two kernels that only move memory, in as many programs as the real ones: one reads what forward
reads, the other reads and writes what backward does. Nothing with these launches can be faster."""
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpref_kernels import launch


@triton.jit
def read_kernel(
    pred, target, others, sums, size,
    MEMBERS: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """size: elements of all first members, then come all second ones. others: as large as pred."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < size
        for m in tl.static_range(MEMBERS):
            total += tl.load(pred + m * size + at, inside, 0).to(tl.float32)
            if m == 0 or not SHARED:
                total += tl.load(target + m * size + at, inside, 0).to(tl.float32)
            for i in tl.static_range(len(others)):
                total += tl.load(others[i] + m * size + at, inside, 0).to(tl.float32)
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def write_kernel(
    pred, target, others, grad, size,
    MEMBERS: tl.constexpr, SHARED: tl.constexpr, AGAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """AGAIN: how many members have the others added."""
    for start in range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < size
        values = ()
        for m in tl.static_range(MEMBERS):
            if m == 0 or not SHARED:
                goal = tl.load(target + m * size + at, inside, 0).to(tl.float32)
            value = tl.load(pred + m * size + at, inside, 0).to(tl.float32) + goal
            if m < AGAIN:
                for i in tl.static_range(len(others)):
                    value += tl.load(others[i] + m * size + at, inside, 0).to(tl.float32)
            values = values + (value,)  # noqa: RUF005 (the jit knows no unpacking)
        for m in tl.static_range(MEMBERS):
            tl.store(grad + m * size + at, values[m].to(grad.dtype.element_ty), inside)


def read(pred: Tensor, target: Tensor, *others: Tensor, members: int = 2) -> Tensor:
    """Sums of all elements, one for each program of a forward on these tensors."""
    grid, options = _launch(pred, target, members)
    sums = torch.empty(grid, dtype=torch.float32, device=pred.device)
    read_kernel[grid](pred, target, others, sums, pred.numel() // members, **options)
    return sums


def write(
    pred: Tensor, target: Tensor, *others: Tensor, members: int = 2, drifting: int = 0
) -> Tensor:
    """pred + target, and those of the others of so many first members, in memory like a
    gradient's."""
    grid, options = _launch(pred, target, members)
    grad = torch.empty_like(pred)
    size = pred.numel() // members
    write_kernel[grid](pred, target, others, grad, size, AGAIN=drifting, **options)
    return grad


def _launch(pred: Tensor, target: Tensor, members: int) -> tuple[tuple[int], dict[str, int]]:
    """As many programs, and threads with one 16-byte vector of a block each, as fastpref has."""
    n_groups = len(pred) // members
    programs = n_groups * launch._programs(n_groups, pred[0].numel())
    width = max(pred.element_size(), target.element_size())
    return (programs,), {
        "MEMBERS": members, "SHARED": len(target) < len(pred),
        "BLOCK": launch.BLOCK, "num_warps": launch.BLOCK * width // 16 // 32,
    }  # fmt: skip
