"""The files that adapters (LoRA) are saved in: diffusers' own, and one under the names of kohya's
scripts, which ComfyUI and AUTOMATIC1111 read."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import get_peft_model_state_dict
from safetensors.torch import save
from torch import Tensor

from trainer.families.sdxl import load_vae
from trainer.files import whole_file, whole_folder

LORA_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "pytorch_lora_weights_kohya.safetensors"
PARTS = ("unet", "text_encoder", "text_encoder_2")
# What loading needs of peft's LoraConfig; diffusers 0.34 asks for rank_pattern, though it is empty.
# A file that has all fields is refused by any peft that lacks one of them.
FIELDS = ("r", "lora_alpha", "target_modules", "layers_to_transform", "rank_pattern")
ATTENTION = re.compile(r"(down_blocks|mid_block|up_blocks)(?:\.(\d+))?\.attentions\.(\d+)\.(.+)")


def original_name(name: str, layers_per_block: int) -> str:
    """The name that a part of an attention block of diffusers' UNet has in the original SDXL."""
    found = ATTENTION.fullmatch(name)
    if found is None:
        raise ValueError(f"{name} is in no attention block; its original name is not known")
    side, block, layer, rest = found.groups()
    if side == "mid_block":
        return f"middle_block.1.{rest}"
    # The original numbers all layers of one side. Before a down block's layers comes the first
    # convolution, and behind them a layer that halves; an up block has one layer more.
    index = int(block) * (layers_per_block + 1) + int(layer)
    if side == "down_blocks":
        return f"input_blocks.{index + 1}.1.{rest}"
    return f"output_blocks.{index}.1.{rest}"


def adapters_of(part: str, model: Any, state: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The adapters by peft's names; a text encoder's begin with `text_model.`, which CLIPTextModel
    has in transformers 4 and in all files, but not in transformers 5."""
    # Embeddings are never trained; asked about them, peft looks the base up on the hub.
    adapters = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    if part == "unet":
        return adapters
    prefix = "text_model."
    return {prefix + name.removeprefix(prefix): value for name, value in adapters.items()}


def to_kohya(part: str, model: Any, adapters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapters by kohya's names, with the alpha of each."""
    if part == "unet":
        layers = model.config.layers_per_block
        adapters = {original_name(name, layers): value for name, value in adapters.items()}
    named = convert_state_dict_to_kohya({f"{part}.{name}": v for name, v in adapters.items()})
    alpha = float(model.peft_config["default"].lora_alpha)
    # The converter writes the rank for each alpha.
    return {
        name: torch.tensor(alpha) if name.endswith(".alpha") else value
        for name, value in named.items()
    }


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all, of which equal contents give equal bytes.

    safetensors itself writes metadata in any order, and a file that nobody else may read.
    """
    data = save({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, dict(metadata))
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path) as aside, aside.open("wb") as file:
        file.writelines((len(text).to_bytes(8, "little"), text, memoryview(data)[begin:]))


def write_lora(
    folder: Path, models: Sequence[Any], states: Sequence[Mapping[str, Tensor] | None]
) -> list[str]:
    """Write both files of a UNet's adapters, and of the text encoders' if these come too, into
    `folder`, and return the files' names. `states` are the models' state dicts, or None."""
    ours: dict[str, Tensor] = {}
    kohya: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for part, model, state in zip(PARTS, models, states, strict=False):
        adapters = adapters_of(part, model, state)
        for name, value in convert_state_dict_to_diffusers(adapters).items():
            ours[f"{part}.{name}"] = value
        kohya |= to_kohya(part, model, adapters)
        config = model.peft_config["default"]
        for field in FIELDS:
            value = getattr(config, field)
            if value is not None:
                settings[f"{part}.{field}"] = sorted(value) if isinstance(value, set) else value
    metadata = json.dumps(settings, indent=2, sort_keys=True)
    write_tensors(folder / LORA_FILE, ours, {"format": "pt", LORA_ADAPTER_METADATA_KEY: metadata})
    # AUTOMATIC1111 lists a file whose metadata lacks the base among the LoRAs of SD 1.
    about = {"ss_base_model_version": "sdxl_base_v1-0", "ss_network_module": "networks.lora"}
    write_tensors(folder / KOHYA_FILE, kohya, {"format": "pt", **about})
    return [LORA_FILE, KOHYA_FILE]


def make_public(pipeline: Path) -> list[str]:
    """Make a saved pipeline fit for others to read, and return the names of its files.

    Its configurations lose the folders that its parts were loaded from, and its weights get the
    permissions of its other files: safetensors writes for the owner alone.
    """
    mode = (pipeline / "model_index.json").stat().st_mode
    files = [path for path in pipeline.rglob("*") if path.is_file()]
    for path in files:
        path.chmod(mode)
        config = json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else {}
        if isinstance(config, dict) and {"_name_or_path", "name_or_path"} & config.keys():
            kept = {k: v for k, v in config.items() if k.lstrip("_") != "name_or_path"}
            path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    return sorted(path.relative_to(pipeline).as_posix() for path in files)


def save_trained(
    args: argparse.Namespace,
    accelerator: Accelerator,
    learning: Sequence[Any],
    output_dir: Path,
) -> tuple[Path, list[str]]:
    """Write the adapters, or a pipeline with the trained UNet, whole or not at all.

    Returns the folder, and the names of the files in it that were written. Every process must call
    it: with FSDP each holds a part. Only the main one writes.
    """
    result = output_dir if args.lora_rank else output_dir / "pipeline"
    states = [accelerator.get_state_dict(model) for model in learning]
    if not accelerator.is_main_process:
        return result, []
    models = [accelerator.unwrap_model(model) for model in learning]
    if args.lora_rank:
        return result, write_lora(result, models, states)
    with torch.device("meta"):
        trained = UNet2DConditionModel.from_config(models[0].config)
    trained.load_state_dict(states[0], assign=True)
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        args.pretrained_model_name_or_path, unet=trained, vae=load_vae(args).float(),
        revision=args.revision, variant=args.variant, cache_dir=args.cache_dir,
        add_watermarker=False,
    )  # fmt: skip
    if args.prediction_type:
        pipeline.scheduler.register_to_config(prediction_type=args.prediction_type)
    with whole_folder(result) as aside:
        pipeline.save_pretrained(aside)
        files = make_public(aside)
    return result, files
