"""BackdoorBench's records: a folder with `attack_result.pt`, `info.pickle` and one PNG for each
poisoned image.

Written from a description of the format, not from its code. Its peculiarities:

  - Stored paths depend on the folder in which a script was started (`./record/X/...`, or
    `../record/X/...` in older files). Only their last three parts are used, inside the record's own
    folder.
  - A mark means "changed", not "poisoned": WaNet, Input-aware and BPP also mark images that keep
    their true label (kind CROSS).
  - Version 1 stored lists of images instead of files. It is recognised and refused.
"""

import io
import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import UserError
from ..poison import CROSS, POISON, Poison
from ..storage import writing
from . import pickles

RESULT, INFO = "attack_result.pt", "info.pickle"
INDEX = "train_poison_index_list.pickle"
PICTURE = re.compile(r"bd_(train|test)_dataset/\d+/\d+\.png")
"""Paths of images by `write`."""
KEYS = (
    "model_name",
    "num_classes",
    "model",
    "data_path",
    "img_size",
    "clean_data",
    "bd_train",
    "bd_test",
)
DYNAMIC = ("wanet", "inputaware", "bpp", "blind", "lira")
"""Training-controlled attacks: the stored training set is not what the model was trained on."""
FIRST_OF_BATCH = ("wanet", "inputaware")
"""Attacks that poison the first images of every batch of the unshuffled set, so that an image's
position tells its kind."""
COVERED = ("tact", "adaptive_blend", "adaptive_patch")
"""Our attacks with cover samples: stamped images that keep their true label."""
STATED = "backdoorlab_cross"
"""Key in the info.pickle of our exports: positions of the marked training images of kind CROSS."""
SMALL_FILE = 65_536
"""Bytes that a PNG may have besides those of its pixels."""


@dataclass(frozen=True)
class Contents:
    """A record as stored: checked for consistency, but not against a data set (see `fits`)."""

    folder: Path
    attack: str
    model_name: str
    num_classes: int
    image_shape: tuple[int, int, int]
    """(C, H, W)."""
    data_name: str
    weights: Mapping[str, Tensor]
    train: Poison | None
    """None where the attack stored no training set."""
    train_size: int | None
    """Images of the clean training set."""
    test: Poison
    test_size: int
    settings: Mapping[str, Any]
    """Plain values of info.pickle, without paths."""
    notes: tuple[str, ...]


def read(path: Path) -> Contents:
    """Read a record.

    Args:
        path: its folder, or its attack_result.pt.

    Raises:
        UserError: it is no sound record of version 2; the message names the file.
    """
    folder = path.parent if path.name == RESULT else path
    file = folder / RESULT
    found = _result(folder, file)
    info = _info(folder / INFO)
    settings = _settings(info)
    attack = settings.get("attack", "backdoorbench")
    shape = _image_shape(file, found["img_size"])
    num_classes = _whole(found["num_classes"], f"{file}: num_classes", 1, 10**6)

    # Some attacks store the triggered test images only.
    notes: list[str] = []
    train = None
    if found["bd_train"] is None:
        notes.append(
            f"{attack} stored no poisoned training set: only defenses that need none can run"
        )
    else:
        train = _split(folder, found["bd_train"], "bd_train", shape, num_classes, notes)
        if attack in DYNAMIC:
            notes.append(
                f"{attack} is a training-controlled attack: the stored training set is not what the"
                " model was trained on"
            )
    test = _split(folder, found["bd_test"], "bd_test", shape, num_classes, notes)

    # Exports of ours state the kinds; in others they are inferred.
    poison = None
    if train is not None:
        stated = _stated(train[0], info, folder / INFO)
        poison = _with_kinds(*train, attack, settings, notes) if stated is None else stated

    return Contents(
        folder=folder,
        attack=attack,
        model_name=_word(found["model_name"], f"{file}: model_name"),
        num_classes=num_classes,
        image_shape=shape,
        data_name=_word(found["clean_data"], f"{file}: clean_data"),
        weights=pickles.state_dict(found["model"], file),
        train=poison,
        train_size=None if train is None else train[1],
        test=_changed(test[0], notes),
        test_size=test[1],
        settings=settings,
        notes=tuple(notes),
    )


def _result(folder: Path, file: Path) -> Mapping[str, Any]:
    """Load a record's attack_result.pt, and refuse one that is not of version 2."""
    if not file.is_file():
        raise UserError(
            f"{folder}: expected a BackdoorBench record, a folder with {RESULT} in it; there is"
            " none"
        )
    found = pickles.load(file)
    if not isinstance(found, dict):
        raise UserError(
            f"{file}: expected a dict with {', '.join(KEYS)}, found {type(found).__name__}"
        )

    # Version 1 has the images themselves under "x".
    parts = [found.get(part) for part in ("bd_train", "bd_test")]
    if any("x" in part for part in parts if isinstance(part, dict)):
        raise UserError(
            f"{file}: a record of BackdoorBench v1 (images in lists), expected v2 (images in"
            " files): make it again with v2, or with attack/"
        )

    missing = [key for key in KEYS if key not in found]
    if missing:
        raise UserError(f"{file}: not a BackdoorBench v2 record: no {', '.join(missing)} in it")
    return found


def fits(
    contents: Contents, train_labels: Tensor, test_labels: Tensor, num_classes: int, where: str
) -> None:
    """Raise a UserError unless a data set has the record's size, classes and order of images.

    Args:
        contents: the record.
        train_labels: int64 (N,), true labels of the training set.
        test_labels: int64 (N,), true labels of the test set.
        num_classes: number of the data set's classes.
        where: what the data set is called in the message.
    """
    if contents.num_classes != num_classes:
        raise UserError(
            f"the record has {contents.num_classes} classes, {where} has {num_classes}: pass the"
            " --dataset_path that it was made on"
        )

    # The record contains no clean images: the true labels of its poisoned ones must agree.
    parts = [
        ("training", contents.train, contents.train_size, train_labels),
        ("test", contents.test, contents.test_size, test_labels),
    ]
    for word, poison, size, labels in parts:
        if poison is None:
            continue

        if size != len(labels):
            raise UserError(
                f"the record was made on {size:,} {word} images, {where} has {len(labels):,}: pass"
                " the --dataset_path that it was made on"
            )

        wrong = int((labels[poison.index] != poison.original_labels).sum())
        if wrong:
            raise UserError(
                f"{wrong:,} of {len(poison):,} poisoned {word} images have another true label in"
                f" the record than in {where}: other data, or the same in another order"
            )


def write(
    folder: Path,
    *,
    name: str,
    model_name: str,
    weights: Mapping[str, Tensor],
    num_classes: int,
    image_shape: tuple[int, int, int],
    data_name: str,
    train: Poison | None,
    train_size: int,
    test: Poison,
    test_size: int,
    settings: Mapping[str, Any],
) -> None:
    """Fill an empty folder with a record that BackdoorBench's scripts can read.

    Args:
        folder: the folder.
        name: its later name, which the stored paths contain.
        model_name: the network, by BackdoorBench's name.
        weights: state dict of the network, without normalisation.
        num_classes: number of classes.
        image_shape: (C, H, W).
        data_name: the data set, by BackdoorBench's name.
        train: poisoned training images; None where they are unknown.
        train_size: images of the training set.
        test: triggered test images.
        test_size: images of the test set.
        settings: plain values for info.pickle.
    """
    # Its scripts read img_size as (height, width, channels), and paths from their own folder.
    channels, height, width = image_shape
    value = {
        "model_name": model_name,
        "num_classes": num_classes,
        "model": weights,
        "data_path": f"./data/{data_name}",
        "img_size": (height, width, channels),
        "clean_data": data_name,
        "bd_train": (
            None
            if train is None
            else _write_split(
                folder, name, "bd_train_dataset", train, np.arange(train_size), train_size
            )
        ),
        "bd_test": _write_split(
            folder, name, "bd_test_dataset", test, test.index.numpy(), test_size
        ),
    }
    writing.write_bytes(folder / RESULT, pickles.dump(value))

    # The format has no kinds: ours are kept beside the settings, for `_stated`.
    stated = {} if train is None else {STATED: train.index[train.kind == CROSS].tolist()}
    writing.write_bytes(folder / INFO, pickles.dump({**settings, **stated}))

    if train is not None:
        writing.write_bytes(folder / INDEX, pickles.dump(_indicator(train, train_size)))


def foreign_file(folder: Path) -> Path | None:
    """Return the first file in a folder that `write` did not make, if there is one."""
    for file in sorted(folder.rglob("*")):
        # A link to a folder is a foreign file; so is what a real folder contains, not itself.
        if file.is_dir() and not file.is_symlink():
            continue
        place = file.relative_to(folder).as_posix()
        if place not in (RESULT, INFO, INDEX) and not PICTURE.fullmatch(place):
            return file
    return None


# --- reading


def _split(
    folder: Path,
    found: Any,
    part: str,
    shape: tuple[int, int, int],
    num_classes: int,
    notes: list[str],
) -> tuple[Poison, int]:
    """Read the marked images of a split.

    Args:
        folder: the record's folder.
        found: the value of `part` in attack_result.pt.
        part: "bd_train" or "bd_test".
        shape: (C, H, W).
        num_classes: number of classes.
        notes: extended where something was left out.

    Returns:
        (the images, all of kind POISON for now; the size of the clean split).
    """
    where = f"{folder / RESULT}: {part}"
    index, size = _marked(found, part, where, shape)
    stored = _entries(found, index, size, where)
    if len(stored) > len(index):
        notes.append(
            f"{part}: {len(stored) - len(index)} stored images are not marked as poisoned and were"
            " left out"
        )

    # Labels in two rows: that of the attack, and the true one.
    images = torch.empty(len(index), *shape, dtype=torch.uint8)
    labels = torch.empty(2, len(index), dtype=torch.int64)
    for row, i in enumerate(index.tolist()):
        picture, pair = _entry(folder, stored[i], f"{where}, image {i}", shape)
        images[row] = torch.from_numpy(picture.copy())
        for k in range(2):
            labels[k, row] = _whole(pair[k], f"{where}, image {i}: a label", 0, num_classes - 1)

    kind = torch.full((len(index),), POISON, dtype=torch.uint8)
    place = torch.from_numpy(index.astype(np.int64))
    return Poison(place, images, labels[0], labels[1], kind), size


def _marked(
    found: Any, part: str, where: str, shape: tuple[int, int, int]
) -> tuple[np.ndarray, int]:
    """Return the positions of the marked images of a split, in order, and the split's size."""
    marks, positions = (
        _row(found, "poison_indicator", where),
        _row(found, "original_index_array", where),
    )
    # One mark for each image of the clean split.
    size = len(marks)
    if not np.isin(marks, (0, 1)).all():
        raise UserError(f"{where}: poison_indicator must be a row of 0 and 1")
    _affordable(size * math.prod(shape), where)

    if positions.dtype.kind not in "iu" or ((positions < 0) | (positions >= size)).any():
        raise UserError(f"{where}: original_index_array must hold positions in 0..{size - 1}")
    # A test set may be a part, such as the images of other classes than the target.
    if part == "bd_train" and not np.array_equal(np.sort(positions), np.arange(size)):
        raise UserError(
            f"{where}: only {len(np.unique(positions)):,} of {size:,} training images are in it: a"
            " part of a training set cannot be imported"
        )
    return np.intersect1d(np.flatnonzero(marks), positions), size


def _entries(found: Mapping[str, Any], index: np.ndarray, size: int, where: str) -> dict[int, Any]:
    """Return position -> entry of the images that a split stores; each in `index` must have one."""
    container = found.get("bd_data_container")
    stored = container.get("data_dict") if isinstance(container, dict) else None
    if not isinstance(stored, dict):
        raise UserError(f"{where}: expected bd_data_container with a data_dict in it")

    keys = {_whole(key, f"{where}: an index of data_dict", 0, size - 1): key for key in stored}

    lost = [i for i in index.tolist() if i not in keys]
    if lost:
        raise UserError(
            f"{where}: image {lost[0]} is marked as poisoned, but no file is named for it"
            f" ({len(lost)} such)"
        )
    return {i: stored[key] for i, key in keys.items()}


def _row(found: Any, key: str, where: str) -> np.ndarray:
    """Return the one-dimensional array under a key of a split."""
    array = found.get(key) if isinstance(found, dict) else None
    if not isinstance(array, pickles.Array) or array.values is None or array.values.ndim != 1:
        raise UserError(f"{where}: expected {key} as a row of numbers in a numpy array")
    return array.values


def _affordable(size: int, where: str) -> None:
    """Refuse more images than fit in memory, before memory is taken for them.

    `size`: bytes that they would take, as a small file may falsely claim.
    """
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return
    if size > memory // 2:
        raise UserError(
            f"{where}: claims {size / 2**30:,.0f} GiB of images, more than half of this machine's"
            f" {memory / 2**30:,.0f} GiB of memory"
        )


def _entry(
    folder: Path, entry: Any, where: str, shape: tuple[int, int, int]
) -> tuple[np.ndarray, Any]:
    """Read one stored image.

    Args:
        folder: the record's folder.
        entry: a tuple with a picture in it, or a dict with a path.
        where: what the image is called in errors.
        shape: (C, H, W).

    Returns:
        (uint8 (C, H, W), (poisoned label, original label)): the labels are unchecked.
    """
    # Images are in the pickle itself where BackdoorBench had no folder to save them to.
    if (
        isinstance(entry, tuple)
        and len(entry) == 3
        and isinstance(entry[0], pickles.Picture)
        and entry[0].pixels is not None
    ):
        if entry[0].pixels.shape != shape:
            raise UserError(
                f"{where}: a picture of {entry[0].pixels.shape}, expected {shape} (channels,"
                " height, width)"
            )
        return entry[0].pixels, entry[1:]

    pair = entry.get("other_info") if isinstance(entry, dict) else None
    if (
        not isinstance(pair, (list, tuple))
        or len(pair) < 2
        or not isinstance(entry.get("path"), str)
    ):
        raise UserError(f"{where}: expected a path and other_info [poisoned label, original label]")
    return _read_png(_anchored(folder, entry["path"], where), shape), pair


def _anchored(folder: Path, stored: str, where: str) -> Path:
    """Return the file in the record's own folder for a stored path: its last three parts."""
    # Paths of Windows are read everywhere.
    parts = stored.replace("\\", "/").split("/")[-3:]
    path = folder.joinpath(*parts)
    if len(parts) < 3 or any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise UserError(
            f"{where}: path {stored[:200]!r} does not end in <folder>/<label>/<index>.png"
        )
    # A link in the record may point anywhere.
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{path}: refused: it leads out of the record")
    return path


def _read_png(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    """Read a PNG as uint8 (C, H, W).

    The size of the file, and the size that it claims, are checked before anything is unpacked.
    """
    channels, height, width = shape
    if not path.is_file():
        raise UserError(f"{path}: missing, but {RESULT} names it: copy the whole record")
    # More than 8 bytes a pixel is no PNG of this size.
    if path.stat().st_size > SMALL_FILE + 8 * height * width:
        raise UserError(
            f"{path}: refused: {path.stat().st_size:,} bytes are too many for a PNG of"
            f" {width}x{height}"
        )

    # Width and height stand at a fixed place, right behind the signature.
    data = path.read_bytes()
    if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 24:
        raise UserError(f"{path}: not a PNG file")
    claimed = struct.unpack(">II", data[16:24])
    if claimed != (width, height):
        raise UserError(
            f"{path}: a picture of {claimed[0]}x{claimed[1]}, expected {width}x{height} as in"
            " img_size"
        )

    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            array = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    except (OSError, ValueError, SyntaxError, EOFError, struct.error) as error:
        raise UserError(f"{path}: damaged PNG ({error})") from error
    return array.reshape(height, width, channels).transpose(2, 0, 1)


def _stated(poison: Poison, info: Mapping[str, Any], file: Path) -> Poison | None:
    """Set the kinds that an export of ours states in its info.pickle; None for other records."""
    positions = info.get(STATED)
    if positions is None:
        return None
    if not isinstance(positions, list):
        raise UserError(
            f"{file}: {STATED} must be a list of positions, found {type(positions).__name__}"
        )

    found = torch.tensor(
        [_whole(i, f"{file}: {STATED}", 0, 2**31) for i in positions], dtype=torch.int64
    )
    # Only an image that keeps its label can be of this kind.
    kept = poison.index[poison.labels == poison.original_labels]
    wrong = found[~torch.isin(found, kept)]
    if len(wrong):
        raise UserError(
            f"{file}: {STATED} names image {int(wrong[0])}, which is not marked, or does not keep"
            " its label"
        )

    return replace(
        poison, kind=torch.where(torch.isin(poison.index, found), CROSS, POISON).to(torch.uint8)
    )


def _with_kinds(
    poison: Poison, size: int, attack: str, settings: Mapping[str, Any], notes: list[str]
) -> Poison:
    """Infer which marked training images are POISON and which are CROSS.

    Images whose label changed are POISON. One that keeps its label is
      - CROSS if it is not of the target class,
      - POISON if it is, in a static attack without CROSS images, as are all images of such an
        attack if no label changed (clean-label),
      - in other attacks what its position in the batch says, and CROSS where that says nothing.

    Args:
        poison: the marked images.
        size: images of the training set.
        attack: name of the attack.
        settings: those of info.pickle.
        notes: extended where the kind of some images is uncertain.
    """
    kept = poison.labels == poison.original_labels
    targets = poison.labels[~kept].unique()
    of_target = (
        kept & (poison.original_labels == targets) if len(targets) == 1 else torch.zeros_like(kept)
    )
    # No changed label: clean-label, where keeping the label says nothing.
    cross = kept & ~of_target if len(targets) else torch.zeros_like(kept)
    if attack not in (*DYNAMIC, *COVERED) and not cross.any():
        return poison

    # The first rate * batch_size images of each batch are poison.
    rate, batch_size = settings.get("pratio"), settings.get("batch_size")
    if (
        attack in FIRST_OF_BATCH
        and isinstance(rate, (int, float))
        and isinstance(batch_size, int)
        and 0 < rate <= 1 <= int(rate * batch_size)
    ):
        batch, place = poison.index // batch_size, poison.index % batch_size
        # The last batch is smaller.
        first = (rate * (size - batch * batch_size).clamp_max(batch_size).double()).long()
        cross |= kept & (place >= first)
    else:
        cross, undecided = kept, int(of_target.sum())
        if undecided:
            notes.append(
                f"{undecided} marked training images of the target class keep their label: counted"
                " as cross, though some may be poison"
            )

    return replace(poison, kind=torch.where(cross, CROSS, POISON).to(torch.uint8))


def _changed(poison: Poison, notes: list[str]) -> Poison:
    """Return the triggered test images whose label the attack changes.

    The others would count as successes for a model without a backdoor.
    """
    changed = poison.labels != poison.original_labels
    if changed.all():
        return poison
    notes.append(
        f"{int((~changed).sum())} triggered test images keep their label and do not count in ASR"
    )
    return Poison(*(column[changed] for column in vars(poison).values()))


def _info(path: Path) -> dict[str, Any]:
    """Load info.pickle, whose values are not checked; {} where there is none."""
    if not path.exists():
        return {}
    found = pickles.load(path)
    if not isinstance(found, dict):
        raise UserError(
            f"{path}: expected a dict of settings, found {type(found).__name__}. Without the file"
            " the record can be read too"
        )
    return found


def _settings(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers and short words of info.pickle.

    Paths are left out, since a record contains nothing of a machine.
    """
    named = {key: value for key, value in info.items() if isinstance(key, str)}
    kept = {key: value for key, value in named.items() if _plain(value)}
    kept.pop(STATED, None)

    # It becomes part of names and of tables.
    attack = kept.get("attack")
    if not isinstance(attack, str) or not re.fullmatch(r"[A-Za-z][\w.+-]{0,39}", attack, re.ASCII):
        kept.pop("attack", None)
    return kept


def _plain(value: Any) -> bool:
    """Return whether a value is a number, a short word without slashes, or a short list of
    numbers."""
    if isinstance(value, (list, tuple)):
        return len(value) <= 16 and all(
            isinstance(item, (int, float)) and _plain(item) for item in value
        )
    if isinstance(value, str):
        return len(value) <= 100 and "/" not in value and "\\" not in value
    return (
        value is None
        or isinstance(value, (bool, int))
        or (isinstance(value, float) and np.isfinite(value).item())
    )


def _image_shape(file: Path, found: Any) -> tuple[int, int, int]:
    """Check img_size (H, W, C), and return it as (C, H, W)."""
    if not isinstance(found, (tuple, list)) or len(found) != 3:
        raise UserError(
            f"{file}: img_size must be (height, width, channels), found {str(found)[:60]}"
        )
    # Larger images than these are not what this library is for, and claims of them are refused.
    height, width, channels = (_whole(side, f"{file}: img_size", 1, 4096) for side in found)
    if channels not in (1, 3) or height != width:
        raise UserError(
            f"{file}: images of {height}x{width} with {channels} channels; expected square ones,"
            " grey or RGB"
        )
    return channels, height, width


def refuse_foreign_shapes(data_name: str, height: int, width: int) -> None:
    """Raise a UserError if the format cannot express a data set, before a record is written."""
    if height != width:
        raise UserError(
            f"BackdoorBench's records hold square images, these are {height}x{width}: only"
            " --weights can be exported"
        )
    _word(data_name, "for BackdoorBench the name of the data set (letters, digits and any of _.+-)")


def _whole(value: Any, what: str, low: int, high: int) -> int:
    """Return an integer in low..high, or raise a UserError that begins with `what`."""
    if type(value) is not int or not low <= value <= high:
        raise UserError(f"{what} must be a whole number in {low}..{high}, found {str(value)[:60]}")
    return value


def _word(value: Any, what: str) -> str:
    """Return a name of at most 100 plain characters, or raise a UserError."""
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9][\w.+-]{0,99}", value, re.ASCII):
        raise UserError(f"{what} must be a name, found {str(value)[:60]!r}")
    return value


# --- writing


def _write_split(
    folder: Path, name: str, part: str, poison: Poison, positions: np.ndarray, size: int
) -> dict[str, Any]:
    """Write one PNG for each image of a split.

    Args:
        folder: the record's folder.
        name: its later name.
        part: name of the split's folder.
        poison: the images.
        positions: of the split's images in the clean data set, (N,).
        size: images of the clean split.

    Returns:
        The split's value in attack_result.pt.
    """
    stored = {}
    for index, image, label, original in zip(
        poison.index.tolist(),
        poison.images,
        poison.labels.tolist(),
        poison.original_labels.tolist(),
        strict=True,
    ):
        place = folder / part / str(original)
        place.mkdir(parents=True, exist_ok=True)

        # Pillow takes grey images as (H, W) and colour images as (H, W, C).
        array = image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
        Image.fromarray(array).save(place / f"{index}.png")
        stored[index] = {
            "path": f"./record/{name}/{part}/{original}/{index}.png",
            "other_info": [label, original],
        }

    home = f"./record/{name}/{part}"
    return {
        "bd_data_container": {
            "save_folder_path": home,
            "save_file_format": ".png",
            "data_dict": stored,
        },
        "poison_indicator": _indicator(poison, size),
        "original_index_array": positions.astype(np.int64),
        "getitem_all": True,
        "getitem_all_switch": False,
        "save_folder_path": home,
    }


def _indicator(poison: Poison, size: int) -> np.ndarray:
    """Return float64 (size,): 1 for marked images, else 0."""
    marks = np.zeros(size, np.float64)
    marks[poison.index.numpy()] = 1
    return marks
