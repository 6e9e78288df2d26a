"""The links beyond pairs of errors and gaps: of unpaired samples, of ranked lists, and of pairs of
which more sums are needed. Written once each, as those in links.py.

In all of them `sums[m]` has of member m its error, its gap (error less the reference's), the
reference's error, and, with drift=True, the mean squared difference from the reference.
"""
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

from .links import BETA, FINITE, NOT_NEGATIVE, UNIT, First, Group, Hyper
from .special import jit, sigmoids, softplus_and_slope, times, tl

# Unpaired samples: a reward -gap, and a sign that says whether it should be high ------------------


LABEL = Hyper(None, UNIT)  # 0 or 1, or bool


@jit
def _reward(sums, scalars, active):
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
def _kto(sums, cross, scalars, batch, active):
    reward, sign, weight = _of_kto(sums, scalars, batch)
    z = sign * scalars[0] * reward
    p, rest = sigmoids(z)
    return times(weight, rest), ((times(weight, sign * scalars[0] * p * rest),),), z


@jit
def _loss_averse(sums, cross, scalars, batch, active):
    reward, sign, weight = _of_kto(sums, scalars, batch)
    z = sign * scalars[0] * reward
    value, slope = softplus_and_slope(-z)
    return times(weight, 1.0 + value), ((times(weight, sign * scalars[0] * slope),),), z


@jit
def _risk_seeking(sums, cross, scalars, batch, active):
    reward, sign, weight = _of_kto(sums, scalars, batch)
    z = sign * scalars[0] * reward
    value, slope = softplus_and_slope(z)
    return times(weight, 1.0 - value), ((times(weight, sign * scalars[0] * slope),),), z


@jit
def _risk_seeking_1(sums, cross, scalars, batch, active):
    reward, sign, weight = _of_kto(sums, scalars, batch)
    value, slope = softplus_and_slope(scalars[0] * reward)
    slope = sign * scalars[0] * slope
    return times(weight, 1.0 - sign * value), ((times(weight, slope),),), sign * scalars[0] * reward


@jit
def _risk_seeking_2(sums, cross, scalars, batch, active):
    reward, sign, weight = _of_kto(sums, scalars, batch)
    z = 0.01 * scalars[0] * reward
    bounded = z > 80.0  # exp would overflow at 89
    value = tl.exp(tl.where(bounded, 80.0, z))
    slope = tl.where(bounded, 0.0, 0.01 * sign * scalars[0] * value)
    loss = times(weight, 2.0 - sign * value)
    return loss, ((times(weight, slope),),), 100.0 * sign * z


def _weight_of_kto(beta, desirable, undesirable, label, *_):
    return (desirable * (label > 0.5) + undesirable * (label <= 0.5)) != 0


_UTILITIES = {
    "kto": _kto, "loss_averse": _loss_averse, "risk_seeking": _risk_seeking,
    "risk_seeking_1": _risk_seeking_1, "risk_seeking_2": _risk_seeking_2,
    "risk_seeking_3": _risk_seeking,
}  # fmt: skip


_OF_KTO = {
    "beta": Hyper(1000.0),
    "lambda_desirable": Hyper(1.0, NOT_NEGATIVE),
    "lambda_undesirable": Hyper(1.0, NOT_NEGATIVE),
    "label": LABEL,
}
# By utility: against the batch's mean reward, and against a kl that is given.
KTO = {
    utility: Group(text, _OF_KTO, first=First(_reward), live=_weight_of_kto, name=f"kto_{utility}")
    for utility, text in _UTILITIES.items()
}
KTO_GIVEN_KL = {
    utility: Group(
        text, _OF_KTO | {"kl": Hyper(None, FINITE)}, live=_weight_of_kto,
        name=f"kto_{utility}_given_kl",
    )
    for utility, text in _UTILITIES.items()
}  # fmt: skip


@jit
def _signed(gap, sign, weight, beta):
    """weight * softplus(-u), with u = sign * beta * reward."""
    u = -sign * beta * gap
    value, slope = softplus_and_slope(-u)
    return times(weight, value), ((times(weight, sign * beta * slope),),), u


@jit
def _ddo(sums, cross, scalars, batch, active):
    beta, alpha, real = scalars
    gap = sums[0][1]
    none = tl.zeros_like(gap)
    sign = tl.where(real > 0.5, 1.0, none - 1.0)
    return _signed(gap, sign, tl.where(real > 0.5, 1.0, none + alpha), beta)


@jit
def _tgo(sums, cross, scalars, batch, active):
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


# Lists of k samples, which have a score each ------------------------------------------------------


@jit
def _added(slopes, i, j, slope_i, slope_j):
    """Slopes of members with those of i and j added."""
    added = ()
    for m in tl.static_range(len(slopes)):
        if m == i:
            added = added + (slopes[m] + slope_i,)  # noqa: RUF005 (the jit knows no unpacking)
        elif m == j:
            added = added + (slopes[m] + slope_j,)  # noqa: RUF005
        else:
            added = added + (slopes[m],)  # noqa: RUF005
    return added


@jit
def _as_slopes(slopes):
    found = ()
    for m in tl.static_range(len(slopes)):
        found = found + ((slopes[m],),)  # noqa: RUF005
    return found


@jit
def _gain_and_discount(scores, active, i):
    """2^score, and 1 / log(1 + rank), rank 1 being the best; equal scores rank as they come."""
    rank = tl.zeros_like(scores[i]) + 1.0
    for j in tl.static_range(len(scores)):
        if j < i:
            rank = rank + tl.where(active[j] & (scores[j] >= scores[i]), 1.0, tl.zeros_like(rank))
        elif j > i:
            rank = rank + tl.where(active[j] & (scores[j] > scores[i]), 1.0, tl.zeros_like(rank))
    return tl.exp(0.6931471805599453 * scores[i]), 1.0 / tl.log(1.0 + rank)


@jit
def _scores(scalars, active):
    """The members' scores, 0 where there is no member; scalars[0] is beta."""
    scores = ()
    for m in tl.static_range(len(active)):
        scores = scores + (tl.where(active[m], scalars[1 + m], 0.0),)  # noqa: RUF005
    return scores


@jit
def _rankdpo(sums, cross, scalars, batch, active):
    beta, scores = scalars[0], _scores(scalars, active)
    none = tl.zeros_like(sums[0][0])
    gains, discounts, slopes = (), (), ()
    for m in tl.static_range(len(sums)):
        gain, discount = _gain_and_discount(scores, active, m)
        gains = gains + (gain,)  # noqa: RUF005
        discounts = discounts + (discount,)  # noqa: RUF005
        slopes = slopes + (none,)  # noqa: RUF005
    loss, margin, n = none, none, none
    for i in tl.static_range(len(sums)):
        for j in tl.static_range(i + 1, len(sums)):
            ordered = active[i] & active[j] & (scores[i] != scores[j])
            weight = tl.abs(gains[i] - gains[j]) * tl.abs(discounts[i] - discounts[j])
            weight = tl.where(ordered, weight, none)
            sign = tl.where(scores[i] > scores[j], beta, none - beta)
            lead = sign * (sums[j][1] - sums[i][1])
            value, slope = softplus_and_slope(-lead)
            loss = loss + times(weight, value)
            slope = times(weight, sign * slope)
            slopes = _added(slopes, i, j, slope, -slope)
            margin = margin + tl.where(ordered, lead, none)
            n = n + tl.where(ordered, 1.0, none)
    return loss, _as_slopes(slopes), margin / tl.where(n == 0.0, 1.0, n)


@jit
def _plackett_luce(sums, cross, scalars, batch, active):
    beta, scores = scalars[0], _scores(scalars, active)
    none = tl.zeros_like(sums[0][0])
    slopes = ()
    for m in tl.static_range(len(sums)):
        slopes = slopes + (tl.where(active[m], beta, none),)  # noqa: RUF005
    loss, margin, n = none, none, none
    for j in tl.static_range(len(sums)):
        # log-sum-exp over those that score no more than j, about the highest of them
        high = -beta * sums[j][1]
        for i in tl.static_range(len(sums)):
            if i != j:
                below = active[i] & active[j] & (scores[i] <= scores[j])
                c = -beta * sums[i][1]
                high = tl.where(below & ~(c <= high), c, high)
                strictly = below & (scores[i] != scores[j])
                margin = margin + tl.where(strictly, beta * (sums[i][1] - sums[j][1]), none)
                n = n + tl.where(strictly, 1.0, none)
        total = tl.exp(-beta * sums[j][1] - high)
        for i in tl.static_range(len(sums)):
            if i != j:
                below = active[i] & active[j] & (scores[i] <= scores[j])
                total = total + tl.where(below, tl.exp(-beta * sums[i][1] - high), none)
        value = high + tl.log(total) + beta * sums[j][1]
        loss = loss + tl.where(active[j], value, none)
        for i in tl.static_range(len(sums)):
            below = active[i] & active[j] & (scores[i] <= scores[j])
            share = tl.exp(-beta * sums[i][1] - high) / total
            slopes = _added(slopes, i, i, tl.where(below, -beta * share, none), none)
    return loss, _as_slopes(slopes), margin / tl.where(n == 0.0, 1.0, n)


LONGEST = 16  # members of a list
RANKDPO = {
    k: Group(
        _rankdpo, BETA, of_members={"score": Hyper(None, UNIT)}, members=k, name=f"rankdpo_{k}"
    )
    for k in range(2, LONGEST + 1)
}
PLACKETT_LUCE = {
    k: Group(
        _plackett_luce, {"beta": Hyper(2500.0)}, of_members={"score": Hyper(None, FINITE)},
        members=k, name=f"plackett_luce_{k}",
    )
    for k in range(2, LONGEST + 1)
}  # fmt: skip


# Pairs of which more sums are needed --------------------------------------------------------------


@jit
def _dspo(sums, cross, scalars, batch, active):
    """mean ((p - t) - c (p - r))^2 of the winner, c = beta sigmoid(-margin), in its sums."""
    err, drift, beta = sums[0][0], sums[0][3], scalars[0]
    gap, gap_l = sums[0][1], sums[1][1]
    margin = -0.5 * beta * (gap - gap_l)
    rest, p = sigmoids(margin)
    c, bend = beta * p, 0.5 * beta * beta * p * rest
    by_c = 2.0 * c * drift - gap - drift
    loss = err - c * (gap + drift) + c * c * drift
    none = tl.zeros_like(err)
    return loss, ((1.0 - c + by_c * bend, c * c - c), (-by_c * bend, none)), margin


@jit
def _errors(sums, cross, scalars, batch, active):
    """Nothing but the sums: the slope of each error by itself is 1."""
    none = tl.zeros_like(sums[0][0])
    return none, ((none + 1.0,), (none + 1.0,)), none


DSPO = Group(
    _dspo, {"beta": Hyper(0.001)}, members=2, listed=False, drift=True, huber=False, name="dspo"
)
ERRORS = Group(_errors, members=2, listed=False, needs_ref=False, name="errors")
