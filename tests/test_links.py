"""Both dialects of every link against the published formula in 50 digits, from error 0 to 1e4."""
# mypy: disable-error-code="arg-type, index, union-attr"

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastpref
import oracles
from fastpref_kernels import LINKS

HYPER: dict[str, list[dict[str, float]]] = {
    "mapo": [{}, {"beta": 2.0, "snr": 1.0, "num_train_timesteps": 50.0}],
    "sft": [{}],
}
CASES = [(link, hyper) for link in LINKS for hyper in HYPER[link]]
ERRORS = [0.0, *(10.0**k for k in range(-8, 5)), 0.5, 2.0, 3.99, 4.01, 30.0, 170.0, 178.0, 250.0]


def roots() -> tuple[Tensor, Tensor]:
    """Single elements whose squares are all pairs of ERRORS, and near-ties at each of them."""
    w, l = torch.meshgrid(torch.tensor(ERRORS), torch.tensor(ERRORS), indexing="ij")  # noqa: E741
    ties = torch.tensor(ERRORS).repeat(4)
    near = ties * torch.tensor([1 + 1e-6, 1 - 1e-3, 1.02, 1.0]).repeat_interleave(len(ERRORS))
    errors_w, errors_l = torch.cat([w.flatten(), ties]), torch.cat([l.flatten(), near])
    return errors_w.sqrt(), errors_l.sqrt()


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize(("link", "hyper"), CASES)
def test_every_error_from_0_to_1e4(
    link: str, hyper: dict[str, float], impl: fastpref.losses.Impl, device: torch.device
) -> None:
    root_w, root_l = roots()
    pred = torch.cat([root_w, root_l])[:, None].to(device).requires_grad_()
    out = fastpref.pair_loss(
        pred, torch.zeros_like(pred), link=link, reduction="sum", impl=impl, **hyper
    )
    out.loss.backward()
    slopes = (pred.grad[:, 0] / (2 * pred.detach()[:, 0])).cpu().chunk(2)  # at 0 it is 0 / 0
    values = tuple({**LINKS[link].hyper, **hyper}.values())
    for i, (w, l) in enumerate(zip(root_w.double() ** 2, root_l.double() ** 2, strict=True)):  # noqa: E741
        truth = oracles.link(link, w.item(), l.item(), values)
        case = f"{link} err_w={w:.9g} err_l={l:.9g}"
        margin = out.margin[i].item()
        assert abs(margin - truth.margin) <= max(5e-4, 1e-5 * abs(truth.margin)), case
        for got, wanted, root in (
            (slopes[0][i].item(), truth.slope_w, root_w[i]),
            (slopes[1][i].item(), truth.slope_l, root_l[i]),
        ):
            if root > 0:
                assert math.isclose(got, wanted, rel_tol=1e-3, abs_tol=1e-20), f"{case} slope"
    assert pred.grad.isfinite().all()
    assert out.loss.isfinite()


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("link", LINKS)
def test_slopes_at_error_0(link: str, impl: fastpref.losses.Impl, device: torch.device) -> None:
    """At error 0 the gradient is 0 whatever the slope; what the slope is shows in one that is
    near."""
    pred = torch.tensor([[1e-12], [1e-12]], device=device, requires_grad=True)
    out = fastpref.pair_loss(pred, torch.zeros_like(pred), link=link, impl=impl)
    out.loss.backward()
    truth = oracles.link(link, 0.0, 0.0, tuple(LINKS[link].hyper.values()))
    assert pred.grad[0].item() / 2e-12 == pytest.approx(truth.slope_w, rel=1e-3)
    assert pred.grad[1].item() / 2e-12 == pytest.approx(truth.slope_l, rel=1e-3)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("link", LINKS)
def test_an_overflowed_error_stays_on_its_side(
    link: str, impl: fastpref.losses.Impl, device: torch.device
) -> None:
    """Squares beyond fp32 are inf; that of the loser must not make NaN of a bounded link's rest."""
    pred = torch.tensor([[1.0], [1e30]], device=device, requires_grad=True)
    out = fastpref.pair_loss(pred, torch.zeros_like(pred), link=link, impl=impl)
    out.loss.backward()
    assert out.loss.isfinite()
    assert pred.grad.isfinite().all()


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("half", [0, 1])
def test_nan_comes_out_as_nan(
    link: str, half: int, impl: fastpref.losses.Impl, device: torch.device
) -> None:
    pred = torch.randn(8, 5, device=device)
    pred[4 * half + 1, 3] = float("nan")
    pred.requires_grad_()
    out = fastpref.pair_loss(
        pred, torch.zeros(8, 5, device=device), link=link, reduction="none", impl=impl
    )
    out.loss.sum().backward()
    assert out.margin.isnan().tolist() == [False, True, False, False]
    assert (out.mse_w, out.mse_l)[half].isnan().tolist() == [False, True, False, False]
    if link != "sft":  # which does not look at the loser
        assert out.loss.isnan().tolist() == [False, True, False, False]
        assert pred.grad[1].isnan().all()
        assert pred.grad[5].isnan().all()


@pytest.mark.parametrize("link", LINKS)
def test_gradcheck_of_the_reference(link: str) -> None:
    torch.manual_seed(0)
    pred = (0.3 * torch.randn(6, 7, dtype=torch.float64)).requires_grad_()
    target = 0.3 * torch.randn(3, 7, dtype=torch.float64)
    knobs = {"num_train_timesteps": 10.0} if link == "mapo" else {}

    def loss(p: Tensor) -> Tensor:
        return fastpref.pair_loss(p, target, link=link, reduction="none", **knobs).loss

    assert torch.autograd.gradcheck(loss, pred)
    assert torch.autograd.gradgradcheck(loss, pred)


def test_the_published_code_really_breaks_where_we_say() -> None:
    """The docstring's claim about exp(x) - 1 in fp32."""

    def phi(e: Tensor) -> Tensor:
        return 0.5 * e / (torch.exp(0.5 * e) - 1)

    e = torch.tensor([0.0, 1e-5, 178.0], requires_grad=True)
    value = phi(e)
    value.sum().backward()
    assert value[0].isnan()
    assert e.grad[1] > 100  # truth: -0.25
    assert e.grad[2].isnan()
