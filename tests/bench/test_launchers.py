"""Launchers: commands on Ray and through submitit have the same results as on this machine."""

import dataclasses
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_bench

from backdoorlab.__main__ import _threads
from backdoorlab.bench import driver, launchers
from backdoorlab.bench.driver import Bench, Drive
from backdoorlab.bench.grid import Cell
from backdoorlab.bench.launchers import Launcher, Task
from backdoorlab.errors import UserError
from backdoorlab.execution import environment
from backdoorlab.record import read_result
from backdoorlab.storage import reading


def work(cells: list[Cell], root: Path, launcher: Launcher, kind: Any) -> dict[Cell, str]:
    found = test_bench.states(cells, root)
    return Drive(
        [cell for cell in cells if not found[cell].done],
        found,
        root,
        launcher,
        Bench(launcher=kind),
    ).run()


def weights(cell: Cell, root: Path) -> tuple[str, Any]:
    """Return what a cell computed: the hash of its weights, and its scores."""
    folder = cell.folder(root)
    if cell.kind == "attack":
        info = reading.read_json(folder / "record.json")
        return info["files"]["model.safetensors"]["sha256"], info["scores"]
    result = read_result(folder)
    return result["files"]["model.safetensors"]["sha256"], result["after"]


def sleepers(folder: Path, count: int, seconds: float) -> list[Task]:
    """Make commands that write when they began and ended."""
    code = (
        "import pathlib, sys, time; t = time.time(); time.sleep(float(sys.argv[2]));"
        " pathlib.Path(sys.argv[1]).write_text(f'{t} {time.time()}')"
    )
    tasks = []
    for number in range(count):
        done = folder / f"{number}.txt"
        tasks.append(
            Task(
                (sys.executable, "-c", code, str(done), str(seconds)),
                folder / "claims" / str(number),
                done,
            )
        )
    return tasks


def finish(launcher: Launcher, tasks: list[Task]) -> list[tuple[float, float]]:
    """Run commands at once; returns when each began and ended."""
    running = [launcher.start(task, slot) for slot, task in enumerate(tasks)]
    while any(one.poll() is None for one in running):
        time.sleep(0.1)
    assert [one.poll() for one in running] == [0] * len(tasks)
    return [
        (float(begin), float(end))
        for begin, end in (task.done.read_text().split() for task in tasks)
    ]


def at_once(spans: list[tuple[float, float]]) -> int:
    """Return the largest number of spans that overlap at one moment."""
    return max(sum(begin <= moment < end for begin, end in spans) for moment, _ in spans)


# --- a command and its lock


def test_a_command_runs_once_at_a_time_and_not_again(tmp_path: Path) -> None:
    (task,) = sleepers(tmp_path, 1, 0.3)
    first = launchers.begin(task)
    assert isinstance(first, launchers.Process)
    assert launchers.begin(task) == launchers.Answered(launchers.BUSY)
    assert first.child.wait() == 0 and first.poll() == 0
    assert launchers.begin(task) == launchers.Answered(launchers.ALREADY)
    assert launchers.run_there(task) == launchers.ALREADY
    task.done.unlink()
    assert launchers.run_there(task) == 0
    assert (task.folder / launchers.LOG).read_text().count("$ ") == 2


def test_a_command_that_ignores_signals_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Children of `nohup` and of background shells ignore SIGINT."""
    monkeypatch.setattr("backdoorlab.bench.launchers.GRACE", 3.0)
    endings = []
    for number, deaf_to in enumerate([(), (signal.SIGINT,), (signal.SIGINT, signal.SIGTERM)]):
        begun = tmp_path / f"begun{number}"
        # The tests may be in the background, too
        hears = "" if deaf_to else "signal.signal(signal.SIGINT, signal.SIG_DFL); "
        code = (
            f"import pathlib, signal, sys, time; {hears}pathlib.Path(sys.argv[1]).touch();"
            " time.sleep(60)"
        )
        task = Task(
            (sys.executable, "-c", code, str(begun)), tmp_path / str(number), tmp_path / "done"
        )
        running = launchers.begin(task, deaf_to)
        assert isinstance(running, launchers.Process)
        while not begun.exists():
            time.sleep(0.05)
        running.stop()
        endings.append(running.child.poll())
        again = launchers.begin(task)
        assert isinstance(again, launchers.Process), "its lock is free"
        again.stop()
    assert endings == [-signal.SIGINT, -signal.SIGTERM, -signal.SIGKILL]


def test_a_command_that_cannot_start_fails_alone(tmp_path: Path) -> None:
    task = sleepers(tmp_path, 1, 0)[0]
    task.folder.parent.mkdir()
    task.folder.write_text("in the way")
    refused = launchers.Local(1).start(task, 0)
    with pytest.raises(UserError, match=rf"cannot be started here: .*{task.folder}"):
        refused.poll()
    refused.stop()


def test_no_token_is_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray gets a pickle of the task, and submitit writes one into the shared folder."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    task = dataclasses.replace(sleepers(tmp_path, 1, 0)[0], environment=launchers.passed_on())
    assert (
        task.environment["HF_HOME"] == str(tmp_path / "hub")
        and task.environment["BACKDOORLAB_RECORDS"] == os.environ["BACKDOORLAB_RECORDS"]
    )
    assert b"hf_secret" not in pickle.dumps(task)
    submitted: list[Any] = []
    launcher = launchers.OnSlurm.__new__(launchers.OnSlurm)
    launcher.executor, launcher.queue = SimpleNamespace(submit=submitted.append), None
    launcher.start(task, 0)
    assert submitted[0].task == dataclasses.replace(
        task, environment={}
    ) and b"hf_secret" not in pickle.dumps(submitted)


def test_last_words_are_the_error_of_the_last_start(tmp_path: Path) -> None:
    assert launchers.last_words(tmp_path) == ""
    (tmp_path / launchers.LOG).write_text(
        "$ first\nerror: old\n$ second\nfine\nerror: new, and why\nafter\n"
    )
    assert launchers.last_words(tmp_path) == "new, and why"
    (tmp_path / launchers.LOG).write_text("$ first\nerror: old\n$ second\nterminate called\n\n")
    assert launchers.last_words(tmp_path) == "terminate called"


def test_cores_and_gpus_are_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Task] = []
    monkeypatch.setattr("backdoorlab.bench.launchers.begin", given.append)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(launchers, "usable_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    task = sleepers(tmp_path, 1, 0)[0]
    four = launchers.Local(4)
    for slot in range(4):
        four.start(task, slot)
    assert [dict(one.environment) for one in given] == [
        {"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": gpu} for gpu in ("4", "7", "4", "7")
    ]
    given.clear()
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    launchers.Local(2).start(task, 0)
    assert dict(given[0].environment) == {}, "what the user has set stays"


@pytest.mark.parametrize(
    ("groups", "limits", "affinity", "cores"),
    [
        ("0::/\n", {}, 6, 6),
        ("0::/\n", {"cpu.max": "max 100000"}, 6, 6),
        ("0::/\n", {"cpu.max": "250000 100000"}, 64, 2),
        ("0::/\n", {"cpu.max": "50000 100000"}, 64, 1),
        ("0::/\n", {"cpu.max": "800000 100000"}, 3, 3),
        ("0::/job/step\n", {"job/cpu.max": "400000 100000"}, 64, 4),
        # The path of the host, which the container does not see.
        ("0::/docker/abc\n", {"cpu.max": "300000 100000"}, 64, 3),
        (
            "5:cpu,cpuacct:/job\n0::/\n",
            {
                "cpu,cpuacct/job/cpu.cfs_quota_us": "200000",
                "cpu,cpuacct/job/cpu.cfs_period_us": "100000",
            },
            64,
            2,
        ),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 5, 5),
        # The limit of another controller's group, of which the process is no member.
        ("2:cpuset:/job\n", {"cpu/job/cpu.max": "100000 100000"}, 4, 4),
        (None, {}, 7, 7),
    ],
)
def test_cores_are_those_that_the_process_may_use(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    groups: str | None,
    limits: dict[str, str],
    affinity: int,
    cores: int,
) -> None:
    if groups is not None:
        (tmp_path / "cgroup").write_text(groups)
    for name, text in limits.items():
        file = tmp_path / "files" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    monkeypatch.setattr(environment, "CGROUP_LIST", tmp_path / "cgroup")
    monkeypatch.setattr(environment, "CGROUP_FILES", tmp_path / "files")
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(affinity)), raising=False)
    assert environment.usable_cores() == cores


def test_without_affinity_all_cores_of_the_machine_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "CGROUP_LIST", tmp_path / "none")
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert environment.usable_cores() == 12


def test_doctor_says_when_threads_exceed_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert _threads(8, 8) == "8 on 8 cores"
    assert _threads(2, 2) == "2 on 2 cores that this process may use"
    assert _threads(8, 2).endswith("more than cores, so set OMP_NUM_THREADS=2")


def test_slurm_parameters() -> None:
    assert launchers.parameters(("slurm_partition=gpu", "gpus_per_node=1")) == {
        "slurm_partition": "gpu",
        "gpus_per_node": 1,
    }
    with pytest.raises(UserError, match="takes key=value, got '=3'"):
        launchers.parameters(("=3",))


# --- submitit


def test_no_slurm_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="Slurm cannot be used here"):
        launchers.OnSlurm(1, tmp_path, {})
    with pytest.raises(UserError, match="Slurm cannot be used here"):
        launchers.OnSlurm(1, tmp_path, {"cluster": "local", "slurm_partitoin": "gpu"})


def test_slurm_jobs_in_submitits_local_executor(tmp_path: Path) -> None:
    """In place of Slurm, submitit pickles the task and runs it in processes of this machine."""
    pytest.importorskip("submitit")
    launcher = launchers.OnSlurm(2, tmp_path / "slurm", {"cluster": "local"})
    tasks = sleepers(tmp_path, 2, 3)
    spans = finish(launcher, tasks)
    assert at_once(spans) == 2
    again = launcher.start(dataclasses.replace(tasks[0]), 0)
    while (code := again.poll()) is None:
        time.sleep(0.1)
    assert code == launchers.ALREADY


def test_a_preempted_job_asks_for_the_same_again() -> None:
    submitit = pytest.importorskip("submitit")
    task = Task(("true",), Path("a"), Path("b"))
    successor = launchers._Requeued(task).checkpoint()
    assert isinstance(
        successor, submitit.helpers.DelayedSubmission
    ) and successor.function == launchers._Requeued(task)


def test_a_slurm_command_ignores_the_warning_that_slurm_sends_it(tmp_path: Path) -> None:
    """If the signal ended it, that would be its result, though Slurm restarts a preempted job."""
    endings = []
    for number, deaf_to in enumerate([(signal.SIGTERM,), ()]):
        code = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(2)"
        begun = tmp_path / f"begun{number}"
        running = launchers.begin(
            Task(
                (sys.executable, "-c", code, str(begun)), tmp_path / str(number), tmp_path / "done"
            ),
            deaf_to,
        )
        assert isinstance(running, launchers.Process)
        while not begun.exists():
            time.sleep(0.05)
        running.child.send_signal(signal.SIGTERM)
        running.child.wait()
        endings.append(running.poll())
    assert endings == [0, -signal.SIGTERM]


class Submitted:
    """Fake of a submitit job: its result is there as soon as its file is."""

    job_id = "7"

    def __init__(self, folder: Path) -> None:
        self.paths = SimpleNamespace(result_pickle=folder / "answer", stderr=folder / "7_0_log.err")

    done, exception = (lambda self: True), (lambda self: None)

    def result(self) -> int:
        return int(self.paths.result_pickle.read_text())


def test_a_job_that_slurm_ended_without_an_answer_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Slurm's accounting, submitit waits for such a job for ever. `squeue` is a script
    here; a slow test uses Slurm itself."""
    said, script = tmp_path / "said", tmp_path / "squeue"
    script.write_text(f"#!/bin/sh\ncat {said}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("backdoorlab.bench.launchers.LOOK", 0.05)

    def ending(states: str, seconds: float = 0.5) -> str | int | None:
        said.write_text(states)
        job, until = (
            launchers.SlurmJob(Submitted(tmp_path), launchers.Queue()),
            time.monotonic() + seconds,
        )
        while time.monotonic() < until:
            try:
                if (code := job.poll()) is not None:
                    return code
            except UserError as error:
                return str(error)
            time.sleep(0.02)
        return None

    log = tmp_path / "7_0_log.err"
    assert (
        ending("6 RUNNING\n7 CANCELLED\n")
        == f"Slurm job 7 ended without an answer (CANCELLED): see {log}"
    )
    assert ending("6 RUNNING\n") == f"Slurm job 7 ended without an answer (gone): see {log}"
    assert ending("7 RUNNING\n") is None and ending("7 PENDING\n") is None, (
        "the control: it runs, or was queued again"
    )
    script.write_text("#!/bin/sh\nexit 1\n")
    assert ending("") is None, "a controller that does not answer says nothing about the job"
    (tmp_path / "answer").write_text("3")
    assert ending("") == 3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_slurm_itself_gives_the_local_results(tmp_path: Path, small_flags: tuple[str, ...]) -> None:
    """Needs Slurm; docs/howto/cluster.md says how to start one on one node."""
    pytest.importorskip("submitit")
    if (
        shutil.which("sbatch") is None
        or subprocess.run(["sinfo"], capture_output=True, check=False).returncode
    ):
        pytest.skip("no Slurm answers on this machine")
    cells = test_bench.real_cells(tmp_path, small_flags, seeds=1)
    assert (
        work(
            cells,
            tmp_path / "slurm",
            launchers.OnSlurm(4, tmp_path / "jobs", {"cpus_per_task": 1, "timeout_min": 20}),
            "slurm",
        )
        == {}
    )
    assert work(cells, tmp_path / "local", launchers.Local(1), "local") == {}
    assert [weights(cell, tmp_path / "slurm") for cell in cells] == [
        weights(cell, tmp_path / "local") for cell in cells
    ]
    (task,) = sleepers(tmp_path / "sleeper", 1, 600)
    with pytest.raises(UserError, match="Slurm does not take the job"):
        launchers.OnSlurm(1, tmp_path / "jobs", {"slurm_partition": "no such"}).start(task, 0)
    launcher = launchers.OnSlurm(1, tmp_path / "jobs", {"cpus_per_task": 1, "timeout_min": 20})
    job = launcher.start(task, 0)
    job.stop()
    with pytest.raises(UserError, match=r"ended without an answer \(CANCELLED\)"):
        while job.poll() is None:
            time.sleep(1)


@pytest.mark.slow
def test_slurm_results_are_the_local_ones(tmp_path: Path, small_flags: tuple[str, ...]) -> None:
    pytest.importorskip("submitit")
    cells = test_bench.real_cells(tmp_path, small_flags, seeds=1)
    assert (
        work(
            cells,
            tmp_path / "slurm",
            launchers.OnSlurm(2, tmp_path / "jobs", {"cluster": "local"}),
            "slurm",
        )
        == {}
    )
    assert work(cells, tmp_path / "local", launchers.Local(1), "local") == {}
    assert [weights(cell, tmp_path / "slurm") for cell in cells] == [
        weights(cell, tmp_path / "local") for cell in cells
    ]


# --- Ray


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:99999"])
def test_an_unreachable_ray_is_one_line(address: str) -> None:
    """At once: Ray itself would try for eight minutes."""
    pytest.importorskip("ray")
    with pytest.raises(
        UserError,
        match=(
            rf"no Ray at {address} \(.*\): start one with `ray start --head`, or leave"
            r" --ray_address out"
        ),
    ):
        launchers.OnRay(1, address, 0, 1)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings(
    "ignore::FutureWarning",
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)
def test_ray_places_four_quarter_gpu_jobs_at_once_with_the_local_results(
    tmp_path: Path, small_flags: tuple[str, ...]
) -> None:
    """A local Ray with one logical GPU, which it only counts; then a grid, on Ray and in
    processes."""
    ray = pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        num_cpus=8,
        num_gpus=1,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 << 20,
    )
    try:
        quarters = finish(launchers.OnRay(6, None, 0.25, 0), sleepers(tmp_path / "quarters", 6, 6))
        assert at_once(quarters) == 4, "of six, four fit on the GPU"
        halves = finish(launchers.OnRay(3, None, 0.5, 0), sleepers(tmp_path / "halves", 3, 3))
        assert at_once(halves) == 2, "the control: of halves, two"
        with pytest.raises(
            UserError, match="a job asks for 2 GPU, but the Ray cluster has 1: lower --gpus_per_job"
        ):
            launchers.OnRay(1, None, 2, 1)
        cells = test_bench.real_cells(tmp_path, small_flags, seeds=1)
        assert work(cells, tmp_path / "ray", launchers.OnRay(4, None, 0.25, 1), "ray") == {}
    finally:
        ray.shutdown()
    assert work(cells, tmp_path / "local", launchers.Local(1), "local") == {}
    assert [weights(cell, tmp_path / "ray") for cell in cells] == [
        weights(cell, tmp_path / "local") for cell in cells
    ]
    assert all(driver.look(cell, tmp_path / "ray").done for cell in cells)
