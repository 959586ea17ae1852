"""Models by name.

Every model takes images in [0, 1] and normalises them itself, so perturbations are in pixel space.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from ..errors import UserError, described, suggest
from .fast_net import fastnet
from .preact_resnet import preactresnet10, preactresnet18

SMALL = 64
"""Side in pixels up to which images are small for timm's networks."""
STANDARD_WIDTH = 64
"""Default width of our own networks."""
Stem = Literal["small", "stock"]
"""Stem of timm's networks. small: without stride on images of at most SMALL pixels. stock:
unchanged."""
StemChoice = Literal["auto", "small", "stock"]
"""A stem, or auto: small where the network runs with it, else stock."""
SIDES = (32, 48, 64, 96, 128, 160, 192, 224, 256, 384)
"""Sides in pixels that are tried to say which images a network takes."""
OWN: dict[str, Callable[..., nn.Module]] = {
    "preactresnet18": preactresnet18,
    "preactresnet10": preactresnet10,
    "fastnet": fastnet,
}
FITTED = 5000
"""Training images that a network's input layer is fitted to, at most."""


class WrongSize(UserError):
    """A network that cannot be made for images of a size."""


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

    def forward_features(self, x: Tensor) -> Any:
        """Compute the network's feature map or tokens. Images in [0, 1], (N, C, H, W).

        Networks of several branches answer with a list, which `forward_head` takes.
        """
        with _explained():
            return count(self.network.forward_features((x - self.mean) / self.std), len(x))

    def forward_head(self, x: Any, pre_logits: bool = False) -> Tensor:
        """Compute logits (N, K) of features; with `pre_logits` the last layer's input (N, D)."""
        with _explained():
            return self.network.forward_head(x, pre_logits=pre_logits)

    def get_classifier(self) -> nn.Module:
        """Return the last layer."""
        return self.network.get_classifier()

    def stages(self) -> list[nn.Module]:
        """Return the modules that end a stage by timm's `feature_info`, in order.

        UserError where the network does not say it.
        """
        try:
            infos = list(self.network.feature_info)
            modules = [self.network.get_submodule(info["module"]) for info in infos]
            modules[0]  # a network without any stage is one that does not say them
        except (AttributeError, KeyError, TypeError, IndexError) as error:
            raise UserError(
                f"the stages of this network ({type(self.network).__name__}) cannot be found, which"
                " this method needs: choose a network of another family"
            ) from error
        return modules

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def linear_classifier(model: Classifier) -> nn.Linear:
    """Return the last layer; UserError for a network in which it is not linear."""
    last: object = model.get_classifier()
    if not isinstance(last, nn.Linear):
        raise UserError(
            "this defense needs a network with a linear last layer, and this one"
            f" ({type(model.network).__name__}) ends in {type(last).__name__}: choose another"
            " defense, such as ft"
        )
    return last


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turn torch's complaint about batch normalisation of a single value into a `UserError`."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            "this network's batch normalisation needs two values a channel in training, and got a"
            " batch of one image whose feature maps have become 1 x 1: use a --batch_size of 2 or"
            " more, with at least 2 images (--trusted_count), or a larger --image_size"
        ) from error


Out = TypeVar("Out")


def count(out: Out, images: int) -> Out:
    """Count images that went forward, and as many backward if a gradient passes through `out`.

    Returns `out`, a tensor, or a list or dict of them.
    """
    # The hook runs when a gradient reaches the tensor; all of a list get one, and one is counted.
    if not PASSES.paused:
        PASSES.forward += images
        several = list(out.values()) if isinstance(out, Mapping) else out
        parts = several if isinstance(several, (list, tuple)) else [out]
        passing = [part for part in parts if isinstance(part, Tensor) and part.requires_grad]
        if passing:
            passing[-1].register_hook(_count_backward)
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
    image_size: int | tuple[int, int] = 32,
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
        image_size: side of the images in pixels, or (H, W), for timm's networks.
        stem: whether timm's networks keep their stem on small images.

    Raises:
        UserError: for an unknown name, a width that the network does not have, or (`WrongSize`) a
            size of images that it cannot be made for.
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


def trained_weights(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that a training moves: all but those that a network keeps as they
    are."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def fit_input(model: Classifier, images: Tensor) -> None:
    """Fit the input layer of a new network to training images, where it has one that asks for it.

    Args:
        model: on the CPU.
        images: uint8 (N, C, H, W).
    """
    fit = getattr(model.network, "fit_input", None)
    if fit is not None and len(images):
        step = max(1, len(images) // FITTED)
        fit((images[::step].cpu().float() / 255 - model.mean) / model.std)


def _timm_model(
    architecture: str,
    num_classes: int,
    in_chans: int,
    image_size: int | tuple[int, int],
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
    wanted: dict[str, Any] = dict(num_classes=num_classes, in_chans=in_chans)
    try:
        network = timm.create_model(architecture, **wanted, img_size=image_size)
    except TypeError:
        network = timm.create_model(architecture, **wanted)
    except (AssertionError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise WrongSize(
            f"{architecture} cannot be made for images of {_size(image_size)} pixels"
            f" ({_reason(error)})"
        ) from error

    height = image_size if isinstance(image_size, int) else image_size[0]
    if height <= SMALL and stem == "small":
        _shrink_stem(network, height)
    return network


def _size(image_size: int | tuple[int, int]) -> str:
    """Write a size as H x W."""
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    return " x ".join(map(str, sides))


def _reason(error: Exception) -> str:
    """Return the first line of a network's own complaint, or its kind."""
    lines = str(error).strip().splitlines()
    return lines[0][:120] if lines else type(error).__name__


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


@cache
def choose_stem(
    wanted: StemChoice,
    architecture: str,
    image_shape: tuple[int, int, int],
    num_classes: int,
    width: int | None = None,
) -> Stem:
    """Choose a stem with which a network runs, by a pass of one image.

    No random number of the run is drawn, and no pass is counted.

    Args:
        wanted: what the user asked for.
        architecture: name of the network.
        image_shape: (C, H, W).
        num_classes: K, number of logits.
        width: as in `build`.

    Raises:
        UserError: the network takes no images of this size.
    """
    # Larger images, and our own networks, have one stem.
    channels, height, side = image_shape
    candidates: tuple[Stem, ...] = ("small",)
    if architecture not in OWN and height <= SMALL:
        candidates = ("small", "stock") if wanted == "auto" else (wanted,)

    reason = ""
    for stem in candidates:
        build_one = partial(
            build,
            architecture,
            num_classes=num_classes,
            in_chans=channels,
            mean=[0.0] * channels,
            std=[1.0] * channels,
            width=width,
            image_size=height if height == side else (height, side),
            stem=stem,
        )
        reason = _failure(build_one, image_shape)
        if not reason:
            return stem
    raise _wrong_size(architecture, image_shape, candidates[-1], reason)


def _failure(build_one: Callable[[], Classifier], image_shape: Sequence[int]) -> str:
    """Pass one black image through a new network; return why that fails, or ""."""
    # No inference mode: what a network keeps for all of its kind could not be trained with later.
    with torch.random.fork_rng(devices=[]), torch.no_grad(), paused():
        try:
            model = build_one()
        except WrongSize as error:
            return str(error)

        try:
            logits = model.eval()(torch.zeros(1, *image_shape))
        # Whoever wrote the network chooses how it breaks.
        except Exception as error:
            return _reason(error)
    if isinstance(logits, Tensor) and logits.dim() == 2:
        return ""
    return f"it answers with {described(logits)}, and not with one number for each class"


def _wrong_size(
    architecture: str, image_shape: Sequence[int], stem: Stem, reason: str
) -> UserError:
    """Return the error for a network that takes no images of this shape."""
    channels, height, width = image_shape
    fitting = _fitting_sides(architecture, channels)
    if fitting:
        nearest = min(fitting, key=lambda side: abs(side - max(height, width)))
        takes = f"It takes {', '.join(map(str, fitting))} pixels: pass --image_size {nearest}"
        if nearest == height == width:
            takes = "It takes this size with another --stem"
    else:
        takes = "Choose another --model"
    small = f" with the {stem} stem" if height <= SMALL and architecture not in OWN else ""
    return UserError(
        f"{architecture} takes no images of {channels} x {height} x {width}{small} ({reason})."
        f" {takes}"
    )


def _fitting_sides(architecture: str, channels: int) -> list[int]:
    """Return which of SIDES a network takes; on the meta device, where that costs no memory."""
    fitting = []
    for side in SIDES:
        stems: tuple[Stem, ...] = ("small", "stock") if side <= SMALL else ("small",)
        for stem in stems:
            try:
                with torch.device("meta"), torch.no_grad(), paused():
                    model = build(
                        architecture,
                        num_classes=2,
                        in_chans=channels,
                        mean=[0.0] * channels,
                        std=[1.0] * channels,
                        image_size=side,
                        stem=stem,
                    ).eval()
                    model(torch.zeros(1, channels, side, side))
            except Exception:  # as in `_failure`
                continue
            fitting.append(side)
            break
    return fitting
