"""Methods are files: a name is the name of a file in attack/ or defense/, and nothing keeps a list.

Looked at, in this order: the folders of a checkout, the ones inside an installed package, and `attack/` and `defense/`
below every folder named by BACKDOORLAB_PLUGINS. A file of these that cannot be used is a line on the error stream, and an
error only for who asks for it.
"""

import importlib.util
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from .errors import UserError, suggest
from .schema import ASSUMABLE, WORD

Kind = Literal["attack", "defense"]
PACKAGE = Path(__file__).parent
_MODULE = "backdoorlab_"
_SOURCE = "__backdoorlab_source__"


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


def named(kind: Kind) -> dict[str, Path]:
    """name -> file of every method, in alphabetical order; of two with one name the first counts."""
    found: dict[str, Path] = {}
    for folder in folders(kind):
        for path in sorted(folder.glob("*.py")):
            if path.name.startswith("_"):
                continue
            kept = found.setdefault(path.stem, path)
            if kept.resolve() != path.resolve():
                _inform(f"{path} is not used: {kind} {path.stem} is {kept}. Give the file another name")
    return dict(sorted(found.items()))


def available(kind: Kind) -> dict[str, Path]:
    """As `named`, of those that can be loaded: plugins are loaded to find out."""
    found = {}
    for name, path in named(kind).items():
        try:
            if path.parent != _home(kind):
                from_file(kind, path)
        except UserError as error:
            _inform(f"{kind} {name} is left out: {error}")
        else:
            found[name] = path
    return found


def load(kind: Kind, name: str) -> Method:
    """The method of that name; an unknown one is answered with the known ones."""
    files = named(kind)
    if name not in files:
        known = available(kind)
        raise UserError(f"unknown {kind} {name!r}.{suggest(name, known)} Known: {', '.join(known)}")
    return from_file(kind, files[name])


def from_file(kind: Kind, path: Path) -> Method:
    """Load a method file. It is entered in sys.modules before it runs: dataclasses look themselves up there."""
    path = path.resolve()
    module_name = f"{_MODULE}{kind}_{path.stem}"
    loaded = sys.modules.get(module_name)
    try:
        source = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be imported ({type(error).__name__}: {error})") from error
    if loaded is None or Path(loaded.__file__ or "") != path or loaded.__dict__.get(_SOURCE) != source:
        spec = importlib.util.spec_from_file_location(module_name, path)
        if spec is None or spec.loader is None:
            raise UserError(f"{path}: not a Python file")
        loaded = importlib.util.module_from_spec(spec)
        loaded.__dict__[_SOURCE] = source
        sys.modules[module_name] = loaded
        try:
            exec(compile(source, path, "exec"), loaded.__dict__)  # these bytes: Python's cache goes by size and whole seconds
        except BaseException as error:
            del sys.modules[module_name]
            if isinstance(error, UserError) or not isinstance(error, (Exception, SystemExit)):
                raise
            where = raised_in(error) or (f"{path}:{error.lineno}" if isinstance(error, SyntaxError) else path)
            raise UserError(f"{where}: cannot be imported ({type(error).__name__}: {error})") from error
    _check(kind, path, loaded)
    return Method(kind, path.stem, path, loaded)


def raised_in(error: BaseException) -> str:
    """FILE:LINE of the method file that an exception came through last; '' if it came through none."""
    places = [(frame.f_globals.get("__name__", ""), frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    return next((f"{file}:{line}" for module, file, line in reversed(places) if module.startswith((f"{_MODULE}attack_", f"{_MODULE}defense_"))), "")


def folders(kind: Kind) -> list[Path]:
    """Every folder that is searched for methods of that kind."""
    return [folder for folder in (_home(kind), *(plugins / kind for plugins in _plugins())) if folder.is_dir()]


def resource(name: str) -> Path:
    """A file or folder of resource/."""
    return _home("resource") / name


def _plugins() -> list[Path]:
    """The folders named by BACKDOORLAB_PLUGINS."""
    found = [Path(entry) for entry in os.environ.get("BACKDOORLAB_PLUGINS", "").split(os.pathsep) if entry]
    for folder in found:
        if not (folder / "attack").is_dir() and not (folder / "defense").is_dir():
            _inform(f"BACKDOORLAB_PLUGINS: {folder} {'has no folder attack/ or defense/' if folder.is_dir() else 'does not exist'}")
    return found


@lru_cache(maxsize=256)
def _inform(line: str) -> None:
    """Say something once that ends nothing: such lines begin with two spaces."""
    print("  " + " ".join(line.split()), file=sys.stderr)


def _home(name: str) -> Path:
    checkout = PACKAGE.parent
    return checkout / name if (checkout / "setup.py").exists() else PACKAGE / name


def _check(kind: Kind, path: Path, module: ModuleType) -> None:
    wanted = {"attack": ("Config",), "defense": ("Config", "ASSUMES", "defend")}[kind]
    missing = [name for name in wanted if not hasattr(module, name)]
    if not WORD.fullmatch(path.stem):  # records carry the name, and their reader takes no other
        raise UserError(f"{path}: a method is called as its file is, in letters, digits, and _ . + -: rename the file, as my_{kind}.py")
    if (kind, path.stem) == ("defense", "none"):
        raise UserError(f"{path}: in every table `none` is the model without a defense: rename the file")
    if kind == "attack" and not hasattr(module, "stamp") and not hasattr(module, "attack"):
        missing.append("stamp or attack")
    if missing:
        raise UserError(f"{path}: a method file of {kind}/ defines {', '.join(wanted)}; this one lacks {', '.join(missing)}")
    if kind == "defense":
        assumes = module.ASSUMES
        if not isinstance(assumes, (tuple, list)) or not all(isinstance(word, str) and word in ASSUMABLE for word in assumes):
            raise UserError(f"{path}: ASSUMES is a tuple of some of {', '.join(ASSUMABLE)}, found {assumes!r}")
    _check_config(kind, path, module)


def _check_config(kind: Kind, path: Path, module: ModuleType) -> None:
    from . import config  # which asks this module for the folder of its files

    bases: tuple[type[Any], ...] = (config.TrainingConfig,) if kind == "attack" else (config.DefenseConfig,)
    if kind == "attack" and not hasattr(module, "attack"):  # what stamps says whom, and as what
        bases = (config.AttackConfig, config.CleanLabelConfig)
    elif kind == "defense" and "seeds" in module.ASSUMES:
        bases = (config.SeedsConfig,)
    found = module.Config
    if not isinstance(found, type) or not issubclass(found, bases) or "__dataclass_fields__" not in vars(found):
        wanted = " or ".join(base.__name__ for base in bases)
        raise UserError(f"{path}: expected @dataclass(frozen=True, kw_only=True) above class Config({wanted}), found {found!r}")
    try:
        config.refuse_ranges(found)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
