"""Inversion: which noisy latents a model itself puts on the way to an image, and the target that
belongs to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, get_args

import torch
from torch import Tensor

from .arguments import check_count, check_number
from .context import onto

Model: TypeAlias = Callable[[Tensor, Tensor], Tensor]
PredictionType: TypeAlias = Literal["epsilon", "v_prediction", "sample"]


class Scheduler(Protocol):
    """What is read of a diffusers scheduler: `alphas_cumprod` and `config.prediction_type`."""

    alphas_cumprod: Tensor
    config: Any


Schedule: TypeAlias = "Tensor | Scheduler"


class Inverted(NamedTuple):
    """Latents inverted to their timesteps, and what a model should predict there. No gradient.

    noisy: x_t, with the shape and dtype of the latents: the input of the training step.
    target: tau_t for epsilon prediction, or the same point in the terms of another prediction type
        (see `inversion_target`). Same shape; fp32, fp64 for fp64 latents.
    """

    noisy: Tensor
    target: Tensor


@torch.no_grad()
def ddim_inversion(
    model: Model,
    latents: Tensor,
    timesteps: Tensor,
    schedule: Schedule,
    *,
    num_steps: int = 10,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
    prediction_type: PredictionType | None = None,
) -> Inverted:
    """DDIM inversion: latents as the model's own sampler would have passed them at `timesteps`.

    Every sample walks from clean, abar = 1, to its own t in `num_steps` steps. With abar_a where a
    step starts and abar_b where it ends::

        x_b     = sqrt(abar_b) * x0_hat + sqrt(1 - abar_b) * eps_hat  [+ eta * sigma_b * noise]
        x0_hat  = (x_a - sqrt(1 - abar_a) * eps_hat) / sqrt(abar_a)
        eps_hat = the model's noise at (x_a, (a + b) // 2), or half of it at (x0, b) in step 1
        sigma_b = sqrt((1 - abar_a) / (1 - abar_b) * (1 - abar_b / abar_a))

    Over a step the model's noise grows mostly because the noise level does, so the level in the
    middle stands for the whole step best. (diffusers told the model a before 0.22 and tells it b
    since.) Clean latents have no noise in them and no timestep, so the first step takes the mean of
    0 and the noise where it ends. A prediction of v or x0 is read at the timestep that the model
    was told: one model gives the same latents in any of its parametrisations.

    Step k of K ends on the timestep whose angle, arctan(sqrt((1 - abar) / abar)), is nearest to
    (k / K)^1.5 of t's angle: steps are short near clean, where fine detail is decided. The last
    one ends on t, so `target` belongs to `noisy`. At a small t, steps that round to the same
    timestep move nothing.

    Args:
        model: ``model(x, t) -> prediction``: x (B, ...) of latents' dtype, t (B,) int64, result of
            x's shape. A closure holds the prompts and calls the network the way training does:
            ``lambda x, t: unet(x, t, prompts, added_cond_kwargs=extra).sample``. Called
            `num_steps` times under torch.no_grad, in the autocast around this call.
        latents: x0, (B, ...), clean, scaled as the model takes them. Any rank from 2; fp32, fp16,
            bf16 or fp64. For pairs: stacked, winners first.
        timesteps: (B,), any integer dtype, on any device, each from 0 to T - 1. For pairs that
            share theirs: ``timesteps.repeat(2)``.
        schedule: a diffusers scheduler (only `alphas_cumprod` and `config.prediction_type` are
            read), or alphas_cumprod itself, (T,), fp32 or fp64. Half precision is refused: in fp16
            1 - abar is off by 15 % at t = 0 of SDXL's schedule.
        num_steps: steps per sample, from 1. The error against the model's ODE falls as 1/num_steps;
            benchmarks/inversion_error.py measures it for 10.
        eta: weight of fresh noise, from 0. InPO has 0.1. sigma_b is DDIM's, of the same step of the
            sampler, so a first step adds none. The noise comes on top: x_t gets more variance.
        generator: of that noise, on any device.
        prediction_type: what the model predicts; by default what the scheduler's config says.

    Returns:
        Inverted. Factors are computed in fp64; latents on the way are fp32 (fp64 for fp64 latents),
        target is taken from them, and only noisy, and what the model gets, is rounded to latents'
        dtype. With half-precision latents that target is better than `inversion_target`'s of noisy.

    Raises:
        TypeError, ValueError: bad input; it names the argument, what came and what is needed.
            timesteps and schedule are checked by value, on the host: one wait for the device each,
            if they are there.

    Source: Song et al., "Denoising Diffusion Implicit Models", arXiv:2010.02502, eq. 12 and 16; its
    use and eta: Lu et al., "InPO", arXiv:2503.18454, and train.py of github.com/JaydenLyh/InPO. On
    purpose unlike that code, which

    - ends on a point of a fixed grid, up to 100 timesteps off t, with its target taken at t;
    - sends the whole batch to the first sample's t;
    - spaces its grid evenly in t: the first of 10 steps covers a fifth of the angle to t = 999;
    - starts from abar_0, not 1, where the scheduler has set_alpha_to_one=False.

    Which grid that is, whether the model is told a or b, and sigma depend there on diffusers'
    version: DDIMInverseScheduler changed in 0.22. Before, sigma was the one above; since, that code
    takes the next step's, which for t > 901 lies beyond the schedule (IndexError). What the paper
    itself says of eta could not be checked.
    """
    return _invert(
        model,
        latents,
        timesteps,
        schedule,
        prediction_type,
        num_steps=check_count("num_steps", num_steps),
        eta=check_number("eta", eta, from_0=True),
        generator=generator,
    )


@torch.no_grad()
def renoise_inversion(
    model: Model,
    latents: Tensor,
    timesteps: Tensor,
    schedule: Schedule,
    *,
    num_steps: int = 10,
    num_evals: int = 2,
    average_last: int | None = None,
    prediction_type: PredictionType | None = None,
) -> Inverted:
    """ReNoise inversion: DDIM inversion whose steps use the noise where they end as well.

    A step from x_a to x_b, with step(x_a, eps) that of `ddim_inversion` and on its grid::

        eps[1] = the model's noise at (x_a, a); 0 in the first step, where x_a is clean
        eps[i] = the model's noise at (step(x_a, eps[i - 1]), b)      i = 2 .. num_evals
        x_b    = step(x_a, mean of the last average_last of eps[1 ..])

    By default that is the mean of both ends of the step, Heun's method: the error against the
    model's ODE falls as 1/num_steps^2. With average_last=1 and many evaluations x_b is instead what
    a DDIM sampling step turns into x_a exactly, and sampling back on the same grid returns to x0.
    The default does not: it misses x0 by that sampler's own error.

    Args:
        num_evals: evaluations of the model per step, from 1 (then it is DDIM inversion with eta 0).
            From 2 on the first step needs one less: num_steps * num_evals - 1 in all.
        average_last: how many of them are averaged, from 1 to num_evals; None for all.

        The defaults are SmPO's. All else, result and errors are as in `ddim_inversion`.

    Source: Garibi et al., "ReNoise", arXiv:2403.14602, without its noise regularisation and noise
    correction; its use: Lu et al., "SmPO-Diffusion", arXiv:2506.02698, and train.py of
    github.com/JaydenLyh/SmPO (10 steps for SDXL, 5 for SD1.5, no guidance). On purpose unlike both
    codes, which tell the model one timestep for both evaluations of a step: b in ReNoise's, and in
    SmPO's what its diffusers says (it pins 0.20, which says a, negative in the first step; from
    0.22 on b). Their mean is of first order. What `ddim_inversion` says of InPO's code holds for
    SmPO's too. With diffusers from 0.22 on it stops up to 100 timesteps short of t, and at some t
    the noise that is missing makes up for what its coarse steps add too much.
    """
    num_evals = check_count("num_evals", num_evals)
    last = num_evals if average_last is None else check_count("average_last", average_last)
    if last > num_evals:
        raise ValueError(f"average_last is {last}; expected at most num_evals, {num_evals}")
    return _invert(
        model,
        latents,
        timesteps,
        schedule,
        prediction_type,
        num_steps=check_count("num_steps", num_steps),
        num_evals=num_evals,
        average_last=last,
    )


@torch.no_grad()
def inversion_target(
    noisy: Tensor,
    latents: Tensor,
    timesteps: Tensor,
    schedule: Schedule,
    *,
    prediction_type: PredictionType | None = None,
) -> Tensor:
    """What a model should predict at noisy latents x_t for them to come from the latents x0.

    ::

        epsilon:       tau_t = (x_t - sqrt(abar_t) * x0) / sqrt(1 - abar_t)
        v_prediction:  sqrt(abar_t) * tau_t - sqrt(1 - abar_t) * x0
        sample:        x0

    so that x_t = sqrt(abar_t) * x0 + sqrt(1 - abar_t) * tau_t. InPO's and SmPO's codes have the
    first only; the others are the same point in other terms. prediction_type="epsilon" gives tau_t
    whatever the model predicts.

    Args:
        noisy, latents: x_t and x0, (B, ...) of one shape on one device, any floating dtypes.
        timesteps, schedule, prediction_type: as in `ddim_inversion`.

    Returns:
        (B, ...) in fp32 (fp64 if either is fp64). It divides by sqrt(1 - abar_t), 0.029 at t = 0
        of SDXL's schedule, so rounding errors come out 34 times larger there: some 4e-6 of |x0| in
        fp32, but up to 1.7 % of it if noisy was rounded to fp16 and 13 % if to bf16, where tau_t of
        inverted latents may itself be a few percent. `Inverted.target` is free of that.

    Source: as `ddim_inversion` and `renoise_inversion`; both codes divide by an fp16
    sqrt(1 - abar).
    """
    work = _check_latents("latents", latents)
    work = torch.promote_types(work, _check_latents("noisy", noisy))
    if noisy.shape != latents.shape or noisy.device != latents.device:
        raise ValueError(
            f"noisy is {tuple(noisy.shape)} on {noisy.device}, but latents are "
            f"{tuple(latents.shape)} on {latents.device}; expected the same shape and device"
        )
    abar, predicts = _check_schedule(schedule, prediction_type)
    times = _check_timesteps(timesteps, latents.shape[0], abar.numel())
    return _target(noisy.to(work), latents.to(work), abar[times], predicts)


class _Point(NamedTuple):
    """Where the model is told that its input lies; the factors are shaped to multiply latents."""

    timestep: Tensor  # (B,)
    signal: Tensor  # sqrt(abar)
    noise: Tensor  # sqrt(1 - abar)


class _Step(NamedTuple):
    """One step of every sample; the factors are shaped to multiply latents."""

    start: _Point
    middle: _Point
    end: _Point
    keep: Tensor  # of the latents
    add: Tensor  # of the noise that the model predicts
    sigma: Tensor  # of the fresh noise, for eta = 1

    def __call__(self, x: Tensor, eps: Tensor) -> Tensor:
        return self.keep * x + self.add * eps


def _invert(
    model: Model,
    latents: Tensor,
    timesteps: Tensor,
    schedule: Schedule,
    prediction_type: PredictionType | None,
    *,
    num_steps: int,
    num_evals: int = 1,
    average_last: int = 1,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
) -> Inverted:
    if not callable(model):
        raise TypeError(f"model must be a callable model(x, t), got a {type(model).__name__}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got a {type(generator).__name__}")
    work = _check_latents("latents", latents)
    abar, predicts = _check_schedule(schedule, prediction_type)
    times = _check_timesteps(timesteps, latents.shape[0], abar.numel())
    x = clean = latents.to(work)

    def noise(x: Tensor, told: _Point) -> Tensor:
        return _epsilon(model, x, told, latents.dtype, predicts)

    for k, step in enumerate(_steps(abar, times, num_steps, clean)):
        if num_evals > 1:
            found = [noise(x, step.start) if k else torch.zeros_like(x)]
            while len(found) < num_evals:
                found.append(noise(step(x, found[-1]), step.end))
            eps = torch.stack(found[-average_last:]).mean(0)
        else:
            eps = noise(x, step.middle) if k else noise(x, step.end) / 2
        x = step(x, eps)
        if eta:
            x = x + eta * step.sigma * _randn_like(x, generator)
    return Inverted(x.to(latents.dtype), _target(x, clean, abar[times], predicts))


def _steps(abar: Tensor, timesteps: Tensor, num_steps: int, like: Tensor) -> list[_Step]:
    """The way from clean to each sample's timestep. `abar` and `timesteps` are on the host, where
    fp64 costs nothing; the factors get `like`'s device and dtype."""
    grid = _grid(abar, timesteps, num_steps)
    told = torch.stack([grid[:-1], (grid[:-1] + grid[1:]) // 2, grid[1:]], dim=1).clamp(min=0)
    levels = torch.cat([abar.new_ones(1), abar])[grid + 1]  # clean counts as timestep -1
    start, end = levels[:-1], levels[1:]
    ratio = torch.where(start == end, 1.0, end / start)  # 1, not 0/0, on pure noise
    keep = ratio.sqrt()
    add = (1 - end).sqrt() - keep * (1 - start).sqrt()
    sigma = ((1 - start) / (1 - end) * (1 - ratio)).sqrt()
    at = abar[told]
    factors = torch.cat([at.sqrt(), (1 - at).sqrt(), torch.stack([keep, add, sigma], 1)], dim=1)
    factors = factors.to(like.dtype)
    factors = onto(like.device, factors.reshape(*factors.shape, *[1] * (like.dim() - 1)))
    steps = []
    for where, f in zip(onto(like.device, told), factors, strict=True):
        first, middle, last = map(_Point, where, f[:3], f[3:6])
        steps.append(_Step(first, middle, last, f[6], f[7], f[8]))
    return steps


def _grid(abar: Tensor, timesteps: Tensor, num_steps: int) -> Tensor:
    """(num_steps + 1, B), the timesteps where each sample's steps end, after a first row of -1."""
    angles = torch.atan2((1 - abar).sqrt(), abar.sqrt())
    share = torch.arange(num_steps + 1, dtype=abar.dtype, device=abar.device)[:, None] / num_steps
    grid = torch.searchsorted((angles[1:] + angles[:-1]) / 2, share**1.5 * angles[timesteps])
    grid = torch.minimum(grid, timesteps)
    grid[0], grid[-1] = -1, timesteps
    return grid


def _epsilon(model: Model, x: Tensor, told: _Point, dtype: torch.dtype, predicts: str) -> Tensor:
    """The noise in x by the model, which is told that x lies at `told`."""
    pred = model(x.to(dtype), told.timestep)
    if not isinstance(pred, Tensor):
        sample = ", such as its .sample" if hasattr(pred, "sample") else ""
        raise TypeError(f"model returned a {type(pred).__name__}; expected a tensor{sample}")
    if pred.shape != x.shape or not pred.is_floating_point():
        raise ValueError(
            f"model returned {pred.dtype} of shape {tuple(pred.shape)}; expected a floating "
            f"dtype and the shape of latents, {tuple(x.shape)}"
        )
    pred = pred.to(x.dtype)
    if predicts == "v_prediction":
        return told.signal * pred + told.noise * x
    return (x - told.signal * pred) / told.noise if predicts == "sample" else pred


def _target(noisy: Tensor, clean: Tensor, abar: Tensor, predicts: str) -> Tensor:
    if predicts == "sample":
        return clean.clone()
    factors = torch.stack([abar.sqrt(), (1 - abar).sqrt()]).to(clean.dtype)
    signal, noise = onto(clean.device, factors.reshape(2, -1, *[1] * (clean.dim() - 1)))
    tau = (noisy - signal * clean) / noise
    return tau if predicts == "epsilon" else signal * tau - noise * clean


def _randn_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    device = x.device if generator is None else generator.device
    noise = torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype)
    return onto(x.device, noise)


def _check_latents(name: str, value: object) -> torch.dtype:
    """The dtype to compute in."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got a {type(value).__name__}")
    if value.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise TypeError(
            f"{name} has dtype {value.dtype}; expected float32, float16, bfloat16 or float64"
        )
    if value.dim() < 2 or value.numel() == 0:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; expected at least two dimensions, "
            "(samples, ...), and one element"
        )
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def _check_timesteps(value: object, n_samples: int, n_timesteps: int) -> Tensor:
    """(B,) int64 on the host."""
    if not isinstance(value, Tensor):
        raise TypeError(f"timesteps must be a torch.Tensor, got a {type(value).__name__}")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"timesteps has dtype {value.dtype}; expected an integer dtype")
    if value.shape != (n_samples,):
        raise ValueError(
            f"timesteps has shape {tuple(value.shape)}; expected one per sample of latents, "
            f"({n_samples},)"
        )
    times = value.to("cpu", torch.int64)
    low, high = int(times.min()), int(times.max())
    if low < 0 or high >= n_timesteps:
        raise ValueError(
            f"timesteps go from {low} to {high}; expected 0 to {n_timesteps - 1}, the schedule's"
        )
    return times


def _check_schedule(schedule: object, prediction_type: object) -> tuple[Tensor, str]:
    """alphas_cumprod in fp64 on the host, and what the model predicts."""
    abar = schedule if isinstance(schedule, Tensor) else getattr(schedule, "alphas_cumprod", None)
    if not isinstance(abar, Tensor):
        raise TypeError(
            f"schedule is a {type(schedule).__name__} without a tensor alphas_cumprod; expected a "
            "diffusers scheduler that has one, or a 1-D tensor of them"
        )
    if abar.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"schedule has alphas_cumprod in {abar.dtype}; expected float32 or float64, "
            "because 1 - alphas_cumprod is lost in less"
        )
    if abar.dim() != 1 or abar.numel() == 0:
        raise ValueError(
            f"schedule has alphas_cumprod of shape {tuple(abar.shape)}; "
            "expected one dimension, (timesteps,)"
        )
    abar = abar.to("cpu", torch.float64)
    if not bool(((abar >= 0) & (abar < 1)).all() and (abar.diff() <= 0).all()):
        raise ValueError(
            f"schedule has alphas_cumprod from {float(abar[0]):.6g} to {float(abar[-1]):.6g}; "
            "expected values below 1 that never rise and never fall below 0"
        )
    if prediction_type is None:
        prediction_type = getattr(getattr(schedule, "config", None), "prediction_type", None)
    if prediction_type not in get_args(PredictionType):
        known = ", ".join(map(repr, get_args(PredictionType)))
        raise ValueError(f"prediction_type is {prediction_type!r}; expected one of {known}")
    return abar, str(prediction_type)
