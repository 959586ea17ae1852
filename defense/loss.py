"""Loss: lowest loss under the given model.

The simplest detector, and a baseline for the others: poison is learned early and well
(Anti-Backdoor Learning, Y. Li et al., NeurIPS 2021, https://arxiv.org/abs/2110.11571), but at the
end of a training most clean images are, too.

Assumes: the poisoned training set and the model trained on it.
"""

from dataclasses import dataclass
from typing import ClassVar

from backdoorlab.cli import main
from backdoorlab.config import DefenseConfig
from backdoorlab.data import to_device
from backdoorlab.detection import Detection, highest
from backdoorlab.features import extract
from backdoorlab.losses import cross_entropy
from backdoorlab.record import DefenderView
from backdoorlab.run import Run

ASSUMES = ("model", "train")


@dataclass(frozen=True, kw_only=True)
class Config(DefenseConfig):
    flagged_rate: float = 0.01
    """Share of the training set that is flagged; more find more of the poison, and more clean
    images. ABL's 1 %, which is no estimate of the poison rate."""

    RANGES: ClassVar[dict[str, str]] = {"flagged_rate": "(0, 1)"}


def detect(view: DefenderView, config: Config, run: Run) -> Detection:
    features = extract(view.load_model(), to_device(view.train, run.device), run)
    # What is fitted best is the most suspicious.
    suspicion = -cross_entropy(features.logits, features.labels)
    return Detection(suspicion, highest(suspicion, config.flagged_rate))


if __name__ == "__main__":
    raise SystemExit(main(__file__))
