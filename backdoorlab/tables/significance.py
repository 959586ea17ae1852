"""Is a defense better than fine-tuning over several attacks? A sign-flip test with Holm's
correction, and a verdict that says when there are too few attacks to show it."""

import dataclasses
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import TrainingConfig
from .groups import BASELINE, IMPLANTED, Group, distinguished, summary
from .rows import UNDEFENDED, Row

SIGNIFICANT = 0.05
"""Largest corrected p of a difference that is called significant."""
MOST_LISTED = 40
"""Largest number of attacks for which every pattern of signs is counted."""
DRAWN = 100_000
"""Random patterns of signs that are drawn for more attacks."""
SETUP = frozenset(f.name for f in dataclasses.fields(TrainingConfig)) | {"code", "precision"}
"""Settings of an attack that say how it was trained, not which attack it is."""
RATES = frozenset(["clean_label_ratio", "cover_rate"])
"""Rates of an attack beside its poison rate. Another rate is not another attack."""
RUN = frozenset(["code", "precision"])
"""Settings of a defense that say how it was run, not which defense it is."""
Scores = Mapping[tuple[Hashable, ...], Sequence[float]]
"""(attack, its key, seed) -> DER of a defense on that record, one for each seed of the defense."""


@dataclass(frozen=True)
class Comparison:
    """A defense against the baseline on one data set; each attack is one observation."""

    dataset: str
    defense: str
    baseline: str
    attacks: int
    """How many attacks both were run on."""
    difference: float
    """Mean over attacks of DER minus the baseline's on the same records, in [-1, 1]."""
    p: float
    """Two-sided p of the sign-flip test over attacks."""
    holm: float
    """p after Holm's correction over all comparisons of this data set."""


@dataclass(frozen=True)
class Compared:
    """All comparisons of one data set, the strongest evidence first."""

    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...]
    """A sentence for each thing that was left out of the comparisons."""


def compare(groups: Sequence[Group]) -> list[Compared]:
    """Compare each defense with fine-tuning in DER, separately for each data set.

    A difference is between two defenses on one record, where each DER is against the attacked
    model. The differences over the rates and seeds of an attack are averaged, so that an attack
    with its own settings is one observation.

    Left out are attacks without a DER and those that were hardly implanted. Of an attack that was
    run in several ways (code, network, training) only one way is kept, and of a defense only one
    version of the code: the one with the most runs.

    Returns:
        One value for each data set on which fine-tuning was run.
    """
    undefended = {
        group.first.attack_key: group
        for group in groups
        if group.first.defense == UNDEFENDED and not group.first.run
    }
    # An attack is judged by its own models; without them, by those that were defended.
    implanted = {
        group.first.attack_key
        for group in groups
        if _implanted(undefended.get(group.first.attack_key, group))
    }

    by_dataset: dict[str, list[Row]] = defaultdict(list)
    for group in groups:
        if group.first.attack_key in implanted:
            # What knew the true poison is no competitor.
            ranked = [row for row in group.rows if row.ranked]
            scored = [row for row in ranked if row.comparable_der is not None]
            by_dataset[group.first.dataset] += scored

    compared = [_against_baseline(dataset, found) for dataset, found in by_dataset.items()]
    return [one for one in compared if one is not None]


def _implanted(group: Group) -> bool:
    before = summary(row.asr_before for row in group.rows)
    return before is not None and before.mean >= IMPLANTED


def _against_baseline(dataset: str, found: Sequence[Row]) -> Compared | None:
    """Compare the defenses of one data set; None if fine-tuning was not run on it."""
    kept, notes = _one_way(found)
    if not kept:
        return None

    # A defense may have several seeds on one record; their mean is compared.
    scores: dict[Hashable, dict[tuple[Hashable, ...], list[float]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for row in kept:
        record = (_attack(row), row.attack_key, row.seed)
        scores[_defense(row)][record].append(row.comparable_der or 0.0)

    names = _defense_names({_defense(row): row for row in kept})
    baseline, said = _baseline(kept, scores, names)
    differences = {
        key: _differences(scores[key], scores[baseline]) for key in scores if key != baseline
    }
    notes += said + _not_compared(found, kept, differences, names, baseline)

    # Holm's correction is over all defenses of the data set.
    tested = {key: numbers for key, numbers in differences.items() if numbers}
    ps = [sign_flip(numbers) for numbers in tested.values()]
    comparisons = [
        Comparison(
            dataset=dataset,
            defense=names[key],
            baseline=names[baseline],
            attacks=len(numbers),
            difference=math.fsum(numbers) / len(numbers),
            p=p,
            holm=corrected,
        )
        for (key, numbers), p, corrected in zip(tested.items(), ps, holm(ps), strict=True)
    ]
    return Compared(
        tuple(sorted(comparisons, key=lambda c: (c.holm, -c.difference))),
        tuple(f"{dataset}, {note}" for note in notes),
    )


def _one_way(found: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """Keep one way of running each attack and each defense, and say what was left out."""
    shared = {(row.attack_key, row.seed) for row in found if row.defense == BASELINE}
    together = [row for row in found if (row.attack_key, row.seed) in shared]

    # The network with the most runs goes first, so that all attacks are on one network if possible.
    networks = Counter(row.architecture for row in together)
    kept, attacks = _one_way_each(
        together, _attack, _attack_way, lambda rows: (networks[rows[0].architecture], len(rows))
    )
    kept, defenses = _one_way_each(kept, _defense, _defense_way, len)
    return kept, attacks + defenses


def _baseline(
    kept: Sequence[Row], scores: Mapping[Hashable, Scores], names: Mapping[Hashable, str]
) -> tuple[Hashable, list[str]]:
    """Choose among several runs of fine-tuning, and say which one was chosen."""
    # A plain run goes before a variant, then the one on the most records.
    candidates = {_defense(row): row.variant != "" for row in kept if row.defense == BASELINE}
    baseline = min(candidates, key=lambda key: (candidates[key], -len(scores[key])))
    if len(candidates) == 1:
        return baseline, []

    listed = ", ".join(names[key] for key in candidates)
    return baseline, [f"{listed} are there: the others are compared with {names[baseline]}"]


def _not_compared(
    found: Sequence[Row],
    kept: Sequence[Row],
    differences: Mapping[Hashable, Sequence[float]],
    names: Mapping[Hashable, str],
    baseline: Hashable,
) -> list[str]:
    """Name the defenses that have no record in common with the baseline."""
    alone = sorted({row.defense for row in found} - {row.defense for row in kept})
    alone += [names[key] for key, numbers in differences.items() if not numbers]
    if not alone:
        return []
    return [
        f"not compared with {names[baseline]}, as they have no record in common: {', '.join(alone)}"
    ]


def _differences(ours: Scores, theirs: Scores) -> list[float]:
    """Average the difference in DER over the records that both have, one number for each attack."""
    by_attack: dict[Hashable, list[float]] = defaultdict(list)
    for record in ours.keys() & theirs.keys():
        own, other = (math.fsum(some[record]) / len(some[record]) for some in (ours, theirs))
        by_attack[record[0]].append(own - other)

    # Sets have no order, so the attacks are sorted.
    return [
        math.fsum(numbers) / len(numbers)
        for _, numbers in sorted(by_attack.items(), key=lambda item: str(item[0]))
    ]


# --- what is one observation


def _attack(row: Row) -> Hashable:
    """A key that is equal for all records of one attack, whatever its rate, seed and training."""
    return (row.attack, _without(row.attack_settings, SETUP | RATES | {"source"}))


def _attack_way(row: Row) -> dict[str, object]:
    """How an attack was run: training, code, data and network.

    The file of an imported model is left out, as each model has its own.
    """
    kept = {key: value for key, value in json.loads(row.attack_settings).items() if key in SETUP}
    return {**kept, "data": row.fingerprint[:8], "architecture": row.architecture}


def _defense(row: Row) -> Hashable:
    """A key that is equal for all runs of one defense with the same settings."""
    return (row.defense, row.variant, _without(row.defense_settings, RUN))


def _defense_way(row: Row) -> dict[str, object]:
    """How a defense was run: code and precision."""
    return {key: value for key, value in json.loads(row.defense_settings).items() if key in RUN}


def _without(settings: str, names: frozenset[str]) -> str:
    kept = {key: value for key, value in json.loads(settings).items() if key not in names}
    return json.dumps(kept, sort_keys=True)


def _one_way_each(
    found: Sequence[Row],
    what: Callable[[Row], Hashable],
    way: Callable[[Row], dict[str, object]],
    weight: Callable[[Sequence[Row]], Any],
) -> tuple[list[Row], list[str]]:
    """Keep one way of running each attack, or each defense.

    Args:
        found: The rows to choose from.
        what: Key of the attack or the defense of a row.
        way: The settings that say how it was run.
        weight: Of the rows of one way; the way with the largest weight is kept.

    Returns:
        The rows that were kept, and a sentence for each attack or defense with other ways.
    """
    ways: dict[Hashable, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in found:
        ways[what(row)][json.dumps(way(row), sort_keys=True)].append(row)

    kept, notes = [], []
    for key, members in ways.items():
        taken = max(members, key=lambda text: weight(members[text]))
        kept += members[taken]
        if len(members) == 1:
            continue

        # Both are named by the settings in which they differ.
        shown = distinguished({text: (key, json.loads(text)) for text in members})
        name = members[taken][0].attack if what is _attack else members[taken][0].defense
        others = " and".join(shown[text] for text in members if text != taken)
        notes.append(
            f"{name} was run in {len(members)} ways, and the test takes{shown[taken]}, not{others}"
        )
    return kept, notes


def _defense_names(first: Mapping[Hashable, Row]) -> dict[Hashable, str]:
    """Name each defense, with the settings by which it differs from others of its name."""
    families = {
        key: ((row.defense, row.variant), json.loads(_without(row.defense_settings, RUN)))
        for key, row in first.items()
    }
    beside = distinguished(families)
    return {key: row.called + beside[key] for key, row in first.items()}


# --- the test


def sign_flip(differences: Sequence[float]) -> float:
    """Return the two-sided p of the exact sign-flip test.

    It is the share of all 2^n patterns of signs whose sum is at least as far from 0 as the observed
    sum. For more than MOST_LISTED differences, DRAWN patterns are drawn, the same ones at each
    call; the observed one is counted as one more, so that p is never too small.

    `scipy.stats.permutation_test` lists all 2^n patterns one by one: 20 differences take it 20 s
    in place of 1 ms, and each one more doubles that. It also misses equal sums near 0.

    Args:
        differences: One number for each attack, at least one.
    """
    n = len(differences)
    if not n:
        raise ValueError("a test needs at least one difference")

    # Equal sums differ by rounding if they are added in another order.
    seen = abs(math.fsum(differences)) - 1e-12 * math.fsum(map(abs, differences))

    if n > MOST_LISTED:
        generator = np.random.default_rng(0)
        sums = [
            (2.0 * generator.integers(0, 2, (1000, n), dtype=np.int8) - 1) @ np.asarray(differences)
            for _ in range(DRAWN // 1000)
        ]
        return (1 + int((abs(np.concatenate(sums)) >= seen).sum())) / (1 + DRAWN)

    # The sums of both halves are listed, 2^20 of each for 40 differences. For each sum on the left,
    # those on the right that make the whole large enough are counted by their place in the order.
    left, right = _signed_sums(differences[: n // 2]), np.sort(_signed_sums(differences[n // 2 :]))
    above = len(right) - np.searchsorted(right, seen - left, side="left")
    below = np.searchsorted(right, -seen - left, side="right")
    return min(1.0, int(above.sum() + below.sum()) / 2**n)


def _signed_sums(numbers: Sequence[float]) -> np.ndarray:
    """List the sums of all patterns of signs: n numbers -> float64 (2^n,)."""
    sums = np.zeros(1)
    for number in numbers:
        sums = np.concatenate([sums + number, sums - number])
    return sums


def holm(ps: Sequence[float]) -> list[float]:
    """Correct p values for how many there are, in the order given (Holm, 1979)."""
    # The smallest p is multiplied by their number, the next by one less; none may fall below the
    # one before it.
    corrected, highest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[index]))
        corrected[index] = highest
    return corrected


def fewest_attacks(comparisons: int) -> int:
    """How many attacks it takes until p, after Holm, can be 0.05 or less: 6 for one comparison."""
    # The smallest possible p of n attacks is 2 / 2^n.
    return math.ceil(math.log2(2 * max(1, comparisons) / SIGNIFICANT))


def verdict(comparisons: Sequence[Comparison]) -> str:
    """Say in a sentence or two what the comparisons of one data set show; "" without any."""
    if not comparisons:
        return ""

    attacks, needed = max(c.attacks for c in comparisons), fewest_attacks(len(comparisons))

    # Too few attacks: no p could be small enough, so nothing is concluded.
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
