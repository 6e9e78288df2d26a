"""Preferences from rewards: the scores, probabilities, labels and pairs that losses take."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import check_finite, check_number, check_real, dtype_of
from .context import readable


class Frontiers(NamedTuple):
    """The best and the worst images of each list under several rewards at once: (B, k) bool, or
    (k,) of a single list. See `pareto_frontiers`."""

    upper: Tensor
    lower: Tensor


class ListPairs(NamedTuple):
    """P pairs chosen from B lists of k images. Where a list has no pair, none is made up.

    prompt: (P,) int64, which list; all 0 for a single list.
    winner, loser: (P,) int64, which images of it.
    delta: (P,), the winner's score less the loser's; fp32, fp64 for fp64 rewards.
    lists: (B, k), or (k,) of a single list: what the pairs were chosen from.
    """

    prompt: Tensor
    winner: Tensor
    loser: Tensor
    delta: Tensor
    lists: tuple[int, ...]

    def stack(self, values: Tensor) -> Tensor:
        """What the images of the pairs have, (2P, ...), winners first, as pair losses take it.

        values: what each image has, (B, k, ...), or (k, ...) of a single list. What both images of
        a pair share, such as their prompt's embedding, is ``of_prompts[pairs.prompt]``, (P, ...).
        """
        if not isinstance(values, Tensor):
            raise TypeError(f"values must be a torch.Tensor, got a {type(values).__name__}")
        if values.shape[: len(self.lists)] != self.lists:
            needed = ", ".join(map(str, self.lists))
            raise ValueError(
                f"values has shape {tuple(values.shape)}; expected ({needed}, ...), the lists that "
                "the pairs were chosen from"
            )
        batch = values if len(self.lists) == 2 else values[None]
        return torch.cat([batch[self.prompt, self.winner], batch[self.prompt, self.loser]])


class ThresholdLabels(NamedTuple):
    """label: whether each score reaches the threshold, bool. weight: how far it is from it, 1 or
    above. Both have the scores' shape."""

    label: Tensor
    weight: Tensor


def win_fractions(
    rewards: Tensor, *, lengths: Tensor | None = None, tie_value: float = 0.5
) -> Tensor:
    """RankDPO's phi: the fraction of its comparisons that each image of a list wins, in [0, 1].

    An image is compared with each of the k - 1 others under each of the n reward models::

        phi_i  = wins_i / (n (k - 1))
        wins_i = sum over l, j != i of [r_il > r_jl] + tie_value * [r_il = r_jl]

    Only the order within a list counts, so the reward models may have any units. The result is the
    `score` of `rankdpo_loss`, whose gain is 2^phi and whose ranks are those of phi.

    Args:
        rewards: (B, k, n), or (k, n) of a single list; any float or integer dtype, k from 2. More
            is better.
        lengths: (B,), how many images each list has, from 0 to k, where they differ. What lies
            beyond is padding and may be NaN.
        tie_value: what a tie counts for each of the two, in [0, 1/2]. With 1/2, phi averages to 1/2
            over a list. The paper's algorithm gives a tie to neither image: that is 0.

    Returns: phi, (B, k) or (k,), fp32 (fp64 for fp64 rewards), no gradient. It is 0 in padding, and
    in a list of one image, which has no comparisons. Needs memory for B k^2 n comparisons.

    Raises: TypeError, ValueError; for rewards that are not finite, outside padding, and for lengths
    out of range where they are on the CPU (elsewhere, reading them would wait for the device).

    Source: Karthik et al., "Scalable Ranked Preference Optimization for Text-to-Image Generation",
    arXiv:2410.18013, algorithm 1, with n = 5 and k = 4. No official code was found. The paper says
    nothing of ties beyond its strict comparison, and nothing of lists of different length.
    """
    batch, valid = _check_lists("rewards", rewards, 3, lengths, least=2)
    if not 0.0 <= check_number("tie_value", tie_value) <= 0.5:
        raise ValueError(f"tie_value is {tie_value}; expected a number in [0, 0.5]")
    mine, other = batch[:, :, None], batch[:, None]
    won = (mine > other).to(dtype_of(rewards)) + tie_value * (mine == other)
    met = _comparisons(valid)
    phi = (won.sum(3) * met).sum(2) / (met.sum(2) * batch.shape[2]).clamp(min=1)
    return phi if rewards.dim() == 3 else phi[0]


def calibrated_rewards(
    rewards: Tensor, base_rewards: Tensor | None = None, *, lengths: Tensor | None = None
) -> Tensor:
    """CaPO's calibrated rewards: how often an image beats the pretrained model's images, in [0, 1].

    Under each reward model r by itself, with the probability of the Bradley-Terry model::

        r_ca_i = mean over j != i of sigmoid(r_i - r_j)          of the k images
        r_ca_i = mean over j      of sigmoid(r_i - base_r_j)     with base_rewards

    The paper averages them over the reward models, ``calibrated.mean(-1)``, and regresses the
    margin on the difference of a pair: `capo_loss(delta=...)`.

    Args:
        rewards: (B, k, n) of n reward models, or (k, n) of a single list; any float or integer
            dtype, k from 2. In log-odds: a difference of 1 means that the better image wins with
            probability 0.73. A score that its model multiplies before the softmax it was trained
            with must be multiplied here as well (similarities of PickScore and HPSv2, which are
            near 0.2, by their logit scale, about 100).
        base_rewards: (B, m, n) or (m, n), of m images that the pretrained model made of the same
            prompts. Without it the k images are the pretrained model's own, as in the paper. With
            it, k may be 1.
        lengths: (B,), how many of the k images each list has, as in `win_fractions`.

    Returns: (B, k, n) or (k, n), fp32 (fp64 for fp64 rewards), no gradient. 0 in padding, and in a
    list of one image without base_rewards.

    Raises: as `win_fractions`.

    Source: Lee et al., "Calibrated Multi-Preference Optimization for Aligning Diffusion Models",
    arXiv:2502.02588; no code was published. The project page confirms win rates by the
    Bradley-Terry model, in [0, 1], with 16 images a prompt. The formula comes from two second-hand
    notes, which agree; the paper's own equations could not be read. Whether the paper scales its
    rewards (MPS, VQAScore, VILA) first could not be verified: unscaled scores in [0, 1] give win
    rates between 0.27 and 0.73. base_rewards is this package's, for images of other models.
    """
    least = 2 if base_rewards is None else 1
    batch, valid = _check_lists("rewards", rewards, 3, lengths, least)
    batch = batch.to(dtype_of(rewards))
    if base_rewards is None:
        both = (valid[:, :, None] & valid[:, None])[..., None]
        won = (torch.sigmoid(batch[:, :, None] - batch[:, None]) * both).sum(2)
        # less the 1/2 of an image against itself: so the sums of equal images have equal terms in
        # equal order, and rounding makes no difference between them
        calibrated = (won - 0.5 * valid[..., None]) / (both.sum(2) - 1).clamp(min=1)
    else:
        base = _check_base(base_rewards, rewards)
        won = torch.sigmoid(batch[:, :, None] - base[:, None].to(batch.dtype))
        calibrated = won.mean(2) * valid[..., None]
    return calibrated if rewards.dim() == 3 else calibrated[0]


def pareto_frontiers(rewards: Tensor, *, lengths: Tensor | None = None) -> Frontiers:
    """The upper and the lower Pareto frontier of each list, as masks.

    One image dominates another where it is at least as good under every reward model and better
    under one. Upper: those that none dominates. Lower: those that dominate none. An image that is
    comparable with no other is in both, and so are all images of a list of equals.

    Args: as in `win_fractions`. Calibrated rewards have the same frontiers as rewards, because a
    win rate rises with the reward (unless rounding makes two of them equal).

    Returns: Frontiers, False in padding. Needs memory for B k^2 n comparisons.

    Raises: as `win_fractions`. Source: as `pareto_pairs`.
    """
    upper, lower = _frontiers(*_check_lists("rewards", rewards, 3, lengths))
    return Frontiers(upper, lower) if rewards.dim() == 3 else Frontiers(upper[0], lower[0])


def pareto_pairs(
    rewards: Tensor, *, lengths: Tensor | None = None, generator: torch.Generator | None = None
) -> ListPairs:
    """CaPO's pairs of images under several reward models: one pair of each list, drawn at random.

    The winner comes from the upper Pareto frontier and the loser from the lower one, each drawn
    evenly and independently; images that are in both are left out. So a list has no pair where no
    image dominates another. delta is the difference of the rewards' mean over models. Under
    conflicting rewards it may be negative: the winner need not dominate the loser.

    Args:
        rewards: (B, k, n) or (k, n), from `calibrated_rewards`; others too, if their units agree,
            because delta averages them.
        lengths: as in `win_fractions`.
        generator: of the draw, on any device.

    Returns: ListPairs, at most B; draw again at every step, as the paper does.

    Raises: as `win_fractions`. Waits for the device, to know how many pairs there are.

    Source: as in `calibrated_rewards`. The project page confirms that positives come from the
    upper frontier and negatives from the lower one, that duplicates are removed, and that pairs are
    drawn at random for each step. Three things could not be verified: that the lower frontier is
    what dominates nothing (one note calls it the set of dominated images), from which side
    duplicates are removed (here from both), and that dominance needs one strict inequality (the
    note has none, by which equal images would dominate each other).
    """
    batch, valid = _check_lists("rewards", rewards, 3, lengths)
    upper, lower = _frontiers(batch, valid)
    sides = torch.stack([upper & ~lower, lower & ~upper])
    device = batch.device if generator is None else generator.device
    noise = torch.rand(sides.shape, generator=generator, device=device).to(batch.device)
    winner, loser = noise.masked_fill(~sides, -1).argmax(2)
    has_pair = sides.any(2).all(0)
    mean = batch.to(dtype_of(rewards)).mean(2)
    return _list_pairs(mean, has_pair, winner, loser, rewards.shape[:-1])


def best_and_worst(score: Tensor, *, lengths: Tensor | None = None) -> ListPairs:
    """The best image of each list against its worst: one pair of each list that is not all equal.

    What CaPO does with a single reward model, from `calibrated_rewards`, and what is usually done
    to train a pair loss on lists. Of equal images the first counts.

    Args:
        score: (B, k), or (k,) of a single list; more is better.
        lengths: as in `win_fractions`.

    Returns: ListPairs, at most B; delta is above 0.

    Raises: as `win_fractions`. Waits for the device, to know how many pairs there are.
    """
    batch, valid = _check_lists("score", score, 2, lengths)
    batch = batch.to(dtype_of(score))
    winner = batch.masked_fill(~valid, -math.inf).argmax(1)
    loser = batch.masked_fill(~valid, math.inf).argmin(1)
    best, worst = (batch.gather(1, i[:, None])[:, 0] for i in (winner, loser))
    return _list_pairs(batch, best > worst, winner, loser, score.shape)


def all_pairs(score: Tensor, *, lengths: Tensor | None = None, min_delta: float = 0.0) -> ListPairs:
    """Every pair of each list whose scores differ: up to k (k - 1) / 2 of a list.

    Args:
        score: (B, k), or (k,) of a single list; more is better.
        lengths: as in `win_fractions`.
        min_delta: pairs whose scores differ by this or less are left out; in the score's units,
            from 0.

    Returns: ListPairs, by prompt, then winner, then loser; delta is above min_delta. An image is in
    up to k - 1 of them: predict each image once, and let `stack` pick the predictions.

    Raises: as `win_fractions`. Waits for the device, to know how many pairs there are.
    """
    batch, valid = _check_lists("score", score, 2, lengths)
    low = check_number("min_delta", min_delta, from_0=True)
    batch = batch.to(dtype_of(score))
    gap = batch[:, :, None] - batch[:, None]
    prompt, winner, loser = ((gap > low) & _comparisons(valid)).nonzero(as_tuple=True)
    return ListPairs(prompt, winner, loser, gap[prompt, winner, loser], tuple(score.shape))


def smoothed_preference(
    score_w: Tensor,
    score_l: Tensor,
    *,
    low: float = 0.11543526500463486,
    high: float = 0.28201571106910706,
) -> Tensor:
    """SmPO's probability that the winner is the better image, (B,) fp32, from two reward scores.

    ``prob = sigmoid((score_w - score_l) / (high - low))``: the softmax of both scores after low and
    high, the reward's range over the data set, became 0 and 1.

    Args:
        score_w, score_l: (B,) scores of winners and losers, of any dtype.
        low, high: the range; the defaults are the official code's, PickScore's on Pick-a-Pic. A
            difference of the whole range gives 0.73: probabilities stay soft.

    Raises: TypeError, ValueError. Source: as in `smpo_loss`; train.py, lines 739-747.
    """
    for name, score in (("score_w", score_w), ("score_l", score_l)):
        if not isinstance(score, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got a {type(score).__name__}")
    if score_w.dim() != 1 or score_w.shape != score_l.shape:
        raise ValueError(
            f"score_w has shape {tuple(score_w.shape)} and score_l {tuple(score_l.shape)}; "
            "expected one score per pair, (B,), in both"
        )
    if not high > low:
        raise ValueError(f"high is {high} and low is {low}; expected high above low")
    return torch.sigmoid((score_w.float() - score_l.float()) / (high - low))


def score_threshold(score: Tensor, percentile: float = 50.0) -> Tensor:
    """TGO's threshold tau between good and bad samples: a percentile of all scores.

    ``rank = percentile / 100 * (N - 1)`` among the N sorted scores, counted from 0; between two
    ranks tau is interpolated linearly. At 50 it is the median.

    Args:
        score: scores of the whole data set, or of enough images that the reference model made of
            its prompts; any shape, any float or integer dtype. A batch's own would move tau.
        percentile: in [0, 100]; the median is 50 and not 0.5.

    Returns: tau, (), fp32 (fp64 for fp64 scores), no gradient: the `threshold` of `tgo_loss`.

    Raises: TypeError, ValueError; for scores that are not finite where they are on the CPU.

    Source: Bai et al., "Threshold-Guided Optimization for Visual Generative Models",
    arXiv:2605.04653, section 3.2.2 and algorithm 1, read in a text of the submission; no code was
    found. It does not say how a percentile between two scores is taken; this is numpy's default.
    The paper's split of Pick-a-Pic at the median, 26 % good, does not follow from that rule, by
    which half of the samples or more reach the median.
    """
    values = _check_scores(score)
    share = check_number("percentile", percentile)
    if not 0.0 <= share <= 100.0:
        raise ValueError(f"percentile is {percentile}; expected a number in [0, 100]")
    rank = share * (values.numel() - 1) / 100.0
    low = math.floor(rank)
    ordered = values.reshape(-1).sort().values
    return torch.lerp(ordered[low], ordered[math.ceil(rank)], rank - low)


def threshold_labels(
    score: Tensor, threshold: float | Tensor, *, confidence: float = 5.0
) -> ThresholdLabels:
    """TGO's labels and weights of unpaired samples: good from the threshold on, and the farther
    from it the heavier.

    ::

        label  = score >= threshold
        weight = 1 + confidence * |score - threshold|

    `tgo_loss` does this itself; these are for a look at them, and for other losses that take labels
    and weights.

    Args:
        score: (B,) or any other shape, any float or integer dtype.
        threshold: one for all, a float or a tensor of shape (), from `score_threshold`.
        confidence: the paper's c, from 0. It multiplies the score's units: the paper's 5 belongs to
            its reward models' raw scores, as far as can be told.

    Returns: ThresholdLabels; weight is fp32 (fp64 for fp64 scores). No gradient.

    Raises: as `score_threshold`. Source: there as well, equation 10.
    """
    values = _check_scores(score)
    if isinstance(threshold, Tensor):
        if threshold.dim() or threshold.is_complex() or threshold.dtype == torch.bool:
            raise ValueError(
                f"threshold is a {threshold.dtype} tensor of shape {tuple(threshold.shape)}; "
                "expected a float, or a number in a tensor of shape ()"
            )
        check_finite("threshold", threshold)
        tau = threshold.detach().to(values)
    else:
        tau = values.new_tensor(check_number("threshold", threshold))
    scale = check_number("confidence", confidence, from_0=True)
    return ThresholdLabels(values >= tau, 1.0 + scale * (values - tau).abs())


def _frontiers(batch: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    mine, other = batch[:, :, None], batch[:, None]
    dominates = (mine >= other).all(3) & (mine > other).any(3) & _comparisons(valid)
    return valid & ~dominates.any(1), valid & ~dominates.any(2)


def _list_pairs(
    score: Tensor, has_pair: Tensor, winner: Tensor, loser: Tensor, lists: torch.Size
) -> ListPairs:
    """Of the lists that have a pair: score (B, k), the others (B,)."""
    (prompt,) = has_pair.nonzero(as_tuple=True)
    winner, loser = winner[prompt], loser[prompt]
    delta = score[prompt, winner] - score[prompt, loser]
    return ListPairs(prompt, winner, loser, delta, tuple(lists))


def _comparisons(valid: Tensor) -> Tensor:
    """(B, k, k), whether images i and j of a list are both there and are two."""
    k = valid.shape[1]
    two = ~torch.eye(k, dtype=torch.bool, device=valid.device)
    return valid[:, :, None] & valid[:, None] & two


def _check_lists(
    name: str, value: object, dims: int, lengths: object = None, least: int = 1
) -> tuple[Tensor, Tensor]:
    """The lists as a batch, with 0 in its padding, and where there are images, (B, k)."""
    tensor = check_real(name, value)
    inner = "k, n" if dims == 3 else "k"
    if tensor.dim() not in (dims - 1, dims) or tensor.numel() == 0:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; expected (B, {inner}), or ({inner}"
            f"{',' if dims == 2 else ''}) of a single list, with one element at least"
        )
    batch = tensor if tensor.dim() == dims else tensor[None]
    n_lists, k = batch.shape[:2]
    if k < least:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, lists of {k}; expected {least} images a list "
            "at least, to compare"
        )
    if lengths is None:
        check_finite(name, batch)
        return batch, torch.ones(n_lists, k, dtype=torch.bool, device=batch.device)
    if tensor.dim() < dims:
        raise ValueError(
            f"lengths was given, but {name} is a single list, of shape {tuple(tensor.shape)}; "
            f"expected (B, {inner}), or no lengths and {name} without padding"
        )
    valid = torch.arange(k, device=batch.device) < _check_lengths(lengths, batch, name)[:, None]
    batch = batch.masked_fill(~valid.reshape(n_lists, k, *[1] * (dims - 2)), 0)
    check_finite(name, batch)
    return batch, valid


def _check_lengths(lengths: object, batch: Tensor, owner: str) -> Tensor:
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths must be a torch.Tensor, got a {type(lengths).__name__}")
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths has dtype {lengths.dtype}; expected an integer dtype")
    n_lists, k = batch.shape[:2]
    if lengths.shape != (n_lists,):
        raise ValueError(
            f"lengths has shape {tuple(lengths.shape)}; expected one per list of {owner}, "
            f"({n_lists},)"
        )
    if readable(lengths):
        outside = [length for length in lengths.tolist() if not 0 <= length <= k]
        if outside:
            raise ValueError(f"lengths contains {outside[0]}; expected 0 to {k}, {owner}' images")
    return lengths.to(batch.device)


def _check_base(value: object, rewards: Tensor) -> Tensor:
    base = check_real("base_rewards", value)
    *lists, _, n_models = rewards.shape
    fits = base.dim() == rewards.dim() and [*base.shape[:-2]] == lists and base.numel() > 0
    if not fits or base.shape[-1] != n_models:
        needed = ", ".join(map(str, (*lists, "m", n_models)))
        raise ValueError(
            f"base_rewards has shape {tuple(base.shape)}, but rewards has {tuple(rewards.shape)}; "
            f"expected ({needed})"
        )
    if base.device != rewards.device:
        raise ValueError(
            f"base_rewards is on {base.device}, but rewards is on {rewards.device}; expected one "
            "device"
        )
    check_finite("base_rewards", base)
    return base if base.dim() == 3 else base[None]


def _check_scores(value: object) -> Tensor:
    score = check_real("score", value)
    if score.numel() == 0:
        raise ValueError(f"score has shape {tuple(score.shape)}; expected one element at least")
    check_finite("score", score)
    return score.to(dtype_of(score))
