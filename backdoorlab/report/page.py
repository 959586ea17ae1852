"""report: one page that shows records and what defenses made of them, and the same charts as
figures for papers.

The page holds everything that it shows: plotly.js once, all numbers, all pictures. It asks the
network for nothing, which its content security policy also forbids, and it runs no script but its
own two, by their hashes: whatever a stranger's record holds is text.
"""

import base64
import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from .. import __version__
from ..device import choose_device
from ..errors import UserError
from ..execution.preview import GAIN
from ..record import record_names, record_root
from ..settings import methods, resources
from ..storage import writing
from ..tables import formats, layout
from ..tables import groups as grouping
from ..tables import rows as measured
from ..tables.groups import Group
from ..tables.rows import Damaged, Only, Row, refuse
from . import charts, looks
from .artifacts import Cell, gather
from .charts import Chart, Series

MAKER = "a page of backdoorlab"
"""In each page, so that only pages are ever replaced."""
LONGEST_NAME = 180
"""Bytes of a record's name in the name of a figure; a file system takes 255 in all."""
NOTHING = '<p class="missing nothing" hidden>Nothing fits these filters.</p>'


@dataclass(frozen=True)
class Report:
    """Records and their defenses as one HTML page that works offline, as figures for papers, or
    both."""

    names: Positional[tuple[str, ...]] = ()
    """Records to show; none means all that can be read."""
    html: str | None = None
    """File to write the page to; a page that is there is replaced, any other file is not."""
    figures: str | None = None
    """Folder for every chart as PNG and SVG; figures that are there are replaced, other files are
    not."""
    tsne: bool = False
    """Add a t-SNE of each model's features before and after; needs the data set, and some seconds
    for each model."""
    dataset_path: str | None = None
    """For --tsne, folder of the data, where the cache has lost it."""
    device: str = "auto"
    """For --tsne: auto, cpu, cuda or cuda:N."""
    record_root: str | None = None
    """Folder of records."""
    debug: bool = False
    """Show a traceback with an error."""


def report(options: Report, only: Only | None = None, say: Callable[[str], None] = print) -> int:
    """The command: 0, or 2 where a damaged result is left out, or a damaged record that no name
    asked for. With `only`, those results alone."""
    if options.html is None and options.figures is None:
        raise UserError(
            "nothing to write: pass --html FILE for a page, --figures DIR for figures, or both"
        )
    root = record_root(options.record_root)
    names = tuple(dict.fromkeys(options.names)) or tuple(record_names(root))
    if not names:
        raise UserError(
            f"no records in {root}: run python attack/badnet.py --save_folder_name NAME first"
        )
    # What is missing is said before the work
    plotly = check(options.html) if options.html is not None else ""
    damaged: list[Damaged] = []
    on_damage = refuse if options.debug else damaged.append
    records = measured.readable(names, root, refuse if options.names else on_damage)
    cells = gather(records, only, on_damage)
    overall = charts.overview(cells)
    by_record = {name: charts.of_record(own) for name, own in _by_record(cells).items()}
    if options.tsne:
        from . import tsne

        device = choose_device(options.device)
        for name, own in _by_record(cells).items():
            by_record[name].append(tsne.chart(own, options.dataset_path, device))
    if options.figures is not None:
        folder = Path(options.figures)
        say(f"{save_figures(folder, overall, by_record)} figures, each as .png and .svg: {folder}")
    if options.html is not None:
        target = Path(options.html)
        # A name need not be UTF-8
        content = page(cells, overall, by_record, plotly, damaged).encode(errors="backslashreplace")
        writing.write_bytes(target, content)
        say(f"page of {len(cells)} models, {len(content) / 2**20:.1f} MiB, works offline: {target}")
    return layout.complain(damaged)


def check(html: str) -> str:
    """plotly's script, where it is installed and a page may be written to this file."""
    script = plotly_script()
    _refuse_foreign(Path(html), MAKER)
    return script


def plotly_script() -> str:
    """plotly.js, from the Python package that carries it."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise UserError(
            "a page needs plotly: pip install 'backdoorlab[report]' (--figures works without it)"
        ) from error
    return get_plotlyjs()


def save_figures(
    folder: Path, overall: Sequence[Chart], by_record: Mapping[str, Sequence[Chart]]
) -> int:
    """Write every chart that has something to draw; returns how many."""
    from . import figures

    drawn = {chart.name: chart for chart in overall if chart.panels}
    drawn |= {
        f"{chart.name}-{_file_name(name)}": chart
        for name, own in by_record.items()
        for chart in own
        if chart.panels
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name in drawn:
        for form in ("png", "svg"):
            _refuse_foreign(folder / f"{name}.{form}", figures.MAKER)
    for name, chart in drawn.items():
        for form, content in figures.drawn(chart).items():
            writing.write_bytes(folder / f"{name}.{form}", content)
    return len(drawn)


def _file_name(record: str) -> str:
    """A record's name as part of a file's: what cannot be printed or is too long is left out, and a
    checksum tells it from its like."""
    shown = (
        "".join(c if c.isprintable() else "_" for c in record)
        .encode()[:LONGEST_NAME]
        .decode(errors="ignore")
    )
    return shown if shown == record else f"{shown}-{zlib.crc32(os.fsencode(record)):08x}"


def _refuse_foreign(target: Path, maker: str) -> None:
    """A file that is in the way is replaced only if it says that it is ours."""
    if target.is_dir():
        raise UserError(f"{target} is a folder: give the name of a file")
    if not target.parent.is_dir():
        raise UserError(
            f"{target} cannot be written, there is no folder {target.parent}: make it first, or"
            " choose another place"
        )
    if target.exists():
        with target.open("rb") as stream:
            if maker.encode() not in stream.read(4096):
                raise UserError(
                    f"{target} is there and was not written by this command: move it, or choose"
                    " another name"
                )


# --- the page


def page(
    cells: Sequence[Cell],
    overall: Sequence[Chart],
    by_record: Mapping[str, Sequence[Chart]],
    plotly: str,
    damaged: Sequence[Damaged] = (),
) -> str:
    """The whole page as text."""
    template, style, script = (
        resources.resource("page").joinpath(name).read_text(encoding="utf-8")
        for name in ("page.html", "page.css", "page.js")
    )
    style = style.replace("{{colours}}", _colours())
    panels = {chart.name: _json(chart) for chart in overall}
    panels |= {_key(name, chart): _json(chart) for name, own in by_record.items() for chart in own}
    rows = [cell.row for cell in cells]
    means = layout.means(rows)
    datasets = dict.fromkeys(cell.row.dataset for cell in cells)
    rate = constants(means).get("poison %")
    lead = (
        f"{len(cells)} models of {len(by_record)} {'record' if len(by_record) == 1 else 'records'}"
        f" on {', '.join(datasets)}"
    )
    known = (
        " where an attack is known"
        if any(line["poison %"] == formats.EMPTY for line in means.rows)
        else ""
    )
    lead += f", {rate} % of the training images poisoned{known}." if rate else "."
    title = (
        f"Backdoor report: {', '.join(by_record)}"
        if len(by_record) <= 3
        else f"Backdoor report: {len(by_record)} records"
    )
    parts = {
        "maker": MAKER,
        "title": escape(title),
        "lead": escape(lead),
        "hashes": " ".join(map(_hash, (plotly, script))),
        "style": style,
        "selects": _selects(cells),
        "means": means_table(rows, means),
        "remarks": _notes_below(means),
        "runs": runs_table(cells, damaged),
        "nothing": NOTHING,
        "overview": "\n".join(_figure(chart, chart.name, 2) for chart in overall),
        "options": "".join(
            f'<option value="{escape(name)}">{escape(name)}</option>' for name in by_record
        ),
        "records": "\n".join(
            _article(own, by_record[name]) for name, own in _by_record(cells).items()
        ),
        "charts": script_safe(panels),
        "plotly": plotly,
        "script": script,
        "footer": escape(
            f"Made by backdoorlab {__version__} from records whose files were checked against their"
            " SHA-256."
        ),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def _key(record: str, chart: Chart) -> str:
    """A chart's name on the page, as its text will be written there."""
    return f"{record}/{chart.name}".encode(errors="backslashreplace").decode()


def script_safe(value: Any) -> str:
    """JSON that can stand inside a script element: nothing in it can end the element or begin a
    comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _json(chart: Chart) -> list[dict[str, Any]]:
    """A chart's panels, with the colour and the shape of each series; a number that is none becomes
    a gap."""
    found = []
    for panel in chart.panels:
        series = [
            {
                **asdict(one),
                "colour": looks.colour(one.look),
                "shape": looks.shape(one.look),
                "marked": one.marked,
            }
            for one in panel.series
        ]
        found.append({**asdict(panel), "series": series})
    return _finite(found)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _colours() -> str:
    """The palette and the greys as CSS variables, once for each scheme."""
    schemes: dict[Literal["light", "dark"], dict[str, str]] = {
        "light": {
            "soft": "#4B5563",
            "line": "#E2E5EA",
            "edge": "#8A93A0",
            "field": "#F3F5F8",
            "link": "#0B57A4",
            "bad": "#B00020",
        },
        "dark": {
            "soft": "#A9B4C0",
            "line": "#2B323B",
            "edge": "#6B7785",
            "field": "#1F252C",
            "link": "#7CC4FF",
            "bad": "#FF8A80",
        },
    }
    texts = {}
    for scheme, greys in schemes.items():
        values = looks.palette(scheme) | greys
        texts[scheme] = (
            f":root {{ color-scheme: {scheme}; "
            + " ".join(f"--{name}: {value};" for name, value in values.items())
            + " }"
        )
    return (
        f"{texts['light']}\n@media (prefers-color-scheme: dark) {{ {texts['dark']} }}\n@media print"
        f" {{ {texts['light']} }}"
    )


def _by_record(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.row.record, []).append(cell)
    return found


# --- tables


@dataclass(frozen=True)
class Column:
    """A heading, and for each line what is shown (HTML) and what it is sorted by (None: missing, so
    at the end)."""

    title: str
    shown: Callable[[Any], str]
    value: Callable[[Any], float | str | None]
    number: bool = False
    hint: Callable[[Any], str] | None = None
    """What a cell says when pointed at; None: words say themselves, for they may be cut."""


def _words(title: str, value: Callable[[Any], str | None]) -> Column:
    return Column(title, lambda line: _shown(value(line) or "-"), value)


def _number(
    title: str, value: Callable[[Any], float | None], form: Callable[[float], str]
) -> Column:
    return Column(
        title,
        lambda line: "-" if (found := value(line)) is None else escape(form(found)),
        value,
        number=True,
    )


def means_table(rows: Sequence[Row], table: formats.Table) -> str:
    """One line for each experiment, seeds averaged: the texts of `table`, which is `layout.means`
    of the same rows, sorted by their numbers."""
    groups = grouping.grouped(rows)
    lines = list(zip(groups, table.rows, strict=True))

    def column(title: str) -> Column:
        def value(line: tuple[Group, formats.Row]) -> float | str | None:
            cell = line[1][title]
            return cell.value if title in table.numbers else cell.text

        hint = (
            (lambda line: ", ".join(dict.fromkeys(row.record for row in line[0].rows)))
            if title == "n"
            else None
        )
        return Column(
            title,
            lambda line: _marked(_shown(line[1][title].text)),
            value,
            title in table.numbers,
            hint,
        )

    # What tells attacks of one name apart stands beside it.
    beside = [title for title in CONSTANT if title not in constants(table)]
    order = [
        "attack",
        *beside,
        "defense",
        "clean acc %",
        "ASR %",
        "RA %",
        "DER %",
        "n",
        "assumes",
        "TPR %",
        "FPR %",
        "seconds",
        "reported",
    ]
    known = [title for title in order if title in table.columns]
    columns = [
        column(title)
        for title in known
        if not (title in OPTIONAL and all(line[title] == formats.EMPTY for line in table.rows))
    ]
    return _table(
        columns,
        [(line, _filters(line[0].first)) for line in lines],
        lambda line: line[0].first.attack_key,
    )


def constants(table: formats.Table) -> dict[str, str]:
    """What is the same in all lines is said once, above the tables."""
    found = {
        title: {line[title].text for line in table.rows if line[title] != formats.EMPTY}
        for title in CONSTANT
    }
    return {title: "".join(values) for title, values in found.items() if len(values) <= 1}


CONSTANT = ("data", "poison %")
OPTIONAL = ("TPR %", "FPR %", "TPR", "FPR")
"""Columns that only some defenses fill."""


def _shown(text: str) -> str:
    """HTML of words, which may be broken after an underscore."""
    return escape(text).replace("_", "_<wbr>")


def _marked(text: str) -> str:
    """The word that a reader must not miss in a frame, deviations smaller."""
    spread = re.sub(r" (± [\d.]+( †)?)", r' <span class="sd">\1</span>', text)
    return re.sub(r" (COLLAPSED( \d+ of \d+)?)$", r'<span class="mark bad">\1</span>', spread)


def runs_table(cells: Sequence[Cell], damaged: Sequence[Damaged] = ()) -> str:
    """One line for each cell; below a record's own, one for each damaged result and for each known
    defense that was not run on it."""
    columns = [
        _words("record", lambda line: line.row.record),
        _words("attack", lambda line: line.row.attack),
        Column("defense", _defense, lambda line: line.name),
        _number("seed", lambda line: line.row.seed, lambda seed: f"{seed:.0f}"),
        _number("clean acc", lambda line: line.row.clean_accuracy, _as_percent),
        _number("ASR", lambda line: line.row.asr, _as_percent),
        _number("RA", lambda line: line.row.robust_accuracy, _as_percent),
        _number("DER", lambda line: line.row.der, _as_percent),
        _number("TPR", lambda line: line.row.tpr, _as_percent),
        _number("FPR", lambda line: line.row.fpr, _as_percent),
        _number("seconds", lambda line: line.row.seconds, lambda value: f"{value:,.0f}"),
        _number(
            "GiB", lambda line: line.row.peak_memory_bytes, lambda value: f"{value / 2**30:.2f}"
        ),
        _number("forward", lambda line: line.row.forward, lambda value: f"{value:,.0f}"),
        _number("backward", lambda line: line.row.backward, lambda value: f"{value:,.0f}"),
        _words("assumes", lambda line: _assumed(line.row)),
        _words("data set", lambda line: line.row.dataset),
    ]
    empty = {
        title
        for title in OPTIONAL
        if all(cell.row.tpr is None and cell.row.fpr is None for cell in cells)
    }
    empty |= {"data set"} if len({cell.row.dataset for cell in cells}) == 1 else set()
    columns = [column for column in columns if column.title not in empty]
    lines: list[tuple[Any, dict[str, str]]] = []
    for own in _by_record(cells).values():
        lines += [(cell, {**_filters(cell.row), "cell": str(cell.number)}) for cell in own]
        lost = [(one.defense, "damaged") for one in damaged if one.record == own[0].row.record]
        run = {cell.row.defense for cell in own} | {name for name, _ in lost}
        missing = [(name, "not run") for name in methods.available("defense") if name not in run]
        lines += [
            (Hole(own[0], name, why), {**_filters(own[0].row), "defense": name})
            for name, why in lost + missing
        ]
    return _table(columns, lines, lambda line: line.row.record)


class Hole:
    """A line for a defense that was not run on a record, or whose result is damaged: it has a name,
    and no number."""

    def __init__(self, undefended: Cell, defense: str, why: str) -> None:
        nothing = dict.fromkeys(
            (
                "clean_accuracy",
                "asr",
                "robust_accuracy",
                "seconds",
                "forward",
                "backward",
                "peak_memory_bytes",
            )
        )
        assumes = (
            methods.load("defense", defense).assumes
            if defense in methods.available("defense")
            else ()
        )
        self.row = replace(undefended.row, defense=defense, assumes=assumes, **nothing)  # type: ignore[arg-type]
        self.name, self.why = defense, why


def _defense(line: Cell | Hole) -> str:
    if isinstance(line, Hole):
        return escape(line.name) + f'<span class="mark">{line.why}</span>'
    return escape(line.name) + (
        '<span class="mark bad">COLLAPSED</span>' if line.row.collapsed else ""
    )


def _assumed(row: Row) -> str:
    return "" if row.defense == measured.UNDEFENDED else layout.assumes(row.assumes)


def _filters(row: Row) -> dict[str, str]:
    """What the filters look at."""
    return {"dataset": row.dataset, "attack": row.attack, "defense": row.defense}


def _table(
    columns: Sequence[Column],
    lines: Iterable[tuple[Any, Mapping[str, str]]],
    block: Callable[[Any], Any],
) -> str:
    """A line is drawn where `block` changes."""
    heads = "".join(
        f'<th scope="col" class="{_class(column)}"><button'
        f' type="button">{escape(column.title)}</button></th>'
        for column in columns
    )
    body: list[str] = []
    before = None
    for line, data in lines:
        attributes = "".join(f' data-{name}="{escape(value)}"' for name, value in data.items())
        kinds = ["hole"] * isinstance(line, Hole) + ["first"] * (
            bool(body) and block(line) != before
        )
        before = block(line)
        hole = f' class="{" ".join(kinds)}"' if kinds else ""
        body.append(
            f"<tr{hole}{attributes}>" + "".join(_cell(column, line) for column in columns) + "</tr>"
        )
    return (
        f"<table><thead><tr>{heads}</tr></thead><tbody>\n" + "\n".join(body) + "\n</tbody></table>"
    )


def _cell(column: Column, line: Any) -> str:
    value = column.value(line)
    text = "" if value is None else escape(str(value))
    hint = escape(column.hint(line)) if column.hint else "" if column.number else text
    title = f' title="{hint}"' if hint else ""
    return f'<td class="{_class(column)}" data-v="{text}"{title}>{column.shown(line)}</td>'


def _class(column: Column) -> str:
    return "number" if column.number else "word"


def _as_percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _selects(cells: Sequence[Cell]) -> str:
    found = []
    for name, title, known in (
        ("dataset", "Data set", ()),
        ("attack", "Attack", ()),
        ("defense", "Defense", methods.available("defense")),
    ):
        values = sorted({*(_filters(cell.row)[name] for cell in cells), *known})
        options = "".join(
            f'<option value="{escape(value)}">{escape(value)}</option>' for value in values
        )
        found.append(
            f'<label>{title} <select name="{name}"><option'
            f' value="">all</option>{options}</select></label>'
        )
    return "\n".join(found)


def _notes_below(table: formats.Table) -> str:
    return (
        '<ul class="caption">'
        + "".join(f"<li>{escape(note)}</li>" for note in table.notes)
        + "</ul>"
    )


# --- one record


def _article(cells: Sequence[Cell], own: Sequence[Chart]) -> str:
    record, row = cells[0].record, cells[0].row
    info = record.info
    classes, target = info["dataset"].get("class_names") or [], info.get("target")
    poisoned = (
        f"{info['poisoned']:,} of {row.train_size:,} training images"
        if record.known_poison and info.get("poisoned") is not None
        else "nobody knows"
    )
    meaning = {
        "unknown": "unknown: a stranger's model or data",
        "none": "none: trained on clean data, the control",
    }
    target_name = (
        f", {classes[target]}"
        if target is not None and target < len(classes) and classes[target] != str(target)
        else ""
    )
    facts = {
        "attack": meaning.get(row.attack, row.attack),
        "target": None if target is None else f"class {target}{target_name}",
        "poisoned": poisoned,
        "data set": (
            f"{row.dataset}, {info['num_classes']} classes, images"
            f" {'x'.join(map(str, info['dataset']['image_shape']))}"
        ),
        "network": row.architecture,
        "seed": str(row.seed),
        "made on": row.device,
        "defenses": (
            "no defense was run on this record"
            if len(cells) == 1
            else f"{len(cells) - 1} finished run{'s' if len(cells) > 2 else ''}"
        ),
    }
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts.items() if text
    )
    settings = escape(
        ", ".join(
            f"{name} {value}" for name, value in sorted(info["config"].items()) if value is not None
        )
    )
    return (
        f'<article data-record="{escape(record.name)}">\n<h3>{escape(record.name)}</h3>\n<dl'
        f' class="facts">{rows}</dl>\n<details><summary>All settings of the'
        f" attack</summary><p><code>{settings}</code></p></details>\n"
        + _notes(cells)
        + _pictures(cells)
        + "\n".join(_figure(chart, _key(record.name, chart), 3) for chart in own)
        + "\n</article>"
    )


def _notes(cells: Sequence[Cell]) -> str:
    said = [(cell, note) for cell in cells for note in cell.notes]
    if not said:
        return ""
    lines = "".join(
        f"<li>{escape('the attack' if cell.undefended else cell.name)}: {escape(note)}</li>"
        for cell, note in said
    )
    return (
        f"<details><summary>What the runs said ({len(said)})</summary><ul>{lines}</ul></details>\n"
    )


def _pictures(cells: Sequence[Cell]) -> str:
    sheets = []
    for cell in cells:
        for name, content in cell.pictures.items():
            sheets.append(
                _picture(
                    content,
                    _about(cell, name),
                    charts.class_names(cell) if name == "triggers" and not cell.undefended else (),
                )
            )
    if not sheets:
        return '<p class="missing">This record holds no picture of its trigger.</p>'
    return f'<div class="pictures">{"".join(sheets)}</div>\n'


def _about(cell: Cell, name: str) -> str:
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
    return f"{'the attack' if cell.undefended else cell.name}: {name}"


def _picture(content: bytes, caption: str, rows: Sequence[str] = ()) -> str:
    """A sheet, with a name beside each of its rows."""
    data = base64.b64encode(content).decode()
    names = f"<ol>{''.join(f'<li>{escape(name)}</li>' for name in rows)}</ol>" if rows else ""
    image = (
        f'<div class="sheet">{names}<img alt="{escape(caption)}"'
        f' src="data:image/png;base64,{data}"></div>'
    )
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _figure(chart: Chart, key: str, level: int) -> str:
    heading = f"<h{level}>{escape(chart.title)}</h{level}>"
    if not chart.panels:
        return (
            f'<figure id="{escape(key)}">{heading}<p'
            f' class="missing">{escape(chart.missing)}</p></figure>'
        )
    form = (
        "wide"
        if any(panel.grid for panel in chart.panels)
        else "few"
        if len(chart.panels) <= 3
        else ""
    )
    return (
        f'<figure id="{escape(key)}" data-chart="{escape(key)}">{heading}{_legend(chart)}<div'
        ' class="panels'
        f' {form}"></div>{NOTHING}<figcaption>{escape(chart.caption)}</figcaption></figure>'
    )


def _legend(chart: Chart) -> str:
    """One entry for each name, in the order of their looks."""
    named: dict[str, Series] = {
        series.name: series for panel in chart.panels for series in reversed(panel.series)
    }
    if len(named) < 2:
        return ""
    entries = sorted(named.values(), key=lambda series: series.look)
    return (
        '<ul class="legend">'
        + "".join(f"<li>{_glyph(series)}{escape(series.name)}</li>" for series in entries)
        + "</ul>"
    )


def _glyph(series: Series) -> str:
    """The shape in its colour, drawn in a box of 12 by 12."""
    colour, shape = f"var(--{looks.colour(series.look)})", looks.shape(series.look)
    if series.kind == "bars":
        inside = '<rect x="0" y="2" width="12" height="8"/>'
    elif not series.marked:
        inside = '<path d="M0 6h12" stroke-width="2"/>'
    elif shape == "x":
        inside = '<path d="M2 2L10 10M10 2L2 10" stroke-width="2" fill="none"/>'
    else:
        inside = OUTLINES[shape]
    fill, width = ("none", 1.6) if series.kind == "points" else (colour, 0)
    return (
        f'<svg viewBox="0 0 12 12" aria-hidden="true" fill="{fill}" stroke="{colour}"'
        f' stroke-width="{width}">{inside}</svg>'
    )


def _polygon(corners: int, turn: float = 0.0, inner: float = 1.0) -> str:
    """A regular polygon, or a star where every second corner lies at `inner` of the radius."""
    count = corners if inner == 1.0 else 2 * corners
    points = []
    for k in range(count):
        angle, radius = (
            2 * math.pi * (k / count + turn) - math.pi / 2,
            6 * (inner if inner != 1.0 and k % 2 else 1.0),
        )
        points.append(f"{6 + radius * math.cos(angle):.2f},{6 + radius * math.sin(angle):.2f}")
    return f'<polygon points="{" ".join(points)}"/>'


OUTLINES = {
    "circle": '<circle cx="6" cy="6" r="5"/>',
    "square": '<rect x="1" y="1" width="10" height="10"/>',
    "diamond": _polygon(4),
    "triangle-up": _polygon(3),
    "triangle-down": _polygon(3, 0.5),
    "cross": '<path d="M4 1h4v3h3v4h-3v3h-4v-3h-3v-4h3z"/>',
    "star": _polygon(5, 0, 0.45),
    "pentagon": _polygon(5),
    "hexagon": _polygon(6),
}
