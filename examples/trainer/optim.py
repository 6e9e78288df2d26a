"""The optimizer, gradient clipping that skips bad steps, and the moving average of the weights."""

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
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor


def make_optimizer(
    args: argparse.Namespace, parameters: list[torch.nn.Parameter], learning_rate: float
) -> torch.optim.Optimizer:
    """AdamW: fused, or with 8-bit states of bitsandbytes."""
    settings: dict[str, Any] = {
        "lr": learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    if args.use_8bit_adam:
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ValueError(f"--use_8bit_adam needs bitsandbytes: {error}") from error
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


def check_sharding(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Raise a ValueError for what cannot be split over processes, and tell DeepSpeed what
    accelerate would read from a loader of its own."""
    kind = accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        for flag in ("use_ema", "train_text_encoder"):
            if getattr(args, flag):
                raise ValueError(f"--{flag} came with {kind.value}; need one process, or DDP "
                                 "(examples/accelerate/ddp.yaml)")  # fmt: skip
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
