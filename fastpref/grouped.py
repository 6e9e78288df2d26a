"""Entry points of the losses on samples, on lists, and on pairs of which more is summed up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import TypedDict, Unpack

from fastpref_kernels.groups import LABEL
from fastpref_kernels.knobs import NOTHING_AROUND, Around
from fastpref_kernels.links import Group, Hyper

from . import ops, reference
from .batch import Batch, Halves, Scalar, check_pairs, plain
from .context import readable
from .dispatch import (
    ErrorReduction,
    Impl,
    MissingReference,
    Reduction,
    SafeguardOver,
    check_reductions,
    output_of_pairs,
    takes_triton,
)
from .outputs import LossOutput, SampleOutput
from .rows import check_groups
from .scalars import ANCHOR, check_guard, check_heat, check_huber, check_scalar, unexpected
from .sums import Options


class GroupCoreKnobs(TypedDict, total=False):
    """Keyword arguments of every loss here; see `sample_loss`."""

    mask: Tensor
    reduction: Reduction
    dro_temperature: Scalar
    impl: Impl


class SummedGroupKnobs(GroupCoreKnobs, total=False):
    """Of losses on samples that have an error_reduction of their own."""

    weight: Scalar
    huber_c: Scalar


class GroupKnobs(SummedGroupKnobs, total=False):
    """Of all others on samples and lists."""

    error_reduction: ErrorReduction


class SquaresKnobs(GroupCoreKnobs, total=False):
    """Of losses on pairs whose errors must be squares."""

    error_reduction: ErrorReduction
    pair_weight: Scalar
    loser_gradient_scale: Scalar | None
    safeguard: Scalar | None
    safeguard_over: SafeguardOver


def sample_loss(
    link: Group,
    model_pred: Tensor,
    target: Tensor,
    ref_pred: Tensor | None,
    ref_mse: Tensor | None,
    numbers: Mapping[str, Any],
    of_members: Mapping[str, Tensor] | None = None,
    lengths: Tensor | None = None,
    **knobs: Unpack[GroupKnobs],
) -> SampleOutput:
    """The loss of a link on single samples, (B, ...), or on lists of k, (B * k, ...), each prompt's
    rows following one another.

    Args:
        numbers: the link's, by name: floats, or tensors of shape () or (B,).
        of_members: those of each member of a list, (B, k). lengths: as in `rankdpo_loss`.
        knobs:
            mask, error_reduction, impl: as in `pair_loss`; a list may share its mask.
            huber_c: as in `pair_loss`: one number, (B,), or of lists (B * k,).
            weight: of each sample's or list's loss; 0 switches it off, whatever is in it. KTO's
                mean over the batch still includes it, NaN too.
            reduction, dro_temperature: "mean" or "sum" over samples or lists, "none" for (B,), or
                "dro", as in `pair_loss`.
    """
    _check_reference(link, ref_pred, ref_mse)
    batch = check_groups(
        model_pred, target, ref_pred, ref_mse, knobs.pop("mask", None), link.members, lengths
    )
    loss, stats, _ = run(link, batch, numbers, GroupKnobs, {**knobs}, of_members or {})
    each, k = stats.unbind(), link.members
    errors, drops, ref_errors = (
        each[i * k] if k == 1 else torch.stack(each[i * k : (i + 1) * k], 1) for i in range(3)
    )
    if lengths is not None:
        there = torch.arange(k, device=lengths.device) < lengths[:, None]
        errors, drops, ref_errors = (
            torch.where(there, kind, 0.0) for kind in (errors, drops, ref_errors)
        )
    return SampleOutput(loss, errors, each[3 * k], ref_errors, drops, lengths)


def summed_pair_loss(
    link: Group,
    model_pred: Halves,
    target: Halves,
    ref_pred: Halves | None,
    numbers: Mapping[str, Any],
    **knobs: Unpack[SquaresKnobs],
) -> LossOutput:
    """The loss of a link on pairs, of which it takes more sums than `pair_loss` has."""
    _check_reference(link, ref_pred, None)
    batch = check_pairs(model_pred, target, ref_pred, None, knobs.pop("mask", None))
    found = run(link, batch, numbers, SquaresKnobs, {**knobs})
    return output_of_pairs(*found, has_ref=True)


def _check_reference(link: Group, ref_pred: Any, ref_mse: Any) -> None:
    if link.needs_ref and ref_pred is None and (link.drift or ref_mse is None):
        wanted = "ref_pred" if link.drift else "ref_pred or ref_mse"
        raise MissingReference(
            f"{wanted} is missing; the loss compares with a reference model and needs its "
            f"predictions{'' if link.drift else ' or errors'}"
        )


def run(
    link: Group,
    batch: Batch,
    numbers: Mapping[str, Any],
    accepts: Any,
    knobs: dict[str, Any],
    of_members: Mapping[str, Any] = {},
    checked: Mapping[str, Scalar] = {},
) -> tuple[Tensor, Tensor, Options]:
    """(loss, stats, options). accepts: the TypedDict of the knobs. checked: numbers of the link
    that need no check any more."""
    n, device = batch.n_groups, batch.device
    accepted = accepts.__annotations__
    if unknown := [name for name in knobs if name not in accepted]:
        given = dict.fromkeys(name.split("[")[0] for name in numbers if "." not in name)
        raise TypeError(
            unexpected(f"loss {link.name!r}", unknown, [*given, *of_members, *accepted])
        )
    reduction, error_reduction = (knobs.get(k, "mean") for k in ("reduction", "error_reduction"))
    check_reductions(reduction, error_reduction)
    heat = check_heat(reduction, knobs.get("dro_temperature", 1.0), device)
    huber_c = knobs.get("huber_c")
    guard: tuple[str | None, Scalar | None] = (None, None)
    if "safeguard" in accepted:
        scale, mu = knobs.get("loser_gradient_scale"), knobs.get("safeguard")
        guard = check_guard(scale, mu, knobs.get("safeguard_over", "batch"), n, device)
    scalars = [
        checked[name] if name in checked else _number(name, numbers[name], hyper, n, device)
        for name, hyper in link.hyper.items()
    ]
    for name, hyper in link.of_members.items():
        scalars.append(_of_members(name, of_members[name], hyper, batch))
    weight = None
    for name in ("weight", "sample_weight", "pair_weight"):
        if knobs.get(name) is not None:
            weight = check_scalar(name, knobs[name], ANCHOR, n, device)
    if huber_c is not None:
        huber_c = check_huber(huber_c, n, n * link.members, device)
    around = NOTHING_AROUND
    if guard[0] is not None or weight is not None or heat is not None:
        around = Around(*guard, None, weight, heat)
    options = Options(link, scalars, huber_c, reduction, error_reduction, around)
    loss_of = ops.loss_of if takes_triton(knobs.get("impl", "auto"), batch) else reference.loss_of
    return *loss_of(batch, options), options


def _number(name: str, value: Any, hyper: Hyper, n: int, device: torch.device) -> Scalar:
    if hyper is not LABEL:
        if isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex():
            value = value.float()  # integer scores
        return check_scalar(name, value, hyper, n, device)
    label = plain(name, value)
    if label.shape != (n,) or label.is_complex():
        raise ValueError(
            f"{name} is a {label.dtype} tensor of shape {tuple(label.shape)}; expected bool, or 0 "
            f"and 1, of shape ({n},)"
        )
    _check_numbers(name, label, device)
    if readable(label) and (other := [v for v in label.tolist() if v not in (0, 1)]):
        raise ValueError(f"{name} contains {other[0]}; expected only 0 and 1")
    return label


def _of_members(name: str, value: Any, hyper: Hyper, batch: Batch) -> Tensor:
    """A number of each member, (B, members)."""
    scores, shape = plain(name, value), (batch.n_groups, batch.members)
    if scores.shape != shape or scores.is_complex():
        raise ValueError(
            f"{name} is a {scores.dtype} tensor of shape {tuple(scores.shape)}; expected real "
            f"numbers, of shape {shape}"
        )
    _check_numbers(name, scores, batch.device)
    lengths = batch.lengths
    if readable(scores) and (lengths is None or readable(lengths)):
        rows = scores.tolist()
        for i, length in enumerate([] if lengths is None else lengths.tolist()):
            rows[i] = rows[i][:length]  # padding may hold anything
        if outside := [v for row in rows for v in row if v not in hyper.interval]:
            raise ValueError(f"{name} contains {outside[0]}; expected numbers in {hyper.interval}")
    return scores


def _check_numbers(name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}; expected {device}, model_pred's device")
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires a gradient, but the loss is differentiable with respect to "
            f"model_pred only; pass {name}.detach()"
        )
