"""Advantages from rewards: relative to a prompt's other samples, to its past, or along the steps of
a trajectory."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, distributed

from .arguments import check_count, check_finite, check_number, dtype_of
from .dense import anchor_step as anchor_step
from .dense import check_rewards
from .dense import dense_rewards as dense_rewards
from .dense import discounted_returns as discounted_returns

Spread = Literal["group", "batch"]


@torch.no_grad()
def group_advantages(
    rewards: Tensor,
    groups: Tensor | int,
    *,
    std: Spread | None = "group",
    eps: float = 1e-4,
    gather: bool = True,
) -> Tensor:
    """Rewards relative to their group's, (B,): those of one prompt's samples.

    ::

        A_i = (r_i - mean of i's group) / (std + eps)

    std is that of i's group ("group"), or of all rewards about their common mean ("batch"); with
    std=None nothing is divided. Both are biased, sqrt(mean((r - mean)^2)), as numpy's.

    Args:
        rewards: (B,), of any float or integer dtype.
        groups: which prompt each sample is of, (B,), any integers; or an int k where each k samples
            in a row are one prompt's. One group of all, global advantages:
            ``torch.zeros_like(rewards, dtype=torch.int64)``.
        std: "group" is GRPO's; "batch" is Flow-GRPO's global_std, which its configurations turn
            on; None is Dr. GRPO's.
        eps: from 0. Flow-GRPO adds 1e-4 to either std, SDPO 1e-6 in its
            tracker (`PromptStatistics`) and 1e-8 without it, over all samples and steps as one
            group.
        gather: statistics of all processes of torch.distributed's default group, where there is
            one: groups may be split over processes, and numbers of samples may differ. All must
            call this. An int k counts each process's prompts as its own.

    Returns: (B,), fp32 (fp64 for fp64 rewards), no gradient; computed in fp64 where the device has
    it. Equal rewards in a group, or a single sample, give exactly 0, also with eps=0.

    Raises: TypeError, ValueError; for rewards that are not finite where they are on the CPU, in
    all processes at once. Elsewhere that would wait for the device: they make their group's
    advantages NaN, and with std="batch" all. Nothing waits in a single process.

    Source: Shao et al., arXiv:2402.03300; flow_grpo/stat_tracking.py of
    github.com/yifan123/flow_grpo, commit 94e23ee5, whose tracker is cleared after each batch.
    """
    own = check_rewards(rewards, "(B,)", 1)
    ids = _check_groups(groups, own)
    if std is not None and std not in get_args(Spread):
        raise ValueError(f'std is {std!r}; expected "group", "batch" or None')
    eps = check_number("eps", eps, from_0=True)
    value, start = own, 0
    joined = gather and distributed.is_available() and distributed.is_initialized()
    if joined and distributed.get_world_size() > 1:
        value, ids, start = _gathered(own, ids, apart=not isinstance(groups, Tensor))
    check_finite("rewards", value)
    if value.numel() == 0:
        return own.to(dtype_of(rewards))
    group = _numbered(ids)
    centered = _about_the_mean(value, group)
    if std is not None:
        alone = torch.zeros_like(group)
        deviation, of_whom = (
            (centered, group) if std == "group" else (_about_the_mean(value, alone), alone)
        )
        scale = _means(deviation.square(), of_whom)[of_whom].sqrt() + eps
        centered = centered / torch.where(scale == 0, 1.0, scale)
    return centered[start : start + own.numel()].to(dtype_of(rewards))


class PromptStatistics:
    """Advantages by the mean and standard deviation of each prompt's last rewards: DDPO's tracker,
    and SDPO's, which keeps them for each step of a trajectory.

    ::

        A = (r - mean) / (std + eps)

    of the prompt's buffer, this batch's rewards included; of this batch, all prompts together,
    while the buffer has fewer than min_count. With rewards of (B, steps), each step by itself.

    Args:
        buffer_size: how many rewards of a prompt are kept, the last ones; from 1.
        min_count: from how many on they count; from 1 to buffer_size.
        eps: from 0.

    The defaults are SDPO's. Standard deviations are biased, as numpy's. Everything is on the CPU,
    in fp64: `update` waits for the device. Processes that train together give it what they have
    gathered, and so keep the same statistics.

    Source: sdpo_pytorch/stat_tracking.py of github.com/ZiyiZhang27/sdpo, commit 2074bbde. It goes
    back to Black et al., arXiv:2305.13301, whose own code was not read.
    """

    def __init__(self, buffer_size: int = 32, min_count: int = 16, eps: float = 1e-6) -> None:
        self.buffer_size = check_count("buffer_size", buffer_size)
        self.min_count = check_count("min_count", min_count)
        if self.min_count > self.buffer_size:
            raise ValueError(
                f"min_count is {min_count}, but buffer_size is {buffer_size}; expected at most that"
            )
        self.eps = check_number("eps", eps, from_0=True)
        self._buffers: dict[Hashable, deque[Tensor]] = {}

    @torch.no_grad()
    def update(self, prompts: Iterable[Hashable] | Tensor, rewards: Tensor) -> Tensor:
        """Takes in a batch and returns its advantages.

        Args:
            prompts: what each sample's prompt is, B of them: strings, ints or anything hashable, or
                a tensor of integers.
            rewards: (B,), or (B, steps), always of as many steps.

        Returns: of rewards' shape and device, fp32 (fp64 for fp64 rewards), no gradient.

        Raises: TypeError, ValueError; also for rewards that are not finite. Then nothing is kept.
        """
        given = check_rewards(rewards, "(B,) or (B, steps)", 1, 2)
        value = given.to("cpu", torch.float64)
        check_finite("rewards", value)
        names = self._check_prompts(prompts, value)
        if not names:
            return given.to(dtype_of(rewards))
        rows: dict[Hashable, list[int]] = {}
        for i, name in enumerate(names):
            rows.setdefault(name, []).append(i)
        made = torch.empty_like(value)
        for name, mine in rows.items():
            buffer = self._buffers.setdefault(name, deque(maxlen=self.buffer_size))
            buffer.extend(value[mine].unbind())
            known = value if len(buffer) < self.min_count else torch.stack([*buffer])
            shifted, base = known - known[0], value[mine] - known[0]  # so equal rewards give 0
            mean = shifted.mean(0)
            scale = (shifted - mean).square().mean(0).sqrt() + self.eps
            made[mine] = (base - mean) / torch.where(scale == 0, 1.0, scale)
        return made.to(rewards.device, dtype_of(rewards))

    def state_dict(self) -> dict[str, Any]:
        """{"rewards": {prompt: (n,) or (n, steps) fp64}}, oldest first."""
        return {"rewards": {name: torch.stack([*b]) for name, b in self._buffers.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict`; of longer buffers the last rewards are kept."""
        stored = state.get("rewards") if isinstance(state, dict) else None
        fits = isinstance(stored, dict) and all(
            isinstance(v, Tensor) and v.dim() in (1, 2) and v.numel() for v in stored.values()
        )
        if not isinstance(stored, dict) or not fits:
            raise ValueError(
                'state is not of PromptStatistics; expected {"rewards": {prompt: tensor}}'
            )
        self._buffers = {
            name: deque(values.to("cpu", torch.float64, copy=True).unbind(), self.buffer_size)
            for name, values in stored.items()
        }

    def _check_prompts(self, prompts: Iterable[Hashable] | Tensor, value: Tensor) -> list[Hashable]:
        if isinstance(prompts, str) or not isinstance(prompts, (Tensor, Iterable)):
            raise TypeError(
                f"prompts is a {type(prompts).__name__}; expected a sequence with one a sample"
            )
        names = prompts.tolist() if isinstance(prompts, Tensor) else [*prompts]
        if len(names) != len(value):
            raise ValueError(
                f"prompts has {len(names)}, but rewards has shape {tuple(value.shape)}; expected "
                "one prompt a sample"
            )
        for name in names:
            if isinstance(name, Tensor) or not isinstance(name, Hashable):  # a Tensor's is its id
                raise TypeError(
                    f"prompts contains a {type(name).__name__}; expected strings, ints or the like"
                )
        kept = next((b[0].shape for b in self._buffers.values() if b), value.shape[1:])
        if kept != value.shape[1:]:
            raise ValueError(
                f"rewards has shape {tuple(value.shape)}, but earlier ones had (B, "
                f"{', '.join(map(str, kept))}); expected as many steps in every batch"
            )
        return names


def _numbered(ids: Tensor) -> Tensor:
    """Ids as numbers from 0, without asking how many there are."""
    ordered, order = ids.sort()
    new = torch.zeros_like(ordered)
    new[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(new).scatter_(0, order, new.cumsum(0))


def _means(value: Tensor, group: Tensor) -> Tensor:
    """Of each group; there are at most as many as values."""
    sums = torch.zeros_like(value).index_add_(0, group, value)
    counts = torch.zeros_like(value).index_add_(0, group, torch.ones_like(value))
    return sums / counts.clamp(min=1)


def _about_the_mean(value: Tensor, group: Tensor) -> Tensor:
    """Less the group's mean, by way of its smallest: equal values give exactly 0."""
    lowest = torch.full_like(value, math.inf).scatter_reduce_(0, group, value, "amin")
    above = value - lowest[group]
    return above - _means(above, group)[group]


def _gathered(value: Tensor, ids: Tensor, apart: bool) -> tuple[Tensor, Tensor, int]:
    """Of all processes, and where this one's begin. apart: equal ids in two processes differ."""
    world, rank = distributed.get_world_size(), distributed.get_rank()
    size = torch.tensor([value.numel()], device=value.device)
    sizes = [torch.empty_like(size) for _ in range(world)]
    distributed.all_gather(sizes, size)
    counts = [int(n) for n in torch.cat(sizes).tolist()]
    start = sum(counts[:rank])
    if not any(counts):
        return value, ids, 0
    rows = []
    for mine in (value, ids + start if apart else ids):
        padded = mine.new_zeros(max(counts))
        padded[: mine.numel()] = mine
        parts = [torch.empty_like(padded) for _ in range(world)]
        distributed.all_gather(parts, padded)
        rows.append(torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)]))
    return rows[0], rows[1], start


def _check_groups(groups: object, rewards: Tensor) -> Tensor:
    """(B,) int64."""
    n_samples = rewards.numel()
    if not isinstance(groups, (Tensor, int)):
        raise TypeError(f"groups must be a torch.Tensor or an int, got a {type(groups).__name__}")
    if not isinstance(groups, Tensor):
        size = check_count("groups", groups)
        if n_samples % size:
            raise ValueError(
                f"groups is {size}, but rewards has shape ({n_samples},); expected a divisor"
            )
        return torch.arange(n_samples, device=rewards.device) // size
    if groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool:
        raise TypeError(f"groups has dtype {groups.dtype}; expected an integer dtype")
    if groups.shape != rewards.shape:
        raise ValueError(
            f"groups has shape {tuple(groups.shape)}; expected one id a sample, ({n_samples},)"
        )
    return groups.to(rewards.device, torch.int64)
