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

from fastpref_kernels import TRITON_MISSING
from fastpref_kernels.knobs import NOTHING_AROUND, Around, kinds_of, rows_of, sums_of
from fastpref_kernels.links import link_of

from .batch import Batch, plain
from .context import intercepted, transformed
from .sums import Options

if not TRITON_MISSING:
    from fastpref_kernels import launch

INTERPRETED = not TRITON_MISSING and launch.INTERPRETED

# constants: both tensors of target, ref, mask, base and anchor. n_groups: where pred does not tell.
_OPERANDS = "Tensor pred, Tensor? pred_l, Tensor?[] constants"
_NUMBERS = "float? huber_c, Tensor? huber_t, float[] affine, Tensor?[] affine_t, SymInt? n_groups"


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
        link, scalars, huber, reduction, error_reduction, around = options
        huber_c, huber_t = (None, huber) if isinstance(huber, Tensor) else (huber, None)
        affine: list[float] = []
        affine_t: list[Tensor | None] = []
        n_groups = None
        if batch.affine:  # of a step
            affine, affine_t = _apart(batch.affine)
            n_groups = batch.n_groups if batch.shares_pred else None
        if batch.intercepted:
            values, tensors = _apart([*scalars, *around.numbers()])
            there = "".join(str(int(number is not None)) for number in around[1:])
            # by name: importing this module anew replaces the ops
            loss, stats = torch.ops.fastpref.pair_forward(
                link.key, values, tensors, pred, pred_l, _constants(batch, batch.ref),
                huber_c, huber_t, affine, affine_t, n_groups, batch.swap, reduction,
                error_reduction, around.guard, there, batch.lengths,
            )  # fmt: skip
        else:
            more = _more(
                batch.base, batch.anchor, batch.affine, batch.lengths, n_groups, around
            )  # fmt: skip
            loss, stats = launch.pair_forward(
                link, scalars, (pred, pred_l), batch.target, batch.ref, batch.mask, batch.swap,
                huber, reduction, error_reduction, more,
            )  # fmt: skip
        ctx.numbers = huber_c, affine, n_groups
        ctx.opaque, ctx.link = batch.intercepted, link
        drift, _ = options.needs
        read = _constants(batch, batch.ref if drift else (None, None))
        ctx.save_for_backward(stats, huber_t, *affine_t, pred, pred_l, *read)
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
        huber_c, affine, n_groups = ctx.numbers
        stats, huber_t, *rest = ctx.saved_tensors
        affine_t, (pred, pred_l, *constants) = rest[: len(affine)], rest[len(affine) :]
        grads = run(
            grad_loss, stats, pred, pred_l, constants, huber_c, huber_t, affine, affine_t,
            n_groups, need, need_l, ctx.link.key,
        )  # fmt: skip
        return grads[0] if need else None, grads[-1] if need_l else None, None, None


def _apart(numbers: Sequence[Any]) -> tuple[list[float], list[Tensor | None]]:
    """The floats among some numbers, and the tensors."""
    values = [0.0 if isinstance(number, Tensor) else number for number in numbers]
    return values, [number if isinstance(number, Tensor) else None for number in numbers]


def _together(values: Sequence[float], tensors: Sequence[Tensor | None]) -> list[Any]:
    return [v if t is None else t for v, t in zip(values, tensors, strict=True)]


def _constants(batch: Batch, ref: Any) -> list[Tensor | None]:
    return [*batch.target, *ref, *batch.mask, *batch.base, *batch.anchor]


def _more(
    base: Any = (None, None),
    anchor: Any = (None, None),
    affine: Sequence[Any] = (),
    lengths: Tensor | None = None,
    n_groups: int | None = None,
    around: Around = NOTHING_AROUND,
) -> Any:
    absent = base[0] is None and anchor[0] is None and lengths is None and n_groups is None
    if absent and around is NOTHING_AROUND:
        return launch.NOTHING_MORE
    return launch.More(tuple(base), tuple(anchor), tuple(affine), lengths, n_groups, around)


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
    schema=f"(str link, float[] values, Tensor?[] tensors, {_OPERANDS}, {_NUMBERS}, bool swap,"
    " str reduction, str error_reduction, str? guard, str there, Tensor? lengths)"
    " -> (Tensor, Tensor)",
)
def pair_forward(
    link: str,
    values: list[float],
    tensors: list[Tensor | None],
    pred: Tensor,
    pred_l: Tensor | None,
    constants: list[Tensor | None],
    huber_c: float | None,
    huber_t: Tensor | None,
    affine: list[float],
    affine_t: list[Tensor | None],
    n_groups: int | None,
    swap: bool,
    reduction: str,
    error_reduction: str,
    guard: str | None,
    there: str,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """there: of the numbers around the link, which there are, 0 or 1 each."""
    numbers = _together(values, tensors)
    n_link = len(numbers) - there.count("1")
    rest = iter(numbers[n_link:])
    around = Around(guard, *(next(rest) if each == "1" else None for each in there))
    around = NOTHING_AROUND if "1" not in there else around
    target, ref, mask, base, anchor = zip(constants[::2], constants[1::2], strict=True)
    more = _more(base, anchor, _together(affine, affine_t), lengths, n_groups, around)
    huber = huber_c if huber_t is None else huber_t
    return launch.pair_forward(
        link_of(link), numbers[:n_link], (pred, pred_l), target, ref, mask, swap, huber,
        reduction, error_reduction, more,
    )  # fmt: skip


def _launch_backward(
    grad_loss: Tensor,
    stats: Tensor,
    pred: Tensor,
    pred_l: Tensor | None,
    constants: list[Tensor | None],
    huber_c: float | None,
    huber_t: Tensor | None,
    affine: list[float],
    affine_t: list[Tensor | None],
    n_groups: int | None,
    need: bool,
    need_l: bool,
    link: str,
) -> list[Tensor]:
    huber = huber_c if huber_t is None else huber_t
    target, ref, mask, base, anchor = zip(constants[::2], constants[1::2], strict=True)
    more = _more(base, anchor, _together(affine, affine_t) if affine else (), None, n_groups)
    grads = launch.pair_backward(
        grad_loss, stats, (pred, pred_l), target, mask, huber, (need, need_l), link_of(link), ref,
        more,
    )  # fmt: skip
    return [grad for grad in grads if grad is not None]


pair_backward = torch.library.custom_op(
    "fastpref::pair_backward",
    _launch_backward,
    mutates_args=(),
    schema=f"(Tensor grad_loss, Tensor stats, {_OPERANDS}, {_NUMBERS}, bool need, bool need_l,"
    " str link) -> Tensor[]",
)


@pair_forward.register_fake
def _fake_forward(*args: Any) -> tuple[Tensor, Tensor]:
    key, (pred, pred_l, constants), n_groups, reduction = args[0], args[3:6], args[10], args[12]
    guard, there = args[14:16]
    link = link_of(key)
    ref, anchor = constants[2], constants[8]
    n_samples = pred.shape[0]
    if n_groups is None:
        n_groups = n_samples // link.members if pred_l is None else n_samples
    loss = pred.new_empty((n_groups,) if reduction == "none" else (), dtype=torch.float32)
    drift, cross = sums_of(link, guard, there[1] == "1")
    anchored = anchor is not None
    rows = rows_of(link, kinds_of(link, ref is not None, drift, anchored), drift, cross, anchored)
    return loss, pred.new_empty((rows, n_groups), dtype=torch.float32)


@pair_backward.register_fake
def _fake_backward(*args: Any) -> list[Tensor]:
    (pred, pred_l), (need, need_l) = args[2:4], args[10:12]
    given = ((pred, need), (pred_l, need_l))
    return [torch.empty_like(t) for t, needed in given if needed and t is not None]
