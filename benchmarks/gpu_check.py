"""All that a GPU is needed for, in one command that ends in twenty minutes and keeps what it found.

    python benchmarks/gpu_check.py [--steps tests headline ...] [--output_dir gpu-check] [--dry_run]

Needs torch, triton, pytest, numpy, mpmath and hypothesis; takes pytest-xdist, compute-sanitizer and
matplotlib where they are installed. Each step has a time limit, at which it is killed with all that
it started, and none stops the next. Everything is written at once: what was printed to log.txt,
rows to <device>.csv and choices-<device>.csv, and how each step ended to summary.txt, which keeps
the steps of earlier runs. The exit code is 1 if a step failed or ran out of time, and 2 without a
GPU. --dry_run does the least of each step on a CPU, to see that it would run.

Where a command may take ten minutes at most: `--steps tests headline`, `choices sanitizers` and
`suite shapes` take seven each.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PYTEST = [
    sys.executable,
    "-m",
    "pytest",
    "--bare",
    "-p",
    "no:cacheprovider",
    "--durations",
    "5",
    "--tb",
    "short",
]
PASSED, LEFT_OUT, FAILED, LATE, INTERRUPTED, RUNNING = (
    "passed", "left out", "FAILED", "OUT OF TIME", "INTERRUPTED", "running",
)  # fmt: skip


class Command(NamedTuple):
    limit: float  # seconds
    words: list[str]


Step = Callable[["Where"], list[Command]]


class Where(NamedTuple):
    out: Path
    dry: bool = False


def benchmark(limit: float, name: str, *words: str) -> Command:
    return Command(limit, [sys.executable, f"benchmarks/{name}.py", *words])


def tests(where: Where) -> list[Command]:
    return [Command(200, [*PYTEST, "tests/kernels/test_gpu.py"])]


def report(where: Where) -> Command:
    return benchmark(20, "report", str(where.out))


DRY = [
    "--shapes",
    "tiny",
    "--families",
    "tiny",
    "--rounds",
    "1",
    "--links",
    "mapo",
    "--dtypes",
    "fp32,bf16",
    "--providers",
    "eager",
    "fastpref",
]


def headline(where: Where) -> list[Command]:
    words = ["--preset", "headline", "--rounds", "20", "--output_dir", str(where.out)]
    if where.dry:
        words += DRY
    return [benchmark(220, "bench_loss", *words), report(where)]


def choices(where: Where) -> list[Command]:
    words = ["--shapes", "tiny", "--rounds", "1"] if where.dry else []
    return [benchmark(190, "choices", "--output_dir", str(where.out), *words)]


def sanitizers(where: Where) -> list[Command]:
    """The checkers of memory and of races on a few small launches."""
    found = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if where.dry or not found:
        why = "this is a dry run" if where.dry else "compute-sanitizer is not installed"
        say(where.out / "log.txt", f"left out: {why}")
        return []
    selected = "(test_shapes and mapo) or every_loss_is_its_formula and 0.01-dpo"
    families = "kto or rankdpo_4 or dspo or step_dpo or nft"
    selected += f" or published_and_fused_agree and dtypes0 and ({families})"
    files = [
        f"tests/{name}.py"
        for name in ("loss/test_pair_loss", "loss/test_losses", "benchmarks/test_benchmarks")
    ]
    words = [*PYTEST, *files, "-k", selected]
    sanitizer = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", found]
    return [
        Command(85, [*sanitizer, "--tool", tool, "--error-exitcode", "1", *words])
        for tool in ("memcheck", "racecheck")
    ]


def suite(where: Where) -> list[Command]:
    left_out = ("kernels/test_gpu.py", "kernels/test_aot.py", "benchmarks/test_gpu_check.py")
    words = [*PYTEST, "tests", "-q", *[f"--ignore=tests/{name}" for name in left_out]]
    if where.dry:
        words += ["-q", "--collect-only"]
    elif importlib.util.find_spec("xdist"):
        words += ["-n", str(min(16, os.cpu_count() or 1))]
    return [Command(240, words)]


def shapes(where: Where) -> list[Command]:
    words = ["--preset", "full", "--rounds", "10", "--skip_measured"]
    words += ["--providers", "eager", "compile", "fastpref", "floor"]
    if where.dry:
        words = [*DRY, "--pairs", "1", "--skip_measured"]
    words += ["--output_dir", str(where.out)]
    return [benchmark(140, "bench_loss", *words), report(where)]


STEPS: dict[str, Step] = {
    step.__name__: step for step in (tests, headline, choices, sanitizers, suite, shapes)
}


class Summary:
    """A table in a file: step, how it ended, seconds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[str, str] = {}
        if path.exists():
            lines = path.read_text().splitlines()[1:]
            self.lines = {line.split()[0]: line for line in lines if line.strip()}

    def note(self, step: str, ended: str, seconds: float) -> None:
        self.lines[step] = f"{step:12} {ended:12} {seconds:8.1f}"
        new = self.path.with_suffix(".new")
        new.write_text(str(self) + "\n")
        os.replace(new, self.path)

    def __str__(self) -> str:
        return "\n".join([f"{'step':12} {'ended':12} {'seconds':>8}", *self.lines.values()])


def environment(dry: bool) -> dict[str, str]:
    paths = [str(ROOT), *[str(ROOT / name) for name in ("kernels", "tests/helpers", "benchmarks")]]
    paths += [path for path in [os.environ.get("PYTHONPATH")] if path]
    made = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    made["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # a pool of processes takes longer to start
    if dry:
        made |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    return made


@contextlib.contextmanager
def group(command: Command, log: Path, dry: bool) -> Iterator[subprocess.Popen[bytes]]:
    """The command in a process group of its own, of which nothing is left at the end."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            command.words, cwd=ROOT, env=environment(dry), start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run(command: Command, log: Path, dry: bool) -> str:
    """How the command ended; shows what it logs meanwhile."""
    say(log, f"$ {' '.join(command.words)}")
    with log.open("rb") as shown:
        shown.seek(0, os.SEEK_END)

        def show() -> None:
            sys.stdout.write(shown.read().decode(errors="replace"))
            sys.stdout.flush()

        try:
            with group(command, log, dry) as process:
                end = time.monotonic() + command.limit
                while process.poll() is None and time.monotonic() < end:
                    time.sleep(0.1)
                    show()
                code = process.poll()
        except OSError as error:  # a command that is not there
            say(log, str(error))
            return FAILED
        finally:
            show()
    if code is None:
        say(log, f"killed after {command.limit:g} s")
        return LATE
    return FAILED if code else PASSED


def say(log: Path, line: str) -> None:
    with log.open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)


def check(names: Sequence[str], where: Where) -> int:
    """Runs the steps; the exit code."""
    where.out.mkdir(parents=True, exist_ok=True)
    log, summary = where.out / "log.txt", Summary(where.out / "summary.txt")
    log.touch()
    ended: list[str] = []
    for name in names:
        start = time.monotonic()
        outcome = INTERRUPTED
        say(log, f"== {name}")
        summary.note(name, RUNNING, 0.0)
        try:
            outcomes = [run(command, log, where.dry) for command in STEPS[name](where)]
            outcome = next((bad for bad in (LATE, FAILED) if bad in outcomes), PASSED)
            outcome = outcome if outcomes else LEFT_OUT
        finally:
            ended.append(outcome)
            summary.note(name, outcome, time.monotonic() - start)
            say(log, f"{summary}\n")
    return int(not {*ended} <= {PASSED, LEFT_OUT})


def stopped(number: int, frame: object) -> None:
    sys.exit(128 + number)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="All that a GPU is needed for, step by step.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--steps", nargs="+", choices=list(STEPS), default=list(STEPS), metavar="STEP",
        help=f"of {', '.join(STEPS)}",
    )  # fmt: skip
    parser.add_argument("--output_dir", type=Path, default=Path("gpu-check"))
    parser.add_argument("--dry_run", action="store_true", help="the least of each step, on a CPU")
    args = parser.parse_args(argv)
    if not args.dry_run:
        import torch

        if not torch.cuda.is_available():
            print("gpu-check needs a GPU, and PyTorch sees none; --dry_run does without")
            return 2
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stopped)
    return check(args.steps, Where(args.output_dir.resolve(), args.dry_run))


if __name__ == "__main__":
    sys.exit(main())
