"""BadNets: a small patch of pixels is the trigger.

BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain. T. Gu, B.
Dolan-Gavitt, S. Garg. 2017. https://arxiv.org/abs/1708.06733

Kind: poisoning, dirty-label, all-to-one or all-to-all.

Departs from BackdoorBench's script: the patch is drawn at the images' own size. (There it is a
32x32 picture that is resized, which leaves a dark fringe on larger images.) The patch is opaque, so
it can also be black.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from backdoorlab.cli import main
from backdoorlab.config import AttackConfig
from backdoorlab.errors import UserError
from backdoorlab.triggers import image_draws, patch_side


@dataclass(frozen=True, kw_only=True)
class Config(AttackConfig):
    patch_size: int | None = None
    """Side of the square in pixels; larger is easier to learn and to see. None: 3 for every 32
    pixels of the image."""
    patch_value: int = 255
    """Grey level of the square, from 0 (black) to 255 (white)."""
    position: Literal["corner", "random"] = "corner"
    """corner: bottom right. random: drawn for each image from the seed and its index."""


def stamp(images: Tensor, index: Tensor, split: str, config: Config) -> Tensor:
    """Paint the square.

    Args:
        images: uint8 (N, C, H, W).
        index: int64 (N,), positions in the split; a random place depends on it.
        split: "train" or "test".
        config: the options.

    Returns:
        uint8 (N, C, H, W).
    """
    height, width = images.shape[2:]
    size = patch_side(config.patch_size, 3, height, min(height, width))
    if not 0 <= config.patch_value <= 255:
        raise UserError(f"patch_value must lie in 0..255, got {config.patch_value}")

    # Top left corner of the square in each image, int64 (N,).
    if config.position == "corner":
        top, left = torch.full_like(index, height - size), torch.full_like(index, width - size)
    else:
        draws = image_draws(config.seed, split, index, 2)
        top = (draws[:, 0] * (height - size + 1)).long()
        left = (draws[:, 1] * (width - size + 1)).long()

    # Which pixels lie in the square, bool (N, 1, H, W): each image may have its own place.
    rows, columns = torch.arange(height), torch.arange(width)
    in_rows = (rows >= top[:, None]) & (rows < top[:, None] + size)
    in_columns = (columns >= left[:, None]) & (columns < left[:, None] + size)
    square = in_rows[:, None, :, None] & in_columns[:, None, None, :]
    return images.masked_fill(square, config.patch_value)


if __name__ == "__main__":
    raise SystemExit(main(__file__))
