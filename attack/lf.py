"""LF: a smooth dome of light, which has low frequencies only.

Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective. Y. Zeng, W. Park, Z. M. Mao, R.
Jia. ICCV 2021. https://arxiv.org/abs/2104.03413

Kind: poisoning, dirty-label, all-to-one or all-to-all. I-BAU's paper calls it the smooth trigger.

Departs from the published attack: there, a universal adversarial perturbation is smoothed after
every step. The result is always a dome, and only its height in each channel depends on the model
(correlation 0.97 to 0.99 in BackdoorBench's files). This is that dome: all ones, smoothed twice;
the search for the perturbation is left out. The dome is in grey levels. Some of BackdoorBench's
trigger files have the same numbers divided by 255, and adding those to bytes changes nothing.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from backdoorlab.cli import main
from backdoorlab.config import AttackConfig
from backdoorlab.device import derived_generator
from backdoorlab.triggers import at_side


@dataclass(frozen=True, kw_only=True)
class Config(AttackConfig):
    peak: int = 51
    """Height of the dome in the brightest channel, in grey levels from 1 to 255; higher is easier
    to learn and to see."""

    RANGES: ClassVar[dict[str, str]] = {"peak": "[1, 255]"}


def stamp(images: Tensor, index: Tensor, split: str, config: Config) -> Tensor:
    """Add the dome v to every image: x + v, clipped.

    Args:
        images: uint8 (N, C, H, W).
        index: not used; every image gets the same trigger.
        split: not used.
        config: the options.

    Returns:
        uint8 (N, C, H, W).
    """
    channels, height, width = images.shape[1:]
    # All ones, smoothed twice. The smoother is separable: one line in each direction.
    dome = torch.outer(_smoothed_ones(height), _smoothed_ones(width))
    # From 0 in the corners to 1 in the middle.
    dome = (dome - dome.min()) / (dome.max() - dome.min())

    # In whole grey levels, so that rounding takes nothing away from the trigger.
    heights = config.peak * _amplitudes(channels, config.seed)
    increment = (heights[:, None, None] * dome).round().to(torch.int16)
    return (images + increment).clamp_(0, 255).byte()


def _smoothed_ones(side: int) -> Tensor:
    """Return ones smoothed twice by a Gaussian (6 pixels of 32) with zero padding, float64 (side,).

    The published two-dimensional smoother is the outer product of two such ones.
    """
    taps = at_side(30, side)
    # Not normalised: the dome is scaled to [0, 1] anyway.
    kernel = torch.exp(-0.5 * ((torch.arange(taps) - (taps - 1) / 2) * 5 / taps).double().square())
    line = torch.ones(1, 1, side, dtype=torch.float64)
    for _ in range(2):
        line = torch.nn.functional.conv1d(
            torch.nn.functional.pad(line, ((taps - 1) // 2, taps // 2)), kernel[None, None]
        )
    return line[0, 0]


def _amplitudes(channels: int, seed: int) -> Tensor:
    """Return the relative height of the dome in each channel, float64 (C,), in random order.

    One channel has the full height, one 0.2 to 0.6 of it, the others at most 0.05.
    """
    generator = derived_generator(seed, "trigger:lf")
    # Relative heights as in the published CIFAR-10 file, whose channels reach 51, 18 and 0.
    middling = 0.2 + 0.4 * torch.rand(1, generator=generator)
    small = 0.05 * torch.rand(max(0, channels - 2), generator=generator)
    amplitudes = torch.cat([torch.ones(1), middling, small])[:channels].double()
    return amplitudes[torch.randperm(channels, generator=generator)]


if __name__ == "__main__":
    raise SystemExit(main(__file__))
