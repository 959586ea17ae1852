"""Where the folders of methods and resources lie: in a checkout, inside an installed package, or in
plugins."""

import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import Literal

Kind = Literal["attack", "defense"]
PACKAGE = Path(__file__).parents[1]


def named(kind: Kind) -> dict[str, Path]:
    """name -> file of every method, in alphabetical order; of two with one name the first
    counts."""
    found: dict[str, Path] = {}
    for folder in folders(kind):
        for path in sorted(folder.glob("*.py")):
            if path.name.startswith("_"):
                continue
            kept = found.setdefault(path.stem, path)
            if kept.resolve() != path.resolve():
                inform(
                    f"{path} is not used: {kind} {path.stem} is {kept}. Give the file another name"
                )
    return dict(sorted(found.items()))


def folders(kind: Kind) -> list[Path]:
    """Every folder that is searched for methods of that kind."""
    return [
        folder
        for folder in (home(kind), *(plugins / kind for plugins in _plugins()))
        if folder.is_dir()
    ]


def resource(name: str) -> Path:
    """A file or folder of resource/."""
    return home("resource") / name


def _plugins() -> list[Path]:
    """The folders named by BACKDOORLAB_PLUGINS."""
    found = [
        Path(entry)
        for entry in os.environ.get("BACKDOORLAB_PLUGINS", "").split(os.pathsep)
        if entry
    ]
    for folder in found:
        if not (folder / "attack").is_dir() and not (folder / "defense").is_dir():
            inform(
                f"BACKDOORLAB_PLUGINS: {folder}"
                f" {'has no folder attack/ or defense/' if folder.is_dir() else 'does not exist'}"
            )
    return found


@lru_cache(maxsize=256)
def inform(line: str) -> None:
    """Say something once that ends nothing: such lines begin with two spaces."""
    print("  " + " ".join(line.split()), file=sys.stderr)


def home(name: str) -> Path:
    checkout = PACKAGE.parent
    return checkout / name if (checkout / "setup.py").exists() else PACKAGE / name
