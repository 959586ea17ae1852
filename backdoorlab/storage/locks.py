"""Locks on folders: one process at a time works in a folder, and its lock ends when it ends."""

import contextlib
import errno
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from .writing import make_folder

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

# Not the package filelock: a command of a grid inherits the descriptor of its lock (bench/), so
# `try_lock` stays in any case. filelock would stand beside it, and it writes no name of its holder.

NOT_OURS = frozenset([errno.EAGAIN, errno.EACCES, errno.ENOENT, errno.ESTALE])
"""Errors that mean another process has the lock file locked, or has just removed it (the last two
over NFS)."""
PATIENCE = 1.0
"""Seconds to wait for a process that only inspects a folder, or is renaming it."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder for this process, and make it where it is missing.

    The lock ends with the block or with the process. A folder that is empty by then is removed.

    Raises:
        UserError: another process has the lock; the message names its number and its machine.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        make_folder(folder.parent)
        descriptor = try_lock(folder)
        if descriptor is not None:
            break

        # A process that has just begun, or only sweeps, has not written its name: try again.
        holder = _holder(folder)
        if holder or time.monotonic() > deadline:
            raise UserError(
                f"{folder} is being written by {holder or 'another process'}: wait for it, or"
                " choose another name"
            )
        time.sleep(0.005)

    try:
        # Only now: the previous holder may have been removing the folder until it let go.
        make_folder(folder)
        _sign(descriptor)
        yield
    finally:
        # rmdir removes empty folders only.
        with contextlib.suppress(OSError):
            folder.rmdir()
        release(folder, descriptor)


def try_lock(folder: Path) -> int | None:
    """Lock a folder without waiting.

    The lock is on a file beside the folder. NFS does not pass locks on folders to other machines,
    refuses locks on files that are open for reading only, and deletes no folder with an open file
    in it.

    Returns:
        An open file descriptor, or -1 on Windows, which has no such locks. The lock lasts until
        the descriptor, and every copy that a child inherited, is closed. None where another
        process has the lock.
    """
    if fcntl is None:
        return -1

    path = _lock_file(folder)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except FileNotFoundError:
        return None
    except PermissionError:
        if path.exists():  # another user's
            return None
        raise

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The last holder may have removed this file after we opened it. It can still be locked,
        # but the next process would make and lock a new one.
        if _is_in_place(descriptor, path):
            os.ftruncate(descriptor, 0)  # it may still name a holder that was killed
            return descriptor
    except OSError as error:
        if error.errno not in NOT_OURS:
            os.close(descriptor)
            raise
    except BaseException:
        os.close(descriptor)
        raise

    os.close(descriptor)
    return None


def lock_where_allowed(folder: Path) -> int | None:
    """Lock a folder as `try_lock` does, but return None, too, where no lock file may be made.

    For clean-up of what other processes left: without a lock, it leaves things alone.
    """
    try:
        return try_lock(folder)
    except OSError:
        return None


def unlock(descriptor: int | None) -> None:
    """Close this process's descriptor of a lock, and keep the file: a child may still use it."""
    if descriptor is not None and descriptor >= 0:
        os.close(descriptor)


def release(folder: Path, descriptor: int | None) -> None:
    """End a lock that no child inherited, and remove its file."""
    if descriptor is not None and descriptor >= 0:
        # Before unlocking, so that no other process can lock the file and then lose it.
        with contextlib.suppress(OSError):
            _lock_file(folder).unlink()
    unlock(descriptor)


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.held")


def _is_in_place(descriptor: int, path: Path) -> bool:
    """Return whether an open file is still the one at `path`.

    The path is opened again, since NFS may answer `stat` from its cache.
    """
    with open(path, "rb") as again:
        return os.path.samestat(os.fstat(descriptor), os.fstat(again.fileno()))


def _sign(descriptor: int) -> None:
    """Write this process's number and machine into its lock file."""
    if descriptor >= 0:
        os.write(descriptor, f"{os.getpid()} {socket.gethostname()}".encode())
        os.fsync(descriptor)


def _holder(folder: Path) -> str:
    """Return "process N on HOST" from a folder's lock file.

    "" where it names no process, or one of this machine that has ended.
    """
    try:
        number, host = _lock_file(folder).read_text(encoding="utf-8").split()
        # Signal 0 only asks whether the process is there.
        if host == socket.gethostname():
            os.kill(int(number), 0)
    except PermissionError:  # it is, and belongs to another user
        pass
    except (OSError, ValueError):
        return ""
    return f"process {number} on {host}"
