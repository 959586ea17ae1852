"""Methods are files: a name is the name of a file in attack/ or defense/, and nothing keeps a list.

Looked at, in this order: the folders of a checkout, the ones inside an installed package, and
`attack/` and `defense/` below every folder named by BACKDOORLAB_PLUGINS. A file of these that
cannot be used is a line on the error stream, and an error only for who asks for it.
"""

import importlib.util
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from .. import config
from ..errors import UserError, suggest
from ..storage.schema import ASSUMABLE, WORD
from .resources import Kind, home, inform, named

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


def available(kind: Kind) -> dict[str, Path]:
    """As `named`, of those that can be loaded: plugins are loaded to find out."""
    found = {}
    for name, path in named(kind).items():
        try:
            if path.parent != home(kind):
                from_file(kind, path)
        except UserError as error:
            inform(f"{kind} {name} is left out: {error}")
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
    """Load a method file. It is entered in sys.modules before it runs: dataclasses look themselves
    up there."""
    path = path.resolve()
    module_name = f"{_MODULE}{kind}_{path.stem}"
    loaded = sys.modules.get(module_name)
    try:
        source = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be imported ({type(error).__name__}: {error})") from error
    if (
        loaded is None
        or Path(loaded.__file__ or "") != path
        or loaded.__dict__.get(_SOURCE) != source
    ):
        spec = importlib.util.spec_from_file_location(module_name, path)
        if spec is None or spec.loader is None:
            raise UserError(f"{path}: not a Python file")
        loaded = importlib.util.module_from_spec(spec)
        loaded.__dict__[_SOURCE] = source
        sys.modules[module_name] = loaded
        try:
            # These bytes: Python's cache goes by size and whole seconds
            exec(compile(source, path, "exec"), loaded.__dict__)
        except BaseException as error:
            del sys.modules[module_name]
            if isinstance(error, UserError) or not isinstance(error, (Exception, SystemExit)):
                raise
            where = raised_in(error) or (
                f"{path}:{error.lineno}" if isinstance(error, SyntaxError) else path
            )
            raise UserError(
                f"{where}: cannot be imported ({type(error).__name__}: {error})"
            ) from error
    _check(kind, path, loaded)
    return Method(kind, path.stem, path, loaded)


def raised_in(error: BaseException) -> str:
    """FILE:LINE of the method file that an exception came through last; '' if it came through
    none."""
    places = [
        (frame.f_globals.get("__name__", ""), frame.f_code.co_filename, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    return next(
        (
            f"{file}:{line}"
            for module, file, line in reversed(places)
            if module.startswith((f"{_MODULE}attack_", f"{_MODULE}defense_"))
        ),
        "",
    )


def _check(kind: Kind, path: Path, module: ModuleType) -> None:
    wanted = {"attack": ("Config",), "defense": ("Config", "ASSUMES", "defend")}[kind]
    missing = [name for name in wanted if not hasattr(module, name)]
    if not WORD.fullmatch(path.stem):  # records carry the name, and their reader takes no other
        raise UserError(
            f"{path}: a method is called as its file is, in letters, digits, and _ . + -: rename"
            f" the file, as my_{kind}.py"
        )
    if (kind, path.stem) == ("defense", "none"):
        raise UserError(
            f"{path}: in every table `none` is the model without a defense: rename the file"
        )
    if kind == "attack" and not hasattr(module, "stamp") and not hasattr(module, "attack"):
        missing.append("stamp or attack")
    if missing:
        raise UserError(
            f"{path}: a method file of {kind}/ defines {', '.join(wanted)}; this one lacks"
            f" {', '.join(missing)}"
        )
    if kind == "defense":
        assumes = module.ASSUMES
        if not isinstance(assumes, (tuple, list)) or not all(
            isinstance(word, str) and word in ASSUMABLE for word in assumes
        ):
            raise UserError(
                f"{path}: ASSUMES is a tuple of some of {', '.join(ASSUMABLE)}, found {assumes!r}"
            )
    _check_config(kind, path, module)


def _check_config(kind: Kind, path: Path, module: ModuleType) -> None:
    bases: tuple[type[Any], ...] = (
        (config.TrainingConfig,) if kind == "attack" else (config.DefenseConfig,)
    )
    if kind == "attack" and not hasattr(module, "attack"):  # what stamps says whom, and as what
        bases = (config.AttackConfig, config.CleanLabelConfig)
    elif kind == "defense" and "seeds" in module.ASSUMES:
        bases = (config.SeedsConfig,)
    found = module.Config
    if (
        not isinstance(found, type)
        or not issubclass(found, bases)
        or "__dataclass_fields__" not in vars(found)
    ):
        wanted = " or ".join(base.__name__ for base in bases)
        raise UserError(
            f"{path}: expected @dataclass(frozen=True, kw_only=True) above class Config({wanted}),"
            f" found {found!r}"
        )
    try:
        config.refuse_ranges(found)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
