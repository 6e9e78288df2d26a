"""What compilers make of the kernels for each target, under each Triton that fastpref may meet.

    python benchmarks/compiled_code.py [--tritons 3.6.0 3.7.1 ...]

Puts each Triton (200 MB) into .venv-tritons/, compiles all cases of tests/helpers/aot.py with it,
and checks them by tests/kernels/test_aot.py. The kernels of the table in benchmarks/README.md go to
results/compiled.csv, and the table is drawn anew. No GPU is needed.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench_loss import RESULTS, append, environment

ROOT = Path(__file__).resolve().parent.parent
TRITONS = ROOT / ".venv-tritons"
README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- made by compiled_code.py: begin -->", "<!-- made by compiled_code.py: end -->"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
PLAIN = {"shared": True, "ref": "", "mask": "", "layout": "dense", "knobs": "", "huber": False}
DTYPES = (("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16"))


def command(version: str, *words: str, capture: bool = False) -> subprocess.CompletedProcess[str]:
    """Runs this Python on `words` with another Triton in front of its own."""
    folder = TRITONS / version
    paths = [folder, ROOT, ROOT / "kernels", ROOT / "tests" / "helpers"]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "TRITON_CACHE_DIR": str(folder / "cache"),
    }
    env.pop("TRITON_INTERPRET", None)
    run = [sys.executable, "-W", "ignore", *words]
    return subprocess.run(run, env=env, cwd=ROOT, text=True, capture_output=capture)


def compiled(version: str) -> list[dict[str, Any]]:
    """The rows of tests/helpers/aot.py, which stay in .venv-tritons/ too."""
    if not (TRITONS / version / "triton").is_dir():
        install = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-deps"]
        install += ["--target", str(TRITONS / version), f"triton=={version}"]
        subprocess.run(install, check=True)
    result = command(version, "tests/helpers/aot.py", capture=True)
    if result.returncode:
        sys.exit(f"tests/helpers/aot.py failed under Triton {version}:\n{result.stderr[-4000:]}")
    (TRITONS / f"{version}.jsonl").write_text(result.stdout)
    return [json.loads(line) for line in result.stdout.splitlines()]


def shown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What goes into results/: MaPO's and Diffusion-DPO's forward and the backward they share, on
    dense tensors with a target that pairs share."""
    found = []
    for row in rows:
        plain = all(row[key] == value for key, value in PLAIN.items())
        of_link = row["link"] in ("mapo", "dpo_sigmoid")
        if not plain or not of_link or (row["pred"], row["of_target"]) not in DTYPES:
            continue
        if "error" in row or not row["loops"]:
            continue
        hot, *rest = row["loops"]
        name = row["link"] if row["kernel"] == "pair_fwd" else "backward"
        found.append(
            {
                "kernel": name,
                "dtypes": f"{row['pred']}, {row['of_target']}",
                "target": row["target"],
                "triton": row["triton"],
                "registers": row["registers"],
                "spilled": row["spilled"],
                "instructions": row["instructions"],
                "loop": hot["instructions"],
                "loads": "+".join(map(str, hot["groups"])),
                "barriers": hot["barriers"],
                "last_waits": sum(len(loop["groups"]) for loop in rest),
                "shared_memory": row["shared_memory"],
            }
        )
    return found


def table(path: Path = RESULTS / "compiled.csv") -> str:
    """The first and the latest rows of each kernel, a table for each target."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    first = {row["git"] for row in rows[:1]}
    tritons = sorted({row["triton"] for row in rows if row["git"] in first})
    lines = []
    for target in TARGETS:
        cells: dict[tuple[str, str], dict[str, list[str]]] = {}
        for row in (row for row in rows if row["target"] == target):
            of_kernel = cells.setdefault((row["kernel"], row["dtypes"]), {})
            spilled = f" (spills {row['spilled']} B)" if row["spilled"] != "0" else ""
            cell = f"{row['registers']}{spilled} / {row['instructions']} / {row['loop']} / "
            cell += f"{row['loads']} / {row['barriers']} / {row['last_waits']}"
            of_kernel.setdefault(row["triton"], []).append(cell)
        lines += [f"**{target}**", "", f"| kernel | dtypes | | {' | '.join(tritons)} |"]
        lines += ["|---" * (3 + len(tritons)) + "|"]
        for (kernel, dtypes), by_triton in cells.items():
            for when, i in (("before", 0), ("now", -1)):
                each = [
                    by_triton[version][i] if version in by_triton else "" for version in tritons
                ]
                lines.append(f"| {kernel} | {dtypes} | {when} | {' | '.join(each)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="What compilers make of the kernels, for each target and Triton.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--tritons", nargs="+", default=["3.5.1", "3.6.0", "3.7.1", "3.9.0"])
    about = environment()
    about.pop("triton")
    bad = []
    for version in parser.parse_args().tritons:
        rows = compiled(version)
        errors = [row for row in rows if "error" in row]
        for row in errors:
            what = " ".join(str(row[key]) for key in ("kernel", "link", *PLAIN, "target"))
            print(f"  {what}: {row['error'].splitlines()[0]}")
        question = "import fastpref_kernels; print(fastpref_kernels.TRITON_MISSING)"
        unsupported = command(version, "-c", question, capture=True).stdout.strip()
        path = str(TRITONS / f"{version}.jsonl")
        # Without a time limit, as it compiles too.
        words = ["-q", "--timeout", "0", "tests/kernels/test_aot.py", "--aot_rows", path]
        checks = command(version, "-m", "pytest", *words)
        verdict = "all as it should be" if checks.returncode == 0 else "NOT as it should be"
        kernels = f"{len(rows) - len(errors)} of {len(rows)} kernels compile"
        print(f"Triton {version}: {kernels}, {verdict}. {unsupported}", flush=True)
        bad += [version] if checks.returncode and not unsupported else []
        if new := shown(rows):
            append(RESULTS / "compiled.csv", [row | about for row in new])
    text = README.read_text()
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    README.write_text(f"{before}\n\n{table()}\n{after}")
    if bad:
        sys.exit(f"not as it should be under Triton {', '.join(bad)}")


if __name__ == "__main__":
    main()
