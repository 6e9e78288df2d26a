"""The SDXL trainer end to end at the smallest size: it learns, it resumes exactly, it explains."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file

import demo
from checkpoints import find_checkpoint, list_checkpoints, prune, written_aside
from curves import append_metrics, read_metrics, truncate_metrics
from pair_data import PreferencePairs, load_pairs
from photo_pairs import write_photo_pairs
from scoring import score_pairs
from tiny_sdxl import tiny_sdxl
from train_sdxl import Collator, draw_noise, main, noisy_pairs, parse_args

Train = Callable[..., Path]
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pipelines, one per prediction type, and a handful of pairs."""
    folder = tmp_path_factory.mktemp("world")
    for prediction_type in ("epsilon", "v_prediction"):
        pipeline = tiny_sdxl(
            (8, 16), (8, 8), sample_size=8, prediction_type=prediction_type, norm_num_groups=4
        )
        pipeline.save_pretrained(folder / prediction_type)
    write_photo_pairs(folder / "data", train=24, heldout=8, size=24)
    return folder


def argv(world: Path, output_dir: Path, model: str = "epsilon", **flags: Any) -> list[str]:
    settings: dict[str, Any] = {
        "pretrained_model_name_or_path": world / model,
        "dataset_name": world / "data",
        "cache_dir": world / "cache",
        "output_dir": output_dir,
        "resolution": 16,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_train_steps": 3,
        "learning_rate": 1e-3,
        "report_to": "none",
        **flags,
    }
    words: list[str] = []
    for name, value in settings.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


@pytest.fixture
def train(world: Path, tmp_path: Path) -> Train:
    def run(name: str = "run", **flags: Any) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)  # else the precision is kept
        main(parse_args(argv(world, tmp_path / name, **flags)))
        return tmp_path / name

    return run


def unet_of(output_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(output_dir / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")


def assert_same_weights(a: Path, b: Path, **tolerance: Any) -> None:
    first, second = unet_of(a), unet_of(b)
    assert first.keys() == second.keys()
    for name in first:
        if tolerance:
            torch.testing.assert_close(first[name], second[name], **tolerance)
        else:
            assert first[name].equal(second[name]), name


@pytest.mark.parametrize("model", ["epsilon", "v_prediction"])
def test_a_run_leaves_what_it_promises(train: Train, world: Path, model: str) -> None:
    folder = train(model=model, report_to="tensorboard", checkpointing_steps=2)
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    names = {"loss", "mse_w", "mse_l", "margin", "accuracy", "gradient_factor"}
    assert set(rows[0]) == {"step", "lr"} | names
    assert all(torch.tensor(list(row.values())).isfinite().all() for row in rows)
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-2", "checkpoint-3"]
    assert (folder / "curves.png").stat().st_size > 10_000
    assert list((folder / "logs").rglob("events*"))
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder / "pipeline", add_watermarker=False)
    assert pipeline.scheduler.config.prediction_type == model
    start = load_file(world / model / "unet" / "diffusion_pytorch_model.safetensors")
    assert any(not start[name].equal(value) for name, value in unet_of(folder).items())
    assert all(value.dtype == torch.float32 for value in unet_of(folder).values())


def test_prediction_type_flag_reaches_the_saved_pipeline(train: Train) -> None:
    folder = train(prediction_type="v_prediction", max_train_steps=1)
    config = json.loads((folder / "pipeline/scheduler/scheduler_config.json").read_text())
    assert config["prediction_type"] == "v_prediction"


def test_training_lowers_the_loss_and_sft_is_the_winners_error(train: Train) -> None:
    rows = read_metrics(train(loss="sft", max_train_steps=30, learning_rate=3e-3) / "metrics.jsonl")
    assert rows[0]["loss"] == rows[0]["mse_w"]
    first, last = (sum(row["loss"] for row in part) for part in (rows[:5], rows[-5:]))
    assert last < 0.95 * first


def test_accumulating_equals_a_larger_batch(train: Train) -> None:
    """The same pairs see the same noise in either layout, so only the order of sums differs."""
    # A larger epsilon keeps Adam from making a full step of a gradient that is but rounding.
    flags = {"adam_epsilon": 1e-3, "learning_rate": 1e-2}
    whole = train("whole", train_batch_size=4, **flags)
    parts = train("parts", train_batch_size=2, gradient_accumulation_steps=2, **flags)
    assert_same_weights(whole, parts, rtol=1e-4, atol=1e-5)
    for a, b in zip(*(read_metrics(f / "metrics.jsonl") for f in (whole, parts)), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-3)


def test_workers_and_log_every_change_nothing(train: Train) -> None:
    plain = train("plain")
    other = train("other", dataloader_num_workers=2, log_every=1)
    assert_same_weights(plain, other)
    assert read_metrics(plain / "metrics.jsonl") == read_metrics(other / "metrics.jsonl")


def test_gradient_checkpointing_and_bf16(train: Train) -> None:
    plain = train("plain")
    assert_same_weights(
        plain, train("checkpointed", gradient_checkpointing=True), rtol=1e-4, atol=1e-5
    )
    losses = [
        [row["loss"] for row in read_metrics(folder / "metrics.jsonl")]
        for folder in (plain, train("bf16", mixed_precision="bf16"))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="compares on the CPU, in the interpreter")
@pytest.mark.parametrize("loss", ["mapo", "sft"])
def test_fused_and_plain_losses_trace_the_same_curve(train: Train, loss: str) -> None:
    curves = [
        read_metrics(train(impl, loss=loss, loss_impl=impl) / "metrics.jsonl")
        for impl in ("torch", "triton")
    ]
    for plain, fused in zip(*curves, strict=True):
        assert fused == pytest.approx(plain, rel=1e-3, abs=1e-3)


def test_a_pair_shares_noise_and_timestep() -> None:
    shape = torch.Size((4, 8, 8))
    noise, timesteps, vae_noise = draw_noise([7, 8, 7], shape, 1000, torch.device("cpu"))
    assert noise[0].equal(noise[2])
    assert timesteps[0] == timesteps[2]
    assert not noise[0].equal(noise[1])
    assert not noise[0].equal(vae_noise[0])
    latents = torch.randn(6, *shape)
    for prediction_type in ("epsilon", "v_prediction"):
        scheduler = DDPMScheduler(prediction_type=prediction_type)
        noisy, target = noisy_pairs(latents, noise, timesteps, scheduler)
        twice = torch.cat([noise, noise])
        scale = scheduler.alphas_cumprod[timesteps.repeat(2)][:, None, None, None]
        torch.testing.assert_close(noisy - scale.sqrt() * latents, (1 - scale).sqrt() * twice)
        if prediction_type == "epsilon":
            assert target is noise
        else:
            torch.testing.assert_close(target, scale.sqrt() * twice - (1 - scale).sqrt() * latents)


def test_a_batch_is_stacked_winners_first(world: Path) -> None:
    rows = load_pairs(str(world / "data"), "train", cache_dir=str(world / "cache"))
    pairs = [PreferencePairs(rows, 16)[0, i] for i in range(3)]
    pipeline = StableDiffusionXLPipeline.from_pretrained(world / "epsilon", add_watermarker=False)
    batch = Collator([pipeline.tokenizer, pipeline.tokenizer_2])(pairs)
    assert batch["pixels"].shape == (6, 3, 16, 16)
    assert batch["pixels"][1].equal(pairs[1]["pixels_w"])
    assert batch["pixels"][4].equal(pairs[1]["pixels_l"])
    assert batch["time_ids"][4].equal(pairs[1]["time_ids_l"])
    assert [ids.shape for ids in batch["input_ids"]] == [(3, 77)] * 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_equals_the_uninterrupted_one(train: Train, workers: int) -> None:
    flags = {"max_train_steps": 14, "checkpointing_steps": 5, "lr_scheduler": "cosine",
             "gradient_accumulation_steps": 2, "random_crop": True,
             "dataloader_num_workers": workers}  # fmt: skip
    whole, parts = train("whole", **flags), train("parts", **flags)
    shutil.rmtree(parts / "pipeline")  # as if killed between the last checkpoint and the end
    train("parts", **flags, resume_from_checkpoint="latest")
    assert_same_weights(whole, parts)
    for checkpoint in list_checkpoints(parts)[1:]:
        os.replace(checkpoint, parts / f".tmp-{checkpoint.name}")
    train("parts", **flags, resume_from_checkpoint="latest")
    assert_same_weights(whole, parts)
    assert read_metrics(whole / "metrics.jsonl") == read_metrics(parts / "metrics.jsonl")
    assert not list(parts.glob(".tmp*"))


def test_a_run_killed_anywhere_resumes_to_the_same_weights(
    train: Train, world: Path, tmp_path: Path
) -> None:
    flags: dict[str, Any] = {
        "max_train_steps": 40,
        "checkpointing_steps": 2,
        "checkpoints_total_limit": 2,
    }
    whole = train("whole", **flags)
    killed = tmp_path / "killed"
    words = argv(world, killed, **flags, resume_from_checkpoint="latest", log_every=1)
    command = [sys.executable, str(ROOT / "examples" / "train_sdxl.py"), *words]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(read_metrics(killed / "metrics.jsonl")) < 7 and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert list_checkpoints(killed), "killed before the first checkpoint"
    main(parse_args(words))
    assert_same_weights(whole, killed)
    assert read_metrics(whole / "metrics.jsonl") == read_metrics(killed / "metrics.jsonl")


def test_latest_with_nothing_to_resume_starts_from_scratch(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh = train("fresh", max_train_steps=1)
    latest = train("latest", max_train_steps=1, resume_from_checkpoint="latest")
    assert "starting from scratch" in capsys.readouterr().out
    assert_same_weights(fresh, latest)


def test_half_written_checkpoints_are_never_picked_up(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / ".tmp-checkpoint-99").mkdir()
    (tmp_path / "checkpoint-backup").mkdir()
    (tmp_path / "checkpoint-999").touch()
    (tmp_path / "checkpoint-10").mkdir()
    assert find_checkpoint("latest", tmp_path) == tmp_path / "checkpoint-10"
    (tmp_path / ".tmp-checkpoint-11").touch()  # what stops the writing of checkpoint-11
    with pytest.raises(FileExistsError), written_aside(tmp_path / "checkpoint-11"):
        pass
    (tmp_path / ".tmp-checkpoint-11").unlink()
    assert find_checkpoint("latest", tmp_path) == tmp_path / "checkpoint-10"
    with written_aside(tmp_path / "checkpoint-10", Accelerator()) as aside:
        (aside / "model").touch()
        assert not (tmp_path / "checkpoint-10" / "model").exists()
    assert (tmp_path / "checkpoint-10" / "model").exists()


def test_the_limit_deletes_the_oldest_after_the_newest_is_whole(
    train: Train, tmp_path: Path
) -> None:
    folder = train(max_train_steps=4, checkpointing_steps=1, checkpoints_total_limit=2)
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-3", "checkpoint-4"]
    prune(folder, 1, folder / "checkpoint-3")
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-3"]


def test_metrics_are_cut_back_to_the_resumed_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_metrics(path, [{"step": step} for step in range(1, 6)])
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    truncate_metrics(path, 3)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"resolution": 18}, "resolution is 18; this VAE and UNet need a multiple of 4"),
        ({"resume_from_checkpoint": "checkpoint-7"}, "'checkpoint-7' is no checkpoint.*has: none"),
        ({"max_train_steps": 0}, "max_train_steps is 0; need more than 0"),
        ({"label_noise_prob": 1.5}, "label_noise_prob is 1.5; need a share from 0 to 1"),
        ({"seed": -1}, "seed is -1; need 0 or more"),
        ({"dataset_split_name": "nowhere"}, "need files named nowhere"),
    ],
)
def test_clear_errors(train: Train, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(**flags)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_fp16_needs_a_gpu() -> None:
    words = ["--pretrained_model_name_or_path", "a", "--dataset_name", "b"]
    with pytest.raises(ValueError, match="fp16 on a machine without a GPU; need no or bf16"):
        parse_args([*words, "--mixed_precision", "fp16"])


def test_a_fresh_run_does_not_mix_with_an_older_one(train: Train) -> None:
    train(max_train_steps=2, checkpointing_steps=1)
    with pytest.raises(ValueError, match="holds checkpoint-1, checkpoint-2, later than step 0"):
        train(max_train_steps=2)


def test_scoring_is_repeatable_and_agrees_with_the_loss(world: Path) -> None:
    rows = load_pairs(str(world / "data"), "heldout", cache_dir=str(world / "cache"))
    pipeline = StableDiffusionXLPipeline.from_pretrained(world / "epsilon", add_watermarker=False)
    scores = score_pairs(pipeline, rows, 16, draws=3, batch_size=8)
    again = score_pairs(pipeline, rows, 16, draws=3, batch_size=8)
    assert scores.mse_w.shape == (8, 3)
    assert scores.mse_w.equal(again.mse_w)
    assert ((scores.margin > 0) == (scores.mse_w < scores.mse_l)).all()
    accuracy, error = scores.summary()["accuracy"]
    assert 0 <= accuracy <= 1
    assert error >= 0


def test_demo_leaves_what_it_promises_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--output_dir", str(tmp_path), "--train_pairs", "24", "--heldout_pairs", "16"]
    words += ["--vae_steps", "2", "--base_steps", "2", "--max_train_steps", "2", "--controls"]
    tables = []
    for _ in range(2):
        AcceleratorState._reset_state(reset_partial_state=True)
        demo.main(demo.parse_args(words))
        tables.append((tmp_path / "table.txt").read_text())
    assert tables[0] == tables[1]
    for name in ("base", "MaPO", "shuffled labels", "SFT on winners"):
        assert name in tables[0]
    assert tables[0] in capsys.readouterr().out
    for picture in ("curves.png", "scores.png", "grid.png"):
        Image.open(tmp_path / picture).verify()
    assert list_checkpoints(tmp_path)
    StableDiffusionXLPipeline.from_pretrained(tmp_path / "pipeline", add_watermarker=False)


def test_help_works(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    text = capsys.readouterr().out
    for flag in ("--pretrained_model_name_or_path", "--loss_impl", "--resume_from_checkpoint"):
        assert flag in text
