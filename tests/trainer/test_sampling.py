"""The sampler's pictures are those of diffusers' own pipeline, and a grid shows which is which."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from PIL import Image

from toy.tiny import tiny_sdxl
from trainer.args import read_prompts
from trainer.families.family import Encoders
from trainer.families.sdxl import SDXL
from trainer.plots import font, wrap, write_grid
from trainer.sampling import PromptSampler

PROMPTS = ["a cat", "a photograph of a dog"]
Load = Callable[[], StableDiffusionXLPipeline]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    folder = tmp_path_factory.mktemp("model")
    tiny_sdxl((8, 16), (8, 8), sample_size=8, norm_num_groups=4).save_pretrained(folder)

    def fresh() -> StableDiffusionXLPipeline:
        pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return fresh


def sampler_of(pipeline: StableDiffusionXLPipeline, **settings: Any) -> PromptSampler:
    encoders = Encoders(
        pipeline.vae,
        [pipeline.tokenizer, pipeline.tokenizer_2],
        [pipeline.text_encoder, pipeline.text_encoder_2],
    )
    defaults: dict[str, Any] = {
        "prompts": PROMPTS, "height": 16, "width": 24, "steps": 3, "guidance_scale": 4.0,
        "seed": 5, "load_vae": lambda: pipeline.vae,
    }  # fmt: skip
    return PromptSampler(SDXL, encoders=encoders, device=torch.device("cpu"), **defaults | settings)


def assert_same(found: list[Image.Image], expected: list[Image.Image], within: int = 0) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.size == b.size
        assert np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max() <= within


def own_pictures(pipeline: StableDiffusionXLPipeline, guidance: float = 4.0) -> list[Image.Image]:
    return [
        pipeline(
            prompt, height=16, width=24, num_inference_steps=3, guidance_scale=guidance,
            generator=torch.Generator().manual_seed(5 + i),
        ).images[0]
        for i, prompt in enumerate(PROMPTS)
    ]  # fmt: skip


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_pictures_are_those_of_the_pipeline(load: Load, guidance: float) -> None:
    pipeline = load()
    sampler = sampler_of(pipeline, guidance_scale=guidance)
    found = sampler.sample(pipeline.unet, pipeline.scheduler)
    assert_same(found, own_pictures(pipeline, guidance))
    assert found[0].size == (24, 16)
    assert found[0].tobytes() != found[1].tobytes()


def test_of_a_config_sdxls_own_sampler_is_made(load: Load) -> None:
    pipeline = load()
    found = sampler_of(pipeline).sample(pipeline.unet, pipeline.scheduler.config)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    assert_same(found, own_pictures(pipeline))


def test_sampling_leaves_no_trace_and_needs_no_encoders(load: Load) -> None:
    pipeline = load()
    vaes: list[weakref.ref[Any]] = []

    def load_vae() -> Any:
        vae = load().vae.to(torch.bfloat16)
        vaes.append(weakref.ref(vae))
        return vae

    expected = own_pictures(load())
    sampler = sampler_of(pipeline, load_vae=load_vae)
    unet, scheduler = pipeline.unet.train(), pipeline.scheduler
    timesteps = scheduler.timesteps
    del pipeline
    gc.collect()
    unet.mid_block.eval()
    modes = [module.training for module in unet.modules()]
    rng = torch.get_rng_state()
    first, second = sampler.sample(unet, scheduler), sampler.sample(unet, scheduler)
    assert_same(first, expected, within=2)  # the VAE has been through bf16
    assert_same(second, first)
    gc.collect()
    assert len(vaes) == 2
    assert all(vae() is None for vae in vaes)
    assert [module.training for module in unet.modules()] == modes
    assert torch.get_rng_state().equal(rng)
    assert scheduler.timesteps is timesteps
    assert scheduler.num_inference_steps is None


def test_half_precision_by_autocast_or_by_weights(load: Load) -> None:
    pipeline = load()
    expected = sampler_of(pipeline).sample(pipeline.unet, pipeline.scheduler)
    by_autocast = sampler_of(
        pipeline, autocast=lambda: torch.autocast("cpu", torch.bfloat16)
    ).sample(pipeline.unet, pipeline.scheduler)
    by_weights = sampler_of(pipeline).sample(pipeline.unet.to(torch.bfloat16), pipeline.scheduler)
    for found in (by_autocast, by_weights):
        difference = np.abs(np.asarray(found[0], float) - np.asarray(expected[0], float))
        assert difference.max() > 0
        assert difference.mean() < 8


def test_text_encoders_that_learn_embed_anew(load: Load) -> None:
    pipeline = load()
    sampler = sampler_of(pipeline)
    learning = [pipeline.text_encoder, pipeline.text_encoder_2]
    before = sampler.sample(pipeline.unet, pipeline.scheduler)
    assert_same(sampler.sample(pipeline.unet, pipeline.scheduler, learning), before)
    with torch.no_grad():
        for parameter in pipeline.text_encoder_2.parameters():
            parameter += 0.5
    assert_same(sampler.sample(pipeline.unet, pipeline.scheduler), before)
    after = sampler.sample(pipeline.unet, pipeline.scheduler, learning)
    assert_same(after, own_pictures(pipeline))
    assert after[0].tobytes() != before[0].tobytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": []}, "prompts is empty; need one or more"),
        ({"height": 20}, "height is 20, width 24 and steps 3; need multiples of 8"),
        ({"steps": 0}, "steps 0; need .* a step or more"),
    ],
)
def test_clear_errors(load: Load, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler_of(load(), **settings)


def test_prompts_are_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  кошка, 猫 \n", encoding="utf-8")
    assert read_prompts(path) == ["a cat", "кошка, 猫"]
    path.write_text("\n \n")
    with pytest.raises(ValueError, match=r"prompts\.txt holds no prompt; need one a line"):
        read_prompts(path)


def test_text_is_wrapped_where_it_can_be_read() -> None:
    text = "a photograph of a cat " * 5 + "x" * 60
    lines = wrap(text, 120, 14)
    assert all(font(14).getlength(line) <= 120 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert len(lines) > 5
    assert wrap("", 120, 14) == [""]


def test_a_grid_has_a_row_for_each_prompt_and_a_column_for_each_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plain(color: str, size: tuple[int, int] = (16, 16)) -> Image.Image:
        return Image.new("RGB", size, color)

    columns = {
        "base": [plain("red"), plain("green", (600, 300))],
        "step 500": [plain("blue"), plain("yellow")],
    }
    path = tmp_path / "new" / "grid.png"
    write_grid(columns, ["a | cat", "word " * 300], path, side=100)
    assert [file.name for file in path.parent.iterdir()] == ["grid.png"]
    grid = np.asarray(Image.open(path))
    places = {}
    # 96 is six times 16: whole pixels; 600 x 300 is reduced to 100 x 50.
    for color, height, width in (
        ((255, 0, 0), 96, 96), ((0, 0, 255), 96, 96), ((0, 128, 0), 50, 100),
        ((255, 255, 0), 96, 96),
    ):  # fmt: skip
        y, x = np.nonzero((grid == color).all(axis=-1))
        assert [int(np.ptp(y)) + 1, int(np.ptp(x)) + 1] == [height, width]
        assert len(y) == height * width
        places[color] = y.min(), x.min()
    red, blue, green, yellow = places.values()
    assert red[0] == blue[0] < green[0] == yellow[0]
    assert abs(int(red[1]) - int(green[1])) <= 2 < blue[1] - red[1]
    for top, left, bottom, right in ((0, blue[1], blue[0], None), (red[0], 0, green[0], 220)):
        assert (grid[top:bottom, left:right] < 128).any()  # its name, its prompt

    with pytest.raises(ValueError, match="column 'base' has 2 images; need 1, one a prompt"):
        write_grid(columns, ["one"], path)
    with pytest.raises(ValueError, match="0 columns of 2 prompts"):
        write_grid({}, PROMPTS, path)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_grid({"base": [plain("red")]}, ["one"], path)
    assert path.read_bytes() == before
