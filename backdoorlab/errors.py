"""The one exception that reaches a user as one line."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Bad input. The message says what was expected, what came, and what to do.

    A command prints it as one line and ends with exit code 2.
    """


def suggest(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean X?" if a known word is close, else ""."""
    close = get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def described(value: object) -> str:
    """Describe a value for an error message: "float32 (3, 4)", or the name of its type."""
    shape = getattr(value, "shape", None)
    if shape is None:
        return type(value).__name__
    dtype = str(getattr(value, "dtype", "")).removeprefix("torch.")
    return f"{dtype} {tuple(shape)}".strip()


def one_line(complaint: object) -> str:
    """Write a complaint as one printable line, whatever file name or text of others is in it."""
    # Control characters of a file name could move the cursor of a terminal.
    return "error: " + "".join(
        c if c.isprintable() else " " for c in " ".join(str(complaint).split())
    )
