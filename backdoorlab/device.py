"""The machine of a run: device, precision, seeds, memory."""

import contextlib
import ctypes
import hashlib
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .errors import UserError

Exact = Literal["bf16", "fp32"]
"""Precision of a run's training. Scores are always computed in fp32."""
Precision = Literal["auto", "bf16", "fp32"]
"""What a user may ask for: `auto` becomes the faster one (execution/precision.py)."""


def choose_device(wanted: str) -> torch.device:
    """Turn --device into a torch device.

    Args:
        wanted: cpu, cuda, cuda:N, or auto for the first GPU, else the CPU.

    Raises:
        UserError: where the device is not there.
    """
    if wanted.startswith(("auto", "cuda")) and torch.cuda.is_available():
        torch.cuda.init()  # not every call that takes a numbered device does it
        # TF32 would round what is called fp32, scores included.
        torch.backends.cudnn.allow_tf32 = False
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise UserError(f"--device {wanted}: expected auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {wanted}: expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--device {wanted}: this machine has no usable GPU; leave --device out, or say"
            " --device cpu"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {wanted}: this machine has {torch.cuda.device_count()} GPU(s), numbered"
            " from 0"
        )
    return device


def autocast(
    device: torch.device, precision: Exact, *, cache: bool = True
) -> AbstractContextManager[Any]:
    """Compute the passes inside in bfloat16, if that is the precision.

    Args:
        device: where the passes are.
        precision: "fp32" changes nothing.
        cache: keep converted weights until the end of the context, which a CUDA graph must not.
    """
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=cache)
    return contextlib.nullcontext()


def seed_everything(seed: int, device: torch.device) -> None:
    """Seed torch, numpy and random.

    On a CPU the numbers are the same in every process with the same versions and thread count, on
    a GPU nearly the same.
    """
    if not 0 <= seed < 2**31:
        raise UserError(f"seed must lie in 0..{2**31 - 1}, got {seed}")

    # Libraries that methods call may draw from any of the three.
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if device.type == "cuda":
        # Without it, sums in cuBLAS depend on which streams are free.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = True
        # torch then makes the context current by itself.
        warnings.filterwarnings(
            "ignore", message="Attempting to run cuBLAS, but there was no current CUDA context"
        )


def keep_freed_memory(device: torch.device) -> None:
    """Keep up to 2 GiB that a training step frees for the next one, on a CPU with glibc.

    By default malloc returns a large tensor to the system at once, which clears its pages anew for
    the next: a tenth of a training step's time (performance/pipeline.py, row 5). No number changes.
    Nothing is done if a MALLOC_ variable of glibc is set.
    """
    if device.type != "cpu" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(AttributeError, TypeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)


def derived_generator(seed: int, purpose: str) -> torch.Generator:
    """Make a CPU generator of its own, so that draws for one purpose do not move those of another.

    Args:
        seed: the run's seed.
        purpose: another word gives other draws.
    """
    # A hash, for seeds next to each other would give related streams.
    digest = hashlib.sha256(f"{seed}:{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


@contextlib.contextmanager
def seeded(seed: int, purpose: str) -> Iterator[None]:
    """Initialise networks made inside from a seed of their own; no other draw changes.

    Args:
        seed: the run's seed.
        purpose: another one gives other networks.
    """
    # The global state is put back afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_generator(seed, purpose).initial_seed())
        yield


def finite(value: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    return bool(torch.isfinite(value).all())
