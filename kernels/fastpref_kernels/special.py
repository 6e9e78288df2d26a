"""The special functions of the links, right in fp32 where the textbook's form is not; and whether
Triton is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "TRITON_MISSING", "jit", "log1p", "power_gap", "power_gap_jit", "psi", "psi_and_slope",
    "sigmoid", "sigmoids", "softplus_and_slope", "times", "times_jit", "tl",
]  # fmt: skip

TRITON_MISSING = ""  # why the Triton dialect cannot run here, in words; empty where it can
try:
    import triton
    import triton.language as tl  # the links have it from here, so that they import without it

    jit: Callable[..., Any] = triton.jit
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
        TRITON_MISSING = f"Triton {triton.__version__} is too old, 3.6 is the first that will do"
except ImportError as error:
    tl: Any = None  # type: ignore[no-redef]
    TRITON_MISSING = f"Triton cannot be imported ({error})"

    def jit(fn: Callable[..., Any]) -> Callable[..., Any]:
        return fn


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


def psi(x: Tensor) -> Tensor:
    """psi in the torch dialect; 1 for an error that overflowed, which inf * exp(-inf) is not."""
    small = x < 1.0
    far = torch.where(small, 1.0, torch.where(x > 700.0, 700.0, x))  # not clamp: NaN stays NaN
    far = 1.0 - far * torch.exp(-far) / -torch.expm1(-far)
    return torch.where(small, _psi_series(torch.where(small, x, 0.0)), far)


@jit
def psi_and_slope(x):  # type: ignore[no-untyped-def]
    """psi and its derivative. The series reaches to 2, from where a GPU's fast exp is enough."""
    far = tl.where(x < 2.0, 2.0, tl.where(x > 700.0, 700.0, x))  # where, not minimum: NaN stays NaN
    decay = tl.exp(-far)
    inverse = tl.div_rn(decay, 1.0 - decay)  # 1 / (exp(x) - 1); a GPU's plain / is 2 ulp off
    phi = far * inverse
    psi = tl.where(x < 2.0, _psi_series_jit(x), 1.0 - phi)
    slope = tl.where(x < 2.0, _psi_series_slope_jit(x), inverse * (far - 1.0 + phi))
    return psi, slope


def times(weight: Any, value: Tensor) -> Tensor:
    """weight * value; for a weight of 0 it is 0 with a gradient of 0, whatever the value."""
    if not isinstance(weight, Tensor):
        if weight:
            return weight * value
        return torch.where(torch.zeros_like(value, dtype=torch.bool), value, 0.0)
    # Finite values stay, so that the derivative by the weight is right at 0 too.
    return weight * torch.where((weight == 0.0) & ~value.isfinite(), 0.0, value)


@jit
def times_jit(weight, value):  # type: ignore[no-untyped-def]
    return tl.where(weight == 0.0, 0.0, weight * value)


@jit
def log1p(z):  # type: ignore[no-untyped-def]
    """log(1 + z) for 0 <= z <= 1, as 2 atanh(z / (2 + z)): log would return 0 for z below 6e-8."""
    w = z / (2.0 + z)
    q = w * w
    s = 1.0 / 15.0 + q * (1.0 / 17.0)
    s = 1.0 / 13.0 + q * s
    s = 1.0 / 11.0 + q * s
    s = 1.0 / 9.0 + q * s
    s = 1.0 / 7.0 + q * s
    s = 1.0 / 5.0 + q * s
    s = 1.0 / 3.0 + q * s
    return 2.0 * w * (1.0 + q * s)


@jit
def softplus_and_slope(x):  # type: ignore[no-untyped-def]
    """log(1 + exp(x)) and its derivative sigmoid(x), right relative to themselves at both ends."""
    z = tl.exp(-tl.abs(x))
    return tl.where(x > 0.0, x, 0.0) + log1p(z), tl.where(x > 0.0, 1.0, z) / (1.0 + z)


@jit
def sigmoids(x):  # type: ignore[no-untyped-def]
    """sigmoid(x) and sigmoid(-x), each right relative to itself."""
    z = tl.exp(-tl.abs(x))
    return tl.where(x > 0.0, 1.0, z) / (1.0 + z), tl.where(x > 0.0, z, 1.0) / (1.0 + z)


def sigmoid(x: Tensor) -> Tensor:
    """Its derivative by autograd, unlike that of torch.sigmoid, is right where it is near 1."""
    return torch.exp(F.logsigmoid(x))


def power_gap(log_p: Tensor, b: Tensor) -> Tensor:
    """p * (p^b - 1) / b, and its limit p * log(p) at b = 0, for 0 <= p <= 1."""
    x = b * log_p
    near = x.abs() < 0.5
    small = torch.where(near, x, 0.0)
    ratio = torch.ones_like(x)
    for k in range(15, 1, -1):  # (exp(x) - 1) / x by its series, off by 5e-17 at 1 / 2
        ratio = 1.0 + small * ratio / k
    far = (torch.exp(log_p + x) - torch.exp(log_p)) / torch.where(near, 1.0, b)
    return torch.where(near, torch.exp(log_p) * torch.where(near, log_p, 0.0) * ratio, far)


@jit
def power_gap_jit(log_p, b):  # type: ignore[no-untyped-def]
    x = b * log_p
    near = tl.abs(x) < 0.5
    s = 1.0 + x * (1.0 / 8.0)  # the same to fp32's precision, 2e-8
    s = 1.0 + x * (1.0 / 7.0) * s
    s = 1.0 + x * (1.0 / 6.0) * s
    s = 1.0 + x * (1.0 / 5.0) * s
    s = 1.0 + x * (1.0 / 4.0) * s
    s = 1.0 + x * (1.0 / 3.0) * s
    s = 1.0 + x * (1.0 / 2.0) * s
    far = (tl.exp(log_p + x) - tl.exp(log_p)) / tl.where(near, 1.0, b)
    return tl.where(near, tl.exp(log_p) * tl.where(near, log_p, 0.0) * s, far)
