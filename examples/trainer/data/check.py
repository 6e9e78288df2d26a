"""A report on a data set before it is trained on: counts, sizes, faults, and a sheet of samples."""

from __future__ import annotations

import re
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from matplotlib import pyplot as plt

from trainer.data.images import Size
from trainer.data.pairs import PreferencePairs, images_of
from trainer.data.sources import settle_ties
from trainer.data.survey import Refused, Survey, called, look_at
from trainer.plots import save_figure

QUANTILES = (0, 5, 25, 50, 75, 95, 100)
TITLES = {"pairs": "winner | loser", "samples": "labels", "lists": "scores, from left to right"}
SETTLED = {
    "drop": "left out",
    "coin": "winner drawn by a coin",
    "keep": "image 0 taken for the winner",
}


def check_data(
    rows: Dataset,
    sizes: Sequence[Size],
    folder: Path,
    *,
    ties: str = "drop",
    seed: int = 0,
    max_samples: int | None = None,
    max_refused: float = 0.01,
    workers: int = 0,
    progress: bool = True,
    samples: int = 12,
    **options: Any,
) -> str:
    """Decode every image of `rows`, as `read_rows` or `read_groups` gives them, and say what there
    is to train on.

    `samples` of them are drawn into data.png in `folder`, as the trainer sees them with `options`,
    those of PreferencePairs.
    """
    lines = [f"rows: {len(rows)}"]
    if options.get("layout", "pairs") == "pairs":
        count = (np.array(rows["label_0"][:], dtype=object) == 0.5).sum()
        lines.append(f"ties: {count}, {SETTLED[ties]} (--ties {ties})")
        settled = settle_ties(rows, ties, seed, max_samples)
    else:
        settled = rows.select(range(min(len(rows), max_samples or len(rows))))
    what = called(rows)
    found = look_at(settled, sizes, np.ones(len(settled), dtype=bool), workers, progress)
    refused = len({image.row for image in found.refused})
    too_many = refused > max_refused * len(settled)
    lines += [
        f"refused: {refused} of {len(settled)} {what} ({refused / len(settled):.2%})",
        *tell_refused(found.refused),
        *(["  more than --max_refused: nothing would be trained"] * too_many),
        f"{what} to train on: {len(found.rows)}",
    ]
    if len(found.rows):
        lines += [*tell_sizes(found, sizes), *tell_rows(found.rows)]
        path = Path(folder) / "data.png"
        pairs = PreferencePairs(found.rows, sizes, found.buckets, seed=seed, **options)
        draw_pairs(pairs, path, samples)
        lines.append(f"samples: {path}")
    return "\n".join(lines)


def tell_refused(refused: Sequence[Refused]) -> list[str]:
    """Each reason, how often it was met, and where first."""
    groups: dict[str, list[Refused]] = defaultdict(list)
    for image in refused:
        groups[re.sub(r"\d+", "N", image.reason)].append(image)
    return [
        f"  {len(images)} image{'s' * (len(images) > 1)}: {images[0].reason}: "
        + "; ".join(image.where for image in images[:3])
        + ("; ..." if len(images) > 3 else "")
        for images in sorted(groups.values(), key=len, reverse=True)
    ]


def tell_sizes(found: Survey, sizes: Sequence[Size]) -> list[str]:
    """How large the images are, and which sizes they are trained at."""
    lines = ["image sizes" + "".join(f"{f'{q} %':>8}" for q in QUANTILES)]
    for name, values in (
        ("height", found.found[:, :, 0]),
        ("width", found.found[:, :, 1]),
        ("aspect", found.found[:, :, 1] / found.found[:, :, 0]),
    ):
        form = ".2f" if name == "aspect" else ".0f"
        lines.append(
            f"  {name:9}" + "".join(f"{q:8{form}}" for q in np.percentile(values, QUANTILES))
        )
    what = called(found.rows)
    if what != "samples":
        differ = (found.found != found.found[:, :1]).any(axis=(1, 2)).sum()
        lines.append(f"{what} whose images differ in size: {differ}")
    target = np.asarray(sizes)[found.buckets]
    enlarged = (target[:, None] > found.found).any(axis=(1, 2)).sum()
    lines.append(f"{what} with an image smaller than it is trained at: {enlarged}")
    lines.append(f"{what} by size (height x width)")
    counts = np.bincount(found.buckets, minlength=len(sizes))
    lines += [
        f"  {f'{height}x{width}':11}{count:8} {count / len(target):8.1%}"
        for (height, width), count in zip(sizes, counts, strict=True)
        if count or len(sizes) == 1
    ]
    return lines


def tell_rows(rows: Dataset) -> list[str]:
    """What labels and scores say, and what the captions are like."""
    if "label_0" in rows.column_names:
        share = np.mean(np.asarray(rows["label_0"][:]) == 1)
        what = "desirable" if called(rows) == "samples" else "image 0 wins"
        preference = f"{what}: {share:.1%}"
    else:
        columns = [f"score_{i}" for i in range(len(images_of(rows.column_names)))]
        scores = np.stack([np.asarray(rows[column][:], dtype=float) for column in columns])
        shares = np.bincount(scores.argmax(axis=0), minlength=len(scores)) / scores.shape[1]
        preference = (
            f"images of a list: {len(scores)}, with scores from {scores.min():g} to "
            f"{scores.max():g}; the best is each by turn in "
            + ", ".join(f"{share:.1%}" for share in shares)
        )
    captions = [caption or "" for caption in rows["caption"][:]]
    empty = sum(not caption.strip() for caption in captions)
    longest = max(captions, key=len)
    return [
        preference,
        f"captions: {len(set(captions))} different, {empty} empty; the longest has {len(longest)} "
        f"characters: {textwrap.shorten(longest, 70)!r}",
    ]


def draw_pairs(pairs: PreferencePairs, path: Path, samples: int = 12) -> None:
    """A sheet of pairs, winner on the left, samples or lists, as the trainer sees them; evenly
    spread."""
    chosen = np.linspace(0, len(pairs) - 1, min(samples, len(pairs))).round().astype(int)
    columns = min(3, len(chosen))
    height = -(-len(chosen) // columns)
    figure, axes = plt.subplots(
        height, columns, figsize=(4.5 * columns, 2.9 * height), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, index in zip(axes.flat, chosen, strict=False):
        pair = pairs[0, int(index)]
        pixels = [value for name, value in pair.items() if name.startswith("pixels_")]
        gap = torch.ones_like(pixels[0][:, :, : max(1, pixels[0].shape[2] // 32)])
        strip = torch.cat([part for each in pixels for part in (gap, each)][1:], dim=2)
        told = [f"{each:g}" for name, each in pair.items() if name.startswith("score_")]
        told = ["desirable" if pair["label"] else "undesirable"] if "label" in pair else told
        axis.imshow((strip.permute(1, 2, 0).numpy() + 1) / 2)
        # A dollar sign would begin a formula.
        caption = textwrap.shorten(" | ".join(pair["captions"]), 90).replace("$", r"\$")
        number = f"{index} ({', '.join(told)}): " if pairs.layout != "pairs" else f"{index}: "
        axis.set_title(number + textwrap.fill(caption, 48), fontsize=8)
    figure.suptitle(TITLES[pairs.layout], fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)
