"""Grids of experiments: a file or flags become cells, each a command and a folder for its result.

    datasets: [digits]                     # a name, or NAME: {options of the attack, such as width}
    attacks:
      - badnet                             # a method, or all
      - badnet-random: {method: badnet, position: random}
    defenses: all                          # or spectral+scrub: an unlearner with a detector's split
    poison_rates: [0.1]
    seeds: [0, 1, 2]
    attack: {score_every: 0}               # options of every attack; `defense` likewise

Of the disk, this module reads only the methods' files, and whether a folder of data exists.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from .. import models
from ..datasets.load import names as dataset_names
from ..errors import UserError, suggest
from ..execution.code_version import code_version
from ..poison import check_rate
from ..record import check_name
from ..settings import methods, resources
from ..settings.parse import Trained, as_flags, flag_names, parse, read_yaml
from ..storage.schema import WORD

KEYS = ("datasets", "attacks", "defenses", "poison_rates", "seeds", "attack", "defense")
OURS = frozenset(
    [
        "save_folder_name",
        "result_file",
        "run_name",
        "dataset",
        "seed",
        "record_root",
        "overwrite",
        "subtask",
        "debug",
    ]
)
"""Options that a grid sets itself, and refuses in its files."""


@dataclass(frozen=True)
class Entry:
    """One line of a grid."""

    label: str
    """Its name in tables and folders."""
    name: str
    """The method or the data set."""
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Grid:
    """A grid: each attack on each data set, at each rate and seed, and each defense on each of the
    records."""

    datasets: tuple[Entry, ...]
    attacks: tuple[Entry, ...]
    defenses: tuple[Entry, ...]
    poison_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    attack_options: Mapping[str, Any] = field(default_factory=dict)
    defense_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One command, and the settings and code that its result must have."""

    kind: resources.Kind
    method: str
    label: str
    record: str
    """Name of the record that an attack makes, or that a defense works on."""
    run: str
    """Folder of a defense's result; "" for an attack."""
    seed: int
    path: Path
    """The method's file."""
    flags: tuple[str, ...]
    """The command's options, without --record_root."""
    settings: str
    """Canonical JSON of the config, as `settings_of` reads it from a record or a result."""
    code: str
    """Version of the code that computes it."""

    @property
    def splits(self) -> tuple[str, str, str]:
        """Record, method and run of the split that this cell may make."""
        return self.record, self.method, self.run

    @cached_property
    def needs(self) -> tuple[str, str, str] | None:
        """Record, method and run of the split that an unlearner forgets; None for all others."""
        split: str = json.loads(self.settings).get("split", "")
        method, _, run = split.partition("/")
        return (self.record, method, run or f"seed{self.seed}") if split else None

    @property
    def name(self) -> str:
        """The cell's name in messages."""
        return self.record if self.kind == "attack" else f"{self.record} {self.method} {self.run}"

    def folder(self, root: Path) -> Path:
        """Return the folder of the finished result."""
        return (
            root / self.record
            if self.kind == "attack"
            else root / self.record / "defense" / self.method / self.run
        )


def settings_of(config: Mapping[str, Any]) -> str:
    """Return a config as text, equal for equal experiments.

    How often scores are measured changes no result, and is left out.
    """
    return json.dumps(
        {key: value for key, value in config.items() if key != "score_every"}, sort_keys=True
    )


# --- reading


def read(path: str | None, **flags: str | None) -> Grid:
    """Read a grid.

    Args:
        path: a file, or the name of one in resource/config/; None for flags alone.
        flags: key of a grid -> a list separated by commas, in place of what the file says; None
            leaves the file's.

    Raises:
        UserError: the grid is empty, or something in it is unknown.
    """
    where, found = ("the command line", {}) if path is None else _file(path)
    unknown = [key for key in found if key not in KEYS]
    if unknown:
        raise UserError(
            f"{where}: unknown key {unknown[0]!r}.{suggest(unknown[0], KEYS)} Known:"
            f" {', '.join(KEYS)}"
        )
    given = {key: _words(text) for key, text in flags.items() if text is not None}
    if "attacks" not in found and "attacks" not in given:
        raise UserError(
            f"{where}: an empty grid; name a file with --config, or attacks with --attacks"
            " (badnet,blended or all)"
        )

    def lines(key: str, default: list[Any]) -> list[Entry]:
        entries = _entries(found.get(key, default), where, key)
        return _selected(entries, given[key]) if key in given else entries

    attacks = _methods("attack", lines("attacks", []), where)
    # The flag also replaces the rates that the file gives to single attacks.
    if "poison_rates" in given:
        attacks = tuple(_without_rate(entry) for entry in attacks)

    grid = Grid(
        datasets=tuple(lines("datasets", ["digits"])),
        attacks=attacks,
        defenses=_methods("defense", lines("defenses", ["all"]), where),
        poison_rates=_numbers(
            float,
            given.get("poison_rates", found.get("poison_rates", [0.1])),
            f"{where}: poison_rates",
        ),
        seeds=_numbers(int, given.get("seeds", found.get("seeds", [0, 1, 2])), f"{where}: seeds"),
        attack_options=_options(found.get("attack"), f"{where}: attack"),
        defense_options=_options(found.get("defense"), f"{where}: defense"),
    )
    _check(grid, where)
    return grid


def _words(text: str) -> list[str]:
    """Split a list at its commas."""
    words = (word.strip() for word in text.split(","))
    return [word for word in words if word]


def _selected(entries: Sequence[Entry], words: Sequence[str]) -> list[Entry]:
    """Return the file's entries with these labels; a word that is none of them names a method or a
    data set."""
    # A label may stand for several entries: one data set on two networks.
    named: dict[str, list[Entry]] = {}
    for entry in entries:
        named.setdefault(entry.label, []).append(entry)
    return [entry for word in words for entry in named.get(word, [Entry(word, word)])]


def _without_rate(entry: Entry) -> Entry:
    options = {key: value for key, value in entry.options.items() if key != "poison_rate"}
    return dataclasses.replace(entry, options=options)


def _check(grid: Grid, where: str) -> None:
    """Raise a UserError for a grid without cells, or with a seed out of range."""
    # Without defenses it is a grid of attacks.
    for key in ("datasets", "attacks", "poison_rates", "seeds"):
        if not getattr(grid, key):
            raise UserError(f"{where}: an empty grid; {key} names nothing")
    for seed in grid.seeds:
        if not 0 <= seed < 2**31:
            raise UserError(f"{where}: seeds: each must lie in 0..{2**31 - 1}, got {seed}")


def _file(path: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the content of a grid file."""
    file = Path(path)
    if not file.exists():
        shipped = resources.resource("config")
        file = shipped / f"{path}.yaml"
        if not file.exists():
            known = sorted(grid.stem for grid in shipped.glob("bench_*.yaml"))
            raise UserError(
                f"--config {path}: no such file, and no grid of that name.{suggest(path, known)}"
                f" Grids: {', '.join(known)}"
            )
    return file.name, read_yaml(file)


def _entries(values: Any, where: str, key: str) -> list[Entry]:
    """Read the lines under a key of a grid file: names, or `label: {options}`.

    Args:
        values: what the file has there.
        where: name of the file, for errors.
        key: the key.
    """
    if not isinstance(values, list):
        values = [values]

    found: list[Entry] = []
    for value in values:
        if isinstance(value, dict) and len(value) == 1:
            ((label, options),) = value.items()
            options = dict(_options(options, f"{where}: {key}: {label}"))
        elif isinstance(value, (str, int)) and not isinstance(value, bool):
            label, options = value, {}
        else:
            raise UserError(
                f"{where}: {key}: expected names, or `- label: {{options}}`, found {value!r}"
            )

        # YAML reads the name 1 as a number.
        label = str(label)
        if not WORD.fullmatch(label):
            raise UserError(
                f"{where}: {key}: {label!r} is no name: letters, digits, dots, dashes and"
                " underscores make one"
            )

        name = label if key == "datasets" else str(options.pop("method", label))
        entry = Entry(label, name, options)
        # A data set may be there twice: on two networks it makes records of two names.
        if key != "datasets" and any(other.label == label and other != entry for other in found):
            raise UserError(
                f"{where}: {key}: two unlike entries are called {label}: give one another label, `-"
                f" LABEL: {{method: {name}, ...}}`"
            )
        found.append(entry)
    return found


def _methods(kind: resources.Kind, entries: Iterable[Entry], where: str) -> tuple[Entry, ...]:
    """Replace `all` by every method, check all names, and read the options.

    The control `none` is not among all attacks, and detectors and unlearners are not among all
    defenses. An entry for a single method replaces that by `all`.
    """
    known = methods.available(kind)
    every_one = methods.with_role("defense") if kind == "defense" else set(known) - {"none"}
    found: dict[str, Entry] = {}
    for entry in _unpaired(kind, entries, known):
        names = [n for n in known if n in every_one] if entry.name == "all" else [entry.name]
        for name in names:
            if name not in known:
                raise UserError(
                    f"{where}: unknown {kind} {name!r}.{suggest(name, known)} Known:"
                    f" {', '.join(known)}"
                )

            # `all` never replaces an entry of the same label, before it or after it.
            every = entry.name == "all"
            label = name if every else entry.label
            if label not in found or not every:
                found[label] = Entry(
                    label, name, _by_field(kind, name, entry.options, f"{where}: {entry.label}")
                )
    return tuple(found.values())


def _unpaired(
    kind: resources.Kind, entries: Iterable[Entry], known: Iterable[str]
) -> Iterator[Entry]:
    """Replace each pair, such as spectral+scrub, by the detector and the unlearner that forgets its
    split. An oracle, or nothing, is no method of its own: oracle+scrub, none+scrub."""
    entries = list(entries)
    labels = {entry.label for entry in entries}
    for entry in entries:
        split, plus, method = entry.name.rpartition("+")
        if kind != "defense" or not plus or entry.name in known or method not in known:
            yield entry
            continue
        # A line of its own may give the detector options.
        if split not in ("oracle", "none", *labels):
            yield Entry(split, split)
        yield Entry(entry.label, method, {**entry.options, "split": split})


def _numbers(number: Any, values: Any, where: str) -> tuple[Any, ...]:
    """Read numbers, each once. `number`: int or float; `where` begins the message of an error."""
    found = []
    for value in values if isinstance(values, list) else [values]:
        try:
            found.append(number(str(value)))
        except ValueError:
            raise UserError(
                f"{where}: expected {'whole numbers' if number is int else 'numbers'}, got"
                f" {value!r}"
            ) from None
    return tuple(dict.fromkeys(found))


def _options(values: Any, where: str) -> Mapping[str, Any]:
    """Check that a part of a grid file is `key: value` lines, or empty."""
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{where}: expected lines of `key: value`, found {values!r}")
    return values


def _by_field(
    kind: resources.Kind, method: str, options: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Return options by the names of their fields, whatever alias the file uses.

    Those that the grid sets itself are a UserError that begins with `where`.
    """
    fields = flag_names(methods.load(kind, method).config_class)
    found = {fields.get(key, key): value for key, value in options.items()}
    # They are part of a cell's command already.
    for key in OURS & found.keys():
        raise UserError(f"{where}: {key} is set by the grid: take it out")
    return found


# --- cells


def cells(grid: Grid) -> list[Cell]:
    """Return the cells of a grid: each attack, followed by the defenses on its record.

    Every option is parsed as the command would parse it.
    """
    found: list[Cell] = []
    # The defaults of a defense depend on the data and on how long the attack trained.
    defenses = cache(
        lambda trained: [_defense_settings(grid, entry, trained) for entry in grid.defenses]
    )
    for dataset in grid.datasets:
        for entry in grid.attacks:
            for rate in _rates(grid, entry):
                attack = _attack_settings(grid, dataset, entry, rate)

                # The attack and its defenses share a seed.
                for seed in grid.seeds:
                    record = f"{attack.place}-s{seed}"
                    check_name(record)
                    found.append(attack.cell(record, "", seed, ("--save_folder_name", record)))
                    for defense in defenses(Trained(dataset.name, attack.config.epochs)):
                        run = f"{defense.place}-s{seed}" if defense.place else f"seed{seed}"
                        name = ("--run_name", run) if defense.place else ()
                        found.append(
                            defense.cell(record, run, seed, ("--result_file", record, *name))
                        )

    _refuse_twins(found)
    return found


@dataclass(frozen=True)
class _Settings:
    """A cell without its seed."""

    method: methods.Method
    label: str
    place: str
    """Name of the record, or of the run, without the seed; "" for a run without a variant."""
    flags: tuple[str, ...]
    config: Any
    code: str

    def cell(self, record: str, run: str, seed: int, names: tuple[str, ...]) -> Cell:
        """Return the cell for a seed. `names`: the options that name the record and the run."""
        return Cell(
            kind=self.method.kind,
            method=self.method.name,
            label=self.label,
            record=record,
            run=run,
            seed=seed,
            path=self.method.path,
            flags=(*names, "--seed", str(seed), *self.flags),
            settings=settings_of(dataclasses.replace(self.config, seed=seed).science()),
            code=self.code,
        )


def _rates(grid: Grid, entry: Entry) -> tuple[float | None, ...]:
    """Return the poison rates of an attack: its own, else the grid's; None if it has no rate."""
    if "poison_rate" not in {
        f.name for f in dataclasses.fields(methods.load("attack", entry.name).config_class)
    }:
        return (None,)
    if "poison_rate" not in entry.options:
        return grid.poison_rates
    rates = _numbers(float, entry.options["poison_rate"], f"{entry.label}: poison_rate")
    if not rates:
        raise UserError(f"an empty grid; {entry.label}: poison_rate names nothing")
    return rates


def _attack_settings(grid: Grid, dataset: Entry, entry: Entry, rate: float | None) -> _Settings:
    """Parse the options of an attack on a data set, and name its record."""
    method = methods.load("attack", entry.name)
    shared = _by_field("attack", method.name, {**grid.attack_options, **dataset.options}, "attack")
    if rate is not None and "poison_rate" in shared:
        raise UserError(
            f"attack: poison_rate is not shared: say `poison_rates: [{shared['poison_rate']}]`, or"
            " give it to single attacks"
        )

    # An attack's own options come before those of all attacks.
    options = {**shared, **entry.options}
    if rate is not None:
        check_rate(rate)
        options["poison_rate"] = rate
    flags = ["--dataset", dataset.name, *as_flags(method.config_class, options, entry.label)]

    # Parsed as by the command itself, so that a mistake is found before anything runs.
    parsed = parse(
        method.config_class,
        method.name,
        "attack",
        flags,
        lambda config: Trained(config.dataset, config.epochs),
        entry.label,
    )
    parsed.config.check()
    _check_data_and_model(parsed.config)

    # What distinguishes records on the same data is part of their name.
    given = {name for name, origin in parsed.origins.items() if origin == "flag"}
    tags = [parsed.config.model] if "model" in given else []
    tags += [f"w{parsed.config.width}"] if "width" in given else []
    tags += [Path(parsed.config.yaml_path).stem] if parsed.config.yaml_path else []
    parts = [dataset.label, *tags, entry.label, *([] if rate is None else [f"{rate:g}"])]
    return _Settings(
        method, entry.label, "-".join(parts), tuple(flags), parsed.config, code_version(method.path)
    )


def _check_data_and_model(config: Any) -> None:
    """Refuse now what each command of the attack would refuse when it starts."""
    known = dataset_names()
    if config.dataset_path is None and config.dataset not in known:
        said = (
            f"unknown data set {config.dataset!r}.{suggest(config.dataset, known)} Known:"
            f" {', '.join(known)}"
        )
        raise UserError(
            f"{said}; any other needs a folder, `- {config.dataset}: {{dataset_path: FOLDER}}`"
        )
    if config.dataset_path is not None and not Path(config.dataset_path).is_dir():
        raise UserError(f"{config.dataset}: dataset_path {config.dataset_path}: no such folder")

    # timm is slow to import, and mostly not needed.
    if config.model not in models.OWN:
        import timm

        if not timm.is_model(config.model):
            raise UserError(
                "unknown model"
                f" {config.model!r}.{suggest(config.model, [*models.OWN, *timm.list_models()])}"
            )


def _defense_settings(grid: Grid, entry: Entry, trained: Trained) -> _Settings:
    """Parse the options of a defense, for a model that was trained so, and name its run."""
    method = methods.load("defense", entry.name)
    shared = _by_field("defense", method.name, grid.defense_options, "defense")
    flags = as_flags(method.config_class, {**shared, **entry.options}, entry.label)
    parsed = parse(
        method.config_class, method.name, "defense", flags, lambda _: trained, entry.label
    )
    parsed.config.check()

    # A label "dau-strict" of the method dau makes the run "strict".
    variant = (
        ""
        if entry.label == method.name
        else re.sub(rf"^{re.escape(method.name)}[-_]", "", entry.label)
    )
    # A pair's run is called by its split alone, as without a grid.
    variant = variant.removesuffix(f"+{method.name}")
    return _Settings(
        method, entry.label, variant, tuple(flags), parsed.config, code_version(method.path)
    )


def _refuse_twins(found: Sequence[Cell]) -> None:
    """Raise a UserError if two cells would have the same result."""
    seen: dict[str, Cell] = {}
    for cell in found:
        other = seen.setdefault(cell.name, cell)
        if other is not cell:
            raise UserError(
                f"{cell.label} and {other.label} would both be {cell.name}: give one of them"
                f" another label, `- LABEL: {{method: {cell.method}, ...}}`"
            )
