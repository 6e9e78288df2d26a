"""What somebody would write who adds a loss, exp(-rate * margin): its text and the formula."""

from __future__ import annotations

from typing import Any

import mpmath as mp
import triton
import triton.language as tl

from fastpref_kernels.links import Hyper, Shape


@triton.jit
def _exponential(w, l, rate):  # type: ignore[no-untyped-def]
    loss = tl.exp(-rate * (w - l))
    return loss, -rate * loss, rate * loss


EXPONENTIAL = Shape(_exponential, {"rate": Hyper(1.0)})


def formula(w: Any, l: Any, rate: Any, **_: Any) -> Any:
    return mp.exp(-rate * (w - l))
