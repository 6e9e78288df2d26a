"""Sources of preference pairs: what can be read, and what becomes of ties."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from datasets import Image as ImageFeature

from trainer.data.pairs import COLUMNS, ROW, images_of

TIES = ("drop", "coin", "keep")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
FILES = (".parquet", ".jsonl", ".csv")


def load_pairs(
    dataset_name: str,
    split: str,
    max_samples: int | None = None,
    cache_dir: str | None = None,
    extra_columns: Sequence[str] = (),
    *,
    image_columns: Sequence[str] = ("jpg_0", "jpg_1"),
    label_column: str = "label_0",
    caption_column: str = "caption",
    ties: str = "drop",
    seed: int = 0,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Pairs with the columns jpg_0, jpg_1, label_0 (0 or 1), caption and whatever else they have.

    They come from what `read_rows` reads; `settle_ties` says what becomes of ties.
    """
    rows = read_rows(
        dataset_name, split, cache_dir, extra_columns, image_columns=image_columns,
        label_column=label_column, caption_column=caption_column, streaming=streaming,
    )  # fmt: skip
    return settle_ties(rows, ties, seed, max_samples)


def read_rows(
    dataset_name: str,
    split: str,
    cache_dir: str | None = None,
    extra_columns: Sequence[str] = (),
    *,
    image_columns: Sequence[str] = ("jpg_0", "jpg_1"),
    label_column: str = "label_0",
    caption_column: str = "caption",
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """All rows of a source under the names of Pick-a-Pic's columns, ties among them.

    A source is a data set of the hub, a folder written by `save_to_disk`, a parquet file or a
    folder of them, whose columns the arguments name; a folder with winners in w/ and losers of the
    same names in l/; or a .jsonl or .csv file with the columns winner, loser and caption.
    """
    path = Path(dataset_name).expanduser()
    if len(image_columns) != 2:
        raise ValueError(f"image_columns={list(image_columns)}; need two")
    names = {**dict(zip(image_columns, COLUMNS, strict=False)), label_column: "label_0"}
    if (path / "w").is_dir() != (path / "l").is_dir():
        raise ValueError(f"dataset_name={dataset_name!r} holds one of the folders w and l; need "
                         "winners in w/ and losers in l/")  # fmt: skip
    if (path / "w").is_dir():
        rows, names = Dataset(read_folders(path)), {column: column for column in COLUMNS}
    elif path.is_file() and path.suffix in (".jsonl", ".csv"):
        rows = Dataset(read_table(path, caption_column))
        names = {column: column for column in COLUMNS}
    else:
        rows = read_stored(path, dataset_name, split, cache_dir, streaming)
        names[caption_column] = "caption"
    rows = rename(rows, names, extra_columns, dataset_name)
    if isinstance(rows, Dataset) and ROW not in rows.column_names:
        rows = rows.add_column(ROW, np.arange(len(rows)))  # for messages, whatever is left out
    if streaming and isinstance(rows, Dataset):
        rows = rows.to_iterable_dataset()
    return rows


def has_splits(dataset_name: str) -> bool:
    """Whether `split` makes a difference to what `read_rows` reads."""
    path = Path(dataset_name).expanduser()
    if (path / "w").is_dir() or (path / "state.json").is_file():
        return False
    return path.is_dir() or not path.exists()


def read_stored(
    path: Path, dataset_name: str, split: str, cache_dir: str | None, streaming: bool
) -> Dataset | IterableDataset:
    """The rows of a hub data set, a save_to_disk folder, a parquet file or a folder of them."""
    options = {"cache_dir": cache_dir, "streaming": streaming}
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        stored = load_from_disk(str(path))
        if not isinstance(stored, DatasetDict):
            return stored
        if split not in stored:
            raise ValueError(
                f"dataset_name={dataset_name!r} with dataset_split_name={split!r}: the folder "
                f"holds the splits {list(stored)}"
            )
        return stored[split]
    if path.is_dir():
        files = sorted(path.rglob(f"{split}*.parquet"))
        if not files:
            found = ", ".join(sorted(p.name for p in path.rglob("*.parquet"))) or "no parquet file"
            raise ValueError(
                f"dataset_name={dataset_name!r} with dataset_split_name={split!r}: the folder "
                f"holds {found}; need files named {split}*.parquet, or folders w/ and l/"
            )
    elif path.is_file():
        files = [path]
    elif path.is_absolute() or dataset_name.startswith((".", "~")) or path.suffix in FILES:
        raise ValueError(f"dataset_name={dataset_name!r}: there is no such file or folder")
    else:
        try:
            return load_dataset(dataset_name, split=split, **options)
        except (ConnectionError, FileNotFoundError) as error:
            raise ValueError(
                f"dataset_name={dataset_name!r}: there is no such file or folder here, and as a "
                f"name on the hub it could not be loaded: {error}"
            ) from error
    if any(file.suffix != ".parquet" for file in files):
        raise ValueError(f"dataset_name={dataset_name!r}; need a {', '.join(FILES)} file")
    return load_dataset(
        "parquet", data_files=[str(file) for file in files], split="train", **options
    )


def rename(
    rows: Dataset | IterableDataset,
    names: Mapping[str, str],
    extra: Sequence[str],
    source: str,
    canonical: Sequence[str] = COLUMNS,
) -> Dataset | IterableDataset:
    """The rows with their columns under canonical names, and images as the bytes or paths they are.

    A column whose name is thereby taken goes, and so does one that would be a further image.
    """
    found = rows.column_names or list(next(iter(rows)))
    needed = list(dict.fromkeys([*names, *extra]))
    missing = [column for column in needed if column not in found]
    if missing:
        raise ValueError(f"dataset_name={source!r} has columns {found}; need {needed}, "
                         f"missing {missing}")  # fmt: skip
    if len(names) != len(canonical):
        raise ValueError(f"the columns {list(names)} stand for {', '.join(canonical)}; need "
                         "one for each")  # fmt: skip
    further = [column for column in images_of([*canonical, *found]) if column not in canonical]
    taken = [column for column in names.values() if column in found and column not in names]
    lost = [column for column in extra if column in taken]
    if lost:
        raise ValueError(f"column {lost[0]!r} is asked for, but another one takes its name; need "
                         "it under a name of its own")  # fmt: skip
    gone = [*taken, *(column for column in further if column in found and column not in names)]
    rows = rows.remove_columns(list(dict.fromkeys(gone))) if gone else rows
    changed = {old: new for old, new in names.items() if old != new}
    rows = rows.rename_columns(changed) if changed else rows
    for column in images_of(canonical):
        if rows.features is not None and isinstance(rows.features[column], ImageFeature):
            rows = rows.cast_column(column, ImageFeature(decode=False))
    return rows


def read_folders(root: Path) -> pa.Table:
    """The pairs w/NAME and l/NAME of a folder, with the winner's caption."""
    winners, losers = (images_in(root / side) for side in "wl")
    if not winners and not losers:
        raise ValueError(f"{root}: no image in w/ and l/; need some of {', '.join(IMAGES)}")
    lonely = [winners.get(stem) or losers[stem] for stem in sorted(winners.keys() ^ losers.keys())]
    if lonely:
        few = ", ".join(str(path.relative_to(root)) for path in lonely[:5])
        raise ValueError(f"{root}: {len(lonely)} images have no partner: {few}; need each winner "
                         "w/NAME and its loser l/NAME, whatever their suffixes")  # fmt: skip
    stems = sorted(winners)
    captions = read_captions(root, stems)
    return pa.table(
        {
            "jpg_0": [str(winners[stem].absolute()) for stem in stems],
            "jpg_1": [str(losers[stem].absolute()) for stem in stems],
            "label_0": [1.0] * len(stems),
            "caption": captions,
        }
    )


def images_in(folder: Path) -> dict[str, Path]:
    """The images of a folder by stem."""
    images: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in IMAGES or path.name.startswith("."):
            continue
        if path.stem in images:
            raise ValueError(f"{path} and {images[path.stem].name} have one name; need one of them")
        images[path.stem] = path
    return images


def read_captions(root: Path, stems: Sequence[str], side: str = "w", other: str = "l") -> list[str]:
    """The caption of each name: from w/NAME.txt, NAME.txt or metadata.jsonl."""
    listed: dict[str, str] = {}
    metadata = root / "metadata.jsonl"
    if metadata.is_file():
        for number, line in enumerate(metadata.read_text("utf-8").splitlines(), 1):
            entry = json.loads(line) if line.strip() else {"file_name": f"{other}/", "text": ""}
            text = entry.get("caption", entry.get("text"))
            if not isinstance(entry.get("file_name"), str) or not isinstance(text, str):
                raise ValueError(f"{metadata}, line {number}: need file_name and caption (or text)")
            if not entry["file_name"].startswith(f"{other}/"):  # a pair's caption is the winner's
                listed[Path(entry["file_name"]).stem] = text
    captions, missing = [], []
    for stem in stems:
        files = [path for path in (root / side / f"{stem}.txt", root / f"{stem}.txt")
                 if path.is_file()]  # fmt: skip
        if files:
            captions.append(files[0].read_text("utf-8").strip())
        elif stem in listed:
            captions.append(listed[stem])
        else:
            missing.append(stem)
    if missing:
        what = "pairs" if side == "w" else f"images of {side}/"
        raise ValueError(
            f"{root}: {len(missing)} of {len(stems)} {what} have no caption: "
            f"{', '.join(missing[:5])}; need {side}/NAME.txt or NAME.txt with the caption (it may "
            'be empty), or a line {"file_name": "NAME.png", "caption": "..."} in metadata.jsonl'
        )
    return captions


def parse_table(path: Path, types: Mapping[str, pa.DataType], what: str) -> pa.Table:
    """All columns of a .jsonl or .csv file, those of `types` read as such."""
    try:
        if path.suffix == ".csv":
            return pa.csv.read_csv(
                path,
                parse_options=pa.csv.ParseOptions(newlines_in_values=True),
                convert_options=pa.csv.ConvertOptions(column_types=types),
            )
        schema = pa.schema(list(types.items()))
        return pa.json.read_json(path, parse_options=pa.json.ParseOptions(explicit_schema=schema))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: need one {what} a line; {error}") from error


def read_table(path: Path, caption_column: str) -> pa.Table:
    """The pairs that a .jsonl or .csv file lists, paths taken from where the file is."""
    # Named, so that a caption such as "2024-01-01" or "12" stays text.
    text = {name: pa.string() for name in ("winner", "loser", caption_column)}
    table = parse_table(path, text, "pair")
    columns: dict[str, Any] = {}
    for name, column in zip(("jpg_0", "jpg_1", "caption"), text, strict=True):
        values = table[column].to_pylist() if column in table.column_names else [None]
        for number, value in enumerate(values, 1):
            if value is None or (not value and name != "caption"):
                raise ValueError(
                    f"{path}: pair {number} has no {column}; need winner, loser, {caption_column}"
                )
        columns[name] = values
    for name in ("jpg_0", "jpg_1"):
        columns[name] = [str(path.parent.absolute() / cell) for cell in columns[name]]
    columns["label_0"] = [1.0] * len(columns["caption"])
    others = [name for name in table.column_names if name not in (*text, *COLUMNS)]
    return pa.table({**columns, **{name: table[name] for name in others}})


def settle_ties(
    rows: Dataset | IterableDataset,
    ties: str = "drop",
    seed: int = 0,
    max_samples: int | None = None,
) -> Dataset | IterableDataset:
    """The first `max_samples` rows (all if None) whose label_0 is 0 or 1 once ties are settled.

    A tie (label_0 = 0.5) says nothing about which image to prefer: `drop` leaves it out, `coin`
    draws a winner, once for the run, and `keep` makes image 0 the winner, as the labels are read
    by scripts that ask only whether label_0 is 0.
    """
    if ties not in TIES:
        raise ValueError(f"ties={ties!r}; need one of {', '.join(TIES)}")
    if isinstance(rows, IterableDataset):
        return settle_stream(rows, ties, seed, max_samples)
    labels = [settled(label, row, ties, seed) for row, label in enumerate(rows["label_0"][:])]
    kept = [row for row, label in enumerate(labels) if label is not None][:max_samples]
    if not kept:
        raise ValueError(
            f"no pair to train on: {len(labels)} rows, all of them ties or none at all"
        )
    if ties != "drop":
        rows = rows.remove_columns("label_0").add_column("label_0", labels)
    return rows if len(kept) == len(rows) else rows.select(kept)


def settled(label: Any, row: int, ties: str, seed: int) -> float | None:
    """0 or 1 for a label, or None for a tie that is dropped."""
    if isinstance(label, str) or label not in (0, 0.5, 1):
        raise ValueError(f"row {row}: label_0 is {label!r}; need 0, 0.5 (a tie) or 1")
    if label != 0.5 or ties == "drop":
        return None if label == 0.5 else float(label)
    # The last numbers set the coin's draws apart from those of label noise and of samples.
    return 1.0 if ties == "keep" else float(np.random.default_rng([seed, row, 0, 1]).integers(2))


def settle_stream(
    rows: IterableDataset, ties: str, seed: int, max_samples: int | None
) -> IterableDataset:
    """As `settle_ties`, row by row."""
    if ties == "drop":
        rows = rows.filter(
            lambda label, row: settled(label, row, ties, seed) is not None,
            with_indices=True, input_columns=["label_0"],
        )  # fmt: skip
    else:
        rows = rows.map(
            lambda label, row: {"label_0": settled(label, row, ties, seed)},
            with_indices=True, input_columns=["label_0"],
        )  # fmt: skip
    return rows if max_samples is None else rows.take(max_samples)
