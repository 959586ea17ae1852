"""Detectors against unlearners: which half of a decoupled defense does the work?

A row for each split of a record, the true poison first, and a column for each unlearner that forgot
it. A cell has clean accuracy / ASR / RA.
"""

import re
from collections.abc import Iterable, Sequence

from ..storage.schema import DETECTOR
from . import notes
from . import rows as measured
from .formats import EMPTY, Cell, Table
from .rows import ORACLE, UNDEFENDED, Measured, Row

QUALITY = {"TPR %": "tpr", "FPR %": "fpr", "AUROC %": "auroc"}
"""Columns of numbers on a split, and the field of a row that each shows."""


def table(records: Iterable[Measured]) -> Table:
    """Make the table of `python -m backdoorlab matrix`.

    Returns:
        For each record a row without a split, which is the attacked model, then a row for each
        split that a detector left or an unlearner forgot.
    """
    found = [measured.rows([record]) for record in records]
    unlearners = sorted({row.defense for rows in found for row in rows if row.split})
    left_out, lines = 0, []
    for rows in found:
        more, further = _of_record(rows, unlearners)
        lines += more
        left_out += further

    # What a reader has to know of the cells.
    said = ["Cells of unlearners: clean accuracy / ASR / RA in percent."] if unlearners else []
    if any(row.oracle for rows in found for row in rows):
        said.append(notes.ABOUT_ORACLE)
    if left_out:
        said.append(f"{left_out} further runs of the same pairs are not shown: see the table.")
    columns = ["record", "split", *QUALITY, *unlearners]
    return Table(columns, lines, numbers=list(QUALITY), block=["record"], notes=said)


def _of_record(rows: Sequence[Row], unlearners: Sequence[str]) -> tuple[list[dict[str, Cell]], int]:
    """Make the lines of one record, and count the runs that are not shown."""
    attacked = next(row for row in rows if row.defense == UNDEFENDED)
    splits = {row.split: row.oracle for row in rows if row.split}
    splits |= {row.defense: False for row in rows if row.kind == DETECTOR}
    lines, shown = [_line(attacked, "", [attacked], unlearners, [])], 0

    # The ceiling comes first, then its parts, then what detectors flag.
    for split in sorted(splits, key=lambda name: (not splits[name], name)):
        own = [row for row in rows if row.split == split]
        cells = [_usual([row for row in own if row.defense == name]) for name in unlearners]
        shown += sum(cell is not None for cell in cells)
        detected = [row for row in rows if row.called == split.replace("/", " ")]
        name = split + ORACLE * splits[split]
        lines.append(_line(attacked, name, [*detected, *own], unlearners, cells))
    return lines, sum(bool(row.split) for row in rows) - shown


def _usual(rows: Sequence[Row]) -> Row | None:
    """Choose the run that is shown: one that is called by its split alone, of the lowest seed."""

    def place(row: Row) -> tuple[bool, int, str]:
        usual = re.sub(r"[^A-Za-z0-9_.+\-]", "-", row.split)
        return row.variant != usual, row.defense_seed or 0, row.run

    return min(rows, key=place, default=None)


def _line(
    attacked: Row,
    split: str,
    quality: Sequence[Row],
    unlearners: Sequence[str],
    cells: Sequence[Row | None],
) -> dict[str, Cell]:
    """Write one line: the split, how right it is, and what each unlearner left.

    Args:
        attacked: the record's own row, whose scores are the cells where there is no split.
        split: its name; "" for the attacked model.
        quality: rows that may have the rates of the split, the best source first.
        unlearners: the columns.
        cells: the row of each unlearner, or None.
    """
    line = {"record": Cell(attacked.record), "split": Cell(split or "(no unlearning)")}
    for column, field in QUALITY.items():
        known = [value for row in quality if (value := getattr(row, field)) is not None]
        line[column] = Cell(f"{100 * known[0]:.2f}", known[0]) if known else EMPTY

    for name, row in zip(unlearners, cells or [attacked] * len(unlearners), strict=True):
        line[name] = EMPTY if row is None else Cell(_scores(row))
    return line


def _scores(row: Row) -> str:
    """Write "97.2 / 0.6 / 96.6", and the mark of a destroyed model."""
    numbers = (row.clean_accuracy, row.asr, row.robust_accuracy)
    shown = " / ".join("-" if number is None else f"{100 * number:.1f}" for number in numbers)
    return shown + " COLLAPSED" * row.collapsed
