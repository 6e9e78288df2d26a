"""How often 50 bucket shapes and batch sizes make each compiler start again: Triton's jit for
fastpref's kernels, and torch.compile for the published formulas.

    python benchmarks/recompilations.py

Nothing is run for Triton's count: it is that of distinct specializations, which the jit compiles
once each, for sm_90; no GPU is needed. Appends to results/recompilations.csv.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # in the interpreter there is nothing to specialize
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "helpers"))

import torch
from torch import Tensor

import aot
from bench_loss import RESULTS, append, environment
from cases import PUBLISHED
from fastpref_kernels import LINKS


def of_compile(link: str, dynamic: bool | None) -> int:
    """Graphs that torch.compile makes, each of which it compiles forward and backward."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 100
    graphs = []

    def backend(graph: Any, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(PUBLISHED[link], backend=backend, dynamic=dynamic, fullgraph=True)
    for pairs, height, width in aot.buckets():
        pred = torch.zeros(2 * pairs, 4, height, width, requires_grad=True)
        target = torch.ones(pairs, 4, height, width)
        compiled(pred, target, *([pred.detach()] if LINKS[link].score.needs_ref else []))
    return len(graphs)


def main() -> None:
    about = environment()
    rows = [
        {
            "link": link,
            "shapes": len(list(aot.buckets())),
            "fastpref_kernels": len(aot.specializations(link)),
            "compile_graphs": of_compile(link, None),
            "compile_graphs_static": of_compile(link, False),
        }
        for link in PUBLISHED
    ]
    for row in rows:
        print(row)
    append(RESULTS / "recompilations.csv", [row | about for row in rows])


if __name__ == "__main__":
    main()
