"""Parquet shards in the layouts of the Hugging Face hub, as a plan.

Which files belong to which configuration and split follows the `datasets` library:
1. README.md says it, under `configs`.
2. Or files are called data/<split>-00000-of-00001.parquet.
3. Or a folder or the file is named after the split. Where the same split is in several folders,
   each of these is a configuration.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..storage.reading import is_count
from .cards import (
    Configuration,
    configurations,
    names_in_card,
    names_in_infos,
    names_in_json,
    names_in_schema,
    read_card,
)
from .locations import files_below, listing
from .plan import LeftOut, Part, Plan

KEYWORDS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "eval", "evaluation"),
    "validation": ("validation", "valid", "dev", "val"),
}
"""Split -> words for it in names of files and folders."""
SAID_SPLIT = {"train": "training", "test": "test", "validation": "validation"}
"""Split -> the word for it in messages."""
SPLIT_OF = {word: split for split, words in KEYWORDS.items() for word in words}
NUMBERED = re.compile(r"(\w+(?:\.\w+)*)-[0-9]{5}-of-[0-9]{5}.*\.parquet", re.ASCII)
"""Names that the `datasets` library gives to shards."""
IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "labels", "fine_label")
MOST_CLASSES = 2**16
"""Labels from here on are refused unless there are as many images: every class up to the largest
label takes memory in the network."""
DEFAULT = "default"
"""Name of a configuration that has none."""
Splits = dict[str, list[Path]]
"""Split -> its shards, in the order of their paths."""


def plan_shards(root: Path, wanted: str | None) -> Plan:
    """Plan what is read of a folder with parquet shards.

    Args:
        root: the folder.
        wanted: the configuration to read; None if there is one only, or one is the default.

    Raises:
        UserError: the configuration or a split is not there, or labels or names do not fit.
    """
    # Files and README.md together say which configurations there are.
    service: list[Path] = []
    files = sorted(file for file in files_below(root, service) if file.suffix == ".parquet")
    card = read_card(root)
    name, splits, notes = _chosen(_found(root, files, card), wanted, root)
    train, test, said = _parts(splits, root)
    notes += said
    class_names, source = _class_names(root, card, name, train)

    # A validation set beside a test set is what a user expects.
    used = {*train.files, *test.files}
    known = {file for split in KEYWORDS for file in splits.get(split, ())}
    left_out = [
        LeftOut(file, "in none of the splits that are read", file in known)
        for file in files
        if file not in used
    ]
    left_out += [LeftOut(path, "hidden or a file manager's", True) for path in service]
    return Plan(root, "shards", train, test, class_names, source, tuple(left_out), tuple(notes))


def _found(
    root: Path, files: list[Path], card: Mapping[str, Any]
) -> dict[str, tuple[Splits, bool]]:
    """Map each configuration to its splits, and to whether it is the default."""
    # Those of a README that came without its files, as on a converted branch, are not here.
    listed = {
        entry.name: (_splits_of(root, files, entry), entry.default)
        for entry in configurations(card, root)
    }
    complete = {name: found for name, found in listed.items() if _complete(found[0])}
    present = {name: found for name, found in listed.items() if any(found[0].values())}
    if complete or present:
        return complete or present
    return {name: (splits, False) for name, splits in _by_names(root, files).items()}


def _complete(splits: Splits) -> bool:
    """Return whether there are shards of a training and a test set."""
    return bool(splits.get("train") and (splits.get("test") or splits.get("validation")))


def _splits_of(root: Path, files: list[Path], entry: Configuration) -> Splits:
    """Return the splits of a configuration in README.md."""
    # A configuration may have a folder of its own.
    base = root / entry.data_dir
    inside = [file for file in files if file.is_relative_to(base)]
    splits: Splits = {}
    if entry.patterns is None:
        # Folders in a configuration are no configurations.
        for group in _by_names(base, inside).values():
            for split, found in group.items():
                splits.setdefault(split, []).extend(found)
        return splits

    # Patterns choose among the files that were found, so none can lead out of the folder.
    for split, patterns in entry.patterns.items():
        cut = [pattern.split("/") for pattern in patterns]
        splits.setdefault(SPLIT_OF.get(split, split), []).extend(
            file
            for file in inside
            if any(_matches(file.relative_to(base).parts, pattern) for pattern in cut)
        )
    return splits


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return whether a path matches a pattern, both cut at their slashes; `**` is any folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[skip:], pattern[1:]) for skip in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _by_names(base: Path, files: list[Path]) -> dict[str, Splits]:
    """Sort shards into configurations and splits by their names; others are left out."""
    # The library's own names: nothing else in the folder counts, whatever it is called.
    numbered: Splits = {}
    for file in files:
        cut = NUMBERED.fullmatch(file.name)
        if cut is not None and file.parent == base / "data":
            numbered.setdefault(SPLIT_OF.get(cut[1].lower(), cut[1]), []).append(file)
    if _complete(numbered):
        return {DEFAULT: numbered}

    # folder without the part that names the split -> its splits
    groups: dict[str, Splits] = {}
    for file in files:
        split, group = _split_and_group(file, base)
        if split is not None:
            groups.setdefault(group or DEFAULT, {}).setdefault(split, []).append(file)

    # Folders that share no split are parts of one data set.
    present = [split for splits in groups.values() for split in splits]
    if len(present) == len(set(present)):
        merged = {split: found for splits in groups.values() for split, found in splits.items()}
        name = next(iter(groups)) if len(groups) == 1 else DEFAULT
        return {name: merged} if merged else {}
    return groups


def _split_and_group(file: Path, base: Path) -> tuple[str | None, str]:
    """Return the split that the names of a shard and its folders say, and the other folders.

    Args:
        file: the shard.
        base: the folder of the data, whose own name does not count.
    """
    # A folder that is called like a split counts as much as the name of the file.
    parents = file.relative_to(base).parts[:-1]
    exact = {SPLIT_OF[part.lower()] for part in parents if part.lower() in SPLIT_OF}
    rest = "/".join(part for part in parents if part.lower() not in SPLIT_OF)

    said = exact | _splits_in(file.name)
    if len(said) > 1:
        sets = " and ".join(SAID_SPLIT[split] for split in SAID_SPLIT if split in said)
        raise UserError(
            f"{file}: its name says {sets} set: expected train*.parquet and test*.parquet, or"
            " folders of these names"
        )
    if said:
        return said.pop(), rest

    # Folders such as "train-data" come last: "test_config" may be the name of a configuration.
    for part in reversed(parents):
        words = _words_in(part)
        if len(words) == 1:
            return words.pop(), "/".join(other for other in parents if other != part)
    return None, rest


def _splits_in(name: str) -> set[str]:
    """Return the splits that the name of a shard says; "latest" does not say test."""
    # A word may go on, as in "trainset" and "validation2".
    begun = {"train": "train", "test": "test", "val": "validation"}
    return _words_in(name) or {
        begun[word] for word in re.findall(r"(?<![a-z])(train|test|val)", name.lower())
    }


def _words_in(name: str) -> set[str]:
    """Return the splits that whole words of a name say."""
    return {SPLIT_OF[word] for word in re.split(r"[-._ 0-9]+", name.lower()) if word in SPLIT_OF}


def _chosen(
    found: Mapping[str, tuple[Splits, bool]], wanted: str | None, root: Path
) -> tuple[str, Splits, list[str]]:
    """Choose the configuration to read: the wanted one, the only one, or the default.

    Returns:
        (its name, its splits, notes for the user).
    """
    # What the user names is read, whatever the default is.
    names = ", ".join(sorted(found))
    if wanted is not None:
        if wanted not in found:
            raise UserError(
                f"--dataset_config {wanted}: {root} has no such configuration. Known:"
                f" {names or 'none'}"
            )
        return wanted, found[wanted][0], []

    if not found:
        raise _no_splits(root)
    if len(found) == 1:
        name, (splits, _) = next(iter(found.items()))
        return name, splits, []

    defaults = [name for name, (_, default) in found.items() if default]
    defaults = defaults or [name for name in found if name == DEFAULT]
    if len(defaults) != 1:
        raise UserError(
            f"--dataset_path {root}: expected one data set, found {len(found)} configurations"
            f" ({names}): pass --dataset_config with one of them"
        )
    note = f"of the configurations {names}, {defaults[0]} is read, which is the default"
    return defaults[0], found[defaults[0]][0], [note]


def _no_splits(root: Path) -> UserError:
    return UserError(
        f"--dataset_path {root}: expected shards named train*.parquet and test*.parquet, found"
        f" {listing(root)}"
    )


def _parts(splits: Splits, root: Path) -> tuple[Part, Part, list[str]]:
    """Make the training set, and the test set of the first split that has labels.

    Returns:
        (training set, test set, notes for the user).
    """
    candidates = [name for name in ("test", "validation") if splits.get(name)]
    if not splits.get("train") or not candidates:
        raise _no_splits(root)
    train = Part("train", tuple(splits["train"]), read_labels(splits["train"], root))

    # The hub keeps the true labels of many test sets to itself.
    unlabelled = [name for name in candidates if not _labelled(splits[name])]
    labelled = [name for name in candidates if name not in unlabelled]
    if not labelled:
        raise UserError(
            f"{splits[candidates[0]][0]}: all labels of the split {candidates[0]} are missing or"
            " -1: expected a test or validation split with labels"
        )
    files = splits[labelled[0]]
    test = Part(labelled[0], tuple(files), read_labels(files, root))

    # The classes are those of the training set.
    strange = sorted(set(test.labels.tolist()) - set(train.labels.tolist()))
    if strange:
        raise UserError(
            f"{files[0]}: no training image has the label {strange[0]} ({len(strange)} such"
            " labels): expected every class in the training set, pass a folder with all its shards"
        )

    # Said only where the split that the user expects is passed over.
    hidden = unlabelled and unlabelled[0] == candidates[0]
    note = f"the split {candidates[0]} has no labels: {labelled[0]} is the test set"
    return train, test, [note] if hidden else []


def _labelled(files: Iterable[Path]) -> bool:
    """Return whether shards have a column of labels with one that is neither missing nor -1."""
    for file in files:
        names = _schema(file).names
        if any(column in names for column in LABEL_COLUMNS):
            values = _cells(file, _column(file, names, LABEL_COLUMNS))
            if not set(map(str, values)) <= {"None", "-1"}:
                return True
    return False


def read_labels(files: Iterable[Path], path: Path) -> np.ndarray:
    """Read the labels of shards, int64 (N,), and check that they have images.

    Args:
        files: the shards, in the order of the result.
        path: the folder that the user gave, for errors.
    """
    labels: list[Any] = []
    for file in files:
        # Both columns must be there before any data are read.
        names = _schema(file).names
        _column(file, names, IMAGE_COLUMNS)
        labels += _cells(file, _column(file, names, LABEL_COLUMNS))
    return _checked(labels, path)


def read_cells(file: Path) -> list[bytes]:
    """Read the encoded images of a shard; empty bytes where a cell has none."""
    return list(map(cell_bytes, _cells(file, image_column(file))))


def image_column(file: Path) -> str:
    """Return the name of a shard's column of images."""
    return _column(file, _schema(file).names, IMAGE_COLUMNS)


def _cells(file: Path, column: str) -> list[Any]:
    """Read one column of a shard."""
    import pyarrow.parquet as pq

    try:
        return pq.read_table(file, columns=[column])[column].to_pylist()
    except (OSError, ValueError) as error:
        raise _unreadable(file, error) from error


def cell_bytes(cell: Any) -> bytes:
    """Return the encoded image in a cell. The hub stores it as {bytes, path}."""
    return cell.get("bytes") or b"" if isinstance(cell, dict) else cell


def _schema(file: Path) -> Any:
    """Read the schema of a shard, which says its columns before data are read."""
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(file)
    except (OSError, ValueError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> UserError:
    return UserError(f"{file}: not a readable parquet file ({error}): fetch it again")


def _column(file: Path, columns: list[str], wanted: tuple[str, ...]) -> str:
    """Return the first of the wanted columns that a shard has."""
    for name in wanted:
        if name in columns:
            return name
    raise UserError(f"{file}: expected a column {' or '.join(wanted)}, found {', '.join(columns)}")


def _checked(labels: list[Any], path: Path) -> np.ndarray:
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


def _class_names(
    root: Path, card: Mapping[str, Any], configuration: str, train: Part
) -> tuple[tuple[str, ...], str]:
    """Find the names of the classes: in classes.json, the shards' schema, or README.md.

    Returns:
        (names, where they were found); the numbers if they are nowhere.
    """
    count = int(train.labels.max(initial=-1)) + 1

    # The user's own file wins over what came with the data.
    schema = _schema(train.files[0])
    column = _column(train.files[0], schema.names, LABEL_COLUMNS)
    sources = (
        (names_in_json(root, count), root / "classes.json"),
        (names_in_schema(schema.metadata, column), train.files[0]),
        (names_in_card(card, configuration, column), root / "README.md"),
        (names_in_infos(root, configuration, column), root / "dataset_infos.json"),
    )

    for names, source in sources:
        if names is None:
            continue
        if len(names) < count:
            raise UserError(f"{source}: {len(names)} class names, but labels up to {count - 1}")
        return tuple(names), str(source.relative_to(root))
    return tuple(str(number) for number in range(count)), "the numbers in the shards"
