"""The links of all losses, each in two dialects: the torch value, and the Triton value with slopes.

A link is a *score* and a *shape*. The score says how good a sample is from its error `err` and,
where there is a reference model, `gap` = err - the reference's error; the shape makes the loss of
the pair from the scores of winner and loser, whose difference is the margin (> 0: the winner is
preferred). To add a loss: write what it needs of both, enter it in `LINKS`, publish a function in
`fastpref/losses.py`, and write its published formula down in `tests/oracles.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .special import (
    jit,
    log1p,
    power_gap,
    power_gap_jit,
    psi,
    psi_and_slope,
    sigmoid,
    sigmoids,
    softplus_and_slope,
    times,
    times_jit,
    tl,
)


class Interval(NamedTuple):
    """What a number may be: between low and high, or one of those where it is included."""

    low: float = -math.inf
    high: float = math.inf
    includes_low: bool = False
    includes_high: bool = False

    def __contains__(self, value: Any) -> bool:
        above = value > self.low or (value == self.low and self.includes_low)
        return above and (value < self.high or (value == self.high and self.includes_high))

    def __str__(self) -> str:
        opens, closes = "[" if self.includes_low else "(", "]" if self.includes_high else ")"
        return f"{opens}{self.low:g}, {self.high:g}{closes}"


FINITE = Interval()
POSITIVE = Interval(low=0.0)
NOT_NEGATIVE = Interval(low=0.0, includes_low=True)
UNIT = Interval(0.0, 1.0, True, True)
BELOW_HALF = Interval(0.0, 0.5, True)


class Hyper(NamedTuple):
    """A hyper-parameter: its default (None: it must be given), and what it may be. Any of them may
    be one number for all pairs, or one for each."""

    default: float | None = None
    interval: Interval = POSITIVE


class Score(NamedTuple):
    """torch: (err, gap, *hyper) -> score. triton: the same -> (score, slope), a jit function on
    fp32. The slope is that by whichever of err and gap the score takes; a gap moves as its error
    does, the reference being a constant. weight: the factor among the hyper-parameters that
    switches a pair off where it is 0."""

    torch: Callable[..., Tensor]
    triton: Any
    hyper: Mapping[str, Hyper] = {}
    needs_ref: bool = False
    weight: Callable[..., Any] = lambda *hyper: 1.0


class Shape(NamedTuple):
    """torch: (score_w, score_l, *hyper) -> loss. triton: the same -> (loss, slope_w, slope_l)."""

    torch: Callable[..., Tensor]
    triton: Any
    hyper: Mapping[str, Hyper] = {}


_by_key: dict[str, Link] = {}


class _Frozen(dict[str, Any]):
    """A dict that cannot be changed; torch.compile does not get on with MappingProxyType."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError("a Link's defaults cannot be changed; make another with link(...)")

    __setitem__ = __delitem__ = __ior__ = update = pop = popitem = clear = setdefault = _refuse  # type: ignore[assignment]

    def __reduce__(self) -> Any:
        return _Frozen, (dict(self),)


@dataclass(frozen=True, eq=False)
class Link:
    """loss = shape(score of winner, score of loser) + sft_weight * err_w.

    hyper: the score's hyper-parameters and then the shape's, with this link's defaults.
    knobs: of knobs.py, those that this link has at values of its own.
    name: what error messages call the loss.
    key: this very link among all in this process, for what takes no objects (torch.library): its
        name, numbered where there was one of that name before.

    Links are told apart by identity, so what is cached for one never serves another of its name.
    """

    score: Score
    shape: Shape
    hyper: Mapping[str, Hyper]
    sft_weight: float = 0.0
    knobs: Mapping[str, float] = field(default_factory=dict)
    name: str = "link"
    key: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hyper", _Frozen(self.hyper))
        object.__setattr__(self, "knobs", _Frozen(self.knobs))
        key = f"{self.name}#{len(_by_key)}" if self.name in _by_key else self.name
        object.__setattr__(self, "key", key)
        _by_key[key] = self


def link(
    score: Score,
    shape: Shape,
    sft_weight: float = 0.0,
    knobs: Mapping[str, float] = {},
    **defaults: float | None,
) -> Link:
    """A link from a score and a shape, with defaults of its own for their hyper-parameters."""
    hyper = {**score.hyper, **shape.hyper}
    for name, default in defaults.items():
        hyper[name] = hyper[name]._replace(default=default)
    return Link(score, shape, hyper, sft_weight, knobs)


def link_of(key: str) -> Link:
    """The link that has this key."""
    if key not in _by_key:
        raise ValueError(f"loss {key!r} is not known in this process; call register_link first")
    return _by_key[key]


def register_link(name: str, link: Link) -> None:
    """Let `pair_loss` and `losses_from_errors` find a link by name; a later one of the same name
    takes its place."""
    if not isinstance(name, str) or not name:
        raise TypeError(f"name must be a non-empty string, got {name!r}")
    if not isinstance(link, Link):
        raise TypeError(f"link must be a fastpref_kernels.Link, got a {type(link).__name__}")
    LINKS[name] = replace(link, name=name)


# Scores ------------------------------------------------------------------------------------------


@jit
def _error_jit(err, gap):  # type: ignore[no-untyped-def]
    return -err, -1.0


@jit
def _beta_error_jit(err, gap, beta):  # type: ignore[no-untyped-def]
    return -beta * err, -beta


@jit
def _gap_jit(err, gap):  # type: ignore[no-untyped-def]
    return -gap, -1.0


@jit
def _beta_gap_jit(err, gap, beta):  # type: ignore[no-untyped-def]
    return -beta * gap, -beta


@jit
def _half_beta_gap_jit(err, gap, beta):  # type: ignore[no-untyped-def]
    return -0.5 * beta * gap, -0.5 * beta


def _mapo(err: Tensor, gap: Tensor, snr: Any, num_train_timesteps: Any) -> Tensor:
    return -num_train_timesteps * psi(snr * err)


@jit
def _mapo_jit(err, gap, snr, num_train_timesteps):  # type: ignore[no-untyped-def]
    value, slope = psi_and_slope(snr * err)
    return -num_train_timesteps * value, -num_train_timesteps * snr * slope


def _smoothed_gap(err: Tensor, gap: Tensor, beta: Any, gamma: Any, prob: Any) -> Tensor:
    return -0.5 * beta * gamma * times(2.0 * prob - 1.0, gap)


@jit
def _smoothed_gap_jit(err, gap, beta, gamma, prob):  # type: ignore[no-untyped-def]
    scale = -0.5 * beta * gamma * (2.0 * prob - 1.0)
    return times_jit(scale, gap), scale


BETA = {"beta": Hyper(5000.0)}
ERROR = Score(lambda err, gap: -err, _error_jit)
BETA_ERROR = Score(lambda err, gap, beta: -beta * err, _beta_error_jit, BETA)
MAPO = Score(_mapo, _mapo_jit, {"snr": Hyper(0.5), "num_train_timesteps": Hyper(1000.0)})
GAP = Score(lambda err, gap: -gap, _gap_jit, needs_ref=True)
BETA_GAP = Score(lambda err, gap, beta: -beta * gap, _beta_gap_jit, BETA, needs_ref=True)
HALF_BETA_GAP = Score(
    lambda err, gap, beta: -0.5 * beta * gap, _half_beta_gap_jit, BETA, needs_ref=True
)
SMOOTHED_GAP = Score(
    _smoothed_gap,
    _smoothed_gap_jit,
    BETA | {"gamma": Hyper(10.0), "prob": Hyper(None, UNIT)},
    needs_ref=True,
    weight=lambda beta, gamma, prob: 2.0 * prob - 1.0,
)


# Shapes: w and l are the scores ------------------------------------------------------------------


def _nothing(w: Tensor, l: Tensor) -> Tensor:
    return times(0.0, w) + times(0.0, l)


@jit
def _nothing_jit(w, l):  # type: ignore[no-untyped-def]
    return tl.zeros_like(w), 0.0, 0.0


def _log_sigmoid(w: Tensor, l: Tensor) -> Tensor:
    return -F.logsigmoid(w - l)


@jit
def _log_sigmoid_jit(w, l):  # type: ignore[no-untyped-def]
    loss, factor = softplus_and_slope(l - w)
    return loss, -factor, factor


def _beta_log_sigmoid(w: Tensor, l: Tensor, beta: Any) -> Tensor:
    return -beta * F.logsigmoid(w - l)


@jit
def _beta_log_sigmoid_jit(w, l, beta):  # type: ignore[no-untyped-def]
    loss, factor = softplus_and_slope(l - w)
    return beta * loss, -beta * factor, beta * factor


def _margin_log_sigmoid(w: Tensor, l: Tensor, gamma: Any) -> Tensor:
    return -F.logsigmoid(w - l - gamma)


@jit
def _margin_log_sigmoid_jit(w, l, gamma):  # type: ignore[no-untyped-def]
    loss, factor = softplus_and_slope(l - w + gamma)
    return loss, -factor, factor


def _robust(w: Tensor, l: Tensor, label_smoothing: Any) -> Tensor:
    extra = label_smoothing / (1.0 - 2.0 * label_smoothing)
    return -F.logsigmoid(w - l) + times(extra, l - w)


@jit
def _robust_jit(w, l, label_smoothing):  # type: ignore[no-untyped-def]
    loss, factor = softplus_and_slope(l - w)
    extra = label_smoothing / (1.0 - 2.0 * label_smoothing)
    slope = factor + extra
    return loss + times_jit(extra, l - w), -slope, slope


def _hinge(w: Tensor, l: Tensor) -> Tensor:
    return F.relu(1.0 - (w - l))


@jit
def _hinge_jit(w, l):  # type: ignore[no-untyped-def]
    slack = 1.0 - (w - l)
    inside = tl.where(slack <= 0.0, 0.0, 1.0)  # not slack > 0: NaN stays NaN
    return tl.where(slack <= 0.0, 0.0, slack), -inside, inside


def _ipo(w: Tensor, l: Tensor, beta: Any) -> Tensor:
    return (w - l - 0.5 / beta).square()


@jit
def _ipo_jit(w, l, beta):  # type: ignore[no-untyped-def]
    off = w - l - 0.5 / beta
    return off * off, 2.0 * off, -2.0 * off


def _calibrated(w: Tensor, l: Tensor, delta: Any) -> Tensor:
    return (delta - (w - l)).square()


@jit
def _calibrated_jit(w, l, delta):  # type: ignore[no-untyped-def]
    off = delta - (w - l)
    return off * off, -2.0 * off, 2.0 * off


def _exo(w: Tensor, l: Tensor, label_smoothing: Any) -> Tensor:
    margin = (w - l).clamp(-700.0, 700.0)  # beyond it sigmoid is 0 or 1, and 0 * inf is not 0
    p, q = sigmoid(margin), torch.zeros_like(margin) + label_smoothing
    return p * (F.logsigmoid(margin) - torch.log1p(-q)) + sigmoid(-margin) * (
        F.logsigmoid(-margin) - torch.log(q)
    )


@jit
def _exo_jit(w, l, label_smoothing):  # type: ignore[no-untyped-def]
    margin = w - l
    margin = tl.where(margin > 700.0, 700.0, tl.where(margin < -700.0, -700.0, margin))
    p, rest = sigmoids(margin)
    lost, _ = softplus_and_slope(-margin)
    won, _ = softplus_and_slope(margin)
    odds = label_smoothing / (1.0 - label_smoothing)  # log(1 - q) = -log1p(odds), right near 0
    log_odds = tl.log(odds)
    log_other = -log1p(odds)
    slope = p * rest * (margin + log_odds)
    return p * (-lost - log_other) + rest * (-won - (log_other + log_odds)), slope, -slope


def _nca(w: Tensor, l: Tensor) -> Tensor:
    return -F.logsigmoid(w) - 0.5 * F.logsigmoid(-w) - 0.5 * F.logsigmoid(-l)


@jit
def _nca_jit(w, l):  # type: ignore[no-untyped-def]
    won, factor = softplus_and_slope(-w)
    high_w, slope_w = softplus_and_slope(w)
    high_l, slope_l = softplus_and_slope(l)
    return won + 0.5 * high_w + 0.5 * high_l, 0.5 * slope_w - factor, 0.5 * slope_l


def _bco(w: Tensor, l: Tensor) -> Tensor:
    return -F.logsigmoid(w) - F.logsigmoid(-l)


@jit
def _bco_jit(w, l):  # type: ignore[no-untyped-def]
    loss_w, factor_w = softplus_and_slope(-w)
    loss_l, factor_l = softplus_and_slope(l)
    return loss_w + loss_l, -factor_w, factor_l


def _sppo(w: Tensor, l: Tensor, beta: Any) -> Tensor:
    return (w - 0.5 / beta).square() + (l + 0.5 / beta).square()


@jit
def _sppo_jit(w, l, beta):  # type: ignore[no-untyped-def]
    off_w = w - 0.5 / beta
    off_l = l + 0.5 / beta
    return off_w * off_w + off_l * off_l, 2.0 * off_w, 2.0 * off_l


def _apo_zero(w: Tensor, l: Tensor) -> Tensor:
    return sigmoid(-w) + sigmoid(l)


@jit
def _apo_zero_jit(w, l):  # type: ignore[no-untyped-def]
    p_w, rest_w = sigmoids(w)
    p_l, rest_l = sigmoids(l)
    return rest_w + p_l, -p_w * rest_w, p_l * rest_l


def _apo_down(w: Tensor, l: Tensor) -> Tensor:
    return sigmoid(w) + sigmoid(l - w)


@jit
def _apo_down_jit(w, l):  # type: ignore[no-untyped-def]
    p_w, rest_w = sigmoids(w)
    p, rest = sigmoids(w - l)
    return p_w + rest, p_w * rest_w - p * rest, p * rest


def _alpha(w: Tensor, l: Tensor, alpha: Any) -> Tensor:
    margin = w - l
    b = torch.zeros_like(margin) + (alpha - 1.0)
    return (power_gap(F.logsigmoid(margin), b) + sigmoid(-margin)) / alpha


@jit
def _alpha_jit(w, l, alpha):  # type: ignore[no-untyped-def]
    lost, rest = softplus_and_slope(l - w)
    gap = power_gap_jit(-lost, alpha - 1.0)
    return (gap + rest) / alpha, rest * gap, -rest * gap


def _budget(w: Tensor, l: Tensor, budget: Any, budget_weight: Any) -> Tensor:
    return -F.logsigmoid(w - l) + times(budget_weight, F.relu(-w - budget))


@jit
def _budget_jit(w, l, budget, budget_weight):  # type: ignore[no-untyped-def]
    loss, factor = softplus_and_slope(l - w)
    over = -w - budget
    slope = tl.where(over <= 0.0, 0.0, budget_weight)
    over = tl.where(over <= 0.0, 0.0, over)
    return loss + times_jit(budget_weight, over), -factor - slope, factor


NOTHING = Shape(_nothing, _nothing_jit)
LOG_SIGMOID = Shape(_log_sigmoid, _log_sigmoid_jit)
BETA_LOG_SIGMOID = Shape(_beta_log_sigmoid, _beta_log_sigmoid_jit, {"beta": Hyper(0.1)})
MARGIN_LOG_SIGMOID = Shape(
    _margin_log_sigmoid, _margin_log_sigmoid_jit, {"gamma": Hyper(0.5, NOT_NEGATIVE)}
)
ROBUST = Shape(_robust, _robust_jit, {"label_smoothing": Hyper(0.0, BELOW_HALF)})
HINGE = Shape(_hinge, _hinge_jit)
IPO = Shape(_ipo, _ipo_jit, BETA)
CALIBRATED = Shape(_calibrated, _calibrated_jit, {"delta": Hyper(None, FINITE)})
EXO = Shape(_exo, _exo_jit, {"label_smoothing": Hyper(None, Interval(0.0, 0.5))})
DMPO = Shape(_exo, _exo_jit, {"alpha": Hyper(0.01, Interval(0.0, 0.5))})
NCA = Shape(_nca, _nca_jit)
BCO = Shape(_bco, _bco_jit)
SPPO = Shape(_sppo, _sppo_jit, BETA)
APO_ZERO = Shape(_apo_zero, _apo_zero_jit)
APO_DOWN = Shape(_apo_down, _apo_down_jit)
ALPHA = Shape(_alpha, _alpha_jit, {"alpha": Hyper(0.9999)})
BUDGET = Shape(
    _budget,
    _budget_jit,
    {"budget": Hyper(0.0, NOT_NEGATIVE), "budget_weight": Hyper(1.0, NOT_NEGATIVE)},
)

PSO = {"loser_weight": 0.1, "prior_weight": 0.5}

_LINKS = {
    "mapo": link(MAPO, BETA_LOG_SIGMOID, sft_weight=1.0),
    "sft": link(ERROR, NOTHING, sft_weight=1.0),
    "orpo": link(ERROR, BETA_LOG_SIGMOID, sft_weight=1.0),
    "simpo": link(BETA_ERROR, MARGIN_LOG_SIGMOID, beta=250.0),
    "pso_hinge": link(BETA_ERROR, HINGE, knobs=PSO, beta=5.0),
    "pso_sigmoid": link(BETA_GAP, LOG_SIGMOID, knobs=PSO, beta=200.0),
    "dpo_sigmoid": link(HALF_BETA_GAP, LOG_SIGMOID),
    "dpo_hinge": link(HALF_BETA_GAP, HINGE),
    "dpo_ipo": link(GAP, IPO),
    "dpo_robust": link(HALF_BETA_GAP, ROBUST),
    "dpo_exo_pair": link(HALF_BETA_GAP, EXO),
    "dpo_nca_pair": link(HALF_BETA_GAP, NCA),
    "dpo_bco_pair": link(HALF_BETA_GAP, BCO),
    "dpo_sppo_hard": link(GAP, SPPO),
    "dpo_apo_zero": link(HALF_BETA_GAP, APO_ZERO),
    "dpo_apo_down": link(HALF_BETA_GAP, APO_DOWN),
    "dpo_alpha": link(HALF_BETA_GAP, ALPHA),
    "budget_dpo": link(HALF_BETA_GAP, BUDGET),
    "dmpo": link(HALF_BETA_GAP, DMPO, beta=6000.0),
    "smpo": link(SMOOTHED_GAP, LOG_SIGMOID),
    "seppo": link(BETA_GAP, LOG_SIGMOID, beta=2500.0),
    "capo": link(BETA_GAP, CALIBRATED, beta=2500.0),
}
LINKS: dict[str, Link] = {name: replace(each, name=name) for name, each in _LINKS.items()}
