"""The weights that every loss shares, around its link.

    score_w = logit_scale * score(err_w),   score_l = logit_scale * loser_weight * score(err_l)
    margin  = score_w - score_l
    loss    = pair_weight * ((1 - label_smoothing) * shape(score_w, score_l)
                             + label_smoothing * shape(score_l, score_w)
                             + sft_weight * err_w + prior_weight * err_l)

where err_w and err_l, and the gaps, are the errors times sample_weight_w and sample_weight_l. A
term of weight 0 adds exactly 0 to the loss and to its gradient, whatever it weighs, NaN included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .links import BELOW_HALF, FINITE, NOT_NEGATIVE, NOTHING, Group, Hyper, Link
from .special import in_torch, jit, log1p, times, tl

# In the order in which they follow a link's hyper-parameters: all of them, or none where all have
# these values. sft_weight's is the link's.
KNOBS: dict[str, Hyper] = {
    "logit_scale": Hyper(1.0, FINITE),
    "loser_weight": Hyper(1.0, FINITE),
    "pair_weight": Hyper(1.0, NOT_NEGATIVE),
    "label_smoothing": Hyper(0.0, BELOW_HALF),
    "sft_weight": Hyper(None, NOT_NEGATIVE),
    "prior_weight": Hyper(0.0, NOT_NEGATIVE),
    "sample_weight_w": Hyper(1.0, NOT_NEGATIVE),
    "sample_weight_l": Hyper(1.0, NOT_NEGATIVE),
}


class Live(NamedTuple):
    """Which pairs' samples the loss depends on: through their errors, and through their gaps. Each
    is a bool, or a tensor of shape () or (B,)."""

    err_w: Any
    err_l: Any
    gap_w: Any
    gap_l: Any


def live(link: Link, scalars: Sequence[Any]) -> Live:
    """What is left of a loss by its weights that are 0."""
    of_score, _, knobs = _split(link, scalars)
    neutral = (1.0, 1.0, 1.0, 0.0, link.sft_weight, 0.0, 1.0, 1.0)
    scale, loser, weight, _, sft, prior, of_w, of_l = (_nonzero(k) for k in knobs or neutral)
    compared = _nonzero(link.score.weight(*of_score)) & scale & (link.shape is not NOTHING)
    w, l = weight & of_w, weight & of_l
    gap_w, gap_l = w & compared, l & compared & loser
    if link.score.needs_ref and not link.score.takes_both:
        return Live(w & sft, l & prior, gap_w, gap_l)
    return Live(gap_w | (w & sft), gap_l | (l & prior), False, False)


def _nonzero(value: Any) -> Any:
    return value != 0.0


def _split(link: Link, scalars: Sequence[Any]) -> tuple[Sequence[Any], ...]:
    """The score's hyper-parameters, the shape's, and the knobs."""
    n_score, n_hyper = len(link.score.hyper), len(link.hyper)
    return scalars[:n_score], scalars[n_score:n_hyper], scalars[n_hyper:]


@jit
def pair_losses_jit(  # type: ignore[no-untyped-def]
    err_w, err_l, gap_w, gap_l, of_score, of_shape, knobs,
    SCORE: tl.constexpr, SHAPE: tl.constexpr, SFT_WEIGHT: tl.constexpr,
):  # fmt: skip
    """(loss, its slopes by err_w and err_l, margin) of some pairs."""
    if len(knobs) == 0:
        of_w = SCORE(err_w, gap_w, *of_score)
        of_l = SCORE(err_l, gap_l, *of_score)
        score_w, score_l = of_w[0], of_l[0]
        seconds = (of_w[2], of_l[2]) if len(of_w) == 3 else ()
        loss, slope_w, slope_l = SHAPE(score_w, score_l, *seconds, *of_shape)
        slope_w = slope_w * of_w[1]
        slope_l = slope_l * of_l[1]
        if SFT_WEIGHT != 0.0:
            loss += SFT_WEIGHT * err_w
            slope_w += SFT_WEIGHT
        return loss, slope_w, slope_l, score_w - score_l
    else:
        scale, loser, weight = knobs[0], knobs[1], knobs[2]
        smoothing, sft, prior = knobs[3], knobs[4], knobs[5]
        err_w = times(knobs[6], err_w)
        err_l = times(knobs[7], err_l)
        of_w = SCORE(err_w, times(knobs[6], gap_w), *of_score)
        of_l = SCORE(err_l, times(knobs[7], gap_l), *of_score)
        score_w = times(scale, of_w[0])
        score_l = times(loser, times(scale, of_l[0]))
        seconds = ()
        swapped = ()
        if len(of_w) == 3:
            second_w = times(scale, of_w[2])
            second_l = times(loser, times(scale, of_l[2]))
            seconds = (second_w, second_l)  # type: ignore[assignment]
            swapped = (second_l, second_w)  # type: ignore[assignment]
        loss, slope_w, slope_l = SHAPE(score_w, score_l, *seconds, *of_shape)
        other, other_l, other_w = SHAPE(score_l, score_w, *swapped, *of_shape)
        loss = (1.0 - smoothing) * loss + times(smoothing, other)
        slope_w = (1.0 - smoothing) * slope_w + times(smoothing, other_w)
        slope_l = (1.0 - smoothing) * slope_l + times(smoothing, other_l)
        loss += times(sft, err_w) + times(prior, err_l)
        slope_w = times(scale, slope_w * of_w[1]) + sft
        slope_l = times(loser, times(scale, slope_l * of_l[1])) + prior
        slope_w = times(weight, times(knobs[6], slope_w))
        slope_l = times(weight, times(knobs[7], slope_l))
        return times(weight, loss), slope_w, slope_l, score_w - score_l


@jit
def safeguard(err_w, cross, mu):  # type: ignore[no-untyped-def]
    """The factor on the loser's gradient at which a step still lowers the winner's error, by at
    least the share mu of what it would without the loser: min(1, (1 - mu) err_w / cross), cross
    being the mean of (pred_w - target_w) (pred_l - target_l); 1 where that is not above 0."""
    against = cross > 0.0
    factor = (1.0 - mu) * err_w / tl.where(against, cross, 1.0)
    return tl.where(against, tl.where(factor > 1.0, 1.0, factor), 1.0)


@jit
def log_mean(excess, mean):  # type: ignore[no-untyped-def]
    """log(mean), excess being mean - 1 without the cancellation."""
    near = excess > -0.5
    return tl.where(near, log1p(tl.where(near, excess, 0.0)), tl.log(mean))


class Around(NamedTuple):
    """What is done around a link's loss; None where it is not.

    guard: how the loser's gradient is scaled, the value being left alone: by `guard_number` if
        "given", by `safeguard` of the "pair" or the "batch", whose mu that is.
    drift_weight: weight of the mean squared difference from the reference, of a pair's two samples.
    weight: of a group's loss, where the link is of groups; pairs have a knob for it.
    heat: temperature of the log-mean-exp by which losses are reduced.
    """

    guard: str | None = None
    guard_number: Any = None
    drift_weight: Any = None
    weight: Any = None
    heat: Any = None

    def numbers(self) -> list[Any]:
        """As the kernels take them, after the link's own."""
        return [number for number in self[1:] if number is not None]


NOTHING_AROUND = Around()


def sums_of(link: Link | Group, guard: str | None, drift_weighs: bool) -> tuple[bool, bool]:
    """Whether the drift of the members is summed, and what a pair's samples have in common (cross):
    for the link itself, or for what is around it."""
    drift, cross = drift_weighs, guard in ("pair", "batch")
    if isinstance(link, Group):
        drift, cross = drift or link.drift, cross or link.cross
    return drift, cross


def kinds_of(link: Link | Group, ref: bool, drift: bool, anchor: bool) -> int:
    """How many sums of each member there are: err; with a reference gap and ref; and so on."""
    return 1 + 2 * ref + drift + 2 * bool(link.mixed) + anchor


def rows_of(link: Link | Group, kinds: int, drift: bool, cross: bool, anchor: bool) -> int:
    """Rows of stats: sums, cross, scores, and factors."""
    directions = 1 + drift + anchor
    return link.members * kinds + cross + len(link.scores) + link.members * directions


_in_torch = in_torch(pair_losses_jit)
safeguard_in_torch = in_torch(safeguard)
log_mean_in_torch = in_torch(log_mean)


def pair_losses(
    link: Link, errors: tuple[Any, Any], gaps: tuple[Any, Any], scalars: Sequence[Any]
) -> tuple[Any, Any, Any, Any]:
    """The same on tensors, (B,) each, or on floats."""
    parts = tuple(tuple(part) for part in _split(link, scalars))
    return _in_torch(*errors, *gaps, *parts, link.score.torch, link.shape.torch, link.sft_weight)
