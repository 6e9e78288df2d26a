"""The published losses of samples, lists and pairs of more sums, each written down once in fp64:
what is true, on whole tensors, with gradients by autograd.

Independent of the package: nothing here imports fastpref. A loss takes what was measured of its
samples, the error, the gap (error less the reference's) and the drift (mean squared difference from
the reference), each (B,), or (B, k) of lists, or (2, B) of pairs, winners first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from oracles import Truth

Number = float | Tensor


class Nudges(NamedTuple):
    """By how much of its size each sum is moved; shapes are those of the sums."""

    err: Number = 0.0
    gap: Number = 0.0
    drift: Number = 0.0
    cross: Number = 0.0


NO_NUDGE = Nudges()


class Tensors(NamedTuple):
    """fp64, rows x elements: the prediction, its target, the reference's prediction."""

    p: Tensor
    t: Tensor
    r: Tensor


class Measured(NamedTuple):
    """What there is of each sample; `whole` has the elements, `there` says which members of lists
    there are, `cross` is of pairs."""

    err: Tensor
    ref: Tensor
    gap: Tensor
    drift: Tensor
    cross: Tensor
    whole: Tensors
    there: Tensor


Loss = Callable[..., tuple[Tensor, Tensor]]
"""(losses, margins) of what was measured, and of the numbers by name."""


def _element(off: Tensor, c: Tensor | None) -> Tensor:
    """A square, or pseudo-Huber; |off| for c = 0."""
    if c is None:
        return off.square()
    c = c[:, None]
    return torch.where(c == 0, off.abs(), (off.square() + c.square()).sqrt() - c)


def _measure(
    of: Tensors,
    shape: tuple[int, ...],
    pairs: bool,
    there: Tensor,
    weight: Tensor,
    huber_c: Tensor | None,
    ref_mse: Tensor | None,
    nudges: Nudges,
) -> Measured:
    """weight: of the elements, rows x elements, by which they are summed."""
    p, t, r = of

    def total(x: Tensor) -> Tensor:
        return (weight * torch.where(weight == 0, 0.0, x)).sum(1).view(shape)

    element = _element(p - t, huber_c)
    err = total(element)
    if ref_mse is None:
        of_ref = _element(r - t, huber_c)
        ref, gap, size = total(of_ref), total(element - of_ref), total((element - of_ref).abs())
    else:
        ref = ref_mse.view(shape)
        gap, size = err - ref, err + ref
    drift = total((p - r).square())
    cross = torch.zeros(())
    if pairs:
        off_w, off_l = ((p - t) * weight.sqrt()).chunk(2)  # where both weights are alike
        cross = (off_w * off_l).sum(1)
        cross = cross + nudges.cross * (off_w * off_l).abs().sum(1).detach()
    return Measured(
        err * (1 + nudges.err), ref, gap + nudges.gap * size.detach(), drift * (1 + nudges.drift),
        cross, of, there,
    )  # fmt: skip


# Samples -----------------------------------------------------------------------------------------


def kto(
    m: Measured,
    label: Tensor,
    beta: float,
    lambda_desirable: float = 1.0,
    lambda_undesirable: float = 1.0,
    utility: str = "kto",
    kl: float | None = None,
) -> tuple[Tensor, Tensor]:
    """jacklishufan/diffusion-kto train_kto_sd_v1.5.py: g = R - L, less max(mean(g), 0), detached;
    1 - h of z = (2 y - 1) beta g, weighed by lambda_d or lambda_u."""
    g = -m.gap
    g = g - (g.mean().clamp(min=0).detach() if kl is None else kl)
    sign = 2 * label.double() - 1
    z = sign * beta * g
    h = {
        "kto": lambda: torch.sigmoid(z),
        "loss_averse": lambda: F.logsigmoid(z),
        "risk_seeking_1": lambda: -sign * F.logsigmoid(-beta * g),
        "risk_seeking_2": lambda: sign * torch.exp((beta * g / 100).clamp(max=80)) - 1,
        "risk_seeking_3": lambda: -F.logsigmoid(-z),
        "risk_seeking": lambda: -F.logsigmoid(-z),
    }[utility]()
    one_less = torch.sigmoid(-z) if utility == "kto" else 1 - h
    weight = torch.where(label.bool(), lambda_desirable, lambda_undesirable).double()
    return weight * one_less, z


def ddo(m: Measured, real: Tensor, beta: float, alpha: float) -> tuple[Tensor, Tensor]:
    """arXiv:2503.01103 eq. 13-16: -log sigmoid(beta Delta) of the data's samples, -alpha log(1 -
    sigmoid(beta Delta)) of the reference's."""
    delta = -m.gap
    of_data, of_reference = -F.logsigmoid(beta * delta), -alpha * F.logsigmoid(-beta * delta)
    is_real = real.bool()
    margin = torch.where(is_real, beta * delta, -beta * delta)
    return torch.where(is_real, of_data, of_reference), margin


def tgo(
    m: Measured, score: Tensor, threshold: Number, beta: float, confidence: float
) -> tuple[Tensor, Tensor]:
    """Threshold-guided, eq. 10: w (y softplus(-u) + (1 - y) softplus(u))."""
    u = -beta * m.gap
    above = score.double() - threshold
    y = (above >= 0).double()
    w = 1 + confidence * above.abs()
    loss = -w * (y * F.logsigmoid(u) + (1 - y) * F.logsigmoid(-u))  # softplus is cut at 20 in torch
    return loss, (2 * y - 1) * u


# Lists -------------------------------------------------------------------------------------------


def _lists(m: Measured, score: Tensor) -> Iterator[tuple[Tensor, list[float]]]:
    """Gaps and scores of each list, of the members that there are."""
    for gap, of_list, there in zip(m.gap, score.double(), m.there, strict=True):
        yield gap[there], of_list[there].tolist()


def _lead(gap: Tensor, score: Sequence[float], beta: float) -> Tensor:
    """The mean over the ordered pairs of a list."""
    n = range(len(score))
    leads = [beta * (gap[j] - gap[i]) for i in n for j in n if score[i] > score[j]]
    return torch.stack(leads).mean() if leads else 0 * gap.sum()


def rankdpo(m: Measured, score: Tensor, beta: float, alone: str = "") -> tuple[Tensor, Tensor]:
    """arXiv:2410.18013 sec. 3.3: the sum over i above j of |2^phi_i - 2^phi_j| * |1 / log(1 +
    tau_i) - 1 / log(1 + tau_j)| * softplus(beta (s_i - s_j)), tau being the rank by phi, from 1.
    alone: which of the two is differentiated."""
    losses, margins = [], []
    for s, phi in _lists(m, score):
        better, worse = (s.detach() if alone == other else s for other in ("worse", "better"))
        tau = [0] * len(phi)
        for rank, i in enumerate(sorted(range(len(phi)), key=lambda i: -phi[i]), start=1):
            tau[i] = rank
        loss = 0 * s.sum()
        for i in range(len(phi)):
            for j in range(len(phi)):
                if phi[i] > phi[j]:
                    gain = abs(2 ** phi[i] - 2 ** phi[j])
                    discount = abs(1 / math.log(1 + tau[i]) - 1 / math.log(1 + tau[j]))
                    loss = loss - gain * discount * F.logsigmoid(-beta * (better[i] - worse[j]))
        losses.append(loss)
        margins.append(_lead(s, phi, beta))
    return torch.stack(losses), torch.stack(margins)


def plackett_luce(
    m: Measured, score: Tensor, beta: float, alone: str = ""
) -> tuple[Tensor, Tensor]:
    """arXiv:2510.01540: -sum_j [c_j - logsumexp of those that are not above j]; of equal scores,
    each is among the others' rest. alone: which of the two is differentiated."""
    losses, margins = [], []
    for gap, of_list in _lists(m, score):
        c, loss = -beta * gap, 0 * gap.sum()
        of_item, of_rest = (c.detach() if alone == other else c for other in ("rest", "item"))
        for j in range(len(of_list)):
            rest = [i for i in range(len(of_list)) if of_list[i] <= of_list[j]]
            loss = loss - (of_item[j] - torch.logsumexp(of_rest[rest], 0))
        losses.append(loss)
        margins.append(_lead(gap, of_list, beta))
    return torch.stack(losses), torch.stack(margins)


# Pairs -------------------------------------------------------------------------------------------


def _dpo_margin(m: Measured, beta: float) -> Tensor:
    return -0.5 * beta * (m.gap[0] - m.gap[1])


def dpo(m: Measured, beta: float) -> tuple[Tensor, Tensor]:
    margin = _dpo_margin(m, beta)
    return -F.logsigmoid(margin), margin


def mapo(m: Measured, beta: float, snr: float, num_train_timesteps: float) -> tuple[Tensor, Tensor]:
    """mapo-t2i/mapo utils.py compute_loss."""
    x = snr * m.err
    x = torch.where(x == 0, 1e-30, x)  # of a sample that a mask hides
    phi = num_train_timesteps * (x / torch.expm1(x))
    margin = phi[0] - phi[1]
    return m.err[0] - beta * F.logsigmoid(margin), margin


def dspo(m: Measured, beta: float) -> tuple[Tensor, Tensor]:
    """huaishengzhu/DSPO train.py, SD1.5: mean ((p - t) - beta (1 - sigmoid(z)) (p - r))^2 of the
    winner, z = -0.5 beta D not detached."""
    z = _dpo_margin(m, beta)
    p, t, r = (each.chunk(2)[0] for each in m.whole)
    scale = (beta * (1 - torch.sigmoid(z)))[:, None]
    return ((p - t) - scale * (p - r)).square().mean(1), z


def dspo_of_sums(m: Measured, beta: float) -> tuple[Tensor, Tensor]:
    """The same, by its sums: Lw - c (gap_w + Kw) + c^2 Kw."""
    z = _dpo_margin(m, beta)
    c, drift = beta * torch.sigmoid(-z), m.drift[0]
    return m.err[0] - c * (m.gap[0] + drift) + c.square() * drift, z


def linear_dpo(m: Measured, beta: float, eta: float) -> tuple[Tensor, Tensor]:
    """WhynotChen0105/Linear-DPO train_sd_dpo.py; its margin is DPO's."""
    d = m.gap[0] - m.gap[1]
    ratio = (0.2 * beta * d + 0.5).clamp(eta, 1 - eta).detach()
    return ratio * (m.err[0] - m.err[1]), -0.5 * beta * d


def diffusion_dro(m: Measured, target_margin: float) -> tuple[Tensor, Tensor]:
    """basiclab/DiffusionDRO train.py: relu(gap_expert - gap_policy + margin)."""
    d = m.gap[0] - m.gap[1]
    return torch.relu(d + target_margin), -d


# From the losses of samples, lists or pairs to what a call returns -------------------------------


def _guarded(m: Measured, scale: Number | None, mu: float | None, over: str) -> Measured:
    """AIDC-AI/Diffusion-SDPO train.py: the loser's error is its value, and lam times its
    gradient."""
    if mu is not None:
        err, cross = m.err[0].detach(), m.cross.detach()
        if over == "batch":
            err, cross = err.sum(), cross.sum()
        lam = ((1 - mu) * err / torch.where(cross > 0, cross, 1.0)).clamp(0, 1)
        scale = torch.where(cross > 0, lam, 1.0)
    if scale is None:
        return m

    def scaled(x: Tensor) -> Tensor:
        return torch.stack([x[0], x[1].detach() + scale * (x[1] - x[1].detach())])

    return m._replace(err=scaled(m.err), gap=scaled(m.gap))


def reduced(losses: Tensor, reduction: str = "mean", dro_temperature: float = 1.0) -> Tensor:
    if reduction == "dro":
        n = losses.shape[0]
        return dro_temperature * (torch.logsumexp(losses / dro_temperature, 0) - math.log(n))
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()


class Setting(NamedTuple):
    """How a loss is called, besides its own numbers."""

    members: int = 1
    listed: bool = True
    lengths: Tensor | None = None
    mask: Tensor | None = None
    huber_c: Number | None = None
    error_reduction: str = "mean"
    weight: Number = 1.0
    anchor_weight: float = 0.0
    loser_gradient_scale: Number | None = None
    safeguard: float | None = None
    safeguard_over: str = "batch"
    reduction: str = "mean"
    dro_temperature: float = 1.0


def _rows(t: Tensor, of: int, members: int, listed: bool) -> Tensor:
    """fp64; once for each sample, where a group shares it."""
    t = t.detach().double().cpu()
    if t.shape[0] == of:
        return t
    return t.repeat_interleave(members, 0) if listed else torch.cat([t] * members)


def _spread(c: Number, rows: int, setting: Setting) -> Tensor:
    """A number for each row."""
    c = torch.as_tensor(c).double().cpu()
    return c.expand(rows) if c.dim() == 0 else _rows(c, rows, setting.members, setting.listed)


class Given(NamedTuple):
    """The tensors of a call as they are given; of pairs stacked."""

    pred: Tensor
    target: Tensor
    ref_pred: Tensor | None = None
    ref_mse: Tensor | None = None


def evaluate(
    loss: Loss,
    given: Given,
    numbers: dict[str, Any],
    setting: Setting,
    pred: Tensor,
    nudges: Nudges = NO_NUDGE,
) -> tuple[Tensor, Measured, Tensor]:
    """The reduced loss, differentiable by `pred` (fp64); what was measured; and the margin."""
    rows, members = len(pred), setting.members
    groups = rows // members
    shape = (rows,) if members == 1 else (groups, members) if setting.listed else (2, groups)
    there = torch.ones(shape, dtype=torch.bool)
    if setting.lengths is not None:
        there = torch.arange(members)[None] < setting.lengths.cpu()[:, None]

    def flat(t: Tensor) -> Tensor:
        t = t if setting.lengths is None else torch.where(row_there(t), t, 0.0)
        return t.flatten(1)

    def row_there(t: Tensor) -> Tensor:
        return there.flatten().view(-1, *[1] * (t.dim() - 1))

    target = _rows(given.target, rows, members, setting.listed)
    ref = target if given.ref_pred is None else given.ref_pred.detach().double().cpu()
    of = Tensors(flat(pred), flat(target), flat(ref))
    weight = torch.ones_like(of.t)
    if setting.mask is not None:
        mask = _rows(setting.mask, rows, members, setting.listed)
        weight = mask.expand(target.shape).flatten(1)
        of = Tensors(*(torch.where(weight == 0, 0.0, each) for each in of))
    if setting.error_reduction == "mean":
        size = weight.sum(1, keepdim=True)
        weight = weight / torch.where(size == 0, 1.0, size)
    huber_c = None if setting.huber_c is None else _spread(setting.huber_c, rows, setting)
    ref_mse = None if given.ref_mse is None else given.ref_mse.detach().double().cpu()
    m = _measure(of, shape, not setting.listed, there, weight, huber_c, ref_mse, nudges)
    guarded = _guarded(m, setting.loser_gradient_scale, setting.safeguard, setting.safeguard_over)
    numbers = {
        key: value.detach().cpu() if isinstance(value, Tensor) else value
        for key, value in numbers.items()
    }
    losses, margin = loss(guarded, **numbers)
    if setting.anchor_weight:
        losses = losses + setting.anchor_weight * m.drift.mean(0)
    weight_of_loss = torch.as_tensor(setting.weight).double().cpu()
    return reduced(weight_of_loss * losses, setting.reduction, setting.dro_temperature), m, margin


_BY = 1e-7  # of the nudges: results in fp64 are then known to 1e-9 of their size


def truths(
    loss: Loss,
    given: Given,
    numbers: dict[str, Any],
    setting: Setting,
    of_sums: Loss | None = None,
    parts: Sequence[str] = (),
) -> dict[str, Truth]:
    """loss, errors, ref_errors, drops, margin, and grad of sum(loss), by name; and how far each
    moves per relative change of what fp32 holds to 6e-8 and no better: errors, terms of the gaps,
    drifts and cross sums. of_sums: the same loss as a function of these, where it is none. parts:
    what the loss may differentiate `alone`, terms of which its slopes are sums."""

    def columns(formula: Loss, nudges: Nudges, **alone: str) -> dict[str, np.ndarray]:
        pred = given.pred.detach().double().cpu().requires_grad_()
        value, m, margin = evaluate(formula, given, numbers | alone, setting, pred, nudges)
        (grad,) = torch.autograd.grad(value.sum(), pred)
        found = {
            "loss": value, "errors": m.err, "ref_errors": m.ref, "drops": m.gap, "margin": margin,
            "grad": grad,
        }  # fmt: skip
        return {name: column.detach().numpy() for name, column in found.items()}

    exact = columns(loss, NO_NUDGE)
    of_sums = of_sums or loss
    here = columns(of_sums, NO_NUDGE)
    moves = {name: np.zeros_like(column) for name, column in here.items()}
    shape = here["errors"].shape
    kinds = ["err", "gap"]
    kinds += ["drift"] if setting.anchor_weight or of_sums is not loss else []
    kinds += ["cross"] if setting.safeguard is not None else []
    for kind in kinds:
        sizes = shape[1:] if kind == "cross" else shape
        for i in range(math.prod(sizes)):
            nudge = torch.zeros(sizes, dtype=torch.float64)
            nudge.view(-1)[i] = _BY
            moved = columns(of_sums, NO_NUDGE._replace(**{kind: nudge}))
            for name, column in moved.items():
                moves[name] += np.abs(column - here[name]) / _BY
    for part in parts:
        moves["grad"] += np.abs(columns(loss, NO_NUDGE, alone=part)["grad"])
    return {name: Truth(exact[name], moves[name]) for name in exact}
