"""A judge of painted digits: digit and style, and distances between sets of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from study.digits import SIZE, STYLES, Digits, restyle

FEATURES = 32


class Judge(nn.Module):
    """Says which digit it sees and in which style; its 32 features are what distances compare."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 16, 128), nn.ReLU(), nn.Linear(128, FEATURES),
        )  # fmt: skip
        self.digit, self.style = nn.Linear(FEATURES, 10), nn.Linear(FEATURES, len(STYLES))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the digit (N, 10) and of the style (N, 4)."""
        features = F.relu(self.body(images))
        return self.digit(features), self.style(features)

    @torch.no_grad()
    def right(self, images: Tensor, labels: Tensor, style: str) -> tuple[Tensor, Tensor]:
        """Whether each picture shows its digit, and whether it does so in the style."""
        digit, styles = self(images)
        return digit.argmax(1) == labels, styles.argmax(1) == STYLES.index(style)

    @torch.no_grad()
    def reward(self, images: Tensor, labels: Tensor, style: str) -> Tensor:
        """The probability, in [0, 1], that a picture shows its digit in the style."""
        digit, styles = (logits.softmax(1) for logits in self(images))
        return digit.gather(1, labels[:, None])[:, 0] * styles[:, STYLES.index(style)]


def train_judge(digits: Digits, steps: int, batch: int = 128) -> Judge:
    """Fit a judge to real digits in every style, each turned, moved and noised a little."""
    torch.manual_seed(0)
    device = digits.images.device
    judge = Judge().to(device)
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    styled = torch.stack([restyle(digits.images, style) for style in STYLES])
    still = torch.eye(2, 3)
    for _ in range(steps):
        chosen = torch.randint(len(digits.labels), (batch,), generator=generator).to(device)
        styles = torch.randint(len(STYLES), (batch,), generator=generator).to(device)
        moves = still + 0.08 * torch.randn(batch, 2, 3, generator=generator)
        noise = 0.1 * torch.randn(batch, 1, SIZE, SIZE, generator=generator)
        grid = F.affine_grid(moves.to(device), [batch, 1, SIZE, SIZE], align_corners=False)
        images = F.grid_sample(
            styled[styles, chosen], grid, padding_mode="border", align_corners=False
        )
        digit_logits, style_logits = judge(images + noise.to(device))
        loss = F.cross_entropy(digit_logits, digits.labels[chosen])
        (loss + F.cross_entropy(style_logits, styles)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return judge.eval()


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance of two sets of features, (N, D) and (M, D), as Gaussians.

    ``|mean_a - mean_b|^2 + trace(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))``, in fp64. Of finite sets
    it is above 0 where both come from one distribution: give such a floor beside it.
    """
    a, b = a.double().cpu(), b.double().cpu()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    shift = (a.mean(0) - b.mean(0)).square().sum()
    return float(shift + cov_a.trace() + cov_b.trace() - 2 * cross)


def spread(digits: Digits) -> float:
    """Mean distance between two pictures of the same digit, over the ten."""
    distances = []
    for label in range(10):
        pixels = digits.images[digits.labels == label].flatten(1)
        if len(pixels) > 1:
            n = len(pixels)
            distances.append(float(torch.cdist(pixels, pixels).sum()) / (n * (n - 1)))
    return sum(distances) / len(distances)


class Quality(NamedTuple):
    """What pictures are worth beside held-out winners."""

    joint: float  # share that shows the right digit in the right style
    digit: float  # share that shows the right digit
    in_style: float  # share in the right style
    frechet: float  # distance to the held-out winners; see `floor`
    diversity: float  # spread within a digit, the winners' being 1


def assess(judge: Judge, painted: Digits, winners: Digits, style: str) -> Quality:
    """Compare painted digits with real ones in the style."""
    digit, in_style = judge.right(painted.images, painted.labels, style)
    with torch.no_grad():
        distance = frechet(judge.body(painted.images), judge.body(winners.images))
    return Quality(
        joint=float((digit & in_style).float().mean()),
        digit=float(digit.float().mean()),
        in_style=float(in_style.float().mean()),
        frechet=distance,
        diversity=spread(painted) / spread(winners),
    )
