"""The whole story in six minutes on two cores: data, model, MaPO, and whether it learned."""

from __future__ import annotations

from trainer import startup  # noqa: F401 - before torch

# isort: split
from toy.demo import main, parse_args
from trainer.entry import one_line_errors

if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
