"""The latent cache: it gives what encoding gives, encodes what it lacks, and nothing else."""

from __future__ import annotations

import copy
import io
import os
import pickle
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from safetensors.torch import load_file
from torch.multiprocessing.spawn import start_processes

from toy.tiny import tiny_sdxl
from trainer.data import cache, shards
from trainer.data.batches import Collator
from trainer.data.cache import CachedPairs, build_cache, cache_size, encode_captions, release
from trainer.data.images import BadImage, fit, open_image
from trainer.data.pairs import PreferencePairs
from trainer.families.family import Encoders
from trainer.families.sdxl import SDXL
from trainer.families.vae import encode_images

SIZES = [(16, 16), (16, 32)]
BUCKETS = np.array([0, 1, 0, 0, 1])
CAPTIONS = ["a cat", "a dog", "a cat", "", "two birds"]
IMAGES = 9  # unique ones among five pairs
Row = dict[str, Any]


def png(seed: int, size: tuple[int, int] = (24, 20)) -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PILImage.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def make_rows() -> list[Row]:
    """Five pairs: an image occurs twice in one size, and a caption in two rows."""
    seeds = [(0, 1), (2, 3), (0, 4), (5, 6), (7, 8)]
    sizes = [(24, 20), (40, 24), (24, 20), (20, 30), (40, 24)]
    return [
        {"jpg_0": png(a, size), "jpg_1": png(b, size), "label_0": i % 2, "caption": caption}
        for i, ((a, b), size, caption) in enumerate(zip(seeds, sizes, CAPTIONS, strict=True))
    ]


def make_encoders() -> Encoders:
    pipe = tiny_sdxl((8, 16), (8, 8), sample_size=8, norm_num_groups=4)
    tokenizers, texts = [pipe.tokenizer, pipe.tokenizer_2], [pipe.text_encoder, pipe.text_encoder_2]
    return Encoders(pipe.vae.requires_grad_(False), tokenizers, texts)


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    return make_encoders()


@pytest.fixture
def accelerator() -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True)


class Encoded(NamedTuple):
    images: int
    captions: int


Build = Callable[..., CachedPairs]


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Encoded]:
    """How many images and captions were encoded since it was last asked."""
    counts = [0, 0]

    def images(vae: Any, pixels: torch.Tensor) -> Any:
        counts[0] += len(pixels)
        return encode_images(vae, pixels)

    def captions(family: Any, texts: Any, encoders: Any) -> Any:
        counts[1] += len(texts) if texts != [""] else 0  # which says how large they are
        return encode_captions(family, texts, encoders)

    def read() -> Encoded:
        since, counts[:] = Encoded(*counts), [0, 0]
        return since

    monkeypatch.setattr(cache, "encode_images", images)
    monkeypatch.setattr(cache, "encode_captions", captions)
    return read


@pytest.fixture
def build(tmp_path: Path, encoders: Encoders, accelerator: Accelerator) -> Build:
    """Build the cache in tmp_path/cache; any argument may be another."""

    def run(rows: list[Row] | Dataset | None = None, **options: Any) -> CachedPairs:
        settings: dict[str, Any] = {
            "family": SDXL,
            "folder": tmp_path / "cache",
            "buckets": BUCKETS,
            "sizes": SIZES,
            "encoders": encoders,
            "accelerator": accelerator,
            "random_flip": False,
            "batch_size": 3,
            "dtype": torch.float32,
            "caption_columns": ["caption"],
            **options,
        }
        rows = make_rows() if rows is None else rows
        rows = Dataset.from_list(rows) if isinstance(rows, list) else rows
        settings["buckets"] = settings["buckets"][: len(rows)]
        return build_cache(rows=rows, **settings)

    return run


def afresh(vae: Any, cell: Any, size: tuple[int, int], flip: bool = False) -> list[torch.Tensor]:
    """Mean, std and time ids of a picture, encoded alone."""
    pixels, time_ids = fit(open_image(cell, "here"), size, (0.5, 0.5), flip)
    with torch.no_grad():
        mean, std = encode_images(vae, pixels[None])
    return [mean[0], std[0], time_ids]


def assert_reads_as_encoded(
    cached: CachedPairs, encoders: Encoders, flips: tuple[bool, ...] = (False,), rtol: float = 1e-6
) -> None:
    for index, row in enumerate(make_rows()):
        for side in range(2):
            for flip in flips:
                read = cached.image(index, side, flip)
                want = afresh(encoders.vae, row[f"jpg_{side}"], SIZES[BUCKETS[index]], flip)
                for name, values in zip(("mean", "std"), want[:2], strict=True):
                    assert read[name].dtype == torch.float32
                    torch.testing.assert_close(read[name], values, rtol=rtol, atol=rtol)
                assert read["time_ids"].equal(want[2])
        with torch.no_grad():
            ids = SDXL.tokenize(encoders.tokenizers, [row["caption"]])
            expected = SDXL.encode_text(encoders.text_encoders, ids)
        first = {name: values[0] for name, values in expected.items()}
        torch.testing.assert_close(cached.caption(row["caption"]), first, rtol=rtol, atol=rtol)


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float32, 2e-6), (torch.float16, 2**-10), (torch.bfloat16, 2**-7)]
)
def test_what_is_read_is_what_encoding_gives(
    build: Build, encoders: Encoders, dtype: torch.dtype, rtol: float
) -> None:
    assert_reads_as_encoded(build(dtype=dtype), encoders, rtol=rtol)


def test_both_orientations_are_the_mirrored_picture_and_its_crop(
    build: Build, encoders: Encoders
) -> None:
    cached = build(random_flip=True, num_workers=1)
    assert_reads_as_encoded(cached, encoders, flips=(False, True))
    straight, mirrored = cached.image(3, 0, False), cached.image(3, 0, True)
    assert not straight["mean"].allclose(mirrored["mean"])


def test_a_flip_that_was_not_cached_is_an_error(build: Build) -> None:
    with pytest.raises(ValueError, match="flip=True: the cache was built with random_flip=False"):
        build().image(0, 0, True)


def test_every_image_and_caption_is_encoded_once(
    build: Build, encoded: Callable[[], Encoded]
) -> None:
    build()
    assert encoded() == Encoded(IMAGES, 4)  # three captions and the empty one
    build()
    build(list(reversed(make_rows())), buckets=BUCKETS[::-1].copy())
    assert encoded() == Encoded(0, 0)
    build(random_flip=True)
    assert encoded() == Encoded(IMAGES, 0)


def with_noise(model: Any) -> Any:
    changed = copy.deepcopy(model)
    parameter = next(iter(changed.parameters()))
    parameter.data.view(-1)[0] += 1e-3
    return changed


def test_what_changed_is_encoded_anew_and_nothing_else(
    build: Build, encoders: Encoders, encoded: Callable[[], Encoded]
) -> None:
    build()
    encoded()
    rows = make_rows()
    rows[1]["jpg_0"], rows[4]["caption"] = png(99, (40, 24)), "three birds"
    cached = build(rows)
    assert encoded() == Encoded(1, 1)
    fresh = afresh(encoders.vae, rows[1]["jpg_0"], SIZES[1])
    torch.testing.assert_close(cached.image(1, 0, False)["mean"], fresh[0], rtol=1e-6, atol=1e-6)

    build(sizes=[(16, 16), (32, 16)])
    assert encoded() == Encoded(4, 0)
    vae = with_noise(encoders.vae)
    cached = build(encoders=encoders._replace(vae=vae))
    assert encoded() == Encoded(IMAGES, 0)
    fresh = afresh(vae, make_rows()[0]["jpg_0"], SIZES[0])
    torch.testing.assert_close(cached.image(0, 0, False)["mean"], fresh[0], rtol=1e-6, atol=1e-6)
    rescaled = copy.deepcopy(encoders.vae)
    rescaled.register_to_config(scaling_factor=1.0)
    build(encoders=encoders._replace(vae=rescaled))
    assert encoded() == Encoded(IMAGES, 0)
    build(encoders=encoders._replace(vae=copy.deepcopy(encoders.vae).to(torch.bfloat16)))
    assert encoded() == Encoded(IMAGES, 0)
    texts = [encoders.text_encoders[0], with_noise(encoders.text_encoders[1])]
    build(encoders=encoders._replace(text_encoders=texts))
    assert encoded() == Encoded(0, 4)
    build(dtype=torch.float16)
    assert encoded() == Encoded(IMAGES, 4)
    build(settings={"of": "another kind"})
    assert encoded() == Encoded(IMAGES, 4)
    build()  # all of the first is still there
    assert encoded() == Encoded(0, 0)


def test_another_tokenization_is_another_caption(
    build: Build, encoders: Encoders, encoded: Callable[[], Encoded]
) -> None:
    build()
    encoded()

    def backwards(tokenizer: Any) -> Any:
        def call(texts: list[str], **options: Any) -> Any:
            return tokenizer([text[::-1] for text in texts], **options)

        call.model_max_length = tokenizer.model_max_length  # type: ignore[attr-defined]
        return call

    build(encoders=encoders._replace(tokenizers=[backwards(t) for t in encoders.tokenizers]))
    assert encoded() == Encoded(0, 3)  # the empty one is as it was


def test_the_same_picture_is_found_in_bytes_paths_and_image_columns(
    build: Build, encoded: Callable[[], Encoded], tmp_path: Path
) -> None:
    before = build()
    encoded()
    rows = make_rows()
    for i, row in enumerate(rows):
        (tmp_path / f"{i}.png").write_bytes(row["jpg_1"])
        row["jpg_1"] = str(tmp_path / f"{i}.png")
        row["jpg_0"] = {"bytes": row["jpg_0"], "path": None}
    features = Features(
        jpg_0=Image(), jpg_1=Value("string"), label_0=Value("int64"), caption=Value("string")
    )
    cached = build(Dataset.from_list(rows, features=features))
    assert encoded() == Encoded(0, 0)
    assert cached.image(2, 1, False)["mean"].equal(before.image(2, 1, False)["mean"])
    (tmp_path / "2.png").write_bytes(png(77))
    build(Dataset.from_list(rows, features=features))
    assert encoded() == Encoded(1, 0)


def test_a_build_that_was_stopped_goes_on(
    build: Build, encoders: Encoders, encoded: Callable[[], Encoded], monkeypatch: Any
) -> None:
    counted, left = vars(cache)["encode_images"], [2]

    def dying(vae: Any, pixels: torch.Tensor) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return counted(vae, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "encode_images", dying)
        with pytest.raises(KeyboardInterrupt):
            build()
    first = encoded()
    assert first == Encoded(5, 0)  # five images of one size in threes
    cached = build()
    assert encoded() == Encoded(IMAGES - 5, 4)
    assert_reads_as_encoded(cached, encoders, rtol=2e-6)


def test_a_build_that_was_killed_outright_keeps_what_it_had_flushed(
    build: Build, encoded: Callable[[], Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = vars(cache)["encode_images"]

    def dying(vae: Any, pixels: torch.Tensor) -> Any:
        if pixels.shape[-1] == 32:  # the third batch
            raise RuntimeError("killed")
        return counted(vae, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "FLUSH_BATCHES", 2)
        patch.setattr(shards.ShardWriter, "__exit__", lambda *_: None)
        patch.setattr(cache, "encode_images", dying)
        with pytest.raises(RuntimeError, match="killed"):
            build()
    assert encoded() == Encoded(5, 0)
    build()
    assert encoded() == Encoded(IMAGES - 5, 4)


@pytest.mark.parametrize("harm", ["cut short", "emptied", "foreign"])
def test_a_shard_that_is_not_whole_is_ignored_and_made_again(
    build: Build, encoders: Encoders, encoded: Callable[[], Encoded], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], harm: str,
) -> None:  # fmt: skip
    build()
    encoded()
    shard = next((tmp_path / "cache").glob("images-16x16-*"))
    if harm == "foreign":
        torch.save({}, shard)
    else:
        os.truncate(shard, 0 if harm == "emptied" else shard.stat().st_size - 1)
    capsys.readouterr()
    cached = build()
    assert f"ignored, and encoded again where needed: {shard}" in capsys.readouterr().out
    assert encoded() == Encoded(5, 0)
    assert_reads_as_encoded(cached, encoders, rtol=2e-6)


def test_items_in_many_shards_of_any_size_are_all_found(
    build: Build, encoders: Encoders, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 1)
    cached = build(batch_size=1)
    assert len(list((tmp_path / "cache").iterdir())) == IMAGES + 1
    assert_reads_as_encoded(cached, encoders, rtol=2e-6)


def build_in_process(rank: int, world: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # a file is where they meet
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == world
    rows = make_rows()
    rows[4]["jpg_1"] = b"no image"  # hashed by the second process
    cached = build_cache(
        SDXL, folder / "both", Dataset.from_list(rows), BUCKETS, SIZES, make_encoders(),
        accelerator, random_flip=True, batch_size=2, dtype=torch.float32,
        caption_columns=["caption"],
    )  # fmt: skip
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(cached))
    torch.distributed.barrier()
    os._exit(0)  # to destroy a gloo group joins its threads, one of which may wait for the GIL


def keyed(folder: Path) -> dict[bytes, list[torch.Tensor]]:
    items = {}
    for path in folder.glob("*.safetensors"):
        shard = load_file(path)
        keys = shard.pop("keys").numpy()
        names = sorted(shard)
        for i, key in enumerate(keys):
            assert key.tobytes() not in items
            items[key.tobytes()] = [shard[name][i] for name in names]
    return items


def test_two_processes_build_what_one_builds(build: Build, tmp_path: Path) -> None:
    # Forked: it takes long to import everything again.
    start_processes(build_in_process, (2, tmp_path), nprocs=2, start_method="fork")
    rows = make_rows()
    rows[4]["jpg_1"] = b"no image"
    build(rows, random_flip=True)
    one, two = keyed(tmp_path / "cache"), keyed(tmp_path / "both")
    assert one.keys() == two.keys()
    assert len(one) == 2 * (IMAGES - 1) + 4
    for key, values in one.items():
        torch.testing.assert_close(two[key], values, rtol=1e-6, atol=1e-6)
    writers = [re.findall("-p([01])-", path.name)[0] for path in (tmp_path / "both").iterdir()]
    assert set(writers) == {"0", "1"}
    for rank in range(2):
        cached = pickle.loads((tmp_path / f"{rank}.pickle").read_bytes())
        cached.image(4, 0, True)
        with pytest.raises(BadImage, match="row 4, column jpg_1"):
            cached.image(4, 1, True)


def test_an_image_that_cannot_be_decoded_is_refused_wherever_it_is(
    build: Build, encoded: Callable[[], Encoded]
) -> None:
    rows = make_rows()
    broken = rows[0]["jpg_0"][:200]
    rows[0]["jpg_0"] = rows[2]["jpg_0"] = broken
    rows[3]["jpg_1"] = "no/such/file.png"
    rows[3]["jpg_0"] = "nor/this.png"
    for row in rows[:3] + rows[4:]:  # one type for a column
        for side in range(2):
            row[f"jpg_{side}"] = {"bytes": row[f"jpg_{side}"], "path": None}
    for side in range(2):
        rows[3][f"jpg_{side}"] = {"bytes": None, "path": rows[3][f"jpg_{side}"]}
    cached = build(rows)
    assert encoded().images == IMAGES - 3
    for index in (0, 2):
        with pytest.raises(BadImage) as error:
            cached.image(index, 0, False)
        assert error.value.where == f"row {index}, column jpg_0"
        assert error.value.reason
    with pytest.raises(BadImage, match=r"row 3, column jpg_1.*No such file"):
        cached.image(3, 1, False)
    cached.image(0, 1, False)


def test_the_size_is_said_before_anything_is_written(
    build: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    free = [10]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free[0]))
    with pytest.raises(ValueError, match=r"9 images and 4 captions need 107 kB more.*10 B free"):
        build()
    assert list(tmp_path.iterdir()) == []
    expected = sum(
        cache_size(n, 0, (4, h // 2, w // 2), (), torch.float32)
        for n, (h, w) in zip((5, 4), SIZES, strict=True)
    ) + cache_size(0, 4, (), [(77, 64), (32,)], torch.float32)
    free[0] = expected
    capsys.readouterr()
    build()
    shards = list((tmp_path / "cache").iterdir())
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in shards)
    assert sum(path.stat().st_size for path in shards) - headers == expected
    assert "0 B there already" in capsys.readouterr().out
    build(dtype=torch.bfloat16, captions=False)
    words = capsys.readouterr().out
    assert "9 images and 0 captions" in words
    assert "13 items (107 kB)" in words
    free[0] = 0
    build()  # writes nothing, needs nothing
    assert ", 0 B to write" in capsys.readouterr().out


def test_what_sdxl_at_1024_takes() -> None:
    image = cache_size(1, 0, (4, 128, 128), (), torch.float16)
    text = [(77, 2048), (1280,)]
    caption = cache_size(0, 1, (), text, torch.float16)
    assert (image, caption) == (262_208, 317_968)
    both = cache_size(5, 7, (4, 128, 128), text, torch.float16)
    assert both == 5 * image + 7 * caption


def test_a_folder_that_others_do_not_see_is_an_error(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "PATIENCE", (0, 0))
    monkeypatch.setattr(shards.ShardWriter, "flush", lambda _: None)
    with pytest.raises(ValueError, match="row 0, column jpg_0 is in none of its 0 shards"):
        build()


def test_shards_that_appear_late_are_waited_for(
    build: Build, encoders: Encoders, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As those of other machines do in a folder on the network."""
    build()
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    monkeypatch.setattr(shards.ShardWriter, "flush", lambda _: None)

    def sleep(seconds: float) -> None:
        if seconds:
            (tmp_path / "cache").rmdir()
            (tmp_path / "elsewhere").rename(tmp_path / "cache")

    monkeypatch.setattr(time, "sleep", sleep)
    assert_reads_as_encoded(build(), encoders, rtol=2e-6)


@pytest.mark.parametrize(("factor", "words"), [
    (1e6, "do not fit dtype=torch.float16"), (float("nan"), "are not finite as AutoencoderKL"),
])  # fmt: skip
def test_values_that_cannot_be_stored_are_an_error(
    build: Build, monkeypatch: pytest.MonkeyPatch, factor: float, words: str, tmp_path: Path
) -> None:
    def large(vae: Any, pixels: torch.Tensor) -> Any:
        mean, std = encode_images(vae, pixels)
        return mean * factor, std

    monkeypatch.setattr(cache, "encode_images", large)
    with pytest.raises(ValueError, match=rf"means of latents.*{words}"):
        build(dtype=torch.float16)
    assert list((tmp_path / "cache").iterdir()) == []


def test_captions_of_encoders_that_learn_are_not_cached(
    build: Build, encoded: Callable[[], Encoded]
) -> None:
    cached = build(captions=False)
    assert encoded() == Encoded(IMAGES, 0)
    assert cached.caption("a cat") is None


def test_a_caption_that_was_not_there_is_an_error(build: Build) -> None:
    cached = build()
    assert cached.caption("") is not None
    with pytest.raises(ValueError, match="caption 'a cow' is in no column"):
        cached.caption("a cow")


def test_arguments_that_make_no_sense_are_errors(build: Build) -> None:
    with pytest.raises(ValueError, match="buckets has 2 entries for 5 rows"):
        build(buckets=BUCKETS[:2])
    with pytest.raises(ValueError, match=r"dtype=torch.int8; need one of .*torch.float16"):
        build(dtype=torch.int8)
    rows = make_rows()
    rows[1]["caption"] = None
    with pytest.raises(ValueError, match="hold None; need captions that are text"):
        build(rows)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_reads_it_without_encoders_in_workers(
    build: Build, encoders: Encoders, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = build(random_flip=True)
    own = copy.deepcopy(encoders)
    release(own.vae, *own.text_encoders)
    assert all(p.device.type == "meta" for p in own.vae.parameters())
    rows = Dataset.from_list(make_rows())
    seen = PreferencePairs(rows, SIZES, BUCKETS, random_flip=True)
    read = PreferencePairs(rows, SIZES, BUCKETS, random_flip=True, cached=cached)
    keys = [[(0, 0), (0, 2), (1, 3)], [(3, 1), (0, 4)]]
    loader = torch.utils.data.DataLoader(
        read,
        batch_sampler=keys,
        collate_fn=Collator(SDXL, encoders.tokenizers),
        num_workers=num_workers,
    )
    for batch, some in zip(loader, keys, strict=True):
        plain = Collator(SDXL, encoders.tokenizers)([seen[key] for key in some])
        with torch.no_grad():
            mean, std = encode_images(encoders.vae, plain["pixels"])
            text = SDXL.encode_text(encoders.text_encoders, plain["input_ids"])
        read_back = {"mean": batch["mean"], "std": batch["std"], **batch["text"]}
        torch.testing.assert_close(
            read_back, {"mean": mean, "std": std, **text}, rtol=2e-6, atol=2e-6
        )
        assert batch["time_ids"].equal(plain["time_ids"])
        assert batch["seeds"] == plain["seeds"]


def test_open_shards_are_left_behind_when_it_is_pickled(build: Build) -> None:
    cached = build()
    before = cached.image(1, 1, False)
    assert cached.shards
    other = pickle.loads(pickle.dumps(cached))
    assert not other.shards
    assert other.image(1, 1, False)["mean"].equal(before["mean"])


def test_what_a_killed_build_left_is_removed_once_it_is_old(build: Build, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    old, new = tmp_path / "cache/.tmp-old", tmp_path / "cache/.tmp-new"
    for path in (old, new):
        path.mkdir()
        (path / "half").write_bytes(b"half a shard")
    os.utime(old, (0, 0))
    build()
    assert not old.exists()
    assert new.exists()  # of a build that may be running
