"""The flag --guidance: how it is written, and how a second model for it is made of files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastpref.guidance import (
    SCHEDULES,
    AnnealedGuidance,
    NegativePreferenceGuidance,
    merged_negative,
)
from trainer.export import KOHYA_FILE, LORA_FILE
from trainer.families.all import FAMILIES
from trainer.families.family import Family, denoiser_of

Guidance = AnnealedGuidance | NegativePreferenceGuidance
TRAINED, NEGATIVE = "trained", "negative"  # names of adapters
HELP = (
    "a third column, painted with the base's help or a worse model's. annealed[:SCHEDULE]: from "
    "the base's prediction in the first step to the trained one's, by linear (the default), "
    "power[:P], step[:P], base or draft. negative:PATH[:M]: guidance away from a model trained by "
    "npo or self_npo, a PATH as of --trained; M from 0 (the default) to 1 is how much of the "
    "trained model is left out of it. Only the denoiser is another: text encoders are the trained "
    "ones"
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
    """Where in a run's folder its LoRA lies (a file), or its denoiser (a folder)."""
    for lora in (folder, folder / LORA_FILE, folder / KOHYA_FILE):
        if lora.is_file() and lora.suffix == ".safetensors":
            return lora
    classes = {family.model.__name__: family.denoiser for family in FAMILIES.values()}
    names = dict.fromkeys(classes.values())
    for denoiser in (
        *(folder / "pipeline" / n for n in names),
        *(folder / n for n in names),
        folder,
    ):
        config = denoiser / "config.json"
        if config.is_file() and json.loads(config.read_text()).get("_class_name") in classes:
            return denoiser
    found = ", ".join(sorted(path.name for path in folder.glob("*"))) or "nothing"
    raise ValueError(
        f"{flag} {folder} holds {found}; need {LORA_FILE}, pipeline/ or its denoiser, such as "
        "a run's --output_dir has at its end"
    )


def scheduler_config(denoiser: Path) -> dict[str, Any] | None:
    """That of the pipeline that a saved denoiser belongs to, if it is there."""
    path = denoiser.parent / "scheduler" / "scheduler_config.json"
    config: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
    return config


def load_trained(family: Family, path: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The denoiser that a run saved."""
    return family.model.from_pretrained(path, torch_dtype=dtype).to(device)


def add_lora_file(family: Family, denoiser: Any, path: Path, name: str) -> None:
    """Load the denoiser's part of a LoRA's file as adapters of that name."""
    options: dict[str, Any] = {}
    if family.denoiser == "unet":
        options["unet_config"] = denoiser.config
    state, *alphas, metadata = family.pipeline.lora_state_dict(
        path.parent, weight_name=path.name, return_lora_metadata=True, **options
    )
    load = getattr(family.pipeline, f"load_lora_into_{family.denoiser}")
    given = {"network_alphas": alphas[0]} if alphas else {}
    load(state, **{family.denoiser: denoiser}, adapter_name=name, metadata=metadata, **given)


def prediction_of(config: Mapping[str, Any]) -> str:
    """What a model predicts, by its scheduler's configuration."""
    kind: str = config.get("prediction_type", "flow")
    return kind


def check_prediction(pipeline: Any, trained: Path, wanted: Wanted) -> None:
    """Raises: ValueError, where what is to be mixed is not there or predicts something else."""
    paths = [trained]
    if wanted.path is not None:
        paths.append(find_trained(wanted.path, "negative:"))
    types = {"the base": prediction_of(pipeline.scheduler.config)}
    for path in paths:
        config = scheduler_config(path) if path.is_dir() else None
        if config is not None:
            types[str(path)] = prediction_of(config)
    if len({*types.values()}) > 1:
        said = " and ".join(f"{name} predicts {kind}" for name, kind in types.items())
        raise ValueError(f"mixes predictions, but {said}; need one prediction type")


def make_guidance(
    wanted: Wanted, family: Family, pipeline: Any, trained: Path, base: Any
) -> Guidance:
    """What --guidance asks for, for a pipeline that has the trained denoiser or, with a file, LoRA.

    base: the base's own denoiser, which comes with a trained one; it may become the negative model.
    """
    if wanted.schedule is not None:
        return AnnealedGuidance(wanted.schedule, wanted.p, base=base)
    assert wanted.path is not None
    path, keep = find_trained(wanted.path, "negative:"), 1.0 - wanted.m
    positive = denoiser_of(family, pipeline)
    if path.is_file() and base is None:
        add_lora_file(family, positive, path, NEGATIVE)
        positive.set_adapters(TRAINED)
        return NegativePreferenceGuidance({TRAINED: keep, NEGATIVE: 1.0})
    if path.is_file():
        negative = base
        states = (each.state_dict() for each in (positive, base))
        negative.load_state_dict(merged_negative(*states, m=wanted.m))
        add_lora_file(family, negative, path, NEGATIVE)
        return NegativePreferenceGuidance(negative)
    negative = load_trained(family, path, positive.device, positive.dtype)
    if base is None:
        add_lora_file(family, negative, trained, TRAINED)
        negative.set_adapters(TRAINED, keep)
    else:
        states = (each.state_dict() for each in (positive, base, negative))
        negative.load_state_dict(merged_negative(*states, m=wanted.m))
    return NegativePreferenceGuidance(negative)
