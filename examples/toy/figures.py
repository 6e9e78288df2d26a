"""The demo's results: a table and bars of scores, and pictures before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from diffusers import AutoPipelineForImage2Image
from matplotlib import pyplot as plt
from PIL import Image

from trainer.data.images import open_image
from trainer.evaluate import Scores
from trainer.plots import BLUE, GREY, OCHRE, save_figure, tidy, write_grid


def score_table(scores: dict[str, Scores]) -> str:
    """Held-out accuracy, margin and errors of each model, with standard errors over pairs."""
    lines = [
        f"{'held-out pairs':18}{'accuracy':>14}{'change':>14}{'margin':>15}{'mse_w':>9}{'mse_l':>9}"
    ]
    before = next(iter(scores.values()))
    for name, score in scores.items():
        mean = score.summary()
        accuracy, margin = mean["accuracy"], mean["margin"]
        change = f"{'':14}"
        if score is not before:
            points, error = score.gain(before)
            change = f"{100 * points:+8.1f} ± {100 * error:.1f}"
        lines.append(
            f"{name:18}{100 * accuracy[0]:8.1f} ± {100 * accuracy[1]:.1f}{change:>14}"
            f"{margin[0]:+9.2f} ± {margin[1]:.2f}{mean['mse_w'][0]:9.4f}{mean['mse_l'][0]:9.4f}"
        )
    return "\n".join(lines)


def plot_scores(scores: dict[str, Scores], picture: Path) -> None:
    """Held-out accuracy of each model: overall with its standard error, and by timestep."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    colors = [GREY, BLUE, OCHRE, "#7a5aa6"]
    for i, (name, score) in enumerate(scores.items()):
        mean, error = score.summary()["accuracy"]
        left.bar(i, mean, yerr=error, color=colors[i], width=0.6, capsize=4)
        left.text(i, mean + error + 0.015, f"{mean:.1%}", ha="center", fontsize=9)
        by_time = score.wins().mean(dim=0)
        times = (np.arange(len(by_time)) + 0.5) * 1000 / len(by_time)
        right.plot(times, by_time, "o-", color=colors[i], label=name, markersize=4)
    left.set_xticks(range(len(scores)), list(scores))
    for axes in (left, right):
        axes.axhline(0.5, color=GREY, linewidth=0.8, linestyle="--")
        axes.set_ylim(0, 1)
    right.legend(frameon=False, fontsize=8)
    tidy(left, "held-out accuracy, ± standard error")
    tidy(right, "by timestep (to the right: more noise)")
    left.set_xlabel("")
    right.set_xlabel("timestep")
    save_figure(figure, picture)


@torch.no_grad()
def repaint(pipeline: Any, images: list[Image.Image], captions: list[str]) -> list[Image.Image]:
    """Half-drown the images in noise and let the pipeline paint them again, from a fixed seed."""
    painter = AutoPipelineForImage2Image.from_pipe(pipeline)
    painter.set_progress_bar_config(disable=True)
    return painter(
        captions,
        image=images,
        strength=0.4,
        num_inference_steps=50,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
    ).images


def plot_grid(
    before: Any,
    after: Any,
    rows: Dataset,
    picture: Path,
    loss: str = "MaPO",
    per_kind: int = 2,
) -> None:
    """Held-out pairs of each kind, and the loser as repainted by the model before and after."""
    winners: list[Image.Image] = []
    losers: list[Image.Image] = []
    captions: list[str] = []
    kinds: list[str] = []
    for row in rows:
        side = 0 if row["label_0"] == 1 else 1
        kind = row[f"model_{1 - side}"]
        if kinds.count(kind) < per_kind:
            winners.append(open_image(row[f"jpg_{side}"], "winner"))
            losers.append(open_image(row[f"jpg_{1 - side}"], "loser"))
            captions.append(row["caption"])
            kinds.append(kind)
    columns = {
        "photograph (winner)": winners,
        "degraded (loser)": losers,
        "loser repainted by the base": repaint(before, losers, captions),
        f"loser repainted after {loss}": repaint(after, losers, captions),
    }
    title = "Held-out photographs, noised to t = 400 and painted again"
    write_grid(columns, kinds, picture, side=128, title=title)
