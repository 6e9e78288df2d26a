"""Encoded items on disk: in shards of safetensors, found by their keys."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.files import whole_file

Keys = npt.NDArray[np.uint8]  # (..., KEY_BYTES)
Places = npt.NDArray[np.int32]  # (..., 2): shard and row; both -1 if an item is nowhere

KEY_BYTES = 16
IMAGE_TENSORS = ("keys", "mean", "std", "time_ids")
SHARD_BYTES = 2**28
FLUSH_BATCHES = 256  # so that a killed build loses little even where items are small


def digest(*parts: bytes) -> bytes:
    """What stands for `parts`, in a key's size."""
    return hashlib.blake2b(b"".join(parts), digest_size=KEY_BYTES).digest()


def as_keys(digests: Iterable[bytes]) -> Keys:
    """Digests as an array (N, KEY_BYTES)."""
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, KEY_BYTES)


def sortable(keys: Keys) -> npt.NDArray[Any]:
    """Keys (N, KEY_BYTES) as N scalars."""
    return np.ascontiguousarray(keys).view(f"S{KEY_BYTES}")[:, 0]


def firsts(keys: Keys) -> npt.NDArray[np.int64]:
    """Where each key of `keys` (N, KEY_BYTES) occurs for the first time, in that order."""
    return np.sort(np.unique(sortable(keys), return_index=True)[1])


class Index(NamedTuple):
    """Where each key is."""

    keys: npt.NDArray[Any]  # sortable and sorted
    places: Places  # (len(keys), 2)

    def find(self, keys: Keys) -> npt.NDArray[np.int64]:
        """The rows of `places` that hold `keys` (..., KEY_BYTES); -1 for those that are nowhere."""
        wanted = sortable(keys.reshape(-1, KEY_BYTES))
        if not len(self.keys):
            return np.full(keys.shape[:-1], -1)
        at = np.searchsorted(self.keys, wanted)
        at[at == len(self.keys)] = 0
        return np.where(self.keys[at] == wanted, at, -1).reshape(keys.shape[:-1])


class Folder(NamedTuple):
    """What the shards of a folder hold."""

    items: Index
    paths: list[Path]
    item_bytes: npt.NDArray[np.float64]  # of an item in each shard
    unreadable: list[str]

    def places(self, keys: Keys) -> Places:
        """Shard and row of each of `keys`, (..., 2)."""
        at = self.items.find(keys)
        places = np.full((*at.shape, 2), -1, dtype=np.int32)
        places[at >= 0] = self.items.places[at[at >= 0]]
        return places

    def unused(self, keys: Keys) -> tuple[int, int]:
        """How many items, and bytes, of the folder are not of `keys`."""
        of_others = np.ones(len(self.items.keys), dtype=bool)
        at = self.items.find(keys)
        of_others[at[at >= 0]] = False
        shards = self.items.places[of_others, 0]
        return len(shards), int(self.item_bytes[shards].sum())


def read_folder(folder: Path) -> Folder:
    """The keys of all whole shards in `folder`."""
    paths, keys, item_bytes, unreadable = [], [as_keys([])], [], []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as shard:
                names = {*shard.keys()}
                # Captions have their embeddings, by whatever name a family has for them.
                if "keys" not in names or ("mean" in names and names != {*IMAGE_TENSORS}):
                    raise ValueError(f"it holds {sorted(names)}")
                some = shard.get_tensor("keys").numpy().reshape(-1, KEY_BYTES)
        except (SafetensorError, OSError, ValueError) as error:
            unreadable.append(f"{path}: {error}")
            continue
        paths.append(path)
        keys.append(some)
        item_bytes.append(path.stat().st_size / max(1, len(some)))
    counts = [len(some) for some in keys[1:]]
    places = np.stack(
        [
            np.repeat(np.arange(len(counts)), counts),
            np.concatenate([np.arange(0), *map(np.arange, counts)]),
        ],
        axis=-1,
    ).astype(np.int32)
    every = sortable(np.concatenate(keys))
    order = np.argsort(every, kind="stable")
    return Folder(
        Index(every[order], places[order]), paths, np.array(item_bytes, dtype=float), unreadable
    )


class ShardWriter:
    """Gathers items of one kind and shape until they make a shard; leaving it writes the rest."""

    def __init__(self, folder: Path, process: int) -> None:
        self.folder, self.process = folder, process
        self.kind, self.parts, self.bytes = "", list[dict[str, Tensor]](), 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:  # also when the build is interrupted
        self.flush()

    def add(self, kind: str, part: dict[str, Tensor]) -> None:
        """Take items of `kind`: tensors with as many rows each."""
        if kind != self.kind:
            self.flush()
        self.kind = kind
        self.parts.append(part)
        self.bytes += sum(values.nbytes for values in part.values())
        if self.bytes >= SHARD_BYTES or len(self.parts) >= FLUSH_BATCHES:
            self.flush()

    def flush(self) -> None:
        """Write what there is, whole or not at all."""
        parts, self.parts, self.bytes = self.parts, [], 0
        if not parts:
            return
        shard = {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}
        # By process and content: builds that run at once, or one after another, never clash.
        content_hash = digest(shard["keys"].numpy().tobytes()).hex()
        path = self.folder / f"{self.kind}-p{self.process}-{content_hash}.safetensors"
        with whole_file(path) as aside:
            save_file(shard, aside)
