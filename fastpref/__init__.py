"""Fused preference-optimization losses for diffusion models. Needs torch; uses Triton if it can."""

import sys as _sys
import typing as _typing
from pathlib import Path as _Path

_kernels = _Path(__file__).resolve().parent.parent / "kernels"
if (_kernels / "fastpref_kernels").is_dir() and str(_kernels) not in _sys.path:
    _sys.path.insert(0, str(_kernels))  # a checkout, not installed: the kernels lie beside this

from fastpref_kernels import register_link as register_link  # noqa: E402

from . import advantages as advantages  # noqa: E402
from . import guidance as guidance  # noqa: E402
from . import inversion as inversion  # noqa: E402
from . import links as links  # noqa: E402
from . import losses as _losses  # noqa: E402
from . import modules as _modules  # noqa: E402
from . import preferences as preferences  # noqa: E402
from . import transitions as transitions  # noqa: E402
from .conventions import CONVENTIONS as CONVENTIONS  # noqa: E402
from .conventions import convert_beta as convert_beta  # noqa: E402
from .dispatch import PairErrors as PairErrors  # noqa: E402
from .dispatch import losses_from_errors as losses_from_errors  # noqa: E402
from .dispatch import pair_errors as pair_errors  # noqa: E402
from .dispatch import pair_loss as pair_loss  # noqa: E402
from .health import Health as Health  # noqa: E402
from .health import health as health  # noqa: E402
from .losses import *  # noqa: E402, F403
from .modules import *  # noqa: E402, F403
from .outputs import ForwardOutput as ForwardOutput  # noqa: E402
from .outputs import LossOutput as LossOutput  # noqa: E402
from .outputs import SampleOutput as SampleOutput  # noqa: E402
from .outputs import StepOutput as StepOutput  # noqa: E402
from .preferences import smoothed_preference as smoothed_preference  # noqa: E402

if not _typing.TYPE_CHECKING:  # checkers see the imports, and could not work this out
    __all__ = sorted(
        {
            *("CONVENTIONS", "ForwardOutput", "Health", "LossOutput", "PairErrors", "SampleOutput"),
            *("StepOutput", "advantages", "convert_beta", "guidance", "health", "inversion"),
            *("links", "losses_from_errors", "pair_errors", "pair_loss", "preferences"),
            *("register_link", "smoothed_preference", "transitions"),
            *_losses.__all__,
            *_modules.__all__,
        }
    )
__version__ = "0.1.0"
