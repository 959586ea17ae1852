"""Launchers: run the commands of a grid as processes of this machine, on Ray, or as Slurm jobs.

Each command's process inherits the lock on its folder. If its driver is killed, the command goes on
and nobody starts it a second time; when it ends, in whatever way, the lock is gone.
"""

import contextlib
import errno
import getpass
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ..errors import UserError
from ..execution.environment import usable_cores
from ..storage import locks, writing

BUSY, ALREADY = 75, 76
"""In place of an exit code: another process runs the command; its result existed before it could
start."""
LOOK = 30.0
"""Seconds between two calls of squeue."""
LOG = "log.txt"
"""Output of a command, in its folder."""
HOPELESS = frozenset([errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM])
"""Errors of writing that every command would meet: they end the driver."""
GRACE = 10.0
"""Seconds that a command has to end after SIGINT, and again after SIGTERM, before SIGKILL."""
PASSED_ON = ("BACKDOORLAB_", "OMP_", "MKL_")
PASSED_ON_TOO = ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "PYTHONPATH")
"""Prefixes and names of the environment variables that are passed to other machines; never a
token."""


@dataclass(frozen=True)
class Task:
    """A command to run."""

    command: tuple[str, ...]
    folder: Path
    """Locked while it runs; contains its log."""
    done: Path
    """The file whose presence means that it is finished."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables besides those of the process that starts it."""


class Running(Protocol):
    """A command that was started, or is queued."""

    def poll(self) -> int | None:
        """Return its exit code (-N after signal N), BUSY or ALREADY; None until it has ended."""

    def stop(self) -> None:
        """Interrupt the command, and wait until it has ended."""


class Launcher(Protocol):
    """A way to run commands."""

    slots: int
    """Most commands at once."""

    def start(self, task: Task, slot: int) -> Running:
        """Start a command. `slot`: a number below `slots` that no running command has."""

    def close(self) -> None:
        """Free what the launcher itself has started."""


# --- beside the command


@dataclass
class Process:
    """A running command on this machine. This process keeps its lock, too, until it has ended."""

    child: subprocess.Popen[bytes]
    lock: int

    def poll(self) -> int | None:
        code = self.child.poll()
        if code is not None:
            self._release()
        return code

    def stop(self) -> None:
        # Python takes SIGINT for Ctrl-C, and writes no half files.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            self.child.send_signal(number)  # nothing happens if it has ended
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.child.wait(GRACE)
                break
        self._release()

    def _release(self) -> None:
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1


@dataclass(frozen=True)
class Refused:
    """A command that this machine could not start."""

    why: OSError

    def poll(self) -> int | None:
        raise UserError(f"cannot be started here: {self.why}") from self.why

    def stop(self) -> None:
        pass


@dataclass(frozen=True)
class Answered:
    """A command that did not start: another process runs it, or it is finished."""

    code: int

    def poll(self) -> int:
        return self.code

    def stop(self) -> None:
        pass


def begin(task: Task, deaf_to: Sequence[int] = ()) -> Process | Answered:
    """Lock a command's folder, and start the command, which inherits the lock.

    Args:
        task: the command.
        deaf_to: signals that it ignores.
    """
    writing.make_folder(task.folder)
    lock = locks.try_lock(task.folder)
    if lock is None:
        return Answered(BUSY)

    try:
        # Under the lock: another driver may have finished it just now.
        if task.done.exists():
            locks.unlock(lock)
            return Answered(ALREADY)

        with open(task.folder / LOG, "ab") as log:
            log.write(f"$ {' '.join(task.command)}\n".encode())
            log.flush()
            # The lock is that of the open file: it ends when both processes have closed it.
            child = subprocess.Popen(
                task.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **task.environment},
                pass_fds=[lock] if lock >= 0 else [],
                preexec_fn=partial(_ignore, deaf_to) if deaf_to else None,
            )
    except BaseException:
        locks.unlock(lock)
        raise
    return Process(child, lock)


def _ignore(signals: Sequence[int]) -> None:
    for number in signals:
        signal.signal(number, signal.SIG_IGN)


def run_there(task: Task, deaf_to: Sequence[int] = ()) -> int:
    """Run a command to its end on a machine of a cluster; returns what `Running.poll` does."""
    running = begin(task, deaf_to)
    if isinstance(running, Answered):
        return running.code
    try:
        running.child.wait()
    except BaseException:
        running.stop()
        raise
    code = running.poll()
    assert code is not None
    return code


def last_words(folder: Path) -> str:
    """Return why the last command in a log failed: its `error:` line, else its last line."""
    try:
        log = (folder / LOG).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

    # Each command begins with a line "$ COMMAND".
    lines = log.rsplit("\n$ ", 1)[-1].splitlines()[1:]
    said = [line.strip() for line in lines if line.strip()]
    errors = [line for line in said if line.startswith("error:")]
    last = (errors or said or [""])[-1]
    return last.removeprefix("error: ")


# --- this machine


class Local:
    """Processes of this machine. Slots share its usable cores evenly, and take its GPUs in turn."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.gpus = _gpus()

    def start(self, task: Task, slot: int) -> Running:
        # Without it, every command would start as many threads as the machine has cores.
        extra = dict(task.environment)
        if "OMP_NUM_THREADS" not in os.environ:
            extra["OMP_NUM_THREADS"] = str(max(1, usable_cores() // self.slots))
        if len(self.gpus) > 1:
            extra["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        try:
            return begin(Task(task.command, task.folder, task.done, extra))
        except OSError as error:
            if error.errno in HOPELESS:
                raise
            # Too little memory, for example: other commands may still start.
            return Refused(error)

    def close(self) -> None:
        pass


def _gpus() -> list[str]:
    """List the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    # torch takes a second to import, and is not needed where the variable says it.
    if said is not None:
        return [name for name in said.split(",") if name]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


# --- Ray


class OnRay:
    """Ray tasks: Ray finds a node for each command, and tries again if the node is lost.

    Args:
        slots: most commands at once.
        address: of a running cluster; None starts Ray on this machine.
        gpus_per_job: share of a GPU that each command takes.
        cpus_per_job: cores that each command takes.
    """

    def __init__(
        self, slots: int, address: str | None, gpus_per_job: float, cpus_per_job: float
    ) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        self.ray = _installed("ray", "ray")
        self.slots = slots
        self.ours = not self.ray.is_initialized()
        if self.ours:
            self._connect(address)

        # Ray would wait for ever for what the cluster does not have.
        have = self.ray.cluster_resources()
        for kind, wanted in (("GPU", gpus_per_job), ("CPU", cpus_per_job)):
            if wanted > have.get(kind, 0):
                self.close()
                raise UserError(
                    f"a job asks for {wanted:g} {kind}, but the Ray cluster has"
                    f" {have.get(kind, 0):g}: lower --{kind.lower()}s_per_job"
                )

        self.remote = self.ray.remote(num_gpus=gpus_per_job, num_cpus=cpus_per_job, max_retries=2)(
            run_there
        )

    def _connect(self, address: str | None) -> None:
        """Connect to a cluster, or start one of this machine alone."""
        _refuse_silent(address)
        quiet = dict(include_dashboard=False, log_to_driver=False, logging_level="error")
        try:
            if address:
                self.ray.init(address=address, **quiet)
            else:
                self.ray.init(**quiet, object_store_memory=100 << 20)
        except Exception as error:  # Ray raises many kinds
            where = f"at {address}" if address else "on this machine"
            raise UserError(
                f"no Ray {where} ({_first_line(error)}): start one with `ray start --head`, or"
                " leave --ray_address out"
            ) from error

    def start(self, task: Task, slot: int) -> Running:
        return RayTask(self.ray, self.remote.remote(task))

    def close(self) -> None:
        if self.ours:
            self.ray.shutdown()


def _refuse_silent(address: str | None) -> None:
    """Raise a UserError if nobody answers at an address: Ray itself would try for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except (OSError, OverflowError) as error:
            raise UserError(
                f"no Ray at {address} ({_first_line(error)}): start one with `ray start --head`, or"
                " leave --ray_address out"
            ) from error


@dataclass
class RayTask:
    """A command on Ray."""

    ray: Any
    reference: Any

    def poll(self) -> int | None:
        ready, _ = self.ray.wait([self.reference], timeout=0)
        if not ready:
            return None
        try:
            return self.ray.get(self.reference)
        except self.ray.exceptions.RayError as error:
            raise UserError(f"Ray gave a job up: {_first_line(error)}") from error

    def stop(self) -> None:
        self.ray.cancel(self.reference, recursive=False)
        self.ray.wait([self.reference], timeout=60)


# --- Slurm


class OnSlurm:
    """Slurm jobs: a preempted one is queued again, and continues from its checkpoint.

    Args:
        slots: most jobs at once.
        folder: for submitit's files; all nodes must see it.
        parameters: submitit's own.
    """

    def __init__(self, slots: int, folder: Path, parameters: Mapping[str, Any]) -> None:
        submitit = _installed("submitit", "slurm")
        self.slots = slots
        given = dict(parameters)
        # Other values are submitit's own executors, for tests: they have no queue.
        cluster = given.pop("cluster", "slurm")
        self.queue = Queue() if cluster == "slurm" else None
        try:
            self.executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
            self.executor.update_parameters(name="backdoorlab", **given)
        except Exception as error:  # submitit raises RuntimeError, TypeError, NameError, ...
            raise UserError(
                f"Slurm cannot be used here ({_first_line(error)}): see docs/howto/cluster.md for"
                " --slurm key=value"
            ) from error

    def start(self, task: Task, slot: int) -> Running:
        try:
            # Without an environment: sbatch passes on that of this process, and submitit would
            # store ours in the shared folder.
            return SlurmJob(
                self.executor.submit(_Requeued(replace(task, environment={}))), self.queue
            )
        except Exception as error:  # what sbatch says
            raise UserError(
                f"Slurm does not take the job ({_first_line(error)}): change --slurm, or lower"
                " --jobs"
            ) from error

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class _Requeued:
    """The function of a job, which submitit queues again when its time is up.

    Slurm sends its signals to the command, too. The command ignores them until it is killed: if it
    ended before, its exit code would be the job's result, and a preempted job, which Slurm
    restarts, would count as failed.
    """

    task: Task

    def __call__(self) -> int:
        return run_there(self.task, (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2))

    def checkpoint(self) -> Any:
        import submitit

        return submitit.helpers.DelayedSubmission(_Requeued(self.task))


class Queue:
    """The user's jobs that have ended, by `squeue`.

    submitit asks `sacct`, which knows nothing on clusters without accounting.
    """

    ENDED = (
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "TIMEOUT",
    )

    def __init__(self) -> None:
        self.asked = -math.inf
        self.states: dict[str, str] | None = None

    def ended(self, job_id: str) -> str | None:
        """Return the state in which a job ended.

        "gone" if Slurm has forgotten it; None while it waits or runs, and if Slurm does not answer.
        """
        if time.monotonic() - self.asked >= LOOK:
            self.asked = time.monotonic()
            ask = [
                "squeue",
                "--noheader",
                "--states=all",
                "--format=%A %T",
                f"--user={getpass.getuser()}",
            ]
            answer = subprocess.run(ask, capture_output=True, text=True, check=False)
            self.states = (
                None
                if answer.returncode
                else dict(line.split(maxsplit=1) for line in answer.stdout.splitlines())
            )

        if self.states is None:
            return None
        state = self.states.get(job_id, "gone")
        return state if state in (*self.ENDED, "gone") else None


@dataclass
class SlurmJob:
    """A command in Slurm's queue."""

    job: Any
    queue: Queue | None
    missed: float | None = None
    """When it was first seen to have ended without a result, which a shared file system may show
    late."""

    def poll(self) -> int | None:
        if not self._answered():
            return None
        problem = self.job.exception()
        if problem is not None:
            raise UserError(f"Slurm job {self.job.job_id} failed: {_first_line(problem)}")
        return self.job.result()

    def _answered(self) -> bool:
        """Return whether the job's result is there; a UserError if it ended without one."""
        if self.queue is None or self.job.paths.result_pickle.exists():
            return self.job.done()
        state = self.queue.ended(self.job.job_id)
        if state is None:
            self.missed = None
            return False
        # The job has ended: its result may still be on its way through the file system.
        self.missed = self.missed or time.monotonic()
        if time.monotonic() - self.missed > 2 * LOOK:
            raise UserError(
                f"Slurm job {self.job.job_id} ended without an answer ({state}): see"
                f" {self.job.paths.stderr}"
            )
        return False

    def stop(self) -> None:
        # Slurm ends the job in its own time: a next driver meets its lock until then.
        self.job.cancel()


def parameters(given: Sequence[str]) -> dict[str, Any]:
    """Parse key=value words as submitit's parameters: digits become an int."""
    found: dict[str, Any] = {}
    for word in given:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UserError(
                f"--slurm takes key=value, got {word!r}: for example --slurm slurm_partition=gpu"
                " gpus_per_node=1 timeout_min=240"
            )
        found[key] = int(value) if value.isdecimal() else value
    return found


def _installed(module: str, extra: str) -> Any:
    """Import an optional package. `extra`: name of the extra that installs it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{module} is not installed ({_first_line(error)}): pip install 'backdoorlab[{extra}]',"
            " or use --launcher local"
        ) from error


def _first_line(error: BaseException) -> str:
    return next(
        (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
    )[:200]


def command(path: Path, flags: Sequence[str]) -> tuple[str, ...]:
    """Return the command line that runs a method's file with this interpreter."""
    return (sys.executable, str(path), *flags)


def passed_on() -> dict[str, str]:
    """Return the environment variables that a command on another machine needs."""
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(PASSED_ON) or name in PASSED_ON_TOO
    }
