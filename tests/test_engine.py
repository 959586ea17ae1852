"""What the engine asks of the C library."""

import os
import platform
import subprocess
import sys

import pytest

COUNT = """
import resource, sys, torch
from backdoorlab.device import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory(torch.device("cpu"))
def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(1 << 24)
before = pages()
for _ in range(20):
    torch.ones(1 << 24)
print(pages() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept_for_the_next_tensor_unless_the_user_decides() -> None:
    def cleared(side: str, **variables: str) -> int:
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("MALLOC_", "LD_PRELOAD"))
        }
        ran = subprocess.run(
            [sys.executable, "-c", COUNT, side],
            env=environment | variables,
            capture_output=True,
            text=True,
            check=True,
        )
        return int(ran.stdout)

    assert cleared("keep") < 0.1 * cleared("control"), (
        "twenty tensors of 64 MiB, whose pages the system clears each time by default"
    )
    assert cleared("keep", MALLOC_MMAP_MAX_="65536") > 10 * cleared("keep")
