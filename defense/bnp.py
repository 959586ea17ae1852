"""BNP: batch-normalisation statistics based pruning.

Pre-activation Distributions Expose Backdoor Neurons. R. Zheng, R. Tang, J. Li, L. Liu. NeurIPS
2022 (its other method, EP, is for the training set). Written from a description of the published
code: the paper itself was not read.

Assumes: the poisoned model, with batch normalisation, and a few trusted images.

Running means and variances were taken on poisoned images. A channel that answers to the trigger has
others on clean ones. Each channel is ranked by the Kullback-Leibler divergence of two Gaussians,
the trusted images' and the running one. Those that lie more than k standard deviations above the
mean of their layer are pruned: their scale becomes 0.

Departs: statistics are those of all trusted images; the published code takes one batch of them.
eps is counted in both variances as batch normalisation does, so that a channel that is always the
same has a divergence, too.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from backdoorlab.cli import main
from backdoorlab.config import DefenseConfig
from backdoorlab.data import Split
from backdoorlab.record import DefenderView
from backdoorlab.repair.pruning import above, batch_norms, prune, watch_inputs
from backdoorlab.run import Run

ASSUMES = ("model", "trusted")


@dataclass(frozen=True, kw_only=True)
class Config(DefenseConfig):
    k: float = 3.0
    """Standard deviations above a layer's mean from which on a channel is pruned. Less prunes
    more channels and costs clean accuracy."""

    RANGES: ClassVar[dict[str, str]] = {"k": ">= 0"}


def defend(view: DefenderView, config: Config, run: Run) -> nn.Module:
    model = view.load_model()
    statistics = moments(model, view.trusted, run)
    marked = {}
    for name, norm in batch_norms(model).items():
        assert norm.running_mean is not None and norm.running_var is not None
        if name not in statistics:  # a part of the network that no image passes
            continue
        mean, variance = statistics[name]
        # How far trusted images lie from the running statistics, for each channel.
        moved = divergence(
            mean, variance + norm.eps, norm.running_mean, norm.running_var + norm.eps
        )
        marked[name] = above(moved, config.k)

    count = prune(model, marked)
    run.note(f"{count} of {sum(len(part) for part in marked.values())} channels are pruned")
    return model


@torch.no_grad()
def moments(model: nn.Module, split: Split, run: Run) -> dict[str, tuple[Tensor, Tensor]]:
    """Compute mean and variance of what enters each batch normalisation, in evaluation mode.

    Returns:
        name -> mean and variance, float32 (C,) each, over images and positions.
    """
    sums: dict[str, list[Tensor]] = {}
    counts: dict[str, int] = {}

    def see(name: str, entering: Tensor) -> None:
        # Channels are the second dimension, for maps and for vectors. Float64, for the variance is
        # a difference.
        values = entering.double().movedim(1, 0).flatten(1)
        parts = [values.sum(1), values.square().sum(1)]
        before = sums.get(name, [torch.zeros_like(part) for part in parts])
        sums[name] = [one + other for one, other in zip(before, parts, strict=True)]
        counts[name] = counts.get(name, 0) + values.shape[1]

    watch_inputs(model, split, run, see)
    found = {}
    for name, (total, squares) in sums.items():
        mean = total / counts[name]
        variance = (squares / counts[name] - mean.square()).clamp_min(0)
        found[name] = (mean.float(), variance.float())
    return found


def divergence(mean: Tensor, variance: Tensor, other_mean: Tensor, other: Tensor) -> Tensor:
    """Kullback-Leibler divergence of N(mean, variance) from N(other_mean, other), each (C,)."""
    ratio = (variance + (mean - other_mean).square()) / other
    return ((other / variance).log() + ratio - 1) / 2


if __name__ == "__main__":
    raise SystemExit(main(__file__))
