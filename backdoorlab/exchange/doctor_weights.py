"""The command `doctor --weights`: what would be read of a user's model, in seconds.

Nothing is written. With a data set it is what `import` would find; without one, the network alone.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor
from tyro.conf import arg

from .. import models
from ..device import choose_device
from ..errors import UserError
from ..metrics import predict
from . import class_order, importing, state_dicts
from .weights import read_weights, sample_of

USUAL = (
    *models.OWN,
    "resnet18",
    "resnet50",
    "resnet34",
    "vgg16_bn",
    "vgg19_bn",
    "mobilenetv2_100",
    "mobilenetv3_small_100",
    "efficientnet_b0",
    "densenet121",
    "convnext_tiny",
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "swin_tiny_patch4_window7_224",
)
"""Networks that are tried where the user names none."""
SIDE = 224
"""Side in pixels for which networks are tried where the user names none: that of most of timm's."""


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """What would be read of a file of weights: network, prefix, what is left out, classes, and the
    accuracy where a data set is given. Nothing is written."""

    weights: str = ""
    """Your own model: .safetensors, or .pt / .pth / .ckpt with a state dict in it."""
    architecture: Annotated[str | None, arg(aliases=["--model"])] = None
    """Its network, as for import. None tries the usual ones."""
    dataset: str | None = None
    """Name of the data set, as for import."""
    dataset_path: str | None = None
    """Folder of the data that the model was trained on, as for import."""
    image_size: int | None = None
    """Side in pixels that all images are resized to; None keeps the data set's own."""
    grey: bool | None = None
    """One channel (True) or three (False); None keeps what the data set has."""
    mean: tuple[float, ...] | None = None
    """Mean of the normalisation, as for import."""
    std: tuple[float, ...] | None = None
    """Its standard deviation, likewise."""
    stem: models.Stem | None = None
    """Stem of timm's networks, as for import."""
    classes: str | None = None
    """Text file with the class names in the order of the model's outputs, as for import."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class Sized:
    """A network that weights fit, with the numbers that its name does not say."""

    found: state_dicts.Unwrapped
    channels: int
    classes: int
    width: int | None
    """Of our own networks only."""


def doctor(options: Doctor) -> int:
    """Run the command; returns its exit code."""
    path = Path(options.weights)
    weights, meta, copies = read_weights(path)
    kinds = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in weights.values())
    numbers = sum(tensor.numel() for tensor in weights.values())
    print(f"file        {len(weights)} tensors, {numbers:,} numbers ({', '.join(kinds)})")

    # As the user says, else as the file says, else the first of the usual ones that it fits.
    described = meta.get("architecture")
    name = options.architecture or (described.get("name") if isinstance(described, dict) else None)
    side = options.image_size or SIDE
    if name is None:
        name = next((usual for usual in USUAL if _fits(weights, usual, side)), None)
    if name is None:
        raise UserError(
            f"{path}: none of the usual networks ({', '.join(USUAL)}): pass --architecture NAME,"
            f" one of timm's. Its names begin with {', '.join(list(weights)[:3])}"
        )

    if options.dataset is None and options.dataset_path is None:
        _describe(weights, name, side, copies, path)
        return 0
    _try_out(options, name)
    return 0


def _describe(
    weights: Mapping[str, Tensor], name: str, side: int, notes: Sequence[str], path: Path
) -> None:
    """Print what a file says without any data, and notes on it."""
    sized = _sized(weights, name, side)
    if sized is None:
        raise UserError(
            f"{path}: not the weights of {name} for images of {side} pixels: check --architecture"
            " and --image_size, or pass --dataset_path FOLDER for a comparison name by name"
        )

    # What stands beside the network may be its normalisation.
    inside = state_dicts.normalisation(sized.found.left_out, sized.channels)
    width = f", width {sized.width}" if sized.width else ""
    print(f"network     {name}{width}, images of {sized.channels} channels")
    print(f"classes     {sized.classes}; their names and order are not in the weights")
    if inside is not None:
        print(f"normalised  in the file, {inside[0]}: mean {inside[1]}, std {inside[2]}")
    for note in [*notes, *sized.found.notes()]:
        print(f"note        {note}")
    print("accuracy    pass --dataset_path FOLDER to see it")


def _try_out(options: Doctor, name: str) -> None:
    """Print what `import` would find with this data set."""
    shared = {
        field.name: getattr(options, field.name)
        for field in fields(options)
        if field.name not in ("architecture", "debug")
    }
    device = choose_device(options.device)
    # The name of the record is never used, as nothing is written.
    wanted = importing.Import(save_folder_name="doctor", architecture=name, **shared)
    found = importing.from_weights(wanted, device)

    described = found.architecture
    width = f", width {described['width']}" if described["width"] else ""
    print(f"network     {described['name']}{width}, {described['stem']} stem")
    print(f"normalised  mean {described['mean']}, std {described['std']}")
    # Whether the attack is known is no question about a file.
    for note in found.notes[1:]:
        print(f"note        {note}")

    # The accuracy on a sample, with two standard deviations.
    seen = sample_of(found.dataset.test)
    answers = predict(found.model, seen, device)
    share = (answers == seen.labels).double().mean().item()
    spread = 2 * (share * (1 - share) / len(seen)) ** 0.5
    chance = class_order.near_chance(answers, seen.labels)
    verdict = f", near chance ({chance})" if chance else ""
    print(
        f"accuracy    {share:.1%} +- {spread:.1%} on {len(seen):,} test images of"
        f" {found.dataset.name}{verdict}"
    )


def _fits(weights: Mapping[str, Tensor], name: str, side: int) -> bool:
    """Return whether weights are those of a network, which may not exist for this size."""
    try:
        return _sized(weights, name, side) is not None
    except models.WrongSize:
        return False


def _sized(weights: Mapping[str, Tensor], name: str, side: int) -> Sized | None:
    """Return the network of a name with the sizes of these weights; None where they do not fit."""
    width = None
    if name in models.OWN:
        plain = state_dicts.unwrap(weights, _shapes(name, side, 3, 2, 1)).weights
        first = plain.get("conv1.weight")
        width = len(first) if first is not None and len(first) else 1

    # What grows with one more class, or channel, says their number.
    base = _shapes(name, side, 3, 2, width)
    found = state_dicts.unwrap(weights, base)
    needed = {entry for entry in base if not entry.endswith("num_batches_tracked")}
    if not needed <= found.weights.keys():
        return None
    channels = _grown(found.weights, base, _shapes(name, side, 4, 2, width))
    classes = _grown(found.weights, base, _shapes(name, side, 3, 3, width))
    if channels is None or classes is None:
        return None

    # With its own numbers of classes and channels the network must have these very shapes.
    wanted = _shapes(name, side, channels, classes, width)
    fits = all(
        entry in wanted and tensor.shape == wanted[entry].shape
        for entry, tensor in found.weights.items()
    )
    return Sized(found, channels, classes, width) if fits else None


def _shapes(
    name: str, side: int, channels: int, classes: int, width: int | None
) -> dict[str, Tensor]:
    """Return the state dict of a network without values."""
    with torch.device("meta"):
        model = models.build(
            name,
            num_classes=classes,
            in_chans=channels,
            mean=[0.0] * channels,
            std=[1.0] * channels,
            width=width,
            image_size=side,
            stem="stock",
        )
    shapes: dict[str, Tensor] = model.network.state_dict()
    return shapes


def _grown(
    weights: Mapping[str, Tensor], base: Mapping[str, Tensor], more: Mapping[str, Tensor]
) -> int | None:
    """Return the length, in a file, of the axis by which two networks differ."""
    for name, tensor in base.items():
        pairs = zip(tensor.shape, more[name].shape, strict=True)
        axis = next((axis for axis, (side, other) in enumerate(pairs) if side != other), None)
        if axis is not None and weights[name].dim() == tensor.dim():
            return weights[name].shape[axis]
    return None


def asked(rest: list[str]) -> bool:
    """Return whether the command line of `doctor` names a file of weights."""
    return any(word.split("=")[0] == "--weights" for word in rest)
