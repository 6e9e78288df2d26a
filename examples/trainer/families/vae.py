"""Images to latents and back, by an AutoencoderKL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.families.family import Config

VAE_BATCH = 4  # images that the VAE sees at a time: at 1024 x 1024 each takes gigabytes


def check_vae(config: Config) -> None:
    """Raise a ValueError for a VAE whose latents are in units that nothing here would read."""
    name = config.get("_class_name")
    if name != "AutoencoderKL":
        raise ValueError(f"its VAE is a {name}; need an AutoencoderKL")
    for statistics in ("latents_mean", "latents_std"):
        if config.get(statistics) is not None:
            raise ValueError(
                f"its VAE has {statistics}, by which its latents would have to be normalized; need "
                "one with a scaling_factor alone"
            )


def encode_images(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents of `pixels` (N, 3, H, W) in [-1, 1]: fp32, in the
    denoiser's units."""
    posteriors = [vae.encode(part.to(vae.dtype)).latent_dist for part in pixels.split(VAE_BATCH)]
    mean, std = (
        torch.cat([getattr(posterior, name) for posterior in posteriors]).float()
        for name in ("mean", "std")
    )
    mean = mean - (vae.config.shift_factor or 0.0)
    return mean * vae.config.scaling_factor, std * vae.config.scaling_factor


def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """The pixels of latents in the denoiser's units."""
    shifted = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    pixels: Tensor = vae.decode(shifted).sample
    return pixels
