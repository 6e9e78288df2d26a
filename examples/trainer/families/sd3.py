"""Stable Diffusion 3 and 3.5: a transformer on two CLIP encoders and T5, by flow matching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from trainer.families.family import Config, Family, Text, TextPart, named_embeds
from trainer.families.process import FLOW

T5_LENGTH = 256  # tokens of a caption, as the pipeline takes by default


def check(config: Config) -> None:
    name = config.get("_class_name")
    if name != "SD3Transformer2DModel":
        raise ValueError(f"its denoiser is a {name}; need an SD3Transformer2DModel")
    if config["in_channels"] != config["out_channels"]:
        raise ValueError(
            f"its transformer takes {config['in_channels']} channels and predicts "
            f"{config['out_channels']}, as for inpainting; need as many of both"
        )


def halvings(config: Config) -> int:
    """Patches of 2 x 2 latents halve once."""
    patch: int = config["patch_size"]
    return (patch - 1).bit_length()


def tokenize(tokenizers: Sequence[Any], captions: Sequence[str]) -> list[Tensor]:
    """The captions as token ids, padded and cut to each tokenizer's length, T5's to 256."""
    lengths = [77, 77, T5_LENGTH]
    return [
        tokenizer(
            list(captions), padding="max_length", truncation=True, return_tensors="pt",
            max_length=min(length, tokenizer.model_max_length),
        ).input_ids
        for tokenizer, length in zip(tokenizers, lengths, strict=True)
    ]  # fmt: skip


def encode_text(text_encoders: Sequence[Any], input_ids: Sequence[Tensor]) -> Text:
    """Both CLIP encoders' penultimate states side by side, padded to T5's width and followed by
    T5's states; and both pooled outputs."""
    *clips, t5 = text_encoders
    encoded = [
        clip(ids, output_hidden_states=True) for clip, ids in zip(clips, input_ids, strict=False)
    ]
    states = torch.cat([each.hidden_states[-2] for each in encoded], dim=-1)
    long = t5(input_ids[-1])[0]
    states = torch.nn.functional.pad(states, (0, long.shape[-1] - states.shape[-1]))
    return {
        "prompts": torch.cat([states, long.to(states.dtype)], dim=-2),
        "pooled": torch.cat([each.text_embeds for each in encoded], dim=-1),
    }


def condition(text: Text, time_ids: Tensor) -> dict[str, Any]:
    return {"encoder_hidden_states": text["prompts"], "pooled_projections": text["pooled"]}


def predict(
    transformer: Any, noisy: Tensor, timesteps: Tensor, condition: Mapping[str, Any]
) -> Tensor:
    prediction: Tensor = transformer(hidden_states=noisy, timestep=timesteps, **condition).sample
    return prediction


def embed_prompt(pipeline: Any, prompt: str, device: Any, guided: bool) -> dict[str, Tensor]:
    embedded = pipeline.encode_prompt(
        prompt, None, None, device=device, do_classifier_free_guidance=guided,
        max_sequence_length=min(T5_LENGTH, pipeline.tokenizer_3.model_max_length),
    )  # fmt: skip
    return named_embeds(embedded)


def text_layers(encoder: int, config: Any) -> int:
    """All of both CLIP encoders', whose pooled output is read; T5 is never trained."""
    return config.num_hidden_layers if encoder < 2 else 0


SD3 = Family(
    name="sd3",
    pipeline=StableDiffusion3Pipeline,
    options={},
    denoiser="transformer",
    model=SD3Transformer2DModel,
    texts=(
        TextPart("text_encoder", CLIPTextModelWithProjection, "tokenizer"),
        TextPart("text_encoder_2", CLIPTextModelWithProjection, "tokenizer_2"),
        TextPart("text_encoder_3", T5EncoderModel, "tokenizer_3"),
    ),
    config=None,
    process=FLOW,
    resolution=1024,
    check=check,
    halvings=halvings,
    tokenize=tokenize,
    encode_text=encode_text,
    condition=condition,
    predict=predict,
    embed_prompt=embed_prompt,
    lora_layers=[
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    ],
    blocks=["JointTransformerBlock"],
    text_layers=text_layers,
    kohya_name=None,  # ComfyUI and kohya's scripts read diffusers' own file
    kohya_base=None,
    tags=("stable-diffusion-3",),
)  # fmt: skip
