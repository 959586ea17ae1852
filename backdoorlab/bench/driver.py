"""Attacks x defenses x seeds in one command: what is missing is run, what is finished is kept.

There is no state but the files: a cell is done when its result is there and verifies. So any number
of drivers may work on one grid, each may be killed at any time, and the next one goes on.
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
from ..errors import UserError
from ..record import Record, read_result, record_root
from ..report import page
from ..storage import folders, reading
from ..tables import formats, layout
from ..tables import rows as measured
from . import grid, launchers
from .grid import Cell
from .launchers import ALREADY, BUSY, Launcher, Running, Task

FOLDER = ".bench"
"""Below the records: a folder for each cell, with its lock and its log."""
ATTENTIVE, PATIENT, REFUSED = 0.05, 0.5, 30.0
"""Seconds between two looks at what runs and at what another driver holds, and before a start that
was refused is tried again."""
QUIET = 300.0
"""Seconds without a line after which a driver says what runs."""
STARTUP = 5.0
"""Seconds that a command takes before it measures itself: only for the estimate of what is left."""


@dataclass(frozen=True)
class Bench:
    """Run what is missing of a grid of attacks, defenses and seeds, then show the table of its
    means."""

    config: str | None = None
    """Grid file, or the name of one in resource/config/ (bench_digits)."""
    datasets: str | None = None
    """Data sets, separated by commas; like the next four, in place of what the file says."""
    attacks: str | None = None
    """Attacks by label or method: badnet,blended, or all."""
    defenses: str | None = None
    """Defenses by label or method, or all."""
    poison_rates: str | None = None
    """Shares of the training set: 0.1,0.01."""
    seeds: str | None = None
    """Seeds, one for the attack and the defenses of a record alike: 0,1,2."""
    launcher: Literal["local", "ray", "slurm"] = "local"
    """Where the commands run: processes of this machine, a Ray cluster, or Slurm jobs. See
    docs/scaling.md."""
    jobs: int | None = None
    """Commands at once; None is 1 for local, and as many as there are for ray and slurm."""
    ray_address: str | None = None
    """A running Ray cluster: auto, or HOST:PORT. None starts Ray on this machine alone."""
    gpus_per_job: float = 0.0
    """Ray: share of a GPU for each command; 0.25 puts four on one. Ray counts, it does not limit
    memory."""
    cpus_per_job: float = 1.0
    """Ray: cores for each command."""
    slurm: tuple[str, ...] = ()
    """Slurm: submitit's parameters, key=value: slurm_partition=gpu gpus_per_node=1
    timeout_min=240."""
    other_code: bool = False
    """Keep records and results that other code made (the table still never averages them with those
    of this one)."""
    dry_run: bool = False
    """Say what is missing, and run nothing."""
    format: Annotated[formats.Format, arg(aliases=["-f"])] = "text"
    """Of the table: text, markdown, csv or latex."""
    html: str | None = None
    """Also write a page of the grid's records to this file, as `report` does."""
    worst: bool = False
    """Show each cell's worst seed in the table instead of the mean."""
    record_root: str | None = None
    """Folder of records."""
    debug: bool = False
    """Show a traceback with an error."""


@dataclass(frozen=True)
class State:
    """How far a cell is."""

    done: bool
    seconds: float | None = None
    """What its command took, by its own clock."""
    complaint: str = ""
    """Why it can be neither kept nor run."""


def bench(options: Bench) -> int:
    """The command: 0 where every cell is done, else 1."""
    lists = {
        key: getattr(options, key)
        for key in ("datasets", "attacks", "defenses", "poison_rates", "seeds")
    }
    cells = grid.cells(grid.read(options.config, **lists))
    root = record_root(options.record_root).resolve()
    if options.html is not None:
        page.check(options.html)  # what is missing is said before the work
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
    finished = [cell for cell in cells if cell not in failed]
    only = {(cell.record, cell.method, cell.run) for cell in finished if cell.kind == "defense"}
    records = tuple(sorted({cell.record for cell in finished if cell.kind == "attack"}))
    rows = measured.rows((Record.load(name, root) for name in records), only)
    layout.show(
        layout.means(rows, options.format, missing=absent(cells, failed), worst=options.worst),
        options.format,
    )
    damaged = 0
    if options.html is not None and records:
        damaged = page.report(
            page.Report(names=records, html=options.html, record_root=str(root)), only, _say
        )
    if failed:
        _say(f"{len(failed)} of {len(cells)} cells are not done; the same command tries them again")
    return 1 if failed or damaged else 0


def absent(cells: Sequence[Cell], failed: Container[Cell]) -> list[layout.Missing]:
    """Attacks and defenses of which no seed is done."""
    attacks = {cell.record: cell for cell in cells if cell.kind == "attack"}

    def shown(cell: Cell) -> layout.Missing:
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

    done = {shown(cell) for cell in cells if cell not in failed}
    lost = sorted(
        (shown(cell) for cell in cells if cell in failed), key=lambda one: one.record is None
    )
    return [one for one in dict.fromkeys(lost) if one not in done]


# --- what is there


def look(cell: Cell, root: Path, other_code: bool = False) -> State:
    """Whether a cell's result is there, whole, and made with the settings and the code that the
    grid asks for."""
    folder = cell.folder(root)
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
    wanted, config = (
        json.loads(cell.settings),
        json.loads(grid.settings_of(found.get("config", {}))),
    )
    if config.get("plain"):  # it holds more than is asked for
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
    if differing:
        settings = ", ".join(differing[:4]) + (", ..." if len(differing) > 4 else "")
        return State(
            False,
            complaint=(
                f"{folder} was made with other settings ({settings}): choose another label or"
                " --record_root, or move it"
            ),
        )
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


def _fingerprint(cell: Cell) -> str | None:
    """Of the images in the folder that an attack is to read; None for a defense, and where no
    folder is named: sets known by name do not change."""
    if "--dataset_path" not in cell.flags:
        return None
    wanted = json.loads(cell.settings)
    name, path = (
        cell.flags[cell.flags.index(flag) + 1] for flag in ("--dataset", "--dataset_path")
    )
    return _fingerprint_of(name, path, wanted["image_size"], wanted["grey"])


@lru_cache(maxsize=64)
def _fingerprint_of(name: str, path: str, image_size: int | None, grey: bool | None) -> str:
    return load_dataset(name, path, image_size=image_size, grey=grey).fingerprint


def _whole_result(folder: Path) -> dict[str, Any]:
    result = read_result(folder)
    for name, entry in result["files"].items():
        reading.check_file(folder, name, entry)
    return result


def _done(cell: Cell, root: Path) -> Path:
    return cell.folder(root) / ("record.json" if cell.kind == "attack" else "result.json")


def _seconds(found: Mapping[str, Any]) -> float | None:
    spent, plain = found.get("seconds"), (found.get("plain_scores") or {}).get("seconds")
    return (
        None
        if spent is None
        else spent + (plain or 0.0) + (found.get("evaluation_seconds") or 0.0) + STARTUP
    )


# --- running what is not


class Drive:
    """One driver at work: hands cells over, takes their answers, says how far it is."""

    def __init__(
        self,
        missing: Sequence[Cell],
        states: Mapping[Cell, State],
        root: Path,
        launcher: Launcher,
        options: Bench,
    ) -> None:
        self.waiting, self.total, self.root, self.launcher, self.options = (
            list(missing),
            len(missing),
            root,
            launcher,
            options,
        )
        self.ready = {
            cell.record for cell, state in states.items() if cell.kind == "attack" and state.done
        }
        self.running: dict[int, tuple[Cell, Running]] = {}
        self.failed: dict[Cell, str] = {}
        self.since: dict[Cell, float] = {}
        self.said = time.monotonic()
        self.not_before: dict[Cell, float] = {}
        self.known: dict[tuple[str, str], list[float]] = defaultdict(list)
        for cell, state in states.items():
            if state.seconds is not None:
                self.known[cell.kind, cell.label].append(state.seconds)
        hopeless = {
            cell.record
            for cell, state in states.items()
            if cell.kind == "attack" and state.complaint
        }
        self._give_up(hopeless)

    def run(self) -> dict[Cell, str]:
        """Until nothing is left; the cells that failed, and why."""
        try:
            while self.waiting or self.running:
                self._fill()
                self._collect()
                if self.waiting or self.running:
                    self._pulse()
                    time.sleep(ATTENTIVE)
        except BaseException:
            for _, running in self.running.values():
                running.stop()
            raise
        return self.failed

    def _fill(self) -> None:
        """Hand over what can start, in the grid's order; what another driver holds is tried again
        later."""
        free = [slot for slot in range(self.launcher.slots) if slot not in self.running]
        able = [cell for cell in self.waiting if cell.kind == "attack" or cell.record in self.ready]
        due = [cell for cell in able if self.not_before.get(cell, 0.0) <= time.monotonic()]
        for slot, cell in zip(free, due, strict=False):
            try:
                self.running[slot] = cell, self.launcher.start(self._task(cell), slot)
            except UserError as error:
                # A queue that is full or slow to answer takes it later; what runs is not to suffer.
                if not self.running:
                    raise
                self.not_before[cell] = time.monotonic() + REFUSED
                _say(f"  {cell.name} could not be started ({error}): tried again")
                continue
            self.since[cell] = time.monotonic()
            self.waiting.remove(cell)

    def _collect(self) -> None:
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
        """What runs and for how long, with the last line of its log, where nothing was said for a
        while."""
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
        if code == BUSY:
            self.not_before[cell] = time.monotonic() + PATIENT
            self.waiting.append(cell)
            return
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
        """The defenses of an attack that failed cannot run."""
        for record in records:
            lost = [cell for cell in self.waiting if cell.record == record]
            self.failed |= dict.fromkeys(lost, f"there is no record {record}")
            self.waiting = [cell for cell in self.waiting if cell.record != record]
            if lost:
                _say(f"  {len(lost)} defenses of {record} are not run")

    def _report(self, line: str) -> None:
        left = len(self.waiting) + len(self.running)
        # Without --jobs a cluster has a slot for every cell, and how many of them run at once is
        # its own affair.
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
        return (
            self.root
            / FOLDER
            / cell.record
            / ("attack" if cell.kind == "attack" else f"{cell.method}-{cell.run}")
        )

    def _task(self, cell: Cell) -> Task:
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
    """Seconds until (kind, label) cells are done: each as long as its like took, else as long as
    cells took so far; None if none did."""
    every = [seconds for times in known.values() for seconds in times]
    if not every:
        return None
    mean = math.fsum(every) / len(every)
    each = [math.fsum(times) / len(times) if (times := known.get(cell)) else mean for cell in cells]
    return math.fsum(each) / max(1, min(slots, len(each)))


def _launcher(options: Bench, root: Path, missing: int) -> Launcher:
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
    if seconds is None:
        return "unknown time"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
