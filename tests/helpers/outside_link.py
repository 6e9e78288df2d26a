"""What somebody would write who adds a loss, exp(-rate * margin): its text and the formula."""

from __future__ import annotations

from typing import Any

from fastpref.links import HALF_BETA_GAP, Hyper, Shape, jit, link, tl


@jit
def _exponential(w, l, rate):  # type: ignore[no-untyped-def]
    loss = tl.exp(-rate * (w - l))
    return loss, -rate * loss, rate * loss


EXPONENTIAL = link(HALF_BETA_GAP, Shape(_exponential, {"rate": Hyper(1.0)}), beta=200.0)


def formula(w: Any, l: Any, rate: Any, **_: Any) -> Any:
    import mpmath  # here, because whoever only trains has none

    return mpmath.exp(-rate * (w - l))
