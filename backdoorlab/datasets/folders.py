"""Folders of images: train/<class>/*.png with a test set beside them, as a plan."""

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..errors import UserError
from .decoding import SAID_FORMATS, why_unreadable
from .locations import class_folders, files_below, is_service, listing
from .plan import LeftOut, Part, Plan

TEST_FOLDERS = ("test", "val", "valid", "validation")
"""Names of a test set's folder. The first that has labels is read."""
ANNOTATIONS = "val_annotations.txt"
"""Tiny ImageNet's list of file names and classes of its validation images, with tabs between."""


def plan_images(root: Path) -> Plan:
    """Plan what is read of train/<class>/*.png and of test/ or val/ beside it.

    Raises:
        UserError: a class has no images, or there is no test set with labels.
    """
    # The folders of the training set are the classes.
    train_folder, left_out = root / "train", list[LeftOut]()
    classes = class_folders(train_folder)
    train = _in_classes(train_folder, classes, left_out)

    test, notes = _test_part(root, list(classes), left_out)

    # A class without images would still be an output of the network.
    bare = sorted(set(range(len(classes))) - set(train.labels.tolist()))
    if bare:
        raise UserError(
            f"{train_folder / list(classes)[bare[0]]}: no images ({SAID_FORMATS}); each folder in"
            " train/ is a class"
        )

    doubled = [name for name, folders in classes.items() if len(folders) > 1]
    if doubled:
        notes.append(
            f"{len(doubled)} classes have two folders whose names differ in their Unicode form, and"
            f" are read as one: {', '.join(doubled[:5])}"
        )
    left_out.sort(key=lambda entry: entry.path)
    names = tuple(classes)
    return Plan(
        root, "images", train, test, names, "folders in train/", tuple(left_out), tuple(notes)
    )


def class_images(
    folder: Path, classes: Sequence[str], left_out: list[LeftOut] | None = None
) -> Part:
    """List the images in <folder>/<class>/ in order; a label is a position in `classes`."""
    found = class_folders(folder)
    named = {name: found.get(unicodedata.normalize("NFC", name), []) for name in classes}
    return _in_classes(folder, named, [] if left_out is None else left_out)


def _in_classes(
    folder: Path, classes: Mapping[str, Iterable[Path]], left_out: list[LeftOut]
) -> Part:
    """List the images in the folders of each class, and what beside them is left out."""
    files: list[Path] = []
    labels: list[int] = []
    for label, folders in enumerate(classes.values()):
        for class_folder in folders:
            found = _images_in(class_folder, left_out)
            files += found
            labels += [label] * len(found)

    # Images beside the folders of the classes have no label.
    for entry in folder.iterdir():
        if is_service(entry.name):
            left_out.append(_service(entry))
        elif entry.is_file() and entry.name != ANNOTATIONS:
            left_out.append(LeftOut(entry, "not in the folder of a class"))
    return Part(f"{folder.name}/", tuple(files), np.asarray(labels, dtype=np.int64))


def _images_in(folder: Path, left_out: list[LeftOut]) -> list[Path]:
    """List the images anywhere below a folder, in order of their paths."""
    service: list[Path] = []
    images = []
    for file in sorted(files_below(folder, service)):
        reason = why_unreadable(file)
        if reason is None:
            images.append(file)
        else:
            left_out.append(LeftOut(file, reason))
    left_out += map(_service, service)
    return images


def _service(path: Path) -> LeftOut:
    """Return the entry of a hidden file, or of one that a file manager made.

    A run says only which folders like @eaDir it left out: these may have been meant as classes.
    """
    hidden = path.name.startswith(".") or not path.is_dir()
    return LeftOut(path, "hidden or a file manager's", hidden)


def _test_part(root: Path, classes: list[str], left_out: list[LeftOut]) -> tuple[Part, list[str]]:
    """Choose the folder of the test set: the first of TEST_FOLDERS whose images have labels.

    Args:
        root: the user's folder.
        classes: names of the classes.
        left_out: gets what is left out in the chosen folder.

    Returns:
        (the test set, notes for the user).
    """
    present = [root / name for name in TEST_FOLDERS if (root / name).is_dir()]
    if not present:
        raise UserError(
            f"--dataset_path {root}: expected test/ or val/ beside train/, found {listing(root)}"
        )

    unlabelled: list[Path] = []
    for folder in present:
        aside: list[LeftOut] = []
        part = _labelled(folder, classes, aside)
        if part.files:
            left_out += aside
            names = " and ".join(f"{skipped.name}/" for skipped in unlabelled)
            note = f"{names} has no images with labels: {part.name} is the test set"
            return part, [note] if unlabelled else []
        unlabelled.append(folder)

    # The message is about the folder that would be read first.
    _refuse_strange(present[0], classes)
    raise UserError(f"{present[0]}: no images ({SAID_FORMATS}) in {present[0]}/<class>/")


def _labelled(folder: Path, classes: list[str], left_out: list[LeftOut]) -> Part:
    """List the images of a test folder that have labels, by the folders of classes or by a list."""
    found = class_folders(folder)
    annotated = (folder / ANNOTATIONS).is_file()
    # Test images without labels often lie in one folder that is named after no class.
    if not set(found) & set(classes):
        if annotated:
            return _annotated(folder, classes, left_out)
        return Part(f"{folder.name}/", (), np.zeros(0, np.int64))

    # Scripts that sort Tiny ImageNet's images into classes leave an empty folder of that name.
    if annotated:
        found.pop("images", None)
    _refuse_strange(folder, classes, found)
    return class_images(folder, classes, left_out)


def _refuse_strange(folder: Path, classes: list[str], found: Iterable[str] | None = None) -> None:
    """Raise a UserError if a test folder has a folder that is not named after a class."""
    strange = sorted(set(class_folders(folder) if found is None else found) - set(classes))
    if strange:
        raise UserError(
            f"{folder / strange[0]}: no folder of this name in train/, whose folders are the"
            f" classes: {', '.join(classes[:5])}"
        )


def _annotated(folder: Path, classes: list[str], left_out: list[LeftOut]) -> Part:
    """List the images whose classes are in val_annotations.txt, in order of their paths.

    Raises:
        UserError: the list names a class or a file that does not exist.
    """
    # What follows the class is a box, which does not matter here.
    lines = (folder / ANNOTATIONS).read_text(encoding="utf-8", errors="replace").splitlines()
    label_of: dict[str, int] = {}

    for number, line in enumerate(filter(str.strip, lines), 1):
        name, _, rest = line.partition("\t")
        class_name = unicodedata.normalize("NFC", rest.split("\t")[0].strip())
        if class_name not in classes:
            raise UserError(
                f"{folder / ANNOTATIONS}: expected a file name, a tab and a class of train/ in line"
                f" {number}, found {line[:60]!r}"
            )
        label_of[name] = classes.index(class_name)

    # Every image in the folder is looked up, so a name in the list cannot lead elsewhere.
    aside: list[LeftOut] = []
    files, labels = [], []
    for file in _images_in(folder, aside):
        if file.name in label_of:
            files.append(file)
            labels.append(label_of[file.name])
        else:
            aside.append(LeftOut(file, f"not in {ANNOTATIONS}"))
    left_out += [entry for entry in aside if entry.path.name != ANNOTATIONS]

    missing = sorted(label_of.keys() - {file.name for file in files})
    if missing:
        raise UserError(
            f"{folder / ANNOTATIONS}: names {len(missing):,} images that are not there, such as"
            f" {missing[0]!r}: unpack the data again"
        )
    return Part(f"{folder.name}/", tuple(files), np.asarray(labels, dtype=np.int64))
