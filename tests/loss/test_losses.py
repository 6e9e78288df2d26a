"""Every public loss: each is its published formula, with every knob and every form of input, fused
and eager; and what the functions add to the links."""
# mypy: disable-error-code="arg-type, index, union-attr"

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import derived
import fastpref
import oracles
from fastpref.conventions import DPO_LOSS_TYPES
from fastpref.dispatch import Impl
from fastpref_kernels import KNOBS, LINKS

pytestmark = pytest.mark.usefixtures("poisoned")

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
B, SAMPLE = 3, (4, 5, 7)


class Case(NamedTuple):
    """A call of a public function, and what its oracle takes."""

    function: Callable[..., fastpref.LossOutput]
    options: dict[str, Any]
    formula: str
    numbers: dict[str, Any]
    swap: bool = False

    @property
    def needs_ref(self) -> bool:
        return LINKS[self.formula].score.needs_ref


def numbers(formula: str) -> dict[str, Any]:
    called = oracles.FORMULAS[formula].call
    return {k: torch.tensor(v) if isinstance(v, tuple) else v for k, v in called.items()}


def dpo(loss_type: str) -> Case:
    given = {"beta": 800.0, **numbers(f"dpo_{loss_type}")}
    return Case(fastpref.dpo_loss, {"loss_type": loss_type, **given}, f"dpo_{loss_type}", given)


PROB = torch.tensor([0.9, 0.5, 0.3])
SIGN = torch.tensor([1.0, -1.0, 1.0])
CASES = {  # functions with a link of their own name; and then those that say more
    name: Case(getattr(fastpref, f"{name}_loss"), numbers(name), name, numbers(name))
    for name in oracles.FORMULAS
    if hasattr(fastpref, f"{name}_loss")
}
CASES |= {
    "sft": Case(fastpref.sft_loss, {"paired": True}, "sft", {}),
    "pso_hinge": Case(
        fastpref.pso_loss,
        {},
        "pso_hinge",
        {"beta": 5.0, "loser_weight": 0.1, "prior_weight": 0.5},
    ),
    "pso_sigmoid": Case(
        fastpref.pso_loss,
        {"loss_type": "sigmoid", "loser_weight": 0.3, "prior_weight": 0.0},
        "pso_sigmoid",
        {"beta": 200.0, "loser_weight": 0.3},
    ),
    **{f"dpo_{loss_type}": dpo(loss_type) for loss_type in DPO_LOSS_TYPES},
    "seppo": Case(
        fastpref.seppo_loss,
        {"sign": SIGN, "beta": 300.0},
        "seppo",
        {"beta": 300.0, "loser_weight": SIGN},
    ),
    "npo": Case(fastpref.npo_loss, {}, "dpo_sigmoid", {"beta": 2000.0}, swap=True),
    "npo_hinge": Case(
        fastpref.npo_loss,
        {"loss_type": "hinge", "beta": 50.0},
        "dpo_hinge",
        {"beta": 50.0},
        swap=True,
    ),
}

# What goes through whole kernels, too. They know no loss by name, and test_links.py has each link
# alone, so these are one of each kind: without a reference and with, with labels swapped, and with
# numbers of each pair.
FUSED = ("mapo", "dpo_sigmoid", "npo", "smpo", "seppo", "budget_dpo")
FORMS_OF = FUSED[:3]  # those that are tried in all forms, with masks and with knobs

# Losses of which label_smoothing, or loser_weight, is a part of its own.
OWN = {"dpo_robust": "label_smoothing", "dpo_exo_pair": "label_smoothing"}
OWN |= {"seppo": "loser_weight"}
OWN |= {"pso_hinge": "loser_weight", "pso_sigmoid": "loser_weight"}


class Latents(NamedTuple):
    pred: tuple[Tensor, Tensor]
    target: tuple[Tensor, Tensor]
    ref: tuple[Tensor, Tensor]


def draw(
    device: torch.device, dtypes: tuple[torch.dtype, ...] = (FP32,) * 3, drift: float = 0.01
) -> Latents:
    """Errors of 0.01; the model is `drift` away from the reference."""
    generator = torch.Generator().manual_seed(1)
    of_pred, of_target, of_ref = dtypes
    target = torch.randn(2, B, *SAMPLE, generator=generator).to(of_target)
    ref = target + 0.1 * torch.randn(2, B, *SAMPLE, generator=generator)
    pred = ref + drift * torch.randn(2, B, *SAMPLE, generator=generator)
    return Latents(*(tuple(t.to(device)) for t in (pred.to(of_pred), target, ref.to(of_ref))))


def check(
    case: Case,
    latents: Latents,
    knobs: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
    as_given: Callable[[tuple[Tensor, Tensor]], Any] = torch.cat,
    ref_errors: tuple[Tensor, Tensor] | None = None,
    target_as_given: Callable[[tuple[Tensor, Tensor]], Any] | None = None,
    fused: bool = True,
) -> None:
    """Eager PyTorch and, if `fused`, the kernels against the oracle. `knobs` go to function and
    oracle alike, `extra` (mask, reductions, ...) to both in their own way."""
    knobs, extra = knobs or {}, extra or {}
    device = latents.pred[0].device
    given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in case.options.items()}
    given |= {k: v.to(device) if isinstance(v, Tensor) else v for k, v in knobs.items()}
    if case.needs_ref:
        given["ref_mse" if ref_errors else "ref_pred"] = as_given(ref_errors or latents.ref)
    results = []
    for impl in ("torch", "triton")[: 1 + fused]:
        tensors = [t.detach().clone().requires_grad_() for t in latents.pred]
        out = case.function(
            as_given(tuple(tensors)), (target_as_given or as_given)(latents.target),
            impl=impl, **given, **extra,
        )  # fmt: skip
        grads = torch.autograd.grad(out.loss.sum(), tensors, materialize_grads=True)
        results.append((out, grads))
    numbers = case.numbers | knobs
    weight = numbers.pop("sample_weight", None)
    if weight is not None:
        weights = weight.chunk(2) if len(weight) == 2 * B else (weight, weight)
        numbers |= dict(zip(("sample_weight_w", "sample_weight_l"), weights, strict=True))
    order = slice(None, None, -1 if case.swap else 1)
    if case.swap and weight is not None:
        numbers["sample_weight_w"], numbers["sample_weight_l"] = weights[::-1]
    mask = extra.get("mask")
    if isinstance(mask, Tensor):
        mask = (mask, mask) if mask.shape[0] == B else mask.chunk(2)
    truth = oracles.batch(
        case.formula,
        latents.pred[order],
        latents.target[order],
        numbers,
        extra.get("reduction", "mean"),
        ref=(ref_errors or latents.ref)[order] if case.needs_ref else None,
        mask=mask[order] if mask else None,
        error_reduction=extra.get("error_reduction", "mean"),
        huber_c=case.options.get("huber_c"),
    )
    names = {"mse_w": "mse_w", "mse_l": "mse_l", "ref_mse_w": "ref_mse_w", "ref_mse_l": "ref_mse_l"}
    if case.swap:
        names = {"mse_w": "mse_l", "mse_l": "mse_w", "ref_mse_w": "ref_mse_l"}
        names |= {"ref_mse_l": "ref_mse_w"}
    (eager, eager_grads), (got, got_grads) = results[0], results[-1]
    for name in ("loss", "margin", *names):
        field, plain = getattr(got, name), getattr(eager, name)
        if name.startswith("ref") and not case.needs_ref:
            assert field is None
            assert plain is None
            continue
        assert plain.dtype == FP32
        assert not field.requires_grad or name == "loss"
        oracles.assert_three_way(name, field, plain, truth[names.get(name, name)])
    for name, grad, plain in zip(("grad_w", "grad_l")[order], got_grads, eager_grads, strict=True):
        assert plain.dtype == latents.pred[0].dtype
        oracles.assert_three_way(name, grad, plain, truth[name])


def test_every_link_and_every_function_is_tried() -> None:
    assert LINKS.keys() == oracles.FORMULAS.keys()
    tried = {case.function.__name__ for case in CASES.values()}
    # These have tests of their own, here and in test_beyond_pairs.py.
    assert tried == {*derived.PAIRS} - {"self_npo_loss", "dspo_loss"}
    assert {case.formula for case in CASES.values()} == LINKS.keys()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("drift", [0.01, 1e-4, 0.0])
def test_every_loss_is_its_formula(name: str, drift: float, device: torch.device) -> None:
    """For a policy that differs from the reference by 1e-4, and that is the reference, too."""
    check(CASES[name], draw(device, drift=drift), fused=name in FUSED)


@pytest.mark.parametrize("name", CASES)
def test_winner_and_loser_alike(name: str, device: torch.device) -> None:
    latents = draw(device)
    same = Latents(*((half[0], half[0]) for half in latents))
    check(CASES[name], same, fused=name in FORMS_OF)
    for impl in ("triton", "torch") if name == "mapo" else ():
        out = fastpref.mapo_loss(torch.cat(same.pred), same.target[0], impl=impl)
        assert out.margin.tolist() == [0.0] * B
        assert out.metrics()["accuracy"].item() == 0.5


@pytest.mark.parametrize("name", CASES)
def test_every_knob_at_once(name: str, device: torch.device) -> None:
    knobs: dict[str, Any] = {
        "logit_scale": torch.tensor([0.5, -1.0, 2.0]),
        "loser_weight": 0.7,
        "pair_weight": torch.tensor([1.0, 0.0, 3.0]),
        "label_smoothing": torch.tensor(0.2),
        "sft_weight": torch.tensor([0.0, 0.3, 0.6]),
        "sample_weight": torch.tensor([1.0, 2.0, 0.5, 1.5, 1.0, 0.1]),
    }
    knobs.pop(OWN.get(name, ""), None)
    fused = name in (*FORMS_OF, "smpo", "seppo")
    check(CASES[name], draw(device), knobs, {"reduction": "none"}, fused=fused)


@pytest.mark.parametrize("name", FORMS_OF)
@pytest.mark.parametrize("shape", [(2 * B, 1, 5, 7), (B, 4, 1, 7), (B, 4, 5, 7), (2 * B, 4, 5, 7)])
@pytest.mark.parametrize("error_reduction", ["mean", "sum"])
def test_mask_and_error_reduction(
    name: str, shape: tuple[int, ...], error_reduction: str, device: torch.device
) -> None:
    """A mask of each sample or of the pair, bool or float; the last one comes in halves."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device)
    mask = mask > 0.4 if shape[0] == B else mask
    mask[1] = 0  # a sample that is hidden whole
    scale = 0.02 if error_reduction == "sum" else 1.0
    extra = {"mask": mask, "error_reduction": error_reduction, "reduction": "sum"}
    halves = shape == (2 * B, 4, 5, 7)
    if halves:
        extra["mask"] = mask.chunk(2)
    as_given: Any = tuple if halves else torch.cat
    check(CASES[name], draw(device), {"logit_scale": scale}, extra, as_given)


Form = Callable[[tuple[Tensor, Tensor]], Any]
FORMS: dict[str, tuple[Form, Form, tuple[torch.dtype, ...]]] = {
    "halves": (lambda halves: halves, lambda halves: halves, (FP32, BF16, FP16)),
    "stacked, target in halves": (torch.cat, lambda halves: halves, (BF16, BF16, BF16)),
    "halves, target stacked": (lambda halves: halves, torch.cat, (FP16, FP32, FP32)),
    "channels_last": (
        lambda halves: torch.cat(halves).to(memory_format=torch.channels_last),
        torch.cat,
        (FP32, BF16, BF16),
    ),
    "sliced": (
        lambda halves: torch.cat([torch.cat(halves)] * 2, dim=-1)[..., : SAMPLE[-1]],
        lambda halves: torch.cat(halves).transpose(1, 3).contiguous().transpose(1, 3),
        (FP32, FP32, FP32),
    ),
    "shared": (torch.cat, lambda halves: halves[0], (FP32, BF16, FP32)),
    "shared, halves": (lambda halves: halves, lambda halves: halves[0], (BF16, FP32, BF16)),
}


@pytest.mark.parametrize("name", FORMS_OF)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_input(name: str, form: str, device: torch.device) -> None:
    as_given, target_as_given, dtypes = FORMS[form]
    latents = draw(device, dtypes)
    if form.startswith("shared"):
        target = latents.target[0]
        pred, ref = (
            (half[0], (half[1] - latents.target[1] + target).to(half[1].dtype))
            for half in (latents.pred, latents.ref)
        )
        latents = Latents(pred, (target, target), ref)
    check(CASES[name], latents, as_given=as_given, target_as_given=target_as_given)


@pytest.mark.parametrize("form", ["stacked", "halves"])
@pytest.mark.parametrize("name", ["dpo_sigmoid", "npo"])
def test_precomputed_errors_of_the_reference(name: str, form: str, device: torch.device) -> None:
    as_given: Any = torch.cat if form == "stacked" else tuple
    latents = draw(device)
    errors = tuple(
        (r - t).square().flatten(1).mean(dim=1)
        for r, t in zip(latents.ref, latents.target, strict=True)
    )
    check(CASES[name], latents, as_given=as_given, ref_errors=errors)


@pytest.mark.parametrize("huber_c", [1e-3, 0.5])
@pytest.mark.parametrize("scale", [1e-6, 1e-2, 10.0])
def test_self_npo_is_pseudo_huber_and_does_not_cancel(
    huber_c: float, scale: float, device: torch.device
) -> None:
    case = Case(fastpref.self_npo_loss, {"huber_c": huber_c, "paired": True}, "sft", {})
    target = torch.zeros(2, B, *SAMPLE, device=device)
    pred = scale * torch.randn(2, B, *SAMPLE, generator=torch.Generator().manual_seed(0))
    check(case, Latents(tuple(pred.to(device)), tuple(target), tuple(target)))


def test_pseudo_huber_with_a_reference(device: torch.device) -> None:
    latents = draw(device, drift=1e-3)
    case = Case(
        lambda *args, **kw: fastpref.pair_loss(*args, link="dpo_sigmoid", **kw),
        {"huber_c": 0.05, "beta": 1000.0},
        "dpo_sigmoid",
        {"beta": 1000.0},
    )
    check(case, latents)
    check(case, latents, extra={"mask": torch.rand(2 * B, 1, 5, 7, device=device)})
    tensor = torch.tensor(0.05, device=device)
    for impl in ("triton", "torch"):
        out = [
            case.function(
                torch.cat(latents.pred), torch.cat(latents.target), torch.cat(latents.ref),
                huber_c=c, beta=1000.0, impl=impl,
            ).loss
            for c in (0.05, tensor)
        ]  # fmt: skip
        torch.testing.assert_close(out[0], out[1], rtol=1e-6, atol=0)


def test_the_gap_is_right_where_policy_and_reference_hardly_differ(device: torch.device) -> None:
    """Errors of 0.1 in fp32 hold 1e-8; a margin of 2500 gaps would be off by 2e-5 and more."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(2, 4, 64, 64, generator=generator)
    ref = target.repeat(2, 1, 1, 1) + 0.3 * torch.randn(4, 4, 64, 64, generator=generator)
    pred = ref + 1e-4 * torch.randn(4, 4, 64, 64, generator=generator)
    exact = (pred.double() - target.repeat(2, 1, 1, 1).double()).square().flatten(1).mean(1)
    exact -= (ref.double() - target.repeat(2, 1, 1, 1).double()).square().flatten(1).mean(1)
    margin = -2500 * (exact[:2] - exact[2:])
    for impl in ("triton", "torch"):
        out = fastpref.dpo_loss(pred.to(device), target.to(device), ref.to(device), impl=impl)
        assert (out.margin.double().cpu() - margin).abs().max() < 2e-8 * 2500


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_masked_elements_may_be_anything(impl: Impl, device: torch.device) -> None:
    latents = draw(device)
    pred, target, ref = (torch.cat(half) for half in latents)
    mask = torch.rand(2 * B, 1, 5, 7, generator=torch.Generator().manual_seed(0)).to(device) > 0.5
    clean = fastpref.dpo_loss(pred, target, ref, mask=mask, impl=impl)
    spoiled = torch.where(mask, pred, math.nan).requires_grad_()
    out = fastpref.dpo_loss(
        spoiled, torch.where(mask, target, math.inf), torch.where(mask, ref, math.nan),
        mask=mask, impl=impl,
    )  # fmt: skip
    assert torch.equal(out.loss, clean.loss)
    (grad,) = torch.autograd.grad(out.loss, spoiled)
    assert grad.isfinite().all()
    assert (grad == 0).eq(~mask.expand_as(grad)).all()


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_smpo_takes_each_pair_by_its_own_probability(impl: Impl, device: torch.device) -> None:
    pred, target, ref = (torch.cat(half) for half in draw(device))
    prob = PROB.to(device)
    together = fastpref.smpo_loss(pred, target, ref, prob, reduction="none", impl=impl)
    for i in range(B):
        rows = [i, B + i]
        alone = fastpref.smpo_loss(pred[rows], target[rows], ref[rows], prob[i : i + 1], impl=impl)
        torch.testing.assert_close(alone.loss, together.loss[i], rtol=1e-6, atol=0)
    assert together.margin[1] == 0.0  # as likely as not
    scale = 10 * (2 * prob - 1)
    dpo = fastpref.dpo_loss(pred, target, ref, logit_scale=scale, reduction="none", impl=impl)
    torch.testing.assert_close(dpo.loss, together.loss)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [FP16, BF16, torch.float64], ids=str)
def test_tensors_of_numbers_in_any_precision(
    dtype: torch.dtype, impl: Impl, device: torch.device
) -> None:
    """What is computed of them is computed in fp32: 5 * (2 * prob - 1) * beta would be inf in
    fp16."""
    pred, target, ref = (torch.cat(half) for half in draw(device))
    given = {"prob": PROB, "beta": torch.tensor(2e4), "sample_weight": PROB + 1}
    low = {name: value.to(device, dtype) for name, value in given.items()}
    full = {name: value.float() for name, value in low.items()}
    got, wanted = (
        fastpref.smpo_loss(pred, target, ref, impl=impl, reduction="none", **numbers)
        for numbers in (low, full)
    )
    assert got.loss.dtype == FP32
    for a, b in zip(got[:4], wanted[:4], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-20)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_metrics_may_be_changed_in_place(impl: Impl, device: torch.device) -> None:
    pred, target, _ = (torch.cat(half) for half in draw(device))
    pred.requires_grad_()
    (wanted,) = torch.autograd.grad(fastpref.mapo_loss(pred, target, impl=impl).loss, pred)
    out = fastpref.mapo_loss(pred, target, impl=impl)
    for field in out[1:4]:
        field.mul_(3.0)
    (grad,) = torch.autograd.grad(out.loss, pred)
    assert torch.equal(grad, wanted)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_losers_of_sft_are_not_trained_on_whatever_they_are(
    impl: Impl, device: torch.device
) -> None:
    pred, target, _ = (torch.cat(half) for half in draw(device))
    pred[B, 0, 0, 0] = math.nan
    pred.requires_grad_()
    out = fastpref.sft_loss(pred, target, paired=True, impl=impl)
    (grad,) = torch.autograd.grad(out.loss, pred)
    assert out.loss.isfinite()
    assert (grad[B:] == 0).all()


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_the_references_error_does_not_depend_on_the_policy(
    impl: Impl, device: torch.device
) -> None:
    pred, target, ref = (torch.cat(half) for half in draw(device))
    exact = (ref.double() - target.double()).square().flatten(1).mean(1)
    for policy in (pred, pred + 1e4):
        out = fastpref.dpo_loss(policy, target, ref, impl=impl)
        got = torch.cat(out[4:6])
        torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=0)


def test_defaults_are_said_twice_and_are_the_same() -> None:
    """In a function's signature and in its link, which `pair_loss` and `losses_from_errors` use."""
    for name, case in CASES.items():
        defaults = {
            key: value.default
            for key, value in inspect.signature(case.function).parameters.items()
            if isinstance(value.default, (int, float))
        }
        defaults.pop("sign", None)
        link = LINKS[case.formula]
        known = {key: h.default for key, h in link.hyper.items()} | dict(link.knobs)
        if name == "npo" or name.startswith("npo_"):
            assert defaults == {"beta": 2000.0}
        elif name == "dpo_exo_pair":
            assert known["label_smoothing"] is None  # 0.0, the function's, is refused
        else:
            known.setdefault("label_smoothing", KNOBS["label_smoothing"].default)
            assert defaults.items() <= known.items(), name


def test_smoothed_preference() -> None:
    low, high = 0.11543526500463486, 0.28201571106910706
    w, l = torch.tensor([0.25, 0.2, 0.21]), torch.tensor([0.2, 0.25, 0.21])
    normal = [(score.double() - low) / (high - low) for score in (w, l)]
    wanted = torch.softmax(torch.stack(normal), dim=0)[0]
    torch.testing.assert_close(fastpref.smoothed_preference(w, l).double(), wanted)
    assert fastpref.smoothed_preference(w.bfloat16(), l.bfloat16()).dtype == FP32
    one = fastpref.smoothed_preference(w * 0 + 3, w * 0 + 1, low=1.0, high=3.0)
    torch.testing.assert_close(one, torch.full((3,), 1 / (1 + math.exp(-1))))


def test_npo_is_dpo_of_the_swapped_pair(device: torch.device) -> None:
    latents = draw(device)
    swapped = [half[::-1] for half in latents]
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], device=device)
    for impl in ("triton", "torch"):
        npo = fastpref.npo_loss(
            *map(torch.cat, latents), beta=500.0, loser_weight=0.3, sft_weight=0.5,
            sample_weight=weights, impl=impl,
        )  # fmt: skip
        dpo = fastpref.dpo_loss(
            *map(torch.cat, swapped), beta=500.0, loser_weight=0.3, sft_weight=0.5,
            sample_weight=torch.cat(weights.chunk(2)[::-1]), impl=impl,
        )  # fmt: skip
        assert torch.equal(npo.loss, dpo.loss)
        assert torch.equal(npo.margin, dpo.margin)
        assert torch.equal(npo.mse_w, dpo.mse_l)
        assert torch.equal(npo.ref_mse_l, dpo.ref_mse_w)


def test_orpo_prefers_the_winner_and_the_example_it_comes_from_does_not() -> None:
    """diffusers' ratio term is logsigmoid(mse_w - mse_l)."""
    errors = torch.tensor([0.4, 0.5], requires_grad=True)
    ours = fastpref.losses_from_errors(errors, link="orpo", beta=0.1, sft_weight=0.0)
    published = -0.1 * torch.nn.functional.logsigmoid(errors[0] - errors[1])
    (grad,), (theirs,) = (torch.autograd.grad(x, errors) for x in (ours.loss, published))
    assert grad[1] < 0 < theirs[1]  # a descent step makes the loser worse; theirs makes it better
    assert ours.margin > 0


@pytest.mark.parametrize("name", CASES)
def test_losses_from_errors(name: str, device: torch.device) -> None:
    """The same loss, and by the chain rule the same gradient, from errors a trainer has."""
    case = CASES[name]
    latents = draw(device)
    numbers = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in case.numbers.items()}
    extra = {"sample_weight": torch.rand(2 * B, device=device), "pair_weight": 2.0}
    given = {"ref_pred": torch.cat(latents.ref)} if case.needs_ref else {}
    pred = torch.cat(latents.pred).requires_grad_()
    target = torch.cat(latents.target)
    whole = fastpref.pair_loss(
        pred, target, link=case.formula, swap=case.swap, **given, **numbers, **extra
    )
    (wanted,) = torch.autograd.grad(whole.loss, pred)
    mse = (pred - target).square().flatten(1).mean(1)
    ref_mse = (torch.cat(latents.ref) - target).square().flatten(1).mean(1)
    given = {"ref_mse": ref_mse} if case.needs_ref else {}
    for errors in (mse, tuple(mse.chunk(2))):
        out = fastpref.losses_from_errors(
            errors, link=case.formula, swap=case.swap, **given, **numbers, **extra
        )
        torch.testing.assert_close(out.loss, whole.loss, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(out.margin, whole.margin, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(out.mse_w, whole.mse_w)
        assert (out.ref_mse_l is None) == (whole.ref_mse_l is None)
        (grad,) = torch.autograd.grad(out.loss, pred, retain_graph=True)
        scale = wanted.abs().max().item()
        torch.testing.assert_close(grad, wanted, rtol=1e-3, atol=1e-3 * scale)


def test_a_link_from_outside(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """A new loss: its text, registered by a name, and a formula here; ops, kernels, knobs and
    checks find it there."""
    import outside_link

    monkeypatch.setitem(LINKS, "exponential", LINKS["mapo"])  # which undoes what follows
    fastpref.register_link("exponential", outside_link.EXPONENTIAL)
    formula = oracles.Formula(oracles.dpo_score, outside_link.formula)
    monkeypatch.setitem(oracles.FORMULAS, "exponential", formula)

    def exponential_loss(pred: Any, target: Any, ref_pred: Any, **knobs: Any) -> Any:
        return fastpref.pair_loss(pred, target, ref_pred, link="exponential", **knobs)

    numbers = {"beta": 300.0, "rate": 0.4}
    case = Case(exponential_loss, numbers, "exponential", numbers)
    check(case, draw(device))
    check(case, draw(device), {"label_smoothing": 0.1, "loser_weight": 0.5}, {"reduction": "sum"})
    with pytest.raises(ValueError, match=r"rate is -1\.0"):
        exponential_loss(torch.zeros(2, 3), torch.zeros(1, 3), torch.zeros(2, 3), rate=-1)


def test_the_knobs_say_what_is_neutral(device: torch.device) -> None:
    """One at a time; in the kernels, where test_links.py has each, all at once."""
    pred, target, ref = (torch.cat(half) for half in draw(device))
    for name in ("mapo", "dpo_sigmoid"):
        neutral: dict[str, Any] = {
            "sample_weight" if knob.startswith("sample_weight") else knob:
                LINKS[name].sft_weight if hyper.default is None else hyper.default
            for knob, hyper in KNOBS.items()
        }  # fmt: skip
        of_tensors = {knob: torch.tensor(value, device=device) for knob, value in neutral.items()}
        given = {"ref_pred": ref} if LINKS[name].score.needs_ref else {}
        for impl in ("triton", "torch"):
            options: dict[str, Any] = {"link": name, "impl": impl, **given}
            plain = fastpref.pair_loss(pred, target, **options).loss
            for knobs in (neutral, of_tensors):
                alone = [{knob: value} for knob, value in knobs.items()]
                for each in [knobs] if impl == "triton" else alone:
                    out = fastpref.pair_loss(pred, target, **options, **each).loss
                    torch.testing.assert_close(out, plain, rtol=1e-6, atol=0)


@pytest.mark.parametrize("source", fastpref.CONVENTIONS)
def test_beta_conversion_is_each_repositorys_own_logit(source: str) -> None:
    """By the logit each code computes, written out."""
    n, timesteps, beta = 64, 1000, 0.01
    mse = torch.tensor([0.31, 0.33], dtype=torch.float64)
    ref_mse = torch.tensor([0.32, 0.325], dtype=torch.float64)
    model, ref = (mse[0] - mse[1]).item(), (ref_mse[0] - ref_mse[1]).item()
    logits = {
        "fastpref": -0.5 * beta * (model - ref),
        "DiffusionDPO": -0.5 * beta * (model - ref),
        "DiffusionDPO-paper": -beta * timesteps * n * (model - ref),
        "diffusers-sd15": beta * (ref - model),
        "diffusers-sdxl": -0.5 * beta * (model - ref),
        "SimpleTuner": 0.5 * beta * n * (ref - model),
        "SimpleTuner-mean": 0.5 * beta * (ref - model),
        "Flow-DPO": -0.5 * beta * (model - ref),
        "Flow-Factory": -0.5 * beta * (model - ref),
        "LongCat-Image": -beta * (model - ref),
        "DiffSynth": -beta * (model - ref),
    }
    ours = fastpref.convert_beta(beta, source, n_elements=n, num_train_timesteps=timesteps)
    out = fastpref.losses_from_errors(mse, ref_mse=ref_mse, link="dpo_sigmoid", beta=ours)
    assert out.margin.item() == pytest.approx(logits[source], rel=1e-9)
    back = fastpref.convert_beta(ours, "fastpref", source, n_elements=n)
    assert back == pytest.approx(beta)


def test_beta_conversion_needs_what_it_needs() -> None:
    with pytest.raises(ValueError, match=r"n_elements is None.*SimpleTuner sums"):
        fastpref.convert_beta(1.0, "SimpleTuner")
    with pytest.raises(
        ValueError, match="target is 'kohya'; expected one of fastpref, DiffusionDPO"
    ):
        fastpref.convert_beta(1.0, "fastpref", "kohya")
    assert fastpref.convert_beta(2500.0, "diffusers-sd15") == 5000.0


@pytest.mark.parametrize("loss_type", DPO_LOSS_TYPES)
@pytest.mark.parametrize("source", fastpref.CONVENTIONS)
def test_beta_conversion_of_every_loss_type(source: str, loss_type: str) -> None:
    """The loss of a code's own margin with its own beta is ours with the converted one; where beta
    is no part of the margin (ipo, sppo_hard), up to the square of the margin's scale."""
    factor, sums, timesteps, _ = fastpref.CONVENTIONS[source]
    scale = (64 if sums else 1) * (1000 if timesteps else 1)
    mse = torch.tensor([0.31, 0.33], dtype=torch.float64)
    ref_mse = torch.tensor([0.32, 0.325], dtype=torch.float64)
    beta = 40.0 / scale
    ours = fastpref.convert_beta(beta, source, loss_type=loss_type, n_elements=64)
    knobs = {"label_smoothing": 0.1} if loss_type in ("robust", "exo_pair") else {}
    out = fastpref.losses_from_errors(
        mse, ref_mse=ref_mse, link=f"dpo_{loss_type}", beta=ours, **knobs
    )
    if loss_type in ("ipo", "sppo_hard"):
        own = fastpref.losses_from_errors(
            scale * mse, ref_mse=scale * ref_mse, link=f"dpo_{loss_type}", beta=beta
        )
        assert own.loss.item() == pytest.approx(scale**2 * out.loss.item(), rel=1e-9)
    else:
        logits = -factor * scale * beta * (mse - ref_mse)
        own = fastpref.losses_from_errors(
            -logits, ref_mse=0 * mse, link=f"dpo_{loss_type}", beta=2.0, **knobs
        )
        assert own.loss.item() == pytest.approx(out.loss.item(), rel=1e-9)


def test_beta_conversion_refuses_by_name() -> None:
    assert fastpref.convert_beta(2500.0, "diffusers-sd15", loss_type="ipo") == 2500.0
    for beta in (-1.0, 0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"^beta is .*above 0"):
            fastpref.convert_beta(beta, "fastpref")
    with pytest.raises(TypeError, match=r"^beta must be a float, got a str"):
        fastpref.convert_beta("2500", "fastpref")
    for counts in ({"n_elements": -5}, {"n_elements": 0}, {"num_train_timesteps": 0}):
        with pytest.raises(ValueError, match=r"^n.* is .*; expected at least 1"):
            fastpref.convert_beta(1.0, "SimpleTuner", **counts)
    wrong: tuple[dict[str, Any], ...] = ({"n_elements": "x"}, {"n_elements": True})
    for bad in (*wrong, {"num_train_timesteps": None}):
        with pytest.raises(TypeError, match=r"^n.* must be an int"):
            fastpref.convert_beta(1.0, "SimpleTuner", **bad)
    with pytest.raises(ValueError, match=r"^source is \['x'\]; expected one of"):
        fastpref.convert_beta(1.0, ["x"])
    with pytest.raises(ValueError, match=r"^loss_type is 'kto'; expected one of sigmoid"):
        fastpref.convert_beta(1.0, "fastpref", loss_type="kto")


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("n_samples", [1, 3, 4])
def test_an_unpaired_batch_is_trained_on_whole(
    impl: Impl, n_samples: int, device: torch.device
) -> None:
    pred, target = torch.randn(2, n_samples, 3, 5, device=device)
    pred.requires_grad_()
    weight = torch.linspace(0.5, 2.0, n_samples, device=device)
    c = 0.2
    for function, errors, options in (
        (fastpref.sft_loss, (pred - target).square(), {}),
        (fastpref.self_npo_loss, ((pred - target).square() + c * c).sqrt() - c, {"huber_c": c}),
    ):
        out = function(pred, target, paired=False, pair_weight=weight, impl=impl, **options)
        per_sample = errors.flatten(1).mean(1)
        wanted = (weight * per_sample).mean()
        torch.testing.assert_close(out.loss, wanted)
        torch.testing.assert_close(out.mse_w, per_sample.detach())
        got, exact = (torch.autograd.grad(loss, pred)[0] for loss in (out.loss, wanted))
        torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-7)
        assert got.flatten(1).any(1).all()


@pytest.mark.parametrize("function", [fastpref.sft_loss, fastpref.self_npo_loss])
def test_half_of_a_batch_is_not_trained_on_in_silence(function: Any) -> None:
    pred, target = torch.randn(2, 4, 3)
    with pytest.raises(ValueError, match=r"^paired is missing.*paired=True.*paired=False"):
        function(pred, target)
    with pytest.raises(ValueError, match=r"^paired is False, but"):
        function(tuple(pred.chunk(2)), target[:2], paired=False)
    with pytest.raises(TypeError, match=r"^paired must be True or False, got 1"):
        function(pred, target, paired=1)
    for knob in ({"swap": True}, {"prior_weight": 1.0}):
        with pytest.raises(TypeError, match=r"was given with paired=False.*no losers"):
            function(pred, target, paired=False, **knob)
    with pytest.raises(ValueError, match=r"^target has shape \(2, 3\).*unpaired batch"):
        function(pred, target[:2], paired=False)
    pairs = function(pred, target, paired=True).loss
    for form in ((tuple(pred.chunk(2)), target), (tuple(pred.chunk(2)), tuple(target.chunk(2)))):
        assert torch.equal(function(*form).loss, pairs)
    shared = function(pred, target[:2]).loss  # which says by itself that these are pairs
    assert torch.equal(shared, function(pred, target[:2].repeat(2, 1), paired=True).loss)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_drops_are_exact_where_errors_cancel(impl: Impl, device: torch.device) -> None:
    """Policy and reference differ by 1e-4: the difference of their errors has lost most digits."""
    target, off, drift = torch.randn(3, 4, 4096, device=device)
    ref = target + 3 * off
    pred = ref + 1e-4 * drift
    wanted = ((pred.double() - target).square() - (ref.double() - target).square()).mean(1)
    for mask in (None, torch.ones(4, 4096, device=device)):
        for function in (fastpref.dpo_loss, fastpref.npo_loss):
            out: Any = function(pred, target, ref, beta=10.0, mask=mask, impl=impl)
            drops = torch.cat([out.drop_w, out.drop_l]).double()
            torch.testing.assert_close(drops, wanted, rtol=1e-4, atol=1e-9)
    ref_mse = (ref - target).square().mean(1)
    given: Any = fastpref.npo_loss(pred, target, ref_mse=ref_mse, impl=impl)
    assert torch.equal(torch.cat([given.ref_mse_w, given.ref_mse_l]), ref_mse)
    assert torch.equal(given.drop_w, given.mse_w - given.ref_mse_w)
    assert torch.equal(given.drop_l, given.mse_l - given.ref_mse_l)
    assert fastpref.mapo_loss(pred, target).drop_w is None
