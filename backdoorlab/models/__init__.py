"""Models by name.

Every model takes images in [0, 1] and normalises them itself, so perturbations are in pixel space.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import UserError, suggest
from .preact_resnet import preactresnet10, preactresnet18

SMALL = 64
"""Side in pixels up to which images are small for timm's networks."""
STANDARD_WIDTH = 64
"""Default width of our own networks."""
Stem = Literal["small", "stock"]
"""Stem of timm's networks. small: without stride on images of at most SMALL pixels. stock:
unchanged."""
OWN: dict[str, Callable[..., nn.Module]] = {
    "preactresnet18": preactresnet18,
    "preactresnet10": preactresnet10,
}


@dataclass
class Passes:
    """Counts of images that passed any model, forward and backward, in this process."""

    forward: int = 0
    backward: int = 0
    paused: bool = False


PASSES = Passes()


class Classifier(nn.Module):
    """Normalisation, then a network with timm's interface.

    It maps images, float (N, C, H, W) in [0, 1], to logits, (N, K). `PASSES` counts the images.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network: Any = network
        # Buffers move to the device with the network and are stored with its weights.
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the network's feature map or tokens. Images in [0, 1], (N, C, H, W)."""
        return count(self.network.forward_features((x - self.mean) / self.std), len(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute logits (N, K) of features; with `pre_logits` the last layer's input (N, D)."""
        return self.network.forward_head(x, pre_logits=pre_logits)

    def get_classifier(self) -> nn.Module:
        """Return the last layer."""
        return self.network.get_classifier()

    def stages(self) -> list[nn.Module]:
        """Return the modules that end a stage by timm's `feature_info`, in order."""
        return [self.network.get_submodule(info["module"]) for info in self.network.feature_info]

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def count(out: Tensor, images: int) -> Tensor:
    """Count images that went forward, and as many backward if a gradient passes through `out`.

    Returns `out`.
    """
    # The hook runs when a gradient reaches `out`.
    if not PASSES.paused:
        PASSES.forward += images
        if out.requires_grad:
            out.register_hook(_count_backward)
    return out


def _count_backward(gradient: Tensor) -> None:
    if not PASSES.paused:
        PASSES.backward += len(gradient)


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Stop counting images inside of this context."""
    # The state before, as contexts may be nested.
    before, PASSES.paused = PASSES.paused, True
    try:
        yield
    finally:
        PASSES.paused = before


def build(
    architecture: str,
    *,
    num_classes: int,
    in_chans: int,
    mean: Sequence[float],
    std: Sequence[float],
    width: int | None = None,
    image_size: int = 32,
    stem: Stem = "small",
) -> Classifier:
    """Build a model with new weights, drawn from torch's global random generator.

    Args:
        architecture: one of OWN, or the name of any timm model.
        num_classes: K, number of logits.
        in_chans: C, channels of the images.
        mean: subtracted from the images, one number per channel.
        std: divided by, one number per channel.
        width: channels of the first stage, for OWN only; None is STANDARD_WIDTH.
        image_size: side of the images in pixels, for timm's networks.
        stem: whether timm's networks keep their stem on small images.

    Raises:
        UserError: for an unknown name, or a width that the network does not have.
    """
    # Our own networks have a width; timm's have it in their name.
    if architecture in OWN:
        if width is not None and width < 1:
            raise UserError(f"width must be at least 1, got {width}")
        network = OWN[architecture](
            num_classes=num_classes,
            in_chans=in_chans,
            width=STANDARD_WIDTH if width is None else width,
        )
    else:
        network = _timm_model(architecture, num_classes, in_chans, image_size, width, stem)
    # Convolutions are faster in this layout of memory.
    return Classifier(network, mean, std).to(memory_format=torch.channels_last)


def _timm_model(
    architecture: str,
    num_classes: int,
    in_chans: int,
    image_size: int,
    width: int | None,
    stem: Stem,
) -> nn.Module:
    """Build a network of timm; arguments as in `build`."""
    import timm

    if not timm.is_model(architecture):
        raise UserError(
            f"unknown model {architecture!r}.{suggest(architecture, [*OWN, *timm.list_models()])}"
            f" Own models: {', '.join(OWN)}; any other name is looked up in timm"
            f" {timm.__version__}."
        )
    if width is not None:
        raise UserError(
            f"width is for {', '.join(OWN)}; {architecture} is timm's and has its width in its"
            " name: leave --width out"
        )

    # Transformers must know the size of the images; convolutional networks take no such argument.
    try:
        network = timm.create_model(
            architecture, num_classes=num_classes, in_chans=in_chans, img_size=image_size
        )
    except TypeError:
        network = timm.create_model(architecture, num_classes=num_classes, in_chans=in_chans)
    if image_size <= SMALL and stem == "small":
        _shrink_stem(network, image_size)
    return network


def _shrink_stem(network: nn.Module, image_size: int) -> None:
    """Remove the strides and the pooling of a stem, so that small images are not shrunk to a point.

    Patch embeddings (vision transformers) are unchanged: their stride is the size of their patch.
    """
    from timm.layers import PatchEmbed

    if any(isinstance(module, PatchEmbed) for module in network.modules()):
        return

    for name in ("conv1", "conv_stem", "stem", "stem_conv"):
        stem = getattr(network, name, None)
        if not isinstance(stem, nn.Module):
            continue
        for module in stem.modules():
            if not isinstance(module, nn.Conv2d) or max(module.stride) <= 1:
                continue
            # A kernel as large as its stride reads patches: without the stride they would overlap.
            if module.kernel_size != module.stride:
                module.stride = (1, 1)
            elif image_size <= 32:
                _shrink_patch(module)
    if isinstance(getattr(network, "maxpool", None), nn.Module):
        network.maxpool = nn.Identity()


def _shrink_patch(convolution: nn.Conv2d) -> None:
    """Replace a stem that reads patches (kernel = stride, ConvNeXt) by a 3x3 one with stride 1."""
    convolution.kernel_size, convolution.stride, convolution.padding = (3, 3), (1, 1), (1, 1)
    # New weights, as the old ones have another shape.
    weight = torch.empty(
        convolution.out_channels, convolution.in_channels // convolution.groups, 3, 3
    )
    convolution.weight = nn.Parameter(
        nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")
    )
