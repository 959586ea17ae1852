"""The record of an attack on disk, and the part of it that a defender may see."""

import copy
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import models
from .data import Augment, Dataset, Split
from .datasets.load import find as find_dataset
from .datasets.load import load as load_dataset
from .errors import UserError, suggest
from .models import Classifier
from .poison import CROSS, POISON, Poison
from .storage import folders, reading, writing
from .storage.schema import SCHEMA, check_record, check_result, poison_shapes, refuse_difference


def record_root(given: str | None = None) -> Path:
    """Return --record_root, else $BACKDOORLAB_RECORDS, else record/ of the checkout or here."""
    if given:
        return Path(given)
    if os.environ.get("BACKDOORLAB_RECORDS"):
        return Path(os.environ["BACKDOORLAB_RECORDS"])
    # An installed package has no checkout beside it.
    checkout = Path(__file__).parent.parent
    return checkout / "record" if (checkout / "setup.py").exists() else Path("record")


def record_names(root: Path) -> list[str]:
    """List the finished records below `root`, in alphabetical order."""
    if not root.is_dir():
        return []
    # A kill between two renames leaves the old record aside; it is put back first.
    for aside in root.glob(".*.old"):
        folders.recover(root / aside.name[1 : -len(".old")])
    return sorted(
        entry.name
        for entry in root.iterdir()
        if not entry.name.startswith(".")
        and not _unfinished(entry.name)
        and (entry / "record.json").is_file()
    )


def every_name(root: Path) -> list[str]:
    """List the finished records below `root`; UserError where there is none."""
    names = record_names(root)
    if not names:
        raise UserError(
            f"no records in {root}: run python attack/badnet.py --save_folder_name NAME first"
        )
    return names


def result_folders(folder: Path) -> Iterator[Path]:
    """Yield the folder of each finished defense below a record."""
    for run in sorted((folder / "defense").glob("*/*")):
        if run.is_dir() and not run.name.startswith(".") and not run.name.endswith(".partial"):
            yield run


def check_name(name: str) -> None:
    """Refuse a record name that is not one plain folder name."""
    if (
        not name
        or name in (".", "..")
        or any(c in name for c in "/\\\0\r")
        or name.startswith(".")
        or _unfinished(name)
    ):
        raise UserError(
            "a record name is one folder name that does not start with a dot or end in .partial,"
            f" got {name!r}"
        )


@dataclass(frozen=True)
class Record:
    """What an attack left on disk: everything that the attacker knows."""

    folder: Path
    info: Mapping[str, Any]
    """record.json: attack, config, data set, architecture, scores, versions, and the SHA-256 of
    every file."""
    train_poison: Poison
    """The poisoned rows of the training set."""
    test_poison: Poison
    """The triggered test images."""

    @classmethod
    def load(cls, name: str, root: Path) -> "Record":
        """Read and verify a record by name.

        Args:
            name: one folder name.
            root: the folder of records.

        Raises:
            UserError: where there is no such record, with the names that there are, or where it
                is unfinished or damaged.
        """
        check_name(name)
        folder = root / name
        folders.recover(folder)

        # An unknown name is answered with what helps: the unfinished run, or the known names.
        if not (folder / "record.json").is_file():
            if (root / f"{name}.partial").is_dir():
                raise UserError(
                    f"no record {name!r} in {root} yet: {name}.partial is unfinished, so run its"
                    " attack command again"
                )
            known = record_names(root)
            listing = (
                f"Known: {', '.join(known)}"
                if known
                else "There is none yet: run python attack/badnet.py --save_folder_name NAME first"
            )
            raise UserError(f"no record {name!r} in {root}.{suggest(name, known)} {listing}")
        return read_folder(folder)

    @property
    def name(self) -> str:
        return self.folder.name

    def model(self) -> Classifier:
        """Read the poisoned model from its file."""
        return self.model_in(self.folder, self.info)

    def model_in(self, folder: Path, info: Mapping[str, Any]) -> Classifier:
        """Read a model of this architecture from its file, such as a defended one.

        Args:
            folder: where model.safetensors lies.
            info: content of the record.json or result.json beside it.
        """
        wanted = self.model_shapes()
        model = self.new_model()
        load_weights(model, folder / "model.safetensors", info["files"], wanted)
        return model

    def new_model(self) -> Classifier:
        """Build the same architecture, initialised from torch's global generator."""
        shape = self.info["dataset"]["image_shape"]
        return build_model(self.info["architecture"], shape, self.info["num_classes"])

    def model_shapes(self) -> reading.Shapes:
        """Return types and shapes of the architecture's weights, without taking their memory."""
        return _model_shapes(self.info)

    def dataset(self, path: str | None = None, configuration: str | None = None) -> Dataset:
        """Find the clean data that the attack started from, by its fingerprint.

        Args:
            path: where the data are; needed only if the cache has lost them.
            configuration: which of several data sets in `path`, as in `load`.
        """
        # The same name can be other data: the fingerprint decides.
        wanted = self.info["dataset"]
        options = dict(image_size=wanted["image_size"], grey=wanted["grey"])
        if path is None:
            found = find_dataset(wanted["name"], wanted["fingerprint"], **options)
        else:
            found = load_dataset(wanted["name"], path, configuration=configuration, **options)
        if found.fingerprint != wanted["fingerprint"]:
            raise UserError(
                f"record {self.name!r} was made on other data: expected fingerprint"
                f" {wanted['fingerprint'][:12]}, but {path} has {found.fingerprint[:12]}: pass the"
                " --dataset_path that the attack was run with"
            )
        self._check_data(found)
        return found

    @property
    def known_poison(self) -> bool:
        """Whether it is known which training images are poisoned; of imported data it is not."""
        return self.info.get("known_poison", True)

    def _check_data(self, found: Dataset) -> None:
        """Refuse data that are not as record.json describes them besides the fingerprint."""
        # Shapes and weights of the record were checked against these numbers.
        said = (
            tuple(self.info["dataset"]["image_shape"]),
            self.info["dataset"]["train_size"],
            self.info["num_classes"],
        )
        true = (found.image_shape, len(found.train), found.num_classes)
        if said != true:
            raise UserError(
                f"{self.folder / 'record.json'}: says images of {said[0]}, {said[1]} of them for"
                f" training, {said[2]} classes, but its data set has images of {true[0]},"
                f" {true[1]}, {true[2]} classes. Restore the record, or make it again"
            )

    def augment(self) -> Augment:
        """Return the augmentation of ordinary training on this data set."""
        config = self.info["config"]
        # Records of older versions have zero borders only.
        border = config.get("crop_border", "zero")
        return Augment(config["crop_padding"], config["flip"], border)


@dataclass(frozen=True)
class DefenderView:
    """What a defender may know, cut down to what the method assumes.

    It never has the poison's positions, the trigger, the target label or a test image.
    """

    architecture: str
    num_classes: int
    image_shape: tuple[int, int, int]
    """(C, H, W)."""
    class_names: tuple[str, ...]
    augment: Augment
    """How the data set is augmented in ordinary training."""
    granted: Mapping[str, Any]
    """What ASSUMES names, and a function that builds a new model."""

    def load_model(self) -> Classifier:
        """Return the backdoored model, a copy of its own at each call."""
        return copy.deepcopy(self._get("model"))

    @property
    def train(self) -> Split:
        """The training set as received: poisoned, unmarked."""
        return self._get("train")

    @property
    def trusted(self) -> Split:
        """A few images known to be clean, with their true labels."""
        return self._get("trusted")

    @property
    def seeds(self) -> Tensor:
        """Positions of training samples that are known to be clean, int64 (S,).

        There is the same number of each class.
        """
        return self._get("seeds")

    @property
    def split(self) -> Tensor:
        """Which training images are to be forgotten, bool (N,): True for at least one and not all.

        A detector or the user says so. It need not be right.
        """
        return self._get("split")

    def new_model(self) -> Classifier:
        """Build the same architecture, freshly initialised."""
        return self.granted["new_model"]()

    def _get(self, what: str) -> Any:
        if what not in self.granted:
            raise PermissionError(
                f"this defense does not assume {what!r}: add it to the ASSUMES of its file"
            )
        return self.granted[what]


def defender_view(
    record: Record,
    dataset: Dataset,
    assumes: Iterable[str],
    trusted: Split | None,
    device: torch.device,
    seeds: Tensor | None = None,
    split: Tensor | None = None,
) -> DefenderView:
    """Cut a record down to what a method assumes.

    Args:
        record: the record to defend.
        dataset: the clean data that it was made from.
        assumes: some of "model", "train", "trusted", "seeds", "split".
        trusted: clean images, where they are assumed.
        device: where models are put.
        seeds: int64 (S,), positions of clean training samples, where they are assumed.
        split: bool (N,), what is to be forgotten, where that is assumed.
    """
    # A closure, and no bound method: no attribute of a view leads to the record.
    granted: dict[str, Any] = {}

    def new_model() -> Classifier:
        model = record.new_model()
        seen: Split | None = granted.get("train", trusted)
        if seen is not None:
            models.fit_input(model, seen.images)
        return model.to(device)

    granted["new_model"] = new_model
    if "model" in assumes:
        granted["model"] = record.model().to(device)
    if "train" in assumes:
        if not record.info.get("has_train", True):
            raise UserError(
                f"record {record.name!r} was imported without its training set, which this defense"
                " needs: use one that does not assume it"
            )
        # Poisoned rows are in place, and nothing marks them.
        granted["train"] = record.train_poison.apply(dataset.train)

    if "trusted" in assumes:
        granted["trusted"] = trusted
    if "seeds" in assumes:
        granted["seeds"] = seeds
    if "split" in assumes:
        granted["split"] = split

    # What everybody may know of a model and its data.
    return DefenderView(
        architecture=record.info["architecture"]["name"],
        num_classes=dataset.num_classes,
        image_shape=dataset.image_shape,
        class_names=dataset.class_names,
        augment=record.augment(),
        granted=granted,
    )


def draw_seeds(
    poison: Poison, labels: Tensor, num_classes: int, per_class: int, generator: torch.Generator
) -> Tensor:
    """Draw positions of clean training samples uniformly, the same number of each class.

    Args:
        poison: what the attack changed.
        labels: int64 (N,), of the clean training set.
        num_classes: number of classes.
        per_class: samples of each class.
        generator: draws them.

    Returns:
        int64 (num_classes * per_class,), increasing.
    """
    # Cover samples keep their label, but they are no clean samples, either.
    touched = torch.zeros(len(labels), dtype=torch.bool)
    touched[poison.index] = True

    drawn = []
    for label in range(num_classes):
        clean = ((labels == label) & ~touched).nonzero().squeeze(1)
        if len(clean) < per_class:
            raise UserError(
                f"expected {per_class} clean seeds of each class, but class {label} has"
                f" {len(clean)} clean samples: lower --seeds_per_class"
            )
        # The first of a permutation are a uniform draw without replacement.
        drawn.append(clean[torch.randperm(len(clean), generator=generator)[:per_class]])
    return torch.cat(drawn).sort().values


def build_model(
    architecture: Mapping[str, Any], image_shape: Sequence[int], num_classes: int
) -> Classifier:
    """Build the network that a record, an exported file or a config describes.

    Args:
        architecture: name, width, mean, std, and stem where it is not "small".
        image_shape: (C, H, W).
        num_classes: number of classes.
    """
    channels, height, width = image_shape
    # "small" is the stem of every network that was trained here.
    return models.build(
        architecture["name"],
        num_classes=num_classes,
        in_chans=channels,
        mean=architecture["mean"],
        std=architecture["std"],
        width=architecture["width"],
        image_size=height if height == width else (height, width),
        stem=architecture.get("stem", "small"),
    )


def _model_shapes(info: Mapping[str, Any]) -> reading.Shapes:
    shape = info["dataset"]["image_shape"]
    return _shapes(json.dumps([info["architecture"], shape, info["num_classes"]]))


@lru_cache(maxsize=64)
def _shapes(arguments: str) -> reading.Shapes:
    # On the meta device a network takes no memory, however large record.json says that it is.
    with torch.device("meta"):
        return shapes_of(build_model(*json.loads(arguments)))


def shapes_of(model: nn.Module) -> reading.Shapes:
    """Return types and shapes of a network's weights, as its file will have them."""
    return {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in model.state_dict().items()
    }


def describe(dataset: Dataset, image_size: int | None, grey: bool | None) -> dict[str, Any]:
    """Return what a record says of its data set.

    Args:
        dataset: the clean data.
        image_size: what --image_size asked for, so that the same can be loaded again.
        grey: what --grey asked for.
    """
    return {
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "image_shape": list(dataset.image_shape),
        "image_size": image_size,
        "grey": grey,
        "train_size": len(dataset.train),
        "class_names": list(dataset.class_names),
    }


def write(
    folder: Path, info: dict[str, Any], model: nn.Module, train_poison: Poison, test_poison: Poison
) -> None:
    """Write a record into a staged folder.

    Args:
        folder: where other files of the record may lie already.
        info: the content of record.json but for the files' checksums.
        model: the poisoned model.
        train_poison: the poisoned rows of the training set.
        test_poison: the triggered test images.
    """
    writing.write_tensors(folder / "model.safetensors", model.state_dict())
    for name, poison in (("train_poison", train_poison), ("test_poison", test_poison)):
        writing.write_tensors(folder / f"{name}.safetensors", vars(poison))

    # Last, for it lists the SHA-256 of all other files.
    writing.write_sealed(
        folder / "record.json", {"schema": SCHEMA, **info, "files": writing.manifest(folder)}
    )


def read_folder(folder: Path) -> Record:
    """Read and verify the record in a folder."""
    path = folder / "record.json"
    # record.json has a checksum of its own, and those of all other files.
    info = reading.read_sealed(path)
    check_record(path, info)
    manifest = info["files"]
    checks: dict[str, reading.Check] = {
        "train_poison.safetensors": poison_shapes(info, info["dataset"]["train_size"]),
        "test_poison.safetensors": poison_shapes(info, None),
    }

    # Sizes and headers are cheap to check, and refuse a bomb before its bytes are read.
    every: dict[str, reading.Check] = {"model.safetensors": partial(_check_weights, info), **checks}
    for name, check in every.items():
        if not (folder / name).is_file():
            raise UserError(
                f"{folder / name}: missing, but record.json lists it. Restore it, or make the"
                " record again with --overwrite"
            )
        shapes = reading.read_shapes(folder / name, manifest[name])
        with reading.one_line(folder / name):
            check(shapes)

    # Poison is hashed when it is read into memory; all other files here.
    for name in manifest:
        if name not in checks:
            reading.check_file(folder, name, manifest[name])
    train, test = (
        _read_poison(folder / name, manifest[name], check, info) for name, check in checks.items()
    )
    return Record(folder, info, train, test)


def read_result(folder: Path) -> dict[str, Any]:
    """The result.json of a finished defense."""
    result = reading.read_sealed(folder / "result.json")
    check_result(folder / "result.json", result)
    return result


def refuse_unreadable(folder: Path, read: Callable[[Path], object]) -> None:
    """Read a finished folder back before it gets its name.

    A record or result that cannot be read would stop every table.

    Args:
        folder: the staged folder.
        read: its reader.
    """
    try:
        read(folder)
    except UserError as error:
        why = str(error).partition(". Restore")[0]
        raise UserError(
            f"not published, for it could not be read back: {why}: change what makes it so and run"
            " the same command again"
        ) from error


def load_weights(
    model: nn.Module, path: Path, manifest: Mapping[str, Any], wanted: reading.Shapes
) -> None:
    """Load a file's weights into a model, after its checksum and shapes were verified.

    Args:
        model: gets the weights.
        path: a safetensors file.
        manifest: file name -> SHA-256 and size.
        wanted: types and shapes of the model's weights.
    """
    tensors, _ = reading.read_tensors(
        path, entry=manifest[path.name], check=lambda shapes: refuse_difference(shapes, wanted)
    )
    model.load_state_dict(tensors)


def _check_weights(info: Mapping[str, Any], found: reading.Shapes) -> None:
    """Refuse weights of another network, before memory is taken for the one that is named."""
    try:
        refuse_difference(found, _model_shapes(info))
    except ValueError as error:
        raise ValueError(
            f"not the weights of {info['architecture']['name']} as record.json describes it:"
            f" {error}"
        ) from error


def _read_poison(
    path: Path, entry: reading.Entry, check: reading.Check, info: Mapping[str, Any]
) -> Poison:
    """Read a file of poison, and refuse positions, labels and kinds that cannot be."""
    tensors, _ = reading.read_tensors(path, entry=entry, check=check)
    poison = Poison(**tensors)

    # record.json does not say how many test images there are.
    size = info["dataset"]["train_size"] if path.name == "train_poison.safetensors" else 1 << 62
    with reading.one_line(path):
        if len(poison) and (
            int(poison.index[0]) < 0
            or bool((poison.index.diff() <= 0).any())
            or int(poison.index[-1]) >= size
        ):
            raise ValueError("its index does not rise within the data set")
        # Labels become rows of a table and of a loss: none may lie outside.
        for labels in (poison.labels, poison.original_labels):
            if (
                len(labels)
                and not 0 <= int(labels.min()) <= int(labels.max()) < info["num_classes"]
            ):
                raise ValueError(f"a label outside 0..{info['num_classes'] - 1}")
        if not bool(((poison.kind == POISON) | (poison.kind == CROSS)).all()):
            raise ValueError("a kind of poison that this version does not know")
    return poison


def _unfinished(name: str) -> bool:
    return name.endswith(".partial")
