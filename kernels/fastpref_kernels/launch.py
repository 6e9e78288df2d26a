"""How the kernels are launched: grids, row layouts, the 64-bit choice, tickets, and everything that
is allocated."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from . import pair
from .knobs import NOTHING_AROUND, Around, kinds_of, rows_of, sums_of
from .links import Group, Link

# Whether TRITON_INTERPRET was set when Triton was imported.
INTERPRETED = not isinstance(pair.pair_fwd, triton.JITFunction)

BLOCK = 1024  # elements that a program reads of each tensor at a time
MAX_PROGRAMS = 1024  # fills a large GPU; more would only lengthen the last program's sum
PAIRS, PARTS = 4, 32  # partial sums of each kind that the last program reads at a time
REVERSED = False  # whether backward starts at the last block
INT32_ELEMENTS = 2**31 - BLOCK

# One tensor, stacked or shared by the pair, and None; or winners and losers; or None and None.
Operand = tuple[Tensor | None, Tensor | None]
Strides = tuple[tuple[int, ...], ...]  # of each tensor
ABSENT: Operand = (None, None)


class More(NamedTuple):
    """What only some links take. base, affine = (a, b): the target is (target - a base) / b, with a
    and b as numbers, or tensors of one for all, for each group or for each sample, in the order of
    pred. anchor: another model's predictions. lengths: (B,) integers, how many members a group has.
    n_groups: where pred's rows do not tell. around: what is done around the link."""

    base: Operand = ABSENT
    anchor: Operand = ABSENT
    affine: tuple[float | Tensor, ...] = ()
    lengths: Tensor | None = None
    n_groups: int | None = None
    around: Around = NOTHING_AROUND


NOTHING_MORE = More()


class Plan(NamedTuple):
    """What of a launch follows from its link and the sizes and strides of its tensors, which are
    the same at every step."""

    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]  # the kernel's last ones, in its order
    launchers: dict[Any, Callable[..., None]]  # of the compiled kernels, by `_signature`
    scattered: bool  # whether a tensor's neighbours in a block are not neighbours in memory
    n_groups: int
    members: int  # of a group
    ticket: bool = False  # whether the kernel takes one
    loss: tuple[int, ...] = ()  # sizes of what is allocated
    stats: tuple[int, ...] = ()
    partials: tuple[int, ...] = ()


def pair_forward(
    link: Link | Group,
    scalars: Sequence[float | Tensor],
    pred: Operand,
    target: Operand,
    ref: Operand = ABSENT,
    mask: Operand = ABSENT,
    swap: bool = False,
    huber_c: float | Tensor | None = None,
    reduction: str = "mean",
    error_reduction: str = "mean",
    more: More = NOTHING_MORE,
) -> tuple[Tensor, Tensor]:
    """One launch: the loss, () or (B,) for reduction "none", and stats (rows, B): the sums of each
    member (of a pair mse_w, mse_l, and with a reference the gaps and its errors), the margin or
    score, and the factors of the gradient.

    scalars: the link's hyper-parameters and then, all or none, the knobs: numbers, or tensors of
    shape () or (B,). ref: predictions, or of one dimension, errors. mask: expanded to pred's sizes.
    swap: the link takes the loser for the winner.
    """
    plain = more is NOTHING_MORE
    rare: tuple[Tensor | None, ...] = ()
    around: tuple[str | None, bool, bool, bool] = (None, False, False, False)
    if not plain:
        rare = (*more.base, *more.anchor)
        around = _kinds_of(more.around)
        scalars = [*scalars, *more.around.numbers()]
    plan = _plan_forward(
        link, reduction, error_reduction, swap, more.n_groups, around, len(scalars),
        *[t if t is None else (t.shape, t.stride()) for t in (*pred, *target, *ref, *mask, *rare)],
    )  # fmt: skip
    assert pred[0] is not None
    device = pred[0].device
    loss = torch.empty(plan.loss, dtype=torch.float32, device=device)
    stats = torch.empty(*plan.stats, dtype=torch.float32, device=device)  # read faster than a tuple
    partials = torch.empty(*plan.partials, dtype=torch.float32, device=device)
    pointers = (
        _pointers(pred), _pointers(target), _pointers(ref), _pointers(mask),
        *(((), ()) if plain else (_pointers(more.base), _pointers(more.anchor))),
        loss, stats, partials,
    )  # fmt: skip
    values, tensors, strides = _scalars(scalars)
    huber, of_huber = _huber(huber_c, plan, link)
    affine = _affine(more.affine, plan, link)
    numbers = (more.lengths, values, tensors, strides, huber, affine)
    seen = (*tensors, *of_huber)
    strides += huber[2:]
    if not plain:
        seen += (more.lengths, *(affine[1] if affine else ()))
        strides += sum(affine[2:], ())
    _launch(pair.pair_fwd, plan, device, pointers, numbers, seen, strides)
    return loss, stats


def pair_backward(
    grad_loss: Tensor,
    stats: Tensor,
    pred: Operand,
    target: Operand,
    mask: Operand = ABSENT,
    huber_c: float | Tensor | None = None,
    needed: tuple[bool, bool] = (True, True),
    link: Link | Group | None = None,
    ref: Operand = ABSENT,
    more: More = NOTHING_MORE,
) -> tuple[Tensor | None, Tensor | None]:
    """One launch: the gradients of `pred`'s tensors, where needed, in their dtype and layout.
    grad_loss: (), (B,), or (members, B) for each member's error. link: needed for a `Group`. ref:
    given where the gradient has its direction, too."""
    grad = torch.empty_like(pred[0]) if needed[0] and pred[0] is not None else None
    grad_l = torch.empty_like(pred[1]) if needed[1] and pred[1] is not None else None
    tensors: tuple[Tensor | None, ...] = (*pred, *target, *mask, grad, grad_l)
    group = link if isinstance(link, Group) else None
    of_ref: tuple[Tensor, ...] = ()
    base, anchor = of_ref, of_ref
    if group or ref[0] is not None:
        others = (ref, more.base, more.anchor)
        of_ref, base, anchor = map(_pointers, others)
        tensors += tuple(t for each in others for t in each)
    plan = _plan_backward(
        group, more.n_groups, stats.shape[0], grad_loss.dim() == 2,
        *[t if t is None else (t.shape, t.stride()) for t in tensors],
    )  # fmt: skip
    grads = _pointers(pred) if grad is None else (grad,)
    if pred[1] is not None:
        grads = (grads[0], pred[1] if grad_l is None else grad_l)
    pointers = (
        _pointers(pred), _pointers(target), of_ref, _pointers(mask), base, anchor,
        grads, grad_loss, stats,
    )  # fmt: skip
    huber, seen = _huber(huber_c, plan, link)
    affine = _affine(more.affine, plan, link)
    numbers = (huber, affine, 0 if grad_loss.dim() == 2 else _stride(grad_loss))
    strides = huber[2:]
    if affine:
        seen = (*seen, *affine[1])
        strides += sum(affine[2:], ())
    _launch(pair.pair_bwd, plan, stats.device, pointers, numbers, seen, strides)
    return grad, grad_l


Laid = tuple[tuple[int, ...], tuple[int, ...]]  # sizes and strides of a tensor


@functools.lru_cache(4096)
def _plan_forward(
    link: Link | Group, reduction: str, error_reduction: str, swap: bool, n_groups: int | None,
    around: tuple[str | None, bool, bool, bool], n_scalars: int, *laid: Laid | None,
) -> Plan:  # fmt: skip
    operands = [*_operands(laid), ABSENT, ABSENT][:6]
    pred, target, ref, mask, base, anchor = operands
    members = link.members
    n_groups, n_elements = _count(pred, members, n_groups)
    n_programs = _programs(n_groups, n_elements)
    ref_errors = ref[0] is not None and ref[0].dim() == 1
    paired = ref[0] is not None and not ref_errors
    sizes, strides, wide = _layout(
        n_elements, pred, target, ABSENT if ref_errors else ref, mask, base, anchor
    )
    scattered = _scattered(sizes, strides)
    if ref_errors:
        strides[2] = tuple((_stride(t),) for t in _pointers(ref))
    forms = [_form(each, n_groups, members, link) for each in operands]
    guard, drift_weighs, weighted, heated = around
    n_link = n_scalars - (guard is not None) - drift_weighs - weighted - heated
    drift, cross = sums_of(link, guard, drift_weighs)
    of_link: tuple[Any, ...]
    if isinstance(link, Group):
        first = link.first and link.first.triton
        of_link = (link.triton, first, None, None, 0, 0, n_link, 0.0)
    else:
        of_link = (None, None, link.score.triton, link.shape.triton,
                   len(link.score.hyper), len(link.hyper), n_link, link.sft_weight)  # fmt: skip
    listed = 0
    if isinstance(link, Group) and link.listed and members > 1:
        listed = triton.next_power_of_2(members)
    mix = [*link.hyper].index(link.mixed) if link.mixed else None
    anchored = anchor[0] is not None
    kinds = kinds_of(link, paired, drift, anchored)
    shown = kinds + 2 * ref_errors
    mean = error_reduction == "mean"
    counts = (1 if forms[3] == "shared" else members) if forms[3] and mean else 0
    return Plan(
        grid=(n_groups * n_programs, 1, 1),
        arguments=(
            n_groups, n_elements, n_programs,
            sizes, *strides, 1.0 / n_groups if reduction == "mean" else 1.0,
            *of_link, swap, guard, weighted, heated, reduction != "none", mean, members, listed,
            forms[0], forms[1], forms[2], ref_errors, *forms[3:],
            drift, mix, cross, wide, BLOCK, PAIRS, PARTS,
        ),
        launchers={},
        scattered=scattered,
        n_groups=n_groups,
        members=members,
        ticket=True,
        loss=(n_groups,) if reduction == "none" else (),
        stats=(rows_of(link, shown, drift, cross, anchored), n_groups),
        partials=((members * kinds + counts + cross) * n_groups * n_programs,),
    )  # fmt: skip


@functools.lru_cache(4096)
def _plan_backward(
    group: Group | None, n_groups: int | None, rows: int, of_members: bool, *laid: Laid | None
) -> Plan:
    pred, target, mask, grads, *others = _operands(laid)
    ref, base, anchor = others or (ABSENT, ABSENT, ABSENT)
    operands = (pred, target, ref, mask, base, anchor)
    members = group.members if group else 2
    n_groups, n_elements = _count(pred, members, n_groups)
    n_programs = _programs(n_groups, n_elements)
    given = (pred[0] if grads[0] is None else grads[0], pred[1] if grads[1] is None else grads[1])
    needed = -1 if pred[1] is None else (grads[0] is not None) + 2 * (grads[1] is not None)
    sizes, strides, wide = _layout(n_elements, *operands, given)
    directions = 1 + (ref[0] is not None) + (anchor[0] is not None)
    return Plan(
        grid=(n_groups * n_programs, 1, 1),
        arguments=(
            rows - members * directions, n_groups, n_elements, n_programs, sizes, *strides, members,
            *[_form(each, n_groups, members, group) for each in operands],
            needed, of_members, wide, BLOCK, REVERSED,
        ),
        launchers={},
        scattered=_scattered(sizes, strides),
        n_groups=n_groups,
        members=members,
    )  # fmt: skip


def _kinds_of(around: Around) -> tuple[str | None, bool, bool, bool]:
    """Which of them there are: the guard, and whether drift_weight, weight and heat."""
    _, _, *numbers = around
    return around.guard, *(number is not None for number in numbers)  # type: ignore[return-value]


def _operands(laid: Sequence[Laid | None]) -> list[Operand]:
    """Operands laid out so, on no device."""
    tensors = [None if t is None else torch.empty_strided(*t, device="meta") for t in laid]
    return [*zip(tensors[::2], tensors[1::2], strict=True)]


def _count(pred: Operand, members: int, n_groups: int | None) -> tuple[int, int]:
    """Groups, and elements per sample."""
    assert pred[0] is not None
    n_samples = pred[0].shape[0]
    n_elements = pred[0].numel() // n_samples
    if n_groups is None:
        n_groups = n_samples // members if pred[1] is None else n_samples
    return n_groups, n_elements


def _pointers(operand: Operand) -> tuple[Tensor, ...]:
    first, second = operand
    if first is None:
        return ()
    return (first,) if second is None else (first, second)


def _form(operand: Operand, n_groups: int, members: int, link: Link | Group | None) -> str | None:
    """How the kernels find an operand's rows."""
    first, second = operand
    if first is None:
        return None
    if second is not None:
        return "halves"
    if first.shape[0] == n_groups and members > 1:
        return "shared"
    return "listed" if isinstance(link, Group) and link.listed else "stacked"


def _stride(scalar: Tensor | None) -> int:
    return scalar.stride(0) if scalar is not None and scalar.dim() else 0


def _scalars(scalars: Sequence[float | Tensor]) -> tuple[tuple[Any, ...], ...]:
    """(values, tensors that go before them, their strides)"""
    if {*map(type, scalars)} == {float}:
        return tuple(scalars), (None,) * len(scalars), (0,) * len(scalars)
    tensors = tuple([s if isinstance(s, Tensor) else None for s in scalars])
    values = tuple([0.0 if isinstance(s, Tensor) else float(s) for s in scalars])
    strides = [t.stride() if t is not None and t.dim() == 2 else _stride(t) for t in tensors]
    return values, tensors, tuple(strides)


def _huber(
    huber_c: float | Tensor | None, plan: Plan, link: Link | Group | None
) -> tuple[tuple[Any, ...], tuple[Tensor | None, ...]]:
    """(the kernels' argument, what `_signature` sees of it)"""
    if huber_c is None:
        return (), ()
    if not isinstance(huber_c, Tensor):
        return (float(huber_c),), (None,)
    return (0.0, huber_c, *_strides_of_samples(huber_c, plan, link)), (huber_c,)


def _affine(
    numbers: tuple[float | Tensor, ...], plan: Plan, link: Link | Group | None
) -> tuple[Any, ...]:
    """The kernels' argument."""
    if not numbers:
        return ()
    values, tensors, _ = _scalars(numbers)
    strides = [_strides_of_samples(t, plan, link) for t in tensors]
    return values, tensors, *zip(*strides, strict=True)


def _strides_of_samples(
    numbers: Tensor | None, plan: Plan, link: Link | Group | None
) -> tuple[int, int]:
    """By groups and by members, of one number for all, for each group, or for each sample."""
    stride = _stride(numbers)
    if numbers is None or numbers.dim() == 0 or len(numbers) == plan.n_groups:
        return stride, 0
    if isinstance(link, Group) and link.listed:
        return stride * plan.members, stride
    return stride, stride * plan.n_groups


def _programs(n_pairs: int, n_elements: int) -> int:
    """Programs per pair: one a block, or fewer that read equally many blocks each."""
    blocks = -(-n_elements // BLOCK)
    rounds = -(-blocks // max(1, MAX_PROGRAMS // n_pairs))
    return -(-blocks // rounds)


def _layout(n_elements: int, *operands: Operand) -> tuple[tuple[int, ...], list[Strides], bool]:
    """(sizes, strides of each operand, WIDE) as the kernels take them: inner dimensions in the
    order of the first operand's memory, neighbours merged wherever every tensor allows it."""
    wide = n_elements > INT32_ELEMENTS
    pointers = [_pointers(operand) for operand in operands]
    tensors = [t for each in pointers for t in each]
    if all(t.is_contiguous() for t in tensors):
        return (), [((),) * len(each) for each in pointers], wide
    inner = _merged(tensors)
    sizes: tuple[int, ...] = ()
    columns: list[tuple[int, ...]] = []
    if inner and (len(inner) > 1 or set(inner[0][1]) != {1}):
        sizes = tuple(size for size, _ in inner)
        columns = [strides for _, strides in inner]
    rows = [(t.stride(0), *(each[i] for each in columns)) for i, t in enumerate(tensors)]
    last = [sum((n - 1) * s for n, s in zip(sizes, row[1:], strict=True)) for row in rows]
    found = iter(rows)
    strides = [tuple(next(found) for _ in each) for each in pointers]
    return sizes, strides, wide or max(last) > INT32_ELEMENTS


def _scattered(sizes: tuple[int, ...], strides: list[Strides]) -> bool:
    """A mask that is the same for neighbours (stride 0) does not count."""
    inner = [each[-1] for tensors in strides for each in tensors if sizes and each]
    return not {*inner} <= {0, 1}


def _merged(tensors: Sequence[Tensor]) -> list[tuple[int, tuple[int, ...]]]:
    """Inner dimensions as (size, strides in each tensor), outermost first, as few as can be."""
    shape = tensors[0].shape
    dims = [(shape[d], tuple(t.stride(d) for t in tensors)) for d in range(1, len(shape))]
    merged: list[tuple[int, tuple[int, ...]]] = []
    for size, strides in sorted((d for d in dims if d[0] > 1), key=lambda d: d[1], reverse=True):
        if merged and merged[-1][1] == tuple(size * stride for stride in strides):
            merged[-1] = (merged[-1][0] * size, strides)
        else:
            merged.append((size, strides))
    return merged


def _launch(
    kernel: Any,
    plan: Plan,
    device: torch.device,
    pointers: tuple[Any, ...],
    numbers: tuple[Any, ...],
    tensors: tuple[Tensor | None, ...],
    strides: tuple[int, ...] = (),
) -> None:
    """The kernel takes pointers, its ticket, numbers, and then what is in the plan. Among the
    numbers are `tensors` and their `strides`.

    On NVIDIA the jit is asked once for each signature. Later launches do without it: its pre-run
    hooks, and knobs that change what it compiles, are seen at the first one only.
    """
    if device.type != "cpu":
        module = torch.get_device_module(device)
        if module.current_device() != device.index:  # Triton launches where the process stands
            with module.device(device.index):
                return _launch(kernel, plan, device, pointers, numbers, tensors, strides)
    if plan.ticket:
        pointers = (*pointers, _ticket(device))
    arguments = (*pointers, *numbers, *plan.arguments)
    signature = None
    if device.type == "cuda" and not torch.version.hip:
        signature = _signature(device, _flat((*pointers, tensors)), strides)
    if launcher := plan.launchers.get(signature):
        launcher(*arguments)
        return
    options = {} if INTERPRETED else _options(plan, pointers, _target(device.index))
    compiled = kernel[plan.grid](*arguments, **options)
    if signature is not None and isinstance(compiled, CompiledKernel):
        plan.launchers[signature] = compiled[plan.grid]


def _flat(pointers: Sequence[Any]) -> tuple[Tensor | None, ...]:
    found: list[Tensor | None] = []
    for each in pointers:
        found += each if type(each) is tuple else (each,)
    return tuple(found)


def _threads(plan: Plan, pointers: Sequence[Any]) -> int:
    """A thread has one 16-byte vector of a block of predictions or targets (the first two
    operands), whichever are wider; or the addresses of four elements."""
    narrow = all(t.element_size() < 4 for each in pointers[:2] for t in each)
    return BLOCK // 8 if narrow and not plan.scattered else BLOCK // 4


def _options(plan: Plan, pointers: Sequence[Any], target: GPUTarget) -> dict[str, int]:
    """How the jit is to compile a launch.

    On NVIDIA it says how many registers a thread may have. Left to itself, ptxas takes fewer than
    a kernel needs, and spills, to have room for more programs at once than the grid has. What it
    makes for Blackwell needs more of them.
    """
    options = {"num_warps": _threads(plan, pointers) // target.warp_size}
    if target.backend == "cuda":  # the only one that has the option
        usual = 64 if target.arch < 100 else 80
        usual = 128 if plan.scattered else usual
        of_list = 168 if plan.members <= 4 else 255  # every member has sums of its own
        options["maxnreg"] = usual if plan.members <= 2 else of_list
    return options


@functools.lru_cache
def _target(index: int) -> GPUTarget:
    """What Triton compiles for on a device, which is the current one."""
    return triton.runtime.driver.active.get_current_target()


def _signature(
    device: torch.device, tensors: tuple[Tensor | None, ...], strides: tuple[int, ...]
) -> tuple[Any, ...]:
    """What the jit, on NVIDIA, looks at in the arguments that are not in a plan, to find what it
    compiled for such; of numbers it sees that they are floats. It looks at all of some 40
    arguments, which takes longer than the launch."""
    each = [t if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in tensors]
    return (device.index, strides, *each)


_tickets: dict[tuple[int | None, int], Tensor] = {}
_spare: dict[int | None, list[Tensor]] = {}
_slabs: list[Tensor] = []  # captured graphs point into these for as long as they live
_making = threading.Lock()


def _ticket(device: torch.device) -> Tensor:
    """A counter at 0 that no launch running at the same time can use: one per stream, and one per
    captured launch, since a graph may be replayed on any stream. Every launch leaves its counter at
    0, so that none is cleared again."""
    if device.type == "cpu":  # the interpreter; a launch that raises must not spoil the next one
        return torch.zeros(1, dtype=torch.int32, device=device)
    capturing = _capturing(device)
    key = (device.index, _stream(device))
    if not capturing and key in _tickets:
        return _tickets[key]
    with _making:
        spare = _spare.setdefault(device.index, [])
        if not spare:
            if capturing:  # nothing can be waited for: the graph gets a counter it clears itself
                return torch.zeros(1, dtype=torch.int32, device=device)
            slab = _new_slab(device)
            _slabs.append(slab)
            # 16 bytes apart: the jit would compile anew, perhaps while a graph is captured, else
            spare += slab.split(1)[::4]
        ticket = spare.pop()
        return ticket if capturing else _tickets.setdefault(key, ticket)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _stream(device: torch.device) -> int:
    return int(triton.runtime.driver.active.get_current_stream(device.index))


def _new_slab(device: torch.device) -> Tensor:
    """Zeros for the counters of 4096 streams and captured launches, there before any can use them.

    Made in a thread and on a stream of its own: torch.compile's "reduce-overhead" warms up inside a
    memory pool that belongs to its thread or stream, and takes back what that holds.
    """
    made: list[Tensor] = []

    def make() -> None:
        module = torch.get_device_module(device)
        with module.device(device.index), module.stream(module.Stream(device.index)):
            made.append(torch.zeros(4 * 4096, dtype=torch.int32, device=device))
            module.current_stream().synchronize()

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return made[0]
