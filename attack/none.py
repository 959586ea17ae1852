"""No attack: ordinary training on the clean data, the control.

Every table of defenses needs it: a defense that makes this model worse harms users who were never
attacked.

`--suspicious True` trains on data that others may have poisoned. Images that a defense flags there
are not counted as mistakes, because the truth is unknown.
"""

from dataclasses import dataclass

from backdoorlab.cli import main
from backdoorlab.config import TrainingConfig
from backdoorlab.data import Dataset
from backdoorlab.poison import no_poison
from backdoorlab.poisoning import Outcome, poison_and_train
from backdoorlab.run import Run


@dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig):
    suspicious: bool = False
    """The data may be poisoned already: do not count flagged images as mistakes of a defense."""


def attack(dataset: Dataset, config: Config, run: Run) -> Outcome:
    """Train on the data as it is. Without triggered images there is no ASR."""
    return poison_and_train(dataset, config, run, no_poison(dataset.train), no_poison(dataset.test))


if __name__ == "__main__":
    raise SystemExit(main(__file__))
