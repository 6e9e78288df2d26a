"""What the compiler makes of each kernel for each target: vectors, no spills, few registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastpref_kernels import LINKS, launch

TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    script = Path(__file__).with_name("aot.py")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", str(script)]
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def vectors(operands: dict[str, int]) -> int:
    """16-byte accesses a thread needs for its share of one block of each operand."""
    per_thread = launch.BLOCK // launch.THREADS
    return sum(count * per_thread * BYTES[dtype] // 16 for dtype, count in operands.items())


def case(row: dict[str, Any]) -> str:
    return " ".join(str(value) for value in row.values())


def test_every_link_and_target_compiles(rows: list[dict[str, Any]]) -> None:
    failed = [f"{case(row)}: {row['error']}" for row in rows if "error" in row]
    assert not failed, "\n".join(failed)
    forward = {(row["link"], row["target"]) for row in rows if row["kernel"] == "pair_fwd"}
    assert forward == {(link, target) for link in LINKS for target in TARGETS}
    backward = {row["target"] for row in rows if row["kernel"] == "pair_bwd"}
    assert backward == set(TARGETS)


def test_nothing_spills_and_registers_are_few(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert row["spilled"] == 0, case(row)
        assert row["parked"] == 0 or row["knobs"], case(row)
        plain = row["layout"] != "channels_last" and not row["knobs"]
        most = 64 if row["target"] == "sm_90" and plain else 128
        assert row["registers"] <= most, case(row)


def partial_sums(row: dict[str, Any]) -> int:
    """4-byte loads a thread needs for the partial sums, winners' and losers', in the last
    program."""
    paired = LINKS[row["link"]].score.needs_ref and row["ref"] != "errors"
    kinds = (6 if paired else 2) + (1 if row["mask"] else 0)
    return kinds * launch.PAIRS * launch.PARTS // launch.THREADS


def test_elements_move_in_16_byte_vectors(rows: list[dict[str, Any]]) -> None:
    """As many 16-byte accesses as a block has bytes, and narrow ones for scalars alone."""
    for row in (row for row in rows if row["layout"] != "channels_last"):
        needed = vectors({row["pred"]: 2}) + vectors({row["of_target"]: 2 - row["shared"]})
        if row["kernel"] == "pair_fwd" and LINKS[row["link"]].score.needs_ref:
            needed += 0 if row["ref"] == "errors" else vectors({row["ref"] or row["pred"]: 2})
        assert row["loads"].get("16") == needed, case(row)
        narrow = {width: n for width, n in row["loads"].items() if width != "16"}
        assert narrow.pop("8", 0) == (1 if row["mask"] else 0), case(row)  # 8 bools
        if row["kernel"] == "pair_fwd":
            assert "16" not in row["stores"], case(row)
            if row["knobs"] != "tensors" and row["ref"] != "errors":
                assert narrow == {"4": partial_sums(row)}, case(row)
        else:  # grad_loss and two factors; scalar loads on gfx942
            assert narrow in ({"4": 3}, {}), case(row)
            assert row["stores"] == {"16": vectors({row["pred"]: 2})}, case(row)


def test_other_layouts_load_each_element_once(rows: list[dict[str, Any]]) -> None:
    strided = [row for row in rows if row["layout"] == "channels_last"]
    strided = [row for row in strided if row["kernel"] == "pair_fwd"]
    assert {row["link"] for row in strided} == {"mapo", "dpo_sigmoid"}
    per_thread = launch.BLOCK // launch.THREADS
    for row in strided:
        n_fp32 = 4 if LINKS[row["link"]].score.needs_ref else 2
        assert row["loads"]["2"] == per_thread, case(row)  # bf16 target, shared
        assert row["loads"]["4"] == n_fp32 * per_thread + partial_sums(row), case(row)
