"""Blind backdoor: poisoned code adds a loss on triggered images to the training, and no data is
touched.

Blind Backdoors in Deep Learning Models. E. Bagdasaryan, V. Shmatikov. USENIX Security 2021.
https://arxiv.org/abs/2005.03823

Kind: controls the loss, all-to-one or all-to-all. Every image of a batch is also seen with a small
fixed pattern and the attacker's label, once the loss on clean images has settled.

Departs from the authors' code and BackdoorBench's: clean and triggered images go through the model
in one pass. In two passes batch normalisation sees only one sort at a time, its statistics tell the
model which sort it is, and clean accuracy collapses in evaluation mode. The pattern is painted on
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
"""1 white, 0 black, -1 left as it is."""
TOP, LEFT = 3, 23
"""Where it lies in images of 32 pixels; larger images get it larger."""


@dataclass(frozen=True, kw_only=True)
class Config(JointConfig):
    clean_weight: float = 1.0
    """Weight of the loss on clean images."""
    backdoor_weight: float = 0.9
    """Weight of the loss on triggered images."""
    loss_threshold: float = 1.0
    """The attack is on while the mean clean loss of the last batches is below this ..."""
    history: int = 1000
    """... of so many batches."""

    RANGES: ClassVar[dict[str, str]] = {
        "clean_weight": ">= 0",
        "backdoor_weight": ">= 0",
        "loss_threshold": ">= 0",
        "history": ">= 1",
    }


def paint(images: Tensor, white: float) -> Tensor:
    """Paint the pattern, `white` being its brightest value. (N, C, H, W) -> same type."""
    height, width = images.shape[2:]
    scale = max(1, min(height, width) // 32)
    pattern = PATTERN.repeat_interleave(scale, 0).repeat_interleave(scale, 1).to(images.device)
    top, left = TOP * height // 32, LEFT * width // 32
    if top + pattern.shape[0] > height or left + pattern.shape[1] > width:
        raise UserError(
            f"the pattern of 5x3 pixels does not fit at row {top}, column {left} of"
            f" {height}x{width} images: use --image_size"
        )
    painted = images.clone()
    here = painted[:, :, top : top + pattern.shape[0], left : left + pattern.shape[1]]
    here.copy_(torch.where(pattern < 0, here, (pattern * white).to(images.dtype)))
    return painted


def stamp(images: Tensor, index: Tensor, split: str, config: Config) -> Tensor:
    """uint8 (N, C, H, W) -> same."""
    return paint(images, 255)


class History(nn.Module):
    """The last clean losses, as part of a checkpoint."""

    losses: Tensor
    count: Tensor

    def __init__(self, length: int) -> None:
        super().__init__()
        self.register_buffer("losses", torch.zeros(length))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def add(self, loss: Tensor) -> None:
        self.losses[self.count % len(self.losses)] = loss.detach()
        self.count += 1

    def settled(self, threshold: float) -> bool:
        """Whether there are enough of them and their mean is low."""
        return bool((self.count >= len(self.losses)) & (self.losses.mean() < threshold))


def attack(dataset: Dataset, config: Config, run: Run) -> Outcome:
    recipe, labels = config.recipe(), labels_of(dataset, config)
    train_poison, test_poison = snapshot(dataset, config, run, partial(stamp, config=config))
    model, train = new_model(dataset, config).to(run.device), to_device(dataset.train, run.device)
    optimizer = make_optimizer(model.parameters(), recipe)
    course, history = (
        LRSchedule(optimizer, recipe, len(train)),
        History(config.history).to(run.device),
    )
    for _ in run.epochs(
        "train", recipe.epochs, model=model, optimizer=optimizer, course=course, history=history
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
            on = history.settled(config.loss_threshold)
            loss, clean = joint_loss(model, batch.images, batch.labels, on, labels, config, run)
            history.add(clean)
            run.watch(attacked=torch.tensor(float(on)))
            run.step(optimizer, loss)
            course.after_step()
        course.after_epoch(run.mean("loss"))
    if not history.settled(config.loss_threshold):
        run.note(
            f"the attack was off at the end: the clean loss of {config.history} batches was not"
            f" below {config.loss_threshold}"
        )
    return Outcome(model, train_poison, test_poison)


def joint_loss(
    model: nn.Module, x: Tensor, given: Tensor, on: bool, labels: Labels, config: Config, run: Run
) -> tuple[Tensor, Tensor]:
    """clean_weight CE(C(x), y) + backdoor_weight CE(C(x'), eta(y)), both in one pass of the
    classifier, and CE(C(x), y); x' only while `on`."""
    with run.autocast():
        logits = model(torch.cat([x, paint(x, 1)]) if on else x).float()
    clean = F.cross_entropy(logits[: len(x)], given)
    loss = config.clean_weight * clean
    if on:
        loss = loss + config.backdoor_weight * F.cross_entropy(logits[len(x) :], labels.of(given))
    return loss, clean


if __name__ == "__main__":
    raise SystemExit(main(__file__))
