"""Two processes train what one does: with copies of the model or parts of it, whole or LoRA."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from accelerate.utils import DistributedType

import forked
from small_run import ROOT, Train, argv, assert_same_weights, seeing, unet_of
from trainer.args import parse_args
from trainer.families.sdxl import SDXL
from trainer.metrics import read_metrics
from trainer.optim import check_sharding

CONFIGS = ROOT / "examples" / "configs" / "accelerate"
# A larger epsilon keeps Adam from making a full step of a gradient that is but rounding.
FLAGS: dict[str, Any] = {
    "max_train_steps": 4,
    "checkpointing_steps": 2,
    "adam_epsilon": 1e-3,
    "learning_rate": 1e-2,
    "log_every": 1,
}
LORA: dict[str, Any] = {"lora_rank": 4, "loss": "dpo", "beta": 100}


def sharding(kind: str | None) -> dict[str, str]:
    """What `accelerate launch` makes of the files that we ship."""
    if kind == "fsdp":
        config = yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text())["fsdp_config"]
        names = {"fsdp_transformer_layer_cls_to_wrap": "fsdp_transformer_cls_to_wrap"}
        settings = {names.get(key, key).upper(): str(value) for key, value in config.items()}
        return {"ACCELERATE_USE_FSDP": "true", **settings}
    if kind == "deepspeed":
        config = yaml.safe_load((CONFIGS / "zero2.yaml").read_text())["deepspeed_config"]
        settings = {f"ACCELERATE_DEEPSPEED_{key}".upper(): str(v) for key, v in config.items()}
        return {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu", **settings}
    return {}


def train_by_two(
    world: Path, folder: Path, by: str | None = None, spoil: str = "", **flags: Any
) -> Path:
    folder.mkdir(exist_ok=True)
    words = [*(["--by", by] if by else []), *argv(world, folder, **flags)]
    spoilt = {"SPOIL": spoil} if spoil else {}
    codes, said = forked.start(words, folder, [sharding(by) | spoilt] * 2, together=True)
    assert codes == [0, 0], said[-3000:]
    return folder


def assert_same_run(one: Path, two: Path) -> None:
    assert_same_weights(one, two, rtol=1e-4, atol=1e-5)
    for a, b in zip(*(read_metrics(f / "metrics.jsonl") for f in (one, two)), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-3)


# Fast are all pairs of a kind and a way, and of each family one at least.
SLOW = [("epsilon", "full", None), ("epsilon", "lora", "fsdp"), ("sd15", "lora", None)]


@pytest.mark.parametrize(
    ("model", "kind", "by"),
    [
        pytest.param(*case, marks=pytest.mark.slow if case in SLOW else ())
        for case in [
            *(("epsilon", kind, by) for kind in ("full", "lora")
              for by in (None, "fsdp", "deepspeed")),
            ("sd15", "lora", None), ("sd15", "full", "fsdp"),
            ("sd3", "full", None), ("sd3", "lora", "fsdp"),
        ]
    ],
)  # fmt: skip
def test_two_processes_train_what_one_does(
    train: Train, world: Path, tmp_path: Path, model: str, kind: str, by: str | None
) -> None:
    if by == "deepspeed":
        pytest.importorskip("deepspeed")
    flags = {**FLAGS, "model": model, **(LORA if kind == "lora" else {})}
    one = train("one", train_batch_size=4, **flags)
    two = train_by_two(world, tmp_path / "two", by, train_batch_size=2, **flags)
    assert_same_run(one, two)

    # From the checkpoint in the middle they end at the same place.
    result = "pytorch_lora_weights.safetensors" if kind == "lora" else "pipeline"
    again = tmp_path / "again"
    shutil.copytree(two, again, ignore=shutil.ignore_patterns("checkpoint-4", result))
    train_by_two(world, again, by, train_batch_size=2, resume_from_checkpoint="latest", **flags)
    assert_same_weights(two, again)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_two_processes_share_the_mean_gain_of_kto(
    train: Train, world: Path, tmp_path: Path, kind: str
) -> None:
    flags = {**FLAGS, "loss": "kto", "beta": 100.0} | ({"lora_rank": 4} if kind == "lora" else {})
    one = train("one", train_batch_size=4, **flags)
    two = train_by_two(world, tmp_path / "two", train_batch_size=2, **flags)
    assert_same_run(one, two)
    assert read_metrics(one / "metrics.jsonl")[-1]["drop"] != 0


def test_shards_in_bf16_start_as_their_reference(world: Path, tmp_path: Path) -> None:
    flags = {**FLAGS, **LORA, "mixed_precision": "bf16", "gradient_checkpointing": True}
    rows = read_metrics(train_by_two(world, tmp_path / "run", "fsdp", **flags) / "metrics.jsonl")
    assert rows[0]["margin"] == 0
    assert rows[-1]["mse_w"] != rows[-1]["ref_mse_w"]


@pytest.mark.parametrize("by", [None, "fsdp", "deepspeed"])
def test_a_bad_loss_in_one_process_skips_the_step_in_all(
    world: Path, tmp_path: Path, by: str | None
) -> None:
    if by == "deepspeed":
        pytest.importorskip("deepspeed")
    folder = train_by_two(world, tmp_path / "run", by, spoil="1:2", **FLAGS)
    assert [row["skipped"] for row in read_metrics(folder / "metrics.jsonl")] == [0, 1, 0, 0]
    assert all(value.isfinite().all() for value in unet_of(folder).values())


def test_one_process_goes_on_from_the_checkpoint_of_two(
    train: Train, world: Path, tmp_path: Path
) -> None:
    flags = {**FLAGS, **seeing(world), "use_ema": True, "latent_cache": tmp_path / "cache"}
    two = train_by_two(world, tmp_path / "two", train_batch_size=2, **flags)
    shutil.copytree(two, tmp_path / "one", ignore=shutil.ignore_patterns("checkpoint-4"))
    one = train("one", train_batch_size=4, **flags, resume_from_checkpoint="latest")
    assert_same_run(one, two)
    for a, b in zip(*(read_metrics(f / "eval.jsonl") for f in (one, two)), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-3)
    assert (two / "validation" / "step-4.png").exists()


@pytest.mark.parametrize("flags", [{"use_ema": True}, {**LORA, "train_text_encoder": True}])
def test_what_cannot_be_sharded_says_so(
    world: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any]
) -> None:
    args = parse_args(argv(world, Path("run"), **flags))
    for kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        accelerator = SimpleNamespace(distributed_type=kind)
        with pytest.raises(ValueError, match=f"came with {kind.value}; need one process, or DDP"):
            check_sharding(args, SDXL, accelerator)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2"])
def test_accelerate_reads_our_configurations(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED"}
    assert config.distributed_type == kinds[name]
