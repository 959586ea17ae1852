"""The command `import`: a record of other people's attacks or models.

Nothing in their files is executed.
"""

import contextlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from tyro.conf import Positional, arg

from .. import models
from ..cli import next_command
from ..data import Dataset
from ..datasets import cache
from ..datasets.load import find as find_dataset
from ..datasets.load import load as load_dataset
from ..device import choose_device
from ..errors import UserError, suggest
from ..execution.environment import environment
from ..execution.preview import save_preview
from ..metrics import Evaluator, predict
from ..models import Classifier
from ..poison import POISON, Poison, no_poison
from ..record import Record, check_name, describe, read_folder, record_root, refuse_unreadable
from ..record import write as write_record
from ..settings.parse import published
from ..storage import reading
from ..storage.staging import staged
from ..tables import layout
from . import backdoorbench, class_order, state_dicts
from .class_order import Order
from .weights import (
    Normalisation,
    find_network,
    fit,
    read_weights,
    sample_of,
    triggered_images,
    usual_normalisations,
)


@dataclass(frozen=True, kw_only=True)
class Import:
    """Import a BackdoorBench record, or your own model and data. Nothing in the files is
    executed."""

    path: Positional[str | None] = None
    """Folder of the BackdoorBench record (with attack_result.pt in it)."""
    source: Annotated[Literal["backdoorbench"] | None, arg(aliases=["--from"])] = None
    """Format of PATH. Leave out for --weights."""
    save_folder_name: str = ""
    """Name of the record to write. Required."""
    weights: str | None = None
    """Your own model: .safetensors, or .pt / .pth with a state dict in it."""
    architecture: Annotated[str | None, arg(aliases=["--model"])] = None
    """Its network: preactresnet18, preactresnet10, or a timm model by name. Files that `export
    --weights` wrote state it."""
    dataset: str | None = None
    """Name of the data set. Default: the name in the record, or that of the folder."""
    dataset_path: str | None = None
    """Folder of the data that the model was trained on: parquet shards, or train/<class>/*.png and
    test/<class>/*.png."""
    dataset_config: str | None = None
    """Configuration of parquet shards to read, where that folder has several. None: the only one,
    or the default."""
    image_size: int | None = None
    """Side in pixels that all images are resized to; None keeps the data set's own. Your own model
    only."""
    grey: bool | None = None
    """One channel (True) or three (False); None keeps what the data set has. Your own model
    only."""
    mean: tuple[float, ...] | None = None
    """Mean of the normalisation that the model was trained with, one number a channel, in [0, 1]
    units; None chooses the usual normalisation with the best accuracy."""
    std: tuple[float, ...] | None = None
    """Its standard deviation, likewise."""
    stem: models.Stem | None = None
    """For timm models on images of at most 64 pixels: stock keeps timm's stem, small removes its
    stride; None chooses the one with the best accuracy."""
    classes: str | None = None
    """Text file with the class names in the order of the model's outputs, one name a line. None
    tries the usual orders: that of the data set, and those in which other programs sort its
    names. Your own model only."""
    crop_padding: int | None = None
    """Augmentation in defenses: random crops after padding by this many pixels; 0 crops nothing.
    None is the data set's published setting, else 4."""
    flip: bool | None = None
    """Augmentation in defenses: random mirroring. None is the data set's published setting, else
    False."""
    triggered_path: str | None = None
    """Folder <true class>/*.png of test images with a suspected trigger, for an ASR. Your own model
    only."""
    target_label: Annotated[int | None, arg(aliases=["--attack_target"])] = None
    """Target class of the trigger, counted from 0."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    record_root: str | None = None
    """Folder of records."""
    overwrite: bool = False
    """Replace a record of the same name, together with the results of its defenses."""
    debug: bool = False
    """Show a traceback with an error."""


@dataclass(frozen=True)
class Found:
    """What is known of somebody else's attack: the content of a record, without its scores."""

    attack: str
    dataset: Dataset
    image_size: int | None
    """As in `load`, like `grey`."""
    grey: bool | None
    model: Classifier
    architecture: Mapping[str, Any]
    train: Poison
    test: Poison
    known_poison: bool
    """Whether the poisoned training images are known: without them there is no TPR or FPR."""
    has_train: bool
    """Whether the training set is that of the model: without it, many defenses cannot run."""
    seed: int
    source: Mapping[str, Any]
    """Where it comes from: format, SHA-256 and settings."""
    notes: list[str]


def import_record(options: Import) -> int:
    """Run the command; returns its exit code."""
    if not options.save_folder_name:
        raise UserError("--save_folder_name NAME is missing: the record will be record/NAME")
    check_name(options.save_folder_name)
    # Here, and not by the parser, so that calls from Python are checked, too.
    for name, least in (("image_size", 1), ("crop_padding", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"{name} must be >= {least}, got {value}")

    root, device = record_root(options.record_root), choose_device(options.device)
    target = root / options.save_folder_name
    with staged(target, "record.json", options.overwrite) as final:
        found = (
            _from_backdoorbench(options, device)
            if options.source
            else from_weights(options, device)
        )
        _fill(final, found, options, device)

    record = Record.load(options.save_folder_name, root)
    print(layout.text(layout.rows([record], missing=False)))
    print(f"record written: {record.folder}")
    # Without the training set a defense needs trusted images.
    defense, trusted = ("dau", "") if found.has_train else ("sau", " --trusted_path CLEAN")
    following = next_command("import", record.name, options.record_root, defense)
    print(f"next: {following}{trusted}")
    return 0


def _from_backdoorbench(options: Import, device: torch.device) -> Found:
    """Read a BackdoorBench record, and match it with its data set and its network."""
    if options.path is None:
        raise UserError(
            "--from backdoorbench PATH is missing its PATH: the folder with attack_result.pt in it"
        )
    _only_for_own(options)

    contents = backdoorbench.read(Path(options.path))
    channels, height, _ = contents.image_shape
    dataset = _dataset_of(contents, options)

    # The record may say its own normalisation; BackdoorBench itself goes by the data set's name.
    source = contents.folder / backdoorbench.RESULT
    normalisations = (
        _given(options, dataset)
        or _kept(contents.settings, channels)
        or _published(contents.data_name, dataset)
    )
    name = options.architecture or contents.model_name
    unwrapped = find_network(contents.weights, name, dataset, source)
    # Its labels are those of the data set, or it would not fit: its classes have one order.
    fitted = fit(
        unwrapped.weights,
        name,
        dataset,
        stems=[options.stem] if options.stem else ["stock", "small"],
        normalisations=normalisations,
        orders=class_order.usual(dataset.class_names)[:1],
        device=device,
        source=source,
    )

    seed = contents.settings.get("random_seed")
    return Found(
        attack=contents.attack,
        dataset=dataset,
        image_size=height,
        grey=channels == 1,
        model=fitted.model,
        architecture=fitted.architecture,
        train=contents.train or no_poison(dataset.train),
        test=contents.test,
        known_poison=contents.train is not None,
        has_train=contents.train is not None,
        seed=seed if type(seed) is int and seed >= 0 else 0,
        source={
            "format": "BackdoorBench v2",
            "sha256": reading.sha256(source),
            "settings": contents.settings,
        },
        notes=[*dataset.notes, *contents.notes, *unwrapped.notes(), *fitted.notes],
    )


def _dataset_of(contents: backdoorbench.Contents, options: Import) -> Dataset:
    """Find the data set of a BackdoorBench record; one that does not fit is a UserError."""
    channels, height, _ = contents.image_shape
    name = options.dataset or contents.data_name
    # A path settles which data are meant; a name alone is looked up in the cache first.
    dataset = None if options.dataset_path else _cached(name, contents)
    if dataset is None:
        dataset = _read_data(name, options, height, channels == 1)

    if dataset.image_shape != contents.image_shape:
        raise UserError(
            f"the record has images of {contents.image_shape} (channels, height, width), {name} has"
            f" {dataset.image_shape}"
        )
    backdoorbench.fits(
        contents,
        dataset.train.labels,
        dataset.test.labels,
        dataset.num_classes,
        options.dataset_path or name,
    )
    return dataset


def _cached(name: str, contents: backdoorbench.Contents) -> Dataset | None:
    """Find the data set of this name in the cache that has the record's labels.

    None where there is none; several are a UserError.
    """
    # By content, since the cache may have several of this name, read from different folders.
    fitting: dict[str, Dataset] = {}
    for entry in cache.cached():
        if entry.get("name") == name and isinstance(entry.get("fingerprint"), str):
            with contextlib.suppress(UserError):
                found = find_dataset(name, entry["fingerprint"])
                backdoorbench.fits(
                    contents, found.train.labels, found.test.labels, found.num_classes, name
                )
                if found.image_shape == contents.image_shape:
                    fitting[found.fingerprint] = found

    # The record contains no clean images, so that nothing distinguishes them.
    if len(fitting) > 1:
        many = f"the cache has {len(fitting)} data sets called {name} that have the record's labels"
        raise UserError(f"{many}: pass the --dataset_path that it was made on")
    return next(iter(fitting.values()), None)


def from_weights(options: Import, device: torch.device) -> Found:
    """Read a model of unknown history, and match it with its data set and its network."""
    path = _own_weights(options)
    weights, meta, copies = read_weights(path)

    # Exports of ours state their network and normalisation.
    described = meta.get("architecture")
    described = described if isinstance(described, dict) else {}
    architecture = _architecture(options, described, path)

    name = options.dataset or Path(options.dataset_path or "").resolve().name
    image_size, grey = options.image_size, options.grey
    dataset = _read_data(name, options, image_size, grey)

    unwrapped = find_network(weights, architecture, dataset, path)
    fitted = fit(
        unwrapped.weights,
        architecture,
        dataset,
        stems=_stems(options, described),
        normalisations=_given(options, dataset)
        or _kept(described, dataset.image_shape[0])
        or (_beside(unwrapped, dataset) | _published(name, dataset)),
        orders=_orders(options, meta, dataset),
        device=device,
        source=path,
    )
    print(f"classes     {class_order.listed(fitted.order.names(dataset.class_names))}")
    triggered, said = _triggered(options, dataset, fitted.model, device)
    notes = [
        "whether and how the model and its data were attacked is not known",
        *dataset.notes,
        *copies,
        *unwrapped.notes(),
        *fitted.notes,
        *said,
    ]

    return Found(
        attack="unknown",
        dataset=dataset,
        image_size=image_size,
        grey=grey,
        model=fitted.model,
        architecture=fitted.architecture,
        train=no_poison(dataset.train),
        test=triggered,
        known_poison=False,
        has_train=True,
        seed=0,
        source={"format": path.suffix.lstrip("."), "sha256": reading.sha256(path)},
        notes=notes,
    )


def _read_data(name: str, options: Import, image_size: int | None, grey: bool | None) -> Dataset:
    """Load the data set in the user's folder, or by its name; the rest as in `load`."""
    return load_dataset(
        name,
        options.dataset_path,
        image_size=image_size,
        grey=grey,
        configuration=options.dataset_config,
    )


def _triggered(
    options: Import, dataset: Dataset, model: Classifier, device: torch.device
) -> tuple[Poison, list[str]]:
    """Load the triggered images that the user gave, if any, and notes on them."""
    # Without triggered images there is no ASR, and the rest of the scores is the same.
    if options.triggered_path is None:
        return no_poison(dataset.test), []
    triggered, said = triggered_images(
        options.triggered_path,
        options.target_label,
        dataset,
        options.image_size,
        lambda split: predict(model, split, device),
    )
    target = options.target_label
    measured = f"ASR is measured on images given with --triggered_path, for class {target}"
    return triggered, [measured, *said]


def _own_weights(options: Import) -> Path:
    """Return the file of a user's own model; a UserError where options are missing or unfit."""
    # A path without --from is most likely a forgotten --from.
    if options.path is not None:
        raise UserError(
            f"{options.path}: say what it is, --from backdoorbench; a model of your own is"
            " --weights FILE"
        )

    # Without a model there is still a way to get one: the message is the command.
    if options.weights is None:
        name = options.dataset or (
            Path(options.dataset_path).name if options.dataset_path else "NAME"
        )
        raise UserError(
            "--weights FILE is missing (or --from backdoorbench PATH). For a suspicious data set"
            " without a model, train one on it: python attack/none.py --suspicious True --dataset"
            f" {name} --dataset_path {options.dataset_path or 'FOLDER'} --save_folder_name"
            f" {options.save_folder_name}"
        )

    if options.dataset is None and options.dataset_path is None:
        raise UserError(
            "--dataset_path FOLDER is missing: images of the model's classes, train/<class>/*.png"
            " and test/<class>/*.png"
        )
    if options.target_label is not None and options.triggered_path is None:
        raise UserError(
            "--target_label N is the target of the images in --triggered_path FOLDER, which is"
            " missing"
        )
    return Path(options.weights)


def _stems(options: Import, described: Mapping[str, Any]) -> list[models.Stem]:
    """Return the candidates: as the user says, else as the file says, else both."""
    if options.stem:
        return [options.stem]
    return [described["stem"]] if "stem" in described else ["stock", "small"]


def _orders(options: Import, meta: Mapping[str, Any], dataset: Dataset) -> list[Order]:
    """Return the candidates: as the user says, else as the file says, else the usual ones."""
    names = meta.get("class_names")
    if options.classes is not None:
        return [class_order.read(options.classes, dataset.class_names)]
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        order = class_order.stated(names, dataset.class_names, "the order of the file")
        if order is not None:
            return [order]
    return class_order.usual(dataset.class_names)


def _beside(found: state_dicts.Unwrapped, dataset: Dataset) -> dict[str, Normalisation]:
    """Return the normalisation that the model keeps beside its network, if any."""
    inside = state_dicts.normalisation(found.left_out, dataset.image_shape[0])
    if inside is None:
        return {}
    names, mean, std = inside
    return {f"that in the file ({names})": (mean, std)}


def _architecture(options: Import, described: Mapping[str, Any], path: Path) -> str:
    """Return the name of the network of a model: as the user says, else as the file does."""
    name = options.architecture or described.get("name")
    if not isinstance(name, str):
        raise UserError(
            f"--architecture NAME is missing: which network {path} is for, such as"
            f" {', '.join(models.OWN)} or a timm name like resnet18"
        )
    if name not in models.OWN:
        _known_in_timm(name)
    return name


def _fill(final: Path, found: Found, options: Import, device: torch.device) -> None:
    """Score the model, and write the record into the staged folder `final`."""
    # The settings of the attack are unknown, except for how images were augmented.
    dataset, test = found.dataset, found.test
    config = _augmentation(options, found.source.get("settings", {}), published(dataset.name))
    scores = Evaluator(dataset.test, test, dataset.num_classes, device)(found.model.to(device))

    # Mostly a mistake of the user, which no other check can see.
    notes = list(found.notes)
    seen = sample_of(dataset.test)
    chance = class_order.near_chance(predict(found.model, seen, device), seen.labels)
    if chance is not None:
        notes.append(
            f"clean accuracy {scores.clean_accuracy:.3f} is near chance: probably another"
            " normalisation (--mean, --std), network or order of classes (--classes)"
            f" ({chance})"
        )

    # One target only, over test and training images: an attack may have several, or none.
    targets = set(test.labels.tolist()) | set(
        found.train.labels[found.train.labels != found.train.original_labels].tolist()
    )
    info = {
        "attack": found.attack,
        "known_poison": found.known_poison,
        "has_train": found.has_train,
        "source": dict(found.source),
        "config": config,
        "dataset": describe(dataset, found.image_size, found.grey),
        "architecture": dict(found.architecture),
        "num_classes": dataset.num_classes,
        "target": targets.pop() if len(targets) == 1 else None,
        "seed": found.seed,
        "poisoned": int((found.train.kind == POISON).sum()),
        "scores": scores.to_json(),
        "notes": notes,
        "seconds": None,
        **environment(device),
    }

    for note in notes:
        print(f"  {note}", file=sys.stderr)
    if found.known_poison or not len(test):
        save_preview(final / "preview.png", dataset.test, test)
    else:
        # Which clean images the triggered ones were is unknown: no pairs can be shown.
        save_preview(final / "preview.png", test.triggered(), no_poison(dataset.test))
    write_record(final, info, found.model, found.train, test)
    # What cannot be read back must not get its name.
    refuse_unreadable(final, read_folder)


def _only_for_own(options: Import) -> None:
    """Refuse options that are for a user's own model only."""
    given = [
        name
        for name in (
            "weights",
            "triggered_path",
            "target_label",
            "image_size",
            "grey",
            "classes",
        )
        if getattr(options, name) is not None
    ]
    if given:
        raise UserError(
            f"--{given[0]} does not go with --from backdoorbench: the record says it itself"
        )


def _augmentation(
    options: Import, stored: Mapping[str, Any], setting: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the augmentation in defenses.

    Args:
        options: what the user says comes first,
        stored: then the settings in the file, which an export of ours has,
        setting: then the published settings of the data set.
    """
    padding, flip = stored.get("crop_padding"), stored.get("flip")
    padding = padding if type(padding) is int and padding >= 0 else setting.get("crop_padding", 4)
    flip = flip if isinstance(flip, bool) else setting.get("flip", False)
    return {
        "crop_padding": padding if options.crop_padding is None else options.crop_padding,
        "flip": flip if options.flip is None else options.flip,
    }


def _known_in_timm(architecture: str) -> None:
    """Raise a UserError unless the installed timm has a model of this name."""
    import timm

    if not timm.is_model(architecture):
        raise UserError(
            "unknown model"
            f" {architecture!r}.{suggest(architecture, [*models.OWN, *timm.list_models()])} Known:"
            f" {', '.join(models.OWN)}, and timm's"
        )


def _given(options: Import, dataset: Dataset) -> dict[str, Normalisation] | None:
    """Return the normalisation of --mean and --std, or None where neither is given."""
    if options.mean is None and options.std is None:
        return None
    channels = dataset.image_shape[0]
    mean, std = options.mean or (), options.std or ()
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise UserError(
            f"--mean and --std need {channels} numbers each for these images, std above 0, got"
            f" {len(mean)} and {len(std)}"
        )
    return {"as given": (mean, std)}


def _kept(described: Mapping[str, Any], channels: int) -> dict[str, Normalisation] | None:
    """Return the normalisation that a file states, or None where it is missing or unusable."""
    mean, std = described.get("mean"), described.get("std")
    fitting = all(
        isinstance(row, (list, tuple)) and len(row) == channels and all(_number(x) for x in row)
        for row in (mean, std)
    )
    if not fitting or mean is None or std is None or min(std) <= 0:
        return None
    return {"as in the file": (tuple(mean), tuple(std))}


def _number(x: Any) -> bool:
    """Return whether a value is a number below 1e6 in size."""
    # Not by isfinite: an integer may be too large for a float.
    return isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < 1e6


def _published(name: str, dataset: Dataset) -> dict[str, Normalisation]:
    """Return the published normalisation of a data set, else all usual ones as candidates."""
    # CelebA is used without normalisation.
    setting = {"mean": (0.0,) * 3, "std": (1.0,) * 3} if name == "celeba" else published(name)
    return _kept(setting, dataset.image_shape[0]) or usual_normalisations(dataset)
