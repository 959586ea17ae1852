"""FP: fine-pruning of channels that clean images leave dormant.

Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks. K. Liu, B.
Dolan-Gavitt, S. Garg. RAID 2018. https://arxiv.org/abs/1805.12185

Assumes: the poisoned model, with a linear last layer, and a few trusted images.

  1. Rank the channels of the last layer's input by their mean size on trusted images.
  2. Prune them from the smallest on, a hundredth of all at a time, until trusted images that were
     not ranked by lose more than `tolerance`; keep the last step before.
  3. Fine-tune all weights on all trusted images; what is pruned stays so.

Settings as in BackdoorBench: a loss of a tenth of the accuracy, then 100 epochs as in its
fine-tuning.

Departs: the loss of accuracy is measured on half of the trusted images; BackdoorBench's is on the
test images, and the network that it keeps is the first beyond the limit, for all its steps are one
object. All images are fine-tuned on. Pooled features of some networks may be negative
(pre-activation networks have no ReLU before the pooling): a channel's size is the absolute value.
A guard undoes epochs that destroy the model (backdoorlab/repair/guard.py).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from backdoorlab.cli import main
from backdoorlab.config import DefenseConfig
from backdoorlab.data import to_device
from backdoorlab.features import extract
from backdoorlab.models import Classifier, linear_classifier
from backdoorlab.record import DefenderView
from backdoorlab.repair.finetuning import FinetuneConfig, finetune
from backdoorlab.repair.pruning import furthest
from backdoorlab.run import Run

ASSUMES = ("model", "trusted")


@dataclass(frozen=True, kw_only=True)
class Config(FinetuneConfig, DefenseConfig):
    prune_step: float = 0.01
    """Share of the channels that is pruned at a time."""
    tolerance: float = 0.1
    """Share of the accuracy on trusted images that pruning may cost. More prunes more channels."""

    RANGES: ClassVar[dict[str, str]] = {"prune_step": "(0, 1]", "tolerance": "[0, 1)"}


def defend(view: DefenderView, config: Config, run: Run) -> nn.Module:
    model, trusted = view.load_model(), to_device(view.trusted, run.device)
    last = linear_classifier(model)
    pruned = run.cached("pruned", lambda: {"channels": dormant(model, last, view, config, run)})
    kept = ~pruned["channels"].to(run.device)
    run.note(f"{int((~kept).sum())} of {len(kept)} channels are pruned")

    # A column of 0 is a channel that the last layer does not see.
    @torch.no_grad()
    def keep_pruned() -> None:
        last.weight.mul_(kept)

    keep_pruned()
    # Step 3: fine-tuning would move the pruned columns, so each step ends by clearing them.
    return finetune(model, trusted, view, config, run, after_step=keep_pruned)


@torch.no_grad()
def dormant(
    model: Classifier, last: nn.Linear, view: DefenderView, config: Config, run: Run
) -> Tensor:
    """Choose the channels to prune, bool (D,), by two halves of the trusted images."""
    # One half of the trusted images ranks the channels (step 1), the other one judges how many may
    # go (step 2).
    features = extract(model, view.trusted, run)
    order = torch.randperm(len(view.trusted), generator=run.generator).to(run.device)
    ranked_by, held_out = order.chunk(2) if len(order) > 1 else (order, order)
    ranking = by_size(features.pooled[ranked_by])
    count = len(ranking)

    # Step k leaves out the smallest k hundredths; at least one channel stays.
    def pruned(step: int) -> Tensor:
        return ranking[: min(round(step * config.prune_step * count), count - 1)]

    def accuracy(step: int) -> float:
        left = features.pooled[held_out].clone()
        left[:, pruned(step)] = 0
        right = last(left).argmax(1) == features.labels[held_out]
        return right.double().mean().item()

    step = furthest(round(1 / config.prune_step), accuracy, config.tolerance)
    found = torch.zeros(count, dtype=torch.bool, device=run.device)
    found[pruned(step)] = True
    return found


def by_size(pooled: Tensor) -> Tensor:
    """Rank channels by their mean absolute value, the smallest first. (N, D) -> int64 (D,)."""
    return pooled.abs().mean(0).argsort(stable=True)


if __name__ == "__main__":
    raise SystemExit(main(__file__))
