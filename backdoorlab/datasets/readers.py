"""Readers of data sets, one for each kind of source: scikit-learn, torchvision, parquet shards,
image folders."""

import json
import re
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import UserError
from ..storage.reading import is_count
from .decoding import Arrays, decode_all, from_bytes, from_file, from_pil
from .locations import IMAGE_SUFFIXES, class_files, class_folders, data_root, listing, parquet_files

MOST_CLASSES = 2**16
"""Labels from here on are refused unless there are as many images: every class up to the largest
label takes memory in the network."""


def digits(image_size: int, channels: int) -> Arrays:
    """Read scikit-learn's digits: 1,797 grey images of 8x8 pixels, the test set of UCI.

    They are resized to `image_size` (bilinear). Every fifth image of each class is a test image.
    """
    from sklearn.datasets import load_digits

    # Grey values are 0..16.
    bunch = load_digits()
    small = torch.from_numpy(bunch.images).to(torch.float32)[:, None] * (255 / 16)
    large = torch.nn.functional.interpolate(
        small, size=(image_size, image_size), mode="bilinear", align_corners=False
    )
    images = large.round().clamp(0, 255).to(torch.uint8).repeat(1, channels, 1, 1).numpy()

    # rank_in_class: how many images of the same class stand before this one.
    labels = bunch.target.astype(np.int64)
    rank_in_class = (labels[:, None] == np.arange(10)).cumsum(0)[np.arange(len(labels)), labels]
    test = rank_in_class % 5 == 0
    return (
        images[~test],
        labels[~test],
        images[test],
        labels[test],
        tuple(str(digit) for digit in range(10)),
    )


GTSRB = (
    "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/GTSRB_Final_Training_Images.zip",
    "f33fd80ac59bff73c82d25ab499e03a3",
)
"""Address and MD5 of the training set of the final competition, for which results on GTSRB are
published. torchvision has that of the competition before, 26,640 images."""
GTSRB_SIZE = 39_209
"""Images in it."""

TORCHVISION: dict[str, tuple[str | None, dict[str, Any], dict[str, Any]]] = {
    "cifar10": ("CIFAR10", dict(train=True), dict(train=False)),
    "cifar100": ("CIFAR100", dict(train=True), dict(train=False)),
    "mnist": ("MNIST", dict(train=True), dict(train=False)),
    "fashion_mnist": ("FashionMNIST", dict(train=True), dict(train=False)),
    "gtsrb": (None, dict(split="train"), dict(split="test")),
    "svhn": ("SVHN", dict(split="train"), dict(split="test")),
}
"""Name -> torchvision's class (None for `_gtsrb`), its arguments for training and test images."""


def from_torchvision(name: str, image_size: int | None, grey: bool | None) -> Arrays:
    """Read one of TORCHVISION, and download it where it is missing.

    `image_size` and `grey` as in `load.load`.
    """
    import torchvision.datasets

    root = data_root()
    class_name, train_arguments, test_arguments = TORCHVISION[name]
    make = getattr(torchvision.datasets, class_name) if class_name else _gtsrb
    parts = []
    for arguments in (train_arguments, test_arguments):
        found = _found_or_downloaded(make, arguments, name, root)
        parts.append(decode_all(found, lambda item: from_pil(item[0], image_size, grey)))
        # Some of torchvision's classes say targets, others labels.
        parts.append(
            np.asarray(getattr(found, "targets", getattr(found, "labels", None)), dtype=np.int64)
        )

    class_names = tuple(str(c) for c in getattr(found, "classes", range(int(parts[1].max()) + 1)))
    return parts[0], parts[1], parts[2], parts[3], class_names


def _found_or_downloaded(
    make: Callable[..., Any], arguments: dict[str, Any], name: str, root: Path
) -> Any:
    """Return a data set of torchvision, from `root` or from the network."""
    try:
        return make(root=str(root), download=False, **arguments)
    except RuntimeError:
        _require_network(name, root)

    try:
        return make(root=str(root), download=True, **arguments)
    except Exception as error:
        raise UserError(
            f"data set {name!r} could not be downloaded to {root} ({error}): pass"
            " --dataset_path FOLDER"
        ) from error


def _gtsrb(root: str, split: str, download: bool) -> Any:
    """Make GTSRB: torchvision's test set, or the final competition's training set.

    Raises:
        RuntimeError: the training set is not there, as torchvision says it of its own sets.
    """
    from torchvision.datasets import GTSRB as Theirs
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.utils import download_and_extract_archive

    if split == "test":
        test = Theirs(root, split=split, download=download)
        # torchvision's other data sets have this attribute.
        test.targets = [label for _, label in test._samples]
        return test

    folder = Path(root) / "gtsrb"
    images = folder / "GTSRB" / "Final_Training" / "Images"
    if download:
        address, md5 = GTSRB
        download_and_extract_archive(address, download_root=str(folder), md5=md5)
    # An interrupted download or unpacking leaves fewer.
    found = ImageFolder(str(images)) if images.is_dir() else ()
    if len(found) != GTSRB_SIZE:
        raise RuntimeError(f"{images}: expected {GTSRB_SIZE:,} images, found {len(found):,}")
    return found


def _require_network(name: str, root: Path) -> None:
    """Raise a UserError within seconds if there is no network, in place of a row of retries."""
    # One host that answers is enough.
    for host in ("www.cs.toronto.edu", "ossci-datasets.s3.amazonaws.com", "github.com"):
        try:
            with socket.create_connection((host, 443), timeout=2):
                return
        except OSError:
            continue
    raise UserError(
        f"data set {name!r} is not in {root.resolve()} and there is no network to download it: pass"
        " --dataset_path FOLDER (parquet shards or train/<class>/*.png), or set BACKDOORLAB_DATA"
        " to torchvision's folder"
    )


def folder_reader(path: Path) -> Callable[[Path, int | None, bool | None], Arrays]:
    """Return the reader for a folder: of parquet shards where it has some, else of images."""
    if any(parquet_files(path)):
        return _parquet
    if (path / "train").is_dir() and class_folders(path / "train"):
        return _image_folder
    raise UserError(
        f"--dataset_path {path}: expected *.parquet shards or train/<class>/*.png in it, found"
        f" {listing(path)}"
    )


def _parquet(path: Path, image_size: int | None, grey: bool | None) -> Arrays:
    """Read parquet shards of the Hugging Face hub, anywhere below a folder.

    Their names say the split: train*.parquet, and test*.parquet or validation*.parquet.
    """
    shards = sorted(parquet_files(path))

    def of(split: str) -> list[Path]:
        # A word in the name must begin so: "latest" is no test set.
        return [shard for shard in shards if re.search(rf"(?<![a-z]){split}", shard.name.lower())]

    train, test = of("train"), of("test") or of("val")
    both = sorted({*train} & {*test})
    if both:
        raise UserError(
            f"{both[0]}: its name says training and test set: expected train*.parquet and"
            " test*.parquet"
        )
    if not train or not test:
        raise UserError(
            f"--dataset_path {path}: expected shards named train*.parquet and test*.parquet, found"
            f" {listing(path)}"
        )

    parts = [read_shards(files, path, image_size, grey) for files in (train, test)]
    # The classes are those of the training set.
    strange = sorted(set(parts[1][1].tolist()) - set(parts[0][1].tolist()))
    if strange:
        raise UserError(
            f"{test[0]}: no training image has the label {strange[0]} ({len(strange)} such labels):"
            " expected every class in the training set, pass a folder with all its shards"
        )
    return *parts[0], *parts[1], _class_names(path, int(parts[0][1].max()) + 1)


def read_shards(
    files: list[Path], path: Path, image_size: int | None, grey: bool | None
) -> tuple[np.ndarray, np.ndarray]:
    """Read parquet shards.

    Args:
        files: the shards, in the order of the result.
        path: the folder that the user gave, for errors.
        image_size: side in pixels to resize to; None keeps the size.
        grey: one channel (True) or three (False); None decides by each image.

    Returns:
        (images uint8 (N, C, H, W), labels int64 (N,)).
    """
    import pyarrow.parquet as pq

    encoded: list[bytes] = []
    labels: list[int] = []
    for file in files:
        # The schema alone tells whether the columns are there, before data are read.
        try:
            schema = pq.read_schema(file)
            image_column = _column(file, schema.names, ("img", "image"))
            label_column = _column(file, schema.names, ("label", "labels", "fine_label"))
            table = pq.read_table(file, columns=[image_column, label_column])
        except (OSError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{file}: not a readable parquet file ({error}): fetch it again"
            ) from error

        # The hub stores an image as {bytes, path}. An empty cell fails when it is decoded.
        encoded += [
            cell.get("bytes") or b"" if isinstance(cell, dict) else cell
            for cell in table[image_column].to_pylist()
        ]
        labels += table[label_column].to_pylist()

    return decode_all(encoded, lambda item: from_bytes(item, path, image_size, grey)), _labels(
        labels, path
    )


def _image_folder(path: Path, image_size: int | None, grey: bool | None) -> Arrays:
    """Read train/<class>/*.png with test/ or val/ beside it.

    The classes are in alphabetical order, or in numerical order where they are numbers.
    """
    classes = class_folders(path / "train")
    test = next(
        (path / n for n in ("test", "val", "valid", "validation") if (path / n).is_dir()), None
    )
    if test is None:
        raise UserError(
            f"--dataset_path {path}: expected test/ or val/ beside train/, found {listing(path)}"
        )

    strange = sorted(set(class_folders(test)) - set(classes))
    if strange:
        raise UserError(
            f"{test / strange[0]}: no folder of this name in train/, whose folders are the classes:"
            f" {', '.join(classes[:5])}"
        )

    parts = [class_images(folder, classes, image_size, grey) for folder in (path / "train", test)]
    # A class without images would still be an output of the network.
    bare = sorted(set(range(len(classes))) - set(parts[0][1].tolist()))
    if bare:
        raise UserError(
            f"{path / 'train' / classes[bare[0]]}: no images ({' '.join(IMAGE_SUFFIXES)}); each"
            " folder in train/ is a class"
        )
    return *parts[0], *parts[1], tuple(classes)


def class_images(
    folder: Path, classes: Sequence[str], image_size: int | None, grey: bool | None
) -> tuple[np.ndarray, np.ndarray]:
    """Read <folder>/<class>/*.png.

    Returns:
        (images uint8 (N, C, H, W), labels int64 (N,)): a label is a position in `classes`.
    """
    files, labels = class_files(folder, classes)
    if not files:
        raise UserError(f"{folder}: no images ({' '.join(IMAGE_SUFFIXES)}) in {folder}/<class>/")
    return decode_all(files, lambda item: from_file(item, image_size, grey)), np.asarray(
        labels, dtype=np.int64
    )


def _labels(labels: Any, path: Path) -> np.ndarray:
    """Return labels as int64 (N,), and refuse missing, negative and implausible ones."""
    wrong = [label for label in labels if not is_count(label)]
    if wrong:
        raise UserError(
            f"{path}: labels must be whole numbers from 0 on, found {str(wrong[0])[:60]!r}: write"
            " the classes as their numbers"
        )
    most = max(labels, default=0)
    if most >= max(MOST_CLASSES, len(labels)):
        raise UserError(
            f"{path}: found label {most} among {len(labels):,} images: expected the classes as"
            " numbers from 0 on, without gaps"
        )
    return np.asarray(labels, dtype=np.int64)


def _class_names(path: Path, count: int) -> tuple[str, ...]:
    """Read the names of `count` classes from a folder's classes.json.

    It may be a list of names, a list of {label, name}, or an object {number: name}, also under the
    key "classes" or "names". Without the file, the numbers are the names.
    """
    file = path / "classes.json"
    if not file.exists():
        return tuple(str(number) for number in range(count))
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON ({error})") from error

    # Each accepted form is brought to a list in the order of the labels.
    if isinstance(found, dict):
        found = found.get("classes", found.get("names", found))
    if isinstance(found, dict):
        found = [found.get(str(number), str(number)) for number in range(count)]
    if not isinstance(found, list):
        raise UserError(f"{file}: expected a list of class names, found {type(found).__name__}")
    if all(isinstance(entry, dict) and "name" in entry for entry in found):
        if not all(is_count(entry.get("label", 0)) for entry in found):
            raise UserError(f"{file}: expected whole numbers as labels beside the names")
        found = [entry["name"] for entry in sorted(found, key=lambda entry: entry.get("label", 0))]

    if len(found) < count:
        raise UserError(f"{file}: {len(found)} class names, but labels up to {count - 1}")
    return tuple(str(name) for name in found)


def _column(file: Path, columns: list[str], wanted: tuple[str, ...]) -> str:
    """Return the first of the wanted columns that a shard has."""
    for name in wanted:
        if name in columns:
            return name
    raise UserError(f"{file}: expected a column {' or '.join(wanted)}, found {', '.join(columns)}")
