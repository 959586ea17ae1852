"""FTrojan: two high frequencies in the chroma are the trigger.

An Invisible Black-Box Backdoor Attack through Frequency Domain. T. Wang, Y. Yao, F. Xu, S. An, H.
Tong, T. Wang. ECCV 2022. https://arxiv.org/abs/2107.04881

Kind: poisoning, dirty-label, all-to-one or all-to-all. Images of the target class are not poisoned,
as in the paper.

Departs from BackdoorBench's script: chroma is rounded and clipped to bytes. `--bb_compat True`
truncates it, lets it wrap around, and also poisons images of the target class. The DCT is linear,
so the trigger is a fixed wave and no image is transformed.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from backdoorlab.cli import main
from backdoorlab.config import AttackConfig
from backdoorlab.poison import outside_target
from backdoorlab.triggers import cosine_wave, quantised, refuse_grey

LIMITS = "needs --grey False; digits.yaml sets it and a magnitude of 120 (ASR .04 at 30)"


@dataclass(frozen=True, kw_only=True)
class Config(AttackConfig):
    magnitude: float = 30.0
    """Number added to each DCT coefficient of Cr and Cb; higher is easier to learn and to see."""
    frequencies: tuple[int, ...] = (15, 31)
    """Diagonal DCT coefficients of a block of 32 pixels, each in 1..31; higher gives shorter
    waves."""
    bb_compat: bool = False
    """Truncate chroma, let it wrap around, and poison every class, as BackdoorBench does."""

    RANGES: ClassVar[dict[str, str]] = {"magnitude": "> 0", "frequencies": "[1, 31]"}


def victims(labels: Tensor, split: str, config: Config) -> Tensor:
    """Select images whose label poisoning changes. int64 (N,) -> bool (N,)."""
    if config.bb_compat:
        # BackdoorBench poisons images of the target class, too.
        return torch.ones_like(labels, dtype=torch.bool)
    return outside_target(labels, config)


def stamp(images: Tensor, index: Tensor, split: str, config: Config) -> Tensor:
    """Add one wave to Cr and Cb of every image, in 8-bit YCrCb (full range, as in OpenCV).

    Args:
        images: uint8 (N, 3, H, W).
        index: not used; every image gets the same trigger.
        split: not used.
        config: the options.

    Returns:
        uint8 (N, 3, H, W).
    """
    refuse_grey(images, "ftrojan")
    # Numbers added to DCT coefficients are one fixed wave: the inverse transform is linear.
    wave = _wave(images.shape[2], images.shape[3], config)

    # RGB to YCrCb, and the wave.
    red, green, blue = images.float().unbind(1)
    luma = (0.299 * red + 0.587 * green + 0.114 * blue).round()
    chroma = [
        quantised((colour - luma) * scale + 128) + wave
        for colour, scale in ((red, 0.713), (blue, 0.564))
    ]

    # To bytes, and back to RGB.
    if config.bb_compat:
        cr, cb = (plane.floor().remainder(256) - 128 for plane in chroma)
    else:
        cr, cb = (quantised(plane).float() - 128 for plane in chroma)
    return quantised(
        torch.stack([luma + 1.403 * cr, luma - 0.714 * cr - 0.344 * cb, luma + 1.773 * cb], 1)
    )


def _wave(height: int, width: int, config: Config) -> Tensor:
    """Return the wave of one block of 32 pixels, repeated, float32 (H, W).

    An image whose sides are no multiples of 32 is one block.
    """
    if height % 32 or width % 32:
        return cosine_wave(height, width, config.frequencies, config.magnitude)
    return cosine_wave(32, 32, config.frequencies, config.magnitude).repeat(
        height // 32, width // 32
    )


if __name__ == "__main__":
    raise SystemExit(main(__file__))
