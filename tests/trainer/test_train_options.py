"""What the trainer can do beside its losses: adapters, averages, other data, caches, and staying
whole when something breaks."""

from __future__ import annotations

import functools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import covering
import fastpref
from small_run import ROOT, Train, argv, assert_same_weights, seeing, unet_of
from toy.photo_pairs import blur, load_photograph
from toy.tiny import tiny_sdxl
from trainer import loop, lora, optim, step
from trainer.args import parse_args
from trainer.checkpoints import list_checkpoints
from trainer.data import loader
from trainer.export import KOHYA_FILE, LORA_FILE
from trainer.families.process import min_snr
from trainer.families.sdxl import SDXL
from trainer.losses import LOSSES
from trainer.metrics import read_metrics
from trainer.objective import Objective

LORA: dict[str, Any] = {"lora_rank": 4, "learning_rate": 1e-2}


def metrics(folder: Path) -> list[dict[str, Any]]:
    return read_metrics(folder / "metrics.jsonl")


def interrupted(folder: Path, step: int) -> Path:
    """The run as if it had been killed after the checkpoint at `step`."""
    for checkpoint in list_checkpoints(folder):
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)
    for result in (folder / "pipeline", folder / LORA_FILE, folder / KOHYA_FILE):
        if result.is_dir():
            shutil.rmtree(result)
        else:
            result.unlink(missing_ok=True)
    return folder


# Adapters, averages, weights.


@pytest.mark.parametrize("text", [False, True], ids=["unet", "text encoders too"])
def test_lora_starts_as_its_own_reference_and_opens_in_diffusers(
    train: Train, world: Path, text: bool
) -> None:
    flags = {**LORA, "lora_alpha": 8, "loss": "dpo", "beta": 100, "checkpointing_steps": 3}
    folder = (
        train(max_train_steps=6, train_text_encoder=text, **flags)
        if text
        else train(max_train_steps=6, **flags)
    )
    rows = metrics(folder)
    assert rows[0]["margin"] == 0
    assert (rows[0]["mse_w"], rows[0]["mse_l"]) == (rows[0]["ref_mse_w"], rows[0]["ref_mse_l"])
    assert rows[-1]["mse_w"] != rows[-1]["ref_mse_w"]
    assert not (folder / "pipeline").exists()

    pipeline = StableDiffusionXLPipeline.from_pretrained(world / "epsilon", add_watermarker=False)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.randn(2, 77, 64)
    added = {"text_embeds": torch.randn(2, 32), "time_ids": torch.randn(2, 6)}
    with torch.no_grad():
        base = pipeline.unet(*inputs, added_cond_kwargs=added).sample
        words = pipeline.tokenizer("a cat", return_tensors="pt").input_ids
        text_base = pipeline.text_encoder(words).last_hidden_state
        pipeline.load_lora_weights(folder)
        trained = pipeline.unet(*inputs, added_cond_kwargs=added).sample
        text_trained = pipeline.text_encoder(words).last_hidden_state
    assert not torch.allclose(base, trained)
    assert torch.equal(text_base, text_trained) != text

    # What diffusers opens computes what was trained, scale (alpha / rank) and all.
    names = [f"learned_{i}.safetensors" for i in range(3 if text else 1)]
    assert [(folder / "checkpoint-6" / name).exists() for name in names] == [True] * len(names)
    learned = load_file(folder / "checkpoint-6" / "learned_0.safetensors")
    assert all("lora_" in name for name in learned)
    unet = UNet2DConditionModel.from_pretrained(world / "epsilon", subfolder="unet")
    args = parse_args(argv(world, folder, **{k: v for k, v in flags.items() if "lora" in k}))
    lora.add_lora(args, SDXL, unet)
    unet.load_state_dict(learned, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(unet(*inputs, added_cond_kwargs=added).sample, trained)


def test_every_reference_loss_trains_adapters_against_the_base(train: Train) -> None:
    for loss in ("npo", "dmpo", "budget_dpo"):
        rows = metrics(train(loss, loss=loss, **LORA, max_train_steps=3))
        assert rows[0]["margin"] == 0
        assert rows[2]["ref_mse_w"] != rows[2]["mse_w"]


def test_lora_in_bf16_keeps_its_adapters_in_fp32(train: Train) -> None:
    folder = train(mixed_precision="bf16", loss="dpo", **LORA)
    learned = load_file(folder / "checkpoint-3" / "learned_0.safetensors")
    assert {value.dtype for value in learned.values()} == {torch.float32}
    assert metrics(folder)[0]["margin"] == 0


def test_adapters_off_leaves_no_trace() -> None:
    unet = tiny_sdxl((8, 16), (8, 8), sample_size=8, norm_num_groups=4).unet
    args = parse_args(["--pretrained_model_name_or_path", "a", "--dataset_name", "b", "--lora_rank",
                       "4"])  # fmt: skip
    lora.add_lora(args, SDXL, unet)
    flags = [parameter.requires_grad for parameter in unet.parameters()]
    with lora.without_adapters(unet):
        assert [parameter.requires_grad for parameter in unet.parameters()] == flags
    assert [parameter.requires_grad for parameter in unet.parameters()] == flags
    assert 0 < sum(flags) < len(flags)


def test_the_average_is_what_is_saved_and_resumed(train: Train) -> None:
    flags = {"use_ema": True, "ema_decay": 0.9, "max_train_steps": 6, "checkpointing_steps": 2}
    whole, plain = train("whole", **flags), train("plain", max_train_steps=6)
    assert metrics(whole) == metrics(plain)  # it watches and does not steer
    last = load_file(whole / "checkpoint-6" / "learned_0.safetensors")
    saved, steered = unet_of(whole), unet_of(plain)
    assert all(last[name].equal(steered[name]) for name in last)
    assert any(not saved[name].equal(last[name]) for name in last)
    again = interrupted(train("again", **flags), 4)
    train("again", **flags, resume_from_checkpoint="latest")
    assert_same_weights(whole, again)


def test_min_snr_weights_are_the_papers(train: Train) -> None:
    timesteps = torch.tensor([1, 300, 999])
    for kind, extra in (("epsilon", 0), ("v_prediction", 1)):
        scheduler = DDPMScheduler(prediction_type=kind)
        share = scheduler.alphas_cumprod[timesteps]
        snr = share / (1 - share)
        expected = torch.tensor([min(s, 5.0) / (s + extra) for s in snr.tolist()])
        torch.testing.assert_close(min_snr(scheduler, timesteps, 5.0), expected)
    plain, weighted = (metrics(train(f"{g}", loss="sft", snr_gamma=g))[0] for g in (1e9, 0.05))
    assert plain == metrics(train("none", loss="sft"))[0]
    assert weighted["loss"] < plain["loss"]
    assert weighted["mse_w"] == plain["mse_w"]  # the metric is the error itself


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Blocks are compiled without code generation; what is compiled is noted."""
    calls: list[Any] = []
    original = UNet2DConditionModel.compile_repeated_blocks

    def compile_blocks(self: Any) -> None:
        torch._dynamo.reset()
        calls.append(original(self, backend="aot_eager"))

    monkeypatch.setattr(UNet2DConditionModel, "compile_repeated_blocks", compile_blocks)
    limit = torch._dynamo.config.cache_size_limit
    yield calls
    torch._dynamo.config.cache_size_limit = limit


def test_compiled_blocks_train_the_same(train: Train, compiled: list[Any]) -> None:
    plain = train("plain", max_train_steps=2)
    other = train("compiled", max_train_steps=2, torch_compile=True)
    assert len(compiled) == 1
    assert_same_weights(plain, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_blocks_stay_compiled_whatever_is_looked_at(
    train: Train, world: Path, compiled: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    pipeline = tiny_sdxl((8, 16, 32), (8, 8), sample_size=8, norm_num_groups=4)  # two widths
    pipeline.save_pretrained(world / "wider")
    folder = train(model="wider", torch_compile=True, loss="dpo", max_train_steps=2, **LORA,
                   **seeing(world))  # fmt: skip
    assert len(compiled) == 1
    assert len(metrics(folder)) == 2


def test_adam_in_8_bits_says_what_it_needs(train: Train) -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match=r"adamw_8bit needs bitsandbytes.*pip install"):
            train(use_8bit_adam=True)
    else:
        assert len(metrics(train(use_8bit_adam=True))) == 3


# Steps that go wrong.


def spoil(monkeypatch: pytest.MonkeyPatch, steps: set[int], factor: float) -> None:
    """Multiply the loss by `factor` at these calls, counted from 1."""
    calls = iter(range(1, 1000))

    @functools.wraps(fastpref.mapo_loss)
    def mapo_loss(pred: torch.Tensor, *args: Any, **options: Any) -> fastpref.LossOutput:
        out = fastpref.mapo_loss(pred, *args, **options)
        bad = pred.requires_grad and next(calls) in steps
        return out._replace(loss=out.loss * factor) if bad else out

    monkeypatch.setitem(LOSSES, "mapo", mapo_loss)


def optimizer_state(checkpoint: Path) -> list[Any]:
    saved = torch.load(checkpoint / "optimizer.bin", weights_only=True)
    return tree_leaves([saved["state"], saved["param_groups"]])


def same(state: list[Any], other: list[Any]) -> bool:
    pairs = zip(state, other, strict=True)
    return all(a.equal(b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


# What is not finite is found before any optimizer is asked.
@pytest.mark.parametrize(
    ("optimizer", "factor"),
    covering.product(
        ["adamw", "adamw, not fused", "adafactor", "prodigy"],
        [math.nan, math.inf],
        fast=lambda optimizer, factor: factor != math.inf or optimizer == "adamw",
    ),
)
def test_a_step_that_is_not_finite_changes_nothing(
    train: Train, monkeypatch: pytest.MonkeyPatch, factor: float, optimizer: str
) -> None:
    if optimizer == "prodigy":
        pytest.importorskip("prodigyopt")
    name, _, not_fused = optimizer.partition(", ")
    if not_fused:
        adamw = functools.partial(torch.optim.AdamW, fused=False)
        monkeypatch.setattr(optim, "make_optimizer", lambda args, p, lr: adamw(p, lr=lr))
    spoil(monkeypatch, {5}, factor)  # the first half of step 3
    folder = train(max_train_steps=4, gradient_accumulation_steps=2, checkpointing_steps=1,
                   optimizer=name, learning_rate=1 if name == "prodigy" else 1e-3)  # fmt: skip
    assert [row["skipped"] for row in metrics(folder)] == [0, 0, 1, 0]
    checkpoints = [folder / f"checkpoint-{step}" for step in (2, 3, 4)]
    before, skipped, after = (load_file(c / "learned_0.safetensors") for c in checkpoints)
    assert all(before[name].equal(skipped[name]) for name in before)
    assert any(not before[name].equal(after[name]) for name in before)
    assert all(value.isfinite().all() for value in after.values())
    first, second, third = map(optimizer_state, checkpoints)
    assert same(first, second)
    assert not same(second, third)


@pytest.mark.parametrize("optimizer", ["adafactor", "prodigy"])
def test_other_optimizers_train_and_resume(train: Train, optimizer: str) -> None:
    if optimizer == "prodigy":
        pytest.importorskip("prodigyopt")
    flags = {"optimizer": optimizer, "max_train_steps": 6, "checkpointing_steps": 3,
             "learning_rate": 1 if optimizer == "prodigy" else 1e-3, "lr_warmup_steps": 2,
             "lr_scheduler": "constant_with_warmup"}  # fmt: skip
    whole, again = train("whole", **flags), interrupted(train("again", **flags), 3)
    train("again", **flags, resume_from_checkpoint="latest")
    assert_same_weights(whole, again)


@pytest.mark.parametrize(("log_every", "seen_at"), [(1, 5), (4, 8), (10, 9)])
def test_too_many_bad_steps_stop_the_run_with_a_checkpoint(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, log_every: int, seen_at: int
) -> None:
    spoil(monkeypatch, {3, 4, 5}, math.nan)
    flags = {"max_train_steps": 9, "max_bad_steps": 3, "log_every": log_every}
    message = f"not finite for 3 steps in a row, as was seen at step {seen_at}"
    with pytest.raises(FloatingPointError, match=message):
        train(**flags)
    rows = metrics(tmp_path / "run")
    assert [row["skipped"] for row in rows[:5]] == [0, 0, 1, 1, 1]
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == [f"checkpoint-{seen_at}"]
    monkeypatch.undo()
    train(**flags | {"max_train_steps": 12}, resume_from_checkpoint="latest")
    assert [row["skipped"] for row in metrics(tmp_path / "run")[5:]] == [0] * 7


class Reads(TorchDispatchMode):
    """Counts how often Python asks for a number. (Copies that wait show on a GPU only.)"""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "flags", [{}, {"loss": "dpo"}, {"loss": "dpo", **LORA}, {"snr_gamma": 5, "use_ema": True}]
)
def test_steps_read_no_number_from_the_device(
    train: Train, monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any]
) -> None:
    def reads(steps: int) -> int:
        mode, accumulate = Reads(), Accelerator.accumulate
        entered: list[bool] = []

        def begin(self: Any, *models: Any) -> Any:
            if not entered:  # from the first step on, to the end of the run
                entered.append(True)
                mode.__enter__()
            return accumulate(self, *models)

        with monkeypatch.context() as patch:
            patch.setattr(Accelerator, "accumulate", begin)
            try:
                train(f"{steps}", max_train_steps=steps, log_every=100, **flags)
            finally:
                mode.__exit__(None, None, None)
        return mode.count

    assert reads(4) == reads(9)


# Data of other kinds.


def write_folder(folder: Path, count: int = 10) -> Path:
    """Ten photographs of different shapes and their blurred copies, with captions in files."""
    rng = __import__("numpy").random.default_rng(0)
    for side in "wl":
        (folder / side).mkdir(parents=True)
    for i in range(count):
        photograph = load_photograph(("chelsea.png", "coffee.png", "rocket.jpg")[i % 3])
        crop = photograph.crop((10 * i, 5 * i, 10 * i + (90, 60, 75)[i % 3], 5 * i + 60))
        crop.save(folder / "w" / f"{i:02}.png")
        blur(crop, rng).save(folder / "l" / f"{i:02}.jpg")
        (folder / "w" / f"{i:02}.txt").write_text(f"photograph {i}")
    return folder


def test_a_folder_of_photographs_trains(train: Train, tmp_path: Path) -> None:
    folder = train(dataset_name=write_folder(tmp_path / "photos"), max_train_steps=6)
    assert len(metrics(folder)) == 6


def test_a_table_of_pairs_with_scores_trains(train: Train, tmp_path: Path) -> None:
    photos = write_folder(tmp_path / "photos")
    rows = [
        {"winner": f"w/{i:02}.png", "loser": f"l/{i:02}.jpg", "caption": f"photograph {i}",
         "good": 0.9, "bad": 0.1 * i / 10}
        for i in range(10)
    ]  # fmt: skip
    (photos / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"dataset_name": photos / "pairs.jsonl", "loss": "smpo"}
    assert len(metrics(train(**flags, score_columns=("good", "bad")))) == 3


def test_a_stream_trains_and_goes_on_where_it_was(train: Train) -> None:
    flags = {"streaming": True, "max_train_steps": 8, "checkpointing_steps": 3}
    whole, again = train("whole", **flags), interrupted(train("again", **flags), 3)
    train("again", **flags, resume_from_checkpoint="latest")
    assert_same_weights(whole, again)
    assert metrics(whole) == metrics(again)


def test_an_inversion_is_told_of_timesteps_on_the_host(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[Any, ...]] = []
    invert, send = Objective.invert, vars(step)["send_to_device"]
    sent: list[torch.Tensor] = []

    def keep(self: Objective, model: Any, latents: Any, timesteps: torch.Tensor, seeds: Any) -> Any:
        assert self.scheduler is not None
        given.append((timesteps, self.scheduler.alphas_cumprod))
        return invert(self, model, latents, timesteps, seeds)

    def to_device(batch: Any, device: torch.device, **options: Any) -> Any:
        sent.append(batch["timesteps"])
        batch = send(batch, device, **options)
        return batch | {"timesteps": batch["timesteps"].clone()}  # as on another device

    monkeypatch.setattr(Objective, "invert", keep)
    monkeypatch.setattr(step, "send_to_device", to_device)
    train(loss="dpo", inversion="ddim", inversion_steps=2, max_train_steps=2)
    assert len(given) == 2
    assert all(given_ is sent_ for (given_, _), sent_ in zip(given, sent, strict=True))


def test_buckets_of_several_resolutions_train_and_resume(train: Train, tmp_path: Path) -> None:
    photos = write_folder(tmp_path / "photos")
    flags = {
        "dataset_name": photos, "resolution": (16, 32), "aspect_buckets": True,
        "max_train_steps": 8, "checkpointing_steps": 3, "dataloader_num_workers": 2,
    }  # fmt: skip
    whole, again = train("whole", **flags), interrupted(train("again", **flags), 3)
    train("again", **flags, resume_from_checkpoint="latest")
    assert_same_weights(whole, again)


def test_a_bad_image_is_left_out_and_told(train: Train, tmp_path: Path) -> None:
    photos = write_folder(tmp_path / "photos")
    broken = photos / "l" / "03.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"1 of 10 pairs .*03\.jpg.*max_refused"):
        train("strict", dataset_name=photos)
    assert not list_checkpoints(tmp_path / "strict")
    folder = train(dataset_name=photos, max_refused=0.2)
    assert "03.jpg" in (folder / "refused.txt").read_text()
    assert len(metrics(folder)) == 3
    train(dataset_name=photos, max_refused=0.2, resume_from_checkpoint="latest", max_train_steps=4)
    assert len((folder / "refused.txt").read_text().splitlines()) == 1


def test_an_image_that_breaks_later_is_replaced(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = write_folder(tmp_path / "photos")
    make = loader.make_pairs

    def then_break(*args: Any, **options: Any) -> Any:
        pairs = make(*args, **options)
        (photos / "l" / "03.jpg").write_bytes(b"broken")
        return pairs

    monkeypatch.setattr(loader, "make_pairs", then_break)
    folder = train(dataset_name=photos, max_train_steps=5)  # all ten pairs once
    assert len(metrics(folder)) == 5
    assert "03.jpg" in (folder / "refused.txt").read_text()


def test_check_data_tells_and_trains_nothing(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train(dataset_name=write_folder(tmp_path / "photos"), check_data=True)
    told = capsys.readouterr().out
    assert "pairs to train on: 10" in told
    Image.open(folder / "data.png").verify()
    assert not (folder / "metrics.jsonl").exists()
    assert not list_checkpoints(folder)


@pytest.mark.parametrize(("loss", "beta"), [("mapo", 0.1), ("dpo", 100)])
def test_the_cache_changes_nothing_but_the_work(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str, beta: float
) -> None:
    flags = {
        "loss": loss, "beta": beta, "max_train_steps": 4, "adam_epsilon": 1e-3,
        "learning_rate": 1e-2, "proportion_empty_prompts": 0.3,
    }  # fmt: skip
    cached = flags | {"latent_cache": tmp_path / "cache", "latent_cache_dtype": "fp32"}
    plain, first = train("plain", **flags), train("first", **cached)
    for a, b in zip(metrics(plain), metrics(first), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-3)

    def encode(*_: Any) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(AutoencoderKL, "encode", encode)
    second = train("second", **cached)
    assert_same_weights(first, second)


def test_with_a_cache_no_encoder_is_left(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[set[str]] = []
    load = vars(loop)["load_encoders"]
    loaded: list[Any] = []

    def keep(*args: Any) -> Any:
        loaded.append(load(*args))
        return loaded[-1]

    prepare = Accelerator.prepare

    def spy(self: Any, *things: Any) -> Any:
        vae, _, texts = loaded[-1]
        devices.append({p.device.type for model in (vae, *texts) for p in model.parameters()})
        return prepare(self, *things)

    monkeypatch.setattr(loop, "load_encoders", keep)
    monkeypatch.setattr(Accelerator, "prepare", spy)
    train(latent_cache=tmp_path / "cache", max_train_steps=1)
    assert devices == [{"meta"}]


# Seeing.


def test_heldout_scores_and_grids_are_kept_and_resumed(train: Train, world: Path) -> None:
    flags = {**seeing(world), "max_train_steps": 5, "checkpointing_steps": 2, "report_to":
             "tensorboard"}  # fmt: skip
    whole = train("whole", **flags)
    rows = read_metrics(whole / "eval.jsonl")
    assert [row["step"] for row in rows] == [0, 2, 4, 5]
    assert rows[0]["drop_w"] == rows[0]["drop_l"] == 0
    assert rows[0]["accuracy_ref"] == 0.5
    assert rows[-1]["drop_w"] != 0
    for at in (0, 2, 4, 5):
        Image.open(whole / "validation" / f"step-{at}.png").verify()
    # Looking does not change the run, and a resumed one has seen the same.
    assert metrics(whole) == metrics(train("plain", max_train_steps=5))
    again = interrupted(train("again", **flags), 2)
    train("again", **flags, resume_from_checkpoint="latest")
    assert read_metrics(again / "eval.jsonl") == rows
    card = (whole / "pipeline" / "README.md").read_text()
    assert "curves.png" in card
    assert "step-5.png" in card


def test_held_out_pairs_are_others_than_those_trained_on(train: Train, tmp_path: Path) -> None:
    photos = write_folder(tmp_path / "photos")
    with pytest.raises(ValueError, match="has no splits; need --eval_dataset_name"):
        train(dataset_name=photos, eval_split_name="validation")
    other = write_folder(tmp_path / "other", count=3)
    folder = train(dataset_name=photos, eval_dataset_name=other)
    assert len(read_metrics(folder / "eval.jsonl")) == 2


def test_held_out_pairs_need_no_column_of_training_alone(train: Train, world: Path) -> None:
    flags = {"loss": "smpo", "score_columns": ("score_0", "score_1"), "eval_split_name": "heldout"}
    assert len(read_metrics(train(**flags) / "eval.jsonl")) == 2


def test_looking_from_the_middle_of_a_run_compares_with_the_base(train: Train, world: Path) -> None:
    flags = {"max_train_steps": 4, "checkpointing_steps": 2, "learning_rate": 1e-2}
    seen = train("seen", **flags, **seeing(world))
    later = interrupted(train("later", **flags), 2)
    train("later", **flags, **seeing(world), resume_from_checkpoint="latest")
    assert read_metrics(seen / "eval.jsonl")[-1] == read_metrics(later / "eval.jsonl")[-1]


def test_trackers_are_told_of_steps_in_their_order(
    train: Train, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: steps.append(step))
    train(**seeing(world) | {"eval_steps": 3}, log_every=5, max_train_steps=8)
    assert steps == sorted(steps)
    assert {*steps} == {*range(9)}


@pytest.mark.parametrize("text", [False, True], ids=["unet", "text encoders too"])
def test_heldout_and_grids_with_adapters_and_a_cache(
    train: Train, world: Path, tmp_path: Path, text: bool
) -> None:
    flags = {**seeing(world), **LORA, "max_train_steps": 2, "use_ema": True,
             "latent_cache": tmp_path / "cache", "loss": "dpo"}  # fmt: skip
    if text:
        flags["train_text_encoder"] = True
    folder = train(**flags)
    rows = read_metrics(folder / "eval.jsonl")
    assert [row["step"] for row in rows] == [0, 2]
    assert rows[0]["drop_w"] == 0 != rows[1]["drop_w"]
    assert (folder / "README.md").exists()


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_exactly_the_result_is_pushed(
    train: Train, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], lora: bool,
) -> None:  # fmt: skip
    folder = tmp_path / "run"
    result = folder if lora else folder / "pipeline"
    secret = tmp_path / "secret"
    secret.write_text("secret")
    uploaded: dict[str, bytes] = {}

    def lay_bait(into: Path) -> None:
        for name in (
            "data.png", "secret.txt", ".env", "notes.md", "secret.safetensors", "logs/run/events",
            "checkpoint-1/learned_0.safetensors", ".tmp-checkpoint-9/unet.safetensors",
            "validation/train.png", "unet/secret.safetensors", "unet/secret.json",
            "pipeline/secret.txt", "pipeline/unet/secret.json",
        ):  # fmt: skip
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            (into / name).write_text("secret")
        (into / "link.png").symlink_to(secret)

    class Url(str):
        repo_id = "me/model"

    def create_repo(repo_id: str, private: bool | None, exist_ok: bool) -> Url:
        assert (repo_id, private) == ("me/model", True)
        if not lora:
            lay_bait(result)  # what lay there before, the pipeline has replaced
        return Url("hub/me/model")

    def create_commit(repo_id: str, operations: list[Any], commit_message: str) -> None:
        for operation in operations:
            with operation.as_file() as file:
                uploaded[operation.path_in_repo] = file.read()

    for name, fake in (
        ("create_repo", create_repo), ("create_commit", create_commit),
        ("model_info", lambda repo_id: SimpleNamespace(private=True)),
    ):  # fmt: skip
        monkeypatch.setattr(huggingface_hub, name, fake)
    folder.mkdir()
    lay_bait(folder)
    shutil.rmtree(folder / "checkpoint-1")  # else there is one to resume from
    train(
        push_to_hub=True, hub_model_id="me/model", hub_private_repo=True, max_train_steps=2,
        latent_cache=folder / "latents", **seeing(world), **(LORA if lora else {}),
    )  # fmt: skip
    assert "pushed to hub/me/model" in capsys.readouterr().out
    card = uploaded["README.md"].decode()
    assert "me/model" in card
    pictures = {"curves.png", "validation/step-2.png" if lora else "step-2.png"}
    assert set(re.findall(r"\]\(([^)]*)\)", card)) == pictures
    expected = {LORA_FILE, KOHYA_FILE}
    if not lora:
        base = world / "epsilon"  # the same parts in the same formats
        expected = {p.relative_to(base).as_posix() for p in base.rglob("*") if p.is_file()}
    assert uploaded.keys() == expected | pictures | {"README.md"}
    assert b"secret" not in uploaded.values()
    for name, data in uploaded.items():
        for place in (world, tmp_path, ROOT):
            assert str(place).encode() not in data, name


def test_a_saved_pipeline_can_be_read_by_others(train: Train) -> None:
    mask = os.umask(0o027)
    try:
        folder = train(max_train_steps=1)
    finally:
        os.umask(mask)
    files = [path for path in (folder / "pipeline").rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}
    StableDiffusionXLPipeline.from_pretrained(folder / "pipeline", add_watermarker=False)


def test_a_token_is_kept_out_of_the_settings(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "another")
    args = parse_args(argv(world, tmp_path, hub_token="hf_secret"))
    assert "hf_secret" not in str(vars(args))
    assert huggingface_hub.get_token() == "hf_secret"


# Staying whole.


@pytest.fixture
def small_disk() -> Iterator[Any]:
    """Calling it makes every file that grows beyond some KiB fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_loses_no_earlier_checkpoint(
    train: Train, tmp_path: Path, small_disk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"max_train_steps": 6, "checkpointing_steps": 2, "checkpoints_total_limit": 1}
    whole = train("whole", **flags)
    save = Accelerator.save_state

    def save_state(self: Any, folder: str) -> Any:
        if folder.endswith("checkpoint-4"):
            small_disk()
        return save(self, folder)

    monkeypatch.setattr(Accelerator, "save_state", save_state)
    with pytest.raises((OSError, RuntimeError, SafetensorError)):
        train("full", **flags)
    full = tmp_path / "full"
    assert [path.name for path in list_checkpoints(full)] == ["checkpoint-2"]
    assert not list(full.glob(".tmp*"))  # what was written in vain takes no room
    monkeypatch.undo()
    soft_hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft_hard[1], soft_hard[1]))
    train("full", **flags, resume_from_checkpoint="latest")
    assert_same_weights(whole, full)


@pytest.mark.parametrize(
    "options",
    [
        {**LORA, "loss": "dpo", "latent_cache": True},
        pytest.param(  # of these, others resume after an error
            {"use_ema": True, "aspect_buckets": True, "resolution": (16, 24)},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["lora, dpo, cache", "full, ema, buckets"],
)
def test_killed_at_a_random_step_it_ends_the_same(
    train: Train, world: Path, tmp_path: Path, rng: random.Random, options: dict[str, Any]
) -> None:
    flags: dict[str, Any] = {
        "max_train_steps": 16, "checkpointing_steps": 3, "checkpoints_total_limit": 2,
        "gradient_accumulation_steps": 2, "lr_scheduler": "cosine", **options, **seeing(world),
        "eval_steps": 4, "validation_prompts": "a cat", "validation_steps": 5,
    }  # fmt: skip
    if options.get("latent_cache"):
        flags["latent_cache"] = tmp_path / "cache"
    whole = train("whole", **flags)
    killed = tmp_path / "killed"
    words = argv(world, killed, **flags, resume_from_checkpoint="latest", log_every=1)
    command = [sys.executable, str(ROOT / "examples" / "train_sdxl.py"), *words]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    wait_for = rng.randrange(4, 12)
    print(f"killed after step {wait_for}")
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while len(read_metrics(killed / "metrics.jsonl")) < wait_for and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, f"it had ended before step {wait_for}"
    train("killed", **flags, resume_from_checkpoint="latest", log_every=1)
    assert_same_weights(whole, killed)
    assert metrics(whole) == metrics(killed)
    assert read_metrics(whole / "eval.jsonl") == read_metrics(killed / "eval.jsonl")


def test_a_run_does_not_go_on_with_other_data_or_another_model(train: Train) -> None:
    train(max_train_steps=1)
    flags = {"resume_from_checkpoint": "latest", "max_train_steps": 2}
    with pytest.raises(ValueError, match="a run on 24 pairs; there are 20 now"):
        train(**flags, max_train_samples=20)
    with pytest.raises(ValueError, match="is of a run with --loss mapo; --loss is sft now"):
        train(**flags, loss="sft")
    train("two", max_train_steps=2)
    message = r"max_train_steps is 1, and .*checkpoint-2 is at step 2"
    with pytest.raises(ValueError, match=message):
        train("two", max_train_steps=1, resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match=r"weights are not those of this model .*--lora_rank"):
        train(**flags, **LORA)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lora_alpha": 4}, "lora_alpha came without --lora_rank; need both"),
        ({"train_text_encoder": True}, "train_text_encoder came without --lora_rank"),
        ({"push_to_hub": True}, "push_to_hub came without --hub_model_id"),
        ({"hub_private_repo": True}, "hub_private_repo came without --push_to_hub"),
        ({"hub_token": "hf_secret", "report_to": "wandb"}, "wandb keeps command lines"),
        ({"latent_cache": "c", "random_crop": True}, "latent_cache and --random_crop came"),
        ({"latent_cache": "c", "streaming": True}, "latent_cache and --streaming came"),
        ({"streaming": True, "aspect_buckets": True}, "streaming and --aspect_buckets came"),
        ({"streaming": True, "check_data": True}, "streaming and --check_data came"),
        ({"streaming": True, "num_train_epochs": 1}, "streaming and --num_train_epochs came"),
        ({"streaming": True, "resolution": (16, 32)}, r"with --resolution \[16, 32\]; need one"),
        ({"lora_rank": 0}, "lora_rank is 0; need more than 0"),
        ({"max_bad_steps": 0}, "max_bad_steps is 0; need more than 0"),
        ({"max_refused": 2}, "max_refused is 2.0; need a share from 0 to 1"),
        ({"resolution": (16, 18)}, "resolution is 18; this VAE and denoiser need a multiple of 4"),
        ({"ema_decay": 1.5}, "ema_decay is 1.5; need a share from 0 to 1"),
    ],
)
def test_clear_errors(train: Train, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(**flags)


def test_checkpoints_of_adapters_are_small(train: Train) -> None:
    folder = train(**LORA)
    with safe_open(folder / "checkpoint-3" / "learned_0.safetensors", "pt") as file:
        assert all("lora_" in name for name in file.keys())  # noqa: SIM118
    assert not list((folder / "checkpoint-3").glob("model*"))
