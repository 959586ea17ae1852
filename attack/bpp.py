"""BppAttack: fewer grey levels are the trigger.

BppAttack: Stealthy and Efficient Trojan Attacks against Deep Neural Networks via Image Quantization
and Contrastive Adversarial Learning. Z. Wang, J. Zhai, S. Ma. CVPR 2022.
https://arxiv.org/abs/2205.13383

Kind: controls the training, dirty-label, all-to-one or all-to-all. The stamp is a function of the
image. A further share of each batch, the negatives, gets the quantisation error of *another* image
and keeps its label, so that the model learns what quantisation does to an image and not noise of
that size.

Departs from BackdoorBench's script: negatives of the test set are made as those of training (theirs
have the opposite sign and wrap); every image is cropped and rotated by its own draw, by the padding
of the data set; the data set's recipe replaces the published constant rate.
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
    """L: grey levels a channel that are left; fewer are easier to learn and to see."""
    dithering: bool = False
    """Hand each pixel's rounding error on to its neighbours (Floyd and Steinberg)."""
    negative_rate: float = 0.1
    """Share of a batch that gets another image's quantisation error and its own label, whatever the
    poison rate."""
    bb_compat: bool = False
    """BackdoorBench's quirk: one draw of crop and rotation serves a whole batch."""

    RANGES: ClassVar[dict[str, str]] = {"levels": "[2, 256]", "negative_rate": "[0, 1)"}


def stamp(images: Tensor, index: Tensor, split: str, config: Config) -> Tensor:
    """Quantise: round(round(x / 255 (L - 1)) / (L - 1) 255). uint8 (N, C, H, W) -> same."""
    if config.dithering:
        return floyd_steinberg(images, config.levels)
    return _quantised(torch.arange(256.0), config.levels).byte()[images.long()]


def negative_stamp(
    images: Tensor, index: Tensor, split: str, config: Config, donors: Split
) -> Tensor:
    """Add the quantisation error of an image of `donors`, drawn for each position, and clip. uint8
    (N, C, H, W) -> same."""
    generators = (derived_generator(config.seed, f"negative:{split}:{i}") for i in index.tolist())
    chosen = torch.tensor(
        [int(torch.randint(len(donors), (), generator=generator)) for generator in generators]
    )
    others = donors.images[chosen]
    return _added(images, stamp(others, chosen, "train", config), others)


def attack(dataset: Dataset, config: Config, run: Run) -> Outcome:
    recipe, labels = config.recipe(), labels_of(dataset, config)
    quantise, negative = (
        partial(stamp, config=config),
        partial(negative_stamp, config=config, donors=dataset.train),
    )
    train_poison, test_poison = snapshot(
        dataset, config, run, quantise, negative, config.negative_rate
    )
    model, train = new_model(dataset, config).to(run.device), to_device(dataset.train, run.device)
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
    """The batch's images, the first of them quantised and the next ones with the error of others;
    how many the first are.

    triggered: the whole training set quantised, uint8 (N, C, H, W).
    """
    poisoned = in_batch(config.poison_rate, len(batch.images), generator)
    changed = min(len(batch.images), poisoned + int(config.negative_rate * len(batch.images)))
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
    """Quantise pixel after pixel, all images at once; the error goes 7/16 right, 3/16 down left,
    5/16 down, 1/16 down right."""
    count, channels, height, width = images.shape
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
    """The nearest of `levels` grey levels, itself rounded to a whole number; float in 0..255 ->
    same."""
    return ((values / 255 * (levels - 1)).round() / (levels - 1) * 255).round()


def _added(images: Tensor, triggered: Tensor, clean: Tensor) -> Tensor:
    return (images.short() + triggered.short() - clean.short()).clamp(0, 255).to(torch.uint8)


if __name__ == "__main__":
    raise SystemExit(main(__file__))
