"""LIRA: a network learns an invisible trigger for each image.

LIRA: Learnable, Imperceptible and Robust Backdoor Attacks. K. Doan, Y. Lao, W. Zhao, P. Li. ICCV
2021.
https://openaccess.thecvf.com/content/ICCV2021/html/Doan_LIRA_Learnable_Imperceptible_and_Robust_Backdoor_Attacks_ICCV_2021_paper.html

Kind: training-controlled, dirty-label, all-to-one or all-to-all. The triggered image is
x' = clip(x + eps T(x)). Every image is attacked at every step; `poison_rate` is that of the stored
training set.

Two stages:
  1. Trigger network T and classifier are trained in turns.
  2. The classifier is trained alone, with T fixed.

Departs from BackdoorBench's script, whose two published models show its bugs:
  - Clean and triggered images go through the model in one pass. In two passes, batch statistics
    tell them apart.
  - The model of the second stage is kept; there it is that of the first.
  - The step of the trigger network leaves no gradient in the classifier; there they add up.
  - In the second stage the data set's learning-rate schedule replaces the published constant rate.
  - eps is in [0, 1] units of pixels, and scored images are rounded to bytes. There the trigger has
    0.6 grey levels, and rounding removes it.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.cli import main
from backdoorlab.config import JointConfig
from backdoorlab.data import Dataset, Split, batches, to_bytes, to_device, to_float
from backdoorlab.device import seeded
from backdoorlab.engine import LRSchedule, make_optimizer
from backdoorlab.errors import UserError
from backdoorlab.joint import labels_of, snapshot, vary
from backdoorlab.models import Classifier
from backdoorlab.perturb import frozen
from backdoorlab.poison import Labels, Poison, changed_share
from backdoorlab.poisoning import Outcome, new_model
from backdoorlab.run import Run


@dataclass(frozen=True, kw_only=True)
class Config(JointConfig):
    eps: float = 4 / 255
    """Largest change of a value by the trigger, in [0, 1] units; higher is easier to learn and to
    see."""
    trigger_epochs: int | None = None
    """Epochs of the first stage, which also trains the trigger, out of --epochs; more adapt the
    trigger better and leave fewer for the second stage. None: half of them."""
    alpha: float = 0.5
    """Weight of the loss on clean images, in [0, 1]; higher favours clean accuracy. The loss on
    triggered images has the weight 1 - alpha."""
    first_lr: float = 0.01
    """Learning rate of the classifier in the first stage, constant and without weight decay; higher
    learns faster and may diverge."""
    trigger_lr: float = 0.0001
    """Learning rate of Adam for the trigger network; higher learns faster and may diverge."""
    trigger_width: int = 16
    """Channels of the first layer of the trigger network; more cost more time."""

    RANGES: ClassVar[dict[str, str]] = {
        "eps": "(0, 1]",
        "trigger_epochs": ">= 0",
        "alpha": "[0, 1]",
        "first_lr": ">= 0",
        "trigger_lr": ">= 0",
        "trigger_width": ">= 1",
    }


def network(channels: int, width: int) -> nn.Sequential:
    """Build the trigger network, an autoencoder of four halvings.

    It maps images (N, C, H, W) in [0, 1] to directions in [-1, 1] of the same shape.
    """
    widths = [channels, width, 2 * width, 4 * width, 8 * width]
    layers: list[nn.Module] = []
    for k in range(4):
        layers += [
            nn.Conv2d(widths[k], widths[k + 1], 4, 2, 1),
            nn.BatchNorm2d(widths[k + 1]),
            nn.ReLU(),
        ]
    for k in (3, 2, 1):
        layers += [
            nn.ConvTranspose2d(widths[k + 1], widths[k], 4, 2, 1),
            nn.BatchNorm2d(widths[k]),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.ConvTranspose2d(width, channels, 4, 2, 1), nn.Tanh())


def triggered(trigger: nn.Module, images: Tensor, eps: float) -> Tensor:
    """Return clip(x + eps T(x)). float (N, C, H, W) in [0, 1] -> same."""
    return (images + eps * trigger(images)).clamp(0, 1)


def first_stage(config: Config) -> int:
    """Return the number of epochs of the first stage."""
    return config.epochs // 2 if config.trigger_epochs is None else config.trigger_epochs


def attack(dataset: Dataset, config: Config, run: Run) -> Outcome:
    """Train trigger network and classifier in turns, then the classifier alone."""
    refuse_unfit(dataset, config)
    channels = dataset.image_shape[0]
    model, train = new_model(dataset, config).to(run.device), to_device(dataset.train, run.device)
    # The classifier sees the trigger network of the last epoch; its copy `ahead` is trained.
    with seeded(config.seed, "trigger"):
        trigger = network(channels, config.trigger_width).to(run.device)
        ahead = network(channels, config.trigger_width).to(run.device)
    ahead.load_state_dict(trigger.eval().state_dict())

    made = train_in_turns(model, trigger, ahead, train, dataset, config, run)
    stamp = partial(render, trigger=trigger, eps=config.eps)
    train_poison, test_poison = made or snapshot(dataset, config, run, stamp)

    # A trigger of less than half a grey level does not survive rounding to bytes.
    if changed_share(dataset.test, test_poison) == 0:
        run.note(
            "the trigger is lost in rounding to bytes: raise --eps, --trigger_lr or"
            " --trigger_epochs"
        )
    return Outcome(model, train_poison, test_poison)


def refuse_unfit(dataset: Dataset, config: Config) -> None:
    """Raise a `UserError` for images that cannot be halved, or a first stage that is too long."""
    _, height, width = dataset.image_shape
    if height % 16 or width % 16:
        raise UserError(
            "the trigger network halves images four times and needs sides divisible by 16, got"
            f" {height}x{width}: use --image_size"
        )
    trigger_epochs = first_stage(config)
    if trigger_epochs > config.epochs:
        raise UserError(
            f"trigger_epochs must be at most epochs, got {trigger_epochs} of {config.epochs}: lower"
            " --trigger_epochs or raise --epochs"
        )


def train_in_turns(
    model: Classifier,
    trigger: nn.Module,
    ahead: nn.Module,
    train: Split,
    dataset: Dataset,
    config: Config,
    run: Run,
) -> tuple[Poison, Poison] | None:
    """Run both stages.

    Args:
        model: the classifier.
        trigger: the trigger network T that the classifier sees.
        ahead: the trigger network T' that is trained; T becomes T' after each epoch of stage 1.
        train: the clean training set, on the device if it fits there.
        dataset: the clean data.
        config: the options.
        run: the run.

    Returns:
        The snapshot that was made before the second stage; None without such a stage.
    """
    labels, recipe = labels_of(dataset, config), config.recipe()
    trigger_epochs = first_stage(config)
    last = config.epochs - trigger_epochs
    stamp, made = partial(render, trigger=trigger, eps=config.eps), None
    painter = torch.optim.Adam(ahead.parameters(), lr=config.trigger_lr)
    # Stage 1 has a constant rate and no weight decay, stage 2 the data set's own recipe.
    first_recipe = replace(recipe, lr=config.first_lr, weight_decay=0.0)
    first = make_optimizer(model, first_recipe)
    second = make_optimizer(model, recipe)
    schedule = LRSchedule(second, replace(recipe, epochs=last), len(train))
    state = dict(
        trigger=trigger, ahead=ahead, painter=painter, first=first, second=second, schedule=schedule
    )

    for epoch in run.epochs("train", config.epochs, model=model, **state):
        # From the second stage on T is final: the snapshot can be made and scored.
        fixed = epoch >= trigger_epochs
        if fixed and made is None:
            made = snapshot(dataset, config, run, stamp)
        for batch in batches(
            train, recipe.batch_size, device=run.device, generator=run.generator, drop_last=True
        ):
            x = vary(batch.images, recipe, run.generator, crop_share=1, rotation_share=1)
            # Stage 1, first turn: T' learns to fool this classifier.
            if not fixed:
                teach(ahead, model, x, labels.of(batch.labels), painter, config, run)
            # Second turn, and all of stage 2: the classifier learns on T, not T'.
            model.train()
            loss = joint_loss(model, trigger, x, batch.labels, labels, config, run)
            run.step(second if fixed else first, loss)
            if fixed:
                schedule.after_step()
        if fixed:
            schedule.after_epoch(run.mean("loss"))
        else:
            trigger.load_state_dict(ahead.state_dict())
    return made


def teach(
    ahead: nn.Module,
    model: Classifier,
    x: Tensor,
    wanted: Tensor,
    painter: torch.optim.Optimizer,
    config: Config,
    run: Run,
) -> None:
    """Make one step of the trigger network T' towards the attacker's labels.

    The classifier is in evaluation mode, as it is scored, and gets no gradient.

    Args:
        ahead: the trigger network T'.
        model: the classifier.
        x: float (N, C, H, W) in [0, 1], clean images.
        wanted: int64 (N,), the attacker's labels.
        painter: the optimizer of T'.
        config: eps.
        run: for the precision and the history.
    """
    model.eval()
    ahead.train()
    # Frozen, so that this step leaves no gradient in the classifier.
    with frozen(model), run.autocast():
        logits = model(triggered(ahead, x, config.eps))
    loss = F.cross_entropy(logits.float(), wanted)
    painter.zero_grad(set_to_none=True)
    loss.backward()
    painter.step()
    run.watch(trigger_loss=loss)


def joint_loss(
    model: Classifier,
    trigger: nn.Module,
    x: Tensor,
    given: Tensor,
    labels: Labels,
    config: Config,
    run: Run,
) -> Tensor:
    """Return alpha CE(C(x), y) + (1 - alpha) CE(C(x'), eta(y)), in one pass of the classifier C.

    Args:
        model: the classifier C.
        trigger: the trigger network, which gets no gradient.
        x: float (N, C, H, W) in [0, 1], the clean images.
        given: int64 (N,), their labels y.
        labels: the attacker's labels eta.
        config: eps and alpha.
        run: for the precision.

    Returns:
        The loss, a scalar.
    """
    with torch.no_grad():
        changed = triggered(trigger, x, config.eps)
    with run.autocast():
        # One pass: in two, batch statistics tell clean and triggered images apart.
        logits = model(torch.cat([x, changed])).float()
    clean = F.cross_entropy(logits[: len(x)], given)
    backdoor = F.cross_entropy(logits[len(x) :], labels.of(given))
    return config.alpha * clean + (1 - config.alpha) * backdoor


@torch.no_grad()
def render(images: Tensor, index: Tensor, split: str, trigger: nn.Module, eps: float) -> Tensor:
    """Add each image's trigger.

    Args:
        images: uint8 (N, C, H, W).
        index: not used; the trigger depends on the image alone.
        split: not used.
        trigger: the trigger network.
        eps: largest change of a value in [0, 1] units.

    Returns:
        uint8 (N, C, H, W).
    """
    device = next(trigger.parameters()).device
    parts = (to_float(part).to(device) for part in images.split(256))
    return torch.cat([to_bytes(triggered(trigger, part, eps)).cpu() for part in parts])


if __name__ == "__main__":
    raise SystemExit(main(__file__))
