"""Reading: a damaged or hostile file is one line that names it, and nothing here can run code.

Sizes come first: a file is read when its size is what the manifest says and its header fits what is
expected, and what is checked is the very memory that is used afterwards, so that a file that
changes meanwhile changes nothing.
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
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError

LARGEST_JSON = 4 << 20
"""Bytes. Parsed, the worst JSON takes about 25 times its size, and no record.json of ours comes
near this."""
LARGEST_HEADER = 4 << 20
"""Bytes of the header of a tensor file, which is JSON too."""
MOST_DIMENSIONS = 16
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*\.(safetensors|json|csv|png)")
"""What a file of a record may be called."""

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
"""Tensor name -> type and shape."""
Entry = Mapping[str, Any]
"""A file's line in a manifest: sha256 (hex) and size (bytes)."""
Check = Callable[[Shapes], None]
"""Raises ValueError, with what is wrong, for shapes that are not those expected."""


def damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path}: damaged file ({why}). Restore it, or make it again with --overwrite")


@contextmanager
def one_line(path: Path) -> Iterator[None]:
    """Whatever goes wrong while a file is read is one line that names it; that it is not there
    stays a FileNotFoundError."""
    try:
        yield
    except (UserError, FileNotFoundError):
        raise
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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of finite numbers without a key twice."""
    return _parse(path)[1]


def read_sealed(path: Path) -> dict[str, Any]:
    """A JSON object by `writing.write_sealed`, in which any changed byte is noticed. One of schema
    1, which had no seal, is taken as it is."""
    content, value = _parse(path)
    if "checksum" not in value and value.get("schema") == 1:
        return value
    with one_line(path):
        del value["checksum"]
        if sealed(value) != content:
            raise ValueError("its content does not match its own checksum")
    return value


def sealed(value: Mapping[str, Any]) -> bytes:
    """Canonical JSON with a SHA-256 over itself under `checksum`; a non-finite number is an
    error."""
    # Keys become text before they are sorted
    plain = json.loads(json.dumps(value, allow_nan=False))
    blank = canonical({**plain, "checksum": ""})
    return canonical({**plain, "checksum": hashlib.sha256(blank).hexdigest()})


def canonical(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def read_tensors(
    path: Path, device: str = "cpu", *, entry: Entry | None = None, check: Check | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, metadata) of a file by `writing.write_tensors`.

    `entry`: the size and SHA-256 that a manifest promises. `check` sees types and shapes before any
    data is read.
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
        checksum, text = parse_json(header["backdoorlab"].encode())
        if checksum != tensor_hash(tensors, text):
            raise ValueError("its content does not match its own checksum")
        metadata = json.loads(text)  # a schedule's state may hold an infinity
        if not isinstance(metadata, dict):
            raise ValueError("expected a JSON object as metadata")
    return {name: tensor.to(device) for name, tensor in tensors.items()}, metadata


def read_shapes(path: Path, entry: Entry | None = None) -> Shapes:
    """Types and shapes in a tensor file, from its header alone; the byte ranges fill the file
    exactly."""
    with one_line(path), _opened(path) as stream:
        return _header(stream, _size(stream, entry), hashlib.sha256())[0]


def check_file(folder: Path, name: str, entry: Any) -> None:
    """A file is there, under a name that a record may hold, with the size and the SHA-256 of its
    manifest."""
    path = folder / name
    check_entry(folder, name, entry)
    if not path.is_file():
        raise UserError(
            f"{path}: missing, but the manifest lists it. Restore it, or make it again with"
            " --overwrite"
        )
    with one_line(path), _opened(path) as stream:
        _size(stream, entry)
        if hashlib.file_digest(stream, "sha256").hexdigest() != entry["sha256"]:
            raise ValueError("its SHA-256 is not the one in the manifest")


def check_entry(folder: Path, name: str, entry: Any) -> None:
    """A line of a manifest: a plain file name, a SHA-256 and a size."""
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
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tensor_hash(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """SHA-256 over a text and the names, types, shapes and bytes of tensors on the CPU."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def parse_json(content: bytes) -> Any:
    """JSON without NaN, infinities (1e999 is one) or a key twice, which Python would take."""
    return json.loads(
        content,
        parse_constant=_refuse_constant,
        parse_float=_finite,
        object_pairs_hook=_no_key_twice,
    )


def is_count(value: Any) -> bool:
    """A whole number from 0 on; True is none."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _parse(path: Path) -> tuple[bytes, dict[str, Any]]:
    with one_line(path), _opened(path) as stream:
        if _size(stream, None) > LARGEST_JSON:
            raise ValueError(f"more than {LARGEST_JSON >> 20} MiB of JSON")
        content = stream.read(LARGEST_JSON + 1)
        value = parse_json(content)
        if not isinstance(value, dict):
            raise ValueError("expected a JSON object")
    return content, value


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    """A regular file, read without waiting: opening a pipe in the ordinary way would hang until
    someone writes."""
    descriptor = os.open(
        path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    )
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("not a regular file")
    with open(descriptor, "rb") as stream:
        yield stream


def _size(stream: BufferedReader, entry: Entry | None) -> int:
    size = os.fstat(stream.fileno()).st_size
    if entry is not None and size != entry["size"]:
        raise ValueError(f"{size} bytes, but the manifest says {entry['size']}")
    return size


def _header(stream: BufferedReader, size: int, digest: Any) -> tuple[Shapes, dict[str, str]]:
    """Shapes, in the order of the data, and metadata of a safetensors file; leaves the stream at
    its data."""
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
    """The next tensor of a file, in memory of its own: torch reads the state of a generator from
    aligned memory only."""
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
    raise ValueError(f"{name} is not a number that this file may hold")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is not a number that this file may hold")
    return number


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _first_line(error: BaseException) -> str:
    text = f"no {error}" if isinstance(error, KeyError) else str(error)
    return text.split("\n")[0][:200] or type(error).__name__
