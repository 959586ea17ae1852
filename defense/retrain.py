"""Retrain: train a new model without the split, the gold standard.

The recipe is that of ordinary training on the data set (BackdoorBench's: 100 epochs of SGD at 0.01,
cosine). A data set's file in resource/config has its own.

Assumes: the training set and a split of it (`--split`). It does not look at the poisoned model.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from backdoorlab.cli import main
from backdoorlab.config import SplitConfig
from backdoorlab.data import to_device
from backdoorlab.engine import Recipe, Schedule, train
from backdoorlab.record import DefenderView
from backdoorlab.run import Run

ASSUMES = ("train", "split")


@dataclass(frozen=True, kw_only=True)
class Config(SplitConfig):
    epochs: int = 100
    """Passes over what is kept; more fit it better and cost more time."""
    lr: float = 0.01
    """Learning rate at the start (onecycle: at its peak); higher learns faster and may diverge."""
    batch_size: int = 128
    """Images a step; more give fewer, less noisy steps in an epoch."""
    momentum: float = 0.9
    """SGD's momentum; higher averages the gradient over more steps."""
    weight_decay: float = 5e-4
    """L2 penalty; higher keeps the weights smaller."""
    schedule: Schedule = "cosine"
    """Learning-rate schedule of the training."""

    RANGES: ClassVar[dict[str, str]] = {
        "epochs": ">= 0",
        "lr": ">= 0",
        "batch_size": ">= 1",
        "momentum": ">= 0",
        "weight_decay": ">= 0",
    }


def defend(view: DefenderView, config: Config, run: Run) -> nn.Module:
    kept = view.train.subset((~view.split).nonzero().squeeze(1))
    # A fresh network: nothing of the poisoned one is kept.
    model = view.new_model()
    recipe = Recipe(
        epochs=config.epochs,
        batch_size=min(config.batch_size, len(kept)),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        schedule=config.schedule,
        augment=view.augment,
    )
    train(model, to_device(kept, run.device), recipe, run, stage="retrain")
    return model


if __name__ == "__main__":
    raise SystemExit(main(__file__))
