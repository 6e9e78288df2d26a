"""Each family of models: its mathematics, its parts as diffusers has them, and every part of the
trainer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file

from small_run import Train, argv, assert_same_weights, seeing
from trainer.args import parse_args
from trainer.data.batches import Collator, Draws
from trainer.data.pairs import PreferencePairs
from trainer.data.sources import load_pairs
from trainer.export import KOHYA_FILE, LORA_FILE
from trainer.families.all import FAMILIES, family_of
from trainer.families.family import Family, denoiser_of, encoders_of
from trainer.families.loading import check_base, load_encoders
from trainer.families.process import DDPM, FLOW
from trainer.families.vae import decode_latents, encode_images
from trainer.lora import add_lora, trainable
from trainer.metrics import read_metrics
from trainer.objective import Objective, objective_of
from trainer.step import Models, training_step

MODELS = {"epsilon": "sdxl", "sd15": "sd15", "sd3": "sd3"}  # in the small world, and their families
every_family = pytest.mark.parametrize("model", MODELS)


def family_named(model: str) -> Family:
    return FAMILIES[MODELS[model]]


@pytest.fixture
def load(world: Path) -> Callable[[str], Any]:
    def fresh(model: str) -> Any:
        family = family_named(model)
        pipeline = family.pipeline.from_pretrained(world / model, **family.options)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return fresh


# The mathematics.


def test_times_of_flow_matching_are_logit_normal_and_shifted() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    generator = torch.Generator().manual_seed(0)
    times = torch.stack([FLOW.draw(scheduler, generator) for _ in range(20_000)]).double() / 1000
    assert (times > 0).all()
    assert (times <= 1).all()
    unshifted = times / (3 - 2 * times)  # of t = 3 u / (1 + 2 u)
    normal = torch.logit(unshifted.clamp(1e-6, 1 - 1e-6))
    wanted = torch.distributions.Normal(0.0, 1.0)
    for q in (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98):
        share = (normal < wanted.icdf(torch.tensor(q))).double().mean().item()
        assert share == pytest.approx(q, abs=4 * (q * (1 - q) / 20_000) ** 0.5 + 0.001)


@pytest.mark.parametrize(("process", "scheduler"), [
    (DDPM, DDPMScheduler()), (FLOW, FlowMatchEulerDiscreteScheduler(shift=3.0)),
])  # fmt: skip
def test_evenly_spread_timesteps_go_from_little_noise_to_much(process: Any, scheduler: Any) -> None:
    times = process.spread(scheduler, 4)
    assert times.shape == (4,)
    assert (times.diff() > 0).all()
    if process is DDPM:
        assert times.tolist() == [125, 375, 625, 875]
    else:
        u = torch.tensor([0.125, 0.375, 0.625, 0.875]) + 0.001
        torch.testing.assert_close(times / 1000, 3 * u / (1 + 2 * u), rtol=1e-4, atol=1e-4)


def test_a_flow_goes_from_the_image_to_noise_at_the_velocity_it_predicts() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    latents, noise = torch.randn(4, 3, 2, 2).double(), torch.randn(2, 3, 2, 2).double()
    times = scheduler.timesteps[[100, 900]]
    noisy, velocity = FLOW.add_noise(latents, noise, times, scheduler)
    theirs = scheduler.scale_noise(
        latents.float(), times.repeat(2), noise.repeat(2, 1, 1, 1).float()
    )
    torch.testing.assert_close(noisy.float(), theirs)
    later = times + 1.0
    after, same = FLOW.add_noise(latents, noise, later, scheduler)
    torch.testing.assert_close(after - noisy, velocity / 1000)
    assert same.equal(velocity)


# The parts, as diffusers' pipelines have them.


@every_family
def test_captions_are_encoded_as_by_the_pipeline(load: Any, model: str) -> None:
    family, pipeline = family_named(model), load(model)
    encoders = encoders_of(family, pipeline)
    captions = ["a cat", "ein Hund, der schläft, " * 30]  # the second is cut
    with torch.no_grad():
        text = family.encode_text(
            encoders.text_encoders, family.tokenize(encoders.tokenizers, captions)
        )
        for i, caption in enumerate(captions):
            theirs = family.embed_prompt(pipeline, caption, "cpu", False)
            torch.testing.assert_close(text["prompts"][i], theirs["prompt_embeds"][0])
            if "pooled" in text:
                torch.testing.assert_close(text["pooled"][i], theirs["pooled_prompt_embeds"][0])


@every_family
def test_latents_are_in_the_pipelines_units(load: Any, model: str) -> None:
    pipeline = load(model)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        mean, std = encode_images(pipeline.vae, pixels)
        posterior = pipeline.vae.encode(pixels).latent_dist
        shift = pipeline.vae.config.shift_factor or 0.0
        wanted = (posterior.mean - shift) * pipeline.vae.config.scaling_factor
        torch.testing.assert_close(mean, wanted)
        torch.testing.assert_close(std, posterior.std * pipeline.vae.config.scaling_factor)
        restored = pipeline.vae.decode(posterior.mean).sample
        torch.testing.assert_close(decode_latents(pipeline.vae, mean), restored)


@every_family
@pytest.mark.parametrize("loss", ["mapo", "dpo"])
def test_a_step_is_the_published_one(world: Path, load: Any, model: str, loss: str) -> None:
    """Written out by hand from the batch, with the pipeline's own parts."""
    family, pipeline = family_named(model), load(model)
    denoiser, encoders = denoiser_of(family, pipeline).train(), encoders_of(family, pipeline)
    scheduler = pipeline.scheduler
    rows = load_pairs(str(world / "data"), "train", cache_dir=str(world / "cache"))
    pairs = PreferencePairs(rows, [(16, 16)])
    draws = Draws(family, scheduler, pipeline.vae.config.latent_channels, 2)
    batch = Collator(family, encoders.tokenizers, draws)([pairs[0, i] for i in range(3)])
    frozen = load(model)
    reference = denoiser_of(family, frozen)
    with torch.no_grad():
        for parameter in denoiser.parameters():  # so that it is no longer its reference
            parameter.add_(0.02 * torch.randn_like(parameter))
    models = Models(denoiser, encoders, scheduler, reference if loss == "dpo" else None)
    objective = objective_of(loss, scheduler, beta=0.1 if loss == "mapo" else 5.0)
    out = training_step(family, models, objective, batch)

    with torch.no_grad():
        config = pipeline.vae.config
        posterior = pipeline.vae.encode(batch["pixels"]).latent_dist
        sampled = posterior.mean + posterior.std * batch["vae_noise"].repeat(2, 1, 1, 1)
        latents = (sampled - (config.shift_factor or 0.0)) * config.scaling_factor
        noise, times = batch["noise"].repeat(2, 1, 1, 1), batch["timesteps"].repeat(2)
        captions = [rows[i]["caption"] for i in range(3)] * 2
        embedded = [family.embed_prompt(pipeline, text, "cpu", False) for text in captions]
        text = {name: torch.cat([each[name] for each in embedded]) for name in embedded[0]}
    if model == "sd3":
        sigma = scheduler.sigmas[[scheduler.index_for_timestep(t) for t in times]]
        sigma = sigma[:, None, None, None]
        noisy, target = (1 - sigma) * latents + sigma * noise, noise - latents
        given = {"encoder_hidden_states": text["prompt_embeds"], "timestep": times,
                 "pooled_projections": text["pooled_prompt_embeds"]}  # fmt: skip
    else:
        noisy, target = scheduler.add_noise(latents, noise, times), noise
        given = {"encoder_hidden_states": text["prompt_embeds"], "timestep": times}
        if model == "epsilon":
            given["added_cond_kwargs"] = {  # type: ignore[assignment]
                "text_embeds": text["pooled_prompt_embeds"], "time_ids": batch["time_ids"],
            }  # fmt: skip
    with torch.no_grad():
        errors, errors_ref = (
            (each(noisy, **given).sample - target).double().square().flatten(1).mean(1)
            for each in (denoiser, reference)
        )
    (w, l), (w_ref, l_ref) = errors.chunk(2), errors_ref.chunk(2)
    if loss == "mapo":
        odds_w, odds_l = (0.5 * x / torch.expm1(0.5 * x) for x in (w, l))
        ratio = odds_w - odds_l
        expected = w.mean() - 0.1 * torch.nn.functional.logsigmoid(ratio * 1000).mean()
    else:
        inner = (w - w_ref) - (l - l_ref)
        expected = -torch.nn.functional.logsigmoid(-0.5 * 5.0 * inner).mean()
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-4)
    out.loss.backward()
    assert all(p.grad is not None for p in denoiser.parameters())


# The trainer.


@every_family
def test_a_full_run_resumed_equals_the_uninterrupted_one(train: Train, model: str) -> None:
    flags = {
        "model": model, "loss": "dpo", "beta": 50, "use_ema": True, "max_train_steps": 6,
        "checkpointing_steps": 2, "lr_scheduler": "cosine",
    }  # fmt: skip
    whole = train("whole", **flags)
    again = train("again", **flags)
    for name in ("checkpoint-6", "checkpoint-4", "pipeline"):
        shutil.rmtree(again / name)
    train("again", **flags, resume_from_checkpoint="latest")
    assert_same_weights(whole, again)
    assert read_metrics(whole / "metrics.jsonl") == read_metrics(again / "metrics.jsonl")
    rows = read_metrics(whole / "metrics.jsonl")
    assert rows[0]["margin"] == 0  # the policy is still the reference


@every_family
@pytest.mark.parametrize("text", [False, True], ids=["denoiser", "text encoders too"])
def test_a_lora_opens_in_its_pipeline(
    train: Train, world: Path, load: Any, model: str, text: bool
) -> None:
    """It computes what was trained, and its kohya file, where there is one, too."""
    family = family_named(model)
    flags: dict[str, Any] = {"lora_rank": 4, "lora_alpha": 2, "max_train_steps": 4}
    flags |= {"learning_rate": 0.02}
    flags |= {"train_text_encoder": True} if text else {}
    folder = train(model=model, loss="dpo", **flags)
    args = parse_args(argv(world, folder, lora_rank=4, lora_alpha=2))
    trained = load(model)
    encoders = encoders_of(family, trained).text_encoders if text else []
    learning = add_lora(args, family, denoiser_of(family, trained), encoders)
    before = [parameter.clone() for parameter in trainable(learning)]
    for i, each in enumerate(learning):
        learned = load_file(folder / "checkpoint-4" / f"learned_{i}.safetensors")
        each.load_state_dict(learned, strict=False)
    assert any(not p.equal(b) for p, b in zip(trainable(learning), before, strict=True))
    found = {"base": load(model), LORA_FILE: load(model), KOHYA_FILE: load(model)}
    assert (folder / KOHYA_FILE).exists() == (family.kohya_name is not None)
    expected = picture(trained)
    for name, pipeline in found.items():
        if name != "base" and (folder / name).exists():
            pipeline.load_lora_weights(folder, weight_name=name)
            assert difference(picture(pipeline), expected) <= 1, name
    assert difference(picture(found["base"]), expected) > 1


def picture(pipeline: Any) -> torch.Tensor:
    """What a pipeline paints, as numbers in a range of 255."""
    generator = torch.Generator().manual_seed(0)
    image = pipeline(
        "a cat", height=16, width=16, num_inference_steps=3, generator=generator, output_type="pt",
        guidance_scale=4.0,
    ).images[0]  # fmt: skip
    return 255 * image.double()


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


@every_family
def test_a_pipeline_is_saved_whole_and_opens(train: Train, load: Any, model: str) -> None:
    family = family_named(model)
    folder = train(model=model, max_train_steps=2) / "pipeline"
    opened = family.pipeline.from_pretrained(folder, **family.options)
    opened.set_progress_bar_config(disable=True)
    assert family_of(json.loads((folder / "model_index.json").read_text())) is family
    assert difference(picture(opened), picture(load(model))) > 0
    modes = {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}
    assert len(modes) == 1
    assert family.pipeline.__name__ in (folder / "README.md").read_text()


@every_family
def test_the_cache_changes_nothing(train: Train, tmp_path: Path, model: str) -> None:
    flags = {"model": model, "max_train_steps": 4, "adam_epsilon": 1e-3, "learning_rate": 1e-2}
    cached = {"latent_cache": tmp_path / "cache", "latent_cache_dtype": "fp32"}
    plain, read = train("plain", **flags), train("read", **flags, **cached)
    for a, b in zip(*(read_metrics(f / "metrics.jsonl") for f in (plain, read)), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-3)


@every_family
def test_a_run_in_buckets_is_scored_and_shown(train: Train, world: Path, model: str) -> None:
    folder = train(
        model=model, aspect_buckets=True, lora_rank=2, loss="dpo", train_text_encoder=True,
        gradient_checkpointing=True, max_train_steps=4, **seeing(world),
    )  # fmt: skip
    rows = read_metrics(folder / "eval.jsonl")
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert rows[0]["accuracy_ref"] == 0.5
    assert rows[-1]["drop_w"] != 0
    for step in (0, 2, 4):
        Image.open(folder / "validation" / f"step-{step}.png").verify()


@every_family
def test_a_run_in_bf16_begins_at_its_reference(train: Train, model: str) -> None:
    folder = train(model=model, mixed_precision="bf16", loss="dpo", lora_rank=2)
    assert read_metrics(folder / "metrics.jsonl")[0]["margin"] == 0


# What cannot be trained.


def spoilt(world: Path, folder: Path, model: str, part: str, **changes: Any) -> Any:
    """The flags of a copy of a model's configurations, one of which is changed; None removes."""
    names = {"index": "model_index.json", "scheduler": "scheduler/scheduler_config.json"}
    for path in (world / model).rglob("*.json"):
        copied = folder / path.relative_to(world / model)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copied)
    path = folder / names.get(part, f"{part}/config.json")
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return parse_args(argv(world, folder / "run", pretrained_model_name_or_path=folder))


EDM = "EDMDPMSolverMultistepScheduler"
FLOW_NAME = "FlowMatchEulerDiscreteScheduler"


@pytest.mark.parametrize(
    ("model", "part", "changes", "message"),
    [
        ("epsilon", "scheduler", {"_class_name": EDM}, f"its scheduler is {EDM}; need one with"),
        ("epsilon", "scheduler", {"_class_name": FLOW_NAME}, f"its scheduler is {FLOW_NAME}"),
        ("sd15", "scheduler", {"use_flow_sigmas": True}, "need one with betas"),
        ("sd15", "scheduler", {"prediction_type": "sample"}, "prediction_type is 'sample'"),
        ("epsilon", "unet", {"in_channels": 9}, "takes 9 channels and predicts 4, as for inpaint"),
        ("sd15", "unet", {"in_channels": 8}, "takes 8 channels and predicts 4"),
        ("sd15", "unet", {"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        ("epsilon", "unet", {"addition_embed_type": "text"}, "takes no time ids"),
        ("epsilon", "unet", {"projection_class_embeddings_input_dim": 64 + 5 * 8},
         "of a refiner"),
        ("epsilon", "vae", {"latents_mean": [0.0] * 4}, "its VAE has latents_mean"),
        ("sd3", "vae", {"_class_name": "AutoencoderKLWan"}, "its VAE is a AutoencoderKLWan"),
        ("sd3", "scheduler", {"use_dynamic_shifting": True}, "use_dynamic_shifting=True"),
        ("sd3", "scheduler", {"_class_name": "DDPMScheduler"}, "its scheduler is DDPMScheduler"),
        ("sd3", "transformer", {"out_channels": 8}, "predicts 8"),
        ("epsilon", "index", {"text_encoder_2": [None, None]}, "without text_encoder_2"),
        ("epsilon", "index", {"_class_name": "KolorsPipeline", "text_encoder":
         ["kolors", "ChatGLMModel"]}, "its text_encoder is a ChatGLMModel; need a CLIPTextModel"),
        ("epsilon", "index", {"unet": None, "transformer": ["diffusers", "FluxTransformer2DModel"],
         "_class_name": "FluxPipeline"}, "it is a FluxPipeline without unet; need a StableDiff"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_by_name(
    world: Path, tmp_path: Path, model: str, part: str, changes: dict[str, Any], message: str
) -> None:
    args = spoilt(world, tmp_path / "base", model, part, **changes)
    with pytest.raises(ValueError, match=message) as error:
        check_base(args, family_named(model))
    assert str(error.value).startswith(f"--pretrained_model_name_or_path {tmp_path / 'base'}: ")


@pytest.mark.parametrize(
    ("model", "family", "message"),
    [
        ("sd15", "sdxl", "StableDiffusionPipeline without text_encoder_2"),
        ("epsilon", "sd15", "addition_embed_type='text_time'"),
        ("sd3", "sdxl", "StableDiffusion3Pipeline without unet"),
        ("epsilon", "sd3", "StableDiffusionXLPipeline without transformer, text_encoder_3"),
        ("data", "sdxl", "model_index"),
    ],
)
def test_another_familys_model_is_refused_before_data_is_read(
    world: Path, train: Train, model: str, family: str, message: str
) -> None:
    args = parse_args(argv(world, world / "never", model=model, dataset_name="nowhere"))
    with pytest.raises(ValueError, match=message):
        check_base(args, FAMILIES[family])


@every_family
def test_no_good_base_is_refused(world: Path, model: str) -> None:
    check_base(parse_args(argv(world, world / "never", model=model)), family_named(model))


@pytest.mark.parametrize("flags", [{"snr_gamma": 5.0}, {"loss": "dpo", "inversion": "ddim"}])
def test_what_needs_alphas_is_refused_for_a_flow(world: Path, flags: dict[str, Any]) -> None:
    args = parse_args(argv(world, world / "never", model="sd3", **flags))
    with pytest.raises(ValueError, match="trained by flow matching; it needs a noise schedule"):
        Objective(args, FAMILIES["sd3"])
    Objective(args, FAMILIES["sd15"])


def test_a_family_is_found_by_its_pipeline() -> None:
    for family in FAMILIES.values():
        assert family_of({"_class_name": family.pipeline.__name__}) is family
    with pytest.raises(ValueError, match="it is a FluxPipeline; need one of StableDiffusionXLPip"):
        family_of({"_class_name": "FluxPipeline"})


def test_single_files_are_refused_before_a_run_that_could_not_write_one(world: Path) -> None:
    args = parse_args(argv(world, world / "never", model="sd3", single_file=True))
    with pytest.raises(ValueError, match="--single_file came, but there is no original layout of"):
        check_base(args, FAMILIES["sd3"])


def test_a_vae_of_another_width_is_refused(world: Path) -> None:
    wide = world / "wide_vae"
    shutil.copytree(world / "sd3" / "vae", wide, dirs_exist_ok=True)
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps({**config, "latent_channels": 16}))
    flags: dict[str, Any] = {"model": "sd3", "pretrained_vae_model_name_or_path": wide}
    with pytest.raises(ValueError, match=r"latents have 16 channels; the transformer .* needs 4"):
        check_base(parse_args(argv(world, world / "never", **flags)), FAMILIES["sd3"])


@every_family
def test_text_encoders_have_the_precision_of_the_pipelines(
    world: Path, load: Any, model: str
) -> None:
    """transformers keeps some layers of T5 in fp32 where it loads it in fp16."""
    family = family_named(model)
    args: Any = parse_args(argv(world, world / "never", model=model))
    args.mixed_precision = "fp16"
    ours = load_encoders(args, family, torch.device("cpu")).text_encoders
    theirs = family.pipeline.from_pretrained(
        world / model, torch_dtype=torch.float16, **family.options
    )
    for part, encoder in zip(family.texts, ours, strict=True):
        expected = getattr(theirs, part.encoder).state_dict()
        found = encoder.state_dict()
        assert {n: v.dtype for n, v in found.items()} == {n: v.dtype for n, v in expected.items()}


@every_family
def test_compiled_blocks_are_those_of_the_family(
    train: Train, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self: compiled.append(type(self).__name__)
    )
    train(model=model, torch_compile=True, max_train_steps=1)
    assert {*compiled} == {family_named(model).blocks[0]}
