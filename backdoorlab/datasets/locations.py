"""Folders of data, and the files in them that are read."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm")


_INSTEAD = "set BACKDOORLAB_CACHE to a folder for data sets and timings"
"""What a user does who has no place for the cache."""


def cache_root() -> Path:
    """Return the folder of the cache: $BACKDOORLAB_CACHE, else ~/.cache/backdoorlab."""
    from ..errors import UserError as Refused

    if named := os.environ.get("BACKDOORLAB_CACHE"):
        return Path(named)

    # Users of containers often have no home folder, or one in which they may not write.
    try:
        home = Path.home()
    except RuntimeError as error:
        raise Refused(f"this user has no home folder for a cache: {_INSTEAD}") from error
    root = home / ".cache" / "backdoorlab"
    if not _may_be_made(root):
        raise Refused(f"{root}: this folder cannot be made for the cache: {_INSTEAD}")
    return root


def _may_be_made(folder: Path) -> bool:
    """Whether a folder is there, or this user may make it."""
    try:
        above = next(place for place in (folder, *folder.parents) if place.exists())
    except OSError:  # a folder into which the user may not look
        return False
    return above == folder or (above.is_dir() and os.access(above, os.W_OK | os.X_OK))


def data_root() -> Path:
    """Return torchvision's download folder: $BACKDOORLAB_DATA, else ./data."""
    return Path(os.environ.get("BACKDOORLAB_DATA") or "data")


def class_folders(folder: Path) -> list[str]:
    """List the names of visible folders in a folder: numbers in numerical order, then the others
    in alphabetical order."""
    names = (
        child.name
        for child in folder.iterdir()
        if child.is_dir() and not child.name.startswith(".")
    )
    # So that "10" comes after "9".
    return sorted(
        names, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name)
    )


def class_files(folder: Path, classes: Sequence[str]) -> tuple[list[Path], list[int]]:
    """List the images in <folder>/<class>/ in order.

    Returns:
        (files, labels): a label is a position in `classes`.
    """
    files: list[Path] = []
    labels: list[int] = []
    for number, name in enumerate(classes):
        found = _images_in(folder / name)
        files += found
        labels += [number] * len(found)
    return files, labels


def _images_in(folder: Path) -> list[Path]:
    """List the images anywhere below a folder, in order of their paths."""
    # Hidden files are copies by notebooks, or leftovers of macOS, and no images of the class.
    images = (file for file in _files_below(folder) if file.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(
        file
        for file in images
        if not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )


def parquet_files(folder: Path) -> Iterator[Path]:
    """Yield the parquet files anywhere below a folder, in no order."""
    return (file for file in _files_below(folder) if file.suffix == ".parquet")


def _files_below(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Yield every file anywhere below a folder, following links.

    What is read and what is hashed for the cache key both go by this function.
    """
    real = os.path.realpath(folder)
    # A link to a folder that contains it would be followed for ever.
    if real in above or not folder.is_dir():
        return

    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _files_below(Path(entry.path), above | {real})
            elif entry.is_file():
                yield Path(entry.path)


def listing(path: Path) -> str:
    """Return the first five names in a folder as text, for error messages."""
    entries = sorted(entry.name for entry in path.iterdir())
    return ", ".join(entries[:5]) + (" ..." if len(entries) > 5 else "") if entries else "nothing"


def source_key(path: Path) -> str:
    """Return the SHA-256 over the names and contents of every file that a reader may open."""
    digest = hashlib.sha256()
    for file in _source_files(path):
        try:
            # The name, too: it says the class or the split.
            digest.update(str(file.relative_to(path)).encode())
        except UnicodeEncodeError as error:
            raise UserError(
                f"{os.fsencode(file)!r}: the name is not UTF-8: rename the file or its folder"
            ) from error
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _source_files(path: Path) -> list[Path]:
    suffixes = (".parquet", ".json", *IMAGE_SUFFIXES)
    return sorted(file for file in _files_below(path) if file.suffix.lower() in suffixes)
