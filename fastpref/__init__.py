"""Fused preference-optimization losses for diffusion models. Needs torch; uses Triton if it can."""

import sys as _sys
from pathlib import Path as _Path

_kernels = _Path(__file__).resolve().parent.parent / "kernels"
if (_kernels / "fastpref_kernels").is_dir() and str(_kernels) not in _sys.path:
    _sys.path.insert(0, str(_kernels))  # a checkout, not installed: the kernels lie beside this

from fastpref_kernels import register_link  # noqa: E402

from . import inversion  # noqa: E402
from .conventions import CONVENTIONS, convert_beta  # noqa: E402
from .dispatch import LossOutput, losses_from_errors, pair_loss  # noqa: E402
from .health import Health, health  # noqa: E402
from .losses import (  # noqa: E402
    budget_dpo_loss,
    capo_loss,
    dmpo_loss,
    dpo_loss,
    mapo_loss,
    npo_loss,
    orpo_loss,
    pso_loss,
    self_npo_loss,
    seppo_loss,
    sft_loss,
    simpo_loss,
    smoothed_preference,
    smpo_loss,
)
from .modules import (  # noqa: E402
    BudgetDPOLoss,
    CaPOLoss,
    DMPOLoss,
    DPOLoss,
    MaPOLoss,
    NPOLoss,
    ORPOLoss,
    PSOLoss,
    SelfNPOLoss,
    SePPOLoss,
    SFTLoss,
    SimPOLoss,
    SmPOLoss,
)

__all__ = [
    "CONVENTIONS",
    "BudgetDPOLoss",
    "CaPOLoss",
    "DMPOLoss",
    "DPOLoss",
    "Health",
    "LossOutput",
    "MaPOLoss",
    "NPOLoss",
    "ORPOLoss",
    "PSOLoss",
    "SFTLoss",
    "SePPOLoss",
    "SelfNPOLoss",
    "SimPOLoss",
    "SmPOLoss",
    "budget_dpo_loss",
    "capo_loss",
    "convert_beta",
    "dmpo_loss",
    "dpo_loss",
    "health",
    "inversion",
    "losses_from_errors",
    "mapo_loss",
    "npo_loss",
    "orpo_loss",
    "pair_loss",
    "pso_loss",
    "register_link",
    "self_npo_loss",
    "seppo_loss",
    "sft_loss",
    "simpo_loss",
    "smoothed_preference",
    "smpo_loss",
]
__version__ = "0.1.0"
