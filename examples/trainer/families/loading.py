"""A base model, on the disk or on the hub: whether it can be trained, and its parts."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL
from transformers import AutoTokenizer

from trainer.families.family import DTYPES, VAE_DTYPES, Config, Encoders, Family
from trainer.families.vae import check_vae
from trainer.original_layout import unet_names


def where(args: Any) -> dict[str, Any]:
    return {"revision": args.revision, "cache_dir": args.cache_dir}


def read_config(kind: Any, name: str, **place: Any) -> Config:
    """A part's configuration. Raises: ValueError, where there is none."""
    try:
        config: Config = kind.load_config(name, **place)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{place.get('subfolder') or 'model_index'}: {reason}") from error
    return config


def vae_config(args: Any) -> Config:
    vae = args.pretrained_vae_model_name_or_path
    if vae:
        return read_config(AutoencoderKL, vae, cache_dir=args.cache_dir)
    return read_config(
        AutoencoderKL, args.pretrained_model_name_or_path, subfolder="vae", **where(args)
    )


def denoiser_config(args: Any, family: Family) -> Config:
    source = args.pretrained_model_name_or_path
    return read_config(family.model, source, subfolder=family.denoiser, **where(args))


def check_base(args: Any, family: Family) -> None:
    """Raise a ValueError for a model that the family's trainer cannot train, from its
    configurations alone."""
    source = args.pretrained_model_name_or_path
    try:
        index = read_config(family.pipeline, source, **where(args))
        check_parts(index, family)
        denoiser = denoiser_config(args, family)
        family.check(denoiser)
        if args.single_file:
            check_single_file(family, denoiser)
        scheduler = read_config(
            family.process.scheduler, source, subfolder="scheduler", **where(args)
        )
        if args.prediction_type:
            if not family.process.has_alphas:
                raise ValueError("it predicts velocities of a flow; need no --prediction_type")
            scheduler = {**scheduler, "prediction_type": args.prediction_type}
        family.process.check(scheduler)
    except ValueError as error:
        raise ValueError(f"--pretrained_model_name_or_path {source}: {error}") from error
    try:
        vae = vae_config(args)
        check_vae(vae)
        if vae["latent_channels"] != denoiser["in_channels"]:
            raise ValueError(
                f"its VAE's latents have {vae['latent_channels']} channels; the "
                f"{family.denoiser} of {source} needs {denoiser['in_channels']}"
            )
    except ValueError as error:
        named = args.pretrained_vae_model_name_or_path
        flag = f"--pretrained_{'vae_' if named else ''}model_name_or_path {named or source}"
        raise ValueError(f"{flag}: {error}") from error


def check_single_file(family: Family, denoiser: Config) -> None:
    """Raise a ValueError for what --single_file cannot be written of."""
    if family.config is None:
        raise ValueError(f"--single_file came, but there is no original layout of {family.name} "
                         "here; need SD1.5, 2.x or SDXL, or no --single_file")  # fmt: skip
    unet_names(SimpleNamespace(**denoiser))


def check_parts(index: Mapping[str, Any], family: Family) -> None:
    """Raise a ValueError for a pipeline whose parts, by its model_index.json, are not the
    family's."""
    kind, needed = index.get("_class_name"), family.pipeline.__name__
    wanted = {part.encoder: part.model.__name__ for part in family.texts}
    names = [family.denoiser, "vae", "scheduler", *wanted, *(p.tokenizer for p in family.texts)]
    absent = [name for name in names if not (index.get(name) or [None])[0]]
    if absent:
        raise ValueError(f"it is a {kind} without {', '.join(absent)}; need a {needed} with all of "
                         f"{', '.join(names)}")  # fmt: skip
    for name, model in wanted.items():
        if index[name][1] != model:
            raise ValueError(f"its {name} is a {index[name][1]}; need a {model}, as a {needed} has")


def side_factor(args: Any, family: Family) -> int:
    """What the sides of an image must be multiples of, to halve evenly down to the denoiser's
    middle."""
    vae = len(vae_config(args)["block_out_channels"]) - 1
    factor: int = 2 ** (vae + family.halvings(denoiser_config(args, family)))
    return factor


def load_vae(args: Any) -> AutoencoderKL:
    """The VAE that the flags name, frozen."""
    dtype = VAE_DTYPES[args.vae_dtype]
    if args.pretrained_vae_model_name_or_path:
        vae = AutoencoderKL.from_pretrained(
            args.pretrained_vae_model_name_or_path, torch_dtype=dtype, cache_dir=args.cache_dir
        )
    else:
        vae = AutoencoderKL.from_pretrained(
            args.pretrained_model_name_or_path, subfolder="vae", torch_dtype=dtype,
            variant=args.variant, **where(args),
        )  # fmt: skip
    return vae.requires_grad_(False)


def load_encoders(args: Any, family: Family, device: torch.device) -> Encoders:
    """VAE, tokenizers and text encoders that the flags name: frozen, on `device`."""
    source = args.pretrained_model_name_or_path
    tokenizers = [
        AutoTokenizer.from_pretrained(source, subfolder=part.tokenizer, **where(args))
        for part in family.texts
    ]
    text_encoders = [
        # The precision is told to the loader, which keeps some layers of T5 in fp32.
        part.model.from_pretrained(
            source,
            subfolder=part.encoder,
            variant=args.variant,
            **where(args),
            dtype=DTYPES[args.mixed_precision],
        )
        .requires_grad_(False)
        .to(device)
        for part in family.texts
    ]
    return Encoders(load_vae(args).to(device), tokenizers, text_encoders)


def load_scheduler(args: Any, family: Family) -> Any:
    """The noise schedule of the model, with the prediction type that the flags or it name."""
    scheduler = family.process.scheduler.from_pretrained(
        args.pretrained_model_name_or_path, subfolder="scheduler", **where(args)
    )
    if args.prediction_type:
        scheduler.register_to_config(prediction_type=args.prediction_type)
    return scheduler


def load_denoiser(args: Any, family: Family) -> Any:
    """The UNet or transformer that the flags name, in fp32."""
    return family.model.from_pretrained(
        args.pretrained_model_name_or_path, subfolder=family.denoiser, torch_dtype=torch.float32,
        variant=args.variant, **where(args),
    )  # fmt: skip


def load_pipeline(args: Any, family: Family, **parts: Any) -> Any:
    """The pipeline that the flags name, with these parts in the place of its own."""
    return family.pipeline.from_pretrained(
        args.pretrained_model_name_or_path, variant=args.variant, **where(args),
        **(dict(family.options) | parts),
    )  # fmt: skip


def frozen_copy(denoiser: Any, dtype: torch.dtype) -> Any:
    """A reference model: under autocast to `dtype` it predicts what the denoiser does now, to the
    bit.

    What autocast rounds to `dtype` at every step is kept so; norms, which it does not, stay fp32.
    """
    reference = copy.deepcopy(denoiser).requires_grad_(False).eval()
    for module in reference.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.to(dtype)
    return reference
