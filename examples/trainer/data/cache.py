"""Latents and text embeddings, computed once, kept on disk, and never served stale.

A cache is a folder of safetensors shards. An item (the moments of one picture's latents at one size
and orientation, or the embeddings of one caption) is found by its key: a hash of all that it is
computed from, which is the bytes of the image, its size and flip, the VAE's weights, settings and
precision, and the precision it is stored in; of a caption, its token ids and the text encoders'
weights. So whatever changes is encoded anew, whatever does not is found again, in any order of the
data and by any number of processes, and a build that was stopped goes on where it was.

Every start reads and hashes all the images (but decodes none): at most as fast as the disk, and at
some 0.2 to 0.4 GB/s for each core that a process has. Finding a million items takes three seconds
and 130 MB; reading one at SDXL's size, from memory that the system holds, a fifth of a millisecond.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from trainer.data.images import (
    BadImage,
    fit,
    open_image,
    path_of,
    refuse,
)
from trainer.data.pairs import images_of
from trainer.data.shards import (
    IMAGE_TENSORS,
    KEY_BYTES,
    Index,
    Keys,
    Places,
    ShardWriter,
    as_keys,
    digest,
    firsts,
    read_folder,
    sortable,
)
from trainer.families.family import VAE_DTYPES, Encoders, Family, Text
from trainer.families.vae import encode_images
from trainer.files import ABANDONED_SECONDS, make_folder, remove_leftovers

# In every key. Count up when images.open_image or fit, or this file, changes what is stored.
FORMAT = 1
CENTRE = (0.5, 0.5)  # where a picture is cut: random crops are not cached
CAPTION_BATCH = 64
HASHED_ROWS = 8  # at a time, by a thread
PATIENCE = (0, 5, 60)  # seconds: a network folder may show late what others wrote


def fingerprint(modules: Sequence[Any], dtype: torch.dtype, settings: Mapping[str, str]) -> bytes:
    """What stands for models with their weights, and for the precision that is stored."""
    state = hashlib.blake2b(digest_size=KEY_BYTES)
    state.update(repr((FORMAT, str(dtype), sorted(settings.items()))).encode())
    ignored = ("architectures", "dtype", "torch_dtype", "transformers_version")  # not the values
    for module in modules:
        config = module.config if isinstance(module.config, Mapping) else module.config.to_dict()
        known = {k: v for k, v in config.items() if not k.startswith("_") and k not in ignored}
        known["use_tiling"] = getattr(module, "use_tiling", False)
        state.update(json.dumps(known, sort_keys=True, default=str).encode())
        for name, value in sorted(module.state_dict().items()):
            state.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            state.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return state.digest()


def undecoded(rows: datasets.Dataset) -> datasets.Dataset:
    """The images of `rows`, and nothing else, as they lie on disk."""
    rows = rows.select_columns(images_of(rows.column_names))
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


def content(cell: Any, where: str) -> bytes:
    """What stands for the picture in a cell, without decoding it if it comes encoded."""
    path = path_of(cell)
    try:
        encoded = Path(path).read_bytes() if path is not None else cell
    except OSError as error:
        raise refuse(error, cell, where) from error
    if isinstance(encoded, dict):
        encoded = encoded.get("bytes")
    if isinstance(encoded, bytes):
        return digest(encoded)
    image = open_image(cell, where)
    return digest(str(image.size).encode(), image.tobytes())


def where_is(cell: int, members: int) -> str:
    """How messages name the image number `cell`, counted along the rows, `members` in each."""
    return f"row {cell // members}, column jpg_{cell % members}"


def image_keys(
    rows: datasets.Dataset, recipes: Sequence[Sequence[bytes]], accelerator: Accelerator
) -> tuple[Keys, dict[int, str]]:
    """Keys (len(rows), members, flips, KEY_BYTES) of all images; and why some have none, by their
    number.

    `recipes` says for each row what is done with an image, once for each flip. Each process hashes
    its part of the rows in threads, and all get all the keys.
    """
    share = np.array_split(np.arange(len(rows)), accelerator.num_processes)
    mine = share[accelerator.process_index].tolist()
    refused: dict[int, str] = {}
    members = len(rows.column_names)

    def hash_rows(some: list[int]) -> list[bytes]:
        images = rows[some[0] : some[-1] + 1]
        keys = []
        for place, row in enumerate(some):
            for side in range(members):
                cell = members * row + side
                try:
                    read = content(images[f"jpg_{side}"][place], where_is(cell, members))
                except BadImage as error:
                    refused[cell], read = error.reason, f"refused {cell}".encode()
                keys += [digest(read, recipe) for recipe in recipes[row]]
        return keys

    parts = [mine[i : i + HASHED_ROWS] for i in range(0, len(mine), HASHED_ROWS)]
    progress = tqdm(
        total=len(mine), desc="images read", unit="pair", disable=not accelerator.is_main_process
    )
    hashed: list[Keys] = []
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        for part, keys in zip(parts, pool.map(hash_rows, parts), strict=True):
            hashed.append(as_keys(keys))
            progress.update(len(part))
    finally:
        progress.close()
        pool.shutdown(cancel_futures=True)  # else an interrupted run would first read all the rest
    own = np.concatenate(hashed) if hashed else as_keys([])
    everyone = gather_object([(own, refused)])
    refused = {cell: reason for _, some in everyone for cell, reason in some.items()}
    return np.concatenate([keys for keys, _ in everyone]).reshape(
        len(rows), members, -1, KEY_BYTES
    ), refused


def unique_captions(rows: datasets.Dataset, columns: Sequence[str]) -> list[str]:
    """Each caption of `columns` once, and the empty one, sorted."""
    texts = {""}
    if columns:
        for batch in rows.select_columns(list(dict.fromkeys(columns))).iter(batch_size=1000):
            for column in columns:
                texts.update(batch[column])
    other = next((text for text in texts if not isinstance(text, str)), "")
    if not isinstance(other, str):
        raise ValueError(f"columns {list(columns)} hold {other!r}; need captions that are text")
    return sorted(texts)


def caption_keys(family: Family, texts: Sequence[str], encoders: Encoders, model: bytes) -> Keys:
    """Keys (len(texts), KEY_BYTES): of the token ids, all that text encoders see of a caption."""
    keys = []
    for start in range(0, len(texts), 1000):
        ids = family.tokenize(encoders.tokenizers, texts[start : start + 1000])
        keys += [
            digest(b"caption", model, *(part.numpy().tobytes() for part in caption))
            for caption in zip(*ids, strict=True)
        ]
    return as_keys(keys)


def cache_size(
    images: int, captions: int, latent: Sequence[int], text: Sequence[Sequence[int]],
    dtype: torch.dtype,
) -> int:  # fmt: skip
    """Bytes of a cache: of `images` whose latents have the shape `latent`, and of `captions` whose
    embeddings have the shapes `text`."""
    image = 2 * math.prod(latent) * dtype.itemsize + 6 * torch.int64.itemsize + KEY_BYTES
    caption = sum(map(math.prod, text)) * dtype.itemsize + KEY_BYTES
    return images * image + captions * caption


def in_words(size: float) -> str:
    """A number of bytes to read."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"


def free_bytes(folder: Path) -> int:
    """What may still be written into `folder`, which need not exist yet."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


# Encoding.


class Pictures(torch.utils.data.Dataset[Any]):
    """Images as the VAE sees them. Item n is image n // flips, mirrored if n % flips."""

    def __init__(
        self, rows: datasets.Dataset, sizes: Sequence[tuple[int, int]],
        buckets: npt.NDArray[Any], flips: int,
    ) -> None:  # fmt: skip
        self.rows, self.sizes, self.buckets, self.flips = rows, sizes, buckets, flips
        self.members = len(rows.column_names)

    def __getitem__(self, item: int) -> tuple[int, Tensor, Tensor] | tuple[int, str]:
        """The item with its pixels and time ids, or with why there are none."""
        cell, flip = divmod(item, self.flips)
        row, side = divmod(cell, self.members)
        where = where_is(cell, self.members)
        try:
            image = open_image(self.rows[row][f"jpg_{side}"], where)
            size = self.sizes[int(self.buckets[row])]
            return item, *fit(image, size, CENTRE, bool(flip))
        except BadImage as error:
            return item, error.reason


def sort_out(pictures: list[Any]) -> tuple[list[int], list[Tensor], dict[int, str]]:
    """A batch: items, their pixels and time ids stacked (nothing, if no item is left), and why
    others are refused."""
    good = [picture for picture in pictures if len(picture) == 3]
    stacked = [torch.stack(part) for part in list(zip(*good, strict=True))[1:]]
    return [picture[0] for picture in good], stacked, dict(p for p in pictures if len(p) == 2)


def as_stored(name: str, values: Tensor, dtype: torch.dtype, encoder: Any) -> Tensor:
    """`values` in the precision that is stored, on the CPU; an error if it cannot hold them."""
    stored = values.to("cpu", dtype)
    if stored.isfinite().all():
        return stored
    if values.isfinite().all():
        raise ValueError(
            f"{name} of up to {values.abs().max().item():.3g} do not fit dtype={dtype} of the "
            "latent cache; need torch.bfloat16 or torch.float32"
        )
    raise ValueError(
        f"{name} are not finite as {type(encoder).__name__} computes them in {encoder.dtype}; "
        "need finite ones: try a higher precision (SDXL's own VAE overflows in fp16)"
    )


def encode_missing_images(
    pictures: Pictures, keys: Keys, missing: npt.NDArray[np.int64], vae: Any,
    accelerator: Accelerator, writer: ShardWriter, batch_size: int, dtype: torch.dtype,
    num_workers: int,
) -> dict[int, str]:  # fmt: skip
    """Write this process's share of the items `missing`; returns why images were refused."""
    batches: list[list[int]] = []  # of one size each
    of_bucket = pictures.buckets[missing // (pictures.members * pictures.flips)]
    for bucket in np.unique(of_bucket):
        some = missing[of_bucket == bucket].tolist()
        batches += [some[i : i + batch_size] for i in range(0, len(some), batch_size)]
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    loader = DataLoader(
        pictures, batch_sampler=mine, collate_fn=sort_out, num_workers=num_workers,
        generator=torch.Generator(),  # its own, so that the global RNG is left alone
    )  # fmt: skip
    refused: dict[int, str] = {}
    progress = tqdm(
        total=sum(map(len, mine)), desc="images encoded", unit="image",
        disable=not accelerator.is_main_process,
    )  # fmt: skip
    with progress:
        for items, stacked, reasons in loader:
            refused |= {item // pictures.flips: reason for item, reason in reasons.items()}
            progress.update(len(items) + len(reasons))
            if not items:
                continue
            pixels, time_ids = stacked
            mean, std = encode_images(vae, pixels.to(vae.device))
            writer.add(
                f"images-{pixels.shape[-2]}x{pixels.shape[-1]}",
                {
                    "keys": torch.from_numpy(keys[items]),
                    "mean": as_stored("means of latents", mean, dtype, vae),
                    "std": as_stored("standard deviations of latents", std, dtype, vae),
                    "time_ids": time_ids,
                },
            )
    return refused


def encode_missing_captions(
    family: Family, texts: Sequence[str], keys: Keys, missing: npt.NDArray[np.int64],
    encoders: Encoders, accelerator: Accelerator, writer: ShardWriter, dtype: torch.dtype,
) -> None:  # fmt: skip
    """Write this process's share of the captions `missing`."""
    batches = [missing[i : i + CAPTION_BATCH] for i in range(0, len(missing), CAPTION_BATCH)]
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    last = encoders.text_encoders[-1]
    for batch in tqdm(
        mine, desc="captions encoded", unit="batch", disable=not accelerator.is_main_process
    ):
        text = encode_captions(family, [texts[i] for i in batch], encoders)
        stored = {
            name: as_stored(f"embeddings of captions ({name})", values, dtype, last)
            for name, values in text.items()
        }
        writer.add("captions", {"keys": torch.from_numpy(keys[batch]), **stored})


def encode_captions(family: Family, captions: Sequence[str], encoders: Encoders) -> Text:
    """The embeddings of some captions."""
    ids = family.tokenize(encoders.tokenizers, captions)
    device = encoders.text_encoders[-1].device
    return family.encode_text(encoders.text_encoders, [part.to(device) for part in ids])


def release(*models: Any) -> None:
    """Free the memory of models whose work is done, whoever still refers to them.

    Their configuration stays; their weights do not."""
    for model in models:
        model.to("meta")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class CachedPairs:
    """The cached items of the rows a cache was built for. Workers may get it by fork or pickle."""

    def __init__(
        self, paths: Sequence[Path], places: Places, refused: Mapping[int, str],
        captions: Index | None,
    ) -> None:  # fmt: skip
        self.paths, self.places, self.refused, self.captions = paths, places, refused, captions
        self.shards: dict[int, Any] = {}  # opened by the process that reads them

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "shards": {}}

    def _shard(self, place: Any) -> Any:
        shard = int(place[0])
        if shard not in self.shards:
            self.shards[shard] = safe_open(self.paths[shard], "pt")
        return self.shards[shard]

    def _read(self, place: Any, names: Sequence[str]) -> list[Tensor]:
        # Copied: what comes is a view of the mapped file.
        return [self._shard(place).get_slice(name)[int(place[1])].clone() for name in names]

    def image(self, index: int, side: int, flip: bool = False) -> dict[str, Tensor]:
        """mean and std (fp32) of the latents of row `index`'s jpg_`side`, and its time_ids."""
        members = self.places.shape[1]
        cell = members * index + side
        if cell in self.refused:
            raise BadImage(where_is(cell, members), self.refused[cell])
        if int(flip) >= self.places.shape[2]:
            raise ValueError(f"flip={flip}: the cache was built with random_flip=False")
        mean, std, time_ids = self._read(self.places[index, side, int(flip)], IMAGE_TENSORS[1:])
        return {"mean": mean.float(), "std": std.float(), "time_ids": time_ids}

    def caption(self, text: str) -> dict[str, Tensor] | None:
        """The embeddings of `text` by name, fp32; None if none are cached."""
        if self.captions is None:
            return None
        at = int(self.captions.find(as_keys([digest(text.encode())]))[0])
        if at < 0:
            raise ValueError(f"caption {text!r} is in no column that the cache was built for")
        place = self.captions.places[at]
        names = [name for name in sorted({*self._shard(place).keys()}) if name != "keys"]
        read = self._read(place, names)
        return {name: values.float() for name, values in zip(names, read, strict=True)}


def plan_build(
    folder: Path, keys: Keys, item_bytes: npt.NDArray[np.int64], what: str
) -> tuple[npt.NDArray[np.bool_], str]:
    """Which of the items `keys` (N, KEY_BYTES) the folder lacks, and why they cannot be added to it
    ("" if they can). Prints how much all this is; writes nothing."""
    found = read_folder(folder)
    lacking = found.items.find(keys) < 0
    to_write, free = int(item_bytes[lacking].sum()), free_bytes(folder)
    print(
        f"latent cache {folder}: {what}, {in_words(item_bytes.sum())}: "
        f"{in_words(item_bytes[~lacking].sum())} there already, {in_words(to_write)} to write, "
        f"{in_words(free)} free"
    )
    for line in found.unreadable:
        print(f"latent cache: ignored, and encoded again where needed: {line}")
    items, unused = found.unused(keys)
    if items:
        print(f"latent cache: {items:,} items ({in_words(unused)}) are of other pairs or settings")
    error = ""
    if to_write > free:
        error = (
            f"latent_cache={str(folder)!r}: {what} need {in_words(to_write)} more; there are "
            f"{in_words(free)} free; need another disk, less data or a smaller resolution"
        )
    return lacking, error


def latent_shape(vae: Any, size: Sequence[int]) -> tuple[int, int, int]:
    """The shape of the latents of a picture of `size`."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    return vae.config.latent_channels, size[0] // factor, size[1] // factor


@torch.no_grad()
def build_cache(
    family: Family, folder: Path, rows: datasets.Dataset, buckets: npt.NDArray[Any],
    sizes: Sequence[tuple[int, int]], encoders: Encoders, accelerator: Accelerator, *,
    random_flip: bool, batch_size: int, dtype: torch.dtype, caption_columns: Sequence[str],
    captions: bool = True, settings: Mapping[str, str] | None = None, num_workers: int = 0,
) -> CachedPairs:  # fmt: skip
    """Encode what `folder` lacks of the images of `rows` and of their captions, and open it.

    Every process calls this, for a folder that all of them see. Row i has the size
    sizes[buckets[i]]; with `random_flip` each image is stored in both orientations. `settings` is
    whatever else the values depend on. Says what it will write before it writes; an image that
    cannot be decoded is left out, and raises BadImage when it is asked for.
    """
    if dtype not in VAE_DTYPES.values():
        raise ValueError(f"dtype={dtype}; need one of {list(VAE_DTYPES.values())}")
    if len(buckets) != len(rows):
        raise ValueError(f"buckets has {len(buckets)} entries for {len(rows)} rows; need one each")
    folder, buckets, flips = Path(folder), np.asarray(buckets), 2 if random_flip else 1
    vae, settings = encoders.vae, settings or {}

    # The key of all that the rows need, and each once: images first, then captions.
    model = fingerprint([vae], dtype, settings)
    recipes = [
        [f"image {tuple(map(int, size))} {CENTRE} {flip}".encode() + model for flip in range(flips)]
        for size in sizes
    ]
    images = undecoded(rows)
    keys, refused = image_keys(images, [recipes[bucket] for bucket in buckets], accelerator)
    flat = keys.reshape(-1, KEY_BYTES)
    image_items = firsts(flat)
    image_items = image_items[~np.isin(image_items // flips, list(refused))]
    texts, text_keys = [], as_keys([])
    if captions:
        texts = unique_captions(rows, caption_columns)
        text_model = fingerprint(encoders.text_encoders, dtype, settings)
        text_keys = caption_keys(family, texts, encoders, text_model)
    text_items = firsts(text_keys)

    # What the folder lacks of it, as one process sees it before any writes.
    bucket_bytes = [cache_size(1, 0, latent_shape(vae, size), (), dtype) for size in sizes]
    shapes = []
    if texts:
        shapes = [each.shape[1:] for each in encode_captions(family, [""], encoders).values()]
    text_bytes = cache_size(0, 1, (), shapes, dtype)
    verdict: list[Any] = [None]
    if accelerator.is_main_process:
        verdict[0] = plan_build(
            folder,
            np.concatenate([flat[image_items], text_keys[text_items]]),
            np.concatenate(
                [
                    np.array(bucket_bytes)[buckets[image_items // (keys.shape[1] * flips)]],
                    np.full(len(text_items), text_bytes),
                ]
            ),
            f"{len(image_items):,} images and {len(text_items):,} captions",
        )
    lacking, error = broadcast_object_list(verdict)[0]
    if error:
        raise ValueError(error)

    if lacking.any():
        if accelerator.is_main_process:
            make_folder("--latent_cache", folder)
            remove_leftovers(folder, ABANDONED_SECONDS)
        accelerator.wait_for_everyone()
        with ShardWriter(folder, accelerator.process_index) as writer:
            bad = encode_missing_images(
                Pictures(images, sizes, buckets, flips), flat,
                image_items[lacking[: len(image_items)]],
                vae, accelerator, writer, batch_size, dtype, num_workers,
            )  # fmt: skip
            encode_missing_captions(
                family, texts, text_keys, text_items[lacking[len(image_items) :]],
                encoders, accelerator, writer, dtype,
            )  # fmt: skip
        # Every process must know what any of them refused; this also waits for all to be done.
        for some in gather_object([bad]):
            refused |= some
        accelerator.wait_for_everyone()
    return open_cache(folder, keys, refused, texts, text_keys)


def open_cache(
    folder: Path, keys: Keys, refused: Mapping[int, str], texts: Sequence[str], text_keys: Keys
) -> CachedPairs:
    """The items of images, (rows, members, flips, KEY_BYTES), and of `texts`, all of which must be
    there.

    What was refused once is refused wherever else the same image occurs."""
    flat = sortable(keys[:, :, 0].reshape(-1, KEY_BYTES))
    known = {flat[cell]: reason for cell, reason in refused.items()}
    for pause in PATIENCE:
        time.sleep(pause)
        found = read_folder(folder)
        places, text_places = found.places(keys), found.places(text_keys)
        absent = np.flatnonzero((places[..., 0] < 0).any(axis=-1)).tolist()
        lost = [where_is(cell, keys.shape[1]) for cell in absent if flat[cell] not in known]
        lost += [f"caption {texts[i]!r}" for i in np.flatnonzero(text_places[:, 0] < 0).tolist()]
        if not lost:
            break
    else:
        raise ValueError(
            f"latent_cache={str(folder)!r}: {lost[0]} is in none of its {len(found.paths)} shards "
            "though it was encoded; need a folder that all processes see, and none empties"
        )
    captions = None
    if texts:
        text_digests = sortable(as_keys(digest(text.encode()) for text in texts))
        order = np.argsort(text_digests)
        captions = Index(text_digests[order], text_places[order])
    return CachedPairs(found.paths, places, {cell: known[flat[cell]] for cell in absent}, captions)
