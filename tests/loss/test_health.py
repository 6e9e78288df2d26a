"""`fastpref.health` names each picture in the curves of the study's own runs, and nothing else."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref import sft_loss
from fastpref.health import NEEDED, Health, health

# Runs of `examples/mismatch_study.py`: their first ten steps, and every sixth of the others. The
# name of the file is the picture.
RECORDED = {
    path.stem.replace("_", " "): [json.loads(line) for line in path.read_text().splitlines()]
    for path in sorted((Path(__file__).parent / "data").glob("*.jsonl"))
}
REMEDIES = {
    "healthy": "",
    "flat": "learning rate",
    "winner getting worse too": "sft_weight",
    "saturated": "lower beta",
    "collapsing": "learning rate",
    "over-sharpened": "diversity",
}
Rows = list[dict[str, float]]


def changed(rows: Rows, **columns: Any) -> Rows:
    """The rows with columns computed anew, each from its row and its place in the run, 0 to 1."""
    return [
        row | {name: new(row, i / (len(rows) - 1)) for name, new in columns.items()}
        for i, row in enumerate(rows)
    ]


def without_reference(rows: Rows) -> Rows:
    return [{k: v for k, v in row.items() if not k.startswith("ref_")} for row in rows]


@pytest.mark.parametrize("picture", REMEDIES)
def test_recorded_runs(picture: str) -> None:
    found = health(RECORDED[picture])
    assert found.picture == picture
    assert REMEDIES[picture] in found.remedy
    assert bool(found.remedy) == bool(REMEDIES[picture])
    assert str(found).startswith(f"{picture}: ")
    assert "\n" not in str(found)


def test_every_picture_has_a_recorded_run() -> None:
    assert set(RECORDED) == set(REMEDIES)
    size = sum(path.stat().st_size for path in (Path(__file__).parent / "data").glob("*.jsonl"))
    assert size < 50_000


@pytest.mark.parametrize("steps", [0, 1, 19])
def test_too_early(steps: int) -> None:
    assert health(RECORDED["collapsing"][:steps]).picture == "early"


@pytest.mark.parametrize("name", NEEDED)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_has_collapsed(name: str, value: float) -> None:
    rows = [dict(row) for row in RECORDED["healthy"]]
    rows[-2][name] = value
    found = health(rows)
    assert (found.picture, found.seen) == ("collapsing", f"{name} is not finite")


def test_a_healthy_run_backwards_is_not_healthy() -> None:
    backwards = without_reference(RECORDED["healthy"][::-1])
    assert health(backwards).picture in ("winner getting worse too", "collapsing")


@pytest.mark.parametrize(
    ("factor", "picture"), [(2.4, "winner getting worse too"), (6.0, "collapsing")]
)
def test_a_winner_that_gets_worse(factor: float, picture: str) -> None:
    rows = changed(RECORDED["flat"], mse_w=lambda row, at: row["mse_w"] * (1 + (factor - 1) * at))
    assert health(rows).picture == picture


@pytest.mark.parametrize(
    ("factor", "picture"),
    [(1.05, "flat"), (1.2, "winner getting worse too"), (4.0, "collapsing")],
)
def test_a_reference_shows_a_small_change(factor: float, picture: str) -> None:
    """It sees the timesteps and noise that the model sees, and cancels what they do."""
    rows = changed(
        RECORDED["flat"],
        ref_mse_w=lambda row, at: row["mse_w"],
        ref_mse_l=lambda row, at: row["mse_l"],
        mse_w=lambda row, at: row["mse_w"] * (1 + (factor - 1) * at),
    )
    assert health(without_reference(rows)).picture == ("flat" if factor < 4 else "collapsing")
    found = health(rows)
    assert found.picture == picture or (factor < 1.1 and found.picture == "unclear")


def test_the_reference_decides_where_there_is_one() -> None:
    """Errors that stay, and a reference that is far better: the model got worse before the log."""
    rows = changed(
        RECORDED["flat"],
        ref_mse_w=lambda row, at: row["mse_w"] / 1.5,
        ref_mse_l=lambda row, at: row["mse_l"],
    )
    assert health(RECORDED["flat"]).picture == "flat"
    assert health(rows).picture == "winner getting worse too"


def test_a_spent_gradient_is_no_fault_where_the_winner_gained() -> None:
    won = changed(RECORDED["healthy"], gradient_factor=lambda row, at: 0.001)
    assert health(won).picture == "healthy"
    lost = changed(RECORDED["flat"], gradient_factor=lambda row, at: 0.001)
    assert health(lost).picture == "saturated"


def test_noise_alone_is_no_change() -> None:
    """Errors that scatter by 40 % around one mean are neither displaced nor healthy."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        scatter = torch.rand(200, 2, generator=generator) * 0.08 + 0.06
        rows = [
            dict(zip(NEEDED, (float(w), float(l), float(l - w), 0.5, 0.5), strict=True))
            for w, l in scatter
        ]
        assert health(rows).picture in ("flat", "unclear")


def test_sft_learns_without_a_margin() -> None:
    """Its gradient_factor stays at one half; what counts is the winner's error."""
    target = torch.zeros(4, 3)
    rows: Rows = []
    for step in range(60):
        pred = torch.cat([torch.full((4, 3), 0.97**step), torch.ones(4, 3)])
        metrics = sft_loss(pred, target, paired=True).metrics()
        rows.append({name: float(value) for name, value in metrics.items()})
    assert health(rows).picture == "healthy"


def test_rows_of_a_trainer() -> None:
    """Other columns are ignored, and any iterable of rows will do."""
    rows = [{"step": i, "lr": 1e-4, "note": "x", **r} for i, r in enumerate(RECORDED["healthy"])]
    assert health(iter(rows)) == health(RECORDED["healthy"])


@pytest.mark.parametrize(
    ("row", "error", "words"),
    [
        ({"mse_w": 1.0}, ValueError, r"history\[25\] has no mse_l"),
        ({"mse_w": "high"}, TypeError, r"history\[25\]\['mse_w'\] must be a number, got a str"),
        ({"mse_w": None}, TypeError, r"history\[25\]\['mse_w'\] must be a number, got a NoneType"),
        (3.0, TypeError, r"history\[25\] must be a mapping, got a float"),
    ],
)
def test_bad_rows(row: Any, error: type[Exception], words: str) -> None:
    rows: list[Any] = list(RECORDED["healthy"])
    rows[25] = row
    with pytest.raises(error, match=words):
        health(rows)


def test_it_is_a_line() -> None:
    assert str(Health("flat", "seen", "remedy")) == "flat: seen; remedy"
    assert str(Health("healthy", "seen", "")) == "healthy: seen"


def test_it_needs_nothing_but_python() -> None:
    code = (
        "import importlib.util, sys; "
        "spec = importlib.util.spec_from_file_location('h', sys.argv[1]); "
        "module = importlib.util.module_from_spec(spec); sys.modules['h'] = module; "
        "spec.loader.exec_module(module); assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    path = Path(__file__).resolve().parents[2] / "fastpref" / "health.py"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
