"""Rewards of the steps of a trajectory, as SDPO makes them from three decoded ones."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import check_number, check_real, dtype_of
from .context import readable


@torch.no_grad()
def dense_rewards(latents: Tensor, rewards: Tensor, anchor: Tensor | None = None) -> Tensor:
    """SDPO's reward of each step of a trajectory, (B, steps), from three that were decoded.

    ::

        r_j = (s_j,first r_first + s_j,anchor r_anchor + s_j,last r_last) / (sum of the three s_j)

    with s the cosine similarity of step j's latents to those of the first, the anchor and the last
    step, over all elements of a sample. At these three steps stand the rewards themselves.

    Args:
        latents: (B, steps, ...), the clean latents x0_hat that each step's prediction means, not
            x_t; any floating dtype.
        rewards: (B, 3), of the decoded x0_hat of the first step, the anchor and the last step.
        anchor: (B,) integers, which step the second reward is of; by default `anchor_step`.

    Returns: fp32 (fp64 if an input is), no gradient. Put through `discounted_returns` and then
    `PromptStatistics`.

    Raises: TypeError, ValueError; also for an anchor out of range, on the CPU.

    As in the code, similarities are taken as they are, so a negative one gives its reward a
    negative weight. Where their sum is not above 1e-6 the code divides by it all the same; this
    takes the mean of the three rewards. Should the anchor be the first or the last step, its reward
    is the one put there.

    Source: Zhang et al., arXiv:2411.11727; scripts/train_sdpo.py and
    diffusers_patch/pipeline_with_logprob_sdpo.py of github.com/ZiyiZhang27/sdpo, commit 2074bbde.
    """
    flat = _check_latents(latents)
    n_samples, n_steps = flat.shape[:2]
    given = check_rewards(rewards, f"({n_samples}, 3)", 2)
    if given.shape != (n_samples, 3):
        raise ValueError(
            f"rewards has shape {tuple(rewards.shape)}; expected ({n_samples}, 3): of the first, "
            "the anchor and the last step of each sample of latents"
        )
    _check_device("rewards", rewards, latents)
    value = given.to(torch.promote_types(flat.dtype, dtype_of(rewards)))
    anchor = anchor_step(latents) if anchor is None else _check_anchor(anchor, latents)
    samples = torch.arange(n_samples, device=latents.device)
    steps = torch.stack([torch.zeros_like(anchor), anchor, torch.full_like(anchor, n_steps - 1)], 1)
    known = flat[samples[:, None], steps]  # (B, 3, elements)
    similar = torch.stack([_cosine(flat, known[:, k : k + 1]) for k in range(3)], 2).to(value.dtype)
    total = similar.sum(2)
    usual = total > 1e-6
    blend = (similar * value[:, None]).sum(2) / torch.where(usual, total, 1.0)
    dense = torch.where(usual, blend, value.mean(1, keepdim=True))
    for k in (0, 2, 1):  # the anchor last, as in the code
        dense[samples, steps[:, k]] = value[:, k]
    return dense


@torch.no_grad()
def anchor_step(latents: Tensor) -> Tensor:
    """Which step SDPO decodes beside the first and the last one, (B,) int64: that whose latents are
    least like both, by the sum of their cosine similarities; of equals the first.

    As in the code, the first and the last step are among the candidates, and no step is less like
    both where all lie on one way from the first to the last. These two always have equal sums, of
    which rounding chooses there; here it is the first, and `dense_rewards` then needs no third
    image: its reward is the first one's again.

    Args, raises, source: as `dense_rewards`.
    """
    flat = _check_latents(latents)
    sums = _cosine(flat, flat[:, :1]) + _cosine(flat, flat[:, -1:])
    sums[:, -1] = sums[:, 0]
    return sums.argmin(1)


@torch.no_grad()
def discounted_returns(rewards: Tensor, gamma: float = 0.99) -> Tensor:
    """The discounted sum of a step's reward and all later ones, along the last dimension::

        R_j = r_j + gamma R_(j+1)

    Args:
        rewards: (B, steps), or any shape that ends in steps; the first step of sampling first.
        gamma: in [0, 1]; SDPO's is 0.99.

    Returns: of rewards' shape, fp32 (fp64 for fp64 rewards), no gradient.

    Raises: TypeError, ValueError. Source: scripts/train_sdpo.py, as in `dense_rewards`.
    """
    value = check_rewards(rewards, "(..., steps)").to(dtype_of(rewards))
    factor = check_number("gamma", gamma, from_0=True)
    if factor > 1:
        raise ValueError(f"gamma is {gamma}; expected a number in [0, 1]")
    if value.dim() == 0:
        raise ValueError("rewards has shape (); expected (..., steps)")
    returns = [*value.unbind(-1)]
    for j in reversed(range(len(returns) - 1)):
        returns[j] = returns[j] + factor * returns[j + 1]
    return torch.stack(returns, -1) if returns else value.clone()


def check_rewards(value: object, needed: str, *dims: int) -> Tensor:
    """In fp64, except on devices that have none."""
    rewards = check_real("rewards", value)
    if dims and rewards.dim() not in dims:
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}; expected {needed}")
    return rewards.to(torch.float32 if rewards.device.type == "mps" else torch.float64)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.cosine_similarity(a, b, dim=2)


def _check_latents(latents: object) -> Tensor:
    """(B, steps, elements), fp32 or fp64."""
    if not isinstance(latents, Tensor):
        raise TypeError(f"latents must be a torch.Tensor, got a {type(latents).__name__}")
    if not latents.is_floating_point():
        raise TypeError(f"latents has dtype {latents.dtype}; expected a floating dtype")
    if latents.dim() < 3 or latents.numel() == 0:
        raise ValueError(
            f"latents has shape {tuple(latents.shape)}; expected (B, steps, ...), with one element "
            "at least"
        )
    return latents.detach().flatten(2).to(dtype_of(latents))


def _check_anchor(anchor: object, latents: Tensor) -> Tensor:
    if not isinstance(anchor, Tensor):
        raise TypeError(f"anchor must be a torch.Tensor, got a {type(anchor).__name__}")
    if anchor.is_floating_point() or anchor.is_complex() or anchor.dtype == torch.bool:
        raise TypeError(f"anchor has dtype {anchor.dtype}; expected an integer dtype")
    n_samples, n_steps = latents.shape[:2]
    if anchor.shape != (n_samples,):
        raise ValueError(f"anchor has shape {tuple(anchor.shape)}; expected ({n_samples},)")
    _check_device("anchor", anchor, latents)
    if readable(anchor):
        outside = [i for i in anchor.tolist() if not 0 <= i < n_steps]
        if outside:
            raise ValueError(f"anchor contains {outside[0]}; expected 0 to {n_steps - 1}")
    return anchor.to(torch.int64)


def _check_device(name: str, value: Tensor, latents: Tensor) -> None:
    if value.device != latents.device:
        raise ValueError(
            f"{name} is on {value.device}; expected {latents.device}, where latents is"
        )
