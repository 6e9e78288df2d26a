"""The base model and what a run made of it, painted side by side on a file of prompts.

    python examples/generate.py --mixed_precision fp16 --prompts prompts.txt --output grid.png \\
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \\
        --trained sdxl-mapo

With --guidance a third column: both models at once, or the trained one led away from a worse one.
"""

from __future__ import annotations

from trainer import startup  # noqa: F401 - before torch

# isort: split
from trainer.entry import one_line_errors
from trainer.generate import main, parse_args

if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
