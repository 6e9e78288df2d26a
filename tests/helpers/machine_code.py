"""What a compiler made of a kernel: registers, spills, widths of loads and stores; and of each loop
that reads memory its length, loads and stores, waits, and barriers."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton


class Instruction(NamedTuple):
    """label: where it stands, as jumps name it. jump: the label it may jump to, or ""."""

    label: str
    text: str
    jump: str = ""


def read(binary: Any, backend: str) -> dict[str, Any]:
    """registers: per thread. spilled: bytes per thread. parked: scalars kept in lanes of vector
    registers (AMD). loads, stores: how many instructions move how many bytes a thread at a time.
    shared_memory: bytes. instructions: all of them. loops: those that read global memory and hold
    no other loop, as `_loop` describes them, in the order of the code."""
    code, usage = (_amd if backend == "hip" else _nvidia)(binary.asm)
    described = _loop_of_amd if backend == "hip" else _loop_of_nvidia
    bodies = [described([each.text for each in body]) for body in innermost_loops(code)]
    found: dict[str, Any] = {"instructions": len(code), "shared_memory": binary.metadata.shared}
    return usage | found | {"loops": [loop for loop in bodies if loop["groups"]]}


def innermost_loops(code: list[Instruction]) -> Iterator[list[Instruction]]:
    """What lies between where jumps back go to and the last of them, and holds no other such."""
    at = {each.label: i for i, each in reversed([*enumerate(code)]) if each.label}
    last = {at[e.jump]: i for i, e in enumerate(code) if e.jump in at and at[e.jump] < i}
    for first, end in last.items():
        if not any(first < f and l <= end for f, l in last.items()):
            yield code[first : end + 1]


def _loop(body: list[str], groups: list[int], stores: str, barriers: str) -> dict[str, Any]:
    """groups: how many loads are under way together, each time until something waits for one of
    them. order: of loads (L) and stores (S)."""
    kinds = rf"\b(LDG|global_load|buffer_load)|\b({stores})|\b({barriers})"
    found = re.finditer(kinds, "\n".join(body))
    order = "".join("LSB"[match.lastindex - 1] for match in found if match.lastindex)
    return {
        "instructions": len(body),
        "groups": groups,
        "order": order.replace("B", ""),
        "barriers": order.count("B"),
    }


def _nvidia(asm: Any) -> tuple[list[Instruction], dict[str, Any]]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()

        def dump(what: str) -> str:
            command = [str(tool), what, cubin.name]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        usage, text = dump("--dump-resource-usage"), dump("--dump-sass")
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    code = []
    for label, words in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", text):
        jump = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", words)
        code.append(Instruction(label, words, jump[1].zfill(len(label)) if jump else ""))
    while code[-1].text == "NOP" or code[-1].jump == code[-1].label:  # only fill the last line
        code.pop()

    def widths(op: str) -> dict[int, int]:
        found = re.findall(rf"\b{op}\.global(?:[.:\w]*?)(?:\.v(\d))?\.b(\d+)\b", asm["ptx"])
        return Counter(int(vector or 1) * int(bits) // 8 for vector, bits in found)

    return code, {
        "registers": used["REG"],
        "spilled": used["STACK"] + used["LOCAL"],
        "parked": 0,
        "loads": widths("ld"),
        "stores": widths("st"),
    }


def _loop_of_nvidia(body: list[str]) -> dict[str, Any]:
    """What reads a register that a load has yet to fill waits for it."""
    groups, count = [], 0
    filling: set[int] = set()
    for text in body:
        load = re.search(r"\bLDG\S*?(?:\.(64|128))?(?:\.\w+)* R(\d+),", text)
        if load:
            first, n = int(load[2]), int(load[1] or 32) // 32
            filling |= set(range(first, first + n))
            count += 1
        elif filling & {int(register) for register in re.findall(r"\bR(\d+)\b", text)}:
            groups.append(count)
            filling, count = set(), 0
    return _loop(body, groups + [count] * (count > 0), "STG", "BAR|WARPSYNC")


def _amd(asm: Any) -> tuple[list[Instruction], dict[str, Any]]:
    text = asm["amdgcn"]
    names = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    found = {name: re.search(rf"\.{name}:\s*(\d+)", text) for name in names}
    used = {name: int(match[1]) for name, match in found.items() if match}
    sizes = {"byte": 1, "ubyte": 1, "short": 2, "ushort": 2, "dword": 4}
    sizes |= {f"dwordx{n}": 4 * n for n in (2, 3, 4)}
    code, label = [], ""
    for line in text[: text.index(".Lfunc_end")].splitlines():
        if match := re.match(r"(\.LBB\w+):", line):
            label = match[1]
        elif match := re.match(r"\t([a-z]\w+.*)", line):
            jump = re.match(r"s_c?branch\w*\s+(\.LBB\w+)", match[1])
            code.append(Instruction(label, match[1], jump[1] if jump else ""))
            label = ""

    def widths(op: str) -> dict[int, int]:
        words = re.findall(rf"\b(?:global|buffer)_{op}_([a-z]+?(?:x\d)?)\b", text)
        return Counter(sizes[word] for word in words)

    return code, {
        "registers": used["vgpr_count"],
        "spilled": used["vgpr_spill_count"] + used["private_segment_fixed_size"],
        "parked": used["sgpr_spill_count"],
        "loads": widths("load"),
        "stores": widths("store"),
    }


def _loop_of_amd(body: Iterable[str]) -> dict[str, Any]:
    """Waits are instructions of their own."""
    groups, count = [], 0
    body = list(body)
    for text in body:
        if re.match(r"(global|buffer)_load", text):
            count += 1
        elif "vmcnt" in text and count:
            groups.append(count)
            count = 0
    return _loop(body, groups + [count] * (count > 0), "(?:global|buffer)_store", "s_barrier")
