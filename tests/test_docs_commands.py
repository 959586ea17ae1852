"""Every command of the documentation parses, and every flag that a page names exists.

Pages are read as text; the parsers are those that a user's command goes through. Nothing runs.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import helpers
import pytest

from backdoorlab.__main__ import COMMANDS
from backdoorlab.errors import UserError
from backdoorlab.exchange import doctor_weights
from backdoorlab.settings import methods
from backdoorlab.settings.parse import flag_names, parse_plain
from backdoorlab.settings.resources import Kind, home

DOCS = helpers.CHECKOUT / "docs"
ROOT_PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md")
PAGES = sorted([*(helpers.CHECKOUT / name for name in ROOT_PAGES), *DOCS.rglob("*.md")])
FENCED = re.compile(r"^```\w*\n(.*?)^```", re.M | re.S)
SCRIPT = re.compile(r"python (?:(attack|defense)/(\w+)\.py|-m backdoorlab (attack|defense) (\w+))")
COMMAND = re.compile(r"(?:python -m )?backdoorlab ([a-z]+)\b")
NUMBERS = {"N": "1", "RATE": "0.1"}
"""Placeholder of a number -> a value of its kind. Any other capitals are names."""
THEIR_COLUMN = "howto/backdoorbench.md"
"""The page whose tables have BackdoorBench's flags in their first column."""
LAB = "lab/"
"""Notes name flags of their time."""


def written(text: str) -> Iterator[str]:
    """Yield the commands that a page shows, without comments, brackets and line breaks."""
    blocks = [block.replace("\\\n", " ") for block in FENCED.findall(text)]
    spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", FENCED.sub("", text))
    for line in [*(line for block in blocks for line in block.splitlines()), *spans]:
        line = re.sub(r"\s+#.*$| \.\.\.| --help\b", "", line.strip().removeprefix("!"))
        line = re.sub(r"(\w+)(?:\|\w+)+", r"\1", line)  # of alternatives, the first
        if SCRIPT.match(line) or COMMAND.match(line):
            yield re.sub(r"[\[\]]", " ", line)


def parse(command: str) -> None:
    """Parse a command as its own parser does.

    Raises:
        UserError: if that refuses it.
    """
    words = [NUMBERS.get(word, word) for word in shlex.split(command)]
    if script := SCRIPT.match(command):
        kind: Kind = "attack" if "attack" in (script[1], script[3]) else "defense"
        name, rest = script[2] or script[4], words[2 if script[1] else 5 :]
        if name.isupper() or not (home(kind) / f"{name}.py").is_file():
            return
        parse_plain(methods.load(kind, name).config_class, rest, command)
    elif (found := COMMAND.match(command)) and found[1] in COMMANDS:
        rest = words[words.index(found[1]) + 1 :]
        options = COMMANDS[found[1]][0]
        if found[1] == "doctor" and doctor_weights.asked(rest):
            options = doctor_weights.Doctor
        parse_plain(options, rest, command)


def refused(text: str) -> Iterator[str]:
    """Yield the commands of a page that do not parse, with what their parser says."""
    for command in written(text):
        try:
            parse(command)
        except UserError as error:
            yield f"{command}: {error}"


@pytest.fixture(scope="module")
def flags() -> set[str]:
    """Every flag of a command, a method or a script of performance/, without its dashes."""
    classes = [options for options, _ in COMMANDS.values()] + [doctor_weights.Doctor]
    kinds: tuple[Kind, ...] = ("attack", "defense")
    for kind in kinds:
        classes += [methods.from_file(kind, p).config_class for p in home(kind).glob("[a-z]*.py")]
    known = {name for options in classes for name in flag_names(options)}
    for script in (helpers.CHECKOUT / "performance").glob("*.py"):
        known |= set(re.findall(r'"--([\w-]+)"', script.read_text(encoding="utf-8")))
    return known | {"help", "version"}


def unknown_flags(text: str, known: set[str]) -> set[str]:
    """Return the flags at the start of a code span that nothing here has."""
    prose = FENCED.sub("", text)
    return {flag for flag in re.findall(r"(?<!`)`--([a-zA-Z][\w-]*)", prose) if flag not in known}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(helpers.CHECKOUT)))
def test_commands_parse_and_flags_exist(page: Path, flags: set[str]) -> None:
    text = page.read_text(encoding="utf-8")
    where = page.relative_to(DOCS).as_posix() if page.is_relative_to(DOCS) else page.name
    if where == THEIR_COLUMN:
        text = re.sub(r"(?m)^\|[^|]*\|", "|", text)
    dead = list(refused(text))
    if not where.startswith(LAB):
        dead += [f"--{flag}" for flag in sorted(unknown_flags(text, flags))]
    assert not dead, "\n".join(dead)


def test_what_is_wrong_is_found_and_what_is_right_is_not(flags: set[str]) -> None:
    wrong = """Text with `python defense/ft.py --epoch 3` and `--guard_drops 2`, and
```
python attack/badnet.py --save_folder_name x \\
    --patch_sizes 3     # a comment
python -m backdoorlab table x --formats csv
python -m backdoorlab attack badnet --epochs many
```
"""
    assert len(list(refused(wrong))) == 4
    assert unknown_flags(wrong, flags) == {"guard_drops"}
    right = """`python defense/ft.py --result_file X [--trusted_count N]`, `--guard_drop 2`, and
```
python attack/badnet.py --save_folder_name x \\
    --patch_size 3      # --patch_sizes
python /tmp/mine/defense/mine.py --anything 1
python -m backdoorlab defense NAME --result_file x --anything 1
```
"""
    assert not list(refused(right))
    assert not unknown_flags(right, flags)
