"""Images: which can be trained on, and how one becomes a tensor without being distorted."""

from __future__ import annotations

import io
import os
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

MIN_SIDE = 16  # pixels; anything less is a spacer or an icon
MAX_ASPECT = 8.0  # long side over short side; beyond it a crop shows next to nothing
Size = tuple[int, int]  # (height, width)


class BadImage(ValueError):
    """An image that cannot be trained on: `where` it is, and the `reason`."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(where, reason)
        self.where, self.reason = where, reason

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def path_of(cell: Any) -> str | None:
    """The file that a cell names, if it holds no bytes of its own."""
    if isinstance(cell, dict) and not cell.get("bytes"):
        cell = cell.get("path")
    return cell if isinstance(cell, str) else None


def begin_reading(cell: Any) -> Image.Image:
    """The image of a cell (bytes, an Image feature decoded or not, a path, an open file), of which
    only the header is read so far."""
    if isinstance(cell, dict):
        cell = cell["bytes"] or cell["path"]
    if isinstance(cell, Image.Image):
        return cell
    if cell is None:
        raise ValueError("the cell is empty")
    if isinstance(cell, bytes):
        if not cell:
            raise ValueError("an image of zero bytes")
        cell = io.BytesIO(cell)
    elif isinstance(cell, str) and os.stat(cell).st_size == 0:
        raise ValueError("an image of zero bytes")
    elif not isinstance(cell, str) and not hasattr(cell, "read"):
        raise TypeError(f"the cell holds {type(cell).__name__}; need the bytes of an image")
    return Image.open(cell)


def check_sides(width: int, height: int) -> None:
    """Raise a ValueError for a picture that has no use, or too many pixels to be one."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(
            f"{width}x{height} pixels, more than PIL.Image.MAX_IMAGE_PIXELS = {limit}: such a file "
            "may be a decompression bomb"
        )
    if min(width, height) < MIN_SIDE:
        raise ValueError(f"{width}x{height} pixels; need at least {MIN_SIDE} on each side")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"{width}x{height} pixels; need an aspect of at most 1:{MAX_ASPECT:g}")


def refuse(error: Exception, cell: Any, where: str) -> BadImage:
    """What PIL said of a cell, in words that are the same for the same fault."""
    path = path_of(cell)
    where = f"{where} ({path})" if path else where
    if isinstance(error, UnidentifiedImageError):  # names an object in memory
        return BadImage(where, "no image, or of a format that PIL does not read")
    if isinstance(error, OSError) and error.strerror:
        return BadImage(where, error.strerror)
    if isinstance(error, (OSError, ValueError, TypeError, Image.DecompressionBombError)):
        return BadImage(where, str(error))
    return BadImage(where, f"{type(error).__name__}: {error}")


def read_size(cell: Any, where: str) -> Size:
    """Height and width that `open_image` would give, from the header alone where it can tell."""
    try:
        image = begin_reading(cell)
        try:
            check_sides(*image.size)
            # PNG's own getexif decodes the picture, in case the EXIF comes after it.
            exif = Image.Image.getexif(image)
            turned = exif.get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            width, height = image.size[::-1] if turned else image.size
            return height, width
        finally:
            if image is not cell:
                image.close()
    except Exception as error:  # PIL's readers raise nearly anything on a broken file
        raise refuse(error, cell, where) from error


def open_image(cell: Any, where: str) -> Image.Image:
    """Open a cell that holds bytes, an Image feature (decoded or not) or a path, as upright RGB.

    Raises BadImage for what is broken, cut short, tiny, huge, or a narrow strip.
    """
    try:
        image = begin_reading(cell)
        try:
            check_sides(*image.size)
            return to_rgb(ImageOps.exif_transpose(image))
        finally:
            if image is not cell:
                image.close()
    except Exception as error:  # PIL's readers raise nearly anything on a broken file
        raise refuse(error, cell, where) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture as a viewer shows it on white, 8 bits a channel."""
    if image.mode.startswith("I"):  # PIL would clip what is 16 bits deep, not scale it
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("pixels of 32 bits, whose white is unknown; need 8 or 16")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("pixels of floating point, whose white is unknown; need 8 or 16 bits")
    elif image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def fit(
    image: Image.Image, size: Size, window: tuple[float, float], flip: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale the image so that it covers `size`, cut that at the relative place `window`.

    Returns pixels in [-1, 1], shape (3, height, width), and SDXL's six time ids: original height
    and width, top and left of the crop in the scaled image, target height and width.
    """
    (height, width), (original_w, original_h) = size, image.size
    scale = max(height / original_h, width / original_w)
    scaled = max(width, round(original_w * scale)), max(height, round(original_h * scale))
    image = image.resize(scaled, Image.Resampling.LANCZOS)
    left = round(window[0] * (scaled[0] - width))
    top = round(window[1] * (scaled[1] - height))
    image = image.crop((left, top, left + width, top + height))
    if flip:
        image = ImageOps.mirror(image)
        # Counted from the left of the mirrored picture, which is what the crop is now cut from.
        left = scaled[0] - width - left
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
    return pixels, torch.tensor([original_h, original_w, top, left, height, width])
