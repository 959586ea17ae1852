"""A folder that is there as a whole or not at all, for commands that are too short to be
continued."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from . import folders, locks, writing


@contextlib.contextmanager
def staged(target: Path, done: str, overwrite: bool) -> Iterator[Path]:
    """An empty folder beside the target that takes its place when the block ends well, and is gone
    when it does not."""
    refuse_existing(target, done, overwrite)
    stage = target.with_name(f"{target.name}.partial")
    try:
        with _locked(stage, target, done, overwrite) as final:
            yield final
    except OSError as error:
        raise UserError(
            f"{target} was not written ({error}): see that there is space, and that you may read"
            " and write there"
        ) from error


def refuse_foreign(stage: Path, marker: str, other: str = "name") -> None:
    """Nothing is deleted from a stage that somebody else made: ours has the file `marker` in it.
    `other`: what the user may choose instead."""
    if folders.entries(stage) and not (stage / marker).exists():
        raise UserError(
            f"{stage} is in the way and not ours (no {marker} in it): move it, or choose another"
            f" {other}"
        )


@contextlib.contextmanager
def _locked(stage: Path, target: Path, done: str, overwrite: bool) -> Iterator[Path]:
    with locks.locked(stage):
        try:
            refuse_existing(target, done, overwrite)
            entries = folders.entries(stage)
            if any(entry.name.startswith(("checkpoint-", "cached-")) for entry in entries):
                raise UserError(
                    f"{stage} holds an unfinished run: finish it, delete it, or choose another name"
                )
            refuse_foreign(stage, "run.json")
        except UserError:
            if not folders.entries(stage):
                folders.remove(stage)
            raise
        try:
            for entry in entries:
                folders.remove(entry)
            writing.write_json(stage / "run.json", {"method": "staged", "config": {}})
            final = stage / "final"
            final.mkdir()
            yield final
            folders.put(final, target)
        finally:
            folders.remove(stage)


def refuse_existing(target: Path, done: str, overwrite: bool) -> None:
    """One line where something is in the target's place: what is not ours, or what is finished and
    not to be replaced."""
    # ".", "/": nothing can be made beside it and brought to its place
    if target.name in ("", ".."):
        raise UserError(f"{target} is not a folder's own name: give its name, or another folder")
    folders.recover(target)
    if not target.exists():
        return
    if not (target / done).exists():
        raise UserError(
            f"{target} exists but holds no {done}, so it is not ours to replace: choose another"
            " name"
        )
    if not overwrite:
        raise UserError(
            f"{target} exists and is finished: choose another name, or pass --overwrite True to"
            " replace it"
        )
