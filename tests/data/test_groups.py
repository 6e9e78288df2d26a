"""Samples and lists: every form gives the same rows, mistakes are named, and batches hold what they
should."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from toy.photo_pairs import write_photo_groups
from toy.tiny import tiny_sdxl
from trainer.data.batches import Collator, Draws
from trainer.data.cache import build_cache
from trainer.data.check import check_data
from trainer.data.groups import read_groups
from trainer.data.images import open_image
from trainer.data.lists import check_shares
from trainer.data.pairs import PreferencePairs, images_of
from trainer.data.survey import survey
from trainer.data.tables import Source
from trainer.families.family import Encoders
from trainer.families.sdxl import SDXL

SQUARE = [(16, 16)]
SCORES = [[0.1, 0.9, 0.5], [1.0, 0.0, 0.25], [0.0, 0.5, 0.75], [0.2, 0.1, 0.0]]


def png(grey: int) -> bytes:
    """A picture that is told by how grey it is."""
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), (grey, grey, grey)).save(buffer, "PNG")
    return buffer.getvalue()


def greys(row: dict[str, Any]) -> list[int]:
    return [int(np.asarray(open_image(row[name], ""))[0, 0, 0]) for name in images_of(row)]


def store(folder: Path, rows: list[dict[str, Any]], name: str = "train.parquet") -> str:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / name)
    return str(folder)


def write(path: Path, grey: int) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(grey))
    return path.name


def read(layout: Any, name: str | Path, tmp_path: Path, **options: Any) -> Dataset:
    return read_groups(layout, Source(name=str(name), cache_dir=str(tmp_path / "cache"), **options))


def samples(count: int = 4) -> list[dict[str, Any]]:
    return [{"image": png(10 * i), "label": i % 2 == 0, "caption": f"c{i}"} for i in range(count)]


@pytest.fixture
def a_folder(tmp_path: Path) -> Path:
    for i, side in enumerate(("good", "bad", "good", "bad")):
        write(tmp_path / "f" / side / f"{i}.png", 10 * i)
        (tmp_path / "f" / side / f"{i}.txt").write_text(f"c{i}")
    return tmp_path / "f"


@pytest.mark.parametrize("form", ["parquet", "scores", "jsonl", "csv", "folder", "names"])
def test_every_form_of_samples_gives_the_same_rows(
    form: str, tmp_path: Path, a_folder: Path
) -> None:
    options: dict[str, Any] = {}
    name: str | Path = a_folder
    if form == "parquet":
        name = store(tmp_path / "p", samples())
    if form == "scores":
        some = [{**row, "score": 0.5 + 0.1 * row.pop("label")} for row in samples()]
        name, options = store(tmp_path / "p", some), {"label_threshold": 0.6}
    if form == "names":
        some = [{"i": r["image"], "l": r["label"], "c": r["caption"]} for r in samples()]
        name = store(tmp_path / "p", some)
        options = {"image_columns": ["i"], "label_column": "l", "caption_column": "c"}
    if form in ("jsonl", "csv"):
        rows = [{**row, "image": f"f/{'bad' if i % 2 else 'good'}/{i}.png"}
                for i, row in enumerate(samples())]  # fmt: skip
        name = tmp_path / f"t.{form}"
        lines = [json.dumps(row) for row in rows]
        if form == "csv":
            lines = ["image,label,caption", *(",".join(map(str, row.values())) for row in rows)]
        name.write_text("\n".join(lines) + "\n")
    found = read("samples", name, tmp_path, **options)
    seen = sorted((greys(row), row["label_0"], row["caption"]) for row in found)
    assert seen == [([10 * i], float(i % 2 == 0), f"c{i}") for i in range(4)]


@pytest.mark.parametrize("form", ["parquet", "folder"])
def test_a_pair_is_two_samples(form: str, tmp_path: Path) -> None:
    rows = [{"jpg_0": png(20 * i), "jpg_1": png(20 * i + 10), "label_0": label, "caption": f"c{i}"}
            for i, label in enumerate((1.0, 0.0, 0.5))]  # fmt: skip
    name = store(tmp_path / "p", rows)
    expected = [([0], 1.0, "c0"), ([10], 0.0, "c0"), ([20], 0.0, "c1"), ([30], 1.0, "c1")]
    if form == "folder":
        for grey, label, caption in ((row[0][0], *row[1:]) for row in expected):
            write(tmp_path / "f" / ("w" if label else "l") / f"{caption}.png", grey)
            (tmp_path / "f" / f"{caption}.txt").write_text(caption)
        name = str(tmp_path / "f")
        expected[2:] = expected[:1:-1]
    found = read("samples", name, tmp_path)
    assert [(greys(row), row["label_0"], row["caption"]) for row in found] == expected
    assert found["source_row"][:] == [0, 0, 1, 1]


def test_scores_of_a_pair_make_labels_of_its_samples(tmp_path: Path) -> None:
    rows = [{"jpg_0": png(0), "jpg_1": png(10), "label_0": 1.0, "caption": "", "a": 3.0, "b": 2}]
    name = store(tmp_path / "p", rows)
    options = {"score_columns": ["a", "b"], "label_threshold": 2.5}
    found = read("samples", name, tmp_path, **options)
    assert found["score_0"][:] == [3.0, 2.0]
    assert found["label_0"][:] == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"--label_threshold came.*of pairs, need two"):
        read("samples", name, tmp_path, label_threshold=2.5)


@pytest.mark.parametrize("form", ["bytes", "feature", "paths", "columns", "rows"])
def test_every_form_of_lists_gives_the_same_rows(form: str, tmp_path: Path) -> None:
    pictures = [[30 * i + 10 * j for j in range(3)] for i in range(4)]
    lists: list[dict[str, Any]] = [
        {"images": [*map(png, some)], "scores": scores, "caption": f"c{i}"}
        for i, (some, scores) in enumerate(zip(pictures, SCORES, strict=True))
    ]
    options: dict[str, Any] = {}
    name: str | Path = tmp_path / "lists.jsonl"
    if form == "bytes":
        name = store(tmp_path / "p", lists)
    if form == "feature":
        features = Features(
            {"images": List(ImageFeature()), "scores": List(Value("float64")),
             "caption": Value("string")}
        )  # fmt: skip
        name = tmp_path / "saved"
        Dataset.from_list(lists, features=features).save_to_disk(name)
    if form == "paths":
        for row, some in zip(lists, pictures, strict=True):
            row["images"] = [write(tmp_path / f"{grey}.png", grey) for grey in some]
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in lists))
    if form == "columns":
        flat = [{**dict(zip("ABC", row["images"], strict=True)), "caption": row["caption"],
                 **dict(zip("XYZ", row["scores"], strict=True))} for row in lists]  # fmt: skip
        name = store(tmp_path / "p", flat)
        options = {"image_columns": list("ABC"), "score_columns": list("XYZ")}
    if form == "rows":  # which are mixed, and one is left over
        flat = [{"image": row["images"][j], "score": row["scores"][j], "caption": row["caption"]}
                for j in range(3) for row in lists]  # fmt: skip
        name = store(tmp_path / "p", [*flat, flat[0]])
        options = {"list_size": 3}
        with pytest.warns(UserWarning, match="1 of 13 images are left over from lists of 3"):
            found = read("lists", name, tmp_path, **options)
    else:
        found = read("lists", name, tmp_path, **options)
    assert [greys(row) for row in found] == pictures
    assert [[row[f"score_{i}"] for i in range(3)] for row in found] == SCORES
    assert found["caption"][:] == [f"c{i}" for i in range(4)]


def test_pairs_with_scores_are_lists_of_two(tmp_path: Path) -> None:
    rows = [{"jpg_0": png(0), "jpg_1": png(10), "label_0": 1.0, "caption": "", "a": 0.3, "b": 0.2}]
    found = read("lists", store(tmp_path / "p", rows), tmp_path, score_columns=["a", "b"])
    assert sorted(found.column_names) == [
        "caption", "jpg_0", "jpg_1", "score_0", "score_1", "source_row",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"--score_columns are \[\] and the images' \['jpg_0', "):
        read("lists", store(tmp_path / "p", rows), tmp_path)


LIST = {"images": [png(0), png(1)], "scores": [0.1, 0.2], "caption": ""}
SAMPLE = {"image": png(0), "label": 1, "score": 1.0, "caption": ""}


@pytest.mark.parametrize(
    ("layout", "rows", "options", "message"),
    [
        ("samples", [SAMPLE, SAMPLE], {}, "all 2 labels are 1; need desirable samples and undes"),
        ("samples", [SAMPLE, SAMPLE], {"label_threshold": 2}, "are 0 by --label_threshold 2; need"),
        ("samples", [SAMPLE, {**SAMPLE, "label": 3}], {}, "row 1, column label: need true or fal"),
        ("samples", [{**SAMPLE, "label": "yes"}], {}, "row 0, column label: .*holds 'yes'"),
        (
            "samples",
            [{"image": b"", "caption": ""}],
            {},
            r"need \['image', 'label', 'caption'\], m",
        ),
        ("samples", [{**LIST}], {}, r"missing \['image', 'label'\]"),
        ("samples", [{"image": b"", "score": 1, "caption": ""}], {}, "need --label_threshold too"),
        ("samples", [{**SAMPLE, "score": None}], {"label_threshold": 2}, "row 0, column score: ne"),
        ("samples", [SAMPLE], {"score_columns": "ab", "label_threshold": 2}, "'b'.*; need one"),
        ("lists", [LIST, {**LIST, "images": [b""]}], {}, "row 1 has 1 images in images and 2 scor"),
        ("lists", [{**LIST, "scores": [1.0]}], {}, "row 0 has 2 images in images and 1 scores in"),
        ("lists", [LIST], {"list_size": 3}, "need 3 of each, as --list_size says"),
        ("lists", [{**LIST, "scores": [1.0, None]}], {}, "row 0, column score_1: need a finite nu"),
        ("lists", [{**LIST, "scores": [1.0, 1.0]}], {}, "the scores of every list are all the sam"),
        ("lists", [{"image": b"", "caption": ""}], {}, r"missing \['score'\]"),
        ("lists", [SAMPLE], {}, "has one image a row; need --list_size"),
        ("lists", [SAMPLE], {"list_size": 2}, "no caption has 2 images, .* the most are 1"),
        ("lists", [LIST], {"score_columns": ["a", "b"]}, "need one, as there is one column of ima"),
        ("lists", [LIST], {"image_columns": ["a", "b", "c"]}, "need a score for each image"),
    ],
)
def test_mistakes_are_named(
    layout: str, rows: list[dict[str, Any]], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        read(layout, store(tmp_path / "p", rows), tmp_path, **options)


def test_folders_and_tables_that_are_none_are_errors(tmp_path: Path, a_folder: Path) -> None:
    with pytest.raises(ValueError, match="these folders give no scores; need a table"):
        read("lists", a_folder, tmp_path)
    with pytest.raises(ValueError, match=r"have no scores, for --label_threshold; need a table"):
        read("samples", a_folder, tmp_path, label_threshold=1)
    (a_folder / "good" / "0.txt").rename(a_folder / "0.text")
    with pytest.raises(ValueError, match=r"1 of 2 images of good/ have no caption: 0; need good/N"):
        read("samples", a_folder, tmp_path)
    (a_folder / "0.text").rename(a_folder / "0.txt")
    for path in (a_folder / "bad").glob("*.png"):
        path.unlink()
    with pytest.raises(ValueError, match="no image in bad/; need some in good/ and some in bad/"):
        read("samples", a_folder, tmp_path)
    (tmp_path / "t.jsonl").write_text('{"image": null, "label": 1, "caption": "a"}\n')
    with pytest.raises(ValueError, match=r"has columns .*missing \['image'\]"):
        read("samples", tmp_path / "t.jsonl", tmp_path)


def test_scores_that_are_no_shares_are_named(tmp_path: Path) -> None:
    rows = [LIST, {**LIST, "scores": [0.5, 1.5]}]
    with pytest.raises(
        ValueError, match=r"row 1, column score_1: it holds 1\.5; --loss rankdpo nee"
    ):
        check_shares(read("lists", store(tmp_path / "p", rows), tmp_path), "rankdpo")


@pytest.fixture
def lists(tmp_path: Path) -> Dataset:
    rows = [{"images": [png(30 * i + 10 * j) for j in range(3)], "scores": SCORES[i],
             "caption": f"c{i}"} for i in range(4)]  # fmt: skip
    return read("lists", store(tmp_path / "lists", rows), tmp_path)


def items(rows: Dataset, layout: Any, **options: Any) -> PreferencePairs:
    members = len(images_of(rows.column_names))
    scores = [name for name in rows.column_names if name.startswith("score_")]
    return PreferencePairs(
        rows, SQUARE, layout=layout, members=members, score_columns=sorted(scores) or None,
        **options,
    )  # fmt: skip


def test_a_batch_has_all_first_images_first(lists: Dataset) -> None:
    family, scheduler = SDXL, SDXL.process.scheduler(num_train_timesteps=1000)
    pipeline = tiny_sdxl((8, 16), (8, 8), sample_size=8, norm_num_groups=4)
    tokenizers = [pipeline.tokenizer, pipeline.tokenizer_2]
    data = items(lists, "lists", seed=3)
    draws = Draws(family, scheduler, 4, 2, noises=3)
    batch = Collator(family, tokenizers, draws)([data[0, 1], data[0, 2]])
    seen = ((batch["pixels"][:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
    assert seen == [30, 60, 40, 70, 50, 80]
    assert batch["scores"].view(3, 2).T.tolist() == pytest.approx(np.array(SCORES[1:3]))
    assert batch["noise"].shape == (6, 4, 8, 8)
    assert batch["timesteps"].shape == (2,)
    assert batch["vae_noise"].shape == (2, 4, 8, 8)
    # Each list's own, whatever is beside it; and each image's.
    alone = Collator(family, tokenizers, draws)([data[0, 2]])
    assert alone["noise"].equal(batch["noise"][1::2])
    assert len({float(each[0, 0, 0]) for each in batch["noise"]}) == 6
    # A single noise is what it was: of a pair.
    one = Draws(family, scheduler, 4, 2)(batch["seeds"], 16, 16)
    assert one[0].equal(batch["noise"][:2])
    assert one[1].equal(batch["timesteps"])


def test_a_sample_has_its_label_and_a_wrong_one_stays_wrong(tmp_path: Path) -> None:
    rows = read("samples", store(tmp_path / "p", samples(40)), tmp_path)
    plain, wrong = items(rows, "samples"), items(rows, "samples", label_noise_prob=1.0)
    half = items(rows, "samples", label_noise_prob=0.5, seed=1)
    for i in range(40):
        assert plain[0, i]["label"] == 1 - wrong[0, i]["label"] == float(i % 2 == 0)
        assert half[0, i]["label"] == half[7, i]["label"]
        assert plain[0, i]["pixels_0"].equal(wrong[0, i]["pixels_0"])
    flipped = sum(half[0, i]["label"] != plain[0, i]["label"] for i in range(40))
    assert 10 < flipped < 30
    batch = Collator(SDXL, [])([{**plain[0, i], "text": [{"a": torch.ones(1)}]} for i in (0, 3)])
    assert batch["labels"].tolist() == [1.0, 0.0]
    assert batch["pixels"].shape == (2, 3, 16, 16)


def test_a_wrong_label_mirrors_a_samples_score(tmp_path: Path) -> None:
    some = [{**row, "score": float(i)} for i, row in enumerate(samples())]
    rows = read("samples", store(tmp_path / "p", some), tmp_path, label_threshold=1.5)
    wrong = items(rows, "samples", label_noise_prob=1.0, label_threshold=1.5)
    assert [wrong[0, i]["score_0"] for i in range(4)] == [3.0, 2.0, 1.0, 0.0]
    assert [wrong[0, i]["label"] for i in range(4)] == [1.0, 1.0, 0.0, 0.0]


def test_a_wrong_label_shuffles_a_lists_scores(lists: Dataset) -> None:
    orders = set()
    for seed in range(30):
        wrong = items(lists, "lists", label_noise_prob=1.0, seed=seed)
        scores = [wrong[0, 0][f"score_{i}"] for i in range(3)]
        assert scores == [wrong[5, 0][f"score_{i}"] for i in range(3)]  # for the whole run
        assert sorted(scores) == sorted(SCORES[0])
        orders.add(tuple(scores))
    assert len(orders) == 6


@pytest.mark.parametrize("layout", ["samples", "lists"])
def test_cached_items_are_those_that_would_be_opened(
    layout: str, lists: Dataset, tmp_path: Path
) -> None:
    rows = lists
    if layout == "samples":
        rows = read("samples", store(tmp_path / "p", samples()), tmp_path)
    pipeline = tiny_sdxl((8, 16), (8, 8), sample_size=8, norm_num_groups=4)
    encoders = Encoders(
        pipeline.vae, [pipeline.tokenizer, pipeline.tokenizer_2],
        [pipeline.text_encoder, pipeline.text_encoder_2],
    )  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)
    cached = build_cache(
        SDXL, tmp_path / "latents", rows, np.zeros(len(rows), dtype=np.int64), SQUARE, encoders,
        Accelerator(cpu=True), random_flip=False, batch_size=5, dtype=torch.float32,
        caption_columns=["caption"],
    )  # fmt: skip
    opened, known = items(rows, layout), items(rows, layout, cached=cached)
    for index in range(len(rows)):
        a, b = opened[2, index], known[2, index]
        assert a["seed"] == b["seed"]
        assert [a[name] for name in a if name.startswith(("score", "label"))] == [
            b[name] for name in b if name.startswith(("score", "label"))
        ]
        for i in range(opened.members):
            assert a[f"time_ids_{i}"].equal(b[f"time_ids_{i}"])
            with torch.no_grad():
                moments = pipeline.vae.encode(a[f"pixels_{i}"][None]).latent_dist
            scale = pipeline.vae.config.scaling_factor
            torch.testing.assert_close(b[f"mean_{i}"], moments.mean[0] * scale)


def test_a_bad_image_drops_its_list_and_is_named(lists: Dataset) -> None:
    broken = lists.to_list()
    broken[1]["jpg_2"] = b"none"
    found = survey(Dataset.from_list(broken), SQUARE, progress=False, max_refused=0.5)
    assert found.rows["caption"][:] == ["c0", "c2", "c3"]
    assert found.found.shape == (3, 3, 2)
    assert [image.where for image in found.refused] == ["row 1, column jpg_2"]
    with pytest.raises(ValueError, match=r"1 of 4 lists \(25.0%\) have a bad image"):
        survey(Dataset.from_list(broken), SQUARE, progress=False)


@pytest.mark.parametrize("layout", ["samples", "lists"])
def test_check_data_tells_of_labels_and_scores(layout: str, lists: Dataset, tmp_path: Path) -> None:
    rows, told = lists, ["images of a list: 3, with scores from 0 to 1; the best", "lists to train"]
    if layout == "samples":
        rows = read("samples", store(tmp_path / "p", samples()), tmp_path)
        told = ["desirable: 50.0%", "samples to train on: 4"]
    made = items(rows, layout)
    options = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)
               if field.name in ("layout", "members", "score_columns")}  # fmt: skip
    report = check_data(rows, SQUARE, tmp_path, progress=False, **options)
    assert all(line in report for line in told)
    assert "ties" not in report
    assert (tmp_path / "data.png").stat().st_size > 5_000


def test_photographs_make_samples_and_lists(tmp_path: Path) -> None:
    write_photo_groups(tmp_path, samples=24, lists=8, size=24)
    some = pq.read_table(tmp_path / "samples.parquet").to_pylist()
    assert {row["label"] for row in some} == {True, False}
    for row in pq.read_table(tmp_path / "lists.parquet").to_pylist():
        assert sorted(row["scores"]) == pytest.approx([0, 1 / 3, 2 / 3, 1])
        pictures = [np.asarray(open_image(cell, ""), float) for cell in row["images"]]
        best = pictures[row["scores"].index(1.0)]
        # The further degraded, the further from the crop.
        far = [np.abs(picture - best).mean() for picture in pictures]
        assert [row["scores"][i] for i in np.argsort(far)] == sorted(row["scores"], reverse=True)
