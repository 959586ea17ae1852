"""Refool: another image, as if reflected in a pane of glass.

Reflection Backdoor: A Natural Backdoor Attack on Deep Neural Networks. Y. Liu, X. Ma, J. Bailey, F.
Lu. ECCV 2020. https://arxiv.org/abs/2007.02343

Kind: poisoning, dirty-label, all-to-one or all-to-all; another reflection for each image.

Departs from the paper as BackdoorBench does: labels are changed (the ASR without is low) and alpha
is fixed. Departs from BackdoorBench: the reflections are training images of other classes, chosen
by the seed and never poisoned, not downloaded pictures, and everything random comes from seed,
split and index. They are not selected for their effect, as the paper's are. Mixing alone darkens an
image to 66 % of its brightness, which is a trigger by itself: `--reflect False` is that control.
`--bb_compat True` truncates to bytes.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from backdoorlab.cli import main
from backdoorlab.config import AttackConfig
from backdoorlab.data import Dataset
from backdoorlab.device import derived_generator
from backdoorlab.errors import UserError
from backdoorlab.poison import draw
from backdoorlab.run import Run
from backdoorlab.triggers import image_draws, quantised

GAMMA = 2.2
"""Light is mixed, not grey levels: a grey level is its 2.2-th root."""


LIMITS = (
    "digits: a clean network takes half of these digits in digits for the target by itself, so that"
    " their ASR says little"
)


@dataclass(frozen=True, kw_only=True)
class Config(AttackConfig):
    alpha: float = 0.4
    """alpha: share of the image's own light, in (0, 1); lower makes the reflection stronger and the
    image darker."""
    ghost_rate: float = 0.49
    """Share of reflections that are doubled, as by both faces of a thick pane; the others are
    blurred, as by a lens that looks past them."""
    sources: int = 200
    """Training images that are reflected, at most half of those of other classes than the
    target."""
    reflect: bool = True
    """False leaves the reflection out and keeps the darkening: a control."""
    bb_compat: bool = False
    """Truncate to bytes, as BackdoorBench does."""

    RANGES: ClassVar[dict[str, str]] = {
        "alpha": "(0, 1)",
        "ghost_rate": "[0, 1]",
        "sources": ">= 1",
    }


def prepare(dataset: Dataset, config: Config, run: Run) -> dict[str, Any]:
    """The images that are reflected, uint8 (sources, C, H, W)."""
    if min(dataset.image_shape[1:]) < 2:
        raise UserError(
            "refool shifts reflections by a pixel or more and cannot on images of one: use"
            " --image_size"
        )
    sources = _sources(dataset.train.labels, config)
    if not len(sources):
        raise UserError(
            "refool reflects training images of other classes than the target, and there is none"
        )
    if len(sources) < config.sources:
        run.note(
            f"sources asks for {config.sources:,} images to reflect, but half of those of other"
            f" classes are {len(sources):,}: it takes those"
        )
    return {"reflections": dataset.train.images[sources]}


def victims(labels: Tensor, split: str, config: Config) -> Tensor:
    """Everyone but the images that are reflected. int64 (N,) -> bool (N,)."""
    allowed = torch.ones_like(labels, dtype=torch.bool)
    if split == "train":
        allowed[_sources(labels, config)] = False
    return allowed


def _sources(labels: Tensor, config: Config) -> Tensor:
    """Positions of the images that are reflected: half of those of other classes at most, so that
    the others can be victims. int64 (sources,)."""
    others = labels != config.target_label
    return draw(
        others,
        min(config.sources, (int(others.sum()) + 1) // 2),
        derived_generator(config.seed, "reflections"),
    )


def stamp(images: Tensor, index: Tensor, split: str, config: Config, reflections: Tensor) -> Tensor:
    """Light of the image plus light of a reflection. uint8 (N, C, H, W), positions (N,) -> uint8
    (N, C, H, W)."""
    chance = image_draws(config.seed, split, index, max(5, 3 + images.shape[1]))
    own = (images / 255).pow(GAMMA)
    ghostly = chance[:, 0] < config.ghost_rate
    light = torch.zeros_like(own)
    if config.reflect:
        reflected = (reflections / 255).pow(GAMMA)[(chance[:, 1] * len(reflections)).long()]
        light[ghostly] = (1 - config.alpha) * _ghost(reflected[ghostly], chance[ghostly, 2:])
        light[~ghostly] = (1 - config.alpha / 2) * _blurred(
            reflected[~ghostly], own[~ghostly], chance[~ghostly, 2:]
        )
    return quantised(
        255 * (config.alpha * own + light).clamp(0, 1).pow(1 / GAMMA), truncate=config.bb_compat
    )


# --- ghosts


def _ghost(reflected: Tensor, chance: Tensor) -> Tensor:
    """The reflection and the same one shifted by 3 to 8 pixels each way, weighed, over what both
    cover. (N, C, H, W) -> same."""
    height, width = reflected.shape[2:]
    # The script's |round(U(0, 1)) - U(0.15, 0.5)| has this distribution
    weight = (0.15 + 0.7 * chance[:, 0]).float()[:, None, None, None]
    near_rows, far_rows = (
        matrix[(chance[:, 1] * 6).long()][:, None] for matrix in _shifted(height)
    )
    near_columns, far_columns = (
        matrix[(chance[:, 2] * 6).long()][:, None].mT for matrix in _shifted(width)
    )
    return weight * (near_rows @ reflected @ near_columns) + (1 - weight) * (
        far_rows @ reflected @ far_columns
    )


@lru_cache(maxsize=4)
def _shifted(side: int) -> tuple[Tensor, Tensor]:
    """For shifts of 3 to 8 pixels (less on images below 32): two (6, side, side) matrices that crop
    the shift off the start, or the end, and stretch the rest to `side` bilinearly."""
    shifts = [min(shift, max(1, round(shift * side / 32))) for shift in range(3, 9)]
    identity = torch.eye(side)
    cropped = [(identity[shift:], identity[: side - shift]) for shift in shifts]
    near, far = ([_stretched(pair[i], side) for pair in cropped] for i in (0, 1))
    return torch.stack(near), torch.stack(far)


def _stretched(rows: Tensor, side: int) -> Tensor:
    """(n, side) -> (side, side): bilinear along the first axis."""
    return torch.nn.functional.interpolate(rows.T[None], side, mode="linear", align_corners=False)[
        0
    ].T


# --- blur


def _blurred(reflected: Tensor, own: Tensor, chance: Tensor) -> Tensor:
    """Blurred by a sigma of 1 to 5 pixels, dimmed where the sum is too bright, and fading to the
    borders. (N, C, H, W) -> same."""
    chance = chance.float()
    sigma, (height, width) = 1 + 4 * chance[:, 0], reflected.shape[2:]
    blurred = _blur(height, sigma)[:, None] @ reflected @ _blur(width, sigma)[:, None].mT
    over = (blurred + own - 1).clamp_min(0)
    excess = (
        over.sum((2, 3))
        / torch.count_nonzero(over, (2, 3)).clamp_min(1)
        * (1.08 + 0.1 * chance[:, 1 : 1 + reflected.shape[1]])
    )
    window = torch.outer(_fading(height), _fading(width))
    return (blurred - excess[:, :, None, None]).clamp(0, 1) * window


def _blur(side: int, sigma: Tensor) -> Tensor:
    """Gaussians of 2 ceil(2 sigma) + 1 taps, mirrored at the borders, as matrices (N, side,
    side)."""
    reach = 10
    offsets = torch.arange(-reach, reach + 1)
    taps = torch.exp(-0.5 * (offsets / sigma[:, None]).square()) * (
        offsets.abs() <= (2 * sigma).ceil()[:, None]
    )
    place = (torch.arange(side)[:, None] + offsets).remainder(max(1, 2 * (side - 1)))
    place = torch.minimum(place, 2 * (side - 1) - place)
    mirrored = torch.nn.functional.one_hot(place, side).float()
    return torch.einsum("nt,rtc->nrc", taps / taps.sum(1, keepdim=True), mirrored)


def _fading(side: int) -> Tensor:
    """Square root of a normal density's share in each pixel, three sigma to either border, largest
    1. float (side,)."""
    share = torch.special.ndtr(torch.linspace(-3, 3, side + 1)).diff()
    return (share / share.max()).sqrt()


if __name__ == "__main__":
    raise SystemExit(main(__file__))
