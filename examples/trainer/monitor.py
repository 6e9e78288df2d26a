"""Looks at a run from time to time, in comparison with the base model it began from: held-out pairs
are scored, and prompts are painted."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from PIL import Image

from trainer.evaluate import HeldOut, Scores
from trainer.metrics import append_metrics, truncate_metrics
from trainer.plots import write_grid
from trainer.sampling import Painter
from trainer.signals import Stop

Model = Callable[[], AbstractContextManager[Any]]  # a UNet, for as long as the context lasts


class CutShort(Exception):
    """A signal came while the model was looked at."""


@contextmanager
def unless(asked: Callable[[], bool], unet: torch.nn.Module) -> Iterator[None]:
    """Raise `CutShort` at the next call of the UNet once `asked()`."""

    def check(*_: Any) -> None:
        if asked():
            raise CutShort

    hook = unet.register_forward_pre_hook(check)
    try:
        yield
    finally:
        hook.remove()


class Watch:
    """Looks at the model when it is time to; all processes call it at the same steps."""

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        stop: Stop,
        heldout: HeldOut | None,
        painter: Painter | None,
        scheduler: Any,
        now: Model,
        base: Model,
        text_encoders: Sequence[Any],
    ) -> None:
        """`now` and `base` give the model as it is and was; `text_encoders` come if they learn."""
        self.args, self.accelerator, self.stop = args, accelerator, stop
        self.heldout, self.painter, self.scheduler = heldout, painter, scheduler
        self.now, self.base, self.text_encoders = now, base, text_encoders
        self.rows_path = Path(args.output_dir) / "eval.jsonl"
        self.grids = Path(args.output_dir) / "validation"
        self.base_scores: Scores | None = None
        self.base_pictures: list[Image.Image] = []
        self.cut_short = False  # the last look, by a signal

    def begin(self, step: int, again: bool = False, last: bool = False) -> None:
        """Learn what the base does, and look at the model before its first step, or `again` where
        the look at `step` was cut short."""
        looks = again or step == 0
        if self.accelerator.is_main_process:
            truncate_metrics(self.rows_path, step - looks)
        if self.heldout is not None:
            with self.base() as unet:
                self.base_scores = self.heldout.score(unet, self.text_encoders)
        if self.painter is not None:
            self.base_pictures = self.paint(self.base)
        if looks:
            self.look(step, last)

    def is_due(self, step: int, last: bool = False) -> bool:
        """Whether there is something to look at."""
        return self.scores_at(step, last) or self.paints_at(step, last)

    def scores_at(self, step: int, last: bool) -> bool:
        return self.heldout is not None and (last or step % self.args.eval_steps == 0)

    def paints_at(self, step: int, last: bool) -> bool:
        return self.painter is not None and (last or step % self.args.validation_steps == 0)

    def look(self, step: int, last: bool = False) -> None:
        """Score and paint, as far as this step is one to do it at, until a signal comes."""
        self.cut_short = False
        try:
            self.score_and_paint(step, last)
        except CutShort:
            self.cut_short = True

    def score_and_paint(self, step: int, last: bool) -> None:
        if self.scores_at(step, last):
            assert self.heldout is not None
            assert self.base_scores is not None
            scores = self.base_scores  # which a run begins from
            if step:
                with self.now() as unet, unless(self.stop.agreed, unet):
                    scores = self.heldout.score(unet, self.text_encoders)
            row = HeldOut.row(scores, self.base_scores)
            if self.accelerator.is_main_process:
                append_metrics(self.rows_path, [{"step": step, **row}])
            self.accelerator.log({f"eval/{name}": value for name, value in row.items()}, step=step)
        if self.paints_at(step, last):
            assert self.painter is not None
            columns = {"base": self.base_pictures}
            if step:
                columns[f"step {step}"] = self.paint(self.now)
            if self.accelerator.is_main_process:
                self.grids.mkdir(exist_ok=True)
                write_grid(columns, self.painter.prompts, self.grids / f"step-{step}.png")

    def last_grid(self, step: int) -> list[Path]:
        """The grid that was painted at this step, if one was."""
        path = self.grids / f"step-{step}.png"
        return [path] if path.exists() else []

    def paint(self, model: Model) -> list[Image.Image]:
        """The prompts as the model paints them: by one process, or where a model is in parts, by
        all, who have to work together."""
        assert self.painter is not None
        with model() as unet:
            pictures: list[Image.Image] = []
            sharded = self.accelerator.distributed_type == DistributedType.FSDP
            asked = self.stop.agreed if sharded else self.stop.asked
            try:
                if sharded or self.accelerator.is_main_process:
                    bare = self.accelerator.unwrap_model(unet)
                    encoders = [self.accelerator.unwrap_model(each) for each in self.text_encoders]
                    with unless(asked, bare):
                        pictures = self.painter.paint(bare, self.scheduler.config, encoders)
            finally:
                self.accelerator.wait_for_everyone()
        return pictures
