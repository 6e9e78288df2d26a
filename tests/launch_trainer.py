"""One of several processes of the trainer on a CPU; test_many_processes.py starts them.

python -m torch.distributed.run --standalone --nproc_per_node 2 launch_trainer.py [--fsdp] FLAGS
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "examples")]

from flags import parse_args  # noqa: E402
from objectives import LOSSES  # noqa: E402
from train_sdxl import main  # noqa: E402


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


if __name__ == "__main__":
    torch.set_num_threads(1)
    words = sys.argv[1:]
    if "SPOIL" in os.environ:
        spoil(os.environ["SPOIL"])
    if words[0] == "--by":
        shard_on_a_cpu(words[1])
        words = words[2:]
    main(parse_args(words))
    sys.stdout.flush()
    os._exit(0)  # the interpreter's end may abort a thread of gloo that still waits for it
