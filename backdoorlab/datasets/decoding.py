"""Decoding of images from files and parquet cells: uint8 (N, C, H, W)."""

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
"""Formats that Pillow may use, whatever a file is called. It has many more readers, one of which
starts Ghostscript."""
UNREADABLE = (OSError, ValueError, SyntaxError, TypeError)
"""What Pillow raises for a file that is no image, is incomplete, or claims too large a size. Its
DecompressionBombError is not among them."""
LARGE = 2**30
"""Bytes of decoded images. A larger set is decoded into a file instead of memory."""

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]
"""Training images uint8 (N, C, H, W), training labels int64 (N,), test images, test labels, class
names."""


def refuse_different(first: np.ndarray, other: np.ndarray) -> None:
    """Raise a UserError if two arrays of images (N, C, H, W) or (C, H, W) differ in C, H or W."""
    shapes = first.shape[-3:], other.shape[-3:]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"images of different shapes ({shapes[0]} and {shapes[1]} as channels, height, width):"
            " pass --image_size N, or --grey True or False, for all"
        )


def decode_all(items: Any, decode: Callable[[Any], np.ndarray]) -> np.ndarray:
    """Decode images in threads.

    Args:
        items: a sequence of N undecoded images.
        decode: turns one of them into uint8 (C, H, W).

    Returns:
        uint8 (N, C, H, W).

    Raises:
        UserError: there are none, or they differ in shape.
    """
    count = len(items)
    if count == 0:
        raise UserError("the data set has no images in one of its splits")

    # The first image decides the shape of all.
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
    """Return uint8 zeros; above LARGE bytes, in a nameless file that is deleted with the array."""
    if math.prod(shape) <= LARGE:
        return np.zeros(shape, np.uint8)
    cache_root().mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=cache_root()) as file:
            # A full disk is an error here. In the middle of a memory map it would kill the process.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, math.prod(shape))
            return np.memmap(file, np.uint8, "w+", shape=shape)
    except OSError as error:
        raise UserError(
            f"no room for {math.prod(shape):,} bytes of images in {cache_root()} ({error}): set"
            " BACKDOORLAB_CACHE to a folder with space"
        ) from error


def from_bytes(data: bytes, path: Path, image_size: int | None, grey: bool | None) -> np.ndarray:
    """Decode the bytes of an image file; `path` names its source in errors. See `from_pil`."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            return from_pil(image, image_size, grey)
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        raise UserError(
            f"{path}: a cell of its image column is not a readable image ({error})"
        ) from error


def from_file(file: Path, image_size: int | None, grey: bool | None) -> np.ndarray:
    """Decode an image file. See `from_pil`."""
    from PIL import Image

    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            return from_pil(image, image_size, grey)
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        raise UserError(f"{file}: not a readable image ({error})") from error


def from_pil(image: Any, image_size: int | None, grey: bool | None) -> np.ndarray:
    """Convert a Pillow image to bytes.

    Args:
        image: a PIL.Image.
        image_size: side in pixels to resize to (bilinear); None keeps the size.
        grey: one channel (True) or three (False); None decides by the image's mode.

    Returns:
        uint8 (C, H, W).
    """
    from PIL import Image

    if grey is None:
        grey = image.mode in ("1", "L") or image.mode.startswith("I;16")
    image = _eight_bits(image).convert("L" if grey else "RGB")
    if image_size is not None and image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _eight_bits(image: Any) -> Any:
    """Reduce an image to 8 bits a channel; a value that cannot be scaled raises a ValueError.

    Pillow's own `convert` would clip values at 255 and turn 16-bit images white.
    """
    from PIL import Image

    if image.mode.startswith("I;16"):
        # The upper byte. 8-bit values that were widened, by a factor of 256 or 257, come back
        # exactly.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))

    # These modes do not define white, so there is nothing to scale by.
    if image.mode in ("I", "F"):
        low, high = image.getextrema()
        if not 0 <= low <= high <= 255:
            raise ValueError(
                f"expected values in 0..255, found {low:g}..{high:g} in its"
                f" {'32-bit' if image.mode == 'I' else 'float'} values: save it with 8 bits"
            )
    return image
