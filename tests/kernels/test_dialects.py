"""Every way to a loss gives one value and one gradient: kernels, closed form on tensors and on
floats, autograd of the value, torch.func, compiled code, and errors that a trainer has. At ties and
at the bounds of clipped terms, too, where ways differ that agree everywhere else."""
# mypy: disable-error-code="arg-type"

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import covering
import fastpref
import oracles
from fastpref import reference
from fastpref_kernels import LINKS, TRITON_MISSING

Way = Callable[[str, dict[str, Tensor], dict[str, Any]], tuple[Tensor, Tensor]]


def loss_of(
    link: str, given: dict[str, Tensor], options: dict[str, Any], **more: Any
) -> Callable[[Tensor], Tensor]:
    """Of the predictions."""
    rest = {name: tensor for name, tensor in given.items() if name != "model_pred"}
    return lambda pred: fastpref.pair_loss(pred, **rest, link=link, **options, **more).loss


def stepped(loss: Callable[[Tensor], Tensor], pred: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
    pred = pred.clone().requires_grad_()
    value = loss(pred)
    return value.detach(), torch.autograd.grad(value, pred, **how)[0].detach()


def kernels(link: str, given: Any, options: Any) -> tuple[Tensor, Tensor]:
    return stepped(loss_of(link, given, options, impl="triton"), given["model_pred"])


def closed_form(link: str, given: Any, options: Any) -> tuple[Tensor, Tensor]:
    """On floats where a CPU has few pairs."""
    return stepped(loss_of(link, given, options, impl="torch"), given["model_pred"])


def on_tensors(link: str, given: Any, options: Any) -> tuple[Tensor, Tensor]:
    few, reference.FEW = reference.FEW, 0
    try:
        return closed_form(link, given, options)
    finally:
        reference.FEW = few


def autograd(link: str, given: Any, options: Any) -> tuple[Tensor, Tensor]:
    loss = loss_of(link, given, options, impl="torch")
    return stepped(loss, given["model_pred"], create_graph=True)


def functional(link: str, given: Any, options: Any) -> tuple[Tensor, Tensor]:
    loss = loss_of(link, given, options)
    grad, value = torch.func.grad_and_value(loss)(given["model_pred"])
    return value, grad


def forward_mode(link: str, given: Any, options: Any) -> tuple[Tensor, Tensor]:
    pred, loss = given["model_pred"], loss_of(link, given, options)
    return loss(pred), torch.func.jacfwd(loss)(pred)  # type: ignore[return-value]


def compiled(link: str, given: Any, options: Any) -> tuple[Tensor, Tensor]:
    torch._dynamo.reset()
    loss = loss_of(link, given, options, impl="torch")
    return stepped(torch.compile(loss, fullgraph=True, backend="aot_eager"), given["model_pred"])


def from_errors(link: str, given: Any, options: Any) -> tuple[Tensor, Tensor]:
    def loss(pred: Tensor) -> Tensor:
        mse = (pred - given["target"]).square().mean(1)
        ref = {}
        if "ref_pred" in given:
            ref = {"ref_mse": (given["ref_pred"] - given["target"]).square().mean(1)}
        return fastpref.losses_from_errors(mse, link=link, **ref, **options).loss

    return stepped(loss, given["model_pred"])


WAYS: dict[str, Way] = {
    way.__name__: way
    for way in (
        kernels, closed_form, on_tensors, autograd, functional, forward_mode, compiled, from_errors,
    )
}  # fmt: skip


def batch(link: str, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Three pairs on which the policy is somewhat off the reference, and what the link needs."""
    generator = torch.Generator().manual_seed(0)
    target, noise, drift = torch.randn(3, 6, 5, generator=generator).to(device)
    pred = target + 0.3 * noise
    given = {"model_pred": pred, "target": target}
    if LINKS[link].score.needs_ref:
        given["ref_pred"] = pred + 0.1 * drift
    hyper = LINKS[link].hyper
    options: dict[str, Any] = {name: 0.3 for name, each in hyper.items() if each.default is None}
    options |= {"beta": 3.0} if "beta" in hyper else {}
    return given, options


KNOBS: dict[str, Any] = {"logit_scale": 0.7, "loser_weight": 0.4, "pair_weight": 2.0}
KNOBS |= {"sft_weight": 0.3, "prior_weight": 0.2, "sample_weight": (1.5, 0.5)}


def check(link: str, ways: Iterable[str], knobs: bool, device: torch.device) -> None:
    given, options = batch(link, device)
    if knobs:
        smoothed = {} if "label_smoothing" in LINKS[link].hyper else {"label_smoothing": 0.2}
        options |= KNOBS | smoothed
    in_fp64 = {name: tensor.double() for name, tensor in given.items()}
    wanted = autograd(link, in_fp64, options)
    for name in ways:
        value, grad = (x.double() for x in WAYS[name](link, given, options))
        torch.testing.assert_close(value, wanted[0], rtol=1e-5, atol=1e-6, msg=name)
        scale = wanted[1].abs().max().item()
        torch.testing.assert_close(grad, wanted[1], rtol=1e-4, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("knobs", [False, True], ids=["plain", "knobs"])
@pytest.mark.parametrize("link", LINKS)
def test_every_way_gives_one_value_and_one_gradient(
    link: str, knobs: bool, device: torch.device
) -> None:
    check(link, WAYS.keys() - {"compiled"}, knobs, device)


# With knobs as well as without, what is compiled is the link's text.
@pytest.mark.parametrize(
    ("knobs", "link"),
    covering.product(
        [False, True],
        [*LINKS],
        fast=lambda knobs, link: knobs or link in ("mapo", "dpo_sigmoid"),
    ),
)
def test_compiled_code_gives_that_value_and_that_gradient(
    link: str, knobs: bool, device: torch.device
) -> None:
    """torch.compile takes each link whole."""
    check(link, ["compiled"], knobs, device)


# A link, its options, errors of winner and loser, those of the reference, and the slopes by the
# former, all exact in binary.
TIES: dict[str, tuple[str, dict[str, Any], tuple[float, ...], tuple[float, float]]] = {
    # softplus has the slope 1/2 at 0, which beta and the score multiply
    "sigmoid at a tie": ("dpo_sigmoid", {"beta": 4.0}, (1, 1, 1, 1), (1.0, -1.0)),
    "orpo at a tie": ("orpo", {"beta": 2.0, "sft_weight": 0.0}, (1, 1), (1.0, -1.0)),
    "simpo at a tie": ("simpo", {"beta": 4.0, "gamma": 0.0}, (1, 1), (2.0, -2.0)),
    "a smoothed tie": (
        "dpo_sigmoid", {"beta": 4.0, "label_smoothing": 0.25}, (1, 1, 1, 1), (0.5, -0.5)),
    # at the kink the loss is won: slope 0, not 1 and not 1/2
    "hinge at 1": ("dpo_hinge", {"beta": 2.0}, (1, 1, 2, 1), (0.0, 0.0)),
    "hinge below 1": ("dpo_hinge", {"beta": 1.0}, (1, 1, 2, 1), (0.5, -0.5)),
    "hinge at 1, without a reference": (
        "pso_hinge", {"beta": 1.0, "loser_weight": 1.0, "prior_weight": 0.0}, (1, 2), (0.0, 0.0)),
    # a winner that costs as much as its budget costs nothing yet; the other half is softplus's
    "budget at 0": (
        "budget_dpo", {"beta": 4.0, "budget_weight": 8.0}, (1, 1, 1, 1), (1.0, -1.0)),
    "budget at its end": (
        "budget_dpo", {"beta": 2.0, "budget": 1.0, "budget_weight": 8.0}, (2, 2, 1, 1),
        (0.5, -0.5)),
    "budget beyond": (
        "budget_dpo", {"beta": 2.0, "budget": 0.5, "budget_weight": 8.0}, (2, 2, 1, 1),
        (8.5, -0.5)),
    "linear at a tie": ("linear_dpo", {"beta": 8.0, "eta": 0.125}, (1, 1, 1, 1), (0.5, -0.5)),
    "linear at its least": (
        "linear_dpo", {"beta": 8.0, "eta": 0.125}, (1, 1, 2, 1), (0.125, -0.125)),
    "linear at its most": (
        "linear_dpo", {"beta": 8.0, "eta": 0.125}, (2, 1, 1, 1), (0.875, -0.875)),
    "linear won": ("linear_dpo", {"beta": 8.0}, (1, 1, 2, 1), (0.0, 0.0)),
    "ipo at its aim": ("dpo_ipo", {"beta": 0.5}, (1, 1, 2, 1), (0.0, 0.0)),
    "capo at its aim": ("capo", {"beta": 1.0, "delta": 1.0}, (1, 1, 2, 1), (0.0, 0.0)),
    "robust at a tie": (
        "dpo_robust", {"beta": 4.0, "label_smoothing": 0.25}, (1, 1, 1, 1), (2.0, -2.0)),
    "apo_zero at a tie": ("dpo_apo_zero", {"beta": 2.0}, (1, 1, 1, 1), (0.25, -0.25)),
    "bco at a tie": ("dpo_bco_pair", {"beta": 2.0}, (1, 1, 1, 1), (0.5, -0.5)),
    "nca at a tie": ("dpo_nca_pair", {"beta": 2.0}, (1, 1, 1, 1), (0.25, -0.25)),
    "alpha at a tie": ("dpo_alpha", {"beta": 2.0, "alpha": 2.0}, (1, 1, 1, 1), (0.125, -0.125)),
}  # fmt: skip


@pytest.mark.parametrize("tie", TIES)
@pytest.mark.parametrize("way", WAYS)
def test_slopes_at_ties_and_bounds(way: str, tie: str, device: torch.device) -> None:
    link, options, errors, slopes = TIES[tie]
    # Four elements hold 1/2, 1, 2 and 3 exactly as a mean of squares; target 0.
    held = {0.5: [1, 1, 0, 0], 1: [1, 1, 1, 1], 2: [2, 2, 0, 0], 3: [3, 1, 1, 1]}
    rows = torch.tensor([held[error] for error in errors], dtype=torch.float32, device=device)
    given = {"model_pred": rows[:2], "target": torch.zeros_like(rows[:2])}
    if LINKS[link].score.needs_ref:
        given["ref_pred"] = rows[2:]
    _, grad = WAYS[way](link, given, options)
    wanted = torch.tensor(slopes, device=device)[:, None] * 2 / 4 * rows[:2]
    torch.testing.assert_close(grad, wanted, rtol=1e-6, atol=1e-7)
    truth = oracles.pair(link, oracles.Errors(*map(float, errors)), complete(link, options))
    for slope, (below, above) in zip(slopes, (truth.slope_w, truth.slope_l), strict=True):
        least, most = sorted((float(below), float(above)))
        assert least - 1e-9 <= slope <= most + 1e-9


def complete(link: str, options: dict[str, Any]) -> dict[str, float]:
    defaults = {name: hyper.default for name, hyper in LINKS[link].hyper.items()}
    known = {name: value for name, value in defaults.items() if value is not None}
    return {**known, **LINKS[link].knobs, **options}


@pytest.mark.parametrize("triton", ["missing", "there"])
def test_a_link_from_outside_where_there_is_no_triton(triton: str) -> None:
    """With what `fastpref.links` has, and compiled as well."""
    script = f"""
import sys
if {triton == "missing"}:
    sys.modules["triton"] = None
import torch
import fastpref
import outside_link
x = torch.tensor([[1.0], [2.0]], requires_grad=True)
zeros = torch.zeros(2, 1)
def loss(x):
    link = outside_link.EXPONENTIAL
    return fastpref.pair_loss(x, zeros, zeros, link=link, beta=1.0, rate=0.5, impl="torch").loss
wanted = torch.exp(-0.25 * (x[1] ** 2 - x[0] ** 2))
expected = torch.autograd.grad(wanted.sum(), x)[0]
for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
    torch.testing.assert_close(run(x), wanted[0])
    torch.testing.assert_close(torch.autograd.grad(run(x), x)[0], expected)
print("right")
"""
    if triton == "there" and TRITON_MISSING:
        pytest.skip(TRITON_MISSING)
    root = Path(__file__).resolve().parents[2]
    path = [str(root / "tests" / "helpers"), str(root)]
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {path}\n{script}"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout == "right\n", result.stderr[-3000:]
