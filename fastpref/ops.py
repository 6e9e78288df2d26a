"""The only file that says torch.library: schemas and fakes of the two ops, and the one
autograd.Function over them.

Eager calls launch the kernels directly, because a torch.library boundary costs more host time than
the launch; under torch.compile the same calls go through opaque ops, which no compiler looks into.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastpref_kernels import LINKS, TRITON_MISSING

from .pairs import Pairs

if not TRITON_MISSING:
    from fastpref_kernels import launch

INTERPRETED = not TRITON_MISSING and launch.INTERPRETED

_PAIRS = "Tensor pred, Tensor? pred_l, Tensor target, Tensor? target_l"

_library = torch.library.Library("fastpref", "DEF")
_library.define(
    f"pair_forward(str link, float[] values, Tensor?[] tensors, {_PAIRS}, str reduction)"
    " -> (Tensor, Tensor)"
)
_library.define(
    f"pair_backward(Tensor grad_loss, Tensor stats, {_PAIRS}, bool need, bool need_l) -> Tensor[]"
)


def pair_loss(
    link: str, hyper: Sequence[float | Tensor], pairs: Pairs, reduction: str
) -> tuple[Tensor, Tensor]:
    """(loss, stats) by the kernels, as `reference.pair_loss`; stats go on with the slopes."""
    values = [0.0 if isinstance(h, Tensor) else h for h in hyper]
    tensors = [h if isinstance(h, Tensor) else None for h in hyper]
    return _PairLoss.apply(*pairs.pred, *pairs.target, link, values, tensors, reduction)


class _PairLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        pred: Tensor,
        pred_l: Tensor | None,
        target: Tensor,
        target_l: Tensor | None,
        link: str,
        values: list[float],
        tensors: list[Tensor | None],
        reduction: str,
    ) -> tuple[Tensor, Tensor]:
        run = torch.ops.fastpref.pair_forward if torch.compiler.is_compiling() else _forward
        loss, stats = run(link, values, tensors, pred, pred_l, target, target_l, reduction)
        ctx.save_for_backward(stats, pred, pred_l, target, target_l)
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return loss, stats

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        need, need_l = ctx.needs_input_grad[:2]
        if grad_loss is None:
            return (None,) * 8
        run: Any = _backward
        if torch.compiler.is_compiling():
            run = torch.ops.fastpref.pair_backward
        elif torch.is_grad_enabled():  # create_graph=True: it must not pass for a constant
            run = _OnlyOnce.apply
        grads = iter(run(grad_loss, *ctx.saved_tensors, need, need_l))
        return next(grads) if need else None, next(grads) if need_l else None, *(None,) * 6


class _OnlyOnce(torch.autograd.Function):
    """The gradient with a graph of its own, along which nothing can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        return tuple(_backward(*args))

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            "fastpref's kernels give first derivatives only, and this is a second one: "
            'impl="torch" is needed'
        )


def _forward(
    link: str,
    values: list[float],
    tensors: list[Tensor | None],
    pred: Tensor,
    pred_l: Tensor | None,
    target: Tensor,
    target_l: Tensor | None,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    pairs = (pred, pred_l), (target, target_l)
    return launch.pair_forward(LINKS[link], values, tensors, *pairs, reduction)


def _backward(
    grad_loss: Tensor,
    stats: Tensor,
    pred: Tensor,
    pred_l: Tensor | None,
    target: Tensor,
    target_l: Tensor | None,
    need: bool,
    need_l: bool,
) -> list[Tensor]:
    pairs = (pred, pred_l), (target, target_l)
    grads = launch.pair_backward(grad_loss, stats, *pairs, (need, need_l))
    return [grad for grad in grads if grad is not None]


_library.impl("pair_forward", _forward, "CompositeExplicitAutograd")
_library.impl("pair_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fastpref::pair_forward", lib=_library)
def _fake_forward(
    link: str,
    values: list[float],
    tensors: list[Tensor | None],
    pred: Tensor,
    pred_l: Tensor | None,
    target: Tensor,
    target_l: Tensor | None,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    n_pairs = pred.shape[0] // 2 if pred_l is None else pred.shape[0]
    loss = pred.new_empty((n_pairs,) if reduction == "none" else (), dtype=torch.float32)
    return loss, pred.new_empty((5, n_pairs), dtype=torch.float32)


@torch.library.register_fake("fastpref::pair_backward", lib=_library)
def _fake_backward(
    grad_loss: Tensor,
    stats: Tensor,
    pred: Tensor,
    pred_l: Tensor | None,
    target: Tensor,
    target_l: Tensor | None,
    need: bool,
    need_l: bool,
) -> list[Tensor]:
    given = ((pred, need), (pred_l, need_l))
    return [torch.empty_like(t) for t, needed in given if needed and t is not None]
