"""Is a defense better than fine-tuning over attacks? An exact sign-flip test, Holm's correction, and what so few attacks cannot show."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .results import BASELINE, IMPLANTED, Group, labels, summary

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Comparison:
    """A defense against the baseline on one data set, an attack being one observation."""

    dataset: str
    defense: str
    baseline: str
    attacks: int
    difference: float
    """Mean over attacks of DER minus the baseline's."""
    p: float
    """Two-sided, exact, by flipping the sign of each attack's difference."""
    holm: float
    """p after Holm's correction over all comparisons of this data set."""


def compare(groups: Sequence[Group]) -> list[Comparison]:
    """Each defense against fine-tuning in DER, by data set, the strongest evidence first.

    An attack (with its settings) is one observation: its seeds and its poison rates are averaged first. Attacks without a DER
    and those that hardly took are left out.
    """
    named = list(zip(groups, labels(groups), strict=True))
    took = {group.first.attack_key for group, _ in named if _implanted(group)}
    scores: dict[str, dict[str, dict[str, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for group, label in named:
        der = group.score("der")
        if der is not None and group.first.attack_key in took:
            scores[group.first.dataset][label.defense][label.attack].append(der.mean)
    return [comparison for dataset, defenses in scores.items() for comparison in _against_baseline(dataset, defenses)]


def _implanted(group: Group) -> bool:
    before = summary(row.asr_before for row in group.rows)
    return before is not None and before.mean >= IMPLANTED


def _against_baseline(dataset: str, defenses: Mapping[str, Mapping[str, list[float]]]) -> list[Comparison]:
    means = {defense: {attack: math.fsum(ders) / len(ders) for attack, ders in attacks.items()} for defense, attacks in defenses.items()}
    found = []
    for defense, attacks in means.items():
        differences = [der - means[BASELINE][attack] for attack, der in attacks.items() if attack in means.get(BASELINE, {})]
        if defense != BASELINE and differences:
            found.append((defense, differences, sign_flip(differences)))
    corrected = holm([p for _, _, p in found])
    comparisons = [
        Comparison(dataset, defense, BASELINE, len(differences), math.fsum(differences) / len(differences), p, adjusted)
        for (defense, differences, p), adjusted in zip(found, corrected, strict=True)
    ]
    return sorted(comparisons, key=lambda c: (c.holm, -c.difference))


def sign_flip(differences: Sequence[float]) -> float:
    """Exact two-sided p: the share of all 2^n sign patterns whose sum is at least as far from 0 as the one seen. n up to 40.

    Both halves' sums are listed and counted against each other, so that 40 differences cost 2^20 steps and not 2^40.
    """
    n = len(differences)
    if not 1 <= n <= 40:
        raise ValueError(f"between 1 and 40 differences can be tested exactly, got {n}")
    seen = abs(math.fsum(differences)) - 1e-12 * math.fsum(map(abs, differences))  # sums in another order are equal sums
    left, right = _signed_sums(differences[: n // 2]), np.sort(_signed_sums(differences[n // 2 :]))
    above = len(right) - np.searchsorted(right, seen - left, side="left")
    below = np.searchsorted(right, -seen - left, side="right")
    return min(1.0, int(above.sum() + below.sum()) / 2**n)


def _signed_sums(numbers: Sequence[float]) -> np.ndarray:
    sums = np.zeros(1)
    for number in numbers:
        sums = np.concatenate([sums + number, sums - number])
    return sums


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down correction, in the order given."""
    corrected, highest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[index]))
        corrected[index] = highest
    return corrected


def fewest_attacks(comparisons: int) -> int:
    """How many attacks it takes before the smallest possible p, after Holm, can be 0.05 or less: 6 for one comparison."""
    return math.ceil(math.log2(2 * max(1, comparisons) / SIGNIFICANT))


def verdict(comparisons: Sequence[Comparison]) -> str:
    """What the comparisons of one data set allow to say, in a sentence or two; "" without any."""
    if not comparisons:
        return ""
    attacks, needed = max(c.attacks for c in comparisons), fewest_attacks(len(comparisons))
    if attacks < needed:
        why = "Fewer than six attacks cannot show significance" if attacks < fewest_attacks(1) else f"{len(comparisons)} comparisons need {needed}"
        smallest = min(1.0, len(comparisons) * 2 / 2**attacks)
        return f"{why}: with {attacks} the smallest p that an exact sign-flip test can give is {2 / 2**attacks:.3g}, {smallest:.3g} after Holm."
    shown = [c.defense for c in comparisons if c.holm <= SIGNIFICANT]
    return f"Different from {BASELINE} at 5 % after Holm: {', '.join(shown) or 'none'}."
