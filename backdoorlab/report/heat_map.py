"""The heat map of boards, attacks x defenses: ASR as colour and number, the depth below it.

It is an SVG of plain rectangles and texts. One file serves light and dark pages, each with its own
colours, and equal boards give equal bytes whatever is installed.
"""

from collections.abc import Sequence
from dataclasses import replace
from html import escape
from typing import Literal

from ..tables.board import Board, ordered
from ..tables.groups import Group
from ..tables.rows import UNDEFENDED
from . import looks
from .figures import MAKER

CELL, ROW, GAP = 66, 34, 2
"""Width and height of a cell, and the space between cells, in pixels."""
LETTER, MARGIN, TITLE = 7, 12, 46
"""Width of a letter of a label; space around the map; height of a board's title and headings."""
STEPS = 20
"""Colours between 0 and 100 %."""
NARROWEST = 480
"""Least width, for the legend."""
Scheme = Literal["light", "dark"]


def with_asr(every: Sequence[Board]) -> list[Board]:
    """Leave out what has no ASR: the clean control, and attacks without triggered images."""
    found = []
    for board in every:
        scored = {place[0] for place, group in board.cells.items() if group.score("asr")}
        attacks = tuple(name for name in board.attacks if name in scored)
        found.append(replace(board, attacks=attacks))
    return [board for board in found if board.attacks]


def svg(every: Sequence[Board]) -> str:
    """Draw boards below each other; those of `with_asr` have no empty row."""
    names = [name for board in every for name in board.attacks]
    left = MARGIN + GAP + LETTER * max(map(len, [*names, "attack"]))
    # The columns of all boards are the same ones, so that a defense is read from top to bottom.
    defenses = ordered({name for board in every for name in board.defenses})
    width = max(left + len(defenses) * CELL + MARGIN, NARROWEST)

    # Boards stand below each other, the scale under the last one.
    parts, y = [], MARGIN
    for board in every:
        parts += _board(board, defenses, left, y)
        y += TITLE + len(board.attacks) * ROW + MARGIN
    parts += _legend(left, y)
    height = y + 64

    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    letters = 'font-family="Helvetica, Arial, sans-serif" font-size="12"'
    head = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        f"<!-- {MAKER} -->",
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" {letters}>',
    ]
    title = "<title>ASR and depth of each defense against each attack</title>"
    ground = f'<rect class="paper" width="{width}" height="{height}"/>'
    return "\n".join([*head, title, _style(), ground, *parts, "</svg>"]) + "\n"


def drawn(every: Sequence[Board]) -> bytes:
    """Draw boards as the content of a file."""
    # A name need not be UTF-8.
    return svg(every).encode(errors="backslashreplace")


def _board(board: Board, defenses: Sequence[str], left: int, top: int) -> list[str]:
    """Draw the title, the names of the defenses, and a row of cells for each attack."""
    rate = "" if board.rate is None else f", {100 * board.rate:g} % poison"
    parts = [_text(MARGIN, top + 14, f"{board.dataset}, {board.architecture}{rate}", "ink bold")]
    for column, name in enumerate(defenses):
        x = left + column * CELL + CELL / 2
        shown = "no defense" if name == UNDEFENDED else name
        parts.append(_text(x, top + 38, shown, "ink", "middle", CELL - GAP))

    # A row for each attack; what was not run keeps its place.
    for row, attack in enumerate(board.attacks):
        y = top + TITLE + row * ROW
        parts.append(_text(left - 6, y + ROW / 2 + 4, attack, "ink", "end"))
        for column, defense in enumerate(defenses):
            group = board.cells.get((attack, defense))
            parts += _cell(group, left + column * CELL, y)
    return parts


def _cell(group: Group | None, x: float, y: float) -> list[str]:
    """Draw one cell: its colour, the ASR in percent, and the depth or a dash below it."""
    middle, size = x + CELL / 2, f'width="{CELL - GAP}" height="{ROW - GAP}"'
    if group is None:
        empty = f'<rect class="empty" x="{x}" y="{y}" {size}/>'
        return [empty, _text(middle, y + 20, "not run", "faint small", "middle")]

    asr, depth = group.score("asr"), group.score("depth")
    step = 0 if asr is None else round(asr.mean * STEPS)
    shown = "-" if asr is None else f"{100 * asr.mean:.1f}"
    # A destroyed model has a low ASR, too, which must not look like a success.
    mark = " ×" if group.collapsed else ""
    # The undefended model is what depth is measured from.
    below = "-" if depth is None else f"{depth.mean:.2f}"
    if group.first.defense == UNDEFENDED:
        below = ""
    return [
        f'<rect class="c{step}" x="{x}" y="{y}" {size}/>',
        _text(middle, y + (20 if not below else 15), shown + mark, f"t{step} bold", "middle"),
        *([_text(middle, y + 28, below, f"t{step} small", "middle")] if below else []),
    ]


def _legend(left: int, top: int) -> list[str]:
    """Draw the scale, and say what the numbers are."""
    bar = [
        f'<rect class="c{step}" x="{left + step * 8}" y="{top}" width="8" height="10"/>'
        for step in range(STEPS + 1)
    ]
    right = left + 8 * (STEPS + 1)
    return [
        *bar,
        _text(left - 6, top + 9, "ASR 0 %", "ink small", "end"),
        _text(right + 6, top + 9, "100 %", "ink small"),
        _text(
            MARGIN,
            top + 30,
            "Large: ASR in %. Small: depth, 1 the backdoor is gone, 0 as before, - not measured.",
            "ink small",
        ),
        _text(
            MARGIN,
            top + 46,
            "×: COLLAPSED, the defense destroyed the model.",
            "ink small",
        ),
    ]


def _text(
    x: float, y: float, words: str, style: str, anchor: str = "start", most: int | None = None
) -> str:
    """Write a text; one that would be wider than `most` pixels is squeezed."""
    wide = most is not None and LETTER * len(words) > most
    squeezed = f' textLength="{most}" lengthAdjust="spacingAndGlyphs"' if wide else ""
    place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}"{squeezed}'
    # A stranger's setting may hold what no XML may.
    printable = "".join(letter if letter.isprintable() else " " for letter in words)
    return f'<text class="{style}" {place}>{escape(printable)}</text>'


def _style() -> str:
    """Write the colours of both schemes."""
    common = ".bold{font-weight:bold}.small{font-size:10px}.faint{opacity:.6}"
    dark = f"@media (prefers-color-scheme: dark){{{_colours('dark')}}}"
    return f"<style>{common}{_colours('light')}{dark}</style>"


def _colours(scheme: Scheme) -> str:
    ink, paper = looks.INK[scheme], looks.PAPER[scheme]
    found = [f".paper{{fill:{paper}}}.ink,.faint{{fill:{ink}}}"]
    found.append(f".empty{{fill:none;stroke:{ink};stroke-opacity:.25;stroke-dasharray:3 3}}")
    for step in range(STEPS + 1):
        colour = shade(step / STEPS, scheme)
        found.append(f".c{step}{{fill:{colour}}}.t{step}{{fill:{readable_on(colour)}}}")
    # Without an outline the cells of 0 % would be holes in the map.
    found.append(f".c0{{stroke:{ink};stroke-opacity:.25}}")
    return "".join(found)


def shade(share: float, scheme: Scheme) -> str:
    """Return the colour of a share in [0, 1], between the three of `looks.SCALE`."""
    low, middle, high = (_rgb(colour) for colour in looks.SCALE[scheme])
    first, second, part = (low, middle, 2 * share) if share < 0.5 else (middle, high, 2 * share - 1)
    mixed = [round(a + (b - a) * part) for a, b in zip(first, second, strict=True)]
    return "#" + "".join(f"{value:02X}" for value in mixed)


def readable_on(colour: str) -> str:
    """Return black or white, whichever stands out more on a colour."""
    return max(("#000000", "#FFFFFF"), key=lambda ink: contrast(ink, colour))


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours as WCAG 2 defines it, from 1 to 21."""
    darker, lighter = sorted((_luminance(one), _luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: str) -> float:
    linear = [
        v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4
        for v in (value / 255 for value in _rgb(colour))
    ]
    return sum(weight * v for weight, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _rgb(colour: str) -> tuple[int, int, int]:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return red, green, blue
