"""Batches of pairs, samples or lists: stacked tensors, and what is drawn at random for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.families.family import Family


class Draws(NamedTuple):
    """What is random about an item beside its pictures: timestep, noise, and the VAE's sample."""

    family: Family
    scheduler: Any
    channels: int  # of the latents
    factor: int  # pixels per latent
    noises: int = 1  # 1 where the images of a pair share theirs, or one for each of a list

    def __call__(self, seeds: list[int], height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Noise (noises * B, channels, h, w), all first images' first, timesteps (B,) and the noise
        of the VAE's posterior (B, ...) for images of `height` x `width` pixels, each item's from
        its seed alone.

        Drawn on the CPU, so that every device sees the same numbers.
        """
        shape = (self.channels, height // self.factor, width // self.factor)
        noise, timesteps, posterior = [], [], []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            timesteps.append(self.family.process.draw(self.scheduler, generator))
            noise.append([torch.randn(shape, generator=generator) for _ in range(self.noises)])
            posterior.append(torch.randn(shape, generator=generator))
        members = [each for member in zip(*noise, strict=True) for each in member]
        return torch.stack(members), torch.stack(timesteps), torch.stack(posterior)


class Collator:
    """Stacks pairs into a batch, winners first; of samples or lists, all first images first.

    Images come as pixels, or as the mean and std of their latents; captions (one of each pair, or
    where losers have their own, all winners' and then all losers') as input_ids for each tokenizer,
    or as text, embeddings by name, where the pairs come from a cache. With `draws` the batch has
    the pairs' noise (B, ...), timesteps (B,) and vae_noise (B, ...), each from its pair's seed
    alone; of lists, noise (k * B, ...). Scores lie as the images do; samples have labels (B,).
    """

    def __init__(
        self, family: Family, tokenizers: Sequence[Any], draws: Draws | None = None
    ) -> None:
        self.family, self.tokenizers, self.draws = family, tokenizers, draws

    def __call__(self, pairs: list[dict[str, Any]]) -> dict[str, Any]:
        sides = [
            name.removeprefix("time_ids_") for name in pairs[0] if name.startswith("time_ids_")
        ]
        batch: dict[str, Any] = {
            name: torch.stack([pair[f"{name}_{side}"] for side in sides for pair in pairs])
            for name in ("pixels", "mean", "std", "time_ids")
            if f"{name}_{sides[0]}" in pairs[0]
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
        if f"score_{sides[0]}" in pairs[0]:
            scores = [pair[f"score_{side}"] for side in sides for pair in pairs]
            batch["scores"] = torch.tensor(scores)
        for column, name in (("sign", "sign"), ("label", "labels")):
            if column in pairs[0]:
                batch[name] = torch.tensor([pair[column] for pair in pairs])
        return batch
