"""All benchmarks, each in a process of its own.

    python -m performance [--device auto] [--repetitions 5] [--json FILE]

pipeline.py: images, and a training step. convolutions.py: what bounds that step. defenses.py: the
inner step of each defense. whole.py: an attack and a defense from start to end. gpu.py: what bounds
a step on a GPU, and several runs at once, where there is one. Each prints its table; --json keeps
them all in one file, for later comparison.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
# The scripts find each other when they are run by path; here the folder is not the first place
sys.path.insert(0, str(HERE))

import measure

from backdoorlab.device import choose_device

SUITES = ("precisions", "pipeline", "convolutions", "defenses", "whole")


def main() -> int:
    options = measure.options(__doc__).parse_args()
    flags = ["--device", options.device, "--repetitions", str(options.repetitions)]
    suites = (*SUITES, "gpu") if choose_device(options.device).type == "cuda" else SUITES
    found, failed = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for suite in suites:
            print(f"\n=== {suite} ===", flush=True)
            file = Path(folder) / f"{suite}.json"
            if subprocess.run(
                [sys.executable, HERE / f"{suite}.py", *flags, "--json", file], check=False
            ).returncode:
                failed.append(suite)
            else:
                found[suite] = json.loads(file.read_text())
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return len(failed)


if __name__ == "__main__":
    raise SystemExit(main())
