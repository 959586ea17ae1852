"""Commands: python -m backdoorlab COMMAND, or backdoorlab COMMAND after installation."""

import os
import platform
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from tyro.conf import Positional, arg

from . import config, models
from .bench import driver
from .cli import guarded, run_method
from .datasets import cache, locations, readers
from .datasets.inspection import describe_folder
from .datasets.load import load as load_dataset
from .depth import audit
from .device import choose_device
from .errors import UserError, one_line, suggest
from .exchange import doctor_weights, exporting, hub, importing, scan
from .exchange.verify import verify
from .execution.environment import usable_cores
from .execution.precision import choose
from .record import every_name, record_names, record_root
from .report import page
from .settings import methods, resources
from .settings.parse import parse_plain
from .tables import board, formats, layout, matrix, stored
from .tables import rows as measured


@dataclass(frozen=True)
class Table:
    """Records and defenses side by side."""

    names: Positional[tuple[str, ...]] = ()
    """Records to show. None: all that can be read."""
    format: Annotated[formats.Format, arg(aliases=["-f"])] = "text"
    """text, markdown, csv or latex."""
    mean: bool = False
    """Show one row per experiment instead of one per run: the mean over its seeds, published
    numbers and a significance test over attacks."""
    worst: bool = False
    """As --mean, but with the scores of the worst seed instead of the mean."""
    wide: bool = False
    """Show one row per attack and one column per defense: means of clean accuracy / ASR / RA, and
    the depth where it was audited."""
    missing: bool = True
    """Show each defense that was not run as a row without numbers."""
    defenses: str | None = None
    """Methods to show beside the attacked models, separated by commas, such as dau,ft. None: all
    that have a result."""
    columns: str | None = None
    """Columns to show, separated by commas, such as "defense,clean acc,ASR". None: all but
    trainings (cost in trainings of the model, by image passes), "no-attack cost" (clean accuracy
    that the same defense takes from the clean control) and PSNR (of the trigger)."""
    record_root: str | None = None
    """Folder of the records. None: $BACKDOORLAB_RECORDS, else record/ of the checkout, else
    ./record."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class Matrix:
    """Detectors against unlearners: a row for each split, a column for each unlearner."""

    names: Positional[tuple[str, ...]] = ()
    """Records to show. None: all."""
    format: Annotated[formats.Format, arg(aliases=["-f"])] = "text"
    """text, markdown, csv or latex."""
    record_root: str | None = None
    """Folder of the records. None: $BACKDOORLAB_RECORDS, else record/ of the checkout, else
    ./record."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class List:
    """Attacks, defenses, data sets and models, one line each."""

    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class Doctor:
    """Versions, device, disk space and cached data sets of this machine; or what would be read of a
    folder of data."""

    dataset_path: str | None = None
    """Folder of data to look into: splits, classes, sizes, what is left out and why."""
    dataset_config: str | None = None
    """Configuration of parquet shards, where that folder has several."""
    record_root: str | None = None
    """Folder of the records. None: $BACKDOORLAB_RECORDS, else record/ of the checkout, else
    ./record."""
    weights: str | None = None
    """File of weights to try out, with options of its own: doctor --weights FILE --help."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class Verify:
    """Check the hashes of records and of their defenses' results. Exit code 0: all intact, 2: some
    file is damaged."""

    names: Positional[tuple[str, ...]] = ()
    """Records to check. None: all."""
    record_root: str | None = None
    """Folder of the records. None: $BACKDOORLAB_RECORDS, else record/ of the checkout, else
    ./record."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class Push:
    """Upload a record with its results to the Hugging Face hub, as one commit."""

    name: Positional[str] = ""
    """Record to upload."""
    repo: str = ""
    """owner/name of the repository; created if it does not exist."""
    private: bool = False
    """Create a new repository as private: only its owner sees it."""
    overwrite: bool = False
    """Replace the files in the repository."""
    record_root: str | None = None
    """Folder of the records. None: $BACKDOORLAB_RECORDS, else record/ of the checkout, else
    ./record."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class Pull:
    """Download a record from the Hugging Face hub, verify it, and keep it if it is intact."""

    source: Positional[str] = ""
    """owner/name@commit, or owner/name for the newest commit, whose id is then printed."""
    save_folder_name: str = ""
    """Name of the new record. Required."""
    overwrite: bool = False
    """Replace a finished record of that name."""
    record_root: str | None = None
    """Folder of the records. None: $BACKDOORLAB_RECORDS, else record/ of the checkout, else
    ./record."""
    debug: bool = False
    """Show the traceback of an error."""


def table(options: Table) -> int:
    """Print records and their defenses; exit code 2 if some could not be read."""
    only = None if options.defenses is None else measured.OfMethods(_methods(options.defenses))

    # A damaged record is left out and reported, unless the user named it or wants a traceback.
    root = record_root(options.record_root)
    damaged: list[measured.Damaged] = []
    on_damage = measured.refuse if options.debug else damaged.append
    records = stored.readable(
        _names(options.names, root), root, measured.refuse if options.names else on_damage
    )
    if options.wide:
        shown = board.table(measured.rows(records, only, on_damage))
    else:
        shown = layout.table(
            records,
            options.format,
            mean=options.mean,
            worst=options.worst,
            missing=options.missing,
            columns=options.columns,
            only=only,
            on_damage=on_damage,
        )
    layout.show(shown, options.format)
    return layout.complain(damaged)


def _methods(names: str) -> tuple[str, ...]:
    """Split the names of --defenses, and refuse one that is no method."""
    known = methods.available("defense")
    found = tuple(name.strip() for name in names.split(","))
    for name in found:
        if name not in known:
            raise UserError(f"no defense {name!r}.{suggest(name, known)} Known: {', '.join(known)}")
    return found


def showing_matrix(options: Matrix) -> int:
    """Print detectors against unlearners for each record."""
    root = record_root(options.record_root)
    records = stored.readable(_names(options.names, root), root)
    layout.show(matrix.table(records), options.format)
    return 0


def verifying(options: Verify) -> int:
    """Check records; print one line per intact record and per damaged file."""
    # One damaged record does not end the check of the others.
    root = record_root(options.record_root)
    sound = True
    for name in _names(options.names, root):
        found = verify(name, root)
        sound = sound and not found.wrong
        if not found.wrong:
            print(f"OK  {name}  {found.files} files, {found.results} results of defenses")
        for line in found.wrong:
            print(one_line(line), file=sys.stderr)
    return 0 if sound else 2


def pushing(options: Push) -> int:
    """Upload a record and print the command that downloads it."""
    if not options.name or not options.repo:
        raise UserError("push NAME --repo owner/name: one of the two is missing")
    commit = hub.push(
        options.name,
        record_root(options.record_root),
        options.repo,
        hub.connect(),
        private=options.private,
        overwrite=options.overwrite,
    )
    print(
        f"pushed: python -m backdoorlab pull {options.repo}@{commit} --save_folder_name"
        f" {options.name}"
    )
    return 0


def pulling(options: Pull) -> int:
    """Download and verify a record."""
    if not options.source or not options.save_folder_name:
        raise UserError(
            "pull owner/name[@commit] --save_folder_name NAME: one of the two is missing"
        )
    pulled = hub.pull(
        options.source,
        options.save_folder_name,
        record_root(options.record_root),
        hub.connect(),
        overwrite=options.overwrite,
    )
    print(
        f"verified: {pulled.record.folder} is commit {pulled.commit}, with {pulled.results} results"
        " of defenses"
    )
    return 0


def _names(given: tuple[str, ...], root: Path) -> tuple[str, ...]:
    """Return the names that the user gave, or else those of all records."""
    return given or tuple(every_name(root))


def listing(_options: List) -> int:
    """Print tables of attacks and defenses, and the names of data sets and models."""
    attacks = [methods.load("attack", name) for name in methods.available("attack")]
    print("attacks: python attack/NAME.py --save_folder_name RECORD\n")
    print(_method_table(attacks, changes=_changed_by))
    print("\nlimits of attacks")
    for attack in attacks:
        if attack.limits:
            print(f"  {attack.name:<14}  {attack.limits}")

    print("\ndefenses: python defense/NAME.py --result_file RECORD")
    print("assumes: the poisoned model, the poisoned training set (train), a few trusted images,")
    print("clean seeds of each class, or a split of the training set")
    for role, heading in ROLES.items():
        found = [methods.load("defense", name) for name in methods.with_role(role)]
        print(f"\n{heading}\n")
        print(_method_table(found, assumes=lambda method: ", ".join(method.assumes)))

    print("\ndata sets: --dataset NAME")
    print("  digits          the default, in scikit-learn: 1,797 grey digits, as 1 x 32 x 32")
    print(f"  {', '.join(readers.TORCHVISION)}: by torchvision, which downloads them")
    print("  any other name  with --dataset_path FOLDER: parquet shards, or train/<class>/*.png")
    print("\nmodels: --model NAME")
    print(f"  {', '.join(models.OWN)}: of any --width")
    print("  any timm model  by name, such as resnet18, vgg19_bn or convnext_tiny")
    return 0


ROLES: dict[methods.Role, str] = {
    "defense": "repairs, and trainings on poisoned data",
    "detector": "detectors, which flag training images",
    "unlearner": "unlearners, which forget what a detector flagged: --split DETECTOR",
}
"""Role of a file in defense/ -> heading of its table."""
LINE = 100
"""Columns of a line of `list`."""


def _method_table(
    found: Sequence[methods.Method], **properties: Callable[[methods.Method], str]
) -> str:
    """Return aligned lines of at most LINE columns: name, summary and properties of each method.

    Args:
        found: the methods, one line each.
        properties: heading of a column -> method -> its text there.
    """
    # The column of ideas gets the room that the others leave.
    said = {title: [text(method) for method in found] for title, text in properties.items()}
    said = {"method": [method.name for method in found], **said}
    room = LINE - 2 * len(said)  # gaps of two spaces
    room -= sum(max(map(len, [title, *texts])) for title, texts in said.items())
    columns = ["method", "idea", *properties]
    ideas = [_summary(method.title, room) for method in found]
    texts = zip(said.pop("method"), ideas, *said.values(), strict=True)
    rows = [dict(zip(columns, map(formats.Cell, line), strict=True)) for line in texts]
    return formats.text(formats.Table(columns, rows, numbers=(), block=()))


def _summary(title: str, room: int) -> str:
    """Shorten the title of a method to `room` characters, at its first comma if that is enough."""
    # The first clause often says enough.
    title = title.rstrip(".")
    if len(title) > room:
        title = title.split(",")[0]
    return textwrap.shorten(title, max(room, len("...")), placeholder="...")


def _changed_by(attack: methods.Method) -> str:
    """Return what an attack changes, by the class of its options."""
    # The first base that fits counts, so subclasses stand before their bases.
    changes = {
        config.JointConfig: "training",
        config.CoverConfig: "images, labels; covers",
        config.AttackConfig: "images, labels",
        config.CleanLabelConfig: "images",
    }
    of_this = (words for base, words in changes.items() if issubclass(attack.config_class, base))
    return next(of_this, "nothing")


def doctor(options: Doctor) -> int:
    """Print versions, device, disk space and cached data sets, or what a folder contains."""
    if options.dataset_path is not None:
        print(*describe_folder(options.dataset_path, options.dataset_config), sep="\n")
        return 0
    device = choose_device("auto")
    root = record_root(options.record_root)
    print(f"python      {platform.python_version()} on {platform.system()} {platform.machine()}")
    print(f"packages    {', '.join(f'{name} {version(name)}' for name in PACKAGES)}")
    gpu = device.type == "cuda"
    about = torch.cuda.get_device_name() if gpu else "no usable GPU: that is fine, only slower"
    print(f"device      {device} ({about})")
    print(f"precision   {_precision(device)}")
    print(f"threads     {_threads(torch.get_num_threads(), usable_cores())}")

    print(f"records     {root.resolve()}: {len(record_names(root))} finished, {_writable(root)}")
    cached, about_cache = _cache()
    print(f"cache       {about_cache}")
    for entry in cached:
        print(
            f"data set    {entry.get('name')}: {entry.get('train')} + {entry.get('test')} images"
            f" of {_cached_shape(entry)}, fingerprint {str(entry.get('fingerprint'))[:12]} (cached)"
        )
    digits = load_dataset("digits")
    print(
        f"data set    digits: {len(digits.train)} + {len(digits.test)} images of"
        f" {_shape(digits.image_shape)}, fingerprint {digits.fingerprint[:12]} (embedded)"
    )
    return 0


PACKAGES = (
    "backdoorlab",
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "pandas",
    "safetensors",
    "tyro",
)
"""Packages whose versions `doctor` prints."""


def _cache() -> tuple[Sequence[Mapping[str, Any]], str]:
    """Return the cached data sets, and where the cache is or why there is none."""
    try:
        root = locations.cache_root()
    except UserError as error:
        return [], str(error)
    return cache.cached(), f"{root}: {_writable(root)}"


def _cached_shape(entry: Mapping[str, Any]) -> str:
    """Return C x H x W of a cached data set, read from the head of its file of images."""
    # Only the head of the file is read; the images stay on the disk.
    try:
        images = np.load(Path(entry["folder"]) / "train_images.npy", mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return "an unknown size (damaged: delete the folder)"
    return _shape(images.shape[1:])


def _shape(sides: Sequence[int]) -> str:
    return " x ".join(map(str, sides))


def _precision(device: torch.device) -> str:
    """Return the precision that `auto` picks for the network of the digits' preset.

    It is measured unless the result of an earlier measurement is stored.
    """
    # The preset in resource/config/digits.yaml.
    name, width = "preactresnet10", 16
    build = partial(
        models.build, name, num_classes=10, in_chans=1, mean=(0.5,), std=(0.25,), width=width
    )
    choice = choose("auto", device, build, name=name, width=width, image_shape=(1, 32, 32))
    return f"{choice.describe()}, for the digits' network"


def _threads(threads: int, cores: int) -> str:
    """Compare torch's threads with the cores that this process may use."""
    shared = cores < (os.cpu_count() or 1)
    line = f"{threads} on {cores} cores{' that this process may use' * shared}"
    # torch counts the machine's cores, whatever a container's quota is.
    more = f": more than cores, so set OMP_NUM_THREADS={cores}" if threads > cores else ""
    return line + more


def _writable(folder: Path) -> str:
    """Tell whether folders can be created and renamed in a folder, and the free space."""
    # What writing a record needs: new folders, and renaming them.
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as probe:
            (Path(probe) / "a").mkdir()
            (Path(probe) / "a").rename(Path(probe) / "b")
    except OSError as error:
        return f"NOT writable ({error})"
    return f"writable, {shutil.disk_usage(folder).free / 2**30:.0f} GiB free"


COMMANDS: dict[str, tuple[type, Callable[..., int]]] = {
    "table": (Table, table),
    "matrix": (Matrix, showing_matrix),
    "bench": (driver.Bench, driver.bench),
    "report": (page.Report, page.report),
    "import": (importing.Import, importing.import_record),
    "export": (exporting.Export, exporting.export_record),
    "scan": (scan.Scan, scan.scan),
    "audit": (audit.Audit, audit.audit),
    "verify": (Verify, verifying),
    "push": (Push, pushing),
    "pull": (Pull, pulling),
    "list": (List, listing),
    "doctor": (Doctor, doctor),
}
METHODS = ("attack", "defense")
USAGE = """usage: python -m backdoorlab COMMAND ...

  attack NAME --save_folder_name RECORD   run an attack (the same as python attack/NAME.py ...)
  defense NAME --result_file RECORD       run a defense (the same as python defense/NAME.py ...);
                                          an unlearner also takes --split DETECTOR
  table [RECORD ...] [--format FORMAT]    records and defenses side by side; --mean True: over seeds
  matrix [RECORD ...]                     detectors against unlearners: which half does the work
  bench --config GRID                     run the missing cells of attacks x defenses x seeds, then
                                          print their means
  report [RECORD ...] --html FILE         the table and charts as an offline page; --figures DIR for
                                          papers
  import --save_folder_name RECORD ...    a BackdoorBench record (--from backdoorbench PATH),
                                          or your own model (--weights FILE; to try it
                                          before, doctor --weights FILE)
  export RECORD ...                       to BackdoorBench (--to backdoorbench PATH),
                                          or as a model (--weights FILE)
  scan RECORD [--detector NAME]           the training images that DAU, or another detector,
                                          classifies as poisoned
  audit [RECORD ...] [--defense NAME]     the depth of each finished result: does the backdoor
                                          come back after a little fine-tuning?
  verify [RECORD ...]                     check the hashes of records and results
  push RECORD --repo OWNER/NAME           upload a record to the Hugging Face hub
  pull OWNER/NAME[@COMMIT] --save_folder_name RECORD
                                          download a record and verify it
  list                                    attacks, defenses, data sets and models
  doctor                                  versions, device, disk space, cached data sets; with
                                          --dataset_path FOLDER: what would be read of it

COMMAND --help shows the options of a command, --version the version of backdoorlab."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` names and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _dispatch(arguments), arguments)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if arguments[0] == "--version":
        print(f"backdoorlab {version('backdoorlab')}")
        return 0

    # An attack or a defense: the rest is what its own file would be given.
    command, rest = arguments[0], arguments[1:]
    if command in METHODS:
        kind: resources.Kind = "attack" if command == "attack" else "defense"
        if not rest or rest[0].startswith("-"):
            known = ", ".join(methods.available(kind))
            raise UserError(f"{command} NAME is missing. Known: {known}")
        path = methods.load(kind, rest[0]).path
        return run_method(kind, path, rest[1:], f"backdoorlab {kind} {rest[0]}")

    # What is read of a model has options of its own.
    if command == "doctor" and doctor_weights.asked(rest):
        looked = parse_plain(doctor_weights.Doctor, rest, "backdoorlab doctor --weights")
        return doctor_weights.doctor(looked)

    # All others have a dataclass of options each.
    if command not in COMMANDS:
        names = [*COMMANDS, *METHODS]
        raise UserError(
            f"unknown command {command!r}.{suggest(command, names)} Known: {', '.join(names)}"
        )
    options_class, function = COMMANDS[command]
    return function(parse_plain(options_class, rest, f"backdoorlab {command}"))


if __name__ == "__main__":
    raise SystemExit(main())
