"""Alignment of a Stable Diffusion 3 or 3.5 model on preference pairs, by flow matching.

    accelerate launch examples/train_sd3.py --loss dpo --beta 100 --lora_rank 32 \\
        --pretrained_model_name_or_path stabilityai/stable-diffusion-3.5-medium \\
        --dataset_name yuvalkirstain/pickapic_v2 --mixed_precision bf16 --gradient_checkpointing

`trainer/loop.py` has the run, `trainer/step.py` the step.
"""

from __future__ import annotations

from trainer import startup  # noqa: F401 - before torch

# isort: split
from trainer.args import parse_args
from trainer.entry import one_line_errors
from trainer.families.sd3 import SD3
from trainer.loop import main

if __name__ == "__main__":
    with one_line_errors():
        main(parse_args(family=SD3), SD3)
