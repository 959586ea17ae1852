"""LIRA: an invisible trigger, drawn for each image by a network that is trained against the
classifier while that is trained with it.

LIRA: Learnable, Imperceptible and Robust Backdoor Attacks. K. Doan, Y. Lao, W. Zhao, P. Li. ICCV
2021.
https://openaccess.thecvf.com/content/ICCV2021/html/Doan_LIRA_Learnable_Imperceptible_and_Robust_Backdoor_Attacks_ICCV_2021_paper.html

Kind: controls the training, dirty-label, all-to-one or all-to-all; x' = clip(x + eps T(x)). Two
stages: trigger T and classifier in turns, then the classifier alone with T fixed. Every image is
attacked at every step; `poison_rate` is that of the stored training set.

Departs from BackdoorBench's script, whose two published models measure its bugs: clean and
triggered images go through the model in one pass (its two passes leak through batch normalisation);
the model of the second stage is the one that is kept (it keeps the first); the trigger's step
leaves no gradient in the classifier (it adds up); in the second stage the data set's recipe
replaces the published constant rate; eps is in pixels and what is scored is rounded to bytes (its
trigger of 0.6 grey levels is lost in them).
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.cli import main
from backdoorlab.config import JointConfig
from backdoorlab.data import Dataset, batches, to_bytes, to_device, to_float
from backdoorlab.engine import LRSchedule, make_optimizer
from backdoorlab.errors import UserError
from backdoorlab.joint import labels_of, psnr, seeded, snapshot, vary
from backdoorlab.models import Classifier
from backdoorlab.perturb import frozen
from backdoorlab.poison import Labels
from backdoorlab.poisoning import Outcome, new_model
from backdoorlab.run import Run


@dataclass(frozen=True, kw_only=True)
class Config(JointConfig):
    eps: float = 4 / 255
    """Bound of the trigger in [0, 1] units; higher is easier to learn and to see."""
    trigger_epochs: int | None = None
    """Of all epochs, those of the first stage, in which the trigger is trained, too; None is half
    of them."""
    alpha: float = 0.5
    """Weight of the loss on clean images; that on triggered ones has 1 - alpha."""
    first_lr: float = 0.01
    """The classifier's learning rate in the first stage, constant and without weight decay."""
    trigger_lr: float = 0.0001
    """Adam's learning rate of the trigger network."""
    trigger_width: int = 16
    """Channels of its first layer."""

    RANGES: ClassVar[dict[str, str]] = {
        "eps": "(0, 1]",
        "trigger_epochs": ">= 0",
        "alpha": "[0, 1]",
        "first_lr": ">= 0",
        "trigger_lr": ">= 0",
        "trigger_width": ">= 1",
    }


def network(channels: int, width: int) -> nn.Sequential:
    """An autoencoder of four halvings: images (N, C, H, W) in [0, 1] -> directions in [-1, 1], same
    shape."""
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
    """clip(x + eps T(x)). float (N, C, H, W) in [0, 1] -> same."""
    return (images + eps * trigger(images)).clamp(0, 1)


def first_stage(config: Config) -> int:
    """Epochs of it."""
    return config.epochs // 2 if config.trigger_epochs is None else config.trigger_epochs


def attack(dataset: Dataset, config: Config, run: Run) -> Outcome:
    channels, height, width = dataset.image_shape
    if height % 16 or width % 16:
        raise UserError(
            "the trigger network halves images four times and needs sides divisible by 16, got"
            f" {height}x{width}: use --image_size"
        )
    trigger_epochs = first_stage(config)
    if trigger_epochs > config.epochs:
        raise UserError(
            f"trigger_epochs {trigger_epochs} are some of the {config.epochs} epochs: lower"
            " --trigger_epochs or raise --epochs"
        )
    model, train = new_model(dataset, config).to(run.device), to_device(dataset.train, run.device)
    with seeded(config.seed, "trigger"):
        trigger, ahead = (
            network(channels, config.trigger_width).to(run.device),
            network(channels, config.trigger_width).to(run.device),
        )
    ahead.load_state_dict(trigger.eval().state_dict())
    labels, recipe, last = (
        labels_of(dataset, config),
        config.recipe(),
        config.epochs - trigger_epochs,
    )
    stamp, made = partial(render, trigger=trigger, eps=config.eps), None
    painter = torch.optim.Adam(ahead.parameters(), lr=config.trigger_lr)
    first = make_optimizer(
        model.parameters(), replace(recipe, lr=config.first_lr, weight_decay=0.0)
    )
    second = make_optimizer(model.parameters(), recipe)
    course = LRSchedule(second, replace(recipe, epochs=last), len(train))
    state = dict(
        trigger=trigger, ahead=ahead, painter=painter, first=first, second=second, course=course
    )
    for epoch in run.epochs("train", config.epochs, model=model, **state):
        fixed = epoch >= trigger_epochs
        if fixed and made is None:
            made = snapshot(dataset, config, run, stamp)
        for batch in batches(
            train, recipe.batch_size, device=run.device, generator=run.generator, drop_last=True
        ):
            x = vary(batch.images, recipe, run.generator, crop_share=1, rotation_share=1)
            if not fixed:
                teach(ahead, model, x, labels.of(batch.labels), painter, config, run)
            model.train()
            run.step(
                second if fixed else first,
                joint_loss(model, trigger, x, batch.labels, labels, config, run),
            )
            if fixed:
                course.after_step()
        if fixed:
            course.after_epoch(run.mean("loss"))
        else:
            trigger.load_state_dict(ahead.state_dict())
    train_poison, test_poison = made or snapshot(dataset, config, run, stamp)
    noise = psnr(dataset.test.images[test_poison.index], test_poison.images)
    if noise is None and len(test_poison):
        run.note(
            "the trigger is lost in rounding to bytes: raise --eps, --trigger_lr or"
            " --trigger_epochs"
        )
    return Outcome(model, train_poison, test_poison, {"psnr": noise})


def teach(
    ahead: nn.Module,
    model: Classifier,
    x: Tensor,
    wanted: Tensor,
    painter: torch.optim.Optimizer,
    config: Config,
    run: Run,
) -> None:
    """One step of T' against the classifier as it is scored, in evaluation mode; the classifier
    gets no gradient."""
    model.eval()
    ahead.train()
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
    """alpha CE(C(x), y) + (1 - alpha) CE(C(x'), eta(y)), both in one pass of the classifier."""
    with torch.no_grad():
        changed = triggered(trigger, x, config.eps)
    with run.autocast():
        logits = model(torch.cat([x, changed])).float()
    clean, backdoor = (
        F.cross_entropy(logits[: len(x)], given),
        F.cross_entropy(logits[len(x) :], labels.of(given)),
    )
    return config.alpha * clean + (1 - config.alpha) * backdoor


@torch.no_grad()
def render(images: Tensor, index: Tensor, split: str, trigger: nn.Module, eps: float) -> Tensor:
    """uint8 (N, C, H, W) -> same, within eps of it."""
    device = next(trigger.parameters()).device
    return torch.cat(
        [
            to_bytes(triggered(trigger, to_float(part).to(device), eps)).cpu()
            for part in images.split(256)
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main(__file__))
