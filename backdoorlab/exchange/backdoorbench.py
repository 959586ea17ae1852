"""BackdoorBench's records: a folder with `attack_result.pt`, `info.pickle` and one PNG for each
poisoned image.

Written from a description of the format, not from its code. What a reader has to know:

  - Stored paths depend on the folder that a script was started in (`./record/X/...`, or
    `../record/X/...` in older files): only their last three parts say anything, and they are looked
    up in the record's own folder.
  - A mark says "changed", not "poisoned": WaNet, Input-aware and BPP also mark images that keep
    their true label (cross).
  - Version 1 kept lists of images instead of files; it is recognised and refused.
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
"""Where `write` puts images."""
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
"""Attacks that control their training: the stored training set only imitates what the model saw."""
FIRST_OF_BATCH = ("wanet", "inputaware")
"""They poison the first images of every batch of the unshuffled set, so that a position says what a
mark does not."""
COVERED = ("tact", "adaptive_blend", "adaptive_patch")
"""Our attacks that stamp images and leave them their true label."""
STATED = "backdoorlab_cross"
"""In the info.pickle of records that come from here: positions of the marked training images that
are cross."""
SMALL_FILE = 65_536


@dataclass(frozen=True)
class Contents:
    """A record as it lies on disk, checked against itself, not yet against a data set."""

    folder: Path
    attack: str
    model_name: str
    num_classes: int
    image_shape: tuple[int, int, int]
    """(C, H, W)."""
    data_name: str
    weights: Mapping[str, Tensor]
    train: Poison | None
    """None where the attack left no training set."""
    train_size: int | None
    test: Poison
    test_size: int
    settings: Mapping[str, Any]
    """Plain values of info.pickle, without paths."""
    notes: tuple[str, ...]


def read(path: Path) -> Contents:
    """A record from its folder, or from its attack_result.pt; whatever is wrong with it is one line
    that names the file."""
    folder = path.parent if path.name == RESULT else path
    file = folder / RESULT
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
    if any(
        isinstance(found.get(part), dict) and "x" in found[part] for part in ("bd_train", "bd_test")
    ):
        raise UserError(
            f"{file}: a record of BackdoorBench v1 (images in lists), expected v2 (images in"
            " files): make it again with v2, or with attack/"
        )
    missing = [key for key in KEYS if key not in found]
    if missing:
        raise UserError(f"{file}: not a BackdoorBench v2 record: no {', '.join(missing)} in it")
    info = _info(folder / INFO)
    settings = _settings(info)
    attack = settings.get("attack", "backdoorbench")
    shape = _image_shape(file, found["img_size"])
    num_classes = _whole(found["num_classes"], f"{file}: num_classes", 1, 10**6)
    notes: list[str] = []
    train = None
    if found["bd_train"] is None:
        notes.append(
            f"{attack} left no poisoned training set: only defenses that do without one can run"
        )
    else:
        train = _split(folder, found["bd_train"], "bd_train", shape, num_classes, notes)
        if attack in DYNAMIC:
            notes.append(
                f"{attack} controls its training: the stored training set only imitates what the"
                " model was trained on"
            )
    test = _split(folder, found["bd_test"], "bd_test", shape, num_classes, notes)
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


def fits(
    contents: Contents, train_labels: Tensor, test_labels: Tensor, num_classes: int, where: str
) -> None:
    """Refuse a data set that is not the one of the record: another size, number of classes, or
    order of its images."""
    if contents.num_classes != num_classes:
        raise UserError(
            f"the record has {contents.num_classes} classes, {where} has {num_classes}: pass the"
            " --dataset_path that it was made on"
        )
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
    """Fill an empty folder as BackdoorBench's scripts write and read it; `name` is the folder's
    later name, which the paths carry."""
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
    stated = {} if train is None else {STATED: train.index[train.kind == CROSS].tolist()}
    writing.write_bytes(folder / INFO, pickles.dump({**settings, **stated}))
    if train is not None:
        writing.write_bytes(folder / INDEX, pickles.dump(_indicator(train, train_size)))


def foreign_file(folder: Path) -> Path | None:
    """The first file in a folder, if any, that `write` could not have put there."""
    for file in sorted(folder.rglob("*")):
        place = file.relative_to(folder).as_posix()
        if (
            not (file.is_dir() and not file.is_symlink())
            and place not in (RESULT, INFO, INDEX)
            and not PICTURE.fullmatch(place)
        ):
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
    """The marked images of bd_train or bd_test, all of kind POISON for now, and the size of the
    clean split."""
    where = f"{folder / RESULT}: {part}"
    marks, positions = (
        _row(found, "poison_indicator", where),
        _row(found, "original_index_array", where),
    )
    container = found.get("bd_data_container")
    stored = container.get("data_dict") if isinstance(container, dict) else None
    if not isinstance(stored, dict):
        raise UserError(f"{where}: expected bd_data_container with a data_dict in it")
    size = len(marks)
    if not np.isin(marks, (0, 1)).all():
        raise UserError(f"{where}: poison_indicator must be a row of 0 and 1")
    _affordable(size * math.prod(shape), where)
    if positions.dtype.kind not in "iu" or ((positions < 0) | (positions >= size)).any():
        raise UserError(f"{where}: original_index_array must hold positions in 0..{size - 1}")
    if part == "bd_train" and not np.array_equal(np.sort(positions), np.arange(size)):
        raise UserError(
            f"{where}: only {len(np.unique(positions)):,} of {size:,} training images are in it: a"
            " part of a training set cannot be imported"
        )
    index = np.intersect1d(np.flatnonzero(marks), positions)
    keys = {_whole(key, f"{where}: an index of data_dict", 0, size - 1): key for key in stored}
    lost = [i for i in index.tolist() if i not in keys]
    if lost:
        raise UserError(
            f"{where}: image {lost[0]} is marked as poisoned, but no file is named for it"
            f" ({len(lost)} such)"
        )
    if len(keys) > len(index):
        notes.append(
            f"{part}: {len(keys) - len(index)} stored images are not marked as poisoned and were"
            " left out"
        )
    images = torch.empty(len(index), *shape, dtype=torch.uint8)
    labels = torch.empty(2, len(index), dtype=torch.int64)
    for row, i in enumerate(index.tolist()):
        picture, pair = _entry(folder, stored[keys[i]], f"{where}, image {i}", shape)
        images[row] = torch.from_numpy(picture.copy())
        for k in range(2):
            labels[k, row] = _whole(pair[k], f"{where}, image {i}: a label", 0, num_classes - 1)
    return (
        Poison(
            torch.from_numpy(index.astype(np.int64)),
            images,
            labels[0],
            labels[1],
            torch.full((len(index),), POISON, dtype=torch.uint8),
        ),
        size,
    )


def _row(found: Any, key: str, where: str) -> np.ndarray:
    """A one-dimensional array out of the stand-in for it."""
    array = found.get(key) if isinstance(found, dict) else None
    if not isinstance(array, pickles.Array) or array.values is None or array.values.ndim != 1:
        raise UserError(f"{where}: expected {key} as a row of numbers in a numpy array")
    return array.values


def _affordable(size: int, where: str) -> None:
    """Refuse what a small file only claims before memory is taken for it."""
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
    """uint8 (C, H, W) and (poisoned label, original label): from a file, or from the pickle
    itself."""
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
    """The file in the record's own folder that a path from another place means: its last three
    parts."""
    parts = stored.replace("\\", "/").split("/")[-3:]
    path = folder.joinpath(*parts)
    if len(parts) < 3 or any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise UserError(
            f"{where}: path {stored[:200]!r} does not end in <folder>/<label>/<index>.png"
        )
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{path}: refused: it leads out of the record")
    return path


def _read_png(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    """uint8 (C, H, W). The size that the file claims is looked at before anything is unpacked."""
    channels, height, width = shape
    if not path.is_file():
        raise UserError(f"{path}: missing, but {RESULT} names it: copy the whole record")
    if path.stat().st_size > SMALL_FILE + 8 * height * width:
        raise UserError(
            f"{path}: refused: {path.stat().st_size:,} bytes are too many for a PNG of"
            f" {width}x{height}"
        )
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
    """Kinds as a record from here states them; None for all others."""
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
    """POISON or CROSS for marked images of a training set of `size`. Where labels change, one that
    keeps its own is cross, unless it is of the target class anyway. Such a one is poison in a
    static attack, as all are where no label changes (clean-label); in a dynamic one it is cross,
    unless its place in the batch says otherwise."""
    kept = poison.labels == poison.original_labels
    targets = poison.labels[~kept].unique()
    of_target = (
        kept & (poison.original_labels == targets) if len(targets) == 1 else torch.zeros_like(kept)
    )
    cross = kept & ~of_target if len(targets) else torch.zeros_like(kept)
    if attack not in (*DYNAMIC, *COVERED) and not cross.any():
        return poison
    rate, batch_size = settings.get("pratio"), settings.get("batch_size")
    if (
        attack in FIRST_OF_BATCH
        and isinstance(rate, (int, float))
        and isinstance(batch_size, int)
        and 0 < rate <= 1 <= int(rate * batch_size)
    ):
        batch, place = poison.index // batch_size, poison.index % batch_size
        # The last batch is a smaller one
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
    """Triggered test images whose label the attack changes; the others would count as hits for a
    model without a backdoor."""
    changed = poison.labels != poison.original_labels
    if changed.all():
        return poison
    notes.append(
        f"{int((~changed).sum())} triggered test images keep their label and do not count in ASR"
    )
    return Poison(*(column[changed] for column in vars(poison).values()))


def _info(path: Path) -> dict[str, Any]:
    """info.pickle, unchecked; {} without the file."""
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
    """Its numbers and short words. Paths are left out: a record says nothing about a machine."""
    kept = {
        key: value
        for key, value in info.items()
        if isinstance(key, str) and key != STATED and _plain(value)
    }
    attack = kept.get("attack")
    if not isinstance(attack, str) or not re.fullmatch(r"[A-Za-z][\w.+-]{0,39}", attack, re.ASCII):
        kept.pop("attack", None)
    return kept


def _plain(value: Any) -> bool:
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
    """img_size (H, W, C) -> (C, H, W)."""
    if not isinstance(found, (tuple, list)) or len(found) != 3:
        raise UserError(
            f"{file}: img_size must be (height, width, channels), found {str(found)[:60]}"
        )
    height, width, channels = (_whole(side, f"{file}: img_size", 1, 4096) for side in found)
    if channels not in (1, 3) or height != width:
        raise UserError(
            f"{file}: images of {height}x{width} with {channels} channels; expected square ones,"
            " grey or RGB"
        )
    return channels, height, width


def refuse_foreign_shapes(data_name: str, height: int, width: int) -> None:
    """One line for a data set that a record of this format cannot be of, before one is written that
    nobody can read."""
    if height != width:
        raise UserError(
            f"BackdoorBench's records hold square images, these are {height}x{width}: only"
            " --weights can be exported"
        )
    _word(data_name, "for BackdoorBench the name of the data set (letters, digits and any of _.+-)")


def _whole(value: Any, what: str, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise UserError(f"{what} must be a whole number in {low}..{high}, found {str(value)[:60]}")
    return value


def _word(value: Any, what: str) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9][\w.+-]{0,99}", value, re.ASCII):
        raise UserError(f"{what} must be a name, found {str(value)[:60]!r}")
    return value


# --- writing


def _write_split(
    folder: Path, name: str, part: str, poison: Poison, positions: np.ndarray, size: int
) -> dict[str, Any]:
    """One PNG for each image, and the dict that finds them."""
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
    marks = np.zeros(size, np.float64)
    marks[poison.index.numpy()] = 1
    return marks
