"""The one exception that reaches a user as one line."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Bad input: the message says what was expected, what came, and what to do. Printed as one
    line, exit code 2."""


def suggest(word: str, known: Iterable[str]) -> str:
    """' Did you mean X?' when a known word is close, else ''."""
    close = get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def described(value: object) -> str:
    """What somebody handed over, in words: "float32 (3, 4)", or the name of its type."""
    shape = getattr(value, "shape", None)
    return (
        type(value).__name__
        if shape is None
        else f"{str(getattr(value, 'dtype', '')).removeprefix('torch.')} {tuple(shape)}".strip()
    )


def one_line(complaint: object) -> str:
    """A complaint as one printable line, whatever file name or text of others is in it."""
    return "error: " + "".join(
        c if c.isprintable() else " " for c in " ".join(str(complaint).split())
    )
