"""What only a GPU can show: streams, graphs, other devices, waiting, memory, very large tensors."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import cases
import fastpref
from fastpref_kernels import pair

pytestmark = pytest.mark.gpu


def latents(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A prediction (2B, ...) and a target (B, ...) which its pairs share."""
    generator = torch.Generator("cuda").manual_seed(seed)
    target = torch.randn(shape, device="cuda", generator=generator)
    noise = torch.randn((2 * shape[0], *shape[1:]), device="cuda", generator=generator)
    pred = target.repeat(2, *[1] * (len(shape) - 1)) + 0.1 * noise
    return pred.requires_grad_(), target


def step(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    loss = fastpref.mapo_loss(pred, target, impl="triton").loss
    return loss.detach(), torch.autograd.grad(loss, pred)[0]


def test_the_second_call_does_without_the_jit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit as the first, which the jit launched; off the 16 bytes it is asked again."""
    pred, target = latents(2, 4, 64, 65)
    wanted = step(pred, target)
    asked: list[str] = []
    run = triton.JITFunction.run

    def noted(self: triton.JITFunction, *args: Any, **kwargs: Any) -> Any:
        asked.append(self.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(triton.JITFunction, "run", noted)
    for seed in range(3):
        again = step(*latents(2, 4, 64, 65))
        assert all(torch.equal(a, b) for a, b in zip(again, wanted, strict=True))
        step(*latents(2, 4, 64, 65, seed=seed))
    assert not asked
    memory = torch.empty(pred.numel() + 1, device="cuda")
    off = memory[1:].view_as(pred).copy_(pred.detach()).requires_grad_()
    for _ in range(2):
        loss, grad = step(off, target)
        torch.testing.assert_close(loss, wanted[0])
        torch.testing.assert_close(grad, wanted[1])
        assert asked == ["pair_fwd", "pair_bwd"]


def test_nothing_waits_for_the_device() -> None:
    pred, target = latents(2, 4, 64, 64)
    beta = torch.tensor(0.1, device="cuda")
    step(pred, target)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = fastpref.mapo_loss(pred, target, beta=beta)
        out.loss.backward()
        out.metrics()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_streams_at_once() -> None:
    """Many launches in flight on several streams, each with the ticket of its own stream."""
    inputs = [latents(2, 4, 128, 128, seed=i) for i in range(4)]
    wanted = [step(*each) for each in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    results: list[list[tuple[Tensor, Tensor]]] = [[] for _ in inputs]
    for _ in range(50):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(step(*inputs[i]))
    torch.cuda.synchronize()
    for got, (loss, grad) in zip(results, wanted, strict=True):
        assert all(torch.equal(each[0], loss) and torch.equal(each[1], grad) for each in got)


def test_1000_runs_repeat_bit_for_bit() -> None:
    pred, target = latents(3, 4, 96, 100)
    loss, grad = step(pred, target)
    for _ in range(1000):
        again = step(pred, target)
        assert torch.equal(again[0], loss)
        assert torch.equal(again[1], grad)


def test_graphs_replayed_at_once() -> None:
    """Two graphs captured on one stream, replayed on two: each launch has a ticket of its own."""
    inputs = [latents(2, 4, 128, 128, seed=i) for i in range(2)]
    wanted = [step(*each) for each in inputs]
    graphs, outputs = [], []
    for each in inputs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs.append(step(*each))
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(100):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for got, each in zip(outputs, wanted, strict=True):
        assert torch.equal(got[0], each[0])
        assert torch.equal(got[1], each[1])
    pred, target = inputs[0]
    pred.data.copy_(inputs[1][0])
    target.copy_(inputs[1][1])
    graphs[0].replay()
    torch.cuda.synchronize()
    assert torch.equal(outputs[0][0], wanted[1][0])


def test_a_training_step_in_a_graph() -> None:
    """docs/recipes.md, as it stands there, against the same steps without a graph."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "recipes.md").read_text()
    (recipe,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    warm_up, replayed = 3, 4
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    batches = [{"noisy": randn(4, 4, 32, 32), "target": randn(2, 4, 32, 32)} for _ in range(4)]
    model = torch.nn.Conv2d(4, 4, 3, padding=1).cuda()
    twin = copy.deepcopy(model)
    names: dict[str, Any] = {
        "torch": torch, "fastpref": fastpref, "batches": batches, "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True),
        "noisy": batches[0]["noisy"].clone(), "target": batches[0]["target"].clone(),
        "beta": torch.tensor(0.1, device="cuda"),
    }  # fmt: skip
    exec(recipe, names)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3, capturable=True)
    for batch in [batches[0]] * warm_up + batches[:replayed]:
        out = fastpref.mapo_loss(twin(batch["noisy"]), batch["target"], beta=names["beta"])
        optimizer.zero_grad(set_to_none=False)
        out.loss.backward()
        optimizer.step()
    torch.testing.assert_close(names["out"].loss, out.loss)
    torch.testing.assert_close(names["out"].margin, out.margin)
    torch.testing.assert_close(model.weight, twin.weight)


def test_reduce_overhead() -> None:
    """torch.compile's own CUDA graphs."""
    pred, target = latents(2, 4, 64, 64)
    compiled = torch.compile(
        lambda p, t: fastpref.mapo_loss(p, t).loss, fullgraph=True, mode="reduce-overhead"
    )
    wanted = step(pred, target)
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        loss = compiled(pred, target)
        (grad,) = torch.autograd.grad(loss, pred)
        torch.testing.assert_close(loss.detach().clone(), wanted[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(grad.clone(), wanted[1], rtol=1e-6, atol=0)


def test_reduce_overhead_as_the_first_call_of_a_process() -> None:
    """torch.compile warms up inside a memory pool of its graph; the tickets must not lie in it."""
    script = """
import torch, fastpref
pred = torch.randn(4, 4, 64, 64, device="cuda", requires_grad=True)
target = torch.randn(2, 4, 64, 64, device="cuda")
compiled = torch.compile(lambda p: fastpref.mapo_loss(p, target).loss, mode="reduce-overhead")
losses = []
for _ in range(5):
    torch.compiler.cudagraph_mark_step_begin()
    loss = compiled(pred)
    torch.autograd.grad(loss, pred)
    losses.append(loss.item())
assert losses == [fastpref.mapo_loss(pred, target).loss.item()] * 5, losses
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]


def test_almost_2_to_the_31_elements_in_a_sample() -> None:
    """Where counting blocks in 32 bits would overflow."""
    pred = torch.full((2, 1), 2.0, device="cuda").expand(2, 2**31 - 1)
    out = fastpref.sft_loss(pred, torch.zeros(1, 1, device="cuda").expand(1, 2**31 - 1))
    assert out.mse_w.tolist() == out.mse_l.tolist() == [pytest.approx(4.0, rel=1e-5)]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one() -> None:
    pred, target = latents(2, 4, 64, 64)
    other = torch.device("cuda", 1)
    moved = pred.detach().to(other).requires_grad_()
    loss, grad = step(moved, target.to(other))
    assert loss.device == grad.device == other
    assert torch.equal(grad.cpu(), step(pred, target)[1].cpu())


def test_extra_memory_is_under_64_kib() -> None:
    pred, target = latents(4, 16, 64, 64, 16)
    step(pred, target)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    grad = step(pred, target)[1]
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before - grad.nbytes < 64 * 1024


def test_more_than_2_to_the_31_elements() -> None:
    """In the tensor, and in one sample of it."""
    if torch.cuda.mem_get_info()[0] < 48 * 2**30:
        pytest.skip("needs 48 GiB")
    n = 2**31 + 4096
    for shape in ((1, n), (2, n // 2)):
        target = torch.zeros(shape, device="cuda", dtype=torch.bfloat16)
        pred = torch.full((2 * shape[0], shape[1]), 0.5, device="cuda", dtype=torch.bfloat16)
        pred[-1, -1] = 4.0
        pred.requires_grad_()
        out = fastpref.sft_loss(pred, target, impl="triton")
        assert out.mse_w.tolist() == pytest.approx([0.25] * shape[0], rel=1e-5)
        assert out.mse_l.tolist() == pytest.approx([0.25] * shape[0], rel=1e-5)
        (grad,) = torch.autograd.grad(out.mse_l.sum() * 0 + out.loss, pred)
        assert grad[0, -1].item() == pytest.approx(1.0 / shape[1] / shape[0], rel=1e-2)
        assert grad[-1, -1].item() == 0
        del pred, target, grad, out


# Losses beyond the links of pairs: of single samples, of lists, with more sums, and what is taken
# from the whole batch inside of the launch


def of_family(link: str, shape: str, pairs: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Inputs of a benchmark, with noise of their own by `seed`."""
    case = cases.Case(link, shape, pairs, "fp32", "bf16", cases.FAMILIES[link].shared)
    pred, *others = case.tensors()
    generator = torch.Generator("cuda").manual_seed(seed)
    noise = torch.randn(pred.shape, device="cuda", generator=generator)
    return (pred.detach() + 0.02 * noise).requires_grad_(), *others


def family_step(link: str, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    loss, grad = cases.step(cases.fused(link, "triton"), tensors)
    return loss.detach(), grad


def same(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("dtypes", [("fp32", "bf16"), ("bf16", "bf16")])
@pytest.mark.parametrize("shape", ["sdxl", "wan480"])
@pytest.mark.parametrize("link", cases.FAMILIES)
def test_a_family_is_its_formula(link: str, shape: str, dtypes: tuple[str, str]) -> None:
    """Against the reference in fp64, and the published formula in eager PyTorch against it, too."""
    case = cases.Case(link, shape, 3, *dtypes, cases.FAMILIES[link].shared)
    assert cases.is_right(cases.FAMILIES[link].published, case)
    tensors = case.tensors()
    exact = tuple(t.detach().double() for t in tensors)
    exact[0].requires_grad_()
    wanted, wanted_grad = cases.step(cases.fused(link, "torch"), exact)
    loss, grad = family_step(link, tensors)
    torch.testing.assert_close(loss.double(), wanted.detach(), rtol=1e-5, atol=0)
    rounding = max(1e-4, torch.finfo(grad.dtype).eps)
    assert (grad - wanted_grad).abs().max() <= rounding * wanted_grad.abs().max()


@pytest.mark.parametrize("link", cases.FAMILIES)
def test_a_family_on_two_streams(link: str) -> None:
    """Which repeats it bit for bit, too."""
    inputs = [of_family(link, "sdxl", 3, seed) for seed in range(2)]
    wanted = [family_step(link, each) for each in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    results: list[list[tuple[Tensor, Tensor]]] = [[] for _ in inputs]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(family_step(link, inputs[i]))
    torch.cuda.synchronize()
    for got, each in zip(results, wanted, strict=True):
        assert all(same(one, each) for one in got)


@pytest.mark.parametrize("link", cases.FAMILIES)
def test_a_family_in_graphs_replayed_at_once(link: str) -> None:
    """And on inputs that came after the capture."""
    inputs = [of_family(link, "sdxl", 2, seed) for seed in range(2)]
    wanted = [family_step(link, each) for each in inputs]
    graphs, outputs = [], []
    for each in inputs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs.append(family_step(link, each))
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(20):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert all(same(got, each) for got, each in zip(outputs, wanted, strict=True))
    inputs[0][0].data.copy_(inputs[1][0])
    graphs[0].replay()
    torch.cuda.synchronize()
    assert same(outputs[0], wanted[1])


@pytest.mark.parametrize("link", cases.FAMILIES)
def test_a_family_waits_for_nothing(link: str) -> None:
    tensors = of_family(link, "sd15", 2)
    family_step(link, tensors)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        family_step(link, tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("k", [2, 3, 4, 8, 16])
def test_lists_of_20_shapes_compile_two_kernels(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One forward and one backward, whatever the latents and the number of lists."""
    made: list[str] = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_cache_hook", lambda **about: made.append(about["fn"].name)
    )
    for kernel in (pair.pair_fwd, pair.pair_bwd):
        kernel.device_caches.clear()
    for lists in (1, 2, 3, 16):
        for size in (32, 36, 40, 44, 48):
            target = torch.randn(lists, 4, size, 96 - size, device="cuda")
            pred = torch.randn(lists * k, *target.shape[1:], device="cuda", requires_grad=True)
            score = torch.rand(lists, k, device="cuda")
            out = fastpref.rankdpo_loss(pred, target, pred.detach() + 0.1, score, impl="triton")
            out.loss.backward()
    assert sorted(made) == ["pair_bwd", "pair_fwd"]


@pytest.mark.parametrize("link", cases.FAMILIES)
def test_extra_memory_of_a_family(link: str) -> None:
    """Under 64 KiB, or of lists 16 KiB for each sample of one: partial sums, and no copies."""
    tensors = of_family(link, "sd3", 4)
    family_step(link, tensors)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    grad = family_step(link, tensors)[1]
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - grad.nbytes
    assert extra < max(4, cases.FAMILIES[link].members) * 16 * 1024
