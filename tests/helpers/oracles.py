"""The published formulas, each written down once, and evaluated in 50 digits: what is true.

Independent of the package: nothing here imports fastpref. A loss is the score of a sample, a
function of its error and the reference's, and the loss of a pair of scores; slopes are numerical
derivatives of it, which at 50 digits are exact for every purpose here. A loss may also take
`errors`, of winner and loser, and `held`, the scores as constants to those derivatives.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import mpmath as mp
import numpy as np
import torch
from torch import Tensor

mp.mp.dps = 50


def _log_sigmoid(x: Any) -> Any:
    return -mp.log1p(mp.exp(-x)) if x > -1000 else x


def _sigmoid(x: Any) -> Any:
    return mp.exp(_log_sigmoid(x))


# Scores: of a sample's error and the reference's -------------------------------------------------


def mapo_score(err: Any, ref: Any, snr: Any, num_train_timesteps: Any, **_: Any) -> Any:
    """mapo-t2i/mapo utils.py compute_loss: T * phi(s * e), less its value at e = 0."""
    x = snr * err
    phi = x / mp.expm1(x) if x != 0 else mp.mpf(1)
    return num_train_timesteps * (phi - 1)


def error_score(err: Any, ref: Any, **_: Any) -> Any:
    return -err


def simpo_score(err: Any, ref: Any, beta: Any, **_: Any) -> Any:
    return -beta * err


def raw_score(err: Any, ref: Any, **_: Any) -> Any:
    """IPO and SPPO: h without beta."""
    return -(err - ref)


def whole_score(err: Any, ref: Any, beta: Any, **_: Any) -> Any:
    """PSO, CaPO, SePPO: no 1/2."""
    return -beta * (err - ref)


def dpo_score(err: Any, ref: Any, beta: Any, **_: Any) -> Any:
    """SalesforceAIResearch/DiffusionDPO train.py: z = -0.5 * beta * D."""
    return -beta * (err - ref) / 2


def smpo_score(err: Any, ref: Any, beta: Any, gamma: Any, prob: Any, **_: Any) -> Any:
    """JaydenLyh/SmPO train.py: z = -0.5 * beta * (2 p - 1) * gamma * D."""
    return -beta * (2 * prob - 1) * gamma * (err - ref) / 2


# Losses: of the scores of winner and loser -------------------------------------------------------


def sigmoid(w: Any, l: Any, **_: Any) -> Any:
    return -_log_sigmoid(w - l)


def beta_sigmoid(w: Any, l: Any, beta: Any, **_: Any) -> Any:
    """MaPO, and ORPO with the sign put right: mean(e_w) - beta * logsigmoid(margin)."""
    return -beta * _log_sigmoid(w - l)


def nothing(w: Any, l: Any, **_: Any) -> Any:
    return mp.mpf(0)


def simpo(w: Any, l: Any, gamma: Any, **_: Any) -> Any:
    return -_log_sigmoid(w - l - gamma)


def hinge(w: Any, l: Any, **_: Any) -> Any:
    return max(mp.mpf(0), 1 - (w - l))


def ipo(w: Any, l: Any, beta: Any, **_: Any) -> Any:
    return (w - l - 1 / (2 * beta)) ** 2


def robust(w: Any, l: Any, label_smoothing: Any, **_: Any) -> Any:
    h, e = w - l, label_smoothing
    return (-(1 - e) * _log_sigmoid(h) + e * _log_sigmoid(-h)) / (1 - 2 * e)


def exo(w: Any, l: Any, label_smoothing: Any, **_: Any) -> Any:
    """EXO eq. 16, DMPO: KL(sigmoid(h) || 1 - e)."""
    log_p, log_r = _log_sigmoid(w - l), _log_sigmoid(l - w)
    log_q, log_e = mp.log1p(-label_smoothing), mp.log(label_smoothing)
    return mp.exp(log_p) * (log_p - log_q) + mp.exp(log_r) * (log_r - log_e)


def dmpo(w: Any, l: Any, alpha: Any, **_: Any) -> Any:
    """AIDC-AI/Diffusion-SDPO train.py: alpha is EXO's smoothing."""
    return exo(w, l, alpha, **_)


def nca(w: Any, l: Any, **_: Any) -> Any:
    return -_log_sigmoid(w) - (_log_sigmoid(-w) + _log_sigmoid(-l)) / 2


def bco(w: Any, l: Any, **_: Any) -> Any:
    return -_log_sigmoid(w) - _log_sigmoid(-l)


def sppo(w: Any, l: Any, beta: Any, **_: Any) -> Any:
    return (w - 1 / (2 * beta)) ** 2 + (l + 1 / (2 * beta)) ** 2


def apo_zero(w: Any, l: Any, **_: Any) -> Any:
    return (1 - _sigmoid(w)) + _sigmoid(l)


def apo_down(w: Any, l: Any, **_: Any) -> Any:
    return _sigmoid(w) + (1 - _sigmoid(w - l))


def alpha_dpo(w: Any, l: Any, alpha: Any, **_: Any) -> Any:
    """yangli-lab/Diffusion_alpha-DPO scripts/main.py; its limit at alpha = 1."""
    p, a = _sigmoid(w - l), alpha
    if a == 1:
        return p * mp.log(p) + 1 - p
    return (p**a - (1 - a) - a * p) / (a * (a - 1))


def capo(w: Any, l: Any, delta: Any, **_: Any) -> Any:
    return (delta - (w - l)) ** 2


def budget_dpo(w: Any, l: Any, budget: Any, budget_weight: Any, **_: Any) -> Any:
    return -_log_sigmoid(w - l) + budget_weight * max(mp.mpf(0), -w - budget)


def linear_dpo(w: Any, l: Any, eta: Any, held: Any, errors: Any, **_: Any) -> Any:
    """WhynotChen0105/Linear-DPO train_sd_dpo.py: clamp(.2 * beta * D + .5, eta, 1 - eta) detached,
    times the difference of the errors; beta * D is -2 times the margin."""
    ratio = min(max((held[1] - held[0]) * 2 / 5 + mp.mpf(1) / 2, eta), 1 - eta)
    return ratio * (errors[0] - errors[1])


def hinge_at(w: Any, l: Any, target_margin: Any, **_: Any) -> Any:
    """basiclab/DiffusionDRO train.py: relu(gap_expert - gap_policy + margin)."""
    return max(mp.mpf(0), target_margin - (w - l))


def _apo_down_terms(w: Any, l: Any) -> tuple[Any, Any]:
    of_w, of_margin = (_sigmoid(x) * _sigmoid(-x) for x in (w, w - l))
    return of_w + of_margin, of_margin


def _nca_terms(w: Any, l: Any) -> tuple[Any, Any]:
    return _sigmoid(w) / 2 + _sigmoid(-w), _sigmoid(l) / 2


class Formula(NamedTuple):
    """A link, and how the tests try it."""

    score: Callable[..., Any]
    loss: Callable[..., Any]
    sft_weight: int = 0
    terms: Callable[[Any, Any], tuple[Any, Any]] | None = None
    """Sizes of what the slopes by w and l are differences of, each rounded by itself."""
    call: Mapping[str, Any] = {}
    """Numbers for a call of its public function, one for all pairs or three."""
    given: Mapping[str, float] = {}
    """Hyper-parameters without a default, wherever the link is tried at many errors."""
    also: Sequence[Mapping[str, float]] = ()
    """Hyper-parameters at which it is tried besides its defaults and a small and a large beta."""
    differences: bool = False
    """Slopes are differences, or pass through 0: small ones are right next to large ones only."""
    unbounded: bool = False
    """The loss of an infinite error of the loser is infinite."""
    detached: bool = False
    """A factor is held constant: slopes are not those of the value."""


SMOOTHED = {"label_smoothing": 0.1}
FORMULAS: dict[str, Formula] = {
    "mapo": Formula(
        mapo_score, beta_sigmoid, 1,
        call={"beta": 0.2, "snr": 0.6, "num_train_timesteps": 900.0},
        also=[{"snr": 1.0, "num_train_timesteps": 50.0}],
    ),
    "sft": Formula(error_score, nothing, 1),
    "orpo": Formula(error_score, beta_sigmoid, 1, call={"beta": 0.3}),
    "simpo": Formula(
        simpo_score, simpo, call={"beta": 30.0, "gamma": 0.3}, also=[{"gamma": 0.0}]
    ),
    "pso_hinge": Formula(simpo_score, hinge),
    "pso_sigmoid": Formula(whole_score, sigmoid),
    "dpo_sigmoid": Formula(dpo_score, sigmoid),
    "dpo_hinge": Formula(dpo_score, hinge),
    "dpo_ipo": Formula(raw_score, ipo, differences=True, unbounded=True),
    "dpo_robust": Formula(
        dpo_score, robust, call=SMOOTHED, also=[SMOOTHED, {"label_smoothing": 0.45}]
    ),
    "dpo_exo_pair": Formula(
        dpo_score, exo, call=SMOOTHED, given={"label_smoothing": 0.01}, differences=True,
        also=[{"label_smoothing": 1e-6}, {"label_smoothing": 0.4}],
    ),
    "dpo_nca_pair": Formula(dpo_score, nca, terms=_nca_terms, differences=True),
    "dpo_bco_pair": Formula(dpo_score, bco),
    "dpo_sppo_hard": Formula(raw_score, sppo, differences=True, unbounded=True),
    "dpo_apo_zero": Formula(dpo_score, apo_zero),
    "dpo_apo_down": Formula(dpo_score, apo_down, terms=_apo_down_terms, differences=True),
    "dpo_alpha": Formula(
        dpo_score, alpha_dpo, call={"alpha": 0.6},
        also=[{"alpha": 0.5}, {"alpha": 1.0}, {"alpha": 1.5}],
    ),
    "linear_dpo": Formula(
        dpo_score, linear_dpo, call={"beta": 300.0, "eta": 0.05}, also=[{"eta": 0.01}],
        detached=True,
    ),
    "budget_dpo": Formula(
        dpo_score, budget_dpo, call={"beta": 700.0, "budget": 0.01, "budget_weight": 2.0},
        also=[{"budget": 0.7, "budget_weight": 3.0}],
    ),
    "diffusion_dro": Formula(
        raw_score, hinge_at, call={"target_margin": 0.02}, also=[{"target_margin": 0.0}]
    ),
    "dmpo": Formula(dpo_score, dmpo, call={"beta": 900.0, "alpha": 0.02}, differences=True),
    "smpo": Formula(
        smpo_score, sigmoid, call={"beta": 400.0, "gamma": 5.0, "prob": (0.9, 0.5, 0.3)},
        given={"prob": 0.73}, also=[{"prob": 0.5}, {"prob": 0.1, "beta": 2e4}, {"prob": 1.0}],
    ),
    "seppo": Formula(whole_score, sigmoid),
    "capo": Formula(
        whole_score, capo, call={"beta": 300.0, "delta": (0.2, 0.6, -0.1)}, given={"delta": 0.4},
        differences=True, unbounded=True,
    ),
}  # fmt: skip


class Errors(NamedTuple):
    """Of one pair: of the model, and of the reference (equal to 0 where there is none)."""

    w: Any
    l: Any
    ref_w: Any = 0.0
    ref_l: Any = 0.0


def values(
    name: str, errors: Errors, numbers: Mapping[str, Any], held: tuple[Any, Any] | None = None
) -> tuple[Any, Any, Any]:
    """(loss, score_w, score_l); `numbers` are hyper-parameters and knobs by name. held: scores from
    elsewhere, for what is constant while the errors move."""
    formula = FORMULAS[name]
    given = {key: mp.mpf(float(value)) for key, value in numbers.items()}
    scale, loser = given.pop("logit_scale", 1), given.pop("loser_weight", 1)
    of_w, of_l = given.pop("sample_weight_w", 1), given.pop("sample_weight_l", 1)
    weight, sft = given.pop("pair_weight", 1), given.pop("sft_weight", formula.sft_weight)
    prior = given.pop("prior_weight", 0)
    mixed = 0 if formula.loss in (robust, exo) else given.pop("label_smoothing", 0)
    score_w = scale * formula.score(of_w * errors.w, of_w * errors.ref_w, **given)
    score_l = scale * loser * formula.score(of_l * errors.l, of_l * errors.ref_l, **given)
    two = {
        "errors": (scale * of_w * errors.w, scale * loser * of_l * errors.l),
        "held": held or (score_w, score_l),
    }
    loss = (1 - mixed) * formula.loss(score_w, score_l, **two, **given)
    if mixed:
        swapped = {key: value[::-1] for key, value in two.items()}
        loss += mixed * formula.loss(score_l, score_w, **swapped, **given)
    loss += sft * of_w * errors.w + prior * of_l * errors.l
    return weight * loss, score_w, score_l


class Pair(NamedTuple):
    """The truth about one pair. A slope is (from below, from above): they differ at a kink."""

    loss: Any
    score_w: Any
    score_l: Any
    slope_w: tuple[Any, Any]
    slope_l: tuple[Any, Any]

    @property
    def margin(self) -> Any:
        return self.score_w - self.score_l


_STEP = mp.mpf(10) ** -20


@functools.cache
def _pair(name: str, errors: Errors, numbers: tuple[tuple[str, float], ...]) -> Pair:
    known = dict(numbers)

    def loss(by_w: Any, by_l: Any) -> Any:
        moved = errors._replace(w=mp.mpf(errors.w) + by_w, l=mp.mpf(errors.l) + by_l)
        return values(name, moved, known, (score_w, score_l))[0]

    here, score_w, score_l = values(name, Errors(*map(mp.mpf, errors)), known)
    slope_w = ((here - loss(-_STEP, 0)) / _STEP, (loss(_STEP, 0) - here) / _STEP)
    slope_l = ((here - loss(0, -_STEP)) / _STEP, (loss(0, _STEP) - here) / _STEP)
    return Pair(here, score_w, score_l, slope_w, slope_l)


def pair(name: str, errors: Errors, numbers: Mapping[str, float]) -> Pair:
    return _pair(name, errors, tuple(numbers.items()))


def columns_of(name: str, errors: Errors, numbers: Mapping[str, float]) -> list[Any]:
    """loss, margin, slope_w and slope_l."""
    at = pair(name, errors, numbers)
    return [at.loss, at.margin, sum(at.slope_w) / 2, sum(at.slope_l) / 2]


def moves_of(
    name: str, errors: Errors, sizes: tuple[float, float], numbers: Mapping[str, float]
) -> list[Any]:
    """How far each column moves per relative change of what fp32 holds to 6e-8 and no better: the
    errors, and, a reference being there, the terms of which the gaps are sums."""
    by = mp.mpf(10) ** -9
    here = columns_of(name, errors, numbers)
    w, l, ref_w, ref_l = map(mp.mpf, errors)
    moved = [
        Errors(w * (1 + by), l, ref_w + w * by, ref_l),  # the error, at the same gap
        Errors(w, l * (1 + by), ref_w, ref_l + l * by),
        Errors(w, l, ref_w - sizes[0] * by, ref_l),  # the gap, at the same error
        Errors(w, l, ref_w, ref_l - sizes[1] * by),
    ]
    if not any(errors[2:]):
        moved = [Errors(w * (1 + by), l), Errors(w, l * (1 + by))]
    columns = [columns_of(name, each, numbers) for each in moved]
    moves = [sum(abs(c[i] - here[i]) for c in columns) / by for i in range(4)]
    if terms := FORMULAS[name].terms:
        near = Errors(w + by, l + by, ref_w, ref_l)
        at, beside = (pair(name, each, numbers) for each in (errors, near))
        pulls = (beside.score_w - at.score_w, beside.score_l - at.score_l)
        for i, (term, pull) in enumerate(zip(terms(at.score_w, at.score_l), pulls, strict=True)):
            moves[2 + i] += numbers.get("pair_weight", 1.0) * term * abs(pull / by)
    # the loser's fit, from which its pull is taken
    fit = numbers.get("prior_weight", 0.0) * numbers.get("sample_weight_l", 1.0)
    moves[3] += numbers.get("pair_weight", 1.0) * fit
    return moves


class Truth(NamedTuple):
    """A true array in fp64, and how far it moves per relative change of the errors."""

    value: np.ndarray
    moves: np.ndarray


Halves = tuple[Tensor, Tensor]


def batch(
    name: str,
    pred: Halves,
    target: Halves,
    numbers: Mapping[str, Any],
    reduction: str = "mean",
    grad_loss: Any = 1.0,
    ref: Halves | None = None,
    mask: Halves | None = None,
    error_reduction: str = "mean",
    huber_c: float | None = None,
) -> dict[str, Truth]:
    """loss, mse_w, mse_l, margin, ref_mse_w, ref_mse_l, and grad_w, grad_l of sum(loss *
    grad_loss), for (B, ...) halves. ref: predictions, or (B,) errors. numbers: of all pairs, or
    (B,)."""
    n_pairs = pred[0].shape[0]
    errors, ref_errors, sizes, gradients = [], [], [], []
    for i in range(2):
        p, t = (x[i].detach().double().cpu().numpy().reshape(n_pairs, -1) for x in (pred, target))
        weight = np.ones_like(p)
        if mask is not None:
            weight = mask[i].double().expand(pred[i].shape).cpu().numpy().reshape(n_pairs, -1)
        p = np.where(weight == 0, 0, p)
        size = weight.sum(axis=1) if error_reduction == "mean" else np.ones(n_pairs)
        weight = weight / np.where(size == 0, 1, size)[:, None]

        def element(x: np.ndarray) -> np.ndarray:
            return x**2 if huber_c is None else x**2 / (np.sqrt(x**2 + huber_c**2) + huber_c)

        errors.append((weight * element(p - t)).sum(axis=1))
        slope = 2 if huber_c is None else 1 / np.sqrt((p - t) ** 2 + huber_c**2)
        gradients.append(weight * slope * (p - t))
        if ref is None or ref[i].dim() == 1:
            given = np.zeros(n_pairs) if ref is None else ref[i].double().cpu().numpy()
            ref_errors.append(given)
            sizes.append(errors[i])
            continue
        r = ref[i].detach().double().cpu().numpy().reshape(n_pairs, -1)
        ref_errors.append((weight * element(np.where(weight == 0, t, r) - t)).sum(axis=1))
        sizes.append((weight * np.abs(element(p - t) - element(r - t))).sum(axis=1))
    rows, moves = [], []
    for i in range(n_pairs):
        numbers_i = {
            key: float(value if np.ndim(value) == 0 else value[i]) for key, value in numbers.items()
        }
        of_pair = Errors(*(float(e[i]) for e in (*errors, *ref_errors)))
        rows.append([float(x) for x in columns_of(name, of_pair, numbers_i)])
        size = (float(sizes[0][i]), float(sizes[1][i]))
        moves.append([float(x) for x in moves_of(name, of_pair, size, numbers_i)])
    columns, moved = np.array(rows).T, np.array(moves).T
    reduce: Any = {"mean": np.mean, "sum": np.sum, "none": np.asarray}[reduction]
    truths = {
        "loss": Truth(reduce(columns[0]), reduce(moved[0])),
        "mse_w": Truth(errors[0], errors[0]),
        "mse_l": Truth(errors[1], errors[1]),
        "margin": Truth(columns[1], moved[1]),
        "ref_mse_w": Truth(ref_errors[0], ref_errors[0]),
        "ref_mse_l": Truth(ref_errors[1], ref_errors[1]),
    }
    outer = np.broadcast_to(np.asarray(grad_loss, dtype=np.float64), (n_pairs,))
    outer = outer / n_pairs if reduction == "mean" else outer
    for half, i in (("grad_w", 0), ("grad_l", 1)):
        shape = tuple(pred[i].shape)
        truths[half] = Truth(
            (gradients[i] * (outer * columns[2 + i])[:, None]).reshape(shape),
            (gradients[i] * (outer * moved[2 + i])[:, None]).reshape(shape),
        )
    return truths


def assert_three_way(name: str, got: Tensor, eager: Tensor, truth: Truth) -> None:
    """A kernel may be off by twice what eager PyTorch is off in the same dtype, plus rounding: that
    of the result in its dtype, and that of the errors in fp32; and eager PyTorch by four times that
    rounding. All relative to the largest entry."""
    kind = torch.finfo(eager.dtype)
    rounding = kind.eps * np.abs(truth.value).max() + kind.eps * kind.tiny  # the least it can hold
    rounding += torch.finfo(torch.float32).eps * np.abs(truth.moves).max()

    def off(tensor: Tensor) -> float:
        return float(np.abs(tensor.detach().double().cpu().numpy() - truth.value).max())

    assert off(eager) <= 4 * rounding, f"{name}, eager: {off(eager):.3e} off, for {rounding:.3e}"
    assert got.dtype == eager.dtype
    allowed = 2 * (off(eager) + rounding)
    assert off(got) <= allowed, f"{name}: off by {off(got):.3e}, allowed {allowed:.3e}"
