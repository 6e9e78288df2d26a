"""Time on the device alone: of graphs of many steps, each of which finds a cold L2."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cases import DEVICE, Case, Loss, one, step

Inputs = tuple[Tensor, ...]
MOST_COPIES = 128
COPIED = 2**30  # bytes
HEAD_START = 200_000  # cycles, 0.1 ms, in which Python queues a replay before its clock starts


class Captured(NamedTuple):
    """A graph, with what it reads (inside of the steps) and what it writes: no two of its steps
    write to the same memory."""

    graph: torch.cuda.CUDAGraph
    steps: Sequence[Callable[[], Any]]
    results: list[Any]


@functools.cache
def l2_bytes() -> int:
    return int(torch.cuda.get_device_properties(DEVICE).L2_cache_size)


@functools.cache
def _stream() -> torch.cuda.Stream:
    """Where everything is warmed up and captured: autograd runs a backward on its forward's."""
    return torch.cuda.Stream()


@functools.cache
def _ballast() -> Tensor:
    return torch.ones(l2_bytes(), device=DEVICE)  # of four bytes each


def copies(n_bytes: int) -> tuple[int, bool]:
    """How many copies of its inputs a graph of steps that move `n_bytes` each goes through, and
    whether the L2 has to be emptied before every replay. It need not be if what is moved between
    two uses of a copy is more than twice the L2."""
    if n_bytes > 2 * l2_bytes():
        return 1, True
    n = min(MOST_COPIES, 1 + math.ceil(2 * l2_bytes() / n_bytes))
    return n, (n - 1) * n_bytes < 2 * l2_bytes()


def inputs(case: Case) -> tuple[list[Inputs], bool]:
    """Copies of a case's tensors, and whether the L2 has to be emptied before they are used."""
    n, empty = copies(min(case.bytes_moved()))
    tensors = case.tensors()
    made = [tensors]
    for _ in range(n - 1):
        made.append(tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in tensors))
    return made, empty


def captured(steps: Sequence[Callable[[], Any]]) -> Captured:
    """A graph of these steps, one after the other."""
    _top_up_tickets(len(steps))
    stream = _stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for run in (steps[0], *steps):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = [run() for run in steps]
    return Captured(graph, steps, results)


def _top_up_tickets(needed: int) -> None:
    """A captured launch keeps its ticket, and one that finds none left clears a counter of its own
    at every replay, which the launches of a training run do not."""
    from fastpref_kernels import launch  # here, because Triton is not everywhere

    index = torch.cuda.current_device()
    spare = launch._spare.setdefault(index, [])
    while len(spare) < needed:
        slab = launch._new_slab(torch.device(DEVICE.type, index))
        launch._slabs.append(slab)
        spare += slab.split(1)[::4]


def passes(loss: Loss, sets: Sequence[Inputs]) -> dict[str, Captured]:
    """Forward, backward, and both together, over these inputs."""
    stream = _stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        losses = [loss(*tensors) for tensors in sets]
    torch.cuda.synchronize()
    backward = partial(torch.autograd.grad, retain_graph=True)
    return {
        "fwd": captured([partial(loss, *tensors) for tensors in sets]),
        "bwd": captured(
            [
                partial(backward, value, tensors[0], one(value.dtype))
                for value, tensors in zip(losses, sets, strict=True)
            ]
        ),
        "both": captured([partial(step, loss, tensors) for tensors in sets]),
    }


def timed(runs: Mapping[str, Captured], rounds: int, empty_l2: bool) -> dict[str, list[float]]:
    """Seconds of one step of each, taking turns, after a round that does not count.

    The L2 is emptied by reading: what a fill leaves there would have to be written back later, at
    the cost of what is timed.
    """
    events: dict[str, list[Any]] = {name: [] for name in runs}
    for counts in [False] + [True] * rounds:
        for name, run in runs.items():
            if empty_l2:
                _ballast().sum()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(HEAD_START)
            start.record()
            run.graph.replay()
            end.record()
            if counts:
                events[name].append((start, end))
    torch.cuda.synchronize()
    return {
        name: [start.elapsed_time(end) / 1e3 / len(runs[name].steps) for start, end in pairs]
        for name, pairs in events.items()
    }


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a large copy on this device."""
    source, goal = torch.zeros(2, COPIED, dtype=torch.int8, device=DEVICE)
    runs = {"copy": captured([partial(goal.copy_, source)])}
    times = sorted(timed(runs, 20, empty_l2=False)["copy"])
    return 2 * source.nbytes / times[len(times) // 2]
