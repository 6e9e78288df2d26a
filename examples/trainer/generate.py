"""The base model and what a run made of it, painted side by side on a file of prompts.

    python examples/generate.py --mixed_precision fp16 --prompts prompts.txt --output grid.png \\
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \\
        --trained sdxl-mapo

With --guidance a third column: both models at once, or the trained one led away from a worse one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from safetensors import safe_open

from trainer.args import PipelineArguments, read_prompts
from trainer.config import Parser
from trainer.export import LORA_FILE
from trainer.families.all import family_of
from trainer.families.family import DTYPES, Family, denoiser_of, encoders_of
from trainer.families.loading import load_pipeline, read_config, where
from trainer.families.vae import check_vae
from trainer.files import make_folder
from trainer.guidance import (
    HELP,
    TRAINED,
    Guidance,
    check_prediction,
    find_trained,
    load_trained,
    make_guidance,
    read_guidance,
    scheduler_config,
)
from trainer.plots import write_grid, write_image
from trainer.sampling import PromptSampler
from trainer.single_file import load_single_file, load_single_vae
from trainer.unpacked import config_of, family_of_file, is_file


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
         help=f"what a run left: a folder with {LORA_FILE} or pipeline/, a pipeline, its denoiser, "
         "or a LoRA's .safetensors file, kohya's too")
    flag("--prompts", required=True, type=Path, metavar="FILE", help="a text file, a prompt a line")
    flag("--output", default=Path("grid.png"), type=Path, metavar="FILE",
         help="the grid: a row for each prompt, columns base and trained, and guided if asked for")
    flag("--images_dir", type=Path, metavar="DIR", help="a folder for the single pictures too")
    flag("--num_inference_steps", type=int, default=30, metavar="N", help="steps of the sampler")
    flag("--guidance_scale", type=float, default=5.0, help="1 or less: no guidance")
    flag("--guidance", metavar="HOW", help=HELP)
    flag("--seed", type=int, default=0, help="of the first prompt's noise; the next has seed + 1")
    flag("--height", type=int, help="of a picture, in pixels [the family's: 1024, SD1.5 512]")
    flag("--width", type=int, help="of a picture, in pixels [as --height]")
    flag("--mixed_precision", choices=list(DTYPES),
         default="bf16" if torch.cuda.is_available() else "no",
         help="of denoiser and text encoders; the VAE decodes in fp32")
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


def load_base(args: argparse.Namespace, device: torch.device) -> tuple[Family, Any]:
    """The base's family and pipeline, on `device`."""
    source = args.pretrained_model_name_or_path
    dtype, parts = DTYPES[args.mixed_precision], {}
    with about(f"--pretrained_model_name_or_path {source}:"):
        if is_file(source):
            family = family_of_file(Path(source))
        else:
            family = family_of(read_config(DiffusionPipeline, source, **where(args)))
    config = config_of(args, family) or source
    vae = args.pretrained_vae_model_name_or_path
    if is_file(vae):
        with about(f"--pretrained_vae_model_name_or_path {vae}:"):
            parts["vae"] = load_single_vae(vae, config, dtype)
    elif vae:
        parts["vae"] = AutoencoderKL.from_pretrained(
            vae, torch_dtype=dtype, cache_dir=args.cache_dir
        )
    if is_file(source):
        with about(f"--pretrained_model_name_or_path {source}:"):
            pipeline = load_single_file(family.pipeline, source, config, dtype, **parts)
    else:
        pipeline = load_pipeline(args, family, torch_dtype=dtype, **parts)
    with about(f"{source}:"):
        check_vae({**pipeline.vae.config, "_class_name": type(pipeline.vae).__name__})
    if args.prediction_type:
        pipeline.scheduler = type(pipeline.scheduler).from_config(
            pipeline.scheduler.config, prediction_type=args.prediction_type
        )
    return family, pipeline.to(device)


def install_lora(family: Family, pipeline: Any, path: Path) -> None:
    """Load a LoRA, of whose layers the denoiser has to have some."""
    try:
        pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=TRAINED)
    except RuntimeError as error:  # of another width
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--trained {path} does not fit the {family.denoiser}: {reason}"
        ) from error
    with safe_open(path, "pt") as file:
        names = [*file.keys()]
    of_text = all(name.startswith(("text_encoder", "lora_te")) for name in names)
    if not of_text and TRAINED not in getattr(denoiser_of(family, pipeline), "peft_config", {}):
        raise ValueError(f"--trained {path} holds no layer of this base's {family.denoiser}; need "
                         f"a LoRA of a {family.pipeline.__name__}")  # fmt: skip


def check_fits(family: Family, base: Any, trained: Path) -> None:
    """Raise a ValueError for a trained denoiser of another kind than the base's."""
    found = {**base.config, "_class_name": type(base).__name__}
    wanted = json.loads((trained / "config.json").read_text())
    for name in ("_class_name", "in_channels", "cross_attention_dim", "joint_attention_dim",
                 "addition_embed_type"):  # fmt: skip
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"--trained {trained} has {name} {wanted.get(name)!r}, and the base "
                f"{found.get(name)!r}; need the base that it was trained from"
            )


def install(args: argparse.Namespace, family: Family, pipeline: Any, trained: Path) -> None:
    """Put what was trained into the pipeline, in the place of the base's denoiser or upon it."""
    if trained.is_file():
        install_lora(family, pipeline, trained)
        return
    base = denoiser_of(family, pipeline)
    device, dtype = base.device, base.dtype
    check_fits(family, base, trained)
    del base
    setattr(pipeline, family.denoiser, None)  # two at once would take twice the memory
    setattr(pipeline, family.denoiser, load_trained(family, trained, device, dtype))
    config = scheduler_config(trained)
    if config is not None and not args.prediction_type:  # a run may have been told another type
        pipeline.scheduler = type(pipeline.scheduler).from_config(config)


def sample(
    args: argparse.Namespace,
    family: Family,
    pipeline: Any,
    prompts: list[str],
    guidance: Guidance | None = None,
) -> list[Image.Image]:
    """A picture of each prompt, by the pipeline as it is."""
    sampler = PromptSampler(
        family, prompts, encoders_of(family, pipeline), pipeline.device,
        args.height or family.resolution, args.width or family.resolution,
        args.num_inference_steps, args.guidance_scale, args.seed, load_vae=lambda: pipeline.vae,
    )  # fmt: skip
    applied = guidance.applied if guidance is not None else nullcontext
    return sampler.sample(denoiser_of(family, pipeline), pipeline.scheduler, applied=applied)


def main(args: argparse.Namespace) -> None:
    """Paint with the base, then with what was trained, and write the pictures."""
    prompts = read_prompts(args.prompts)
    trained = find_trained(args.trained)
    make_folder("--output", args.output.absolute().parent)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    family, pipeline = load_base(args, device)
    if args.guidance is not None:
        with about("--guidance"):
            check_prediction(pipeline, trained, args.guidance)
    pictures = {"base": sample(args, family, pipeline, prompts)}  # before a LoRA is there
    full = not trained.is_file()
    base = denoiser_of(family, pipeline) if args.guidance is not None and full else None
    install(args, family, pipeline, trained)
    pictures["trained"] = sample(args, family, pipeline, prompts)
    if args.guidance is not None:
        with about("--guidance"):
            guidance = make_guidance(args.guidance, family, pipeline, trained, base)
            with guidance.applied(pipeline):
                pass  # whether it can be
        pictures["guided"] = sample(args, family, pipeline, prompts, guidance)
    write_grid(pictures, prompts, args.output)
    if args.images_dir is not None:
        for name, images in pictures.items():
            for i, image in enumerate(images):
                write_image(image, args.images_dir / f"{i:03}-{name}.png")
    print(f"{args.output}: {len(prompts)} prompts, {', '.join(pictures)}; {trained}")
