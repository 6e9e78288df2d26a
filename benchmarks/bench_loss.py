"""Time, bandwidth and memory of forward and backward of the losses: as trainers write them in eager
PyTorch, compiled by torch.compile, and by fastpref, beside the floor that the memory system sets.

    python benchmarks/bench_loss.py [--preset quick|full] [--shapes sdxl ...] [--pairs 1 4 ...]

Appends a row per provider and case to results/<device>.csv, and with --output_dir to a file there.
A provider whose loss or gradient is wrong is not timed. On a CPU only wall time is measured, and
the rows say that it is a CPU. `python benchmarks/report.py` draws and tabulates them.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.util
import itertools
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cases import (
    DEVICE,
    GPU,
    PUBLISHED,
    SHAPES,
    Case,
    Loss,
    is_right,
    providers,
    step,
    synchronize,
)
from fastpref_kernels import LINKS

RESULTS = Path(__file__).resolve().parent / "results"
LINE = (
    "{link:13} {shape:10} {pairs:3} {pred},{target} {provider:16} wall {wall_us:>9} us  "
    "device {fwd_us:>8} + {bwd_us:>8} us  floor {floor_us:>8} us  extra {extra_bytes:>10} B"
)


def wall_times(losses: dict[str, Loss], case: Case, rounds: int) -> dict[str, list[float]]:
    """Seconds of forward and backward from Python, providers taking turns."""
    tensors = case.tensors()
    times: dict[str, list[float]] = {name: [] for name in losses}
    repeats = 50 if GPU else max(1, 2_000_000 // tensors[0].numel())
    for loss in [*losses.values(), *losses.values()]:  # warm up twice
        step(loss, tensors)
    for _ in range(rounds):
        for name, loss in losses.items():
            synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                step(loss, tensors)
            synchronize()
            times[name].append((time.perf_counter() - start) / repeats)
    return times


def captured(run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def device_times(losses: dict[str, Loss], case: Case, rounds: int) -> dict[str, list[float]]:
    """Seconds on the device alone of "<provider> fwd", "bwd" and "both", captured and replayed with
    a cold L2; and of "empty": a graph of two kernels that do next to nothing."""
    tensors = case.tensors()
    tiny = torch.zeros(1, device=DEVICE)

    def empty() -> None:
        tiny.zero_()
        tiny.add_(1)

    kept: list[Tensor] = []  # what a captured backward reads
    graphs = {"empty": captured(empty)}
    for name in losses.keys() - {"reduce-overhead"}:  # which is a graph already
        loss = losses[name]
        graphs[f"{name} fwd"] = captured(partial(loss, *tensors))
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            kept.append(loss(*tensors))
        side.synchronize()
        backward = partial(torch.autograd.grad, kept[-1], tensors[0], retain_graph=True)
        graphs[f"{name} bwd"] = captured(backward)
        graphs[f"{name} both"] = captured(partial(step, loss, tensors))
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device=DEVICE)
    return timed({name: graph.replay for name, graph in graphs.items()}, flush, rounds)


def timed(runs: dict[str, Callable[[], Any]], flush: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds on the device of each run, taking turns, each after the L2 was overwritten."""
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [a.elapsed_time(b) / 1e3 for a, b in pairs] for name, pairs in events.items()}


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a large copy on this device."""
    source, goal = torch.empty(2, 2**30, dtype=torch.int8, device=DEVICE)
    times = timed({"copy": lambda: goal.copy_(source)}, torch.empty(1, device=DEVICE), 20)["copy"]
    return 2 * source.nbytes / statistics.median(times)


def extra_memory(loss: Loss, case: Case) -> int:
    """Peak bytes beyond the inputs and the gradient."""
    tensors = case.tensors()
    step(loss, tensors)
    synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(loss, tensors)
    synchronize()
    return torch.cuda.max_memory_allocated() - before - tensors[0].nbytes


def environment() -> dict[str, str]:
    def git(*words: str) -> str:
        command = ["git", "-C", str(RESULTS), *words]
        result = subprocess.run(command, capture_output=True, text=True)
        return result.stdout.strip()

    triton = importlib.util.find_spec("triton")
    return {
        "device": torch.cuda.get_device_name() if GPU else f"CPU ({platform.machine()})",
        "torch": torch.__version__,
        "triton": __import__("triton").__version__ if triton else "",
        "git": git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else ""),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def measure(case: Case, rounds: int, bandwidth: float | None) -> Iterator[dict[str, Any]]:
    """A row for each provider that is right."""
    losses = {name: loss for name, loss in providers(case.link).items() if is_right(loss, case)}
    walls = wall_times(losses, case, rounds)
    devices = device_times(losses, case, rounds) if GPU else {}
    moved = dict(zip(("fwd", "bwd"), case.bytes_moved(), strict=True))

    def device_us(run: str) -> float | str:
        return round(1e6 * statistics.median(devices[run]), 2) if run in devices else ""

    for name, loss in losses.items():
        wall = statistics.quantiles(walls[name], n=10)
        row: dict[str, Any] = case._asdict() | {"provider": name, "bytes": sum(moved.values())}
        row["floor_us"] = round(1e6 * row["bytes"] / bandwidth, 3) if bandwidth else ""
        row["copy_gb_s"] = round(bandwidth / 1e9, 1) if bandwidth else ""
        row["two_launches_us"] = device_us("empty")
        row["wall_us"] = round(1e6 * statistics.median(walls[name]), 2)
        row |= {"wall_us_p20": round(1e6 * wall[1], 2), "wall_us_p80": round(1e6 * wall[7], 2)}
        row["device_us"] = device_us(f"{name} both")
        for way, n_bytes in moved.items():
            took = device_us(f"{name} {way}")
            row[f"{way}_us"] = took
            row[f"{way}_gb_s"] = round(n_bytes / took / 1e3, 1) if isinstance(took, float) else ""
        row["extra_bytes"] = extra_memory(loss, case) if GPU else ""
        yield row


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        if new:
            writer.writeheader()
        writer.writerows(rows)


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """The chosen links over all shapes; and every link at one, for time must not depend on it."""
    for link, shape, pairs, dtypes in itertools.product(
        args.links, args.shapes, args.pairs, args.dtypes
    ):
        for shared in (True, False) if args.stacked else (True,):
            yield Case(link, shape, pairs, *dtypes.split(","), shared)
    if args.every_link:
        for link in LINKS.keys() - PUBLISHED.keys():
            yield Case(link, "sdxl", 4, "fp32", "bf16")


PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"shapes": ["sd15", "sdxl"], "pairs": [1, 4]},
    "full": {"shapes": list(SHAPES), "pairs": [1, 4], "every_link": True, "stacked": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Forward and backward of the losses: eager, torch.compile and fastpref.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--preset", choices=list(PRESETS), default="quick")
    parser.add_argument("--links", nargs="+", choices=list(PUBLISHED), default=list(PUBLISHED))
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES))
    parser.add_argument("--pairs", nargs="+", type=int, help="pairs in a batch")
    parser.add_argument(
        "--dtypes", nargs="+", default=["fp32,fp32", "fp32,bf16", "bf16,bf16"],
        help="of prediction and target",
    )  # fmt: skip
    parser.add_argument("--stacked", action="store_true", help="also targets that are not shared")
    parser.add_argument("--every_link", action="store_true", help="all other links, at one shape")
    parser.add_argument("--rounds", type=int, default=30, help="measurements of each provider")
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    preset = PRESETS[parser.parse_known_args()[0].preset]
    parser.set_defaults(**preset)
    args = parser.parse_args()
    about = environment()
    bandwidth = copy_bandwidth() if GPU else None
    print(f"{about['device']}, torch {about['torch']}, triton {about['triton']}"
          + (f", copies at {bandwidth / 1e9:.0f} GB/s" if bandwidth else ""))  # fmt: skip
    name = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    for case in cases(args):
        rows = [row | about for row in measure(case, args.rounds, bandwidth)]
        append(args.output_dir / f"{name}.csv", rows)
        for row in rows:
            print(LINE.format(**row), flush=True)


if __name__ == "__main__":
    main()
