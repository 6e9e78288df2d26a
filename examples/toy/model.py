"""The demo's model: a tiny pipeline whose autoencoder has been taught the pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from tqdm.auto import tqdm

from toy.tiny import tiny_sd3, tiny_sd15, tiny_sdxl
from trainer.data.pairs import PreferencePairs
from trainer.families.family import Family, denoiser_of
from trainer.files import whole_folder

SIZE = 32  # pixels; the VAE makes 16 x 16 latents of them
# Noise schedules are made for 128 x 128 latents, and the same noise hides a smaller picture more.
# So the latents of DDPM's families stand out more here than SDXL's, whose standard deviation is 1,
# and flow matching spends its time at less noise: by the rule that SD3's shift follows, the root of
# the ratio of pixels, 3 at 1024 would be .1 at 32.
LATENT_STD = {"sdxl": 4.0, "sd15": 4.0, "sd3": 1.0}


def make_pipeline(family: Family, seed: int) -> Any:
    """A tiny pipeline of the family with random weights."""
    side, vae = SIZE // 2, (16, 32)
    if family.name == "sd3":
        pipeline = tiny_sd3(
            heads=2, head_dim=32, layers=4, vae_channels=vae, latent_channels=4, sample_size=side,
            seed=seed,
        )  # fmt: skip
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=0.2)
        pipeline.tokenizer_3.model_max_length = 16  # CLIP sees captions whole; T5 costs time
        return pipeline
    build = {"sdxl": tiny_sdxl, "sd15": tiny_sd15}[family.name]
    return build((32, 64), vae_channels=vae, sample_size=side, seed=seed)


def make_model(family: Family, rows: Dataset, folder: Path, vae_steps: int, seed: int) -> None:
    """Save a pipeline whose VAE has learned the training pictures, and whose denoiser nothing."""
    pipeline = make_pipeline(family, seed)
    parameters = denoiser_of(family, pipeline).num_parameters()
    print(f"model: a {family.denoiser} of {parameters / 1e6:.1f} M parameters")
    pairs = PreferencePairs(rows, [(SIZE, SIZE)])
    pixels = torch.stack(
        [pairs[0, i][f"pixels_{side}"] for i in range(len(pairs)) for side in "wl"]
    )
    error = fit_vae(pipeline.vae, pixels, vae_steps, latent_std=LATENT_STD[family.name])
    print(f"vae: mean error {error / 2:.1%} of the range of a pixel")
    with whole_folder(folder) as aside:
        pipeline.save_pretrained(aside)


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
    last = vae.encoder.conv_out if vae.quant_conv is None else vae.quant_conv
    with torch.no_grad():
        last.bias[vae.config.latent_channels :] = -6.0
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
    if vae.config.shift_factor is not None:
        vae.register_to_config(shift_factor=latents.mean().item())
    return float(error)
