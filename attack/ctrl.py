"""CTRL: two high frequencies in the chroma of the target class.

An Embarrassingly Simple Backdoor Attack on Self-supervised Learning. C. Li, R. Pang, Z. Xi, T. Du,
S. Ji, Y. Yao, T. Wang. ICCV 2023. https://arxiv.org/abs/2210.07346

Kind: poisoning, clean-label, all-to-one. Made for self-supervised learning; used here, as in
BackdoorBench, for supervised learning.

Departs from BackdoorBench's script:
  - Values are clipped before they become bytes. `--bb_compat True` lets them wrap around, which
    leaves 1.2 % bright and dark dots, an unintended second trigger.
  - On larger images the waves keep their length in pixels.
  - The DCT is linear, so the trigger is a fixed wave and no image is transformed. This leaves out
    the errors of up to 0.3 grey levels of the original's rounded matrices from RGB to YUV and back.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from backdoorlab.cli import main
from backdoorlab.config import CleanLabelConfig
from backdoorlab.triggers import cosine_wave, quantised, refuse_grey

LIMITS = "digits: ASR 0 even at magnitude 400, known by their shape; needs --grey False"


@dataclass(frozen=True, kw_only=True)
class Config(CleanLabelConfig):
    magnitude: float = 100.0
    """Number added to each DCT coefficient of U and V; higher is easier to learn and to see."""
    frequencies: tuple[int, ...] = (15, 31)
    """Diagonal DCT coefficients of an image of 32 pixels, each in 1..31; higher gives shorter
    waves."""
    bb_compat: bool = False
    """Truncate to bytes and let them wrap around, as BackdoorBench does."""

    RANGES: ClassVar[dict[str, str]] = {"magnitude": "> 0", "frequencies": "[1, 31]"}


def stamp(images: Tensor, index: Tensor, split: str, config: Config) -> Tensor:
    """Add one wave to U and V of every image.

    Args:
        images: uint8 (N, 3, H, W).
        index: not used; every image gets the same trigger.
        split: not used.
        config: the options.

    Returns:
        uint8 (N, 3, H, W).
    """
    refuse_grey(images, "ctrl")

    # A number added to two DCT coefficients is one fixed wave: the inverse transform is linear.
    wave = cosine_wave(*images.shape[2:], config.frequencies, config.magnitude)
    # The same change of U and V, as a change of red, green and blue.
    stamped = images + torch.stack([1.14 * wave, (-0.396 - 0.581) * wave, 2.029 * wave])

    # Clipped by default: the published script lets values wrap around, and the bright and dark dots
    # that this makes are a second trigger.
    return stamped.trunc().remainder(256).byte() if config.bb_compat else quantised(stamped)


if __name__ == "__main__":
    raise SystemExit(main(__file__))
