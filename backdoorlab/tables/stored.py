"""Results that are kept without data and weights: the JSON of records and of their defenses.

A record is too large for a repository; what it says of itself takes some kilobytes. A store is a
folder with STORED, which has the SHA-256 of every other file in it and the command that measured
them. Tables alone read a store. Whatever needs data or weights asks for a record, which is checked
as ever: one that has lost its weights is damaged, and no store.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError, suggest
from ..storage import reading
from ..storage.schema import check_record
from . import rows as measured
from .rows import Damaged, Measured, refuse

STORED = "stored.json"
"""Marks a store."""
KEPT = (
    "record.json",
    "controls/*.json",
    "defense/*/*/result.json",
    "defense/*/*/depth.json",
)
"""The files of a record that a store has."""


@dataclass(frozen=True)
class Stored:
    """What a store has of one record: all that a table needs of it."""

    folder: Path
    info: dict[str, Any]
    """record.json."""

    @property
    def name(self) -> str:
        return self.folder.name


def readable(
    names: Sequence[str], root: Path, on_damage: Callable[[Damaged], None] = refuse
) -> Sequence[Measured]:
    """Load records, or what a store has of them, for a table.

    Args:
        names: names of records.
        root: a folder of records, or a store.
        on_damage: called with each damaged record. A damaged store is refused as a whole.

    Raises:
        UserError: the store is damaged, a name is not in it, or all records are damaged.
    """
    if not (root / STORED).is_file():
        return measured.readable(names, root, on_damage)

    there = records(root)
    unknown = [name for name in names if name not in there]
    if unknown:
        raise UserError(
            f"no {unknown[0]!r} in the store {root}.{suggest(unknown[0], there)} It has:"
            f" {', '.join(there)}"
        )
    return [_read(root / name) for name in names]


def records(root: Path) -> list[str]:
    """List the records of a store, after a check of every file against the store's own list."""
    listed = contents(root)["files"]
    found = files(root)
    different = sorted(set(listed) ^ set(found))
    different += [name for name in listed if found.get(name, listed[name]) != listed[name]]
    if different:
        raise UserError(
            f"{root / different[0]}: not as {STORED} lists it: copy the records again with"
            " performance/store.py"
        )
    return sorted({path.split("/")[0] for path in found})


def contents(root: Path) -> dict[str, Any]:
    """Read STORED: `command`, which measured the records, and `files`, name -> SHA-256."""
    value = reading.read_sealed(root / STORED)
    if not isinstance(value.get("command"), str) or not isinstance(value.get("files"), dict):
        raise reading.damaged(root / STORED, "no command, or no files")
    return value


def files(root: Path) -> dict[str, str]:
    """Return every file of the records in a folder that a store keeps, and its SHA-256."""
    found = {
        path.relative_to(root): path for kept in KEPT for path in sorted(root.glob(f"*/{kept}"))
    }
    return {
        name.as_posix(): reading.sha256(path)
        for name, path in found.items()
        if not any(part.startswith(".") or part.endswith(".partial") for part in name.parts)
    }


def _read(folder: Path) -> Stored:
    """Read and verify what a store has of one record."""
    path = folder / "record.json"
    info = reading.read_sealed(path)
    check_record(path, info)
    return Stored(folder, info)
