"""What a training step costs on a GPU, what bounds it, and what several runs at once gain.

    python performance/gpu.py [--width 16 64] [--json FILE]

Ours is the step that engine.train runs on a PreAct-ResNet18 with 32x32 images on the GPU: drawing,
cropping and flipping images, forward and backward pass, optimizer. It is compared with the same
step without CUDA graphs, with torch.compile inside and outside of graphs, and in fp32. The first
steps of each variant are timed separately, because they include compiling and capturing. The peak
is that of a bf16 matrix product of 8192 x 8192 random numbers, measured here.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import measure
import torch
import torch.nn.functional as F
from measure import Row, cifar_network, describe_machine, report, timed
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from backdoorlab.data import Augment, Split, batches
from backdoorlab.device import Exact, choose_device, seed_everything
from backdoorlab.engine import WORTH_A_GRAPH, Forward, Recipe, make_optimizer
from backdoorlab.models import paused
from backdoorlab.run import Run

BATCH, STEPS, SIZE = 128, 100, 20_000
AT_ONCE = (1, 2, 4, 8)
WINDOW = 3.0
"""Seconds for which simultaneous runs are counted."""


def main() -> None:
    parser = measure.options(__doc__)
    parser.add_argument("--width", type=int, nargs="+", default=[16, 64])
    parser.add_argument(
        "--at_once", type=int, nargs="+", default=AT_ONCE, help="runs at once; 1 must be among them"
    )
    options = parser.parse_args()

    device = choose_device(options.device)
    if device.type != "cuda":
        raise SystemExit(
            "performance/gpu.py needs a GPU, and there is none; pipeline.py and convolutions.py"
            " measure a step on the CPU"
        )
    if 1 not in options.at_once:
        raise SystemExit(
            f"--at_once {' '.join(map(str, options.at_once))}: 1 must be among them, because"
            " the others are compared with it"
        )

    header = describe_machine(
        device, data=f"synthetic images, batches of {BATCH}, {STEPS} steps a measurement"
    )
    report(header, _rows(options, device), options.json)


def _rows(options: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    peak, copied = _ceilings(device)
    yield Row(
        "ceilings of this GPU",
        "-",
        detail=(
            f"{peak / 1e12:.0f} TFLOP/s in bf16, {copied / 1e12:.2f} TB/s copied, read and written"
        ),
    )
    for width in options.width:
        yield from _ways(width, peak, options.repetitions, device)
    for width in options.width:
        yield from _at_once(width, sorted(options.at_once), device)


def _ceilings(device: torch.device) -> tuple[float, float]:
    """Measure the best rates of this GPU: floating-point operations and bytes per second."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randint(0, 255, (2**32,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)

    def best(work: Callable[[], Any]) -> float:
        work()
        return min(timed(lambda: [work() for _ in range(10)], device)[0] / 10 for _ in range(3))

    return 2 * 8192**3 / best(lambda: a @ b), 2 * len(source) / best(lambda: target.copy_(source))


def _ways(width: int, peak: float, repetitions: int, device: torch.device) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        operations = _operations(width, device)
        ways: dict[str, tuple[Exact, bool, bool]] = {
            # The first one also includes cuDNN's start and its choice of kernels.
            "without graphs": ("bf16", False, False),
            "CUDA graphs (ours)": ("bf16", True, False),
            "torch.compile": ("bf16", False, True),
            "torch.compile, in CUDA graphs": ("bf16", True, True),
            "without graphs, fp32": ("fp32", False, False),
        }

        # The first steps of each variant, timed separately.
        steps: dict[str, Callable[[], None]] = {}
        firsts = {}
        for name, way in ways.items():
            firsts[name], steps[name] = timed(
                partial(_warm, width, *way, Path(folder), device), device
            )

        # Then all variants alternately.
        found: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repetitions):
            for name, some in steps.items():
                found[name].append(timed(some, device)[0] / STEPS)

        ours = found["CUDA graphs (ours)"]
        for name, seconds in found.items():
            middle = statistics.median(seconds)
            rate = 3 * operations * BATCH / middle
            speed = (
                f"{1e3 * middle:.2f} ms, {BATCH / middle:,.0f} images/s, {rate / 1e12:.0f} TFLOP/s"
                f" = {100 * rate / peak:.0f} % of the peak"
            )
            extra = f"{speed}; first steps {firsts[name]:.1f} s"
            yield Row(
                f"width {width}: {name} / ours",
                "-",
                tuple(a / b for a, b in zip(seconds, ours, strict=True)),
                detail=extra,
            )
        yield _profile(width, steps["without graphs"], ours)


def _warm(
    width: int, precision: Exact, graphs: bool, compiled: bool, folder: Path, device: torch.device
) -> Callable[[], None]:
    """Warm one variant up, and return a function that runs STEPS of its steps."""
    steps = _training(width, precision, graphs, compiled, folder, device)
    for _ in range(5):
        next(steps)

    def some() -> None:
        for _ in range(STEPS):
            next(steps)

    return some


def _training(
    width: int, precision: Exact, graphs: bool, compiled: bool, folder: Path, device: torch.device
) -> Iterator[None]:
    """Run the loop of engine.train endlessly, and yield after each step."""
    seed_everything(0, device)
    recipe = Recipe(
        epochs=100, batch_size=BATCH, lr=0.01, augment=Augment(crop_padding=4, flip=True)
    )
    run = Run(folder, seed=0, device=device, precision=precision)
    split, model = _data(device), cifar_network(width, device)
    if compiled:  # without the counter of images: each change of it would compile again
        model.network.forward_features = torch.compile(model.network.forward_features)

    forward = Forward(model.train(), run, split, WORTH_A_GRAPH if graphs else 0, BATCH)
    optimizer = make_optimizer(model, recipe)
    while True:
        for batch in batches(
            split,
            BATCH,
            device=device,
            generator=run.generator,
            augment=recipe.augment,
            drop_last=True,
        ):
            run.step(optimizer, F.cross_entropy(forward(batch.images).float(), batch.labels))
            yield


def _profile(width: int, steps: Callable[[], None], ours: list[float]) -> Row:
    """Measure the time of the GPU's kernels in a step, by kind of kernel."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        steps()
        torch.cuda.synchronize()

    kinds = {"convolution": 0.0, "batch norm": 0.0, "the rest": 0.0}
    launches = 0
    for event in seen.key_averages():
        # The profiler also lists the calls that launch kernels.
        if event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        name, launches = event.key.lower(), launches + event.count
        convolution = any(
            word in name
            for word in ("conv", "gemm", "wgrad", "dgrad", "fprop", "xmma", "cutlass", "implicit")
        )
        kind = (
            "batch norm"
            if "bn_" in name or "batch_norm" in name or "batchnorm" in name
            else "convolution"
            if convolution
            else "the rest"
        )
        kinds[kind] += event.self_device_time_total / 1e6 / STEPS

    busy = sum(kinds.values())
    parts = ", ".join(f"{kind} {100 * value / busy:.0f} %" for kind, value in kinds.items())
    detail = (
        f"{1e3 * busy:.2f} ms of kernels in a step without graphs, {launches / STEPS:.0f} kernels:"
        f" {parts}"
    )
    return Row(
        f"width {width}: kernels' time / our step",
        "-",
        tuple(busy / second for second in ours),
        percent=True,
        detail=detail,
    )


def _at_once(width: int, counts: list[int], device: torch.device) -> Iterator[Row]:
    """Compare the images per second of several simultaneous runs with those of one.

    All processes are started at the beginning; those that are not needed wait.
    """
    context = multiprocessing.get_context("spawn")
    barrier, rates = context.Barrier(counts[-1]), context.Queue()
    workers = [
        context.Process(target=_worker, args=(number, width, counts, str(device), barrier, rates))
        for number in range(counts[-1])
    ]
    for worker in workers:
        worker.start()

    found = dict.fromkeys(counts, 0.0)
    for _ in range(sum(counts)):
        count, rate = rates.get(timeout=300)
        found[count] += rate
    for worker in workers:
        worker.join()

    for count in counts:
        gain = found[count] / found[counts[0]]
        yield Row(
            f"width {width}: {count} runs at once / one",
            "-",
            (gain,),
            detail=f"{found[count]:,.0f} images/s together",
        )


def _worker(
    number: int, width: int, counts: list[int], device: str, barrier: Any, rates: Any
) -> None:
    """Train in one process, and report images per second for each count that includes it."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        steps = _training(width, "bf16", True, False, Path(folder), torch.device(device))
        for _ in range(20):
            next(steps)

        # All processes start each count together; those beyond it wait for the next one.
        for count in counts:
            torch.cuda.synchronize()
            barrier.wait(timeout=300)
            if number < count:
                begin, done = time.perf_counter(), 0
                while time.perf_counter() - begin < WINDOW:
                    for _ in range(10):
                        next(steps)
                    torch.cuda.synchronize()
                    done += 10
                rates.put((count, done * BATCH / (time.perf_counter() - begin)))


def _operations(width: int, device: torch.device) -> int:
    """Count the floating-point operations of one image's forward pass."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), paused():
        cifar_network(width, device)(torch.zeros(1, 3, 32, 32, device=device))
    return counter.get_total_flops()


def _data(device: torch.device) -> Split:
    draws = torch.Generator().manual_seed(0)
    images: Tensor = torch.randint(0, 256, (SIZE, 3, 32, 32), generator=draws, dtype=torch.uint8)
    return Split(images.to(device), torch.randint(0, 10, (SIZE,), generator=draws).to(device))


if __name__ == "__main__":
    main()
