"""No attack: ordinary training on the clean data, the control that every table of defenses needs.

A defense that changes this model for the worse would harm everybody who was never attacked.

With `--suspicious True`, training on data that may have been poisoned by others: what a defense
flags there is not counted as a mistake, because nobody knows.
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
    """The data may be poisoned already: nothing is known about what a defense flags."""


def attack(dataset: Dataset, config: Config, run: Run) -> Outcome:
    """Train on the data as it is; there is no triggered image, so no ASR."""
    return poison_and_train(dataset, config, run, no_poison(dataset.train), no_poison(dataset.test))


if __name__ == "__main__":
    raise SystemExit(main(__file__))
