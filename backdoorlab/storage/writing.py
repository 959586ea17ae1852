"""Writing so that a reader sees all of it or nothing. Reading is in reading.py.

Tensors are safetensors, everything else JSON: nothing here can run code. A file is written beside
its target, flushed to the disk and renamed; a folder likewise.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from .reading import canonical, sealed, sha256, tensor_hash

WINDOWS = os.name == "nt"


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
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Canonical JSON, atomic; a non-finite number is an error."""
    write_bytes(path, canonical(value))


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """JSON with a SHA-256 over itself, atomic; for files that no manifest lists."""
    write_bytes(path, sealed(value))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], **metadata: Any) -> None:
    """safetensors, atomic, with JSON `metadata` and a SHA-256 over it and all tensors inside the
    file."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    seen: set[int] = set()
    # Memory under two names is written twice; safetensors refuses to share
    for name, tensor in plain.items():
        if tensor.untyped_storage().data_ptr() in seen:
            plain[name] = tensor.clone()
        seen.add(plain[name].untyped_storage().data_ptr())
    text = json.dumps(metadata)
    # One key: safetensors writes several in random order, and the same content would not be the
    # same bytes.
    write_bytes(
        path, save(plain, metadata={"backdoorlab": json.dumps([tensor_hash(plain, text), text])})
    )


def manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> SHA-256 and size of every file in a folder."""
    return {
        path.name: {"sha256": sha256(path), "size": path.stat().st_size}
        for path in sorted(folder.iterdir())
        if path.is_file()
    }


def make_folder(folder: Path) -> None:
    """Make a folder and its parents where they are missing, each on the disk."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def pack(value: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """A nested state dict as plain JSON, its tensors moved to `tensors` under a path-like name."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {
            "items": [[key, pack(item, tensors, f"{name}/{key}")] for key, item in value.items()]
        }
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


def sync_folder(folder: Path) -> None:
    if WINDOWS:  # where a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
