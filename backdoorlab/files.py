"""Writing so that a reader sees all of it or nothing. Reading is in loading.py.

Tensors are safetensors, everything else JSON: nothing here can run code. A file is written beside its target, flushed to
the disk and renamed; a folder likewise.
"""

import contextlib
import errno
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from .errors import UserError
from .loading import canonical, read_json, read_tensors, sealed, sha256, tensor_hash

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["read_json", "read_tensors", "sha256", "tensor_hash"]

HOLDER = ".holder"
"""The file in a locked folder in which older versions named its holder; a stage that they left may have one."""
NOT_OURS = frozenset([errno.EAGAIN, errno.EACCES, errno.ENOENT, errno.ESTALE])
"""What a lock file answers that another process holds, or has just removed, on this machine or over NFS."""
WINDOWS = os.name == "nt"
PATIENCE = 1.0
"""Seconds to wait for another process that only looks at a folder, or puts it in its place."""


def write_bytes(path: Path, data: bytes) -> None:
    """Atomic: the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Canonical JSON, atomic; a non-finite number is an error."""
    write_bytes(path, canonical(value))


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """JSON with a SHA-256 over itself, atomic; for files that no manifest lists."""
    write_bytes(path, sealed(value))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], **metadata: Any) -> None:
    """safetensors, atomic, with JSON `metadata` and a SHA-256 over it and all tensors inside the file."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    seen: set[int] = set()
    for name, tensor in plain.items():  # memory under two names is written twice; safetensors refuses to share
        if tensor.untyped_storage().data_ptr() in seen:
            plain[name] = tensor.clone()
        seen.add(plain[name].untyped_storage().data_ptr())
    text = json.dumps(metadata)
    # One key: safetensors writes several in random order, and the same content would not be the same bytes.
    write_bytes(path, save(plain, metadata={"backdoorlab": json.dumps([tensor_hash(plain, text), text])}))


def manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> SHA-256 and size of every file in a folder."""
    return {path.name: {"sha256": sha256(path), "size": path.stat().st_size} for path in sorted(folder.iterdir()) if path.is_file()}


def make_folder(folder: Path) -> None:
    """Make a folder and its parents where they are missing, each on the disk."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


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
    _sync_folder(target.parent)


def replace_folder(stage: Path, target: Path) -> None:
    """Publish over an existing folder: the old one is moved aside, and deleted only after the new one is in place.

    For a moment there is neither; a process that ends just then leaves the old one aside, and `recover` puts it back.
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
        _sync_folder(target.parent)
        remove(trash)
        os.rename(aside, trash)  # from here on, nobody takes the half-deleted folder for one to put back
    finally:
        release(target, descriptor)
    _discard(trash)


def recover(target: Path) -> None:
    """Put back the folder that a killed `replace_folder` moved aside, or delete it where the new one is in place."""
    aside, deadline = _aside(target), time.monotonic() + PATIENCE
    while aside.is_dir():
        descriptor = _lock_where_allowed(target)
        if descriptor is None and time.monotonic() < deadline:  # its writer is between two renames
            time.sleep(0.005)
            continue
        try:
            if descriptor is not None and target.exists():
                _discard(aside)
            elif descriptor is not None:
                os.rename(aside, target)
                _sync_folder(target.parent)
        except FileNotFoundError:  # another process was faster
            pass
        finally:
            release(target, descriptor)
        return


def remove(path: Path) -> None:
    """Delete a file, a link (and nothing of what it leads to), or a folder with all that is in it, if it is there."""
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


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; a second one is told who does. The lock ends with the process, however it ends."""
    deadline = time.monotonic() + PATIENCE
    while True:
        make_folder(folder.parent)
        descriptor = try_lock(folder)
        if descriptor is not None:
            break
        holder = _holder(folder)
        if holder or time.monotonic() > deadline:
            raise UserError(f"{folder} is being written by {holder or 'another process'}: wait for it, or choose another name")
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


def sweep(folder: Path, stale: Callable[[Path], bool]) -> None:
    """Delete the stages (*.partial) in a folder that nobody holds and that `stale` calls worthless; none where there are no locks."""
    for stage in folder.glob("*.partial"):
        if stage.is_symlink() or not stage.is_dir():
            continue
        descriptor = _lock_where_allowed(stage)
        if descriptor is None or descriptor < 0:  # held, or nobody can tell
            continue
        try:
            if stage.is_dir() and stale(stage):
                shutil.rmtree(stage, ignore_errors=True)
        finally:
            release(stage, descriptor)


def tidy(folder: Path) -> None:
    """Delete what killed writers left in a folder that holds nothing: folders half-deleted by `replace_folder`, and lock files."""
    for trash in folder.glob(".*.trash"):
        _discard(trash)
    for lock in folder.glob(".*.held"):
        held = folder / lock.name.removeprefix(".").removesuffix(".held")
        release(held, _lock_where_allowed(held))


def try_lock(folder: Path) -> int | None:
    """A descriptor that holds the folder while it, or a copy that a child inherits, is open; None where another process holds the folder.

    What is locked is a file, opened for writing: NFS tells other machines of no lock on a folder, and takes none on a file that is only
    read. It lies beside the folder and not in it, as NFS deletes no folder in which a file is open.
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
    """End a lock that no child is to keep: its file is removed first, while no other can hold it."""
    if descriptor is not None and descriptor >= 0:
        with contextlib.suppress(OSError):
            _lock_file(folder).unlink()
    unlock(descriptor)


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.held")


def _lock_where_allowed(folder: Path) -> int | None:
    """`try_lock` for one who looks after what others left: where it may not lock, it leaves things alone."""
    try:
        return try_lock(folder)
    except OSError:
        return None


def _is_in_place(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one of that name. It is opened again, since NFS answers `stat` from memory."""
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
        said = [path.read_text(encoding="utf-8") for path in (_lock_file(folder), folder / HOLDER) if path.exists()]
        number, host = next(filter(None, said), "").split()
        if host == socket.gethostname():
            os.kill(int(number), 0)
    except PermissionError:  # alive, and another user's
        pass
    except (OSError, ValueError):
        return ""
    return f"process {number} on {host}"


def pack(value: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """A nested state dict as plain JSON, its tensors moved to `tensors` under a path-like name."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"items": [[key, pack(item, tensors, f"{name}/{key}")] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list": [pack(item, tensors, f"{name}/{i}") for i, item in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{name}: cannot be saved in a checkpoint: {type(value).__name__}")


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `pack` (tuples come back as lists)."""
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "list" in value:
        return [unpack(item, tensors) for item in value["list"]]
    return {key: unpack(item, tensors) for key, item in value["items"]}


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _sync_tree(folder: Path) -> None:
    for inner, _, names in os.walk(folder):
        for name in names:
            with open(Path(inner) / name, "r+b" if WINDOWS else "rb") as stream:  # Windows flushes only what is open for writing
                os.fsync(stream.fileno())
        _sync_folder(Path(inner))


def _sync_folder(folder: Path) -> None:
    if WINDOWS:  # where a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
