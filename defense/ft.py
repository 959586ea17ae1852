"""FT: fine-tuning on the trusted images, the baseline that every other defense has to beat.

Assumes: the poisoned model and a few trusted images.

All weights are trained with cross-entropy on the trusted images, augmented as in ordinary training.
Settings as in BackdoorBench's fine-tuning: 100 epochs in batches of 256, SGD, learning rate 0.01
falling along a cosine, momentum 0.9, weight decay 5e-4.

Departs: the cosine ends at the last epoch, BackdoorBench's at the 100th whatever --epochs says. A
last batch of a single image joins the one before, because batch normalisation needs two. A guard
undoes epochs that destroy the model (backdoorlab/guard.py).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from backdoorlab.cli import main
from backdoorlab.config import DefenseConfig
from backdoorlab.data import batches, to_device
from backdoorlab.engine import Forward
from backdoorlab.guard import GuardConfig, guarded_epochs
from backdoorlab.record import DefenderView
from backdoorlab.run import Run

ASSUMES = ("model", "trusted")


@dataclass(frozen=True, kw_only=True)
class Config(GuardConfig, DefenseConfig):
    epochs: int = 100
    """Passes over the trusted images. More remove more of the backdoor, and cost clean accuracy
    where trusted images are few."""
    lr: float = 0.01
    """Learning rate at the start of the cosine."""
    schedule_epochs: int | None = None
    """Epochs in which the cosine falls to 0; more keep the rate higher. None: all epochs."""
    batch_size: int = 256
    """Images a step; the last batch of an epoch is smaller. Smaller batches take more steps, which
    remove more of the backdoor."""
    momentum: float = 0.9
    """SGD's momentum."""
    weight_decay: float = 5e-4
    """L2 penalty."""

    RANGES: ClassVar[dict[str, str]] = {
        "epochs": ">= 0",
        "schedule_epochs": ">= 1",
        "lr": ">= 0",
        "batch_size": ">= 1",
        "momentum": ">= 0",
        "weight_decay": ">= 0",
    }


def defend(view: DefenderView, config: Config, run: Run) -> nn.Module:
    model, trusted = view.load_model(), to_device(view.trusted, run.device)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, T_max=config.schedule_epochs or max(1, config.epochs)
    )

    # The passes are captured for batches of both sizes; a last image alone joins the batch before.
    size = min(config.batch_size, len(trusted))
    steps = config.epochs * math.ceil(len(trusted) / size)
    rest = len(trusted) % size or size
    sizes = {size, size + 1 if rest == 1 < size else rest}
    forward = Forward(model.train(), run, trusted, steps, *sizes)

    for _ in guarded_epochs(
        run, "finetune", config.epochs, trusted, config, model, optimizer, schedule
    ):
        model.train()
        for batch in batches(
            trusted, size, device=run.device, generator=run.generator, augment=view.augment
        ):
            run.step(optimizer, F.cross_entropy(forward(batch.images).float(), batch.labels))
        schedule.step()
    return model


if __name__ == "__main__":
    raise SystemExit(main(__file__))
