"""Where the commands of a grid run: in processes of this machine, on a Ray cluster, or as Slurm
jobs.

Each command runs beside a lock on its own folder that its process inherits. So whoever started it
may be killed: while the command goes on, nobody starts it a second time, and when it ends, however
it ends, the lock is gone.
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
from ..storage import locks, writing

BUSY, ALREADY = 75, 76
"""Answers in place of an exit code: another process runs this command; its result was there before
it could start."""
LOOK = 30.0
"""Seconds between two questions to Slurm's queue."""
LOG = "log.txt"
HOPELESS = frozenset([errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM])
"""What one command cannot write, no other can: the driver ends, in one line."""
GRACE = 10.0
"""Seconds that a command has to end after each signal, from the mildest to the one that nothing
ignores."""
PASSED_ON = ("BACKDOORLAB_", "OMP_", "MKL_")
PASSED_ON_TOO = ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "PYTHONPATH")
"""Beginnings and names of the environment variables that a command on another machine is given too;
never a token."""


@dataclass(frozen=True)
class Task:
    """A command, the folder that is locked while it runs and holds its log, and the file that says
    it is done."""

    command: tuple[str, ...]
    folder: Path
    done: Path
    environment: Mapping[str, str] = field(default_factory=dict)


class Running(Protocol):
    """A command that was handed over."""

    def poll(self) -> int | None:
        """Its exit code (minus the signal that ended it), BUSY, ALREADY, or None while it runs or
        waits."""

    def stop(self) -> None:
        """Interrupt it, and wait until it has ended."""


class Launcher(Protocol):
    """What takes commands."""

    slots: int
    """How many are handed over at once."""

    def start(self, task: Task, slot: int) -> Running: ...

    def close(self) -> None: ...


# --- beside the command


@dataclass
class Process:
    """A command of this machine; holds the lock as long as the process does."""

    child: subprocess.Popen[bytes]
    lock: int

    def poll(self) -> int | None:
        code = self.child.poll()
        if code is not None:
            self._release()
        return code

    def stop(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            self.child.send_signal(number)  # does nothing where it has ended
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
    """A command that was not to start."""

    code: int

    def poll(self) -> int:
        return self.code

    def stop(self) -> None:
        pass


def begin(task: Task, deaf_to: Sequence[int] = ()) -> Process | Answered:
    """Lock the task's folder and start its command with the lock in its hands, and ignoring some
    signals."""
    writing.make_folder(task.folder)
    lock = locks.try_lock(task.folder)
    if lock is None:
        return Answered(BUSY)
    try:
        if task.done.exists():
            locks.unlock(lock)
            return Answered(ALREADY)
        with open(task.folder / LOG, "ab") as log:
            log.write(f"$ {' '.join(task.command)}\n".encode())
            log.flush()
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
    """The whole life of a command on the machine that was given it."""
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
    """Why the last command in a folder's log failed: its `error:` line, else the last line that it
    wrote."""
    try:
        lines = (
            (folder / LOG)
            .read_text(encoding="utf-8", errors="replace")
            .rsplit("\n$ ", 1)[-1]
            .splitlines()[1:]
        )
    except OSError:
        return ""
    said = [line.strip() for line in lines if line.strip()]
    return next(
        (line for line in reversed(said) if line.startswith("error:")), said[-1] if said else ""
    ).removeprefix("error: ")


# --- this machine


class Local:
    """A process a slot. Cores are shared out among them; GPUs in turn, one to each slot."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.gpus = _gpus()

    def start(self, task: Task, slot: int) -> Running:
        extra = dict(task.environment)
        if "OMP_NUM_THREADS" not in os.environ:
            extra["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.slots))
        if len(self.gpus) > 1:
            extra["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        try:
            return begin(Task(task.command, task.folder, task.done, extra))
        except OSError as error:
            if error.errno in HOPELESS:
                raise
            return Refused(error)  # no memory, say: this command's failure, not the others'

    def close(self) -> None:
        pass


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    if said is not None:
        return [name for name in said.split(",") if name]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


# --- Ray


class OnRay:
    """Each command is a Ray task that takes a share of a GPU; Ray finds the node, and tries again
    where a node is lost."""

    def __init__(
        self, slots: int, address: str | None, gpus_per_job: float, cpus_per_job: float
    ) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        self.ray = _installed("ray", "ray")
        self.slots = slots
        self.ours = not self.ray.is_initialized()
        if self.ours:
            _refuse_silent(address)
            quiet = dict(include_dashboard=False, log_to_driver=False, logging_level="error")
            try:
                (
                    self.ray.init(address=address, **quiet)
                    if address
                    else self.ray.init(**quiet, object_store_memory=100 << 20)
                )
            except Exception as error:  # Ray raises many kinds
                where = f"at {address}" if address else "on this machine"
                raise UserError(
                    f"no Ray {where} ({_first_line(error)}): start one with `ray start --head`, or"
                    " leave --ray_address out"
                ) from error
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

    def start(self, task: Task, slot: int) -> Running:
        return RayTask(self.ray, self.remote.remote(task))

    def close(self) -> None:
        if self.ours:
            self.ray.shutdown()


def _refuse_silent(address: str | None) -> None:
    """Ray itself asks an address where nobody answers for minutes on end."""
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
    """A command that Ray has."""

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
    """Each command is a Slurm job; a preempted one is queued again and goes on from its
    checkpoint."""

    def __init__(self, slots: int, folder: Path, parameters: Mapping[str, Any]) -> None:
        submitit = _installed("submitit", "slurm")
        self.slots = slots
        given = dict(parameters)
        cluster = given.pop("cluster", "slurm")
        self.queue = Queue() if cluster == "slurm" else None
        try:
            self.executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
            self.executor.update_parameters(name="backdoorlab", **given)
        except Exception as error:  # submitit raises RuntimeError, TypeError, NameError, ...
            raise UserError(
                f"Slurm cannot be used here ({_first_line(error)}): see docs/scaling.md for --slurm"
                " key=value"
            ) from error

    def start(self, task: Task, slot: int) -> Running:
        try:
            # What sbatch inherits its job has; submitit keeps what it is given in a file of the
            # shared folder.
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
    """What submitit calls, and asks for a successor when the time is up.

    Slurm signals the command, too. It goes on until it is killed, because one that ends before
    would be an answer, and a job that was preempted, and that Slurm starts anew, would be taken for
    one that failed.
    """

    task: Task

    def __call__(self) -> int:
        return run_there(self.task, (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2))

    def checkpoint(self) -> Any:
        import submitit

        return submitit.helpers.DelayedSubmission(_Requeued(self.task))


class Queue:
    """Which of the user's jobs Slurm has ended, by `squeue`. submitit goes by `sacct`, which tells
    nothing where there is no accounting."""

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
        """In what state, "gone" where Slurm has forgotten the job; None while it waits or runs, or
        where Slurm does not answer."""
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
    """A command that Slurm has."""

    job: Any
    queue: Queue | None
    missed: float | None = None
    """When it was first seen to have ended without an answer, which a shared file system may show
    late."""

    def poll(self) -> int | None:
        if not self._answered():
            return None
        problem = self.job.exception()
        if problem is not None:
            raise UserError(f"Slurm job {self.job.job_id} failed: {_first_line(problem)}")
        return self.job.result()

    def _answered(self) -> bool:
        if self.queue is None or self.job.paths.result_pickle.exists():
            return self.job.done()
        state = self.queue.ended(self.job.job_id)
        if state is None:
            self.missed = None
            return False
        self.missed = self.missed or time.monotonic()
        if time.monotonic() - self.missed > 2 * LOOK:
            raise UserError(
                f"Slurm job {self.job.job_id} ended without an answer ({state}): see"
                f" {self.job.paths.stderr}"
            )
        return False

    def stop(self) -> None:
        self.job.cancel()


def parameters(given: Sequence[str]) -> dict[str, Any]:
    """key=value words as submitit takes them: whole numbers are numbers."""
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
    """The command line of a method's file, with this interpreter."""
    return (sys.executable, str(path), *flags)


def passed_on() -> dict[str, str]:
    """What a command on another machine has to be told of this process's environment."""
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(PASSED_ON) or name in PASSED_ON_TOO
    }
