"""The optimizer, gradient clipping that skips bad steps, and the moving average of the weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.optimization import Adafactor

from trainer.args import TrainingArguments
from trainer.families.family import Family
from trainer.lora import trainable

UNSPLIT = "one process, or DDP (examples/configs/accelerate/ddp.yaml)"


def make_optimizer(
    args: TrainingArguments, parameters: list[torch.nn.Parameter], learning_rate: float
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


def check_sharding(args: TrainingArguments, family: Family, accelerator: Accelerator) -> None:
    """Raise a ValueError for what cannot be split over processes; tell FSDP by which modules to
    split the model, and DeepSpeed what accelerate would read from a loader of its own."""
    kind = accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        for flag in ("use_ema", "train_text_encoder"):
            if getattr(args, flag):
                raise ValueError(f"--{flag} came with {kind.value}; need {UNSPLIT}")
        if args.optimizer in ("adafactor", "prodigy"):
            raise ValueError(
                f"--optimizer {args.optimizer} came with {kind.value}; need adamw, or {UNSPLIT}"
            )
    if kind == DistributedType.FSDP:
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = list(family.blocks)
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


@dataclass
class Learner:
    """What learns in a run, and how: the models by the pipeline's names of them, as accelerate has
    prepared them, their parameters, the optimizer, its schedule, and the moving average."""

    accelerator: Accelerator
    models: dict[str, Any]
    parameters: list[torch.nn.Parameter]
    optimizer: AcceleratedOptimizer
    lr_scheduler: Any
    ema: EMA | None
    max_grad_norm: float

    def step(self, loss: Tensor) -> tuple[float, Tensor, Tensor]:
        """Add the gradients of `loss`, and after the last micro-batch of a step change the weights.

        Returns the learning rate, the gradients' norm, and whether the step is skipped.
        """
        self.accelerator.backward(loss * poison(loss))
        norm = skipped = torch.zeros(())
        if self.accelerator.sync_gradients:
            norm, skipped = clip_or_skip(
                self.accelerator, self.optimizer, self.parameters, self.max_grad_norm
            )
        lr: float = self.lr_scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        if self.ema is not None and self.accelerator.sync_gradients:
            self.ema.step(self.parameters)
        return lr, norm, skipped

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The models with the moving average of their parameters, where one is kept."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)


def make_learner(
    args: TrainingArguments, accelerator: Accelerator, models: dict[str, Any], steps: int,
    learning_rate: float,
) -> Learner:  # fmt: skip
    """Give the models to accelerate, with an optimizer and the schedule of `steps` steps."""
    optimizer = make_optimizer(args, trainable([*models.values()]), learning_rate)
    # accelerate steps the schedule once per process.
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=steps * accelerator.num_processes,
    )
    *prepared, optimizer, lr_scheduler = accelerator.prepare(
        *models.values(), optimizer, lr_scheduler
    )
    parameters = trainable(prepared)  # sharding makes others of them
    ema = EMA(parameters, decay=args.ema_decay) if args.use_ema else None
    return Learner(
        accelerator, dict(zip(models, prepared, strict=True)), parameters, optimizer, lr_scheduler,
        ema, args.max_grad_norm,
    )  # fmt: skip
