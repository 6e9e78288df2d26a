"""Knows how to build an SDXL-format pipeline, tokenizers included, from configuration alone."""

from __future__ import annotations

import argparse

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
TEXT_WIDTH, TIME_WIDTH = 32, 8


def byte_symbols() -> list[str]:
    """The 256 printable stand-ins for the bytes 0-255 that CLIP's byte-level BPE is defined on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable}
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


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """A tiny CLIP text model whose special tokens are the tokenizer's own."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        # With 2 here, CLIP would pool at the largest id instead of at the end of the text.
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_attention_heads=2,
        num_hidden_layers=3,
        projection_dim=TEXT_WIDTH,
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
    vae = AutoencoderKL(
        sample_size=sample_size * 2 ** (len(vae_channels) - 1),
        block_out_channels=vae_channels,
        down_block_types=("DownEncoderBlock2D",) * len(vae_channels),
        up_block_types=("UpDecoderBlock2D",) * len(vae_channels),
        latent_channels=4,
        mid_block_add_attention=False,
        norm_num_groups=norm_num_groups,
    )
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type=prediction_type,
    )
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(config),
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer=tokenizer,
        tokenizer_2=byte_tokenizer(),
        unet=unet,
        scheduler=scheduler,
        add_watermarker=False,
    )


def main(argv: list[str] | None = None) -> None:
    """Save a tiny pipeline from the command line."""
    parser = argparse.ArgumentParser(
        description="Save a small SDXL-format pipeline with random weights, built offline."
    )
    parser.add_argument("output_dir", help="folder that from_pretrained will open")
    parser.add_argument(
        "--prediction_type", choices=["epsilon", "v_prediction"], default="epsilon",
        help="what the UNet predicts, written into the scheduler's configuration",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    args = parser.parse_args(argv)
    pipeline = tiny_sdxl(prediction_type=args.prediction_type, seed=args.seed)
    pipeline.save_pretrained(args.output_dir)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        print(f"{name}: {getattr(pipeline, name).num_parameters():,} parameters")


if __name__ == "__main__":
    main()
