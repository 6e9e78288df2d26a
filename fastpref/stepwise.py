"""Entry points of the losses on the steps of a sampler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from typing_extensions import TypedDict, Unpack

from fastpref_kernels.knobs import kinds_of
from fastpref_kernels.links import FINITE, Group, Hyper
from fastpref_kernels.steps import DT, OF_STEP

from .batch import DTYPES, Batch, Halves, Scalar, tensor_of
from .dispatch import Impl, MissingReference, Reduction
from .gaussians import check_device
from .grouped import run
from .outputs import StepOutput
from .rows import STEP_NAMES, Names, check_groups, check_pairs_of_steps
from .scalars import check_scalar
from .sums import Options
from .transitions import Transition


class StepKnobs(TypedDict, total=False):
    """Keyword arguments of losses on steps; see `step_loss`."""

    mask: Tensor
    sample_weight: Scalar | None
    reduction: Reduction
    dro_temperature: Scalar
    impl: Impl


class PairStepKnobs(TypedDict, total=False):
    """Of losses on pairs of steps; see `pair_step_loss`."""

    mask: Halves
    pair_weight: Scalar | None
    reduction: Reduction
    dro_temperature: Scalar
    impl: Impl


def step_loss(
    link: Group,
    model_pred: Tensor,
    old_pred: Tensor | None,
    old_log_prob: Tensor | None,
    x: Tensor,
    x_next: Tensor,
    transition: Transition,
    numbers: Mapping[str, Any],
    ref_pred: Tensor | None = None,
    **knobs: Unpack[StepKnobs],
) -> StepOutput:
    """The loss of a link on single steps, (B, ...).

    Args:
        numbers: the link's, by name, without the transition's.
        ref_pred: a reference beside the old policy.
        knobs:
            mask: weights of the elements, as in `pair_loss`; means are over what it leaves.
            sample_weight: of each sample's loss, such as an importance weight; the mean still
                counts a sample of weight 0, whatever is in it.
            reduction, dro_temperature, impl: as in `pair_loss`.
    """
    _check_other(old_pred, old_log_prob, STEP_NAMES)
    check_transition(transition)
    batch = check_groups(
        model_pred, x_next, old_pred, old_log_prob, knobs.get("mask"), 1,
        base=tensor_of("x", x, 2, DTYPES), anchor=ref_pred, names=STEP_NAMES,
    )  # fmt: skip
    checked = _numbers_of(transition, batch)
    batch = batch._replace(affine=(checked["transition.a"], checked["transition.b"]))
    loss, stats, options = run(link, batch, numbers, StepKnobs, {**knobs}, checked=checked)
    log_ratio, clipped, kl = scores_of(stats, options, batch)
    return StepOutput(loss, log_ratio, clipped, None if ref_pred is None else kl)


def pair_step_loss(
    link: Group,
    model_pred: Halves,
    ref_pred: Halves | None,
    ref_log_prob: Halves | None,
    x: Halves,
    x_next: Halves,
    transition: Transition,
    numbers: Mapping[str, Any],
    names: Names,
    **knobs: Unpack[PairStepKnobs],
) -> StepOutput:
    """The loss of a link on pairs of steps, stacked with the winners first, or as tuples; what both
    steps of a pair have in common may be (B, ...).

    Args:
        numbers: as in `step_loss`. names: what the loss calls its operands.
        knobs:
            mask: as in `step_loss`, of pairs.
            pair_weight: of each pair's loss; see sample_weight in `step_loss`.
            reduction, dro_temperature, impl: as in `pair_loss`.
    """
    _check_other(ref_pred, ref_log_prob, names)
    check_transition(transition)
    batch = check_pairs_of_steps(
        model_pred, x_next, x, ref_pred, ref_log_prob, knobs.get("mask"), names
    )
    checked = _numbers_of(transition, batch)
    batch = batch._replace(affine=(checked["transition.a"], checked["transition.b"]))
    for name, number in [*checked.items()]:
        split = isinstance(number, Tensor) and number.dim() == 1 and len(number) != batch.n_groups
        halves = number.chunk(2) if split else (number, number)  # type: ignore[union-attr]
        checked |= {f"{name}[{m}]": half for m, half in enumerate(halves)}
    loss, stats, options = run(link, batch, numbers, PairStepKnobs, {**knobs}, checked=checked)
    scores = scores_of(stats, options, batch)
    return StepOutput(loss, scores[1:3].reshape(-1), scores[3:5].reshape(-1), None, scores[0])


def check_transition(transition: Any) -> None:
    if not isinstance(transition, Transition):
        raise TypeError(
            "transition must be a fastpref.transitions.Transition, got a "
            f"{type(transition).__name__}"
        )
    for name, field in zip(Transition._fields[:5], transition, strict=False):
        if not isinstance(field, Tensor):
            what = type(field).__name__
            raise TypeError(f"transition.{name} must be a torch.Tensor, got a {what}")
    if not isinstance(transition.normalized, bool):
        raise TypeError(
            "transition.normalized must be True or False, got a "
            f"{type(transition.normalized).__name__}"
        )


def _check_other(pred: Any, log_prob: Any, names: Names) -> None:
    if pred is None and log_prob is None:
        raise MissingReference(
            f"{names.ref} or {names.ref_errors} is missing; the loss compares with another policy "
            "and needs its predictions or its log-probabilities"
        )


def _numbers_of(transition: Transition, batch: Batch) -> dict[str, Scalar]:
    """By the names that links have for them: one for all, for each group, or for each sample."""
    check_device(transition, "model_pred", batch.device)
    rows = batch.n_groups * batch.members
    found: dict[str, Scalar] = {"transition.normalized": float(transition.normalized)}
    for name, hyper in {**OF_STEP, **DT, "transition.a": Hyper(None, FINITE)}.items():
        value = getattr(transition, name.removeprefix("transition."))
        n = rows if value.dim() == 1 and len(value) == rows else batch.n_groups
        found[name] = check_scalar(name, value, hyper, n, batch.device)
    return found


def scores_of(stats: Tensor, options: Options, batch: Batch) -> Tensor:
    """The rows of stats that the link names."""
    drift, cross = options.needs
    kinds = kinds_of(options.link, batch.ref[0] is not None, drift, batch.anchor[0] is not None)
    first = batch.members * kinds + cross
    return stats[first : first + len(options.link.scores)]
