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

RECIPES = (Path(__file__).resolve().parent.parent / "docs" / "recipes.md").read_text()
B, T = 3, 1000
GENERATOR = torch.Generator().manual_seed(7)
TARGET, OFF, DRIFT = torch.randn(3, 2 * B, 2, 4, 5, generator=GENERATOR, dtype=torch.float64)
REF = TARGET + 0.4 * OFF
PRED = REF + 0.02 * DRIFT
WEIGHT = torch.rand(B, generator=GENERATOR, dtype=torch.float64)
MASK = (torch.rand(2 * B, 4, 5, generator=GENERATOR) > 0.3).double()
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
    """Diffusion-SDPO: the loss of the pair, and of the loser's gradient a part."""
    w, l = errors(pred)
    ref_w, ref_l = errors(REF)
    l = l.detach() + 0.3 * (l - l.detach())
    return -F.logsigmoid(-2500.0 * ((w - l) - (ref_w - ref_l))).mean()


def dpo(pred: Any, **options: Any) -> Tensor:
    return fastpref.dpo_loss(pred, TARGET, REF, **options).loss


def sdpo(pred: Tensor) -> Tensor:
    w, l = pred.chunk(2)
    targets, refs = tuple(TARGET.chunk(2)), tuple(REF.chunk(2))
    return fastpref.dpo_loss((w, l.detach() + 0.3 * (l - l.detach())), targets, refs).loss


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
    "Diffusion-SDPO": (scaled_loser, sdpo),
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
