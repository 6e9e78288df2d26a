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
    case(TypeError, "snr", "NoneType", snr=None),
    case(ValueError, "beta", "(2,)", "0-d", beta=torch.ones(2)),
    case(ValueError, "beta", "int64", "float", beta=torch.tensor(1)),
    case(ValueError, "beta", "gradient", "constant", beta=torch.tensor(0.1, requires_grad=True)),
    case(ValueError, "beta", "meta", "cpu", beta=torch.tensor(0.1, device="meta")),
    case(ValueError, "reduction", "'avg'", "mean", reduction="avg"),
    case(ValueError, "impl", "'cuda'", "auto", impl="cuda"),
    case(ValueError, "impl", "triton", "float64", pred=X.double(), impl="triton"),
]


@pytest.mark.parametrize(("error", "words", "pred", "target", "options"), CASES)
def test_message(
    error: type[Exception], words: tuple[str, ...], pred: Any, target: Any, options: dict[str, Any]
) -> None:
    with pytest.raises(error) as caught:
        fastpref.mapo_loss(pred, target, **options)
    message = str(caught.value)
    assert message.startswith(words[0])
    assert all(word in message for word in words), message


def test_unknown_links_and_hyperparameters() -> None:
    with pytest.raises(ValueError, match="link is 'dpo7': one of mapo, sft"):
        fastpref.pair_loss(X, X, link="dpo7")
    with pytest.raises(TypeError, match="gamma came, but link 'mapo' takes beta, snr, num_train"):
        fastpref.pair_loss(X, X, link="mapo", gamma=1.0)


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
    with pytest.raises(ValueError, match="beta is -1"):
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
