"""Held-out scores are the model's alone: not of batches, processes, or what else is going on."""

from __future__ import annotations

import math
import os
import socket
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from matplotlib.figure import Figure
from torch.multiprocessing.spawn import start_processes

import forked
from toy.photo_pairs import write_photo_pairs
from toy.tiny import tiny_sdxl
from trainer import plots
from trainer.evaluate import HeldOut, Scores, fixed_noise, score_pairs
from trainer.families.family import Encoders, encoders_of
from trainer.families.sdxl import SDXL
from trainer.families.vae import encode_images
from trainer.metrics import append_metrics
from trainer.plots import plot_curves
from trainer.step import Models

SHAPES = [(16, 16), (16, 24), (16, 16), (24, 16), (16, 24)]


class Shapes:
    """Five pairs of noise in three shapes, with a caption each, or two."""

    def __init__(self, loser_captions: bool = False) -> None:
        self.loser_captions = loser_captions

    def __len__(self) -> int:
        return len(SHAPES)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        assert epoch == 0
        height, width = SHAPES[index]
        generator = torch.Generator().manual_seed(index)
        pair: dict[str, Any] = {"seed": index, "refused": ["row 3: broken"] if index == 3 else []}
        for side in "wl":
            pair[f"pixels_{side}"] = 2 * torch.rand(3, height, width, generator=generator) - 1
            pair[f"time_ids_{side}"] = torch.tensor([height, width, 0, 0, height, width])
        captions = [f"picture {index}", f"other {index}"]
        pair["captions"] = captions if self.loser_captions else captions[:1]
        return pair


def tiny(prediction_type: str = "epsilon") -> StableDiffusionXLPipeline:
    return tiny_sdxl(
        (8, 16), (8, 8), sample_size=8, prediction_type=prediction_type, norm_num_groups=4
    )


def models_of(pipeline: StableDiffusionXLPipeline, **others: Any) -> Models:
    pipeline.vae.requires_grad_(False)
    pipeline.text_encoder.eval()
    pipeline.text_encoder_2.eval()
    return Models(pipeline.unet, encoders_of(SDXL, pipeline), pipeline.scheduler, **others)


def hold_out(
    pipeline: StableDiffusionXLPipeline, pairs: Any = None, batch_size: int = 2, **settings: Any
) -> HeldOut:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    pairs = Shapes() if pairs is None else pairs
    encoders = models_of(pipeline).encoders
    return HeldOut(SDXL, pairs, encoders, accelerator, batch_size, **settings)


def assert_close(found: Scores, expected: Scores) -> None:
    # A margin is a difference of errors times beta and 1000 timesteps.
    for name, atol in (("mse_w", 1e-5), ("mse_l", 1e-5), ("margin", 1e-3)):
        a, b = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("loser_captions", [False, True])
def test_a_score_is_the_error_of_one_pair_at_its_own_noise(
    prediction_type: str, loser_captions: bool
) -> None:
    pipeline, pairs = tiny(prediction_type), Shapes(loser_captions)
    scores = hold_out(pipeline, pairs, draws=3, seed=7).score(models_of(pipeline))
    assert scores.mse_w.shape == (5, 3)
    encoders, scheduler = models_of(pipeline).encoders, pipeline.scheduler
    for index, draw in ((0, 0), (3, 2), (4, 1)):
        pair = pairs[0, index]
        for side, name in (("w", "mse_w"), ("l", "mse_l")):
            with torch.no_grad():
                x, _ = encode_images(encoders.vae, pair[f"pixels_{side}"][None])
                caption = pair["captions"][-1 if side == "l" else 0]
                ids = SDXL.tokenize(encoders.tokenizers, [caption])
                text = SDXL.encode_text(encoders.text_encoders, ids)
                noise = fixed_noise(7, index, draw, x.shape[1:])[None]
                timestep = torch.tensor([(2 * draw + 1) * 1000 // 6])
                target = noise
                if prediction_type == "v_prediction":
                    target = scheduler.get_velocity(x, noise, timestep)
                condition = {
                    "text_embeds": text["pooled"],
                    "time_ids": pair[f"time_ids_{side}"][None],
                }
                prediction = pipeline.unet(
                    scheduler.add_noise(x, noise, timestep), timestep, text["prompts"],
                    added_cond_kwargs=condition,
                ).sample  # fmt: skip
            expected = (prediction - target).square().mean().item()
            assert getattr(scores, name)[index, draw].item() == pytest.approx(expected, rel=1e-4)


def test_batches_do_not_change_scores_but_seeds_do() -> None:
    pipeline = tiny()
    one, three = (hold_out(pipeline, batch_size=n).score(models_of(pipeline)) for n in (1, 3))
    assert_close(three, one)
    assert not hold_out(pipeline, seed=1).score(models_of(pipeline)).mse_w.allclose(one.mse_w)
    assert len({tuple(row) for row in one.mse_w.tolist()}) == 5
    noise = [fixed_noise(*key, torch.Size([8])) for key in ((0, 0, 0), (0, 0, 1), (0, 1, 0))]
    assert len({tuple(values.tolist()) for values in noise}) == 3


def test_scoring_leaves_no_trace() -> None:
    pipeline = tiny()
    unet = pipeline.unet.train()
    unet.mid_block.eval()
    unet.conv_out = torch.nn.Sequential(torch.nn.Dropout(0.5), unet.conv_out)
    modes = [module.training for module in unet.modules()]
    rng = torch.get_rng_state()
    held = hold_out(pipeline)
    scores = held.score(models_of(pipeline))
    assert torch.get_rng_state().equal(rng)
    assert [module.training for module in unet.modules()] == modes
    assert all(parameter.grad is None for parameter in unet.parameters())
    assert not scores.mse_w.requires_grad
    assert held.score(models_of(pipeline)).mse_w.equal(scores.mse_w)  # no dropout
    assert held.refused == ["row 3: broken"]
    unet.conv_out[0].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        held.score(models_of(pipeline))
    assert [module.training for module in unet.modules()] == modes


class Cached(Shapes):
    """The same pairs as a cache has them: moments and prompts, no pixels."""

    def __init__(self, encoders: Encoders) -> None:
        super().__init__()
        self.encoders = encoders

    @torch.no_grad()
    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        pair = super().__getitem__(key)
        for side in "wl":
            mean, std = encode_images(self.encoders.vae, pair.pop(f"pixels_{side}")[None])
            pair |= {f"mean_{side}": mean[0], f"std_{side}": std[0]}
        ids = SDXL.tokenize(self.encoders.tokenizers, pair["captions"])
        text = SDXL.encode_text(self.encoders.text_encoders, ids)
        each = zip(*text.values(), strict=True)
        return pair | {"text": [dict(zip(text, values, strict=True)) for values in each]}


def test_pairs_from_a_cache_need_no_encoders() -> None:
    pipeline = tiny()
    expected = hold_out(pipeline).score(models_of(pipeline))
    pairs, accelerator = Cached(models_of(pipeline).encoders), Accelerator(cpu=True)
    nothing: Any = (None, [], [])
    held = HeldOut(SDXL, pairs, Encoders(*nothing), accelerator, 2)
    assert_close(held.score(models_of(pipeline)), expected)
    with pytest.raises(ValueError, match="text encoders learn, but captions are from a cache"):
        held.score(models_of(pipeline, text_learns=True))


def test_text_encoders_that_learn_encode_anew() -> None:
    pipeline = tiny()
    held, learning = hold_out(pipeline), models_of(pipeline, text_learns=True)
    before = held.score(models_of(pipeline))
    assert_close(held.score(learning), before)
    with torch.no_grad():
        for parameter in pipeline.text_encoder.parameters():
            parameter += 0.3
    assert_close(held.score(models_of(pipeline)), before)
    assert not held.score(learning).mse_w.allclose(before.mse_w, rtol=1e-4)


def score_in_a_process(rank: int, port: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    pipeline = tiny()
    held = hold_out(pipeline)
    assert held.accelerator.num_processes == 2
    assert len(held.encoded) == (3, 2)[rank]
    models = models_of(pipeline)._replace(denoiser=held.accelerator.prepare(pipeline.unet))
    torch.save(astuple(held.score(models)), folder / f"{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # to destroy a gloo group joins its threads, one of which may wait for the GIL


@pytest.mark.slow
def test_two_processes_score_as_one(tmp_path: Path) -> None:
    pipeline = tiny()
    expected = hold_out(pipeline).score(models_of(pipeline))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    forked.serve()
    start_processes(score_in_a_process, (port, tmp_path), nprocs=2, start_method="forkserver")
    for rank in range(2):
        assert_close(Scores(*torch.load(tmp_path / f"{rank}.pt")), expected)


def test_a_row_says_what_changed_since_the_base() -> None:
    base = Scores(
        torch.tensor([[1.0, 1.0], [1.0, 1.0]]), torch.tensor([[2.0, 2.0], [0.5, 0.5]]),
        torch.zeros(2, 2),
    )  # fmt: skip
    scores = Scores(
        torch.tensor([[0.5, 1.0], [0.75, 0.75]]), torch.tensor([[2.0, 2.0], [0.75, 0.25]]),
        torch.zeros(2, 2),
    )  # fmt: skip
    row = HeldOut.row(scores, base)
    assert row["accuracy"] == pytest.approx((1 + 1 + 0.5 + 0) / 4)
    # Fell by (.5, 0) and (.25, .25) on winners, by (0, 0) and (-.25, .25) on losers.
    assert row["accuracy_ref"] == pytest.approx((1 + 0.5 + 1 + 0.5) / 4)
    assert row["drop_w"] == pytest.approx(-0.25)
    assert row["drop_l"] == pytest.approx(0.0)
    assert (row["mse_w"], row["mse_l"]) == pytest.approx((0.75, 1.25))
    assert row["accuracy_se"] == pytest.approx(0.75 / math.sqrt(2) / math.sqrt(2))
    assert row["accuracy_ref_se"] == 0
    same = HeldOut.row(base, base)
    assert (same["accuracy_ref"], same["drop_w"]) == (0.5, 0)
    assert all(math.isfinite(value) for value in row.values())


@pytest.mark.parametrize(
    ("pairs", "settings", "message"),
    [
        ([{}], {}, "held out are 1 pairs; need at least 2"),
        (None, {"draws": 0}, "draws 0; need 1 or more"),
        (None, {"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_clear_errors(pairs: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hold_out(tiny(), pairs, **settings)


def test_a_pipeline_scores_rows(tmp_path: Path) -> None:
    write_photo_pairs(tmp_path, train=1, heldout=8, size=24)
    rows = Dataset.from_parquet(str(tmp_path / "heldout.parquet"), cache_dir=str(tmp_path))
    pipeline = tiny()
    scores = score_pairs(SDXL, pipeline, rows, 16, draws=3, batch_size=8)
    assert scores.mse_w.shape == (8, 3)
    assert score_pairs(SDXL, pipeline, rows, 16, draws=3, batch_size=8).mse_w.equal(scores.mse_w)
    assert ((scores.margin > 0) == (scores.mse_w < scores.mse_l)).all()
    accuracy, error = scores.summary()["accuracy"]
    assert 0 <= accuracy <= 1
    assert error >= 0
    assert scores.gain(scores) == (0, 0)
    assert isinstance(pipeline.scheduler, DDPMScheduler)


def test_curves_show_held_out_pairs_as_dots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    save = plots.save_figure

    def spy(figure: Figure, picture: Path) -> None:
        figures.append(figure)
        save(figure, picture)

    monkeypatch.setattr(plots, "save_figure", spy)
    metrics, heldout = tmp_path / "metrics.jsonl", tmp_path / "eval.jsonl"
    names = ("loss", "mse_w", "mse_l", "margin", "accuracy")
    append_metrics(metrics, [{"step": step} | dict.fromkeys(names, 0.5) for step in (1, 2, 3)])
    for path in (None, heldout):  # no such file yet
        plot_curves(metrics, tmp_path / "curves.png", heldout=path)
    row = {"accuracy": 0.6, "accuracy_se": 0.1, "accuracy_ref": 0.5, "mse_w": 0.2, "mse_l": 0.3}
    append_metrics(heldout, [{"step": 0} | row, {"step": 3} | row | {"accuracy": 0.7}])
    plot_curves(metrics, tmp_path / "curves.png", heldout=heldout)
    plain, empty, drawn = ([a.get_legend_handles_labels()[1] for a in f.axes] for f in figures)
    assert plain == empty
    assert [len(labels) for labels in drawn] == [len(plain[0]), len(plain[1]) + 2, 1, 3]
    (accuracy,) = [c for c in figures[2].axes[3].containers if "mse_w" in str(c.get_label())]
    assert accuracy[0].get_xydata().tolist() == [[0, 0.6], [3, 0.7]]
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "curves.png", "eval.jsonl", "metrics.jsonl",
    ]  # fmt: skip
