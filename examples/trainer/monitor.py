"""A run's evaluation from time to time, against the base model that it began from: scores of
held-out pairs, and pictures of prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from PIL import Image

from trainer.args import TrainingArguments
from trainer.evaluate import HeldOut, Scores
from trainer.metrics import append_metrics, truncate_metrics
from trainer.plots import write_grid
from trainer.sampling import PromptSampler
from trainer.signals import Stop
from trainer.step import Models

Model = Callable[[], AbstractContextManager[Models]]  # for as long as the context lasts


class CutShort(Exception):
    """A signal came while the model was looked at."""


@contextmanager
def unless(asked: Callable[[], bool], denoiser: torch.nn.Module) -> Iterator[None]:
    """Raise `CutShort` at the next call of the denoiser once `asked()`."""

    def check(*_: Any) -> None:
        if asked():
            raise CutShort

    hook = denoiser.register_forward_pre_hook(check)
    try:
        yield
    finally:
        hook.remove()


class Monitor:
    """Evaluates the model when it is time to; all processes call it at the same steps."""

    def __init__(
        self,
        args: TrainingArguments,
        accelerator: Accelerator,
        stop: Stop,
        heldout: HeldOut | None,
        sampler: PromptSampler | None,
        now: Model,
        base: Model,
    ) -> None:
        """`now` and `base` give the models as they are and were."""
        self.args, self.accelerator, self.stop = args, accelerator, stop
        self.heldout, self.sampler, self.now, self.base = heldout, sampler, now, base
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
            with self.base() as models:
                self.base_scores = self.heldout.score(models)
        if self.sampler is not None:
            self.base_pictures = self.sample(self.base)
        if looks:
            self.look(step, last)

    def is_due(self, step: int, last: bool = False) -> bool:
        """Whether there is something to look at."""
        return self.scores_at(step, last) or self.samples_at(step, last)

    def scores_at(self, step: int, last: bool) -> bool:
        return self.heldout is not None and (last or step % self.args.eval_steps == 0)

    def samples_at(self, step: int, last: bool) -> bool:
        return self.sampler is not None and (last or step % self.args.validation_steps == 0)

    def look(self, step: int, last: bool = False) -> None:
        """Score and sample, as far as this step is one to do it at, until a signal comes."""
        self.cut_short = False
        try:
            self.score_and_sample(step, last)
        except CutShort:
            self.cut_short = True

    def score_and_sample(self, step: int, last: bool) -> None:
        if self.scores_at(step, last):
            assert self.heldout is not None
            assert self.base_scores is not None
            scores = self.base_scores  # which a run begins from
            if step:
                with self.now() as models, unless(self.stop.agreed, models.denoiser):
                    scores = self.heldout.score(models)
            row = HeldOut.row(scores, self.base_scores)
            if self.accelerator.is_main_process:
                append_metrics(self.rows_path, [{"step": step, **row}])
            self.accelerator.log({f"eval/{name}": value for name, value in row.items()}, step=step)
        if self.samples_at(step, last):
            assert self.sampler is not None
            columns = {"base": self.base_pictures}
            if step:
                columns[f"step {step}"] = self.sample(self.now)
            if self.accelerator.is_main_process:
                self.grids.mkdir(exist_ok=True)
                write_grid(columns, self.sampler.prompts, self.grids / f"step-{step}.png")
                log_pictures(self.accelerator, [*columns.values()][-1], step)

    def last_grid(self, step: int) -> list[Path]:
        """The grid that was sampled at this step, if one was."""
        path = self.grids / f"step-{step}.png"
        return [path] if path.exists() else []

    def sample(self, model: Model) -> list[Image.Image]:
        """Pictures of the prompts by the model: from one process, or where a model is in parts,
        from all, who have to work together."""
        assert self.sampler is not None
        with model() as models:
            pictures: list[Image.Image] = []
            sharded = self.accelerator.distributed_type == DistributedType.FSDP
            asked = self.stop.agreed if sharded else self.stop.asked
            unwrap = self.accelerator.unwrap_model
            try:
                if sharded or self.accelerator.is_main_process:
                    bare = unwrap(models.denoiser)
                    learning = models.encoders.text_encoders if models.text_learns else []
                    with unless(asked, bare):
                        pictures = self.sampler.sample(
                            bare, models.scheduler.config, [unwrap(each) for each in learning]
                        )
            finally:
                self.accelerator.wait_for_everyone()
        return pictures


def log_pictures(accelerator: Accelerator, pictures: Sequence[Image.Image], step: int) -> None:
    """Give the pictures to those trackers that take some."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            stacked = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
            tracker.log_images({"validation": stacked}, step, dataformats="NHWC")
        elif hasattr(tracker, "log_images"):
            tracker.log_images({"validation": [*pictures]}, step)
