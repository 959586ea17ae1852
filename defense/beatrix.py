"""Beatrix: unusual correlations of feature maps.

The Beatrix Resurrections: Robust Backdoor Detection via Gram Matrices, W. Ma et al., NDSS 2023,
https://arxiv.org/abs/2209.11715. Of each image, the input of the last stage is raised to the powers
1 to 8, and its channels' Gram matrices are brought back by the root of the same order. For each
entry, the trusted images of a label say what is usual: their median and 10 median absolute
deviations around it. The suspicion is how far an image's entries lie outside, in units of the
bounds and averaged. What trusted images have when their own bounds come from the others (five
folds) gives the threshold.

Assumes: the poisoned training set, the model trained on it and trusted images of every label.

Departs: an image belongs to the label that it has in the training set; the authors' code takes the
model's answer on test images. Images are flagged one by one; the paper's second step, which
compares a label's two groups by a kernel, says only which labels are infected. Maps are divided by
their largest value before they are raised, and the matrices multiplied after, so that no power
overflows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from backdoorlab.cli import main
from backdoorlab.config import DefenseConfig
from backdoorlab.data import Split, batches, to_device
from backdoorlab.detection import Detection
from backdoorlab.errors import UserError
from backdoorlab.features import last_stage_input
from backdoorlab.models import Classifier
from backdoorlab.record import DefenderView
from backdoorlab.run import Run

ASSUMES = ("model", "train", "trusted")
FOLDS = 5
"""Parts of the trusted images, each of which is measured by the bounds of the others."""
AT_ONCE = 50
"""Images whose matrices are in memory at once."""


@dataclass(frozen=True, kw_only=True)
class Config(DefenseConfig):
    powers: int = 8
    """Highest power of the feature maps; more look further at their largest values."""
    width: float = 10.0
    """Median absolute deviations on either side of the median that are usual; more are blind to
    small changes."""
    per_label: int = 30
    """Trusted images of a label that are used at most; more know better what is usual."""
    trusted_fpr: float = 0.05
    """Share of the trusted images above the threshold, the false alarms to expect; higher flags
    more."""

    RANGES: ClassVar[dict[str, str]] = {
        "powers": ">= 1",
        "width": "> 0",
        "per_label": ">= 2",
        "trusted_fpr": "(0, 1)",
    }


class Bounds(NamedTuple):
    """What is usual for one label's matrices."""

    low: Tensor
    """float (E,), for each entry."""
    high: Tensor
    """float (E,)."""


def detect(view: DefenderView, config: Config, run: Run) -> Detection:
    model, train = view.load_model().eval(), to_device(view.train, run.device)
    trusted = to_device(view.trusted, run.device)
    suspicion, known = torch.zeros(len(train), device=run.device), []

    for label in range(view.num_classes):
        members = (train.labels == label).nonzero().squeeze(1)
        if not len(members):
            continue
        own = (trusted.labels == label).nonzero().squeeze(1)[: config.per_label]
        if len(own) < 2:
            raise UserError(
                "beatrix learns from trusted images what is usual for each label, and of"
                f" {view.class_names[label]!r} it has {len(own)}, where it needs two: give more"
                " (--trusted_ratio, --trusted_count)"
            )
        usual = torch.cat(list(matrices(model, trusted.subset(own), config.powers, run)))
        known.append(held_out(usual, config.width))

        bounds = bounds_of(usual, config.width)
        found = matrices(model, train.subset(members), config.powers, run)
        suspicion[members] = torch.cat([deviation(part, bounds) for part in found])

    threshold = torch.cat(known).quantile(1 - config.trusted_fpr)
    run.note(f"a deviation above {threshold:.3g} is flagged")
    return Detection(suspicion, suspicion > threshold)


@torch.no_grad()
def matrices(model: Classifier, split: Split, powers: int, run: Run) -> Iterator[Tensor]:
    """Yield the Gram matrices of AT_ONCE images after the other, float (B, E)."""
    with last_stage_input(model) as read:
        for batch in batches(split, AT_ONCE, device=run.device):
            with run.autocast():
                model(batch.images)
            yield gram(read(), powers)


def gram(maps: Tensor, powers: int) -> Tensor:
    """Gram matrices of the powers of feature maps, and their roots.

    Args:
        maps: (B, C, H, W).
        powers: P, the highest power.

    Returns:
        (B, P C (C + 1) / 2): the upper triangle for each power from 1 on. Of power p it is the
        root of order p, with the sign, of the sum over positions of the products of p-th powers.
    """
    rows = maps.flatten(2)
    # Matrices grow with the square of the maps, whatever the power.
    scale = rows.abs().amax((1, 2)).clamp_min(1e-12)
    rows = rows / scale.view(-1, 1, 1)
    upper = torch.triu_indices(rows.shape[1], rows.shape[1], device=rows.device)
    found = []
    for power in range(1, powers + 1):
        raised = rows**power
        entries = (raised @ raised.mT)[:, upper[0], upper[1]]
        found.append(entries.sign() * entries.abs() ** (1 / power))
    return torch.cat(found, 1) * scale.square().unsqueeze(1)


def bounds_of(usual: Tensor, width: float) -> Bounds:
    """Median of each column of (n, E), and `width` median absolute deviations around it."""
    middle = usual.quantile(0.5, dim=0)
    spread = width * (usual - middle).abs().quantile(0.5, dim=0)
    return Bounds(middle - spread, middle + spread)


def deviation(found: Tensor, bounds: Bounds) -> Tensor:
    """Average how far the entries (n, E) lie outside of their bounds, in units of these: (n,)."""
    below = (bounds.low - found).clamp_min(0) / (bounds.low.abs() + 1e-6)
    above = (found - bounds.high).clamp_min(0) / (bounds.high.abs() + 1e-6)
    return (below + above).mean(1)


def held_out(usual: Tensor, width: float) -> Tensor:
    """Deviations (n,) of one label's trusted images (n, E), each by the bounds of other folds."""
    fold = torch.arange(len(usual), device=usual.device) % min(FOLDS, len(usual))
    found = torch.zeros(len(usual), device=usual.device)
    for number in fold.unique():
        here = fold == number
        found[here] = deviation(usual[here], bounds_of(usual[~here], width))
    return found


if __name__ == "__main__":
    raise SystemExit(main(__file__))
