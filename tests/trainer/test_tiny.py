"""The tiny pipelines: they save and load, generate, and tell prompts apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from toy.tiny import (
    T5_WIDTH,
    TEXT_WIDTH,
    TEXT_WIDTH_2,
    byte_tokenizer,
    letter_tokenizer,
    main,
    tiny_sd3,
    tiny_sd15,
    tiny_sdxl,
)

SMALL: dict[str, Any] = {"vae_channels": (8, 8), "sample_size": 8, "norm_num_groups": 4}
SMALL_UNET: dict[str, Any] = {"unet_channels": (8, 16), **SMALL}


def sd15() -> StableDiffusionPipeline:
    return tiny_sd15(**SMALL_UNET)


def sd2() -> StableDiffusionPipeline:
    return tiny_sd15(prediction_type="v_prediction", **SMALL_UNET)


def sdxl() -> StableDiffusionXLPipeline:
    return tiny_sdxl(**SMALL_UNET)


def sd3() -> StableDiffusion3Pipeline:
    return tiny_sd3(head_dim=4, **SMALL)


def sd35() -> StableDiffusion3Pipeline:
    return tiny_sd3(head_dim=4, qk_norm="rms_norm", dual_attention_layers=(0,), **SMALL)


families = pytest.mark.parametrize("build", [sd15, sd2, sdxl, sd3, sd35])


def picture(pipeline: Any, prompt: str = "a red fox", seed: int = 0) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(seed)
    side = 8 * pipeline.vae_scale_factor
    output = pipeline(prompt, num_inference_steps=2, generator=noise, height=side, width=side)
    return torch.tensor(list(output.images[0].tobytes()))


def models(pipeline: Any) -> dict[str, torch.nn.Module]:
    return {n: m for n, m in pipeline.components.items() if isinstance(m, torch.nn.Module)}


def settings(scheduler: Any) -> dict[str, Any]:
    return {name: v for name, v in scheduler.config.items() if not name.startswith("_")}


@families
def test_a_saved_pipeline_loads_the_same(build: Callable[[], Any], tmp_path: Path) -> None:
    pipeline = build()
    pipeline.save_pretrained(tmp_path)
    for loader in (type(pipeline), DiffusionPipeline):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is type(pipeline)
        assert models(loaded).keys() == models(pipeline).keys()
        for name, model in models(pipeline).items():
            states = model.state_dict(), models(loaded)[name].state_dict()
            assert states[0].keys() == states[1].keys()
            assert all(torch.equal(states[0][key], states[1][key]) for key in states[0]), name
        assert type(loaded.scheduler) is type(pipeline.scheduler)
        assert settings(loaded.scheduler) == settings(pipeline.scheduler)
    assert torch.equal(picture(pipeline), picture(loaded))


@families
def test_pictures_depend_on_the_seeds_and_the_prompt(build: Callable[[], Any]) -> None:
    first = picture(build())
    assert first.numel() == 3 * 16**2
    assert torch.equal(first, picture(build()))
    assert not torch.equal(first, picture(build(), seed=1))
    assert not torch.equal(first, picture(build(), prompt="a blue whale"))


@pytest.mark.parametrize("build", [tiny_sd15, tiny_sdxl, tiny_sd3])
def test_the_seed_draws_all_weights(build: Callable[..., Any]) -> None:
    same, again, other = (models(build(seed=seed)) for seed in (3, 3, 4))
    for name in same:
        states = [m[name].state_dict() for m in (same, again, other)]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        assert any(not torch.equal(states[0][key], states[2][key]) for key in states[0])


def test_prompts_have_embeddings_of_their_own() -> None:
    prompts = ["a red fox", "a red cat", "", "un café", "猫", "犬"]
    embeddings, *_ = sd15().encode_prompt(prompts, "cpu", 1, False)
    assert embeddings.shape == (6, 77, TEXT_WIDTH)
    assert len(embeddings.flatten(1).unique(dim=0)) == 6
    embeddings, _, pooled, _ = sdxl().encode_prompt(prompts, do_classifier_free_guidance=False)
    assert embeddings.shape == (6, 77, 2 * TEXT_WIDTH)
    assert len(pooled.unique(dim=0)) == len(embeddings.flatten(1).unique(dim=0)) == 6
    embeddings, _, pooled, _ = sd3().encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False
    )
    assert embeddings.shape == (6, 77 + 256, T5_WIDTH)
    assert pooled.shape == (6, TEXT_WIDTH + TEXT_WIDTH_2)
    assert len(pooled.unique(dim=0)) == len(embeddings.flatten(1).unique(dim=0)) == 6
    clip, t5 = embeddings.split([77, 256], dim=1)
    assert len(clip.flatten(1).unique(dim=0)) == 6
    assert len(t5.flatten(1).unique(dim=0)) == 5
    assert torch.equal(t5[4], t5[5])  # neither 猫 nor 犬 is an entry of T5's tokenizer
    width = TEXT_WIDTH + TEXT_WIDTH_2
    assert clip[..., width:].eq(0).all()
    assert clip[..., :width].ne(0).any()


@pytest.mark.parametrize("build", [byte_tokenizer, letter_tokenizer])
def test_any_text_encodes(build: Callable[[], Any], tmp_path: Path) -> None:
    tokenizer = build()
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert loaded.model_max_length == tokenizer.model_max_length
    texts = ["", " ", "a red fox", "Ärger, naïve: ½", "猫 🎨 \u200d\n\t", "\x00\x7f", "\U0010ffff"]
    for text in [*texts, "word " * 300]:
        ids = tokenizer(text, truncation=True, padding="max_length").input_ids
        assert len(ids) == tokenizer.model_max_length
        assert set(ids) <= set(range(len(tokenizer)))
        assert tokenizer.eos_token_id in ids
        assert loaded(text, truncation=True, padding="max_length").input_ids == ids
    assert tokenizer.decode(tokenizer("red foxes").input_ids, skip_special_tokens=True).strip() == (
        "red foxes"
    )


@pytest.mark.parametrize(
    ("flags", "kind", "prediction"),
    [
        ([], StableDiffusionXLPipeline, "epsilon"),
        (["--family", "sd15"], StableDiffusionPipeline, "epsilon"),
        (["--family", "sd15", "--prediction_type", "v_prediction"], StableDiffusionPipeline,
         "v_prediction"),
        (["--family", "sd3"], StableDiffusion3Pipeline, None),
    ],
)  # fmt: skip
def test_the_command_saves_a_pipeline(
    flags: list[str], kind: Any, prediction: str | None, tmp_path: Path, capsys: Any
) -> None:
    main([str(tmp_path), *flags])
    assert "parameters" in capsys.readouterr().out
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is kind
    assert loaded.scheduler.config.get("prediction_type") == prediction


def test_the_command_refuses_a_prediction_of_sd3(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--family", "sd3", "--prediction_type", "epsilon"])
    assert "--prediction_type: epsilon, but sd3 has none" in capsys.readouterr().err
