"""Tensors on disk: safetensors files of which equal contents give equal bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from trainer.files import whole_file


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all, of which equal contents give equal bytes.

    safetensors itself writes metadata in any order, and a file that nobody else may read.
    """
    data = save({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, dict(metadata))
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path) as aside, aside.open("wb") as file:
        file.writelines((len(text).to_bytes(8, "little"), text, memoryview(data)[begin:]))
