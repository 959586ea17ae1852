"""Triggers of I-BAU: square, watermark, nine pixels or noise.

Adversarial Unlearning of Backdoors via Implicit Hypergradient. Y. Zeng, S. Chen, W. Park, Z. M.
Mao, M. Jin, R. Jia. ICLR 2022. https://arxiv.org/abs/2110.03735 (trojan square and watermark,
l0-inv and l2-inv; its smooth trigger is attack/lf.py)

Kind: poisoning, dirty-label, all-to-one or all-to-all. As in the paper's evaluation, 20 % of the
images are poisoned, none of them of the target class. The paper's target is 2 for square and
watermark, 0 for l0 and l2.

Departs from the paper's files: those triggers were optimised on networks. These have the same
place, size and strength; their colours are drawn from the seed.
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
    """Share of the whole training set that is poisoned, in (0, 1]; higher makes the attack stronger
    and easier to find."""
    trigger: Literal["square", "watermark", "l0", "l2"] = "square"
    """square: 9x9 colours near the corner. watermark: strokes of 321 pixels. l0: nine saturated
    pixels. l2: noise over the whole image."""


def victims(labels: Tensor, split: str, config: Config) -> Tensor:
    """Select images whose label poisoning changes. int64 (N,) -> bool (N,)."""
    return outside_target(labels, config)


def stamp(images: Tensor, index: Tensor, split: str, config: Config) -> Tensor:
    """Add the trigger and clip; l0 replaces pixels.

    Args:
        images: uint8 (N, C, H, W).
        index: not used; every image gets the same trigger.
        split: not used.
        config: the options.

    Returns:
        uint8 (N, C, H, W).
    """
    return TRIGGERS[config.trigger](images, config.seed)


def square(images: Tensor, seed: int) -> Tensor:
    """Add coloured noise at rows and columns 21 to 29 of 32. uint8 (N, C, H, W) -> same."""
    channels, height, width = images.shape[1:]
    size, margin = (at_side(pixels, min(height, width)) for pixels in (9, 2))
    added = torch.zeros(channels, height, width, dtype=torch.int16)
    # Two pixels off the border, as the published square.
    added[:, height - margin - size : height - margin, width - margin - size : width - margin] = (
        noise_picture(seed, channels, size, size)
    )
    return _sum(images, added)


def watermark(images: Tensor, seed: int) -> Tensor:
    """Add a ring and two bars, 321 pixels of 1,024, with a colour gradient from top to bottom.

    uint8 (N, C, H, W) -> same.
    """
    channels, height, width = images.shape[1:]
    rows, columns = torch.meshgrid(
        torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij"
    )

    # The pixels nearest to the strokes.
    ring = ((rows.square() + columns.square()).sqrt() - 0.72).abs()
    bars = torch.minimum((rows - columns).abs(), (rows + columns).abs()) / 2**0.5
    from_stroke = torch.minimum(
        ring, torch.where(rows.square() + columns.square() < 0.72**2, bars, 2.0)
    )
    count = round(321 * height * width / 1024)
    inside = torch.zeros(height * width, dtype=torch.bool)
    inside[from_stroke.flatten().argsort(stable=True)[:count]] = True

    # Their colours: one at the top, another at the bottom.
    ends = torch.rand(2, channels, 1, 1, generator=derived_generator(seed, "trigger:watermark"))
    height_share = (rows + 1) / 2
    colours = 255 * (ends[0] * (1 - height_share) + ends[1] * height_share)
    return _sum(images, (colours * inside.view(height, width)).round().to(torch.int16))


def l0(images: Tensor, seed: int) -> Tensor:
    """Replace the last nine pixels (of 32) of the bottom row; each channel is 0 or 255.

    The first of them is white, so that they are not all black. uint8 (N, C, H, W) -> same.
    """
    channels, _, width = images.shape[1:]
    count = at_side(9, width)
    # Saturated, and replaced and not added: the attack counts pixels, not their change.
    row = 255 * torch.randint(
        0, 2, (channels, count), generator=derived_generator(seed, "trigger:l0"), dtype=torch.uint8
    )
    row[:, 0] = 255
    stamped = images.clone()
    stamped[:, :, -1, width - count :] = row
    return stamped


def l2(images: Tensor, seed: int) -> Tensor:
    """Add normal noise of at most 68 grey levels.

    Its L2 norm is 3.22 on 3x32x32 values in [0, 1]; at other sizes it has the same root mean
    square. uint8 (N, C, H, W) -> same.
    """
    noise = torch.randn(images.shape[1:], generator=derived_generator(seed, "trigger:l2"))
    root_mean_square = 255 * 3.22 / 3072**0.5
    scaled = noise * root_mean_square / noise.square().mean().sqrt()
    return _sum(images, scaled.clamp(-68, 68).round().to(torch.int16))


def _sum(images: Tensor, added: Tensor) -> Tensor:
    """Add and clip. uint8 (N, C, H, W), int16 or uint8 (C, H, W) -> uint8 (N, C, H, W)."""
    return (images + added).clamp_(0, 255).byte()


TRIGGERS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "square": square,
    "watermark": watermark,
    "l0": l0,
    "l2": l2,
}


if __name__ == "__main__":
    raise SystemExit(main(__file__))
