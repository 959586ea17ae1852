"""ASD: training on an adaptively split poisoned data set.

Backdoor Defense via Adaptively Splitting Poisoned Dataset. K. Gao, Y. Bai, J. Gu, Y. Yang, S.-T.
Xia. CVPR 2023. https://arxiv.org/abs/2303.12993 ; the constants are those of the published code.

Assumes: the poisoned training set and a few of its samples, of each class, known to be clean. A
training-time defense: the model is trained from scratch.

Each epoch the set is split anew into a clean pool, whose labels are trusted, and the rest, whose
labels are dropped; then MixMatch (Berthelot et al., NeurIPS 2019) trains on both. The clean pool is
  1. in stage 1 the seeds, and a growing number of each label's samples of lowest loss,
  2. in stage 2 the half of all samples of lowest loss,
  3. in stage 3 the half whose loss falls least when a copy of the model learns the whole set for an
     epoch: poison is learnt fast.

Departs from the published code, effects in docs/methods/asd.md: split losses are taken in
evaluation mode on images as they are, the same for the model and its copy; the copy learns its late
layers only and its early statistics stay; a step's guess is one forward pass in place of two, its
mixed batch one in place of three on interleaved parts, and each moves the running batch statistics
as far as those would.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from backdoorlab.cli import main
from backdoorlab.config import SeedsConfig
from backdoorlab.data import Batch, Split, batches, in_order, to_device
from backdoorlab.engine import Forward
from backdoorlab.errors import UserError
from backdoorlab.features import adapted
from backdoorlab.models import Classifier
from backdoorlab.record import DefenderView
from backdoorlab.run import Run

ASSUMES = ("train", "seeds")

GUESS_PASSES, MIXED_PASSES = 2, 3
"""Forward passes of the published code in one step; running batch statistics move in each."""


@dataclass(frozen=True, kw_only=True)
class Config(SeedsConfig):
    stage1_epochs: int = 60
    """Epochs of the class-aware split."""
    stage2_epochs: int = 30
    """Epochs of the split by loss alone."""
    stage3_epochs: int = 30
    """Epochs of the meta-split."""
    iterations: int = 1024
    """Steps an epoch."""
    batch_size: int = 64
    """Images a step from the clean pool, and as many, seen twice, from the rest."""
    grow: int = 10
    """Stage 1: samples of each label that join the clean pool every `grow_every` epochs."""
    grow_every: int = 5
    """Stage 1: epochs between two growths of the clean pool."""
    clean_share: float = 0.5
    """Stages 2 and 3: share of the set that is the clean pool. More gives more labels to learn
    from, and more poison among them."""
    balanced: bool = False
    """Stages 2 and 3 (ours): take that share of each label, so that hard classes keep theirs. More
    poison of the target gets in where it is less than half of its label."""
    reestimate: bool = False
    """Draw the splits (ours) with batch statistics of the training images in place of the running
    ones, of which mixed images are a part."""
    lr: float = 0.002
    """Adam's learning rate."""
    lr_decay: bool = False
    """Let lr fall linearly to 0 over all epochs; the published code keeps it constant."""
    meta_lr: float = 0.015
    """Stage 3: Adam's learning rate of the copy."""
    meta_batch_size: int = 128
    """Stage 3: images a step of the copy."""
    temperature: float = 0.5
    """MixMatch: sharpening of guessed labels; lower makes them surer, 1 leaves them."""
    mix_alpha: float = 0.75
    """MixMatch: l ~ Beta(mix_alpha, mix_alpha)."""
    lambda_u: float = 15.0
    """MixMatch: weight of the unlabelled loss at the end; it grows from 0 linearly."""

    RANGES: ClassVar[dict[str, str]] = {
        "stage1_epochs": ">= 0",
        "stage2_epochs": ">= 0",
        "stage3_epochs": ">= 0",
        "iterations": ">= 1",
        "batch_size": ">= 1",
        "grow": ">= 0",
        "grow_every": ">= 1",
        "clean_share": "(0, 1)",
        "lr": ">= 0",
        "meta_lr": ">= 0",
        "meta_batch_size": ">= 1",
        "temperature": "> 0",
        "mix_alpha": "> 0",
        "lambda_u": ">= 0",
    }


def defend(view: DefenderView, config: Config, run: Run) -> nn.Module:
    train, seeds, model = to_device(view.train, run.device), view.seeds, view.new_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)

    total = config.stage1_epochs + config.stage2_epochs + config.stage3_epochs
    steps = max(1, total * config.iterations)
    forward = Forward(
        model.train(), run, train, steps, 2 * config.batch_size, 3 * config.batch_size
    )
    schedule = torch.optim.lr_scheduler.LinearLR(
        optimizer, 1.0, 0.0 if config.lr_decay else 1.0, total_iters=steps
    )
    for epoch in run.epochs("train", total, model=model, optimizer=optimizer, schedule=schedule):
        # The split of this epoch.
        clean, suspicion = clean_pool(epoch, model, train, seeds, view, config, run)
        rest = ~clean
        if not clean.any() or not rest.any():
            empty = "clean pool (D_C)" if rest.any() else "unlabelled pool (D_P)"
            raise UserError(
                f"the {empty} of epoch {epoch} is empty: give more --seeds_per_class, or another"
                " --clean_share, --grow or --grow_every"
            )
        run.report_split(rest, suspicion=suspicion)

        # MixMatch on both parts; the weight of the unlabelled one grows from 0 over all epochs.
        model.train()
        for step, (x, u1, u2) in enumerate(triples(train, clean, view, config, run)):
            weight = config.lambda_u * min(1.0, (epoch + step / config.iterations) / total)
            loss = mixmatch(forward, model, x, u1, u2, weight, view.num_classes, config, run)
            run.step(optimizer, loss)
            schedule.step()
    return model


# --- the split


def clean_pool(
    epoch: int,
    model: Classifier,
    train: Split,
    seeds: Tensor,
    view: DefenderView,
    config: Config,
    run: Run,
) -> tuple[Tensor, Tensor]:
    """Choose D_C of an epoch.

    Args:
        epoch: from 0, over all stages.
        seeds: int64 (S,), samples known to be clean.

    Returns:
        bool (N,), D_C; and float (N,), whose lowest values it has.
    """
    labels = train.labels.cpu()
    model = adapted(model, train, run) if config.reestimate else model
    losses = split_losses(model, train, run)

    # Stage 1, the class-aware split.
    if epoch < config.stage1_epochs:
        count = config.grow * (epoch // config.grow_every)
        return class_aware(losses, labels, seeds, count, view.num_classes), losses

    # Stage 2, the split by loss alone.
    if epoch < config.stage1_epochs + config.stage2_epochs:
        return lowest(losses, labels, config), losses

    # Stage 3, the meta-split: how much a copy's loss falls in an epoch.
    learned = learned_copy(model, train, view, config, run)
    learned = adapted(learned, train, run) if config.reestimate else learned
    gained = losses - split_losses(learned, train, run)
    return lowest(gained, labels, config), gained


def class_aware(
    losses: Tensor, labels: Tensor, seeds: Tensor, count: int, num_classes: int
) -> Tensor:
    """bool (N,): the seeds, and of each label the `count` other samples of lowest loss.

    losses (N,), labels (N,), seeds int64 (S,).
    """
    pool = torch.zeros(len(losses), dtype=torch.bool)
    pool[seeds] = True
    for label in range(num_classes):
        members = ((labels == label) & ~pool).nonzero().squeeze(1)
        pool[members[losses[members].argsort()[:count]]] = True
    return pool


def lowest(values: Tensor, labels: Tensor, config: Config) -> Tensor:
    """bool (N,): the `clean_share` of the set, or of each label, with the lowest values (N,)."""
    pool, order = torch.zeros(len(values), dtype=torch.bool), values.argsort()
    parts = [order]
    if config.balanced:
        parts = [order[labels[order] == label] for label in labels.unique()]
    for part in parts:
        pool[part[: int(config.clean_share * len(part))]] = True
    return pool


@torch.no_grad()
def split_losses(model: Classifier, train: Split, run: Run) -> Tensor:
    """(N,) on the CPU: symmetric cross-entropy of each image without augmentation, in evaluation
    mode."""
    model.eval()
    found = []
    for batch in in_order(train, run.device):
        with run.autocast():
            logits = model(batch.images)
        found.append(symmetric_cross_entropy(logits.float(), batch.labels))
    return torch.cat(found).cpu()


def symmetric_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,): 0.1 CE + RCE (Wang et al., ICCV 2019), with log 0 taken as log 1e-4, so that RCE is
    9.21 (1 - p_y)."""
    p_y = logits.softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)
    return 0.1 * F.cross_entropy(logits, labels, reduction="none") - math.log(1e-4) * (1 - p_y)


def late_layers(model: Classifier) -> nn.ModuleList:
    """All that comes after the third-last stage: of a ResNet layer3, layer4 and the last layer."""
    # By position, because a VGG's stages are poolings, which have no weights.
    modules = list(model.network.modules())
    early = set(model.stages()[-3].modules())
    return nn.ModuleList(
        modules[1 + max(place for place, module in enumerate(modules) if module in early) :]
    )


def learned_copy(
    model: Classifier, train: Split, view: DefenderView, config: Config, run: Run
) -> Classifier:
    """theta': a copy after an epoch on the whole set as labelled; its late layers learn."""
    # Early layers stay, with their statistics.
    learned = copy.deepcopy(model).requires_grad_(False).eval()
    late = late_layers(learned).requires_grad_(True).train()
    optimizer = torch.optim.Adam(late.parameters(), lr=config.meta_lr, fused=True)

    forward = Forward(
        learned, run, train, len(train) // config.meta_batch_size, config.meta_batch_size
    )
    for batch in batches(
        train,
        config.meta_batch_size,
        device=run.device,
        generator=run.generator,
        augment=view.augment,
    ):
        loss = F.cross_entropy(forward(batch.images).float(), batch.labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        run.watch(meta_loss=loss)
    return learned


# --- MixMatch


def triples(
    train: Split, clean: Tensor, view: DefenderView, config: Config, run: Run
) -> Iterator[tuple[Batch, Batch, Batch]]:
    """Draw an epoch's batches: x from the clean pool, bool (N,), and u1, u2, the same images of the
    rest, each augmented on its own."""
    # Each stream draws its own crops and flips, the two of the rest in the same order.
    count = config.iterations * config.batch_size
    labelled, unlabelled = (
        endless(pool.nonzero().squeeze(1), count, run.generator) for pool in (clean, ~clean)
    )

    streams = [
        batches(
            train,
            config.batch_size,
            device=run.device,
            generator=run.generator,
            augment=view.augment,
            order=order,
        )
        for order in (labelled, unlabelled, unlabelled)
    ]
    return zip(*streams, strict=True)


def endless(pool: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """int64 (count,): the pool in one random order after another."""
    rounds = -(-count // len(pool))
    return torch.cat([pool[torch.randperm(len(pool), generator=generator)] for _ in range(rounds)])[
        :count
    ]


def mixmatch(
    forward: Callable[[Tensor], Tensor],
    model: nn.Module,
    x: Batch,
    u1: Batch,
    u2: Batch,
    weight: float,
    num_classes: int,
    config: Config,
    run: Run,
) -> Tensor:
    """Compute the loss of a step.

    Args:
        forward: images -> logits.
        model: what `forward` passes them through.
        x: labelled images; u1, u2: unlabelled images, augmented twice.
        weight: of the unlabelled part.

    Returns:
        cross-entropy of the mixed labelled images, plus `weight` times the squared error of the
        others.
    """
    # Guess labels: the sharpened mean of the predictions on both augmentations.
    with torch.no_grad(), statistics_of(model, GUESS_PASSES):
        guess = forward(torch.cat([u1.images, u2.images])).float().softmax(1).chunk(2)
    guessed = sharpen((guess[0] + guess[1]) / 2, config.temperature)

    # MixUp of each image with another of all, the larger share its own.
    images = torch.cat([x.images, u1.images, u2.images])
    targets = torch.cat([F.one_hot(x.labels, num_classes).float(), guessed, guessed])
    share = beta(config.mix_alpha, run.generator)
    share = max(share, 1 - share)
    other = torch.randperm(len(images), generator=run.generator).to(run.device)
    images = torch.lerp(images[other], images, share)
    targets = torch.lerp(targets[other], targets, share)

    # L_x + weight L_u, in one pass of all images.
    with statistics_of(model, MIXED_PASSES):
        log_p, n = forward(images).float().log_softmax(1), len(x.labels)
    labelled = -(targets[:n] * log_p[:n]).sum(1).mean()
    unlabelled = (log_p[n:].exp() - targets[n:]).square().mean()
    run.watch(labelled=labelled, unlabelled=unlabelled)
    return labelled + weight * unlabelled


@contextlib.contextmanager
def statistics_of(model: nn.Module, passes: int) -> Iterator[None]:
    """Let one forward pass move the running batch statistics as far as `passes` passes would.

    The published passes see parts of the batch, whose statistics are alike.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    running = [(x, m.momentum or 0.1) for m in norms for x in m.buffers() if x.is_floating_point()]
    before = [x.clone() for x, _ in running]
    yield

    # A pass moves them by the share m towards the batch's, n passes by 1 - (1 - m)^n. Set after the
    # pass, and not by another momentum, because a CUDA graph keeps the momentum of its capture;
    # through `data`, because the backward pass of the batch must not see a change.
    for (now, m), was in zip(running, before, strict=True):
        now.data.copy_(torch.lerp(was, now, (1 - (1 - m) ** passes) / m))


def sharpen(p: Tensor, temperature: float) -> Tensor:
    """(B, K): p^(1/T), normalised."""
    powered = p ** (1 / temperature)
    return powered / powered.sum(1, keepdim=True)


def beta(alpha: float, generator: torch.Generator) -> float:
    """Draw from Beta(alpha, alpha), by Johnk's method, which needs uniform numbers only."""
    while True:
        u, v = torch.rand(2, generator=generator, dtype=torch.float64).pow(1 / alpha).tolist()
        if 0 < u + v <= 1:
            return float(u / (u + v))


if __name__ == "__main__":
    raise SystemExit(main(__file__))
