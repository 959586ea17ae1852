"""Blended: a whole picture, faintly mixed in, is the trigger.

Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning. X. Chen, C. Liu, B. Li, K.
Lu, D. Song. 2017. https://arxiv.org/abs/1712.05526

Kind: poisoning, dirty-label, all-to-one or all-to-all.

Departs from the usual scripts: the picture is drawn from the seed, so there is no file to download.
The mixture is rounded to bytes, not truncated.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from backdoorlab.cli import main
from backdoorlab.config import AttackConfig
from backdoorlab.errors import UserError
from backdoorlab.triggers import cartoon, noise_picture


@dataclass(frozen=True, kw_only=True)
class Config(AttackConfig):
    alpha: float = 0.2
    """Opacity of the picture, in (0, 1]; higher is easier to learn and to see."""
    picture: Literal["cartoon", "noise"] = "cartoon"
    """cartoon: coloured shapes over a colour gradient. noise: independent uniform pixels, the
    paper's random pattern."""


def stamp(images: Tensor, index: Tensor, split: str, config: Config) -> Tensor:
    """Mix the picture t into every image: (1 - alpha) x + alpha t, rounded.

    Args:
        images: uint8 (N, C, H, W).
        index: not used; the picture is the same for all images.
        split: not used.
        config: the options.

    Returns:
        uint8 (N, C, H, W).
    """
    if not 0 < config.alpha <= 1:
        raise UserError(f"alpha must lie in (0, 1], got {config.alpha}")

    # One picture for all images of both splits.
    draw = cartoon if config.picture == "cartoon" else noise_picture
    picture = draw(config.seed, *images.shape[1:])

    # The paper's blended injection, rounded: truncation would darken an image by half a level on
    # average.
    return ((1 - config.alpha) * images.float() + config.alpha * picture.float()).round().byte()


if __name__ == "__main__":
    raise SystemExit(main(__file__))
