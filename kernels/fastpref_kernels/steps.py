"""The links of a sampler's steps, and of the forward process with an old policy.

A step x' = a x + b pred + std z is affine in the prediction, so that, with target (x' - a x) / b,
log p(x' | x) = const - w err, w = weight b^2, and the log-ratio to an old policy or a reference is
-w gap. A step without noise, std = 0, has no likelihood: it adds 0 to loss and gradient. The texts
named _of_log are told the other policy's log-probability in place of its prediction.
"""
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from .links import FINITE, NOT_NEGATIVE, UNIT, Group, Hyper, Interval
from .special import detached, jit, log1p, softplus_and_slope, times, tl


@jit
def _weight(like, b, weight, std):
    """w, and 0 of a step without noise, whose weight may be infinite."""
    none = tl.zeros_like(like)
    return tl.where(none + std > 0.0, none + weight * b * b, none)


@jit
def _log_normalizer(like, std, normalized):
    """log(std) + log(2 pi) / 2, or 0 of a density that has none."""
    noisy = tl.zeros_like(like) + std
    return times(normalized, tl.log(tl.where(noisy > 0.0, noisy, 1.0)) + 0.9189385332046727)


@jit
def _ratio_of(sums, w):
    """log p / p_other; 0, not -0, of equal predictions."""
    return tl.zeros_like(w) - times(w, sums[1])


@jit
def _ratio_of_log(sums, w, std, normalized):
    """The same from the other's log-probability."""
    err = sums[0]
    value = -times(w, err) - _log_normalizer(err, std, normalized) - sums[2]
    return tl.where(w > 0.0, value, tl.zeros_like(err))


@jit
def _clamped(x, low, high):
    return tl.where(x < low, low, tl.where(x > high, high, x))  # NaN stays NaN


@jit
def _log_bounds(like, below, above):
    """log(1 - below) and log(1 + above)."""
    none = tl.zeros_like(like)
    below, above = none + below, none + above
    small, near = below < 0.5, above < 1.0
    low = tl.where(small, log1p(tl.where(small, -below, none)), tl.log(1.0 - below))
    high = tl.where(near, log1p(tl.where(near, above, none)), tl.log(1.0 + above))
    return low, high


# A step against the old policy's: the ratio, times an advantage ---------------------------------


@jit
def _times_exp(weight, x):
    """weight exp(x), 0 for a weight of 0, with a gradient of 0, where exp would overflow, too."""
    overflows = (weight == 0.0) & (x > 80.0)
    return times(weight, tl.exp(tl.where(overflows, tl.zeros_like(x), x)))


@jit
def _ppo(lr, scalars):
    """(max(-A r, -A clamp(r, 1 - below, 1 + above)), its slope by log r, 1 where it is clipped).
    Ratios are compared as logarithms, which is right however near to 1 they are."""
    advantage = _clamped(tl.zeros_like(lr) + scalars[0], -scalars[1], scalars[1])
    low, high = _log_bounds(lr, scalars[2], scalars[3])
    clipped = tl.where(advantage > 0.0, lr > high, (lr < low) & (advantage < 0.0))
    value = _times_exp(-advantage, tl.where(clipped, _clamped(lr, low, high), lr))
    none = tl.zeros_like(lr)
    return value, tl.where(clipped, none, value), tl.where(clipped, none + 1.0, none)


@jit
def _per_std(like, b, std):
    """b / std, and 0 of a step without noise."""
    noisy = tl.zeros_like(like) + std
    return tl.where(noisy > 0.0, b / tl.where(noisy > 0.0, noisy, 1.0), tl.zeros_like(like))


@jit
def _with_kl(loss, slopes, lr, clipped, sums, w, of_kl):
    """The loss of a step, 0 of one without noise, and, if there is an anchor, kl_weight times the
    divergence from it, half dt (b / std)^2 mean (pred - anchor)^2, in which half, dt, b and std are
    1 for units without them."""
    none = tl.zeros_like(lr)
    loss = tl.where(w > 0.0, loss, none)
    if len(of_kl) == 0:
        return loss, (slopes,), (lr, clipped, none)
    else:
        per_std = _per_std(lr, of_kl[3], of_kl[4])
        unit = tl.where(w > 0.0, of_kl[1] * of_kl[2] * per_std * per_std, none)
        kl = times(unit, sums[len(sums) - 1])
        weighted = none + times(of_kl[0], kl)
        return loss + weighted, (slopes + (of_kl[0] * unit,),), (lr, clipped, kl)  # noqa: RUF005


@jit
def _grpo(sums, cross, scalars, batch):
    w = _weight(sums[0][0], scalars[4], scalars[5], scalars[6])
    lr = _ratio_of(sums[0], w)
    value, slope, clipped = _ppo(lr, scalars)
    return _with_kl(value, (times(w, -slope),), lr, clipped, sums[0], w, scalars[7:])


@jit
def _grpo_of_log(sums, cross, scalars, batch):
    w = _weight(sums[0][0], scalars[4], scalars[5], scalars[6])
    lr = _ratio_of_log(sums[0], w, scalars[6], scalars[7])
    value, slope, clipped = _ppo(lr, scalars)
    return _with_kl(value, (times(w, -slope),), lr, clipped, sums[0], w, scalars[8:])


@jit
def _grpo_guard(sums, cross, scalars, batch):
    """The log-ratio without its bias, times std: linear in the prediction."""
    drift, std, dt = sums[0][3], scalars[6], scalars[7]
    w = _weight(drift, scalars[4], scalars[5], std)
    per_std = _per_std(drift, scalars[4], std)
    bias = 0.5 * per_std * per_std
    lr = std * (_ratio_of(sums[0], w) + times(bias, drift))
    value, slope, clipped = _ppo(lr, scalars)
    length = tl.where(w > 0.0, tl.zeros_like(lr) + dt, 1.0)
    slope = slope * std / length
    slopes = (times(w, -slope), times(bias, slope))
    return _with_kl(value / length, slopes, lr, clipped, sums[0], w, scalars[8:])


@jit
def _grpo_dppo(sums, cross, scalars, batch):
    """The ratio alone, without steps that went too far and would go farther."""
    advantage, threshold = scalars[0], scalars[1]
    drift = sums[0][3]
    w = _weight(drift, scalars[2], scalars[3], scalars[4])
    per_std = _per_std(drift, scalars[2], scalars[4])
    lr = _ratio_of(sums[0], w)
    none = tl.zeros_like(lr)
    far = 0.5 * per_std * per_std * drift >= threshold
    away = ((lr > 0.0) & (none + advantage > 0.0)) | ((lr < 0.0) & (none + advantage < 0.0))
    dropped = far & away
    value = tl.where(dropped, none, _times_exp(none - advantage, lr))
    dropped = tl.where(dropped, none + 1.0, none)
    return _with_kl(value, (times(w, -value), none), lr, dropped, sums[0], w, scalars[5:])


WEIGHT = Hyper(None, Interval(0.0, math.inf, True, True))  # infinite where std is 0
OF_STEP = {
    "transition.b": Hyper(None, FINITE),
    "transition.weight": WEIGHT,
    "transition.std": Hyper(None, NOT_NEGATIVE),
}
LIMIT = Hyper(5.0, Interval(0.0, math.inf, False, True))
OF_PPO = {
    "advantage": Hyper(None, FINITE),
    "advantage_clip": LIMIT,
    "clip_range": Hyper(1e-4, UNIT),
    "clip_range_high": Hyper(1e-4, NOT_NEGATIVE),
    **OF_STEP,
}
DT = {"transition.dt": Hyper(None, NOT_NEGATIVE)}
NORMALIZED = {"transition.normalized": Hyper(None, UNIT)}
# What the divergence is measured in: see `_with_kl`.
OF_KL = {
    "kl_weight": Hyper(0.0, NOT_NEGATIVE),
    "kl.half": Hyper(1.0),
    "kl.dt": Hyper(1.0, NOT_NEGATIVE),
    "kl.b": Hyper(1.0, FINITE),
    "kl.std": Hyper(1.0, NOT_NEGATIVE),
}
_OF_DPPO = {"advantage": Hyper(None, FINITE), "divergence_limit": Hyper(1e-5), **OF_STEP}


def _live(names: list[str]) -> Callable[..., Any]:
    def live(*scalars: Any) -> Any:
        of = dict(zip(names, scalars, strict=True))
        moves = of["advantage"] != 0.0
        if "kl_weight" in of:
            moves = moves | (of["kl_weight"] != 0.0)
        return moves & (of["transition.std"] != 0.0)

    return live


def _grpo_of(text: Any, hyper: Mapping[str, Hyper], name: str, drift: bool) -> tuple[Group, Group]:
    """Without and with a divergence."""

    def of(hyper: Mapping[str, Hyper], name: str) -> Group:
        return Group(
            text, hyper, drift=drift, huber=False, scores=("log_ratio", "clipped", "kl"),
            live=_live([*hyper]), name=name,
        )  # fmt: skip

    return of(hyper, name), of({**hyper, **OF_KL}, f"{name}_kl")


GRPO = {
    "clip": _grpo_of(_grpo, OF_PPO, "grpo", False),
    "guard": _grpo_of(_grpo_guard, {**OF_PPO, **DT}, "grpo_guard", True),
    "dppo": _grpo_of(_grpo_dppo, _OF_DPPO, "grpo_dppo", True),
}
GRPO_OF_LOG = _grpo_of(_grpo_of_log, {**OF_PPO, **NORMALIZED}, "grpo_of_log", False)


# Pairs: two steps of one policy and another -------------------------------------------------------


@jit
def _preferred(lr_w, lr_l, w_w, w_l, beta, bounds):
    """softplus(-beta (lr_w - lr_l)), each log-ratio between the bounds, if there are any."""
    none = tl.zeros_like(lr_w)
    held_w, held_l = lr_w, lr_l
    out_w, out_l = none, none
    if len(bounds) > 0:
        low, high = _log_bounds(lr_w, bounds[0], bounds[0])
        held_w, held_l = _clamped(lr_w, low, high), _clamped(lr_l, low, high)
        out_w = tl.where((lr_w < low) | (lr_w > high), none + 1.0, none)
        out_l = tl.where((lr_l < low) | (lr_l > high), none + 1.0, none)
    margin = beta * (held_w - held_l)
    value, slope = softplus_and_slope(-margin)
    live = (w_w > 0.0) & (w_l > 0.0)
    pull = tl.where(live, beta * slope, none)
    slope_w = tl.where(out_w > 0.0, none, times(w_w, pull))
    slope_l = tl.where(out_l > 0.0, none, times(w_l, -pull))
    value = tl.where(live, value, none)
    return value, ((slope_w,), (slope_l,)), (margin, lr_w, lr_l, out_w, out_l)


@jit
def _step_dpo(sums, cross, scalars, batch):
    w_w = _weight(sums[0][0], scalars[1], scalars[3], scalars[5])
    w_l = _weight(sums[1][0], scalars[2], scalars[4], scalars[6])
    lr_w, lr_l = _ratio_of(sums[0], w_w), _ratio_of(sums[1], w_l)
    return _preferred(lr_w, lr_l, w_w, w_l, scalars[0], scalars[7:])


@jit
def _step_dpo_of_log(sums, cross, scalars, batch):
    w_w = _weight(sums[0][0], scalars[1], scalars[3], scalars[5])
    w_l = _weight(sums[1][0], scalars[2], scalars[4], scalars[6])
    lr_w = _ratio_of_log(sums[0], w_w, scalars[5], scalars[7])
    lr_l = _ratio_of_log(sums[1], w_l, scalars[6], scalars[7])
    return _preferred(lr_w, lr_l, w_w, w_l, scalars[0], scalars[8:])


@jit
def _rewarded(lr_1, lr_2, w_1, w_2, scalars):
    """max((step_weight d - A)^2, (step_weight d_clamped - A)^2), d and A being the differences of
    log-ratios and advantages of two trajectories."""
    none = tl.zeros_like(lr_1)
    advantage_1 = _clamped(none + scalars[7], -scalars[10], scalars[10])
    gain = advantage_1 - _clamped(none + scalars[8], -scalars[10], scalars[10])
    clip, step_weight = scalars[9], scalars[6]
    held_1, held_2 = _clamped(lr_1, -clip, clip), _clamped(lr_2, -clip, clip)
    out_1 = tl.where((lr_1 < -clip) | (lr_1 > clip), none + 1.0, none)
    out_2 = tl.where((lr_2 < -clip) | (lr_2 > clip), none + 1.0, none)
    off = step_weight * (lr_1 - lr_2) - gain
    held = step_weight * (held_1 - held_2) - gain
    free = off * off >= held * held
    far = tl.where(free, off, held)
    live = (w_1 > 0.0) & (w_2 > 0.0)
    pull = tl.where(live, 2.0 * step_weight * far, none)
    slope_1 = tl.where(free | (out_1 == 0.0), times(w_1, -pull), none)
    slope_2 = tl.where(free | (out_2 == 0.0), times(w_2, pull), none)
    sign = tl.where(gain > 0.0, 1.0, tl.where(gain < 0.0, none - 1.0, none))
    value = tl.where(live, far * far, none)
    return value, ((slope_1,), (slope_2,)), (sign * (lr_1 - lr_2), lr_1, lr_2, out_1, out_2)


@jit
def _sdpo(sums, cross, scalars, batch):
    w_1 = _weight(sums[0][0], scalars[0], scalars[2], scalars[4])
    w_2 = _weight(sums[1][0], scalars[1], scalars[3], scalars[5])
    return _rewarded(_ratio_of(sums[0], w_1), _ratio_of(sums[1], w_2), w_1, w_2, scalars)


@jit
def _sdpo_of_log(sums, cross, scalars, batch):
    w_1 = _weight(sums[0][0], scalars[0], scalars[2], scalars[4])
    w_2 = _weight(sums[1][0], scalars[1], scalars[3], scalars[5])
    lr_1 = _ratio_of_log(sums[0], w_1, scalars[4], scalars[11])
    lr_2 = _ratio_of_log(sums[1], w_2, scalars[5], scalars[11])
    return _rewarded(lr_1, lr_2, w_1, w_2, scalars)


OF_STEPS = {f"{name}[{m}]": hyper for name, hyper in OF_STEP.items() for m in range(2)}
_OF_DPO = {"beta": Hyper(10.0), **OF_STEPS}
_CLIP = {"clip": Hyper(0.1, Interval(0.0, 1.0, False, True))}
_OF_SDPO = {
    **OF_STEPS,
    "step_weight": Hyper(1.0, FINITE),
    "advantage[0]": Hyper(None, FINITE),
    "advantage[1]": Hyper(None, FINITE),
    "clip_range": Hyper(1e-4, NOT_NEGATIVE),
    "advantage_clip": LIMIT,
}
_OF_PAIR = ("margin", "log_ratio_w", "log_ratio_l", "clipped_w", "clipped_l")


def _live_pair(names: list[str]) -> Callable[..., Any]:
    at = [names.index(f"transition.std[{m}]") for m in range(2)]
    return lambda *scalars: (scalars[at[0]] != 0.0) & (scalars[at[1]] != 0.0)


def _of_pair(text: Any, hyper: Mapping[str, Hyper], name: str) -> Group:
    return Group(
        text, hyper, members=2, huber=False, scores=_OF_PAIR, live=_live_pair([*hyper]), name=name
    )


# Without a clip, and with one.
STEP_DPO = (
    _of_pair(_step_dpo, _OF_DPO, "step_dpo_unclipped"),
    _of_pair(_step_dpo, {**_OF_DPO, **_CLIP}, "step_dpo"),
)
STEP_DPO_OF_LOG = (
    _of_pair(_step_dpo_of_log, {**_OF_DPO, **NORMALIZED}, "step_dpo_unclipped_of_log"),
    _of_pair(_step_dpo_of_log, {**_OF_DPO, **NORMALIZED, **_CLIP}, "step_dpo_of_log"),
)
SDPO = _of_pair(_sdpo, _OF_SDPO, "sdpo")
SDPO_OF_LOG = _of_pair(_sdpo_of_log, {**_OF_SDPO, **NORMALIZED}, "sdpo_of_log")


# The forward process: towards what was rewarded, and away from its mirror image ---------------


@jit
def _nft(sums, cross, scalars, batch):
    """With q = old - target and d = pred - old: mean (q + beta d)^2 and mean (q - beta d)^2, over
    their mean absolute values where those are summed."""
    reward, t, beta = scalars[0], scalars[1], scalars[2]
    gap, ref, drift = sums[0][1], sums[0][2], sums[0][3]
    none = tl.zeros_like(gap)
    scale_w, scale_l = none + t * t, none + t * t
    if len(sums[0]) > 5:
        plus, minus = t * sums[0][4], t * sums[0][5]
        scale_w = scale_w / detached(tl.where(plus < 1e-5, 1e-5, plus))
        scale_l = scale_l / detached(tl.where(minus < 1e-5, 1e-5, minus))
    scale_w = times(none + 5.0 * reward, scale_w)
    scale_l = times(5.0 - (none + 5.0 * reward), scale_l)
    err_w = ref + beta * gap - beta * (1.0 - beta) * drift
    err_l = ref - beta * gap + beta * (1.0 + beta) * drift
    value = times(scale_w, err_w) / beta + times(scale_l, err_l) / beta
    slopes = (scale_w - scale_l, (1.0 + beta) * scale_l - (1.0 - beta) * scale_w)
    margin = (1.0 - 2.0 * reward) * gap
    if len(scalars) > 3:
        kl = sums[0][len(sums[0]) - 1]
        value = value + times(scalars[3], kl)
        return value, (slopes + (none + scalars[3],),), (margin, kl)  # noqa: RUF005
    else:
        return value, (slopes,), (margin, none)


_OF_NFT = {"reward": Hyper(None, UNIT), "t": Hyper(1.0, UNIT), "beta": Hyper(1.0)}


def _nft_of(mixed: str, kl: bool) -> Group:
    hyper = {**_OF_NFT, "kl_weight": OF_KL["kl_weight"]} if kl else _OF_NFT
    name = f"nft{'' if mixed else '_plain'}{'_kl' if kl else ''}"
    return Group(
        _nft, hyper, drift=True, mixed=mixed, huber=False, scores=("margin", "kl"), name=name
    )


# Whether adaptive -> (without, with a divergence).
NFT = {bool(mixed): (_nft_of(mixed, False), _nft_of(mixed, True)) for mixed in ("", "beta")}
