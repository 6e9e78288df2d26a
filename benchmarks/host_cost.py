"""What Python costs: forward and backward of a fused loss whose launches are left out, against the
dispatch of the published formula in eager PyTorch, on tensors too small to matter.

    python benchmarks/host_cost.py

Prints medians in microseconds, and appends them to results/host-<machine>.csv. Triton's launcher (a
few microseconds a launch) is left out along with the launch.
"""

from __future__ import annotations

import functools
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
from bench_loss import RESULTS, append, environment
from cases import DEVICE, PUBLISHED, Loss, fused, one, synchronize
from fastpref_kernels import LINKS, launch, pair


class Nothing:
    """A kernel that is not launched."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: None


@contextmanager
def without_launches() -> Iterator[None]:
    ticket = torch.zeros(1, dtype=torch.int32, device=DEVICE)

    def kept(device: torch.device) -> torch.Tensor:  # a mock would be slower than all the rest
        return ticket

    def anew(plan: Any) -> Any:  # with no launchers of real kernels
        return functools.lru_cache(plan.__wrapped__)

    with (
        mock.patch.object(pair, "pair_fwd", Nothing()),
        mock.patch.object(pair, "pair_bwd", Nothing()),
        mock.patch.object(launch, "_plan_forward", anew(launch._plan_forward)),
        mock.patch.object(launch, "_plan_backward", anew(launch._plan_backward)),
        mock.patch.object(launch, "_ticket", new=kept),
    ):
        yield


def costs(link: str, turns: int = 200, repeats: int = 60) -> dict[str, tuple[list[float], ...]]:
    """Microseconds of forward and backward, published formula and fused taking turns: of each
    turn's first call, which finds the caches full of the other's, and of a call in its second half.
    """
    target = torch.randn(2, 4, 2, 2, device=DEVICE)
    pred = torch.randn(4, 4, 2, 2, device=DEVICE, requires_grad=True)
    tensors = (pred, target, torch.randn_like(pred))[: 3 if LINKS[link].score.needs_ref else 2]
    losses = {"eager": PUBLISHED[link], "fastpref": fused(link, "triton")}

    def took(loss: Loss, calls: int) -> float:
        synchronize()
        start = time.perf_counter()  # on a GPU the backward runs in a thread of its own
        for _ in range(calls):
            value = loss(*tensors)
            torch.autograd.grad(value, pred, one(value.dtype))
        return (time.perf_counter() - start) / calls * 1e6

    times: dict[str, tuple[list[float], ...]] = {name: ([], []) for name in losses}
    with without_launches():
        for turn in range(turns + 5):
            for name, loss in losses.items():
                first = took(loss, 1)
                took(loss, repeats // 2 - 1)
                steady = took(loss, repeats // 2)
                if turn >= 5:
                    times[name][0].append(first)
                    times[name][1].append(steady)
    return times


def main() -> None:
    torch.set_num_threads(1)
    about = environment()
    rows: list[dict[str, Any]] = []
    for link in PUBLISHED:
        times = costs(link)
        row: dict[str, Any] = {"link": link}
        for i, state in enumerate(("first", "steady")):
            eager, ours = (statistics.median(times[name][i]) for name in ("eager", "fastpref"))
            row |= {f"{state}_eager_us": round(eager, 1), f"{state}_fastpref_us": round(ours, 1)}
            row[f"{state}_ratio"] = round(ours / eager, 3)
        print(row)
        rows.append(row | about)
    append(RESULTS / f"host-{platform.machine().replace('_', '-')}.csv", rows)


if __name__ == "__main__":
    main()
