"""A command line with the flags of an attack or a defense, whose result is a copy of one that was
made before: a cell of 50 milliseconds.

QUICK_MADE is the record that is copied, QUICK_SECONDS how long a cell takes at most.
While the file QUICK_HELD is there, the record of its name is not made.
"""

import os
import random
import shutil
import sys
import time
from pathlib import Path


def main() -> None:
    flags = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
    root, made = Path(flags["--record_root"]), Path(os.environ["QUICK_MADE"])
    if "--result_file" in flags:
        source, target = (
            made / "defense" / "dau" / "seed0",
            root / flags["--result_file"] / "defense" / "dau" / f"seed{flags['--seed']}",
        )
    else:
        source, target = made, root / flags["--save_folder_name"]
    print("started", flush=True)
    time.sleep(random.random() * float(os.environ["QUICK_SECONDS"]))
    held = Path(os.environ.get("QUICK_HELD", "none"))
    while target.name == held.name and held.exists():
        time.sleep(0.02)
    if flags["--seed"] == os.environ.get("QUICK_FAILS"):
        sys.exit("error: no luck")
    stage = target.with_name(f"{target.name}.partial")
    shutil.copytree(source, stage, ignore=shutil.ignore_patterns("defense"))
    stage.rename(target)
    print("finished", flush=True)


if __name__ == "__main__":
    main()
