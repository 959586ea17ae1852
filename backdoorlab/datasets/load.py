"""Data sets by name: read and resized once, then kept as bytes in a cache.

The names that need no path:
  digits                                            in scikit-learn, the default
  cifar10 cifar100 mnist fashion_mnist gtsrb svhn   downloaded by torchvision where they are missing
                                                    (gtsrb with its final training set)

With --dataset_path FOLDER, a data set may have any name. FOLDER has one of two layouts:
  *.parquet             as on the Hugging Face hub: columns `img` or `image`, and `label`
  train/<class>/*.png   with test/<class>/*.png or val/<class>/*.png beside it
"""

import hashlib
import json
import re
import unicodedata
from dataclasses import replace
from pathlib import Path

import torch

from ..data import Dataset, Split
from ..errors import UserError, suggest
from ..storage.schema import is_plain
from .cache import read_cache, read_meta, write_cache
from .decoding import SAID_FORMATS, decode_all, from_file, refuse_different
from .folders import class_images
from .locations import cache_root, class_folders, listing, parquet_files
from .plan import LeftOut, aside
from .readers import (
    TORCHVISION,
    digits,
    from_torchvision,
    plan_folder,
    read_plan,
    shard_images,
)
from .shards import read_labels

DEFAULT = "digits"
READER_VERSION = 5
"""Part of every cache key. Raise it when a change of reading, decoding or resizing changes a
pixel."""


def load(
    name: str,
    path: str | None = None,
    *,
    image_size: int | None = None,
    grey: bool | None = None,
    configuration: str | None = None,
) -> Dataset:
    """Load a data set from the cache, else from `path`, else by name.

    Args:
        name: one of `names()`, or any name with a path.
        path: folder of images; None reads scikit-learn or torchvision.
        image_size: side in pixels that every image is resized to (bilinear); None keeps the size.
        grey: one channel (True) or three (False); None keeps what the first image has.
        configuration: which of a folder's several sets of parquet shards to read; None if there is
            one only, or one is the default.

    Raises:
        UserError: there is no such data set, or it cannot be read.
    """
    # What no reading would make right comes first.
    _refuse_unknown(name, path)
    if path is None and configuration is not None:
        raise UserError(
            f"--dataset_config {configuration}: expected a folder to read it from: pass"
            " --dataset_path FOLDER, too"
        )
    plan = None if path is None else plan_folder(Path(path), configuration)

    # The key is made of the content of the source, so that other images are another entry.
    options = dict(image_size=image_size, grey=grey, reader=READER_VERSION)
    source = f"{'sklearn' if name == DEFAULT else 'torchvision'}:{name}"
    if plan is not None:
        source = plan.key()
    key = hashlib.sha256(json.dumps([source, options], sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_root() / f"{_safe(name)}-{key}"

    if not (folder / "meta.json").exists():
        notes: tuple[str, ...] = ()
        if plan is not None:
            arrays, notes = read_plan(plan, image_size, grey)
        elif name == DEFAULT:
            arrays = digits(image_size or 32, channels=3 if grey is False else 1)
        else:
            arrays = from_torchvision(name, image_size, grey)
        refuse_different(arrays[0], arrays[2])
        write_cache(folder, name, arrays, notes)

    # The cache says what was done to images, and not which files lie beside them today.
    found = read_cache(folder, name)
    return found if plan is None else replace(found, notes=(*plan.describe(), *found.notes))


def _refuse_unknown(name: str, path: str | None) -> None:
    """Raise a UserError if no data set can have this name, or the folder does not exist."""
    # A record on data of such a name could be written, but not read.
    if not is_plain(name):
        raise UserError(
            f"--dataset {name!r}: expected a name of at most 200 letters and no path: without a"
            f" slash, say {_plain_name(name)!r}"
        )
    if path is not None and not Path(path).is_dir():
        raise UserError(
            f"--dataset_path {path}: no such folder. Give a folder with parquet shards or with"
            " train/<class>/*.png"
        )
    if path is None and name not in names():
        raise UserError(
            f"unknown data set {name!r}.{suggest(name, names())} Known: {', '.join(names())}; any"
            " other data needs --dataset_path FOLDER"
        )


def find(
    name: str, wanted: str, *, image_size: int | None = None, grey: bool | None = None
) -> Dataset:
    """Find the data set of a record, in the cache or by name.

    Args:
        name: its name in the record.
        wanted: its fingerprint in the record.
        image_size: as in `load`, and as `grey` only used where the cache does not have it.
        grey: as in `load`.

    Raises:
        UserError: no data set at hand has this fingerprint.
    """
    # By content: the cache may have it under another name.
    for meta in sorted(cache_root().glob("*/meta.json")):
        if read_meta(meta).get("fingerprint") == wanted:
            return read_cache(meta.parent, name)

    if name in names():
        dataset = load(name, image_size=image_size, grey=grey)
        if dataset.fingerprint == wanted:
            return dataset
    raise UserError(
        f"the record was made on data set {name!r} (fingerprint {wanted[:12]}), which is not in the"
        f" cache {cache_root()}: pass --dataset_path FOLDER with the same data"
    )


def load_trusted(
    path: str, dataset: Dataset, image_size: int | None, flag: str = "--trusted_path"
) -> tuple[Split, tuple[str, ...]]:
    """Load a user's own clean images of a data set's classes.

    Args:
        path: folder of <class>/*.png, named as the classes or their numbers, or of parquet shards.
        dataset: the data set, whose classes and image shape they must have.
        image_size: side in pixels to resize to; None keeps the size.
        flag: name of the option that gave the path, for errors.

    Returns:
        (the images, a note on files that were left out, if any).
    """
    # As many channels as the data set has.
    root, grey = Path(path), dataset.image_shape[0] == 1
    if not root.is_dir():
        raise UserError(
            f"{flag} {path}: no such folder. Give a folder with <class>/*.png or with parquet"
            " shards of images"
        )
    left_out: list[LeftOut] = []
    shards = sorted(parquet_files(root))
    if shards:
        # Whatever their splits are called: all of the folder is trusted.
        labels = read_labels(shards, root)
        images = shard_images(shards, root, image_size, grey)
    else:
        part = class_images(root, _trusted_classes(root, dataset, f"{flag} {path}"), left_out)
        if not part.files:
            raise UserError(f"{root}: no images ({SAID_FORMATS}) in {root}/<class>/")
        labels = part.labels
        images = decode_all(part.files, lambda file: from_file(file, image_size, grey))

    if images.shape[1:] != dataset.image_shape:
        raise UserError(
            f"{flag} {path}: expected images of {dataset.image_shape} (channels, height, width),"
            f" found {images.shape[1:]}"
        )

    # Numbers in shards may be those of other classes.
    if labels.max() >= dataset.num_classes:
        raise UserError(
            f"{flag} {path}: {dataset.name} has {dataset.num_classes} classes, found label"
            f" {labels.max()}"
        )
    notes = tuple(f"{flag}: {note}" for note in aside(left_out, root))
    return Split(torch.from_numpy(images), torch.from_numpy(labels)), notes


def _trusted_classes(root: Path, dataset: Dataset, where: str) -> tuple[str, ...]:
    """Return the names that folders of trusted images go by, in the order of the labels."""
    classes = class_folders(root)

    # Names of an older cache may be decomposed.
    names = [unicodedata.normalize("NFC", name) for name in dataset.class_names]
    # One folder with the name of a class settles that they are names and not numbers.
    known = (
        dataset.class_names
        if set(classes) & set(names)
        else tuple(map(str, range(dataset.num_classes)))
    )
    unknown = [name for name in classes if name not in (*names, *known)]
    if unknown or not classes:
        raise UserError(
            f"{where}: expected one folder for each of the {dataset.num_classes} classes of"
            f" {dataset.name} ({', '.join(dataset.class_names[:5])}, ..., or their numbers), found"
            f" {', '.join(unknown[:5]) or listing(root)}"
        )
    return known


def train_files(path: str) -> list[str] | None:
    """List the files of an image folder's training images, in the order of `load`.

    None where `load` reads no image files.
    """
    if any(parquet_files(Path(path))) or not (Path(path) / "train").is_dir():
        return None
    return [str(file.relative_to(path)) for file in plan_folder(Path(path)).train.files]


def names() -> list[str]:
    """List the data sets that need no path."""
    return [DEFAULT, *TORCHVISION]


def _plain_name(name: str) -> str:
    """Return an allowed name close to one that is not: "mnist" for the hub's "ylecun/mnist"."""
    return next((part for part in reversed(re.split(r"[/\\]", name)) if is_plain(part)), "mine")


def _safe(name: str) -> str:
    """Return a name as part of a folder's name."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
