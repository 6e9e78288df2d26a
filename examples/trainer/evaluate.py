"""Knows how well a model tells winners from losers on pairs held out, at fixed noise and times."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from torch import Tensor

import fastpref
from trainer.data.pairs import PreferencePairs
from trainer.families.sdxl import Collator, Encoders, encode_images, encode_prompts, noisy_pairs


class Pairs(Protocol):
    """Pairs by (epoch, index), such as PreferencePairs."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]: ...


def share_of(lower: Tensor, upper: Tensor) -> Tensor:
    """1 where `lower` is the lower one, and 1/2 at a tie."""
    return (lower < upper).float() + 0.5 * (lower == upper).float()


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean and standard error over pairs (rows); a pair's draws are averaged first."""
    per_pair = values.mean(dim=1)
    return per_pair.mean().item(), per_pair.std().item() / math.sqrt(len(per_pair))


@dataclass
class Scores:
    """Errors and MaPO margin of each pair (row) at each draw of noise and timestep (column)."""

    mse_w: Tensor
    mse_l: Tensor
    margin: Tensor

    def wins(self) -> Tensor:
        """1 where the winner has the lower error, and 1/2 at a tie."""
        return share_of(self.mse_w, self.mse_l)

    def wins_against(self, base: Scores) -> Tensor:
        """1 where the winner's error fell more since `base` than the loser's, and 1/2 at a tie."""
        return share_of(self.mse_w - base.mse_w, self.mse_l - base.mse_l)

    def summary(self) -> dict[str, tuple[float, float]]:
        """Mean and standard error over pairs of accuracy, margin and errors."""
        columns = {"accuracy": self.wins(), "margin": self.margin}
        columns |= {"mse_w": self.mse_w, "mse_l": self.mse_l}
        return {name: mean_and_error(values) for name, values in columns.items()}

    def gain(self, before: Scores) -> tuple[float, float]:
        """Change of accuracy since `before` and its standard error, pair against pair."""
        return mean_and_error(self.wins() - before.wins())


@contextmanager
def evaluating(*models: torch.nn.Module) -> Iterator[None]:
    """The models in eval mode and without gradients; afterwards every part is as it was."""
    training = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in training:
            module.training = mode


class Encoded(NamedTuple):
    """A pair as the UNet sees it before noise, on the CPU; c captions, of the pair or of each."""

    latents: Tensor  # (2, C, h, w), the mean of the VAE's posterior
    time_ids: Tensor  # (2, 6)
    prompts: Tensor  # (c, tokens, width)
    pooled: Tensor  # (c, width)
    tokens: Tensor  # (c, text encoders, tokens); (c, 0) where the captions come from a cache


@torch.no_grad()
def encode_pairs(
    pairs: Pairs, indices: Sequence[int], encoders: Encoders, device: torch.device, batch_size: int
) -> tuple[dict[int, Encoded], list[str]]:
    """The pairs by index, and what `pairs` says of those it had to replace."""
    collate = Collator(encoders.tokenizers)
    encoded: dict[int, Encoded] = {}
    refused: list[str] = []
    for first in range(0, len(indices), batch_size):
        alike: dict[Any, dict[int, dict[str, Any]]] = {}
        for index in indices[first : first + batch_size]:
            pair = pairs[0, index]
            refused += pair["refused"]
            image = pair["mean_w"] if "mean_w" in pair else pair["pixels_w"]
            alike.setdefault((image.shape, "prompts" in pair), {})[index] = pair
        for members in alike.values():
            batch = collate(list(members.values()))
            if "mean" in batch:
                latents = batch["mean"]
            else:
                latents, _ = encode_images(encoders.vae, batch["pixels"].to(device))
            if "prompts" in batch:
                prompts, pooled = batch["prompts"], batch["pooled"]
                tokens = torch.empty(len(prompts), 0, dtype=torch.long)
            else:
                tokens = torch.stack(batch["input_ids"], dim=1).to(device)
                prompts, pooled = encode_prompts(encoders.text_encoders, tokens.unbind(dim=1))
            columns = [  # (2 or c, pairs, ...)
                column.cpu().unflatten(0, (-1, len(members)))
                for column in (latents, batch["time_ids"], prompts, pooled, tokens)
            ]
            for place, index in enumerate(members):
                # A view would keep the whole batch, and this is kept for the whole run.
                encoded[index] = Encoded(*(column[:, place].clone() for column in columns))
    return encoded, refused


def fixed_noise(seed: int, index: int, draw: int, shape: torch.Size) -> Tensor:
    """Noise of a pair's draw that nothing else has a part in, on the CPU."""
    (state,) = np.random.SeedSequence([seed, index, draw]).generate_state(1, np.uint64)
    return torch.randn(shape, generator=torch.Generator().manual_seed(int(state)))


def batches_of(encoded: Mapping[int, Encoded], batch_size: int) -> list[list[int]]:
    """The pairs' indices in batches of one size of image each."""
    alike: dict[torch.Size, list[int]] = {}
    for index, pair in encoded.items():
        alike.setdefault(pair.latents.shape, []).append(index)
    return [
        members[first : first + batch_size]
        for members in alike.values()
        for first in range(0, len(members), batch_size)
    ]


def score_encoded(
    unet: torch.nn.Module,
    encoded: Mapping[int, Encoded],
    batches: Sequence[Sequence[int]],
    scheduler: DDPMScheduler,
    device: torch.device,
    draws: int,
    seed: int,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    text_encoders: Sequence[torch.nn.Module] = (),
    beta: float = 0.1,
    snr: float = 0.5,
) -> dict[int, Tensor]:
    """mse_w, mse_l and margin of each pair, (draws, 3), on `device`.

    With `text_encoders` the captions are encoded anew, by these.
    """
    steps = scheduler.config.num_train_timesteps
    scored: dict[int, Tensor] = {}
    for batch in batches:
        pairs = [encoded[index] for index in batch]
        # Winners first, then losers.
        latents, time_ids, prompts, pooled, tokens = (
            torch.stack(column, dim=1).flatten(0, 1).to(device)
            for column in zip(*pairs, strict=True)
        )
        if text_encoders:
            prompts, pooled = encode_prompts(text_encoders, tokens.unbind(dim=1))
        if len(prompts) == len(batch):  # the pair shares its caption
            prompts, pooled = torch.cat([prompts, prompts]), torch.cat([pooled, pooled])
        latents = latents.float()
        outs = []
        for k in range(draws):
            noise = [fixed_noise(seed, index, k, latents.shape[1:]) for index in batch]
            timesteps = torch.full((len(batch),), int((k + 0.5) * steps / draws), device=device)
            noisy, target = noisy_pairs(
                latents, torch.stack(noise).to(device), timesteps, scheduler
            )
            with autocast():
                model_pred = unet(
                    noisy,
                    torch.cat([timesteps, timesteps]),
                    encoder_hidden_states=prompts,
                    added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids},
                ).sample.float()
            out = fastpref.mapo_loss(
                model_pred, target, beta=beta, snr=snr, num_train_timesteps=steps
            )
            outs.append(torch.stack([out.mse_w, out.mse_l, out.margin], dim=-1))
        scored |= zip(batch, torch.stack(outs, dim=1), strict=True)
    return scored


class HeldOut:
    """Held-out pairs, encoded once, to score a UNet on as often as a run likes.

    Every process encodes and scores its own share. Latents and conditioning wait on the CPU, which
    for SDXL at 1024 x 1024 costs 2*4*128*128*4 B + 77*2048*4 B = 1.2 MB a pair (less where the
    text encoders are in half precision, another 0.6 MB where losers have captions of their own).
    VAE and text encoders are not needed afterwards, nor at all where `pairs` come from a cache.
    Noise is fixed by (seed, pair, draw), whatever the batch size and the number of processes.
    What `pairs` could not open, and replaced, is told in `refused`, of this process's share.
    """

    def __init__(
        self,
        pairs: Pairs,
        encoders: Encoders,
        scheduler: DDPMScheduler,
        accelerator: Accelerator,
        batch_size: int,
        draws: int = 4,
        seed: int = 0,
    ) -> None:
        if len(pairs) < 2:
            raise ValueError(f"held out are {len(pairs)} pairs; need at least 2 to tell an error")
        if batch_size < 1 or draws < 1:
            raise ValueError(f"batch_size is {batch_size} and draws {draws}; need 1 or more")
        self.scheduler, self.accelerator = scheduler, accelerator
        self.count, self.draws, self.seed = len(pairs), draws, seed
        # All shares are as long: the last ones are filled up with the last pair, to be cut off.
        share = math.ceil(len(pairs) / accelerator.num_processes)
        first = share * accelerator.process_index
        self.indices = [min(i, len(pairs) - 1) for i in range(first, first + share)]
        self.encoded, self.refused = encode_pairs(
            pairs, sorted({*self.indices}), encoders, accelerator.device, batch_size
        )
        self.batches = batches_of(self.encoded, batch_size)
        # A sharded UNet is called by all processes or hangs: all call it as often.
        calls = torch.tensor([len(self.batches)], device=accelerator.device)
        most = int(accelerator.gather(calls).max())
        self.batches += self.batches[:1] * (most - len(self.batches))

    def score(self, unet: torch.nn.Module, text_encoders: Sequence[torch.nn.Module] = ()) -> Scores:
        """Scores of all pairs, in order, on every process, which all must call this.

        Text encoders come where they learn too; the captions are then encoded anew.
        """
        if text_encoders and not all(pair.tokens.numel() for pair in self.encoded.values()):
            raise ValueError("text_encoders came, but captions are from a cache; need one of them")
        with evaluating(unet, *text_encoders):
            scored = score_encoded(
                unet, self.encoded, self.batches, self.scheduler, self.accelerator.device,
                self.draws, self.seed, self.accelerator.autocast, text_encoders,
            )  # fmt: skip
        mine = torch.stack([scored[index] for index in self.indices])
        every = self.accelerator.gather(mine)[: self.count].cpu()
        return Scores(*every.unbind(dim=-1))

    @staticmethod
    def row(scores: Scores, base: Scores) -> dict[str, float]:
        """What a log says of the scores, in comparison with those of the model it began from.

        accuracy is the share of draws with mse_w < mse_l; accuracy_ref that where the winner's
        error fell more since the base than the loser's, which is DPO's implicit accuracy; drop_w
        and drop_l are the errors less the base's, negative where they fell; _se is a standard
        error over pairs.
        """
        columns = {
            "accuracy": scores.wins(),
            "accuracy_ref": scores.wins_against(base),
            "mse_w": scores.mse_w,
            "mse_l": scores.mse_l,
            "drop_w": scores.mse_w - base.mse_w,
            "drop_l": scores.mse_l - base.mse_l,
        }
        row: dict[str, float] = {}
        for name, values in columns.items():
            row[name], error = mean_and_error(values)
            if not name.startswith("mse"):  # which differs by far more from pair to pair
                row[f"{name}_se"] = error
        return row


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
    encoders = Encoders(
        pipeline.vae,
        [pipeline.tokenizer, pipeline.tokenizer_2],
        [pipeline.text_encoder, pipeline.text_encoder_2],
    )
    pairs = PreferencePairs(rows, [(resolution, resolution)], seed=seed)
    indices = range(len(pairs))
    encoded, _ = encode_pairs(pairs, indices, encoders, pipeline.device, batch_size)
    with evaluating(pipeline.unet):
        scored = score_encoded(
            pipeline.unet, encoded, batches_of(encoded, batch_size), scheduler, pipeline.device,
            draws, seed, beta=beta, snr=snr,
        )  # fmt: skip
    return Scores(*torch.stack([scored[index] for index in indices]).cpu().unbind(dim=-1))
