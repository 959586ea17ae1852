"""Adaptive-Blend: half of a faint picture, with cover samples.

Revisiting the Assumption of Latent Separability for Backdoor Defenses. X. Qi, T. Xie, Y. Li, S.
Mahloujifar, P. Mittal. ICLR 2023. https://openreview.net/forum?id=_wSHsgrVali

Kind: poisoning, dirty-label, all-to-one or all-to-all, with cover samples. The picture is cut into
cells. Each stamped training image gets a random half of them; a test image gets the whole picture.

Departs from backdoor-toolbox: the picture is drawn from the seed, so there is no file to download.
The cells of an image are drawn from seed and index.
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
    """Share of the whole training set that is poisoned, in (0, 1]; higher makes the attack stronger
    and easier to find."""
    alpha: float = 0.15
    """Opacity of the picture on training images, in (0, 1]; higher is easier to learn and to
    see."""
    test_alpha: float = 0.2
    """Opacity of the picture on test images, in (0, 1]; higher raises the ASR and changes no
    training image."""
    grid: int = 4
    """Cells per side of the picture; more cut it into smaller pieces."""
    masked: int = 8
    """Cells that each training image goes without; more hide the trigger better in training. 0
    masks nothing."""

    RANGES: ClassVar[dict[str, str]] = {
        "alpha": "(0, 1]",
        "test_alpha": "(0, 1]",
        "grid": ">= 1",
        "masked": ">= 0",
    }


def stamp(images: Tensor, index: Tensor, split: str, config: Config) -> Tensor:
    """Mix the picture t in: x + alpha m (t - x), rounded. The mask m is 1 on test images.

    Args:
        images: uint8 (N, C, H, W).
        index: int64 (N,), positions in the split; the mask of a training image depends on it.
        split: "train" or "test".
        config: the options.

    Returns:
        uint8 (N, C, H, W).
    """
    height, width = images.shape[2:]
    if config.grid > min(height, width) or config.masked >= config.grid**2:
        raise UserError(
            f"the grid must have at most {min(height, width)} cells a side for these images and"
            f" more cells than are masked, got grid {config.grid}, masked {config.masked}"
        )

    # t - x: adding a share of it to x mixes the picture in by that share.
    difference = cartoon(config.seed, *images.shape[1:]).float() - images
    if split == "test":
        # The paper's asymmetric trigger: a test image gets all of it, and more opaque.
        return quantised(images + config.test_alpha * difference)

    # Rank the cells of each image by its own draws; the first `masked` of them are left out.
    rank = image_draws(config.seed, split, index, config.grid**2).argsort(1).argsort(1)
    kept = (rank >= config.masked).float().view(-1, 1, config.grid, config.grid)
    return quantised(images + config.alpha * F.interpolate(kept, (height, width)) * difference)


if __name__ == "__main__":
    raise SystemExit(main(__file__))
