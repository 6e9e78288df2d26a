"""SDXL: a UNet on two CLIP encoders' penultimate states, the second's pooled text and time ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from trainer.families.family import Config, Family, Text, TextPart, named_embeds
from trainer.families.process import DDPM
from trainer.families.unet import (
    BLOCKS,
    LORA_LAYERS,
    check_unet,
    halvings,
    original_name,
    predict,
    tokenize,
)


def check(config: Config) -> None:
    """Raise a ValueError for a UNet that is not SDXL's: a refiner, or of another family."""
    check_unet(config)
    if config.get("addition_embed_type") != "text_time":
        raise ValueError("its UNet takes no time ids, as one of SD1.5 or 2.x does not; "
                         "need SDXL's (train_sd15.py trains the others)")  # fmt: skip
    # A refiner has five time ids, the last a score of aesthetics, and one text encoder.
    pooled = config["projection_class_embeddings_input_dim"] - 5 * config["addition_time_embed_dim"]
    if config["cross_attention_dim"] == pooled:
        raise ValueError("its UNet is that of a refiner; need a base model")


def encode_text(text_encoders: Sequence[Any], input_ids: Sequence[Tensor]) -> Text:
    """Both penultimate hidden states side by side, and the second encoder's pooled output."""
    states = []
    for text_encoder, ids in zip(text_encoders, input_ids, strict=True):
        encoded = text_encoder(ids, output_hidden_states=True)
        states.append(encoded.hidden_states[-2])
    return {"prompts": torch.cat(states, dim=-1), "pooled": encoded.text_embeds}


def condition(text: Text, time_ids: Tensor) -> dict[str, Any]:
    added = {"text_embeds": text["pooled"], "time_ids": time_ids}
    return {"encoder_hidden_states": text["prompts"], "added_cond_kwargs": added}


def embed_prompt(pipeline: Any, prompt: str, device: Any, guided: bool) -> dict[str, Tensor]:
    embedded = pipeline.encode_prompt(prompt, device=device, do_classifier_free_guidance=guided)
    return named_embeds(embedded)


def text_layers(encoder: int, config: Any) -> int:
    """All but the last of the first encoder, whose output is not read; the second's is, pooled."""
    return config.num_hidden_layers - (encoder == 0)


def kohya_name(name: str, config: Mapping[str, Any]) -> str:
    return original_name(name, config["layers_per_block"])


def kohya_base(config: Mapping[str, Any]) -> str:
    return "sdxl_base_v1-0"


SDXL = Family(
    name="sdxl",
    pipeline=StableDiffusionXLPipeline,
    options={"add_watermarker": False},
    denoiser="unet",
    model=UNet2DConditionModel,
    texts=(
        TextPart("text_encoder", CLIPTextModel, "tokenizer"),
        TextPart("text_encoder_2", CLIPTextModelWithProjection, "tokenizer_2"),
    ),
    config="stabilityai/stable-diffusion-xl-base-1.0",
    process=DDPM,
    resolution=1024,
    check=check,
    halvings=halvings,
    tokenize=tokenize,
    encode_text=encode_text,
    condition=condition,
    predict=predict,
    embed_prompt=embed_prompt,
    lora_layers=LORA_LAYERS,
    blocks=BLOCKS,
    text_layers=text_layers,
    kohya_name=kohya_name,
    kohya_base=kohya_base,
    tags=("stable-diffusion-xl",),
)
