"""Stages: a folder appears as a whole or not at all, for commands too short to be resumed."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from . import folders, locks, writing


@contextlib.contextmanager
def staged(target: Path, done: str, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` if the block ends without an error.

    Args:
        target: the folder to write.
        done: name of the file in it that says it is finished, such as record.json.
        overwrite: replace a finished target.

    Raises:
        UserError: `target` exists and may not be replaced, another process writes it, or the disk
            refuses.
    """
    # Before anything is made, and again under the lock.
    refuse_existing(target, done, overwrite)
    stage = target.with_name(f"{target.name}.partial")
    try:
        with _filled(stage, target, done, overwrite) as final:
            yield final
    except OSError as error:
        raise UserError(
            f"{target} was not written ({error}): see that there is space, and that you may read"
            " and write there"
        ) from error


def refuse_foreign(stage: Path, marker: str, other: str = "name") -> None:
    """Raise a UserError if a stage was made by somebody else, so that nothing in it is deleted.

    Args:
        stage: a folder that exists.
        marker: name of the file that every stage of ours has.
        other: what the user may choose instead, for the message.
    """
    if any(stage.iterdir()) and not (stage / marker).exists():
        raise UserError(
            f"{stage} is in the way and not ours (no {marker} in it): move it, or choose another"
            f" {other}"
        )


@contextlib.contextmanager
def _filled(stage: Path, target: Path, done: str, overwrite: bool) -> Iterator[Path]:
    """Lock the stage, yield its folder `final`, rename that to `target`, and delete the stage."""
    with locks.locked(stage):
        refuse_existing(target, done, overwrite)
        entries = list(stage.iterdir())
        if any(entry.name.startswith(("checkpoint-", "cached-")) for entry in entries):
            raise UserError(
                f"{stage} holds an unfinished run: finish it, delete it, or choose another name"
            )
        refuse_foreign(stage, "run.json")

        try:
            # What is left is that of a killed command: it is not continued.
            for entry in entries:
                folders.remove(entry)
            writing.write_json(stage / "run.json", {"method": "staged", "config": {}})
            final = stage / "final"
            final.mkdir()
            yield final
            folders.put(final, target)
        finally:
            folders.remove(stage)


def refuse_existing(target: Path, done: str, overwrite: bool, other: str = "name") -> None:
    """Raise a UserError if `target` exists and may not be replaced.

    It may only with `overwrite`, and only if the file `done` in it shows that it is ours. `other`
    is what the user may choose instead, for the message.
    """
    # ".", "/": no stage can be made beside it and renamed to it.
    if target.name in ("", ".."):
        raise UserError(f"{target} is not a folder's own name: give its name, or another folder")

    folders.recover(target)
    if not target.exists():
        return
    if not (target / done).exists():
        raise UserError(
            f"{target} exists but holds no {done}, so it is not ours to replace: choose another"
            f" {other}"
        )
    if not overwrite:
        raise UserError(
            f"{target} exists and is finished: choose another {other}, or pass --overwrite True to"
            " replace it"
        )
