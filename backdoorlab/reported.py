"""Numbers that others have published, from resource/reported.yaml, each with its source and protocol."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from . import registry
from .config import read_yaml
from .results import Row


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
    """What a row's attack must be set to for the number to be beside it; a setting that the attack does not have counts as agreeing."""
    defense: str
    scores: Mapping[str, float]
    """Metric -> fraction."""

    def beside(self, row: Row) -> bool:
        """Whether it is about the experiment of that row. The protocols differ still: they are shown, not matched."""
        if (self.dataset, self.attack, self.defense) != (row.dataset, row.attack, row.defense):
            return False
        ours = json.loads(row.attack_settings)
        return self.poison_rate == row.poison_rate and all(str(ours.get(key, value)) == value for key, value in self.settings.items())


@lru_cache(maxsize=1)
def published() -> tuple[Reported, ...]:
    """Every number of the file."""
    found = []
    for key, entry in read_yaml(registry.resource("reported.yaml")).items():
        for dataset, rates in entry["numbers"].items():
            for rate, attacks in rates.items():
                for attack, defenses in attacks.items():
                    name, *words = attack.split()
                    settings = dict(word.split("=") for word in words)
                    for defense, percents in defenses.items():
                        scores = {metric: percent / 100 for metric, percent in zip(entry["columns"], percents, strict=False)}
                        found.append(Reported(key, entry["source"], entry["protocol"], dataset, rate, name, settings, defense, scores))
    return tuple(found)


def beside(row: Row) -> list[Reported]:
    """What was published about a row's experiment."""
    return [number for number in published() if number.beside(row)]
