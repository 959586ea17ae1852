"""Folders brought to their name, put back, cleared away."""

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from .locks import HOLDER, PATIENCE, lock_where_allowed, release, try_lock
from .writing import WINDOWS, sync_folder


def entries(folder: Path) -> list[Path]:
    """What is in a locked folder."""
    return [entry for entry in folder.iterdir() if entry.name != HOLDER]


def put(stage: Path, target: Path) -> None:
    """Bring a finished folder to its name, in place of an older one where there is one."""
    (replace_folder if target.exists() else publish)(stage, target)


def publish(stage: Path, target: Path) -> None:
    """Rename a finished folder to its name, with everything in it on the disk first."""
    _sync_tree(stage)
    os.rename(stage, target)
    sync_folder(target.parent)


def replace_folder(stage: Path, target: Path) -> None:
    """Publish over an existing folder: the old one is moved aside, and deleted only after the new
    one is in place.

    For a moment there is neither; a process that ends just then leaves the old one aside, and
    `recover` puts it back.
    """
    _sync_tree(stage)
    aside, trash = _aside(target), target.with_name(f".{target.name}.trash")
    descriptor = try_lock(target)  # keeps `recover` in other processes away
    try:
        os.rename(target, aside)
        try:
            os.rename(stage, target)
        except OSError:
            os.rename(aside, target)
            raise
        sync_folder(target.parent)
        remove(trash)
        # From here on, nobody takes the half-deleted folder for one to put back
        os.rename(aside, trash)
    finally:
        release(target, descriptor)
    _discard(trash)


def recover(target: Path) -> None:
    """Put back the folder that a killed `replace_folder` moved aside, or delete it where the new
    one is in place."""
    aside, deadline = _aside(target), time.monotonic() + PATIENCE
    while aside.is_dir():
        descriptor = lock_where_allowed(target)
        if descriptor is None and time.monotonic() < deadline:  # its writer is between two renames
            time.sleep(0.005)
            continue
        try:
            if descriptor is not None and target.exists():
                _discard(aside)
            elif descriptor is not None:
                os.rename(aside, target)
                sync_folder(target.parent)
        except FileNotFoundError:  # another process was faster
            pass
        finally:
            release(target, descriptor)
        return


def remove(path: Path) -> None:
    """Delete a file, a link (and nothing of what it leads to), or a folder with all that is in it,
    if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _discard(path: Path) -> None:
    """As `remove`, as far as it goes."""
    if path.is_symlink():
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def sweep(folder: Path, stale: Callable[[Path], bool]) -> None:
    """Delete the stages (*.partial) in a folder that nobody holds and that `stale` calls worthless;
    none where there are no locks."""
    for stage in folder.glob("*.partial"):
        if stage.is_symlink() or not stage.is_dir():
            continue
        descriptor = lock_where_allowed(stage)
        if descriptor is None or descriptor < 0:  # held, or nobody can tell
            continue
        try:
            if stage.is_dir() and stale(stage):
                shutil.rmtree(stage, ignore_errors=True)
        finally:
            release(stage, descriptor)


def tidy(folder: Path) -> None:
    """Delete what killed writers left in a folder that holds nothing: folders half-deleted by
    `replace_folder`, and lock files."""
    for trash in folder.glob(".*.trash"):
        _discard(trash)
    for lock in folder.glob(".*.held"):
        held = folder / lock.name.removeprefix(".").removesuffix(".held")
        release(held, lock_where_allowed(held))


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _sync_tree(folder: Path) -> None:
    for inner, _, names in os.walk(folder):
        for name in names:
            # Windows flushes only what is open for writing
            with open(Path(inner) / name, "r+b" if WINDOWS else "rb") as stream:
                os.fsync(stream.fileno())
        sync_folder(Path(inner))
