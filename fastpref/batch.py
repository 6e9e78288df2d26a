"""Validation of the tensor arguments: model_pred, target, ref_pred and mask in all their forms."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.masked import MaskedTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .context import dispatches_itself, intercepted

Halves: TypeAlias = "Tensor | tuple[Tensor, Tensor]"
Scalar: TypeAlias = "float | Tensor"
Operand: TypeAlias = "tuple[Tensor | None, Tensor | None]"

ABSENT: Operand = (None, None)

_KERNELS_TAKE = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = (*_KERNELS_TAKE, torch.float64)


class Batch(NamedTuple):
    """The tensors of B groups, which are pairs, single samples, or lists.

    Of pairs, each is (stacked (2B, ...), None) or (winners, losers); a target or mask that a group
    shares is ((B, ...), None); what is absent is (None, None). Members of a list follow one another
    in (B * members, ...).

    ref: the reference's predictions, or its errors, a number for each sample. mask: of pred's
    sizes. is_fp64: what is computed in. swap: losers and winners change places in all of them.
    intercepted: see `context.intercepted`. lengths: (B,), how many members a list has.

    base, affine = (a, b): the target is (target - a base) / b. anchor: another model's predictions,
    as ref. Pairs may share their predictions, ((B, ...), None).
    """

    pred: Operand
    target: Operand
    ref: Operand
    mask: Operand
    n_groups: int
    is_fp64: bool
    swap: bool
    intercepted: bool
    members: int = 2
    listed: bool = False
    lengths: Tensor | None = None
    base: Operand = ABSENT
    anchor: Operand = ABSENT
    affine: tuple[Scalar, ...] = ()

    @property
    def shares_pred(self) -> bool:
        pred, other = self.pred
        assert pred is not None
        return other is None and self.members > 1 and pred.shape[0] == self.n_groups

    @property
    def device(self) -> torch.device:
        assert self.pred[0] is not None
        return self.pred[0].device


def check_pairs(
    model_pred: Halves,
    target: Halves,
    ref_pred: Halves | None = None,
    ref_mse: Halves | None = None,
    mask: Halves | None = None,
    swap: bool = False,
) -> Batch:
    """Raises TypeError or ValueError that names the argument, what came, and what is needed."""
    if swap is not True and swap is not False:
        raise TypeError(f"swap must be True or False, got a {type(swap).__name__}")
    ref, masks = ABSENT, ABSENT
    if ref_mse is None and mask is None and not intercepted():
        n_pairs = _usual_pairs(model_pred, target, ref_pred)
        if n_pairs:
            whole: list[Any] = [(model_pred, None), (target, None), (ref_pred, None), masks]
            return Batch(*whole, n_pairs, False, swap, False)  # type: ignore[call-arg]
    pred_w, pred_l = operand_of("model_pred", model_pred)
    n_samples, *sample = pred_w.shape
    if pred_w.numel() == 0:
        raise ValueError(
            f"model_pred is empty, with shape {tuple(pred_w.shape)}; "
            "expected at least one pair of samples with at least one element each"
        )
    if pred_l is None and n_samples % 2:
        raise ValueError(
            f"model_pred stacks {n_samples} samples, an odd number; "
            "expected as many losers as winners, as torch.cat([winners, losers]) gives"
        )
    n_pairs = n_samples // 2 if pred_l is None else n_samples
    target_w, target_l = operand_of("target", target)
    check_shape("target", target_w, target_l, n_pairs, sample, may_share=True)
    constants = [("target", target_w), ("target[1]", target_l)]
    if ref_pred is not None:
        ref = ref_w, ref_l = operand_of("ref_pred", ref_pred)
        check_shape("ref_pred", ref_w, ref_l, n_pairs, sample)
        constants += [("ref_pred", ref_w), ("ref_pred[1]", ref_l)]
        if ref_mse is not None:
            raise ValueError("ref_pred and ref_mse were both given; expected only one of them")
    elif ref_mse is not None:
        ref = ref_w, ref_l = operand_of("ref_mse", ref_mse, min_dim=1)
        check_shape("ref_mse", ref_w, ref_l, n_pairs, [])
        constants += [("ref_mse", ref_w), ("ref_mse[1]", ref_l)]
    if mask is not None:
        mask_w, mask_l = operand_of("mask", mask, dtypes=(torch.bool, *DTYPES))
        check_shape("mask", mask_w, mask_l, n_pairs, sample, may_share=True, broadcast=True)
        constants += [("mask", mask_w), ("mask[1]", mask_l)]
        masks = tuple(None if m is None else m.expand(-1, *sample) for m in (mask_w, mask_l))  # type: ignore[assignment]
    if pred_l is not None and pred_l.device != pred_w.device:
        raise ValueError(_on_another_device("model_pred[1]", pred_l, pred_w, "model_pred"))
    check_constants(constants, pred_w, "model_pred")
    shared = target_l is target_w
    operands = (pred_w, pred_l, target_w, target_l, *(ref if ref_pred is not None else ()))
    wide = any(t is not None and t.dtype == torch.float64 for t in operands)
    target_l = None if shared else target_l
    python_first = intercepted(*operands, *ref, *masks)
    return Batch(
        (pred_w, pred_l), (target_w, target_l), ref, masks, n_pairs, wide, swap, python_first
    )


def _usual_pairs(pred: Any, target: Any, ref: Any) -> int:
    """The number of pairs of whole tensors in which nothing needs a closer look, as at most steps;
    or else 0. Every step pays for this, so it is written out."""
    if type(pred) is not Tensor or type(target) is not Tensor:
        return 0
    if pred.is_nested or target.is_nested or pred.is_neg() or target.is_neg():
        return 0
    shape, of_target, device = pred.shape, target.shape, pred.device
    n_samples = shape[0] if len(shape) > 1 and pred.numel() else 0
    if (
        n_samples % 2
        or (of_target != shape and of_target != (n_samples // 2, *shape[1:]))
        or pred.dtype not in _KERNELS_TAKE
        or target.dtype not in _KERNELS_TAKE
        or pred.layout is not torch.strided
        or target.layout is not torch.strided
        or target.device != device
        or target.requires_grad
    ):
        return 0
    if ref is not None and (
        type(ref) is not Tensor
        or ref.is_nested
        or ref.is_neg()
        or ref.shape != shape
        or ref.dtype not in _KERNELS_TAKE
        or ref.layout is not torch.strided
        or ref.device != device
        or ref.requires_grad
    ):
        return 0
    return n_samples // 2


def check_errors(
    mse: Halves, ref_mse: Halves | None, gap: Halves | None = None
) -> tuple[Operand, Operand, int]:
    """Per-sample errors of the model, those of the reference or the gaps, and the number of pairs;
    raises as check_pairs."""
    mse_w, mse_l = operand_of("mse", mse, min_dim=1)
    if mse_w.dim() != 1 or mse_w.numel() == 0 or (mse_l is None and mse_w.shape[0] % 2):
        raise ValueError(
            f"mse has shape {tuple(mse_w.shape)}; expected one error per sample: (2B,) with the "
            "winners first, or a tuple of two (B,) tensors"
        )
    n_pairs = mse_w.shape[0] // 2 if mse_l is None else mse_w.shape[0]
    others: list[tuple[str, Tensor | None]] = []
    ref = ABSENT
    if ref_mse is not None:
        ref = ref_w, ref_l = operand_of("ref_mse", ref_mse, min_dim=1)
        check_shape("ref_mse", ref_w, ref_l, n_pairs, [], owner="mse")
        check_constants([("ref_mse", ref_w), ("ref_mse[1]", ref_l)], mse_w, "mse")
    elif gap is not None:
        ref = gap_w, gap_l = operand_of("gap", gap, min_dim=1)
        check_shape("gap", gap_w, gap_l, n_pairs, [], owner="mse")
        others = [("gap", gap_w), ("gap[1]", gap_l)]
    for name, tensor in (("mse[1]", mse_l), *others):
        if tensor is not None and tensor.device != mse_w.device:
            raise ValueError(_on_another_device(name, tensor, mse_w, "mse"))
    return (mse_w, mse_l), ref, n_pairs


def halves(operand: Operand, n_pairs: int, swap: bool = False) -> tuple[Tensor, Tensor]:
    """Winners and losers; both are the tensor itself where the pair shares it."""
    first, second = operand
    assert first is not None
    if second is None:
        if first.shape[0] == n_pairs:
            return first, first
        first, second = first[:n_pairs], first[n_pairs:]
    return (second, first) if swap else (first, second)


def check_shape(
    name: str,
    first: Tensor,
    second: Tensor | None,
    n_pairs: int,
    sample: list[int],
    may_share: bool = False,
    broadcast: bool = False,
    owner: str = "model_pred",
) -> None:
    # no `in`: Dynamo gets it wrong for symbolic sizes
    fits = first.shape[0] == 2 * n_pairs if second is None else first.shape[0] == n_pairs
    fits = fits or (may_share and first.shape[0] == n_pairs)
    if fits and is_sample(first, sample, broadcast):
        return
    leading = (n_pairs,) if second is not None else (2 * n_pairs, n_pairs)[: 1 + may_share]
    needed = " or ".join(str((n, *sample)) for n in leading)
    of_sample = f" of {tuple(sample)}" if sample else ""
    each = "" if second is None else " in each half"
    ones = ", where any size after the first may be 1" if broadcast else ""
    raise ValueError(
        f"{name} has shape {tuple(first.shape)}{each}, but {owner} holds {n_pairs} "
        f"pair(s){of_sample}; expected {needed}{ones}"
    )


def is_sample(tensor: Tensor, sample: list[int], broadcast: bool) -> bool:
    """Whether rows have these sizes; where they broadcast, 1 will do for any of them."""
    inner = list(tensor.shape[1:])
    if broadcast and len(inner) == len(sample):
        inner = [s if i == 1 else i for i, s in zip(inner, sample, strict=True)]
    return inner == sample


def check_constants(constants: list[tuple[str, Tensor | None]], first: Tensor, owner: str) -> None:
    for name, tensor in constants:
        if tensor is None:
            continue
        if tensor.device != first.device:
            raise ValueError(_on_another_device(name, tensor, first, owner))
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires a gradient, but the loss is differentiable with respect to "
                f"{owner} only; pass {name}.detach()"
            )


def _on_another_device(name: str, tensor: Tensor, first: Tensor, owner: str) -> str:
    return f"{name} is on {tensor.device}, but {owner} is on {first.device}; expected one device"


def operand_of(
    name: str, value: object, min_dim: int = 2, dtypes: tuple[torch.dtype, ...] = DTYPES
) -> tuple[Tensor, Tensor | None]:
    """One tensor, or winners and losers, of a dtype and rank that will do."""
    if isinstance(value, Tensor):
        return tensor_of(name, value, min_dim, dtypes), None
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        what = type(value).__name__
        what += f" of {len(value)}" if isinstance(value, (tuple, list)) else ""
        raise TypeError(f"{name} must be a tensor or a tuple (winners, losers), got a {what}")
    winner, loser = (tensor_of(f"{name}[{i}]", v, min_dim, dtypes) for i, v in enumerate(value))
    if winner.shape != loser.shape:
        raise ValueError(
            f"{name} has winners of shape {tuple(winner.shape)} but losers of shape "
            f"{tuple(loser.shape)}; expected equal shapes"
        )
    return winner, loser


def tensor_of(name: str, value: object, min_dim: int, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    tensor = plain(name, value)
    if tensor.dtype not in dtypes:
        needed = "float32, float16, bfloat16 or float64"
        needed = needed if torch.bool not in dtypes else f"bool, {needed}"
        raise TypeError(f"{name} has dtype {tensor.dtype}; expected {needed}")
    if tensor.dim() < min_dim:
        needed = "two dimensions, (samples, ...)" if min_dim == 2 else "one dimension"
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected at least {needed}")
    return tensor


def _hides_memory(value: Tensor) -> bool:
    return dispatches_itself(value) and not isinstance(value, FakeTensor)


def plain(name: str, value: object) -> Tensor:
    """The value as a dense tensor whose memory the kernels can read as it is."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got a {type(value).__name__}")
    if is_traceable_wrapper_subclass(value):
        if hasattr(value, "trigger_wait"):  # an AsyncCollectiveTensor: any operation waits for it
            return plain(name, value.clone())
        if not value.is_nested:
            inner = f", such as {name}.to_local()" if hasattr(value, "to_local") else ""
            raise TypeError(f"{name} is a {type(value).__name__}; expected a plain tensor{inner}")
    elif not torch.compiler.is_compiling() and _hides_memory(value):
        inner = f", such as {name}.get_data(), with mask={name}.get_mask()"
        inner = inner if isinstance(value, MaskedTensor) else ""
        raise TypeError(f"{name} is a {type(value).__name__}; expected a plain tensor{inner}")
    if value.is_nested:
        raise TypeError(
            f"{name} is a nested tensor; expected a dense one, such as "
            f"{name}.to_padded_tensor(0), with a mask"
        )
    if value.layout is not torch.strided:
        raise TypeError(
            f"{name} has layout {value.layout}; expected a dense tensor, such as {name}.to_dense()"
        )
    if not torch.compiler.is_compiling():
        if value._is_zerotensor():  # it has no memory
            return value.clone()
        if value.is_neg():  # a lazily negated view, whose memory holds the opposite sign
            return value.resolve_neg()
    return value
