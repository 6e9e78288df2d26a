"""A weight of 0 adds exactly 0 to loss and gradient, whatever it weighs, and keeps the graph."""
# mypy: disable-error-code="arg-type"

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import covering
import fastpref
from fastpref_kernels import LINKS

B = 3
IMPLS = ("triton", "torch", "errors")
# The interpreter is slow: links of each kind (no reference, a reference, losers left out, weights
# of its own) go through whole kernels; all go through PyTorch.
CASES = [
    (impl, link)
    for impl in IMPLS
    for link in (LINKS if impl != "triton" else ("mapo", "sft", "dpo_sigmoid", "pso_sigmoid"))
]
# What the weights at 0 leave out: the second pair whole, its winner, its loser, or all.
ZEROS: dict[str, tuple[dict[str, Any], str]] = {
    "pair_weight": ({"pair_weight": [1.0, 0.0, 2.0]}, "pair"),
    "sample_weight of winners": ({"sample_weight": ([1.0, 0.0, 2.0], 1.0)}, "winner"),
    "sample_weight of losers": ({"sample_weight": (1.0, [1.0, 0.0, 2.0])}, "loser"),
    "logit_scale": (
        {"logit_scale": [1.0, 0.0, 2.0], "sft_weight": 0.0, "prior_weight": 0.0}, "pair"),
    "logit_scale beside a fit": (
        {"logit_scale": [1.0, 0.0, 2.0], "sft_weight": 0.5, "prior_weight": 0.5}, "reference"),
    "loser_weight": ({"loser_weight": [1.0, 0.0, 2.0], "prior_weight": 0.0}, "loser"),
    "prior_weight": ({"prior_weight": [1.0, 0.0, 2.0], "loser_weight": 0.0}, "loser"),
    "sft_weight": (
        {"sft_weight": [1.0, 0.0, 2.0], "logit_scale": 0.0, "prior_weight": 0.0}, "pair"),
    "label_smoothing": ({"label_smoothing": [0.1, 0.0, 0.2]}, ""),
    "pair_weight for all": ({"pair_weight": 0.0}, "all"),
    "sample_weight for all": ({"sample_weight": 0.0}, "all"),
    "logit_scale for all": ({"logit_scale": 0.0, "sft_weight": 0.0, "prior_weight": 0.0}, "all"),
}  # fmt: skip


def tensors(needs_ref: bool, device: torch.device) -> dict[str, Tensor]:
    """Winners first, then losers, of predictions, targets and, with one, a reference."""
    generator = torch.Generator().manual_seed(1)
    pred, noise, drift = torch.randn(3, 2 * B, 5, generator=generator).to(device)
    given = {"model_pred": pred, "target": pred + 0.3 * noise}
    return given | ({"ref_pred": pred + 0.2 * drift} if needs_ref else {})


def poison(given: dict[str, Tensor], what: str, value: float) -> dict[str, Tensor]:
    rows = {"pair": [1, B + 1], "winner": [1], "loser": [B + 1], "all": range(2 * B)}
    given = {name: tensor.clone() for name, tensor in given.items()}
    for name, tensor in given.items():
        if what != "reference":
            tensor[list(rows.get(what, []))] = value
        elif name == "ref_pred":
            tensor[[1, B + 1]] = value
    return given


def step(
    impl: str, link: str, given: dict[str, Tensor], options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Loss and gradient; the winners and the losers come from two tensors, as from two passes."""
    halves = [half.requires_grad_() for half in given["model_pred"].clone().chunk(2)]
    if impl == "errors":
        pred = torch.cat(halves)
        mse = (pred - given["target"]).square().mean(1)
        leaves = [half.detach().requires_grad_() for half in mse.chunk(2)]
        ref = (
            (given["ref_pred"] - given["target"]).square().mean(1) if "ref_pred" in given else None
        )
        loss = fastpref.losses_from_errors(tuple(leaves), link=link, ref_mse=ref, **options).loss
        return loss, torch.cat(torch.autograd.grad(loss, leaves))
    rest = {name: tuple(t.chunk(2)) for name, t in given.items() if name != "model_pred"}
    loss = fastpref.pair_loss(tuple(halves), link=link, impl=impl, **rest, **options).loss
    return loss, torch.cat(torch.autograd.grad(loss, halves))


def numbers(link: str, options: dict[str, Any], as_tensor: Callable[[Any], Any]) -> dict[str, Any]:
    """The options of a test, and the hyper-parameters that have no default."""
    own = LINKS[link].hyper
    made = {
        name: tuple(map(as_tensor, value)) if isinstance(value, tuple) else as_tensor(value)
        for name, value in options.items()
        if not (name == "label_smoothing" and name in own)
    }
    defaults = {name: 0.3 for name, hyper in own.items() if hyper.default is None}
    scale = {"beta": 3.0} if "beta" in own else {"num_train_timesteps": 10.0}
    return defaults | (scale if scale.keys() <= own.keys() else {}) | made


# What weighs errors that a trainer has, is what weighs ours: of these the links take turns.
IN_TURN = covering.in_turn([*LINKS], [*ZEROS])


@pytest.mark.parametrize(
    ("case", "zero"),
    covering.product(
        CASES,
        [*ZEROS],
        fast=lambda case, zero: case[0] != "errors" or IN_TURN(case[1], zero),
        ids=lambda case, zero: "-".join((*case, zero)),
    ),
)
def test_a_weight_of_zero(case: tuple[str, str], zero: str, device: torch.device) -> None:
    impl, link = case
    options, what = ZEROS[zero]
    given = tensors(LINKS[link].score.needs_ref, device)
    if what == "reference" and "ref_pred" not in given:
        pytest.skip("a link without a reference")

    def as_tensor(value: Any) -> Any:
        return torch.tensor(value, device=device)

    forms = [numbers(link, options, as_tensor)]
    if all(isinstance(value, float) for value in options.values()):
        forms.append(numbers(link, options, lambda value: value))
    for made in forms:
        loss, grad = step(impl, link, given, made)
        assert loss.requires_grad
        assert grad.isfinite().all()
        for value in (math.nan, math.inf, -math.inf):
            again, grad_again = step(impl, link, poison(given, what, value), made)
            torch.testing.assert_close(again, loss, rtol=0, atol=0)
            torch.testing.assert_close(grad_again, grad, rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_label_of_even_odds_leaves_its_pair_out(impl: str, device: torch.device) -> None:
    """SmPO's factor 2 prob - 1."""
    given, prob = tensors(True, device), torch.tensor([0.9, 0.5, 0.7], device=device)
    loss, grad = step(impl, "smpo", given, {"prob": prob, "beta": 3.0})
    again = step(impl, "smpo", poison(given, "pair", math.nan), {"prob": prob, "beta": 3.0})
    torch.testing.assert_close(again, (loss, grad), rtol=0, atol=0)
    assert not grad[1].any()


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_losers_of_sft_get_a_gradient_of_zero(impl: str, device: torch.device) -> None:
    given = poison(tensors(False, device), "loser", math.nan)
    _, grad = step(impl, "sft", given, {})
    assert (grad[B:] == 0).all()
    assert grad[:B].isfinite().all()


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_one_padded_pair_leaves_the_others_alone(impl: str, device: torch.device) -> None:
    """As trainers pad a last batch: NaN in the reference's errors and in the target."""
    given = tensors(True, device)
    ref_mse = (given.pop("ref_pred") - given["target"]).square().mean(1)
    weight = torch.tensor([1.0, 0.0, 1.0], device=device)
    results = []
    for value in (0.0, math.nan):
        ref_mse, target = ref_mse.clone(), given["target"].clone()
        ref_mse[[1, B + 1]] = target[[1, B + 1]] = value
        pred = given["model_pred"].clone().requires_grad_()
        out = fastpref.dpo_loss(
            pred, target, ref_mse=ref_mse, beta=3.0, pair_weight=weight, impl=impl
        )
        results.append((out.loss, *torch.autograd.grad(out.loss, pred)))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_a_weight_that_is_differentiated_by_has_its_derivative_at_zero() -> None:
    """As in learning to reweight examples, whose weights begin at 0."""
    given = tensors(True, torch.device("cpu"))

    def loss(weight: Tensor, pred: Tensor) -> Tensor:
        return fastpref.dpo_loss(
            pred, given["target"], given["ref_pred"], beta=3.0, pair_weight=weight
        ).loss

    weight, ones = torch.zeros(B), torch.ones(B)
    slope: Any = torch.func.jvp(lambda w: loss(w, given["model_pred"]), (weight,), (ones,))[1]
    torch.testing.assert_close(slope, loss(ones, given["model_pred"]))
    grad = torch.func.grad(loss, argnums=1)
    mixed: Any = torch.func.jvp(lambda w: grad(w, given["model_pred"]), (weight,), (ones,))[1]
    torch.testing.assert_close(mixed, grad(ones, given["model_pred"]))
