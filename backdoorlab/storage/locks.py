"""Who holds a folder: one process at a time, until it ends."""

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

HOLDER = ".holder"
"""The file in a locked folder in which older versions named its holder; a stage that they left may
have one."""
NOT_OURS = frozenset([errno.EAGAIN, errno.EACCES, errno.ENOENT, errno.ESTALE])
"""What a lock file answers that another process holds, or has just removed, on this machine or over
NFS."""
PATIENCE = 1.0
"""Seconds to wait for another process that only looks at a folder, or puts it in its place."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; a second one is told who does. The lock ends with the
    process, however it ends."""
    deadline = time.monotonic() + PATIENCE
    while True:
        make_folder(folder.parent)
        descriptor = try_lock(folder)
        if descriptor is not None:
            break
        holder = _holder(folder)
        if holder or time.monotonic() > deadline:
            raise UserError(
                f"{folder} is being written by {holder or 'another process'}: wait for it, or"
                " choose another name"
            )
        time.sleep(0.005)  # whoever has only begun, or sweeps, says no name
    try:
        make_folder(folder)  # not before: the last holder may just have been removing it
        _sign(descriptor)
        (folder / HOLDER).unlink(missing_ok=True)
        yield
    finally:
        with contextlib.suppress(OSError):  # where nothing came of it, nothing is left of it
            folder.rmdir()
        release(folder, descriptor)


def try_lock(folder: Path) -> int | None:
    """A descriptor that holds the folder while it, or a copy that a child inherits, is open; None
    where another process holds the folder.

    What is locked is a file, opened for writing: NFS tells other machines of no lock on a folder,
    and takes none on a file that is only read. It lies beside the folder and not in it, as NFS
    deletes no folder in which a file is open.
    """
    if fcntl is None:  # two runs of one name are then the user's to avoid
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
        # A file that its last holder removed can still be locked, but holds nothing.
        if _is_in_place(descriptor, path) and not _held_by_older(folder):
            os.ftruncate(descriptor, 0)  # a holder who was killed is still named in it
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


def unlock(descriptor: int | None) -> None:
    """Give up this process's part in a lock; its file stays, for a child that may hold it still."""
    if descriptor is not None and descriptor >= 0:
        os.close(descriptor)


def release(folder: Path, descriptor: int | None) -> None:
    """End a lock that no child is to keep: its file is removed first, while no other can hold
    it."""
    if descriptor is not None and descriptor >= 0:
        with contextlib.suppress(OSError):
            _lock_file(folder).unlink()
    unlock(descriptor)


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.held")


def lock_where_allowed(folder: Path) -> int | None:
    """`try_lock` for one who looks after what others left: where it may not lock, it leaves things
    alone."""
    try:
        return try_lock(folder)
    except OSError:
        return None


def _is_in_place(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one of that name. It is opened again, since NFS answers `stat`
    from memory."""
    with open(path, "rb") as again:
        return os.path.samestat(os.fstat(descriptor), os.fstat(again.fileno()))


def _held_by_older(folder: Path) -> bool:
    """Whether a process of an older version, which locks the folder itself, is at work in it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _sign(descriptor: int) -> None:
    """Write the holder's name where others look for it."""
    if descriptor >= 0:
        os.write(descriptor, f"{os.getpid()} {socket.gethostname()}".encode())
        os.fsync(descriptor)


def _holder(folder: Path) -> str:
    """'process N on HOST' where the lock of a folder names a process that may be alive, else ''."""
    try:
        said = [
            path.read_text(encoding="utf-8")
            for path in (_lock_file(folder), folder / HOLDER)
            if path.exists()
        ]
        number, host = next(filter(None, said), "").split()
        if host == socket.gethostname():
            os.kill(int(number), 0)
    except PermissionError:  # alive, and another user's
        pass
    except (OSError, ValueError):
        return ""
    return f"process {number} on {host}"
