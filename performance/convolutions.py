"""What bounds a training step: its convolutions, each measured alone, against a matrix product.

    python performance/convolutions.py [--width 16] [--json FILE]

Each convolution of PreAct-ResNet18 runs alone on a batch of 128, as in a step: forward, gradient of
its weights and, except for the first, gradient of its input. Their sum is a lower bound for a step
unless convolutions become faster. The peak is that of a square matrix product in the same
precision. A multiply-add counts as two operations everywhere. Both sides are measured alternately,
as in all benchmarks here.
"""

import argparse
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import measure
import torch
import torch.nn.functional as F
from measure import (
    Row,
    busy,
    cifar_network,
    describe_machine,
    fast_bf16,
    in_turn,
    medians,
    report,
    timed,
    training_step,
)
from torch import Tensor, nn

from backdoorlab.device import Exact, choose_device, seed_everything

BATCH = 128
PRODUCT = 2048


@dataclass(frozen=True)
class Shape:
    """A convolution of images (BATCH, inputs, size, size)."""

    inputs: int
    outputs: int
    size: int
    kernel: int
    stride: int
    padding: int
    first: bool

    @property
    def operations(self) -> int:
        """Floating-point operations of this convolution in one step."""
        return (
            2
            * BATCH
            * self.inputs
            * self.outputs
            * self.kernel**2
            * (self.size // self.stride) ** 2
            * (2 if self.first else 3)
        )


@dataclass(frozen=True)
class Way:
    """Precision and memory format of a step."""

    precision: Exact
    memory: torch.memory_format

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


def main() -> None:
    options = _options()
    device = choose_device(options.device)
    seed_everything(0, device)
    header = describe_machine(
        device,
        model=f"PreAct-ResNet18 of width {options.width}",
        caution="the machine is busy" if busy() else "none",
    )
    report(header, _rows(options.width, device, options.repetitions), options.json)


def _rows(width: int, device: torch.device, repetitions: int) -> Iterator[Row]:
    conventional = Way("fp32", torch.contiguous_format)
    ours = Way("bf16" if fast_bf16(device) else "fp32", torch.channels_last)
    shapes = _convolutions(cifar_network(width, device))
    total = sum(shape.operations * count for shape, count in shapes.items())

    # Each convolution alone, and their sum.
    pairs = []
    for shape, count in shapes.items():
        work = [_convolution(shape, way, device) for way in (conventional, ours)]
        found = _pairs(work[0], work[1], device, repetitions)
        pairs.append([(a * count, b * count) for a, b in found])
        yield Row(_name(shape, count), "-", _ratios(found), detail=_rates(found, shape.operations))
    sums = [tuple(map(sum, zip(*turn, strict=True))) for turn in zip(*pairs, strict=True)]
    yield Row("all convolutions of a step", "-", _ratios(sums), detail=_rates(sums, total))

    # The whole step, and the share of the convolutions in it.
    steps = _pairs(
        _step(width, conventional, device), _step(width, ours, device), device, repetitions
    )
    yield Row("a whole step", "-", _ratios(steps), detail=_rates(steps, total))
    alone, step = medians(sums)[1], medians(steps)[1]
    yield Row(
        "convolutions / whole step, ours", "-", tuple(alone / b for _, b in steps), percent=True
    )
    yield Row(
        "conventional step / our convolutions alone",
        "-",
        tuple(a / alone for a, _ in steps),
        detail="the ratio if all else were free",
    )

    # The rate of the step against that of a matrix product.
    peaks = [2 * PRODUCT**3 / timed(_product(ours, device), device)[0] for _ in range(repetitions)]
    detail = f"{total / step / 1e9:,.0f} of {statistics.median(peaks) / 1e9:,.0f} GFLOP/s"
    yield Row(
        "our step / matrix product",
        "-",
        tuple(total / step / peak for peak in peaks),
        percent=True,
        detail=detail,
    )


def _pairs(
    slow: Callable[[], Any], fast: Callable[[], Any], device: torch.device, repetitions: int
) -> list[tuple[float, float]]:
    slow(), fast()  # the first call selects kernels
    return in_turn(slow, fast, device, repetitions)


def _ratios(pairs: list[Any]) -> tuple[float, ...]:
    return tuple(a / b for a, b in pairs)


def _rates(pairs: list[Any], operations: int) -> str:
    a, b = medians(pairs)
    return (
        f"{1000 * a:.1f} and {1000 * b:.1f} ms, {operations / a / 1e9:,.0f} and"
        f" {operations / b / 1e9:,.0f} GFLOP/s"
    )


def _name(shape: Shape, count: int) -> str:
    return (
        f"{shape.inputs} -> {shape.outputs}, {shape.kernel}x{shape.kernel} / {shape.stride} on"
        f" {shape.size}x{shape.size}, {count} times"
    )


def _convolutions(model: nn.Module) -> Counter[Shape]:
    """Count how often each shape occurs, in the order of the network."""
    found: Counter[Shape] = Counter()

    def note(layer: nn.Conv2d, inputs: tuple[Tensor], _: Tensor) -> None:
        padding = layer.padding if isinstance(layer.padding, tuple) else (0, 0)
        found[
            Shape(
                layer.in_channels,
                layer.out_channels,
                inputs[0].shape[-1],
                layer.kernel_size[0],
                layer.stride[0],
                padding[0],
                not found,
            )
        ] += 1

    hooks = [
        layer.register_forward_hook(note)
        for layer in model.modules()
        if isinstance(layer, nn.Conv2d)
    ]
    with torch.no_grad():
        model.eval()(torch.rand(1, 3, 32, 32, device=next(model.parameters()).device))
    for hook in hooks:
        hook.remove()
    return found


def _convolution(shape: Shape, way: Way, device: torch.device) -> Callable[[], Any]:
    """Return a function that runs one convolution forward and backward."""
    made = partial(torch.randn, device=device)
    x = made(BATCH, shape.inputs, shape.size, shape.size).to(way.dtype, memory_format=way.memory)
    weight = made(shape.outputs, shape.inputs, shape.kernel, shape.kernel).to(
        way.dtype, memory_format=way.memory
    )
    forward = partial(F.conv2d, x, weight, None, shape.stride, shape.padding)
    slope, strides, paddings = torch.randn_like(forward()), [shape.stride] * 2, [shape.padding] * 2
    wanted = [not shape.first, True, False]
    backward = partial(
        torch.ops.aten.convolution_backward,
        slope,
        x,
        weight,
        None,
        strides,
        paddings,
        [1, 1],
        False,
        [0, 0],
        1,
        wanted,
    )

    def work() -> None:
        forward()
        backward()

    return work


def _step(width: int, way: Way, device: torch.device) -> Callable[[], Any]:
    model = cifar_network(width, device).to(memory_format=way.memory).train()
    images = torch.rand(BATCH, 3, 32, 32, device=device).to(memory_format=way.memory)
    labels = torch.randint(10, (BATCH,), device=device)
    return partial(training_step(model, BATCH, device, way.precision), images, labels)


def _product(way: Way, device: torch.device) -> Callable[[], Any]:
    a, b = (torch.randn(PRODUCT, PRODUCT, device=device, dtype=way.dtype) for _ in range(2))
    a @ b
    return lambda: a @ b


def _options() -> argparse.Namespace:
    parser = measure.options(__doc__)
    parser.add_argument("--width", type=int, default=16)
    return parser.parse_args()


if __name__ == "__main__":
    main()
