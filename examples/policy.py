"""What is trained, the whole UNet or adapters (LoRA), what it is compared with, and how both are
put on disk."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel, cast_training_params
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.optimization import Adafactor

from checkpoints import written_aside
from lora_files import write_lora
from sdxl import load_vae

UNET_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj"]
EMA_FILE = "ema.safetensors"


def add_lora(args: argparse.Namespace, unet: Any, text_encoders: Sequence[Any]) -> None:
    """Give the UNet, and the text encoders that come, adapters in fp32; all else is frozen."""
    for model in (unet, *text_encoders):
        chosen: dict[str, Any] = {"target_modules": UNET_LAYERS}
        if model is not unet:
            # SDXL reads the states before the last layer; only the second encoder's own output
            # comes from behind it. An adapter there would get no gradient, which DDP waits for.
            unread = model.config.num_hidden_layers - (model is text_encoders[0])
            chosen = {"target_modules": TEXT_LAYERS, "layers_to_transform": list(range(unread))}
        model.requires_grad_(False)
        model.add_adapter(
            LoraConfig(
                r=args.lora_rank,
                lora_alpha=args.lora_alpha or args.lora_rank,
                init_lora_weights="gaussian",
                **chosen,
            )
        )
        cast_training_params(model, torch.float32)


def trainable(models: Sequence[torch.nn.Module]) -> list[torch.nn.Parameter]:
    """The parameters that learn."""
    return [p for model in models for p in model.parameters() if p.requires_grad]


@contextmanager
def without_adapters(*models: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The models (the first comes back) as they were before `add_lora`: what they are compared
    with."""
    layers = [
        layer for model in models for layer in model.modules() if isinstance(layer, BaseTunerLayer)
    ]
    try:
        for layer in layers:
            # peft's own switch also takes requires_grad away, which FSDP would remember.
            layer._disable_adapters = True
            if not layer.disable_adapters:
                raise RuntimeError("this version of peft has another switch for adapters")
        yield models[0]
    finally:
        for layer in layers:
            layer._disable_adapters = False


def make_optimizer(
    args: argparse.Namespace, parameters: list[torch.nn.Parameter], learning_rate: float
) -> torch.optim.Optimizer:
    """The optimizer that --optimizer names."""
    settings: dict[str, Any] = {"lr": learning_rate, "weight_decay": args.adam_weight_decay}
    if args.optimizer == "adafactor":
        # As in Diffusion-DPO's recipe for SDXL: the learning rate as given, and no rate of its own.
        return Adafactor(parameters, scale_parameter=False, relative_step=False, **settings)
    settings |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if args.optimizer == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(parameters, use_bias_correction=True, safeguard_warmup=True, **settings)
    if args.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **settings)
    fused = {p.device.type for p in parameters} <= {"cpu", "cuda", "xpu"}
    return torch.optim.AdamW(parameters, fused=fused, **settings)


def poison(loss: Tensor) -> Tensor:
    """1, or NaN where `loss` is not finite: times it, the loss's gradients say so in every process
    and after any accumulation."""
    return torch.where(loss.detach().isfinite(), 1.0, float("nan"))


def clip_or_skip(
    accelerator: Accelerator,
    optimizer: AcceleratedOptimizer,
    parameters: list[torch.nn.Parameter],
    max_norm: float,
) -> tuple[Tensor, Tensor]:
    """Clip the gradients; where they are not finite, the optimizer's next step changes nothing.

    Returns their norm and whether the step is skipped, 0-d tensors. Fused AdamW decides it on the
    device, without making Python wait. fp16's scaler and DeepSpeed have their own ways.
    """
    norm = accelerator.clip_grad_norm_(parameters, max_norm)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        norm = torch.as_tensor(norm or 0.0, device=accelerator.device)
        return norm, ~norm.isfinite()
    bad = ~norm.isfinite()
    inner = optimizer.optimizer
    if optimizer.scaler is None:
        if isinstance(inner, torch.optim.AdamW) and inner.defaults["fused"]:
            inner.__dict__["found_inf"] = bad.float()  # as a gradient scaler tells it
        elif bad.item():
            optimizer.zero_grad()  # parameters without gradients are left as they are
    if isinstance(norm, DTensor):
        norm, bad = norm.full_tensor(), bad.full_tensor()
    return norm, bad


def check_sharding(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Raise a ValueError for what cannot be split over processes, and tell DeepSpeed what
    accelerate would read from a loader of its own."""
    kind = accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        for flag in ("use_ema", "train_text_encoder"):
            if getattr(args, flag):
                raise ValueError(f"--{flag} came with {kind.value}; need one process, or DDP "
                                 "(examples/accelerate/ddp.yaml)")  # fmt: skip
        if args.optimizer in ("adafactor", "prodigy"):
            raise ValueError(f"--optimizer {args.optimizer} came with {kind.value}; need adamw, or "
                             "one process or DDP (examples/accelerate/ddp.yaml)")  # fmt: skip
    if kind == DistributedType.DEEPSPEED:
        if args.mixed_precision == "fp16":
            raise ValueError("--mixed_precision is fp16 with DeepSpeed; need bf16 or no")
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = args.train_batch_size
        config["gradient_clipping"] = args.max_grad_norm
        if args.mixed_precision == "bf16":
            # Its own bf16 makes the weights bf16; autocast leaves them in fp32, as elsewhere, and
            # with [] gradients are summed in fp32 too.
            config.pop("bf16", None)
            config["torch_autocast"] = {
                "enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": [],
            }  # fmt: skip
            accelerator.native_amp = True
            torch.set_autocast_dtype(accelerator.device.type, torch.bfloat16)


@contextmanager
def averaged(
    ema: EMAModel | None, parameters: list[torch.nn.Parameter], model: torch.nn.Module
) -> Iterator[torch.nn.Module]:
    """The model with the moving average of its parameters, where one is kept."""
    if ema is None:
        yield model
        return
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield model
    finally:
        ema.restore(parameters)


class EMA(EMAModel):
    """A moving average whose state goes with a checkpoint, and comes back to its device."""

    def save(self, path: Path, names: Sequence[str]) -> None:
        """Write the state: the average under the names of its parameters, numbers beside it."""
        state = self.state_dict()
        average = dict(zip(names, state.pop("shadow_params"), strict=True))
        average = {name: value.contiguous() for name, value in average.items()}
        save_file(average, path, {"numbers": json.dumps(state)})

    def load(self, path: Path, names: Sequence[str]) -> None:
        """Take up the state that `save` wrote."""
        if not path.exists():
            raise ValueError(f"--use_ema came, but {path.parent} holds no {path.name}: it is of a "
                             "run without --use_ema; need a run with it, or none")  # fmt: skip
        with safe_open(path, "pt") as file:
            numbers = json.loads((file.metadata() or {}).get("numbers", "{}"))
        if {*numbers, "shadow_params"} != self.state_dict().keys():
            raise ValueError(f"{path} holds {', '.join(numbers) or 'no numbers'} beside the "
                             "average; need another checkpoint")  # fmt: skip
        average = load_file(path)
        check_same(path, average, dict(zip(names, self.shadow_params, strict=True)))
        device = self.shadow_params[0].device
        self.load_state_dict(numbers | {"shadow_params": [average[name] for name in names]})
        self.to(device)


def check_same(path: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise a ValueError where a file has other weights than the model."""
    differ = sorted(
        {*found} ^ {*wanted}
        | {n for n in {*found} & {*wanted} if found[n].shape != wanted[n].shape}
    )
    if differ:
        raise ValueError(
            f"resume_from_checkpoint={path}: {len(differ)} weights are not those of this "
            f"model ({', '.join(differ[:3])}, ...); need the same model and --lora_rank"
        )


def keep_only_what_learns(accelerator: Accelerator, ema: EMA | None) -> None:
    """Let checkpoints hold what `trainable` gives, and its average, under names that do not depend
    on the number of processes. FSDP and DeepSpeed write in their own ways."""
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return

    def learned(model: torch.nn.Module) -> dict[str, Tensor]:
        parameters = accelerator.unwrap_model(model).named_parameters()
        return {name: p.detach().contiguous() for name, p in parameters if p.requires_grad}

    def names(models: list[Any]) -> list[str]:
        """In the order of `trainable`."""
        return [f"{i}.{name}" for i, model in enumerate(models) for name in learned(model)]

    def save(models: list[Any], weights: list[Any], folder: str) -> None:
        if accelerator.is_main_process:
            for i, model in enumerate(models):
                save_file(learned(model), Path(folder) / f"learned_{i}.safetensors")
            if ema is not None:
                ema.save(Path(folder) / EMA_FILE, names(models))
        weights.clear()

    def load(models: list[Any], folder: str) -> None:
        for i, model in enumerate(models):
            path = Path(folder) / f"learned_{i}.safetensors"
            found = load_file(path)
            check_same(path, found, learned(model))
            accelerator.unwrap_model(model).load_state_dict(found, strict=False)
        if ema is not None:
            ema.load(Path(folder) / EMA_FILE, names(models))
        elif (Path(folder) / EMA_FILE).exists():
            raise ValueError(f"{folder} holds an average ({EMA_FILE}), which would be lost; need "
                             "--use_ema, as in the run before")  # fmt: skip
        models.clear()

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def make_public(pipeline: Path) -> list[str]:
    """Make a saved pipeline fit for others to read, and return the names of its files.

    Its configurations lose the folders that its parts were loaded from, and its weights get the
    permissions of its other files: safetensors writes for the owner alone.
    """
    mode = (pipeline / "model_index.json").stat().st_mode
    files = [path for path in pipeline.rglob("*") if path.is_file()]
    for path in files:
        path.chmod(mode)
        config = json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else {}
        if isinstance(config, dict) and {"_name_or_path", "name_or_path"} & config.keys():
            kept = {k: v for k, v in config.items() if k.lstrip("_") != "name_or_path"}
            path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    return sorted(path.relative_to(pipeline).as_posix() for path in files)


def save_trained(
    args: argparse.Namespace,
    accelerator: Accelerator,
    learning: Sequence[Any],
    output_dir: Path,
) -> tuple[Path, list[str]]:
    """Write the adapters, or a pipeline with the trained UNet, whole or not at all.

    Returns the folder, and the names of the files in it that were written. Every process must call
    it: with FSDP each holds a part. Only the main one writes.
    """
    result = output_dir if args.lora_rank else output_dir / "pipeline"
    states = [accelerator.get_state_dict(model) for model in learning]
    if not accelerator.is_main_process:
        return result, []
    models = [accelerator.unwrap_model(model) for model in learning]
    if args.lora_rank:
        return result, write_lora(result, models, states)
    with torch.device("meta"):
        trained = UNet2DConditionModel.from_config(models[0].config)
    trained.load_state_dict(states[0], assign=True)
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        args.pretrained_model_name_or_path, unet=trained, vae=load_vae(args).float(),
        revision=args.revision, variant=args.variant, cache_dir=args.cache_dir,
        add_watermarker=False,
    )  # fmt: skip
    if args.prediction_type:
        pipeline.scheduler.register_to_config(prediction_type=args.prediction_type)
    with written_aside(result) as aside:
        pipeline.save_pretrained(aside)
        files = make_public(aside)
    return result, files
