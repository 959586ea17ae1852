"""A layer in front of a convolution: put in, trained, and folded into the network as it was.

The layer is a 1x1 convolution and a batch normalisation. In evaluation mode both are linear,
A x + t at each position, so a convolution behind them can do their work. What is stored is a
network of the usual shape.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Split, in_order
from ..errors import UserError
from ..run import Run
from .pairs import paired
from .pruning import BatchNorm, batch_norms


def place(model: nn.Module, image: Tensor) -> tuple[nn.Conv2d, BatchNorm]:
    """Find the last convolution whose output enters a batch normalisation, and this one."""
    norms = batch_norms(model)
    plain = [
        (convolution, norms[name])
        for name, convolution in paired(model, image).items()
        # Subclasses may pad in ways of their own.
        if type(convolution) is nn.Conv2d
        and convolution.groups == 1
        and convolution.padding_mode == "zeros"
        and isinstance(convolution.padding, tuple)
    ]
    if not plain:
        raise UserError(
            "this defense needs batch normalisation that follows a convolution, and this network"
            f" ({type(getattr(model, 'network', model)).__name__}) has none: choose another"
            " defense, such as ft"
        )
    return plain[-1]


class Layer(nn.Module):
    """A 1x1 convolution and a batch normalisation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(channels, channels, 1, bias=False)
        nn.init.dirac_(self.mix.weight)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.norm(self.mix(x))
        return found


class Extended(nn.Module):
    """A network, and the layer that stands in front of one of its convolutions."""

    def __init__(self, model: nn.Module, layer: Layer) -> None:
        super().__init__()
        self.model, self.layer = model, layer

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits


@contextmanager
def inserted(
    model: nn.Module, convolution: nn.Conv2d, trusted: Split, run: Run
) -> Iterator[Extended]:
    """Put a new layer in front of a convolution inside; at first it changes nothing."""
    network = Extended(model, Layer(convolution.in_channels).to(run.device))
    padding = convolution.padding
    assert isinstance(padding, tuple), "as `place` has found it"
    vertical, horizontal = padding
    convolution.padding = (0, 0)

    # The padding passes the layer, too.
    def enter(_module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        padded = F.pad(inputs[0], (horizontal, horizontal, vertical, vertical))
        found: Tensor = network.layer(padded)
        return found

    hook = convolution.register_forward_pre_hook(enter)
    try:
        begin(network, trusted, run)
        yield network
    finally:
        hook.remove()
        convolution.padding = padding


@torch.no_grad()
def begin(network: Extended, trusted: Split, run: Run) -> None:
    """Make the layer the identity, in training mode as well: it scales by the standard deviation
    and adds the mean that its normalisation takes away."""
    norm = network.layer.norm
    momentum, norm.momentum = norm.momentum, None  # an average over all batches
    network.eval()
    network.layer.train()
    for batch in in_order(trusted, run.device):
        with run.autocast():
            network(batch.images)
    norm.momentum = momentum
    assert norm.running_mean is not None and norm.running_var is not None
    norm.weight.copy_((norm.running_var + norm.eps).sqrt())
    norm.bias.copy_(norm.running_mean)


@torch.no_grad()
def fold(layer: Layer, convolution: nn.Conv2d, following: BatchNorm) -> None:
    """Put a layer into the convolution behind it, and into what follows that, in place.

    W (A x + t) = (W A) x + W t; the second part is the same at all positions, as the padding passes
    the layer, and the following normalisation subtracts so much less.
    """
    norm = layer.norm
    assert norm.running_mean is not None and norm.running_var is not None
    assert following.running_mean is not None
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    shift = norm.bias - norm.running_mean * scale
    following.running_mean -= torch.einsum("ochw,c->o", convolution.weight, shift)
    linear = scale[:, None] * layer.mix.weight[:, :, 0, 0]
    convolution.weight.copy_(torch.einsum("ochw,ci->oihw", convolution.weight, linear))
