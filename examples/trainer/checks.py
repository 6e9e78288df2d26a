"""The values of the trainer's arguments that are refused before anything is read."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from accelerate.tracking import get_available_trackers

from trainer.losses import check_layout, inversion_options
from trainer.objective import Objective

PACKAGES = {"adamw_8bit": "bitsandbytes", "prodigy": "prodigyopt"}  # that optimizers need
POSITIVE = (
    "train_batch_size", "gradient_accumulation_steps", "log_every", "max_train_steps",
    "num_train_epochs", "max_train_samples", "checkpointing_steps", "checkpoints_total_limit",
    "learning_rate", "max_grad_norm", "inversion_steps", "inversion_evals", "lora_rank",
    "lora_alpha", "snr_gamma", "max_bad_steps", "max_eval_samples", "eval_steps",
    "validation_steps", "validation_inference_steps",
)  # fmt: skip
SHARES = ("label_noise_prob", "proportion_empty_prompts", "ema_decay", "max_refused")
NOT_NEGATIVE = ("seed", "dataloader_num_workers", "lr_warmup_steps", "inversion_eta")
TOGETHER = (
    ("lora_alpha", "lora_rank"),
    ("train_text_encoder", "lora_rank"),
    ("push_to_hub", "hub_model_id"),
    ("hub_private_repo", "push_to_hub"),
)
# What is cached was cut in the centre, and there is nothing in a stream to go through twice.
APART = (
    ("single_file", "lora_rank"),
    ("latent_cache", "random_crop"),
    ("latent_cache", "streaming"),
    ("streaming", "aspect_buckets"),
    ("streaming", "check_data"),
    ("streaming", "num_train_epochs"),
)


def check_args(args: Any) -> None:
    """Raise a ValueError for a value that cannot mean anything."""
    for resolution in args.resolution:
        if not resolution > 0:
            raise ValueError(f"--resolution is {resolution}; need more than 0")
    for name in POSITIVE:
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name} is {value}; need more than 0")
    for name in SHARES:
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; need a share from 0 to 1")
    for name in NOT_NEGATIVE:
        if (getattr(args, name) or 0) < 0:
            raise ValueError(f"--{name} is {getattr(args, name)}; need 0 or more")
    if args.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("--mixed_precision is fp16 on a machine without a GPU; need no or bf16")
    for flag, needed in TOGETHER:
        if getattr(args, flag) and not getattr(args, needed):
            raise ValueError(f"--{flag} came without --{needed}; need both")
    for flag, other in APART:
        if getattr(args, flag) and getattr(args, other):
            raise ValueError(f"--{flag} and --{other} came; need one of them without the other")
    if args.streaming and len(args.resolution) > 1:
        raise ValueError(f"--streaming came with --resolution {args.resolution}; need one side")
    if args.streaming and args.dataloader_num_workers > 1:
        raise ValueError(
            f"--streaming came with --dataloader_num_workers {args.dataloader_num_workers}; need 0 "
            "or 1: several would change the order"
        )
    check_optimizer(args)
    check_tracker(args)
    check_layout(args)
    Objective(args)
    inversion_options(args)


def check_optimizer(args: Any) -> None:
    """Raise a ValueError for an optimizer that is not installed, or for what it does not take."""
    if args.use_8bit_adam:  # which goes with adamw_8bit alone
        raise ValueError(f"--use_8bit_adam came with --optimizer {args.optimizer}; need adamw_8bit")
    package = PACKAGES.get(args.optimizer)
    if package and importlib.util.find_spec(package) is None:
        raise ValueError(f"--optimizer {args.optimizer} needs {package}, which is not installed; "
                         f"`pip install {package}` brings it")  # fmt: skip
    for name in ("adam_beta1", "adam_beta2", "adam_epsilon") * (args.optimizer == "adafactor"):
        if getattr(args, name) != getattr(type(args), name):
            raise ValueError(f"--{name} came, but --optimizer adafactor does not take it")
    if args.lr_warmup_steps and args.lr_scheduler == "constant":
        raise ValueError(
            f"--lr_warmup_steps is {args.lr_warmup_steps}, but --lr_scheduler constant has no "
            "warm-up; need constant_with_warmup, or another"
        )


def check_tracker(args: Any) -> None:
    """Raise a ValueError for a tracker that is not there, or that would keep the token."""
    if args.hub_token and args.report_to in ("wandb", "all"):
        raise ValueError(
            f"--hub_token came with --report_to {args.report_to}, and wandb keeps command lines; "
            "need HF_TOKEN in the environment, or `hf auth login`, instead"
        )
    known = ["none", "all", *(str(each) for each in get_available_trackers())]
    if args.report_to not in known:
        raise ValueError(f"--report_to is {args.report_to}; need one of {', '.join(known)} "
                         "(trackers that are installed)")  # fmt: skip


def check_resolutions(resolutions: list[int], factor: int) -> None:
    """Raise a ValueError where the images would not halve evenly down to the denoiser's middle."""
    for resolution in resolutions:
        if resolution % factor:
            raise ValueError(
                f"--resolution is {resolution}; this VAE and denoiser need a multiple of {factor}, "
                f"such as {max(factor, resolution // factor * factor)}"
            )
