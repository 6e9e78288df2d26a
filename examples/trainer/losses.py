"""fastpref's losses and inversions by name: their arguments, and what each needs of the data."""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, make_dataclass
from typing import Any, Literal, TypeAlias

import fastpref
from fastpref import dispatch, grouped, inversion
from fastpref.outputs import SampleOutput
from trainer.config import arg

# What an item is: a winner and a loser; one image, desirable or not; or k images with scores.
Layout: TypeAlias = Literal["pairs", "samples", "lists"]
Functions: TypeAlias = Mapping[str, Callable[..., Any]]

Output: TypeAlias = fastpref.LossOutput | SampleOutput
MODULES: dict[str, Layout] = {
    f"{fastpref.losses.__name__}.{layout}": layout for layout in ("pairs", "samples", "lists")
}
LOSSES: dict[str, Callable[..., Output]] = {
    name.removesuffix("_loss"): function
    for module in MODULES
    for name, function in sorted(vars(importlib.import_module(module)).items())
    if name.endswith("_loss") and name[0] != "_" and function.__module__ == module
}
INVERSIONS: dict[str, Callable[..., inversion.Inverted]] = {
    "ddim": inversion.ddim_inversion,
    "renoise": inversion.renoise_inversion,
}

# Flags that the loss gets as they are, under the same name, where they are given: those that many
# losses have, and, from `own_options`, those of one or two.
OPTIONS = {
    "beta": "strength of the preference",
    "loss_type": "variant of the loss",
    "label_smoothing": "probability that a label is wrong",
    "loser_weight": "factor on the loser's part of the margin",
    "sft_weight": "weight of the winner's error, beside the preference",
    "prior_weight": "weight of the loser's error, which is pulled down",
    "huber_c": "where errors turn from quadratic to linear",
    "logit_scale": "factor on the margin",
    "utility": "kto: variant of the loss",
}
# Flags from which another argument of the loss is made.
SOURCES = {
    "score_columns": ("prob", "delta", "score", "label", "real"),
    "label_threshold": ("threshold", "label", "real"),
    "list_size": ("lengths",),
    "score_range": ("prob",),
    "sign_column": ("sign",),
}
INVERSION_OPTIONS = {
    "inversion_steps": "num_steps",
    "inversion_evals": "num_evals",
    "inversion_eta": "eta",
}


def layout_of(loss: str) -> Layout:
    """What the loss is trained on."""
    return MODULES[LOSSES[loss].__module__]


@functools.cache
def parameters(function: Callable[..., Any]) -> dict[str, Any]:
    """The arguments a function takes, with their defaults; None for those behind its **knobs."""
    known = inspect.signature(function).parameters
    defaults = {name: argument.default for name, argument in known.items()}
    if "knobs" not in known:
        return defaults
    (kind,) = re.findall(r"Unpack\[(\w+)\]", known["knobs"].annotation)
    known_knobs = getattr(dispatch, kind, None) or getattr(grouped, kind)
    return dict.fromkeys(known_knobs.__annotations__) | defaults


def described(function: Callable[..., Any], name: str) -> str:
    """The first clause of what a function's docstring says of an argument."""
    text = inspect.cleandoc(function.__doc__ or "")
    found = re.search(
        rf"^    (?:\w+, )*{name}(?:, \w+)*: (.+?)[.;](?:\s|$)", text, re.MULTILINE | re.DOTALL
    )
    return " ".join(found[1].split()).replace("%", "%%") if found else ""


def own_options() -> dict[str, str]:
    """The numbers that only some losses have, and what these say of them."""
    found: dict[str, list[str]] = {}
    for loss, function in LOSSES.items():
        for name, argument in inspect.signature(function).parameters.items():
            number = argument.kind is argument.KEYWORD_ONLY and "Scalar" in argument.annotation
            if number and name not in OPTIONS and name != "num_train_timesteps":
                found.setdefault(name, []).append(f"{loss}: {described(function, name)}")
    return {name: "; ".join(texts) for name, texts in found.items()}


OPTIONS |= own_options()


def check_taken(
    args: argparse.Namespace, flag: str, chooser: str, functions: Functions, *names: str
) -> None:
    """Raise a ValueError if `flag` came and is for none of the arguments that the function has
    which --`chooser` names."""
    choice = getattr(args, chooser)
    takers = [key for key, function in functions.items() if {*names} & {*parameters(function)}]
    if getattr(args, flag) is not None and choice not in takers:
        raise ValueError(
            f"--{flag} came, but --{chooser} {choice} does not take it; need --{chooser} "
            f"{' or '.join(takers)}"
        )


def option_field(name: str, text: str) -> tuple[str, Any, Any]:
    """The flag of a loss's option, with the losses' own defaults in brackets."""
    defaults = {loss: parameters(function).get(name) for loss, function in LOSSES.items()}
    own = ", ".join(f"{loss} {value}" for loss, value in defaults.items() if value is not None)
    kind = str if name in ("loss_type", "utility") else float
    return name, kind | None, arg(None, f"{text} [{own}]" if own else text)


# fmt: off
LossArguments: Any = make_dataclass(
    "LossArguments",
    [
        ("loss", str, arg("mapo", choices=list(LOSSES),
         help="one of fastpref's, where each is documented; sft, the winners alone, is the usual "
         "control. "
         + "; ".join(f"{', '.join(name for name in LOSSES if layout_of(name) == layout)} train on "
                     f"{text}" for layout, text in (("samples", "single images with labels"),
                                                    ("lists", "lists of images with scores"))))),
        *(option_field(name, text) for name, text in OPTIONS.items()),
        ("score_columns", list[str] | None, arg(None, metavar="SCORE",
         help="columns with the scores of jpg_0 and jpg_1: for smpo a reward, for capo a "
         "calibrated one, from 0 to 1; a score stays with its image where label noise flips a "
         "label. On samples, the column of the score [score]; on lists, that of the list's scores "
         "[scores], of each image's where they are rows [score], or one for each image column")),
        ("label_threshold", float | None, arg(None, metavar="SCORE",
         help="on samples: from this score on, one is desirable; without it, a column says so. "
         "tgo needs it, such as the median of all scores")),
        ("list_size", int | None, arg(None, metavar="K",
         help="on lists: images in each, where the data have one image a row")),
        ("score_range", list[float] | None, arg(None, metavar=("LOW", "HIGH"),
         help="smpo: the reward's range over the data [PickScore's on Pick-a-Pic]")),
        ("sign_column", str | None, arg(None, metavar="SIGN",
         help="seppo: column with 1 where the loser is to be pushed away and -1 where it is to be "
         "pulled up [1 for all]")),
        ("loss_impl", str, arg("auto", choices=["auto", "triton", "torch"],
         help="auto: fused Triton kernels on a GPU that has them, else plain PyTorch")),
        ("snr_gamma", float | None, arg(None, metavar="GAMMA",
         help="weigh errors by min(SNR, GAMMA) / SNR, or / (SNR + 1) for v prediction; 5 is "
         "usual")),
    ],
    namespace={"__doc__": "The loss, and what depends on it.", "_argument_group_name": "loss"},
    kw_only=True,
)


@dataclass(kw_only=True)
class InversionArguments:
    """The inversion, and what depends on it."""

    _argument_group_name = "inversion"
    inversion: str = arg("none", choices=["none", *INVERSIONS],
        help="train each image at the noisy latents where the model itself would have passed "
        "it: ddim, with --loss dpo, is InPO; renoise, with --loss smpo, is SmPO")
    inversion_steps: int | None = arg(None, metavar="N", help="steps to each timestep [10]")
    inversion_evals: int | None = arg(None, metavar="N",
        help="renoise: evaluations per step [2]")
    inversion_eta: float | None = arg(None, metavar="ETA",
        help="ddim: weight of fresh noise; InPO has 0.1 [0]")
# fmt: on


def inversion_options(args: argparse.Namespace) -> dict[str, Any]:
    """What the inversion gets of the flags. Raises a ValueError for one that it does not take."""
    for flag, name in INVERSION_OPTIONS.items():
        check_taken(args, flag, "inversion", INVERSIONS, name)
    given = {name: getattr(args, flag) for flag, name in INVERSION_OPTIONS.items()}
    return {name: value for name, value in given.items() if value is not None}


def check_layout(args: argparse.Namespace) -> None:
    """Raise a ValueError for flags that only pairs have a use for."""
    layout = layout_of(args.loss)
    for flag in ("streaming", "loser_caption_column"):
        if layout != "pairs" and getattr(args, flag):
            raise ValueError(
                f"--{flag} came with --loss {args.loss}, which trains on {layout}; need a loss on "
                "pairs"
            )
    if layout == "pairs" and len(args.score_columns or "12") != 2:
        raise ValueError(f"--score_columns are {args.score_columns}; need two, of jpg_0 and jpg_1")
    if layout == "samples" and args.score_columns and args.label_threshold is None:
        raise ValueError("--score_columns came without --label_threshold; need both, of samples")
    if args.list_size is not None and not 2 <= args.list_size <= 16:
        raise ValueError(f"--list_size is {args.list_size}; need 2 to 16")
