"""Pairs, samples and lists: rows turned into tensors, and into batches of one size, the same way in
every run."""

from __future__ import annotations

import itertools
import math
import numbers
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from numpy.typing import NDArray
from torch.utils.data import Sampler, get_worker_info

from trainer.data.images import BadImage, Size, fit, open_image
from trainer.losses import Layout

COLUMNS = ("jpg_0", "jpg_1", "label_0", "caption")
ROW = "source_row"  # a row's number where it comes from, if something may have been left out since
ATTEMPTS = 20  # bad pairs in a row before a run gives up
# (epoch, index): all that the randomness of a sample depends on, with the seed
Key = tuple[int, int]


def images_of(columns: Iterable[str]) -> list[str]:
    """The columns jpg_0, jpg_1, ... with an item's images, as many as there are."""
    return list(
        itertools.takewhile({*columns}.__contains__, map("jpg_{}".format, itertools.count()))
    )


def read_number(cell: Any, where: str) -> float:
    """A cell that holds a finite number."""
    if isinstance(cell, bool) or not isinstance(cell, numbers.Real) or not math.isfinite(cell):
        raise ValueError(f"{where}: need a finite number; it holds {cell!r}")
    return float(cell)


def read_text(cell: Any, where: str) -> str:
    """A cell that holds text, be it empty."""
    if not isinstance(cell, str):
        raise ValueError(f"{where}: need a text; it holds {cell!r}")
    return cell


class Cached(Protocol):
    """Images and captions that were encoded before."""

    def image(self, index: int, side: int, flip: bool) -> Mapping[str, torch.Tensor]:
        """The mean, std and time_ids of image `side`, from 0, of row `index`; else BadImage."""

    def caption(self, text: str) -> Mapping[str, torch.Tensor] | None:
        """The embeddings of a caption by name, or None where captions are not kept."""


@dataclass(kw_only=True)
class PairMaker:
    """How a row becomes a pair of winner and loser, a sample or a list, with everything random
    drawn from numbers."""

    layout: Layout = "pairs"
    members: int = 2  # images of an item
    seed: int = 0
    random_crop: bool = False
    random_flip: bool = False
    label_noise_prob: float = 0.0
    proportion_empty_prompts: float = 0.0
    loser_caption_column: str | None = None
    score_columns: Sequence[str] | None = None
    label_threshold: float | None = None  # about which a wrong label mirrors a sample's score
    sign_column: str | None = None
    cached: Cached | None = None

    def columns(self) -> list[str]:
        """What is read of a row: of one with cached images, not the images."""
        optional = [self.loser_caption_column, *(self.score_columns or ()), self.sign_column]
        images = [f"jpg_{i}" for i in range(self.members)] if self.cached is None else []
        label = [] if self.layout == "lists" else ["label_0"]
        needed = [
            *images,
            *label,
            "caption",
            *(column for column in optional if column is not None),
        ]
        return list(dict.fromkeys(needed))

    def make(self, row: Mapping[str, Any], index: int, draw: Key, size: Size) -> dict[str, Any]:
        """The item as pixels_w/l (with `cached`, mean_w/l and std_w/l), time_ids_w/l, captions (one
        for all, or the winner's and the loser's) with their text, embeddings by name, if these are
        cached, and a seed for its noise and timestep; score_w/l and sign if columns hold them.

        Of a sample or list the suffixes are 0, 1, ...; a sample has its label.
        """
        # A wrong label stays wrong for the whole run, as in data: its draw knows no epoch.
        labels = np.random.default_rng([self.seed, index])
        mislabelled = labels.random() < self.label_noise_prob
        rng = np.random.default_rng([self.seed, *draw])
        u, v, mirror, drop = rng.random(4)
        window = (u, v) if self.random_crop else (0.5, 0.5)
        mirror = bool(self.random_flip and mirror < 0.5)
        number = row.get(ROW, index)
        item: dict[str, Any] = {"seed": int(rng.integers(2**63))}
        for side, i in self.sides(row, mislabelled):
            where = f"row {number}, column jpg_{i}"
            item |= self.image(row, index, i, side, size, window, mirror, where)
        if self.score_columns is not None:
            item |= self.scores(row, number, mislabelled, labels)
        if self.layout == "samples":
            item["label"] = float((row["label_0"] == 1) != mislabelled)
        if self.sign_column is not None:
            where = f"row {number}, column {self.sign_column}"
            item["sign"] = read_number(row[self.sign_column], where)
        columns = ["caption"]
        if self.loser_caption_column is not None:
            columns.append(self.loser_caption_column)
        captions = [read_text(row[column], f"row {number}, column {column}") for column in columns]
        if mislabelled:  # a caption stays with its image, as a pair's score does
            captions.reverse()
        if drop < self.proportion_empty_prompts:
            captions = [""] * len(captions)
        item["captions"] = captions
        if self.cached is not None:
            texts = [self.cached.caption(caption) for caption in captions]
            known = [text for text in texts if text is not None]
            if len(known) == len(texts):
                item["text"] = known
        return item

    def sides(self, row: Mapping[str, Any], mislabelled: bool) -> list[tuple[str, int]]:
        """The images in the order of the batch, by the suffixes of their tensors."""
        if self.layout != "pairs":
            return [(str(i), i) for i in range(self.members)]
        winner = int((row["label_0"] == 1) == mislabelled)
        return [("w", winner), ("l", 1 - winner)]

    def image(
        self, row: Mapping[str, Any], index: int, i: int, side: str, size: Size,
        window: tuple[float, float], mirror: bool, where: str,
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        """The tensors of image `i`, opened or out of the cache."""
        if self.cached is None:
            pixels, time_ids = fit(open_image(row[f"jpg_{i}"], where), size, window, mirror)
            return {f"pixels_{side}": pixels, f"time_ids_{side}": time_ids}
        try:
            encoded = self.cached.image(index, i, mirror)
        except BadImage as bad:
            raise BadImage(where, bad.reason) from bad
        return {f"{name}_{side}": encoded[name] for name in ("mean", "std", "time_ids")}

    def scores(
        self, row: Mapping[str, Any], number: int, mislabelled: bool, rng: np.random.Generator
    ) -> dict[str, float]:
        """The images' scores. With a wrong label a pair's stay with their images, a sample's is on
        the other side of the threshold, and a list's are shuffled."""
        assert self.score_columns is not None
        scores = [
            read_number(row[column], f"row {number}, column {column}")
            for column in self.score_columns
        ]
        if mislabelled and self.layout == "samples" and self.label_threshold is not None:
            scores = [2 * self.label_threshold - score for score in scores]
        if mislabelled and self.layout == "lists":
            scores = [scores[i] for i in rng.permutation(len(scores))]
        return {f"score_{side}": scores[i] for side, i in self.sides(row, mislabelled)}


@dataclass(eq=False)
class PreferencePairs(PairMaker, torch.utils.data.Dataset[dict[str, Any]]):
    """The pairs, samples or lists of `rows`, by (epoch, index), each in the size of its bucket.

    `buckets` says which of `sizes` each row has; it may be left out where there is only one.
    """

    rows: Dataset
    sizes: Sequence[Size]
    buckets: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        if self.buckets is None:
            if len(self.sizes) != 1:
                raise ValueError(
                    f"buckets=None with {len(self.sizes)} sizes; need one for each row"
                )
            self.buckets = np.zeros(len(self.rows), dtype=np.int64)
        if len(self.buckets) != len(self.rows):
            raise ValueError(
                f"buckets are those of {len(self.buckets)} rows; need one for each of "
                f"{len(self.rows)}"
            )
        known = [ROW] if ROW in self.rows.column_names else []
        self.rows = self.rows.select_columns([*self.columns(), *known])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        """The pair of `PairMaker.make`, and `refused`: the bad images that it stands in for.

        A pair with a bad image falls back to another of its bucket, which (seed, key) alone say.
        """
        assert self.buckets is not None
        epoch, index = key
        bucket = self.buckets[index]
        refused: list[str] = []
        chosen = index
        for attempt in range(1, ATTEMPTS + 1):
            try:
                pair = self.make(self.rows[chosen], chosen, key, self.sizes[bucket])
                return pair | {"refused": refused}
            except BadImage as bad:
                refused.append(str(bad))
            rng = np.random.default_rng([self.seed, epoch, index, attempt])
            chosen = int(rng.choice(np.flatnonzero(self.buckets == bucket)))
        raise too_many_refused(refused)


def too_many_refused(refused: Sequence[str]) -> ValueError:
    """The error of a run that finds nothing but bad images."""
    return ValueError(
        f"{len(refused)} pairs in a row have a bad image; need whole ones: {'; '.join(refused[:3])}"
    )


class PairStream(Sampler[Key]):
    """Keys number `start` to `stop` of an endless run over the data, reshuffled in each epoch.

    The n-th key depends on `seed` and n alone, so a run resumes where it stopped.
    """

    def __init__(self, length: int, seed: int, start: int = 0, stop: int | None = None) -> None:
        self.length, self.seed, self.start, self.stop = length, seed, start, stop

    def __iter__(self) -> Iterator[Key]:
        shuffled_epoch, order = -1, np.empty(0, dtype=np.int64)
        endless = itertools.count(self.start)
        for n in endless if self.stop is None else range(self.start, self.stop):
            epoch, place = divmod(n, self.length)
            if epoch != shuffled_epoch:
                shuffled_epoch = epoch
                order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
            yield epoch, int(order[place])


class PairBatches(Sampler[list[Key]]):
    """Batches of keys of one bucket each, `count` of them (endless if None).

    The endless stream of `PairStream` flows into a queue for each bucket, and a full queue is a
    batch: what an epoch leaves in a queue, the next one fills up. `start` pairs have been seen
    before. With one bucket it goes on right there, whatever the batch size was; with several it
    replays the batches that came before, so there the batch size should be what it was.
    """

    drop_last = False  # as accelerate asks: no batch is cut short anyway

    def __init__(
        self,
        buckets: NDArray[np.int64],
        batch_size: int,
        seed: int,
        start: int = 0,
        count: int | None = None,
    ) -> None:
        if not len(buckets):
            raise ValueError("buckets are those of no pair; need at least one")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}; need at least 1")
        self.buckets, self.batch_size, self.seed = buckets, batch_size, seed
        self.start, self.count = start, count

    def __len__(self) -> int:
        if self.count is None:
            raise TypeError("count=None: this stream of batches has no end")
        return self.count

    def __iter__(self) -> Iterator[list[Key]]:
        several = len(np.unique(self.buckets)) > 1
        keys = PairStream(len(self.buckets), self.seed, 0 if several else self.start)
        batches = self.batches(keys)
        first = self.start // self.batch_size if several else 0
        stop = None if self.count is None else first + self.count
        return itertools.islice(batches, first, stop)

    def batches(self, keys: Iterable[Key]) -> Iterator[list[Key]]:
        """The keys in batches of one bucket, in the order in which these fill up."""
        buckets = self.buckets.tolist()
        queues: dict[int, list[Key]] = defaultdict(list)
        for key in keys:
            queue = queues[buckets[key[1]]]
            queue.append(key)
            if len(queue) == self.batch_size:
                yield queues.pop(buckets[key[1]])


@dataclass(eq=False)
class StreamedPairs(PairMaker, torch.utils.data.IterableDataset[dict[str, Any]]):
    """The pairs of rows that come as a stream, endless, each epoch shuffled in a buffer.

    Process `rank` of `world` has every `world`-th of them, after the `start` that all together have
    seen. The workers of a DataLoader take turns of `batch_size` pairs and do not change the order.
    A bad image is skipped, and named in the next pair's `refused`; a run that resumes sees as many
    pairs again as were skipped. Every process and worker reads the whole stream, from its first row
    on: a data set that is used for long is better downloaded.
    """

    rows: IterableDataset
    size: Size
    rank: int = 0
    world: int = 1
    start: int = 0
    batch_size: int = 1
    buffer_size: int = 500

    def __post_init__(self) -> None:
        if self.cached is not None:
            raise ValueError("cached: a stream has no cache; need None")
        self.rows = self.rows.select_columns(self.columns())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        worker_id, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        refused: list[str] = []
        for n, (epoch, index, row) in enumerate(self.stream()):
            turn, rank = divmod(n - self.start, self.world)
            mine = rank == self.rank and turn // self.batch_size % workers == worker_id
            if n < self.start or not mine:
                continue
            try:
                pair = self.make(row, index, (epoch, index), self.size)
            except BadImage as bad:
                refused.append(str(bad))
                if len(refused) == ATTEMPTS:
                    raise too_many_refused(refused) from bad
                continue
            yield pair | {"refused": refused}
            refused = []

    def stream(self) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Epoch, number and content of every row, shuffled, without end."""
        for epoch in itertools.count():
            rng = np.random.default_rng([self.seed, epoch])
            buffer: list[tuple[int, int, dict[str, Any]]] = []
            # By iter() and not by a plain loop, in which datasets shares out the rows to workers.
            for index, batch in enumerate(self.rows.iter(batch_size=1)):
                row = {column: cells[0] for column, cells in batch.items()}
                buffer.append((epoch, index, row))
                if len(buffer) > self.buffer_size:
                    place = int(rng.integers(len(buffer)))
                    buffer[place], buffer[-1] = buffer[-1], buffer[place]
                    yield buffer.pop()
            if not buffer and epoch == 0:
                raise ValueError("no pair to train on: the stream is empty")
            for place in rng.permutation(len(buffer)):
                yield buffer[place]
