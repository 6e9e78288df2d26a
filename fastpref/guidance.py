"""Guidance by two models while sampling: annealed importance guidance, which moves from the base
model to the tuned one, and negative-preference guidance, which leads away from a worse one.

::

    with fastpref.guidance.AnnealedGuidance("linear").applied(pipe):  # pipe has the tuned LoRA
        images = pipe(prompt).images
    with fastpref.guidance.NegativePreferenceGuidance("npo").applied(pipe):  # a second LoRA
        images = pipe(prompt).images

diffusers' guiders (`diffusers.guiders`) are for its modular pipelines alone; the others, such as
StableDiffusionXLPipeline, do classifier-free guidance themselves. So what is guided here is the
call of their denoiser, `pipe.unet` or `pipe.transformer`. Nothing of diffusers is imported. (A
modular pipeline that makes images of text can be annealed too, though not led away.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .denoiser import (
    Call,
    Other,
    Place,
    check_number,
    check_other,
    guided,
    halves,
    prediction,
    with_prediction,
)

SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "base": lambda x, p: 0.0,
    "draft": lambda x, p: 1.0,
    "linear": lambda x, p: x,
    "power": lambda x, p: x**p,
    "step": lambda x, p: float(x >= p),
}
DEFAULT_P = {"power": 2.0, "step": 0.6}


class AnnealedGuidance:
    """Annealed importance guidance: the base model in the first steps, the tuned one in the last.

    At step i of n, i = 0 .. n - 1, with both predictions after their own classifier-free guidance::

        pred = (1 - w) * pred_base + w * pred_tuned        w = f(i / n)

    Composition is decided early and by the base, with its diversity; the tuned model has the
    details. i / n never reaches 1, and so w does not under "linear" and "power". Classifier-free
    guidance is linear in the predictions, so what is blended here is the denoiser's output, rows of
    both prompts at once, before the pipeline's guidance: the result is the same. guidance_rescale
    is not linear. It acts on the blend, once; the published code has none.

    Args:
        schedule: f, by name or as a function of i / n that returns a finite number::

                "base" 0    "draft" 1    "linear" x    "power" x^p    "step" 1 if x >= p else 0

        p: of "power", above 0, published with 2 (the default) and 4; or of "step", 0.6.
        base: the other model, by default the pipeline's own with all adapters off; adapters' names,
            where only these are to be on, or a mapping of names to weights; or a second model.

    A step needs both models, but only one where w is 0 or 1. Adapters may change inside of the
    `with`; the scheduler may not. Steps are counted on the host, in
    calls of the pipeline's scheduler (Heun's method and others of second order make two a step);
    n is the number that a pipeline does of them, which `strength` or `denoising_end` make fewer.

    Raises: TypeError, ValueError.

    Source: Jena et al., "Elucidating Optimal Reward-Diversity Tradeoffs in Text-to-Image Diffusion
    Models", arXiv:2409.06493, and its code, anneal_sdxl.py and megatron_sdxl_draftp_model.py. On
    purpose unlike its code for SD1, which decodes the tuned model's x0 instead of the blended one.
    """

    def __init__(
        self,
        schedule: str | Callable[[float], float] = "linear",
        p: float | None = None,
        *,
        base: Other | None = None,
    ) -> None:
        self.base = check_other("base", {} if base is None else base)
        self.schedule, self.p = schedule, p
        if callable(schedule):
            if p is not None:
                raise ValueError(f"p is {p}, but schedule is a function; need no p with it")
            return
        if not isinstance(schedule, str) or schedule not in SCHEDULES:
            names = ", ".join(SCHEDULES)
            raise ValueError(f"schedule is {schedule!r}; need one of {names}, or a function")
        if p is None:
            self.p = DEFAULT_P.get(schedule)
        elif schedule not in DEFAULT_P:
            raise ValueError(f"p is {p}, but schedule is {schedule!r}; need power or step with it")
        elif check_number("p", p) <= 0 or (schedule == "step" and p >= 1):
            raise ValueError(f"p is {p}; need a number above 0, and below 1 for step")

    def weight(self, i: int, n: int) -> float:
        """w at step i of n, counted from 0."""
        if not 0 <= i < n:
            raise ValueError(f"i is {i} and n is {n}; need 0 <= i < n")
        if callable(self.schedule):
            return check_number(f"schedule({i / n})", self.schedule(i / n))
        return SCHEDULES[self.schedule](i / n, self.p or 0.0)

    def applied(self, pipe: Any) -> AbstractContextManager[None]:
        """Guide what the pipeline does inside the `with`; afterwards all is as before.

        Args:
            pipe: a diffusers pipeline, or whatever has a `scheduler` (step, set_timesteps,
                timesteps) and a denoiser, `unet` or `transformer`; and `num_timesteps`, if fewer
                steps than the scheduler's are done. With adapters, if there is no second model.

        Raises: TypeError, ValueError; for a denoiser that is guided already, and for adapters that
        are not there, off or fused.
        """

        def blend(place: Place, tuned: Call, base: Call, args: Any, kwargs: Any) -> Any:
            w = self.weight(place.step, place.count())
            if w == 0.0:
                return base(*args, **kwargs)
            output = tuned(*args, **kwargs)
            if w == 1.0:
                return output
            other = prediction(base(*args, **kwargs))
            return with_prediction(output, torch.lerp(other, prediction(output), w))

        return guided(pipe, "base", self.base, blend)


class NegativePreferenceGuidance:
    """Negative-preference guidance: away from what a model of bad taste does without the prompt.

    ::

        pred = neg + g * (pos - neg)

    pos is the pipeline's denoiser on the prompt, neg the negative model on the empty or negative
    prompt, g the pipeline's guidance_scale: the pipeline's own classifier-free guidance, and
    guidance_rescale after it, whose negative half another model does. Published g: 5 for SDXL, 7.5
    else. A negative model is trained by `npo_loss` or `self_npo_loss`.

    Args:
        negative: a second model, whose weights `merged_negative` makes; or the adapters of the
            pipeline's model that are to be on for that half alone: a name, names, or a mapping of
            names to weights. As published is ``{"tuned": 1 - m, "npo": 1.0}``, which is what
            `merged_negative` does to full weights; {} is the model with all adapters off.

    A step costs as many rows as without, in two calls.

    Raises: TypeError, ValueError.

    Source: Wang et al., "Diffusion-NPO", arXiv:2505.11245, and "Self-NPO", arXiv:2505.11777;
    gen.py, gen_xl.py and pipelines of github.com/G-U-N/Diffusion-NPO.
    """

    def __init__(self, negative: Other) -> None:
        self.negative = check_other("negative", negative)

    def applied(self, pipe: Any) -> AbstractContextManager[None]:
        """Guide what the pipeline does inside the `with`; afterwards all is as before.

        Args:
            pipe: as in `AnnealedGuidance.applied`; one that does classifier-free guidance by
                sending rows of the negative prompts and then of the prompts in one call, as those
                of SD1.5, SDXL and SD3 do. Any other is refused while it runs, as is SD3's skip
                layer guidance, with a third part.

        Raises: as `AnnealedGuidance.applied`.
        """

        def split(place: Place, aligned: Call, negative: Call, args: Any, kwargs: Any) -> Any:
            does = getattr(pipe, "do_classifier_free_guidance", None)
            if not does:
                raise ValueError(
                    f"pipe.do_classifier_free_guidance is {does}; need a pipeline that does it, "
                    "with a guidance_scale above 1"
                )
            (neg_args, neg_kwargs), (pos_args, pos_kwargs) = halves(place, args, kwargs)
            neg = prediction(negative(*neg_args, **neg_kwargs))
            output = aligned(*pos_args, **pos_kwargs)
            return with_prediction(output, torch.cat([neg, prediction(output)]))

        return guided(pipe, "negative", self.negative, split)


@torch.no_grad()
def merged_negative(
    positive: Mapping[str, Tensor],
    origin: Mapping[str, Tensor],
    negative: Mapping[str, Tensor] | None = None,
    *,
    m: float = 0.0,
) -> dict[str, Tensor]:
    """The weights of the negative model, as published: merged with those of the aligned one.

    ::

        W = negative + (1 - m) * (positive - origin)        SDXL's form
        W = m * origin + (1 - m) * positive                 SD1.5's, without negative

    SD1.5's is what the LoRA of the negative model is then put upon; with full weights its result
    is SDXL's form. m = 1 leaves the negative model as it was trained.

    Args:
        positive, origin, negative: state dicts of the aligned model, of the one both were trained
            from, and of the negative one; the same names and shapes in each.
        m: merge_weight of the code, in [0, 1].

    Returns: a new state dict with the dtypes and devices of positive's, computed in fp32 (fp64 of
    fp64 weights). What has no floating dtype is positive's.

    Raises: TypeError, ValueError.

    Source: as `NegativePreferenceGuidance`.
    """
    if not 0.0 <= check_number("m", m) <= 1.0:
        raise ValueError(f"m is {m}; need a number in [0, 1]")
    for name, state in (("origin", origin), ("negative", negative)):
        if state is not None:
            _check_alike(name, state, positive)
    merged = {}
    for key, pos in positive.items():
        if not pos.is_floating_point():
            merged[key] = pos.clone()
            continue
        work = torch.promote_types(pos.dtype, torch.float32)
        start = origin[key].to(pos.device, work)
        bottom = start if negative is None else negative[key].to(pos.device, work)
        merged[key] = (bottom + (1.0 - m) * (pos.to(work) - start)).to(pos.dtype)
    return merged


def _check_alike(name: str, state: Mapping[str, Tensor], positive: Mapping[str, Tensor]) -> None:
    different = sorted(state.keys() ^ positive.keys())
    if different:
        owner = name if different[0] in state else "positive"
        raise ValueError(f"of {name} and positive only {owner} has {different[0]}; need the same")
    for key, pos in positive.items():
        if state[key].shape != pos.shape:
            raise ValueError(
                f"{name}[{key!r}] has shape {tuple(state[key].shape)}; need {tuple(pos.shape)}, "
                "positive's"
            )
