"""What a frozen model sees in a whole set of images, computed once."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from .data import Split, in_order
from .models import Classifier

if TYPE_CHECKING:
    from .run import Run


class Features(NamedTuple):
    """One row for each sample, float32, on the run's device."""

    pooled: Tensor
    """(N, D): what the last layer sees."""
    early: Tensor
    """(N, 2 C): mean and standard deviation over positions of what the last stage sees."""
    logits: Tensor
    """(N, K)."""
    labels: Tensor
    """int64 (N,), as given."""


@torch.no_grad()
def extract(model: Classifier, split: Split, run: "Run") -> Features:
    """One evaluation-mode pass without augmentation; the model's mode is evaluation afterwards."""
    model.eval()
    seen: list[Tensor] = []
    hook = model.stages()[-2].register_forward_hook(lambda _module, _inputs, output: seen.append(_mean_and_std(output)))
    pooled, logits = [], []
    try:
        for batch in in_order(split, run.device):
            with run.autocast():
                features = model.forward_head(model.forward_features(batch.images), pre_logits=True)
            pooled.append(features.float())
            logits.append(model.get_classifier()(pooled[-1]))
    finally:
        hook.remove()
    return Features(torch.cat(pooled), torch.cat(seen), torch.cat(logits), split.labels.to(run.device))


@torch.no_grad()
def predictions(model: nn.Module, split: Split, run: "Run") -> Tensor:
    """The model's answers on a split, int64 (N,) on the run's device; the model's mode is evaluation afterwards."""
    model.eval()
    found = []
    for batch in in_order(split, run.device):
        with run.autocast():
            found.append(model(batch.images).argmax(1))
    return torch.cat(found)


def _mean_and_std(x: Tensor) -> Tensor:
    """Feature maps (N, C, H, W), or (N, H, W, C) as in Swin, or tokens (N, T, C) -> (N, 2 C)."""
    x = x.float()
    if x.dim() == 4 and x.shape[1] == x.shape[2] != x.shape[3]:  # (N, H, W, C)
        positions: tuple[int, ...] = (1, 2)
    elif x.dim() == 4:
        positions = (2, 3)
    elif x.dim() == 3:
        positions = (1,)
    else:
        return torch.cat([x, torch.zeros_like(x)], 1)
    return torch.cat([x.mean(positions), x.std(positions, correction=0)], 1)
