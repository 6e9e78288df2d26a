"""Every form of input, fused and eager, against the published formula on the whole tensor."""
# mypy: disable-error-code="arg-type, index, union-attr"

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import covering
import fastpref
import oracles
from aot import unplanned
from fastpref.batch import Halves
from fastpref_kernels import LINKS
from fastpref_kernels.launch import INTERPRETED

pytestmark = pytest.mark.usefixtures("poisoned")

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


def draw(
    shape: tuple[int, ...], pred: torch.dtype, target: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(pred_w, pred_l, target_w, target_l) of (B, ...), with errors of 0.01 that differ by a
    little, so that margins are small and every gradient counts."""
    generator = torch.Generator().manual_seed(sum(shape))
    target_w, target_l = torch.randn(2, *shape, generator=generator).to(target)
    noise_w, noise_l = 0.1 * torch.randn(2, *shape, generator=generator)
    pred_w, pred_l = (target_w + noise_w).to(pred), (target_l + noise_l).to(pred)
    return tuple(t.to(device) for t in (pred_w, pred_l, target_w, target_l))


def _tensors(value: Halves) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def run(
    pred: Halves, target: Halves, grad_loss: Tensor | None = None, **options: Any
) -> tuple[fastpref.LossOutput, list[Tensor]]:
    """Output, and the gradients of the tensors of `pred`."""
    tensors = [t.detach().requires_grad_() for t in _tensors(pred)]
    out = fastpref.pair_loss(
        tuple(tensors) if isinstance(pred, tuple) else tensors[0], target, **options
    )
    grad_loss = torch.ones_like(out.loss) if grad_loss is None else grad_loss
    return out, list(torch.autograd.grad(out.loss, tensors, grad_loss))


def defaults(link: str) -> dict[str, float | None]:
    return {name: hyper.default for name, hyper in LINKS[link].hyper.items()}


def halves(value: Halves, n_pairs: int) -> tuple[Tensor, Tensor]:
    if isinstance(value, tuple):
        return value
    return (value, value) if value.shape[0] == n_pairs else (value[:n_pairs], value[n_pairs:])


def check(
    pred: Halves,
    target: Halves,
    link: str = "mapo",
    reduction: str = "mean",
    grad_loss: Tensor | None = None,
) -> None:
    """Fused against the oracle, allowed what eager needs; outputs, gradients, dtypes and
    layouts."""
    options: dict[str, Any] = {"link": link, "reduction": reduction, "grad_loss": grad_loss}
    fused, fused_grads = run(pred, target, impl="triton", **options)
    eager, eager_grads = run(pred, target, impl="torch", **options)
    n_pairs = pred[0].shape[0] if isinstance(pred, tuple) else pred.shape[0] // 2
    weight = 1.0 if grad_loss is None else tuple(grad_loss.double().cpu().reshape(-1).tolist())
    truth = oracles.batch(
        link, halves(pred, n_pairs), halves(target, n_pairs), defaults(link), reduction, weight
    )
    for name in ("loss", "mse_w", "mse_l", "margin"):
        got = getattr(fused, name)
        assert got.dtype == FP32
        oracles.assert_three_way(name, got, getattr(eager, name), truth[name])
    for tensor, got in zip(_tensors(pred), fused_grads, strict=True):
        assert got.dtype == tensor.dtype
        assert got.shape == tensor.shape
        assert got.stride() == torch.empty_like(tensor).stride()
    if not isinstance(pred, tuple):
        fused_grads, eager_grads = list(fused_grads[0].chunk(2)), list(eager_grads[0].chunk(2))
    for name, got, plain in zip(("grad_w", "grad_l"), fused_grads, eager_grads, strict=True):
        oracles.assert_three_way(name, got, plain, truth[name])


SHAPES = [(1, 1), (3, 63), (2, 1000), (1, 65537), (2, 4, 32, 32), (1, 4, 3, 8, 10), (2, 77, 16)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("link", ["mapo", "sft"])
def test_shapes(shape: tuple[int, ...], link: str, device: torch.device) -> None:
    pred_w, pred_l, target_w, target_l = draw(shape, FP32, FP32, device)
    check(torch.cat([pred_w, pred_l]), torch.cat([target_w, target_l]), link=link)


@pytest.mark.parametrize("pred", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("target", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_dtypes_and_reductions(
    pred: torch.dtype, target: torch.dtype, reduction: str, device: torch.device
) -> None:
    pred_w, pred_l, target_w, target_l = draw((3, 4, 6, 10), pred, target, device)
    grad_loss = torch.rand(3 if reduction == "none" else (), device=device) * 4 - 2
    check(
        torch.cat([pred_w, pred_l]),
        torch.cat([target_w, target_l]),
        reduction=reduction,
        grad_loss=grad_loss,
    )


def stack(w: Tensor, l: Tensor) -> Halves:
    return torch.cat([w, l])


def pair(w: Tensor, l: Tensor) -> Halves:
    return w, l


def mixed(w: Tensor, l: Tensor) -> Halves:
    return w, l.to(BF16)


def shared(w: Tensor, l: Tensor) -> Halves:
    return w


def shared_tuple(w: Tensor, l: Tensor) -> Halves:
    return w, w


@pytest.mark.parametrize("pred_form", [stack, pair, mixed])
@pytest.mark.parametrize("target_form", [stack, pair, mixed, shared, shared_tuple])
def test_forms(
    pred_form: Callable[[Tensor, Tensor], Halves],
    target_form: Callable[[Tensor, Tensor], Halves],
    device: torch.device,
) -> None:
    pred_w, pred_l, target_w, target_l = draw((3, 5, 7, 9), FP32, FP32, device)
    if target_form in (shared, shared_tuple):
        pred_l = pred_l - target_l + target_w
    check(pred_form(pred_w, pred_l), target_form(target_w, target_l))


def channels_last(t: Tensor) -> Tensor:
    return t.to(memory_format=torch.channels_last)


def cropped(t: Tensor) -> Tensor:
    """A window of a larger tensor: no two dimensions can be merged."""
    big = torch.full((t.shape[0] + 1, t.shape[1] + 2, t.shape[2] + 3, t.shape[3] + 5), 7.0)
    view = big.to(t)[1:, 1:-1, 2:-1, 3:-2]
    view.copy_(t)
    return view


def every_second(t: Tensor) -> Tensor:
    big = torch.full((2 * t.shape[0], *t.shape[1:-1], 2 * t.shape[-1]), 7.0).to(t)
    big[::2, ..., 1::2] = t
    return big[::2, ..., 1::2]


def unaligned(t: Tensor) -> Tensor:
    """One element into its storage: no 16-byte access is possible."""
    storage = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    view = storage[1:].view(t.shape)
    view.copy_(t)
    return view


def transposed(t: Tensor) -> Tensor:
    return t.transpose(1, 3).contiguous().transpose(1, 3)


def expanded(t: Tensor) -> Tensor:
    """The first sample for all, without memory of its own."""
    return t[:1].expand(t.shape)


def expanded_inside(t: Tensor) -> Tensor:
    return t[:, :1, :, :1].expand(t.shape)


LAYOUTS = [
    torch.Tensor.contiguous, channels_last, cropped, every_second, unaligned, transposed, expanded,
    expanded_inside,
]  # fmt: skip


# Each beside a dense one, and beside one that is as little dense.
@pytest.mark.parametrize(
    ("target_layout", "pred_layout"),
    covering.product(
        LAYOUTS,
        LAYOUTS,
        fast=lambda target, pred: (
            torch.Tensor.contiguous in (target, pred)
            or (LAYOUTS.index(target) - LAYOUTS.index(pred)) % len(LAYOUTS) == 3
        ),
        ids=lambda target, pred: f"{target.__name__}-{pred.__name__}",
    ),
)
def test_layouts(
    pred_layout: Callable[[Tensor], Tensor],
    target_layout: Callable[[Tensor], Tensor],
    device: torch.device,
) -> None:
    pred_w, pred_l, target_w, target_l = draw((2, 4, 6, 8), FP32, FP32, device)
    check(pred_layout(torch.cat([pred_w, pred_l])), target_layout(torch.cat([target_w, target_l])))
    check((pred_layout(pred_w), pred_l), (target_w, target_layout(target_l)))


@pytest.mark.parametrize("dims", [3, 5])
def test_channels_last_of_other_ranks(dims: int, device: torch.device) -> None:
    shape = (2, 16, 3, 4, 5)[:dims]
    pred_w, pred_l, target_w, target_l = draw(shape, BF16, FP32, device)
    pred = torch.cat([pred_w, pred_l]).movedim(1, -1).contiguous().movedim(-1, 1)
    check(pred, torch.cat([target_w, target_l]))


@pytest.mark.parametrize("n_pairs", [1, 2, 5, 63, pytest.param(300, marks=pytest.mark.slow)])
def test_many_pairs(n_pairs: int, device: torch.device) -> None:
    pred_w, pred_l, target_w, target_l = draw((n_pairs, 20), FP32, FP32, device)
    check((pred_w, pred_l), (target_w, target_l))


def test_more_pairs_than_programs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """One program a pair, which then reads several blocks."""
    from fastpref_kernels import launch

    monkeypatch.setattr(launch, "MAX_PROGRAMS", 2)
    pred_w, pred_l, target_w, target_l = draw((3, 5000), FP32, FP32, device)
    with unplanned():
        check((pred_w, pred_l), (target_w, target_l))


def test_more_parts_than_one_tile(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpref_kernels import launch

    monkeypatch.setattr(launch, "BLOCK", 16)
    pred_w, pred_l, target_w, target_l = draw((2, 16 * 70 + 3), FP32, FP32, device)
    with unplanned():
        check((pred_w, pred_l), (target_w, target_l))


@pytest.mark.parametrize("inner", [False, True])
def test_offsets_beyond_32_bits(inner: bool, device: torch.device) -> None:
    """Rows, or elements of a row, that lie 2^31 elements apart (in memory that is never
    touched)."""
    far = 2**31 + 32
    stride = (1, far) if inner else (far, 1)
    pred_w, pred_l, target_w, target_l = draw((1, 4), BF16, BF16, device)
    values = torch.cat([pred_w, pred_l])
    big = torch.empty_strided((values.shape), stride, dtype=BF16, device=device)
    pred = big.copy_(values)
    check(pred, torch.cat([target_w, target_l]))


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last, cropped])
def test_64_bit_indices_inside_a_row(
    layout: Callable[[Tensor], Tensor], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The road that samples of 2^31 elements take, on a small one."""
    from fastpref_kernels import launch

    monkeypatch.setattr(launch, "INT32_ELEMENTS", 0)
    pred_w, pred_l, target_w, target_l = draw((2, 4, 20, 20), FP32, BF16, device)
    with unplanned():
        check(layout(torch.cat([pred_w, pred_l])), torch.cat([target_w, target_l]))


def test_negated_views(device: torch.device) -> None:
    """Real tensors whose memory holds the opposite of their values."""
    pred_w, pred_l, target_w, target_l = draw((2, 30), FP32, FP32, device)
    z = torch.complex(torch.zeros(4, 30, device=device), -torch.cat([target_w, target_l]))
    assert z.conj().imag.is_neg()
    for target in (z.imag, z.conj().imag, z.conj().imag, z.imag):  # whichever has passed before
        check(torch.cat([pred_w, pred_l]), target)


@pytest.mark.slow  # test_layouts has what kernels tell apart
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=5),
    order=st.randoms(use_true_random=False),
    dtypes=st.tuples(st.sampled_from([FP32, FP16, BF16]), st.sampled_from([FP32, FP16, BF16])),
    tuples=st.booleans(),
)
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_order_of_memory(
    shape: list[int], order: Any, dtypes: tuple[torch.dtype, torch.dtype], tuples: bool,
    device: torch.device,
) -> None:  # fmt: skip
    """Prediction and target, each with its dimensions permuted and some sliced, at random."""

    def scrambled(t: Tensor) -> Tensor:
        permutation = order.sample(range(t.dim()), t.dim())
        step = order.choice([1, 1, 2])
        wide = torch.empty([n * step for n in t.permute(permutation).shape]).to(t)
        view = wide[tuple(slice(None, None, step) for _ in permutation)]
        inverse = [permutation.index(d) for d in range(t.dim())]
        return view.permute(inverse).copy_(t)

    pred_w, pred_l, target_w, target_l = draw(tuple(shape), *dtypes, device)
    if tuples:
        check((scrambled(pred_w), scrambled(pred_l)), scrambled(torch.cat([target_w, target_l])))
    else:
        check(scrambled(torch.cat([pred_w, pred_l])), (scrambled(target_w), scrambled(target_l)))


def test_only_one_half_wants_a_gradient(device: torch.device) -> None:
    pred_w, pred_l, target_w, target_l = draw((2, 40), FP32, FP32, device)
    both = run((pred_w, pred_l), (target_w, target_l), impl="triton", link="mapo")[1]
    for frozen in (0, 1):
        tensors = [pred_w.detach(), pred_l.detach()]
        tensors[1 - frozen].requires_grad_()
        out = fastpref.mapo_loss(tuple(tensors), (target_w, target_l), impl="triton")
        out.loss.backward()
        assert tensors[frozen].grad is None
        assert torch.equal(tensors[1 - frozen].grad, both[1 - frozen])


def test_bit_for_bit_repeatable(device: torch.device) -> None:
    pred_w, pred_l, target_w, target_l = draw((2, 9000), FP32, BF16, device)
    first = run((pred_w, pred_l), (target_w, target_l), impl="triton", link="mapo")
    for _ in range(20 if device.type == "cuda" else 2):
        again = run((pred_w, pred_l), (target_w, target_l), impl="triton", link="mapo")
        for a, b in zip((*first[0][:4], *first[1]), (*again[0][:4], *again[1]), strict=True):
            assert torch.equal(a, b)


@pytest.mark.skipif(not INTERPRETED, reason="orders programs in the interpreter")
def test_the_order_of_arrival_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes last and finishes, the bits are the same."""
    from triton.runtime.interpreter import InterpreterBuilder

    pred_w, pred_l, target_w, target_l = draw((3, 5000), FP32, FP32, torch.device("cpu"))
    options: dict[str, Any] = {"link": "mapo", "impl": "triton"}
    first, first_grads = run((pred_w, pred_l), (target_w, target_l), **options)
    in_order = InterpreterBuilder.set_grid_idx
    for seed in range(5):
        order = random.Random(seed).sample(range(15), 15)  # three pairs of five blocks
        monkeypatch.setattr(
            InterpreterBuilder,
            "set_grid_idx",
            lambda self, x, y, z, order=order: in_order(self, order[x], y, z),
        )
        again, grads = run((pred_w, pred_l), (target_w, target_l), **options)
        assert all(torch.equal(a, b) for a, b in zip(first[:4], again[:4], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(first_grads, grads, strict=True))


def test_neighbours_do_not_matter(device: torch.device) -> None:
    """On the same number of programs, a pair's loss does not depend on the pairs beside it."""
    pred_w, pred_l, target_w, target_l = draw((5, 3000), FP32, FP32, device)
    options: dict[str, Any] = {"link": "mapo", "impl": "triton", "reduction": "none"}
    together, _ = run((pred_w, pred_l), (target_w, target_l), **options)
    for i in range(5):
        alone, _ = run(
            (pred_w[i : i + 1], pred_l[i : i + 1]),
            (target_w[i : i + 1], target_l[i : i + 1]),
            **options,
        )
        assert torch.equal(alone.loss[0], together.loss[i])


def test_hyperparameters_as_tensors(device: torch.device) -> None:
    pred_w, pred_l, target_w, target_l = draw((2, 100), FP32, FP32, device)
    knobs = {"beta": 0.3, "snr": 0.7, "num_train_timesteps": 90.0}
    for impl in ("triton", "torch"):
        plain, grads = run((pred_w, pred_l), (target_w, target_l), link="mapo", impl=impl, **knobs)
        for dtype in (FP32, torch.float64):
            for tensors in (["beta"], ["snr", "num_train_timesteps"], list(knobs)):
                given = knobs | {
                    n: torch.tensor(knobs[n], dtype=dtype, device=device) for n in tensors
                }
                out, got = run(
                    (pred_w, pred_l), (target_w, target_l), link="mapo", impl=impl, **given
                )
                torch.testing.assert_close(out.loss.to(FP32), plain.loss, rtol=1e-6, atol=0)
                torch.testing.assert_close(got, grads, rtol=1e-6, atol=0)


def test_modules_are_their_functions(device: torch.device) -> None:
    pred_w, pred_l, target_w, _ = draw((2, 100), FP32, FP32, device)
    module = fastpref.MaPOLoss(beta=0.3, snr=0.4, num_train_timesteps=50, reduction="sum")
    out = fastpref.mapo_loss(
        (pred_w, pred_l), target_w, beta=0.3, snr=0.4, num_train_timesteps=50, reduction="sum"
    )
    assert torch.equal(module((pred_w, pred_l), target_w).loss, out.loss)
    assert "beta=0.3" in repr(module)
    assert torch.equal(
        fastpref.SFTLoss()((pred_w, pred_l), target_w).loss,
        fastpref.sft_loss((pred_w, pred_l), target_w).loss,
    )


def test_metrics(device: torch.device) -> None:
    root = torch.tensor([[0.1], [0.2], [0.3], [0.4]], device=device).sqrt()
    pred = torch.cat([root, root.flip(0)])
    pred[1] = pred[5]  # a tie, a win, a loss and a loss
    out = fastpref.mapo_loss(pred, torch.zeros_like(pred), reduction="none")
    metrics = out.metrics()
    assert list(metrics) == ["loss", "mse_w", "mse_l", "margin", "accuracy", "gradient_factor"]
    assert all(
        m.dim() == 0 and m.device == pred.device and not m.requires_grad for m in metrics.values()
    )
    assert metrics["accuracy"].item() == (1 + 0.5) / 4
    assert metrics["loss"].item() == pytest.approx(out.loss.mean().item())
    assert metrics["mse_w"].item() == pytest.approx((0.1 + 0.3 + 0.3 + 0.4) / 4)
    assert metrics["gradient_factor"].item() == pytest.approx(
        torch.sigmoid(-out.margin.double()).mean().item()
    )
    assert out.metrics(as_floats=True, gather=True) == {k: m.item() for k, m in metrics.items()}
    more = out._replace(ref_mse_w=out.mse_w + 1, ref_mse_l=out.mse_l + 2).metrics()
    assert more["ref_mse_w"].item() == pytest.approx(metrics["mse_w"].item() + 1)
    assert more["ref_mse_l"].item() == pytest.approx(metrics["mse_l"].item() + 2)


GATHER = """
import sys, torch, fastpref
rank, store = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group(
    "gloo", rank=rank, world_size=2, init_method=f"file://{store}"
)
torch.manual_seed(0)
w, l, target, ref = torch.randn(4, 5, 3)
own = slice(0, 1) if rank == 0 else slice(1, 5)
def loss(rows):
    return fastpref.dpo_loss((w[rows], l[rows]), (target[rows], target[rows]),
                             (ref[rows], ref[rows]), beta=3.0)
got = loss(own).metrics(gather=True, as_floats=True)
wanted = loss(slice(0, 5)).metrics(as_floats=True)
assert got.keys() == wanted.keys() and {"drop_w", "drop_l"} <= got.keys(), got
assert all(abs(got[name] - wanted[name]) < 1e-5 for name in wanted), (got, wanted)
torch.distributed.barrier()
"""


def test_metrics_of_several_processes(tmp_path: Path) -> None:
    """One has a single pair, the other four: means over all five."""
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}
    command = [sys.executable, "-c", GATHER]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], env=env, stderr=PIPE)
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=120)[1].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
