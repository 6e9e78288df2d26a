"""Losses on unpaired samples, each of which has a label or a score of its own.

In the formulas, mse is a sample's error, mean (model_pred - target)^2 over its elements, and drop =
mse - ref_mse what it is above the frozen reference's, negative where the model became better, so
that -drop is the sample's implicit reward. Every function takes model_pred, target and ref_pred of
(B, ...), or the reference's errors ref_mse, (B,), in place of its predictions, and the knobs of
`fastpref.grouped.sample_loss`: mask, huber_c, weight, error_reduction, reduction, dro_temperature
and impl. It returns a SampleOutput, and raises a TypeError or ValueError that names the argument,
what came and what is needed. Each number may be a float, a 0-d tensor or a (B,) tensor.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastpref_kernels.groups import DDO, KTO, KTO_GIVEN_KL, TGO

from ..batch import Scalar
from ..dispatch import ErrorReduction
from ..grouped import GroupKnobs, SummedGroupKnobs, sample_loss
from ..outputs import SampleOutput

KTOUtility: TypeAlias = Literal[
    "kto", "loss_averse", "risk_seeking", "risk_seeking_1", "risk_seeking_2", "risk_seeking_3"
]


def kto_loss(
    model_pred: Tensor,
    target: Tensor,
    ref_pred: Tensor | None = None,
    label: Tensor | None = None,
    *,
    ref_mse: Tensor | None = None,
    beta: Scalar = 1000.0,
    lambda_desirable: Scalar = 1.0,
    lambda_undesirable: Scalar = 1.0,
    utility: KTOUtility = "kto",
    kl: Scalar | None = None,
    **knobs: Unpack[GroupKnobs],
) -> SampleOutput:
    """Diffusion-KTO: push desirable samples above what the batch gained, and others below it.

    Per sample, by utility "kto", with sign = 1 where label is 1 and -1 where it is 0, and weight =
    lambda_desirable or lambda_undesirable::

        loss   = weight * sigmoid(-margin)
        margin = sign * beta * (-drop - kl)

    By all utilities, each being weight * (1 - h)::

        kto             h = sigmoid(margin)
        loss_averse     h = log(sigmoid(margin))
        risk_seeking    h = softplus(margin)
        risk_seeking_1  h = sign * softplus(sign * margin)
        risk_seeking_2  h = sign * exp(sign * margin / 100) - 1, the exponent at most 80

    Args:
        model_pred, target, ref_pred, ref_mse: of B samples.
        label: (B,), bool or 0 and 1: whether the sample is desirable.
        beta: no 1/2 is folded into it, means over elements; 1000 in the official script.
        lambda_desirable, lambda_undesirable: weights of the two kinds. If one is rarer, raise its.
        utility: "kto" is the paper's default; "risk_seeking", the paper's, is called risk_seeking_3
            in the code. The risk_seeking ones have no lower bound.
        kl: where the margin is 0, a constant. If it is not given, it is the mean of -drop over the
            batch, or 0 if that is negative. In the official code it is the mean over all processes:
            `batch_kl(out.drops)` makes that from the drops of a call before this one.
        knobs: as in `fastpref.grouped.sample_loss`.

    Source: Li et al., "Aligning Diffusion Models by Optimizing Human Utility", arXiv:2404.04465,
    and train_kto_sd_v1.5.py of github.com/jacklishufan/diffusion-kto, lines 1451-1519, with
    bce_offset "none". Its offsets "sigmoid" and "original" are for you to pass as kl; its kto_gp
    loss is not here.
    """
    if utility not in KTO:
        raise ValueError(f"utility is {utility!r}; expected one of {', '.join(KTO)}")
    numbers = {
        "beta": beta,
        "lambda_desirable": lambda_desirable,
        "lambda_undesirable": lambda_undesirable,
        "label": label,
        "kl": kl,
    }
    link = (KTO if kl is None else KTO_GIVEN_KL)[utility]
    return sample_loss(link, model_pred, target, ref_pred, ref_mse, numbers, **knobs)


def batch_kl(drops: Tensor) -> Tensor:
    """`kto_loss`'s kl over all processes: max(mean(-drop), 0), a 0-d tensor.

    drops: (B,) policy error minus reference error, as in `SampleOutput`. They are averaged over
        torch.distributed's default group, if there is one, weighted by their numbers; then all
        processes must call this.
    """
    drops = drops.detach().float()
    total = torch.stack([-drops.sum(), drops.new_tensor(float(drops.numel()))])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    return (total[0] / total[1]).clamp(min=0.0)


def ddo_loss(
    model_pred: Tensor,
    target: Tensor,
    ref_pred: Tensor | None = None,
    real: Tensor | None = None,
    *,
    ref_mse: Tensor | None = None,
    beta: Scalar = 0.05,
    alpha: Scalar = 4.0,
    error_reduction: ErrorReduction = "sum",
    **knobs: Unpack[SummedGroupKnobs],
) -> SampleOutput:
    """DDO, direct discriminative optimization: tell real samples from those of the reference.

    Per sample, with sign and weight 1 where real is 1, and sign -1 and weight alpha where it is 0::

        loss   = weight * softplus(-margin)
        margin = sign * beta * -drop

    Args:
        model_pred, target, ref_pred, ref_mse: of B samples.
        real: (B,), bool or 0 and 1: 1 for the data's, 0 for those that the frozen reference made.
        beta: strength, for sums over elements: .01 to .1 in the paper, times its weight of the
            noise level, w(t), for which it may be (B,).
        alpha: weight of the reference's samples: .5 to 50 in the paper.
        error_reduction: "sum", as in the paper, or "mean".
        knobs: as in `fastpref.grouped.sample_loss`.

    The paper adds two means, over the data and over the reference's samples; this is one mean over
    the batch, half of that where half of the batch is real.

    Source: Zheng et al., "Direct Discriminative Optimization", arXiv:2503.01103, equations 13-16.
    The official repository has no training code; the defaults are those of a fork of sd-scripts
    (github.com/rockerBOO/sd-scripts), which applies both terms to the same samples.
    """
    numbers = {"beta": beta, "alpha": alpha, "real": real}
    return sample_loss(
        DDO, model_pred, target, ref_pred, ref_mse, numbers,
        error_reduction=error_reduction, **knobs,
    )  # fmt: skip


def tgo_loss(
    model_pred: Tensor,
    target: Tensor,
    ref_pred: Tensor | None = None,
    score: Tensor | None = None,
    threshold: Scalar | None = None,
    *,
    ref_mse: Tensor | None = None,
    beta: Scalar = 1000.0,
    confidence: Scalar = 5.0,
    **knobs: Unpack[GroupKnobs],
) -> SampleOutput:
    """TGO, threshold-guided optimization: samples that score above a threshold against those below.

    Per sample, with sign = 1 where score >= threshold and else -1::

        loss   = (1 + confidence * abs(score - threshold)) * softplus(-margin)
        margin = sign * beta * -drop

    Args:
        model_pred, target, ref_pred, ref_mse: of B samples.
        score: (B,) rewards.
        threshold: one number, or (B,); the paper's is the 50th percentile of all scores.
        beta: the paper's beta of 1 over its temperature of .001.
        confidence: how much more a sample counts that is far from the threshold; the paper's c.
        knobs: as in `fastpref.grouped.sample_loss`.

    Source: the paper of TGO, ICML 2026, equation 10 and algorithm 1. There is no code; that errors
    are means over elements is our reading.
    """
    numbers = {"beta": beta, "confidence": confidence, "score": score, "threshold": threshold}
    return sample_loss(TGO, model_pred, target, ref_pred, ref_mse, numbers, **knobs)
