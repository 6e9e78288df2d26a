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

    Everything else is a bug and keeps its traceback: an error of another library, or one that
    Python itself raised in our code.
    """
    try:
        yield
    except (ArithmeticError, FileNotFoundError, TypeError, ValueError) as error:
        if not raised_on_purpose(error):
            raise
        refuse(str(error))


def raised_on_purpose(error: BaseException) -> bool:
    """Whether the error comes from a `raise` statement in this project's own code."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return False
    code, module = traceback.tb_frame.f_code, traceback.tb_frame.f_globals.get("__name__", "")
    ours = module.split(".")[0] in PACKAGES or Path(code.co_filename).is_relative_to(EXAMPLES)
    return ours and code.co_code[traceback.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def refuse(message: str) -> NoReturn:
    """Print one line on stderr and exit with 2, like argparse.

    With several processes the first one on each machine prints. The others wait, since their
    launcher stops them as soon as the first has failed with the same error. One that is still
    running after that has an error of its own, and prints it.
    """
    place = os.environ.get("LOCAL_RANK", "0")
    if place != "0":
        signal.signal(signal.SIGTERM, lambda *_: os._exit(2))
        time.sleep(PATIENCE)
        message = f"process {place}: {message}"
    name = os.path.basename(sys.argv[0])
    print(f"{name}: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    if "LOCAL_RANK" in os.environ:
        # A normal exit may wait for the other processes, or for a loader's workers.
        for child in multiprocessing.active_children():
            child.kill()
        sys.stdout.flush()
        os._exit(2)
    sys.exit(2)
