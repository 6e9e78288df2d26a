"""Validation of a loss's numbers, hyper-parameters and knobs, and the order in which the
implementations take them."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastpref_kernels import KNOBS, Link
from fastpref_kernels.links import NOT_NEGATIVE, POSITIVE, UNIT, Hyper

from .batch import Scalar, plain
from .context import readable

NAMES = {key: key for key in KNOBS if not key.startswith("sample_weight")}  # which comes apart
_OTHERS = (
    "sample_weight", "mask", "huber_c", "swap", "loser_gradient_scale", "safeguard",
    "safeguard_over", "anchor_weight", "error_reduction", "reduction", "dro_temperature", "impl",
)  # fmt: skip


def check_scalars(
    link: Link,
    given: Mapping[str, Any],
    sample_weight: Any,
    n_pairs: int,
    device: torch.device,
    swap: bool,
) -> Sequence[Scalar]:
    """The link's hyper-parameters in its order, and then, unless all are neutral, the knobs: each a
    float, or a tensor of shape () or (B,). Raises TypeError or ValueError that names the argument,
    what came, and what is needed."""
    floats = sample_weight is None and not torch.compiler.is_compiling()
    if floats and _PLAIN.issuperset(map(type, given.values())):
        return _check_plain(link, tuple(given.items()))
    return _check(link, given, sample_weight, n_pairs, device, swap)


_PLAIN = {float, int}  # not bool, which would be found in the cache as the 0 or 1 that it equals


@functools.lru_cache(1024)
def _check_plain(link: Link, given: tuple[tuple[str, float], ...]) -> Sequence[Scalar]:
    """Numbers alone, which are the same at every step or nearly so."""
    return tuple(_check(link, dict(given), None, 0, torch.device("cpu"), False))


def _check(
    link: Link,
    given: Mapping[str, Any],
    sample_weight: Any,
    n_pairs: int,
    device: torch.device,
    swap: bool,
) -> Sequence[Scalar]:
    scalars = [
        check_scalar(key, given.get(key, hyper.default), hyper, n_pairs, device)
        for key, hyper in link.hyper.items()
    ]
    if given.keys() <= link.hyper.keys() and sample_weight is None and not link.knobs:
        return scalars
    rest = {key: value for key, value in given.items() if key not in link.hyper}
    if unknown := sorted(rest.keys() - NAMES.keys()):
        accepted = [*link.hyper, *NAMES, *_OTHERS]
        raise TypeError(unexpected(f"loss {link.name!r}", unknown, accepted))
    rest = {**link.knobs, **{key: value for key, value in rest.items() if value is not None}}
    if sample_weight is not None:
        rest |= _of_samples(sample_weight, n_pairs, swap)
    neutral = {key: link.sft_weight if key == "sft_weight" else KNOBS[key].default for key in KNOBS}
    for key, value in rest.items():
        spoken = NAMES.get(key, "sample_weight")
        rest[key] = check_scalar(spoken, value, KNOBS[key], n_pairs, device)
    if all(not isinstance(v, Tensor) and v == neutral[key] for key, v in rest.items()):
        return scalars
    return [*scalars, *(neutral | rest).values()]  # type: ignore[list-item]


def unexpected(owner: str, names: Sequence[str], accepted: Sequence[str]) -> str:
    what = "argument" if len(names) == 1 else "arguments"
    return f"{owner} got unexpected {what} {', '.join(names)}; it accepts {', '.join(accepted)}"


ANCHOR = Hyper(0.0, NOT_NEGATIVE)
HUBER = Hyper(None, NOT_NEGATIVE)


def check_huber(value: Any, n_groups: int, n_samples: int, device: torch.device) -> Scalar:
    """One number, or one for each group or sample."""
    per_sample = isinstance(value, Tensor) and value.dim() == 1 and value.shape[0] == n_samples
    return check_scalar("huber_c", value, HUBER, n_samples if per_sample else n_groups, device)


def check_guard(
    scale: Any, safeguard: Any, over: str, n_pairs: int, device: torch.device
) -> tuple[str | None, Scalar | None]:
    """The guard of `knobs.Around` and its number."""
    if over not in ("batch", "pair"):
        raise ValueError(f'safeguard_over is {over!r}; expected "batch" or "pair"')
    if scale is not None and safeguard is not None:
        raise ValueError(
            "loser_gradient_scale and safeguard were both given; expected only one of them"
        )
    if scale is not None:
        return "given", check_scalar("loser_gradient_scale", scale, ANCHOR, n_pairs, device)
    if safeguard is None:
        return None, None
    per_pair = n_pairs if over == "pair" else None
    return over, check_scalar("safeguard", safeguard, Hyper(None, UNIT), per_pair, device)


def check_heat(reduction: str, temperature: Any, device: torch.device) -> Scalar | None:
    """The temperature of the log-mean-exp; it must go with it."""
    if reduction == "dro":
        return check_scalar("dro_temperature", temperature, Hyper(), None, device)
    if isinstance(temperature, Tensor) or temperature != 1.0:
        raise ValueError(f'dro_temperature was given, but reduction is {reduction!r}, not "dro"')
    return None


def _of_samples(weight: Any, n_pairs: int, swap: bool) -> dict[str, Any]:
    """sample_weight for winners and losers: of the pair, (2B,) stacked, or a tuple."""
    if isinstance(weight, (tuple, list)):
        if len(weight) != 2:
            raise TypeError(
                "sample_weight must be a number, a tensor or a tuple (winners, losers), got a "
                f"{type(weight).__name__} of {len(weight)}"
            )
        of_w, of_l = weight
    elif isinstance(weight, Tensor) and weight.dim() == 1 and weight.shape[0] == 2 * n_pairs:
        of_w, of_l = weight[:n_pairs], weight[n_pairs:]
    elif isinstance(weight, Tensor) and weight.dim() and weight.shape[0] != n_pairs:
        raise ValueError(
            f"sample_weight has shape {tuple(weight.shape)}; expected (), ({n_pairs},) for one "
            f"weight per pair, or ({2 * n_pairs},) for one per sample, winners first"
        )
    else:
        of_w = of_l = weight
    return dict(zip(("sample_weight_w", "sample_weight_l"), (of_l, of_w) if swap else (of_w, of_l)))  # noqa: B905


def check_scalar(
    name: str, value: Any, hyper: Hyper, n_pairs: int | None, device: torch.device
) -> Scalar:
    """n_pairs: None where pairs cannot differ in it."""
    if isinstance(value, Tensor):
        return _check_tensor(name, plain(name, value), hyper, n_pairs, device)
    if type(value) is not float:
        if value is None:
            raise TypeError(f"{name} is missing; expected a number or tensor in {hyper.interval}")
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a float or tensor, got a {type(value).__name__}")
        value = float(value)
    if value not in hyper.interval:
        raise ValueError(f"{name} is {value}; expected {_needed(hyper)}")
    return value


def _needed(hyper: Hyper) -> str:
    positive = hyper.interval == POSITIVE
    return "a finite number above 0" if positive else f"a number in {hyper.interval}"


def _check_tensor(
    name: str, value: Tensor, hyper: Hyper, n_pairs: int | None, device: torch.device
) -> Scalar:
    per_pair = n_pairs is not None and value.dim() == 1 and value.shape[0] == n_pairs
    if not (value.dim() == 0 or per_pair) or not value.is_floating_point():
        shapes = "()" if n_pairs is None else f"() or ({n_pairs},)"
        raise ValueError(
            f"{name} is a {value.dtype} tensor of shape {tuple(value.shape)}; "
            f"expected a float, or a float tensor of shape {shapes}"
        )
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires a gradient, but the loss is differentiable with respect to its "
            f"predictions only; pass {name}.detach()"
        )
    if readable(value):
        outside = [v for v in value.reshape(-1).tolist() if v not in hyper.interval]
        if outside:
            raise ValueError(f"{name} contains {outside[0]}; expected {_needed(hyper)}")
    if value.device == device:
        return value
    if value.device.type != "cpu" or value.dim():
        raise ValueError(f"{name} is on {value.device}; expected {device}, model_pred's device")
    return float(value) if readable(value) else value.to(device)
