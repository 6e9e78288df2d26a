"""Losses on a sampler's steps and DiffusionNFT's: each is its published formula, fused and eager,
with every knob; and what holds of them besides."""
# mypy: disable-error-code="arg-type, index, misc, operator, union-attr"

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastpref
import oracles_steps as oracles
from fastpref.transitions import (
    Transition,
    cps,
    dance_sde,
    ddim,
    euler_ancestral,
    flow_sde,
    lcm,
)
from fastpref_kernels import launch
from fastpref_kernels import steps as links
from fastpref_kernels.links import Group
from oracles import Truth, assert_three_way
from oracles_beyond import reduced

pytestmark = pytest.mark.usefixtures("poisoned")
each_impl = pytest.mark.parametrize("impl", ["triton", "torch"])

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
CPU = torch.device("cpu")
SAMPLE = (4, 5, 7)
SINGLES, PAIRS = 5, 3
SIGMAS = torch.linspace(1, 0, 11)
ANCESTRAL = torch.tensor([14.6, 7.0, 4.0, 2.5, 1.5, 0.9, 0.5, 0.2])
RISING = torch.tensor([0.004, 0.05, 0.15, 0.3, 0.5, 0.8, 0.9, 0.99])
SAMPLERS: dict[str, tuple[Any, Tensor]] = {
    "flow_sde": (flow_sde, SIGMAS), "dance_sde": (dance_sde, SIGMAS), "cps": (cps, SIGMAS),
    "ddim": (ddim, RISING), "euler_ancestral": (euler_ancestral, ANCESTRAL), "lcm": (lcm, RISING),
}  # fmt: skip
ADVANTAGE = torch.tensor([1.0, -1.3, 0.5, -7.0, 0.0])
TWO = torch.tensor([0.7, -9.0, 0.2, -0.4, 1.5, 0.2])  # of pairs, one of which is a tie


class Case(NamedTuple):
    """A public function with options, its formula, and the numbers that both take."""

    function: str
    loss: Callable[..., oracles.Found]
    numbers: dict[str, Any]
    options: dict[str, Any] = {}
    anchored: bool = False
    pairs: bool = False
    shared: bool = False
    """Whether a pair shares x and its prediction."""

    @property
    def groups(self) -> int:
        return PAIRS if self.pairs else SINGLES

    @property
    def rows(self) -> int:
        return 2 * PAIRS if self.pairs else SINGLES

    @property
    def other(self) -> str:
        """The name of the other policy's predictions."""
        return "ref_pred" if self.function == "step_dpo_loss" else "old_pred"


def grpo(loss: Any, kl: str = "", variant: str = "clip", **numbers: Any) -> Case:
    options = ({"kl": kl} if kl else {}) | ({"variant": variant} if variant != "clip" else {})
    more = {"kl_weight": 0.04} if kl else {}
    return Case("grpo_loss", loss, {"advantage": ADVANTAGE, **more, **numbers}, options, bool(kl))


def with_kl(loss: Callable[..., oracles.Found]) -> Callable[..., oracles.Found]:
    """v-based, which the codes have no other than in their own variants."""

    def anchored(step: oracles.Step, pred: Tensor, old: Any, log_prob: Any, ref: Tensor,
                 kl_weight: float, **numbers: Any) -> oracles.Found:  # fmt: skip
        found = loss(step, pred, old, log_prob, ref, **numbers)
        kl = oracles.mean((pred - ref).square(), step.mask)
        return found._replace(losses=found.losses + kl_weight * kl, kl=kl)

    return anchored


BOTH = {"clip_range": 1e-4, "clip_range_high": 3e-4}
SINGLE: dict[str, Case] = {
    "flow_grpo": grpo(oracles.flow_grpo, clip_range=1e-4),
    "dance": grpo(oracles.flow_grpo, clip_range=torch.tensor([1e-4, 1e-3, 1e-5, 1e-4, 1e-4])),
    "published": grpo(oracles.flow_grpo, "published", clip_range=1e-4),
    **{k: grpo(oracles.flow_factory(k), k, **BOTH) for k in ("x", "v", "gaussian")},
    "guard": grpo(oracles.guard_of_each, variant="guard", clip_range=2e-6),
    "guard_wide": grpo(oracles.guard_of_each, variant="guard", clip_range=1e-3),
    "guard_kl": grpo(with_kl(oracles.guard_of_each), "v", "guard", clip_range=2e-5),
    "dppo": grpo(oracles.flow_dppo, variant="dppo", divergence_limit=1e-5),
    "dppo_kl": grpo(with_kl(oracles.flow_dppo), "v", "dppo", divergence_limit=1e-4),
}


def dpo(beta: Any, clip: float | None = 0.1, shared: bool = False) -> Case:
    numbers = {"beta": beta, "clip": clip}
    return Case("step_dpo_loss", oracles.step_dpo, numbers, pairs=True, shared=shared)


PAIRED: dict[str, Case] = {
    "d3po": dpo(0.1), "spo": dpo(10.0, shared=True), "lpo": dpo(500.0, shared=True),
    "pso": dpo(50.0), "tailor": dpo(10.0, None, shared=True),
    "each": dpo(torch.tensor([0.1, 10.0, 500.0])),
    "sdpo": Case("sdpo_loss", oracles.sdpo, {"advantage": TWO, "step_weight": 0.97}, pairs=True),
    "sdpo_near": Case(
        "sdpo_loss", oracles.sdpo,
        {"advantage": 1e-5 * TWO, "step_weight": 1.0, "clip_range": 2e-4, "advantage_clip": 5e-5},
        pairs=True, shared=True,
    ),
}  # fmt: skip
CASES = SINGLE | PAIRED
ONE_EACH = ("published", "guard_kl", "dppo_kl", "spo", "sdpo_near")
OF_LOG = ("flow_grpo", "published", "v", "pso", "tailor", "sdpo", "sdpo_near")


class Given(NamedTuple):
    """The tensors of a call, stacked; log_prob in place of other, where it is there."""

    pred: Tensor
    other: Tensor | None
    x: Tensor
    x_next: Tensor
    transition: Transition
    anchor: Tensor | None = None
    log_prob: Tensor | None = None
    mask: Tensor | None = None


class Setting(NamedTuple):
    """How a loss is called, besides its own numbers."""

    weight: Any = 1.0
    reduction: str = "mean"
    dro_temperature: float = 1.0


def steps_of(sampler: str, step: Any, device: torch.device = CPU) -> Transition:
    build, schedule = SAMPLERS[sampler]
    made: Transition = build(schedule, step)
    return made.to(device)


def draw(
    case: Case,
    device: torch.device,
    *,
    drift: float = 0.01,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (FP32, FP32, FP32),
    sample: tuple[int, ...] = SAMPLE,
    sampler: str = "flow_sde",
    numbers: str = "each",
    shared: str | None = None,
) -> Given:
    """dtypes: of predictions, latents, and the others' predictions. numbers: a transition's, for
    "each" row, each "pair", or "all". shared: which of p, r and x a pair shares."""
    generator = torch.Generator().manual_seed(1)
    of_pred, of_x, of_other = dtypes
    rows = case.rows
    shared = ("prx" if case.shared else "") if shared is None else shared

    def randn(name: str) -> Tensor:
        n = case.groups if name in shared else rows
        return torch.randn(n, *sample, generator=generator)

    n = {"each": rows, "pair": case.groups, "all": 0}[numbers]
    of_step = steps_of(sampler, torch.arange(n) % 6 + 1 if n else 2)
    x, old, moved = randn("x").to(of_x), randn("r").to(of_other), randn("p")
    whole_x, whole_old = (t if len(t) == rows else torch.cat([t, t]) for t in (x, old))
    of_row = of_step if n != case.groups or rows == n else of_step.select([*range(n), *range(n)])
    x_next = of_row.sample(whole_x, whole_old.float(), generator)
    of = old if len(moved) == len(old) else old[: len(moved)] if len(moved) < rows else whole_old
    pred = of.float() + drift * moved
    anchor = (pred + 0.05 * randn("p")).to(device, of_other) if case.anchored else None
    return Given(
        pred.to(device, of_pred), old.to(device), x.to(device), x_next.to(device),
        of_step.to(device), anchor,
    )  # fmt: skip


def stored(given: Given, dtype: torch.dtype = FP32) -> Given:
    """With log-probabilities in place of the other's predictions."""
    rows = len(given.x_next)
    x, other = (t if len(t) == rows else torch.cat([t, t]) for t in (given.x, given.other))
    of_step = given.transition
    if len(of_step.std.view(-1)) not in (1, rows):
        of_step = of_step.select([*range(rows // 2)] * 2)
    log_prob = of_step.log_prob(x.double(), other.double(), given.x_next.double())
    return given._replace(other=None, log_prob=log_prob.to(dtype))


class Called(NamedTuple):
    out: Any
    grad: Tensor


def on(device: torch.device, numbers: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in numbers.items()}


def arguments(case: Case, given: Given, setting: Setting = Setting()) -> dict[str, Any]:
    """All but model_pred."""
    found: dict[str, Any] = {
        case.other: given.other, "x": given.x, "x_next": given.x_next,
        "transition": given.transition, **case.numbers, **case.options,
    }  # fmt: skip
    if given.log_prob is not None:
        found[case.other.replace("pred", "log_prob")] = given.log_prob
    if given.anchor is not None:
        found["ref_pred"] = given.anchor
    if given.mask is not None:
        found["mask"] = given.mask
    if isinstance(setting.weight, Tensor) or setting.weight != 1.0:
        found["pair_weight" if case.pairs else "sample_weight"] = setting.weight
    if setting.reduction != "mean":
        found["reduction"] = setting.reduction
    if setting.dro_temperature != 1.0:
        found["dro_temperature"] = setting.dro_temperature
    return on(given.x_next.device, found)


def call(
    case: Case, given: Given, impl: str, setting: Setting = Setting(), **more: Any
) -> Called:
    pred = given.pred.detach().requires_grad_()
    out = getattr(fastpref, case.function)(
        pred, **{**arguments(case, given, setting), **more}, impl=impl
    )
    (grad,) = torch.autograd.grad(out.loss.sum(), pred, materialize_grads=True)
    return Called(out, grad)


def formula(
    case: Case, given: Given, setting: Setting = Setting()
) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    """As `oracles.truths` evaluates it. Nudged are each row's log-ratio, by the size of what it is
    summed from, and x_next; and the KL."""
    rows, groups = len(given.x_next), case.groups

    def whole(t: Tensor) -> Tensor:
        t = t.double().cpu().flatten(1)
        return t if len(t) == rows else torch.cat([t, t])

    def number(n: Any) -> Tensor:
        n = torch.as_tensor(n).double().cpu()
        return (n.expand(rows) if n.dim() == 0 else n if len(n) == rows else n.repeat(2))[:, None]

    x, x_next = whole(given.x), whole(given.x_next)
    a, b, std, dt, weight = (number(n) for n in given.transition[:5])
    w = (weight * b**2)[:, 0]
    mask = None
    if given.mask is not None:
        mask = given.mask.double().cpu().expand(-1, *given.x_next.shape[1:])
        mask = whole(mask)
    latents = x_next.abs() + (a * x).abs()
    other = None if given.other is None else whole(given.other)
    anchor = None if given.anchor is None else whole(given.anchor)
    numbers = on(CPU, case.numbers)
    numbers = {k: v.double() if isinstance(v, Tensor) else v for k, v in numbers.items()}

    def step_of(nudges: Tensor) -> oracles.Step:
        moved = x_next + nudges[rows : 2 * rows, None] * latents
        return oracles.Step(x, moved, a, b, std, dt, not given.transition.normalized, mask)

    def halves(step: oracles.Step) -> tuple[oracles.Step, oracles.Step]:
        fields = [f.chunk(2) if isinstance(f, Tensor) else (f, f) for f in step]
        return oracles.Step(*(f[0] for f in fields)), oracles.Step(*(f[1] for f in fields))

    def sizes(p: Tensor) -> Tensor:
        """Of the terms of a log-ratio."""
        off, inside = (x_next - a * x) / b - p, 2 * latents / b.abs()
        if other is None:
            each = w * oracles.mean(off**2 + off.abs() * inside, mask)
            return each + std.log().abs()[:, 0] + 1 + given.log_prob.double().cpu().abs()
        d = (p - other).abs()
        each = d * (2 * off.abs() + d + inside)
        return oracles.mean(w[:, None] * each + (b * d / std) ** 2, mask)

    def evaluate(pred: Tensor, nudges: Tensor) -> dict[str, Tensor]:
        p, step = whole(pred), step_of(nudges)
        if other is None:
            log_prob = given.log_prob.double().cpu()
        else:
            log_prob = oracles.log_prob(step, other)
        log_prob = log_prob - nudges[:rows] * sizes(p.detach())
        if case.pairs:
            found = case.loss(halves(step), p.chunk(2), log_prob.chunk(2), **numbers)
        else:
            found = case.loss(step, p, other, log_prob, anchor, **numbers)
        losses, kl = found.losses, found.kl
        if kl is not None:
            losses = losses + nudges[-1] * numbers["kl_weight"] * kl
            kl = kl * (1 + nudges[-1])
        of_group = torch.as_tensor(setting.weight).double().cpu()
        assert len(losses) == groups
        losses = torch.where(of_group == 0, 0.0, of_group * losses)
        loss = reduced(losses, setting.reduction, setting.dro_temperature)
        rest = {**found._asdict(), "kl": kl}
        del rest["losses"]
        return {"loss": loss, **{k: v for k, v in rest.items() if v is not None}}

    return evaluate


def truth(case: Case, given: Given, setting: Setting = Setting()) -> dict[str, Truth]:
    return oracles.truths(
        formula(case, given, setting), given.pred, 2 * len(given.x_next) + case.anchored
    )


def check(case: Case, given: Given, setting: Setting = Setting()) -> dict[str, Called]:
    """Eager PyTorch and the kernels against the oracle; what each of them found."""
    wanted = truth(case, given, setting)
    found = {impl: call(case, given, impl, setting) for impl in ("torch", "triton")}
    for name, exact in wanted.items():
        plain, fused = (
            each.grad if name == "grad" else getattr(each.out, name) for each in found.values()
        )
        assert plain.dtype == (given.pred.dtype if name == "grad" else FP32)
        assert plain.shape == fused.shape == exact.value.reshape(plain.shape).shape
        exact = Truth(*(each.reshape(plain.shape) for each in exact))
        assert_three_way(name, fused, plain, exact)
    for each in found.values():
        assert isinstance(each.out, fastpref.StepOutput)
        assert {k for k, v in each.out._asdict().items() if v is not None} | {"grad"} == {*wanted}
    return found


# Every loss against its formula -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "drift"),
    [(name, 0.01) for name in CASES]
    + [(name, 1e-4) for name in ONE_EACH]
    + [(name, 1.5) for name in ("dance", "guard_wide", "dppo", "d3po", "lpo", "tailor", "sdpo")],
)
def test_every_loss_is_its_formula(name: str, drift: float, device: torch.device) -> None:
    """For a policy that is hardly off the other, and for one that is far from it."""
    found = check(CASES[name], draw(CASES[name], device, drift=drift))
    if (name, drift) in (("dance", 0.01), ("dppo", 1.5), ("d3po", 1.5), ("sdpo_near", 0.01)):
        assert 0 < found["torch"].out.clipped.mean() < 1  # both arms were there


@pytest.mark.parametrize("name", ["published", "guard", "spo", "sdpo"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers(sampler: str, name: str, device: torch.device) -> None:
    check(CASES[name], draw(CASES[name], device, sampler=sampler))
