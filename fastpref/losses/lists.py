"""Losses on ranked lists of k samples of one prompt.

In the formulas, i and j are samples of a list, mse_i the error of one, mean (model_pred - target)^2
over its elements, and drop_i = mse_i - ref_mse_i what it is above the frozen reference's. Every
function takes model_pred and ref_pred of (B * k, ...), in which the k rows of a prompt follow one
another, target likewise or (B, ...) if a list shares it, or the reference's errors ref_mse,
(B * k,), in place of its predictions; and the knobs of `fastpref.grouped.sample_loss`: mask,
huber_c, weight, error_reduction, reduction, dro_temperature and impl. It returns a SampleOutput
whose errors and drops are (B, k), and raises a TypeError or ValueError that names the argument,
what came and what is needed.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from typing_extensions import Unpack

from fastpref_kernels.groups import LONGEST, PLACKETT_LUCE, RANKDPO
from fastpref_kernels.links import Group

from ..batch import Scalar, plain
from ..grouped import GroupKnobs, sample_loss
from ..outputs import SampleOutput


def rankdpo_loss(
    model_pred: Tensor,
    target: Tensor,
    ref_pred: Tensor | None = None,
    score: Tensor | None = None,
    *,
    ref_mse: Tensor | None = None,
    beta: Scalar = 5000.0,
    lengths: Tensor | None = None,
    **knobs: Unpack[GroupKnobs],
) -> SampleOutput:
    """RankDPO: Diffusion-DPO on all pairs of a list, weighed by how much they change its DCG.

    Per list, a sum over its pairs in which i scores higher than j, with rank 1 for the best::

        loss   = gain * discount * softplus(-margin)
        margin = beta * (drop_j - drop_i)
        gain = abs(2^score_i - 2^score_j)
        discount = abs(1 / log(1 + rank_i) - 1 / log(1 + rank_j))

    Args:
        model_pred, target, ref_pred, ref_mse: of B lists of k samples, k from 2 to 16.
        score: (B, k) in [0, 1], the paper's phi: the share of comparisons that the sample wins
            under several reward models (`fastpref.preferences.win_fractions`). Samples that score
            the same are not compared; of them the first counts as the better one in the ranks.
        beta: no 1/2 is folded into it, means over elements. The paper does not state it; at k = 2
            and 2500 this is `dpo_loss` with a weight of each pair.
        lengths: (B,) integers: how many of its k rows each list has; the others may be anything,
            and have no gradient.
        knobs: as in `fastpref.grouped.sample_loss`.

    Source: Karthik et al., "Scalable Ranked Preference Optimization for Text-to-Image Generation",
    arXiv:2410.18013, section 3.3 and algorithms 1 and 2. There is no official code. Ranks are those
    of the scores, as in algorithm 2; the paper has one timestep a prompt, and noise of each image.
    """
    return _list_loss(RANKDPO, model_pred, target, ref_pred, score, ref_mse, beta, lengths, **knobs)


def plackett_luce_loss(
    model_pred: Tensor,
    target: Tensor,
    ref_pred: Tensor | None = None,
    score: Tensor | None = None,
    *,
    ref_mse: Tensor | None = None,
    beta: Scalar = 2500.0,
    lengths: Tensor | None = None,
    **knobs: Unpack[GroupKnobs],
) -> SampleOutput:
    """Plackett-Luce (Diffusion-LPO): each sample of a list against all that rank no higher.

    Per list, a sum over its samples j, in which i runs over j itself and those that score no
    higher::

        loss   = log(sum(exp(beta * (drop_j - drop_i))))
        margin = beta * (drop_j - drop_i)

    Args:
        model_pred, target, ref_pred, ref_mse: of B lists of k samples, k from 2 to 16.
        score: (B, k); only its order counts. Samples that score the same are in each other's sums.
        beta: no 1/2 is folded into it, means over elements; a list of two is `dpo_loss` at twice
            this beta. The paper's could not be read: the default is the strength of `dpo_loss`'s.
        lengths: as in `rankdpo_loss`. knobs: as in `fastpref.grouped.sample_loss`.

    Not to be confused with latent preference optimization, LPO as well. Source: "Towards Better
    Optimization For Listwise Preference in Diffusion Models", arXiv:2510.01540, from second-hand
    notes; how it treats ties is not known.
    """
    return _list_loss(
        PLACKETT_LUCE, model_pred, target, ref_pred, score, ref_mse, beta, lengths, **knobs
    )


def _list_loss(
    links: Mapping[int, Group],
    model_pred: Tensor,
    target: Tensor,
    ref_pred: Tensor | None,
    score: Tensor | None,
    ref_mse: Tensor | None,
    beta: Scalar,
    lengths: Tensor | None,
    **knobs: Unpack[GroupKnobs],
) -> SampleOutput:
    scores = plain("score", score)
    if scores.dim() != 2 or not 2 <= scores.shape[1] <= LONGEST:
        raise ValueError(
            f"score has shape {tuple(scores.shape)}; expected (B, k), with k from 2 to {LONGEST}"
        )
    return sample_loss(
        links[scores.shape[1]], model_pred, target, ref_pred, ref_mse, {"beta": beta},
        {"score": scores}, lengths, **knobs,
    )  # fmt: skip
