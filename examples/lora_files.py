"""The files that adapters (LoRA) are saved in: diffusers' own, and one under the names of kohya's
scripts, which ComfyUI and AUTOMATIC1111 read."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import get_peft_model_state_dict
from safetensors.torch import save
from torch import Tensor

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
    aside = path.with_name(f".tmp-{path.stem}")  # diffusers would open any .safetensors
    try:
        with aside.open("wb") as file:
            file.writelines((len(text).to_bytes(8, "little"), text, memoryview(data)[begin:]))
    except BaseException:
        aside.unlink()
        raise
    os.replace(aside, path)


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
