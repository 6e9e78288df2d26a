"""The whole story in six minutes on two cores: data, model, MaPO, and whether it learned."""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

import trainer.loop
from toy.figures import plot_grid, plot_scores, score_table
from toy.model import SIZE, make_model
from toy.photo_pairs import write_photo_groups, write_photo_pairs
from trainer.args import parse_args as parse_training_args
from trainer.data.sources import load_pairs
from trainer.entry import Parser
from trainer.evaluate import score_pairs
from trainer.families.all import FAMILIES
from trainer.families.family import Family

# Of a base and of MaPO; at 1e-3 the small transformer of SD3 does not learn to tell pairs apart.
LEARNING_RATES = {"sdxl": 1e-3, "sd15": 1e-3, "sd3": 3e-4}


class Recipe(NamedTuple):
    """A loss that the demo shows, and how."""

    title: str
    split: str  # that it is trained on
    steps: int
    shuffled: str  # --label_noise_prob of labels that say nothing
    flags: tuple[str, ...] = ()


RECIPES = {
    "mapo": Recipe("MaPO", "train", 600, "0.5"),
    "kto": Recipe(
        "KTO", "samples", 300, "0.5",
        ("--loss", "kto", "--beta", "20", "--lambda_undesirable", "0.5", "--learning_rate", "1e-3",
         "--train_batch_size", "24"),
    ),
    "rankdpo": Recipe(
        "RankDPO", "lists", 300, "1",
        ("--loss", "rankdpo", "--beta", "100", "--learning_rate", "1e-3",
         "--train_batch_size", "6"),
    ),
}  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the flags; the defaults are the demo."""
    parser = Parser(
        description="Align a small model on pairs of real photographs, on a CPU and offline. "
        "Interrupted and started again, it goes on from where it was.",
    )
    flag = parser.add_argument
    flag("--output_dir", default="demo", help="everything is left here; remove it to start afresh")
    flag("--family", choices=list(FAMILIES), default="sdxl", help="of the model")
    flag("--loss", choices=list(RECIPES), default="mapo", help="what is shown to learn")
    flag("--controls", action="store_true", help="a third run: SFT, on the winners alone")
    flag("--train_pairs", type=int, default=6000, help="pairs to train on")
    flag("--heldout_pairs", type=int, default=192, help="pairs of unseen photographs to score")
    flag(
        "--seed",
        type=int,
        default=0,
        help="of crops, weights and order; each seed holds out four other photographs",
    )
    flag("--vae_steps", type=int, default=300, help="to fit the VAE")
    flag("--base_steps", type=int, default=200, help="to make the base model")
    flag("--max_train_steps", type=int, help="of the loss, and of a control [MaPO 600, else 300]")
    args = parser.parse_args(argv)
    args.max_train_steps = args.max_train_steps or RECIPES[args.loss].steps
    return args


def train(
    args: argparse.Namespace, source: Path, output_dir: Path, steps: int, *flags: str
) -> Path:
    """Run the trainer, or go on with it, and return the pipeline it saved.

    All runs share a cache: they have the same pictures, VAE and text encoders.
    """
    data = Path(args.output_dir) / "data"
    settings = {
        "pretrained_model_name_or_path": source,
        "dataset_name": data,
        "cache_dir": data / "cache",
        "latent_cache": data / "latents",
        "eval_split_name": "heldout",
        "eval_steps": 100,
        "output_dir": output_dir,
        "resolution": SIZE,
        "train_batch_size": 12,
        "gradient_accumulation_steps": 1,
        "max_train_steps": steps,
        "learning_rate": LEARNING_RATES[args.family],
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 20,
        "seed": args.seed,
        "checkpointing_steps": 100,
        "checkpoints_total_limit": 2,
        "resume_from_checkpoint": "latest",
    }
    argv = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    pipeline = output_dir / "pipeline"
    if not pipeline.exists():
        family = FAMILIES[args.family]
        trainer.loop.main(parse_training_args([*argv, *flags], family), family)
    return pipeline


def load(family: Family, folder: Path) -> Any:
    """Open a pipeline quietly."""
    pipeline = family.pipeline.from_pretrained(folder, **family.options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main(args: argparse.Namespace) -> None:
    """Make data and model, score, train, score again, and show what changed."""
    began = time.monotonic()
    warnings.filterwarnings("ignore")
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
    folder, family = Path(args.output_dir), FAMILIES[args.family]
    data = folder / "data"

    if not (data / "heldout.parquet").exists():
        write_photo_pairs(data, args.train_pairs, args.heldout_pairs, SIZE, args.seed)
    recipe = RECIPES[args.loss]
    if not (data / f"{recipe.split}.parquet").exists():
        write_photo_groups(data, args.train_pairs, args.train_pairs // 4, SIZE, args.seed)
    train_rows = load_pairs(str(data), "train", cache_dir=str(data / "cache"))
    heldout = load_pairs(str(data), "heldout", cache_dir=str(data / "cache"))

    model = folder / "base" / "untrained"
    if not model.exists():
        make_model(family, train_rows, model, args.vae_steps, args.seed)
    # Half of the labels flipped and no margin: plain denoising of photographs and losers alike.
    base = train(args, model, folder / "base", args.base_steps,
                 "--loss", "sft", "--label_noise_prob", "0.5")  # fmt: skip
    captions = list(dict.fromkeys(heldout["caption"]))
    painted = ["--validation_prompts", *captions, "--validation_steps", "300"]
    result = folder if args.loss == "mapo" else folder / args.loss
    flags = [*recipe.flags, "--dataset_split_name", recipe.split]
    trained = train(args, base, result, args.max_train_steps, *flags, *painted)
    pipelines = {"base": base, recipe.title: trained}
    # The same run on labels that say nothing: what rises here too does not come from preference.
    pipelines["shuffled labels"] = train(
        args, base, result / "shuffled", args.max_train_steps, *flags,
        "--label_noise_prob", recipe.shuffled,
    )  # fmt: skip
    if args.controls:
        pipelines["SFT on winners"] = train(
            args, base, folder / "sft", args.max_train_steps, "--loss", "sft"
        )

    scores = {
        name: score_pairs(family, load(family, path), heldout, SIZE)
        for name, path in pipelines.items()
    }
    text = score_table(scores)
    (result / "table.txt").write_text(text + "\n")
    plot_scores(scores, result / "scores.png")
    before, after = load(family, base), load(family, trained)
    plot_grid(before, after, heldout, result / "grid.png", recipe.title)
    print(
        f"\n{text}\n\naccuracy = share of pairs and timesteps where the photograph is denoised "
        "with the smaller error;\n± = standard error over pairs; change = paired with the base.\n"
        "A model this small paints texture rather than pictures: in grid.png before and after "
        "differ little;\nthe table and scores.png show what was learned.\n"
        f"{result}/ holds pipeline, checkpoint-*, curves.png (held-out pairs in it), scores.png, "
        f"grid.png, validation/ and table.txt "
        f"({time.monotonic() - began:.0f} s)."
    )
