"""The outermost layer of every script here: what the user did wrong is reported in one line.

This imports neither torch nor transformers, so that a script can use it before anything else.
"""

from __future__ import annotations

import argparse
import dis
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

EXAMPLES = Path(__file__).resolve().parents[1]
PACKAGES = ("fastpref", "fastpref_kernels")
LOADERS = ("diffusers", "transformers")  # they raise OSErrors for models that cannot be loaded
PATIENCE = 3.0  # seconds; launchers look after their processes several times a second


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not None, which tells a reader nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes no abbreviations and reports errors in one line."""

    def __init__(self, *args: Any, **options: Any) -> None:
        ours: dict[str, Any] = {"formatter_class": Help, "allow_abbrev": False}
        super().__init__(*args, **ours | options)

    def error(self, message: str) -> NoReturn:
        refuse(message)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn an error that this project raised on purpose into one line and exit code 2.

    So is a model that cannot be loaded. Everything else is a bug and keeps its traceback: an error
    of another library, or one that Python itself raised in our code.
    """
    try:
        yield
    except Exception as error:
        kinds = (ArithmeticError, OSError, TypeError, ValueError)
        if isinstance(error, kinds) and raised_on_purpose(error):
            refuse(str(error))
        wait_for_first_process()
        raise


def raised_on_purpose(error: BaseException) -> bool:
    """Whether the error comes from a `raise` statement in this project's own code, or from one for
    a model that cannot be loaded."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return False
    code, module = traceback.tb_frame.f_code, traceback.tb_frame.f_globals.get("__name__", "")
    package = module.split(".")[0]
    ours = package in PACKAGES or Path(code.co_filename).is_relative_to(EXAMPLES)
    unloadable = package in LOADERS and isinstance(error, OSError) and error.errno is None
    raises = code.co_code[traceback.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return raises and (ours or unloadable)


def wait_for_first_process() -> None:
    """Give the first process of a machine time to fail and be the one that says why.

    Its launcher then ends the others, which fail with the same error, or because they lost the
    connection to it. One that is still running afterwards has an error of its own to report.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        signal.signal(signal.SIGTERM, lambda *_: os._exit(2))
        time.sleep(PATIENCE)


def refuse(message: str) -> NoReturn:
    """Print one line on stderr and exit with 2, like argparse."""
    wait_for_first_process()
    name = os.path.basename(sys.argv[0])
    print(f"{name}: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    if "LOCAL_RANK" in os.environ:
        # A normal exit may wait for the other processes, or for a loader's workers.
        for child in multiprocessing.active_children():
            child.kill()
        sys.stdout.flush()
        os._exit(2)
    sys.exit(2)
