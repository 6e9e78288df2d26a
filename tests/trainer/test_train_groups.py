"""Losses on samples and on lists in the trainer: each trains, resumes, and is the loss itself."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState

import fastpref
from fastpref.outputs import SampleOutput
from small_run import Train, argv, assert_same_weights, family_of, seeing, unet_of
from toy import demo
from toy.photo_pairs import write_photo_groups
from trainer.args import parse_args
from trainer.checkpoints import list_checkpoints
from trainer.data.batches import Collator
from trainer.data.loader import load_data, train_rows
from trainer.families.loading import load_denoiser, load_encoders, load_scheduler
from trainer.families.process import repeated
from trainer.loop import draws_of, sizes_of, start
from trainer.losses import LOSSES, layout_of
from trainer.metrics import divide, health_of, read_metrics
from trainer.objective import Objective, by_prompt
from trainer.step import Models, latents_of, training_step

GROUPS = [loss for loss in LOSSES if layout_of(loss) != "pairs"]
FAMILIES = ["epsilon", "sd15", "sd3"]


@pytest.fixture(scope="session")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """samples.parquet, scored.parquet and lists.parquet."""
    folder = tmp_path_factory.mktemp("groups")
    write_photo_groups(folder, samples=24, lists=12, size=24)
    rows = pq.read_table(folder / "samples.parquet").to_pylist()
    for i, row in enumerate(rows):
        row["score"] = row.pop("label") + 0.01 * i
    pq.write_table(pa.Table.from_pylist(rows), folder / "scored.parquet")
    return folder


def data_of(groups: Path, loss: str) -> dict[str, Any]:
    """Flags to train on the data of this loss."""
    split = "lists" if layout_of(loss) == "lists" else "scored" if loss == "tgo" else "samples"
    flags = {"dataset_name": groups, "dataset_split_name": split, "loss": loss}
    return flags | ({"label_threshold": 0.6} if loss == "tgo" else {})


def test_the_losses_beside_those_on_pairs() -> None:
    assert {loss: layout_of(loss) for loss in GROUPS} == {
        "ddo": "samples", "kto": "samples", "tgo": "samples", "plackett_luce": "lists",
        "rankdpo": "lists",
    }  # fmt: skip
    assert layout_of("mapo") == "pairs"


@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize("loss", GROUPS)
def test_every_loss_trains(train: Train, world: Path, groups: Path, loss: str, model: str) -> None:
    steps = 12 if model == "epsilon" else 3
    heldout = {"eval_dataset_name": world / "data", "eval_split_name": "heldout", "eval_steps": 2}
    folder = train(model=model, max_train_steps=steps, **data_of(groups, loss), **heldout)
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert all(math.isfinite(value) for row in rows for value in row.values())
    names = {"loss", "error", "ref_error", "drop", "margin", "accuracy", "gradient_factor"}
    assert names <= rows[0].keys()
    kinds = {"drop_desirable", "drop_undesirable"}
    assert any(kinds & row.keys() for row in rows) == (layout_of(loss) == "samples")
    assert rows[0]["margin"] == pytest.approx(0, abs=1e-3)  # it starts as the reference
    assert rows[0]["error"] == rows[0]["ref_error"]
    assert rows[-1]["error"] != rows[-1]["ref_error"]
    # Held out are pairs.
    assert {"accuracy", "mse_w", "mse_l"} <= read_metrics(folder / "eval.jsonl")[-1].keys()
    assert (folder / "curves.png").stat().st_size > 10_000
    assert loss in (folder / "pipeline" / "README.md").read_text()
    assert unet_of(folder)


@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize("loss", ["kto", "rankdpo"])
def test_the_step_is_the_loss_by_hand(
    world: Path, groups: Path, tmp_path: Path, model: str, loss: str
) -> None:
    """The noise, timesteps, latents and conditions of a batch, put together one image at a time."""
    AcceleratorState._reset_state(reset_partial_state=True)
    flags = {"train_batch_size": 3, "beta": 10.0, **data_of(groups, loss)}
    args = parse_args(argv(world, tmp_path / "run", model, **flags))
    family = family_of({"model": model})
    accelerator, scheduler = start(args, family), load_scheduler(args, family)
    encoders = load_encoders(args, family, accelerator.device)
    data = load_data(
        args, family, accelerator, sizes_of(args, family), train_rows(args), None, encoders
    )
    collate = Collator(
        family, encoders.tokenizers, draws_of(family, scheduler, encoders, data.noises)
    )
    items = [data.train[0, index] for index in (5, 2, 7)]
    batch = collate(items)
    denoiser, frozen = (load_denoiser(args, family).requires_grad_(False) for _ in range(2))
    for parameter in denoiser.parameters():
        parameter.add_(0.01 * torch.randn(parameter.shape))
    models = Models(denoiser.eval(), encoders, scheduler, frozen.eval())
    objective = Objective(args, family, scheduler)
    out = training_step(family, models, objective, batch)

    # Prompt by prompt: item b's image j is row j * 3 + b of a batch, and row b * k + j of a list.
    k = len(batch["time_ids"]) // 3
    latents = latents_of(batch, encoders.vae)
    noise = repeated(batch["noise"], latents)
    text = family.encode_text(encoders.text_encoders, batch["input_ids"])
    predictions: list[list[torch.Tensor]] = [[], [], []]
    for b in range(3):
        for j in range(k):
            row = slice(j * 3 + b, j * 3 + b + 1)
            noisy, target = family.process.add_noise(
                latents[row], noise[row], batch["timesteps"][b : b + 1], scheduler
            )
            condition = family.condition(
                {name: values[b : b + 1] for name, values in text.items()}, batch["time_ids"][row]
            )
            for found, some in zip(predictions, (denoiser, frozen), strict=False):
                found.append(family.predict(some, noisy, batch["timesteps"][b : b + 1], condition))
            predictions[2].append(target)
    pred, ref, target = (torch.cat(each) for each in predictions)
    if loss == "kto":
        label = torch.tensor([item["label"] for item in items])
        wanted = fastpref.kto_loss(pred, target, ref, label, beta=10.0)
    else:
        score = torch.tensor([[item[f"score_{j}"] for j in range(k)] for item in items])
        assert k == 4
        assert score[0].tolist() != score[1].tolist()
        wanted = fastpref.rankdpo_loss(pred, target, ref, score, beta=10.0)
    torch.testing.assert_close(out.loss, wanted.loss, rtol=1e-4, atol=1e-6)
    assert isinstance(out, SampleOutput)
    torch.testing.assert_close(out.errors, wanted.errors, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(out.margin, wanted.margin, rtol=1e-3, atol=1e-4)
    assert out.margin.abs().max() > 1e-3


def test_by_prompt() -> None:
    values = torch.tensor([10, 20, 30, 11, 21, 31])  # of three lists of two
    assert by_prompt(values, 3).tolist() == [10, 11, 20, 21, 30, 31]


@pytest.mark.parametrize("loss", ["kto", "rankdpo"])
def test_a_resumed_run_equals_the_uninterrupted_one(train: Train, groups: Path, loss: str) -> None:
    flags = {**data_of(groups, loss), "max_train_steps": 6, "checkpointing_steps": 2,
             "gradient_accumulation_steps": 2, "random_crop": True}  # fmt: skip
    whole, parts = train("whole", **flags), train("parts", **flags)
    shutil.rmtree(parts / "pipeline")
    for checkpoint in list_checkpoints(parts)[1:]:
        os.replace(checkpoint, parts / f".tmp-{checkpoint.name}")
    train("parts", **flags, resume_from_checkpoint="latest")
    assert_same_weights(whole, parts)
    assert read_metrics(whole / "metrics.jsonl") == read_metrics(parts / "metrics.jsonl")


@pytest.mark.parametrize("loss", ["kto", "rankdpo"])
def test_cache_and_workers_change_nothing(
    train: Train, groups: Path, tmp_path: Path, loss: str
) -> None:
    flags = data_of(groups, loss)
    plain, cached = train("plain", **flags), train(
        "cached", **flags, latent_cache=tmp_path / "c", latent_cache_dtype="fp32",
        dataloader_num_workers=2,
    )  # fmt: skip
    for a, b in zip(*(read_metrics(f / "metrics.jsonl") for f in (plain, cached)), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize("loss", ["kto", "rankdpo"])
def test_adapters_compare_with_the_base(
    train: Train, world: Path, groups: Path, loss: str, model: str
) -> None:
    folder = train(model=model, lora_rank=2, **data_of(groups, loss), **seeing(world))
    rows = read_metrics(folder / "metrics.jsonl")
    assert rows[0]["margin"] == 0
    assert rows[-1]["error"] != rows[-1]["ref_error"]
    assert (folder / "validation" / "step-2.png").exists()


def test_pairs_train_by_the_same_losses(train: Train, world: Path) -> None:
    scores = {"score_columns": ("score_0", "score_1")}
    for loss, flags in (("kto", {}), ("tgo", {**scores, "label_threshold": 0.5}),
                        ("rankdpo", scores)):  # fmt: skip
        folder = train(loss, loss=loss, **flags, **seeing(world))
        assert read_metrics(folder / "eval.jsonl")[-1]["step"] == 3


def test_inversion_finds_the_noise_of_each_image(train: Train, groups: Path) -> None:
    flags = {"inversion": "ddim", "inversion_steps": 2, "max_train_steps": 1}
    for loss in ("kto", "rankdpo"):
        train(loss, **data_of(groups, loss), **flags)


def test_the_shares_of_either_kind_are_divided_out() -> None:
    row = {"step": 1, "desirable": 0.25, "drop_desirable": -0.5, "undesirable": 0.75,
           "drop_undesirable": 0.75}  # fmt: skip
    divide(row)
    assert row == {"step": 1, "drop_desirable": -2.0, "drop_undesirable": 1.0}
    alone = {"desirable": 0.0, "drop_desirable": 0.0, "undesirable": 1.0, "drop_undesirable": 2.0}
    divide(alone)
    assert alone == {"drop_undesirable": 2.0}
    rows = [
        {"margin": 0.1 * i, "accuracy": 0.5, "drop": -i, "drop_desirable": 1} for i in range(10)
    ]
    assert health_of(rows) == (
        "margin 0.05 -> 0.85, accuracy 0.5 -> 0.5, drop -0.5 -> -8.5, drop_desirable 1 -> 1"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"loss": "kto", "streaming": True},
            "--streaming came with --loss kto, which trains on sam",
        ),
        (
            {"loss": "rankdpo", "loser_caption_column": "b"},
            "--loser_caption_column came with --loss",
        ),
        ({"loss": "kto", "snr_gamma": 5.0}, "--snr_gamma came, but --loss kto does not take it"),
        (
            {"loss": "mapo", "list_size": 4},
            "--list_size came, but --loss mapo does not take it; ne",
        ),
        (
            {"loss": "mapo", "label_threshold": 4},
            "--label_threshold came, but --loss mapo does not",
        ),
        ({"loss": "rankdpo", "list_size": 17}, "--list_size is 17; need 2 to 16"),
        ({"loss": "tgo"}, "--loss tgo needs --label_threshold"),
        (
            {"loss": "kto", "score_columns": ("a",)},
            "--score_columns came without --label_threshold",
        ),
        ({"loss": "smpo", "score_columns": ("a",)}, r"--score_columns are \['a'\]; need two"),
        ({"loss": "kto", "utility": "joy"}, "--loss kto: utility is 'joy'; expected one of kto, l"),
        ({"loss": "kto", "beta": -1}, "--loss kto: beta is -1"),
        ({"loss": "rankdpo", "alpha": 1}, "--alpha came, but --loss rankdpo does not take it"),
    ],
)
def test_flags_that_cannot_mean_anything(
    world: Path, tmp_path: Path, flags: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        parse_args(argv(world, tmp_path, **flags))


def test_scores_are_checked_before_the_first_step(train: Train, groups: Path) -> None:
    rows = pq.read_table(groups / "lists.parquet").to_pylist()
    rows[3]["scores"][1] = 2.0
    pq.write_table(pa.Table.from_pylist(rows), groups / "wrong.parquet")
    flags = data_of(groups, "rankdpo") | {"dataset_split_name": "wrong"}
    with pytest.raises(ValueError, match="row 3, column score_1: it holds 2; --loss rankdpo needs"):
        train(**flags)
    train(**flags | {"loss": "plackett_luce"})


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["kto", pytest.param("rankdpo", marks=pytest.mark.slow)])
def test_the_demo_shows_them(tmp_path: Path, loss: str) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    flags = {"output_dir": tmp_path, "loss": loss, "train_pairs": 48, "heldout_pairs": 8,
             "vae_steps": 1, "base_steps": 1, "max_train_steps": 2}  # fmt: skip
    demo.main(demo.parse_args([word for k, v in flags.items() for word in (f"--{k}", str(v))]))
    table = (tmp_path / loss / "table.txt").read_text()
    assert demo.RECIPES[loss].title in table
    assert "shuffled labels" in table
    assert (tmp_path / loss / "grid.png").exists()
