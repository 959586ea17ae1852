"""The same experiment over seeds, and what to call it."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .rows import PLAIN, UNDEFENDED, Metric, Row

BASELINE = "ft"
"""The defense that every other one has to beat."""
IMPLANTED = 0.5
"""Mean ASR from which on an attack counts as implanted; below it there is little to defend."""


@dataclass(frozen=True)
class Summary:
    """One metric over the seeds that have it."""

    mean: float
    sd: float | None
    """Sample standard deviation; None for one seed."""
    n: int


@dataclass(frozen=True)
class Group:
    """The same experiment with different seeds. Never empty."""

    rows: tuple[Row, ...]
    """In the order of their seeds, each pair of seeds once."""

    @property
    def first(self) -> Row:
        """Any row, for what all of them share: record settings, data set, attack, defense,
        assumes."""
        return self.rows[0]

    @property
    def n(self) -> int:
        return len(self.rows)

    def score(self, metric: Metric) -> Summary | None:
        """None where no seed has the number, and for seconds of different devices, which nobody
        should average."""
        if metric == "seconds" and len({row.device for row in self.rows}) > 1:
            return None
        return summary(getattr(row, metric) for row in self.rows)

    @cached_property
    def worst(self) -> Row:
        """The seed with the lowest DER, or the lowest clean accuracy where there was no attack: one
        model's numbers, not a mixture."""

        def rank(row: Row) -> tuple[float, float]:
            clean = math.inf if row.clean_accuracy is None else row.clean_accuracy
            return clean if row.der is None else row.der, clean

        return min(self.rows, key=rank)

    @property
    def collapsed(self) -> int:
        """How many seeds lost 20 points of clean accuracy, or half of it."""
        return sum(row.collapsed for row in self.rows)


@dataclass(frozen=True)
class Label:
    """What a table calls a group: the attack and the defense, with whatever tells them from others
    of the same name in brackets."""

    attack: str
    defense: str


# --- groups


def grouped(found: Iterable[Row]) -> list[Group]:
    """Groups by data set, attack and rate, the undefended first in each. A pair of seeds that is
    there twice is counted once."""
    seeds: dict[tuple[Any, ...], dict[tuple[int, int], Row]] = defaultdict(dict)
    for row in found:
        seeds[row.key].setdefault(
            (row.seed, -1 if row.defense_seed is None else row.defense_seed), row
        )
    groups = [Group(tuple(members[pair] for pair in sorted(members))) for members in seeds.values()]
    return sorted(groups, key=lambda group: _order(group.first))


def summary(values: Iterable[float | int | None]) -> Summary | None:
    """Mean and sample standard deviation of the numbers among the values; None without any."""
    numbers = [float(value) for value in values if value is not None]
    if not numbers:
        return None
    sd = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None
    return Summary(math.fsum(numbers) / len(numbers), sd, len(numbers))


def no_better_than_baseline(groups: Sequence[Group]) -> list[bool | None]:
    """For each group: is its DER, over the seeds that both have, no higher than fine-tuning's on
    the same records, both against the attacked model?

    None where there is no DER, for fine-tuning itself, and where it was not run.
    """
    # A plain run of the baseline speaks for it, where there are several.
    baseline = {
        group.first.attack_key: group
        for group in reversed(groups)
        if group.first.defense == BASELINE
    }
    answers: list[bool | None] = []
    for group in groups:
        other = baseline.get(group.first.attack_key)
        pairs = (
            []
            if other is None or group.first.defense in (BASELINE, UNDEFENDED)
            else _paired(group, other)
        )
        answers.append(sum(a - b for a, b in pairs) <= 0 if pairs else None)
    return answers


def _paired(group: Group, other: Group) -> list[tuple[float, float]]:
    """Comparable DER of both on the records of the same seed."""
    theirs: dict[int, list[float]] = defaultdict(list)
    for row in other.rows:
        if row.comparable_der is not None:
            theirs[row.seed].append(row.comparable_der)
    found = [(row.comparable_der, theirs[row.seed]) for row in group.rows if row.seed in theirs]
    return [(own, math.fsum(other) / len(other)) for own, other in found if own is not None]


# --- names


def labels(groups: Sequence[Group]) -> list[Label]:
    """One for each group. Two groups of one data set and rate never have the same label."""
    attacks = told_apart(
        {
            group.first.attack_key: (_attack_family(group.first), _attack_traits(group.first))
            for group in groups
        }
    )
    defenses = told_apart(
        {
            group.first.key: (
                (*group.first.attack_key, group.first.defense, group.first.variant),
                _traits(group.first.defense_settings),
            )
            for group in groups
        }
    )
    found = []
    for group in groups:
        row = group.first
        found.append(Label(row.attack + attacks[row.attack_key], row.called + defenses[row.key]))
    return found


def remarks(found: Iterable[Row]) -> list[str]:
    """What a reader should know about the means: experiments of one name that were kept apart,
    repeats, attacks that did not take."""
    everything = list(found)
    groups = grouped(everything)
    said = []
    for name, traits in (*_families(groups, attack=True), *_families(groups, attack=False)):
        said.append(
            f"{name}: {len(traits)} experiments that differ in {_listed(_differing(traits))} are"
            " kept apart, not averaged"
        )
    counted = {(row.record, row.defense, row.run) for group in groups for row in group.rows}
    repeats = [row for row in everything if (row.record, row.defense, row.run) not in counted]
    for row in repeats:
        what = (
            f"{row.record}'s {row.defense} {row.run}".rstrip()
            if row.defense != UNDEFENDED
            else row.record
        )
        said.append(f"{what} repeats a seed of the same experiment, so it is not counted again")
    for group, label in zip(groups, labels(groups), strict=True):
        asr = group.score("asr")
        if (
            group.first.defense == UNDEFENDED
            and group.first.run != PLAIN
            and asr is not None
            and asr.mean < IMPLANTED
        ):
            rate = group.first.poison_rate
            where = (
                f"{label.attack}{'' if rate is None else f' ({100 * rate:g} %)'} on"
                f" {group.first.dataset}"
            )
            said.append(
                f"{where} hardly took: ASR {100 * asr.mean:.0f} % before any defense, so its DER"
                " says little"
            )
    return said


def _families(groups: Sequence[Group], attack: bool) -> list[tuple[str, list[dict[str, Any]]]]:
    """Groups that share a name -> the traits of each."""
    families: dict[tuple[Any, ...], dict[Any, dict[str, Any]]] = defaultdict(dict)
    names = {}
    for group in groups:
        row = group.first
        if attack:
            family, key, traits, name = (
                _attack_family(row),
                row.attack_key,
                _attack_traits(row),
                f"{row.attack} on {row.dataset}",
            )
        else:
            family, key, traits = (
                (*row.attack_key, row.defense, row.variant),
                row.key,
                _traits(row.defense_settings),
            )
            name = f"{row.defense} on {row.dataset}, {row.attack}"
        families[family][key] = traits
        names[family] = name
    return [
        (names[family], list(members.values()))
        for family, members in families.items()
        if len(members) > 1
    ]


def _attack_family(row: Row) -> tuple[Any, ...]:
    return (row.dataset, row.attack, row.poison_rate)


def _attack_traits(row: Row) -> dict[str, Any]:
    return {
        **_traits(row.attack_settings),
        "data": row.fingerprint[:8],
        "architecture": row.architecture,
    }


def _traits(settings: str) -> dict[str, Any]:
    return json.loads(settings) if settings else {}


def told_apart(members: Mapping[Any, tuple[Any, dict[str, Any]]]) -> dict[Any, str]:
    """key -> (family, traits), to key -> " (position=random)" with what differs within the key's
    family, "" where it is alone."""
    families: dict[Any, list[Any]] = defaultdict(list)
    for key, (family, _) in members.items():
        families[family].append(key)
    found = {}
    for keys in families.values():
        differing = _differing([members[key][1] for key in keys])
        for key in keys:
            traits = members[key][1]
            shown = ", ".join(f"{name}={_short(traits.get(name))}" for name in differing)
            found[key] = f" ({shown})" if shown else ""
    return found


def _differing(traits: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names that do not have the same value in all; what another one says already (a width is in
    the architecture) is left out."""
    names = sorted({name for one in traits for name in one})
    differing = [name for name in names if len({json.dumps(one.get(name)) for one in traits}) > 1]
    if {"model", "width"} & set(differing):
        differing = [name for name in differing if name != "architecture"]
    return differing


def _short(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, list) else str(value)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _order(row: Row) -> tuple[Any, ...]:
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
