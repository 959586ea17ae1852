"""FT: fine-tuning on the trusted images, the baseline that every other defense has to beat.

Assumes: the poisoned model and a few trusted images.

All weights are trained with cross-entropy on the trusted images, augmented as in ordinary training.
Settings as in BackdoorBench's fine-tuning: SGD, learning rate 0.01, momentum 0.9, weight decay
5e-4, 100 epochs.

Departs: the cosine ends at the last epoch, BackdoorBench's at the 100th whatever --epochs says.
batch_size is at most the number of trusted images. Each epoch leaves out the images that do not
fill its last batch, others each time.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from backdoorlab import engine
from backdoorlab.cli import main
from backdoorlab.config import DefenseConfig
from backdoorlab.data import to_device
from backdoorlab.engine import Recipe
from backdoorlab.record import DefenderView
from backdoorlab.run import Run

ASSUMES = ("model", "trusted")


@dataclass(frozen=True, kw_only=True)
class Config(DefenseConfig):
    epochs: int = 100
    """Passes over the trusted images. More remove more of the backdoor, and cost clean accuracy
    where trusted images are few."""
    lr: float = 0.01
    """Learning rate at the start of the cosine."""
    batch_size: int = 128
    """Images a step, at most as many as there are trusted images."""
    momentum: float = 0.9
    """SGD's momentum."""
    weight_decay: float = 5e-4
    """L2 penalty."""

    RANGES: ClassVar[dict[str, str]] = {
        "epochs": ">= 0",
        "lr": ">= 0",
        "batch_size": ">= 1",
        "momentum": ">= 0",
        "weight_decay": ">= 0",
    }


def defend(view: DefenderView, config: Config, run: Run) -> nn.Module:
    model = view.load_model()
    recipe = Recipe(
        epochs=config.epochs,
        batch_size=min(config.batch_size, len(view.trusted)),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        augment=view.augment,
    )
    engine.train(model, to_device(view.trusted, run.device), recipe, run, stage="finetune")
    return model


if __name__ == "__main__":
    raise SystemExit(main(__file__))
