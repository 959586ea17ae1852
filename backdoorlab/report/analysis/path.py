"""Loss along the straight line from the attacked weights to those of each defense.

R. Min et al., NeurIPS 2024, https://arxiv.org/abs/2410.09838 (linear mode connectivity).
"""

import torch
import torch.nn.functional as F
from torch import nn

from ...data import Split, in_order
from ...depth.linear_path import IMAGES, POINTS, between
from ...models import paused
from .. import looks
from ..charts import Chart, Panel, Series
from .subject import Subject, title


def chart(subject: Subject) -> Chart:
    """Draw a panel for each finished run: two losses at eleven points of the line."""
    heading = "From the attacked to the defended weights"
    (_, start), *defended = subject.models
    if not defended:
        return Chart("path", heading, "", missing="No defense left a model on this record.")

    count = len(subject.dataset.train)
    some = torch.linspace(0, count - 1, min(IMAGES, count)).long()
    statistics = subject.dataset.train.subset(some)
    parts = {
        "clean images, true class": (looks.MEASURES + 1, subject.clean),
        "triggered images, target class": (looks.MEASURES, subject.triggered),
    }
    panels = []
    for cell, end in defended:
        blank = subject.cells[0].record.new_model().to(subject.device)
        values: dict[str, list[float]] = {part: [] for part, (_, of) in parts.items() if len(of)}
        for model in between(blank, start, end, statistics, subject.device):
            for part, losses in values.items():
                losses.append(loss(model, parts[part][1], subject.device))
        series = tuple(
            Series(part, parts[part][0], "line", POINTS, losses) for part, losses in values.items()
        )
        panels.append(Panel(title(cell), "share of the way", "cross-entropy", series))

    caption = (
        "On the left the attacked weights, on the right those of the defense; batch statistics are"
        " estimated anew at each point. A backdoor that was removed has a triggered loss that rises"
        " early and stays high. One that rises only at the very end lies a small step away, and one"
        " that is low at the end was hidden in the batch statistics."
    )
    return Chart("path", heading, caption, tuple(panels))


def loss(model: nn.Module, split: Split, device: torch.device) -> float:
    """Return the mean cross-entropy of a split with its labels; the model is in evaluation mode."""
    with torch.inference_mode(), paused():
        sums = [
            F.cross_entropy(model(batch.images).float(), batch.labels, reduction="sum").item()
            for batch in in_order(split, device)
        ]
    return sum(sums) / len(split)
