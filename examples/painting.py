"""Knows how the same prompts are painted by one UNet after another, and laid out side by side."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    SchedulerMixin,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm

from curves import written_whole
from heldout import evaluating
from sdxl import Encoders

MARGIN = 8  # pixels between the parts of a grid
LABEL_WIDTH = 220


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file: one a line, empty lines left out."""
    if not path.is_file():
        raise ValueError(f"{path} is no file; need a text file with one prompt a line")
    prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise ValueError(f"{path} holds no prompt; need one a line")
    return prompts


class Painter:
    """Paints the same prompts from the same noise, whatever the UNet has become.

    Prompts are embedded here, once, and wait on the CPU, so that the text encoders may be freed;
    `load_vae` is called for each painting, and what it returns, made fp32, is let go of afterwards.
    `autocast` holds for the UNet alone. Prompt number i is painted from seed + i.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        encoders: Encoders,
        device: torch.device,
        height: int,
        width: int,
        steps: int,
        guidance_scale: float,
        seed: int,
        load_vae: Callable[[], AutoencoderKL],
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        if not prompts:
            raise ValueError("prompts is empty; need one or more")
        if height % 8 or width % 8 or min(height, width, steps) < 1:
            raise ValueError(
                f"height is {height}, width {width} and steps {steps}; need multiples of 8, and "
                "a step or more"
            )
        self.prompts, self.device, self.seed = list(prompts), device, seed
        self.load_vae, self.autocast = load_vae, autocast
        self.settings = {
            "height": height,
            "width": width,
            "num_inference_steps": steps,
            "guidance_scale": guidance_scale,
        }
        self.tokenizers = encoders.tokenizers
        self.conditions = self.embed(encoders.text_encoders)

    @torch.no_grad()
    def embed(self, text_encoders: Sequence[Any]) -> list[dict[str, torch.Tensor]]:
        """What the pipeline takes in the place of each prompt, and of the empty one that guidance
        leads away from; on the CPU."""
        pipeline = StableDiffusionXLPipeline(
            None, *text_encoders, *self.tokenizers, unet=None, scheduler=None, add_watermarker=False
        )
        names = ("", "negative_", "pooled_", "negative_pooled_")
        conditions = []
        for prompt in self.prompts:
            embedded = pipeline.encode_prompt(
                prompt,
                device=self.device,
                do_classifier_free_guidance=self.settings["guidance_scale"] > 1,
            )
            conditions.append(
                {
                    f"{name}prompt_embeds": tensor.cpu()
                    for name, tensor in zip(names, embedded, strict=True)
                    if tensor is not None
                }
            )
        return conditions

    def paint(
        self,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin | Mapping[str, Any],
        text_encoders: Sequence[Any] = (),
        applied: Callable[[Any], AbstractContextManager[Any]] = nullcontext,
    ) -> list[Image.Image]:
        """A picture of each prompt, which text encoders embed anew where they come: if they learn.

        `applied` gets the pipeline that paints and holds meanwhile, as fastpref.guidance's does.

        Of a scheduler's config alone SDXL's own sampler is made; a scheduler is used as a copy, so
        that the steps set on it stay here.
        """
        if isinstance(scheduler, SchedulerMixin):
            scheduler = type(scheduler).from_config(scheduler.config)
        else:
            scheduler = EulerDiscreteScheduler.from_config(scheduler)
        vae = self.load_vae().to(self.device).float()
        pipeline = StableDiffusionXLPipeline(
            vae, None, None, None, None, unet, scheduler, add_watermarker=False
        )
        pipeline.set_progress_bar_config(disable=True)
        pictures = []
        with evaluating(unet, *text_encoders), applied(pipeline):
            conditions = self.embed(text_encoders) if text_encoders else self.conditions
            for i, condition in enumerate(tqdm(conditions, desc="painting", leave=False)):
                embeds = {k: v.to(self.device, unet.dtype) for k, v in condition.items()}
                generator = torch.Generator().manual_seed(self.seed + i)  # alike on every device
                with self.autocast():
                    latents = pipeline(
                        **embeds, **self.settings, generator=generator, output_type="latent"
                    ).images
                pixels = vae.decode(latents.float() / vae.config.scaling_factor).sample
                pictures += pipeline.image_processor.postprocess(pixels, output_type="pil")
        del pipeline, vae
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # for the training step that comes next
        return pictures


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """The font that comes with matplotlib: Latin, Greek, Cyrillic and more."""
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)


def wrap(text: str, width: int, size: int) -> list[str]:
    """The text in lines of at most `width` pixels; a word longer than that is broken."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if font(size).getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font(size).getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def write_text(
    draw: ImageDraw.ImageDraw, text: str, box: tuple[int, int, int, int], size: int = 14
) -> None:
    """Write the text into the middle of the box: left, top, width, height; what is too long ends
    in dots."""
    left, top, width, height = box
    lines = wrap(text, width, size)
    most = max(1, height // (size + 4))
    if len(lines) > most:
        lines = lines[:most]
        while font(size).getlength(f"{lines[-1]}…") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] += "…"
    top += (height - len(lines) * (size + 4)) // 2
    for i, line in enumerate(lines):
        draw.text((left, top + i * (size + 4)), line, fill="black", font=font(size))


def resize(image: Image.Image, side: int) -> Image.Image:
    """The image, its longer side reduced to `side`, or enlarged by a whole number to show pixels
    as they are."""
    longer = max(image.size)
    if longer > side:
        width, height = (max(1, round(length * side / longer)) for length in image.size)
        return image.resize((width, height), Image.Resampling.LANCZOS)
    width, height = (length * (side // longer) for length in image.size)
    return image.resize((width, height), Image.Resampling.NEAREST)


def write_grid(
    columns: Mapping[str, Sequence[Image.Image]],
    prompts: Sequence[str],
    path: Path,
    side: int = 512,
    title: str = "",
) -> None:
    """Write a picture of all images, a row for each prompt and a column for each name.

    Images have at most `side` pixels a side in it.
    """
    for name, images in columns.items():
        if len(images) != len(prompts):
            raise ValueError(
                f"column {name!r} has {len(images)} images; need {len(prompts)}, one a prompt"
            )
    if not columns or not prompts:
        raise ValueError(f"{len(columns)} columns of {len(prompts)} prompts; need 1 or more each")
    rows = [
        [resize(image.convert("RGB"), side) for image in row]
        for row in zip(*columns.values(), strict=True)
    ]
    width = max(image.width for row in rows for image in row)
    lefts = [LABEL_WIDTH + 2 * MARGIN + i * (width + MARGIN) for i in range(len(columns))]
    whole = lefts[-1] + width + MARGIN
    titles = 18 * max(len(wrap(name, width, 14)) for name in columns)
    # Every row has room for three lines of its prompt.
    heights = [max(54, *(image.height for image in row)) for row in rows]
    top = MARGIN + (26 + MARGIN if title else 0)
    grid = Image.new(
        "RGB", (whole, top + titles + sum(heights) + MARGIN * (len(rows) + 1)), "white"
    )
    draw = ImageDraw.Draw(grid)
    if title:
        write_text(draw, title, (MARGIN, MARGIN, whole - 2 * MARGIN, 26), size=18)
    for left, name in zip(lefts, columns, strict=True):
        write_text(draw, name, (left, top, width, titles))
    top += titles + MARGIN
    for row, prompt, height in zip(rows, prompts, heights, strict=True):
        write_text(draw, prompt, (MARGIN, top, LABEL_WIDTH, height))
        for left, image in zip(lefts, row, strict=True):
            grid.paste(image, (left + (width - image.width) // 2, top))
        top += height + MARGIN
    write_image(grid, path)


def write_image(image: Image.Image, path: Path) -> None:
    """Write the image, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as aside:
        image.save(aside)
