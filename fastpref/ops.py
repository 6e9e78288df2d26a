"""The torch.library ops around the two kernels, and the one autograd.Function over them.

Eager calls launch the kernels directly, because a torch.library boundary costs more host time than
the launch. Under torch.compile, and where Python intercepts operations (FakeTensor, make_fx,
dispatch modes), the same calls go through opaque ops, which have schemas and fake implementations.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from fastpref_kernels import TRITON_MISSING
from fastpref_kernels.knobs import NOTHING_AROUND, Around, sums_of
from fastpref_kernels.links import link_of

from .batch import Batch, plain
from .context import intercepted, transformed
from .sums import Options

if not TRITON_MISSING:
    from fastpref_kernels import launch

INTERPRETED = not TRITON_MISSING and launch.INTERPRETED

_PREDS = "Tensor pred, Tensor? pred_l, Tensor target, Tensor? target_l, Tensor? ref, Tensor? ref_l"
_MASK = "Tensor? mask, Tensor? mask_l, float? huber_c, Tensor? huber_t"


def loss_of(batch: Batch, options: Options) -> tuple[Tensor, Tensor]:
    """(loss, stats) by the kernels, as `reference.loss_of`; stats have more rows after the
    margin."""
    loss, stats = _Loss.apply(*batch.pred, batch, options)
    # Whoever changes a metric in place does not touch what backward reads.
    return loss, stats.clone() if batch.intercepted else stats.data


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pred: Tensor, pred_l: Tensor | None, batch: Batch, options: Options
    ) -> tuple[Tensor, Tensor]:
        _, target, ref, mask, _, _, swap, opaque, _, _, lengths = batch
        link, scalars, huber, reduction, error_reduction, around = options
        huber_c, huber_t = (None, huber) if isinstance(huber, Tensor) else (huber, None)
        if opaque:
            numbers = [*scalars, *around.numbers()]
            values = [0.0 if isinstance(s, Tensor) else s for s in numbers]
            tensors = [s if isinstance(s, Tensor) else None for s in numbers]
            there = "".join(str(int(number is not None)) for number in around[1:])
            # by name: importing this module anew replaces the ops
            loss, stats = torch.ops.fastpref.pair_forward(
                link.key, values, tensors, pred, pred_l, *target, *ref, *mask,
                huber_c, huber_t, swap, reduction, error_reduction, around.guard, there, lengths,
            )  # fmt: skip
        else:
            loss, stats = launch.pair_forward(
                link, scalars, (pred, pred_l), target, ref, mask, swap, huber,
                reduction, error_reduction, _more(around, lengths),
            )  # fmt: skip
        ctx.huber_c, ctx.opaque, ctx.link = huber_c, opaque, link
        drift, _ = options.needs
        read = ref if drift else (None, None)
        ctx.save_for_backward(stats, huber_t, pred, pred_l, *target, *read, *mask)
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
        grads = run(grad_loss, stats, *read, ctx.huber_c, huber_t, need, need_l, ctx.link.key)
        return grads[0] if need else None, grads[-1] if need_l else None, None, None


def _more(around: Around, lengths: Tensor | None) -> Any:
    if around is NOTHING_AROUND and lengths is None:
        return launch.NOTHING_MORE
    return launch.More(lengths=lengths, around=around)


def errors_of(batch: Batch, options: Options) -> list[Tensor]:
    """(B,) each: the members' errors and, with a reference, their gaps."""
    return [row for kind in _Errors.apply(*batch.pred, batch, options) for row in kind.unbind()]


class _Errors(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pred: Tensor, pred_l: Tensor | None, batch: Batch, options: Options
    ) -> tuple[Tensor, ...]:
        _, target, ref, mask, *_ = batch
        huber = options.huber_c
        ctx.link, ctx.huber_c = options.link, None if isinstance(huber, Tensor) else huber
        _, stats = launch.pair_forward(
            ctx.link, (), (pred, pred_l), target, ref, mask, False, huber, "none",
            options.error_reduction,
        )  # fmt: skip
        huber_t = huber if isinstance(huber, Tensor) else None
        ctx.save_for_backward(stats, huber_t, pred, pred_l, *target, *mask)
        ctx.set_materialize_grads(False)
        found = (stats[:2].clone(), *([stats[2:4].clone()] if ref[0] is not None else []))
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [grad for grad in grads if grad is not None]
        if not given:
            return (None,) * 4
        total = given[0] if len(given) == 1 else given[0] + given[1]
        stats, huber_t, pred, pred_l, target, target_l, mask, mask_l = ctx.saved_tensors
        huber = ctx.huber_c if huber_t is None else huber_t

        def run(total: Tensor) -> list[Tensor]:
            made = launch.pair_backward(
                plain("grad_outputs", total.contiguous()), stats, (pred, pred_l),
                (target, target_l), (mask, mask_l), huber, ctx.needs_input_grad[:2], ctx.link,
            )  # fmt: skip
            return [grad for grad in made if grad is not None]

        again = torch.is_grad_enabled()  # create_graph=True
        made = _OnlyOnce.apply(run, total) if again else run(total)
        need, need_l = ctx.needs_input_grad[:2]
        return made[0] if need else None, made[-1] if need_l else None, None, None


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
    schema=f"(str link, float[] values, Tensor?[] tensors, {_PREDS}, {_MASK}, bool swap,"
    " str reduction, str error_reduction, str? guard, str there, Tensor? lengths)"
    " -> (Tensor, Tensor)",
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
    guard: str | None,
    there: str,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """there: of the numbers around the link, which there are, 0 or 1 each."""
    numbers = [v if t is None else t for v, t in zip(values, tensors, strict=True)]
    n_link = len(numbers) - there.count("1")
    rest = iter(numbers[n_link:])
    around = Around(guard, *(next(rest) if each == "1" else None for each in there))
    more = _more(NOTHING_AROUND if "1" not in there else around, lengths)
    huber = huber_c if huber_t is None else huber_t
    return launch.pair_forward(
        link_of(link), numbers[:n_link], (pred, pred_l), (target, target_l), (ref, ref_l),
        (mask, mask_l), swap, huber, reduction, error_reduction, more,
    )  # fmt: skip


def _launch_backward(
    grad_loss: Tensor,
    stats: Tensor,
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
    need: bool,
    need_l: bool,
    link: str,
) -> list[Tensor]:
    huber = huber_c if huber_t is None else huber_t
    grads = launch.pair_backward(
        grad_loss, stats, (pred, pred_l), (target, target_l), (mask, mask_l), huber,
        (need, need_l), link_of(link), (ref, ref_l),
    )  # fmt: skip
    return [grad for grad in grads if grad is not None]


pair_backward = torch.library.custom_op(
    "fastpref::pair_backward",
    _launch_backward,
    mutates_args=(),
    schema=f"(Tensor grad_loss, Tensor stats, {_PREDS}, {_MASK}, bool need, bool need_l, str link)"
    " -> Tensor[]",
)


@pair_forward.register_fake
def _fake_forward(*args: Any) -> tuple[Tensor, Tensor]:
    key, (pred, pred_l), ref, reduction = args[0], args[3:5], args[7], args[14]
    guard, there = args[16:18]
    link = link_of(key)
    n_samples = pred.shape[0]
    n_groups = n_samples // link.members if pred_l is None else n_samples
    loss = pred.new_empty((n_groups,) if reduction == "none" else (), dtype=torch.float32)
    drift, cross = sums_of(link, guard, there[1] == "1")
    kinds = (1 if ref is None else 3) + drift
    rows = launch.rows_of(link.members, kinds, drift, cross)
    return loss, pred.new_empty((rows, n_groups), dtype=torch.float32)


@pair_backward.register_fake
def _fake_backward(*args: Any) -> list[Tensor]:
    (pred, pred_l), (need, need_l) = args[2:4], args[12:14]
    given = ((pred, need), (pred_l, need_l))
    return [torch.empty_like(t) for t, needed in given if needed and t is not None]
