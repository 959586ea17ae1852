"""The record of an attack on disk, and the part of it that a defender may see."""

import copy
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    """--record_root, else $BACKDOORLAB_RECORDS, else record/ of the checkout, else ./record."""
    if given:
        return Path(given)
    if os.environ.get("BACKDOORLAB_RECORDS"):
        return Path(os.environ["BACKDOORLAB_RECORDS"])
    checkout = Path(__file__).parent.parent
    return checkout / "record" if (checkout / "setup.py").exists() else Path("record")


def record_names(root: Path) -> list[str]:
    """Every finished record below `root`, in alphabetical order."""
    if not root.is_dir():
        return []
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
    """As `record_names`, of which there must be one."""
    names = record_names(root)
    if not names:
        raise UserError(
            f"no records in {root}: run python attack/badnet.py --save_folder_name NAME first"
        )
    return names


def result_folders(folder: Path) -> Iterator[Path]:
    """Every folder of a defense's result below a record, finished ones only."""
    for run in sorted((folder / "defense").glob("*/*")):
        if run.is_dir() and not run.name.startswith(".") and not run.name.endswith(".partial"):
            yield run


def check_name(name: str) -> None:
    """A record's name is one folder name."""
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
    """Everything the attacker knows."""

    folder: Path
    info: Mapping[str, Any]
    """record.json: attack, config, data set, architecture, scores, versions, and the SHA-256 of
    every file."""
    train_poison: Poison
    test_poison: Poison

    @classmethod
    def load(cls, name: str, root: Path) -> "Record":
        """Read and verify a record by name; an unknown name is answered with the known ones."""
        check_name(name)
        folder = root / name
        folders.recover(folder)
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
        """The poisoned model, a fresh copy."""
        wanted = self.model_shapes()
        model = self.new_model()
        load_weights(model, self.folder / "model.safetensors", self.info["files"], wanted)
        return model

    def new_model(self) -> Classifier:
        """The same architecture, freshly initialised from torch's global generator."""
        return build_model(
            self.info["architecture"], self.info["dataset"], self.info["num_classes"]
        )

    def model_shapes(self) -> reading.Shapes:
        """Types and shapes of the weights of the architecture that record.json names, without
        making them."""
        return _model_shapes(self.info)

    def dataset(self, path: str | None = None) -> Dataset:
        """The clean data that the attack started from, by its fingerprint; `path` says where it is
        if the cache has lost it."""
        wanted = self.info["dataset"]
        options = dict(image_size=wanted["image_size"], grey=wanted["grey"])
        if path is None:
            found = find_dataset(wanted["name"], wanted["fingerprint"], **options)
        else:
            found = load_dataset(wanted["name"], path, **options)
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
        """Whether the record says which training images are poisoned; a stranger's data set does
        not."""
        return self.info.get("known_poison", True)

    def _check_data(self, found: Dataset) -> None:
        """The fingerprint decides which data it is; what record.json says of them besides must be
        true, too."""
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
        config = self.info["config"]
        return Augment(config["crop_padding"], config["flip"])


@dataclass(frozen=True)
class DefenderView:
    """Everything a defender may know; what a method does not assume is not there.

    Never in it: the poison indices, the trigger, the target label, a test image.
    """

    architecture: str
    num_classes: int
    image_shape: tuple[int, int, int]
    """(C, H, W)."""
    class_names: tuple[str, ...]
    augment: Augment
    """How the data set is augmented in ordinary training."""
    granted: Mapping[str, Any]

    def load_model(self) -> Classifier:
        """The backdoored model, a copy of its own at each call."""
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
        """int64 (S,): positions of the training samples that someone has looked at and found clean,
        the same number of each class."""
        return self._get("seeds")

    def new_model(self) -> Classifier:
        """The same architecture, freshly initialised."""
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
) -> DefenderView:
    """Cut a record down to what a method assumes."""
    granted: dict[str, Any] = {"new_model": lambda: record.new_model().to(device)}
    if "model" in assumes:
        granted["model"] = record.model().to(device)
    if "train" in assumes:
        if not record.info.get("has_train", True):
            raise UserError(
                f"record {record.name!r} was imported without its training set, which this defense"
                " needs: use one that does not assume it"
            )
        granted["train"] = record.train_poison.apply(dataset.train)
    if "trusted" in assumes:
        granted["trusted"] = trusted
    if "seeds" in assumes:
        granted["seeds"] = seeds
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
    """Positions of `per_class` untouched samples of each class, drawn uniformly; increasing."""
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
        drawn.append(clean[torch.randperm(len(clean), generator=generator)[:per_class]])
    return torch.cat(drawn).sort().values


def build_model(
    architecture: Mapping[str, Any], dataset: Mapping[str, Any], num_classes: int
) -> Classifier:
    """architecture: name, width, mean, std, and stem where it is not our own; dataset:
    image_shape."""
    channels, height, _ = dataset["image_shape"]
    return models.build(
        architecture["name"],
        num_classes=num_classes,
        in_chans=channels,
        mean=architecture["mean"],
        std=architecture["std"],
        width=architecture["width"],
        image_size=height,
        stem=architecture.get("stem", "small"),
    )


def _model_shapes(info: Mapping[str, Any]) -> reading.Shapes:
    said = {
        "architecture": info["architecture"],
        "dataset": {"image_shape": info["dataset"]["image_shape"]},
    }
    return _shapes(json.dumps({**said, "num_classes": info["num_classes"]}))


@lru_cache(maxsize=64)
def _shapes(arguments: str) -> reading.Shapes:
    with torch.device("meta"):
        return shapes_of(build_model(**json.loads(arguments)))


def shapes_of(model: nn.Module) -> reading.Shapes:
    """Types and shapes of a network's weights, as its file will have them."""
    return {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in model.state_dict().items()
    }


def describe(dataset: Dataset, image_size: int | None, grey: bool | None) -> dict[str, Any]:
    """A record's entry for its data set; image_size and grey are what was asked for, so that the
    same can be loaded again."""
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
    """Fill a staged folder: weights and poison first, then record.json with the SHA-256 of every
    file in the folder."""
    writing.write_tensors(folder / "model.safetensors", model.state_dict())
    for name, poison in (("train_poison", train_poison), ("test_poison", test_poison)):
        writing.write_tensors(folder / f"{name}.safetensors", vars(poison))
    writing.write_sealed(
        folder / "record.json", {"schema": SCHEMA, **info, "files": writing.manifest(folder)}
    )


def read_folder(folder: Path) -> Record:
    """Read and verify the record in a folder: every size and header first, then every hash, then
    what is kept in memory."""
    path = folder / "record.json"
    info = reading.read_sealed(path)
    check_record(path, info)
    manifest = info["files"]
    checks: dict[str, reading.Check] = {
        "train_poison.safetensors": poison_shapes(info, info["dataset"]["train_size"]),
        "test_poison.safetensors": poison_shapes(info, None),
    }
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
    """Read a finished folder as everybody will, before it has its name: one that cannot be read
    would be in the way of every table."""
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
    """Put a verified file's weights into a model whose weights have the shapes `wanted`."""
    tensors, _ = reading.read_tensors(
        path, entry=manifest[path.name], check=lambda shapes: refuse_difference(shapes, wanted)
    )
    model.load_state_dict(tensors)


def _check_weights(info: Mapping[str, Any], found: reading.Shapes) -> None:
    """The weights are those of the architecture, which record.json could name in any size: looked
    at before it is made."""
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
    tensors, _ = reading.read_tensors(path, entry=entry, check=check)
    poison = Poison(**tensors)
    size = info["dataset"]["train_size"] if path.name == "train_poison.safetensors" else 1 << 62
    with reading.one_line(path):
        if len(poison) and (
            int(poison.index[0]) < 0
            or bool((poison.index.diff() <= 0).any())
            or int(poison.index[-1]) >= size
        ):
            raise ValueError("its index does not rise within the data set")
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
