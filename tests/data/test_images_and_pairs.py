"""The demo's data and model: real photographs, sound pairs, real tokenizers, a whole pipeline."""

from __future__ import annotations

import functools
import io
import itertools
import math
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from diffusers import StableDiffusionXLPipeline
from PIL import ExifTags, Image
from torch.utils.data import DataLoader

from toy.photo_pairs import (
    DEGRADATIONS,
    PHOTOGRAPHS,
    load_photograph,
    split_photographs,
    write_photo_pairs,
)
from toy.tiny import byte_tokenizer, tiny_sdxl
from trainer.data.buckets import bucket_sizes, nearest_buckets
from trainer.data.images import BadImage, Size, fit, open_image, read_size
from trainer.data.pairs import (
    PairBatches,
    PairStream,
    PreferencePairs,
    StreamedPairs,
)

SQUARE = [(16, 16)]


def bucket_of(size_0: Size, size_1: Size, sizes: list[Size]) -> int:
    """The bucket of one pair."""
    return int(nearest_buckets(np.array([[size_0, size_1]]), sizes)[0])


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def gradient(width: int, height: int) -> Image.Image:
    """A picture whose red says the column and whose green says the row."""
    x = np.broadcast_to(np.linspace(0, 255, width), (height, width))
    y = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    return Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8))


def rows(count: int = 4, **changes: Any) -> Dataset:
    row = {"jpg_0": png(gradient(48, 32)), "jpg_1": png(gradient(30, 60)), "label_0": 1.0}
    return Dataset.from_list([{**row, "caption": f"caption {i}", **changes} for i in range(count)])


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_photo_pairs(folder, train=48, heldout=16, size=32)
    return folder


def test_parquet_has_the_columns_of_pick_a_pic(photos: Path) -> None:
    schema = pq.read_schema(photos / "train.parquet")
    types = {name: str(schema.field(name).type) for name in schema.names}
    expected = {"jpg_0": "binary", "jpg_1": "binary", "label_0": "double", "caption": "string"}
    assert expected.items() <= types.items()


def test_winner_is_the_photograph_and_sides_are_mixed(photos: Path) -> None:
    table = pq.read_table(photos / "train.parquet").to_pylist()
    assert {row["label_0"] for row in table} == {0.0, 1.0}
    kinds = set()
    for row in table:
        winner, loser = ("0", "1") if row["label_0"] == 1 else ("1", "0")
        assert row[f"model_{winner}"] == "photograph"
        assert row["label_0"] + row["label_1"] == 1
        pictures = [Image.open(io.BytesIO(row[f"jpg_{side}"])) for side in "01"]
        assert [picture.size for picture in pictures] == [(32, 32)] * 2
        assert np.abs(np.subtract(*(np.asarray(p, np.float32) for p in pictures))).mean() > 2
        kinds.add(row[f"model_{loser}"])
    assert kinds == set(DEGRADATIONS)


def test_heldout_pairs_come_from_other_photographs(photos: Path) -> None:
    seen, unseen = (
        set(pq.read_table(photos / f"{split}.parquet")["photograph"].to_pylist())
        for split in ("train", "heldout")
    )
    assert unseen == {"camera.png", "chelsea.png", "china.jpg", "coffee.png"}
    assert seen == set(PHOTOGRAPHS) - unseen
    assert not seen & unseen
    pictures = [np.asarray(load_photograph(name)).tobytes() for name in (*seen, *unseen)]
    assert len(set(pictures)) == len(pictures)


def test_the_same_seed_gives_the_same_pairs(photos: Path, tmp_path: Path) -> None:
    for seed, same in ((0, True), (1, False)):
        write_photo_pairs(tmp_path, train=48, heldout=16, size=32, seed=seed)
        for split in ("train", "heldout"):
            again = pq.read_table(tmp_path / f"{split}.parquet")
            assert again.equals(pq.read_table(photos / f"{split}.parquet")) == same


def test_byte_tokenizer_is_complete_and_reversible() -> None:
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == 514
    for text in ("a cat on a mat", "naïve café €", "猫 🐈"):
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True).split() == text.lower().split()


def test_pooled_embedding_is_taken_at_the_end_of_the_text() -> None:
    pipeline = tiny_sdxl((8, 8), (4, 4), norm_num_groups=2)
    tokenizer, encoder = pipeline.tokenizer_2, pipeline.text_encoder_2
    ids = tokenizer("cat", padding="max_length", return_tensors="pt", max_length=77).input_ids
    with torch.no_grad():
        encoded = encoder(ids)
        end = encoded.last_hidden_state[:, ids[0].tolist().index(tokenizer.eos_token_id)]
        torch.testing.assert_close(encoded.text_embeds, encoder.text_projection(end))


def test_tiny_pipeline_opens_and_generates(tmp_path: Path) -> None:
    tiny_sdxl((8, 16), (8, 8), sample_size=8, norm_num_groups=2).save_pretrained(tmp_path)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a cat", num_inference_steps=2, height=16, width=16).images[0]
    assert image.size == (16, 16)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [(32, 32), (24, 48), (48, 24)])
@pytest.mark.parametrize(("width", "height"), [(97, 50), (50, 97), (33, 31), (20, 64)])
def test_time_ids_tell_what_was_done(
    width: int, height: int, size: tuple[int, int], flip: bool
) -> None:
    pixels, time_ids = fit(gradient(width, height), size, (0.25, 0.75), flip)
    assert pixels.shape == (3, *size)
    original_h, original_w, top, left, target_h, target_w = time_ids.tolist()
    assert (original_h, original_w, target_h, target_w) == (height, width, *size)
    scale = max(size[0] / height, size[1] / width)
    whole_w, whole_h = max(size[1], round(width * scale)), max(size[0], round(height * scale))
    assert top == round(0.75 * (whole_h - size[0]))
    # Where the gradient says the crop lies: what its middle shows.
    middle_h, middle_w = size[0] // 2, size[1] // 2
    column = (pixels[0, middle_h, middle_w].item() + 1) / 2 * whole_w
    row = (pixels[1, middle_h, middle_w].item() + 1) / 2 * whole_h
    shown = whole_w - column if flip else column
    assert shown == pytest.approx(left + middle_w, abs=1.5)
    assert row == pytest.approx(top + middle_h, abs=1.5)
    # Not distorted: in both directions a pixel is as much of the original.
    across = (pixels[0, :, -2] - pixels[0, :, 1]).abs().mean() / (size[1] - 3) * width
    down = (pixels[1, -2] - pixels[1, 1]).abs().mean() / (size[0] - 3) * height
    assert across.item() == pytest.approx(down.item(), rel=0.12)


def test_a_pair_shares_window_and_flip_whatever_its_sizes() -> None:
    image = gradient(64, 32)
    twice = png(image), png(image.resize((128, 64)))
    pairs = PreferencePairs(
        rows(jpg_0=twice[0], jpg_1=twice[1]), SQUARE, random_crop=True, random_flip=True
    )
    flips = set()
    for epoch in range(8):
        pair = pairs[epoch, 0]
        torch.testing.assert_close(pair["pixels_w"], pair["pixels_l"], atol=0.1, rtol=0)
        assert pair["time_ids_w"][2:].equal(pair["time_ids_l"][2:])
        assert pair["time_ids_w"][:2].tolist() == [32, 64]
        assert pair["time_ids_l"][:2].tolist() == [64, 128]
        flips.add(bool(pair["pixels_w"][0, 0, 0] > pair["pixels_w"][0, 0, -1]))
    assert flips == {True, False}


def test_a_sample_depends_on_seed_epoch_and_index_alone() -> None:
    first, second = (
        PreferencePairs(rows(), SQUARE, seed=3, random_crop=True, random_flip=True)
        for _ in range(2)
    )
    first[0, 1]
    assert first[5, 2]["pixels_w"].equal(second[5, 2]["pixels_w"])
    assert first[5, 2]["seed"] == second[5, 2]["seed"] != second[6, 2]["seed"]


def test_winner_follows_the_label_and_label_noise_flips_it() -> None:
    data = rows(400, jpg_0=png(Image.new("RGB", (16, 16), "white")),
                jpg_1=png(Image.new("RGB", (16, 16), "black")))  # fmt: skip

    def white_wins(noise: float, epoch: int = 0) -> list[bool]:
        pairs = PreferencePairs(data, SQUARE, label_noise_prob=noise)
        return [bool(pairs[epoch, i]["pixels_w"].mean() > 0) for i in range(len(pairs))]

    assert all(white_wins(0.0))
    assert not any(white_wins(1.0))
    assert 150 < sum(white_wins(0.5)) < 250
    assert white_wins(0.5) == white_wins(0.5, epoch=1)


def test_empty_prompts() -> None:
    for share, count in ((0.0, 0), (1.0, 4)):
        pairs = PreferencePairs(rows(), SQUARE, proportion_empty_prompts=share)
        assert [pairs[0, i]["captions"] for i in range(4)].count([""]) == count


def test_two_captions_are_dropped_together_and_follow_their_images() -> None:
    data = rows(40, worse="a worse one")
    pairs = PreferencePairs(
        data, SQUARE, loser_caption_column="worse", proportion_empty_prompts=0.5
    )
    captions = [pairs[0, i]["captions"] for i in range(40)]
    kept = [[f"caption {i}", "a worse one"] for i in range(40)]
    assert all(found in (["", ""], both) for found, both in zip(captions, kept, strict=True))
    assert 10 < captions.count(["", ""]) < 30
    flipped = PreferencePairs(data, SQUARE, loser_caption_column="worse", label_noise_prob=1.0)
    assert [flipped[0, i]["captions"] for i in range(40)] == [both[::-1] for both in kept]


@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_a_score_stays_with_its_image(label: float, noise: float) -> None:
    images = [png(Image.new("RGB", (16, 16), colour)) for colour in ("white", "black")]
    data = rows(
        1, jpg_0=images[0], jpg_1=images[1], label_0=label, of_white=0.9, of_black=2, good=-1
    )
    pair = PreferencePairs(
        data,
        SQUARE,
        label_noise_prob=noise,
        score_columns=("of_white", "of_black"),
        sign_column="good",
    )[0, 0]
    for side in "wl":
        white = bool(pair[f"pixels_{side}"].mean() > 0)
        assert pair[f"score_{side}"] == (0.9 if white else 2.0)
    assert pair["score_w"] != pair["score_l"]
    assert pair["sign"] == -1.0


@pytest.mark.parametrize("broken", [None, math.nan, -math.inf])
@pytest.mark.parametrize("column", ["score_1", "good"])
def test_a_broken_number_is_named(broken: float | None, column: str) -> None:
    whole = {"score_0": 0.1, "score_1": 0.2, "good": 1.0}
    data = Dataset.from_list([*rows(2, **whole), *rows(1, **whole | {column: broken})])
    pairs = PreferencePairs(data, SQUARE, score_columns=("score_0", "score_1"), sign_column="good")
    assert pairs[0, 1]["score_w"] == 0.1
    with pytest.raises(ValueError, match=f"row 2, column {column}: need a finite number"):
        pairs[0, 2]


def test_stream_shuffles_each_epoch_and_resumes_anywhere() -> None:
    whole = list(PairStream(10, 0, 0, 25))
    assert sorted(whole[:10]) == [(0, i) for i in range(10)]
    assert sorted(whole[10:20]) == [(1, i) for i in range(10)]
    assert [i for _, i in whole[:10]] != [i for _, i in whole[10:20]]
    assert list(PairStream(10, 0, 13, 25)) == whole[13:]
    assert list(itertools.islice(PairStream(10, 0, 13), 12)) == whole[13:]


def test_batches_of_one_bucket_are_the_stream_cut_up() -> None:
    stream = list(PairStream(10, 3, 0, 40))
    batches = list(PairBatches(np.zeros(10, int), 4, 3, count=10))
    assert list(itertools.chain(*batches)) == stream
    assert {len(batch) for batch in batches} == {4}
    # Resumed with another batch size, from a place that is no multiple of it.
    resumed = PairBatches(np.zeros(10, int), 3, 3, start=8, count=4)
    assert len(resumed) == 4
    assert list(itertools.chain(*resumed)) == stream[8:20]


def test_batches_have_one_bucket_each_and_lose_nothing() -> None:
    buckets = np.array([0] * 11 + [1] * 5 + [2])
    batches = list(PairBatches(buckets, 4, 0, count=300))
    for batch in batches:
        assert len(batch) == 4
        assert len({buckets[index] for _, index in batch}) == 1
    keys = [key for batch in batches for key in batch]
    assert len(set(keys)) == len(keys)
    # All of the epochs that lie far enough back, the leftovers of each among them.
    assert {(epoch, i) for epoch in range(60) for i in range(17)} <= set(keys)
    assert len({len(set(batch)) for batch in batches}) == 1
    order = [key for batch in batches for key in batch if buckets[key[1]] == 1]
    assert order == [k for k in PairStream(17, 0, 0, 17 * 80) if buckets[k[1]] == 1][: len(order)]


def test_batches_of_several_buckets_resume_where_they_were() -> None:
    buckets = np.array([0] * 11 + [1] * 5 + [2])
    whole = list(PairBatches(buckets, 4, 0, count=60))
    assert list(PairBatches(buckets, 4, 0, start=4 * 23, count=37)) == whole[23:]
    with pytest.raises(TypeError, match="count=None"):
        len(PairBatches(buckets, 4, 0))


def test_accelerate_shares_the_batches_out_whole() -> None:
    buckets = np.array([0] * 11 + [1] * 5)
    whole = list(PairBatches(buckets, 4, 0, count=12))
    shards = [
        list(BatchSamplerShard(PairBatches(buckets, 4, 0, count=12), 2, rank)) for rank in (0, 1)
    ]
    assert shards == [whole[0::2], whole[1::2]]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_each_batch_in_its_size(workers: int) -> None:
    sizes = bucket_sizes([32], 8, aspect_buckets=True)
    wide, tall = png(gradient(96, 48)), png(gradient(40, 80))
    data = Dataset.from_list(
        [*rows(6, jpg_0=wide, jpg_1=png(gradient(64, 32))), *rows(5, jpg_0=tall, jpg_1=tall)]
    )
    found = [[open_image(row[f"jpg_{i}"], "").size[::-1] for i in (0, 1)] for row in data]
    buckets = nearest_buckets(np.array(found), sizes)
    pairs = PreferencePairs(data, sizes, buckets)
    loader = DataLoader(
        pairs, batch_sampler=PairBatches(buckets, 3, 0, count=5), num_workers=workers,
        collate_fn=list,
    )  # fmt: skip
    shapes = set()
    for batch in loader:
        found_here = {tuple(pair[f"pixels_{s}"].shape[1:]) for pair in batch for s in "wl"}
        assert len(found_here) == 1
        shapes |= found_here
        for pair in batch:
            assert pair["time_ids_w"][4:].tolist() == list(pair["pixels_w"].shape[1:])
    assert shapes == {(sizes[b][0], sizes[b][1]) for b in buckets}
    assert len(shapes) == 2


def test_buckets_are_squares_or_what_sdxl_was_trained_at() -> None:
    assert bucket_sizes([1024], 32, aspect_buckets=False) == [(1024, 1024)]
    assert bucket_sizes([64, 32, 64], 16, aspect_buckets=False) == [(32, 32), (64, 64)]
    # SDXL, appendix I: its sizes from 1:2 to 2:1.
    half = [(704, 1344), (704, 1408), (768, 1280), (768, 1344), (832, 1152), (832, 1216),
            (896, 1088), (896, 1152), (960, 1024), (960, 1088)]  # fmt: skip
    whole = {*half, (1024, 1024), *((width, height) for height, width in half)}
    assert set(bucket_sizes([1024], 32, aspect_buckets=True)) == whole
    assert len(bucket_sizes([1024], 32, aspect_buckets=True)) == len(whole)


@pytest.mark.parametrize(("resolution", "factor"), [(64, 8), (64, 32), (256, 16), (512, 24)])
def test_buckets_keep_to_factor_area_and_aspect(resolution: int, factor: int) -> None:
    sizes = bucket_sizes([resolution], factor, aspect_buckets=True)
    assert (resolution, resolution) in sizes
    assert len({height / width for height, width in sizes}) == len(sizes)
    for height, width in set(sizes) - {(resolution, resolution)}:
        assert height % factor == width % factor == 0
        assert height * width <= resolution**2
        assert 0.5 <= height / width <= 2
        assert (width, height) in sizes


def test_a_pair_gets_the_bucket_nearest_to_both_of_its_images() -> None:
    sizes = bucket_sizes([512, 1024], 32, aspect_buckets=True)

    def of(size_0: tuple[int, int], size_1: tuple[int, int]) -> tuple[int, int]:
        return sizes[bucket_of(size_0, size_1, sizes)]

    assert of((1024, 1024), (1024, 1024)) == (1024, 1024)
    assert of((1000, 1000), (2000, 2000)) == (1024, 1024)  # scaled up by 2.4 %
    assert of((900, 900), (2000, 2000)) == (512, 512)  # not by 14 %
    assert of((60, 60), (50, 50)) == (512, 512)
    assert of((2000, 1000), (1000, 2000)) == (1024, 1024)  # mean of 2:1 and 1:2
    assert of((1664, 2432), (832, 1216)) == (832, 1216)
    assert of((600, 6000), (600, 6000)) == (320, 640)  # the widest; at 1024 scaled up
    everything = np.random.default_rng(0).integers(300, 3000, (500, 2, 2))
    one_by_one = [bucket_of(pair[0], pair[1], sizes) for pair in everything.tolist()]
    assert nearest_buckets(everything, sizes).tolist() == one_by_one
    for pair, bucket in zip(everything, one_by_one, strict=True):
        aspect = np.log(pair[:, 0] / pair[:, 1]).mean()
        resolution = 1024 if sizes[bucket][0] * sizes[bucket][1] > 512**2 else 512
        rivals = bucket_sizes([resolution], 32, aspect_buckets=True)
        nearest = min(abs(np.log(h / w) - aspect) for h, w in rivals)
        assert abs(np.log(sizes[bucket][0] / sizes[bucket][1]) - aspect) == pytest.approx(nearest)


def turned(image: Image.Image, orientation: int) -> bytes:
    """A JPEG that says it is to be shown turned."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif, quality=95)
    return buffer.getvalue()


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["bytes", "dict", "image", "path", "file"])
def test_images_are_read_in_every_form(form: str, tmp_path: Path) -> None:
    image = gradient(28, 26)
    path = tmp_path / "image.png"
    image.save(path)
    cell: Any = {"bytes": png(image), "dict": {"bytes": None, "path": str(path)},
                 "image": image, "path": str(path),
                 "file": io.BytesIO(png(image))}[form]  # fmt: skip
    assert open_image(cell, "row 0").tobytes() == image.tobytes()
    cell = io.BytesIO(png(image)) if form == "file" else cell
    assert read_size(cell, "row 0") == (26, 28)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(orientation: int) -> None:
    photograph = load_photograph("chelsea.png")
    cell = turned(photograph, orientation)
    opened = open_image(cell, "row 0")
    assert read_size(cell, "row 0") == opened.size[::-1]
    assert opened.size == (photograph.size if orientation < 5 else photograph.size[::-1])
    bottom_right = np.asarray(photograph, np.float32)[-40:, -40:].mean()
    corner = {1: (-1, -1), 2: (-1, 0), 3: (0, 0), 4: (0, -1), 5: (-1, -1), 6: (-1, 0), 7: (0, 0),
              8: (0, -1)}[orientation]  # fmt: skip
    ys, xs = (slice(-40, None) if end else slice(40) for end in corner)
    assert np.asarray(opened, np.float32)[ys, xs].mean() == pytest.approx(bottom_right, abs=3)


def test_alpha_is_laid_on_white() -> None:
    clear = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 20, 10))
    grey = Image.new("LA", (20, 20), (0, 0))
    palette = gradient(20, 20).quantize(8)
    palette.putpixel((5, 5), 3)
    for cell, place, colour in (
        (png(clear), (5, 15), (255, 255, 255)),
        (png(clear), (5, 5), (0, 0, 255)),
        (saved(clear, "WEBP", lossless=True), (5, 15), (255, 255, 255)),
        (png(grey), (5, 5), (255, 255, 255)),
        (saved(palette, "PNG", transparency=3), (5, 5), (255, 255, 255)),
        (saved(palette, "GIF", transparency=3), (5, 5), (255, 255, 255)),
    ):
        opened = open_image(cell, "row 0")
        assert opened.mode == "RGB"
        assert opened.getpixel(place) == colour


def test_deep_grey_cmyk_and_palette_keep_their_colours() -> None:
    photograph = load_photograph("coffee.png").resize((120, 80))
    grey = np.asarray(photograph.convert("L"))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    for form in ("PNG", "TIFF"):
        opened = open_image(saved(deep, form), "row 0")
        assert np.array_equal(np.asarray(opened), np.stack([grey] * 3, axis=-1))
    whole = np.asarray(photograph, np.float32)
    for cell, most in (
        (saved(photograph.convert("CMYK"), "JPEG", quality=95), 4),
        (saved(photograph.convert("CMYK"), "TIFF"), 1),
        (saved(photograph.quantize(256), "PNG"), 6),
    ):
        opened = open_image(cell, "row 0")
        assert opened.mode == "RGB"
        assert np.abs(np.asarray(opened, np.float32) - whole).mean() < most


def claiming(width: int, height: int) -> bytes:
    """A small PNG whose header tells of a huge one."""
    whole = png(gradient(32, 32))
    header = b"IHDR" + struct.pack(">II", width, height) + whole[24:29]
    return whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]


@functools.cache
def broken_images() -> dict[str, tuple[Any, str, bool]]:
    """Cells that must not be trained on, why, and whether the header tells."""
    jpeg = saved(load_photograph("coffee.png"), "JPEG")
    whole = png(gradient(64, 64))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    return {
        "no cell": (None, "the cell is empty", True),
        "no bytes": (b"", "an image of zero bytes", True),
        "text": (b"<html>404</html>", "no image", True),
        "number": (3.5, "the cell holds float", True),
        "empty feature": ({"bytes": None, "path": None}, "the cell is empty", True),
        "no file": ("/nowhere/a.png", r"No such file", True),
        "header only": (whole[:20], "Truncated", True),
        "cut png": (whole[:120], "truncated", False),
        "cut jpeg": (jpeg[: len(jpeg) // 2], "truncated", False),
        "flipped byte": (bytes(flipped), "broken", False),
        "bomb": (claiming(10000, 10000), "10000x10000 pixels, more than PIL.Image.MAX_IM", True),
        "huge bomb": (claiming(30000, 30000), r"900000000 pixels.* bomb", True),
        "strip": (png(gradient(400, 40)), "400x40 pixels; need an aspect of at most 1:8", True),
        "icon": (png(gradient(15, 40)), "15x40 pixels; need at least 16", True),
        "float": (saved(Image.new("F", (32, 32)), "TIFF"), "white is unknown", False),
    }


@pytest.mark.parametrize("kind", broken_images())
@pytest.mark.filterwarnings("ignore:Image size")
def test_a_broken_image_is_refused_and_named(kind: str) -> None:
    cell, reason, header_tells = broken_images()[kind]
    with pytest.raises(BadImage, match=reason) as refused:
        open_image(cell, "row 2, column jpg_1")
    assert refused.value.where.startswith("row 2, column jpg_1")
    assert str(refused.value) == f"{refused.value.where}: {refused.value.reason}"
    assert "0x" not in str(refused.value).replace("00x", "")
    again = pickle.loads(pickle.dumps(refused.value))
    assert (again.where, again.reason) == (refused.value.where, refused.value.reason)
    if header_tells:
        with pytest.raises(BadImage, match=reason):
            read_size(cell, "row 2, column jpg_1")


def test_an_empty_file_is_named_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "empty.jpg"
    path.touch()
    with pytest.raises(BadImage, match=r"row 0 \(.*empty\.jpg\): an image of zero bytes"):
        open_image(str(path), "row 0")


def test_a_bad_pair_falls_back_to_one_of_its_bucket_the_same_in_every_run() -> None:
    sizes = [(16, 16), (16, 32)]
    buckets = np.array([0, 1] * 10)
    cut = png(gradient(64, 64))[:120]
    data = Dataset.from_list([*rows(12), *rows(4, jpg_1=cut), *rows(4)])
    data = data.remove_columns("caption").add_column("caption", [str(i) for i in range(20)])
    first, second = (PreferencePairs(data, sizes, buckets, random_crop=True) for _ in range(2))
    assert first[0, 3]["refused"] == []
    stood_in = set()
    for epoch in range(6):
        for index in (12, 13, 14, 15):
            pair = first[epoch, index]
            assert pair["refused"][0].startswith(f"row {index}, column jpg_1: ")
            assert pair["pixels_w"].shape[1:] == sizes[buckets[index]]
            again = second[epoch, index]
            assert pair["pixels_w"].equal(again["pixels_w"])
            assert (pair["captions"], pair["seed"]) == (again["captions"], again["seed"])
            stand_in = int(pair["captions"][0])
            assert stand_in not in (12, 13, 14, 15)
            assert buckets[stand_in] == buckets[index]
            stood_in.add(stand_in)
    assert len(stood_in) > 4


def test_only_bad_pairs_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"20 pairs in a row have a bad image.*row"):
        PreferencePairs(rows(3, jpg_1=b"no image"), SQUARE)[0, 2]


class Latents:
    """A cache that knows where each of its tensors comes from, and that row 2 is bad."""

    def __init__(self, captions: bool = True) -> None:
        self.captions = captions

    def image(self, index: int, side: int, flip: bool) -> dict[str, torch.Tensor]:
        if index == 2:
            raise BadImage(f"row {index}, column jpg_{side}", "cut short")
        mean = torch.tensor([index, side, flip])
        return {"mean": mean, "std": mean + 100, "time_ids": mean + 1000}

    def caption(self, text: str) -> dict[str, torch.Tensor] | None:
        length = torch.tensor(len(text))
        return {"prompts": length, "pooled": length + 100} if self.captions else None


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_cached_pairs_are_those_that_would_be_opened(noise: float) -> None:
    options: dict[str, Any] = {"random_flip": True, "label_noise_prob": noise,
                               "loser_caption_column": "worse"}  # fmt: skip
    data = rows(6, worse="a worse one")
    opened = PreferencePairs(data, SQUARE, **options)
    cached = PreferencePairs(
        data.remove_columns(["jpg_0", "jpg_1"]), SQUARE, cached=Latents(), **options
    )
    flips = set()
    for epoch in range(8):
        pair, known = opened[epoch, 1], cached[epoch, 1]
        assert (pair["seed"], pair["captions"]) == (known["seed"], known["captions"])
        assert "pixels_w" not in known
        flip = bool(pair["pixels_w"][0, 0, 0] > pair["pixels_w"][0, 0, -1])
        assert known["mean_w"].tolist() == [1, noise == 1, flip]
        assert known["mean_l"].tolist() == [1, noise == 0, flip]
        assert known["std_w"].equal(known["mean_w"] + 100)
        assert known["time_ids_l"].equal(known["mean_l"] + 1000)
        lengths = [len(text) for text in pair["captions"]]
        assert known["text"] == [{"prompts": n, "pooled": n + 100} for n in lengths]
        flips.add(flip)
    assert flips == {False, True}
    assert cached[0, 2]["refused"][0].endswith("cut short")
    without = PreferencePairs(data, SQUARE, cached=Latents(captions=False))
    assert "text" not in without[0, 1]


def pair_id(pair: dict[str, Any]) -> tuple[str, int]:
    return pair["captions"][0], pair["seed"]


def streamed(data: Dataset, count: int, **options: Any) -> list[tuple[str, int]]:
    pairs = StreamedPairs(data.to_iterable_dataset(3), SQUARE[0], buffer_size=4, **options)
    return [pair_id(pair) for pair in itertools.islice(pairs, count)]


def test_a_streamed_run_resumes_and_is_shared_out() -> None:
    data = rows(10)
    whole = streamed(data, 30)
    names = [f"caption {i}" for i in range(10)]
    for epoch in range(3):
        assert sorted(name for name, _ in whole[10 * epoch : 10 * epoch + 10]) == names
    assert [n for n, _ in whole[:10]] != [n for n, _ in whole[10:20]] != names
    assert len({seed for _, seed in whole}) == 30
    assert streamed(data, 17, start=13) == whole[13:]
    assert streamed(data, 30) != streamed(data, 30, seed=1)
    ranks = [streamed(data, 8, rank=rank, world=2, start=6) for rank in (0, 1)]
    assert [pair for both in zip(*ranks, strict=True) for pair in both] == whole[6:22]


def test_workers_do_not_change_a_streamed_run() -> None:
    data = rows(10)
    stream = StreamedPairs(data.to_iterable_dataset(2), SQUARE[0], buffer_size=4, batch_size=2)
    loader = DataLoader(stream, batch_size=2, num_workers=2, collate_fn=list)
    found = [pair_id(pair) for batch in itertools.islice(loader, 9) for pair in batch]
    assert found == streamed(data, 18)


def test_a_streamed_pair_is_that_of_the_same_row() -> None:
    data = rows(6, good=0.5)
    stream = StreamedPairs(
        data.to_iterable_dataset(), SQUARE[0], label_noise_prob=0.5, sign_column="good"
    )
    pairs = PreferencePairs(data, SQUARE, label_noise_prob=0.5, sign_column="good")
    for streamed_pair in itertools.islice(stream, 6):
        index = int(streamed_pair["captions"][0].split()[1])
        pair = pairs[0, index]
        assert pair.keys() == streamed_pair.keys()
        assert pair["pixels_w"].equal(streamed_pair["pixels_w"])
        assert (pair["seed"], pair["sign"]) == (streamed_pair["seed"], streamed_pair["sign"])


def test_a_stream_skips_bad_images_and_reports_them() -> None:
    data = Dataset.from_list([*rows(3), *rows(1, jpg_1=b"no image"), *rows(3)])
    stream = StreamedPairs(data.to_iterable_dataset(), SQUARE[0])
    pairs = list(itertools.islice(stream, 12))
    reported = [where for pair in pairs for where in pair["refused"]]
    assert reported == ["row 3, column jpg_1: no image, or of a format that PIL does not read"] * 2
    with pytest.raises(ValueError, match="20 pairs in a row have a bad image"):
        next(iter(StreamedPairs(rows(3, jpg_0=b"").to_iterable_dataset(), SQUARE[0])))
    with pytest.raises(ValueError, match="the stream is empty"):
        next(iter(StreamedPairs(rows(3).to_iterable_dataset().take(0), SQUARE[0])))


def test_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train=0; need at least 1"):
        write_photo_pairs(tmp_path, train=0)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        load_photograph("nowhere.png")
    with pytest.raises(ValueError, match="row 1, column caption: need a text; it holds None"):
        PreferencePairs(Dataset.from_list([*rows(1), *rows(1, caption=None)]), SQUARE)[0, 1]
    with pytest.raises(ValueError, match="buckets=None with 2 sizes"):
        PreferencePairs(rows(), [(16, 16), (32, 32)])
    with pytest.raises(ValueError, match="buckets are those of 3 rows; need one for each of 4"):
        PreferencePairs(rows(), SQUARE, np.zeros(3, int))
    with pytest.raises(ValueError, match=r"resolutions=\[0\]"):
        bucket_sizes([0], 8, aspect_buckets=True)
    with pytest.raises(ValueError, match="batch_size=0"):
        PairBatches(np.zeros(3, int), 0, 0)
    with pytest.raises(ValueError, match="buckets are those of no pair"):
        PairBatches(np.zeros(0, int), 1, 0)


def test_each_photograph_is_held_out_by_one_of_four_seeds() -> None:
    heldout = [name for seed in range(4) for name in split_photographs(seed)[1]]
    assert sorted(heldout) == sorted(PHOTOGRAPHS)
    for seed in range(5):
        train, unseen = split_photographs(seed)
        assert len(unseen) == 4
        assert not train.keys() & unseen.keys()
    assert split_photographs(4) == split_photographs(0)
