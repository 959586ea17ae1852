"""Bench: each cell of a grid is finished exactly once, whatever happens to drivers and commands."""

import contextlib
import dataclasses
import errno
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import yaml
from PIL import Image

from backdoorlab.__main__ import main
from backdoorlab.bench import driver, grid, launchers
from backdoorlab.bench.driver import Bench, Drive
from backdoorlab.bench.grid import Cell
from backdoorlab.datasets.load import load as load_dataset
from backdoorlab.errors import UserError
from backdoorlab.record import Record
from backdoorlab.storage import writing

QUICK = Path(__file__).parent / "quick_cell.py"
HAS_FORK = "fork" in multiprocessing.get_all_start_methods()


# --- quick cells: real files, no training


@pytest.fixture
def made(small: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Record:
    """Make a record with a result of DAU, which quick cells copy."""
    folder = tmp_path / "made" / "small"
    shutil.copytree(small.folder, folder)
    monkeypatch.setenv("QUICK_MADE", str(folder))
    monkeypatch.setenv("QUICK_SECONDS", "0.3")
    return Record.load("small", folder.parent)


def quick_cells(made: Record, records: int, runs: int) -> list[Cell]:
    """Make `records` attacks with `runs` defenses each, whose commands take a fraction of a
    second."""
    result = json.loads((made.folder / "defense" / "dau" / "seed0" / "result.json").read_text())
    plain: dict[str, Any] = dict(label="quick", path=QUICK)
    found = []
    for number in range(records):
        name = f"r{number}"
        settings, code = grid.settings_of(made.info["config"]), made.info["code"]
        flags = ("--save_folder_name", name, "--seed", str(number))
        found.append(
            Cell(
                "attack",
                "badnet",
                record=name,
                run="",
                seed=number,
                flags=flags,
                settings=settings,
                code=code,
                **plain,
            )
        )
        settings, code = grid.settings_of(result["config"]), result["code"]
        for run in range(runs):
            flags = ("--result_file", name, "--seed", str(run))
            found.append(
                Cell(
                    "defense",
                    "dau",
                    record=name,
                    run=f"seed{run}",
                    seed=run,
                    flags=flags,
                    settings=settings,
                    code=code,
                    **plain,
                )
            )
    return found


def states(cells: list[Cell], root: Path) -> dict[Cell, driver.State]:
    return {cell: driver.look(cell, root) for cell in cells}


def work(cells: list[Cell], root: Path, jobs: int = 2) -> dict[Cell, str]:
    """Run one driver to its end."""
    found = states(cells, root)
    missing = [cell for cell, state in found.items() if not state.done and not state.complaint]
    return Drive(missing, found, root, launchers.Local(jobs), Bench()).run()


def logs(root: Path) -> list[list[str]]:
    return [
        path.read_text().splitlines()
        for path in sorted((root / driver.FOLDER).rglob(launchers.LOG))
    ]


def test_a_grid_is_run_once_and_then_kept(
    made: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells, root = quick_cells(made, 2, 3), tmp_path / "root"
    assert work(cells, root) == {}
    assert all(state.done for state in states(cells, root).values())
    said = capsys.readouterr().err
    assert "[8/8] " in said and "7 left, about " in said
    again = work(cells, root)
    assert again == {} and capsys.readouterr().err == ""
    assert (
        all([line for line in log if line == "finished"] == ["finished"] for log in logs(root))
        and len(logs(root)) == 8
    )


def test_a_driver_says_what_runs_where_nothing_ends(
    made: Record,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cells = quick_cells(made, 1, 0)
    work(cells, tmp_path / "control")
    assert "has run for" not in capsys.readouterr().err
    monkeypatch.setattr("backdoorlab.bench.driver.QUIET", 0.0)
    work(cells, tmp_path / "root")
    *running, last = capsys.readouterr().err.splitlines()
    assert running[0] == "  r0 has run for 0 s: no word yet" and last.startswith("[1/1] r0 done")
    assert {line.rpartition(": ")[2] for line in running} <= {"no word yet", "started", "finished"}


def test_a_failing_cell_does_not_stop_the_others(
    made: Record,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With seed 1 an attack fails, so that its defenses cannot run, and one defense of every other
    record."""
    monkeypatch.setenv("QUICK_FAILS", "1")
    cells, root = quick_cells(made, 2, 3), tmp_path / "root"
    failed = work(cells, root)
    assert {cell.name: why for cell, why in failed.items()} == {
        "r1": "no luck",
        "r0 dau seed1": "no luck",
        **{f"r1 dau seed{run}": "there is no record r1" for run in range(3)},
    }
    said = capsys.readouterr().err.splitlines()
    (line,) = [line for line in said if "FAILED r1" in line]
    assert f"FAILED r1: no luck (log: {root / '.bench' / 'r1' / 'attack' / 'log.txt'})" in line
    assert "  3 defenses of r1 are not run" in said
    monkeypatch.delenv("QUICK_FAILS")
    assert work(cells, root) == {} and all(state.done for state in states(cells, root).values())


def test_what_is_held_by_another_is_waited_for_and_not_repeated(
    made: Record, tmp_path: Path
) -> None:
    """The command of a killed driver goes on: it keeps the lock, and is the only one that
    starts."""
    cells, root = quick_cells(made, 1, 0), tmp_path / "root"
    drive = Drive(cells, states(cells, root), root, launchers.Local(1), Bench())
    os.environ["QUICK_SECONDS"] = "3"
    orphan = launchers.begin(drive._task(cells[0]))
    assert isinstance(orphan, launchers.Process)
    os.close(orphan.lock)  # what the system does for a killed driver
    assert launchers.begin(drive._task(cells[0])) == launchers.Answered(launchers.BUSY)
    assert drive.run() == {}
    assert logs(root)[0].count("started") == 1
    orphan.child.wait()


def test_a_start_that_is_refused_waits_while_others_run(
    made: Record,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As by `sbatch` when it is slow, or a user has too many jobs. With nothing running it is an
    error."""
    monkeypatch.setattr("backdoorlab.bench.driver.REFUSED", 0.1)
    cells, root = quick_cells(made, 3, 0), tmp_path / "root"
    drive = Drive(cells, states(cells, root), root, launchers.Local(3), Bench())
    start, refusals = (
        drive.launcher.start,
        iter([None, UserError("the queue is full"), None, UserError("the queue is full")]),
    )

    def hesitant(task: launchers.Task, slot: int) -> launchers.Running:
        if (refusal := next(refusals, None)) is not None:
            raise refusal
        return start(task, slot)

    monkeypatch.setattr(drive.launcher, "start", hesitant)
    assert drive.run() == {} and all(state.done for state in states(cells, root).values())
    assert (
        capsys.readouterr().err.count("could not be started (the queue is full): tried again") == 2
    )
    alone = Drive(
        cells[:1], {cells[0]: driver.State(False)}, tmp_path / "other", launchers.Local(1), Bench()
    )
    monkeypatch.setattr(
        alone.launcher,
        "start",
        lambda task, slot: (_ for _ in ()).throw(UserError("no such partition")),
    )
    with pytest.raises(UserError, match="no such partition"):
        alone.run()


@pytest.mark.parametrize("ended", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_command_is_a_failure_with_its_signal(
    made: Record, tmp_path: Path, ended: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUICK_SECONDS", "60")
    cells, root = quick_cells(made, 1, 0), tmp_path / "root"
    drive = Drive(cells, states(cells, root), root, launchers.Local(1), Bench())
    drive._fill()
    ((_, running),) = drive.running.values()
    assert isinstance(running, launchers.Process)
    os.kill(running.child.pid, ended)
    running.child.wait()
    assert drive.run() == {cells[0]: f"ended by signal {ended}"}
    assert not states(cells, root)[cells[0]].done


def test_an_interrupt_ends_the_commands_too(
    made: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUICK_SECONDS", "60")
    cells, root = quick_cells(made, 2, 0), tmp_path / "root"
    drive = Drive(cells, states(cells, root), root, launchers.Local(2), Bench())
    drive._fill()
    children = [
        running.child
        for _, running in drive.running.values()
        if isinstance(running, launchers.Process)
    ]
    monkeypatch.setattr(drive, "_collect", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        drive.run()
    assert len(children) == 2 and all(child.poll() is not None for child in children)


# --- kills


def drive_silently(cells: list[Cell], root: Path, jobs: int) -> None:
    """Run a driver without output, as a process of its own."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stderr(nowhere),
        contextlib.redirect_stdout(nowhere),
    ):
        work(cells, root, jobs)


def kill_until_done(
    cells: list[Cell],
    root: Path,
    kills: int,
    pause: float,
    jobs: int = 2,
    after_kills: Callable[[], None] = lambda: None,
) -> int:
    """Run two drivers at all times, kill `kills` of them at random moments, then let both finish.

    Returns the number of kills that met a driver at work.
    """
    context, met = multiprocessing.get_context("fork"), 0
    rng = random.Random(0)

    def start() -> Any:
        process = context.Process(target=drive_silently, args=(cells, root, jobs))
        process.start()
        return process

    drivers = [start(), start()]
    for _ in range(kills):
        time.sleep(rng.random() * pause)
        victim = rng.randrange(2)
        met += drivers[victim].is_alive()
        drivers[victim].kill()
        drivers[victim].join()
        drivers[victim] = start()
    after_kills()
    for process in drivers:
        process.join(1200)
        assert process.exitcode == 0
    return met


@pytest.mark.skipif(not HAS_FORK, reason="drivers are forked")
@pytest.mark.parametrize(
    ("kills", "records", "runs", "pause"),
    [(10, 4, 3, 0.4), pytest.param(40, 12, 4, 0.4, marks=pytest.mark.slow)],
    ids=["10-kills", "40-kills"],
)
def test_killed_drivers_finish_each_cell_once(
    made: Record,
    tmp_path: Path,
    kills: int,
    records: int,
    runs: int,
    pause: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No cell is started twice or lost, though its driver may be dead when it ends."""
    cells, root, held = (
        quick_cells(made, records, runs),
        tmp_path / "root",
        tmp_path / f"r{records - 1}",
    )
    held.touch()  # the last record is not made before the last kill, however fast the machine
    monkeypatch.setenv("QUICK_HELD", str(held))
    met = kill_until_done(cells, root, kills, pause, after_kills=held.unlink)
    assert met == kills, "the control: every kill met a driver that was at work"
    assert all(state.done for state in states(cells, root).values())
    found = logs(root)
    assert len(found) == len(cells)
    assert [log.count("started") for log in found] == [1] * len(cells) and [
        log.count("finished") for log in found
    ] == [1] * len(cells)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not HAS_FORK, reason="drivers are forked")
def test_killed_drivers_with_real_commands(tmp_path: Path, small_flags: tuple[str, ...]) -> None:
    """Run 60 real cells of a second's training with 40 kills: each is finished once."""
    cells, root = real_cells(tmp_path, small_flags, seeds=12), tmp_path / "root"
    assert len(cells) == 60
    # A killed driver's command runs on beside its successor's
    met = kill_until_done(cells, root, 40, 8.0, jobs=1)
    assert met >= 20 and all(state.done for state in states(cells, root).values())
    finished = [
        sum(line.startswith(("record written", "clean accuracy")) for line in log)
        for log in logs(root)
    ]
    assert finished == [1] * 60


def real_cells(folder: Path, small_flags: tuple[str, ...], seeds: int) -> list[Cell]:
    options = dict(zip((flag[2:] for flag in small_flags[::2]), small_flags[1::2], strict=True))
    options.pop("dataset")
    content = {
        "datasets": ["small"],
        "attacks": ["badnet"],
        "defenses": [
            {"ft": {"epochs": 2}},
            {"ft-long": {"method": "ft", "epochs": 3}},
            {"sau": {"n_rounds": 2}},
            {"ibau": {"n_rounds": 1}},
        ],
        "poison_rates": [float(options.pop("poison_rate"))],
        "seeds": list(range(seeds)),
        "attack": options,
        "defense": {"trusted_ratio": 0.3, "precision": "fp32", "score_every": 0},
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(content))
    return grid.cells(grid.read(str(path)))


# --- what counts as done


@pytest.fixture
def finished(
    made: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Cell], Path]:
    monkeypatch.setenv("QUICK_SECONDS", "0")
    cells, root = quick_cells(made, 1, 1), tmp_path / "root"
    assert work(cells, root) == {}
    return cells, root


def test_other_settings_are_refused_in_one_line_and_left_alone(
    finished: tuple[list[Cell], Path],
) -> None:
    cells, root = finished
    for cell in cells:
        settings = json.loads(cell.settings) | {"precision": "bf16", "new": 1}
        state = driver.look(dataclasses.replace(cell, settings=json.dumps(settings)), root)
        assert (
            not state.done
            and "was made with other settings (new None, not 1, precision auto, not bf16): choose another"
            in state.complaint
        )
        assert driver.look(
            dataclasses.replace(cell, settings=json.dumps(json.loads(cell.settings))), root
        ).done
    assert (
        "attack badnet, not blended"
        in driver.look(dataclasses.replace(cells[0], method="blended"), root).complaint
    )


def test_other_data_in_the_folder_is_refused(
    finished: tuple[list[Cell], Path], tmp_path: Path
) -> None:
    cells, root = finished
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in "ab":
            (tmp_path / "data" / split / name).mkdir(parents=True)
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(
                tmp_path / "data" / split / name / "0.png"
            )
    attack = dataclasses.replace(
        cells[0],
        flags=(*cells[0].flags, "--dataset", "pets", "--dataset_path", str(tmp_path / "data")),
    )
    found = load_dataset(
        "pets", str(tmp_path / "data"), image_size=json.loads(attack.settings)["image_size"]
    )
    said = driver.look(attack, root).complaint
    assert (
        said is not None
        and f"(data {Record.load('r0', root).info['dataset']['fingerprint'][:8]}, not {found.fingerprint[:8]})"
        in said
    )
    helpers.edit_json(
        root / "r0" / "record.json",
        dataset=dict(Record.load("r0", root).info["dataset"]) | {"fingerprint": found.fingerprint},
    )
    assert driver.look(attack, root).done, "the control"
    (tmp_path / "empty").mkdir()
    gone = dataclasses.replace(attack, flags=(*attack.flags[:-1], str(tmp_path / "empty")))
    assert "expected *.parquet shards" in (driver.look(gone, root).complaint or ""), (
        "one cell is refused, and not the grid"
    )


def test_how_often_scores_are_taken_is_no_setting() -> None:
    assert (
        grid.settings_of({"lr": 1, "score_every": 5})
        == grid.settings_of({"score_every": 0, "lr": 1})
        != grid.settings_of({"lr": 2})
    )


def test_a_record_with_a_plain_training_besides_is_the_same_record(
    finished: tuple[list[Cell], Path],
) -> None:
    cells, root = finished
    settings = json.loads(cells[0].settings)
    helpers.edit_json(root / cells[0].record / "record.json", config={**settings, "plain": True})
    asked = [
        dataclasses.replace(cells[0], settings=json.dumps({**settings, "plain": plain}))
        for plain in (False, True)
    ]
    assert all(driver.look(cell, root).done for cell in asked)
    helpers.edit_json(root / cells[0].record / "record.json", config={**settings, "plain": False})
    assert [driver.look(cell, root).done for cell in asked] == [
        True,
        False,
    ], "what is asked for and not there is other settings"


def test_only_what_has_no_seed_is_missing(made: Record) -> None:
    cells = quick_cells(made, 1, 2)
    named = [(one.attack, one.defense) for one in driver.absent(cells, set(cells))]
    assert (
        named == [("quick", "none"), ("quick", "dau")] and driver.absent(cells, {cells[1]}) == []
    ), "another seed of it is there"
    lite = [
        dataclasses.replace(cell, run="lite-s1") if cell.kind == "defense" else cell
        for cell in cells
    ]
    assert [one.defense for one in driver.absent(lite, set(lite))] == [
        "none",
        "dau lite",
    ], "as the table calls it where it is done"


def test_other_code_is_refused_unless_asked_for(finished: tuple[list[Cell], Path]) -> None:
    cells, root = finished
    for cell in cells:
        changed = dataclasses.replace(cell, code="0" * 12)
        state = driver.look(changed, root)
        assert (
            f"was made by other code ({cell.code}, now 000000000000): choose another --record_root"
            in state.complaint
        )
        assert driver.look(changed, root, other_code=True).done


def test_a_damaged_result_is_neither_kept_nor_overwritten(
    finished: tuple[list[Cell], Path],
) -> None:
    cells, root = finished
    folder = cells[1].folder(root)
    for name in ("result.json", "model.safetensors", "history.csv"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-2] + b"\x00\x00")
        state = driver.look(cells[1], root)
        assert not state.done and name in state.complaint
        (folder / name).write_bytes(whole)
        assert driver.look(cells[1], root).done


def test_the_estimate_is_what_alike_cells_took() -> None:
    known = {("defense", "ft"): [10.0, 20.0], ("defense", "sau"): [90.0]}
    assert driver.remaining([("defense", "ft"), ("defense", "sau")], known, 1) == 15 + 90
    assert driver.remaining([("defense", "ft"), ("defense", "sau")], known, 2) == (15 + 90) / 2
    assert driver.remaining([("attack", "badnet")], known, 8) == 40, (
        "an unknown one takes what cells took on the whole"
    )
    assert driver.remaining([("attack", "badnet")], {}, 1) is None
    both = {"seconds": 10.0, "plain_scores": {"seconds": 4.0}, "evaluation_seconds": 1.0}
    assert driver._seconds(both) == 10 + 4 + 1 + driver.STARTUP, (
        "the plain training beside a joint attack is the command's, too"
    )
    assert (
        driver._seconds({"seconds": 10.0}) == 10 + driver.STARTUP
        and driver._seconds({"seconds": None}) is None
    )


# --- the command


def lay_out(cells: list[Cell], root: Path, made: Record) -> None:
    """Write finished records and results with a grid's settings, without training."""
    for cell in cells:
        source = made.folder if cell.kind == "attack" else made.folder / "defense" / "dau" / "seed0"
        shutil.copytree(source, cell.folder(root), ignore=shutil.ignore_patterns("defense"))
        method = {"attack": cell.method} if cell.kind == "attack" else {"defense": cell.method}
        name = "record.json" if cell.kind == "attack" else "result.json"
        helpers.edit_json(
            cell.folder(root) / name,
            config=json.loads(cell.settings),
            seed=cell.seed,
            code=cell.code,
            **method,
        )


def test_a_finished_grid_takes_seconds_and_runs_nothing(made: Record, tmp_path: Path) -> None:
    """The command verifies and shows all 63 cells of the digits' grid in under 10 s of processor
    time."""
    root = tmp_path / "root"
    lay_out(grid.cells(grid.read("bench_digits")), root, made)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = helpers.command(
        "-m",
        "backdoorlab",
        "bench",
        "--config",
        "bench_digits",
        "--record_root",
        root,
        cwd=helpers.CHECKOUT,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [f"63 cells in {root}: 63 done, 0 to run"]
    assert not (root / driver.FOLDER).exists()
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10
    shown = [line.split() for line in done.stdout.split("\n\nMean")[0].splitlines()[2:] if line]
    assert len(shown) == 3 * 7, "three attacks, undefended and with six defenses"


def test_the_command_from_nothing_to_a_table(
    tmp_path: Path, small_flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Run a record and a defense by real commands, then again, then with one more defense."""
    record = real_cells(tmp_path, small_flags, seeds=1)[0].record
    argv = [
        "bench",
        "--config",
        str(tmp_path / "small.yaml"),
        "--record_root",
        str(tmp_path / "root"),
    ]
    assert (
        main([*argv, "--defenses", "ft", "--dry_run", "True"]) == 1
        and not (tmp_path / "root").exists()
    )
    assert capsys.readouterr().err.splitlines()[1:] == [f"  {record}", f"  {record} ft seed0"]
    assert main([*argv, "--defenses", "ft"]) == 0
    first = capsys.readouterr()
    assert "[2/2] " in first.err and [line.split()[3] for line in first.out.splitlines()[2:4]] == [
        "none",
        "ft",
    ]
    assert main([*argv, "--defenses", "ft"]) == 0
    assert capsys.readouterr().out == first.out

    # With audits the same table has a depth, and standard output nothing else.
    assert main([*argv, "--defenses", "ft", "--depth", "True"]) == 0
    deep = capsys.readouterr()
    assert "depth" in deep.out.splitlines()[0] and "depth" not in first.out
    assert f"{record} ft seed0: depth" in deep.err and "depth -" not in deep.out
    writing.write_bytes(tmp_path / "root" / record / "record.json", b"{}")
    assert main([*argv, "--defenses", "ft"]) == 1
    damaged = capsys.readouterr()
    assert (
        "refused: " in damaged.err
        and "record.json: damaged file" in damaged.err
        and "1 of 2 cells are not done" in damaged.err
    )
    assert [line.split()[1:6] for line in damaged.out.splitlines()[2:3]] == [
        ["badnet", "20", "none", "-", "0"]
    ], "what is missing is a row of holes"


def test_the_page_shows_the_grid_and_nothing_else(
    made: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside the grid's results are a damaged one and a sound one that it does not ask for. The CSV
    contains the table only."""
    root = tmp_path / "root"
    path = tmp_path / "one.yaml"
    path.write_text(yaml.safe_dump({"attacks": ["badnet"], "defenses": ["dau"], "seeds": [0]}))
    cells = grid.cells(grid.read(str(path)))
    lay_out(cells, root, made)
    shutil.copytree(cells[1].folder(root), cells[1].folder(root).with_name("mine-s0"))
    shutil.copytree(cells[1].folder(root), cells[1].folder(root).with_name("other-s0"))
    (cells[1].folder(root).with_name("other-s0") / "result.json").write_text("{")
    argv = ["bench", "--config", str(path), "--record_root", str(root), "-f", "csv"]
    assert main(argv) == 0
    plain = capsys.readouterr().out
    assert main([*argv, "--html", str(tmp_path / "page.html")]) == 0
    said = capsys.readouterr()
    assert said.out == plain and "page of 2 models" in said.err
    page = (tmp_path / "page.html").read_text()
    assert "seed0" not in page and "mine-s0" not in page and "other-s0" not in page


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (
            ("--config", "bench_digit"),
            "no such file, and no grid of that name. Did you mean 'bench_digits'?",
        ),
        ((), "an empty grid"),
        (("--attacks", "badnett"), "unknown attack 'badnett'. Did you mean 'badnet'?"),
        (("--attacks", "badnet", "--jobs", "0"), "jobs must be >= 1, got 0"),
        (
            ("--attacks", "badnet", "--launcher", "slurm", "--slurm", "gpu"),
            "--slurm takes key=value, got 'gpu'",
        ),
        (("--attacks", "badnet", "--attack", "blended"), "unknown flag --attack. Did you mean"),
        (
            ("--attacks", "badnet", "--html", str(Path(__file__))),
            "test_bench.py is there and was not written by this command",
        ),
    ],
)
def test_mistakes_are_one_line(
    flags: tuple[str, ...], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *flags, "--record_root", str(tmp_path)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.endswith("to run")]
    assert line.startswith("error: ") and complaint in line


@pytest.mark.parametrize("trouble", [errno.ENOSPC, errno.EACCES])
def test_a_full_disk_or_a_folder_of_another_user_is_one_line(
    trouble: int,
    made: Record,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(folder: Path) -> None:
        raise OSError(trouble, os.strerror(trouble), str(folder))

    monkeypatch.setattr("backdoorlab.storage.writing.make_folder", refuse)
    assert (
        main(
            [
                "bench",
                "--attacks",
                "badnet",
                "--defenses",
                "ft",
                "--seeds",
                "0",
                "--record_root",
                str(tmp_path / "root"),
            ]
        )
        == 2
    )
    line = capsys.readouterr().err.splitlines()[-1]
    assert (
        line.startswith("error: ")
        and os.strerror(trouble) in line
        and "Nothing finished was changed" in line
    )


def test_a_missing_ray_or_slurm_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for launcher, module in (("ray", "ray"), ("slurm", "submitit")):
        monkeypatch.setitem(sys.modules, module, None)
        assert (
            main(
                [
                    "bench",
                    "--attacks",
                    "badnet",
                    "--launcher",
                    launcher,
                    "--record_root",
                    str(tmp_path),
                ]
            )
            == 2
        )
        line = capsys.readouterr().err.splitlines()[-1]
        assert (
            line.startswith(f"error: {module} is not installed")
            and f"pip install 'backdoorlab[{launcher}]', or use --launcher local" in line
        )
