"""FST: feature shift tuning.

Towards Stable Backdoor Purification through Feature Shift Tuning. R. Min, Z. Qin, L. Shen, M.
Cheng. NeurIPS 2023. https://arxiv.org/abs/2310.01875 ; constants of the published code.

Assumes: the poisoned model, with a linear last layer, and a few trusted images.

Fine-tuning leaves features in which triggered and clean images are apart, and so the backdoor. The
last layer begins anew, and is pushed away from the poisoned one, w_orig, which makes the features
shift: the loss is cross-entropy + alpha <w, w_orig>. After each step w gets the length of w_orig
back.

Departs: the last layer is the network's own classifier; the published code looks for a name. A
guard undoes epochs that destroy the model (backdoorlab/repair/guard.py); before the last
epoch it lets the new layer learn.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.cli import main
from backdoorlab.config import DefenseConfig
from backdoorlab.data import to_device
from backdoorlab.models import linear_classifier
from backdoorlab.record import DefenderView
from backdoorlab.repair.finetuning import (
    FinetuneConfig,
    augmented_batches,
    make_cosine,
    make_forward,
    make_sgd,
)
from backdoorlab.repair.guard import guarded_epochs
from backdoorlab.run import Run

ASSUMES = ("model", "trusted")


@dataclass(frozen=True, kw_only=True)
class Config(FinetuneConfig, DefenseConfig):
    epochs: int = 10
    """Passes over the trusted images. More let features shift further."""
    batch_size: int = 128
    """Images a step. Smaller batches take more steps."""
    weight_decay: float = 0.0
    """L2 penalty."""
    alpha: float = 0.2
    """Weight of the inner product with the poisoned last layer. More shifts the features further
    and costs clean accuracy; the authors take 0.001 or 0 for many classes."""
    guard_dip: float = 0.99
    """Share of the attacked model's accuracy on trusted images that may be lost before the last
    epoch: much, because the last layer begins anew."""

    RANGES: ClassVar[dict[str, str]] = {"alpha": ">= 0"}


def defend(view: DefenderView, config: Config, run: Run) -> nn.Module:
    model, trusted = view.load_model(), to_device(view.trusted, run.device)
    last = linear_classifier(model)
    # w_orig, which the new layer is pushed away from.
    original = last.weight.detach().clone()
    optimizer = make_sgd(model, config)
    schedule = make_cosine(optimizer, config.epochs)
    forward = make_forward(model, trusted, config.batch_size, config.epochs, run)

    for epoch in guarded_epochs(
        run, "shift", config.epochs, trusted, config, model, optimizer, schedule
    ):
        # In the first epoch and not before it: the guard measures the attacked model.
        if epoch == 0:
            renew(last, run)
        model.train()
        for batch in augmented_batches(trusted, view, config.batch_size, run):
            loss = F.cross_entropy(forward(batch.images).float(), batch.labels)
            # CE + alpha <w, w_orig>.
            loss = loss + config.alpha * (last.weight * original).sum()
            run.step(optimizer, loss)
            # Of a free length, w could lower the inner product without end.
            rescale(last.weight, original)
        schedule.step()
    return model


@torch.no_grad()
def renew(last: nn.Linear, run: Run) -> None:
    """Draw the last layer anew, uniformly within +- 1 / sqrt(its inputs)."""
    bound = last.in_features**-0.5
    for parameter in last.parameters():
        drawn = torch.rand(parameter.shape, generator=run.generator)
        parameter.copy_(bound * (2 * drawn - 1))


@torch.no_grad()
def rescale(weight: Tensor, original: Tensor) -> None:
    """Give a weight the Euclidean length of another, in place."""
    weight.mul_(original.norm() / weight.norm().clamp_min(1e-12))


if __name__ == "__main__":
    raise SystemExit(main(__file__))
