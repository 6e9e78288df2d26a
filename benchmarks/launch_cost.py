"""What it costs Python to find a kernel that is compiled already and to hand it to the driver: by
Triton's jit, and as fastpref does it from the second launch on.

    python benchmarks/launch_cost.py

On any machine: kernels and driver are stand-ins that do nothing. Prints the median of microseconds,
and appends it to results/launch-<machine>.csv.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter has no jit
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "helpers"))

import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime import driver

import aot
from bench_loss import RESULTS, append, environment
from cases import PUBLISHED
from fastpref_kernels import LINKS, launch

TARGET = aot.TARGETS["sm_90"]
DRIVER = SimpleNamespace(
    current_device=lambda: 0,
    get_current_device=lambda: 0,
    get_current_stream=lambda device: 0,
    get_current_target=lambda: TARGET,
    get_active_torch_device=lambda: torch.device("cpu"),
)


class Nothing(CompiledKernel):
    """A kernel that is compiled and loaded, and does nothing."""

    module, function, packed_metadata, metadata = 1, 1, (), None

    def __init__(self) -> None:
        self._run = lambda *args: None

    def launch_metadata(self, *args: Any) -> None: ...

    def __del__(self) -> None: ...


def compiled(self: Any, key: str, *args: Any, **kwargs: Any) -> Any:
    return self.device_caches[0][0].setdefault(key, Nothing())


def microseconds(run: Callable[[], None], rounds: int = 50, repeats: int = 200) -> float:
    times = []
    for _ in range(rounds):
        start = time.thread_time()
        for _ in range(repeats):
            run()
        times.append((time.thread_time() - start) / repeats * 1e6)
    return round(statistics.median(times), 1)


def launches(link: str) -> list[tuple[Any, ...]]:
    """The arguments of `launch._launch` in forward and backward, on a GPU as far as it can see."""
    pred, target = (torch.zeros(4, 4, 8, 8), None), (torch.zeros(2, 4, 8, 8), None)
    ref = pred if LINKS[link].score.needs_ref else launch.ABSENT
    with mock.patch.object(launch, "_launch") as made:
        scalars = [0.1] * len(LINKS[link].hyper)
        loss, stats = launch.pair_forward(LINKS[link], scalars, pred, target, ref)
        launch.pair_backward(loss, stats, pred, target, needed=(True, False))
    gpu = torch.device("cuda", 0)
    return [(kernel, plan, gpu, *rest) for (kernel, plan, _, *rest), _ in made.call_args_list]


def main() -> None:
    ticket = torch.zeros(1, dtype=torch.int32)

    def module(device: torch.device) -> SimpleNamespace:
        return DRIVER

    def kept(device: torch.device) -> torch.Tensor:
        return ticket

    driver.set_active(DRIVER)
    about = environment()
    rows: list[dict[str, Any]] = []
    with (
        mock.patch.object(triton.JITFunction, "_do_compile", compiled),
        mock.patch.object(torch, "get_device_module", new=module),
        mock.patch.object(launch, "_ticket", new=kept),
    ):
        for link in PUBLISHED:
            for call in launches(link):
                kernel, plan, _, pointers, numbers, *_ = call
                arguments = (*pointers, *[ticket] * plan.ticket, *numbers, *plan.arguments)
                options = launch._options(plan, pointers, DRIVER.get_current_target())
                by_jit = partial(kernel[plan.grid], *arguments, **options)
                row = {"link": link, "kernel": kernel.__name__, "jit_us": microseconds(by_jit)}
                row["fastpref_us"] = microseconds(partial(launch._launch, *call))
                assert plan.launchers
                print(row)
                rows.append(row | about)
    append(RESULTS / f"launch-{platform.machine().replace('_', '-')}.csv", rows)


if __name__ == "__main__":
    main()
