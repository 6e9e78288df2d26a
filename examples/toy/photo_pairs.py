"""Data of real photographs that come without a network: crops, and how to spoil them."""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import skimage
import sklearn.datasets
from PIL import Image, ImageFilter

from trainer.files import whole_file

# Photographs inside the scikit-image and scikit-learn wheels: nothing here is downloaded.
PHOTOGRAPHS = {
    "camera.png": "a man behind a camera on a tripod",
    "chelsea.png": "the face of a tabby cat",
    "china.jpg": "a painted temple under a blue sky",
    "coffee.png": "a cup of coffee on a wooden table",
    "astronaut.png": "an astronaut in an orange suit before a flag",
    "brick.png": "a brick wall",
    "coins.png": "old coins on a dark cloth",
    "flower.jpg": "a red flower with long petals",
    "grass.png": "blades of grass",
    "gravel.png": "gravel on the ground",
    "hubble_deep_field.jpg": "many galaxies in a dark sky",
    "ihc.png": "stained tissue under a microscope",
    "moon.png": "craters on the moon",
    "motorcycle_left.png": "a motorcycle in a workshop",
    "retina.jpg": "the retina of an eye",
    "rocket.jpg": "a rocket on its launch pad at night",
}
HELDOUT = 4  # photographs that training never sees
MIN_DIFFERENCE = 2.5  # mean grey levels; below this a crop is too flat for its loser to look worse


def load_photograph(name: str) -> Image.Image:
    """Open the photograph `name` as it ships with scikit-image or scikit-learn."""
    folders = (
        Path(skimage.__file__).parent / "data",
        Path(sklearn.datasets.__file__).parent / "images",
    )
    for folder in folders:
        if (folder / name).is_file():
            return Image.open(folder / name).convert("RGB")
    raise FileNotFoundError(
        f"photograph {name!r}: ships with neither the installed scikit-image nor scikit-learn"
    )


def jpeg(crop: Image.Image, rng: np.random.Generator, quality: float | None = None) -> Image.Image:
    """Blocks and ringing: JPEG at a quality between 1 and 6."""
    buffer = io.BytesIO()
    crop.save(buffer, "JPEG", quality=int(quality or rng.integers(1, 7)))
    return Image.open(buffer).convert("RGB")


def blur(crop: Image.Image, rng: np.random.Generator, radius: float | None = None) -> Image.Image:
    """A Gaussian blur of 1.2 to 2.5 pixels."""
    return crop.filter(ImageFilter.GaussianBlur(radius or rng.uniform(1.2, 2.5)))


def noise(crop: Image.Image, rng: np.random.Generator, levels: float | None = None) -> Image.Image:
    """Sensor noise of 35 to 70 grey levels."""
    pixels = np.asarray(crop, dtype=np.float64)
    pixels = pixels + rng.normal(0.0, levels or rng.uniform(35, 70), pixels.shape)
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def banding(crop: Image.Image, rng: np.random.Generator, steps: float | None = None) -> Image.Image:
    """Posterised to 2 or 3 levels per channel."""
    steps = int(steps or rng.integers(1, 3))
    pixels = np.asarray(crop, dtype=np.float32) / 255 * steps
    return Image.fromarray((pixels.round() / steps * 255).astype(np.uint8))


DEGRADATIONS: dict[str, Callable[..., Image.Image]] = {
    "jpeg": jpeg,
    "blur": blur,
    "noise": noise,
    "banding": banding,
}
# How much of each makes a list, the least first; the last is about what the losers of pairs have.
LADDERS = {
    "jpeg": (25, 10, 3),
    "blur": (0.6, 1.1, 2.0),
    "noise": (12, 25, 50),
    "banding": (8, 4, 2),
}


def random_crop(photograph: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """A square crop at a random place and scale, resampled to `size` pixels."""
    shorter = min(photograph.size)
    side = int(rng.integers(min(size, shorter), max(size, int(0.6 * shorter)) + 1))
    left = int(rng.integers(photograph.width - side + 1))
    top = int(rng.integers(photograph.height - side + 1))
    box = (left, top, left + side, top + side)
    return photograph.resize((size, size), Image.Resampling.LANCZOS, box=box)


def png(image: Image.Image) -> bytes:
    """The image as PNG, so that storing a pair degrades neither side."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def crop_and_loser(
    photograph: Image.Image, kind: str, size: int, rng: np.random.Generator
) -> tuple[Image.Image, Image.Image]:
    """A crop that is not flat, and its degraded copy."""
    for _ in range(100):
        winner = random_crop(photograph, size, rng)
        loser = DEGRADATIONS[kind](winner, rng)
        difference = np.asarray(winner, np.float32) - np.asarray(loser, np.float32)
        if np.abs(difference).mean() >= MIN_DIFFERENCE:
            break
    return winner, loser


def make_pair(
    name: str, caption: str, photograph: Image.Image, kind: str, size: int, rng: np.random.Generator
) -> dict[str, object]:
    """One Pick-a-Pic row: the crop wins against its degraded copy, on a side drawn by chance."""
    winner, loser = crop_and_loser(photograph, kind, size, rng)
    winner_first = bool(rng.integers(2))
    sides = [(png(winner), "photograph"), (png(loser), kind)]
    (jpg_0, model_0), (jpg_1, model_1) = sides if winner_first else sides[::-1]
    return {
        "caption": caption,
        "jpg_0": jpg_0,
        "jpg_1": jpg_1,
        "label_0": float(winner_first),
        "label_1": float(not winner_first),
        "model_0": model_0,
        "model_1": model_1,
        "photograph": name,
    }


def make_sample(
    name: str, caption: str, photograph: Image.Image, kind: str, size: int, rng: np.random.Generator
) -> dict[str, object]:
    """One image with a label: a crop is desirable, or it is degraded, by chance."""
    crop, degraded = crop_and_loser(photograph, kind, size, rng)
    label = bool(rng.integers(2))
    image = png(crop if label else degraded)
    return {"caption": caption, "image": image, "label": label, "photograph": name}


def make_list(
    name: str, caption: str, photograph: Image.Image, kind: str, size: int, rng: np.random.Generator
) -> dict[str, object]:
    """A crop and three copies, the further degraded the lower their score, shuffled."""
    crop, _ = crop_and_loser(photograph, kind, size, rng)
    images = [crop, *(DEGRADATIONS[kind](crop, rng, amount) for amount in LADDERS[kind])]
    order = rng.permutation(len(images))
    scores = np.linspace(1, 0, len(images))
    return {
        "caption": caption,
        "images": [png(images[i]) for i in order],
        "scores": [float(scores[i]) for i in order],
        "photograph": name,
    }


def make_rows(
    photographs: dict[str, str], count: int, size: int, seed: int,
    make: Callable[..., dict[str, object]] = make_pair,
) -> pa.Table:  # fmt: skip
    """`count` rows that go evenly through the photographs and the kinds of degradation."""
    opened = [(name, caption, load_photograph(name)) for name, caption in photographs.items()]
    kinds = list(DEGRADATIONS)
    rows = []
    for i in range(count):
        name, caption, photograph = opened[i % len(opened)]
        kind = kinds[(i // len(opened)) % len(kinds)]
        rng = np.random.default_rng([seed, i])
        rows.append(make(name, caption, photograph, kind, size, rng))
    return pa.Table.from_pylist(rows)


def split_photographs(seed: int) -> tuple[dict[str, str], dict[str, str]]:
    """(for training, held out): with every seed the next four photographs are held out."""
    first = HELDOUT * seed % len(PHOTOGRAPHS)
    heldout = list(PHOTOGRAPHS)[first : first + HELDOUT]
    train = {name: caption for name, caption in PHOTOGRAPHS.items() if name not in heldout}
    return train, {name: PHOTOGRAPHS[name] for name in heldout}


def write_photo_pairs(
    output_dir: str | Path, train: int = 768, heldout: int = 96, size: int = 64, seed: int = 0
) -> None:
    """Write train.parquet and heldout.parquet, whose pairs come from disjoint photographs."""
    for argument, value in (("train", train), ("heldout", heldout), ("size", size)):
        if value < 1:
            raise ValueError(f"{argument}={value}; need at least 1")
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    seen, unseen = split_photographs(seed)
    for split, count, photographs, split_seed in (
        ("train", train, seen, 2 * seed),
        ("heldout", heldout, unseen, 2 * seed + 1),
    ):
        pairs = make_rows(photographs, count, size, split_seed)
        with whole_file(output_dir / f"{split}.parquet") as aside:
            pq.write_table(pairs, aside)
        names = ", ".join(Path(name).stem for name in photographs)
        print(f"{split}: {count} pairs of {size} px from {len(photographs)} photographs: {names}")


def write_photo_groups(
    output_dir: str | Path, samples: int = 6000, lists: int = 1500, size: int = 64, seed: int = 0
) -> None:
    """Write samples.parquet, single images with labels, and lists.parquet, lists of four with
    scores, of the photographs that pairs are trained on."""
    seen, _ = split_photographs(seed)
    for split, count, make in (("samples", samples, make_sample), ("lists", lists, make_list)):
        with whole_file(Path(output_dir) / f"{split}.parquet") as aside:
            pq.write_table(make_rows(seen, count, size, 2 * seed, make), aside)


def main(argv: list[str] | None = None) -> None:
    """Write the pairs from the command line."""
    parser = argparse.ArgumentParser(
        description="Make a Pick-a-Pic-format data set from the photographs that ship with "
        "scikit-image and scikit-learn: winner = a crop, loser = the same crop degraded."
    )
    parser.add_argument("output_dir", help="folder for train.parquet and heldout.parquet")
    parser.add_argument("--train", type=int, default=768, help="training pairs")
    parser.add_argument("--heldout", type=int, default=96, help="pairs of unseen photographs")
    parser.add_argument("--size", type=int, default=64, help="side of a crop in pixels")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the crops, and which photographs are held out"
    )
    args = parser.parse_args(argv)
    write_photo_pairs(args.output_dir, args.train, args.heldout, args.size, args.seed)


if __name__ == "__main__":
    main()
