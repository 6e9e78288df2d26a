"""Losses on pairs of a winner and a loser.

In the formulas below, mse_w and mse_l are the errors of a pair's winner and loser, mean (model_pred
- target)^2 over a sample's elements; ref_mse_w and ref_mse_l those of the frozen reference model;
drop_w = mse_w - ref_mse_w and drop_l = mse_l - ref_mse_l are negative where the model became
better. Every function takes model_pred, target and ref_pred in the forms that `pair_loss`
describes, its keyword arguments besides (mask, sample_weight, pair_weight, logit_scale,
loser_weight, label_smoothing, sft_weight, prior_weight, huber_c, swap, loser_gradient_scale,
safeguard, anchor_weight, error_reduction, reduction, dro_temperature, impl), returns a LossOutput,
and raises a TypeError or ValueError that names the argument, what came and what is needed. Each
number may be a float, a 0-d tensor or a (B,) tensor.

beta multiplies *means* over elements, in the convention of each official code; `convert_beta` goes
between conventions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor
from typing_extensions import Unpack

from fastpref_kernels.groups import DSPO

from ..batch import Halves, Scalar
from ..conventions import DPO_LOSS_TYPES, DPOLossType
from ..dispatch import (
    Knobs,
    OneSidedKnobs,
    OwnErrorKnobs,
    SignedKnobs,
    SwappedKnobs,
    UnsmoothedKnobs,
    pair_loss,
)
from ..grouped import SquaresKnobs, summed_pair_loss
from ..outputs import LossOutput


def mapo_loss(
    model_pred: Halves,
    target: Halves,
    *,
    beta: Scalar = 0.1,
    snr: Scalar = 0.5,
    num_train_timesteps: Scalar = 1000,
    **knobs: Unpack[Knobs],
) -> LossOutput:
    """MaPO: fit the winner and widen the margin over the loser, without a reference model.

    Per pair::

        loss   = mse_w + beta * softplus(-margin)
        margin = num_train_timesteps * (phi(snr * mse_w) - phi(snr * mse_l))
        phi(x) = x / (exp(x) - 1)

    Args:
        model_pred, target: as in `pair_loss`.
        beta: weight of the preference term. No 1/2 and no T is folded into it.
        snr: scale of the errors inside phi; the official code's `snr_value`, one constant for all
            timesteps.
        num_train_timesteps: the factor T on the margin; the noise scheduler's number of training
            timesteps. At a tie near mse = 0 the preference pulls beta * T * snr / 4 times as hard
            as the fit, 12.5 at the defaults.
        knobs: as in `pair_loss`. sft_weight, the factor of mse_w, is 1 here. loser_weight
            multiplies num_train_timesteps * (1 - phi(snr * mse_l)).

    The result is finite and right for every error that fp32 holds, 0 included.

    Source: Hong et al., "Margin-aware Preference Optimization for Aligning Diffusion Models without
    Reference", arXiv:2406.06424; the formula is that of the official code, `compute_loss` in
    utils.py of github.com/mapo-t2i/mapo, evaluated such that small and large errors do not break it
    (there, NaN at mse = 0 and gradients of the wrong sign near 1e-5).
    """
    return pair_loss(
        model_pred,
        target,
        link="mapo",
        beta=beta,
        snr=snr,
        num_train_timesteps=num_train_timesteps,
        **knobs,
    )


def dpo_loss(
    model_pred: Halves,
    target: Halves,
    ref_pred: Halves | None = None,
    *,
    ref_mse: Halves | None = None,
    beta: Scalar = 5000.0,
    loss_type: DPOLossType = "sigmoid",
    label_smoothing: Scalar = 0.0,
    alpha: Scalar | None = None,
    **knobs: Unpack[UnsmoothedKnobs],
) -> LossOutput:
    """Diffusion-DPO and its relatives: prefer the winner by more than the reference model does.

    Per pair, by loss_type "sigmoid"::

        loss   = softplus(-margin)
        margin = -beta/2 * (drop_w - drop_l)

    By each type, with score_w = -beta/2 * drop_w, score_l = -beta/2 * drop_l, e = label_smoothing
    and margin = score_w - score_l::

        sigmoid    softplus(-margin)
        hinge      relu(1 - margin)
        robust     ((1 - e) * softplus(-margin) - e * softplus(margin)) / (1 - 2 e)
        exo_pair   KL(sigmoid(margin) || 1 - e), between the two distributions over (w, l)
        nca_pair   softplus(-score_w) + softplus(score_w) / 2 + softplus(score_l) / 2
        bco_pair   softplus(-score_w) + softplus(score_l)
        apo_zero   1 - sigmoid(score_w) + sigmoid(score_l)
        apo_down   sigmoid(score_w) + 1 - sigmoid(margin)
        alpha      (p^alpha - alpha * p - (1 - alpha)) / (alpha * (alpha - 1)), p = sigmoid(margin)

    and without beta in the scores, score_w = -drop_w, score_l = -drop_l::

        ipo        (margin - 1 / (2 beta))^2
        sppo_hard  (score_w - 1 / (2 beta))^2 + (score_l + 1 / (2 beta))^2

    Elsewhere label_smoothing mixes the loss with that of the swapped pair, (1 - e) : e (cDPO).

    Args:
        model_pred, target: as in `pair_loss`.
        ref_pred: the frozen reference model's prediction for the same noisy input (under LoRA, the
            model's with the adapter disabled); never needs a gradient.
        ref_mse: instead of it, the reference's errors, (2B,) or a tuple of (B,) each.
        beta: strength of the pull towards the reference; 2000 to 5000 is the papers' range. With
            the 1/2 and with means over elements, as in the official code, diffusers' SDXL script
            and Flow-DPO; diffusers' SD1.5 script has no 1/2 (its beta is half of this one), the
            paper has sums and a factor T. `convert_beta` knows them.
        loss_type: as TRL's DPOTrainer calls them, and "alpha". At beta = 5000 ipo and sppo_hard
            have losses near 1e-8 and slopes near 2e-4: their learning rates are not sigmoid's.
        label_smoothing: the probability that a label is wrong, in [0, 0.5); exo_pair needs it above
            0 (its paper advises 1e-3).
        alpha: of loss_type "alpha" only, 0.9999 where none is given. The official code multiplies
            its 0.9999 by the mean of sigmoid(margin) over all processes: pass that as a 0-d tensor.
        knobs: as in `pair_loss`.

    What else this is: **DCPO**, with each half conditioned on its own caption; **DDIM-InPO**, with
    the noisy latents and targets of `fastpref.inversion`; **Flow-DPO**, with velocities, target =
    noise - x0, and beta = 100 to 2000 (a weight of time inside goes to logit_scale); **DDSPO**,
    with targets that the reference predicts for a good and a bad prompt, pair_weight = t / (T - 1)
    in one variant; **VideoDPO** and **RankDPO** of two images, with their weights as pair_weight;
    **Diffusion-NPO**, by `npo_loss`.

    Source: Wallace et al., "Diffusion Model Alignment Using Direct Preference Optimization",
    arXiv:2311.12908, and train.py of github.com/SalesforceAIResearch/DiffusionDPO; the other types
    as in TRL's dpo_trainer.py (github.com/huggingface/trl), with errors in place of log
    probabilities; alpha from scripts/main.py of github.com/yangli-lab/Diffusion_alpha-DPO_ICLR2026
    (beta 4000 there), in a form that does not cancel. Their uses for diffusion, but for sigmoid,
    ipo and hinge (diffusers' example) and exo_pair (see `dmpo_loss`), are ours.
    """
    if loss_type not in DPO_LOSS_TYPES:
        known = ", ".join(DPO_LOSS_TYPES)
        raise ValueError(f"loss_type is {loss_type!r}; expected one of {known}")
    if alpha is not None and loss_type != "alpha":
        raise ValueError(
            f'alpha was given with loss_type {loss_type!r}; only loss_type "alpha" uses it'
        )
    return pair_loss(
        model_pred,
        target,
        ref_pred,
        ref_mse=ref_mse,
        link=f"dpo_{loss_type}",
        beta=beta,
        label_smoothing=label_smoothing,
        **_given(alpha=alpha),
        **knobs,
    )


def smpo_loss(
    model_pred: Halves,
    target: Halves,
    ref_pred: Halves | None = None,
    prob: Scalar | None = None,
    *,
    ref_mse: Halves | None = None,
    beta: Scalar = 5000.0,
    gamma: Scalar = 10.0,
    **knobs: Unpack[Knobs],
) -> LossOutput:
    """SmPO: Diffusion-DPO that pushes each pair as far as its label is certain.

    Per pair::

        loss   = softplus(-margin)
        margin = -beta/2 * gamma * (2 * prob - 1) * (drop_w - drop_l)

    Args:
        model_pred, target, ref_pred, ref_mse: as in `dpo_loss`. The method's noisy latents and
            targets come from `fastpref.inversion.renoise_inversion`, each image with its own.
        prob: the probability that the winner is the better one, in [0, 1], (B,) or one for all:
            `smoothed_preference` of two reward scores. At 1/2 a pair is ignored; below, its labels
            are swapped.
        beta: 5000 for SDXL and 2000 for SD1.5 in the official scripts; with the 1/2, over means.
        gamma: sum of the two smoothing exponents.
        knobs: as in `pair_loss`.

    Source: Lu et al., "Smoothed Preference Optimization via ReNoise Inversion for Aligning
    Diffusion Models with Varied Human Preferences", arXiv:2506.02698, and train.py of
    github.com/JaydenLyh/SmPO (which uses the first pair's probability for the whole batch).
    """
    return pair_loss(
        model_pred,
        target,
        ref_pred,
        ref_mse=ref_mse,
        link="smpo",
        beta=beta,
        gamma=gamma,
        prob=prob,  # type: ignore[arg-type]
        **knobs,
    )


def dmpo_loss(
    model_pred: Halves,
    target: Halves,
    ref_pred: Halves | None = None,
    *,
    ref_mse: Halves | None = None,
    beta: Scalar = 6000.0,
    alpha: Scalar = 0.01,
    **knobs: Unpack[Knobs],
) -> LossOutput:
    """DMPO: the reverse KL divergence between the model's preference and the labels'.

    Per pair, with p = sigmoid(margin)::

        loss   = p * log(p / (1 - alpha)) + (1 - p) * log((1 - p) / alpha)
        margin = -beta/2 * (drop_w - drop_l)

    Args:
        model_pred, target, ref_pred, ref_mse, knobs: as in `dpo_loss`.
        beta: 6000 for SDXL and 2000 for SD1.5 in the third-party scripts; with the 1/2, over means.
        alpha: the probability that a label is wrong, in (0, 0.5). The loss is least where the
            margin is log((1 - alpha) / alpha), 4.6 here, and pulls back beyond it; badly misranked
            pairs get almost no gradient.

    Source: "Divergence Minimization Preference Optimization for Diffusion Model Alignment",
    arXiv:2507.07510, states the reverse KL; its equation could not be read and no official code was
    found. The formula is that of a third party, train.py of github.com/AIDC-AI/Diffusion-SDPO: it
    is EXO's (arXiv:2402.00856), `dpo_loss(loss_type="exo_pair")`.
    """
    return pair_loss(
        model_pred,
        target,
        ref_pred,
        ref_mse=ref_mse,
        link="dmpo",
        beta=beta,
        alpha=alpha,
        **knobs,
    )


def capo_loss(
    model_pred: Halves,
    target: Halves,
    ref_pred: Halves | None = None,
    delta: Scalar | None = None,
    *,
    ref_mse: Halves | None = None,
    beta: Scalar = 2500.0,
    **knobs: Unpack[Knobs],
) -> LossOutput:
    """CaPO: regress the margin on the difference of calibrated rewards.

    Per pair::

        loss   = (delta - margin)^2
        margin = -beta * (drop_w - drop_l)

    Args:
        model_pred, target, ref_pred, ref_mse: as in `dpo_loss`.
        delta: the winner's calibrated reward less the loser's, (B,) or one for all. A calibrated
            reward is a win rate, in [0, 1], against the pretrained model's samples;
            `fastpref.preferences` makes it of rewards, and chooses pairs.
        beta: no 1/2 is folded into it, means over elements. The paper's could not be read: the
            default is the strength of `dpo_loss`'s.
        knobs: as in `pair_loss`; logit_scale takes the factor that the paper's margin has besides,
            a weight of time sigmoid(-lambda_t + b), lambda_t being the log signal-to-noise ratio.

    Source: Lee et al., "Calibrated Multi-Preference Optimization for Aligning Diffusion Models",
    arXiv:2502.02588. The abstract confirms the regression; the formula comes from second-hand
    notes, and there is no code.
    """
    return pair_loss(
        model_pred,
        target,
        ref_pred,
        ref_mse=ref_mse,
        link="capo",
        beta=beta,
        delta=delta,  # type: ignore[arg-type]
        **knobs,
    )


def seppo_loss(
    model_pred: Halves,
    target: Halves,
    ref_pred: Halves | None = None,
    sign: Scalar = 1.0,
    *,
    ref_mse: Halves | None = None,
    beta: Scalar = 2500.0,
    **knobs: Unpack[SignedKnobs],
) -> LossOutput:
    """SePPO: the loser is the reference's own sample, and each pair says whether to push it away.

    Per pair::

        loss   = softplus(-margin)
        margin = -beta * (drop_w - sign * drop_l)

    Args:
        model_pred, target, ref_pred, ref_mse: as in `dpo_loss`; winners are the data's, losers are
            drawn from a reference model (in the paper, a random earlier checkpoint).
        sign: 1 where the sample is to be pushed away, -1 where it is judged good, and pulled up;
            (B,) or one for all. It goes to `pair_loss` as loser_weight, and errors call it so.
        beta: no 1/2 is folded into it. The paper's is not known to us: the default is the strength
            of `dpo_loss`'s.
        knobs: as in `pair_loss`; a weight of time goes to logit_scale.

    Source: Zhang et al., "SePPO: Semi-Policy Preference Optimization for Diffusion Alignment",
    arXiv:2410.05255. The formula comes from a review of it; the official repository has no training
    code, and the rule that sets the sign could not be verified: it is yours.
    """
    return pair_loss(
        model_pred,
        target,
        ref_pred,
        ref_mse=ref_mse,
        link="seppo",
        beta=beta,
        loser_weight=sign,
        **knobs,
    )


def npo_loss(
    model_pred: Halves,
    target: Halves,
    ref_pred: Halves | None = None,
    *,
    ref_mse: Halves | None = None,
    beta: Scalar = 2000.0,
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid",
    **knobs: Unpack[SwappedKnobs],
) -> LossOutput:
    """Diffusion-NPO: train a negative model, for the other end of guidance, by swapping the labels.

    For data whose labels say which image is better. Diffusion-NPO's own data loader has swapped
    the labels already: behind it the loss is `dpo_loss`, and this function would swap them back.

    Per pair, by loss_type "sigmoid"::

        loss   = softplus(-margin)
        margin = -beta/2 * (drop_l - drop_w)

    This is `dpo_loss` in which the loser is the preferred one; nothing is copied for it, and knobs
    that speak of winners (loser_weight, sft_weight) follow the swap. mse_w and mse_l in the result
    are the data's; the margin, and so the accuracy, grows as the model learns to prefer losers.

    Args:
        model_pred, target, ref_pred, ref_mse, knobs: as in `dpo_loss`.
        beta: 2000 in the official SDXL script; its SD1.5 script has 500 without the 1/2, 1000 here.
        loss_type: those of the official code.

    Source: Wang et al., "Diffusion-NPO: Negative Preference Optimization for Better Preference
    Aligned Generation of Diffusion Models", arXiv:2505.11245, and DPO-DPO-NPO/train_sdxl.py of
    github.com/G-U-N/Diffusion-NPO.
    """
    if loss_type not in ("sigmoid", "hinge", "ipo"):
        raise ValueError(f"loss_type is {loss_type!r}; expected sigmoid, hinge or ipo")
    return pair_loss(
        model_pred,
        target,
        ref_pred,
        ref_mse=ref_mse,
        link=f"dpo_{loss_type}",
        swap=True,
        beta=beta,
        **knobs,
    )


def budget_dpo_loss(
    model_pred: Halves,
    target: Halves,
    ref_pred: Halves | None = None,
    *,
    ref_mse: Halves | None = None,
    beta: Scalar = 5000.0,
    budget: Scalar = 0.0,
    budget_weight: Scalar = 1.0,
    **knobs: Unpack[Knobs],
) -> LossOutput:
    """Diffusion-DPO with a budget for the winner: it may get worse than the reference by so much.

    Per pair::

        loss   = softplus(-margin) + budget_weight * relu(beta/2 * drop_w - budget)
        margin = -beta/2 * (drop_w - drop_l)

    Args:
        model_pred, target, ref_pred, ref_mse, beta, knobs: as in `dpo_loss`.
        budget: what the winner may lose, in units of the margin.
        budget_weight: weight of what it loses beyond.

    Source: an analogue, for errors, of "Towards Improved Preference Optimization Pipeline: from
    Data Generation to Budget-Controlled Regularization", arXiv:2411.05875, whose abstract describes
    the budget; its formula could not be read, and the scale beta/2 on the winner's loss is ours.
    """
    return pair_loss(
        model_pred,
        target,
        ref_pred,
        ref_mse=ref_mse,
        link="budget_dpo",
        beta=beta,
        budget=budget,
        budget_weight=budget_weight,
        **knobs,
    )


def linear_dpo_loss(
    model_pred: Halves,
    target: Halves,
    ref_pred: Halves | None = None,
    *,
    ref_mse: Halves | None = None,
    beta: Scalar = 500.0,
    eta: Scalar = 0.0,
    **knobs: Unpack[Knobs],
) -> LossOutput:
    """Linear-DPO: the difference of the errors, by a weight that falls as the pair is won.

    Per pair, with the weight, min(max(...)), held constant in the gradient::

        loss   = min(max(0.5 - 0.4 * margin, eta), 1 - eta) * (mse_w - mse_l)
        margin = -beta/2 * (drop_w - drop_l)

    Args:
        model_pred, target, ref_pred, ref_mse: as in `dpo_loss`. The paper's reference is a moving
            average of the model.
        beta: 500 for SDXL and 100 for SD1.5 in the official scripts; with the 1/2 in the margin,
            over means. The code has the same weight as 0.5 + 0.2 * beta * (drop_w - drop_l).
        eta: the least weight, in [0, 0.5]: 0 for SDXL and 0.001 for SD1.5 in the scripts. At 0 a
            pair gets no gradient once its margin is 1.25; above, such a pair's loss has no bound.
        knobs: as in `pair_loss`; logit_scale and loser_weight multiply the errors with the scores.

    The loss is negative where the winner's error is the smaller one; its value says little, so
    watch the margin.

    Source: arXiv:2605.21123, and train_sd_dpo.py of github.com/WhynotChen0105/Linear-DPO, lines
    1158-1170. That the paper states what its code does was not verified.
    """
    return pair_loss(
        model_pred,
        target,
        ref_pred,
        ref_mse=ref_mse,
        link="linear_dpo",
        beta=beta,
        eta=eta,
        **knobs,
    )


def diffusion_dro_loss(
    model_pred: Halves,
    target: Halves,
    ref_pred: Halves | None = None,
    *,
    ref_mse: Halves | None = None,
    target_margin: Scalar = 0.001,
    **knobs: Unpack[Knobs],
) -> LossOutput:
    """Diffusion-DRO: expert images against the model's own, until they are apart by a margin.

    Per pair::

        loss   = relu(target_margin - margin)
        margin = drop_l - drop_w

    Args:
        model_pred, target, ref_pred, ref_mse: as in `dpo_loss`. Winners are the experts' images;
            losers replay a step of the model's own sampling, its latent with the prediction that it
            had made there as the target, each half at timesteps of its own.
        target_margin: how much more the expert's error must drop than the loser's.
        knobs: as in `pair_loss`.

    Not to be confused with reduction="dro". Source: "Ranking-based Preference Optimization for
    Diffusion Models from Implicit User Feedback", arXiv:2510.18353, and train.py of
    github.com/basiclab/DiffusionDRO, lines 745-768.
    """
    return pair_loss(
        model_pred,
        target,
        ref_pred,
        ref_mse=ref_mse,
        link="diffusion_dro",
        target_margin=target_margin,
        **knobs,
    )


def dspo_loss(
    model_pred: Halves,
    target: Halves,
    ref_pred: Halves | None = None,
    *,
    beta: Scalar = 0.001,
    **knobs: Unpack[SquaresKnobs],
) -> LossOutput:
    """DSPO, direct score preference optimization: fit the winner beyond its target, by what the
    reference is off, as long as the pair is not won.

    Per pair, with the winner's elements pred_w, target_w and ref_w, and no gradient cut off::

        loss   = mean((pred_w - target_w - beta * sigmoid(-margin) * (pred_w - ref_w))^2)
        margin = -beta/2 * (drop_w - drop_l)

    Args:
        model_pred, target: as in `pair_loss`. ref_pred: as in `dpo_loss`; its errors will not do.
        beta: .001 in the official SD1.5 script, .001 to .05 in its README. At .001 margins hardly
            leave 0, and the loss is nearly plain fine-tuning on winners.
        knobs: mask, pair_weight, safeguard, safeguard_over, loser_gradient_scale, error_reduction,
            reduction, dro_temperature and impl, as in `pair_loss`. Errors are squares. The loser's
            gradient comes from the sigmoid alone.

    Source: Zhu et al., "DSPO: Direct Score Preference Optimization for Diffusion Model Alignment",
    ICLR 2025, and train.py of github.com/huaishengzhu/DSPO, lines 1141-1169, the SD1.5 form. Its
    SDXL form, which at first trains nothing but the sigmoid and changes its formula once the batch
    has drifted by .1, is not here. The code is for 4-D latents; this takes any rank.
    """
    return summed_pair_loss(DSPO, model_pred, target, ref_pred, {"beta": beta}, **knobs)


def simpo_loss(
    model_pred: Halves,
    target: Halves,
    *,
    beta: Scalar = 250.0,
    gamma: Scalar = 0.5,
    **knobs: Unpack[Knobs],
) -> LossOutput:
    """SimPO: win by a margin gamma, without a reference model.

    Per pair::

        loss   = softplus(gamma - margin)
        margin = beta * (mse_l - mse_w)

    Args:
        model_pred, target, knobs: as in `pair_loss`.
        beta: scale of the errors. SimPO's own is for log probabilities of tokens; the default is
            the slope of `mapo_loss`'s margin at small errors.
        gamma: the margin to win by; 0 and above.

    Source: Meng et al., "SimPO: Simple Preference Optimization with a Reference-Free Reward",
    arXiv:2405.14734, as in TRL's cpo_trainer.py (`loss_type="simpo"`), with -mse in place of the
    mean log probability: that step, and both defaults, are ours.
    """
    return pair_loss(model_pred, target, link="simpo", beta=beta, gamma=gamma, **knobs)


def orpo_loss(
    model_pred: Halves, target: Halves, *, beta: Scalar = 0.1, **knobs: Unpack[Knobs]
) -> LossOutput:
    """Diffusion-ORPO: fit the winner, and prefer it by the difference of errors.

    Per pair::

        loss   = mse_w + beta * softplus(-margin)
        margin = mse_l - mse_w

    Args:
        model_pred, target: as in `pair_loss`.
        beta: weight of the preference term. Errors differ by some 1e-2, so that the margin hardly
            leaves 0: logit_scale widens it.
        knobs: as in `pair_loss`; sft_weight, the factor of mse_w, is 1 here.

    Source: diffusers' research project diffusion_orpo, train_diffusion_orpo_sdxl_lora.py
    (github.com/huggingface/diffusers), after Hong et al., "ORPO", arXiv:2403.07691. That script has
    the sign of the margin reversed: its ratio term rewards a winner that is worse than the loser.
    Here the winner is preferred. `mapo_loss` is the same authors' successor.
    """
    return pair_loss(model_pred, target, link="orpo", beta=beta, **knobs)


def pso_loss(
    model_pred: Halves,
    target: Halves,
    ref_pred: Halves | None = None,
    *,
    ref_mse: Halves | None = None,
    beta: Scalar | None = None,
    loss_type: Literal["hinge", "sigmoid"] = "hinge",
    loser_weight: Scalar = 0.1,
    prior_weight: Scalar = 0.5,
    **knobs: Unpack[OneSidedKnobs],
) -> LossOutput:
    """PSO's personalisation losses: target images against the model's own samples.

    Per pair, by loss_type "hinge", which compares with no reference::

        loss   = relu(1 - margin) + prior_weight * mse_l
        margin = beta * (loser_weight * mse_l - mse_w)

    and by "sigmoid", which does::

        loss   = softplus(-margin) + prior_weight * mse_l
        margin = beta * (loser_weight * drop_l - drop_w)

    Args:
        model_pred, target: as in `pair_loss`; winners are the target images, losers samples of the
            model. The official code compares predicted and true x0.
        ref_pred, ref_mse: for "sigmoid" only, as in `dpo_loss`.
        beta: no 1/2 is folded into it. Where none is given, 5 for hinge, as in every official
            script, and 200 for sigmoid, the official default.
        loss_type: "hinge" is the official `pso_db`, "sigmoid" its `pso`.
        loser_weight: the official `neg_defactor`.
        prior_weight: the official `prior_loss_weight`; it pulls the loser's error *down*.
        knobs: as in `pair_loss`; sample_weight takes the official sigma^-2.

    Source: Miao et al., "Tuning Timestep-Distilled Diffusion Model Using Pairwise Sample
    Optimization", arXiv:2410.03190, and personalization/train_pso_sdxl_turbo_dreambooth.py of
    github.com/ZichenMiao/Pairwise_Sample_Optimization, lines 1839-1891. PSO's online loss works on
    log probabilities of sampling steps, and is not here.
    """
    if loss_type not in ("hinge", "sigmoid"):
        raise ValueError(f"loss_type is {loss_type!r}; expected hinge or sigmoid")
    return pair_loss(
        model_pred,
        target,
        ref_pred,
        ref_mse=ref_mse,
        link=f"pso_{loss_type}",
        loser_weight=loser_weight,
        prior_weight=prior_weight,
        **_given(beta=beta),
        **knobs,
    )


def sft_loss(
    model_pred: Halves,
    target: Halves,
    *,
    paired: bool | None = None,
    **knobs: Unpack[Knobs],
) -> LossOutput:
    """Supervised fine-tuning (SFT), the baseline: on the winners of pairs, or on an unpaired batch.

    Per pair::

        loss   = mse_w
        margin = mse_l - mse_w

    Losers are measured, and not trained on. Of an unpaired batch every sample is trained on.

    Args:
        model_pred, target: as in `pair_loss`, or an unpaired batch of (B, ...) each.
        paired: True if model_pred stacks pairs, False if it is an unpaired batch. It must be given
            where both are single tensors of equal length, which may be either; a tuple (winners,
            losers), or a target that pairs share, says by itself that they are pairs.
        knobs: as in `pair_loss`; one number per sample, (B,), where the batch is unpaired.

    Returns:
        LossOutput. For an unpaired batch mse_w has the errors of all samples, mse_l repeats them,
        and margins are 0.

    Source: the simple objective of Ho et al., "Denoising Diffusion Probabilistic Models",
    arXiv:2006.11239.
    """
    return pair_loss(*_pairs(model_pred, target, paired, knobs), link="sft", **knobs)


def self_npo_loss(
    model_pred: Halves,
    target: Halves,
    *,
    paired: bool | None = None,
    huber_c: Scalar | None = 0.001,
    **knobs: Unpack[OwnErrorKnobs],
) -> LossOutput:
    """Self-NPO's regression on self-generated samples, for a negative model: `sft_loss` with
    pseudo-Huber errors.

    Per pair, with the error of a sample mean sqrt((model_pred - target)^2 + huber_c^2) - huber_c in
    place of mse::

        loss   = mse_w
        margin = mse_l - mse_w

    Args:
        model_pred, target, paired: as in `sft_loss`. The model's own truncated samples are trained
            on: as an unpaired batch, or as winners, whose losers (the data's images, say) are
            measured only.
        huber_c: where the error turns from quadratic to linear; a float or 0-d tensor. None for
            squares, the official code's other choice.
        knobs: as in `pair_loss`.

    Evaluated as d^2 / (sqrt(d^2 + c^2) + c), which keeps errors far below c. Source: Wang et al.,
    "Self-NPO", arXiv:2505.11777, and Self-NPO/train.py of github.com/G-U-N/Diffusion-NPO, lines
    1142-1147.
    """
    pairs = _pairs(model_pred, target, paired, knobs)
    return pair_loss(*pairs, link="sft", huber_c=huber_c, **knobs)


def _pairs(
    model_pred: Halves, target: Halves, paired: bool | None, knobs: Mapping[str, Any]
) -> tuple[Halves, Halves]:
    """Pairs as they are, and an unpaired batch as pairs of each sample with itself."""
    if paired is not None and not isinstance(paired, bool):
        raise TypeError(f"paired must be True or False, got {paired!r}")
    if not isinstance(model_pred, Tensor) or not isinstance(target, Tensor):
        if paired is False:
            raise ValueError(
                "paired is False, but model_pred or target is no single tensor; expected an "
                "unpaired batch, (B, ...) each"
            )
        return model_pred, target
    if paired is None and model_pred.dim() and model_pred.shape == target.shape:
        raise ValueError(
            f"paired is missing: model_pred and target have {model_pred.shape[0]} samples each; "
            "expected paired=True if they are pairs, winners first, of which the losers are not "
            "trained on, or paired=False if they are an unpaired batch"
        )
    if paired is not False:
        return model_pred, target
    if of_losers := [name for name in ("swap", "prior_weight") if name in knobs]:
        raise TypeError(
            f"{of_losers[0]} was given with paired=False, but an unpaired batch has no losers"
        )
    if model_pred.shape != target.shape:
        raise ValueError(
            f"target has shape {tuple(target.shape)}, but model_pred is an unpaired batch of shape "
            f"{tuple(model_pred.shape)}; expected the same shape"
        )
    return (model_pred, model_pred.detach()), (target, target)


def _given(**scalars: Scalar | None) -> dict[str, Any]:
    return {name: value for name, value in scalars.items() if value is not None}
