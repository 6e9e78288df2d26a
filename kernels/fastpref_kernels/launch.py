"""How the kernels are launched: grids, row layouts, the 64-bit choice, tickets, and everything that
is allocated."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from . import pair
from .links import Link

# Whether TRITON_INTERPRET was set when Triton was imported.
INTERPRETED = not isinstance(pair.pair_fwd, triton.JITFunction)

BLOCK = 1024  # elements that a program reads of each tensor at a time
THREADS = 128  # each has one or two 16-byte vectors of a block
NUM_WARPS = THREADS // (64 if torch.version.hip else 32)
MAX_PROGRAMS = 1024  # fills a large GPU; more would only lengthen the last program's sum
PAIRS, PARTS = 4, 64  # partial sums that the last program reads at a time; more cost registers
INT32_ELEMENTS = 2**31 - BLOCK

# One tensor, stacked or shared by the pair, and None; or winners and losers.
Operand = tuple[Tensor, Tensor | None]
Strides = tuple[tuple[int, ...], tuple[int, ...]]  # of winners and losers


def pair_forward(
    link: Link,
    values: Sequence[float],
    tensors: Sequence[Tensor | None],
    pred: Operand,
    target: Operand,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """One launch: the loss, () or (B,) for reduction "none", and stats (5, B): mse_w, mse_l,
    margin, and the slopes of the loss by both errors.

    `values` are the link's hyper-parameters in order; a 0-d tensor in `tensors` goes before.
    """
    n_pairs, n_elements = _count(pred)
    n_programs = _programs(n_pairs, n_elements)
    sizes, strides, wide = _layout(n_elements, pred, target)
    device = pred[0].device
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": device}
    loss = torch.empty((n_pairs,) if reduction == "none" else (), **fp32)
    stats = torch.empty((5, n_pairs), **fp32)
    partials = torch.empty(2 * n_pairs * n_programs, **fp32)
    with _current(device):
        pair.pair_fwd[(n_pairs * n_programs,)](
            *_pointers(pred), *_pointers(target), loss, stats, partials, _ticket(device),
            tuple(values), tuple(tensors), n_pairs, n_elements, n_programs,
            _first_loser(pred, n_pairs), _first_loser(target, n_pairs), sizes, *strides,
            1.0 / n_pairs if reduction == "mean" else 1.0,
            LINK=link.triton, REDUCE=reduction != "none", SHARED=_shared(target, n_pairs),
            WIDE=wide, BLOCK=BLOCK, PAIRS=PAIRS, PARTS=PARTS, num_warps=NUM_WARPS,
        )  # fmt: skip
    return loss, stats


def pair_backward(
    grad_loss: Tensor, stats: Tensor, pred: Operand, target: Operand, needed: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """One launch: the gradients of `pred`'s tensors, where needed, in their dtype and layout."""
    n_pairs, n_elements = _count(pred)
    n_programs = _programs(n_pairs, n_elements)
    grad = torch.empty_like(pred[0]) if needed[0] else None
    grad_loser = torch.empty_like(pred[1]) if needed[1] and pred[1] is not None else None
    grads = (grad, grad if pred[1] is None else grad_loser)
    given = (pred[0] if grad is None else grad, pred[1] if grad_loser is None else grad_loser)
    sizes, strides, wide = _layout(n_elements, pred, target, given)
    with _current(pred[0].device):
        pair.pair_bwd[(n_pairs * n_programs,)](
            *_pointers(pred), *_pointers(target), *grads, grad_loss, stats,
            n_pairs, n_elements, n_programs,
            _first_loser(pred, n_pairs), _first_loser(target, n_pairs),
            grad_loss.stride(0) if grad_loss.dim() else 0, sizes, *strides,
            SHARED=_shared(target, n_pairs), WIDE=wide, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
    return grad, grad_loser


def _count(pred: Operand) -> tuple[int, int]:
    """Pairs, and elements per sample."""
    n_samples = pred[0].shape[0]
    return n_samples // 2 if pred[1] is None else n_samples, pred[0].numel() // n_samples


def _pointers(operand: Operand) -> tuple[Tensor, Tensor]:
    first, loser = operand
    return first, first if loser is None else loser


def _first_loser(operand: Operand, n_pairs: int) -> int:
    """The row of the first loser in its tensor."""
    first, loser = operand
    return first.shape[0] - n_pairs if loser is None else 0


def _shared(target: Operand, n_pairs: int) -> bool:
    return target[1] is None and target[0].shape[0] == n_pairs


def _programs(n_pairs: int, n_elements: int) -> int:
    """Programs per pair: one a block, or fewer that read equally many blocks each."""
    blocks = -(-n_elements // BLOCK)
    rounds = -(-blocks // max(1, MAX_PROGRAMS // n_pairs))
    return -(-blocks // rounds)


def _layout(n_elements: int, *operands: Operand) -> tuple[tuple[int, ...], list[Strides], bool]:
    """(sizes, strides of each operand, WIDE) as the kernels take them: inner dimensions in the
    order of the first operand's memory, neighbours merged wherever every tensor allows it."""
    tensors = [t for operand in operands for t in _pointers(operand)]
    wide = n_elements > INT32_ELEMENTS
    if all(t.is_contiguous() for t in tensors):
        dense = (n_elements,)
        return (), [(dense, dense)] * len(operands), wide
    inner = _merged(tensors)
    strides: list[tuple[int, ...]] = [(t.stride(0),) for t in tensors]
    sizes: tuple[int, ...] = ()
    if inner and (len(inner) > 1 or set(inner[0][1]) != {1}):
        sizes = tuple(size for size, _ in inner)
        strides = [row + tuple(each[i] for _, each in inner) for i, row in enumerate(strides)]
        last = [sum((n - 1) * s for n, s in zip(sizes, row[1:], strict=True)) for row in strides]
        wide = wide or max(last) > INT32_ELEMENTS
    return sizes, list(zip(strides[::2], strides[1::2], strict=True)), wide


def _merged(tensors: Sequence[Tensor]) -> list[tuple[int, tuple[int, ...]]]:
    """Inner dimensions as (size, strides in each tensor), outermost first, as few as can be."""
    shape = tensors[0].shape
    dims = [(shape[d], tuple(t.stride(d) for t in tensors)) for d in range(1, len(shape))]
    merged: list[tuple[int, tuple[int, ...]]] = []
    for size, strides in sorted((d for d in dims if d[0] > 1), key=lambda d: d[1], reverse=True):
        if merged and merged[-1][1] == tuple(size * stride for stride in strides):
            merged[-1] = (merged[-1][0] * size, strides)
        else:
            merged.append((size, strides))
    return merged


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    module = torch.get_device_module(device)
    here = module.current_device() == device.index
    return contextlib.nullcontext() if here else module.device(device.index)


_tickets: dict[tuple[int | None, int], Tensor] = {}
_spare: dict[int | None, Iterator[Tensor]] = {}
_slabs: list[Tensor] = []  # captured graphs point into these for as long as they live


def _ticket(device: torch.device) -> Tensor:
    """A counter at 0 that no launch running at the same time can use: one per stream, and one per
    captured launch, since a graph may be replayed on any stream. Every launch leaves its counter at
    0, so that none is cleared again."""
    if device.type == "cpu":  # the interpreter; a launch that raises must not spoil the next one
        return torch.zeros(1, dtype=torch.int32)
    capturing = _capturing(device)
    key = (device.index, _stream(device))
    if not capturing and key in _tickets:
        return _tickets[key]
    ticket = next(_spare.get(device.index, iter(())), None)
    if ticket is None:
        if capturing:  # nothing can be waited for: the graph gets a counter that it clears itself
            return torch.zeros(1, dtype=torch.int32, device=device)
        slab = _new_slab(device)
        _slabs.append(slab)
        _spare[device.index] = (slab[i : i + 1] for i in range(len(slab)))
        ticket = next(_spare[device.index])
    if not capturing:
        _tickets[key] = ticket
    return ticket


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _stream(device: torch.device) -> int:
    return int(triton.runtime.driver.active.get_current_stream(device.index))


def _new_slab(device: torch.device) -> Tensor:
    """Counters at 0 for 4096 streams and captured launches, there before any stream can use them.

    Made in a thread and on a stream of its own: torch.compile's "reduce-overhead" warms up inside a
    memory pool that belongs to its thread or stream, and takes back what that holds.
    """
    made: list[Tensor] = []

    def make() -> None:
        module = torch.get_device_module(device)
        with module.device(device.index), module.stream(module.Stream(device.index)):
            made.append(torch.zeros(4096, dtype=torch.int32, device=device))
            module.current_stream().synchronize()

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return made[0]
