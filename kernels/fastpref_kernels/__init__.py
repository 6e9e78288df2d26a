"""The Triton side of fastpref: imports torch, triton and itself. Without Triton, just the links."""

from .knobs import KNOBS
from .links import LINKS, Link, link, register_link
from .special import TRITON_MISSING

__all__ = ["KNOBS", "LINKS", "TRITON_MISSING", "Link", "link", "register_link"]

if not TRITON_MISSING:
    from .launch import pair_backward, pair_forward

    __all__ += ["pair_backward", "pair_forward"]
