"""What a call costs, counted: launches, elements read, other work on the device, compilations."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastpref
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
def counted(monkeypatch: pytest.MonkeyPatch) -> tuple[Counting, Counting]:
    both = Counting(pair.pair_fwd), Counting(pair.pair_bwd)
    monkeypatch.setattr(pair, "pair_fwd", both[0])
    monkeypatch.setattr(pair, "pair_bwd", both[1])
    return both


LAYOUTS = {
    "dense": lambda t: t,
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "sliced": lambda t: torch.cat([t, t], dim=-1)[..., : t.shape[-1]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("n_elements", [7, 5000])
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
    sums, rows = (2, 5) if ref is None else (6, 7)
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
    """Triton launches where the process stands: if that is elsewhere, it moves, and back."""
    visited: list[str] = []

    @contextlib.contextmanager
    def moved(index: int) -> Iterator[None]:
        visited.append(f"to {index}")
        yield
        visited.append("back")

    module = SimpleNamespace(current_device=lambda: 0, device=moved)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    for index in (0, 1):
        with launch._current(torch.device("cuda", index)):
            visited.append(f"launch for {index}")
    assert visited == ["launch for 0", "to 1", "launch for 1", "back"]


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
    """Writes down every torch op that reaches a device."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


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
    pred = torch.randn(4, 4, 8, 8, device=device, requires_grad=True)
    target = torch.randn(2, 4, 8, 8, device=device)
    beta = torch.tensor(0.1, device=device)
    given: dict[str, Any] = {"beta": beta}
    if name == "npo":
        given |= {"ref_pred": torch.randn_like(pred), "mask": target[:, :1] > 0}
        given |= {"logit_scale": target[:, 0, 0, 0], "loser_weight": pred.detach()[:2, 0, 0, 0]}
    with Recorded() as recorded:
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


def test_50_shapes_compile_one_kernel() -> None:
    """Heights, widths and batch sizes of SDXL's buckets make no difference to the compiler."""
    script = 'import aot; print(len(aot.specializations("mapo", "dpo_sigmoid")))'
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(Path(__file__).parent)
    command = [sys.executable, "-W", "ignore", "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr[-4000:]
    assert int(result.stdout) == 3  # one forward for each link, one backward for both
