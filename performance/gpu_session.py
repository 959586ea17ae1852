"""Everything that a short loan of a GPU is wanted for, in an order in which any end leaves a table.

  python performance/gpu_session.py [--grid bench_cifar10_fast] [--minutes 12] [--jobs 3]
      [--out gpu-session] [--record_root FOLDER] [--part_mb 15] [--total_mb 60]

1. pytest -m gpu: tests.txt.
2. bench on the grid, until the minutes are over; the same command continues it: bench.txt.
3. The tables: table.md, table.csv.
4. results.tar: every JSON and CSV file of the records. weights-1.tar ...: the models, attacked
   ones first, in parts of --part_mb, as far as --total_mb goes.
"""

import argparse
import contextlib
import functools
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

SMALL = ("*.json", "*.csv")
"""What a table is made from."""
PATIENCE = 60
"""Seconds that an interrupted bench has to end by itself."""


def main() -> int:
    """Run the session; returns the exit code of the last step of bench."""
    options = _options()
    end = time.monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)

    python = [sys.executable, "-m"]
    tests = [*python, "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    run_until(tests, options.out / "tests.txt", end)

    root = ["--record_root", str(options.record_root)]
    bench = [*python, "backdoorlab", "bench", "--config", options.grid, "--jobs", str(options.jobs)]
    code = run_until([*bench, *root], options.out / "bench.txt", end)

    made = sorted(path.parent.name for path in options.record_root.glob("*/record.json"))
    for ending, form in (("md", "markdown"), ("csv", "csv")):
        table = [*python, "backdoorlab", "table", *made, *root, "--format", form]
        if made:
            run_until(table, options.out / f"table.{ending}", end + PATIENCE)

    pack(options.record_root, options.out, options.part_mb << 20, options.total_mb << 20)
    for path in sorted(options.out.iterdir()):
        print(f"{path}  {path.stat().st_size:,} bytes")
    return code


def run_until(command: Sequence[str], log: Path, end: float) -> int:
    """Run a command until a time of the monotonic clock, then interrupt it; returns its exit
    code."""
    with log.open("w", encoding="utf-8") as stream:
        # A session of its own, so that all of its children are reached.
        child = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A script's background job, and all that it starts, would ignore the interrupt.
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        try:
            return child.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(PATIENCE)
        os.killpg(child.pid, signal.SIGKILL)
        return child.wait()


def pack(root: Path, out: Path, part: int, total: int) -> None:
    """Pack the records into few files.

    Args:
        root: the records.
        out: where the archives go.
        part: bytes of weights in an archive, at most; a larger model has one alone.
        total: bytes of all archives together, at most.
    """
    small = sorted(path for pattern in SMALL for path in root.rglob(pattern))
    with tarfile.open(out / "results.tar.gz", "w:gz") as archive:
        for path in small:
            archive.add(path, path.relative_to(root))
    left = total - (out / "results.tar.gz").stat().st_size

    # Attacked models first: the deepest paths are those of defenses.
    models = sorted(root.rglob("model.safetensors"), key=lambda path: (len(path.parts), path))
    parts: list[list[Path]] = []
    filled = part
    for path in models:
        size = path.stat().st_size
        if size > left:
            print(f"left out, no room: {path.relative_to(root)}", file=sys.stderr)
            continue
        if filled + size > part:
            parts.append([])
            filled = 0
        parts[-1].append(path)
        filled, left = filled + size, left - size
    for number, paths in enumerate(parts, 1):
        with tarfile.open(out / f"weights-{number}.tar", "w") as archive:
            for path in paths:
                archive.add(path, path.relative_to(root))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--grid", default="bench_cifar10_fast", help="a grid file or its name")
    parser.add_argument("--minutes", type=float, default=12, help="of tests and bench together")
    parser.add_argument("--jobs", type=int, default=3, help="commands at once")
    parser.add_argument("--out", type=Path, default=Path("gpu-session"))
    parser.add_argument("--record_root", type=Path, default=Path("record"))
    parser.add_argument("--part_mb", type=int, default=15)
    parser.add_argument("--total_mb", type=int, default=60)
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
