"""The record of an attack on disk, and the part of it that a defender may see."""

import copy
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import datasets, files, models
from .data import Augment, Dataset, Split
from .errors import UserError, suggest
from .models import Classifier
from .poison import Poison

SCHEMA = 1
PAYLOAD = ("model.safetensors", "train_poison.safetensors", "test_poison.safetensors")
REQUIRED = ("schema", "attack", "config", "dataset", "architecture", "num_classes", "seed", "scores", "files")


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
    return sorted(entry.name for entry in root.iterdir() if (entry / "record.json").is_file() and not _unfinished(entry.name))


def check_name(name: str) -> None:
    """A record's name is one folder name."""
    if not name or name in (".", "..") or any(c in name for c in "/\\\0") or name.startswith(".") or _unfinished(name):
        raise UserError(f"a record name is one folder name that does not start with a dot or end in .partial, got {name!r}")


@dataclass(frozen=True)
class Record:
    """Everything the attacker knows."""

    folder: Path
    info: Mapping[str, Any]
    """record.json: attack, config, data set, architecture, scores, versions, and the SHA-256 of every file."""
    train_poison: Poison
    test_poison: Poison

    @classmethod
    def load(cls, name: str, root: Path) -> "Record":
        """Read and verify a record by name; an unknown name is answered with the known ones."""
        check_name(name)
        folder = root / name
        if not (folder / "record.json").is_file():
            known = record_names(root)
            listing = f"Known: {', '.join(known)}" if known else "There is none yet: run python attack/badnet.py --save_folder_name NAME first"
            raise UserError(f"no record {name!r} in {root}.{suggest(name, known)} {listing}")
        info = files.read_json(folder / "record.json")
        _check_info(folder / "record.json", info)
        for file in info["files"]:
            _check_file(folder, file, info["files"])
        return cls(folder, info, _read_poison(folder / "train_poison.safetensors"), _read_poison(folder / "test_poison.safetensors"))

    @property
    def name(self) -> str:
        return self.folder.name

    def model(self) -> Classifier:
        """The poisoned model, a fresh copy."""
        tensors, _ = files.read_tensors(self.folder / "model.safetensors")
        model = self.new_model()
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise UserError(f"{self.folder / 'model.safetensors'}: not the weights of {self.info['architecture']['name']}") from error
        return model

    def new_model(self) -> Classifier:
        """The same architecture, freshly initialised from torch's global generator."""
        return build_model(self.info["architecture"], self.info["dataset"], self.info["num_classes"])

    def dataset(self, path: str | None = None) -> Dataset:
        """The clean data that the attack started from, by its fingerprint; `path` says where it is if the cache has lost it."""
        wanted = self.info["dataset"]
        options = dict(image_size=wanted["image_size"], grey=wanted["grey"])
        if path is None:
            return datasets.find(wanted["name"], wanted["fingerprint"], **options)
        found = datasets.load(wanted["name"], path, **options)
        if found.fingerprint != wanted["fingerprint"]:
            raise UserError(
                f"record {self.name!r} was made on other data: expected fingerprint {wanted['fingerprint'][:12]}, but {path} has"
                f" {found.fingerprint[:12]}: pass the --dataset_path that the attack was run with"
            )
        return found

    @property
    def known_poison(self) -> bool:
        """Whether the record says which training images are poisoned; a stranger's data set does not."""
        return self.info.get("known_poison", True)

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

    @property
    def model(self) -> Classifier:
        """The backdoored model, a fresh copy at each access."""
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
        """int64 (S,): positions of the training samples that someone has looked at and found clean, the same number of each class."""
        return self._get("seeds")

    def new_model(self) -> Classifier:
        """The same architecture, freshly initialised."""
        return self.granted["new_model"]()

    def _get(self, what: str) -> Any:
        if what not in self.granted:
            raise PermissionError(f"this defense does not assume {what!r}: add it to the ASSUMES of its file")
        return self.granted[what]


ASSUMABLE = {"model": "poisoned model", "train": "poisoned training set", "trusted": "trusted images", "seeds": "clean seeds"}
"""What a defense may assume, in the words of the table."""


def defender_view(
    record: Record, dataset: Dataset, assumes: Iterable[str], trusted: Split | None, device: torch.device, seeds: Tensor | None = None
) -> DefenderView:
    """Cut a record down to what a method assumes."""
    granted: dict[str, Any] = {"new_model": lambda: record.new_model().to(device)}
    if "model" in assumes:
        granted["model"] = record.model().to(device)
    if "train" in assumes:
        if not record.info.get("has_train", True):
            raise UserError(
                f"record {record.name!r} was imported without its training set, which this defense needs: use one that does not assume it"
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


def draw_seeds(poison: Poison, labels: Tensor, num_classes: int, per_class: int, generator: torch.Generator) -> Tensor:
    """Positions of `per_class` untouched samples of each class, drawn uniformly; increasing."""
    touched = torch.zeros(len(labels), dtype=torch.bool)
    touched[poison.index] = True
    drawn = []
    for label in range(num_classes):
        clean = ((labels == label) & ~touched).nonzero().squeeze(1)
        if len(clean) < per_class:
            raise UserError(
                f"expected {per_class} clean seeds of each class, but class {label} has {len(clean)} clean samples: lower --seeds_per_class"
            )
        drawn.append(clean[torch.randperm(len(clean), generator=generator)[:per_class]])
    return torch.cat(drawn).sort().values


def build_model(architecture: Mapping[str, Any], dataset: Mapping[str, Any], num_classes: int) -> Classifier:
    """architecture: name, width, mean, std, and stem where it is not our own; dataset: image_shape."""
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


def write(folder: Path, info: dict[str, Any], model: nn.Module, train_poison: Poison, test_poison: Poison) -> None:
    """Fill a staged folder: weights and poison first, then record.json with the SHA-256 of every file in the folder."""
    files.write_tensors(folder / "model.safetensors", model.state_dict())
    for name, poison in (("train_poison", train_poison), ("test_poison", test_poison)):
        files.write_tensors(folder / f"{name}.safetensors", vars(poison))
    files.write_json(folder / "record.json", {"schema": SCHEMA, **info, "files": files.manifest(folder)})


def _read_poison(path: Path) -> Poison:
    tensors, _ = files.read_tensors(path)
    try:
        return Poison(**tensors)
    except TypeError as error:
        raise UserError(f"{path}: damaged file (expected index, images, labels, original_labels, kind)") from error


def _check_info(path: Path, info: dict[str, Any]) -> None:
    missing = [key for key in REQUIRED if key not in info]
    if missing:
        raise UserError(f"{path}: damaged file (no {', '.join(missing)}). Restore it, or make it again with --overwrite")
    objects = ("config", "dataset", "architecture", "scores", "files")
    wrong = [key for key in objects if not isinstance(info[key], dict)] + [
        name for name in PAYLOAD if not isinstance(info["files"], dict) or not _has_hash(info["files"].get(name))
    ]
    if wrong:
        raise UserError(f"{path}: damaged file (nothing usable on {', '.join(wrong)}). Restore it, or make it again with --overwrite")
    if info["schema"] != SCHEMA:
        raise UserError(f"{path}: schema {info['schema']}, but this version reads schema {SCHEMA}: use the version that wrote it")


def _has_hash(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("sha256"), str)


def _check_file(folder: Path, file: str, manifest: Mapping[str, Any]) -> None:
    path = folder / file
    if not _has_hash(manifest[file]):
        raise UserError(f"{folder / 'record.json'}: damaged file (no SHA-256 of {file}). Restore it, or make it again with --overwrite")
    if Path(file).name != file or not path.is_file():
        raise UserError(f"{path}: missing, but record.json lists it. Restore it, or make the record again with --overwrite")
    if files.sha256(path) != manifest[file]["sha256"]:
        raise UserError(f"{path}: damaged file (its SHA-256 is not the one in record.json). Restore it, or make it again with --overwrite")


def _unfinished(name: str) -> bool:
    return name.endswith(".partial")
