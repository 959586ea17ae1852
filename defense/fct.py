"""FCT: features that move far when an image is turned and moved, after a short training.

Effective Backdoor Defense by Exploiting Sensitivity of Poisoned Samples, W. Chen et al., NeurIPS
2022, https://openreview.net/forum?id=AsH-Tx2U0Ug: the metric by which D-BR and D-ST tell images
apart (feature consistency towards transformations). A new model is trained for two epochs without
augmentation, when it knows poison already, and then for ten by a loss that pushes the labels'
centres apart. The metric is the mean squared difference of the last features between an image and
its copy, which is turned by any angle and moved by up to a fifth of its sides. The highest 5 % are
flagged. Constants are those of the authors' code.

Assumes: the poisoned training set. It trains a model of its own.

Departs: the authors' code passes each batch through the model twice in a step, which moves batch
statistics twice; here once.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorlab.cli import main
from backdoorlab.config import DefenseConfig
from backdoorlab.data import Split, batches, in_order, to_device
from backdoorlab.detection import Detection, highest
from backdoorlab.engine import Recipe, make_optimizer, train
from backdoorlab.features import last_features
from backdoorlab.models import Classifier
from backdoorlab.record import DefenderView
from backdoorlab.run import Run

ASSUMES = ("train",)


@dataclass(frozen=True, kw_only=True)
class Config(DefenseConfig):
    flagged_rate: float = 0.05
    """Share of the training set that is flagged; more find more of the poison, and more clean
    images. It is no estimate of the poison rate."""
    epochs: int = 2
    """Passes of ordinary training; more also teach the clean images, which then move less."""
    apart_epochs: int = 10
    """Passes that push the labels' centres apart; more part the poison from the images of its
    label."""
    lr: float = 0.01
    """Learning rate of both; higher learns faster and may diverge."""
    batch_size: int = 128
    """Images a step; more give fewer, less noisy steps."""
    shift: float = 0.2
    """Share of the sides by which an image is moved at most; more move features further."""

    RANGES: ClassVar[dict[str, str]] = {
        "flagged_rate": "(0, 1)",
        "epochs": ">= 0",
        "apart_epochs": ">= 0",
        "lr": ">= 0",
        "batch_size": ">= 2",
        "shift": "[0, 1]",
    }


def detect(view: DefenderView, config: Config, run: Run) -> Detection:
    images, model = to_device(view.train, run.device), view.new_model()
    # Both trainings begin the authors' cosine of 100 epochs, and none is augmented.
    recipe = Recipe(config.epochs, config.batch_size, config.lr, schedule_epochs=100)
    train(model, images, recipe, run, stage="learn")
    push_apart(model, images, recipe, config.apart_epochs, run)

    moves = drawn_moves(len(images), view.image_shape, config.shift, run.generator)
    suspicion = sensitivity(model, images, moves.to(run.device), run)
    return Detection(suspicion, highest(suspicion, config.flagged_rate))


def push_apart(model: Classifier, split: Split, recipe: Recipe, epochs: int, run: Run) -> None:
    """Fine-tune a model so that the mean features of different labels point away from each
    other."""
    optimizer = make_optimizer(model, recipe)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.schedule_epochs or 1)
    for _ in run.epochs("apart", epochs, parted=model, optimizer=optimizer, schedule=schedule):
        model.train()
        for batch in batches(split, recipe.batch_size, device=run.device, generator=run.generator):
            with run.autocast():
                features = last_features(model, batch.images)
            run.step(optimizer, alikeness(features.float(), batch.labels))
        schedule.step()


def alikeness(features: Tensor, labels: Tensor) -> Tensor:
    """Mean cosine between the centres of a batch's labels, where that of a label with itself counts
    as 0: (B, D), int64 (B,) -> ()."""
    # A row for each label of the batch, which averages its images.
    own = labels.unique().unsqueeze(1) == labels
    centres = F.normalize(own.float() @ features / own.sum(1, keepdim=True), dim=1)
    return (centres @ centres.T).fill_diagonal_(0).mean()


def drawn_moves(
    count: int, shape: tuple[int, int, int], shift: float, generator: torch.Generator
) -> Tensor:
    """Draw a turn by any angle and then a move by whole pixels for each of `count` images.

    Returns:
        float (2, count, 2, 3): both as maps from places in the new image to places in the old one,
        in the coordinates of `affine_grid`.
    """
    _, height, width = shape
    angle = (2 * torch.rand(count, generator=generator) - 1) * math.pi
    # A turn of pixels, though both sides are of length 2 in these coordinates.
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(count)
    turn = [cos, -sin * height / width, zero, sin * width / height, cos, zero]

    sides = torch.tensor([width, height])
    pixels = ((2 * torch.rand(count, 2, generator=generator) - 1) * shift * sides).round()
    across, down = (2 * pixels / sides).unbind(1)
    move = [zero + 1, zero, -across, zero, zero + 1, -down]
    return torch.stack([torch.stack(entries, 1).view(-1, 2, 3) for entries in (turn, move)])


def moved(images: Tensor, moves: Tensor) -> Tensor:
    """Apply float (2, B, 2, 3) to images (B, C, H, W), one after the other; what comes from outside
    is black."""
    for matrix in moves:
        places = F.affine_grid(matrix, list(images.shape), align_corners=False)
        images = F.grid_sample(images, places, mode="nearest", align_corners=False)
    return images


@torch.no_grad()
def sensitivity(model: Classifier, split: Split, moves: Tensor, run: Run) -> Tensor:
    """Mean squared difference of the last features between each image and its moved copy, float
    (N,)."""
    model.eval()
    found = []
    for batch in in_order(split, run.device):
        copies = moved(batch.images, moves[:, batch.index])
        with run.autocast():
            here, there = (last_features(model, x).float() for x in (batch.images, copies))
        found.append((here - there).square().mean(1))
    return torch.cat(found)


if __name__ == "__main__":
    raise SystemExit(main(__file__))
