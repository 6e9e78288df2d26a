"""The smallest world in which the trainer runs: a pipeline of each family, some pairs, flags."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from toy.photo_pairs import write_photo_pairs
from toy.tiny import tiny_sd3, tiny_sd15, tiny_sdxl
from trainer.args import parse_args
from trainer.export import LORA_FILE
from trainer.families.all import FAMILIES
from trainer.families.family import Family
from trainer.families.sdxl import SDXL
from trainer.loop import main

ROOT = Path(__file__).resolve().parents[2]
Train = Callable[..., Path]
SCORES: dict[str, Any] = {"score_columns": ("score_0", "score_1")}


def make_world(folder: Path) -> Path:
    """A pipeline of each family, of SDXL one per prediction type, and some pairs with all the
    columns."""
    small: dict[str, Any] = {"sample_size": 8, "norm_num_groups": 4}
    unet: dict[str, Any] = {"unet_channels": (8, 16), "vae_channels": (8, 8), **small}
    for prediction_type in ("epsilon", "v_prediction"):
        pipeline = tiny_sdxl(prediction_type=prediction_type, **unet)
        pipeline.save_pretrained(folder / prediction_type)
    tiny_sd15(**unet).save_pretrained(folder / "sd15")
    tiny_sd3(head_dim=8, vae_channels=(8, 8), latent_channels=4, **small).save_pretrained(
        folder / "sd3"
    )
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
        main(parse_args(argv(world, folder / name, **flags)), family_of(flags))
        return folder / name

    return run


def family_of(flags: Mapping[str, Any]) -> Family:
    """That of the model of `argv`."""
    return FAMILIES.get(flags.get("model", ""), SDXL)


def unet_of(output_dir: Path) -> dict[str, torch.Tensor]:
    """What a run trained: the adapters, or else the denoiser."""
    lora = output_dir / LORA_FILE
    if lora.exists():
        return load_file(lora)
    (weights,) = (
        path
        for name in ("unet", "transformer")
        for path in (output_dir / "pipeline" / name).glob("*.safetensors")
    )
    return load_file(weights)


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
