"""Methods are files: a name is the name of a file in attack/ or defense/, and nothing keeps a list.

Looked at, in this order: the folders of a checkout, the ones inside an installed package, and `attack/` and `defense/`
below every folder named by BACKDOORLAB_PLUGINS.
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from .errors import UserError, suggest

Kind = Literal["attack", "defense"]
PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Method:
    """One attack or defense, loaded from its file."""

    kind: Kind
    name: str
    path: Path
    module: ModuleType

    @property
    def config_class(self) -> type[Any]:
        return self.module.Config

    @property
    def title(self) -> str:
        """The first line of the file's docstring."""
        return (self.module.__doc__ or self.name).strip().split("\n")[0]

    @property
    def limits(self) -> str:
        """Where an attack does not work, and why, in one line; empty where nothing is known."""
        return str(getattr(self.module, "LIMITS", ""))

    @property
    def assumes(self) -> tuple[str, ...]:
        """What a defense needs of its view: some of "model", "train", "trusted"."""
        return tuple(self.module.ASSUMES)

    def function(self, name: str) -> Callable[..., Any] | None:
        return getattr(self.module, name, None)


def available(kind: Kind) -> dict[str, Path]:
    """name -> file, in alphabetical order."""
    found: dict[str, Path] = {}
    for folder in folders(kind):
        for path in sorted(folder.glob("*.py")):
            if not path.name.startswith("_"):
                found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def load(kind: Kind, name: str) -> Method:
    """The method of that name; an unknown one is answered with the known ones."""
    known = available(kind)
    if name not in known:
        raise UserError(f"unknown {kind} {name!r}.{suggest(name, known)} Known: {', '.join(known)}")
    return from_file(kind, known[name])


def from_file(kind: Kind, path: Path) -> Method:
    """Load a method file. It is entered in sys.modules before it runs: dataclasses look themselves up there."""
    path = path.resolve()
    module_name = f"backdoorlab_{kind}_{path.stem}"
    loaded = sys.modules.get(module_name)
    if loaded is None or Path(loaded.__file__ or "") != path:
        spec = importlib.util.spec_from_file_location(module_name, path)
        if spec is None or spec.loader is None:
            raise UserError(f"{path}: not a Python file")
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = loaded
        try:
            spec.loader.exec_module(loaded)
        except BaseException:
            del sys.modules[module_name]
            raise
    _check(kind, path, loaded)
    return Method(kind, path.stem, path, loaded)


def folders(kind: Kind) -> list[Path]:
    """Every folder that is searched for methods of that kind."""
    plugins = [Path(entry) / kind for entry in os.environ.get("BACKDOORLAB_PLUGINS", "").split(os.pathsep) if entry]
    return [folder for folder in (_home(kind), *plugins) if folder.is_dir()]


def resource(name: str) -> Path:
    """A file or folder of resource/."""
    return _home("resource") / name


def _home(name: str) -> Path:
    checkout = PACKAGE.parent
    return checkout / name if (checkout / "setup.py").exists() else PACKAGE / name


def _check(kind: Kind, path: Path, module: ModuleType) -> None:
    wanted = {"attack": ("Config",), "defense": ("Config", "ASSUMES", "defend")}[kind]
    missing = [name for name in wanted if not hasattr(module, name)]
    if kind == "attack" and not hasattr(module, "stamp") and not hasattr(module, "attack"):
        missing.append("stamp or attack")
    if missing:
        raise UserError(f"{path}: a method file of {kind}/ defines {', '.join(wanted)}; this one lacks {', '.join(missing)}")
