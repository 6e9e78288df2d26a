"""Noise levels of a sampler's steps, read from a schedule, and what a model's prediction says of
clean latents and noise there."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .context import onto, readable

Prediction: TypeAlias = Literal["epsilon", "v_prediction", "sample", "velocity", "flow_prediction"]
Schedule: TypeAlias = Any  # a tensor, or a scheduler of diffusers, which need not be installed
Steps: TypeAlias = "int | Tensor | Sequence[int]"

VARIANCE_PREDICTIONS = ("epsilon", "v_prediction", "sample")
FLOW_PREDICTIONS = ("velocity", "flow_prediction", "sample", "epsilon")


class Affine(NamedTuple):
    """Something linear in the latents x and the model's prediction: of_x * x + of_pred * pred."""

    of_x: Tensor
    of_pred: Tensor


def flow_sigmas(schedule: Schedule) -> Tensor:
    """(n + 1,), from 1 or less down to 0 or more: x = (1 - sigma) * x0 + sigma * noise."""
    sigmas = _along("sigmas", schedule)
    if readable(sigmas) and not bool((sigmas.diff() <= 0).all() and 0 <= sigmas[-1] <= sigmas[0]):
        raise ValueError(f"schedule has sigmas {_ends(sigmas)}; expected none below 0 and no rise")
    if readable(sigmas) and sigmas[0] > 1:
        raise ValueError(
            f"schedule has sigmas {_ends(sigmas)}; expected none above 1, those of a flow model"
        )
    return sigmas


def variance_sigmas(schedule: Schedule) -> Tensor:
    """(n + 1,), down to 0 or more: x = x0 + sigma * noise."""
    sigmas = _along("sigmas", schedule)
    if not isinstance(schedule, Tensor) and readable(sigmas) and sigmas[0] <= 1:
        raise ValueError(
            f"schedule has sigmas {_ends(sigmas)}, those of a flow model; expected a scheduler of "
            "x = x0 + sigma * noise"
        )
    fits = (sigmas.diff() <= 0).all() & (sigmas[-1] >= 0) & sigmas.isfinite().all()
    if readable(sigmas) and not bool(fits):
        raise ValueError(f"schedule has sigmas {_ends(sigmas)}; expected none below 0 and no rise")
    return sigmas


def ddim_levels(schedule: Schedule) -> tuple[Tensor, Tensor]:
    """alphas_cumprod where each of n steps starts and where it ends, (n,) each."""
    if isinstance(schedule, Tensor):
        levels = _rising(_along("alphas_cumprod", schedule))
        return levels[:-1], levels[1:]
    abar, times = _training_levels(schedule)
    count = _steps_taken(schedule)
    config = getattr(schedule, "config", None)
    past = (times - getattr(config, "num_train_timesteps", abar.numel()) // count).clamp(min=0)
    return abar[times], abar[past]


def lcm_levels(schedule: Schedule) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `ddim_levels`, and the timesteps, times timestep_scaling, of a scheduler that has one. Of
    a scheduler, the last step ends at 1."""
    if isinstance(schedule, Tensor):
        levels = _rising(_along("alphas_cumprod", schedule))
        return levels[:-1], levels[1:], None
    abar, times = _training_levels(schedule)
    _steps_taken(schedule)
    levels = _rising(torch.cat([abar[times], abar.new_ones(1)]))
    scaling = getattr(getattr(schedule, "config", None), "timestep_scaling", None)
    scaled = None if scaling is None else times.to(abar.dtype) * scaling
    return levels[:-1], levels[1:], scaled


def clean_and_noise(predicts: str, signal: Tensor, noise: Tensor) -> tuple[Affine, Affine]:
    """The clean latents and the noise that a prediction means at x = signal * x0 + noise * n.

    ::

        epsilon:       x0 = (x - noise * pred) / signal     n = pred
        sample:        x0 = pred                            n = (x - signal * pred) / noise
        velocity:      x0 = x - noise * pred                n = x + signal * pred
        v_prediction:  x0 = signal * y - noise * pred / r   n = noise * y + signal * pred / r

    with r^2 = signal^2 + noise^2 and y = x / r^2. velocity is noise - x0, with signal + noise = 1.
    """
    one, zero = torch.ones_like(signal), torch.zeros_like(signal)
    if predicts == "epsilon":
        return Affine(1 / signal, -noise / signal), Affine(zero, one)
    if predicts == "sample":
        return Affine(zero, one), Affine(1 / noise, -signal / noise)
    if predicts in ("velocity", "flow_prediction"):
        return Affine(one, -noise), Affine(one, signal)
    square = signal.square() + noise.square()
    of_x, of_pred = torch.stack([signal, noise]) / square, torch.stack([-noise, signal])
    (clean_x, noise_x), (clean_p, noise_p) = of_x.unbind(), (of_pred / square.sqrt()).unbind()
    return Affine(clean_x, clean_p), Affine(noise_x, noise_p)


def prediction(value: object, schedule: Schedule, known: Sequence[str], sampler: str) -> str:
    """What the model predicts: as given, else what the scheduler's configuration says."""
    if value is None:
        config = getattr(schedule, "config", None)
        value = getattr(config, "prediction_type", None) or "epsilon"
    if value not in known:
        names = ", ".join(map(repr, known))
        raise ValueError(f"prediction_type is {value!r}; {sampler} expects one of {names}")
    return str(value)


def step_index(step: object, n_steps: int) -> Tensor:
    """Which steps, () or (B,) int64, on the device where they came; checked where that is cheap."""
    if isinstance(step, numbers.Integral) and not isinstance(step, bool):
        index = torch.tensor(int(step), device="cpu")
    elif isinstance(step, Tensor):
        index = step
    elif isinstance(step, Sequence) and not isinstance(step, (str, bytes)):
        if not all(isinstance(i, numbers.Integral) and not isinstance(i, bool) for i in step):
            raise TypeError(f"step contains {step!r}; expected ints")
        index = torch.tensor([int(i) for i in step], dtype=torch.int64, device="cpu")
    else:
        raise TypeError(
            f"step must be an int, or a tensor or sequence of them, got a {type(step).__name__}"
        )
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(f"step has dtype {index.dtype}; expected an integer dtype")
    if index.dim() > 1:
        raise ValueError(f"step has shape {tuple(index.shape)}; expected (), or (B,), one a sample")
    if readable(index):
        outside = [i for i in index.reshape(-1).tolist() if not 0 <= i < n_steps]
        if outside:
            raise ValueError(
                f"step contains {outside[0]}; expected 0 to {n_steps - 1}, the schedule's steps"
            )
    return index.to(torch.int64)


def _along(name: str, schedule: Schedule) -> Tensor:
    """The levels along a trajectory, precise."""
    levels = schedule if isinstance(schedule, Tensor) else getattr(schedule, name, None)
    if not isinstance(levels, Tensor):
        raise TypeError(
            f"schedule is a {type(schedule).__name__} without a tensor {name}; expected a "
            f"scheduler of diffusers that has one, or a 1-D tensor of the {name} along the "
            "trajectory"
        )
    if not isinstance(schedule, Tensor):
        times = getattr(schedule, "timesteps", None)
        unset = isinstance(times, Tensor) and levels.numel() != times.numel() + 1
        if unset or getattr(schedule, "num_inference_steps", 1) is None:
            raise ValueError(_UNSET)
    precise = _precise(name, levels)
    if precise.numel() < 2:
        raise ValueError(
            f"schedule has {name} of shape {tuple(levels.shape)}; expected (n + 1,), one more than "
            "there are steps"
        )
    return precise


_UNSET = "schedule has no steps yet; expected a scheduler on which set_timesteps was called"


def _precise(name: str, levels: Tensor) -> Tensor:
    """In fp64, except on devices that have none."""
    if levels.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"schedule has {name} in {levels.dtype}; expected float32 or float64, because a step "
            "is a small difference of levels"
        )
    if levels.dim() != 1 or levels.numel() == 0:
        raise ValueError(
            f"schedule has {name} of shape {tuple(levels.shape)}; expected one dimension"
        )
    return levels.detach().to(torch.float32 if levels.device.type == "mps" else torch.float64)


def _rising(abar: Tensor) -> Tensor:
    if readable(abar) and not bool((abar.diff() >= 0).all() and abar[0] >= 0 and abar[-1] <= 1):
        raise ValueError(
            f"schedule has alphas_cumprod {_ends(abar)} along the trajectory; expected values in "
            "[0, 1] that never fall"
        )
    return abar


def _training_levels(schedule: Schedule) -> tuple[Tensor, Tensor]:
    """alphas_cumprod of all timesteps of training, and the timesteps of the sampler's steps, where
    these are."""
    abar, times = (getattr(schedule, name, None) for name in ("alphas_cumprod", "timesteps"))
    if not isinstance(abar, Tensor) or not isinstance(times, Tensor):
        raise TypeError(
            f"schedule is a {type(schedule).__name__} without tensors alphas_cumprod and "
            "timesteps; expected a scheduler of diffusers that has both, or a 1-D tensor of the "
            "alphas_cumprod along the trajectory"
        )
    config = getattr(schedule, "config", None)
    for option in ("clip_sample", "thresholding"):
        if getattr(config, option, False):
            raise ValueError(
                f"schedule has {option}=True in its config; expected False, because a step that "
                "clips is not Gaussian around something linear in the prediction"
            )
    abar = _precise("alphas_cumprod", onto(times.device, abar))
    if readable(abar):
        if not bool((abar.diff() <= 0).all() and abar[-1] >= 0 and abar[0] <= 1):
            raise ValueError(
                f"schedule has alphas_cumprod {_ends(abar)}; expected values in [0, 1] that never "
                "rise"
            )
        if not bool(((times >= 0) & (times < abar.numel()) & (times == times.long())).all()):
            raise ValueError(
                f"schedule has timesteps {_ends(times)}; expected integers from 0 to "
                f"{abar.numel() - 1}, which alphas_cumprod has"
            )
    return abar, times.long()


def _steps_taken(schedule: Schedule) -> int:
    count = getattr(schedule, "num_inference_steps", None)
    if not isinstance(count, numbers.Integral) or count < 1:
        raise ValueError(_UNSET)
    return int(count)


def _ends(levels: Tensor) -> str:
    return f"from {float(levels[0]):.6g} to {float(levels[-1]):.6g}"
