"""Cross products of which `make test` runs a part, and `make test-all` the whole."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest


def product(
    *axes: Sequence[Any], fast: Callable[..., bool], ids: Callable[..., str] | None = None
) -> list[Any]:
    """All combinations, for `pytest.mark.parametrize`; slow are those that are not `fast`."""
    every = [*itertools.product(*axes)]
    chosen = [fast(*values) for values in every]
    for i, axis in enumerate(axes):  # nothing is left to the slow ones alone
        kept = [values[i] for values, quick in zip(every, chosen, strict=True) if quick]
        assert all(any(value is each for each in kept) for value in axis), axis
    return [
        pytest.param(
            *values, marks=() if quick else pytest.mark.slow, id=ids(*values) if ids else None
        )
        for values, quick in zip(every, chosen, strict=True)
    ]


def in_turn(*axes: Sequence[Any]) -> Callable[..., bool]:
    """Of two axes: the values of the shorter one take turns along the longer one."""
    first, second = axes

    def fast(a: Any, b: Any) -> bool:
        i, j = ([each is x for each in axis].index(True) for axis, x in ((first, a), (second, b)))
        return (i - j) % min(len(first), len(second)) == 0

    return fast
