"""The colours and shapes of charts, which are the same on the page and in figures.

A look is a number. TEXT is what no defense made, from 0 on come the defenses, and from MEASURES on
what is measured of one defense.
"""

from collections.abc import Iterable
from typing import Literal

from ..settings import methods
from ..tables.rows import UNDEFENDED

# People without one of the three kinds of cones tell these apart, too, on white and on black, and
# from the colour of text. tests/report/test_report.py measures it.
LIGHT = ("#AF9100", "#06A873", "#054E91", "#954872", "#7D8CCF", "#862300", "#FF1C55")
"""Colours of defenses on white."""
DARK = ("#F4D122", "#3BFB8E", "#8FB9FF", "#C21E94", "#4754DB", "#B77900", "#D7164D")
"""Colours of defenses on black."""
MEASURES_LIGHT = ("#C9149A", "#007D61", "#B07318", "#5B2BD0")
"""Colours of scores on white. No defense has one of them."""
MEASURES_DARK = ("#B53E7A", "#01FF4C", "#5A7314", "#A401FF")
"""Colours of scores on black."""
INK = {"light": "#14213D", "dark": "#E6EDF3"}
"""Colour of text."""
PAPER = {"light": "#FFFFFF", "dark": "#14171C"}
"""Colour of the background."""
SCALE = {
    "light": (PAPER["light"], "#6BAED6", "#08306B"),
    "dark": (PAPER["dark"], "#2F6FA8", "#D6ECFF"),
}
"""Colours of a grid at 0, 50 and 100 %. 0 is the background."""
SHAPES = (
    "circle",
    "square",
    "diamond",
    "triangle-up",
    "triangle-down",
    "cross",
    "star",
    "pentagon",
    "hexagon",
)
"""Colours repeat after seven defenses and shapes after nine, so 63 defenses differ."""
METHODS = ("asd", "bu", "dau", "ft", "ibau", "sau")
"""Defenses with the first looks, in this order; all others follow in alphabetical order."""
TEXT = -1
"""The look of the undefended model: an x in the colour of text."""
MEASURES = 100
"""The first look of what is measured of one defense."""


def of_defenses(defenses: Iterable[str]) -> dict[str, int]:
    """Give each known defense, and each of these, a look that does not depend on the others shown.

    Returns:
        Name of the defense -> its look, UNDEFENDED first.
    """
    # New defenses come last, so that the first ones keep their colours.
    others = {*methods.available("defense"), *defenses} - {UNDEFENDED, *METHODS}
    ordered = (*METHODS, *sorted(others))
    return {UNDEFENDED: TEXT} | {name: number for number, name in enumerate(ordered)}


def colour(look: int) -> str:
    """Name the colour of a look: "ink", "look-0", "look-1", ..., "measure-0", ..."""
    if look == TEXT:
        return "ink"
    if look >= MEASURES:
        return f"measure-{(look - MEASURES) % len(MEASURES_LIGHT)}"
    return f"look-{look % len(LIGHT)}"


def shape(look: int) -> str:
    """Name the shape of a look: "x" or one of SHAPES."""
    if look == TEXT:
        return "x"
    return SHAPES[(look - MEASURES if look >= MEASURES else look) % len(SHAPES)]


def palette(scheme: Literal["light", "dark"]) -> dict[str, str]:
    """Return every colour of the charts: its name -> "#rrggbb"."""
    defenses, measures = (LIGHT, MEASURES_LIGHT) if scheme == "light" else (DARK, MEASURES_DARK)
    found = {"ink": INK[scheme], "paper": PAPER[scheme]}
    for family, values in (("look", defenses), ("measure", measures), ("scale", SCALE[scheme])):
        found |= {f"{family}-{number}": value for number, value in enumerate(values)}
    return found
