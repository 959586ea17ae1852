"""Spectral: far along a label's main direction.

Spectral Signatures in Backdoor Attacks, B. Tran et al., NeurIPS 2018,
https://arxiv.org/abs/1811.00636. 1.5 times the poison rate is flagged, as in the paper.

Assumes: the poisoned training set and the model trained on it.

Departs: nobody knows the poison rate, so it is assumed to be a tenth of each label, whatever it is
(backdoor-toolbox passes the true rate; BackdoorBench flags 15 % of each label). At most half of a
label is flagged.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from backdoorlab.cli import main
from backdoorlab.config import DefenseConfig
from backdoorlab.data import to_device
from backdoorlab.detection import Detection, assumed_share, by_label, highest
from backdoorlab.features import extract
from backdoorlab.groups.splitting import main_directions
from backdoorlab.record import DefenderView
from backdoorlab.run import Run

ASSUMES = ("model", "train")


@dataclass(frozen=True, kw_only=True)
class Config(DefenseConfig):
    assumed_rate: float = 0.1
    """Share of each label that is taken to be poison. It is a guess: the true rate is unknown to a
    defender. More find more of the poison, and more clean images."""
    factor: float = 1.5
    """What is flagged, as a multiple of what is taken to be poison."""

    RANGES: ClassVar[dict[str, str]] = {"assumed_rate": "(0, 1]", "factor": "> 0"}


def detect(view: DefenderView, config: Config, run: Run) -> Detection:
    features = extract(view.load_model(), to_device(view.train, run.device), run)
    suspicion = torch.zeros(len(features.labels), device=run.device)
    flagged = torch.zeros_like(suspicion, dtype=torch.bool)

    for _, members in by_label(features.labels, view.num_classes):
        scores = outlyingness(features.pooled[members])
        suspicion[members] = scores.float()
        # In every label, because nobody knows which one is the target.
        flagged[members] = highest(scores, assumed_share(config.assumed_rate, config.factor))
    return Detection(suspicion, flagged)


def outlyingness(x: Tensor) -> Tensor:
    """Squared coordinate of centred features along their first right singular vector:
    (n, D) -> float64 (n,)."""
    # Centred, as in the paper; BackdoorBench's features are not.
    centred = (x.double() - x.double().mean(0)).T
    return (main_directions(centred, 1) @ centred).squeeze(0).square()


if __name__ == "__main__":
    raise SystemExit(main(__file__))
