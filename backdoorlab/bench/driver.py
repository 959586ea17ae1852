"""The command `bench`: run what is missing of a grid of attacks, defenses and seeds.

The only state is the files: a cell is done if its result exists and verifies. Any number of drivers
may work on one grid, each may be killed at any time, and the next one continues.
"""

import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from ..datasets.load import load as load_dataset
from ..depth import audit
from ..device import choose_device
from ..errors import UserError, one_line
from ..record import Record, read_result, record_root
from ..report import page
from ..storage import folders, reading
from ..tables import formats, layout
from ..tables import rows as measured
from . import grid, launchers
from .grid import Cell
from .launchers import ALREADY, BUSY, Launcher, Running, Task

FOLDER = ".bench"
"""Folder in that of the records: in it, each cell has a folder with its lock and its log."""
ATTENTIVE, PATIENT, REFUSED = 0.05, 0.5, 30.0
"""Seconds between two checks of running commands, of cells that another driver runs, and before
trying again after a refused start."""
QUIET = 300.0
"""Seconds without output after which a driver says what is running."""
STARTUP = 5.0
"""Seconds that a command takes before its own clock starts: only for the estimate of the time
left."""


@dataclass(frozen=True)
class Bench:
    """Run what is missing of a grid of attacks, defenses and seeds, and show the table of its
    means."""

    config: str | None = None
    """Grid file, or the name of one in resource/config/ (bench_digits)."""
    datasets: str | None = None
    """Data sets, separated by commas. This and the next four options replace what the file says."""
    attacks: str | None = None
    """Attacks, by label or method: badnet,blended or all."""
    defenses: str | None = None
    """Defenses, by label or method, or all."""
    poison_rates: str | None = None
    """Poisoned shares of the training set: 0.1,0.01."""
    seeds: str | None = None
    """Seeds: 0,1,2. The attack and the defenses of a record have the same one."""
    launcher: Literal["local", "ray", "slurm"] = "local"
    """Where the commands run: processes of this machine, a Ray cluster, or Slurm jobs. See
    docs/howto/cluster.md."""
    jobs: int | None = None
    """Commands that run at once; None is 1 for local, and all of them for ray and slurm."""
    ray_address: str | None = None
    """A running Ray cluster: auto, or HOST:PORT. None starts Ray on this machine only."""
    gpus_per_job: float = 0.0
    """Ray: share of a GPU for each command; 0.25 runs four on each GPU. Ray does not limit their
    memory."""
    cpus_per_job: float = 1.0
    """Ray: cores for each command."""
    slurm: tuple[str, ...] = ()
    """Slurm: submitit's parameters, key=value: slurm_partition=gpu gpus_per_node=1
    timeout_min=240."""
    other_code: bool = False
    """Keep records and results that another version of the code made. The table never averages
    results of two versions."""
    dry_run: bool = False
    """Show what is missing, and run nothing."""
    format: Annotated[formats.Format, arg(aliases=["-f"])] = "text"
    """Format of the table: text, markdown, csv or latex."""
    html: str | None = None
    """Also write a page of the grid's records to this file, as `report` does."""
    depth: bool = False
    """Also audit each finished result, in this process and one after the other: does the backdoor
    come back after a little fine-tuning? It costs seconds to minutes a cell, and a training of a
    clean model for each record."""
    worst: bool = False
    """Show the worst seed of each cell in the table, instead of the mean."""
    record_root: str | None = None
    """Folder of records."""
    debug: bool = False
    """Show a traceback with an error."""


@dataclass(frozen=True)
class State:
    """The state of a cell."""

    done: bool
    seconds: float | None = None
    """Duration of its command, by its own clock."""
    complaint: str = ""
    """Why it can be neither kept nor run; "" if it can."""


def bench(options: Bench) -> int:
    """Run the command; returns 0 if every cell is done and the page is whole, else 1."""
    lists = {
        key: getattr(options, key)
        for key in ("datasets", "attacks", "defenses", "poison_rates", "seeds")
    }
    cells = grid.cells(grid.read(options.config, **lists))
    root = record_root(options.record_root).resolve()
    # A page that cannot be written is refused before hours of work.
    if options.html is not None:
        page.check(options.html)

    states = {cell: look(cell, root, options.other_code) for cell in cells}
    missing = [cell for cell in cells if not states[cell].done and not states[cell].complaint]
    failed = {cell: state.complaint for cell, state in states.items() if state.complaint}
    for complaint in dict.fromkeys(failed.values()):
        _say(f"refused: {complaint}")
    _say(
        f"{len(cells)} cells in {root}: {sum(state.done for state in states.values())} done,"
        f" {len(missing)} to run"
    )
    if options.dry_run:
        for cell in missing:
            _say(f"  {cell.name}")
        return 1 if missing or failed else 0

    if missing:
        launcher = _launcher(options, root, len(missing))
        try:
            drive = Drive(missing, states, root, launcher, options)
            failed |= drive.run()
        finally:
            launcher.close()

    if options.depth:
        _audit(cells, failed, root)
    damaged = _show(cells, failed, root, options)
    if failed:
        _say(f"{len(failed)} of {len(cells)} cells are not done; the same command tries them again")
    return 1 if failed or damaged else 0


def _audit(cells: Sequence[Cell], failed: Container[Cell], root: Path) -> None:
    """Audit the finished results of a grid; a record that cannot be audited is one line."""
    device = choose_device("auto")
    finished = [cell for cell in cells if cell not in failed]
    for name in sorted({cell.record for cell in finished if cell.kind == "attack"}):
        of_record = [cell for cell in finished if cell.kind == "defense" and cell.record == name]
        try:
            results = [(cell.folder(root), read_result(cell.folder(root))) for cell in of_record]
            audit.audit_record(
                Record.load(name, root), results, list(audit.TESTS), audit.Audit(), device, _say
            )
        except UserError as error:
            _say(f"not audited: {name}: {one_line(str(error))}")


def _show(cells: Sequence[Cell], failed: Mapping[Cell, str], root: Path, options: Bench) -> int:
    """Print the table of a grid, and write its page.

    Args:
        cells: all cells of the grid.
        failed: those that are not done.
        root: folder of records.
        options: those of the command.

    Returns:
        The exit code of `report`, or 0 where no page is wanted.
    """
    finished = [cell for cell in cells if cell not in failed]
    only = {(cell.record, cell.method, cell.run) for cell in finished if cell.kind == "defense"}
    records = tuple(sorted({cell.record for cell in finished if cell.kind == "attack"}))
    rows = measured.rows((Record.load(name, root) for name in records), only)
    layout.show(
        layout.means(rows, options.format, missing=absent(cells, failed), worst=options.worst),
        options.format,
    )

    if options.html is None or not records:
        return 0
    report = page.Report(names=records, html=options.html, record_root=str(root))
    return page.report(report, only, _say)


def absent(cells: Sequence[Cell], failed: Container[Cell]) -> list[layout.Missing]:
    """List the attacks and defenses of which no seed is done, for the table.

    Args:
        cells: all cells of the grid.
        failed: those that are not done.
    """
    attacks = {cell.record: cell for cell in cells if cell.kind == "attack"}

    def shown(cell: Cell) -> layout.Missing:
        # The row of the table that the cell belongs to.
        attack = attacks[cell.record]
        settings = json.loads(attack.settings)
        defense = (
            (measured.UNDEFENDED, measured.UNDEFENDED)
            if cell.kind == "attack"
            else (measured.called(cell.method, cell.run), cell.method)
        )
        record = cell.record if attack not in failed else None
        return layout.Missing(
            settings["dataset"], attack.label, settings.get("poison_rate"), *defense, record
        )

    # Of equal rows the first is kept: one with a record, from which the table takes the attack's
    # name.
    done = {shown(cell) for cell in cells if cell not in failed}
    lost = sorted(
        (shown(cell) for cell in cells if cell in failed), key=lambda one: one.record is None
    )
    return [one for one in dict.fromkeys(lost) if one not in done]


# --- finished cells


def look(cell: Cell, root: Path, other_code: bool = False) -> State:
    """Check whether a cell's result exists, is sound, and has the grid's settings and code.

    Args:
        cell: the cell.
        root: folder of records.
        other_code: accept a result of another version of the code.
    """
    folder = cell.folder(root)
    # A killed --overwrite may have left the result aside.
    folders.recover(folder)
    done = _done(cell, root)
    if not done.exists():
        return State(False)

    try:
        found = (
            Record.load(cell.record, root).info if cell.kind == "attack" else _whole_result(folder)
        )
        data = _fingerprint(cell)
    except UserError as error:
        return State(False, complaint=str(error))

    differing = _differences(cell, found, data)
    if differing:
        settings = ", ".join(differing[:4]) + (", ..." if len(differing) > 4 else "")
        return State(
            False,
            complaint=(
                f"{folder} was made with other settings ({settings}): choose another label or"
                " --record_root, or move it"
            ),
        )

    # Other code may make other numbers: the user decides.
    code = measured.code(found)
    if code != cell.code and not other_code:
        made = f"{code or 'an unknown one'}, now {cell.code}"
        return State(
            False,
            complaint=(
                f"{folder} was made by other code ({made}): choose another --record_root, or keep"
                " it with --other_code True"
            ),
        )
    return State(True, _seconds(found))


def _differences(cell: Cell, found: Mapping[str, Any], data: str | None) -> list[str]:
    """Return the settings in which a result differs from its cell, in words.

    Args:
        cell: the cell.
        found: its record.json or result.json.
        data: fingerprint of the data that the grid names; None where it cannot differ.
    """
    wanted = json.loads(cell.settings)
    config = json.loads(grid.settings_of(found.get("config", {})))
    # With `plain`, a record contains an ordinary model besides: it serves without, too.
    if config.get("plain"):
        config["plain"] = wanted.get("plain")

    differing = [
        f"{key} {config.get(key)}, not {wanted.get(key)}"
        for key in sorted({*wanted, *config})
        if wanted.get(key) != config.get(key)
    ]
    if cell.kind == "attack" and found["attack"] not in (cell.method, "unknown"):
        differing.insert(0, f"attack {found['attack']}, not {cell.method}")
    if data is not None and data != found["dataset"]["fingerprint"]:
        differing.insert(0, f"data {found['dataset']['fingerprint'][:8]}, not {data[:8]}")
    return differing


def _fingerprint(cell: Cell) -> str | None:
    """Return the fingerprint of the data in the folder that an attack reads.

    None for a defense, and for data sets known by name, which do not change.
    """
    if "--dataset_path" not in cell.flags:
        return None
    wanted = json.loads(cell.settings)
    name, path, configuration = (
        cell.flags[cell.flags.index(flag) + 1] if flag in cell.flags else None
        for flag in ("--dataset", "--dataset_path", "--dataset_config")
    )
    return _fingerprint_of(name, path, wanted["image_size"], wanted["grey"], configuration)


@lru_cache(maxsize=64)
def _fingerprint_of(
    name: str,
    path: str,
    image_size: int | None,
    grey: bool | None,
    configuration: str | None,
) -> str:
    return load_dataset(
        name, path, image_size=image_size, grey=grey, configuration=configuration
    ).fingerprint


def _whole_result(folder: Path) -> dict[str, Any]:
    """Read a result.json, and hash every file that it lists."""
    result = read_result(folder)
    for name, entry in result["files"].items():
        reading.check_file(folder, name, entry)
    return result


def _done(cell: Cell, root: Path) -> Path:
    """Return the file whose presence means that a cell is finished."""
    return cell.folder(root) / ("record.json" if cell.kind == "attack" else "result.json")


def _seconds(found: Mapping[str, Any]) -> float | None:
    """Return how long the command of a result took; None where it does not say."""
    spent, plain = found.get("seconds"), (found.get("plain_scores") or {}).get("seconds")
    return (
        None
        if spent is None
        else spent + (plain or 0.0) + (found.get("evaluation_seconds") or 0.0) + STARTUP
    )


# --- running the others


class Drive:
    """One run of the driver: starts commands, collects their results, reports progress.

    Args:
        missing: the cells to run, in order.
        states: of all cells.
        root: folder of records.
        launcher: starts the commands.
        options: those of the command.
    """

    def __init__(
        self,
        missing: Sequence[Cell],
        states: Mapping[Cell, State],
        root: Path,
        launcher: Launcher,
        options: Bench,
    ) -> None:
        self.root = root
        self.launcher = launcher
        self.options = options

        self.waiting = list(missing)
        self.total = len(missing)
        self.running: dict[int, tuple[Cell, Running]] = {}  # by slot
        self.failed: dict[Cell, str] = {}
        self.since: dict[Cell, float] = {}
        self.not_before: dict[Cell, float] = {}
        self.said = time.monotonic()

        # Durations by kind and label: they are the estimate for cells that are still to run.
        self.known: dict[tuple[str, str], list[float]] = defaultdict(list)
        for cell, state in states.items():
            if state.seconds is not None:
                self.known[cell.kind, cell.label].append(state.seconds)

        # A defense can start once its record is ready, and never if that cannot be made.
        attacks = {cell: state for cell, state in states.items() if cell.kind == "attack"}
        self.ready = {cell.record for cell, state in attacks.items() if state.done}
        self._give_up({cell.record for cell, state in attacks.items() if state.complaint})

    def run(self) -> dict[Cell, str]:
        """Run all cells; returns those that failed, and why."""
        try:
            while self.waiting or self.running:
                self._fill()
                self._collect()
                if self.waiting or self.running:
                    self._pulse()
                    time.sleep(ATTENTIVE)
        except BaseException:
            # Ctrl-C is passed on; only if the driver itself is killed do its commands go on.
            for _, running in self.running.values():
                running.stop()
            raise
        return self.failed

    def _fill(self) -> None:
        """Start what can be started, in the grid's order."""
        free = [slot for slot in range(self.launcher.slots) if slot not in self.running]
        # A record comes before its defenses, and a detector before those that need its split.
        coming = {cell.splits for cell in self.waiting}
        coming |= {cell.splits for cell, _ in self.running.values()}
        able = [
            cell
            for cell in self.waiting
            if cell.kind == "attack" or (cell.record in self.ready and cell.needs not in coming)
        ]
        due = [cell for cell in able if self.not_before.get(cell, 0.0) <= time.monotonic()]
        for slot, cell in zip(free, due, strict=False):
            try:
                self.running[slot] = cell, self.launcher.start(self._task(cell), slot)
            except UserError as error:
                # A full or slow queue may take it later. Running commands must not suffer.
                if not self.running:
                    raise
                self.not_before[cell] = time.monotonic() + REFUSED
                _say(f"  {cell.name} could not be started ({error}): tried again")
                continue
            self.since[cell] = time.monotonic()
            self.waiting.remove(cell)

    def _collect(self) -> None:
        """Process the results of commands that have ended."""
        for slot, (cell, running) in list(self.running.items()):
            try:
                code = running.poll()
            except UserError as error:
                del self.running[slot]
                self._fail(cell, str(error))
                continue
            if code is not None:
                del self.running[slot]
                self._answer(cell, code)

    def _pulse(self) -> None:
        """Say what is running, and its last line of output, if nothing was said for a while."""
        now = time.monotonic()
        if now - self.said < QUIET:
            return
        self.said = now
        for cell, _ in self.running.values():
            _say(
                f"  {cell.name} has run for {_duration(now - self.since[cell])}:"
                f" {launchers.last_words(self._folder(cell))[:100] or 'no word yet'}"
            )
        if not self.running:
            _say(f"  {len(self.waiting)} cells wait for another driver")

    def _answer(self, cell: Cell, code: int) -> None:
        """Process the exit code of a cell's command, or BUSY, or ALREADY."""
        # Another driver runs it.
        if code == BUSY:
            self.not_before[cell] = time.monotonic() + PATIENT
            self.waiting.append(cell)
            return

        # The files decide, not the exit code.
        state = look(cell, self.root, self.options.other_code)
        if not state.done:
            why = (
                f"ended by signal {-code}"
                if code < 0
                else launchers.last_words(self._folder(cell)) or f"exit code {code} without a word"
            )
            self._fail(cell, state.complaint or why)
            return

        if cell.kind == "attack":
            self.ready.add(cell.record)
        if state.seconds is not None:
            self.known[cell.kind, cell.label].append(state.seconds)

        by = "by another driver" if code == ALREADY else f"in {_duration(state.seconds)}"
        self._report(f"{cell.name} done {by}")

    def _fail(self, cell: Cell, why: str) -> None:
        self.failed[cell] = why
        self._report(f"FAILED {cell.name}: {why} (log: {self._folder(cell) / launchers.LOG})")
        if cell.kind == "attack":
            self._give_up({cell.record})

    def _give_up(self, records: Iterable[str]) -> None:
        """Mark the defenses on records that cannot be made as failed."""
        for record in records:
            lost = [cell for cell in self.waiting if cell.record == record]
            self.failed |= dict.fromkeys(lost, f"there is no record {record}")
            self.waiting = [cell for cell in self.waiting if cell.record != record]
            if lost:
                _say(f"  {len(lost)} defenses of {record} are not run")

    def _report(self, line: str) -> None:
        """Print a line with the progress and the estimated time left."""
        left = len(self.waiting) + len(self.running)
        # Without --jobs a cluster has a slot for every cell, and it is unknown how many of them run
        # at once.
        slots = self.launcher.slots if self.options.launcher == "local" else self.options.jobs

        estimate = (
            None
            if slots is None
            else remaining(
                [(cell.kind, cell.label) for cell in self._unfinished()], self.known, slots
            )
        )

        about = (
            ""
            if not left
            else f"; {left} left" + ("" if estimate is None else f", about {_duration(estimate)}")
        )
        _say(f"[{self.total - left}/{self.total}] {line}{about}")
        self.said = time.monotonic()

    def _unfinished(self) -> list[Cell]:
        return [*self.waiting, *(cell for cell, _ in self.running.values())]

    def _folder(self, cell: Cell) -> Path:
        """Return the folder of a cell's lock and log."""
        return (
            self.root
            / FOLDER
            / cell.record
            / ("attack" if cell.kind == "attack" else f"{cell.method}-{cell.run}")
        )

    def _task(self, cell: Cell) -> Task:
        # With full paths, since the command may run on another machine.
        flags = (*cell.flags, "--record_root", str(self.root.resolve()))
        environment = {} if self.options.launcher == "local" else launchers.passed_on()
        return Task(
            launchers.command(cell.path, flags),
            self._folder(cell).resolve(),
            _done(cell, self.root).resolve(),
            environment,
        )


def remaining(
    cells: Sequence[tuple[str, str]], known: Mapping[tuple[str, str], Sequence[float]], slots: int
) -> float | None:
    """Estimate the seconds until cells are done.

    Args:
        cells: (kind, label) of each.
        known: durations of finished cells by (kind, label). One without any is assumed to take the
            mean of all.
        slots: number of commands that run at once.

    Returns:
        None if nothing is known yet.
    """
    every = [seconds for times in known.values() for seconds in times]
    if not every:
        return None
    mean = math.fsum(every) / len(every)
    each = [math.fsum(times) / len(times) if (times := known.get(cell)) else mean for cell in cells]
    return math.fsum(each) / max(1, min(slots, len(each)))


def _launcher(options: Bench, root: Path, missing: int) -> Launcher:
    """Return the launcher that the options ask for. `missing`: number of cells to run."""
    if options.jobs is not None and options.jobs < 1:
        raise UserError(f"jobs must be >= 1, got {options.jobs}")
    if options.launcher == "ray":
        return launchers.OnRay(
            options.jobs or missing, options.ray_address, options.gpus_per_job, options.cpus_per_job
        )
    if options.launcher == "slurm":
        return launchers.OnSlurm(
            options.jobs or missing, root / FOLDER / "slurm", launchers.parameters(options.slurm)
        )
    return launchers.Local(options.jobs or 1)


def _duration(seconds: float | None) -> str:
    """Return a duration as text: "80 s", "12 min", "2.5 h"."""
    if seconds is None:
        return "unknown time"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
