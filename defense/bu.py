"""BU: backdoor defense by machine unlearning (BAERASER).

Backdoor Defense with Machine Unlearning. Y. Liu, M. Fan, C. Chen, X. Liu, Z. Ma, L. Wang, J. Ma.
INFOCOM 2022. https://arxiv.org/abs/2201.09538 . Its trigger recovery is MESA
(backdoorlab/repair/mesa.py).

Assumes: the poisoned model and a few trusted images.

  1. Recovery: for each class and each level beta, a generator of small patches learns as wide a
     distribution as it can of patches that make the model see that class with probability beta.
  2. Target: the class whose patches work best on trusted images that were kept apart.
  3. Unlearning: ascend the loss of images with its patches, descend that of clean images, and keep
     the weights that matter for clean images where they were.

Departs from the public code, which cannot run (docs/methods/bu.md lists why): the target is
inferred and not given, all is in pixel space, each image has its own position, images of the target
class are left out, the ascent is capped, unlearning does not stop at what the true trigger does on
test images, and a guard undoes passes that destroy the model
(backdoorlab/repair/guard.py). What is ours stands in sections that say so, here and in mesa.py.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.cli import main
from backdoorlab.config import DefenseConfig
from backdoorlab.data import Split, batches, to_bytes, to_device
from backdoorlab.errors import UserError
from backdoorlab.models import trained_weights
from backdoorlab.record import DefenderView
from backdoorlab.repair.guard import GuardConfig, guarded_epochs
from backdoorlab.repair.mesa import RecoveryConfig, hit_rate, recover_triggers, stamp, trigger_shape
from backdoorlab.run import Run

ASSUMES = ("model", "trusted")

CLOSE = 0.1
"""Margin over the second class below which the result doubts its target."""


@dataclass(frozen=True, kw_only=True)
class Config(RecoveryConfig, GuardConfig, DefenseConfig):
    held_out: float = 0.2
    """Share of the trusted images that neither recovery nor unlearning trains on."""
    accept: float = 0.5
    """Share of held-out images that a generator's triggers must turn into its class to be believed.
    Lower values find more triggers, also where there is no backdoor."""
    epochs: int = 10
    """Passes of unlearning over the trusted images."""
    lr: float = 1e-3
    """SGD's learning rate of unlearning."""
    momentum: float = 0.9
    """SGD's momentum."""
    batch_size: int = 128
    """Trusted images a step of unlearning."""
    clean_weight: float = 1.0
    """Weight of the clean loss; the public code has 100, with a rate of 0.0001."""
    ascent_cap: float = -math.log(0.01)
    """Loss of a triggered image at which the ascent ends."""
    penalty: Literal["weighted", "constant"] = "weighted"
    """weighted: |theta - theta0| times the mean |gradient| of the clean loss, computed anew each
    epoch. constant: the same weight for all, as in the code."""
    penalty_weight: float | None = None
    """Weight of the penalty; None is 1 (weighted) or 1e-6 (constant)."""
    train_bn: bool = False
    """Batch statistics in unlearning instead of the poisoned model's."""
    stop_asr: float | None = None
    """Share of held-out images that recovered triggers still turn at which unlearning ends early
    (ours); None: it does not."""

    RANGES: ClassVar[dict[str, str]] = {
        "held_out": "(0, 1)",
        "accept": "[0, 1]",
        "epochs": ">= 0",
        "lr": ">= 0",
        "momentum": ">= 0",
        "batch_size": ">= 1",
        "clean_weight": ">= 0",
        "penalty_weight": ">= 0",
        "stop_asr": "[0, 1]",
    }


def defend(view: DefenderView, config: Config, run: Run) -> nn.Module:
    if not config.levels:
        raise UserError("--levels: expected at least one number in (0, 1], got none")
    model = view.load_model().eval()
    shape = trigger_shape(view.image_shape, config)
    search, held_out = halves(to_device(view.trusted, run.device), view.num_classes, config, run)

    # Step 1: recover triggers of all classes.
    def recover() -> dict[str, Tensor]:
        return recover_triggers(model, search, held_out, shape, view.num_classes, config, run)

    found = run.cached("triggers", recover)
    scores, bank = found["scores"], found["bank"].to(run.device)

    # Step 2: the class whose triggers work best.
    target = infer_target(scores, view.class_names, config, run)
    best = [bank[label, int(scores[label].argmax()), :16] for label in range(view.num_classes)]
    run.picture("triggers", [to_bytes(triggers) for triggers in best])
    if target is None:
        return model

    # Step 3: unlearn with the triggers of all its generators that work.
    accepted = scores[target] >= config.accept
    triggers = bank[target][accepted].flatten(0, 1)
    corners = found["corners"].to(run.device)[target][accepted].flatten(0, 1)
    return unlearn(model, search, held_out, triggers, corners, target, config, run)


def halves(trusted: Split, num_classes: int, config: Config, run: Run) -> tuple[Split, Split]:
    """Split the trusted images into those to train on and those kept apart to judge triggers."""
    missing = sorted(set(range(num_classes)) - set(trusted.labels.tolist()))
    if missing:
        raise UserError(
            "BU tries every class as the target and needs trusted images of each, but there is"
            f" none of {missing[:5]}: give more"
        )
    order = torch.randperm(len(trusted), generator=run.generator)
    kept = max(1, round(config.held_out * len(trusted)))
    if len(trusted) - kept < 2:
        raise UserError(
            f"expected at least 3 trusted images, got {len(trusted)}: change --trusted_ratio or"
            " --trusted_count"
        )
    return trusted.subset(order[kept:]), trusted.subset(order[:kept])


# --- ours: the target is inferred, and doubted


def infer_target(
    scores: Tensor, class_names: tuple[str, ...], config: Config, run: Run
) -> int | None:
    """Choose the class whose triggers turn most held-out images, and say how sure that is.

    Args:
        scores: (K, levels), share of the held-out images that each generator turns into its class.

    Returns:
        the class, or None where no trigger turns the share `accept`.
    """
    best = scores.amax(1)
    target = int(best.argmax())
    others = best.clone()
    # Lower than any share, so that the maximum is that of another class.
    others[target] = -1
    margin = best[target] - others.max()
    order = best.argsort(descending=True).tolist()
    ranking = ", ".join(f"{class_names[label]} {best[label]:.2f}" for label in order)
    run.note(f"recovered triggers turn held-out images into: {ranking} (margin {margin:.2f})")

    if best[target] < config.accept:
        run.note(
            f"no trigger found: none turns {config.accept:g} of the held-out images, so the model"
            " is returned as it was"
        )
        return None
    if margin < CLOSE:
        run.note(
            "another class is as easy a target: these triggers may be any network's weakness rather"
            " than the attacker's"
        )
    return target


# --- 3. unlearning


def unlearn(
    model: nn.Module,
    search: Split,
    held_out: Split,
    triggers: Tensor,
    corners: Tensor,
    target: int,
    config: Config,
    run: Run,
) -> nn.Module:
    """Ascend on triggered images of other classes, descend on clean ones, within the penalty.

    Args:
        model: trained in place.
        triggers, corners: (m, C, h, w) and (m, 2), of which one is drawn for each image.
    """
    weights = trained_weights(model)
    # No two batches have as many triggered images, and each new size would be tuned anew.
    torch.backends.cudnn.benchmark = False
    before = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.SGD(weights, lr=config.lr, momentum=config.momentum, fused=True)
    for _ in guarded_epochs(run, "unlearn", config.epochs, held_out, config, model, optimizer):
        model.eval()
        if config.penalty == "weighted":
            # Which weights clean images need now, and not at the start.
            omega = importance(model, search, config, run)
        else:
            omega = [torch.ones_like(weight) for weight in weights]

        model.train(config.train_bn)
        for batch in batches(search, config.batch_size, device=run.device, generator=run.generator):
            # Images of other classes, each with a trigger of its own.
            other = batch.labels != target
            drawn = torch.randint(len(triggers), (len(other),), generator=run.generator)
            drawn = drawn.to(run.device)
            seen = stamp(batch.images, triggers[drawn], corners[drawn], config)[other]
            with run.autocast():
                logits = model(torch.cat([batch.images, seen])).float()
            clean, triggered = logits.split([len(other), len(seen)])

            # CE of clean images - CE of triggered ones to the target + omega |theta - theta0|.
            learned = F.cross_entropy(clean, batch.labels)
            forgotten = ascent(triggered, target, config)
            moved = distance(weights, before, omega)
            run.step(optimizer, config.clean_weight * learned - forgotten + penalty(config) * moved)
            run.watch(learned=learned, forgotten=forgotten, moved=moved)
        model.eval()
        stop_early(model, held_out, triggers, corners, target, config, run)
    return model


def ascent(logits: Tensor, target: int, config: Config) -> Tensor:
    """Mean cross-entropy to the target of triggered images, logits (m, K), each at most
    `ascent_cap`."""
    wanted = torch.full((len(logits),), target, device=logits.device)
    losses = F.cross_entropy(logits, wanted, reduction="none").clamp_max(config.ascent_cap)
    return losses.sum() / max(1, len(logits))


def distance(weights: list[nn.Parameter], before: list[Tensor], omega: list[Tensor]) -> Tensor:
    """Sum of omega |theta - theta0| over all weights."""
    parts = zip(omega, weights, before, strict=True)
    nothing = torch.zeros((), device=weights[0].device)
    return sum(((m * (w - b).abs()).sum() for m, w, b in parts), nothing)


def penalty(config: Config) -> float:
    """Weight of the penalty."""
    if config.penalty_weight is not None:
        return config.penalty_weight
    return {"weighted": 1.0, "constant": 1e-6}[config.penalty]


def importance(model: nn.Module, search: Split, config: Config, run: Run) -> list[Tensor]:
    """omega: for each weight the mean over batches of |d clean loss / d weight|."""
    weights = trained_weights(model)
    sums, count = [torch.zeros_like(weight) for weight in weights], 0
    for batch in batches(search, config.batch_size, device=run.device):
        with run.autocast():
            logits = model(batch.images)
        loss = F.cross_entropy(logits.float(), batch.labels)
        for total, gradient in zip(sums, torch.autograd.grad(loss, weights), strict=True):
            total += gradient.abs()
        count += 1
    return [total / count for total in sums]


# --- ours: what is left, by recovered triggers on trusted images


def stop_early(
    model: nn.Module,
    held_out: Split,
    triggers: Tensor,
    corners: Tensor,
    target: int,
    config: Config,
    run: Run,
) -> None:
    """Log the share of held-out images that triggers still turn; at most `stop_asr` ends the
    stage."""
    left = hit_rate(model, held_out, triggers, corners, target, config, run).item()
    run.log(left=left)
    if config.stop_asr is not None and left <= config.stop_asr:
        run.end_stage()


if __name__ == "__main__":
    raise SystemExit(main(__file__))
