"""Train a model on two parts of a training set: one to learn, and one to unlearn."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..data import NO_AUGMENT, Split, batches, to_device
from ..engine import Forward
from ..features import adapted, predictions
from ..losses import cross_entropy
from ..models import paused
from ..record import DefenderView
from ..run import Run

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Logits (B, K), labels int64 (B,) and which of them to unlearn, bool (B,) -> ()."""
STAYED = 0.5
"""Share of flagged samples that keep their label after unlearning, above which a note says so."""


@dataclass(frozen=True, kw_only=True)
class UnlearningConfig:
    """Settings of unlearning by SGD. A method inherits these fields, which makes them its flags."""

    epochs: int = 20
    """Passes of unlearning."""
    lr: float = 1e-4
    """Learning rate of unlearning."""
    lr_decay: bool = False
    """Let it fall linearly to 0: with a large constant rate the result depends on the last step."""
    momentum: float = 0.9
    """SGD's momentum in unlearning."""
    weight_decay: float = 5e-4
    """L2 penalty in unlearning."""
    batch_size: int = 128
    """Images a step of every training of the method."""
    augment: bool = True
    """Crop and flip images as in ordinary training."""

    RANGES: ClassVar[dict[str, str]] = {
        "epochs": ">= 0",
        "lr": ">= 0",
        "momentum": ">= 0",
        "weight_decay": ">= 0",
        "batch_size": ">= 1",
    }


def train_on(
    stage: str,
    epochs: int,
    model: nn.Module,
    train: Split,
    index: Tensor,
    poisoned: Tensor,
    loss: Loss,
    view: DefenderView,
    config: UnlearningConfig,
    run: Run,
) -> nn.Module:
    """Train a model in place: unlearn the poisoned samples, learn the others.

    Args:
        index: int64 (M,), which of the N samples of `train` to train on.
        poisoned: bool (N,), which to unlearn.
        loss: of a batch.
    """
    train, poisoned = to_device(train, run.device), poisoned.to(run.device)
    steps = epochs * math.ceil(len(index) / config.batch_size)
    optimizer, scheduler = descent(model, steps, config)
    augment = view.augment if config.augment else NO_AUGMENT

    forward = Forward(model.train(), run, train, steps, config.batch_size)
    for _ in run.epochs(stage, epochs, model=model, optimizer=optimizer, scheduler=scheduler):
        model.train()
        # The chosen samples only, in a new order each epoch.
        order = index[torch.randperm(len(index), generator=run.generator)]
        for batch in batches(
            train,
            config.batch_size,
            device=run.device,
            generator=run.generator,
            augment=augment,
            order=order,
        ):
            logits, unlearned = forward(batch.images).float(), poisoned[batch.index]
            # Both parts are in one batch, and the loss tells them apart.
            run.step(optimizer, loss(logits, batch.labels, unlearned))
            scheduler.step()
    return model


def descent(
    model: nn.Module, steps: int, config: UnlearningConfig
) -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.LinearLR]:
    """Make the optimizer of an unlearning, and its learning-rate schedule of so many steps."""
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=True,
    )
    # Without decay it keeps the rate, so that checkpoints have one form.
    scheduler = torch.optim.lr_scheduler.LinearLR(
        optimizer, 1.0, 0.0 if config.lr_decay else 1.0, total_iters=max(1, steps)
    )
    return optimizer, scheduler


def plain_loss(logits: Tensor, labels: Tensor, _poisoned: Tensor) -> Tensor:
    """Cross-entropy of all samples, averaged, as a Loss that unlearns nothing."""
    return cross_entropy(logits, labels).mean()


def note_what_stays(model: nn.Module, train: Split, flagged: Tensor, run: Run) -> None:
    """Say where unlearning did little, which a defender without triggered images cannot see."""
    poisoned = train.subset(flagged.nonzero().squeeze(1).cpu())
    # A look back, whose passes are no cost of the method.
    with paused():
        kept = predictions(model, poisoned, run) == poisoned.labels.to(run.device)
    share = kept.double().mean().item()
    if share > STAYED:
        what = f"{share:.0%} of the {len(poisoned):,} flagged samples still get their label"
        run.note(f"{what}: little was unlearned; raise --lr, or --epochs")


def labels_without_trigger(
    model: nn.Module, train: Split, flagged: Tensor, one_class: bool, run: Run
) -> Tensor:
    """Read labels in flagged samples, bool (N,), with the unlearned model under their own batch
    statistics.

    A trigger shifts the features of all images that carry it alike. Their own statistics remove
    that shift, and what the images show comes out. With images of one class that would be removed
    as well, so the model's statistics stay.

    Returns:
        int64 (N,) on the CPU: the given labels, and those that were read for flagged samples.
    """
    index = flagged.nonzero().squeeze(1).cpu()
    shown = train.subset(index)
    reader = model if one_class else adapted(model, shown, run)
    labels = train.labels.cpu().clone()
    labels[index] = predictions(reader, shown, run).cpu()
    return labels
