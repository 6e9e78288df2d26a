"""How well a model tells winners from losers on held-out pairs, at fixed noise and timesteps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor

import fastpref
from trainer.data.batches import Collator
from trainer.data.pairs import PreferencePairs
from trainer.families.family import Encoders, Family, denoiser_of, encoders_of
from trainer.families.vae import encode_images
from trainer.objective import objective_of
from trainer.step import Models, training_step


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


# A pair as the denoiser sees it before noise, on the CPU: latents (2, C, h, w), the mean of the
# VAE's posterior; time_ids (2, 6); text/NAME and, unless it is out of a cache, input_ids/NUMBER
# (c, ...), of the pair's caption or of each image's own.
Encoded: TypeAlias = dict[str, Tensor]


@torch.no_grad()
def encode_pairs(
    family: Family, pairs: Pairs, indices: Sequence[int], encoders: Encoders, device: torch.device,
    batch_size: int,
) -> tuple[dict[int, Encoded], list[str]]:  # fmt: skip
    """The pairs by index, and what `pairs` says of those it had to replace."""
    collate = Collator(family, encoders.tokenizers)
    encoded: dict[int, Encoded] = {}
    refused: list[str] = []
    for first in range(0, len(indices), batch_size):
        alike: dict[Any, dict[int, dict[str, Any]]] = {}
        for index in indices[first : first + batch_size]:
            pair = pairs[0, index]
            refused += pair["refused"]
            image = pair["mean_w"] if "mean_w" in pair else pair["pixels_w"]
            alike.setdefault((image.shape, "text" in pair), {})[index] = pair
        for members in alike.values():
            fields = encode_batch(family, collate(list(members.values())), encoders, device)
            columns = {  # (2 or c, pairs, ...)
                name: field.cpu().unflatten(0, (-1, len(members))) for name, field in fields.items()
            }
            for place, index in enumerate(members):
                # A view would keep the whole batch, and this is kept for the whole run.
                encoded[index] = {name: each[:, place].clone() for name, each in columns.items()}
    return encoded, refused


def encode_batch(
    family: Family, batch: Mapping[str, Any], encoders: Encoders, device: torch.device
) -> dict[str, Tensor]:
    """Latents, time ids, embeddings and tokens of a batch."""
    fields: dict[str, Tensor] = {"time_ids": batch["time_ids"]}
    if "mean" in batch:
        fields["latents"] = batch["mean"]
    else:
        fields["latents"], _ = encode_images(encoders.vae, batch["pixels"].to(device))
    if "text" in batch:
        text = batch["text"]
    else:
        ids = [each.to(device) for each in batch["input_ids"]]
        text = family.encode_text(encoders.text_encoders, ids)
        fields |= {f"input_ids/{i}": each for i, each in enumerate(ids)}
    return fields | {f"text/{name}": values for name, values in text.items()}


def fixed_noise(seed: int, index: int, draw: int, shape: torch.Size) -> Tensor:
    """Noise of a pair's draw that nothing else has a part in, on the CPU."""
    (state,) = np.random.SeedSequence([seed, index, draw]).generate_state(1, np.uint64)
    return torch.randn(shape, generator=torch.Generator().manual_seed(int(state)))


def batches_of(encoded: Mapping[int, Encoded], batch_size: int) -> list[list[int]]:
    """The pairs' indices in batches of one size of image each."""
    alike: dict[torch.Size, list[int]] = {}
    for index, pair in encoded.items():
        alike.setdefault(pair["latents"].shape, []).append(index)
    return [
        members[first : first + batch_size]
        for members in alike.values()
        for first in range(0, len(members), batch_size)
    ]


def score_encoded(
    family: Family,
    models: Models,
    encoded: Mapping[int, Encoded],
    batches: Sequence[Sequence[int]],
    draws: int,
    seed: int,
    beta: float = 0.1,
    snr: float = 0.5,
) -> dict[int, Tensor]:
    """mse_w, mse_l and margin of each pair, (draws, 3), on the denoiser's device.

    Where text encoders learn, the captions are encoded anew.
    """
    objective = objective_of("mapo", models.scheduler, beta=beta, snr=snr)
    device = next(models.denoiser.parameters()).device
    times = family.process.spread(models.scheduler, draws)
    scored: dict[int, Tensor] = {}
    for batch in batches:
        pairs = [encoded[index] for index in batch]
        fields = {  # winners first, then losers
            name: torch.stack([pair[name] for pair in pairs], dim=1).flatten(0, 1).to(device)
            for name in pairs[0]
        }
        made: dict[str, Any] = {
            "latents": fields["latents"].float(),
            "time_ids": fields["time_ids"],
        }
        if models.text_learns:
            made["input_ids"] = list(below("input_ids", fields).values())
        else:
            made["text"] = below("text", fields)
        outs = []
        for k in range(draws):
            shape = made["latents"].shape[1:]
            noise = torch.stack([fixed_noise(seed, index, k, shape) for index in batch])
            drawn = {"noise": noise, "timesteps": times[k].expand(len(batch))}
            out = training_step(family, models, objective, made | drawn)
            assert isinstance(out, fastpref.LossOutput)
            outs.append(torch.stack([out.mse_w, out.mse_l, out.margin], dim=-1))
        scored |= zip(batch, torch.stack(outs, dim=1), strict=True)
    return scored


def below(kind: str, fields: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The fields of this kind by what comes behind the slash."""
    prefix = f"{kind}/"
    return {n.removeprefix(prefix): value for n, value in fields.items() if n.startswith(prefix)}


class HeldOut:
    """Held-out pairs, encoded once, to score a denoiser on as often as a run likes.

    Every process encodes and scores its own share. Latents and conditioning wait on the CPU, which
    for SDXL at 1024 x 1024 costs 2*4*128*128*4 B + 77*2048*4 B = 1.2 MB a pair (less where the
    text encoders are in half precision, another 0.6 MB where losers have captions of their own).
    VAE and text encoders are not needed afterwards, nor at all where `pairs` come from a cache.
    Noise is fixed by (seed, pair, draw), whatever the batch size and the number of processes.
    What `pairs` could not open, and replaced, is told in `refused`, of this process's share.
    """

    def __init__(
        self,
        family: Family,
        pairs: Pairs,
        encoders: Encoders,
        accelerator: Accelerator,
        batch_size: int,
        draws: int = 4,
        seed: int = 0,
    ) -> None:
        if len(pairs) < 2:
            raise ValueError(f"held out are {len(pairs)} pairs; need at least 2 to tell an error")
        if batch_size < 1 or draws < 1:
            raise ValueError(f"batch_size is {batch_size} and draws {draws}; need 1 or more")
        self.family, self.accelerator = family, accelerator
        self.count, self.draws, self.seed = len(pairs), draws, seed
        # All shares are as long: the last ones are filled up with the last pair, to be cut off.
        share = math.ceil(len(pairs) / accelerator.num_processes)
        first = share * accelerator.process_index
        self.indices = [min(i, len(pairs) - 1) for i in range(first, first + share)]
        self.encoded, self.refused = encode_pairs(
            family, pairs, sorted({*self.indices}), encoders, accelerator.device, batch_size
        )
        self.batches = batches_of(self.encoded, batch_size)
        # A sharded denoiser is called by all processes or hangs: all call it as often.
        calls = torch.tensor([len(self.batches)], device=accelerator.device)
        most = int(accelerator.gather(calls).max())
        self.batches += self.batches[:1] * (most - len(self.batches))

    def score(self, models: Models) -> Scores:
        """Scores of all pairs, in order, on every process, which all must call this."""
        tokens = all("input_ids/0" in pair for pair in self.encoded.values())
        if models.text_learns and not tokens:
            raise ValueError("text encoders learn, but captions are from a cache; need one of them")
        learning = models.encoders.text_encoders if models.text_learns else []
        with evaluating(models.denoiser, *learning):
            scored = score_encoded(
                self.family, models, self.encoded, self.batches, self.draws, self.seed
            )
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
    family: Family,
    pipeline: Any,
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
    scheduler = family.process.scheduler.from_config(pipeline.scheduler.config)
    denoiser, encoders = denoiser_of(family, pipeline), encoders_of(family, pipeline)
    pairs = PreferencePairs(rows, [(resolution, resolution)], seed=seed)
    indices = range(len(pairs))
    encoded, _ = encode_pairs(family, pairs, indices, encoders, pipeline.device, batch_size)
    with evaluating(denoiser):
        scored = score_encoded(
            family, Models(denoiser, encoders, scheduler), encoded,
            batches_of(encoded, batch_size), draws, seed, beta, snr,
        )  # fmt: skip
    return Scores(*torch.stack([scored[index] for index in indices]).cpu().unbind(dim=-1))
