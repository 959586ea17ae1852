"""Cache of decoded data sets: folders of arrays, found by content and checked at each load."""

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data import Dataset, Split, fingerprint, mapped
from ..errors import UserError
from ..storage.folders import publish, remove, sweep
from ..storage.locks import locked
from .decoding import Arrays
from .locations import cache_root

STAGE = re.compile(r".+-[0-9a-f]{16}\.[0-9]+\.partial")
"""Names of unfinished folders: data set, cache key, and the process that writes."""
ARRAY_NAMES = ("train_images", "train_labels", "test_images", "test_labels")


def cached() -> list[dict[str, Any]]:
    """List the cached data sets: name, fingerprint, class_names, train and test sizes, folder."""
    return [
        {**read_meta(meta), "folder": str(meta.parent)}
        for meta in sorted(cache_root().glob("*/meta.json"))
    ]


def _dataset(name: str, arrays: Arrays) -> Dataset:
    train = Split(torch.from_numpy(arrays[0]), torch.from_numpy(arrays[1]))
    test = Split(torch.from_numpy(arrays[2]), torch.from_numpy(arrays[3]))
    return Dataset(name, train, test, arrays[4], fingerprint(train, test, arrays[4]))


def write_cache(folder: Path, name: str, arrays: Arrays, notes: Sequence[str] = ()) -> None:
    """Write a data set into the cache.

    Args:
        folder: its place in the cache, which does not exist yet.
        name: name of the data set.
        arrays: what a reader returned.
        notes: what it did to images, for the user.
    """
    dataset = _dataset(name, arrays)
    stage = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    try:
        # Processes that were killed while writing leave their stages.
        if folder.parent.is_dir():
            sweep(folder.parent, _ours)

        # Locked, so that the sweep of another process leaves it alone.
        with locked(stage):
            try:
                final = stage / "final"
                final.mkdir()
                for array_name, array in zip(ARRAY_NAMES, arrays[:4], strict=True):
                    np.save(final / f"{array_name}.npy", array)

                # meta.json is written last: a folder without it is not used.
                counts = dict(train=len(dataset.train), test=len(dataset.test))
                meta = dict(
                    name=name,
                    fingerprint=dataset.fingerprint,
                    class_names=dataset.class_names,
                    notes=list(notes),
                    **counts,
                )
                (final / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
                _put(final, folder)
            finally:
                shutil.rmtree(stage, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"the data set cache {folder} cannot be written ({error}): set BACKDOORLAB_CACHE to a"
            " folder with space"
        ) from error


def _put(final: Path, folder: Path) -> None:
    """Rename a finished folder to its name in the cache, in place of an incomplete one."""
    try:
        publish(final, folder)
    except OSError:
        # Another process was faster: it wrote the same content.
        if (folder / "meta.json").exists():
            return
        remove(folder)
        publish(final, folder)


def _ours(stage: Path) -> bool:
    """Return whether `write_cache` made an unfinished folder.

    The cache may be a folder that other programs use, too.
    """
    return STAGE.fullmatch(stage.name) is not None and {
        entry.name for entry in stage.iterdir()
    } <= {"final"}


def read_cache(folder: Path, name: str) -> Dataset:
    """Load a data set from its folder in the cache.

    Images are memory-mapped, so that they take memory only where they are used.

    Raises:
        UserError: the content does not match its fingerprint.
    """
    meta = read_meta(folder / "meta.json")
    try:
        files = [folder / f"{array_name}.npy" for array_name in ARRAY_NAMES]
        # Labels are small, and are loaded whole.
        labels = [torch.from_numpy(np.load(file)) for file in files[1::2]]
        train, test = (
            Split(mapped(file), rows, file) for file, rows in zip(files[::2], labels, strict=True)
        )

        # The fingerprint covers every pixel, label and class name.
        class_names = tuple(meta["class_names"])
        notes = tuple(map(str, meta.get("notes", ())))
        intact = fingerprint(train, test, class_names) == meta["fingerprint"]
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise UserError(
            f"the cached data set {folder} is damaged: delete that folder and run again"
        )
    return Dataset(name, train, test, class_names, meta["fingerprint"], notes)


def read_meta(file: Path) -> dict[str, Any]:
    """Read a meta.json; {} where it is missing or damaged."""
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return meta if isinstance(meta, dict) else {}
