"""What a run left is shown beside its base, and told on a model card that markdown cannot break."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from huggingface_hub import ModelCard
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file

from fastpref.guidance import AnnealedGuidance, NegativePreferenceGuidance, merged_negative
from toy.tiny import tiny_sdxl
from trainer import generate
from trainer.card import push, shown, write_card
from trainer.export import KOHYA_FILE, LORA_FILE, write_lora
from trainer.families.sdxl import SDXL
from trainer.guidance import Wanted, read_guidance
from trainer.lora import TEXT_LAYERS
from trainer.metrics import append_metrics

PROMPTS = ["a cat", "a dog"]
Generate = Callable[..., dict[str, list[Image.Image]]]


def spoil(model: Any, by: float, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator)


def save_lora(base: Path, folder: Path, *names: str, seed: int = 1) -> None:
    """Random adapters of these parts of the pipeline, saved as the trainer does."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(base, add_watermarker=False)
    parts = {name: getattr(pipeline, name) for name in names}
    for part in parts.values():
        targets = SDXL.lora_layers if part is pipeline.unet else TEXT_LAYERS
        part.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=targets))
        spoil(part, 0.3, seed)
    folder.mkdir()
    write_lora(folder, SDXL, parts, dict.fromkeys(parts))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and what runs upon it may leave."""
    folder = tmp_path_factory.mktemp("world")
    pipeline = tiny_sdxl((8, 16), (8, 8), sample_size=8, norm_num_groups=4)
    pipeline.save_pretrained(folder / "base")
    save_lora(folder / "base", folder / "lora", "unet")
    save_lora(folder / "base", folder / "npo_lora", "unet", seed=2)
    save_lora(folder / "base", folder / "lora_text", "unet", "text_encoder", "text_encoder_2")
    state = load_file(folder / "lora_text" / LORA_FILE)
    (folder / "text").mkdir()
    text = {key: value for key, value in state.items() if key.startswith("text_encoder")}
    save_file(text, folder / "text" / LORA_FILE)
    shutil.copytree(folder / "lora_text", folder / "kohya")
    shutil.copytree(folder / "lora", folder / "kohya_unet")
    for name in ("kohya", "kohya_unet"):
        (folder / name / LORA_FILE).unlink()
    wide = tiny_sdxl((8, 24), (8, 8), sample_size=8, norm_num_groups=4).unet
    wide.save_pretrained(folder / "wide" / "pipeline" / "unet")
    origin = pipeline.unet
    pipeline.unet = copy.deepcopy(origin)
    spoil(pipeline.unet, 0.1, seed=2)
    pipeline.save_pretrained(folder / "npo" / "pipeline")
    pipeline.unet = origin
    spoil(pipeline.unet, 0.1)
    pipeline.save_pretrained(folder / "full" / "pipeline")
    shutil.copytree(folder / "full" / "pipeline" / "unet", folder / "alone")
    pipeline.scheduler.register_to_config(prediction_type="v_prediction")
    pipeline.save_pretrained(folder / "v" / "pipeline")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


@pytest.fixture
def run(world: Path, tmp_path: Path) -> Generate:
    def pictures(trained: str, *flags: str) -> dict[str, list[Image.Image]]:
        words = ["--pretrained_model_name_or_path", str(world / "base")]
        words += ["--trained", str(world / trained), "--prompts", str(world / "prompts.txt")]
        words += ["--output", str(tmp_path / "grid.png"), "--images_dir", str(tmp_path / "single")]
        words += ["--num_inference_steps", "2", "--height", "16", "--width", "16", "--seed", "3"]
        generate.main(generate.parse_args([*words, *flags]))
        assert Image.open(tmp_path / "grid.png").width > 2 * 480
        return {
            name: [Image.open(tmp_path / "single" / f"{i:03}-{name}.png") for i in range(2)]
            for name in ("base", "trained", *["guided"] * ("--guidance" in flags))
        }

    return pictures


def own_pictures(pipeline: StableDiffusionXLPipeline, steps: int = 2) -> list[Image.Image]:
    pipeline.set_progress_bar_config(disable=True)
    return [
        pipeline(
            prompt, height=16, width=16, num_inference_steps=steps,
            generator=torch.Generator().manual_seed(3 + i),
        ).images[0]
        for i, prompt in enumerate(PROMPTS)
    ]  # fmt: skip


def difference(found: list[Image.Image], expected: list[Image.Image]) -> int:
    pairs = zip(found, expected, strict=True)
    return max(np.abs(np.asarray(a, int) - np.asarray(b, int)).max() for a, b in pairs)


@pytest.mark.parametrize(
    "trained",
    ["lora", "lora_text", f"lora_text/{LORA_FILE}", "kohya", "full", "alone", "v", "v/pipeline"],
)
def test_the_base_and_what_was_trained_are_painted_as_diffusers_does(
    world: Path, run: Generate, trained: str
) -> None:
    found = run(trained)
    base = StableDiffusionXLPipeline.from_pretrained(world / "base", add_watermarker=False)
    assert difference(found["base"], own_pictures(base)) == 0
    if trained.startswith(("lora", "kohya")):
        folder = world / ("lora" if trained == "lora" else "lora_text")
        base.load_lora_weights(folder, weight_name=LORA_FILE)
        expected = base
    else:
        folder = world / ("v" if trained.startswith("v") else "full") / "pipeline"
        expected = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    assert difference(found["trained"], own_pictures(expected)) <= 1
    assert difference(found["trained"], found["base"]) > 3


def unet_of(world: Path, name: str) -> Any:
    """A run's UNet, a LoRA fused into it."""
    if "lora" not in name:
        return UNet2DConditionModel.from_pretrained(world / name / "pipeline" / "unet")
    pipeline = StableDiffusionXLPipeline.from_pretrained(world / "base", add_watermarker=False)
    like = pipeline.unet.state_dict()
    unet = copy.deepcopy(pipeline.unet)
    pipeline.load_lora_weights(world / name, weight_name=LORA_FILE)
    pipeline.fuse_lora()
    named = {k.replace(".base_layer", ""): v for k, v in pipeline.unet.state_dict().items()}
    unet.load_state_dict({key: named[key] for key in like})
    return unet


def guided_pictures(
    world: Path, trained: str, make: Callable[..., Any], steps: int = 2
) -> list[Image.Image]:
    """By a pipeline with whole weights, under what `make` makes of the trained UNet and base."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(world / "base", add_watermarker=False)
    base = pipeline.unet
    pipeline.unet = unet_of(world, trained)
    with make(pipeline.unet, base).applied(pipeline):
        return own_pictures(pipeline, steps)


@pytest.mark.parametrize("trained", ["lora", "kohya_unet", "full"])
@pytest.mark.parametrize(
    ("flag", "settings"), [("annealed", ("linear",)), ("annealed:step:0.2", ("step", 0.2))]
)
def test_annealed_guidance(
    world: Path, run: Generate, trained: str, flag: str, settings: tuple[Any, ...]
) -> None:
    found = run(trained, "--guidance", flag, "--num_inference_steps", "5")

    def make(unet: Any, base: Any) -> AnnealedGuidance:
        return AnnealedGuidance(*settings, base=base)

    like = trained.removeprefix("kohya_").replace("unet", "lora")
    assert difference(found["guided"], guided_pictures(world, like, make, 5)) <= 1
    assert difference(found["guided"], found["trained"]) > 3
    assert difference(found["guided"], found["base"]) > 3


def test_the_ends_of_annealed_guidance(run: Generate) -> None:
    for schedule, column in (("draft", "trained"), ("base", "base")):
        found = run("lora", "--guidance", f"annealed:{schedule}")
        assert difference(found["guided"], found[column]) == 0


@pytest.mark.parametrize("trained", ["lora", "full"])
@pytest.mark.parametrize("negative", ["npo_lora", "npo"])
@pytest.mark.parametrize("m", [0.0, 0.25])
def test_negative_guidance(
    world: Path, run: Generate, trained: str, negative: str, m: float
) -> None:
    found = run(trained, "--guidance", f"negative:{world / negative}" + f":{m}" * (m > 0))

    def make(unet: Any, base: Any) -> NegativePreferenceGuidance:
        other = unet_of(world, negative)
        states = (each.state_dict() for each in (unet, base, other))
        other.load_state_dict(merged_negative(*states, m=m))
        return NegativePreferenceGuidance(other)

    assert difference(found["guided"], guided_pictures(world, trained, make)) <= 1
    assert difference(found["guided"], found["trained"]) > 3


def test_how_guidance_is_written(tmp_path: Path) -> None:
    assert read_guidance("annealed") == Wanted(schedule="linear")
    assert read_guidance("annealed:power:4") == Wanted(schedule="power", p=4.0)
    assert read_guidance("negative:some/run:0.5") == Wanted(path=Path("some/run"), m=0.5)
    (tmp_path / "run:1").mkdir()
    whole = Wanted(path=tmp_path / "run:1")
    assert read_guidance(f"negative:{tmp_path}/run:1") == whole
    assert read_guidance(f"negative:{tmp_path}/run:1:1") == whole._replace(m=1.0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["cfg"], r"is 'cfg'; need annealed\[:SCHEDULE\[:P\]\] or negative:PATH\[:M\]"),
        (["negative:"], "is 'negative:'; need annealed"),
        (["negative:npo:much"], "is 'negative:npo:much'; need a number instead of 'much'"),
        (["negative:npo:2"], "is 'negative:npo:2'; need an M from 0 to 1"),
        (["annealed:cosine"], "is 'annealed:cosine'; need a schedule of base, draft, l"),
        (["annealed:linear:2"], "p is 2.0, but schedule is 'linear'"),
        (["annealed:step:x"], "is 'annealed:step:x'; need a number instead of 'x'"),
        (["negative:npo", "--guidance_scale", "1"], "need a --guidance_scale above 1 with it"),
        (["negative:nowhere"], "negative: nowhere holds nothing; need pytorch_lora"),
        (
            ["negative:{world}/v"],
            "mixes predictions, but the base predicts epsilon and .* predicts",
        ),
        (["negative:{world}/wide"], r"negative\[.*\] has shape .*; need .*, positive's"),
        (["annealed", "--trained", "{world}/v"], "the base predicts epsilon and .* v_prediction"),
        (["annealed", "--trained", "{world}/text"], "base is pipe's model without adapters, but"),
    ],
)
def test_unfit_guidance_is_refused(
    world: Path, run: Generate, flags: list[str], message: str
) -> None:
    trained = "full" if "wide" in flags[0] else "lora"
    with pytest.raises(ValueError, match=f"^--guidance .*{message}"):
        run(trained, "--guidance", *(flag.format(world=world) for flag in flags))


def test_half_precision_and_another_vae(world: Path, run: Generate) -> None:
    vae = str(world / "full" / "pipeline" / "vae")
    found = run("lora", "--mixed_precision", "bf16", "--pretrained_vae_model_name_or_path", vae)
    base = StableDiffusionXLPipeline.from_pretrained(world / "base", add_watermarker=False)
    assert 0 < difference(found["base"], own_pictures(base)) < 40


def test_clear_errors(world: Path, run: Generate, tmp_path: Path) -> None:
    for folder, message in (("nowhere", "holds nothing"), ("base/vae", r"holds config\.json")):
        with pytest.raises(ValueError, match=rf"{message}.*; need {LORA_FILE}, pipeline/ or its"):
            run(folder)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        run("lora", "--prompts", str(tmp_path / "empty.txt"))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="fp16 on a machine without a GPU"):
            run("lora", "--mixed_precision", "fp16")


def card_of(folder: Path, **changes: Any) -> str:
    settings: dict[str, Any] = {
        "base_model": "someone/sdxl", "dataset": "someone/pairs", "loss": "mapo",
        "settings": {"learning_rate": 1e-5}, "metrics_path": folder / "metrics.jsonl",
        "pictures": [], "lora": True,
    }  # fmt: skip
    (name, *_) = write_card(folder, SDXL, **settings | changes)
    return (folder / name).read_text()


def test_a_card_says_what_was_done_and_what_came_out(tmp_path: Path) -> None:
    folder, run = tmp_path / "run", tmp_path / "elsewhere"
    folder.mkdir()
    append_metrics(folder / "metrics.jsonl", [{"step": 1, "loss": 9.0}, {"step": 2, "loss": 0.25}])
    append_metrics(folder / "eval.jsonl", [{"step": 2, "accuracy_ref": 0.625}])
    pictures = [folder / "curves.png"]
    for place in (run / "step 500", run / "step 1000"):
        place.mkdir(parents=True)
        pictures.append(place / "grid.png")
    for i, picture in enumerate(pictures):
        Image.new("RGB", (2, 2), (i, 0, 0)).save(picture)
    pictures.append(run / "never.png")
    text = card_of(
        folder, heldout_path=folder / "eval.jsonl", pictures=pictures, tags=["pickapic"],
        repo_id="me/mine",
    )  # fmt: skip
    data = ModelCard(text).data.to_dict()
    assert (data["base_model"], data["datasets"]) == ("someone/sdxl", ["someone/pairs"])
    assert (data["library_name"], data["pipeline_tag"]) == ("diffusers", "text-to-image")
    assert {"text-to-image", "stable-diffusion-xl", "fastpref", "mapo", "lora", "pickapic"} == {
        *data["tags"]
    }
    assert "license" not in data
    for line in ("| loss | 0.25 |", r"| accuracy\_ref | 0.625 |", r"| learning\_rate | 1e-05 |"):
        assert line in text.splitlines()
    assert "9" not in text.split("## Last step")[1].split("##")[0]
    for name in ("curves.png", "grid.png", "step%201000-grid.png"):
        assert f"]({name})" in text
        assert (folder / name.replace("%20", " ")).is_file()
    assert Image.open(folder / "step 1000-grid.png").getpixel((0, 0)) == (2, 0, 0)
    assert "never" not in text
    assert 'pipeline.load_lora_weights("me/mine")' in text
    assert KOHYA_FILE in text
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "curves.png", "eval.jsonl", "grid.png", "metrics.jsonl",
        "step 1000-grid.png",
    ]  # fmt: skip


def test_a_pipelines_card_opens_the_pipeline_and_tells_no_folder(tmp_path: Path) -> None:
    local = tmp_path / "private" / "base"
    local.mkdir(parents=True)
    settings = {
        "output_dir": tmp_path, "hub_token": "secret", "lora_rank": None, "latent_cache": str(local)
    }  # fmt: skip
    text = card_of(
        tmp_path, lora=False, base_model=str(local), dataset=str(local), settings=settings,
        license="openrail++",
    )  # fmt: skip
    data = ModelCard(text).data.to_dict()
    assert not {"base_model", "datasets"} & data.keys()
    assert data["license"] == "openrail++"
    assert "lora" not in text
    assert f'from_pretrained(\n    "{tmp_path.name}"' in text
    assert r"| latent\_cache | base |" in text
    for word in ("private", "secret", "output"):
        assert word not in text


def test_nothing_in_a_cell_breaks_the_table(tmp_path: Path) -> None:
    prompts = ["a | b\nnext", "<script>`*_[x](y)"]
    text = card_of(tmp_path, settings={"validation_prompts": prompts})
    (line,) = [line for line in text.splitlines() if "next" in line]
    assert line.replace(r"\|", "").count("|") == 3
    assert r"a \| b<br>next, \<script\>\`\*\_\[x\](y)" in line
    assert shown(0.1 + 0.2) == "0.3"
    assert shown(True) == "True"


@pytest.mark.parametrize(
    "place",
    ["/home/me/secret/base", "~/secret/base", "../secret/base", r"C:\Users\me\secret\base",
     r"\\server\secret\base", "secret/base"],
)  # fmt: skip
def test_a_card_tells_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    (tmp_path / "secret" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    settings = {
        "pretrained_model_name_or_path": place, "validation_prompts": ["a cat/dog", place],
        "vae": "someone/vae",
    }  # fmt: skip
    text = card_of(folder, base_model=place, dataset=place, settings=settings)
    assert "secret" not in text
    assert "Users" not in text
    assert text.count("base") > 3
    assert "a cat/dog, base |" in text
    assert "someone/vae |" in text


class Hub:
    """Keeps what would be uploaded, in place of the hub's functions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, private: bool | None = None) -> None:
        """`private` is what the repository is already, if it exists."""
        self.private, self.uploaded = private, dict[str, bytes]()
        self.asked: bool | None = None
        for name in ("create_repo", "create_commit", "model_info"):
            monkeypatch.setattr(huggingface_hub, name, getattr(self, name))

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> Any:
        assert exist_ok
        self.asked = private
        if self.private is None:
            self.private = bool(private)

        class Url(str):
            pass

        url = Url(f"https://hub/me/{repo_id}")
        url.repo_id = f"me/{repo_id}"  # type: ignore[attr-defined]
        return url

    def model_info(self, repo_id: str) -> SimpleNamespace:
        return SimpleNamespace(private=self.private)

    def create_commit(self, repo_id: str, operations: list[Any], *, commit_message: str) -> None:
        assert repo_id == "me/mine"
        for operation in operations:
            with operation.as_file() as file:
                self.uploaded[operation.path_in_repo] = file.read()


def test_a_push_uploads_the_files_that_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "validation").mkdir()
    names = [LORA_FILE, "validation/step-[5].png"]
    for name in (*names, "validation/step-5.png", "secret.txt"):
        (tmp_path / name).write_text(name)
    for private in (None, False, True):
        hub = Hub(monkeypatch)
        assert push(tmp_path, names, "mine", private=private) == "https://hub/me/mine"
        assert hub.uploaded == {name: name.encode() for name in names}
        assert hub.asked == private


def test_a_private_push_does_not_go_into_a_public_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / LORA_FILE).write_text("weights")
    hub = Hub(monkeypatch, private=False)
    with pytest.raises(ValueError, match="--hub_private_repo came, and me/mine exists and is pub"):
        push(tmp_path, [LORA_FILE], "mine", private=True)
    assert not hub.uploaded
    hub = Hub(monkeypatch, private=True)
    push(tmp_path, [LORA_FILE], "mine")
    assert hub.uploaded


def test_a_push_follows_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    (tmp_path / "elsewhere").mkdir()
    folder.mkdir()
    (tmp_path / "elsewhere" / "secret").write_text("secret")
    (folder / "weights").symlink_to(tmp_path / "elsewhere" / "secret")
    (folder / "unet").symlink_to(tmp_path / "elsewhere")
    hub = Hub(monkeypatch)
    for name in ("weights", "unet/secret", "../elsewhere/secret"):
        with pytest.raises(ValueError, match=rf"{name} in .* is a link, .*nothing was uploaded"):
            push(folder, [name], "mine")
    assert hub.private is None
    (folder / "own").write_text("own")
    (tmp_path / "run too").symlink_to(folder)  # the folder itself may be one
    push(tmp_path / "run too", ["own"], "mine")
    assert hub.uploaded == {"own": b"own"}
