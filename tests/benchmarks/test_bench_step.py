"""The benchmark of a training step: that its ways train alike, and that its rows and verdicts are
right."""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from accelerate.state import AcceleratorState

import bench_step
from bench_step import (
    WAYS,
    Objective,
    Way,
    in_own_process,
    main,
    parse_args,
    prepare,
    step,
    verdicts,
)


@pytest.fixture
def exact() -> Iterator[argparse.Namespace]:
    """Settings in which all ways compute in fp32."""
    AcceleratorState._reset_state(reset_partial_state=True)  # else another test's precision stays
    yield parse_args(["--preset", "tiny", "--mixed_precision", "no"])
    AcceleratorState._reset_state(reset_partial_state=True)


def change(way: Way, args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """What the first step predicts, and by how much it changes the parameters."""
    AcceleratorState._reset_state(reset_partial_state=True)
    job, batch = prepare(way, args)
    before = torch.cat([p.detach().flatten().clone() for p in job.parameters])
    pred = step(job, batch)[0]
    return pred, torch.cat([p.detach().flatten() for p in job.parameters]) - before


def test_ways_give_rows_of_finite_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ways = ["papers-dpo-full", "ours-dpo-lora-cache"]
    words = ["--preset", "tiny", "--ways", *ways, "--steps", "1", "--output_dir", str(tmp_path)]
    assert main(words) == 0
    (path,) = tmp_path.glob("step-*.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["way"] for row in rows] == ways
    for row in rows:
        assert list(row) == [
            "way", "loss", "trained", "cache", "checkpointing", "optimizer", "vae_dtype", "preset",
            "batch", "resolution", "dtype", "steps", "seconds", "seconds_q20", "seconds_q80",
            "samples_per_s", "peak_gib", "reserved_gib", "memory", "loss_us", "loss_share",
            "status", "device", "torch", "triton", "git", "source", "time",
        ]  # fmt: skip
        assert row["status"] == "ok"
        for name in ("seconds", "samples_per_s", "peak_gib", "loss_us", "loss_share"):
            assert 0 < float(row[name]) < math.inf, name
        assert float(row["samples_per_s"]) == pytest.approx(2 / float(row["seconds"]), rel=1e-2)
        assert float(row["loss_share"]) < 0.5
    assert [row["optimizer"] for row in rows] == ["adamw", "adamw fused"]
    assert [row["vae_dtype"] for row in rows] == ["fp32", ""]
    out = capsys.readouterr().out
    assert "ours-dpo-lora-cache against papers-dpo-full: " in out
    assert "say nothing about them" in out


def test_the_papers_way_and_ours_make_the_same_step(exact: argparse.Namespace) -> None:
    theirs, by_theirs = change(WAYS["papers-mapo-full"], exact)
    ours, by_ours = change(WAYS["ours-mapo-full"], exact)
    torch.testing.assert_close(ours, theirs)
    assert by_ours.norm() > 0
    assert torch.cosine_similarity(by_ours, by_theirs, dim=0) > 0.99


def test_the_compared_losses_are_the_same(exact: argparse.Namespace) -> None:
    pred, target = torch.randn(4, 4, 8, 8), torch.randn(2, 4, 8, 8)
    theirs = Objective(WAYS["papers-mapo-full"])(pred, target, None)
    ours = Objective(WAYS["ours-mapo-full"])(pred, target, None)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-3, atol=0)
    assert "accuracy" in ours.metrics()


@pytest.mark.parametrize("name", [name for name in WAYS if "dpo" in name])
def test_the_reference_is_the_model_before_training(exact: argparse.Namespace, name: str) -> None:
    job, batch = prepare(WAYS[name], exact)
    pred, _, ref_pred = step(job, batch)
    torch.testing.assert_close(ref_pred, pred, rtol=1e-4, atol=1e-5)
    after, _, ref_after = step(job, batch)
    torch.testing.assert_close(ref_after, ref_pred, rtol=1e-4, atol=1e-5)
    assert not after.equal(pred)
    encoders = job.models.encoders
    assert (encoders.vae is None) == (not encoders.text_encoders) == ("cache" in name)
    assert job.models.denoiser.is_gradient_checkpointing == ("keep" not in name)
    assert bool(job.optimizer.optimizer.defaults.get("fused")) == name.startswith("ours")


def test_sdxl_has_the_published_sizes() -> None:
    with torch.device("meta"):
        models = [bench_step.sdxl_unet(), bench_step.sdxl_vae(), *bench_step.sdxl_text_encoders()]
    sizes = [sum(p.numel() for p in model.parameters()) for model in models]
    assert sizes == [2_567_463_684, 83_653_863, 123_060_480, 694_659_840]
    assert models[1].config.scaling_factor == 0.13025


def row(way: str, samples_per_s: float, peak_gib: float, status: str = "ok") -> dict[str, Any]:
    known = WAYS[way]
    return {"way": way, "loss": known.loss, "trained": known.trained, "status": status,
            "samples_per_s": samples_per_s, "peak_gib": peak_gib}  # fmt: skip


def test_a_target_is_met_by_speed_and_memory_together() -> None:
    rows = [
        row("papers-mapo-full", 2.0, 50.0),
        row("papers-dpo-full", 1.0, 60.0),
        row("ours-mapo-lora-cache", 3.0, 30.0),
        row("ours-mapo-full-cache", 3.2, 31.0),
        row("ours-mapo-lora", 2.9, 10.0),
        row("ours-dpo-lora-cache", 1.4, 30.0),
    ]
    found = {verdict.way: verdict for verdict in verdicts(rows)}
    assert [name for name, verdict in found.items() if verdict.met] == ["ours-mapo-lora-cache"]
    assert (found["ours-dpo-lora-cache"].speed, found["ours-dpo-lora-cache"].memory) == (1.4, 0.5)
    assert "1.60x the samples/s (>= 1.5: met), 0.62x" in str(found["ours-mapo-full-cache"])
    assert "1.45x the samples/s (>= 1.5: MISSED)" in str(found["ours-mapo-lora"])
    assert bench_step.summary(rows) == [
        "mapo: both targets met by ours-mapo-lora-cache",
        "dpo: both targets MISSED by each way",
    ]


def test_ways_without_figures_are_not_compared() -> None:
    rows = [
        row("papers-mapo-full", 0.0, 0.0, "out of memory"),
        row("papers-mapo-lora", 1.0, 10.0),
        row("ours-mapo-lora", 2.0, 5.0),
    ]
    assert [verdict.against for verdict in verdicts(rows)] == ["papers-mapo-lora"]
    assert bench_step.summary(rows)[0].startswith("mapo: nothing to compare, as papers-mapo-full")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "out of memory"),
        (ValueError("--x is bad\nin detail"), "failed: ValueError: --x is bad"),
    ],
)
def test_a_way_that_breaks_says_why(
    monkeypatch: pytest.MonkeyPatch, exact: argparse.Namespace, error: Exception, status: str
) -> None:
    def broken(way: Way, args: argparse.Namespace) -> None:
        raise error

    sent: list[dict[str, Any]] = []
    connection: Any = argparse.Namespace(send=sent.append)
    monkeypatch.setattr(bench_step, "measure", broken)
    bench_step.told(connection, WAYS["ours-mapo-lora"], exact)
    assert sent == [{"status": status}]
    made = bench_step.row_of(WAYS["ours-mapo-lora"], exact, sent[0])
    assert (made["status"], made["seconds"]) == (status, "")
    assert status in bench_step.line_of(made)


def test_a_way_stops_when_the_time_is_over(exact: argparse.Namespace) -> None:
    figures = in_own_process(WAYS["ours-mapo-lora"], exact, limit=0.01)
    assert figures == {"status": "out of time"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch", "0"], "--batch is 0; need more than 0"),
        (["--steps", "-1"], "--steps is -1; need more than 0"),
        (["--warmup", "-1"], "--warmup is -1; need 0 or more"),
        (["--resolution", "100"], "--resolution is 100; need a multiple of 32"),
    ],
)
def test_a_flag_without_meaning_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_args(["--preset", "tiny", *words])


def test_what_the_machine_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_step, "GPU", False)
    with pytest.raises(ValueError, match="--preset is gpu, and PyTorch sees no GPU here"):
        parse_args(["--preset", "gpu"])
    with pytest.raises(ValueError, match="fp16 came on a machine without a GPU"):
        parse_args(["--preset", "tiny", "--mixed_precision", "fp16"])
    monkeypatch.setattr(bench_step, "LACKING", ["diffusers", "peft"])
    with pytest.raises(ValueError, match="lacks diffusers, peft; need accelerate, diffusers"):
        parse_args(["--preset", "tiny"])
    with pytest.raises(SystemExit):
        parse_args(["--ways", "theirs"])
