"""Search for the first poison: a small set of training samples that is almost pure poison (ours).

A label given to two kinds of images has features in two groups.

  1. Cut each label's samples in two, along the direction in which they vary most in units of how
     the other labels' samples vary.
  2. Measure each part: does it show images of many classes, or of one other class, and how far
     apart are the two in the last layer?
  3. Compare the numbers with those of the data set's own labels. Three tests decide, each run
     only where those before it find nothing.

docs/methods/dau.md gives the reasons, docs/lab/dau.md the numbers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..features import Features
from ..groups.measuring import Group, Measured, measure
from ..run import Run

SPREADS = "robust standard deviations"
ALIKE = 2
"""Largest ratio of sizes at which a part of a label is compared with a group."""
DOUBLED = 2.0
"""Robust standard deviations that another label's being twice as near counts for."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Settings of the search. A method inherits these fields, which makes them its flags."""

    label_samples: int = 20
    """Samples that a label must have to be searched: a few points look like two groups by chance.
    Half as many are needed of a group."""
    separation: float = 2.0
    """Distance between the two means of a mixture, in its standard deviations, below which they are
    one group. Lower values find more groups."""
    variety: float = 0.5
    """Variety of classes a group must show to be poison, as a share of the other labels' variety.
    Lower values find more poison and raise more false alarms."""
    many_classes: float = 6.0
    """Robust standard deviations by which a group must also show more classes than parts of labels
    do. Lower values find more poison and raise more false alarms."""
    apart: float = 2.4
    """Evidence that one of a label's two groups is out of its place, above which it is poison: in
    the last layer it is farther from the other one than other labels' groups, shows more classes,
    and another label is nearer to the other one. In units of the largest that chance gives among
    so many labels. Lower values find more, and more false alarms."""
    nearer: float = 1.75
    """How many times nearer another label must be than the rest of its own for a group to be out of
    its label. Lower values find more poison and raise more false alarms."""
    belongs: float = 0.9
    """Mean probability of one other class that a group must get to be poison from that class. Lower
    values find more poison and raise more false alarms."""
    reference_labels: int = 5
    """Labels needed to compare a label with the others. With fewer only poison that shows one other
    class is found."""
    trim: float = 0.2
    """Share of a poisoned half, nearest to the other half, that the pool is not drawn from. Higher
    values make the pool purer and less typical."""
    sure: float = 0.99
    """Probability under a mixture above which a sample of the poisoned group may enter the pool;
    the surer half of the group always may."""

    RANGES: ClassVar[dict[str, str]] = {
        "label_samples": ">= 4",
        "separation": "> 0",
        "variety": "[0, 1)",
        "nearer": "> 0",
        "belongs": "(0, 1]",
        "reference_labels": ">= 3",
        "trim": "[0, 1)",
        "sure": "(0, 1)",
    }


Test = Callable[[Measured, "SearchConfig"], dict[int, tuple[Group, str]]]
"""Label -> its group of poison, and the evidence in words."""


class Found(NamedTuple):
    """What a search found."""

    pool: Tensor
    """bool (N,) on the CPU: samples that are almost surely poison; none where no label looks
    poisoned."""
    rest: Tensor
    """bool (N,) on the CPU: samples that surely belong to the other group of the same labels."""
    one_class: bool = False
    """Whether the poison may show one class only, which is what the second test finds."""


def search(features: Features, num_classes: int, config: SearchConfig, run: Run) -> Found:
    """Find a small set of samples that are almost surely poison.

    Args:
        features: of all N training samples, by the poisoned model.
        num_classes: K.
    """
    n = len(features.labels)
    measured = measure(
        features.early,
        features.pooled,
        features.spatial,
        features.labels,
        num_classes,
        label_samples=config.label_samples,
        separation=config.separation,
        trim=config.trim,
        sure=config.sure,
        generator=run.generator,
    )
    if measured.left_out:
        few = f"{measured.left_out} labels have less than {config.label_samples} samples"
        run.note(f"{few}: no pool is sought among those")
    if not comparable(measured.groups, config):
        few = f"fewer than {config.reference_labels} labels have groups to compare"
        run.note(f"{few}: only poison that looks like one other class can be told from two styles")

    # The first test that finds a group decides.
    for test in TESTS:
        found = test(measured, config)
        if found:
            for group, why in found.values():
                run.note(
                    f"label {group.label}: {why}, so {group.size:,} samples are taken for poison"
                )
            groups = [group for group, _ in found.values()]
            members = torch.cat([group.sure for group in groups])
            others = torch.cat([group.sure_rest for group in groups])
            return Found(mask(members, n), mask(others, n), test is shows_one_class)

    # A note, so that a reader of the result knows why nothing was done.
    run.note(
        "no poison found: no label has a group of images of many classes, of one other class, or"
        " far from the rest of its label, so the model is returned as it was"
    )
    return alone(torch.zeros(n, dtype=torch.bool))


# --- the three tests


def shows_many_classes(measured: Measured, config: SearchConfig) -> dict[int, tuple[Group, str]]:
    """Find groups that show more classes than parts of labels do: dirty-label poison."""
    if not comparable(measured.groups, config):
        return {}
    found = {}
    for group in sorted(measured.groups, key=lambda group: group.lacks):
        z, shown = many(group, measured), 1 - math.exp(-group.lacks)
        if shown > config.variety and z > config.many_classes:
            what = f"a group shows {shown:.2f} of the other labels' variety"
            found[group.label] = group, f"{what}, {z:.1f} {SPREADS} above parts of labels"
    return found


def shows_one_class(measured: Measured, config: SearchConfig) -> dict[int, tuple[Group, str]]:
    """Find groups of at most half of a label that look like one other class: poison of one source
    class, or all-to-all."""
    found = {}
    for group in sorted(measured.groups, key=lambda group: group.nearer):
        small = config.label_samples <= group.size <= group.rest
        if small and group.nearer > config.nearer and group.belief > config.belongs:
            what = f"a group looks like class {group.source} (probability {group.belief:.2f})"
            found[group.label] = group, f"{what}, {group.nearer:.1f} times nearer than the rest"
    return found


def lies_apart(measured: Measured, config: SearchConfig) -> dict[int, tuple[Group, str]]:
    """Find labels of which one group is nearer to another label than to the other group, where no
    content explains that one's place: it is poison if the evidence adds up to enough.

    The evidence is how much farther the two groups are apart in the last layer than other labels'
    groups, and how many more classes one shows than parts of labels, both in robust standard
    deviations, and how much nearer another label is: twice counts as two of them.
    """
    if not comparable(measured.groups, config):
        return {}
    groups, found = sorted(measured.groups, key=lambda group: group.apart), {}
    # One value a label, its largest: the groups are sorted.
    reference = list({group.label: group.apart for group in groups}.values())
    for group in groups:
        large = config.label_samples <= min(group.size, group.rest)
        if not (large and group.rest_nearer > max(config.nearer, group.nearer)):
            continue
        away, shown = robust_z(group.apart, reference), max(0.0, many(group, measured))
        evidence = away + shown + DOUBLED * math.log2(group.rest_nearer)
        # The largest of so many normal values lies about that many standard deviations out.
        evidence /= math.sqrt(2 * math.log(len(reference)))
        if evidence > config.apart:
            what = f"a group is far from the label's rest in the last layer ({away:.1f} {SPREADS}"
            what += f" beyond labels' groups) and more varied than parts of labels ({shown:.1f});"
            what += f" another label is {group.rest_nearer:.1f} times nearer to that rest"
            found[group.label] = group, f"{what} (evidence {evidence:.1f})"
    return found


TESTS: list[Test] = [shows_many_classes, shows_one_class, lies_apart]


def comparable(groups: list[Group], config: SearchConfig) -> bool:
    """Whether there are labels enough to compare one with the others."""
    return len({group.label for group in groups}) >= config.reference_labels


def many(group: Group, measured: Measured) -> float:
    """Robust standard deviations by which a group shows more classes than parts of labels do."""
    # Small groups are compared with small parts, which show less of one class.
    alike = [lacks for size, lacks in measured.known if size <= ALIKE * group.size]
    return robust_z(group.lacks, alike)


def robust_z(value: float, reference: list[float]) -> float:
    """Distance of a value from a reference's median, in robust standard deviations (1.4826 MAD)."""
    known = torch.tensor(reference, dtype=torch.float64)
    spread = 1.4826 * (known - known.median()).abs().median()
    return (value - known.median().item()) / max(spread.item(), 1e-12)


# --- the pool


def alone(pool: Tensor) -> Found:
    """A pool, bool (N,), of whose labels' other samples nothing is known."""
    return Found(pool, torch.zeros_like(pool))


def draw(pool: Tensor, share: float, count: int, run: Run) -> Tensor:
    """Draw a share of a pool, bool (N,) on the CPU, in (0, 1], `count` times.

    Returns:
        bool (count, N).
    """
    # Drawn at random: the most extreme samples would be purer, but unlike the rest.
    found, size = pool.nonzero().squeeze(1), max(1, int(share * int(pool.sum())))
    orders = [torch.randperm(len(found), generator=run.generator) for _ in range(count)]
    return torch.stack([mask(found[order[:size]], len(pool)) for order in orders])


def mask(index: Tensor, size: int) -> Tensor:
    """bool (size,) on the CPU: True at the positions of `index`."""
    result = torch.zeros(size, dtype=torch.bool)
    result[index.cpu()] = True
    return result
