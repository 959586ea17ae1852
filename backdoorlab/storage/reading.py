"""Safe reading: a damaged or hostile file becomes a one-line error that names it, and runs no code.

Sizes are checked before memory is taken: a file's size against its manifest, its header against
what is expected. The bytes that are checked are the bytes that are used, so a file that changes
meanwhile changes nothing.
"""

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError

LARGEST_JSON = 4 << 20
"""Bytes of a JSON file. The worst JSON takes 25 times its size when parsed; no record.json of ours
comes near this limit."""
LARGEST_HEADER = 4 << 20
"""Bytes of the header of a safetensors file, which is JSON, too."""
MOST_DIMENSIONS = 16
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*\.(safetensors|json|csv|png)")
"""Allowed names of files in a record."""

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}

Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Tensor name -> dtype and shape."""
Entry = Mapping[str, Any]
"""One file in a manifest: sha256 (hex) and size (bytes)."""
Check = Callable[[Shapes], None]
"""Raises a ValueError that says what is wrong with the shapes."""


def damaged(path: Path, why: str) -> UserError:
    """Return the error for a damaged file."""
    return UserError(f"{path}: damaged file ({why}). Restore it, or make it again with --overwrite")


@contextmanager
def one_line(path: Path) -> Iterator[None]:
    """Turn every error of reading a file into a UserError of one line that names it.

    A FileNotFoundError is passed on.
    """
    try:
        yield
    except (UserError, FileNotFoundError):
        raise
    # Whoever made the file chooses what breaks: these are all that parsing and torch can raise.
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        AttributeError,
        RuntimeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise damaged(path, _first_line(error)) from error


@contextmanager
def refuse_other_version(path: Path) -> Iterator[None]:
    """Turn the errors of restoring what another version has saved into a UserError of one line.

    Args:
        path: the file, in the folder of an unfinished run.
    """
    # A missing key, an unknown field, or a state dict that does not fit.
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{path}: this version cannot continue the unfinished run of another one"
            f" ({shorten(why, 200)}): finish it with that version, or start again with --overwrite"
            " True or without the folder"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; NaN, infinity and repeated keys are errors."""
    return _parse(path)[1]


def read_sealed(path: Path) -> dict[str, Any]:
    """Read a JSON object by `writing.write_sealed`; any changed byte is an error."""
    content, value = _parse(path)
    with one_line(path):
        del value["checksum"]
        if sealed(value) != content:
            raise ValueError("its content does not match its own checksum")
    return value


def sealed(value: Mapping[str, Any]) -> bytes:
    """Return canonical JSON with its own SHA-256 under the key `checksum`.

    The SHA-256 is that of the same JSON with an empty checksum. A non-finite number raises a
    ValueError.
    """
    # A round trip turns all keys into text, so that they can be sorted.
    plain = json.loads(json.dumps(value, allow_nan=False))
    blank = canonical({**plain, "checksum": ""})
    return canonical({**plain, "checksum": hashlib.sha256(blank).hexdigest()})


def canonical(value: Any) -> bytes:
    """Return JSON with sorted keys: equal values are equal bytes."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def read_tensors(
    path: Path, device: str = "cpu", *, entry: Entry | None = None, check: Check | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a safetensors file by `writing.write_tensors`.

    Args:
        path: the file.
        device: where the tensors go.
        entry: size and SHA-256 by the manifest; None where no manifest lists the file.
        check: called with dtypes and shapes before memory is taken for the data.

    Returns:
        (tensors by name, JSON metadata).

    Raises:
        UserError: the file is damaged, or `check` refuses it.
    """
    with one_line(path), _opened(path) as stream:
        size = _size(stream, entry)
        digest = hashlib.sha256()
        shapes, header = _header(stream, size, digest)
        if check is not None:
            check(shapes)

        tensors = {name: _read_tensor(stream, *shapes[name], digest) for name in shapes}
        if entry is not None and digest.hexdigest() != entry["sha256"]:
            raise ValueError("its SHA-256 is not the one in the manifest")

        # The file's own checksum is all that a checkpoint has, which no manifest lists.
        checksum, text = parse_json(header["backdoorlab"].encode())
        if checksum != tensor_hash(tensors, text):
            raise ValueError("its content does not match its own checksum")

        # Not by `parse_json`: the state of a learning-rate schedule may contain an infinity.
        metadata = json.loads(text)
        if not isinstance(metadata, dict):
            raise ValueError("expected a JSON object as metadata")
    return {name: tensor.to(device) for name, tensor in tensors.items()}, metadata


def read_shapes(path: Path, entry: Entry | None = None) -> Shapes:
    """Read dtypes and shapes from the header of a safetensors file.

    The header is checked: the byte ranges of its tensors fill the file exactly.
    """
    with one_line(path), _opened(path) as stream:
        return _header(stream, _size(stream, entry), hashlib.sha256())[0]


def check_file(folder: Path, name: str, entry: Any) -> None:
    """Raise a UserError unless a file has an allowed name and the size and SHA-256 of its
    manifest."""
    path = folder / name
    check_entry(folder, name, entry)
    if not path.is_file():
        raise UserError(
            f"{path}: missing, but the manifest lists it. Restore it, or make it again with"
            " --overwrite"
        )
    with one_line(path), _opened(path) as stream:
        # A huge file of another size is not hashed.
        _size(stream, entry)
        if hashlib.file_digest(stream, "sha256").hexdigest() != entry["sha256"]:
            raise ValueError("its SHA-256 is not the one in the manifest")


def check_entry(folder: Path, name: str, entry: Any) -> None:
    """Raise a UserError unless a manifest entry is an allowed file name, a SHA-256 and a size."""
    if not FILE_NAME.fullmatch(name):
        raise UserError(
            f"{folder}: its manifest lists {name!r}, but a record holds .safetensors, .json, .csv"
            " and .png files only. Do not use it"
        )
    if (
        not isinstance(entry, dict)
        or not re.fullmatch("[0-9a-f]{64}", str(entry.get("sha256")))
        or not is_count(entry.get("size"))
    ):
        raise UserError(
            f"{folder}: damaged manifest (no SHA-256 and size of {name}). Restore it, or make it"
            " again with --overwrite"
        )


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tensor_hash(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """Return the SHA-256 over a text and the names, dtypes, shapes and bytes of CPU tensors."""
    # Sorted, so that the order in the file does not count.
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def parse_json(content: bytes) -> Any:
    """Parse JSON, refusing what Python would accept: NaN, infinities (also as 1e999), repeated
    keys."""
    return json.loads(
        content,
        parse_constant=_refuse_constant,
        parse_float=_finite,
        object_pairs_hook=_no_key_twice,
    )


def is_count(value: Any) -> bool:
    """Return whether a value is an integer in 0..2^62 - 1, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _parse(path: Path) -> tuple[bytes, dict[str, Any]]:
    """Return the bytes of a JSON file and the object in it."""
    with one_line(path), _opened(path) as stream:
        if _size(stream, None) > LARGEST_JSON:
            raise ValueError(f"more than {LARGEST_JSON >> 20} MiB of JSON")
        # The limit again: the file may have grown since.
        content = stream.read(LARGEST_JSON + 1)
        value = parse_json(content)
        if not isinstance(value, dict):
            raise ValueError("expected a JSON object")
    return content, value


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file for reading; anything else is a ValueError."""
    # Without O_NONBLOCK, opening a named pipe would wait until somebody writes to it.
    descriptor = os.open(
        path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    )
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("not a regular file")
    with open(descriptor, "rb") as stream:
        yield stream


def _size(stream: BufferedReader, entry: Entry | None) -> int:
    """Return the size of an open file in bytes, which must be that of the manifest."""
    size = os.fstat(stream.fileno()).st_size
    if entry is not None and size != entry["size"]:
        raise ValueError(f"{size} bytes, but the manifest says {entry['size']}")
    return size


def _header(stream: BufferedReader, size: int, digest: Any) -> tuple[Shapes, dict[str, str]]:
    """Read and check the header of a safetensors file, and leave the stream at the data.

    Args:
        stream: the file, at its beginning.
        size: bytes of the file.
        digest: a hashlib object, updated with the bytes read.

    Returns:
        (shapes in the order of the data, the file's metadata).
    """
    length_bytes = stream.read(8)
    length = int.from_bytes(length_bytes, "little")
    if len(length_bytes) < 8 or length > size - 8:
        raise ValueError("shorter than its header")
    if length > LARGEST_HEADER:
        raise ValueError(f"a header of more than {LARGEST_HEADER >> 20} MiB")

    text = stream.read(length)
    digest.update(length_bytes + text)
    table = parse_json(text)
    metadata = table.pop("__metadata__", {})

    # Each tensor must begin where the last one ended and have the bytes of its dtype and shape, so
    # that the memory for all of them is that of the file.
    shapes: Shapes = {}
    end = 0
    for name, entry in sorted(table.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (begin, stop) = (
            DTYPES[entry["dtype"]],
            tuple(entry["shape"]),
            entry["data_offsets"],
        )

        if len(shape) > MOST_DIMENSIONS or not all(is_count(n) for n in (*shape, begin, stop)):
            raise ValueError(f"tensor {name!r} has no usable shape")
        if begin != end or stop - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"tensor {name!r} has another size than its type and shape")
        shapes[name], end = (dtype, shape), stop

    if 8 + length + end != size:
        raise ValueError("its tensors do not fill it")
    return shapes, metadata


def _read_tensor(
    stream: BufferedReader, dtype: torch.dtype, shape: tuple[int, ...], digest: Any
) -> Tensor:
    """Read the next tensor of a file into aligned memory, which the state of a generator needs."""
    # safetensors.torch.load is not used: it takes the whole file as `bytes` and copies each tensor
    # out of it, twice the memory, and it accepts a bool that is neither 0 nor 1.
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.numel():
        memory = tensor.view(-1).view(torch.uint8).numpy().data
        if stream.readinto(memory) != len(memory):
            raise ValueError("shorter than its size")
        digest.update(memory)
        if dtype == torch.bool and int(tensor.view(torch.uint8).max()) > 1:
            raise ValueError("a truth value that is neither 0 nor 1")
    return tensor


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name}: expected finite numbers only")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]}: expected finite numbers only")
    return number


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _first_line(error: BaseException) -> str:
    text = f"no {error}" if isinstance(error, KeyError) else str(error)
    return text.split("\n")[0][:200] or type(error).__name__
