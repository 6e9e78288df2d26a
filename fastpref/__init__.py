"""Fused preference-optimization losses for diffusion models. Needs torch; uses Triton if it can."""

import sys as _sys
from pathlib import Path as _Path

_kernels = _Path(__file__).resolve().parent.parent / "kernels"
if (_kernels / "fastpref_kernels").is_dir() and str(_kernels) not in _sys.path:
    _sys.path.insert(0, str(_kernels))  # a checkout, not installed: the kernels lie beside this

from .losses import LossOutput, MaPOLoss, SFTLoss, mapo_loss, pair_loss, sft_loss  # noqa: E402

__all__ = ["LossOutput", "MaPOLoss", "SFTLoss", "mapo_loss", "pair_loss", "sft_loss"]
__version__ = "0.1.0"
