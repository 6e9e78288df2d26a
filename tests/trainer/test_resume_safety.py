"""A checkpoint that someone prepared runs no code when a run goes on from it: it is refused, by the
name of the file."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict_loader import load as load_parts
from torch.distributed.checkpoint.state_dict_saver import save as save_parts

from small_run import Train
from trainer.checkpoints import EMA_FILE, STATE_FILE, check_files, load_checkpoint, only_values

FLAGS: dict[str, Any] = {"use_ema": True, "max_train_steps": 4, "checkpointing_steps": 2}


class Code:
    """What a pickle of it does when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


def by_torch(path: Path, code: Code) -> None:
    torch.save({"state": {}, "param_groups": [code]}, path)


def by_old_torch(path: Path, code: Code) -> None:
    torch.save({"state": code}, path, _use_new_zipfile_serialization=False)


def by_pickle(path: Path, code: Code) -> None:
    path.write_bytes(pickle.dumps(code))


@pytest.fixture(scope="module")
def trained(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from small_run import trainer

    return trainer(world, tmp_path_factory.mktemp("trained"))(**FLAGS)


@pytest.fixture
def checkpoint(trained: Path, tmp_path: Path) -> Path:
    """A checkpoint in the middle of a run called "run"."""
    shutil.copytree(trained / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    return tmp_path / "run" / "checkpoint-2"


def test_the_code_would_run(marker: Path, tmp_path: Path) -> None:
    """Else the tests below show nothing."""
    for write in (by_torch, by_old_torch):
        write(tmp_path / "file", Code(marker))
        torch.load(tmp_path / "file", weights_only=False)
        marker.rmdir()
    by_pickle(tmp_path / "file", Code(marker))
    with (tmp_path / "file").open("rb") as file:
        pickle.load(file)
    assert marker.exists()


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("optimizer.bin", by_torch),
        ("scheduler.bin", by_old_torch),
        ("random_states_0.pkl", by_torch),
        ("random_states_0.pkl", by_pickle),
        ("scaler.pt", by_torch),
        ("custom_checkpoint_0.pkl", by_torch),
        ("custom_checkpoint_0.pkl", by_pickle),
        ("pytorch_model.bin", by_old_torch),
        ("pytorch_model_fsdp_0/.metadata", by_pickle),
        ("optimizer_0/.metadata", by_pickle),
        ("pytorch_model/mp_rank_00_model_states.pt", by_torch),
    ],
)
def test_a_prepared_file_runs_no_code_and_is_named(
    train: Train, checkpoint: Path, marker: Path, name: str, write: Callable[..., None]
) -> None:
    (checkpoint / name).parent.mkdir(exist_ok=True)
    write(checkpoint / name, Code(marker))
    with pytest.raises(ValueError, match=rf"{name} is not loaded: .*another checkpoint") as error:
        train(**FLAGS, resume_from_checkpoint="latest")
    assert not marker.exists()
    if write is not by_pickle and "custom" not in name:
        assert "names posix.mkdir" in str(error.value)
    assert not (checkpoint.parent / "checkpoint-4").exists()


def test_a_link_to_a_folder_elsewhere_is_looked_into(
    checkpoint: Path, marker: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    by_pickle(tmp_path / "elsewhere" / ".metadata", Code(marker))
    (checkpoint / "optimizer_0").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"optimizer_0/.metadata is not loaded"):
        check_files(checkpoint)
    assert not marker.exists()


@pytest.mark.parametrize("environment", [{}, {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}])
def test_a_checkpoint_in_parts_runs_no_code(
    tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    """As FSDP writes and reads it, with accelerate's part left out."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    good, bad = tmp_path / "good", tmp_path / "bad"
    for folder, extra in ((good, 0.5), (bad, Code(marker))):
        folder.mkdir()
        (folder / "trainer_state.json").write_text('{"step": 1, "processes": 0}')
        save_parts({"weight": torch.ones(3), "lr": extra}, checkpoint_id=folder / "optimizer_0",
                   no_dist=True)  # fmt: skip

    def resume(folder: Path) -> dict[str, Any]:
        state: dict[str, Any] = {"weight": torch.zeros(3), "lr": 0.0}

        def load_state(_: str) -> None:
            load_parts(state, checkpoint_id=folder / "optimizer_0", no_dist=True)

        accelerator = SimpleNamespace(load_state=load_state, process_index=0)
        load_checkpoint(accelerator, folder)  # type: ignore[arg-type]
        return state

    assert resume(good)["lr"] == 0.5
    assert resume(good)["weight"].equal(torch.ones(3))
    with pytest.raises(ValueError, match=r"bad is not loaded: .*names posix\.mkdir"):
        resume(bad)
    assert not marker.exists()
    assert os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD") is None
    assert os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD") == environment.get(
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    )


def test_no_caller_can_ask_for_more_than_values(tmp_path: Path, marker: Path) -> None:
    by_torch(tmp_path / "file.pt", Code(marker))
    with only_values(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "file.pt", weights_only=False)  # as DeepSpeed does
    assert not marker.exists()


def random_states(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        states = torch.load(path, weights_only=False)
        change(states)
        torch.save(states, path)

    return write


@pytest.mark.parametrize(
    "spoil",
    [
        Path.unlink,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:500]),
        random_states(lambda states: states.pop("torch_manual_seed")),
        random_states(lambda states: states.update(torch_manual_seed=torch.zeros(5))),
        random_states(lambda states: states.update(random_state=(3, (1, 2), None))),
        random_states(lambda states: states.update(numpy_random_seed=("MT19937", 5))),
        random_states(lambda states: states.update(step="3")),
        random_states(lambda states: states.update(torch_cuda_manual_seed=[torch.zeros(16)])),
    ],
)
def test_states_of_random_numbers_are_checked(
    checkpoint: Path, spoil: Callable[[Path], None]
) -> None:
    spoil(checkpoint / "random_states_0.pkl")
    with pytest.raises(ValueError, match=r"random_states_0\.pkl is not loaded"):
        load_checkpoint(Accelerator(cpu=True), checkpoint)


def test_states_of_as_many_processes_as_there_were_are_needed(checkpoint: Path) -> None:
    loaded: list[str] = []
    accelerator: Any = SimpleNamespace(load_state=loaded.append, process_index=1)
    load_checkpoint(accelerator, checkpoint)  # there was one process, and now there are two
    path = checkpoint / STATE_FILE
    path.write_text(path.read_text().replace('"processes": 1', '"processes": 2'))
    with pytest.raises(ValueError, match=r"random_states_1\.pkl is not loaded"):
        load_checkpoint(accelerator, checkpoint)
    assert loaded == [str(checkpoint)]


def test_the_average_needs_its_file_and_its_flag(train: Train, checkpoint: Path) -> None:
    flags = {**FLAGS, "resume_from_checkpoint": "latest"}
    with pytest.raises(ValueError, match=f"holds an average .{EMA_FILE}.*need --use_ema"):
        train(**{name: value for name, value in flags.items() if name != "use_ema"})
    average = load_file(checkpoint / EMA_FILE)
    save_file(average, checkpoint / EMA_FILE)
    with pytest.raises(ValueError, match=f"{EMA_FILE} holds no numbers beside the average"):
        train(**flags)
    (checkpoint / EMA_FILE).unlink()
    with pytest.raises(ValueError, match=f"use_ema came, but .* holds no {EMA_FILE}"):
        train(**flags)
