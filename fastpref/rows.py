"""Validation of the tensor arguments of losses on samples, on lists, and on pairs of a sampler's
steps."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .batch import (
    ABSENT,
    DTYPES,
    Batch,
    Halves,
    Operand,
    check_constants,
    check_shape,
    is_sample,
    operand_of,
    plain,
    tensor_of,
)
from .context import intercepted, readable


class Names(NamedTuple):
    """What a loss calls its operands."""

    target: str = "target"
    ref: str = "ref_pred"
    ref_errors: str = "ref_mse"
    anchor: str = "ref_pred"


NAMES = Names()
STEP_NAMES = Names("x_next", "old_pred", "old_log_prob")


def check_groups(
    model_pred: Tensor,
    target: Tensor,
    ref: Tensor | None,
    ref_errors: Tensor | None,
    mask: Tensor | None,
    members: int,
    lengths: Tensor | None = None,
    *,
    base: Tensor | None = None,
    anchor: Tensor | None = None,
    names: Names = NAMES,
) -> Batch:
    """Of samples, or of lists of `members`, which are single tensors."""
    pred = tensor_of("model_pred", model_pred, 2, DTYPES)
    n_samples, *sample = pred.shape
    if pred.numel() == 0 or n_samples % members:
        each = "" if members == 1 else f" x {members}"
        raise ValueError(
            f"model_pred has shape {tuple(pred.shape)}; expected (B{each}, ...), with at least one "
            "element"
        )
    n_groups = n_samples // members
    rows = (n_samples,) if members == 1 else (n_samples, n_groups)
    target = _whole(names.target, target, rows, sample)
    constants: list[tuple[str, Tensor | None]] = [(names.target, target)]
    _only_one(ref, ref_errors, names)
    of_ref = ref
    if ref is not None:
        of_ref = _whole(names.ref, ref, rows[:1], sample)
        constants += [(names.ref, of_ref)]
    elif ref_errors is not None:
        of_ref = _whole(names.ref_errors, ref_errors, rows[:1], [])
        constants += [(names.ref_errors, of_ref)]
    if base is not None:
        base = _whole("x", base, rows[:1], sample)
        constants += [("x", base)]
    if anchor is not None:
        anchor = _whole(names.anchor, anchor, rows[:1], sample)
        constants += [(names.anchor, anchor)]
    if mask is not None:
        mask = _whole("mask", mask, rows, sample, (torch.bool, *DTYPES), broadcast=True)
        constants += [("mask", mask)]
        mask = mask.expand(-1, *sample)
    if lengths is not None:
        lengths = _lengths(lengths, n_groups, members)
        constants += [("lengths", lengths)]
    check_constants(constants, pred, "model_pred")
    read = (pred, target, ref, base, anchor)
    is_fp64 = any(t is not None and t.dtype == torch.float64 for t in read)
    python_first = intercepted(*read, of_ref, mask, lengths)
    return Batch(
        (pred, None), (target, None), (of_ref, None), (mask, None), n_groups, is_fp64, False,
        python_first, members, True, lengths, (base, None), (anchor, None),
    )  # fmt: skip


def _only_one(ref: Any, ref_errors: Any, names: Names) -> None:
    if ref is not None and ref_errors is not None:
        raise ValueError(
            f"{names.ref} and {names.ref_errors} were both given; expected only one of them"
        )


def check_pairs_of_steps(
    model_pred: Halves,
    x_next: Halves,
    x: Halves,
    ref: Halves | None,
    ref_errors: Halves | None,
    mask: Halves | None,
    names: Names,
) -> Batch:
    """Of pairs of steps, from one x and prediction or from two."""
    next_w, next_l = operand_of(names.target, x_next)
    n_samples, *sample = next_w.shape
    if next_w.numel() == 0 or (next_l is None and n_samples % 2):
        raise ValueError(
            f"{names.target} has shape {tuple(next_w.shape)}; expected (2B, ...), the B winners "
            "first, with at least one element"
        )
    n_pairs = n_samples // 2 if next_l is None else n_samples

    def rows(name: str, value: Halves | None, sample: list[int], **options: Any) -> Operand:
        if value is None and name not in ("model_pred", "x"):
            return ABSENT
        first, second = operand_of(name, value, min_dim=2 if sample else 1, **options)
        shared = bool(sample)
        check_shape(
            name, first, second, n_pairs, sample, shared, "dtypes" in options, owner=names.target
        )
        return first, second

    _only_one(ref, ref_errors, names)
    pred = rows("model_pred", model_pred, sample)
    base = rows("x", x, sample)
    name, of_ref = names.ref, rows(names.ref, ref, sample)
    if ref is None:
        name, of_ref = names.ref_errors, rows(names.ref_errors, ref_errors, [])
    masks = rows("mask", mask, sample, dtypes=(torch.bool, *DTYPES))
    constants = {names.target: (next_w, next_l), "x": base, name: of_ref, "mask": masks}
    each = [(f"{n}{'[1]' * i}", t) for n, two in constants.items() for i, t in enumerate(two)]
    masks = tuple(None if m is None else m.expand(-1, *sample) for m in masks)  # type: ignore[assignment]
    first, second = pred
    assert first is not None
    if second is not None and second.device != first.device:
        each.append(("model_pred[1]", second.detach()))
    check_constants(each, first, "model_pred")
    read = (*pred, next_w, next_l, *base, *(of_ref if ref is not None else ()))
    is_fp64 = any(t is not None and t.dtype == torch.float64 for t in read)
    return Batch(
        pred, (next_w, next_l), of_ref, masks, n_pairs, is_fp64, False,
        intercepted(*read, *of_ref, *masks), base=base,
    )  # fmt: skip


def _whole(
    name: str,
    value: Any,
    rows: tuple[int, ...],
    sample: list[int],
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    broadcast: bool = False,
) -> Tensor:
    """A tensor of `sample` for each of so many rows."""
    tensor = tensor_of(name, value, 2 if sample else 1, dtypes)
    if is_sample(tensor, sample, broadcast) and any(tensor.shape[0] == n for n in rows):
        return tensor
    needed = " or ".join(str((n, *sample)) for n in rows)
    ones = ", where any size after the first may be 1" if broadcast else ""
    raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {needed}{ones}")


def _lengths(value: Any, n_groups: int, members: int) -> Tensor:
    lengths = plain("lengths", value)
    integers = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    if lengths.dtype not in integers or lengths.shape != (n_groups,):
        raise ValueError(
            f"lengths is a {lengths.dtype} tensor of shape {tuple(lengths.shape)}; expected "
            f"integers of shape ({n_groups},), how many of its {members} rows each list has"
        )
    if readable(lengths):
        outside = [n for n in lengths.tolist() if not 0 <= n <= members]
        if outside:
            raise ValueError(f"lengths contains {outside[0]}; expected numbers in [0, {members}]")
    return lengths.contiguous()  # the kernels take no stride of it
