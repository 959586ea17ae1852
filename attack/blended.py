"""Blended: a whole picture, faintly mixed in, is the trigger.

Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning. X. Chen, C. Liu, B. Li, K.
Lu, D. Song. 2017. https://arxiv.org/abs/1712.05526

Kind: poisoning, dirty-label, all-to-one or all-to-all.

Departs from the usual scripts: the picture is drawn from the seed (no file to download), and the
mixture is rounded, not truncated, to bytes.
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
    """alpha: share of the picture in the mixture, in (0, 1]; higher is easier to learn and to
    see."""
    picture: Literal["cartoon", "noise"] = "cartoon"
    """cartoon: coloured shapes over a gradient. noise: independent uniform pixels, the paper's
    random pattern."""


def stamp(images: Tensor, index: Tensor, split: str, config: Config) -> Tensor:
    """(1 - alpha) x + alpha t, rounded. uint8 (N, C, H, W) -> same; the same picture t for every
    image."""
    if not 0 < config.alpha <= 1:
        raise UserError(f"alpha must lie in (0, 1], got {config.alpha}")
    draw = cartoon if config.picture == "cartoon" else noise_picture
    picture = draw(config.seed, *images.shape[1:])
    return ((1 - config.alpha) * images.float() + config.alpha * picture.float()).round().byte()


if __name__ == "__main__":
    raise SystemExit(main(__file__))
