"""A run that SIGTERM or Ctrl-C stops, whenever it comes and to whichever process, leaves a whole
checkpoint, says so by its exit code, and goes on to the same bits."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")

from checkpoints import list_checkpoints, step_of
from curves import read_metrics
from launch_trainer import run
from small_run import argv, assert_same_weights, seeing

HERE = Path(__file__).parent
CODES = {"SIGTERM": 143, "SIGINT": 130}
STEPS = 8
FLAGS: dict[str, Any] = {"max_train_steps": STEPS, "checkpointing_steps": 100, "log_every": 3}
LORA: dict[str, Any] = {"lora_rank": 4, "loss": "dpo", "beta": 100}
FULL: dict[str, Any] = {
    "use_ema": True,
    "ema_decay": 0.9,
    "gradient_accumulation_steps": 2,
    "lr_scheduler": "cosine",
    "random_crop": True,
}
# A process of this server has all that is slow to import.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["launch_trainer", "small_run"])


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"random.Random({seed})")
    return random.Random(seed)


def child(words: list[str], environment: dict[str, str], log: Path) -> None:
    os.setsid()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_DFL)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    run(words)


def start(
    world: Path, folder: Path, *interrupts: str, processes: int = 1, **flags: Any
) -> tuple[list[int | None], str]:
    """Run the trainer in processes of their own, to its end; their exit codes, and what they say.

    Each process may have an order of its own for `launch_trainer.interrupt`.
    """
    folder.mkdir(exist_ok=True)
    words = argv(world, folder, **flags)
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    logs = [folder.with_name(f"{folder.name}-{rank}.log") for rank in range(processes)]
    children = []
    for rank, log in enumerate(logs):
        environment = {} if rank >= len(interrupts) else {"INTERRUPT": f"{rank}:{interrupts[rank]}"}
        if processes > 1:
            environment |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
            }  # fmt: skip
        children.append(FORK.Process(target=child, args=(words, environment, log)))
        children[-1].start()
    try:
        for process in children:
            process.join(240)
        return [process.exitcode for process in children], "".join(log.read_text() for log in logs)
    finally:
        for process in children:
            process.kill()


def finish(world: Path, folder: Path, processes: int = 1, **flags: Any) -> None:
    codes, said = start(
        world, folder, processes=processes, resume_from_checkpoint="latest", **flags
    )
    assert codes == [0] * processes, said


def newest(folder: Path) -> int:
    assert not list(folder.glob(".tmp*"))
    return step_of(list_checkpoints(folder)[-1])


def assert_same_rows(a: Path, b: Path, *names: str) -> None:
    for name in names:
        assert read_metrics(a / name) == read_metrics(b / name)


@pytest.mark.parametrize(
    ("kind", "name"), [(LORA, "SIGTERM"), (FULL, "SIGINT")], ids=["lora", "full, ema"]
)
def test_stopped_wherever_it_is_a_run_ends_the_same(
    world: Path, tmp_path: Path, rng: random.Random, kind: dict[str, Any], name: str
) -> None:
    flags = {**FLAGS, **kind, **seeing(world), "dataloader_num_workers": rng.choice([0, 1])}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    finish(world, whole, **flags)
    first = rng.choice([1, 3])  # every second step is looked at
    moments = [  # the moment, in which of its calls, and the step of the checkpoint that is left
        ("step", first, first),
        ("score", 2, first + 1),  # the base is the first
        ("paint", 3, first + 3),  # the second is the look that was cut short
        ("save", 1, STEPS),
        ("result", 1, STEPS),
    ]
    for moment, call, step in moments:
        codes, said = start(
            world, stopped, f"{moment}:{call}:self:{name}", resume_from_checkpoint="latest", **flags
        )
        assert codes == [CODES[name]], said
        assert newest(stopped) == step, moment
        assert f"goes on from {stopped / f'checkpoint-{step}'}" in said.splitlines()[-1]
        assert name in said.splitlines()[-1]
        assert "Traceback" not in said
    finish(world, stopped, **flags)
    assert_same_weights(whole, stopped)
    assert_same_rows(whole, stopped, "metrics.jsonl", "eval.jsonl")
    for grid in (whole / "validation").iterdir():
        assert grid.read_bytes() == (stopped / "validation" / grid.name).read_bytes()
