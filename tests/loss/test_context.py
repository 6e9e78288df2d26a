"""The losses inside torch.func, forward-mode AD, dispatch modes and tensor subclasses: the right
value through PyTorch, or an error that says what to do, and never a silent 0."""
# mypy: disable-error-code="arg-type"

from __future__ import annotations

import contextlib
import copy
import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import covering
import fastpref
from fastpref import dispatch, ops
from fastpref.batch import check_pairs
from fastpref_kernels import LINKS, launch, link
from fastpref_kernels.links import link_of

GENERATOR = torch.Generator().manual_seed(3)
PRED, TARGET, REF = (torch.randn(4, 3, 5, generator=GENERATOR) for _ in range(3))
TANGENT = torch.randn(4, 3, 5, generator=GENERATOR)

Loss = Callable[[Tensor], Tensor]


def dpo(**given: Any) -> Tensor:
    """The loss of the tensors above with others in their place, in fp64 if one of these is."""
    plain = {"model_pred": PRED, "target": TARGET, "ref_pred": REF, "beta": 5.0, **given}
    if any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in given.values()):
        plain = {k: t.double() if isinstance(t, Tensor) else t for k, t in plain.items()}
    return fastpref.dpo_loss(**plain).loss


# Every argument that a derivative may be asked by: the loss of it, and where.
ARGUMENTS: dict[str, tuple[Loss, Tensor]] = {
    "model_pred": (lambda x: dpo(model_pred=x), PRED),
    "target": (lambda x: dpo(target=x), TARGET),
    "ref_pred": (lambda x: dpo(ref_pred=x), REF),
    "ref_mse": (lambda x: dpo(ref_pred=None, ref_mse=x), torch.rand(4, generator=GENERATOR)),
    "beta": (lambda x: dpo(beta=x), torch.tensor(5.0)),
    "pair_weight": (lambda x: dpo(pair_weight=x), torch.tensor([0.5, 2.0])),
    "sample_weight": (lambda x: dpo(sample_weight=x), torch.tensor([0.5, 2.0, 1.0, 1.5])),
    "logit_scale": (lambda x: dpo(logit_scale=x), torch.tensor(0.7)),
    "mask": (lambda x: dpo(mask=x), torch.rand(4, 3, 5, generator=GENERATOR).round()),
    "huber_c": (
        lambda x: (
            fastpref.pair_loss(
                PRED.to(x.dtype), TARGET, REF, link="dpo_sigmoid", beta=5.0, huber_c=x
            ).loss
        ),
        torch.tensor(0.5),
    ),
    "mse": (
        lambda x: fastpref.losses_from_errors(x, link="mapo").loss,
        torch.rand(4, generator=GENERATOR),
    ),
}


def along(at: Tensor) -> Tensor:
    return TANGENT if at.shape == PRED.shape else torch.linspace(0.5, 1.0, at.numel()).view_as(at)


def difference(loss: Loss, at: Tensor) -> Tensor:
    """The derivative along `along(at)` by central differences in fp64."""
    step, at = 1e-6 * along(at).double(), at.double()
    return ((loss(at + step) - loss(at - step)) / 2e-6).float()


def by_grad(loss: Loss, at: Tensor) -> Tensor:
    return (torch.func.grad(loss)(at) * along(at)).sum()


def by_vjp(loss: Loss, at: Tensor) -> Tensor:
    value_and_pull: Any = torch.func.vjp(loss, at)
    return (value_and_pull[1](torch.ones_like(value_and_pull[0]))[0] * along(at)).sum()


def by_jvp(loss: Loss, at: Tensor) -> Tensor:
    tangent: Tensor = torch.func.jvp(loss, (at,), (along(at),))[1]
    return tangent


def by_jacfwd(loss: Loss, at: Tensor) -> Tensor:
    return (torch.func.jacfwd(loss)(at) * along(at)).sum()


def by_dual_level(loss: Loss, at: Tensor) -> Tensor:
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(loss(forward_ad.make_dual(at, along(at))))
        assert out.tangent is not None
        return out.tangent


TRANSFORMS = [by_grad, by_vjp, by_jvp, by_jacfwd, by_dual_level]
IN_TURN = covering.in_turn(TRANSFORMS[:-1], [*ARGUMENTS])


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """impl="auto" takes the kernels wherever impl="triton" would not raise."""
    real = dispatch.takes_triton

    def takes(impl: str, pairs: Any) -> bool:
        try:
            return real("triton" if impl == "auto" else impl, pairs)
        except ValueError:
            return real(impl, pairs)

    monkeypatch.setattr(dispatch, "takes_triton", takes)


@pytest.mark.parametrize("argument", ARGUMENTS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.usefixtures("as_on_a_gpu")
def test_transforms(transform: Callable[[Loss, Tensor], Tensor], argument: str) -> None:
    loss, at = ARGUMENTS[argument]
    wanted = difference(loss, at)
    assert wanted != 0
    if transform in (by_grad, by_vjp) and argument not in ("model_pred", "mse"):
        with pytest.raises(
            ValueError, match=rf"^{argument} requires a gradient.*{argument}.detach"
        ):
            transform(loss, at)
        return
    torch.testing.assert_close(transform(loss, at), wanted, rtol=1e-3, atol=1e-7)


# By turns: an argument is found to be none, or a constant, before it is known which transform asks.
@pytest.mark.parametrize(
    ("transform", "argument"),
    covering.product(
        TRANSFORMS[:-1],
        [*ARGUMENTS],
        fast=lambda transform, argument: argument == "model_pred" or IN_TURN(transform, argument),
    ),
)
@pytest.mark.usefixtures("as_on_a_gpu")
def test_compiled_transforms(transform: Callable[[Loss, Tensor], Tensor], argument: str) -> None:
    """Where Dynamo hides that an argument requires a gradient, its value is right."""
    loss, at = ARGUMENTS[argument]
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: transform(loss, x), backend="aot_eager")
    constant = argument not in ("model_pred", "mse")
    with contextlib.suppress(*[ValueError] * constant):  # whose message is tested above
        got = compiled(at)
        torch.testing.assert_close(got, difference(loss, at), rtol=1e-3, atol=1e-7)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_compiled_loss_of_dual_tensors() -> None:
    loss, at = ARGUMENTS["model_pred"]
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager")
    torch.testing.assert_close(compiled(at), loss(at))  # a graph from before is not taken again
    wanted = difference(loss, at)
    torch.testing.assert_close(by_dual_level(compiled, at), wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_vmap_hessians_and_gradients_of_single_pairs() -> None:
    loss, at = ARGUMENTS["model_pred"]
    many = torch.stack([at, 2 * at, at - 1])
    torch.testing.assert_close(torch.vmap(loss)(many), torch.stack([loss(each) for each in many]))
    weights = torch.tensor([0.0, 0.5, 2.0])
    torch.testing.assert_close(
        torch.vmap(lambda weight: dpo(pair_weight=weight))(weights),
        torch.stack([dpo(pair_weight=weight) for weight in weights.tolist()]),
    )
    grads = torch.vmap(torch.func.grad(loss))(many)
    torch.testing.assert_close(grads[1], torch.func.grad(loss)(many[1]))
    hessian = torch.func.hessian(lambda x: dpo(model_pred=x, impl="torch"))(at.double())
    wanted = torch.autograd.functional.hessian(
        lambda x: dpo(model_pred=x, impl="torch"), at.double()
    )
    torch.testing.assert_close(hessian, wanted)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_kernels_refuse_transforms(transform: Callable[[Loss, Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r'impl is "triton", but torch\.func.*"auto" or "torch"'):
        transform(lambda x: dpo(model_pred=x, impl="triton"), PRED)


def test_the_kernels_refuse_gradients_that_are_batched_or_dual() -> None:
    pred = PRED.clone().requires_grad_()
    losses = dpo(model_pred=pred, impl="triton", reduction="none")
    with pytest.raises(RuntimeError, match='pass impl="torch"'):
        torch.autograd.grad(losses, pred, torch.eye(2), is_grads_batched=True)
    loss = dpo(model_pred=pred, impl="triton")
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match='pass impl="torch"'):
        torch.autograd.grad(loss, pred, forward_ad.make_dual(torch.tensor(1.0), torch.tensor(1.0)))


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_results_of_collectives_are_waited_for(impl: str) -> None:
    """A functional collective gives an AsyncCollectiveTensor, whose memory is not filled yet."""
    late = AsyncCollectiveTensor
    wanted = fastpref.mapo_loss(PRED, TARGET, beta=0.3, mask=PRED > 0, impl=impl)
    got = fastpref.mapo_loss(
        late(PRED), late(TARGET), beta=late(torch.tensor(0.3)), mask=late(PRED > 0), impl=impl
    )
    for one, other in zip(got[:4], wanted[:4], strict=True):
        assert type(one) is Tensor
        assert torch.equal(one, other)
    errors = fastpref.losses_from_errors(late(PRED[:, 0, 0].abs()), link="mapo")
    assert torch.equal(
        errors.loss, fastpref.losses_from_errors(PRED[:, 0, 0].abs(), link="mapo").loss
    )


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store")
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_other_kinds_of_tensors_are_refused_by_name(mesh: Any) -> None:
    from torch.distributed.tensor import Replicate, distribute_tensor

    def spread(tensor: Tensor) -> Tensor:
        return distribute_tensor(tensor, mesh, [Replicate()])

    nested = torch.nested.nested_tensor([torch.rand(3), torch.rand(4)])
    jagged = torch.nested.nested_tensor([torch.rand(3), torch.rand(4)], layout=torch.jagged)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model_pred": spread(PRED)}, r"model_pred is a DTensor.*model_pred\.to_local\(\)"),
        ({"target": (spread(PRED[:2]), PRED[:2])}, r"target\[0\] is a DTensor.*to_local"),
        ({"beta": spread(torch.tensor(0.1))}, r"beta is a DTensor.*beta\.to_local\(\)"),
        ({"mask": PRED.to_sparse()}, r"mask has layout torch\.sparse_coo.*mask\.to_dense\(\)"),
        ({"target": TARGET.to_mkldnn()}, r"target has layout torch\._mkldnn.*to_dense"),
        ({"model_pred": nested}, r"model_pred is a nested tensor.*to_padded_tensor"),
        ({"target": jagged}, r"target is a nested tensor.*to_padded_tensor"),
        ({"pair_weight": torch.ones(2).to_sparse()}, r"pair_weight has layout.*to_dense"),
    ]
    fastpref.mapo_loss(PRED, TARGET)  # what passed does not excuse another kind of the same shape
    for given, message in cases:
        for impl in ("auto", "triton", "torch"):
            with pytest.raises(TypeError, match=message):
                fastpref.mapo_loss(**{"model_pred": PRED, "target": TARGET, "impl": impl} | given)
    with pytest.raises(TypeError, match="mse is a DTensor"):
        fastpref.losses_from_errors(spread(torch.rand(4)), link="mapo")


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_fake_tensors_and_make_fx(impl: str) -> None:
    def step(pred: Tensor) -> tuple[Tensor, Tensor]:
        pred = pred.detach().requires_grad_()
        out = fastpref.dpo_loss(pred, TARGET, REF, beta=torch.tensor(5.0), impl=impl)
        return torch.autograd.grad(out.loss, pred)[0], out.drop_w  # type: ignore[return-value]

    with FakeTensorMode(allow_non_fake_inputs=True):
        grad, drop = step(torch.empty(4, 3, 5))
    assert grad.shape == (4, 3, 5)
    assert drop.shape == (2,)
    graph = make_fx(step)(PRED)
    # "torch" is the closed form in eager mode, and differentiable operations in a graph.
    near = {"rtol": 0, "atol": 0} if impl == "triton" else {"rtol": 1e-5, "atol": 1e-8}
    for pred in (PRED, 2 * PRED):
        torch.testing.assert_close(graph(pred), step(pred), **near)
    if impl == "triton":
        called = {str(node.target) for node in graph.graph.nodes}
        assert {"fastpref.pair_forward.default", "fastpref.pair_backward.default"} <= called
    with FlopCounterMode(display=False):
        torch.testing.assert_close(step(PRED), graph(PRED), **near)


def test_meta_tensors_give_shapes() -> None:
    pred, target, ref = (t.to("meta") for t in (PRED, TARGET, REF))
    out = fastpref.dpo_loss(pred.requires_grad_(), target, ref, beta=torch.tensor(5.0))
    assert all(field is not None and field.is_meta for field in out)
    (grad,) = torch.autograd.grad(out.loss, pred)
    assert grad.shape == PRED.shape
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fastpref.mapo_loss(pred, target, reduction="none").loss.shape == (2,)
    assert fastpref.losses_from_errors(torch.rand(4, device="meta"), link="mapo").loss.is_meta


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_negated_numbers_and_gradients(impl: str) -> None:
    def negated(tensor: Tensor) -> Tensor:
        return torch._neg_view(-tensor)

    pred = PRED.clone().requires_grad_()
    weight, scale = torch.tensor([0.5, 2.0]), torch.tensor(0.3)
    plain = dpo(model_pred=pred, beta=scale, pair_weight=weight, impl=impl, reduction="none")
    other = dpo(model_pred=pred, beta=negated(scale), pair_weight=negated(weight), impl=impl,
                reduction="none")  # fmt: skip
    assert torch.equal(plain, other)
    grads = [torch.autograd.grad(plain, pred, g, retain_graph=True)[0]
             for g in (weight, negated(weight))]  # fmt: skip
    assert torch.equal(*grads)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_a_default_device_changes_nothing(impl: str) -> None:
    wanted = dpo(impl=impl, pair_weight=0.5, label_smoothing=0.1)
    torch.set_default_device("meta")
    try:
        assert torch.equal(dpo(impl=impl, pair_weight=0.5, label_smoothing=0.1), wanted)
        assert dpo(impl=impl, pair_weight=0.0) == 0
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_metrics_may_be_changed_in_place(backend: str) -> None:
    pred = PRED.clone().requires_grad_()

    def step(x: Tensor) -> tuple[Tensor, ...]:
        out = fastpref.dpo_loss(x, TARGET, REF, beta=5.0, impl="triton")
        return out.loss, out.mse_w, out.margin, out.drop_l  # type: ignore[return-value]

    torch._dynamo.reset()
    loss, *metrics = torch.compile(step, backend=backend, fullgraph=True)(pred)
    for metric in metrics:
        metric.mul_(7.0)
    (grad,) = torch.autograd.grad(loss, pred)
    torch.testing.assert_close(grad, torch.autograd.grad(step(pred)[0], pred)[0], rtol=0, atol=0)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_outputs_own_their_memory(impl: str) -> None:
    """Changing any output in place changes no input, no other output and no gradient."""
    ref_mse, mse = torch.rand(2, 4, generator=GENERATOR)
    pred = PRED.clone().requires_grad_()
    outs = [
        fastpref.dpo_loss(pred, TARGET, ref_mse=ref_mse, beta=5.0, impl=impl),
        fastpref.npo_loss(pred, TARGET, ref_mse=tuple(ref_mse.chunk(2)), beta=5.0, impl=impl),
        fastpref.dpo_loss(pred, TARGET, REF, beta=5.0, impl=impl, reduction="none"),
        fastpref.losses_from_errors(mse, ref_mse=ref_mse, link="dpo_sigmoid", beta=5.0),
        fastpref.losses_from_errors(tuple(mse.chunk(2)), link="sft", swap=True),
    ]
    inputs = [ref_mse, mse, PRED, TARGET, REF]
    before = [tensor.clone() for tensor in inputs]
    for out in outs:
        fields = [field for field in out[1:] if field is not None]
        for i, field in enumerate(fields):
            others = [other.clone() for other in fields]
            field.mul_(7.0).add_(1.0)
            assert all(
                torch.equal(a, b) for j, (a, b) in enumerate(zip(fields, others, strict=True))
                if j != i
            )  # fmt: skip
    assert all(map(torch.equal, inputs, before))
    again = fastpref.dpo_loss(pred, TARGET, ref_mse=ref_mse, beta=5.0, impl=impl).loss
    grads = [torch.autograd.grad(loss, pred)[0] for loss in (outs[0].loss, again)]
    assert torch.equal(*grads)


def test_a_name_that_is_given_anew() -> None:
    """The link that has the name now is the one that runs, with its own defaults."""
    makes: list[dict[str, Any]] = [{"beta": 3.0}, {"beta": 30.0}]
    torch._dynamo.reset()

    def loss(impl: str) -> Tensor:
        return fastpref.pair_loss(PRED, TARGET, REF, link="mine", impl=impl).loss

    compiled = torch.compile(loss, backend="aot_eager")
    try:
        for score, shape in (("dpo_sigmoid", "dpo_sigmoid"), ("dpo_hinge", "dpo_hinge")):
            for defaults in makes:
                mine = link(LINKS[score].score, LINKS[shape].shape, **defaults)
                fastpref.register_link("mine", mine)
                wanted = fastpref.pair_loss(PRED, TARGET, REF, link=score, impl="torch", **defaults)
                for impl in ("triton", "torch"):
                    torch.testing.assert_close(loss(impl), wanted.loss)
                    torch.testing.assert_close(compiled(impl), wanted.loss)
                    out = fastpref.pair_loss(PRED, TARGET, REF, link=mine, impl=impl)
                    torch.testing.assert_close(out.loss, wanted.loss)
        with pytest.raises(TypeError, match="loss 'mine' got unexpected argument rate"):
            fastpref.pair_loss(PRED, TARGET, REF, link="mine", rate=1.0)
    finally:
        del LINKS["mine"]
    with pytest.raises(TypeError, match=r"link must be a fastpref_kernels\.Link, got a str"):
        fastpref.register_link("mine", "mapo")
    with pytest.raises(TypeError, match="name must be a non-empty string, got 3"):
        fastpref.register_link(3, LINKS["mapo"])
    with pytest.raises(TypeError, match="link must be a name or a Link, got a list"):
        fastpref.pair_loss(PRED, TARGET, link=["mapo"])


def test_a_links_defaults_cannot_be_changed_in_place() -> None:
    hyper: Any = LINKS["mapo"].hyper
    with pytest.raises(TypeError, match="defaults cannot be changed"):
        hyper["beta"] = hyper["snr"]
    with pytest.raises(TypeError, match="defaults cannot be changed"):
        hyper.update(beta=hyper["snr"])
    assert copy.deepcopy(LINKS["mapo"]).hyper == hyper


def test_modules_may_be_imported_anew() -> None:
    wanted = dpo(impl="triton")
    importlib.reload(ops)
    assert torch.equal(dpo(impl="triton"), wanted)
    torch._dynamo.reset()
    compiled = torch.compile(lambda: dpo(impl="triton"), backend="aot_eager")
    assert torch.equal(compiled(), wanted)
    assert sys.modules["fastpref.ops"] is ops


def test_a_dict_may_change_in_a_compiled_step() -> None:
    """What a trainer's step does to its logs, and torch.func.functional_call to a module's."""
    model, log = torch.nn.Linear(5, 5), {"steps": 0}
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def step(parameters: dict[str, Tensor], pred: Tensor) -> Tensor:
        log["steps"] += 1
        return dpo(model_pred=torch.func.functional_call(model, parameters, (pred,)), impl="triton")

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(parameters, PRED), step(parameters, PRED))
    assert log == {"steps": 2}


@pytest.mark.parametrize("huge", [1e25, float("inf"), float("nan")])
def test_zero_weights_hide_what_overflows_under_a_transform(huge: float) -> None:
    weight, mask = torch.tensor([1.0, 0.0]), torch.ones(4, 3, 5)
    mask[:, :, 0] = 0
    rows, columns = PRED.clone(), PRED.clone()
    rows[[1, 3]] = huge
    columns[:, :, 0] = huge
    for huber in (None, 0.1):
        options: dict[str, Any] = {"link": "mapo", "huber_c": huber}

        def loss(x: Tensor, options: Any = options, **more: Any) -> Tensor:
            return fastpref.pair_loss(x, TARGET, **options, **more).loss

        for poisoned, more in ((rows, {"pair_weight": weight}), (columns, {"mask": mask})):
            grad, value = torch.func.grad_and_value(lambda x: loss(x, **more))(poisoned)  # noqa: B023
            clean, wanted = torch.func.grad_and_value(lambda x: loss(x, **more))(PRED)  # noqa: B023
            torch.testing.assert_close(value, wanted)
            torch.testing.assert_close(grad, clean)


class Hidden(Tensor):
    """A subclass whose memory is elsewhere, and which handles operations itself."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Hidden:
        made: Any = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = [each.inner if isinstance(each, Hidden) else each for each in args]
        return func(*given, **(kwargs or {}))


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_subclasses_that_hide_their_memory(impl: str) -> None:
    masked = torch.masked.masked_tensor(PRED, PRED > 0)
    for name, value, message in (
        ("model_pred", Hidden(PRED), "is a Hidden; expected a plain tensor"),
        ("beta", Hidden(torch.tensor(5.0)), "is a Hidden; expected a plain tensor"),
        ("pair_weight", Hidden(torch.ones(2)), "is a Hidden; expected a plain tensor"),
        ("target", masked, r"is a MaskedTensor.*target\.get_data\(\).*mask=target\.get_mask\(\)"),
    ):
        with pytest.raises(TypeError, match=rf"^{name} {message}"):
            dpo(**{name: value, "impl": impl})


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_zero_tensors(impl: str) -> None:
    """Autograd's own zeros, which have no memory."""
    zeros = torch._efficientzerotensor(4, 3, 5)
    pred = PRED.clone().requires_grad_()
    losses = dpo(model_pred=pred, target=(zeros[:2], zeros[2:]), impl=impl, reduction="none")
    wanted = dpo(model_pred=pred, target=torch.zeros(4, 3, 5), impl=impl, reduction="none")
    assert torch.equal(losses, wanted)
    (grad,) = torch.autograd.grad(losses, pred, torch._efficientzerotensor(2))
    assert not grad.any()


def test_keys_of_links_are_names_where_they_can_be() -> None:
    """So that an exported program finds a loss in another process."""
    assert LINKS["mapo"].key == "mapo"
    first, second = (link(LINKS["mapo"].score, LINKS["mapo"].shape) for _ in range(2))
    assert first.key != second.key
    with pytest.raises(ValueError, match=r"loss 'nobody' is not known.*register_link"):
        link_of("nobody")


def test_a_thread_in_forward_mode_does_not_stop_the_backward_of_another() -> None:
    pred = PRED.clone().requires_grad_()
    loss = dpo(model_pred=pred, impl="triton")
    with forward_ad.dual_level():  # as seen from anywhere: the level is the process's
        (grad,) = torch.autograd.grad(loss, pred)
    assert torch.equal(grad, torch.autograd.grad(dpo(model_pred=pred, impl="triton"), pred)[0])


def test_tickets_of_many_threads_with_new_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stream has a counter that no other has."""
    device, local = torch.device("cuda", 0), threading.local()
    monkeypatch.setattr(launch, "_tickets", {})
    monkeypatch.setattr(launch, "_spare", {})
    monkeypatch.setattr(launch, "_slabs", [])
    monkeypatch.setattr(launch, "_capturing", lambda device: False)
    monkeypatch.setattr(launch, "_stream", lambda device: local.stream)
    monkeypatch.setattr(launch, "_new_slab", lambda device: torch.zeros(64, dtype=torch.int32))
    failures: list[Exception] = []

    def use(first: int) -> None:
        try:
            for stream in range(first, 4000, 4):
                local.stream = stream
                assert launch._ticket(device) is launch._ticket(device)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=use, args=(first,)) for first in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures
    assert len({ticket.data_ptr() for ticket in launch._tickets.values()}) == 4000


def test_checks_see_a_shared_graph() -> None:
    """A constant that requires a gradient is refused under a transform too, after one that did not
    had passed with the same shapes."""
    check_pairs(PRED, TARGET)
    with pytest.raises(ValueError, match="target requires a gradient"):
        torch.func.grad(lambda x: dpo(model_pred=x, target=2 * x))(PRED)
