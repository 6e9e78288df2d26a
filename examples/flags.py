"""Knows the flags of `train_sdxl.py`: names, defaults, and which values cannot mean anything."""

from __future__ import annotations

import argparse
import importlib.util

import torch
from diffusers.optimization import SchedulerType

from objectives import Objective, add_inversion_flags, add_loss_flags, inversion_options
from sdxl import DTYPES, VAE_DTYPES


# fmt: off
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the flags; those of diffusers' training examples keep their names."""
    tensorboard = importlib.util.find_spec("tensorboard") is not None
    parser = argparse.ArgumentParser(
        description="Align SDXL on preference pairs (full fine-tuning). Defaults marked MaPO are "
        "those of that method's published SDXL recipe; in brackets, a loss's own.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    flag = parser.add_argument_group("model").add_argument
    flag("--pretrained_model_name_or_path", required=True, metavar="NAME",
         help="SDXL-format pipeline: a hub name or a local folder")
    flag("--pretrained_vae_model_name_or_path", metavar="NAME",
         help="another VAE: a hub name or a local folder")
    flag("--revision", help="revision of the model on the hub")
    flag("--variant", help="variant of the model files, such as fp16")
    flag("--cache_dir", help="where downloads and prepared data sets are kept")
    flag("--prediction_type", choices=["epsilon", "v_prediction"],
         help="what the UNet predicts; by default what the model's scheduler says")

    flag = parser.add_argument_group("data").add_argument
    flag("--dataset_name", required=True, metavar="NAME",
         help="Pick-a-Pic-format pairs (jpg_0, jpg_1, label_0, caption): a hub name, a parquet "
         "file or a folder of them; ties (label_0 = 0.5) are dropped")
    flag("--dataset_split_name", default="train", metavar="SPLIT", help="the split to train on")
    flag("--loser_caption_column", metavar="CAPTION",
         help="column with the loser's own caption (DCPO); by default the pair shares its caption")
    flag("--max_train_samples", type=int, metavar="N", help="use the first N pairs only")
    flag("--resolution", type=int, default=1024,
         help="shorter sides are resized to it, keeping the aspect, then a square is cut (MaPO)")
    flag("--random_crop", action=argparse.BooleanOptionalAction, default=False,
         help="cut the square at random, at the same relative place in both images, not in the "
         "centre")
    flag("--random_flip", action=argparse.BooleanOptionalAction, default=True,
         help="mirror half of the pairs (MaPO)")
    flag("--proportion_empty_prompts", type=float, default=0.0, metavar="P",
         help="share of pairs whose captions are replaced by the empty one")
    flag("--label_noise_prob", type=float, default=0.0, metavar="P",
         help="share of pairs whose label is flipped; 0.5 is the shuffled control")
    flag("--dataloader_num_workers", type=int, default=0, metavar="N",
         help="processes that prepare images; they do not change the result")

    add_loss_flags(parser.add_argument_group("loss").add_argument)
    add_inversion_flags(parser.add_argument_group("inversion").add_argument)

    flag = parser.add_argument_group("optimization").add_argument
    flag("--train_batch_size", type=int, default=8, metavar="PAIRS", help="per device (MaPO)")
    flag("--gradient_accumulation_steps", type=int, default=2, metavar="N",
         help="batches per optimizer step (MaPO)")
    flag("--max_train_steps", type=int, metavar="N",
         help="optimizer steps; overrides --num_train_epochs [2000 if neither is given (MaPO)]")
    flag("--num_train_epochs", type=int, metavar="N", help="passes over the data")
    flag("--learning_rate", type=float, default=1e-5, help="after warm-up (MaPO)")
    flag("--scale_lr", action=argparse.BooleanOptionalAction, default=False,
         help="multiply the learning rate by the pairs in an optimizer step, over all devices")
    flag("--lr_scheduler", choices=[kind.value for kind in SchedulerType], default="constant",
         metavar="KIND",
         help="a schedule of diffusers.optimization, such as constant, constant_with_warmup, "
         "linear or cosine (MaPO)")
    flag("--lr_warmup_steps", type=int, default=0, metavar="N",
         help="for the schedules that have a warm-up (MaPO)")
    flag("--adam_beta1", type=float, default=0.9, help="of AdamW")
    flag("--adam_beta2", type=float, default=0.999, help="of AdamW")
    flag("--adam_weight_decay", type=float, default=1e-2, help="of AdamW")
    flag("--adam_epsilon", type=float, default=1e-8, help="of AdamW")
    flag("--max_grad_norm", type=float, default=1.0, help="gradients are clipped to it (MaPO)")
    flag("--seed", type=int, default=0, help="the same seed gives the same run")

    flag = parser.add_argument_group("memory and precision").add_argument
    flag("--mixed_precision", choices=list(DTYPES), default="no",
         help="the UNet's computation; its weights stay fp32 (MaPO used fp16)")
    flag("--vae_dtype", choices=list(VAE_DTYPES), default="fp32",
         help="SDXL's own VAE overflows in fp16")
    flag("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=False,
         help="compute activations twice to store fewer (MaPO used it)")

    flag = parser.add_argument_group("output").add_argument
    flag("--output_dir", metavar="DIR",
         help="for checkpoint-*, pipeline, metrics.jsonl, curves.png and logs [sdxl-LOSS]")
    flag("--checkpointing_steps", type=int, default=500, metavar="N",
         help="optimizer steps between checkpoints (MaPO)")
    flag("--checkpoints_total_limit", type=int, metavar="N",
         help="keep the last N; one more exists while it is being written")
    flag("--resume_from_checkpoint", metavar="PATH",
         help='a checkpoint, or "latest": the last whole one, or a fresh start where there is none')
    flag("--log_every", type=int, default=10, metavar="N",
         help="steps between two reads of the metrics from the device; every step is logged")
    flag("--report_to", default="tensorboard" if tensorboard else "none",
         help="tracker of accelerate: tensorboard, wandb, ... or none")
    args = parser.parse_args(argv)
    args.output_dir = args.output_dir or f"sdxl-{args.loss}"
    check_args(args)
    return args
# fmt: on


def check_args(args: argparse.Namespace) -> None:
    """Raise a ValueError for a flag that cannot mean anything."""
    positive = (
        "resolution",
        "train_batch_size",
        "gradient_accumulation_steps",
        "log_every",
        "max_train_steps",
        "num_train_epochs",
        "max_train_samples",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "learning_rate",
        "max_grad_norm",
        "inversion_steps",
        "inversion_evals",
    )
    for name in positive:
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name} is {value}; need more than 0")
    for name in ("label_noise_prob", "proportion_empty_prompts"):
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; need a share from 0 to 1")
    for name in ("seed", "dataloader_num_workers", "lr_warmup_steps", "inversion_eta"):
        if (getattr(args, name) or 0) < 0:
            raise ValueError(f"--{name} is {getattr(args, name)}; need 0 or more")
    if args.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("--mixed_precision is fp16 on a machine without a GPU; need no or bf16")
    Objective(args)
    inversion_options(args)


def check_resolution(resolution: int, factor: int) -> None:
    """Raise a ValueError where the images would not halve evenly down to the UNet's middle."""
    if resolution % factor:
        raise ValueError(
            f"--resolution is {resolution}; this VAE and UNet need a multiple of {factor}"
        )
