"""What a call costs, counted: launches, elements read, other work on the device, compilations."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

import covering
import fastpref
from aot import unplanned
from fastpref import batch, dispatch, ops, scalars
from fastpref_kernels import KNOBS, LINKS, launch, pair

interpreted = pytest.mark.skipif(not launch.INTERPRETED, reason="counts in the interpreter")


class Counting:
    """Passes launches on to a kernel and counts them."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.launches += 1
        return self.kernel[grid]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Counting, Counting]]:
    both = Counting(pair.pair_fwd), Counting(pair.pair_bwd)
    monkeypatch.setattr(pair, "pair_fwd", both[0])
    monkeypatch.setattr(pair, "pair_bwd", both[1])
    with unplanned():  # else a GPU's kernels are launched without asking these
        yield both


LAYOUTS = {
    "dense": lambda t: t,
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "sliced": lambda t: torch.cat([t, t], dim=-1)[..., : t.shape[-1]],
}


# Of one program a sample and of many; how many there are, a layout does not change.
@pytest.mark.parametrize(
    ("n_elements", "stacked", "layout"),
    covering.product(
        [7, 5000],
        [True, False],
        [*LAYOUTS],
        fast=lambda n_elements, stacked, layout: n_elements == 7 or stacked == (layout == "dense"),
    ),
)
def test_one_launch_forward_and_one_backward(
    layout: str,
    stacked: bool,
    n_elements: int,
    counted: tuple[Counting, Counting],
    device: torch.device,
) -> None:
    pred = LAYOUTS[layout](torch.randn(4, 2, 3, n_elements, device=device)).requires_grad_()
    target = torch.randn(4, 2, 3, n_elements, device=device)
    halves = pred if stacked else (pred[:2], pred[2:])
    out = fastpref.mapo_loss(halves, target, impl="triton")
    assert [kernel.launches for kernel in counted] == [1, 0]
    out.loss.backward()
    assert [kernel.launches for kernel in counted] == [1, 1]


def hyper(link: str) -> dict[str, float]:
    """Those that must be given."""
    return {name: 0.3 for name, h in LINKS[link].hyper.items() if h.default is None}


@pytest.mark.parametrize("link", LINKS)
def test_one_launch_forward_and_one_backward_for_every_link(
    link: str, counted: tuple[Counting, Counting], device: torch.device
) -> None:
    """With all knobs set, too: they are in the kernel, and not around it."""
    pred = torch.randn(4, 3, 5, 6, device=device, requires_grad=True)
    target = torch.randn(2, 3, 5, 6, device=device)
    knobs: dict[str, Any] = {name: torch.rand(2, device=device) / 4 for name in KNOBS}
    knobs["sample_weight"] = knobs.pop("sample_weight_w"), knobs.pop("sample_weight_l")
    knobs["mask"] = torch.rand(2, 1, 5, 6, device=device)
    given = {"ref_pred": torch.randn_like(pred)} if LINKS[link].score.needs_ref else {}
    for n, extra in enumerate(({}, knobs), start=1):
        options: dict[str, Any] = {"link": link, "impl": "triton", **hyper(link), **given, **extra}
        out = fastpref.pair_loss(pred, target, **options)
        out.loss.backward()
        assert [kernel.launches for kernel in counted] == [n, n]


@pytest.fixture
def accesses(monkeypatch: pytest.MonkeyPatch) -> dict[str, Counter[int]]:
    """How often the interpreter loads from and stores to each address."""
    from triton.runtime.interpreter import InterpreterBuilder

    seen: dict[str, Counter[int]] = {"load": Counter(), "store": Counter()}
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        seen["load"].update(ptrs.data[mask.data.astype(bool)].reshape(-1).tolist())
        return load(self, ptrs, mask, *rest)

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        seen["store"].update(ptrs.data[mask.data.astype(bool)].reshape(-1).tolist())
        return store(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", masked_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", masked_store)
    return seen


def times(seen: Counter[int], tensor: Tensor) -> set[int]:
    """How often the elements of a tensor were touched; {1} is once each."""
    offsets = torch.zeros(tensor.shape, dtype=torch.int64)
    for size, stride, dim in zip(tensor.shape, tensor.stride(), range(tensor.dim()), strict=True):
        shape = [-1 if d == dim else 1 for d in range(tensor.dim())]
        offsets += (torch.arange(size) * stride).reshape(shape)
    start, step = tensor.data_ptr(), tensor.element_size()
    return {seen[start + step * offset] for offset in offsets.flatten().tolist()}


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("link", ["mapo", "dpo_sigmoid"])
def test_every_element_is_read_once(
    link: str, layout: str, shared: bool, accesses: dict[str, Counter[int]]
) -> None:
    """Forward and backward each read predictions and targets once, the forward the reference, too;
    the gradient is written once, and nothing else is touched but a few scalars."""
    pred = LAYOUTS[layout](torch.randn(4, 3, 11, 50)).requires_grad_()
    target = torch.randn(2 if shared else 4, 3, 11, 50)
    ref = torch.randn(4, 3, 11, 50) if link == "dpo_sigmoid" else None
    out = fastpref.pair_loss(pred, target, ref, link=link, impl="triton")
    elements = pred.numel() + target.numel()
    assert times(accesses["load"], pred) == {1}
    assert times(accesses["load"], target) == {1}
    if ref is not None:
        assert times(accesses["load"], ref) == {1}
    n_programs = 2 * launch._programs(2, pred[0].numel())
    sums, rows = (2, 5) if ref is None else (6, 9)
    read = elements + (0 if ref is None else ref.numel())
    assert accesses["load"].total() == read + sums * n_programs  # and the partial sums
    assert accesses["store"].total() == sums * n_programs + rows * 2 + 1 + 1  # stats, loss, ticket
    for seen in accesses.values():
        seen.clear()
    (grad,) = torch.autograd.grad(out.loss, pred)
    assert times(accesses["load"], pred) == {1}
    assert times(accesses["load"], target) == {1}
    assert times(accesses["store"], grad) == {1}
    assert accesses["load"].total() == elements + 3 * n_programs  # grad_loss and two slopes
    assert accesses["store"].total() == grad.numel()


def test_a_launch_makes_the_tensors_device_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches, and captures are asked about, where the process stands: if that is
    elsewhere, it moves, and back."""
    visited: list[str] = []
    here = [0]

    @contextlib.contextmanager
    def moved(index: int) -> Iterator[None]:
        visited.append(f"to {index}")
        here.append(index)
        yield
        here.pop()
        visited.append("back")

    module = SimpleNamespace(current_device=lambda: here[-1], device=moved)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)

    def ticket(device: torch.device) -> None:
        visited.append(f"ticket of {device.index}")

    monkeypatch.setattr(launch, "_ticket", ticket)
    plan = launch.Plan((1, 1, 1), (), {}, scattered=False, n_groups=1, members=2, ticket=True)
    for index in (0, 1):
        kernel = {(1, 1, 1): lambda t, i, **options: visited.append(f"launch for {i}")}
        launch._launch(kernel, plan, torch.device("cuda", index), (), (index,), ())
    here_then_there = ["ticket of 0", "launch for 0", "to 1", "ticket of 1", "launch for 1", "back"]
    assert visited == here_then_there


def test_tickets(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each stream of each device and for each captured launch, never two at a time; a new
    slab when one is used up, but not during a capture, which clears a counter of its own."""
    now = {"stream": 7, "capturing": False}
    zeros = torch.zeros
    monkeypatch.setattr(launch, "_stream", lambda device: now["stream"])
    monkeypatch.setattr(launch, "_capturing", lambda device: now["capturing"])
    monkeypatch.setattr(launch, "_new_slab", lambda device: zeros(16, dtype=torch.int32))
    monkeypatch.setattr(torch, "zeros", lambda n, dtype, device: zeros(n, dtype=dtype))
    for state in (launch._tickets, launch._spare, launch._slabs):
        monkeypatch.setattr(launch, state_name(state), type(state)())

    def ticket(stream: int, capturing: bool = False, index: int = 0) -> int:
        now.update(stream=stream, capturing=capturing)
        found = launch._ticket(torch.device("cuda", index))
        assert found.tolist() == [0]
        assert found.storage_offset() % 4 == 0  # 16 bytes: else the jit would compile once more
        kept.append(found)
        return found.data_ptr()

    kept: list[Tensor] = []
    cold = ticket(7, capturing=True)  # nothing is there yet
    assert not launch._slabs
    a, b = ticket(7), ticket(8)
    captured = {ticket(7, capturing=True) for _ in range(2)}
    assert ticket(7) == a
    assert ticket(8) == b
    assert len({cold, a, b, *captured}) == 5
    assert len(launch._slabs) == 1
    beyond = ticket(8, capturing=True)  # the slab's four are gone
    assert len(launch._slabs) == 1
    assert len({beyond, ticket(9), a, b, *captured}) == 6
    assert len(launch._slabs) == 2
    assert ticket(7, index=1) != a
    assert len(launch._slabs) == 3


def state_name(state: object) -> str:
    return next(name for name, value in vars(launch).items() if value is state)


class Recorded(TorchDispatchMode):
    """Writes down every torch op that reaches a device; a plan is made of tensors on none."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not (isinstance(result, Tensor) and result.is_meta):
            self.ops.append(func.overloadpacket.__name__)
        return result


@pytest.mark.parametrize("name", ["mapo", "npo"])
def test_nothing_else_runs_on_the_device(
    name: str, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Beside the two launches, only memory is asked for and views are made: no memset, no copy, no
    sync. Left out here are the launches, and the ticket, which is there from the first call on."""

    class Nothing:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **kwargs: None

    ticket = torch.zeros(1, dtype=torch.int32, device=device)
    monkeypatch.setattr(pair, "pair_fwd", Nothing())
    monkeypatch.setattr(pair, "pair_bwd", Nothing())
    monkeypatch.setattr(launch, "_ticket", lambda device: ticket)
    monkeypatch.setattr(ops, "intercepted", lambda *tensors: False)  # despite the mode that records
    real = batch.check_pairs
    monkeypatch.setattr(
        dispatch, "check_pairs", lambda *given: real(*given)._replace(intercepted=False)
    )
    pred = torch.randn(4, 4, 8, 8, device=device, requires_grad=True)
    target = torch.randn(2, 4, 8, 8, device=device)
    beta = torch.tensor(0.1, device=device)
    given: dict[str, Any] = {"beta": beta}
    if name == "npo":
        given |= {"ref_pred": torch.randn_like(pred), "mask": target[:, :1] > 0}
        given |= {"logit_scale": target[:, 0, 0, 0], "loser_weight": pred.detach()[:2, 0, 0, 0]}
    with unplanned(), Recorded() as recorded:
        out = getattr(fastpref, f"{name}_loss")(pred, target, impl="triton", **given)
        torch.autograd.grad(out.loss, pred, grad_outputs=beta)
    views = {"slice", "unbind", "select", "detach", "view", "alias", "expand"}
    assert set(recorded.ops) - views == {"empty", "empty_like"}
    assert recorded.ops.count("empty") == 3  # loss, stats, partial sums
    assert recorded.ops.count("empty_like") == 1  # the gradient


def test_the_loss_keeps_no_memory_but_the_inputs(device: torch.device) -> None:
    """What autograd holds on to: prediction, target, and the stats of the pairs."""
    pred = torch.randn(4, 4, 8, 8, device=device, requires_grad=True)
    target = torch.randn(2, 4, 8, 8, device=device)
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fastpref.mapo_loss(pred, target, impl="triton")
    storages = {t.data_ptr() for t in held} - {pred.data_ptr(), target.data_ptr()}
    extra = sum(t.nbytes for t in held if t.data_ptr() in storages)
    assert extra == 5 * 2 * 4


@pytest.mark.parametrize("n_pairs", [1, 3, 700, 5000])
@pytest.mark.parametrize("n_elements", [1, 1000, 65536, 7_603_200])
def test_programs_share_the_work_evenly(n_pairs: int, n_elements: int) -> None:
    programs, blocks = launch._programs(n_pairs, n_elements), -(-n_elements // launch.BLOCK)
    assert 1 <= programs <= blocks
    assert programs * n_pairs <= max(launch.MAX_PROGRAMS, n_pairs)
    rounds = -(-blocks // programs)
    assert rounds == -(-blocks // min(blocks, max(1, launch.MAX_PROGRAMS // n_pairs)))


@pytest.mark.parametrize("name", ["mapo", "npo"])
def test_the_next_step_works_nothing_out_again(name: str, device: torch.device) -> None:
    """What follows from sizes, strides and numbers that came before is found, not worked out; new
    sizes, strides and numbers are looked at."""
    ours = (str(Path(fastpref.__file__).parent), launch.__file__)
    called: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(ours):
            called.append(frame.f_code.co_name)

    def step(width: int, beta: float, layout: str = "dense") -> Counter[str]:
        pred = LAYOUTS[layout](torch.randn(4, 4, 8, width, device=device)).requires_grad_()
        target = torch.randn(2, 4, 8, width, device=device)
        ref = (torch.randn_like(pred),) if name == "npo" else ()
        called.clear()
        sys.setprofile(note)
        try:
            out = getattr(fastpref, f"{name}_loss")(pred, target, *ref, beta=beta, impl="triton")
            torch.autograd.grad(out.loss, pred)
        finally:
            sys.setprofile(None)
        return Counter(called)

    for found in (launch._plan_forward, launch._plan_backward, scalars._check_plain):
        found.cache_clear()  # what other tests have left
    number, plans = "check_scalar", ("_plan_forward", "_plan_backward")
    everything = {number, *plans}
    assert step(9, 0.125).keys() & everything == everything
    again = step(9, 0.125)
    assert not again.keys() & {*everything, "_layout", "_operand"}
    assert again.total() < 50
    assert step(9, 0.25).keys() & everything == {number}
    assert step(9, 0.25, "channels_last").keys() & everything == {*plans}
    assert step(11, 0.25).keys() & everything == {*plans}


def without_interpreter(script: str) -> str:
    """What `script` prints in a process whose kernels are the jit's."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(Path(__file__).resolve().parents[1] / "helpers")
    command = [sys.executable, "-W", "ignore", "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def test_50_shapes_compile_one_kernel() -> None:
    """Heights, widths and batch sizes of SDXL's buckets make no difference to the compiler."""
    found = without_interpreter(
        'import aot; print(len(aot.specializations("mapo", "dpo_sigmoid")))'
    )
    assert int(found) == 3  # one forward for each link, one backward for both


def test_launchers_tell_apart_what_the_jit_does() -> None:
    """A compiled kernel is launched again only where the jit would have found just that one."""
    told_apart, compiled = map(
        int, without_interpreter("import aot; print(*aot.signatures())").split()
    )
    assert told_apart > compiled > 100


@pytest.mark.parametrize(
    ("pred", "target", "layout", "threads"),
    [
        (torch.float32, torch.float32, "dense", 256),
        (torch.float32, torch.bfloat16, "dense", 256),
        (torch.bfloat16, torch.float32, "dense", 256),
        (torch.bfloat16, torch.float16, "dense", 128),
        (torch.bfloat16, torch.float16, "channels_last", 256),
    ],
)
def test_a_thread_has_one_vector_of_the_widest_operand(
    pred: torch.dtype, target: torch.dtype, layout: str, threads: int
) -> None:
    """Forward and backward, on NVIDIA with a bound for its registers."""
    asked: list[dict[str, int]] = []

    def note(kernel: Any, plan: Any, device: Any, pointers: Any, *rest: Any) -> None:
        nvidia = GPUTarget("cuda", 90, 32), GPUTarget("cuda", 120, 32)
        asked.extend(launch._options(plan, pointers, each) for each in nvidia)
        amd = launch._options(plan, pointers, GPUTarget("hip", "gfx942", 64))
        assert amd == {"num_warps": threads // 64}

    preds = (LAYOUTS[layout](torch.zeros(4, 3, 5, 6, dtype=pred)), None)
    targets = (torch.zeros(2, 3, 5, 6, dtype=target), None)
    masks = (torch.zeros(2, 1, 5, 6, dtype=torch.bool).expand(2, 3, 5, 6), None)
    with mock.patch.object(launch, "_launch", note):
        for mask in (launch.ABSENT, masks):
            loss, stats = launch.pair_forward(
                LINKS["mapo"], [0.5, 1.0, 1.0], preds, targets, mask=mask
            )
            launch.pair_backward(loss, stats, preds, targets, mask)
    assert {options["num_warps"] for options in asked} == {threads // 32}
    most = {128} if layout == "channels_last" else {64, 80}
    assert {options["maxnreg"] for options in asked} == most


class Compiled(CompiledKernel):
    """What a launch by the jit returns."""

    module = None

    def __init__(self, launched: list[tuple[Any, ...]]) -> None:
        self.launched = launched

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.launched.append((grid, *args))


def test_a_kernel_that_was_compiled_is_launched_without_the_jit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the same arguments; the jit is asked again for other dtypes, alignments and devices."""
    by_jit: list[tuple[Any, ...]] = []
    direct: list[tuple[Any, ...]] = []

    class Jit:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def run(*args: Any, **options: int) -> Compiled:
                by_jit.append((grid, *args))
                return Compiled(direct)

            return run

    here = [0]
    module = SimpleNamespace(current_device=lambda: here[0])
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    plan = launch.Plan((6, 1, 1), (2, "stacked"), {}, scattered=False, n_groups=6, members=2)

    def run(tensor: Tensor, beta: float | Tensor) -> None:
        values, tensors, strides = launch._scalars([0.5, beta])
        device = torch.device("cuda", here[0])
        numbers = (values, tensors, strides)
        launch._launch(Jit(), plan, device, (tensor, None), numbers, tensors, strides)

    memory = torch.zeros(64)
    for _ in range(3):
        run(memory[:8], 0.25)
    run(memory[4:], 0.75)  # 16 bytes on
    assert [len(by_jit), len(direct)] == [1, 3]
    assert all(call[0] == (6, 1, 1) and len(call) == 8 for call in by_jit + direct)
    assert direct[-1][1].data_ptr() == memory[4:].data_ptr()
    assert direct[-1][2:] == (None, (0.5, 0.75), (None, None), (0, 0), 2, "stacked")
    others: list[tuple[Tensor, float | Tensor]] = [(memory[1:], 0.25), (memory.half(), 0.25)]
    others += [
        (memory, memory[0]),
        (memory, memory[1]),
        (memory, memory[:3]),
        (memory, memory[::16]),
    ]
    for i, other in enumerate(others, start=2):
        run(*other)
        run(*other)
        assert [len(by_jit), len(direct)] == [i, i + 2]
    here[0] = 1
    run(memory, 0.25)
    assert len(by_jit) == len(others) + 2
    monkeypatch.setattr(torch.version, "hip", "6.4")  # there the jit looks at more
    run(memory, 0.25)
    assert len(by_jit) == len(others) + 3
