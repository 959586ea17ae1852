"""A table as aligned text, Markdown, CSV or a LaTeX tabular.

A cell carries its text, which is printed, and its value, by which readers such as the HTML page
sort and colour. Nothing has to read a number back out of a text.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Format = Literal["text", "markdown", "csv", "latex"]


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str
    """What is printed."""
    value: float | None = None
    """The number before it is rounded; None for words and for what does not exist."""


EMPTY = Cell("-")
"""A score that does not exist, or one of a defense that was not run."""

LATEX = {c: f"\\{c}" for c in "%_&#${}"} | {
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
}
LATEX |= {"±": r"$\pm$", "†": r"$^\dagger$"}
"""What LaTeX would not print as it is, and what to write instead."""

Row = Mapping[str, Cell]
"""Column -> cell."""


@dataclass(frozen=True)
class Table:
    """Rows of cells, and what a format needs to know of the columns."""

    columns: Sequence[str]
    rows: Sequence[Row]
    numbers: Sequence[str]
    """Columns that are aligned to the right."""
    block: Sequence[str]
    """Columns whose text is the same within a block of rows; a line is drawn between blocks."""
    notes: Sequence[str] = ()
    """Sentences below the table; CSV has no place for them."""

    def blocks(self) -> list[list[Row]]:
        """Split the rows where the text of a `block` column changes."""
        found: list[list[Row]] = []
        for row in self.rows:
            if found and all(found[-1][-1][name].text == row[name].text for name in self.block):
                found[-1].append(row)
            else:
                found.append([row])
        return found

    def texts(self, row: Row) -> list[str]:
        """List the texts of a row in the order of the columns."""
        return [row[column].text for column in self.columns]


def render(table: Table, form: Format) -> str:
    """Write a table in one of the four formats, with a newline at the end."""
    # A name may contain a line break, which would end its row.
    rows = [
        {column: replace(cell, text=_printable(cell.text)) for column, cell in row.items()}
        for row in table.rows
    ]
    clean = replace(table, rows=rows, notes=[_printable(note) for note in table.notes])
    return {"text": text, "markdown": markdown, "csv": as_csv, "latex": latex}[form](clean) + "\n"


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)


def text(table: Table) -> str:
    """Write aligned columns, numbers to the right, with an empty line between blocks."""
    rows = [table.texts(row) for row in table.rows]
    widths = [max(map(len, column)) for column in zip(table.columns, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        # Nobody sees spaces at the end of a line but in a diff.
        padded = zip(table.columns, cells, widths, strict=True)
        return "  ".join(
            cell.rjust(width) if column in table.numbers else cell.ljust(width)
            for column, cell, width in padded
        ).rstrip()

    lines = [line(table.columns), "  ".join("-" * width for width in widths)]
    for number, block in enumerate(table.blocks()):
        # The first block stands right below the heading.
        lines += [""] * (number > 0)
        lines += [line(table.texts(row)) for row in block]

    return "\n".join([*lines, *([""] if table.notes else []), *table.notes])


def markdown(table: Table) -> str:
    """Write a GitHub table with its notes as a list below it."""
    marks = ["---:" if column in table.numbers else "---" for column in table.columns]
    # A bar would end the cell.
    rows = [[cell.replace("|", r"\|") for cell in table.texts(row)] for row in table.rows]
    lines = ["| " + " | ".join(line) + " |" for line in (table.columns, marks, *rows)]
    return "\n".join(lines + [""] * bool(table.notes) + [f"- {note}" for note in table.notes])


def as_csv(table: Table) -> str:
    """Write comma-separated values; what does not exist is left out between its commas."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(table.columns)
    for row in table.rows:
        cells = [row[column] for column in table.columns]
        writer.writerow(["" if cell == EMPTY else cell.text for cell in cells])
    return stream.getvalue().rstrip("\n")


def latex(table: Table) -> str:
    """Write a booktabs tabular with its notes as comments below it."""

    def line(cells: Sequence[str]) -> str:
        escaped = ("".join(LATEX.get(letter, letter) for letter in cell) for cell in cells)
        return " & ".join(escaped) + r" \\"

    # Numbers are aligned to the right here, too.
    alignment = "".join("r" if column in table.numbers else "l" for column in table.columns)
    lines = [rf"\begin{{tabular}}{{{alignment}}}", r"\toprule", line(table.columns)]

    # A table without rows keeps the rule below its heading.
    for block in table.blocks() or [[]]:
        lines += [r"\midrule", *(line(table.texts(row)) for row in block)]

    lines += [r"\bottomrule", r"\end{tabular}"]
    return "\n".join([*lines, *(f"% {note}" for note in table.notes)])
