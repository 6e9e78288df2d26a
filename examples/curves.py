"""Knows how a run's metrics are kept on disk and what its curves look like."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, RED, GREY = "#1f6fb4", "#c8483c", "#8a8a8a"
PALE_BLUE, PALE_RED = "#9fc3e3", "#eab3ad"
DARK_BLUE, DARK_RED, OCHRE = "#0b3a66", "#7a1f17", "#d99a2b"


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a hidden path to write to; on success it takes the place of `path` in one rename."""
    aside = path.with_name(f".{path.name}")  # with the same ending, which tells the format
    aside.unlink(missing_ok=True)
    yield aside
    os.replace(aside, path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that was cut off is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def append_metrics(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add rows to a metrics.jsonl."""
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def truncate_metrics(path: Path, step: int) -> None:
    """Keep the rows up to `step`, the one a run goes on from."""
    rows = [row for row in read_metrics(path) if row["step"] <= step]
    with written_whole(path) as aside:
        append_metrics(aside, rows) if rows else aside.touch()


def draw(axes: Axes, steps: np.ndarray, values: np.ndarray, color: str, label: str) -> None:
    """A pale line of the values, and a strong one of their running mean over a twentieth."""
    window = max(1, len(values) // 20)
    axes.plot(steps, values, color=color, alpha=0.22, linewidth=0.8)
    weights = np.ones(window)
    smooth = np.convolve(values, weights, "same") / np.convolve(
        np.ones_like(values), weights, "same"
    )
    axes.plot(steps, smooth, color=color, linewidth=1.8, label=label)


def tidy(axes: Axes, title: str) -> None:
    """Title, x label, a light grid, and no box."""
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def dots(axes: Axes, rows: list[dict[str, Any]], name: str, color: str, label: str) -> None:
    """Held-out values as dots on a line, with standard errors where the rows have them."""
    rows = [row for row in rows if name in row]
    if rows:
        errors = [row.get(f"{name}_se", 0.0) for row in rows]
        axes.errorbar(
            [row["step"] for row in rows], [row[name] for row in rows], errors, color=color,
            fmt="o-", markersize=4, linewidth=1, elinewidth=0.8, label=label,
        )  # fmt: skip


def save_figure(figure: Figure, picture: Path) -> None:
    """Write the figure, whole or not at all, and let go of it."""
    with written_whole(picture) as aside:
        figure.savefig(aside, dpi=130)
    plt.close(figure)


def plot_curves(metrics: Path, picture: Path, title: str = "", heldout: Path | None = None) -> None:
    """Draw loss, errors, margin and accuracy of a metrics.jsonl into `picture`.

    `heldout` is an eval.jsonl, with errors and accuracies on held-out pairs: they become dots.
    """
    rows = read_metrics(metrics)
    if not rows:
        return
    held = read_metrics(heldout) if heldout is not None else []
    column = {name: np.array([row[name] for row in rows], dtype=float) for name in rows[0]}
    steps = column["step"]
    figure, grid = plt.subplots(2, 2, figsize=(9, 5.6), constrained_layout=True)
    draw(grid[0, 0], steps, column["loss"], BLUE, "loss")
    tidy(grid[0, 0], "loss")
    draw(grid[0, 1], steps, column["mse_w"], BLUE, "winner (mse_w)")
    draw(grid[0, 1], steps, column["mse_l"], RED, "loser (mse_l)")
    if "ref_mse_w" in column:
        draw(grid[0, 1], steps, column["ref_mse_w"], PALE_BLUE, "reference on winner")
        draw(grid[0, 1], steps, column["ref_mse_l"], PALE_RED, "reference on loser")
    dots(grid[0, 1], held, "mse_w", DARK_BLUE, "held-out winner")
    dots(grid[0, 1], held, "mse_l", DARK_RED, "held-out loser")
    grid[0, 1].legend(frameon=False, fontsize=8)
    tidy(grid[0, 1], "denoising error")
    draw(grid[1, 0], steps, column["margin"], BLUE, "margin")
    grid[1, 0].axhline(0, color=GREY, linewidth=0.8, linestyle="--")
    tidy(grid[1, 0], "margin (above 0: the preferred one wins)")
    draw(grid[1, 1], steps, column["accuracy"], BLUE, "accuracy")
    dots(grid[1, 1], held, "accuracy", DARK_BLUE, "held-out: mse_w < mse_l")
    dots(grid[1, 1], held, "accuracy_ref", OCHRE, "held-out, against the base")
    if held:
        grid[1, 1].legend(frameon=False, fontsize=8)
    grid[1, 1].axhline(0.5, color=GREY, linewidth=0.8, linestyle="--")
    grid[1, 1].set_ylim(0, 1)
    tidy(grid[1, 1], "accuracy (share of pairs with margin > 0)")
    if title:
        figure.suptitle(title, fontsize=11)
    save_figure(figure, picture)
