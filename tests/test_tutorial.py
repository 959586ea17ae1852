"""The tutorial's commands run, and its notebook is what the page gives."""

import json
import os
import sys
from pathlib import Path
from types import ModuleType

import helpers
import pytest

PAGE = helpers.CHECKOUT / "docs" / "tutorial.md"
NOTEBOOK = helpers.CHECKOUT / "notebooks" / "tutorial.ipynb"
SHORT = {
    "attack/badnet.py": helpers.WORKING,
    "defense/ft.py": ("--epochs", "1"),
    "defense/fst.py": ("--epochs", "1"),
    "defense/dau.py": ("--head_epochs", "5", "--epochs", "1", "--score_every", "0"),
    "audit": ("--clean", "clean", "--defense", "ft"),
}
"""Script or command -> flags that make it short."""


@pytest.fixture(scope="module")
def tutorial() -> ModuleType:
    return helpers.script("docs/make/tutorial.py")


def test_the_notebook_is_that_of_the_page(tutorial: ModuleType) -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert NOTEBOOK.read_text(encoding="utf-8") == tutorial.notebook(text), "make tutorial"

    # A control: another command gives another notebook, and another output the same one.
    assert tutorial.notebook(text.replace("--save_folder_name", "--seed 1 --save_folder_name")) != (
        tutorial.notebook(text)
    )
    other = tutorial.refreshed(text, lambda command: "another output\n")
    assert other != text and tutorial.notebook(other) == tutorial.notebook(text)


def test_the_page_shows_output_and_pictures(tutorial: ModuleType) -> None:
    """Each block of commands has an output, and each picture is there."""
    text = PAGE.read_text(encoding="utf-8")
    blocks, shown = tutorial.COMMANDS.findall(text), tutorial.SHOWN.findall(text)
    assert len(blocks) == len(shown) >= 5
    assert text.count("```text\n") == len(shown)
    for name in tutorial.PICTURE.findall(text):
        assert (PAGE.parent / "images" / f"{name}.png").is_file()


def test_output_is_cut_in_the_middle(tutorial: ModuleType) -> None:
    output = "".join(f"{number}\n" for number in range(9))
    assert tutorial.trimmed(output, 2, 1) == "0\n1\n...\n8\n"
    assert tutorial.trimmed(output, 8, 1) == output
    assert len(tutorial.trimmed("x" * 500, 1, 1)) < 130


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_command_runs(tutorial: ModuleType, tmp_path: Path) -> None:
    """With settings that make them short, so that the scores say nothing."""
    clean = "python attack/none.py --save_folder_name clean " + " ".join(helpers.WORKING)
    tutorial.run(clean, tmp_path)
    for command in tutorial.commands(PAGE.read_text(encoding="utf-8")):
        words = command.split()
        script = words[3] if words[1] == "-m" else words[1]
        short = words[2:] if words[1] == "-m" else []
        key = short[1] if short else script
        tutorial.run(" ".join([command, *SHORT.get(key, ())]), tmp_path)
    assert (tmp_path / "record" / "tutorial" / "defense" / "ft" / "seed0" / "result.json").is_file()

    # A control: a command that fails is an error.
    with pytest.raises(RuntimeError, match="no_such_record"):
        tutorial.run("python defense/ft.py --result_file no_such_record", tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is: the attack works, and DAU removes it."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("BACKDOORLAB_RECORDS", str(tmp_path / "record"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    book = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(
        book, timeout=3600, resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    ).execute()

    folder = tmp_path / "record" / "tutorial"
    before = json.loads((folder / "record.json").read_text())["scores"]
    after = json.loads((folder / "defense" / "dau" / "seed0" / "result.json").read_text())["after"]
    assert before["asr"] > 0.9 and after["asr"] < 0.1
