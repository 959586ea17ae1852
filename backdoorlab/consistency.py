"""FCT: how far an image's features move when it is turned and moved (feature consistency towards
transformations). A trigger's move far.

Effective Backdoor Defense by Exploiting Sensitivity of Poisoned Samples. W. Chen, B. Wu, H. Wang.
NeurIPS 2022, https://openreview.net/forum?id=AsH-Tx2U0Ug. The paper was not read; rule and
constants are those of the authors' code, https://github.com/SCLBD/Effective_backdoor_defense.

The network that is asked is trained for a moment only: poison is learned first, so the features of
poison are then those of its trigger, and others are not yet steady under the transformation.

Departs: the authors' code passes each batch through the model twice in a step, which moves batch
statistics twice; here once.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import Split, batches, in_order
from .engine import Recipe, make_optimizer, train
from .features import last_features
from .models import Classifier
from .record import DefenderView
from .run import Run

SHIFT = 0.2
"""Share of the sides by which an image is moved at most."""


def fct_suspicion(
    view: DefenderView,
    images: Split,
    *,
    epochs: int,
    apart_epochs: int,
    lr: float,
    batch_size: int,
    run: Run,
) -> Tensor:
    """Suspect each image the more its features change when it is turned and moved.

    Args:
        view: where a new network comes from.
        images: the N training images, on the run's device.
        epochs: passes of ordinary training of that network, without augmentation.
        apart_epochs: passes that then push the labels' centres apart.
        lr: learning rate of both; both begin the authors' cosine of 100 epochs.
        batch_size: images a step of both.
        run: draws the random numbers.

    Returns:
        float (N,) on the run's device: the mean squared change of the last layer's input.
    """
    model = view.new_model()
    recipe = Recipe(epochs, batch_size, lr, schedule_epochs=100)
    train(model, images, recipe, run, stage="learn")
    push_apart(model, images, recipe, apart_epochs, run)

    moves = drawn_moves(len(images), view.image_shape, SHIFT, run.generator)
    return sensitivity(model, images, moves.to(run.device), run)


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
