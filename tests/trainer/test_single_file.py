"""One-file checkpoints: they load back to the bit, and what is none is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel

from small_run import Train, assert_same_weights, unet_of
from toy.tiny import tiny_sd15, tiny_sdxl
from trainer import generate
from trainer.families.all import FAMILIES
from trainer.families.sdxl import SDXL
from trainer.single_file import load_single_file, load_single_vae, write_single_file

SMALL: dict[str, Any] = {
    "unet_channels": (8, 16, 16), "vae_channels": (8, 16), "sample_size": 8, "norm_num_groups": 4,
}  # fmt: skip
CLASSES = {
    "sd15": StableDiffusionPipeline,
    "sd2": StableDiffusionPipeline,
    "sdxl": StableDiffusionXLPipeline,
}
families = pytest.mark.parametrize("family", list(CLASSES))
World = dict[str, tuple[Any, Path, Path]]


def tiny(family: str) -> Any:
    if family == "sdxl":
        return tiny_sdxl(**SMALL)
    pipeline = tiny_sd15(**SMALL)
    if family == "sd2":  # whose text encoder is OpenCLIP's, and which predicts v
        pipeline.text_encoder.config.hidden_act = "gelu"
        pipeline.text_encoder = CLIPTextModel(pipeline.text_encoder.config)
        pipeline.scheduler.register_to_config(prediction_type="v_prediction")
    return pipeline


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Of each family: a pipeline, its checkpoint, and a folder of its configurations alone."""
    os.umask(umask := os.umask(0o022))
    folder = tmp_path_factory.mktemp("files")
    found = {}
    for family in CLASSES:
        pipeline, path = tiny(family), folder / f"{family}.safetensors"
        pipeline.save_pretrained(folder / family)
        for weights in (folder / family).rglob("*.safetensors"):
            weights.unlink()
        write_single_file(pipeline, path)
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask
        found[family] = (pipeline, path, folder / family)
    return found


def models(pipeline: Any) -> dict[str, torch.nn.Module]:
    return {n: m for n, m in pipeline.components.items() if isinstance(m, torch.nn.Module)}


def assert_same(loaded: torch.nn.Module, model: torch.nn.Module) -> None:
    states = loaded.state_dict(), model.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, value in states[1].items():
        assert states[0][name].dtype == value.dtype
        assert torch.equal(states[0][name], value), name


def picture(pipeline: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    output = pipeline("a red fox", num_inference_steps=2, generator=noise, height=16, width=16)
    return torch.tensor(list(output.images[0].tobytes()))


@families
def test_a_file_loads_to_the_bit(family: str, files: World) -> None:
    pipeline, path, config = files[family]
    loaded = load_single_file(CLASSES[family], path, config)
    assert type(loaded) is CLASSES[family]
    assert models(loaded).keys() == models(pipeline).keys()
    for name, model in models(pipeline).items():
        assert_same(models(loaded)[name], model)
        assert not models(loaded)[name].training
    assert loaded.scheduler.config.prediction_type == pipeline.scheduler.config.prediction_type
    assert torch.equal(picture(loaded), picture(pipeline))


@families
def test_equal_weights_give_equal_bytes(family: str, files: World, tmp_path: Path) -> None:
    _, path, _ = files[family]
    again = tmp_path / "again.safetensors"
    write_single_file(tiny(family), again)
    assert again.read_bytes() == path.read_bytes()
    assert list(tmp_path.iterdir()) == [again]


@families
def test_a_file_in_half_precision(family: str, files: World, tmp_path: Path) -> None:
    pipeline, _, config = files[family]
    path = tmp_path / "half.safetensors"
    write_single_file(pipeline, path, torch.float16, {"title": "a test"})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "title": "a test"}
    kinds = {name: value.dtype for name, value in load_file(path).items()}
    whole = {name for name, dtype in kinds.items() if dtype != torch.float16}
    assert all(name.endswith("position_ids") for name in whole)
    half = load_single_file(CLASSES[family], path, config, torch.float16)
    full = load_single_file(CLASSES[family], path, config)
    for name, model in models(tiny(family)).items():
        assert_same(models(half)[name], model.half())
        assert_same(models(full)[name], model.float())


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_vae_alone(family: str, prefix: str, files: World, tmp_path: Path) -> None:
    pipeline, path, config = files[family]
    begin = "first_stage_model."
    tensors = {
        prefix + name.removeprefix(begin): value
        for name, value in load_file(path).items()
        if name.startswith(begin)
    }
    save_file(tensors, tmp_path / "vae.safetensors")
    for file in (tmp_path / "vae.safetensors", path):
        vae = load_single_vae(file, config)
        assert_same(vae, pipeline.vae)
        assert vae.config.scaling_factor == pipeline.vae.config.scaling_factor
    half = load_single_vae(path, config, torch.float16)
    assert half.dtype == torch.float16


def test_a_config_with_a_safety_checker(files: World, tmp_path: Path) -> None:
    _, path, config = files["sd15"]
    shutil.copytree(config, folder := tmp_path / "config")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index |= {"feature_extractor": ["transformers", "CLIPImageProcessor"]}
    index |= {"requires_safety_checker": True, "scheduler": ["diffusers", "PNDMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    loaded = load_single_file(StableDiffusionPipeline, path, folder)
    assert loaded.safety_checker is loaded.feature_extractor is None
    assert type(loaded.scheduler).__name__ == "PNDMScheduler"


def test_parts_replace_those_of_the_file(files: World, tmp_path: Path) -> None:
    pipeline, path, config = files["sdxl"]
    tensors = {n: v for n, v in load_file(path).items() if not n.startswith("conditioner.")}
    save_file(tensors, file := tmp_path / "no_text.safetensors")
    given = {name: pipeline.components[name] for name in ("text_encoder", "text_encoder_2")}
    given["scheduler"] = DDIMScheduler()
    loaded = load_single_file(StableDiffusionXLPipeline, file, config, **given)
    assert all(loaded.components[name] is part for name, part in given.items())
    with pytest.raises(ValueError, match=r"no_text\.safetensors has no text_encoder_2 \(no condi"):
        load_single_file(
            StableDiffusionXLPipeline, file, config, text_encoder=given["text_encoder"]
        )


def lora(path: Path) -> None:
    save_file({"lora_unet_input_blocks_1_1_proj_in.lora_down.weight": torch.zeros(1, 2)}, path)


def diffusers_lora(path: Path) -> None:
    save_file({"unet.down_blocks.0.attentions.0.to_q.lora_A.weight": torch.zeros(1, 2)}, path)


def vae_alone(path: Path) -> None:
    save_file(tiny_sdxl(**SMALL).vae.state_dict(), path)


def diffusers_unet(path: Path) -> None:
    save_file(tiny_sdxl(**SMALL).unet.state_dict(), path)


def sd3(path: Path) -> None:
    name = "model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight"
    save_file({name: torch.zeros(1)}, path)


def words(path: Path) -> None:
    save_file({"emb_params": torch.zeros(1, 2)}, path)


def garbage(path: Path) -> None:
    path.write_bytes(b"no tensors in here, only words")


def nothing(path: Path) -> None:
    """No file at all."""


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lora, "holds a LoRA, need {base} in the original layout"),
        (diffusers_lora, "holds a LoRA, need {base}"),
        (vae_alone, "holds a VAE, need {base}"),
        (diffusers_unet, "holds a UNet in diffusers' layout, need {base}"),
        (sd3, "holds SD3, need {base}"),
        (words, "holds something else, need {base}"),
        (garbage, "is not a safetensors file"),
        (nothing, "is not a file, need a .safetensors file"),
    ],
)
@pytest.mark.parametrize(("family", "base"), [("sd15", "SD 1.x or 2.x"), ("sdxl", "SDXL")])
def test_what_is_no_base(
    write: Callable[[Path], None],
    message: str,
    family: str,
    base: str,
    files: World,
    tmp_path: Path,
) -> None:
    write(path := tmp_path / "file.safetensors")
    with pytest.raises(ValueError, match=r"^path: .*/file\.safetensors ") as error:
        load_single_file(CLASSES[family], path, files[family][2])
    assert message.format(base=base) in str(error.value)


def test_the_wrong_family(files: World) -> None:
    (_, sd15, config), (_, sdxl, config_xl) = files["sd15"], files["sdxl"]
    with pytest.raises(ValueError, match=r"holds SD 1\.x or 2\.x, need SDXL in"):
        load_single_file(StableDiffusionXLPipeline, sd15, config_xl)
    with pytest.raises(ValueError, match=r"holds SDXL, need SD 1\.x or 2\.x in"):
        load_single_file(StableDiffusionPipeline, sdxl, config)
    with pytest.raises(ValueError, match=r"lacks text_encoder_2/config\.json, tokenizer_2/tok"):
        load_single_file(StableDiffusionXLPipeline, sdxl, config)
    with pytest.raises(ValueError, match=r"cross_attention_dim 32, but config: .* has 64; need"):
        load_single_file(StableDiffusionPipeline, sd15, config_xl)
    with pytest.raises(ValueError, match="pipeline_class: AutoencoderKL, need StableDiffusionPip"):
        load_single_file(AutoencoderKL, sd15, config)


def test_a_config_that_is_not_there(files: World, tmp_path: Path) -> None:
    _, path, _ = files["sd15"]
    with pytest.raises(ValueError, match=r"lacks model_index\.json, unet/config\.json, vae/config"):
        load_single_file(StableDiffusionPipeline, path, tmp_path)
    with pytest.raises(ValueError, match=r"lacks vae/config\.json, need a pipeline's folder"):
        load_single_vae(path, tmp_path)
    for name in (tmp_path / "not here", "nobody/nothing"):
        with pytest.raises(ValueError, match=f"config: {name} is not a folder, nor can it be"):
            load_single_file(StableDiffusionPipeline, path, name)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("sd15", "model.diffusion_model.out.0.weight"),
        ("sd15", "first_stage_model.encoder.norm_out.bias"),
        ("sd15", "cond_stage_model.transformer.text_model.final_layer_norm.bias"),
        ("sdxl", "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias"),
        ("sdxl", "conditioner.embedders.1.model.transformer.resblocks.1.ln_1.bias"),
    ],
)
def test_a_file_that_lacks_tensors(family: str, name: str, files: World, tmp_path: Path) -> None:
    _, path, config = files[family]
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, file := tmp_path / "file.safetensors")
    with pytest.raises(ValueError, match=r"lacks .*tensors that config: "):
        load_single_file(CLASSES[family], file, config)


def test_what_is_no_vae(files: World, tmp_path: Path) -> None:
    for write in (lora, diffusers_unet):
        write(path := tmp_path / "file.safetensors")
        with pytest.raises(ValueError, match=r"holds .*, need a VAE in the original layout"):
            load_single_vae(path, files["sd15"][2])


# In the trainer, and in generate.py.


@pytest.mark.parametrize("model", ["epsilon", "sd15"])
def test_a_base_and_a_vae_in_one_file_train_as_the_folder_does(
    train: Train, world: Path, tmp_path: Path, model: str
) -> None:
    family = FAMILIES.get(model, SDXL)
    pipeline = family.pipeline.from_pretrained(world / model, **family.options)
    base, vae = tmp_path / "base.safetensors", tmp_path / "vae.safetensors"
    write_single_file(pipeline, base)
    weights = {n: v for n, v in load_file(base).items() if n.startswith("first_stage_model.")}
    save_file(weights, vae)
    flags: dict[str, Any] = {"loss": "dpo", "model": model}
    expected = train("folder", **flags)
    flags |= {"pretrained_config_name_or_path": world / model, "single_file": True}
    flags |= {"pretrained_vae_model_name_or_path": vae, "cache_dir": tmp_path / "cache"}
    found = train("file", **flags, pretrained_model_name_or_path=base)
    assert_same_weights(expected, found)
    unpacked = sorted((tmp_path / "cache" / "unpacked").iterdir())
    made = [path.stat().st_mtime_ns for path in unpacked]
    assert len(unpacked) == 2

    # The result in one file is the pipeline; it can be trained on in turn, and sampled from.
    (one,) = (found / "pipeline").glob("*.safetensors")
    opened = load_single_file(family.pipeline, one, world / model)
    denoiser = opened.unet.state_dict()
    trained = unet_of(found)
    assert all(denoiser[name].equal(value) for name, value in trained.items())
    assert "base.safetensors" in (found / "pipeline" / "README.md").read_text()
    train("again", **flags, pretrained_model_name_or_path=base)
    assert [path.stat().st_mtime_ns for path in unpacked] == made  # it is unpacked once
    assert sorted((tmp_path / "cache" / "unpacked").iterdir()) == unpacked
    (tmp_path / "prompts.txt").write_text("a cat")
    words = {
        "pretrained_model_name_or_path": base, "pretrained_config_name_or_path": world / model,
        "trained": found, "prompts": tmp_path / "prompts.txt", "output": tmp_path / "grid.png",
        "num_inference_steps": 1, "height": 16, "width": 16, "mixed_precision": "no",
    }  # fmt: skip
    generate.main(generate.parse_args([str(w) for n, v in words.items() for w in (f"--{n}", v)]))
    assert (tmp_path / "grid.png").exists()


def test_files_that_cannot_be_unpacked_are_one_line(
    train: Train, world: Path, tmp_path: Path
) -> None:
    write_single_file(tiny("sd15"), tmp_path / "sd.safetensors")
    (tmp_path / "old.ckpt").write_bytes(b"pickle")
    config = {"pretrained_config_name_or_path": world / "epsilon"}
    for name, message in (
        ("sd.safetensors", "holds SD 1.x or 2.x, need SDXL in the original layout"),
        ("none.safetensors", "there is no such file"),
        ("old.ckpt", "need a .safetensors file; others may hold code"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            train(pretrained_model_name_or_path=tmp_path / name, **config)
        assert str(error.value).startswith("--pretrained_model_name_or_path ")
    with pytest.raises(ValueError, match="a sd3 model is not read from one file"):
        train(model="sd3", pretrained_model_name_or_path=tmp_path / "sd.safetensors")
    with pytest.raises(ValueError, match="--single_file and --lora_rank came"):
        train(single_file=True, lora_rank=4)
