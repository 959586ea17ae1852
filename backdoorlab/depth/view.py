"""What the attacker knows of a record: the data, the poison, the trigger and the target label.

No defense ever holds one of these (tests/depth/test_depth.py).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ..data import Dataset, Split, to_device
from ..device import derived_generator
from ..metrics import predict, why_no_asr
from ..poison import POISON, Poison
from ..record import Record


@dataclass(frozen=True)
class AttackerView:
    """A record with its clean data, as the attacker has them."""

    record: Record
    dataset: Dataset
    device: torch.device
    seed: int
    """Seed of the audit."""

    @cached_property
    def poisoned(self) -> Poison:
        """The poisoned training images, without cover samples."""
        return self.record.train_poison.of_kind(POISON)

    @cached_property
    def triggered(self) -> Poison:
        """The triggered test images that ASR counts."""
        return self.record.test_poison.of_kind(POISON)

    @cached_property
    def untriggered(self) -> Split:
        """The same test images without the trigger, with their true labels."""
        return self.dataset.test.subset(self.triggered.index)

    @cached_property
    def untouched(self) -> Tensor:
        """Positions of the training images that the attack left alone, int64 (N,)."""
        touched = torch.zeros(len(self.dataset.train), dtype=torch.bool)
        # Cover samples, too: they carry the trigger.
        touched[self.record.train_poison.index] = True
        return (~touched).nonzero().squeeze(1)

    @property
    def target(self) -> int:
        """The one label that the attacker wants for triggered images."""
        return int(self.triggered.labels[0])

    def generator(self, purpose: str) -> torch.Generator:
        """Return a generator that depends on the audit's seed and on `purpose` alone.

        Each model gets the same draws, so that differences between models are not luck.
        """
        return derived_generator(self.seed, f"audit {purpose}")

    def draw_clean(self, count: int, generator: torch.Generator) -> Split:
        """Draw untouched training images without replacement; all of them where they are fewer."""
        order = torch.randperm(len(self.untouched), generator=generator)
        return self.dataset.train.subset(self.untouched[order[:count]])

    def asr(self, model: nn.Module, most: int | None = None) -> float:
        """Return the share of triggered test images, or of `most` of them, that are classified as
        the target."""
        return self.share(model, self._some("triggered", self._triggered_split, most))

    def clean_accuracy(self, model: nn.Module, most: int | None = None) -> float:
        """Return the share of clean test images, or of `most` of them, that are classified
        correctly."""
        return self.share(model, self._some("clean", self._test, most))

    def share(self, model: nn.Module, split: Split) -> float:
        """Return the share of images that get the label beside them."""
        answers = predict(model, split, self.device)
        return (answers == split.labels.cpu()).double().mean().item()

    def _some(self, name: str, split: Split, most: int | None) -> Split:
        """Draw at most so many images, the same ones for each model."""
        if most is None or len(split) <= most:
            return split
        order = torch.randperm(len(split), generator=self.generator(f"measured {name}"))
        return split.subset(order[:most])

    @cached_property
    def _triggered_split(self) -> Split:
        return to_device(self.triggered.triggered(), self.device)

    @cached_property
    def _test(self) -> Split:
        return to_device(self.dataset.test, self.device)


def refusal(record: Record) -> str | None:
    """Say in a clause why no test can tell anything of this record; None where they can."""
    triggered = record.test_poison.of_kind(POISON)
    if not len(triggered):
        return why_no_asr(record.info["attack"])
    # In all2all the share of one label says nothing.
    if len(triggered.labels.unique()) > 1:
        return "its triggered images have several target labels (all2all)"
    if not record.info.get("has_train", True):
        return "it was imported without its training set, of which every test takes images"
    return None


def too_few(found: int, needed: int, which: str = "") -> str | None:
    """Say why a test that takes `needed` poisoned training images, `which` says of what kind,
    cannot be made."""
    if found >= needed:
        return None
    return f"it takes {needed} poisoned training images{which}, and the record has {found}"
