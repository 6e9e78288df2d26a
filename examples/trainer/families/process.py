"""The two ways of adding noise: DDPM, with a schedule of alphas, and flow matching."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from trainer.families.family import Config, Process

# Schedulers whose configuration says how a DDPM model was trained; the others (EDM, flow matching,
# consistency models) have sigmas of their own, which DDPMScheduler would ignore.
ALPHAS = {
    "DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler",
}  # fmt: skip


def check_alphas(config: Config) -> None:
    """Raise a ValueError for a scheduler that is not of a DDPM model of noise or velocity."""
    name = config.get("_class_name")
    if name not in ALPHAS or config.get("use_flow_sigmas"):
        raise ValueError(f"its scheduler is {name}; need one with betas, such as DDPMScheduler: "
                         "EDM and flow matching are not trained on a UNet here")  # fmt: skip
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(f"its prediction_type is {prediction!r}; need epsilon or v_prediction")


def draw_uniform(scheduler: Any, generator: torch.Generator) -> Tensor:
    return torch.randint(scheduler.config.num_train_timesteps, (), generator=generator)


def spread_uniform(scheduler: Any, count: int) -> Tensor:
    steps = scheduler.config.num_train_timesteps
    return torch.tensor([int((k + 0.5) * steps / count) for k in range(count)])


def repeated(values: Tensor, latents: Tensor) -> Tensor:
    """The values (B, ...) that the images of a pair or list share, for all its latents (mB, ...),
    first images first; values that are each image's own as they are."""
    return torch.cat([values] * (len(latents) // len(values)))


def add_noise(
    latents: Tensor, noise: Tensor, timesteps: Tensor, scheduler: Any
) -> tuple[Tensor, Tensor]:
    """sqrt(abar) x0 + sqrt(1 - abar) noise, and as target the noise, which a pair shares, or the
    velocity sqrt(abar) noise - sqrt(1 - abar) x0."""
    every, times = repeated(noise, latents), repeated(timesteps, latents)
    noisy = scheduler.add_noise(latents, every, times)
    if scheduler.config.prediction_type == "epsilon":
        return noisy, noise
    return noisy, scheduler.get_velocity(latents, every, times)


def min_snr(scheduler: Any, timesteps: Tensor, gamma: float) -> Tensor:
    """The min-SNR weight of each timestep's error (Hang et al. 2023, arXiv:2303.09556):
    min(SNR, gamma) / SNR to predict noise, min(SNR, gamma) / (SNR + 1) to predict v."""
    snr = compute_snr(scheduler, timesteps)
    divisor = snr if scheduler.config.prediction_type == "epsilon" else snr + 1
    return snr.clamp(max=gamma) / divisor


DDPM = Process(
    scheduler=DDPMScheduler, sampler=EulerDiscreteScheduler, check=check_alphas,
    draw=draw_uniform, spread=spread_uniform, add_noise=add_noise, has_alphas=True,
)  # fmt: skip


def check_flow(config: Config) -> None:
    """Raise a ValueError for a scheduler whose times do not follow from its shift alone."""
    name = config.get("_class_name")
    if name != "FlowMatchEulerDiscreteScheduler":
        raise ValueError(f"its scheduler is {name}; need FlowMatchEulerDiscreteScheduler")
    for flag in (
        "use_dynamic_shifting", "invert_sigmas", "shift_terminal", "use_karras_sigmas",
        "use_exponential_sigmas", "use_beta_sigmas",
    ):  # fmt: skip
        if config.get(flag):
            raise ValueError(f"its scheduler has {flag}={config[flag]!r}; need a constant shift")


def draw_logit_normal(scheduler: Any, generator: torch.Generator) -> Tensor:
    """A time by the density that SD3 was trained with (Esser et al. 2024, arXiv:2403.03206, mean 0
    and standard deviation 1), moved by the scheduler's shift. As in the scripts of diffusers and of
    Flow-DPO, it is one of the scheduler's own timesteps."""
    place = torch.sigmoid(torch.randn((), generator=generator)) * len(scheduler.timesteps)
    return scheduler.timesteps[int(place)]


def spread_shifted(scheduler: Any, count: int) -> Tensor:
    """As many timesteps, evenly spread before the scheduler's shift, the least noisy first."""
    steps = len(scheduler.timesteps)
    return scheduler.timesteps.flip(0)[[int((k + 0.5) * steps / count) for k in range(count)]]


def interpolate(
    latents: Tensor, noise: Tensor, timesteps: Tensor, scheduler: Any
) -> tuple[Tensor, Tensor]:
    """(1 - sigma) x0 + sigma noise with sigma = t / num_train_timesteps, and as target the velocity
    noise - x0."""
    every = repeated(noise, latents)
    sigma = repeated(timesteps, latents).to(latents.dtype) / scheduler.config.num_train_timesteps
    sigma = sigma.view(-1, *[1] * (latents.dim() - 1))
    return (1 - sigma) * latents + sigma * every, every - latents


FLOW = Process(
    scheduler=FlowMatchEulerDiscreteScheduler, sampler=FlowMatchEulerDiscreteScheduler,
    check=check_flow, draw=draw_logit_normal, spread=spread_shifted, add_noise=interpolate,
    has_alphas=False,
)  # fmt: skip
