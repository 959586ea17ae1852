"""The one place that reads or writes a pickle: PyTorch files of other people, with exactly the
names that data need.

Three doors, each shut on its own. The pickle inside the file is listed, not run, and refused for
any name outside NAMES. `torch.load` reads it with `weights_only=True`. And the names of numpy and
Pillow lead to the inert stand-ins below, so that neither library is called with a stranger's
arguments. There is no way from here to the unsafe loader.
"""

import contextlib
import io
import pickle
import pickletools
import types
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError

PLAIN = {
    "?": np.bool_,
    "b1": np.bool_,
    "u1": np.uint8,
    "i4": np.int32,
    "i8": np.int64,
    "f4": np.float32,
    "f8": np.float64,
}
"""Element types that an array in a pickle may have; an object is not among them."""


class DType:
    """Stands in for numpy.dtype: a code out of PLAIN and a byte order."""

    def __init__(self, code: Any = None, *_flags: Any) -> None:
        if code not in PLAIN:
            raise ValueError(f"an array of type {code!r}, expected one of {', '.join(PLAIN)}")
        self.code = code
        self.order: Literal["<", ">", "="] = "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1] if state[1] in ("<", ">") else "="

    def numpy(self) -> np.dtype[Any]:
        return np.dtype(PLAIN[self.code]).newbyteorder(self.order)


class Array:
    """Stands in for numpy.ndarray: bytes that fit a shape and a plain type."""

    def __init__(self, *_arguments: Any) -> None:
        self.values: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, fortran, data = state
        if (
            not isinstance(dtype, DType)
            or not isinstance(data, bytes)
            or not all(type(side) is int and side >= 0 for side in shape)
        ):
            raise ValueError("an array whose state is not a shape, a plain type and bytes")
        self.values = np.frombuffer(data, dtype.numpy()).reshape(
            shape, order="F" if fortran else "C"
        )


class Picture:
    """Stands in for PIL.Image.Image: 8-bit grey or RGB bytes that fit a size."""

    def __init__(self, *_arguments: Any) -> None:
        self.pixels: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _info, mode, (width, height), _palette, data = state[:5]
        if mode not in ("L", "RGB") or not isinstance(data, bytes):
            raise ValueError(f"a picture of mode {mode!r}, expected L or RGB")
        self.pixels = (
            np.frombuffer(data, np.uint8)
            .reshape(height, width, 1 if mode == "L" else 3)
            .transpose(2, 0, 1)
        )


def _reconstruct(*_arguments: Any) -> Array:
    return Array()


def _scalar(dtype: Any, data: Any) -> Any:
    """numpy's scalar as a plain number, so that it can be a key."""
    if not isinstance(dtype, DType) or not isinstance(data, bytes):
        raise ValueError("a number that is not a plain type and bytes")
    return np.frombuffer(data, dtype.numpy(), 1)[0].item()


STAND_INS: dict[str, Any] = {
    "numpy.ndarray": Array,
    "numpy.dtype": DType,
    "numpy.core.multiarray._reconstruct": _reconstruct,  # numpy 1
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray._reconstruct": _reconstruct,  # numpy 2
    "numpy._core.multiarray.scalar": _scalar,
    "PIL.Image.Image": Picture,
    "PIL.PngImagePlugin.PngImageFile": Picture,
}
STORAGES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
NAMES = frozenset(
    [
        "collections.OrderedDict",
        "_codecs.encode",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
    ]
    + [f"torch.{kind}Storage" for kind in STORAGES]
    + list(STAND_INS)
)


def load(path: Path) -> Any:
    """What `torch.save` wrote, on the CPU: plain values, tensors, and the stand-ins above; anything
    else is one line that names the file."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    content = path.read_bytes()  # once, so that what is read is what was looked at
    try:
        names = _names(path, content)
    except UserError:
        raise
    except Exception as error:  # whoever made the file chooses what breaks
        raise UserError(
            f"{path}: not readable as a PyTorch file ({_first_line(error)}). Fetch it again, or"
            " save it again with torch.save"
        ) from error
    strange = sorted(names - NAMES)
    if strange:
        raise UserError(
            f"{path}: refused, nothing of it was run: it names"
            f" {', '.join(strange[:3])}{', ...' if len(strange) > 3 else ''}, which weights and"
            " images do not need and which could run code. Save only a state dict, best as"
            " safetensors"
        )
    try:
        with _only(STAND_INS):
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        # Torch's own advice is its unsafe loader
        why = type(error).__name__ if "weights_only" in str(error) else _first_line(error)
        raise UserError(
            f"{path}: refused by the safe loader ({why}). Fetch it again, or save only a state dict"
            " in it"
        ) from error


def state_dict(found: Any, path: Path) -> dict[str, Tensor]:
    """name -> dense tensor out of what a file holds: a state dict, or one under a usual key. No
    tensor may be larger than its bytes."""
    for key in ("state_dict", "model_state_dict", "model", "net"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if (
        not isinstance(found, Mapping)
        or not found
        or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items())
    ):
        raise UserError(
            f"{path}: expected a state dict (names -> tensors), found {_kind(found)}. Save"
            " model.state_dict()"
        )
    for name, tensor in found.items():
        if (
            tensor.layout != torch.strided
            or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size()
        ):
            raise UserError(
                f"{path}: refused: {name} claims shape {tuple(tensor.shape)}, more than the file"
                " holds of it"
            )
    if sum(tensor.nbytes for tensor in found.values()) > path.stat().st_size:
        raise UserError(f"{path}: refused: its tensors claim more bytes than the file has")
    return {name: tensor.detach() for name, tensor in found.items()}


def dump(value: Any) -> bytes:
    """`torch.save` of plain values, tensors and numpy arrays, under the names that numpy 1 and 2
    both know."""
    stream = io.BytesIO()
    torch.save(
        value, stream, pickle_module=types.SimpleNamespace(__name__="pickle", Pickler=_OldNames)
    )
    return stream.getvalue()


_InPython: Any = pickle._Pickler
"""The pickler whose methods can be replaced; the one in C has no save_global."""


class _OldNames(_InPython):
    """numpy 2 writes numpy._core, which numpy 1 cannot import; the old name works in both."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        module = getattr(obj, "__module__", None) or ""
        if module.startswith("numpy._core"):
            self.write(
                pickle.GLOBAL
                + f"numpy.core{module.removeprefix('numpy._core')}\n".encode()
                + f"{name or obj.__qualname__}\n".encode()
            )
            self.memoize(obj)
        else:
            super().save_global(obj, name)


def _names(path: Path, content: bytes) -> set[str]:
    """Every module.name in the file's pickle, read as text; archives that could unpack into more
    than their size are refused.

    The archive must be the whole file: its directory is at the end, but torch looks at the
    beginning, where another file could be.
    """
    stream = io.BytesIO(content)
    if not content.startswith(b"PK\x03\x04") or not zipfile.is_zipfile(stream):
        raise UserError(
            f"{path}: refused: not the zip archive that torch.save has written since torch 1.6."
            " Save only a state dict, best as safetensors"
        )
    with zipfile.ZipFile(stream) as archive:
        entries = archive.infolist()
        if min((entry.header_offset for entry in entries), default=0) != 0:
            raise UserError(
                f"{path}: refused: something stands before the archive, which torch.save does not"
                " write"
            )
        pickles = [
            entry for entry in entries if entry.filename.lower().split("/")[-1].endswith(".pkl")
        ]
        if len(pickles) != 1 or pickles[0].filename.split("/")[-1] != "data.pkl":
            raise UserError(
                f"{path}: refused: expected one data.pkl in it, found {len(pickles)} pickles"
                " (TorchScript?). Save a state dict instead"
            )
        lower = [entry.filename.lower() for entry in entries]
        if len(set(lower)) != len(lower) or any(
            entry.compress_type != zipfile.ZIP_STORED for entry in entries
        ):
            raise UserError(
                f"{path}: refused: an archive with compressed or repeated entries, which torch.save"
                " does not write"
            )
        if sum(entry.file_size for entry in entries) > len(content):
            raise UserError(f"{path}: refused: its entries claim more bytes than the file has")
        found = set()
        for opcode, argument, _ in pickletools.genops(archive.read(pickles[0])):
            if opcode.name == "GLOBAL":
                found.add(str(argument).replace(" ", "."))
            elif opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
                found.add(f"the opcode {opcode.name}")
    return found


@contextlib.contextmanager
def _only(stand_ins: Mapping[str, Any]) -> Iterator[None]:
    """Exactly these names for a while, without those that other packages have allowed."""
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([(value, name) for name, value in stand_ins.items()])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(others)


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a dict with {', '.join(map(repr, list(value)[:5])) or 'nothing in it'}"
    return type(value).__name__


def _first_line(error: BaseException) -> str:
    return (str(error).split("\n")[0] or type(error).__name__)[:200]
