"""Bad input: the error names the argument, what came and what is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastpref
from fastpref.transitions import Transition

X = torch.zeros(4, 3)


def case(
    error: type[Exception], *words: str, target: Any = X, pred: Any = X, **options: Any
) -> Any:
    return pytest.param(error, words, pred, target, options, id=" ".join(words))


CASES = [
    case(ValueError, "model_pred", "3", "odd", pred=X[:3]),
    case(ValueError, "model_pred", "(4,)", "two dimensions", pred=X[:, 0]),
    case(ValueError, "target", "()", "two dimensions", target=X[0, 0]),
    case(ValueError, "model_pred", "empty", "(0, 3)", pred=X[:0]),
    case(ValueError, "model_pred", "empty", "(4, 0)", pred=X[:, :0]),
    case(ValueError, "target", "(4, 2)", "(4, 3)", "(2, 3)", target=X[:, :2]),
    case(ValueError, "target", "(3, 3)", "(4, 3)", "(2, 3)", target=X[:3]),
    case(ValueError, "target", "(4, 3, 1)", "(4, 3)", target=X[..., None]),
    case(ValueError, "target", "(4, 3) in each half", "(2, 3)", target=(X, X)),
    case(ValueError, "target", "(2, 3)", "(3, 3)", pred=(X[:3], X[:3]), target=X[:2]),
    case(ValueError, "model_pred", "(2, 3)", "(1, 3)", "equal", pred=(X[:2], X[:1])),
    case(TypeError, "model_pred", "int64", "float32", pred=X.long()),
    case(TypeError, "model_pred", "complex64", pred=X.to(torch.complex64)),
    case(TypeError, "target", "bool", "float32", target=X.bool()),
    case(TypeError, "target[1]", "int32", target=(X[:2], X[:2].int())),
    case(TypeError, "model_pred", "list of 3", "(winners, losers)", pred=[X, X, X]),
    case(TypeError, "model_pred", "ndarray", pred=X.numpy()),
    case(TypeError, "target", "NoneType", target=None),
    case(TypeError, "target[0]", "float", "Tensor", target=(1.0, X)),
    case(ValueError, "target", "meta", "cpu", target=X.to("meta")),
    case(ValueError, "model_pred[1]", "meta", "cpu", pred=(X[:2], X[:2].to("meta"))),
    case(ValueError, "target", "gradient", "detach", target=X.clone().requires_grad_()),
    case(ValueError, "beta", "0", "above 0", beta=0),
    case(ValueError, "beta", "-0.1", "above 0", beta=-0.1),
    case(ValueError, "beta", "nan", "above 0", beta=float("nan")),
    case(ValueError, "snr", "inf", "finite", snr=float("inf")),
    case(ValueError, "num_train_timesteps", "0", "above 0", num_train_timesteps=0),
    case(ValueError, "num_train_timesteps", "-1", num_train_timesteps=-1000),
    case(TypeError, "beta", "str", "float", beta="0.1"),
    case(TypeError, "beta", "bool", beta=True),
    case(TypeError, "snr", "missing", snr=None),
    case(ValueError, "beta", "(3,)", "(2,)", beta=torch.ones(3)),
    case(ValueError, "beta", "(2, 1)", "(2,)", beta=torch.ones(2, 1)),
    case(ValueError, "beta contains -1.0", "above 0", beta=torch.tensor([1.0, -1.0])),
    case(ValueError, "beta", "int64", "float", beta=torch.tensor(1)),
    case(
        ValueError, "beta", "gradient", "beta.detach()", beta=torch.tensor(0.1, requires_grad=True)
    ),
    case(ValueError, "beta", "meta", "cpu", beta=torch.tensor(0.1, device="meta")),
    case(ValueError, "reduction", "'avg'", "mean", reduction="avg"),
    case(ValueError, "error_reduction", "'none'", "sum", error_reduction="none"),
    case(ValueError, "label_smoothing", "0.5", "[0, 0.5)", label_smoothing=0.5),
    case(
        ValueError, "label_smoothing contains -0.1", "[0, 0.5)", label_smoothing=torch.tensor(-0.1)
    ),
    case(ValueError, "pair_weight", "-1", "[0, inf)", pair_weight=-1.0),
    case(ValueError, "logit_scale", "nan", "(-inf, inf)", logit_scale=float("nan")),
    case(ValueError, "sft_weight", "(4,)", "(2,)", sft_weight=torch.ones(4)),
    case(ValueError, "sample_weight", "(3,)", "(2,)", "(4,)", sample_weight=torch.ones(3)),
    case(ValueError, "sample_weight", "(4,)", sample_weight=(1.0, torch.ones(4))),
    case(ValueError, "sample_weight", "-2", "[0, inf)", sample_weight=-2.0),
    case(TypeError, "sample_weight", "tuple of 3", sample_weight=(1.0, 1.0, 1.0)),
    case(ValueError, "mask", "(2, 2)", "(4, 3)", "may be 1", mask=torch.ones(2, 2)),
    case(ValueError, "mask", "(4,)", "two dimensions", mask=torch.ones(4)),
    case(TypeError, "mask", "int64", "bool", mask=torch.ones(4, 3, dtype=torch.int64)),
    case(ValueError, "mask", "meta", mask=X.to("meta")),
    case(
        ValueError,
        "ref_pred or ref_mse was given",
        "mapo",
        "no reference",
        link="mapo",
        ref_mse=torch.ones(4),
    ),
    case(TypeError, "swap", "str", "True or False", swap="no"),
    case(ValueError, "impl", "'cuda'", "auto", impl="cuda"),
    case(ValueError, "impl", "triton", "float64", pred=X.double(), impl="triton"),
]


@pytest.mark.parametrize(("error", "words", "pred", "target", "options"), CASES)
def test_message(
    error: type[Exception], words: tuple[str, ...], pred: Any, target: Any, options: dict[str, Any]
) -> None:
    with pytest.raises(error) as caught:
        fastpref.pair_loss(pred, target, **({"link": "mapo"} | options))
    message = str(caught.value)
    assert message.startswith(words[0])
    assert all(word in message for word in words), message


R = torch.zeros(4, 3)
REFERENCE_CASES: list[tuple[Any, type[Exception], str, dict[str, Any]]] = [
    (fastpref.dpo_loss, ValueError, "ref_pred or ref_mse is missing; loss 'dpo_sigmoid'", {}),
    (
        fastpref.dpo_loss,
        ValueError,
        "ref_pred and ref_mse were both given",
        {"ref_pred": R, "ref_mse": R[:, 0]},
    ),
    (fastpref.dpo_loss, ValueError, r"ref_pred has shape \(2, 3\)", {"ref_pred": R[:2]}),
    (fastpref.dpo_loss, ValueError, r"ref_mse has shape \(2,\)", {"ref_mse": R[:2, 0]}),
    (
        fastpref.dpo_loss,
        TypeError,
        "ref_mse must be a tensor or a tuple .*got a float",
        {"ref_mse": 0.1},
    ),
    (
        fastpref.dpo_loss,
        ValueError,
        r"ref_pred requires a gradient.*ref_pred\.detach\(\)",
        {"ref_pred": R.clone().requires_grad_()},
    ),
    (fastpref.dpo_loss, ValueError, "loss_type is 'kto'", {"ref_pred": R, "loss_type": "kto"}),
    (
        fastpref.dpo_loss,
        ValueError,
        "alpha was given with loss_type 'ipo'",
        {"ref_pred": R, "loss_type": "ipo", "alpha": 0.5},
    ),
    (
        fastpref.dpo_loss,
        ValueError,
        r"label_smoothing is 0\.0; expected a number in \(0, 0\.5\)",
        {"ref_pred": R, "loss_type": "exo_pair"},
    ),
    (
        fastpref.dpo_loss,
        ValueError,
        r"label_smoothing is 0\.6; expected a number in \[0, 0\.5\)",
        {"ref_pred": R, "label_smoothing": 0.6},
    ),
    (fastpref.smpo_loss, TypeError, "prob is missing", {"ref_pred": R}),
    (
        fastpref.smpo_loss,
        ValueError,
        r"prob is 1\.5; expected a number in \[0, 1\]",
        {"ref_pred": R, "prob": 1.5},
    ),
    (
        fastpref.smpo_loss,
        ValueError,
        r"prob contains -0\.5",
        {"ref_pred": R, "prob": torch.tensor([0.5, -0.5])},
    ),
    (
        fastpref.smpo_loss,
        ValueError,
        r"prob is .*\(3,\).*\(2,\)",
        {"ref_pred": R, "prob": torch.ones(3)},
    ),
    (fastpref.capo_loss, TypeError, "delta is missing", {"ref_pred": R}),
    (fastpref.capo_loss, ValueError, r"delta is .*\(4,\)", {"ref_pred": R, "delta": torch.ones(4)}),
    (
        fastpref.dmpo_loss,
        ValueError,
        r"alpha is 0\.0; expected a number in \(0, 0\.5\)",
        {"ref_pred": R, "alpha": 0.0},
    ),
    (
        fastpref.npo_loss,
        ValueError,
        "loss_type is 'robust'",
        {"ref_pred": R, "loss_type": "robust"},
    ),
    (
        fastpref.pso_loss,
        ValueError,
        "ref_pred or ref_mse was given, but loss 'pso_hinge'",
        {"ref_pred": R},
    ),
    (fastpref.pso_loss, ValueError, "ref_pred or ref_mse is missing", {"loss_type": "sigmoid"}),
    (fastpref.pso_loss, ValueError, "loss_type is 'pso'", {"loss_type": "pso"}),
    (fastpref.budget_dpo_loss, ValueError, r"budget is -1\.0", {"ref_pred": R, "budget": -1}),
    (fastpref.seppo_loss, TypeError, "loser_weight", {"ref_pred": R, "loser_weight": 0.5}),
    (
        fastpref.seppo_loss,
        ValueError,
        r"loser_weight is .*\(3,\)",
        {"ref_pred": R, "sign": torch.ones(3)},
    ),
    (
        fastpref.self_npo_loss,
        ValueError,
        r"huber_c is -0\.1; expected a number in \[0, inf\)",
        {"huber_c": -0.1, "paired": True},
    ),
    (
        fastpref.self_npo_loss,
        ValueError,
        r"huber_c is .*\(3,\); expected .* \(\) or \(2,\)",
        {"huber_c": torch.ones(3), "paired": True},
    ),
]


@pytest.mark.parametrize(("function", "error", "message", "options"), REFERENCE_CASES)
def test_message_of_other_losses(
    function: Any, error: type[Exception], message: str, options: dict[str, Any]
) -> None:
    with pytest.raises(error, match=message):
        function(X, X, **options)


def test_messages_of_what_takes_errors_and_scores() -> None:
    errors = torch.ones(4)
    cases: list[tuple[str, dict[str, Any]]] = [
        (r"mse has shape \(3,\)", {"mse": errors[:3]}),
        (r"mse has shape \(2, 2\)", {"mse": errors.reshape(2, 2)}),
        (r"ref_mse has shape \(3,\), but mse holds 2 pair", {"mse": errors, "ref_mse": errors[:3]}),
        ("ref_mse or gap is missing", {"mse": errors}),
    ]
    for message, given in cases:
        with pytest.raises(ValueError, match=message):
            fastpref.losses_from_errors(link="dpo_sigmoid", **given)
    for message, scores in (
        (r"score_w has shape \(4,\) and score_l \(3,\)", (errors, errors[:3])),
        (r"score_w has shape \(\)", (errors[0], errors[0])),
    ):
        with pytest.raises(ValueError, match=message):
            fastpref.smoothed_preference(*scores)
    with pytest.raises(ValueError, match="ref_mse is on meta, but mse is on cpu"):
        fastpref.losses_from_errors(errors, ref_mse=errors.to("meta"), link="dpo_sigmoid")
    moving = errors.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"ref_mse requires a gradient.*respect to mse only"):
        fastpref.losses_from_errors(errors, ref_mse=moving, link="dpo_sigmoid")
    with pytest.raises(TypeError, match=r"score_l must be a torch\.Tensor, got a float"):
        fastpref.smoothed_preference(errors, 0.2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"high is 0\.1 and low is 0\.2"):
        fastpref.smoothed_preference(errors, errors, low=0.2, high=0.1)


STEP = Transition(*torch.ones(5))


@pytest.mark.parametrize(
    ("error", "message", "change", "options"),
    [
        (TypeError, "transition.a must be a torch.Tensor, got a float", {"a": 1.0}, {}),
        (ValueError, "model_pred is on cpu, but the transition is on meta; .*to\\('cpu'\\)",
         {"b": torch.ones(4, device="meta")}, {}),
        (ValueError, "divergence_limit was given, but variant is 'clip'", {},
         {"divergence_limit": 1e-3}),
        (ValueError, "divergence_limit was given, but variant is 'guard'", {},
         {"variant": "guard", "divergence_limit": torch.tensor(1e-5)}),
    ],
)  # fmt: skip
def test_messages_of_losses_on_steps(
    error: type[Exception], message: str, change: Any, options: Any
) -> None:
    with pytest.raises(error, match=message):
        fastpref.grpo_loss(X, X, X, X, STEP._replace(**change), 1.0, **options)


def test_times_of_the_forward_process_are_no_timesteps() -> None:
    with pytest.raises(ValueError, match=r"t contains 500.0; expected a number in \[0, 1\]"):
        fastpref.nft_loss(X, X, X, 0.5, t=torch.tensor([500.0, 1.0, 1.0, 1.0]))


def test_steps_that_metrics_are_split_by() -> None:
    out = fastpref.grpo_loss(X, X, X, X, STEP, 1.0)
    for step, message in (
        (torch.tensor([0, 1, 2, 3]), "step contains 3; expected 0 to 2"),
        (torch.tensor([0, -1, 2, 1]), "step contains -1; expected 0 to 2"),
        (torch.zeros(4, dtype=torch.int64, device="meta"), "step is on meta; expected cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            out.by_step(step, 3)


def test_modules_refuse_what_their_loss_does_not_take() -> None:
    with pytest.raises(TypeError, match="DPOLoss got unexpected argument snr; it accepts"):
        fastpref.DPOLoss(snr=0.5)  # type: ignore[call-arg]


def test_unknown_links_and_hyperparameters() -> None:
    with pytest.raises(ValueError, match="link is 'dpo7'; expected one of mapo, sft"):
        fastpref.pair_loss(X, X, link="dpo7")
    with pytest.raises(
        TypeError,
        match="loss 'mapo' got unexpected argument gamma; it accepts snr, num_train_timesteps",
    ):
        fastpref.pair_loss(X, X, link="mapo", gamma=1.0)
    with pytest.raises(
        TypeError, match=r"unexpected argument sample_weight_w;.*logit_scale, loser_weight"
    ):
        fastpref.pair_loss(X, X, link="mapo", sample_weight_w=1.0)
    assert fastpref.mapo_loss(X, X, pair_weight=None).loss.isfinite()  # type: ignore[arg-type]


def test_constants_may_come_from_a_graph_where_none_is_recorded() -> None:
    target = torch.ones(2, 3, requires_grad=True) * 2
    with torch.no_grad():
        assert fastpref.mapo_loss(X, target).loss.isfinite()


@pytest.mark.parametrize("beta", [np.float32(0.25), np.float64(0.25), np.int64(1), 1])
def test_any_real_number_is_a_hyperparameter(beta: Any) -> None:
    plain = fastpref.mapo_loss(X, X + 0.1, beta=float(beta)).loss
    assert torch.equal(fastpref.mapo_loss(X, X + 0.1, beta=beta).loss, plain)


def test_a_tensor_beta_from_host_memory_is_checked() -> None:
    """One on the device is not: that would wait for the device."""
    model_pred: Tensor = X.to("meta")
    with pytest.raises(ValueError, match="beta contains -1"):
        fastpref.mapo_loss(model_pred, model_pred, beta=torch.tensor(-1.0))


def test_triton_on_the_cpu_needs_the_interpreter() -> None:
    script = """
import torch, fastpref
x = torch.zeros(2, 3)
assert fastpref.mapo_loss(x, x).loss.isfinite()
try:
    fastpref.mapo_loss(x, x, impl="triton")
except ValueError as error:
    print(error)
"""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert result.stdout.startswith('impl is "triton", but tensors are on the CPU')
    assert "TRITON_INTERPRET=1" in result.stdout


@pytest.mark.parametrize("wrong", ["target", "ref_pred"])
def test_what_passed_before_does_not_excuse_what_comes(wrong: str) -> None:
    """Tensors that differ in but one thing from those of the step before are looked at."""
    tensors: dict[str, Any] = {
        name: torch.zeros(4, 3, 5) for name in ("model_pred", "target", "ref_pred")
    }
    fastpref.dpo_loss(**tensors)
    right = tensors[wrong]
    for bad in (torch.zeros(4, 3, 6), right.int(), right.to("meta"), right.tolist()):
        with pytest.raises((ValueError, TypeError), match=wrong):
            fastpref.dpo_loss(**{**tensors, wrong: bad})
    with_gradient = {**tensors, wrong: torch.zeros(4, 3, 5, requires_grad=True)}
    with torch.no_grad():  # where it does no harm, and passes
        fastpref.dpo_loss(**with_gradient)
    with pytest.raises(ValueError, match=f"{wrong} requires a gradient"):
        fastpref.dpo_loss(**with_gradient)


def test_a_number_that_equals_one_that_passed_is_looked_at() -> None:
    pred, target = torch.zeros(4, 3), torch.zeros(2, 3)
    fastpref.mapo_loss(pred, target, beta=1.0)
    with pytest.raises(TypeError, match="beta must be a float or tensor, got a bool"):
        fastpref.mapo_loss(pred, target, beta=True)
