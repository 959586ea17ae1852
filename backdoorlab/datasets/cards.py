"""What files beside parquet shards say of them: configurations, splits and names of classes.

The rules are those of the `datasets` library: https://huggingface.co/docs/hub/datasets-manual-configuration
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from ..storage.reading import is_count

LONGEST_CARD = 2**20
"""Characters of README.md that are searched for settings."""


@dataclass(frozen=True)
class Configuration:
    """One of the data sets of a repository, as its README.md describes it."""

    name: str
    data_dir: str
    """Folder that the patterns start from; "" is the repository."""
    patterns: Mapping[str, Sequence[str]] | None
    """Split -> patterns of its files; None: names of files and folders say the split."""
    default: bool
    """Whether it is the one that is read if the user names none."""


def read_card(root: Path) -> dict[str, Any]:
    """Read the YAML between two lines `---` at the start of README.md; {} if there is none.

    Raises:
        UserError: it is not YAML.
    """
    file = root / "README.md"
    if not file.is_file():
        return {}

    # A README that does not begin with a line of dashes is no card.
    with open(file, encoding="utf-8", errors="replace") as stream:
        text = stream.read(LONGEST_CARD)
    opening, _, rest = text.lstrip("\ufeff").partition("\n")
    if opening.strip() != "---":
        return {}

    try:
        found = yaml.safe_load(rest.partition("\n---")[0])
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise UserError(
            f"{file}: expected YAML between its two lines ---, found {said[:200]}: mend or delete"
            " that file"
        ) from error
    return found if isinstance(found, dict) else {}


def configurations(card: Mapping[str, Any], root: Path) -> list[Configuration]:
    """Return what the key `configs` of a README.md lists; empty if it is not there.

    Raises:
        UserError: an entry has another form.
    """
    found = card.get("configs") or []
    if not isinstance(found, list):
        raise _malformed(root, found)

    made = []
    for entry in found:
        # Strangers wrote the file: every field is checked before it is used.
        if not isinstance(entry, dict) or not isinstance(entry.get("data_dir") or "", str):
            raise _malformed(root, entry)
        files = entry.get("data_files")
        made.append(
            Configuration(
                str(entry.get("config_name") or "default"),
                (entry.get("data_dir") or "").strip("/"),
                None if files is None else _patterns(files, root),
                entry.get("default") is True,
            )
        )
    return made


def _patterns(files: Any, root: Path) -> dict[str, list[str]]:
    """Bring the accepted forms of `data_files` to split -> patterns; no split is train.

    The forms are a pattern, a list of patterns, {split: patterns}, and a list of {split, path}.
    """
    # Each form is brought to the next one, and the last is the result.
    if isinstance(files, str):
        files = [files]
    if isinstance(files, list) and all(isinstance(entry, dict) for entry in files):
        files = {str(entry.get("split")): entry.get("path") for entry in files}
    if isinstance(files, list):
        files = {"train": files}
    if not isinstance(files, dict):
        raise _malformed(root, files)

    split_to_patterns = {}
    for split, value in files.items():
        patterns = [value] if isinstance(value, str) else value
        if not isinstance(patterns, list) or not all(isinstance(item, str) for item in patterns):
            raise _malformed(root, value)
        split_to_patterns[str(split)] = [pattern.removeprefix("./") for pattern in patterns]
    return split_to_patterns


def _malformed(root: Path, found: Any) -> UserError:
    return UserError(
        f"{root / 'README.md'}: expected `configs` as a list of config_name and data_files (a list"
        f" of split and path), found {str(found)[:60]!r}"
    )


def names_in_card(card: Mapping[str, Any], configuration: str, column: str) -> list[str] | None:
    """Return the class names that the key `dataset_info` of a README.md has for a column."""
    infos = card.get("dataset_info")
    infos = infos if isinstance(infos, list) else [infos]
    infos = [info for info in infos if isinstance(info, dict)]
    # A single entry is that of every configuration.
    if len(infos) > 1:
        infos = [info for info in infos if info.get("config_name", "default") == configuration]

    for info in infos:
        features = info.get("features")
        for feature in features if isinstance(features, list) else ():
            if isinstance(feature, dict) and feature.get("name") == column:
                # Columns of numbers have a plain type, and no names.
                dtype = feature.get("dtype")
                label = dtype.get("class_label") if isinstance(dtype, dict) else None
                return _listed(label.get("names")) if isinstance(label, dict) else None
    return None


def names_in_schema(metadata: Mapping[bytes, bytes] | None, column: str) -> list[str] | None:
    """Return the class names that a parquet file has for a column, in the metadata of its schema.

    The `datasets` library writes them there, as JSON under the key `huggingface`.
    """
    try:
        return _class_label(json.loads((metadata or {})[b"huggingface"])["info"], column)
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return None


def names_in_infos(root: Path, configuration: str, column: str) -> list[str] | None:
    """Return the class names that dataset_infos.json has for a column.

    Older versions of the `datasets` library wrote this file, with an entry for each configuration.
    """
    file = root / "dataset_infos.json"
    if not file.is_file() or file.stat().st_size > LONGEST_CARD:
        return None
    try:
        infos = json.loads(file.read_text(encoding="utf-8", errors="replace"))
        # A single entry is that of every configuration.
        info = next(iter(infos.values())) if len(infos) == 1 else infos[configuration]
        return _class_label(info, column)
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return None


def _class_label(info: Any, column: str) -> list[str] | None:
    """Return the names of a column that the `datasets` library describes as a ClassLabel."""
    found = info["features"][column]
    return _listed(found.get("names")) if found.get("_type") == "ClassLabel" else None


def _listed(names: Any) -> list[str] | None:
    """Bring a list of names, or {number: name}, to a list; None if it is neither."""
    if isinstance(names, dict):
        # The numbers are text in YAML and JSON, so "10" would come before "9".
        try:
            names = [names[key] for key in sorted(names, key=int)]
        except (ValueError, TypeError):
            return None
    return [str(name) for name in names] if isinstance(names, list) and names else None


def names_in_json(path: Path, count: int) -> list[str] | None:
    """Read the names of `count` classes from a folder's classes.json; None without the file.

    It may be a list of names, a list of {label, name}, or an object {number: name}, also under the
    key "classes" or "names".
    """
    file = path / "classes.json"
    if not file.exists():
        return None

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
    return [str(name) for name in found]
