"""What a run left is shown beside its base, and told on a model card that markdown cannot break."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

import huggingface_hub
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image

import generate
from curves import append_metrics
from lora_files import LORA_FILE
from model_card import push, shown, write_card
from tiny_sdxl import tiny_sdxl

PROMPTS = ["a cat", "a dog"]
Generate = Callable[..., dict[str, list[Image.Image]]]


def spoil(model: Any, by: float) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator)


def save_lora(base: Path, folder: Path, *names: str) -> None:
    """Random adapters of these parts of the pipeline, saved as the trainer does."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(base, add_watermarker=False)
    layers = {}
    for name in names:
        part = getattr(pipeline, name)
        targets = ["to_q", "to_v"] if name == "unet" else ["q_proj", "v_proj"]
        part.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=targets))
        spoil(part, 0.3)
        state = convert_state_dict_to_diffusers(get_peft_model_state_dict(part))
        layers[f"{name}_lora_layers"] = state
    StableDiffusionXLPipeline.save_lora_weights(folder, **layers)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and what runs upon it may leave."""
    folder = tmp_path_factory.mktemp("world")
    pipeline = tiny_sdxl((8, 16), (8, 8), sample_size=8, norm_num_groups=4)
    pipeline.save_pretrained(folder / "base")
    save_lora(folder / "base", folder / "lora", "unet")
    save_lora(folder / "base", folder / "lora_text", "unet", "text_encoder", "text_encoder_2")
    spoil(pipeline.unet, 0.1)
    pipeline.save_pretrained(folder / "full" / "pipeline")
    shutil.copytree(folder / "full" / "pipeline" / "unet", folder / "alone")
    pipeline.scheduler.register_to_config(prediction_type="v_prediction")
    pipeline.save_pretrained(folder / "v" / "pipeline")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


@pytest.fixture
def run(world: Path, tmp_path: Path) -> Generate:
    def pictures(trained: str, *flags: str) -> dict[str, list[Image.Image]]:
        words = ["--pretrained_model_name_or_path", str(world / "base")]
        words += ["--trained", str(world / trained), "--prompts", str(world / "prompts.txt")]
        words += ["--output", str(tmp_path / "grid.png"), "--images_dir", str(tmp_path / "single")]
        words += ["--num_inference_steps", "2", "--height", "16", "--width", "16", "--seed", "3"]
        generate.main(generate.parse_args([*words, *flags]))
        assert Image.open(tmp_path / "grid.png").width > 2 * 480
        return {
            name: [Image.open(tmp_path / "single" / f"{i:03}-{name}.png") for i in range(2)]
            for name in ("base", "trained")
        }

    return pictures


def own_pictures(pipeline: StableDiffusionXLPipeline) -> list[Image.Image]:
    pipeline.set_progress_bar_config(disable=True)
    return [
        pipeline(
            prompt, height=16, width=16, num_inference_steps=2,
            generator=torch.Generator().manual_seed(3 + i),
        ).images[0]
        for i, prompt in enumerate(PROMPTS)
    ]  # fmt: skip


def difference(found: list[Image.Image], expected: list[Image.Image]) -> int:
    pairs = zip(found, expected, strict=True)
    return max(np.abs(np.asarray(a, int) - np.asarray(b, int)).max() for a, b in pairs)


@pytest.mark.parametrize("trained", ["lora", "lora_text", "full", "alone", "v", "v/pipeline"])
def test_the_base_and_what_was_trained_are_painted_as_diffusers_does(
    world: Path, run: Generate, trained: str
) -> None:
    found = run(trained)
    base = StableDiffusionXLPipeline.from_pretrained(world / "base", add_watermarker=False)
    assert difference(found["base"], own_pictures(base)) == 0
    if trained.startswith("lora"):
        base.load_lora_weights(world / trained, weight_name=LORA_FILE)
        expected = base
    else:
        folder = world / ("v" if trained.startswith("v") else "full") / "pipeline"
        expected = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    assert difference(found["trained"], own_pictures(expected)) <= 1
    assert difference(found["trained"], found["base"]) > 3


def test_half_precision_and_another_vae(world: Path, run: Generate) -> None:
    vae = str(world / "full" / "pipeline" / "vae")
    found = run("lora", "--mixed_precision", "bf16", "--pretrained_vae_model_name_or_path", vae)
    base = StableDiffusionXLPipeline.from_pretrained(world / "base", add_watermarker=False)
    assert 0 < difference(found["base"], own_pictures(base)) < 40


def test_clear_errors(world: Path, run: Generate, tmp_path: Path) -> None:
    for folder, message in (("nowhere", "holds nothing"), ("base/vae", r"holds config\.json")):
        with pytest.raises(ValueError, match=rf"{message}.*; need {LORA_FILE}, pipeline/ or a"):
            run(folder)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        run("lora", "--prompts", str(tmp_path / "empty.txt"))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="fp16 on a machine without a GPU"):
            run("lora", "--mixed_precision", "fp16")


def card_of(folder: Path, **changes: Any) -> str:
    settings: dict[str, Any] = {
        "base_model": "someone/sdxl", "dataset": "someone/pairs", "loss": "mapo",
        "settings": {"learning_rate": 1e-5}, "metrics_path": folder / "metrics.jsonl",
        "pictures": [], "lora": True,
    }  # fmt: skip
    return write_card(folder, **settings | changes).read_text()


def test_a_card_says_what_was_done_and_what_came_out(tmp_path: Path) -> None:
    folder, run = tmp_path / "run", tmp_path / "elsewhere"
    folder.mkdir()
    append_metrics(folder / "metrics.jsonl", [{"step": 1, "loss": 9.0}, {"step": 2, "loss": 0.25}])
    append_metrics(folder / "eval.jsonl", [{"step": 2, "accuracy_ref": 0.625}])
    pictures = [folder / "curves.png"]
    for place in (run / "step 500", run / "step 1000"):
        place.mkdir(parents=True)
        pictures.append(place / "grid.png")
    for i, picture in enumerate(pictures):
        Image.new("RGB", (2, 2), (i, 0, 0)).save(picture)
    pictures.append(run / "never.png")
    text = card_of(
        folder, heldout_path=folder / "eval.jsonl", pictures=pictures, tags=["pickapic"],
        repo_id="me/mine",
    )  # fmt: skip
    data = ModelCard(text).data.to_dict()
    assert (data["base_model"], data["datasets"]) == ("someone/sdxl", ["someone/pairs"])
    assert (data["library_name"], data["pipeline_tag"]) == ("diffusers", "text-to-image")
    assert {"text-to-image", "stable-diffusion-xl", "fastpref", "mapo", "lora", "pickapic"} == {
        *data["tags"]
    }
    assert "license" not in data
    for line in ("| loss | 0.25 |", r"| accuracy\_ref | 0.625 |", r"| learning\_rate | 1e-05 |"):
        assert line in text.splitlines()
    assert "9" not in text.split("## Last step")[1].split("##")[0]
    for name in ("curves.png", "grid.png", "step%201000-grid.png"):
        assert f"]({name})" in text
        assert (folder / name.replace("%20", " ")).is_file()
    assert Image.open(folder / "step 1000-grid.png").getpixel((0, 0)) == (2, 0, 0)
    assert "never" not in text
    assert 'pipeline.load_lora_weights("me/mine")' in text
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "curves.png", "eval.jsonl", "grid.png", "metrics.jsonl",
        "step 1000-grid.png",
    ]  # fmt: skip


def test_a_pipelines_card_opens_the_pipeline_and_tells_no_folder(tmp_path: Path) -> None:
    local = tmp_path / "private" / "base"
    local.mkdir(parents=True)
    settings = {
        "output_dir": tmp_path, "hub_token": "secret", "lora_rank": None, "latent_cache": str(local)
    }  # fmt: skip
    text = card_of(
        tmp_path, lora=False, base_model=str(local), dataset=str(local), settings=settings,
        license="openrail++",
    )  # fmt: skip
    data = ModelCard(text).data.to_dict()
    assert not {"base_model", "datasets"} & data.keys()
    assert data["license"] == "openrail++"
    assert "lora" not in text
    assert f'from_pretrained(\n    "{tmp_path.name}"' in text
    assert r"| latent\_cache | base |" in text
    for word in ("private", "secret", "output"):
        assert word not in text


def test_nothing_in_a_cell_breaks_the_table(tmp_path: Path) -> None:
    prompts = ["a | b\nnext", "<script>`*_[x](y)"]
    text = card_of(tmp_path, settings={"validation_prompts": prompts})
    (line,) = [line for line in text.splitlines() if "next" in line]
    assert line.replace(r"\|", "").count("|") == 3
    assert r"a \| b<br>next, \<script\>\`\*\_\[x\](y)" in line
    assert shown(0.1 + 0.2) == "0.3"
    assert shown(True) == "True"


def test_a_push_leaves_the_run_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    class Url(str):
        repo_id = "me/mine"

    def create_repo(repo_id: str, **arguments: Any) -> Url:
        calls.append((repo_id, arguments))
        return Url("https://hub/me/mine")

    def upload_folder(**arguments: Any) -> SimpleNamespace:
        calls.append(("upload", arguments))
        return SimpleNamespace()

    monkeypatch.setattr(huggingface_hub, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    assert push(tmp_path, "mine", token="t", private=True) == "https://hub/me/mine"
    (name, created), (_, uploaded) = calls
    assert name == "mine"
    assert created == {"token": "t", "private": True, "exist_ok": True}
    assert uploaded["repo_id"] == "me/mine"
    assert uploaded["folder_path"] == tmp_path
    paths = ["README.md", LORA_FILE, "validation/step-500.png", "unet/config.json"]
    # The last names files of one's own disk.
    left = ["checkpoint-5/unet.bin", "logs/x/events", ".tmp-a/b", "refused.txt"]
    kept = filter_repo_objects([*paths, *left], ignore_patterns=uploaded["ignore_patterns"])
    assert list(kept) == paths
