"""Preferences from rewards, against loops in fp64, hand-computed examples, and bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastpref
from fastpref.preferences import (
    ListPairs,
    all_pairs,
    best_and_worst,
    calibrated_rewards,
    pareto_frontiers,
    pareto_pairs,
    score_threshold,
    smoothed_preference,
    threshold_labels,
    win_fractions,
)

Lists = list[list[list[float]]]
SHAPES = ((1, 2, 1), (3, 2, 2), (4, 5, 3), (2, 16, 3))


def coarse(*shape: int) -> Tensor:
    """Rewards of few values, so with many ties."""
    return torch.randint(-2, 3, shape).double() / 2


def cut(rewards: Tensor, lengths: Tensor) -> Lists:
    return [one[:n].tolist() for one, n in zip(rewards, lengths.tolist(), strict=True)]


def padded(rewards: Tensor, lengths: Tensor) -> Tensor:
    """With NaN, or for integers a huge number, in the padding."""
    beyond = torch.arange(rewards.shape[1]) >= lengths[:, None]
    filler = math.nan if rewards.is_floating_point() else 10**6
    return rewards.masked_fill(beyond.reshape(*beyond.shape, *[1] * (rewards.dim() - 2)), filler)


def drawn_lengths(n_lists: int, k: int) -> Tensor:
    return torch.cat([torch.tensor([k]), torch.randint(0, k + 1, (n_lists - 1,))])


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def dominates(a: list[float], b: list[float]) -> bool:
    return all(x >= y for x, y in zip(a, b, strict=True)) and a != b


def wins_by_loops(lists: Lists, k: int, tie_value: float) -> list[list[float]]:
    """Algorithm 1 of RankDPO, with a count for ties."""
    phi = []
    for images in lists:
        counts = [0.0] * k
        for i, mine in enumerate(images):
            for j, other in enumerate(images):
                for a, b in zip(mine, other, strict=True):
                    if i != j:
                        counts[i] += 1.0 if a > b else tie_value if a == b else 0.0
        phi.append(
            [c / max(len(images[0]) * (len(images) - 1), 1) if images else 0 for c in counts]
        )
    return phi


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tie_value", [0.5, 0.0, 0.25])
def test_win_fractions(shape: tuple[int, int, int], tie_value: float) -> None:
    rewards = coarse(*shape)
    lengths = drawn_lengths(*shape[:2])
    for given, sizes in ((None, torch.full(shape[:1], shape[1])), (lengths, lengths)):
        by_loops = wins_by_loops(cut(rewards, sizes), shape[1], tie_value)
        wanted = torch.tensor(by_loops, dtype=torch.float64)
        found = win_fractions(padded(rewards, sizes), lengths=given, tie_value=tie_value)
        torch.testing.assert_close(found, wanted, rtol=1e-14, atol=0)
    torch.testing.assert_close(
        win_fractions(rewards[0], tie_value=tie_value),
        win_fractions(rewards[:1], tie_value=tie_value)[0],
    )


def test_win_fractions_of_five_models_and_four_images() -> None:
    """As RankDPO has them. Image 3 wins all of its 15 comparisons, image 0 none; 1 beats 2 under
    three models of five."""
    rewards = torch.tensor([[0.0] * 5, [2, 2, 2, 1, 1], [1, 1, 1, 2, 2], [3.0] * 5])
    phi = win_fractions(rewards)
    torch.testing.assert_close(phi, torch.tensor([0.0, 8 / 15, 7 / 15, 1.0]))
    units = rewards * torch.tensor([1e-3, 1.0, 100.0, 5.0, 7.0]) + torch.arange(5.0)
    assert torch.equal(win_fractions(units), phi)  # only the order counts


def test_ties_in_win_fractions() -> None:
    """A tie counts one half; the paper's algorithm, tie_value=0, counts it for neither."""
    two = torch.tensor([[1.0, 5.0], [1.0, 3.0]])
    assert win_fractions(two).tolist() == [0.75, 0.25]
    assert win_fractions(two, tie_value=0.0).tolist() == [0.5, 0.0]
    assert win_fractions(torch.ones(4, 3)).tolist() == [0.5] * 4
    phi = win_fractions(coarse(50, 4, 3))
    torch.testing.assert_close(phi.mean(1), torch.full((50,), 0.5, dtype=torch.float64))


def test_equal_images_get_exactly_equal_results() -> None:
    """So that a tie is no preference: RankDPO's weight is 0, and neither image dominates."""
    rewards = torch.randn(20, 7, 3).repeat(1, 2, 1)[:, torch.randperm(14)]
    lengths = torch.full((20,), 14)
    same = (rewards[:, :, None] == rewards[:, None]).all(3)
    for made in (
        win_fractions(rewards)[..., None],
        calibrated_rewards(rewards),
        calibrated_rewards(rewards, lengths=lengths),
        calibrated_rewards(rewards, torch.randn(20, 5, 3)),
    ):
        assert ((made[:, :, None] == made[:, None]).all(3) | ~same).all()


def calibrated_by_loops(lists: Lists, base: Lists | None, k: int) -> list[list[list[float]]]:
    found = []
    for b, images in enumerate(lists):
        rows = []
        for i, mine in enumerate(images):
            others = images[:i] + images[i + 1 :] if base is None else base[b]
            rates = [[sigmoid(x - y) for x, y in zip(mine, o, strict=True)] for o in others]
            rows.append([sum(r) / len(rates) for r in zip(*rates, strict=True)])
        found.append(rows)
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("m", [None, 1, 6])
def test_calibrated_rewards(shape: tuple[int, int, int], m: int | None) -> None:
    n_lists, k, n_models = shape
    rewards = 2 * torch.randn(shape, dtype=torch.float64)
    base = None if m is None else torch.randn(n_lists, m, n_models, dtype=torch.float64)
    lengths = drawn_lengths(n_lists, k)
    for given, sizes in ((None, torch.full((n_lists,), k)), (lengths, lengths)):
        wanted = torch.zeros(shape, dtype=torch.float64)
        rows = calibrated_by_loops(cut(rewards, sizes), None if base is None else base.tolist(), k)
        for b, row in enumerate(rows):
            if row and row[0]:  # not of a single image without others
                wanted[b, : len(row)] = torch.tensor(row, dtype=torch.float64)
        found = calibrated_rewards(padded(rewards, sizes), base, lengths=given)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15)
        assert ((found >= 0) & (found <= 1)).all()
    one = calibrated_rewards(rewards[0], None if base is None else base[0])
    torch.testing.assert_close(one, calibrated_rewards(rewards, base)[0])


def test_calibrated_rewards_by_hand() -> None:
    """Differences of log 3 win with 3/4, of log 9 with 9/10."""
    step = math.log(3.0)
    rewards = torch.tensor([[0.0], [step], [2 * step]], dtype=torch.float64)
    wanted = torch.tensor([[(1 / 4 + 1 / 10) / 2], [1 / 2], [(3 / 4 + 9 / 10) / 2]]).double()
    torch.testing.assert_close(calibrated_rewards(rewards), wanted)
    torch.testing.assert_close(
        calibrated_rewards(rewards[2:], rewards[:2]), torch.tensor([[0.825]]).double()
    )
    pairs = best_and_worst(calibrated_rewards(rewards).mean(-1))
    assert (pairs.winner.item(), pairs.loser.item()) == (2, 0)
    assert pairs.delta.item() == pytest.approx(0.65)
    pred, target, ref = torch.randn(3, 3, 8, dtype=torch.float64)
    chosen = [pairs.stack(x) for x in (pred, target, ref)]
    out = fastpref.capo_loss(chosen[0], chosen[1], chosen[2], pairs.delta, beta=2.0)
    errors = (pred - target).square().mean(1) - (ref - target).square().mean(1)
    assert out.loss.item() == pytest.approx((0.65 + 2.0 * (errors[2] - errors[0]).item()) ** 2)


def test_calibrated_rewards_are_finite_at_any_distance() -> None:
    rates = calibrated_rewards(torch.tensor([[-3e38], [0.0], [3e38]]))
    assert rates[:, 0].tolist() == [0.0, 0.5, 1.0]
    assert calibrated_rewards(torch.zeros(5, 2)).eq(0.5).all()


@pytest.mark.parametrize("shape", [*SHAPES, (30, 6, 2)])
def test_pareto_frontiers(shape: tuple[int, int, int]) -> None:
    rewards = coarse(*shape)
    lengths = drawn_lengths(*shape[:2])
    for given, sizes in ((None, torch.full(shape[:1], shape[1])), (lengths, lengths)):
        found = pareto_frontiers(padded(rewards, sizes), lengths=given)
        for b, images in enumerate(cut(rewards, sizes)):
            rest = [False] * (shape[1] - len(images))
            upper = [not any(dominates(other, mine) for other in images) for mine in images]
            lower = [not any(dominates(mine, other) for other in images) for mine in images]
            assert found.upper[b].tolist() == upper + rest
            assert found.lower[b].tolist() == lower + rest
    one = pareto_frontiers(rewards[0])
    assert torch.equal(one.upper, pareto_frontiers(rewards).upper[0])


def test_calibration_keeps_the_frontiers() -> None:
    rewards = torch.randn(200, 8, 3).mul(4).round() / 4
    for one, other in zip(
        pareto_frontiers(rewards), pareto_frontiers(calibrated_rewards(rewards)), strict=True
    ):
        assert torch.equal(one, other)


def test_pareto_pairs() -> None:
    """One image of the upper frontier, one of the lower; all such pairs come equally often."""
    # Image 0 dominates 2 and 4; 1 dominates 3 and 4; 2 and 3 dominate 4; 5 is comparable with none
    rewards = torch.tensor([[4.0, 2], [2, 4], [3, 1], [1, 3], [0.5, 0.5], [5, 0]])
    upper, lower = pareto_frontiers(rewards)
    assert upper.tolist() == [True, True, False, False, False, True]
    assert lower.tolist() == [False, False, False, False, True, True]
    generator = torch.Generator().manual_seed(0)
    lists = rewards.expand(4000, -1, -1)
    pairs = pareto_pairs(lists, generator=generator)
    assert torch.equal(pairs.prompt, torch.arange(4000))
    assert pairs.loser.eq(4).all()
    counts = pairs.winner.bincount(minlength=6).tolist()
    assert counts[2:] == [0, 0, 0, 0]
    assert counts[0] == pytest.approx(2000, abs=200)
    torch.testing.assert_close(pairs.delta, torch.full((4000,), 2.5))
    again = pareto_pairs(lists, generator=generator.manual_seed(0))
    assert torch.equal(pairs.winner, again.winner)
    assert not torch.equal(pairs.winner, pareto_pairs(lists, generator=generator).winner)


def test_lists_without_a_pair_are_left_out() -> None:
    """Equals, images of which each is better at something else, and lists of one image or none."""
    rewards = torch.tensor(
        [[[1.0, 1], [1, 1]], [[0, 1], [1, 0]], [[0, 0], [1, 1]], [[5, 5], [0, 0]]]
    )
    assert pareto_pairs(rewards).prompt.tolist() == [2, 3]
    assert pareto_pairs(rewards, lengths=torch.tensor([2, 2, 2, 1])).prompt.tolist() == [2]
    assert pareto_pairs(rewards[1]).winner.numel() == 0
    score = rewards[..., 0]
    assert best_and_worst(score).prompt.tolist() == [1, 2, 3]
    assert best_and_worst(score, lengths=torch.tensor([2, 2, 1, 0])).prompt.tolist() == [1]
    assert all_pairs(score, lengths=torch.tensor([2, 1, 2, 0])).prompt.tolist() == [2]
    empty = best_and_worst(torch.ones(3))
    assert empty.delta.shape == (0,)
    assert empty.stack(torch.randn(3, 4, 8)).shape == (0, 4, 8)


def test_a_winner_of_the_frontier_may_have_the_lower_mean() -> None:
    """Where rewards conflict; capo_loss takes a negative delta as it is."""
    rewards = torch.tensor([[0.9, 0.1], [0.85, 0.05], [0.55, 0.85], [0.5, 0.8]])
    generator = torch.Generator().manual_seed(1)
    found = {}
    for _ in range(50):
        pairs = pareto_pairs(rewards, generator=generator)
        found[pairs.winner.item(), pairs.loser.item()] = round(pairs.delta.item(), 5)
    assert found == {(0, 1): 0.05, (0, 3): -0.15, (2, 1): 0.25, (2, 3): 0.05}


def pairs_of(pairs: ListPairs) -> set[tuple[int, int, int]]:
    return {*zip(*(x.tolist() for x in pairs[:3]), strict=True)}  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(1, 2), (5, 2), (6, 5), (3, 16)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64])
def test_pairs_of_lists(shape: tuple[int, int], dtype: torch.dtype) -> None:
    score = (2 * coarse(*shape)).to(dtype)
    lengths = drawn_lengths(*shape)
    for given, sizes in ((None, torch.full(shape[:1], shape[1])), (lengths, lengths)):
        wanted, extremes = set(), set()
        for b, n in enumerate(sizes.tolist()):
            one = score[b, :n].tolist()
            wanted |= {(b, i, j) for i in range(n) for j in range(n) if one[i] > one[j]}
            if n and max(one) > min(one):
                extremes.add((b, one.index(max(one)), one.index(min(one))))
        everything = all_pairs(padded(score, sizes), lengths=given)
        assert pairs_of(everything) == wanted
        assert everything.prompt.shape == (len(wanted),)
        best = best_and_worst(padded(score, sizes), lengths=given)
        assert pairs_of(best) == extremes
        for pairs in (everything, best):
            gaps = score[pairs.prompt, pairs.winner] - score[pairs.prompt, pairs.loser]
            torch.testing.assert_close(pairs.delta.double(), gaps.double())
        wide = all_pairs(padded(score, sizes), lengths=given, min_delta=1.0)
        assert pairs_of(wide) == {p for p in wanted if score[p[0], p[1]] - score[p[0], p[2]] > 1}
    assert pairs_of(all_pairs(score[0])) == pairs_of(all_pairs(score[:1]))


def test_stack() -> None:
    """Winners first, of batches and of single lists, with what autograd needs."""
    values = torch.randn(3, 4, 2, 5, requires_grad=True)
    pairs = all_pairs(torch.randn(3, 4))
    stacked = pairs.stack(values)
    assert stacked.shape == (2 * 18, 2, 5)
    for p, (prompt, winner, loser) in enumerate(zip(*pairs[:3], strict=True)):  # type: ignore[arg-type]
        assert torch.equal(stacked[p], values[prompt, winner])
        assert torch.equal(stacked[18 + p], values[prompt, loser])
    (grad,) = torch.autograd.grad(stacked.sum(), values)
    assert grad.eq(3).all()  # each image is in three pairs
    single = best_and_worst(torch.tensor([1.0, 3.0, 2.0]))
    assert single.stack(torch.tensor([10.0, 30.0, 20.0])).tolist() == [30.0, 10.0]
    with pytest.raises(
        ValueError, match=r"values has shape \(3, 3, 2\); expected \(3, 4, \.\.\.\)"
    ):
        pairs.stack(torch.zeros(3, 3, 2))
    with pytest.raises(ValueError, match=r"values has shape \(1, 3\); expected \(3, \.\.\.\)"):
        single.stack(torch.zeros(1, 3))
    with pytest.raises(TypeError, match=r"values must be a torch\.Tensor, got a list"):
        single.stack([1.0, 2.0, 3.0])  # type: ignore[arg-type]


def test_phi_gives_the_weights_of_rankdpo() -> None:
    """|2^phi_i - 2^phi_j| |1/log(1 + rank_i) - 1/log(1 + rank_j)|, by hand for k = 2 and 3."""
    phi = win_fractions(torch.tensor([[1.0], [0.0]])).double()
    gain = (2.0**phi).diff().abs() * abs(1 / math.log(2) - 1 / math.log(3))
    assert gain.item() == pytest.approx(1 / math.log(2) - 1 / math.log(3))
    phi = win_fractions(torch.tensor([[1.0], [2.0], [1.0]])).double()
    assert phi.tolist() == [0.25, 1.0, 0.25]
    assert (2.0 ** phi[0] - 2.0 ** phi[2]).item() == 0.0  # a tie has no weight, whatever its ranks


def test_smoothed_preference_by_hand() -> None:
    """SmPO's code: softmax of two scores that were mapped from the range to [0, 1]."""
    w, l = torch.tensor([0.9, 0.2, 0.5]), torch.tensor([0.4, 0.7, 0.5])
    prob = smoothed_preference(w, l, low=0.0, high=0.5)
    up, down = math.exp(1.8), math.exp(0.8)
    torch.testing.assert_close(prob, torch.tensor([up / (up + down), down / (up + down), 0.5]))
    assert fastpref.smoothed_preference is smoothed_preference
    assert "smoothed_preference" in vars(fastpref)["__all__"]


@pytest.mark.parametrize("size", [1, 2, 5, 10, 11, 1000])
def test_score_threshold(size: int) -> None:
    score = torch.randn(size, dtype=torch.float64)
    for percentile in (0, 30, 50.0, 73.1, 100):
        found = score_threshold(score, percentile)
        torch.testing.assert_close(found, torch.quantile(score, percentile / 100))
    assert found.shape == ()
    batched = score_threshold(score.reshape(1, size, 1))
    assert torch.equal(batched, score_threshold(score))


def test_the_threshold_is_a_score_where_a_percentile_is_one() -> None:
    """Exactly, so that this score's label is positive: rank 3 of 11 at percentile 30, and so on."""
    score = torch.randn(11).sort().values
    for rank in range(11):
        tau = score_threshold(score[torch.randperm(11)], 10 * rank)
        assert tau.item() == score[rank].item()
        assert threshold_labels(score, tau).label.sum().item() == 11 - rank
    assert score_threshold(torch.tensor([1, 5, 2, 4])).item() == 3.0
    assert score_threshold(torch.full((6,), 0.1), 37.0).item() == torch.tensor(0.1).item()


def test_threshold_labels() -> None:
    score = torch.tensor([[0.2, 0.5], [0.6, 0.9]], dtype=torch.float64)
    for tau in (0.5, torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64)):
        label, weight = threshold_labels(score, tau)
        assert label.tolist() == [[False, True], [True, True]]
        wanted = torch.tensor([[2.5, 1.0], [1.5, 3.0]]).double()
        torch.testing.assert_close(weight, wanted)
    assert threshold_labels(score, 0.5, confidence=0).weight.eq(1).all()
    stars = torch.tensor([1, 3, 5])
    found = threshold_labels(stars, score_threshold(stars))
    assert found.label.tolist() == [False, True, True]
    assert found.weight.tolist() == [11.0, 1.0, 11.0]


LISTED: list[Callable[..., Any]] = [
    win_fractions,
    calibrated_rewards,
    pareto_frontiers,
    pareto_pairs,
]
SCORED: list[Callable[..., Any]] = [best_and_worst, all_pairs]
TGO: list[Callable[..., Any]] = [score_threshold, lambda score: threshold_labels(score, 0.5)]


def tensors_of(made: Any) -> list[Tensor]:
    return [made] if isinstance(made, Tensor) else [x for x in made if isinstance(x, Tensor)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32])
def test_any_dtype_and_no_gradient(dtype: torch.dtype) -> None:
    """Results are fp32, and fp64 for fp64; half precision is computed in fp32."""
    low = (4 * coarse(3, 4, 2)).to(dtype)
    for functions, given in ((LISTED, low), (SCORED, low[..., 0]), (TGO, low[..., 0])):
        for function in functions:
            for wide, result in ((torch.float32, torch.float32), (torch.float64, torch.float64)):
                found = tensors_of(function(given.to(wide).requires_grad_()))
                assert not any(x.requires_grad for x in found)
                assert {x.dtype for x in found} <= {result, torch.bool, torch.int64}
            if function is pareto_pairs:  # which draws
                continue
            pairs = zip(
                tensors_of(function(given)), tensors_of(function(given.float())), strict=True
            )
            assert all(torch.equal(one, other) for one, other in pairs)


def test_under_compile() -> None:
    torch._dynamo.reset()
    rewards, lengths = torch.randn(3, 4, 2), torch.tensor([4, 2, 3])
    for function in (win_fractions, calibrated_rewards, pareto_frontiers):
        compiled: Any = torch.compile(function, backend="eager", fullgraph=True)
        found = tensors_of(compiled(rewards, lengths=lengths))
        wanted = tensors_of(function(rewards, lengths=lengths))
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("function", LISTED)
def test_lists_that_are_refused(function: Callable[..., Any]) -> None:
    rewards = torch.zeros(2, 3, 2)
    nan, infinite = rewards.clone(), rewards.clone()
    nan[1, 2, 0], infinite[0, 1, 1] = math.nan, math.inf
    cases: list[tuple[type[Exception], str, Any, dict[str, Any]]] = [
        (TypeError, "rewards must be a torch.Tensor, got a list", [[1.0]], {}),
        (TypeError, "rewards has dtype torch.bool; expected", rewards > 0, {}),
        (ValueError, r"rewards has shape \(3,\); expected \(B, k, n\), or \(k, n\)",
         rewards[0, :, 0], {}),
        (ValueError, r"rewards has shape \(2, 0, 2\); expected", rewards[:, :0], {}),
        (ValueError, r"rewards contains nan at \[1, 2, 0\]; expected finite", nan, {}),
        (ValueError, r"rewards contains inf at \[0, 1, 1\]", infinite, {}),
        (ValueError, r"rewards contains nan at", nan, {"lengths": torch.tensor([2, 3])}),
        (ValueError, "lengths contains 4; expected 0 to 3", rewards,
         {"lengths": torch.tensor([4, 1])}),
        (ValueError, "lengths contains -1", rewards, {"lengths": torch.tensor([3, -1])}),
        (ValueError, r"lengths has shape \(3,\); expected one per list of rewards, \(2,\)", rewards,
         {"lengths": torch.tensor([3, 3, 3])}),
        (TypeError, "lengths has dtype torch.float32", rewards, {"lengths": torch.ones(2)}),
        (TypeError, "lengths must be a torch.Tensor, got a list", rewards, {"lengths": [3, 3]}),
        (ValueError, r"lengths was given, but rewards is a single list, of shape \(3, 2\)",
         rewards[0], {"lengths": torch.tensor([3])}),
    ]  # fmt: skip
    for error, message, given, options in cases:
        with pytest.raises(error, match=message):
            function(given, **options)
    function(nan, lengths=torch.tensor([3, 2]))  # in padding


@pytest.mark.parametrize("function", SCORED)
def test_scores_of_lists_that_are_refused(function: Callable[..., Any]) -> None:
    score = torch.tensor([[1.0, math.nan], [1.0, 2.0]])
    cases: list[tuple[type[Exception], str, Any]] = [
        (
            ValueError,
            r"score has shape \(2, 2, 1\); expected \(B, k\), or \(k,\)",
            score[..., None],
        ),
        (ValueError, r"score contains nan at \[0, 1\]", score),
        (TypeError, "score must be a torch.Tensor, got a float", 0.5),
    ]
    for error, message, given in cases:
        with pytest.raises(error, match=message):
            function(given)
    function(score, lengths=torch.tensor([1, 2]))


def test_other_arguments_that_are_refused() -> None:
    rewards, score = torch.zeros(2, 3, 2), torch.zeros(4)
    for function in (win_fractions, calibrated_rewards):
        with pytest.raises(ValueError, match=r"lists of 1; expected 2 images a list at least"):
            function(rewards[:, :1])
    calibrated_rewards(rewards[:, :1], rewards)
    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (ValueError, r"tie_value is 0\.6; expected a number in \[0, 0\.5\]",
         lambda: win_fractions(rewards, tie_value=0.6)),
        (TypeError, "tie_value must be a float, got a bool",
         lambda: win_fractions(rewards, tie_value=True)),
        (ValueError, r"base_rewards has shape \(2, 3, 1\), but rewards has \(2, 3, 2\); expected "
         r"\(2, m, 2\)", lambda: calibrated_rewards(rewards, rewards[..., :1])),
        (ValueError, r"expected \(2, m, 2\)", lambda: calibrated_rewards(rewards, rewards[0])),
        (ValueError, r"expected \(m, 2\)", lambda: calibrated_rewards(rewards[0], rewards)),
        (ValueError, r"expected \(2, m, 2\)", lambda: calibrated_rewards(rewards, rewards[:, :0])),
        (ValueError, "base_rewards is on meta, but rewards is on cpu",
         lambda: calibrated_rewards(rewards, rewards.to("meta"))),
        (ValueError, "base_rewards contains nan",
         lambda: calibrated_rewards(rewards, rewards * math.nan)),
        (ValueError, "min_delta is -1.0; expected a finite number, 0 or above",
         lambda: all_pairs(score, min_delta=-1.0)),
        (ValueError, r"percentile is 101; expected a number in \[0, 100\]",
         lambda: score_threshold(score, 101)),
        (TypeError, "percentile must be a float, got a str",
         lambda: score_threshold(score, "50")),  # type: ignore[arg-type]
        (ValueError, r"score has shape \(0,\)", lambda: score_threshold(score[:0])),
        (ValueError, "score contains inf", lambda: score_threshold(score + math.inf)),
        (ValueError, r"threshold is a torch.float32 tensor of shape \(4,\); expected a float",
         lambda: threshold_labels(score, score)),
        (ValueError, "threshold contains nan; expected finite",
         lambda: threshold_labels(score, torch.tensor(math.nan))),
        (ValueError, "threshold is nan", lambda: threshold_labels(score, math.nan)),
        (TypeError, "threshold must be a float, got a NoneType",
         lambda: threshold_labels(score, None)),  # type: ignore[arg-type]
        (ValueError, "confidence is -1; expected a finite number, 0 or above",
         lambda: threshold_labels(score, 0.0, confidence=-1)),
    ]  # fmt: skip
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
