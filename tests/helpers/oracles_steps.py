"""The published losses on a sampler's steps, and DiffusionNFT's, each written down once in fp64: on
whole tensors, as the frameworks have them, with gradients by autograd.

Independent of the package: nothing here imports fastpref. Log-probabilities of the other policy are
given, because frameworks store them; `log_prob` is how they come about.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from oracles import Truth


class Step(NamedTuple):
    """fp64: latents before and after, (B, elements), and of each sample, (B, 1), the numbers of
    x' = a x + b pred + std z. cps: whether log-probabilities are without 1 / (2 std^2) and
    normaliser. mask: weights of the elements."""

    x: Tensor
    x_next: Tensor
    a: Tensor
    b: Tensor
    std: Tensor
    dt: Tensor
    cps: bool = False
    mask: Tensor | None = None

    def mean_of(self, pred: Tensor) -> Tensor:
        return self.a * self.x + self.b * pred

    @property
    def std_dev_t(self) -> Tensor:
        """What Flow-GRPO's step returns: g of the SDE, std = g sqrt(dt), but std itself for CPS."""
        return self.std if self.cps else self.std / self.dt.sqrt()


class Found(NamedTuple):
    losses: Tensor
    log_ratio: Tensor
    clipped: Tensor
    kl: Tensor | None = None
    margin: Tensor | None = None


def mean(elements: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B,) over the elements, or over what a mask leaves of them."""
    if mask is None:
        return elements.mean(1)
    size = mask.sum(1)
    total = (mask * torch.where(mask == 0, 0.0, elements)).sum(1)
    return torch.where(size == 0, 0.0, total / torch.where(size == 0, 1.0, size))


def log_prob(step: Step, pred: Tensor) -> Tensor:
    off = (step.x_next.detach() - step.mean_of(pred)).square()
    if step.cps:
        return mean(-off, step.mask)
    density = -off / (2 * step.std**2) - torch.log(step.std) - 0.5 * math.log(2 * math.pi)
    return mean(density, step.mask)


# A step against the old policy's ------------------------------------------------------------------


def _clipped_ratio(
    ratio: Tensor, advantage: Tensor, low: Any, high: Any, limit: float
) -> tuple[Tensor, Tensor]:
    advantage = advantage.clamp(-limit, limit)
    low, high = (torch.as_tensor(c, dtype=torch.float64) for c in (low, high))
    bounded = torch.clamp(ratio, 1 - low, 1 + high)
    losses = torch.maximum(-advantage * ratio, -advantage * bounded)
    out = ((advantage > 0) & (ratio > 1 + high)) | ((advantage < 0) & (ratio < 1 - low))
    return losses, out.double()


def flow_grpo(
    step: Step, pred: Tensor, old: Tensor, old_log_prob: Tensor, ref: Tensor | None,
    advantage: Tensor, clip_range: Any = 1e-4, advantage_clip: float = 5.0, kl_weight: Any = 0.0,
) -> Found:  # fmt: skip
    """yifan123/flow_grpo scripts/train_sd3.py; also DanceGRPO's and MixGRPO's, without KL."""
    log_ratio = log_prob(step, pred) - old_log_prob
    losses, out = _clipped_ratio(
        torch.exp(log_ratio), advantage, clip_range, clip_range, advantage_clip
    )
    if ref is None:
        return Found(losses, log_ratio, out)
    moved = (step.mean_of(pred) - step.mean_of(ref)).square()
    kl = mean(moved / (2 * step.std_dev_t**2), step.mask)
    return Found(losses + kl_weight * kl, log_ratio, out, kl)


def flow_factory(kind: str) -> Callable[..., Found]:
    """X-GenGroup/Flow-Factory grpo.py: two clips, and KL "x-based" or "v-based". "gaussian": that
    of the two steps' distributions, a mean over elements."""

    def loss(
        step: Step, pred: Tensor, old: Tensor, old_log_prob: Tensor, ref: Tensor,
        advantage: Tensor, clip_range: Any, clip_range_high: Any, advantage_clip: float = 5.0,
        kl_weight: Any = 0.0,
    ) -> Found:  # fmt: skip
        log_ratio = log_prob(step, pred) - old_log_prob
        losses, out = _clipped_ratio(
            torch.exp(log_ratio), advantage, clip_range, clip_range_high, advantage_clip
        )
        ours, theirs = step.mean_of(pred), step.mean_of(ref)
        each = {
            "x": lambda: (ours - theirs).square(),
            "v": lambda: (pred - ref).square(),
            "gaussian": lambda: kl_divergence(Normal(ours, step.std), Normal(theirs, step.std)),
        }[kind]()
        kl = mean(each, step.mask)
        return Found(losses + kl_weight * kl, log_ratio, out, kl)

    return loss


def _guarded(
    step: Step, pred: Tensor, old: Tensor, old_log_prob: Tensor, scale: Tensor,
    advantage: Tensor, clip_range: Any, advantage_clip: float,
) -> Found:  # fmt: skip
    moved = mean((step.mean_of(pred) - step.mean_of(old)).square(), step.mask)
    bias = moved / (2 * scale**2)
    log_ratio = (log_prob(step, pred) - old_log_prob + bias) * scale
    losses, out = _clipped_ratio(
        torch.exp(log_ratio), advantage, clip_range, clip_range, advantage_clip
    )
    return Found(losses, log_ratio, out)


def grpo_guard(
    step: Step, pred: Tensor, old: Tensor, old_log_prob: Tensor, ref: Tensor | None,
    advantage: Tensor, clip_range: Any = 2e-6, advantage_clip: float = 5.0,
) -> Found:  # fmt: skip
    """verl-omni diffusion_algos.py, with its means over the batch."""
    root = step.dt.sqrt().mean()
    scale = root * (step.std / step.dt.sqrt()).mean()
    found = _guarded(step, pred, old, old_log_prob, scale, advantage, clip_range, advantage_clip)
    return found._replace(losses=found.losses / root**2)


def flow_factory_guard(
    step: Step, pred: Tensor, old: Tensor, old_log_prob: Tensor, ref: Tensor | None,
    advantage: Tensor, clip_range: Any = 2e-6, advantage_clip: float = 5.0,
) -> Found:  # fmt: skip
    """Flow-Factory's: std of each sample, and no division by dt."""
    return _guarded(
        step, pred, old, old_log_prob, step.std[:, 0], advantage, clip_range, advantage_clip
    )


def guard_of_each(*args: Any, **numbers: Any) -> Found:
    """Both at once: std of each sample, and its dt."""
    found = flow_factory_guard(*args, **numbers)
    return found._replace(losses=found.losses / args[0].dt[:, 0])


def flow_dppo(
    step: Step, pred: Tensor, old: Tensor, old_log_prob: Tensor, ref: Tensor | None,
    advantage: Tensor, divergence_limit: Any = 1e-5,
) -> Found:  # fmt: skip
    """Tencent-Hunyuan/UniRL flowdppo.py, verl-omni."""
    ratio = torch.exp(log_prob(step, pred) - old_log_prob)
    moved = (step.mean_of(pred) - step.mean_of(old)).square()
    far = mean(moved / (2 * step.std**2), step.mask) >= divergence_limit
    drop = far & (((ratio > 1) & (advantage > 0)) | ((ratio < 1) & (advantage < 0)))
    losses = torch.where(drop, 0.0, -advantage * ratio)
    return Found(losses, torch.log(ratio), drop.double())


# Two steps ----------------------------------------------------------------------------------------


def step_dpo(
    steps: tuple[Step, Step], preds: tuple[Tensor, Tensor], ref_log_probs: tuple[Tensor, Tensor],
    beta: Any, clip: float | None = 0.1, label: Tensor | None = None,
) -> Found:  # fmt: skip
    """D3PO, SPO, LPO, PSO online, which clamp ratios. label: (B,) of +-1, of D3PO's and PSO's pairs
    of trajectories: +1 where the first one is the better."""
    log_ratios, held, out = [], [], []
    for step, pred, of_ref in zip(steps, preds, ref_log_probs, strict=True):
        log_ratio = log_prob(step, pred) - of_ref
        ratio = torch.exp(log_ratio)
        log_ratios.append(log_ratio)
        bounded = ratio if clip is None else torch.clamp(ratio, 1 - clip, 1 + clip)
        held.append(torch.log(bounded))
        out.append((bounded != ratio).double())
    sign = torch.ones(()) if label is None else label.double()
    margin = beta * (held[0] * sign) + beta * (held[1] * -sign)
    losses = -torch.log(torch.sigmoid(margin))
    return Found(losses, torch.cat(log_ratios), torch.cat(out), None, margin)


def sdpo(
    steps: tuple[Step, Step], preds: tuple[Tensor, Tensor], old_log_probs: tuple[Tensor, Tensor],
    advantage: Tensor, step_weight: Any = 1.0, clip_range: Any = 1e-4, advantage_clip: float = 5.0,
) -> Found:  # fmt: skip
    """ZiyiZhang27/sdpo scripts/train_sdpo.py; advantage is (2B,)."""
    log_ratios = [
        log_prob(step, pred) - old
        for step, pred, old in zip(steps, preds, old_log_probs, strict=True)
    ]
    first, second = advantage.clamp(-advantage_clip, advantage_clip).chunk(2)
    gain = first - second
    held = [torch.clamp(each, -clip_range, clip_range) for each in log_ratios]
    free = (step_weight * (log_ratios[0] - log_ratios[1]) - gain).square()
    bounded = (step_weight * (held[0] - held[1]) - gain).square()
    out = torch.cat([(h != l).double() for h, l in zip(held, log_ratios, strict=True)])
    margin = torch.sign(gain) * (log_ratios[0] - log_ratios[1])
    return Found(torch.maximum(free, bounded), torch.cat(log_ratios), out, None, margin)


# The forward process ------------------------------------------------------------------------------


class Forward(NamedTuple):
    losses: Tensor
    errors: Tensor
    old_errors: Tensor
    drops: Tensor
    drifts: Tensor
    margin: Tensor
    kl: Tensor | None


def nft(
    pred: Tensor, target: Tensor, old: Tensor, ref: Tensor | None, x0: Tensor, reward: Tensor,
    t: Tensor, beta: Any = 1.0, adaptive: bool = True, kl_weight: float = 0.0,
    mask: Tensor | None = None,
) -> Forward:  # fmt: skip
    """NVlabs/DiffusionNFT train_nft_sd3.py, by the x0 that velocities mean; x0 is any, the noise
    then x0 + target."""
    t = t[:, None]
    x_t = (1 - t) * x0 + t * (x0 + target)

    def loss(v: Tensor) -> Tensor:
        off = x_t - t * v - x0
        error = mean(off.square(), mask)
        if not adaptive:
            return error
        return error / mean(off.abs(), mask).clamp(min=1e-5).detach()

    positive = loss(beta * pred + (1 - beta) * old)
    negative = loss((1 + beta) * old - beta * pred)
    losses = 5.0 * (reward * positive + (1 - reward) * negative) / beta
    errors, old_errors = (mean((v - target).square(), mask) for v in (pred, old))
    drops = errors - old_errors
    kl = None
    if ref is not None:
        kl = mean((pred - ref).square(), mask)
        losses = losses + kl_weight * kl
    drifts = mean((pred - old).square(), mask)
    return Forward(losses, errors, old_errors, drops, drifts, (1 - 2 * reward) * drops, kl)


# From losses to what a call returns ---------------------------------------------------------------

_BY = 1e-7


def truths(
    evaluate: Callable[[Tensor, Tensor], dict[str, Tensor]], pred: Tensor, n_nudges: int
) -> dict[str, Truth]:
    """evaluate: from fp64 predictions and nudges, each of which moves by its share what fp32 holds
    to 6e-8 and no better, to results, of which "loss" is differentiated, summed."""

    def columns(nudges: Tensor) -> dict[str, np.ndarray]:
        leaf = pred.detach().double().cpu().requires_grad_()
        found = evaluate(leaf, nudges)
        (grad,) = torch.autograd.grad(found["loss"].sum(), leaf)
        return {name: value.detach().numpy() for name, value in {**found, "grad": grad}.items()}

    exact = columns(torch.zeros(n_nudges, dtype=torch.float64))
    moves = {name: np.zeros_like(value) for name, value in exact.items()}
    for nudge in _BY * torch.eye(n_nudges, dtype=torch.float64):
        for name, value in columns(nudge).items():
            moves[name] += np.abs(value - exact[name]) / _BY
    return {name: Truth(exact[name], moves[name]) for name in exact}
