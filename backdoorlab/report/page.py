"""report: one page that shows records and what defenses made of them, and the same charts as
figures for papers.

The page contains everything that it shows: plotly.js once, all numbers, all pictures. It asks the
network for nothing, which its content security policy also forbids. It runs no script but its own
two, which the policy knows by their hashes, so no text of a stranger's record can become code.
"""

import base64
import hashlib
import importlib
import os
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from .. import __version__
from ..device import choose_device
from ..errors import UserError
from ..record import record_names, record_root
from ..settings import methods, resources
from ..storage import writing
from ..tables import board, formats, layout, stored
from ..tables import rows as measured
from ..tables.rows import Damaged, Only, Row, refuse
from . import charts, figures, heat_map, html_charts, html_tables
from .analysis.subject import Subject
from .artifacts import Cell, by_record, gather
from .charts import Chart
from .html_record import article, chart_key

MAKER = "a page of backdoorlab"
"""Stands in each page, so that a file without it is not replaced."""
LONGEST_NAME = 180
"""Bytes of a record's name that go into the name of a figure; file systems allow 255 in all."""


Analysis = Literal["tsne", "gradcam", "tac", "confusion", "path"]


@dataclass(frozen=True)
class Report:
    """Records and their defenses as one HTML page that works offline, as figures for papers, or
    both."""

    names: Positional[tuple[str, ...]] = ()
    """Records to show; none means all that can be read."""
    html: str | None = None
    """File to write the page to. An existing page is replaced, any other file is not."""
    figures: str | None = None
    """Folder for every chart as PNG and SVG. Existing figures are replaced, other files are not."""
    analysis: tuple[Analysis, ...] = ()
    """Charts that run every model, some seconds each: tsne (features), gradcam (where it looks),
    tac (channels that the trigger moves), confusion (clean images), path (loss between the attacked
    and the defended weights)."""
    dataset_path: str | None = None
    """For --analysis, folder of the data set, if it is no longer in the cache."""
    device: str = "auto"
    """For --analysis: auto, cpu, cuda or cuda:N."""
    record_root: str | None = None
    """Folder of records."""
    debug: bool = False
    """Show a traceback with an error."""


def report(options: Report, only: Only | None = None, say: Callable[[str], None] = print) -> int:
    """Run the command.

    Args:
        options: Flags of the command.
        only: Results to show; None means all that are finished.
        say: Called with each line for the user.

    Returns:
        The exit code: 2 if a damaged result, or a damaged record that was not named, is left out.
    """
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

    if (root / stored.STORED).is_file():
        raise UserError(
            f"{root} has results without histories and pictures: report reads records; table and"
            " matrix read stored results"
        )

    # A page that cannot be written is refused before the work begins.
    plotly = check(options.html) if options.html is not None else ""
    damaged: list[Damaged] = []
    on_damage = refuse if options.debug else damaged.append
    records = measured.readable(names, root, refuse if options.names else on_damage)
    cells = gather(records, only, on_damage)

    overall = charts.overview(cells)
    by_name = {name: charts.of_record(own) for name, own in by_record(cells).items()}
    # Data and every model are loaded only for this.
    if options.analysis:
        device = choose_device(options.device)
        for name, own in by_record(cells).items():
            subject = Subject(own, own[0].record.dataset(options.dataset_path), device)
            by_name[name] += [_analysis(kind)(subject) for kind in dict.fromkeys(options.analysis)]

    if options.figures is not None:
        folder = Path(options.figures)
        say(f"{save_figures(folder, overall, by_name)} figures, each as .png and .svg: {folder}")
        if boards := heat_map.with_asr(board.boards([cell.row for cell in cells])):
            _refuse_foreign(folder / "heat_map.svg", figures.MAKER)
            writing.write_bytes(folder / "heat_map.svg", heat_map.drawn(boards))
            say(f"attacks x defenses: {folder / 'heat_map.svg'}")
    if options.html is not None:
        target = Path(options.html)
        content = page(cells, overall, by_name, plotly, damaged)
        # A record's name need not be UTF-8.
        encoded = content.encode(errors="backslashreplace")
        writing.write_bytes(target, encoded)
        say(f"page of {len(cells)} models, {len(encoded) / 2**20:.1f} MiB, works offline: {target}")
    return layout.complain(damaged)


def _analysis(name: Analysis) -> Callable[[Subject], Chart]:
    """The function that draws an analysis, whose file has its name."""
    found: Callable[[Subject], Chart] = importlib.import_module(
        f".analysis.{name}", __package__
    ).chart
    return found


def check(html: str) -> str:
    """Return plotly.js, after a check that a page may be written to this file.

    Raises:
        UserError: plotly is not installed, or another file is in the way.
    """
    script = plotly_script()
    _refuse_foreign(Path(html), MAKER)
    return script


def plotly_script() -> str:
    """Return plotly.js, which is part of the Python package."""
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
    """Write every chart that has a panel as PNG and SVG.

    Args:
        folder: Where to write; made if it is missing.
        overall: Charts over all records.
        by_record: Name of each record -> its charts.

    Returns:
        How many charts were written.
    """
    # A chart without a panel has nothing to draw.
    drawn = {chart.name: chart for chart in overall if chart.panels}
    drawn |= {
        f"{chart.name}-{_file_name(name)}": chart
        for name, own in by_record.items()
        for chart in own
        if chart.panels
    }

    # No file is written if another one cannot be.
    folder.mkdir(parents=True, exist_ok=True)
    for name in drawn:
        for form in ("png", "svg"):
            _refuse_foreign(folder / f"{name}.{form}", figures.MAKER)

    for name, chart in drawn.items():
        for form, content in figures.drawn(chart).items():
            writing.write_bytes(folder / f"{name}.{form}", content)
    return len(drawn)


def _file_name(record: str) -> str:
    """Make a record's name part of a file's name.

    A name that cannot be printed or is too long is changed, and a checksum keeps it unique.
    """
    # A cut may fall into the middle of a character, which is left out.
    printable = "".join(c if c.isprintable() else "_" for c in record)
    shown = printable.encode()[:LONGEST_NAME].decode(errors="ignore")
    return shown if shown == record else f"{shown}-{zlib.crc32(os.fsencode(record)):08x}"


def _refuse_foreign(target: Path, maker: str) -> None:
    """Raise a UserError if `target` cannot be written, or is a file without our `maker` in it."""
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
    by_name: Mapping[str, Sequence[Chart]],
    plotly: str,
    damaged: Sequence[Damaged] = (),
) -> str:
    """Write the whole page.

    Args:
        cells: The measured models, each record's own first.
        overall: Charts over all records.
        by_name: Name of each record -> its charts.
        plotly: plotly.js.
        damaged: Results that cannot be read; each is a line without numbers.
    """
    template, style, script = (
        resources.resource("page").joinpath(name).read_text(encoding="utf-8")
        for name in ("page.html", "page.css", "page.js")
    )

    # The printed table and the page are made of the same means.
    rows = [cell.row for cell in cells]
    means = layout.means(rows)
    records = by_record(cells)

    # The values of all charts, which the script draws.
    drawn = {chart.name: html_charts.values(chart) for chart in overall}
    for name, own in by_name.items():
        drawn |= {chart_key(name, chart): html_charts.values(chart) for chart in own}

    parts = {
        "maker": MAKER,
        "title": escape(_title(records)),
        "lead": escape(_lead(rows, means)),
        "hashes": " ".join(map(_hash, (plotly, script))),
        "style": style.replace("{{colours}}", html_charts.colours()),
        "selects": _selects(rows),
        "means": html_tables.means_table(rows, means),
        "remarks": _notes_below(means),
        "runs": html_tables.runs_table(cells, damaged),
        "nothing": html_charts.NOTHING,
        "overview": "\n".join(html_charts.figure(chart, chart.name, 2) for chart in overall),
        "options": "".join(map(_option, by_name)),
        "records": "\n".join(article(own, by_name[name]) for name, own in records.items()),
        "charts": html_charts.script_safe(drawn),
        "plotly": plotly,
        "script": script,
        "footer": escape(
            f"Made by backdoorlab {__version__} from records whose files were checked against their"
            " SHA-256."
        ),
    }
    # All at once, so that braces in a stranger's text are not filled in.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def _title(records: Mapping[str, Sequence[Cell]]) -> str:
    named = ", ".join(records) if len(records) <= 3 else f"{len(records)} records"
    return f"Backdoor report: {named}"


def _lead(rows: Sequence[Row], means: formats.Table) -> str:
    """The first sentence: how many models, on which data, and the poison rate if there is one."""
    records = len({row.record for row in rows})
    shown = (
        f"{len(rows)} models of {records} {'record' if records == 1 else 'records'} on"
        f" {', '.join(dict.fromkeys(row.dataset for row in rows))}"
    )
    rate = html_tables.constants(means).get("poison %")
    if not rate:
        return shown + "."

    # Some records have no attack, or one that nobody knows.
    unknown = any(line["poison %"] == formats.EMPTY for line in means.rows)
    known = " where an attack is known" if unknown else ""
    return f"{shown}, {rate} % of the training images poisoned{known}."


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _selects(rows: Sequence[Row]) -> str:
    """The filters with all their values."""
    known = {"dataset": (), "attack": (), "defense": methods.available("defense")}
    titles = {"dataset": "Data set", "attack": "Attack", "defense": "Defense"}
    found = []
    for name, title in titles.items():
        values = sorted({*(html_tables.filters(row)[name] for row in rows), *known[name]})
        options = "".join(map(_option, values))
        found.append(
            f'<label>{title} <select name="{name}"><option'
            f' value="">all</option>{options}</select></label>'
        )
    return "\n".join(found)


def _option(value: str) -> str:
    return f'<option value="{escape(value)}">{escape(value)}</option>'


def _notes_below(table: formats.Table) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in table.notes)
    return f'<ul class="caption">{notes}</ul>'
