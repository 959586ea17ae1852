"""Models and images that were not made here: weights in a file, and the network that they fit;
triggered images in a folder.

An exported file is safetensors under the inner network's own names, so that timm and torchvision
load it without us; what a name does not say (normalisation, stem, classes) is in its metadata.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .. import data, models
from ..data import Dataset, Split
from ..datasets.load import load_trusted
from ..errors import UserError
from ..metrics import predict
from ..models import Classifier
from ..poison import POISON, Poison, check_target
from ..record import build_model
from ..storage import reading, schema, writing
from . import pickles

LOOK_AT = 1000
"""Training images that settle which normalisation a model was trained with."""
Normalisation = tuple[tuple[float, ...], tuple[float, ...]]
USUAL: dict[int, dict[str, Normalisation]] = {
    3: {
        "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        "CIFAR-10's": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
        "[-1, 1]": ((0.5,) * 3, (0.5,) * 3),
        "none": ((0.0,) * 3, (1.0,) * 3),
    },
    1: {"MNIST's": ((0.1307,), (0.3081,)), "[-1, 1]": ((0.5,), (0.5,)), "none": ((0.0,), (1.0,))},
}
"""What a model from elsewhere was probably normalised with, by its number of channels."""


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state dict, metadata) of a .safetensors or a torch.save file; the metadata is that of our
    own exports, else {}."""
    if not path.is_file():
        raise UserError(f"--weights {path}: no such file")
    if path.suffix != ".safetensors":
        return bare(pickles.state_dict(pickles.load(path), path)), {}
    try:
        with safe_open(path, framework="pt", device="cpu") as stream:
            ours = "backdoorlab" in (stream.metadata() or {})
            tensors = {} if ours else {name: stream.get_tensor(name) for name in stream.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path}: not readable as safetensors ({str(error).splitlines()[0]}). Fetch it again"
        ) from error
    meta: dict[str, Any] = {}
    if ours:
        tensors, meta = reading.read_tensors(path)
    if not tensors:
        raise UserError(f"{path}: no tensor in it")
    return bare(tensors), meta


def write_weights(path: Path, model: Classifier, **metadata: Any) -> None:
    """The inner network alone, under its own names, with JSON metadata; atomic."""
    writing.write_tensors(path, model.network.state_dict(), **metadata)


def load_exported(path: str | Path) -> Classifier:
    """The model of a file that `export --weights` wrote: takes images (N, C, H, W) in [0, 1],
    normalisation included."""
    weights, meta = read_weights(Path(path))
    if "architecture" not in meta:
        raise UserError(
            f"{path}: not written by export --weights: load it into the network that it was"
            " trained in"
        )
    schema.check_export(Path(path), meta)
    network = meta["architecture"], meta["image_shape"], meta["num_classes"]
    with torch.device("meta"):  # before memory is taken for it
        problem = _difference(build_model(*network).network.state_dict(), weights)
    if problem:
        raise UserError(
            f"{path}: damaged file (its weights are not those of the network that it names:"
            f" {problem}). Export it again"
        )
    model = build_model(*network)
    model.network.load_state_dict(weights)
    return model.eval()


def fit(
    weights: Mapping[str, Tensor],
    architecture: str,
    dataset: Dataset,
    *,
    stems: Sequence[models.Stem],
    normalisations: Mapping[str, Normalisation],
    device: torch.device,
    source: Path,
) -> tuple[Classifier, dict[str, Any], str | None]:
    """(model, architecture, what was tried): the weights in the stem and normalisation that get
    most training images right.

    The weights of another network are refused before memory is taken for it.
    """
    lost = next((name for name, values in weights.items() if not values.isfinite().all()), None)
    if lost is not None:
        raise UserError(
            f"{source}: {lost} holds NaN or infinity, so that the model answers nothing: its"
            " training diverged, or the file is damaged"
        )
    shape, num_classes = dataset.image_shape, dataset.num_classes
    width = _width(weights) if architecture in models.OWN else None
    found = []
    problems: dict[str, str] = {}
    step = max(1, len(dataset.train) // LOOK_AT)
    sample = dataset.train.subset(torch.arange(0, len(dataset.train), step)[:LOOK_AT])
    one_stem = architecture in models.OWN or shape[1] > models.SMALL
    for stem in dict.fromkeys(("small",) if one_stem else stems):
        for word, (mean, std) in normalisations.items():
            described = dict(
                name=architecture, width=width, mean=list(mean), std=list(std), stem=stem
            )
            if stem not in problems:
                with torch.device("meta"):
                    wanted = build_model(described, shape, num_classes).network.state_dict()
                problems[stem] = _difference(wanted, weights)
            if problems[stem]:
                continue
            model = build_model(described, shape, num_classes)
            # Compared above; only batch counters may be absent
            model.network.load_state_dict(dict(weights), strict=False)
            right = (
                (predict(model.to(device), sample, device) == sample.labels).double().mean().item()
            )
            found.append((right, stem, word, model, described))
    if not found:
        raise UserError(
            f"{source}: not the weights of {architecture} for {num_classes} classes and images of"
            f" {shape[0]} channels ({next(iter(problems.values()))}): check --architecture, and"
            " that the data are those of the model"
            + (
                ""
                if architecture in models.OWN
                else (
                    "; timm's names are expected, and of torchvision's networks only ResNets have"
                    " them"
                )
            )
        )
    best = max(found, key=lambda entry: entry[0])
    tried = None
    if len(found) > 1:
        tried = (
            f"normalisation and stem chosen by accuracy on {len(sample):,} training images:"
            f" {best[2]} with the {best[1]} stem, {best[0]:.3f} (others:"
            f" {', '.join(f'{word} {stem} {right:.3f}' for right, stem, word, _, _ in found if (stem, word) != (best[1], best[2]))});"
            " pass --mean, --std and --stem if you know better"
        )
    return best[3], best[4], tried


def usual_normalisations(dataset: Dataset) -> dict[str, Normalisation]:
    """The candidates for images of that many channels, and the data's own."""
    return USUAL[dataset.image_shape[0]] | {
        "the data's own": data.channel_statistics(dataset.train)
    }


def triggered_images(
    path: str,
    target: int | None,
    dataset: Dataset,
    image_size: int | None,
    guess: Callable[[Split], Tensor],
) -> tuple[Poison, list[str]]:
    """Triggered images <true class>/*.png of a folder, and notes; images of the target class do not
    count in ASR.

    `guess(split)` gives the model's answers, which are only used to help a user who did not say the
    target.
    """
    if not Path(path).is_dir():
        raise UserError(
            f"--triggered_path {path}: no such folder. Give a folder with <true class>/*.png of"
            " images with the trigger"
        )
    split = load_trusted(path, dataset, image_size, flag="--triggered_path")
    if target is None:
        answers = torch.bincount(guess(split), minlength=dataset.num_classes)
        most = int(answers.argmax())
        raise UserError(
            "--triggered_path needs --target_label N, the class that the trigger is to lead to."
            f" The model takes {answers[most] / len(split):.0%} of these images for class {most}"
            f" ({dataset.class_names[most]})"
        )
    check_target(target, dataset.num_classes)
    notes = []
    counted = (split.labels != target).nonzero().squeeze(1)
    if len(counted) < len(split):
        notes.append(
            f"{len(split) - len(counted)} triggered images are of the target class and do not count"
            " in ASR"
        )
    if len(counted) == 0:
        raise UserError(
            f"--triggered_path {path}: all {len(split)} images are of the target class {target}, so"
            " no ASR can be measured"
        )
    if len(counted) > len(dataset.test):
        counted = counted[torch.linspace(0, len(counted) - 1, len(dataset.test)).long()]
        notes.append(
            f"only {len(counted)} of the triggered images are kept, evenly spaced: as many as there"
            " are test images"
        )
    kept = split.subset(counted)
    labels = torch.full_like(kept.labels, target)
    # Whose test images these were is not known: they are numbered.
    return (
        Poison(
            torch.arange(len(kept)),
            kept.images,
            labels,
            kept.labels,
            torch.full((len(kept),), POISON, dtype=torch.uint8),
        ),
        notes,
    )


def describe(meta: Mapping[str, Any]) -> str:
    """How to load an exported file without this library, in lines that a person can copy."""
    architecture = meta["architecture"]
    name = architecture["name"]
    mean, std = ([round(x, 6) for x in architecture[key]] for key in ("mean", "std"))
    normalise = f"normalise images in [0, 1] with mean {mean} and std {std}"
    whole = "load it with backdoorlab.load_exported(PATH), which takes images in [0, 1]"
    stock = None if name in models.OWN else _stock(meta)
    if stock is None:
        return f"{normalise}\n{whole}"
    call, changes = stock
    if not changes:
        return f"{normalise}\nload it with {call}.load_state_dict(load_file(PATH))"
    return (
        f"{normalise}\n{whole}\n{call} loads it too, but its stem must keep small images large:"
        f" {', '.join(changes)}"
    )


def _stock(meta: Mapping[str, Any]) -> tuple[str, list[str]] | None:
    """The call that makes timm's network with weights of the same shapes, and what ours changed in
    it since; None if there is none."""
    import timm

    name, (channels, height, _) = meta["architecture"]["name"], meta["image_shape"]
    with torch.device("meta"):
        ours = build_model(meta["architecture"], meta["image_shape"], meta["num_classes"]).network
    wanted = dict(num_classes=meta["num_classes"], in_chans=channels)
    for options in (wanted, wanted | {"img_size": height}):
        try:
            with torch.device("meta"):
                stock = timm.create_model(name, **options)
        except TypeError:  # convolutional networks take no img_size
            continue
        if not _difference(stock.state_dict(), ours.state_dict()):
            pairs = [
                (part, module, stock.get_submodule(part)) for part, module in ours.named_modules()
            ]
            changes = [
                f"{part}.stride = {new.stride}"
                for part, new, old in pairs
                if isinstance(new, nn.Conv2d) and new.stride != old.stride
            ]
            changes += [
                f"{part} = Identity()"
                for part, new, old in pairs
                if isinstance(new, nn.Identity) and not isinstance(old, nn.Identity)
            ]
            return (
                (
                    f"timm.create_model({name!r},"
                    f" {', '.join(f'{key}={value}' for key, value in options.items())})"
                ),
                changes,
            )
    return None


def _width(weights: Mapping[str, Tensor]) -> int | None:
    """Channels of the first convolution of our own networks."""
    first = weights.get("conv1.weight")
    return len(first) if first is not None and first.dim() == 4 and len(first) else None


def bare(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without what wrappers put before all of them."""
    found = dict(weights)
    # The state dict of our own Classifier
    if {"mean", "std"} < set(found) and any(name.startswith("network.") for name in found):
        del found["mean"], found["std"]
    for _ in range(4):
        for prefix in ("module.", "_orig_mod.", "network.", "model."):
            if all(name.startswith(prefix) for name in found):
                found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return found


def _difference(wanted: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    """'' where weights fit; else the first few that do not."""
    lost = [
        name for name in wanted if name not in weights and not name.endswith("num_batches_tracked")
    ]
    extra = [name for name in weights if name not in wanted]
    other = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted
        if name in weights and weights[name].shape != wanted[name].shape
    ]
    parts = [
        f"{len(part)} {word}: {', '.join(part[:2])}{', ...' if len(part) > 2 else ''}"
        for word, part in (("missing", lost), ("unknown", extra), ("of another shape", other))
        if part
    ]
    return "; ".join(parts)
