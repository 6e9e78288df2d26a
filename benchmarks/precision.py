"""Errors of published losses and of fastpref's against the truth.

MaPO in fp32, by the size of the error (results/precision.csv, precision.png), Diffusion-DPO on
half-precision predictions (results/precision-half.csv), and log-ratios of a sampler's steps
(results/precision-steps.csv, precision-steps.png).

    python benchmarks/precision.py
"""

from __future__ import annotations

import csv
import itertools
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "helpers"))
import matplotlib

import fastpref
import oracles
import precision_steps

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RESULTS = Path(__file__).resolve().parent / "results"
HYPER = {"beta": 0.1, "snr": 0.5, "num_train_timesteps": 1000.0}
PAIRS_PER_DECADE = 40
BETA, HALF_PAIRS = 5000.0, 32


def published(pred: Tensor) -> tuple[Tensor, Tensor]:
    """(loss per pair, margin) as the official code writes it."""
    w, l = pred.square().mean(dim=1).chunk(2)

    def phi(e: Tensor) -> Tensor:
        return 0.5 * e / (torch.exp(0.5 * e) - 1)

    margin = 1000 * (phi(w) - phi(l))
    return w - 0.1 * F.logsigmoid(margin), margin


def fastpref_by(impl: fastpref.dispatch.Impl, pred: Tensor) -> tuple[Tensor, Tensor]:
    out = fastpref.mapo_loss(pred, torch.zeros_like(pred), reduction="none", impl=impl)
    return out.loss, out.margin


PROVIDERS = {
    "published code": published,
    "fastpref, torch": lambda pred: fastpref_by("torch", pred),
    "fastpref, kernel": lambda pred: fastpref_by("triton", pred),
}


def measure() -> list[dict[str, float | str]]:
    """Worst errors per decade of the winner's error, over losers that are within 2 % of it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    rows: list[dict[str, float | str]] = []
    for decade in range(-8, 3):
        exponent = decade + torch.rand(PAIRS_PER_DECADE, generator=generator)
        err_w = 10.0**exponent
        err_l = err_w * (1 + 0.02 * (2 * torch.rand(PAIRS_PER_DECADE, generator=generator) - 1))
        roots = torch.cat([err_w, err_l]).sqrt()[:, None]
        exact = roots.double().square().flatten()
        truths = [
            oracles.pair("mapo", oracles.Errors(w.item(), l.item()), HYPER)
            for w, l in zip(*exact.chunk(2), strict=True)
        ]
        margin = torch.tensor([float(truth.margin) for truth in truths])
        slope = torch.tensor([float(truth.slope_l[0]) for truth in truths])
        for name, provider in PROVIDERS.items():
            pred = roots.to(device).requires_grad_()
            loss, got = provider(pred)
            (grad,) = torch.autograd.grad(loss.sum(), pred)
            got_slope = (grad / (2 * pred)).detach().cpu().flatten().chunk(2)[1]
            off = (got_slope - slope).abs()
            wanted = torch.tensor([float(truth.loss) for truth in truths])
            lost = ((loss.detach().cpu() - wanted) / wanted).abs()
            rows.append({
                "provider": name,
                "decade": decade,
                "loss_rel_error": lost.max().item(),
                "margin_abs_error": (got.detach().cpu() - margin).abs().max().item(),
                "slope_l_rel_error": (off / slope.abs().clamp(min=1e-12)).max().item(),
            })  # fmt: skip
    return rows


def published_dpo(pred: Tensor, target: Tensor, ref: Tensor) -> Tensor:
    """DiffusionDPO's loss per pair, with errors in whatever precision the tensors have."""
    w, l = (pred - target).pow(2).mean(dim=[1, 2, 3]).chunk(2)
    ref_w, ref_l = (ref - target).pow(2).mean(dim=[1, 2, 3]).chunk(2)
    return -F.logsigmoid(-0.5 * BETA * ((w - l) - (ref_w - ref_l)))


def fastpref_dpo(pred: Tensor, target: Tensor, ref: Tensor) -> Tensor:
    return fastpref.dpo_loss(pred, target, ref, beta=BETA, reduction="none", impl="triton").loss


def measure_half() -> list[dict[str, float | str]]:
    """Diffusion-DPO on bf16 and fp16 predictions, against its formula in fp64 on the same tensors.

    first step: the policy is the reference, so every loss is ln 2. Its prediction is fp32, as
    accelerate hands it on from autocast, and the frozen reference's is not.
    later: policy and reference differ by 0.2 %, all in half precision.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[dict[str, float | str]] = []
    for dtype, stage, mse in itertools.product(
        (torch.bfloat16, torch.float16), ("first step", "later"), (0.1, 1.2)
    ):
        generator = torch.Generator().manual_seed(0)
        target, off, drift = torch.randn(3, 2 * HALF_PAIRS, 4, 64, 64, generator=generator)
        ref = target + mse**0.5 * off
        policy = ref if stage == "first step" else ref + 2e-3 * mse**0.5 * (drift - 0.5 * off)
        target, ref, policy = (t.to(device, dtype) for t in (target, ref, policy))
        if stage == "first step":
            policy = policy.float()
        wide = policy.double().requires_grad_()
        exact = published_dpo(wide, target.double(), ref.double())
        (exact_grad,) = torch.autograd.grad(exact.mean(), wide)
        for name, provider in {"published code": published_dpo, "fastpref": fastpref_dpo}.items():
            pred = policy.clone().requires_grad_()
            loss = provider(pred, target, ref)
            (grad,) = torch.autograd.grad(loss.mean(), pred)
            rows.append({
                "provider": name,
                "dtype": str(dtype).removeprefix("torch."),
                "stage": stage,
                "mse": mse,
                "loss": loss.double().mean().item(),
                "exact_loss": exact.mean().item(),
                "loss_rel_error": ((loss.double() - exact) / exact).abs().mean().item(),
                "grad_rel_error": ((grad.double() - exact_grad).norm() / exact_grad.norm()).item(),
            })  # fmt: skip
    return rows


def write(rows: list[dict[str, float | str]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def plot(rows: list[dict[str, float | str]], path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    titles = {
        "margin_abs_error": "margin: worst absolute error",
        "slope_l_rel_error": "gradient of the loser: worst relative error",
    }
    style = {
        "published code": "#c8483c",
        "fastpref, torch": "#8a8a8a",
        "fastpref, kernel": "#1f6fb4",
    }
    for axes, (column, title) in zip(panels, titles.items(), strict=True):
        for name, color in style.items():
            chosen = [row for row in rows if row["provider"] == name]
            x = [10.0 ** (float(row["decade"]) + 0.5) for row in chosen]
            y = [min(float(row[column]), 1e7) for row in chosen]  # NaN compares as above
            shown = [max(v, 1e-10) if v == v else 1e7 for v in y]
            axes.plot(x, shown, color=color, marker="o", markersize=4, label=name)
            broken = [a for a, v in zip(x, y, strict=True) if not v < 1e7]
            axes.plot(broken, [1e7] * len(broken), "x", color=color, markersize=9)
        axes.set(xscale="log", yscale="log", ylim=(1e-10, 5e7), xlabel="error of the winner (mse)")
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].annotate("crosses: NaN or inf", (1e-6, 6e6), fontsize=8, color="#c8483c")
    panels[1].axhline(1.0, color="#8a8a8a", linewidth=0.8, linestyle="--")
    panels[1].annotate("above: the sign can be wrong", (3e-2, 1.6), fontsize=8, color="#606060")
    panels[0].legend(frameon=False, fontsize=8, loc="center right")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    measured = measure()
    write(measured, RESULTS / "precision.csv")
    plot(measured, RESULTS / "precision.png")
    for row in measured:
        print(f"{row['provider']:18} 1e{row['decade']:<3} margin {row['margin_abs_error']:.1e}  "
              f"slope {row['slope_l_rel_error']:.1e} loss {row['loss_rel_error']:.1e}")  # fmt: skip
    halves = measure_half()
    write(halves, RESULTS / "precision-half.csv")
    for row in halves:
        print(f"{row['provider']:14} {row['dtype']:8} {row['stage']:10} mse {row['mse']:<3} "
              f"loss {row['loss']:.4f} for {row['exact_loss']:.4f}, off "
              f"{row['loss_rel_error']:.1e}; gradient off {row['grad_rel_error']:.1e}")  # fmt: skip
    precision_steps.main()
