"""What guidance by two models does to reward and diversity, on the models of the study.

python examples/guidance_study.py --output_dir study    # 3 aligned models x 3 seeds
"""

from __future__ import annotations

import csv
import io
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor

import fastpref
from fastpref.guidance import AnnealedGuidance, merged_negative
from study.digits import NUM_TRAIN_TIMESTEPS, SIZE, Digits, Model, UNet, paint, restyle
from study.figures import COLORS, in_decimals, save, tidy
from study.judge import assess
from study.methods import DPO, Method, choose, read_trials
from study.mismatch import SPEED
from study.runs import Run, World, align, load_world, make_base, make_judge
from trainer.entry import Parser
from trainer.files import write_whole

STEPS = 25  # of DDIM
TUNED = {"none": ["RankDPO"], "thick": ["MaPO", "DPO"]}  # methods that aligned, by style
NEGATIVE = Method(fastpref.npo_loss, DPO[:1])
FIELDS = ("style", "model", "guidance", "seed", "reward", "joint", "frechet", "diversity")
Row = dict[str, Any]


class Job(NamedTuple):
    """The models of a style and seed, and how they are trained and looked at."""

    style: str
    seed: int
    samples: int = 200
    steps: int = 200
    base_steps: int = 600
    judge_steps: int = 1000


def annealed(tuned: Model, base: Model, guidance: AnnealedGuidance) -> Model:
    def predict(x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        left = (int(timesteps[0]) + 1) * STEPS // NUM_TRAIN_TIMESTEPS
        w = guidance.weight(STEPS - left, STEPS)
        if w in (0.0, 1.0):
            return (tuned if w else base)(x, timesteps, labels)
        return torch.lerp(base(x, timesteps, labels), tuned(x, timesteps, labels), w)

    return predict


def led_away(positive: Model, negative: Model, scale: float) -> Model:
    """Both see the digit: the model was trained without an empty prompt."""

    def predict(x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        away = negative(x, timesteps, labels)
        return away + scale * (positive(x, timesteps, labels) - away)

    return predict


def merged(tuned: UNet, base: UNet, npo: UNet, m: float) -> UNet:
    model = UNet()
    states = (each.state_dict() for each in (tuned, base, npo))
    model.load_state_dict(merged_negative(*states, m=m))
    return model.to(next(base.parameters()).device).requires_grad_(False).eval()


def guided_base(base: UNet, npo: UNet) -> Iterator[tuple[str, Model]]:
    """The base by itself, and away from the negative model."""
    yield "none", base
    for scale in (1.5, 2.0, 3.0):
        yield f"NPO, g {scale:g}", led_away(base, npo, scale)


def guided_tuned(base: UNet, tuned: UNet, npo: UNet) -> Iterator[tuple[str, Model]]:
    """An aligned model by itself, and with all that a second one can do for it."""
    yield "none", tuned
    schedules = {
        "linear": AnnealedGuidance(),
        "power 2": AnnealedGuidance("power", 2),
        "power 4": AnnealedGuidance("power", 4),
        "step .6": AnnealedGuidance("step"),
        "constant .5": AnnealedGuidance(lambda x: 0.5),
        "constant .75": AnnealedGuidance(lambda x: 0.75),
    }
    for name, schedule in schedules.items():
        yield f"annealed, {name}", annealed(tuned, base, schedule)
    for scale in (1.5, 2.0):
        for m in (0.0, 1.0):
            negative = merged(tuned, base, npo, m)
            yield f"NPO, m {m:g}, g {scale:g}", led_away(tuned, negative, scale)
        yield f"from base, g {scale:g}", led_away(tuned, base, scale)


def judged(world: World, model: Model, job: Job) -> dict[str, float]:
    """Painted from the same noise whatever the model and the seed."""
    device = world.splits.heldout.labels.device
    labels = (torch.arange(job.samples) % 10).to(device)
    generator = torch.Generator().manual_seed(100)
    noise = torch.randn(job.samples, 1, SIZE, SIZE, generator=generator).to(device)
    images = paint(model, labels, noise, STEPS)
    heldout = world.splits.heldout
    winners = Digits(restyle(heldout.images, job.style), heldout.labels)
    quality = assess(world.judge, Digits(images, labels), winners, job.style)
    reward = float(world.judge.reward(images, labels, job.style).mean())
    return {"reward": reward, **quality._asdict()}


def do(folder: Path, job: Job, device: str) -> list[Row]:
    """Train the models of a job, and judge all that is made of them."""
    world = load_world(folder, job.base_steps, job.judge_steps, device)
    best = choose(read_trials())

    def trained(name: str, method: Method | None = None) -> UNet:
        setting = method.settings[0] if method else best[job.style, name]
        run = Run(job.style, name, setting, job.seed, job.steps)
        return align(world, run, method)[0].requires_grad_(False).eval()

    npo = trained("NPO", NEGATIVE)
    looked_at = {"base": guided_base(world.base, npo)}
    looked_at |= {n: guided_tuned(world.base, trained(n), npo) for n in TUNED[job.style]}
    return [
        {"style": job.style, "model": name, "guidance": guidance, "seed": job.seed}
        | judged(world, model, job)
        for name, models in looked_at.items()
        for guidance, model in models
    ]


def write_rows(path: Path, rows: list[Row]) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, FIELDS, lineterminator="\n", extrasaction="ignore")
    table.writeheader()
    for row in rows:
        table.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})
    write_whole(path, text.getvalue().encode())


Group = Mapping[str, list[float]]  # values of each measure, one a seed


def over_seeds(rows: list[Row]) -> dict[tuple[str, str, str], Group]:
    """By style, model and guidance."""
    found: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for row in rows:
        group = found.setdefault((row["style"], row["model"], row["guidance"]), {})
        for name in FIELDS[4:]:
            group.setdefault(name, []).append(float(row[name]))
    return {**found}


def table_of(rows: list[Row]) -> str:
    lines = [f"{'style':7}{'model':9}{'guidance':24}" + "".join(f"{f:>16}" for f in FIELDS[4:])]
    for (style, model, guidance), group in over_seeds(rows).items():
        cells = ""
        for name, values in group.items():
            digits = 0 if name == "frechet" else 3
            more = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells += f"{mean(values):.{digits}f}{more}".rjust(16)
        lines.append(f"{style:7}{model:9}{guidance:24}{cells}")
    return "\n".join(lines)


# By how a guidance's name begins: its words in the legend, its colour, and where its name stands.
KINDS = {
    "none": ("without guidance", COLORS[7], (5, 4)),
    "annealed, c": ("both models, w constant", COLORS[0], (5, 0)),
    "annealed": ("annealed", COLORS[1], (-5, -1)),
    "NPO": ("away from the NPO model", COLORS[2], (5, -7)),
    "from base": ("away from the base", COLORS[5], (-5, -8)),
}


def plot(rows: list[Row], path: Path) -> None:
    """Diversity against reward above, distance below; a column for each aligned model."""
    groups = over_seeds(rows)
    columns = dict.fromkeys((style, model) for style, model, _ in groups if model != "base")
    figure, grid = plt.subplots(
        2, len(columns), figsize=(5 * len(columns), 8.5), squeeze=False, constrained_layout=True
    )
    for (top, bottom), (style, model) in zip(grid.T, columns, strict=True):
        shown = {
            (name, guidance): group
            for (of, name, guidance), group in groups.items()
            if of == style and name in ("base", model)
        }
        draw(top, shown, "diversity")
        draw(bottom, shown, "frechet")
        tidy(top, f"{style}, {model} (dots) and base (squares): diversity")
        tidy(bottom, "Frechet distance to held-out winners")
        in_decimals(bottom)
        bottom.set_xlabel("reward (the judge's probability)", fontsize=8)
    grid[0, 0].legend(frameon=False, fontsize=7)
    save(figure, path)


def draw(axes: Axes, shown: dict[tuple[str, str], Group], name: str) -> None:
    """Means over seeds, named; each seed is a small dot."""
    labelled = set()
    for (model, guidance), group in shown.items():
        said, color, place = next(v for k, v in KINDS.items() if guidance.startswith(k))
        axes.plot(group["reward"], group[name], ".", color=color, alpha=0.35, markersize=4)
        marker, label = "s" if model == "base" else "o", None if said in labelled else said
        labelled.add(said)
        x, y = mean(group["reward"]), mean(group[name])
        axes.plot(x, y, marker, color=color, markersize=6, label=label)
        text = model if guidance == "none" else guidance.split(", ", 1)[1]
        side: Any = "left" if place[0] > 0 else "right"
        axes.annotate(text, (x, y), place, textcoords="offset points", fontsize=6, ha=side)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        description="Paint with the study's models, guided by two of them at once.",
    )
    flag = parser.add_argument
    flag("--output_dir", type=Path, default=Path("study"), help="for guidance.csv and .png")
    flag("--styles", nargs="+", choices=list(TUNED), default=list(TUNED))
    flag("--seeds", nargs="+", type=int, default=[1, 2, 3])
    flag("--samples", type=int, default=200, help="pictures that each is judged by")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flag("--workers", type=int, default=1, help="processes side by side, of one thread each")
    args = parser.parse_args(argv)
    began = time.monotonic()
    os.environ |= SPEED
    folder, device = args.output_dir, args.device
    jobs = [Job(style, seed, args.samples) for seed in args.seeds for style in args.styles]
    with ProcessPoolExecutor(
        args.workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        made = [pool.submit(make_base, folder, jobs[0].base_steps, device),
                pool.submit(make_judge, folder, jobs[0].judge_steps, device)]  # fmt: skip
        for each in made:
            each.result()
        futures = [pool.submit(do, folder, job, device) for job in jobs]
        rows = [row for future in futures for row in future.result()]
    write_rows(folder / "guidance.csv", rows)
    plot(rows, folder / "guidance.png")
    print(table_of(rows))
    print(f"{folder}/ holds guidance.csv and guidance.png "
          f"({(time.monotonic() - began) / 60:.1f} minutes)")  # fmt: skip
    return 0
