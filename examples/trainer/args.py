"""The trainer's flags: names, defaults, and which values cannot mean anything."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.optimization import SchedulerType

from trainer.families.loading import DTYPES, VAE_DTYPES
from trainer.losses import (
    Objective,
    add_inversion_flags,
    add_loss_flags,
    check_layout,
    inversion_options,
)
from trainer.sampling import read_prompts


# fmt: off
def add_model_flags(flag: Callable[..., argparse.Action]) -> None:
    """Declare the flags that say where a pipeline comes from."""
    flag("--pretrained_model_name_or_path", required=True, metavar="NAME",
         help="the base, an SDXL-format pipeline: a hub name or a local folder")
    flag("--pretrained_vae_model_name_or_path", metavar="NAME",
         help="another VAE: a hub name or a local folder")
    flag("--revision", help="revision of the model on the hub")
    flag("--variant", help="variant of the model files, such as fp16")
# fmt: on


# fmt: off
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the flags; those of diffusers' training examples keep their names."""
    tensorboard = importlib.util.find_spec("tensorboard") is not None
    parser = argparse.ArgumentParser(
        description="Align SDXL on preference pairs: the whole UNet, or adapters (--lora_rank). "
        "Defaults marked MaPO are those of that method's published SDXL recipe; in brackets, a "
        "loss's own.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    flag = parser.add_argument_group("model").add_argument
    add_model_flags(flag)
    flag("--cache_dir", help="where downloads and prepared data sets are kept")
    flag("--prediction_type", choices=["epsilon", "v_prediction"],
         help="what the UNet predicts; by default what the model's scheduler says")
    flag("--lora_rank", type=int, metavar="R",
         help="train adapters of this rank instead of the whole UNet; they are also their own "
         "reference: the model without them")
    flag("--lora_alpha", type=float, metavar="A", help="scale of the adapters times R [R]")
    flag("--train_text_encoder", action=argparse.BooleanOptionalAction, default=False,
         help="adapters for both text encoders too; needs --lora_rank")
    flag("--use_ema", action=argparse.BooleanOptionalAction, default=False,
         help="keep a moving average of what is trained, and save and show that")
    flag("--ema_decay", type=float, default=0.9999, help="of the moving average, at the most")

    flag = parser.add_argument_group("data").add_argument
    flag("--dataset_name", required=True, metavar="NAME",
         help="pairs: a hub name, a parquet file or a folder of them, in Pick-a-Pic's columns; a "
         "folder with w/ and l/ and captions; or a .jsonl or .csv of winner, loser, caption")
    flag("--dataset_split_name", default="train", metavar="SPLIT", help="the split to train on")
    flag("--image_columns", nargs="+", default=["jpg_0", "jpg_1"], metavar=("IMAGE_0", "IMAGE_1"),
         help="columns with the images: bytes, an Image feature, or paths")
    flag("--label_column", default="label_0", metavar="LABEL",
         help="column that is 1 where image 0 wins, 0 where it loses, 0.5 where nobody does")
    flag("--caption_column", default="caption", metavar="CAPTION", help="column with the captions")
    flag("--ties", choices=["drop", "coin", "keep"], default="drop",
         help="pairs without a winner: leave them out; toss for it, once for the run; or count "
         "image 0 as the winner, as diffusers' scripts do")
    flag("--streaming", action=argparse.BooleanOptionalAction, default=False,
         help="read the pairs as they come, for sets that do not fit on the disk")
    flag("--max_refused", type=float, default=0.01, metavar="P",
         help="share of pairs that may have an image that cannot be used; above it, nothing is "
         "trained. Such pairs are left out, counted, and listed in refused.txt")
    flag("--check_data", action="store_true",
         help="read all pairs, print what is there and what is wrong with it, draw a sheet of "
         "samples, and train nothing")
    flag("--latent_cache", metavar="DIR",
         help="compute the latents' moments and the captions' embeddings once, keep them in DIR, "
         "and train without the VAE and the text encoders")
    flag("--latent_cache_dtype", choices=list(VAE_DTYPES), default="fp16",
         help="of what is kept there")
    flag("--loser_caption_column", metavar="CAPTION",
         help="column with the loser's own caption (DCPO); by default the pair shares its caption")
    flag("--max_train_samples", type=int, metavar="N", help="use the first N pairs only")
    flag("--resolution", type=int, nargs="+", default=[1024], metavar="SIDE",
         help="images are resized to cover a square of this side, keeping the aspect, and the "
         "square is cut (MaPO); of several, a pair gets the largest that enlarges neither image, "
         "and grids are painted at the first")
    flag("--aspect_buckets", action=argparse.BooleanOptionalAction, default=False,
         help="cut a rectangle of about the same area that is nearest to the pair's aspects, "
         "instead of a square; a batch holds pairs of one rectangle")
    flag("--random_crop", action=argparse.BooleanOptionalAction, default=False,
         help="cut at random, at the same relative place in both images, not in the centre")
    flag("--random_flip", action=argparse.BooleanOptionalAction, default=True,
         help="mirror half of the pairs (MaPO)")
    flag("--proportion_empty_prompts", type=float, default=0.0, metavar="P",
         help="share of pairs whose captions are replaced by the empty one")
    flag("--label_noise_prob", type=float, default=0.0, metavar="P",
         help="share of pairs whose label is flipped; 0.5 is the shuffled control")
    flag("--dataloader_num_workers", type=int, default=0, metavar="N",
         help="processes that prepare images; they do not change the result")

    flag = parser.add_argument_group("loss").add_argument
    add_loss_flags(flag)
    flag("--snr_gamma", type=float, metavar="GAMMA",
         help="weigh errors by min(SNR, GAMMA) / SNR, or / (SNR + 1) for v prediction; 5 is usual")
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
    flag("--use_8bit_adam", action=argparse.BooleanOptionalAction, default=False,
         help="keep AdamW's states in 8 bits; needs bitsandbytes")
    flag("--max_grad_norm", type=float, default=1.0, help="gradients are clipped to it (MaPO)")
    flag("--max_bad_steps", type=int, default=10, metavar="N",
         help="stop, with a checkpoint, when the loss or gradients were not finite N steps in a "
         "row; each such step is skipped and counted")
    flag("--seed", type=int, default=0, help="the same seed gives the same run")

    flag = parser.add_argument_group("memory and precision").add_argument
    flag("--mixed_precision", choices=list(DTYPES),
         help="of the computation, and of all that is frozen; what learns stays fp32 (MaPO used "
         "fp16) [what accelerate is configured for]")
    flag("--vae_dtype", choices=list(VAE_DTYPES), default="fp32",
         help="SDXL's own VAE overflows in fp16")
    flag("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=False,
         help="compute activations twice to store fewer (MaPO used it)")
    flag("--allow_tf32", action=argparse.BooleanOptionalAction, default=False,
         help="fp32 matrix products in TF32, on GPUs that have it; convolutions are by PyTorch's "
         "own default")
    flag("--torch_compile", action=argparse.BooleanOptionalAction, default=False,
         help="compile the UNet's transformer blocks; worth its minute from some hundred steps on")

    flag = parser.add_argument_group("seeing").add_argument
    flag("--eval_dataset_name", metavar="NAME",
         help="held-out pairs, as --dataset_name; scored with fixed noise and timesteps")
    flag("--eval_split_name", metavar="SPLIT",
         help="held-out split, of --dataset_name where no --eval_dataset_name comes [validation]")
    flag("--max_eval_samples", type=int, default=256, metavar="N", help="score the first N only")
    flag("--eval_steps", type=int, default=250, metavar="N",
         help="optimizer steps between two scores of the held-out pairs")
    flag("--validation_prompts", nargs="+", metavar="PROMPT",
         help="prompts, or a text file with one per line, painted by the base and by the model at "
         "the start, every --validation_steps and at the end, into validation/")
    flag("--validation_steps", type=int, default=500, metavar="N", help="steps between two grids")
    flag("--validation_inference_steps", type=int, default=30, metavar="N", help="of the sampler")
    flag("--validation_guidance_scale", type=float, default=5.0, help="of the sampler")

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
    flag("--push_to_hub", action=argparse.BooleanOptionalAction, default=False,
         help="upload the result and its card at the end")
    flag("--hub_model_id", metavar="USER/NAME", help="where to; needed with --push_to_hub")
    flag("--hub_private_repo", action=argparse.BooleanOptionalAction,
         help="upload into a private repository; without the flag, a new one is what your "
         "account's settings say, which is public unless you changed them")
    flag("--hub_token", metavar="TOKEN",
         help="the token to upload with, instead of HF_TOKEN or the one that `hf auth login` "
         "stored; other programs on this machine can see it in the command line")
    flag("--report_to", default="tensorboard" if tensorboard else "none",
         help="tracker of accelerate: tensorboard, wandb, ... or none")
    args = parser.parse_args(argv)
    args.output_dir = args.output_dir or f"sdxl-{args.loss}"
    if args.validation_prompts and Path(args.validation_prompts[0]).is_file():
        args.validation_prompts = read_prompts(Path(args.validation_prompts[0]))
    check_args(args)
    token = vars(args).pop("hub_token")  # trackers, cards and files get the other flags to keep
    if token:
        os.environ["HF_TOKEN"] = token
    return args
# fmt: on


def check_args(args: argparse.Namespace) -> None:
    """Raise a ValueError for a flag that cannot mean anything."""
    for resolution in args.resolution:
        if not resolution > 0:
            raise ValueError(f"--resolution is {resolution}; need more than 0")
    positive = (
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
        "lora_rank",
        "lora_alpha",
        "snr_gamma",
        "max_bad_steps",
        "max_eval_samples",
        "eval_steps",
        "validation_steps",
        "validation_inference_steps",
    )
    for name in positive:
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name} is {value}; need more than 0")
    for name in ("label_noise_prob", "proportion_empty_prompts", "ema_decay", "max_refused"):
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; need a share from 0 to 1")
    for name in ("seed", "dataloader_num_workers", "lr_warmup_steps", "inversion_eta"):
        if (getattr(args, name) or 0) < 0:
            raise ValueError(f"--{name} is {getattr(args, name)}; need 0 or more")
    if args.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("--mixed_precision is fp16 on a machine without a GPU; need no or bf16")
    for flag, needed in (
        ("lora_alpha", "lora_rank"),
        ("train_text_encoder", "lora_rank"),
        ("push_to_hub", "hub_model_id"),
        ("hub_private_repo", "push_to_hub"),
    ):
        if getattr(args, flag) and not getattr(args, needed):
            raise ValueError(f"--{flag} came without --{needed}; need both")
    if args.hub_token and args.report_to in ("wandb", "all"):
        raise ValueError(
            f"--hub_token came with --report_to {args.report_to}, and wandb keeps command lines; "
            "need HF_TOKEN in the environment, or `hf auth login`, instead"
        )
    # What is cached was cut in the centre, and there is nothing in a stream to go through twice.
    for flag, other in (
        ("latent_cache", "random_crop"),
        ("latent_cache", "streaming"),
        ("streaming", "aspect_buckets"),
        ("streaming", "check_data"),
        ("streaming", "num_train_epochs"),
    ):
        if getattr(args, flag) and getattr(args, other):
            raise ValueError(f"--{flag} and --{other} came; need one of them without the other")
    if args.streaming and len(args.resolution) > 1:
        raise ValueError(f"--streaming came with --resolution {args.resolution}; need one side")
    if args.streaming and args.dataloader_num_workers > 1:
        raise ValueError(
            f"--streaming came with --dataloader_num_workers {args.dataloader_num_workers}; need 0 "
            "or 1: several would change the order"
        )
    check_layout(args)
    Objective(args)
    inversion_options(args)


def check_resolutions(resolutions: list[int], factor: int) -> None:
    """Raise a ValueError where the images would not halve evenly down to the UNet's middle."""
    for resolution in resolutions:
        if resolution % factor:
            raise ValueError(
                f"--resolution is {resolution}; this VAE and UNet need a multiple of {factor}, "
                f"such as {max(factor, resolution // factor * factor)}"
            )
