"""The loss among PyTorch's machinery: torch.compile, opcheck, autocast, second derivatives."""
# mypy: disable-error-code="arg-type, index, union-attr"

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import covering
import fastpref
from fastpref.dispatch import Impl
from fastpref.transitions import Transition
from fastpref_kernels import LINKS, Link
from fastpref_kernels.groups import DSPO, RANKDPO
from fastpref_kernels.knobs import sums_of
from fastpref_kernels.links import Group
from fastpref_kernels.steps import GRPO, NFT, STEP_DPO

Operand = tuple[Tensor | None, Tensor | None]
ABSENT: Operand = (None, None)


@pytest.fixture
def latents(device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(2, 4, 8, 10, generator=generator)
    pred = target.repeat(2, 1, 1, 1) + 0.1 * torch.randn(4, 4, 8, 10, generator=generator)
    return pred.to(device).requires_grad_(), target.to(device)


def step(pred: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    out = fastpref.mapo_loss(pred * 1.5, target, **options)
    return out.loss, out.metrics()


# What a reduction is to the compiler, each backend is told alike.
@pytest.mark.parametrize(
    ("reduction", "backend", "impl"),
    covering.product(
        ["mean", "none"],
        ["aot_eager", "inductor"],
        ["triton", "torch", "auto"],
        fast=lambda reduction, backend, impl: (
            reduction == "mean" or (backend == "aot_eager" and impl != "auto")
        ),
    ),
)
def test_compile_fullgraph(
    impl: Impl, backend: str, reduction: str, latents: tuple[Tensor, Tensor]
) -> None:
    pred, target = latents
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    results = []
    for function in (step, compiled):
        loss, metrics = function(pred, target, impl=impl, reduction=reduction)
        (grad,) = torch.autograd.grad(loss.sum(), pred)
        results.append((loss, grad, metrics))
    # the same kernel gives the same bits; a compiler that orders sums anew moves margins, which are
    # differences of 1000 * psi = 64 in fp32, by some 1e-5
    bits = {"rtol": 0, "atol": 0} if impl == "triton" else {"rtol": 1e-4, "atol": 1e-7}
    torch.testing.assert_close(results[1][:2], results[0][:2], **bits)
    torch.testing.assert_close(results[1][2], results[0][2], rtol=1e-4, atol=1e-4)


def test_compile_tuples_and_halves(latents: tuple[Tensor, Tensor]) -> None:
    pred, target = latents
    torch._dynamo.reset()

    def loss(w: Tensor, l: Tensor) -> Tensor:
        return fastpref.mapo_loss((w, l), (target, target), impl="triton").loss

    w, l = (half.detach().to(torch.bfloat16).requires_grad_() for half in pred.chunk(2))
    plain = torch.autograd.grad(loss(w, l), (w, l))
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(w, l), (w, l))
    torch.testing.assert_close(compiled, plain, rtol=0, atol=0)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_a_tensor_beta_does_not_recompile(impl: Impl, latents: tuple[Tensor, Tensor]) -> None:
    pred, target = latents
    torch._dynamo.reset()
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=backend)
    def loss(pred: Tensor, beta: Tensor) -> Tensor:
        return fastpref.mapo_loss(pred, target, beta=beta, impl=impl).loss

    losses = []
    for beta in (0.1, 0.2, 0.7):
        losses.append(loss(pred, torch.tensor(beta, device=pred.device)).item())
        plain = fastpref.mapo_loss(pred, target, beta=beta, impl=impl).loss.item()
        assert losses[-1] == pytest.approx(plain, rel=1e-6)
    assert len(set(losses)) == 3
    assert len(graphs) == 1


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_with_a_reference_and_knobs(
    impl: Impl, backend: str, latents: tuple[Tensor, Tensor]
) -> None:
    pred, target = latents
    torch._dynamo.reset()
    ref = pred.detach() + 0.01
    numbers = torch.tensor([[0.9, 0.4], [1.5, 0.5], [0.1, 0.7]], device=pred.device)
    mask = target[:, :1] > -1

    def loss(p: Tensor, prob: Tensor, weight: Tensor, smoothing: Tensor) -> tuple[Any, ...]:
        out = fastpref.smpo_loss(
            p, target, ref, prob, mask=mask, pair_weight=weight, sample_weight=(weight, prob),
            label_smoothing=smoothing[0], loser_weight=0.5, impl=impl,
        )  # fmt: skip
        npo = fastpref.npo_loss(p, target, ref_mse=out.ref_mse_w.repeat(2), impl=impl)
        return out.loss + npo.loss, *out[1:]

    plain = loss(pred, *numbers)
    compiled = torch.compile(loss, fullgraph=True, backend=backend)(pred, *numbers)
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(out[0], pred)[0] for out in (plain, compiled)]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dynamic", [True, False])
def test_compile_other_shapes(dynamic: bool, device: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for height in (6, 8, 12):
        pred = torch.randn(6, 4, height, 5, device=device, requires_grad=True)
        target = torch.randn(6, 4, height, 5, device=device)
        got, wanted = (f(pred, target, impl="triton")[0] for f in (compiled, step))
        assert torch.equal(got, wanted)
        grads = (torch.autograd.grad(loss, pred)[0] for loss in (got, wanted))
        assert torch.equal(*grads)


# A form of the target is a matter of the ops, which PyTorch's path has not.
@pytest.mark.parametrize(
    ("impl", "form"),
    covering.product(
        ["triton", "torch"],
        ["shared", "stacked", "halves"],
        fast=lambda impl, form: impl == "triton" or form == "stacked",
    ),
)
def test_compile_other_batch_sizes(form: str, impl: Impl, device: torch.device) -> None:
    """Down to the last pair of an epoch."""
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for n_pairs in (3, 2, 1):
        pred = torch.randn(2 * n_pairs, 4, 6, device=device, requires_grad=True)
        target: Any = torch.randn(n_pairs, 4, 6, device=device)
        if form != "shared":
            target = (target, target + 1) if form == "halves" else torch.cat([target, target + 1])
        got, wanted = (f(pred, target, impl=impl)[0] for f in (compiled, step))
        torch.testing.assert_close(got, wanted)


def check_ops(
    link: Link | Group,
    numbers: list[Any],
    operands: list[Operand],
    huber_c: float | None,
    options: tuple[Any, ...],
    affine: tuple[float, ...] = (),
    n_groups: int | None = None,
) -> None:
    """operands: pred, target, ref, mask, base, anchor. options: swap and what follows it."""
    (pred, pred_l), *others = [*operands, *[ABSENT] * (6 - len(operands))]
    given = (pred, pred_l, [t for each in others for t in each])
    around = (huber_c, None, [*affine], [None] * len(affine), n_groups)
    tensors = [each if isinstance(each, Tensor) else None for each in numbers]
    values = [0.0 if isinstance(each, Tensor) else each for each in numbers]
    forward = (link.key, values, tensors, *given, *around, *options)
    torch.library.opcheck(torch.ops.fastpref.pair_forward.default, forward)
    loss, stats = torch.ops.fastpref.pair_forward(*forward)
    needed = (True, pred_l is not None)
    if not sums_of(link, None, options[4][1] == "1")[0]:  # pred - ref is no direction
        others[1] = ABSENT
    given = (pred, pred_l, [t for each in others for t in each])
    backward = (torch.ones_like(loss), stats, *given, *around, *needed, link.key)
    torch.library.opcheck(torch.ops.fastpref.pair_backward.default, backward)


# Operands that are there or not, one by one: whether all are or none is what may make a difference.
@pytest.mark.parametrize(
    ("halves", "shared", "reduction"),
    covering.product(
        [True, False],
        [True, False],
        ["mean", "none"],
        fast=lambda halves, shared, reduction: halves != shared == (reduction == "none"),
    ),
)
def test_opcheck(shared: bool, halves: bool, reduction: str, device: torch.device) -> None:
    pred, loser, target = torch.randn(3, 3, 6, 7, device=device)
    pred, loser = pred.bfloat16().transpose(1, 2), loser.transpose(1, 2)
    preds = (pred, loser) if halves else (torch.cat([pred, loser]), None)
    target = target.transpose(1, 2)
    targets = (target, None) if shared else (target, target.half() + 1)
    beta = torch.tensor(0.1, device=device)
    plain = (None, "0000", None)
    masks = (target > 0, None)
    numbers = [0.5, 1000.0, beta if reduction == "none" else 0.1]
    options: tuple[Any, ...] = (False, reduction, "mean", *plain)
    check_ops(LINKS["mapo"], numbers, [preds, targets], None, options)
    errors = torch.rand(6, device=device)
    for ref in (preds, (errors, None)):
        options = (True, reduction, "sum", *plain)
        check_ops(LINKS["dpo_sigmoid"], [0.1], [preds, targets, ref, masks], 0.5, options)
    operands = [preds, targets, preds, masks]
    options = (False, "dro", "mean", "batch", "1101", None)
    check_ops(LINKS["dpo_sigmoid"], [0.1, 0.3, 0.2, 2.0], operands, None, options)

    # DSPO's link takes the drift, and a safeguard the cross sums
    options = (False, "mean", "mean", "pair", "1000", None)
    check_ops(DSPO, [2.0, 0.5], operands, None, options)


def test_opcheck_of_lists(device: torch.device) -> None:
    pred, target, ref = torch.randn(3, 8, 5, device=device)
    scores, lengths = torch.rand(2, 4, device=device), torch.tensor([4, 2], device=device)
    numbers = [5.0, scores, torch.rand(2, device=device)]
    options = (False, "none", "mean", None, "0010", lengths)
    operands = [(pred, None), (target, None), (ref, None)]
    check_ops(RANKDPO[4], numbers, operands, None, options)


def test_opcheck_of_steps(device: torch.device) -> None:
    pred, old, x, x_next, ref, other = torch.randn(6, 3, 5, device=device)
    numbers: list[Any] = [torch.rand(3, device=device), 5.0, 0.1, 0.2, 0.5, 2.0, 0.5]
    operands = [(pred, None), (x_next, None), (old, None), ABSENT, (x, None), (ref, None)]
    options = (False, "none", "mean", None, "0000", None)
    numbers += [0.1, 0.5, 1.0, 1.0, 1.0]
    check_ops(GRPO["clip"][1], numbers, operands, None, options, (0.9, 0.5))
    numbers = [torch.rand(3, device=device), 1.0, 0.5, 0.1]
    operands[4] = ABSENT
    check_ops(NFT[True][1], numbers, operands, None, options)
    # two steps from one prediction
    numbers = [10.0, 0.5, 0.5, 2.0, 2.0, 0.5, 0.5, 0.1]
    operands = [(pred, None), (x_next, other), (old, None), ABSENT, (x, None)]
    check_ops(STEP_DPO[1], numbers, operands, None, options, (0.9, 0.5), 3)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(
    impl: Impl, dtype: torch.dtype, latents: tuple[Tensor, Tensor]
) -> None:
    pred, target = latents
    plain = fastpref.mapo_loss(pred, target, impl=impl)
    with torch.autocast(pred.device.type, dtype=dtype):
        cast = fastpref.mapo_loss(pred, target, impl=impl)
        (grad,) = torch.autograd.grad(cast.loss, pred)
    assert torch.equal(cast.loss, plain.loss)
    assert torch.equal(grad, torch.autograd.grad(plain.loss, pred)[0])


def test_second_derivatives(latents: tuple[Tensor, Tensor]) -> None:
    pred, target = latents
    loss = fastpref.mapo_loss(pred, target, impl="triton").loss
    (plain,) = torch.autograd.grad(loss, pred, retain_graph=True)
    (grad,) = torch.autograd.grad(loss, pred, create_graph=True)  # by itself this is no harm
    assert torch.equal(grad, plain)
    with pytest.raises(RuntimeError, match=r'first derivatives only.*impl="torch"'):
        grad.square().sum().backward()
    loss = fastpref.mapo_loss(pred, target, impl="torch").loss
    (grad,) = torch.autograd.grad(loss, pred, create_graph=True)
    grad.square().sum().backward()
    assert pred.grad.isfinite().all()


def test_a_second_backward_says_what_is_wrong(latents: tuple[Tensor, Tensor]) -> None:
    pred, target = latents
    out = fastpref.mapo_loss(pred, target, impl="triton")
    out.loss.backward(retain_graph=True)
    out.loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.loss.backward()


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_only_the_loss_carries_a_gradient(impl: Impl, latents: tuple[Tensor, Tensor]) -> None:
    pred, target = latents
    out = fastpref.mapo_loss(pred, target, impl=impl)
    assert out.loss.requires_grad
    assert not any(field.requires_grad for field in out[1:4])
    with torch.no_grad():
        assert not fastpref.mapo_loss(pred, target, impl=impl).loss.requires_grad


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_the_loss_scales_and_adds_up_with_others(
    impl: Impl, latents: tuple[Tensor, Tensor]
) -> None:
    """As in a trainer: divided for accumulation, scaled for fp16, next to another loss."""
    pred, target = latents
    (alone,) = torch.autograd.grad(fastpref.mapo_loss(pred, target, impl=impl).loss, pred)
    total = 1024 * (fastpref.mapo_loss(pred, target, impl=impl).loss / 4 + pred.square().sum())
    (together,) = torch.autograd.grad(total, pred)
    torch.testing.assert_close(together, 1024 * (alone / 4 + 2 * pred), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("field", ["a", "b"])
def test_a_transition_that_changes_before_backward_is_noticed(
    impl: Impl, field: str, device: torch.device
) -> None:
    x, x_next, old = torch.randn(3, 2, 5, device=device)
    numbers = torch.full((5, 2), 0.5, device=device).unbind()
    transition = Transition(*(number.clone() for number in numbers))
    pred = (old + 0.1).requires_grad_()
    out = fastpref.grpo_loss(pred, old, x, x_next, transition, 1.0, clip_range=0.5, impl=impl)
    getattr(transition, field).mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


def test_shared_predictions_compile_for_any_batch(device: torch.device) -> None:
    def loss(pred: Tensor, old: Tensor, x: Tensor, x_next: Tensor) -> Tensor:
        step = Transition(*torch.ones(5, device=device))
        return fastpref.step_dpo_loss(pred, old, x, x_next, step, beta=9.0, impl="triton").loss

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for n in (2, 3, 4, 5):
        old, x, pred = torch.randn(3, n, 6, device=device)
        given = (pred.requires_grad_(), old, x, torch.randn(2 * n, 6, device=device))
        wanted, found = loss(*given), compiled(*given)
        assert torch.equal(found, wanted)
        grads = (torch.autograd.grad(each, pred)[0] for each in (wanted, found))
        assert torch.equal(*grads)
    assert counter.frame_count == 2  # for the first size, and for all
