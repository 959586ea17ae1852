"""Data sets by name: read once, resized once, then kept as bytes in a cache that is found by content.

A data set is one of
  digits                                    embedded in scikit-learn, the default
  cifar10 cifar100 mnist fashion_mnist gtsrb svhn   torchvision's (gtsrb: its final training set), downloaded where there is a network
  any other name with --dataset_path FOLDER        parquet shards or train/<class>/*.png

Whatever the name, `--dataset_path` may point at parquet shards in the Hugging Face hub's layout (columns `img` or
`image`, and `label`) or at a folder `train/<class>/*.png` with `test/` or `val/` beside it.
"""

import hashlib
import io
import json
import math
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .data import Dataset, Split, fingerprint, mapped
from .errors import UserError, suggest
from .files import HOLDER, locked, publish, remove, sweep
from .loading import is_count
from .schema import is_plain

DEFAULT = "digits"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm")
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "PPM", "TIFF")
"""What Pillow may take a file for, whatever it is called: its readers of other formats are many, and one starts Ghostscript."""
READER_VERSION = 4
"""Part of every cache key: raise it when what is read changes, or decoding or resizing changes a pixel."""

UNREADABLE = (OSError, ValueError, SyntaxError, TypeError)
"""What Pillow raises for a file that is no image, or not a whole one, or one that claims too much; its own bomb is none of these."""

MOST_CLASSES = 2**16
"""From here on, a label beyond the number of images is taken for a mistake: each class below the largest takes memory in the network."""
LARGE = 2**30
"""Bytes of decoded images beyond which they go to a file and not to memory."""

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]
"""train images uint8 (N, C, H, W), train labels int64, test images, test labels, class names."""


def load(name: str, path: str | None = None, *, image_size: int | None = None, grey: bool | None = None) -> Dataset:
    """Load a data set from the cache, else from `path`, else by name.

    image_size: side in pixels that every image is resized to (bilinear); None keeps the size found.
    grey: one channel (True) or three (False); None keeps what the first image has.
    """
    if not is_plain(name):  # a record could be made of it, and not be read
        raise UserError(f"--dataset {name!r}: expected a name of at most 200 letters and no path: without a slash, say {_plain_name(name)!r}")
    if path is not None and not Path(path).is_dir():
        raise UserError(f"--dataset_path {path}: no such folder. Give a folder with parquet shards or with train/<class>/*.png")
    if path is None and name not in names():
        raise UserError(f"unknown data set {name!r}.{suggest(name, names())} Known: {', '.join(names())}; any other data needs --dataset_path FOLDER")
    options = dict(image_size=image_size, grey=grey, reader=READER_VERSION)
    source = f"{'sklearn' if name == DEFAULT else 'torchvision'}:{name}" if path is None else _source_key(Path(path))
    key = hashlib.sha256(json.dumps([source, options], sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_root() / f"{_safe(name)}-{key}"
    if not (folder / "meta.json").exists():
        if path is not None:
            arrays = _folder_reader(Path(path))(Path(path), image_size, grey)
        elif name == DEFAULT:
            arrays = _digits(image_size or 32, channels=3 if grey is False else 1)
        else:
            arrays = _torchvision(name, image_size, grey)
        _refuse_different(arrays[0], arrays[2])
        _write_cache(folder, name, arrays)
    return _read_cache(folder, name)


def find(name: str, wanted: str, *, image_size: int | None = None, grey: bool | None = None) -> Dataset:
    """The data set of a record by the fingerprint that the record carries: in the cache, else by name."""
    for meta in sorted(cache_root().glob("*/meta.json")):
        if _read_meta(meta).get("fingerprint") == wanted:
            return _read_cache(meta.parent, name)
    if name in names():
        dataset = load(name, image_size=image_size, grey=grey)
        if dataset.fingerprint == wanted:
            return dataset
    raise UserError(
        f"the record was made on data set {name!r} (fingerprint {wanted[:12]}), which is not in the cache {cache_root()}:"
        " pass --dataset_path FOLDER with the same data"
    )


def load_trusted(path: str, dataset: Dataset, image_size: int | None, flag: str = "--trusted_path") -> Split:
    """A user's own clean images of a data set's classes: <class>/*.png (names or numbers of the classes) or parquet shards."""
    root, grey = Path(path), dataset.image_shape[0] == 1
    if not root.is_dir():
        raise UserError(f"{flag} {path}: no such folder. Give a folder with <class>/*.png or with parquet shards of images")
    shards = sorted(_parquet_files(root))
    if shards:
        images, labels = _shards(shards, root, image_size, grey)
    else:
        classes = _class_folders(root)
        known = dataset.class_names if set(classes) & set(dataset.class_names) else tuple(map(str, range(dataset.num_classes)))
        unknown = [name for name in classes if name not in known]
        if unknown or not classes:
            raise UserError(
                f"{flag} {path}: expected one folder for each of the {dataset.num_classes} classes of {dataset.name}"
                f" ({', '.join(dataset.class_names[:5])}, ..., or their numbers), found {', '.join(unknown[:5]) or _listing(root)}"
            )
        images, labels = _class_images(root, known, image_size, grey)
    if images.shape[1:] != dataset.image_shape:
        raise UserError(f"{flag} {path}: expected images of {dataset.image_shape} (channels, height, width), found {images.shape[1:]}")
    if labels.max() >= dataset.num_classes:
        raise UserError(f"{flag} {path}: {dataset.name} has {dataset.num_classes} classes, found label {labels.max()}")
    return Split(torch.from_numpy(images), torch.from_numpy(labels))


def train_files(path: str) -> list[str] | None:
    """The training images of an image folder, in the order in which `load` gives them; None where images are not files."""
    train = Path(path) / "train"
    if not train.is_dir() or any(_parquet_files(Path(path))):
        return None
    return [str(file.relative_to(path)) for file in _class_files(train, _class_folders(train))[0]]


def names() -> list[str]:
    """Every data set that needs no path."""
    return [DEFAULT, *TORCHVISION]


def cache_root() -> Path:
    """$BACKDOORLAB_CACHE, else ~/.cache/backdoorlab."""
    return Path(os.environ.get("BACKDOORLAB_CACHE") or Path.home() / ".cache" / "backdoorlab")


def data_root() -> Path:
    """Where torchvision keeps its downloads: $BACKDOORLAB_DATA, else ./data."""
    return Path(os.environ.get("BACKDOORLAB_DATA") or "data")


def cached() -> list[dict[str, Any]]:
    """One entry a cached data set: name, fingerprint, sizes, folder."""
    return [{**_read_meta(meta), "folder": str(meta.parent)} for meta in sorted(cache_root().glob("*/meta.json"))]


# --- readers -----------------------------------------------------------------------------------------------------


def _digits(image_size: int, channels: int) -> Arrays:
    """1,797 grey 8x8 digits of the UCI test set, bilinear to `image_size`; every fifth image of each class is for testing."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = torch.from_numpy(bunch.images).to(torch.float32)[:, None] * (255 / 16)
    large = torch.nn.functional.interpolate(small, size=(image_size, image_size), mode="bilinear", align_corners=False)
    images = large.round().clamp(0, 255).to(torch.uint8).repeat(1, channels, 1, 1).numpy()
    labels = bunch.target.astype(np.int64)
    rank_in_class = (labels[:, None] == np.arange(10)).cumsum(0)[np.arange(len(labels)), labels]
    test = rank_in_class % 5 == 0
    return images[~test], labels[~test], images[test], labels[test], tuple(str(digit) for digit in range(10))


GTSRB = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/GTSRB_Final_Training_Images.zip", "f33fd80ac59bff73c82d25ab499e03a3"
"""Address and MD5 of the training set that results on GTSRB are published for; torchvision's is that of the competition before, 26,640 images."""
GTSRB_SIZE = 39_209

TORCHVISION: dict[str, tuple[str | None, dict[str, Any], dict[str, Any]]] = {
    "cifar10": ("CIFAR10", dict(train=True), dict(train=False)),
    "cifar100": ("CIFAR100", dict(train=True), dict(train=False)),
    "mnist": ("MNIST", dict(train=True), dict(train=False)),
    "fashion_mnist": ("FashionMNIST", dict(train=True), dict(train=False)),
    "gtsrb": (None, dict(split="train"), dict(split="test")),
    "svhn": ("SVHN", dict(split="train"), dict(split="test")),
}


def _torchvision(name: str, image_size: int | None, grey: bool | None) -> Arrays:
    import torchvision.datasets

    root = data_root()
    class_name, train_arguments, test_arguments = TORCHVISION[name]
    make = getattr(torchvision.datasets, class_name) if class_name else _gtsrb
    parts = []
    for arguments in (train_arguments, test_arguments):
        try:
            found = make(root=str(root), download=False, **arguments)
        except RuntimeError:
            _require_network(name, root)
            try:
                found = make(root=str(root), download=True, **arguments)
            except Exception as error:
                raise UserError(f"data set {name!r} could not be downloaded to {root} ({error}): pass --dataset_path FOLDER") from error
        parts.append(_decode_all(found, lambda item: _from_pil(item[0], image_size, grey)))
        parts.append(np.asarray(getattr(found, "targets", getattr(found, "labels", None)), dtype=np.int64))
    class_names = tuple(str(c) for c in getattr(found, "classes", range(int(parts[1].max()) + 1)))
    return parts[0], parts[1], parts[2], parts[3], class_names


def _gtsrb(root: str, split: str, download: bool) -> Any:
    """torchvision's test set; for training the images of the final competition, which torchvision does not have."""
    from torchvision.datasets import GTSRB as Theirs
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.utils import download_and_extract_archive

    if split == "test":
        test = Theirs(root, split=split, download=download)
        test.targets = [label for _, label in test._samples]  # as torchvision's other sets have them
        return test
    folder = Path(root) / "gtsrb"
    images = folder / "GTSRB" / "Final_Training" / "Images"
    if download:
        address, md5 = GTSRB
        download_and_extract_archive(address, download_root=str(folder), md5=md5)
    found = ImageFolder(str(images)) if images.is_dir() else ()
    if len(found) != GTSRB_SIZE:
        raise RuntimeError(f"{images}: expected {GTSRB_SIZE:,} images, found {len(found):,}")
    return found


def _require_network(name: str, root: Path) -> None:
    """One quick look before a download, so that a missing network is a line within seconds and not a row of retries."""
    for host in ("www.cs.toronto.edu", "ossci-datasets.s3.amazonaws.com", "github.com"):
        try:
            with socket.create_connection((host, 443), timeout=2):
                return
        except OSError:
            continue
    raise UserError(
        f"data set {name!r} is not in {root.resolve()} and there is no network to download it:"
        " pass --dataset_path FOLDER (parquet shards or train/<class>/*.png), or set BACKDOORLAB_DATA to torchvision's folder"
    )


def _folder_reader(path: Path) -> Callable[[Path, int | None, bool | None], Arrays]:
    """The reader that fits a folder."""
    if any(_parquet_files(path)):
        return _parquet
    if (path / "train").is_dir() and _class_folders(path / "train"):
        return _image_folder
    raise UserError(f"--dataset_path {path}: expected *.parquet shards or train/<class>/*.png in it, found {_listing(path)}")


def _parquet(path: Path, image_size: int | None, grey: bool | None) -> Arrays:
    """Hugging Face shards: `train*.parquet` and `test*.parquet` (or `validation*`), anywhere below the folder."""
    shards = sorted(_parquet_files(path))

    def of(split: str) -> list[Path]:  # a word of the name that begins so: "latest" is no test set
        return [shard for shard in shards if re.search(rf"(?<![a-z]){split}", shard.name.lower())]

    train, test = of("train"), of("test") or of("val")
    both = sorted({*train} & {*test})
    if both:
        raise UserError(f"{both[0]}: its name says training and test set: expected train*.parquet and test*.parquet")
    if not train or not test:
        raise UserError(f"--dataset_path {path}: expected shards named train*.parquet and test*.parquet, found {_listing(path)}")
    parts = [_shards(files, path, image_size, grey) for files in (train, test)]
    strange = sorted(set(parts[1][1].tolist()) - set(parts[0][1].tolist()))
    if strange:
        raise UserError(
            f"{test[0]}: label {strange[0]} is on no training image, and only those say what the classes are ({len(strange)} such):"
            " pass a folder whose training shards have every class, all of them"
        )
    return *parts[0], *parts[1], _class_names(path, int(parts[0][1].max()) + 1)


def _shards(files: list[Path], path: Path, image_size: int | None, grey: bool | None) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of some shards, in the order of the files."""
    import pyarrow.parquet as pq

    encoded: list[bytes] = []
    labels: list[int] = []
    for file in files:
        try:
            schema = pq.read_schema(file)
            image_column = _column(file, schema.names, ("img", "image"))
            label_column = _column(file, schema.names, ("label", "labels", "fine_label"))
            table = pq.read_table(file, columns=[image_column, label_column])
        except (OSError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{file}: not a readable parquet file ({error}): fetch it again") from error
        encoded += [cell.get("bytes") or b"" if isinstance(cell, dict) else cell for cell in table[image_column].to_pylist()]
        labels += table[label_column].to_pylist()
    return _decode_all(encoded, lambda item: _from_bytes(item, path, image_size, grey)), _labels(labels, path)


def _image_folder(path: Path, image_size: int | None, grey: bool | None) -> Arrays:
    """train/<class>/*.png with test/ or val/ beside it; classes in alphabetical order (numbers in numerical order)."""
    classes = _class_folders(path / "train")
    test = next((path / n for n in ("test", "val", "valid", "validation") if (path / n).is_dir()), None)
    if test is None:
        raise UserError(f"--dataset_path {path}: expected test/ or val/ beside train/, found {_listing(path)}")
    strange = sorted(set(_class_folders(test)) - set(classes))
    if strange:
        raise UserError(f"{test / strange[0]}: no folder of this name in train/, whose folders are the classes: {', '.join(classes[:5])}")
    parts = [_class_images(folder, classes, image_size, grey) for folder in (path / "train", test)]
    bare = sorted(set(range(len(classes))) - set(parts[0][1].tolist()))
    if bare:
        raise UserError(f"{path / 'train' / classes[bare[0]]}: no images ({' '.join(IMAGE_SUFFIXES)}); each folder in train/ is a class")
    return *parts[0], *parts[1], tuple(classes)


def _class_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder that are not hidden, in alphabetical order (numbers in numerical order)."""
    names = (child.name for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    return sorted(names, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))


def _class_images(folder: Path, classes: Sequence[str], image_size: int | None, grey: bool | None) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of <class>/*.png; a label is a position in `classes`."""
    files, labels = _class_files(folder, classes)
    if not files:
        raise UserError(f"{folder}: no images ({' '.join(IMAGE_SUFFIXES)}) in {folder}/<class>/")
    return _decode_all(files, lambda item: _from_file(item, image_size, grey)), np.asarray(labels, dtype=np.int64)


def _class_files(folder: Path, classes: Sequence[str]) -> tuple[list[Path], list[int]]:
    """Files and labels in the order of the images."""
    files: list[Path] = []
    labels: list[int] = []
    for number, name in enumerate(classes):
        found = _images_in(folder / name)
        files += found
        labels += [number] * len(found)
    return files, labels


def _images_in(folder: Path) -> list[Path]:
    """In order; nothing hidden, such as a notebook's copies and a Mac's leftovers."""
    images = (file for file in _files_below(folder) if file.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(file for file in images if not any(part.startswith(".") for part in file.relative_to(folder).parts))


def _parquet_files(folder: Path) -> Iterator[Path]:
    return (file for file in _files_below(folder) if file.suffix == ".parquet")


def _files_below(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Every file in a folder and in the folders below it, linked ones too: what is read and what is hashed must be the same."""
    real = os.path.realpath(folder)
    if real in above or not folder.is_dir():  # a link to a folder that it lies in leads nowhere
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _files_below(Path(entry.path), above | {real})
            elif entry.is_file():
                yield Path(entry.path)


def _refuse_different(first: np.ndarray, other: np.ndarray) -> None:
    """Images (N, C, H, W) of one set, or (C, H, W), must be of one shape."""
    shapes = first.shape[-3:], other.shape[-3:]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"images of different shapes ({shapes[0]} and {shapes[1]} as channels, height, width):"
            " pass --image_size N, or --grey True or False, for all"
        )


def _decode_all(items: Any, decode: Callable[[Any], np.ndarray]) -> np.ndarray:
    """Decode a sequence of images with threads into one uint8 (N, C, H, W) array."""
    count = len(items)
    if count == 0:
        raise UserError("the data set has no images in one of its splits")
    first = decode(items[0])
    out = _room((count, *first.shape))

    def work(i: int) -> None:
        image = decode(items[i])
        _refuse_different(first, image)
        out[i] = image

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(work, range(count), chunksize=256):
            pass
    return out


def _room(shape: tuple[int, ...]) -> np.ndarray:
    """uint8 zeros in memory, or where they are more than LARGE in a file without a name, which goes with the array."""
    if math.prod(shape) <= LARGE:
        return np.zeros(shape, np.uint8)
    cache_root().mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=cache_root()) as file:
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here; in the middle of a map it would end the process
                os.posix_fallocate(file.fileno(), 0, math.prod(shape))
            return np.memmap(file, np.uint8, "w+", shape=shape)
    except OSError as error:
        raise UserError(
            f"no room for {math.prod(shape):,} bytes of images in {cache_root()} ({error}): set BACKDOORLAB_CACHE to a folder with space"
        ) from error


def _labels(labels: Any, path: Path) -> np.ndarray:
    """int64 (N,), none missing or negative."""
    wrong = [label for label in labels if not is_count(label)]
    if wrong:
        raise UserError(f"{path}: labels must be whole numbers from 0 on, found {str(wrong[0])[:60]!r}: write the classes as their numbers")
    most = max(labels, default=0)
    if most >= max(MOST_CLASSES, len(labels)):
        raise UserError(f"{path}: found label {most} among {len(labels):,} images: expected the classes as numbers from 0 on, without gaps")
    return np.asarray(labels, dtype=np.int64)


def _from_bytes(data: bytes, path: Path, image_size: int | None, grey: bool | None) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            return _from_pil(image, image_size, grey)
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: a cell of its image column is not a readable image ({error})") from error


def _from_file(file: Path, image_size: int | None, grey: bool | None) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            return _from_pil(image, image_size, grey)
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        raise UserError(f"{file}: not a readable image ({error})") from error


def _from_pil(image: Any, image_size: int | None, grey: bool | None) -> np.ndarray:
    from PIL import Image

    if grey is None:
        grey = image.mode in ("1", "L") or image.mode.startswith("I;16")
    image = _eight_bits(image).convert("L" if grey else "RGB")
    if image_size is not None and image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _eight_bits(image: Any) -> Any:
    """An image of at most 8 bits a channel, for `convert` clips what is above 255 and so would turn deep images white."""
    from PIL import Image

    if image.mode.startswith("I;16"):
        # The upper byte: each of the 256 greys stands for 256 values, and 8 bits that were widened, by 256 or by 257, come back as they were.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):  # such a format does not say what is white, so there is nothing to scale by
        low, high = image.getextrema()
        if not 0 <= low <= high <= 255:
            raise ValueError(
                f"expected values in 0..255, found {low:g}..{high:g} in its {'32-bit' if image.mode == 'I' else 'float'} values: save it with 8 bits"
            )
    return image


def _class_names(path: Path, count: int) -> tuple[str, ...]:
    """From classes.json (a list of names or of {label, name}, or number -> name) where there is one, else the numbers."""
    file = path / "classes.json"
    if not file.exists():
        return tuple(str(number) for number in range(count))
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON ({error})") from error
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
    for name in wanted:
        if name in columns:
            return name
    raise UserError(f"{file}: expected a column {' or '.join(wanted)}, found {', '.join(columns)}")


def _listing(path: Path) -> str:
    entries = sorted(entry.name for entry in path.iterdir())
    return ", ".join(entries[:5]) + (" ..." if len(entries) > 5 else "") if entries else "nothing"


# --- cache -------------------------------------------------------------------------------------------------------


def _dataset(name: str, arrays: Arrays) -> Dataset:
    train = Split(torch.from_numpy(arrays[0]), torch.from_numpy(arrays[1]))
    test = Split(torch.from_numpy(arrays[2]), torch.from_numpy(arrays[3]))
    return Dataset(name, train, test, arrays[4], fingerprint(train, test, arrays[4]))


def _source_key(path: Path) -> str:
    """SHA-256 over the names and contents of every file that a reader may open."""
    digest = hashlib.sha256()
    for file in _source_files(path):
        try:
            digest.update(str(file.relative_to(path)).encode())
        except UnicodeEncodeError as error:
            raise UserError(f"{os.fsencode(file)!r}: the name is not UTF-8: rename the file or its folder") from error
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _source_files(path: Path) -> list[Path]:
    suffixes = (".parquet", ".json", *IMAGE_SUFFIXES)
    return sorted(file for file in _files_below(path) if file.suffix.lower() in suffixes)


STAGE = re.compile(r".+-[0-9a-f]{16}\.[0-9]+\.partial")
"""What `_write_cache` calls its stages: the data set, its key, and a process."""
ARRAY_NAMES = ("train_images", "train_labels", "test_images", "test_labels")


def _write_cache(folder: Path, name: str, arrays: Arrays) -> None:
    dataset = _dataset(name, arrays)
    stage = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    try:
        if folder.parent.is_dir():
            sweep(folder.parent, _ours)
        with locked(stage):
            try:
                final = stage / "final"
                final.mkdir()
                for array_name, array in zip(ARRAY_NAMES, arrays[:4], strict=True):
                    np.save(final / f"{array_name}.npy", array)
                counts = dict(train=len(dataset.train), test=len(dataset.test))
                meta = dict(name=name, fingerprint=dataset.fingerprint, class_names=dataset.class_names, **counts)
                (final / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
                _put(final, folder)
            finally:
                shutil.rmtree(stage, ignore_errors=True)
    except OSError as error:
        raise UserError(f"the data set cache {folder} cannot be written ({error}): set BACKDOORLAB_CACHE to a folder with space") from error


def _put(final: Path, folder: Path) -> None:
    """Give a whole data set its name, in place of a half one; that of a process which was faster is as good."""
    try:
        publish(final, folder)
    except OSError:
        if (folder / "meta.json").exists():  # another process was faster
            return
        remove(folder)
        publish(final, folder)


def _ours(stage: Path) -> bool:
    """Whether an unfinished folder is one that `_write_cache` makes: the cache may be a folder that others use, too."""
    return STAGE.fullmatch(stage.name) is not None and {entry.name for entry in stage.iterdir()} <= {HOLDER, "final"}


def _read_cache(folder: Path, name: str) -> Dataset:
    """Memory-mapped, so that only what is used is read; a changed byte is refused."""
    meta = _read_meta(folder / "meta.json")
    try:
        files = [folder / f"{array_name}.npy" for array_name in ARRAY_NAMES]
        labels = [torch.from_numpy(np.load(file)) for file in files[1::2]]
        train, test = (Split(mapped(file), rows, file) for file, rows in zip(files[::2], labels, strict=True))
        class_names = tuple(meta["class_names"])
        intact = fingerprint(train, test, class_names) == meta["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise UserError(f"the cached data set {folder} is damaged: delete that folder and run again")
    return Dataset(name, train, test, class_names, meta["fingerprint"])


def _read_meta(file: Path) -> dict[str, Any]:
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return meta if isinstance(meta, dict) else {}


def _plain_name(name: str) -> str:
    """One that may be used in place of a name that may not: ylecun/mnist is mnist, as whoever gives the hub's name would expect."""
    return next((part for part in reversed(re.split(r"[/\\]", name)) if is_plain(part)), "mine")


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
