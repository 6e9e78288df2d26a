"""The trainer's arguments: names, defaults and help, in groups."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import yaml
from diffusers.optimization import SchedulerType

from trainer.checks import check_args
from trainer.config import REQUIRED, Parser, arg
from trainer.families.family import DTYPES, VAE_DTYPES, Family
from trainer.families.sdxl import SDXL
from trainer.files import write_whole
from trainer.losses import InversionArguments, LossArguments

ARGS_FILE = "args.yaml"
OPTIMIZERS = ("adamw", "adamw_8bit", "adafactor", "prodigy")
SCHEDULES = [kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT]
TRACKER = "tensorboard" if importlib.util.find_spec("tensorboard") else "none"


# fmt: off
@dataclass(kw_only=True)
class PipelineArguments:
    """Where a pipeline comes from."""

    _argument_group_name = "model"
    pretrained_model_name_or_path: str = arg(REQUIRED, metavar="NAME",
        help="the base, a pipeline: a hub name, a local folder, or one .safetensors file in the "
        "original layout (SD1.5, 2.x, SDXL)")
    pretrained_vae_model_name_or_path: str | None = arg(None, metavar="NAME",
        help="another VAE: a hub name, a local folder, or one .safetensors file")
    pretrained_config_name_or_path: str | None = arg(None, metavar="NAME",
        help="for a base or VAE in one file: the hub name or folder of a pipeline, whose "
        "configurations and tokenizers it has [SDXL's or SD1.5's own, from the hub]")
    prediction_type: str | None = arg(None, choices=["epsilon", "v_prediction"],
        help="what the UNet of SD1.5, 2.x or SDXL predicts; by default what its scheduler says")
    revision: str | None = arg(None, help="revision of the model on the hub")
    variant: str | None = arg(None, help="variant of the model files, such as fp16")


@dataclass(kw_only=True)
class ModelArguments(PipelineArguments):
    """The model, and what of it is trained."""

    _argument_group_name = "model"
    cache_dir: str | None = arg(None, help="where downloads and prepared data sets are kept")
    lora_rank: int | None = arg(None, metavar="R",
        help="train adapters of this rank instead of the whole denoiser; they are also their own "
        "reference: the model without them")
    lora_alpha: float | None = arg(None, metavar="A", help="scale of the adapters times R [R]")
    train_text_encoder: bool = arg(False,
        help="adapters for the CLIP text encoders too; needs --lora_rank")
    use_ema: bool = arg(False,
        help="keep a moving average of what is trained, and save and show that")
    ema_decay: float = arg(0.9999, help="of the moving average, at the most")


@dataclass(kw_only=True)
class DataArguments:
    """The pairs, and what is cut out of their images."""

    _argument_group_name = "data"
    dataset_name: str = arg(REQUIRED, metavar="NAME",
        help="pairs: a hub name, a parquet file or a folder of them, in Pick-a-Pic's columns; a "
        "folder with w/ and l/ and captions; or a .jsonl or .csv of winner, loser, caption")
    dataset_split_name: str = arg("train", metavar="SPLIT", help="the split to train on")
    image_columns: list[str] = arg(["jpg_0", "jpg_1"], metavar="IMAGE",
        help="columns with the images: bytes, an Image feature, or paths")
    label_column: str = arg("label_0", metavar="LABEL",
        help="column that is 1 where image 0 wins, 0 where it loses, 0.5 where nobody does")
    caption_column: str = arg("caption", metavar="CAPTION", help="column with the captions")
    ties: str = arg("drop", choices=["drop", "coin", "keep"],
        help="pairs without a winner: leave them out; toss for it, once for the run; or count "
        "image 0 as the winner, as diffusers' scripts do")
    streaming: bool = arg(False,
        help="read the pairs as they come, for sets that do not fit on the disk")
    max_refused: float = arg(0.01, metavar="P",
        help="share of pairs that may have an image that cannot be used; above it, nothing is "
        "trained. Such pairs are left out, counted, and listed in refused.txt")
    check_data: bool = arg(False,
        help="read all pairs, print what is there and what is wrong with it, draw a sheet of "
        "samples, and train nothing")
    latent_cache: str | None = arg(None, metavar="DIR",
        help="compute the latents' moments and the captions' embeddings once, keep them in DIR, "
        "and train without the VAE and the text encoders")
    latent_cache_dtype: str = arg("fp16", choices=list(VAE_DTYPES), help="of what is kept there")
    loser_caption_column: str | None = arg(None, metavar="CAPTION",
        help="column with the loser's own caption (DCPO); by default the pair shares its caption")
    max_train_samples: int | None = arg(None, metavar="N", help="use the first N pairs only")
    resolution: list[int] = arg(None, metavar="SIDE",
        help="images are resized to cover a square of this side, keeping the aspect, and the "
        "square is cut (MaPO); of several, a pair gets the largest that enlarges neither "
        "image, and grids are sampled at the first [1024; SD1.5 512]")
    aspect_buckets: bool = arg(False,
        help="cut a rectangle of about the same area that is nearest to the pair's aspects, "
        "instead of a square; a batch holds pairs of one rectangle")
    random_crop: bool = arg(False,
        help="cut at random, at the same relative place in both images, not in the centre")
    random_flip: bool = arg(True, help="mirror half of the pairs (MaPO)")
    proportion_empty_prompts: float = arg(0.0, metavar="P",
        help="share of pairs whose captions are replaced by the empty one")
    label_noise_prob: float = arg(0.0, metavar="P",
        help="share of pairs whose label is flipped; 0.5 is the shuffled control")
    dataloader_num_workers: int = arg(0, metavar="N",
        help="processes that prepare images; they do not change the result")


@dataclass(kw_only=True)
class OptimizationArguments:
    """The optimizer, its schedule and the length of the run."""

    _argument_group_name = "optimization"
    train_batch_size: int = arg(8, metavar="PAIRS", help="per device (MaPO)")
    gradient_accumulation_steps: int = arg(2, metavar="N", help="batches per optimizer step (MaPO)")
    max_train_steps: int | None = arg(None, metavar="N",
        help="optimizer steps; overrides --num_train_epochs [2000 if neither is given (MaPO)]")
    num_train_epochs: int | None = arg(None, metavar="N", help="passes over the data")
    learning_rate: float = arg(1e-5, help="after warm-up (MaPO)")
    scale_lr: bool = arg(False,
        help="multiply the learning rate by the pairs in an optimizer step, over all devices")
    lr_scheduler: str = arg("constant", choices=SCHEDULES, metavar="KIND",
        help="a schedule of diffusers.optimization, such as constant, constant_with_warmup, "
        "linear or cosine (MaPO)")
    lr_warmup_steps: int = arg(0, metavar="N", help="for the schedules that have a warm-up (MaPO)")
    optimizer: str = arg("adamw", choices=OPTIMIZERS,
        help="adamw is fused; adamw_8bit keeps its states in 8 bits (bitsandbytes); adafactor "
        "keeps hardly any; prodigy finds the learning rate, and --learning_rate is a factor on it, "
        "by convention 1 (prodigyopt)")
    use_8bit_adam: bool = arg(False, help="the same as --optimizer adamw_8bit")
    adam_beta1: float = arg(0.9, help="of AdamW and Prodigy")
    adam_beta2: float = arg(0.999, help="of AdamW and Prodigy")
    adam_weight_decay: float = arg(1e-2, help="of all optimizers")
    adam_epsilon: float = arg(1e-8, help="of AdamW and Prodigy")
    max_grad_norm: float = arg(1.0, help="gradients are clipped to it (MaPO)")
    max_bad_steps: int = arg(10, metavar="N",
        help="stop, with a checkpoint, when the loss or gradients were not finite N steps in a "
        "row; each such step is skipped and counted")
    seed: int = arg(0, help="the same seed gives the same run")


@dataclass(kw_only=True)
class MemoryArguments:
    """What saves memory and time."""

    _argument_group_name = "memory and precision"
    mixed_precision: str = arg(None, choices=list(DTYPES),
        help="of the computation, and of all that is frozen; what learns stays fp32 (MaPO used "
        "fp16) [what accelerate is configured for]")
    vae_dtype: str = arg("fp32", choices=list(VAE_DTYPES), help="SDXL's own VAE overflows in fp16")
    gradient_checkpointing: bool = arg(False,
        help="compute activations twice to store fewer (MaPO used it)")
    allow_tf32: bool = arg(False,
        help="fp32 matrix products in TF32, on GPUs that have it; convolutions are by PyTorch's "
        "own default")
    torch_compile: bool = arg(False,
        help="compile the denoiser's blocks; worth its minute from some hundred steps on")


@dataclass(kw_only=True)
class MonitoringArguments:
    """Held-out pairs and validation prompts."""

    _argument_group_name = "monitoring"
    eval_dataset_name: str | None = arg(None, metavar="NAME",
        help="held-out pairs, as --dataset_name; scored with fixed noise and timesteps")
    eval_split_name: str | None = arg(None, metavar="SPLIT",
        help="held-out split, of --dataset_name where no --eval_dataset_name comes [validation]")
    max_eval_samples: int = arg(256, metavar="N", help="score the first N only")
    eval_steps: int = arg(250, metavar="N",
        help="optimizer steps between two scores of the held-out pairs")
    validation_prompts: list[str] | None = arg(None, metavar="PROMPT",
        help="prompts, or a text file with one per line, sampled from the base and the model at "
        "the start, every --validation_steps and at the end, into validation/")
    validation_steps: int = arg(500, metavar="N", help="steps between two grids")
    validation_inference_steps: int = arg(30, metavar="N", help="of the sampler")
    validation_guidance_scale: float = arg(5.0, help="of the sampler")


@dataclass(kw_only=True)
class OutputArguments:
    """What a run leaves, and where."""

    _argument_group_name = "output"
    output_dir: str = arg(None, metavar="DIR",
        help="for checkpoint-*, pipeline, metrics.jsonl, curves.png and logs [FAMILY-LOSS]")
    single_file: bool = arg(False,
        help="save the trained pipeline as one .safetensors file in the original layout too, for "
        "ComfyUI and others, in the precision of --mixed_precision; not with --lora_rank")
    checkpointing_steps: int = arg(500, metavar="N",
        help="optimizer steps between checkpoints (MaPO)")
    checkpoints_total_limit: int | None = arg(None, metavar="N",
        help="keep the last N; one more exists while it is being written")
    resume_from_checkpoint: str | None = arg(None, metavar="PATH",
        help='a checkpoint, or "latest": the last whole one, or a fresh start where there is none')
    log_every: int = arg(10, metavar="N",
        help="steps between two reads of the metrics from the device; every step is logged")
    push_to_hub: bool = arg(False, help="upload the result and its card at the end")
    hub_model_id: str | None = arg(None, metavar="USER/NAME",
        help="where to; needed with --push_to_hub")
    hub_private_repo: bool | None = arg(None,
        help="upload into a private repository; without the flag, a new one is what your "
        "account's settings say, which is public unless you changed them")
    hub_token: str | None = arg(None, metavar="TOKEN",
        help="the token to upload with, instead of HF_TOKEN or the one that `hf auth login` "
        "stored; other programs on this machine can see it in the command line")
    report_to: str = arg(TRACKER, help="tracker of accelerate: tensorboard, wandb, ... or none")


# fmt: on
# Dataclasses take the fields of their last base first.
@dataclass(kw_only=True)
class TrainingArguments(
    OutputArguments,
    MonitoringArguments,
    MemoryArguments,
    OptimizationArguments,
    InversionArguments,
    LossArguments,
    DataArguments,
    ModelArguments,
):
    """All arguments of a run, in one object."""


def parse_args(argv: list[str] | None = None, family: Family = SDXL) -> TrainingArguments:
    """Read the command line of a family's trainer, and the file that its --config names.

    Raises a ValueError for a value that cannot mean anything; exits with 2 for a flag that argparse
    refuses.
    """
    parser = Parser(
        TrainingArguments.__bases__[::-1],
        description=f"Align a {family.pipeline.__name__} on preference pairs: its whole "
        f"{family.denoiser}, or adapters (--lora_rank). "
        "Defaults marked MaPO are those of that method's published SDXL recipe; in brackets, a "
        "loss's own.",
    )
    args = TrainingArguments(**parser.parse(argv))
    if args.use_8bit_adam and args.optimizer in ("adamw", "adamw_8bit"):
        args.optimizer, args.use_8bit_adam = "adamw_8bit", False  # kept under one name
    args.output_dir = args.output_dir or f"{family.name}-{args.loss}"
    args.resolution = args.resolution or [family.resolution]
    args.validation_prompts = prompts_of(args.validation_prompts)
    check_args(args)
    # Trackers, cards and files get the other arguments to keep.
    token, args.hub_token = args.hub_token, None
    if token:
        os.environ["HF_TOKEN"] = token
    return args


def prompts_of(words: list[str] | None) -> list[str] | None:
    """The prompts that a flag gives, or those of the file that it names."""
    for word in words or ():
        if word.endswith(".txt") or os.path.isfile(word):  # for which a long prompt is no error
            if len(words or ()) > 1:
                raise ValueError(
                    f"--validation_prompts: {word} is a file; need it alone, or prompts"
                )
            return read_prompts(Path(word))
    return words


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file: one a line, empty lines left out."""
    if not path.is_file():
        raise ValueError(f"{path} is no file; need a text file with one prompt a line")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error}); need it to be") from error
    prompts = [line.strip() for line in text.splitlines()]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise ValueError(f"{path} holds no prompt; need one a line")
    return prompts


def save_args(args: TrainingArguments, folder: Path) -> None:
    """Write the arguments into `folder`, for --config to read; None stands for those left out."""
    values = {name: value for name, value in vars(args).items() if value is not None}
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000)
    write_whole(folder / ARGS_FILE, text.encode())
