"""Writing so that a reader sees all of it or nothing, and reading so that every damaged file is one clear line.

Tensors are safetensors, everything else JSON: nothing here can run code. A file is written beside its target, flushed to
the disk and renamed; a folder likewise.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .errors import UserError


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
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())


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


def read_tensors(path: Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, metadata) of a file by `write_tensors`; a damaged one is refused with a line that names it."""
    try:
        with safe_open(path, framework="pt", device="cpu") as stream:
            header = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (not a dict)
        checksum, text = json.loads(header["backdoorlab"])
        if checksum != tensor_hash(tensors, text):
            raise ValueError("its content does not match its own checksum")
        metadata = json.loads(text)
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: damaged file ({_first_line(error)}). Restore it, or make it again with --overwrite") from error
    return {name: tensor.to(device) for name, tensor in tensors.items()}, metadata


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; anything else is refused with a line that names the file."""
    try:
        value = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged file ({_first_line(error)}). Restore it, or make it again with --overwrite") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: damaged file (expected a JSON object). Restore it, or make it again with --overwrite")
    return value


def sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> SHA-256 and size of every file in a folder."""
    return {path.name: {"sha256": sha256(path), "size": path.stat().st_size} for path in sorted(folder.iterdir())}


def publish(stage: Path, target: Path) -> None:
    """Rename a finished folder to its name, with everything in it on the disk first."""
    for folder, _, names in os.walk(stage):
        for name in names:
            with open(Path(folder) / name, "rb") as stream:
                os.fsync(stream.fileno())
        _sync_folder(Path(folder))
    os.rename(stage, target)
    _sync_folder(target.parent)


def replace_folder(stage: Path, target: Path) -> None:
    """Publish over an existing folder: the old one is moved aside, and deleted only after the new one is in place."""
    aside = target.with_name(f".{target.name}.{os.getpid()}.old")
    os.rename(target, aside)
    try:
        publish(stage, target)
    except OSError:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def remove(path: Path) -> None:
    """Delete a file, or a folder with all that is in it, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; a second one is told so at once. The lock ends with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # not on Windows: two runs of one name are then the user's to avoid
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(f"{folder} is being written by another process: wait for it, or choose another name") from error
    try:
        yield
    finally:
        os.close(descriptor)


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


def tensor_hash(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """SHA-256 over a text and the names, types, shapes and bytes of tensors on the CPU."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number that this file may hold")


def _first_line(error: BaseException) -> str:
    return str(error).split("\n")[0] or type(error).__name__
