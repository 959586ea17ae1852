"""What all benchmarks share: alternating measurements, the clock, the table and its header."""

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from backdoorlab import models
from backdoorlab.device import Exact, autocast
from backdoorlab.engine import Recipe, make_optimizer
from backdoorlab.execution.environment import environment, usable_cores
from backdoorlab.execution.precision import choose


@dataclass(frozen=True)
class Row:
    """One line of the table: a goal, and the ratios that were measured."""

    name: str
    goal: str
    ratios: tuple[float, ...] = ()
    percent: bool = False
    """Print the ratios in percent."""
    detail: str = ""
    """The measurements of both sides, or the reason why nothing was measured."""

    @property
    def measured(self) -> str:
        """Median, minimum and maximum of the ratios, as text."""
        if not self.ratios:
            return "not applicable"

        values = (statistics.median(self.ratios), min(self.ratios), max(self.ratios))
        middle, low, high = (f"{100 * v:.1f} %" if self.percent else f"{v:.2f}" for v in values)
        return f"{middle} ({low} to {high})"


def report(header: dict[str, str], rows: Iterable[Row], file: Path | None) -> None:
    """Print each row as soon as it is measured, and write the table as JSON if a file is given."""
    for key, value in header.items():
        print(f"{key:<9} {value}", flush=True)
    print(f"\n{'what':<44} {'goal':<10} {'measured, median (min to max)':<34} detail")

    found = []
    for row in rows:
        print(f"{row.name:<44} {row.goal:<10} {row.measured:<34} {row.detail}", flush=True)
        found.append(
            {
                **asdict(row),
                "measured": row.measured,
                "median": statistics.median(row.ratios) if row.ratios else None,
            }
        )

    if file is not None:
        file.write_text(json.dumps(dict(header=header, rows=found), indent=2) + "\n")


def in_turn(
    slow: Callable[[], Any], fast: Callable[[], Any], device: torch.device, repetitions: int
) -> list[tuple[float, float]]:
    """Time both sides alternately, so that other load on the machine affects both.

    Returns:
        Seconds of (slow, fast) for each repetition.
    """
    return [(timed(slow, device)[0], timed(fast, device)[0]) for _ in range(repetitions)]


def medians(rows: Iterable[Sequence[float]]) -> tuple[float, ...]:
    """Return the median of each column."""
    return tuple(statistics.median(column) for column in zip(*rows, strict=True))


def fresh_process() -> ProcessPoolExecutor:
    """Start a process that inherits nothing.

    For what cannot be undone within a process: its peak memory, its settings of malloc.
    """
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Return the seconds until the device has finished `work`, and what `work` returned."""
    wait(device)
    begin = time.perf_counter()
    value = work()
    wait(device)
    return time.perf_counter() - begin, value


def training_step(
    model: nn.Module, batch_size: int, device: torch.device, precision: Exact
) -> Callable[[Tensor, Tensor], None]:
    """Return a function that takes one step of the engine's SGD on images and labels."""
    optimizer = make_optimizer(model, Recipe(epochs=1, batch_size=batch_size, lr=0.01))

    def step(images: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, precision):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    return step


def fast_bf16(device: torch.device) -> bool:
    """Whether `--precision auto` picks bf16 here for PreAct-ResNet18 of width 16 on 32x32."""
    name, width = "preactresnet18", 16
    build = partial(
        models.build,
        name,
        num_classes=10,
        in_chans=3,
        mean=[0.5] * 3,
        std=[0.25] * 3,
        width=width,
    )
    choice = choose("auto", device, build, name=name, width=width, image_shape=(3, 32, 32))
    return choice.precision == "bf16"


def cifar_network(width: int, device: torch.device) -> models.Classifier:
    """Build a PreAct-ResNet18 for ten classes of 32x32 colour images."""
    return models.build(
        "preactresnet18", num_classes=10, in_chans=3, mean=(0.5,) * 3, std=(0.25,) * 3, width=width
    ).to(device)


def wait(device: torch.device) -> None:
    """Wait until the device has finished all work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe_machine(device: torch.device, **more: str) -> dict[str, str]:
    """Return the header of a table: machine, versions, threads, date, and `more`."""
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return dict(
        machine=(
            f"{environment(device)['device']}, {usable_cores()} of {os.cpu_count()} CPUs,"
            f" {platform.system()}, load {load} at the start"
        ),
        versions=(
            f"Python {platform.python_version()}, torch {torch.__version__}, torchvision"
            f" {torchvision.__version__}"
        ),
        threads=str(torch.get_num_threads()),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **more,
    )


def busy() -> bool:
    """Whether other processes leave less than one and a half processors free."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > (os.cpu_count() or 1) - 1.5


def options(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--repetitions", type=int, default=5, help="measurements of each comparison"
    )
    parser.add_argument(
        "--json", type=Path, default=None, metavar="FILE", help="also write the table to this file"
    )
    return parser
