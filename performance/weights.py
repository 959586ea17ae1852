"""The SHA-256 of the weights that a checkout ends in: shows that a change changed no number.

    python performance/weights.py [--checkout FOLDER] [--methods dau sau ...]

Runs attack/badnet.py on the digits and each defense on its record, with --precision fp32 and one
thread, in a folder that is removed afterwards. Run it on two checkouts and compare the lines: on
one machine they are equal where nothing that computes has changed.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent.parent
EXACT = ("--precision", "fp32", "--score_every", "0")


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        _run(options.checkout, folder, "attack/badnet.py", "--save_folder_name", "demo", *EXACT)
        record = Path(folder) / "demo"
        print(f"{'badnet':<8} {digest(record / 'model.safetensors')}", flush=True)
        for name in options.methods:
            _run(options.checkout, folder, f"defense/{name}.py", "--result_file", "demo", *EXACT)
            weights = record / "defense" / name / "seed0" / "model.safetensors"
            print(f"{name:<8} {digest(weights)}", flush=True)


def digest(file: Path) -> str:
    """Hash names, dtypes, shapes and bytes of all tensors, in the order of their names."""
    total = hashlib.sha256()
    for name, value in sorted(load_file(file).items()):
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.contiguous().numpy().tobytes())
    return total.hexdigest()


def _run(checkout: Path, records: str, *arguments: str) -> None:
    """Run a method of that checkout as a user does."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "BACKDOORLAB_RECORDS": records,
        "PYTHONPATH": str(checkout),
    }
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr.decode())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checkout", type=Path, default=HERE, help="the folder to run")
    defenses = sorted(path.stem for path in HERE.glob("defense/*.py"))
    parser.add_argument("--methods", nargs="*", default=defenses)
    return parser.parse_args()


if __name__ == "__main__":
    main()
