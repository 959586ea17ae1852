"""What is measured of the two groups of a label: what they show, and how far apart they lie."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .content import Discriminant, leave_one_out
from .splitting import Whitened, main_directions, mixture, two_means, whiten

REFERENCE_DIRECTIONS = 3
"""Directions along which each label is cut, to know what variety its own images show."""
FULL = 0.02
"""Missing variety below which a group shows every class: more cannot be told from chance."""


class Group(NamedTuple):
    """One of two parts of a label's samples, and what was measured of it."""

    label: int
    size: int
    rest: int
    """Samples of the label outside the group."""
    sure: Tensor
    """int64 (m,): samples that surely belong to the group, as positions in the training set."""
    sure_rest: Tensor
    """The same of the rest."""
    lacks: float
    """-log of the variety of classes that the group lacks: high where it shows many."""
    apart: float
    """log distance of the two parts' means in the last layer, in the spread of other labels."""
    nearer: float
    """Distance to the rest of the label, divided by that to the nearest other label."""
    rest_nearer: float
    """The same of the rest."""
    belief: float
    """Mean probability of `source` among the other labels and the rest."""
    source: int


class Measured(NamedTuple):
    """What was measured of a data set."""

    groups: list[Group]
    """All groups of all labels."""
    known: list[tuple[int, float]]
    """Size and `lacks` of other parts of all labels, for comparison."""
    left_out: int
    """Labels of too few samples."""


def measure(
    early: Tensor,
    late: Tensor,
    spatial: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    label_samples: int,
    separation: float,
    trim: float,
    sure: float,
    generator: torch.Generator,
) -> Measured:
    """Cut each label in two and measure both parts.

    Args:
        early: (N, D) features in which a trigger moves its images.
        late: (N, D') the last layer's input.
        spatial: (N, D'') features from which the content of an image can be told.
        labels: int64 (N,), in 0 .. num_classes - 1.
        num_classes: K.
        label_samples: labels with fewer samples are left out, and groups with fewer than half.
        separation, trim, sure: as in `SearchConfig`.
        generator: draws the samples that are compared with.
    """
    groups, known, left_out = list[Group](), list[tuple[int, float]](), 0
    content = leave_one_out(spatial, labels, num_classes, generator)
    whitened = (whiten(x, labels, num_classes) for x in (early, late))
    for near, far, shown in zip(*whitened, content, strict=True):
        if len(near.members) < label_samples:
            left_out += 1
            continue

        # What variety parts of a label show: halves and ends, along several directions.
        lines = main_directions(near.samples, REFERENCE_DIRECTIONS) @ near.samples
        for line in lines:
            for part in (*halves(line), *ends(line, label_samples // 2)):
                known.append((int(part.sum()), lacks(part, shown, generator)))

        # The parts that may be poison.
        for part, inside, outside in parts(near, lines[0], separation, trim, sure):
            if part.sum() >= label_samples // 2 <= (~part).sum():
                members, others = near.members[inside], near.members[outside]
                groups.append(examine(part, members, others, far, shown, generator))
    return Measured(groups, known, left_out)


def halves(line: Tensor) -> list[Tensor]:
    """The two groups of 2-means, bool (n,), of samples along a line (n,)."""
    upper = two_means(line)
    return [half for half in (upper, ~upper) if half.any()]


def ends(line: Tensor, size: int) -> list[Tensor]:
    """The outermost `size` samples of either end, bool (n,), of samples along a line (n,)."""
    rank = line.argsort().argsort()
    return [rank < size, rank >= len(line) - size]


def parts(
    label: Whitened, line: Tensor, separation: float, trim: float, sure: float
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Cut a label by 2-means and by mixtures from both ends of a line (n,): parts, what surely
    belongs to each, and what surely does not, bool (n,)."""
    cuts = []
    if len(both := halves(line)) == 2:
        cuts.append([(half, outer(line, half, trim)) for half in both])
    for p in mixture(label.samples, line, separation):
        cuts.append([(side > 0.5, certain(side, sure)) for side in (p, 1 - p)])

    # Either side may be the poison, so both are parts.
    found = []
    for (one, in_one), (other, in_other) in cuts:
        found += [(one, in_one, in_other), (other, in_other, in_one)]
    return found


def certain(p: Tensor, sure: float) -> Tensor:
    """bool (n,): the surer half of those that belong to a group by their probability (n,), and all
    above `sure`."""
    return p >= p[p > 0.5].median().clamp_max(sure)


def outer(x: Tensor, half: Tensor, trim: float) -> Tensor:
    """bool (n,): a half without the share `trim` of it that is nearest to the other along x."""
    away = (x - x[~half].mean()).abs()
    return half & (away >= away[half].quantile(trim))


def examine(
    part: Tensor,
    sure: Tensor,
    sure_rest: Tensor,
    late: Whitened,
    shown: Discriminant,
    generator: torch.Generator,
) -> Group:
    """Measure a part, bool (n,), of a label; `sure` are samples of it, and `sure_rest` of its rest,
    as positions."""
    belief, source = shown.belief(part)
    return Group(
        label=late.label,
        size=int(part.sum()),
        rest=int((~part).sum()),
        sure=sure,
        sure_rest=sure_rest,
        lacks=lacks(part, shown, generator),
        apart=distance(late.samples, part),
        nearer=shown.nearer(part),
        rest_nearer=shown.nearer(~part),
        belief=belief,
        source=source,
    )


def lacks(part: Tensor, shown: Discriminant, generator: torch.Generator) -> float:
    """-log of the variety that a part, bool (n,), lacks."""
    return -math.log(max(FULL, 1 - shown.variety(part, generator)))


def distance(samples: Tensor, part: Tensor) -> float:
    """log distance between the means of a part, bool (n,), of whitened samples (D, n) and of the
    others, less what chance adds to it."""
    sides = [samples[:, part], samples[:, ~part]]
    # Means of n samples differ by their variance over n where nothing moves them.
    chance = sum(side.var(1, correction=0).sum() / side.shape[1] for side in sides)
    square = (sides[0].mean(1) - sides[1].mean(1)).square().sum() - chance
    return 0.5 * math.log(max(float(square), 1e-2))
