"""Buckets: the sizes that images are trained at, and which of them an item gets."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.data.images import Size

MAX_ENLARGEMENT = 1.05  # what an image may be scaled up by before a lower resolution is taken


def bucket_sizes(resolutions: Sequence[int], factor: int, aspect_buckets: bool) -> list[Size]:
    """The sizes that batches may have: a square for each resolution, and with `aspect_buckets` all
    that are as large and between 1:2 and 2:1, in steps of 64 pixels (`factor` below 512).

    Sides are multiples of `factor`, save a square's: that is what was asked for. At 1024 these are
    the sizes SDXL was trained at, as far as 1:2.
    """
    if not resolutions or min(resolutions) < 1:
        raise ValueError(f"resolutions={list(resolutions)}; need one at least, each above 0")
    if factor < 1:
        raise ValueError(f"factor={factor}; need at least 1")
    sizes: list[Size] = []
    for resolution in sorted(set(resolutions)):
        square = (resolution, resolution)
        sizes += sizes_near(resolution, factor) if aspect_buckets else [square]
    return list(dict.fromkeys(sizes))


def sizes_near(resolution: int, factor: int) -> list[Size]:
    """The buckets of one resolution: of each height the widest, and more that have at least 90 % of
    the square's area; of those of one aspect the largest."""
    step = factor * math.ceil(64 / factor) if resolution >= 512 else factor
    area = resolution**2
    by_aspect: dict[tuple[int, int], Size] = {}
    for height in range(step, resolution + 1, step):
        widest = min(area // height, 2 * height) // step * step
        for width in range(widest, height - 1, -step):
            if width < widest and height * width < 0.9 * area:
                break
            divisor = math.gcd(height, width)
            by_aspect[height // divisor, width // divisor] = (height, width)  # the last is largest
    by_aspect[1, 1] = (resolution, resolution)
    lying = set(by_aspect.values())
    return sorted(lying | {(width, height) for height, width in lying})


def nearest_buckets(found: NDArray[np.int64], sizes: Sequence[Size]) -> NDArray[np.int64]:
    """The bucket of each item: an index into `sizes`, for `found` (N, m, 2), the height and width
    of its m images.

    Its aspect is the nearest to their geometric mean; its resolution the largest that scales none
    of them up by more than a few percent, or else the smallest.
    """
    squares = sorted({height for height, width in sizes if height == width})
    # A bucket's resolution: the smallest square that is no smaller than it.
    levels: dict[int, list[int]] = defaultdict(list)
    for i, (height, width) in enumerate(sizes):
        levels[next((s for s in squares if s * s >= height * width), -1)].append(i)
    aspects = np.log(found[:, :, 0] / found[:, :, 1]).mean(axis=1)
    buckets = np.full(len(found), -1, dtype=np.int64)
    for resolution in sorted(levels):
        # Of one aspect the largest; in order, so that the halfway points tell which is nearest.
        here = {height / width: i for i in sorted(levels[resolution], key=lambda i: sizes[i])
                for height, width in [sizes[i]]}  # fmt: skip
        edges = np.log(sorted(here))
        order = np.array([here[aspect] for aspect in sorted(here)])
        chosen = order[np.searchsorted((edges[1:] + edges[:-1]) / 2, aspects)]
        scale = np.asarray(sizes)[chosen][:, None] / found
        fits = scale.max(axis=(1, 2)) <= MAX_ENLARGEMENT
        buckets = np.where(fits | (buckets < 0), chosen, buckets)
    return buckets
