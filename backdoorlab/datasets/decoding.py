"""Files and cells to bytes: images uint8 (N, C, H, W)."""

import io
import math
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .locations import cache_root

IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "PPM", "TIFF")
"""What Pillow may take a file for, whatever it is called: its readers of other formats are many,
and one starts Ghostscript."""

UNREADABLE = (OSError, ValueError, SyntaxError, TypeError)
"""What Pillow raises for a file that is no image, or not a whole one, or one that claims too much;
its own bomb is none of these."""
LARGE = 2**30
"""Bytes of decoded images beyond which they go to a file and not to memory."""

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]
"""train images uint8 (N, C, H, W), train labels int64, test images, test labels, class names."""


def refuse_different(first: np.ndarray, other: np.ndarray) -> None:
    """Images (N, C, H, W) of one set, or (C, H, W), must be of one shape."""
    shapes = first.shape[-3:], other.shape[-3:]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"images of different shapes ({shapes[0]} and {shapes[1]} as channels, height, width):"
            " pass --image_size N, or --grey True or False, for all"
        )


def decode_all(items: Any, decode: Callable[[Any], np.ndarray]) -> np.ndarray:
    """Decode a sequence of images with threads into one uint8 (N, C, H, W) array."""
    count = len(items)
    if count == 0:
        raise UserError("the data set has no images in one of its splits")
    first = decode(items[0])
    out = _room((count, *first.shape))

    def work(i: int) -> None:
        image = decode(items[i])
        refuse_different(first, image)
        out[i] = image

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(work, range(count), chunksize=256):
            pass
    return out


def _room(shape: tuple[int, ...]) -> np.ndarray:
    """uint8 zeros in memory, or where they are more than LARGE in a file without a name, which goes
    with the array."""
    if math.prod(shape) <= LARGE:
        return np.zeros(shape, np.uint8)
    cache_root().mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=cache_root()) as file:
            # A full disk is an error here; in the middle of a map it would end the process
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, math.prod(shape))
            return np.memmap(file, np.uint8, "w+", shape=shape)
    except OSError as error:
        raise UserError(
            f"no room for {math.prod(shape):,} bytes of images in {cache_root()} ({error}): set"
            " BACKDOORLAB_CACHE to a folder with space"
        ) from error


def from_bytes(data: bytes, path: Path, image_size: int | None, grey: bool | None) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            return from_pil(image, image_size, grey)
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        raise UserError(
            f"{path}: a cell of its image column is not a readable image ({error})"
        ) from error


def from_file(file: Path, image_size: int | None, grey: bool | None) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            return from_pil(image, image_size, grey)
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        raise UserError(f"{file}: not a readable image ({error})") from error


def from_pil(image: Any, image_size: int | None, grey: bool | None) -> np.ndarray:
    from PIL import Image

    if grey is None:
        grey = image.mode in ("1", "L") or image.mode.startswith("I;16")
    image = _eight_bits(image).convert("L" if grey else "RGB")
    if image_size is not None and image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _eight_bits(image: Any) -> Any:
    """An image of at most 8 bits a channel, for `convert` clips what is above 255 and so would turn
    deep images white."""
    from PIL import Image

    if image.mode.startswith("I;16"):
        # The upper byte: each of the 256 greys stands for 256 values, and 8 bits that were widened,
        # by 256 or by 257, come back as they were.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    # Such a format does not say what is white, so there is nothing to scale by
    if image.mode in ("I", "F"):
        low, high = image.getextrema()
        if not 0 <= low <= high <= 255:
            raise ValueError(
                f"expected values in 0..255, found {low:g}..{high:g} in its"
                f" {'32-bit' if image.mode == 'I' else 'float'} values: save it with 8 bits"
            )
    return image
