"""Batches of pairs: stacked tensors, and what is drawn at random for each pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.families.family import Family


class Draws(NamedTuple):
    """What is random about a pair beside its picture: timestep, noise, and the VAE's sample."""

    family: Family
    scheduler: Any
    channels: int  # of the latents
    factor: int  # pixels per latent

    def __call__(self, seeds: list[int], height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Noise (B, channels, h, w), timesteps (B,) and the noise of the VAE's posterior for images
        of `height` x `width` pixels, each pair's from its seed alone.

        Drawn on the CPU, so that every device sees the same numbers.
        """
        shape = (self.channels, height // self.factor, width // self.factor)
        noise, timesteps, posterior = [], [], []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            timesteps.append(self.family.process.draw(self.scheduler, generator))
            noise.append(torch.randn(shape, generator=generator))
            posterior.append(torch.randn(shape, generator=generator))
        return torch.stack(noise), torch.stack(timesteps), torch.stack(posterior)


class Collator:
    """Stacks pairs into a batch, winners first.

    Images come as pixels, or as the mean and std of their latents; captions (one of each pair, or
    where losers have their own, all winners' and then all losers') as input_ids for each tokenizer,
    or as text, embeddings by name, where the pairs come from a cache. With `draws` the batch has
    the pairs' noise (B, ...), timesteps (B,) and vae_noise (B, ...), each from its pair's seed
    alone.
    """

    def __init__(
        self, family: Family, tokenizers: Sequence[Any], draws: Draws | None = None
    ) -> None:
        self.family, self.tokenizers, self.draws = family, tokenizers, draws

    def __call__(self, pairs: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {
            name: torch.stack([pair[f"{name}_{side}"] for side in "wl" for pair in pairs])
            for name in ("pixels", "mean", "std", "time_ids")
            if f"{name}_w" in pairs[0]
        }
        kind = "text" if "text" in pairs[0] else "captions"
        halves = zip(*(pair[kind] for pair in pairs), strict=True)
        texts = [text for half in halves for text in half]
        if kind == "text":
            batch["text"] = {name: torch.stack([text[name] for text in texts]) for name in texts[0]}
        else:
            batch["input_ids"] = self.family.tokenize(self.tokenizers, texts)
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
