"""Time, bandwidth and memory of forward and backward of MaPO: the published formula in eager
PyTorch, compiled by torch.compile, and fastpref, beside the floor that the memory system sets.

    python benchmarks/bench_loss.py [--shapes sdxl ...] [--pairs 1 4 ...] [--dtypes fp32,bf16 ...]

Appends a row per provider and case to results/<device>.csv. A provider whose loss or gradient is
wrong is not timed. On a CPU only wall time is measured, and the rows say that it is a CPU.
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
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastpref

RESULTS = Path(__file__).resolve().parent / "results"
SHAPES = {
    "sd15": (4, 64, 64),
    "sdxl": (4, 128, 128),
    "sd3": (16, 128, 128),
    "wan480": (16, 21, 60, 104),
    "hunyuan720": (16, 33, 90, 160),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LINE = (
    "{shape:10} {pairs:3} {pred},{target} {provider:16} wall {wall_us:>9} us  "
    "device {device_us:>8} us  floor {floor_us:>8} us  extra {extra_bytes:>10} B"
)
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
Loss = Callable[[Tensor, Tensor], Tensor]


def published(pred: Tensor, target: Tensor) -> Tensor:
    """MaPO as trainers write it; a target that the pair shares is repeated, as they do."""
    target = target if len(target) == len(pred) else torch.cat([target, target])
    errors = F.mse_loss(pred.float(), target.float(), reduction="none").flatten(1).mean(dim=1)
    w, l = errors.chunk(2)  # noqa: E741
    log_odds = 0.5 * w / (torch.exp(0.5 * w) - 1) - 0.5 * l / (torch.exp(0.5 * l) - 1)
    return w.mean() - (0.1 * F.logsigmoid(1000 * log_odds)).mean()


def fused(pred: Tensor, target: Tensor) -> Tensor:
    return fastpref.mapo_loss(pred, target).loss


def providers() -> dict[str, Loss]:
    torch._dynamo.reset()
    found: dict[str, Loss] = {"eager": published}
    if GPU or importlib.util.find_spec("triton"):
        found["compile"] = torch.compile(published, fullgraph=True)
    if GPU:
        found["reduce-overhead"] = torch.compile(published, mode="reduce-overhead", fullgraph=True)
    return found | {"fastpref": fused}


class Case(NamedTuple):
    """What is measured: `shape` of a sample, pairs, dtypes, and whether pairs share the target."""

    shape: str
    pairs: int
    pred: str
    target: str
    shared: bool

    def tensors(self) -> tuple[Tensor, Tensor]:
        """A prediction that wants a gradient and its target, with errors of 0.25: for much smaller
        ones the published formula is too far off to pass for right."""
        torch.manual_seed(0)
        sample = SHAPES[self.shape]
        target = torch.randn(self.pairs if self.shared else 2 * self.pairs, *sample, device=DEVICE)
        whole = torch.cat([target, target]) if self.shared else target
        pred = whole + 0.5 * torch.randn_like(whole)
        return pred.to(DTYPES[self.pred]).requires_grad_(), target.to(DTYPES[self.target])

    def bytes_moved(self) -> int:
        """The floor: forward reads both tensors; backward reads them and writes the gradient."""
        pred, target = self.tensors()
        return 3 * pred.nbytes + 2 * target.nbytes


def step(loss: Loss, pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if GPU:
        torch.compiler.cudagraph_mark_step_begin()
    value = loss(pred, target)
    return value, torch.autograd.grad(value, pred)[0]


def is_right(loss: Loss, case: Case) -> bool:
    """Whether loss and gradient agree with the reference in fp64."""
    pred, target = case.tensors()
    exact = pred.detach().double().requires_grad_()
    wanted, wanted_grad = step(
        lambda p, t: fastpref.mapo_loss(p, t, impl="torch").loss, exact, target.double()
    )
    value, grad = step(loss, pred, target)
    off = (grad.double() - wanted_grad).abs().max() / wanted_grad.abs().max()
    tolerance = 2e-2 if case.pred != "fp32" else 5e-3  # exp(x) - 1 costs the published formula 2e-3
    return bool((value - wanted).abs() < 5e-3 * wanted.abs() and off < tolerance)


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def wall_times(losses: dict[str, Loss], case: Case, rounds: int) -> dict[str, list[float]]:
    """Seconds of forward and backward from Python, providers taking turns."""
    pred, target = case.tensors()
    times: dict[str, list[float]] = {name: [] for name in losses}
    repeats = 50 if GPU else max(1, 2_000_000 // pred.numel())
    for loss in [*losses.values(), *losses.values()]:  # warm up twice
        step(loss, pred, target)
    for _ in range(rounds):
        for name, loss in losses.items():
            synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                step(loss, pred, target)
            synchronize()
            times[name].append((time.perf_counter() - start) / repeats)
    return times


def device_times(losses: dict[str, Loss], case: Case, rounds: int) -> dict[str, list[float]]:
    """Seconds on the device alone: a captured step replayed with a cold L2."""
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device=DEVICE)
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    for name in losses.keys() - {"reduce-overhead"}:  # which is a graph already
        pred, target = case.tensors()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step(losses[name], pred, target)
        torch.cuda.current_stream().wait_stream(side)
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            step(losses[name], pred, target)
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
    pred, target = case.tensors()
    step(loss, pred, target)
    synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(loss, pred, target)
    synchronize()
    return torch.cuda.max_memory_allocated() - before - pred.nbytes


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
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def measure(case: Case, rounds: int, bandwidth: float | None) -> Iterator[dict[str, Any]]:
    """A row for each provider that is right."""
    losses = {name: loss for name, loss in providers().items() if is_right(loss, case)}
    walls = wall_times(losses, case, rounds)
    devices = device_times(losses, case, rounds) if GPU else {}
    moved = case.bytes_moved()
    floor = {"floor_us": round(1e6 * moved / bandwidth, 3)} if bandwidth else {"floor_us": ""}
    for name, loss in losses.items():
        wall = statistics.quantiles(walls[name], n=10)
        row: dict[str, Any] = case._asdict() | {"provider": name, "bytes": moved} | floor
        row |= {"wall_us": round(1e6 * statistics.median(walls[name]), 2)}
        row |= {"wall_us_p20": round(1e6 * wall[1], 2), "wall_us_p80": round(1e6 * wall[7], 2)}
        device = statistics.median(devices[name]) if name in devices else None
        row["device_us"] = round(1e6 * device, 2) if device else ""
        row["device_gb_s"] = round(moved / device / 1e9, 1) if device else ""
        row["extra_bytes"] = extra_memory(loss, case) if GPU else ""
        yield row


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        if new:
            writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Forward and backward of MaPO: eager, torch.compile and fastpref.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["sd15", "sdxl"])
    parser.add_argument("--pairs", nargs="+", type=int, default=[1, 4], help="pairs in a batch")
    parser.add_argument(
        "--dtypes", nargs="+", default=["fp32,fp32", "fp32,bf16", "bf16,bf16"],
        help="of prediction and target",
    )  # fmt: skip
    parser.add_argument("--stacked", action="store_true", help="also targets that are not shared")
    parser.add_argument("--rounds", type=int, default=30, help="measurements of each provider")
    args = parser.parse_args()
    about = environment()
    bandwidth = copy_bandwidth() if GPU else None
    print(f"{about['device']}, torch {about['torch']}, triton {about['triton']}"
          + (f", copies at {bandwidth / 1e9:.0f} GB/s" if bandwidth else ""))  # fmt: skip
    path = RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', about['device'].lower()).strip('-')}.csv"
    for shape, pairs, dtypes in itertools.product(args.shapes, args.pairs, args.dtypes):
        for shared in (True, False) if args.stacked else (True,):
            pred, target = dtypes.split(",")
            case = Case(shape, pairs, pred, target, shared)
            rows = [row | about for row in measure(case, args.rounds, bandwidth)]
            append(path, rows)
            for row in rows:
                print(LINE.format(**row))


if __name__ == "__main__":
    main()
