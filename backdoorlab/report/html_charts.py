"""Charts as HTML: the figure with its heading, legend and caption, and the values that the page's
script draws into it."""

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from typing import Any, Literal

from . import looks
from .charts import Chart, Series

NOTHING = '<p class="missing nothing" hidden>Nothing fits these filters.</p>'
"""Shown by the page's script in place of a chart or a table that a filter leaves empty."""
GREYS: dict[Literal["light", "dark"], dict[str, str]] = {
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
"""Colours of the page beside those of the charts."""


def figure(chart: Chart, key: str, level: int) -> str:
    """Write a chart's place on the page, which the page's script fills.

    Args:
        chart: The chart; without panels the reason is shown in their place.
        key: The chart's name on the page, by which the script finds its values.
        level: Level of its heading, 1 to 6.
    """
    heading = f"<h{level}>{escape(chart.title)}</h{level}>"
    if not chart.panels:
        missing = f'<p class="missing">{escape(chart.missing)}</p>'
        return f'<figure id="{escape(key)}">{heading}{missing}</figure>'

    # A picture needs no script.
    if chart.pictured:
        shown = "".join(picture(panel.picture or b"", panel.title) for panel in chart.panels)
        return (
            f'<figure id="{escape(key)}">{heading}<div class="pictures pair">{shown}</div>'
            f"<figcaption>{escape(chart.caption)}</figcaption></figure>"
        )

    # A grid takes the whole width, and up to three panels share it.
    few = "few" if len(chart.panels) <= 3 else ""
    form = "wide" if any(panel.grid for panel in chart.panels) else few
    return (
        f'<figure id="{escape(key)}" data-chart="{escape(key)}">{heading}{_legend(chart)}<div'
        ' class="panels'
        f' {form}"></div>{NOTHING}<figcaption>{escape(chart.caption)}</figcaption></figure>'
    )


def values(chart: Chart) -> list[dict[str, Any]]:
    """List a chart's panels for JSON, each series with its colour and shape, NaN as None; no
    pictures."""
    if chart.pictured:
        return []

    # The script knows colours by their names, as they differ in light and dark.
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
        found.append({**asdict(panel), "series": series, "picture": None})
    return _finite(found)


def picture(content: bytes, caption: str, rows: Sequence[str] = ()) -> str:
    """Write a sheet of images.

    Args:
        content: A PNG.
        caption: What it shows.
        rows: A name for each of its rows, from above, or nothing.
    """
    # The policy of the page allows pictures that are part of it, and no others.
    data = base64.b64encode(content).decode()
    names = f"<ol>{''.join(f'<li>{escape(name)}</li>' for name in rows)}</ol>" if rows else ""
    image = (
        f'<div class="sheet">{names}<img alt="{escape(caption)}"'
        f' src="data:image/png;base64,{data}"></div>'
    )
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _finite(value: Any) -> Any:
    """Six digits of each number, which are more than a chart shows; JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def script_safe(value: Any) -> str:
    """Write JSON that can stand inside a script element.

    Nothing in it can end the element or begin a comment.
    """
    # "</script>" and "<!--" would; an escaped character is the same one to JSON.
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def colours() -> str:
    """Write the colours of charts and page as CSS variables, light for paper, too."""
    texts = {}
    for scheme, greys in GREYS.items():
        named = looks.palette(scheme) | greys
        variables = " ".join(f"--{name}: {value};" for name, value in named.items())
        texts[scheme] = f":root {{ color-scheme: {scheme}; {variables} }}"
    return (
        f"{texts['light']}\n@media (prefers-color-scheme: dark) {{ {texts['dark']} }}\n@media print"
        f" {{ {texts['light']} }}"
    )


# --- the legend


def _legend(chart: Chart) -> str:
    """One entry for each name, in the order of their looks."""
    # Of several series of one name in a panel the first one is shown.
    named: dict[str, Series] = {
        series.name: series for panel in chart.panels for series in reversed(panel.series)
    }
    if len(named) < 2:
        return ""

    entries = sorted(named.values(), key=lambda series: series.look)
    lines = "".join(f"<li>{_glyph(series)}{escape(series.name)}</li>" for series in entries)
    return f'<ul class="legend">{lines}</ul>'


def _glyph(series: Series) -> str:
    """The shape of a series in its colour, drawn in a box of 12 by 12."""
    colour, shape = f"var(--{looks.colour(series.look)})", looks.shape(series.look)
    if series.kind == "bars":
        inside = '<rect x="0" y="2" width="12" height="8"/>'
    elif not series.marked:
        inside = '<path d="M0 6h12" stroke-width="2"/>'
    elif shape == "x":
        inside = '<path d="M2 2L10 10M10 2L2 10" stroke-width="2" fill="none"/>'
    else:
        inside = OUTLINES[shape]

    # Points are drawn open in the chart, so that marks below others are seen.
    fill, width = ("none", 1.6) if series.kind == "points" else (colour, 0)
    return (
        f'<svg viewBox="0 0 12 12" aria-hidden="true" fill="{fill}" stroke="{colour}"'
        f' stroke-width="{width}">{inside}</svg>'
    )


def _polygon(corners: int, turn: float = 0.0, inner: float = 1.0) -> str:
    """Draw a regular polygon or a star.

    Args:
        corners: How many corners, or points of the star.
        turn: Share of a full turn by which it is rotated.
        inner: Below 1, a star whose inner corners are at this share of the radius.
    """
    star = inner != 1.0
    count = 2 * corners if star else corners
    points = []
    for k in range(count):
        angle = 2 * math.pi * (k / count + turn) - math.pi / 2
        radius = 6 * (inner if star and k % 2 else 1.0)
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
"""Shape -> SVG in a box of 12 by 12."""
