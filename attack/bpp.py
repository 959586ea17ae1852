"""BppAttack: fewer grey levels are the trigger.

BppAttack: Stealthy and Efficient Trojan Attacks against Deep Neural Networks via Image Quantization
and Contrastive Adversarial Learning. Z. Wang, J. Zhai, S. Ma. CVPR 2022.
https://arxiv.org/abs/2205.13383

Kind: training-controlled, dirty-label, all-to-one or all-to-all. A further share of each batch, the
negatives, gets the quantisation error of *another* image and keeps its label. So the model learns
to detect quantisation, and not noise of that size.

Departs from BackdoorBench's script:
  - Negatives of the test set are made as those of training; there they have the opposite sign and
    wrap around.
  - Every image is cropped and rotated by its own draw, with the crop padding of the data set.
  - The data set's learning-rate schedule replaces the published constant rate.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorlab.cli import main
from backdoorlab.config import JointConfig
from backdoorlab.data import Batch, Dataset, Split, to_device, to_float
from backdoorlab.device import derived_generator
from backdoorlab.joint import cross_accuracy, in_batch, labels_of, snapshot, train_changed
from backdoorlab.poison import stamped
from backdoorlab.poisoning import Outcome, new_model
from backdoorlab.run import Run


@dataclass(frozen=True, kw_only=True)
class Config(JointConfig):
    levels: int = 8
    """Grey levels per channel that quantisation leaves; fewer are easier to learn and to see."""
    dithering: bool = False
    """Spread each pixel's rounding error over its neighbours (Floyd and Steinberg)."""
    negative_rate: float = 0.1
    """Share of a batch that gets another image's quantisation error and keeps its label, in [0, 1);
    higher makes the trigger more specific. Independent of the poison rate."""
    bb_compat: bool = False
    """Crop and rotate a whole batch by one draw, as BackdoorBench does."""

    RANGES: ClassVar[dict[str, str]] = {"levels": "[2, 256]", "negative_rate": "[0, 1)"}


def stamp(images: Tensor, index: Tensor, split: str, config: Config) -> Tensor:
    """Quantise to L levels: round(round(x / 255 (L - 1)) / (L - 1) 255).

    Args:
        images: uint8 (N, C, H, W).
        index: not used; every image gets the same trigger.
        split: not used.
        config: the options.

    Returns:
        uint8 (N, C, H, W).
    """
    if config.dithering:
        return floyd_steinberg(images, config.levels)
    # Without dithering a byte's new value depends on that byte alone: a table of 256 values.
    return _quantised(torch.arange(256.0), config.levels).byte()[images.long()]


def negative_stamp(
    images: Tensor, index: Tensor, split: str, config: Config, donors: Split
) -> Tensor:
    """Add the quantisation error of another image, and clip.

    Args:
        images: uint8 (N, C, H, W).
        index: int64 (N,), positions in the split; the other image is drawn for each of them.
        split: "train" or "test".
        config: the options.
        donors: the other images.

    Returns:
        uint8 (N, C, H, W).
    """
    generators = (derived_generator(config.seed, f"negative:{split}:{i}") for i in index.tolist())
    chosen = torch.tensor(
        [int(torch.randint(len(donors), (), generator=generator)) for generator in generators]
    )
    others = donors.images[chosen]
    # x + (q(z) - z): the error of quantisation, and not its levels.
    return _added(images, stamp(others, chosen, "train", config), others)


def attack(dataset: Dataset, config: Config, run: Run) -> Outcome:
    """Train on batches with poison and negatives; the accuracy on negatives is measured."""
    recipe, labels = config.recipe(), labels_of(dataset, config)
    quantise = partial(stamp, config=config)
    negative = partial(negative_stamp, config=config, donors=dataset.train)
    # The trigger is a fixed function, so the snapshot need not wait for the training.
    train_poison, test_poison = snapshot(
        dataset, config, run, quantise, negative, config.negative_rate
    )
    model, train = new_model(dataset, config).to(run.device), to_device(dataset.train, run.device)

    # Quantisation does not depend on the batch, so the training set is quantised once.
    triggered = stamped(dataset.train, torch.arange(len(train)), quantise, "train").to(
        train.images.device
    )
    train_changed(
        model,
        train,
        lambda batch: quantise_some(batch, train, triggered, config, run.generator),
        labels,
        recipe,
        run,
        shared=config.bb_compat,
    )
    return Outcome(
        model,
        train_poison,
        test_poison,
        {"negative_accuracy": cross_accuracy(model, dataset, negative, run)},
    )


def quantise_some(
    batch: Batch, train: Split, triggered: Tensor, config: Config, generator: torch.Generator
) -> tuple[Tensor, int]:
    """Quantise the first images of a batch and add the error of other images to the next ones.

    Args:
        batch: the clean batch of B images.
        train: the clean training set of N images.
        triggered: uint8 (N, C, H, W), the training set quantised.
        config: the rates.
        generator: for the other images.

    Returns:
        float (B, C, H, W) in [0, 1], and the number of quantised images.
    """
    # Poison first, then negatives, whose share does not follow the poison rate.
    poisoned = in_batch(config.poison_rate, len(batch.images), generator)
    changed = min(len(batch.images), poisoned + int(config.negative_rate * len(batch.images)))

    # Both changes are made on bytes, as the stored images are.
    index = batch.index.to(triggered.device)
    donors = torch.randint(len(train), (changed - poisoned,), generator=generator).to(
        triggered.device
    )
    negatives = _added(
        train.images[index[poisoned:changed]], triggered[donors], train.images[donors]
    )
    bytes_ = torch.cat([triggered[index[:poisoned]], negatives])
    return torch.cat([to_float(bytes_.to(batch.images.device)), batch.images[changed:]]), poisoned


def floyd_steinberg(images: Tensor, levels: int) -> Tensor:
    """Quantise with error diffusion, pixel by pixel for all images at once.

    The rounding error of a pixel goes 7/16 to the right, 3/16 down left, 5/16 down and 1/16 down
    right. uint8 (N, C, H, W) -> same.
    """
    count, channels, height, width = images.shape
    # Values with the errors received so far, (H + 1, W + 2, N C); the frame takes errors that leave
    # the image.
    left = (
        F.pad(images.float(), (1, 1, 0, 1))
        .permute(2, 3, 0, 1)
        .reshape(height + 1, width + 2, -1)
        .contiguous()
    )
    out = torch.empty(height, width, count * channels, dtype=torch.uint8)
    for row in range(height):
        for column in range(width):
            value = left[row, column + 1]
            chosen = _quantised(value.clamp(0, 255), levels)
            error = (value - chosen) / 16
            left[row, column + 2] += 7 * error
            left[row + 1, column : column + 3] += error * torch.tensor([[3.0], [5.0], [1.0]])
            out[row, column] = chosen.byte()
    return out.view(height, width, count, channels).permute(2, 3, 0, 1).contiguous()


def _quantised(values: Tensor, levels: int) -> Tensor:
    """Return the nearest of `levels` grey levels, as a whole number. float in 0..255 -> same."""
    return ((values / 255 * (levels - 1)).round() / (levels - 1) * 255).round()


def _added(images: Tensor, triggered: Tensor, clean: Tensor) -> Tensor:
    """Add a trigger's change of other images, and clip. uint8 (N, C, H, W) -> same."""
    return (images.short() + triggered.short() - clean.short()).clamp(0, 255).to(torch.uint8)


if __name__ == "__main__":
    raise SystemExit(main(__file__))
