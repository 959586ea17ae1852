"""Charts as PNG and SVG for papers, with matplotlib: the same values as on the page, on white."""

import io
from collections.abc import Sequence
from typing import Any

from . import looks
from .charts import Chart, Grid, Panel, Series

PANEL_INCHES = (3.4, 2.6)
"""Width and height of a panel; two fit side by side into 7 inches of text."""
COLUMNS = 2
"""Panels side by side."""
LANE_INCHES, CELL_INCHES = 0.22, 0.28
"""Heights of a row of words, and of a row of a grid."""
CHARACTER_INCHES = 0.062
"""Width of a character of the legend, with some space to spare."""
MOST_WRITTEN = 12
"""Largest number of columns of a grid for which each number is written into its field."""
DPI = 300
# Matplotlib's own names.
MARKERS = dict(
    zip(("x", *looks.SHAPES), ("x", "o", "s", "D", "^", "v", "P", "*", "p", "h"), strict=True)
)
MAKER = "backdoorlab figure"
"""Written into each file, so that a file without it is not replaced."""


def drawn(chart: Chart) -> dict[str, bytes]:
    """Draw a chart that has panels: {"png": ..., "svg": ...}. Equal charts give equal bytes."""
    import matplotlib

    style: Any = {
        "font.size": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": MAKER,
        "svg.fonttype": "none",
    }

    with matplotlib.rc_context(style):
        figure = _figure(chart)
        found = {}
        # A date would make each file another one.
        for form, metadata in (
            ("png", {"Software": MAKER}),
            ("svg", {"Creator": MAKER, "Date": None}),
        ):
            stream = io.BytesIO()
            figure.savefig(stream, format=form, dpi=DPI, metadata=metadata)
            found[form] = stream.getvalue()
    return found


def _figure(chart: Chart) -> Any:
    """Lay out the panels from left to right and from the top, with one legend below them."""
    from matplotlib.figure import Figure

    # A row is as high as its highest panel.
    columns = min(COLUMNS, len(chart.panels))
    heights = [
        max(_height(panel) for panel in chart.panels[at : at + columns])
        for at in range(0, len(chart.panels), columns)
    ]

    # The legend takes as many lines as its longest name makes it.
    wide = any(panel.grid for panel in chart.panels)
    legend = _entries(chart.panels)
    width = PANEL_INCHES[0] * (2 if wide else columns)
    across = _across([series.name for series in legend], width)
    lines = -(-len(legend) // across)

    figure = Figure(figsize=(width, sum(heights) + 0.25 * lines), layout="constrained")
    axes = figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights)
    for ax, panel in zip(axes.flat, chart.panels, strict=False):
        _panel(ax, panel)
    for ax in list(axes.flat)[len(chart.panels) :]:
        ax.set_axis_off()

    if len(legend) > 1:
        figure.legend(
            handles=[_handle(series) for series in legend],
            loc="outside lower center",
            ncols=across,
            frameon=False,
        )
    return figure


def _across(names: Sequence[str], inches: float) -> int:
    """How many entries of a legend fit side by side."""
    longest = max((len(name) for name in names), default=0)
    return max(1, min(4, len(names), int(inches / (CHARACTER_INCHES * longest + 0.55))))


def _panel(ax: Any, panel: Panel) -> None:
    """Draw a panel: its titles, and a picture, a grid or series with their axes."""
    ax.set_title(_plain(panel.title), fontsize=8, wrap=True)
    ax.set_xlabel(_plain(panel.x_label))
    ax.set_ylabel(_plain(panel.y_label))
    if panel.picture is not None:
        _picture(ax, panel.picture)
        return
    if panel.grid is not None:
        _grid(ax, panel.grid)
        return

    lanes = {name: place for place, name in enumerate(panel.lanes)}
    bars = [series for series in panel.series if series.kind == "bars"]
    for series in panel.series:
        y = [lanes[value] if isinstance(value, str) else value for value in series.y]
        if series.kind == "bars":
            _bars(ax, series, y, bars.index(series), len(bars))
        else:
            _points(ax, series, y, panel.bare)

    if panel.cut is not None:
        _threshold(ax, panel.cut)
    _axes(ax, panel)


def _picture(ax: Any, content: bytes) -> None:
    """Draw a PNG pixel by pixel, without axes."""
    from PIL import Image

    ax.imshow(Image.open(io.BytesIO(content)), interpolation="nearest")
    ax.set_axis_off()


def _bars(ax: Any, series: Series, y: Sequence[float | None], number: int, count: int) -> None:
    """Draw one of several series of bars, which lie side by side in each lane."""
    # A fifth of each lane stays free, so that lanes are told apart.
    height = 0.8 / count
    offset = (number - (count - 1) / 2) * 0.8 / count
    places = [place + offset for place in y if place is not None]
    ax.barh(places, [float(x or 0) for x in series.x], height=height, color=_colour(series))


def _points(ax: Any, series: Series, y: Sequence[float | None], bare: bool) -> None:
    """Draw marks or a line."""
    marks = {"marker": _marker(series), "color": _colour(series)}
    if series.kind == "points":
        size = 3 if bare else 5.5
        ax.plot(series.x, y, linestyle="", markersize=size, **marks, **_open(bare))
    else:
        style = ":" if series.kind == "dotted" else "-"
        ax.plot(series.x, y, linestyle=style, markersize=3, linewidth=1, **marks)


def _threshold(ax: Any, cut: float) -> None:
    """Draw a dashed line where a defense split the training set."""
    ax.axvline(cut, color=looks.INK["light"], linestyle="--", linewidth=0.8)
    ax.annotate(
        f"cut {cut:.2f}",
        (cut, 1),
        xycoords=("data", "axes fraction"),
        xytext=(2, -7),
        textcoords="offset points",
        fontsize=6,
    )


def _axes(ax: Any, panel: Panel) -> None:
    """Set ticks and ranges of both axes."""
    from matplotlib.ticker import MaxNLocator

    if panel.log_x:
        ax.set_xscale("log")
        _log_ticks(ax, [float(x) for series in panel.series for x in series.x])
    elif panel.x_label.startswith("epoch"):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if panel.bare:
        ax.set_xticks([])
        ax.set_yticks([])

    if panel.x_range:
        ax.set_xlim(*panel.x_range)
    if panel.y_range:
        ax.set_ylim(*panel.y_range)

    # The first lane is at the top.
    if panel.lanes:
        ax.set_yticks(range(len(panel.lanes)), [_plain(name) for name in panel.lanes])
        ax.set_ylim(len(panel.lanes) - 0.5, -0.5)
        ax.grid(axis="y", color="#e5e7eb", linewidth=0.5)
        ax.set_axisbelow(True)


def _log_ticks(ax: Any, numbers: Sequence[float]) -> None:
    """Write few and round numbers at a logarithmic axis: 0.2, 5, 1,000."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    # 1, 2 and 5 of each decade, or only 1 of many decades.
    wide = max(numbers) > 100 * min(numbers)
    ax.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())


def _grid(ax: Any, grid: Grid) -> None:
    """Draw a grid as colours with a colour bar."""
    from matplotlib.colors import LinearSegmentedColormap

    values = [[float("nan") if value is None else value for value in row] for row in grid.values]
    image = ax.imshow(
        values,
        aspect="auto",
        cmap=LinearSegmentedColormap.from_list("share", looks.SCALE["light"]),
        vmin=0,
        vmax=100,
    )
    ax.set_yticks(range(len(grid.rows)), [_plain(name) for name in grid.rows])

    # Names and numbers are left out where they would lie on each other.
    if len(grid.columns) <= 4 * MOST_WRITTEN:
        names = [_plain(name) for name in grid.columns]
        ax.set_xticks(range(len(grid.columns)), names, rotation=45, ha="right")
    if len(grid.columns) <= MOST_WRITTEN:
        _write_values(ax, grid)

    bar = ax.figure.colorbar(image, ax=ax, label="%", fraction=0.03, ticks=(0, 50, 100))
    bar.outline.set_linewidth(0.5)


def _write_values(ax: Any, grid: Grid) -> None:
    """Write each number into its field, white on dark colours."""
    for row, values in enumerate(grid.values):
        for column, value in enumerate(values):
            if value is None:
                continue
            ax.text(
                column,
                row,
                f"{value:.0f}",
                ha="center",
                va="center",
                color="white" if value > 50 else "black",
                fontsize=6,
            )


def _height(panel: Panel) -> float:
    if panel.grid is not None:
        return 1.0 + CELL_INCHES * len(panel.grid.rows)
    return max(1.2, 0.8 + LANE_INCHES * len(panel.lanes)) if panel.lanes else PANEL_INCHES[1]


def _entries(panels: Sequence[Panel]) -> list[Series]:
    """The series of the legend: one for each name, in the order of their looks."""
    named = {series.name: series for panel in panels for series in reversed(panel.series)}
    return sorted(named.values(), key=lambda series: series.look)


def _handle(series: Series) -> Any:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    if series.kind == "bars":
        return Patch(color=_colour(series), label=_plain(series.name))
    points = series.kind == "points"
    form = _open(False) if points else {}
    return Line2D(
        [],
        [],
        linestyle="" if points else "-",
        marker=_marker(series),
        color=_colour(series),
        label=_plain(series.name),
        markersize=4.5,
        **form,
    )


def _open(small: bool) -> dict[str, Any]:
    """Draw marks as outlines, so that those below others are seen."""
    return {"markerfacecolor": "none", "markeredgewidth": 0.6 if small else 0.8}


def _colour(series: Series) -> str:
    return looks.palette("light")[looks.colour(series.look)]


def _marker(series: Series) -> str:
    return MARKERS[looks.shape(series.look)] if series.marked else ""


def _plain(text: str) -> str:
    """Make matplotlib write text as it is; characters that its font lacks become "?"."""
    written = "".join(c if c.isprintable() and ord(c) < 0x2500 else "?" for c in text)
    # A dollar sign would begin a formula.
    return written.replace("$", r"\$")
