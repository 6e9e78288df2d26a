"""What guidance by two models does to reward and diversity, on the models of the study.

python examples/guidance_study.py --output_dir study    # 3 aligned models x 3 seeds
"""

from __future__ import annotations

from trainer import startup  # noqa: F401 - before torch

# isort: split
import sys

from study.guidance import main
from trainer.entry import one_line_errors

if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
