"""The environment of a result: device, versions, commit."""

import platform
import shutil
import subprocess
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def environment(device: torch.device) -> dict[str, Any]:
    """Return device, versions and commit.

    Bit-equal results depend on them, and a timing means nothing without them.
    """
    if device.type == "cpu":
        described = f"cpu ({processor()}, {torch.get_num_threads()} threads)"
    else:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
        described = f"{device.type} ({name})"
    return {
        "device": described,
        "versions": {
            package: version(package)
            for package in ("backdoorlab", "torch", "torchvision", "timm", "numpy")
        }
        | {"python": platform.python_version()},
        "commit": _commit(),
    }


def processor() -> str:
    """Return the CPU's name where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


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
