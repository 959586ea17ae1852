"""Groups of rows that are the same experiment with different seeds, and names for them."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..storage.schema import UNKNOWN
from .rows import PLAIN, UNDEFENDED, Metric, Row

BASELINE = "ft"
"""The defense that every other one is compared with: fine-tuning."""
IMPLANTED = 0.5
"""Mean ASR from which on an attack counts as implanted. Below it there is little to remove."""


@dataclass(frozen=True)
class Summary:
    """Mean and spread of one metric over the seeds that have it."""

    mean: float
    sd: float | None
    """Sample standard deviation (n - 1); None for one seed."""
    n: int
    """How many seeds."""


@dataclass(frozen=True)
class Group:
    """Rows of one experiment with different seeds; at least one row."""

    rows: tuple[Row, ...]
    """In the order of the seeds of attack and defense, each pair of seeds once."""

    @property
    def first(self) -> Row:
        """A row, to read what all rows share: data set, attack, defense, settings, assumptions."""
        return self.rows[0]

    @property
    def n(self) -> int:
        """How many pairs of seeds."""
        return len(self.rows)

    def score(self, metric: Metric) -> Summary | None:
        """Average a metric over seeds; None if no seed has the number."""
        # Seconds of different machines are not one quantity.
        if metric == "seconds" and len({row.device for row in self.rows}) > 1:
            return None
        return summary(getattr(row, metric) for row in self.rows)

    @cached_property
    def worst(self) -> Row:
        """The row with the lowest DER, or the lowest clean accuracy if there was no attack."""

        def rank(row: Row) -> tuple[float, float]:
            clean = math.inf if row.clean_accuracy is None else row.clean_accuracy
            return clean if row.der is None else row.der, clean

        return min(self.rows, key=rank)

    @property
    def collapsed(self) -> int:
        """For how many seeds 20 points, or half, of the clean accuracy are lost."""
        return sum(row.collapsed for row in self.rows)


@dataclass(frozen=True)
class Label:
    """Names of a group's attack and defense, with the settings by which they differ from others of
    the same name in brackets."""

    attack: str
    defense: str


# --- groups


def grouped(found: Iterable[Row]) -> list[Group]:
    """Group rows that differ in nothing but their seeds.

    Returns:
        Groups sorted by data set, attack and rate, the undefended model first. Of several rows
        with the same pair of seeds the first one is kept.
    """
    seeds: dict[tuple[Any, ...], dict[tuple[int, int], Row]] = defaultdict(dict)
    for row in found:
        pair = (row.seed, -1 if row.defense_seed is None else row.defense_seed)
        seeds[row.key].setdefault(pair, row)

    groups = [Group(tuple(members[pair] for pair in sorted(members))) for members in seeds.values()]
    return sorted(groups, key=lambda group: _order(group.first))


def summary(values: Iterable[float | int | None]) -> Summary | None:
    """Average the values that are not None; None if there are none."""
    numbers = [float(value) for value in values if value is not None]
    if not numbers:
        return None
    sd = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None
    return Summary(math.fsum(numbers) / len(numbers), sd, len(numbers))


def no_better_than_baseline(groups: Sequence[Group]) -> list[bool | None]:
    """Ask of each group whether its DER is no higher than fine-tuning's on the same records.

    Both are DER against the attacked model, averaged over the seeds that both have. The answer is
    None without a DER, for fine-tuning itself, where fine-tuning was not run, and for what is not
    ranked: a detector, and an unlearner with an oracle.
    """
    # Of several runs of fine-tuning the plain one counts. It comes first among the groups, so that
    # it is the last to be set here.
    baseline = {
        group.first.attack_key: group
        for group in reversed(groups)
        if group.first.defense == BASELINE
    }

    # Without a record in common the answer stays open.
    answers: list[bool | None] = []
    for group in groups:
        other = baseline.get(group.first.attack_key)
        nobody = group.first.defense in (BASELINE, UNDEFENDED) or not group.first.ranked
        if other is None or nobody:
            answers.append(None)
            continue
        pairs = _paired(group, other)
        answers.append(sum(a - b for a, b in pairs) <= 0 if pairs else None)
    return answers


def _paired(group: Group, other: Group) -> list[tuple[float, float]]:
    """Pair the DER of each row with the mean DER of the other group on the record of that seed."""
    theirs: dict[int, list[float]] = defaultdict(list)
    for row in other.rows:
        if row.comparable_der is not None:
            theirs[row.seed].append(row.comparable_der)

    found = [(row.comparable_der, theirs[row.seed]) for row in group.rows if row.seed in theirs]
    return [(own, math.fsum(other) / len(other)) for own, other in found if own is not None]


# --- names


def labels(groups: Sequence[Group]) -> list[Label]:
    """Name each group so that two groups of one data set and rate never have the same label."""
    rows = [group.first for group in groups]
    attacks = distinguished(
        {row.attack_key: (_attack_family(row), _attack_traits(row)) for row in rows}
    )
    defenses = distinguished(
        {row.key: (_defense_family(row), _traits(row.defense_settings)) for row in rows}
    )
    return [
        Label(_attack_name(row) + attacks[row.attack_key], row.called + defenses[row.key])
        for row in rows
    ]


def remarks(found: Iterable[Row]) -> list[str]:
    """Write one sentence for each thing that a reader of the means should know.

    These are experiments of one name that were kept apart, rows that repeat a pair of seeds, and
    attacks that were hardly implanted.
    """
    rows = list(found)
    groups = grouped(rows)
    return [*_apart(groups), *_repeats(rows, groups), *_hardly_implanted(groups)]


def _apart(groups: Sequence[Group]) -> list[str]:
    """Experiments that share a name, and the settings in which they differ."""
    families = [*_families(groups, attack=True), *_families(groups, attack=False)]
    return [
        f"{name}: {len(traits)} experiments that differ in {_listed(_differing(traits))} are kept"
        " apart, not averaged"
        for name, traits in families
    ]


def _repeats(rows: Sequence[Row], groups: Sequence[Group]) -> list[str]:
    """Rows that no group counts, as the pair of seeds is there already."""
    # A group keeps the first row of a pair of seeds.
    counted = {(row.record, row.defense, row.run) for group in groups for row in group.rows}
    said = []
    for row in rows:
        if (row.record, row.defense, row.run) in counted:
            continue
        result = f"{row.record}'s {row.defense} {row.run}".rstrip()
        what = row.record if row.defense == UNDEFENDED else result
        said.append(f"{what} repeats a seed of the same experiment, so it is not counted again")
    return said


def _hardly_implanted(groups: Sequence[Group]) -> list[str]:
    """Attacks whose models, before any defense, have an ASR below IMPLANTED."""
    # The label says which of several attacks of one name it is.
    said = []
    for group, label in zip(groups, labels(groups), strict=True):
        row, asr = group.first, group.score("asr")
        attacked = row.defense == UNDEFENDED and row.run != PLAIN
        if not attacked or asr is None or asr.mean >= IMPLANTED:
            continue
        rate = "" if row.poison_rate is None else f" ({100 * row.poison_rate:g} %)"
        said.append(
            f"{label.attack}{rate} on {row.dataset} was hardly implanted: ASR"
            f" {100 * asr.mean:.0f} % before any defense, so its DER says little"
        )
    return said


def _families(groups: Sequence[Group], attack: bool) -> list[tuple[str, list[dict[str, Any]]]]:
    """Collect the attacks, or the defenses, that share a name: (name, the traits of each)."""
    families: dict[tuple[Any, ...], dict[Any, dict[str, Any]]] = defaultdict(dict)
    names = {}

    for group in groups:
        row = group.first
        if attack:
            family, name = _attack_family(row), f"{row.attack} on {row.dataset}"
            families[family][row.attack_key] = _attack_traits(row)
        else:
            family, name = _defense_family(row), f"{row.defense} on {row.dataset}, {row.attack}"
            families[family][row.key] = _traits(row.defense_settings)
        names[family] = name

    # One member alone need not be distinguished from anything.
    return [
        (names[family], list(members.values()))
        for family, members in families.items()
        if len(members) > 1
    ]


def _attack_name(row: Row) -> str:
    """The attack; where nobody knows it, the record is named as well."""
    return f"{UNKNOWN}: {row.record}" if row.attack == UNKNOWN else row.attack


def _attack_family(row: Row) -> tuple[Any, ...]:
    """What attacks of one name have in common."""
    return (row.dataset, _attack_name(row), row.poison_rate)


def _defense_family(row: Row) -> tuple[Any, ...]:
    """What defenses of one name on the same records have in common."""
    return (*row.attack_key, row.defense, row.variant)


def _attack_traits(row: Row) -> dict[str, Any]:
    """Everything in which attacks of one name may differ."""
    traits = _traits(row.attack_settings)
    return {**traits, "data": row.fingerprint[:8], "architecture": row.architecture}


def _traits(settings: str) -> dict[str, Any]:
    return json.loads(settings) if settings else {}


def distinguished(members: Mapping[Any, tuple[Any, dict[str, Any]]]) -> dict[Any, str]:
    """Write the settings by which each member differs from the others of its family.

    Args:
        members: Key -> (family, settings). Members of one family share a name.

    Returns:
        Key -> " (position=random)" with every setting that is not the same in the whole family;
        "" for the only member of a family.
    """
    families: dict[Any, list[Any]] = defaultdict(list)
    for key, (family, _) in members.items():
        families[family].append(key)

    # A setting that all have says nothing.
    found = {}
    for keys in families.values():
        differing = _differing([members[key][1] for key in keys])
        for key in keys:
            traits = members[key][1]
            shown = ", ".join(f"{name}={_short(traits.get(name))}" for name in differing)
            found[key] = f" ({shown})" if shown else ""
    return found


def _differing(traits: Sequence[Mapping[str, Any]]) -> list[str]:
    """List the settings that are not the same in all, in alphabetical order."""
    names = sorted({name for one in traits for name in one})
    differing = [name for name in names if len({json.dumps(one.get(name)) for one in traits}) > 1]

    # The name of the architecture says nothing that is not in these.
    if {"model", "width"} & set(differing):
        differing = [name for name in differing if name != "architecture"]
    return differing


def _short(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, list) else str(value)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _order(row: Row) -> tuple[Any, ...]:
    """Sort key of a group: the control without an attack last, the undefended model first."""
    rate = -1.0 if row.poison_rate is None else row.poison_rate
    place = (
        row.dataset,
        row.attack == "none",
        row.attack,
        rate,
        row.architecture,
        row.fingerprint,
        row.attack_settings,
    )
    return (*place, row.defense != UNDEFENDED, row.defense, row.variant, row.defense_settings)
