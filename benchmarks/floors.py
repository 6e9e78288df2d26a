"""Two kernels that only move memory, in as many programs as the real ones: one reads what forward
reads, the other reads and writes what backward does. Nothing with these launches can be faster."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpref_kernels import launch


@triton.jit
def read_kernel(
    pred, target, ref, sums, half, SHARED: tl.constexpr, REF: tl.constexpr, BLOCK: tl.constexpr
):
    """half: elements of all winners."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(tl.program_id(0) * BLOCK, half, tl.num_programs(0) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < half
        total += tl.load(pred + at, inside, 0).to(tl.float32)
        total += tl.load(pred + half + at, inside, 0).to(tl.float32)
        total += tl.load(target + at, inside, 0).to(tl.float32)
        if not SHARED:
            total += tl.load(target + half + at, inside, 0).to(tl.float32)
        if REF:
            total += tl.load(ref + at, inside, 0).to(tl.float32)
            total += tl.load(ref + half + at, inside, 0).to(tl.float32)
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def write_kernel(pred, target, grad, half, SHARED: tl.constexpr, BLOCK: tl.constexpr):
    for start in range(tl.program_id(0) * BLOCK, half, tl.num_programs(0) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < half
        w = tl.load(pred + at, inside, 0).to(tl.float32)
        l = tl.load(pred + half + at, inside, 0).to(tl.float32)
        of_w = tl.load(target + at, inside, 0).to(tl.float32)
        of_l = of_w if SHARED else tl.load(target + half + at, inside, 0).to(tl.float32)
        tl.store(grad + at, (w + of_w).to(grad.dtype.element_ty), inside)
        tl.store(grad + half + at, (l + of_l).to(grad.dtype.element_ty), inside)


def read(pred: Tensor, target: Tensor, ref: Tensor | None = None) -> Tensor:
    """Sums of all elements, one for each program of a forward on these tensors."""
    grid, options = _launch(pred, target)
    sums = torch.empty(grid, dtype=torch.float32, device=pred.device)
    shared = len(target) < len(pred)
    read_kernel[grid](
        pred, target, pred if ref is None else ref, sums, pred.numel() // 2,
        SHARED=shared, REF=ref is not None, **options,
    )  # fmt: skip
    return sums


def write(pred: Tensor, target: Tensor, ref: Tensor | None = None) -> Tensor:
    """pred + target, in memory like a gradient's."""
    grid, options = _launch(pred, target)
    grad = torch.empty_like(pred)
    shared = len(target) < len(pred)
    write_kernel[grid](pred, target, grad, pred.numel() // 2, SHARED=shared, **options)
    return grad


def _launch(pred: Tensor, target: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """As many programs, and threads with one 16-byte vector of a block each, as fastpref has."""
    n_pairs = len(pred) // 2
    programs = n_pairs * launch._programs(n_pairs, pred[0].numel())
    width = max(pred.element_size(), target.element_size())
    return (programs,), {"BLOCK": launch.BLOCK, "num_warps": launch.BLOCK * width // 16 // 32}
