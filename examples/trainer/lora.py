"""LoRA adapters: where they are added, and the model without them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from trainer.args import TrainingArguments
from trainer.families.family import Family

TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def add_lora(
    args: TrainingArguments, family: Family, denoiser: Any, text_encoders: Sequence[Any] = ()
) -> list[Any]:
    """Give the denoiser, and those text encoders that come and can learn, adapters in fp32; all
    else is frozen. Returns the models that have some."""
    chosen: list[tuple[Any, dict[str, Any]]] = [(denoiser, {"target_modules": family.lora_layers})]
    for i, encoder in enumerate(text_encoders):
        # An adapter of a layer that nothing reads would get no gradient, which DDP waits for.
        if layers := family.text_layers(i, encoder.config):
            layer = {"target_modules": TEXT_LAYERS, "layers_to_transform": list(range(layers))}
            chosen.append((encoder, layer))
    rank: Any = args.lora_rank
    alpha: Any = args.lora_alpha or rank
    for model, where in chosen:
        model.requires_grad_(False)
        model.add_adapter(
            LoraConfig(
                r=rank,
                lora_alpha=alpha,
                init_lora_weights="gaussian",
                **where,
            )
        )
        cast_training_params(model, torch.float32)
    return [model for model, _ in chosen]


def trainable(models: Sequence[torch.nn.Module]) -> list[torch.nn.Parameter]:
    """The parameters that learn."""
    return [p for model in models for p in model.parameters() if p.requires_grad]


@contextmanager
def without_adapters(*models: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The models (the first comes back) as they were before `add_lora`: what they are compared
    with."""
    layers = [
        layer for model in models for layer in model.modules() if isinstance(layer, BaseTunerLayer)
    ]
    try:
        for layer in layers:
            # peft's own switch also takes requires_grad away, which FSDP would remember.
            layer._disable_adapters = True
            if not layer.disable_adapters:
                raise RuntimeError("this version of peft has another switch for adapters")
        yield models[0]
    finally:
        for layer in layers:
            layer._disable_adapters = False
