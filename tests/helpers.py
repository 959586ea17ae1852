"""What several test files need: run a method in this process or as a user types it."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from backdoorlab.execution.attack import attack_job, run_attack
from backdoorlab.execution.defense import defense_job, run_defense
from backdoorlab.record import Record
from backdoorlab.settings import methods
from backdoorlab.storage import writing

CHECKOUT = Path(__file__).resolve().parent.parent
CIFAR10 = CHECKOUT.parent / "shared" / "data" / "cifar10"

THREADS = int(os.environ.get("TEST_THREADS", "1"))

TINY = ("--image_size", "16", "--width", "4", "--epochs", "1", "--score_every", "0")
"""Flags of an attack on the digits that takes a second."""
WORKING = ("--width", "8", "--epochs", "8", "--batch_size", "32", "--score_every", "0")
"""Flags of a training on the digits that works, whatever the processor's rounding."""


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
    return run_attack(attack_job(methods.load("attack", method), argv, "test"))


def defend(method: str, record: Record, *flags: str) -> dict[str, Any] | None:
    """Run a defense in this process."""
    argv = ["--result_file", record.name, "--record_root", str(record.folder.parent), *flags]
    return run_defense(defense_job(methods.load("defense", method), argv, "test"))


def copy(record: Record, root: Path, name: str | None = None) -> Record:
    """A copy of a shared record that a test may change; without results of other tests."""
    folder = root / (name or record.name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(record.folder, folder, ignore=shutil.ignore_patterns("defense"))
    return Record.load(folder.name, root)


def small_data(folder: Path) -> Path:
    """96 + 24 grey 8x8 images of three classes, a bright band in each: the smallest set on which
    everything runs."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 32), ("test", 8)):
        for label in range(3):
            (folder / split / str(label)).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 90, (8, 8), dtype=np.uint8)
                pixels[2 * label : 2 * label + 3] += 120
                Image.fromarray(pixels).save(folder / split / str(label) / f"{i}.png")
    return folder


def few_cifar10(folder: Path, train: int, test: int) -> Path:
    """The first rows of the CIFAR-10 shards, as shards."""
    folder.mkdir(parents=True)
    for split, count in (("train", train), ("test", test)):
        source = pq.ParquetFile(sorted(CIFAR10.glob(f"{split}-*.parquet"))[0])
        rows = next(source.iter_batches(batch_size=count))
        pq.write_table(pa.Table.from_batches([rows]), folder / f"{split}-00000-of-00001.parquet")
    (folder / "classes.json").write_text((CIFAR10 / "classes.json").read_text())
    return folder


def small_flags(data: Path) -> tuple[str, ...]:
    """Flags of an attack on `small_data` that takes half a second."""
    model = (
        "--model",
        "preactresnet10",
        "--width",
        "2",
        "--batch_size",
        "16",
        "--lr",
        "0.05",
        "--patch_size",
        "2",
        "--poison_rate",
        "0.2",
    )
    return (
        "--dataset",
        "small",
        "--dataset_path",
        str(data),
        *model,
        "--epochs",
        "3",
        "--score_every",
        "0",
    )


def short_flags(method: str) -> tuple[str, ...]:
    """Flags of any defense that make each of its stages two epochs long, and leave it enough
    trusted images on `small_data`."""
    fields = dataclasses.fields(methods.load("defense", method).config_class)
    long = [
        field.name
        for field in fields
        if field.type in (int, "int") and ("epochs" in field.name or "rounds" in field.name)
    ]
    small = {
        "abl": ("--isolated_rate", "0.1"),
        "anp": ("--iterations", "5", "--batch_size", "8"),
        "asd": ("--iterations", "3", "--batch_size", "8", "--seeds_per_class", "2"),
        "bu": ("--levels", "0.9", "--hidden", "16", "--accept", "0"),
        "cognitive_distillation": ("--steps", "3"),
        "nc": ("--works", "0", "--index", "0"),
        "strip": ("--overlays", "10"),
    }
    common = ("--trusted_ratio", "0.3", "--score_every", "0")
    # An unlearner is told what to forget: half of the poison, drawn with the seed.
    told = ("--split", "oracle:0.5") if methods.load("defense", method).role == "unlearner" else ()
    common = (*common, *told)
    return (*common, *small.get(method, ()), *(x for name in long for x in (f"--{name}", "2")))


def script(path: str) -> Any:
    """Import a file of the checkout that is in no package, such as performance/cost.py, with what
    lies beside it."""
    file = CHECKOUT / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    with mock.patch.object(sys, "path", [str(file.parent), *sys.path]):
        spec.loader.exec_module(module)
    return module


def edit_json(path: Path, **changes: Any) -> None:
    """Change a record.json or result.json as its owner could: None deletes a key, and the checksum
    is made to fit."""
    value = {key: item for key, item in json.loads(path.read_text()).items() if key != "checksum"}
    value |= changes
    writing.write_sealed(
        path, {key: item for key, item in value.items() if item is not None or key not in changes}
    )


def fork() -> int:
    """`os.fork`; the child computes with one thread, for it would wait for its parent's others."""
    pid = os.fork()
    if not pid:
        torch.set_num_threads(1)
    return pid


def child_environment(**extra: Any) -> dict[str, str]:
    """This environment without PYTHONPATH, so that a child finds the package as a user's shell
    does."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return (
        kept
        | {"OMP_NUM_THREADS": str(THREADS)}
        | {name: str(value) for name, value in extra.items()}
    )


def command(
    *arguments: Any, cwd: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` as a user does."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=env or child_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
