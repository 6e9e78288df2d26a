"""The numbers of a loss, hyper-parameters and knobs: what each may be, and in which order the
implementations take them."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastpref_kernels import KNOBS, LINKS
from fastpref_kernels.links import POSITIVE, Hyper

from .pairs import Scalar

_NAMES = {key: key for key in KNOBS if not key.startswith("sample_weight")}  # which comes apart


def check_scalars(
    name: str,
    given: Mapping[str, Any],
    sample_weight: Any,
    n_pairs: int,
    device: torch.device,
    swap: bool,
) -> Sequence[Scalar]:
    """The link's hyper-parameters in its order, and then, unless all are neutral, the knobs: each a
    float, or a tensor of shape () or (B,). Raises TypeError or ValueError that names the argument,
    what came, and what is needed."""
    plain = sample_weight is None and not torch.compiler.is_compiling()
    if plain and _PLAIN.issuperset(map(type, given.values())):
        return _check_plain(name, tuple(given.items()))
    return _check(name, given, sample_weight, n_pairs, device, swap)


_PLAIN = {float, int}  # not bool, which would be found in the cache as the 0 or 1 that it equals


@functools.lru_cache(1024)
def _check_plain(name: str, given: tuple[tuple[str, float], ...]) -> Sequence[Scalar]:
    """Numbers alone, which are the same at every step or nearly so."""
    return tuple(_check(name, dict(given), None, 0, torch.device("cpu"), False))


def _check(
    name: str,
    given: Mapping[str, Any],
    sample_weight: Any,
    n_pairs: int,
    device: torch.device,
    swap: bool,
) -> Sequence[Scalar]:
    link = LINKS[name]
    scalars = [
        check_scalar(key, given.get(key, hyper.default), hyper, n_pairs, device)
        for key, hyper in link.hyper.items()
    ]
    if given.keys() <= link.hyper.keys() and sample_weight is None and not link.knobs:
        return scalars
    rest = {key: value for key, value in given.items() if key not in link.hyper}
    if unknown := sorted(rest.keys() - _NAMES.keys()):
        known = ", ".join([*link.hyper, *_NAMES])
        raise TypeError(f"{', '.join(unknown)} came, but link {name!r} takes {known}")
    rest = {**link.knobs, **{key: value for key, value in rest.items() if value is not None}}
    if sample_weight is not None:
        rest |= _of_samples(sample_weight, n_pairs, swap)
    neutral = {key: link.sft_weight if key == "sft_weight" else KNOBS[key].default for key in KNOBS}
    for key, value in rest.items():
        spoken = _NAMES.get(key, "sample_weight")
        rest[key] = check_scalar(spoken, value, KNOBS[key], n_pairs, device)
    if all(not isinstance(v, Tensor) and v == neutral[key] for key, v in rest.items()):
        return scalars
    return [*scalars, *(neutral | rest).values()]  # type: ignore[list-item]


def check_huber(value: Any, device: torch.device) -> Scalar | None:
    return None if value is None else check_scalar("huber_c", value, Hyper(), None, device)


def _of_samples(weight: Any, n_pairs: int, swap: bool) -> dict[str, Any]:
    """sample_weight for winners and losers: of the pair, (2B,) stacked, or a tuple."""
    if isinstance(weight, (tuple, list)):
        if len(weight) != 2:
            raise TypeError(
                f"sample_weight is a {type(weight).__name__} of {len(weight)}: "
                "a number, a tensor or a tuple (winners, losers) is needed"
            )
        of_w, of_l = weight
    elif isinstance(weight, Tensor) and weight.dim() == 1 and weight.shape[0] == 2 * n_pairs:
        of_w, of_l = weight[:n_pairs], weight[n_pairs:]
    elif isinstance(weight, Tensor) and weight.dim() == 1 and weight.shape[0] != n_pairs:
        raise ValueError(
            f"sample_weight has shape {tuple(weight.shape)}: (), ({n_pairs},) for a weight a pair, "
            f"or ({2 * n_pairs},) for one a sample, is needed"
        )
    else:
        of_w = of_l = weight
    return dict(zip(("sample_weight_w", "sample_weight_l"), (of_l, of_w) if swap else (of_w, of_l)))  # noqa: B905


def check_scalar(
    name: str, value: Any, hyper: Hyper, n_pairs: int | None, device: torch.device
) -> Scalar:
    """n_pairs: None where pairs cannot differ in it."""
    if isinstance(value, Tensor):
        return _check_tensor(name, value, hyper, n_pairs, device)
    if type(value) is not float:
        if value is None:
            raise TypeError(f"{name} is missing: a number or tensor in {hyper.interval} is needed")
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} is a {type(value).__name__}: a float or tensor is needed")
        value = float(value)
    if value not in hyper.interval:
        raise ValueError(f"{name} is {value}: {_needed(hyper)} is needed")
    return value


def _needed(hyper: Hyper) -> str:
    positive = hyper.interval == POSITIVE
    return "a finite number above 0" if positive else f"a number in {hyper.interval}"


def _check_tensor(
    name: str, value: Tensor, hyper: Hyper, n_pairs: int | None, device: torch.device
) -> Scalar:
    per_pair = n_pairs is not None and value.dim() == 1 and value.shape[0] == n_pairs
    fits = value.dim() == 0 or per_pair
    differentiable = value.requires_grad and torch.is_grad_enabled()
    if not fits or not value.is_floating_point() or differentiable:
        shapes = "shape ()" if n_pairs is None else f"shape () or ({n_pairs},)"
        raise ValueError(
            f"{name} is a {value.dtype} tensor of shape {tuple(value.shape)}"
            f"{' that requires a gradient' if differentiable else ''}: "
            f"a float, or a constant float tensor of {shapes}, is needed"
        )
    on_host = value.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_host:  # nothing is waited for
        outside = [v for v in value.reshape(-1).tolist() if v not in hyper.interval]
        if outside:
            raise ValueError(f"{name} holds {outside[0]}: {_needed(hyper)} is needed")
    if value.device != device:
        if value.device.type != "cpu" or value.dim():
            raise ValueError(f"{name} is on {value.device}: {device}, model_pred's, is needed")
        return value.item()
    return value
