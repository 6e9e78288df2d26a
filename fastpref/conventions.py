"""Conventions of beta in other codes: with or without 1/2 and T, over means or sums."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, TypeAlias

from .arguments import check_count, real_number

DPOLossType: TypeAlias = Literal[
    "sigmoid", "ipo", "hinge", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard",
    "apo_zero", "apo_down", "alpha",
]  # fmt: skip
DPO_LOSS_TYPES: tuple[DPOLossType, ...] = DPOLossType.__args__  # type: ignore[attr-defined]


class Convention(NamedTuple):
    """How a code turns beta into the strength of its logit, -strength * (drop_w - drop_l) with
    drops of mean squared errors."""

    factor: float
    sums: bool = False  # over the elements of a sample, instead of means
    timesteps: bool = False  # times num_train_timesteps
    source: str = ""


CONVENTIONS: dict[str, Convention] = {
    "fastpref": Convention(0.5, source="dpo_loss, smpo_loss, dmpo_loss, npo_loss, budget_dpo_loss"),
    "DiffusionDPO": Convention(0.5, source="SalesforceAIResearch/DiffusionDPO, train.py"),
    "DiffusionDPO-paper": Convention(1.0, True, True, source="arXiv:2311.12908, beta * T"),
    "diffusers-sd15": Convention(1.0, source="diffusers diffusion_dpo, train_diffusion_dpo.py"),
    "diffusers-sdxl": Convention(0.5, source="the same, train_diffusion_dpo_sdxl.py"),
    "SimpleTuner": Convention(0.5, True, source="bghira/SimpleTuner, flow_dpo, norm_type sum"),
    "SimpleTuner-mean": Convention(0.5, source="the same, norm_type mean or masked_mean"),
    "Flow-DPO": Convention(0.5, source="yifan123/flow_grpo, train_sd3_dpo.py"),
    "Flow-Factory": Convention(0.5, source="X-GenGroup/Flow-Factory, trainers/dpo.py"),
    "LongCat-Image": Convention(1.0, source="meituan-longcat/LongCat-Image, train_dpo.py"),
    "DiffSynth": Convention(1.0, source="DiffSynth-Studio, branch dpo, trainers/utils.py"),
}


def convert_beta(
    beta: float,
    source: str,
    target: str = "fastpref",
    *,
    loss_type: str = "sigmoid",
    n_elements: int | None = None,
    num_train_timesteps: int = 1000,
) -> float:
    """The beta with which `target`'s Diffusion-DPO loss is what `source`'s is with `beta`.

    ``beta * factor * (n_elements if sums) * (num_train_timesteps if timesteps)`` is equal in both:

    ====================  ======  ==========  ===
    convention            factor  elements    T
    ====================  ======  ==========  ===
    fastpref              1/2     mean        no
    DiffusionDPO          1/2     mean        no
    DiffusionDPO-paper    1       sum         yes
    diffusers-sd15        1       mean        no
    diffusers-sdxl        1/2     mean        no
    SimpleTuner           1/2     sum         no
    SimpleTuner-mean      1/2     mean        no
    Flow-DPO              1/2     mean        no
    Flow-Factory          1/2     mean        no
    LongCat-Image         1       mean        no
    DiffSynth             1       mean        no
    ====================  ======  ==========  ===

    In ``ipo`` and ``sppo_hard`` beta does not scale the margin, only the value 1 / (2 beta) that
    the margin is regressed on, so the factor has no part: beta is the same between conventions of
    means. Where one margin is a sum, or has T, beta moves by n_elements or T, and the loss itself
    differs by the square of that. Of the codes above only diffusers-sd15 has ipo; for the others
    this is what follows from their margin.

    Args:
        beta: in source's convention, above 0.
        source, target: names from the table. "fastpref" is what `dpo_loss` and the losses with a
            -beta/2 take; seppo_loss, capo_loss and pso_loss have no 1/2, and so half that beta.
        loss_type: of `dpo_loss`.
        n_elements: elements of a sample, 4 * 128 * 128 for SDXL at 1024 pixels; where sums come in.
        num_train_timesteps: the paper's T.

    Raises: TypeError, ValueError. Weights of time (DiffSynth's) go to sample_weight, and do not
    change beta.
    """
    if not 0.0 < real_number("beta", beta) < math.inf:
        raise ValueError(f"beta is {beta}; expected a finite number above 0")
    counts = {"n_elements": n_elements, "num_train_timesteps": num_train_timesteps}
    for name, count in counts.items():
        if count is None and name == "n_elements":
            continue
        check_count(name, count)
    if loss_type not in DPO_LOSS_TYPES:
        raise ValueError(f"loss_type is {loss_type!r}; expected one of {', '.join(DPO_LOSS_TYPES)}")
    strengths = []
    for argument, name in (("source", source), ("target", target)):
        if not isinstance(name, str) or name not in CONVENTIONS:
            known = ", ".join(CONVENTIONS)
            raise ValueError(f"{argument} is {name!r}; expected one of {known}")
        factor, sums, timesteps, _ = CONVENTIONS[name]
        if sums and n_elements is None:
            raise ValueError(
                f"n_elements is {n_elements}; expected the number of elements of a sample, because "
                f"{name} sums their squares"
            )
        strength = 1.0 if loss_type in ("ipo", "sppo_hard") else factor
        strength *= n_elements if sums and n_elements is not None else 1
        strengths.append(strength * (num_train_timesteps if timesteps else 1))
    return float(beta) * strengths[0] / strengths[1]
