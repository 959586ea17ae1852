"""The faster precision of one network on this machine: measured once, then kept in the cache.

A capability is not a speed. Of two processors with the same flag for bf16, one trains small
networks twice as fast with it, the other slower than in fp32. So both are timed on the network
itself: a few training steps on a few images, in well under a second.
"""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..datasets.locations import cache_root
from ..device import Exact, Precision, autocast
from ..errors import UserError
from ..models import paused
from ..run import say
from ..storage import reading, writing
from ..storage.reading import is_count
from .environment import processor

WORTH_IT = 0.97
"""Share of fp32's time below which a step in bf16 counts as faster. Where it is not faster, bf16
only loses digits."""
STEP_SECONDS = 0.2
"""Length of a timed step, which decides how many images it takes."""
MOST_IMAGES = 32
"""Images of a timed step at most; at least 2, as batch normalisation needs two."""
REPEAT_SECONDS = 0.3
"""There are two pairs of timed steps, and a third one if this much time has not passed by then."""
STEADY = 1.5
"""Several threads are believed if their longest step takes at most so many times their shortest."""
HOPELESS, GRACE_SECONDS, TRIES = 2.0, 0.05, 3
"""A step in bf16 is given up if, at any layer, it has taken more than HOPELESS times as long as in
fp32, plus GRACE_SECONDS, and if that happens TRIES times in a row with one thread."""


@dataclass(frozen=True)
class Timing:
    """Processor seconds of a training step on `images` images."""

    images: int
    fp32: float
    bf16: float | None
    """None if it was given up as hopeless."""

    @property
    def ratio(self) -> float:
        """Time of a step in bf16 divided by that in fp32."""
        return float("inf") if self.bf16 is None else self.bf16 / self.fp32

    def describe(self) -> str:
        """Compare the two in a clause."""
        compared = f"more than {HOPELESS:g}" if self.bf16 is None else f"{self.ratio:.2f}"
        return f"a training step in bf16 takes {compared} times as long as in fp32"


@dataclass(frozen=True)
class Choice:
    """The precision of a run's training, and the reason in a few words."""

    precision: Exact
    why: str

    def describe(self) -> str:
        """Write both in one phrase."""
        return f"{self.precision} ({self.why})"


def choose(
    wanted: Precision,
    device: torch.device,
    build: Callable[[], nn.Module],
    *,
    name: str,
    width: int | None,
    image_shape: Sequence[int],
    stem: str = "small",
) -> Choice:
    """Choose bf16 or fp32.

    Args:
        wanted: what the user asked for; "auto" is the faster one.
        device: where the run trains. A GPU is judged by its generation, a CPU is measured.
        build: makes the network, with any weights; called if nothing was measured yet.
        name: of the network; with width, shape and stem, what a timing is kept under.
        width: of the network; None for its own.
        image_shape: (C, H, W).
        stem: "stock" for timm's own first layers, "small" for those that we put in their place.
    """
    if wanted == "auto":
        wanted = _of_the_environment()
    if wanted == "fp32":
        return Choice("fp32", "asked for")
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
        return Choice(
            "bf16" if wanted == "bf16" or fast else "fp32",
            "asked for" if wanted == "bf16" else "by the GPU's generation",
        )

    # Of two processors with the same flag for bf16, one can be slower with it: it is measured.
    network: dict[str, Any] = {
        "architecture": name,
        "width": width,
        "image_shape": list(image_shape),
    }
    if stem != "small":
        network["stem"] = stem
    timing = _kept(network) or _measured(network, build)
    if wanted == "bf16":
        return Choice(
            "bf16",
            "asked for"
            if timing.ratio <= 1
            else f"asked for, and slow on this processor: {timing.describe()}",
        )
    return Choice(
        "bf16" if timing.ratio < WORTH_IT else "fp32",
        f"measured on this machine: {timing.describe()}",
    )


def _of_the_environment() -> Precision:
    """Return $BACKDOORLAB_PRECISION, else auto.

    It makes results of different machines comparable.
    """
    wanted = os.environ.get("BACKDOORLAB_PRECISION", "auto")
    if wanted not in get_args(Precision):
        raise UserError(
            f"BACKDOORLAB_PRECISION={wanted}: expected one of {', '.join(get_args(Precision))}"
        )
    return cast(Precision, wanted)


def _kept(network: dict[str, Any]) -> Timing | None:
    """Read an earlier timing; None where there is none that can be read."""
    try:
        found = reading.read_json(_place(network))
    except (UserError, OSError):
        return None
    images, fp32, bf16 = (found.get(name, "missing") for name in ("images", "fp32", "bf16"))
    if is_count(images) and _is_time(fp32) and (bf16 is None or _is_time(bf16)):
        return Timing(images, fp32, bf16)
    return None


def _is_time(value: Any) -> bool:
    return isinstance(value, float) and value > 0


def _measured(network: dict[str, Any], build: Callable[[], nn.Module]) -> Timing:
    """Measure the network, and keep the timing for the next run."""
    # The weights of the timed network are drawn, and must move no draw of the run.
    with torch.random.fork_rng(devices=[]):
        timing = measure(build(), network["image_shape"])
    try:
        place = _place(network)
        place.parent.mkdir(parents=True, exist_ok=True)
        writing.write_json(place, _machine() | network | dataclasses.asdict(timing))
    except UserError as error:  # no home folder
        say(f"{error}; until then each run measures bf16 against fp32 again")
    except OSError as error:
        say(
            f"{place}: cannot be written ({error.strerror}; BACKDOORLAB_CACHE names another"
            " folder), so the next run measures bf16 against fp32 again"
        )
    return timing


def _machine() -> dict[str, Any]:
    """Return what a speed depends on besides the network."""
    return {
        "processor": processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "onednn_max_cpu_isa": os.environ.get("ONEDNN_MAX_CPU_ISA", ""),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _place(network: dict[str, Any]) -> Path:
    """Where the timing of a network on this machine is kept."""
    key = hashlib.sha256(json.dumps(_machine() | network, sort_keys=True).encode()).hexdigest()[:16]
    return cache_root() / f"precision-{key}.json"


def measure(model: nn.Module, image_shape: tuple[int, int, int]) -> Timing:
    """Time training steps of a network on the CPU.

    The time is the processor's, of all threads: other work on the machine does not count. But
    threads that wait for one another on a busy machine can take several times as long as the step
    itself. So where the steps of several threads do not agree, one thread decides.

    Args:
        model: its weights stay as they are, its batch statistics change.
        image_shape: (C, H, W).
    """
    threads = torch.get_num_threads()
    with paused():
        pairs = _pairs(model, image_shape)
        if threads > 1 and not _agree(pairs):
            torch.set_num_threads(1)
            try:
                pairs = _pairs(model, image_shape)
            finally:
                torch.set_num_threads(threads)

    # The shortest is the least disturbed.
    fp32, bf16 = min(pair.fp32 for pair in pairs), [pair.bf16 for pair in pairs]
    return Timing(pairs[0].images, fp32, None if None in bf16 else min(filter(None, bf16)))


def _agree(pairs: Sequence[Timing]) -> bool:
    """Whether each precision's steps take about the same time, and all pairs name one as faster."""
    fp32, bf16 = [pair.fp32 for pair in pairs], [pair.bf16 for pair in pairs]
    return (
        None not in bf16
        and all(max(times) <= STEADY * min(times) for times in (fp32, list(filter(None, bf16))))
        and len({pair.ratio < WORTH_IT for pair in pairs}) == 1
    )


def _pairs(model: nn.Module, image_shape: tuple[int, int, int]) -> list[Timing]:
    """Time pairs of steps, two or three of them; one alone where bf16 has fallen behind."""
    images = _images(2, image_shape)
    try:
        # The first steps also make the kernels.
        _pair(model, images)
        pairs = [_pair(model, images)]

        # As many images as a timed step has room for: on few of them, what a layer costs whatever
        # their number would decide.
        room = min(MOST_IMAGES // 2, int(STEP_SECONDS / pairs[0].fp32))
        if room > 1:
            images = _images(2 * room, image_shape)
            _pair(model, images)
            pairs = []

        # In turns, so that whatever else the machine does meets both.
        began = time.perf_counter()
        while len(pairs) < 2 or (len(pairs) < 3 and time.perf_counter() - began < REPEAT_SECONDS):
            pairs.append(_pair(model, images))
    except _Hopeless as late:
        return [Timing(len(images), late.fp32, None)]
    return pairs


def _pair(model: nn.Module, images: Tensor) -> Timing:
    """Take a step in fp32 and one in bf16, and return the processor seconds of both.

    A step in bf16 that falls far behind is taken again, because what is found here is kept for
    good. Several threads have one try, because after it one thread decides.

    Raises:
        _Hopeless: without hardware for bf16, a step in it can take seconds; each try is given up.
    """
    tries = TRIES if torch.get_num_threads() == 1 else 1
    while True:
        marks = _step(model, images, "fp32")
        try:
            bf16 = _step(model, images, "bf16", behind=marks)
        except _Hopeless:
            tries -= 1
            if tries == 0:
                raise
        else:
            return Timing(len(images), marks[-1], bf16[-1])


class _Hopeless(Exception):
    """The step in bf16 takes many times as long."""

    def __init__(self, fp32: float) -> None:
        super().__init__()
        self.fp32 = fp32
        """Seconds of the step in fp32."""


def _step(
    model: nn.Module, images: Tensor, precision: Exact, behind: list[float] | None = None
) -> list[float]:
    """Take one training step and note the time on the way.

    Args:
        model: its gradients are removed afterwards.
        images: float (B, C, H, W).
        precision: of the forward pass.
        behind: the marks of fp32; a step that falls far behind them raises _Hopeless.

    Returns:
        Processor seconds since the start at each layer's output, at each layer's gradient, and at
        the end.
    """
    marks: list[float] = []
    began = time.process_time()

    def mark(_gradient: Tensor | None = None) -> None:
        marks.append(time.process_time() - began)
        if behind is None or len(marks) > len(behind):
            return
        if marks[-1] > HOPELESS * behind[len(marks) - 1] + GRACE_SECONDS:
            raise _Hopeless(behind[-1])

    def passed(_module: nn.Module, _inputs: Any, output: Any) -> None:
        mark()
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(mark)

    # Only layers without parts are marked, once each.
    handles = [
        module.register_forward_hook(passed)
        for module in model.modules()
        if not list(module.children())
    ]
    try:
        with autocast(images.device, precision):
            logits = model.train()(images)
        F.cross_entropy(logits.float(), torch.zeros(len(images), dtype=torch.int64)).backward()
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad(set_to_none=True)
    return [*marks, time.process_time() - began]


def _images(count: int, image_shape: tuple[int, int, int]) -> Tensor:
    return torch.full((count, *image_shape), 0.5).to(memory_format=torch.channels_last)
