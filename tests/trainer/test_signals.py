"""A run that SIGTERM or Ctrl-C stops, whenever it comes and to whichever process, leaves a whole
checkpoint, says so by its exit code, and goes on to the same bits."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import forked
from small_run import ROOT, argv, assert_same_weights, seeing
from trainer.checkpoints import list_checkpoints, step_of
from trainer.metrics import read_metrics

LAUNCH = ROOT / "tests" / "helpers" / "launch_trainer.py"
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


def start(
    world: Path, folder: Path, *interrupts: str, processes: int = 1, **flags: Any
) -> tuple[list[int | None], str]:
    """Run the trainer in processes of their own, to its end; their exit codes, and what they say.

    Each process may have an order of its own for `launch_trainer.interrupt`.
    """
    folder.mkdir(exist_ok=True)
    environments: list[dict[str, str]] = [{} for _ in range(processes)]
    for rank, order in enumerate(interrupts):
        environments[rank]["INTERRUPT"] = f"{rank}:{order}"
    return forked.start(argv(world, folder, **flags), folder, environments)


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


TWO: dict[str, Any] = {**FLAGS, "processes": 2, "dataloader_num_workers": 1}


@pytest.fixture(scope="module")
def whole_by_two(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of two processes that nothing stops."""
    folder = tmp_path_factory.mktemp("two")
    for name, kind in (("lora", LORA | seeing(world)), ("full", FULL)):
        finish(world, folder / name, **TWO, **kind)
    return {name: folder / name for name in ("lora", "full")}


def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step(
    world: Path, tmp_path: Path, rng: random.Random, whole_by_two: dict[str, Path]
) -> None:
    step, heard = rng.randint(1, STEPS - 1), rng.randrange(2)
    orders = ["step:1000:self:SIGTERM"] * 2
    orders[heard] = f"step:{step}:self:SIGTERM"
    codes, said = start(world, tmp_path / "run", *orders, **TWO, **LORA)
    assert codes == [143, 143], said
    assert newest(tmp_path / "run") == step
    assert said.count("--resume_from_checkpoint latest goes on from") == 1
    assert "Traceback" not in said
    finish(world, tmp_path / "run", **TWO, **LORA)
    assert_same_weights(whole_by_two["lora"], tmp_path / "run")
    assert_same_rows(whole_by_two["lora"], tmp_path / "run", "metrics.jsonl")


def test_signals_at_different_steps_stop_two_processes_at_the_first(
    world: Path, tmp_path: Path, rng: random.Random, whole_by_two: dict[str, Path]
) -> None:
    # The whole group is sent them, data loaders' workers too, as launchers and terminals do. One
    # that comes after the agreement is the first that this process hears, and ends no save.
    step = rng.randint(2, STEPS - 1)
    orders = [f"step:{step}:group:SIGINT", "save:1:group:SIGINT"]
    codes, said = start(world, tmp_path / "run", *orders, **TWO, **FULL)
    assert codes == [130, 130], said
    assert newest(tmp_path / "run") == step
    assert "Traceback" not in said
    finish(world, tmp_path / "run", **TWO, **FULL)
    assert_same_weights(whole_by_two["full"], tmp_path / "run")
    assert_same_rows(whole_by_two["full"], tmp_path / "run", "metrics.jsonl")


def test_two_processes_break_off_a_look_together_and_make_up_for_it(
    world: Path, tmp_path: Path, whole_by_two: dict[str, Path]
) -> None:
    flags = {**TWO, **LORA, **seeing(world), "resume_from_checkpoint": "latest"}
    never = "step:1000:self:SIGTERM"
    # All score, and the first paints. The base is scored and painted before.
    for orders, step in (([never, "score:2:self:SIGTERM"], 2), (["paint:3:self:SIGTERM"], 4)):
        codes, said = start(world, tmp_path / "run", *orders, **flags)
        assert codes == [143, 143], said
        assert newest(tmp_path / "run") == step
        assert "Traceback" not in said
    finish(world, tmp_path / "run", **{**TWO, **LORA, **seeing(world)})
    assert_same_weights(whole_by_two["lora"], tmp_path / "run")
    assert_same_rows(whole_by_two["lora"], tmp_path / "run", "metrics.jsonl", "eval.jsonl")


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_a_signal_to_the_launcher_reaches_all(
    world: Path, tmp_path: Path, rng: random.Random, name: str, whole_by_two: dict[str, Path]
) -> None:
    step, folder = rng.randint(1, STEPS - 1), tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(LAUNCH), *argv(world, folder, **FLAGS, **LORA,
                                                          dataloader_num_workers=1)],
        env={
            **os.environ,
            "ACCELERATE_USE_CPU": "true",
            "INTERRUPT": f"{rng.randrange(2)}:step:{step}:launcher:{name}",
        },
        capture_output=True, text=True, timeout=240, start_new_session=True,
    )  # fmt: skip
    assert "via Signals.SIGKILL" not in done.stderr
    assert step <= newest(folder) <= step + 1, done.stderr  # until the launcher acts
    assert f"stopped by {name} after step {newest(folder)}" in done.stderr
    finish(world, folder, **TWO, **LORA)
    assert_same_weights(whole_by_two["lora"], folder)


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("processes", [1, 2])
def test_before_the_first_step_it_ends_at_once_even_where_it_waits(
    world: Path, tmp_path: Path, name: str, processes: int
) -> None:
    # The others wait for the one that sleeps, in a collective.
    orders = [f"data:1:self:{name}:wait", f"data:1:self:{name}"][:processes]
    codes, said = start(world, tmp_path / "run", *orders, processes=processes, **FLAGS)
    assert codes == [CODES[name]] * processes, said
    assert f"stopped by {name}; there is no checkpoint yet" in said
    assert "Traceback" not in said
    assert not list_checkpoints(tmp_path / "run")


def test_a_second_ctrl_c_ends_it_at_once_with_nothing_half_written(
    world: Path, tmp_path: Path
) -> None:
    folder, flags = tmp_path / "run", {**FLAGS, "checkpointing_steps": 3}
    codes, said = start(world, folder, "save:2:self:SIGTERM,SIGTERM,SIGINT:wait", **flags)
    assert codes == [143], said
    assert [step_of(path) for path in list_checkpoints(folder)] == [3]
    assert f"goes on from {folder / 'checkpoint-3'}" in said.splitlines()[-1]
    finish(world, folder, **flags)
    assert newest(folder) == STEPS


def test_what_fails_while_it_stops_is_still_an_error(world: Path, tmp_path: Path) -> None:
    codes, said = start(world, tmp_path / "run", "save:1:self:SIGTERM:fail", **FLAGS)
    assert codes == [1]
    assert "OSError: no space left" in said
    assert not list_checkpoints(tmp_path / "run")
