"""backdoorlab: a benchmark of backdoor attacks and defenses for image classifiers."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import attack, defend, table
    from .errors import UserError
    from .exchange.weights import load_exported

__version__ = "0.1.0"
__all__ = ["UserError", "attack", "defend", "load_exported", "table"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: torch comes with it, which takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "load_exported":
        from .exchange.weights import load_exported

        return load_exported
    from . import api

    return getattr(api, name)
