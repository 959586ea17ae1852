"""FCT: features that move far when images turn.

Effective Backdoor Defense by Exploiting Sensitivity of Poisoned Samples, W. Chen et al., NeurIPS
2022, https://openreview.net/forum?id=AsH-Tx2U0Ug: the metric by which D-BR and D-ST tell images
apart (backdoorlab/consistency.py). A new model is trained for two epochs without
augmentation, when it knows poison already, and then for ten by a loss that pushes the labels'
centres apart. The metric is the mean squared difference of the last features between an image and
its copy, which is turned by any angle and moved by up to a fifth of its sides. The highest 5 % are
flagged. Constants are those of the authors' code.

Assumes: the poisoned training set. It trains a model of its own.
"""

from dataclasses import dataclass
from typing import ClassVar

from backdoorlab.cli import main
from backdoorlab.config import DefenseConfig
from backdoorlab.consistency import fct_suspicion
from backdoorlab.data import to_device
from backdoorlab.detection import Detection, highest
from backdoorlab.record import DefenderView
from backdoorlab.run import Run

ASSUMES = ("train",)


@dataclass(frozen=True, kw_only=True)
class Config(DefenseConfig):
    flagged_rate: float = 0.05
    """Share of the training set that is flagged; more find more of the poison, and more clean
    images. It is no estimate of the poison rate."""
    epochs: int = 2
    """Passes of ordinary training; more also teach the clean images, which then move less."""
    apart_epochs: int = 10
    """Passes that push the labels' centres apart; more part the poison from the images of its
    label."""
    lr: float = 0.01
    """Learning rate of both; higher learns faster and may diverge."""
    batch_size: int = 128
    """Images a step; more give fewer, less noisy steps."""

    RANGES: ClassVar[dict[str, str]] = {
        "flagged_rate": "(0, 1)",
        "epochs": ">= 0",
        "apart_epochs": ">= 0",
        "lr": ">= 0",
        "batch_size": ">= 2",
    }


def detect(view: DefenderView, config: Config, run: Run) -> Detection:
    images = to_device(view.train, run.device)
    suspicion = fct_suspicion(
        view,
        images,
        epochs=config.epochs,
        apart_epochs=config.apart_epochs,
        lr=config.lr,
        batch_size=config.batch_size,
        run=run,
    )
    return Detection(suspicion, highest(suspicion, config.flagged_rate))


if __name__ == "__main__":
    raise SystemExit(main(__file__))
