"""Sources of samples with labels, and of lists with scores.

Whatever they come from, rows have images jpg_0, jpg_1, ... (a sample one, a list k) and a caption;
a sample has label_0, 1 or 0, a list score_0, score_1, ...; a sample may have score_0 too.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from datasets import Dataset, Features, LargeList, List, concatenate_datasets
from datasets import Image as ImageFeature

from trainer.data.pairs import COLUMNS, ROW, Layout, read_number
from trainer.data.sources import (
    images_in,
    parse_table,
    read_captions,
    read_rows,
    read_stored,
    rename,
    settled,
)

PAIR_COLUMNS = ["jpg_0", "jpg_1"]  # what --image_columns is unless it is given


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set, and the flags that say what is in its columns."""

    name: str
    split: str = "train"
    cache_dir: str | None = None
    image_columns: Sequence[str] = tuple(PAIR_COLUMNS)
    label_column: str = "label_0"
    caption_column: str = "caption"
    score_columns: Sequence[str] = ()
    label_threshold: float | None = None
    list_size: int | None = None
    ties: str = "drop"
    seed: int = 0

    @property
    def path(self) -> Path:
        return Path(self.name).expanduser()

    @property
    def told_images(self) -> list[str]:
        """The image columns that were given."""
        given = list(self.image_columns)
        return [] if given == PAIR_COLUMNS else given

    def error(self, what: str) -> ValueError:
        return ValueError(f"dataset_name={self.name!r}: {what}")


def read_groups(layout: Layout, source: Source) -> Dataset:
    """The samples or lists of a source."""
    rows = read_lists(source) if layout == "lists" else read_samples(source)
    if not len(rows):
        raise source.error(f"no {layout[:-1]} to train on")
    known = [f"{kind}_{i}" for i in range(16) for kind in ("jpg", "score")]
    known += ["caption", ROW] if layout == "lists" else ["caption", ROW, "label_0"]
    rows = rows.select_columns([column for column in rows.column_names if column in known])
    return rows if ROW in rows.column_names else rows.add_column(ROW, np.arange(len(rows)))


# Samples.


def read_samples(source: Source) -> Dataset:
    """Single images: of a folder with good/ and bad/, of a table with one a row, or of pairs, whose
    winners are desirable."""
    if (source.path / "good").is_dir() or (source.path / "bad").is_dir():
        if source.label_threshold is not None:
            raise source.error("good/ and bad/ have no scores, for --label_threshold; need a table")
        return Dataset(read_good_and_bad(source))
    if (source.path / "w").is_dir() or (source.path / "l").is_dir():
        return samples_of_pairs(source)
    rows, folder = read_raw(source)
    if len(source.told_images) > 1 or are_pairs(rows):
        return samples_of_pairs(source)
    (image,) = source.told_images or ["image"]
    rows = absolute(rows, [image], folder)
    if source.label_threshold is None:
        rows, labels = labelled(rows, image, source)
    else:
        rows, labels = labelled_by_score(rows, image, source, source.label_threshold)
    rows = rows.remove_columns([name for name in rows.column_names if name == "label_0"])
    return both_kinds(rows.add_column("label_0", labels), source)


def labelled(rows: Dataset, image: str, source: Source) -> tuple[Dataset, list[float]]:
    """The samples under canonical names, and the labels that their column has."""
    found, label = rows.column_names, source.label_column
    if label == "label_0" and label not in found:
        label = "label"
    if label not in found and "score" in found:
        raise source.error(f"has a column 'score' and none {label!r}; need --label_threshold too")
    names = {image: "jpg_0", label: "label_0", source.caption_column: "caption"}
    rows = rename(rows, names, (), source.name, ("jpg_0", "label_0", "caption"))
    cells = rows["label_0"][:]
    return rows, [read_label(cell, f"row {i}, column {label}") for i, cell in enumerate(cells)]


def labelled_by_score(
    rows: Dataset, image: str, source: Source, threshold: float
) -> tuple[Dataset, list[float]]:
    """The samples under canonical names with score_0, and whether each reaches the threshold."""
    if len(source.score_columns) > 1:
        raise source.error(f"--score_columns are {list(source.score_columns)}; need one")
    score = source.score_columns[0] if source.score_columns else "score"
    names = {image: "jpg_0", score: "score_0", source.caption_column: "caption"}
    rows = rename(rows, names, (), source.name, ("jpg_0", "score_0", "caption"))
    cells = rows["score_0"][:]
    scores = [read_number(cell, f"row {i}, column {score}") for i, cell in enumerate(cells)]
    return rows, [float(each >= threshold) for each in scores]


def read_label(cell: Any, where: str) -> float:
    """A cell that says whether a sample is desirable."""
    if isinstance(cell, str) or cell not in (0, 1):
        raise ValueError(
            f"{where}: need true or false, or 1 or 0; it holds {cell!r}. A score becomes a label "
            "by --score_columns and --label_threshold"
        )
    return float(cell)


def both_kinds(rows: Dataset, source: Source) -> Dataset:
    """The samples, if some are desirable and some are not."""
    labels = set(rows["label_0"][:])
    if len(labels) == 1:
        limit = source.label_threshold
        by = "" if limit is None else f" by --label_threshold {limit:g}"
        raise source.error(
            f"all {len(rows)} labels are {labels.pop():g}{by}; need desirable samples and "
            "undesirable ones"
        )
    return rows


def read_good_and_bad(source: Source) -> pa.Table:
    """The images of good/ and bad/, each with a caption of its own."""
    columns: dict[str, list[Any]] = {"jpg_0": [], "label_0": [], "caption": []}
    for side, other, label in (("good", "bad", 1.0), ("bad", "good", 0.0)):
        images = images_in(source.path / side) if (source.path / side).is_dir() else {}
        if not images:
            raise source.error(f"no image in {side}/; need some in good/ and some in bad/")
        stems = sorted(images)
        columns["jpg_0"] += [str(images[stem].absolute()) for stem in stems]
        columns["label_0"] += [label] * len(stems)
        columns["caption"] += read_captions(source.path, stems, side, other)
    return pa.table(columns)


def are_pairs(rows: Dataset) -> bool:
    """Whether these are pairs under their usual names."""
    found = {*rows.column_names}
    return {*COLUMNS[:3]} <= found or {"winner", "loser"} <= found


def samples_of_pairs(source: Source) -> Dataset:
    """Both images of each pair as samples, the winner a desirable one; of row n, 2n and 2n + 1."""
    if source.label_threshold is not None and len(source.score_columns) != 2:
        raise source.error(
            f"--label_threshold came, and --score_columns are {list(source.score_columns)}; of "
            "pairs, need two, of jpg_0 and jpg_1"
        )
    rows = read_rows(
        source.name, source.split, source.cache_dir, source.score_columns,
        image_columns=source.image_columns, label_column=source.label_column,
        caption_column=source.caption_column,
    )  # fmt: skip
    labels = [settled(label, row, source.ties, source.seed)
              for row, label in enumerate(rows["label_0"][:])]  # fmt: skip
    kept = [row for row, label in enumerate(labels) if label is not None]
    halves = []
    for i in range(2):
        half = rows.select_columns([f"jpg_{i}", "caption", ROW])
        half = half.rename_columns({f"jpg_{i}": "jpg_0"})
        if source.label_threshold is not None:
            column = source.score_columns[i]
            scores = [read_number(cell, f"row {row}, column {column}")
                      for row, cell in enumerate(rows[column][:])]  # fmt: skip
            half = half.add_column("score_0", scores)
            of_half = [float(score >= source.label_threshold) for score in scores]
        else:
            of_half = [abs(label - i) if label is not None else 0.0 for label in labels]
        half = half.add_column("label_0", of_half)
        halves.append(half if len(kept) == len(rows) else half.select(kept))
    if not kept:
        raise source.error(
            f"no pair to train on: {len(rows)} rows, all of them ties or none at all"
        )
    order = np.arange(2 * len(kept)).reshape(2, -1).T.flatten()
    return both_kinds(concatenate_datasets(halves).select(order), source)


# Lists.


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
    counts = pa.compute.list_value_length(rows.data.column("images")).to_pylist()
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


# Both.


def read_raw(source: Source) -> tuple[Dataset, Path | None]:
    """A table or a stored data set with its columns as they are, and the folder from which paths
    are taken, if one is meant."""
    path = source.path
    if not (path.is_file() and path.suffix in (".jsonl", ".csv")):
        return read_stored(path, source.name, source.split, source.cache_dir, False), None
    text = ["image", "winner", "loser", source.caption_column, *source.told_images[1:]]
    types: dict[str, pa.DataType] = dict.fromkeys(text, pa.string())
    if path.suffix == ".jsonl":
        types["images"] = pa.list_(pa.string())
    table = parse_table(path, types, "row")
    empty = [name for name in types if name in table.column_names and
             table[name].null_count == len(table)]  # fmt: skip
    return Dataset(table.drop_columns(empty)), path.parent.absolute()


def absolute(rows: Dataset, columns: Sequence[str], folder: Path | None) -> Dataset:
    """The rows with the paths in `columns` taken from `folder`."""

    def whole(cell: Any, row: int, column: str) -> Any:
        if isinstance(cell, list):
            return [whole(each, row, column) for each in cell]
        if not isinstance(cell, str) or not cell:
            raise ValueError(f"row {row}, column {column}: need the path of an image; it holds "
                             f"{cell!r}")  # fmt: skip
        return str(folder / cell) if folder else cell

    for column in columns if folder else ():
        if column in rows.column_names:
            cells = [whole(cell, row, column) for row, cell in enumerate(rows[column][:])]
            rows = rows.remove_columns(column).add_column(column, cells)
    return rows
