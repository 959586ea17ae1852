"""Pictures and random numbers that attacks share, all of them functions of a seed."""

import hashlib
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

SUPERSAMPLING = 4


def image_draws(seed: int, split: str, index: Tensor, count: int) -> Tensor:
    """`count` uniform numbers in [0, 1) for each image, float64 (N, count): a function of seed, split and index alone."""
    keys = (f"{seed}:{split}:{i}".encode() for i in index.tolist())
    words = [int.from_bytes(hashlib.blake2b(key, digest_size=8 * count).digest(), "little") for key in keys]
    return torch.tensor([[(word >> 64 * k & (2**53 - 1)) / 2**53 for k in range(count)] for word in words], dtype=torch.float64).view(-1, count)


@lru_cache(maxsize=8)
def cartoon(seed: int, channels: int, height: int, width: int) -> Tensor:
    """Ten saturated discs and bars over a gradient of two colours, uint8 (C, H, W), drawn at four times the size and averaged."""
    generator = _generator(seed, "cartoon")
    tall, wide = height * SUPERSAMPLING, width * SUPERSAMPLING
    rows, columns = torch.meshgrid(torch.linspace(0, 1, tall), torch.linspace(0, 1, wide), indexing="ij")
    ends = torch.rand(2, 3, 1, 1, generator=generator)
    slope = torch.rand(2, generator=generator)
    course = (slope[0] * rows + slope[1] * columns) / slope.sum()
    canvas = ends[0] * (1 - course) + ends[1] * course
    for _ in range(10):
        centre_row, centre_column, size, angle = torch.rand(4, generator=generator).tolist()
        colour = (torch.rand(3, 1, generator=generator) > 0.5).float()
        down, right = rows - centre_row, columns - centre_column
        if torch.rand(1, generator=generator).item() < 0.5:
            inside = down.square() + right.square() < (0.08 + 0.17 * size) ** 2
        else:
            turned = torch.tensor(angle * torch.pi)
            along, across = down * turned.cos() + right * turned.sin(), right * turned.cos() - down * turned.sin()
            inside = (along.abs() < 0.1 + 0.3 * size) & (across.abs() < 0.03 + 0.07 * size)
        canvas[:, inside] = colour
    small = F.avg_pool2d(canvas[None], SUPERSAMPLING)[0]
    return _with_channels(small, channels).mul(255).round().byte()


@lru_cache(maxsize=8)
def noise_picture(seed: int, channels: int, height: int, width: int) -> Tensor:
    """Independent uniform bytes, uint8 (C, H, W)."""
    return torch.randint(0, 256, (channels, height, width), generator=_generator(seed, "noise"), dtype=torch.uint8)


def _with_channels(colour: Tensor, channels: int) -> Tensor:
    """RGB (3, H, W) as it is, or its mean for grey images."""
    return colour if channels == 3 else colour.mean(0, keepdim=True).expand(channels, -1, -1)


def _generator(seed: int, purpose: str) -> torch.Generator:
    from .engine import derived_generator

    return derived_generator(seed, f"trigger:{purpose}")
