"""One record on the page as HTML: its facts, notes, pictures and charts."""

from collections.abc import Sequence
from html import escape

from ..execution.preview import GAIN
from . import charts
from .artifacts import Cell
from .charts import Chart
from .html_charts import figure, picture

MEANINGS = {
    "unknown": "unknown: a stranger's model or data",
    "none": "none: trained on clean data, the control",
}
"""What the page says of an attack whose name does not say it."""


def article(cells: Sequence[Cell], own: Sequence[Chart]) -> str:
    """Write the section of one record.

    Args:
        cells: The record's cells, of which the undefended one is the first.
        own: The record's charts.
    """
    record = cells[0].record
    facts = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in _facts(cells).items()
    )
    # A setting that is None was not used.
    config = sorted(record.info["config"].items())
    settings = ", ".join(f"{name} {value}" for name, value in config if value is not None)

    figures = "\n".join(figure(chart, chart_key(record.name, chart), 3) for chart in own)
    return (
        f'<article data-record="{escape(record.name)}">\n<h3>{escape(record.name)}</h3>\n'
        f'<dl class="facts">{facts}</dl>\n'
        "<details><summary>All settings of the attack</summary>"
        f"<p><code>{escape(settings)}</code></p></details>\n"
        f"{_notes(cells)}{_pictures(cells)}{figures}\n</article>"
    )


def chart_key(record: str, chart: Chart) -> str:
    """Name a record's chart on the page, in characters that can be written there."""
    return f"{record}/{chart.name}".encode(errors="backslashreplace").decode()


def _facts(cells: Sequence[Cell]) -> dict[str, str]:
    """What to say of a record in a few words: name of the fact -> text, known facts only."""
    record, row = cells[0].record, cells[0].row
    info = record.info

    # Of imported models it is often not known which images were poisoned.
    poisoned = "nobody knows"
    if record.known_poison and info.get("poisoned") is not None:
        poisoned = f"{info['poisoned']:,} of {row.train_size:,} training images"

    shape = "x".join(map(str, info["dataset"]["image_shape"]))
    runs = f"{len(cells) - 1} finished run{'s' if len(cells) > 2 else ''}"

    facts = {
        "attack": MEANINGS.get(row.attack, row.attack),
        "target": _target(cells[0]),
        "poisoned": poisoned,
        "data set": f"{row.dataset}, {info['num_classes']} classes, images {shape}",
        "network": row.architecture,
        "seed": str(row.seed),
        "made on": row.device,
        "defenses": runs if len(cells) > 1 else "no defense was run on this record",
    }
    return {name: text for name, text in facts.items() if text}


def _target(cell: Cell) -> str | None:
    """The target class, with its name if that is not its number."""
    info = cell.record.info
    # A stranger's record may have fewer names than classes.
    classes, target = info["dataset"].get("class_names") or [], info.get("target")
    if target is None:
        return None
    named = target < len(classes) and classes[target] != str(target)
    return f"class {target}, {classes[target]}" if named else f"class {target}"


def _notes(cells: Sequence[Cell]) -> str:
    # They are long, so they are folded away.
    said = [(_by(cell), note) for cell in cells for note in cell.notes]
    if not said:
        return ""
    lines = "".join(f"<li>{escape(name)}: {escape(note)}</li>" for name, note in said)
    return (
        f"<details><summary>What the runs said ({len(said)})</summary><ul>{lines}</ul></details>\n"
    )


def _pictures(cells: Sequence[Cell]) -> str:
    sheets = []
    for cell in cells:
        for name, content in cell.pictures.items():
            # Recovered triggers have a row for each class.
            rows = charts.class_names(cell) if name == "triggers" and not cell.undefended else ()
            sheets.append(picture(content, _caption(cell, name), rows))
    if not sheets:
        return '<p class="missing">This record has no picture of its trigger.</p>'
    return f'<div class="pictures">{"".join(sheets)}</div>\n'


def _caption(cell: Cell, name: str) -> str:
    if cell.undefended and name == "preview":
        if cell.row.asr is None:
            return "Test images; there is no trigger to show."
        return (
            "From above: clean test images, the same with the trigger, and their difference,"
            f" {GAIN} times stronger around grey."
        )
    if name == "triggers":
        return (
            f"{cell.name}: triggers that it recovered, a row for each class. The target's should"
            " look like the difference in the preview."
        )
    return f"{_by(cell)}: {name}"


def _by(cell: Cell) -> str:
    return "the attack" if cell.undefended else cell.name
