"""Alignment of an SDXL model on preference pairs.

    accelerate launch examples/train_sdxl.py \\
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \\
        --dataset_name yuvalkirstain/pickapic_v2 --mixed_precision bf16 --gradient_checkpointing

`trainer/loop.py` has the run, `trainer/step.py` the step.
"""

from __future__ import annotations

from trainer import startup  # noqa: F401 - before torch

# isort: split
from trainer.args import parse_args
from trainer.entry import one_line_errors
from trainer.families.sdxl import SDXL
from trainer.loop import main

if __name__ == "__main__":
    with one_line_errors():
        main(parse_args(family=SDXL), SDXL)
