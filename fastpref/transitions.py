"""Steps of samplers as Gaussian transitions, from a scheduler or its noise levels, for losses on
trajectories."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .arguments import check_number
from .context import onto, readable
from .gaussians import Transition as Transition
from .levels import (
    FLOW_PREDICTIONS,
    VARIANCE_PREDICTIONS,
    Affine,
    Prediction,
    Schedule,
    Steps,
    clean_and_noise,
    ddim_levels,
    flow_sigmas,
    lcm_levels,
    prediction,
    step_index,
    variance_sigmas,
)


def ddim(
    schedule: Schedule,
    step: Steps,
    *,
    eta: float = 1.0,
    prediction_type: Prediction | None = None,
) -> Transition:
    """The DDIM step from timestep t, at = alphas_cumprod[t], to an earlier one with ap.

    ::

        mu  = sqrt(ap) * x0_hat + sqrt(1 - ap - std^2) * noise_hat
        std = eta * sqrt((1 - ap) / (1 - at) * (1 - at / ap))

    Args:
        schedule: a scheduler of diffusers on which set_timesteps was called, which may be any that
            has alphas_cumprod, timesteps and num_inference_steps; without clip_sample (which
            DDIMScheduler has unless told otherwise; Stable Diffusion's has not) and thresholding.
            Or alphas_cumprod along the trajectory of n steps, (n + 1,), rising; fp32 or fp64.
        step: which step of the schedule, from 0 to n - 1: an int for the whole batch, or (B,) of
            them, one for each sample, in any order.
        eta: 1 is the published trainers'. From 0; with 0 no step has noise.
        prediction_type: what the model predicts: "epsilon", "v_prediction" or "sample" (x0). By
            default what the scheduler's config says, and "epsilon" where nothing does. With
            zero-terminal-SNR schedules, not "epsilon" at the first step.

    Returns: Transition, of () for an int and (B,) otherwise, on the device of a tensor step, else
        of the schedule. Computed in fp64, or in fp32 on devices without it; dt is 1.

    Raises: TypeError, ValueError; also for steps without noise, which have no log-probability, or
        without length, and for steps out of range, where step and schedule are on the CPU.
        Elsewhere reading them would wait for the device, and a step without noise contributes 0.

    Of a scheduler, the earlier timestep is max(t - T // n, 0), as in the trainers of D3PO, SPO, LPO
    and SDPO: below 0 they take alphas_cumprod[0], where diffusers' own step takes
    final_alpha_cumprod, which is never used here. A last step at t = 0 has no noise.

    Source: Song et al., arXiv:2010.02502, eq. 12 and 16; ddim_with_logprob_sdpo.py of
    github.com/ZiyiZhang27/sdpo, commit 2074bbde.
    """
    predicts = prediction(prediction_type, schedule, VARIANCE_PREDICTIONS, "ddim")
    at, ap = ddim_levels(schedule)
    eta = check_number("eta", eta, from_0=True)
    share = eta**2 * _ratio(ap - at, ap * (1 - at))  # of the variance, drawn anew
    share = torch.where(share > 1 + 1e-9, math.nan, share.clamp(max=1.0))
    clean, kept = ap.sqrt(), ((1 - ap) * (1 - share)).sqrt()
    ends = clean_and_noise(predicts, at.sqrt(), (1 - at).sqrt())
    return _build("ddim", step, ends, clean, kept, ((1 - ap) * share).sqrt())


def flow_sde(
    schedule: Schedule,
    step: Steps,
    *,
    noise_level: float = 0.7,
    prediction_type: Prediction = "velocity",
) -> Transition:
    """Flow-GRPO's SDE step, from sigma to sigma' = sigma - dt; also of MixGRPO, GRPO-Guard and
    Flow-DPPO.

    ::

        mu  = (1 - g^2 dt / (2 sigma)) x - (1 + g^2 (1 - sigma) / (2 sigma)) dt v
        std = g sqrt(dt),  g = noise_level * sqrt(sigma / (1 - sigma))

    Inside g alone, sigma = 1 is replaced by the schedule's second sigma, as published.

    Args:
        schedule: a scheduler with sigmas, such as FlowMatchEulerDiscreteScheduler, on which
            set_timesteps was called; or the sigmas along the trajectory of n steps, (n + 1,), from
            at most 1 down; fp32 or fp64.
        step: as in `ddim`.
        noise_level: from 0; 0.7 is published, 0.8 for Flow-GRPO-Fast.
        prediction_type: "velocity", which is noise - x0 (diffusers' "flow_prediction" is the same),
            "sample" (x0), or "epsilon" (the noise; not where sigma is 1).

    Returns, raises: as `ddim`; dt is sigma - sigma'.

    Source: Liu et al., arXiv:2505.05470; sd3_sde_with_logprob.py, lines 47-65, of
    github.com/yifan123/flow_grpo, commit 54809b5f.
    """
    predicts = prediction(prediction_type, schedule, FLOW_PREDICTIONS, "flow_sde")
    sigmas = flow_sigmas(schedule)
    inside = torch.where(sigmas[:-1] == 1, sigmas[1], sigmas[:-1])
    g = check_number("noise_level", noise_level, from_0=True) * (sigmas[:-1] / (1 - inside)).sqrt()
    return _flow("flow_sde", step, sigmas, g, predicts)


def dance_sde(
    schedule: Schedule,
    step: Steps,
    *,
    eta: float = 0.3,
    prediction_type: Prediction = "velocity",
) -> Transition:
    """DanceGRPO's SDE step: that of `flow_sde` with the constant g = eta, so std = eta sqrt(dt).

    Args:
        eta: from 0; 0.3 is published for FLUX, 0.25 for HunyuanVideo, 0.7 in MixGRPO.

        The others, result and errors are as in `flow_sde`. In MixGRPO's copy of this step the
        normaliser of the log-probability is a line of its own without effect; here it is included.

    Source: Xue et al., arXiv:2505.07818; flux_step and its like in fastvideo/train_grpo_*.py of
    github.com/XueZeyue/DanceGRPO.
    """
    predicts = prediction(prediction_type, schedule, FLOW_PREDICTIONS, "dance_sde")
    sigmas = flow_sigmas(schedule)
    g = sigmas.new_full((), check_number("eta", eta, from_0=True))
    return _flow("dance_sde", step, sigmas, g, predicts)


def cps(
    schedule: Schedule,
    step: Steps,
    *,
    noise_level: float = 0.7,
    prediction_type: Prediction = "velocity",
) -> Transition:
    """The step of coefficients-preserving sampling (CPS), from sigma to sigma'.

    ::

        mu  = (1 - sigma') x0_hat + sqrt(sigma'^2 - std^2) noise_hat
        std = sigma' sin(noise_level pi / 2)

    As published, its log-probability is -mean((x' - mu)^2), without 1 / (2 std^2) and normaliser:
    weight is 1 and normalized False. For that of the Gaussian,
    ``t._replace(weight=0.5 / t.std**2, normalized=True)``. (The KL divergence "published" is for
    the step as it comes; after that it would be times dt.)

    Args:
        noise_level: in [0, 1].

        The others, result and errors are as in `flow_sde`. The last step, to sigma' = 0, has no
        noise and is refused as `ddim` refuses its own.

    Source: sd3_sde_with_logprob.py of github.com/yifan123/flow_grpo, commit 54809b5f.
    """
    predicts = prediction(prediction_type, schedule, FLOW_PREDICTIONS, "cps")
    sigmas = flow_sigmas(schedule)
    sigma, after = sigmas[:-1], sigmas[1:]
    angle = check_number("noise_level", noise_level, from_0=True, most=1.0) * math.pi / 2
    ends = clean_and_noise(predicts, 1 - sigma, sigma)
    kept, std = math.cos(angle) * after, math.sin(angle) * after
    made = _build("cps", step, ends, 1 - after, kept, std, dt=sigma - after)
    return made._replace(
        weight=torch.ones_like(made.std).masked_fill(made.std == 0, 0.0), normalized=False
    )


def euler_ancestral(
    schedule: Schedule, step: Steps, *, prediction_type: Prediction | None = None
) -> Transition:
    """The ancestral Euler step from sigma to sigma', of x = x0 + sigma * noise.

    ::

        mu  = x0_hat + sigma'^2 / sigma * noise_hat
        std = sigma' sqrt(sigma^2 - sigma'^2) / sigma

    x is the sampler's own; the model's input is x / sqrt(sigma^2 + 1) (scale_model_input).

    Args:
        schedule: EulerAncestralDiscreteScheduler, on which set_timesteps was called; or the sigmas
            along the trajectory of n steps, (n + 1,), falling; fp32 or fp64.
        step: as in `ddim`.
        prediction_type: as in `ddim`. v is that of the model's input, as diffusers has it.

    Returns, raises: as `ddim`; dt is 1, because no published loss divides by this step's length.
    The last step, to sigma' = 0, has no noise: PSO trains 3 of SDXL-Turbo's 4.

    Source: diffusers; turbo_inference_with_logprob.py, lines 66-116, of
    github.com/ZichenMiao/Pairwise_Sample_Optimization, commit 85e09df8.
    """
    predicts = prediction(prediction_type, schedule, VARIANCE_PREDICTIONS, "euler_ancestral")
    sigmas = variance_sigmas(schedule)
    sigma, after = sigmas[:-1], sigmas[1:]
    left = _ratio(after, sigma)
    ends = clean_and_noise(predicts, torch.ones_like(sigma), sigma)
    std = left * (sigma.square() - after.square()).sqrt()
    return _build("euler_ancestral", step, ends, torch.ones_like(sigma), left * after, std)


def lcm(
    schedule: Schedule, step: Steps, *, prediction_type: Prediction | None = None
) -> Transition:
    """The step of consistency models, LCM and DMD2: to x0_hat, and back to the next level.

    ::

        mu  = sqrt(ap) * x0_hat,  std = sqrt(1 - ap)

    at the alphas_cumprod of a step's timestep and ap of the next step's.

    Args:
        schedule: as in `ddim`. With a scheduler, the last step goes to x0_hat and has no noise.
            diffusers' LCMScheduler (timestep_scaling in its config) also scales it at its boundary,
            x0_hat = c_out * x0_hat + c_skip * x, with its sigma_data of 0.5.
        step, prediction_type: as in `ddim`.

    Returns, raises: as `ddim`. Each sample gets noise of its own; PSO's code draws one noise for
    the whole batch.

    Source: diffusers; distilled_inference_with_logprob.py, lines 84-137, of
    github.com/ZichenMiao/Pairwise_Sample_Optimization, commit 85e09df8.
    """
    predicts = prediction(prediction_type, schedule, VARIANCE_PREDICTIONS, "lcm")
    at, ap, scaled = lcm_levels(schedule)
    clean, kept = ap.sqrt(), None
    if scaled is not None:
        denominator = scaled.square() + 0.25
        clean, kept = clean * scaled / denominator.sqrt(), clean * 0.25 / denominator
    ends = clean_and_noise(predicts, at.sqrt(), (1 - at).sqrt())
    return _build("lcm", step, ends, clean, torch.zeros_like(ap), (1 - ap).sqrt(), of_x=kept)


def _flow(name: str, step: Steps, sigmas: Tensor, g: Tensor, predicts: str) -> Transition:
    """The mean in terms of x0 and noise, by x = (1 - sigma) x0 + sigma noise, v = noise - x0."""
    sigma, dt = sigmas[:-1], -sigmas.diff()
    drift = g.square() * dt * _ratio(torch.ones_like(sigma), 2 * sigma)
    of_x, of_v = 1 - drift, -dt - drift * (1 - sigma)
    ends = clean_and_noise(predicts, 1 - sigma, sigma)
    clean, noise = of_x * (1 - sigma) - of_v, of_x * sigma + of_v
    return _build(name, step, ends, clean, noise, g * dt.sqrt(), dt=dt)


def _build(
    name: str,
    step: Steps,
    ends: tuple[Affine, Affine],
    clean: Tensor,
    noise: Tensor,
    std: Tensor,
    *,
    of_x: Tensor | None = None,
    dt: Tensor | None = None,
) -> Transition:
    """Of the steps asked for, out of all: mu = clean * x0_hat + noise * noise_hat + of_x * x."""
    x0, n = ends
    a = clean * x0.of_x + noise * n.of_x
    b = clean * x0.of_pred + noise * n.of_pred
    weight = torch.where(std == 0, 0.0, 0.5 / std.square())
    dt = torch.ones_like(std) if dt is None else dt
    table = torch.stack([a if of_x is None else a + of_x, b, std, dt, weight])
    index = step_index(step, table.shape[1])
    if readable(table) and readable(index):
        _check_noise(name, index, table)
    table = table.float()
    if isinstance(step, Tensor):
        table = onto(index.device, table)
    rows = table[:, step] if isinstance(step, int) else table[:, onto(table.device, index)]
    a, b, std, dt, weight = rows.unbind()
    return Transition(a, b, std, dt, weight)


def _check_noise(name: str, index: Tensor, table: Tensor) -> None:
    for i in dict.fromkeys(index.reshape(-1).tolist()):
        a, b, std, dt, _ = table[:, i].tolist()
        if not math.isfinite(std):
            raise ValueError(
                f"step contains {i}, where {name} would have noise of std {std}; expected levels "
                "(and for ddim an eta) at which there is that much"
            )
        if std == 0 or dt == 0:
            what = "adds no noise, so that it has no log-probability" if dt else "has no length"
            raise ValueError(
                f"step contains {i}, at which {name} {what}; expected steps with noise (take a "
                "last one without a transition)"
            )
        if not math.isfinite(a + b + std):
            raise ValueError(
                f"prediction_type says nothing of x0 at step {i} of {name}, which starts at noise "
                'without signal; expected "v_prediction", "velocity" or "sample"'
            )


def _ratio(upper: Tensor, lower: Tensor) -> Tensor:
    """upper / lower, and upper itself where lower is 0: 0 / 0 is 0."""
    return upper / torch.where(lower == 0, 1.0, lower)
