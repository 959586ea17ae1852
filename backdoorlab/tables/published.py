"""Numbers that others have published, each with its source and protocol, from
resource/reported.yaml."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..errors import UserError
from ..settings import methods, resources
from ..settings.parse import read_yaml
from .rows import Row

PROTOCOL = ("epochs", "steps", "width", "lr", "batch_size", "bb_compat")
"""Endings of the names of settings that belong to a protocol: how long and how large something is
trained, and which quirks of published code are kept."""


@dataclass(frozen=True)
class Reported:
    """The published scores of one defense on one attack."""

    key: str
    """Short name of the source."""
    source: str
    protocol: str
    dataset: str
    poison_rate: float
    attack: str
    settings: Mapping[str, str]
    """Settings of the attack that are not our defaults. A row's attack must have the same ones,
    unless it has no such setting."""
    defense: str
    scores: Mapping[str, float]
    """Metric -> fraction in [0, 1]."""

    def beside(self, row: Row) -> bool:
        """Ask whether this is the experiment of a row: data set, rate, attack and defense.

        The protocols may differ; they are shown beside the number, not compared.
        """
        if (self.dataset, self.attack, self.defense) != (row.dataset, row.attack, row.defense):
            return False

        # Settings are compared as text, as those in the file are text.
        ours = json.loads(row.attack_settings)
        theirs = {**_usual_settings(row.attack), **self.settings}
        return self.poison_rate == row.poison_rate and all(
            str(ours.get(key, value)) == str(value) for key, value in theirs.items()
        )


@lru_cache(maxsize=64)
def _usual_settings(attack: str) -> dict[str, Any]:
    """The defaults of an attack's label mode and own settings, as JSON would read them back.

    Settings of the protocol are left out. {} for an attack that is not known here.
    """
    try:
        config_class = methods.load("attack", attack).config_class
    except UserError:
        return {}

    # A field of a base class is one that all attacks have.
    inherited = {
        field.name
        for base in config_class.__mro__[1:]
        if dataclasses.is_dataclass(base)
        for field in dataclasses.fields(base)
    }
    named = {field.name: field.default for field in dataclasses.fields(config_class)}
    own = {
        name: default
        for name, default in named.items()
        if name == "label_mode" or not (name in inherited or name.endswith(PROTOCOL))
    }

    # A tuple comes back from JSON as a list.
    return dict(json.loads(json.dumps(own)))


@lru_cache(maxsize=1)
def published() -> tuple[Reported, ...]:
    """Read every number of the file."""
    # A number is found below its data set, poison rate and attack.
    found: list[Reported] = []
    for key, entry in read_yaml(resources.resource("reported.yaml")).items():
        for dataset, rates in entry["numbers"].items():
            for rate, attacks in rates.items():
                for attack, defenses in attacks.items():
                    cells = _cells(entry, attack, defenses)
                    found += [
                        Reported(key=key, dataset=dataset, poison_rate=rate, **cell)
                        for cell in cells
                    ]
    return tuple(found)


def _cells(
    entry: Mapping[str, Any], attack: str, defenses: Mapping[str, Sequence[float]]
) -> Iterator[dict[str, Any]]:
    """Yield what the file says of each defense on one attack.

    Args:
        entry: A source: its name, its protocol and its columns.
        attack: Name of the attack, followed by settings as in "badnet position=corner".
        defenses: Percents by defense, in the order of the source's columns.
    """
    name, *words = attack.split()

    for defense, percents in defenses.items():
        # A source may have no number for its last columns.
        columns = zip(entry["columns"], percents, strict=False)
        yield {
            "source": entry["source"],
            "protocol": entry["protocol"],
            "attack": name,
            "settings": dict(word.split("=") for word in words),
            "defense": defense,
            "scores": {metric: percent / 100 for metric, percent in columns},
        }


def beside(row: Row) -> list[Reported]:
    """List what was published about the experiment of a row."""
    return [number for number in published() if number.beside(row)]
