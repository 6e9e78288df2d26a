"""The flag --guidance: how it is written, and how a second model for it is made of files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

from fastpref.guidance import (
    SCHEDULES,
    AnnealedGuidance,
    NegativePreferenceGuidance,
    merged_negative,
)
from trainer.export import KOHYA_FILE, LORA_FILE

Guidance = AnnealedGuidance | NegativePreferenceGuidance
TRAINED, NEGATIVE = "trained", "negative"  # names of adapters
HELP = (
    "a third column, painted with the base's help or a worse model's. annealed[:SCHEDULE]: from "
    "the base's prediction in the first step to the trained one's, by linear (the default), "
    "power[:P], step[:P], base or draft. negative:PATH[:M]: guidance away from a model trained by "
    "npo or self_npo, a PATH as of --trained; M from 0 (the default) to 1 is how much of the "
    "trained model is left out of it. Only the UNet is another: text encoders are the trained ones"
)


class Wanted(NamedTuple):
    """What --guidance says: a schedule with its p, or a path with its m."""

    schedule: str | None = None
    p: float | None = None
    path: Path | None = None
    m: float = 0.0


def read_guidance(text: str) -> Wanted:
    """Raises: ValueError."""
    kind, _, rest = text.partition(":")
    if kind == "annealed":
        schedule, _, p = rest.partition(":")
        if schedule and schedule not in SCHEDULES:
            raise ValueError(f"is {text!r}; need a schedule of {', '.join(SCHEDULES)}")
        wanted = Wanted(schedule=schedule or "linear", p=_number(text, p) if p else None)
        AnnealedGuidance(wanted.schedule or "", wanted.p)
        return wanted
    if kind != "negative" or not rest:
        raise ValueError(f"is {text!r}; need annealed[:SCHEDULE[:P]] or negative:PATH[:M]")
    if Path(rest).exists() or ":" not in rest:  # a path may hold colons itself
        return Wanted(path=Path(rest))
    path, _, m = rest.rpartition(":")
    wanted = Wanted(path=Path(path), m=_number(text, m))
    if not 0.0 <= wanted.m <= 1.0:
        raise ValueError(f"is {text!r}; need an M from 0 to 1")
    return wanted


def _number(text: str, word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise ValueError(f"is {text!r}; need a number instead of {word!r}") from None


def find_trained(folder: Path, flag: str = "--trained") -> Path:
    """Where in a run's folder its LoRA lies (a file), or its UNet (a folder)."""
    for lora in (folder, folder / LORA_FILE, folder / KOHYA_FILE):
        if lora.is_file() and lora.suffix == ".safetensors":
            return lora
    for unet in (folder / "pipeline" / "unet", folder / "unet", folder):
        config = unet / "config.json"
        if config.is_file() and "UNet" in json.loads(config.read_text()).get("_class_name", ""):
            return unet
    found = ", ".join(sorted(path.name for path in folder.glob("*"))) or "nothing"
    raise ValueError(
        f"{flag} {folder} holds {found}; need {LORA_FILE}, pipeline/ or a UNet, such as a run's "
        "--output_dir has at its end"
    )


def scheduler_config(unet: Path) -> dict[str, Any] | None:
    """That of the pipeline that a saved UNet belongs to, if it is there."""
    path = unet.parent / "scheduler" / "scheduler_config.json"
    config: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
    return config


def load_unet(path: Path, device: torch.device, dtype: torch.dtype) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(path, torch_dtype=dtype).to(device)


def add_lora_file(unet: UNet2DConditionModel, path: Path, name: str) -> None:
    """Load the UNet's part of a LoRA's file as adapters of that name."""
    load = StableDiffusionXLPipeline.lora_state_dict
    state, alphas, metadata = load(
        path.parent, weight_name=path.name, unet_config=unet.config, return_lora_metadata=True
    )
    StableDiffusionXLPipeline.load_lora_into_unet(
        state, network_alphas=alphas, unet=unet, adapter_name=name, metadata=metadata
    )


def check_prediction(pipeline: StableDiffusionXLPipeline, trained: Path, wanted: Wanted) -> None:
    """Raises: ValueError, where what is to be mixed is not there or predicts something else."""
    paths = [trained]
    if wanted.path is not None:
        paths.append(find_trained(wanted.path, "negative:"))
    types = {"the base": pipeline.scheduler.config.prediction_type}
    for path in paths:
        config = scheduler_config(path) if path.is_dir() else None
        if config is not None:
            types[str(path)] = config["prediction_type"]
    if len({*types.values()}) > 1:
        said = " and ".join(f"{name} predicts {kind}" for name, kind in types.items())
        raise ValueError(f"mixes predictions, but {said}; need one prediction type")


def make_guidance(
    wanted: Wanted,
    pipeline: StableDiffusionXLPipeline,
    trained: Path,
    base: UNet2DConditionModel | None,
) -> Guidance:
    """What --guidance asks for, for a pipeline that has the trained UNet or, with a file, LoRA.

    base: the base's own UNet, which comes with a trained one; it may become the negative model.
    """
    if wanted.schedule is not None:
        return AnnealedGuidance(wanted.schedule, wanted.p, base=base)
    assert wanted.path is not None
    path, keep = find_trained(wanted.path, "negative:"), 1.0 - wanted.m
    unet = pipeline.unet
    if path.is_file() and base is None:
        add_lora_file(unet, path, NEGATIVE)
        unet.set_adapters(TRAINED)
        return NegativePreferenceGuidance({TRAINED: keep, NEGATIVE: 1.0})
    if path.is_file():
        assert base is not None
        negative = base
        negative.load_state_dict(merged_negative(unet.state_dict(), base.state_dict(), m=wanted.m))
        add_lora_file(negative, path, NEGATIVE)
        return NegativePreferenceGuidance(negative)
    negative = load_unet(path, unet.device, unet.dtype)
    if base is None:
        add_lora_file(negative, trained, TRAINED)
        negative.set_adapters(TRAINED, keep)
    else:
        states = (each.state_dict() for each in (unet, base, negative))
        negative.load_state_dict(merged_negative(*states, m=wanted.m))
    return NegativePreferenceGuidance(negative)
