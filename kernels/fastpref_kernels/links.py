"""The one file that knows a loss by name: each link in two dialects, the torch value and the Triton
value with slopes.

A link maps a pair's errors `err_w`, `err_l` and the loss's hyper-parameters to the pair's loss and
its margin (> 0: the winner is preferred). The Triton dialect adds d loss / d err_w and
d loss / d err_l; autograd finds them in the torch dialect. To add a loss: write both, enter them in
`LINKS`, publish a function in `fastpref/losses.py`, and write its published formula down in
`tests/oracles.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TRITON_MISSING = ""  # why the Triton dialect cannot run here, in words; empty where it can
try:
    import triton
    import triton.language as tl

    jit: Callable[..., Any] = triton.jit
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        TRITON_MISSING = f"Triton {triton.__version__} is too old, 3.3 is the first that will do"
except ImportError as error:
    TRITON_MISSING = f"Triton cannot be imported ({error})"

    def jit(fn: Callable[..., Any]) -> Callable[..., Any]:
        return fn


class Link(NamedTuple):
    """A loss of the two errors of a pair, in both dialects.

    torch: (err_w, err_l, *hyper) -> (loss, margin); vectors of any float dtype, differentiable.
    triton: (err_w, err_l, *hyper) -> (loss, slope_w, slope_l, margin); a jit function on fp32.
    hyper: the hyper-parameters, positive numbers, in the order both take them, with defaults.
    """

    torch: Callable[..., tuple[Tensor, Tensor]]
    triton: Any
    hyper: Mapping[str, float]


# psi(x) = 1 - x / (exp(x) - 1), for x >= 0. MaPO takes differences of psi times 1000, so psi must
# be right relative to itself near 0, where x / (exp(x) - 1) is 0 / 0 in fp32. This is the Bernoulli
# series, sum of B_k x^k / k!, whose first dropped term is 9e-15 at x = 1 and 2e-9 at x = 2. Plain
# arithmetic: one text serves both dialects.
def _psi_series(x):  # type: ignore[no-untyped-def]
    q = x * x
    s = 1.0 / 74724249600.0 - q * (3617.0 / 10670622842880000.0)
    s = -691.0 / 1307674368000.0 + q * s
    s = 1.0 / 47900160.0 + q * s
    s = -1.0 / 1209600.0 + q * s
    s = 1.0 / 30240.0 + q * s
    s = -1.0 / 720.0 + q * s
    s = 1.0 / 12.0 + q * s
    return x * (0.5 - x * s)


def _psi_series_slope(x):  # type: ignore[no-untyped-def]
    q = x * x
    s = 1.0 / 5337446400.0 - q * (3617.0 / 666913927680000.0)
    s = -691.0 / 108972864000.0 + q * s
    s = 1.0 / 4790016.0 + q * s
    s = -1.0 / 151200.0 + q * s
    s = 1.0 / 5040.0 + q * s
    s = -1.0 / 180.0 + q * s
    s = 1.0 / 6.0 + q * s
    return 0.5 - x * s


_psi_series_jit = jit(_psi_series)
_psi_series_slope_jit = jit(_psi_series_slope)


def _psi(x: Tensor) -> Tensor:
    """psi in the torch dialect; 1 for an error that overflowed, which inf * exp(-inf) is not."""
    small = x < 1.0
    far = torch.where(small, 1.0, torch.where(x > 700.0, 700.0, x))  # not clamp: NaN stays NaN
    far = 1.0 - far * torch.exp(-far) / -torch.expm1(-far)
    return torch.where(small, _psi_series(torch.where(small, x, 0.0)), far)


@jit
def _psi_and_slope(x):  # type: ignore[no-untyped-def]
    """psi and its derivative. The series reaches to 2, from where a GPU's fast exp is enough."""
    far = tl.where(x < 2.0, 2.0, tl.where(x > 700.0, 700.0, x))  # where, not minimum: NaN stays NaN
    decay = tl.exp(-far)
    inverse = tl.div_rn(decay, 1.0 - decay)  # 1 / (exp(x) - 1); a GPU's plain / is 2 ulp off
    phi = far * inverse
    psi = tl.where(x < 2.0, _psi_series_jit(x), 1.0 - phi)
    slope = tl.where(x < 2.0, _psi_series_slope_jit(x), inverse * (far - 1.0 + phi))
    return psi, slope


@jit
def _softplus_and_slope(x):  # type: ignore[no-untyped-def]
    """log(1 + exp(x)) and its derivative sigmoid(x), right relative to themselves at both ends."""
    z = tl.exp(-tl.abs(x))
    # log1p(z) = 2 atanh(z / (2 + z)), as a series: log(1 + z) would be 0 for z below 6e-8
    w = z / (2.0 + z)
    q = w * w
    s = 1.0 / 15.0 + q * (1.0 / 17.0)
    s = 1.0 / 13.0 + q * s
    s = 1.0 / 11.0 + q * s
    s = 1.0 / 9.0 + q * s
    s = 1.0 / 7.0 + q * s
    s = 1.0 / 5.0 + q * s
    s = 1.0 / 3.0 + q * s
    log1p = 2.0 * w * (1.0 + q * s)
    return tl.where(x > 0.0, x, 0.0) + log1p, tl.where(x > 0.0, 1.0, z) / (1.0 + z)


def _mapo(
    err_w: Tensor, err_l: Tensor, beta: Any, snr: Any, num_train_timesteps: Any
) -> tuple[Tensor, Tensor]:
    psi_w, psi_l = _psi(snr * torch.stack([err_w, err_l]))
    margin = num_train_timesteps * (psi_l - psi_w)
    return err_w - beta * F.logsigmoid(margin), margin


@jit
def _mapo_jit(err_w, err_l, beta, snr, num_train_timesteps):  # type: ignore[no-untyped-def]
    psi_w, slope_psi_w = _psi_and_slope(snr * err_w)
    psi_l, slope_psi_l = _psi_and_slope(snr * err_l)
    margin = num_train_timesteps * (psi_l - psi_w)
    softplus, factor = _softplus_and_slope(-margin)
    pull = beta * num_train_timesteps * snr * factor
    return err_w + beta * softplus, 1.0 + pull * slope_psi_w, -pull * slope_psi_l, margin


def _sft(err_w: Tensor, err_l: Tensor) -> tuple[Tensor, Tensor]:
    return err_w, err_l - err_w


@jit
def _sft_jit(err_w, err_l):  # type: ignore[no-untyped-def]
    zero = tl.zeros_like(err_w)
    return err_w, zero + 1.0, zero, err_l - err_w


LINKS: dict[str, Link] = {
    "mapo": Link(_mapo, _mapo_jit, {"beta": 0.1, "snr": 0.5, "num_train_timesteps": 1000.0}),
    "sft": Link(_sft, _sft_jit, {}),
}
