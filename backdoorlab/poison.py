"""Who is poisoned, with which label, and what that leaves on disk."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .data import Split
from .errors import UserError

POISON, CROSS = 1, 2
"""Kinds: poison has the trigger and the attacker's label; cross has a trigger-like change and its true label."""

Stamp = Callable[[Tensor, Tensor, str], Tensor]
"""stamp(images, index, split): uint8 (N, C, H, W), int64 (N,), "train" or "test" -> uint8, same shape.

Deterministic: whatever is random in it is drawn from the attack's seed, the split and the index of the image.
"""


@dataclass(frozen=True)
class Poison:
    """Only what differs from the clean split."""

    index: Tensor
    """int64 (M,), increasing: positions in the clean split."""
    images: Tensor
    """uint8 (M, C, H, W), as the model gets them (before augmentation)."""
    labels: Tensor
    """int64 (M,), as the attacker gives them."""
    original_labels: Tensor
    """int64 (M,), the true ones."""
    kind: Tensor
    """uint8 (M,): POISON or CROSS."""

    def __len__(self) -> int:
        return len(self.index)

    def apply(self, clean: Split) -> Split:
        """The split as a victim receives it: a copy with the poisoned rows in place, unmarked."""
        received = clean.copy()
        received.images[self.index], received.labels[self.index] = self.images, self.labels
        return received

    def triggered(self) -> Split:
        """The poisoned images alone, with the attacker's labels."""
        return Split(self.images, self.labels)

    def mask(self, size: int, kind: int = POISON) -> Tensor:
        """bool (size,): where the clean split of `size` images is of that kind."""
        found = torch.zeros(size, dtype=torch.bool)
        found[self.index[self.kind == kind]] = True
        return found


@dataclass(frozen=True)
class Labels:
    """What the attacker wants triggered images to be taken for."""

    target_label: int
    label_mode: Literal["all2one", "all2all"]
    """all2one: every label becomes target_label. all2all: label y becomes y + 1 modulo num_classes."""
    num_classes: int

    def of(self, original: Tensor) -> Tensor:
        """True labels -> the attacker's, int64 (M,) -> same."""
        if self.label_mode == "all2one":
            return torch.full_like(original, self.target_label)
        return (original + 1) % self.num_classes


def poison_train(clean: Split, stamp: Stamp, labels: Labels, *, poison_rate: float, generator: torch.Generator) -> Poison:
    """round(poison_rate * N) images of *all* classes, drawn without replacement, stamped and relabelled.

    poison_rate: share of the whole training set, in (0, 1].
    """
    check_rate(poison_rate)
    count = round(poison_rate * len(clean))
    if count == 0:
        raise UserError(f"poison_rate {poison_rate} of {len(clean)} training images is no image at all: raise --poison_rate")
    index = torch.randperm(len(clean), generator=generator)[:count].sort().values
    return _stamped(clean, index, stamp, "train", labels)


def poison_test(clean: Split, stamp: Stamp, labels: Labels) -> Poison:
    """The images that ASR is measured on: every test image whose label the attack changes (in all2one, none of the target class)."""
    index = torch.arange(len(clean))
    if labels.label_mode == "all2one":
        index = index[clean.labels != labels.target_label]
    return _stamped(clean, index, stamp, "test", labels)


def no_poison(clean: Split) -> Poison:
    """Nothing changed: the clean control."""
    empty = torch.zeros(0, dtype=torch.int64)
    return Poison(empty, clean.images[:0].clone(), empty, empty, torch.zeros(0, dtype=torch.uint8))


def check_rate(poison_rate: float) -> None:
    if not 0 < poison_rate <= 1:
        raise UserError(f"poison_rate must lie in (0, 1], got {poison_rate}. A clean run is attack/none.py")


def check_target(target_label: int, num_classes: int) -> None:
    if not 0 <= target_label < num_classes:
        raise UserError(f"target_label must lie in 0..{num_classes - 1} for this data set, got {target_label}")


def _stamped(clean: Split, index: Tensor, stamp: Stamp, split: str, labels: Labels) -> Poison:
    original = clean.labels[index]
    images = torch.cat([stamp(clean.images[part], part, split) for part in index.split(4096)])
    if images.dtype != torch.uint8 or images.shape[1:] != clean.images.shape[1:]:
        raise TypeError(f"a stamp maps uint8 images to uint8 images of the same shape, got {images.dtype} {tuple(images.shape)}")
    return Poison(index, images, labels.of(original), original, torch.full((len(index),), POISON, dtype=torch.uint8))
