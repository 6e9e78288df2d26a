"""Errors of a step's log-ratio, as published and as fastpref computes it, against 50 digits, beside
the clips in use. `python benchmarks/precision.py` runs this with all else."""

from __future__ import annotations

import csv
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mpmath as mp
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
import matplotlib

import fastpref
import step_cases
from fastpref import transitions
from fastpref.transitions import Transition

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RESULTS = Path(__file__).resolve().parent / "results"
SHAPE, SAMPLES = (16, 32, 32), 4
SIGMAS = (0.15, 0.5, 0.96)
DRIFTS = (1e-2, 1e-3, 1e-4)  # of the prediction, relative
CLIPS = {"Wan": 1e-3, "Flow-GRPO": 1e-4, "fast, CPS": 1e-5, "GRPO-Guard": 2e-6}


class Steps(NamedTuple):
    """Of the old policy, and what another predicts there."""

    pred: Tensor
    old: Tensor
    x: Tensor
    x_next: Tensor
    transition: Transition


def drawn(sigma: float, drift: float, device: torch.device) -> Steps:
    """Steps of Flow-SDE, which the old policy took."""
    generator = torch.Generator().manual_seed(0)
    x, old, moved = torch.randn(3, SAMPLES, *SHAPE, generator=generator)
    sigmas = torch.tensor([1.0, sigma, max(sigma - 0.1, 0.05), 0.0])
    step = transitions.flow_sde(sigmas, torch.ones(SAMPLES, dtype=torch.int64))
    x_next, pred = step.sample(x, old, generator), old + drift * moved
    pred, old, x, x_next = torch.stack([pred, old, x, x_next]).to(device)
    return Steps(pred, old, x, x_next, step.to(device))


def exact(steps: Steps) -> list[tuple[mp.mpf, mp.mpf]]:
    """(log-ratio, GRPO-Guard's exponent) of each sample, in 50 digits."""
    latents, step = steps[:4], steps.transition
    found = []
    with mp.workdps(50):
        for i in range(SAMPLES):
            a, b, std, weight = (
                mp.mpf(n[i].item()) for n in (step.a, step.b, step.std, step.weight)
            )
            total, square = mp.mpf(0), mp.mpf(0)
            for p, o, y, z in zip(*(t[i].flatten().tolist() for t in latents), strict=True):
                d, rest = mp.mpf(p) - o, mp.mpf(z) - a * y
                total += d * (mp.mpf(p) + o - 2 * rest / b)
                square += d * d
            n = steps.pred[i].numel()
            log_ratio = -weight * b**2 * total / n
            found.append((log_ratio, std * (log_ratio + b**2 * square / n / (2 * std**2))))
    return found


def log_prob(pred: Tensor, steps: Steps) -> Tensor:
    a, b, std = steps.transition[:3]
    return step_cases.log_prob(pred, steps.x, steps.x_next, (a, b, std))


def published(steps: Steps) -> Tensor:
    """The difference of two log-probabilities."""
    return log_prob(steps.pred, steps) - log_prob(steps.old, steps)


def published_guard(steps: Steps) -> Tensor:
    moved = step_cases.each(steps.transition.b, steps.pred) * (steps.pred - steps.old)
    std = steps.transition.std
    bias = step_cases.mean(moved.square()) / (2 * std**2)
    return (published(steps) + bias) * std


def ours(steps: Steps, **options: Any) -> Tensor:
    given = {"old_pred": steps.old, **options}
    return fastpref.grpo_loss(
        steps.pred, x=steps.x, x_next=steps.x_next, transition=steps.transition, advantage=1.0,
        **given,
    ).log_ratio  # fmt: skip


def stored(steps: Steps) -> Tensor:
    """From a log-probability in fp32, as a sampler stores it."""
    return ours(steps, old_pred=None, old_log_prob=log_prob(steps.old, steps), impl="triton")


PROVIDERS: dict[str, dict[str, Callable[[Steps], Tensor]]] = {
    "log-ratio": {
        "published code": published,
        "fastpref, stored log-probabilities": stored,
        "fastpref, torch": lambda steps: ours(steps, impl="torch"),
        "fastpref, kernel": lambda steps: ours(steps, impl="triton"),
    },
    "GRPO-Guard's exponent": {
        "published code": published_guard,
        "fastpref, torch": lambda steps: ours(steps, variant="guard", impl="torch"),
        "fastpref, kernel": lambda steps: ours(steps, variant="guard", impl="triton"),
    },
}


def measure() -> list[dict[str, Any]]:
    """The worst of a few samples; shares of the clips that are used for the quantity."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for sigma, drift in itertools.product(SIGMAS, DRIFTS):
        steps = drawn(sigma, drift, device)
        truths = zip(*exact(steps), strict=True)
        for (quantity, providers), truth in zip(PROVIDERS.items(), truths, strict=True):
            for name, provider in providers.items():
                got = provider(steps).double().cpu().tolist()
                off = max(abs(float(g - t)) for g, t in zip(got, truth, strict=True))
                size = max(abs(float(t)) for t in truth)
                row = {"quantity": quantity, "provider": name, "sigma": sigma, "drift": drift}
                row |= {"largest": size, "worst_error": off, "relative": off / size}
                row |= {f"of_clip_{clip:g}": off / clip for clip in CLIPS.values()}
                rows.append(row)
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, constrained_layout=True)
    colors = dict(
        zip(PROVIDERS["log-ratio"], ("#c8483c", "#d99a2b", "#8a8a8a", "#1f6fb4"), strict=True)
    )
    for axes, quantity in zip(panels, PROVIDERS, strict=True):
        for name in PROVIDERS[quantity]:
            chosen = [r for r in rows if r["quantity"] == quantity and r["provider"] == name]
            worst = [max(r["worst_error"] for r in chosen if r["drift"] == d) for d in DRIFTS]
            axes.plot(DRIFTS, worst, color=colors[name], marker="o", markersize=4, label=name)
        clips = {"GRPO-Guard": CLIPS["GRPO-Guard"]} if "Guard" in quantity else CLIPS
        for owner, clip in clips.items():
            axes.axhline(clip, color="#606060", linewidth=0.8, linestyle="--")
            axes.annotate(f"clip of {owner}", (DRIFTS[-1], clip * 1.2), fontsize=7, color="#606060")
        axes.set(xscale="log", yscale="log", xlabel="relative drift of the prediction")
        axes.set_title(f"{quantity}: worst error", loc="left", fontsize=10, fontweight="bold")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    lines = panels[0].lines[: len(PROVIDERS["log-ratio"])]
    panels[1].legend(handles=lines, frameon=False, fontsize=8, loc="center right")
    figure.savefig(path, dpi=130)


def main() -> None:
    measured = measure()
    with (RESULTS / "precision-steps.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, measured[0])
        writer.writeheader()
        writer.writerows(measured)
    plot(measured, RESULTS / "precision-steps.png")
    for row in measured:
        of = f"{row['quantity']:22} {row['provider']:34} sigma {row['sigma']:<4}"
        print(f"{of} drift {row['drift']:.0e}: {row['largest']:.1e}, off {row['worst_error']:.1e}")


if __name__ == "__main__":
    main()
