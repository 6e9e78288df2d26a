"""Checkpoints: each appears on disk whole or not at all, and loading one runs no code it holds."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, load
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from trainer.args import TrainingArguments
from trainer.files import remove, whole_folder
from trainer.optim import EMA, check_same

PREFIX = "checkpoint-"
STATE_FILE = "trainer_state.json"
EMA_FILE = "ema.safetensors"
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}  # as torch.save writes them
# What the index of a checkpoint in parts (torch.distributed.checkpoint) is made of.
INDEX = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device"} | {n for n, v in vars(torch).items() if isinstance(v, torch.dtype)},
    **{module: {"PosixPath", "WindowsPath"} for module in ("pathlib", "pathlib._local")},
}  # fmt: skip
# What DeepSpeed's files hold beside tensors.
DEEPSPEED = {
    "deepspeed.runtime.fp16.loss_scaler": {"LossScaler"},
    "deepspeed.runtime.zero.config": {"ZeroStageEnum"},
    "deepspeed.utils.tensor_fragment": {"fragment_address"},
}


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


def prune(output_dir: Path, limit: int | None, newest: Path) -> None:
    """Delete the oldest checkpoints beyond `limit`, and never the `newest`."""
    if limit is not None:
        others = [path for path in list_checkpoints(output_dir) if path.name != newest.name]
        for path in others[: max(0, len(others) + 1 - limit)]:
            remove(path)


class IndexUnpickler(pickle.Unpickler):
    """Reads the index of a checkpoint in parts, and makes nothing but what such an index holds."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in INDEX.get(module, ()):
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return super().find_class(module, name)


@contextmanager
def only_values() -> Iterator[None]:
    """Let torch.load make nothing but tensors and plain values, whatever its callers ask for."""
    forced, opposite = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {name: os.environ.pop(name, None) for name in (forced, opposite)}
    os.environ[forced] = "1"
    allowed = [
        getattr(sys.modules[module], name)
        for module, names in DEEPSPEED.items()
        for name in sorted(names)
        if hasattr(sys.modules.get(module), name)
    ]
    try:
        with torch.serialization.safe_globals(allowed):
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def refusal(path: Path, error: object) -> ValueError:
    """The error to raise for a file that cannot be loaded, or must not be."""
    reason = str(error)
    if isinstance(error, pickle.UnpicklingError):
        named = re.search(r"GLOBAL (\S+)", reason)
        reason = "it is a pickle that " + (
            f"names {named[1]}, and so could run code" if named else "torch.save does not write"
        )
        reason += "; need tensors and plain values alone"
    elif isinstance(error, BaseException):
        reason = f"{type(error).__name__}: {next(iter(reason.splitlines()), '')}"
    return ValueError(
        f"{path} is not loaded: {reason}. Resume from another checkpoint, or start anew in another "
        "--output_dir"
    )


def check_files(checkpoint: Path) -> None:
    """Raise a ValueError for the first file that would make more than tensors and plain values."""
    for path in sorted([*checkpoint.iterdir(), *checkpoint.glob("*/*")]):
        if not path.is_file():
            continue
        if path.name.startswith("custom_checkpoint_"):
            raise refusal(path, "it is the average of --use_ema as earlier versions kept it, in a "
                          "pickle, which could run code")  # fmt: skip
        try:
            if path.name.endswith(".metadata"):
                with path.open("rb") as file:
                    IndexUnpickler(file).load()
            elif path.suffix in PICKLES:
                load(path, map_location="meta")  # reads what there is, but no tensor
        except Exception as error:
            raise refusal(path, error) from error


def check_random_states(path: Path) -> None:
    """Raise a ValueError for what accelerate would pass over in silence."""
    try:
        states = load(path)
        random.Random().setstate(states["random_state"])
        np.random.RandomState().set_state(states["numpy_random_seed"])
        torch.Generator().set_state(states["torch_manual_seed"])
        if not isinstance(states["step"], int):
            raise TypeError(f"step is {states['step']!r}")
        if any(seed.dtype != torch.uint8 for seed in states.get("torch_cuda_manual_seed", [])):
            raise TypeError("a GPU's state is not in bytes")
    except Exception as error:
        raise refusal(path, error) from error


def load_checkpoint(accelerator: Accelerator, checkpoint: Path) -> dict[str, Any]:
    """Load what `Accelerator.save_state` wrote, and return the trainer's own state."""
    try:
        state = dict(json.loads((checkpoint / STATE_FILE).read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise refusal(checkpoint / STATE_FILE, error) from error
    with only_values():
        check_files(checkpoint)
        process = accelerator.process_index
        if process < state.get("processes", 1):  # there may be more of them than there were
            check_random_states(checkpoint / f"random_states_{process}.pkl")
        try:
            accelerator.load_state(str(checkpoint))
        except pickle.UnpicklingError as error:
            raise refusal(checkpoint, error) from error
        except CheckpointException as error:  # of a checkpoint in parts
            raise refusal(checkpoint, next(iter(error.failures.values()))[0]) from error
    return state


def keep_only_what_learns(accelerator: Accelerator, ema: EMA | None) -> None:
    """Let checkpoints hold what `trainable` gives, and its average, under names that do not depend
    on the number of processes. FSDP and DeepSpeed write in their own ways."""
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return

    def learned(model: torch.nn.Module) -> dict[str, Tensor]:
        parameters = accelerator.unwrap_model(model).named_parameters()
        return {name: p.detach().contiguous() for name, p in parameters if p.requires_grad}

    def names(models: list[Any]) -> list[str]:
        """In the order of `trainable`."""
        return [f"{i}.{name}" for i, model in enumerate(models) for name in learned(model)]

    def save(models: list[Any], weights: list[Any], folder: str) -> None:
        if accelerator.is_main_process:
            for i, model in enumerate(models):
                save_file(learned(model), Path(folder) / f"learned_{i}.safetensors")
            if ema is not None:
                ema.save(Path(folder) / EMA_FILE, names(models))
        weights.clear()

    def load(models: list[Any], folder: str) -> None:
        for i, model in enumerate(models):
            path = Path(folder) / f"learned_{i}.safetensors"
            found = load_file(path)
            check_same(path, found, learned(model))
            accelerator.unwrap_model(model).load_state_dict(found, strict=False)
        if ema is not None:
            ema.load(Path(folder) / EMA_FILE, names(models))
        elif (Path(folder) / EMA_FILE).exists():
            raise ValueError(f"{folder} holds an average ({EMA_FILE}), which would be lost; need "
                             "--use_ema, as in the run before")  # fmt: skip
        models.clear()

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


class Checkpoints:
    """The checkpoints of a run: the one that it goes on from, and those that it writes."""

    def __init__(
        self, args: TrainingArguments, accelerator: Accelerator, pairs: int, pairs_per_step: int
    ) -> None:
        """`pairs` is how many there are to train on."""
        self.args, self.accelerator = args, accelerator
        self.output_dir, self.pairs_per_step = Path(args.output_dir), pairs_per_step
        self.state: dict[str, Any] = {
            "step": 0, "pairs_seen": 0, "bad_in_row": 0, "pairs": pairs, "loss": args.loss,
            "look_cut_short": False,
        }  # fmt: skip

    def resume(self, max_train_steps: int) -> dict[str, Any]:
        """Load weights, optimizer, schedule and random states of the checkpoint that the flags
        name, if there is one, and return the place to go on from."""
        args, folder = self.args, self.output_dir
        checkpoint = find_checkpoint(args.resume_from_checkpoint, folder)
        if checkpoint is not None:
            self.accelerator.print(f"resuming from {checkpoint}")
            fresh = dict(self.state)
            self.state |= load_checkpoint(self.accelerator, checkpoint)
            if self.state["pairs"] != fresh["pairs"]:
                raise ValueError(
                    f"{checkpoint} is of a run on {self.state['pairs']} pairs; there are "
                    f"{fresh['pairs']} now: need the same data, to go on in their order"
                )
            if self.state["loss"] != args.loss:
                raise ValueError(
                    f"{checkpoint} is of a run with --loss {self.state['loss']}; --loss is "
                    f"{args.loss} now: need the same, or another --output_dir"
                )
        elif args.resume_from_checkpoint:
            self.accelerator.print(f"no checkpoint in {folder}: starting from scratch")
        step = self.state["step"]
        if step > max_train_steps:
            raise ValueError(
                f"--max_train_steps is {max_train_steps}, and {checkpoint} is at step {step}; need "
                "at least as many"
            )
        later = [path.name for path in list_checkpoints(folder) if step_of(path) > step]
        if later:
            raise ValueError(
                f"--output_dir {folder} holds {', '.join(later)}, later than step {step} where "
                "this run begins; need --resume_from_checkpoint latest, or another folder"
            )
        return self.state

    def save(self, step: int, bad_in_row: int, look_cut_short: bool) -> None:
        """Write everything a later run needs to go on from here as if nothing had happened."""
        target = self.output_dir / f"{PREFIX}{step}"
        with whole_folder(target, self.accelerator) as aside:
            self.accelerator.save_state(str(aside))
            if self.accelerator.is_main_process:
                steps = step - self.state["step"]
                place = {
                    "step": step,
                    "pairs_seen": self.state["pairs_seen"] + steps * self.pairs_per_step,
                    "bad_in_row": bad_in_row,
                    "look_cut_short": look_cut_short,
                    "processes": self.accelerator.num_processes,
                }
                (aside / STATE_FILE).write_text(json.dumps(self.state | place))
        if self.accelerator.is_main_process:
            prune(self.output_dir, self.args.checkpoints_total_limit, target)
