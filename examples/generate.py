"""The base model and what a run made of it, painted side by side on a file of prompts.

    python examples/generate.py --mixed_precision fp16 --prompts prompts.txt --output grid.png \\
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \\
        --trained sdxl-mapo

With --guidance a third column: both models at once, or the trained one led away from a worse one.
"""

from __future__ import annotations

import startup  # noqa: F401 - before torch

# isort: split
import argparse
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from PIL import Image

from flags import PipelineArguments
from guided import (
    HELP,
    TRAINED,
    Guidance,
    check_prediction,
    find_trained,
    load_unet,
    make_guidance,
    read_guidance,
    scheduler_config,
)
from lora_files import LORA_FILE
from painting import Painter, read_prompts, write_grid, write_image
from sdxl import DTYPES, Encoders
from trainer.config import Parser
from trainer.entry import one_line_errors


# fmt: off
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the flags; those of the trainer keep their names."""
    parser = Parser(
        PipelineArguments,
        description="Paint a file of prompts with the base model and with a trained one, from the "
        "same noise, side by side.",
    )
    flag = parser.add_argument
    flag("--cache_dir", help="where downloads are kept")
    flag("--trained", required=True, type=Path, metavar="PATH",
         help=f"what a run left: a folder with {LORA_FILE} or pipeline/, a pipeline, a UNet, or a "
         "LoRA's .safetensors file, kohya's too")
    flag("--prompts", required=True, type=Path, metavar="FILE", help="a text file, a prompt a line")
    flag("--output", default=Path("grid.png"), type=Path, metavar="FILE",
         help="the grid: a row for each prompt, columns base and trained, and guided if asked for")
    flag("--images_dir", type=Path, metavar="DIR", help="a folder for the single pictures too")
    flag("--num_inference_steps", type=int, default=30, metavar="N", help="steps of the sampler")
    flag("--guidance_scale", type=float, default=5.0, help="1 or less: no guidance")
    flag("--guidance", metavar="HOW", help=HELP)
    flag("--seed", type=int, default=0, help="of the first prompt's noise; the next has seed + 1")
    flag("--height", type=int, default=1024, help="of a picture, in pixels")
    flag("--width", type=int, default=1024, help="of a picture, in pixels")
    flag("--mixed_precision", choices=list(DTYPES),
         default="bf16" if torch.cuda.is_available() else "no",
         help="of UNet and text encoders; the VAE decodes in fp32")
    args = parser.parse_args(argv)
    if args.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("--mixed_precision is fp16 on a machine without a GPU; need no or bf16")
    if args.guidance is not None:
        with about("--guidance"):
            args.guidance = read_guidance(args.guidance)
            if args.guidance.path is not None and args.guidance_scale <= 1:
                raise ValueError("leads away from a model; need a --guidance_scale above 1 with it")
    return args
# fmt: on


@contextmanager
def about(flag: str) -> Iterator[None]:
    """Name the flag in a ValueError about its value."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{flag} {error}") from error


def load_base(args: argparse.Namespace, device: torch.device) -> StableDiffusionXLPipeline:
    """The base's pipeline, on `device`."""
    where = {"torch_dtype": DTYPES[args.mixed_precision], "cache_dir": args.cache_dir}
    parts = {}
    if args.pretrained_vae_model_name_or_path:
        parts["vae"] = AutoencoderKL.from_pretrained(
            args.pretrained_vae_model_name_or_path, **where
        )
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        args.pretrained_model_name_or_path, revision=args.revision, variant=args.variant,
        add_watermarker=False, **where, **parts,
    )  # fmt: skip
    return pipeline.to(device)


def install(pipeline: StableDiffusionXLPipeline, trained: Path) -> None:
    """Put what was trained into the pipeline, in the place of the base's UNet or upon it."""
    device, dtype = pipeline.unet.device, pipeline.unet.dtype
    if trained.is_file():
        folder, name = trained.parent, trained.name
        pipeline.load_lora_weights(folder, weight_name=name, adapter_name=TRAINED)
        return
    pipeline.unet = None  # so that there is never room needed for two
    pipeline.unet = load_unet(trained, device, dtype)
    config = scheduler_config(trained)
    if config is not None:  # a run may have been told another prediction type
        pipeline.scheduler = type(pipeline.scheduler).from_config(config)


def paint(
    args: argparse.Namespace,
    pipeline: StableDiffusionXLPipeline,
    prompts: list[str],
    guidance: Guidance | None = None,
) -> list[Image.Image]:
    """A picture of each prompt, by the pipeline as it is."""
    encoders = Encoders(
        pipeline.vae,
        [pipeline.tokenizer, pipeline.tokenizer_2],
        [pipeline.text_encoder, pipeline.text_encoder_2],
    )
    painter = Painter(
        prompts, encoders, pipeline.device, args.height, args.width, args.num_inference_steps,
        args.guidance_scale, args.seed, load_vae=lambda: pipeline.vae,
    )  # fmt: skip
    applied = guidance.applied if guidance is not None else nullcontext
    return painter.paint(pipeline.unet, pipeline.scheduler, applied=applied)


def main(args: argparse.Namespace) -> None:
    """Paint with the base, then with what was trained, and write the pictures."""
    prompts = read_prompts(args.prompts)
    trained = find_trained(args.trained)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = load_base(args, device)
    if args.guidance is not None:
        with about("--guidance"):
            check_prediction(pipeline, trained, args.guidance)
    pictures = {"base": paint(args, pipeline, prompts)}  # before a LoRA is there
    base = pipeline.unet if args.guidance is not None and not trained.is_file() else None
    install(pipeline, trained)
    pictures["trained"] = paint(args, pipeline, prompts)
    if args.guidance is not None:
        with about("--guidance"):
            guidance = make_guidance(args.guidance, pipeline, trained, base)
            with guidance.applied(pipeline):
                pass  # whether it can be
        pictures["guided"] = paint(args, pipeline, prompts, guidance)
    write_grid(pictures, prompts, args.output)
    if args.images_dir is not None:
        for name, images in pictures.items():
            for i, image in enumerate(images):
                write_image(image, args.images_dir / f"{i:03}-{name}.png")
    print(f"{args.output}: {len(prompts)} prompts, {', '.join(pictures)}; {trained}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
