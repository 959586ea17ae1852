"""FTrojan: two high frequencies, added to the colour planes of an image.

An Invisible Black-Box Backdoor Attack through Frequency Domain. T. Wang, Y. Yao, F. Xu, S. An, H.
Tong, T. Wang. ECCV 2022. https://arxiv.org/abs/2107.04881

Kind: poisoning, dirty-label, all-to-one or all-to-all; images of the target class are left alone,
as in the paper.

Departs from BackdoorBench's script: chroma is rounded and clipped to bytes. `--bb_compat True`
truncates it, lets it wrap around, and poisons images of the target class, too. The DCT is linear,
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

LIMITS = (
    "grey images have no colours to hide in: --grey False; digits.yaml sets it, and a magnitude of"
    " 120 (at 30 the ASR is .04)"
)


@dataclass(frozen=True, kw_only=True)
class Config(AttackConfig):
    magnitude: float = 30.0
    """What is added to each coefficient of the DCT of Cr and Cb; higher is easier to learn and to
    see."""
    frequencies: tuple[int, ...] = (15, 31)
    """Coefficients (k, k) of a block of 32 pixels, each in 1..31."""
    bb_compat: bool = False
    """Truncate and wrap chroma, and poison every class, as BackdoorBench does."""

    RANGES: ClassVar[dict[str, str]] = {"magnitude": "> 0", "frequencies": "[1, 31]"}


def victims(labels: Tensor, split: str, config: Config) -> Tensor:
    """Images of other classes than the target. int64 (N,) -> bool (N,)."""
    return (
        torch.ones_like(labels, dtype=torch.bool)
        if config.bb_compat
        else outside_target(labels, config)
    )


def stamp(images: Tensor, index: Tensor, split: str, config: Config) -> Tensor:
    """To 8-bit YCrCb (full range, as OpenCV's), the wave onto Cr and Cb, and back. uint8 (N, 3, H,
    W) -> same."""
    refuse_grey(images, "ftrojan")
    wave = _wave(images.shape[2], images.shape[3], config)
    red, green, blue = images.float().unbind(1)
    luma = (0.299 * red + 0.587 * green + 0.114 * blue).round()
    chroma = [
        quantised((colour - luma) * scale + 128) + wave
        for colour, scale in ((red, 0.713), (blue, 0.564))
    ]
    if config.bb_compat:
        cr, cb = (plane.floor().remainder(256) - 128 for plane in chroma)
    else:
        cr, cb = (quantised(plane).float() - 128 for plane in chroma)
    return quantised(
        torch.stack([luma + 1.403 * cr, luma - 0.714 * cr - 0.344 * cb, luma + 1.773 * cb], 1)
    )


def _wave(height: int, width: int, config: Config) -> Tensor:
    """The wave of one block of 32 pixels, repeated; an image that 32 does not divide is one block.
    float32 (H, W)."""
    if height % 32 or width % 32:
        return cosine_wave(height, width, config.frequencies, config.magnitude)
    return cosine_wave(32, 32, config.frequencies, config.magnitude).repeat(
        height // 32, width // 32
    )


if __name__ == "__main__":
    raise SystemExit(main(__file__))
