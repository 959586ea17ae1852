"""Pickles of other people: the only module that reads or writes them.

Three barriers, each of which is enough:
  1. The pickle in the file is listed without being run, and refused for any name outside NAMES.
  2. `torch.load` reads it with `weights_only=True`.
  3. The names of numpy and Pillow stand for the inert classes below, so that neither library is
     called with a stranger's arguments.
The unsafe loader is never called.
"""

import contextlib
import io
import pickle
import pickletools
import re
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
"""Element types that an array in a pickle may have. Python objects are not among them."""


class DType:
    """Stand-in for numpy.dtype: a code out of PLAIN, and a byte order."""

    def __init__(self, code: Any = None, *_flags: Any) -> None:
        if code not in PLAIN:
            raise ValueError(f"an array of type {code!r}, expected one of {', '.join(PLAIN)}")
        self.code = code
        self.order: Literal["<", ">", "="] = "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1] if state[1] in ("<", ">") else "="

    def numpy(self) -> np.dtype[Any]:
        """Return numpy's own type."""
        return np.dtype(PLAIN[self.code]).newbyteorder(self.order)


class Array:
    """Stand-in for numpy.ndarray: bytes that fit a shape and a plain type."""

    def __init__(self, *_arguments: Any) -> None:
        self.values: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        # Whoever made the file chose the state: every part of it is checked before it is used.
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
    """Stand-in for PIL.Image.Image: 8-bit grey or RGB bytes that fit a size."""

    def __init__(self, *_arguments: Any) -> None:
        self.pixels: np.ndarray | None = None  # uint8 (C, H, W)

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
    """Return an empty array, which gets its values from `__setstate__`."""
    return Array()


def _scalar(dtype: Any, data: Any) -> Any:
    """Return numpy's scalar as a plain number, which can be a key."""
    if not isinstance(dtype, DType) or not isinstance(data, bytes):
        raise ValueError("a number that is not a plain type and bytes")
    return np.frombuffer(data, dtype.numpy(), 1)[0].item()


STAND_INS: dict[str, Any] = {
    "numpy.ndarray": Array,
    "numpy.dtype": DType,
    # numpy 1
    "numpy.core.multiarray._reconstruct": _reconstruct,
    "numpy.core.multiarray.scalar": _scalar,
    # numpy 2
    "numpy._core.multiarray._reconstruct": _reconstruct,
    "numpy._core.multiarray.scalar": _scalar,
    "PIL.Image.Image": Picture,
    "PIL.PngImagePlugin.PngImageFile": Picture,
}
"""Name in a pickle -> what is called in its place."""
STORAGES = (
    "Float",
    "Double",
    "Half",
    "BFloat16",
    "Long",
    "Int",
    "Short",
    "Char",
    "Byte",
    "Bool",
    "ComplexFloat",
    "ComplexDouble",
)
NAMES = frozenset(
    [
        # Plain values, under the module's name in Python 2, too, which torch.save writes.
        "collections.OrderedDict",
        "collections.Counter",
        "builtins.set",
        "__builtin__.set",
        "builtins.complex",
        "__builtin__.complex",
        "_codecs.encode",
        # What a tensor is, and where.
        "torch.Size",
        "torch.device",
        "torch.serialization._get_layout",
        "torch.storage.TypedStorage",
        "torch.storage.UntypedStorage",
        # Tensors and parameters, with attributes of their own or without.
        "torch.Tensor",
        "torch.nn.parameter.Parameter",
        "torch._tensor._rebuild_from_type_v2",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
    ]
    + [f"torch.{kind}Storage" for kind in STORAGES]
    + [f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)]
    + list(STAND_INS)
)
"""All names that a pickle may use: those that torch's safe loader allows by itself, but for
STRICTER, and the stand-ins."""
STRICTER = {
    # One number in a pickle would fill any amount of memory.
    r"(builtins|__builtin__)\.bytearray": "bytes of any number",
    # Their parts must fit each other, and a stranger's file decides whether they do.
    r"torch\._utils\._rebuild_(sparse|nested)_tensor": "a sparse or nested tensor",
    r"torch\._utils\._rebuild_meta_tensor_no_storage": "a tensor without numbers",
    r"torch\._utils\._rebuild_qtensor": "quantised weights",
    r"torch\.(Q\w+Storage|per_(tensor|channel)_\w+)": "quantised weights",
    r"torch\._utils\._rebuild_(device_tensor\w*|wrapper_subclass)": "a tensor of another kind",
    # Constructors of before torch 1.6, which torch.save no longer writes.
    r"torch\.(cuda\.|sparse\.|cuda\.sparse\.)?\w+(Tensor|Storage)": "a tensor of old torch",
}
"""Names (regular expressions) that torch's safe loader allows and that are refused here -> what
they make. NAMES goes first."""


def load(path: Path) -> Any:
    """Read a file by `torch.save`.

    Returns:
        Plain values, tensors on the CPU, and the stand-ins above.

    Raises:
        UserError: the file is missing, is unreadable, or contains anything else.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")

    # Read once, so that the bytes that were checked are the bytes that are loaded.
    content = path.read_bytes()
    try:
        names = _names(path, content)
    except UserError:
        raise
    except Exception as error:  # whoever made the file chooses how it breaks
        raise UserError(
            f"{path}: not readable as a PyTorch file ({_first_line(error)}). Fetch it again, or"
            " save it again with torch.save"
        ) from error

    strange = sorted(names - NAMES)
    kinds = {name: stricter(name) for name in strange}
    if strange and all(kinds.values()):
        raise UserError(
            f"{path}: refused, nothing of it was run: it contains {kinds[strange[0]]}"
            f" ({strange[0]}), which no network here has. Save the state dict of an ordinary model"
            " (dense, not quantised, on the CPU)"
        )
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
        # torch's own message advises its unsafe loader: it is not shown.
        why = type(error).__name__ if "weights_only" in str(error) else _first_line(error)
        raise UserError(
            f"{path}: refused by the safe loader ({why}). Fetch it again, or save only a state dict"
            " in it"
        ) from error


KEYS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "module",
    "weights",
    "params",
    "state_dict_ema",
    "ema_state_dict",
    "model_ema",
    "ema",
    "params_ema",
)
"""Keys under which training scripts save a state dict, those of the model before those of its
moving average."""

DEEPEST = 4
"""Dicts that a state dict may lie in."""


def state_dict(found: Any, path: Path) -> dict[str, Tensor]:
    """Extract a state dict from what `load` returned.

    Args:
        found: a state dict, or a dict with one under a usual key.
        path: the file, for errors and for its size.

    Returns:
        Name -> dense tensor. Entries that are no tensors, such as an epoch, are left out.

    Raises:
        UserError: there is no state dict, or its tensors claim more bytes than the file has.
    """
    # Training scripts often save it beside other things, some of them twice over.
    for _ in range(DEEPEST):  # a stranger's dict may contain itself
        inner = _inner(found)
        found = found if inner is None else inner
    tensors = {
        # Attributes of a stranger's tensor, which could hide its methods, are left behind.
        name: Tensor.detach(value)
        for name, value in _entries(found)
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if not tensors:
        raise UserError(
            f"{path}: expected a state dict (names -> tensors), found {_kind(found)}. Save"
            " model.state_dict()"
        )

    # A stride of 0 would make a huge tensor out of one number.
    for name, tensor in tensors.items():
        if (
            tensor.layout != torch.strided
            or tensor.device.type != "cpu"
            or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size()
        ):
            raise UserError(
                f"{path}: refused: {name} claims shape {tuple(tensor.shape)}, more than the file"
                " holds of it"
            )
    # Tied weights are one storage under several names.
    storages = [tensor.untyped_storage() for tensor in tensors.values()]
    taken = {storage.data_ptr(): storage.nbytes() for storage in storages}
    if sum(taken.values()) > path.stat().st_size:
        raise UserError(f"{path}: refused: its tensors claim more bytes than the file has")
    return tensors


def copies(found: Any) -> list[str]:
    """Say in a sentence which of several state dicts `state_dict` takes from what `load` returned;
    nothing where there is one."""
    said = []
    for _ in range(DEEPEST):
        inner = _inner_keys(found)
        if len(inner) > 1:
            others = ", ".join(inner[1:])
            said.append(f"the file has several state dicts: {inner[0]} taken, {others} left out")
        if not inner:
            break
        found = dict(_entries(found))[inner[0]]
    return said


def _inner(found: Any) -> Any:
    """Return what a dict has under the first of `_inner_keys`, or None."""
    keys = _inner_keys(found)
    return dict(_entries(found))[keys[0]] if keys else None


def _inner_keys(found: Any) -> list[str]:
    """Return which of KEYS are dicts; none where the dict is a state dict itself."""
    entries = dict(_entries(found))
    if sum(isinstance(value, Tensor) for value in entries.values()) > len(entries) / 2:
        return []
    return [key for key in KEYS if isinstance(entries.get(key), Mapping)]


def _entries(found: Any) -> list[tuple[Any, Any]]:
    """Return the entries of a dict, and none of anything else."""
    # By the class: an attribute of a stranger's dict could hide its methods.
    return list(dict.items(found)) if isinstance(found, dict) else []


def stricter(name: str) -> str:
    """Return what a name makes that is refused although torch's safe loader allows it, or ""."""
    return next((what for pattern, what in STRICTER.items() if re.fullmatch(pattern, name)), "")


def dump(value: Any) -> bytes:
    """Return the bytes of `torch.save` for plain values, tensors and numpy arrays.

    Both numpy 1 and numpy 2 can read them.
    """
    stream = io.BytesIO()
    torch.save(
        value, stream, pickle_module=types.SimpleNamespace(__name__="pickle", Pickler=_OldNames)
    )
    return stream.getvalue()


_InPython: Any = pickle._Pickler
"""The pickler in Python: that in C has no save_global to override."""


class _OldNames(_InPython):
    """Pickler that writes numpy.core for numpy._core, which numpy 1 does not have."""

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
    """List every module.name in a file's pickle without running it.

    Args:
        path: the file, for errors.
        content: its bytes.

    Raises:
        UserError: it is not a plain archive by `torch.save`, or could unpack into more than its
            size.
    """
    stream = io.BytesIO(content)
    if not content.startswith(b"PK\x03\x04") or not zipfile.is_zipfile(stream):
        raise UserError(
            f"{path}: refused: not the zip archive that torch.save has written since torch 1.6."
            " Save only a state dict, best as safetensors"
        )

    with zipfile.ZipFile(stream) as archive:
        entries = archive.infolist()
        # A zip archive is found by its end, but torch looks at the beginning of the file, where
        # another archive could be.
        if min((entry.header_offset for entry in entries), default=0) != 0:
            raise UserError(
                f"{path}: refused: something stands before the archive, which torch.save does not"
                " write"
            )

        # A second pickle would be one that is not listed below.
        pickles = [
            entry for entry in entries if entry.filename.lower().split("/")[-1].endswith(".pkl")
        ]
        if len(pickles) != 1 or pickles[0].filename.split("/")[-1] != "data.pkl":
            raise UserError(
                f"{path}: refused: expected one data.pkl in it, found {len(pickles)} pickles"
                " (TorchScript?). Save a state dict instead"
            )

        # Compressed entries could unpack into any size; of repeated ones, torch may take the other.
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

        # The opcodes of the second kind name what they call in other ways: torch.save has no use
        # for them, and they are refused, whatever they name.
        found = set()
        for opcode, argument, _ in pickletools.genops(archive.read(pickles[0])):
            if opcode.name == "GLOBAL":
                found.add(str(argument).replace(" ", "."))
            elif opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
                found.add(f"the opcode {opcode.name}")
    return found


@contextlib.contextmanager
def _only(stand_ins: Mapping[str, Any]) -> Iterator[None]:
    """Allow exactly these names to torch's safe loader, in place of those that others allowed."""
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([(value, name) for name, value in stand_ins.items()])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(others)


def _kind(value: Any) -> str:
    """Return what a value is, in words for an error message."""
    if isinstance(value, Mapping):
        return f"a dict with {', '.join(map(repr, list(value)[:5])) or 'nothing in it'}"
    return type(value).__name__


def _first_line(error: BaseException) -> str:
    return (str(error).split("\n")[0] or type(error).__name__)[:200]
