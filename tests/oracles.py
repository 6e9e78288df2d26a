"""The published formulas, each written down once, and evaluated in 50 digits: what is true.

Independent of the package: nothing here imports fastpref. A loss is a function of a pair's errors
and its hyper-parameters that returns (loss, margin); slopes are numerical derivatives of it, which
at 50 digits are exact for every purpose here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import mpmath as mp
import numpy as np
import torch
from torch import Tensor

mp.mp.dps = 50

Formula = Callable[..., tuple[Any, Any]]


def _log_sigmoid(x: Any) -> Any:
    return -mp.log1p(mp.exp(-x)) if x > -1000 else x


def mapo(err_w: Any, err_l: Any, beta: Any, snr: Any, num_train_timesteps: Any) -> tuple[Any, Any]:
    """MaPO, mapo-t2i/mapo utils.py compute_loss: mean(e_w) - beta * logsigmoid(T * log_odds)."""

    def phi(x: Any) -> Any:
        return x / mp.expm1(x) if x != 0 else mp.mpf(1)

    log_odds = phi(snr * err_w) - phi(snr * err_l)
    margin = num_train_timesteps * log_odds
    return err_w - beta * _log_sigmoid(margin), margin


def sft(err_w: Any, err_l: Any) -> tuple[Any, Any]:
    """The simple denoising objective on winners (Ho et al.)."""
    return err_w, err_l - err_w


FORMULAS: dict[str, Formula] = {"mapo": mapo, "sft": sft}


class Pair(NamedTuple):
    """The truth about one pair, rounded to fp64; and how far each of it moves per relative change
    of the errors, which fp32 holds to 6e-8 and no better."""

    loss: float
    margin: float
    slope_w: float
    slope_l: float
    moves: tuple[float, float, float, float]


@functools.cache
def link(name: str, err_w: float, err_l: float, hyper: tuple[float, ...]) -> Pair:
    knobs = [mp.mpf(float(h)) for h in hyper]
    step = mp.mpf(10) ** -20  # of a central difference: off by 1e-40

    def values(w: Any, l: Any) -> list[Any]:  # noqa: E741
        def loss(w: Any, l: Any) -> Any:  # noqa: E741
            return FORMULAS[name](w, l, *knobs)[0]

        slope_w = (loss(w + step, l) - loss(w - step, l)) / (2 * step)
        slope_l = (loss(w, l + step) - loss(w, l - step)) / (2 * step)
        return [*FORMULAS[name](w, l, *knobs), slope_w, slope_l]

    w, l, by = mp.mpf(err_w), mp.mpf(err_l), mp.mpf(10) ** -9  # noqa: E741
    here, off_w, off_l = values(w, l), values(w * (1 + by), l), values(w, l * (1 + by))
    moves = [(abs(a - x) + abs(b - x)) / by for x, a, b in zip(here, off_w, off_l, strict=True)]
    return Pair(*(float(x) for x in here), tuple(float(x) for x in moves))  # type: ignore


class Truth(NamedTuple):
    """A true array in fp64, and how far it moves per relative change of the errors."""

    value: np.ndarray
    moves: np.ndarray


def batch(
    name: str,
    pred: tuple[Tensor, Tensor],
    target: tuple[Tensor, Tensor],
    hyper: Mapping[str, float],
    reduction: str,
    grad_loss: Sequence[float] | float = 1.0,
) -> dict[str, Truth]:
    """loss, mse_w, mse_l, margin, and grad_w, grad_l of sum(loss * grad_loss), for (B, ...)
    halves."""
    diffs = [(p.detach().double() - t.double()).cpu().numpy() for p, t in zip(pred, target)]  # noqa: B905
    n_pairs, n = diffs[0].shape[0], diffs[0][0].size
    mse_w, mse_l = ((diff.reshape(n_pairs, n) ** 2).mean(axis=1) for diff in diffs)
    pairs = [
        link(name, *errors, tuple(hyper.values())) for errors in zip(mse_w, mse_l, strict=True)
    ]
    columns = np.array([pair[:4] for pair in pairs]).T
    moves = np.array([pair.moves for pair in pairs]).T
    reduce: Any = {"mean": np.mean, "sum": np.sum, "none": np.asarray}[reduction]
    truths = {
        "loss": Truth(reduce(columns[0]), reduce(moves[0])),
        "mse_w": Truth(mse_w, mse_w),
        "mse_l": Truth(mse_l, mse_l),
        "margin": Truth(columns[1], moves[1]),
    }
    weight = np.broadcast_to(np.asarray(grad_loss, dtype=np.float64), (n_pairs,))
    weight = (weight / n_pairs if reduction == "mean" else weight) * 2 / n
    for half, diff, i in (("grad_w", diffs[0], 2), ("grad_l", diffs[1], 3)):
        factors = (
            a.reshape(-1, *[1] * (diff.ndim - 1)) for a in (columns[i] * weight, moves[i] * weight)
        )
        truths[half] = Truth(*(diff * factor for factor in factors))
    return truths


def assert_three_way(name: str, got: Tensor, eager: Tensor, truth: Truth) -> None:
    """A kernel may be off by twice what eager PyTorch is off in the same dtype, plus rounding: that
    of the result in its dtype, and that of the errors in fp32. All relative to the largest
    entry."""
    error, eager_error = (
        np.abs(t.detach().double().cpu().numpy() - truth.value).max() for t in (got, eager)
    )
    kind = torch.finfo(got.dtype)
    rounding = kind.eps * np.abs(truth.value).max() + kind.eps * kind.tiny  # the least it can hold
    rounding += torch.finfo(torch.float32).eps * np.abs(truth.moves).max()
    allowed = 2 * (eager_error + rounding)
    assert error <= allowed, f"{name}: off by {error:.3e}, allowed {allowed:.3e}"
