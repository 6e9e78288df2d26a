"""Each link alone, in one small program and on tensors and floats, against the published formula in
50 digits: errors from 0 to 1e4, beta from 1e-3 to 2e4, winner = loser, policy = reference."""
# mypy: disable-error-code="arg-type, assignment, index, union-attr, no-untyped-def"

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from mpmath import mpf
from torch import Tensor

import fastpref
import oracles
from fastpref.dispatch import Impl
from fastpref_kernels import KNOBS, LINKS, Link
from fastpref_kernels.knobs import pair_losses, pair_losses_jit

FP32, FP64 = torch.float32, torch.float64
BETAS: list[dict[str, float]] = [{}, {"beta": 1e-3}, {"beta": 2e4}]


def tried(link: str) -> list[dict[str, float]]:
    """Hyper-parameters, besides a link's defaults."""
    formula = oracles.FORMULAS[link]
    each = [*(BETAS if "beta" in LINKS[link].hyper else [{}]), *formula.also]
    return [{**formula.given, **hyper} for hyper in each]


CASES = [(link, hyper) for link in LINKS for hyper in tried(link)]
# All slopes but those that are differences are right relative to themselves, down to 1e-20.
DIFFERENCES = [link for link in LINKS if oracles.FORMULAS[link].differences]
UNBOUNDED = [link for link in LINKS if oracles.FORMULAS[link].unbounded]  # in the loser's error
ERRORS = [0.0, *(10.0**k for k in range(-8, 5)), 0.5, 2.0, 3.99, 4.01, 30.0, 170.0, 178.0, 250.0]
FEWER = [0.0, 1e-8, 1e-5, 1e-3, 0.1, 1.0, 30.0, 1e4]


def complete(link: str, hyper: Mapping[str, float]) -> dict[str, float]:
    defaults = {name: h.default for name, h in LINKS[link].hyper.items() if h.default is not None}
    return {**defaults, **hyper}


def required(link: str) -> dict[str, float]:
    """Hyper-parameters that have no default."""
    needed = [name for name, h in LINKS[link].hyper.items() if h.default is None]
    return {name: 0.3 if name == "label_smoothing" else 0.7 for name in needed}


def neutral(link: str) -> dict[str, Any]:
    """What sets the knobs that a link has at values of its own to neutral ones."""
    return {name: KNOBS[name].default for name in LINKS[link].knobs}


# A link alone ------------------------------------------------------------------------------------


@triton.jit
def link_alone(
    out, errors, numbers, N_SCORE: tl.constexpr, N_HYPER: tl.constexpr, N: tl.constexpr,
    SCORE: tl.constexpr, SHAPE: tl.constexpr, SFT_WEIGHT: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """out (4, SIZE): loss, slopes, margin, of errors (4, SIZE) and numbers (N, SIZE)."""
    at = tl.arange(0, SIZE)
    of_score, of_shape, knobs = (), (), ()
    for i in tl.static_range(N):
        number = tl.load(numbers + i * SIZE + at)
        if i < N_SCORE:
            of_score = of_score + (number,)  # noqa: RUF005 (the jit knows no unpacking)
        elif i < N_HYPER:
            of_shape = of_shape + (number,)  # noqa: RUF005
        else:
            knobs = knobs + (number,)  # noqa: RUF005
    err_w = tl.load(errors + at)
    err_l = tl.load(errors + SIZE + at)
    gap_w = tl.load(errors + 2 * SIZE + at)
    gap_l = tl.load(errors + 3 * SIZE + at)
    loss, slope_w, slope_l, margin = pair_losses_jit(
        err_w, err_l, gap_w, gap_l, of_score, of_shape, knobs, SCORE, SHAPE, SFT_WEIGHT
    )
    tl.store(out + at, loss)
    tl.store(out + SIZE + at, slope_w)
    tl.store(out + 2 * SIZE + at, slope_l)
    tl.store(out + 3 * SIZE + at, margin)


def by_triton(link: Link, errors: Tensor, numbers: Tensor, device: torch.device) -> Tensor:
    n = errors.shape[1]
    size = triton.next_power_of_2(n)
    padded, given = torch.ones(4, size), torch.full((len(numbers), size), 0.25)
    padded[:, :n], given[:, :n] = errors, numbers
    out = torch.full((4, size), math.nan, device=device)
    link_alone[(1,)](
        out, padded.to(device), given.to(device), len(link.score.hyper), len(link.hyper),
        len(numbers), link.score.triton, link.shape.triton, link.sft_weight, size,
    )  # fmt: skip
    return out.cpu()[:, :n]


def on_tensors(dtype: torch.dtype, link: Link, errors: Tensor, numbers: Tensor) -> Tensor:
    errors, numbers = errors.to(dtype), numbers.to(dtype)
    made = pair_losses(link, tuple(errors[:2]), tuple(errors[2:]), list(numbers))
    return torch.stack([torch.zeros_like(errors[0]) + each for each in made])


def on_floats(link: Link, errors: Tensor, numbers: Tensor) -> Tensor:
    each = zip(errors.T.tolist(), numbers.T.tolist(), strict=True)
    made = [pair_losses(link, tuple(e[:2]), tuple(e[2:]), n) for e, n in each]
    return torch.tensor(made, dtype=FP64).T


def by_autograd(dtype: torch.dtype, link: Link, errors: Tensor, numbers: Tensor) -> Tensor:
    """Its slopes are the derivatives of the loss, by each error and the gap that moves with it."""
    leaves = [e.to(dtype).requires_grad_() for e in errors]
    loss, *_, margin = pair_losses(link, tuple(leaves[:2]), tuple(leaves[2:]), [*numbers.to(dtype)])
    grads = torch.autograd.grad(
        loss.sum() + 0.0 * margin.sum().nan_to_num(), leaves, allow_unused=True
    )
    by_err_w, by_err_l, by_gap_w, by_gap_l = (
        torch.zeros_like(loss) if grad is None else grad for grad in grads
    )
    return torch.stack([loss, by_err_w + by_gap_w, by_err_l + by_gap_l, margin]).detach()


SLOPES = ("winner's slope", "loser's slope")
CLOSED = ("triton", "fp32", "fp64", "floats")  # whose slopes are the text's
DIALECTS = (*CLOSED, "autograd fp32", "autograd fp64")


def run(
    dialect: str, link: Link, errors: Tensor, numbers: Tensor, device: torch.device
) -> np.ndarray:
    """(loss, slope_w, slope_l, margin) in fp64, of each pair; errors: err_w, err_l, gap_w, gap_l;
    numbers: hyper-parameters and then, all or none, knobs."""
    if dialect == "triton":
        found = by_triton(link, errors, numbers, device)
    elif dialect == "floats":
        found = on_floats(link, errors, numbers)
    else:
        function = by_autograd if dialect.startswith("autograd") else on_tensors
        found = function(FP64 if dialect.endswith("fp64") else FP32, link, errors, numbers)
    return found.double().numpy()


# The truth ---------------------------------------------------------------------------------------


class Truth(NamedTuple):
    """Of some pairs. A slope is (from below, from above): they differ at a kink."""

    loss: np.ndarray
    margin: np.ndarray
    scores: np.ndarray  # (2, B): winner's and loser's
    slopes: np.ndarray  # (2, 2, B): winner's and loser's, each (from below, from above)


def for_oracles(link: str, errors: Tensor) -> list[oracles.Errors]:
    """Errors of model and reference, of which the gaps are exact differences."""
    pairs = [[mpf(e) for e in pair] for pair in errors.T.tolist()]
    if not LINKS[link].score.needs_ref:
        return [oracles.Errors(w, l) for w, l, *_ in pairs]
    return [oracles.Errors(w, l, w - gap_w, l - gap_l) for w, l, gap_w, gap_l in pairs]


@functools.cache
def grid(link: str, many: bool) -> Tensor:
    """(4, B): all pairs of errors, and near-ties at each of them. What the reference says is by
    turns the same, nearly the same, something better, something worse."""
    errors = torch.tensor(ERRORS if many else FEWER)
    w, l = (each.flatten() for each in torch.meshgrid(errors, errors, indexing="ij"))
    ties = errors.repeat(4)
    near = ties * torch.tensor([1 + 1e-6, 1 - 1e-3, 1.02, 1.0]).repeat_interleave(len(errors))
    gaps = torch.tensor([0.0, -2e-4, 0.51, -0.69, 2e-3])
    turn = torch.arange(len(w) + len(ties))
    of_l = torch.where(turn < len(w), turn // 5, turn)  # ties have the same reference, too
    both = torch.stack([torch.cat([w, ties]), torch.cat([l, near])])
    if not LINKS[link].score.needs_ref:
        return both.repeat(2, 1)
    return torch.cat([both, both * gaps[torch.stack([turn, of_l]) % 5]])


def truth_of(pairs: Sequence[oracles.Pair]) -> Truth:
    slopes = [[[*map(float, t.slope_w)], [*map(float, t.slope_l)]] for t in pairs]
    return Truth(
        np.array([float(t.loss) for t in pairs]),
        np.array([float(t.margin) for t in pairs]),
        np.array([[float(t.score_w), float(t.score_l)] for t in pairs]).T,
        np.array(slopes).transpose(1, 2, 0),
    )


@functools.cache
def truth_of_grid(link: str, hyper: tuple[tuple[str, float], ...], many: bool) -> Truth:
    numbers = complete(link, dict(hyper))
    return truth_of([oracles.pair(link, e, numbers) for e in for_oracles(link, grid(link, many))])


def assert_true(
    link: str, numbers: Mapping[str, float], errors: Tensor, got: np.ndarray, truth: Truth,
    unit: float = 1.0, differences: bool = False,
) -> None:  # fmt: skip
    """unit: how much finer than fp32 a number's precision is. differences: whether slopes are."""
    loss, slope_w, slope_l, margin = got
    score_w, score_l = truth.scores
    # scores are held to 6e-8 of themselves, and a little is lost on the way
    largest = np.maximum(abs(score_w), abs(score_l))
    slack = unit * (1e-5 * abs(truth.margin) + 5e-7 * largest)
    off = abs(margin - truth.margin)
    bad = ~(off <= slack)
    assert not bad.any(), f"margin off by {off[bad]} at {errors[:, bad]}"
    told = slack <= 0.01  # else the margin lies where the slope changes by more than can be said
    err_w = errors[0].double().numpy()
    for name, slope, wanted, other in (
        (SLOPES[0], slope_w, truth.slopes[0], truth.slopes[1]),
        (SLOPES[1], slope_l, truth.slopes[1], truth.slopes[0]),
    ):
        least, most = wanted.min(axis=0), wanted.max(axis=0)  # at a kink, anything between
        allowed = (1e-3 * unit + 3 * slack) * np.maximum(abs(least), abs(most)) + 1e-20
        if differences:
            pull = np.divide(abs(score_w), err_w, out=np.zeros_like(err_w), where=err_w > 0)
            scale = numbers["beta"] if link not in ("dpo_ipo", "dpo_sppo_hard") else 1.0
            offset = 1 / numbers["beta"] if scale == 1 else 1.0
            terms = np.maximum(scale * (offset + slack / unit * 1e5), pull)
            allowed += 2e-6 * unit * np.maximum(terms, abs(other[0]))
        bad = told & ~((least - allowed <= slope) & (slope <= most + allowed))
        assert not bad.any(), f"{name} {slope[bad]} at {errors[:, bad]}: {wanted[:, bad]}"
    rounding = unit * (1e-5 * abs(truth.loss) + 1e-6) + 3 * slack * (1 + abs(truth.loss))
    if LINKS[link].score.takes_both:  # a difference of errors that are held to 6e-8 each
        rounding += unit * 2.0**-24 * (errors[0] + errors[1]).double().numpy()
    bad = told & ~(abs(loss - truth.loss) <= rounding)
    assert not bad.any(), f"loss {loss[bad]} at {errors[:, bad]}: {truth.loss[bad]}"


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(("link", "hyper"), CASES)
def test_every_error_from_0_to_1e4(
    link: str, hyper: dict[str, float], dialect: str, device: torch.device
) -> None:
    many = link == "mapo" and "beta" not in hyper
    numbers, errors = complete(link, hyper), grid(link, many)
    given = torch.tensor([*numbers.values()], dtype=FP64)[:, None].expand(-1, errors.shape[1])
    got = run(dialect, LINKS[link], errors, given, device)
    fine = dialect in ("fp64", "floats", "autograd fp64")
    truth = truth_of_grid(link, tuple(hyper.items()), many)
    # autograd adds dpo_alpha's slope up from terms that nearly cancel
    differences = link in DIFFERENCES or (link == "dpo_alpha" and dialect.startswith("autograd"))
    assert_true(link, numbers, errors, got, truth, 1e-7 if fine else 1.0, differences)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("link", LINKS)
def test_every_knob_at_once(link: str, dialect: str, device: torch.device) -> None:
    """At values that differ from pair to pair."""
    hyper, knobs, errors = knobbed(link)
    given = torch.stack([*hyper.values(), *knobs.values()]).to(FP64)
    got = run(dialect, LINKS[link], errors, given, device)
    fine = dialect in ("fp64", "floats", "autograd fp64")
    truth, sizes = truth_with_knobs(link)
    # psi's series ends at 1e-14 of its value and 2e-13 of its slope
    allowed = (1e-12 if fine else 8 * torch.finfo(FP32).eps) * sizes
    for name, *row in zip(("loss", *SLOPES, "margin"), got, truth, allowed, strict=True):
        off = abs(row[0] - row[1])
        assert (off <= row[2]).all(), f"{name} off by {off}, allowed {row[2]}"


@functools.cache
def knobbed(link: str) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Hyper-parameters and knobs by name, and errors and gaps (4, 24), of 24 pairs."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, 24, generator=generator)

    defaults = complete(link, required(link))
    hyper = {name: value * draw(0.8, 1.2) for name, value in defaults.items()}
    knobs = {
        "logit_scale": draw(0.5, 2.0) * draw(-1.0, 1.0).sign(),
        "loser_weight": draw(0.2, 1.5),
        "pair_weight": draw(0.5, 3.0),
        "label_smoothing": draw(0.05, 0.4),
        "sft_weight": draw(0.1, 1.0),
        "prior_weight": draw(0.1, 1.0),
        "sample_weight_w": draw(0.2, 2.0),
        "sample_weight_l": draw(0.2, 2.0),
    }
    if "label_smoothing" in hyper:  # it is a part of the link's own, and no knob beside it
        knobs["label_smoothing"] *= 0.0
    errors = draw(0.5, 1.5, 2)
    score_of_1 = defaults.get("beta", 1.0) if "beta" in LINKS[link].score.hyper else 1.0
    gaps = draw(-1.0, 1.0, 2) / score_of_1 if LINKS[link].score.needs_ref else errors
    return hyper, knobs, torch.cat([errors, gaps])


@functools.cache
def truth_with_knobs(link: str) -> tuple[np.ndarray, np.ndarray]:
    """(4, 24) each: loss, slopes and margin, and the sizes of what they are sums of."""
    hyper, knobs, errors = knobbed(link)
    values, sizes = [], []
    for i, pair in enumerate(for_oracles(link, errors)):
        numbers = {name: float(value[i]) for name, value in (knobs | hyper).items()}
        gaps = (float(errors[2, i].abs()), float(errors[3, i].abs()))
        loss, margin, *slopes = map(float, oracles.columns_of(link, pair, numbers))
        moved, margin_moved, *slopes_moved = map(float, oracles.moves_of(link, pair, gaps, numbers))
        of_w, of_l = (numbers[f"sample_weight_{half}"] * numbers["pair_weight"] for half in "wl")
        fits = (of_w * numbers["sft_weight"], of_l * numbers["prior_weight"])
        pulls = [abs(s) + m + fit for s, m, fit in zip(slopes, slopes_moved, fits, strict=True)]
        values.append([loss, *slopes, margin])
        sizes.append([abs(loss) + moved, *pulls, abs(margin) + margin_moved])
    return np.array(values).T, np.array(sizes).T


def numbers_of(link: str, n_pairs: int, **knobs: float) -> Tensor:
    """Hyper-parameters at their defaults, and where any knob is given, all of them."""
    values = [*complete(link, required(link)).values()]
    if knobs:
        defaults = {name: hyper.default for name, hyper in KNOBS.items()}
        values += (defaults | {"sft_weight": LINKS[link].sft_weight} | knobs).values()
    return torch.tensor(values, dtype=FP64)[:, None].expand(-1, n_pairs)


@pytest.mark.parametrize("dialect", CLOSED)
@pytest.mark.parametrize("link", LINKS)
def test_knobs_that_are_neutral_change_nothing(
    link: str, dialect: str, device: torch.device
) -> None:
    *_, errors = knobbed(link)
    n_pairs = errors.shape[1]
    plain, neutral = (
        run(dialect, LINKS[link], errors, numbers_of(link, n_pairs, **knobs), device)
        for knobs in ({}, {"loser_weight": 1.0})
    )
    np.testing.assert_allclose(neutral, plain, rtol=1e-6)


# What is not a number -----------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", CLOSED)
@pytest.mark.parametrize("link", LINKS)
def test_an_overflowed_error_stays_on_its_side(
    link: str, dialect: str, device: torch.device
) -> None:
    """Squares beyond fp32 are inf; that of the loser must not make NaN of a bounded link's rest."""
    errors = torch.tensor([1.0, math.inf, 0.0, math.inf])[:, None]
    if not LINKS[link].score.needs_ref:
        errors[2] = errors[0]
    for knobs in ({}, {"loser_weight": 0.5}, neutral(link)):
        got = run(dialect, LINKS[link], errors, numbers_of(link, 1, **knobs), device)
        loss, slope_w, slope_l, _ = got[:, 0]
        if link in UNBOUNDED:
            assert abs(loss) == math.inf
        else:
            assert np.isfinite([loss, slope_w, slope_l]).all(), got
            assert abs(slope_l) <= 1e3  # times an element of 1e30 this is finite


@pytest.mark.parametrize("dialect", CLOSED)
@pytest.mark.parametrize("link", LINKS)
def test_nan_comes_out_as_nan(link: str, dialect: str, device: torch.device) -> None:
    """Of its pair alone; and the slope on its side is not 0, by which it would go unseen."""
    errors = torch.rand(4, 6)
    for half in (0, 1):
        errors[half::2, 1 + 3 * half] = math.nan
    for knobs in ({}, {"loser_weight": 0.5}):
        got = run(dialect, LINKS[link], errors, numbers_of(link, 6, **knobs), device)
        assert np.isnan(got[3]).tolist() == [False, True, False, False, True, False]
        of_loser = link != "sft"  # which does not look at it
        assert np.isnan(got[0]).tolist() == [False, True, False, False, of_loser, False]
        assert got[1, 1] != 0
        assert got[2, 4] != 0 or not of_loser
        assert np.isfinite(got[:, [0, 2, 3, 5]]).all()


@pytest.mark.parametrize("link", [link for link in LINKS if not oracles.FORMULAS[link].detached])
def test_second_derivatives_of_the_value(link: str) -> None:
    """By finite differences of the first ones; with knobs, too."""
    errors = [(0.3 * torch.rand(3, dtype=FP64)).requires_grad_() for _ in range(4)]
    beta = {"beta": 3.0} if "beta" in LINKS[link].hyper else {}
    hyper = [*complete(link, required(link) | beta).values()]
    smoothing = 0.0 if "label_smoothing" in LINKS[link].hyper else 0.2
    knobs = [
        torch.rand(3, dtype=FP64),
        0.4,
        1.3,
        smoothing,
        0.3,
        0.2,
        torch.rand(3, dtype=FP64),
        0.6,
    ]
    for numbers in (hyper, [*hyper, *knobs]):

        def loss(*errors: Tensor, numbers: Sequence[Any] = numbers) -> Tensor:
            return pair_losses(LINKS[link], errors[:2], errors[2:], numbers)[0]

        assert torch.autograd.gradcheck(loss, errors)
        assert torch.autograd.gradgradcheck(loss, errors)


# Through the whole kernels ------------------------------------------------------------------------

# Links of each kind: without a reference and with, of one hyper-parameter and of three, one number
# for all pairs or one for each, and a slope that is a difference.
WHOLE = ("mapo", "dpo_sigmoid", "dpo_apo_down", "smpo", "budget_dpo")


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("link", WHOLE)
def test_errors_of_single_elements(link: str, impl: Impl, device: torch.device) -> None:
    """Samples of one element, whose error is its square; here the gradient shows the slope."""
    numbers = complete(link, required(link))
    wanted = grid(link, False)[:, ::2]  # 48 pairs: more than the PyTorch path works out in floats
    root_w, root_l = wanted[:2].sqrt()
    pred = torch.cat([root_w, root_l])[:, None].to(device).requires_grad_()
    options: dict[str, Any] = {"link": link, "reduction": "none", "impl": impl, **required(link)}
    errors = torch.stack([root_w, root_l]).double() ** 2
    ref = torch.zeros_like(errors)
    if LINKS[link].score.needs_ref:
        root = (wanted[:2] - wanted[2:]).clamp(min=0).sqrt()
        options["ref_pred"] = root.reshape(-1, 1).to(device)
        ref = root.double() ** 2
    out = fastpref.pair_loss(pred, torch.zeros_like(pred), **options)
    (grad,) = torch.autograd.grad(out.loss.sum(), pred)
    assert grad.isfinite().all()
    slopes = (grad[:, 0] / (2 * pred.detach()[:, 0])).cpu().double().view(2, -1).numpy()
    each = [
        oracles.pair(link, oracles.Errors(*map(mpf, four)), numbers)
        for four in torch.cat([errors, ref]).T.tolist()
    ]
    truth = truth_of(each)
    slopes = np.where(errors.numpy() == 0, truth.slopes.mean(axis=1), slopes)  # there it is 0 / 0
    got = np.stack([out.loss.detach().cpu(), *slopes, out.margin.cpu()])
    assert_true(link, numbers, errors, got, truth, differences=link in DIFFERENCES)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("link", WHOLE[:2])
def test_an_overflow_in_a_whole_kernel(link: str, impl: Impl, device: torch.device) -> None:
    pred = torch.tensor([[1.0], [1e30]], device=device, requires_grad=True)
    ref = {"ref_pred": torch.ones_like(pred)} if LINKS[link].score.needs_ref else {}
    options: dict[str, Any] = {"link": link, "impl": impl, **ref}
    for knobs in ({}, {"loser_weight": 0.5, "prior_weight": 0.0}):
        out = fastpref.pair_loss(pred, torch.zeros_like(pred), **(options | knobs))
        (grad,) = torch.autograd.grad(out.loss, pred)
        assert out.loss.isfinite()
        assert grad.isfinite().all()


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("link", WHOLE[:2])
@pytest.mark.parametrize("half", [0, 1])
def test_nan_in_a_whole_kernel(link: str, half: int, impl: Impl, device: torch.device) -> None:
    pred = torch.randn(8, 5, device=device)
    ref = {"ref_pred": pred.clone()} if LINKS[link].score.needs_ref else {}
    pred[4 * half + 1, 3] = math.nan
    pred.requires_grad_()
    options: dict[str, Any] = {"link": link, "impl": impl, "reduction": "none", **ref}
    out = fastpref.pair_loss(pred, torch.zeros(8, 5, device=device), **options)
    (grad,) = torch.autograd.grad(out.loss.sum(), pred)
    for field in (out.loss, out.margin, (out.mse_w, out.mse_l)[half]):
        assert field.isnan().tolist() == [False, True, False, False]
    assert grad[4 * half + 1, 3].isnan()
    assert grad[[0, 2, 3, 4, 6, 7]].isfinite().all()


@pytest.mark.parametrize("link", WHOLE[:2])
def test_gradcheck_of_the_pytorch_path(link: str) -> None:
    pred = (0.3 * torch.randn(6, 7, dtype=FP64)).requires_grad_()
    target = 0.3 * torch.randn(3, 7, dtype=FP64)
    options: dict[str, Any] = {"link": link, "reduction": "none", "beta": 3.0}
    if link == "mapo":
        options["num_train_timesteps"] = 10.0
    if LINKS[link].score.needs_ref:
        options["ref_pred"] = pred.detach() + 0.1 * torch.randn(6, 7, dtype=FP64)
    weights = torch.rand(6, dtype=FP64)
    extra = {"sample_weight": weights, "mask": torch.rand(6, 7, dtype=FP64), "sft_weight": 0.3}
    extra |= {"logit_scale": weights[:3], "loser_weight": 0.4, "pair_weight": weights[3:]}
    extra |= {"label_smoothing": 0.2, "prior_weight": 0.2}
    for more in ({}, extra):

        def loss(p: Tensor, more: dict[str, Any] = more) -> Tensor:
            return fastpref.pair_loss(p, target, **options, **more).loss

        assert torch.autograd.gradcheck(loss, pred)
        assert torch.autograd.gradgradcheck(loss, pred)


def test_the_published_code_really_breaks_where_we_say() -> None:
    """The docstring's claim about exp(x) - 1 in fp32."""

    def phi(e: Tensor) -> Tensor:
        return 0.5 * e / (torch.exp(0.5 * e) - 1)

    e = torch.tensor([0.0, 1e-5, 178.0], requires_grad=True)
    value = phi(e)
    value.sum().backward()
    assert value[0].isnan()
    assert e.grad[1] > 100  # truth: -0.25
    assert e.grad[2].isnan()
