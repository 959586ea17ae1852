"""Isolation: ABL's first stage by itself, which flags the images of lowest loss after a training
that ascends where the loss is low.

Anti-Backdoor Learning, Y. Li et al., NeurIPS 2021, https://arxiv.org/abs/2110.11571. Constants: the
paper's 20 epochs, gamma .5 and 1 % (the authors' code: 10 epochs).

Assumes: the poisoned training set. It trains a model of its own.

Departs: images are cropped and flipped as in ordinary training, the loss is read without that.
"""

from dataclasses import dataclass
from typing import ClassVar

from backdoorlab.cli import main
from backdoorlab.config import DefenseConfig
from backdoorlab.data import to_device
from backdoorlab.detection import Detection, highest
from backdoorlab.poison_search.isolation import isolate, low_loss
from backdoorlab.record import DefenderView
from backdoorlab.run import Run

ASSUMES = ("train",)


@dataclass(frozen=True, kw_only=True)
class Config(DefenseConfig):
    flagged_rate: float = 0.01
    """Share of the training set that is flagged; more find more of the poison, and more clean
    images. It is no estimate of the poison rate."""
    epochs: int = 20
    """Passes of the isolation training; more also teach the clean images."""
    gamma: float = 0.5
    """Mean loss of a batch below which isolation ascends; 0 is plain cross-entropy."""
    lr: float = 0.1
    """Learning rate; higher learns faster and may diverge."""
    batch_size: int = 128
    """Images a step; more give fewer, less noisy steps."""

    RANGES: ClassVar[dict[str, str]] = {
        "flagged_rate": "(0, 1)",
        "epochs": ">= 0",
        "gamma": ">= 0",
        "lr": ">= 0",
        "batch_size": ">= 1",
    }


def detect(view: DefenderView, config: Config, run: Run) -> Detection:
    train = to_device(view.train, run.device)
    model = isolate(view, train, config.epochs, config.batch_size, config.lr, config.gamma, run)

    # Poison is learned first, so that the lowest loss is the most suspicious.
    suspicion = low_loss(model, train, run)
    return Detection(suspicion, highest(suspicion, config.flagged_rate))


if __name__ == "__main__":
    raise SystemExit(main(__file__))
