"""A trained model's page, and the upload of the model with it to the hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import quote

import huggingface_hub
from diffusers.utils.hub_utils import populate_model_card
from huggingface_hub import CommitOperationAdd, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from trainer.export import KOHYA_FILE
from trainer.families.family import Family
from trainer.files import whole_file, write_whole
from trainer.metrics import read_metrics

CARD = "README.md"
# Flags that only say where things lay on a machine.
NOT_TOLD = ("output_dir", "cache_dir", "resume_from_checkpoint", "report_to")
MARKDOWN = str.maketrans({character: f"\\{character}" for character in "\\`*_[]<>|#$~"})


def hub_name(name: str) -> str | None:
    """The name, where it is one of the hub's and no folder or file."""
    if Path(name).expanduser().exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def last_part(path: str | Path) -> str:
    """The last part of a path of any system: what it is called, and not where it lies."""
    return PureWindowsPath(path).name or str(path)


def is_path(text: str) -> bool:
    """Whether the text is a path, and not only words with a slash between them."""
    if text.startswith(("~", ".")) or PureWindowsPath(text).root:
        return True
    try:
        return Path(text).exists()
    except (OSError, ValueError):  # too long for a path
        return False


def shown(value: Any) -> str:
    """A value as plain text in a cell of a markdown table; of a path its last part."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(shown, value))
    if isinstance(value, float):
        text = f"{value:.6g}"
    else:
        text = str(value)
        if isinstance(value, Path) or is_path(text):
            text = last_part(text)
    return "<br>".join(line.strip().translate(MARKDOWN) for line in text.splitlines())


def table(head: tuple[str, str], rows: Iterable[tuple[str, Any]]) -> str:
    """A markdown table of two columns."""
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    lines += [f"| {shown(name)} | {shown(value)} |" for name, value in rows]
    return "\n".join(lines)


def snippet(family: Family, base_model: str, repo: str, lora: bool) -> str:
    """The code that opens the model: a LoRA upon its base, or a pipeline by itself."""
    source = base_model if lora else repo
    how = "from_single_file" if source.endswith(".safetensors") else "from_pretrained"
    lines = [
        "import torch",
        f"from diffusers import {family.pipeline.__name__}",
        "",
        f"pipeline = {family.pipeline.__name__}.{how}(",
        f"    {json.dumps(source)}, torch_dtype=torch.bfloat16",
        ').to("cuda")',
    ]
    if lora:
        lines.append(f"pipeline.load_lora_weights({json.dumps(repo)})")
    lines.append('image = pipeline("a photograph of a cat").images[0]')
    return "\n".join(["```python", *lines, "```"])


def copy_pictures(folder: Path, pictures: Sequence[Path]) -> list[str]:
    """Copy those pictures that are there into `folder`, unless they lie in it, and tell their
    names; of two with one name the second gets its folder's name before it."""
    names: list[str] = []
    for picture in pictures:
        if not picture.is_file():
            continue
        if picture.resolve().is_relative_to(folder.resolve()):
            names.append(picture.resolve().relative_to(folder.resolve()).as_posix())
            continue
        name = picture.name
        if name in names:
            name = f"{picture.parent.name}-{name}"
        with whole_file(folder / name) as aside:
            shutil.copyfile(picture, aside)
        names.append(name)
    return names


def write_card(
    folder: Path,
    family: Family,
    *,
    base_model: str,
    dataset: str,
    loss: str,
    settings: Mapping[str, Any],
    metrics_path: Path,
    pictures: Sequence[Path],
    lora: bool,
    heldout_path: Path | None = None,
    tags: Sequence[str] = (),
    license: str | None = None,
    repo_id: str | None = None,
) -> list[str]:
    """Write README.md into `folder`, the LoRA's or the pipeline, and return its name and those of
    the pictures in it.

    `settings` are the run's flags; those left at None, places on this machine and tokens are not
    told. `metrics_path` and `heldout_path` are its metrics.jsonl and eval.jsonl, of which the last
    rows are told. `repo_id` is the name to open it by, where it is known already.
    """
    base, data = hub_name(base_model), hub_name(dataset)
    kind = ["lora"] if lora else []
    header = ModelCardData(
        base_model=base,
        datasets=[data] if data else None,
        library_name="diffusers",
        license=license,
        pipeline_tag="text-to-image",
        inference=True,
    )
    name = (repo_id or folder.resolve().name).split("/")[-1]
    what = "A LoRA for" if lora else "The whole of"
    parts = [
        f"# {shown(name)}",
        f"{what} {shown(base or last_part(base_model))}, aligned on the preferences in "
        f"{shown(data or last_part(dataset))} with the loss {shown(loss)} of fastpref.",
        f"## Use\n\n{snippet(family, base or last_part(base_model), repo_id or name, lora)}",
    ]
    if lora and family.kohya_name is not None:
        parts.append(
            f"`{KOHYA_FILE}` is the same LoRA for ComfyUI, AUTOMATIC1111 and other tools that read "
            "the files of kohya's scripts."
        )
    titles = {"Last step": metrics_path, "Held-out pairs": heldout_path}
    for title, path in titles.items():
        rows = read_metrics(path) if path is not None else []
        if rows:
            parts.append(f"## {title}\n\n{table(('metric', 'value'), rows[-1].items())}")
    names = copy_pictures(folder, pictures)
    if names:
        links = [f"![{shown(Path(name).stem)}]({quote(name)})" for name in names]
        parts.append("## Pictures\n\n" + "\n\n".join(links))
    told = [
        (name, value)
        for name, value in settings.items()
        if value is not None and name not in NOT_TOLD and "token" not in name
    ]
    parts.append(f"## Settings\n\n{table(('setting', 'value'), told)}")
    text = "\n\n".join([f"---\n{header.to_yaml()}\n---", *parts]) + "\n"
    labels = ["text-to-image", *family.tags, "fastpref", loss, *kind, *tags]
    card = populate_model_card(ModelCard(text), labels)
    write_whole(folder / CARD, str(card).encode())
    return [CARD, *names]


def push(folder: Path, files: Sequence[str], repo_id: str, private: bool | None = None) -> str:
    """Put these files of `folder`, and nothing else, on the hub; return the address.

    Whatever lies beside them, such as checkpoints, training images and latents, stays here. With
    `private` None a new repository is what the account's settings say.
    """
    links = [name for name in files if (folder / name).resolve() != folder.resolve() / name]
    if links:
        raise ValueError(
            f"{', '.join(links)} in {folder} is a link, or leads out of it; need files of its own; "
            "nothing was uploaded"
        )
    url = huggingface_hub.create_repo(repo_id, private=private, exist_ok=True)
    if private and not huggingface_hub.model_info(url.repo_id).private:
        raise ValueError(
            f"--hub_private_repo came, and {url.repo_id} exists and is public; nothing was "
            "uploaded. Make it private on the hub, or give another --hub_model_id"
        )
    huggingface_hub.create_commit(
        url.repo_id,
        [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in files],
        commit_message="Upload with fastpref",
    )
    return str(url)
