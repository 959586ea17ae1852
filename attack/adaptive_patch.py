"""Adaptive-Patch: a faint patch of four, with cover samples.

Revisiting the Assumption of Latent Separability for Backdoor Defenses. X. Qi, T. Xie, Y. Li, S.
Mahloujifar, P. Mittal. ICLR 2023. https://openreview.net/forum?id=_wSHsgrVali

Kind: poisoning, dirty-label, all-to-one or all-to-all, with cover samples. Each stamped training
image gets one faint patch, drawn at random; a test image gets two patches, opaque.

Departs from backdoor-toolbox: the patches are coloured noise from the seed and a checkerboard, not
pictures in files. The patch of an image is drawn from seed and index. In backdoor-toolbox it
depends on the order of the images, so in a sorted data set each patch is used for a few classes
only. Rates and test patches for GTSRB are in resource/config/gtsrb.yaml.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorlab.cli import main
from backdoorlab.config import CoverConfig
from backdoorlab.triggers import at_side, image_draws, noise_picture, quantised

CHECKERS = 255 * torch.tensor([[0.0, 0, 1], [0, 1, 0], [1, 0, 1]])
LIMITS = "digits: ASR .08 at 3 % poison and 6 % covers; digits.yaml sets 10 % and 5 %"


@dataclass(frozen=True, kw_only=True)
class Config(CoverConfig):
    poison_rate: float = 0.003
    """Share of the whole training set that is poisoned, in (0, 1]; higher makes the attack stronger
    and easier to find."""
    cover_rate: float = 0.006
    """Share of the whole training set that becomes cover samples, in [0, 1]; higher makes the
    attack weaker and harder to find."""
    opacities: tuple[float, float, float, float] = (0.5, 0.2, 0.5, 0.3)
    """Opacities in training, each in (0, 1], of the small patch in the corner, the large patch, the
    checkers in all corners and the middle patch; higher is easier to learn and to see."""
    test_patches: Literal["corners", "large"] = "corners"
    """Patches on test images. corners: the small patch in both lower corners, and the checkers.
    large: the large and the middle patch."""

    RANGES: ClassVar[dict[str, str]] = {"opacities": "(0, 1]"}


def stamp(images: Tensor, index: Tensor, split: str, config: Config) -> Tensor:
    """Mix one faint patch into each training image, or paint the patches of test images.

    Args:
        images: uint8 (N, C, H, W).
        index: int64 (N,), positions in the split; the patch of a training image depends on it.
        split: "train" or "test".
        config: the options.

    Returns:
        uint8 (N, C, H, W).
    """
    _, channels, height, width = images.shape
    # Four areas: noise fills three of them, a checkerboard the corners.
    small, large, checkers, middle = _masks(height, width)
    noise, board = noise_picture(config.seed, channels, height, width), _board(height, width)

    # Test images: all pixels of the chosen patches, opaque.
    if split == "test" and config.test_patches == "large":
        return torch.where(large | middle, noise, images)
    if split == "test":
        # The patch on the left has the pixels of the one on the right.
        copied = torch.where(small.flip(1), noise.roll(int(small.any(0).sum()), 2), noise)
        return torch.where(
            small | small.flip(1) | checkers, torch.where(checkers, board, copied), images
        )

    # Training images: one of the four patches each, at its own opacity.
    opacity = (
        torch.stack([small, large, checkers, middle])
        * torch.tensor(config.opacities)[:, None, None]
    )
    pictures = torch.stack([noise, noise, board.expand(channels, -1, -1), noise]).float()
    # Drawn by index: in a sorted data set every class still sees all four.
    which = (image_draws(config.seed, split, index, 1)[:, 0] * 4).long()
    return quantised(images + opacity[which][:, None] * (pictures[which] - images))


def _masks(height: int, width: int) -> tuple[Tensor, ...]:
    """Return the areas of the four patches, bool (H, W) each.

    On images of 32 pixels they are 5, 13, 3 (in each corner) and 8 pixels wide.
    """
    masks = torch.zeros(4, height, width, dtype=torch.bool)
    small, large, middle, margin = (at_side(pixels, min(height, width)) for pixels in (5, 13, 8, 3))
    # Bottom right, top right, all corners, and inside the bottom right corner.
    masks[0, height - small :, width - small :] = True
    masks[1, :large, width - large :] = True
    for corner in _corners(height, width):
        masks[2][corner] = True
    masks[
        3, height - margin - middle : height - margin, width - margin - middle : width - margin
    ] = True
    return tuple(masks)


def _board(height: int, width: int) -> Tensor:
    """Return a checkerboard in every corner, uint8 (1, H, W), 0 elsewhere."""
    board, size = torch.zeros(height, width, dtype=torch.uint8), at_side(3, min(height, width))
    for corner in _corners(height, width):
        board[corner] = F.interpolate(CHECKERS[None, None], (size, size))[0, 0].byte()
    return board[None]


def _corners(height: int, width: int) -> list[tuple[slice, slice]]:
    """Return rows and columns of the four corner squares, of 3 pixels on images of 32."""
    size = at_side(3, min(height, width))
    return [
        (rows, columns)
        for rows in (slice(size), slice(height - size, height))
        for columns in (slice(size), slice(width - size, width))
    ]


if __name__ == "__main__":
    raise SystemExit(main(__file__))
