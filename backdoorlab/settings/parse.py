"""Numbers enter here, once: dataclass defaults < resource/config/<dataset>.yaml < --yaml_path FILE
< flags.

YAML becomes flags and goes through the same parser, so a misspelt key fails like a misspelt flag.
"""

import contextlib
import dataclasses
import io
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
import yaml

from ..config import MethodConfig, as_json
from ..errors import UserError, suggest
from ..models import OWN
from . import resources

C = TypeVar("C", bound="MethodConfig")
SPELLINGS = {
    "schedule": {"CosineAnnealingLR": "cosine", "ReduceLROnPlateau": "plateau"},
    "optimizer": {"SGD": "sgd", "Adam": "adam"},
}
"""Field -> what BackdoorBench and torch call its values -> what we do."""
READ_AS: dict[Any, tuple[str, Callable[[str], object]]] = {
    bool: ("True or False", ("True", "False").index),
    int: ("a whole number", int),
    float: ("a number", float),
}
"""Types of values that a command line gets wrong: in words, and what raises ValueError for a text
that is none."""


class Trained(NamedTuple):
    """The model that a command trains or gets."""

    dataset: str
    epochs: int | None
    """None where nobody knows."""


@dataclass(frozen=True)
class Parsed:
    """A config, and where each value that is not a default came from."""

    config: Any
    origins: dict[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        values = dataclasses.asdict(self.config)
        return "  ".join(
            f"{name} {_text(values[name])} ({origin})" for name, origin in self.origins.items()
        )


def parse(
    config_class: type[C],
    method: str,
    kind: str,
    argv: Sequence[str],
    trained: Callable[[Any], Trained],
    prog: str,
) -> Parsed:
    """Flags and YAML files -> a frozen config. `trained(config)` tells the model that it is about,
    whose data set's YAML applies."""
    layers: list[tuple[str, list[str]]] = [("flag", list(argv))]
    config = _parse_flags(config_class, layers, prog)
    if config.yaml_path:
        layers.insert(0, _yaml_layer(config_class, config.yaml_path))
        config = _parse_flags(config_class, layers, prog)
    if (
        getattr(config, "dataset", None)
        and config.dataset_path
        and "dataset" not in _origins(config_class, layers)
    ):
        raise UserError(
            f"--dataset_path {config.dataset_path}: which data set is that? Pass --dataset NAME"
            " besides, any name for data of your own"
        )
    dataset = trained(config).dataset
    file, sections = f"{dataset}.yaml", _dataset_yaml(dataset)
    if sections:
        # A data set's width is for networks that have one
        if getattr(config, "model", None) not in (None, *OWN):
            sections = _without("width", sections)
        found = _section_layers(config_class, sections, (kind, method), file)
        config = _parse_flags(config_class, found + layers, prog)
        epochs, short = trained(config).epochs, sections.get("short_run")
        if short and epochs is not None and epochs < short["epochs_below"]:
            found += _section_layers(config_class, short, (kind, method), f"{file}: short_run")
            config = _parse_flags(config_class, found + layers, prog)
        layers = found + layers
    return Parsed(config, _origins(config_class, layers))


def _section_layers(
    config_class: type[Any], sections: Mapping[str, Any], names: Sequence[str], where: str
) -> list[tuple[str, list[str]]]:
    return [
        (where, as_flags(config_class, sections[name], f"{where}: {name}"))
        for name in names
        if name in sections
    ]


def _without(key: str, sections: Mapping[str, Any]) -> dict[str, Any]:
    """Sections without the lines of that key, those of short_run included."""
    return {
        name: _without(key, lines) if isinstance(lines, dict) else lines
        for name, lines in sections.items()
        if name != key
    }


def published(dataset: str) -> dict[str, Any]:
    """The section `attack` of a data set's YAML: its published training and normalisation; {}
    without one."""
    return dict(_dataset_yaml(dataset).get("attack", {}))


def parse_plain(options_class: type[Any], argv: Sequence[str], prog: str) -> Any:
    """Flags alone -> options, with the same one-line complaints."""
    return _parse_flags(options_class, [("flag", list(argv))], prog)


def _parse_flags(config_class: type[Any], layers: list[tuple[str, list[str]]], prog: str) -> Any:
    """Later layers win. Each flag reaches the parser once, under its field's name."""
    known = flag_names(config_class)
    given: dict[str, list[str]] = {}
    loose: list[str] = []
    for origin, flags in layers:
        field_name, here = None, set()
        for token in flags:
            name, equals, value = token.partition("=")
            if not name.startswith("--"):
                (given[field_name] if field_name else loose).append(token)
                continue
            key = name[2:].replace("-", "_")
            if key not in known and key != "help":
                where = "" if origin == "flag" else f" ({origin})"
                raise UserError(
                    f"unknown flag {name}{where}.{_suggest_flag(key, known)} See --help"
                )
            field_name = known.get(key, key)
            # A name after the first would be lost
            if field_name in here and len(given[field_name]) > 1:
                raise UserError(
                    f"{name} is given twice, with more than one word after the first:"
                    f" {' '.join(given[field_name])}. Give it once"
                )
            here.add(field_name)
            given[field_name] = [value] if equals else []
    for field_name, spelt in SPELLINGS.items():
        if field_name in given:
            given[field_name] = [spelt.get(value, value) for value in given[field_name]]
    arguments = [word for name, values in given.items() for word in _flag(name, values)]
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                config_class,
                args=[*loose, *arguments],
                prog=prog,
                config=(tyro.conf.FlagConversionOff,),
                description=_about(config_class),
                use_underscores=True,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_misread(config_class, given) or _one_line(complaint.getvalue())) from None


def _flag(name: str, values: Sequence[str]) -> list[str]:
    return (
        [f"--{name}={values[0]}"]
        if len(values) == 1 and values[0].startswith("--")
        else [f"--{name}", *values]
    )


def _about(config_class: type[Any]) -> str:
    """What --help begins with: a method's title and the first link of its file, or what a command
    does."""
    if not issubclass(config_class, MethodConfig):
        return config_class.__doc__ or ""
    text = getattr(sys.modules.get(config_class.__module__), "__doc__", None) or ""
    return "\n".join(
        [
            *text.strip().split("\n")[:1],
            *(link.rstrip(".,;)") for link in re.findall(r"https?://\S+", text)[:1]),
        ]
    )


def _misread(config_class: type[Any], given: Mapping[str, Sequence[str]]) -> str:
    """Which flag has a value that its type cannot have, in words; '' where none has."""
    for name, hint in get_type_hints(config_class).items():
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        many = next((get_args(kind)[0] for kind in kinds if get_origin(kind) is tuple), None)
        kind = many or next((kind for kind in kinds if kind in READ_AS), None)
        if name not in given or kind not in READ_AS:
            continue
        (words, read), values = READ_AS[kind], given[name]
        try:
            if not values and not many:  # many may be none
                raise ValueError
            for value in values if many else values[:1]:
                if not (value == "None" and NoneType in kinds):
                    read(value)
        except ValueError:
            got = (
                f", got {' '.join(values)!r}"
                if values
                else f": --{name} True"
                if kind is bool
                else ", got nothing"
            )
            return f"--{name} takes {'numbers' if many else words}{got}. See --help"
    return ""


def _yaml_layer(config_class: type[Any], path: str) -> tuple[str, list[str]]:
    file = Path(path)
    if not file.exists():
        preset = resources.resource("config") / f"{path}.yaml"
        if not preset.exists():
            presets = sorted(
                p.stem
                for p in resources.resource("config").glob("*.yaml")
                if not p.stem.startswith("bench_")
            )
            shown = [
                name
                for name in presets
                if not {"attack", "defense"}
                & set(read_yaml(resources.resource("config") / f"{name}.yaml"))
            ]
            raise UserError(
                f"--yaml_path {path}: no such file, and no preset of that name. Presets:"
                f" {', '.join(shown)}"
            )
        file = preset
    content = read_yaml(file)
    sections = sorted({"attack", "defense"} & set(content) - set(flag_names(config_class)))
    if sections:
        raise UserError(
            f"{file}: --yaml_path takes flags as keys, found the section {sections[0]!r}. A data"
            " set's settings are read by themselves"
        )
    if "yaml_path" in content:
        raise UserError(
            f"{file}: yaml_path in a file of settings is not followed: write the settings"
            " themselves"
        )
    return file.name, as_flags(config_class, content, str(file))


def _dataset_yaml(dataset: str) -> dict[str, Any]:
    """Sections `attack`, `defense` and one for each method, and `short_run`, which has such
    sections of its own; {} for a data set without a file."""
    file = resources.resource("config") / f"{dataset}.yaml"
    if Path(dataset).name != dataset or not file.exists():  # a name, never a path
        return {}
    found = read_yaml(file)
    short = found.get("short_run")
    if isinstance(short, dict):
        if not isinstance(short.get("epochs_below"), int):
            raise UserError(f"{file}: short_run needs a line `epochs_below: N`")
        _check_sections(
            {key: value for key, value in short.items() if key != "epochs_below"},
            f"{file}: short_run",
        )
    _check_sections(found, str(file), "short_run")
    return found


def _check_sections(found: Mapping[str, Any], where: str, *others: str) -> None:
    known = {"attack", "defense", *others, *resources.named("attack"), *resources.named("defense")}
    for section, lines in found.items():
        if section not in known:
            raise UserError(
                f"{where}: unknown section {section!r}.{suggest(section, known)} Known:"
                f" {', '.join(sorted(known))}"
            )
        if not isinstance(lines, dict):
            raise UserError(
                f"{where}: section {section!r} must hold lines of `key: value`, found"
                f" {type(lines).__name__}"
            )


def read_yaml(file: Path) -> dict[str, Any]:
    """Lines of `key: value`; anything else is one line that names the file."""
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not readable as YAML ({' '.join(str(error).split())})") from error
    except RecursionError as error:
        raise UserError(
            f"{file}: not readable as YAML (brackets within brackets, thousands deep)"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise UserError(f"{file}: expected lines of `key: value`")
    return found


def as_flags(config_class: type[Any], values: Mapping[str, Any], where: str) -> list[str]:
    """Keys and values of a YAML file as flags; an unknown key is answered with the closest one."""
    known = flag_names(config_class)
    flags = []
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}.{suggest(key, known)}")
        flags += _flag(key, _words(value))
    return flags


def _words(value: Any) -> list[str]:
    """A value as the words of its flag: what is nested one after the other, as --help shows it."""
    if isinstance(value, Mapping):
        value = [part for pair in value.items() for part in pair]
    return (
        [word for item in value for word in _words(item)]
        if isinstance(value, (list, tuple))
        else [_text(value)]
    )


def flag_names(config_class: type[Any]) -> dict[str, str]:
    """Every flag and alias, without dashes -> the field."""
    known = {}
    hints = get_type_hints(config_class, include_extras=True)
    for name in (f.name for f in dataclasses.fields(config_class)):
        known[name] = name
        hint = hints[name]
        if get_origin(hint) is Annotated:
            for extra in get_args(hint)[1:]:
                for alias in getattr(extra, "aliases", None) or ():
                    known[alias.lstrip("-")] = name
    return known


def _origins(config_class: type[Any], layers: list[tuple[str, list[str]]]) -> dict[str, str]:
    known = flag_names(config_class)
    origins = {}
    for origin, flags in layers:
        for token in flags:
            if token.startswith("--"):
                origins[known[token.split("=")[0][2:].replace("-", "_")]] = origin
    return origins


def _suggest_flag(key: str, known: dict[str, str]) -> str:
    return re.sub(r"'(\w+)'", r"--\1", suggest(key, known))


def _one_line(text: str) -> str:
    """tyro's framed complaint as one line."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    words = " ".join(re.sub(r"[│╭╮╰╯─┃┏┓┗┛━]|-{5,}", " ", plain).split())
    words = re.sub(
        r"^(Parsing error|Value error|Invalid choice|Missing argument|Unrecognized options) ",
        "",
        words,
    )
    words = re.sub(r" (Argument helptext: .*|For full helptext.*)$", "", words).rstrip(". ")
    return f"{words}. See --help" if words else "the flags could not be read: see --help"


def _text(value: Any) -> str:
    return (
        "None"
        if value is None
        else " ".join(map(str, value))
        if isinstance(value, (list, tuple))
        else str(as_json(value))
    )
