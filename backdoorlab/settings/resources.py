"""Folders of methods and resources: in a checkout, in an installed package, or of plugins."""

import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import Literal

Kind = Literal["attack", "defense"]
PACKAGE = Path(__file__).parents[1]


def named(kind: Kind) -> dict[str, Path]:
    """Return name -> file of every method, in alphabetical order.

    Of two files with one name the first in the order of `folders` counts; the other is reported.
    """
    found: dict[str, Path] = {}
    for folder in folders(kind):
        for path in sorted(folder.glob("*.py")):
            # Files such as __init__.py are no methods.
            if path.name.startswith("_"):
                continue
            kept = found.setdefault(path.stem, path)
            if kept.resolve() != path.resolve():
                inform(
                    f"{path} is not used: {kind} {path.stem} is {kept}. Give the file another name"
                )
    return dict(sorted(found.items()))


def folders(kind: Kind) -> list[Path]:
    """Return every folder that is searched for methods of that kind."""
    found = [home(kind), *(plugins / kind for plugins in _plugins())]
    return [folder for folder in found if folder.is_dir()]


def resource(name: str) -> Path:
    """Return the path of a file or folder of resource/."""
    return home("resource") / name


def _plugins() -> list[Path]:
    """Return the folders that BACKDOORLAB_PLUGINS names; report those without a method folder."""
    entries = os.environ.get("BACKDOORLAB_PLUGINS", "").split(os.pathsep)
    found = [Path(entry) for entry in entries if entry]
    for folder in found:
        if not (folder / "attack").is_dir() and not (folder / "defense").is_dir():
            wrong = "has no folder attack/ or defense/" if folder.is_dir() else "does not exist"
            inform(f"BACKDOORLAB_PLUGINS: {folder} {wrong}")
    return found


@lru_cache(maxsize=256)
def inform(line: str) -> None:
    """Print a warning on stderr, once per process; it begins with two spaces."""
    print("  " + " ".join(line.split()), file=sys.stderr)


def home(name: str) -> Path:
    """Return attack/, defense/ or resource/ of the checkout, or else of the installed package."""
    # Only a checkout has a setup.py beside the package.
    checkout = PACKAGE.parent
    return checkout / name if (checkout / "setup.py").exists() else PACKAGE / name
