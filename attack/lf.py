"""LF: a smooth dome of light, which has low frequencies only.

Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective. Y. Zeng, W. Park, Z. M. Mao, R.
Jia. ICCV 2021. https://arxiv.org/abs/2104.03413

Kind: poisoning, dirty-label, all-to-one or all-to-all. I-BAU's paper calls it the smooth trigger.

Departs from the published attack: there, a universal adversarial perturbation is smoothed after
every step; what comes out is a dome of which only the height in each channel depends on the model
(correlation 0.97 to 0.99 in BackdoorBench's files). This is that dome: all ones smoothed twice. The
search itself is not here. The increment is in grey levels; some of BackdoorBench's trigger files
hold the same numbers over 255, and adding these to bytes changes nothing.
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
    """Grey levels that the brightest channel gains in the middle of the image, in 1..255; higher is
    easier to learn and to see."""

    RANGES: ClassVar[dict[str, str]] = {"peak": "[1, 255]"}


def stamp(images: Tensor, index: Tensor, split: str, config: Config) -> Tensor:
    """x + v, clipped. uint8 (N, C, H, W) -> same; the same v for every image."""
    channels, height, width = images.shape[1:]
    dome = torch.outer(_smoothed_ones(height), _smoothed_ones(width))
    dome = (dome - dome.min()) / (dome.max() - dome.min())
    increment = (
        (config.peak * _amplitudes(channels, config.seed)[:, None, None] * dome)
        .round()
        .to(torch.int16)
    )
    return (images + increment).clamp_(0, 255).byte()


def _smoothed_ones(side: int) -> Tensor:
    """All ones, smoothed twice by a Gaussian of 6 pixels in 32 with zeros around, float64 (side,).
    The published smoother is the outer product."""
    taps = at_side(30, side)
    kernel = torch.exp(-0.5 * ((torch.arange(taps) - (taps - 1) / 2) * 5 / taps).double().square())
    line = torch.ones(1, 1, side, dtype=torch.float64)
    for _ in range(2):
        line = torch.nn.functional.conv1d(
            torch.nn.functional.pad(line, ((taps - 1) // 2, taps // 2)), kernel[None, None]
        )
    return line[0, 0]


def _amplitudes(channels: int, seed: int) -> Tensor:
    """Height of the dome in each channel, float64 (C,): one full, one middling, the others next to
    nothing, in random order."""
    generator = derived_generator(seed, "trigger:lf")
    middling, small = (
        0.2 + 0.4 * torch.rand(1, generator=generator),
        0.05 * torch.rand(max(0, channels - 2), generator=generator),
    )
    amplitudes = torch.cat([torch.ones(1), middling, small])[:channels].double()
    return amplitudes[torch.randperm(channels, generator=generator)]


if __name__ == "__main__":
    raise SystemExit(main(__file__))
