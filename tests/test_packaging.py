"""How the package arrives: wheel, checkout, without Triton, beside Hugging Face's `kernels`."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import fastpref

ROOT = Path(__file__).resolve().parent.parent
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


def test_the_reference_imports_no_kernel() -> None:
    tree = ast.parse((ROOT / "fastpref" / "reference.py").read_text())
    modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    ours = {m for m in modules if m and "kernels" in m}
    assert ours == {"fastpref_kernels.knobs", "fastpref_kernels.links"}


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
    assert [r for r in requires if "extra" not in r] == ["torch>=2.6"]
    extras = set(importlib.metadata.metadata("fastpref").get_all("Provides-Extra") or [])
    assert extras == {"triton", "train", "dev"}
    assert (ROOT / "fastpref" / "py.typed").exists()
