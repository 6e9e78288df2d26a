"""The result on disk: a pipeline, or adapters (LoRA) in diffusers' own file and in one under the
names of kohya's scripts, which ComfyUI and AUTOMATIC1111 read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import get_peft_model_state_dict
from torch import Tensor

from trainer.args import TrainingArguments
from trainer.families.family import DTYPES, Family
from trainer.families.loading import load_pipeline, load_vae
from trainer.files import whole_folder
from trainer.single_file import write_single_file
from trainer.tensors import write_tensors

LORA_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "pytorch_lora_weights_kohya.safetensors"
# What loading needs of peft's LoraConfig; diffusers 0.34 asks for rank_pattern, though it is empty.
# A file that has all fields is refused by any peft that lacks one of them.
FIELDS = ("r", "lora_alpha", "target_modules", "layers_to_transform", "rank_pattern")


def adapters_of(
    family: Family, part: str, model: Any, state: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """The adapters by peft's names; a text encoder's begin with `text_model.`, which CLIPTextModel
    has in transformers 4 and in all files, but not in transformers 5."""
    # Embeddings are never trained; asked about them, peft looks the base up on the hub.
    adapters = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    if part == family.denoiser:
        return adapters
    prefix = "text_model."
    return {prefix + name.removeprefix(prefix): value for name, value in adapters.items()}


def to_kohya(
    family: Family, part: str, model: Any, adapters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The adapters by kohya's names, with the alpha of each."""
    if part == family.denoiser:
        assert family.kohya_name is not None
        adapters = {family.kohya_name(n, model.config): value for n, value in adapters.items()}
    named = convert_state_dict_to_kohya({f"{part}.{name}": v for name, v in adapters.items()})
    if len(family.texts) == 1:  # which kohya's scripts do not number
        named = {n.replace("lora_te1_", "lora_te_", 1): value for n, value in named.items()}
    alpha = float(model.peft_config["default"].lora_alpha)
    # The converter writes the rank for each alpha.
    return {
        name: torch.tensor(alpha) if name.endswith(".alpha") else value
        for name, value in named.items()
    }


def write_lora(
    folder: Path,
    family: Family,
    models: Mapping[str, Any],
    states: Mapping[str, Mapping[str, Tensor] | None],
) -> list[str]:
    """Write the files of the adapters of `models`, by the pipeline's names of them, into `folder`,
    and return the files' names. `states` are the models' state dicts, or None."""
    ours: dict[str, Tensor] = {}
    kohya: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for part, model in models.items():
        adapters = adapters_of(family, part, model, states[part])
        named = convert_state_dict_to_diffusers(adapters)
        if part == family.denoiser == "transformer":
            named = adapters  # which diffusers' transformers keep under peft's names
        ours |= {f"{part}.{name}": value for name, value in named.items()}
        if family.kohya_name is not None:
            kohya |= to_kohya(family, part, model, adapters)
        config = model.peft_config["default"]
        for field in FIELDS:
            value = getattr(config, field)
            if value is not None:
                settings[f"{part}.{field}"] = sorted(value) if isinstance(value, set) else value
    metadata = json.dumps(settings, indent=2, sort_keys=True)
    write_tensors(folder / LORA_FILE, ours, {"format": "pt", LORA_ADAPTER_METADATA_KEY: metadata})
    if not kohya:
        return [LORA_FILE]
    # AUTOMATIC1111 lists a file whose metadata lacks the base among the LoRAs of SD 1.
    assert family.kohya_base is not None
    base = family.kohya_base(models[family.denoiser].config)
    about = {"ss_base_model_version": base, "ss_network_module": "networks.lora"}
    if base == "sd_v2":
        about["ss_v2"] = "True"
    write_tensors(folder / KOHYA_FILE, kohya, {"format": "pt", **about})
    return [LORA_FILE, KOHYA_FILE]


def make_public(pipeline: Path) -> list[str]:
    """Take the folders that a saved pipeline's parts were loaded from out of its configurations,
    and return the names of its files."""
    files = [path for path in pipeline.rglob("*") if path.is_file()]
    for path in files:
        config = json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else {}
        if isinstance(config, dict) and {"_name_or_path", "name_or_path"} & config.keys():
            kept = {k: v for k, v in config.items() if k.lstrip("_") != "name_or_path"}
            path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    return sorted(path.relative_to(pipeline).as_posix() for path in files)


def save_trained(
    args: TrainingArguments,
    family: Family,
    accelerator: Accelerator,
    learning: Mapping[str, Any],
    output_dir: Path,
) -> tuple[Path, list[str]]:
    """Write the adapters of the models that learn, by the pipeline's names of them, or a pipeline
    with the trained denoiser, whole or not at all.

    Returns the folder, and the names of the files in it that were written. Every process must call
    it: with FSDP each holds a part. Only the main one writes.
    """
    result = output_dir if args.lora_rank else output_dir / "pipeline"
    states = {name: accelerator.get_state_dict(model) for name, model in learning.items()}
    if not accelerator.is_main_process:
        return result, []
    models = {name: accelerator.unwrap_model(model) for name, model in learning.items()}
    if args.lora_rank:
        return result, write_lora(result, family, models, states)
    with torch.device("meta"):
        trained = family.model.from_config(models[family.denoiser].config)
    trained.load_state_dict(states[family.denoiser], assign=True)
    parts = {family.denoiser: trained, "vae": load_vae(args).float()}
    pipeline = load_pipeline(args, family, **parts)
    if args.prediction_type:
        pipeline.scheduler.register_to_config(prediction_type=args.prediction_type)
    with whole_folder(result) as aside:
        pipeline.save_pretrained(aside)
        if args.single_file:
            path = aside / f"{family.name}-{args.loss}.safetensors"
            write_single_file(pipeline, path, DTYPES[args.mixed_precision])
        files = make_public(aside)
    return result, files
