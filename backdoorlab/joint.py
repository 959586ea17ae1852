"""Training-controlled attacks: poisoned batches, their augmentation, and the snapshot they leave.

Such an attack has no poisoned training set: each batch is poisoned anew. Its record stores a
*snapshot* instead, made afterwards with the final trigger: fixed images with the attacker's label,
and for some attacks cross images (another change of the same sort, with the true label). Defenses
that read the training set get the snapshot. Those that train on it are compared with an ordinary
model trained on it, the retraining baseline, and not with the attacker's.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import JointConfig
from .data import Batch, Dataset, Split, batches
from .device import derived_generator
from .engine import Forward, Lookahead, LRSchedule, Recipe, make_optimizer
from .metrics import Evaluator, predict
from .poison import CROSS, Labels, Poison, Stamp, poison_test, poison_train, stamped
from .run import Run

CROP_SHARE, ROTATION, ROTATION_SHARE = 0.8, 10.0, 0.5
"""Share of a batch's images that are cropped at random; largest rotation in degrees; share of a
batch's images that are rotated."""


def in_batch(rate: float, size: int, generator: torch.Generator) -> int:
    """Return how many images of a batch are poisoned.

    They are int(rate * size). If that is none, one is with probability rate * size.

    Args:
        rate: share of the batch, in [0, 1].
        size: images in the batch.
        generator: draws where the number is less than one.
    """
    count = int(rate * size)
    return count if count else int(torch.rand((), generator=generator).item() < rate * size)


def vary(
    images: Tensor,
    recipe: Recipe,
    generator: torch.Generator,
    *,
    crop_share: float = CROP_SHARE,
    rotation_share: float = ROTATION_SHARE,
    shared: bool = False,
) -> Tensor:
    """Shift, rotate and mirror images, each by draws of its own.

    One bilinear resampling does all of it; the recipe says what comes from outside.

    Args:
        images: float (B, C, H, W).
        recipe: crops move by up to its padding, and mirroring is done if it mirrors.
        generator: draws everything.
        crop_share: share of the images that are shifted, in [0, 1].
        rotation_share: share that is rotated by up to ROTATION degrees, in [0, 1].
        shared: one draw for the whole batch (BackdoorBench's quirk).

    Returns:
        float (B, C, H, W).
    """
    # All draws are made, whatever is switched off, so that later ones stay the same.
    count, (height, width) = len(images), images.shape[2:]
    draws = torch.rand(6, 1 if shared else count, generator=generator).expand(6, count)

    # Whole pixels of shift, as a crop out of padded images has them.
    padding = recipe.augment.crop_padding * (draws[0] < crop_share)
    shift = ((2 * padding + 1) * draws[1:3]).floor() - padding
    # Degrees become radians; images that are not rotated have the angle 0.
    angle = torch.deg2rad((2 * draws[3] - 1) * ROTATION * (draws[4] < rotation_share))
    mirror = 1 - 2 * ((draws[5] < 0.5) & recipe.augment.flip).float()

    # The grid's unit is half a side.
    across, down = -angle.sin() * (height / width), angle.sin() * mirror * (width / height)
    turned = torch.stack([angle.cos() * mirror, across, down, angle.cos()], 1).view(count, 2, 2)
    moved = torch.stack([2 * shift[0] / width, 2 * shift[1] / height], 1).unsqueeze(2)
    where = F.affine_grid(
        torch.cat([turned, moved], 2).to(images), list(images.shape), align_corners=False
    )
    outside = "zeros" if recipe.augment.border == "zero" else "reflection"
    return F.grid_sample(images, where, mode="bilinear", padding_mode=outside, align_corners=False)


def labels_of(dataset: Dataset, config: JointConfig) -> Labels:
    """Return how the attack changes labels."""
    return Labels(config.target_label, config.label_mode, dataset.num_classes)


def snapshot(
    dataset: Dataset,
    config: JointConfig,
    run: Run,
    stamp: Stamp,
    cross: Stamp | None = None,
    cross_rate: float = 0.0,
) -> tuple[Poison, Poison]:
    """Make the poisoned training set and the triggered test images by the final stamps.

    From now on models are scored on these test images.

    Args:
        dataset: clean data.
        config: the attack's settings.
        run: the context of the attack.
        stamp: put on round(poison_rate * N) images of all classes, drawn by the seed, which get
            the attacker's label.
        cross: put on round(cross_rate * N) others, as far as there are any, which keep their label.
        cross_rate: share of the training set, in [0, 1].

    Returns:
        The poisoned rows of the training set, and the triggered test images.
    """
    # Victims are drawn as a static attack draws them.
    labels, drawn = labels_of(dataset, config), derived_generator(config.seed, "victims")
    train = poison_train(
        dataset.train,
        stamp,
        labels,
        poison_rate=config.poison_rate,
        generator=drawn,
        cover_rate=cross_rate,
        cover_stamp=cross,
    )
    test = poison_test(dataset.test, stamp, labels)

    size = len(dataset.train)
    asked, got = round(cross_rate * size), int((train.kind == CROSS).sum())
    if cross_rate and not asked:
        run.note(
            f"the attack asks for {cross_rate:.4g} of {size:,} training images as cross images,"
            " which is none"
        )
    if got < asked:
        run.note(
            f"the attack asks for {asked:,} cross images of {size:,} training images, but can have"
            f" {got:,}: it takes those"
        )

    run.watch_scores(Evaluator(dataset.test, test, dataset.num_classes, run.device))
    return train, test


def train_changed(
    model: nn.Module,
    train: Split,
    poison_batch: Callable[[Batch], tuple[Tensor, int]],
    labels: Labels,
    recipe: Recipe,
    run: Run,
    *,
    shared: bool,
) -> None:
    """Train as usual, but poison each batch. All images are then augmented.

    Args:
        model: trained in place.
        train: the clean training set.
        poison_batch: returns the batch's images, float (B, C, H, W), poisoned ones first, and how
            many of them get the attacker's label.
        labels: the attacker's labels.
        recipe: how the classifier is trained.
        run: the context of the attack; the stage is "train".
        shared: one draw of the augmentation for a whole batch.
    """
    optimizer = make_optimizer(model, recipe)
    schedule = LRSchedule(optimizer, recipe, len(train))
    lookahead = Lookahead(model, recipe, len(train))
    steps = recipe.epochs * (len(train) // recipe.batch_size)
    forward = Forward(model.train(), run, train, steps, recipe.batch_size)

    for _ in run.epochs(
        "train",
        recipe.epochs,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        lookahead=lookahead,
    ):
        model.train()
        for batch in batches(
            train, recipe.batch_size, device=run.device, generator=run.generator, drop_last=True
        ):
            # Poisoned images come first, so that their labels are the first, too.
            images, poisoned = poison_batch(batch)
            given = torch.cat([labels.of(batch.labels[:poisoned]), batch.labels[poisoned:]])
            # Augmented after the trigger was put on, as any training image is.
            logits = forward(vary(images, recipe, run.generator, shared=shared))
            run.step(optimizer, recipe.loss(logits.float(), given))
            schedule.after_step()
            lookahead.after_step()
        schedule.after_epoch(run.mean("loss"))


def cross_accuracy(model: nn.Module, dataset: Dataset, cross: Stamp, run: Run) -> float:
    """Return the accuracy on test images that all have the cross change, in [0, 1].

    If it is low and ASR high, the model reacts to any change of that sort, not to its trigger.

    Args:
        model: the poisoned model.
        dataset: clean data.
        cross: the change.
        run: the context of the attack.
    """
    everything = torch.arange(len(dataset.test))
    changed = Split(stamped(dataset.test, everything, cross, "test"), dataset.test.labels)
    return (predict(model, changed, run.device) == changed.labels).double().mean().item()
