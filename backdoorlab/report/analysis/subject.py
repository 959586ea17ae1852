"""What an analysis looks at: the models of one record, and the test images that all are shown."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...data import Dataset, Split
from ...models import Classifier
from ...poison import POISON, Poison
from ..artifacts import Cell

CLASSES = 10
"""From how many classes clean test images are shown; the target is one of them."""
PER_CLASS = 40
"""Clean test images of each class."""
TRIGGERED = 120
"""Triggered test images."""


@dataclass(frozen=True)
class Subject:
    """The models of one record with its data. No image is drawn at random."""

    cells: Sequence[Cell]
    """The cells of the record, of which the undefended one is the first."""
    dataset: Dataset
    device: torch.device

    @property
    def target(self) -> int | None:
        """The target class; None without an attack, and with several targets."""
        found: int | None = self.cells[0].record.info.get("target")
        return found

    @cached_property
    def clean(self) -> Split:
        """The first clean test images of each class shown, by class."""
        labels = torch.tensor(sorted(self._classes))
        members = [(self.dataset.test.labels == label).nonzero().squeeze(1) for label in labels]
        return self.dataset.test.subset(torch.cat([own[:PER_CLASS] for own in members]))

    @property
    def triggered(self) -> Split:
        """Triggered test images of the classes shown, at even distances, with the attacker's
        labels; none where there is no trigger."""
        return self._poison.triggered().subset(self._shown)

    @property
    def untriggered(self) -> Split:
        """The images of `triggered` without the trigger, with their true labels."""
        return self.dataset.test.subset(self._poison.index[self._shown])

    @cached_property
    def models(self) -> list[tuple[Cell, Classifier]]:
        """Each cell with its model in evaluation mode, the undefended one first, read once for all
        analyses.

        A result without a model, such as a detector's, is left out.
        """
        found = ((cell, _weights(cell)) for cell in self.cells)
        return [(cell, model.to(self.device).eval()) for cell, model in found if model is not None]

    @property
    def _classes(self) -> list[int]:
        others = [label for label in range(self.dataset.num_classes) if label != self.target]
        return ([] if self.target is None else [self.target]) + others[
            : CLASSES - (self.target is not None)
        ]

    @cached_property
    def _poison(self) -> Poison:
        # Images that keep their true label with the trigger are not meant to be misclassified.
        return self.cells[0].record.test_poison.of_kind(POISON)

    @cached_property
    def _shown(self) -> Tensor:
        """Positions in `_poison`."""
        shown = torch.isin(self._poison.original_labels, torch.tensor(self._classes))
        usable = shown.nonzero().squeeze(1)
        count = min(TRIGGERED, len(usable))
        return usable[torch.linspace(0, max(0, len(usable) - 1), count).long()]


def title(cell: Cell) -> str:
    """Name the model of a cell above its panel."""
    return "no defense" if cell.undefended else cell.name


def _weights(cell: Cell) -> Classifier | None:
    """Load the model of a cell; None if the result has none."""
    if cell.undefended:
        # Of plain training nothing but its scores was kept.
        return None if cell.row.run else cell.record.model()
    if "model.safetensors" not in cell.info["files"]:
        return None
    return cell.record.model_in(cell.folder, cell.info)
