"""Sources of samples with labels, and of lists with scores.

Whatever they come from, rows have images jpg_0, jpg_1, ... (a sample one, a list k) and a caption;
a sample has label_0, 1 or 0, a list score_0, score_1, ...; a sample may have score_0 too.
"""

from __future__ import annotations

import numpy as np
from datasets import Dataset

from trainer.data.lists import read_lists
from trainer.data.pairs import ROW
from trainer.data.samples import read_samples
from trainer.data.tables import Source
from trainer.losses import Layout


def read_groups(layout: Layout, source: Source) -> Dataset:
    """The samples or lists of a source."""
    rows = read_lists(source) if layout == "lists" else read_samples(source)
    if not len(rows):
        raise source.error(f"no {layout[:-1]} to train on")
    known = [f"{kind}_{i}" for i in range(16) for kind in ("jpg", "score")]
    known += ["caption", ROW] if layout == "lists" else ["caption", ROW, "label_0"]
    rows = rows.select_columns([column for column in rows.column_names if column in known])
    return rows if ROW in rows.column_names else rows.add_column(ROW, np.arange(len(rows)))
