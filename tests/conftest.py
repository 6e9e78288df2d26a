"""Where the kernels run in this session: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

HAS_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes that tests start: as below
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)  # tensors are tiny: more threads only wait for one another


def patch_once() -> None:
    """Triton's interpreter replaces what triton.language has when a kernel starts, and looks all of
    it through again for each function that the kernel calls, which is two thirds of its time."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    if not hasattr(interpreter, "_LangPatchScope"):  # another version's
        return
    real, done = interpreter._patch_lang, set[str]()
    modules: dict[Any, set[str]] = {}

    def patch(fn: Any) -> Any:
        if fn not in modules:
            found = (value for value in fn.__globals__.values() if isinstance(value, ModuleType))
            modules[fn] = {each.__name__ for each in found}
        names = modules[fn] & {"triton.language", "triton.language.core"}
        if names and names <= done:
            return interpreter._LangPatchScope()  # with nothing to restore
        scope = real(fn)
        done.update(names)
        restore = scope.restore

        def restored() -> None:
            done.clear()
            restore()

        scope.restore = restored
        return scope

    interpreter._patch_lang = patch


if not HAS_GPU:
    patch_once()

# What test files need beyond torch, triton, pytest, numpy, mpmath and hypothesis. `pytest --bare`,
# which `make gpu-check` runs, leaves out files (and tests marked "needs") whose packages are
# missing; without the flag that is an error. test_gpu_check.py compares this with the imports.
TRAINER = (
    "PIL", "accelerate", "datasets", "diffusers", "huggingface_hub", "matplotlib", "packaging",
    "peft", "pyarrow", "safetensors", "skimage", "sklearn", "tqdm", "transformers", "yaml",
)  # fmt: skip
NEEDS = {
    **dict.fromkeys(
        (
            "test_args.py", "test_bench_step.py", "test_cache.py", "test_evaluate.py",
            "test_export.py", "test_families.py", "test_generate.py", "test_groups.py",
            "test_images_and_pairs.py", "test_many_processes.py", "test_monitor.py",
            "test_original_layout.py", "test_readme.py", "test_resume_safety.py",
            "test_sampling.py", "test_signals.py", "test_single_file.py", "test_sources.py",
            "test_tiny.py", "test_train_groups.py", "test_train_options.py", "test_train_sdxl.py",
        ),
        TRAINER,
    ),
    "test_gpu_check.py": ("packaging",),
    "test_guidance.py": ("accelerate", "diffusers", "peft", "transformers"),
    "test_mismatch_study.py": ("PIL", "matplotlib", "sklearn", "tqdm"),
    "test_packaging.py": ("build", "diffusers", "kernels", "packaging", "transformers", "uv"),
}  # fmt: skip


def missing(names: Sequence[str]) -> list[str]:
    def installed(name: str) -> bool:
        spec = importlib.util.find_spec(name)
        return spec is not None and spec.origin is not None  # our folder kernels/ has no origin

    return [name for name in names if not installed(name)]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bare", action="store_true", help="leave out what needs missing packages")
    text = "of what tests draw at random, if they have no seed of their own"
    parser.addoption("--seed", type=int, default=0, help=text)
    text = "what tests/helpers/aot.py printed, for test_aot.py to check instead of compiling"
    parser.addoption("--aot_rows", type=Path, metavar="FILE", help=text)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    needed = NEEDS.get(collection_path.name, ())
    return True if config.getoption("bare") and missing(needed) else None


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("bare"):
        config.pluginmanager.register(AtOnce(config))


class AtOnce:
    """Shows failures when they happen: a session with a time limit may not reach its end."""

    def __init__(self, config: pytest.Config) -> None:
        self.plugins = config.pluginmanager

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self.plugins.get_plugin("terminalreporter")
        if report.failed and terminal:  # the processes of pytest-xdist have none
            terminal.write_line(f"\nFAILED {report.nodeid}\n{report.longreprtext}")


def pytest_report_header(config: pytest.Config) -> list[str]:
    where = torch.cuda.get_device_name() if HAS_GPU else "Triton's interpreter"
    lines = [f"kernels run on: {where}", f"draws are of --seed {config.getoption('seed')}"]
    if config.getoption("bare"):
        for needed in dict.fromkeys(NEEDS.values()):
            if lacking := missing(needed):
                files = ", ".join(name for name, of_file in NEEDS.items() if of_file == needed)
                lines.append(f"left out for want of {', '.join(lacking)}: {files}")
    return lines


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        # not item.keywords, which has the names of the folders above, too
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        needs = item.get_closest_marker("needs")
        if config.getoption("bare") and needs and missing(needs.args):
            item.add_marker(pytest.mark.skip(reason=f"needs {', '.join(needs.args)}"))


@pytest.fixture(autouse=True)
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Of this test alone, wherever it runs; as are the global generators."""
    seed = f"{request.config.getoption('seed')} for {request.node.nodeid}"
    print(f"draws are of --seed {seed}")  # which pytest shows of a test that fails
    made = random.Random(seed)
    random.seed(seed)
    np.random.seed(made.getrandbits(32))
    torch.manual_seed(made.getrandbits(32))
    return made


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if HAS_GPU else torch.device("cpu")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fills whatever torch.empty returns with NaN, so that nothing unwritten passes for a
    result."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The kernel of each launch that the test makes, as they come."""
    from fastpref_kernels import launch  # here, because Triton is not everywhere

    found: list[Any] = []
    real = launch._launch

    def noted(kernel: Any, *rest: Any) -> Any:
        found.append(kernel)
        return real(kernel, *rest)

    monkeypatch.setattr(launch, "_launch", noted)
    return found


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a small run of the trainer needs (tests/helpers/small_run.py)."""
    from small_run import make_world  # here, because diffusers is not everywhere

    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def train(world: Path, tmp_path: Path) -> Callable[..., Path]:
    """Runs the trainer, with flags by keyword; returns the run's folder."""
    from small_run import trainer

    return trainer(world, tmp_path)
