"""Knows how well a pipeline tells winners from losers, on fixed pairs, noise and timesteps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from datasets import Dataset
from diffusers import DDPMScheduler, StableDiffusionXLPipeline

import fastpref
from pair_data import PreferencePairs
from sdxl import Collator, encode_images, encode_prompts, noisy_pairs


@dataclass
class Scores:
    """Errors and MaPO margin of each pair (row) at each draw of noise and timestep (column)."""

    mse_w: torch.Tensor
    mse_l: torch.Tensor
    margin: torch.Tensor

    def wins(self) -> torch.Tensor:
        """1 where the winner has the lower error, and 1/2 at a tie."""
        return (self.mse_w < self.mse_l).float() + 0.5 * (self.mse_w == self.mse_l).float()

    def summary(self) -> dict[str, tuple[float, float]]:
        """Mean and standard error over pairs; a pair's draws are averaged first."""
        columns = {
            "accuracy": self.wins(),
            "margin": self.margin,
            "mse_w": self.mse_w,
            "mse_l": self.mse_l,
        }
        summary = {}
        for name, values in columns.items():
            per_pair = values.mean(dim=1)
            error = per_pair.std().item() / math.sqrt(len(per_pair))
            summary[name] = (per_pair.mean().item(), error)
        return summary

    def gain(self, before: Scores) -> tuple[float, float]:
        """Change of accuracy since `before` and its standard error, pair against pair."""
        change = self.wins().mean(dim=1) - before.wins().mean(dim=1)
        return change.mean().item(), change.std().item() / math.sqrt(len(change))


@torch.no_grad()
def score_pairs(
    pipeline: StableDiffusionXLPipeline,
    rows: Dataset,
    resolution: int,
    draws: int = 8,
    batch_size: int = 24,
    seed: int = 0,
    beta: float = 0.1,
    snr: float = 0.5,
) -> Scores:
    """Score every pair at `draws` timesteps, evenly spaced, each with its own fixed noise.

    Two pipelines scored with the same `seed` see the same noise, so their scores can be compared
    pair by pair.
    """
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    steps = scheduler.config.num_train_timesteps
    pairs = PreferencePairs(rows, resolution, seed)
    collate = Collator([pipeline.tokenizer, pipeline.tokenizer_2])
    device, generator = pipeline.device, torch.Generator().manual_seed(seed)
    chunks: list[tuple[torch.Tensor, ...]] = []
    for first in range(0, len(pairs), batch_size):
        size = min(batch_size, len(pairs) - first)
        batch = collate([pairs[0, first + i] for i in range(size)])
        latents, _ = encode_images(pipeline.vae, batch["pixels"].to(device))
        encoders = [pipeline.text_encoder, pipeline.text_encoder_2]
        prompts, pooled = encode_prompts(encoders, [ids.to(device) for ids in batch["input_ids"]])
        condition = {
            "text_embeds": torch.cat([pooled, pooled]),
            "time_ids": batch["time_ids"].to(device),
        }
        outs = []
        for k in range(draws):
            noise = torch.randn((size, *latents.shape[1:]), generator=generator).to(device)
            timesteps = torch.full((size,), int((k + 0.5) * steps / draws), device=device)
            noisy, target = noisy_pairs(latents, noise, timesteps, scheduler)
            model_pred = pipeline.unet(
                noisy,
                torch.cat([timesteps, timesteps]),
                torch.cat([prompts, prompts]),
                added_cond_kwargs=condition,
            ).sample
            out = fastpref.mapo_loss(
                model_pred, target, beta=beta, snr=snr, num_train_timesteps=steps
            )
            outs.append((out.mse_w, out.mse_l, out.margin))
        chunks.append(tuple(torch.stack(column, dim=1) for column in zip(*outs, strict=True)))
    mse_w, mse_l, margin = (torch.cat(column).cpu() for column in zip(*chunks, strict=True))
    return Scores(mse_w, mse_l, margin)
