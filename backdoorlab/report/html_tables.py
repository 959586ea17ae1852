"""The two tables of the page as HTML: means over seeds, and every model."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from ..settings import methods
from ..storage.schema import DETECTOR
from ..tables import formats, layout
from ..tables import groups as grouping
from ..tables.groups import Group
from ..tables.rows import UNDEFENDED, Damaged, Row
from .artifacts import Cell, by_record

CONSTANT = ("data", "poison %")
"""Columns that are left out of the table of means if all rows have the same."""
OPTIONAL = ("split", "TPR %", "FPR %", "AUROC %", "TPR", "FPR", "AUROC")
"""Columns that are left out if no row has a number, as only some defenses have one."""
MEANS = (
    "attack",
    *CONSTANT,
    "defense",
    "split",
    "clean acc %",
    "ASR %",
    "RA %",
    "DER %",
    "n",
    "assumes",
    "TPR %",
    "FPR %",
    "AUROC %",
    "seconds",
    "reported",
)
"""Columns of the table of means; on a narrow screen the first ones are in sight."""


@dataclass(frozen=True)
class Column:
    """A heading, and what a line shows under it."""

    title: str
    shown: Callable[[Any], str]
    """Line -> HTML."""
    value: Callable[[Any], float | str | None]
    """Line -> what it is sorted by; lines with None are at the end."""
    number: bool = False
    hint: Callable[[Any], str] | None = None
    """Line -> what a cell says when pointed at. None repeats a word, which may be cut off."""


@dataclass(frozen=True)
class NotRun:
    """A line for a defense that was not run on a record, or whose result is damaged."""

    row: Row
    """The record's own, with the name of the defense and without numbers."""
    why: str
    """"not run" or "damaged"."""

    @property
    def name(self) -> str:
        """Name of the defense."""
        return self.row.defense


# --- means over seeds


def means_table(rows: Sequence[Row], table: formats.Table) -> str:
    """Write one line for each experiment.

    Args:
        rows: The measured models.
        table: `layout.means` of these rows, whose texts are shown and whose values sort.
    """
    # `layout.means` has a row for each of these, in the same order.
    groups = grouping.grouped(rows)
    lines = list(zip(groups, table.rows, strict=True))
    columns = [_mean(title, table) for title in MEANS if _has(table, title)]
    return _table(
        columns,
        [(line, filters(line[0].first)) for line in lines],
        lambda line: line[0].first.attack_key,
    )


def _mean(title: str, table: formats.Table) -> Column:
    """A column of the table of means. A line of it is a group with its row in the table."""

    def value(line: tuple[Group, formats.Row]) -> float | str | None:
        cell = line[1][title]
        return cell.value if title in table.numbers else cell.text

    def records(line: tuple[Group, formats.Row]) -> str:
        return ", ".join(dict.fromkeys(row.record for row in line[0].rows))

    return Column(
        title,
        shown=lambda line: _marked(_words(line[1][title].text)),
        value=value,
        number=title in table.numbers,
        hint=records if title == "n" else None,
    )


def _has(table: formats.Table, title: str) -> bool:
    """Ask whether the page shows a column of the table of means."""
    if title not in table.columns or title in constants(table):
        return False
    empty = all(line[title] == formats.EMPTY for line in table.rows)
    return not (title in OPTIONAL and empty)


def constants(table: formats.Table) -> dict[str, str]:
    """Collect what is the same in all lines, to be said once above the tables.

    Returns:
        Column of CONSTANT -> its only text, "" if no line has any. What differs is left out.
    """
    # The control without an attack has no poison rate, which is no other rate.
    found = {}
    for title in CONSTANT:
        texts = {line[title].text for line in table.rows if line[title] != formats.EMPTY}
        if len(texts) <= 1:
            found[title] = "".join(texts)
    return found


def _marked(text: str) -> str:
    """Make standard deviations small, and frame the word COLLAPSED."""
    spread = re.sub(r" (± [\d.]+( †)?)", r' <span class="sd">\1</span>', text)
    return re.sub(r" (COLLAPSED( \d+ of \d+)?)$", r'<span class="mark bad">\1</span>', spread)


# --- every model


def runs_table(cells: Sequence[Cell], damaged: Sequence[Damaged] = ()) -> str:
    """Write one line for each measured model.

    Below the lines of a record follows one for each damaged result, and one for each known defense
    that was not run on it.
    """
    lines: list[tuple[Any, dict[str, str]]] = []
    for own in by_record(cells).values():
        lines += [(cell, {**filters(cell.row), "cell": str(cell.number)}) for cell in own]

        # What has no numbers, and why.
        lost = [(one.defense, "damaged") for one in damaged if one.record == own[0].row.record]
        there = {cell.row.defense for cell in own} | {name for name, _ in lost}
        absent = [(name, "not run") for name in methods.with_role("defense") if name not in there]
        lines += [
            (_not_run(own[0], name, why), {**filters(own[0].row), "defense": name})
            for name, why in lost + absent
        ]

    return _table(_run_columns(cells), lines, lambda line: line.row.record)


def _run_columns(cells: Sequence[Cell]) -> list[Column]:
    """The columns of the table of models. A line of it is a Cell or a NotRun."""
    columns = [
        _word("record", lambda line: line.row.record),
        _word("attack", lambda line: line.row.attack),
        Column("defense", _defense, lambda line: line.name),
        _word("split", lambda line: line.row.split),
        _number("seed", lambda line: line.row.seed, "{:.0f}"),
        _percent("clean acc", lambda line: line.row.clean_accuracy),
        _percent("ASR", lambda line: line.row.asr),
        _percent("RA", lambda line: line.row.robust_accuracy),
        _percent("DER", lambda line: line.row.der),
        _percent("TPR", lambda line: line.row.tpr),
        _percent("FPR", lambda line: line.row.fpr),
        _percent("AUROC", lambda line: line.row.auroc),
        _number("seconds", lambda line: line.row.seconds, "{:,.0f}"),
        _number("GiB", lambda line: line.row.peak_memory_bytes, "{:.2f}", scale=2**-30),
        _number("forward", lambda line: line.row.forward, "{:,.0f}"),
        _number("backward", lambda line: line.row.backward, "{:,.0f}"),
        _word("assumes", lambda line: _assumed(line.row)),
        _word("data set", lambda line: line.row.dataset),
    ]

    # A column without a number, or with the same word in each line, says nothing.
    empty: set[str] = set()
    if all(cell.row.tpr is None and cell.row.fpr is None for cell in cells):
        empty |= {"TPR", "FPR"}
    if all(cell.row.kind != DETECTOR for cell in cells):
        empty.add("AUROC")
    if not any(cell.row.split for cell in cells):
        empty.add("split")
    if len({cell.row.dataset for cell in cells}) == 1:
        empty.add("data set")
    return [column for column in columns if column.title not in empty]


def _word(title: str, value: Callable[[Any], str | None]) -> Column:
    return Column(title, lambda line: _words(value(line) or "-"), value)


def _percent(title: str, value: Callable[[Any], float | None]) -> Column:
    return _number(title, value, "{:.2f}", scale=100)


def _number(
    title: str, value: Callable[[Any], float | None], form: str, scale: float = 1
) -> Column:
    """A column of numbers that are sorted as they are, and shown scaled and formatted."""

    def shown(line: Any) -> str:
        found = value(line)
        return "-" if found is None else escape(form.format(scale * found))

    return Column(title, shown, value, number=True)


def _not_run(undefended: Cell, defense: str, why: str) -> NotRun:
    # A plugin whose result is damaged need not be installed here.
    known = defense in methods.available("defense")
    row = replace(
        undefended.row,
        defense=defense,
        assumes=methods.load("defense", defense).assumes if known else (),
        clean_accuracy=None,
        asr=None,
        robust_accuracy=None,
        seconds=None,
        forward=None,
        backward=None,
        peak_memory_bytes=None,
    )
    return NotRun(row, why)


def _defense(line: Cell | NotRun) -> str:
    mark = ""
    if isinstance(line, NotRun):
        mark = f'<span class="mark">{line.why}</span>'
    elif line.row.collapsed:
        mark = '<span class="mark bad">COLLAPSED</span>'
    return escape(line.name) + mark


def _assumed(row: Row) -> str:
    return "" if row.defense == UNDEFENDED else layout.assumes(row.assumes)


# --- both


def filters(row: Row) -> dict[str, str]:
    """Return what the filters of the page compare: name of the filter -> value."""
    return {"dataset": row.dataset, "attack": row.attack, "defense": row.defense}


def _table(
    columns: Sequence[Column],
    lines: Iterable[tuple[Any, Mapping[str, str]]],
    block: Callable[[Any], Any],
) -> str:
    """Write a table.

    Args:
        columns: From the left.
        lines: Each with the data attributes of its row.
        block: A rule is drawn where this changes from one line to the next.
    """
    # A button can be reached with the keyboard.
    heads = "".join(
        f'<th scope="col" class="{_class(column)}"><button'
        f' type="button">{escape(column.title)}</button></th>'
        for column in columns
    )

    body: list[str] = []
    before = None
    for line, data in lines:
        kinds = ["not-run"] * isinstance(line, NotRun)
        kinds += ["first"] * (bool(body) and block(line) != before)
        before = block(line)
        classes = f' class="{" ".join(kinds)}"' if kinds else ""
        attributes = "".join(f' data-{name}="{escape(value)}"' for name, value in data.items())
        shown = "".join(_cell(column, line) for column in columns)
        body.append(f"<tr{classes}{attributes}>{shown}</tr>")

    rows = "\n".join(body)
    return f"<table><thead><tr>{heads}</tr></thead><tbody>\n{rows}\n</tbody></table>"


def _cell(column: Column, line: Any) -> str:
    # Words that a narrow column cuts off are shown when pointed at.
    value = column.value(line)
    text = "" if value is None else escape(str(value))
    hint = escape(column.hint(line)) if column.hint else "" if column.number else text
    title = f' title="{hint}"' if hint else ""
    return f'<td class="{_class(column)}" data-v="{text}"{title}>{column.shown(line)}</td>'


def _class(column: Column) -> str:
    return "number" if column.number else "word"


def _words(text: str) -> str:
    """HTML of words, which may be broken after an underscore."""
    return escape(text).replace("_", "_<wbr>")
