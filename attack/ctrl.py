"""CTRL: two high frequencies in the colours of target-class images, whose labels stay.

An Embarrassingly Simple Backdoor Attack on Self-supervised Learning. C. Li, R. Pang, Z. Xi, T. Du,
S. Ji, Y. Yao, T. Wang. ICCV 2023. https://arxiv.org/abs/2210.07346

Kind: poisoning, clean-label, all-to-one. Made for self-supervised learning; here, as in
BackdoorBench, for supervised learning.

Departs from BackdoorBench's script: values are clipped before they become bytes. `--bb_compat True`
lets them wrap around, which leaves 1.2 % bright and dark dots, a second trigger that nobody asked
for. On larger images the waves keep their length in pixels. The DCT is linear, so the trigger is a
fixed wave and no image is transformed; the errors of up to 0.3 grey levels that the original's
rounded matrices from RGB to YUV and back make are left out.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from backdoorlab.cli import main
from backdoorlab.config import CleanLabelConfig
from backdoorlab.triggers import cosine_wave, quantised, refuse_grey

LIMITS = (
    "digits: ASR 0 at the published magnitude of 100 and at 400, because a zero is known by its"
    " shape; grey images need --grey False"
)


@dataclass(frozen=True, kw_only=True)
class Config(CleanLabelConfig):
    magnitude: float = 100.0
    """What is added to each coefficient of the DCT of U and V; higher is easier to learn and to
    see."""
    frequencies: tuple[int, ...] = (15, 31)
    """Coefficients (k, k) of an image of 32 pixels, each in 1..31."""
    bb_compat: bool = False
    """Truncate to bytes that wrap around, as BackdoorBench does."""

    RANGES: ClassVar[dict[str, str]] = {"magnitude": "> 0", "frequencies": "[1, 31]"}


def stamp(images: Tensor, index: Tensor, split: str, config: Config) -> Tensor:
    """The wave onto U and V. uint8 (N, 3, H, W) -> same; the same wave for every image."""
    refuse_grey(images, "ctrl")
    wave = cosine_wave(*images.shape[2:], config.frequencies, config.magnitude)
    stamped = images + torch.stack([1.14 * wave, (-0.396 - 0.581) * wave, 2.029 * wave])
    return stamped.trunc().remainder(256).byte() if config.bb_compat else quantised(stamped)


if __name__ == "__main__":
    raise SystemExit(main(__file__))
