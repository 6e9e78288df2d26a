"""The study of reference mismatch: the runs it takes, what must come out of them, and its table.

    python examples/mismatch_study.py            # 3 styles x 5 methods x 3 seeds; `make study`
    python examples/mismatch_study.py --quick    # one seed, without the longer runs
    python examples/mismatch_study.py --tune     # the trials from which the settings were chosen

Whatever was finished before is not done again; remove the output folder to start afresh.
"""

from __future__ import annotations

from trainer import startup  # noqa: F401 - before torch

# isort: split
import sys

from study.mismatch import main
from trainer.entry import one_line_errors

if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
