"""What the compiler makes of each kernel for each target: vectors, no spills, few registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fastpref_kernels import LINKS, launch

TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "bool": 1}


# Each kernel for one target, or for all.
every = pytest.fixture(
    scope="module", params=[True, pytest.param(False, marks=pytest.mark.slow)], ids=["turn", "all"]
)


@every
def rows(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    made: Path | None = request.config.getoption("aot_rows")
    if made:
        return [json.loads(line) for line in made.read_text().splitlines()]
    return compiled(*["--in_turn"] * request.param)


@every
def group_rows(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return compiled("--groups", *["--in_turn"] * request.param)


def compiled(*words: str) -> list[dict[str, Any]]:
    script = Path(__file__).resolve().parents[1] / "helpers" / "aot.py"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", str(script), *words]
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def accesses(row: dict[str, Any], *dtypes: str) -> Counter[str]:
    """How many accesses of how many bytes a thread needs for its share of one block of each
    operand, if they are as wide as can be."""
    found: Counter[str] = Counter()
    for dtype in dtypes:
        share = launch.BLOCK // row["threads"] * BYTES[dtype]
        found[str(min(share, 16))] += max(share // 16, 1)
    return found


def case(row: dict[str, Any]) -> str:
    return " ".join(str(value) for value in row.values())


def test_every_link_and_target_compiles(
    rows: list[dict[str, Any]], request: pytest.FixtureRequest
) -> None:
    """In turn: every link for a GPU of each maker, once without knobs and once with."""
    failed = [case(row) for row in rows if "error" in row]
    assert not failed, "\n".join(failed)
    forward = [row for row in rows if row["kernel"] == "pair_fwd"]
    made = {(row["link"], row["target"]) for row in forward}
    if "turn" in request.node.callspec.id:
        makers = {(link, target == "gfx942") for link, target in made}
        assert makers == {(link, amd) for link in LINKS for amd in (True, False)}
        assert {(r["link"], bool(r["knobs"])) for r in forward} == {
            (link, knobs) for link in LINKS for knobs in (True, False)
        }
        assert {target for _, target in made} == set(TARGETS)
    else:
        assert made == {(link, target) for link in LINKS for target in TARGETS}
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
    each = max(launch.PAIRS * launch.PARTS // row["threads"], 1)
    return each * sum(kinds(row))


def kinds(row: dict[str, Any]) -> list[int]:
    """How many kinds of partial sums the last program reads at a time: four at most."""
    total = 2 * (3 if paired(row) else 1) + bool(row["mask"])
    return [min(4, total - first) for first in range(0, total, 4)]


def paired(row: dict[str, Any]) -> bool:
    return LINKS[row["link"]].score.needs_ref and row["ref"] != "errors"


def test_elements_move_in_vectors(rows: list[dict[str, Any]]) -> None:
    """A thread has one vector of each operand, 16 bytes of the widest, and narrow accesses are for
    scalars alone."""
    for row in (row for row in rows if row["layout"] in ("dense", "wide")):
        pred, target, ref = row["pred"], row["of_target"], row["ref"] or row["pred"]
        assert set(accesses(row, pred, target).values()) <= {1, 2}, case(row)
        assert "16" in accesses(row, pred, target), case(row)
        needed = accesses(row, pred, pred, *[target] * (2 - row["shared"]))
        needed += accesses(row, *[row["mask"]] * bool(row["mask"]))
        if row["kernel"] == "pair_fwd":
            if LINKS[row["link"]].score.needs_ref and ref != "errors":
                needed += accesses(row, ref, ref)
            needed["4"] += partial_sums(row)
            if row["knobs"] == "tensors" or ref == "errors":  # and scalars
                needed["4"] = row["loads"]["4"]
            assert row["loads"] == needed, case(row)
            assert not {"8", "16"} & row["stores"].keys(), case(row)
        else:  # grad_loss and two factors; perhaps scalar loads on gfx942
            scalars = row["loads"].get("4", 0)
            assert scalars == 3 if row["target"] != "gfx942" else scalars <= 3, case(row)
            assert row["loads"] == needed + Counter({"4": scalars}), case(row)
            assert row["stores"] == accesses(row, pred, pred), case(row)


def test_a_block_is_loaded_at_once(rows: list[dict[str, Any]]) -> None:
    """A round of the loop over blocks waits for the memory once, before it stores anything, and
    nothing passes from thread to thread. For six operands, five of half precision or pseudo-Huber
    errors it may wait twice, for want of registers. AMD's compiler waits for each load by itself
    where it likes, and moves the load of a mask."""
    for row in (row for row in rows if row["layout"] in ("dense", "wide")):
        loop = row["loops"][0]
        of_grad = row["kernel"] == "pair_bwd"  # grad_loss; AMD has scalar loads for such
        assert loop["barriers"] == 0, case(row)
        if row["mask"] and row["target"] == "gfx942":
            continue
        assert sum(loop["groups"]) in (operands(row), operands(row) + of_grad), case(row)
        few = operands(row) < (6 if row["pred"] == "fp32" else 5) and not row["huber"]
        many = 3 if row["target"] == "gfx942" else 2
        assert len(loop["groups"]) <= (1 if few else many), case(row)
        assert "SL" not in loop["order"], case(row)


def operands(row: dict[str, Any]) -> int:
    """How many a round of the loop over blocks loads."""
    of_ref = 2 if row["kernel"] == "pair_fwd" and paired(row) else 0
    return 2 + (1 if row["shared"] else 2) + of_ref + bool(row["mask"])


def test_the_last_program_waits_once_for_all_kinds_of_sums(rows: list[dict[str, Any]]) -> None:
    """Or for four of them. The compiler may do several rounds at
    once, and shows AMD's loops more than once."""
    for row in (row for row in rows if row["kernel"] == "pair_fwd" and row["target"] != "gfx942"):
        loops = row["loops"][1:]
        assert len(loops) == len(kinds(row)), case(row)
        for loop, n_kinds in zip(loops, kinds(row), strict=True):
            assert len(loop["groups"]) == 1, case(row)
            assert loop["groups"][0] % n_kinds == 0, case(row)


def test_shared_memory_is_for_sums_alone(rows: list[dict[str, Any]]) -> None:
    """4 bytes for each of at most eight warps, for sums over a program; no tile passes through
    it."""
    for row in rows:
        assert row["shared_memory"] <= (32 if row["kernel"] == "pair_fwd" else 0), case(row)


def test_other_layouts_load_each_element_once(rows: list[dict[str, Any]]) -> None:
    strided = [row for row in rows if row["layout"] == "channels_last"]
    strided = [row for row in strided if row["kernel"] == "pair_fwd"]
    assert {row["link"] for row in strided} == {"mapo", "dpo_sigmoid"}
    for row in strided:
        per_thread = launch.BLOCK // row["threads"]
        n_fp32 = 4 if LINKS[row["link"]].score.needs_ref else 2
        assert row["loads"]["2"] == per_thread, case(row)  # bf16 target, shared
        assert row["loads"]["4"] == n_fp32 * per_thread + partial_sums(row), case(row)


def test_other_groups_and_sums_cost_no_more(group_rows: list[dict[str, Any]]) -> None:
    """All of `aot.families` and tests/kernels/test_engine.py: no spills, one vector of each operand
    at a time, no barrier, and two waits for the memory in a round of the loop over blocks, or three
    for eight operands."""
    for row in group_rows:
        assert "error" not in row, case(row)
        assert row["spilled"] == 0, case(row)
        of_list = row["link"].startswith(("rankdpo", "plackett_luce"))
        assert row["registers"] <= (256 if of_list else 128), case(row)
        assert not {"1", "2"} & row["loads"].keys(), case(row)
        assert row["loads"]["16"] >= 2, case(row)
        assert row["loops"][0]["barriers"] == 0, case(row)
        if row["target"] != "gfx942":
            waits = row["loops"][0]["groups"]
            assert len(waits) <= (2 if sum(waits) < 8 else 3), case(row)
    assert {row["target"] for row in group_rows} == set(TARGETS)
    links = {row["link"] for row in group_rows}
    of_pairs = {"rankdpo_16", "dspo", "safeguard of the batch", "dro", "step_dpo", "sdpo"}
    assert {"kto", *of_pairs, "grpo_kl", "grpo_guard_kl", "nft_kl"} <= links
