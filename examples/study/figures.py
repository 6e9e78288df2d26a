"""Figures of the study: what each method paints, its curves, bars with seeds as dots."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image
from torch import Tensor

from study.checks import Best, Row
from study.digits import restyle
from study.methods import describe
from study.runs import SHOWN, World
from trainer.files import write_whole

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

Record = dict[str, Any]  # as `study_runs.execute` gives it
COLORS = ("#7f7f7f", "#1f6fb4", "#c8483c", "#d99a2b", "#7a5aa6", "#3a9a6a", "#a0522d", "#222222")
CURVES = {"mse_w": "winner's error (mse_w)", "mse_l": "loser's error (mse_l)", "margin": "margin"}


def tidy(axes: Axes, title: str, size: int = 9) -> None:
    axes.set_title(title, loc="left", fontsize=size, fontweight="bold")
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def in_decimals(axes: Axes) -> None:
    """A logarithmic axis that says 0.05 and not 5 x 10^-2."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="both", labelsize=7)


def smooth(values: list[float], window: int = 20) -> np.ndarray:
    """Running mean: timesteps differ from step to step, and errors with them."""
    weights = np.ones(min(window, len(values)))
    ones = np.convolve(np.ones(len(values)), weights, "same")
    return np.convolve(np.array(values, dtype=float), weights, "same") / ones


def plot_study(records: list[Record], world: World, best: Best, path: Path) -> None:
    """One figure: above, what each method paints; bars of success and distance; curves below."""
    shown = [r for r in records if r["run"]["steps"] in (0, 200) and _of_table(r, best)]
    styles = list(dict.fromkeys(r["run"]["style"] for r in shown))
    methods = [m for m in dict.fromkeys(r["run"]["method"] for r in shown) if m != "base"]
    figure = plt.figure(figsize=(11, 12.6), constrained_layout=True)
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=(2.6, 2.4, 5.6), squeeze=False)[
        :, 0
    ]
    for axes, style in zip(top.subplots(1, len(styles), squeeze=False)[0], styles, strict=True):
        draw_pictures(axes, [r for r in shown if r["run"]["style"] == style], world, methods, style)
        if style != styles[0]:
            axes.set_yticks([])
    left, right = middle.subplots(1, 2)
    draw_bars(left, shown, "joint", styles, methods)
    draw_bars(right, shown, "frechet", styles, methods)
    tidy(left, "right digit in the right style (1 is best)")
    tidy(right, "Frechet distance to held-out winners (dashed: that of real digits)")
    right.set_yscale("log")
    left.legend(frameon=False, fontsize=7, ncols=3)
    grid = bottom.subplots(len(CURVES), len(styles), squeeze=False, sharex=True)
    for line, (name, title) in zip(grid, CURVES.items(), strict=True):
        for axes, style in zip(line, styles, strict=True):
            draw_curves(axes, [r for r in shown if r["run"]["style"] == style], name, methods)
            tidy(axes, f"{style}: {title}")
    for axes in grid[-1]:
        axes.set_xlabel("step", fontsize=8)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a picture whole or not at all, in few colours: it is to lie in a repository."""
    memory = io.BytesIO()
    figure.savefig(memory, dpi=100)
    plt.close(figure)
    small = io.BytesIO()
    Image.open(memory).convert("RGB").quantize(96).save(small, format="png", optimize=True)
    write_whole(path, small.getvalue())


def _of_table(record: Record, best: Best) -> bool:
    run = record["run"]
    chosen = best.get((run["style"], run["method"]), {})
    return run["method"] == "base" or describe(run["setting"]) == describe(chosen)


def draw_pictures(
    axes: Axes, records: list[Record], world: World, methods: list[str], style: str
) -> None:
    """A line of ten digits for real winners, the base model, and each method's first seed."""
    heldout = world.splits.heldout
    first = [int((heldout.labels == digit).nonzero()[0]) for digit in range(SHOWN)]
    real: Tensor = (restyle(heldout.images[first], style).cpu()[:, 0] + 1) * 127.5
    lines = {"real": real.numpy()}
    for record in records:
        lines.setdefault(record["run"]["method"], np.array(record["pictures"]))
    order = ["real", "base", *methods]
    sheet = np.concatenate([np.concatenate(list(lines[name]), axis=1) for name in order])
    axes.imshow(sheet, cmap="gray_r", vmin=0, vmax=255, interpolation="nearest")
    size = len(sheet) // len(order)
    axes.set_yticks([size * (i + 0.5) for i in range(len(order))], order, fontsize=8)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.set_title(style, loc="left", fontsize=9, fontweight="bold")


def draw_bars(
    axes: Axes, records: list[Record], field: str, styles: list[str], methods: list[str]
) -> None:
    """Means over seeds, each seed a dot; distances have their floor beside them."""
    names = ["base", *methods]
    width = 0.8 / len(names)
    for i, style in enumerate(styles):
        for j, name in enumerate(names):
            values = [
                r["result"][field]
                for r in records
                if (r["run"]["style"], r["run"]["method"]) == (style, name)
            ]
            place = i - 0.4 + width * (j + 0.5)
            label = name if i == 0 else None
            axes.bar(place, np.mean(values), width * 0.9, color=COLORS[j % 8], label=label)
            axes.plot([place] * len(values), values, "k.", markersize=4)
        if field == "frechet":
            floor = next(r["result"]["floor"] for r in records if r["run"]["style"] == style)
            axes.plot([i - 0.4, i + 0.4], [floor, floor], "k--", linewidth=1)
    axes.set_xticks(range(len(styles)), styles)


def draw_curves(axes: Axes, records: list[Record], name: str, methods: list[str]) -> None:
    """A metric of each method's runs, every seed a line; the reference's beside, where known."""
    for record in records:
        history = record["history"]
        if not history:
            continue
        steps = [row["step"] for row in history]
        color = COLORS[(1 + methods.index(record["run"]["method"])) % 8]
        axes.plot(steps, smooth([row[name] for row in history]), color=color, linewidth=0.9)
    referred = next((r for r in records if r["history"] and "ref_mse_w" in r["history"][0]), None)
    if referred and name != "margin":
        history = referred["history"]
        before = smooth([row[f"ref_{name}"] for row in history])
        axes.plot([row["step"] for row in history], before, "k--", linewidth=0.9)
    if name == "margin":
        axes.set_yscale("symlog")
    else:
        in_decimals(axes)


GALLERY_CURVES = ("mse_w", "mse_l", "ref_mse_w", "accuracy", "gradient_factor")


def plot_gallery(panels: list[tuple[str, str, list[Row]]], path: Path) -> None:
    """Curves of runs, each under its title with what `fastpref.health` says of it below."""
    columns = 3
    lines = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        lines * 2, columns, figsize=(11, 4.2 * lines), constrained_layout=True, squeeze=False,
        height_ratios=[2, 1] * lines,
    )  # fmt: skip
    for axes in grid.flat:
        axes.set_axis_off()
    for i, (title, words, history) in enumerate(panels):
        errors = grid[2 * (i // columns), i % columns]
        shares = grid[2 * (i // columns) + 1, i % columns]
        steps = [row["step"] for row in history]
        for j, name in enumerate(GALLERY_CURVES):
            if name in history[0]:
                axes = errors if "mse" in name else shares
                style = "--" if name.startswith("ref") else "-"
                curve = smooth([row[name] for row in history])
                axes.plot(steps, curve, style, color=COLORS[j + 1], linewidth=1.3, label=name)
        in_decimals(errors)
        shares.set_ylim(-0.03, 1.03)
        tidy(errors, title, 7)
        tidy(shares, "")
        shares.set_xlabel(words, fontsize=7)
        for axes in (errors, shares):
            axes.set_axis_on()
            axes.legend(frameon=False, fontsize=6)
    save(figure, path)
