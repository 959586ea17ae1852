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
from backdoorlab.models import trained_weights
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
    # I_f of the split, and I_D of the whole set, to which the split belongs.
    to_split = importance(model, to_device(forget, run.device), config.batch_size, run)
    to_all = importance(model, to_device(train, run.device), config.batch_size, run)

    changed, weights = 0, trained_weights(model)
    for weight, of_split, of_all in zip(weights, to_split, to_all, strict=True):
        with torch.no_grad():
            # Weights that matter far more to the split than to all are scaled down, none is scaled
            # up.
            scale = factors(of_split, of_all, config.alpha, config.dampening)
            weight.mul_(scale)
            changed += int((scale < 1).sum())
    run.note(f"{changed:,} of {sum(w.numel() for w in weights):,} weights were dampened")
    return model


def factors(to_split: Tensor, to_all: Tensor, alpha: float, dampening: float) -> Tensor:
    """What each weight is multiplied by: min(lambda I_D / I_f, 1) where I_f > alpha I_D, else 1."""
    scale = (dampening * to_all / to_split).clamp_max(1)
    return torch.where(to_split > alpha * to_all, scale, torch.ones_like(scale))


def importance(model: nn.Module, split: Split, batch_size: int, run: Run) -> list[Tensor]:
    """Average the squared gradient of the loss over batches, in evaluation mode.

    Returns:
        the importance of each parameter that a training moves, of its shape.
    """
    weights = trained_weights(model.eval())
    found = [torch.zeros_like(weight) for weight in weights]
    count = 0
    for batch in batches(split, batch_size, device=run.device):
        with run.autocast():
            loss = F.cross_entropy(model(batch.images).float(), batch.labels)
        # Squared after the mean over a batch, as in the authors' code.
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        for sums, gradient in zip(found, gradients, strict=True):
            if gradient is not None:
                sums += gradient.square()
        count += 1
    return [sums / count for sums in found]


if __name__ == "__main__":
    raise SystemExit(main(__file__))
