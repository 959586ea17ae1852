"""SCRUB: lead the model away from itself on the split, and keep it near itself on the rest.

Towards Unbounded Machine Unlearning, M. Kurmanji et al., NeurIPS 2023,
https://arxiv.org/abs/2302.09880. Epochs of maximising the KL divergence from the poisoned model on
the split alternate with epochs of minimising it, together with cross-entropy, on the rest. The
constants are those of the authors' experiments on a small CIFAR, as copies of their code state them
(the copies differ: gamma .99 and alpha .001 are their other pair).

Assumes: the poisoned model, its training set and a split of it (`--split`).

Departs: no rewinding, and no average of earlier weights. Batches of both sets have one size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from backdoorlab.cli import main
from backdoorlab.config import SplitConfig
from backdoorlab.data import NO_AUGMENT, Batch, Split, batches, to_device
from backdoorlab.losses import cross_entropy, divergence
from backdoorlab.record import DefenderView
from backdoorlab.repair.unlearning import note_what_stays
from backdoorlab.run import Run

ASSUMES = ("model", "train", "split")
Loss = Callable[[Batch, Tensor, Tensor], Tensor]
"""A batch, its logits and the teacher's, float (B, K) each -> ()."""


@dataclass(frozen=True, kw_only=True)
class Config(SplitConfig):
    epochs: int = 10
    """Passes over the rest; more restore more accuracy."""
    max_epochs: int = 3
    """msteps: the first epochs, which begin with a pass of maximising on the split; more forget
    more, and cost accuracy."""
    alpha: float = 0.5
    """Weight of the KL divergence on the rest; higher keeps more of the model as it was."""
    gamma: float = 1.0
    """Weight of the cross-entropy on the rest; higher keeps more accuracy."""
    temperature: float = 4.0
    """Of the KL divergence; higher counts unlikely classes more."""
    lr: float = 5e-4
    """Learning rate; higher forgets more, and costs accuracy."""
    decay_epochs: tuple[int, ...] = (3, 5, 9)
    """Epochs after which the learning rate falls to a tenth; later ones forget more."""
    momentum: float = 0.9
    """SGD's momentum; higher averages the gradient over more steps."""
    weight_decay: float = 5e-4
    """L2 penalty; higher keeps the weights smaller."""
    batch_size: int = 128
    """Images a step; more take fewer steps, which forget less."""
    augment: bool = True
    """Crop and flip images as in ordinary training."""

    RANGES: ClassVar[dict[str, str]] = {
        "epochs": ">= 0",
        "max_epochs": ">= 0",
        "alpha": ">= 0",
        "gamma": ">= 0",
        "temperature": "> 0",
        "lr": ">= 0",
        "decay_epochs": ">= 1",
        "momentum": ">= 0",
        "weight_decay": ">= 0",
        "batch_size": ">= 1",
    }


def defend(view: DefenderView, config: Config, run: Run) -> nn.Module:
    model, teacher = view.load_model(), view.load_model().eval()
    forget, kept = (
        to_device(view.train.subset(part.nonzero().squeeze(1)), run.device)
        for part in (view.split, ~view.split)
    )
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=True,
    )
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(config.decay_epochs))

    def away(batch: Batch, logits: Tensor, taught: Tensor) -> Tensor:
        # The max-step: away from the teacher.
        return -divergence(logits, taught, config.temperature).mean()

    def near(batch: Batch, logits: Tensor, taught: Tensor) -> Tensor:
        # The min-step: gamma CE + alpha KL.
        kept = config.gamma * cross_entropy(logits, batch.labels)
        return (kept + config.alpha * divergence(logits, taught, config.temperature)).mean()

    def one_pass(split: Split, loss: Loss) -> None:
        # One image alone has no batch statistics.
        model.train(len(split) > 1)
        for batch in batches(
            split,
            config.batch_size,
            device=run.device,
            generator=run.generator,
            augment=view.augment if config.augment else NO_AUGMENT,
        ):
            with run.autocast():
                logits = model(batch.images).float()
                with torch.no_grad():
                    # The teacher is the model as it came, in both kinds of pass.
                    taught = teacher(batch.images).float()
            run.step(optimizer, loss(batch, logits, taught))

    for epoch in run.epochs(
        "scrub", config.epochs, model=model, optimizer=optimizer, scheduler=scheduler
    ):
        # Max-steps on the split in the first epochs, min-steps on the rest in all of them.
        if epoch < config.max_epochs:
            one_pass(forget, away)
        one_pass(kept, near)
        scheduler.step()
    note_what_stays(model, view.train, view.split, run)
    return model


if __name__ == "__main__":
    raise SystemExit(main(__file__))
