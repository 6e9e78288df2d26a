"""Error of inverted latents against the model's ODE, on data of one Gaussian or of several, for
which the best model is a formula. Writes results/inversion_error.csv.

    python benchmarks/inversion_error.py

A row holds | tau - tau_ode | / | tau_ode | over draws of the data, for tau of `inversion_target`,
10 steps and SDXL's schedule. Beside fastpref stand InPO's and SmPO's walks, with diffusers' inverse
scheduler as it was before 0.22 and as it is since, and a walk that differs from fastpref's in its
steps alone: they are even in t, and the model is told where they end.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastpref.inversion import Inverted, ddim_inversion, inversion_target, renoise_inversion

RESULTS = Path(__file__).resolve().parent / "results"
T = 1000
ABAR = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, T, dtype=torch.float64) ** 2).cumprod(0)
TIMES = (0, 1, 11, 51, 101, 201, 301, 302, 350, 501, 502, 701, 901, 981, 999)
STEPS = 10


class Data:
    """Equally likely Gaussians of one deviation, and the best prediction of their noise."""

    def __init__(self, means: Tensor, std: float) -> None:
        self.means, self.std = means, std

    def draw(self, n: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        mode = torch.randint(len(self.means), (n,), generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[mode] + self.std * noise

    def noise(self, x: Tensor, abar: Tensor) -> Tensor:
        variance = abar * self.std**2 + 1 - abar
        off = x[:, None] - abar.sqrt()[..., None] * self.means
        weight = (-off.square().sum(-1) / (2 * variance)).softmax(-1)
        return (1 - abar).sqrt() * (weight[..., None] * off).sum(1) / variance

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.noise(x, ABAR[t.clamp(min=0)][:, None])

    def solution(self, clean: Tensor, t: int, num_steps: int = 200) -> Tensor:
        """Along the model's ODE from clean to t, by the classical Runge-Kutta method in
        sigma = sqrt((1 - abar) / abar), with short steps near clean."""
        sigma = ((1 - ABAR[t]) / ABAR[t]).sqrt()
        even = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
        grid = 0.02 * torch.sinh(even * torch.asinh(sigma / 0.02))
        y = clean.clone()

        def slope(y: Tensor, sigma: Tensor) -> Tensor:
            abar = (1 / (1 + sigma**2)).reshape(1, 1)
            return self.noise(abar.sqrt() * y, abar)

        for low, high in pairwise(grid):
            h, middle = high - low, (low + high) / 2
            first = slope(y, low)
            second = slope(y + h / 2 * first, middle)
            third = slope(y + h / 2 * second, middle)
            y = y + h / 6 * (first + 2 * second + 2 * third + slope(y + h * third, high))
        return ABAR[t].sqrt() * y


def ring(n: int) -> Tensor:
    angle = 2 * math.pi / n * torch.arange(n, dtype=torch.float64)
    return 1.4 * torch.stack([angle.cos(), angle.sin()], dim=1)


def scattered(modes: int, dim: int) -> Tensor:
    return torch.randn(modes, dim, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


DATA = {
    **{
        f"N(0.3, {std}^2)": Data(torch.tensor([[0.3]]).double(), std)
        for std in (0.1, 0.2, 0.5, 1.0, 2.0)
    },
    "2 modes of 0.3 in 1-D": Data(torch.tensor([[-1.0], [1.0]]).double(), 0.3),
    "8 modes of 0.15 in 2-D": Data(ring(8), 0.15),
    "8 modes of 0.3 in 16-D": Data(scattered(8, 16), 0.3),
    "8 modes of 0.1 in 16-D": Data(scattered(8, 16), 0.1),
}


def walk(
    model: Data, x: Tensor, stops: list[int], evals: int, tell: str, clean_level: Tensor
) -> Tensor:
    """DDIM or ReNoise inversion over `stops`, of which a negative one is clean, with the model told
    one end of each step in all of its evaluations."""
    for low, high in pairwise(stops):
        start, end = ABAR[low] if low >= 0 else clean_level, ABAR[high]
        keep = (end / start).sqrt()
        add = (1 - end).sqrt() - keep * (1 - start).sqrt()
        told = torch.full((len(x),), low if tell == "start" else high)
        noises = [model(x, told)]
        while len(noises) < evals:
            noises.append(model(keep * x + add * noises[-1], told))
        x = keep * x + add * torch.stack(noises).mean(0)
    return x


def even(model: Data, clean: Tensor, t: int, evals: int) -> Tensor:
    """Steps that are even in t and end on it; the model is told where they end."""
    stops = [math.ceil(k * (t + 1) / STEPS) - 1 for k in range(STEPS + 1)]
    return walk(model, clean, stops, evals, "end", torch.ones(()).double())


def official_old(model: Data, clean: Tensor, t: int, evals: int) -> Tensor:
    """With diffusers 0.20: from clean over 1, 101 ... to the first of these from t on. The model is
    told where a step starts; -99, the first, is 0 to the models here."""
    stops = [-99, *range(1, T, T // STEPS)]
    return walk(model, clean, stops[: 1 + sum(s < t for s in stops)], evals, "start", ABAR[0])


def official_new(model: Data, clean: Tensor, t: int, evals: int) -> Tensor:
    """With diffusers from 0.22 on: over 1, 101 ... to the last of these below t, told where a step
    ends."""
    stops = [-99, *(s for s in range(1, T, T // STEPS) if s < t)]
    return walk(model, clean, stops, evals, "end", ABAR[0])


Method: TypeAlias = Callable[[Data, Tensor, int], Tensor]


def of(walk: Callable[[Data, Tensor, int, int], Tensor], evals: int) -> Method:
    return lambda model, clean, t: walk(model, clean, t, evals)


def ours(invert: Callable[..., Inverted]) -> Method:
    def method(model: Data, clean: Tensor, t: int) -> Tensor:
        times = torch.full((len(clean),), t)
        options: dict[str, Any] = {"num_steps": STEPS, "prediction_type": "epsilon"}
        return invert(model, clean, times, ABAR, **options).noisy

    return method


METHODS = {
    "InPO, diffusers 0.20": of(official_old, 1),
    "InPO, diffusers 0.22": of(official_new, 1),
    "DDIM, even in t": of(even, 1),
    "ddim_inversion": ours(ddim_inversion),
    "SmPO, diffusers 0.20": of(official_old, 2),
    "SmPO, diffusers 0.22": of(official_new, 2),
    "ReNoise, even in t": of(even, 2),
    "renoise_inversion": ours(renoise_inversion),
}


def errors(model: Data, t: int, n: int = 400) -> dict[str, float]:
    """By method, how far tau is from that of the ODE, as a share of it."""
    clean = model.draw(n)
    times = torch.full((n,), t)

    def tau(noisy: Tensor) -> Tensor:
        return inversion_target(noisy, clean, times, ABAR, prediction_type="epsilon")

    truth = tau(model.solution(clean, t))
    return {
        name: float((tau(method(model, clean, t)) - truth).norm() / truth.norm())
        for name, method in METHODS.items()
    }


def main() -> None:
    rows = []
    for data, model in DATA.items():
        found = {t: errors(model, t) for t in TIMES}
        print(f"\n| {data}, off by % at t = | " + " | ".join(map(str, TIMES)) + " |")
        print("|---" * (1 + len(TIMES)) + "|")
        for method in METHODS:
            shares = [found[t][method] for t in TIMES]
            print(f"| {method} | " + " | ".join(f"{100 * share:.1f}" for share in shares) + " |")
            rows += [
                {"data": data, "method": method, "t": t, "tau_rel_error": f"{share:.4g}"}
                for t, share in zip(TIMES, shares, strict=True)
            ]
    with open(RESULTS / "inversion_error.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
