"""How the package arrives: wheel, checkout, without Triton, beside Hugging Face's `kernels`."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from uv import find_uv_bin

import fastpref

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT: dict[str, Any] = PYPROJECT["project"]
CONSTRAINTS = ROOT / ".ci" / "constraints.txt"
PYTHONS = [c.split(" :: ")[-1] for c in PROJECT["classifiers"] if ":: Python ::" in c]
KERNELS = ROOT / "kernels" / "fastpref_kernels"
SITE = Path(sysconfig.get_paths()["purelib"])


def python(script: str, cwd: Path = ROOT, **env: str) -> str:
    """Output of a fresh interpreter; `env` replaces variables, '' removes one."""
    names = {"TRITON_INTERPRET": "", "PYTHONPATH": "", "PYTHONSAFEPATH": ""} | env
    full = {name: value for name, value in (os.environ | names).items() if value}
    command = [sys.executable, "-W", "ignore", "-c", script]
    result = subprocess.run(command, cwd=cwd, env=full, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.strip()


def hide(*names: str) -> str:
    """Code that makes top-level modules un-importable, as where they are not installed."""
    return f"""
import sys, importlib.abc
class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
"""


USE = """
import torch, fastpref
pred = torch.randn(4, 3, 5, requires_grad=True)
out = fastpref.mapo_loss(pred, torch.randn(2, 3, 5))
out.loss.backward()
assert out.loss.isfinite() and pred.grad.isfinite().all() and out.metrics()
fastpref.MaPOLoss()(pred, torch.randn(4, 3, 5)); fastpref.sft_loss(pred, torch.randn(2, 3, 5))
"""


def test_without_triton_everything_runs_through_the_reference() -> None:
    script = (
        hide("triton")
        + USE
        + """
try:
    fastpref.mapo_loss(pred, torch.randn(2, 3, 5), impl="triton")
except ValueError as error:
    print(error)
"""
    )
    assert python(script).startswith('impl is "triton", but Triton cannot be imported')


def test_import_needs_torch_alone() -> None:
    others = "diffusers transformers accelerate peft datasets PIL matplotlib numpy scipy pandas"
    python(hide(*others.split(), "safetensors", "huggingface_hub", "kernels", "triton") + USE)


def test_the_kernels_import_torch_triton_and_themselves() -> None:
    allowed = {"torch", "triton"} | set(sys.stdlib_module_names)
    for path in KERNELS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {name.name.split(".")[0] for name in node.names} <= allowed, path
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert (node.module or "").split(".")[0] in allowed, path


@pytest.mark.parametrize("name", ["reference", "differentiable", "sums"])
def test_the_reference_imports_no_kernel(name: str) -> None:
    tree = ast.parse((ROOT / "fastpref" / f"{name}.py").read_text())
    modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    ours = {m for m in modules if m and "kernels" in m}
    assert ours <= {"fastpref_kernels.knobs", "fastpref_kernels.links"}


def test_kernels_is_a_bare_folder() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("installed", [True, False])
def test_hugging_face_kernels_is_not_shadowed(installed: bool, tmp_path: Path) -> None:
    """From the repo's root, with and without an installed fastpref, the real package is found."""
    where = SITE if installed else site_without(tmp_path, "fastpref")
    script = """
import sys; sys.path.insert(0, "")
import kernels, fastpref, fastpref_kernels
from kernels import get_local_kernel
import diffusers.models.attention_dispatch
print(kernels.__file__)
print(fastpref.__file__)
print(fastpref_kernels.__file__)
"""
    found = isolated(script, where)
    assert found[0].endswith("kernels/__init__.py")
    assert not found[0].startswith(str(ROOT / "kernels"))
    assert found[1:] == [str(ROOT / "fastpref" / "__init__.py"), str(KERNELS / "__init__.py")]


def test_the_folder_does_not_pass_for_hugging_face_kernels(tmp_path: Path) -> None:
    """Where that package is not installed, diffusers and transformers must see that it is not."""
    script = """
import sys; sys.path.insert(0, "")
from diffusers.utils import import_utils
from transformers.utils import is_kernels_available
print(import_utils.is_kernels_available())
print(is_kernels_available())
import diffusers.models.attention_dispatch, fastpref
"""
    assert isolated(script, site_without(tmp_path, "kernels")) == ["False", "False"]


def site_without(folder: Path, name: str) -> Path:
    """The installed packages but one, as links."""
    for entry in SITE.iterdir():
        if not entry.name.replace("__editable__", "").strip("_.").startswith(name):
            (folder / entry.name).symlink_to(entry)
    return folder


def isolated(script: str, site: Path) -> list[str]:
    """Lines of output from the repo's root, with the packages in `site` and no others."""
    script = f"import site; site.addsitedir({str(site)!r})\n{script}"
    command = [sys.executable, "-S", "-W", "ignore", "-c", script]
    names = ("TRITON_INTERPRET", "PYTHONPATH", "PYTHONSAFEPATH")
    env = {name: value for name, value in os.environ.items() if name not in names}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.split()


def test_get_local_kernel_loads_the_folder() -> None:
    script = f"""
from pathlib import Path
import torch
from kernels import get_local_kernel
folder = get_local_kernel(Path({str(KERNELS)!r}), backend="cpu")
assert set(folder.__all__) >= {{"LINKS", "pair_forward", "pair_backward"}}
pred, target = torch.randn(4, 70), torch.randn(2, 70)
hyper = [h.default for h in folder.LINKS["mapo"].hyper.values()]
loss, stats = folder.pair_forward(folder.LINKS["mapo"], hyper, (pred, None), (target, None))
import fastpref  # both at once
torch.testing.assert_close(loss, fastpref.mapo_loss(pred, target).loss)
print(folder.__name__)
"""
    assert "fastpref_kernels" in python(script, TRITON_INTERPRET="1", HF_HUB_OFFLINE="1")


def test_metadata_of_the_kernel_folder() -> None:
    metadata = json.loads((KERNELS / "metadata.json").read_text())
    assert metadata["name"] == "fastpref-kernels"
    assert metadata["license"] == "Apache-2.0"


def test_a_bare_checkout_works_from_its_root(tmp_path: Path) -> None:
    script = f"import sys; sys.path.insert(0, '')\n{USE}\nprint(fastpref.__file__)"
    assert isolated(script, site_without(tmp_path, "fastpref")) == [
        str(ROOT / "fastpref" / "__init__.py")
    ]


def test_wheel(tmp_path: Path) -> None:
    """It holds both packages and their data, no folder `kernels`, and runs where it is unpacked."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(tmp_path)]
    built = subprocess.run([*command, str(copy(tmp_path))], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"fastpref-{fastpref.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "unpacked")
    assert {
        "fastpref/py.typed",
        "fastpref_kernels/py.typed",
        "fastpref_kernels/metadata.json",
    } <= set(names)
    assert {name.split("/")[0] for name in names} == {
        "fastpref", "fastpref_kernels", f"fastpref-{fastpref.__version__}.dist-info",
    }  # fmt: skip
    assert any(name.endswith("licenses/LICENSE") for name in names)
    script = f"{USE}\nimport fastpref_kernels\nprint(fastpref_kernels.__file__)"
    unpacked = tmp_path / "unpacked"
    assert python(script, cwd=unpacked, PYTHONPATH=str(unpacked)).startswith(str(unpacked))


def copy(folder: Path) -> Path:
    """The files a wheel is built from: building in place would leave folders behind."""
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "fastpref", "kernels"):
        (source / name).symlink_to(ROOT / name)
    return source


def test_extras_and_version() -> None:
    assert importlib.metadata.version("fastpref") == fastpref.__version__
    requires = importlib.metadata.requires("fastpref") or []
    assert [r for r in requires if "extra" not in r] == PROJECT["dependencies"]
    extras = set(importlib.metadata.metadata("fastpref").get_all("Provides-Extra") or [])
    assert extras == {"triton", "train", "test", "dev"}
    assert (ROOT / "fastpref" / "py.typed").exists()


def test_the_pythons_that_are_named_are_those_that_are_taken() -> None:
    """The oldest of the classifiers is the floor, and `make test-floors` runs on that one."""
    takes = SpecifierSet(PROJECT["requires-python"])
    minors = [int(re.fullmatch(r"3\.(\d+)", python)[1]) for python in PYTHONS]  # type: ignore[index]
    assert minors == list(range(minors[0], minors[-1] + 1))
    assert all(python in takes for python in PYTHONS)
    assert f"3.{minors[0] - 1}" not in takes
    assert f"--python 3.{minors[0]} " in (ROOT / "Makefile").read_text()
    assert importlib.metadata.metadata("fastpref")["Requires-Python"] == PROJECT["requires-python"]


def test_constraints_pin_what_pyproject_names() -> None:
    extras = PROJECT["optional-dependencies"].values()
    named = [PYPROJECT["build-system"]["requires"], PROJECT["dependencies"], *extras]
    pins = {
        canonicalize_name(pin.name): pin.specifier
        for pin in map(Requirement, CONSTRAINTS.read_text().split())
    }
    for requirement in (Requirement(text) for texts in named for text in texts):
        if requirement.name == "fastpref":
            continue
        (pin,) = pins[canonicalize_name(requirement.name)]
        assert pin.operator == "==", requirement.name
        assert pin.version in requirement.specifier, f"{requirement} is pinned to {pin.version}"


def resolve(*options: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    """Which versions uv would install from the package index alone, without folders of wheels."""
    kept = "UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_CACHE_DIR", "UV_NATIVE_TLS", "UV_SYSTEM_CERTS"
    env = {n: v for n, v in os.environ.items() if n in kept or not n.startswith(("UV_", "PIP_"))}
    command = [find_uv_bin(), "pip", "compile", "--no-config", "--no-header"]
    source = "-" if given else "pyproject.toml"
    return subprocess.run(
        [*command, "--no-annotate", "--only-binary", ":all:", *options, source],
        cwd=ROOT, input=given, env=env | {"MACOSX_DEPLOYMENT_TARGET": "14.0"},
        capture_output=True, text=True,
    )  # fmt: skip


def assert_resolves(*options: str) -> dict[str, str]:
    """The versions found. Skips only where the index gives nothing at all, and never in CI."""
    result = resolve(*options)
    if result.returncode and "CI" not in os.environ:
        probe = resolve("--no-deps", given="packaging")
        if probe.returncode:
            pytest.skip(f"the package index cannot be reached: {probe.stderr.strip()[-300:]}")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.split()
    return dict(line.split("==") for line in lines if "==" in line)


PLATFORMS = ["x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu", "aarch64-apple-darwin",
             "x86_64-pc-windows-msvc"]  # fmt: skip


@pytest.mark.parametrize(
    ("python", "platform"),
    [*((python, PLATFORMS[0]) for python in PYTHONS), *((PYTHONS[0], p) for p in PLATFORMS[1:])],
)
def test_the_constraints_resolve(python: str, platform: str) -> None:
    """`make` would find a wheel of everything, and Triton on Linux: all Pythons and platforms."""
    where = ("--python-version", python, "--python-platform", platform)
    versions = assert_resolves(*where, "--constraint", str(CONSTRAINTS), "--all-extras")
    assert ("triton" in versions) == ("linux" in platform)


@pytest.mark.parametrize("names", [("triton", "test"), ("train", "test")])
def test_the_floors_resolve_to_themselves(names: tuple[str, ...]) -> None:
    """`make test-floors` installs the floors that are written, none that was raised silently."""
    floors = [Requirement(text) for text in PROJECT["dependencies"]]
    floors += [
        Requirement(text) for name in names for text in PROJECT["optional-dependencies"][name]
    ]
    extras = [word for name in names for word in ("--extra", name)]
    platform = ("--python-version", PYTHONS[0], "--python-platform", PLATFORMS[0])
    versions = assert_resolves(*platform, *extras, "--resolution", "lowest-direct")
    highest = {floor.name: floor for floor in floors}  # the trainer's torch after the losses'
    for floor in highest.values():
        (least,) = floor.specifier
        assert least.operator == ">="
        found = versions[canonicalize_name(floor.name)]
        assert f"{found}.".startswith(f"{least.version}."), f"{floor} resolves to {found}"


OLD = """
import importlib.metadata, runpy, sys
real = importlib.metadata.version
importlib.metadata.version = lambda name: {versions!r}.get(name) or real(name)
sys.argv = [{entry!r}, "--help"]
sys.path.insert(0, "examples")
try:
    runpy.run_path("examples/" + {entry!r}, run_name="__main__")
except SystemExit as stop:
    print(stop.code)
print("torch" in sys.modules)
"""


@pytest.mark.parametrize("entry", ["demo.py", "train_sd3.py", "generate.py"])
def test_an_old_version_is_named_before_anything_is_imported(entry: str) -> None:
    versions = {"transformers": "4.57.6", "peft": "0.14.0", "torch": "2.14.0.dev20260901+cu130"}
    message, imported = python(OLD.format(versions=versions, entry=entry)).splitlines()
    needed = {Requirement(text).name: text for text in PROJECT["optional-dependencies"]["train"]}
    assert f"{needed['transformers']} (4.57.6 is installed)" in message
    assert f"{needed['peft']} (0.14.0 is installed)" in message
    assert "torch" not in message  # a nightly build of a later release
    assert imported == "False"


def test_an_entry_runs_from_anywhere_without_being_installed(tmp_path: Path) -> None:
    """With -S, site-packages counts only as a folder of packages, and no editable install does."""
    site = next(path for path in sys.path if path.endswith("site-packages"))
    env = {**os.environ, "PYTHONPATH": site}
    script = "import importlib.util; print(importlib.util.find_spec('fastpref'))"
    command = [sys.executable, "-S"]
    found = subprocess.run(
        [*command, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert found.stdout == "None\n"
    command += [str(ROOT / "examples" / "train_sd3.py"), "--help"]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "usage: train_sd3.py" in result.stdout


def test_an_old_python_is_named() -> None:
    script = """
import sys
sys.version_info, sys.version = (3, 10, 13), "3.10.13 (main)"
sys.path.insert(0, "examples")
try:
    from trainer import startup
except SystemExit as stop:
    print(stop.code)
"""
    floor = PROJECT["requires-python"]
    assert python(script) == f"Python {floor.replace('>=', '>= ')} is needed (3.10.13 runs this)"


def test_threads_wait_passively_unless_told_otherwise() -> None:
    script = """
import os, sys
sys.path.insert(0, "examples")
from trainer import startup
print(os.environ["OMP_WAIT_POLICY"], os.environ.get("OMP_NUM_THREADS"), "torch" in sys.modules)
"""
    assert python(script, OMP_WAIT_POLICY="", OMP_NUM_THREADS="") == "PASSIVE None False"
    assert python(script, OMP_WAIT_POLICY="ACTIVE", OMP_NUM_THREADS="3") == "ACTIVE 3 False"
