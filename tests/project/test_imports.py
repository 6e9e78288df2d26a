"""Which module may import which: `make lint` runs import-linter's contracts; here is the rest."""

from __future__ import annotations

import ast
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_no_module_imports_an_entry() -> None:
    entries = {path.stem for path in EXAMPLES.glob("*.py")}
    modules = [*EXAMPLES.glob("*/*.py"), *EXAMPLES.glob("*/*/*.py")]
    assert len(modules) > 40
    for path in [*EXAMPLES.glob("*.py"), *modules]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            assert not {name.split(".")[0] for name in names} & entries, path


def test_entries_are_short() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 30, path
