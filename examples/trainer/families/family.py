"""What a model family is: the functions and names in which SDXL, SD1.5 and SD3 differ."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
VAE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Config: TypeAlias = Mapping[str, Any]
Text: TypeAlias = dict[str, Tensor]  # a caption's embeddings by name, (N, ...) each


class Encoders(NamedTuple):
    """What turns images and captions into what the denoiser sees."""

    vae: Any
    tokenizers: list[Any]
    text_encoders: list[Any]


class TextPart(NamedTuple):
    """A text encoder of a pipeline, with its tokenizer."""

    encoder: str
    model: Any  # its class
    tokenizer: str


class Process(NamedTuple):
    """How a family adds noise, and what its denoiser then predicts. A timestep is a number of the
    scheduler's own scale, 0 to `num_train_timesteps`; more is more noise."""

    scheduler: Any  # the class that trains
    sampler: Any  # the one that paints, made of the same configuration
    check: Callable[[Config], None]  # raises a ValueError for a configuration it cannot train on
    draw: Callable[[Any, Any], Tensor]  # (scheduler, torch.Generator) -> a timestep to train at
    spread: Callable[[Any, int], Tensor]  # (scheduler, n) -> n timesteps, evenly over all noise
    # (latents (2B, ...), noise (B, ...), timesteps (B,), scheduler) -> noisy latents (2B, ...), and
    # the target of the prediction: (B, ...) where a pair shares it
    add_noise: Callable[[Tensor, Tensor, Tensor, Any], tuple[Tensor, Tensor]]
    # Whether alphas say how noisy a timestep is, as inversion and min-SNR weights need it; the
    # denoiser then predicts noise or velocity, by the configuration's prediction_type.
    has_alphas: bool


class Family(NamedTuple):
    """A family of pipelines: its parts by name, and plain functions for what differs."""

    name: str
    pipeline: Any  # its class
    options: Mapping[str, Any]  # to make the pipeline with
    denoiser: str  # the pipeline's part that learns: "unet" or "transformer"
    model: Any  # that part's class
    texts: tuple[TextPart, ...]
    config: str | None  # whose configurations a checkpoint in one file has; None where none is read
    process: Process
    resolution: int  # pixels a side that it was made for
    check: Callable[[Config], None]  # raises a ValueError for a denoiser it cannot train
    halvings: Callable[[Config], int]  # (the denoiser's configuration) -> how often it halves
    # (tokenizers, captions) -> token ids (N, length), for each tokenizer
    tokenize: Callable[[Sequence[Any], Sequence[str]], list[Tensor]]
    # (text encoders, token ids) -> embeddings
    encode_text: Callable[[Sequence[Any], Sequence[Tensor]], Text]
    # (embeddings, time ids (N, 6)) -> what the denoiser gets beside noisy latents and timesteps
    condition: Callable[[Text, Tensor], dict[str, Any]]
    # (denoiser, noisy latents, timesteps, condition) -> its prediction, like the latents
    predict: Callable[[Any, Tensor, Tensor, Mapping[str, Any]], Tensor]
    # (pipeline, prompt, device, guided) -> what the pipeline takes in the prompt's place
    embed_prompt: Callable[[Any, str, Any, bool], dict[str, Tensor]]
    lora_layers: list[str]  # of the denoiser
    blocks: list[str]  # classes of its modules that FSDP keeps in one piece
    # (which text encoder, its configuration) -> how many of its layers the denoiser depends on
    text_layers: Callable[[int, Any], int]
    # (a layer of the denoiser, its configuration) -> its name in kohya's files, where one is needed
    kohya_name: Callable[[str, Config], str] | None
    kohya_base: Callable[[Config], str] | None  # what such a file's metadata calls the base
    tags: tuple[str, ...]  # of a model card


def assemble(family: Family, **parts: Any) -> Any:
    """The family's pipeline from these parts alone; those that are missing are None."""
    needed = inspect.signature(family.pipeline.__init__).parameters.values()
    empty = {p.name: None for p in needed if p.default is p.empty and p.name != "self"}
    return family.pipeline(**(empty | dict(family.options) | parts))


def text_parts(family: Family, encoders: Encoders) -> dict[str, Any]:
    """The text encoders and tokenizers by the pipeline's names."""
    named: dict[str, Any] = {}
    for part, encoder, tokenizer in zip(
        family.texts, encoders.text_encoders, encoders.tokenizers, strict=True
    ):
        named |= {part.encoder: encoder, part.tokenizer: tokenizer}
    return named


def encoders_of(family: Family, pipeline: Any) -> Encoders:
    """VAE, tokenizers and text encoders of a pipeline."""
    return Encoders(
        pipeline.vae,
        [getattr(pipeline, part.tokenizer) for part in family.texts],
        [getattr(pipeline, part.encoder) for part in family.texts],
    )


def denoiser_of(family: Family, pipeline: Any) -> Any:
    return getattr(pipeline, family.denoiser)


def named_embeds(embedded: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """What a pipeline's encode_prompt returns, by the names that its call takes it under."""
    names = (
        "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    )  # fmt: skip
    return {n: each for n, each in zip(names, embedded, strict=False) if each is not None}
