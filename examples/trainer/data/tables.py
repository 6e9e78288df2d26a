"""Tables of samples or lists with their columns as they come, and what the flags say of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset

from trainer.data.sources import parse_table, read_stored

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
