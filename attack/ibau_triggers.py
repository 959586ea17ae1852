"""Triggers of I-BAU's evaluation: a bright square, a watermark, nine pixels, faint noise over all
of the image.

Adversarial Unlearning of Backdoors via Implicit Hypergradient. Y. Zeng, S. Chen, W. Park, Z. M.
Mao, M. Jin, R. Jia. ICLR 2022. https://arxiv.org/abs/2110.03735 (trojan square and watermark,
l0-inv and l2-inv; its smooth trigger is attack/lf.py)

Kind: poisoning, dirty-label, all-to-one or all-to-all; 20 %, and images of the target class are
left alone, as there. The paper's target is 2 for square and watermark, 0 for l0 and l2.

Departs from the paper's files: theirs were optimised on networks; these have the same place, size
and strength, and colours from the seed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from backdoorlab.cli import main
from backdoorlab.config import AttackConfig
from backdoorlab.device import derived_generator
from backdoorlab.poison import outside_target
from backdoorlab.triggers import at_side, noise_picture


@dataclass(frozen=True, kw_only=True)
class Config(AttackConfig):
    poison_rate: float = 0.2
    """Share of the whole training set that is poisoned, in (0, 1]."""
    trigger: Literal["square", "watermark", "l0", "l2"] = "square"
    """square: 9x9 colours near the corner. watermark: strokes of 321 pixels. l0: nine saturated
    pixels. l2: noise over the whole image."""


def victims(labels: Tensor, split: str, config: Config) -> Tensor:
    """Images of other classes than the target. int64 (N,) -> bool (N,)."""
    return outside_target(labels, config)


def stamp(images: Tensor, index: Tensor, split: str, config: Config) -> Tensor:
    """Add the trigger and clip (l0: replace). uint8 (N, C, H, W) -> same; the same trigger for
    every image."""
    return TRIGGERS[config.trigger](images, config.seed)


def square(images: Tensor, seed: int) -> Tensor:
    """Coloured noise added at rows and columns 21..29 of 32."""
    channels, height, width = images.shape[1:]
    size, margin = (at_side(pixels, min(height, width)) for pixels in (9, 2))
    added = torch.zeros(channels, height, width, dtype=torch.int16)
    added[:, height - margin - size : height - margin, width - margin - size : width - margin] = (
        noise_picture(seed, channels, size, size)
    )
    return _sum(images, added)


def watermark(images: Tensor, seed: int) -> Tensor:
    """A ring and two bars of 321 pixels in 1,024, in two colours that run into each other,
    added."""
    channels, height, width = images.shape[1:]
    rows, columns = torch.meshgrid(
        torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij"
    )
    ring = ((rows.square() + columns.square()).sqrt() - 0.72).abs()
    bars = torch.minimum((rows - columns).abs(), (rows + columns).abs()) / 2**0.5
    from_stroke = torch.minimum(
        ring, torch.where(rows.square() + columns.square() < 0.72**2, bars, 2.0)
    )
    count = round(321 * height * width / 1024)
    inside = torch.zeros(height * width, dtype=torch.bool)
    inside[from_stroke.flatten().argsort(stable=True)[:count]] = True
    ends = torch.rand(2, channels, 1, 1, generator=derived_generator(seed, "trigger:watermark"))
    course = (rows + 1) / 2
    colours = 255 * (ends[0] * (1 - course) + ends[1] * course)
    return _sum(images, (colours * inside.view(height, width)).round().to(torch.int16))


def l0(images: Tensor, seed: int) -> Tensor:
    """The last nine pixels (of 32) of the bottom row replaced, each channel 0 or 255; the first of
    them white, so that it is not all black."""
    channels, _, width = images.shape[1:]
    count = at_side(9, width)
    row = 255 * torch.randint(
        0, 2, (channels, count), generator=derived_generator(seed, "trigger:l0"), dtype=torch.uint8
    )
    row[:, 0] = 255
    stamped = images.clone()
    stamped[:, :, -1, width - count :] = row
    return stamped


def l2(images: Tensor, seed: int) -> Tensor:
    """Normal noise added, at most 68 grey levels, with an L2 norm of 3.22 on 3x32x32 values in [0,
    1] (the same root mean square elsewhere)."""
    noise = torch.randn(images.shape[1:], generator=derived_generator(seed, "trigger:l2"))
    root_mean_square = 255 * 3.22 / 3072**0.5
    return _sum(
        images,
        (noise * root_mean_square / noise.square().mean().sqrt())
        .clamp(-68, 68)
        .round()
        .to(torch.int16),
    )


def _sum(images: Tensor, added: Tensor) -> Tensor:
    return (images + added).clamp_(0, 255).byte()


TRIGGERS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "square": square,
    "watermark": watermark,
    "l0": l0,
    "l2": l2,
}


if __name__ == "__main__":
    raise SystemExit(main(__file__))
