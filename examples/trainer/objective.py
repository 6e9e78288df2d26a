"""The objective of a run: its loss, how noise is found, and what the loss takes of a batch."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import fastpref
from fastpref import dispatch, inversion
from fastpref.outputs import SampleOutput
from trainer.families.family import Family
from trainer.families.process import min_snr, repeated
from trainer.losses import (
    INVERSIONS,
    LOSSES,
    OPTIONS,
    SOURCES,
    InversionArguments,
    LossArguments,
    Output,
    check_taken,
    inversion_options,
    layout_of,
    parameters,
)


def objective_of(loss: str, scheduler: Any = None, **options: Any) -> Objective:
    """An objective by its name, with these of the flags."""
    args = argparse.Namespace(
        **vars(LossArguments(loss=loss, **options)), **vars(InversionArguments())
    )
    return Objective(args, scheduler=scheduler)


class Objective:
    """The loss that the flags ask for, and how what it trains on gets its noise.

    needs_reference: the loss compares with a frozen model. inverts: noisy latents are found by the
    model itself.
    """

    def __init__(
        self, args: argparse.Namespace, family: Family | None = None, scheduler: Any = None
    ) -> None:
        """Raises a ValueError for a flag that the loss does not take, or not with this value, or
        that the family has no use for."""
        for flag, given in (("inversion", args.inversion != "none"), ("snr_gamma", args.snr_gamma)):
            if given and family is not None and not family.process.has_alphas:
                raise ValueError(
                    f"--{flag} came with {family.name}, which is trained by flow matching; it "
                    "needs a noise schedule with alphas, as SD1.5 and SDXL have"
                )
        for flag in OPTIONS:
            check_taken(args, flag, "loss", LOSSES, flag)
        check_taken(args, "snr_gamma", "loss", LOSSES, "sample_weight")
        for flag, names in SOURCES.items():
            check_taken(args, flag, "loss", LOSSES, *names)
        self.loss, self.impl = LOSSES[args.loss], args.loss_impl
        self.layout = layout_of(args.loss)
        self.score_range = dict(zip(("low", "high"), args.score_range or (), strict=False))
        self.takes = {*parameters(self.loss)}
        given = {name: getattr(args, name) for name in OPTIONS}
        self.options = {name: value for name, value in given.items() if value is not None}
        if "num_train_timesteps" in self.takes:
            steps = 1000 if scheduler is None else scheduler.config.num_train_timesteps
            self.options["num_train_timesteps"] = steps
        if "paired" in self.takes:  # losers are measured, and not trained on
            self.options["paired"] = True
        if {"prob", "delta"} & self.takes and args.score_columns is None:
            raise ValueError(f"--loss {args.loss} needs --score_columns")
        if "threshold" in self.takes and args.label_threshold is None:
            raise ValueError(f"--loss {args.loss} needs --label_threshold")
        self.threshold = args.label_threshold
        self.gathers = False  # kto's kl over all processes: not in the trial below
        self.snr_gamma = args.snr_gamma
        self.inverts = args.inversion != "none"
        self.inversion = INVERSIONS.get(args.inversion)
        self.inversion_options = inversion_options(args)
        # Inversion looks at the alphas and timesteps on the host; another copy of the scheduler
        # follows the latents to their device.
        self.scheduler = copy.deepcopy(scheduler) if self.inverts else None
        # The loss knows best which values are good: ask it with a pair of zeros, before training.
        pair = torch.zeros(2, 1)
        batch = {"scores": torch.zeros(2), "labels": torch.tensor([1.0, 0.0])}
        batch["timesteps"] = torch.zeros(1)
        self.needs_reference = False
        try:
            try:
                self(pair, pair, None, batch, impl="torch")
            except dispatch.MissingReference:
                self.needs_reference = True
                self(pair, pair, pair, batch, impl="torch")
        except (TypeError, ValueError) as error:
            raise ValueError(f"--loss {args.loss}: {error}") from error
        self.gathers = "kl" in self.takes and "kl" not in self.options

    def invert(
        self, model: inversion.Model, latents: Tensor, timesteps: Tensor, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Noisy latents and targets, (mB, ...) both, where each image's noise is the one that the
        model itself finds in it at the timestep (B,) that a pair shares, which is on the host."""
        assert self.inversion is not None
        options = dict(self.inversion_options)
        if options.get("eta"):  # of a stream that Draws has not drawn from
            options["generator"] = torch.Generator().manual_seed(seeds[0] + 1)
        every = repeated(timesteps, latents)
        return self.inversion(model, latents, every, self.scheduler, **options)

    def weight(self, scheduler: Any, timesteps: Tensor) -> Tensor | None:
        """The weights of the pairs' errors, if --snr_gamma asks for some."""
        return min_snr(scheduler, timesteps, self.snr_gamma) if self.snr_gamma else None

    def __call__(
        self,
        model_pred: Tensor,
        target: Tensor,
        ref_pred: Tensor | None,
        batch: Mapping[str, Any],
        sample_weight: Tensor | None = None,
        impl: str | None = None,
    ) -> Output:
        """The loss of a batch; what it takes of each item is made of the batch's columns."""
        given = {"ref_pred": ref_pred, "sample_weight": sample_weight}
        options = self.options | {name: value for name, value in given.items() if value is not None}
        options |= {"impl": impl or self.impl} | getattr(self, f"of_{self.layout}")(batch)
        if self.layout == "lists":  # which are wanted with the images of a prompt in a row
            lists = len(batch["timesteps"])
            model_pred, target = by_prompt(model_pred, lists), by_prompt(target, lists)
            if ref_pred is not None:
                options["ref_pred"] = by_prompt(ref_pred, lists)
        spread = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self.gathers and spread:
            with torch.no_grad():
                before = self.loss(model_pred.detach(), target, **options, kl=0.0)
            assert isinstance(before, SampleOutput)
            options["kl"] = fastpref.batch_kl(before.drops)
        return self.loss(model_pred, target, **options)

    def of_pairs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """What the loss takes of each pair."""
        found: dict[str, Tensor] = {}
        if "prob" in self.takes:
            scores = batch["scores"].chunk(2)
            found["prob"] = fastpref.smoothed_preference(*scores, **self.score_range)
        if "delta" in self.takes:
            score_w, score_l = batch["scores"].chunk(2)
            found["delta"] = score_w - score_l
        if "sign" in batch:
            found["sign"] = batch["sign"]
        return found

    def of_samples(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What the loss takes of each sample."""
        known = {"label": batch["labels"], "real": batch["labels"], "score": batch.get("scores")}
        known["threshold"] = self.threshold
        return {name: value for name, value in known.items() if name in self.takes}

    def of_lists(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """What the loss takes of each list: its scores, (B, k)."""
        return {"score": batch["scores"].view(-1, len(batch["timesteps"])).T}

    def metrics(self, out: Output, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The loss's own, and of samples those of either kind: its share of them, and its drop,
        summed up and over the number of all, so that it can be averaged before it is divided."""
        metrics = out.metrics()
        if isinstance(out, SampleOutput) and self.layout == "samples":
            desirable = batch["labels"].to(out.drops, non_blocking=True)
            for kind, label in (("desirable", desirable), ("undesirable", 1 - desirable)):
                metrics[kind] = label.mean()
                metrics[f"drop_{kind}"] = (label * out.drops).mean()
        return metrics


def by_prompt(values: Tensor, lists: int) -> Tensor:
    """The values of B lists' images, all first ones first, with those of each list in a row."""
    return values.unflatten(0, (-1, lists)).transpose(0, 1).flatten(0, 1)
