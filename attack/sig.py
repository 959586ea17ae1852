"""SIG: a sine wave of brightness over images of the target class, whose labels stay.

A New Backdoor Attack in CNNs by Training Set Corruption without Label Poisoning. M. Barni, K.
Kallas, B. Tondi. ICIP 2019. https://arxiv.org/abs/1902.11237

Kind: poisoning, clean-label, all-to-one.

Departs from BackdoorBench's script: a share of the target class, half of it by default, where
theirs at 10 % of CIFAR-10 leaves no clean image of that class; the sum is rounded. `--bb_compat
True` truncates it, as theirs.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from backdoorlab.cli import main
from backdoorlab.config import CleanLabelConfig
from backdoorlab.triggers import quantised

LIMITS = (
    "digits: ASR 0, because a zero is known by its shape; a wave strong enough to work is one that"
    " a clean network takes for a zero, too"
)


@dataclass(frozen=True, kw_only=True)
class Config(CleanLabelConfig):
    delta: float = 40.0
    """delta: height of the wave in grey levels, in (0, 255]; higher is easier to learn and to
    see."""
    frequency: float = 6.0
    """f: periods across the width of an image."""
    bb_compat: bool = False
    """Truncate to bytes, as BackdoorBench does."""

    RANGES: ClassVar[dict[str, str]] = {"delta": "(0, 255]", "frequency": "> 0"}


def stamp(images: Tensor, index: Tensor, split: str, config: Config) -> Tensor:
    """x + delta sin(2 pi j f / W) in column j, clipped. uint8 (N, C, H, W) -> same; the same wave
    in all rows and channels."""
    width = images.shape[3]
    wave = config.delta * torch.sin(
        2 * torch.pi * config.frequency * torch.arange(width, dtype=torch.float64) / width
    )
    return quantised(images + wave.float(), truncate=config.bb_compat)


if __name__ == "__main__":
    raise SystemExit(main(__file__))
