"""What is read of a user's folder, decided before any image is decoded."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from .locations import refuse_not_utf8

MOST_SAID = 5
"""Kinds of files that a note about left-out files names; the rest is a number."""


@dataclass(frozen=True)
class LeftOut:
    """A file or folder that is not read."""

    path: Path
    reason: str
    """What it is, such as "not an image". Entries of one reason are counted together."""
    hidden: bool = False
    """Whether it is hidden or of the file manager: `doctor` shows it, a run does not."""


@dataclass(frozen=True)
class Part:
    """Files of a training or test set, in the order of the images."""

    name: str
    """The folder or split, as the user knows it."""
    files: tuple[Path, ...]
    """Image files, or parquet shards."""
    labels: np.ndarray
    """int64 (N,): the class of each image."""


@dataclass(frozen=True)
class Plan:
    """What is read of a user's folder."""

    root: Path
    kind: Literal["images", "shards"]
    train: Part
    test: Part
    class_names: tuple[str, ...]
    names_from: str
    """Where the names of the classes were found."""
    left_out: tuple[LeftOut, ...]
    """Files in the folders that were searched, but are not read."""
    notes: tuple[str, ...]
    """Sentences on choices that the user may not expect."""

    def key(self) -> str:
        """Return the SHA-256 over names and contents of the files, and over labels and classes."""
        digest = hashlib.sha256(repr((self.kind, self.class_names)).encode("utf-8", "replace"))
        for part in (self.train, self.test):
            digest.update(part.labels.tobytes())
            for file in part.files:
                # The name, too: it says the class or the split.
                refuse_not_utf8(file, self.root)
                digest.update(str(file.relative_to(self.root)).encode())
                with open(file, "rb") as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
            # So that a file of one part is not one of the other.
            digest.update(b"end")
        return digest.hexdigest()

    def describe(self) -> tuple[str, ...]:
        """Return the notes, and what is left out, as sentences for the user."""
        return *self.notes, *aside(self.left_out, self.root)


def aside(left_out: Sequence[LeftOut], root: Path) -> tuple[str, ...]:
    """Return one sentence on what is left out of a folder, or nothing."""
    visible = [entry for entry in left_out if not entry.hidden]
    if not visible:
        return ()

    # A folder of a thousand text files is one line.
    kinds = said(visible, root)
    rest = f"; and {len(kinds) - MOST_SAID} more kinds" if len(kinds) > MOST_SAID else ""
    what = "file or folder is" if len(visible) == 1 else "files or folders are"
    return (f"{len(visible):,} {what} left out: {'; '.join(kinds[:MOST_SAID])}{rest}",)


def said(entries: Sequence[LeftOut], root: Path) -> list[str]:
    """Return one text for each reason and suffix, the most frequent first: number and example."""
    # A kind is named by its first file, which the user can look at.
    kinds = [(entry.reason, entry.path.suffix.lower()) for entry in entries]
    first: dict[tuple[str, str], Path] = {}
    for kind, entry in zip(kinds, entries, strict=True):
        first.setdefault(kind, entry.path)
    return [
        f"{count:,} {suffix or 'without suffix'} ({reason}, such as"
        f" {str(first[reason, suffix].relative_to(root))!r})"
        for (reason, suffix), count in Counter(kinds).most_common()
    ]
