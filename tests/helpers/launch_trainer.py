"""One of several processes of the trainer on a CPU, in which something may go wrong.

python -m torch.distributed.run --standalone --nproc_per_node 2 launch_trainer.py [--by fsdp] FLAGS
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "examples")]

from trainer import loop  # noqa: E402
from trainer.args import parse_args  # noqa: E402
from trainer.data import loader  # noqa: E402
from trainer.evaluate import HeldOut  # noqa: E402
from trainer.families.all import FAMILIES  # noqa: E402
from trainer.families.sdxl import SDXL  # noqa: E402
from trainer.losses import LOSSES  # noqa: E402
from trainer.metrics import MetricsLog  # noqa: E402
from trainer.sampling import PromptSampler  # noqa: E402


def shard_on_a_cpu(kind: str) -> None:
    """Let accelerate shard as the environment says, which by itself it does on GPUs only."""
    begin = AcceleratorState.__init__

    def begin_sharded(self: AcceleratorState, *args: Any, **named: Any) -> None:
        plugin = named.pop(f"{kind}_plugin", None)
        begin(self, *args, **named)
        if plugin is not None:
            self.distributed_type = DistributedType(kind.upper())
            PartialState._shared_state["distributed_type"] = self.distributed_type
            if kind == "fsdp":
                self.fsdp_plugin = plugin
                if self._mixed_precision != "no":
                    plugin.set_mixed_precision(self._mixed_precision)
            else:
                plugin.set_mixed_precision(self._mixed_precision)
                plugin.select(_from_accelerator_state=True)
                self.deepspeed_plugins = plugin
                self._mixed_precision = "no"  # as accelerate has it: DeepSpeed sees to that

    AcceleratorState.__init__ = begin_sharded


def spoil(place: str) -> None:
    """Make the loss NaN in one process at one step, told as PROCESS:STEP."""
    process, step = map(int, place.split(":"))
    calls, mapo_loss = iter(range(1, 1000)), LOSSES["mapo"]

    @functools.wraps(mapo_loss)
    def spoilt(pred: torch.Tensor, *args: Any, **options: Any) -> Any:
        out = mapo_loss(pred, *args, **options)
        now = pred.requires_grad and next(calls) == step  # not its trial before training
        bad = now and int(os.environ["RANK"]) == process
        return out._replace(loss=out.loss * float("nan")) if bad else out

    LOSSES["mapo"] = spoilt


# Where a signal can come: what is called then.
MOMENTS: dict[str, tuple[Any, str]] = {
    "step": (MetricsLog, "end_step"),
    "save": (Accelerator, "save_state"),
    "score": (HeldOut, "score"),
    "paint": (PromptSampler, "sample"),
    "data": (loader, "make_pairs"),
    "result": (loop, "save_trained"),
}


def send(target: str, names: str) -> None:
    """Send signals to this process, its group, or its launcher's group, and let them arrive."""
    for name in names.split(","):
        signum = signal.Signals[name]
        if target == "self":
            os.kill(os.getpid(), signum)
        else:
            os.killpg(os.getpgid(0 if target == "group" else os.getppid()), signum)
        time.sleep(0.1)


def interrupt(order: str) -> None:
    """Send signals at a moment, told as PROCESS:MOMENT:CALL:TARGET:SIGNALS[:then]; `then` is what
    happens next, "wait" or "fail"."""
    process, moment, call, target, names, then = f"{order}:".split(":")[:6]
    if process != os.environ.get("RANK", "0"):
        return
    calls = iter(range(1, 10_000))
    owner, name = MOMENTS[moment]
    original: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(original)
    def interrupted(*args: Any, **options: Any) -> Any:
        if next(calls) == int(call):
            send(target, names)
            if then == "wait":
                time.sleep(600)
            if then == "fail":
                raise OSError("no space left")
        return original(*args, **options)

    setattr(owner, name, interrupted)


def run(words: list[str]) -> None:
    torch.set_num_threads(1)
    if "SPOIL" in os.environ:
        spoil(os.environ["SPOIL"])
    if "INTERRUPT" in os.environ:
        interrupt(os.environ["INTERRUPT"])
    if words[0] == "--by":
        shard_on_a_cpu(words[1])
        words = words[2:]
    args = parse_args(words)
    model = Path(args.pretrained_model_name_or_path).name
    loop.main(args, FAMILIES.get(model, SDXL))
    sys.stdout.flush()
    os._exit(0)  # the interpreter's end may abort a thread of gloo that still waits for it


if __name__ == "__main__":
    run(sys.argv[1:])
