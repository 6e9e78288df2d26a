"""Steps of samplers against diffusers' own, published formulas, and torch.distributions."""

from __future__ import annotations

import math
import operator
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from mpmath import mp, mpf
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributions import Normal, kl_divergence

import fastpref
from fastpref.gaussians import Kind
from fastpref.transitions import (
    Transition,
    cps,
    dance_sde,
    ddim,
    euler_ancestral,
    flow_sde,
    lcm,
)

FP64 = torch.float64
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=FP64) ** 2  # Stable Diffusion's
ABAR = (1 - BETAS).cumprod(0)
SIGMAS = torch.tensor([1.0, 0.93, 0.8, 0.55, 0.3, 0.1], dtype=FP64)
ANCESTRAL = torch.tensor([14.6, 7.0, 2.5, 0.9, 0.2], dtype=FP64)
RISING = torch.tensor([0.004, 0.05, 0.3, 0.8, 0.99], dtype=FP64)
BUILDERS: dict[str, tuple[Any, Tensor]] = {
    "ddim": (ddim, RISING),
    "flow_sde": (flow_sde, SIGMAS),
    "dance_sde": (dance_sde, SIGMAS),
    "cps": (cps, SIGMAS),
    "euler_ancestral": (euler_ancestral, ANCESTRAL),
    "lcm": (lcm, RISING),
}
EXACT: dict[str, Any] = {"rtol": 3e-7, "atol": 3e-7}  # of fp32 factors, from fp64
FIELDS = ("a", "b", "std", "dt", "weight")
builders = pytest.mark.parametrize("name", BUILDERS)


def draw(*shape: int, dtype: torch.dtype = FP64) -> Tensor:
    return torch.randn(*shape, dtype=FP64).to(dtype)


def mean_of(t: Transition, x: Tensor, pred: Tensor) -> Tensor:
    a, b = (f.double().reshape(-1, *[1] * (x.dim() - 1)) for f in (t.a, t.b))
    return a * x + b * pred


def in_fp64(scheduler: Any) -> Any:
    """A scheduler of diffusers that computes in fp64, with the numbers that it has."""
    for name in ("alphas_cumprod", "sigmas", "final_alpha_cumprod"):
        if isinstance(getattr(scheduler, name, None), Tensor):
            setattr(scheduler, name, getattr(scheduler, name).double())
    return scheduler


def of_sd(kind: Any, n_steps: int, **options: Any) -> Any:
    scheduler = kind(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, **options
    )
    scheduler.set_timesteps(n_steps)
    return scheduler


@pytest.mark.needs("diffusers")
@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [1.0, 0.4])
def test_ddim_is_diffusers_step(predicts: str, eta: float) -> None:
    from diffusers import DDIMScheduler

    scheduler = of_sd(
        DDIMScheduler, 20, clip_sample=False, set_alpha_to_one=False, prediction_type=predicts
    )
    in_fp64(scheduler)
    x, pred, z = draw(3, 20, 4, 5)
    for i, t in enumerate(scheduler.timesteps):
        step = ddim(scheduler, i, eta=eta)
        theirs = scheduler.step(pred, int(t), x, eta=eta, variance_noise=z).prev_sample
        ours = mean_of(step, x, pred) + step.std.double() * z
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        assert step.dt == 1
        assert step.normalized


@pytest.mark.needs("diffusers")
def test_standard_deviations_that_lpo_tabulates() -> None:
    from diffusers import DDIMScheduler

    stds = ddim(of_sd(DDIMScheduler, 20, clip_sample=False), range(20)).std.flip(0)
    known = {0: 0.0206, 1: 0.0406, 2: 0.1673, 3: 0.2144, 19: 0.6444}
    for i, value in known.items():
        assert stds[i].item() == pytest.approx(value, abs=5e-5)
    t = 1 + 50 * torch.arange(20)
    at, ap = ABAR[t], ABAR[(t - 50).clamp(min=0)]
    wanted = ((1 - ap) / (1 - at) * (1 - at / ap)).sqrt()
    torch.testing.assert_close(stds.double(), wanted, rtol=1e-4, atol=0)  # of abar in fp32


@pytest.mark.needs("diffusers")
def test_a_last_ddim_step_goes_to_timestep_0() -> None:
    """And never to final_alpha_cumprod; from timestep 0 it has no noise."""
    from diffusers import DDIMScheduler

    scheduler = of_sd(DDIMScheduler, 10, clip_sample=False, set_alpha_to_one=True)
    step = ddim(scheduler, 9)
    tensor = ddim(torch.stack([scheduler.alphas_cumprod[1], scheduler.alphas_cumprod[0]]), 0)
    assert torch.equal(torch.stack(step[:5]), torch.stack(tensor[:5]))
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="step contains 9, at which ddim adds no noise"):
        ddim(scheduler, 9)


@pytest.mark.needs("diffusers")
@pytest.mark.parametrize("predicts", ["v_prediction", "sample", "epsilon"])
def test_zero_terminal_snr(predicts: str) -> None:
    from diffusers import DDIMScheduler

    scheduler = of_sd(
        DDIMScheduler, 10, clip_sample=False, rescale_betas_zero_snr=True,
        timestep_spacing="trailing", prediction_type=predicts,
    )  # fmt: skip
    assert scheduler.alphas_cumprod[scheduler.timesteps[0]] == 0
    if predicts == "epsilon":
        with pytest.raises(ValueError, match="prediction_type says nothing of x0 at step 0 of"):
            ddim(scheduler, 0)
        assert all(f.isfinite().all() for f in ddim(scheduler, range(1, 9))[:5])
        return
    x, pred, z = draw(3, 2, 6)
    in_fp64(scheduler)
    for eta in (1.0, 0.5):
        step = ddim(scheduler, 0, eta=eta)
        theirs = scheduler.step(pred, 999, x, eta=eta, variance_noise=z).prev_sample
        ours = mean_of(step, x, pred) + step.std.double() * z
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.needs("diffusers")
@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_euler_ancestral_is_diffusers_step(predicts: str, monkeypatch: Any) -> None:
    from diffusers import EulerAncestralDiscreteScheduler
    from diffusers.schedulers import scheduling_euler_ancestral_discrete as module

    scheduler = of_sd(EulerAncestralDiscreteScheduler, 6, prediction_type=predicts)
    x, pred, z = draw(3, 2, 3, 4, dtype=torch.float32)
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: z)
    for i, t in enumerate(scheduler.timesteps[:-1]):
        scheduler.is_scale_input_called = True
        theirs = scheduler.step(pred, t, x).prev_sample
        step = euler_ancestral(scheduler, i)
        ours = mean_of(step, x.double(), pred.double()) + step.std.double() * z
        torch.testing.assert_close(ours, theirs.double(), rtol=1e-4, atol=2e-5)
    with pytest.raises(ValueError, match="step contains 5, at which euler_ancestral adds no noise"):
        euler_ancestral(scheduler, 5)


@pytest.mark.needs("diffusers")
@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "sample"])
def test_lcm_is_diffusers_step(predicts: str, monkeypatch: Any) -> None:
    from diffusers import LCMScheduler
    from diffusers.schedulers import scheduling_lcm as module

    scheduler = LCMScheduler(prediction_type=predicts, timestep_scaling=0.01)
    scheduler.set_timesteps(4)
    in_fp64(scheduler)
    x, pred, z = draw(3, 2, 3, 4)
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: z)
    for i, t in enumerate(scheduler.timesteps[:-1]):
        theirs = scheduler.step(pred, t, x).prev_sample
        step = lcm(scheduler, i)
        ours = mean_of(step, x, pred) + step.std.double() * z
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    theirs = scheduler.step(pred, scheduler.timesteps[-1], x).prev_sample
    with FakeTensorMode(allow_non_fake_inputs=True):  # as on a device, where nothing is refused
        assert lcm(scheduler, torch.tensor([3])).std.shape == (1,)
    with pytest.raises(ValueError, match="step contains 3, at which lcm adds no noise"):
        lcm(scheduler, 3)


def test_lcm_as_published_for_tensors() -> None:
    at, ap = RISING[:-1], RISING[1:]
    step = lcm(RISING, range(4))
    torch.testing.assert_close(step.a.double(), (ap / at).sqrt(), **EXACT)
    torch.testing.assert_close(step.b.double(), -(ap * (1 - at) / at).sqrt(), **EXACT)
    torch.testing.assert_close(step.std.double(), (1 - ap).sqrt(), **EXACT)


@pytest.mark.needs("diffusers")
@pytest.mark.parametrize("build", [flow_sde, dance_sde, cps])
def test_flow_steps_become_diffusers_step_without_noise(build: Any) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(6)
    in_fp64(scheduler)
    x, pred = draw(2, 2, 3, 4)
    knob = {"eta" if build is dance_sde else "noise_level": 1e-5}
    for i, t in enumerate(scheduler.timesteps[:-1]):
        scheduler._step_index = None
        theirs = scheduler.step(pred.float(), t, x.float()).prev_sample.double()
        torch.testing.assert_close(
            mean_of(build(scheduler, i, **knob), x, pred), theirs, rtol=1e-5, atol=1e-5
        )


@pytest.mark.needs("diffusers")
def test_cps_with_all_noise_fresh_is_diffusers_stochastic_step(monkeypatch: Any) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.schedulers import scheduling_flow_match_euler_discrete as module

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    scheduler.set_timesteps(6)
    x, pred, z = draw(3, 2, 3, 4, dtype=torch.float32)
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: z)
    for i, t in enumerate(scheduler.timesteps[:-1]):
        theirs = scheduler.step(pred, t, x).prev_sample.double()
        step = cps(scheduler, i, noise_level=1.0)
        ours = mean_of(step, x.double(), pred.double()) + step.std.double() * z
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def published_flow(i: int, level: float, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sd3_sde_with_logprob.py, sde_type="sde": mean, standard deviation and its std_dev_t."""
    sigma, dt = SIGMAS[i], SIGMAS[i + 1] - SIGMAS[i]
    shown = SIGMAS[1] if sigma == 1 else sigma
    g = torch.sqrt(sigma / (1 - shown)) * level
    mean = x * (1 + g**2 / (2 * sigma) * dt) + v * (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, g * torch.sqrt(-dt), g


def published_dance(i: int, eta: float, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """flux_step of DanceGRPO, by the score."""
    sigma, dsigma = SIGMAS[i], SIGMAS[i + 1] - SIGMAS[i]
    clean = x - sigma * v
    score = -(x - clean * (1 - sigma)) / sigma**2
    mean = x + dsigma * v - 0.5 * eta**2 * score * dsigma
    return mean, eta * torch.sqrt(-dsigma), torch.tensor(eta, dtype=FP64)


def published_cps(i: int, level: float, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sd3_sde_with_logprob.py, sde_type="cps"."""
    sigma, after = SIGMAS[i], SIGMAS[i + 1]
    std = after * math.sin(level * math.pi / 2)
    clean, noise = x - sigma * v, x + v * (1 - sigma)
    return clean * (1 - after) + noise * torch.sqrt(after**2 - std**2), std, std


@pytest.mark.parametrize(
    ("build", "published", "level"),
    [(flow_sde, published_flow, 0.7), (dance_sde, published_dance, 0.3), (cps, published_cps, 0.7)],
)
def test_flow_steps_are_the_published_ones(build: Any, published: Any, level: float) -> None:
    x, v, ref = draw(3, 2, 3, 4)
    for i in range(5):
        step = build(SIGMAS, i)
        mean, std, g = published(i, level, x, v)
        torch.testing.assert_close(mean_of(step, x, v), mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(step.std.double(), std, **EXACT)
        torch.testing.assert_close(step.dt.double(), SIGMAS[i] - SIGMAS[i + 1], **EXACT)
        moved = mean - published(i, level, x, ref)[0]
        wanted = moved.square().mean((1, 2)) / (2 * g**2)
        found = step.kl(v, ref, kind="published")
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
        assert step.normalized == (build is not cps)
    if build is cps:
        assert torch.equal(cps(SIGMAS, range(5)).weight, torch.ones(5))


def test_sigma_1_is_the_second_inside_g_alone() -> None:
    step = flow_sde(SIGMAS, 0)
    g = 0.7 * (1 / (1 - 0.93)) ** 0.5
    assert step.std.item() == pytest.approx(g * 0.07**0.5, rel=1e-6)
    assert step.a.item() == pytest.approx(1 - g**2 * 0.07 / 2, rel=1e-6)
    assert step.b.item() == pytest.approx(-0.07, rel=1e-6)


def told(predicts: str, signal: Tensor, noise: Tensor, x0: Tensor, n: Tensor) -> Tensor:
    r = (signal**2 + noise**2).sqrt()
    return {
        "epsilon": n,
        "sample": x0,
        "velocity": n - x0,
        "flow_prediction": n - x0,
        "v_prediction": (signal * n - noise * x0) / r,
    }[predicts]


@builders
def test_every_prediction_of_the_same_point_gives_the_same_mean(name: str) -> None:
    build, levels = BUILDERS[name]
    flow = levels is SIGMAS
    x0, n = draw(2, 2, 7)
    kinds = ["velocity", "flow_prediction", "sample", "epsilon"]
    for i in range(1, len(levels) - 1):
        noise = levels[i] if levels is not RISING else (1 - levels[i]).sqrt()
        signal = {id(SIGMAS): 1 - levels[i], id(RISING): levels[i].sqrt()}.get(
            id(levels), torch.ones((), dtype=FP64)
        )
        x = signal * x0 + noise * n
        means = [
            mean_of(build(levels, i, prediction_type=kind), x, told(kind, signal, noise, x0, n))
            for kind in (kinds if flow else ["epsilon", "v_prediction", "sample"])
        ]
        for other in means[1:]:
            torch.testing.assert_close(other, means[0], rtol=1e-5, atol=1e-5)


@builders
def test_mixed_steps(name: str) -> None:
    build, levels = BUILDERS[name]
    wanted = [2, 0, 2, 1]
    whole = [build(levels, i) for i in wanted]
    for step in (wanted, tuple(wanted), torch.tensor(wanted), torch.tensor(wanted).int()):
        mixed = build(levels.float(), step)
        for field, *rows in zip(mixed[:5], *(t[:5] for t in whole), strict=True):
            assert (field.shape, field.dtype) == ((4,), torch.float32)
            torch.testing.assert_close(field, torch.stack(rows), rtol=1e-5, atol=1e-6)
    assert all(field.shape == () for field in build(levels, torch.tensor(1))[:5])
    mixed, (x, pred, other, after) = build(levels, wanted), draw(4, 4, 3, 2)
    for i in range(4):
        row = slice(i, i + 1)
        alone, part = whole[i], (x[row], pred[row], after[row])
        torch.testing.assert_close(mixed.log_prob(x, pred, after)[row], alone.log_prob(*part))
        torch.testing.assert_close(mixed.kl(pred, other)[row], alone.kl(pred[row], other[row]))
        assert torch.equal(mixed.select(row).a, alone.a[None])
    assert torch.equal(mixed.select([3, 1]).std, mixed.std[[3, 1]])
    assert torch.equal(mixed.select(torch.tensor([True, False, False, True])).b, mixed.b[[0, 3]])
    assert mixed.select(2).b.shape == ()
    assert all(map(operator.is_, whole[0].select([5])[:5], whole[0][:5]))
    of_both = mixed._replace(a=whole[0].a)
    assert of_both.select([3, 1]).a is whole[0].a
    assert torch.equal(of_both.select([3, 1]).std, mixed.std[[3, 1]])
    with pytest.raises(TypeError):
        mixed.to(torch.bfloat16)  # type: ignore[arg-type]
    assert mixed.to("meta").weight.device.type == "meta"
    assert mixed.to("cpu").normalized == mixed.normalized


@builders
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_log_prob_is_that_of_a_normal_distribution(name: str, reduction: str) -> None:
    build, levels = BUILDERS[name]
    step = build(levels, [0, 1, 2])
    step = step._replace(**{key: getattr(step, key).double() for key in FIELDS})
    x, pred, after, old = draw(4, 3, 4, 5)
    a, b, std = (f.reshape(3, 1, 1) for f in step[:3])
    if name == "cps":
        each = -((after - a * x - b * pred) ** 2)
    else:
        each = Normal(a * x + b * pred, std).log_prob(after)
    wanted = each.mean((1, 2)) if reduction == "mean" else each.sum((1, 2))
    found = step.log_prob(x, pred, after, reduction=reduction)  # type: ignore[arg-type]
    torch.testing.assert_close(found, wanted, rtol=2e-7, atol=2e-7)  # of fp32 weights
    ratio = step.log_ratio(x, pred, old, after, reduction=reduction)  # type: ignore[arg-type]
    before = step.log_prob(x, old, after, reduction=reduction)  # type: ignore[arg-type]
    torch.testing.assert_close(ratio, found - before, rtol=1e-9, atol=1e-9)


@builders
def test_gradients(name: str) -> None:
    build, levels = BUILDERS[name]
    step = build(levels, [0, 2])
    x, pred, other, after = draw(4, 2, 3, 2)
    pred.requires_grad_()
    for f in (
        lambda p: step.log_prob(x, p, after),
        lambda p: step.log_ratio(x, p, other, after),
        lambda p: step.log_ratio(x, p, other, after, reduction="sum"),
        lambda p: step.kl(p, other, kind="gaussian"),
        lambda p: step.kl(p, other),
    ):
        assert torch.autograd.gradcheck(f, pred)
    everything = [t.clone().requires_grad_() for t in (x, other, after)]
    step.log_ratio(everything[0], pred, *everything[1:]).sum().backward()
    assert [t.grad for t in everything] == [None] * 3


@builders
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pred_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ratio_is_exactly_1_at_the_first_update(
    name: str, dtype: torch.dtype, pred_dtype: torch.dtype
) -> None:
    build, levels = BUILDERS[name]
    step = build(levels, [0, 2, 1, 1])
    x, pred = draw(4, 3, 16, 16, dtype=dtype), draw(4, 3, 16, 16, dtype=pred_dtype)
    after = step.sample(x, pred)
    assert after.dtype == dtype
    rolled = step.log_prob(x, pred, after)
    again = pred.clone().requires_grad_()
    ratio = step.log_ratio(x, again, pred, after.clone())
    assert torch.equal(ratio, torch.zeros(4))
    assert not ratio.signbit().any()
    assert torch.equal(step.log_prob(x, again, after.clone()) - rolled, torch.zeros(4))
    assert torch.equal(step.log_ratio(x, pred, pred, after), torch.zeros(4))  # one tensor
    for kind in ("x", "v", "gaussian", "published"):
        assert torch.equal(step.kl(pred, pred.clone(), kind=kind), torch.zeros(4))
    if dtype == pred_dtype == torch.float32 and name != "cps":
        (grad,) = torch.autograd.grad(ratio.sum(), again)
        a, b, std = (f.reshape(4, 1, 1, 1) for f in step[:3])
        z = (after - a * x - b * pred) / std
        torch.testing.assert_close(grad, b / std * z / x[0].numel(), rtol=1e-4, atol=1e-6)


def test_product_form_where_the_difference_fails() -> None:
    """Against 50 digits: a policy that moved by 1e-4, at the start of a trajectory."""
    step = flow_sde(SIGMAS, 0)
    x, old, drift = draw(3, 1, 4, 32, 32, dtype=torch.float32)
    pred = old + 1e-4 * drift
    after = step.sample(x, old)
    found = step.log_ratio(x, pred, old, after).item()
    naive = (step.log_prob(x, pred, after) - step.log_prob(x, old, after)).item()
    with mp.workdps(50):
        a, b, weight = (mpf(f.item()) for f in (step.a, step.b, step.weight))
        numbers = (t.flatten().double().tolist() for t in (x, pred, old, after))
        wanted = mpf(0)
        for at, p, o, to in zip(*numbers, strict=True):
            rest = mpf(to) - a * mpf(at)
            wanted -= weight * ((rest - b * mpf(p)) ** 2 - (rest - b * mpf(o)) ** 2)
        wanted /= x.numel()
        ours, theirs = (float(abs(mpf(value) - wanted)) for value in (found, naive))
        size = float(abs(wanted))
    assert ours < 1e-11
    assert ours < 1e-4 * size
    assert theirs > 1e-8
    assert theirs > 1e3 * ours


def test_kinds_of_kl() -> None:
    x, pred, ref = draw(3, 4, 3, 5)
    for build, levels in BUILDERS.values():
        step = build(levels, [0, 1, 2, 1])
        b, std = (f.double().reshape(4, 1, 1) for f in (step.b, step.std))
        square = (pred - ref).square()
        normals = [Normal(mean_of(step, x, p), std) for p in (pred, ref)]
        gaussian = kl_divergence(*normals).mean((1, 2))
        wanted = {
            "x": (b**2 * square).mean((1, 2)),
            "v": square.mean((1, 2)),
            "gaussian": gaussian,
            "published": gaussian * (step.dt.double() if build is not cps else 1),
        }
        for kind, value in wanted.items():
            found = step.kl(pred, ref, kind=kind)
            torch.testing.assert_close(found, value, rtol=1e-6, atol=0)
            torch.testing.assert_close(
                step.kl(pred.float(), ref.float(), kind=kind), value.float(), rtol=1e-4, atol=0
            )
            torch.testing.assert_close(
                step.kl_weight(kind).double() * square.mean((1, 2)), value, rtol=1e-6, atol=0
            )
    assert torch.equal(step.kl(pred, ref), step.kl(pred, ref, "v"))


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("dead", [[True, True], [False, True]])
def test_rows_without_noise_contribute_0(dead: list[bool], normalized: bool) -> None:
    step = flow_sde(SIGMAS, [1, 2])
    off = torch.tensor(dead)
    for bad in (0.0, math.inf, math.nan):
        filler = {key: 0.0 if key == "std" else bad for key in FIELDS}
        broken = {key: getattr(step, key).masked_fill(off, filler[key]) for key in FIELDS}
        t = Transition(**broken, normalized=normalized)
        alive = step._replace(normalized=normalized)
        x, pred, old, after = draw(4, 2, 3, 2, dtype=torch.float32)
        pred.requires_grad_()
        pairs = [(s.log_prob(x, pred, after), s.log_ratio(x, pred, old, after)) for s in (t, alive)]
        pairs = [*zip(*pairs, strict=True)]
        for kind in get_args(Kind):
            pairs.append((t.kl(pred, old, kind), alive.kl(pred, old, kind)))
        for found, wanted in pairs:
            assert torch.equal(found, wanted.masked_fill(off, 0.0))
            (grad,) = torch.autograd.grad(found.sum(), pred, retain_graph=True)
            (whole,) = torch.autograd.grad(wanted.sum(), pred, retain_graph=True)
            assert torch.equal(grad, whole.masked_fill(off[:, None, None], 0.0))


@builders
def test_a_step_without_noise_is_refused_on_the_host_alone(name: str) -> None:
    build, levels = BUILDERS[name]
    still = torch.cat([levels, levels[-1:]])  # a step of no length at the end
    last = len(levels) - 1
    if name in ("lcm", "euler_ancestral"):
        still[-1] = 1.0 if name == "lcm" else 0.0
    what = "has no length" if levels is SIGMAS else "adds no noise"
    for step in (last, [0, last]):
        with pytest.raises(ValueError, match=f"step contains {last}, at which {name} {what}"):
            build(still, step)
    assert build(still, [0, last - 1]).std.min() > 0
    knob = {"ddim": "eta", "dance_sde": "eta", "flow_sde": "noise_level", "cps": "noise_level"}
    if name in knob:
        with pytest.raises(ValueError, match=f"step contains 1, at which {name} adds no noise"):
            build(levels, 1, **{knob[name]: 0.0})
    assert build(still.to("meta"), [0, last]).std.device.type == "meta"
    assert build(still, torch.tensor([0, last], device="meta")).a.shape == (2,)

    def sampled(steps: Tensor) -> tuple[Tensor, ...]:
        return tuple(build(still, steps)[:5])

    compiled = torch.compile(sampled, backend="eager", fullgraph=True)
    _, _, std, _, weight = compiled(torch.tensor([0, last]))
    assert std[0] > 0
    assert weight[0] > 0
    if name != "cps":  # which noises even where it goes nowhere
        assert std[1] == 0
        assert weight[1] == 0


def test_sampling() -> None:
    step = flow_sde(SIGMAS, [1, 2, 3])
    x, pred = draw(2, 3, 4, 5, dtype=torch.bfloat16)
    seeds = [torch.Generator().manual_seed(i) for i in range(3)]
    together = step.sample(x, pred, seeds)
    for i in range(3):
        alone = step.select([i]).sample(
            x[i : i + 1], pred[i : i + 1], torch.Generator().manual_seed(i)
        )
        assert torch.equal(alone[0], together[i])
    one = step.sample(x, pred, torch.Generator().manual_seed(5))
    assert one.dtype == torch.bfloat16
    wide = step.sample(x, pred, torch.Generator().manual_seed(5), dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert torch.equal(wide.bfloat16(), one)
    z = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(5))
    a, b, std = (f.reshape(3, 1, 1) for f in step[:3])
    torch.testing.assert_close(wide, a * x.float() + b * pred.float() + std * z)
    torch.manual_seed(3)
    first = step.sample(x.double(), pred)
    torch.manual_seed(3)
    assert torch.equal(first, step.sample(x.double(), pred))
    assert first.dtype == FP64
    grown = pred.float().requires_grad_()
    (grad,) = torch.autograd.grad(step.sample(x.float(), grown).sum(), grown)
    torch.testing.assert_close(grad, b.expand(3, 4, 5))
    many = flow_sde(SIGMAS, 1)
    x, pred = torch.zeros(2, 2, 50_000)
    drawn = many.sample(x, pred)
    assert drawn.std().item() == pytest.approx(many.std.item(), rel=0.02)


@builders
def test_compiled_transformed_and_under_autocast(name: str) -> None:
    build, levels = BUILDERS[name]
    x, pred, old, after = draw(4, 2, 3, 4, dtype=torch.float32)
    steps = torch.tensor([0, 2])

    def losses(pred: Tensor) -> tuple[Tensor, ...]:
        t = build(levels, steps)
        ratio, drift = t.log_ratio(x, pred, old, after), t.kl(pred, old, "published")
        return t.log_prob(x, pred, after), ratio, drift, t.kl(pred, old)

    wanted = losses(pred)
    compiled = torch.compile(losses, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(pred), wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(losses(pred), wanted, rtol=0, atol=0)
    found = torch.func.grad(lambda p: sum(v.sum() for v in losses(p)))(pred)
    grown = pred.clone().requires_grad_()
    (grad,) = torch.autograd.grad(torch.stack(losses(grown)).sum(), grown)
    torch.testing.assert_close(found, grad)


def test_one_step_of_the_host_serves_any_device() -> None:
    """What an int makes lies on the CPU; numbers there multiply tensors anywhere, and nothing is
    moved. Fake tensors check devices without having any."""
    step = flow_sde(SIGMAS, 1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, pred, old, after = (torch.empty(2, 3, 4, device="cuda") for _ in range(4))
        fields: dict[str, Any] = {key: torch.empty(2, device="cuda") for key in FIELDS}
        for t in (step, step._replace(**fields)):
            made = [t.log_prob(x, pred, after), t.log_ratio(x, pred, old, after)]
            made += [t.kl(pred, old, kind) for kind in get_args(Kind)]
            made += [t.sample(x, pred), t.sample(x, pred, torch.Generator())]
            assert {value.device.type for value in made} == {"cuda"}


@pytest.mark.gpu
@builders
def test_nothing_waits_for_the_device(name: str) -> None:
    build, levels = BUILDERS[name]
    x, pred, old, after = (t.cuda() for t in draw(4, 3, 4, 5, dtype=torch.float32))
    steps, there = torch.tensor([0, 2, 1]), levels.cuda()
    wanted = build(levels, steps)
    on_device = steps.cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = [build(levels, on_device), build(there, on_device)]
        made += [build(levels, 1), build(there, 1)]
        for t in made:
            t.log_prob(x, pred, after)
            t.log_ratio(x, pred, old, after)
            t.kl(pred, old, "gaussian")
            t.sample(x, pred)
            t.sample(x, pred, torch.Generator("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for t in made[:2]:
        torch.testing.assert_close(torch.stack(t[:5]).cpu(), torch.stack(wanted[:5]))
        here = wanted.log_ratio(x.cpu(), pred.cpu(), old.cpu(), after.cpu())
        torch.testing.assert_close(t.log_ratio(x, pred, old, after).cpu(), here)


def test_numbers_are_those_of_the_schedule_in_fp64() -> None:
    """An fp32 schedule is not rounded again on the way: a small difference of levels stays one."""
    sigmas = torch.tensor([0.9, 0.9 - 1e-4, 0.5])
    step = dance_sde(sigmas, 0)
    dt = float(sigmas[0].double() - sigmas[1].double())
    assert step.dt.item() == pytest.approx(dt, rel=1e-7)
    assert step.std.item() == pytest.approx(0.3 * dt**0.5, rel=1e-7)


def test_rounding_leaves_no_negative_variance() -> None:
    """Nearly clean, all noise is fresh; of these levels rounding would make it more than all."""
    levels = torch.tensor([0.3867117841087619, 0.9999999999999999], dtype=FP64)
    step = ddim(levels, 0)
    assert step.std.item() == pytest.approx(math.sqrt(2**-53), rel=1e-6)
    assert step.a.item() == pytest.approx(levels[0].item() ** -0.5, rel=1e-6)


def test_a_prediction_type_comes_from_the_scheduler() -> None:
    scheduler = SimpleNamespace(
        alphas_cumprod=ABAR, timesteps=torch.tensor([981, 481]), num_inference_steps=2,
        config=SimpleNamespace(prediction_type="v_prediction", num_train_timesteps=1000),
    )  # fmt: skip
    for build in (ddim, lcm):
        by_default = build(scheduler, 0)
        assert by_default.a == build(scheduler, 0, prediction_type="v_prediction").a
        assert by_default.a != build(scheduler, 0, prediction_type="epsilon").a
    assert ddim(RISING, 1).a == ddim(RISING, 1, prediction_type="epsilon").a
    t = torch.stack(ddim(scheduler, 0)[:5])
    wanted = ddim(ABAR[[981, 481]], 0, prediction_type="v_prediction")
    torch.testing.assert_close(t, torch.stack(wanted[:5]))


def scheduler_with(**changes: Any) -> SimpleNamespace:
    made = {
        "alphas_cumprod": ABAR, "timesteps": torch.tensor([981, 481]), "num_inference_steps": 2,
        "config": SimpleNamespace(num_train_timesteps=1000),
    }  # fmt: skip
    return SimpleNamespace(**{**made, **changes})


@pytest.mark.parametrize(
    ("build", "schedule", "step", "options", "error", "message"),
    [
        (ddim, RISING, 4, {}, ValueError, "step contains 4; expected 0 to 3"),
        (ddim, RISING, -1, {}, ValueError, "step contains -1; expected 0 to 3"),
        (ddim, RISING, [0, 9], {}, ValueError, "step contains 9"),
        (ddim, RISING, True, {}, TypeError, "step must be an int, or a tensor or sequence"),
        (ddim, RISING, 1.0, {}, TypeError, "step must be an int, .* got a float"),
        (ddim, RISING, [1.0], {}, TypeError, r"step contains \[1.0\]; expected ints"),
        (ddim, RISING, torch.tensor([1.0]), {}, TypeError, "step has dtype torch.float32"),
        (ddim, RISING, torch.tensor([[1]]), {}, ValueError, r"step has shape \(1, 1\)"),
        (ddim, RISING, 1, {"eta": 5.0}, ValueError, "step contains 1, where ddim would have"),
        (ddim, RISING, 1, {"eta": -1.0}, ValueError, "eta is -1.0; expected a finite number, 0"),
        (ddim, RISING, 1, {"eta": "1"}, TypeError, "eta must be a float, got a str"),
        (ddim, RISING, 1, {"prediction_type": "velocity"}, ValueError, "ddim expects one of 'eps"),
        (ddim, RISING.flip(0), 1, {}, ValueError, r"alphas_cumprod from 0.99 to 0.004 along"),
        (ddim, RISING * 2, 1, {}, ValueError, "expected values in"),
        (ddim, RISING.half(), 1, {}, TypeError, "alphas_cumprod in torch.float16"),
        (ddim, RISING[None], 1, {}, ValueError, "expected one dimension"),
        (ddim, RISING[:1], 0, {}, ValueError, r"expected \(n \+ 1,\)"),
        (ddim, [0.1, 0.2], 0, {}, TypeError, "schedule is a list without tensors alphas_cumprod"),
        (ddim, scheduler_with(num_inference_steps=None), 0, {}, ValueError, "set_timesteps was"),
        (
            ddim, scheduler_with(config=SimpleNamespace(clip_sample=True)), 0, {}, ValueError,
            "schedule has clip_sample=True in its config; expected False",
        ),
        (
            lcm, scheduler_with(config=SimpleNamespace(thresholding=True)), 0, {}, ValueError,
            "schedule has thresholding=True",
        ),
        (
            ddim, scheduler_with(timesteps=torch.tensor([981.5, 3.0])), 0, {}, ValueError,
            "timesteps from 981.5 to 3; expected integers from 0 to 999",
        ),
        (lcm, scheduler_with(timesteps=torch.tensor([3, 981])), 0, {}, ValueError, "never fall"),
        (lcm, RISING, 1, {"prediction_type": "velocity"}, ValueError, "lcm expects one of"),
        (flow_sde, SIGMAS, 5, {}, ValueError, "step contains 5; expected 0 to 4"),
        (flow_sde, SIGMAS.flip(0), 1, {}, ValueError, "sigmas from 0.1 to 1; expected none below"),
        (flow_sde, ANCESTRAL, 1, {}, ValueError, "expected none above 1, those of a flow model"),
        (flow_sde, SIGMAS - 0.5, 1, {}, ValueError, "none below 0"),
        (flow_sde, SIGMAS * math.nan, 1, {}, ValueError, "sigmas from nan"),
        (flow_sde, SIGMAS.bfloat16(), 1, {}, TypeError, "sigmas in torch.bfloat16"),
        (flow_sde, SIGMAS, 1, {"noise_level": math.inf}, ValueError, "noise_level is inf"),
        (flow_sde, SIGMAS, 1, {"prediction_type": "v_prediction"}, ValueError, "'velocity', 'flo"),
        (flow_sde, SIGMAS, 0, {"prediction_type": "epsilon"}, ValueError, "says nothing of x0 at"),
        (flow_sde, torch.ones(3), 0, {}, ValueError, "step contains 0, "),
        (flow_sde, scheduler_with(), 0, {}, TypeError, "without a tensor sigmas"),
        (
            flow_sde, scheduler_with(sigmas=SIGMAS, timesteps=SIGMAS), 0, {}, ValueError,
            "expected a scheduler on which set_timesteps was called",
        ),
        (dance_sde, SIGMAS, 1, {"eta": math.nan}, ValueError, "eta is nan"),
        (cps, SIGMAS, 1, {"noise_level": 1.5}, ValueError, r"expected a number in \[0, 1\]"),
        (cps, SIGMAS, 1, {"prediction_type": None}, ValueError, "'epsilon'"),
        (euler_ancestral, ANCESTRAL.flip(0), 1, {}, ValueError, "expected none below 0 and no"),
        (
            euler_ancestral, scheduler_with(sigmas=ANCESTRAL, num_inference_steps=None), 0, {},
            ValueError, "set_timesteps was called",
        ),
        (
            euler_ancestral, scheduler_with(sigmas=SIGMAS, timesteps=SIGMAS[:-1]), 1, {},
            ValueError, "sigmas from 1 to .*, those of a flow model",
        ),
    ],
)  # fmt: skip
def test_bad_input_to_builders(
    build: Any, schedule: Any, step: Any, options: Any, error: Any, message: str
) -> None:
    if build is cps and options.get("prediction_type", "") is None:
        assert cps(schedule, step, prediction_type="epsilon").std == cps(schedule, step).std
        return
    with pytest.raises(error, match=message):
        build(schedule, step, **options)


def test_steps_are_read_whatever_the_default_device() -> None:
    with torch.device("meta"):
        assert torch.equal(
            flow_sde(SIGMAS, [1, 2]).a, flow_sde(SIGMAS, SIGMAS.new_tensor([1, 2]).int()).a
        )
        with pytest.raises(ValueError, match="step contains 5; expected 0 to 4"):
            flow_sde(SIGMAS, 5)


def test_bad_input_to_methods() -> None:
    step: Any = flow_sde(SIGMAS, [1, 2])
    x, pred, old, after = draw(4, 2, 3)
    for call, error, message in (
        (lambda: step.log_prob(x.tolist(), pred, after), TypeError, "x must be a torch.Tensor"),
        (lambda: step.log_prob(x, pred.int(), after), TypeError, "pred has dtype torch.int32"),
        (lambda: step.log_prob(x, pred, after[:, :2]), ValueError, r"x_next is \(2, 2\) on cpu"),
        (lambda: step.log_prob(x[0], pred[0], after[0]), ValueError, r"x has shape \(3,\)"),
        (lambda: step.kl(pred[:1], old[:1]), ValueError, r"pred has shape \(1, 3\); expected \(2,"),
        (lambda: step.kl(pred, old, "kl"), ValueError, "kind is 'kl'; expected one of 'x', 'v'"),
        (lambda: step.kl_weight("w"), ValueError, "kind is 'w'"),
        (lambda: step.log_prob(x, pred, after, reduction="max"), ValueError, "reduction is 'max'"),
        (
            lambda: step.to("meta").kl(pred, old), ValueError,
            r"pred is on cpu, but the transition is on meta; .* transition.to\('cpu'\)",
        ),
        (lambda: step.sample(x, pred, dtype=torch.int8), TypeError, "dtype is torch.int8"),
        (lambda: step.sample(x, pred, 3), TypeError, "generator must be a torch.Generator or"),
        (
            lambda: step.sample(x, pred, [torch.Generator()]), ValueError,
            "generator has 1 generators; expected one for each of 2 samples",
        ),
        (
            lambda: step.sample(x, pred, SimpleNamespace()), TypeError,
            "got a SimpleNamespace",
        ),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()  # type: ignore[no-untyped-call]
    empty, whole = draw(0, 3), flow_sde(SIGMAS, 1)
    assert whole.kl(empty, empty).shape == (0,)
    assert whole.log_prob(empty, empty, empty, reduction="sum").shape == (0,)


def test_it_is_exported() -> None:
    assert fastpref.transitions.Transition is Transition
    assert "transitions" in vars(fastpref)["__all__"]
