"""The study of reference mismatch: the runs it takes, what must come out of them, and its table.

    python examples/mismatch_study.py            # 3 styles x 5 methods x 3 seeds; `make study`
    python examples/mismatch_study.py --quick    # one seed, without the longer runs
    python examples/mismatch_study.py --tune     # the trials from which the settings were chosen

Whatever was finished before is not done again; remove the output folder to start afresh.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import textwrap
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastpref.health import health
from study.checks import Best, check, judge_accuracy, report
from study.digits import STYLES
from study.figures import plot_gallery, plot_study
from study.methods import GALLERY, MAIN, METHODS, TUNING_CSV, choose, describe, read_trials
from study.runs import Run, World, execute, load_world, make_base, make_judge
from trainer.entry import Parser
from trainer.files import write_whole

FIELDS = (
    "style", "method", "setting", "seed", "steps", "samples", "joint", "digit", "in_style",
    "frechet", "floor", "diversity", "accuracy", "accuracy_ref", "mse_w", "mse_l", "ref_mse_w",
    "ref_mse_l", "seconds",
)  # fmt: skip


# For the processes, before they load torch: one thread each, and memory that is freed stays at
# hand. By default glibc gives it back after every step; asking again took two fifths of the time.
SPEED = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "30000000",
    "MALLOC_TRIM_THRESHOLD_": "1000000000",
    "MALLOC_TOP_PAD_": "100000000",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the flags; the defaults are `make study`."""
    parser = Parser(
        description="Align a small diffusion model of digits by each loss, and see which one works "
        "as what is preferred lies further from what the model knows.",
    )
    flag = parser.add_argument
    flag("--output_dir", type=Path, default=Path("study"), help="for results, figures and runs/")
    flag("--quick", action="store_true", help="one seed, and no run but the table's")
    flag("--tune", action="store_true", help="do the trials instead, and write tuning.csv")
    flag("--styles", nargs="+", choices=STYLES, default=["none", "thick", "invert"])
    flag("--methods", nargs="+", choices=list(METHODS), default=list(MAIN), metavar="NAME",
         help=f"of {', '.join(METHODS)}")  # fmt: skip
    flag("--trials", type=Path, default=TUNING_CSV, help="that settings are chosen by")
    flag("--seeds", nargs="+", type=int, default=[1, 2, 3], help="of order, timesteps and noise")
    gpu = torch.cuda.is_available()
    flag("--device", default="cuda" if gpu else "cpu")
    flag("--impl", choices=["auto", "triton", "torch"], default="auto", help="as in pair_loss")
    flag("--workers", type=int, default=1 if gpu else min(os.cpu_count() or 1, 8),
         help="processes side by side, of one thread each")  # fmt: skip
    return parser.parse_args(argv)


def plan_study(args: argparse.Namespace, best: Best) -> list[Run]:
    """The table's runs, seed by seed, and the longer one that a check asks for."""
    seeds = args.seeds[:1] if args.quick else args.seeds
    unknown = [(s, m) for s in args.styles for m in args.methods if (s, m) not in best]
    if unknown:
        raise ValueError(f"not tuned: {unknown}; {args.trials} has none of their trials")
    runs = [Run(style, "base", {}, 0, steps=0) for style in args.styles]
    for seed in seeds:
        for style in args.styles:
            runs += [Run(style, name, best[style, name], seed) for name in args.methods]
        if "invert" in args.styles and "MaPO" in args.methods and not args.quick:
            runs.append(Run("invert", "MaPO", best["invert", "MaPO"], seed, steps=600))
    if not args.quick:
        shown = gallery_runs(seeds[0])
        runs += [r for r in shown if r.style in args.styles and r.method in args.methods]
    return list({run.name: run._replace(impl=args.impl) for run in runs}.values())


def gallery_runs(seed: int) -> list[Run]:
    """One run for each picture that `fastpref.health` knows."""
    return [Run(style, method, setting, seed) for style, method, setting in GALLERY.values()]


def plan_tuning(args: argparse.Namespace) -> list[Run]:
    """Every setting once, on a seed and noise that the study does not use, with 300 samples."""
    return [
        Run(style, method, setting, seed=0, samples=300, noise_seed=7, impl=args.impl)
        for style in args.styles
        for method in args.methods
        for setting in METHODS[method].settings
    ]


def carry_out(args: argparse.Namespace, runs: list[Run]) -> list[dict[str, Any]]:
    """Do all runs, side by side; their records in the order that was asked."""
    folder, device = args.output_dir, args.device
    os.environ |= SPEED
    pool = ProcessPoolExecutor(
        args.workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )
    try:
        made = [
            pool.submit(make_base, folder, runs[0].base_steps, device),
            pool.submit(make_judge, folder, runs[0].judge_steps, device),
        ]
        for base_or_judge in made:
            base_or_judge.result()
        futures = {pool.submit(execute, folder, run, device): run for run in runs}
        records: dict[str, dict[str, Any]] = {}
        total = sum(run.passes for run in runs)
        with tqdm(total=total, unit="picture", unit_scale=True, desc=f"{len(runs)} runs") as bar:
            for future in as_completed(futures):
                run = futures[future]
                records[run.name] = future.result()
                bar.set_postfix_str(f"{run.style} {run.method}", refresh=False)
                bar.update(run.passes)
        return [records[run.name] for run in runs]
    finally:
        pool.shutdown(cancel_futures=True)


def to_row(record: dict[str, Any]) -> dict[str, Any]:
    """A record as a line of results.csv."""
    run = Run(**record["run"])
    row = run._asdict() | record["result"] | {"setting": describe(run.setting)}
    return {name: row[name] for name in FIELDS}


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, FIELDS, lineterminator="\n")
    table.writeheader()
    for row in rows:
        table.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})
    write_whole(path, text.getvalue().encode())


def tune(args: argparse.Namespace) -> int:
    """Do the trials, and say what they cost and which settings they choose."""
    began = time.monotonic()
    rows = [to_row(record) for record in carry_out(args, plan_tuning(args))]
    path = args.output_dir / "tuning.csv"
    write_csv(path, rows)
    for (style, method), setting in choose(read_trials(path)).items():
        print(f"{style:8}{method:14}{describe(setting)}")
    spent = sum(row["seconds"] for row in rows)
    print(f"{len(rows)} trials, {spent / 60:.0f} minutes of training on one core, "
          f"{(time.monotonic() - began) / 60:.0f} minutes in all; {path}")  # fmt: skip
    return 0


def draw(records: list[dict[str, Any]], world: World, best: Best, folder: Path) -> None:
    """Write mismatch.png and, of the runs that are there, gallery.png."""
    plot_study(records, world, best, folder / "mismatch.png")
    by_name = {Run(**record["run"])._replace(impl="auto").name: record for record in records}
    panels = []
    for picture, run in zip(GALLERY, gallery_runs(records[-1]["run"]["seed"]), strict=True):
        if run.name in by_name:
            record = by_name[run.name]
            quality = "joint {joint:.2f}, diversity {diversity:.2f}".format(**record["result"])
            said = textwrap.fill(f"{quality}. health: {health(record['history'])}", 62)
            title = f"{picture}\n{run.style}, {run.method}, {describe(run.setting)}"
            panels.append((title, said, record["history"]))
    if panels:
        plot_gallery(panels, folder / "gallery.png")


def study(args: argparse.Namespace) -> int:
    """Do the runs, write results.csv, the table and the figures, and check what came out."""
    began = time.monotonic()
    trials = read_trials(args.trials)
    best = choose(trials)
    runs = plan_study(args, best)
    records = carry_out(args, runs)
    rows = [to_row(record) for record in records]
    write_csv(args.output_dir / "results.csv", rows)
    world = load_world(args.output_dir, runs[0].base_steps, runs[0].judge_steps, args.device)
    findings = check(rows, trials, judge_accuracy(world), best)
    text = report(rows, findings, best)
    write_whole(args.output_dir / "table.txt", f"{text}\n".encode())
    draw(records, world, best, args.output_dir)
    print(f"{text}\n\n{args.output_dir}/ holds results.csv, table.txt, the figures and each run's "
          f"curves under runs/ ({(time.monotonic() - began) / 60:.1f} minutes).")  # fmt: skip
    return int(any(finding.holds is False for finding in findings))


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return tune(args) if args.tune else study(args)
