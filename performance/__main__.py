"""Run all benchmarks, each in a process of its own.

    python -m performance [--device auto] [--repetitions 5] [--json FILE]

precisions.py    the precision that `auto` picks, against the other one
pipeline.py      the data path, and a training step
convolutions.py  what bounds that step
defenses.py      the inner step of each defense
whole.py         an attack and a defense from start to end
gpu.py           what bounds a step on a GPU, and several runs at once (only with a GPU)

Each prints its table. --json writes all of them to one file, for later comparison.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
# The scripts import each other from their own folder, which is not on the path with `python -m`.
sys.path.insert(0, str(HERE))

import measure  # noqa: E402

from backdoorlab.device import choose_device  # noqa: E402

SUITES = ("precisions", "pipeline", "convolutions", "defenses", "whole")


def main() -> int:
    """Run every suite, and return the number of those that failed."""
    options = measure.options(__doc__).parse_args()
    flags = ["--device", options.device, "--repetitions", str(options.repetitions)]
    suites = (*SUITES, "gpu") if choose_device(options.device).type == "cuda" else SUITES

    found, failed = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for suite in suites:
            print(f"\n=== {suite} ===", flush=True)
            file = Path(folder) / f"{suite}.json"
            command = [sys.executable, HERE / f"{suite}.py", *flags, "--json", file]
            if subprocess.run(command, check=False).returncode:
                failed.append(suite)
            else:
                found[suite] = json.loads(file.read_text())

    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return len(failed)


if __name__ == "__main__":
    raise SystemExit(main())
