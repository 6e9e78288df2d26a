"""A reading of training curves: which known pattern they show, and which setting to change."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

Picture: TypeAlias = Literal[
    "early", "collapsing", "winner getting worse too", "saturated", "over-sharpened", "healthy",
    "flat", "unclear",
]  # fmt: skip

NEEDED = ("mse_w", "mse_l", "margin", "accuracy", "gradient_factor")
FEWEST = 20  # rows
WORSE = 1.1  # times the winner's error before: it gets worse
COLLAPSED = 3.0  # times: the model forgets how to denoise
BETTER = 0.95
PUSHED = 1.5  # times the loser's error before, with nothing gained on the winner's
SPENT = 0.05  # of the preference gradient is left
EARNED = 0.75  # times the winner's error before: enough to have won the pairs by
RISEN = 0.1  # accuracy by as much has risen
SIGMAS = 2.5  # standard errors that a change must exceed


class Health(NamedTuple):
    """What `health` found; str() of it is one line.

    picture: one of the names that `health` lists.
    seen: the figures that it goes by.
    remedy: the knobs to turn; empty where there is nothing to do.
    """

    picture: Picture
    seen: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.picture}: {self.seen}" + (f"; {self.remedy}" if self.remedy else "")


class Change(NamedTuple):
    """A mean over some rows, what it is compared with, and the standard error of the difference."""

    before: float
    after: float
    error: float

    @property
    def ratio(self) -> float:
        return self.after / self.before if self.before > 0 else 1.0

    @property
    def sure(self) -> bool:
        return abs(self.after - self.before) > SIGMAS * self.error

    def __str__(self) -> str:
        return f"{self.before:.3g} -> {self.after:.3g}"


def health(history: Iterable[Mapping[str, float]]) -> Health:
    """Say in words which known picture a run's curves look like, and which knob to turn.

    Args:
        history: a row for each step, oldest first, as `LossOutput.metrics()` names its columns:
            mse_w, mse_l, margin, accuracy and gradient_factor are needed; ref_mse_w and ref_mse_l
            are used where they are. Other columns are ignored: the rows of a trainer's
            metrics.jsonl do. Numbers, not tensors on a device.

    Errors at the end, the mean over the last fifth of the rows (10 at least), are compared with the
    reference model's in the same rows, and without a reference with those at the beginning, the
    mean over the first fortieth (5 at least). A change counts where it exceeds 2.5 standard errors.
    The first picture that fits is it:

    ==========================  ====================================================================
    early                       fewer than 20 rows
    collapsing                  a number is not finite, or mse_w is 3 times what it was, or more
    winner getting worse too    mse_w is 1.1 times what it was, or more: likelihood displacement
    saturated                   gradient_factor is below 0.05, and mse_w has not fallen by a quarter
    over-sharpened              mse_l is 1.5 times the reference's, or more; mse_w has not fallen by
                                5 %; without a reference that drowns in the noise of timesteps
    healthy                     mse_w has fallen by 5 %, or the margin has risen, or accuracy by 0.1
    flat                        neither error has changed, nor the margin
    unclear                     none of these
    ==========================  ====================================================================

    It is a reading of training curves, not a measure of pictures: a healthy run may still paint
    what nobody wants, and a run whose winner gets a little worse may paint well. Look at samples.

    Raises:
        TypeError: a row is no mapping, or a needed value in it no number.
        ValueError: a needed column is missing.

    Source: thresholds are set by the runs of `examples/mismatch_study.py` (digits, 32 pairs in a
    step), and tested on them. The name likelihood displacement is that of Razin et al.,
    "Unintentional Unalignment: Likelihood Displacement in Direct Preference Optimization",
    arXiv:2410.08847.
    """
    rows = list(history)
    columns = {name: _column(rows, name) for name in NEEDED}
    count = len(rows)
    if count < FEWEST:
        return Health("early", f"{count} of {FEWEST} steps that a judgement needs", "")
    last = max(10, count // 5)
    for name, values in columns.items():
        if not all(map(math.isfinite, values[-last:])):
            return Health(
                "collapsing",
                f"{name} is not finite",
                "go back to a checkpoint with a tenth of the learning rate, and keep the VAE and "
                "the loss out of fp16",
            )
    has_ref = all(row.get(name) is not None for row in rows for name in ("ref_mse_w", "ref_mse_l"))
    references = {}
    if has_ref:
        references = {name: _column(rows, f"ref_{name}") for name in ("mse_w", "mse_l")}
    w, l = (_change(columns[name], references.get(name), last) for name in ("mse_w", "mse_l"))
    margin, accuracy = (_change(columns[name], None, last) for name in ("margin", "accuracy"))
    left = _mean(columns["gradient_factor"][-last:])
    return _judge(w, l, margin, accuracy, left, has_ref)


def _judge(
    w: Change, l: Change, margin: Change, accuracy: Change, left: float, has_ref: bool
) -> Health:
    """The first picture that fits."""
    than = "the reference's" if has_ref else "what it was"
    errors = f"mse_w is {w.ratio:.2f} times {than} ({w}), mse_l {l.ratio:.2f} times ({l})"
    gained = w.sure and w.ratio <= BETTER
    if w.sure and w.ratio >= COLLAPSED:
        return Health(
            "collapsing",
            errors,
            "go back, lower the learning rate to a quarter, and hold the winner with sft_weight",
        )
    if w.sure and w.ratio >= WORSE:
        return Health(
            "winner getting worse too",
            errors,
            "give sft_weight, or loser_weight below 1; else lower the learning rate",
        )
    if left < SPENT and w.ratio > EARNED:
        return Health(
            "saturated",
            f"gradient_factor is {left:.2g}, and {errors}",
            "lower beta (of MaPO num_train_timesteps) by 10, or give sft_weight",
        )
    if has_ref and l.sure and l.ratio >= PUSHED and w.ratio > BETTER:
        return Health(
            "over-sharpened",
            errors,
            "stop earlier or lower the learning rate, and give sft_weight; compare the diversity "
            "of samples with the base model's",
        )
    told = f"{errors}, margin {margin}, accuracy {accuracy}"
    wider = margin.sure and margin.after > margin.before
    if gained or wider or (accuracy.sure and accuracy.after >= accuracy.before + RISEN):
        return Health("healthy", told, "")
    if not any(change.sure for change in (w, l, margin)):
        return Health(
            "flat", told, "unless all is learned, raise the learning rate by 3 to 10, then beta"
        )
    return Health(
        "unclear",
        told,
        "wait for more steps; if it stays so, check that winners come first in the batch",
    )


def _change(values: Sequence[float], reference: Sequence[float] | None, last: int) -> Change:
    """The end against the reference in the same rows or, without one, against the beginning."""
    end = values[-last:]
    if reference is not None:
        beside = reference[-last:]
        gaps = [value - other for value, other in zip(end, beside, strict=True)]
        return Change(_mean(beside), _mean(end), math.sqrt(_variance(gaps) / last))
    start = values[: max(5, len(values) // 40)]  # a run may be spoilt by its first steps
    # A handful of rows knows little of its own noise, which grows with what it is the noise of.
    scale = max(1.0, abs(_mean(start)) / abs(_mean(end))) if _mean(end) else 1.0
    noise = max(_variance(start), scale**2 * _variance(end))
    return Change(_mean(start), _mean(end), math.sqrt(noise / len(start) + _variance(end) / last))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _variance(values: Sequence[float]) -> float:
    centre = _mean(values)
    return math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1)


def _column(rows: Sequence[Mapping[str, float]], name: str) -> list[float]:
    """One column of the history as floats."""
    values = []
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise TypeError(f"history[{i}] must be a mapping, got a {type(row).__name__}")
        if name not in row:
            raise ValueError(f"history[{i}] has no {name}; every row needs one")
        try:
            values.append(float(row[name]))
        except (TypeError, ValueError):
            raise TypeError(
                f"history[{i}][{name!r}] must be a number, got a {type(row[name]).__name__}"
            ) from None
    return values
