"""One run of the study: a copy of the base model aligned by one method, and what came of it.

Every run of a seed sees the same pairs, timesteps and noise, and every model is judged on the same
1,000 noises: methods differ in nothing but the loss and its setting. Losses that are not on pairs
see as many images, half of them winners; `draw` says what they share with the others.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import time
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from study.digits import (
    NUM_TRAIN_TIMESTEPS,
    SIZE,
    Digits,
    Splits,
    UNet,
    add_noise,
    errors,
    load_splits,
    paint,
    restyle,
    train_base,
)
from study.judge import Judge, assess, frechet, train_judge
from study.methods import METHODS, Method, Rewards, Setting, describe
from trainer.files import write_whole

PAIRS = 32  # in a step
WARMUP = 10  # steps
ROUNDS = 8  # timesteps at which each held-out pair is scored
SHOWN = 10  # pictures that a run keeps, one of each digit


class Run(NamedTuple):
    """All that decides a run's outcome, on one machine."""

    style: str
    method: str  # of METHODS, or "base" for the model that all start from
    setting: Setting
    seed: int
    steps: int = 200
    samples: int = 1000
    noise_seed: int = 100  # of the noise that pictures are painted from
    base_steps: int = 600
    judge_steps: int = 1000
    impl: str = "auto"

    @property
    def name(self) -> str:
        """Where its record lies, under runs/."""
        kind = "" if self.impl == "auto" else f" {self.impl}"
        name = f"{describe(self.setting)} steps={self.steps} seed={self.seed}{kind}"
        return f"{self.style}/{self.method}/{name.strip()}".replace(" ", "_")

    @property
    def passes(self) -> int:
        """Pictures through the network, backward ones counting two: what a run costs."""
        needs_ref = self.method in METHODS and METHODS[self.method].needs_ref
        return self.steps * 2 * PAIRS * (4 if needs_ref else 3) + 25 * self.samples + 2 * 257 * 8


class World(NamedTuple):
    """What all runs share."""

    splits: Splits
    base: UNet
    judge: Judge
    losers: Digits  # the base's own pictures of the digits in splits.train
    heldout_losers: Digits
    fingerprint: str


def save_aside(path: Path, state: Any) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, buffer.getvalue())


def make_base(folder: Path, steps: int, device: str, paint_steps: int = 25) -> None:
    """Train the base model, and let it paint the losers."""
    path = folder / f"base-{steps}.pt"
    if path.exists():
        return
    splits = load_splits()
    *_, model = tqdm(train_base(splits.base.to(torch.device(device)), steps), "base", steps)
    generator = torch.Generator().manual_seed(1)
    losers = []
    for part in (splits.train, splits.heldout):
        noise = torch.randn(len(part.labels), 1, SIZE, SIZE, generator=generator).to(device)
        losers.append(paint(model, part.labels.to(device), noise, paint_steps).cpu())
    save_aside(path, {"model": model.cpu().state_dict(), "losers": losers})


def make_judge(folder: Path, steps: int, device: str) -> None:
    """Train the judge on all digits that are not held out."""
    path = folder / f"judge-{steps}.pt"
    if not path.exists():
        judge = train_judge(seen(load_splits()).to(torch.device(device)), steps)
        save_aside(path, judge.cpu().state_dict())


def seen(splits: Splits) -> Digits:
    """The real digits that are not held out."""
    return Digits(*(torch.cat(both) for both in zip(splits.base, splits.train, strict=True)))


@cache
def load_world(folder: Path, base_steps: int, judge_steps: int, device: str) -> World:
    """Open what `make_base` and `make_judge` left in the folder."""
    where = torch.device(device)
    splits = load_splits()
    state = torch.load(folder / f"base-{base_steps}.pt")
    base, judge = UNet(), Judge()
    base.load_state_dict(state["model"])
    judge.load_state_dict(torch.load(folder / f"judge-{judge_steps}.pt"))
    digest = hashlib.sha256()
    for weight in [*base.state_dict().values(), *judge.state_dict().values(), *state["losers"]]:
        digest.update(weight.numpy().tobytes())
    train, heldout = (
        Digits(images, part.labels)
        for images, part in zip(state["losers"], (splits.train, splits.heldout), strict=True)
    )
    return World(
        Splits(*(part.to(where) for part in splits)),
        base.to(where).requires_grad_(False).eval(),
        judge.to(where).requires_grad_(False).eval(),
        train.to(where),
        heldout.to(where),
        digest.hexdigest()[:16],
    )


def draw(
    labels: Tensor, group: int, generator: torch.Generator, more: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs of a step, (PAIRS,), and the timesteps and noise of their 2 * PAIRS images.

    The images of a pair share both (group 2). Unpaired images (1) have their own; the winners' are
    those that the pairs have. A list (4) is two pairs of one digit, as RankDPO has it at one
    timestep, with noise of each image; its first pair and its timestep are those of one of the
    first PAIRS / 2 pairs. What pairs do not need comes from `more`.
    """
    chosen = torch.randint(len(labels), (PAIRS,), generator=generator)
    timesteps = torch.randint(NUM_TRAIN_TIMESTEPS, (PAIRS,), generator=generator)
    noise = torch.randn(PAIRS, 1, SIZE, SIZE, generator=generator)
    if group == 2:
        return chosen, timesteps.repeat(2), noise.repeat(2, 1, 1, 1)
    noise = torch.cat([noise, torch.randn(noise.shape, generator=more)])
    if group == 1:
        others = torch.randint(NUM_TRAIN_TIMESTEPS, (PAIRS,), generator=more)
        return chosen, torch.cat([timesteps, others]), noise
    first, timesteps = chosen[: PAIRS // 2], timesteps[: PAIRS // 2]
    others = (labels == labels[first, None]).float().scatter(1, first[:, None], 0.0)
    second = torch.multinomial(others, 1, generator=more)[:, 0]
    return torch.cat([first, second]), timesteps.repeat(4), noise


def align(
    world: World, run: Run, method: Method | None = None
) -> tuple[UNet, list[dict[str, float]]]:
    """Train a copy of the base model on preferences; its metrics are those of `LossOutput`.

    `method` comes with a loss that is not in METHODS.

    AdamW without weight decay, gradients clipped to 1, ten steps of warm-up, then a linear decay to
    0: at a constant rate the outcome depends on the step one stops at.
    """
    model = copy.deepcopy(world.base).requires_grad_(True)
    if run.method == "base":
        return model, []
    method = method or METHODS[run.method]
    knobs = {name: value for name, value in run.setting.items() if name != "lr"}
    winners, labels = restyle(world.splits.train.images, run.style), world.splits.train.labels
    losers, device = world.losers.images, labels.device
    rewards = Rewards(*(world.judge.reward(side, labels, run.style) for side in (winners, losers)))

    optimizer = torch.optim.AdamW(model.parameters(), lr=run.setting["lr"], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / WARMUP, (run.steps - i) / max(1, run.steps - WARMUP))
    )
    generators = [torch.Generator().manual_seed(run.seed + extra) for extra in (0, 1000)]
    digits = labels.cpu()
    history = []
    for step in range(1, run.steps + 1):
        drawn = draw(digits, method.group, *generators)
        chosen, t, noise = (tensor.to(device) for tensor in drawn)
        images, shown = torch.cat([winners[chosen], losers[chosen]]), labels[chosen].repeat(2)
        noisy = add_noise(images, noise, t)
        predictions = [model(noisy, t, shown)]
        if method.needs_ref:
            predictions.append(world.base(noisy, t, shown))
        judged = Rewards(rewards.w[chosen], rewards.l[chosen])
        tensors = (predictions[0], noise, *predictions[1:])
        out = method.call(judged, *tensors, **knobs, impl=run.impl)
        out.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        history.append({"step": step, "lr": schedule.get_last_lr()[0], **method.metrics(out)})
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model, [{name: float(value) for name, value in row.items()} for row in history]


def score(world: World, model: UNet, run: Run) -> tuple[dict[str, float], Tensor]:
    """Judge the model's pictures, and its errors on held-out pairs."""
    device = world.splits.heldout.labels.device
    labels = (torch.arange(run.samples) % 10).to(device)
    generator = torch.Generator().manual_seed(run.noise_seed)
    noise = torch.randn(run.samples, 1, SIZE, SIZE, generator=generator).to(device)
    images = paint(model, labels, noise)
    heldout = world.splits.heldout
    winners = Digits(restyle(heldout.images, run.style), heldout.labels)
    quality = assess(world.judge, Digits(images, labels), winners, run.style)
    w, l = (pair_errors(side, model) for side in (winners, world.heldout_losers))
    ref_w, ref_l = reference_errors(world, run.style)
    return {
        **quality._asdict(),
        "floor": floor(world, winners, run),
        "accuracy": float((w < l).float().mean()),
        "accuracy_ref": float((w - l < ref_w - ref_l).float().mean()),
        "mse_w": float(w.mean()),
        "mse_l": float(l.mean()),
        "ref_mse_w": float(ref_w.mean()),
        "ref_mse_l": float(ref_l.mean()),
    }, images[:SHOWN]


def pair_errors(digits: Digits, model: UNet) -> Tensor:
    """Errors at ROUNDS timesteps of each picture, the same noise for every model and side."""
    generator = torch.Generator().manual_seed(2)
    count, device = len(digits.labels), digits.labels.device
    found = []
    for _ in range(ROUNDS):
        timesteps = torch.randint(NUM_TRAIN_TIMESTEPS, (count,), generator=generator).to(device)
        noise = torch.randn(count, 1, SIZE, SIZE, generator=generator).to(device)
        found.append(errors(model, digits, noise, timesteps))
    return torch.cat(found)


@cache
def reference_errors(world: World, style: str) -> tuple[Tensor, Tensor]:
    """Those of the base model, on winners and losers."""
    heldout = world.splits.heldout
    winners = Digits(restyle(heldout.images, style), heldout.labels)
    return pair_errors(winners, world.base), pair_errors(world.heldout_losers, world.base)


def floor(world: World, winners: Digits, run: Run) -> float:
    """The Frechet distance of as many other real digits, equally many of each, as are painted."""
    real = seen(world.splits)
    each = [(real.labels == digit).nonzero()[: run.samples // 10, 0] for digit in range(10)]
    images = restyle(real.images[torch.cat(each)], run.style)
    with torch.no_grad():
        return frechet(world.judge.body(images), world.judge.body(winners.images))


def execute(folder: Path, run: Run, device: str) -> dict[str, Any]:
    """Do a run, or take what an earlier one left in the folder; the record of it."""
    world = load_world(folder, run.base_steps, run.judge_steps, device)
    path = folder / "runs" / f"{run.name}.json"
    identity = {"run": run._asdict(), "world": world.fingerprint}
    if path.exists():
        record = json.loads(path.read_text())
        if {name: record[name] for name in identity} == identity:
            return record
    began = time.monotonic()
    model, history = align(world, run)
    seconds = time.monotonic() - began
    result, images = score(world, model.requires_grad_(False), run)
    pictures = ((images.cpu().clamp(-1, 1) + 1) * 127.5).byte()[:, 0].tolist()
    record = {**identity, "result": result | {"seconds": seconds},
              "history": history, "pictures": pictures}  # fmt: skip
    write_whole(path, json.dumps(record).encode())
    return record
