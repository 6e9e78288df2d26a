"""The Triton side of fastpref: imports torch, triton and itself. Without Triton, just the links."""

from .links import LINKS, TRITON_MISSING, Link

__all__ = ["LINKS", "TRITON_MISSING", "Link"]

if not TRITON_MISSING:
    from .launch import pair_backward, pair_forward

    __all__ += ["pair_backward", "pair_forward"]
