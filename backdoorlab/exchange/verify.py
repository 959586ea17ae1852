"""Hash a record and all its defenses' results again, and say which files are not what they were."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ..errors import UserError
from ..record import Record, read_result, result_folders
from ..storage import reading
from ..storage.reading import Shapes
from ..storage.schema import refuse_difference


@dataclass(frozen=True)
class Finding:
    """What was looked at, and one line for each thing that is wrong."""

    files: int
    results: int
    wrong: tuple[str, ...]


def verify(name: str, root: Path) -> Finding:
    """Everything in a record that can be loaded is loaded as a run would, and every file of a
    manifest hashed."""
    try:
        return verify_record(Record.load(name, root))
    except (UserError, FileNotFoundError) as error:
        return Finding(0, 0, (str(error),))


def verify_record(record: Record) -> Finding:
    """The same for a record that is loaded, and so verified but for its weights and results."""
    count, wrong = 1 + len(record.info["files"]), []
    shapes = record.model_shapes()
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
    """Number of files, all of them sound."""
    if not (folder / "result.json").is_file():
        raise UserError(
            f"{folder / 'result.json'}: missing, so the run beside it counts as not done. Restore"
            " it, or run the defense again"
        )
    manifest = read_result(folder)["files"]
    checks: dict[str, reading.Check] = {
        "model.safetensors": partial(refuse_difference, wanted=model),
        "split.safetensors": partial(_refuse_other_split, train_size=train_size),
    }
    for name, entry in manifest.items():
        reading.check_file(folder, name, entry)
        if name in checks:
            reading.read_tensors(folder / name, entry=entry, check=checks[name])
    return 1 + len(manifest)


def _refuse_other_split(found: Shapes, train_size: int) -> None:
    """A split says who is flagged and, where the defense ranks its samples, by what."""
    wanted: Shapes = {"flagged": (torch.bool, (train_size,))}
    if "suspicion" in found:
        wanted["suspicion"] = (torch.float32, (train_size,))
    refuse_difference(found, wanted)
