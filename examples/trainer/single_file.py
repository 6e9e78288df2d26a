"""One-file checkpoints: a `.safetensors` in the original layout of Stable Diffusion, with the UNet,
the VAE and the text encoders of SD 1.x, SD 2.x or SDXL."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from transformers import CLIPTextModelWithProjection

from trainer.original_layout import CLIP, CLIP_XL, OPEN_CLIP, OPEN_CLIP_XL, UNET, VAE, to_original
from trainer.tensors import write_tensors

SD_LAYOUT, SDXL_LAYOUT = "SD 1.x or 2.x", "SDXL"


def write_single_file(
    pipeline: Any,
    path: str | Path,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a pipeline's weights into one file, in `dtype` or as they are."""
    tensors = to_original(pipeline)
    if dtype is not None:
        tensors = {n: v.to(dtype) if v.is_floating_point() else v for n, v in tensors.items()}
    write_tensors(Path(path), tensors, {"format": "pt", **(metadata or {})})


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's tensors by name, without reading the tensors."""
    if not path.is_file():
        raise ValueError(f"path: {path} is not a file, need a .safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"path: {path} is not a safetensors file ({error})") from error


def kind_of(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What a file holds, told by the names of its tensors."""

    def has(*beginnings: str) -> bool:
        return any(name.startswith(beginnings) for name in shapes)

    if any("lora_" in name for name in shapes):
        return "a LoRA"
    if has("conditioner.embedders.0.model."):
        return "the SDXL refiner"
    if has(f"{UNET}label_emb."):
        return SDXL_LAYOUT
    if has(f"{UNET}input_blocks."):
        return SD_LAYOUT
    if has(VAE, "encoder.conv_in.", "decoder.conv_in.") and not has(UNET):
        return "a VAE"
    if any("joint_blocks." in name for name in shapes):
        return "SD3"
    if has("down_blocks."):
        return "a UNet in diffusers' layout"
    return "something else"


def check_kind(path: Path, base: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's tensors; refuses one that is no base of this kind."""
    shapes = read_shapes(path)
    if (kind := kind_of(shapes)) != base:
        raise ValueError(f"path: {path} holds {kind}, need {base} in the original layout")
    return shapes


def check_file(path: Path, base: str, folder: Path, given: Mapping[str, Any]) -> None:
    """Refuse a file that is no base of this kind, lacks parts, or does not fit the config."""
    shapes = check_kind(path, base)
    prefixes = {"unet": (UNET,), "vae": (VAE,), "text_encoder": (CLIP, OPEN_CLIP)}
    if base == SDXL_LAYOUT:
        prefixes |= {"text_encoder": (CLIP_XL,), "text_encoder_2": (OPEN_CLIP_XL,)}
    for part, prefix in prefixes.items():
        if part not in given and not any(name.startswith(prefix) for name in shapes):
            raise ValueError(f"path: {path} has no {part} (no {prefix[0]}*); pass {part}=...")
    if "unet" in given:
        return
    config = json.loads((folder / "unet" / "config.json").read_text())
    widths = {"in_channels": shapes.get(f"{UNET}input_blocks.0.0.weight")}
    cross = (shape for name, shape in shapes.items() if name.endswith(".attn2.to_k.weight"))
    widths["cross_attention_dim"] = next(cross, None)
    for name, shape in widths.items():
        if shape is not None and shape[1] != config.get(name, shape[1]):
            raise ValueError(
                f"path: {path} has a UNet of {name} {shape[1]}, but config: {folder} has "
                f"{config[name]}; need the config of the same model"
            )


def config_folder(config: str | Path, needed: Sequence[str]) -> Path:
    """The folder of configurations in diffusers' format, from the hub if need be."""
    folder = Path(config)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(config), allow_patterns=["*.json", "*.txt"]))
        except (OSError, ValueError, HfHubHTTPError) as error:
            raise ValueError(
                f"config: {config} is not a folder, nor can it be had from the hub ({error})"
            ) from error
    if missing := [name for name in needed if not (folder / name).is_file()]:
        raise ValueError(
            f"config: {folder} lacks {', '.join(missing)}, need a pipeline's folder in diffusers' "
            "format (without weights will do)"
        )
    return folder


def load_single_file(
    pipeline_class: Any,
    path: str | Path,
    config: str | Path,
    dtype: torch.dtype | None = None,
    **parts: Any,
) -> Any:
    """Load a pipeline from a file in the original layout, in `dtype` (float32 if None).

    `config`, a local folder or a name on the hub, has in diffusers' format what the file has not:
    the configurations of all parts, the tokenizers and the scheduler. `parts` are used instead of
    those of the file or of `config`. A safety checker comes from neither.
    """
    path = Path(path)
    is_xl = issubclass(pipeline_class, StableDiffusionXLPipeline)
    if not is_xl and not issubclass(pipeline_class, StableDiffusionPipeline):
        raise ValueError(
            f"pipeline_class: {pipeline_class.__name__}, need StableDiffusionPipeline or "
            "StableDiffusionXLPipeline"
        )
    needed = ["unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"]
    for number in ("", "_2") if is_xl else ("",):
        needed += [f"text_encoder{number}/config.json", f"tokenizer{number}/tokenizer_config.json"]
    needed = [name for name in needed if name.split("/")[0] not in parts]
    wanted = SDXL_LAYOUT if is_xl else SD_LAYOUT
    check_kind(path, wanted)  # before anything is fetched
    folder = config_folder(config, ["model_index.json", *needed])
    check_file(path, wanted, folder, parts)
    if is_xl and "text_encoder_2" not in parts:
        parts["text_encoder_2"] = second_encoder(path, folder, dtype)
    if not is_xl:  # else diffusers warns of a missing checker, and wants what prepares its pictures
        no_checker = {"safety_checker": None, "requires_safety_checker": False}
        parts = {**no_checker, "feature_extractor": None, **parts}
    pipeline = from_file(pipeline_class, path, folder, torch_dtype=dtype, **parts)
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            lacking = [tensor for tensor, value in part.state_dict().items() if value.is_meta]
            if lacking:
                raise ValueError(
                    f"path: {path} lacks {len(lacking)} of the tensors that config: {folder} "
                    f"gives the {name}, such as {lacking[0]} (diffusers' name)"
                )
    return pipeline


def from_file(kind: Any, path: Path, folder: Path, **settings: Any) -> Any:
    """What diffusers makes of a file, with a plain error where the file lacks weights."""
    try:
        return kind.from_single_file(
            str(path), config=str(folder), local_files_only=True, **settings
        )
    except NotImplementedError as error:  # tensors that it did not find have no values to move
        raise ValueError(
            f"path: {path} lacks tensors that config: {folder} gives the unet or the vae"
        ) from error


def second_encoder(path: Path, folder: Path, dtype: torch.dtype | None) -> Any:
    """SDXL's second text encoder.

    diffusers tells SDXL's encoders apart by their widths alone, and would take the first for the
    second where these are equal, as in our tiny pipelines. So it gets nothing else to see.
    """
    with safe_open(path, framework="pt") as file:
        state = {n: file.get_tensor(n) for n in file.keys() if n.startswith(OPEN_CLIP_XL)}  # noqa: SIM118
    return create_diffusers_clip_model_from_ldm(
        CLIPTextModelWithProjection,
        checkpoint=state,
        subfolder="text_encoder_2",
        config=str(folder),
        torch_dtype=dtype,
        local_files_only=True,
    )


def load_single_vae(
    path: str | Path, config: str | Path, dtype: torch.dtype | None = None
) -> AutoencoderKL:
    """Load a VAE from a file of its own in the original layout, whose names may begin with
    `first_stage_model.`, or from a whole checkpoint; `config` is a pipeline's."""
    path = Path(path)
    folder = config_folder(config, ["vae/config.json"])
    kind = kind_of(read_shapes(path))
    if kind not in ("a VAE", SD_LAYOUT, SDXL_LAYOUT):
        raise ValueError(f"path: {path} holds {kind}, need a VAE in the original layout")
    return from_file(AutoencoderKL, path, folder, subfolder="vae", torch_dtype=dtype)
