"""What several test files need: run a method in this process or as a user types it."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from backdoorlab import files, registry, runner
from backdoorlab.record import Record

CHECKOUT = Path(__file__).resolve().parent.parent
CIFAR10 = CHECKOUT.parent / "shared" / "data" / "cifar10"

TINY = ("--image_size", "16", "--width", "4", "--epochs", "1", "--score_every", "0", "--precision", "fp32")
"""Flags of an attack on the digits that takes a second."""
WORKING = ("--width", "8", "--epochs", "8", "--score_every", "0", "--precision", "fp32")
"""Flags of an attack on the digits that plants a backdoor."""


@contextlib.contextmanager
def environment(**variables: Any) -> Iterator[None]:
    """Set environment variables for a while, for fixtures that live longer than a test."""
    old = {name: os.environ.get(name) for name in variables}
    os.environ.update({name: str(value) for name, value in variables.items()})
    try:
        yield
    finally:
        for name, value in old.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def attack(method: str, name: str, root: Path, *flags: str) -> Record:
    """Run an attack in this process."""
    argv = ["--save_folder_name", name, "--record_root", str(root), *flags]
    return runner.run_attack(runner.attack_job(registry.load("attack", method), argv, "test"))


def defend(method: str, record: Record, *flags: str) -> dict[str, Any] | None:
    """Run a defense in this process."""
    argv = ["--result_file", record.name, "--record_root", str(record.folder.parent), *flags]
    return runner.run_defense(runner.defense_job(registry.load("defense", method), argv, "test"))


def copy(record: Record, root: Path, name: str | None = None) -> Record:
    """A copy of a shared record that a test may change; without results of other tests."""
    folder = root / (name or record.name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(record.folder, folder, ignore=shutil.ignore_patterns("defense"))
    return Record.load(folder.name, root)


def edit_json(path: Path, **changes: Any) -> None:
    """Change a record.json or result.json as its owner could: None deletes a key, and the checksum is made to fit."""
    value = {key: item for key, item in json.loads(path.read_text()).items() if key != "checksum"}
    value |= changes
    files.write_sealed(path, {key: item for key, item in value.items() if item is not None or key not in changes})


def child_environment(**extra: Any) -> dict[str, str]:
    """This environment without PYTHONPATH, so that a child finds the package as a user's shell does."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {"OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in extra.items()}


def command(*arguments: Any, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` as a user does."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=env or child_environment(), capture_output=True, text=True, timeout=300, check=False
    )
