"""The special functions of the links, right in fp32 where the textbook's form is not, in two
dialects: Triton's and PyTorch's. All other texts have one, which `in_torch` translates.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "TRITON_MISSING", "detached", "expm1", "in_torch", "jit", "log1p", "power_gap", "psi_and_slope",
    "sigmoids", "softplus_and_slope", "times", "tl",
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

    class jit:  # type: ignore[no-redef]
        """A text that only PyTorch can run."""

        def __init__(self, fn: Callable[..., Any]) -> None:
            self.fn = fn


class _InTorch:
    """What texts use of triton.language, on tensors and on numbers. Of two numbers `where` could
    not know the precision."""

    @staticmethod
    def where(condition: Any, a: Any, b: Any) -> Any:
        if not isinstance(condition, Tensor):
            return a if condition else b
        if not isinstance(a, Tensor) and not isinstance(b, Tensor):
            raise TypeError(f"where of two numbers, {a} and {b}; expected a tensor among them")
        return torch.where(condition, a, b)

    @staticmethod
    def exp(x: Any) -> Any:
        if isinstance(x, Tensor):
            return torch.exp(x)
        return math.inf if x > 709.0 else math.exp(x)

    @staticmethod
    def log(x: Any) -> Any:
        if isinstance(x, Tensor):
            return torch.log(x)
        if x > 0.0:
            return math.log(x)
        return -math.inf if x == 0.0 else math.nan

    @staticmethod
    def abs(x: Any) -> Any:
        return abs(x)

    @staticmethod
    def sum(x: Tensor, axis: int) -> Tensor:
        return x.sum(axis)

    @staticmethod
    def max(x: Tensor, axis: int) -> Tensor:
        return x.amax(axis)

    @staticmethod
    def zeros_like(x: Any) -> Any:
        return torch.zeros_like(x) if isinstance(x, Tensor) else 0.0


_twins: dict[int, Callable[..., Any]] = {}  # by the id of the jit function, which lives on


def _spoken_in_torch_as(twin: Callable[..., Any]) -> Callable[[Any], Any]:
    def keep(text: Any) -> Any:
        _twins[id(text)] = twin
        return text

    return keep


def in_torch(text: Any) -> Callable[..., Any]:
    """The function that a jit function's text is on tensors, in any precision, and on floats.

    It is a copy of the Python function in a module of its own, in which the names that the text
    uses mean PyTorch's. torch.compile looks names up in modules, so it must be a real one.
    """
    if twin := _twins.get(id(text)):
        return twin
    fn: FunctionType = text.fn
    name = f"{fn.__module__}_in_torch"
    module = sys.modules.setdefault(name, ModuleType(name))
    vars(module)["__builtins__"] = fn.__globals__["__builtins__"]
    for used in _names(fn.__code__):
        if used in fn.__globals__:
            setattr(module, used, _translated(fn.__globals__[used]))
    made = FunctionType(fn.__code__, vars(module), fn.__name__, fn.__defaults__, fn.__closure__)
    made.__kwdefaults__ = fn.__kwdefaults__
    made.__module__ = name
    return made


def _names(code: Any) -> set[str]:
    inner = [const for const in code.co_consts if hasattr(const, "co_names")]
    return set(code.co_names).union(*map(_names, inner))


def _translated(value: Any) -> Any:
    if value is tl or value is _InTorch:
        return _InTorch
    return in_torch(value) if hasattr(value, "fn") and callable(value.fn) else value


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


def _psi_and_slope(x: Any) -> tuple[Any, Any]:
    if not isinstance(x, Tensor):
        if x < 1.0:
            return _psi_series(x), _psi_series_slope(x)
        x = min(x, 700.0)
        ratio = math.exp(-x) / -math.expm1(-x)
        return 1.0 - x * ratio, ratio * (x - 1.0 + x * ratio)
    small = x < 1.0
    far = torch.where(small, 1.0, torch.where(x > 700.0, 700.0, x))  # not clamp: NaN stays NaN
    inverse = torch.exp(-far) / -torch.expm1(-far)
    phi, near = far * inverse, torch.where(small, x, 0.0)
    psi = torch.where(small, _psi_series(near), 1.0 - phi)
    return psi, torch.where(small, _psi_series_slope(near), inverse * (far - 1.0 + phi))


@_spoken_in_torch_as(_psi_and_slope)
@jit
def psi_and_slope(x):  # type: ignore[no-untyped-def]
    """psi and its derivative; 1 and 0 for an error that overflowed. The series reaches to 2, from
    where a GPU's fast exp is enough."""
    far = tl.where(x < 2.0, 2.0, tl.where(x > 700.0, 700.0, x))  # where, not minimum: NaN stays NaN
    decay = tl.exp(-far)
    inverse = tl.div_rn(decay, 1.0 - decay)  # 1 / (exp(x) - 1); a GPU's plain / is 2 ulp off
    phi = far * inverse
    psi = tl.where(x < 2.0, _psi_series_jit(x), 1.0 - phi)
    slope = tl.where(x < 2.0, _psi_series_slope_jit(x), inverse * (far - 1.0 + phi))
    return psi, slope


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


@_spoken_in_torch_as(_detached)
@jit
def detached(x):  # type: ignore[no-untyped-def]
    """x, a constant where autograd differentiates the value. Kernels take the slopes that a text
    returns: leave the derivative of x out of those as well."""
    return x


def _times(weight: Any, value: Any) -> Any:
    """weight * value; for a weight of 0 it is 0 with a gradient of 0, whatever the value."""
    if not isinstance(weight, Tensor):
        if weight:
            return weight * value
        if not isinstance(value, Tensor):
            return 0.0
        return torch.where(torch.zeros_like(value, dtype=torch.bool), value, 0.0)
    if not isinstance(value, Tensor):
        return weight * value
    # Finite values stay, so that the derivative by the weight is right at 0 too.
    return weight * torch.where((weight == 0.0) & ~value.isfinite(), 0.0, value)


@_spoken_in_torch_as(_times)
@jit
def times(weight, value):  # type: ignore[no-untyped-def]
    return tl.where(weight == 0.0, 0.0, weight * value)


def _log1p(z: Any) -> Any:
    return torch.log1p(z) if isinstance(z, Tensor) else math.log1p(z)


@_spoken_in_torch_as(_log1p)
@jit
def log1p(z):  # type: ignore[no-untyped-def]
    """log(1 + z) for z in [-1 / 2, 1], as 2 atanh(z / (2 + z)): log would be 0 for z below 6e-8."""
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


def _expm1(x: Any) -> Any:
    return torch.expm1(x) if isinstance(x, Tensor) else math.expm1(x)


@_spoken_in_torch_as(_expm1)
@jit
def expm1(x):  # type: ignore[no-untyped-def]
    """exp(x) - 1, right relative to itself near 0, too."""
    s = 1.0 + x * (1.0 / 8.0)  # the series, off by 1e-8 at 1 / 2
    s = 1.0 + x * (1.0 / 7.0) * s
    s = 1.0 + x * (1.0 / 6.0) * s
    s = 1.0 + x * (1.0 / 5.0) * s
    s = 1.0 + x * (1.0 / 4.0) * s
    s = 1.0 + x * (1.0 / 3.0) * s
    s = 1.0 + x * (1.0 / 2.0) * s
    return tl.where(tl.abs(x) < 0.5, x * s, tl.exp(x) - 1.0)


def _softplus_and_slope(x: Any) -> tuple[Any, Any]:
    if not isinstance(x, Tensor):
        return max(x, 0.0) + math.log1p(math.exp(-abs(x))), _sigmoid(x)
    return -F.logsigmoid(-x), _sigmoid(x)


@_spoken_in_torch_as(_softplus_and_slope)
@jit
def softplus_and_slope(x):  # type: ignore[no-untyped-def]
    """log(1 + exp(x)) and its derivative sigmoid(x), right relative to themselves at both ends."""
    z = tl.exp(-tl.abs(x))
    return tl.where(x > 0.0, x, 0.0) + log1p(z), tl.where(x > 0.0, 1.0, z) / (1.0 + z)


def _sigmoid(x: Any) -> Any:
    """Its derivative by autograd, unlike that of torch.sigmoid, is right where it is near 1."""
    if not isinstance(x, Tensor):
        z = math.exp(-abs(x))
        return (z if x < 0.0 else 1.0) / (1.0 + z)
    return torch.exp(F.logsigmoid(x))


def _sigmoids(x: Any) -> tuple[Any, Any]:
    return _sigmoid(x), _sigmoid(-x)


@_spoken_in_torch_as(_sigmoids)
@jit
def sigmoids(x):  # type: ignore[no-untyped-def]
    """sigmoid(x) and sigmoid(-x), each right relative to itself."""
    z = tl.exp(-tl.abs(x))
    return tl.where(x > 0.0, 1.0, z) / (1.0 + z), tl.where(x > 0.0, z, 1.0) / (1.0 + z)


def _power_gap(log_p: Any, b: Any) -> Any:
    """p * (p^b - 1) / b, and its limit p * log(p) at b = 0, for 0 <= p <= 1."""
    if not isinstance(log_p, Tensor):
        return float(_power_gap(torch.tensor(log_p, dtype=torch.float64), b))
    b = torch.zeros_like(log_p) + b
    x = b * log_p
    near = x.abs() < 0.5
    small = torch.where(near, x, 0.0)
    ratio = torch.ones_like(x)
    for k in range(15, 1, -1):  # (exp(x) - 1) / x by its series, off by 5e-17 at 1 / 2
        ratio = 1.0 + small * ratio / k
    far = (torch.exp(log_p + x) - torch.exp(log_p)) / torch.where(near, 1.0, b)
    return torch.where(near, torch.exp(log_p) * torch.where(near, log_p, 0.0) * ratio, far)


@_spoken_in_torch_as(_power_gap)
@jit
def power_gap(log_p, b):  # type: ignore[no-untyped-def]
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
