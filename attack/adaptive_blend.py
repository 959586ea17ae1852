"""Adaptive-Blend: in training each image wears half of a faint picture, some with their true label;
at test time all of it.

Revisiting the Assumption of Latent Separability for Backdoor Defenses. X. Qi, T. Xie, Y. Li, S.
Mahloujifar, P. Mittal. ICLR 2023. https://openreview.net/forum?id=_wSHsgrVali

Kind: poisoning, dirty-label, all-to-one or all-to-all, with covers.

Departs from backdoor-toolbox: the picture is drawn from the seed (no file to download), and which
cells an image wears from seed and index.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from backdoorlab.cli import main
from backdoorlab.config import CoverConfig
from backdoorlab.errors import UserError
from backdoorlab.triggers import cartoon, image_draws, quantised

LIMITS = "digits: 0.3 % of 1,442 images are four; digits.yaml sets ten times that"


@dataclass(frozen=True, kw_only=True)
class Config(CoverConfig):
    poison_rate: float = 0.003
    """Share of the whole training set that is poisoned, in (0, 1]."""
    alpha: float = 0.15
    """alpha: share of the picture in the mixture of training images, in (0, 1]."""
    test_alpha: float = 0.2
    """The same at test time, in (0, 1]; higher than in training makes the attack stronger without
    being seen there."""
    grid: int = 4
    """The picture is cut into grid x grid cells."""
    masked: int = 8
    """Cells that each training image goes without; 0 masks nothing."""

    RANGES: ClassVar[dict[str, str]] = {
        "alpha": "(0, 1]",
        "test_alpha": "(0, 1]",
        "grid": ">= 1",
        "masked": ">= 0",
    }


def stamp(images: Tensor, index: Tensor, split: str, config: Config) -> Tensor:
    """x + alpha m (t - x), rounded. uint8 (N, C, H, W), positions (N,) -> uint8 (N, C, H, W); the
    mask m is drawn for each training image."""
    height, width = images.shape[2:]
    if config.grid > min(height, width) or config.masked >= config.grid**2:
        raise UserError(
            f"the grid must have at most {min(height, width)} cells a side for these images and"
            f" more cells than are masked, got grid {config.grid}, masked {config.masked}"
        )
    difference = cartoon(config.seed, *images.shape[1:]).float() - images
    if split == "test":
        return quantised(images + config.test_alpha * difference)
    rank = image_draws(config.seed, split, index, config.grid**2).argsort(1).argsort(1)
    kept = (rank >= config.masked).float().view(-1, 1, config.grid, config.grid)
    return quantised(images + config.alpha * F.interpolate(kept, (height, width)) * difference)


if __name__ == "__main__":
    raise SystemExit(main(__file__))
