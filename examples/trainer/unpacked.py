"""A base or VAE that comes in one file, unpacked once into a folder in diffusers' format."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from trainer.args import TrainingArguments
from trainer.families.family import Family
from trainer.families.sd15 import SD15
from trainer.families.sdxl import SDXL
from trainer.files import whole_folder
from trainer.single_file import (
    SD_LAYOUT,
    SDXL_LAYOUT,
    kind_of,
    load_single_file,
    load_single_vae,
    read_shapes,
)

CONFIG_FLAG = "--pretrained_config_name_or_path"


def is_file(name: str | None) -> bool:
    """Whether the name is that of a checkpoint in one file, be it there or not."""
    return name is not None and name.endswith((".safetensors", ".ckpt"))


def unpack(args: Any, family: Family) -> Any:
    """The arguments, with folders in the place of a base or VAE in one file.

    The folder is named by the contents of the file and of the configurations that it is unpacked
    with, so that it is made once, and anew when either changes.
    """
    base, vae = args.pretrained_model_name_or_path, args.pretrained_vae_model_name_or_path
    folders: dict[str, str] = {}
    if is_file(base):
        folders["pretrained_model_name_or_path"] = unpacked(args, family, base, whole=True)
    if is_file(vae):
        folders["pretrained_vae_model_name_or_path"] = unpacked(args, family, vae, whole=False)
    return replace(args, **folders) if folders else args


def unpacked(args: TrainingArguments, family: Family, name: str, whole: bool) -> str:
    """The folder of a file that holds a pipeline, or a VAE."""
    flag = f"--pretrained_{'' if whole else 'vae_'}model_name_or_path"
    path, config = Path(name), config_of(args, family)
    if not path.is_file():
        raise ValueError(f"{flag} {name}: there is no such file")
    if path.suffix != ".safetensors":
        raise ValueError(f"{flag} {name}: need a .safetensors file; others may hold code")
    if config is None:
        raise ValueError(f"{flag} {name}: a {family.name} model is not read from one file; need a "
                         "folder in diffusers' format, or a name on the hub")  # fmt: skip
    parent = Path(args.cache_dir) if args.cache_dir else Path(args.output_dir)
    folder = parent / "unpacked" / f"{path.stem}-{digest(path, config)}"
    if not folder.exists():
        try:
            part: Any = read(family, path, config, whole, dtype_of(path))
        except ValueError as error:
            reason = str(error).removeprefix("path: ").replace("config: ", f"{CONFIG_FLAG} ")
            raise ValueError(
                f"{flag} {reason if name in reason else f'{name}: {reason}'}"
            ) from error
        with whole_folder(folder) as aside:
            part.save_pretrained(aside)
    return str(folder)


def config_of(args: Any, family: Family) -> str | None:
    """Whose configurations a part in one file has: the flag's, or a base's that is a folder."""
    base: str = args.pretrained_model_name_or_path
    config: str | None = args.pretrained_config_name_or_path
    return config or (family.config if is_file(base) else base)


def read(family: Family, path: Path, config: str, whole: bool, dtype: Any) -> Any:
    """The pipeline or VAE of a file."""
    if whole:
        return load_single_file(family.pipeline, path, config, dtype)
    return load_single_vae(path, config, dtype)


def family_of_file(path: Path) -> Family:
    """The family of a checkpoint in one file. Raises: ValueError."""
    kind = kind_of(read_shapes(path))
    if kind not in (SD_LAYOUT, SDXL_LAYOUT):
        raise ValueError(f"holds {kind}; need {SD_LAYOUT} or {SDXL_LAYOUT}")
    return SDXL if kind == SDXL_LAYOUT else SD15


def digest(path: Path, config: str) -> str:
    """What stands for a file, and for the configurations that it is unpacked with."""
    state = hashlib.blake2b(config.encode(), digest_size=8)
    files = sorted(Path(config).rglob("*.json")) if Path(config).is_dir() else []
    for each in (*files, path):
        with each.open("rb") as file:
            while part := file.read(2**24):
                state.update(part)
    return state.hexdigest()


def dtype_of(path: Path) -> torch.dtype | None:
    """Half precision, if all weights are in it."""
    kinds = {"F16": torch.float16, "BF16": torch.bfloat16}
    with safe_open(path, framework="pt") as file:
        found = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    (kind, *others) = sorted(found - {"I64", "I32"}) or [""]
    return None if others else kinds.get(kind)
