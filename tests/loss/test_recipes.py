"""docs/recipes.md: what known trainers compute, written out, against the call that replaces it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastpref

RECIPES = (Path(__file__).resolve().parents[2] / "docs" / "recipes.md").read_text()
B, T = 3, 1000
GENERATOR = torch.Generator().manual_seed(7)
TARGET, OFF, DRIFT = torch.randn(3, 2 * B, 2, 4, 5, generator=GENERATOR, dtype=torch.float64)
OFF[B:] += 0.3 * OFF[:B]  # the losers are off the winners' way, too
REF = TARGET + 0.4 * OFF
PRED = REF + 0.02 * DRIFT
WEIGHT = torch.rand(B, generator=GENERATOR, dtype=torch.float64)
MASK = (torch.rand(2 * B, 4, 5, generator=GENERATOR) > 0.3).double()
LABEL = torch.tensor([1, 0, 1, 1, 0, 0])
C = 0.1

Loss = Callable[[Tensor], Tensor]


def errors(pred: Tensor) -> tuple[Tensor, Tensor]:
    w, l = (pred - TARGET).square().mean([1, 2, 3]).chunk(2)
    return w, l


def logits(pred: Tensor) -> Tensor:
    """How much more the winner improved on the reference than the loser did."""
    (w, l), (ref_w, ref_l) = errors(pred), errors(REF)
    return (ref_w - ref_l) - (w - l)


def mapo(pred: Tensor) -> Tensor:
    w, l = errors(pred)
    odds = 0.5 * w / (torch.exp(0.5 * w) - 1) - 0.5 * l / (torch.exp(0.5 * l) - 1)
    return w.mean() - (0.1 * F.logsigmoid(T * odds)).mean()


def orpo_as_diffusers_has_it(pred: Tensor) -> Tensor:
    w, l = errors(pred)
    return w.mean() - (0.1 * F.logsigmoid(w - l)).mean()


def sums(pred: Tensor) -> Tensor:
    n = PRED[0].numel()
    return (-F.logsigmoid(0.5 * 3.0 * n * logits(pred))).mean() + 0.2 * errors(pred)[0].mean()


def elements(pred: Tensor, kind: str) -> Tensor:
    """sd-scripts' conditional_loss."""
    huber = torch.sqrt((pred - TARGET) ** 2 + C**2) - C
    return (2 * C if kind == "huber" else 2) * huber


def simpo_of(per_sample: Tensor) -> Tensor:
    w, l = per_sample.chunk(2)
    return -F.logsigmoid(250.0 * (l - w) - 0.5).mean()


def masked(pred: Tensor) -> Tensor:
    return simpo_of(((pred - TARGET).square() * MASK[:, None]).mean([1, 2, 3]))


def scaled_loser(pred: Tensor) -> Tensor:
    """Diffusion-SDPO: the loss of the pair, and of the loser's gradient a part, so large that both
    together still lower the winner's error; see its compute_winner_preserving_lambda."""
    w, l = errors(pred)
    ref_w, ref_l = errors(REF)
    off_w, off_l = (pred - TARGET).detach().chunk(2)
    of_w, of_both = off_w.square().sum(), (off_w * off_l).sum()
    scale = ((1 - 0.97) * of_w / of_both).clamp(0, 1) if of_both > 0 else 1.0
    assert scale != 1.0
    l = l.detach() + scale * (l - l.detach())
    return -F.logsigmoid(-2500.0 * ((w - l) - (ref_w - ref_l))).mean()


def dpo(pred: Any, **options: Any) -> Tensor:
    return fastpref.dpo_loss(pred, TARGET, REF, **options).loss


def kto(pred: Tensor) -> Tensor:
    """train_kto_sd_v1.5.py, halo "sigmoid" and bce_offset "none"."""
    reward = (REF - TARGET).square().mean([1, 2, 3]) - (pred - TARGET).square().mean([1, 2, 3])
    reward = reward - reward.mean().clamp(min=0).detach()
    return (1 - torch.sigmoid((2 * LABEL - 1) * 1000 * reward)).mean()


def dspo(pred: Tensor) -> Tensor:
    """train.py, lines 1159 to 1169."""
    w, ref_w, target_w = pred[:B], REF[:B], TARGET[:B]
    weight = 4.0 * (1 - torch.sigmoid(0.5 * 4.0 * logits(pred)))
    return (w - target_w - weight[:, None, None, None] * (w - ref_w)).square().mean()


def linear(pred: Tensor) -> Tensor:
    """train_sd_dpo.py, lines 1158 to 1170."""
    w, l = errors(pred)
    ratio = (-0.2 * 500 * logits(pred) + 0.5).clamp(0.01, 0.99).detach()
    return (ratio * (w - l)).mean()


def of_own_errors(pred: Tensor) -> Tensor:
    found = fastpref.pair_errors(pred, TARGET, REF)
    return fastpref.losses_from_errors(
        found.mse, gap=found.gap, link="dpo_alpha", alpha=0.6, beta=800.0
    ).loss


def simpo(pred: Tensor, **options: Any) -> Tensor:
    return fastpref.simpo_loss(pred, TARGET, **options).loss


SD15 = fastpref.convert_beta(2500.0, "diffusers-sd15")
CASES: dict[str, tuple[Loss, Loss]] = {
    "mapo-t2i/mapo": (mapo, lambda p: fastpref.mapo_loss(p, TARGET).loss),
    "diffusers SDXL DPO": (
        lambda p: -F.logsigmoid(0.5 * 5000 * logits(p)).mean(), lambda p: dpo(p, beta=5000.0)),
    "`sigmoid` and `hinge`": (
        lambda p: F.relu(1 - 2500 * logits(p)).mean(),
        lambda p: dpo(p, beta=SD15, loss_type="hinge")),
    "DPO, `ipo`": (
        lambda p: ((logits(p) - 1 / 5000) ** 2).mean(),
        lambda p: dpo(p, beta=2500.0, loss_type="ipo")),
    "diffusers ORPO": (
        orpo_as_diffusers_has_it,
        lambda p: fastpref.orpo_loss(p, TARGET, logit_scale=-1.0).loss),
    "Self-NPO": (
        lambda p: (torch.sqrt((p - TARGET) ** 2 + 0.001**2) - 0.001).mean(),
        lambda p: fastpref.self_npo_loss(p, TARGET, paired=False).loss),
    "Diffusion-SDPO": (scaled_loser, lambda p: dpo(p, safeguard=0.97)),
    "alpha-DPO": (lambda p: dpo(p, loss_type="alpha", alpha=0.6, beta=800.0), of_own_errors),
    "`anchor_alpha`": (
        lambda p: -F.logsigmoid(0.5 * 5000 * logits(p)).mean() + 0.3 * F.mse_loss(p, REF),
        lambda p: dpo(p, anchor_weight=0.3)),
    "Diffusion-KTO": (kto, lambda p: fastpref.kto_loss(p, TARGET, REF, LABEL).loss),
    "DSPO, SD1.5": (dspo, lambda p: fastpref.dspo_loss(p, TARGET, REF, beta=4.0).loss),
    "Linear-DPO": (linear, lambda p: fastpref.linear_dpo_loss(p, TARGET, REF, eta=0.01).loss),
    "DiffusionDRO": (
        lambda p: F.relu(0.001 - logits(p)).mean(),
        lambda p: fastpref.diffusion_dro_loss(p, TARGET, REF).loss),
    "SimpleTuner": (
        sums, lambda p: dpo(p, beta=3.0, error_reduction="sum", sft_weight=0.2 / PRED[0].numel())),
    "min-SNR": (
        lambda p: (WEIGHT * -F.logsigmoid(0.5 * 5000 * logits(p))).mean(),
        lambda p: dpo(p, pair_weight=WEIGHT)),
    "masked mean": (
        masked,
        lambda p: simpo(p, mask=MASK.unsqueeze(1), sample_weight=MASK.flatten(1).mean(1))),
    '`loss_type="huber"`': (
        lambda p: simpo_of(elements(p, "huber").mean([1, 2, 3])),
        lambda p: simpo(p, huber_c=C, sample_weight=2 * C)),
    '`"smooth_l1"`': (
        lambda p: simpo_of(elements(p, "smooth_l1").mean([1, 2, 3])),
        lambda p: simpo(p, huber_c=C, sample_weight=2.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_recipe(name: str) -> None:
    assert name in RECIPES
    theirs, ours = CASES[name]
    results = []
    for loss in (theirs, ours):
        pred = PRED.clone().requires_grad_()
        value = loss(pred)
        results.append((value, *torch.autograd.grad(value, pred)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-8, atol=1e-14)


def test_modules_take_what_their_functions_take() -> None:
    module = fastpref.MaPOLoss(huber_c=C)
    wanted = fastpref.pair_loss(PRED, TARGET, link="mapo", huber_c=C).loss
    assert torch.equal(module(PRED, TARGET).loss, wanted)
    swapped = fastpref.DPOLoss(swap=True, beta=3.0)(PRED, TARGET, REF).loss
    assert torch.equal(swapped, fastpref.npo_loss(PRED, TARGET, REF, beta=3.0).loss)
