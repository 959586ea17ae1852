"""Stages: a folder appears as a whole or not at all."""

from pathlib import Path

import pytest

from backdoorlab.errors import UserError
from backdoorlab.storage import locks
from backdoorlab.storage.staging import staged

DONE = "done.json"


def write(
    target: Path, text: str, *, overwrite: bool = False, error: BaseException | None = None
) -> None:
    with staged(target, DONE, overwrite) as final:
        (final / "part").write_text(text)
        if error is not None:
            raise error
        (final / DONE).write_text(text)


def content(target: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in target.iterdir()}


def test_a_finished_folder_takes_its_place(tmp_path: Path) -> None:
    target = tmp_path / "new" / "x"
    write(target, "first")
    assert content(target) == {"part": "first", DONE: "first"} and [
        p.name for p in target.parent.iterdir()
    ] == ["x"]
    with pytest.raises(
        UserError, match=r"x exists and is finished: choose another name, or pass --overwrite True"
    ):
        write(target, "second")
    assert content(target)["part"] == "first"
    write(target, "second", overwrite=True)
    assert content(target) == {"part": "second", DONE: "second"} and [
        p.name for p in target.parent.iterdir()
    ] == ["x"]


@pytest.mark.parametrize(
    "error", [UserError("bad input"), KeyboardInterrupt(), OSError(28, "No space left on device")]
)
@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_leaves_what_was_there(
    tmp_path: Path, error: BaseException, existing: bool
) -> None:
    target = tmp_path / "x"
    if existing:
        write(target, "old")
    expected = UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected, match="No space left" if isinstance(error, OSError) else None):
        write(target, "new", overwrite=True, error=error)
    assert [path.name for path in tmp_path.iterdir()] == (["x"] if existing else [])
    assert not existing or content(target) == {"part": "old", DONE: "old"}


def test_what_a_killed_command_left_is_swept(tmp_path: Path) -> None:
    stage = tmp_path / "x.partial"
    (stage / "final").mkdir(parents=True)
    (stage / "final" / "part").write_text("half")
    (stage / "run.json").write_text("{}")
    write(tmp_path / "x", "whole")
    assert content(tmp_path / "x") == {"part": "whole", DONE: "whole"} and not stage.exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("holiday.png", "not ours"),
        ("checkpoint-train.safetensors", "unfinished run"),
        ("cached-split.safetensors", "unfinished run"),
    ],
)
def test_a_folder_of_others_is_left_alone(tmp_path: Path, name: str, message: str) -> None:
    stage = tmp_path / "x.partial"
    stage.mkdir()
    (stage / name).write_text("precious")
    if message == "unfinished run":
        (stage / "run.json").write_text("{}")
    with pytest.raises(UserError, match=message):
        write(tmp_path / "x", "whole", overwrite=True)
    assert (stage / name).read_text() == "precious" and not (tmp_path / "x").exists()


def test_a_target_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(UserError, match=r"holds no done.json, so it is not ours to replace"):
        write(tmp_path / "x", "whole", overwrite=True)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError):
        write(tmp_path / "file", "whole", overwrite=True)
    assert (tmp_path / "file").read_text() == "precious"


def test_a_second_writer_is_told(tmp_path: Path) -> None:
    with (
        locks.locked(tmp_path / "x.partial"),
        pytest.raises(UserError, match=r"is being written by process \d+ on"),
    ):
        write(tmp_path / "x", "whole")
    write(tmp_path / "x", "whole")
    assert content(tmp_path / "x")["part"] == "whole"
