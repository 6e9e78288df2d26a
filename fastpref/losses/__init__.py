"""One public function per loss: what it is, its formula, its convention for beta and its source."""

import typing as _typing
from types import ModuleType as _ModuleType

from . import lists as lists
from . import pairs as pairs
from . import samples as samples
from . import steps as steps
from .lists import *  # noqa: F403
from .pairs import *  # noqa: F403
from .samples import *  # noqa: F403
from .steps import *  # noqa: F403


def _public(module: _ModuleType) -> list[str]:
    """The functions that a module defines itself."""
    own = (
        n
        for n, value in vars(module).items()
        if getattr(value, "__module__", "") == module.__name__
    )
    return [name for name in own if not name.startswith("_")]


if not _typing.TYPE_CHECKING:  # checkers see the imports, and could not work this out
    __all__ = [name for module in (pairs, samples, lists, steps) for name in _public(module)]
