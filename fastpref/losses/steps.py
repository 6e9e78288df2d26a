"""Losses on the steps of a sampler, and DiffusionNFT's, on the forward process with an old policy.

A step takes a sampler from x to x_next = a x + b pred + std z; `fastpref.transitions` has a, b and
std of the usual samplers, and samples steps rounded to the dtype in which they are stored. In the
formulas log_ratio is log(p(x_next | x) / p_old(x_next | x)), means over a sample's elements of::

    -weight * b^2 * (pred - old_pred) * (pred + old_pred - 2 * (x_next - a * x) / b)

with weight = 1 / (2 std^2), 1 for CPS. As a product it is exactly 0, and the ratio 1, where
model_pred equals old_pred. The published codes subtract two log-probabilities, which in fp32 is off
by 9e-9 to 2e-7 (benchmarks/results/precision-steps.csv), while clips in use are 1e-3 to 2e-6.
Log-probabilities that a framework stored are taken in place of predictions, at that precision.

Every function returns a StepOutput (`nft_loss` a ForwardOutput), runs in one launch each way, and
raises a TypeError or ValueError that names the argument, what came and what is needed. Each number
may be a float, a 0-d tensor or a (B,) tensor; those of a transition are tensors. A step without
noise, std = 0, adds exactly 0 to loss and gradient, and counts in the mean.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor
from typing_extensions import Unpack

from fastpref_kernels.steps import (
    GRPO,
    GRPO_OF_LOG,
    NFT,
    SDPO,
    SDPO_OF_LOG,
    STEP_DPO,
    STEP_DPO_OF_LOG,
)

from ..batch import Halves, Scalar
from ..dispatch import MissingReference
from ..gaussians import Kind
from ..grouped import run
from ..outputs import ForwardOutput, StepOutput
from ..rows import STEP_NAMES, Names, check_groups
from ..stepwise import (
    PairStepKnobs,
    StepKnobs,
    check_transition,
    pair_step_loss,
    scores_of,
    step_loss,
)
from ..transitions import Transition

GRPOVariant: TypeAlias = Literal["clip", "guard", "dppo"]
KLUnit: TypeAlias = Kind


def grpo_loss(
    model_pred: Tensor,
    old_pred: Tensor | None,
    x: Tensor,
    x_next: Tensor,
    transition: Transition,
    advantage: Scalar,
    *,
    clip_range: Scalar = 1e-4,
    clip_range_high: Scalar | None = None,
    advantage_clip: Scalar | None = 5.0,
    old_log_prob: Tensor | None = None,
    ref_pred: Tensor | None = None,
    kl_weight: Scalar = 0.0,
    kl: KLUnit = "v",
    variant: GRPOVariant = "clip",
    divergence_limit: Scalar = 1e-5,
    **knobs: Unpack[StepKnobs],
) -> StepOutput:
    """Flow-GRPO and its kin, GRPO on the steps of a sampler: DanceGRPO, MixGRPO, GRPO-Guard, DPPO.

    Per sample, with ratio = exp(log_ratio), A = advantage within +-advantage_clip, and clip(r) = r
    between 1 - clip_range and 1 + clip_range_high, by variant "clip"::

        loss = max(-A * ratio, -A * clip(ratio)) + kl_weight * kl

    "guard" (GRPO-Guard) has in place of log_ratio its part that is linear in the prediction, times
    std, which is mean(z * b * (pred - old_pred)), and divides the clipped loss by dt. (With the
    weight of 1 that CPS has as published, it is the formula, but not linear.) ::

        log_ratio = std * (log_ratio + mean((b * (pred - old_pred))^2) / (2 * std^2))

    "dppo" (Flow-DPPO) clips neither ratio nor advantage, but drops samples that are far from the
    old policy and would go farther::

        loss = 0 if D >= divergence_limit and (ratio - 1) * A > 0 else -A * ratio
        D    = mean((b * (pred - old_pred))^2) / (2 * std^2)

    Args:
        model_pred: the policy's prediction at x, (B, ...), with which the transition was made.
        old_pred: that of the policy that sampled x_next, replayed or kept. At the first update
            after a rollout it is ``model_pred.detach()``.
        x, x_next: latents before and after the step, as they were stored: `Transition.sample`
            rounds x_next before it goes on.
        transition: the steps', from `fastpref.transitions`, on model_pred's device.
        advantage: (B,); see `fastpref.advantages`.
        clip_range, clip_range_high: 1e-4 by default; 1e-5 for few steps, 1e-3 for video (Wan), and
            2e-6 for "guard". The upper one is the lower one unless given. Ratios are compared as
            logarithms, which is right for any clip.
        advantage_clip: None for none.
        old_log_prob: in place of old_pred, (B,) log-probabilities as the sampler stored them:
            means over elements, with the normalizer unless transition.normalized is False. Only
            "clip" can do with them.
        ref_pred: the frozen reference's prediction at x, for kl.
        kl_weight: .04 (GenEval, OCR) to .004 (video) in Flow-GRPO, which is for kl="published".
            A weight goes with its unit: at sigma .5, "v" is some 60 times "published".
        kl: what the divergence from ref_pred is measured in: "v", mean((pred - ref_pred)^2), or
            "x", b^2 times that (Flow-Factory's v-based and x-based); "gaussian", that over 2 std^2,
            the KL divergence of the two steps; "published", dt times that, which Flow-GRPO's code
            computes, or that itself for CPS (transition.normalized False).
        variant: see above.
        divergence_limit: of "dppo".
        knobs: as in `fastpref.stepwise.step_loss`; sample_weight is for importance weights.

    Where a batch mixes steps, "guard" has std and dt of each sample; the published code takes the
    batch's means of sqrt(dt) and std / sqrt(dt), which is the same for equal steps.

    Source: Liu et al., "Flow-GRPO", arXiv:2505.05470, scripts/train_sd3.py of
    github.com/yifan123/flow_grpo, lines 880-905; DanceGRPO, arXiv:2505.07818; MixGRPO,
    arXiv:2507.21802; GRPO-Guard, arXiv:2510.22319, and Flow-DPPO, arXiv:2606.11025, as
    verl_omni/trainer/diffusion/diffusion_algos.py of github.com/verl-project/verl-omni has them:
    GRPO-Guard's own script was not read, and Flow-Factory's does not divide by dt.
    """
    if variant not in GRPO:
        raise ValueError(f"variant is {variant!r}; expected one of {', '.join(GRPO)}")
    if kl not in get_args(KLUnit):
        raise ValueError(f"kl is {kl!r}; expected one of {', '.join(get_args(KLUnit))}")
    if variant != "clip" and old_pred is None:
        raise MissingReference(
            f"old_pred is missing; variant {variant!r} needs it, old_log_prob is not enough"
        )
    links = GRPO[variant] if old_log_prob is None else GRPO_OF_LOG
    check_transition(transition)
    numbers: dict[str, Any] = {"advantage": advantage, "divergence_limit": divergence_limit}
    if variant == "dppo":
        _refuse_clips(clip_range, clip_range_high, advantage_clip)
    elif isinstance(divergence_limit, Tensor) or divergence_limit != 1e-5:
        raise ValueError(f'divergence_limit was given, but variant is {variant!r}, not "dppo"')
    else:
        numbers |= _clips(clip_range, clip_range_high, advantage_clip)
    numbers["kl_weight"] = kl_weight
    numbers |= zip(("kl.half", "kl.dt", "kl.b", "kl.std"), transition.kl_factors(kl), strict=True)
    _check_kl(ref_pred, kl_weight)
    link = links[ref_pred is not None]
    return step_loss(
        link, model_pred, old_pred, old_log_prob, x, x_next, transition, numbers, ref_pred, **knobs
    )


def _clips(low: Scalar, high: Scalar | None, advantage_clip: Scalar | None) -> dict[str, Any]:
    limit = float("inf") if advantage_clip is None else advantage_clip
    above = low if high is None else high
    return {"clip_range": low, "clip_range_high": above, "advantage_clip": limit}


def _refuse_clips(low: Any, high: Any, advantage_clip: Any) -> None:
    given = {"clip_range": (low, 1e-4), "clip_range_high": (high, None)}
    for name, (value, default) in {**given, "advantage_clip": (advantage_clip, 5.0)}.items():
        if value is not None and (isinstance(value, Tensor) or value != default):
            raise ValueError(f'{name} was given, but variant is "dppo", which does not clip')


def _check_kl(ref_pred: Any, weight: Scalar) -> None:
    if ref_pred is None and (isinstance(weight, Tensor) or weight != 0.0):
        raise MissingReference(
            "ref_pred is missing; kl_weight weighs the divergence from the reference's prediction"
        )


def step_dpo_loss(
    model_pred: Halves,
    ref_pred: Halves | None,
    x: Halves,
    x_next: Halves,
    transition: Transition,
    *,
    beta: Scalar,
    clip: Scalar | None = 0.1,
    ref_log_prob: Halves | None = None,
    **knobs: Unpack[PairStepKnobs],
) -> StepOutput:
    """Step DPO, on the steps of a sampler: D3PO, SPO, LPO, PSO online, TailorPO.

    Per pair of steps, log_ratio being to the frozen reference, and clamp(l) being l between
    log(1 - clip) and log(1 + clip)::

        loss   = softplus(-margin)
        margin = beta * (clamp(log_ratio_w) - clamp(log_ratio_l))

    A clamped step has no gradient. The published codes clamp exp(log_ratio) between 1 - clip and 1
    + clip and take the logarithm of that, which is the same but for overflow.

    Args:
        model_pred, ref_pred, x: of the steps, (2B, ...) with the winners first or tuples (winners,
            losers); or (B, ...) where both steps of a pair were drawn from one x (SPO, LPO,
            TailorPO), whose prediction is then read once.
        x_next: where the steps went, (2B, ...) or a tuple.
        transition: of () or (B,) numbers for both steps of a pair, or (2B,).
        beta: D3PO .1, SPO 10, LPO 500, PSO 50.
        clip: None for none. TailorPO's equations could not be read anywhere: it is believed to be
            SPO's loss without it.
        ref_log_prob: in place of ref_pred, (2B,) or a tuple; see `grpo_loss`.
        knobs: as in `fastpref.stepwise.pair_step_loss`.

    Source: D3PO, arXiv:2311.13231, scripts/train.py of github.com/yk7333/d3po, lines 411-413; SPO,
    arXiv:2406.04314, train_spo_sdxl.py of github.com/RockeyCoss/SPO, lines 669-671; LPO,
    arXiv:2502.01051, train_lpo_sdxl.py of github.com/Kwai-Kolors/LPO, lines 689-694; PSO,
    arXiv:2410.03190, train_online_pso_sdxl_turbo.py of github.com/ZichenMiao/
    Pairwise_Sample_Optimization, lines 844-850. TailorPO, arXiv:2502.01667: not verified.
    """
    links = STEP_DPO if ref_log_prob is None else STEP_DPO_OF_LOG
    numbers = {"beta": beta, "clip": clip}
    names = Names("x_next", "ref_pred", "ref_log_prob")
    return pair_step_loss(
        links[clip is not None], model_pred, ref_pred, ref_log_prob, x, x_next, transition,
        numbers, names, **knobs,
    )  # fmt: skip


def sdpo_loss(
    model_pred: Halves,
    old_pred: Halves | None,
    x: Halves,
    x_next: Halves,
    transition: Transition,
    advantage: Tensor | tuple[Scalar, Scalar],
    *,
    step_weight: Scalar = 1.0,
    clip_range: Scalar = 1e-4,
    advantage_clip: Scalar | None = 5.0,
    old_log_prob: Halves | None = None,
    **knobs: Unpack[PairStepKnobs],
) -> StepOutput:
    """SDPO, dense reward difference learning: differences of log-ratios fitted to those of rewards.

    Per pair of steps of two trajectories of one prompt, A being advantages within +-advantage_clip
    and clamp(l) being l within +-clip_range::

        loss = max((d(log_ratio) - A_1 + A_2)^2, (d(clamp(log_ratio)) - A_1 + A_2)^2)
        d(l) = step_weight * (l_1 - l_2)

    Args:
        model_pred, old_pred, x, x_next: of both trajectories' steps, (2B, ...) with the first
            ones first, or tuples. old_pred: of the policy that sampled them.
        transition: of () or (B,) numbers for both steps of a pair, or (2B,).
        advantage: (2B,), or a tuple; the official code's are of dense rewards for each step, for
            which see `fastpref.advantages`.
        step_weight: .99^j at step j, over its log_scale of 1.
        clip_range: of log-ratios.
        advantage_clip: None for none.
        old_log_prob: in place of old_pred, (2B,) or a tuple; see `grpo_loss`. The official code
            takes log-probabilities of x_next as it was before it was rounded to fp16.
        knobs: as in `fastpref.stepwise.pair_step_loss`.

    The margin in the output is log_ratio_1 - log_ratio_2, signed so that it is > 0 where the policy
    moved towards the trajectory of the higher advantage.

    Source: Zhang et al., "Aligning Few-Step Diffusion Models with Dense Reward Difference
    Learning", arXiv:2411.11727, scripts/train_sdpo.py of github.com/ZiyiZhang27/sdpo, lines
    771-808. This SDPO is not Diffusion-SDPO, the safeguard of `pair_loss`.
    """
    of_each = _of_each(advantage)
    numbers = {
        "step_weight": step_weight,
        "advantage[0]": of_each[0],
        "advantage[1]": of_each[1],
        "clip_range": clip_range,
        "advantage_clip": float("inf") if advantage_clip is None else advantage_clip,
    }
    link = SDPO if old_log_prob is None else SDPO_OF_LOG
    return pair_step_loss(
        link, model_pred, old_pred, old_log_prob, x, x_next, transition, numbers, STEP_NAMES,
        **knobs,
    )  # fmt: skip


def _of_each(advantage: Any) -> tuple[Scalar, Scalar]:
    if isinstance(advantage, (tuple, list)):
        if len(advantage) == 2:
            return advantage[0], advantage[1]
        what = f"a {type(advantage).__name__} of {len(advantage)}"
    elif not isinstance(advantage, Tensor):
        what = f"a {type(advantage).__name__}"
    elif advantage.dim() == 1 and len(advantage) % 2 == 0:
        first, second = advantage.chunk(2)
        return first, second
    else:
        what = f"a tensor of shape {tuple(advantage.shape)}"
    raise ValueError(
        f"advantage is {what}; expected a tensor of shape (2B,), the first trajectories' first, or "
        "a tuple of two (B,)"
    )


def nft_loss(
    model_pred: Tensor,
    target: Tensor,
    old_pred: Tensor,
    reward: Scalar,
    *,
    t: Scalar | None = None,
    beta: Scalar = 1.0,
    adaptive: bool = True,
    ref_pred: Tensor | None = None,
    kl_weight: Scalar = 0.0,
    **knobs: Unpack[StepKnobs],
) -> ForwardOutput:
    """DiffusionNFT (NFT): towards the target where the reward is high, and away where it is low.

    Per sample of the forward process, x_t = (1 - t) x0 + t noise, with the velocity noise - x0 as
    its target, v_+ = old_pred + beta * (pred - old_pred) and v_- its mirror image about old_pred::

        loss  = 5 / beta * (reward * err_+ + (1 - reward) * err_-) + kl_weight * kl
        err_+ = t^2 * mean((v_+ - target)^2) / max(t * mean(abs(v_+ - target)), 1e-5)

    err_- being the same of v_-, the divisor a constant, and kl = mean((pred - ref_pred)^2).

    Args:
        model_pred, target, old_pred: velocities, (B, ...). old_pred: of the policy that sampled, or
            its slowly following average.
        reward: (B,), in [0, 1]: of an advantage A it is 0.5 + clamp(A, -5, 5) / 10, whose 5 is the
            one in the formula.
        t: (B,) the times of the samples, in (0, 1]. Without them it is 1.
        beta: 1 in the paper's base configuration; .1 for OCR and several rewards.
        adaptive: without it, nothing is divided, and err_+ is t^2 mean((v_+ - target)^2): with t =
            1 it is the loss of the paper, whose authors call the weight a stabilizer.
        ref_pred: the frozen reference's velocity. kl_weight: 1e-4 in the official code.
        knobs: as in `fastpref.stepwise.step_loss`.

    Returns:
        ForwardOutput; errors and drops are of model_pred against target, and against old_pred's.
        margin: (2 reward - 1) * -drop, > 0 where the policy moved as it was told.

    Source: Zheng et al., "DiffusionNFT", arXiv:2509.16117, scripts/train_nft_sd3.py of
    github.com/NVlabs/DiffusionNFT, lines 895-985, which computes in fp64.
    """
    if not isinstance(adaptive, bool):
        raise TypeError(f"adaptive must be True or False, got a {type(adaptive).__name__}")
    if old_pred is None:
        raise MissingReference("old_pred is missing; the loss compares with the old policy")
    _check_kl(ref_pred, kl_weight)
    batch = check_groups(
        model_pred, target, old_pred, None, knobs.get("mask"), 1,
        anchor=ref_pred, names=Names(ref="old_pred"),
    )  # fmt: skip
    numbers = {"reward": reward, "t": 1.0 if t is None else t, "beta": beta}
    link = NFT[adaptive][ref_pred is not None]
    loss, stats, options = run(
        link, batch, {**numbers, "kl_weight": kl_weight}, StepKnobs, {**knobs}
    )
    margin, kl = scores_of(stats, options, batch)
    errors, drops, old_errors, drifts = stats[:4]
    of_ref = None if ref_pred is None else kl
    return ForwardOutput(loss, errors, old_errors, drops, drifts, margin, of_ref)
