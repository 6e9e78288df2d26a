"""A LoRA's two files hold the same model, under the names that their readers look for."""

from __future__ import annotations

import functools
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer.families.sdxl import SDXL

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from bench_step import sdxl_text_encoders, sdxl_unet
from small_run import ROOT
from toy.tiny import tiny_sdxl
from trainer.export import KOHYA_FILE, LORA_FILE, adapters_of, to_kohya, write_lora
from trainer.families.unet import original_name
from trainer.lora import add_lora, trainable

# The fields of LoraConfig in peft 0.14, the oldest that the trainer works with.
PEFT_0_14 = {
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out",
    "bias", "use_rslora", "modules_to_save", "init_lora_weights", "layers_to_transform",
    "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_config", "megatron_core",
    "loftq_config", "eva_config", "use_dora", "layer_replication", "runtime_config", "lora_bias",
    "task_type", "peft_type", "auto_mapping", "base_model_name_or_path", "revision",
    "inference_mode",
}  # fmt: skip


PARTS = ("unet", "text_encoder", "text_encoder_2")


def tiny() -> StableDiffusionXLPipeline:
    """Three levels, so that blocks with attention have two numbers on either side."""
    return tiny_sdxl((8, 16, 32), (8, 8), sample_size=8, norm_num_groups=4)


def adapt(models: list[Any], rank: int = 4, alpha: float | None = None) -> None:
    """Give the models adapters that change them."""
    args: Any = SimpleNamespace(lora_rank=rank, lora_alpha=alpha)
    add_lora(args, SDXL, models[0], models[1:])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(models):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)


def write(folder: Path, models: dict[str, Any]) -> list[str]:
    return write_lora(folder, SDXL, models, dict.fromkeys(models))


def predictions(pipeline: StableDiffusionXLPipeline) -> list[Tensor]:
    """What the UNet and both text encoders make of fixed inputs."""
    generator = torch.Generator().manual_seed(2)
    randn = functools.partial(torch.randn, generator=generator)
    added = {"text_embeds": randn(2, 32), "time_ids": randn(2, 6)}
    inputs = randn(2, 4, 8, 8), torch.tensor([10, 900]), randn(2, 77, 64)
    words = pipeline.tokenizer("a cat", return_tensors="pt").input_ids
    with torch.no_grad():
        first = pipeline.text_encoder(words, output_hidden_states=True)
        second = pipeline.text_encoder_2(words, output_hidden_states=True)
        unet = pipeline.unet(*inputs, added_cond_kwargs=added).sample
    return [unet, first.hidden_states[-2], second.hidden_states[-2], second.text_embeds]


@pytest.mark.parametrize("text", [False, True], ids=["unet", "text encoders too"])
@pytest.mark.parametrize("alpha", [None, 32, 1.5])
def test_diffusers_opens_both_files_as_what_was_trained(
    tmp_path: Path, alpha: float | None, text: bool
) -> None:
    pipeline = tiny()
    base = predictions(pipeline)
    models = {part: getattr(pipeline, part) for part in (PARTS if text else PARTS[:1])}
    adapt([*models.values()], 4, alpha)
    trained = predictions(pipeline)
    for before, after, changed in zip(base, trained, [True, text, text, text], strict=True):
        assert (not torch.allclose(before, after, atol=1e-3)) == changed
    assert write(tmp_path, models) == [LORA_FILE, KOHYA_FILE]

    for name in (None, LORA_FILE, KOHYA_FILE):  # by default, the first
        opened = tiny()
        opened.load_lora_weights(tmp_path, **({"weight_name": name} if name else {}))
        for found, expected in zip(predictions(opened), trained, strict=True):
            torch.testing.assert_close(found, expected)

    kohya = load_file(tmp_path / KOHYA_FILE)
    modules = {name.split(".")[0] for name in kohya}
    assert len(kohya) == 3 * len(modules)
    assert {kohya[f"{name}.alpha"].item() for name in modules} == {4 if alpha is None else alpha}


def attention_blocks_of_the_original() -> Iterator[tuple[str, int]]:
    """SDXL's UNet as its authors' code builds it: name and depth of each block with attention, in
    the order in which they are run."""
    depths = (0, 2, 10)
    index = 1  # behind the first convolution
    for level, depth in enumerate(depths):
        for _ in range(2):  # residual blocks
            if depth:
                yield f"input_blocks_{index}_1", depth
            index += 1
        if level < 2:
            index += 1  # halving is a block of its own
    yield "middle_block_1", depths[-1]
    index = 0
    for depth in reversed(depths):
        for _ in range(3):  # doubling is a part of the last one
            if depth:
                yield f"output_blocks_{index}_1", depth
            index += 1


def test_every_module_of_the_real_unet_has_its_original_name() -> None:
    with torch.device("meta"):
        unet = sdxl_unet()
        add_lora(SimpleNamespace(lora_rank=4, lora_alpha=32), SDXL, unet)  # type: ignore[arg-type]
    sides = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    blocks = [block for side in sides for block in getattr(side, "attentions", [])]
    expected: dict[str, Tensor] = {}
    for (name, depth), block in zip(attention_blocks_of_the_original(), blocks, strict=True):
        assert len(block.transformer_blocks) == depth
        for i, layer in enumerate(block.transformer_blocks):
            for kind in ("attn1", "attn2"):
                attention = getattr(layer, kind)
                for to, part in (
                    ("q", attention.to_q), ("k", attention.to_k), ("v", attention.to_v),
                    ("out_0", attention.to_out[0]),
                ):  # fmt: skip
                    key = f"lora_unet_{name}_transformer_blocks_{i}_{kind}_to_{to}"
                    expected[f"{key}.lora_down.weight"] = part.lora_A["default"].weight
                    expected[f"{key}.lora_up.weight"] = part.lora_B["default"].weight
    assert len(expected) == 2 * 560
    found = to_kohya(
        SDXL, "unet", unet, adapters_of(SDXL, "unet", unet, unet.state_dict(keep_vars=True))
    )
    alphas = {f"{name.split('.')[0]}.alpha" for name in expected}
    assert found.keys() == expected.keys() | alphas
    assert all(found[name] is value for name, value in expected.items())
    assert {found[name].item() for name in alphas} == {32}
    # Names that published SDXL LoRAs have.
    for name in (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_k",
        "lora_unet_middle_block_1_transformer_blocks_9_attn1_to_out_0",
        "lora_unet_output_blocks_0_1_transformer_blocks_9_attn2_to_v",
        "lora_unet_output_blocks_5_1_transformer_blocks_1_attn2_to_out_0",
    ):
        assert f"{name}.lora_up.weight" in found


def test_every_module_of_the_real_text_encoders_has_its_original_name(tmp_path: Path) -> None:
    with torch.device("meta"):
        unet, encoders = tiny().unet, sdxl_text_encoders()
        add_lora(SimpleNamespace(lora_rank=4, lora_alpha=None), SDXL, unet, encoders)  # type: ignore[arg-type]
    # SDXL reads the first one's states before its last layer, which therefore learns nothing.
    for i, layers in ((1, 11), (2, 32)):
        part, model = PARTS[i], encoders[i - 1]
        found = to_kohya(SDXL, part, model, adapters_of(SDXL, part, model, None))
        assert found.keys() == {
            f"lora_te{i}_text_model_encoder_layers_{layer}_self_attn_{to}_proj.{end}"
            for layer in range(layers)
            for to in ("q", "k", "v", "out")
            for end in ("lora_down.weight", "lora_up.weight", "alpha")
        }


def test_a_module_without_an_original_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"down_blocks\.0\.resnets\.0\.conv1 is in no attention"):
        original_name("down_blocks.0.resnets.0.conv1", 2)


def test_metadata_and_names_are_those_of_older_versions(tmp_path: Path) -> None:
    pipeline = tiny()
    models = {part: getattr(pipeline, part) for part in PARTS}
    adapt([*models.values()], 4, 8)
    write(tmp_path, models)
    with safe_open(tmp_path / LORA_FILE, "pt") as file:
        names, metadata = [*file.keys()], file.metadata()
    assert metadata.keys() == {"format", "lora_adapter_metadata"}
    settings = json.loads(metadata["lora_adapter_metadata"])
    assert {name.split(".", 1)[1] for name in settings} <= PEFT_0_14
    for part in PARTS:
        assert (settings[f"{part}.r"], settings[f"{part}.lora_alpha"]) == (4, 8)
        assert settings[f"{part}.rank_pattern"] == {}  # which diffusers 0.34 reads unasked
    assert settings["text_encoder.layers_to_transform"] == [0, 1]
    for part in PARTS[1:]:
        own = [name for name in names if name.startswith(f"{part}.")]
        assert own
        assert all(name.startswith(f"{part}.text_model.encoder.") for name in own)
    with safe_open(tmp_path / KOHYA_FILE, "pt") as file:
        assert file.metadata()["ss_base_model_version"].startswith("sdxl_")


WRITE = """
import os, sys
from pathlib import Path
from types import SimpleNamespace
from trainer.export import write_lora
from trainer.families.sdxl import SDXL
from trainer.lora import add_lora
from toy.tiny import tiny_sdxl
os.umask(0o027)
pipeline = tiny_sdxl((8, 16), (8, 8), sample_size=8, norm_num_groups=4)
names = ("unet", "text_encoder", "text_encoder_2")
models = {name: getattr(pipeline, name) for name in names}
args = SimpleNamespace(lora_rank=4, lora_alpha=None)
add_lora(args, SDXL, models["unet"], [models[name] for name in names[1:]])
for i in range(4):
    folder = Path(sys.argv[1], str(i))
    folder.mkdir()
    write_lora(folder, SDXL, models, dict.fromkeys(models))
"""


def test_equal_runs_give_equal_bytes_that_others_may_read(tmp_path: Path) -> None:
    path = os.pathsep.join(str(ROOT / name) for name in ("", "kernels", "examples"))
    processes = []
    for seed in "01":
        (tmp_path / seed).mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path}
        command = [sys.executable, "-c", WRITE, str(tmp_path / seed)]
        processes.append(subprocess.Popen(command, env=environment))
    assert [process.wait() for process in processes] == [0, 0]
    assert {path.name for path in tmp_path.glob("*/*/*")} == {LORA_FILE, KOHYA_FILE}
    for name in (LORA_FILE, KOHYA_FILE):
        written = [*tmp_path.glob(f"*/*/{name}")]
        assert len(written) == 8
        assert len({path.read_bytes() for path in written}) == 1
        assert {path.stat().st_mode & 0o777 for path in written} == {0o640}


def test_a_full_disk_leaves_the_files_that_were_there(tmp_path: Path) -> None:
    unet = tiny().unet
    adapt([unet])
    write(tmp_path, {"unet": unet})
    whole = [(tmp_path / name).read_bytes() for name in (LORA_FILE, KOHYA_FILE)]
    adapted = unet.state_dict()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))  # as a full disk
        twice = {name: 2 * value for name, value in adapted.items()}
        with pytest.raises(OSError, match="File too large"):
            write_lora(tmp_path, SDXL, {"unet": unet}, {"unet": twice})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert [(tmp_path / name).read_bytes() for name in (LORA_FILE, KOHYA_FILE)] == whole
    assert len([*tmp_path.iterdir()]) == 2
