"""One public function per loss: what it is, its formula, its convention for beta and its source."""

import typing as _typing

from . import lists as _lists
from . import pairs as _pairs
from . import samples as _samples
from .lists import *  # noqa: F403
from .pairs import *  # noqa: F403
from .samples import *  # noqa: F403

if not _typing.TYPE_CHECKING:
    __all__ = [*_pairs.__all__, *_samples.__all__, *_lists.__all__]
