"""Find and load methods: a method is a file in attack/ or defense/, and its name is the file's.

Searched are, in this order:
  - attack/ and defense/ of the checkout, or of the installed package;
  - attack/ and defense/ in every folder that BACKDOORLAB_PLUGINS names.

A file that cannot be loaded is reported on stderr. It is an error only if it is asked for.
"""

import importlib.util
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from .. import config
from ..errors import UserError, suggest
from ..storage.schema import ASSUMABLE, WORD
from .resources import Kind, inform, named

Role = Literal["defense", "detector", "unlearner"]
"""What a file in defense/ is. A detector defines `detect` in place of `defend`, and an unlearner
assumes a split."""
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
        """The dataclass of its options."""
        return self.module.Config

    @property
    def title(self) -> str:
        """The first line of the file's docstring."""
        return (self.module.__doc__ or self.name).strip().split("\n")[0]

    @property
    def limits(self) -> str:
        """Where an attack does not work, and why, in one line; "" if nothing is known."""
        return str(getattr(self.module, "LIMITS", ""))

    @property
    def assumes(self) -> tuple[str, ...]:
        """What a defense needs in its view: some of the words in `storage.schema.ASSUMABLE`."""
        return tuple(self.module.ASSUMES)

    @property
    def role(self) -> Role:
        """What a file in defense/ is, by what it defines."""
        if hasattr(self.module, "detect"):
            return "detector"
        return "unlearner" if "split" in self.assumes else "defense"

    def function(self, name: str) -> Callable[..., Any] | None:
        """Return a function of the file, or None if it does not define it."""
        return getattr(self.module, name, None)


def available(kind: Kind) -> dict[str, Path]:
    """Return `named` without the files that cannot be loaded, each of which is reported."""
    found = {}
    for name, path in named(kind).items():
        try:
            from_file(kind, path)
        except UserError as error:
            inform(f"{kind} {name} is left out: {error}")
        else:
            found[name] = path
    return found


def load(kind: Kind, name: str) -> Method:
    """Load the method of that name; a `UserError` for an unknown name lists the known ones."""
    files = named(kind)
    if name not in files:
        known = available(kind)
        raise UserError(f"unknown {kind} {name!r}.{suggest(name, known)} Known: {', '.join(known)}")
    return from_file(kind, files[name])


def with_role(role: Role) -> list[str]:
    """List the names of the files in defense/ that have this role."""
    files = available("defense").items()
    return [name for name, path in files if from_file("defense", path).role == role]


def from_file(kind: Kind, path: Path) -> Method:
    """Load a method file, or return it as loaded before if its content has not changed since.

    Raises:
        UserError: if the file cannot be imported, or is not a method of that kind.
    """
    path = path.resolve()
    module_name = f"{_MODULE}{kind}_{path.stem}"
    try:
        source = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be imported ({type(error).__name__}: {error})") from error
    loaded = sys.modules.get(module_name)
    same_file = loaded is not None and Path(loaded.__file__ or "") == path
    if loaded is None or not same_file or loaded.__dict__.get(_SOURCE) != source:
        loaded = _executed(module_name, path, source)
    _check(kind, path, loaded)
    return Method(kind, path.stem, path, loaded)


def _executed(module_name: str, path: Path, source: bytes) -> ModuleType:
    """Import a file of that content under a name in `sys.modules`."""
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path}: not a Python file")
    loaded = importlib.util.module_from_spec(spec)
    loaded.__dict__[_SOURCE] = source
    # Before it runs, because dataclasses look up their module by name.
    sys.modules[module_name] = loaded
    try:
        # The bytes themselves: Python's cache of compiled files tells two versions apart by size
        # and whole seconds only.
        exec(compile(source, path, "exec"), loaded.__dict__)
    except BaseException as error:
        del sys.modules[module_name]
        if isinstance(error, UserError) or not isinstance(error, (Exception, SystemExit)):
            raise
        line = f"{path}:{error.lineno}" if isinstance(error, SyntaxError) else path
        where = raised_in(error) or line
        raise UserError(f"{where}: cannot be imported ({type(error).__name__}: {error})") from error
    return loaded


def raised_in(error: BaseException) -> str:
    """Return FILE:LINE of the innermost method file in a traceback; "" if there is none."""
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
    """Raise a `UserError` if a loaded file is not a method of that kind."""
    wanted = {"attack": ("Config",), "defense": ("Config", "ASSUMES", "defend")}[kind]
    # A detector answers with a detection in place of a model.
    if kind == "defense" and hasattr(module, "detect"):
        wanted = ("Config", "ASSUMES", "detect")
    missing = [name for name in wanted if not hasattr(module, name)]
    # Records store the name, and reading one refuses any other characters.
    if not WORD.fullmatch(path.stem):
        raise UserError(
            f"{path}: the file name is the method's name, of letters, digits and _ . + -: rename"
            f" the file, such as my_{kind}.py"
        )
    if (kind, path.stem) == ("defense", "none"):
        raise UserError(
            f"{path}: in every table `none` is the model without a defense: rename the file"
        )

    # An attack is a stamp, or controls its training itself.
    if kind == "attack" and not hasattr(module, "stamp") and not hasattr(module, "attack"):
        missing.append("stamp or attack")
    if missing:
        raise UserError(
            f"{path}: a method file of {kind}/ defines {', '.join(wanted)}; this one lacks"
            f" {', '.join(missing)}"
        )
    if kind == "defense":
        _check_assumes(path, module.ASSUMES)
        _check_role(path, module)
    _check_config(kind, path, module)


def _check_assumes(path: Path, assumes: Any) -> None:
    """Raise a `UserError` unless ASSUMES is a tuple of known words."""
    known = isinstance(assumes, (tuple, list)) and all(
        isinstance(word, str) and word in ASSUMABLE for word in assumes
    )
    if not known:
        raise UserError(
            f"{path}: ASSUMES is a tuple of some of {', '.join(ASSUMABLE)}, found {assumes!r}"
        )


def _check_role(path: Path, module: ModuleType) -> None:
    """Raise a `UserError` for a file that is two kinds of method, or a detector without images."""
    if not hasattr(module, "detect"):
        return
    if hasattr(module, "defend"):
        raise UserError(
            f"{path}: defines detect and defend: expected one of them, so make two files of it"
        )
    if "train" not in module.ASSUMES or "split" in module.ASSUMES:
        raise UserError(
            f"{path}: a detector looks at the training set and gets no split: expected ASSUMES with"
            f" 'train' and without 'split', found {module.ASSUMES!r}"
        )


def _check_config(kind: Kind, path: Path, module: ModuleType) -> None:
    """Raise a `UserError` unless Config is a dataclass of the right base, with valid RANGES."""
    bases: tuple[type[Any], ...] = (
        (config.TrainingConfig,) if kind == "attack" else (config.DefenseConfig,)
    )
    # A stamp alone leaves the choice of images to the library, which needs a poison rate.
    if kind == "attack" and not hasattr(module, "attack"):
        bases = (config.AttackConfig, config.CleanLabelConfig)
    elif kind == "defense":
        options = {"seeds": config.SeedsConfig, "split": config.SplitConfig}
        needed = tuple(base for word, base in options.items() if word in module.ASSUMES)
        bases = needed or bases

    # An attack has one of several bases, a defense that of each thing that it assumes.
    fits = any if kind == "attack" else all
    # A subclass without the decorator would inherit the fields of its base, and no more.
    found = module.Config
    if (
        not isinstance(found, type)
        or not fits(issubclass(found, base) for base in bases)
        or "__dataclass_fields__" not in vars(found)
    ):
        wanted = (" or " if fits is any else ", ").join(base.__name__ for base in bases)
        raise UserError(
            f"{path}: expected @dataclass(frozen=True, kw_only=True) above class Config({wanted}),"
            f" found {found!r}"
        )
    try:
        config.refuse_ranges(found)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
