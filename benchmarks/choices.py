"""Launch settings side by side: each choice's kernels are captured, and all take turns.

    python benchmarks/choices.py [--choices "BLOCK 512" ...] [--shapes sdxl ...]

Each choice is checked first: the errors and the gradient against the reference in fp64. One that is
wrong or fails is named, not timed, and makes the exit code 1. Appends to
results/choices-<device>.csv, or with --output_dir to a file there. On a CPU, where the kernels run
in Triton's interpreter, choices are checked and nothing is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import fastpref
from bench_loss import RESULTS, append, environment, file_of
from cases import BETA, GPU, SHAPES, TINY, Case, fused, one
from fastpref_kernels import LINKS, launch
from timing import Captured, inputs, passes, timed

# What is undecided: attributes of fastpref_kernels.launch. The first is what they are compared to.
CHOICES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "BLOCK 512": {"BLOCK": 512},
    "BLOCK 2048": {"BLOCK": 2048},
    "MAX_PROGRAMS 512": {"MAX_PROGRAMS": 512},
    "MAX_PROGRAMS 2048": {"MAX_PROGRAMS": 2048},
    "REVERSED": {"REVERSED": True},
    "PAIRS 8": {"PAIRS": 8},
    "PAIRS 1, PARTS 128": {"PAIRS": 1, "PARTS": 128},
    "PAIRS 16, PARTS 16": {"PAIRS": 16, "PARTS": 16},
}
LINKS_TIMED = ("mapo", "dpo_sigmoid")
SIZES = (("sdxl", 4), ("hunyuan720", 4), ("sdxl", 16), ("sdxl", 1))
DTYPES = (("fp32", "bf16"), ("bf16", "bf16"), ("fp32", "fp32"))


def cases(shapes: list[str] | None = None) -> list[Case]:
    """The most telling first: all dtypes at four pairs, the usual ones at other batch sizes."""
    usual, *others = DTYPES
    sizes = [size for size in SIZES if shapes is None or size[0] in shapes]
    sizes += [(TINY, 2)] * (TINY in (shapes or ()))
    found = [Case(link, *size, *usual) for size in sizes for link in LINKS_TIMED]
    found += [
        Case(link, shape, pairs, *dtypes)
        for dtypes in others
        for shape, pairs in sizes
        if pairs == 4
        for link in LINKS_TIMED
    ]
    return found


@contextlib.contextmanager
def chosen(settings: dict[str, Any]) -> Iterator[None]:
    """fastpref_kernels.launch with these attributes; plans from before are not used inside, nor
    those from inside afterwards."""
    with contextlib.ExitStack() as stack:
        stack.callback(forget)
        for name, value in settings.items():
            stack.enter_context(mock.patch.object(launch, name, value))
        forget()
        yield


def forget() -> None:
    for value in list(vars(launch).values()):
        if hasattr(value, "cache_clear"):
            value.cache_clear()


def deviation(case: Case) -> float:
    """How far the kernels' errors and gradient are from the reference's in fp64, in units of what
    is allowed: 1e-5 of an error, which is less than a block's share of it; and of the largest
    gradient 1e-4, or as much as its own dtype rounds off."""

    def of(tensors: tuple[torch.Tensor, ...], impl: Any) -> tuple[torch.Tensor, ...]:
        beta = {"beta": BETA} if LINKS[case.link].score.needs_ref else {}
        out = fastpref.pair_loss(*tensors, link=case.link, impl=impl, **beta)
        (grad,) = torch.autograd.grad(out.loss, tensors[0], one(out.loss.dtype))
        return torch.stack([out.mse_w, out.mse_l]).double(), grad.double()

    tensors = case.tensors()
    exact = tuple(t.detach().double() for t in tensors)
    exact[0].requires_grad_()
    wanted, got = of(exact, "torch"), of(tensors, "triton")
    rounding = max(1e-4, torch.finfo(tensors[0].dtype).eps)
    errors = ((got[0] - wanted[0]).abs() / wanted[0]).max() / 1e-5
    grads = (got[1] - wanted[1]).abs().max() / wanted[1].abs().max() / rounding
    worst = torch.stack([errors, grads]).max().item()
    return worst if worst == worst else float("inf")


def measure(case: Case, names: list[str], rounds: int) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each choice that is right, and a line for each that is not."""
    runs: dict[str, Captured] = {}
    found: list[str] = []
    refused: list[str] = []
    sets, empty_l2 = inputs(case) if GPU else ([], False)
    for name in names:
        try:
            with chosen(CHOICES[name]):
                off = deviation(case)
                if off > 1:
                    refused.append(f"{name}, {case}: off by {off:.3g} times what is allowed")
                    continue
                if GPU:
                    made = passes(fused(case.link, "triton"), sets)
                    runs |= {f"{name} {way}": run for way, run in made.items()}
            found.append(name)
        except Exception as error:  # other choices can still be timed
            refused.append(f"{name}, {case}: {type(error).__name__}: {error}")
    times = timed(runs, rounds, empty_l2) if runs else {}

    def us(name: str, way: str) -> float | str:
        seconds = times.get(f"{name} {way}")
        return round(1e6 * statistics.median(seconds), 2) if seconds else ""

    ways = ("fwd", "bwd", "both")
    rows = [
        {"choice": name, **case._asdict(), **{f"{way}_us": us(name, way) for way in ways}}
        for name in found
    ]
    return rows, refused


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Launch settings side by side.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--choices", nargs="+", choices=list(CHOICES), default=list(CHOICES))
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), help="default: sdxl, hunyuan")
    parser.add_argument("--rounds", type=int, default=20, help="measurements of each choice")
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    about = environment()
    path = args.output_dir / f"choices-{file_of(about['device'])}"
    wrong: list[str] = []
    for case in cases(args.shapes):
        rows, refused = measure(case, args.choices, args.rounds)
        append(path, [row | about for row in rows])
        print(f"{case.link} {case.shape} {case.pairs} {case.pred},{case.target}")
        for row in rows:
            times = " ".join(f"{way} {row[f'{way}_us']:>8}" for way in ("fwd", "bwd", "both"))
            print(f"    {row['choice']:24} {times}", flush=True)
        for line in refused:
            print(f"    {line}", flush=True)
        wrong += refused
        if GPU:
            gc.collect()  # graphs and what they hold
            torch.cuda.empty_cache()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
