"""Readers of data sets, one for each kind of source: scikit-learn, torchvision, a user's folder."""

import socket
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import UserError
from .decoding import ON_WHITE, TURNED, Arrays, decode_all, from_bytes, from_file, from_pil
from .folders import plan_images
from .locations import class_folders, data_root, listing, parquet_files
from .plan import Plan
from .shards import plan_shards, read_cells


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


def plan_folder(path: Path, wanted: str | None = None) -> Plan:
    """Plan what is read of a user's folder: parquet shards where it has some, else images.

    Args:
        path: the folder.
        wanted: the configuration of parquet shards to read, as --dataset_config names it.

    Raises:
        UserError: the folder has neither layout, or something in it does not fit.
    """
    if any(parquet_files(path)):
        return plan_shards(path, wanted)
    if wanted is not None:
        raise UserError(
            f"--dataset_config {wanted}: expected parquet shards in {path}, found {listing(path)}:"
            " leave it out, or give the folder of the shards"
        )
    if (path / "train").is_dir() and class_folders(path / "train"):
        return plan_images(path)
    raise UserError(
        f"--dataset_path {path}: expected *.parquet shards or train/<class>/*.png in it, found"
        f" {listing(path)}"
    )


def read_plan(
    plan: Plan, image_size: int | None, grey: bool | None
) -> tuple[Arrays, tuple[str, ...]]:
    """Decode the images of a plan; `image_size` and `grey` as in `load.load`.

    Returns:
        (the arrays, sentences on what was done to images).
    """
    done: list[str] = []
    images = [
        _decoded(plan, part.files, image_size, grey, done) for part in (plan.train, plan.test)
    ]
    refuse_equal(images[0], plan.train.labels, plan.class_names)
    arrays = images[0], plan.train.labels, images[1], plan.test.labels, plan.class_names

    # Said once for all images, however many there are.
    counts = Counter(done)
    texts = {
        TURNED: "images are turned upright, as their EXIF orientation says",
        ON_WHITE: "images have transparent pixels, and are put on white",
    }
    notes = [f"{counts[change]:,} {text}" for change, text in texts.items() if counts[change]]
    return arrays, tuple(notes)


def _decoded(
    plan: Plan,
    files: Sequence[Path],
    image_size: int | None,
    grey: bool | None,
    done: list[str],
) -> np.ndarray:
    """Decode the images of one part of a plan: uint8 (N, C, H, W)."""
    if plan.kind == "shards":
        return shard_images(files, plan.root, image_size, grey, done)
    return decode_all(files, lambda file: from_file(file, image_size, grey, done))


def shard_images(
    files: Sequence[Path],
    path: Path,
    image_size: int | None,
    grey: bool | None,
    done: list[str] | None = None,
) -> np.ndarray:
    """Decode the images of parquet shards: uint8 (N, C, H, W).

    Args:
        files: the shards, in the order of the result.
        path: the folder that the user gave, for errors.
        image_size: side in pixels to resize to; None keeps the size.
        grey: one channel (True) or three (False); None decides by each image.
        done: as in `from_pil`.
    """
    # An empty cell fails when it is decoded.
    encoded = [cell for file in files for cell in read_cells(file)]
    return decode_all(encoded, lambda cell: from_bytes(cell, path, image_size, grey, done))


def refuse_equal(images: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> None:
    """Raise a UserError if all images of a class are equal, as black squares are.

    Args:
        images: uint8 (N, C, H, W).
        labels: int64 (N,).
        class_names: names of the classes, by label.
    """
    order = np.argsort(labels, kind="stable")
    ends = np.flatnonzero(np.diff(labels[order])) + 1
    for members in np.split(order, ends):
        # Two images that differ settle it for nearly every class.
        first = images[members[0]]
        if len(members) > 1 and all(np.array_equal(first, images[i]) for i in members[1:]):
            name = class_names[labels[members[0]]]
            raise UserError(
                f"class {name}: all {len(members):,} training images are equal after decoding:"
                " expected different pictures, look at the files"
            )
