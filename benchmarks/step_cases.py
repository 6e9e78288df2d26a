"""The losses on steps of a sampler as trainers write them, and inputs of such."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastpref.transitions import Transition

A, B, STD, DT = 1.05, -0.1, 0.3, 0.08  # of an SDE sampler's step half the way
CLIP, STEP_BETA, NFT_BETA, KL_WEIGHT = 0.2, 5.0, 0.3, 0.04


def each(number: Tensor, like: Tensor) -> Tensor:
    return number.view(-1, *[1] * (like.dim() - 1))


def mean(elements: Tensor) -> Tensor:
    return elements.flatten(1).mean(1)


def log_prob(pred: Tensor, x: Tensor, x_next: Tensor, step: tuple[Tensor, ...]) -> Tensor:
    """With its normalizer, in the precision of fp32, as all of the trainers have it."""
    a, b, std = (each(number, pred) for number in step[:3])
    off = x_next.float() - (a * x.float() + b * pred.float())
    return mean(-off.square() / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi))


def clipped(log_ratio: Tensor, advantage: Tensor) -> Tensor:
    advantage, ratio = advantage.clamp(-5, 5), torch.exp(log_ratio)
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - CLIP, 1 + CLIP))


def published_grpo(
    pred: Tensor, x_next: Tensor, old: Tensor, x: Tensor, ref: Tensor, advantage: Tensor,
    *step: Tensor,
) -> Tensor:  # fmt: skip
    """Flow-GRPO's scripts/train_sd3.py, with Flow-Factory's divergence in velocities, the old
    policy replayed."""
    with torch.no_grad():
        old_log_prob = log_prob(old, x, x_next, step)
    log_ratio = log_prob(pred, x, x_next, step) - old_log_prob
    kl = mean((pred.float() - ref.float()).square())
    return clipped(log_ratio, advantage).mean() + KL_WEIGHT * kl.mean()


def published_stored(
    pred: Tensor, x_next: Tensor, x: Tensor, old_log_prob: Tensor, advantage: Tensor, *step: Tensor
) -> Tensor:
    """The same without the divergence, from log-probabilities that the sampler stored."""
    log_ratio = log_prob(pred, x, x_next, step) - old_log_prob
    return clipped(log_ratio, advantage).mean()


def published_guard(
    pred: Tensor, x_next: Tensor, old: Tensor, x: Tensor, advantage: Tensor, *step: Tensor
) -> Tensor:
    """GRPO-Guard as verl-omni has it, the old policy replayed."""
    _, b, std, dt, _ = step
    scale = torch.sqrt(dt).mean() * (std / torch.sqrt(dt)).mean()
    with torch.no_grad():
        old_log_prob = log_prob(old, x, x_next, step)
    moved = each(b, pred) * (pred.float() - old.float())
    bias = mean(moved.square()) / (2 * scale**2)
    log_ratio = (log_prob(pred, x, x_next, step) - old_log_prob + bias) * scale
    return clipped(log_ratio, advantage).mean() / torch.sqrt(dt).mean() ** 2


def published_step_dpo(
    pred: Tensor, x_next: Tensor, ref: Tensor, x: Tensor, *step: Tensor
) -> Tensor:
    """SPO's train_spo_sdxl.py, which LPO and PSO share."""
    with torch.no_grad():
        ref_log_prob = log_prob(ref, x, x_next, step)
    ratio = torch.exp(log_prob(pred, x, x_next, step) - ref_log_prob)
    w, l = torch.log(ratio.clamp(0.9, 1.1)).chunk(2)
    return -torch.log(torch.sigmoid(STEP_BETA * (w - l))).mean()


def published_sdpo(
    pred: Tensor, x_next: Tensor, old: Tensor, x: Tensor, advantage: Tensor, *step: Tensor
) -> Tensor:
    """ZiyiZhang27/sdpo scripts/train_sdpo.py, the old policy replayed."""
    with torch.no_grad():
        old_log_prob = log_prob(old, x, x_next, step)
    log_ratio = log_prob(pred, x, x_next, step) - old_log_prob
    advantage_1, advantage_2 = advantage.clamp(-5, 5).chunk(2)
    (first, second), (held_1, held_2) = log_ratio.chunk(2), log_ratio.clamp(-CLIP, CLIP).chunk(2)
    gain = advantage_1 - advantage_2
    off, held = (first - second - gain).square(), (held_1 - held_2 - gain).square()
    return torch.maximum(off, held).mean()


def published_nft(
    pred: Tensor, target: Tensor, old: Tensor, ref: Tensor, reward: Tensor, t: Tensor
) -> Tensor:
    """NVlabs/DiffusionNFT scripts/train_nft_sd3.py in fp32, its x0 errors being t times those of
    velocities."""
    velocity, old, target = pred.float(), old.float(), target.float()
    towards = NFT_BETA * velocity + (1 - NFT_BETA) * old
    away = (1 + NFT_BETA) * old - NFT_BETA * velocity
    errors = []
    for way in (towards, away):
        off = each(t, pred) * (way - target)
        weight = mean(off.detach().abs()).clamp(min=1e-5)
        errors.append(mean(off.square()) / weight)
    loss = 5 * (reward * errors[0] + (1 - reward) * errors[1]) / NFT_BETA
    return loss.mean() + KL_WEIGHT * mean((velocity - ref.float()).square()).mean()


def transition(numbers: tuple[Tensor, ...]) -> Transition:
    a, b, std, dt, weight = numbers
    return Transition(a, b, std, dt, weight)


def step_numbers(n: int, device: torch.device) -> Transition:
    a, b, std, dt = (torch.full((n,), number, device=device) for number in (A, B, STD, DT))
    return Transition(a, b, std, dt, 1 / (2 * std**2))


def advantages(n: int, device: torch.device) -> Tensor:
    """Of no mean of 0, and no two alike."""
    at = torch.arange(n, device=device)
    return torch.where(at % 3 > 0, 1.0, -0.6) + 0.1 * at


def rewards(n: int, device: torch.device) -> Tensor:
    return 0.1 + 0.8 * torch.linspace(0, 1, n, device=device) ** 2
