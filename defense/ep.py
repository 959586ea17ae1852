"""EP: entropy-based pruning.

Pre-activation Distributions Expose Backdoor Neurons. R. Zheng, R. Tang, J. Li, L. Liu. NeurIPS
2022 (its other method is BNP, defense/bnp.py). Written from a description of the published code:
the paper itself was not read.

Assumes: the poisoned model, with batch normalisation, and its training set.

The training set has clean and poisoned images. A channel that answers to the trigger has two kinds
of values there, far apart; others have one:
  1. Of each image, take the largest value over positions of what enters batch normalisation.
  2. Standardise it over the images, for each channel. Two kinds far apart make a wide spread, in
     units of which each of them is narrow.
  3. Compute the entropy of the channel's histogram. Narrow peaks have little.
Channels whose entropy lies more than k standard deviations below the mean of their layer are
pruned: their scale becomes 0.

Departs: values are those of all training images; the published code takes one batch of them. A
channel that is the same for all images has no spread to divide by: it is left out of the mean and
is not pruned.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from backdoorlab.cli import main
from backdoorlab.config import DefenseConfig
from backdoorlab.data import Split, to_device
from backdoorlab.record import DefenderView
from backdoorlab.repair.pruning import above, prune, watch_inputs
from backdoorlab.run import Run

ASSUMES = ("model", "train")


@dataclass(frozen=True, kw_only=True)
class Config(DefenseConfig):
    k: float = 3.0
    """Standard deviations below a layer's mean from which on a channel is pruned. Less prunes
    more channels and costs clean accuracy."""
    bin_width: float = 0.01
    """Width of the histogram's bins, in standard deviations of the channel. Wider bins tell fewer
    channels apart."""

    RANGES: ClassVar[dict[str, str]] = {"k": ">= 0", "bin_width": "(0, 10]"}


def defend(view: DefenderView, config: Config, run: Run) -> nn.Module:
    model = view.load_model()
    marked = {}
    for name, peaks in largest(model, to_device(view.train, run.device), run).items():
        varies = peaks.amax(0) > peaks.amin(0)
        marked[name] = torch.zeros_like(varies)
        # Low entropies stand out among their negatives.
        marked[name][varies] = above(-entropies(peaks[:, varies], config.bin_width), config.k)

    count = prune(model, marked)
    run.note(f"{count} of {sum(len(part) for part in marked.values())} channels are pruned")
    return model


def largest(model: nn.Module, split: Split, run: Run) -> dict[str, Tensor]:
    """Compute the largest value over positions of what enters each batch normalisation.

    Returns:
        name -> float32 (N, C), in the memory of the CPU: 4 bytes for each image and channel.
    """
    parts: dict[str, list[Tensor]] = {}

    def see(name: str, x: Tensor) -> None:
        # Vectors, (B, C), have one position.
        parts.setdefault(name, []).append(x[:, :, None].flatten(2).amax(2).float().cpu())

    # In bf16 two numbers that follow each other may be further apart than two bins.
    watch_inputs(model, split, run, see, exact=True)
    return {name: torch.cat(found) for name, found in parts.items()}


def entropies(peaks: Tensor, width: float) -> Tensor:
    """Compute the entropy in nats of each channel's histogram. (N, C) -> float64 (C,).

    Each channel is standardised over the images. All channels of a layer have the same bins, from
    the lowest value of any of them on.
    """
    values = peaks.double()
    values = (values - values.mean(0)) / values.std(0)
    if not values.numel():
        return values.new_zeros(values.shape[1])
    bins = ((values - values.min()) / width).long()

    found = []
    for channel in bins.T:
        # Empty bins add nothing to the entropy.
        share = channel.unique(return_counts=True)[1].double() / len(channel)
        found.append(-(share * share.log()).sum())
    return torch.stack(found)


if __name__ == "__main__":
    raise SystemExit(main(__file__))
