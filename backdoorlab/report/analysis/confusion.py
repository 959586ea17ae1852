"""Which clean test images each model takes for which class: a confusion matrix for each."""

import torch
from torch import Tensor

from ...metrics import predict
from ..charts import Chart, Grid, Panel, class_names
from .subject import Subject, title

MOST = 20
"""Largest number of classes with a row each."""


def chart(subject: Subject) -> Chart:
    """Draw a panel for the attacked model and one for each finished run.

    Of more than MOST classes, those are shown that the first model gets wrong most often, and the
    target.
    """
    test, names = subject.dataset.test, class_names(subject.cells[0])
    panels, shown = [], None
    for cell, model in subject.models:
        counts = confusion(test.labels, predict(model, test, subject.device), len(names))
        shares = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
        shown = _worst(shares, subject.target) if shown is None else shown
        panels.append(Panel(title(cell), "predicted class", "", grid=_grid(shares, shown, names)))

    caption = (
        "Each row is a class of clean test images, each cell the share of them that the model"
        " classifies as that class. Between models only the cells off the diagonal matter: a column"
        " that fills after a defense is what it paid with."
    )
    return Chart("confusion", "Clean images: true and predicted class", caption, tuple(panels))


def confusion(true: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Count images by true and predicted class.

    Args:
        true: int64 (N,).
        predicted: int64 (N,).
        num_classes: K.

    Returns:
        int64 (K, K): a row for each true class, a column for each predicted one.
    """
    pairs = torch.bincount(true * num_classes + predicted, minlength=num_classes**2)
    return pairs.view(num_classes, num_classes)


def _worst(shares: Tensor, target: int | None) -> list[int]:
    """The classes that are shown, in their order."""
    if len(shares) <= MOST:
        return list(range(len(shares)))
    order = shares.diag().argsort(stable=True).tolist()
    others = [label for label in order if label != target]
    first = [] if target is None else [target]
    return sorted((first + others)[:MOST])


def _grid(shares: Tensor, shown: list[int], names: list[str]) -> Grid:
    """The rows and columns that are shown; what goes elsewhere is one more column."""
    values = shares[shown][:, shown]
    columns = [names[label] for label in shown]
    if len(shown) < len(names):
        values = torch.cat([values, 100 - values.sum(1, keepdim=True)], 1)
        columns.append("others")
    return Grid(
        [names[label] for label in shown], columns, values.tolist(), "% of the class's images"
    )
