"""Guidance by two models gives what the published loops give, written out here step by step, and
leaves the pipeline as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from accelerate.hooks import CpuOffload, add_hook_to_module, remove_hook_from_module
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from torch import Tensor, nn

from fastpref.guidance import AnnealedGuidance, NegativePreferenceGuidance, merged_negative
from toy.tiny import tiny_sdxl

SCALE = 4.0  # of classifier-free guidance
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
Noise = Callable[[Tensor, Tensor, bool], Tensor]  # of latents, timestep, and whether prompted
Predict = Callable[[int, int, Tensor, Tensor], Tensor]  # of step, steps, latents, timestep


def add_lora(model: Any, name: str, seed: int) -> None:
    config = LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS, init_lora_weights=False)
    torch.manual_seed(seed)
    model.add_adapter(config, adapter_name=name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if name in key:
                parameter.copy_(0.3 * torch.randn(parameter.shape))


def spoilt(model: nn.Module, seed: int) -> Any:
    """Another model of the same class."""
    other = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.3 * parameter.std() * torch.randn(parameter.shape))
    return other


class World:
    """A pipeline, its prompts, and its denoiser called by hand: one row, one prompt."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        self.kind = kind
        make: Callable[[], Any] = {"sdxl": self.sdxl, "sd1": self.sd1, "sd3": self.sd3}[kind]
        self.pipe = make()
        self.pipe.set_progress_bar_config(disable=True)
        self.model = self.pipe.transformer if kind == "sd3" else self.pipe.unet
        self.model.requires_grad_(False)
        self.start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))

    def sdxl(self) -> Any:
        pipe = tiny_sdxl((8, 16), (8, 8), sample_size=8, norm_num_groups=4)
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        names = ("prompt_embeds", "negative_prompt_embeds")
        self.inputs = {name: torch.randn(1, 7, 64) for name in names}
        self.inputs |= {name.replace("prompt", "pooled_prompt", 1) if name[0] == "p"
                        else "negative_pooled_prompt_embeds": torch.randn(1, 32)
                        for name in names}  # fmt: skip
        return pipe

    def sd1(self) -> Any:
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=16,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=4,
        )  # fmt: skip
        self.inputs = {
            n: torch.randn(1, 7, 16) for n in ("prompt_embeds", "negative_prompt_embeds")
        }
        scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
        return StableDiffusionPipeline(
            small_vae(), None, None, unet, scheduler, None, None, requires_safety_checker=False
        )

    def sd3(self) -> Any:
        transformer = SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
            attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
            caption_projection_dim=16, pooled_projection_dim=12, pos_embed_max_size=8,
        )  # fmt: skip
        self.inputs = {
            n: torch.randn(1, 7, 16) for n in ("prompt_embeds", "negative_prompt_embeds")
        }
        self.inputs |= {
            name: torch.randn(1, 12)
            for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        }
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        return StableDiffusion3Pipeline(
            transformer, scheduler, small_vae(), None, None, None, None, None, None
        )

    def noise(self, model: Any) -> Noise:
        """The model's own prediction of one latent, prompted or not."""

        def call(latents: Tensor, t: Tensor, prompted: bool) -> Tensor:
            prefix = "" if prompted else "negative_"
            embeds = self.inputs[f"{prefix}prompt_embeds"]
            pooled = self.inputs.get(f"{prefix}pooled_prompt_embeds")
            if self.kind == "sd3":
                return model(
                    latents, timestep=t[None], encoder_hidden_states=embeds,
                    pooled_projections=pooled, return_dict=False,
                )[0]  # fmt: skip
            extra: Any = {}
            if self.kind == "sdxl":
                ids = torch.tensor([[8.0, 8.0, 0.0, 0.0, 8.0, 8.0]])
                extra = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}
            return model(latents, t, encoder_hidden_states=embeds, **extra).sample

        return call

    def paint(self, steps: int = 5, scale: float = SCALE, **settings: Any) -> list[Tensor]:
        """The latents after every step of the pipeline."""
        found = []

        def keep(pipe: Any, i: int, t: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
            found.append(values["latents"].clone())
            return {}

        size = {} if "image" in settings else {"height": 8, "width": 8, "latents": self.start}
        self.pipe(
            **self.inputs, **size, num_inference_steps=steps, guidance_scale=scale,
            output_type="latent", callback_on_step_end=keep, **settings,
        )  # fmt: skip
        return found

    @torch.no_grad()
    def loop(self, predict: Predict, steps: int = 5) -> list[Tensor]:
        """The latents after every step of the published loop, with `predict(i, n, x, t)`."""
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(steps)
        latents = self.start * scheduler.init_noise_sigma if self.kind != "sd3" else self.start
        found = []
        for i, t in enumerate(scheduler.timesteps):
            scaled = latents if self.kind == "sd3" else scheduler.scale_model_input(latents, t)
            pred = predict(i, len(scheduler.timesteps), scaled, t)
            latents = scheduler.step(pred, t, latents, return_dict=False)[0]
            found.append(latents)
        return found


def small_vae() -> AutoencoderKL:
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    return AutoencoderKL(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4, latent_channels=4,
        mid_block_add_attention=False, **blocks,
    )  # fmt: skip


def guided(model: Noise, x: Tensor, t: Tensor) -> Tensor:
    uncond = model(x, t, False)
    return uncond + SCALE * (model(x, t, True) - uncond)


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 * float(b.abs().max()))


def differ(a: list[Tensor], b: list[Tensor]) -> bool:
    return float((a[-1] - b[-1]).abs().max()) > 1e-2 * float(b[-1].abs().max())


@pytest.fixture(params=["sdxl", "sd1", "sd3"])
def world(request: pytest.FixtureRequest) -> World:
    return World(request.param)


@pytest.fixture
def sdxl() -> World:
    return World("sdxl")


WEIGHTS: dict[str, Callable[[float], float]] = {
    "base": lambda x: 0.0,
    "draft": lambda x: 1.0,
    "linear": lambda x: x,
    "power": lambda x: x**2,
    "power 4": lambda x: x**4,
    "step": lambda x: 1.0 if x >= 0.6 else 0.0,
    "own": lambda x: 0.25 + x / 2,
}


def annealed(name: str, **settings: Any) -> AnnealedGuidance:
    if name == "own":
        return AnnealedGuidance(WEIGHTS["own"], **settings)
    word, _, p = name.partition(" ")
    return AnnealedGuidance(word, float(p) if p else None, **settings)


def annealed_loop(
    world: World, tuned: Noise, base: Noise, w: Callable[[float], float]
) -> list[Tensor]:
    def predict(i: int, n: int, x: Tensor, t: Tensor) -> Tensor:
        a = w(i / n)
        return (1 - a) * guided(base, x, t) + a * guided(tuned, x, t)

    return world.loop(predict)


@pytest.mark.parametrize("name", WEIGHTS)
def test_schedules_of_two_models_are_the_published_loop(world: World, name: str) -> None:
    base = spoilt(world.model, 1)
    plain = world.paint()
    with annealed(name, base=base).applied(world.pipe):
        found = world.paint()
        again = world.paint()  # the count begins anew
    expected = annealed_loop(world, world.noise(world.model), world.noise(base), WEIGHTS[name])
    assert_same(found, expected)
    assert_same(again, expected)
    assert differ(found, plain) == (name != "draft")
    assert_same(world.paint(), plain)


@pytest.mark.parametrize("name", ["linear", "step"])
def test_adapters_off_are_the_base(world: World, name: str) -> None:
    base = copy.deepcopy(world.model)
    add_lora(world.model, "tuned", 1)
    tuned = copy.deepcopy(world.model)
    with annealed(name).applied(world.pipe):
        found = world.paint()
    expected = annealed_loop(world, world.noise(tuned), world.noise(base), WEIGHTS[name])
    assert_same(found, expected)
    assert differ(found, world.paint())


def test_the_base_may_have_adapters_of_its_own(sdxl: World) -> None:
    add_lora(sdxl.model, "style", 1)
    base = copy.deepcopy(sdxl.model)
    add_lora(sdxl.model, "tuned", 2)
    sdxl.model.set_adapters(["style", "tuned"], [1.0, 0.5])
    tuned = copy.deepcopy(sdxl.model)
    with AnnealedGuidance(base="style").applied(sdxl.pipe):
        found = sdxl.paint()
    expected = annealed_loop(sdxl, sdxl.noise(tuned), sdxl.noise(base), WEIGHTS["linear"])
    assert_same(found, expected)


def calls_of(model: nn.Module) -> Iterator[int]:
    count = 0

    def hook(*_: Any) -> None:
        nonlocal count
        count += 1

    handle = model.register_forward_hook(hook)
    yield 0
    handle.remove()
    yield count


def test_where_one_model_is_enough_only_it_runs(sdxl: World) -> None:
    base = spoilt(sdxl.model, 1)
    for name, of_tuned, of_base in (("linear", 4, 5), ("step", 2, 3), ("base", 0, 5)):
        tuned_calls, base_calls = calls_of(sdxl.model), calls_of(base)
        next(tuned_calls), next(base_calls)
        with annealed(name, base=base).applied(sdxl.pipe):
            sdxl.paint()
        assert (next(tuned_calls), next(base_calls)) == (of_tuned, of_base)


def seen_weights(world: World, **settings: Any) -> list[float]:
    """i / n as a schedule of one's own gets it."""
    seen = []

    def schedule(x: float) -> float:
        seen.append(x)
        return 0.5

    with AnnealedGuidance(schedule, base=spoilt(world.model, 1)).applied(world.pipe):
        world.paint(**settings)
    return seen


def test_steps_are_counted_with_every_scheduler(sdxl: World) -> None:
    config = sdxl.pipe.scheduler.config
    for kind, n in ((DPMSolverMultistepScheduler, 4), (HeunDiscreteScheduler, 7)):
        sdxl.pipe.scheduler = kind.from_config(config)
        assert seen_weights(sdxl, steps=4) == [i / n for i in range(n)]
    sdxl.pipe.scheduler = HeunDiscreteScheduler.from_config(config)
    base = spoilt(sdxl.model, 1)
    with AnnealedGuidance(base=base).applied(sdxl.pipe):
        found = sdxl.paint()
    expected = annealed_loop(sdxl, sdxl.noise(sdxl.model), sdxl.noise(base), WEIGHTS["linear"])
    assert_same(found, expected)


def test_shortened_schedules_are_counted_whole(sdxl: World) -> None:
    assert seen_weights(sdxl, steps=10, denoising_end=0.5) == [i / 5 for i in range(5)]
    pipe = sdxl.pipe
    sdxl.pipe = StableDiffusionXLImg2ImgPipeline(**pipe.components, add_watermarker=False)
    sdxl.pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 16, 16)
    assert seen_weights(sdxl, steps=10, image=image, strength=0.4) == [i / 4 for i in range(4)]


def negative_loop(world: World, aligned: Noise, negative: Noise) -> list[Tensor]:
    def predict(i: int, n: int, x: Tensor, t: Tensor) -> Tensor:
        neg = negative(x, t, False)
        return neg + SCALE * (aligned(x, t, True) - neg)

    return world.loop(predict)


def test_a_negative_model_is_the_published_loop(world: World) -> None:
    negative = spoilt(world.model, 1)
    plain = world.paint()
    with NegativePreferenceGuidance(negative).applied(world.pipe):
        found = world.paint()
    assert_same(found, negative_loop(world, world.noise(world.model), world.noise(negative)))
    assert differ(found, plain)
    assert_same(world.paint(), plain)


@pytest.mark.parametrize("m", [0.0, 0.25, 1.0])
def test_negative_adapters_are_the_merged_weights(world: World, m: float) -> None:
    """By adapters with weights, and by weights merged as published, in both forms."""
    model = world.model
    origin = copy.deepcopy(model)
    add_lora(model, "tuned", 1)
    states = {"tuned": fused(model, origin)}
    add_lora(model, "npo", 2)
    model.set_adapters("npo")
    states["npo"] = fused(model, origin)
    model.set_adapters("tuned")

    start = origin.state_dict()
    xl = merged_negative(states["tuned"], start, states["npo"], m=m)
    sd1 = merged_negative(states["tuned"], start, m=m)
    for key, value in sd1.items():
        by_hand = m * start[key] + (1 - m) * states["tuned"][key]
        torch.testing.assert_close(value, by_hand, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(value + states["npo"][key] - start[key], xl[key])
    negative, aligned = copy.deepcopy(origin), copy.deepcopy(origin)
    negative.load_state_dict(xl)
    aligned.load_state_dict(states["tuned"])
    expected = negative_loop(world, world.noise(aligned), world.noise(negative))
    with NegativePreferenceGuidance({"tuned": 1 - m, "npo": 1.0}).applied(world.pipe):
        assert_same(world.paint(), expected)
    if m == 1:
        with NegativePreferenceGuidance("npo").applied(world.pipe):
            assert_same(world.paint(), expected)


def fused(model: Any, like: Any) -> dict[str, Tensor]:
    """The weights with what the active adapters add, under the names they had without."""
    model = copy.deepcopy(model)
    model.fuse_lora()
    named = {key.replace(".base_layer", ""): value for key, value in model.state_dict().items()}
    return {key: named[key].clone() for key in like.state_dict()}


def test_rescaled_guidance_comes_after(sdxl: World) -> None:
    negative = spoilt(sdxl.model, 1)
    aligned, away = sdxl.noise(sdxl.model), sdxl.noise(negative)

    def predict(i: int, n: int, x: Tensor, t: Tensor) -> Tensor:
        neg, pos = away(x, t, False), aligned(x, t, True)
        pred = neg + SCALE * (pos - neg)
        return 0.7 * pred * pos.std() / pred.std() + 0.3 * pred

    with NegativePreferenceGuidance(negative).applied(sdxl.pipe):
        found = sdxl.paint(guidance_rescale=0.7)
    assert_same(found, sdxl.loop(predict))


def test_batches_and_several_images_a_prompt(sdxl: World) -> None:
    negative = spoilt(sdxl.model, 1)
    with NegativePreferenceGuidance(negative).applied(sdxl.pipe):
        (*_, one) = sdxl.paint()
        sdxl.start = sdxl.start.repeat(3, 1, 1, 1)
        (*_, three) = sdxl.paint(num_images_per_prompt=3)
    torch.testing.assert_close(three, one.repeat(3, 1, 1, 1), rtol=1e-4, atol=1e-4)


def state_of(world: World) -> dict[str, Any]:
    """What must be as it was."""
    scheduler = world.pipe.scheduler
    layers = [m for m in world.model.modules() if isinstance(getattr(m, "scaling", None), dict)]
    return {
        "own": [sorted(vars(each)) for each in (world.model, scheduler)],
        "call": world.model._compiled_call_impl,
        "forward": world.model.forward,
        "adapters": [(x.disable_adapters, [*x.active_adapters], {**x.scaling}) for x in layers],
        "learning": [p.requires_grad for p in world.model.parameters()],
    }


@pytest.mark.parametrize("active", [["tuned"], ["tuned", "npo"], None])
@pytest.mark.parametrize("broken", [False, True])
def test_all_is_as_it_was_afterwards(sdxl: World, active: list[str] | None, broken: bool) -> None:
    add_lora(sdxl.model, "tuned", 1)
    add_lora(sdxl.model, "npo", 2)
    sdxl.model.set_adapters(active or ["tuned"], [0.3, 0.7][: len(active or ["tuned"])])
    if active is None:
        sdxl.model.disable_adapters()
    sdxl.model.requires_grad_(False)
    for i, parameter in enumerate(sdxl.model.parameters()):
        parameter.requires_grad_(i % 3 == 0)
    sdxl.paint()
    before, plain = state_of(sdxl), sdxl.paint()
    guidances: list[Any] = [NegativePreferenceGuidance({"tuned": 0.5, "npo": 2.0})]
    guidances += [AnnealedGuidance("power", 4.0)] if active else [AnnealedGuidance(base="npo")]
    for guidance in guidances:
        raised = pytest.raises(RuntimeError, match="stop") if broken else nullcontext()
        with raised, guidance.applied(sdxl.pipe):
            assert differ(sdxl.paint(), plain)
            if broken:
                handle = sdxl.model.mid_block.register_forward_hook(stop)
                try:
                    sdxl.paint()
                finally:
                    handle.remove()
        assert state_of(sdxl) == before
        assert_same(sdxl.paint(), plain)


def stop(*_: Any) -> None:
    raise RuntimeError("stop")


def test_a_call_that_broke_off_does_not_shift_the_next(sdxl: World) -> None:
    base = spoilt(sdxl.model, 1)
    expected = annealed_loop(sdxl, sdxl.noise(sdxl.model), sdxl.noise(base), WEIGHTS["linear"])
    calls = 0

    def third(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("stop")

    with AnnealedGuidance(base=base).applied(sdxl.pipe):
        handle = sdxl.model.register_forward_hook(third)
        with pytest.raises(RuntimeError, match="stop"):
            sdxl.paint()
        handle.remove()
        assert_same(sdxl.paint(), expected)


def test_hooks_that_replace_forward_may_come_and_go(sdxl: World) -> None:
    """As at the end of each call of an offloaded pipeline, inside of the `with`."""
    base = spoilt(sdxl.model, 1)
    expected = annealed_loop(sdxl, sdxl.noise(sdxl.model), sdxl.noise(base), WEIGHTS["linear"])
    add_hook_to_module(sdxl.model, CpuOffload("cpu"))
    with AnnealedGuidance(base=base).applied(sdxl.pipe):
        assert_same(sdxl.paint(), expected)
        remove_hook_from_module(sdxl.model)
        assert_same(sdxl.paint(), expected)
        add_hook_to_module(sdxl.model, CpuOffload("cpu"))
        assert_same(sdxl.paint(), expected)
    remove_hook_from_module(sdxl.model)
    assert "forward" not in vars(sdxl.model) or sdxl.model.forward.__self__ is sdxl.model


@pytest.mark.parametrize("in_place", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiled_models_are_guided(sdxl: World, in_place: bool) -> None:
    base = copy.deepcopy(sdxl.model)
    add_lora(sdxl.model, "tuned", 1)
    tuned = copy.deepcopy(sdxl.model)
    expected = annealed_loop(sdxl, sdxl.noise(tuned), sdxl.noise(base), WEIGHTS["linear"])
    if in_place:
        sdxl.model.compile(backend="eager")
    else:
        sdxl.pipe.unet = torch.compile(sdxl.model, backend="eager")
    plain = sdxl.paint()
    compiled = sdxl.pipe.unet._compiled_call_impl
    with AnnealedGuidance().applied(sdxl.pipe):
        assert_same(sdxl.paint(), expected)
    assert sdxl.pipe.unet._compiled_call_impl is compiled
    assert_same(sdxl.paint(), plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(sdxl: World, dtype: torch.dtype) -> None:
    add_lora(sdxl.model, "tuned", 1)
    with AnnealedGuidance().applied(sdxl.pipe):
        expected = sdxl.paint()
    sdxl.pipe.to(dtype)
    sdxl.inputs = {name: value.to(dtype) for name, value in sdxl.inputs.items()}
    sdxl.start = sdxl.start.to(dtype)
    for guidance in (AnnealedGuidance(), NegativePreferenceGuidance({})):
        with guidance.applied(sdxl.pipe):
            found = sdxl.paint()
        assert {latents.dtype for latents in found} == {dtype}
    with AnnealedGuidance().applied(sdxl.pipe):
        off = (sdxl.paint()[-1].float() - expected[-1]).norm() / expected[-1].norm()
    assert off < (0.01 if dtype == torch.float16 else 0.08)


def test_a_denoiser_that_returns_a_tensor(sdxl: World) -> None:
    """As networks do that are not diffusers'."""

    class Net(nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.by = by

        def forward(self, x: Tensor) -> Tensor:
            return x * self.by

    sdxl.pipe.scheduler.set_timesteps(4)
    pipe = type("Pipe", (), {"unet": Net(2.0), "scheduler": sdxl.pipe.scheduler})()
    x = torch.ones(2, 3)
    found = []
    with AnnealedGuidance(base=Net(1.0)).applied(pipe):
        for t in pipe.scheduler.timesteps:
            found.append(float(pipe.unet(x).mean()))
            pipe.scheduler.step(x, t, x)
        with pytest.raises(ValueError, match="in step 5, but pipe has 4"):
            pipe.unet(x)
    assert found == [1.0, 1.25, 1.5, 1.75]
    assert float(pipe.unet(x).mean()) == 2.0


def test_weights_by_hand() -> None:
    assert [AnnealedGuidance("step").weight(i, 25) for i in (14, 15)] == [0.0, 1.0]
    assert [AnnealedGuidance("power").weight(i, 4) for i in range(4)] == [0, 1 / 16, 0.25, 9 / 16]
    assert AnnealedGuidance("step", 0.2).weight(1, 5) == 1.0
    with pytest.raises(ValueError, match="i is 4 and n is 4; need 0 <= i < n"):
        AnnealedGuidance().weight(4, 4)
    with pytest.raises(ValueError, match=r"schedule\(0.5\) is nan; need a finite number"):
        AnnealedGuidance(lambda x: float("nan")).weight(1, 2)


def test_merged_weights_keep_dtype_and_integers() -> None:
    pos = {"w": torch.tensor([1.0, 3.0], dtype=torch.float16), "n": torch.tensor([3])}
    origin = {"w": torch.tensor([1.0, 1.0], dtype=torch.float16), "n": torch.tensor([4])}
    merged = merged_negative(pos, origin, m=0.5)
    assert merged["w"].tolist() == [1.0, 2.0]
    assert merged["w"].dtype == torch.float16
    assert merged["n"].tolist() == [3]
    assert merged["n"] is not pos["n"]
    npo = {"w": torch.tensor([0.0, 5.0]), "n": torch.tensor([5])}
    assert merged_negative(pos, origin, npo)["w"].tolist() == [0.0, 7.0]
    for changes, message in (
        ({"m": 1.5}, r"m is 1.5; need a number in \[0, 1\]"),
        ({"origin": {"w": pos["w"]}}, "of origin and positive only positive has n"),
        ({"origin": {**pos, "z": pos["w"]}}, "only origin has z"),
        ({"negative": {**pos, "w": torch.ones(3)}}, r"negative\['w'\] has shape \(3,\); need \(2,"),
    ):
        settings: dict[str, Any] = {"positive": pos, "origin": origin} | changes
        with pytest.raises(ValueError, match=message):
            merged_negative(**settings)
    with pytest.raises(TypeError, match="m must be a float, got a str"):
        merged_negative(pos, origin, m="half")  # type: ignore[arg-type]


Annealed: Any = AnnealedGuidance  # past the type checker
Negative: Any = NegativePreferenceGuidance


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Annealed("cosine"), ValueError, "schedule is 'cosine'; need one of base,"),
        (lambda: Annealed("linear", 2), ValueError, "p is 2, but schedule is 'linear'"),
        (lambda: Annealed("power", 0), ValueError, "p is 0; need a number above 0"),
        (lambda: Annealed("step", "x"), TypeError, "p must be a float, got a str"),
        (lambda: Annealed(len, 2), ValueError, "p is 2, but schedule is a function"),
        (lambda: Annealed(3), ValueError, "schedule is 3; need one of"),
        (lambda: Annealed(base=3), TypeError, "base must be a model or adapters' names"),
        (lambda: Annealed(base=[]), TypeError, "base must be a model or adapters' names"),
        (lambda: Negative([3]), TypeError, r"negative is \[3\]; need adapters'"),
        (lambda: Negative(None), TypeError, "negative must be a model or"),
        (lambda: Negative({"a": "b"}), TypeError, r"negative\['a'\] must be a f"),
    ],
)
def test_arguments_are_checked(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def refused(world: World, guidance: Any, message: str, error: type[Exception] = ValueError) -> None:
    before = state_of(world)
    with pytest.raises(error, match=message), guidance.applied(world.pipe):
        pass
    assert state_of(world) == before


def test_adapters_are_checked(sdxl: World) -> None:
    refused(sdxl, AnnealedGuidance(), "base is pipe's model without adapters, .* are: none")
    refused(sdxl, NegativePreferenceGuidance("npo"), "adapter 'npo', but the .* are: none")
    add_lora(sdxl.model, "tuned", 1)
    refused(sdxl, NegativePreferenceGuidance(["tuned", "npo"]), "'npo', but the .* are: tuned")
    refused(sdxl, AnnealedGuidance(base=sdxl.model), "base is pipe's own denoiser")
    half = spoilt(sdxl.model, 1).to(torch.bfloat16)
    refused(sdxl, NegativePreferenceGuidance(half), "negative has dtype torch.bfloat16; need pipe")
    sdxl.model.disable_adapters()
    refused(sdxl, AnnealedGuidance(), "adapters, but they are off already")
    sdxl.model.enable_adapters()
    sdxl.model.fuse_lora()
    refused(sdxl, AnnealedGuidance(), "fused; base needs unfuse_lora")


def test_the_pipeline_is_checked(sdxl: World) -> None:
    other = spoilt(sdxl.model, 1)
    with pytest.raises(TypeError, match="pipe is a int without unet or transformer"):
        AnnealedGuidance(base=other).applied(3).__enter__()
    pipe = type("Pipe", (), {"unet": sdxl.model, "scheduler": None})()
    with pytest.raises(TypeError, match=r"pipe\.scheduler is a NoneType; need a scheduler"):
        AnnealedGuidance(base=other).applied(pipe).__enter__()
    pipe.unet = len
    with pytest.raises(TypeError, match=r"pipe\.unet is a builtin.*; need a torch\.nn\.Module"):
        AnnealedGuidance(base=other).applied(pipe).__enter__()
    pipe.unet, pipe.unet_2 = sdxl.model, other
    with pytest.raises(ValueError, match="pipe has unet and unet_2; need one denoiser"):
        AnnealedGuidance(base=other).applied(pipe).__enter__()
    with AnnealedGuidance(base=other).applied(sdxl.pipe):
        refused(sdxl, NegativePreferenceGuidance(other), "guided already; need one guidance at a")
        sdxl.pipe.scheduler = copy.deepcopy(sdxl.pipe.scheduler)
        with pytest.raises(ValueError, match=r"pipe\.scheduler is another one now"):
            sdxl.paint()


def test_what_cannot_be_split_is_refused(sdxl: World) -> None:
    guidance = NegativePreferenceGuidance(spoilt(sdxl.model, 1))
    before = state_of(sdxl)
    with (
        pytest.raises(
            ValueError, match=r"do_classifier_free_guidance is False; need .*_scale above 1"
        ),
        guidance.applied(sdxl.pipe),
    ):
        sdxl.paint(scale=1.0)
    assert state_of(sdxl) == before
    pipe = type("Pipe", (), {"unet": sdxl.model, "scheduler": sdxl.pipe.scheduler})()
    pipe.do_classifier_free_guidance = True
    pipe.scheduler.set_timesteps(2)
    model, t = pipe.unet, pipe.scheduler.timesteps[0]
    embeds = {"text_embeds": torch.zeros(6, 32), "time_ids": torch.zeros(6, 6)}

    def step(rows: int) -> None:
        added = {key: value[:rows] for key, value in embeds.items()}
        prompts = torch.zeros(rows, 7, 64)
        model(torch.zeros(rows, 4, 8, 8), t, prompts, added_cond_kwargs=added)
        pipe.scheduler.step(torch.zeros(2, 4, 8, 8), t, torch.zeros(2, 4, 8, 8))

    for rows, message in ((3, "got latents of shape"), (2, "sent 2 rows"), (6, "sent 6 rows")):
        with pytest.raises(ValueError, match=message), guidance.applied(pipe):
            step(rows)
    assert state_of(sdxl)["own"] == before["own"]
