"""What attacks that control the training share: shares of a batch, the changes of its images, and
the snapshot they leave.

Such an attack has no poisoned training set: each batch is poisoned anew. Its record stores a
*snapshot* instead, made afterwards with the final trigger: fixed images with the attacker's label,
and for some attacks fixed cross images (another change of the same sort, true label). Defenses that
read the training set get the snapshot, and those that train on it are compared with an ordinary
model trained on it, not with the attacker's.
"""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import JointConfig
from .data import Batch, Dataset, Split, batches
from .device import derived_generator
from .engine import Forward, LRSchedule, Recipe, make_optimizer
from .metrics import Evaluator, predict
from .poison import CROSS, Labels, Poison, Stamp, poison_test, poison_train, stamped
from .run import Run

CROP_SHARE, ROTATION, ROTATION_SHARE = 0.8, 10.0, 0.5
"""Of the images of a batch, those that are cropped at random; degrees; those that are rotated by up
to so many."""


def in_batch(rate: float, size: int, generator: torch.Generator) -> int:
    """How many of a batch of `size` are changed: int(rate * size); where that is none, one with
    probability rate * size."""
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
    """Shift, rotate and mirror images, each by draws of its own. float (B, C, H, W) -> same, zeros
    from outside.

    Crops move by up to the recipe's padding, mirroring is done where the recipe does it; one
    bilinear resampling does all of it. `shared`: one draw for the whole batch (BackdoorBench's
    quirk).
    """
    count, (height, width) = len(images), images.shape[2:]
    draws = torch.rand(6, 1 if shared else count, generator=generator).expand(6, count)
    padding = recipe.augment.crop_padding * (draws[0] < crop_share)
    shift = ((2 * padding + 1) * draws[1:3]).floor() - padding
    angle = torch.deg2rad((2 * draws[3] - 1) * ROTATION * (draws[4] < rotation_share))
    mirror = 1 - 2 * ((draws[5] < 0.5) & recipe.augment.flip).float()
    # The grid's unit is half a side
    across, down = -angle.sin() * (height / width), angle.sin() * mirror * (width / height)
    turned = torch.stack([angle.cos() * mirror, across, down, angle.cos()], 1).view(count, 2, 2)
    moved = torch.stack([2 * shift[0] / width, 2 * shift[1] / height], 1).unsqueeze(2)
    where = F.affine_grid(
        torch.cat([turned, moved], 2).to(images), list(images.shape), align_corners=False
    )
    return F.grid_sample(images, where, mode="bilinear", padding_mode="zeros", align_corners=False)


@contextlib.contextmanager
def seeded(seed: int, purpose: str) -> Iterator[None]:
    """Networks made inside are initialised from a seed of their own, and move no other draw."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_generator(seed, purpose).initial_seed())
        yield


def labels_of(dataset: Dataset, config: JointConfig) -> Labels:
    return Labels(config.target_label, config.label_mode, dataset.num_classes)


def snapshot(
    dataset: Dataset,
    config: JointConfig,
    run: Run,
    stamp: Stamp,
    cross: Stamp | None = None,
    cross_rate: float = 0.0,
) -> tuple[Poison, Poison]:
    """The training set as the attack leaves it, and the images that ASR is measured on from now on,
    both made by the final stamps.

    round(poison_rate * N) images of all classes get `stamp` and the attacker's label,
    round(cross_rate * N) others, as far as there are any, get `cross` and keep theirs; which ones
    is drawn from the seed.
    """
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
    asked, got, size = (
        round(cross_rate * len(dataset.train)),
        int((train.kind == CROSS).sum()),
        len(dataset.train),
    )
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
    change: Callable[[Batch], tuple[Tensor, int]],
    labels: Labels,
    recipe: Recipe,
    run: Run,
    *,
    shared: bool,
) -> None:
    """Ordinary training but for each batch's images: `change` gives them, the attacker's label
    first, and how many have it; then they are varied."""
    optimizer = make_optimizer(model.parameters(), recipe)
    course = LRSchedule(optimizer, recipe, len(train))
    forward = Forward(
        model.train(),
        run,
        train,
        recipe.epochs * (len(train) // recipe.batch_size),
        recipe.batch_size,
    )
    for _ in run.epochs("train", recipe.epochs, model=model, optimizer=optimizer, course=course):
        model.train()
        for batch in batches(
            train, recipe.batch_size, device=run.device, generator=run.generator, drop_last=True
        ):
            images, poisoned = change(batch)
            given = torch.cat([labels.of(batch.labels[:poisoned]), batch.labels[poisoned:]])
            logits = forward(vary(images, recipe, run.generator, shared=shared))
            run.step(optimizer, F.cross_entropy(logits.float(), given))
            course.after_step()
        course.after_epoch(run.mean("loss"))


def cross_accuracy(model: nn.Module, dataset: Dataset, cross: Stamp, run: Run) -> float:
    """Accuracy on test images that all have the cross change; low beside a high ASR, the model
    detects any change of that sort."""
    everything = torch.arange(len(dataset.test))
    changed = Split(stamped(dataset.test, everything, cross, "test"), dataset.test.labels)
    return (predict(model, changed, run.device) == changed.labels).double().mean().item()


def psnr(clean: Tensor, changed: Tensor) -> float | None:
    """Peak signal-to-noise ratio in dB over uint8 images of one shape; None where nothing differs,
    or nothing is there."""
    error = (clean.double() - changed.double()).square().mean().item() if len(clean) else 0.0
    return 10 * math.log10(255**2 / error) if error else None
