"""Time and memory of a whole training step of SDXL: as the papers' scripts make it, and as
examples/train_sdxl.py does, each way in a process of its own.

    python benchmarks/bench_step.py [--preset tiny|gpu] [--ways papers-mapo-full ...] [--batch 2]

The models are SDXL's own by their published configurations, with random weights: nothing is
downloaded. Batches are synthetic, and made before the clock starts: reading data is not measured.
On a GPU the images have 1024 x 1024 pixels and all ways take some minutes; `--preset tiny`, all
that a CPU can do, is a check that everything runs and says nothing about SDXL.

A way is named by who, which loss and what is trained; "cache": latents and embeddings come from a
latent cache; "keep": activations are kept, without gradient checkpointing.

The papers' way: the VAE, in fp32, and both text encoders at every step; the loss as published, in
eager PyTorch; AdamW as PyTorch makes it by default; for Diffusion-DPO, a second UNet in half
precision. Their commands were thriftier in one thing: MaPO's had 8-bit Adam and Diffusion-DPO's, on
SDXL, Adafactor (--papers_optimizer); the latter also kept its frozen models in the CPU's memory,
which is slower than what is measured here. Their logging is left out, but for the loss.

Adds a row per way to results/step-<device>.csv, or in --output_dir, and prints them with the
verdict on the targets. A sample is a pair. Peak memory counts from the first step on, models and
optimizer included; on a CPU it is what the process grew by.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import math
import os
import re
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path[:0] = [
    str(Path(__file__).resolve().parents[1] / name)
    for name in ("benchmarks", "examples", "kernels", "")
]

from bench_loss import RESULTS, append, environment  # noqa: E402
from cases import DEVICE, GPU, PUBLISHED, synchronize  # noqa: E402

NEEDED = ("accelerate", "diffusers", "peft", "safetensors", "transformers")
LACKING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # each process would warn of torchvision
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
if not LACKING:
    from accelerate import Accelerator
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from toy.tiny import tiny_sdxl
    from trainer.data.batches import Collator, Draws
    from trainer.families.family import DTYPES, VAE_DTYPES, Encoders
    from trainer.families.loading import frozen_copy
    from trainer.families.sdxl import SDXL
    from trainer.lora import add_lora, trainable
    from trainer.objective import objective_of
    from trainer.optim import clip_or_skip, make_optimizer, poison
    from trainer.step import Models, training_step

GIB = 2**30
FASTER, SMALLER = 1.5, 0.6  # at least and at most, against the papers' way
SIDES = 32  # what images must be multiples of, to halve evenly down to the UNet's middle
OK = "ok"


class Way(NamedTuple):
    """How a step is made; `papers`: as their scripts do, else as the trainer here does."""

    loss: str
    trained: str  # full or lora
    cache: bool = False
    checkpointing: bool = True
    papers: bool = False

    @property
    def name(self) -> str:
        parts = ["papers" if self.papers else "ours", self.loss, self.trained]
        parts += ["cache"] * self.cache + ["keep"] * (not self.checkpointing)
        return "-".join(parts)


# The most telling first, should the time run out.
CHOSEN = [
    way
    for loss in ("mapo", "dpo")
    for way in (
        Way(loss, "full", papers=True),
        Way(loss, "full", cache=True),
        Way(loss, "lora", cache=True),
        Way(loss, "lora"),
    )
]
OTHERS = [
    way
    for loss in ("mapo", "dpo")
    for way in (
        Way(loss, "full"),
        Way(loss, "lora", cache=True, checkpointing=False),
        Way(loss, "lora", papers=True),
        Way(loss, "full", cache=True, checkpointing=False),
    )
]
WAYS = {way.name: way for way in CHOSEN + OTHERS}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"ways": [w.name for w in CHOSEN], "resolution": 64, "warmup": 1, "steps": 5},
    "gpu": {"ways": list(WAYS), "resolution": 1024, "warmup": 3, "steps": 10},
}


# SDXL, by the configurations that it was published with.


def sdxl_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=128,
        in_channels=4,
        out_channels=4,
        block_out_channels=(320, 640, 1280),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def sdxl_vae() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=1024,
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        scaling_factor=0.13025,
    )


def sdxl_text_encoders() -> list[Any]:
    """CLIP ViT-L/14's and OpenCLIP ViT-bigG/14's."""
    vit_l = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        hidden_act="quick_gelu", projection_dim=768,
    )  # fmt: skip
    big_g = CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
        hidden_act="gelu", projection_dim=1280,
    )  # fmt: skip
    return [CLIPTextModel(vit_l), CLIPTextModelWithProjection(big_g)]


class Objective:
    """The loss of a way, as `training_step` asks for it, which keeps what it saw."""

    inverts = False

    def __init__(self, way: Way, scheduler: Any = None) -> None:
        self.needs_reference = way.loss == "dpo"
        self.loss: Callable[..., Any] = objective_of(way.loss, scheduler)
        if way.papers:
            published = PUBLISHED["dpo_sigmoid" if way.loss == "dpo" else way.loss]
            self.loss = lambda pred, target, ref, batch: Published(
                published(*(each for each in (pred, target, ref) if each is not None))
            )
        self.seen: tuple[Tensor, ...] = ()

    def weight(self, scheduler: Any, timesteps: Tensor) -> None:
        """Errors are not weighed."""

    def __call__(
        self, pred: Tensor, target: Tensor, ref: Tensor | None, batch: Any = (), **_: Any
    ) -> Any:
        self.seen = (pred.detach(), target, *(() if ref is None else (ref,)))
        return self.loss(pred, target, ref, batch)


class Published(NamedTuple):
    """What the published lines give."""

    loss: Tensor


class Job(NamedTuple):
    """All that a step needs; behind a cache there are neither VAE nor text encoders."""

    way: Way
    accelerator: Accelerator
    models: Models
    objective: Any  # an Objective, in place of the trainer's
    optimizer: Any
    parameters: list[torch.nn.Parameter]
    max_grad_norm: float


def optimizer_of(way: Way, args: argparse.Namespace, parameters: list[torch.nn.Parameter]) -> Any:
    """The trainer's; or, as the papers' scripts make it, one that is not fused."""
    if way.papers and args.papers_optimizer == "adamw":
        return torch.optim.AdamW(
            parameters, lr=args.learning_rate, weight_decay=args.adam_weight_decay
        )
    asked: Any = argparse.Namespace(**vars(args))
    asked.optimizer = "adamw_8bit" if args.use_8bit_adam else "adamw"
    if way.papers:
        asked.optimizer = {"8bit": "adamw_8bit"}.get(args.papers_optimizer, "adafactor")
    return make_optimizer(asked, parameters, args.learning_rate)


def optimizer_name(way: Way, args: argparse.Namespace) -> str:
    if way.papers:
        return str(args.papers_optimizer)
    return "8bit" if args.use_8bit_adam else "adamw fused"


def prepare(way: Way, args: argparse.Namespace) -> tuple[Job, dict[str, Any]]:
    """Models, optimizer and loss of one way, and a batch; everything as train_sdxl.main has it."""
    torch.manual_seed(0)
    accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=not GPU)
    dtype = DTYPES[args.mixed_precision]
    small = tiny_sdxl()  # which has SDXL's noise schedule; its tokens are in SDXL's vocabulary
    with DEVICE:
        if args.preset == "tiny":
            unet, vae = small.unet.to(DEVICE), small.vae
            text_encoders = [small.text_encoder, small.text_encoder_2]
        else:
            unet = sdxl_unet()
            vae, text_encoders = (None, []) if way.cache else (sdxl_vae(), sdxl_text_encoders())
    batch = make_batch(way, args, unet.config, small)
    if way.cache:
        vae, text_encoders = None, []
    else:
        vae_dtype = VAE_DTYPES["fp32" if way.papers else args.vae_dtype]
        vae = vae.requires_grad_(False).eval().to(DEVICE, vae_dtype)
        text_encoders = [m.requires_grad_(False).eval().to(DEVICE, dtype) for m in text_encoders]

    frozen = None
    if way.trained == "lora":
        unet.to(DEVICE, dtype)
        lora: Any = args
        add_lora(lora, SDXL, unet)
    elif way.loss == "dpo":
        frozen = frozen_copy(unet, dtype)
        if way.papers:
            frozen = InHalf(frozen, dtype)
    if way.checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    parameters = trainable([unet])
    unet, optimizer = accelerator.prepare(unet, optimizer_of(way, args, parameters))
    models = Models(
        unet, Encoders(vae, [], text_encoders), small.scheduler, frozen,
        autocast=nullcontext if way.papers else accelerator.autocast,
    )  # fmt: skip
    objective = Objective(way, small.scheduler)
    job = Job(way, accelerator, models, objective, optimizer, parameters, args.max_grad_norm)
    return job, batch


class InHalf(torch.nn.Module):
    """The papers' reference: half precision throughout, norms too, outside of autocast."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model.to(dtype), dtype

    def forward(self, noisy: Tensor, timesteps: Tensor, **condition: Any) -> Any:
        return self.model(noisy.to(self.dtype), timesteps, **condition)


def make_batch(way: Way, args: argparse.Namespace, unet: Any, small: Any) -> dict[str, Any]:
    """A batch as the trainer's loader gives it, on the CPU, of random pictures or random items of a
    cache."""
    vae = small.vae.config if args.preset == "tiny" else sdxl_vae_config()
    factor = 2 ** (len(vae.block_out_channels) - 1)
    tokenizers = [small.tokenizer, small.tokenizer_2]
    side, generator = args.resolution, torch.Generator().manual_seed(0)
    randn = functools.partial(torch.randn, generator=generator)
    pooled = unet.projection_class_embeddings_input_dim - 6 * unet.addition_time_embed_dim

    def pair(seed: int) -> dict[str, Any]:
        made: dict[str, Any] = {"seed": seed, "refused": [], "captions": [f"a photograph, {seed}"]}
        if way.cache:
            states = randn(tokenizers[0].model_max_length, unet.cross_attention_dim)
            made["text"] = [{"prompts": states, "pooled": randn(pooled)}]
        for which in "wl":
            made[f"time_ids_{which}"] = torch.tensor([side, side, 0, 0, side, side])
            if way.cache:
                made[f"mean_{which}"] = randn(unet.in_channels, side // factor, side // factor)
                made[f"std_{which}"] = torch.full_like(made[f"mean_{which}"], 0.01)
            else:
                made[f"pixels_{which}"] = randn(3, side, side).clamp(-1, 1)
        return made

    draws = Draws(SDXL, small.scheduler, unet.in_channels, factor)
    batch = Collator(SDXL, tokenizers, draws)([pair(seed) for seed in range(args.batch)])
    if GPU:  # as the trainer's loader does
        for name, value in batch.items():
            if isinstance(value, Tensor):
                batch[name] = value.pin_memory()
    return batch


def sdxl_vae_config() -> Any:
    with torch.device("meta"):
        return sdxl_vae().config


def step(job: Job, batch: dict[str, Any]) -> tuple[Tensor, ...]:
    """One optimizer step, from a batch on the CPU; gives what the loss saw."""
    out = training_step(SDXL, job.models, job.objective, batch)
    if job.way.papers:
        job.accelerator.backward(out.loss)
        job.accelerator.clip_grad_norm_(job.parameters, job.max_grad_norm)
    else:
        job.accelerator.backward(out.loss * poison(out.loss))
        clip_or_skip(job.accelerator, job.optimizer, job.parameters, job.max_grad_norm)
    job.optimizer.step()
    job.optimizer.zero_grad()
    if job.way.papers:
        out.loss.item()
    else:
        out.metrics()
    return job.objective.seen


def seconds(run: Callable[[], Any], times: int, warmup: int) -> list[float]:
    """Wall time of each run, the device included."""
    found = []
    for i in range(warmup + times):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        if i >= warmup:
            found.append(time.perf_counter() - start)
    return found


def loss_alone(job: Job, tensors: tuple[Tensor, ...]) -> float:
    """Seconds of the loss's forward and backward on these tensors: more than it takes inside of a
    step, where a GPU need not wait for Python's launches."""
    pred, target, *ref = tensors
    pred = pred.clone().requires_grad_()

    def run() -> None:
        torch.autograd.grad(job.objective(pred, target, ref[0] if ref else None).loss, pred)

    return statistics.median(seconds(run, times=20, warmup=3))


def resident(field: str) -> float:
    """GiB of this process: VmRSS now, or VmHWM, the most so far (getrusage would begin with what
    the starting process had)."""
    try:
        text = Path("/proc/self/status").read_text()
        return float(re.findall(rf"{field}:\s+(\d+) kB", text)[0]) * 1024 / GIB
    except (OSError, IndexError):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most * (1 if sys.platform == "darwin" else 1024) / GIB


def measure(way: Way, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one way."""
    before = resident("VmRSS")
    job, batch = prepare(way, args)
    if GPU:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seen: tuple[Tensor, ...] = ()

    def run() -> None:
        nonlocal seen
        seen = step(job, batch)

    times = torch.tensor(seconds(run, args.steps, args.warmup), dtype=torch.float64)
    if GPU:
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        memory = {"peak_gib": peak / GIB, "reserved_gib": reserved / GIB, "memory": "allocated"}
    else:
        growth = resident("VmHWM") - before
        memory = {"peak_gib": growth, "reserved_gib": "", "memory": "growth of the process"}
    if not all(tensor.isfinite().all() for tensor in seen):
        raise FloatingPointError("what the models predict is not finite")
    q20, median, q80 = times.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    loss = loss_alone(job, seen)
    return {
        "seconds": median, "seconds_q20": q20, "seconds_q80": q80,
        "samples_per_s": args.batch / median, **memory,
        "loss_us": 1e6 * loss, "loss_share": loss / median, "status": OK,
    }  # fmt: skip


def told(connection: Connection, way: Way, args: argparse.Namespace) -> None:
    """In the process of one way: send its figures, or why there are none."""
    try:
        figures = measure(way, args)
    except Exception as error:  # whatever it is, the other ways are still to be measured
        short = re.search("out of memory|ALLOC_FAILED", str(error)) is not None
        lines = str(error).splitlines() or [""]
        status = "out of memory" if short else f"failed: {type(error).__name__}: {lines[0]}"
        figures = {"status": status}
        if not short:
            traceback.print_exc()
    connection.send(figures)


def in_own_process(way: Way, args: argparse.Namespace, limit: float) -> dict[str, Any]:
    """The figures of one way, with memory and compiled code of its own; at most `limit` seconds."""
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=told, args=(sender, way, args))
    process.start()
    sender.close()
    try:
        found = receiver.recv() if receiver.poll(limit) else {"status": "out of time"}
    except EOFError:
        process.join()
        found = {"status": f"failed: its process ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()
    return dict(found)


FIGURES = (
    "seconds", "seconds_q20", "seconds_q80", "samples_per_s", "peak_gib", "reserved_gib", "memory",
    "loss_us", "loss_share", "status",
)  # fmt: skip


def row_of(way: Way, args: argparse.Namespace, figures: Mapping[str, Any]) -> dict[str, Any]:
    """All columns; figures that there are none of are empty."""
    rounded = {name: figures.get(name, "") for name in FIGURES}
    rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in rounded.items()}
    vae_dtype = "" if way.cache else "fp32" if way.papers else args.vae_dtype
    return {
        "way": way.name, "loss": way.loss, "trained": way.trained, "cache": way.cache,
        "checkpointing": way.checkpointing, "optimizer": optimizer_name(way, args),
        "vae_dtype": vae_dtype, "preset": args.preset, "batch": args.batch,
        "resolution": args.resolution, "dtype": args.mixed_precision, "steps": args.steps,
        **rounded,
    }  # fmt: skip


class Verdict(NamedTuple):
    """A way of ours against the papers' way of the same loss: ratios, ours to theirs."""

    way: str
    against: str
    speed: float
    memory: float

    @property
    def met(self) -> bool:
        return self.speed >= FASTER and self.memory <= SMALLER

    def __str__(self) -> str:
        def word(good: bool) -> str:
            return "met" if good else "MISSED"

        return (
            f"{self.way} against {self.against}: {self.speed:.2f}x the samples/s (>= {FASTER}: "
            f"{word(self.speed >= FASTER)}), {self.memory:.2f}x the peak memory (<= {SMALLER}: "
            f"{word(self.memory <= SMALLER)})"
        )


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    """Each way of ours against each of the papers', of one loss, where both could be measured."""
    measured = [row for row in rows if row["status"] == OK]
    return [
        Verdict(
            ours["way"],
            theirs["way"],
            ours["samples_per_s"] / theirs["samples_per_s"],
            ours["peak_gib"] / theirs["peak_gib"],
        )
        for theirs in measured
        for ours in measured
        if theirs["way"] == f"papers-{ours['loss']}-{theirs['trained']}"
        and ours["way"].startswith("ours")
    ]


def summary(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each loss: which ways meet both targets, against the papers' full fine-tuning."""
    lines = []
    for loss in dict.fromkeys(row["loss"] for row in rows):
        against = f"papers-{loss}-full"
        of_loss = [verdict for verdict in verdicts(rows) if verdict.against == against]
        good = [verdict.way for verdict in of_loss if verdict.met]
        if not of_loss:
            lines.append(f"{loss}: nothing to compare, as {against} or all of ours have no figures")
        elif good:
            lines.append(f"{loss}: both targets met by {', '.join(good)}")
        else:
            lines.append(f"{loss}: both targets MISSED by each way")
    return lines


HEADER = ("way", "seconds", "p20-p80", "samples/s", "peak GiB", "reserved", "loss", "status")
LINE = "{:26} {:>8} {:>15} {:>9} {:>8} {:>8} {:>7}  {}"


def line_of(row: Mapping[str, Any]) -> str:
    if row["status"] != OK:
        return LINE.format(row["way"], *[""] * 6, row["status"])
    return LINE.format(
        row["way"], f"{row['seconds']:.3f}", f"{row['seconds_q20']:.3f}-{row['seconds_q80']:.3f}",
        f"{row['samples_per_s']:.2f}", f"{row['peak_gib']:.2f}",
        f"{row['reserved_gib']:.2f}" if row["reserved_gib"] != "" else "",
        f"{row['loss_share']:.2%}", row["status"],
    )  # fmt: skip


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Raises a ValueError for a flag that cannot mean anything."""
    parser = argparse.ArgumentParser(
        description="A training step of SDXL: the papers' way against examples/train_sdxl.py.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    flag = parser.add_argument
    flag("--preset", choices=list(PRESETS), default="gpu" if GPU else "tiny",
         help="gpu: SDXL at 1024 x 1024; tiny: tiny models, 64 x 64")  # fmt: skip
    flag("--ways", nargs="+", choices=list(WAYS), metavar="WAY", help=f"of {', '.join(WAYS)}")
    flag("--batch", type=int, default=2, help="pairs in a step; lower it on a smaller GPU")
    flag("--resolution", type=int, help="side of the images")
    flag("--warmup", type=int, help="steps before the clock starts")
    flag("--steps", type=int, help="steps that are timed")
    flag("--mixed_precision", choices=["no", "fp16", "bf16"], default="bf16")
    flag("--vae_dtype", choices=["fp32", "fp16", "bf16"], default="fp32",
         help="ours, without a cache; the papers' way is fp32")  # fmt: skip
    flag("--lora_rank", type=int, default=64)
    flag("--papers_optimizer", choices=["adamw", "8bit", "adafactor"], default="adamw",
         help="8bit: as MaPO's command; adafactor: as Diffusion-DPO's on SDXL")  # fmt: skip
    flag("--use_8bit_adam", action="store_true", help="ours; needs bitsandbytes")
    flag("--max_minutes", type=float, default=9.0, help="ways that are not reached say so")
    flag("--output_dir", type=Path, default=RESULTS)
    parser.set_defaults(**PRESETS[parser.parse_known_args(argv)[0].preset])
    parser.set_defaults(lora_alpha=None, learning_rate=1e-5, max_grad_norm=1.0, adam_beta1=0.9,
                        adam_beta2=0.999, adam_weight_decay=1e-2, adam_epsilon=1e-8)  # fmt: skip
    args = parser.parse_args(argv)
    for name in ("batch", "resolution", "steps", "lora_rank", "max_minutes"):
        if not 0 < getattr(args, name) < math.inf:
            raise ValueError(f"--{name} is {getattr(args, name)}; need more than 0")
    if args.warmup < 0:
        raise ValueError(f"--warmup is {args.warmup}; need 0 or more")
    if args.resolution % SIDES:
        raise ValueError(f"--resolution is {args.resolution}; need a multiple of {SIDES}")
    if not GPU and args.preset == "gpu":
        raise ValueError("--preset is gpu, and PyTorch sees no GPU here; need one, or tiny")
    if not GPU and "fp16" in (args.mixed_precision, args.vae_dtype):
        raise ValueError("fp16 came on a machine without a GPU; need bf16, or no mixed precision")
    if LACKING:
        raise ValueError(
            f"this Python ({sys.executable}) lacks {', '.join(LACKING)}; need "
            f"{', '.join(NEEDED)}, such as `pip install 'fastpref[train]'` brings"
        )
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write and print; 1 if a way failed otherwise than for want of memory or time."""
    args = parse_args(argv)
    about, end = environment(), time.monotonic() + 60 * args.max_minutes
    name = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    path = args.output_dir / f"step-{name}.csv"
    size = "SDXL" if args.preset == "gpu" else "tiny models"
    print(f"{about['device']}, torch {about['torch']}: {size}, {args.resolution} x "
          f"{args.resolution}, {args.batch} pairs a step, {args.mixed_precision}")  # fmt: skip
    print(LINE.format(*HEADER), flush=True)
    rows = []
    for way in [WAYS[chosen] for chosen in args.ways]:
        left = end - time.monotonic()
        figures = in_own_process(way, args, left) if left > 0 else {"status": "out of time"}
        rows.append(row_of(way, args, figures) | about)
        append(path, rows[-1:])
        print(line_of(rows[-1]), flush=True)
    print("\nTargets:" if args.preset == "gpu" else "\nTargets are for SDXL on a GPU; with tiny "
          "models these say nothing about them:")  # fmt: skip
    for verdict in verdicts(rows):
        print(f"  {verdict}")
    for line in summary(rows):
        print(line)
    print(f"rows in {path}")
    return int(any(row["status"].startswith("failed") for row in rows))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"bench_step.py: {error}")
