"""The base model and what a run made of it, painted side by side on a file of prompts.

    python examples/generate.py --mixed_precision fp16 --prompts prompts.txt --output grid.png \\
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \\
        --trained sdxl-mapo
"""

from __future__ import annotations

import startup  # noqa: F401 - before torch

# isort: split
import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image

from lora_files import KOHYA_FILE, LORA_FILE
from painting import Painter, read_prompts, write_grid, write_image
from sdxl import DTYPES, Encoders, add_model_flags


# fmt: off
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the flags; those of the trainer keep their names."""
    parser = argparse.ArgumentParser(
        description="Paint a file of prompts with the base model and with a trained one, from the "
        "same noise, side by side.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    flag = parser.add_argument
    add_model_flags(flag)
    flag("--cache_dir", help="where downloads are kept")
    flag("--trained", required=True, type=Path, metavar="PATH",
         help=f"what a run left: a folder with {LORA_FILE} or pipeline/, a pipeline, a UNet, or a "
         "LoRA's .safetensors file, kohya's too")
    flag("--prompts", required=True, type=Path, metavar="FILE", help="a text file, a prompt a line")
    flag("--output", default=Path("grid.png"), type=Path, metavar="FILE",
         help="the grid: a row for each prompt, columns base and trained")
    flag("--images_dir", type=Path, metavar="DIR", help="a folder for the single pictures too")
    flag("--num_inference_steps", type=int, default=30, metavar="N", help="steps of the sampler")
    flag("--guidance_scale", type=float, default=5.0, help="1 or less: no guidance")
    flag("--seed", type=int, default=0, help="of the first prompt's noise; the next has seed + 1")
    flag("--height", type=int, default=1024, help="of a picture, in pixels")
    flag("--width", type=int, default=1024, help="of a picture, in pixels")
    flag("--mixed_precision", choices=list(DTYPES),
         default="bf16" if torch.cuda.is_available() else "no",
         help="of UNet and text encoders; the VAE decodes in fp32")
    args = parser.parse_args(argv)
    if args.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("--mixed_precision is fp16 on a machine without a GPU; need no or bf16")
    return args
# fmt: on


def find_trained(folder: Path) -> Path:
    """Where in a run's folder its LoRA lies (a file), or its UNet (a folder)."""
    for lora in (folder, folder / LORA_FILE, folder / KOHYA_FILE):
        if lora.is_file() and lora.suffix == ".safetensors":
            return lora
    for unet in (folder / "pipeline" / "unet", folder / "unet", folder):
        config = unet / "config.json"
        if config.is_file() and "UNet" in json.loads(config.read_text()).get("_class_name", ""):
            return unet
    found = ", ".join(sorted(path.name for path in folder.glob("*"))) or "nothing"
    raise ValueError(
        f"--trained {folder} holds {found}; need {LORA_FILE}, pipeline/ or a UNet, such as a run's "
        "--output_dir has at its end"
    )


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
        pipeline.load_lora_weights(trained.parent, weight_name=trained.name)
        return
    pipeline.unet = None  # so that there is never room needed for two
    pipeline.unet = UNet2DConditionModel.from_pretrained(trained, torch_dtype=dtype).to(device)
    scheduler = trained.parent / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():  # a run may have been told another prediction type
        kind = type(pipeline.scheduler)
        pipeline.scheduler = kind.from_config(json.loads(scheduler.read_text()))


def paint(
    args: argparse.Namespace, pipeline: StableDiffusionXLPipeline, prompts: list[str]
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
    return painter.paint(pipeline.unet, pipeline.scheduler)


def main(args: argparse.Namespace) -> None:
    """Paint with the base, then with what was trained, and write the pictures."""
    prompts = read_prompts(args.prompts)
    trained = find_trained(args.trained)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = load_base(args, device)
    pictures = {"base": paint(args, pipeline, prompts)}  # before a LoRA is there
    install(pipeline, trained)
    pictures["trained"] = paint(args, pipeline, prompts)
    write_grid(pictures, prompts, args.output)
    if args.images_dir is not None:
        for name, images in pictures.items():
            for i, image in enumerate(images):
                write_image(image, args.images_dir / f"{i:03}-{name}.png")
    print(f"{args.output}: {len(prompts)} prompts, base and {trained}")


if __name__ == "__main__":
    main(parse_args())
