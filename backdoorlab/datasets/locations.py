"""Folders of data, and the files in them that a reader may open."""

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError

SERVICE_NAMES = frozenset(
    {
        "@eadir",
        "@recycle",
        "@tmp",
        "#recycle",
        "#snapshot",
        "$recycle.bin",
        "__macosx",
        "__pycache__",
        "desktop.ini",
        "ehthumbs.db",
        "icon\r",
        "lost+found",
        "network trash folder",
        "system volume information",
        "temporary items",
        "thumbs.db",
    }
)
"""Files and folders that storage devices, file managers and archivers make, in lower case. Their
folders have thumbnails and deleted copies of the images."""


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


def is_service(name: str) -> bool:
    """Return whether a name is hidden (.name), or one of SERVICE_NAMES."""
    return name.startswith(".") or name.lower() in SERVICE_NAMES


def class_folders(folder: Path) -> dict[str, list[Path]]:
    """Map the classes in a folder to their folders: numbers in numerical order, then the others in
    alphabetical order.

    A class has several folders if their names differ only in the Unicode form of a letter. macOS
    decomposes letters with accents, other systems do not.
    """
    found: dict[str, list[Path]] = {}
    # Sorted first, so that the folders of one class have an order, too.
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not is_service(child.name):
            refuse_not_utf8(child, folder)
            found.setdefault(unicodedata.normalize("NFC", child.name), []).append(child)
    return dict(sorted(found.items(), key=lambda item: _numbers_first(item[0])))


def refuse_not_utf8(path: Path, root: Path) -> None:
    """Raise a UserError if the part of a path below `root` is not UTF-8."""
    try:
        str(path.relative_to(root)).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{os.fsencode(path)!r}: the name is not UTF-8: rename the file or its folder"
        ) from error


def _numbers_first(name: str) -> tuple[bool, int, str]:
    # So that "10" comes after "9".
    return not name.isdecimal(), int(name) if name.isdecimal() else 0, name


def parquet_files(folder: Path) -> Iterator[Path]:
    """Yield the parquet files anywhere below a folder, in no order."""
    return (file for file in files_below(folder) if file.suffix == ".parquet")


def files_below(
    folder: Path, service: list[Path] | None = None, above: frozenset[str] = frozenset()
) -> Iterator[Path]:
    """Yield every file anywhere below a folder that is not hidden, following links.

    Args:
        folder: where to look.
        service: if given, gets the files and folders that are left out by their name.
        above: real paths of the folders that contain this one.
    """
    real = os.path.realpath(folder)
    # A link to a folder that contains it would be followed for ever.
    if real in above or not folder.is_dir():
        return

    with os.scandir(folder) as entries:
        for entry in entries:
            if is_service(entry.name):
                if service is not None:
                    service.append(Path(entry.path))
            elif entry.is_dir():
                yield from files_below(Path(entry.path), service, above | {real})
            elif entry.is_file():
                yield Path(entry.path)


def listing(path: Path) -> str:
    """Return the first five names in a folder as text, for error messages."""
    entries = sorted(entry.name for entry in path.iterdir())
    return ", ".join(entries[:5]) + (" ..." if len(entries) > 5 else "") if entries else "nothing"
