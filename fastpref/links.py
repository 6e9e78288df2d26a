"""What it takes to write a link outside this package; CONTRIBUTING.md shows how.

A text is a function under `jit` that returns a value with its slopes. It is written in Triton's
language, `tl`, and also runs on tensors, with or without Triton: of `tl` it may use arithmetic,
comparisons, where, exp, log, abs and zeros_like, and besides these the functions below.
"""

from fastpref_kernels.links import (
    ALPHA,
    APO_DOWN,
    APO_ZERO,
    BCO,
    BELOW_HALF,
    BETA,
    BETA_ERROR,
    BETA_GAP,
    BETA_LOG_SIGMOID,
    BUDGET,
    CALIBRATED,
    ERROR,
    EXO,
    FINITE,
    GAP,
    HALF_BETA_GAP,
    HINGE,
    IPO,
    LINKS,
    LOG_SIGMOID,
    MAPO,
    MARGIN_LOG_SIGMOID,
    NCA,
    NOT_NEGATIVE,
    NOTHING,
    POSITIVE,
    ROBUST,
    SMOOTHED_GAP,
    SPPO,
    UNIT,
    Hyper,
    Interval,
    Link,
    Score,
    Shape,
    link,
    register_link,
)
from fastpref_kernels.special import (
    detached,
    jit,
    log1p,
    power_gap,
    psi_and_slope,
    sigmoids,
    softplus_and_slope,
    times,
    tl,
)

__all__ = [
    "ALPHA", "APO_DOWN", "APO_ZERO", "BCO", "BELOW_HALF", "BETA", "BETA_ERROR", "BETA_GAP",
    "BETA_LOG_SIGMOID", "BUDGET", "CALIBRATED", "ERROR", "EXO", "FINITE", "GAP", "HALF_BETA_GAP",
    "HINGE", "IPO", "LINKS", "LOG_SIGMOID", "MAPO", "MARGIN_LOG_SIGMOID", "NCA", "NOTHING",
    "NOT_NEGATIVE", "POSITIVE", "ROBUST", "SMOOTHED_GAP", "SPPO", "UNIT", "Hyper", "Interval",
    "Link", "Score", "Shape", "detached", "jit", "link", "log1p", "power_gap", "psi_and_slope",
    "register_link", "sigmoids", "softplus_and_slope", "times", "tl",
]  # fmt: skip
