"""What the two kernels can do beyond pairs: sums of a sample, groups, directions of the gradient,
and what a link may know of the batch. Each is shown by a small link of a published loss, whose
formula autograd differentiates in fp64, in one launch each way."""
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastpref_kernels import launch
from fastpref_kernels.knobs import Around
from fastpref_kernels.links import First, Group, Hyper
from fastpref_kernels.special import sigmoids, softplus_and_slope

SHAPE = (3, 700)  # more than a block of 1024 elements, and no multiple of it
HYPER = Hyper()


def mean(elements: Tensor) -> Tensor:
    return elements.flatten(1).mean(1)


class Tensors(NamedTuple):
    """fp64: a prediction a row, its target, the reference or old policy, the anchor, the latent."""

    p: Tensor
    t: Tensor
    r: Tensor
    a: Tensor
    x: Tensor


def draw(rows: int, seed: int, groups: int | None = None) -> Tensors:
    """groups: how many targets there are, where a group shares one."""
    generator = torch.Generator().manual_seed(seed)

    def randn(n: int) -> Tensor:
        return torch.randn(n, *SHAPE, generator=generator)

    t = randn(groups or rows)
    whole = t.repeat_interleave(rows // len(t), 0)
    p = whole + 0.5 * randn(rows)
    r, a = p + 0.1 * randn(rows), p + 0.2 * randn(rows)
    return Tensors(*[each.double() for each in (p, t, r, a, randn(rows))])


class Case(NamedTuple):
    """A link, and what it is: the formula on (tensors, p) with its loss and the metric `score`."""

    link: Group
    scalars: list[float | Tensor]
    tensors: Tensors
    formula: Callable[[Tensors, Tensor], tuple[Tensor, Tensor]]
    ref: bool = False
    more: launch.More = launch.NOTHING_MORE
    anchor: bool = False
    base: bool = False
    mask: Tensor | None = None


# DiffusionNFT: all five sums of one policy, the old one and a reference; three directions ---------


@triton.jit
def _nft(sums, cross, scalars, batch):
    err, gap, _, drift, plus, minus, anchor = sums[0]
    reward, beta, kl = scalars
    w, l = reward / plus, (1.0 - reward) / minus
    loss = w * (err - (1.0 - beta) * gap - beta * (1.0 - beta) * drift)
    loss += l * (err - (1.0 + beta) * gap + beta * (1.0 + beta) * drift) + kl * anchor
    by_err = w * beta - l * beta
    by_drift = l * beta * (1.0 + beta) - w * beta * (1.0 - beta)
    return loss, ((by_err, by_drift, kl + 0.0 * err),), (reward,)


def nft() -> Case:
    beta, kl = 0.3, 0.05
    tensors = draw(5, 0)
    reward = torch.tensor([0.1, 0.9, 0.5, 0.0, 1.0])

    def formula(of: Tensors, p: Tensor) -> tuple[Tensor, Tensor]:
        plus, minus = beta * p + (1 - beta) * of.r - of.t, (1 + beta) * of.r - beta * p - of.t
        rate = reward.double()
        w, l = rate / mean(plus.abs()).detach(), (1 - rate) / mean(minus.abs()).detach()
        loss = w * mean(plus.square()) + l * mean(minus.square())
        return (loss + kl * mean((p - of.a).square())).mean(), rate

    link = Group(
        _nft, {"reward": HYPER, "beta": HYPER, "kl": HYPER}, drift=True, mixed="beta",
    )  # fmt: skip
    return Case(link, [reward, beta, kl], tensors, formula, ref=True, anchor=True)


# Flow-GRPO: a sampler's step, whose log-ratio is the gap with target (x' - a x) / b ---------------


@triton.jit
def _clipped_ratio(sums, cross, scalars, batch):
    _, gap, _ = sums[0]
    advantage, weight, clip = scalars
    ratio = tl.exp(-weight * gap)
    bounded = tl.where(
        ratio > 1.0 + clip, 1.0 + clip, tl.where(ratio < 1.0 - clip, 1.0 - clip, ratio)
    )
    free, held = -advantage * ratio, -advantage * bounded
    slope = tl.where(free >= held, advantage * weight * ratio, 0.0)
    return tl.where(free >= held, free, held), ((slope,),), (ratio,)


def clipped_ratio() -> Case:
    tensors = draw(6, 1)
    generator = torch.Generator().manual_seed(2)
    a, b = (0.5 + torch.rand(6, generator=generator) for _ in range(2))
    advantage = torch.tensor([1.0, -1.0, 0.5, 2.0, -0.3, 0.7])
    weight, clip = 3.0, 0.02

    def formula(of: Tensors, p: Tensor) -> tuple[Tensor, Tensor]:
        target = (of.t - rows(a) * of.x) / rows(b)
        gap = mean((p - target).square()) - mean((of.r - target).square())
        ratio = torch.exp(-weight * gap)
        held = -advantage.double() * ratio.clamp(1 - clip, 1 + clip)
        return torch.maximum(-advantage.double() * ratio, held).mean(), ratio

    link = Group(_clipped_ratio, {"advantage": HYPER, "weight": HYPER, "clip": HYPER})
    more = launch.More(affine=(a, b))
    return Case(
        link, [advantage, weight, clip], tensors, formula, ref=True, more=more, base=True
    )  # fmt: skip


def rows(scalar: Tensor) -> Tensor:
    return scalar.double()[:, None, None]


# KTO: unpaired samples, against the detached mean of the batch ------------------------------------


@triton.jit
def _reward(sums, scalars):
    return -sums[0][1]


@triton.jit
def _kto(sums, cross, scalars, batch):
    label, beta = scalars
    baseline = tl.where(batch > 0.0, batch, 0.0)
    win, lose = sigmoids(label * beta * (-sums[0][1] - baseline))
    return lose, ((win * lose * label * beta,),), (-sums[0][1] - baseline,)


def kto() -> Case:
    label = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, -1.0, 1.0])

    def formula(of: Tensors, p: Tensor) -> tuple[Tensor, Tensor]:
        reward = mean((of.r - of.t).square()) - mean((p - of.t).square())
        over = reward - reward.mean().clamp(min=0).detach()
        return torch.sigmoid(-label.double() * 5 * over).mean(), over

    link = Group(_kto, {"label": HYPER, "beta": HYPER}, first=First(_reward))
    return Case(link, [label, 5.0], draw(7, 3), formula, ref=True)


# RankDPO: lists of three, of different lengths, which share a target ------------------------------


@triton.jit
def _ranked(sums, scores, order, scalars, active):
    """Better ones first, every pair weighing the same."""
    gap = scalars[0] * sums[1]
    lead = gap[:, None, :] - gap[:, :, None]
    ordered = active[:, :, None] & active[:, None, :] & (scores[:, :, None] > scores[:, None, :])
    value, slope = softplus_and_slope(-lead)
    loss = tl.sum(tl.sum(tl.where(ordered, value, 0.0), axis=2), axis=1)
    slope = tl.where(ordered, slope, 0.0)
    first = tl.sum(tl.where(order == 0, sums[1], 0.0), axis=1)
    return loss, (scalars[0] * (tl.sum(slope, axis=2) - tl.sum(slope, axis=1)),), (first,)


def ranked() -> Case:
    beta, lengths = 7.0, [3, 2, 3, 1]

    def formula(of: Tensors, p: Tensor) -> tuple[Tensor, Tensor]:
        t = of.t.repeat_interleave(3, 0)
        gap = (mean((p - t).square()) - mean((of.r - t).square())).view(4, 3)
        loss = [
            sum((F.softplus(beta * (g[i] - g[j])) for j in range(n) for i in range(j)), 0 * g.sum())
            for g, n in zip(gap, lengths, strict=True)
        ]
        return torch.stack(loss).mean(), gap[:, 0]

    more = launch.More(lengths=torch.tensor(lengths))
    link = Group(_ranked, {"beta": HYPER}, {"score": HYPER}, members=3, listed=True)
    scores = torch.tensor([3.0, 2.0, 1.0]).expand(4, 3)
    return Case(link, [beta, scores], draw(12, 4, groups=4), formula, ref=True, more=more)


# DSPO: the winner's squares about a point between policy and reference ----------------------------


@triton.jit
def _dspo(sums, cross, scalars, batch):
    err, gap_w, _, drift = sums[0]
    gap_l, beta = sums[1][1], scalars[0]
    p, rest = sigmoids(0.5 * beta * (gap_w - gap_l))
    c, bend = beta * p, 0.5 * beta * beta * p * rest
    by_c = 2.0 * c * drift - gap_w - drift
    none = 0.0 * err
    loss = err - c * (gap_w + drift) + c * c * drift
    slopes = ((1.0 - c + by_c * bend, c * c - c), (-by_c * bend, none))
    return loss, slopes, (gap_l - gap_w,)


def dspo() -> Case:
    beta = 4.0

    def formula(of: Tensors, p: Tensor) -> tuple[Tensor, Tensor]:
        t = of.t.repeat(2, 1, 1)
        gap_w, gap_l = (mean((p - t).square()) - mean((of.r - t).square())).chunk(2)
        c = beta * torch.sigmoid(0.5 * beta * (gap_w - gap_l))
        loss = mean(((p - t)[:3] - c[:, None, None] * (p - of.r)[:3]).square())
        return loss.mean(), gap_l - gap_w

    tensors = draw(6, 5, groups=3)
    tensors = tensors._replace(p=tensors.p[[0, 2, 4, 1, 3, 5]], r=tensors.r[[0, 2, 4, 1, 3, 5]])
    link = Group(_dspo, {"beta": HYPER}, members=2, drift=True)
    return Case(link, [beta], tensors, formula, ref=True)


# The cross sum of a pair, and a prediction that the pair shares -----------------------------------


@triton.jit
def _guarded(sums, cross, scalars, batch):
    """A loser that pulls less where its gradient points the winner's way; the factor detached."""
    w, l = sums[0][0], sums[1][0]
    factor = tl.where(cross > 0.0, scalars[0] * w / tl.where(cross > 0.0, cross, 1.0), 1.0)
    return w - factor * l, ((1.0 + 0.0 * w,), (-factor,)), (factor,)


def guarded() -> Case:
    def formula(of: Tensors, p: Tensor) -> tuple[Tensor, Tensor]:
        off = p - of.t
        w, l = mean(off[:3].square()), mean(off[3:].square())
        cross = mean(off[:3] * off[3:]).detach()
        factor = torch.where(cross > 0, 0.7 * w / cross, 1.0).detach()
        return (w - factor * l).mean(), factor

    tensors = draw(6, 6)
    p = tensors.p.clone()
    p[3:5] = tensors.t[3:5] + 0.8 * (p[:2] - tensors.t[:2])
    link = Group(_guarded, {"mu": HYPER}, members=2, cross=True)
    return Case(link, [0.7], tensors._replace(p=p), formula)


@triton.jit
def _between(sums, cross, scalars, batch):
    """softplus of how much nearer one prediction is to a winner than to a loser."""
    value, slope = softplus_and_slope(scalars[0] * (sums[0][0] - sums[1][0]))
    slope = scalars[0] * slope
    return value, ((slope,), (-slope,)), (sums[1][0] - sums[0][0],)


def shared_prediction() -> Case:
    def formula(of: Tensors, p: Tensor) -> tuple[Tensor, Tensor]:
        w, l = mean((p - of.t[:4]).square()), mean((p - of.t[4:]).square())
        return F.softplus(3 * (w - l)).mean(), l - w

    tensors = draw(8, 7)
    link = Group(_between, {"beta": HYPER}, members=2)
    more = launch.More(n_groups=4)
    return Case(link, [3.0], tensors._replace(p=tensors.p[:4]), formula, more=more)


# Distribution-shift robustness: the log-mean-exp of the batch -------------------------------------


@triton.jit
def _dpo(sums, cross, scalars, batch):
    value, slope = softplus_and_slope(scalars[0] * (sums[0][1] - sums[1][1]))
    slope = scalars[0] * slope
    return value, ((slope,), (-slope,)), (value,)


def robust() -> Case:
    beta, heat, n = 6.0, 0.4, 6
    share = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0, 0.3])

    def formula(of: Tensors, p: Tensor) -> tuple[Tensor, Tensor]:
        gap_w, gap_l = (mean((p - of.t).square()) - mean((of.r - of.t).square())).chunk(2)
        each = F.softplus(beta * (gap_w - gap_l))
        return heat * torch.log(torch.exp(share.double() * each / heat).mean()), each

    link = Group(_dpo, {"beta": HYPER}, members=2)
    more = launch.More(around=Around(weight=share, heat=heat))
    return Case(link, [beta], draw(2 * n, 8), formula, ref=True, more=more)


CASES = [nft, clipped_ratio, kto, ranked, dspo, guarded, shared_prediction, robust]


def launched(
    case: Case, given: Tensors, grad_loss: Tensor
) -> tuple[Tensor, Tensor, launch.Operand]:
    """Loss, stats and gradient, by the two launches of a training step."""
    device = given.p.device
    more = case.more._replace(
        anchor=(given.a, None) if case.anchor else launch.ABSENT,
        base=(given.x, None) if case.base else launch.ABSENT,
        lengths=None if case.more.lengths is None else case.more.lengths.to(device),
        affine=tuple(moved(each, device) for each in case.more.affine),
        around=Around(None, *[moved(each, device) for each in case.more.around[1:]]),
    )
    ref: launch.Operand = (given.r, None) if case.ref else launch.ABSENT
    scalars = [moved(each, device) for each in case.scalars]
    pred, target = (given.p, None), (given.t, None)
    loss, stats = launch.pair_forward(case.link, scalars, pred, target, ref, more=more)
    of_drift = ref if case.link.drift else launch.ABSENT
    grad = launch.pair_backward(
        grad_loss, stats, pred, target, link=case.link, ref=of_drift, more=more
    )  # fmt: skip
    return loss, stats, grad


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_a_link_on_other_sums_and_groups(
    make: Callable[[], Case], dtype: torch.dtype, device: torch.device,
    launches: list[Any],
) -> None:  # fmt: skip
    case = make()
    given = Tensors(*[each.to(device, dtype) for each in case.tensors])
    exact = Tensors(*[each.double().cpu() for each in given])
    p = exact.p.clone().requires_grad_()
    wanted, score = case.formula(exact, p)
    (wanted_grad,) = torch.autograd.grad(wanted, p)

    loss, stats, (grad, _) = launched(case, given, torch.tensor(2.0, device=device))
    assert len(launches) == 2
    assert grad is not None
    assert stats.isfinite().all()  # every row was written
    directions = 1 + case.link.drift + case.anchor
    shown = stats[stats.shape[0] - case.link.members * directions - 1]
    torch.testing.assert_close(loss.double().cpu(), wanted.detach(), rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(shown.double().cpu(), score.detach(), rtol=2e-5, atol=1e-5)
    rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 2e-5
    torch.testing.assert_close(
        grad.double().cpu(), 2 * wanted_grad,
        rtol=rounding, atol=rounding * 2 * wanted_grad.abs().max().item(),
    )  # fmt: skip


def moved(scalar: Any, device: torch.device) -> Any:
    return scalar.to(device) if isinstance(scalar, Tensor) else scalar
