"""Side by side: records and what each defense left of them, as text, Markdown, CSV or LaTeX."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Literal

from . import registry, results
from .record import ASSUMABLE, Record

Format = Literal["text", "markdown", "csv", "latex"]
HOLE = "-"
COLUMNS = ["record", "attack", "defense", "assumes", "clean acc %", "ASR %", "RA %", "DER %", "TPR %", "FPR %", "seconds"]
NUMBERS = COLUMNS[4:]

LATEX = {c: f"\\{c}" for c in "%_&#${}"} | {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"}

Row = dict[str, str]


def rows(records: Iterable[Record]) -> list[Row]:
    """One row for each record as it was attacked, then one for each known defense; a defense that was not run is a row of holes."""
    found = []
    for record in records:
        undefended, *defended = results.rows([record])
        found.append(_cells(undefended))
        for name in sorted({*registry.available("defense"), *(row.defense for row in defended)}):
            runs = [row for row in defended if row.defense == name]
            found += [_cells(row) for row in runs] or [_hole(undefended, name)]
    return found


def assumes(words: Sequence[str]) -> str:
    """What a defense needs, in the words of the table."""
    return " + ".join(ASSUMABLE[word].removeprefix("poisoned ") for word in words) or "nothing"


def render(found: list[Row], form: Format) -> str:
    """The rows in one of the four forms, with a trailing newline."""
    return {"text": text, "markdown": markdown, "csv": as_csv, "latex": latex}[form](found) + "\n"


def text(found: list[Row]) -> str:
    """Aligned columns; numbers to the right; a line between records."""
    widths = [max(len(column), *(len(row[column]) for row in found)) if found else len(column) for column in COLUMNS]
    lines = [_line(COLUMNS, widths), "  ".join("-" * width for width in widths)]
    for before, row in zip([None, *found], found, strict=False):
        if before is not None and before["record"] != row["record"]:
            lines.append("")
        lines.append(_line([row[column] for column in COLUMNS], widths))
    return "\n".join(lines)


def markdown(found: list[Row]) -> str:
    """A GitHub table."""
    marks = ["---:" if column in NUMBERS else "---" for column in COLUMNS]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (COLUMNS, marks, *([row[c] for c in COLUMNS] for row in found)))


def as_csv(found: list[Row]) -> str:
    """Comma-separated, a hole being an empty cell."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([["" if row[c] == HOLE else row[c] for c in COLUMNS] for row in found])
    return stream.getvalue().rstrip("\n")


def latex(found: list[Row]) -> str:
    """A booktabs tabular."""
    lines = [r"\begin{tabular}{" + "".join("r" if c in NUMBERS else "l" for c in COLUMNS) + "}", r"\toprule"]
    lines += [_latex_line(COLUMNS), r"\midrule"]
    for before, row in zip([None, *found], found, strict=False):
        if before is not None and before["record"] != row["record"]:
            lines.append(r"\midrule")
        lines.append(_latex_line([row[c] for c in COLUMNS]))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def _cells(row: results.Row) -> Row:
    defense = row.defense if row.run in ("", "seed0") else f"{row.defense} ({row.run})"
    return {
        "record": row.record,
        "attack": row.attack,
        "defense": defense + (" COLLAPSED" if row.collapsed else ""),
        "assumes": HOLE if row.defense == results.UNDEFENDED else assumes(row.assumes),
        "clean acc %": _percent(row.clean_accuracy),
        "ASR %": _percent(row.asr),
        "RA %": _percent(row.robust_accuracy),
        "DER %": _percent(row.der),
        "TPR %": _percent(row.tpr),
        "FPR %": _percent(row.fpr),
        "seconds": _whole(row.seconds),
    }


def _hole(undefended: results.Row, defense: str) -> Row:
    needs = assumes(registry.load("defense", defense).assumes)
    return dict.fromkeys(COLUMNS, HOLE) | {"record": undefended.record, "attack": undefended.attack, "defense": defense, "assumes": needs}


def _percent(value: float | None) -> str:
    return HOLE if value is None else f"{100 * value:.2f}"


def _whole(value: float | None) -> str:
    return HOLE if value is None else f"{value:.0f}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    aligned = (cell.rjust(width) if column in NUMBERS else cell.ljust(width) for column, cell, width in zip(COLUMNS, cells, widths, strict=True))
    return "  ".join(aligned).rstrip()


def _latex_line(cells: Sequence[str]) -> str:
    return " & ".join("".join(LATEX.get(character, character) for character in cell) for cell in cells) + r" \\"
