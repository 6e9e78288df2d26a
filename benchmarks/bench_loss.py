"""Time, bandwidth and memory of forward and backward of the losses: as trainers write them in eager
PyTorch, compiled by torch.compile, and by fastpref, beside the floor that the memory system sets.

    python benchmarks/bench_loss.py [--preset quick|headline|full] [--providers eager ...]
        [--links kto ...] [--shapes sdxl ...] [--families wan480 ...] [--pairs 1 4 ...]

Appends a row per provider and case to results/<device>.csv, or with --output_dir to a file there,
the cases that say most first. A provider whose loss or gradient is wrong is not timed. On a CPU
only wall time is measured, and the rows say that it is a CPU. `python benchmarks/report.py` draws
and tabulates them.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gc
import hashlib
import importlib.util
import io
import itertools
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cases import (
    DEVICE,
    FAMILIES,
    FLOOR,
    GPU,
    PROVIDERS,
    PUBLISHED,
    SHAPES,
    TINY,
    VIDEO,
    Case,
    Loss,
    is_right,
    providers,
    step,
    synchronize,
)
from fastpref_kernels import LINKS
from timing import Captured, captured, copy_bandwidth, inputs, passes, timed

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LINE = (
    "{link:13} {shape:10} {pairs:3} {pred},{target} {provider:16} wall {wall_us:>9} us  "
    "device {fwd_us:>8} + {bwd_us:>8} us  floor {floor_us:>8} us  extra {extra_bytes:>10} B"
)


def wall_times(losses: dict[str, Loss], case: Case, rounds: int) -> dict[str, list[float]]:
    """Seconds of forward and backward from Python, providers taking turns."""
    tensors = case.tensors()
    times: dict[str, list[float]] = {name: [] for name in losses}

    def took(loss: Loss, repeats: int) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            step(loss, tensors)
        synchronize()
        return (time.perf_counter() - start) / repeats

    for loss in losses.values():
        took(loss, 2)
    repeats = {
        name: round(min(max(0.03 / took(loss, 3), 3), 1000)) for name, loss in losses.items()
    }
    for _ in range(rounds):
        for name, loss in losses.items():
            times[name].append(took(loss, repeats[name]))
    return times


def device_times(
    losses: dict[str, Loss], case: Case, rounds: int, floor: bool
) -> dict[str, list[float]]:
    """Seconds on the device alone of "<provider> fwd", "bwd" and "both", with a cold L2; and of
    "empty": two kernels that do next to nothing. After a forward, the backward of "both" may find
    in the L2 what it left there, as in training."""
    tiny = torch.zeros(1, device=DEVICE)

    def empty() -> None:
        tiny.zero_()
        tiny.add_(1)

    sets, empty_l2 = inputs(case)
    runs: dict[str, Captured] = {"empty": captured([empty] * 20)}
    captures = {
        name: partial(passes, loss, sets)
        for name, loss in losses.items()
        if name != "reduce-overhead"  # which is a graph already
    }
    if floor:
        captures[FLOOR] = partial(floor_passes, case, sets)
    for name, capture in captures.items():
        try:
            runs |= {f"{name} {way}": run for way, run in capture().items()}
        except Exception as error:  # what else there is to measure counts more
            complain(name, case, f"cannot be captured: {error}")
    return timed(runs, rounds, empty_l2)


COMPLAINTS: list[str] = []


def complain(name: str, case: Case, what: str) -> None:
    COMPLAINTS.append(f"{name}, {' '.join(map(str, case))}: {what}")
    print(COMPLAINTS[-1], flush=True)


def right(losses: dict[str, Loss], case: Case) -> dict[str, Loss]:
    found: dict[str, Loss] = {}
    for name, loss in losses.items():
        try:
            if is_right(loss, case):
                found[name] = loss
            else:
                complain(name, case, "loss or gradient is wrong: not timed")
        except Exception as error:
            complain(name, case, f"fails: {error}")
    return found


def floor_passes(case: Case, sets: list[tuple[torch.Tensor, ...]]) -> dict[str, Captured]:
    import floors  # here, because Triton is not everywhere

    read = partial(floors.read, members=case.members)
    write = partial(floors.write, members=case.members, drifting=case.drifting)

    def backward(pred: torch.Tensor, target: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return write(pred, target, *(others[i] for i in case.again))

    def both(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return read(*tensors), backward(*tensors)

    large = [tensors[: case.large] for tensors in sets]  # without labels and scores
    with torch.no_grad():
        return {
            way: captured([partial(run, *tensors) for tensors in large])
            for way, run in (("fwd", read), ("bwd", backward), ("both", both))
        }


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
    """What a row says of where it was measured; "git" is empty outside of a repository."""

    def git(*words: str) -> str:
        if shutil.which("git") is None:
            return ""
        command = ["git", "-C", str(RESULTS.parent), *words]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    triton = importlib.util.find_spec("triton")
    commit = git("rev-parse", "--short", "HEAD")
    return {
        "device": torch.cuda.get_device_name() if GPU else f"CPU ({platform.machine()})",
        "torch": torch.__version__,
        "triton": __import__("triton").__version__ if triton else "",
        "git": commit + "+" * bool(commit and git("status", "--porcelain")),
        "source": source(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def source() -> str:
    """A digest of the package's code, which says more than "git" of a changed or copied tree."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("fastpref/**/*.py"), *ROOT.glob("kernels/**/*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def file_of(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".csv"


def measure(
    case: Case, rounds: int, bandwidth: float | None, names: Collection[str] = PROVIDERS
) -> Iterator[dict[str, Any]]:
    """A row for each provider that is right, and one for the floor."""
    losses = right(providers(case.link, names), case)
    walls = wall_times(losses, case, rounds)
    floor = GPU and FLOOR in names
    devices = device_times(losses, case, rounds, floor) if GPU else {}
    moved = dict(zip(("fwd", "bwd"), case.bytes_moved(), strict=True))

    def device_us(run: str) -> float | str:
        return round(1e6 * statistics.median(devices[run]), 2) if run in devices else ""

    for name in [*losses, *[FLOOR] * floor]:
        row: dict[str, Any] = case._asdict() | {"provider": name, "bytes": sum(moved.values())}
        row |= {"family": case.family.kind if case.family else "pairs", "members": case.members}
        row["floor_us"] = round(1e6 * row["bytes"] / bandwidth, 3) if bandwidth else ""
        row["copy_gb_s"] = round(bandwidth / 1e9, 1) if bandwidth else ""
        row["two_launches_us"] = device_us("empty")
        for column, share in (("wall_us", 0.5), ("wall_us_p20", 0.2), ("wall_us_p80", 0.8)):
            row[column] = round(1e6 * np.quantile(walls[name], share), 2) if name in walls else ""
        row["device_us"] = device_us(f"{name} both")
        for way, n_bytes in moved.items():
            took = device_us(f"{name} {way}")
            row[f"{way}_us"] = took
            row[f"{way}_gb_s"] = round(n_bytes / took / 1e3, 1) if isinstance(took, float) else ""
        row["extra_bytes"] = extra_memory(losses[name], case) if GPU and name in losses else ""
        yield row


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Adds rows to a table, at once; columns that are new to it are added to what it has."""
    if not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    before: list[dict[str, Any]] = []
    columns: list[str] = []
    if path.exists():
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            before, columns = list(reader), list(reader.fieldnames or [])
    known = dict.fromkeys([*columns, *itertools.chain.from_iterable(rows)])
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(known), restval="")
    if list(known) == columns:
        writer.writerows(rows)
        with path.open("a", newline="") as file:
            file.write(text.getvalue())
        return
    writer.writeheader()
    writer.writerows([*before, *rows])
    new = path.with_name(f"{path.name}.new")
    new.write_text(text.getvalue(), newline="")
    os.replace(new, path)


KEYS = ("source", "device", "torch", "triton", *Case._fields)


def measured(path: Path) -> set[tuple[str, ...]]:
    """The cases that a file has rows of, by KEYS; a case's rows are added together."""
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        return {tuple(row.get(key) or "" for key in KEYS) for row in csv.DictReader(file)}


def cases(args: argparse.Namespace) -> list[Case]:
    """The chosen links over all shapes; the families beyond them, and every link, at few, for time
    must not depend on it."""
    usual = DTYPES[0].split(",")
    found = [
        Case(link, shape, pairs, *dtypes.split(","), shared)
        for dtypes, pairs, shape, link in itertools.product(
            args.dtypes, args.pairs, args.shapes, args.links
        )
        for shared in ways(link, args.stacked)
    ]
    found += [
        Case(link, shape, 4, *usual, FAMILIES[link].shared)
        for shape, link in itertools.product(args.families, FAMILIES)
    ]
    if args.every_link:
        others = sorted(LINKS.keys() - PUBLISHED.keys())
        found += [Case(link, "sdxl", 4, *usual) for link in others]

    def rank(case: Case) -> tuple[bool, bool, int, bool]:
        """What can be spared last: targets of one's own, families, and dtypes at the end of the
        list."""
        dtypes = f"{case.pred},{case.target}"
        of_dtypes = args.dtypes.index(dtypes) if dtypes in args.dtypes else 0
        stacked = not case.shared and not case.family
        return stacked, bool(case.family), of_dtypes, case.link not in PUBLISHED

    return sorted(dict.fromkeys(found), key=rank)


def ways(link: str, stacked: bool) -> tuple[bool, ...]:
    """Whether a target is shared, in the cases of a link."""
    if link in FAMILIES:
        return (FAMILIES[link].shared,)
    return (True, False) if stacked else (True,)


DTYPES = ["fp32,bf16", "bf16,bf16", "fp32,fp32"]  # of prediction and target, the usual first
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"shapes": ["sd15", "sdxl"], "pairs": [1, 4], "families": [VIDEO]},
    "headline": {
        "shapes": ["sdxl", "hunyuan720"],
        "pairs": [4],
        "families": ["wan480"],
        "dtypes": DTYPES[:2],
        "providers": [name for name in PROVIDERS if name != "reduce-overhead"],
    },
    "full": {
        "shapes": [shape for shape in SHAPES if shape not in (TINY, VIDEO)],
        "pairs": [4, 1],
        "families": ["wan480", "sdxl"],
        "every_link": True,
        "stacked": True,
    },
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Forward and backward of the losses: eager, torch.compile and fastpref.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--preset", choices=list(PRESETS), default="quick")
    links = [*PUBLISHED, *FAMILIES]
    parser.add_argument("--links", nargs="+", choices=links, default=list(PUBLISHED))
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES))
    parser.add_argument(
        "--families", nargs="*", choices=list(SHAPES), metavar="SHAPE",
        help="shapes at which to measure every loss that is not a pair's link",
    )  # fmt: skip
    parser.add_argument(
        "--pairs", nargs="+", type=int, help="pairs in a batch, or lists, or half the samples"
    )
    parser.add_argument(
        "--dtypes", nargs="+", default=DTYPES, help="of prediction and target, joined by a comma"
    )
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--stacked", action="store_true", help="also targets that are not shared")
    parser.add_argument("--every_link", action="store_true", help="all other links, at one shape")
    parser.add_argument("--rounds", type=int, default=30, help="measurements of each provider")
    parser.add_argument(
        "--skip_measured", action="store_true", help="leave out what the file has of this code"
    )
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    preset = PRESETS[parser.parse_known_args(argv)[0].preset]
    parser.set_defaults(**preset)
    args = parser.parse_args(argv)
    COMPLAINTS.clear()
    about = environment()
    bandwidth = copy_bandwidth() if GPU else None
    print(f"{about['device']}, torch {about['torch']}, triton {about['triton']}"
          + (f", copies at {bandwidth / 1e9:.0f} GB/s" if bandwidth else ""))  # fmt: skip
    path = args.output_dir / file_of(about["device"])
    done = measured(path) if args.skip_measured else set()
    for case in cases(args):
        if (*[about[name] for name in KEYS[:4]], *map(str, case)) in done:
            continue
        try:
            rows = [row | about for row in measure(case, args.rounds, bandwidth, args.providers)]
        except Exception as error:
            complain("all", case, f"cannot be measured: {error}")
            continue
        append(path, rows)
        for row in rows:
            print(LINE.format(**row), flush=True)
        if GPU:
            gc.collect()  # graphs and what they hold
            torch.cuda.empty_cache()
    return 1 if COMPLAINTS else 0


if __name__ == "__main__":
    sys.exit(main())
