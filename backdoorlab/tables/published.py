"""Numbers that others have published, from resource/reported.yaml, each with its source and
protocol."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..errors import UserError
from ..settings import methods, resources
from ..settings.parse import read_yaml
from .rows import Row

PROTOCOL = ("epochs", "steps", "width", "lr", "batch_size", "bb_compat")
"""Ends of the names of settings that are part of a protocol: how long and how large something is
trained, and which quirks are kept."""


@dataclass(frozen=True)
class Reported:
    """One published cell. Scores are fractions, as in a Row."""

    key: str
    """Short name of the source."""
    source: str
    protocol: str
    dataset: str
    poison_rate: float
    attack: str
    settings: Mapping[str, str]
    """What a row's attack must be set to for the number to be beside it, where that is not the
    default; one that it does not have agrees."""
    defense: str
    scores: Mapping[str, float]
    """Metric -> fraction."""

    def beside(self, row: Row) -> bool:
        """Whether it is about the experiment of that row. The protocols differ still: they are
        shown, not matched."""
        if (self.dataset, self.attack, self.defense) != (row.dataset, row.attack, row.defense):
            return False
        ours = json.loads(row.attack_settings)
        theirs = {**_usual_settings(row.attack), **self.settings}
        return self.poison_rate == row.poison_rate and all(
            str(ours.get(key, value)) == str(value) for key, value in theirs.items()
        )


@lru_cache(maxsize=64)
def _usual_settings(attack: str) -> dict[str, Any]:
    """Label mode and the attack's own settings at their defaults, as a record's JSON has them; {}
    for an attack that is not here."""
    try:
        config_class = methods.load("attack", attack).config_class
    except UserError:
        return {}
    inherited = {
        field.name
        for base in config_class.__mro__[1:]
        if dataclasses.is_dataclass(base)
        for field in dataclasses.fields(base)
    }
    own = {
        field.name: field.default
        for field in dataclasses.fields(config_class)
        if field.name == "label_mode"
        or (field.name not in inherited and not field.name.endswith(PROTOCOL))
    }
    return dict(json.loads(json.dumps(own)))


@lru_cache(maxsize=1)
def published() -> tuple[Reported, ...]:
    """Every number of the file."""
    found = []
    for key, entry in read_yaml(resources.resource("reported.yaml")).items():
        for dataset, rates in entry["numbers"].items():
            for rate, attacks in rates.items():
                for attack, defenses in attacks.items():
                    name, *words = attack.split()
                    settings = dict(word.split("=") for word in words)
                    for defense, percents in defenses.items():
                        scores = {
                            metric: percent / 100
                            for metric, percent in zip(entry["columns"], percents, strict=False)
                        }
                        found.append(
                            Reported(
                                key,
                                entry["source"],
                                entry["protocol"],
                                dataset,
                                rate,
                                name,
                                settings,
                                defense,
                                scores,
                            )
                        )
    return tuple(found)


def beside(row: Row) -> list[Reported]:
    """What was published about a row's experiment."""
    return [number for number in published() if number.beside(row)]
