"""FCT: how far an image's features move when it is turned and shifted. A trigger's move far.

Effective Backdoor Defense by Exploiting Sensitivity of Poisoned Samples. W. Chen, B. Wu, H. Wang.
NeurIPS 2022. The paper was not read; rule and constants are those of the authors' code,
https://github.com/SCLBD/Effective_backdoor_defense.

The network that is asked is trained for a moment only: poison is learned first, so the features of
poison are then those of its trigger, and others are not yet steady under the transformation.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import Split, batches, in_order
from .engine import Recipe, train
from .models import Classifier
from .record import DefenderView
from .run import Run

DEGREES, SHIFT = 180.0, 0.2
"""Largest angle of the transformation, and largest shift as a share of the side."""


def fct_suspicion(
    view: DefenderView,
    images: Split,
    *,
    train_epochs: int,
    separate_epochs: int,
    lr: float,
    batch_size: int,
    run: Run,
) -> Tensor:
    """Suspect each image the more its features change when it is turned and shifted.

    Args:
        images: the N training images, on the run's device.
        train_epochs: passes of ordinary training of a new network, without crops and flips.
        separate_epochs: passes that then move the classes' mean features apart.
        lr: learning rate of both.
        batch_size: images a step of both.

    Returns:
        float (N,) on the run's device: the mean squared change of the last layer's input.
    """
    model, size = view.new_model(), min(batch_size, len(images))
    recipe = Recipe(epochs=train_epochs, batch_size=size, lr=lr, schedule="constant")
    train(model, images, recipe, run, stage="fct-train")
    separate(model, images, separate_epochs, lr, size, run)
    return feature_change(model, images, run)


def separate(
    model: Classifier, images: Split, epochs: int, lr: float, batch_size: int, run: Run
) -> None:
    """Train in place so that the mean features of a batch's classes point in unlike directions."""
    optimizer = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, fused=True
    )
    for _ in run.epochs("fct-separate", epochs, separated=model, optimizer=optimizer):
        model.train()
        for batch in batches(
            images, batch_size, device=run.device, generator=run.generator, drop_last=True
        ):
            with run.autocast():
                features = pooled(model, batch.images)
            run.step(optimizer, closeness(features.float(), batch.labels))


def closeness(features: Tensor, labels: Tensor) -> Tensor:
    """Mean cosine of the mean features of all pairs of a batch's classes, itself counted as 0.

    (B, D), int64 (B,) -> ().
    """
    means = torch.stack([features[labels == label].mean(0) for label in labels.unique()])
    means = F.normalize(means, dim=1)
    cosines = means @ means.T
    return (cosines - cosines.diag().diag()).mean()


@torch.no_grad()
def feature_change(model: Classifier, images: Split, run: Run) -> Tensor:
    """Mean squared change of each image's features under one drawn transformation: (N,)."""
    model.eval()
    found = []
    for batch in in_order(images, run.device):
        angle, shift = drawn_moves(len(batch.images), run.generator)
        moved = turned_and_shifted(batch.images, angle, shift)
        with run.autocast():
            still, after = pooled(model, batch.images), pooled(model, moved)
        found.append((still.float() - after.float()).square().mean(1))
    return torch.cat(found)


def pooled(model: Classifier, images: Tensor) -> Tensor:
    """The last layer's input: (B, C, H, W) -> (B, D)."""
    return model.forward_head(model.forward_features(images), pre_logits=True)


def drawn_moves(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw an angle in radians, (N,), and a shift to the right and down in sides, (N, 2), of each
    image."""
    angle = math.radians(DEGREES) * (2 * torch.rand(count, generator=generator) - 1)
    return angle, SHIFT * (2 * torch.rand(count, 2, generator=generator) - 1)


def turned_and_shifted(images: Tensor, angle: Tensor, shift: Tensor) -> Tensor:
    """Turn each image about its centre, clockwise, then shift it; what it leaves is black.

    float (B, C, H, W), (B,), (B, 2) -> float (B, C, H, W).
    """
    height, width = images.shape[-2:]
    # From a place of the new image back to that of the old one. A turn is one of pixels, whatever
    # H and W are.
    cos, sin = angle.cos(), angle.sin()
    back = torch.stack([cos, sin * height / width, -sin * width / height, cos], 1).view(-1, 2, 2)
    # Places are in halves of a side.
    theta = torch.cat([back, -back @ (2 * shift).unsqueeze(2)], 2).to(images.device)
    where = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, where, mode="nearest", align_corners=False)
