"""The trainer in processes of its own, forks of one that has imported what is slow to import."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import connection, forkserver
from pathlib import Path

import pytest

FORK = multiprocessing.get_context("forkserver")


def serve() -> None:
    """Start the process that is forked; once."""
    FORK.set_forkserver_preload(["launch_trainer", "small_run"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # Python 3.11's takes no sys.path
        forkserver.ensure_running()


def child(words: list[str], environment: dict[str, str], log: Path) -> None:
    from launch_trainer import run

    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # of data loaders: not like this process
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_DFL)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    run(words)


def start(
    words: list[str],
    folder: Path,
    environments: Sequence[Mapping[str, str]],
    together: bool = False,
) -> tuple[list[int | None], str]:
    """Run `launch_trainer.run` to its end in a process for each environment, as torch's launcher
    would start it; their exit codes, and what they say. together: one that fails ends the others,
    which may wait for it."""
    serve()
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    logs = [folder.with_name(f"{folder.name}-{rank}.log") for rank in range(len(environments))]
    children = []
    for rank, (given, log) in enumerate(zip(environments, logs, strict=True)):
        environment = dict(given)
        if len(environments) > 1:
            environment |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(environments)),
                "LOCAL_WORLD_SIZE": str(len(environments)), "ACCELERATE_USE_CPU": "true",
                "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
            }  # fmt: skip
        children.append(FORK.Process(target=child, args=(words, environment, log)))
        children[-1].start()
    try:
        running = {process.sentinel: process for process in children}
        while running and (ended := connection.wait([*running], 240)):
            codes = [running.pop(sentinel).exitcode for sentinel in ended if sentinel in running]  # type: ignore[call-overload]
            if together and any(codes):
                break
        return [process.exitcode for process in children], "".join(log.read_text() for log in logs)
    finally:
        for process in children:
            process.kill()
