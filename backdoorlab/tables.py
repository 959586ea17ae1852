"""Side by side: records and what each defense left of them, as text, Markdown, CSV or LaTeX."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from . import registry
from .record import ASSUMABLE, Record, read_result

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
        info = record.info
        start = {"record": record.name, "attack": info["attack"]}
        found.append(start | {"defense": "none", "assumes": HOLE} | _scores(info["scores"]) | {"seconds": _whole(info.get("seconds"))})
        plain = info.get("plain_scores")
        if plain is not None:  # a joint attack's: what training-time defenses are compared with
            found.append(
                start | {"defense": "none (plain)", "assumes": assumes(("train",))} | _scores(plain) | {"seconds": _whole(plain.get("seconds"))}
            )
        results = _results(record.folder)
        for name in sorted({*registry.available("defense"), *results}):
            if name not in results:
                method = registry.load("defense", name)
                found.append(start | {"defense": name, "assumes": assumes(method.assumes)} | dict.fromkeys(NUMBERS, HOLE))
            for run, result in results.get(name, []):
                shown = name if run == "seed0" else f"{name} ({run})"
                found.append(start | {"defense": shown + (" COLLAPSED" if result["collapsed"] else "")} | _result(result))
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


def _results(folder: Path) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """defense -> [(run name, result.json)], finished runs only."""
    found: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    paths = (folder / "defense").glob("*/*/result.json")
    for path in sorted(paths, key=lambda p: (not p.parent.name.startswith("seed"), p)):  # named variants after the plain runs
        if not path.parent.name.endswith(".partial"):
            result = read_result(path.parent)
            found.setdefault(path.parent.parent.name, []).append((path.parent.name, result))
    return found


def _result(result: dict[str, Any]) -> Row:
    split = result["split"] or {"tpr": None, "fpr": None}
    return {
        "assumes": assumes(result["assumes"]),
        **_scores(result["after"]),
        "DER %": _percent(result["der"]),
        "TPR %": _percent(split["tpr"]),
        "FPR %": _percent(split["fpr"]),
        "seconds": _whole(result["seconds"]),
    }


def _scores(scores: dict[str, Any]) -> Row:
    named = {"clean acc %": scores["clean_accuracy"], "ASR %": scores["asr"], "RA %": scores["robust_accuracy"]}
    return dict.fromkeys(NUMBERS, HOLE) | {name: _percent(value) for name, value in named.items()}


def _seconds(value: float | None) -> str:
    """A hole for a model that was trained elsewhere."""
    return HOLE if value is None else f"{value:.0f}"


def _percent(value: float | None) -> str:
    return HOLE if value is None else f"{100 * value:.2f}"


def _whole(value: float | None) -> str:
    return HOLE if value is None else f"{value:.0f}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    aligned = (cell.rjust(width) if column in NUMBERS else cell.ljust(width) for column, cell, width in zip(COLUMNS, cells, widths, strict=True))
    return "  ".join(aligned).rstrip()


def _latex_line(cells: Sequence[str]) -> str:
    return " & ".join("".join(LATEX.get(character, character) for character in cell) for cell in cells) + r" \\"
