"""Atomic writing: a reader finds the old content or the new, never a part. See reading.py for the
other direction.

Tensors are safetensors, everything else is JSON, so that no file can run code. A file is written
beside its target, flushed to the disk and renamed.
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
    """Write a file atomically."""
    # Named by the process, so that two writers do not share one.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        # Left only where writing failed: after the rename it has another name.
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write canonical JSON atomically; a non-finite number raises a ValueError."""
    write_bytes(path, canonical(value))


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON with its own SHA-256 in it, atomically: for files that no manifest lists."""
    write_bytes(path, sealed(value))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], **metadata: Any) -> None:
    """Write a safetensors file atomically, with JSON `metadata` and a SHA-256 over both in its
    header."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    # Tensors that share memory are written separately: safetensors refuses to share.
    seen: set[int] = set()
    for name, tensor in plain.items():
        if tensor.untyped_storage().data_ptr() in seen:
            plain[name] = tensor.clone()
        seen.add(plain[name].untyped_storage().data_ptr())

    # One key, since safetensors writes several in random order, and equal content would then not
    # be equal bytes.
    text = json.dumps(metadata)
    write_bytes(
        path, save(plain, metadata={"backdoorlab": json.dumps([tensor_hash(plain, text), text])})
    )


def manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the manifest of a folder: file name -> {sha256 (hex), size (bytes)}."""
    return {
        path.name: {"sha256": sha256(path), "size": path.stat().st_size}
        for path in sorted(folder.iterdir())
        if path.is_file()
    }


def make_folder(folder: Path) -> None:
    """Make a folder and its missing parents, each flushed to the disk."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def pack(value: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """Convert a nested state dict to plain JSON values; `unpack` is the inverse.

    Args:
        value: dicts, lists and tuples of tensors and plain values.
        tensors: filled with the tensors, each under a name like "optimizer/state/0/exp_avg".
        name: the beginning of these names.

    Raises:
        TypeError: something else is in it.
    """
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
    """Restore what `pack` converted; tuples come back as lists."""
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "list" in value:
        return [unpack(item, tensors) for item in value["list"]]
    return {key: unpack(item, tensors) for key, item in value["items"]}


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    if WINDOWS:  # it opens no folders
        return

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
