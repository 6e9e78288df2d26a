"""A survey of a data set's images: which items are whole, and which size each is trained at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from trainer.data.buckets import nearest_buckets
from trainer.data.images import BadImage, Size, open_image, read_size
from trainer.data.pairs import ROW, images_of


@dataclass(frozen=True)
class Refused:
    """An image that cannot be trained on: its row, where it is, and why."""

    row: int
    where: str
    reason: str


@dataclass(frozen=True)
class Survey:
    """The items whose images are whole, as far as was looked, and the images that are not.

    `buckets` and `found`, the height and width of the m images of each (N, m, 2), are those of
    `rows`.
    """

    rows: Dataset
    buckets: NDArray[np.int64]
    found: NDArray[np.int64]
    refused: list[Refused]


def survey(
    rows: Dataset,
    sizes: Sequence[Size],
    *,
    decode: int = 2000,
    workers: int = 0,
    progress: bool = True,
    max_refused: float = 0.01,
) -> Survey:
    """Read the header of every image, decode `decode` rows wholly, and drop the rows with a bad
    image; a ValueError where these are more than the share `max_refused`.

    `decode` is spread evenly over the rows. A core reads some thousand pairs of headers a second,
    and decodes some ten pairs of 1024 x 1024 a second (JPEG 20, PNG 8); `workers` processes share
    the work.
    """
    whole = np.zeros(len(rows), dtype=bool)
    whole[np.linspace(0, len(rows) - 1, min(decode, len(rows))).round().astype(np.int64)] = True
    result = look_at(rows, sizes, whole, workers, progress)
    what = called(rows)
    bad = np.unique(np.array([image.row for image in result.refused], dtype=np.int64))
    for looked_at, count, total in (
        ("", len(bad), len(rows)),
        (" that were decoded", whole[bad].sum(), whole.sum()),
    ):
        if count > max_refused * total:
            few = "; ".join(f"{image.where}: {image.reason}" for image in result.refused[:5])
            raise ValueError(
                f"{count} of {total} {what}{looked_at} ({count / total:.1%}) have a bad image, "
                f"more than --max_refused {max_refused:g}: {few}; need whole images, or a higher "
                f"--max_refused to do without these {what}"
            )
    if not len(result.rows):
        raise ValueError(f"no {what[:-1]} to train on: all {len(rows)} have a bad image")
    return result


def called(rows: Dataset) -> str:
    """What messages call the rows, by how many images each has."""
    return {1: "samples", 2: "pairs"}.get(len(images_of(rows.column_names)), "lists")


def look_at(
    rows: Dataset, sizes: Sequence[Size], whole: NDArray[np.bool_], workers: int, progress: bool
) -> Survey:
    """Survey all rows, decoding the images of those where `whole` is true."""
    loader = DataLoader(
        Chunks(rows, whole), batch_size=None, collate_fn=as_it_is, num_workers=workers,
        generator=torch.Generator(),  # its own, so that the global RNG is left alone
    )  # fmt: skip
    found, refused = [np.empty((0, len(images_of(rows.column_names)), 2), dtype=np.int64)], []
    unit = called(rows)[:-1]
    with tqdm(total=len(rows), desc="survey", unit=unit, disable=not progress) as bar:
        for chunk, bad in loader:
            found.append(chunk)
            refused += bad
            bar.update(len(chunk))
    sides = np.concatenate(found)
    kept = np.setdiff1d(np.arange(len(rows)), [image.row for image in refused])
    if len(kept) < len(rows):
        rows, sides = rows.select(kept), sides[kept]
    return Survey(rows, nearest_buckets(sides, sizes), sides, refused)


def as_it_is(chunk: Any) -> Any:
    """What a DataLoader should make of a chunk."""
    return chunk


class Chunks(torch.utils.data.Dataset[tuple[NDArray[np.int64], list[Refused]]]):
    """Stretches of rows, each as the sizes of its images and those that were refused."""

    length = 256

    def __init__(self, rows: Dataset, whole: NDArray[np.bool_]) -> None:
        # In Arrow's own form, for a header touches only the first page of an image's bytes.
        names = [ROW] if ROW in rows.column_names else []
        self.columns = images_of(rows.column_names)
        self.rows = rows.select_columns([*self.columns, *names]).with_format("arrow")
        self.whole = whole

    def __len__(self) -> int:
        return -(-len(self.whole) // self.length)

    def __getitem__(self, chunk: int) -> tuple[NDArray[np.int64], list[Refused]]:
        first = chunk * self.length
        table = self.rows[first : min(first + self.length, len(self.whole))]
        found, refused = np.zeros((len(table), len(self.columns), 2), dtype=np.int64), []
        numbers = (
            table[ROW].to_pylist() if ROW in table.column_names else range(first, len(self.whole))
        )
        for side, column in enumerate(self.columns):
            for i, cell in enumerate(table[column]):
                row = first + i
                where = f"row {numbers[i]}, column {column}"
                try:
                    if self.whole[row]:
                        found[i, side] = open_image(content(cell).as_py(), where).size[::-1]
                    else:
                        found[i, side] = header(content(cell), where)
                except BadImage as bad:
                    refused.append(Refused(row, bad.where, bad.reason))
        return found, sorted(refused, key=lambda image: image.row)


def content(cell: Any) -> Any:
    """The bytes of an Arrow cell, or its path."""
    if not isinstance(cell, pa.StructScalar) or not cell.is_valid:
        return cell
    return cell["bytes"] if cell["bytes"].is_valid else cell["path"]  # of an Image feature


def header(cell: Any, where: str) -> Size:
    """The size of the image in an Arrow cell, without a copy of its bytes."""
    if cell.is_valid and (pa.types.is_binary(cell.type) or pa.types.is_large_binary(cell.type)):
        try:
            return read_size(pa.BufferReader(cell.as_buffer()), where)
        except BadImage:
            pass  # Arrow's files are stricter than Python's: see what the bytes themselves give
    return read_size(cell.as_py(), where)
