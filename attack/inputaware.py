"""Input-aware: a generator draws a trigger for each image.

Input-Aware Dynamic Backdoor Attack. A. Nguyen, A. Tran. NeurIPS 2020.
https://arxiv.org/abs/2010.08138

Kind: training-controlled, dirty-label, all-to-one or all-to-all. The trigger of an image should
work on that image only, so images with the trigger of *another* image keep their true label. The
accuracy on such images, the cross accuracy, is measured: high ASR with low cross accuracy means
that any generated trigger works.

Two stages:
  1. A network learns masks: where in an image the trigger may lie.
  2. Generator and classifier are trained together.

Departs from the authors' code:
  - The classifier is trained for all of --epochs.
  - The generator's gradients are cleared at each step. There they add up over the whole training;
    `bb_compat` keeps that.
  - One pass of the generator makes the triggers of both kinds of a batch.
  - The data set's learning-rate schedule replaces the classifier's published constant rate.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.cli import main
from backdoorlab.config import JointConfig
from backdoorlab.data import Batch, Dataset, batches, to_device, to_float
from backdoorlab.device import derived_generator, seeded
from backdoorlab.engine import LRSchedule, make_optimizer
from backdoorlab.errors import UserError
from backdoorlab.joint import cross_accuracy, in_batch, labels_of, snapshot
from backdoorlab.models import Classifier
from backdoorlab.poison import Labels, Poison, Stamp
from backdoorlab.poisoning import Outcome, new_model
from backdoorlab.run import Run
from backdoorlab.triggers import quantised

LIMITS = "digits: ASR 42 to 66 %; with larger masks it paints zeros, the target itself"


@dataclass(frozen=True, kw_only=True)
class Config(JointConfig):
    mask_epochs: int = 25
    """Passes over the training set that train the mask network, before the classifier's epochs;
    more make the masks smaller and more different."""
    mask_density: float = 0.032
    """Share of the image that a mask covers without a penalty; higher gives larger triggers, which
    are easier to learn and to see."""
    lambda_norm: float = 100.0
    """Weight of that penalty; higher keeps the masks smaller."""
    lambda_div: float = 1.0
    """Weight of the diversity loss; higher makes the triggers of two images differ more."""
    cross_ratio: float = 1.0
    """Images with another image's trigger and their true label, per poisoned image; higher ties a
    trigger more to its own image."""
    generator_lr: float = 0.01
    """Learning rate of Adam for generator and mask network; higher learns faster and may
    diverge."""
    generator_width: int = 32
    """Channels of the first stage of both networks; more cost more time."""
    bb_compat: bool = False
    """Truncate to bytes and never clear the generator's gradients, as BackdoorBench does."""

    RANGES: ClassVar[dict[str, str]] = {
        "mask_epochs": ">= 0",
        "mask_density": "[0, 1]",
        "lambda_norm": ">= 0",
        "lambda_div": ">= 0",
        "cross_ratio": ">= 0",
        "generator_lr": "> 0",
        "generator_width": ">= 1",
    }


def network(channels: int, out: int, width: int) -> nn.Sequential:
    """Build the architecture of generator and mask network: three halvings and back.

    Args:
        channels: C of the images.
        out: channels of the output: C for the generator, 1 for masks.
        width: channels of the first stage.

    Returns:
        A network: normalised images (N, C, H, W) -> (N, out, H, W), before the tanh.
    """

    def block(before: int, after: int) -> list[nn.Module]:
        return [
            nn.Conv2d(before, after, 3, padding=1),
            nn.BatchNorm2d(after, momentum=0.05),
            nn.ReLU(),
        ]

    # Down: two convolutions before each halving, twice as many channels each time.
    layers: list[nn.Module] = []
    before = channels
    for wide in (width, 2 * width, 4 * width):
        layers += [*block(before, wide), *block(wide, wide), nn.MaxPool2d(2)]
        before = wide
    # The middle, and up again by the same widths.
    layers += block(before, before)
    for wide, after in ((4 * width, 2 * width), (2 * width, width), (width, out)):
        layers += [
            nn.Upsample(scale_factor=2, mode="bilinear"),
            *block(wide, wide),
            *block(wide, after),
        ]
    # The last block ends without its ReLU: a tanh follows.
    return nn.Sequential(*layers[:-1])


@dataclass(frozen=True)
class Trigger:
    """Generator and mask network, with the classifier's normalisation in front."""

    generator: nn.Module
    masker: nn.Module
    mean: Tensor
    std: Tensor

    def normalise(self, images: Tensor) -> Tensor:
        """Normalise as the classifier does. float (N, C, H, W) in [0, 1] -> same shape."""
        return (images - self.mean) / self.std

    def pattern(self, images: Tensor) -> Tensor:
        """Return the trigger of each image. float (N, C, H, W) in [0, 1] -> same."""
        return torch.tanh(self.generator(self.normalise(images))) / 2 + 0.5

    def mask(self, images: Tensor) -> Tensor:
        """Return the opacity of each image's trigger, float (N, 1, H, W) in [0, 1]."""
        # The second tanh pushes opacities to 0 or 1.
        soft = torch.tanh(self.masker(self.normalise(images))) / 2 + 0.5
        return torch.tanh(20 * soft - 10) / 2 + 0.5


def attack(dataset: Dataset, config: Config, run: Run) -> Outcome:
    """Train masks, then generator and classifier; the cross accuracy is measured."""
    channels, height, width = dataset.image_shape
    if height % 8 or width % 8:
        raise UserError(
            "the generator halves images three times and needs sides divisible by 8, got"
            f" {height}x{width}: use --image_size"
        )
    model, train = new_model(dataset, config).to(run.device), to_device(dataset.train, run.device)
    with seeded(config.seed, "generator"):
        generator, masker = (
            network(channels, out, config.generator_width).to(run.device) for out in (channels, 1)
        )
    trigger = Trigger(generator, masker, model.mean, model.std)

    # Stage 1: where a trigger may lie. From here on the masks are fixed.
    train_masks(trigger, train, config, run)

    # Stage 2: generator and classifier on one loss.
    cross = partial(paint, trigger=trigger, donors=dataset.train.images, config=config)
    train_poison, test_poison = train_jointly(model, trigger, train, cross, dataset, config, run)
    return Outcome(
        model,
        train_poison,
        test_poison,
        {"cross_accuracy": cross_accuracy(model, dataset, cross, run)},
    )


def train_masks(trigger: Trigger, train: Any, config: Config, run: Run) -> None:
    """Train the mask network: small masks that differ as much as their images do."""
    masker = trigger.masker
    optimizer = torch.optim.Adam(masker.parameters(), lr=config.generator_lr, betas=(0.5, 0.9))
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [10, 20], 0.1)

    for _ in run.epochs(
        "masks", config.mask_epochs, masker=masker, optimizer=optimizer, schedule=schedule
    ):
        masker.train()
        for first, second in pairs(train, config, run):
            masks = trigger.mask(torch.cat([first.images, second.images]))
            one, other = masks.chunk(2)
            # Diversity: the distance of two images over that of their masks.
            apart = distance(trigger.normalise(first.images), trigger.normalise(second.images)) / (
                distance(one, other) + 1e-7
            )
            # Opacity above the density is penalised, pixel by pixel.
            too_large = F.relu(one - config.mask_density).mean()
            run.step(optimizer, config.lambda_norm * too_large + apart.mean())
            run.watch(density=one.mean())
        schedule.step()
    masker.eval()


def train_jointly(
    model: Classifier,
    trigger: Trigger,
    train: Any,
    cross: Stamp,
    dataset: Dataset,
    config: Config,
    run: Run,
) -> tuple[Poison, Poison]:
    """Train classifier and generator on one loss.

    Scores and the snapshot wait for the final generator, so the first score is that of the last
    epoch.

    Args:
        model: the classifier.
        trigger: generator and mask network; the masks are fixed.
        train: the clean training set, on the device if it fits there.
        cross: stamps the trigger of another image.
        dataset: the clean data.
        config: the options.
        run: the run.

    Returns:
        The snapshot: poisoned rows of the training and of the test set.
    """
    recipe, labels, generator = config.recipe(), labels_of(dataset, config), trigger.generator
    own = partial(paint, trigger=trigger, donors=None, config=config)
    render = partial(
        snapshot, dataset, config, run, own, cross, config.cross_ratio * config.poison_rate
    )
    optimizer = make_optimizer(model, recipe)
    schedule = LRSchedule(optimizer, recipe, len(train))
    painter = torch.optim.Adam(generator.parameters(), lr=config.generator_lr, betas=(0.5, 0.9))
    state: dict[str, Any] = dict(
        generator=generator, optimizer=optimizer, painter=painter, schedule=schedule
    )
    if config.bb_compat:
        # Gradients that are never cleared are a state that a resumed run needs.
        state["gradients"] = Gradients(generator)

    made = None
    for epoch in run.epochs("train", recipe.epochs, model=model, **state):
        model.train()
        generator.train()
        for first, second in pairs(train, config, run):
            joint_step(model, trigger, first, second, labels, optimizer, painter, config, run)
            schedule.after_step()
        schedule.after_epoch(run.mean("loss"))
        if epoch + 1 == recipe.epochs:
            generator.eval()
            # The triggers of the final generator are those that are stored and scored.
            made = render()
    generator.eval()
    return made or render()


def joint_step(
    model: Classifier,
    trigger: Trigger,
    first: Batch,
    second: Batch,
    labels: Labels,
    optimizer: torch.optim.Optimizer,
    painter: torch.optim.Optimizer,
    config: Config,
    run: Run,
) -> None:
    """Make one step of classifier and generator.

    Args:
        model: the classifier.
        trigger: generator and mask network.
        first: the batch that is poisoned and trained on.
        second: other images, for cross images.
        labels: the attacker's labels.
        optimizer: that of the classifier.
        painter: that of the generator.
        config: rates and weights.
        run: for draws, precision and the history.
    """
    # Poisoned images first, then cross images, then clean ones.
    poisoned = in_batch(config.poison_rate, len(first.images), run.generator)
    given = torch.cat([labels.of(first.labels[:poisoned]), first.labels[poisoned:]])
    if not config.bb_compat:
        # The published code never clears them, so that they add up over the whole training.
        painter.zero_grad(set_to_none=True)
    images, diversity = paint_some(first.images, second.images, poisoned, trigger, config)

    # One loss; its gradient reaches both networks.
    with run.autocast():
        logits = model(images)
    loss = F.cross_entropy(logits.float(), given) + config.lambda_div * diversity
    run.step(optimizer, loss)
    if poisoned:
        painter.step()
        hit = (logits[:poisoned].argmax(1) == given[:poisoned]).float().mean()
        run.watch(diversity=diversity, asr_in_batch=hit)


def paint_some(
    x: Tensor, other: Tensor, poisoned: int, trigger: Trigger, config: Config
) -> tuple[Tensor, Tensor]:
    """Paint triggers into a batch: their own into the first images, those of others into the next.

    The diversity loss is the mean of d(images) / d(patterns) over pairs of a poisoned and a cross
    image: patterns should differ as images do.

    Args:
        x: float (B, C, H, W) in [0, 1], the batch.
        other: float (B, C, H, W), other images, for cross images.
        poisoned: number of images that get their own trigger.
        trigger: generator and mask network.
        config: the cross ratio.

    Returns:
        float (B, C, H, W), and the diversity loss, a scalar.
    """
    crossed = min(int(config.cross_ratio * poisoned), len(x) - poisoned)
    changed, both = poisoned + crossed, min(poisoned, crossed)
    if not changed:
        return x, x.new_zeros(())

    # The masks are fixed, so they need no gradient.
    givers = torch.cat([x[:poisoned], other[poisoned:changed]])
    patterns = trigger.pattern(givers)
    with torch.no_grad():
        masks = trigger.mask(givers)
    images = torch.cat([x[:changed] + (patterns - x[:changed]) * masks, x[changed:]])

    # Distances of images and of patterns, over as many pairs as there are.
    apart, drawn = (
        distance(*(trigger.normalise(part) for part in (of[:both], of[poisoned : poisoned + both])))
        for of in (givers, patterns)
    )
    return images, (apart / (drawn + 1e-7)).sum() / max(1, both)


def pairs(train: Any, config: Config, run: Run) -> Iterator[tuple[Batch, Batch]]:
    """Return pairs of batches of two independent shuffles, augmented before any trigger."""
    recipe = config.recipe()
    whole: dict[str, Any] = dict(
        device=run.device, generator=run.generator, augment=recipe.augment, drop_last=True
    )
    return zip(
        batches(train, recipe.batch_size, **whole),
        batches(train, recipe.batch_size, **whole),
        strict=True,
    )


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Return the root mean square difference of each pair, float (N, ...) twice -> (N,)."""
    # The square root has no finite gradient at 0, where two are equal.
    return (a - b).square().flatten(1).mean(1).clamp_min(1e-12).sqrt()


@torch.no_grad()
def paint(
    images: Tensor,
    index: Tensor,
    split: str,
    trigger: Trigger,
    donors: Tensor | None,
    config: Config,
) -> Tensor:
    """Paint each image's own trigger, or that of another image.

    Args:
        images: uint8 (N, C, H, W).
        index: int64 (N,), positions in the split; the other image is drawn for each of them.
        split: "train" or "test".
        trigger: generator and mask network.
        donors: uint8 (M, C, H, W), the other images; None paints the own trigger.
        config: the options.

    Returns:
        uint8 (N, C, H, W).
    """
    source = images
    if donors is not None:
        chosen = [_donor(config.seed, split, i, len(donors)) for i in index.tolist()]
        source = donors[chosen]

    parts = []
    for image, other in zip(images.split(256), source.split(256), strict=True):
        x, giver = (to_float(part).to(trigger.mean.device) for part in (image, other))
        painted = x + (trigger.pattern(giver) - x) * trigger.mask(giver)
        parts.append(quantised(255 * painted, truncate=config.bb_compat).cpu())
    return torch.cat(parts)


def _donor(seed: int, split: str, index: int, count: int) -> int:
    """Draw one of `count` images for a position in a split."""
    generator = derived_generator(seed, f"donor:{split}:{index}")
    return int(torch.randint(count, (), generator=generator))


class Gradients:
    """Gradients of a network as part of a checkpoint, for those that are never cleared."""

    def __init__(self, network: nn.Module) -> None:
        self.parameters = dict(network.named_parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the gradients by parameter name."""
        return {
            name: parameter.grad
            for name, parameter in self.parameters.items()
            if parameter.grad is not None
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the gradients."""
        for name, gradient in state.items():
            self.parameters[name].grad = gradient.to(self.parameters[name])


if __name__ == "__main__":
    raise SystemExit(main(__file__))
