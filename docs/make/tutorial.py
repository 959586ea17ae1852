"""The tutorial: refresh the output that its page shows, and make its notebook.

    python docs/make/tutorial.py               # runs every command of the page: minutes
    python docs/make/tutorial.py --notebook    # the notebook alone, from the page as it is

A command is a line of a block of `bash`. What it printed stands between two comments below it, of
which the first says how many lines are shown. Nothing between two comments is typed by hand.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
PAGE = CHECKOUT / "docs" / "tutorial.md"
NOTEBOOK = CHECKOUT / "notebooks" / "tutorial.ipynb"
PICTURES = CHECKOUT / "docs" / "images"
COMMANDS = re.compile(r"^```bash\n(.*?)^```\n", re.M | re.S)
SHOWN = re.compile(
    r"^(<!-- output(?:: first (\d+), last (\d+))? -->\n).*?^(<!-- end -->\n)", re.M | re.S
)
MACHINE = re.compile(r"^(<!-- machine -->\n).*?^(<!-- end -->\n)", re.M | re.S)
PICTURE = re.compile(r"!\[[^\]]*\]\(images/(tutorial_\w+)\.png\)")
START = """import os
from pathlib import Path

if not Path("attack").is_dir():
    os.chdir("..")"""
"""First cell of the notebook: it runs in the checkout."""
MADE = {
    "tutorial_preview": "record/tutorial/preview.png",
    "tutorial_flagged": "record/tutorial/scan/flagged.png",
}
"""Picture of the page -> the file that a command of the tutorial leaves."""


def commands(text: str) -> list[str]:
    """Return the commands of the page, in order."""
    return [line for block in COMMANDS.findall(text) for line in block.splitlines()]


def environment(folder: Path) -> dict[str, str]:
    """Return the variables under which the commands run: one thread, records in that folder."""
    settings = {"OMP_NUM_THREADS": "1", "BACKDOORLAB_PRECISION": "fp32"}
    records = {"BACKDOORLAB_RECORDS": str(folder / "record"), "PYTHONPATH": str(CHECKOUT)}
    return os.environ | settings | records


def run(command: str, folder: Path) -> str:
    """Run a command as a user of the checkout types it, and return what it prints.

    Args:
        command: the line, which begins with `python`.
        folder: where it runs; `attack/` and `defense/` are those of the checkout.

    Raises:
        RuntimeError: if it fails, with its last lines.
    """
    words = shlex.split(command)
    assert words[0] == "python", command
    for name in ("attack", "defense"):
        if not (folder / name).exists():
            (folder / name).symlink_to(CHECKOUT / name)
    done = subprocess.run(
        [sys.executable, *words[1:]],
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{command}\n{done.stdout[-2000:]}")
    return done.stdout.replace(f"{folder}/", "")


def trimmed(output: str, first: int, last: int) -> str:
    """Keep the first and the last lines of an output; of the settings, the start."""
    lines = [line.rstrip() for line in output.splitlines()]
    if len(lines) > first + last + 1:
        lines = [*lines[:first], "...", *lines[len(lines) - last :]]
    return "".join(f"{line[:116] + ' ...' if len(line) > 120 else line}\n" for line in lines)


def refreshed(text: str, ran: Callable[[str], str]) -> str:
    """Return the page with new output below each command that shows some.

    Args:
        text: the page.
        ran: runs a command and returns what it prints.
    """
    parts, at = [], 0
    for block in COMMANDS.finditer(text):
        output = "".join(ran(line) for line in block[1].splitlines())
        shown = SHOWN.search(text, block.end())
        following = COMMANDS.search(text, block.end())
        if shown and not (following and following.start() < shown.start()):
            cut = trimmed(output, int(shown[2] or 10**6), int(shown[3] or 0))
            parts += [text[at : shown.start()], f"{shown[1]}\n```text\n{cut}```\n\n{shown[4]}"]
            at = shown.end()
    return "".join([*parts, text[at:]])


def machine(seconds: float) -> str:
    """Say on which machine the output was made, and how long it took."""
    import torch

    from backdoorlab.execution import environment as facts

    torch.set_num_threads(1)
    here = facts.machine(torch.device("cpu"))
    versions = here["versions"]
    return (
        f"The output on this page was made by `make tutorial` on {date.today():%-d %B %Y}, on one"
        f" thread ({here['name']}), in fp32, with Python"
        f" {versions['python']} and torch {versions['torch']}, at commit {here['commit']}. All"
        f" commands together took {seconds / 60:.0f} minutes.\n"
    )


def refresh() -> None:
    """Run the tutorial, and write the page and its pictures."""
    text = PAGE.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        text = refreshed(text, lambda command: shown_run(command, Path(folder)))
        said = machine(time.monotonic() - start)
        PICTURES.mkdir(exist_ok=True)
        for name in PICTURE.findall(text):
            shutil.copyfile(Path(folder) / MADE[name], PICTURES / f"{name}.png")
    PAGE.write_text(MACHINE.sub(rf"\g<1>\n{said}\n\g<2>", text), encoding="utf-8")


def shown_run(command: str, folder: Path) -> str:
    """Run a command and say so."""
    print(command, flush=True)
    return run(command, folder)


# The notebook.


def notebook(text: str) -> str:
    """Return the notebook of the page: its prose, and its commands as cells without output."""
    text = MACHINE.sub("", SHOWN.sub("", text))
    text = re.sub(r"\]\((?![a-z]+:|#)([^)\s]+)\)", r"](../docs/\1)", text)
    cells = [code(START)]
    for number, part in enumerate(re.split(COMMANDS, text)):
        part = part.strip()
        if number % 2:
            cells.append(code("\n".join(f"!{line}" for line in part.splitlines())))
        elif part:
            cells.append({"cell_type": "markdown", "metadata": {}, "source": lines(part)})

    # Numbers as ids: the same page gives the same bytes.
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {
        "cells": [dict(sorted(cell.items())) for cell in cells],
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def code(source: str) -> dict[str, Any]:
    """Return a cell of code."""
    cell: dict[str, Any] = {"cell_type": "code", "execution_count": None, "metadata": {}}
    return cell | {"outputs": [], "source": lines(source)}


def lines(text: str) -> list[str]:
    """Return a text as a notebook stores it, line by line."""
    return text.splitlines(keepends=True)


def main() -> None:
    """Refresh the page, unless only the notebook is wanted, and write the notebook."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--notebook", action="store_true", help="leave the page as it is")
    if not parser.parse_args().notebook:
        refresh()
    NOTEBOOK.parent.mkdir(exist_ok=True)
    NOTEBOOK.write_text(notebook(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
