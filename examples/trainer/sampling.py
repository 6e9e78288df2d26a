"""Pictures of the same prompts from the same noise, by one model after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    SchedulerMixin,
)
from PIL import Image
from tqdm.auto import tqdm

from trainer.evaluate import evaluating
from trainer.families.family import Encoders, Family, assemble, text_parts
from trainer.families.vae import decode_latents


class PromptSampler:
    """Samples the same prompts from the same noise, whatever the denoiser has become.

    Prompts are embedded here, once, and wait on the CPU, so that the text encoders may be freed;
    `load_vae` is called each time, and what it returns, made fp32, is let go of afterwards.
    `autocast` holds for the denoiser alone. Prompt number i is sampled from seed + i.
    """

    def __init__(
        self,
        family: Family,
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
        self.family, self.prompts, self.device, self.seed = family, list(prompts), device, seed
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
        parts = text_parts(self.family, Encoders(None, self.tokenizers, [*text_encoders]))
        pipeline = assemble(self.family, **parts)
        guided = self.settings["guidance_scale"] > 1
        return [
            {
                name: tensor.cpu()
                for name, tensor in self.family.embed_prompt(
                    pipeline, prompt, self.device, guided
                ).items()
            }
            for prompt in self.prompts
        ]

    def sample(
        self,
        denoiser: Any,
        scheduler: SchedulerMixin | Mapping[str, Any],
        text_encoders: Sequence[Any] = (),
        applied: Callable[[Any], AbstractContextManager[Any]] = nullcontext,
    ) -> list[Image.Image]:
        """A picture of each prompt, which text encoders embed anew where they come: if they learn.

        `applied` gets the pipeline that samples and holds meanwhile, as fastpref.guidance's does.

        Of a scheduler's config alone the family's own sampler is made; a scheduler is used as a
        copy, so that the steps set on it stay here.
        """
        if isinstance(scheduler, SchedulerMixin):
            scheduler = type(scheduler).from_config(scheduler.config)
        else:
            scheduler = self.family.process.sampler.from_config(scheduler)
        vae = self.load_vae().to(self.device).float()
        parts = {"vae": vae, self.family.denoiser: denoiser, "scheduler": scheduler}
        pipeline = assemble(self.family, **parts)
        pipeline.set_progress_bar_config(disable=True)
        pictures = []
        with evaluating(denoiser, *text_encoders), applied(pipeline):
            conditions = self.embed(text_encoders) if text_encoders else self.conditions
            for i, condition in enumerate(tqdm(conditions, desc="sampling", leave=False)):
                embeds = {k: v.to(self.device, denoiser.dtype) for k, v in condition.items()}
                generator = torch.Generator().manual_seed(self.seed + i)  # alike on every device
                with self.autocast():
                    latents = pipeline(
                        **embeds, **self.settings, generator=generator, output_type="latent"
                    ).images
                pixels = decode_latents(vae, latents.float())
                pictures += pipeline.image_processor.postprocess(pixels, output_type="pil")
        del pipeline, vae
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # for the training step that comes next
        return pictures
