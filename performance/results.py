"""Make every generated block and picture of the pages from the stores in docs/results/stored/.

    python performance/results.py [--check]

A block of a page stands between two comments, and the first one has the command that made it:

    <!-- made by: python -m backdoorlab table --record_root docs/results/stored/demo demo -->
    <!-- end -->

The command's output is put between them. It is one of

    python -m backdoorlab table ...              a table, in a fence unless its format is markdown
    python -m backdoorlab matrix ...             likewise
    python performance/results.py about STORE    what measured a store: command, hardware, versions
    python performance/results.py heat_map FILE STORE ...    a picture of attacks x defenses
    python performance/printed.py FILE ...       a table of what a benchmark printed
    python performance/cost.py ...               what methods or grids cost

Nothing is trained or scored. --check writes nothing, and fails where a page is not what its
commands give.
"""

import argparse
import contextlib
import io
import os
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from backdoorlab import __main__ as commands
from backdoorlab.errors import UserError
from backdoorlab.record import every_name, read_result
from backdoorlab.report import heat_map
from backdoorlab.storage import writing
from backdoorlab.tables import board, rows, stored

CHECKOUT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^<!-- made by: (?P<command>.+?) -->\n(?P<made>.*?)^<!-- end -->$", re.M | re.S)
PAGES = ("README*.md", "docs/**/*.md")
TABLES = ("table", "matrix")
"""Commands of backdoorlab that a block may have: those that read a store."""
SCRIPTS = ("performance/printed.py", "performance/cost.py")
"""Scripts that a block may have."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a difference")
    options = parser.parse_args(argv)

    made = results(CHECKOUT)
    different = [path for path, content in made.items() if _old(path) != content]
    for path in different:
        print(f"{'differs' if options.check else 'made'}: {path.relative_to(CHECKOUT)}")
        if not options.check:
            writing.write_bytes(path, made[path])
    print(f"{len(made)} files with results, {len(different)} of them changed")
    return int(options.check and bool(different))


def results(root: Path) -> dict[Path, bytes]:
    """Make every page with a block, and every picture in one: path -> content.

    Args:
        root: a checkout, in which the commands are run.
    """
    found: dict[Path, bytes] = {}
    for path in pages(root):
        text, pictures = page(path.read_text(encoding="utf-8"), path, root)
        found |= {path: text.encode(), **pictures}
    return found


def pages(root: Path) -> list[Path]:
    """List the pages that have a block."""
    every = (path for pattern in PAGES for path in sorted(root.glob(pattern)))
    return [path for path in every if BLOCK.search(path.read_text(encoding="utf-8"))]


def page(text: str, path: Path, root: Path) -> tuple[str, dict[Path, bytes]]:
    """Make the blocks of a page anew.

    Args:
        text: the page.
        path: its file, from which links to pictures lead.
        root: the checkout.

    Returns:
        The page with its new blocks, and the pictures that they show.
    """
    pictures: dict[Path, bytes] = {}

    def new(found: re.Match[str]) -> str:
        made, drawn = block(found["command"], path, root)
        pictures.update(drawn)
        return f"<!-- made by: {found['command']} -->\n{made}<!-- end -->"

    return BLOCK.sub(new, text), pictures


def block(command: str, path: Path, root: Path) -> tuple[str, dict[Path, bytes]]:
    """Run the command of a block and return its Markdown, and its pictures."""
    words = shlex.split(command)
    with contextlib.chdir(root):
        match words:
            case ["python", "-m", "backdoorlab", name, *_] if name in TABLES:
                made = _printed(lambda: commands.main(words[3:]), command)
                return (f"\n{made}\n" if "markdown" in words else f"```\n{made}```\n"), {}
            case ["python", script, *_] if script in SCRIPTS:
                made = _printed(lambda: _run(script, words[2:]), command)
                return f"\n{made.strip()}\n\n", {}
            case ["python", "performance/results.py", "about", store]:
                return about(Path(store)), {}
            case ["python", "performance/results.py", "heat_map", file, *stores] if stores:
                rows_of = (_rows(Path(store)) for store in stores)
                boards = heat_map.with_asr(
                    [one for found in rows_of for one in board.boards(found)]
                )
                picture = root / file
                link = os.path.relpath(picture, path.parent).replace(os.sep, "/")
                return f"![{_said(boards)}]({link})\n", {picture: heat_map.drawn(boards)}
    raise UserError(f"{path}: no block is made by {command!r}: see performance/results.py")


def _printed(work: Callable[[], int], command: str) -> str:
    """Return what a command prints."""
    printed, complaints = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaints):
        code = work()
    if code != 0:
        raise UserError(f"{command}: {complaints.getvalue().strip()}")
    return printed.getvalue()


def _run(script: str, argv: Sequence[str]) -> int:
    """Run a script of the checkout in this process, as `python SCRIPT ARGV` does."""
    before, sys.argv = sys.argv, [script, *argv]
    try:
        runpy.run_path(str(CHECKOUT / script), run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return int(bool(end.code))
    finally:
        sys.argv = before
    return 0


def _rows(store: Path) -> list[rows.Row]:
    return rows.rows(stored.readable(every_name(store), store))


def _said(boards: Iterable[board.Board]) -> str:
    """Describe the heat map for those who do not see it."""
    where = ", ".join(dict.fromkeys(one.dataset for one in boards))
    return f"ASR and depth on {where}: the tables of docs/results have the numbers"


# --- what measured a store


def about(store: Path) -> str:
    """List command, size, hardware, precision, versions, commits and hours of a store."""
    infos = _infos(store)
    models = len(infos)
    hours = sum(info["seconds"] for info in infos) / 3600
    command = stored.contents(store)["command"]
    facts = {
        "Command": ", then ".join(f"`{one}`" for one in command.split("; ")),
        "Measured": f"{models} models in {hours:.1f} hours, without evaluation",
        "Seeds": _every(_seeds(infos)),
        "Hardware": _every(info["device"] for info in infos),
        "Precision": _every(info["precision"] for info in infos),
        "Versions": _every(_versions(info) for info in infos),
        "Commit": _every(info["commit"] for info in infos),
    }
    return "\n" + "".join(f"- {name}: {said}.\n" for name, said in facts.items()) + "\n"


def _infos(store: Path) -> list[Mapping[str, Any]]:
    """Read record.json and every result.json of a store."""
    found: list[Mapping[str, Any]] = []
    for record in stored.readable(every_name(store), store):
        found += [record.info, *map(read_result, rows.result_folders(record.folder))]
    return found


def _seeds(infos: Iterable[Mapping[str, Any]]) -> list[str]:
    return [str(seed) for seed in sorted({info["seed"] for info in infos})]


def _versions(info: Mapping[str, Any]) -> str:
    versions = info["versions"]
    return ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "timm", "numpy"))


def _every(values: Iterable[object]) -> str:
    """Join different values, each with how often it is there where there are several."""
    counts: dict[str, int] = {}
    for value in map(str, values):
        counts[value] = counts.get(value, 0) + 1
    if len(counts) == 1:
        return next(iter(counts))
    return "; ".join(
        f"{value} ({count})" if sum(counts.values()) > len(counts) else value
        for value, count in counts.items()
    )


def _old(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
