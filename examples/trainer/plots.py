"""Curves of a run, and grids of pictures."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from trainer.files import whole_file
from trainer.metrics import read_metrics

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, RED, GREY = "#1f6fb4", "#c8483c", "#8a8a8a"
PALE_BLUE, PALE_RED = "#9fc3e3", "#eab3ad"
DARK_BLUE, DARK_RED, OCHRE = "#0b3a66", "#7a1f17", "#d99a2b"
MARGIN = 8  # pixels between the parts of a grid
LABEL_WIDTH = 220


def draw(axes: Axes, rows: list[dict[str, Any]], name: str, color: str, label: str) -> None:
    """A pale line of the values that the rows have, and a strong one of their running mean over a
    twentieth."""
    rows = [row for row in rows if name in row]
    if not rows:
        return
    steps, values = (np.array([row[key] for row in rows], dtype=float) for key in ("step", name))
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
    with whole_file(picture) as aside:
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
    figure, grid = plt.subplots(2, 2, figsize=(9, 5.6), constrained_layout=True)
    draw(grid[0, 0], rows, "loss", BLUE, "loss")
    tidy(grid[0, 0], "loss")
    draw_errors(grid[0, 1], rows, held)
    draw_margin(grid[1, 0], rows)
    draw(grid[1, 1], rows, "accuracy", BLUE, "accuracy")
    dots(grid[1, 1], held, "accuracy", DARK_BLUE, "held-out: mse_w < mse_l")
    dots(grid[1, 1], held, "accuracy_ref", OCHRE, "held-out, against the base")
    if held:
        grid[1, 1].legend(frameon=False, fontsize=8)
    grid[1, 1].axhline(0.5, color=GREY, linewidth=0.8, linestyle="--")
    grid[1, 1].set_ylim(0, 1)
    what = "pairs" if "mse_w" in rows[0] else "samples or lists"
    tidy(grid[1, 1], f"accuracy (share of {what} with margin > 0)")
    if title:
        figure.suptitle(title, fontsize=11)
    save_figure(figure, picture)


def draw_errors(axes: Axes, rows: list[dict[str, Any]], held: list[dict[str, Any]]) -> None:
    """The errors of winners and losers, or of all samples."""
    draw(axes, rows, "mse_w", BLUE, "winner (mse_w)")
    draw(axes, rows, "mse_l", RED, "loser (mse_l)")
    draw(axes, rows, "ref_mse_w", PALE_BLUE, "reference on winner")
    draw(axes, rows, "ref_mse_l", PALE_RED, "reference on loser")
    draw(axes, rows, "error", BLUE, "all images")
    draw(axes, rows, "ref_error", PALE_BLUE, "reference on all images")
    dots(axes, held, "mse_w", DARK_BLUE, "held-out winner")
    dots(axes, held, "mse_l", DARK_RED, "held-out loser")
    axes.legend(frameon=False, fontsize=8)
    tidy(axes, "denoising error")


def draw_margin(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """The margin; of samples with labels, how either kind's error has changed."""
    axes.axhline(0, color=GREY, linewidth=0.8, linestyle="--")
    if any("drop_desirable" in row for row in rows):
        draw(axes, rows, "drop_desirable", BLUE, "desirable")
        draw(axes, rows, "drop_undesirable", RED, "undesirable")
        axes.legend(frameon=False, fontsize=8)
        tidy(axes, "error above the reference's (below 0: better)")
        return
    draw(axes, rows, "margin", BLUE, "margin")
    tidy(axes, "margin (above 0: the preferred one wins)")


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """The font that comes with matplotlib: Latin, Greek, Cyrillic and more."""
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)


def wrap(text: str, width: int, size: int) -> list[str]:
    """The text in lines of at most `width` pixels; a word longer than that is broken."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if font(size).getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font(size).getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def write_text(
    draw: ImageDraw.ImageDraw, text: str, box: tuple[int, int, int, int], size: int = 14
) -> None:
    """Write the text into the middle of the box: left, top, width, height; what is too long ends
    in dots."""
    left, top, width, height = box
    lines = wrap(text, width, size)
    most = max(1, height // (size + 4))
    if len(lines) > most:
        lines = lines[:most]
        while font(size).getlength(f"{lines[-1]}…") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] += "…"
    top += (height - len(lines) * (size + 4)) // 2
    for i, line in enumerate(lines):
        draw.text((left, top + i * (size + 4)), line, fill="black", font=font(size))


def resize(image: Image.Image, side: int) -> Image.Image:
    """The image, its longer side reduced to `side`, or enlarged by a whole number to show pixels
    as they are."""
    longer = max(image.size)
    if longer > side:
        width, height = (max(1, round(length * side / longer)) for length in image.size)
        return image.resize((width, height), Image.Resampling.LANCZOS)
    width, height = (length * (side // longer) for length in image.size)
    return image.resize((width, height), Image.Resampling.NEAREST)


def write_grid(
    columns: Mapping[str, Sequence[Image.Image]],
    prompts: Sequence[str],
    path: Path,
    side: int = 512,
    title: str = "",
) -> None:
    """Write a picture of all images, a row for each prompt and a column for each name.

    Images have at most `side` pixels a side in it.
    """
    for name, images in columns.items():
        if len(images) != len(prompts):
            raise ValueError(
                f"column {name!r} has {len(images)} images; need {len(prompts)}, one a prompt"
            )
    if not columns or not prompts:
        raise ValueError(f"{len(columns)} columns of {len(prompts)} prompts; need 1 or more each")
    rows = [
        [resize(image.convert("RGB"), side) for image in row]
        for row in zip(*columns.values(), strict=True)
    ]
    width = max(image.width for row in rows for image in row)
    lefts = [LABEL_WIDTH + 2 * MARGIN + i * (width + MARGIN) for i in range(len(columns))]
    whole = lefts[-1] + width + MARGIN
    titles = 18 * max(len(wrap(name, width, 14)) for name in columns)
    # Every row has room for three lines of its prompt.
    heights = [max(54, *(image.height for image in row)) for row in rows]
    top = MARGIN + (26 + MARGIN if title else 0)
    grid = Image.new(
        "RGB", (whole, top + titles + sum(heights) + MARGIN * (len(rows) + 1)), "white"
    )
    draw = ImageDraw.Draw(grid)
    if title:
        write_text(draw, title, (MARGIN, MARGIN, whole - 2 * MARGIN, 26), size=18)
    for left, name in zip(lefts, columns, strict=True):
        write_text(draw, name, (left, top, width, titles))
    top += titles + MARGIN
    for row, prompt, height in zip(rows, prompts, heights, strict=True):
        write_text(draw, prompt, (MARGIN, top, LABEL_WIDTH, height))
        for left, image in zip(lefts, row, strict=True):
            grid.paste(image, (left + (width - image.width) // 2, top))
        top += height + MARGIN
    write_image(grid, path)


def write_image(image: Image.Image, path: Path) -> None:
    """Write the image, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as aside:
        image.save(aside)
