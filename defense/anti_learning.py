"""Anti-learning: DAU's detection by itself, without its unlearning.

Z. Zhu, Machine Intelligence Laboratory, Harbin Institute of Technology (Shenzhen), 2025. The
method, its source and its departures are those of defense/dau.py, steps 1 to 3
(backdoorlab/poison_search/anti_learning.py).

Assumes: the poisoned training set and the model trained on it.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from backdoorlab.cli import main
from backdoorlab.config import DefenseConfig
from backdoorlab.detection import Detection
from backdoorlab.poison_search.anti_learning import AntiLearningConfig, find_poison
from backdoorlab.record import DefenderView
from backdoorlab.run import Run

ASSUMES = ("model", "train")


@dataclass(frozen=True, kw_only=True)
class Config(AntiLearningConfig, DefenseConfig):
    batch_size: int = 128
    """Images a step of `--pool isolation`; more give fewer, less noisy steps."""

    RANGES: ClassVar[dict[str, str]] = {"batch_size": ">= 1"}


def detect(view: DefenderView, config: Config, run: Run) -> Detection:
    def find() -> dict[str, Tensor]:
        flagged, _ = find_poison(view, config, config.batch_size, run)
        # Where no pool is found nothing was learned, and no sample is more suspicious than others.
        suspicion = torch.zeros(len(flagged)) if run.suspicion is None else run.suspicion
        return {"suspicion": suspicion, "flagged": flagged}

    found = run.cached("split", find)
    return Detection(found["suspicion"], found["flagged"])


if __name__ == "__main__":
    raise SystemExit(main(__file__))
