"""Real digits in four styles, and a diffusion model that paints them.

Images are (N, 1, 16, 16) fp32 in [-1, 1]; the model predicts the noise, conditioned on the digit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

SIZE = 16
STYLES = ("none", "thick", "shear", "invert")
NUM_TRAIN_TIMESTEPS = 1000
ALPHAS = torch.cumprod(1 - torch.linspace(1e-4, 0.02, NUM_TRAIN_TIMESTEPS), dim=0)

Model = Callable[[Tensor, Tensor, Tensor], Tensor]  # of pictures, timesteps and labels


class Digits(NamedTuple):
    """Pictures and what they show."""

    images: Tensor  # (N, 1, 16, 16) in [-1, 1]
    labels: Tensor  # (N,) int64, 0 to 9

    def to(self, device: torch.device) -> Digits:
        return Digits(self.images.to(device), self.labels.to(device))


class Splits(NamedTuple):
    """Disjoint digits: the base model learns from `base`, preferences are trained on `train`."""

    base: Digits
    train: Digits
    heldout: Digits


def load_splits() -> Splits:
    """scikit-learn's 1,797 handwritten digits, which it ships, as 900 + 640 + 257."""
    data = load_digits()
    small = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(small, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return Splits(*(Digits(images[part], labels[part]) for part in order.split([900, 640, 257])))


def restyle(images: Tensor, style: str) -> Tensor:
    """The same digits as written by another hand: thicker, slanted, or white for black."""
    if style == "none":
        return images
    if style == "thick":
        return F.max_pool2d(images, 3, stride=1, padding=1)
    if style == "shear":
        slant = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.0]], device=images.device)
        grid = F.affine_grid(slant.expand(len(images), 2, 3), list(images.shape), False)
        return F.grid_sample(images + 1, grid, align_corners=False) - 1
    if style == "invert":
        return -images
    raise ValueError(f"style is {style!r}: one of {', '.join(STYLES)} is needed")


class Block(nn.Module):
    """Two convolutions beside a shortcut; time and digit scale and shift what is between them."""

    def __init__(self, inputs: int, outputs: int, embedding: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, inputs), nn.GroupNorm(8, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.film = nn.Linear(embedding, 2 * outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.film(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return self.shortcut(x) + h


class Attention(nn.Module):
    """Four heads over all places of the picture."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, 3, 4, c // 4, h * w).transpose(-1, -2).unbind(1)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2)
        return x + self.out(mixed.reshape(n, c, h, w))


class UNet(nn.Module):
    """Predicts the noise in a picture of a digit, at 8 x 8 and 4 x 4; 0.4 M parameters."""

    def __init__(self, channels: int = 32, embedding: int = 128) -> None:
        super().__init__()
        c, e = channels, embedding
        self.time = nn.Sequential(nn.Linear(64, e), nn.SiLU(), nn.Linear(e, e))
        self.digit = nn.Embedding(10, e)
        self.stem = nn.Conv2d(4, c, 3, padding=1)
        self.down = nn.ModuleList([Block(c, c, e), Block(c, c, e)])
        self.shrink = nn.Conv2d(c, 2 * c, 3, stride=2, padding=1)
        self.middle = nn.ModuleList([Block(2 * c, 2 * c, e), Block(2 * c, 2 * c, e)])
        self.attention = Attention(2 * c)
        self.grow = nn.Conv2d(2 * c, c, 3, padding=1)
        self.up = nn.ModuleList([Block(2 * c, c, e), Block(2 * c, c, e)])
        last = nn.Conv2d(c, 4, 3, padding=1)
        nn.init.zeros_(last.weight)
        self.head = nn.Sequential(nn.GroupNorm(8, c), nn.SiLU(), last)

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        frequencies = torch.exp(torch.arange(32, device=x.device) * (-math.log(1e4) / 31))
        angles = timesteps[:, None] * frequencies
        waves = torch.cat([angles.sin(), angles.cos()], dim=1)
        embedding = F.silu(self.time(waves) + self.digit(labels))
        h = self.stem(F.pixel_unshuffle(x, 2))
        skips = []
        for block in self.down:
            skips.append(h)
            h = block(h, embedding)
        h = self.middle[0](self.shrink(h), embedding)
        h = self.middle[1](self.attention(h), embedding)
        h = self.grow(F.interpolate(h, scale_factor=2.0))
        for block in self.up:
            h = block(torch.cat([h, skips.pop()], dim=1), embedding)
        return F.pixel_shuffle(self.head(h), 2)


def add_noise(images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """DDPM's forward process, with its linear schedule from 1e-4 to 0.02."""
    alpha = ALPHAS.to(images.device)[timesteps][:, None, None, None]
    return alpha.sqrt() * images + (1 - alpha).sqrt() * noise


@torch.no_grad()
def paint(model: Model, labels: Tensor, noise: Tensor, steps: int = 25, batch: int = 64) -> Tensor:
    """DDIM without randomness or guidance: the picture that the model makes of each noise."""
    return torch.cat([_paint(model, l, e, steps) for l, e in _parts(batch, labels, noise)])


def _paint(model: Model, labels: Tensor, noise: Tensor, steps: int) -> Tensor:
    alphas = ALPHAS.to(noise.device)
    times = torch.arange(steps, 0, -1) * NUM_TRAIN_TIMESTEPS // steps - 1
    x = noise
    for i, t in enumerate(times.tolist()):
        alpha = alphas[t]
        after = alphas[times[i + 1]] if i + 1 < steps else torch.ones_like(alpha)
        predicted = model(x, torch.full_like(labels, t), labels)
        x0 = ((x - (1 - alpha).sqrt() * predicted) / alpha.sqrt()).clamp(-1, 1)
        direction = (x - alpha.sqrt() * x0) / (1 - alpha).sqrt()
        x = after.sqrt() * x0 + (1 - after).sqrt() * direction
    return x


@torch.no_grad()
def errors(
    model: UNet, digits: Digits, noise: Tensor, timesteps: Tensor, batch: int = 64
) -> Tensor:
    """Mean squared error of the predicted noise, (N,), one for each picture."""
    found = []
    for images, labels, e, t in _parts(batch, *digits, noise, timesteps):
        found.append((model(add_noise(images, e, t), t, labels) - e).square().flatten(1).mean(1))
    return torch.cat(found)


def _parts(batch: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(tensor.split(batch) for tensor in tensors), strict=True)


def train_base(digits: Digits, steps: int, batch: int = 128) -> Iterator[UNet]:
    """Train a UNet to denoise the digits; yields it after every step."""
    torch.manual_seed(0)
    device = digits.images.device
    model = UNet().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(len(digits.labels), (batch,), generator=generator).to(device)
        timesteps = torch.randint(NUM_TRAIN_TIMESTEPS, (batch,), generator=generator).to(device)
        noise = torch.randn(batch, 1, SIZE, SIZE, generator=generator).to(device)
        images, labels = digits.images[chosen], digits.labels[chosen]
        predicted = model(add_noise(images, noise, timesteps), timesteps, labels)
        F.mse_loss(predicted, noise).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield model
