"""D-BR: unlearn the images whose features move most, relearn those whose features move least.

Effective Backdoor Defense by Exploiting Sensitivity of Poisoned Samples. W. Chen, B. Wu, H. Wang.
NeurIPS 2022. The paper was not read; the constants are those of the authors' code,
https://github.com/SCLBD/Effective_backdoor_defense.

Assumes: the poisoned training set and the model trained on it.

  1. Split by the FCT metric (backdoorlab/consistency.py): the highest 5 % are taken for poison, the
     lowest 20 % for clean; the rest is left alone.
  2. From the poisoned model, in each epoch: a pass of ascent on the poison, then one of descent on
     the clean part.

Departs from the published code:
  - It keeps the epoch with the best test accuracy less test ASR. Here the last epoch is kept.
  - Its ascent has no end. Here a sample's ascent ends at a cross-entropy of `--ascent_cap`; None is
    as published.
  - It draws the transformation anew after it has set the thresholds, so that the shares are others.
    Here the numbers that are ranked are those that are cut.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from backdoorlab.cli import main
from backdoorlab.config import DefenseConfig
from backdoorlab.consistency import fct_suspicion
from backdoorlab.data import Split, batches, to_device
from backdoorlab.detection import highest
from backdoorlab.losses import capped, cross_entropy
from backdoorlab.record import DefenderView
from backdoorlab.run import Run

ASSUMES = ("model", "train")


@dataclass(frozen=True, kw_only=True)
class Config(DefenseConfig):
    poisoned_rate: float = 0.05
    """Share of the training set that is unlearned; more find more of the poison, and more clean
    images. It is no estimate of the poison rate."""
    clean_rate: float = 0.2
    """Share of the training set that is relearned; more keep more accuracy, and more poison."""
    train_epochs: int = 2
    """Passes of ordinary training of the network that is asked; more also teach the clean images,
    whose features then move less."""
    apart_epochs: int = 10
    """Passes that move its classes' features apart, after those."""
    train_lr: float = 0.01
    """Learning rate of both; higher learns faster and may diverge."""
    epochs: int = 20
    """Passes of unlearning and relearning; more forget more surely, and may cost accuracy."""
    lr: float = 1e-4
    """Their learning rate; higher forgets more, and costs accuracy."""
    ascent_cap: float | None = 10.0
    """Cross-entropy of a sample at which its ascent ends; higher forgets more surely, and costs
    accuracy. None never ends it."""
    batch_size: int = 128
    """Images a step of every training; more give fewer, less noisy steps."""

    RANGES: ClassVar[dict[str, str]] = {
        "poisoned_rate": "(0, 1)",
        "clean_rate": "(0, 1)",
        "train_epochs": ">= 0",
        "apart_epochs": ">= 0",
        "train_lr": ">= 0",
        "epochs": ">= 0",
        "lr": ">= 0",
        "ascent_cap": "> 0",
        "batch_size": ">= 1",
    }


def defend(view: DefenderView, config: Config, run: Run) -> nn.Module:
    images = to_device(view.train, run.device)

    # 1. The split. What moves neither most nor least is in no part.
    def measure() -> dict[str, Tensor]:
        suspicion = fct_suspicion(
            view,
            images,
            epochs=config.train_epochs,
            apart_epochs=config.apart_epochs,
            lr=config.train_lr,
            batch_size=config.batch_size,
            run=run,
        )
        return {"suspicion": suspicion}

    suspicion = run.cached("fct", measure)["suspicion"]
    poisoned = highest(suspicion, config.poisoned_rate)
    clean = highest(-suspicion, config.clean_rate) & ~poisoned
    run.report_split(poisoned, suspicion=suspicion)
    to_unlearn = images.subset(poisoned.nonzero().squeeze(1))
    to_relearn = images.subset(clean.nonzero().squeeze(1))

    # 2. Unlearn and relearn by turns.
    model = view.load_model()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=config.lr, momentum=0.9, weight_decay=5e-4, fused=True
    )
    for _ in run.epochs("unlearn", config.epochs, model=model, optimizer=optimizer):
        model.train()
        for loss in losses(model, to_unlearn, view, config, run):
            run.step(optimizer, -capped(loss, config.ascent_cap).mean())
        for loss in losses(model, to_relearn, view, config, run):
            run.step(optimizer, loss.mean())
    return model


def losses(
    model: nn.Module, part: Split, view: DefenderView, config: Config, run: Run
) -> Iterator[Tensor]:
    """Pass once over a part of the training set: cross-entropy of each image of a batch, (B,)."""
    for batch in batches(
        part,
        config.batch_size,
        device=run.device,
        generator=run.generator,
        augment=view.augment,
    ):
        with run.autocast():
            logits = model(batch.images)
        yield cross_entropy(logits.float(), batch.labels)


if __name__ == "__main__":
    raise SystemExit(main(__file__))
