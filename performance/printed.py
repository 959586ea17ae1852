"""What a benchmark printed into a file, as Markdown for a page.

    python performance/printed.py FILE [WORD ...]

With words, only rows that contain one of them are shown, and whole tables that it is the first
heading of.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

ROW = re.compile(
    r"(?P<what>.+?) +(?P<goal>-|[<>]= [\d.]+(?: %| s)?)"
    r" +(?P<measured>not applicable|\S+(?: %)? \(.+? to .+?\)) *(?P<detail>.*)"
)
"""A row of measure.report: names that are too long for their column run into the next one."""


HEADINGS = ("what", "exponents")
"""First headings of tables; other paragraphs are of the machine that they were measured on."""


def markdown(text: str, words: Sequence[str] = ()) -> str:
    """Write each table of the text below a line of what the file says of its machine.

    Args:
        text: paragraphs of "name value" lines, and of tables that begin with their headings.
        words: parts of the rows to show, or first headings of tables; empty for all rows.
    """
    shown, about = "", ""
    for lines in (paragraph.splitlines() for paragraph in text.strip().split("\n\n")):
        headings = re.split(r" {2,}", lines[0])
        if headings[0] not in HEADINGS:
            facts = (line.split(maxsplit=1) for line in lines)
            about = "; ".join(f"{name}: {value}" for name, value in facts) + ".\n\n"
            continue

        every = not words or headings[0] in words
        rows = [line for line in lines[1:] if every or any(word in line for word in words)]
        if rows:
            ruler = ["---" if name in (*HEADINGS, "detail") else "---:" for name in headings]
            table = [headings, ruler, *map(_cells, rows)]
            shown += about + "".join(f"| {' | '.join(line)} |\n" for line in table) + "\n"
            about = ""
    return shown


def _cells(line: str) -> list[str]:
    found = ROW.fullmatch(line.rstrip())
    cells = found.groups() if found else re.split(r" {2,}", line.strip())
    return [cell.replace("|", r"\|") for cell in cells]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("words", nargs="*")
    options = parser.parse_args()
    made = markdown(options.file.read_text(encoding="utf-8"), options.words)
    if not made:
        wanted = f" with {' or '.join(options.words)}" * bool(options.words)
        raise SystemExit(f"error: {options.file} has no row{wanted}")
    print(made, end="")
