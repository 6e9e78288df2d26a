"""Sources of pairs: hub formats, folders and lists; ties; and what a survey finds and tells."""

from __future__ import annotations

import csv
import functools
import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from toy.photo_pairs import load_photograph
from trainer.data.buckets import bucket_sizes, nearest_buckets
from trainer.data.check import check_data
from trainer.data.images import open_image
from trainer.data.pairs import (
    PairBatches,
    PreferencePairs,
    StreamedPairs,
)
from trainer.data.sources import load_pairs, read_rows, settle_ties
from trainer.data.survey import survey

NAMES = ("chelsea.png", "coffee.png", "rocket.jpg", "astronaut.png")


@functools.cache
def photograph(name: str, width: int, height: int) -> Image.Image:
    return load_photograph(name).resize((width, height))


def encoded(image: Image.Image, form: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def rows(count: int = 4, **changes: Any) -> list[dict[str, Any]]:
    """Rows in Pick-a-Pic's columns: real photographs, image 0 wider than image 1."""
    return [
        {
            "jpg_0": encoded(photograph(NAMES[i % 4], 60, 40)),
            "jpg_1": encoded(photograph(NAMES[i % 4], 40, 40)),
            "label_0": float(i % 2),
            "caption": f"caption {i}",
            **changes,
        }
        for i in range(count)
    ]


def with_labels(*labels: Any) -> Dataset:
    data = [{"label_0": label, "caption": f"caption {i}"} for i, label in enumerate(labels)]
    return Dataset.from_list(data)


def sizes_of(found: Any) -> list[tuple[int, int]]:
    return [open_image(found[column], "").size for column in ("jpg_0", "jpg_1")]


def load(source: Path, cache: Path, **options: Any) -> Any:
    return load_pairs(str(source), "train", cache_dir=str(cache / "cache"), **options)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["file", "folder", "features", "paths", "disk", "splits"])
def test_every_stored_form_gives_the_same_rows(form: str, streaming: bool, tmp_path: Path) -> None:
    table = rows()
    data = Dataset.from_list(table)
    source = tmp_path / "data"
    source.mkdir()
    if form == "features":
        image = ImageFeature()
        data = data.cast(
            Features({**data.features, "jpg_0": image, "jpg_1": image, "caption": Value("string")})
        )
    if form == "paths":
        for row, column in itertools.product(table, ("jpg_0", "jpg_1")):
            path = source / f"{row['caption']} {column}.jpg"
            path.write_bytes(row[column])
            row[column] = str(path)
        data = Dataset.from_list(table)
    if form in ("disk", "splits"):
        stored = DatasetDict({"train": data}) if form == "splits" else data
        stored.save_to_disk(str(source))
    else:
        data.to_parquet(source / "train-0.parquet")
    if form == "file":
        source = source / "train-0.parquet"
    found = list(load(source, tmp_path, streaming=streaming))
    assert [row["caption"] for row in found] == [f"caption {i}" for i in range(4)]
    assert [row["label_0"] for row in found] == [0, 1, 0, 1]
    assert not any(isinstance(row["jpg_0"], Image.Image) for row in found)  # not decoded yet
    assert [sizes_of(row) for row in found] == [[(60, 40), (40, 40)]] * 4


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_get_their_canonical_names(streaming: bool, tmp_path: Path) -> None:
    table = [
        {"better": row["jpg_0"], "worse": row["jpg_1"], "pref": row["label_0"], "text": "a text",
         "caption": "machine made", "score": 0.25}
        for row in rows()
    ]  # fmt: skip
    Dataset.from_list(table).to_parquet(tmp_path / "train.parquet")
    names: Any = {"image_columns": ("better", "worse"), "label_column": "pref",
                  "caption_column": "text", "streaming": streaming}  # fmt: skip
    found = list(load(tmp_path, tmp_path, extra_columns=["score"], **names))
    number = set() if streaming else {"source_row"}
    assert found[1].keys() == {"jpg_0", "jpg_1", "label_0", "caption", "score"} | number
    assert (found[1]["caption"], found[1]["label_0"]) == ("a text", 1)
    assert sizes_of(found[1]) == [(60, 40), (40, 40)]
    names["image_columns"] = ("worse", "better")
    assert sizes_of(next(iter(load(tmp_path, tmp_path, **names)))) == [(40, 40), (60, 40)]
    with pytest.raises(ValueError, match="column 'caption' is asked for, but another"):
        load(tmp_path, tmp_path, extra_columns=["caption"], **names)
    with pytest.raises(ValueError, match=r"need \['jpg_0', .* missing \['jpg_0', 'jpg_1', 'labe"):
        load(tmp_path, tmp_path, streaming=streaming)


def test_swapped_columns_are_swapped(tmp_path: Path) -> None:
    Dataset.from_list(rows()).to_parquet(tmp_path / "train.parquet")
    found = load(tmp_path, tmp_path, image_columns=("jpg_1", "jpg_0"))
    assert sizes_of(found[0]) == [(40, 40), (60, 40)]


def write_folders(root: Path, count: int = 3) -> None:
    for side, width in (("w", 60), ("l", 40)):
        (root / side).mkdir(parents=True)
        for i in range(count):
            form = ("png", "jpg", "webp")[i] if side == "w" else "png"
            photograph(NAMES[i], width, 40).save(root / side / f"pair.{i}.{form}")


@pytest.mark.parametrize("streaming", [False, True])
def test_two_folders_are_pairs_of_equal_names(streaming: bool, tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_folders(root)
    (root / "w" / "._pair.0.png").touch()
    (root / "w" / "pair.0.txt").write_text("beside the winner\n")
    (root / "pair.1.txt").write_text("in the root")
    lines = [{"file_name": f"w/pair.{i}.webp", "caption": f"listed {i}"} for i in range(3)]
    lines.append({"file_name": "l/pair.2.png", "caption": "of the loser"})
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    found = list(load(root, tmp_path, streaming=streaming))
    assert [row["caption"] for row in found] == ["beside the winner", "in the root", "listed 2"]
    assert [row["label_0"] for row in found] == [1, 1, 1]
    assert [sizes_of(row) for row in found] == [[(60, 40), (40, 40)]] * 3
    assert Path(found[0]["jpg_0"]).is_absolute()


def test_folders_that_are_no_pairs_are_errors(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_folders(root)
    with pytest.raises(ValueError, match=r"3 of 3 pairs have no caption: pair\.0, pair\.1, pair"):
        load(root, tmp_path)
    (root / "metadata.jsonl").write_text('{"file_name": "pair.0.png"}')
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 1: need file_name and caption"):
        load(root, tmp_path)
    (root / "l" / "pair.0.png").rename(root / "l" / "other.png")
    with pytest.raises(ValueError, match=r"2 images have no partner: l/other\.png, w/pair\.0\.png"):
        load(root, tmp_path)
    (root / "l" / "pair.1.jpg").touch()
    with pytest.raises(ValueError, match=r"pair\.1\.png and pair\.1\.jpg have one name"):
        load(root, tmp_path)
    for side in "wl":
        (tmp_path / "empty" / side).mkdir(parents=True)
    with pytest.raises(ValueError, match="no image in w/ and l/"):
        load(tmp_path / "empty", tmp_path)


def write_list(path: Path, table: list[dict[str, Any]]) -> None:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
        return
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_list_names_winners_and_losers(suffix: str, streaming: bool, tmp_path: Path) -> None:
    write_folders(tmp_path / "data" / "images")
    table = [
        {"caption": caption, "winner": f"images/w/pair.{i}.{form}", "winner_score": 1 + i / 4,
         "loser": str(tmp_path / "data" / "images" / "l" / f"pair.{i}.png"), "loser_score": -1}
        for i, (caption, form) in enumerate(
            [("2024-01-01", "png"), ('a "quoted", and\nbroken one', "jpg"), ("NA", "webp")]
        )
    ]  # fmt: skip
    path = tmp_path / "data" / f"pairs{suffix}"
    write_list(path, table)
    scores = ["winner_score", "loser_score"]
    found = load(path, tmp_path, extra_columns=scores, streaming=streaming)
    listed = list(found)
    assert [row["caption"] for row in listed] == [row["caption"] for row in table]
    assert [row["winner_score"] for row in listed] == [1, 1.25, 1.5]
    assert [sizes_of(row) for row in listed] == [[(60, 40), (40, 40)]] * 3
    size = (16, 16)
    if streaming:
        pair = next(iter(StreamedPairs(found, size, score_columns=scores, buffer_size=0)))
    else:
        pair = PreferencePairs(found, [size], score_columns=scores)[0, 0]
    assert (pair["score_w"], pair["score_l"]) == (1, -1)
    assert pair["time_ids_w"][:2].tolist() == [40, 60]


def test_a_list_that_names_too_little_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    whole = {"winner": "a.png", "loser": "b.png", "caption": "c"}
    for broken, message in (
        ({**whole, "loser": ""}, "pair 2 has no loser"),
        ({"winner": "a.png", "loser": "b.png"}, "pair 2 has no caption"),
        ({**whole, "winner": 3}, "need one pair a line"),
    ):
        write_list(path, [whole, broken])
        with pytest.raises(ValueError, match=rf"pairs\.jsonl: {message}"):
            load(path, tmp_path)
    path = tmp_path / "pairs.csv"
    path.write_text("winner,caption\na.png,c\n")
    with pytest.raises(ValueError, match=r"pairs\.csv: pair 1 has no loser; need winner, loser, c"):
        load(path, tmp_path)
    path.write_text("winner,loser,caption\na.png,b.png,c\n")
    with pytest.raises(ValueError, match=r"missing \['score'\]"):
        load(path, tmp_path, extra_columns=["score"])


def test_sources_that_are_none_are_errors(tmp_path: Path) -> None:
    for name in ("./nowhere", str(tmp_path / "nowhere"), "pairs.jsonl"):
        with pytest.raises(ValueError, match="there is no such file or folder"):
            load_pairs(name, "train")
    (tmp_path / "pairs.txt").touch()
    with pytest.raises(ValueError, match=r"need a \.parquet, \.jsonl, \.csv file"):
        load(tmp_path / "pairs.txt", tmp_path)
    Dataset.from_list(rows()).remove_columns(["caption"]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"missing \['caption'\]"):
        load(tmp_path, tmp_path)
    with pytest.raises(ValueError, match=r"holds train\.parquet; need files named validation"):
        load_pairs(str(tmp_path), "validation")
    DatasetDict({"test": Dataset.from_list(rows())}).save_to_disk(str(tmp_path / "disk"))
    with pytest.raises(ValueError, match=r"holds the splits \['test'\]"):
        load(tmp_path / "disk", tmp_path)


def test_ties_are_dropped_and_the_limit_counts_what_is_left() -> None:
    data = with_labels(1.0, 0.5, 0.0, 0.5, 1.0)
    assert settle_ties(data)["label_0"][:] == [1.0, 0.0, 1.0]
    assert settle_ties(data, max_samples=2)["caption"][:] == ["caption 0", "caption 2"]


def test_kept_ties_are_won_by_image_0() -> None:
    data = settle_ties(with_labels(1.0, 0.5, 0.0, 0.5), "keep", max_samples=3)
    assert data["label_0"][:] == [1, 1, 0]
    assert data["caption"][:] == ["caption 0", "caption 1", "caption 2"]


def test_a_coin_settles_a_tie_once_for_the_run() -> None:
    data = with_labels(*[1.0, 0.5, 0.0, 0.5] * 100)
    first = settle_ties(data, "coin", seed=1)["label_0"][:]
    assert first[0::4] == [1] * 100
    assert first[2::4] == [0] * 100
    drawn = first[1::2]
    assert set(drawn) == {0, 1}
    assert 70 < sum(drawn) < 130
    assert first == settle_ties(data, "coin", seed=1)["label_0"][:]
    assert first != settle_ties(data, "coin", seed=2)["label_0"][:]


@pytest.mark.parametrize("limit", [None, 5])
@pytest.mark.parametrize("ties", ["drop", "coin", "keep"])
def test_a_stream_settles_ties_alike(ties: str, limit: int | None) -> None:
    data = with_labels(*[1, 0.5, 0, 0.5] * 4)
    whole = settle_ties(data, ties, 3, limit)
    stream = settle_ties(data.to_iterable_dataset(3), ties, 3, limit)
    assert [dict(row) for row in stream] == [dict(row) for row in whole]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("label", [0.7, None, 2, float("nan")])
def test_other_labels_are_errors_that_name_the_row(label: Any, streaming: bool) -> None:
    data = with_labels(1.0, 0.5, label)
    for ties in ("drop", "coin"):
        with pytest.raises(ValueError, match=r"row 2: label_0 is .*; need 0, 0.5 \(a tie\) or 1"):
            list(settle_ties(data.to_iterable_dataset() if streaming else data, ties))


def test_nothing_but_ties_is_an_error() -> None:
    with pytest.raises(ValueError, match="no pair to train on: 3 rows"):
        settle_ties(with_labels(0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="ties='never'; need one of drop, coin, keep"):
        settle_ties(with_labels(0.5), "never")


def mixed() -> Dataset:
    """40 pairs, wide and tall, among them one cut short (row 7) and one that is text (row 33)."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = io.BytesIO()
    photograph("coffee.png", 40, 80).save(turned, "JPEG", exif=exif)  # shown, it is 80 by 40
    table = rows(40)
    for i, row in enumerate(table):
        if i % 4 == 0:
            row["jpg_0"] = encoded(photograph(NAMES[0], 40, 70))
            row["jpg_1"] = encoded(photograph(NAMES[0], 40, 80), "PNG")
        if i % 4 == 1:
            row["jpg_0"] = row["jpg_1"] = turned.getvalue()
    table[7]["jpg_1"] = table[7]["jpg_1"][:-200]
    table[33]["jpg_0"] = b"no image"
    return Dataset.from_list(table)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_survey_drops_what_is_bad_and_says_each_bucket(workers: int) -> None:
    data = mixed()
    sizes = bucket_sizes([32], 8, aspect_buckets=True)
    found = survey(data, sizes, workers=workers, progress=False, max_refused=0.05)
    assert [(image.row, image.where) for image in found.refused] == [
        (7, "row 7, column jpg_1"), (33, "row 33, column jpg_0"),
    ]  # fmt: skip
    assert "truncated" in found.refused[0].reason
    kept = [i for i in range(40) if i not in (7, 33)]
    assert found.rows["caption"][:] == [f"caption {i}" for i in kept]
    shown = [[open_image(row[f"jpg_{i}"], "").size[::-1] for i in (0, 1)] for row in found.rows]
    assert found.found.tolist() == [[list(size) for size in pair] for pair in shown]
    assert found.found[0].tolist() == [[70, 40], [80, 40]]
    assert found.found[1].tolist() == [[40, 80], [40, 80]]
    assert found.buckets.tolist() == nearest_buckets(np.array(shown), sizes).tolist()
    assert len(set(found.buckets)) == 3
    pairs = PreferencePairs(found.rows, sizes, found.buckets)
    for batch in PairBatches(found.buckets, 4, 0, count=10):
        assert len({pairs[key]["pixels_l"].shape for key in batch}) == 1


def test_a_survey_decodes_no_more_than_it_is_asked_to() -> None:
    data, sizes = mixed(), [(32, 32)]
    found = survey(data, sizes, decode=0, progress=False, max_refused=0.05)
    assert [image.row for image in found.refused] == [33]  # a header tells of no cut
    found = survey(data, sizes, decode=40, progress=False, max_refused=0.05)
    assert [image.row for image in found.refused] == [7, 33]
    assert found.buckets.tolist() == [0] * 38
    whole = survey(Dataset.from_list(rows()), sizes, progress=False, max_refused=0)
    assert (len(whole.rows), whole.refused) == (4, [])


def test_a_survey_reads_selected_rows_and_every_form_of_cell(tmp_path: Path) -> None:
    table = rows(8)
    for i, row in enumerate(table):
        (tmp_path / f"{i}.jpg").write_bytes(row["jpg_0"])
    paths = [{**row, "jpg_0": str(tmp_path / f"{i}.jpg")} for i, row in enumerate(table)]
    paths[6]["jpg_0"] = str(tmp_path / "gone.jpg")
    image = ImageFeature(decode=False)
    for data in (Dataset.from_list(paths), Dataset.from_list(paths).cast_column("jpg_0", image)):
        found = survey(data.select([6, 1, 3]), [(32, 32)], progress=False, max_refused=0.5)
        assert found.rows["caption"][:] == ["caption 1", "caption 3"]
        assert found.refused[0].row == 0
        assert found.refused[0].where.endswith("gone.jpg)")
        assert found.refused[0].reason == "No such file or directory"
        assert found.found.tolist() == [[[40, 60], [40, 40]]] * 2
    # Bytes whose header is not at their beginning, and those of a feature that is decoded.
    table[0]["jpg_0"] = encoded(photograph(NAMES[0], 60, 40), "TIFF")
    data = Dataset.from_list(table)
    assert survey(data, [(32, 32)], decode=0, progress=False).refused == []
    data = data.cast_column("jpg_0", ImageFeature())
    assert survey(data, [(32, 32)], progress=False).found.tolist() == [[[40, 60], [40, 40]]] * 8


def test_too_many_bad_images_are_an_error_that_tells_of_them() -> None:
    data, sizes = mixed(), [(32, 32)]
    with pytest.raises(
        ValueError,
        match=r"2 of 40 pairs \(5\.0%\) have a bad image, more than --max_refused 0\.01: row 7, "
        r"column jpg_1: .*truncated.*; row 33, column jpg_0: no image",
    ):
        survey(data, sizes, progress=False)
    # Few of all, but many of those that were decoded.
    many = Dataset.from_list([mixed()[7], *rows(60)])
    with pytest.raises(ValueError, match=r"1 of 2 pairs that were decoded \(50\.0%\)"):
        survey(many, sizes, decode=2, progress=False, max_refused=0.02)
    with pytest.raises(ValueError, match="no pair to train on: all 2 have a bad image"):
        survey(Dataset.from_list(rows(2, jpg_0=b"")), sizes, progress=False, max_refused=1)


def test_check_data_tells_what_there_is(tmp_path: Path) -> None:
    table = list(mixed())
    for i in (3, 4):
        table[i]["label_0"] = 0.5
    table[5]["caption"] = " "
    table[6]["caption"] = "costs $5 or $6, " + "as long as can be " * 30
    Dataset.from_list(table).to_parquet(tmp_path / "train.parquet")
    raw = read_rows(str(tmp_path), "train", str(tmp_path / "cache"))
    sizes = bucket_sizes([32], 8, aspect_buckets=True)
    report = check_data(raw, sizes, tmp_path / "out", progress=False)
    for line in (
        "rows: 40",
        "ties: 2, left out (--ties drop)",
        "refused: 2 of 38 pairs (5.26%)",
        "1 image: no image, or of a format that PIL does not read: row 33, column jpg_0",
        "pairs to train on: 36",
        "captions: 36 different, 1 empty; the longest has 556 characters: 'costs $5 or $6",
        "samples: ",
    ):
        assert line in report, report
    assert sum(int(line.split()[1]) for line in report.splitlines() if "x" in line[:6]) == 36
    sheet = Image.open(tmp_path / "out" / "data.png").convert("RGB")
    assert min(sheet.size) > 600
    assert len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 300
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["data.png"]
    coin = check_data(raw, [(32, 32)], tmp_path, ties="coin", progress=False, samples=2)
    assert "ties: 2, winner drawn by a coin (--ties coin)" in coin
    assert "pairs to train on: 38" in coin
    bad = check_data(Dataset.from_list(rows(2, jpg_0=b"")), [(32, 32)], tmp_path, progress=False)
    assert "refused: 2 of 2 pairs (100.00%)" in bad
    assert "2 images: an image of zero bytes: row 0, column jpg_0; row 1" in bad
