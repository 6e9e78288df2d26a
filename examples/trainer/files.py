"""Files and folders that appear on disk whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the studies write files without it
    from accelerate import Accelerator

ASIDE = ".tmp-"
ABANDONED_SECONDS = 3600  # after which nobody is still writing


def make_folder(flag: str, folder: Path) -> None:
    """Make a folder that a flag names. Raises: ValueError, where that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{flag} {folder}: the folder cannot be made ({error.strerror}); need one that can be "
            "written to"
        ) from error


def mode_of_new(path: Path) -> int:
    """The permissions that a new file gets; makes it."""
    path.touch()
    return path.stat().st_mode


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path of the same name in a hidden folder; on success the file takes the place of
    `path` in one rename.

    It is flushed to the disk first, and has the permissions of any new file, whoever wrote it:
    safetensors makes files that only their owner may read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=ASIDE, dir=path.parent) as folder:
        aside = Path(folder) / path.name
        mode = mode_of_new(aside)
        yield aside
        aside.chmod(mode)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    with whole_file(path) as aside:
        aside.write_bytes(content)


@contextmanager
def whole_folder(folder: Path, accelerator: Accelerator | None = None) -> Iterator[Path]:
    """Yield a hidden folder to write into; on success it takes the place of `folder` in one rename,
    and its files have the permissions of any new file.

    With an accelerator every process enters and writes, and the main one renames once all are done.
    """
    # Alone, it may have a twin in another run; together, all have to agree on the name.
    mark = f"{os.getpid()}-" if accelerator is None else ""
    aside = folder.with_name(f"{ASIDE}{mark}{folder.name}")
    is_main = accelerator is None or accelerator.is_main_process
    if is_main:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    if accelerator is not None:
        accelerator.wait_for_everyone()
    try:
        yield aside
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)  # on a full disk it would stand in the way
        raise
    if accelerator is not None:
        accelerator.wait_for_everyone()
    if is_main:
        mode = mode_of_new(aside / f"{ASIDE}mode")
        (aside / f"{ASIDE}mode").unlink()
        for path in aside.rglob("*"):
            if path.is_file():
                path.chmod(mode)
        old = folder.with_name(f"{ASIDE}old-{mark}{folder.name}")
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
        os.replace(aside, folder)
        shutil.rmtree(old, ignore_errors=True)
    if accelerator is not None:
        accelerator.wait_for_everyone()


def remove(folder: Path) -> None:
    """Delete a folder so that, killed half-way, no part of it is taken for the whole."""
    aside = folder.with_name(f"{ASIDE}old-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)
    shutil.rmtree(aside)


def remove_leftovers(folder: Path, seconds: float = 0.0) -> None:
    """Delete what killed runs had not finished writing or deleting in `folder`, and had not touched
    for so long."""
    for path in folder.glob(f"{ASIDE}*/"):
        if time.time() - path.stat().st_mtime >= seconds:
            shutil.rmtree(path, ignore_errors=True)
