"""Killed, starved of disk or raced at any moment: the old record or the new one, never a part, and
the same bytes in the end."""

import builtins
import errno
import io
import os
import random
import shutil
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch

from backdoorlab import record
from backdoorlab.errors import UserError
from backdoorlab.exchange.verify import verify
from backdoorlab.execution.attack import attack_job
from backdoorlab.execution.preview import save_preview
from backdoorlab.execution.scores import ScoreLog
from backdoorlab.execution.stage import Job, _worthless, fresh, open_stage, put_in_place
from backdoorlab.poison import Poison
from backdoorlab.record import Record
from backdoorlab.run import Run
from backdoorlab.settings import methods
from backdoorlab.storage import folders, locks, reading, writing

if not hasattr(os, "fork"):
    pytest.skip(
        "processes are forked here, so that each need not import torch", allow_module_level=True
    )

FINISHED, REFUSED, BROKEN = 0, 2, 3


@pytest.fixture
def quick_path(tmp_path: Path) -> Iterator[Path]:
    """A folder on a memory disk where there is one: flushing costs nothing there, and the order of
    calls is the same."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def forked(work: Callable[[], None], said: Path) -> int:
    """Run `work` in a child that starts as warm as we are; its last words go to the file `said`.
    Returns the pid."""
    pid = helpers.fork()
    if pid:
        return pid
    code = BROKEN
    try:
        sys.stderr = sys.stdout = io.StringIO()
        work()
        code = FINISHED
    except UserError as error:
        said.write_text(str(error))
        code = REFUSED
    except BaseException as error:
        said.write_text(repr(error))
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# --- F1, F2: kills


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the tensors of a record or a result."""
    return {path.name: reading.sha256(path) for path in sorted(folder.glob("*.safetensors"))}


def half_written(root: Path, name: str, whole: dict[str, dict[str, str]]) -> list[str]:
    """What is wrong with what a reader finds: each of record and result is absent, or verifies and
    is that of an uninterrupted run."""
    if not (root / name).exists():
        return []
    wrong = list(verify(name, root).wrong)
    for part, folder in (
        ("record", root / name),
        ("result", root / name / "defense" / "ft" / "seed0"),
    ):
        if folder.exists() and digests(folder) != whole[part]:
            wrong.append(f"{folder} differs")
    return wrong


def traced(path: Path) -> None:
    """Let each epoch that begins add its line to a file."""
    real = Run.epochs

    def epochs(self: Run, stage: str, total: int, **state: Any) -> Iterator[int]:
        for epoch in real(self, stage, total, **state):
            with open(path, "a") as stream:
                stream.write(f"{stage} {epoch}\n")
            yield epoch

    Run.epochs = epochs  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "kills", [25, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_kills_lose_nothing_and_change_nothing(
    kills: int, small: Record, small_flags: tuple[str, ...], quick_path: Path
) -> None:
    """F1 and F2: SIGKILL at random moments of attack and defense."""
    root, trace = quick_path / "record", quick_path / "trace"
    short = helpers.short_flags("ft")
    # Whatever is imported on first use is here before the first fork
    helpers.defend("ft", helpers.copy(small, quick_path), *short)

    def both(name: str) -> None:
        traced(trace)
        if not (root / name).exists():
            helpers.attack("badnet", name, root, *small_flags)
        if not (root / name / "defense" / "ft" / "seed0").exists():
            helpers.defend("ft", Record.load(name, root), *short)

    began = time.monotonic()
    assert ended(forked(lambda: both("whole"), quick_path / "said")) == FINISHED, (
        quick_path / "said"
    ).read_text()
    usual = time.monotonic() - began
    epochs = len(trace.read_text().splitlines())
    assert epochs == 5, "three of the attack, two of the defense"
    whole = {
        "record": digests(root / "whole"),
        "result": digests(root / "whole" / "defense" / "ft" / "seed0"),
    }
    assert len(whole["record"]) == 3 and len(whole["result"]) == 1

    rng, done, redone, finished = random.Random(0), 0, 0, 0
    while done < kills:
        name, here = f"r{finished}", 0
        trace.unlink(missing_ok=True)
        while True:
            pid = forked(lambda: both(name), quick_path / "said")  # noqa: B023
            time.sleep(rng.uniform(0, usual))
            os.kill(pid, signal.SIGKILL)
            code = ended(pid)
            assert code in (FINISHED, -signal.SIGKILL), (quick_path / "said").read_text()
            here, done = here + (code != FINISHED), done + (code != FINISHED)
            assert not half_written(root, name, whole), f"after {done} kills"
            if code == FINISHED or done >= kills:
                break
        if code != FINISHED:
            both_code = ended(forked(lambda: both(name), quick_path / "said"))  # noqa: B023
            assert both_code == FINISHED, (quick_path / "said").read_text()
        assert (
            not half_written(root, name, whole)
            and (root / name / "defense" / "ft" / "seed0" / "result.json").exists()
        )
        # One that was killed right after it published leaves its stage, which the next run there
        # sweeps; nothing else may be left.
        folders.sweep(root, partial(_worthless, done="record.json"))
        litter = [path.name for path in root.iterdir() if path.name.startswith((name + ".", "."))]
        assert [entry for entry in litter if not entry.endswith(".held")] == [], (
            "no stage is left; a kill may leave a lock file, which holds nothing"
        )
        begun = trace.read_text().splitlines() if trace.exists() else []
        assert sorted(set(begun)) == sorted(
            {f"train {k}" for k in range(3)} | {f"finetune {k}" for k in range(2)}
        )
        redone += len(begun) - epochs
        assert len(begun) - epochs <= here, (
            f"{here} kills cost {len(begun) - epochs} epochs: at most one each"
        )
        finished += 1
    print(f"{done} kills over {finished} records: {redone} epochs redone")
    assert done == kills and redone > 0, "some kills did hit an epoch"

    torn = root / "r0" / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    assert half_written(root, "r0", whole), "a record that is half-written would have been seen"


# --- F5: faults


class Torn:
    """A stream whose write may fail half-way."""

    def __init__(self, stream: Any, fault: Callable[[Callable[[], None]], None]) -> None:
        self.stream, self.fault = stream, fault

    def write(self, data: Any) -> int:
        def half() -> None:
            self.stream.write(data[: len(data) // 2])
            self.stream.flush()

        self.fault(half)
        return int(self.stream.write(data))

    def __enter__(self) -> "Torn":
        return self

    def __exit__(self, *_: Any) -> None:
        self.stream.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def failing(at: int, mode: str) -> Iterator[list[str]]:
    """Let file operation number `at` fail: "ENOSPC" and "EIO" raise, "exit" ends the process.
    Yields the operations so far."""
    seen: list[str] = []
    names = ("open", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "scandir")
    real = {name: getattr(os, name) for name in names}
    real_open = builtins.open

    def fault(name: str, before: Callable[[], None] = lambda: None) -> None:
        seen.append(name)
        if len(seen) == at:
            before()
            if mode == "exit":
                os._exit(77)
            raise OSError(getattr(errno, mode), os.strerror(getattr(errno, mode)), name)

    def patched(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            fault(name)
            return real[name](*args, **kwargs)

        return call

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        fault(f"open {mode}")
        stream = real_open(file, mode, *args, **kwargs)
        return Torn(stream, lambda half: fault("write", half)) if "w" in mode else stream

    try:
        for name in names:
            setattr(os, name, patched(name))
        builtins.open = io.open = opened
        yield seen
    finally:
        for name in names:
            setattr(os, name, real[name])
        builtins.open = io.open = real_open


MODELS: dict[tuple[Path, int], Any] = {}


def variant(old: Record, seed: int) -> Any:
    """Weights of a record's shape, others for each seed; made once, so that reading them is not
    among the operations that fail."""
    if (old.folder, seed) not in MODELS:
        MODELS[old.folder, seed] = model = old.model()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(seed)
    return MODELS[old.folder, seed]


@lru_cache(maxsize=256)
def job_of(root: Path, seed: int, overwrite: bool) -> Job:
    argv = [
        "--save_folder_name",
        "r",
        "--record_root",
        str(root),
        "--overwrite",
        str(overwrite),
        "--seed",
        str(seed),
    ]
    return attack_job(methods.load("attack", "none"), argv, "test")


def publishing(
    old: Record, root: Path, seed: int, pause: float = 0.0, overwrite: bool = True
) -> None:
    """What `run_attack` writes, without the training: a checkpoint, then the record with its
    preview and history."""
    job = job_of(root, seed, overwrite)
    with open_stage(root / "r", "record.json", job, {}, "fp32", torch.device("cpu")) as stage:
        log = ScoreLog()
        run = Run(stage, seed=seed, device=torch.device("cpu"), callbacks=log.callbacks())
        for _ in run.epochs("train", 1):
            time.sleep(pause)
        final = fresh(stage / "final")
        save_preview(
            final / "preview.png",
            old.test_poison.triggered(),
            Poison(*[value[:0] for value in vars(old.test_poison).values()]),
        )
        log.save_history(final)
        model = variant(old, seed)
        info = {key: value for key, value in old.info.items() if key not in ("schema", "files")} | {
            "seed": seed
        }
        record.write(final, info, model, old.train_poison, old.test_poison)
        put_in_place(final, root / "r")


def state(root: Path) -> int | None:
    """The seed of the record that a reader finds, all of it verified; None where there is none."""
    if "r" not in record.record_names(root):
        return None
    found = verify("r", root)
    assert not found.wrong, found.wrong
    return int(Record.load("r", root).info["seed"])


@pytest.mark.parametrize(
    "stride", [5, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("mode", ["ENOSPC", "EIO", "exit"])
def test_a_fault_at_any_file_operation_leaves_the_old_or_the_new(
    stride: int, mode: str, existing: bool, small: Record, quick_path: Path
) -> None:
    """F5: operation 1, 2, 3 ... fails, until none is left to fail; every fifth of them, each mode
    its own, unless slow."""
    root, before, after = quick_path / "record", 1 if existing else None, 2
    seen: dict[int | None, int] = {}
    publishing(small, quick_path / "old", 1)
    variant(small, 2)
    job_of(root, 2, True)
    faults, at = 0, ("ENOSPC", "EIO", "exit").index(mode) - stride + 1 if stride > 1 else 0
    while True:
        at += stride
        faults += 1
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        if existing:
            shutil.copytree(quick_path / "old" / "r", root / "r")
        reached = True
        if mode == "exit":

            def work(at: int = at) -> None:
                with failing(at, mode):
                    publishing(small, root, 2)

            reached = ended(forked(work, quick_path / "said")) == 77
        else:
            with failing(at, mode) as operations:
                try:
                    publishing(small, root, 2)
                except OSError as error:
                    assert error.errno == getattr(errno, mode)
                except UserError as error:
                    assert "\n" not in str(error)
                reached = len(operations) >= at
        found = state(root)
        assert found in (before, after), f"{mode} at operation {at}: {found}"
        seen[found] = seen.get(found, 0) + 1
        if not reached:
            break
        publishing(small, root, 2)
        assert state(root) == 2, "the same command succeeds afterwards"
        assert sorted(path.name for path in root.iterdir()) == ["r"], (
            f"{mode} at operation {at} leaves litter"
        )
    print(
        f"{mode}, {'over an old record' if existing else 'new'}: {faults - 1} faults in about"
        f" {at - 1} operations, {seen}"
    )
    assert at > 30 and found == after and set(seen) == {before, after}, (
        "both sides of the rename were seen"
    )


def test_a_record_written_in_place_would_have_been_caught(
    small: Record, quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of F5: copying instead of renaming leaves what the loop above calls wrong."""
    monkeypatch.setattr(
        "backdoorlab.storage.folders.publish", lambda stage, target: shutil.copytree(stage, target)
    )
    caught = 0
    variant(small, 2)
    for at in range(60, 140, 4):
        root = quick_path / str(at)
        root.mkdir()
        with failing(at, "ENOSPC"), suppress(OSError, shutil.Error):
            publishing(small, root, 2)
        try:
            caught += (root / "r").exists() and state(root) is None
        except AssertionError:
            caught += 1
    assert caught


def test_all_is_on_the_disk_before_it_gets_its_name(
    small: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no SIGKILL can show, since the page cache outlives it: every file and folder is flushed,
    then renamed, then the parent flushed."""
    calls: list[tuple[str, str]] = []
    real_sync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        calls.append(("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        real_sync(descriptor)

    def rename(source: Any, target: Any) -> None:
        calls.append(("rename", str(source)))
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to name what is flushed")
    for seed in (1, 2):
        calls.clear()
        publishing(small, tmp_path, seed)
        final = str(tmp_path / "r.partial" / "final")
        place = calls.index(("rename", final))
        flushed = {path for call, path in calls[:place] if call == "fsync"}
        assert {f"{final}/{path.name}" for path in (tmp_path / "r").iterdir()} | {final} <= flushed
        assert ("fsync", str(tmp_path)) in calls[place:], "and the parent after it"
        checkpoint = str(tmp_path / "r.partial")
        assert ("fsync", checkpoint) in calls, "a checkpoint's folder, too"


def test_a_killed_replacement_is_put_back(small: Record, tmp_path: Path) -> None:
    publishing(small, tmp_path, 1)
    os.rename(tmp_path / "r", tmp_path / ".r.old")
    assert record.record_names(tmp_path) == ["r"] and state(tmp_path) == 1
    shutil.copytree(tmp_path / "r", tmp_path / ".r.old")
    assert state(tmp_path) == 1 and not (tmp_path / ".r.old").exists(), (
        "the new one is in place: the old one goes"
    )


def test_stale_stages_are_swept_and_others_kept(small: Record, tmp_path: Path) -> None:
    """Nobody holds them and they hold nothing to continue, or their run is finished."""
    publishing(small, tmp_path, 1)
    for name in ("empty", "begun", "held", "foreign", "r"):
        (tmp_path / f"{name}.partial").mkdir()
    for name in ("begun", "held", "r"):
        writing.write_json(tmp_path / f"{name}.partial" / "run.json", {})
    for name in ("begun", "r"):
        (tmp_path / f"{name}.partial" / "checkpoint-train.safetensors").write_bytes(b"x")
    (tmp_path / "foreign.partial" / "thesis.tex").write_text("years of work")
    with locks.locked(tmp_path / "held.partial"):
        argv = ["--save_folder_name", "other", "--record_root", str(tmp_path)]
        with open_stage(
            tmp_path / "other",
            "record.json",
            attack_job(methods.load("attack", "none"), argv, "test"),
            {},
            "fp32",
            torch.device("cpu"),
        ):
            left = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert left == {"r", "begun.partial", "held.partial", "foreign.partial", "other.partial"}


# --- F6: races


@pytest.mark.parametrize(
    "races", [50, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_of_two_writers_one_wins_and_the_other_says_who(
    races: int, small: Record, quick_path: Path
) -> None:
    """F6."""
    rng, named = random.Random(0), 0
    for race in range(races):
        root = quick_path / str(race)
        root.mkdir()
        pause, start = rng.uniform(0, 0.03), time.monotonic() + 0.01

        def write(seed: int, root: Path = root, pause: float = pause, start: float = start) -> None:
            while time.monotonic() < start:
                pass
            publishing(small, root, seed, pause, overwrite=False)

        pids = [forked(lambda seed=seed: write(seed), root / f"said{seed}") for seed in (1, 2)]  # type: ignore[misc]
        codes = [ended(pid) for pid in pids]
        said = [
            (root / f"said{seed}").read_text() if code else ""
            for seed, code in zip((1, 2), codes, strict=True)
        ]
        assert sorted(codes) == [FINISHED, REFUSED], said
        winner = codes.index(FINISHED)
        assert state(root) == (1, 2)[winner]
        complaint = said[1 - winner]
        by_name = f"is being written by process {pids[winner]} on " in complaint
        assert by_name or "exists and is finished" in complaint, complaint
        named += by_name
        assert sorted(path.name for path in root.iterdir() if path.is_dir()) == ["r"], (
            "no stage is left"
        )
    print(f"{races} races, {named} refused while the other wrote")
    assert named > races // 10, "they did meet"


def test_a_lock_file_that_its_holder_removed_is_none(tmp_path: Path) -> None:
    """The second writer opened the file before the first removed it: what it then locks is nothing
    that a third would see."""
    fcntl = pytest.importorskip("fcntl")
    stage, lock = tmp_path / "x.partial", tmp_path / ".x.partial.held"
    real = fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        lock.unlink()
        fcntl.flock = real
        real(descriptor, operation)

    fcntl.flock = late
    try:
        assert locks.try_lock(stage) is None
    finally:
        fcntl.flock = real
    early = locks.try_lock(stage)
    assert early is not None and locks.try_lock(stage) is None
    lock.unlink()
    with (
        locks.locked(stage),
        pytest.raises(UserError, match="being written by process"),
        locks.locked(stage),
    ):
        pass
    locks.unlock(early)
    assert not list(tmp_path.iterdir())


def test_a_lock_holds_where_a_folders_is_known_on_one_machine_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS, where each machine has its own locks on folders, and a file is locked for writing
    only if it is open for writing."""
    fcntl = pytest.importorskip("fcntl")
    real = fcntl.flock

    def nfs(descriptor: int, operation: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            return
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "not open for writing")
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", nfs)
    stage = tmp_path / "x.partial"
    with locks.locked(stage):
        (stage / "part").write_text("half")
        open_in_it = [
            path
            for path in Path("/proc/self/fd").glob("*")
            if str(stage) + "/" in os.path.realpath(path)
        ]
        assert not open_in_it, "NFS deletes no folder in which a file is open"
        folders.sweep(tmp_path, lambda _stage: True)
        folders.tidy(tmp_path)
        assert (stage / "part").exists(), "another machine's sweep leaves it"
        with pytest.raises(UserError, match="being written by process"), locks.locked(stage):
            pass
    folders.sweep(tmp_path, lambda _stage: True)
    assert not list(tmp_path.iterdir()), (
        "with control: what nobody holds is swept, its lock file too"
    )


def test_lock_files_that_a_kill_leaves_are_tidied(tmp_path: Path) -> None:
    for name in ("dead", "alive"):
        (tmp_path / f".{name}.partial.held").write_text("1 elsewhere")
    with locks.locked(tmp_path / "alive.partial"):
        folders.tidy(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {
            "alive.partial",
            ".alive.partial.held",
        }


# --- F8, F11: numbers


@pytest.mark.parametrize("method", ["badnet", *sorted(methods.available("defense"))])
def test_a_loss_that_is_no_number_stops_within_one_step(
    method: str,
    small: Record,
    small_flags: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """F8: the second loss is NaN."""
    steps, real = [0], Run.watch

    def poisoned(self: Run, **values: torch.Tensor) -> None:
        steps[0] += "loss" in values
        real(
            self,
            **{
                name: value * float("nan") if name == "loss" and steps[0] == 2 else value
                for name, value in values.items()
            },
        )

    def go(flags: tuple[str, ...] = ()) -> None:
        if method == "badnet":
            helpers.attack("badnet", "r", tmp_path, *small_flags, *flags)
        else:
            helpers.defend(method, found, *helpers.short_flags(method), *flags)

    found = helpers.copy(small, tmp_path)
    monkeypatch.setattr(Run, "watch", poisoned)
    if method == "badnet":
        done = tmp_path / "r"
    else:
        told = methods.load("defense", method).role == "unlearner"
        done = found.folder / "defense" / method / ("oracle-0.5-seed0" if told else "seed0")
    try:
        go()
    except UserError as error:
        assert "diverged" in str(error) and "\n" not in str(error)
    if steps[0] < 2:
        assert (done / "result.json").exists()
        pytest.skip("takes no second step on so small a set")
    assert steps[0] == 2, "not one step more"
    assert not done.exists()
    monkeypatch.setattr(Run, "watch", real)
    go(("--overwrite", "True"))
    assert (done / ("record.json" if method == "badnet" else "result.json")).exists(), (
        "without the NaN it ends well"
    )


@pytest.mark.parametrize("method", sorted(methods.available("defense")))
def test_two_runs_are_equal_bit_for_bit(method: str, small: Record, tmp_path: Path) -> None:
    """F11: one seed, version, device and number of threads; whatever else the process drew
    before."""
    found = helpers.copy(small, tmp_path)
    folder = found.folder / "defense" / method
    results = {}
    for run, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.rand(random.randrange(1, 100))
        random.seed()
        results[run] = helpers.defend(
            method, found, *helpers.short_flags(method), "--run_name", run, "--seed", str(seed)
        )
    assert digests(folder / "a") == digests(folder / "b") and digests(folder / "a")
    timed = ("seconds", "evaluation_seconds", "peak_memory_bytes", "files")
    strip = lambda result: {key: value for key, value in result.items() if key not in timed}  # noqa: E731
    assert strip(results["a"]) == strip(results["b"])
    histories = [
        [line.split(",") for line in (folder / run / "history.csv").read_text().splitlines()]
        for run in ("a", "b")
    ]
    # The third column is seconds
    first, second = ([row[:2] + row[3:] for row in history] for history in histories)
    assert first == second
    # A detector leaves no model, and may draw nothing; what is pruned may be the same.
    left = digests(folder / "a").get("model.safetensors")
    pruned = method in ("anp", "bnp", "clp", "ep", "rnp")
    if not pruned and left not in (None, reading.sha256(found.folder / "model.safetensors")):
        assert digests(folder / "a") != digests(folder / "c"), "another seed is another run"
