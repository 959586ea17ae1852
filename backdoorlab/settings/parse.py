"""Command line and YAML files -> a frozen config.

Later layers win: dataclass defaults < resource/config/<dataset>.yaml < --yaml_path FILE < flags.
YAML becomes flags and goes through the same parser, so a misspelt key fails like a misspelt flag.
"""

import contextlib
import dataclasses
import io
import re
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
"""Field -> name of a value in BackdoorBench or torch -> our name of it."""
Layer = tuple[str, list[str]]
"""Origin of flags, and the flags."""
READ_AS: dict[Any, tuple[str, Callable[[str], object]]] = {
    bool: ("True or False", ("True", "False").index),
    int: ("a whole number", int),
    float: ("a number", float),
}
"""Type -> its name in messages, and a reader that raises ValueError for a malformed text."""


class Trained(NamedTuple):
    """The model that a command trains or loads."""

    dataset: str
    epochs: int | None
    """Length of its training; None if unknown."""


PARTS = {
    "epochs": ("n_rounds", "unlearn_epochs", "stage1_epochs"),
    "n_rounds": ("epochs",),
    "learning_rate": ("lr",),
    "target": ("target_label",),
}
"""Flag that people type -> what plays its part in methods that lack it."""
NAMES = ("result_file", "save_folder_name")
"""Flags of a method that name a record."""


@dataclass(frozen=True)
class Parsed:
    """A config, and the origin of each value that is not a default."""

    config: Any
    origins: dict[str, str] = field(default_factory=dict)
    """Field -> "flag" or the name of a YAML file."""

    def describe(self) -> str:
        """Return the values that are not defaults, each with its origin, in one line."""
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
    """Merge flags and YAML files into a frozen config.

    Args:
        config_class: the method's Config.
        method: its name, which is that of a section in a data set's YAML.
        kind: "attack" or "defense", also the name of a section.
        argv: the flags.
        trained: config -> the model that the command trains or loads. The YAML of its data set
            applies, and `short_run` if its training was short.
        prog: what the user typed to start the command.

    Raises:
        UserError: for an unknown flag or key, a malformed value, or a folder without a data set.
    """
    # The flags alone say which files are read.
    layers: list[Layer] = [("flag", list(argv))]
    config = _parse_flags(config_class, layers, prog)

    # The user's file stands below the flags.
    if config.yaml_path:
        layers.insert(0, _yaml_layer(config_class, config.yaml_path))
        config = _parse_flags(config_class, layers, prog)
    origins = _origins(config_class, layers)
    if getattr(config, "dataset", None) and config.dataset_path and "dataset" not in origins:
        raise UserError(
            f"--dataset_path {config.dataset_path}: which data set is that? Pass --dataset NAME"
            " as well, any name for data of your own"
        )

    # The data set's file stands below both; which one it is can depend on them.
    file, sections = _sections_of(config, trained(config).dataset)
    if sections:
        found = _section_layers(config_class, sections, (kind, method), file)
        config = _parse_flags(config_class, found + layers, prog)
        epochs, short = trained(config).epochs, sections.get("short_run")
        if short and epochs is not None and epochs < short["epochs_below"]:
            found += _section_layers(config_class, short, (kind, method), f"{file}: short_run")
            config = _parse_flags(config_class, found + layers, prog)
        layers = found + layers
    return Parsed(config, _origins(config_class, layers))


def _sections_of(config: Any, dataset: str) -> tuple[str, dict[str, Any]]:
    """Return the name of a data set's YAML file, and its sections that fit the config's network."""
    sections = _dataset_yaml(dataset)
    # The width in the file is that of our own networks; timm's networks refuse one.
    if sections and getattr(config, "model", None) not in (None, *OWN):
        sections = _without("width", sections)
    return f"{dataset}.yaml", sections


def _section_layers(
    config_class: type[Any], sections: Mapping[str, Any], names: Sequence[str], where: str
) -> list[Layer]:
    """Return one layer for each of the named sections that exists."""
    return [
        (where, as_flags(config_class, sections[name], f"{where}: {name}"))
        for name in names
        if name in sections
    ]


def _without(key: str, sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections without that key, at any depth."""
    return {
        name: _without(key, lines) if isinstance(lines, dict) else lines
        for name, lines in sections.items()
        if name != key
    }


def published(dataset: str) -> dict[str, Any]:
    """Return the section `attack` of a data set's YAML: its published training; {} if none."""
    return dict(_dataset_yaml(dataset).get("attack", {}))


def parse_plain(options_class: type[Any], argv: Sequence[str], prog: str) -> Any:
    """Read flags alone, with the same one-line errors as `parse`."""
    return _parse_flags(options_class, [("flag", list(argv))], prog)


def _parse_flags(config_class: type[Any], layers: list[Layer], prog: str) -> Any:
    """Parse flags in layers, of which later ones win.

    Each flag reaches tyro once, under its field's name. `--help` prints the help text and exits.
    """
    loose, given = _collected(config_class, layers)
    if "help" in given or "-h" in loose:
        from . import help  # seldom needed, and so not part of the code that makes a number

        help.show(config_class, prog)
    for field_name, ours in SPELLINGS.items():
        if field_name in given:
            given[field_name] = [ours.get(value, value) for value in given[field_name]]
    arguments = [word for name, values in given.items() for word in _flag(name, values)]

    # tyro prints its errors, so they are caught and said again in one line.
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                config_class,
                args=[*loose, *arguments],
                prog=prog,
                config=(tyro.conf.FlagConversionOff,),
                use_underscores=True,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        said = _misplaced(config_class, loose) or _misread(config_class, given)
        raise UserError(said or _one_line(complaint.getvalue())) from None


def _collected(
    config_class: type[Any], layers: list[Layer]
) -> tuple[list[str], dict[str, list[str]]]:
    """Return the words before any flag, and the words of each field in the last layer that has it.

    Raises:
        UserError: for an unknown flag, or a repeated one that would hide words of the first.
    """
    known = flag_names(config_class)
    loose: list[str] = []
    given: dict[str, list[str]] = {}
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

            # Of a flag given twice the last one counts. Words after the first value would be lost
            # with it, and these may be misplaced positional arguments.
            if field_name in here and len(given[field_name]) > 1:
                raise UserError(
                    f"{name} is given twice, with more than one word after the first:"
                    f" {' '.join(given[field_name])}. Give it once"
                )
            here.add(field_name)
            given[field_name] = [value] if equals else []
    return loose, given


def _flag(name: str, values: Sequence[str]) -> list[str]:
    """Return a flag and its values as words; a lone value that looks like a flag after "="."""
    return (
        [f"--{name}={values[0]}"]
        if len(values) == 1 and values[0].startswith("--")
        else [f"--{name}", *values]
    )


def _misplaced(config_class: type[Any], loose: Sequence[str]) -> str:
    """Say which flag a word before all flags may belong to, in a method; '' if there is none."""
    flag = next((name for name in NAMES if name in flag_names(config_class)), None)
    if not loose or flag is None:
        return ""
    return f"{loose[0]!r} belongs to no flag. Did you mean --{flag} {loose[0]}? See --help"


def _misread(config_class: type[Any], given: Mapping[str, Sequence[str]]) -> str:
    """Name the first flag whose value its type cannot have; '' if there is none."""
    for name, hint in get_type_hints(config_class).items():
        # The parts of a union, and among them the type of number that the message is about.
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        many = next((get_args(kind)[0] for kind in kinds if get_origin(kind) is tuple), None)
        kind = many or next((kind for kind in kinds if kind in READ_AS), None)
        if name not in given or kind not in READ_AS:
            continue

        (words, read), values = READ_AS[kind], given[name]
        try:
            if not values and not many:  # a tuple may be empty
                raise ValueError
            for value in values if many else values[:1]:
                if not (value == "None" and NoneType in kinds):
                    read(value)
        except ValueError:
            missing = f": --{name} True" if kind is bool else ", got nothing"
            got = f", got {' '.join(values)!r}" if values else missing
            return f"--{name} takes {'numbers' if many else words}{got}. See --help"
    return ""


def _yaml_layer(config_class: type[Any], path: str) -> Layer:
    """Read the file, or else the preset, that --yaml_path names."""
    file = Path(path)
    if not file.exists():
        file = resources.resource("config") / f"{path}.yaml"
    if not file.exists():
        raise UserError(
            f"--yaml_path {path}: no such file, and no preset of that name. Presets:"
            f" {', '.join(_presets())}"
        )
    content = read_yaml(file)

    # Two mistakes: the file of a data set, which has sections, and a reference to a further file.
    sections = sorted({"attack", "defense"} & set(content) - set(flag_names(config_class)))
    if sections:
        raise UserError(
            f"{file}: --yaml_path takes flags as keys, found the section {sections[0]!r}. A data"
            " set's file is read automatically: leave --yaml_path out"
        )
    if "yaml_path" in content:
        raise UserError(
            f"{file}: yaml_path in a file of settings is not followed: copy the settings of that"
            " file"
        )
    return file.name, as_flags(config_class, content, str(file))


def _presets() -> list[str]:
    """Return the names of the files of flags in resource/config/, without data sets and grids."""
    folder = resources.resource("config")
    names = sorted(p.stem for p in folder.glob("*.yaml") if not p.stem.startswith("bench_"))
    sections = {"attack", "defense"}
    return [name for name in names if not sections & set(read_yaml(folder / f"{name}.yaml"))]


def _dataset_yaml(dataset: str) -> dict[str, Any]:
    """Read the sections of a data set's YAML; {} if it has no file.

    They are called `attack`, `defense`, or as a method. `short_run` contains further such sections.
    """
    file = resources.resource("config") / f"{dataset}.yaml"
    # The user may have typed a path, which must not be read from there.
    if Path(dataset).name != dataset or not file.exists():
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
    """Raise a `UserError` for an unknown section, or one that is no mapping."""
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
    """Read a YAML file of `key: value` lines.

    Raises:
        UserError: for any other content, naming the file.
    """
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
    """Turn keys and values into flags.

    Args:
        config_class: dataclass of the options.
        values: option names or aliases -> values.
        where: their origin, for error messages.

    Raises:
        UserError: for an unknown key, with the closest known one.
    """
    known = flag_names(config_class)
    flags = []
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}.{suggest(key, known)}")
        flags += _flag(key, _words(value))
    return flags


def _words(value: Any) -> list[str]:
    """Split a value into the words of its flag; nested values are flattened."""
    if isinstance(value, Mapping):
        value = [part for pair in value.items() for part in pair]
    return (
        [word for item in value for word in _words(item)]
        if isinstance(value, (list, tuple))
        else [_text(value)]
    )


def flag_names(config_class: type[Any]) -> dict[str, str]:
    """Map every flag and alias, without dashes, to its field."""
    known = {}
    hints = get_type_hints(config_class, include_extras=True)
    for name in (f.name for f in dataclasses.fields(config_class)):
        known[name] = name
        known |= {alias.lstrip("-"): name for alias in aliases(hints[name])}
    return known


def aliases(hint: Any) -> list[str]:
    """Return the other spellings of a flag, which stand in its field's annotation as
    arg(aliases=[...])."""
    extras = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    return [alias for extra in extras for alias in getattr(extra, "aliases", None) or ()]


def _origins(config_class: type[Any], layers: list[Layer]) -> dict[str, str]:
    """Return the origin of each field that a layer sets; the last layer wins."""
    known = flag_names(config_class)
    origins = {}
    for origin, flags in layers:
        for token in flags:
            if token.startswith("--"):
                origins[known[token.split("=")[0][2:].replace("-", "_")]] = origin
    return origins


def _suggest_flag(key: str, known: dict[str, str]) -> str:
    """Return `suggest`'s answer with dashes in front of the name; what plays the flag's part in
    this method comes before what is spelt like it."""
    for word in PARTS.get(key, ()):
        if word in known:
            return f" Did you mean --{word}?"
    return re.sub(r"'(\w+)'", r"--\1", suggest(key, known))


def _one_line(text: str) -> str:
    """Return tyro's error, which stands in a box, as one line."""
    # Colours and frames first, then the headings and hints around the message.
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
    """Return a value as it would be typed."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return "None" if value is None else str(as_json(value))
