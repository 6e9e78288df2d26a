"""Where the kernels run in this session: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

HAS_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes that tests start: as below
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)  # tensors are tiny: more threads only wait for one another

# `make gpu-check` runs where only torch and Triton need be; `make test` installs all of these.
TRAINER = ("accelerate", "datasets", "diffusers", "matplotlib", "peft")
NEEDS = {
    **dict.fromkeys(
        (
            "test_bench_step.py", "test_examples_data.py", "test_generate.py", "test_heldout.py",
            "test_latent_cache.py", "test_lora_files.py", "test_many_processes.py",
            "test_painting.py", "test_pair_sources.py", "test_resume_safety.py", "test_signals.py",
            "test_train_options.py", "test_train_sdxl.py",
        ),
        TRAINER,
    ),
    "test_readme.py": ("diffusers",),
    "test_mismatch_study.py": ("sklearn", "matplotlib", "tqdm"),
    "test_packaging.py": ("kernels", "diffusers", "build", "packaging", "uv"),
}  # fmt: skip


def installed(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None  # our folder kernels/ has no origin


collect_ignore = [
    name for name, needed in NEEDS.items() if HAS_GPU and not all(map(installed, needed))
]


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "what `python tests/aot.py` printed, for test_aot.py to check instead of compiling"
    parser.addoption("--aot_rows", type=Path, metavar="FILE", help=text)


def pytest_report_header() -> list[str]:
    where = torch.cuda.get_device_name() if HAS_GPU else "Triton's interpreter"
    left_out = [f"not collected, for want of one of {NEEDS[n]}: {n}" for n in collect_ignore]
    return [f"kernels run on: {where}", *left_out]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(skip)


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


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a small run of the trainer needs (tests/small_run.py)."""
    from small_run import make_world  # here, because diffusers is not everywhere

    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def train(world: Path, tmp_path: Path) -> Callable[..., Path]:
    """Runs the trainer, with flags by keyword; returns the run's folder."""
    from small_run import trainer

    return trainer(world, tmp_path)
