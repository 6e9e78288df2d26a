"""One of several processes of the trainer on a CPU; test_many_processes.py starts them.

python -m torch.distributed.run --standalone --nproc_per_node 2 launch_trainer.py [--fsdp] FLAGS
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "examples")]

from flags import parse_args  # noqa: E402
from train_sdxl import main  # noqa: E402


def shard_on_a_cpu() -> None:
    """Let accelerate shard as examples/accelerate/fsdp2.yaml says, which it does on GPUs only."""
    begin = AcceleratorState.__init__

    def begin_sharded(self: AcceleratorState, *args: Any, **named: Any) -> None:
        plugin = named.pop("fsdp_plugin", None)
        begin(self, *args, **named)
        if plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = begin_sharded
    assert FullyShardedDataParallelPlugin().fsdp_version == 2


if __name__ == "__main__":
    torch.set_num_threads(1)
    words = sys.argv[1:]
    if "--fsdp" in words:
        words.remove("--fsdp")
        shard_on_a_cpu()
    main(parse_args(words))
