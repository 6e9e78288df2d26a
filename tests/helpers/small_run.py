"""Knows the smallest world in which the trainer runs: two pipelines, a handful of pairs, flags."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from toy.photo_pairs import write_photo_pairs
from toy.tiny import tiny_sdxl
from train_sdxl import main
from trainer.args import parse_args
from trainer.export import LORA_FILE

ROOT = Path(__file__).resolve().parents[2]
Train = Callable[..., Path]
SCORES: dict[str, Any] = {"score_columns": ("score_0", "score_1")}


def make_world(folder: Path) -> Path:
    """Two pipelines, one per prediction type, and a handful of pairs with all the columns."""
    for prediction_type in ("epsilon", "v_prediction"):
        pipeline = tiny_sdxl(
            (8, 16), (8, 8), sample_size=8, prediction_type=prediction_type, norm_num_groups=4
        )
        pipeline.save_pretrained(folder / prediction_type)
    write_photo_pairs(folder / "data", train=24, heldout=8, size=24)
    rows = pq.read_table(folder / "data" / "train.parquet").to_pylist()
    for i, row in enumerate(rows):
        better = int(row["label_0"] == 0)
        row |= {f"score_{better}": 0.7 + 0.01 * i, f"score_{1 - better}": 0.2}
        row |= {"worse_caption": f"{row['caption']}, spoilt", "sign": -1.0}
    pq.write_table(pa.Table.from_pylist(rows), folder / "data" / "train.parquet")
    return folder


def argv(world: Path, output_dir: Path, model: str = "epsilon", **flags: Any) -> list[str]:
    settings: dict[str, Any] = {
        "pretrained_model_name_or_path": world / model,
        "dataset_name": world / "data",
        "cache_dir": world / "cache",
        "output_dir": output_dir,
        "resolution": 16,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_train_steps": 3,
        "learning_rate": 1e-3,
        "report_to": "none",
        **flags,
    }
    words: list[str] = []
    for name, value in settings.items():
        values = value if isinstance(value, tuple) else () if value is True else (value,)
        words += [f"--{name}", *map(str, values)]
    return words


def trainer(world: Path, folder: Path) -> Train:
    """Runs the trainer in this process; each run has a folder of its name in `folder`."""

    def run(name: str = "run", **flags: Any) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)  # else the precision is kept
        main(parse_args(argv(world, folder / name, **flags)))
        return folder / name

    return run


def unet_of(output_dir: Path) -> dict[str, torch.Tensor]:
    """What a run trained: the adapters, or else the UNet."""
    lora = output_dir / LORA_FILE
    if lora.exists():
        return load_file(lora)
    return load_file(output_dir / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")


def assert_same_weights(a: Path, b: Path, **tolerance: Any) -> None:
    first, second = unet_of(a), unet_of(b)
    assert first.keys() == second.keys()
    for name in first:
        if tolerance:
            torch.testing.assert_close(first[name], second[name], **tolerance)
        else:
            assert first[name].equal(second[name]), name


def seeing(world: Path) -> dict[str, Any]:
    """Flags by which a run is looked at every second step."""
    return {
        "eval_dataset_name": world / "data",
        "eval_split_name": "heldout",
        "eval_steps": 2,
        "validation_prompts": ("a cat", "a cup | of coffee"),
        "validation_steps": 2,
        "validation_inference_steps": 2,
    }
