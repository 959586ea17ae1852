"""Numbers enter here, once: dataclass defaults < resource/config/<dataset>.yaml < --yaml_path FILE < flags.

YAML becomes flags and goes through the same parser, so a misspelt key fails like a misspelt flag.
"""

import contextlib
import dataclasses
import io
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
import yaml
from tyro.conf import arg

from . import registry
from .data import Augment
from .engine import Precision, Recipe, Schedule
from .errors import UserError, suggest
from .models import OWN
from .schema import LARGEST_SIDE

C = TypeVar("C", bound="MethodConfig")

WHERE = ["save_folder_name", "result_file", "run_name", "dataset_path", "device", "record_root", "yaml_path", "track", "track_folder"]
RUN_OPTIONS = frozenset([*WHERE, "overwrite", "debug", "subtask"])
"""Fields that say where and how to run, not what is computed: they are not kept in a record, nor compared on resuming."""
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
"""Types of values that a command line gets wrong: in words, and what raises ValueError for a text that is none."""


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """What every attack and defense takes."""

    dataset_path: str | None = None
    """Folder with parquet shards (columns img or image, label) or train/<class>/*.png. Defenses need it only where the cache lost the data."""
    seed: Annotated[int, arg(aliases=["--random_seed"])] = 0
    """Everything random is drawn from it."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N."""
    precision: Precision = "auto"
    """What training computes in; scores are always fp32. auto: bf16 where it is measured to be faster, or $BACKDOORLAB_PRECISION."""
    score_every: int = 1
    """Epochs between two evaluations on the test data; 0 evaluates only at the end. Never changes a result."""
    record_root: str | None = None
    """Folder of records; default $BACKDOORLAB_RECORDS, else record/ of the checkout, else ./record."""
    yaml_path: str | None = None
    """YAML file with flags as keys, or the name of a preset in resource/config/."""
    track: Literal["none", "tensorboard", "wandb", "mlflow"] = "none"
    """Send each line of history and the final scores there as well; never changes a result. Needs pip install 'backdoorlab[track]'."""
    track_folder: str = "runs"
    """Folder for what the tracker keeps on this machine."""
    overwrite: bool = False
    """Replace a finished result of the same name (a record takes its defenses' results along), or an unfinished one of another command."""
    debug: bool = False
    """Show a traceback with an error."""

    RANGES: ClassVar[dict[str, str]] = {"score_every": ">= 0"}
    """Field -> the values it may have; subclasses add theirs."""

    def check(self) -> None:
        """Refuse values out of range. None, where a field allows it, is left alone."""
        for owner in type(self).__mro__:
            for name, rule in vars(owner).get("RANGES", {}).items():
                value = getattr(self, name)
                for number in value if isinstance(value, (tuple, list)) else (value,):
                    if number is not None and not _within(number, rule):
                        raise UserError(f"{name} must be {rule if rule[0] in '<>' else f'in {rule}'}, got {number}")

    def science(self) -> dict[str, Any]:
        """The fields that decide the result, as JSON."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name not in RUN_OPTIONS}


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(MethodConfig):
    """An attack's data, model and training. Published settings by data set are in resource/config/."""

    save_folder_name: str = ""
    """Name of the record to write: record/<save_folder_name>. Required."""
    dataset: str = "digits"
    """digits, cifar10, cifar100, mnist, fashion_mnist, gtsrb, svhn, or any name with --dataset_path."""
    image_size: int | None = None
    """Side in pixels that all images are resized to; None keeps the data set's own."""
    grey: bool | None = None
    """One channel (True) or three (False); None keeps what the data set has."""
    model: Annotated[str, arg(aliases=["--architecture"])] = "preactresnet18"
    """preactresnet18, preactresnet10, or any timm model by name."""
    width: int | None = None
    """Channels of the first stage of preactresnet*; None is 64. 16 makes CIFAR-10 possible on a CPU."""
    mean: tuple[float, ...] | None = None
    """Normalisation, one number a channel in [0, 1] units; None measures it on the training images."""
    std: tuple[float, ...] | None = None
    """As mean; 1 leaves the values as they are."""
    epochs: int = 100
    """Passes over the training set."""
    batch_size: int = 128
    """Images a step."""
    lr: float = 0.01
    """Learning rate (the peak, with schedule onecycle)."""
    momentum: Annotated[float, arg(aliases=["--sgd_momentum"])] = 0.9
    """SGD's momentum."""
    weight_decay: Annotated[float, arg(aliases=["--wd"])] = 5e-4
    """L2 penalty."""
    optimizer: Annotated[Literal["sgd", "adam"], arg(aliases=["--client_optimizer"])] = "sgd"
    """Optimizer of the training."""
    schedule: Annotated[Schedule, arg(aliases=["--lr_scheduler"])] = "cosine"
    """Course of the learning rate."""
    schedule_epochs: int | None = None
    """Length of the cosine in epochs; None is the length of the training."""
    crop_padding: int = 4
    """Random crops out of images padded by so many pixels; 0 for none."""
    flip: bool = False
    """Random horizontal mirroring."""

    RANGES: ClassVar[dict[str, str]] = {
        "epochs": ">= 0",
        "batch_size": ">= 1",
        "lr": ">= 0",
        "momentum": ">= 0",
        "weight_decay": ">= 0",
        "schedule_epochs": ">= 1",
        "crop_padding": f"[0, {LARGEST_SIDE}]",
        "width": ">= 1",
        "image_size": f"[1, {LARGEST_SIDE}]",
        "mean": "[0, 1]",
        "std": "(0, 1]",
    }

    def recipe(self) -> Recipe:
        augment = Augment(self.crop_padding, self.flip)
        taken = {f.name: getattr(self, f.name) for f in dataclasses.fields(Recipe) if f.name != "augment"}
        return Recipe(**taken, augment=augment)


@dataclass(frozen=True, kw_only=True)
class TriggerConfig(TrainingConfig):
    """What every attack with a trigger takes."""

    target_label: Annotated[int, arg(aliases=["--attack_target"])] = 0
    """Class that triggered images are to be taken for (all2one)."""
    label_mode: Annotated[Literal["all2one", "all2all"], arg(aliases=["--attack_label_trans"])] = "all2one"
    """all2one: every label becomes target_label. all2all: label y becomes y + 1."""


@dataclass(frozen=True, kw_only=True)
class AttackConfig(TriggerConfig):
    """What every poisoning attack takes that changes labels."""

    poison_rate: Annotated[float, arg(aliases=["--pratio"])] = 0.1
    """Share of the whole training set that is poisoned, in (0, 1]."""


@dataclass(frozen=True, kw_only=True)
class CoverConfig(AttackConfig):
    """An attack that also stamps images and leaves them their true label, so that the trigger alone does not decide."""

    cover_rate: float = 0.003
    """Share of the whole training set that is stamped and keeps its label, in [0, 1]; more makes the attack weaker and harder to find."""

    RANGES: ClassVar[dict[str, str]] = {"cover_rate": "[0, 1]"}


@dataclass(frozen=True, kw_only=True)
class CleanLabelConfig(TriggerConfig):
    """What every attack takes that poisons images of the target class only, and changes no label."""

    clean_label_ratio: float = 0.5
    """Share of the target class that is poisoned, in (0, 1]; at 1 the model sees no clean image of that class."""
    poison_rate: Annotated[float | None, arg(aliases=["--pratio"])] = None
    """The same as a share of the whole training set, in (0, 1], instead of clean_label_ratio."""

    RANGES: ClassVar[dict[str, str]] = {"clean_label_ratio": "(0, 1]"}


@dataclass(frozen=True, kw_only=True)
class JointConfig(AttackConfig):
    """What an attack that controls the training takes besides."""

    plain: bool = True
    """Also train an ordinary model on the stored training set: what training-time defenses are compared with. As long again."""


@dataclass(frozen=True, kw_only=True)
class DefenseConfig(MethodConfig):
    """What every defense takes. Data set and architecture come from the record."""

    result_file: str = ""
    """Name of the record to defend. Required."""
    run_name: str | None = None
    """Folder of the result below defense/<method>/; None is seed<seed>."""
    trusted_ratio: Annotated[float, arg(aliases=["--ratio"])] = 0.05
    """Trusted clean images, as a share of the training set (drawn from it uniformly). Read only by defenses that assume them."""
    trusted_count: int | None = None
    """Their number, instead of a share."""
    trusted_path: Annotated[str | None, arg(aliases=["--unl_set"])] = None
    """Folder of your own trusted images, <class>/*.png or parquet shards, instead of a draw from the training set."""


@dataclass(frozen=True, kw_only=True)
class SeedsConfig(DefenseConfig):
    """What a defense takes that is told of some training samples that they are clean ("seeds" in its ASSUMES)."""

    seeds_per_class: int = 10
    """Training samples of each class that are known to be clean."""

    RANGES: ClassVar[dict[str, str]] = {"seeds_per_class": ">= 0"}


def refuse_ranges(config_class: type[MethodConfig]) -> None:
    """UserError where RANGES has a name that is no field, or a rule that is none."""
    fields = [f.name for f in dataclasses.fields(config_class)]
    for name, rule in vars(config_class).get("RANGES", {}).items():
        if name not in fields:
            raise UserError(f"RANGES names {name!r}, which is no field of Config.{suggest(name, fields)}")
        try:
            _within(0.0, rule)
        except (ValueError, TypeError, IndexError):
            raise UserError(f"RANGES of {name}: expected a rule such as '>= 0', '> 0' or '(0, 1]', got {rule!r}") from None


def _within(number: float, rule: str) -> bool:
    """Rules: ">= 0", "> 0", or an interval such as "(0, 1]". Infinity and NaN are in none."""
    if not math.isfinite(number):
        return False
    if rule[0] == ">":
        bound = float(rule.lstrip(">= "))
        return number >= bound if rule.startswith(">=") else number > bound
    low, high = (float(end) for end in rule[1:-1].split(","))
    above = low <= number if rule[0] == "[" else low < number
    return above and (number <= high if rule[-1] == "]" else number < high)


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
        return "  ".join(f"{name} {_text(values[name])} ({origin})" for name, origin in self.origins.items())


def parse(config_class: type[C], method: str, kind: str, argv: Sequence[str], trained: Callable[[Any], Trained], prog: str) -> Parsed:
    """Flags and YAML files -> a frozen config. `trained(config)` tells the model that it is about, whose data set's YAML applies."""
    layers: list[tuple[str, list[str]]] = [("flag", list(argv))]
    config = _parse_flags(config_class, layers, prog)
    if config.yaml_path:
        layers.insert(0, _yaml_layer(config_class, config.yaml_path))
        config = _parse_flags(config_class, layers, prog)
    if getattr(config, "dataset", None) and config.dataset_path and "dataset" not in _origins(config_class, layers):
        raise UserError(f"--dataset_path {config.dataset_path}: which data set is that? Pass --dataset NAME besides, any name for data of your own")
    dataset = trained(config).dataset
    file, sections = f"{dataset}.yaml", _dataset_yaml(dataset)
    if sections:
        if getattr(config, "model", None) not in (None, *OWN):  # a data set's width is for networks that have one
            sections = _without("width", sections)
        found = _section_layers(config_class, sections, (kind, method), file)
        config = _parse_flags(config_class, found + layers, prog)
        epochs, short = trained(config).epochs, sections.get("short_run")
        if short and epochs is not None and epochs < short["epochs_below"]:
            found += _section_layers(config_class, short, (kind, method), f"{file}: short_run")
            config = _parse_flags(config_class, found + layers, prog)
        layers = found + layers
    return Parsed(config, _origins(config_class, layers))


def _section_layers(config_class: type[Any], sections: Mapping[str, Any], names: Sequence[str], where: str) -> list[tuple[str, list[str]]]:
    return [(where, as_flags(config_class, sections[name], f"{where}: {name}")) for name in names if name in sections]


def _without(key: str, sections: Mapping[str, Any]) -> dict[str, Any]:
    """Sections without the lines of that key, those of short_run included."""
    return {name: _without(key, lines) if isinstance(lines, dict) else lines for name, lines in sections.items() if name != key}


def published(dataset: str) -> dict[str, Any]:
    """The section `attack` of a data set's YAML: its published training and normalisation; {} without one."""
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
                raise UserError(f"unknown flag {name}{where}.{_suggest_flag(key, known)} See --help")
            field_name = known.get(key, key)
            if field_name in here and len(given[field_name]) > 1:  # a name after the first would be lost
                raise UserError(f"{name} is given twice, with more than one word after the first: {' '.join(given[field_name])}. Give it once")
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
    return [f"--{name}={values[0]}"] if len(values) == 1 and values[0].startswith("--") else [f"--{name}", *values]


def _about(config_class: type[Any]) -> str:
    """What --help begins with: a method's title and the first link of its file, or what a command does."""
    if not issubclass(config_class, MethodConfig):
        return config_class.__doc__ or ""
    text = getattr(sys.modules.get(config_class.__module__), "__doc__", None) or ""
    return "\n".join([*text.strip().split("\n")[:1], *(link.rstrip(".,;)") for link in re.findall(r"https?://\S+", text)[:1])])


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
            got = f", got {' '.join(values)!r}" if values else f": --{name} True" if kind is bool else ", got nothing"
            return f"--{name} takes {'numbers' if many else words}{got}. See --help"
    return ""


def _yaml_layer(config_class: type[Any], path: str) -> tuple[str, list[str]]:
    file = Path(path)
    if not file.exists():
        preset = registry.resource("config") / f"{path}.yaml"
        if not preset.exists():
            presets = sorted(p.stem for p in registry.resource("config").glob("*.yaml") if not p.stem.startswith("bench_"))
            shown = [name for name in presets if not {"attack", "defense"} & set(read_yaml(registry.resource("config") / f"{name}.yaml"))]
            raise UserError(f"--yaml_path {path}: no such file, and no preset of that name. Presets: {', '.join(shown)}")
        file = preset
    content = read_yaml(file)
    sections = sorted({"attack", "defense"} & set(content) - set(flag_names(config_class)))
    if sections:
        raise UserError(f"{file}: --yaml_path takes flags as keys, found the section {sections[0]!r}. A data set's settings are read by themselves")
    if "yaml_path" in content:
        raise UserError(f"{file}: yaml_path in a file of settings is not followed: write the settings themselves")
    return file.name, as_flags(config_class, content, str(file))


def _dataset_yaml(dataset: str) -> dict[str, Any]:
    """Sections `attack`, `defense` and one for each method, and `short_run`, which has such sections of its own; {} for a data set without a file."""
    file = registry.resource("config") / f"{dataset}.yaml"
    if Path(dataset).name != dataset or not file.exists():  # a name, never a path
        return {}
    found = read_yaml(file)
    short = found.get("short_run")
    if isinstance(short, dict):
        if not isinstance(short.get("epochs_below"), int):
            raise UserError(f"{file}: short_run needs a line `epochs_below: N`")
        _check_sections({key: value for key, value in short.items() if key != "epochs_below"}, f"{file}: short_run")
    _check_sections(found, str(file), "short_run")
    return found


def _check_sections(found: Mapping[str, Any], where: str, *others: str) -> None:
    known = {"attack", "defense", *others, *registry.named("attack"), *registry.named("defense")}
    for section, lines in found.items():
        if section not in known:
            raise UserError(f"{where}: unknown section {section!r}.{suggest(section, known)} Known: {', '.join(sorted(known))}")
        if not isinstance(lines, dict):
            raise UserError(f"{where}: section {section!r} must hold lines of `key: value`, found {type(lines).__name__}")


def read_yaml(file: Path) -> dict[str, Any]:
    """Lines of `key: value`; anything else is one line that names the file."""
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not readable as YAML ({' '.join(str(error).split())})") from error
    except RecursionError as error:
        raise UserError(f"{file}: not readable as YAML (brackets within brackets, thousands deep)") from error
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
    return [word for item in value for word in _words(item)] if isinstance(value, (list, tuple)) else [_text(value)]


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
    words = re.sub(r"^(Parsing error|Value error|Invalid choice|Missing argument|Unrecognized options) ", "", words)
    words = re.sub(r" (Argument helptext: .*|For full helptext.*)$", "", words).rstrip(". ")
    return f"{words}. See --help" if words else "the flags could not be read: see --help"


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(part) for part in value]
    return value.name if isinstance(value, Enum) else str(value) if isinstance(value, Path) else value


def _text(value: Any) -> str:
    return "None" if value is None else " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(_plain(value))
