"""The environment of a result, device, versions and commit, and the cores that it may use."""

import math
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from ..storage.schema import UNKNOWN

CGROUP_LIST, CGROUP_FILES = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
"""Where Linux lists a process's control groups, and where their limits are."""
LIMITS = (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
"""Files with the quota and the period of a control group, by version 2 and by version 1."""


def environment(device: torch.device) -> dict[str, Any]:
    """Return device, versions and commit of this process, as records and results say them."""
    return described([machine(device)])


def machine(device: torch.device) -> dict[str, Any]:
    """Return the facts on which bit-equal results depend besides the settings.

    A timing means nothing without them, either.
    """
    on_gpu = device.type == "cuda"
    return {
        "kind": device.type,
        "name": torch.cuda.get_device_name(device) if on_gpu else processor(),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "versions": {
            package: version(package)
            for package in ("backdoorlab", "torch", "torchvision", "timm", "numpy")
        }
        | {"python": platform.python_version()},
        "commit": _commit(),
    }


def described(machines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Describe the machines of a run: device, versions and commit.

    Args:
        machines: facts of each start of the run, first to last. More than one where a killed run
            was continued elsewhere: each fact that changed is written as "old -> new".
    """
    # On one processor, only the number of threads can differ.
    processors = {(facts["kind"], facts["name"]) for facts in machines}
    if len(processors) == 1 and machines[0]["threads"] is not None:
        threads = _in_turn([facts["threads"] for facts in machines])
        device = f"{machines[0]['kind']} ({machines[0]['name']}, {threads} threads)"
    else:
        device = _in_turn([_device(facts) for facts in machines])

    # A checkout may have a commit where an installed package has none.
    packages = dict.fromkeys(name for facts in machines for name in facts["versions"])
    commits = [facts["commit"] for facts in machines]
    return {
        "device": device,
        "versions": {
            name: _in_turn([facts["versions"].get(name) for facts in machines]) for name in packages
        },
        "commit": _in_turn(commits) if any(commits) else None,
    }


def _device(facts: Mapping[str, Any]) -> str:
    threads = "" if facts["threads"] is None else f", {facts['threads']} threads"
    return f"{facts['kind']} ({facts['name']}{threads})"


def _in_turn(values: Sequence[Any]) -> str:
    """Join values by " -> ", each that follows itself once."""
    texts = [UNKNOWN if value is None else str(value) for value in values]
    return " -> ".join(text for text, _ in groupby(texts))


def processor() -> str:
    """Return the CPU's name where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Return how many cores this process may use, at least 1.

    Containers and batch systems leave a process fewer than the machine has, by its affinity or by
    a CPU quota.
    """
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        allowed = os.cpu_count() or 1
    # A thread for a part of a core would keep the others waiting.
    return max(1, int(min(allowed, _cpu_quota())))


def _cpu_quota() -> float:
    """Return the cores' worth of time that control groups allow; infinity without a limit."""
    try:
        groups = CGROUP_LIST.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return math.inf

    # Each line is NUMBER:CONTROLLERS:PATH. Version 2 has a single line, without controllers.
    folders: list[Path] = []
    for _, controllers, path in (line.split(":", 2) for line in groups):
        if not controllers:
            roots = [CGROUP_FILES]
        elif "cpu" in controllers.split(","):
            roots = [CGROUP_FILES / controllers, CGROUP_FILES / "cpu"]
        else:
            continue
        # The limits of all groups above count, too. A container may see the uppermost only.
        for root in roots:
            folder = root / path.lstrip("/")
            folders += [folder, *(above for above in folder.parents if above.is_relative_to(root))]
    return min(map(_limit, folders), default=math.inf)


def _limit(folder: Path) -> float:
    """Return the quota of one control group in cores; infinity where it has none."""
    for names in LIMITS:
        try:
            texts = [(folder / name).read_text(encoding="utf-8") for name in names]
            quota, period = " ".join(texts).split()
            if int(quota) > 0:
                return int(quota) / int(period)
        # No such file, or the word "max".
        except (OSError, ValueError):
            continue
    return math.inf


def _commit() -> str | None:
    """Return the checkout's commit, with "+changes" if files differ; None outside a checkout."""
    # An installed package lies in no checkout, and a machine may have no git.
    root = Path(__file__).parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    try:
        # A slow file system must not stop a run that is finished.
        command = partial(
            subprocess.run, cwd=root, capture_output=True, text=True, timeout=10, check=True
        )
        commit = command(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
        changed = command(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changed else "")
