"""F12: forty things that users get wrong beyond a flag's spelling (those are in test_scripts.py):
exit code 2 and one line, always."""

import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import helpers
import pytest

from backdoorlab.__main__ import main
from backdoorlab.record import Record
from backdoorlab.storage import reading


@dataclass(frozen=True)
class Here:
    """Where a mistake is made: the record `small` in `root`, and sound images in `data`."""

    root: Path
    data: Path

    @property
    def record(self) -> Path:
        return self.root / "small"

    def image(self) -> Path:
        return self.data / "train" / "0" / "0.png"


Make = Callable[[Here], object]
ATTACK = (
    "attack",
    "badnet",
    "--save_folder_name",
    "x",
    "--model",
    "preactresnet10",
    "--width",
    "2",
    "--epochs",
    "1",
    "--batch_size",
    "16",
)
DATA = (*ATTACK, "--dataset", "mine", "--patch_size", "2", "--dataset_path", "{data}")
FT = ("defense", "ft", "--result_file", "small", "--epochs", "1", "--trusted_ratio", "0.3")


def _write(name: str, content: bytes | str) -> Make:
    return lambda here: (here.root / name).write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )


def _no_data(here: Here) -> None:
    shutil.rmtree(here.data)
    here.data.mkdir()


def _no_test_images(here: Here) -> None:
    for image in (here.data / "test").rglob("*.png"):
        image.unlink()


def _grey_and_colour(here: Here) -> None:
    from PIL import Image

    Image.new("RGB", (8, 8)).save(here.image())


def _two_sizes(here: Here) -> None:
    from PIL import Image

    Image.new("L", (9, 8)).save(here.image())


def _shard(here: Here) -> None:
    shutil.rmtree(here.data / "train")
    (here.data / "train-0.parquet").write_bytes(b"PAR1 and no more")
    (here.data / "test-0.parquet").write_bytes(b"PAR1 and no more")


MISTAKES: dict[str, tuple[Make | None, tuple[str, ...], str]] = {
    "records in a file": (
        _write("file", "x"),
        (*ATTACK, "--record_root", "{root}/file/deeper"),
        "{root}/file",
    ),
    "a name of 300 letters": (
        None,
        (*ATTACK[:2], "--save_folder_name", "x" * 300, *ATTACK[4:]),
        "File name too long",
    ),
    "a name with a line break": (None, ("table", "a\nb"), "no record 'a\\nb'"),
    "a name with a terminal's command": (None, ("verify", "\x1b[2J"), "no record"),
    "a name with a slash": (None, ("verify", "a/b"), "a record name is one folder name"),
    "the record's folder for its name": (
        None,
        ("table", "record/small"),
        "a record name is one folder name",
    ),
    "a file for a folder of data": (
        _write("data.zip", "x"),
        (*DATA[:-1], "{root}/data.zip"),
        "no such folder",
    ),
    "data without a test set": (
        lambda h: shutil.rmtree(h.data / "test"),
        DATA,
        "expected test/ or val/ beside train/",
    ),
    "an empty folder of data": (_no_data, DATA, "found nothing"),
    "a class without images": (_no_test_images, DATA, "no images"),
    "an image that is none": (
        lambda h: h.image().write_bytes(b"text"),
        DATA,
        "0.png: not a readable image",
    ),
    "an image cut short": (
        lambda h: h.image().write_bytes(h.image().read_bytes()[:60]),
        DATA,
        "0.png: not a readable image",
    ),
    "grey and coloured images": (_grey_and_colour, DATA, "images of different shapes"),
    "images of two sizes": (_two_sizes, DATA, "--image_size N"),
    "a shard that is none": (_shard, DATA, "not a readable parquet file"),
    "a trigger larger than the image": (
        None,
        (*DATA, "--patch_size", "9"),
        "patch_size must lie in 1..8",
    ),
    "a target beyond the classes": (
        None,
        (*DATA, "--target_label", "3"),
        "target_label must lie in 0..2",
    ),
    "two means for one channel": (
        None,
        (*DATA, "--mean", "0.5", "0.5", "--std", "0.5", "0.5"),
        "--mean and --std need 1 numbers each",
    ),
    "a mean of bytes and not of shares": (
        None,
        (*DATA, "--mean", "125.3", "--std", "0.5"),
        "mean must be in [0, 1], got 125.3",
    ),
    "a mean beyond what a record may hold": (
        None,
        (*DATA, "--mean", "1e20", "--std", "0.5"),
        "mean must be in [0, 1], got 1e+20",
    ),
    "a deviation that divides by nothing": (
        None,
        (*DATA, "--mean", "0.5", "--std", "0"),
        "std must be in (0, 1], got 0",
    ),
    "images larger than a record may hold": (
        None,
        (*DATA, "--image_size", "8193"),
        "image_size must be in [1, 8192], got 8193",
    ),
    "a data set by its name on the hub": (
        None,
        (*DATA, "--dataset", "ylecun/mnist"),
        "--dataset 'ylecun/mnist': expected a name",
    ),
    "a device of another maker": (
        None,
        (*DATA, "--device", "mps"),
        "--device mps: expected auto, cpu, cuda or cuda:N",
    ),
    "a rate that is text": (None, (*DATA, "--lr", "fast"), "lr"),
    "a flag without its value": (None, (*DATA, "--epochs"), "epochs"),
    "a learning rate that explodes": (
        None,
        (*DATA, "--lr", "1e30", "--score_every", "0"),
        "the run diverged and is stopped",
    ),
    "settings that are not YAML": (
        _write("s.yaml", "a: [1, 2"),
        (*DATA, "--yaml_path", "{root}/s.yaml"),
        "s.yaml: not readable as YAML",
    ),
    "settings that are a list": (
        _write("s.yaml", "- 1"),
        (*DATA, "--yaml_path", "{root}/s.yaml"),
        "expected lines of `key: value`",
    ),
    "settings that are a picture": (
        _write("s.yaml", b"\x89PNG\xff"),
        (*DATA, "--yaml_path", "{root}/s.yaml"),
        "s.yaml: not readable as YAML",
    ),
    "settings that are a folder": (None, (*DATA, "--yaml_path", "{data}"), "not readable as YAML"),
    "settings with a tag of Python": (
        _write("s.yaml", "!!python/name:os.system"),
        (*DATA, "--yaml_path", "{root}/s.yaml"),
        "not readable as YAML",
    ),
    "a value of the wrong kind in YAML": (
        _write("s.yaml", "lr: many"),
        (*DATA, "--yaml_path", "{root}/s.yaml"),
        "lr",
    ),
    "a record without weights": (
        lambda h: (h.record / "model.safetensors").unlink(),
        FT,
        "model.safetensors: missing",
    ),
    "an empty file of weights": (
        lambda h: (h.record / "model.safetensors").write_bytes(b""),
        FT,
        "model.safetensors: damaged file",
    ),
    "a record.json edited by hand": (
        lambda h: (h.record / "record.json").write_text(
            (h.record / "record.json").read_text().replace('"seed": 0', '"seed": 1')
        ),
        FT,
        "record.json: damaged file (its content does not match its own checksum)",
    ),
    "a record of a later version": (
        lambda h: helpers.edit_json(h.record / "record.json", schema=9),
        FT,
        "schema 9, but this version reads",
    ),
    "a result edited by hand": (
        lambda h: (h.record / "defense" / "dau" / "seed0" / "result.json").write_text("{}"),
        ("table", "small"),
        "result.json: damaged file",
    ),
    "a result cut short": (
        lambda h: (h.record / "defense" / "dau" / "seed0" / "split.safetensors").write_bytes(b"x"),
        ("verify", "small"),
        "split.safetensors: damaged file",
    ),
    "a defense for a record that is being made": (
        lambda h: h.record.rename(h.root / "small.partial"),
        FT,
        (
            "no record 'small' in {root} yet: small.partial is unfinished, so run its attack"
            " command again"
        ),
    ),
    "a table of a record that is being made": (
        lambda h: h.record.rename(h.root / "small.partial"),
        ("table", "small"),
        "small.partial is unfinished",
    ),
    "an unfinished record by its name": (
        None,
        ("defense", "ft", "--result_file", "small.partial"),
        "a record name is one folder name",
    ),
    "data that the cache lost": (
        lambda h: helpers.edit_json(
            h.record / "record.json",
            dataset={
                **reading.read_json(h.record / "record.json")["dataset"],
                "fingerprint": "1" * 64,
            },
        ),
        FT,
        "pass --dataset_path FOLDER",
    ),
    "other data than the record's": (
        lambda h: h.image().unlink(),
        (*FT, "--dataset_path", "{data}"),
        "was made on other data",
    ),
    "more trusted images than there are": (
        None,
        (*FT, "--trusted_count", "97"),
        "between 1 and 96 images, got 97",
    ),
    "a share that trusts nobody": (None, (*FT[:-1], "0.001"), "between 1 and 96 images, got 0"),
    "trusted images of other classes": (
        lambda h: (h.data / "train" / "0").rename(h.data / "train" / "zebra"),
        (*FT, "--trusted_path", "{data}/train"),
        "found zebra",
    ),
    "a test of what was never run": (
        None,
        ("defense", "dau", "--result_file", "small", "--run_name", "y", "--subtask", "test"),
        "no finished run",
    ),
    "the same defense again": (
        None,
        ("defense", "dau", "--result_file", "small"),
        "exists and is finished",
    ),
    "a folder of one's own in the way": (
        lambda h: (h.root / "x").mkdir(),
        DATA,
        "not ours to replace",
    ),
    "a method by its path": (
        None,
        ("defense", "defense/ft.py", "--result_file", "small"),
        "unknown defense 'defense/ft.py'",
    ),
    "a command of another tool": (None, ("train",), "unknown command 'train'"),
    "a push without the hub's name": (None, ("push", "small"), "push NAME --repo owner/name"),
    "a pull of an address": (
        None,
        ("pull", "https://x.org/a/b", "--save_folder_name", "y"),
        "a repository is owner/name",
    ),
}


def test_there_are_forty() -> None:
    assert len(MISTAKES) >= 40


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(
    mistake: str, small: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, argv, message = MISTAKES[mistake]
    here = Here(tmp_path / "record", tmp_path / "data")
    shutil.copytree(small.folder, here.record)
    source = small.folder.parent.parent / "small-data"
    shutil.copytree(source, here.data)
    if make is not None:
        make(here)
    filled = [
        word.replace("{root}", str(here.root)).replace("{data}", str(here.data)) for word in argv
    ]
    before = sorted(here.root.iterdir())
    assert main(filled) == 2
    out, err = capsys.readouterr()
    # Two spaces begin what only informs
    lines = [line for line in err.splitlines() if not line.startswith("  ")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in err, err
    assert message.replace("{root}", str(here.root)) in lines[0], lines[0]
    assert lines[0].isprintable() and "record written" not in out
    assert sorted(here.root.iterdir()) == before, "nothing is left of it"
    if filled[0] == "verify":  # goes on after a bad file, so there is no one traceback
        return
    assert main([*filled, "--debug", "True"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown, "and with --debug the traceback is there"
    assert shown.splitlines()[-1] == lines[0] or filled[-1] == "--epochs"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shut = tmp_path / "shut"
    shut.mkdir()
    shut.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert main([*ATTACK, "--record_root", str(shut)]) == 2
    assert "Permission denied" in capsys.readouterr().err


def test_a_full_disk_is_one_line(
    small: Record,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import errno

    helpers.copy(small, tmp_path / "record")
    real = os.fsync

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert main([*FT, "--run_name", "y"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("  ")]
    assert "No space left on device" in line
    monkeypatch.setattr(os, "fsync", real)
    assert main([*FT, "--run_name", "y"]) == 0
