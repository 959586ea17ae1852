"""Finetune kept: go on training without the split.

Catastrophic forgetting, the simplest unlearning: what is no longer shown is forgotten in time. The
rate is that of fine-tuning in BackdoorBench.

Assumes: the poisoned model, its training set and a split of it (`--split`).
"""

from dataclasses import dataclass

from torch import nn

from backdoorlab.cli import main
from backdoorlab.config import SplitConfig
from backdoorlab.record import DefenderView
from backdoorlab.repair.unlearning import UnlearningConfig, note_what_stays, plain_loss, train_on
from backdoorlab.run import Run

ASSUMES = ("model", "train", "split")


@dataclass(frozen=True, kw_only=True)
class Config(UnlearningConfig, SplitConfig):
    lr: float = 0.01
    """Learning rate; higher forgets more, and costs accuracy."""


def defend(view: DefenderView, config: Config, run: Run) -> nn.Module:
    # The split is never shown again.
    kept, model = (~view.split).nonzero().squeeze(1), view.load_model()
    train_on(
        "finetune",
        config.epochs,
        model,
        view.train,
        kept,
        view.split,
        plain_loss,
        view,
        config,
        run,
    )
    note_what_stays(model, view.train, view.split, run)
    return model


if __name__ == "__main__":
    raise SystemExit(main(__file__))
