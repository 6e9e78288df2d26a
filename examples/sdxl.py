"""Knows how SDXL is loaded, and how it sees a batch of pairs: tokens, latents, noise, targets."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

from objectives import INVERSIONS, inversion_options

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
VAE_BATCH = 4  # images that the VAE sees at a time: at 1024 x 1024 each takes gigabytes
VAE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Encoders(NamedTuple):
    """What turns images and captions into what the UNet sees."""

    vae: AutoencoderKL
    tokenizers: list[Any]
    text_encoders: list[Any]


def load_vae(args: argparse.Namespace) -> AutoencoderKL:
    """The VAE that the flags name, frozen."""
    where = {"torch_dtype": VAE_DTYPES[args.vae_dtype], "cache_dir": args.cache_dir}
    if args.pretrained_vae_model_name_or_path:
        vae = AutoencoderKL.from_pretrained(args.pretrained_vae_model_name_or_path, **where)
    else:
        vae = AutoencoderKL.from_pretrained(
            args.pretrained_model_name_or_path, subfolder="vae", revision=args.revision,
            variant=args.variant, **where,
        )  # fmt: skip
    return vae.requires_grad_(False)


def load_encoders(args: argparse.Namespace, device: torch.device) -> Encoders:
    """VAE, tokenizers and text encoders that the flags name: frozen, on `device`."""
    source = args.pretrained_model_name_or_path
    where = {"revision": args.revision, "cache_dir": args.cache_dir}
    tokenizers = [
        AutoTokenizer.from_pretrained(source, subfolder=name, use_fast=False, **where)
        for name in ("tokenizer", "tokenizer_2")
    ]
    text_encoders = [
        kind.from_pretrained(source, subfolder=name, variant=args.variant, **where)
        .requires_grad_(False)
        .to(device, DTYPES[args.mixed_precision])
        for kind, name in (
            (CLIPTextModel, "text_encoder"),
            (CLIPTextModelWithProjection, "text_encoder_2"),
        )
    ]
    return Encoders(load_vae(args).to(device), tokenizers, text_encoders)


def load_scheduler(args: argparse.Namespace) -> DDPMScheduler:
    """The noise schedule of the model, with the prediction type that the flags or it name."""
    scheduler = DDPMScheduler.from_pretrained(
        args.pretrained_model_name_or_path, subfolder="scheduler", revision=args.revision,
        cache_dir=args.cache_dir,
    )  # fmt: skip
    if args.prediction_type:
        scheduler.register_to_config(prediction_type=args.prediction_type)
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(f"the model's prediction_type is {scheduler.config.prediction_type!r}; "
                         "need epsilon or v_prediction")  # fmt: skip
    return scheduler


def load_unet(args: argparse.Namespace) -> UNet2DConditionModel:
    """The UNet that the flags name, in fp32."""
    return UNet2DConditionModel.from_pretrained(
        args.pretrained_model_name_or_path, subfolder="unet", torch_dtype=torch.float32,
        revision=args.revision, variant=args.variant, cache_dir=args.cache_dir,
    )  # fmt: skip


def side_factor(args: argparse.Namespace) -> int:
    """What the sides of an image must be multiples of, to halve evenly to the UNet's middle: read
    from the configurations alone."""
    source, where = args.pretrained_model_name_or_path, {"cache_dir": args.cache_dir}
    vae, vae_where = args.pretrained_vae_model_name_or_path, where
    if not vae:
        vae, vae_where = source, where | {"subfolder": "vae", "revision": args.revision}
    configs = (
        AutoencoderKL.load_config(vae, **vae_where),
        UNet2DConditionModel.load_config(source, subfolder="unet", revision=args.revision, **where),
    )
    return 2 ** sum(len(config["block_out_channels"]) - 1 for config in configs)


def tokenize(tokenizers: Sequence[Any], captions: Sequence[str]) -> list[Tensor]:
    """The captions as token ids, (len(captions), length), for each tokenizer."""
    return [
        tokenizer(
            list(captions),
            padding="max_length",
            truncation=True,
            return_tensors="pt",
            max_length=tokenizer.model_max_length,
        ).input_ids
        for tokenizer in tokenizers
    ]


def encode_prompts(
    text_encoders: Sequence[Any], input_ids: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """SDXL's conditioning: both penultimate hidden states side by side, and the second's pooled."""
    states = []
    for text_encoder, ids in zip(text_encoders, input_ids, strict=True):
        encoded = text_encoder(ids, output_hidden_states=True)
        states.append(encoded.hidden_states[-2])
    return torch.cat(states, dim=-1), encoded.text_embeds


def encode_images(vae: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents of `pixels` (N, 3, H, W) in [-1, 1]: fp32, in the
    UNet's units."""
    posteriors = [vae.encode(part.to(vae.dtype)).latent_dist for part in pixels.split(VAE_BATCH)]
    mean, std = (
        torch.cat([getattr(posterior, name) for posterior in posteriors]).float()
        for name in ("mean", "std")
    )
    return mean * vae.config.scaling_factor, std * vae.config.scaling_factor


class Draws(NamedTuple):
    """What is random about a pair beside its picture: timestep, noise, and the VAE's sample."""

    channels: int
    factor: int  # pixels per latent
    num_train_timesteps: int

    def __call__(self, seeds: list[int], height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Noise (B, channels, h, w), timesteps (B,) and the noise of the VAE's posterior for images
        of `height` x `width` pixels, each pair's from its seed alone.

        Drawn on the CPU, so that every device sees the same numbers.
        """
        shape = (self.channels, height // self.factor, width // self.factor)
        noise, timesteps, posterior = [], [], []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            timesteps.append(torch.randint(self.num_train_timesteps, (), generator=generator))
            noise.append(torch.randn(shape, generator=generator))
            posterior.append(torch.randn(shape, generator=generator))
        return torch.stack(noise), torch.stack(timesteps), torch.stack(posterior)


class Collator:
    """Stacks pairs into a batch, winners first.

    Images come as pixels, or as the mean and std of their latents; captions (one of each pair, or
    where losers have their own, all winners' and then all losers') as input_ids for each tokenizer,
    or as prompts and pooled: the latter of each where the pairs come from a cache. With `draws` the
    batch has the pairs' noise (B, ...), timesteps (B,) and vae_noise (B, ...), each from its pair's
    seed alone.
    """

    def __init__(self, tokenizers: Sequence[Any], draws: Draws | None = None) -> None:
        self.tokenizers, self.draws = tokenizers, draws

    def __call__(self, pairs: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {
            name: torch.stack([pair[f"{name}_{side}"] for side in "wl" for pair in pairs])
            for name in ("pixels", "mean", "std", "time_ids")
            if f"{name}_w" in pairs[0]
        }
        if "prompts" in pairs[0]:  # of each caption of a pair
            for name in ("prompts", "pooled"):
                halves = zip(*(pair[name] for pair in pairs), strict=True)
                batch[name] = torch.stack([text for half in halves for text in half])
        else:
            captions = zip(*(pair["captions"] for pair in pairs), strict=True)
            texts = [text for half in captions for text in half]
            batch["input_ids"] = tokenize(self.tokenizers, texts)
        batch["seeds"] = [pair["seed"] for pair in pairs]
        batch["refused"] = [line for pair in pairs for line in pair["refused"]]
        if self.draws is not None:
            height, width = batch["time_ids"][0, 4:].tolist()
            names = ("noise", "timesteps", "vae_noise")
            batch |= zip(names, self.draws(batch["seeds"], height, width), strict=True)
        if "score_w" in pairs[0]:
            scores = [pair[f"score_{side}"] for side in "wl" for pair in pairs]
            batch["scores"] = torch.tensor(scores)
        if "sign" in pairs[0]:
            batch["sign"] = torch.tensor([pair["sign"] for pair in pairs])
        return batch


def latents_of(batch: Mapping[str, Any], vae: AutoencoderKL | None) -> Tensor:
    """A sample of the latents (2B, ...) of a batch's images, with the pairs' own noise."""
    if "mean" in batch:
        mean, std = batch["mean"], batch["std"]
    else:
        mean, std = encode_images(vae, batch["pixels"])
    return mean + std * torch.cat([batch["vae_noise"], batch["vae_noise"]])


def condition_of(batch: Mapping[str, Any], text_encoders: Sequence[Any]) -> dict[str, Any]:
    """What the UNet gets beside noisy latents and timesteps, for winners and losers (2B, ...)."""
    if "prompts" in batch:
        prompts, pooled = batch["prompts"], batch["pooled"]
    else:
        prompts, pooled = encode_prompts(text_encoders, batch["input_ids"])
    if len(prompts) < len(batch["time_ids"]):  # a pair shares its caption
        prompts, pooled = torch.cat([prompts, prompts]), torch.cat([pooled, pooled])
    added = {"text_embeds": pooled, "time_ids": batch["time_ids"]}
    return {"encoder_hidden_states": prompts, "added_cond_kwargs": added}


def noisy_pairs(
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    scheduler: DDPMScheduler,
) -> tuple[Tensor, Tensor]:
    """Noise both halves of `latents` (2B, ...) alike, and say what the UNet should predict.

    The target is (B, ...), the noise itself, for epsilon, and (2B, ...) for v prediction.
    """
    noise_wl, timesteps_wl = torch.cat([noise, noise]), torch.cat([timesteps, timesteps])
    noisy = scheduler.add_noise(latents, noise_wl, timesteps_wl)
    if scheduler.config.prediction_type == "epsilon":
        return noisy, noise
    return noisy, scheduler.get_velocity(latents, noise_wl, timesteps_wl)


def min_snr_weight(scheduler: DDPMScheduler, timesteps: Tensor, gamma: float) -> Tensor:
    """The min-SNR weight of each timestep's error (Hang et al. 2023, arXiv:2303.09556):
    min(SNR, gamma) / SNR to predict noise, min(SNR, gamma) / (SNR + 1) to predict v."""
    snr = compute_snr(scheduler, timesteps)
    divisor = snr if scheduler.config.prediction_type == "epsilon" else snr + 1
    return snr.clamp(max=gamma) / divisor


def inverted_pairs(
    args: argparse.Namespace,
    unet: UNet2DConditionModel,
    condition: dict[str, Any],
    latents: Tensor,
    timesteps: Tensor,
    scheduler: DDPMScheduler,
    seeds: list[int],
) -> tuple[Tensor, Tensor]:
    """As `noisy_pairs`, but each image's noise is the one that `unet` itself finds in it: noisy
    latents and targets, (2B, ...) both, at the pair's timestep.

    `timesteps` and what `scheduler` holds are best on the host, where they are looked at.
    """
    options = inversion_options(args)
    if args.inversion_eta:  # of a stream that Draws has not drawn from
        options["generator"] = torch.Generator().manual_seed(seeds[0] + 1)

    def model(x: Tensor, t: Tensor) -> Tensor:
        prediction: Tensor = unet(x, t, **condition).sample
        return prediction

    invert = INVERSIONS[args.inversion]
    return invert(model, latents, torch.cat([timesteps, timesteps]), scheduler, **options)


def frozen_copy(unet: UNet2DConditionModel, dtype: torch.dtype) -> UNet2DConditionModel:
    """A reference model: under autocast to `dtype` it predicts what `unet` does now, to the bit.

    What autocast rounds to `dtype` at every step is kept so; norms, which it does not, stay fp32.
    """
    reference = copy.deepcopy(unet).requires_grad_(False).eval()
    for module in reference.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.to(dtype)
    return reference
