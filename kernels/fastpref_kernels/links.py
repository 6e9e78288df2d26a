"""The links of all losses, each written once: its value with its slopes, as a Triton function that
is also run on tensors (see `special.in_torch`).

A link is a *score* and a *shape*. The score says how good a sample is from its error `err` and,
where there is a reference model, `gap` = err - the reference's error; the shape makes the loss of
the pair from the scores of winner and loser, whose difference is the margin (> 0: the winner is
preferred). CONTRIBUTING.md says how to add a loss.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

from .special import (
    detached,
    in_torch,
    jit,
    log1p,
    power_gap,
    psi_and_slope,
    sigmoids,
    softplus_and_slope,
    times,
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


@dataclass(frozen=True, eq=False)
class _Text:
    """triton: a jit function. torch: the same text on tensors, as `in_torch` translates it."""

    triton: Any
    hyper: Mapping[str, Hyper] = field(default_factory=dict)
    torch: Callable[..., Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "torch", in_torch(self.triton))


@dataclass(frozen=True, eq=False)
class Score(_Text):
    """(err, gap, *hyper) -> (score, slope). The slope is that by whichever of err and gap the score
    takes; a gap moves as its error does, the reference being a constant. weight: the factor among
    the hyper-parameters that switches a pair off where it is 0.

    takes_both: it returns (score, slope, moved), the score of the gap and `moved` of the error, and
    its shape takes (score_w, score_l, moved_w, moved_l, *hyper). That is for losses whose weight
    is a constant that depends on the scores: all slopes are by the error alone.
    """

    needs_ref: bool = False
    weight: Callable[..., Any] = lambda *hyper: 1.0
    takes_both: bool = False


class Shape(_Text):
    """(score_w, score_l, *hyper) -> (loss, slope_w, slope_l). A factor that is `detached` in the
    loss counts as a constant in the slopes."""


@dataclass(frozen=True, eq=False)
class First(_Text):
    """(sums, scalars) -> a number for each group, of which a link is told the mean over the
    batch."""


_by_key: dict[str, Link | Group] = {}


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
    members: ClassVar[int] = 2
    mixed: ClassVar[str] = ""
    scores: ClassVar[tuple[str, ...]] = ("margin",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hyper", _Frozen(self.hyper))
        object.__setattr__(self, "knobs", _Frozen(self.knobs))
        object.__setattr__(self, "key", _key_of(self))


@dataclass(frozen=True, eq=False)
class Group(_Text):
    """A link on all sums of the members of a group, for what needs more than errors and gaps of
    pairs. Of single samples, or of pairs, all first members of which come before all second ones:

        (sums, cross, scalars, batch) -> (loss, slopes, scores)

    sums: of each member (err, gap, ref, drift, plus, minus, anchor), as far as there are any: see
        the kernels. cross: of both members of a pair. scalars: the hyper-parameters. batch: the
        mean over the batch of what `first` makes of a group.
    slopes: for each member, by err or gap, by drift, and by anchor; batch is a constant.
    scores: a number of the group for each name in `scores`, for metrics.

    Of `listed` groups, lists whose members follow one another, with (B, K) tensors:

        (sums, of_members, order, scalars, active) -> (loss, slopes, scores)

    sums: err, gap, ref, ..., each (B, K). of_members: a number that each member has, (B, K). order:
        the members' numbers, (1, K). scalars: numbers, or (B, 1). active: which members there are,
        (B, K); the sums and numbers of others are 0.
    slopes: (B, K) for each direction. loss and scores: (B,).

    hyper: one number for all groups, or one for each. of_members: the one for each member, by name.
    members: how many. drift, cross: whether these sums are needed. mixed: the hyper-parameter by
    which plus and minus are mixed, "" where they are not needed. huber: whether the link
    is right for errors that are no squares. live: of the hyper-parameters, whether a group has a
    gradient at all; see knobs.live.
    """

    of_members: Mapping[str, Hyper] = field(default_factory=dict)
    members: int = 1
    listed: bool = False
    needs_ref: bool = True
    drift: bool = False
    mixed: str = ""
    cross: bool = False
    huber: bool = True
    scores: tuple[str, ...] = ("margin",)
    first: First | None = None
    live: Callable[..., Any] = lambda *hyper: True
    name: str = "link"
    key: str = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "key", _key_of(self))


def _key_of(link: Link | Group) -> str:
    key = f"{link.name}#{len(_by_key)}" if link.name in _by_key else link.name
    _by_key[key] = link
    return key


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


def link_of(key: str) -> Link | Group:
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
def _error(err, gap):
    return -err, -1.0


@jit
def _beta_error(err, gap, beta):
    return -beta * err, -beta


@jit
def _gap(err, gap):
    return -gap, -1.0


@jit
def _beta_gap(err, gap, beta):
    return -beta * gap, -beta


@jit
def _half_beta_gap(err, gap, beta):
    return -0.5 * beta * gap, -0.5 * beta


@jit
def _mapo(err, gap, snr, num_train_timesteps):
    value, slope = psi_and_slope(snr * err)
    return -num_train_timesteps * value, -num_train_timesteps * snr * slope


@jit
def _beside_error(err, gap, beta):
    return -0.5 * beta * gap, -1.0, -err


@jit
def _smoothed_gap(err, gap, beta, gamma, prob):
    scale = -0.5 * beta * gamma * (2.0 * prob - 1.0)
    return times(scale, gap), scale


BETA = {"beta": Hyper(5000.0)}
ERROR = Score(_error)
BETA_ERROR = Score(_beta_error, BETA)
MAPO = Score(_mapo, {"snr": Hyper(0.5), "num_train_timesteps": Hyper(1000.0)})
GAP = Score(_gap, needs_ref=True)
BETA_GAP = Score(_beta_gap, BETA, needs_ref=True)
HALF_BETA_GAP = Score(_half_beta_gap, BETA, needs_ref=True)
BESIDE_ERROR = Score(_beside_error, BETA, needs_ref=True, takes_both=True)
SMOOTHED_GAP = Score(
    _smoothed_gap,
    BETA | {"gamma": Hyper(10.0), "prob": Hyper(None, UNIT)},
    needs_ref=True,
    weight=lambda beta, gamma, prob: 2.0 * prob - 1.0,
)


# Shapes: w and l are the scores ------------------------------------------------------------------


@jit
def _nothing(w, l):
    return tl.zeros_like(w), 0.0, 0.0


@jit
def _log_sigmoid(w, l):
    loss, factor = softplus_and_slope(l - w)
    return loss, -factor, factor


@jit
def _beta_log_sigmoid(w, l, beta):
    loss, factor = softplus_and_slope(l - w)
    return beta * loss, -beta * factor, beta * factor


@jit
def _margin_log_sigmoid(w, l, gamma):
    loss, factor = softplus_and_slope(l - w + gamma)
    return loss, -factor, factor


@jit
def _robust(w, l, label_smoothing):
    loss, factor = softplus_and_slope(l - w)
    extra = label_smoothing / (1.0 - 2.0 * label_smoothing)
    slope = factor + extra
    return loss + times(extra, l - w), -slope, slope


@jit
def _hinge(w, l):
    slack = 1.0 - (w - l)
    none = tl.zeros_like(slack)
    inside = tl.where(slack <= 0.0, none, 1.0)  # not slack > 0: NaN stays NaN
    return tl.where(slack <= 0.0, none, slack), -inside, inside


@jit
def _hinge_at(w, l, target_margin):
    slack = target_margin - (w - l)
    none = tl.zeros_like(slack)
    inside = tl.where(slack <= 0.0, none, 1.0)
    return tl.where(slack <= 0.0, none, slack), -inside, inside


@jit
def _ipo(w, l, beta):
    off = w - l - 0.5 / beta
    return off * off, 2.0 * off, -2.0 * off


@jit
def _calibrated(w, l, delta):
    off = delta - (w - l)
    return off * off, -2.0 * off, 2.0 * off


@jit
def _exo(w, l, label_smoothing):
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


@jit
def _nca(w, l):
    won, factor = softplus_and_slope(-w)
    high_w, slope_w = softplus_and_slope(w)
    high_l, slope_l = softplus_and_slope(l)
    return won + 0.5 * high_w + 0.5 * high_l, 0.5 * slope_w - factor, 0.5 * slope_l


@jit
def _bco(w, l):
    loss_w, factor_w = softplus_and_slope(-w)
    loss_l, factor_l = softplus_and_slope(l)
    return loss_w + loss_l, -factor_w, factor_l


@jit
def _sppo(w, l, beta):
    off_w = w - 0.5 / beta
    off_l = l + 0.5 / beta
    return off_w * off_w + off_l * off_l, 2.0 * off_w, 2.0 * off_l


@jit
def _apo_zero(w, l):
    p_w, rest_w = sigmoids(w)
    p_l, rest_l = sigmoids(l)
    return rest_w + p_l, -p_w * rest_w, p_l * rest_l


@jit
def _apo_down(w, l):
    p_w, rest_w = sigmoids(w)
    p, rest = sigmoids(w - l)
    return p_w + rest, p_w * rest_w - p * rest, p * rest


@jit
def _alpha(w, l, alpha):
    lost, rest = softplus_and_slope(l - w)
    gap = power_gap(-lost, alpha - 1.0)
    return (gap + rest) / alpha, rest * gap, -rest * gap


@jit
def _budget(w, l, budget, budget_weight):
    loss, factor = softplus_and_slope(l - w)
    over = -w - budget
    none = tl.zeros_like(over)
    slope = tl.where(over <= 0.0, none, budget_weight)
    over = tl.where(over <= 0.0, none, over)
    return loss + times(budget_weight, over), -factor - slope, factor


@jit
def _linear(w, l, moved_w, moved_l, eta):
    ratio = 0.5 - 0.4 * (w - l)
    ratio = tl.where(ratio < eta, eta, tl.where(ratio > 1.0 - eta, 1.0 - eta, ratio))
    ratio = detached(ratio)
    return times(ratio, moved_l - moved_w), -ratio, ratio


NOTHING = Shape(_nothing)
LOG_SIGMOID = Shape(_log_sigmoid)
BETA_LOG_SIGMOID = Shape(_beta_log_sigmoid, {"beta": Hyper(0.1)})
MARGIN_LOG_SIGMOID = Shape(_margin_log_sigmoid, {"gamma": Hyper(0.5, NOT_NEGATIVE)})
ROBUST = Shape(_robust, {"label_smoothing": Hyper(0.0, BELOW_HALF)})
HINGE = Shape(_hinge)
HINGE_AT = Shape(_hinge_at, {"target_margin": Hyper(0.001, NOT_NEGATIVE)})
IPO = Shape(_ipo, BETA)
CALIBRATED = Shape(_calibrated, {"delta": Hyper(None, FINITE)})
EXO = Shape(_exo, {"label_smoothing": Hyper(None, Interval(0.0, 0.5))})
DMPO = Shape(_exo, {"alpha": Hyper(0.01, Interval(0.0, 0.5))})
NCA = Shape(_nca)
BCO = Shape(_bco)
SPPO = Shape(_sppo, BETA)
APO_ZERO = Shape(_apo_zero)
APO_DOWN = Shape(_apo_down)
ALPHA = Shape(_alpha, {"alpha": Hyper(0.9999)})
BUDGET = Shape(
    _budget,
    {"budget": Hyper(0.0, NOT_NEGATIVE), "budget_weight": Hyper(1.0, NOT_NEGATIVE)},
)
LINEAR = Shape(_linear, {"eta": Hyper(0.0, Interval(0.0, 0.5, True, True))})

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
    "linear_dpo": link(BESIDE_ERROR, LINEAR, beta=500.0),
    "budget_dpo": link(HALF_BETA_GAP, BUDGET),
    "diffusion_dro": link(GAP, HINGE_AT),
    "dmpo": link(HALF_BETA_GAP, DMPO, beta=6000.0),
    "smpo": link(SMOOTHED_GAP, LOG_SIGMOID),
    "seppo": link(BETA_GAP, LOG_SIGMOID, beta=2500.0),
    "capo": link(BETA_GAP, CALIBRATED, beta=2500.0),
}
LINKS: dict[str, Link] = {name: replace(each, name=name) for name, each in _LINKS.items()}
