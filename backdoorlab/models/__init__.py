"""Models by name. Every model takes images in [0, 1]: normalisation is its layer 0, so
perturbations live in pixel space."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import UserError, suggest
from .preact_resnet import preactresnet10, preactresnet18

SMALL = 64
STANDARD_WIDTH = 64
"""Of our own networks, where none is given."""
Stem = Literal["small", "stock"]
"""small: on images of at most SMALL pixels, timm's networks lose the stride of their stem. stock:
they are left as timm makes them."""
OWN: dict[str, Callable[..., nn.Module]] = {
    "preactresnet18": preactresnet18,
    "preactresnet10": preactresnet10,
}


@dataclass
class Passes:
    """Images that went forward and backward through any model since the start of the process."""

    forward: int = 0
    backward: int = 0
    paused: bool = False


PASSES = Passes()


class Classifier(nn.Module):
    """Normalisation, then a network with timm's `forward_features` / `forward_head` /
    `get_classifier`.

    Images are float (N, C, H, W) in [0, 1]; logits are (N, K). Every image that passes is counted
    in `PASSES`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network: Any = network
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images in [0, 1] -> the network's feature map or tokens."""
        return count(self.network.forward_features((x - self.mean) / self.std), len(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features -> logits (N, K), or (N, D) as the last layer sees them."""
        return self.network.forward_head(x, pre_logits=pre_logits)

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.network.get_classifier()

    def stages(self) -> list[nn.Module]:
        """The modules after which timm's `feature_info` sees a stage end, from the first to the
        last."""
        return [self.network.get_submodule(info["module"]) for info in self.network.feature_info]

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def count(out: Tensor, images: int) -> Tensor:
    """Count `images` that went forward, and as many backward once a gradient comes back through
    `out`, which is returned."""
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
    """Nothing that passes inside is counted."""
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
    """A freshly initialised model (random numbers from torch's global generator).

    `width` is the number of channels of the first stage of our own networks; timm's have theirs in
    the name.
    """
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
    return Classifier(network, mean, std).to(memory_format=torch.channels_last)


def _timm_model(
    architecture: str,
    num_classes: int,
    in_chans: int,
    image_size: int,
    width: int | None,
    stem: Stem,
) -> nn.Module:
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
    try:
        network = timm.create_model(
            architecture, num_classes=num_classes, in_chans=in_chans, img_size=image_size
        )
    except TypeError:  # convolutional networks take images of any size and no img_size
        network = timm.create_model(architecture, num_classes=num_classes, in_chans=in_chans)
    if image_size <= SMALL and stem == "small":
        _shrink_stem(network, image_size)
    return network


def _shrink_stem(network: nn.Module, image_size: int) -> None:
    """Keep small images from shrinking to a point: stem convolutions lose their stride, a stem
    pooling becomes the identity.

    Patch embeddings (vision transformers) are left alone: their stride is their patch.
    """
    from timm.layers import PatchEmbed

    if any(isinstance(module, PatchEmbed) for module in network.modules()):
        return
    for name in ("conv1", "conv_stem", "stem", "stem_conv"):
        stem = getattr(network, name, None)
        if not isinstance(stem, nn.Module):
            continue
        for module in stem.modules():
            if (
                isinstance(module, nn.Conv2d)
                and max(module.stride) > 1
                and module.kernel_size != module.stride
            ):
                module.stride = (1, 1)
            elif isinstance(module, nn.Conv2d) and max(module.stride) > 1 and image_size <= 32:
                _shrink_patch(module)
    if isinstance(getattr(network, "maxpool", None), nn.Module):
        network.maxpool = nn.Identity()


def _shrink_patch(convolution: nn.Conv2d) -> None:
    """A patchifying stem (kernel = stride, ConvNeXt) on tiny images: read one pixel a patch with a
    3x3 kernel instead."""
    convolution.kernel_size, convolution.stride, convolution.padding = (3, 3), (1, 1), (1, 1)
    weight = torch.empty(
        convolution.out_channels, convolution.in_channels // convolution.groups, 3, 3
    )
    convolution.weight = nn.Parameter(
        nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")
    )
