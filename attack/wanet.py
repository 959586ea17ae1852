"""WaNet: a smooth warp of the whole image is the trigger.

WaNet - Imperceptible Warping-based Backdoor Attack. A. Nguyen, A. Tran. ICLR 2021.
https://arxiv.org/abs/2102.10369

Kind: training-controlled, dirty-label, all-to-one or all-to-all. All images get the same warp. In
the cross mode (the paper's noise mode) a second share of each batch is warped at random and keeps
its true label, so that the model learns this warp and not any warp. The accuracy on such images,
the cross accuracy, is measured: with high ASR and low cross accuracy, any warp is a trigger.

Departs from the authors' code:
  - Triggered images are rounded to bytes before training, as they are before testing.
  - Every image is cropped and rotated by its own draw, with the crop padding of the data set.
  - The data set's learning-rate schedule replaces the published constant rate.
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorlab.cli import main
from backdoorlab.config import JointConfig
from backdoorlab.data import Batch, Dataset, to_device, to_float
from backdoorlab.device import derived_generator
from backdoorlab.joint import cross_accuracy, in_batch, labels_of, snapshot, train_changed
from backdoorlab.poisoning import Outcome, new_model
from backdoorlab.run import Run
from backdoorlab.triggers import quantised


@dataclass(frozen=True, kw_only=True)
class Config(JointConfig):
    k: int = 4
    """Side of the coarse grid of displacements that is interpolated to the image; higher makes the
    warp less smooth."""
    s: float = 0.5
    """Strength of the warp; higher is easier to learn and to see. The mean displacement is about
    0.6 s pixels."""
    noise: float = 1.0
    """Largest further displacement of cross images, in half pixels; higher makes them differ more
    from triggered ones."""
    cross_ratio: float = 2.0
    """Images with a random warp and their true label, per poisoned image; higher makes the trigger
    more specific. 0 turns the cross mode off."""
    bb_compat: bool = False
    """Truncate to bytes, and crop and rotate a whole batch by one draw, as BackdoorBench does."""

    RANGES: ClassVar[dict[str, str]] = {
        "k": ">= 2",
        "s": ">= 0",
        "noise": ">= 0",
        "cross_ratio": ">= 0",
    }


def stamp(images: Tensor, index: Tensor, split: str, config: Config) -> Tensor:
    """Warp every image by the same grid.

    Args:
        images: uint8 (N, C, H, W).
        index: not used; every image gets the same trigger.
        split: not used.
        config: the options.

    Returns:
        uint8 (N, C, H, W).
    """
    warped = _warped(to_float(images), _grid(config.seed, config.k, config.s, *images.shape[2:]))
    return quantised(255 * warped, truncate=config.bb_compat)


def cross_stamp(images: Tensor, index: Tensor, split: str, config: Config) -> Tensor:
    """Warp by the grid and a random displacement of each pixel.

    Args:
        images: uint8 (N, C, H, W).
        index: int64 (N,), positions in the split; the displacements depend on it.
        split: "train" or "test".
        config: the options.

    Returns:
        uint8 (N, C, H, W).
    """
    height, width = images.shape[2:]
    # Drawn by index, so that an image gets the same warp whenever it is made.
    noise = [
        torch.rand(height, width, 2, generator=derived_generator(config.seed, f"noise:{split}:{i}"))
        for i in index.tolist()
    ]
    grid = _grid(config.seed, config.k, config.s, height, width)
    grids = _noisy(grid, torch.stack(noise), config.noise)
    return quantised(255 * _warped(to_float(images), grids), truncate=config.bb_compat)


def attack(dataset: Dataset, config: Config, run: Run) -> Outcome:
    """Train on batches with poison and cross images; the cross accuracy is measured."""
    recipe, labels = config.recipe(), labels_of(dataset, config)
    cross = partial(cross_stamp, config=config)

    # The warp is fixed, so the snapshot need not wait for the training.
    train_poison, test_poison = snapshot(
        dataset,
        config,
        run,
        partial(stamp, config=config),
        cross,
        config.cross_ratio * config.poison_rate,
    )
    model, train = new_model(dataset, config).to(run.device), to_device(dataset.train, run.device)
    train_changed(
        model,
        train,
        lambda batch: warp_some(batch, config, run.generator),
        labels,
        recipe,
        run,
        shared=config.bb_compat,
    )
    return Outcome(
        model,
        train_poison,
        test_poison,
        {"cross_accuracy": cross_accuracy(model, dataset, cross, run)},
    )


def warp_some(batch: Batch, config: Config, generator: torch.Generator) -> tuple[Tensor, int]:
    """Warp the first images of a batch by the grid and the next ones at random.

    The shares are the paper's rho_a and rho_n. Returns float (B, C, H, W) in [0, 1], and the number
    of images that the grid alone has warped.
    """
    images = batch.images
    # rho_a of the batch is poisoned; cross_ratio times as many are cross images (rho_n).
    poisoned = in_batch(config.poison_rate, len(images), generator)
    warped = min(len(images), poisoned + int(config.cross_ratio * poisoned))
    height, width = images.shape[2:]
    grid = _grid(config.seed, config.k, config.s, height, width).to(images.device)
    noise = torch.rand(warped - poisoned, height, width, 2, generator=generator).to(images.device)
    grids = torch.cat([grid.expand(poisoned, -1, -1, -1), _noisy(grid, noise, config.noise)])
    # Rounded to bytes, as stored and tested images are.
    changed = quantised(255 * _warped(images[:warped], grids), truncate=config.bb_compat)
    return torch.cat([to_float(changed), images[warped:]]), poisoned


@lru_cache(maxsize=4)
def _grid(seed: int, k: int, s: float, height: int, width: int) -> Tensor:
    """Return the warp, float (1, H, W, 2): where each pixel is read, x before y, in [-1, 1].

    Args:
        seed: the attack's seed.
        k: side of the coarse grid.
        s: strength.
        height: H of the images.
        width: W of the images.
    """
    # Random displacements of mean absolute value 1, interpolated to the image.
    coarse = 2 * torch.rand(1, 2, k, k, generator=derived_generator(seed, "trigger:warp")) - 1
    field = F.interpolate(
        coarse / coarse.abs().mean(), size=(height, width), mode="bicubic", align_corners=True
    ).permute(0, 2, 3, 1)

    # The identity plus the field; clamped, so that nothing is read outside of the image.
    rows, columns = torch.meshgrid(
        torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij"
    )
    return (torch.stack([columns, rows], 2) + s * field / height).clamp(-1, 1)


def _noisy(grid: Tensor, draws: Tensor, noise: float) -> Tensor:
    """Move each pixel of the grid by a further noise U(-1, 1) / H; draws: U(0, 1), (N, H, W, 2)."""
    return (grid + noise * (2 * draws - 1) / grid.shape[1]).clamp(-1, 1)


def _warped(images: Tensor, grids: Tensor) -> Tensor:
    """Read images at the places of a grid. float (N, C, H, W), (N or 1, H, W, 2) -> same."""
    return F.grid_sample(
        images,
        grids.expand(len(images), -1, -1, -1),
        mode="bilinear",
        padding_mode="zeros",
        align_corners=True,
    )


if __name__ == "__main__":
    raise SystemExit(main(__file__))
