"""Advantages against numpy and loops, in one process and in two, and bad input."""

from __future__ import annotations

import io
import math
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributed
from torch.multiprocessing.spawn import spawn

import fastpref
from fastpref.advantages import (
    PromptStatistics,
    anchor_step,
    dense_rewards,
    discounted_returns,
    group_advantages,
)

FP64 = torch.float64
STDS: tuple[Any, ...] = ("group", "batch", None)
stds = pytest.mark.parametrize("std", STDS)


def by_numpy(rewards: Tensor, groups: Tensor, std: str | None, eps: float) -> Tensor:
    """As flow_grpo's tracker has it, in fp64."""
    values, ids = rewards.double().numpy(), groups.numpy()
    made = np.empty_like(values)
    for group in np.unique(ids):
        mine = values[ids == group]
        scale = np.std(values if std == "batch" else mine) + eps if std else 1.0
        made[ids == group] = (mine - mine.mean()) / scale
    return torch.from_numpy(made)


@stds
@pytest.mark.parametrize("eps", [1e-4, 0.3])
def test_group_advantages(std: Any, eps: float) -> None:
    groups = torch.tensor([7, -3, 7, 2**40, 7, -3, 2**40, 0])
    rewards = torch.randn(8, dtype=FP64)
    found = group_advantages(rewards, groups, std=std, eps=eps)
    torch.testing.assert_close(found, by_numpy(rewards, groups, std, eps), rtol=1e-12, atol=1e-12)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        cast = group_advantages(rewards.to(dtype), groups.clamp(max=99).int(), std=std, eps=eps)
        wanted = by_numpy(rewards.to(dtype), groups, std, eps)
        torch.testing.assert_close(cast, wanted.float(), rtol=1e-6, atol=1e-6)
    whole = torch.tensor([1, 0, 3, 0, 1, 9, 9, 4])
    torch.testing.assert_close(
        group_advantages(whole, groups, std=std, eps=eps).double(),
        by_numpy(whole, groups, std, eps), rtol=1e-6, atol=1e-6,
    )  # fmt: skip
    grown = rewards.clone().requires_grad_()
    assert not group_advantages(grown, groups).requires_grad


@stds
def test_groups_that_follow_one_another(std: Any) -> None:
    rewards = torch.randn(12)
    for size in (1, 3, 4, 12):
        ids = torch.arange(12) // size
        found = group_advantages(rewards, size, std=std)
        torch.testing.assert_close(found, by_numpy(rewards, ids, std, 1e-4).float())
        order = torch.randperm(12)  # the order of samples makes no difference
        mixed = group_advantages(rewards[order], ids[order], std=std)
        torch.testing.assert_close(mixed, found[order])


def test_global_advantages_of_every_step_are_those_of_one_group() -> None:
    """train_sdpo.py without its tracker."""
    rewards = torch.randn(5, 4, dtype=FP64)
    values = rewards.numpy()
    wanted = (values - values.mean()) / (values.std() + 1e-8)
    flat = rewards.flatten()
    found = group_advantages(flat, torch.zeros_like(flat, dtype=torch.int64), eps=1e-8)
    torch.testing.assert_close(found.reshape(5, 4).numpy(), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(group_advantages(flat, 20, std="batch", eps=1e-8), found)


@stds
@pytest.mark.parametrize("eps", [1e-4, 0.0])
def test_extremes(std: Any, eps: float) -> None:
    zero = torch.zeros(6)
    assert torch.equal(group_advantages(torch.randn(6), torch.arange(6), std=std, eps=eps), zero)
    for value in (0.1, 1e30, -7.3, 1 / 3):  # whose mean is not itself, summed up
        same = torch.full((6,), value)
        assert torch.equal(group_advantages(same, 3, std=std, eps=eps), zero)
    huge = torch.tensor([1e30, -1e30, 2e30, 0.0])
    found = group_advantages(huge, 4, std=std, eps=eps)
    torch.testing.assert_close(found, by_numpy(huge, torch.zeros(4).int(), std, eps).float())
    far = torch.tensor([1e6, 1e6 + 0.25, 1e6 + 0.5, 1e6 + 0.25])
    near = group_advantages(far - 1e6, 4, std=std, eps=eps)
    assert torch.equal(group_advantages(far, 4, std=std, eps=eps), near)
    assert group_advantages(torch.zeros(0), torch.zeros(0).long(), std=std).shape == (0,)
    assert group_advantages(torch.zeros(0), 4, std=std).shape == (0,)


def test_nothing_is_read_on_a_device() -> None:
    """As meta tensors show, which have no values."""
    rewards = torch.zeros(6, device="meta")
    for std in STDS:
        for groups in (2, torch.zeros(6, dtype=torch.int64)):
            assert group_advantages(rewards, groups, std=std).shape == (6,)
    assert anchor_step(torch.zeros(2, 5, 3, device="meta")).shape == (2,)


@pytest.mark.gpu
@stds
def test_nothing_waits_for_the_device(std: Any) -> None:
    rewards, groups = torch.randn(12), torch.randint(0, 4, (12,))
    there, ids = rewards.cuda(), groups.cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found, rows = group_advantages(there, ids, std=std), group_advantages(there, 3, std=std)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.cpu(), group_advantages(rewards, groups, std=std))
    torch.testing.assert_close(rows.cpu(), group_advantages(rewards, 3, std=std))


def test_rewards_that_are_not_finite() -> None:
    for bad in (math.nan, math.inf):
        rewards = torch.tensor([1.0, 2.0, bad, 4.0])
        with pytest.raises(ValueError, match=rf"rewards contains {bad} at \[2\]; expected finite"):
            group_advantages(rewards, 2)


def in_one_of_two(rank: int, folder: Path) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    data = torch.load(folder / "data.pt")
    mine = slice(0, 5) if rank == 0 else slice(5, 12)
    rewards, groups = data["rewards"][mine], data["groups"][mine]
    made: dict[str, Any] = {}
    for std in STDS:
        made[f"ids {std}"] = group_advantages(rewards, groups, std=std)
        made[f"own {std}"] = group_advantages(rewards, groups, std=std, gather=False)
        rows = rewards[: 4 if rank == 0 else 6]
        made[f"rows {std}"] = group_advantages(rows, 2, std=std)
        some = slice(0) if rank == 0 else slice(7)
        made[f"none {std}"] = group_advantages(rewards[some], groups[some], std=std)
        made[f"neither {std}"] = group_advantages(rewards[:0], groups[:0], std=std)
    spoiled = rewards.clone()
    spoiled[0] = math.nan if rank == 1 else 0.0
    try:
        group_advantages(spoiled, groups)
    except ValueError as error:
        made["error"] = str(error)
    torch.save(made, folder / f"{rank}.pt")
    distributed.barrier()
    os._exit(0)  # to destroy a gloo group joins its threads, one of which may wait for the GIL


def test_two_processes(tmp_path: Path) -> None:
    """Of 5 and 7 samples, whose prompts are split over both."""
    rewards, groups = torch.randn(12), torch.tensor([3, 1, 2, 1, 3, 3, 2, 1, 1, 8, 3, 2])
    torch.save({"rewards": rewards, "groups": groups}, tmp_path / "data.pt")
    spawn(in_one_of_two, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    rows = torch.cat([rewards[:4], rewards[5:11]])
    for std in STDS:
        both = torch.cat([first[f"ids {std}"], second[f"ids {std}"]])
        torch.testing.assert_close(both, by_numpy(rewards, groups, std, 1e-4).float())
        own = by_numpy(rewards[5:], groups[5:], std, 1e-4).float()
        torch.testing.assert_close(second[f"own {std}"], own)
        assert first[f"none {std}"].shape == first[f"neither {std}"].shape == (0,)
        torch.testing.assert_close(second[f"none {std}"], own)
        both = torch.cat([first[f"rows {std}"], second[f"rows {std}"]])
        wanted = by_numpy(rows, torch.arange(10) // 2, std, 1e-4).float()
        torch.testing.assert_close(both, wanted)
    message = "rewards contains nan at [5]; expected finite numbers"
    assert first["error"] == second["error"] == message


def test_a_group_of_one_process_is_not_asked(tmp_path: Path, monkeypatch: Any) -> None:
    where = f"file://{tmp_path}/store"
    distributed.init_process_group("gloo", rank=0, world_size=1, init_method=where)
    monkeypatch.setattr(distributed, "all_gather", None)
    try:
        group_advantages(torch.randn(4), 2)
    finally:
        distributed.destroy_process_group()


class Tracker:
    """sdpo_pytorch/stat_tracking.py, by loops over lists; a sample has one reward for each step."""

    def __init__(self, size: int, least: int, eps: float) -> None:
        self.size, self.least, self.eps = size, least, eps
        self.kept: dict[tuple[Any, int], deque[float]] = {}

    def update(self, prompts: list[Any], rewards: Tensor) -> Tensor:
        made = torch.empty(rewards.shape, dtype=FP64)
        table = rewards.double().tolist()
        for prompt in set(prompts):
            mine = [i for i, name in enumerate(prompts) if name == prompt]
            for step in range(rewards.shape[1]):
                buffer = self.kept.setdefault((prompt, step), deque(maxlen=self.size))
                buffer.extend(table[i][step] for i in mine)
                everyone = [row[step] for row in table]
                known = everyone if len(buffer) < self.least else [*buffer]
                for i in mine:
                    made[i, step] = (table[i][step] - np.mean(known)) / (np.std(known) + self.eps)
        return made


@pytest.mark.parametrize("steps", [None, 1, 4])
@pytest.mark.parametrize(("size", "least"), [(32, 16), (5, 3), (1, 1)])
def test_prompt_statistics(steps: int | None, size: int, least: int) -> None:
    ours, theirs = PromptStatistics(size, least), Tracker(size, least, 1e-6)
    names = ["a cat", "a dog", 3, ("x", 1)]
    for n in (6, 1, 9, 12, 30):
        prompts = [names[i] for i in torch.randint(0, 4, (n,)).tolist()]
        rewards = torch.randn(n, *([] if steps is None else [steps]))
        wanted = theirs.update(prompts, rewards.reshape(n, -1)).reshape(rewards.shape)
        found = ours.update(prompts, rewards)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
        file = io.BytesIO()
        torch.save(ours.state_dict(), file)
        file.seek(0)
        resumed = PromptStatistics(size, least)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        ours = resumed


def test_prompt_statistics_of_ids_and_equal_rewards() -> None:
    tracker = PromptStatistics(8, 2, eps=0.0)
    ids, same = torch.tensor([1, 1, 2]), torch.full((3,), 0.1, dtype=FP64)
    assert torch.equal(tracker.update(ids, same), torch.zeros(3, dtype=FP64))
    assert {*tracker.state_dict()["rewards"]} == {1, 2}
    assert tracker.update([], torch.zeros(0)).shape == (0,)
    made = PromptStatistics(8, 2).update(["a", "a", "b"], torch.tensor([1, 3, 2]))
    torch.testing.assert_close(made, torch.tensor([-1.0, 1.0, 0.0]), rtol=1e-5, atol=0)
    state = tracker.state_dict()
    shorter = PromptStatistics(1, 1)
    shorter.load_state_dict(state)
    assert [len(v) for v in shorter.state_dict()["rewards"].values()] == [1, 1]
    state["rewards"][1].zero_()  # which is a copy
    assert tracker.state_dict()["rewards"][1].tolist() == [0.1, 0.1]


def published_dense(latents: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """pipeline_with_logprob_sdpo.py and train_sdpo.py, by loops in fp64."""
    n_steps = latents.shape[1]
    values, dense, anchors = latents.double().flatten(2).numpy(), [], []
    for flat, (first, middle, last) in zip(values, rewards.double().tolist(), strict=True):

        def alike(i: int, j: int, flat: Any = flat) -> float:
            return float(flat[i] @ flat[j] / np.linalg.norm(flat[i]) / np.linalg.norm(flat[j]))

        sums = [alike(j, 0) + alike(j, n_steps - 1) for j in range(n_steps)]
        anchor = int(np.argmin(np.round(sums, 12)))  # the first and the last are equal
        row = []
        for j in range(n_steps):
            s = [alike(j, 0), alike(j, anchor), alike(j, n_steps - 1)]
            row.append((s[0] * first + s[1] * middle + s[2] * last) / sum(s))
        row[0], row[-1] = first, last
        row[anchor] = middle
        dense.append(row)
        anchors.append(anchor)
    return torch.tensor(dense, dtype=FP64), torch.tensor(anchors)


@pytest.mark.parametrize("shape", [(3, 6, 4, 5, 5), (2, 2, 7), (2, 20, 4, 2, 3, 3), (1, 1, 3)])
def test_dense_rewards(shape: tuple[int, ...]) -> None:
    """Of latents that are all alike, and most between the first and the last step are least so."""
    latents = 1 + torch.rand(shape)
    latents[:, 1:-1] += 0.5 * torch.randn_like(latents[:, 1:-1])
    rewards = torch.randn(shape[0], 3)
    wanted, anchors = published_dense(latents, rewards)
    assert (anchors > 0).any() == (shape[1] > 2)
    assert torch.equal(anchor_step(latents), anchors)
    for anchor in (None, anchors, anchors.int()):
        found = dense_rewards(latents, rewards, anchor)
        torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-5)
    found = dense_rewards(latents.double(), rewards)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    half = dense_rewards(latents.bfloat16(), rewards, anchors)
    torch.testing.assert_close(half, wanted.float(), rtol=0.05, atol=0.05)


def test_on_a_straight_way_the_anchor_is_the_first_step() -> None:
    share = torch.linspace(0, 1, 9)[:, None]
    for _ in range(50):
        start, end = torch.rand(2, 64)
        latents = ((1 - share) * start + share * end)[None]
        assert anchor_step(latents).tolist() == [0]


def test_where_similarities_add_up_to_nothing() -> None:
    """A step that is the opposite of all three, one orthogonal to them, and one of zeros."""
    one, other = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    latents = torch.cat([one, -one, other, 0 * one, one, one])[None]
    rewards = torch.tensor([[1.0, 2.0, 6.0]])
    found = dense_rewards(latents, rewards, torch.tensor([4]))
    assert found.tolist() == [[1.0, 3.0, 3.0, 3.0, 2.0, 6.0]]
    assert anchor_step(latents).tolist() == [1]


def test_a_negative_similarity_weighs_negatively() -> None:
    angle = torch.tensor([0.0, 0.5, 2.0, 0.6, 0.7], dtype=FP64)
    latents = torch.stack([angle.cos(), angle.sin()], 1)[None]
    s = [math.cos(1.9 - x) for x in (0.0, 1.9, 0.7)]
    latents[0, 2] = torch.tensor([math.cos(1.9), math.sin(1.9)], dtype=FP64)
    latents[0, 1] = latents[0, 2] * 3  # whose length makes no difference
    assert s[0] < 0 < sum(s)
    wanted = (s[0] * 1 - s[1] * 4 + s[2] * 3) / sum(s)
    rewards = torch.tensor([[1.0, -4.0, 3.0]])
    found = dense_rewards(latents, rewards, torch.tensor([1]))
    assert found[0, 2].item() == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("gamma", [0.99, 0.0, 1.0, 0.5])
def test_discounted_returns(gamma: float) -> None:
    rewards = torch.randn(3, 7, dtype=FP64)
    wanted = torch.stack(
        [sum((gamma**k * rewards[:, j + k] for k in range(7 - j)), torch.zeros(3, dtype=FP64))
         for j in range(7)], 1,
    )  # fmt: skip
    found = discounted_returns(rewards, gamma)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(discounted_returns(rewards[0].float(), gamma), wanted[0].float())
    whole = discounted_returns(torch.tensor([[1, 2]]), gamma)
    torch.testing.assert_close(whole, torch.tensor([[1 + 2 * gamma, 2.0]]))
    assert discounted_returns(torch.zeros(2, 0)).shape == (2, 0)
    before = rewards.clone()
    discounted_returns(rewards)
    assert torch.equal(before, rewards)


TWO = torch.zeros(2)
LATENTS = torch.randn(2, 4, 3)
THREE = torch.zeros(2, 3)
BAD: list[tuple[Callable[[], Any], Any, str]] = [
    (lambda: group_advantages([1.0], 1), TypeError, "rewards must be a torch.Tensor, got a list"),  # type: ignore[arg-type]
    (lambda: group_advantages(TWO > 0, 1), TypeError, "rewards has dtype torch.bool"),
    (lambda: group_advantages(THREE, 1), ValueError, r"rewards has shape \(2, 3\); expected \(B,"),
    (lambda: group_advantages(TWO, 3), ValueError, "groups is 3, but rewards has shape"),
    (lambda: group_advantages(TWO, 0), ValueError, "groups is 0; expected at least 1"),
    (lambda: group_advantages(TWO, True), TypeError, "groups must be an int, got a bool"),
    (lambda: group_advantages(TWO, [0, 1]), TypeError, "groups must be a torch.Tensor or an int,"),  # type: ignore[arg-type]
    (lambda: group_advantages(TWO, TWO), TypeError, "groups has dtype torch.float32"),
    (lambda: group_advantages(TWO, torch.arange(3)), ValueError, r"groups has shape \(3,\)"),
    (lambda: group_advantages(TWO, 1, std="all"), ValueError, "std is 'all'; expected"),  # type: ignore[arg-type]
    (lambda: group_advantages(TWO, 1, eps=-1.0), ValueError, "eps is -1.0; expected a finite"),
    (lambda: PromptStatistics(4, 5), ValueError, "min_count is 5, but buffer_size is 4"),
    (lambda: PromptStatistics(0), ValueError, "buffer_size is 0; expected at least 1"),
    (lambda: PromptStatistics(2.0), TypeError, "buffer_size must be an int, got a float"),  # type: ignore[arg-type]
    (lambda: PromptStatistics(eps=math.nan), ValueError, "eps is nan"),
    (lambda: PromptStatistics().update("ab", TWO), TypeError, "prompts is a str; expected a seq"),
    (lambda: PromptStatistics().update(["a"], TWO), ValueError, "prompts has 1, but rewards has"),
    (lambda: PromptStatistics().update([[], []], TWO), TypeError, "prompts contains a list"),  # type: ignore[list-item]
    (lambda: PromptStatistics().update([*torch.ones(2)], TWO), TypeError, "contains a Tensor"),
    (lambda: PromptStatistics().update("ab", LATENTS), ValueError, r"expected \(B,\) or \(B, st"),
    (lambda: PromptStatistics().update(["a", "b"], TWO / 0), ValueError, r"contains nan at \[0\]"),
    (lambda: PromptStatistics().load_state_dict({}), ValueError, "state is not of PromptStatistic"),
    (lambda: dense_rewards(LATENTS[0], THREE), ValueError, r"latents has shape \(4, 3\)"),
    (lambda: dense_rewards(LATENTS.long(), THREE), TypeError, "latents has dtype torch.int64"),
    (lambda: dense_rewards(3, THREE), TypeError, "latents must be a torch.Tensor"),  # type: ignore[arg-type]
    (lambda: dense_rewards(LATENTS, TWO), ValueError, r"rewards has shape \(2,\); expected \(2, 3"),
    (lambda: dense_rewards(LATENTS, THREE[:, :2]), ValueError, "of the first, the anchor and the"),
    (lambda: dense_rewards(LATENTS, THREE, TWO), TypeError, "anchor has dtype torch.float32"),
    (lambda: dense_rewards(LATENTS, THREE, 3), TypeError, "anchor must be a torch.Tensor"),  # type: ignore[arg-type]
    (lambda: dense_rewards(LATENTS, THREE, torch.arange(3)), ValueError, "anchor has shape"),
    (
        lambda: dense_rewards(LATENTS, THREE, torch.tensor([0, 4])), ValueError,
        "anchor contains 4; expected 0 to 3",
    ),
    (lambda: dense_rewards(LATENTS, THREE.to("meta")), ValueError, "rewards is on meta; expected"),
    (lambda: discounted_returns(TWO, 1.5), ValueError, r"gamma is 1.5; expected a number in \[0"),
    (lambda: discounted_returns(TWO, "1"), TypeError, "gamma must be a float, got a str"),  # type: ignore[arg-type]
    (lambda: discounted_returns(torch.zeros(())), ValueError, r"rewards has shape \(\)"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call: Callable[[], Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_batch_that_is_refused_leaves_no_trace() -> None:
    tracker = PromptStatistics()
    tracker.update(["a"], torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"rewards has shape \(2, 4\), but earlier ones had"):
        tracker.update(["a", "b"], torch.zeros(2, 4))
    with pytest.raises(ValueError, match="rewards contains nan"):
        tracker.update(["b"], torch.full((1, 3), math.nan))
    assert {name: len(v) for name, v in tracker.state_dict()["rewards"].items()} == {"a": 1}


def test_it_is_exported() -> None:
    assert fastpref.advantages.group_advantages is group_advantages
    assert "advantages" in vars(fastpref)["__all__"]
