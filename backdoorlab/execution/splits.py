"""`--split` of an unlearner: a method's run, a file or an oracle becomes bool (N,).

The executor alone comes here. A method gets the mask (`view.split`), and nothing that leads to the
true poison.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from .. import record
from ..device import derived_generator
from ..errors import UserError, described, suggest
from ..record import Record
from ..storage import reading, schema

FILES = (".safetensors", ".npy", ".csv")
"""Endings of files that may be given as a split."""
ORACLE = re.compile(r"oracle(?::(?P<known>[^:+]*))?(?:\+(?P<mistaken>[^:+]*))?")
"""The true poison, or a share of it, or with clean images by mistake."""
LARGEST_FILE = 1 << 30
"""Bytes of a file of a split from which on it is refused unread."""


@dataclass(frozen=True)
class Given:
    """A split that an unlearner is to forget."""

    name: str
    """As --split says it; of a file its name, without folders."""
    flagged: Tensor
    """bool (N,), on the CPU."""
    oracle: bool
    """Whether it was made from the true poison, which no defender knows."""

    @property
    def sha256(self) -> str:
        return reading.tensor_hash({"flagged": self.flagged})

    def to_json(self) -> dict[str, Any]:
        """Return what result.json says of it."""
        return {"name": self.name, "sha256": self.sha256, "oracle": self.oracle}


def is_file(word: str) -> bool:
    """Whether --split names a file."""
    return word.endswith(FILES)


def resolve(word: str, found: Record, digest: str, seed: int) -> Given:
    """Turn --split into a mask of the training set.

    Args:
        word: what the user gave.
        found: the record that is defended.
        digest: SHA-256 of its record.json, by which a copied result of another record is told.
        seed: draws parts of the poison, and chooses the run of a method.

    Raises:
        UserError: it names nothing that there is, does not fit the training set, or is all of it.
    """
    size = found.info["dataset"]["train_size"]
    if not word:
        raise UserError(
            "--split is missing: expected METHOD, METHOD/RUN, a file, oracle or none."
            f" {_what_there_is(found)}"
        )

    # The four kinds of words.
    oracle = re.fullmatch(r"oracle([:+].*)?", word) is not None
    if word == "none":
        flagged = torch.zeros(size, dtype=torch.bool)
    elif oracle:
        flagged = _by_oracle(word, found, seed)
    elif is_file(word):
        flagged = _from_file(Path(word), size)
    else:
        flagged = _by_method(word, found, digest, seed)

    if flagged.all():
        raise UserError(
            f"--split {word}: flags all {size} training images, so none is left to learn from:"
            " choose another split"
        )
    return Given(Path(word).name if is_file(word) else word, flagged, oracle)


def _by_oracle(word: str, found: Record, seed: int) -> Tensor:
    """Return the true poison, part of it, or it with clean images by mistake. -> bool (N,)."""
    match = ORACLE.fullmatch(word)
    known = _share(match["known"], 1.0) if match else None
    mistaken = _share(match["mistaken"], 0.0) if match else None
    # Half of the clean images by mistake is a split; all of them is none.
    if known is None or mistaken is None or known == 0 or mistaken >= 1:
        raise UserError(
            f"--split {word}: expected oracle, oracle:SHARE of the poison in (0, 1], or"
            " oracle+SHARE of the clean images in [0, 1), such as oracle:0.1 or oracle+0.05"
        )
    if not found.known_poison:
        raise UserError(
            f"--split {word}: nobody knows which training images of record {found.name!r} are"
            " poisoned: give the split of a detector, or a file"
        )

    # Cover samples have a trigger and their true label: nothing of theirs is to be forgotten.
    poison = found.train_poison.mask(found.info["dataset"]["train_size"])
    if known == 1 and not mistaken:
        return poison
    drawn = derived_generator(seed, "oracle")
    flagged = torch.zeros_like(poison)
    for where, share in ((poison, known), (~poison, mistaken)):
        index = where.nonzero().squeeze(1)
        # At least one image of a share that is asked for.
        count = max(1, round(share * len(index))) if share else 0
        flagged[index[torch.randperm(len(index), generator=drawn)[:count]]] = True
    return flagged


def _share(text: str | None, default: float) -> float | None:
    """Read a share in [0, 1]; None where the text is no such number."""
    if text is None:
        return default
    try:
        share = float(text)
    except ValueError:
        return None
    return share if 0 <= share <= 1 else None


def _by_method(word: str, found: Record, digest: str, seed: int) -> Tensor:
    """Read what a method flagged on this record. -> bool (N,)."""
    method, _, run = word.partition("/")
    folder = found.folder / "defense" / method / (run or f"seed{seed}")
    plain = all(schema.WORD.fullmatch(part) for part in (method, run or "seed0"))
    if not plain or not (folder / "result.json").is_file():
        what = f"run {folder.name!r} of {method}" if plain else "such method or file"
        raise UserError(
            f"--split {word}: record {found.name!r} has no finished {what}: run that detector on it"
            f" first, or give one of those. {_what_there_is(found)}"
            f"{suggest(method, _with_split(found))}"
        )

    # A folder that was copied from another record is about other poison.
    result = record.read_result(folder)
    same_data = result.get("fingerprint") in (None, found.info["dataset"]["fingerprint"])
    if result.get("record") not in (None, digest) or not same_data:
        raise UserError(
            f"--split {word}: {folder} is a result on another record: run {method} on"
            f" {found.name!r}"
        )
    if "split.safetensors" not in result["files"]:
        raise UserError(f"--split {word}: {method} reports no split. {_what_there_is(found)}")
    size = found.info["dataset"]["train_size"]
    path = folder / "split.safetensors"
    tensors, _ = reading.read_tensors(path, entry=result["files"]["split.safetensors"])
    return _as_mask(tensors.get("flagged"), size, f"--split {word}")


def _with_split(found: Record) -> list[str]:
    """List the methods with a split on this record."""
    folders = record.result_folders(found.folder)
    return sorted({run.parent.name for run in folders if (run / "split.safetensors").is_file()})


def _what_there_is(found: Record) -> str:
    known = _with_split(found)
    return f"Methods with a split on {found.name}: {', '.join(known) or 'none yet'}."


# --- files


def _from_file(path: Path, size: int) -> Tensor:
    """Read a mask or positions from a file: bool (N,)."""
    if not path.is_file():
        raise UserError(f"--split {path}: no such file")
    # A result says the name, and one that could not be read back would be lost.
    if not schema.is_plain(path.name):
        raise UserError(f"--split {path}: expected a file name of at most 200 printable characters")
    if path.stat().st_size > LARGEST_FILE:
        raise UserError(f"--split {path}: larger than {LARGEST_FILE >> 30} GiB, so it is no split")
    try:
        value = _READERS[path.suffix](path)
    except (ValueError, TypeError, EOFError, OSError, safetensors.SafetensorError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"--split {path}: cannot be read ({first}): expected bools or positions of training"
            f" images in a {path.suffix} file"
        ) from error
    return _as_mask(value, size, f"--split {path}")


def _read_safetensors(path: Path) -> Tensor | None:
    tensors = safetensors.torch.load_file(path)
    # Ours have a suspicion beside; of others any single tensor will do.
    only = next(iter(tensors.values())) if len(tensors) == 1 else None
    return tensors.get("flagged", only)


def _read_npy(path: Path) -> Tensor:
    return torch.from_numpy(np.load(path, allow_pickle=False))


def _read_csv(path: Path) -> Tensor:
    """Read one number or True/False a line; a first line of words is a heading."""
    words = path.read_text(encoding="utf-8-sig").replace(",", "\n").split()
    bools = {"true": True, "false": False}
    if words and not words[0].lstrip("-").isdigit() and words[0].lower() not in bools:
        words = words[1:]
    if words and all(word.lower() in bools for word in words):
        return torch.tensor([bools[word.lower()] for word in words])
    return torch.tensor([int(word) for word in words], dtype=torch.int64)


_READERS = {".safetensors": _read_safetensors, ".npy": _read_npy, ".csv": _read_csv}


def _as_mask(value: Any, size: int, where: str) -> Tensor:
    """Turn bool (N,), or 0 and 1 (N,), or int positions into bool (N,); one line where it is
    neither."""
    wanted = f"expected bool ({size},), one for each training image, or their positions"
    if not isinstance(value, Tensor) or value.dim() != 1 or value.is_floating_point():
        raise UserError(f"{where}: {wanted}, got {described(value)}")
    if not len(value):
        raise UserError(f"{where}: empty: {wanted}; to forget nothing, give --split none")
    if value.dtype == torch.bool:
        if len(value) != size:
            raise UserError(f"{where}: {wanted}, got {described(value)}: it is of another data set")
        return value

    # Numbers 0 and 1 of the set's length are bools in a file without a type.
    value = value.long()
    if len(value) == size and set(value.unique().tolist()) <= {0, 1}:
        return value == 1
    low, high = int(value.min()), int(value.max())
    if low < 0 or high >= size:
        raise UserError(
            f"{where}: position {low if low < 0 else high} is outside the training set of"
            f" {size} images: it is of another data set"
        )
    if len(value.unique()) < len(value):
        raise UserError(f"{where}: a position is there twice: {wanted}, each once")
    return torch.zeros(size, dtype=torch.bool).index_fill_(0, value, True)
