"""`--help`: the options of a method in three groups, or those of a command in one."""

import ast
import dataclasses
import inspect
import itertools
import re
import sys
import textwrap
from collections.abc import Sequence
from typing import Annotated, Any, get_type_hints

import tyro

from ..config import RUN_OPTIONS, DefenseConfig, MethodConfig, SeedsConfig, TrainingConfig

OF_THE_RUN = RUN_OPTIONS - {"dataset_path", "dataset_config"} | {"seed", "precision", "score_every"}
"""Fields of the last group: where and how to run."""
REQUIRED = ("save_folder_name", "result_file")
"""Fields of that group without a usable default, which come first in it."""
OF_DATA_AND_MODEL = (MethodConfig, TrainingConfig, DefenseConfig, SeedsConfig)
"""Classes whose other fields are the second group: data, model and training."""


def show(config_class: type[Any], prog: str) -> None:
    """Print the help text and exit with code 0.

    Args:
        config_class: dataclass of the options, of a method or of a command.
        prog: what the user typed to start it.
    """
    shown = config_class
    if issubclass(config_class, MethodConfig):
        # tyro makes a box of each nested dataclass and calls it "NAME options".
        shown = dataclasses.make_dataclass(
            "Grouped",
            [
                (
                    title.replace(" ", "_"),
                    Annotated[
                        _explained(config_class, names),
                        tyro.conf.OmitArgPrefixes,
                        tyro.conf.arg(name=title),
                    ],
                )
                for title, names in groups(config_class).items()
            ],
        )
    else:
        shown = _explained(config_class, [f.name for f in dataclasses.fields(config_class)])

    # tyro prints the text and raises SystemExit.
    tyro.cli(
        shown,
        args=["--help"],
        prog=prog,
        config=(tyro.conf.FlagConversionOff,),
        description=about(config_class),
        use_underscores=True,
    )


def groups(config_class: type[MethodConfig]) -> dict[str, list[str]]:
    """Return the field names of a method's options by title, in the order of `--help`.

    The first group begins with the fields of the method's own file.
    """
    # Fields that the method's own file declares stand first in their group.
    found: dict[str, list[str]] = {"method": [], "data and model": [], "run": []}
    declared = inspect.get_annotations(config_class)
    names = [f.name for f in dataclasses.fields(config_class)]

    # The class that declares a field last decides: a method may replace a common field.
    for name in sorted(names, key=lambda name: name not in declared):
        owner = next(base for base in config_class.__mro__ if name in inspect.get_annotations(base))
        if name in OF_THE_RUN:
            found["run"].append(name)
        elif owner in OF_DATA_AND_MODEL:
            found["data and model"].append(name)
        else:
            found["method"].append(name)
    found["run"].sort(key=lambda name: name not in REQUIRED)
    return found


def about(config_class: type[Any]) -> str:
    """Return the first lines of `--help`: a method's title and first link, or a command's task."""
    if not issubclass(config_class, MethodConfig):
        return config_class.__doc__ or ""
    text = getattr(sys.modules.get(config_class.__module__), "__doc__", None) or ""
    title = text.strip().split("\n")[:1]
    links = [link.rstrip(".,;)") for link in re.findall(r"https?://\S+", text)[:1]]
    return "\n".join([*title, *links])


def texts(config_class: type[Any]) -> dict[str, str]:
    """Return the docstring of each field, on one line; a subclass's replaces its base's."""
    found = {}
    for owner in reversed(config_class.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        try:
            (definition,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        except OSError:  # no source, so no texts
            continue
        assert isinstance(definition, ast.ClassDef)
        # The docstring of a field is the string that follows it.
        for field, text in itertools.pairwise(definition.body):
            match field, text:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(words))),
                ):
                    found[name] = " ".join(words.split())
    return found


def _explained(config_class: type[Any], names: Sequence[str]) -> type[Any]:
    """Return a dataclass of these fields, in this order, with their texts for tyro."""
    # The texts are passed on: tyro would keep the line breaks of the source.
    hints, said = get_type_hints(config_class, include_extras=True), texts(config_class)
    fields = {f.name: f for f in dataclasses.fields(config_class)}
    return dataclasses.make_dataclass(
        "Explained",
        [
            (
                name,
                Annotated[hints[name], tyro.conf.arg(help=said.get(name))],
                dataclasses.field(
                    default=fields[name].default, default_factory=fields[name].default_factory
                ),
            )
            for name in names
        ],
        kw_only=True,
    )
