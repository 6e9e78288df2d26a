"""Compiles the kernels ahead of time, exactly as a launch would, for GPUs that need not be there.

As a script it prints a JSON row for each kernel: `python tests/helpers/aot.py [--groups]
[--in_turn] [TARGET ...]`, of the losses of pairs, or of the links of tests/kernels/test_engine.py;
for all targets, or for one of them in turn. A kernel that does not compile has an "error" in its
row. In the process that compiles, TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))
import machine_code
from fastpref_kernels import KNOBS, LINKS, Link, groups, launch, pair, steps
from fastpref_kernels.knobs import NOTHING_AROUND, Around, sums_of
from fastpref_kernels.links import Group

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


OPTIONS = launch._options  # of a plan, pointers and a target


class Recorder:
    """Stands in for a jit kernel: a launch writes its arguments down instead of running."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.calls: list[tuple[Any, Any, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: self.calls.append((grid, args, kwargs))


@contextlib.contextmanager
def recorded() -> Iterator[tuple[Recorder, Recorder]]:
    """Forward and backward kernel, replaced by recorders."""
    fwd, bwd = Recorder(pair.pair_fwd), Recorder(pair.pair_bwd)

    def noted(plan: Any, pointers: Any, target: None) -> dict[str, Any]:
        return {"plan": plan, "pointers": pointers}  # `specialized` makes options of these

    with (
        mock.patch.object(pair, "pair_fwd", fwd),
        mock.patch.object(pair, "pair_bwd", bwd),
        mock.patch.object(launch, "_options", noted),
        mock.patch.object(launch, "_target", return_value=None),
    ):
        yield fwd, bwd


@contextlib.contextmanager
def unplanned() -> Iterator[None]:
    """Without plans from before, which do not know what is patched now, and without leaving any."""
    with (
        mock.patch.object(launch, "_plan_forward", launch._plan_forward.__wrapped__),
        mock.patch.object(launch, "_plan_backward", launch._plan_backward.__wrapped__),
    ):
        yield


def specialized(recorder: Recorder, target: GPUTarget) -> tuple[Any, Any, Any, Any]:
    """(signature, constexprs, attributes, options) that the jit would compile the launch with."""
    kernel, (_, args, kwargs) = recorder.kernel, recorder.calls[-1]
    kwargs = OPTIONS(**kwargs, target=target)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(*args, **kwargs)
    options, *rest = kernel._pack_args(backend, kwargs, bound, specialization, None)
    return *rest, options


def compiled(recorder: Recorder, name: str) -> dict[str, Any]:
    """What the compiler made of the recorded launch (see `machine_code.read`), or else its
    error."""
    target = TARGETS[name]
    signature, constexprs, attrs, options = specialized(recorder, target)
    row = {"triton": triton.__version__, "kernel": recorder.kernel.__name__, "target": name}
    row["threads"] = options.num_warps * target.warp_size
    source = ASTSource(recorder.kernel, signature, constexprs, attrs)
    try:
        binary = triton.compile(source, target=target, options=options.__dict__)
    except Exception as error:  # a compiler raises what it likes
        return row | {"error": f"{type(error).__name__}: {error}"}
    return row | machine_code.read(binary, target.backend)


class Case(NamedTuple):
    """A training step on two pairs of 4x64x64 latents."""

    link: str = "mapo"
    pred: str = "fp32"
    target: str = "fp32"
    shared: bool = True
    ref: str = ""  # dtype of the reference's prediction; "errors" for its errors
    mask: str = ""  # "bool": one for the pair, over all channels
    # "wide": as many elements as need 64 bits, which nothing here allocates; "halves": winners and
    # losers in a tensor each, of which only the winners' needs a gradient
    layout: str = "dense"
    knobs: str = ""  # all of them; "floats", or "tensors" of a value per pair
    huber: bool = False


def recorders(case: Case) -> tuple[Recorder, Recorder]:
    """The launches of one training step."""
    model_pred = torch.zeros(4, 4, 64, 64, dtype=DTYPES[case.pred])
    ref: launch.Operand = launch.ABSENT
    if LINKS[case.link].score.needs_ref:
        errors = case.ref == "errors"
        ref = (torch.zeros(4) if errors else model_pred.to(DTYPES[case.ref or case.pred]), None)
    if case.layout == "channels_last":
        model_pred = model_pred.to(memory_format=torch.channels_last)
    wanted = torch.zeros(2 if case.shared else 4, 4, 64, 64, dtype=DTYPES[case.target])
    mask = torch.zeros(2, 1, 64, 64, dtype=torch.bool).expand(2, 4, 64, 64) if case.mask else None
    scalars: list[float | torch.Tensor] = [1.0] * len(LINKS[case.link].hyper)
    if case.knobs:
        scalars += [torch.ones(2) if case.knobs == "tensors" else 0.5] * len(KNOBS)
    huber = 0.001 if case.huber else None
    pred: launch.Operand = (model_pred, None)
    if case.layout == "halves":
        pred = model_pred[:2].clone(), model_pred[2:].clone()
    target, masks = (wanted, None), (mask, None)
    count = (2, 2**32) if case.layout == "wide" else launch._count(pred, 2, None)
    with recorded() as both, unplanned(), mock.patch.object(launch, "_count", return_value=count):
        loss, stats = launch.pair_forward(
            LINKS[case.link], scalars, pred, target, ref, masks, huber_c=huber
        )
        launch.pair_backward(loss, stats, pred, target, masks, huber_c=huber, needed=(True, False))
    return both


def cases() -> list[Case]:
    """Every link in fp32, alone and with all knobs; and with one link that has no reference and one
    that has, each mixture of dtypes that trainers have, both forms of target, and the rest."""
    dtypes = [("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16"), ("fp16", "fp16")]
    found = [Case(link, knobs=knobs) for link in LINKS for knobs in ("", "tensors")]
    found += [Case("dpo_sigmoid", knobs="floats")]
    for link in ("mapo", "dpo_sigmoid"):
        found += [Case(link, p, t, shared) for p, t in dtypes for shared in (True, False)]
        found += [
            Case(link, "fp32", "bf16", layout=each) for each in ("wide", "channels_last", "halves")
        ]
        found += [Case(link, "bf16", "bf16", mask="bool"), Case(link, huber=True)]
    found += [Case("dpo_sigmoid", "fp32", "fp32", ref="bf16")]
    found += [Case("dpo_sigmoid", "fp32", "fp32", ref="errors")]
    return list(dict.fromkeys(found))


def turns(targets: list[str], in_turn: bool) -> Iterator[list[str]]:
    """The targets of each case: all, or one, a backend for every second and its GPUs in turn. As
    cases come in pairs, like a link without knobs and with, the first of a pair takes turns, too:
    each link goes to both backends."""
    if not in_turn:
        yield from itertools.repeat(targets)
    kinds = {TARGETS[name].backend: None for name in targets}
    of_kind = [itertools.cycle([n for n in targets if TARGETS[n].backend == k]) for k in kinds]
    for i in itertools.count():
        yield [next(of_kind[(i + i // 2) % len(of_kind)])]


def rows(targets: list[str], in_turn: bool = False) -> Iterator[dict[str, Any]]:
    """The backward kernel knows neither link nor knobs nor reference: once for each other case."""
    seen = set()
    for case, targets_of_case in zip(cases(), turns(targets, in_turn), strict=False):
        fwd, bwd = recorders(case)
        backward = case._replace(link="", ref="", knobs="")
        both = (fwd,) if backward in seen else (fwd, bwd)
        seen.add(backward)
        for recorder in both:
            for name in targets_of_case:
                yield case._asdict() | {"of_target": case.target} | compiled(recorder, name)


class Family(NamedTuple):
    """A training step of a loss beyond pairs of errors, or of a pair with something around it.
    step: of a sampler, whose numbers are tensors. anchor: with one. logged: with log-probabilities
    in place of predictions. shared, shared_pred: one target, or one prediction, for a group."""

    link: Link | Group
    around: Around = NOTHING_AROUND
    lengths: bool = False
    huber: bool = False
    shared: bool = False
    dtype: str = "fp32"
    step: bool = False
    anchor: bool = False
    logged: bool = False
    shared_pred: bool = False


def families() -> dict[str, Family]:
    dpo = LINKS["dpo_sigmoid"]
    numbers = torch.ones(2)
    every: list[Group] = [
        *groups.KTO.values(), *groups.KTO_GIVEN_KL.values(), groups.DDO, groups.TGO, groups.DSPO,
        *(links[k] for k in (2, 4, 8, 16) for links in (groups.RANKDPO, groups.PLACKETT_LUCE)),
    ]  # fmt: skip
    found = {link.name: Family(link) for link in every}
    return found | {
        "kto, bf16": Family(groups.KTO["kto"], dtype="bf16"),
        "kto, weights and dro": Family(groups.KTO["kto"], Around(weight=numbers, heat=1.0)),
        "rankdpo_4, lengths": Family(groups.RANKDPO[4], lengths=True),
        "rankdpo_4, one target, bf16": Family(groups.RANKDPO[4], shared=True, dtype="bf16"),
        "rankdpo_4, huber": Family(groups.RANKDPO[4], huber=True),
        "dspo, one target": Family(groups.DSPO, shared=True),
        "pair_errors": Family(groups.ERRORS),
        "safeguard of the batch": Family(dpo, Around("batch", 0.9)),
        "safeguard of pairs": Family(dpo, Around("pair", numbers)),
        "loser's gradient": Family(dpo, Around("given", 0.5)),
        "anchor": Family(dpo, Around(drift_weight=0.5)),
        "dro": Family(dpo, Around(heat=1.0)),
        "dro, anchor and safeguard": Family(dpo, Around("batch", 0.9, 0.5, heat=numbers[0])),
        "huber of samples": Family(dpo, huber=True),
    } | dict(step_families())  # fmt: skip


def step_families() -> Iterator[tuple[str, Family]]:
    """Those with an anchor stand for those without, which have less of everything."""
    for _, link in (*steps.GRPO.values(), *steps.NFT.values(), steps.GRPO_OF_LOG):
        logged, is_step = link in steps.GRPO_OF_LOG, not link.name.startswith("nft")
        yield link.name, Family(link, step=is_step, anchor=True, logged=logged)
    for link in (steps.STEP_DPO[1], steps.SDPO):
        yield link.name, Family(link, step=True)
    for link in (steps.STEP_DPO_OF_LOG[1], steps.SDPO_OF_LOG):
        yield link.name, Family(link, step=True, logged=True)
    bf16: dict[str, Any] = {"step": True, "dtype": "bf16"}
    yield "grpo, bf16", Family(steps.GRPO["clip"][0], **bf16)
    yield "step_dpo, one prediction, bf16", Family(steps.STEP_DPO[1], **bf16, shared_pred=True)


def stepped(family: Family) -> tuple[Recorder, Recorder]:
    """The launches of one training step on two groups of 4x64x64 latents."""
    link, members = family.link, family.link.members
    every = torch.zeros(2 * members, 4, 64, 64, dtype=DTYPES[family.dtype])
    pred = torch.zeros_like(every[: 2 if family.shared_pred else None])
    target = torch.zeros_like(every[: 2 if family.shared else None])
    huber = torch.ones(2 * members) if family.huber else None
    lengths = torch.full((2,), members) if family.lengths else None
    number = torch.ones(2) if family.step else 1.0
    scalars: list[float | torch.Tensor] = [number] * len(link.hyper)
    if isinstance(link, Group):
        scalars += [torch.ones(2, members) for _ in link.of_members]
    more = launch.More(around=family.around, lengths=lengths)
    if family.step:
        more = more._replace(base=(torch.zeros_like(pred), None), affine=(number, number))
    if family.anchor:
        more = more._replace(anchor=(torch.zeros_like(pred), None))
    if family.shared_pred:
        more = more._replace(n_groups=2)
    given = ((pred, None), (target, None))
    ref: launch.Operand = (torch.zeros_like(pred), None)
    if family.logged:
        ref = (torch.zeros(2 * members), None)
    each = link is groups.ERRORS
    with recorded() as both, unplanned():
        loss, stats = launch.pair_forward(
            link, scalars, *given, ref, huber_c=huber, reduction="none" if each else "mean",
            more=more,
        )  # fmt: skip
        grad = torch.ones(members, 2) if each else loss
        drift, _ = sums_of(link, family.around.guard, family.around.drift_weight is not None)
        of_drift = ref if drift else launch.ABSENT
        launch.pair_backward(grad, stats, *given, huber_c=huber, link=link, ref=of_drift, more=more)
    return both


def group_rows(targets: list[str], in_turn: bool = False) -> Iterator[dict[str, Any]]:
    """What `families` has, and the links of tests/kernels/test_engine.py; a backward kernel is
    compiled once."""
    sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels"))
    import test_engine  # which needs pytest

    test_engine.SHAPE = (4, 1024)  # as wide as loads can be
    made = {name: stepped(family) for name, family in families().items()}
    for make in test_engine.CASES:
        case = make()
        given = test_engine.Tensors(*[each.float() for each in case.tensors])
        with recorded() as both, unplanned():
            test_engine.launched(case, given, torch.ones(()))
        made[make.__name__] = both
    seen = set()
    for (link, both), targets_of_link in zip(made.items(), turns(targets, in_turn), strict=False):
        for recorder, name in itertools.product(both, targets_of_link):
            what = str(specialized(recorder, TARGETS["sm_90"])), name * (not in_turn)
            if what not in seen:
                seen.add(what)
                yield {"link": link} | compiled(recorder, name)


def buckets() -> Iterator[tuple[int, int, int]]:
    """Pairs, height and width of latents: ten of SDXL's buckets in five batch sizes."""
    for pairs in (1, 2, 3, 16, 17):
        for size in range(64, 104, 4):
            yield pairs, size, 168 - size


def specializations(*links: str) -> set[tuple[str, ...]]:
    """What the jit would compile, forward and backward, for all `buckets`, once each; for sm_90."""
    seen = set()
    for (pairs, height, width), link in itertools.product(buckets(), links):
        pred = torch.empty(2 * pairs, 4, height, width)
        target = torch.empty(pairs, 4, height, width)
        ref = torch.empty_like(pred) if LINKS[link].score.needs_ref else None
        values = [0.1 * height] * len(LINKS[link].hyper)
        preds, targets = (pred, None), (target, None)
        with recorded() as both:
            loss, stats = launch.pair_forward(LINKS[link], values, preds, targets, (ref, None))
            launch.pair_backward(loss, stats, preds, targets)
        for each in both:
            made = specialized(each, TARGETS["sm_90"])
            seen.add((each.kernel.__name__, *map(str, made)))
    return seen


def calls() -> Iterator[tuple[Any, ...]]:
    """Arguments of pair_forward and a gradient of its loss, each plain or not, as chance has it."""
    rng = random.Random(0)

    def plainly() -> bool:
        return rng.random() < 0.85

    def tensor(*shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        n, offset = math.prod(shape), 0 if plainly() else 1  # off the 16 bytes
        dtype = dtype or (torch.float32 if plainly() else torch.bfloat16)
        made = torch.zeros(2 * n + offset, dtype=dtype)
        if plainly():
            return made[offset : offset + n].view(shape)
        return made[offset:].view(*shape, 2)[..., 0]

    def number(n_pairs: int) -> torch.Tensor:
        return rng.choice((tensor(1)[0], tensor(n_pairs), tensor(1).expand(n_pairs)))

    for _ in range(3000):
        link = "mapo" if plainly() else "dpo_sigmoid"
        shape = (2, 16) if plainly() else (4, 3, 5)
        both = (2 * shape[0], *shape[1:])
        pred: launch.Operand = (tensor(*both), None)
        if not plainly():
            pred = (tensor(*shape), tensor(*shape))
        target: launch.Operand = (tensor(*(shape if plainly() else both)), None)
        if not plainly():
            target = (tensor(*shape), tensor(*shape))
        ref = launch.ABSENT
        if link == "dpo_sigmoid":
            ref = (tensor(*(both if plainly() else both[:1])), None)
        mask = launch.ABSENT
        if not plainly():
            mask = (tensor(*shape, dtype=rng.choice((torch.bool, torch.float32))), None)
        scalars: list[float | torch.Tensor] = [0.5 if plainly() else 16] * len(LINKS[link].hyper)
        if not plainly():
            scalars[-1] = number(shape[0])
        if not plainly():
            scalars += [0.5] * len(KNOBS)
        huber = None if plainly() else rng.choice((0.1, 1, 16, tensor(1)[0]))
        grad = tensor(1)[0] if plainly() else number(shape[0])
        yield link, scalars, pred, target, ref, mask, not plainly(), huber, grad


def signatures() -> tuple[int, int]:
    """How many launches `calls` makes that a plan and `_signature` tell apart, and how many the jit
    does; raises where the jit would compile one of the former twice."""
    seen: dict[Any, str] = {}
    plans = []

    def told(
        kernel: Any, plan: Any, device: Any, pointers: Any, numbers: Any, tensors: Any,
        strides: Any = (),
    ) -> None:  # fmt: skip
        plans.append(plan)  # as long as it lives, its id is its own
        key = (id(plan), *launch._signature(device, launch._flat((*pointers, tensors)), strides))
        ticket = (torch.zeros(1, dtype=torch.int32),) * plan.ticket
        options = {"plan": plan, "pointers": pointers}
        kernel[plan.grid](*pointers, *ticket, *numbers, *plan.arguments, **options)
        made = str(specialized(kernel, TARGETS["sm_90"]))
        assert seen.setdefault(key, made) == made, (key, seen[key], made)

    with recorded(), mock.patch.object(launch, "_launch", told):
        for link, scalars, pred, target, ref, mask, swap, huber, grad in calls():
            _, stats = launch.pair_forward(
                LINKS[link], scalars, pred, target, ref, mask, swap, huber
            )
            needed = (True, pred[1] is None or swap)
            launch.pair_backward(grad, stats, pred, target, mask, huber, needed)
    return len(seen), len(set(seen.values()))


if __name__ == "__main__":
    made = group_rows if "--groups" in sys.argv else rows
    names = [name for name in sys.argv[1:] if name in TARGETS] or list(TARGETS)
    for row in made(names, "--in_turn" in sys.argv):
        print(json.dumps(row), flush=True)
