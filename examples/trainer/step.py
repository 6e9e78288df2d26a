"""The training step: the one place where a batch becomes a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from accelerate.utils import extract_model_from_parallel, send_to_device
from torch import Tensor

from trainer.families.family import Encoders, Family
from trainer.families.process import repeated
from trainer.families.vae import encode_images
from trainer.lora import without_adapters
from trainer.losses import Output
from trainer.objective import Objective


class Models(NamedTuple):
    """All that a batch passes on its way to the loss."""

    denoiser: Any
    encoders: Encoders  # what a batch out of a cache needs of them may be missing
    scheduler: Any
    frozen: Any = None  # the model before training, where it is not the denoiser without adapters
    text_learns: bool = False
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext


def training_step(
    family: Family, models: Models, objective: Objective, batch: Mapping[str, Any]
) -> Output:
    """The loss of a batch, as `Collator` stacks it, on the device of the denoiser.

    Both images of a pair see the same timestep and noise, unless --inversion finds them its own;
    all images of a list see the same timestep.
    """
    host_timesteps = batch["timesteps"]
    device = next(models.denoiser.parameters()).device
    batch = send_to_device(batch, device, non_blocking=True)
    timesteps = repeated(batch["timesteps"], batch["time_ids"])
    text_encoders = models.encoders.text_encoders
    with torch.set_grad_enabled(models.text_learns and torch.is_grad_enabled()):
        condition = condition_of(family, batch, text_encoders)

    def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
        return family.predict(models.denoiser, noisy, timesteps, condition)

    with torch.no_grad():
        latents = latents_of(batch, models.encoders.vae)
        if objective.inverts:
            noisy, target = objective.invert(predict, latents, host_timesteps, batch["seeds"])
        else:
            noisy, target = family.process.add_noise(
                latents, batch["noise"], batch["timesteps"], models.scheduler
            )
        ref_pred = None
        if objective.needs_reference:
            ref_pred = reference(family, models, batch, noisy, timesteps, condition)
        weight = objective.weight(models.scheduler, batch["timesteps"])
    with models.autocast():
        model_pred = predict(noisy, timesteps)
    return objective(model_pred, target, ref_pred, batch, sample_weight=weight)


def latents_of(batch: Mapping[str, Any], vae: Any) -> Tensor:
    """The latents (mB, ...) of a batch's images: as they come, or a sample of the VAE's posterior
    with noise that a pair or list shares."""
    if "latents" in batch:
        latents: Tensor = batch["latents"]
        return latents
    if "mean" in batch:
        mean, std = batch["mean"], batch["std"]
    else:
        mean, std = encode_images(vae, batch["pixels"])
    return mean + std * repeated(batch["vae_noise"], mean)


def condition_of(
    family: Family, batch: Mapping[str, Any], text_encoders: Sequence[Any]
) -> dict[str, Any]:
    """What the denoiser gets beside noisy latents and timesteps, for all images (mB, ...)."""
    if "text" in batch:
        text = batch["text"]
    else:
        text = family.encode_text(text_encoders, batch["input_ids"])
    time_ids = batch["time_ids"]
    # A pair may share its caption.
    text = {
        name: repeated(values, time_ids) if len(values) < len(time_ids) else values
        for name, values in text.items()
    }
    return family.condition(text, time_ids)


def reference(
    family: Family,
    models: Models,
    batch: Mapping[str, Any],
    noisy: Tensor,
    timesteps: Tensor,
    condition: Mapping[str, Any],
) -> Tensor:
    """What the model before training predicts."""
    if models.frozen is not None:
        with models.autocast():
            return family.predict(models.frozen, noisy, timesteps, condition)
    text_encoders = models.encoders.text_encoders
    learning = [models.denoiser, *(text_encoders if models.text_learns else [])]
    with without_adapters(*learning), models.autocast():
        if models.text_learns:
            condition = condition_of(family, batch, text_encoders)
        base = extract_model_from_parallel(models.denoiser)
        return family.predict(base, noisy, timesteps, condition)
