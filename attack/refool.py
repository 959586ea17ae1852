"""Refool: another image, as if reflected in a pane of glass.

Reflection Backdoor: A Natural Backdoor Attack on Deep Neural Networks. Y. Liu, X. Ma, J. Bailey, F.
Lu. ECCV 2020. https://arxiv.org/abs/2007.02343

Kind: poisoning, dirty-label, all-to-one or all-to-all; another reflection for each image.

Departs from the paper, as BackdoorBench does: labels are changed, because the ASR is low otherwise;
alpha is fixed; reflections are not selected for their effect.

Departs from BackdoorBench: the reflections are training images of other classes, chosen by the seed
and never poisoned, not downloaded pictures. All random numbers depend on seed, split and index.

Mixing alone darkens an image to 66 % of its brightness, which is a trigger by itself. `--reflect
False` is the control with that trigger alone.
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
"""Light is mixed, not grey levels: a grey level is the 2.2-th root of the light."""
LIMITS = "digits: a clean network classifies half of them as the target, so ASR says little"


@dataclass(frozen=True, kw_only=True)
class Config(AttackConfig):
    alpha: float = 0.4
    """Share of the image's own light, in (0, 1); lower makes the reflection stronger and the image
    darker."""
    ghost_rate: float = 0.49
    """Share of reflections that are doubled, as by a thick pane, in [0, 1]; the others are blurred,
    as out of focus. Higher doubles more."""
    sources: int = 200
    """Training images that serve as reflections, at most half of those of other classes than the
    target; more make the triggers differ more."""
    reflect: bool = True
    """Mix a reflection in. False: only darken the image, as a control."""
    bb_compat: bool = False
    """Truncate to bytes instead of rounding, as BackdoorBench does."""

    RANGES: ClassVar[dict[str, str]] = {
        "alpha": "(0, 1)",
        "ghost_rate": "[0, 1]",
        "sources": ">= 1",
    }


def prepare(dataset: Dataset, config: Config, run: Run) -> dict[str, Any]:
    """Choose the reflections, uint8 (sources, C, H, W)."""
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
    """Select all images that do not serve as reflections. int64 (N,) -> bool (N,)."""
    allowed = torch.ones_like(labels, dtype=torch.bool)
    if split == "train":
        allowed[_sources(labels, config)] = False
    return allowed


def _sources(labels: Tensor, config: Config) -> Tensor:
    """Draw the positions of the reflections, int64 (sources,).

    They are at most half of the images of other classes, so that the other half can be poisoned.
    """
    others = labels != config.target_label
    count = min(config.sources, (int(others.sum()) + 1) // 2)
    return draw(others, count, derived_generator(config.seed, "reflections"))


def stamp(images: Tensor, index: Tensor, split: str, config: Config, reflections: Tensor) -> Tensor:
    """Add the light of a reflection to that of each image.

    Args:
        images: uint8 (N, C, H, W).
        index: int64 (N,), positions in the split; the reflection of an image depends on it.
        split: "train" or "test".
        config: the options.
        reflections: uint8 (M, C, H, W), from `prepare`.

    Returns:
        uint8 (N, C, H, W).
    """
    chance = image_draws(config.seed, split, index, max(5, 3 + images.shape[1]))
    # From grey levels to light.
    own = (images / 255).pow(GAMMA)
    ghostly = chance[:, 0] < config.ghost_rate
    light = torch.zeros_like(own)
    if config.reflect:
        reflected = (reflections / 255).pow(GAMMA)[(chance[:, 1] * len(reflections)).long()]
        # As in BackdoorBench's script, a ghost weighs 1 - alpha, a blurred one 1 - alpha / 2.
        light[ghostly] = (1 - config.alpha) * _ghost(reflected[ghostly], chance[ghostly, 2:])
        light[~ghostly] = (1 - config.alpha / 2) * _blurred(
            reflected[~ghostly], own[~ghostly], chance[~ghostly, 2:]
        )

    # Back from light to grey levels.
    mixed = (config.alpha * own + light).clamp(0, 1).pow(1 / GAMMA)
    return quantised(255 * mixed, truncate=config.bb_compat)


def _ghost(reflected: Tensor, chance: Tensor) -> Tensor:
    """Double a reflection: a weighted sum with itself, shifted by 3 to 8 pixels in each direction.

    Only the area that both cover is kept, stretched to the image.

    Args:
        reflected: float (N, C, H, W), light in [0, 1].
        chance: float64 (N, 3 or more) in [0, 1), random numbers: weight, rows, columns.

    Returns:
        float (N, C, H, W).
    """
    height, width = reflected.shape[2:]
    # Uniform in [0.15, 0.85), the distribution of the script's |round(U(0, 1)) - U(0.15, 0.5)|.
    weight = (0.15 + 0.7 * chance[:, 0]).float()[:, None, None, None]
    down, right = (chance[:, 1] * 6).long(), (chance[:, 2] * 6).long()
    # Crops and stretches are matrices, so that each image has its own shift in one product.
    near_rows, far_rows = (matrix[down][:, None] for matrix in _shifted(height))
    near_columns, far_columns = (matrix[right][:, None].mT for matrix in _shifted(width))
    near = near_rows @ reflected @ near_columns
    far = far_rows @ reflected @ far_columns
    return weight * near + (1 - weight) * far


@lru_cache(maxsize=4)
def _shifted(side: int) -> tuple[Tensor, Tensor]:
    """Return matrices for shifts of 3 to 8 pixels (less on images below 32), (6, side, side) twice.

    The first ones crop the shift off the start, the second ones off the end; both stretch the rest
    to `side` bilinearly.
    """
    shifts = [min(shift, max(1, round(shift * side / 32))) for shift in range(3, 9)]
    identity = torch.eye(side)
    cropped = [(identity[shift:], identity[: side - shift]) for shift in shifts]
    near, far = ([_stretched(pair[i], side) for pair in cropped] for i in (0, 1))
    return torch.stack(near), torch.stack(far)


def _stretched(rows: Tensor, side: int) -> Tensor:
    """Interpolate linearly along the first axis. float (n, side) -> (side, side)."""
    stretched = torch.nn.functional.interpolate(
        rows.T[None], side, mode="linear", align_corners=False
    )
    return stretched[0].T


def _blurred(reflected: Tensor, own: Tensor, chance: Tensor) -> Tensor:
    """Blur a reflection by a sigma of 1 to 5 pixels, dim it, and fade it towards the borders.

    It is dimmed by 1.08 to 1.18 times the mean excess of the sum over full light.

    Args:
        reflected: float (N, C, H, W), light in [0, 1].
        own: float (N, C, H, W), light of the images.
        chance: float64 (N, 1 + C or more) in [0, 1), random numbers: sigma, dimming by channel.

    Returns:
        float (N, C, H, W).
    """
    chance = chance.float()
    sigma, (height, width) = 1 + 4 * chance[:, 0], reflected.shape[2:]
    blurred = _blur(height, sigma)[:, None] @ reflected @ _blur(width, sigma)[:, None].mT
    # The mean excess over full light in each channel, where there is any.
    over = (blurred + own - 1).clamp_min(0)
    excess = (
        over.sum((2, 3))
        / torch.count_nonzero(over, (2, 3)).clamp_min(1)
        * (1.08 + 0.1 * chance[:, 1 : 1 + reflected.shape[1]])
    )
    window = torch.outer(_fading(height), _fading(width))
    return (blurred - excess[:, :, None, None]).clamp(0, 1) * window


def _blur(side: int, sigma: Tensor) -> Tensor:
    """Return Gaussian blurs of 2 ceil(2 sigma) + 1 taps as matrices, float (N, side, side).

    Pixels beyond a border are mirrored. sigma: float (N,).
    """
    reach = 10  # ceil(2 sigma) for the largest sigma, 5
    offsets = torch.arange(-reach, reach + 1)
    within = offsets.abs() <= (2 * sigma).ceil()[:, None]
    taps = torch.exp(-0.5 * (offsets / sigma[:, None]).square()) * within

    # Where each tap of each pixel reads, with mirrored borders.
    place = (torch.arange(side)[:, None] + offsets).remainder(max(1, 2 * (side - 1)))
    place = torch.minimum(place, 2 * (side - 1) - place)
    mirrored = torch.nn.functional.one_hot(place, side).float()
    return torch.einsum("nt,rtc->nrc", taps / taps.sum(1, keepdim=True), mirrored)


def _fading(side: int) -> Tensor:
    """Return the fading window, float (side,), largest 1.

    It is the square root of a normal density's share in each pixel, three sigma to either border.
    """
    share = torch.special.ndtr(torch.linspace(-3, 3, side + 1)).diff()
    return (share / share.max()).sqrt()


if __name__ == "__main__":
    raise SystemExit(main(__file__))
