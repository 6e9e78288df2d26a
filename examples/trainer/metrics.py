"""Metrics of a run: from the device to the progress bar, the trackers and metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

import fastpref
from trainer.files import whole_file

SHOWN = ("loss", "margin", "accuracy", "mse_w", "mse_l", "error", "drop")
KINDS = ("desirable", "undesirable")  # of samples: their shares, which their drops are a part of


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that was cut off is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def append_metrics(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add rows to a metrics.jsonl."""
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def truncate_metrics(path: Path, step: int) -> None:
    """Keep the rows up to `step`, the one a run goes on from."""
    rows = [row for row in read_metrics(path) if row["step"] <= step]
    with whole_file(path) as aside:
        append_metrics(aside, rows) if rows else aside.touch()


def divide(row: dict[str, Any]) -> None:
    """Make means over the samples of either kind of sums over all; without any, there is none."""
    for kind in KINDS:
        if kind in row:
            total, share = row.pop(f"drop_{kind}"), row.pop(kind)
            row |= {f"drop_{kind}": total / share} if share else {}


def health_of(rows: list[dict[str, Any]]) -> str:
    """What the curves so far look like: of pairs as fastpref reads them, else in figures."""
    if not rows or "mse_w" in rows[-1]:
        return str(fastpref.health(rows))
    part = max(1, len(rows) // 5)
    told = []
    for name in ("margin", "accuracy", "drop", *(f"drop_{kind}" for kind in KINDS)):
        first, last = (
            [row[name] for row in some if name in row] for some in (rows[:part], rows[-part:])
        )
        if first and last:
            told.append(f"{name} {sum(first) / len(first):.3g} -> {sum(last) / len(last):.3g}")
    return ", ".join(told)


class MetricsLog:
    """The metrics of a run, left on the device until many steps are read in one go."""

    def __init__(
        self,
        accelerator: Accelerator,
        path: Path,
        progress: tqdm,
        step: int = 0,
        bad_in_row: int = 0,
        max_bad_steps: int = 10,
    ) -> None:
        self.accelerator, self.path, self.progress = accelerator, path, progress
        self.max_bad_steps = max_bad_steps
        self.step = step  # the last one that ended
        self.bad_in_row = bad_in_row  # steps skipped in a row, up to the last one that was read
        self.longest = 0  # of the rows of skipped steps that were read
        self.skipped = 0  # steps skipped of those that were read
        self.names: list[str] = []
        self.parts: list[Tensor] = []  # of the micro-batches of this step
        self.unread: list[Tensor] = []
        self.unread_lrs: list[float] = []

    def note(self, metrics: Mapping[str, Tensor]) -> None:
        """Take what one micro-batch gave."""
        self.names = list(metrics)
        self.parts.append(torch.stack([value.detach().float() for value in metrics.values()]))

    def end_step(self, lr: float, grad_norm: Tensor, skipped: Tensor) -> None:
        """The optimizer made a step with the gradients of the micro-batches noted so far."""
        whole = torch.stack([grad_norm.float(), skipped.float()])
        self.unread.append(torch.cat([torch.stack(self.parts).mean(dim=0), whole]))
        self.unread_lrs.append(lr)
        self.parts.clear()
        self.step += 1
        self.progress.update()

    def flush(self) -> None:
        """Average the unread steps over the processes, read them at once, and log them."""
        if not self.unread:
            return
        means = self.accelerator.reduce(torch.stack(self.unread), reduction="mean").tolist()
        names = [*self.names, "grad_norm", "skipped"]
        first = self.step - len(means) + 1
        rows = [
            {"step": first + i, "lr": lr, **dict(zip(names, values, strict=True))}
            for i, (lr, values) in enumerate(zip(self.unread_lrs, means, strict=True))
        ]
        for row in rows:
            divide(row)
        self.unread.clear()
        self.unread_lrs.clear()
        if self.accelerator.is_main_process:
            append_metrics(self.path, rows)
        for row in rows:
            self.bad_in_row = self.bad_in_row + 1 if row["skipped"] else 0
            self.longest = max(self.longest, self.bad_in_row)
            self.skipped += bool(row["skipped"])
            self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])
        shown = {name: f"{rows[-1][name]:.3g}" for name in SHOWN if name in rows[-1]}
        self.progress.set_postfix(shown | ({"skipped": self.skipped} if self.skipped else {}))

    @property
    def too_bad(self) -> bool:
        """Whether so many steps in a row were skipped that the run should stop."""
        return self.longest >= self.max_bad_steps

    @property
    def bad_to_keep(self) -> int:
        """What a run that goes on from here counts on from."""
        return 0 if self.too_bad else self.bad_in_row

    def say_health(self) -> None:
        """Print what the curves so far look like."""
        if self.accelerator.is_main_process:
            self.progress.write(f"step {self.step}: {health_of(read_metrics(self.path))}")

    def raise_if_too_bad(self, hint: str = "") -> None:
        """Raises: FloatingPointError, behind a checkpoint; `hint` is what else may be the cause."""
        if self.too_bad:
            raise FloatingPointError(
                f"loss or gradients were not finite for {self.longest} steps in a row, as was seen "
                f"at step {self.step}; none of them changed the weights, which checkpoint-"
                f"{self.step} holds. {hint}Lower --learning_rate or beta, or use bf16 or fp32; "
                "--max_bad_steps says when to stop"
            )
