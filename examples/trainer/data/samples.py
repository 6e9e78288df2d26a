"""Sources of samples: single images, each desirable or not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets

from trainer.data.pairs import COLUMNS, ROW, read_number
from trainer.data.sources import images_in, read_captions, read_rows, rename, settled
from trainer.data.tables import Source, absolute, read_raw


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
