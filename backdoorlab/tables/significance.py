"""Is a defense better than fine-tuning over attacks? A sign-flip test, Holm's correction, and what
so few attacks cannot show."""

import dataclasses
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import TrainingConfig
from .groups import BASELINE, IMPLANTED, Group, summary, told_apart
from .rows import UNDEFENDED, Row

SIGNIFICANT = 0.05
MOST_LISTED = 40
"""Attacks up to which every pattern of signs is counted."""
DRAWN = 100_000
"""Patterns that are drawn where there are more."""
SETUP = frozenset(f.name for f in dataclasses.fields(TrainingConfig)) | {"code", "precision"}
"""Settings that say how an attack was run, not which attack it is."""
RATES = frozenset(["clean_label_ratio", "cover_rate"])
"""Rates of an attack beside its poison rate: like that one they make no other attack of it."""
RUN = frozenset(["code", "precision"])
"""The same of a defense."""


@dataclass(frozen=True)
class Comparison:
    """A defense against the baseline on one data set, an attack being one observation."""

    dataset: str
    defense: str
    baseline: str
    attacks: int
    difference: float
    """Mean over attacks of DER minus the baseline's on the same records."""
    p: float
    """Two-sided, by flipping the sign of each attack's difference."""
    holm: float
    """p after Holm's correction over all comparisons of this data set."""


@dataclass(frozen=True)
class Compared:
    """All comparisons of one data set, the strongest evidence first, and a sentence for each thing
    that was left out of them."""

    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...]


def compare(groups: Sequence[Group]) -> list[Compared]:
    """Each defense against fine-tuning in DER, by data set; data sets without fine-tuning have
    nothing to compare with.

    A difference is that of two defenses on one record, both against its attacked model, and an
    attack with its own settings is one observation: the differences of its rates and seeds are
    averaged. Attacks without a DER and those that hardly took are left out. Of an attack that was
    run in several ways (code, network, training), one way is taken, as is one code of a defense:
    the one with the most runs.
    """
    undefended = {
        group.first.attack_key: group
        for group in groups
        if group.first.defense == UNDEFENDED and not group.first.run
    }
    took = {
        group.first.attack_key
        for group in groups
        if _implanted(undefended.get(group.first.attack_key, group))
    }
    by_dataset: dict[str, list[Row]] = defaultdict(list)
    for group in groups:
        if group.first.attack_key in took:
            by_dataset[group.first.dataset] += [
                row for row in group.rows if row.comparable_der is not None
            ]
    return [
        one
        for dataset, found in by_dataset.items()
        if (one := _against_baseline(dataset, found)) is not None
    ]


def _implanted(group: Group) -> bool:
    before = summary(row.asr_before for row in group.rows)
    return before is not None and before.mean >= IMPLANTED


def _against_baseline(dataset: str, found: Sequence[Row]) -> Compared | None:
    shared = {(row.attack_key, row.seed) for row in found if row.defense == BASELINE}
    together = [row for row in found if (row.attack_key, row.seed) in shared]
    if not together:
        return None
    networks = Counter(row.architecture for row in together)
    # The network that most runs are on goes first, so that all attacks are on one network where
    # they can be.
    kept, notes = _one_way_each(
        together, _attack, _attack_way, lambda rows: (networks[rows[0].architecture], len(rows))
    )
    kept, more = _one_way_each(kept, _defense, _defense_way, len)
    scores: dict[Hashable, dict[tuple[Hashable, ...], list[float]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for row in kept:
        scores[_defense(row)][_attack(row), row.attack_key, row.seed].append(
            row.comparable_der or 0.0
        )
    names = _defense_names({_defense(row): row for row in kept})
    # A plain run of the baseline speaks for it, where there are several.
    candidates = {_defense(row): row.variant != "" for row in kept if row.defense == BASELINE}
    baseline = min(candidates, key=lambda key: (candidates[key], -len(scores[key])))
    notes += more
    if len(candidates) > 1:
        notes.append(
            f"{', '.join(names[key] for key in candidates)} are there: the others are compared with"
            f" {names[baseline]}"
        )
    differences = {
        key: _differences(scores[key], scores[baseline]) for key in scores if key != baseline
    }
    alone = sorted({row.defense for row in found} - {row.defense for row in kept}) + [
        names[key] for key, some in differences.items() if not some
    ]
    if alone:
        notes.append(
            f"not compared, as no such record has both it and {names[baseline]}: {', '.join(alone)}"
        )
    tested = [(key, numbers, sign_flip(numbers)) for key, numbers in differences.items() if numbers]
    corrected = holm([p for _, _, p in tested])
    comparisons = [
        Comparison(
            dataset,
            names[key],
            names[baseline],
            len(numbers),
            math.fsum(numbers) / len(numbers),
            p,
            adjusted,
        )
        for (key, numbers, p), adjusted in zip(tested, corrected, strict=True)
    ]
    return Compared(
        tuple(sorted(comparisons, key=lambda c: (c.holm, -c.difference))),
        tuple(f"{dataset}, {note}" for note in notes),
    )


def _differences(
    ours: Mapping[tuple[Hashable, ...], Sequence[float]],
    theirs: Mapping[tuple[Hashable, ...], Sequence[float]],
) -> list[float]:
    """One number for each attack: the mean over the records that both have of the difference in
    DER."""
    by_attack: dict[Hashable, list[float]] = defaultdict(list)
    for record in ours.keys() & theirs.keys():
        by_attack[record[0]].append(
            math.fsum(ours[record]) / len(ours[record])
            - math.fsum(theirs[record]) / len(theirs[record])
        )
    return [
        math.fsum(numbers) / len(numbers)
        for _, numbers in sorted(by_attack.items(), key=lambda item: str(item[0]))
    ]


# --- what is one observation


def _attack(row: Row) -> Hashable:
    """Equal for records of one attack, however often, at whatever rate and in whatever way it was
    run."""
    return (row.attack, _without(row.attack_settings, SETUP | RATES | {"source"}))


def _attack_way(row: Row) -> dict[str, object]:
    """How an attack was run. Imported models are each a file of its own, so that is no way of
    running."""
    kept = {key: value for key, value in json.loads(row.attack_settings).items() if key in SETUP}
    return {**kept, "data": row.fingerprint[:8], "architecture": row.architecture}


def _defense(row: Row) -> Hashable:
    return (row.defense, row.variant, _without(row.defense_settings, RUN))


def _defense_way(row: Row) -> dict[str, object]:
    return {key: value for key, value in json.loads(row.defense_settings).items() if key in RUN}


def _without(settings: str, names: frozenset[str]) -> str:
    return json.dumps(
        {key: value for key, value in json.loads(settings).items() if key not in names},
        sort_keys=True,
    )


def _one_way_each(
    found: Sequence[Row],
    what: Callable[[Row], Hashable],
    way: Callable[[Row], dict[str, object]],
    weight: Callable[[Sequence[Row]], Any],
) -> tuple[list[Row], list[str]]:
    """The rows of the heaviest way of running of each attack (or defense), and a sentence on each
    of which others were left out."""
    ways: dict[Hashable, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in found:
        ways[what(row)][json.dumps(way(row), sort_keys=True)].append(row)
    kept, notes = [], []
    for key, members in ways.items():
        taken = max(members, key=lambda text: weight(members[text]))
        kept += members[taken]
        if len(members) > 1:
            shown = told_apart({text: (key, json.loads(text)) for text in members})
            name = members[taken][0].attack if what is _attack else members[taken][0].defense
            others = " and".join(shown[text] for text in members if text != taken)
            notes.append(
                f"{name} was run in {len(members)} ways, and the test takes{shown[taken]},"
                f" not{others}"
            )
    return kept, notes


def _defense_names(first: Mapping[Hashable, Row]) -> dict[Hashable, str]:
    """What to call each, with the settings that tell it from its like in brackets."""
    families = {
        key: ((row.defense, row.variant), json.loads(_without(row.defense_settings, RUN)))
        for key, row in first.items()
    }
    beside = told_apart(families)
    return {key: row.called + beside[key] for key, row in first.items()}


# --- the test


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p: the share of all 2^n sign patterns whose sum is at least as far from 0 as the
    one seen.

    Both halves' sums are listed and counted against each other, so that MOST_LISTED differences
    cost 2^20 steps and not 2^40. Of more differences DRAWN patterns are drawn, the same ones at
    each call, and the one seen is counted as one more, so that p is never too small.
    """
    n = len(differences)
    if not n:
        raise ValueError("a test needs at least one difference")
    # Sums in another order are equal sums
    seen = abs(math.fsum(differences)) - 1e-12 * math.fsum(map(abs, differences))
    if n > MOST_LISTED:
        generator = np.random.default_rng(0)
        sums = [
            (2.0 * generator.integers(0, 2, (1000, n), dtype=np.int8) - 1) @ np.asarray(differences)
            for _ in range(DRAWN // 1000)
        ]
        return (1 + int((abs(np.concatenate(sums)) >= seen).sum())) / (1 + DRAWN)
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
    """How many attacks it takes before the smallest possible p, after Holm, can be 0.05 or less: 6
    for one comparison."""
    return math.ceil(math.log2(2 * max(1, comparisons) / SIGNIFICANT))


def verdict(comparisons: Sequence[Comparison]) -> str:
    """What the comparisons of one data set allow to say, in a sentence or two; "" without any."""
    if not comparisons:
        return ""
    attacks, needed = max(c.attacks for c in comparisons), fewest_attacks(len(comparisons))
    if attacks < needed:
        why = (
            "Fewer than six attacks cannot show significance"
            if attacks < fewest_attacks(1)
            else f"{len(comparisons)} comparisons need {needed}"
        )
        smallest = min(1.0, len(comparisons) * 2 / 2**attacks)
        return (
            f"{why}: with {attacks} the smallest p that an exact sign-flip test can give is"
            f" {2 / 2**attacks:.3g}, {smallest:.3g} after Holm."
        )
    shown = [c.defense for c in comparisons if c.holm <= SIGNIFICANT]
    drawn = (
        f" p from {DRAWN:,} random sign flips, as all of {attacks} attacks are too many to list."
        if attacks > MOST_LISTED
        else ""
    )
    return (
        f"Different from {comparisons[0].baseline} at 5 % after Holm:"
        f" {', '.join(shown) or 'none'}.{drawn}"
    )
