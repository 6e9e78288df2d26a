"""The losses that the study compares, what was tried of each, and how a setting is chosen.

A setting is a learning rate `lr` and keyword arguments of the loss. Every method has TRIALS of
them, the same for every style; `choose` picks one per style from what the trials gave.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastpref

TRIALS = 4
TUNING_CSV = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "mismatch_tuning.csv"
Setting = dict[str, float]


class Rewards(NamedTuple):
    """The judge's probability, (B,) each, that a picture shows its digit in the wanted style."""

    w: Tensor
    l: Tensor


Output = fastpref.LossOutput | fastpref.SampleOutput


class Method(NamedTuple):
    """A loss of fastpref as the study calls it."""

    loss: Callable[..., Output]
    settings: list[Setting]
    needs_ref: bool = True
    fixed: Mapping[str, Any] = MappingProxyType({})
    from_rewards: Callable[[Rewards], dict[str, Tensor]] | None = None
    group: int = 2  # images that the loss takes together: 1 is unpaired, 2 a pair, 4 a list
    fits_winner: bool = False  # it also lowers the winner's error for its own sake

    @property
    def is_dpo(self) -> bool:
        """It compares with a reference, and nothing else holds the winner."""
        return self.needs_ref and not self.fits_winner

    def call(self, rewards: Rewards, *tensors: Tensor, **knobs: Any) -> Output:
        """The loss of predictions, target and, where it needs them, the reference's predictions.

        Rows are B winners, then B losers; a list is the images of pairs i and B / 2 + i.
        """
        if self.group > 2:
            tensors = tuple(_by_list(tensor, self.group) for tensor in tensors)
        if self.from_rewards:
            knobs |= self.from_rewards(rewards)
        return self.loss(*tensors, **self.fixed, **knobs)

    def metrics(self, out: Output) -> dict[str, Tensor]:
        """Those of a loss on pairs, whatever the loss: errors of winners and losers apart."""
        if isinstance(out, fastpref.LossOutput):
            return out.metrics()
        means = {}
        for prefix, errors in (("", out.errors), ("ref_", out.ref_errors)):
            sides = errors.reshape(-1, self.group).T.reshape(2, -1)  # winners, losers
            means[f"{prefix}mse_w"], means[f"{prefix}mse_l"] = sides.mean(1).unbind()
        return out.metrics() | means


def _by_list(rows: Tensor, k: int) -> Tensor:
    """The k images of a list in rows that follow one another, the winners first."""
    return rows.unflatten(0, (k, -1)).transpose(0, 1).flatten(0, 1)


def points(name: str, *pairs: tuple[float, float]) -> list[Setting]:
    """Settings from pairs of a learning rate and a value of the hyper-parameter."""
    return [{"lr": lr, name: value} for lr, value in pairs]


DPO = points("beta", (4e-5, 5000), (4e-5, 20000), (2e-4, 500), (1e-3, 50))
# The same strength, of losses that fold no 1/2 into beta.
UNFOLDED = points("beta", (4e-5, 2500), (4e-5, 10000), (2e-4, 250), (1e-3, 25))
# Of losses that aim for a gap of 1 / (2 beta) in the errors.
SQUARED = points("beta", (4e-5, 5), (4e-5, 50), (2e-4, 50), (1e-3, 5))


def smpo_prob(rewards: Rewards) -> dict[str, Tensor]:
    return {"prob": fastpref.smoothed_preference(rewards.w, rewards.l, low=0.0, high=1.0)}


def capo_delta(rewards: Rewards) -> dict[str, Tensor]:
    return {"delta": rewards.w - rewards.l}


def seppo_sign(rewards: Rewards) -> dict[str, Tensor]:
    return {"sign": torch.where(rewards.l < 0.5, 1.0, -1.0)}


def kto_label(rewards: Rewards) -> dict[str, Tensor]:
    return {"label": torch.cat([torch.ones_like(rewards.w), torch.zeros_like(rewards.l)])}


def rankdpo_score(rewards: Rewards) -> dict[str, Tensor]:
    """The judge's probability itself: where it hardly prefers one image, little is to be learned.

    `fastpref.preferences.win_fractions` of a single judge would set a digit of .999 as far above
    one of .998 as above one of .002.
    """
    return {"score": _by_list(torch.cat(rewards), 4).view(-1, 4)}


# The five that `make study` compares in every style.
MAIN: dict[str, Method] = {
    "SFT": Method(
        fastpref.sft_loss,
        [{"lr": lr} for lr in (1e-4, 4e-4, 1.5e-3, 3e-3)],
        False,
        fixed={"paired": True},
    ),
    "MaPO": Method(
        fastpref.mapo_loss,
        points("num_train_timesteps", (1e-4, 100), (4e-4, 100), (4e-4, 1000), (2e-3, 1000)),
        False,
    ),
    "DPO": Method(fastpref.dpo_loss, DPO),
    "DPO+winner": Method(
        fastpref.dpo_loss,
        points("beta", (1e-4, 50), (1e-4, 500), (4e-4, 50), (2e-3, 500)),
        fixed={"sft_weight": 10.0},
        fits_winner=True,
    ),
    "margin only": Method(
        fastpref.mapo_loss,
        points("num_train_timesteps", (4e-5, 100), (4e-5, 1000), (2e-4, 100), (1e-3, 100)),
        False,
        fixed={"sft_weight": 0.0},
    ),
}


def _of_type(loss_type: str, settings: list[Setting] = DPO, **fixed: float) -> Method:
    return Method(fastpref.dpo_loss, settings, fixed={"loss_type": loss_type, **fixed})


# Other losses that make a better model by themselves: on pairs, on unpaired images, and on lists.
# `npo_loss` and `self_npo_loss` make a worse one, for the other end of guidance, and are not here.
OTHERS: dict[str, Method] = {
    "IPO": _of_type("ipo", SQUARED),
    "hinge": _of_type("hinge"),
    "robust": _of_type("robust", label_smoothing=0.1),
    "cDPO": Method(fastpref.dpo_loss, DPO, fixed={"label_smoothing": 0.1}),
    "EXO": _of_type("exo_pair", label_smoothing=1e-3),
    "NCA": _of_type("nca_pair"),
    "BCO": _of_type("bco_pair"),
    "SPPO": _of_type("sppo_hard", SQUARED),
    "APO-zero": _of_type("apo_zero"),
    "APO-down": _of_type("apo_down"),
    "alpha-DPO": _of_type("alpha"),
    "DMPO": Method(fastpref.dmpo_loss, DPO),
    "SmPO": Method(fastpref.smpo_loss, DPO, fixed={"gamma": 1.0}, from_rewards=smpo_prob),
    "CaPO": Method(fastpref.capo_loss, SQUARED, from_rewards=capo_delta),
    "SePPO": Method(fastpref.seppo_loss, DPO, from_rewards=seppo_sign),
    "budget DPO": Method(fastpref.budget_dpo_loss, DPO),
    "PSO": Method(fastpref.pso_loss, DPO, fixed={"loss_type": "sigmoid"}),
    "PSO hinge": Method(
        fastpref.pso_loss, points("beta", (4e-5, 50), (2e-4, 5), (2e-4, 50), (1e-3, 5)), False
    ),
    "SimPO": Method(
        fastpref.simpo_loss, points("beta", (4e-5, 25), (4e-5, 250), (2e-4, 25), (1e-3, 25)), False
    ),
    "ORPO": Method(
        fastpref.orpo_loss,
        points("logit_scale", (1e-4, 100), (4e-4, 100), (4e-4, 1000), (2e-3, 1000)),
        False,
    ),
    "KTO": Method(fastpref.kto_loss, UNFOLDED, from_rewards=kto_label, group=1),
    "RankDPO": Method(fastpref.rankdpo_loss, UNFOLDED, from_rewards=rankdpo_score, group=4),
    # SFT's learning rates; both ends of the published range of beta, and ten times more.
    "DSPO": Method(
        fastpref.dspo_loss,
        points("beta", (1e-4, 0.05), (1.5e-3, 0.001), (1.5e-3, 0.5), (3e-3, 0.05)),
        fits_winner=True,
    ),
}
METHODS = MAIN | OTHERS


# A run for each picture that `fastpref.health` knows: style, method and setting.
GALLERY: dict[str, tuple[str, str, Setting]] = {
    "healthy": ("invert", "MaPO", {"lr": 2e-3, "num_train_timesteps": 1000}),
    "flat": ("invert", "MaPO", {"lr": 1e-6, "num_train_timesteps": 100}),
    "winner getting worse too": ("thick", "DPO", {"lr": 4e-5, "beta": 5000}),
    "saturated": ("invert", "DPO", {"lr": 4e-5, "beta": 20000}),
    "collapsing": ("invert", "DPO", {"lr": 1e-3, "beta": 50}),
    "over-sharpened": ("thick", "DPO", {"lr": 8e-6, "beta": 50}),
}


def describe(setting: Setting) -> str:
    """A setting in words, such as lr=0.0001 beta=5000."""
    return " ".join(f"{name}={value:g}" for name, value in setting.items())


def read_trials(path: Path = TUNING_CSV) -> list[dict[str, str]]:
    """The rows of a tuning.csv, as `--tune` wrote it.

    Raises: FileNotFoundError.
    """
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def choose(trials: list[dict[str, str]]) -> dict[tuple[str, str], Setting]:
    """The best setting by (style, method).

    Best is the least Frechet distance among those within 0.02 of the best joint success: the noise
    of 300 samples is larger than that.

    Raises: ValueError where a method got other settings than it has now.
    """
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in trials:
        groups.setdefault((row["style"], row["method"]), []).append(row)
    best = {}
    for (style, method), tried in groups.items():
        settings = {describe(setting): setting for setting in METHODS[method].settings}
        if {row["setting"] for row in tried} != set(settings):
            raise ValueError(f"the trials of {method} are not its settings of now: --tune again")
        top = max(float(row["joint"]) for row in tried)
        near = [row for row in tried if float(row["joint"]) >= top - 0.02]
        winner = min(near, key=lambda row: float(row["frechet"]))
        best[style, method] = settings[winner["setting"]]
    return best
