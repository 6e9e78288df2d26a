"""Inversion against a model that is known in closed form: data N(mean, std^2), whose best
prediction and probability-flow ODE are both formulas."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastpref.inversion import (
    Model,
    PredictionType,
    ddim_inversion,
    inversion_target,
    renoise_inversion,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import inversion_error

T = 1000
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, T, dtype=torch.float64) ** 2  # SDXL's
ABAR = (1 - BETAS).cumprod(0)
ANGLES = ABAR.sqrt().acos().tolist()
EPSILON: dict[str, Any] = {"schedule": ABAR, "prediction_type": "epsilon"}
DATA = [(0.0, 1.0), (0.3, 0.5), (0.5, 2.0)]  # narrower than the noise, as wide, wider


def gaussian(mean: float, std: float, predicts: PredictionType = "epsilon") -> Model:
    """The best model of N(mean, std^2): what it predicts is a posterior mean."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        abar = ABAR.to(x.device)[t].reshape(-1, *[1] * (x.dim() - 1))
        spread = abar * std**2 + 1 - abar
        clean = (abar.sqrt() * std**2 * x + (1 - abar) * mean) / spread
        eps = (1 - abar).sqrt() * (x - abar.sqrt() * mean) / spread
        v = abar.sqrt() * eps - (1 - abar).sqrt() * clean
        return {"epsilon": eps, "v_prediction": v, "sample": clean}[predicts].to(x.dtype)

    return model


def draw(mean: float, std: float, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (mean + std * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def ode_solution(clean: Tensor, t: int, mean: float, std: float) -> Tensor:
    """Along the ODE a sample keeps its place in the distribution, counted in deviations."""
    abar = ABAR[t]
    place = (clean - mean) / std
    return abar.sqrt() * mean + (abar * std**2 + 1 - abar).sqrt() * place


def grid(t: int, num_steps: int) -> list[int]:
    """Where a walk from clean (-1) to t stops, both ends included."""
    stops = [-1]
    for k in range(1, num_steps + 1):
        wanted = (k / num_steps) ** 1.5 * ANGLES[t]
        stops.append(min(range(t + 1), key=lambda i: abs(ANGLES[i] - wanted)))
    return stops


def level(t: int) -> Tensor:
    return ABAR[t] if t >= 0 else torch.ones((), dtype=torch.float64)


def ddim_sample(model: Model, x: Tensor, t: int, num_steps: int) -> Tensor:
    """Deterministic DDIM sampling from t to clean, arXiv:2010.02502 eq. 12, on the same grid."""
    stops = grid(t, num_steps)
    for low, high in reversed(list(pairwise(stops))):
        eps = model(x, torch.full((len(x),), high))
        clean = (x - (1 - level(high)).sqrt() * eps) / level(high).sqrt()
        x = level(low).sqrt() * clean + (1 - level(low)).sqrt() * eps
    return x


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def zero(x: Tensor, t: Tensor) -> Tensor:
    return torch.zeros_like(x)


@pytest.mark.parametrize("data", inversion_error.DATA)
def test_nearer_to_the_ode_than_the_official_codes(data: str) -> None:
    """At 10 steps, on one Gaussian and on several, whatever diffusers those codes run on. DDIM's
    error over all timesteps only: at one of them, theirs may happen to cancel."""
    times = (0, 11, 101, 301, 302, 501, 701, 901, 999)
    found = [inversion_error.errors(inversion_error.DATA[data], t, 50) for t in times]
    for off in found:
        assert off["renoise_inversion"] < 0.1, off
        for other in ("SmPO, diffusers 0.20", "SmPO, diffusers 0.22", "ReNoise, even in t"):
            assert off["renoise_inversion"] < 0.7 * off[other], off
    mean = {name: sum(off[name] for off in found) / len(found) for name in found[0]}
    for other in ("InPO, diffusers 0.20", "InPO, diffusers 0.22", "DDIM, even in t"):
        assert mean["ddim_inversion"] < 0.7 * mean[other], mean


def test_solution_of_the_benchmark() -> None:
    data = inversion_error.DATA["N(0.3, 0.5^2)"]
    clean = data.draw(20)
    for t in (0, 300, 999):
        exact = ode_solution(clean, t, 0.3, 0.5)
        torch.testing.assert_close(data.solution(clean, t), exact, rtol=0, atol=1e-5)


@pytest.mark.needs("diffusers")
@pytest.mark.parametrize("t", [350, 999])
def test_official_walk_of_the_benchmark_is_diffusers(t: int) -> None:
    inverse = sdxl_scheduler(
        "DDIMInverseScheduler", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    inverse.set_timesteps(10)
    data = inversion_error.DATA["8 modes of 0.3 in 16-D"]
    clean = x = renoised = data.draw(20)
    for stop in inverse.timesteps[inverse.timesteps < t]:
        told = stop.repeat(20)
        x = inverse.step(data(x, told), stop, x).prev_sample
        first = data(renoised, told)
        second = data(inverse.step(first, stop, renoised).prev_sample, told)
        renoised = inverse.step((first + second) / 2, stop, renoised).prev_sample
    for evals, expected in ((1, x), (2, renoised)):
        found = inversion_error.official_new(data, clean, t, evals)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def errors_of(
    invert: Callable[..., Any], mean: float, std: float, all_steps: tuple[int, ...]
) -> Tensor:
    """Root mean square, (steps, timesteps)."""
    clean, times = draw(mean, std, 3, 400), torch.tensor([999, 600, 300])
    exact = torch.stack(
        [ode_solution(x, int(t), mean, std) for x, t in zip(clean, times, strict=True)]
    )
    found = [
        invert(gaussian(mean, std), clean, times, **EPSILON, num_steps=num_steps).noisy
        for num_steps in all_steps
    ]
    return torch.stack([(x - exact).square().mean(1).sqrt() for x in found])


@pytest.mark.parametrize(("mean", "std"), DATA)
def test_renoise_is_of_second_order(mean: float, std: float) -> None:
    errors = errors_of(renoise_inversion, mean, std, (20, 40, 80, 160))
    assert (errors[:-1] > 3 * errors[1:]).all(), errors
    assert (errors[-1] < 1e-3).all(), errors


def test_ddim_is_of_first_order() -> None:
    """Down to single timesteps, of which no middle is known."""
    errors = errors_of(ddim_inversion, 0.5, 2.0, (10, 20, 40, 80))[:, 0]
    for coarse, fine in pairwise(errors):
        assert 1.8 < coarse / fine < 2.1, errors
    for mean, std in DATA:
        assert (errors_of(ddim_inversion, mean, std, (225,)) < 0.01).all()


@pytest.mark.parametrize(("mean", "std"), DATA)
@pytest.mark.parametrize("t", [999, 600, 201, 3])
def test_sampling_back(t: int, mean: float, std: float) -> None:
    """The sampler returns to x0 in the limit of many steps, and exactly when ReNoise's fixed point
    is reached."""
    model, clean, times = gaussian(mean, std), draw(mean, std, 1, 500), torch.tensor([t])

    def missed(num_steps: int, **options: Any) -> float:
        noisy = renoise_inversion(
            model, clean, times, **EPSILON, num_steps=num_steps, **options
        ).noisy
        return rms(ddim_sample(model, noisy, t, num_steps) - clean)

    assert missed(300) < 0.1 * missed(10) or t < 300
    assert missed(300) < 0.02
    nearer = [missed(10, num_evals=n, average_last=1) for n in (2, 4, 8, 300)]
    assert all(after < max(before, 1e-12) for before, after in pairwise(nearer)), nearer
    assert nearer[-1] < 1e-12


def test_renoise_step_in_full() -> None:
    """Two predictions, one where the step starts and one where the first would lead, averaged. The
    first step starts from clean latents, which hold no noise."""
    model, clean = gaussian(0.3, 0.5), draw(0.3, 0.5, 2, 7)
    (_, a, b), t = grid(400, 2), torch.tensor([400, 400])

    def step(x: Tensor, eps: Tensor, low: int, high: int) -> Tensor:
        start = (x - (1 - level(low)).sqrt() * eps) / level(low).sqrt()
        return level(high).sqrt() * start + (1 - level(high)).sqrt() * eps

    def expected(num_evals: int, last: int) -> Tensor:
        x = clean
        for low, high in ((-1, a), (a, b)):
            noises = [model(x, torch.tensor([low, low])) if low >= 0 else torch.zeros_like(x)]
            for _ in range(num_evals - 1):
                noises.append(model(step(x, noises[-1], low, high), torch.tensor([high, high])))
            x = step(x, sum(noises[-last:], torch.zeros_like(x)) / last, low, high)
        return x

    def noisy(**options: Any) -> Tensor:
        return renoise_inversion(model, clean, t, **EPSILON, num_steps=2, **options).noisy

    for num_evals, last, options in (
        (2, 2, {}),
        (3, 3, {"num_evals": 3}),
        (3, 2, {"num_evals": 3, "average_last": 2}),
        (3, 1, {"num_evals": 3, "average_last": 1}),
    ):
        torch.testing.assert_close(noisy(**options), expected(num_evals, last))
    assert not torch.allclose(noisy(), noisy(average_last=1))


def test_ddim_step_in_full() -> None:
    """The model is told the middle of a step; half of its noise counts in the first."""
    model, clean = gaussian(0.3, 0.5), draw(0.3, 0.5, 2, 7)
    _, a, b = grid(400, 2)
    x = level(a).sqrt() * clean + (1 - level(a)).sqrt() * model(clean, torch.tensor([a, a])) / 2
    eps = model(x, torch.tensor([(a + b) // 2] * 2))
    x0 = (x - (1 - level(a)).sqrt() * eps) / level(a).sqrt()
    x = level(b).sqrt() * x0 + (1 - level(b)).sqrt() * eps
    found = ddim_inversion(model, clean, torch.tensor([b, b]), **EPSILON, num_steps=2)
    torch.testing.assert_close(found.noisy, x)


def test_renoise_with_one_evaluation_is_ddim() -> None:
    model, clean, times = gaussian(0.3, 0.5), draw(0.3, 0.5, 2, 7), torch.tensor([400, 30])
    renoise = renoise_inversion(model, clean, times, **EPSILON, num_evals=1)
    assert torch.equal(renoise.noisy, ddim_inversion(model, clean, times, **EPSILON).noisy)


def test_what_the_model_is_told() -> None:
    """Each sample has its own grid of real timesteps, the last of which is its own."""
    calls: list[tuple[Tensor, Tensor]] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        calls.append((x, t))
        return torch.zeros_like(x)

    targets = [999, 3, 0, 47]
    latents = torch.ones(4, 2, 3, dtype=torch.bfloat16)
    times = torch.tensor(targets, dtype=torch.int16)
    stops = torch.tensor([grid(t, 10) for t in targets]).T
    assert stops[1:].min() == 0
    ends, middles = stops[1:], (stops[1:-1] + stops[2:]) // 2
    renoised = [ends[:1].expand(2, 4)]
    renoised += [torch.stack([low, high, high]) for low, high in pairwise(ends)]
    cases: list[tuple[Callable[..., Any], dict[str, Any], Tensor]] = [
        (ddim_inversion, {}, torch.cat([ends[:1], middles])),
        (renoise_inversion, {"num_evals": 3}, torch.cat(renoised)),
    ]
    for invert, options, expected in cases:
        calls.clear()
        invert(model, latents, times, ABAR, num_steps=10, prediction_type="epsilon", **options)
        assert all(x.dtype == torch.bfloat16 and x.shape == latents.shape for x, _ in calls)
        assert all(t.dtype == torch.int64 and t.shape == (4,) for _, t in calls)
        assert torch.equal(torch.stack([t for _, t in calls]), expected)


@pytest.mark.parametrize("invert", [ddim_inversion, renoise_inversion])
def test_samples_are_walked_as_if_alone(invert: Callable[..., Any]) -> None:
    model, clean = gaussian(0.3, 0.5), draw(0.3, 0.5, 5, 4, 8, 8, dtype=torch.float32)
    times = torch.tensor([999, 0, 4, 321, 800])
    together = invert(model, clean, times, **EPSILON)
    for i in range(5):
        alone = invert(model, clean[i : i + 1], times[i : i + 1], **EPSILON)
        assert torch.equal(together.noisy[i], alone.noisy[0])
        assert torch.equal(together.target[i], alone.target[0])
    assert rms(together.noisy[0] - together.noisy[4]) > 0.1


@pytest.mark.parametrize("predicts", ["v_prediction", "sample"])
@pytest.mark.parametrize("invert", [ddim_inversion, renoise_inversion])
def test_parametrisations_agree(invert: Callable[..., Any], predicts: PredictionType) -> None:
    clean, times = draw(0.3, 0.5, 4, 50), torch.tensor([999, 0, 7, 500])
    abar = ABAR[times][:, None]
    eps = invert(gaussian(0.3, 0.5), clean, times, **EPSILON)
    other = invert(
        gaussian(0.3, 0.5, predicts), clean, times, schedule=ABAR, prediction_type=predicts
    )
    torch.testing.assert_close(other.noisy, eps.noisy, rtol=0, atol=1e-12)
    v = abar.sqrt() * eps.target - (1 - abar).sqrt() * clean
    expected = v if predicts == "v_prediction" else clean
    torch.testing.assert_close(other.target, expected, rtol=0, atol=1e-10)
    tau = inversion_target(other.noisy, clean, times, **EPSILON)
    torch.testing.assert_close(tau, eps.target, rtol=0, atol=1e-10)


EARLY = torch.tensor([0, 1, 2, 10, 500, 999])


def tau_of(noisy: Tensor, latents: Tensor, abar: Tensor = ABAR) -> Tensor:
    abar = abar.double()[EARLY][:, None]
    return (noisy.double() - abar.sqrt() * latents.double()) / (1 - abar).sqrt()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_noisy_is_x0_and_tau(dtype: torch.dtype) -> None:
    """x_t = sqrt(abar) x0 + sqrt(1 - abar) tau; and tau is good to the rounding of its dtype."""
    latents, abar = draw(0.3, 0.8, 6, 500, dtype=dtype), ABAR[EARLY][:, None]
    noisy, target = renoise_inversion(gaussian(0.3, 0.8), latents, EARLY, **EPSILON)
    assert noisy.dtype == target.dtype == dtype
    again = abar.sqrt() * latents.double() + (1 - abar).sqrt() * target.double()
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(again, noisy.double(), rtol=0, atol=4 * unit)
    torch.testing.assert_close(target.double(), tau_of(noisy, latents), rtol=0, atol=80 * unit)
    assert torch.equal(target, inversion_target(noisy, latents, EARLY, **EPSILON))
    exact = torch.stack(
        [ode_solution(x.double(), int(t), 0.3, 0.8) for x, t in zip(latents, EARLY, strict=True)]
    )
    off = (target - tau_of(exact, latents)).norm(dim=1) / tau_of(exact, latents).norm(dim=1)
    assert (off < 0.05).all(), off


@pytest.mark.parametrize(("dtype", "share"), [(torch.float16, 0.001), (torch.bfloat16, 0.01)])
def test_half_precision_keeps_the_target(dtype: torch.dtype, share: float) -> None:
    """tau from bf16 or fp16 latents is the one from fp64. Taken from the rounded noisy, or with
    the official codes' fp16 schedule, it would not be."""
    latents = draw(0.3, 0.8, 6, 500).to(dtype)
    model = gaussian(0.3, 0.8)
    half = renoise_inversion(model, latents, EARLY, **EPSILON)
    full = renoise_inversion(model, latents.double(), EARLY, **EPSILON)
    assert half.noisy.dtype == dtype
    assert half.target.dtype == torch.float32

    def off(tau: Tensor) -> list[float]:
        return [rms(e) / rms(t) for e, t in zip(tau - full.target, full.target, strict=True)]

    assert max(off(half.target)) < share, off(half.target)
    assert off(tau_of(full.noisy, latents, ABAR.half()))[0] > 0.02
    rounded = inversion_target(half.noisy, latents, EARLY, **EPSILON)
    assert off(rounded)[0] > 0.1
    torch.testing.assert_close(rounded.double(), tau_of(half.noisy, latents), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_steps_are_not_rounded_to_half_precision(dtype: torch.dtype) -> None:
    latents = draw(0.0, 1.0, 1, 20_000).to(dtype)
    found = ddim_inversion(zero, latents, torch.tensor([300]), **EPSILON, num_steps=100)
    once = (ABAR[300].sqrt() * latents.double()).to(dtype)
    assert (found.noisy == once).double().mean() > 0.999
    stepwise = latents
    for low, high in pairwise(grid(300, 100)):
        stepwise = (stepwise * (level(high) / level(low)).sqrt()).to(dtype)
    assert (stepwise == once).double().mean() < 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_of_the_prediction_does_not_spread(dtype: torch.dtype) -> None:
    latents, times = draw(0.3, 0.5, 2, 50, dtype=torch.float32), torch.tensor([999, 40])
    model = gaussian(0.3, 0.5)
    found = renoise_inversion(lambda x, t: model(x, t).to(dtype), latents, times, **EPSILON)
    assert found.noisy.dtype == found.target.dtype == torch.float32


def test_autocast_reaches_the_model_and_nothing_else() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 16)
    latents, times = torch.randn(2, 16), torch.tensor([900, 2])

    def low(x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out: Tensor = layer(x)
        assert out.dtype == torch.bfloat16
        return out

    for predicts in ("epsilon", "v_prediction", "sample"):
        options: dict[str, Any] = {"schedule": ABAR, "prediction_type": predicts}
        inside = renoise_inversion(low, latents, times, **options)
        with torch.autocast("cpu", torch.bfloat16):
            around = renoise_inversion(lambda x, t: layer(x), latents, times, **options)
        assert torch.equal(inside.noisy, around.noisy)
        assert torch.equal(inside.target, around.target)
    full = renoise_inversion(lambda x, t: layer(x), latents, times, **options)
    assert not torch.equal(full.noisy, inside.noisy)


def test_no_graph_is_recorded_and_the_result_may_enter_one() -> None:
    layer = nn.Linear(8, 8)
    latents = torch.randn(2, 8, requires_grad=True)
    times = torch.tensor([900, 2])
    for invert in (ddim_inversion, renoise_inversion):
        found = invert(lambda x, t: layer(x), latents, times, ABAR, prediction_type="epsilon")
        assert not found.noisy.requires_grad
        assert not found.target.requires_grad
        (layer(found.noisy) - found.target).square().sum().backward()
        assert layer.weight.grad is not None
        assert latents.grad is None
    assert not inversion_target(latents, latents, times, **EPSILON).requires_grad
    assert torch.is_grad_enabled()


def test_latents_are_left_as_they_were() -> None:
    latents = torch.randn(2, 8)
    before = latents.clone()
    found = ddim_inversion(
        zero, latents, torch.tensor([5, 900]), ABAR, eta=1.0, prediction_type="sample"
    )
    found.target.zero_()
    found.noisy.zero_()
    assert torch.equal(latents, before)


def test_noise_of_eta() -> None:
    """With a model that predicts none, noisy is the fresh noise alone: normal, of DDIM's variance
    summed over the steps, independent between elements and samples."""
    num_steps, t, eta = 5, 700, 0.4
    found = ddim_inversion(
        zero,
        torch.zeros(2, 200_000),
        torch.tensor([t, t]),
        **EPSILON,
        num_steps=num_steps,
        eta=eta,
        generator=torch.Generator().manual_seed(0),
    )
    variance = 0.0
    stops = grid(t, num_steps)
    for low, high in pairwise(stops):
        a, b = float(level(low)), float(level(high))
        variance = variance * b / a + eta**2 * (1 - a) / (1 - b) * (1 - b / a)
    z = found.noisy.double() / math.sqrt(variance)
    n = z.shape[1]
    for sample in z:
        assert abs(float(sample.mean())) < 5 / math.sqrt(n)
        assert abs(float(sample.square().mean()) - 1) < 5 * math.sqrt(2 / n)
        assert abs(float(sample.pow(4).mean()) - 3) < 5 * math.sqrt(96 / n)
    assert abs(float((z[0] * z[1]).mean())) < 5 / math.sqrt(n)
    assert abs(float((z[0, 1:] * z[0, :-1]).mean())) < 5 / math.sqrt(n)


def test_generator_repeats_the_noise() -> None:
    latents, times = draw(0.3, 0.5, 2, 50), torch.tensor([999, 40])

    def noisy(eta: float, seed: int | None = None) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return ddim_inversion(
            gaussian(0.3, 0.5), latents, times, **EPSILON, eta=eta, generator=generator
        ).noisy

    state = torch.get_rng_state()
    assert torch.equal(noisy(0.1, 1), noisy(0.1, 1))
    assert torch.equal(noisy(0.0, 1), noisy(0.0))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(noisy(0.1, 1), noisy(0.1, 2))
    plain = noisy(0.0)  # the model is linear, so is the effect of eta
    torch.testing.assert_close(10 * (noisy(0.1, 1) - plain), noisy(1.0, 1) - plain)
    torch.manual_seed(3)
    first = noisy(0.1)
    assert not torch.equal(noisy(0.1), first)
    torch.manual_seed(3)
    assert torch.equal(noisy(0.1), first)


def test_a_schedule_that_ends_in_pure_noise() -> None:
    """abar = 0 at the end, and more steps than timesteps: 0/0 lies near."""
    abar = torch.tensor([0.9, 0.6, 0.3, 0.0])
    ones: Model = lambda x, t: torch.ones_like(x)  # noqa: E731
    found = ddim_inversion(
        ones, torch.zeros(2, 3), torch.tensor([3, 0]), abar, num_steps=9, prediction_type="epsilon"
    )
    expected = torch.tensor([1.0, math.sqrt(0.1) / 2])[:, None].expand(2, 3)
    torch.testing.assert_close(found.noisy, expected)
    torch.testing.assert_close(found.target, torch.tensor([1.0, 0.5])[:, None].expand(2, 3))


def test_generator_and_timesteps_on_the_host(device: torch.device) -> None:
    latents = draw(0.3, 0.5, 2, 4, 8, 8, dtype=torch.float32)
    times, model = torch.tensor([999, 17]), gaussian(0.3, 0.5)

    def run(to: torch.device, times_on: torch.device) -> Any:
        generator = torch.Generator().manual_seed(0)
        return ddim_inversion(
            model,
            latents.to(to),
            times.to(times_on),
            ABAR.to(times_on),
            prediction_type="epsilon",
            eta=0.3,
            generator=generator,
        )

    host = torch.device("cpu")
    plain = run(host, host)
    for times_on in (host, device):
        found = run(device, times_on)
        assert found.noisy.device == found.target.device == device
        torch.testing.assert_close(found.noisy.cpu(), plain.noisy, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.target.cpu(), plain.target, rtol=1e-4, atol=1e-5)


def sdxl_scheduler(name: str, **options: Any) -> Any:
    import diffusers  # not everywhere

    return getattr(diffusers, name)(
        num_train_timesteps=T,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        **options,
    )


@pytest.mark.needs("diffusers")
@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_diffusers_schedulers(name: str, predicts: PredictionType) -> None:
    scheduler = sdxl_scheduler(name, prediction_type=predicts)
    clean, times = draw(0.3, 0.5, 3, 40), torch.tensor([999, 0, 250])
    model = gaussian(0.3, 0.5, predicts)
    found = ddim_inversion(model, clean, times, scheduler)
    table = ddim_inversion(model, clean, times, scheduler.alphas_cumprod, prediction_type=predicts)
    assert torch.equal(found.noisy, table.noisy)
    assert torch.equal(found.target, table.target)
    exact = ddim_inversion(model, clean, times, ABAR, prediction_type=predicts)
    torch.testing.assert_close(found.noisy, exact.noisy, rtol=0, atol=1e-4)
    renoise = renoise_inversion(model, clean, times, scheduler)
    assert torch.equal(inversion_target(renoise.noisy, clean, times, scheduler), renoise.target)
    tau = inversion_target(renoise.noisy, clean, times, scheduler, prediction_type="epsilon")
    assert torch.equal(tau, renoise.target) == (predicts == "epsilon")


@pytest.mark.needs("diffusers")
def test_sdxl_samples_back_what_renoise_inverted() -> None:
    """By its own sampler, which is DDIM's in other coordinates, over the same timesteps."""
    sampler = sdxl_scheduler("EulerDiscreteScheduler")
    stops = grid(999, 10)
    sampler.set_timesteps(timesteps=stops[:0:-1])
    model, clean = gaussian(0.3, 0.5), draw(0.3, 0.5, 2, 100)
    found = renoise_inversion(
        model, clean, torch.tensor([999, 999]), sampler, num_evals=300, average_last=1
    )
    x = found.noisy / level(999).sqrt()
    for t in sampler.timesteps:
        scaled = sampler.scale_model_input(x, t)
        x = sampler.step(model(scaled, t.long().repeat(2)), t, x).prev_sample
    torch.testing.assert_close(x, clean, rtol=0, atol=1e-4)


@pytest.mark.needs("diffusers")
def test_sigma_of_eta_is_that_of_diffusers_ddim() -> None:
    """The step from clean adds none; the second adds what DDIM sampling back over it would."""
    sampler = sdxl_scheduler("DDIMScheduler")
    zeros = torch.zeros(1, 1000)
    found = ddim_inversion(
        zero,
        zeros,
        torch.tensor([199]),
        sampler,
        num_steps=2,
        eta=0.1,
        generator=torch.Generator().manual_seed(0),
    )
    generator = torch.Generator().manual_seed(0)
    torch.randn(1, 1000, generator=generator)
    second = torch.randn(1, 1000, generator=generator)
    expected = 0.1 * sampler._get_variance(199, grid(199, 2)[1]).sqrt() * second
    torch.testing.assert_close(found.noisy, expected, rtol=1e-4, atol=0)


X = torch.zeros(2, 3)
TIMES = torch.tensor([5, 7])
FLOW = SimpleNamespace(config=SimpleNamespace(prediction_type="epsilon"))
OUTPUT = SimpleNamespace(sample=X)


def case(error: type[Exception], *words: str, **changed: Any) -> Any:
    return pytest.param(error, words, changed, id=" ".join(words))


SHARED = [
    case(TypeError, "latents", "NoneType", "Tensor", latents=None),
    case(TypeError, "latents", "int64", "float32", latents=X.long()),
    case(ValueError, "latents", "(2,)", "two dimensions", latents=X[:, 0]),
    case(ValueError, "latents", "(0, 3)", "one element", latents=X[:0], timesteps=TIMES[:0]),
    case(TypeError, "timesteps", "list", "Tensor", timesteps=[5, 7]),
    case(TypeError, "timesteps", "float32", "integer", timesteps=TIMES.float()),
    case(TypeError, "timesteps", "bool", "integer", timesteps=TIMES.bool()),
    case(ValueError, "timesteps", "(3,)", "(2,)", timesteps=torch.tensor([1, 2, 3])),
    case(ValueError, "timesteps", "()", "(2,)", timesteps=torch.tensor(5)),
    case(ValueError, "timesteps", "-1", "0 to 999", timesteps=torch.tensor([5, -1])),
    case(ValueError, "timesteps", "1000", "0 to 999", timesteps=torch.tensor([1000, 5])),
    case(TypeError, "schedule", "SimpleNamespace", "alphas_cumprod", schedule=FLOW),
    case(TypeError, "schedule", "list", "alphas_cumprod", schedule=[0.9, 0.8]),
    case(TypeError, "schedule", "float16", "float32", schedule=ABAR.half()),
    case(TypeError, "schedule", "bfloat16", "float32", schedule=ABAR.bfloat16()),
    case(ValueError, "schedule", "(1, 1000)", "one dimension", schedule=ABAR[None]),
    case(ValueError, "schedule", "(0,)", "one dimension", schedule=ABAR[:0]),
    case(ValueError, "schedule", "never rise", schedule=BETAS),
    case(ValueError, "schedule", "below 1", schedule=torch.cat([torch.ones(1), ABAR])),
    case(ValueError, "schedule", "nan", schedule=ABAR * math.nan),
    case(ValueError, "schedule", "never fall below 0", schedule=ABAR - 0.5),
    case(ValueError, "prediction_type", "None", "'epsilon'", prediction_type=None),
    case(ValueError, "prediction_type", "'flow'", "'v_pred", prediction_type="flow"),
]
STEPPED = [
    case(TypeError, "model", "Tensor", "callable", model=X),
    case(TypeError, "model returned", "NoneType", "expected a tensor", model=lambda x, t: None),
    case(TypeError, "model returned", "SimpleNamespace", ".sample", model=lambda x, t: OUTPUT),
    case(ValueError, "model returned", "(2, 2)", "(2, 3)", model=lambda x, t: x[:, :2]),
    case(ValueError, "model returned", "(2, 1)", "(2, 3)", model=lambda x, t: x[:, :1]),
    case(ValueError, "model returned", "int64", "floating", model=lambda x, t: x.long()),
    case(ValueError, "num_steps", "0", "at least 1", num_steps=0),
    case(ValueError, "num_steps", "-3", "at least 1", num_steps=-3),
    case(TypeError, "num_steps", "float", "int", num_steps=10.0),
    case(TypeError, "num_steps", "bool", "int", num_steps=True),
]
DDIM = [
    case(ValueError, "eta", "-0.1", "0 or above", eta=-0.1),
    case(ValueError, "eta", "nan", "finite", eta=math.nan),
    case(ValueError, "eta", "inf", "finite", eta=math.inf),
    case(TypeError, "eta", "str", "float", eta="0.1"),
    case(TypeError, "eta", "bool", "float", eta=True),
    case(TypeError, "generator", "int", "Generator", generator=0),
]
RENOISE = [
    case(ValueError, "num_evals", "0", "at least 1", num_evals=0),
    case(TypeError, "num_evals", "float", "int", num_evals=2.0),
    case(ValueError, "average_last", "3", "num_evals, 2", average_last=3),
    case(ValueError, "average_last", "0", "at least 1", average_last=0),
    case(TypeError, "average_last", "bool", "int", average_last=False),
]
TARGET = [
    case(TypeError, "noisy", "NoneType", "Tensor", noisy=None),
    case(TypeError, "noisy", "int64", "float32", noisy=X.long()),
    case(ValueError, "noisy", "(2, 1)", "(2, 3)", noisy=X[:, :1]),
    case(ValueError, "noisy", "meta", "cpu", noisy=X.to("meta")),
]


def refused(
    call: Callable[..., Any],
    error: type[Exception],
    words: tuple[str, ...],
    changed: dict[str, Any],
    **good: Any,
) -> None:
    good |= {"latents": X, "timesteps": TIMES, **EPSILON}
    call(**good)
    with pytest.raises(error) as caught:
        call(**good | changed)
    message = str(caught.value)
    assert message.startswith(words[0])
    assert all(word in message for word in words), message


@pytest.mark.parametrize(("error", "words", "changed"), SHARED + STEPPED + DDIM)
def test_ddim_refuses(error: type[Exception], words: Any, changed: dict[str, Any]) -> None:
    refused(ddim_inversion, error, words, changed, model=zero)


@pytest.mark.parametrize(("error", "words", "changed"), SHARED + STEPPED + RENOISE)
def test_renoise_refuses(error: type[Exception], words: Any, changed: dict[str, Any]) -> None:
    refused(renoise_inversion, error, words, changed, model=zero)


@pytest.mark.parametrize(("error", "words", "changed"), SHARED + TARGET)
def test_target_refuses(error: type[Exception], words: Any, changed: dict[str, Any]) -> None:
    refused(inversion_target, error, words, changed, noisy=X)
