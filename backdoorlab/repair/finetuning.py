"""Fine-tune a model on the trusted images by cross-entropy, guarded, as a part of a defense."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Batch, Split, batches
from ..engine import Forward
from ..models import trained_weights
from ..record import DefenderView
from ..run import Run
from .guard import GuardConfig, guarded_epochs


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(GuardConfig):
    """Settings of fine-tuning. A method inherits these fields, which makes them its flags."""

    epochs: int = 100
    """Passes over the trusted images. More remove more of the backdoor, and cost clean accuracy
    where trusted images are few."""
    lr: float = 0.01
    """Learning rate at the start of the cosine."""
    batch_size: int = 256
    """Images a step; the last batch of an epoch is smaller. Smaller batches take more steps, which
    remove more of the backdoor."""
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


def make_sgd(model: nn.Module, config: FinetuneConfig) -> torch.optim.SGD:
    """Make the SGD of these settings."""
    return torch.optim.SGD(
        trained_weights(model),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=True,
    )


def make_cosine(
    optimizer: torch.optim.Optimizer, epochs: int
) -> torch.optim.lr_scheduler.CosineAnnealingLR:
    """Make the cosine that falls to 0 in so many epochs."""
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, epochs))


def make_forward(
    model: nn.Module, trusted: Split, batch_size: int, passes: int, run: Run
) -> Forward:
    """Prepare the passes of a training on the trusted images, for batches of both sizes.

    Args:
        model: in training mode afterwards.
        trusted: the images.
        batch_size: images a step, where there are as many.
        passes: over the trusted images, in the whole training.
        run: the context of the defense.
    """
    # A last image alone joins the batch before it.
    size = min(batch_size, len(trusted))
    rest = len(trusted) % size or size
    sizes = {size, size + 1 if rest == 1 < size else rest}
    return Forward(model.train(), run, trusted, passes * math.ceil(len(trusted) / size), *sizes)


def augmented_batches(
    trusted: Split, view: DefenderView, batch_size: int, run: Run
) -> Iterator[Batch]:
    """Iterate once over the trusted images, shuffled and augmented as in ordinary training."""
    return batches(
        trusted, batch_size, device=run.device, generator=run.generator, augment=view.augment
    )


def finetune(
    model: nn.Module,
    trusted: Split,
    view: DefenderView,
    config: FinetuneConfig,
    run: Run,
    *,
    stage: str = "finetune",
    epochs: int | None = None,
    schedule_epochs: int | None = None,
    change: Callable[[Tensor], Tensor] | None = None,
    after_step: Callable[[], None] | None = None,
) -> nn.Module:
    """Train all weights in place on the trusted images, augmented as in ordinary training.

    Args:
        model: the network.
        trusted: images with true labels.
        view: says how images are augmented.
        config: optimizer and guard.
        run: the context of the defense.
        stage: name of the stage.
        epochs: in place of the config's.
        schedule_epochs: in which the cosine falls to 0; None: in all of them.
        change: what a batch of images, (B, C, H, W) in [0, 1], is replaced by, such as some of them
            with a trigger; labels stay.
        after_step: is called after each step, such as to keep what is pruned at 0.
    """
    total = config.epochs if epochs is None else epochs
    # Graphs are captured before the first epoch, for the modes of a training.
    optimizer = make_sgd(model, config)
    schedule = make_cosine(optimizer, schedule_epochs or total)
    forward = make_forward(model, trusted, config.batch_size, total, run)

    for _ in guarded_epochs(run, stage, total, trusted, config, model, optimizer, schedule):
        model.train()
        for batch in augmented_batches(trusted, view, config.batch_size, run):
            images = batch.images if change is None else change(batch.images)
            # Logits are float32 again before the loss, whatever the precision.
            run.step(optimizer, F.cross_entropy(forward(images).float(), batch.labels))
            if after_step is not None:
                after_step()
        schedule.step()
    return model
