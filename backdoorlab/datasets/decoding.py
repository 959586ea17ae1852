"""Decoding of images from files and parquet cells: uint8 (N, C, H, W)."""

import io
import math
import os
import struct
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError
from .locations import cache_root

IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "PPM", "TIFF", "GIF", "JPEG2000", "AVIF")
"""Formats that Pillow may use, whatever a file is called. It has many more readers, one of which
starts Ghostscript."""
SAID_FORMATS = "PNG, JPEG, BMP, WebP, PPM, TIFF, GIF, JPEG 2000 or AVIF"
"""The same for messages."""
IMAGE_SUFFIXES = frozenset(
    (
        *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".webp", ".ppm", ".pgm"),
        *(".pbm", ".pnm", ".tif", ".tiff", ".gif", ".jp2", ".j2k", ".avif"),
    )
)
"""Suffixes of these formats. A file that has one and cannot be read is damaged, and is refused. Of
any other file the content decides whether it is an image."""
OTHER_FORMATS = {
    b"ftypheic": "HEIC",
    b"ftypheix": "HEIC",
    b"ftypmif1": "HEIF",
    b"ftypmsf1": "HEIF",
    b"ftypqt  ": "a QuickTime film",
    b"ftypmp42": "an MP4 film",
    b"ftypisom": "an MP4 film",
}
"""Bytes 4 to 12 of a file -> a format that phones write and Pillow does not read."""
METADATA = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
"""Keys of Pillow's `info` under which an image may say its orientation."""
TURNED, ON_WHITE = "turned", "on white"
"""What `from_pil` reports: the image was turned upright; transparent pixels were put on white."""
UNREADABLE = (OSError, ValueError, SyntaxError, TypeError)
"""What Pillow raises for a file that is no image, is incomplete, or claims too large a size. Its
DecompressionBombError is not among them."""
ORIENTATION = 0x0112
"""Number of the EXIF entry that says how the camera was held."""
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
"""Its value -> name of the PIL.Image.Transpose that turns the image upright."""
SIDES_SWAPPED = ("TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
"""Those that exchange width and height."""
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
    out[0] = first

    def work(i: int) -> None:
        image = decode(items[i])
        refuse_different(first, image)
        out[i] = image

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(work, range(1, count), chunksize=256):
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


def from_bytes(
    data: bytes,
    path: Path,
    image_size: int | None,
    grey: bool | None,
    done: list[str] | None = None,
) -> np.ndarray:
    """Decode the bytes of an image file; `path` names its source in errors. See `from_pil`."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            return from_pil(image, image_size, grey, done)
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        raise UserError(
            f"{path}: a cell of its image column is not a readable image"
            f" ({_reason(data[:12], error)})"
        ) from error


def from_file(
    file: Path, image_size: int | None, grey: bool | None, done: list[str] | None = None
) -> np.ndarray:
    """Decode an image file. See `from_pil`."""
    from PIL import Image

    try:
        with Image.open(file, formats=_formats()) as image:
            return from_pil(image, image_size, grey, done)
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        raise UserError(f"{file}: not a readable image ({_reason(_head(file), error)})") from error


def from_pil(
    image: Any, image_size: int | None, grey: bool | None, done: list[str] | None = None
) -> np.ndarray:
    """Convert a Pillow image to bytes, upright and on white.

    Args:
        image: a PIL.Image.
        image_size: side in pixels to resize to (bilinear); None keeps the size.
        grey: one channel (True) or three (False); None decides by the image's mode.
        done: gets TURNED and ON_WHITE if that changed the image. Threads may share it.

    Returns:
        uint8 (C, H, W).
    """
    from PIL import Image

    # Some formats have their metadata behind the pixels.
    image.load()
    if grey is None:
        grey = _is_grey(image)
    method = turn(image)
    if method is not None:
        image = image.transpose(method)
        _report(done, TURNED)

    # Transparent pixels often are black, and so is the drawing on them.
    image = _eight_bits(image)
    if image.has_transparency_data:
        image = _on_white(image, done)
    image = image.convert("L" if grey else "RGB")
    if image_size is not None and image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def turn(image: Any) -> Any:
    """Return the PIL.Image.Transpose that turns an image upright; None if it is, or says nothing.

    A camera writes pixels as its sensor lies, and how it was held into EXIF.
    """
    from PIL import Image

    # Most images have no metadata, and parsing them takes as long as decoding a small image.
    if not any(key in image.info for key in METADATA):
        return None
    try:
        orientation = image.getexif().get(ORIENTATION)
    except (*UNREADABLE, KeyError, struct.error, Warning):
        # Damaged metadata do not make the pixels worse.
        return None
    name = TURNS.get(orientation)
    return None if name is None else Image.Transpose[name]


def _on_white(image: Any, done: list[str] | None) -> Any:
    """Put an image with an alpha channel on white; one without transparent pixels is unchanged."""
    from PIL import Image

    # A palette and a transparent colour become an alpha channel here.
    with_alpha = image.convert("RGBA")
    if with_alpha.getextrema()[3][0] == 255:
        return image
    _report(done, ON_WHITE)
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, with_alpha)


def _report(done: list[str] | None, change: str) -> None:
    # Appending to a list is safe from several threads.
    if done is not None:
        done.append(change)


def why_unreadable(file: Path) -> str | None:
    """Return why a file is not read as an image; None for an image, and for what claims to be one.

    A damaged file with the suffix of an image is an error when it is decoded, and not left out.
    """
    from PIL import Image

    if file.suffix.lower() in IMAGE_SUFFIXES:
        return None
    try:
        # The head is enough to tell what it is.
        with Image.open(file, formats=_formats()):
            return None
    except (*UNREADABLE, Image.DecompressionBombError):
        other = OTHER_FORMATS.get(_head(file)[4:12])
        return f"{other}, which is not read" if other else "not an image"


class Head(NamedTuple):
    """What an image says of itself before it is decoded."""

    width: int
    """Width in pixels after turning upright."""
    height: int
    grey: bool
    """Whether it has one channel rather than three."""
    turned: bool
    alpha: bool
    """Whether it has an alpha channel, or a colour that means transparent."""


def read_head(source: Any) -> Head:
    """Read the head of an image file.

    Args:
        source: a path or a binary stream.

    Raises:
        UserError: not an image.
    """
    from PIL import Image

    try:
        # Pillow reads no pixels before they are asked for.
        with Image.open(source, formats=_formats()) as image:
            method = turn(image)
            width, height = image.size
            if method is not None and method.name in SIDES_SWAPPED:
                width, height = height, width
            alpha = image.has_transparency_data
            return Head(width, height, _is_grey(image), method is not None, alpha)
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        raise UserError(f"not a readable image ({error})") from error


def _is_grey(image: Any) -> bool:
    return image.mode in ("1", "L") or image.mode.startswith("I;16")


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """Return those of IMAGE_FORMATS that this Pillow has."""
    from PIL import Image

    Image.init()
    return tuple(name for name in IMAGE_FORMATS if name in Image.OPEN)


def _head(file: Path) -> bytes:
    """Read the first bytes of a file, by which formats are told apart; none if it is unreadable."""
    try:
        with open(file, "rb") as stream:
            return stream.read(12)
    except OSError:
        return b""


def _reason(head: bytes, error: Exception) -> str:
    """Return what Pillow says of a file, or which format it is if that is known."""
    other = OTHER_FORMATS.get(head[4:12])
    return f"it is {other}: save it as JPEG or PNG" if other else str(error)


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
