"""python -m backdoorlab <command>, or backdoorlab <command> after installation."""

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
from tyro.conf import Positional, arg

from . import models
from .bench import driver
from .cli import guarded, run_method
from .datasets import cache, locations, readers
from .datasets.load import load as load_dataset
from .device import choose_device
from .errors import UserError, one_line, suggest
from .exchange import exporting, hub, importing, scan
from .exchange.verify import verify
from .execution.precision import choose
from .record import every_name, record_names, record_root
from .report import page
from .settings import methods, resources
from .settings.parse import parse_plain
from .tables import formats, layout
from .tables import rows as measured


@dataclass(frozen=True)
class Table:
    """Records and defenses side by side."""

    names: Positional[tuple[str, ...]] = ()
    """Records to show; none means all that can be read."""
    format: Annotated[formats.Format, arg(aliases=["-f"])] = "text"
    """text, markdown, csv or latex."""
    mean: bool = False
    """A row for the mean over seeds of each experiment, with published numbers and a test over
    attacks, instead of a row for each run."""
    worst: bool = False
    """As mean, with the worst seed's own numbers."""
    record_root: str | None = None
    """Folder of records."""
    debug: bool = False
    """Show a traceback with an error."""


@dataclass(frozen=True)
class List:
    """Attacks, defenses with what they assume, data sets and models."""

    debug: bool = False
    """Show a traceback with an error."""


@dataclass(frozen=True)
class Doctor:
    """What this machine offers, and whether anything is in the way."""

    record_root: str | None = None
    """Folder of records."""
    debug: bool = False
    """Show a traceback with an error."""


@dataclass(frozen=True)
class Verify:
    """Hash records and their defenses' results again. Exit code 0 where all is as it was written,
    else 2."""

    names: Positional[tuple[str, ...]] = ()
    """Records to look at; none means all."""
    record_root: str | None = None
    """Folder of records."""
    debug: bool = False
    """Show a traceback with an error."""


@dataclass(frozen=True)
class Push:
    """Upload a record with its results to the Hugging Face hub, as one commit."""

    name: Positional[str] = ""
    """Record to upload."""
    repo: str = ""
    """owner/name of the repository; made where it is missing."""
    private: bool = False
    """Make a new repository visible to its owner only."""
    overwrite: bool = False
    """Replace what the repository holds."""
    record_root: str | None = None
    """Folder of records."""
    debug: bool = False
    """Show a traceback with an error."""


@dataclass(frozen=True)
class Pull:
    """Download a record from the Hugging Face hub and verify it before it is kept."""

    source: Positional[str] = ""
    """owner/name, or owner/name@commit; without one the newest commit, which is then printed."""
    save_folder_name: str = ""
    """Name of the record to write. Required."""
    overwrite: bool = False
    """Replace a finished record of that name."""
    record_root: str | None = None
    """Folder of records."""
    debug: bool = False
    """Show a traceback with an error."""


def table(options: Table) -> int:
    root = record_root(options.record_root)
    damaged: list[measured.Damaged] = []
    on_damage = measured.refuse if options.debug else damaged.append
    records = measured.readable(
        _names(options.names, root), root, measured.refuse if options.names else on_damage
    )
    shown = layout.table(
        records, options.format, mean=options.mean, worst=options.worst, on_damage=on_damage
    )
    layout.show(shown, options.format)
    return layout.complain(damaged)


def verifying(options: Verify) -> int:
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
    """The records named, or all of them."""
    return given or tuple(every_name(root))


def listing(_options: List) -> int:
    print("attacks (python attack/NAME.py --save_folder_name RECORD)")
    for name in methods.available("attack"):
        attack = methods.load("attack", name)
        print(
            f"  {name:<16}{attack.title}"
            + (f"\n  {'':<16}{attack.limits}" if attack.limits else "")
        )
    print("\ndefenses (python defense/NAME.py --result_file RECORD)")
    for name in methods.available("defense"):
        method = methods.load("defense", name)
        print(f"  {name:<16}{method.title}\n  {'':<16}assumes: {layout.assumes(method.assumes)}")
    print("\ndata sets (--dataset NAME)")
    print(f"  {'digits':<16}embedded, the default: 1,797 grey digits as 32x32 images")
    print(f"  {', '.join(readers.TORCHVISION)}: torchvision's, downloaded where there is a network")
    print(
        "  any other name with --dataset_path FOLDER: parquet shards (img or image, label) or"
        " train/<class>/*.png"
    )
    print(
        f"\nmodels (--model NAME)\n  {', '.join(models.OWN)} (--width), or any timm model by name,"
        " such as resnet18, vgg19_bn, convnext_tiny"
    )
    return 0


def doctor(options: Doctor) -> int:
    device = choose_device("auto")
    root = record_root(options.record_root)
    packages = (
        "backdoorlab",
        "torch",
        "torchvision",
        "timm",
        "numpy",
        "pandas",
        "safetensors",
        "tyro",
    )
    print(f"python      {platform.python_version()} on {platform.system()} {platform.machine()}")
    print(f"packages    {', '.join(f'{name} {version(name)}' for name in packages)}")
    print(
        f"device      {device}"
        + (
            f" ({torch.cuda.get_device_name()})"
            if device.type == "cuda"
            else " (no usable GPU: that is fine, only slower)"
        )
    )
    print(f"precision   {_precision(device)}")
    print(f"threads     {torch.get_num_threads()} of {os.cpu_count()} cores")
    print(f"records     {root.resolve()}: {len(record_names(root))} finished, {_writable(root)}")
    print(f"cache       {locations.cache_root()}: {_writable(locations.cache_root())}")
    for entry in cache.cached():
        print(
            f"data set    {entry.get('name')}: {entry.get('train')} + {entry.get('test')} images,"
            f" fingerprint {str(entry.get('fingerprint'))[:12]}"
        )
    digits = load_dataset("digits")
    print(
        f"data set    digits: {len(digits.train)} + {len(digits.test)} images, fingerprint"
        f" {digits.fingerprint[:12]} (embedded)"
    )
    return 0


def _precision(device: torch.device) -> str:
    """What `auto` becomes for the network of the digits' preset, measured here unless it was
    before."""
    shape = (1, 32, 32)
    network = {"architecture": "preactresnet10", "width": 16, "image_shape": list(shape)}
    build = partial(
        models.build,
        "preactresnet10",
        num_classes=10,
        in_chans=1,
        mean=(0.5,),
        std=(0.25,),
        width=16,
    )
    return f"{choose('auto', device, network, build).describe()}, for the digits' network"


def _writable(folder: Path) -> str:
    """Free space, and whether a folder can be made, renamed and removed there."""
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
    "bench": (driver.Bench, driver.bench),
    "report": (page.Report, page.report),
    "import": (importing.Import, importing.import_record),
    "export": (exporting.Export, exporting.export_record),
    "scan": (scan.Scan, scan.scan),
    "verify": (Verify, verifying),
    "push": (Push, pushing),
    "pull": (Pull, pulling),
    "list": (List, listing),
    "doctor": (Doctor, doctor),
}
METHODS = ("attack", "defense")
USAGE = """usage: python -m backdoorlab COMMAND ...

  attack NAME --save_folder_name RECORD   run an attack (the same as python attack/NAME.py ...)
  defense NAME --result_file RECORD       run a defense (the same as python defense/NAME.py ...)
  table [RECORD ...] [--format FORMAT]    records and defenses side by side; --mean True: over seeds
  bench --config GRID                     attacks x defenses x seeds: run what is missing
  report [RECORD ...] --html FILE         the same as an offline page; --figures DIR for papers
  import --save_folder_name RECORD ...    a BackdoorBench record (--from backdoorbench PATH),
                                          or your own model (--weights FILE)
  export RECORD ...                       to BackdoorBench (--to backdoorbench PATH),
                                          or as a model (--weights FILE)
  scan RECORD                             the training images that DAU takes for poison
  verify [RECORD ...]                     hash records and results again; names what is damaged
  push RECORD --repo OWNER/NAME           upload a record to the Hugging Face hub
  pull OWNER/NAME[@COMMIT] --save_folder_name RECORD
                                          download a record and verify it
  list                                    attacks, defenses with what they assume, data sets, models
  doctor                                  versions, device, disk, data sets found

COMMAND --help says more; --version is backdoorlab's own."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _dispatch(arguments), arguments)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if arguments[0] == "--version":
        print(f"backdoorlab {version('backdoorlab')}")
        return 0
    command, rest = arguments[0], arguments[1:]
    if command in METHODS:
        kind: resources.Kind = "attack" if command == "attack" else "defense"
        if not rest or rest[0].startswith("-"):
            raise UserError(
                f"{command} NAME is missing. Known: {', '.join(methods.available(kind))}"
            )
        return run_method(
            kind, methods.load(kind, rest[0]).path, rest[1:], f"backdoorlab {kind} {rest[0]}"
        )
    if command not in COMMANDS:
        known = [*COMMANDS, *METHODS]
        raise UserError(
            f"unknown command {command!r}.{suggest(command, known)} Known: {', '.join(known)}"
        )
    options_class, function = COMMANDS[command]
    return function(parse_plain(options_class, rest, f"backdoorlab {command}"))


if __name__ == "__main__":
    raise SystemExit(main())
