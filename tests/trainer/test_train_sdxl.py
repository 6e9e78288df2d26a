"""The SDXL trainer end to end at the smallest size: it learns by every loss, it resumes exactly, it
explains."""

from __future__ import annotations

import functools
import inspect
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

import fastpref
import oracles
from small_run import SCORES, Train, argv, assert_same_weights, unet_of
from toy import demo
from toy.tiny import tiny_sdxl
from trainer import loop
from trainer.args import parse_args
from trainer.checkpoints import find_checkpoint, list_checkpoints, prune
from trainer.data.batches import Collator, Draws
from trainer.data.pairs import PreferencePairs
from trainer.data.sources import load_pairs
from trainer.families.loading import frozen_copy
from trainer.families.sdxl import SDXL
from trainer.files import whole_folder
from trainer.losses import INVERSIONS, LOSSES, OPTIONS, layout_of
from trainer.metrics import append_metrics, read_metrics, truncate_metrics
from trainer.objective import Objective

PAIRS = [loss for loss in LOSSES if layout_of(loss) == "pairs"]  # the others: test_groups.py
# What a loss cannot do without.
TAKES = {loss: {*inspect.signature(LOSSES[loss]).parameters} for loss in PAIRS}
NEEDED: dict[str, dict[str, Any]] = {
    loss: SCORES for loss, takes in TAKES.items() if takes & {"prob", "delta"}
}
COLUMN_FLAGS = ("score_columns", "sign_column")
OWN_FLAGS = {  # the numbers that a loss is called with in test_losses.py, where each is a flag
    loss: dict(oracles.FORMULAS[loss].call)
    for loss in PAIRS
    if loss in oracles.FORMULAS and {*oracles.FORMULAS[loss].call} <= {*OPTIONS}
}
REFERENCED = {loss for loss, takes in TAKES.items() if "ref_pred" in takes} - {"pso"}  # by default


@pytest.mark.parametrize("model", ["epsilon", "v_prediction"])
def test_a_run_leaves_what_it_promises(train: Train, world: Path, model: str) -> None:
    folder = train(model=model, report_to="tensorboard", checkpointing_steps=2)
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    names = {"loss", "mse_w", "mse_l", "margin", "accuracy", "gradient_factor"}
    assert set(rows[0]) == {"step", "lr", "grad_norm", "skipped"} | names
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
@pytest.mark.parametrize("loss", ["mapo", "sft", "dpo"])
def test_fused_and_plain_losses_trace_the_same_curve(train: Train, loss: str) -> None:
    curves = [
        read_metrics(train(impl, loss=loss, loss_impl=impl) / "metrics.jsonl")
        for impl in ("torch", "triton")
    ]
    for plain, fused in zip(*curves, strict=True):
        assert fused == pytest.approx(plain, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(
    ("loss", "flags"),
    [
        *((loss, {}) for loss in PAIRS),
        ("pso", {"loss_type": "sigmoid"}),
        ("dpo", {"loss_type": "exo_pair", "label_smoothing": 0.1}),
        ("dpo", {"mixed_precision": "bf16", "gradient_checkpointing": True}),
        ("dpo", {"loser_caption_column": "worse_caption"}),
        ("dpo", {"inversion": "ddim", "inversion_steps": 2, "inversion_eta": 0.1}),
        ("smpo", {"inversion": "renoise", "inversion_steps": 2, "inversion_evals": 3}),
        ("smpo", {"score_range": (0, 1), "report_to": "tensorboard"}),
    ],
)
def test_every_loss_trains(
    train: Train, world: Path, monkeypatch: pytest.MonkeyPatch, loss: str, flags: dict[str, Any]
) -> None:
    references = []

    def spy(*arguments: Any) -> UNet2DConditionModel:
        references.append(frozen_copy(*arguments))
        return references[-1]

    monkeypatch.setattr(loop, "frozen_copy", spy)
    folder = train(loss=loss, max_train_steps=4, **NEEDED.get(loss, {}) | flags)
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert (folder / "curves.png").stat().st_size > 10_000
    start = load_file(world / "epsilon" / "unet" / "diffusion_pytorch_model.safetensors")
    assert any(not start[name].equal(value) for name, value in unet_of(folder).items())

    compares = loss in REFERENCED or flags.get("loss_type") == "sigmoid"
    assert len(references) == compares
    assert all({"ref_mse_w", "ref_mse_l"} <= row.keys() for row in rows) == compares
    assert any({"ref_mse_w", "ref_mse_l"} & row.keys() for row in rows) == compares
    for reference in references:
        assert not any(parameter.requires_grad for parameter in reference.parameters())
        for name, value in reference.state_dict().items():
            assert value.equal(start[name].to(value.dtype)), name
    if compares:
        first, last = rows[0], rows[-1]
        assert first["margin"] == pytest.approx(0, abs=1e-3)  # it starts as the reference
        assert (first["mse_w"], first["mse_l"]) == (first["ref_mse_w"], first["ref_mse_l"])
        # a margin in units of the errors, or at DSPO's beta of .001
        least = {"diffusion_dro": 1e-3, "dspo": 1e-7}.get(loss, 0.01)
        assert abs(last["margin"]) > least
        assert last["mse_w"] != last["ref_mse_w"]
    if loss == "dpo" and "loss_type" not in flags:
        assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)


def test_the_reference_predicts_the_same_bits_in_less_memory() -> None:
    unet = tiny_sdxl((8, 16), (8, 8), sample_size=8, norm_num_groups=4).unet
    with torch.no_grad():
        for parameter in unet.parameters():  # norms begin as 1 and 0, which any dtype holds
            parameter += 0.1 * torch.randn(parameter.shape)
    reference = frozen_copy(unet, torch.bfloat16)
    condition = {"text_embeds": torch.randn(2, 32), "time_ids": torch.randn(2, 6)}
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.randn(2, 77, 64)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = (
            model(*inputs, added_cond_kwargs=condition).sample for model in (unet, reference)
        )
    assert found.equal(expected)
    assert reference.get_memory_footprint() < 0.52 * unet.get_memory_footprint()


@pytest.mark.parametrize(
    ("loss", "flags", "expected"),
    [
        *((loss, flags, {}) for loss, flags in OWN_FLAGS.items()),
        ("mapo", {"beta": 0.2, "snr": 0.4, "logit_scale": 2.0}, {"num_train_timesteps": 500.0}),
        ("orpo", {"sft_weight": 0.5, "logit_scale": 30.0}, {}),
        ("dpo", {"beta": 3.0, "loss_type": "hinge", "loser_weight": 0.5, "sft_weight": 0.1}, {}),
        ("dpo", {"loss_type": "alpha", "alpha": 0.5}, {}),
        ("pso", {"loser_weight": 0.3, "prior_weight": 0.2, "label_smoothing": 0.1}, {}),
        ("self_npo", {"huber_c": 0.1}, {}),
        ("smpo", {"beta": 3.0, "gamma": 2.0}, {"prob": [0.6457274, 0.0044838]}),
        ("smpo", {"beta": 3.0, "score_range": (0.0, 0.5)}, {"prob": [0.5498340, 0.1418511]}),
        ("capo", {"beta": 3.0}, {"delta": [0.1, -0.9]}),
        ("seppo", {"beta": 3.0, "sign_column": "sign"}, {"sign": [1.0, -1.0]}),
    ],
)
def test_a_loss_gets_the_flags_and_the_columns(
    loss: str, flags: dict[str, Any], expected: dict[str, Any]
) -> None:
    flags = {"loss": loss, **NEEDED.get(loss, {}), **flags}
    scheduler = DDPMScheduler(num_train_timesteps=500)
    args = parse_args(argv(Path("world"), Path("run"), **flags))
    objective = Objective(args, SDXL, scheduler)
    generator = torch.Generator().manual_seed(0)
    pred, target, ref = (torch.randn(4, 3, generator=generator) for _ in range(3))
    batch = {"scores": torch.tensor([0.5, 0.1, 0.4, 1.0])}
    if "sign_column" in flags:
        batch["sign"] = torch.tensor([1.0, -1.0])
    out = objective(pred, target, ref if objective.needs_reference else None, batch)
    options = {k: v for k, v in flags.items() if k not in ("loss", "score_range", *COLUMN_FLAGS)}
    options |= {k: torch.tensor(v) for k, v in expected.items()}
    if loss in REFERENCED:
        options["ref_pred"] = ref
    if "paired" in TAKES[loss]:
        options["paired"] = True
    wanted = getattr(fastpref, f"{loss}_loss")(pred, target, **options)
    torch.testing.assert_close(out, wanted)


def test_the_negative_model_is_dpo_on_swapped_labels(train: Train) -> None:
    # A larger epsilon keeps Adam from making a full step of a gradient that is but rounding.
    flags = {"beta": 2000, "adam_epsilon": 1e-3, "learning_rate": 1e-2, "max_train_steps": 4}
    npo, dpo = train("npo", loss="npo", **flags), train("dpo", loss="dpo", **flags)
    swapped = train("swapped", loss="dpo", label_noise_prob=1, **flags)
    assert_same_weights(npo, swapped, rtol=1e-3, atol=1e-4)
    with pytest.raises(AssertionError):
        assert_same_weights(npo, dpo, rtol=1e-3, atol=1e-4)
    other_side = str.maketrans("wl", "lw")
    for a, b in zip(*(read_metrics(f / "metrics.jsonl") for f in (npo, swapped)), strict=True):
        b |= {k.translate(other_side): b[k] for k in b if "mse" in k}
        assert a == pytest.approx(b, rel=1e-3, abs=1e-2)


def test_each_half_is_conditioned_on_its_own_caption(train: Train) -> None:
    shared, same, own = (
        read_metrics(train(name, loss="dpo", max_train_steps=12, **flags) / "metrics.jsonl")
        for name, flags in (
            ("shared", {}),
            ("same", {"loser_caption_column": "caption"}),
            ("own", {"loser_caption_column": "worse_caption"}),
        )
    )
    assert same[0] == pytest.approx(shared[0], rel=1e-4)
    assert own[0]["mse_w"] == pytest.approx(shared[0]["mse_w"], rel=1e-5)
    assert own[0]["mse_l"] != pytest.approx(shared[0]["mse_l"], rel=1e-5)
    # Captions tell winners and losers apart at once.
    assert own[-1]["margin"] > 5 > shared[-1]["margin"]


def test_scores_and_signs_come_from_their_columns(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    deltas: list[float] = []

    @functools.wraps(LOSSES["capo"])
    def capo_loss(*arguments: Any, **options: Any) -> fastpref.LossOutput:
        deltas.extend(options["delta"].tolist())
        return fastpref.capo_loss(*arguments, **options)

    monkeypatch.setitem(LOSSES, "capo", capo_loss)
    known = [0.5 + 0.01 * i for i in range(24)]
    for name, flags, sign in (("right", {}, 1), ("wrong", {"label_noise_prob": 1}, -1)):
        deltas.clear()
        train(name, loss="capo", train_batch_size=4, max_train_steps=6, **SCORES, **flags)
        # The trial call before training sees a score of 0 twice.
        assert sorted(sign * d for d in deltas if d) == pytest.approx(known, abs=1e-6)

    plain, pulled = (
        read_metrics(train(name, loss="seppo", **flags) / "metrics.jsonl")
        for name, flags in (("plain", {}), ("pulled", {"sign_column": "sign"}))
    )
    names = plain[0].keys() - {"grad_norm"}
    assert [pulled[0][name] for name in names] == [plain[0][name] for name in names]
    assert pulled[2]["margin"] > 50 > plain[2]["margin"]  # both errors fall together at once


@pytest.mark.parametrize(("name", "inner"), [("ddim", 3), ("renoise", 5)])
def test_inversion_gives_each_image_its_own_noise(
    train: Train, monkeypatch: pytest.MonkeyPatch, name: str, inner: int
) -> None:
    inversions: list[tuple[Any, ...]] = []
    calls: list[tuple[Any, ...]] = []
    losses: list[tuple[Any, ...]] = []
    invert, forward = INVERSIONS[name], UNet2DConditionModel.forward

    @functools.wraps(invert)
    def inversion(model: Any, *inputs: Any, **options: Any) -> fastpref.inversion.Inverted:
        inversions.append((*inputs, options, invert(model, *inputs, **options)))
        return inversions[-1][-1]

    def unet_forward(self: Any, sample: Any, timestep: Any, **condition: Any) -> Any:
        calls.append((self.training, torch.is_grad_enabled(), sample, timestep))
        return forward(self, sample, timestep, **condition)

    @functools.wraps(LOSSES["dpo"])
    def dpo_loss(pred: Any, target: torch.Tensor, **options: Any) -> fastpref.LossOutput:
        losses.append((target, options["impl"]))
        return fastpref.dpo_loss(pred, target, **options)

    monkeypatch.setitem(INVERSIONS, name, inversion)
    monkeypatch.setitem(LOSSES, "dpo", dpo_loss)
    monkeypatch.setattr(UNet2DConditionModel, "forward", unet_forward)
    train(loss="dpo", inversion=name, inversion_steps=3, max_train_steps=1)

    ((latents, timesteps, scheduler, options, (noisy, target)),) = inversions
    assert options == {"num_steps": 3}
    assert timesteps[:2].equal(timesteps[2:])
    # The policy (in training mode) inverts, then the reference and the policy see the result.
    policy, reference = (True, False), (False, False)
    assert [call[:2] for call in calls] == [policy] * inner + [reference, (True, True)]
    assert all(timestep.equal(timesteps) for *_, timestep in calls[-2:])
    assert all(sample.equal(noisy) for _, _, sample, _ in calls[-2:])
    assert losses[-1][0] is target
    assert losses[-1][1] == "auto"
    expected = fastpref.inversion.inversion_target(noisy, latents, timesteps, scheduler)
    torch.testing.assert_close(target, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(target[:2], target[2:])


def test_a_pair_shares_noise_and_timestep() -> None:
    shape = torch.Size((4, 8, 8))
    noise, timesteps, vae_noise = Draws(SDXL, DDPMScheduler(), 4, 8)([7, 8, 7], 64, 64)
    assert noise[0].equal(noise[2])
    assert timesteps[0] == timesteps[2]
    assert not noise[0].equal(noise[1])
    assert not noise[0].equal(vae_noise[0])
    latents = torch.randn(6, *shape)
    for prediction_type in ("epsilon", "v_prediction"):
        scheduler = DDPMScheduler(prediction_type=prediction_type)
        noisy, target = SDXL.process.add_noise(latents, noise, timesteps, scheduler)
        twice = torch.cat([noise, noise])
        scale = scheduler.alphas_cumprod[timesteps.repeat(2)][:, None, None, None]
        torch.testing.assert_close(noisy - scale.sqrt() * latents, (1 - scale).sqrt() * twice)
        if prediction_type == "epsilon":
            assert target is noise
        else:
            torch.testing.assert_close(target, scale.sqrt() * twice - (1 - scale).sqrt() * latents)


def test_a_batch_is_stacked_winners_first(world: Path) -> None:
    rows = load_pairs(str(world / "data"), "train", cache_dir=str(world / "cache"))
    pairs = [PreferencePairs(rows, [(16, 16)])[0, i] for i in range(3)]
    pipeline = StableDiffusionXLPipeline.from_pretrained(world / "epsilon", add_watermarker=False)
    batch = Collator(SDXL, [pipeline.tokenizer, pipeline.tokenizer_2])(pairs)
    assert batch["pixels"].shape == (6, 3, 16, 16)
    assert batch["pixels"][1].equal(pairs[1]["pixels_w"])
    assert batch["pixels"][4].equal(pairs[1]["pixels_l"])
    assert batch["time_ids"][4].equal(pairs[1]["time_ids_l"])
    assert [ids.shape for ids in batch["input_ids"]] == [(3, 77)] * 2
    assert not {"scores", "sign"} & batch.keys()


def test_captions_scores_and_signs_are_stacked_winners_first(world: Path) -> None:
    rows = load_pairs(str(world / "data"), "train", cache_dir=str(world / "cache"))
    data = PreferencePairs(
        rows, [(16, 16)], loser_caption_column="worse_caption", sign_column="sign", **SCORES
    )
    tokenizer = StableDiffusionXLPipeline.from_pretrained(
        world / "epsilon", add_watermarker=False
    ).tokenizer
    batch = Collator(SDXL, [tokenizer])([data[0, i] for i in range(3)])
    captions = rows[:3]["caption"] + rows[:3]["worse_caption"]
    ids = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    assert batch["input_ids"][0].equal(ids)
    torch.testing.assert_close(batch["scores"], torch.tensor([0.7, 0.71, 0.72, 0.2, 0.2, 0.2]))
    assert batch["sign"].tolist() == [-1.0, -1.0, -1.0]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_equals_the_uninterrupted_one(train: Train, workers: int) -> None:
    flags = {"max_train_steps": 8, "checkpointing_steps": 3, "lr_scheduler": "cosine",
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


@pytest.mark.parametrize(
    "flags",
    [
        {"loss": "dpo"},
        pytest.param(
            {"loss": "dpo", "inversion": "ddim", "inversion_steps": 2, "inversion_eta": 0.1},
            marks=pytest.mark.slow,
        ),
        {"loss": "smpo", "inversion": "renoise", "inversion_steps": 2, **SCORES},
    ],
)
def test_a_resumed_run_compares_with_the_base(train: Train, flags: dict[str, Any]) -> None:
    flags = {**flags, "max_train_steps": 6, "checkpointing_steps": 3}
    whole, parts = train("whole", **flags), train("parts", **flags)
    shutil.rmtree(parts / "pipeline")
    os.replace(parts / "checkpoint-6", parts / ".tmp-checkpoint-6")
    train("parts", **flags, resume_from_checkpoint="latest")
    assert_same_weights(whole, parts)
    rows = read_metrics(parts / "metrics.jsonl")
    assert rows == read_metrics(whole / "metrics.jsonl")
    assert rows[3]["mse_w"] != rows[3]["ref_mse_w"]


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
    checkpoint = tmp_path / "checkpoint-11"
    with pytest.raises(FileExistsError), whole_folder(checkpoint, Accelerator()):
        pass
    (tmp_path / ".tmp-checkpoint-11").unlink()
    assert find_checkpoint("latest", tmp_path) == tmp_path / "checkpoint-10"
    with whole_folder(tmp_path / "checkpoint-10", Accelerator()) as aside:
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
        ({"resolution": 18}, "resolution is 18; this VAE and denoiser need a multiple of 4"),
        ({"resume_from_checkpoint": "checkpoint-7"}, "'checkpoint-7' is no checkpoint.*has: none"),
        ({"max_train_steps": 0}, "max_train_steps is 0; need more than 0"),
        ({"label_noise_prob": 1.5}, "label_noise_prob is 1.5; need a share from 0 to 1"),
        ({"seed": -1}, "seed is -1; need 0 or more"),
        ({"dataset_split_name": "nowhere"}, "need files named nowhere"),
        ({"loss": "dpo", "gamma": 1}, "gamma came, but --loss dpo .* need --loss simpo or smpo"),
        ({"loss": "seppo", "loser_weight": 0.1}, "loser_weight came, but --loss seppo does not"),
        ({"loss": "mapo", "loss_type": "hinge"}, "loss_type came, .* need --loss dpo or npo or"),
        (
            {"loss": "dpo", "loss_type": "best"},
            "loss_type is 'best'; expected one of sigmoid, ipo",
        ),
        (
            {"loss": "dpo", "loss_type": "exo_pair"},
            "dpo: label_smoothing is 0.0; expected a number",
        ),
        ({"beta": -1}, "--loss mapo: beta is -1.0; expected a finite number above 0"),
        ({"loss": "smpo"}, "--loss smpo needs --score_columns"),
        ({"loss": "dpo", **SCORES}, "score_columns came, but --loss dpo .* --loss capo or smpo"),
        ({"loss": "capo", **SCORES, "score_range": (0, 1)}, "score_range came, but --loss capo"),
        (
            {"loss": "smpo", **SCORES, "score_range": (1, 0)},
            "high is 0.0 and low is 1.0; expected",
        ),
        ({"loss": "dpo", "sign_column": "sign"}, "sign_column came, but --loss dpo .* seppo"),
        ({"loss": "capo", "score_columns": ("score_0", "nowhere")}, r"missing \['nowhere'\]"),
        ({"loser_caption_column": "nowhere"}, r"missing \['nowhere'\]"),
        ({"loss": "seppo", "sign_column": "nowhere"}, r"missing \['nowhere'\]"),
        ({"inversion_eta": 0.1}, "inversion_eta came, but --inversion none .* --inversion ddim"),
        ({"inversion": "renoise", "inversion_eta": 0.1}, "inversion_eta came, .* renoise does not"),
        ({"inversion": "ddim", "inversion_evals": 2}, "inversion_evals came, .* ddim does not"),
        ({"inversion": "ddim", "inversion_steps": 0}, "inversion_steps is 0; need more than 0"),
        ({"inversion": "ddim", "inversion_eta": -0.1}, "inversion_eta is -0.1; need 0 or more"),
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
