"""Verification: hash a record and its results again, and name the files that have changed."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ..errors import UserError
from ..record import Record, read_result, result_folders
from ..storage import reading
from ..storage.reading import Shapes
from ..storage.schema import refuse_difference
from ..tables import audits


@dataclass(frozen=True)
class Finding:
    """What was checked, and what is wrong with it."""

    files: int
    """Number of files that were hashed."""
    results: int
    """Number of results of defenses."""
    wrong: tuple[str, ...]
    """One line for each problem."""


def verify(name: str, root: Path) -> Finding:
    """Load everything in the record `name` of the folder `root` as a run would, and hash every
    file of its manifests."""
    try:
        return verify_record(Record.load(name, root))
    except (UserError, FileNotFoundError) as error:
        return Finding(0, 0, (str(error),))


def verify_record(record: Record) -> Finding:
    """Verify a record that is loaded, of which only weights and results are still unverified."""
    # record.json is not in its own manifest.
    count, wrong = 1 + len(record.info["files"]), []
    shapes = record.model_shapes()

    # Without sound weights nothing in the record can be used: its results are not looked at.
    try:
        reading.read_tensors(
            record.folder / "model.safetensors", entry=record.info["files"]["model.safetensors"]
        )
    except (UserError, FileNotFoundError) as error:
        return Finding(0, 0, (str(error),))

    folders = list(result_folders(record.folder))
    for folder in folders:
        try:
            count += _verify_result(folder, shapes, record.info["dataset"]["train_size"])
        except (UserError, FileNotFoundError) as error:
            wrong.append(str(error))
    return Finding(count, len(folders), tuple(wrong))


def _verify_result(folder: Path, model: Shapes, train_size: int) -> int:
    """Verify one result of a defense.

    Args:
        folder: the result's folder.
        model: dtypes and shapes of the record's weights.
        train_size: N of the training set.

    Returns:
        The number of files in it.

    Raises:
        UserError: one of them is missing or damaged.
    """
    # A run is finished by its result.json: other files alone are what is left of one.
    if not (folder / "result.json").is_file():
        raise UserError(
            f"{folder / 'result.json'}: missing, so the run beside it counts as not done. Restore"
            " it, or run the defense again"
        )
    manifest = read_result(folder)["files"]
    # All other files of a result are hashed, but not parsed.
    checks: dict[str, reading.Check] = {
        "model.safetensors": partial(refuse_difference, wanted=model),
        "split.safetensors": partial(_refuse_other_split, train_size=train_size),
    }
    for name, entry in manifest.items():
        reading.check_file(folder, name, entry)
        if name in checks:
            reading.read_tensors(folder / name, entry=entry, check=checks[name])
    # An audit is sealed by itself, as it is written after the result.
    audited = (folder / audits.FILE).is_file()
    if audited:
        audits.read_file(folder / audits.FILE)
    return 1 + len(manifest) + audited


def _refuse_other_split(found: Shapes, train_size: int) -> None:
    """Raise a ValueError unless a split has a flag for each image, and a suspicion, or none."""
    wanted: Shapes = {"flagged": (torch.bool, (train_size,))}
    if "suspicion" in found:
        wanted["suspicion"] = (torch.float32, (train_size,))
    refuse_difference(found, wanted)
