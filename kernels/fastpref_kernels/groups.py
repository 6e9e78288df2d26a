"""The links beyond pairs of errors and gaps: of unpaired samples, of ranked lists, and of pairs of
which more sums are needed. Written once each, as those in links.py.

In all of them `sums[m]` has of member m its error, its gap (error less the reference's), the
reference's error, and, with drift=True, the mean squared difference from the reference.
"""
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

from .links import BETA, FINITE, NOT_NEGATIVE, UNIT, First, Group, Hyper
from .special import detached, expm1, jit, sigmoids, softplus_and_slope, times, tl

# Unpaired samples: a reward -gap, and a sign that says whether it should be high ------------------


LABEL = Hyper(None, UNIT)  # 0 or 1, or bool


@jit
def _reward(sums, scalars):
    return -sums[0][1]


@jit
def _of_kto(sums, scalars, batch):
    """(reward above kl, sign, weight): sign is -1 where the sample is undesirable."""
    reward, good = -sums[0][1], scalars[3] > 0.5
    reward = reward - (scalars[4] if len(scalars) > 4 else tl.where(batch < 0.0, 0.0, batch))
    none = tl.zeros_like(reward)
    weight = tl.where(good, none + scalars[1], none + scalars[2])
    return reward, tl.where(good, 1.0, none - 1.0), weight


@jit
def _kto(sums, cross, scalars, batch):
    reward, sign, weight = _of_kto(sums, scalars, batch)
    z = sign * scalars[0] * reward
    p, rest = sigmoids(z)
    return times(weight, rest), ((times(weight, sign * scalars[0] * p * rest),),), (z,)


@jit
def _loss_averse(sums, cross, scalars, batch):
    reward, sign, weight = _of_kto(sums, scalars, batch)
    z = sign * scalars[0] * reward
    value, slope = softplus_and_slope(-z)
    return times(weight, 1.0 + value), ((times(weight, sign * scalars[0] * slope),),), (z,)


@jit
def _risk_seeking(sums, cross, scalars, batch):
    reward, sign, weight = _of_kto(sums, scalars, batch)
    z = sign * scalars[0] * reward
    value, slope = softplus_and_slope(z)
    return times(weight, 1.0 - value), ((times(weight, sign * scalars[0] * slope),),), (z,)


@jit
def _risk_seeking_1(sums, cross, scalars, batch):
    reward, sign, weight = _of_kto(sums, scalars, batch)
    value, slope = softplus_and_slope(scalars[0] * reward)
    slope = times(weight, sign * scalars[0] * slope)
    return times(weight, 1.0 - sign * value), ((slope,),), (sign * scalars[0] * reward,)


@jit
def _risk_seeking_2(sums, cross, scalars, batch):
    reward, sign, weight = _of_kto(sums, scalars, batch)
    z = 0.01 * scalars[0] * reward
    bounded = z > 80.0  # exp would overflow at 89
    value = tl.exp(tl.where(bounded, 80.0, z))
    slope = tl.where(bounded, 0.0, 0.01 * sign * scalars[0] * value)
    loss = times(weight, 2.0 - sign * value)
    return loss, ((times(weight, slope),),), (100.0 * sign * z,)


def _weight_of_kto(beta, desirable, undesirable, label, *_):
    return (desirable * (label > 0.5) + undesirable * (label <= 0.5)) != 0


_UTILITIES = {
    "kto": _kto, "loss_averse": _loss_averse, "risk_seeking": _risk_seeking,
    "risk_seeking_1": _risk_seeking_1, "risk_seeking_2": _risk_seeking_2,
    "risk_seeking_3": _risk_seeking,
}  # fmt: skip


def _name_of_kto(utility: str) -> str:
    return "kto" if utility == "kto" else f"kto_{utility}"


_OF_KTO = {
    "beta": Hyper(1000.0),
    "lambda_desirable": Hyper(1.0, NOT_NEGATIVE),
    "lambda_undesirable": Hyper(1.0, NOT_NEGATIVE),
    "label": LABEL,
}
# By utility: against the batch's mean reward, and against a kl that is given.
KTO = {
    utility: Group(
        text, _OF_KTO, first=First(_reward), live=_weight_of_kto, name=_name_of_kto(utility)
    )
    for utility, text in _UTILITIES.items()
}
KTO_GIVEN_KL = {
    utility: Group(
        text, _OF_KTO | {"kl": Hyper(None, FINITE)}, live=_weight_of_kto,
        name=f"{_name_of_kto(utility)}_given_kl",
    )
    for utility, text in _UTILITIES.items()
}  # fmt: skip


@jit
def _signed(gap, sign, weight, beta):
    """weight * softplus(-u), with u = sign * beta * reward."""
    u = -sign * beta * gap
    value, slope = softplus_and_slope(-u)
    return times(weight, value), ((times(weight, sign * beta * slope),),), (u,)


@jit
def _ddo(sums, cross, scalars, batch):
    beta, alpha, real = scalars
    gap = sums[0][1]
    none = tl.zeros_like(gap)
    sign = tl.where(real > 0.5, 1.0, none - 1.0)
    return _signed(gap, sign, tl.where(real > 0.5, 1.0, none + alpha), beta)


@jit
def _tgo(sums, cross, scalars, batch):
    beta, confidence, score, threshold = scalars
    gap = sums[0][1]
    above = tl.zeros_like(gap) + (score - threshold)
    sign = tl.where(above < 0.0, -1.0, tl.zeros_like(gap) + 1.0)
    return _signed(gap, sign, 1.0 + confidence * tl.abs(above), beta)


DDO = Group(
    _ddo,
    {"beta": Hyper(0.05), "alpha": Hyper(4.0, NOT_NEGATIVE), "real": LABEL},
    live=lambda beta, alpha, real: (real > 0.5) | (alpha != 0),
    name="ddo",
)
TGO = Group(
    _tgo,
    {
        "beta": Hyper(1000.0), "confidence": Hyper(5.0, NOT_NEGATIVE),
        "score": Hyper(None, FINITE), "threshold": Hyper(None, FINITE),
    },
    name="tgo",
)  # fmt: skip


# Lists of k samples, which have a score each: (B, k) tensors, and (B, k, k) for their pairs -------


@jit
def _pairs_of(x):
    """(B, k, k) of (B, k): that of the first of two members, and of the second."""
    return x[:, :, None], x[:, None, :]


@jit
def _mean_lead(lead, ordered):
    """Over a list's pairs, 0 without any."""
    none = tl.zeros_like(lead)
    total = tl.sum(tl.sum(tl.where(ordered, lead, none), axis=2), axis=1)
    n = tl.sum(tl.sum(tl.where(ordered, none + 1.0, none), axis=2), axis=1)
    return total / tl.where(n == 0.0, 1.0, n)


@jit
def _rankdpo(sums, scores, order, scalars, active):
    gap, beta = sums[1], scalars[0]
    score_i, score_j = _pairs_of(scores)
    order_i, order_j = _pairs_of(order)
    there_i, there_j = _pairs_of(active)
    before = there_j & ((score_j > score_i) | ((score_j == score_i) & (order_j < order_i)))
    rank = 1.0 + tl.sum(tl.where(before, 1.0, tl.zeros_like(score_j + score_i)), axis=2)
    discount_i, discount_j = _pairs_of(1.0 / tl.log(1.0 + rank))
    gap_i, gap_j = _pairs_of(beta * gap)
    lead = gap_j - gap_i
    ordered = there_i & there_j & (score_i > score_j)
    # 2^score_i - 2^score_j, right where they are close
    gain = tl.exp(0.6931471805599453 * score_j) * expm1(0.6931471805599453 * (score_i - score_j))
    weight = tl.where(ordered, gain * tl.abs(discount_i - discount_j), 0.0)
    value, slope = softplus_and_slope(-lead)
    loss = tl.sum(tl.sum(times(weight, value), axis=2), axis=1)
    pull = times(weight, slope)
    slopes = beta * (tl.sum(pull, axis=2) - tl.sum(pull, axis=1))
    return loss, (slopes,), (_mean_lead(lead, ordered),)


@jit
def _plackett_luce(sums, scores, order, scalars, active):
    c = -scalars[0] * sums[1]
    c_j, c_i = _pairs_of(c)
    score_j, score_i = _pairs_of(scores)
    there_j, there_i = _pairs_of(active)
    below = there_j & there_i & (score_i <= score_j)
    high = detached(tl.max(tl.where(below, c_i + 0.0 * c_j, float("-inf")), axis=2))
    high = tl.where(active, high, 0.0)
    share = tl.where(below, tl.exp(tl.where(below, c_i - high[:, :, None], 0.0)), 0.0)
    total = tl.where(active, tl.sum(share, axis=2), 1.0)
    loss = tl.sum(tl.where(active, high + tl.log(total) - c, 0.0), axis=1)
    share = share / total[:, :, None]
    slopes = -scalars[0] * (tl.sum(share, axis=1) - tl.where(active, 1.0, tl.zeros_like(c)))
    return loss, (slopes,), (_mean_lead(c_j - c_i, below & (score_i != score_j)),)


LONGEST = 16  # members of a list
RANKDPO = {
    k: Group(
        _rankdpo,
        BETA,
        of_members={"score": Hyper(None, UNIT)},
        members=k,
        listed=True,
        name=f"rankdpo_{k}",
    )
    for k in range(2, LONGEST + 1)
}
PLACKETT_LUCE = {
    k: Group(
        _plackett_luce, {"beta": Hyper(2500.0)}, of_members={"score": Hyper(None, FINITE)},
        members=k, listed=True, name=f"plackett_luce_{k}",
    )
    for k in range(2, LONGEST + 1)
}  # fmt: skip


# Pairs of which more sums are needed --------------------------------------------------------------


@jit
def _dspo(sums, cross, scalars, batch):
    """mean ((p - t) - c (p - r))^2 of the winner, c = beta sigmoid(-margin), in its sums."""
    err, drift, beta = sums[0][0], sums[0][3], scalars[0]
    gap, gap_l = sums[0][1], sums[1][1]
    margin = -0.5 * beta * (gap - gap_l)
    rest, p = sigmoids(margin)
    c, bend = beta * p, 0.5 * beta * beta * p * rest
    by_c = 2.0 * c * drift - gap - drift
    loss = err - c * (gap + drift) + c * c * drift
    none = tl.zeros_like(err)
    return loss, ((1.0 - c + by_c * bend, c * c - c), (-by_c * bend, none)), (margin,)


@jit
def _errors(sums, cross, scalars, batch):
    """Nothing but the sums: the slope of each error by itself is 1."""
    none = tl.zeros_like(sums[0][0])
    return none, ((none + 1.0,), (none + 1.0,)), (none,)


DSPO = Group(_dspo, {"beta": Hyper(0.001)}, members=2, drift=True, huber=False, name="dspo")
ERRORS = Group(_errors, members=2, needs_ref=False, name="errors")
