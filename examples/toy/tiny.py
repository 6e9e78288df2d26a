"""Tiny SD 1.5, SDXL and SD3 pipelines, tokenizers included, built from configuration alone."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
TEXT_WIDTH, TIME_WIDTH = 32, 8
# SD3's second CLIP model is wider than its first, and its T5 wider than both together.
TEXT_WIDTH_2, T5_WIDTH = 48, 96
PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))


def byte_symbols() -> list[str]:
    """The 256 printable stand-ins for the bytes 0-255 that CLIP's byte-level BPE is defined on."""
    others = [byte for byte in range(256) if byte not in PRINTABLE]
    symbols = {byte: chr(byte) for byte in PRINTABLE}
    symbols.update({byte: chr(256 + i) for i, byte in enumerate(others)})
    return [symbols[byte] for byte in range(256)]


def byte_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer over 514 entries: bytes, bytes that end a word, start and end of text."""
    symbols = byte_symbols()
    entries = [*symbols, *(symbol + "</w>" for symbol in symbols), BOS, EOS]
    vocab = {entry: i for i, entry in enumerate(entries)}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)
    if len(tokenizer) != len(vocab):
        # transformers 4 ignores these names, 5 ignores the older ones; both do so silently.
        raise RuntimeError(
            f"the tokenizer has {len(tokenizer)} entries, need {len(vocab)}: transformers >= 5"
        )
    return tokenizer


def letter_tokenizer() -> T5TokenizerFast:
    """A T5 tokenizer whose entries are single characters of Latin-1; any other is `<unk>`."""
    # Falling back to bytes would be better, but is lost when transformers loads a T5 tokenizer.
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\N{LOWER ONE EIGHTH BLOCK}", -2.0)]
    vocab = special + [(chr(code), -4.0) for code in PRINTABLE]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=256)


def text_config(tokenizer: CLIPTokenizer, width: int = TEXT_WIDTH) -> CLIPTextConfig:
    """A tiny CLIP text model whose special tokens are the tokenizer's own."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        # With 2 here, CLIP would pool at the largest id instead of at the end of the text.
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=2,
        num_hidden_layers=3,
        projection_dim=width,
    )


def t5_config(tokenizer: T5TokenizerFast) -> T5Config:
    """A tiny T5 encoder, of the kind (1.1) that SD3 has."""
    return T5Config(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        d_model=T5_WIDTH,
        d_kv=16,
        d_ff=T5_WIDTH,
        num_heads=2,
        num_layers=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )


def tiny_vae(
    channels: tuple[int, ...], sample_size: int, norm_num_groups: int, **config: Any
) -> AutoencoderKL:
    """A VAE of one layer per block, for latents of side `sample_size`."""
    return AutoencoderKL(
        sample_size=sample_size * 2 ** (len(channels) - 1),
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        norm_num_groups=norm_num_groups,
        **config,
    )


def noise_schedule(prediction_type: str) -> DDPMScheduler:
    """The noise schedule of SD 1.5, 2 and XL."""
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type=prediction_type,
    )


def tiny_sd15(
    unet_channels: tuple[int, ...] = (32, 64, 96),
    vae_channels: tuple[int, ...] = (16, 32),
    sample_size: int = 32,
    prediction_type: str = "epsilon",
    norm_num_groups: int = 8,
    seed: int = 0,
) -> StableDiffusionPipeline:
    """Build a pipeline with SD 1.5's parts, wiring and noise schedule, and random weights.

    The arguments mean what they mean in `tiny_sdxl`. The UNet has no attention at its coarsest
    level, and projects into and out of attention by convolutions, as SD 1.5's does.
    """
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    finer = len(unet_channels) - 1
    unet = UNet2DConditionModel(
        sample_size=sample_size,
        block_out_channels=unet_channels,
        layers_per_block=1,
        down_block_types=(*["CrossAttnDownBlock2D"] * finer, "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * finer),
        attention_head_dim=2,  # which in this class is the number of heads
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=norm_num_groups,
    )
    return StableDiffusionPipeline(
        vae=tiny_vae(vae_channels, sample_size, norm_num_groups, latent_channels=4),
        text_encoder=CLIPTextModel(text_config(tokenizer)),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=noise_schedule(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_sdxl(
    unet_channels: tuple[int, ...] = (32, 64, 96),
    vae_channels: tuple[int, ...] = (16, 32),
    sample_size: int = 32,
    prediction_type: str = "epsilon",
    norm_num_groups: int = 8,
    seed: int = 0,
) -> StableDiffusionXLPipeline:
    """Build a pipeline with SDXL's parts, wiring and noise schedule, and random weights.

    `len(vae_channels) - 1` halvings lie between an image and its latents; `sample_size` is the side
    of the latents. The UNet has no attention at its finest level, as SDXL's has none.
    """
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    config = text_config(tokenizer)
    coarser = len(unet_channels) - 1
    unet = UNet2DConditionModel(
        sample_size=sample_size,
        block_out_channels=unet_channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * coarser),
        up_block_types=(*["CrossAttnUpBlock2D"] * coarser, "UpBlock2D"),
        transformer_layers_per_block=1,
        attention_head_dim=tuple(max(1, channels // 32) for channels in unet_channels),
        cross_attention_dim=2 * TEXT_WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=6 * TIME_WIDTH + TEXT_WIDTH,
        norm_num_groups=norm_num_groups,
    )
    no_attention = {"latent_channels": 4, "mid_block_add_attention": False}
    return StableDiffusionXLPipeline(
        vae=tiny_vae(vae_channels, sample_size, norm_num_groups, **no_attention),
        text_encoder=CLIPTextModel(config),
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer=tokenizer,
        tokenizer_2=byte_tokenizer(),
        unet=unet,
        scheduler=noise_schedule(prediction_type),
        add_watermarker=False,
    )


def tiny_sd3(
    heads: int = 2,
    head_dim: int = 16,
    layers: int = 2,
    vae_channels: tuple[int, ...] = (16, 32),
    latent_channels: int = 16,
    sample_size: int = 32,
    qk_norm: str | None = None,
    dual_attention_layers: tuple[int, ...] = (),
    norm_num_groups: int = 8,
    seed: int = 0,
) -> StableDiffusion3Pipeline:
    """Build a pipeline with SD3's parts, wiring and flow-matching schedule, and random weights.

    SD 3.5 has `qk_norm="rms_norm"`, and its medium size two attentions in some layers, which
    `dual_attention_layers` numbers. The other arguments mean what they mean in `tiny_sdxl`.
    """
    torch.manual_seed(seed)
    tokenizer, tokenizer_3 = byte_tokenizer(), letter_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=sample_size,
        patch_size=2,
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_layers=layers,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        caption_projection_dim=heads * head_dim,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=TEXT_WIDTH + TEXT_WIDTH_2,
        pos_embed_max_size=sample_size,  # twice the patches along a side, for larger pictures
        dual_attention_layers=dual_attention_layers,
        qk_norm=qk_norm,
    )
    latents = {"latent_channels": latent_channels, "scaling_factor": 1.5305, "shift_factor": 0.0609}
    no_convs = {"use_quant_conv": False, "use_post_quant_conv": False}
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(vae_channels, sample_size, norm_num_groups, **latents, **no_convs),
        text_encoder=CLIPTextModelWithProjection(text_config(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer, TEXT_WIDTH_2)),
        tokenizer_2=byte_tokenizer(),
        text_encoder_3=T5EncoderModel(t5_config(tokenizer_3)).eval(),  # alone, it has dropout
        tokenizer_3=tokenizer_3,
    )


def main(argv: list[str] | None = None) -> None:
    """Save a tiny pipeline from the command line."""
    parser = argparse.ArgumentParser(
        description="Save a small pipeline with random weights, built offline."
    )
    parser.add_argument("output_dir", help="folder that from_pretrained will open")
    parser.add_argument(
        "--family", choices=["sdxl", "sd15", "sd3"], default="sdxl",
        help="whose parts and wiring the pipeline has (SD 2.x: sd15 with v_prediction)",
    )  # fmt: skip
    parser.add_argument(
        "--prediction_type", choices=["epsilon", "v_prediction"],
        help="what the UNet predicts, written into the scheduler's configuration; SD3 predicts "
        "the flow's velocity, and has no choice (default: epsilon)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    args = parser.parse_args(argv)
    if args.family == "sd3":
        if args.prediction_type:
            parser.error(f"argument --prediction_type: {args.prediction_type}, but sd3 has none")
        pipeline: Any = tiny_sd3(seed=args.seed)
    else:
        build = {"sdxl": tiny_sdxl, "sd15": tiny_sd15}[args.family]
        pipeline = build(prediction_type=args.prediction_type or "epsilon", seed=args.seed)
    pipeline.save_pretrained(args.output_dir)
    for name, part in pipeline.components.items():
        if hasattr(part, "num_parameters"):
            print(f"{name}: {part.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
