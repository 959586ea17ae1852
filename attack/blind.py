"""Blind: a second loss on triggered images during training.

Blind Backdoors in Deep Learning Models. E. Bagdasaryan, V. Shmatikov. USENIX Security 2021.
https://arxiv.org/abs/2005.03823

Kind: training-controlled, all-to-one or all-to-all. The attacker changes the training code and no
data. Once the loss on clean images is low, every image of a batch is also seen with a small fixed
pattern and the attacker's label.

Departs from the authors' code and BackdoorBench's: clean and triggered images go through the model
in one pass. In two passes, each kind gets batch statistics of its own, so the model can tell the
kinds apart by them, and clean accuracy collapses in evaluation mode. The pattern is painted on
pixels, before any normalisation.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.cli import main
from backdoorlab.config import JointConfig
from backdoorlab.data import Dataset, batches, to_device
from backdoorlab.engine import LRSchedule, make_optimizer
from backdoorlab.errors import UserError
from backdoorlab.joint import labels_of, snapshot
from backdoorlab.poison import Labels
from backdoorlab.poisoning import Outcome, new_model
from backdoorlab.run import Run

PATTERN = torch.tensor([[1, 0, 1], [-1, 1, -1], [-1, -1, 0], [-1, 1, -1], [1, 0, 1]])
"""Pixels: 1 white, 0 black, -1 unchanged."""
TOP, LEFT = 3, 23
"""Position of the pattern in images of 32 pixels; it grows with the image."""


@dataclass(frozen=True, kw_only=True)
class Config(JointConfig):
    clean_weight: float = 1.0
    """Weight of the loss on clean images; higher favours clean accuracy."""
    backdoor_weight: float = 0.9
    """Weight of the loss on triggered images; higher favours the ASR."""
    loss_threshold: float = 1.0
    """Mean clean loss of the last --history batches below which the attack is on; higher starts it
    earlier."""
    history: int = 1000
    """Batches over which the clean loss is averaged; more start the attack later."""

    RANGES: ClassVar[dict[str, str]] = {
        "clean_weight": ">= 0",
        "backdoor_weight": ">= 0",
        "loss_threshold": ">= 0",
        "history": ">= 1",
    }


def paint(images: Tensor, white: float) -> Tensor:
    """Paint the pattern. (N, C, H, W) -> same shape and dtype; `white`: 255 for bytes, else 1."""
    height, width = images.shape[2:]
    # The pattern grows with the image, in whole pixels.
    scale = max(1, min(height, width) // 32)
    pattern = PATTERN.repeat_interleave(scale, 0).repeat_interleave(scale, 1).to(images.device)
    top, left = TOP * height // 32, LEFT * width // 32
    bottom, right = top + pattern.shape[0], left + pattern.shape[1]
    if bottom > height or right > width:
        raise UserError(
            f"the pattern of 5x3 pixels does not fit at row {top}, column {left} of"
            f" {height}x{width} images: use --image_size"
        )

    painted = images.clone()
    here = painted[:, :, top:bottom, left:right]
    here.copy_(torch.where(pattern < 0, here, (pattern * white).to(images.dtype)))
    return painted


def stamp(images: Tensor, index: Tensor, split: str, config: Config) -> Tensor:
    """Paint the pattern on images of bytes. uint8 (N, C, H, W) -> same."""
    return paint(images, 255)


class History(nn.Module):
    """The last clean losses; a module, so that a checkpoint stores them."""

    losses: Tensor
    count: Tensor

    def __init__(self, length: int) -> None:
        super().__init__()
        self.register_buffer("losses", torch.zeros(length))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def add(self, loss: Tensor) -> None:
        """Store a loss, in place of the oldest one."""
        self.losses[self.count % len(self.losses)] = loss.detach()
        self.count += 1

    def settled(self, threshold: float) -> bool:
        """Return whether `length` losses are stored and their mean is below the threshold."""
        return bool((self.count >= len(self.losses)) & (self.losses.mean() < threshold))


def attack(dataset: Dataset, config: Config, run: Run) -> Outcome:
    """Train the model on both losses; the snapshot of triggered images is stored first."""
    recipe, labels = config.recipe(), labels_of(dataset, config)

    # The pattern is fixed, so the snapshot need not wait for the training.
    train_poison, test_poison = snapshot(dataset, config, run, partial(stamp, config=config))
    model, train = new_model(dataset, config).to(run.device), to_device(dataset.train, run.device)
    optimizer = make_optimizer(model, recipe)
    schedule = LRSchedule(optimizer, recipe, len(train))
    history = History(config.history).to(run.device)

    for _ in run.epochs(
        "train", recipe.epochs, model=model, optimizer=optimizer, schedule=schedule, history=history
    ):
        model.train()
        for batch in batches(
            train,
            recipe.batch_size,
            device=run.device,
            generator=run.generator,
            augment=recipe.augment,
            drop_last=True,
        ):
            # The attack waits until the model has learned its task.
            on = history.settled(config.loss_threshold)
            loss, clean = joint_loss(model, batch.images, batch.labels, on, labels, config, run)
            # The history is of clean losses, whether the attack is on or not.
            history.add(clean)
            run.watch(attacked=torch.tensor(float(on)))
            run.step(optimizer, loss)
            schedule.after_step()
        schedule.after_epoch(run.mean("loss"))

    if not history.settled(config.loss_threshold):
        run.note(
            f"the attack was off at the end: the clean loss of {config.history} batches was not"
            f" below {config.loss_threshold}"
        )
    return Outcome(model, train_poison, test_poison)


def joint_loss(
    model: nn.Module, x: Tensor, given: Tensor, on: bool, labels: Labels, config: Config, run: Run
) -> tuple[Tensor, Tensor]:
    """Return clean_weight CE(C(x), y) + backdoor_weight CE(C(x'), eta(y)), and CE(C(x), y).

    Clean and triggered images go through the classifier C in one pass.

    Args:
        model: the classifier C.
        x: float (N, C, H, W) in [0, 1], the clean images.
        given: int64 (N,), their labels y.
        on: whether the attack is on; if not, the second term is left out.
        labels: the attacker's labels eta.
        config: the weights.
        run: for the precision.

    Returns:
        Two scalars: the loss, and its clean part without the weight.
    """
    with run.autocast():
        # One pass, so that batch statistics are those of both kinds: apart they give the trigger
        # away.
        logits = model(torch.cat([x, paint(x, 1)]) if on else x).float()
    clean = F.cross_entropy(logits[: len(x)], given)
    loss = config.clean_weight * clean
    if on:
        # Every image of the batch is also a triggered one: this loss knows no poison rate.
        loss = loss + config.backdoor_weight * F.cross_entropy(logits[len(x) :], labels.of(given))
    return loss, clean


if __name__ == "__main__":
    raise SystemExit(main(__file__))
