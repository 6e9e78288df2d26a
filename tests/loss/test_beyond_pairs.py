"""Losses of samples, of lists and of pairs of more sums: each is its published formula, fused and
eager, with every knob; and what holds of it besides."""
# mypy: disable-error-code="arg-type, index, misc, operator, union-attr"

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import mpmath as mp
import pytest
import torch
from torch import Tensor

import covering
import fastpref
import oracles_beyond as oracles
from oracles import assert_three_way
from oracles_beyond import Given, Setting

pytestmark = pytest.mark.usefixtures("poisoned")
each_impl = pytest.mark.parametrize("impl", ["triton", "torch"])

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
SAMPLE = (4, 5, 7)
N = math.prod(SAMPLE)
PAIRS = Setting(members=2, listed=False)


class Case(NamedTuple):
    """A public function, its formula, and the numbers that both take."""

    function: str
    loss: oracles.Loss
    numbers: dict[str, Any]
    setting: Setting = Setting()
    of_sums: oracles.Loss | None = None
    parts: tuple[str, ...] = ()
    """Of which its slopes are sums."""
    needs_ref: bool = True

    @property
    def groups(self) -> int:
        return 5 if self.setting.members == 1 else 2 if self.setting.members > 5 else 3


LABEL = torch.tensor([True, False, True, True, False])
SCORE = torch.tensor([0.3, -0.2, 0.9, 0.1, 0.25])
UTILITIES = ("kto", "loss_averse", "risk_seeking_1", "risk_seeking_2", "risk_seeking_3")


def kto(utility: str, **numbers: Any) -> Case:
    given = {"label": LABEL, "beta": 1000.0, "utility": utility, **numbers}
    return Case("kto_loss", oracles.kto, given)


def listed(name: str, members: int, beta: float) -> Case:
    """Scores in [0, 1], as RankDPO's are; in no order, and different."""
    groups = 2 if members > 5 else 3
    score = torch.rand(groups, members, generator=torch.Generator().manual_seed(members))
    loss = getattr(oracles, name)
    parts = ("better", "worse") if name == "rankdpo" else ("item", "rest")
    given = {"score": score, "beta": beta}
    return Case(f"{name}_loss", loss, given, Setting(members), parts=parts)


def lists(members: int) -> dict[str, Case]:
    return {
        f"rankdpo_{members}": listed("rankdpo", members, 5000.0),
        f"plackett_luce_{members}": listed("plackett_luce", members, 2500.0),
    }


DSPO = Case("dspo_loss", oracles.dspo, {"beta": 0.001}, PAIRS, oracles.dspo_of_sums)
CASES = {
    **{utility: kto(utility) for utility in UTILITIES},
    "risk_seeking": kto("risk_seeking", lambda_desirable=2.0, lambda_undesirable=0.3),
    "kto_weights": kto("kto", lambda_desirable=0.5, lambda_undesirable=3.0),
    **{f"{utility}_kl": kto(utility, kl=2e-4) for utility in UTILITIES},
    "kto_kl_below_0": kto("kto", kl=-3e-4),
    "ddo": Case(
        "ddo_loss", oracles.ddo, {"real": LABEL, "beta": 0.05, "alpha": 4.0},
        Setting(error_reduction="sum"),
    ),
    "ddo_strong": Case(
        "ddo_loss", oracles.ddo, {"real": LABEL, "beta": 30.0, "alpha": 0.5},
        Setting(error_reduction="sum"),
    ),
    "tgo": Case(
        "tgo_loss", oracles.tgo,
        {"score": SCORE, "threshold": 0.25, "beta": 1000.0, "confidence": 5.0},
    ),
    **lists(2), **lists(3), **lists(5), **lists(16),
    "dspo": DSPO,
    "dspo_strong": DSPO._replace(numbers={"beta": 50.0}),
    "diffusion_dro": Case(
        "diffusion_dro_loss", oracles.diffusion_dro, {"target_margin": 0.001}, PAIRS
    ),
    "linear_dpo": Case(
        "linear_dpo_loss", oracles.linear_dpo, {"beta": 1000.0, "eta": 0.05}, PAIRS
    ),
}  # fmt: skip
PAIR_CASES = {
    "dpo": Case("dpo_loss", oracles.dpo, {"beta": 2000.0}, PAIRS),
    "mapo": Case(
        "mapo_loss", oracles.mapo,
        {"beta": 0.1, "snr": 0.5, "num_train_timesteps": 1000.0}, PAIRS, needs_ref=False,
    ),
    "linear_dpo": CASES["linear_dpo"],
}  # fmt: skip
ALL = CASES | PAIR_CASES
ONE_EACH = ("kto", "ddo_strong", "tgo", "rankdpo_3", "plackett_luce_3", "dspo_strong")
NEAR = ("risk_seeking_1_kl", "diffusion_dro", "linear_dpo")
UNBATCHED = ("kto_kl", *ONE_EACH[1:], "diffusion_dro")  # where a sample's loss is its own


def draw(
    case: Case,
    device: torch.device,
    *,
    drift: float = 0.01,
    noise: float = 0.1,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (FP32, FP32, FP32),
    sample: tuple[int, ...] = SAMPLE,
    shared: bool = False,
    groups: int | None = None,
) -> Given:
    """Errors of noise^2; the model is `drift` away from the reference."""
    generator = torch.Generator().manual_seed(1)
    of_pred, of_target, of_ref = dtypes
    groups, members = groups or case.groups, case.setting.members
    rows = groups * members

    def randn(n: int) -> Tensor:
        return torch.randn(n, *sample, generator=generator)

    target = randn(groups if shared else rows).to(of_target)
    whole = target.float()
    if shared:
        whole = whole.repeat_interleave(members, 0) if case.setting.listed else whole.repeat(
            members, *[1] * len(sample)
        )  # fmt: skip
    ref = (whole + noise * randn(rows)).to(of_ref)
    pred = ref.float() + drift * randn(rows)
    return Given(
        pred.to(device, of_pred), target.to(device), ref.to(device) if case.needs_ref else None
    )


class Called(NamedTuple):
    """Values and gradient of a call, under the oracle's names."""

    out: Any
    loss: Tensor
    errors: Tensor
    ref_errors: Tensor | None
    drops: Tensor | None
    margin: Tensor
    grad: Tensor


def options_of(case: Case, setting: Setting, device: torch.device) -> dict[str, Any]:
    """Everything that is not as it is by default."""
    found = dict(case.numbers)
    if case.function == "ddo_loss":  # which sums by default
        found["error_reduction"] = setting.error_reduction
    for field, usual in Setting()._asdict().items():
        value = getattr(setting, field)
        if field in ("members", "listed") or (not isinstance(value, Tensor) and value == usual):
            continue
        found["pair_weight" if field == "weight" and not setting.listed else field] = value
    return {key: v.to(device) if isinstance(v, Tensor) else v for key, v in found.items()}


def call(
    case: Case, given: Given, impl: str, setting: Setting | None = None, **more: Any
) -> Called:
    options = options_of(case, setting or case.setting, given.pred.device) | more
    pred = given.pred.detach().clone().requires_grad_()
    for name in ("ref_pred", "ref_mse"):
        if (value := getattr(given, name)) is not None:
            options[name] = value
    out = getattr(fastpref, case.function)(pred, given.target, impl=impl, **options)
    (grad,) = torch.autograd.grad(out.loss.sum(), pred, materialize_grads=True)
    if case.setting.listed:
        return Called(out, out.loss, out.errors, out.ref_errors, out.drops, out.margin, grad)
    errors, ref, drops = (
        None if getattr(out, f"{name}_w") is None
        else torch.stack([getattr(out, f"{name}_w"), getattr(out, f"{name}_l")])
        for name in ("mse", "ref_mse", "drop")
    )  # fmt: skip
    return Called(out, out.loss, errors, ref, drops, out.margin, grad)


def check(case: Case, given: Given, setting: Setting | None = None) -> dict[str, Called]:
    """Eager PyTorch and the kernels against the oracle; what each of them found."""
    setting = setting or case.setting
    truth = oracles.truths(case.loss, given, case.numbers, setting, case.of_sums, case.parts)
    eager, got = (call(case, given, impl, setting) for impl in ("torch", "triton"))
    there = None
    if setting.lengths is not None:
        there = torch.arange(setting.members)[None] < setting.lengths.cpu()[:, None]
    for name, exact in truth.items():
        plain, fused = getattr(eager, name), getattr(got, name)
        if plain is None:
            assert not case.needs_ref
            assert fused is None
            continue
        assert plain.dtype == (given.pred.dtype if name == "grad" else FP32)
        assert plain.shape == fused.shape == exact.value.shape
        if there is not None and name in ("errors", "ref_errors", "drops"):
            plain, fused = (torch.where(there.to(t.device), t, 0.0) for t in (plain, fused))
        assert_three_way(name, fused, plain, exact)
    return {"torch": eager, "triton": got}


# The oracles, by each other and by 50 digits ------------------------------------------------------


def evaluated(
    case: Case, given: Given, setting: Setting | None = None, of_sums: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The oracle's loss, gradient and margin."""
    pred = given.pred.detach().double().cpu().requires_grad_()
    loss = case.of_sums if of_sums else case.loss
    value, _, margin = oracles.evaluate(
        loss, given, case.numbers, setting or case.setting, pred
    )  # fmt: skip
    return value.detach(), torch.autograd.grad(value.sum(), pred)[0], margin.detach()


CPU = torch.device("cpu")
NONE = {"reduction": "none"}


def test_formulas_of_lists_of_two_are_dpo() -> None:
    """RankDPO's with a weight on it, and both with DPO's beta halved."""
    score = torch.tensor([[0.9, 0.2], [0.1, 0.7], [0.6, 0.5]])
    gain = (2 ** score.double()[:, 0] - 2 ** score.double()[:, 1]).abs()
    weight = gain * (1 / math.log(2) - 1 / math.log(3))
    case = CASES["rankdpo_2"]._replace(numbers={"score": score, "beta": 700.0})
    given = draw(case, CPU)
    winners_first = [0, 3, 4, 1, 2, 5]
    pairs = Given(*(t[winners_first] for t in given[:3]))
    setting = PAIRS._replace(weight=weight, **NONE)
    dpo = evaluated(PAIR_CASES["dpo"]._replace(numbers={"beta": 1400.0}), pairs, setting)
    of_list = evaluated(case, given, case.setting._replace(**NONE))
    torch.testing.assert_close(of_list[0], dpo[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(of_list[1][winners_first], dpo[1], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(of_list[2], dpo[2], rtol=1e-12, atol=0)
    dpo = evaluated(PAIR_CASES["dpo"]._replace(numbers={"beta": 1400.0}), pairs)
    of_list = evaluated(case._replace(loss=oracles.plackett_luce), given)
    torch.testing.assert_close(of_list[0], dpo[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(of_list[1][winners_first], dpo[1], rtol=1e-12, atol=1e-15)


def test_slopes_of_lists_are_those_of_the_papers() -> None:
    """Plackett-Luce: -1 + the shares of an item in all that it is among; RankDPO: what it is pushed
    down by those above and up by those below."""
    k, beta = 4, 3.0
    gap = torch.tensor([0.3, -0.2, 0.5, 0.1], dtype=FP64, requires_grad=True)
    score = torch.tensor([0.9, 0.6, 0.3, 0.1])  # best first

    def measured(gap: Tensor) -> oracles.Measured:
        nothing = torch.zeros(())
        of: Any = (nothing,) * 3
        there = torch.ones(1, k, dtype=torch.bool)
        return oracles.Measured(gap, gap, gap[None], gap, nothing, of, there)

    c = (-beta * gap).detach()
    losses, _ = oracles.plackett_luce(measured(gap), score[None], beta)
    (slope,) = torch.autograd.grad(losses.sum(), gap)
    for i in range(k):
        shares = [torch.softmax(c[j:], 0)[i - j] for j in range(i + 1)]
        torch.testing.assert_close(slope[i], -beta * (sum(shares) - 1), rtol=1e-12, atol=1e-14)
    losses, _ = oracles.rankdpo(measured(gap), score[None], beta)
    (slope,) = torch.autograd.grad(losses.sum(), gap)
    for i in range(k):
        wanted = 0.0
        for j in range(k):
            delta = abs(2 ** score[i].item() - 2 ** score[j].item())
            delta *= abs(1 / math.log(2 + i) - 1 / math.log(2 + j))
            better = torch.sigmoid(beta * (gap[i] - gap[j])).item()
            wanted += beta * delta * (better if j > i else better - 1 if j < i else 0)
        assert slope[i].item() == pytest.approx(wanted, rel=1e-6)


def test_formulas_of_samples_in_50_digits() -> None:
    """Values and, by numerical derivatives, slopes, where exp, log and 1 - h cancel too."""
    gaps = torch.tensor([3e-2, -3e-2, 1e-4, -1e-4, 0.0, 0.5, -0.5], dtype=FP64)
    beta, kl, alpha, confidence = 1000.0, 2e-4, 4.0, 5.0

    def log_sigmoid(x: Any) -> Any:
        return -mp.log1p(mp.exp(-x))

    for utility in UTILITIES:
        for label in (0, 1):

            def exact(gap: Any, utility: str = utility, label: int = label) -> Any:
                g = -mp.mpf(gap) - mp.mpf(kl)
                sign, z = 2 * label - 1, (2 * label - 1) * mp.mpf(beta) * g
                h = {
                    "kto": mp.exp(log_sigmoid(z)),
                    "loss_averse": log_sigmoid(z),
                    "risk_seeking_1": -sign * log_sigmoid(-beta * g),
                    "risk_seeking_2": sign * mp.exp(min(beta * g / 100, mp.mpf(80))) - 1,
                    "risk_seeking_3": -log_sigmoid(-z),
                }[utility]
                return 1 - h

            agree(
                lambda m, u=utility, y=label: oracles.kto(m, torch.tensor(y), beta, 1, 1, u, kl)[0],
                exact, gaps,
            )  # fmt: skip
    for real in (0, 1):
        agree(
            lambda m, y=real: oracles.ddo(m, torch.tensor(y), beta, alpha)[0],
            lambda gap, y=real: (
                -log_sigmoid(-beta * mp.mpf(gap)) if y else -alpha * log_sigmoid(beta * mp.mpf(gap))
            ),
            gaps,
        )
    for score in (0.5, -0.5):
        agree(
            lambda m, s=score: oracles.tgo(m, torch.tensor(s), 0.25, beta, confidence)[0],
            lambda gap, s=score: (
                -(1 + confidence * abs(s - 0.25))
                * log_sigmoid((-1 if s > 0.25 else 1) * beta * mp.mpf(gap))
            ),
            gaps,
        )


def agree(
    loss: Callable[[oracles.Measured], Tensor], exact: Callable[[Any], Any], gaps: Tensor
) -> None:
    at = gaps.clone().requires_grad_()
    nothing: Any = None
    value = loss(oracles.Measured(at, at, at, at, nothing, nothing, nothing))
    (slope,) = torch.autograd.grad(value.sum(), at)
    step = mp.mpf(10) ** -20
    for i, gap in enumerate(gaps.tolist()):
        here = exact(gap)
        by_gap = (exact(mp.mpf(gap) + step) - exact(mp.mpf(gap) - step)) / (2 * step)
        assert value[i].item() == pytest.approx(float(here), rel=1e-12, abs=1e-12)
        assert slope[i].item() == pytest.approx(float(by_gap), rel=1e-9, abs=1e-12)


def test_dspo_by_its_sums() -> None:
    for beta in (0.001, 50.0, 3000.0):
        case = CASES["dspo"]._replace(numbers={"beta": beta})
        given = draw(case, CPU, drift=0.1)
        whole, sums = (evaluated(case, given, of_sums=each) for each in (False, True))
        torch.testing.assert_close(sums, whole, rtol=1e-11, atol=1e-13)


def test_the_safeguards_factor_is_that_of_the_gradients() -> None:
    """As published, (1 - mu) |gA|^2 / (gA gB), of the gradients of the batch's mean errors."""
    mu = 0.3
    for sign in (1.0, -1.0):  # losers whose gradient points the winner's way, or away
        case = PAIR_CASES["dpo"]
        given = draw(case, CPU, noise=0.3)
        off = (given.pred - given.target)[:3]
        given = given._replace(pred=torch.cat([given.pred[:3], given.target[3:] + sign * off]))
        halves = [half.double().requires_grad_() for half in given.pred.chunk(2)]
        targets = given.target.double().chunk(2)
        grads = [
            torch.autograd.grad((p - t).square().flatten(1).mean(1).mean(), p)[0]
            for p, t in zip(halves, targets, strict=True)
        ]
        dot = (grads[0] * grads[1]).sum()
        lam = ((1 - mu) * grads[0].square().sum() / dot).clamp(0, 1) if dot > 0 else 1.0
        assert (lam == 1.0) == (sign < 0)
        plain = evaluated(case, given)
        guarded = evaluated(case, given, PAIRS._replace(safeguard=mu))
        torch.testing.assert_close(guarded[0], plain[0], rtol=0, atol=0)
        torch.testing.assert_close(guarded[1][:3], plain[1][:3], rtol=1e-12, atol=0)
        torch.testing.assert_close(guarded[1][3:], lam * plain[1][3:], rtol=1e-12, atol=0)


def test_the_log_mean_exp_lies_between_mean_and_maximum() -> None:
    losses = torch.tensor([0.1, 0.9, 0.4, 0.2], dtype=FP64, requires_grad=True)
    near_mean, near_most = (oracles.reduced(losses, "dro", t) for t in (1e6, 1e-4))
    torch.testing.assert_close(near_mean, losses.mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(near_most, losses.max() - 1e-4 * math.log(4), rtol=1e-12, atol=0)
    (grad,) = torch.autograd.grad(oracles.reduced(losses, "dro", 0.3), losses)
    torch.testing.assert_close(grad, torch.softmax(losses.detach() / 0.3, 0))
    one = oracles.reduced(losses[:1], "dro", 0.3)
    torch.testing.assert_close(one, losses[0])


def test_pseudo_huber_of_0_is_its_limit() -> None:
    case = CASES["tgo"]
    given = draw(case, CPU)
    tiny, none = (
        evaluated(case, given, Setting(huber_c=c, error_reduction="sum")) for c in (1e-12, 0.0)
    )
    torch.testing.assert_close(none, tiny, rtol=1e-8, atol=1e-8)


# Every loss against its oracle --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "drift"),
    [(name, 0.01) for name in CASES]
    + [(name, drift) for name in (*ONE_EACH, *NEAR) for drift in (1e-4, 0.0)],
)
def test_every_loss_is_its_formula(name: str, drift: float, device: torch.device) -> None:
    """For a policy that differs from the reference by 1e-4, and that is the reference, too."""
    check(CASES[name], draw(CASES[name], device, drift=drift))


DTYPES = [(BF16, BF16, BF16), (FP16, FP16, FP16), (BF16, FP32, FP16), (FP32, BF16, FP32)]


@pytest.mark.parametrize("name", ["kto", "plackett_luce_3"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_dtypes(
    name: str, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], device: torch.device
) -> None:
    check(CASES[name], draw(CASES[name], device, dtypes=dtypes))


@pytest.mark.parametrize("name", ["kto", "rankdpo_3", "dspo_strong"])
@pytest.mark.parametrize("sample", [(1,), (3,), (1025,), (2, 3, 4, 5), (1, 1, 1, 1)], ids=str)
def test_shapes(name: str, sample: tuple[int, ...], device: torch.device) -> None:
    """One element, more than a block of the kernels, and video."""
    check(CASES[name], draw(CASES[name], device, sample=sample))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "sliced": lambda t: torch.cat([t, t], dim=-1)[..., : t.shape[-1]],
}


@each_impl
@pytest.mark.parametrize("name", ["ddo", "rankdpo_2", "dspo"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(name: str, layout: str, impl: str, device: torch.device) -> None:
    case = CASES[name]
    given = draw(case, device)
    moved = Given(*(None if t is None else LAYOUTS[layout](t) for t in given))
    dense, got = (call(case, each, impl) for each in (given, moved))
    torch.testing.assert_close(got[1:], dense[1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["rankdpo_3", "plackett_luce_2", "dspo_strong", "diffusion_dro"])
def test_a_target_that_is_shared(name: str, device: torch.device) -> None:
    check(CASES[name], draw(CASES[name], device, shared=True))


@pytest.mark.parametrize("name", [*ONE_EACH, "diffusion_dro"])
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_errors_of_the_reference_instead_of_its_predictions(
    name: str, impl: str, device: torch.device
) -> None:
    case = CASES[name]
    given = draw(case, device)
    off = (given.ref_pred.double() - given.target.double()).square().flatten(1)
    ref_mse = off.sum(1) if case.setting.error_reduction == "sum" else off.mean(1)
    if name == "dspo_strong":  # which needs the predictions
        with pytest.raises((TypeError, ValueError), match="ref_"):
            call(case, given._replace(ref_pred=None, ref_mse=ref_mse.float()), impl)
        return
    check(case, given._replace(ref_pred=None, ref_mse=ref_mse.float()))


def hiding(rows: int, device: torch.device, *, channels: int = 1) -> Tensor:
    mask = torch.rand(rows, channels, *SAMPLE[1:], generator=torch.Generator().manual_seed(0))
    mask[1] = 0  # a sample, or a list, that is hidden whole
    return mask.to(device)


KNOBS: dict[str, Callable[[Case, torch.device], dict[str, Any]]] = {
    "mask": lambda case, device: {
        "mask": hiding(case.groups * case.setting.members, device) > 0.4
    },
    "float mask of lists": lambda case, device: {
        "mask": hiding(case.groups, device, channels=4)
    },
    "masked sum": lambda case, device: {
        "mask": hiding(case.groups, device), "error_reduction": "sum", "reduction": "sum"
    },
    "mean": lambda case, device: {"error_reduction": "mean"},
    "L1": lambda case, device: {"huber_c": 0.0},
    "huber": lambda case, device: {"huber_c": 0.05, "reduction": "none"},
    "huber of each": lambda case, device: {
        "huber_c": torch.linspace(0.0, 0.2, case.groups, device=device)
    },
    "huber of each member": lambda case, device: {
        "huber_c": torch.linspace(0.2, 0.0, case.groups * case.setting.members, device=device)
    },
    "weight": lambda case, device: {
        "weight": torch.linspace(0.0, 2.0, case.groups, device=device), "reduction": "sum"
    },
    "weight of all": lambda case, device: {"weight": torch.tensor(0.3), "reduction": "none"},
    "dro": lambda case, device: {
        "weight": torch.linspace(0.5, 2.0, case.groups, device=device), "reduction": "dro",
        "dro_temperature": 0.3,
    },
}  # fmt: skip


# Of samples one loss has them all.
@pytest.mark.parametrize(
    ("knob", "name"),
    covering.product(
        [*KNOBS],
        ["kto", "ddo_strong", "rankdpo_3"],
        fast=lambda knob, name: name != "ddo_strong" or knob in ("mask", "weight"),
    ),
)
def test_knobs_of_samples_and_lists(name: str, knob: str, device: torch.device) -> None:
    case = CASES[name]
    check(case, draw(case, device), case.setting._replace(**KNOBS[knob](case, device)))


@pytest.mark.parametrize("name", ["loss_averse", "tgo", "plackett_luce_3"])
def test_every_knob_at_once(name: str, device: torch.device) -> None:
    case = CASES[name]
    n = case.groups
    knobs: dict[str, Any] = {
        "mask": hiding(n, device), "huber_c": torch.linspace(0.0, 0.2, n, device=device),
        "weight": torch.linspace(2.0, 0.0, n, device=device), "error_reduction": "sum",
        "reduction": "dro", "dro_temperature": 2.0,
    }  # fmt: skip
    check(case, draw(case, device), case.setting._replace(**knobs))


# Lists --------------------------------------------------------------------------------------------


TIES = {
    "all alike": [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5], [0.0, 0.0, 0.0]],
    "two best": [[0.7, 0.2, 0.7], [0.2, 0.7, 0.7], [0.7, 0.7, 0.2]],
    "two worst": [[0.2, 0.7, 0.2], [0.7, 0.2, 0.2], [0.2, 0.2, 0.7]],
    "best to worst": [[0.9, 0.5, 0.1]] * 3,
    "worst to best": [[0.1, 0.5, 0.9]] * 3,
}


@pytest.mark.parametrize("name", ["rankdpo_3", "plackett_luce_3"])
@pytest.mark.parametrize("tied", TIES)
def test_equal_scores(name: str, tied: str, device: torch.device) -> None:
    score = torch.tensor(TIES[tied], device=device)
    case = CASES[name]._replace(numbers=CASES[name].numbers | {"score": score})
    check(case, draw(case, device))
    if tied == "all alike":
        for impl in ("triton", "torch"):
            out = call(case, draw(case, device), impl)
            assert out.margin.tolist() == [0.0] * 3
            if name == "rankdpo_3":
                assert out.loss == 0
                assert not out.grad.any()


@pytest.mark.parametrize("name", ["rankdpo_5", "plackett_luce_5"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("lengths", [[5, 2, 3], [1, 5, 4]], ids=str)
def test_lists_of_different_lengths(
    name: str, lengths: list[int], dtype: torch.dtype, device: torch.device
) -> None:
    case = CASES[name]
    given = padded(draw(case, device), lengths, 5, math.nan)
    setting = case.setting._replace(lengths=torch.tensor(lengths, dtype=dtype), **NONE)
    check(case, given, setting)


def padded(given: Given, lengths: list[int], members: int, value: float) -> Given:
    there = torch.arange(members)[None] < torch.tensor(lengths)[:, None]
    rows = there.flatten().to(given.pred.device)
    return Given(
        *(
            None if t is None
            else torch.where(rows.view(-1, *[1] * (t.dim() - 1)), t, value) if len(t) == len(rows)
            else t
            for t in given
        )
    )  # fmt: skip


@each_impl
@pytest.mark.parametrize("name", ["rankdpo_5", "plackett_luce_5"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_padding_may_hold_anything_and_gets_no_gradient(
    name: str, value: float, impl: str, device: torch.device
) -> None:
    """In predictions, targets, references and scores; and a list by itself has the same loss."""
    case, lengths = CASES[name], [2, 5, 3]
    setting = case.setting._replace(lengths=torch.tensor(lengths), **NONE)
    plain = draw(case, device)
    score = case.numbers["score"].clone()
    there = torch.arange(5)[None] < setting.lengths[:, None]
    spoiled = case._replace(numbers=case.numbers | {"score": torch.where(there, score, value)})
    out = call(spoiled, padded(plain, lengths, 5, value), impl, setting)
    clean = call(case, plain, impl, setting)
    rows = there.flatten().to(device)
    assert (out.grad[~rows] == 0).all()
    assert (clean.grad[~rows] == 0).all()
    assert torch.equal(out.loss, clean.loss)
    assert torch.equal(out.grad, clean.grad)
    assert torch.equal(out.margin, clean.margin)
    assert torch.equal(out.errors[there.to(device)], clean.errors[there.to(device)])
    assert out.grad[rows].flatten(1).any(1).all()
    assert all(value.isfinite() for value in out.out.metrics().values())
    for i, n in enumerate(lengths):
        alone = case._replace(
            numbers=case.numbers | {"score": score[i : i + 1, :n]}, setting=Setting(n)
        )
        short = Given(*(None if t is None else t[5 * i : 5 * i + n] for t in plain))
        one = call(alone, short, impl)
        torch.testing.assert_close(one.loss, out.loss[i], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            one.grad,
            out.grad[5 * i : 5 * i + n],
            rtol=1e-4,
            atol=1e-4 * one.grad.abs().max().item(),
        )


@each_impl
@pytest.mark.parametrize("name", ["rankdpo_3", "plackett_luce_3"])
def test_lists_of_one_and_of_none(name: str, impl: str, device: torch.device) -> None:
    """Nothing is compared in them."""
    case = CASES[name]
    setting = case.setting._replace(lengths=torch.tensor([1, 0, 3]), **NONE)
    out = call(case, padded(draw(case, device), [1, 0, 3], 3, math.nan), impl, setting)
    assert out.loss[:2].tolist() == [0.0, 0.0]
    assert out.margin[:2].tolist() == [0.0, 0.0]
    assert (out.grad[:6] == 0).all()
    assert out.loss[2] > 0


@each_impl
@pytest.mark.parametrize("name", ["rankdpo_5", "plackett_luce_5"])
def test_the_order_of_a_lists_members_does_not_matter(
    name: str, impl: str, device: torch.device
) -> None:
    case = CASES[name]
    given = draw(case, device)
    order = [3, 0, 4, 2, 1]
    score = case.numbers["score"][:, order]
    rows = [5 * i + j for i in range(3) for j in order]
    moved = Given(*(None if t is None else t[rows] for t in given))
    plain = call(case, given, impl, case.setting._replace(**NONE))
    other = call(
        case._replace(numbers=case.numbers | {"score": score}), moved, impl,
        case.setting._replace(**NONE),
    )  # fmt: skip
    torch.testing.assert_close(other.loss, plain.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(other.margin, plain.margin, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other.grad, plain.grad[rows], rtol=1e-3, atol=1e-5)


# What a first step gives, and extremes ------------------------------------------------------------


@each_impl
@pytest.mark.parametrize(
    "name",
    [n for n in CASES if not n.endswith(("_kl", "_5", "_16")) and n != "kto_kl_below_0"],
)
def test_the_first_step_of_a_policy_that_is_the_reference(
    name: str, impl: str, device: torch.device
) -> None:
    """Drops and margins of exactly 0, and losses that are known. (Where a kl is given, margins are
    not 0.)"""
    case = CASES[name]
    given = draw(case, device)
    given = given._replace(pred=given.ref_pred.clone())
    out = call(case, given, impl, case.setting._replace(**NONE))
    assert not out.drops.any()
    assert out.margin.eq(0).all()
    assert torch.equal(out.errors, out.ref_errors)
    if name != "linear_dpo":
        assert out.grad.flatten(1).any(1).sum() >= len(out.grad) // 2
    log_2, numbers = math.log(2), case.numbers
    wanted: Any = {
        "kto": 0.5, "loss_averse": 1 + log_2, "risk_seeking_3": 1 - log_2,
        "risk_seeking_1": [1 - log_2 if y else 1 + log_2 for y in LABEL],
        "risk_seeking_2": [1.0 if y else 3.0 for y in LABEL],
        "risk_seeking": [(2.0 if y else 0.3) * (1 - log_2) for y in LABEL],
        "kto_weights": [0.25 if y else 1.5 for y in LABEL],
        "tgo": [(1 + 5 * abs(s - 0.25)) * log_2 for s in SCORE.tolist()],
        "diffusion_dro": 0.001,
    }.get(name)  # fmt: skip
    if name.startswith("ddo"):
        wanted = [log_2 if y else numbers["alpha"] * log_2 for y in LABEL]
    if name.startswith("plackett_luce"):
        wanted = math.lgamma(case.setting.members + 1)  # log k!
    if name.startswith("rankdpo"):
        wanted = [log_2 * delta(scores) for scores in numbers["score"].double().tolist()]
    if name.startswith("dspo"):  # (p - t) and no more
        wanted = out.errors[0].tolist()
    if name == "linear_dpo":
        wanted = (0.5 * (out.errors[0] - out.errors[1])).tolist()
    wanted = torch.tensor(wanted, dtype=FP64, device=device).expand(out.loss.shape)
    torch.testing.assert_close(out.loss.double(), wanted, rtol=1e-5, atol=1e-8)


def delta(scores: list[float]) -> float:
    """The sum of RankDPO's weights of a list without ties."""
    best = sorted(scores, reverse=True)
    n = range(len(best))
    return sum(
        (2 ** best[i] - 2 ** best[j]) * (1 / math.log(2 + i) - 1 / math.log(2 + j))
        for i in n for j in n if i < j
    )  # fmt: skip


SIZES = (1e-8, 1e-3, 1.0, 1e2, 1e4)


@pytest.mark.parametrize("name", [*UTILITIES, "kto_kl", *ONE_EACH[1:], "diffusion_dro", "dpo"])
@pytest.mark.parametrize("beta", [1e-3, 1.0, 2e4])
def test_extremes(name: str, beta: float, device: torch.device) -> None:
    """Errors from 1e-8 to 1e4 in one batch, of policy and reference, each in another order."""
    case = ALL[name]
    if "beta" in case.numbers:
        case = case._replace(numbers=case.numbers | {"beta": beta})
    elif beta != 1.0:
        pytest.skip("has no beta")
    given = draw(case, device, sample=(5, 7))
    rows = len(given.pred)
    size = torch.tensor([math.sqrt(SIZES[i % 5]) for i in range(rows)], device=device)
    of_ref = torch.tensor([math.sqrt(SIZES[(2 * i + 1) % 5]) for i in range(rows)], device=device)
    off, of_other = torch.randn(2, rows, 5, 7, generator=torch.Generator().manual_seed(0))
    given = Given(
        given.target + size[:, None, None] * off.to(device), given.target,
        given.target + of_ref[:, None, None] * of_other.to(device),
    )  # fmt: skip
    for out in check(case, given, case.setting._replace(**NONE)).values():
        assert all(field.isfinite().all() for field in out[1:])


@each_impl
@pytest.mark.parametrize("name", ["kto", "rankdpo_3", "plackett_luce_2"])
def test_errors_of_zero(name: str, impl: str, device: torch.device) -> None:
    case = CASES[name]
    given = draw(case, device)
    given = given._replace(pred=given.target.clone(), ref_pred=given.target.clone())
    for huber_c in (None, 0.0, 0.1):
        out = call(case, given, impl, case.setting._replace(huber_c=huber_c))
        assert out.loss.isfinite()
        assert not out.errors.any()
        assert not out.grad.any()  # at 0 the sign is 0


# What stays where it is ---------------------------------------------------------------------------


def rows_of(case: Case, group: int) -> list[int]:
    members = case.setting.members
    if case.setting.listed:
        return list(range(group * members, (group + 1) * members))
    return [group + m * case.groups for m in range(members)]


@each_impl
@pytest.mark.parametrize(
    ("name", "what"),
    [(name, "pred") for name in (*UNBATCHED, "linear_dpo")]
    + [(name, what) for name in ("kto_kl", "rankdpo_3", "diffusion_dro")
       for what in ("target", "ref_pred")],
)  # fmt: skip
def test_nan_stays_in_its_sample(name: str, what: str, impl: str, device: torch.device) -> None:
    """In its list, or its pair; and it is not hidden there."""
    case = ALL[name]
    given = draw(case, device)
    setting = case.setting._replace(**NONE)
    spoiled = getattr(given, what).clone()
    spoiled[rows_of(case, 1)[-1], 0, 0, 0] = math.nan
    out = call(case, given._replace(**{what: spoiled}), impl, setting)
    clean = call(case, given, impl, setting)
    others = [i for i in range(case.groups) if i != 1]
    rows = [row for i in others for row in rows_of(case, i)]
    assert out.loss[1].isnan()
    for field in ("loss", "margin"):
        assert torch.equal(getattr(out, field)[others], getattr(clean, field)[others])
    for field in ("errors", "drops"):
        got, wanted = (getattr(each, field) for each in (out, clean))
        if not case.setting.listed:
            got, wanted = got.T, wanted.T
        assert torch.equal(got[others], wanted[others])
    assert torch.equal(out.grad[rows], clean.grad[rows])
    if (name, what) != ("diffusion_dro", "ref_pred"):  # the slope of a hinge is one of two numbers
        assert out.grad[rows_of(case, 1)].isnan().any()


@each_impl
def test_nan_reaches_all_where_the_batch_is_compared(impl: str, device: torch.device) -> None:
    """KTO's kl is of the batch: what is wrong in a sample shows in the loss."""
    given = draw(CASES["kto"], device)
    given.pred[1, 0, 0, 0] = math.nan
    out = call(CASES["kto"], given, impl, Setting(**NONE))
    assert out.loss.isnan().all()
    assert call(CASES["tgo"], given, impl, Setting(reduction="dro")).loss.isnan()


@each_impl
@pytest.mark.parametrize(
    ("name", "value"),
    [*((name, math.nan) for name in UNBATCHED), ("tgo", math.inf), ("rankdpo_3", -math.inf)],
)
def test_a_weight_of_zero_leaves_out_whatever_it_weighs(
    name: str, value: float, impl: str, device: torch.device
) -> None:
    case = CASES[name]
    given = draw(case, device)
    weight = torch.linspace(0.5, 2.0, case.groups)
    weight[1] = 0.0
    setting = case.setting._replace(weight=weight)
    clean = call(case, given, impl, setting)
    rows = rows_of(case, 1)
    spoiled = []
    for t in given[:3]:
        spoiled.append(t.clone())
        spoiled[-1][rows] = value
    out = call(case, Given(*spoiled), impl, setting)
    assert torch.equal(out.loss, clean.loss)
    assert torch.equal(out.grad, clean.grad)
    assert (out.grad[rows] == 0).all()
    assert clean.grad.isfinite().all()


@each_impl
@pytest.mark.parametrize("name", ["kto_kl", "ddo"])
def test_a_class_of_weight_zero_leaves_its_samples_out(
    name: str, impl: str, device: torch.device
) -> None:
    case = CASES[name]
    zero = {"lambda_undesirable": 0.0} if name == "kto_kl" else {"alpha": 0.0}
    case = case._replace(numbers=case.numbers | zero)
    given = draw(case, device)
    clean = call(case, given, impl)
    given.pred[~LABEL.to(device)] = math.nan
    out = call(case, given, impl)
    assert torch.equal(out.loss, clean.loss)
    assert torch.equal(out.grad, clean.grad)
    assert (out.grad[~LABEL.to(device)] == 0).all()
    assert out.grad.isfinite().all()


@each_impl
def test_what_is_masked_may_be_anything(impl: str, device: torch.device) -> None:
    for name in ("kto", "rankdpo_3", "dspo_strong"):
        case = CASES[name]
        given = draw(case, device)
        mask = hiding(len(given.pred), device) > 0.4
        setting = case.setting._replace(mask=mask)
        clean = call(case, given, impl, setting)
        spoiled = Given(*(torch.where(mask, t, math.nan) for t in given[:3]))
        out = call(case, spoiled, impl, setting)
        assert torch.equal(out.loss, clean.loss)
        assert torch.equal(out.grad, clean.grad)
        assert (out.grad[~mask.expand_as(out.grad)] == 0).all()
        assert out.grad[: len(mask) // 2].any()


# Labels and scores --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kto", "risk_seeking_1", "ddo"])
@pytest.mark.parametrize("good", [True, False])
def test_one_class_alone(name: str, good: bool, device: torch.device) -> None:
    label = torch.full((5,), good)
    key = "label" if "label" in CASES[name].numbers else "real"
    case = CASES[name]._replace(numbers=CASES[name].numbers | {key: label})
    check(case, draw(case, device))


@each_impl
@pytest.mark.parametrize("name", ["kto", "ddo"])
def test_labels_of_any_dtype(name: str, impl: str, device: torch.device) -> None:
    case = CASES[name]
    key = "label" if name == "kto" else "real"
    given = draw(case, device)
    plain = call(case, given, impl)
    for dtype in (torch.uint8, torch.int64, FP32, BF16):
        other = call(case, given, impl, **{key: LABEL.to(device, dtype)})
        assert torch.equal(other.loss, plain.loss)
        assert torch.equal(other.grad, plain.grad)


@each_impl
@pytest.mark.parametrize("name", ["tgo", "rankdpo_3", "plackett_luce_3"])
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_scores_in_any_precision(
    name: str, dtype: torch.dtype, impl: str, device: torch.device
) -> None:
    """Compared in fp32: what is a tie there is one, and no other."""
    case = CASES[name]
    given = draw(case, device)
    low = case.numbers["score"].to(device, dtype)
    threshold = {"threshold": low[4]} if name == "tgo" else {}
    got, wanted = (
        call(case, given, impl, score=score, **threshold) for score in (low, low.float())
    )
    torch.testing.assert_close(got.loss, wanted.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-5, atol=1e-8)


@each_impl
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_score_at_the_threshold_is_above_it(
    as_tensor: bool, impl: str, device: torch.device
) -> None:
    threshold: Any = torch.tensor(0.25, device=device) if as_tensor else 0.25
    given = draw(CASES["tgo"], device)
    out = call(CASES["tgo"], given, impl, threshold=threshold)
    u = -1000.0 * out.drops
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], device=device)  # the last one's is 0.25
    torch.testing.assert_close(out.margin, signs * u)


@each_impl
def test_a_kl_that_is_given(impl: str, device: torch.device) -> None:
    """A number, or a tensor: the batch's own gives the same as none."""
    given = draw(CASES["kto"], device)
    given = given._replace(pred=given.target + 0.9 * (given.pred - given.target))  # better
    plain = call(CASES["kto"], given, impl)
    kl = -plain.drops.mean()
    assert kl > 0
    for value in (kl, kl.item()):
        other = call(CASES["kto"], given, impl, kl=value)
        torch.testing.assert_close(other.loss, plain.loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(other.margin, plain.margin, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            other.grad, plain.grad, rtol=1e-4, atol=1e-4 * plain.grad.abs().max().item()
        )
    worse = given._replace(pred=given.target + 2 * (given.pred - given.target))
    clamped = call(CASES["kto"], worse, impl)
    assert clamped.drops.mean() > 0
    zero = call(CASES["kto"], worse, impl, kl=0.0)
    torch.testing.assert_close(clamped.loss, zero.loss, rtol=1e-6, atol=0)


# Derivatives --------------------------------------------------------------------------------------


def closed(name: str, device: torch.device) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The loss as a function of the prediction, in fp64 and of few elements."""
    case = ALL[name]
    given = draw(case, device, sample=(3,), drift=0.05, dtypes=(FP64, FP64, FP64), groups=None)
    options = options_of(case, case.setting, device)
    if "beta" in options and name != "mapo":
        options["beta"] = 20.0

    def loss(pred: Tensor) -> Tensor:
        more = {"ref_pred": given.ref_pred} if case.needs_ref else {}
        function = getattr(fastpref, case.function)
        return function(pred, given.target, impl="torch", reduction="none", **more, **options).loss

    return loss, given.pred.requires_grad_()


DIFFERENTIABLE = (
    *(f"{utility}_kl" for utility in UTILITIES), "ddo", "tgo", "rankdpo_3", "plackett_luce_3",
    "dspo_strong",
)  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_derivatives_in_fp64(name: str, device: torch.device) -> None:
    loss, pred = closed(name, device)
    assert torch.autograd.gradcheck(loss, pred)
    assert torch.autograd.gradgradcheck(loss, pred)


@each_impl
@pytest.mark.parametrize("name", [*UNBATCHED, "risk_seeking_1_kl", "risk_seeking_2_kl", "dpo"])
def test_the_loss_falls_along_its_gradient(name: str, impl: str, device: torch.device) -> None:
    """By as much as the gradient says, measured by the published formula."""
    case = ALL[name]
    given = draw(case, device)
    grad = call(case, given, impl).grad.double().cpu()
    before = evaluated(case, given)[0]
    step = 1e-4 * before.abs().item() / grad.square().sum().item()
    moved = given._replace(pred=given.pred.double().cpu() - step * grad)
    fall = (before - evaluated(case, moved)[0]).item()
    assert fall == pytest.approx(1e-4 * before.abs().item(), rel=0.05)


@each_impl
@pytest.mark.parametrize("name", ["kto", "kto_kl", "risk_seeking_1", "ddo", "tgo", "rankdpo_3",
                                  "plackett_luce_3", "dpo", "diffusion_dro"])  # fmt: skip
def test_good_samples_are_pulled_and_bad_ones_pushed(
    name: str, impl: str, device: torch.device
) -> None:
    """The best of a list, the winner of a pair; the worst, the loser."""
    case = ALL[name]
    given = draw(case, device)
    grad = call(case, given, impl).grad
    along = (grad * (given.pred - given.target)).flatten(1).sum(1)  # > 0: its error will fall
    if name in ("kto", "kto_kl", "risk_seeking_1", "ddo"):
        assert ((along > 0) == LABEL.to(device)).all()
    elif name == "tgo":
        assert ((along > 0) == (SCORE.to(device) >= 0.25)).all()
    elif not case.setting.listed:
        assert (along[:3] > 0).all()
        assert (along[3:] < 0).all()
    else:
        score = case.numbers["score"].to(device)
        along = along.view(score.shape)
        assert (along.gather(1, score.argmax(1, keepdim=True)) > 0).all()
        assert (along.gather(1, score.argmin(1, keepdim=True)) < 0).all()


@pytest.mark.parametrize("name", ["kto", *UNBATCHED[1:]])
def test_compile_fullgraph(name: str, device: torch.device) -> None:
    case = CASES[name]
    given = draw(case, device, sample=(5, 7))
    options = options_of(case, case.setting, device)
    torch._dynamo.reset()

    def step(pred: Tensor, target: Tensor, ref: Tensor) -> Any:
        out = getattr(fastpref, case.function)(pred * 1.5, target, ref, impl="torch", **options)
        return out.loss, out.margin, out.metrics()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    pred = given.pred.requires_grad_()
    results = []
    for function in (step, compiled):
        loss, margin, metrics = function(pred, given.target, given.ref_pred)
        (grad,) = torch.autograd.grad(loss, pred)
        results.append((loss.detach(), margin, metrics, grad))
    scale = results[0][3].abs().max().item()
    torch.testing.assert_close(results[1][:3], results[0][:3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[1][3], results[0][3], rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("name", ["plackett_luce_3"])
def test_compile_with_the_kernels(name: str, device: torch.device) -> None:
    case = CASES[name]
    given = draw(case, device, sample=(5, 7))
    options = options_of(case, case.setting, device)
    torch._dynamo.reset()

    def step(pred: Tensor) -> Tensor:
        function = getattr(fastpref, case.function)
        return function(pred, given.target, given.ref_pred, impl="triton", **options).loss

    pred = given.pred.requires_grad_()
    plain, got = (
        torch.autograd.grad(f(pred), pred)[0]
        for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager"))
    )
    assert torch.equal(got, plain)


# Reductions ---------------------------------------------------------------------------------------


@each_impl
@pytest.mark.parametrize("name", ["kto", "rankdpo_3", "dspo_strong", "dpo"])
def test_reductions(name: str, impl: str, device: torch.device) -> None:
    case = ALL[name]
    given = draw(case, device)
    got = {
        reduction: call(case, given, impl, case.setting._replace(reduction=reduction))
        for reduction in ("none", "mean", "sum", "dro")
    }
    each = got["none"].loss.double()
    assert each.shape == (case.groups,)
    for reduction in ("mean", "sum", "dro"):
        wanted = oracles.reduced(each, reduction)
        assert got[reduction].loss.shape == ()
        torch.testing.assert_close(got[reduction].loss.double(), wanted, rtol=1e-5, atol=1e-9)
        for field in ("errors", "margin"):  # eager sums are in another order
            torch.testing.assert_close(
                getattr(got[reduction], field), getattr(got["none"], field), rtol=1e-5, atol=1e-5
            )
    grad, mean = got["sum"].grad, got["mean"].grad
    close = {"rtol": 1e-5, "atol": 1e-5 * grad.abs().max().item()}
    torch.testing.assert_close(mean * case.groups, grad, **close)
    torch.testing.assert_close(got["none"].grad, grad, **close)


@pytest.mark.parametrize(
    "name", ["kto", "ddo_strong", "plackett_luce_3", "dspo_strong", "diffusion_dro", "dpo"]
)
@pytest.mark.parametrize("temperature", [0.02, 1.0, 1e6])
def test_dro(name: str, temperature: float, device: torch.device) -> None:
    case = ALL[name]
    setting = case.setting._replace(
        reduction="dro", dro_temperature=temperature,
        weight=torch.linspace(0.5, 2.0, case.groups, device=device),
    )  # fmt: skip
    check(case, draw(case, device), setting)


@each_impl
def test_dro_of_losses_that_exp_does_not_hold(impl: str, device: torch.device) -> None:
    """It is near the greatest loss, and near the mean at high temperatures."""
    case = CASES["tgo"]._replace(numbers=CASES["tgo"].numbers | {"beta": 1e6})
    given = draw(case, device, drift=0.1)
    each = call(case, given, impl, Setting(**NONE)).loss
    assert each.max() > 1000
    for temperature in (1e-3, 1.0, 1e8):
        setting = Setting(reduction="dro", dro_temperature=temperature)
        out = call(case, given, impl, setting)
        wanted = oracles.reduced(each.double(), "dro", temperature)
        torch.testing.assert_close(out.loss.double(), wanted, rtol=1e-4, atol=0)
        assert out.grad.isfinite().all()


@each_impl
def test_dro_of_one_is_its_loss(impl: str, device: torch.device) -> None:
    given = draw(PAIR_CASES["dpo"], device, groups=1)
    plain, dro = (
        call(PAIR_CASES["dpo"], given, impl, PAIRS._replace(reduction=r)) for r in ("mean", "dro")
    )
    torch.testing.assert_close(dro.loss, plain.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(dro.grad, plain.grad, rtol=1e-6, atol=0)


# What pairs have besides --------------------------------------------------------------------------


GUARDS: dict[str, dict[str, Any]] = {
    "batch": {"safeguard": 0.3},
    "batch, nothing left": {"safeguard": 1.0},
    "pair": {"safeguard": 0.3, "safeguard_over": "pair"},
    "pair, mu of 0": {"safeguard": 0.0, "safeguard_over": "pair"},
    "given": {"loser_gradient_scale": 0.3},
    "given to each": {"loser_gradient_scale": torch.tensor([0.0, 0.5, 2.0])},
}


def alike(case: Case, device: torch.device) -> Given:
    """Losers whose errors point the winners' way and are greater in the first pair, and all in all;
    in the second they point away."""
    given = draw(case, device)
    share = torch.tensor([2.0, -0.3, 0.7], device=device)[:, None, None, None]
    w, l = (each.chunk(2) for each in (given.pred, given.target))
    loser = l[1] + share * (w[0] - l[0])
    return given._replace(pred=torch.cat([w[0], (loser + 0.1 * (w[1] - l[1])).to(w[0].dtype)]))


@pytest.mark.parametrize(
    ("name", "guard"),
    [(name, guard) for name in ("dpo", "mapo", "dspo_strong") for guard in GUARDS]
    + [(name, "batch") for name in ("linear_dpo", "diffusion_dro")],
)
def test_guards_of_the_loser(name: str, guard: str, device: torch.device) -> None:
    """They scale the loser's gradient, and change no value."""
    case = ALL[name]
    given = alike(case, device)
    setting = PAIRS._replace(**GUARDS[guard])
    found = check(case, given, setting)
    for impl, rtol in (("triton", 0.0), ("torch", 1e-5)):  # eager sums are in another order
        plain, guarded = call(case, given, impl, PAIRS), found[impl]
        scale = plain.grad.abs().max().item()
        for field in ("loss", "margin", "errors"):
            wanted = getattr(plain, field)
            torch.testing.assert_close(getattr(guarded, field), wanted, rtol=rtol, atol=rtol)
        torch.testing.assert_close(guarded.grad[:3], plain.grad[:3], rtol=rtol, atol=rtol * scale)
        # all in all where the first pair may be won, and its hinge at rest
        losers = slice(3, 4 if name != "diffusion_dro" else 6)
        before, after = (each.grad[losers].norm() for each in (plain, guarded))
        assert before > 0
        assert abs(after - before) > 1e-3 * before


@each_impl
@pytest.mark.parametrize("over", ["batch", "pair"])
def test_a_guarded_step_still_lowers_the_winners_error(
    over: str, impl: str, device: torch.device
) -> None:
    """One step on what both samples share, as on a bias: by at least the share mu of what it would
    without the loser; and without a guard it may raise it."""
    case, mu = PAIR_CASES["dpo"], 0.2
    given = draw(case, device, groups=1)
    off = given.pred[:1] - given.target[:1]
    given = given._replace(pred=torch.cat([given.pred[:1], given.target[1:] + 3 * off]))

    def of_winner(setting: Setting) -> float:
        grad_w, grad_l = call(case, given, impl, setting).grad
        return ((grad_w + grad_l) * off[0]).sum().item() / (grad_w * off[0]).sum().item()

    assert of_winner(PAIRS) < 0
    guarded = of_winner(PAIRS._replace(safeguard=mu, safeguard_over=over))
    assert guarded == pytest.approx(mu, rel=1e-4)


@each_impl
@pytest.mark.parametrize("over", ["batch", "pair"])
def test_guards_follow_swapped_labels(over: str, impl: str, device: torch.device) -> None:
    case = PAIR_CASES["dpo"]
    given = alike(case, device)
    swapped = Given(*(torch.cat(t.chunk(2)[::-1]) for t in given[:3]))
    setting = PAIRS._replace(safeguard=0.3, safeguard_over=over)
    plain, other = call(case, swapped, impl, setting), call(case, given, impl, setting, swap=True)
    torch.testing.assert_close(other.loss, plain.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        other.grad, torch.cat(plain.grad.chunk(2)[::-1]), rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("name", ["dpo", "linear_dpo", "mapo"])
def test_the_safeguard_with_other_errors(name: str, mask: bool, device: torch.device) -> None:
    case = ALL[name]
    given = alike(case, device)
    setting = PAIRS._replace(
        safeguard=0.4, safeguard_over="pair", error_reduction="sum",
        mask=hiding(3, device) > 0.4 if mask else None,
    )  # fmt: skip
    case = case._replace(numbers=case.numbers | {"beta": case.numbers["beta"] / N})
    check(case, given, setting)


@pytest.mark.parametrize("name", ["dpo", "mapo", "linear_dpo", "diffusion_dro"])
@pytest.mark.parametrize("drift", [0.05, 0.0])
def test_the_anchor(name: str, drift: float, device: torch.device) -> None:
    """A loss without a reference takes one for it alone."""
    case = ALL[name]
    given = draw(case._replace(needs_ref=True), device, drift=drift)
    check_anchored(case, given, PAIRS._replace(anchor_weight=0.7))


@each_impl
def test_the_anchor_counts_once_for_each_pair_and_is_weighed_with_it(
    impl: str, device: torch.device
) -> None:
    case = PAIR_CASES["dpo"]
    given = draw(case, device)
    weight = torch.tensor([1.0, 0.0, 3.0], device=device)
    setting = PAIRS._replace(weight=weight, **NONE)
    plain, anchored = (
        call(case, given, impl, setting._replace(anchor_weight=a)).loss for a in (0.0, 2.0)
    )
    drift = (given.pred - given.ref_pred).square().flatten(1).mean(1)
    wanted = weight * 2.0 * (drift[:3] + drift[3:]) / 2
    torch.testing.assert_close(anchored - plain, wanted, rtol=1e-3, atol=1e-7)


def check_anchored(case: Case, given: Given, setting: Setting) -> None:
    """As `check`, but that a loss without a reference may name the reference's errors, or not."""
    truth = oracles.truths(case.loss, given, case.numbers, setting)
    eager, got = (call(case, given, impl, setting) for impl in ("torch", "triton"))
    for name in ("loss", "errors", "margin", "grad"):
        assert_three_way(name, getattr(got, name), getattr(eager, name), truth[name])


@pytest.mark.parametrize("huber_c", [[0.0, 0.05, 0.2], [0.0, 0.05, 0.2, 0.3, 0.0, 0.1]], ids=str)
@pytest.mark.parametrize("name", ["dpo", "mapo", "diffusion_dro"])
def test_pseudo_huber_errors_of_each_pair_and_sample(
    name: str, huber_c: list[float], device: torch.device
) -> None:
    case = ALL[name]
    check(case, draw(case, device), PAIRS._replace(huber_c=torch.tensor(huber_c, device=device)))


@pytest.mark.parametrize("name", ["dpo", "linear_dpo", "mapo"])
def test_absolute_errors(name: str, device: torch.device) -> None:
    case = ALL[name]
    check(case, draw(case, device), PAIRS._replace(huber_c=0.0))


@each_impl
@pytest.mark.parametrize("name", ["dspo_strong", "diffusion_dro", "dpo"])
def test_halves_are_as_good_as_a_stack(name: str, impl: str, device: torch.device) -> None:
    case = ALL[name]
    given = alike(case, device)
    setting = PAIRS if name == "dspo_strong" else PAIRS._replace(safeguard=0.3, anchor_weight=0.1)
    stacked = call(case, given, impl, setting)
    halves = [half.detach().requires_grad_() for half in given.pred.chunk(2)]
    out = getattr(fastpref, case.function)(
        tuple(halves), tuple(given.target.chunk(2)), tuple(given.ref_pred.chunk(2)), impl=impl,
        **options_of(case, setting, device),
    )  # fmt: skip
    grad = torch.cat(torch.autograd.grad(out.loss, halves))
    torch.testing.assert_close(out.loss.detach(), stacked.loss.detach(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(
        grad, stacked.grad, rtol=1e-5, atol=1e-6 * stacked.grad.abs().max().item()
    )


# Errors, for a loss of one's own ------------------------------------------------------------------


@each_impl
@pytest.mark.parametrize("name", ["dpo", "mapo"])
def test_pair_errors_give_the_same_loss(name: str, impl: str, device: torch.device) -> None:
    """Through `losses_from_errors`, with the gradient of the loss as one."""
    case = ALL[name]
    given = draw(case, device)
    plain = call(case, given, impl)
    pred = given.pred.clone().requires_grad_()
    errors = fastpref.pair_errors(pred, given.target, given.ref_pred, impl=impl)
    assert (errors.gap_w is None) == (errors.gap_l is None) == (name == "mapo")
    torch.testing.assert_close(torch.stack(errors[:2]).detach(), plain.errors)
    more = {"gap": (errors.gap_w, errors.gap_l)} if case.needs_ref else {}
    link = "dpo_sigmoid" if name == "dpo" else name
    numbers = case.numbers
    out = fastpref.losses_from_errors(
        (errors.mse_w, errors.mse_l), link=link, **more, **numbers
    )  # fmt: skip
    (grad,) = torch.autograd.grad(out.loss, pred)
    torch.testing.assert_close(out.loss.detach(), plain.loss.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.margin, plain.margin, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        grad, plain.grad, rtol=1e-4, atol=1e-4 * plain.grad.abs().max().item()
    )


@pytest.mark.parametrize("huber_c", [None, 0.0, 0.05])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_each_of_the_pair_errors_by_itself(
    huber_c: float | None, reduction: str, device: torch.device
) -> None:
    """Values, and gradients of any combination of the four, against fp64."""
    given = draw(PAIR_CASES["dpo"], device)
    mask = hiding(3, device) > 0.4
    factors = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.0, 1.0], [2.0, 1.0, -1.0], [0.0, 3.0, 0.2]])
    results = []
    for impl in ("torch", "triton"):
        pred = given.pred.clone().requires_grad_()
        errors = fastpref.pair_errors(
            pred, given.target, given.ref_pred, mask=mask, huber_c=huber_c,
            error_reduction=reduction, impl=impl,
        )  # fmt: skip
        total = (factors.to(device) * torch.stack(tuple(errors))).sum()
        results.append((torch.stack(tuple(errors)), *torch.autograd.grad(total, pred)))
    w = factors.double()

    def own(m: oracles.Measured) -> tuple[Tensor, Tensor]:
        loss = w[0] * m.err[0] + w[1] * m.err[1] + w[2] * m.gap[0] + w[3] * m.gap[1]
        return loss, 0 * loss

    setting = PAIRS._replace(
        mask=mask, huber_c=huber_c, error_reduction=reduction, reduction="sum"
    )  # fmt: skip
    truth = oracles.truths(own, given, {}, setting)
    eager, got = results
    for i, name in ((0, "errors"), (2, "drops")):
        assert_three_way(name, got[0][i : i + 2], eager[0][i : i + 2], truth[name])
    assert_three_way("grad", got[1], eager[1], truth["grad"])


def test_pair_errors_in_fp64(device: torch.device) -> None:
    given = draw(PAIR_CASES["dpo"], device, sample=(3,), dtypes=(FP64, FP64, FP64))

    def errors(pred: Tensor) -> Any:
        return tuple(fastpref.pair_errors(pred, given.target, given.ref_pred, impl="torch"))

    assert torch.autograd.gradcheck(errors, given.pred.requires_grad_())
    assert torch.autograd.gradgradcheck(errors, given.pred)


# What a call costs, returns and refuses -----------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["kto", "risk_seeking_2", "kto_kl", "ddo", "tgo", "rankdpo_16", "plackett_luce_3",
             "dspo", "diffusion_dro", "dpo"],
)  # fmt: skip
def test_one_launch_forward_and_one_backward(
    name: str, launches: list[Any], device: torch.device
) -> None:
    """With all that a call may ask for, too, within and across samples."""
    case = ALL[name]
    given = draw(case, device)
    knobs: dict[str, Any] = {"mask": hiding(case.groups, device), "reduction": "dro"}
    if case.setting.listed:
        knobs["weight"] = torch.linspace(0.5, 1.0, case.groups, device=device)
    elif name != "dspo":
        knobs |= {"safeguard": 0.3, "anchor_weight": 0.1}
    if case.setting.members > 2:
        knobs["lengths"] = torch.full((case.groups,), 3, device=device)
    for setting in (case.setting, case.setting._replace(**knobs)):
        launches.clear()
        pred = given.pred.clone().requires_grad_()
        out = getattr(fastpref, case.function)(
            pred, given.target, given.ref_pred, impl="triton", **options_of(case, setting, device)
        )
        assert len(launches) == 1
        torch.autograd.grad(out.loss, pred)
        assert len(launches) == 2


def test_one_launch_for_pair_errors(launches: list[Any], device: torch.device) -> None:
    given = draw(PAIR_CASES["dpo"], device)
    pred = given.pred.requires_grad_()
    errors = fastpref.pair_errors(pred, given.target, given.ref_pred, impl="triton")
    assert len(launches) == 1
    torch.autograd.grad(torch.stack(tuple(errors)).sum(), pred)
    assert len(launches) == 2


@each_impl
@pytest.mark.parametrize("name", ["kto", "ddo", "tgo", "rankdpo_3", "plackett_luce_3"])
def test_output_and_metrics(name: str, impl: str, device: torch.device) -> None:
    case = CASES[name]
    out = call(case, draw(case, device), impl).out
    assert isinstance(out, fastpref.SampleOutput)
    assert out._fields == ("loss", "errors", "margin", "ref_errors", "drops", "lengths")
    shape = (case.groups,) if case.setting.members == 1 else (case.groups, case.setting.members)
    assert out.errors.shape == out.ref_errors.shape == out.drops.shape == shape
    assert out.margin.shape == (case.groups,)
    assert out.loss.requires_grad
    assert not any(field.requires_grad for field in out[1:5])
    metrics = out.metrics()
    won = (out.margin > 0).float() + 0.5 * (out.margin == 0).float()
    wanted = {
        "loss": out.loss.detach(), "error": out.errors.mean(), "margin": out.margin.mean(),
        "accuracy": won.mean(), "gradient_factor": torch.sigmoid(-out.margin).mean(),
        "ref_error": out.ref_errors.mean(), "drop": out.drops.mean(),
    }  # fmt: skip
    assert metrics.keys() == wanted.keys()
    for key, value in wanted.items():
        assert metrics[key].shape == ()
        assert not metrics[key].requires_grad
        torch.testing.assert_close(metrics[key], value, msg=key)


@each_impl
def test_without_a_graph(impl: str, device: torch.device) -> None:
    for name in ("kto", "rankdpo_3", "dspo"):
        case = CASES[name]
        given = draw(case, device)
        options = options_of(case, case.setting, device)
        with torch.no_grad():
            out = getattr(fastpref, case.function)(*given[:3], impl=impl, **options)
        assert not out.loss.requires_grad
        assert torch.equal(out.loss, call(case, given, impl).loss.detach())


DEFAULTS: dict[str, dict[str, Any]] = {
    "kto_loss": {"beta": 1000.0, "lambda_desirable": 1.0, "lambda_undesirable": 1.0,
                 "utility": "kto", "kl": None},
    "ddo_loss": {"beta": 0.05, "alpha": 4.0, "error_reduction": "sum"},
    "tgo_loss": {"beta": 1000.0, "confidence": 5.0},
    "rankdpo_loss": {"beta": 5000.0, "lengths": None},
    "plackett_luce_loss": {"beta": 2500.0, "lengths": None},
    "dspo_loss": {"beta": 0.001},
    "diffusion_dro_loss": {"target_margin": 0.001},
}  # fmt: skip


@pytest.mark.parametrize("function", DEFAULTS)
def test_defaults(function: str, device: torch.device) -> None:
    """They are the papers', and what a call without them uses."""
    signature = inspect.signature(getattr(fastpref, function)).parameters
    for name, default in DEFAULTS[function].items():
        assert signature[name].default == default
        assert signature[name].kind is inspect.Parameter.KEYWORD_ONLY
    name = {"rankdpo_loss": "rankdpo_3", "plackett_luce_loss": "plackett_luce_3"}.get(
        function, function.removesuffix("_loss")
    )
    case = CASES[name]
    numbers = {k: v for k, v in case.numbers.items() if k not in DEFAULTS[function]}
    given = draw(case, device)
    bare = getattr(fastpref, function)(*given[:3], impl="torch", **numbers)
    torch.testing.assert_close(bare.loss, call(case, given, "torch").loss.detach())


X = torch.zeros(6, 3)
GOOD: dict[str, dict[str, Any]] = {
    "kto_loss": {"ref_pred": X, "label": torch.ones(6)},
    "ddo_loss": {"ref_pred": X, "real": torch.ones(6)},
    "tgo_loss": {"ref_pred": X, "score": torch.ones(6), "threshold": 0.5},
    "rankdpo_loss": {"ref_pred": X, "score": torch.ones(2, 3)},
    "plackett_luce_loss": {"ref_pred": X, "score": torch.ones(2, 3)},
    "dspo_loss": {"ref_pred": X},
    "diffusion_dro_loss": {"ref_pred": X},
    "dpo_loss": {"ref_pred": X},
    "mapo_loss": {},
    "pair_errors": {"ref_pred": X},
}
BAD: list[tuple[str, str, dict[str, Any]]] = [
    ("kto_loss", "label", {"label": None}),
    ("kto_loss", "label", {"label": torch.ones(5)}),
    ("kto_loss", "label", {"label": torch.ones(6, 1)}),
    ("kto_loss", "label", {"label": torch.full((6,), 2)}),
    ("kto_loss", "label", {"label": torch.full((6,), 0.5)}),
    ("kto_loss", "label", {"label": torch.full((6,), -1)}),
    ("kto_loss", "label", {"label": "good"}),
    ("kto_loss", "utility", {"utility": "risk_seeking_4"}),
    ("kto_loss", "kl", {"kl": torch.zeros(5)}),
    ("kto_loss", "kl", {"kl": math.nan}),
    ("kto_loss", "kl", {"kl": "mean"}),
    ("kto_loss", "lambda_desirable", {"lambda_desirable": -1.0}),
    ("kto_loss", "lambda_undesirable", {"lambda_undesirable": math.inf}),
    ("kto_loss", "beta", {"beta": "high"}),
    ("kto_loss", "ref_pred", {"ref_pred": None}),
    ("kto_loss", "ref_pred", {"ref_pred": X[:5]}),
    ("kto_loss", "ref_pred", {"ref_mse": X[:, 0]}),
    ("kto_loss", "ref_pred", {"ref_pred": X.clone().requires_grad_()}),
    ("kto_loss", "ref_mse", {"ref_pred": None, "ref_mse": X[:5, 0]}),
    ("kto_loss", "target", {"target": X[:5]}),
    ("kto_loss", "target", {"target": X[:3]}),
    ("kto_loss", "target", {"target": X.clone().requires_grad_()}),
    ("kto_loss", "mask", {"mask": torch.ones(6, 4)}),
    ("kto_loss", "mask", {"mask": torch.ones(6, 3, dtype=torch.int64)}),
    ("kto_loss", "weight", {"weight": torch.ones(5)}),
    ("kto_loss", "weight", {"weight": -1.0}),
    ("kto_loss", "weight", {"weight": torch.ones(6, requires_grad=True)}),
    ("kto_loss", "huber_c", {"huber_c": -0.1}),
    ("kto_loss", "huber_c", {"huber_c": torch.ones(5)}),
    ("kto_loss", "reduction", {"reduction": "average"}),
    ("kto_loss", "error_reduction", {"error_reduction": "none"}),
    ("kto_loss", "dro_temperature", {"reduction": "dro", "dro_temperature": 0.0}),
    ("kto_loss", "dro_temperature", {"reduction": "dro", "dro_temperature": -1.0}),
    ("kto_loss", "dro_temperature", {"reduction": "dro", "dro_temperature": math.nan}),
    ("kto_loss", "dro_temperature", {"reduction": "dro", "dro_temperature": torch.ones(6)}),
    ("kto_loss", "impl", {"impl": "cuda"}),
    ("kto_loss", "pair_weight", {"pair_weight": 1.0}),
    ("kto_loss", "loser_weight", {"loser_weight": 1.0}),
    ("ddo_loss", "real", {"real": None}),
    ("ddo_loss", "real", {"real": torch.ones(2, 3)}),
    ("ddo_loss", "real", {"real": torch.full((6,), 3)}),
    ("ddo_loss", "alpha", {"alpha": -1.0}),
    ("ddo_loss", "model_pred", {"model_pred": X[:0]}),
    ("tgo_loss", "score", {"score": None}),
    ("tgo_loss", "score", {"score": torch.ones(5)}),
    ("tgo_loss", "score", {"score": [1.0] * 6}),
    ("tgo_loss", "score", {"score": torch.full((6,), math.nan)}),
    ("tgo_loss", "threshold", {"threshold": None}),
    ("tgo_loss", "threshold", {"threshold": math.nan}),
    ("tgo_loss", "confidence", {"confidence": -1.0}),
    *(
        (function, *rest)
        for function in ("rankdpo_loss", "plackett_luce_loss")
        for rest in (
            ("score", {"score": None}),
            ("score", {"score": torch.ones(6)}),
            ("score", {"score": torch.ones(6, 1)}),
            ("score", {"score": torch.full((2, 3), math.nan)}),
            ("score", {"score": torch.ones(2, 3, requires_grad=True)}),
            ("lengths", {"lengths": torch.ones(3, dtype=torch.int64)}),
            ("lengths", {"lengths": torch.ones(2)}),
            ("lengths", {"lengths": torch.tensor([4, 1])}),
            ("lengths", {"lengths": torch.tensor([-1, 1])}),
            ("lengths", {"lengths": [3, 2]}),
            ("target", {"target": X[:3]}),
            ("weight", {"weight": torch.ones(6)}),
            ("mask", {"mask": torch.ones(3, 3)}),
        )
    ),
    ("rankdpo_loss", "score", {"model_pred": torch.zeros(17, 3), "target": torch.zeros(17, 3),
                               "ref_pred": torch.zeros(17, 3), "score": torch.ones(1, 17)}),
    ("rankdpo_loss", "model_pred", {"score": torch.ones(1, 4)}),
    ("dspo_loss", "ref_pred", {"ref_pred": None}),
    ("dspo_loss", "huber_c", {"huber_c": 0.1}),
    ("diffusion_dro_loss", "ref_pred", {"ref_pred": None}),
    ("diffusion_dro_loss", "target_margin", {"target_margin": math.nan}),
    ("diffusion_dro_loss", "target_margin", {"target_margin": torch.ones(6)}),
    ("dpo_loss", "safeguard", {"safeguard": 1.5}),
    ("dpo_loss", "safeguard", {"safeguard": -0.1}),
    ("dpo_loss", "safeguard", {"safeguard": torch.ones(3)}),
    ("dpo_loss", "safeguard_over", {"safeguard": 0.5, "safeguard_over": "all"}),
    ("dpo_loss", "safeguard", {"safeguard": 0.5, "huber_c": 0.1}),
    ("dpo_loss", "loser_gradient_scale", {"loser_gradient_scale": -1.0}),
    ("dpo_loss", "loser_gradient_scale", {"loser_gradient_scale": torch.ones(6)}),
    ("dpo_loss", "loser_gradient_scale", {"safeguard": 0.5, "loser_gradient_scale": 0.5}),
    ("dpo_loss", "anchor_weight", {"anchor_weight": -1.0}),
    ("dpo_loss", "ref_pred", {"anchor_weight": 1.0, "ref_pred": None, "ref_mse": X[:, 0]}),
    ("mapo_loss", "ref_pred", {"anchor_weight": 1.0, "ref_mse": X[:, 0]}),
    ("dpo_loss", "dro_temperature", {"reduction": "dro", "dro_temperature": 0.0}),
    ("dpo_loss", "reduction", {"reduction": "max"}),
    ("dpo_loss", "huber_c", {"huber_c": torch.ones(4)}),
    ("dpo_loss", "huber_c", {"huber_c": -1.0}),
    ("pair_errors", "error_reduction", {"error_reduction": "max"}),
    ("pair_errors", "huber_c", {"huber_c": torch.ones(4)}),
    ("pair_errors", "ref_pred", {"ref_pred": X[:4]}),
    ("pair_errors", "impl", {"impl": "cuda"}),
]  # fmt: skip


@pytest.mark.parametrize(("function", "name", "given"), BAD)
def test_bad_input_is_named(function: str, name: str, given: dict[str, Any]) -> None:
    options: dict[str, Any] = {"model_pred": X, "target": X, **GOOD[function], **given}
    with pytest.raises((TypeError, ValueError)) as caught:
        getattr(fastpref, function)(**options)
    assert name in str(caught.value).split(";")[0], str(caught.value)


@pytest.mark.parametrize("function", GOOD)
def test_what_bad_input_is_a_change_of_is_good(function: str) -> None:
    """Else the refusals might be for another reason."""
    found = getattr(fastpref, function)(model_pred=X, target=X, **GOOD[function])
    assert all(value is None or value.isfinite().all() for value in found)


def test_what_losses_from_errors_refuses() -> None:
    errors = torch.ones(4)
    with pytest.raises(ValueError, match="gap"):
        fastpref.losses_from_errors(errors, ref_mse=errors, gap=errors, link="dpo_sigmoid")
    with pytest.raises(ValueError, match="gap has shape"):
        fastpref.losses_from_errors(errors, gap=errors[:3], link="dpo_sigmoid")
    with pytest.raises(ValueError, match="gap"):
        fastpref.losses_from_errors(errors, gap=errors, link="mapo")


def test_metrics_of_lists_are_means_over_the_rows_there_are() -> None:
    generator = torch.Generator().manual_seed(0)
    pred, target, ref = torch.randn(3, 6, 5, generator=generator)
    lengths, score = torch.tensor([3, 1]), torch.rand(2, 3, generator=generator)
    out = fastpref.rankdpo_loss(pred, target, ref, score, lengths=lengths)
    there = [0, 1, 2, 3]
    of_there = (pred - target).square().mean(1)[there].mean()
    torch.testing.assert_close(out.metrics()["error"], of_there)
    of_ref = (ref - target).square().mean(1)[there].mean()
    torch.testing.assert_close(out.metrics()["drop"], of_there - of_ref)


@each_impl
@pytest.mark.parametrize("function", ["rankdpo_loss", "plackett_luce_loss"])
def test_lengths_that_are_a_column(function: str, impl: Any) -> None:
    pred, target, ref = torch.randn(3, 12, 5)
    lengths, score = torch.tensor([[4, 1], [2, 1], [3, 0]])[:, 0], torch.rand(3, 4)

    def of(lengths: Tensor) -> Tensor:
        loss = getattr(fastpref, function)
        out = loss(pred, target, ref, score, lengths=lengths, beta=10.0, impl=impl)
        return out.loss  # type: ignore[no-any-return]

    assert torch.equal(of(lengths), of(lengths.contiguous()))
    assert torch.equal(of(lengths.to(torch.uint8)), of(lengths.contiguous()))


def against(pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs whose losers' gradients go against their winners'."""
    pred, target, drift = torch.randn(3, 2 * pairs, 8, generator=torch.Generator().manual_seed(0))
    target[pairs:] = pred[pairs:] - 1.5 * (pred[:pairs] - target[:pairs])
    return pred, target, pred + 0.1 * drift


def exchanged(pairs: Tensor) -> Tensor:
    return pairs.roll(len(pairs) // 2, 0)


@each_impl
@pytest.mark.parametrize("over", ["batch", "pair"])
def test_a_safeguard_of_swapped_labels_is_that_of_exchanged_pairs(over: str, impl: Any) -> None:
    """With masks of different sizes."""
    pred, target, ref = against(2)
    mask = torch.ones(4, 8)
    mask[:2, 2:] = 0
    options: dict[str, Any] = {"beta": 2.0, "safeguard": 0.5, "safeguard_over": over, "impl": impl}
    leaf, other = pred.clone().requires_grad_(), exchanged(pred).requires_grad_()
    out = fastpref.dpo_loss(leaf, target, ref, mask=mask, swap=True, **options)
    given = (exchanged(each) for each in (target, ref))
    by_hand = fastpref.dpo_loss(other, *given, mask=exchanged(mask), **options)
    (grad,), (wanted,) = (
        torch.autograd.grad(o.loss, x) for o, x in ((out, leaf), (by_hand, other))
    )
    torch.testing.assert_close(grad, exchanged(wanted))


@each_impl
@pytest.mark.parametrize("function", ["dpo_loss", "dspo_loss"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_a_pair_of_weight_0_is_not_in_the_safeguards_sums(
    function: str, bad: float, impl: Any
) -> None:
    pred, target, ref = against(3)
    options = {"beta": 2.0, "safeguard": 0.9, "pair_weight": torch.tensor([0.0, 1.0, 1.0])}
    grads = []
    for value in (0.3, bad):
        leaf = pred.clone()
        leaf[0] = value
        leaf.requires_grad_()
        loss = getattr(fastpref, function)(leaf, target, ref, impl=impl, **options).loss
        grads.append(torch.autograd.grad(loss, leaf)[0])
    assert grads[1].isfinite().all()
    torch.testing.assert_close(grads[1][[1, 2, 4, 5]], grads[0][[1, 2, 4, 5]])


@each_impl
def test_a_mask_of_padding_may_be_anything(impl: Any) -> None:
    pred, target, ref = torch.randn(3, 6, 8)
    mask = torch.ones(6, 8)
    mask[5] = math.nan
    leaf = pred.requires_grad_()
    loss = fastpref.rankdpo_loss(
        leaf, target, ref, torch.rand(2, 3), mask=mask, lengths=torch.tensor([3, 2]), impl=impl
    ).loss
    (grad,) = torch.autograd.grad(loss, leaf)
    assert grad.isfinite().all()
    assert (grad[5] == 0).all()


@pytest.mark.parametrize(("function", "impl"), [
    ("dpo_loss", "torch"), ("dpo_loss", "triton"), ("pair_errors", "triton")
])  # fmt: skip
def test_a_huber_c_that_changed_before_backward_is_noticed(function: str, impl: Any) -> None:
    pred, target, ref = torch.randn(3, 6, 8)
    huber_c = torch.full((6,), 0.1)
    leaf = pred.requires_grad_()
    found = getattr(fastpref, function)(leaf, target, ref, huber_c=huber_c, impl=impl)
    huber_c.fill_(5.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(found[0].sum(), leaf)


def test_what_losses_from_errors_does_not_take_is_not_among_what_it_accepts() -> None:
    with pytest.raises(TypeError, match="unexpected argument safeguard") as caught:
        fastpref.losses_from_errors(torch.rand(6), link="mapo", safeguard=0.5)
    assert "safeguard" not in str(caught.value).split("it accepts")[1]


def test_modules_take_what_calls_take() -> None:
    each = fastpref.RankDPOLoss(weight=torch.ones(3), huber_c=torch.ones(12))
    pred, target, ref = torch.randn(3, 12, 5)
    assert each(pred, target, ref, torch.rand(3, 4)).loss.isfinite()
    of_pairs = fastpref.DPOLoss(sample_weight=[torch.ones(6), torch.ones(6)])
    assert of_pairs(pred, target, ref).loss.isfinite()
