"""Charts as PNG and SVG for papers, with matplotlib: the same values as on the page, on white."""

import io
from collections.abc import Sequence
from typing import Any

from . import looks
from .charts import Chart, Grid, Panel, Series

PANEL_INCHES = (3.4, 2.6)
"""One panel; two stand side by side on a text width of 7 inches."""
COLUMNS = 2
LANE_INCHES, CELL_INCHES = 0.22, 0.28
"""Height of a row of words, and of a row of a grid."""
CHARACTER_INCHES = 0.062
"""Width of a character of the legend, and a little more."""
MOST_WRITTEN = 12
"""Columns of a grid up to which each number is written into its cell."""
DPI = 300
MARKERS = dict(
    zip(("x", *looks.SHAPES), ("x", "o", "s", "D", "^", "v", "P", "*", "p", "h"), strict=True)
)
MAKER = "backdoorlab figure"
"""Written into each file, so that only files of ours are ever replaced."""


def drawn(chart: Chart) -> dict[str, bytes]:
    """{"png": ..., "svg": ...} of a chart that has panels; the same chart gives the same bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(chart.panels))
    heights = [
        max(_height(panel) for panel in chart.panels[at : at + columns])
        for at in range(0, len(chart.panels), columns)
    ]
    wide = any(panel.grid for panel in chart.panels)
    style: Any = {
        "font.size": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": MAKER,
        "svg.fonttype": "none",
    }
    with matplotlib.rc_context(style):
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
        found = {}
        for form, metadata in (
            ("png", {"Software": MAKER}),
            ("svg", {"Creator": MAKER, "Date": None}),
        ):
            stream = io.BytesIO()
            figure.savefig(stream, format=form, dpi=DPI, metadata=metadata)
            found[form] = stream.getvalue()
    return found


def _across(names: Sequence[str], inches: float) -> int:
    """How many entries of a legend stand side by side."""
    longest = max((len(name) for name in names), default=0)
    return max(1, min(4, len(names), int(inches / (CHARACTER_INCHES * longest + 0.55))))


def _panel(ax: Any, panel: Panel) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_title(_plain(panel.title), fontsize=8, wrap=True)
    ax.set_xlabel(_plain(panel.x_label))
    ax.set_ylabel(_plain(panel.y_label))
    if panel.grid is not None:
        _grid(ax, panel.grid)
        return
    lanes = {name: place for place, name in enumerate(panel.lanes)}
    bars = [series for series in panel.series if series.kind == "bars"]
    for series in panel.series:
        y = [lanes[value] if isinstance(value, str) else value for value in series.y]
        colour = _colour(series)
        if series.kind == "bars":
            offset = (bars.index(series) - (len(bars) - 1) / 2) * 0.8 / len(bars)
            places = [place + offset for place in y if place is not None]
            ax.barh(places, [float(x or 0) for x in series.x], height=0.8 / len(bars), color=colour)
        elif series.kind == "points":
            ax.plot(
                series.x,
                y,
                linestyle="",
                marker=_marker(series),
                color=colour,
                markersize=3 if panel.bare else 5.5,
                **_open(panel.bare),
            )
        else:
            ax.plot(
                series.x,
                y,
                linestyle=":" if series.kind == "dotted" else "-",
                marker=_marker(series),
                color=colour,
                markersize=3,
                linewidth=1,
            )
    if panel.cut is not None:
        ax.axvline(panel.cut, color=looks.INK["light"], linestyle="--", linewidth=0.8)
        ax.annotate(
            f"cut {panel.cut:.2f}",
            (panel.cut, 1),
            xycoords=("data", "axes fraction"),
            xytext=(2, -7),
            textcoords="offset points",
            fontsize=6,
        )
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
    if panel.lanes:
        ax.set_yticks(range(len(panel.lanes)), [_plain(name) for name in panel.lanes])
        ax.set_ylim(len(panel.lanes) - 0.5, -0.5)
        ax.grid(axis="y", color="#e5e7eb", linewidth=0.5)
        ax.set_axisbelow(True)


def _log_ticks(ax: Any, numbers: Sequence[float]) -> None:
    """Few numbers, as they are said: 0.2, 5, 1,000."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    wide = max(numbers) > 100 * min(numbers)
    ax.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())


def _grid(ax: Any, grid: Grid) -> None:
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
    if len(grid.columns) <= 4 * MOST_WRITTEN:
        ax.set_xticks(
            range(len(grid.columns)),
            [_plain(name) for name in grid.columns],
            rotation=45,
            ha="right",
        )
    if len(grid.columns) <= MOST_WRITTEN:
        for r, row in enumerate(grid.values):
            for c, value in enumerate(row):
                if value is not None:
                    ax.text(
                        c,
                        r,
                        f"{value:.0f}",
                        ha="center",
                        va="center",
                        color="white" if value > 50 else "black",
                        fontsize=6,
                    )
    ax.figure.colorbar(
        image, ax=ax, label="%", fraction=0.03, ticks=(0, 50, 100)
    ).outline.set_linewidth(0.5)


def _height(panel: Panel) -> float:
    if panel.grid is not None:
        return 1.0 + CELL_INCHES * len(panel.grid.rows)
    return max(1.2, 0.8 + LANE_INCHES * len(panel.lanes)) if panel.lanes else PANEL_INCHES[1]


def _entries(panels: Sequence[Panel]) -> list[Series]:
    """One series for each name, in the order of their looks."""
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
    """Marks as outlines, so that those that lie under others are seen."""
    return {"markerfacecolor": "none", "markeredgewidth": 0.6 if small else 0.8}


def _colour(series: Series) -> str:
    return looks.palette("light")[looks.colour(series.look)]


def _marker(series: Series) -> str:
    return MARKERS[looks.shape(series.look)] if series.marked else ""


def _plain(text: str) -> str:
    """Text as it is: a dollar sign would begin a formula, and what the font has not got is a
    question mark."""
    return "".join(c if c.isprintable() and ord(c) < 0x2500 else "?" for c in text).replace(
        "$", r"\$"
    )
