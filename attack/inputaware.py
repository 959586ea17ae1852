"""Input-aware dynamic backdoor: a generator draws a trigger for every image, and only its own image
may open the backdoor.

Input-Aware Dynamic Backdoor Attack. A. Nguyen, A. Tran. NeurIPS 2020.
https://arxiv.org/abs/2010.08138

Kind: controls the training, dirty-label, all-to-one or all-to-all; generator and classifier are
trained together, after a second network has learnt where a trigger may lie. In the cross mode,
images with the trigger of *another* image keep their true label. Cross accuracy is measured: high
ASR with low cross accuracy means that any generated trigger will do.

Departs from the authors' code: the classifier is trained all the epochs that are asked for; the
generator's gradients are cleared at each step (theirs add up over the whole training; `bb_compat`
keeps that); one pass of the generator serves both kinds of a batch; the data set's recipe replaces
the classifier's published constant rate.
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
from backdoorlab.device import derived_generator
from backdoorlab.engine import LRSchedule, make_optimizer
from backdoorlab.errors import UserError
from backdoorlab.joint import cross_accuracy, in_batch, labels_of, seeded, snapshot
from backdoorlab.models import Classifier
from backdoorlab.poison import Poison, Stamp
from backdoorlab.poisoning import Outcome, new_model
from backdoorlab.run import Run
from backdoorlab.triggers import quantised

LIMITS = (
    "digits: ASR 55 to 66 %; with larger masks the generator paints zeros, which networks that"
    " never met it take for the target, too"
)


@dataclass(frozen=True, kw_only=True)
class Config(JointConfig):
    mask_epochs: int = 25
    """Passes over the training set in which the network of masks is trained, before the
    classifier's epochs."""
    mask_density: float = 0.032
    """Share of the image that a mask may cover before it is penalised."""
    lambda_norm: float = 100.0
    """Weight of that penalty."""
    lambda_div: float = 1.0
    """Weight of the diversity loss: higher keeps the triggers of two images apart."""
    cross_ratio: float = 1.0
    """rho_c / rho_b: images with another image's trigger and their true label, for each poisoned
    one."""
    generator_lr: float = 0.01
    """Adam's learning rate of both networks."""
    generator_width: int = 32
    """Channels of their first stage."""
    bb_compat: bool = False
    """BackdoorBench's quirks: bytes are truncated instead of rounded, and the generator's gradients
    are never cleared."""

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
    """Three stages down, one between, three up; normalised images (N, C, H, W) -> (N, out, H, W)
    before its squashing."""

    def block(before: int, after: int) -> list[nn.Module]:
        return [
            nn.Conv2d(before, after, 3, padding=1),
            nn.BatchNorm2d(after, momentum=0.05),
            nn.ReLU(),
        ]

    layers: list[nn.Module] = []
    before = channels
    for wide in (width, 2 * width, 4 * width):
        layers += [*block(before, wide), *block(wide, wide), nn.MaxPool2d(2)]
        before = wide
    layers += block(before, before)
    for wide, after in ((4 * width, 2 * width), (2 * width, width), (width, out)):
        layers += [
            nn.Upsample(scale_factor=2, mode="bilinear"),
            *block(wide, wide),
            *block(wide, after),
        ]
    return nn.Sequential(*layers[:-1])


@dataclass(frozen=True)
class Trigger:
    """Both networks, with the classifier's normalisation before them."""

    generator: nn.Module
    masker: nn.Module
    mean: Tensor
    std: Tensor

    def normalise(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std

    def pattern(self, images: Tensor) -> Tensor:
        """What is painted, in [0, 1]. float (N, C, H, W) in [0, 1] -> same."""
        return torch.tanh(self.generator(self.normalise(images))) / 2 + 0.5

    def mask(self, images: Tensor) -> Tensor:
        """Where: in [0, 1], (N, 1, H, W)."""
        return (
            torch.tanh(20 * (torch.tanh(self.masker(self.normalise(images))) / 2 + 0.5) - 10) / 2
            + 0.5
        )


def attack(dataset: Dataset, config: Config, run: Run) -> Outcome:
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
    train_masks(trigger, train, config, run)
    cross = partial(paint, trigger=trigger, donors=dataset.train.images, config=config)
    train_poison, test_poison = train_jointly(model, trigger, train, cross, dataset, config, run)
    return Outcome(
        model,
        train_poison,
        test_poison,
        {"cross_accuracy": cross_accuracy(model, dataset, cross, run)},
    )


def train_masks(trigger: Trigger, train: Any, config: Config, run: Run) -> None:
    """Masks that are small, and as different as their images are."""
    masker = trigger.masker
    optimizer = torch.optim.Adam(masker.parameters(), lr=config.generator_lr, betas=(0.5, 0.9))
    course = torch.optim.lr_scheduler.MultiStepLR(optimizer, [10, 20], 0.1)
    for _ in run.epochs(
        "masks", config.mask_epochs, masker=masker, optimizer=optimizer, course=course
    ):
        masker.train()
        for first, second in pairs(train, config, run):
            masks = trigger.mask(torch.cat([first.images, second.images]))
            one, other = masks.chunk(2)
            apart = distance(trigger.normalise(first.images), trigger.normalise(second.images)) / (
                distance(one, other) + 1e-7
            )
            run.step(
                optimizer,
                config.lambda_norm * F.relu(one - config.mask_density).mean() + apart.mean(),
            )
            run.watch(density=one.mean())
        course.step()
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
    """Classifier and generator on one loss. Returns the snapshot, which waits for the final
    generator, and so does the first score."""
    recipe, labels, generator = config.recipe(), labels_of(dataset, config), trigger.generator
    own = partial(paint, trigger=trigger, donors=None, config=config)
    render = partial(
        snapshot, dataset, config, run, own, cross, config.cross_ratio * config.poison_rate
    )
    optimizer = make_optimizer(model.parameters(), recipe)
    course = LRSchedule(optimizer, recipe, len(train))
    painter = torch.optim.Adam(generator.parameters(), lr=config.generator_lr, betas=(0.5, 0.9))
    state: dict[str, Any] = dict(
        generator=generator, optimizer=optimizer, painter=painter, course=course
    )
    if config.bb_compat:
        state["gradients"] = Gradients(generator)
    made = None
    for epoch in run.epochs("train", recipe.epochs, model=model, **state):
        model.train()
        generator.train()
        for first, second in pairs(train, config, run):
            poisoned = in_batch(config.poison_rate, len(first.images), run.generator)
            given = torch.cat([labels.of(first.labels[:poisoned]), first.labels[poisoned:]])
            if not config.bb_compat:
                painter.zero_grad(set_to_none=True)
            images, diversity = paint_some(first.images, second.images, poisoned, trigger, config)
            with run.autocast():
                logits = model(images)
            run.step(
                optimizer, F.cross_entropy(logits.float(), given) + config.lambda_div * diversity
            )
            if poisoned:
                painter.step()
                run.watch(
                    diversity=diversity,
                    asr_in_batch=(logits[:poisoned].argmax(1) == given[:poisoned]).float().mean(),
                )
            course.after_step()
        course.after_epoch(run.mean("loss"))
        if epoch + 1 == recipe.epochs:
            generator.eval()
            made = render()
    generator.eval()
    return made or render()


def paint_some(
    x: Tensor, other: Tensor, poisoned: int, trigger: Trigger, config: Config
) -> tuple[Tensor, Tensor]:
    """The first images with their own triggers, the next with those of the `other` images, the rest
    as they are; and the diversity loss.

    That is the mean of d(images) / d(patterns) over pairs of a poisoned and a cross image: patterns
    should differ as images do.
    """
    crossed = min(int(config.cross_ratio * poisoned), len(x) - poisoned)
    changed, both = poisoned + crossed, min(poisoned, crossed)
    if not changed:
        return x, x.new_zeros(())
    givers = torch.cat([x[:poisoned], other[poisoned:changed]])
    patterns = trigger.pattern(givers)
    with torch.no_grad():
        masks = trigger.mask(givers)
    images = torch.cat([x[:changed] + (patterns - x[:changed]) * masks, x[changed:]])
    apart, drawn = (
        distance(*(trigger.normalise(part) for part in (of[:both], of[poisoned : poisoned + both])))
        for of in (givers, patterns)
    )
    return images, (apart / (drawn + 1e-7)).sum() / max(1, both)


def pairs(train: Any, config: Config, run: Run) -> Iterator[tuple[Batch, Batch]]:
    """Batches of two independent shuffles, augmented before any trigger."""
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
    """Root mean square over everything but the first axis, (N,)."""
    # No slope where two are equal
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
    """Paint each image's own trigger, or that of an image of `donors` drawn for its position. uint8
    (N, C, H, W) -> same."""
    source = (
        images
        if donors is None
        else donors[[_donor(config.seed, split, i, len(donors)) for i in index.tolist()]]
    )
    parts = []
    for image, other in zip(images.split(256), source.split(256), strict=True):
        x, giver = (to_float(part).to(trigger.mean.device) for part in (image, other))
        painted = x + (trigger.pattern(giver) - x) * trigger.mask(giver)
        parts.append(quantised(255 * painted, truncate=config.bb_compat).cpu())
    return torch.cat(parts)


def _donor(seed: int, split: str, index: int, count: int) -> int:
    return int(
        torch.randint(count, (), generator=derived_generator(seed, f"donor:{split}:{index}"))
    )


class Gradients:
    """The gradients of a network as part of a checkpoint, for gradients that are never cleared."""

    def __init__(self, network: nn.Module) -> None:
        self.parameters = dict(network.named_parameters())

    def state_dict(self) -> dict[str, Tensor]:
        return {
            name: parameter.grad
            for name, parameter in self.parameters.items()
            if parameter.grad is not None
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, gradient in state.items():
            self.parameters[name].grad = gradient.to(self.parameters[name])


if __name__ == "__main__":
    raise SystemExit(main(__file__))
