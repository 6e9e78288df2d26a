"""The original layout: names, shapes and numbers of tensors of the published models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from peft import LoraConfig
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from toy.tiny import tiny_sd3, tiny_sd15, tiny_sdxl
from trainer.original_layout import to_original

SMALL: dict[str, Any] = {
    "unet_channels": (8, 16), "vae_channels": (8, 8), "sample_size": 8, "norm_num_groups": 4,
}  # fmt: skip
families = pytest.mark.parametrize("family", ["sd15", "sd2", "sdxl"])


def test_pipelines_without_original_names() -> None:
    with pytest.raises(ValueError, match="pipeline: StableDiffusion3Pipeline, need StableDiff"):
        to_original(tiny_sd3())
    for part, target in (("unet", "to_q"), ("text_encoder_2", "q_proj")):
        adapted = tiny_sdxl(**SMALL)
        adapted.components[part].add_adapter(LoraConfig(r=2, target_modules=[target]))
        with pytest.raises(ValueError, match=f"{part}: .*{target}.* is of an adapter; merge or"):
            to_original(adapted)
    pipeline = tiny_sd15(**SMALL)
    pipeline.vae = None
    with pytest.raises(ValueError, match="pipeline: its vae is None, need all parts"):
        to_original(pipeline)
    pipeline = tiny_sd15(**SMALL)
    pipeline.unet = UNet2DConditionModel.from_config(pipeline.unet.config, time_cond_proj_dim=4)
    with pytest.raises(ValueError, match=r"unet: time_embedding\.cond_proj\.weight has no name"):
        to_original(pipeline)


def published(family: str) -> Any:
    """A pipeline of the published configuration, without values."""
    pipeline: Any = tiny_sdxl(**SMALL) if family == "sdxl" else tiny_sd15(**SMALL)
    large = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    huge = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
    giant = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20}
    clip = CLIPTextConfig(**large, num_hidden_layers=12)
    text: dict[str, Any] = {"cross_attention_dim": 768}
    with torch.device("meta"):
        if family == "sd2":
            clip = CLIPTextConfig(**huge, num_hidden_layers=23, hidden_act="gelu")
            text = {"cross_attention_dim": 1024, "use_linear_projection": True}
            text["attention_head_dim"] = (5, 10, 20, 20)
        elif family == "sdxl":
            big_g = CLIPTextConfig(
                **giant, num_hidden_layers=32, hidden_act="gelu", projection_dim=1280
            )
            pipeline.text_encoder_2 = CLIPTextModelWithProjection(big_g)
            text = {
                "cross_attention_dim": 2048, "use_linear_projection": True,
                "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20),
                "transformer_layers_per_block": (1, 2, 10),
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
            }  # fmt: skip
        pipeline.text_encoder = CLIPTextModel(clip)
        pipeline.unet = UNet2DConditionModel(sample_size=64, **text)
        pipeline.vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
    return pipeline


# Numbers of tensors. The files that were published have more of what is no weight of a pipeline:
# 14 numbers of SD 1's noise schedule, OpenCLIP's logit_scale, and SD 2's unused last layer.
COUNTS = {
    "sd15": {"model.": 686, "first_stage_model.": 248, "cond_stage_model.transformer.": 197},
    "sd2": {"model.": 686, "first_stage_model.": 248, "cond_stage_model.model.": 23 * 12 + 4},
    "sdxl": {
        "model.": 1680, "first_stage_model.": 248, "conditioner.embedders.0.transformer.": 197,
        "conditioner.embedders.1.model.": 389,
    },
}  # fmt: skip
UNET = "model.diffusion_model."
SOME: dict[str, dict[str, tuple[int, ...]]] = {
    "sd15": {
        "input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
        "input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "input_blocks.8.1.transformer_blocks.0.attn2.to_k.weight": (1280, 768),
        "input_blocks.11.0.out_layers.3.weight": (1280, 1280, 3, 3),
        "middle_block.2.emb_layers.1.weight": (1280, 1280),
        "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.8.2.conv.weight": (640, 640, 3, 3),
        "output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
        "out.2.weight": (4, 320, 3, 3),
    },
    "sd2": {"input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024)},
    "sdxl": {
        "label_emb.0.0.weight": (1280, 2816),
        "input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "input_blocks.4.1.transformer_blocks.1.ff.net.0.proj.weight": (5120, 640),
        "input_blocks.8.1.transformer_blocks.9.norm3.bias": (1280,),
        "middle_block.1.transformer_blocks.9.attn2.to_v.weight": (1280, 2048),
        "output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.5.2.conv.weight": (640, 640, 3, 3),
        "output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
        "out.2.weight": (4, 320, 3, 3),
    },
}
OTHERS: dict[str, dict[str, tuple[int, ...]]] = {
    "sd15": {
        "cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 77),
        "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.bias": (3072,),
    },
    "sd2": {
        "cond_stage_model.model.token_embedding.weight": (49408, 1024),
        "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_bias": (3072,),
    },
    "sdxl": {
        "conditioner.embedders.1.model.positional_embedding": (77, 1280),
        "conditioner.embedders.1.model.text_projection": (1280, 1280),
        "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
        "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (1280,),
        "conditioner.embedders.1.model.ln_final.weight": (1280,),
    },
}
VAE = {
    "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
    "encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
    "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
    "encoder.mid.block_2.norm2.weight": (512,),
    "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
    "decoder.up.3.block.2.conv2.weight": (512, 512, 3, 3),
    "decoder.up.1.upsample.conv.weight": (256, 256, 3, 3),
    "decoder.norm_out.weight": (128,),
    "quant_conv.weight": (8, 8, 1, 1),
}


@families
def test_the_names_of_published_models(family: str) -> None:
    found = to_original(published(family))
    counts = {prefix: sum(n.startswith(prefix) for n in found) for prefix in COUNTS[family]}
    assert counts == COUNTS[family]
    assert len(found) == sum(counts.values())
    some = {UNET + name: shape for name, shape in SOME[family].items()}
    some |= {f"first_stage_model.{name}": shape for name, shape in VAE.items()}
    for name, shape in (some | OTHERS[family]).items():
        assert found[name].shape == shape, name


# The numbers of the parts that each layer of the UNet has, from the first layer to the last: 0 a
# block of convolutions or a halving, 1 attention, and behind it, or instead of it, a doubling.
LAYERS = {
    "sd15": {
        "input_blocks": "0 01 01 0 01 01 0 01 01 0 0 0",
        "output_blocks": "0 0 01 01 01 012 01 01 012 01 01 01",
    },
    "sdxl": {
        "input_blocks": "0 0 0 0 01 01 0 01 01",
        "output_blocks": "01 01 012 01 01 012 0 0 0",
    },
}
INSIDE = {"in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3"}


@pytest.mark.parametrize("family", list(LAYERS))
def test_the_layers_of_published_unets(family: str) -> None:
    found = [n.removeprefix(UNET) for n in to_original(published(family)) if n.startswith(UNET)]
    skips = set()
    for side, layers in LAYERS[family].items():
        for number, parts in enumerate(layers.split()):
            begin = f"{side}.{number}."
            names = [name.removeprefix(begin) for name in found if name.startswith(begin)]
            assert {name[0] for name in names} == set(parts), begin
            inside = {n.removeprefix("0.").rpartition(".")[0] for n in names if n[0] == "0"}
            if "0.skip_connection.weight" in names:
                inside.remove("skip_connection")
                skips.add(begin)
            first, halving = begin == "input_blocks.0.", "0.op.weight" in names
            assert inside == ({""} if first else {"op"} if halving else INSIDE)
            assert halving == (side == "input_blocks" and number in (3, 6, 9)), begin
        assert f"{side}.{number + 1}.0.in_layers.0.weight" not in found
    widening = {"input_blocks.4.", "input_blocks.7."}
    assert skips == {f"output_blocks.{i}." for i in range(number + 1)} | widening
    mid = {name.split(".")[1] for name in found if name.startswith("middle_block.")}
    assert mid == {"0", "1", "2"}


@families
def test_diffusers_maps_the_names_back(family: str) -> None:
    pipeline = published(family)
    found = to_original(pipeline)
    encoder, second = pipeline.text_encoder, pipeline.components.get("text_encoder_2")
    back: dict[str, dict[str, Any]] = {
        "unet": convert_ldm_unet_checkpoint(dict(found), pipeline.unet.config),
        "vae": convert_ldm_vae_checkpoint(dict(found), pipeline.vae.config),
        "text_encoder": convert_open_clip_checkpoint(encoder, found)
        if family == "sd2"
        else convert_ldm_clip_checkpoint(found),
    }
    if second:
        prefix = "conditioner.embedders.1.model."
        back["text_encoder_2"] = convert_open_clip_checkpoint(second, found, prefix)
    for part, state in back.items():
        shapes = {n.removeprefix("text_model."): v.shape for n, v in state.items()}
        shapes.pop("embeddings.position_ids", None)
        model = pipeline.components[part].state_dict()
        assert shapes == {n.removeprefix("text_model."): v.shape for n, v in model.items()}, part
