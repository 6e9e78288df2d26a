"""`make gpu-check`: that it would run on a machine with little installed, and ends as it says."""

from __future__ import annotations

import ast
import csv
import importlib.metadata
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from packaging.requirements import Requirement

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu_check
from cases import FAMILIES
from conftest import NEEDS
from gpu_check import Command, Where, check

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("examples", "benchmarks", "tests", "tests/helpers")  # whose modules find one another
BARE = ("torch", "triton", "pytest", "numpy", "mpmath", "hypothesis")


def is_ours(name: str) -> bool:
    """Whether a name of the top level is a module, or a folder of modules, of this project."""
    return any(
        (ROOT / folder / f"{name}.py").exists() or any((ROOT / folder / name).glob("*.py"))
        for folder in FOLDERS
    )


def imported(test_file: Path) -> set[str]:
    """Packages that importing a test file imports, through our own modules, and those that its
    fixtures do. What else a function imports does not count."""
    seen: set[Path] = set()
    found: set[str] = set()

    def visit(path: Path) -> None:
        if path in seen:
            return
        seen.add(path)
        tree = ast.parse(path.read_text())
        nodes: list[ast.AST] = [tree]
        own = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        fixtures = {"world", "train"} - own if path == test_file else set()
        while nodes:
            node = nodes.pop()
            if isinstance(node, (ast.FunctionDef, ast.Lambda)):
                names = {arg.arg for arg in node.args.args}
                if names & fixtures:
                    visit(ROOT / "tests" / "helpers" / "small_run.py")
                continue
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                continue
            nodes += ast.iter_child_nodes(node)
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                parts = [f"{node.module}.{alias.name}" for alias in node.names]
                modules = [node.module or "", *parts]  # a name may be a module of a folder
            else:
                continue
            for name in modules:
                ours = [ROOT / folder / f"{name.replace('.', '/')}.py" for folder in FOLDERS]
                if module := next((each for each in ours if each.exists()), None):
                    visit(module)
                elif not (is_ours(top := name.split(".")[0]) or top in sys.stdlib_module_names):
                    found.add(top)

    visit(test_file)
    return found - {*BARE, "typing_extensions", "fastpref", "fastpref_kernels"}


def test_what_test_files_need_is_listed() -> None:
    files = sorted((ROOT / "tests").glob("*/test_*.py"))
    assert {path.name for path in files} >= NEEDS.keys()
    for path in files:
        needed = imported(path)
        assert bool(needed) == (path.name in NEEDS), (path.name, needed)
        assert needed <= {*NEEDS.get(path.name, ())}, path.name


def bare_python(folder: Path) -> Path:
    """The Python of an environment with what gpu-check needs, out of what is installed here."""
    command = [sys.executable, "-m", "venv", "--without-pip", str(folder)]
    subprocess.run(command, check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    wanted, seen = list(BARE), set()
    while wanted:
        name = wanted.pop().lower()
        if name in seen:
            continue
        seen.add(name)
        distribution = importlib.metadata.distribution(name)
        for line in distribution.requires or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                wanted.append(needed.name)
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A Python with little installed, and variables with which there is no git either."""
    folder = tmp_path_factory.mktemp("bare")
    tools = folder / "tools"
    tools.mkdir()
    for directory in map(Path, os.environ["PATH"].split(os.pathsep)):
        for tool in directory.iterdir() if directory.is_dir() else ():
            link = tools / tool.name
            if not tool.name.startswith("git") and not link.is_symlink():
                link.symlink_to(tool)
    gone = {"PYTHONPATH", "TRITON_INTERPRET", "VIRTUAL_ENV", "MAKEFLAGS", "MAKELEVEL"}
    env = {name: value for name, value in os.environ.items() if name not in gone}
    env |= {"PATH": str(tools), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return bare_python(folder / "venv"), env


def test_a_dry_run_where_little_is_installed(
    bare: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    python, env = bare
    command = ["make", "gpu-check", f"PYTHON={python}", "DRY_RUN=1", f"OUT={tmp_path}"]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    table = (tmp_path / "summary.txt").read_text().splitlines()
    assert table[0].split() == ["step", "ended", "seconds"]
    wanted = dict.fromkeys(gpu_check.STEPS, "passed") | {"sanitizers": "left out"}
    assert ended(tmp_path) == wanted
    assert list(ended(tmp_path)) == list(gpu_check.STEPS)
    log = (tmp_path / "log.txt").read_text()
    assert "left out for want of PIL, accelerate" in log
    assert "tests/loss/test_losses.py: " in log
    assert "tests/project/test_readme.py: " not in log
    assert "matplotlib is not installed" in log
    tables = sorted(tmp_path.glob("*.csv"))
    assert [table.name.split("-")[0] for table in tables] == ["choices", "cpu"]
    for path, key, names in zip(
        tables, ("choice", "provider"), ({"as it is"}, {"eager", "fastpref"}), strict=True
    ):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert {row[key] for row in rows} >= names
        assert {row["link"] for row in rows} >= (
            {"mapo", *FAMILIES} if key == "provider" else {"mapo"}
        )
        assert {row["git"] for row in rows} == {""}
        assert all(row["source"] for row in rows)
    assert len(list(tmp_path.iterdir())) == 4


def test_only_a_bare_session_leaves_files_out(bare: tuple[Path, dict[str, str]]) -> None:
    python, env = bare
    command = [str(python), "-m", "pytest", "-qq", "--collect-only", "-p", "no:cacheprovider"]
    command += ["tests/loss/test_health.py", "tests/study"]  # all: in the dry run
    for flags, code, expected in (
        ([], 2, "No module named"),
        (["--bare"], 0, "tests/loss/test_health.py: "),
    ):
        words = [*command, *flags]
        result = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
        assert result.returncode == code, result.stdout[-4000:]
        assert expected in result.stdout


def test_without_a_gpu_it_refuses_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu_check.py", "--output_dir", str(tmp_path / "out")]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 2
    lines = (result.stdout + result.stderr).splitlines()
    assert lines == ["gpu-check needs a GPU, and PyTorch sees none; --dry_run does without"]
    assert not (tmp_path / "out").exists()


def shell(limit: float, script: str) -> Command:
    return Command(limit, ["sh", "-c", script])


def ended(out: Path) -> dict[str, str]:
    lines = (out / "summary.txt").read_text().splitlines()[1:]
    return {line[:12].strip(): line[13:25].strip() for line in lines}


def alive(pid: int) -> bool:
    """A process that has ended but that nobody waited for is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def is_gone(pid: int) -> bool:
    for _ in range(100):
        if not alive(pid):
            return True
        time.sleep(0.1)
    return False


def test_a_step_that_overruns_is_killed_with_its_children(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pids = tmp_path / "pids"
    slow = f"sleep 600 & echo $! $$ > {pids}; echo begun; wait"
    steps = {
        "slow": lambda where: [shell(3, slow), shell(60, "echo after it")],
        "next": lambda where: [shell(60, "echo next")],
    }
    monkeypatch.setattr(gpu_check, "STEPS", steps)
    assert check(["slow", "next"], Where(tmp_path)) == 1
    assert ended(tmp_path) == {"slow": "OUT OF TIME", "next": "passed"}
    for pid in map(int, pids.read_text().split()):
        assert is_gone(pid)
    log = (tmp_path / "log.txt").read_text()
    for line in ("begun", "killed after 3 s", "after it", "next"):
        assert f"\n{line}\n" in log


def test_a_step_that_fails_does_not_stop_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    steps = {
        "bad": lambda where: [shell(60, "exit 3"), shell(60, "true")],
        "absent": lambda where: [Command(60, ["there-is-no-such-command"])],
        "good": lambda where: [shell(60, "true")],
    }
    monkeypatch.setattr(gpu_check, "STEPS", steps)
    assert check(list(steps), Where(tmp_path)) == 1
    assert ended(tmp_path) == {"bad": "FAILED", "absent": "FAILED", "good": "passed"}
    assert check(["good"], Where(tmp_path)) == 0  # and what there was stays in the table
    assert ended(tmp_path) == {"bad": "FAILED", "absent": "FAILED", "good": "passed"}


def test_an_interrupted_check_leaves_nothing_running(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = f"""
import sys
sys.path.insert(0, "benchmarks")
import gpu_check
step = lambda where: [gpu_check.Command(600, ["sh", "-c", "echo $$ > {pids}; sleep 600"])]
gpu_check.STEPS = {{"long": step}}
gpu_check.main(["--dry_run", "--output_dir", {str(tmp_path)!r}])
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    while not (pids.exists() and pids.read_text()):
        assert process.poll() is None
        time.sleep(0.1)
    assert ended(tmp_path) == {"long": "running"}
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert ended(tmp_path) == {"long": "INTERRUPTED"}
    assert is_gone(int(pids.read_text()))


def test_steps_name_test_files_that_are_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And the checkers run tests of single samples, of lists and of more sums."""
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name, path: name)
    for step in (gpu_check.tests, gpu_check.sanitizers):
        words = step(Where(tmp_path))[0].words
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
    selection = [*words[words.index("--bare") :], "--collect-only", "-q"]
    command = [sys.executable, "-m", "pytest", *selection]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
    for link in ("kto", "rankdpo_4", "dspo"):
        assert f"test_published_and_fused_agree[{link}-dtypes0]" in result.stdout
    assert "dtypes1" not in result.stdout
    assert "test_shapes[" in result.stdout


def test_all_steps_together_end_in_twenty_minutes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name, path: name)  # with the sanitizer
    limits = {
        name: sum(command.limit for command in step(Where(tmp_path)))
        for name, step in gpu_check.STEPS.items()
    }
    assert sum(limits.values()) <= 20 * 60
    assert max(limits.values()) <= 10 * 60
