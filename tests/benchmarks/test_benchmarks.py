"""The benchmarks of the loss: that they time what they say, wherever they run.

Where there is no GPU, stand-ins take the place of what torch.cuda has: what is captured runs, a
replay takes a while by a clock of its own, and the order of everything is written down.
"""

from __future__ import annotations

import contextlib
import csv
import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import bench_loss
import cases
import choices
import covering
import floors
import report
import timing
from cases import Case
from fastpref_kernels import launch

ROOT = Path(__file__).resolve().parents[2]
L2 = 2**16
FIRST_OF_KIND = {family.kind: link for link, family in reversed(cases.FAMILIES.items())}.values()
REPLAY_MS = 8.0


class StandIn:
    """What of torch.cuda the benchmarks use, on a CPU."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.now = 0.0
        self.capturing = False
        stand_in = self

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                assert enable_timing

            def record(self) -> None:
                stand_in.log.append("event")
                self.at = stand_in.now

            def elapsed_time(self, end: Event) -> float:
                return end.at - self.at

        class Graph:
            def replay(self) -> None:
                assert not stand_in.capturing
                stand_in.log.append("replay")
                stand_in.now += REPLAY_MS

        class Stream:
            def wait_stream(self, other: Stream) -> None: ...

        @contextlib.contextmanager
        def graph(captured: Graph, stream: Stream) -> Iterator[None]:
            stand_in.log.append("capture")
            stand_in.capturing = True
            yield
            stand_in.capturing = False

        self.stream = Stream()
        self.parts: dict[str, Any] = {
            "Event": Event,
            "CUDAGraph": Graph,
            "Stream": lambda: self.stream,
            "graph": graph,
            "stream": lambda stream: contextlib.nullcontext(),
            "current_stream": Stream,
            "current_device": lambda: 0,
            "synchronize": lambda: None,
            "empty_cache": lambda: None,
            "_sleep": lambda cycles: self.log.append("sleep"),
            "get_device_name": lambda: "Stand-in 1",
            "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=L2),
            "memory_allocated": lambda: 1000,
            "max_memory_allocated": lambda: 2**20,
            "reset_peak_memory_stats": lambda: None,
        }


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn | None]:
    """A stand-in, or None where a GPU is used."""
    cached = (timing.l2_bytes, timing._stream, timing._ballast)
    stand_in = None
    if not torch.cuda.is_available():
        stand_in = StandIn()
        for name, part in stand_in.parts.items():
            monkeypatch.setattr(torch.cuda, name, part)
        for module in (cases, bench_loss, choices):
            monkeypatch.setattr(module, "GPU", True)
        monkeypatch.setattr(launch, "_spare", {})
        monkeypatch.setattr(launch, "_slabs", [])
        monkeypatch.setattr(launch, "_new_slab", lambda device: torch.zeros(4 * 100))
        monkeypatch.setattr(timing, "COPIED", 2**12)
        for function in cached:
            function.cache_clear()
    yield stand_in
    if stand_in:
        for function in cached:
            function.cache_clear()


only_stand_in = pytest.mark.skipif(torch.cuda.is_available(), reason="about the stand-in's log")


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# Rows


# All are measured alike: one of each kind.
@pytest.mark.parametrize("few", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_rows_of_a_gpu(
    few: bool, gpu: StandIn | None, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Every column of every provider, the floor's too, in a file that report.py draws."""
    if few:
        kept = {link: cases.FAMILIES[link] for link in FIRST_OF_KIND}
        monkeypatch.setattr(cases, "FAMILIES", kept)
        monkeypatch.setattr(bench_loss, "FAMILIES", kept)
    words = ["--preset", "headline", "--shapes", "tiny", "--dtypes", "fp32,bf16", "--rounds", "2"]
    words += ["--providers", "eager", "fastpref", "floor", "--stacked", "--families", "tiny"]
    assert bench_loss.main([*words, "--output_dir", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.csv")
    rows = table(path)
    providers = ["eager", "fastpref", "floor"]
    links = [*cases.PUBLISHED, *cases.FAMILIES]
    assert [row["provider"] for row in rows] == providers * (len(links) + 2)
    assert [row["link"] for row in rows[::3]] == [*links, *cases.PUBLISHED]
    assert [row["shared"] for row in rows[::3] if row["family"] == "pairs"] == (
        ["True"] * 2 + ["False"] * 2
    )  # fmt: skip
    unmeasured = {"wall_us", "wall_us_p20", "wall_us_p80", "extra_bytes"}
    for row in rows:
        empty = {name for name, value in row.items() if value == ""} - {"git"}
        assert empty == (unmeasured if row["provider"] == "floor" else set()), row
        if gpu:
            case = Case(row["link"], "tiny", 4, "fp32", "bf16", row["shared"] == "True")
            steps = timing.copies(min(case.bytes_moved()))[0]
            for column in ("fwd_us", "bwd_us", "device_us"):
                assert float(row[column]) == pytest.approx(1e3 * REPLAY_MS / steps, abs=0.01)
    again = [*words, "--skip_measured", "--output_dir", str(tmp_path)]
    assert bench_loss.main(again) == 0
    assert table(path) == rows
    capsys.readouterr()
    report.main([str(tmp_path)])
    shown = capsys.readouterr().out
    assert shown.count("fastpref / launches that only move memory, mapo tiny 4 fp32,bf16") == 2
    assert "extra bytes, most" in shown
    assert path.with_suffix(".png").exists() or "matplotlib is not installed" in shown


def test_what_fails_is_told_and_the_rest_is_measured(
    gpu: StandIn | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def wrong(*tensors: Tensor) -> Tensor:
        return cases.published_mapo(*tensors) * 1.1

    def broken(*tensors: Tensor) -> Tensor:
        raise RuntimeError("no such kernel")

    def passes(loss: Any, sets: Any) -> Any:
        if loss is cases.published_mapo:
            raise RuntimeError("cannot be captured")
        return real(loss, sets)

    real = bench_loss.passes
    made = {"eager": cases.published_mapo, "compile": wrong, "reduce-overhead": broken}
    made |= {"fastpref": cases.fused("mapo")}
    monkeypatch.setattr(bench_loss, "providers", lambda link, names: made)
    monkeypatch.setattr(bench_loss, "passes", passes)
    words = ["--shapes", "tiny", "--pairs", "1", "--dtypes", "fp32,bf16", "--rounds", "1"]
    words += ["--links", "mapo", "--families", "--output_dir", str(tmp_path)]
    assert bench_loss.main(words) == 1
    (path,) = tmp_path.glob("*.csv")
    rows = {row["provider"]: row for row in table(path)}
    assert list(rows) == ["eager", "fastpref", "floor"]
    assert rows["eager"]["fwd_us"] == "" != rows["eager"]["wall_us"]
    assert rows["fastpref"]["fwd_us"] != ""
    said = capsys.readouterr().out
    assert "compile, mapo tiny 1 fp32 bf16 True: loss or gradient is wrong: not timed" in said
    assert "reduce-overhead, mapo tiny 1 fp32 bf16 True: fails: no such kernel" in said
    assert "eager, mapo tiny 1 fp32 bf16 True: cannot be captured" in said


def test_a_case_that_cannot_be_measured_does_not_stop_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def measure(case: Case, *rest: Any) -> Iterator[dict[str, Any]]:
        if case.pairs == 1:
            raise torch.OutOfMemoryError("too large")
        yield dict.fromkeys([*bench_loss.KEYS, "provider"], "") | case._asdict() | {
            "provider": "eager", "wall_us": 1, "fwd_us": "", "bwd_us": "", "floor_us": "",
            "extra_bytes": "",
        }  # fmt: skip

    monkeypatch.setattr(bench_loss, "GPU", False)
    monkeypatch.setattr(bench_loss, "measure", measure)
    words = ["--shapes", "tiny", "--pairs", "1", "2", "--dtypes", "fp32,bf16", "--links", "mapo"]
    words += ["--families"]
    assert bench_loss.main([*words, "--output_dir", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("*.csv")
    assert [row["pairs"] for row in table(path)] == ["2"]


def test_the_most_telling_cases_come_first() -> None:
    def found(preset: str) -> list[Case]:
        settings = {"links": list(cases.PUBLISHED), "dtypes": bench_loss.DTYPES}
        settings |= {"stacked": False, "every_link": False}
        return bench_loss.cases(SimpleNamespace(**settings | bench_loss.PRESETS[preset]))  # type: ignore[arg-type]

    headline, full = found("headline"), found("full")
    assert {*headline} < {*full}
    assert len({*full}) == len(full)
    assert headline[0] == Case("mapo", "sdxl", 4, "fp32", "bf16")
    assert Case("dpo_sigmoid", "hunyuan720", 4, "bf16", "bf16") in headline
    shared = [case.shared for case in full if not case.family]
    assert shared == sorted(shared, reverse=True)
    assert not any(case.shape in (cases.TINY, cases.VIDEO) for case in full)
    for preset in ("quick", "headline", "full"):
        videos = [case for case in found(preset) if case.family and case.shape.startswith("wan")]
        assert [case.link for case in videos] == [*cases.FAMILIES]
    beyond = [bool(case.family) for case in headline]
    assert beyond == sorted(beyond)
    stacked = [case for case in full if not case.shared and not case.family]
    assert full.index(videos[-1]) < full.index(stacked[0])
    assert "reduce-overhead" not in bench_loss.PRESETS["headline"]["providers"]


def test_rows_with_new_columns_widen_the_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "made" / "rows.csv"
    bench_loss.append(path, [])
    assert not path.exists()
    bench_loss.append(path, [{"a": 1, "b": "x,\ny"}])
    inode = path.stat().st_ino
    bench_loss.append(path, [{"a": 2, "b": 3}])
    assert path.stat().st_ino == inode
    bench_loss.append(path, [{"b": 4, "c": 5}])
    wanted = [("1", "x,\ny", ""), ("2", "3", ""), ("", "4", "5")]
    assert [(row["a"], row["b"], row["c"]) for row in table(path)] == wanted
    bench_loss.append(path, [{"c": 6, "a": 7}])  # in another order, with one missing
    assert table(path)[-1] == {"a": "7", "b": "", "c": "6"}
    before = path.read_bytes()

    def full(*args: Any) -> None:
        raise OSError("disk is full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk is full"):
        bench_loss.append(path, [{"d": 1}])
    assert path.read_bytes() == before


@pytest.mark.parametrize("lacking", ["git", "repository"])
def test_rows_without_git(lacking: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if lacking == "git":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setattr(bench_loss, "RESULTS", tmp_path / "results")
    about = bench_loss.environment()
    assert about["git"] == ""
    assert len(about["source"]) == 8


def test_the_host_cost_of_a_call() -> None:
    import host_cost

    for link in cases.PUBLISHED:
        found = host_cost.costs(link, turns=2, repeats=4)
        assert {*found} == {"eager", "fastpref"}
        for first, steady in found.values():
            assert len(first) == len(steady) == 2
            assert min(first + steady) > 0


# Timing


def test_copies_of_inputs_exceed_the_l2_twice(gpu: StandIn | None) -> None:
    l2 = timing.l2_bytes()
    for n_bytes in (l2 // 3000, l2 // 100, l2 // 7, l2, 2 * l2, 2 * l2 + 1, 100 * l2):
        n, empty = timing.copies(n_bytes)
        assert 1 <= n <= timing.MOST_COPIES
        between = (n - 1) * n_bytes  # moved since a copy was last used
        assert empty == (between < 2 * l2)
        if n_bytes > 2 * l2:
            assert n == 1
        elif n < timing.MOST_COPIES:
            assert not empty
    case = Case("dpo_sigmoid", "tiny", 1, "fp32", "bf16")
    sets, empty = timing.inputs(case)
    assert (len(sets), empty) == timing.copies(min(case.bytes_moved()))
    assert len(sets) > 1
    assert len({tensor.data_ptr() for tensors in sets for tensor in tensors}) == 3 * len(sets)
    for tensors in sets:
        assert [t.requires_grad for t in tensors] == [True, False, False]
        assert all(torch.equal(a, b) for a, b in zip(tensors, sets[0], strict=True))


@only_stand_in
def test_only_the_replay_is_timed(gpu: StandIn) -> None:
    sets, _ = timing.inputs(Case("mapo", "tiny", 2, "fp32", "bf16"))
    runs = timing.passes(cases.fused("mapo", "torch"), sets)
    assert gpu.log == ["capture"] * 3
    assert {len(run.steps) for run in runs.values()} == {len(sets)}
    gpu.log.clear()
    times = timing.timed(runs, 4, empty_l2=False)
    assert gpu.log == ["sleep", "event", "replay", "event"] * 3 * 5
    assert times == {name: [REPLAY_MS / 1e3 / len(sets)] * 4 for name in ("fwd", "bwd", "both")}


@only_stand_in
def test_the_l2_is_emptied_by_reading(gpu: StandIn) -> None:
    seen: list[str] = []

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if any(arg is ballast for arg in args):
                seen.append(func.overloadpacket.__name__)
                gpu.log.append("read")
            return func(*args, **(kwargs or {}))

    runs = {"nothing": timing.captured([lambda: None])}
    ballast = timing._ballast()
    assert ballast.nbytes > 2 * timing.l2_bytes()
    gpu.log.clear()
    with Noted():
        timing.timed(runs, 2, empty_l2=True)
    assert gpu.log == ["read", "sleep", "event", "replay", "event"] * 3
    assert {*seen} == {"sum"}
    assert (ballast == 1).all()


def test_steps_of_a_graph_share_no_memory(gpu: StandIn | None) -> None:
    """Else the gradients of all would stay in the L2."""
    case = Case("dpo_sigmoid", "tiny", 2, "bf16", "bf16")
    sets, _ = timing.inputs(case)
    for run in timing.passes(cases.fused("dpo_sigmoid", "torch"), sets).values():
        assert len({written(each) for each in run.results}) == len(sets)
    for run in bench_loss.floor_passes(case, sets).values():
        assert len({written(each) for each in run.results}) == len(sets)


def written(result: Tensor | tuple[Tensor, ...]) -> int:
    """Where a step wrote its result, or the last of several."""
    return (result[-1] if isinstance(result, tuple) else result).data_ptr()


def test_a_graph_keeps_what_it_reads(gpu: StandIn | None) -> None:
    """Its inputs, and what forward saved for backward: a replay would read freed memory."""

    class Mark: ...

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, pred: Tensor) -> Tensor:
            ctx.saved = Mark()
            marks.append(weakref.ref(ctx.saved))
            ctx.save_for_backward(pred)
            return pred.square().sum()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * grad * ctx.saved_tensors[0]

    marks: list[weakref.ref[Mark]] = []
    sets, _ = timing.inputs(Case("mapo", "tiny", 4, "fp32", "bf16"))
    n = len(sets)
    read = [weakref.ref(tensor) for tensors in sets for tensor in tensors]
    runs = timing.passes(lambda pred, target: Square.apply(pred), sets)
    kept = runs["bwd"]
    del sets, runs
    gc.collect()
    assert all(mark() for mark in marks[:n])  # of the forwards that are gone backward through
    assert all(tensor() is not None for tensor in read[::2])
    kept = timing.captured([lambda: None])
    gc.collect()
    assert not any(mark() for mark in marks)
    assert kept.results == [None]


def test_backward_makes_no_gradient_of_the_loss() -> None:
    case = Case("mapo", "tiny", 2, "fp32", "fp32")
    made: list[str] = []

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            made.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    tensors = case.tensors()
    cases.one(torch.float32)
    with Noted():
        value = cases.published_mapo(*tensors)
        torch.autograd.grad(value, tensors[0], retain_graph=True)
        assert "ones_like" in made
        made.clear()
        cases.step(cases.published_mapo, tensors)
    assert not {"ones_like", "ones", "full"} & {*made}


@only_stand_in
def test_a_captured_launch_finds_a_ticket(gpu: StandIn) -> None:
    timing.captured([lambda: None] * 250)
    assert len(launch._spare[0]) == 300  # of slabs of 100
    assert len(launch._slabs) == 3
    assert all(ticket.numel() == 1 for ticket in launch._spare[0])
    timing.captured([lambda: None] * 250)
    assert len(launch._slabs) == 3


# Losses beyond the links of pairs


DTYPES = [("fp32", "bf16"), ("bf16", "bf16")]


# A dtype is read and written as it is whatever the link: the second one by a family of each kind.
@pytest.mark.parametrize(
    ("link", "dtypes"),
    covering.product(
        [*cases.FAMILIES],
        DTYPES,
        fast=lambda link, dtypes: dtypes == DTYPES[0] or link in FIRST_OF_KIND,
        ids=lambda link, dtypes: f"{link}-dtypes{DTYPES.index(dtypes)}",
    ),
)
def test_published_and_fused_agree(link: str, dtypes: tuple[str, str]) -> None:
    """On latents of a video, to more digits than a provider needs; and the kernels with them."""
    family = cases.FAMILIES[link]
    case = Case(link, cases.VIDEO, 2, *dtypes, family.shared)
    assert cases.is_right(cases.fused(link, "triton"), case._replace(shape="sd15"))
    tensors = case.tensors()
    loss, grad = cases.step(family.published, tensors)
    ours, our_grad = cases.step(cases.fused(link, "torch"), tensors)
    torch.testing.assert_close(loss, ours, rtol=1e-5, atol=0)
    rounding = 2e-5 if dtypes[0] == "fp32" else 1e-2
    assert (grad - our_grad).abs().max() <= rounding * grad.abs().max()


def test_inputs_of_every_family_say_something() -> None:
    """The safeguard acts, no gradient of a whole sample is 0, and scores differ in a list."""
    for link, family in cases.FAMILIES.items():
        case = Case(link, "sd15", 2, "fp32", "fp32", family.shared)
        tensors = case.tensors()
        assert len(tensors[0]) == case.samples
        assert len(tensors[1]) == case.targets
        grad = cases.step(family.published, tensors)[1].flatten(1).abs().amax(1)
        assert (grad > 0.001 * grad.max()).all(), link
        if family.kind == "lists":
            assert all(len(row.unique()) == family.members for row in tensors[3])
    case = Case("dpo_safeguard", "sd15", 2, "fp32", "fp32")
    grads = [
        cases.step(cases.FAMILIES[link].published, case.tensors())[1].chunk(2)
        for link in ("dpo_safeguard", "pair_errors")
    ]
    assert torch.equal(grads[0][0], grads[1][0])
    assert grads[0][1].abs().max() < 0.3 * grads[1][1].abs().max()


# The floor


@pytest.mark.parametrize("link", ["dpo_sigmoid", *cases.FAMILIES])
def test_bytes_are_those_that_the_launches_need(link: str) -> None:
    """Each of what they are given once, but for the loser's reference in DSPO's backward, along
    which there is no gradient; on the way back prediction and target, what else has a direction or
    makes the target, and the gradient."""
    family = cases.FAMILIES.get(link)
    case = Case(link, "tiny", 3, "fp32", "bf16", family.shared if family else True)
    pred, target, *others = case.tensors()[: case.large]
    again = sum(others[i].nbytes for i in case.again)
    spared = again // 2 if link == "dspo" else 0
    forward, backward = case.bytes_moved()
    assert forward == pred.nbytes + target.nbytes + sum(t.nbytes for t in others)
    assert backward == 2 * pred.nbytes + target.nbytes + again - spared
    assert sum(given_to_launches(case)) == forward + backward + spared


def given_to_launches(case: Case) -> list[int]:
    """Bytes of the large operands of forward and backward, with the gradient."""
    found = []

    def noted(kernel: Any, plan: Any, device: Any, pointers: Any, *rest: Any) -> None:
        operands = [each for each in pointers if isinstance(each, tuple)]
        found.append(sum(t.nbytes for each in operands for t in each if t.dim() > 1))
        real(kernel, plan, device, pointers, *rest)

    real = launch._launch
    with mock.patch.object(launch, "_launch", noted):
        cases.step(cases.fused(case.link, "triton"), case.tensors())
    return found


@pytest.mark.parametrize("link", cases.FAMILIES)
def test_the_floor_of_a_family(link: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads and writes what `bytes_moved` counts, in the programs of the real launches."""
    monkeypatch.setattr(launch, "MAX_PROGRAMS", 6)
    case = Case(link, "sd15", 1, "fp32", "bf16", cases.FAMILIES[link].shared)
    pred, target, *others = tensors = case.tensors()[: case.large]
    again = [others[i] for i in case.again]
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) % 3)
        sums = floors.read(*tensors, members=case.members)
        grad = floors.write(pred, target, *again, members=case.members, drifting=case.drifting)
    assert sums.sum().item() == sum(tensor.double().sum().item() for tensor in tensors)
    wanted = pred.detach() + torch.cat([target] * (case.samples // case.targets))
    first = case.samples * case.drifting // case.members
    for other in again:
        wanted[:first] += other[:first]
    assert torch.equal(grad, wanted)
    assert {grid[0] for grid in grids_of(link, case.tensors())} == {sums.numel()}


@pytest.mark.parametrize("dtypes", [("fp32", "bf16"), ("bf16", "bf16"), ("bf16", "fp32")])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("link", ["mapo", "dpo_sigmoid"])
def test_the_floor_reads_and_writes_everything(
    link: str, shared: bool, dtypes: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "MAX_PROGRAMS", 6)  # fewer than there are blocks
    tensors = Case(link, "sd15", 3, *dtypes, shared).tensors()
    with torch.no_grad():
        for tensor in tensors:  # small integers, which add up exactly
            tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) % 3)
        sums, grad = floors.read(*tensors), floors.write(*tensors)
    assert sums.numel() == 6
    assert sums.sum().item() == sum(tensor.double().sum().item() for tensor in tensors)
    pred, target = tensors[:2]
    whole = torch.cat([target, target]) if shared else target
    assert grad.dtype == pred.dtype
    assert torch.equal(grad, (pred.detach() + whole).to(pred.dtype))


def test_the_floor_has_the_programs_of_the_real_launches() -> None:
    for shape, pairs in (("tiny", 3), ("sd15", 2), ("sdxl", 1)):
        tensors = Case("dpo_sigmoid", shape, pairs, "fp32", "bf16").tensors()
        grids = grids_of("dpo_sigmoid", tensors)
        assert {grid[0] for grid in grids} == {floors.read(*tensors).numel()}


def grids_of(link: str, tensors: tuple[Tensor, ...]) -> list[tuple[int, ...]]:
    """Of forward and backward."""
    grids = []

    def noted(kernel: Any, plan: Any, *rest: Any, **options: Any) -> None:
        grids.append(plan.grid)
        real(kernel, plan, *rest, **options)

    real = launch._launch
    with mock.patch.object(launch, "_launch", noted), choices.chosen({}):
        cases.step(cases.fused(link, "triton"), tensors)
    return grids


def test_the_floor_compiles_for_sm_90() -> None:
    """With 16-byte accesses, as the real kernels have."""
    script = """
import sys
sys.path[:0] = ["benchmarks", "kernels", "."]
import floors
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

for pred, target in (("fp32", "bf16"), ("bf16", "bf16"), ("fp32", "fp32")):
    warps = 8 if "fp32" in (pred, target) else 4
    for members, shared in ((1, False), (2, True), (2, False), (4, False), (8, True)):
        for kernel in (floors.read_kernel, floors.write_kernel):
            constants = {"MEMBERS": members, "SHARED": shared, "BLOCK": 1024}
            if kernel is floors.write_kernel:
                constants["AGAIN"] = int(members == 2)
            types = {"target": f"*{target}", "sums": "*fp32", "size": "i32"}
            types["others"] = (f"*{pred}", f"*{target}")
            signature = {name: types.get(name, f"*{pred}") for name in kernel.arg_names}
            signature |= dict.fromkeys(constants, "constexpr")
            places = [(i, j) if name == "others" else (i,)
                      for i, name in enumerate(kernel.arg_names) if name not in constants
                      for j in range(2 if name == "others" else 1)]
            aligned = {place: [["tt.divisibility", 16]] for place in places}
            source = ASTSource(kernel, signature, constants, aligned)
            target_gpu = GPUTarget("cuda", 90, 32)
            made = triton.compile(source, target=target_gpu, options={"num_warps": warps})
            ptx = made.asm["ptx"]
            assert "ld.global.v4.b32" in ptx, ptx
            if kernel is floors.write_kernel:
                assert "st.global.v4.b32" in ptx, ptx
print("compiled")
"""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c"]
    result = subprocess.run([*command, script], cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.stdout.strip() == "compiled", result.stderr[-4000:]


# Choices


@pytest.mark.parametrize(
    ("link", "name"),
    covering.product(
        choices.LINKS_TIMED,
        [*choices.CHOICES],
        fast=covering.in_turn(choices.LINKS_TIMED, [*choices.CHOICES]),
    ),
)
def test_choices_are_right(link: str, name: str) -> None:
    """On samples of sixteen blocks; each names attributes that are there."""
    settings = choices.CHOICES[name]
    assert all(hasattr(launch, attribute) for attribute in settings)
    with choices.chosen(settings):
        assert choices.deviation(Case(link, "sd15", 3, "fp32", "bf16")) <= 1


def test_a_choice_holds_for_its_own_launches_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    grids = []

    def noted(kernel: Any, plan: Any, *rest: Any, **options: Any) -> None:
        grids.append(plan.grid[0])
        real(kernel, plan, *rest, **options)

    real, before = launch._launch, launch.MAX_PROGRAMS
    monkeypatch.setattr(launch, "_launch", noted)
    tensors = Case("mapo", "sd15", 2, "fp32", "bf16").tensors()
    loss = cases.fused("mapo", "triton")
    cases.step(loss, tensors)
    with choices.chosen({"MAX_PROGRAMS": 2}):
        cases.step(loss, tensors)
    with pytest.raises(AttributeError), choices.chosen({"MAX_PROGRAMS": 2, "NO_SUCH": 1}):
        pass
    cases.step(loss, tensors)
    assert grids == [32, 32, 2, 2, 32, 32]
    assert before == launch.MAX_PROGRAMS


@pytest.mark.slow
def test_rows_of_choices(
    gpu: StandIn | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = {
        "as it is": {},
        "one program": {"_programs": lambda n_pairs, n_elements: 1},
        "not all": {"_count": lambda pred: (len(pred[0]) // 2, pred[0][0].numel() - 2)},
        "absent": {"NO_SUCH": 1},
    }
    monkeypatch.setattr(choices, "CHOICES", made)
    monkeypatch.setattr(choices, "LINKS_TIMED", ("mapo",))
    assert choices.main(["--shapes", "tiny", "--rounds", "1", "--output_dir", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("choices-*.csv")
    rows = table(path)
    assert [row["choice"] for row in rows] == ["as it is", "one program"]
    for row in rows:
        assert all(float(row[f"{way}_us"]) > 0 for way in ("fwd", "bwd", "both"))
        assert row["torch"] == torch.__version__


def test_cases_of_choices() -> None:
    found = choices.cases()
    assert len(found) == len({*found}) == 16
    assert {(case.shape, case.pairs) for case in found} == {*choices.SIZES}


# Report


def full_rows(tmp_path: Path) -> Path:
    """What a GPU's headline is about."""
    path = tmp_path / "gpu.csv"
    usual: dict[str, Any] = {"pairs": 4, "target": "bf16", "shared": "True", "device": "some GPU"}
    usual |= {"torch": "2", "triton": "3", "copy_gb_s": 3000, "extra_bytes": 80}
    usual |= {"family": "pairs", "members": 2}
    usual |= {"fwd_gb_s": 2900, "bwd_gb_s": 2800}
    times = {"floor_us": 2.0, "two_launches_us": 3.0, "device_us": 6.0, "fwd_us": 2.5}
    times |= {"bwd_us": 3.5, "wall_us": 40.0, "wall_us_p20": 39.0, "wall_us_p80": 41.0}
    rows = []
    shapes = {"sdxl": "fp32", "hunyuan720": "bf16", "wan480": "fp32"}
    for i, (shape, pred) in enumerate(shapes.items()):
        for link in ("mapo", "dpo_sigmoid"):
            for provider, slower in (("eager", 8), ("compile", 3), ("fastpref", 1), ("floor", 0.9)):
                row = usual | {"link": link, "shape": shape, "pred": pred, "provider": provider}
                row |= {"bytes": 2 ** (21 + i)}
                row |= {name: took * slower for name, took in times.items()}
                rows.append(row | {"device_us": (6.0 - 0.1 * (i == 1)) * slower})
    of_lists: dict[str, Any] = {
        "link": "rankdpo_8",
        "shape": "wan480",
        "pred": "fp32",
        "shared": "True",
    }
    of_lists |= {"family": "lists", "members": 8, "bytes": 2**25, "extra_bytes": 80000}
    for provider, slower in (("compile", 1.5), ("fastpref", 1), ("floor", 0.5)):
        row = usual | of_lists | {"provider": provider}
        rows.append(row | {name: took * slower for name, took in times.items()})
    bench_loss.append(path, rows)
    return path


def test_the_report_says_what_is_met(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.main([str(full_rows(tmp_path))])
    lines = capsys.readouterr().out.splitlines()
    assert "met  SDXL, 4 pairs: eager / fastpref, wall: 8 (>= 2.5)" in lines
    assert "met  SDXL, 4 pairs: compile / fastpref, wall: 3 (>= 1.3)" in lines
    assert "met  SDXL, 4 pairs: eager / fastpref, device: 8 (>= 6)" in lines
    assert "met  SDXL, 4 pairs: compile / fastpref, device: 3 (>= 1.8)" in lines
    assert "met  Hunyuan, 4 pairs, mapo, shared: fwd bandwidth / copy: 0.9667 (>= 0.92)" in lines
    assert "met  Hunyuan, 4 pairs, mapo, shared: compile / fastpref, device: 3 (>= 1.2)" in lines
    assert "met  extra bytes, most: 80 (<= 65536)" in lines
    assert "met  extra bytes of a list's sample, most: 1e+04 (<= 16384)" in lines
    assert "met  rankdpo_8, wan480: compile / fastpref, device: 1.5 (>= 1)" in lines
    assert "met  replay / (floor + two empty kernels), most: 1.2 (<= 1.3)" in lines
    assert any(line.startswith("MISSED R^2 of device time by bytes: ") for line in lines)
    about = "fastpref / launches that only move memory, mapo sdxl 4 fp32,bf16: "
    times = "fwd 2.5 / 2.2 us = 1.11, bwd 3.5 / 3.1 us = 1.11, device 6.0 / 5.4 us = 1.11"
    assert about + times in lines


def test_the_report_does_without_what_was_not_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = table(full_rows(tmp_path))
    path = tmp_path / "part.csv"

    def reported(rows: list[dict[str, str]]) -> str:
        path.unlink(missing_ok=True)
        bench_loss.append(path, rows)  # type: ignore[arg-type]
        read = report.read(path)
        report.targets(read)
        report.floors(read)
        return report.table(read)

    for column in report.FIGURES:
        if column not in ("pairs", "bytes"):
            reported([row | {column: ""} for row in whole])
            reported([{k: v for k, v in row.items() if k != column} for row in whole])
            one_less = [row | {column: ""} if i == 2 else row for i, row in enumerate(whole)]
            reported(one_less)
    for key in ("provider", "shape", "link"):
        for value in {row[key] for row in whole}:
            reported([row for row in whole if row[key] != value])
            reported([row for row in whole if row[key] == value])
    for column in ("family", "members"):  # which older rows have not
        reported([{k: v for k, v in row.items() if k != column} for row in whole])
    assert "| rankdpo_8 | wan480 | 4 |" in reported(whole)
    reported(whole[:1])
    report.main([str(path)])
    path.write_text(path.read_text().splitlines()[0] + "\n")  # nothing at all
    report.main([str(path)])
