"""The suite as other processors would run it: python tests/processors.py [--threads 1 2] [--only
NAME ...] [-- pytest's own arguments]

One processor can compute as several do: torch and oneDNN are told which instructions they may use,
and each set rounds in its own way. Settings that this processor does not have are named and left
out. The last line of each run is shown beside its setting.
"""

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from backdoorlab.execution.environment import usable_cores

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Setting:
    """Instructions, and the precision that `auto` becomes."""

    capability: str | None
    """ATEN_CPU_CAPABILITY; None: the processor's own choice."""
    isa: str | None
    """ONEDNN_MAX_CPU_ISA; None: all that there are."""
    precision: str
    needs: str | None = None
    """The capability, by torch's name, without which the processor cannot do it, or only by
    emulation."""


SETTINGS = {
    "own": Setting(None, None, "auto"),
    "sse-fp32": Setting("default", "SSE41", "fp32"),
    "avx2-fp32": Setting("avx2", "AVX2", "fp32", "avx2"),
    "avx512-fp32": Setting("avx512", "AVX512_CORE", "fp32", "avx512_f"),
    "avx512-bf16": Setting("avx512", "AVX512_CORE_BF16", "bf16", "avx512_bf16"),
    "own-bf16": Setting(None, None, "bf16", "avx512_bf16"),
}


def run(setting: Setting, threads: int, arguments: list[str]) -> tuple[int, str]:
    """pytest's exit code and last line.

    In fp32 there is a worker for each core, which its threads share. In bf16 oneDNN's threads spin
    while they wait for one another, so that each needs a core.
    """
    share = setting.precision == "fp32"
    workers = usable_cores() if share else max(1, usable_cores() // threads)
    environment = os.environ | {
        "TEST_THREADS": str(threads),
        "TEST_ONE_CORE": "1" if share else "",
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
        "BACKDOORLAB_PRECISION": setting.precision,
    }
    for name, value in (
        ("ATEN_CPU_CAPABILITY", setting.capability),
        ("ONEDNN_MAX_CPU_ISA", setting.isa),
    ):
        environment.pop(name, None)
        if value is not None:
            environment[name] = value
    command = [sys.executable, "-m", "pytest", "-n", str(workers), "--dist", "loadfile", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    for line in lines:
        print(f"    {line}", flush=True)
    return done.returncode, (done.stdout.splitlines() or ["pytest printed nothing"])[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("pytest", nargs="*", help="after --: passed on to pytest, such as -k demo")
    options = parser.parse_args()
    has, failed = torch.cpu.get_capabilities(), 0
    for name in options.only:
        setting = SETTINGS[name]
        if setting.needs is not None and not has.get(setting.needs):
            print(f"{name:<12} left out: this processor has no {setting.needs}", flush=True)
            continue
        for threads in options.threads:
            began = time.perf_counter()
            code, line = run(setting, threads, options.pytest)
            failed += code != 0
            print(
                f"{name:<12} {threads} thread{'s' * (threads > 1)}: {line}"
                f" ({time.perf_counter() - began:.0f} s)",
                flush=True,
            )
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
