"""Every class as the target: what methods share that recover triggers of all classes side by side.

Each trigger aims at a class, and all of them are shown the same images. Images of a trigger's own
class do not count, for they need no trigger.
"""

import torch
from torch import Tensor

AT_ONCE = {"cuda": 4096, "cpu": 512}
"""Images in one pass of the model, at most, unless a single trigger has more."""


def parts(count: int, images: int, device: torch.device) -> tuple[Tensor, ...]:
    """Split the numbers of `count` triggers, with `images` images each, so that memory does not
    grow with the number of classes."""
    at_once = max(1, AT_ONCE.get(device.type, AT_ONCE["cpu"]) // images)
    return torch.arange(count).split(at_once)


def of_others(labels: Tensor, wanted: Tensor) -> Tensor:
    """Mark, by 1, the images of other classes than those that triggers aim at.

    Args:
        labels: int64 (n,), of the images.
        wanted: int64 (g,), the class of each trigger.

    Returns:
        float (g, n).
    """
    return (labels[None] != wanted[:, None]).float()


def mean_of_others(values: Tensor, counts: Tensor) -> Tensor:
    """Average (g, n) over the images that count, (g,); 0 where there is none."""
    return (values * counts).sum(1) / counts.sum(1).clamp_min(1)
