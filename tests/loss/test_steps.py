"""Losses on a sampler's steps and DiffusionNFT's: each is its published formula, fused and eager,
with every knob; and what holds of them besides."""
# mypy: disable-error-code="arg-type, index, misc, operator, union-attr"

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import covering
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
    options: dict[str, Any] = {}  # noqa: RUF012
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


PLAIN = Setting()


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
    x, other = given.x, given.other
    assert other is not None
    x, other = (t if len(t) == rows else torch.cat([t, t]) for t in (x, other))
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


def arguments(case: Case, given: Given, setting: Setting = PLAIN) -> dict[str, Any]:
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


def call(case: Case, given: Given, impl: str, setting: Setting = PLAIN, **more: Any) -> Called:
    pred = given.pred.detach().requires_grad_()
    out = getattr(fastpref, case.function)(
        pred, **{**arguments(case, given, setting), **more}, impl=impl
    )
    (grad,) = torch.autograd.grad(out.loss.sum(), pred, materialize_grads=True)
    return Called(out, grad)


def formula(
    case: Case, given: Given, setting: Setting = PLAIN
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
        of_other = given.log_prob.double().cpu() if other is None else oracles.log_prob(step, other)
        log_prob = of_other - nudges[:rows] * sizes(p.detach())
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


def truth(case: Case, given: Given, setting: Setting = PLAIN) -> dict[str, Truth]:
    return oracles.truths(
        formula(case, given, setting), given.pred, 2 * len(given.x_next) + case.anchored
    )


def check(case: Case, given: Given, setting: Setting = PLAIN) -> dict[str, Called]:
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


@pytest.mark.parametrize("name", ["published", "guard", "sdpo"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers(sampler: str, name: str, device: torch.device) -> None:
    check(CASES[name], draw(CASES[name], device, sampler=sampler))


DTYPES = [
    (BF16, BF16, BF16), (FP16, FP16, FP16), (FP32, BF16, FP32), (BF16, FP32, FP16),
    (FP16, FP16, BF16),
]  # fmt: skip


@pytest.mark.parametrize("name", ["published", "guard_kl", "pso", "sdpo_near"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t)[6:] for t in d))
def test_dtypes(name: str, dtypes: Any, device: torch.device) -> None:
    check(CASES[name], draw(CASES[name], device, dtypes=dtypes))


@pytest.mark.parametrize("name", ["dppo_kl", "spo"])
@pytest.mark.parametrize("sample", [(1,), (3,), (1025,), (2, 3, 4, 5), (1, 1, 1, 1)], ids=str)
def test_shapes(name: str, sample: tuple[int, ...], device: torch.device) -> None:
    """One element, more than a block of the kernels, and video."""
    check(CASES[name], draw(CASES[name], device, sample=sample))


@pytest.mark.parametrize(
    ("name", "numbers"),
    [("guard_kl", "all"), ("published", "all")]
    + [(name, numbers) for name in ("pso", "sdpo_near") for numbers in ("pair", "all")],
)
def test_transitions_of_all_of_pairs_and_of_each(
    name: str, numbers: str, device: torch.device
) -> None:
    check(CASES[name], draw(CASES[name], device, numbers=numbers))


@pytest.mark.parametrize("name", ["pso", "sdpo_near"])
@pytest.mark.parametrize("shared", ["p", "r", "x", "pr", "rx"])
def test_what_pairs_share(name: str, shared: str, device: torch.device) -> None:
    check(CASES[name]._replace(shared=False), draw(CASES[name], device, shared=shared))


@pytest.mark.parametrize("name", OF_LOG)
@pytest.mark.parametrize("sampler", ["flow_sde", "cps"])
def test_stored_log_probabilities(name: str, sampler: str, device: torch.device) -> None:
    """With the normaliser, and without."""
    check(CASES[name], stored(draw(CASES[name], device, sampler=sampler)))


@pytest.mark.parametrize("name", OF_LOG)
def test_stored_log_probabilities_say_what_predictions_do(name: str, device: torch.device) -> None:
    """As precisely as fp32 holds a log-probability."""
    case = CASES[name]
    for sampler in ("ddim", "cps"):
        given = draw(case, device, drift=0.3, sampler=sampler)
        plain, other = (call(case, each, "torch").out for each in (given, stored(given)))
        torch.testing.assert_close(other.log_ratio, plain.log_ratio, rtol=1e-5, atol=1e-6)


def weights(case: Case) -> Tensor:
    found = torch.linspace(0.5, 2.0, case.groups)
    found[1] = 0.0
    return found


def hiding(rows: int, device: torch.device, channels: int = 1) -> Tensor:
    mask = torch.rand(rows, channels, *SAMPLE[1:], generator=torch.Generator().manual_seed(0))
    mask[1] = 0.0
    return mask.to(device)


SETTINGS = {
    "none": Setting(reduction="none"),
    "sum": Setting(reduction="sum"),
    "dro": Setting(reduction="dro", dro_temperature=0.3),
    "weight of all": Setting(weight=0.3),
    "weights": Setting(weight=weights, reduction="none"),
    "weights, dro": Setting(weight=weights, reduction="dro"),
}


@pytest.mark.parametrize("name", ["published", "guard_kl", "spo"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_reductions_and_weights(name: str, setting: str, device: torch.device) -> None:
    case, how = CASES[name], SETTINGS[setting]
    if callable(how.weight):
        how = how._replace(weight=weights(case).to(device))
    check(case, draw(case, device), how)


@pytest.mark.parametrize("kind", ["bool", "float", "of elements"])
@pytest.mark.parametrize("name", ["published", "guard_kl", "pso", "spo"])
def test_masks(name: str, kind: str, device: torch.device) -> None:
    """Whose numbers weigh elements; samples that are hidden whole are 0."""
    case = CASES[name]
    given = draw(case, device)
    shared = case.shared or (case.pairs and kind == "float")
    mask = hiding(case.groups if shared else case.rows, device, 4 if kind == "of elements" else 1)
    check(case, given._replace(mask=mask > 0.4 if kind == "bool" else mask))


@pytest.mark.parametrize("how", [
    f"{what}{by}" for what in ("weight", "mask") for by in (" with a graph", " with func", "")
])  # fmt: skip
@each_impl
@pytest.mark.parametrize(
    ("name", "value"), [(name, math.nan) for name in ("published", "guard_kl", "dppo", "sdpo")]
    + [("dppo_kl", math.inf), ("spo", math.inf)],
)  # fmt: skip
def test_what_counts_not_may_be_anything(
    name: str, how: str, value: float, impl: str, device: torch.device
) -> None:
    """A sample or a pair of weight 0, and what a mask hides; where autograd has the graph, too."""
    if impl == "triton" and ("with" in how or value == math.inf):
        pytest.skip("kernels have no graph, and the interpreter takes long")
    case = CASES[name]._replace(shared=False)
    mask = hiding(case.rows, device, SAMPLE[0]) > 0.4
    setting, given = Setting(), draw(case, device)
    if how.startswith("weight"):
        mask = torch.arange(case.rows, device=device) % case.groups != 1
        setting = Setting(weight=weights(case))
        mask = mask.view(-1, 1, 1, 1).expand_as(given.pred)
    else:
        given = given._replace(mask=mask)
    fields = ("pred", "other", "x", "x_next", *(["anchor"] if case.anchored else []))
    spoiled = given._replace(
        **{name: torch.where(mask, getattr(given, name), value) for name in fields}
    )

    def found(given: Given) -> tuple[Tensor, Tensor]:
        pred = given.pred.detach().requires_grad_()
        options = arguments(case, given, setting)

        def loss_of(pred: Tensor) -> Tensor:
            return getattr(fastpref, case.function)(pred, **options, impl=impl).loss

        if "func" in how:
            grad, value = torch.func.grad_and_value(loss_of)(pred.detach())
            return value, grad
        loss = loss_of(pred)
        (grad,) = torch.autograd.grad(loss, pred, create_graph="graph" in how)
        return loss.detach(), grad.detach()

    clean, got = found(given), found(spoiled)
    assert torch.equal(got[0], clean[0])
    assert torch.equal(got[1], clean[1])
    assert (got[1][~mask] == 0).all()
    assert got[1].any()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "sliced": lambda t: torch.cat([t, t], dim=-1)[..., : t.shape[-1]],
    "every other row": lambda t: t.repeat_interleave(2, 0)[::2],
}


@pytest.mark.parametrize("far", ["pred", "old", "x", "x_next"])
def test_offsets_beyond_32_bits(far: str, device: torch.device) -> None:
    """Rows 2^31 elements apart, as those of stacked trajectories may be, in memory that is never
    touched."""
    drawn = torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(0)).to(device, BF16)
    tensors = dict(zip(("pred", "old", "x", "x_next"), drawn, strict=True))
    big = torch.empty_strided((2, 5), (2**31 + 32, 1), dtype=BF16, device=device)
    results = []
    for given in (tensors, tensors | {far: big.copy_(tensors[far])}):
        pred = given["pred"].requires_grad_()
        step = steps_of("flow_sde", torch.tensor([2, 5]), device)
        advantage = torch.tensor([1.0, -0.5], device=device)
        out = fastpref.grpo_loss(
            pred, given["old"], given["x"], given["x_next"], step, advantage, impl="triton"
        )
        results.append((out.loss, *torch.autograd.grad(out.loss, pred)))
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got, wanted)


@each_impl
@pytest.mark.parametrize("name", ["guard_kl", "spo"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(name: str, layout: str, impl: str, device: torch.device) -> None:
    """Of some operands, and of all."""
    case, move = CASES[name], LAYOUTS[layout]
    given = draw(case, device)
    dense = call(case, given, impl)
    for fields in (("pred", "x"), ("pred", "other", "x", "x_next", "anchor")):
        moved = {f: move(t) for f in fields if (t := getattr(given, f)) is not None}
        got = call(case, given._replace(**moved), impl)
        torch.testing.assert_close(got.out.loss, dense.out.loss, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(got.out.log_ratio, dense.out.log_ratio, rtol=1e-4, atol=1e-8)
        scale = dense.grad.abs().max().item()
        torch.testing.assert_close(got.grad, dense.grad, rtol=1e-4, atol=1e-6 * scale)


@each_impl
def test_one_latent_for_all(impl: str, device: torch.device) -> None:
    """Expanded, as a group's first latent is."""
    for name in ("guard_kl", "pso"):
        case = CASES[name]
        given = draw(case, device)
        one = given._replace(x=given.x[:1].expand_as(given.x))
        got, wanted = (call(case, each, impl) for each in (one, one._replace(x=one.x.clone())))
        torch.testing.assert_close(got.out.loss, wanted.out.loss, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-4, atol=1e-7)


def test_sample_by_sample_where_tensors_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpref import reference

    for name in ("guard_kl", "pso", "spo"):
        given = draw(CASES[name], CPU)
        wanted = call(CASES[name], given, "torch")
        with monkeypatch.context() as patch:
            patch.setattr(reference, "LARGE", 8)
            got = call(CASES[name], given, "torch")
        torch.testing.assert_close(got.out, wanted.out, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-5, atol=1e-8)


EVERY = {"model_pred", "x", "x_next", "other", "mask"}
HALVES = [{"x_next"}, {"model_pred", "x"}, {"other"}, EVERY]


@each_impl
@pytest.mark.parametrize("name", ["pso", "sdpo", "spo"])
def test_tuples_are_as_good_as_stacks(name: str, impl: str, device: torch.device) -> None:
    """In all mixes, with all numbers of transitions, and stored log-probabilities."""
    case = CASES[name]
    masked = draw(case, device, drift=1.0)._replace(mask=hiding(case.rows, device))
    for given in (masked, stored(draw(case, device, drift=1.0, numbers="pair"))):
        stacked = call(case, given, impl)
        for split in HALVES:
            options = arguments(case, given)
            pred = given.pred.detach()
            leaves = [pred.requires_grad_()]
            if "model_pred" in split and len(pred) == case.rows:
                leaves = [half.detach().requires_grad_() for half in pred.chunk(2)]
            names = {case.other, case.other.replace("pred", "log_prob")} & options.keys()
            for key in (split | names if "other" in split else split) & options.keys():
                if options[key] is not None and len(options[key]) == case.rows:
                    options[key] = options[key].chunk(2)
            out = getattr(fastpref, case.function)(
                tuple(leaves) if len(leaves) == 2 else leaves[0], **options, impl=impl
            )
            grad = torch.cat(torch.autograd.grad(out.loss, leaves))
            torch.testing.assert_close(out.loss, stacked.out.loss, rtol=1e-5, atol=1e-8)
            torch.testing.assert_close(out[1:3], stacked.out[1:3], rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(out.margin, stacked.out.margin, rtol=1e-4, atol=1e-5)
            scale = stacked.grad.abs().max().item()
            torch.testing.assert_close(grad, stacked.grad, rtol=1e-4, atol=1e-6 * scale)


@pytest.mark.parametrize("name", [*CASES, "stored"])
def test_formulas_in_fp64(name: str) -> None:
    """With a transition in fp64, as in a gradient check."""
    case = CASES["v" if name == "stored" else name]
    given = draw(case, CPU, dtypes=(FP64, FP64, FP64), drift=0.3)
    a, b, std, dt, _ = (n.double() for n in given.transition[:5])
    given = given._replace(transition=Transition(a, b, std, dt, 0.5 / std**2))
    given = stored(given, FP64) if name == "stored" else given
    got = call(case, given, "torch")
    for key, exact in truth(case, given).items():
        value = got.grad if key == "grad" else getattr(got.out, key)
        wanted = torch.as_tensor(exact.value).view(value.shape)
        torch.testing.assert_close(value.detach(), wanted, rtol=1e-9, atol=1e-12)


# The first update after a rollout -----------------------------------------------------------------


# Each dtype with each implementation, of which a sampler knows nothing.
@each_impl
@pytest.mark.parametrize(
    ("sampler", "dtype"),
    covering.product(
        [*SAMPLERS],
        [FP32, BF16, FP16],
        fast=covering.in_turn([*SAMPLERS], [FP32, BF16, FP16]),
        ids=lambda sampler, dtype: f"{sampler}-{str(dtype)[6:]}",
    ),
)
def test_the_first_update_has_a_ratio_of_exactly_1(
    sampler: str, dtype: torch.dtype, impl: str, device: torch.device
) -> None:
    """And the gradient that is known: the noise that was drawn, times a constant."""
    for name in ("flow_grpo", "guard", "dppo", "pso", "sdpo"):
        if impl == "triton" and (dtype, name) not in {
            (FP32, "flow_grpo"), (BF16, "guard"), (BF16, "pso"), (FP16, "dppo"), (FP16, "sdpo")
        }:  # fmt: skip
            continue
        case = CASES[name]
        given = draw(case, device, drift=0.0, dtypes=(dtype,) * 3, sampler=sampler)
        got = call(case, given, impl)
        metrics = got.out.metrics()
        assert (metrics["ratio"], metrics["ratio_off"], metrics["approx_kl"]) == (1, 0, 0)
        assert not got.out.log_ratio.signbit().any()  # no -0 that somebody prints
        assert not got.out.clipped.any()
        assert got.out.margin is None or not got.out.margin.any()
        a, b, std, dt, weight = (n.double().cpu().view(-1, 1, 1, 1) for n in given.transition[:5])
        pred, x, x_next = (t.double().cpu() for t in (given.pred, given.x, given.x_next))
        by_log = 2 * weight * b * (x_next - a * x - b * pred) / pred[0].numel()  # of one row
        slope = -ADVANTAGE.double() if name == "dppo" else -ADVANTAGE.double().clamp(-5, 5)
        if name == "guard":
            slope = slope * (std / dt).flatten()
        if name == "pso":
            slope = torch.tensor([-25.0, 25.0], dtype=FP64).repeat_interleave(3)
        if name == "sdpo":
            first, second = TWO.double().clamp(-5, 5).chunk(2)
            slope = -2 * 0.97 * torch.cat([first - second, second - first])
        wanted = slope.view(-1, 1, 1, 1) * by_log / case.groups
        scale = wanted.abs().max().item()
        rounding = max(torch.finfo(dtype).eps, 1e-6) * scale + torch.finfo(dtype).tiny
        close = {"rtol": 1e-5, "atol": rounding}
        torch.testing.assert_close(got.grad.double().cpu(), wanted, **close)


@each_impl
@pytest.mark.parametrize("drift", [1e-2, 1e-4, 1e-6])
def test_log_ratios_far_below_any_clip_are_right(
    drift: float, impl: str, device: torch.device
) -> None:
    """Where the difference of two log-probabilities in fp32 is rounding."""
    for name in ("flow_grpo", "guard", "spo"):
        case = CASES[name]
        given = draw(case, device, drift=drift)
        wanted = torch.as_tensor(truth(case, given)["log_ratio"].value)
        got = call(case, given, impl).out.log_ratio.double().cpu()
        assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()


# Bounds and extremes ------------------------------------------------------------------------------


class At(NamedTuple):
    transition: Transition
    pred: Tensor
    old: Tensor
    x: Tensor
    x_next: Tensor


def at(log_ratios: list[float], device: torch.device = CPU, **of_step: Any) -> At:
    """Samples of one element, whose log-ratios these are to the last bit in fp32, by the weight:
    errors of 1 and 9, or of 9 and 1, or where it is 0 of 1 and 1."""
    lr = torch.tensor(log_ratios, device=device)
    one = torch.ones_like(lr)
    weight = torch.where(lr == 0, 1.0, lr.abs() / 8)
    fields = {"a": 0 * one, "b": one, "std": one, "dt": one, "weight": weight} | of_step
    pred, old = torch.where(lr < 0, 3.0, one), torch.where(lr > 0, 3.0, one)
    return At(Transition(**fields), pred[:, None], old[:, None], 0 * one[:, None], 0 * one[:, None])


def of_grpo(given: At, impl: str, **options: Any) -> Called:
    pred = given.pred.detach().requires_grad_()
    out = fastpref.grpo_loss(
        pred, given.old, given.x, given.x_next, given.transition, reduction="none", impl=impl,
        **options,
    )  # fmt: skip
    return Called(out, torch.autograd.grad(out.loss.sum(), pred)[0])


CLIPS = (1e-3, 1e-4, 1e-5, 2e-6)


@each_impl
@pytest.mark.parametrize("clip", CLIPS)
def test_ratios_at_their_bounds(clip: float, impl: str, device: torch.device) -> None:
    """To the sixth digit of the clip. Within, the gradient is A r, without more."""
    low, high = math.log1p(-clip), math.log1p(clip)
    near, far = 1 - 1e-6, 1 + 1e-6
    rows = [  # log-ratio, advantage, whether it is clipped
        (high * near, 1.0, 0), (high * far, 1.0, 1), (high * far, -1.0, 0), (low * far, 1.0, 0),
        (low * near, -2.0, 0), (low * far, -2.0, 1), (low * far, 2.0, 0), (high * 9, -1.0, 0),
        (high * 9, 3.0, 1), (0.0, 1.0, 0), (0.0, -1.0, 0),
    ]  # fmt: skip
    lr, advantage, clipped = (torch.tensor(each, device=device) for each in zip(*rows, strict=True))
    given = at(lr.tolist(), device)
    c: Any = torch.full_like(lr, clip) if clip in CLIPS[::2] else clip
    out, grad = of_grpo(given, impl, advantage=advantage, clip_range=c)
    torch.testing.assert_close(out.log_ratio, lr, rtol=1e-7, atol=0)
    assert torch.equal(out.clipped, clipped.to(lr))
    bound = torch.where(advantage > 0, 1 + clip, 1 - clip)
    wanted = -advantage * torch.where(clipped == 1, bound, torch.exp(lr))
    torch.testing.assert_close(out.loss, wanted, rtol=3e-7, atol=0)
    by_pred = -2 * given.transition.weight * given.pred[:, 0]
    slope = torch.where(clipped == 1, 0.0, -advantage * torch.exp(lr) * by_pred)
    torch.testing.assert_close(grad[:, 0], slope, rtol=1e-5, atol=0)


@each_impl
def test_a_clip_above_may_be_wider(impl: str, device: torch.device) -> None:
    lr = [0.15, 0.25, -0.15, -0.25]
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0], device=device)
    given = at(lr, device)
    out = of_grpo(given, impl, advantage=advantage, clip_range=0.1, clip_range_high=0.2).out
    assert out.clipped.tolist() == [0, 1, 1, 1]  # log(1.2) is 0.18
    out = of_grpo(given, impl, advantage=advantage, clip_range=1.0, clip_range_high=3.0).out
    assert out.clipped.tolist() == [0, 0, 0, 0]


@each_impl
def test_advantages_are_clipped_only_where_they_are_to_be(impl: str, device: torch.device) -> None:
    advantage = torch.tensor([7.0, -7.0, 3.0], device=device)
    given = at([0.0, 0.0, 0.0], device)
    for limit, wanted in ((5.0, [-5, 5, -3]), (None, [-7, 7, -3]), (2.0, [-2, 2, -2])):
        for variant in ("clip", "guard"):
            out = of_grpo(given, impl, advantage=advantage, advantage_clip=limit, variant=variant)
            assert out.out.loss.tolist() == wanted
    out = of_grpo(given, impl, advantage=advantage, variant="dppo").out
    assert out.loss.tolist() == [-7, 7, -3]


@each_impl
def test_divergences_at_the_limit(impl: str, device: torch.device) -> None:
    """D is 2 here. What lies at the limit is dropped if it would go farther; not at a ratio of 1,
    which there is far away, too."""
    given = at([0.1, 0.1, -0.1, -0.1, 0.0], device)
    given.old[4] = -1.0
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], device=device)
    for limit, dropped in ((2.0, [1, 0, 0, 1, 0]), (2.000001, [0] * 5), (1e-30, [1, 0, 0, 1, 0])):
        out, grad = of_grpo(
            given, impl, advantage=advantage, variant="dppo", divergence_limit=limit
        )
        assert out.clipped.tolist() == dropped
        assert (out.loss == 0).tolist() == [bool(d) for d in dropped]
        assert (grad[:, 0] == 0).tolist() == [bool(d) for d in dropped]


WAYS = ["triton", "torch", "graph", "func"]


def by_way(way: str, loss: Callable[..., Any], pred: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient of loss(pred, impl), summed."""
    if way == "func":
        grad, value = torch.func.grad_and_value(lambda p: loss(p, "torch").sum())(pred)
        return value, grad
    leaf = pred.detach().requires_grad_()
    value = loss(leaf, "torch" if way == "graph" else way).sum()
    (grad,) = torch.autograd.grad(value, leaf, create_graph=way == "graph")
    return value.detach(), grad.detach()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", ["clip", "guard", "dppo"])
def test_an_advantage_of_0_is_exactly_0(variant: str, way: str, device: torch.device) -> None:
    """Also where the ratio overflows, or the prediction is infinite; what else there is counts."""
    given = at([200.0, -200.0, 0.5, 0.2], device)
    advantage = torch.tensor([0.0, 0.0, 0.0, 1.0], device=device)
    for value in (1.0, math.inf, math.nan, 1e30):
        pred = given.pred.clone()
        pred[2] = value

        def loss(pred: Tensor, impl: str) -> Tensor:
            return fastpref.grpo_loss(
                pred, *given[2:], given.transition, advantage, variant=variant, impl=impl
            ).loss

        total, grad = by_way(way, loss, pred)
        alone, by_alone = by_way(
            way,
            lambda p, impl: fastpref.grpo_loss(
                p, *(t[3:] for t in given[2:]), given.transition.select([3]), advantage[3:],
                variant=variant, impl=impl,
            ).loss,
            pred[3:],
        )  # fmt: skip
        torch.testing.assert_close(4 * total, alone)
        assert not grad[:3].any()
        torch.testing.assert_close(4 * grad[3:], by_alone)


@each_impl
def test_sdpo_at_its_bounds(impl: str, device: torch.device) -> None:
    """A log-ratio at the bound is not clipped, and a gradient goes by the greater square."""
    clip = float(torch.tensor(1e-4))
    given = at([clip, 2 * clip, 2 * clip, -clip, 0.0, 0.0], device)
    advantage = torch.tensor([1.0, 1.0, -1.0, 0.0, 0.0, 0.0], device=device)
    pred = given.pred.detach().requires_grad_()
    out = fastpref.sdpo_loss(
        pred, *given[2:], given.transition, advantage, clip_range=clip, reduction="none", impl=impl
    )
    (grad,) = torch.autograd.grad(out.loss.sum(), pred)
    assert out.clipped.tolist() == [0, 1, 1, 0, 0, 0]
    # d - A: 2e-4 - 1; 2e-4 - 1, whose square is less than that of 1e-4 - 1; 2e-4 + 1
    assert (grad[:, 0] != 0).tolist() == [True, False, True, True, True, True]
    wanted = [(2 * clip - 1) ** 2, (clip - 1) ** 2, (2 * clip + 1) ** 2]
    torch.testing.assert_close(out.loss, torch.tensor(wanted, device=device))
    assert out.margin.tolist() == pytest.approx([2 * clip, 2 * clip, -2 * clip])


@each_impl
def test_step_dpo_at_its_bounds(impl: str, device: torch.device) -> None:
    low, high = math.log(0.9), math.log(1.1)
    near, far = 1 - 1e-6, 1 + 1e-6
    rows = [high * near, high * far, low * near, low * far, 0.0]
    given = at(rows + [0.0] * 5, device)

    def found(clip: Any) -> Called:
        pred = given.pred.detach().requires_grad_()
        out = fastpref.step_dpo_loss(
            pred, *given[2:], given.transition, beta=2.0, clip=clip, reduction="none", impl=impl
        )
        return Called(out, torch.autograd.grad(out.loss.sum(), pred)[0])

    out, grad = found(0.1)
    assert out.clipped.tolist() == [0, 1, 0, 1] + [0] * 6
    assert (grad[:4, 0] == 0).tolist() == [False, True, False, True]
    assert out.loss[4].item() == pytest.approx(math.log(2), rel=1e-6)
    assert out.margin[4] == 0
    torch.testing.assert_close(out.margin[:2], torch.full((2,), 2 * high, device=device))
    out, grad = found(None)
    assert not out.clipped.any()
    assert grad[:4].all()


@each_impl
def test_margins_that_overflow_a_sigmoid(impl: str, device: torch.device) -> None:
    """-log(sigmoid(-105)) is infinite in fp32; LPO's beta is 500."""
    given = at([-0.105, 0.095], device)
    out = fastpref.step_dpo_loss(given.pred, *given[2:], given.transition, beta=1000.0, impl=impl)
    assert out.loss.item() == pytest.approx(200.0, rel=1e-4)


# What stays where it is ---------------------------------------------------------------------------


@each_impl
@pytest.mark.parametrize("what", ["pred", "other", "x", "x_next"])
@pytest.mark.parametrize("name", ["flow_grpo", "guard", "dppo", "pso", "sdpo"])
def test_nan_stays_in_its_sample(name: str, what: str, impl: str, device: torch.device) -> None:
    if impl == "triton" and name in ("guard", "pso"):
        pytest.skip("as the others")
    case, setting = CASES[name], Setting(reduction="none")
    given = draw(case, device)
    spoiled = getattr(given, what).clone()
    spoiled[1, 0, 0, 0] = math.nan
    out = call(case, given._replace(**{what: spoiled}), impl, setting)
    clean = call(case, given, impl, setting)
    assert out.out.loss[1].isnan()
    assert out.out.log_ratio[1].isnan()
    assert out.grad[1].isnan().any()
    others = [i for i in range(case.rows) if i % case.groups != 1]
    groups = others[: case.groups - 1]
    assert torch.equal(out.out.loss[groups], clean.out.loss[groups])
    assert torch.equal(out.out.log_ratio[others], clean.out.log_ratio[others])
    assert torch.equal(out.grad[others], clean.grad[others])
    assert out.out.metrics()["loss"].isnan()


def still(given: Given, rows: list[int], weight: float, b: float | None) -> Given:
    """Steps without noise among the others, as they come about by hand."""
    fields = [field.clone() for field in given.transition[:5]]
    for field, value in zip(fields[1:], (b, 0.0, 0.0, weight), strict=True):
        if value is not None:
            field[rows] = value
    return given._replace(transition=Transition(*fields))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("weight", "b"), [(math.inf, 0.0), (0.0, 0.0), (math.inf, None)])
@pytest.mark.parametrize("name", [*ONE_EACH, "gaussian", "x", "sdpo", "stored", "stored sdpo"])
def test_steps_without_noise_add_exactly_0(
    name: str, weight: float, b: float | None, way: str, device: torch.device
) -> None:
    """To loss and gradient, but they count in the mean; a pair does where one of its steps is."""
    if way == "triton" and (weight, b) != (math.inf, 0.0 if len(name) % 2 else None):
        pytest.skip("as the others")  # the interpreter takes long
    case = CASES[name.replace("stored", "").strip() or "published"]._replace(shared=False)
    given = draw(case, device)
    if "stored" in name:
        given = stored(given)
        given.log_prob[1] = math.inf
    made = still(given, [1], weight, b)
    given.pred[1], made.pred[1] = 0.0, math.nan if b is None else math.inf
    others = [i for i in range(case.rows) if i % case.groups != 1]

    def of(given: Given) -> tuple[Tensor, Tensor]:
        options = arguments(case, given)

        def loss(pred: Tensor, impl: str) -> Tensor:
            return getattr(fastpref, case.function)(pred, **options, impl=impl).loss

        return by_way(way, loss, given.pred)

    weighed = weights(case).to(device) * 0 + 1
    weighed[1] = 0.0
    loss, grad = of(made)
    if way in ("triton", "torch"):
        wanted = call(case, given, way, Setting(weight=weighed))
        torch.testing.assert_close(loss, wanted.out.loss.detach(), rtol=1e-6, atol=0)
        torch.testing.assert_close(grad[others], wanted.grad[others], rtol=1e-6, atol=0)
        out = call(case, made._replace(pred=given.pred), way, Setting(reduction="none")).out
        assert out.loss[1] == 0
        assert out.log_ratio[1] == 0
        assert out.kl is None or out.kl[1] == 0
        assert all(value.isfinite() for value in out.metrics().values())
    rest = [i for i in range(case.rows) if i not in others]
    assert (grad[rest] == 0).all()
    assert loss.isfinite()
    assert grad.isfinite().all()


# DiffusionNFT -------------------------------------------------------------------------------------

REWARD = torch.tensor([0.9, 0.2, 0.5, 0.0, 1.0])
TIME = torch.tensor([0.3, 0.9, 1.0, 0.05, 0.6])
NFT: dict[str, dict[str, Any]] = {
    "nft": {"reward": REWARD, "t": TIME},
    "nft_beta": {"reward": REWARD, "t": TIME, "beta": 0.1},
    "nft_kl": {"reward": REWARD, "t": TIME, "beta": 0.5, "kl_weight": 0.03},
    "nft_plain": {"reward": REWARD, "t": TIME, "beta": 0.3, "adaptive": False},
    "nft_plain_kl": {"reward": REWARD, "adaptive": False, "kl_weight": 0.5},
    "nft_each": {"reward": REWARD, "beta": torch.tensor([0.1, 1.0, 0.5, 2.0, 0.01])},
}


class Velocities(NamedTuple):
    pred: Tensor
    target: Tensor
    old: Tensor
    ref: Tensor | None
    mask: Tensor | None = None


def velocities(
    name: str, device: torch.device, drift: float = 0.1, dtypes: Any = (FP32, FP32, FP32),
    sample: tuple[int, ...] = SAMPLE,
) -> Velocities:  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    target, off, moved, other = torch.randn(4, SINGLES, *sample, generator=generator)
    old = (target + 0.5 * off).to(device, dtypes[2])
    pred = (old.cpu().float() + drift * moved).to(device, dtypes[0])
    ref = (pred.cpu().float() + 0.1 * other).to(device, dtypes[2]) if "kl" in name else None
    return Velocities(pred, target.to(device, dtypes[1]), old, ref)


def call_nft(
    name: str, given: Velocities, impl: str, setting: Setting = PLAIN, **more: Any
) -> Called:
    pred = given.pred.detach().requires_grad_()
    options: dict[str, Any] = {"ref_pred": given.ref, "reduction": setting.reduction}
    if given.mask is not None:
        options["mask"] = given.mask
    options |= on(pred.device, NFT[name]) | more
    out = fastpref.nft_loss(
        pred, given.target, given.old, sample_weight=setting.weight, impl=impl, **options
    )
    return Called(out, torch.autograd.grad(out.loss.sum(), pred)[0])


def truth_nft(name: str, given: Velocities, setting: Setting = PLAIN) -> dict[str, Truth]:
    """Nudged are what the sums of each sample are summed from."""

    def whole(t: Tensor) -> Tensor:
        return t.double().cpu().flatten(1)

    target, old = whole(given.target), whole(given.old)
    ref = None if given.ref is None else whole(given.ref)
    mask = None
    if given.mask is not None:
        mask = whole(given.mask.double().expand(given.pred.shape))
    x0 = torch.randn(old.shape, dtype=FP64)
    numbers = {"t": torch.ones(SINGLES), **NFT[name]}
    numbers = {k: v.double() if isinstance(v, Tensor) else v for k, v in numbers.items()}
    of_elements = dict(numbers)
    if isinstance(of_elements.get("beta"), Tensor):
        of_elements["beta"] = of_elements["beta"][:, None]

    def evaluate(pred: Tensor, nudges: Tensor) -> dict[str, Tensor]:
        p = whole(pred)
        found = oracles.Forward(*(
            torch.stack(column) if column[0] is not None else None
            for column in zip(*(of_one(p, i) for i in range(SINGLES)), strict=True)
        ))  # fmt: skip
        of_sample = torch.as_tensor(setting.weight).double().cpu()
        d, sized = p.detach() - old, found.losses.detach()
        beta, t = torch.as_tensor(numbers.get("beta", 1.0)), numbers["t"]
        scale = t.square()
        if NFT[name].get("adaptive", True):
            off = (old - target).abs() - beta.view(-1, 1) * d.abs()
            scale = t / oracles.mean(off.abs(), mask).clamp(min=1e-5)
        gap = oracles.mean(d.abs() * ((p.detach() - target).abs() + (old - target).abs()), mask)
        sized = sized.abs() + 5 * scale * (gap + (1 + beta) * oracles.mean(d**2, mask))
        losses = found.losses + nudges[:SINGLES] * sized
        rest = {**found._asdict(), "drops": found.drops + nudges[SINGLES:] * gap}
        rest["old_errors"] = found.old_errors + nudges[SINGLES:] * found.errors.detach()
        rest["margin"] = (1 - 2 * numbers["reward"]) * rest["drops"]
        del rest["losses"]
        loss = reduced(of_sample * losses, setting.reduction)
        return {"loss": loss, **{k: v for k, v in rest.items() if v is not None}}

    def of_one(p: Tensor, i: int) -> oracles.Forward:
        own = {k: v[i] if isinstance(v, Tensor) and v.dim() else v for k, v in numbers.items()}
        own["t"] = own["t"].view(1)
        rows = [None if t is None else t[i : i + 1] for t in (p, target, old, ref, x0, mask)]
        found = oracles.nft(*rows[:5], **own, mask=rows[5])
        return oracles.Forward(*(None if f is None else f[0] for f in found))

    return oracles.truths(evaluate, given.pred, 2 * SINGLES)


def check_nft(name: str, given: Velocities, setting: Setting = PLAIN) -> None:
    wanted = truth_nft(name, given, setting)
    plain, fused = (call_nft(name, given, impl, setting) for impl in ("torch", "triton"))
    assert isinstance(plain.out, fastpref.ForwardOutput)
    for key, exact in wanted.items():
        eager, got = (each.grad if key == "grad" else getattr(each.out, key)
                      for each in (plain, fused))  # fmt: skip
        assert eager.shape == got.shape == exact.value.reshape(eager.shape).shape
        exact = Truth(*(each.reshape(eager.shape) for each in exact))
        assert_three_way(key, got, eager, exact)
    assert (plain.out.kl is None) == (fused.out.kl is None) == ("kl" not in name)


@pytest.mark.parametrize(
    ("name", "drift"), [*((name, 0.1) for name in NFT), ("nft", 1.0), ("nft_kl", 1e-4)]
)
def test_nft_is_its_formula(name: str, drift: float, device: torch.device) -> None:
    check_nft(name, velocities(name, device, drift))


@pytest.mark.parametrize("name", ["nft_beta", "nft_kl"])
@pytest.mark.parametrize("dtypes", DTYPES[::2], ids=lambda d: "-".join(str(t)[6:] for t in d))
def test_nft_in_any_dtype(name: str, dtypes: Any, device: torch.device) -> None:
    check_nft(name, velocities(name, device, dtypes=dtypes))


@pytest.mark.parametrize("sample", [(1,), (1025,), (2, 3, 4, 5)], ids=str)
def test_nft_in_any_shape(sample: tuple[int, ...], device: torch.device) -> None:
    check_nft("nft_kl", velocities("nft_kl", device, sample=sample))


@pytest.mark.parametrize("setting", ["none", "sum", "weights"])
@pytest.mark.parametrize("masked", [False, True])
def test_nft_with_knobs(setting: str, masked: bool, device: torch.device) -> None:
    how = SETTINGS[setting]
    if callable(how.weight):
        how = how._replace(weight=weights(SINGLE["flow_grpo"]).to(device))
    given = velocities("nft_kl", device)
    check_nft("nft_kl", given._replace(mask=hiding(SINGLES, device) if masked else None), how)


@each_impl
def test_nft_of_the_old_policy_itself(impl: str, device: torch.device) -> None:
    """The gradient is 10 t^2 (2 reward - 1) q / (w N), an advantage-weighted matching step."""
    for name in ("nft", "nft_beta"):
        given = velocities(name, device, drift=0.0)
        got = call_nft(name, given, impl)
        assert not got.out.drops.any()
        assert not got.out.drifts.any()
        assert not got.out.margin.any()
        assert torch.equal(got.out.errors, got.out.old_errors)
        q = given.old - given.target
        t, reward = TIME.to(device).view(-1, 1, 1, 1), REWARD.to(device).view(-1, 1, 1, 1)
        w = t * q.abs().mean((1, 2, 3), keepdim=True)
        wanted = 10 * t**2 * (2 * reward - 1) * q / (w * q[0].numel()) / SINGLES
        torch.testing.assert_close(got.grad, wanted, rtol=1e-5, atol=1e-9)


@each_impl
def test_nft_of_predictions_at_the_target(impl: str, device: torch.device) -> None:
    """Whose weights are at their least, 1e-5."""
    given = velocities("nft", device, drift=0.0)
    given = given._replace(pred=given.target.clone(), old=given.target.clone())
    got = call_nft("nft", given, impl)
    assert got.out.loss == 0
    assert not got.grad.any()


def test_nft_of_predictions_near_the_target(device: torch.device) -> None:
    """Whose weights are held at 1e-5, in some samples by their t alone."""
    given = velocities("nft", device)
    off, moved = 2e-5 * (given.old - given.target), 1e-5 * (given.pred - given.old)
    check_nft("nft", Velocities(off + moved, torch.zeros_like(off), off, None))


@each_impl
def test_nft_leaves_out_what_has_no_weight(impl: str, device: torch.device) -> None:
    given = velocities("nft_kl", device)
    weight = weights(SINGLE["flow_grpo"]).to(device)
    spoiled = Velocities(*(None if t is None else t.clone() for t in given))
    for t in spoiled[:4]:
        t[1] = math.nan
    mask = hiding(SINGLES, device, SAMPLE[0]) > 0.4
    pred, target, old, ref = (torch.where(mask, t, math.nan) for t in given[:4])
    hidden = Velocities(pred, target, old, ref, mask)
    for setting, clean, other in (
        (Setting(weight=weight), given, spoiled), (Setting(), given._replace(mask=mask), hidden),
    ):  # fmt: skip
        wanted, got = (call_nft("nft_kl", each, impl, setting) for each in (clean, other))
        torch.testing.assert_close(got.out.loss, wanted.out.loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-6, atol=0)


# The codes beside one another ---------------------------------------------------------------------


@each_impl
def test_guard_by_the_batchs_means_is_that_of_each_where_steps_are_equal(
    impl: str, device: torch.device
) -> None:
    """verl-omni's; Flow-Factory's is dt times the same."""
    case = SINGLE["guard_wide"]
    equal = draw(case, device, numbers="all", drift=0.1)
    got = call(case, equal, impl)
    for loss, factor in ((oracles.grpo_guard, 1.0), (oracles.flow_factory_guard, 0.1)):
        wanted = truth(case._replace(loss=loss), equal)
        assert got.out.loss.item() * factor == pytest.approx(wanted["loss"].value, rel=1e-5)
        for key in ("log_ratio", "grad"):
            value = (got.grad * factor if key == "grad" else got.out.log_ratio).cpu().double()
            exact = torch.as_tensor(wanted[key].value).view(value.shape)
            torch.testing.assert_close(value, exact, rtol=1e-4, atol=1e-5 * exact.abs().max())
    mixed = draw(case, device, drift=0.1)
    of_batch = truth(case._replace(loss=oracles.grpo_guard), mixed)["log_ratio"].value
    off = call(case, mixed, impl).out.log_ratio.cpu() / torch.as_tensor(of_batch) - 1
    assert off.abs().max() > 0.1


@each_impl
def test_two_rewards_are_two_losses(impl: str, device: torch.device) -> None:
    """DanceGRPO's for HunyuanVideo: coefficients of the losses of visual and motion quality."""
    given = draw(SINGLE["flow_grpo"], device)
    total, wanted = 0.0, 0.0
    for coefficient, advantage in ((0.7, ADVANTAGE), (0.3, -ADVANTAGE.flip(0))):
        case = grpo(oracles.flow_grpo, advantage=advantage)
        total += coefficient * call(case, given, impl).out.loss.item()
        wanted += coefficient * float(truth(case, given)["loss"].value)
    assert total == pytest.approx(wanted, rel=1e-6)


@each_impl
def test_importance_weights_reject_and_still_count(impl: str, device: torch.device) -> None:
    """verl-omni's rollout_is_weights: of the losses after clipping, in a mean over all."""
    case = SINGLE["flow_grpo"]
    given = draw(case, device)
    each = truth(case, given, Setting(reduction="none"))["loss"].value
    weight = torch.tensor([0.0, 1.3, 1.0, 0.0, 2.0], device=device)
    out = call(case, given, impl, Setting(weight=weight)).out
    assert out.loss.item() == pytest.approx((weight.cpu().numpy() * each).mean(), rel=1e-6)


@each_impl
def test_labels_of_trajectories_are_winners_first(impl: str, device: torch.device) -> None:
    """D3PO's and PSO's: +1 where the first one is better, -1 where the second."""
    case = PAIRED["pso"]
    given = draw(case, device, drift=0.5, sampler="euler_ancestral")
    label = torch.tensor([1.0, -1.0, -1.0])
    wanted = truth(case._replace(loss=functools.partial(oracles.step_dpo, label=label)), given)
    order = [i if l > 0 else i + PAIRS for i, l in enumerate(label)]
    order += [(i + PAIRS) % (2 * PAIRS) for i in order]
    pred, other, x, x_next = (t[order] for t in given[:4])
    moved = Given(pred, other, x, x_next, given.transition.select(order))
    got = call(case, moved, impl)
    assert got.out.loss.item() == pytest.approx(wanted["loss"].value, rel=1e-5)
    back = torch.as_tensor(wanted["grad"].value)[order]
    scale = back.abs().max().item()
    torch.testing.assert_close(got.grad.cpu().double(), back, rtol=1e-4, atol=1e-6 * scale)


@each_impl
def test_one_prediction_of_a_pair_is_a_product_with_their_difference(
    impl: str, device: torch.device
) -> None:
    """Without a clip: lr_w - lr_l = b / s^2 mean((x'_w - x'_l) (pred - ref))."""
    case = PAIRED["tailor"]
    given = draw(case, device, numbers="pair", drift=0.1)
    out = call(case, given, impl).out
    winner, loser = given.x_next.double().chunk(2)
    moved = given.pred.double() - given.other.double()
    product = ((winner - loser) * moved).flatten(1).mean(1)
    b, std = (n.double() for n in (given.transition.b, given.transition.std))
    wanted = 10.0 * b / std**2 * product
    torch.testing.assert_close(out.margin.double(), wanted, rtol=1e-4, atol=1e-7)


# Derivatives --------------------------------------------------------------------------------------


ALL = (*ONE_EACH, "flow_grpo", "sdpo", "nft", "nft_kl")


def loss_by_pred(
    name: str, device: torch.device, dtype: torch.dtype = FP32, sample: tuple[int, ...] = (5, 7)
) -> tuple[Callable[..., Any], Tensor]:
    """(a function of the prediction and of impl to outputs, the prediction)"""
    if name in NFT:
        of_nft = velocities(name, device, dtypes=(dtype,) * 3, sample=sample)
        options = on(device, NFT[name]) | {"ref_pred": of_nft.ref}
        return (
            lambda p, impl, **more: fastpref.nft_loss(
                p, of_nft.target, of_nft.old, impl=impl, **{**options, **more}
            ),
            of_nft.pred,
        )
    case = CASES[name]
    given = draw(case, device, drift=0.3, dtypes=(dtype,) * 3, sample=sample)
    options = arguments(case, given)
    function = getattr(fastpref, case.function)
    return lambda p, impl, **more: function(p, **{**options, **more}, impl=impl), given.pred


@pytest.mark.parametrize("name", [*ONE_EACH, "sdpo", "lpo", "nft_plain", "nft_plain_kl"])
def test_derivatives_in_fp64(name: str) -> None:
    loss_of, pred = loss_by_pred(name, CPU, FP64, (3,))
    pred = pred.requires_grad_()

    def loss(p: Tensor) -> Tensor:
        return loss_of(p, "torch", reduction="none").loss

    assert torch.autograd.gradcheck(loss, pred)
    assert torch.autograd.gradgradcheck(loss, pred)


@pytest.mark.parametrize("name", ALL)
def test_transforms(name: str, device: torch.device) -> None:
    """torch.func's gradient is the closed one, forward mode agrees, and a batch of predictions may
    be mapped over."""
    loss_of, pred = loss_by_pred(name, device)
    for how in ({}, {"reduction": "dro", "dro_temperature": 20.0}):

        def loss(p: Tensor, how: Any = how) -> Tensor:
            return loss_of(p, "torch", **how).loss

        leaf = pred.detach().requires_grad_()
        value = loss(leaf)
        (wanted,) = torch.autograd.grad(value, leaf, retain_graph=True)
        close = {"rtol": 1e-4, "atol": 1e-6 * wanted.abs().max().item()}
        grad, again = torch.func.grad_and_value(loss)(pred)
        torch.testing.assert_close(again, value.detach(), rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(grad, wanted, **close)
        (with_graph,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        torch.testing.assert_close(with_graph.detach(), wanted, **close)
    _, along = torch.func.jvp(loss, (pred,), (wanted,))
    torch.testing.assert_close(along.float(), wanted.square().sum(), rtol=1e-4, atol=0)
    many = torch.stack([pred, 0.9 * pred])
    each = torch.stack([loss(p) for p in many])
    torch.testing.assert_close(torch.vmap(loss)(many), each, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(many)[0], wanted, **close)


@each_impl
@pytest.mark.parametrize("name", ["published", "guard", "dppo", "pso", "spo", "sdpo"])
def test_the_loss_falls_along_its_gradient(name: str, impl: str, device: torch.device) -> None:
    """By as much as the gradient says, measured by the published formula; and what had a positive
    advantage, or won, becomes more likely."""
    case = CASES[name]
    given = draw(case, device, drift=0.003)
    grad = call(case, given, impl).grad.double().cpu()
    step = 1e-6 / grad.abs().max().item()
    evaluate = formula(case, given)
    pred = given.pred.double().cpu()
    none = torch.zeros(2 * len(given.x_next) + case.anchored, dtype=FP64)
    after, before = (evaluate(pred - side * step * grad, none) for side in (1, -1))
    fall = (before["loss"] - after["loss"]).item()
    assert fall == pytest.approx(2 * step * grad.square().sum().item(), rel=1e-3)
    moved = (after["log_ratio"] - before["log_ratio"]).sign()
    assert moved.any()
    if case.pairs:
        assert (after["margin"] - before["margin"])[:2].gt(0).all()
    else:
        free = (call(case, given, impl).out.clipped.cpu() == 0) & (ADVANTAGE != 0)
        assert torch.equal(moved[free], ADVANTAGE.sign().double()[free])


@each_impl
def test_nft_falls_along_its_gradient(impl: str, device: torch.device) -> None:
    """Towards the target where the reward is high, away from it where it is low."""
    given = velocities("nft_plain", device)
    got = call_nft("nft_plain", given, impl)
    step = 1e-3 / got.grad.abs().max()
    after = call_nft("nft_plain", given._replace(pred=given.pred - step * got.grad), impl).out
    fall = (got.out.loss - after.loss).item()
    assert fall == pytest.approx((step * got.grad.square().sum()).item(), rel=0.01)
    at_old = velocities("nft", device, drift=0.0)
    grad = call_nft("nft", at_old, impl).grad
    after = call_nft("nft", at_old._replace(pred=at_old.pred - 0.1 * grad), impl).out
    assert torch.equal(after.drops.cpu().sign(), (1 - 2 * REWARD).sign())
    assert (after.margin >= 0).all()


# By PyTorch's path, where a link is but its text, one of each function that is more than that.
@pytest.mark.parametrize(
    ("name", "impl"),
    covering.product(
        ["published", "guard_kl", "dppo", "spo", "sdpo", "nft_kl"],
        ["triton", "torch"],
        fast=lambda name, impl: impl == "triton" or name in ("guard_kl", "spo"),
    ),
)
def test_compile_fullgraph(name: str, impl: str, device: torch.device) -> None:
    loss_of, pred = loss_by_pred(name, device)

    def step(pred: Tensor) -> Any:
        out = loss_of(pred * 1.0, impl)
        return out.loss, out[1], out.metrics()

    leaf = pred.detach().requires_grad_()
    found = []
    torch._dynamo.reset()
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss, first, metrics = function(leaf)
        found.append((loss.detach(), first, metrics, torch.autograd.grad(loss, leaf)[0]))
    scale = found[0][3].abs().max().item()
    torch.testing.assert_close(found[1][:3], found[0][:3], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[1][3], found[0][3], rtol=1e-4, atol=1e-5 * scale)


@each_impl
@pytest.mark.parametrize("name", ["published", "spo"])
def test_compile_with_dynamo_alone(name: str, impl: str, device: torch.device) -> None:
    """And with a transition that is an argument."""
    case = CASES[name]
    given = draw(case, device, sample=(5, 7))
    options = arguments(case, given)
    transition = options.pop("transition")
    function = getattr(fastpref, case.function)

    def step(pred: Tensor, transition: Transition) -> Tensor:
        return function(pred, **options, transition=transition, impl=impl).loss

    leaf = given.pred.requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    wanted, got = (torch.autograd.grad(f(leaf, transition), leaf)[0] for f in (step, compiled))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6 * wanted.abs().max().item())


# What a call costs, returns and refuses -----------------------------------------------------------


@each_impl
def test_autocast_changes_nothing(impl: str, device: torch.device) -> None:
    for name in ("guard_kl", "nft_kl"):
        loss_of, pred = loss_by_pred(name, device)
        leaf = pred.detach().requires_grad_()
        wanted = loss_of(leaf, impl)
        (grad,) = torch.autograd.grad(wanted.loss, leaf)
        with torch.autocast(device.type, torch.bfloat16):
            got = loss_of(leaf, impl)
            (other,) = torch.autograd.grad(got.loss, leaf)
        assert torch.equal(grad, other)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("name", [*ONE_EACH, "guard", "dppo", "sdpo", "nft", "nft_kl"])
def test_one_launch_forward_and_one_backward(
    name: str, launches: list[Any], device: torch.device
) -> None:
    loss_of, pred = loss_by_pred(name, device)
    leaf = pred.requires_grad_()
    key = "pair_weight" if name in PAIRED else "sample_weight"
    out = loss_of(leaf, "triton", reduction="dro", **{key: 0.5})
    assert len(launches) == 1
    torch.autograd.grad(out.loss, leaf)
    assert len(launches) == 2


@each_impl
def test_outputs_carry_no_gradient_but_the_loss(impl: str, device: torch.device) -> None:
    for name in ("guard_kl", "nft_kl"):
        loss_of, pred = loss_by_pred(name, device)
        out = loss_of(pred.requires_grad_(), impl)
        assert out.loss.requires_grad
        assert not any(field.requires_grad for field in out[1:] if field is not None)
        with torch.no_grad():
            again = loss_of(pred, impl)
        assert not again.loss.requires_grad
        assert torch.equal(again.loss, out.loss.detach())


STEP_METRICS = {"loss", "ratio", "ratio_std", "ratio_off", "clip_fraction", "approx_kl"}


@pytest.mark.parametrize("name", ["dance", "published", "d3po", "sdpo"])
def test_metrics(name: str, device: torch.device) -> None:
    case = CASES[name]
    out = call(case, draw(case, device), "torch").out
    ratio = torch.exp(out.log_ratio.double())
    wanted = {
        "loss": out.loss.detach(), "ratio": ratio.mean(), "ratio_std": ratio.std(correction=0),
        "ratio_off": (ratio - 1).abs().max(), "clip_fraction": out.clipped.mean(),
        "approx_kl": 0.5 * out.log_ratio.double().square().mean(),  # MixGRPO's kl_loss
    }  # fmt: skip
    wanted |= {"kl": out.kl.mean()} if case.anchored else {}
    if case.pairs:
        won = (out.margin > 0).float() + 0.5 * (out.margin == 0).float()
        wanted |= {"margin": out.margin.mean(), "accuracy": won.mean()}
    metrics = out.metrics()
    assert metrics.keys() == wanted.keys()
    for key, value in wanted.items():
        assert metrics[key].shape == ()
        assert not metrics[key].requires_grad
        assert metrics[key].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-9), key
    floats = out.metrics(as_floats=True)
    assert {type(value) for value in floats.values()} == {float}
    assert floats == {key: value.item() for key, value in metrics.items()}


def test_metrics_of_nft(device: torch.device) -> None:
    out = call_nft("nft_kl", velocities("nft_kl", device), "torch").out
    won = (out.margin > 0).float() + 0.5 * (out.margin == 0).float()
    wanted = {
        "loss": out.loss.detach(), "error": out.errors.mean(), "old_error": out.old_errors.mean(),
        "drop": out.drops.mean(), "drift": out.drifts.mean(), "margin": out.margin.mean(),
        "accuracy": won.mean(), "kl": out.kl.mean(),
    }  # fmt: skip
    metrics = out.metrics(as_floats=True)
    assert metrics == pytest.approx({key: value.item() for key, value in wanted.items()})


def test_metrics_by_step(device: torch.device) -> None:
    case = CASES["published"]
    out = call(case, draw(case, device), "torch").out
    step = torch.tensor([3, 0, 3, 1, 3], device=device)
    found = out.by_step(step, 5)
    assert found.keys() == {"ratio", "ratio_std", "clip_fraction", "approx_kl", "kl"}
    assert all(value.shape == (5,) for value in found.values())
    ratio = torch.exp(out.log_ratio.double())
    for j in range(5):
        rows = step == j
        values = {key: value[j].item() for key, value in found.items()}
        if not rows.any():
            assert all(math.isnan(value) for value in values.values())
            continue
        own = ratio[rows]
        assert values["ratio"] == pytest.approx(own.mean().item(), rel=1e-6)
        spread = own.std(correction=0).item()
        assert values["ratio_std"] == pytest.approx(spread, rel=1e-3, abs=1e-9)
        assert values["clip_fraction"] == out.clipped[rows].mean()
        assert values["kl"] == pytest.approx(out.kl[rows].mean().item())
    pairs = call(CASES["spo"], draw(CASES["spo"], device), "torch").out
    of_pairs = torch.tensor([2, 0, 2], device=device)
    found, wanted = (pairs.by_step(s, 3) for s in (of_pairs, of_pairs.repeat(2)))
    torch.testing.assert_close(found, wanted, equal_nan=True)
    for bad in (step[:4], step[:2], step.float(), step > 0, step.tolist(), step[None]):
        with pytest.raises(ValueError, match=r"step is .*expected integers of shape \(5,\)"):
            out.by_step(bad, 5)


GATHER = """
import os, sys, torch, fastpref
rank = int(sys.argv[1])
torch.distributed.init_process_group(
    "gloo", rank=rank, world_size=2, init_method=f"file://{sys.argv[2]}"
)
def of(rows):
    lr = torch.tensor([0.1, -0.2, 0.3, 0.0])[rows]
    step = fastpref.StepOutput(lr.mean(), lr, (lr > 0).float(), 2 * lr, -lr)
    return step, fastpref.ForwardOutput(lr.mean(), *[lr] * 6)
own = slice(0, 1) if rank == 0 else slice(1, 4)
for one, whole in zip(of(own), of(slice(0, 4))):
    got, wanted = one.metrics(gather=True, as_floats=True), whole.metrics(as_floats=True)
    assert got.keys() == wanted.keys()
    for name in wanted.keys() - {"ratio_std", "ratio_off"}:  # which are within each
        assert abs(got[name] - wanted[name]) < 1e-6, (name, got, wanted)
torch.distributed.barrier()
os._exit(0)  # threads of gloo's may abort an orderly exit
"""


def test_metrics_of_two_processes(tmp_path: Path) -> None:
    """One has a single sample, the other three."""
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}
    command = [sys.executable, "-c", GATHER]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "met")], env=env, stderr=-1)
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=120)[1].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors


X = torch.zeros(4, 3)
STEPS = steps_of("flow_sde", torch.arange(1, 5))
GOOD: dict[str, dict[str, Any]] = {
    "grpo_loss": {"model_pred": X, "old_pred": X, "x": X, "x_next": X, "transition": STEPS,
                  "advantage": torch.ones(4)},
    "step_dpo_loss": {"model_pred": X, "ref_pred": X, "x": X, "x_next": X, "transition": STEPS,
                      "beta": 1.0},
    "sdpo_loss": {"model_pred": X, "old_pred": X, "x": X, "x_next": X, "transition": STEPS,
                  "advantage": torch.ones(4)},
    "nft_loss": {"model_pred": X, "target": X, "old_pred": X, "reward": torch.ones(4)},
}  # fmt: skip
OPERANDS = ("model_pred", "old_pred", "ref_pred", "x", "x_next", "target")
WANTING_X, WANTING_ROWS = (torch.zeros_like(t).requires_grad_() for t in (X, X[:, 0]))
META = torch.device("meta")
BAD_TENSORS: list[tuple[Any, str]] = [
    (None, "missing|got a NoneType"), ([1.0], "must be a .*got a list"),
    (X.long(), "has dtype torch.int64; expected float32"), (X[:3], r"has shape \(.*expected"),
    (X[:, :2], r"has shape \(.*expected"), (X[:0], r"has shape \(.*expected"),
    (X[:, 0], r"has shape \(4,\); expected at least two dim"), (X.to(META), "is on (meta|cpu)"),
    (WANTING_X, r"requires a gradient, .* pass \w+\.detach\(\)"),
]  # fmt: skip


@pytest.mark.parametrize("function", GOOD)
def test_bad_tensors_are_named(function: str) -> None:
    """Or what does not go with them is: x_next with model_pred, or model_pred with x_next."""
    for name in [name for name in GOOD[function] if name in OPERANDS]:
        for bad, message in BAD_TENSORS:
            if name == "model_pred" and isinstance(bad, Tensor) and bad.requires_grad:
                continue
            with pytest.raises((TypeError, ValueError), match=message) as caught:
                getattr(fastpref, function)(**{**GOOD[function], name: bad})
            said = str(caught.value)
            first_two = {"model_pred", "target" if function == "nft_loss" else "x_next"}
            allowed = first_two if name in first_two else {name}
            assert said.split(" ")[0].split("[")[0] in allowed, said
            if function != "nft_loss":
                assert "target" not in said
            assert "ref_mse" not in said


LOG = torch.zeros(4)
NUMBERS: list[tuple[str, dict[str, Any], str]] = [
    *(
        (function, {"transition": transition}, message)
        for function in ("grpo_loss", "step_dpo_loss", "sdpo_loss")
        for transition, message in (
            (None, r"^transition must be a fastpref.transitions.Transition, got a NoneType"),
            (tuple(STEPS), "^transition must be a .*got a tuple"),
            (STEPS.select([0, 1, 2]), r"^transition\.b is a .*shape \(3,\); expected .*\(\) or"),
            (STEPS.to("meta"), r"is on cpu, but the transition is on meta"),
            (STEPS._replace(std=-STEPS.std), r"^transition\.std contains -0.*expected a number in"),
            (STEPS._replace(a=STEPS.a * math.nan), r"^transition\.a contains nan"),
            (STEPS._replace(weight=-STEPS.weight), r"^transition\.weight contains -"),
            (STEPS._replace(dt=None), r"^transition\.dt must be a torch.Tensor, got a NoneType"),
            (STEPS._replace(dt=STEPS.dt.long()), r"^transition\.dt is a torch.int64 tensor"),
            (STEPS._replace(normalized=None), r"^transition\.normalized must be True or False"),
        )
    ),
    *(
        (function, {f"{o}_pred": pred, f"{o}_log_prob": log_prob}, f"^{o}_{message}")
        for function, o in (("grpo_loss", "old"), ("step_dpo_loss", "ref"), ("sdpo_loss", "old"))
        for pred, log_prob, message in (
            (None, None, f"pred or {o}_log_prob is missing"),
            (X, LOG, f"pred and {o}_log_prob were both given; expected only one"),
            (None, LOG[:3], r"log_prob has shape \(3,\).*expected \(4,\)"),
            (None, LOG[:, None], r"log_prob has shape \(4, 1\).*expected \(4,\)"),
            (None, LOG.long(), "log_prob has dtype torch.int64; expected float32"),
            (None, LOG.to(META), "log_prob is on meta, but model_pred is on cpu"),
            (None, WANTING_ROWS, "log_prob requires a gradient"),
            (None, 0.5, "log_prob must be a .*got a float"),
        )
    ),
    *(
        (function, {"advantage": advantage}, rf"^advantage(\[\d\])? {message}")
        for function in ("grpo_loss", "sdpo_loss")
        for advantage, message in (
            (None, "is (missing|a NoneType)"), (torch.ones(3), r"is a .*shape \(3,\); expected"),
            (torch.ones(4, 1), r"is a .*shape \(4, 1\); expected"),
            (torch.tensor([0.0, math.inf, 0.0, 0.0]), "contains inf; expected"),
            (torch.tensor([0.0, math.nan, 0.0, 0.0]), "contains nan; expected"),
            (WANTING_ROWS, "requires a gradient"),
            (torch.ones(4, device="meta"), "is on meta; expected cpu"),
            ("high", "(must be a float or tensor, got|is) a str"),
            ((1.0, 2.0, 3.0), "(must be|is a tuple of 3; expected)"),
        )
    ),
    ("sdpo_loss", {"advantage": (1.0,)}, r"^advantage is a tuple of 1; expected .*\(2B,\)"),
    ("sdpo_loss", {"advantage": (math.inf, 1.0)}, r"^advantage\[0\] is inf"),
    ("sdpo_loss", {"step_weight": math.inf}, "^step_weight is inf"),
    ("sdpo_loss", {"clip_range": -1.0}, "^clip_range is -1"),
    ("sdpo_loss", {"advantage_clip": -1.0}, "^advantage_clip is -1"),
    ("grpo_loss", {"variant": "ppo"}, "^variant is 'ppo'; expected one of clip, guard, dppo"),
    ("grpo_loss", {"kl": "k3"}, "^kl is 'k3'; expected one of x, v, gaussian, published"),
    ("grpo_loss", {"kl_weight": 0.1}, "^ref_pred is missing; kl_weight"),
    ("grpo_loss", {"kl_weight": -0.1, "ref_pred": X}, "^kl_weight is -0.1"),
    ("grpo_loss", {"ref_pred": X[:3]}, r"^ref_pred has shape \(3, 3\); expected \(4, 3\)"),
    ("grpo_loss", {"ref_pred": WANTING_X}, "^ref_pred requires a gradient"),
    ("grpo_loss", {"ref_pred": X.to(META)}, "^ref_pred is on meta"),
    *(
        ("grpo_loss", {"variant": variant, "old_pred": None, "old_log_prob": log_prob},
         f"^old_pred is missing; variant '{variant}' needs it")
        for variant in ("guard", "dppo") for log_prob in (LOG, None)
    ),
    *(
        ("grpo_loss", {"variant": "dppo", name: value}, f'^{name} was given, but variant is "dppo"')
        for name, value in (("clip_range", 1e-3), ("clip_range_high", 1e-3),
                            ("advantage_clip", 1.0), ("clip_range", torch.tensor(1e-4)))
    ),
    ("grpo_loss", {"variant": "dppo", "divergence_limit": 0.0}, "^divergence_limit is 0"),
    ("grpo_loss", {"clip_range": 1.5}, r"^clip_range is 1.5; expected a number in \[0, 1\]"),
    ("grpo_loss", {"clip_range": None}, "^clip_range is missing"),
    ("grpo_loss", {"clip_range_high": -1.0}, "^clip_range_high is -1"),
    ("grpo_loss", {"advantage_clip": 0.0}, "^advantage_clip is 0"),
    ("grpo_loss", {"sample_weight": torch.ones(3)}, r"^sample_weight is a .*shape \(3,\)"),
    ("grpo_loss", {"sample_weight": -1.0}, "^sample_weight is -1"),
    ("step_dpo_loss", {"beta": None}, "^beta is missing"),
    ("step_dpo_loss", {"beta": 0.0}, "^beta is 0"),
    ("step_dpo_loss", {"beta": torch.ones(4)}, r"^beta is a .*shape \(4,\); expected .*\(2,\)"),
    ("step_dpo_loss", {"clip": 0.0}, r"^clip is 0.0; expected a number in \(0, 1\]"),
    ("step_dpo_loss", {"clip": 1.5}, "^clip is 1.5"),
    ("step_dpo_loss", {"x_next": (X[:2], X[:3])}, "^x_next has winners of shape .* but losers"),
    ("step_dpo_loss", {"x_next": (X,)}, "^x_next must be a tensor or a tuple .*tuple of 1"),
    ("step_dpo_loss", {"model_pred": (X[:2], X[:2].to(META))}, r"^model_pred\[1\] is on meta"),
    ("step_dpo_loss", {"pair_weight": torch.ones(4)}, r"^pair_weight is a .*shape \(4,\)"),
    ("nft_loss", {"reward": None}, "^reward is missing"),
    ("nft_loss", {"reward": 1.5}, r"^reward is 1.5; expected a number in \[0, 1\]"),
    ("nft_loss", {"reward": torch.full((4,), -0.1)}, "^reward contains -0.1"),
    ("nft_loss", {"t": torch.ones(3)}, r"^t is a .*shape \(3,\)"),
    ("nft_loss", {"t": -1.0}, "^t is -1"),
    ("nft_loss", {"beta": 0.0}, "^beta is 0"),
    ("nft_loss", {"adaptive": 1}, "^adaptive must be True or False, got a int"),
    ("nft_loss", {"kl_weight": 0.1}, "^ref_pred is missing; kl_weight"),
    *(
        (function, given, message) for function in GOOD for given, message in (
            ({"mask": torch.ones(4, 2)}, r"^mask has shape \(4, 2\).*expected"),
            ({"mask": torch.ones(4, 3).long()}, "^mask has dtype torch.int64; expected bool"),
            ({"reduction": "avg"}, "^reduction is 'avg'; expected"),
            ({"impl": "cuda"}, "^impl is 'cuda'; expected"),
            ({"dro_temperature": 0.5}, "^dro_temperature was given, but reduction is 'mean'"),
            ({"huber_c": 0.1}, r"got unexpected argument huber_c; it accepts [^.\[]*mask[^.\[]*$"),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("function", "given", "message"), NUMBERS)
def test_bad_numbers_are_named(function: str, given: dict[str, Any], message: str) -> None:
    """As the caller calls them."""
    with pytest.raises((TypeError, ValueError), match=message):
        getattr(fastpref, function)(**{**GOOD[function], **given})


@pytest.mark.parametrize("function", GOOD)
def test_what_bad_input_is_a_change_of_is_good(function: str) -> None:
    found = getattr(fastpref, function)(**GOOD[function])
    assert all(value is None or value.isfinite().all() for value in found)
    assert found.loss.dtype == FP32


# The links in both dialects -----------------------------------------------------------------------


GROUPS: list[Group] = [
    *(link for pair in links.GRPO.values() for link in pair), *links.GRPO_OF_LOG,
    *links.STEP_DPO, *links.STEP_DPO_OF_LOG, links.SDPO, links.SDPO_OF_LOG,
    *(link for pair in links.NFT.values() for link in pair),
]  # fmt: skip


@pytest.mark.parametrize("link", GROUPS, ids=lambda link: link.name)
def test_slopes_of_links_are_autograds(link: Group) -> None:
    """By each member's error or gap, drift and distance from the anchor, as the text in PyTorch
    says of itself; where ratios are clipped and where they are not."""
    n = 64
    generator = torch.Generator().manual_seed(3)

    def rand(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator, dtype=FP64)

    usual = {
        "clip_range": (0.01, 0.1), "clip_range_high": (0.01, 0.2), "clip": (0.05, 0.3),
        "advantage": (-1.0, 1.0), "advantage_clip": (0.3, 0.9), "divergence_limit": (0.1, 0.4),
        "beta": (0.1, 2.0), "reward": (0.0, 1.0), "transition.normalized": (0.0, 1.0),
    }  # fmt: skip
    scalars = []
    for name in link.hyper:
        scalars.append(rand(*usual.get(name.split("[")[0], (0.5, 1.0))))
    of_log = link.name.endswith("of_log") or "of_log_" in link.name
    anchored = link.name.endswith("_kl")
    sums, leaves = [], []
    for _ in range(link.members):
        ref = rand(-3.0, -1.0) if of_log else rand(0.5, 1.0)
        of_gap = rand(-0.4, 0.4)
        err = rand(0.2, 1.0) if of_log else (ref + of_gap).detach()
        moving = err.requires_grad_() if of_log else of_gap.requires_grad_()
        each = [err, err - ref if of_log else of_gap, ref]
        own = [moving]
        if link.drift:
            each.append(rand(0.1, 0.5).requires_grad_())
            own.append(each[-1])
        if link.mixed:
            each += [rand(0.5, 1.0), rand(0.5, 1.0)]
        if anchored:
            each.append(rand(0.1, 0.5).requires_grad_())
            own.append(each[-1])
        sums.append(tuple(each))
        leaves.append(own)
    value, slopes, scores = link.torch(tuple(sums), None, tuple(scalars), 0.0)
    assert value.shape == (n,)
    assert len(scores) == len(link.scores)
    flat = [leaf for own in leaves for leaf in own]
    wanted = torch.autograd.grad(value.sum(), flat, materialize_grads=True)
    found = [slope for own in slopes for slope in own]
    assert len(found) == len(flat)
    assert any(grad.any() for grad in wanted)
    for slope, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close((slope + torch.zeros(n)).detach(), exact, rtol=1e-9, atol=1e-12)
