"""Compiles the kernels ahead of time, exactly as a launch would, for GPUs that need not be there.

As a script it prints a JSON row for each kernel: `python tests/aot.py [TARGET ...]`. In the process
that compiles, TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))
from fastpref_kernels import LINKS, launch, pair

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Recorder:
    """Stands in for a jit kernel: a launch writes its arguments down instead of running."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.calls: list[tuple[Any, Any, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: self.calls.append((grid, args, kwargs))


@contextlib.contextmanager
def recorded() -> Iterator[tuple[Recorder, Recorder]]:
    """Forward and backward kernel, replaced by recorders."""
    fwd, bwd = Recorder(pair.pair_fwd), Recorder(pair.pair_bwd)
    pair.pair_fwd, pair.pair_bwd = fwd, bwd
    try:
        yield fwd, bwd
    finally:
        pair.pair_fwd, pair.pair_bwd = fwd.kernel, bwd.kernel


def specialized(recorder: Recorder, target: GPUTarget) -> tuple[Any, Any, Any, Any]:
    """(signature, constexprs, attributes, options) that the jit would compile the launch with."""
    kernel, (_, args, kwargs) = recorder.kernel, recorder.calls[-1]
    kwargs = kwargs | {"num_warps": launch.THREADS // target.warp_size}
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(*args, **kwargs)
    options, *rest = kernel._pack_args(backend, kwargs, bound, specialization, None)
    return *rest, options


def compiled(recorder: Recorder, name: str) -> dict[str, Any]:
    """What the compiler made of the recorded launch: registers per thread, bytes spilled, and how
    many instructions load and store how many bytes at a time."""
    target = TARGETS[name]
    signature, constexprs, attrs, options = specialized(recorder, target)
    source = ASTSource(recorder.kernel, signature, constexprs, attrs)
    binary = triton.compile(source, target=target, options=options.__dict__)
    read = _amd if target.backend == "hip" else _nvidia
    return {"kernel": recorder.kernel.__name__, "target": name, **read(binary.asm)}


def _nvidia(asm: Any) -> dict[str, Any]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()
        command = [str(tool), "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}

    def widths(op: str) -> dict[int, int]:
        found = re.findall(rf"\b{op}\.global(?:[.:\w]*?)(?:\.v(\d))?\.b(\d+)\b", asm["ptx"])
        return Counter(int(vector or 1) * int(bits) // 8 for vector, bits in found)

    return {
        "registers": used["REG"],
        "spilled": used["STACK"] + used["LOCAL"],
        "loads": widths("ld"),
        "stores": widths("st"),
    }


def _amd(asm: Any) -> dict[str, Any]:
    text = asm["amdgcn"]
    names = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    found = {name: re.search(rf"\.{name}:\s*(\d+)", text) for name in names}
    used = {name: int(match[1]) for name, match in found.items() if match}
    sizes = {"byte": 1, "ubyte": 1, "short": 2, "ushort": 2, "dword": 4}
    sizes |= {f"dwordx{n}": 4 * n for n in (2, 3, 4)}

    def widths(op: str) -> dict[int, int]:
        words = re.findall(rf"\b(?:global|buffer)_{op}_([a-z]+?(?:x\d)?)\b", text)
        return Counter(sizes[word] for word in words)

    return {
        "registers": used["vgpr_count"],
        "spilled": sum(used[name] for name in names[1:]),
        "loads": widths("load"),
        "stores": widths("store"),
    }


def recorders(
    link: str, pred: str, target: str, shared: bool, layout: str
) -> tuple[Recorder, Recorder]:
    """The launches of one training step on two pairs of 4x64x64 latents; if wide, of as many
    elements as need 64 bits, which nothing here allocates."""
    model_pred = torch.zeros(4, 4, 64, 64, dtype=DTYPES[pred])
    if layout == "channels_last":
        model_pred = model_pred.to(memory_format=torch.channels_last)
    wanted = torch.zeros(2 if shared else 4, 4, 64, 64, dtype=DTYPES[target])
    hyper = list(LINKS[link].hyper.values())
    operands = (model_pred, None), (wanted, None)
    count = (2, 2**32) if layout == "wide" else launch._count(operands[0])
    with recorded() as both, mock.patch.object(launch, "_count", return_value=count):
        loss, stats = launch.pair_forward(
            LINKS[link], hyper, [None] * len(hyper), *operands, "mean"
        )
        launch.pair_backward(loss, stats, *operands, (True, False))
    return both


def rows(targets: list[str]) -> Iterator[dict[str, Any]]:
    """Every link in fp32; and with mapo, each mixture of dtypes that trainers have, both forms of
    target, and other layouts. The backward kernel does not know the link."""
    dtypes = [("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16"), ("fp16", "fp16")]
    cases = [("mapo", p, t, shared, "dense") for p, t in dtypes for shared in (True, False)]
    cases += [("mapo", "fp32", "bf16", True, layout) for layout in ("wide", "channels_last")]
    cases += [(link, "fp32", "fp32", True, "dense") for link in LINKS if link != "mapo"]
    for case in cases:
        fwd, bwd = recorders(*case)
        for recorder in (fwd, bwd) if case[0] == "mapo" else (fwd,):
            for name in targets:
                keys = ("link", "pred", "of_target", "shared", "layout")
                yield dict(zip(keys, case, strict=True)) | compiled(recorder, name)


if __name__ == "__main__":
    for row in rows(sys.argv[1:] or list(TARGETS)):
        print(json.dumps(row), flush=True)
