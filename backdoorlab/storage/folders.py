"""Folders: published under their name, replaced, recovered after a kill, cleaned up."""

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from .locks import PATIENCE, lock_where_allowed, release, try_lock
from .writing import WINDOWS, sync_folder


def put(stage: Path, target: Path) -> None:
    """Rename a finished folder to its name, in place of an older one where there is one."""
    if target.exists():
        replace_folder(stage, target)
    else:
        publish(stage, target)


def publish(stage: Path, target: Path) -> None:
    """Rename a finished folder to its name, after all of it is flushed to the disk."""
    _sync_tree(stage)
    os.rename(stage, target)
    sync_folder(target.parent)


def replace_folder(stage: Path, target: Path) -> None:
    """Rename a finished folder to the name of an existing one, and delete that.

    The old folder is moved aside, and deleted only after the new one is in place. A process that is
    killed between the two renames leaves only the old one, aside; `recover` puts it back.
    """
    _sync_tree(stage)
    aside, trash = _aside(target), target.with_name(f".{target.name}.trash")

    # The lock keeps `recover` in other processes from acting between the renames.
    descriptor = try_lock(target)
    try:
        os.rename(target, aside)
        try:
            os.rename(stage, target)
        except OSError:
            os.rename(aside, target)
            raise
        sync_folder(target.parent)

        # Under this name, a half-deleted folder is never put back.
        remove(trash)
        os.rename(aside, trash)
    finally:
        release(target, descriptor)

    _discard(trash)


def recover(target: Path) -> None:
    """Finish what a killed `replace_folder` began.

    Puts the old folder back, or deletes it where the new one is in place.
    """
    aside, deadline = _aside(target), time.monotonic() + PATIENCE
    while aside.is_dir():
        descriptor = lock_where_allowed(target)
        # Another process is between its two renames: they take moments.
        if descriptor is None and time.monotonic() < deadline:
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
    """Delete a file, a link or a whole folder, if it is there. What a link leads to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _discard(path: Path) -> None:
    """Delete like `remove`, as far as possible and without an error."""
    if path.is_symlink():
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def sweep(folder: Path, stale: Callable[[Path], bool]) -> None:
    """Delete the stages (*.partial) in a folder that no process has locked and `stale` accepts.

    Where there are no locks, nothing is deleted.
    """
    for stage in folder.glob("*.partial"):
        if stage.is_symlink() or not stage.is_dir():
            continue

        descriptor = lock_where_allowed(stage)
        # None: somebody works in it. -1: nobody can tell.
        if descriptor is None or descriptor < 0:
            continue
        try:
            if stage.is_dir() and stale(stage):
                shutil.rmtree(stage, ignore_errors=True)
        finally:
            release(stage, descriptor)


def tidy(folder: Path) -> None:
    """Delete what killed processes left in a folder.

    These are folders that `replace_folder` half deleted, and lock files that nobody has locked.
    """
    for trash in folder.glob(".*.trash"):
        _discard(trash)

    # Locking and releasing removes the file.
    for lock in folder.glob(".*.held"):
        held = folder / lock.name.removeprefix(".").removesuffix(".held")
        release(held, lock_where_allowed(held))


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _sync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder` to the disk."""
    for inner, _, names in os.walk(folder):
        for name in names:
            # Windows flushes only files that are open for writing.
            with open(Path(inner) / name, "r+b" if WINDOWS else "rb") as stream:
                os.fsync(stream.fileno())
        sync_folder(Path(inner))
