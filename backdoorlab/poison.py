"""Poison a data set: choose images, stamp them, and give them the attacker's labels."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import Split
from .errors import UserError, described

POISON, CROSS = 1, 2
"""Kinds of changed images. POISON: the trigger and the attacker's label. CROSS: the trigger, or a
similar change, and the true label."""

STAMPED_AT_ONCE = 512
"""Images that go through a stamp together. So few fit into the processor's cache as floats, which
is two to four times as fast."""

Stamp = Callable[[Tensor, Tensor, str], Tensor]
"""Adds the trigger: stamp(images, index, split) -> uint8 (N, C, H, W).

images: uint8 (N, C, H, W); index: int64 (N,), positions in the split; split: "train" or "test".
Deterministic: its random numbers depend only on the attack's seed, the split and the index.
"""


@dataclass(frozen=True)
class Poison:
    """The changed images of a split, M of N."""

    index: Tensor
    """int64 (M,), increasing: positions in the clean split."""
    images: Tensor
    """uint8 (M, C, H, W), before augmentation."""
    labels: Tensor
    """int64 (M,), the labels in the poisoned set."""
    original_labels: Tensor
    """int64 (M,), the true labels."""
    kind: Tensor
    """uint8 (M,): POISON or CROSS."""

    def __len__(self) -> int:
        return len(self.index)

    def apply(self, clean: Split) -> Split:
        """Return the split as the victim receives it: a copy with these rows replaced."""
        # Nothing in the copy marks the rows: a defense must find them.
        received = clean.copy()
        received.images[self.index], received.labels[self.index] = self.images, self.labels
        return received

    def triggered(self) -> Split:
        """Return the changed images alone, with their labels in the poisoned set."""
        return Split(self.images, self.labels)

    def of_kind(self, kind: int) -> "Poison":
        """Return the rows of one kind."""
        chosen = self.kind == kind
        return Poison(
            self.index[chosen],
            self.images[chosen],
            self.labels[chosen],
            self.original_labels[chosen],
            self.kind[chosen],
        )

    def mask(self, size: int, kind: int = POISON) -> Tensor:
        """Mark the images of one kind in a split of `size` images. -> bool (size,)."""
        found = torch.zeros(size, dtype=torch.bool)
        found[self.index[self.kind == kind]] = True
        return found


@dataclass(frozen=True)
class Labels:
    """The labels that the attacker wants for triggered images."""

    target_label: int
    label_mode: Literal["all2one", "all2all"]
    """all2one: every label becomes target_label. all2all: label y becomes y + 1 modulo
    num_classes."""
    num_classes: int

    def of(self, original: Tensor) -> Tensor:
        """Map true labels to the attacker's. int64 (M,) -> same."""
        if self.label_mode == "all2one":
            return torch.full_like(original, self.target_label)
        # all2all: the next class, cyclically.
        return (original + 1) % self.num_classes


def draw(pool: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw positions from a pool without replacement.

    Args:
        pool: bool (N,), the positions that may be drawn.
        count: how many; if the pool is smaller, all of it is drawn.
        generator: for the draw.

    Returns:
        int64, increasing.
    """
    # A shuffle of all candidates, so that the first ones do not depend on `count`.
    candidates = pool.nonzero().squeeze(1)
    return candidates[torch.randperm(len(candidates), generator=generator)[:count]].sort().values


def outside_target(labels: Tensor, config: Any) -> Tensor:
    """Select images whose label poisoning changes. int64 (N,) -> bool (N,)."""
    return (labels != config.target_label) | (config.label_mode == "all2all")


def poison_train(
    clean: Split,
    stamp: Stamp,
    labels: Labels,
    *,
    poison_rate: float,
    generator: torch.Generator,
    victims: Tensor | None = None,
    cover_rate: float = 0.0,
    covers: Tensor | None = None,
    cover_stamp: Stamp | None = None,
) -> Poison:
    """Poison a training set of N images.

    round(poison_rate N) images are drawn, stamped and relabelled. Of the others,
    round(cover_rate N) become cover samples: stamped, with their true label (kind CROSS).

    Args:
        clean: the training set.
        stamp: adds the trigger.
        labels: the attacker's labels.
        poison_rate: share of the whole training set, in (0, 1].
        generator: for the draws.
        victims: bool (N,), images that may be poisoned; None: all. If they are fewer than the rate
            asks for, all of them are.
        cover_rate: share of the whole training set, in [0, 1].
        covers: bool (N,), images that may become cover samples; None: all.
        cover_stamp: stamp of cover samples; None: the same.

    Returns:
        Both kinds of images, ordered by position.

    Raises:
        UserError: if no image would be poisoned.
    """
    check_rate(poison_rate)
    count = round(poison_rate * len(clean))
    if count == 0:
        raise UserError(
            f"poison_rate {poison_rate} of {len(clean)} training images is no image at all: raise"
            " --poison_rate"
        )

    # Images to poison first, then cover samples among the rest.
    everyone = torch.ones(len(clean), dtype=torch.bool)
    poisoned = draw(everyone if victims is None else victims, count, generator)
    if not len(poisoned):
        raise UserError(
            "no training image is one that this attack poisons: choose another target_label or"
            " source_label"
        )
    free = everyone.clone() if covers is None else covers.clone()
    free[poisoned] = False
    covered = draw(free, round(cover_rate * len(clean)), generator)
    return _merged(
        _stamped(clean, poisoned, stamp, "train", labels),
        _stamped(clean, covered, cover_stamp or stamp, "train", None),
    )


def poison_test(
    clean: Split, stamp: Stamp, labels: Labels, *, victims: Tensor | None = None
) -> Poison:
    """Stamp the test images that ASR is measured on: those whose label the attack changes.

    In all2one these are all images but those of the target class.

    Args:
        clean: the test set of N images.
        stamp: adds the trigger.
        labels: the attacker's labels.
        victims: bool (N,), images that the attack is meant for; None: all. The others are stamped
            as kind CROSS: they should keep their true label, and ASR does not count them.

    Returns:
        Both kinds of images, ordered by position.
    """
    counted = torch.ones(len(clean), dtype=torch.bool)
    if labels.label_mode == "all2one":
        counted = clean.labels != labels.target_label

    # Images that the attack is not meant for are stamped, too, but are no part of ASR.
    meant = counted if victims is None else counted & victims
    poisoned, spared = meant.nonzero().squeeze(1), (counted & ~meant).nonzero().squeeze(1)
    return _merged(
        _stamped(clean, poisoned, stamp, "test", labels),
        _stamped(clean, spared, stamp, "test", None),
    )


def left_by_crops(clean: Split, poison: Poison, padding: int) -> dict[str, float] | None:
    """Measure how often random crops cut off the trigger in training.

    An image whose trigger is cut off is a clean image with a wrong label.

    Args:
        clean: the training set.
        poison: its poisoned images, of which the first 100 are used.
        padding: zero pixels on each side before a crop.

    Returns:
        "whole" and "none": share of all possible crops that keep all of the trigger, and none of
        it; None without a poisoned image.
    """
    poisoned = poison.of_kind(POISON)
    changed = (
        (poisoned.images[:100] != clean.images[poisoned.index[:100]]).any(1, keepdim=True).float()
    )
    # An image that the trigger happens to leave as it was says nothing about crops.
    changed = changed[changed.flatten(1).any(1)]
    if not len(changed):
        return None

    # The mean of the mask over each crop: that of the whole mask if nothing is cut off.
    height, width = changed.shape[2:]
    kept = F.avg_pool2d(F.pad(changed, [padding] * 4), (height, width), stride=1)
    whole = changed.mean((2, 3), keepdim=True)
    return {
        "whole": (kept > whole - 1e-6).double().mean().item(),
        "none": (kept < 1e-6).double().mean().item(),
    }


def changed_share(clean: Split, poison: Poison) -> float | None:
    """Return the share of values of poisoned images that the trigger changes; None if no image is
    poisoned."""
    poisoned = poison.of_kind(POISON)
    if not len(poisoned):
        return None
    return (
        int((poisoned.images != clean.images[poisoned.index]).count_nonzero())
        / poisoned.images.numel()
    )


def psnr(clean: Split, poison: Poison) -> float | None:
    """Return the peak signal-to-noise ratio of poisoned images in dB; None if nothing differs."""
    poisoned = poison.of_kind(POISON)
    # A few at a time: as numbers they take four times the memory of bytes.
    parts = zip(
        poisoned.images.split(STAMPED_AT_ONCE), poisoned.index.split(STAMPED_AT_ONCE), strict=True
    )
    error = sum(
        int((images.int() - clean.images[index].int()).square().sum()) for images, index in parts
    )
    return 10 * math.log10(255**2 * poisoned.images.numel() / error) if error else None


def no_poison(clean: Split) -> Poison:
    """Return the empty poison, for the clean control."""
    empty = torch.zeros(0, dtype=torch.int64)
    return Poison(empty, clean.images[:0].clone(), empty, empty, torch.zeros(0, dtype=torch.uint8))


def check_rate(poison_rate: float) -> None:
    """Raise a `UserError` for a rate outside (0, 1]."""
    if not 0 < poison_rate <= 1:
        raise UserError(
            f"poison_rate must lie in (0, 1], got {poison_rate}. A clean run is attack/none.py"
        )


def check_target(target_label: int, num_classes: int) -> None:
    """Raise a `UserError` for a target that is no class."""
    if not 0 <= target_label < num_classes:
        raise UserError(
            f"target_label must lie in 0..{num_classes - 1} for this data set, got {target_label}"
        )


def stamped(clean: Split, index: Tensor, stamp: Stamp, split: str) -> Tensor:
    """Stamp images of a split, a few at a time.

    Args:
        clean: the split.
        index: int64 (M,), positions of the images.
        stamp: adds the trigger.
        split: "train" or "test".

    Returns:
        uint8 (M, C, H, W).
    """
    if not len(index):
        return clean.images[:0]
    parts = index.split(STAMPED_AT_ONCE)
    return torch.cat([_once(clean.images[part], part, stamp, split) for part in parts])


def _once(images: Tensor, index: Tensor, stamp: Stamp, split: str) -> Tensor:
    """Stamp images, and raise a `UserError` if the result is not uint8 of the same shape."""
    # A plugin's stamp may return anything.
    found = stamp(images, index, split)
    if not isinstance(found, Tensor) or found.dtype != torch.uint8 or found.shape != images.shape:
        raise UserError(
            f"a stamp maps images to as many of the same shape, uint8 {tuple(images.shape)}, got"
            f" {described(found)}"
        )
    return found


def _stamped(
    clean: Split, index: Tensor, stamp: Stamp, split: str, labels: Labels | None
) -> Poison:
    """Stamp images and give them the attacker's labels; without `labels` they are kind CROSS."""
    original = clean.labels[index]
    images = stamped(clean, index, stamp, split)
    given, kind = (original, CROSS) if labels is None else (labels.of(original), POISON)
    kinds = torch.full((len(index),), kind, dtype=torch.uint8)
    return Poison(index, images, given, original, kinds)


def _merged(first: Poison, second: Poison) -> Poison:
    """Return the rows of both, ordered by position."""
    if not len(second):
        return first

    # Every field is a tensor with one row per image.
    order = torch.cat([first.index, second.index]).argsort()
    return Poison(
        **{
            name: torch.cat([column, vars(second)[name]])[order]
            for name, column in vars(first).items()
        }
    )
