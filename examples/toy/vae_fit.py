"""Knows how to teach a small autoencoder the pictures it will have to encode, in half a minute."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from tqdm.auto import tqdm


def fit_vae(
    vae: AutoencoderKL,
    pixels: torch.Tensor,
    steps: int,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    kl_weight: float = 1e-4,
    latent_std: float = 1.0,
    seed: int = 0,
) -> float:
    """Train `vae` on `pixels` (N, 3, H, W) in [-1, 1], set its scaling factor, return the L1 error.

    The scaling factor brings the latents to a standard deviation of `latent_std`.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps + 1)
    # Latents begin nearly without noise: at its default, a variance of 1, they say too little.
    with torch.no_grad():
        vae.quant_conv.bias[vae.config.latent_channels :] = -6.0
    vae.train()
    crop = 32  # small windows are enough to learn local detail, and four times faster
    for _ in tqdm(range(steps), desc="vae", unit="step"):
        top, left = (
            int(torch.randint(side - crop + 1, (), generator=generator))
            for side in pixels.shape[-2:]
        )
        chosen = torch.randint(len(pixels), (batch_size,), generator=generator)
        images = pixels[chosen, :, top : top + crop, left : left + crop]
        posterior = vae.encode(images).latent_dist
        error = (vae.decode(posterior.sample(generator)).sample - images).abs().mean()
        loss = error + kl_weight * posterior.kl().mean() / posterior.mean[0].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    vae.eval()
    with torch.no_grad():
        latents = vae.encode(pixels[:256]).latent_dist.mean
    vae.register_to_config(scaling_factor=latent_std / latents.std().item())
    return float(error)
