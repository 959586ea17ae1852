"""ABL: isolate the images of lowest loss, train on the others, unlearn the isolated ones.

Anti-Backdoor Learning: Training Clean Models on Poisoned Data. Y. Li, X. Lyu, N. Koren, L. Lyu, B.
Li, X. Ma. NeurIPS 2021. https://arxiv.org/abs/2110.11571. Constants: the paper's 20 epochs of
isolation, gamma .5 and 1 %; those of fine-tuning and of unlearning are the authors' code's.

Assumes: the poisoned training set. A training-time defense: the model is trained from scratch.

  1. Isolate: train a new network, ascending the loss where it is low; poison, learned first, then
     has the lowest loss, and the lowest 1 % is isolated.
  2. Fine-tune that network on the rest.
  3. Unlearn: ascend the loss of what is isolated, and of nothing else.

Departs from the published code:
  - Its ascent has no end, and goes on to losses of 20 and more. Here a sample's ascent ends at a
    cross-entropy of `--ascent_cap`; None is as published.
  - Of five epochs of unlearning its first one only tests. Here all are trained.
  - The rate of fine-tuning falls by a cosine in place of steps, and no cutout is drawn.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from backdoorlab.cli import main
from backdoorlab.config import DefenseConfig
from backdoorlab.data import Split, batches, to_device
from backdoorlab.detection import highest
from backdoorlab.engine import Recipe, train
from backdoorlab.errors import UserError
from backdoorlab.losses import capped, cross_entropy
from backdoorlab.poison_search.isolation import isolate, low_loss
from backdoorlab.record import DefenderView
from backdoorlab.repair.unlearning import note_what_stays
from backdoorlab.run import Run

ASSUMES = ("train",)


@dataclass(frozen=True, kw_only=True)
class Config(DefenseConfig):
    isolated_rate: float = 0.01
    """Share of the training set that is isolated; more find more of the poison, and more clean
    images. It is no estimate of the poison rate."""
    isolation_epochs: int = 20
    """Passes of the isolation training; more also teach the clean images."""
    gamma: float = 0.5
    """Mean loss of a batch below which isolation ascends; 0 is plain cross-entropy."""
    lr: float = 0.1
    """Learning rate of isolation, and of fine-tuning at its start; higher learns faster and may
    diverge."""
    finetune_epochs: int = 60
    """Passes over the rest; more fit it better and cost more time."""
    unlearn_epochs: int = 5
    """Passes over the isolated images; more forget more surely, and may cost accuracy."""
    unlearn_lr: float = 5e-4
    """Learning rate of unlearning; higher forgets more, and costs accuracy."""
    ascent_cap: float | None = 10.0
    """Cross-entropy of a sample at which its ascent ends; higher forgets more surely, and costs
    accuracy. None never ends it."""
    batch_size: int = 64
    """Images a step; more give fewer, less noisy steps."""

    RANGES: ClassVar[dict[str, str]] = {
        "isolated_rate": "(0, 1)",
        "isolation_epochs": ">= 0",
        "gamma": ">= 0",
        "lr": ">= 0",
        "finetune_epochs": ">= 0",
        "unlearn_epochs": ">= 0",
        "unlearn_lr": ">= 0",
        "ascent_cap": "> 0",
        "batch_size": ">= 1",
    }


def defend(view: DefenderView, config: Config, run: Run) -> nn.Module:
    images = to_device(view.train, run.device)

    # 1. Isolate what has the lowest loss.
    epochs, size = config.isolation_epochs, min(config.batch_size, len(images))
    model = isolate(view, images, epochs, size, config.lr, config.gamma, run)
    suspicion = low_loss(model, images, run)
    isolated = highest(suspicion, config.isolated_rate)
    if int(isolated.sum()) < 2:
        raise UserError(
            f"--isolated_rate {config.isolated_rate:g} isolates one of {len(images)} images, which"
            " has no batch statistics: give a higher one"
        )
    run.report_split(isolated, suspicion=suspicion)

    # 2. Fine-tune on the rest, poison that was not isolated included.
    rest = images.subset((~isolated).nonzero().squeeze(1))
    recipe = Recipe(
        epochs=config.finetune_epochs,
        batch_size=min(config.batch_size, len(rest)),
        lr=config.lr,
        nesterov=True,
        weight_decay=1e-4,
        augment=view.augment,
    )
    train(model, rest, recipe, run, stage="finetune")

    # 3. Unlearn what is isolated.
    unlearn(model, images.subset(isolated.nonzero().squeeze(1)), config, run)
    note_what_stays(model, images, isolated, run)
    return model


def unlearn(model: nn.Module, isolated: Split, config: Config, run: Run) -> None:
    """Ascend the loss of the isolated images in place, each up to the cap."""
    optimizer = torch.optim.SGD(
        model.parameters(), lr=config.unlearn_lr, momentum=0.9, weight_decay=1e-4, nesterov=True
    )
    for _ in run.epochs("unlearn", config.unlearn_epochs, model=model, optimizer=optimizer):
        # In training mode, as published: where the model is sure the loss has no slope, and batch
        # statistics of the isolated images alone unsettle it (docs/methods/training_time.md).
        model.train()
        for batch in batches(
            isolated, config.batch_size, device=run.device, generator=run.generator
        ):
            with run.autocast():
                logits = model(batch.images)
            loss = cross_entropy(logits.float(), batch.labels)
            run.step(optimizer, -capped(loss, config.ascent_cap).mean())


if __name__ == "__main__":
    raise SystemExit(main(__file__))
