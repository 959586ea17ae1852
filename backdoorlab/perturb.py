"""Perturbations of images in a norm ball: projection, steepest steps, frozen models.

A perturbation is float (B, C, H, W), one for each image, or (1, C, H, W), one for all. Sizes are in
units of pixels in [0, 1].
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Literal

from torch import Tensor, nn

Norm = Literal["linf", "l2"]
"""Largest absolute value, or Euclidean length over all channels and pixels."""


def project(delta: Tensor, norm: Norm, radius: float) -> Tensor:
    """Project each row to the ball of a radius. An infinite radius changes nothing."""
    if norm == "linf":
        return delta.clamp(-radius, radius)
    # A row inside of the ball stays as it is.
    return delta * (radius / l2(delta).clamp_min(1e-12)).clamp_max(1)


def steepest(gradient: Tensor, norm: Norm) -> Tensor:
    """The step of length 1 in `norm` along which a linear function with this gradient rises most; 0
    where the gradient is 0."""
    return gradient.sign() if norm == "linf" else gradient / l2(gradient).clamp_min(1e-12)


def l2(delta: Tensor) -> Tensor:
    """(B, 1, 1, 1): Euclidean length of each row."""
    return delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def same_reach(eps: float, shape: Sequence[int]) -> float:
    """Radius of the smallest l2 ball around linf's of radius `eps`, for images of `shape`."""
    return eps * math.sqrt(math.prod(shape))


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Compute no gradients of the weights inside: backward passes stop at the image and need
    less memory."""
    # Only those that were trained: a frozen layer stays frozen afterwards.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
