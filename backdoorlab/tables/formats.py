"""A table of text as aligned text, Markdown, CSV or a LaTeX tabular."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Format = Literal["text", "markdown", "csv", "latex"]
HOLE = "-"

LATEX = {c: f"\\{c}" for c in "%_&#${}"} | {
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
}
LATEX |= {"±": r"$\pm$", "†": r"$^\dagger$"}

Row = Mapping[str, str]


@dataclass(frozen=True)
class Table:
    """Cells as text, and what a form needs to know of them."""

    columns: Sequence[str]
    rows: Sequence[Row]
    numbers: Sequence[str]
    """Columns that are aligned to the right."""
    block: Sequence[str]
    """Columns that are the same within a block of rows; a line is drawn between blocks."""
    notes: Sequence[str] = ()
    """Sentences below the table; CSV has no place for them."""

    def blocks(self) -> list[list[Row]]:
        found: list[list[Row]] = []
        for row in self.rows:
            if found and all(found[-1][-1][column] == row[column] for column in self.block):
                found[-1].append(row)
            else:
                found.append([row])
        return found


def render(table: Table, form: Format) -> str:
    """The table in one of the four forms, with a trailing newline. What cannot be printed becomes a
    space: a name may hold a line break."""
    rows = [{column: _printable(cell) for column, cell in row.items()} for row in table.rows]
    clean = replace(table, rows=rows, notes=[_printable(note) for note in table.notes])
    return {"text": text, "markdown": markdown, "csv": as_csv, "latex": latex}[form](clean) + "\n"


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)


def text(table: Table) -> str:
    """Aligned columns; numbers to the right; a line between blocks."""
    widths = [
        max(len(column), *(len(row[column]) for row in table.rows)) if table.rows else len(column)
        for column in table.columns
    ]

    def line(cells: Sequence[str]) -> str:
        padded = zip(table.columns, cells, widths, strict=True)
        return "  ".join(
            cell.rjust(width) if column in table.numbers else cell.ljust(width)
            for column, cell, width in padded
        ).rstrip()

    lines = [line(table.columns), "  ".join("-" * width for width in widths)]
    for number, block in enumerate(table.blocks()):
        lines += [""] * (number > 0) + [
            line([row[column] for column in table.columns]) for row in block
        ]
    return "\n".join([*lines, *([""] if table.notes else []), *table.notes])


def markdown(table: Table) -> str:
    """A GitHub table, its notes a list below it."""
    marks = ["---:" if column in table.numbers else "---" for column in table.columns]
    cells = [
        table.columns,
        marks,
        *([row[column].replace("|", r"\|") for column in table.columns] for row in table.rows),
    ]
    return "\n".join(
        ["| " + " | ".join(line) + " |" for line in cells]
        + [""] * bool(table.notes)
        + [f"- {note}" for note in table.notes]
    )


def as_csv(table: Table) -> str:
    """Comma-separated, a hole being an empty cell."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows(
        [
            ["" if row[column] == HOLE else row[column] for column in table.columns]
            for row in table.rows
        ]
    )
    return stream.getvalue().rstrip("\n")


def latex(table: Table) -> str:
    """A booktabs tabular, its notes comments below it."""

    def line(cells: Sequence[str]) -> str:
        return (
            " & ".join(
                "".join(LATEX.get(character, character) for character in cell) for cell in cells
            )
            + r" \\"
        )

    lines = [
        r"\begin{tabular}{"
        + "".join("r" if column in table.numbers else "l" for column in table.columns)
        + "}",
        r"\toprule",
        line(table.columns),
    ]
    for block in table.blocks() or [[]]:
        lines += [r"\midrule", *(line([row[column] for column in table.columns]) for row in block)]
    return "\n".join(
        [*lines, r"\bottomrule", r"\end{tabular}", *(f"% {note}" for note in table.notes)]
    )
