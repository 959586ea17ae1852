"""Who is poisoned, with which label, and what that leaves on disk."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import Split
from .errors import UserError, described

POISON, CROSS = 1, 2
"""Kinds: poison has the trigger and the attacker's label; cross has a trigger-like change and its
true label."""

STAMPED_AT_ONCE = 512
"""Images that go through a stamp together: intermediate floats stay in the processor's cache, which
makes it two to four times as fast."""

Stamp = Callable[[Tensor, Tensor, str], Tensor]
"""stamp(images, index, split): uint8 (N, C, H, W), int64 (N,), "train" or "test" -> uint8, same
shape.

Deterministic: whatever is random in it is drawn from the attack's seed, the split and the index of
the image.
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

    def of_kind(self, kind: int) -> "Poison":
        """The rows of that kind alone."""
        chosen = self.kind == kind
        return Poison(
            self.index[chosen],
            self.images[chosen],
            self.labels[chosen],
            self.original_labels[chosen],
            self.kind[chosen],
        )

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
    """all2one: every label becomes target_label. all2all: label y becomes y + 1 modulo
    num_classes."""
    num_classes: int

    def of(self, original: Tensor) -> Tensor:
        """True labels -> the attacker's, int64 (M,) -> same."""
        if self.label_mode == "all2one":
            return torch.full_like(original, self.target_label)
        return (original + 1) % self.num_classes


def draw(pool: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` positions of a bool (N,) pool without replacement, increasing; all of them where it
    holds fewer."""
    candidates = pool.nonzero().squeeze(1)
    return candidates[torch.randperm(len(candidates), generator=generator)[:count]].sort().values


def outside_target(labels: Tensor, config: Any) -> Tensor:
    """bool (N,): images whose label poisoning would change."""
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
    """round(poison_rate * N) images, drawn without replacement, stamped and relabelled; then as
    many covers as cover_rate says.

    poison_rate, cover_rate: shares of the whole training set of N images, in (0, 1] and [0, 1].
    victims, covers: bool (N,), who may be drawn; None is every image. Where fewer may be than the
    rate asks for, all of them are. A cover (kind CROSS) is stamped too, with `cover_stamp` where
    there is one, keeps its true label, and is never a victim as well.
    """
    check_rate(poison_rate)
    count = round(poison_rate * len(clean))
    if count == 0:
        raise UserError(
            f"poison_rate {poison_rate} of {len(clean)} training images is no image at all: raise"
            " --poison_rate"
        )
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
    """The images that ASR is measured on: every test image whose label the attack changes (in
    all2one, none of the target class).

    victims: bool (N,), whom the attack is meant for; None is everyone. The others are stamped too
    and are of kind CROSS: they should keep their true label, and no ASR counts them.
    """
    counted = torch.ones(len(clean), dtype=torch.bool)
    if labels.label_mode == "all2one":
        counted = clean.labels != labels.target_label
    meant = counted if victims is None else counted & victims
    poisoned, spared = meant.nonzero().squeeze(1), (counted & ~meant).nonzero().squeeze(1)
    return _merged(
        _stamped(clean, poisoned, stamp, "test", labels),
        _stamped(clean, spared, stamp, "test", None),
    )


def left_by_crops(clean: Split, poison: Poison, padding: int) -> dict[str, float] | None:
    """What random crops leave of the trigger in training: the share of crops that keep all of it,
    and that keep none.

    Over all crops of the first 100 poisoned images after `padding` zero pixels on each side; None
    without a poisoned image. Images whose trigger is cut off are clean images with the wrong label.
    """
    poisoned = poison.of_kind(POISON)
    changed = (
        (poisoned.images[:100] != clean.images[poisoned.index[:100]]).any(1, keepdim=True).float()
    )
    changed = changed[changed.flatten(1).any(1)]
    if not len(changed):
        return None
    height, width = changed.shape[2:]
    kept = F.avg_pool2d(F.pad(changed, [padding] * 4), (height, width), stride=1)
    whole = changed.mean((2, 3), keepdim=True)
    return {
        "whole": (kept > whole - 1e-6).double().mean().item(),
        "none": (kept < 1e-6).double().mean().item(),
    }


def changed_share(clean: Split, poison: Poison) -> float | None:
    """Share of the values of all poisoned images that differ from the clean ones; None without a
    poisoned image."""
    poisoned = poison.of_kind(POISON)
    if not len(poisoned):
        return None
    return (
        int((poisoned.images != clean.images[poisoned.index]).count_nonzero())
        / poisoned.images.numel()
    )


def no_poison(clean: Split) -> Poison:
    """Nothing changed: the clean control."""
    empty = torch.zeros(0, dtype=torch.int64)
    return Poison(empty, clean.images[:0].clone(), empty, empty, torch.zeros(0, dtype=torch.uint8))


def check_rate(poison_rate: float) -> None:
    if not 0 < poison_rate <= 1:
        raise UserError(
            f"poison_rate must lie in (0, 1], got {poison_rate}. A clean run is attack/none.py"
        )


def check_target(target_label: int, num_classes: int) -> None:
    if not 0 <= target_label < num_classes:
        raise UserError(
            f"target_label must lie in 0..{num_classes - 1} for this data set, got {target_label}"
        )


def stamped(clean: Split, index: Tensor, stamp: Stamp, split: str) -> Tensor:
    """uint8 (M, C, H, W): the images of `index` with a stamp, in parts."""
    return (
        torch.cat(
            [_once(clean.images[part], part, stamp, split) for part in index.split(STAMPED_AT_ONCE)]
        )
        if len(index)
        else clean.images[:0]
    )


def _once(images: Tensor, index: Tensor, stamp: Stamp, split: str) -> Tensor:
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
    """The rows of `index` with the trigger and the attacker's labels; without `labels` with their
    own, which makes them CROSS."""
    original = clean.labels[index]
    images = stamped(clean, index, stamp, split)
    given, kind = (original, CROSS) if labels is None else (labels.of(original), POISON)
    return Poison(
        index, images, given, original, torch.full((len(index),), kind, dtype=torch.uint8)
    )


def _merged(first: Poison, second: Poison) -> Poison:
    """The rows of both, in the order of their positions."""
    if not len(second):
        return first
    order = torch.cat([first.index, second.index]).argsort()
    return Poison(
        **{
            name: torch.cat([column, vars(second)[name]])[order]
            for name, column in vars(first).items()
        }
    )
