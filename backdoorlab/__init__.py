"""backdoorlab: a benchmark of backdoor attacks and defenses for image classifiers."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import attack, defend, table
    from .errors import UserError

__version__ = "0.1.0"
__all__ = ["UserError", "attack", "defend", "table"]


def __getattr__(name: str) -> Any:
    """attack, defend and table come with torch, which takes seconds: not before they are asked
    for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import api

    return getattr(api, name)
