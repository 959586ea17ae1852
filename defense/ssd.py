"""SSD: selective synaptic dampening, which scales down the weights that matter to the split alone.

Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening, J. Foster, S.
Schoepf and A. Brintrup, AAAI 2024, https://arxiv.org/abs/2308.07707. The importance of a weight is
the mean over batches of its squared gradient, as in the authors' code (the paper: the diagonal of
the Fisher information). alpha 10 and lambda 1 are theirs.

Assumes: the poisoned model, its training set and a split of it (`--split`). Nothing is trained.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.cli import main
from backdoorlab.config import SplitConfig
from backdoorlab.data import Split, batches, to_device
from backdoorlab.record import DefenderView
from backdoorlab.run import Run

ASSUMES = ("model", "train", "split")


@dataclass(frozen=True, kw_only=True)
class Config(SplitConfig):
    alpha: float = 10.0
    """Weights are dampened whose importance to the split exceeds alpha times that to the whole set;
    higher dampens fewer weights."""
    dampening: float = 1.0
    """lambda: what a dampened weight is multiplied by, times its importance to the whole set over
    that to the split; higher dampens less."""
    batch_size: int = 64
    """Images of which a gradient is squared. Many average the images' own gradients out."""

    RANGES: ClassVar[dict[str, str]] = {"alpha": "> 0", "dampening": ">= 0", "batch_size": ">= 1"}


def defend(view: DefenderView, config: Config, run: Run) -> nn.Module:
    model, train = view.load_model(), view.train
    forget = train.subset(view.split.nonzero().squeeze(1))
    to_split = importance(model, to_device(forget, run.device), config.batch_size, run)
    to_all = importance(model, to_device(train, run.device), config.batch_size, run)

    changed = 0
    for name, weight in model.named_parameters():
        with torch.no_grad():
            scale = factors(to_split[name], to_all[name], config.alpha, config.dampening)
            weight.mul_(scale)
            changed += int((scale < 1).sum())
    run.note(f"{changed:,} of {sum(p.numel() for p in model.parameters()):,} weights were dampened")
    return model


def factors(to_split: Tensor, to_all: Tensor, alpha: float, dampening: float) -> Tensor:
    """What each weight is multiplied by: min(lambda I_D / I_f, 1) where I_f > alpha I_D, else 1."""
    scale = (dampening * to_all / to_split).clamp_max(1)
    return torch.where(to_split > alpha * to_all, scale, torch.ones_like(scale))


def importance(model: nn.Module, split: Split, batch_size: int, run: Run) -> dict[str, Tensor]:
    """Average the squared gradient of the loss over batches, in evaluation mode.

    Returns:
        name of a parameter -> its importance, of its shape.
    """
    model.eval()
    found = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
    count = 0
    for batch in batches(split, batch_size, device=run.device):
        with run.autocast():
            loss = F.cross_entropy(model(batch.images).float(), batch.labels)
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        for sums, gradient in zip(found.values(), gradients, strict=True):
            if gradient is not None:
                sums += gradient.square()
        count += 1
    return {name: sums / count for name, sums in found.items()}


if __name__ == "__main__":
    raise SystemExit(main(__file__))
