"""FT: fine-tuning on the trusted images, the baseline that every other defense has to beat.

Assumes: the poisoned model and a few trusted images.

All weights are trained with cross-entropy on the trusted images, augmented as in ordinary training.
Settings as in BackdoorBench's fine-tuning: 100 epochs in batches of 256, SGD, learning rate 0.01
falling along a cosine, momentum 0.9, weight decay 5e-4.

Departs: the cosine ends at the last epoch, BackdoorBench's at the 100th whatever --epochs says. A
last batch of a single image joins the one before, because batch normalisation needs two. A guard
undoes epochs that destroy the model (backdoorlab/repair/guard.py).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from backdoorlab.cli import main
from backdoorlab.config import DefenseConfig
from backdoorlab.data import to_device
from backdoorlab.record import DefenderView
from backdoorlab.repair.finetuning import FinetuneConfig, finetune
from backdoorlab.run import Run

ASSUMES = ("model", "trusted")


@dataclass(frozen=True, kw_only=True)
class Config(FinetuneConfig, DefenseConfig):
    schedule_epochs: int | None = None
    """Epochs in which the cosine falls to 0; more keep the rate higher. None: all epochs."""

    RANGES: ClassVar[dict[str, str]] = {"schedule_epochs": ">= 1"}


def defend(view: DefenderView, config: Config, run: Run) -> nn.Module:
    model, trusted = view.load_model(), to_device(view.trusted, run.device)
    # A cosine of more epochs than are run ends above 0, as BackdoorBench's may.
    return finetune(model, trusted, view, config, run, schedule_epochs=config.schedule_epochs)


if __name__ == "__main__":
    raise SystemExit(main(__file__))
