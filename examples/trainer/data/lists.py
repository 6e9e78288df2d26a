"""Sources of lists: k images of one prompt, with a score for each."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.compute
from datasets import Dataset, Features, LargeList, List, concatenate_datasets
from datasets import Image as ImageFeature

from trainer.data.pairs import read_number
from trainer.data.sources import rename
from trainer.data.tables import PAIR_COLUMNS, Source, absolute, read_raw


def read_lists(source: Source) -> Dataset:
    """Lists of k images: in a column of lists, in k columns, or in rows of one caption."""
    if (source.path / "w").is_dir() or (source.path / "good").is_dir():
        raise source.error("these folders give no scores; need a table with scores, for lists")
    rows, folder = read_raw(source)
    found = rows.column_names
    images = source.told_images
    if not images and {*PAIR_COLUMNS} <= {*found}:
        images = PAIR_COLUMNS
    if not images and {"winner", "loser"} <= {*found}:
        images = ["winner", "loser"]
    images = images or (["images"] if "images" in found else ["image"])
    if len(images) > 1:
        rows = lists_of_columns(absolute(rows, images, folder), images, source)
    else:
        scores = source.score_columns or (["scores"] if images == ["images"] else ["score"])
        if len(scores) != 1:
            raise source.error(
                f"--score_columns are {list(scores)}; need one, as there is one column of images"
            )
        names = {images[0]: "images", scores[0]: "scores", source.caption_column: "caption"}
        rows = rename(absolute(rows, images, folder), names, (), source.name, (*names.values(),))
        if isinstance(rows.features["images"], (List, LargeList)):
            rows = lists_of_lists(rows, images[0], scores[0], source)
        else:
            rows = lists_by_caption(rows, source)
    return scored(rows, source)


def lists_of_columns(rows: Dataset, images: Sequence[str], source: Source) -> Dataset:
    """Lists whose k images and k scores have columns of their own."""
    k = len(images)
    if len(source.score_columns) != k:
        raise source.error(
            f"--score_columns are {list(source.score_columns)} and the images' {list(images)}; "
            "need a score for each image"
        )
    names = {old: f"jpg_{i}" for i, old in enumerate(images)}
    names |= {old: f"score_{i}" for i, old in enumerate(source.score_columns)}
    names[source.caption_column] = "caption"
    canonical = [*(f"jpg_{i}" for i in range(k)), *(f"score_{i}" for i in range(k)), "caption"]
    return rename(rows, names, (), source.name, canonical)


def lists_of_lists(rows: Dataset, image: str, score: str, source: Source) -> Dataset:
    """Lists that are cells: of images, and of scores. The images are stored once more, singly."""
    counts = pyarrow.compute.list_value_length(rows.data.column("images")).to_pylist()
    scores = rows["scores"][:]
    k = source.list_size or counts[0]
    for row, (count, some) in enumerate(zip(counts, scores, strict=True)):
        of_scores = len(some) if isinstance(some, list) else None
        if count != k or of_scores != k:
            raise source.error(
                f"row {row} has {count} images in {image} and {of_scores} scores in {score}; need "
                f"{k} of each, as " + ("--list_size says" if source.list_size else "row 0 has")
            )
    inner = rows.features["images"].feature
    if isinstance(inner, ImageFeature):
        inner = ImageFeature(decode=False)
        rows = rows.cast_column("images", List(inner))
    others = {n: f for n, f in rows.features.items() if n not in ("images", "scores")}

    def spread(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {f"jpg_{i}": [cell[i] for cell in batch["images"]] for i in range(k)}

    rows = rows.map(
        spread, batched=True, batch_size=64, remove_columns=["images", "scores"],
        features=Features({**others, **{f"jpg_{i}": inner for i in range(k)}}), desc="lists",
    )  # fmt: skip
    for i in range(k):
        rows = rows.add_column(f"score_{i}", [some[i] for some in scores])
    return rows


def lists_by_caption(rows: Dataset, source: Source) -> Dataset:
    """Lists of the images that have one caption, in their order; what is left over is left out."""
    k = source.list_size
    if k is None:
        raise source.error("has one image a row; need --list_size, to make lists of one caption's")
    by_caption: dict[Any, list[int]] = defaultdict(list)
    for row, caption in enumerate(rows["caption"][:]):
        by_caption[caption].append(row)
    lists = [
        same[first : first + k]
        for same in by_caption.values()
        for first in range(0, len(same) - k + 1, k)
    ]
    if not lists:
        most = max(map(len, by_caption.values()), default=0)
        raise source.error(f"no caption has {k} images, as --list_size asks; the most are {most}")
    members = np.array(lists)
    if members.size < len(rows):
        warnings.warn(
            f"dataset_name={source.name!r}: {len(rows) - members.size} of {len(rows)} images are "
            f"left over from lists of {k}, and are not trained on",
            stacklevel=2,
        )
    scores = rows["scores"][:]
    columns = [rows.select_columns(["caption"]).select(members[:, 0])]
    for i in range(k):
        column = rows.select_columns(["images"]).rename_column("images", f"jpg_{i}")
        columns.append(column.select(members[:, i]))
    lists_of = concatenate_datasets(columns, axis=1)
    for i in range(k):
        lists_of = lists_of.add_column(f"score_{i}", [scores[row] for row in members[:, i]])
    return lists_of


def scored(rows: Dataset, source: Source) -> Dataset:
    """The lists, if each has scores and some tell their images apart."""
    k = sum(name.startswith("score_") for name in rows.column_names)
    if not 2 <= k <= 16:
        raise source.error(f"lists have {k} images; need 2 to 16")
    scores = np.array(
        [
            [read_number(cell, f"row {row}, column score_{i}") for row, cell in enumerate(column)]
            for i in range(k)
            for column in [rows[f"score_{i}"][:]]
        ]
    )
    if (scores == scores[0]).all():
        raise source.error("the scores of every list are all the same; need some that differ")
    return rows


def check_shares(rows: Dataset, loss: str) -> None:
    """Raise a ValueError for a score that is no share, from 0 to 1."""
    for column in sorted(name for name in rows.column_names if name.startswith("score_")):
        for row, score in enumerate(rows[column][:]):
            if not 0 <= score <= 1:
                raise ValueError(
                    f"row {row}, column {column}: it holds {score:g}; --loss {loss} needs scores "
                    "from 0 to 1, such as fastpref.preferences.win_fractions gives"
                )
