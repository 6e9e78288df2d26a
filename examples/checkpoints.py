"""Knows how a folder appears on disk whole or not at all, and which checkpoint is the last one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator

PREFIX, ASIDE = "checkpoint-", ".tmp-"


def step_of(checkpoint: Path) -> int:
    """The optimizer step that a checkpoint's name tells."""
    return int(checkpoint.name.removeprefix(PREFIX))


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The whole checkpoints in `output_dir`, oldest step first."""
    found = (path for path in output_dir.glob(f"{PREFIX}*") if path.is_dir())
    return sorted((path for path in found if path.name[len(PREFIX) :].isdigit()), key=step_of)


def find_checkpoint(resume: str | None, output_dir: Path) -> Path | None:
    """The checkpoint that `resume` ("latest", a path, or a name in `output_dir`) stands for."""
    if resume is None:
        return None
    whole = list_checkpoints(output_dir)
    if resume == "latest":
        return whole[-1] if whole else None
    for path in (Path(resume), output_dir / resume):
        if path.is_dir() and path.name.startswith(PREFIX):
            return path
    names = ", ".join(path.name for path in whole) or "none"
    raise ValueError(
        f"resume_from_checkpoint={resume!r} is no checkpoint; {output_dir} has: {names}; "
        'need one of these, a path to one, or "latest"'
    )


def remove(folder: Path) -> None:
    """Delete a folder so that, killed half-way, no part of it is taken for the whole."""
    aside = folder.with_name(f"{ASIDE}old-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)
    shutil.rmtree(aside)


def remove_leftovers(output_dir: Path) -> None:
    """Delete what a killed run had not finished writing or deleting."""
    for path in output_dir.glob(f"{ASIDE}*/"):
        shutil.rmtree(path)


def prune(output_dir: Path, limit: int | None, newest: Path) -> None:
    """Delete the oldest checkpoints beyond `limit`, and never the `newest`."""
    if limit is not None:
        others = [path for path in list_checkpoints(output_dir) if path.name != newest.name]
        for path in others[: max(0, len(others) + 1 - limit)]:
            remove(path)


@contextmanager
def written_aside(folder: Path, accelerator: Accelerator | None = None) -> Iterator[Path]:
    """Yield a hidden folder to write into; on success it takes the place of `folder` in one rename.

    With an accelerator every process enters and writes, and the main one renames once all are done.
    """
    aside = folder.with_name(f"{ASIDE}{folder.name}")
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
        if folder.exists():
            remove(folder)
        os.replace(aside, folder)
    if accelerator is not None:
        accelerator.wait_for_everyone()
