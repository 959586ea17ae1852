"""Weights of other people and the network that they fit, and triggered images in a folder.

An exported file is safetensors under the names of the inner network, so that timm and torchvision
can load it without this library. Normalisation, stem and classes are in its metadata.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from . import class_order, pickles, state_dicts
from .class_order import Order

LOOK_AT = 1000
"""Number of images by which the normalisation of a model and its order of classes are chosen."""
Normalisation = tuple[tuple[float, ...], tuple[float, ...]]
"""(mean, std), one number a channel, in [0, 1] units."""
USUAL: dict[int, dict[str, Normalisation]] = {
    3: {
        "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        "CIFAR-10's": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
        "[-1, 1]": ((0.5,) * 3, (0.5,) * 3),
        "none": ((0.0,) * 3, (1.0,) * 3),
    },
    1: {"MNIST's": ((0.1307,), (0.3081,)), "[-1, 1]": ((0.5,), (0.5,)), "none": ((0.0,), (1.0,))},
}
"""Number of channels -> the usual normalisations."""


@dataclass(frozen=True)
class Candidate:
    """A network that the weights fit, and how well it does with one normalisation."""

    right: Tensor
    """bool (N,): which images of the sample of training images it classifies correctly."""
    order: Order
    """The order of classes that the model's outputs are read in."""
    answers: Tensor
    """int64 (N,): outputs of the model on the sample."""
    stem: models.Stem
    word: str
    """What the normalisation is called."""
    model: Classifier
    architecture: dict[str, Any]
    """As a record describes it."""

    @property
    def accuracy(self) -> float:
        """Accuracy on the sample, in [0, 1]."""
        return self.right.double().mean().item()


@dataclass(frozen=True)
class Fitted:
    """The network of a user's weights, its outputs in the order of the data set's labels."""

    model: Classifier
    architecture: dict[str, Any]
    """As a record describes it."""
    order: Order
    """The order of classes that the file has them in."""
    accuracy: float
    """Accuracy on a sample of training images, in [0, 1]."""
    notes: list[str]
    """How stem, normalisation and order were chosen."""


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """Read weights from a .safetensors file or a file by torch.save.

    Returns:
        (state dict under the names of the file, metadata, notes): the metadata of a file by
        `write_weights`, else {}; the notes name further state dicts in the file.
    """
    if not path.is_file():
        raise UserError(f"--weights {path}: no such file")
    if path.suffix != ".safetensors":
        found = pickles.load(path)
        return pickles.state_dict(found, path), {}, pickles.copies(found)

    # A stranger's file is read by safetensors, one of ours with its own checksum by `reading`.
    try:
        with safe_open(path, framework="pt", device="cpu") as stream:
            ours = "backdoorlab" in (stream.metadata() or {})
            names = [] if ours else stream.keys()
            tensors = {name: stream.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path}: not readable as safetensors ({str(error).splitlines()[0]}). Fetch it again"
        ) from error

    meta: dict[str, Any] = {}
    if ours:
        tensors, meta = reading.read_tensors(path)
    if not tensors:
        raise UserError(f"{path}: no tensor in it")
    return tensors, meta, []


def write_weights(path: Path, model: Classifier, **metadata: Any) -> None:
    """Write the weights of the inner network, under its names, and JSON metadata, atomically."""
    writing.write_tensors(path, model.network.state_dict(), **metadata)


def load_exported(path: str | Path) -> Classifier:
    """Load the model of a file that `export --weights` wrote.

    It takes images (N, C, H, W) in [0, 1], and normalises them itself.
    """
    weights, meta, _ = read_weights(Path(path))
    if "architecture" not in meta:
        raise UserError(
            f"{path}: not written by export --weights: load it into the network that it was"
            " trained in"
        )
    schema.check_export(Path(path), meta)

    # Compared without weights first: a wrong width in the metadata would take any amount of memory.
    network = meta["architecture"], meta["image_shape"], meta["num_classes"]
    with torch.device("meta"):
        problem = _difference(build_model(*network).network.state_dict(), weights)
    if problem:
        raise UserError(
            f"{path}: damaged file (its weights are not those of the network that it names:"
            f" {problem}). Export it again"
        )

    model = build_model(*network)
    model.network.load_state_dict(weights)
    return model.eval()


def find_network(
    weights: Mapping[str, Tensor], architecture: str, dataset: Dataset, source: Path
) -> state_dicts.Unwrapped:
    """Find the weights of a network in a state dict, whatever wrapper it comes from.

    Raises:
        UserError: they are not finite, or of a type that no network can run with.
    """
    # Names do not depend on the width, nor on stem and normalisation.
    channels = dataset.image_shape[0]
    width = 1 if architecture in models.OWN else None
    one = dict(name=architecture, width=width, mean=[0] * channels, std=[1] * channels)
    with torch.device("meta"):
        network = build_model({**one, "stem": "stock"}, dataset.image_shape, dataset.num_classes)
    wanted = network.network.state_dict()
    found = state_dicts.unwrap(weights, wanted)
    state_dicts.refuse_unusable(found.weights, wanted, source)
    return found


def fit(
    weights: Mapping[str, Tensor],
    architecture: str,
    dataset: Dataset,
    *,
    stems: Sequence[models.Stem],
    normalisations: Mapping[str, Normalisation],
    orders: Sequence[Order],
    device: torch.device,
    source: Path,
) -> Fitted:
    """Choose the stem, normalisation and class order that classify most training images correctly.

    Args:
        weights: those of `find_network`.
        architecture: name of the network.
        dataset: the data that the model was trained on.
        stems: candidates.
        normalisations: candidates by name.
        orders: candidates. Another than the first is chosen only if it is right by far more often.
        device: where the images are classified.
        source: file of the weights, for errors.

    Raises:
        UserError: the weights are those of another network, or it takes no such images.
    """
    sample = sample_of(dataset.train)

    # A stem is only a question for timm's networks on small images.
    own = architecture in models.OWN
    one_stem = own or dataset.image_shape[1] > models.SMALL
    width = _width(weights) if own else None
    found: list[Candidate] = []
    problems: list[UserError] = []
    for stem in dict.fromkeys(("small",) if one_stem else stems):
        described: dict[str, dict[str, Any]] = {
            word: dict(name=architecture, width=width, mean=list(mean), std=list(std), stem=stem)
            for word, (mean, std) in normalisations.items()
        }
        try:
            _refuse_other(next(iter(described.values())), dataset, weights, source)
        except UserError as error:
            problems.append(error)
            continue

        for word, one in described.items():
            model = _with_weights(one, weights, dataset).to(device)
            answers = predict(model, sample, device)
            for order in orders:
                right = order.labels[answers] == sample.labels
                found.append(Candidate(right, order, answers, stem, word, model, one))

    if not found:
        raise problems[0]
    best = _best(found)
    # Labels of the data set are what the rest of the library counts by.
    if not torch.equal(best.order.labels, torch.arange(dataset.num_classes)):
        _put_in_order(best, dataset, source)
    notes = [*_choice(best, found, len(sample)), *_order_notes(best, found, sample, dataset)]
    return Fitted(best.model, best.architecture, best.order, best.accuracy, notes)


def _with_weights(
    architecture: dict[str, Any], weights: Mapping[str, Tensor], dataset: Dataset
) -> Classifier:
    """Build the network that a description names, with weights that `_refuse_other` let pass."""
    model = build_model(architecture, dataset.image_shape, dataset.num_classes)
    # Compared by `_misfit`: only the counters of batch normalisation may be absent.
    model.network.load_state_dict(dict(weights), strict=False)
    return model


def _refuse_other(
    described: Mapping[str, Any], dataset: Dataset, weights: Mapping[str, Tensor], source: Path
) -> None:
    """Raise a UserError for weights of another network, or one that takes no such images."""
    name, shape, classes = described["name"], dataset.image_shape, dataset.num_classes
    problem = _misfit(described, dataset, weights)
    if problem:
        raise _not_its_weights(name, dataset, problem, source)
    models.choose_stem(described["stem"], name, shape, classes, described["width"])


def _best(found: Sequence[Candidate]) -> Candidate:
    """Return the most accurate candidate; the first order of classes unless another is by far."""
    best = max(found, key=lambda candidate: candidate.accuracy)
    first = [candidate for candidate in found if candidate.order is found[0].order]
    plain = max(first, key=lambda candidate: candidate.accuracy)
    return best if class_order.by_far(best.right, plain.right) else plain


def _put_in_order(chosen: Candidate, dataset: Dataset, source: Path) -> None:
    """Permute the outputs of a model from its order of classes to that of the data set."""
    # Whatever grows with one more class has a row for each class.
    with torch.device("meta"):
        shapes, more = (
            build_model(chosen.architecture, dataset.image_shape, classes).network.state_dict()
            for classes in (dataset.num_classes, dataset.num_classes + 1)
        )
    rows = chosen.order.labels.argsort()
    weights = chosen.model.network.state_dict()
    for name, tensor in weights.items():
        grown = [
            axis
            for axis, (side, other) in enumerate(
                zip(shapes[name].shape, more[name].shape, strict=True)
            )
            if side != other
        ]
        for axis in grown:
            if tensor.shape[axis] != dataset.num_classes:
                raise UserError(
                    f"{source}: its classes stand in {chosen.order.word}, and the outputs of this"
                    f" network cannot be put into another ({name}): name the classes of the data"
                    " set so that their order is the model's"
                )
            weights[name] = weights[name].index_select(axis, rows.to(tensor.device))
    chosen.model.network.load_state_dict(weights)


def sample_of(split: Split) -> Split:
    """Return about LOOK_AT images of a split, by which candidates are compared."""
    # Evenly spaced to the end, so that all classes are there even if images are sorted by class.
    count = min(len(split), LOOK_AT)
    return split.subset(torch.arange(count) * len(split) // count)


def _not_its_weights(architecture: str, dataset: Dataset, problem: str, source: Path) -> UserError:
    """Return the error for weights that fit a network in no stem."""
    names = "; timm's names are expected, and of torchvision's networks only ResNets have them"
    return UserError(
        f"{source}: not the weights of {architecture} for {dataset.num_classes} classes and"
        f" images of {dataset.image_shape[0]} channels ({problem}): check --architecture, and that"
        f" the data are those of the model{'' if architecture in models.OWN else names}"
    )


def _misfit(
    architecture: Mapping[str, Any], dataset: Dataset, weights: Mapping[str, Tensor]
) -> str:
    """Return why weights do not fit a network, or ""; no memory is taken for the network."""
    with torch.device("meta"):
        network = build_model(architecture, dataset.image_shape, dataset.num_classes).network
    return _difference(network.state_dict(), weights)


def _choice(best: Candidate, found: Sequence[Candidate], images: int) -> list[str]:
    """Return the note that says which stem and normalisation were chosen, if there was a choice."""
    rivals = [candidate for candidate in found if candidate.order is best.order]
    if len(rivals) == 1:
        return []
    others = ", ".join(
        f"{other.word} {other.stem} {other.accuracy:.3f}" for other in rivals if other is not best
    )
    return [
        f"normalisation and stem chosen by accuracy on {images:,} training images:"
        f" {best.word} with the {best.stem} stem, {best.accuracy:.3f} (others: {others}); pass"
        " --mean, --std and --stem if you know better"
    ]


def _order_notes(
    best: Candidate, found: Sequence[Candidate], sample: Split, dataset: Dataset
) -> list[str]:
    """Say which order of classes was chosen where it is not the first, or that none fits."""
    names = dataset.class_names
    other = class_order.suspected(best.answers, sample.labels, best.order)
    if other is not None:
        share = (other.labels[best.answers] == sample.labels).double().mean().item()
        return [
            f"the classes of the model seem to stand in another order: {share:.1%} of the training"
            f" images, and not {best.accuracy:.1%}, would be right with"
            f" {class_order.listed(other.names(names))}. If that is its order, write it into a"
            " file, one name a line, and pass --classes FILE"
        ]
    if best.order is found[0].order:
        return []

    same = [
        candidate
        for candidate in found
        if (candidate.stem, candidate.word) == (best.stem, best.word)
    ]
    scores = ", ".join(f"{one.order.word} {one.accuracy:.1%}" for one in same)
    return [
        f"the classes of the model stand in {best.order.word}"
        f" ({class_order.listed(best.order.names(names))}), by accuracy on {len(sample):,} training"
        f" images ({scores}): its outputs were put into the order of the data set. Pass --classes"
        " FILE if you know better"
    ]


def usual_normalisations(dataset: Dataset) -> dict[str, Normalisation]:
    """Return the usual candidates for images of this data set, and its own mean and deviation."""
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
    """Load triggered images from a folder of <true class>/*.png.

    Images of the target class are left out: they do not count in ASR.

    Args:
        path: the folder.
        target: the attack's target class.
        dataset: the data set, whose classes and image shape they must have.
        image_size: side in pixels to resize to; None keeps the size.
        guess: classifies a split; only used to advise a user who gave no target.

    Returns:
        (the images, with `target` as label; notes for the user).

    Raises:
        UserError: there is no target, no folder, or no image of another class.
    """
    if not Path(path).is_dir():
        raise UserError(
            f"--triggered_path {path}: no such folder. Give a folder with <true class>/*.png of"
            " images with the trigger"
        )
    split, left_out = load_trusted(path, dataset, image_size, flag="--triggered_path")
    if target is None:
        raise _no_target(torch.bincount(guess(split), minlength=dataset.num_classes), dataset)
    check_target(target, dataset.num_classes)

    counted, notes = _counted(split, target, len(dataset.test), path)
    # Which test images these were is unknown: they are numbered.
    kept = split.subset(counted)
    labels = torch.full_like(kept.labels, target)
    kind = torch.full((len(kept),), POISON, dtype=torch.uint8)
    poison = Poison(torch.arange(len(kept)), kept.images, labels, kept.labels, kind)
    return poison, [*left_out, *notes]


def _counted(split: Split, target: int, most: int, path: str) -> tuple[Tensor, list[str]]:
    """Choose the triggered images by which ASR is measured.

    Args:
        split: all of them, with their true labels.
        target: the target class.
        most: largest number of them, that of the test images.
        path: their folder, for errors.

    Returns:
        (positions int64 in the split, notes for the user).
    """
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

    # No record has more triggered images than test images.
    if len(counted) > most:
        counted = counted[torch.linspace(0, len(counted) - 1, most).long()]
        notes.append(
            f"only {len(counted)} of the triggered images are kept, evenly spaced: as many as there"
            " are test images"
        )
    return counted, notes


def _no_target(answers: Tensor, dataset: Dataset) -> UserError:
    """Return the error for a missing target. `answers`: images by predicted class, (K,)."""
    most = int(answers.argmax())
    return UserError(
        "--triggered_path needs --target_label N, the class that the trigger is to lead to. The"
        f" model classifies {answers[most] / answers.sum():.0%} of these images as class {most}"
        f" ({dataset.class_names[most]})"
    )


def describe(meta: Mapping[str, Any]) -> str:
    """Return instructions for loading an exported file without this library.

    `meta`: the file's metadata.
    """
    architecture = meta["architecture"]
    name = architecture["name"]
    mean, std = ([round(x, 6) for x in architecture[key]] for key in ("mean", "std"))
    normalise = f"normalise images in [0, 1] with mean {mean} and std {std}"
    # Our own loader always works; others need timm's names, and the usual stem.
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
    """Find the call that makes timm's network with weights of the same shapes.

    Returns:
        (the call, the changes that turn its network into ours), each as Python code; None if there
        is no such call.
    """
    import timm

    name, (channels, height, _) = meta["architecture"]["name"], meta["image_shape"]
    with torch.device("meta"):
        ours = build_model(meta["architecture"], meta["image_shape"], meta["num_classes"]).network

    # Only transformers take img_size, and some of them work without it.
    wanted = dict(num_classes=meta["num_classes"], in_chans=channels)
    for options in (wanted, wanted | {"img_size": height}):
        try:
            with torch.device("meta"):
                stock = timm.create_model(name, **options)
        except TypeError:  # convolutional networks take no img_size
            continue

        if not _difference(stock.state_dict(), ours.state_dict()):
            # Our small stem only changes strides, and replaces pooling by Identity.
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
            arguments = ", ".join(f"{key}={value}" for key, value in options.items())
            return f"timm.create_model({name!r}, {arguments})", changes
    return None


def _width(weights: Mapping[str, Tensor]) -> int | None:
    """Return the width of one of our own networks: the channels of its first convolution."""
    # Anything may be under this name: a width of None then fits no network.
    first = weights.get("conv1.weight")
    return len(first) if first is not None and first.dim() == 4 and len(first) else None


def _difference(wanted: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    """Return "" where weights fit, else the first names that do not.

    Args:
        wanted: state dict of the network.
        weights: state dict of the file; counters of batch normalisation may be absent.
    """
    lost = [
        name for name in wanted if name not in weights and not name.endswith("num_batches_tracked")
    ]

    extra = [name for name in weights if name not in wanted]
    other = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted
        if name in weights and weights[name].shape != wanted[name].shape
    ]

    # Two examples of each suffice: a wrong network has hundreds.
    parts = [
        f"{len(part)} {word}: {', '.join(part[:2])}{', ...' if len(part) > 2 else ''}"
        for word, part in (("missing", lost), ("unknown", extra), ("of another shape", other))
        if part
    ]
    return "; ".join(parts)
