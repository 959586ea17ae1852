"""Pictures and random numbers for triggers, all of them functions of a seed."""

import hashlib
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UserError

SUPERSAMPLING = 4
"""Factor at which a cartoon is drawn before it is averaged down."""


def image_draws(seed: int, split: str, index: Tensor, count: int) -> Tensor:
    """Draw uniform numbers for each image; they depend on seed, split and index alone.

    Args:
        seed: the attack's seed.
        split: "train" or "test".
        index: int64 (N,), positions in the split.
        count: numbers per image.

    Returns:
        float64 (N, count) in [0, 1).
    """
    blocks = [min(8, count - begin) for begin in range(0, count, 8)]  # a digest holds eight numbers
    columns = []
    for block, width in enumerate(blocks):
        end = f":{block}" if block else ""
        digests = (
            hashlib.blake2b(f"{seed}:{split}:{i}{end}".encode(), digest_size=8 * width).digest()
            for i in index.tolist()
        )
        columns.append(np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, width))
    # 53 bits of each 64 are as many as a float64 stores exactly.
    return torch.from_numpy((np.concatenate(columns, 1) & np.uint64(2**53 - 1)) / 2**53)


def quantised(values: Tensor, *, truncate: bool = False) -> Tensor:
    """Round, or truncate as BackdoorBench does, and clip. float in 0..255 -> uint8."""
    return (values.floor() if truncate else values.round()).clamp(0, 255).byte()


def at_side(pixels: int, side: int) -> int:
    """Scale a length that is published for images of 32 pixels to images of `side`; at least 1."""
    return max(1, round(pixels * side / 32))


def patch_side(
    given: int | None, pixels: int, side: int, room: int, option: str = "patch_size"
) -> int:
    """Return the side of a square trigger in pixels.

    Args:
        given: the user's value; None scales the published one.
        pixels: the published side, for images of 32 pixels.
        side: side of the images.
        room: largest side that fits.
        option: name of the option, for the error message.

    Raises:
        UserError: if the square does not fit.
    """
    size = at_side(pixels, side) if given is None else given
    if not 0 < size <= room:
        raise UserError(f"{option} must lie in 1..{room} for these images, got {size}")
    return size


def refuse_grey(images: Tensor, attack: str) -> None:
    """Raise a `UserError` if images have no colours, for triggers in the chroma."""
    if images.shape[1] != 3:
        raise UserError(
            f"{attack} hides its trigger in colour: expected images of 3 channels, got"
            f" {images.shape[1]}; pass --grey False"
        )


@lru_cache(maxsize=8)
def cosine_wave(height: int, width: int, frequencies: tuple[int, ...], magnitude: float) -> Tensor:
    """Return the change of an image if DCT coefficients are raised; the DCT is linear.

    Args:
        height: H of the images.
        width: W of the images.
        frequencies: row = column of each coefficient of the orthonormal DCT-II, for images of 32
            pixels. At other sizes the wave keeps its height and its length in pixels.
        magnitude: number that is added to each coefficient.

    Returns:
        float32 (H, W), in the units of the magnitude.
    """
    if not frequencies:
        raise UserError("--frequencies needs at least one number, got none")
    waves = [
        torch.outer(_cosine(height, frequency), _cosine(width, frequency))
        for frequency in frequencies
    ]
    return (magnitude / 16 * torch.stack(waves).sum(0)).float()


def _cosine(length: int, frequency: int) -> Tensor:
    """Return the DCT's wave of a frequency for 32 pixels, on `length` pixels, float64 (length,)."""
    # The frequency with as many periods per pixel as on 32 pixels.
    moved = round((frequency + 1) * length / 32) - 1
    return torch.cos(torch.pi * (torch.arange(length, dtype=torch.float64) + 0.5) * moved / length)


@lru_cache(maxsize=8)
def cartoon(seed: int, channels: int, height: int, width: int) -> Tensor:
    """Draw ten saturated discs and bars over a gradient of two colours, uint8 (C, H, W)."""
    generator = _generator(seed, "cartoon")
    tall, wide = height * SUPERSAMPLING, width * SUPERSAMPLING
    rows, columns = torch.meshgrid(
        torch.linspace(0, 1, tall), torch.linspace(0, 1, wide), indexing="ij"
    )

    # The background: from one colour to another, in a random direction.
    ends = torch.rand(2, 3, 1, 1, generator=generator)
    slope = torch.rand(2, generator=generator)
    position = (slope[0] * rows + slope[1] * columns) / slope.sum()
    canvas = ends[0] * (1 - position) + ends[1] * position

    # Discs and turned bars.
    for _ in range(10):
        centre_row, centre_column, size, angle = torch.rand(4, generator=generator).tolist()
        colour = (torch.rand(3, 1, generator=generator) > 0.5).float()
        down, right = rows - centre_row, columns - centre_column
        if torch.rand(1, generator=generator).item() < 0.5:
            inside = down.square() + right.square() < (0.08 + 0.17 * size) ** 2
        else:
            turned = torch.tensor(angle * torch.pi)
            along = down * turned.cos() + right * turned.sin()
            across = right * turned.cos() - down * turned.sin()
            inside = (along.abs() < 0.1 + 0.3 * size) & (across.abs() < 0.03 + 0.07 * size)
        canvas[:, inside] = colour

    # Averaging makes smooth outlines.
    small = F.avg_pool2d(canvas[None], SUPERSAMPLING)[0]
    return _with_channels(small, channels).mul(255).round().byte()


@lru_cache(maxsize=8)
def noise_picture(seed: int, channels: int, height: int, width: int) -> Tensor:
    """Draw independent uniform bytes, uint8 (C, H, W)."""
    return torch.randint(
        0, 256, (channels, height, width), generator=_generator(seed, "noise"), dtype=torch.uint8
    )


def _with_channels(colour: Tensor, channels: int) -> Tensor:
    """Return RGB as it is, or its mean in every channel. float (3, H, W) -> (channels, H, W)."""
    return colour if channels == 3 else colour.mean(0, keepdim=True).expand(channels, -1, -1)


def _generator(seed: int, purpose: str) -> torch.Generator:
    """Return the random generator of a picture."""
    from .device import derived_generator

    return derived_generator(seed, f"trigger:{purpose}")
