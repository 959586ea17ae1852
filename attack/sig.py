"""SIG: a sine wave of brightness over the target class.

A New Backdoor Attack in CNNs by Training Set Corruption without Label Poisoning. M. Barni, K.
Kallas, B. Tondi. ICIP 2019. https://arxiv.org/abs/1902.11237

Kind: poisoning, clean-label, all-to-one.

Departs from BackdoorBench's script: half of the target class is poisoned by default. There it is
10 % of CIFAR-10, which leaves no clean image of that class. The sum is rounded; `--bb_compat True`
truncates it, as BackdoorBench does.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from backdoorlab.cli import main
from backdoorlab.config import CleanLabelConfig
from backdoorlab.triggers import quantised

LIMITS = "digits: ASR 0; a wave strong enough looks like a zero to a clean network, too"


@dataclass(frozen=True, kw_only=True)
class Config(CleanLabelConfig):
    delta: float = 40.0
    """Amplitude of the wave in grey levels, in (0, 255]; higher is easier to learn and to see."""
    frequency: float = 6.0
    """Periods across the width of an image; higher makes narrower stripes."""
    bb_compat: bool = False
    """Truncate to bytes, as BackdoorBench does."""

    RANGES: ClassVar[dict[str, str]] = {"delta": "(0, 255]", "frequency": "> 0"}


def stamp(images: Tensor, index: Tensor, split: str, config: Config) -> Tensor:
    """Add one wave to all rows and channels: x + delta sin(2 pi j f / W) in column j, clipped.

    Args:
        images: uint8 (N, C, H, W).
        index: not used; every image gets the same trigger.
        split: not used.
        config: the options.

    Returns:
        uint8 (N, C, H, W).
    """
    # f periods at any width: the stripes grow with the image.
    width = images.shape[3]
    wave = config.delta * torch.sin(
        2 * torch.pi * config.frequency * torch.arange(width, dtype=torch.float64) / width
    )

    # The label stays, because only images of the target class are poisoned.
    return quantised(images + wave.float(), truncate=config.bb_compat)


if __name__ == "__main__":
    raise SystemExit(main(__file__))
