"""The torch.library ops around the two kernels, and the one autograd.Function over them.

Eager calls launch the kernels directly, because a torch.library boundary costs more host time than
the launch. Under torch.compile, and where Python intercepts operations (FakeTensor, make_fx,
dispatch modes), the same calls go through opaque ops, which have schemas and fake implementations.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from fastpref_kernels import TRITON_MISSING, Link
from fastpref_kernels.links import link_of

from .context import intercepted, transformed
from .pairs import Pairs, Scalar, plain

if not TRITON_MISSING:
    from fastpref_kernels import launch

INTERPRETED = not TRITON_MISSING and launch.INTERPRETED

_PAIRS = "Tensor pred, Tensor? pred_l, Tensor target, Tensor? target_l"
_MASK = "Tensor? mask, Tensor? mask_l, float? huber_c, Tensor? huber_t"


def pair_loss(
    link: Link,
    scalars: Sequence[Scalar],
    pairs: Pairs,
    huber_c: Scalar | None,
    reduction: str,
    error_reduction: str,
) -> tuple[Tensor, Tensor]:
    """(loss, stats) by the kernels, as `reference.pair_loss`; stats have the factors of the
    gradient after the margin."""
    constants = (pairs.target, pairs.ref, pairs.mask, pairs.swap, huber_c)
    opaque = pairs.intercepted
    options = (link, scalars, reduction, error_reduction, opaque)
    loss, stats = _PairLoss.apply(*pairs.pred, constants, options)
    # Whoever changes a metric in place does not touch what backward reads.
    return loss, stats.clone() if opaque else stats.data


class _PairLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        pred: Tensor,
        pred_l: Tensor | None,
        constants: tuple[Any, ...],  # one argument, as options: PyTorch looks at each
        options: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor]:
        target, ref, mask, swap, huber = constants
        link, scalars, *reductions, opaque = options
        huber_c, huber_t = (None, huber) if isinstance(huber, Tensor) else (huber, None)
        if opaque:
            values = [0.0 if isinstance(s, Tensor) else s for s in scalars]
            tensors = [s if isinstance(s, Tensor) else None for s in scalars]
            # by name: importing this module anew replaces the ops
            loss, stats = torch.ops.fastpref.pair_forward(
                link.key, values, tensors, pred, pred_l, *target, *ref, *mask,
                huber_c, huber_t, swap, *reductions,
            )  # fmt: skip
        else:
            loss, stats = launch.pair_forward(
                link, scalars, (pred, pred_l), target, ref, mask, swap, huber, *reductions
            )
        ctx.huber_c, ctx.opaque = huber_c, opaque
        ctx.save_for_backward(stats, huber_t, pred, pred_l, *target, *mask)
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return loss, stats

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        need, need_l = ctx.needs_input_grad[:2]
        if grad_loss is None:
            return (None,) * 4
        run: Any = _launch_backward
        if torch.compiler.is_compiling():
            run = torch.ops.fastpref.pair_backward
        elif _functorch.is_legacy_batchedtensor(grad_loss) or (
            transformed() and forward_ad.unpack_dual(grad_loss).tangent is not None
        ):
            raise RuntimeError(  # by is_grads_batched, or in forward mode over reverse mode
                "fastpref's kernels take no gradients that are batched or dual; "
                'pass impl="torch" to the loss'
            )
        elif ctx.opaque or intercepted(grad_loss):
            run = torch.ops.fastpref.pair_backward
        elif grad_loss.is_neg() or grad_loss._is_zerotensor():
            grad_loss = plain("grad_outputs", grad_loss)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            run = functools.partial(_OnlyOnce.apply, run)
        stats, huber_t, *read = ctx.saved_tensors
        grads = run(grad_loss, stats, *read, ctx.huber_c, huber_t, need, need_l)
        return grads[0] if need else None, grads[-1] if need_l else None, None, None


class _OnlyOnce(torch.autograd.Function):
    """The gradient with a graph of its own, so that it does not pass for a constant, but along
    which nothing can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, run: Any, *args: Any) -> tuple[Tensor, ...]:
        return tuple(run(*args))

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            "fastpref's kernels give first derivatives only, and this is a second one; "
            'pass impl="torch"'
        )


@torch.library.custom_op(
    "fastpref::pair_forward",
    mutates_args=(),
    schema=f"(str link, float[] values, Tensor?[] tensors, {_PAIRS}, Tensor? ref, Tensor? ref_l,"
    f" {_MASK}, bool swap, str reduction, str error_reduction) -> (Tensor, Tensor)",
)
def pair_forward(
    link: str,
    values: list[float],
    tensors: list[Tensor | None],
    pred: Tensor,
    pred_l: Tensor | None,
    target: Tensor,
    target_l: Tensor | None,
    ref: Tensor | None,
    ref_l: Tensor | None,
    mask: Tensor | None,
    mask_l: Tensor | None,
    huber_c: float | None,
    huber_t: Tensor | None,
    swap: bool,
    reduction: str,
    error_reduction: str,
) -> tuple[Tensor, Tensor]:
    scalars = [v if t is None else t for v, t in zip(values, tensors, strict=True)]
    huber = huber_c if huber_t is None else huber_t
    return launch.pair_forward(
        link_of(link), scalars, (pred, pred_l), (target, target_l), (ref, ref_l), (mask, mask_l),
        swap, huber, reduction, error_reduction,
    )  # fmt: skip


def _launch_backward(
    grad_loss: Tensor,
    stats: Tensor,
    pred: Tensor,
    pred_l: Tensor | None,
    target: Tensor,
    target_l: Tensor | None,
    mask: Tensor | None,
    mask_l: Tensor | None,
    huber_c: float | None,
    huber_t: Tensor | None,
    need: bool,
    need_l: bool,
) -> list[Tensor]:
    huber = huber_c if huber_t is None else huber_t
    grads = launch.pair_backward(
        grad_loss, stats, (pred, pred_l), (target, target_l), (mask, mask_l),
        huber, (need, need_l),
    )  # fmt: skip
    return [grad for grad in grads if grad is not None]


pair_backward = torch.library.custom_op(
    "fastpref::pair_backward",
    _launch_backward,
    mutates_args=(),
    schema=f"(Tensor grad_loss, Tensor stats, {_PAIRS}, {_MASK}, bool need, bool need_l)"
    " -> Tensor[]",
)


@pair_forward.register_fake
def _fake_forward(*args: Any) -> tuple[Tensor, Tensor]:
    (pred, pred_l), ref, reduction = args[3:5], args[7], args[-2]
    n_pairs = pred.shape[0] // 2 if pred_l is None else pred.shape[0]
    loss = pred.new_empty((n_pairs,) if reduction == "none" else (), dtype=torch.float32)
    rows = 5 if ref is None else 9
    return loss, pred.new_empty((rows, n_pairs), dtype=torch.float32)


@pair_backward.register_fake
def _fake_backward(*args: Any) -> list[Tensor]:
    (pred, pred_l), (need, need_l) = args[2:4], args[-2:]
    given = ((pred, need), (pred_l, need_l))
    return [torch.empty_like(t) for t, needed in given if needed and t is not None]
