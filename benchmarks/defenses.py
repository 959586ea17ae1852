"""What a step of a defense costs, against a plain transcription of the published step.

    python benchmarks/defenses.py [--width 16 64] [--json FILE]

Both sides are in this file, get the same weights and images, and take turns. Their results are compared before they are timed: a
faster step that computes something else would be no gain. `--memory` reports the peak of each side, in a process of its own.
"""

import argparse
import copy
import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measure
import torch
import torch.nn.functional as F
from measure import Row, busy, describe_machine, report
from torch import Tensor, nn

from backdoorlab import registry
from backdoorlab.engine import Precision, choose_device, seed_everything
from backdoorlab.models import PASSES, build
from backdoorlab.run import Run, peak_memory

sau: Any = registry.load("defense", "sau").module

CLASSES = 10
Step = Callable[[], tuple[Tensor, Tensor]]
"""One step of a defense; returns the perturbation and the loss."""


def main() -> None:
    options = _options()
    device = choose_device(options.device)
    caution = "the machine is busy" if busy() else "none"
    header = describe_machine(device, data=f"made-up images, batches of {options.batch_size}", caution=caution)
    report(header, _rows(options, device), options.json)


def _rows(options: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    for width in options.width:
        yield from _sau(width, options, device)
        if options.memory:
            yield _memory(width, options)


def _sau(width: int, options: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    for precision in ("fp32", "auto"):
        published, lean = sau_steps(width, options.batch_size, device, precision)
        if precision == "fp32":
            yield _agreement(published(), lean(), width)
        else:
            published(), lean()
        before = PASSES.forward
        lean()
        passes = (PASSES.forward - before) / options.batch_size
        pairs = measure.in_turn(published, lean, device, options.repetitions)
        slow, fast = (statistics.median(column) for column in zip(*pairs, strict=True))
        yield Row(
            f"SAU published / lean, width {width}, {precision}",
            ">= 2.5",
            tuple(a / b for a, b in pairs),
            detail=f"{1000 * slow:.0f} and {1000 * fast:.0f} ms a step; 24 and {passes:.1f} forwards an image",
        )


def _agreement(published: tuple[Tensor, Tensor], lean: tuple[Tensor, Tensor], width: int) -> Row:
    """The first step of both. Perturbations are signs of gradients: where one is almost 0, rounding may turn it."""
    same = (published[0] == lean[0]).float().mean().item()
    apart = (published[1] - lean[1]).abs().item() / published[1].abs().item()
    return Row(
        f"SAU: equal pixels of delta, width {width}", ">= 99.9 %", (same,), percent=True, detail=f"relative difference of the losses {apart:.1e}"
    )


def sau_steps(width: int, batch_size: int, device: torch.device, precision: Precision) -> tuple[Step, Step]:
    """The published step in fp32 and ours, each on its own copy of a pair of models that differ a little."""
    seed_everything(0, device)
    poisoned = build("preactresnet18", num_classes=CLASSES, in_chans=3, mean=(0.5,) * 3, std=(0.25,) * 3, width=width).to(device).eval()
    x = torch.rand(batch_size, 3, 32, 32).to(device, memory_format=torch.channels_last)
    with torch.no_grad():
        for _ in range(20):  # statistics of these images instead of 0 and 1
            poisoned.train()(x)
    poisoned.eval()
    model = copy.deepcopy(poisoned)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    y = poisoned(x).argmax(1)
    return _published_sau(copy.deepcopy(model), copy.deepcopy(poisoned), x, y), _lean_sau(model, poisoned, x, y, device, precision)


def _lean_sau(model: nn.Module, poisoned: nn.Module, x: Tensor, y: Tensor, device: torch.device, precision: Precision) -> Step:
    poisoned.requires_grad_(False)
    config, run = sau.Config(), Run(Path(), seed=0, device=device, precision=precision)
    with torch.no_grad():
        believed = poisoned(x).argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, amsgrad=True, fused=True)

    def step() -> tuple[Tensor, Tensor]:
        delta = sau.shared_perturbation(model, poisoned, x, y, believed, config, run)
        loss = sau.training_loss(model, poisoned, x, y, delta, believed, config, run)
        run.step(optimizer, loss)
        return delta, loss.detach()

    return step


def _published_sau(model: nn.Module, reference: nn.Module, x: Tensor, y: Tensor) -> Step:
    """24 forwards and 12 backwards with all weight gradients: clean images again at every step, the reference in the graph."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, amsgrad=True)

    def step() -> tuple[Tensor, Tensor]:
        delta = torch.full_like(x, 0.2)
        for _ in range(5):
            delta = delta.detach().requires_grad_()
            clean, clean_reference = model(x), reference(x)
            seen, seen_reference = model(x + delta), reference(x + delta)
            left, left_reference = seen.argmax(1) != clean.argmax(1), seen_reference.argmax(1) != clean_reference.argmax(1)
            shared = left & left_reference & (seen.argmax(1) == seen_reference.argmax(1))
            adversarial = -F.cross_entropy(seen, y, reduction="none") * ~left - F.cross_entropy(seen_reference, y, reduction="none") * ~left_reference
            p, q = seen.softmax(1).clamp_min(1e-8), seen_reference.softmax(1).clamp_min(1e-8)
            mean = 0.5 * (p + q)
            divergence = (0.5 * p * p.log() + 0.5 * q * q.log() - mean * mean.log()).sum(1) * ~shared
            loss = (0.01 * 0.5 * adversarial + divergence).sum() / len(x)
            if shared.all():
                break
            loss.backward()
            assert delta.grad is not None
            delta = (delta.detach() - 0.2 * delta.grad.sign()).clamp(-0.2, 0.2)
        delta = delta.detach()
        clean, seen = model(torch.cat([x, x + delta])).chunk(2)
        clean_reference, seen_reference = reference(x), reference(x + delta)
        wrong = seen_reference.argmax(1)
        fooled = (wrong != y) & (wrong != clean_reference.argmax(1))
        p = seen.softmax(1)
        of_wrong = p.gather(1, wrong[:, None]).squeeze(1)
        others = p.scatter(1, wrong[:, None], 0).sum(1)
        first, second = -(1e-6 + others.clamp_max(0.999)).log(), -(1 + 1e-6 - of_wrong.clamp_min(0.001)).log()
        loss = F.cross_entropy(clean, y) + ((first + second) / 2 * fooled).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return delta, loss.detach()

    return step


def _memory(width: int, options: argparse.Namespace) -> Row:
    """Peak of a step above what the process held before it, each side in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, maxtasksperchild=1) as pool:
        slow, fast = (pool.apply(_peak, (side, width, options.batch_size, options.device)) for side in (0, 1))
    detail = f"{slow / 1e6:,.0f} and {fast / 1e6:,.0f} MB above the models and images, batches of {options.batch_size}"
    return Row(f"SAU peak memory, lean / published, width {width}", "-", (fast / slow,), percent=True, detail=detail)


def _peak(side: int, width: int, batch_size: int, device_name: str) -> int:
    device = choose_device(device_name)
    step = sau_steps(width, batch_size, device, "fp32")[side]
    before = peak_memory(device)
    step()
    return peak_memory(device) - before


def _options() -> argparse.Namespace:
    parser = measure.options(__doc__)
    parser.add_argument("--width", type=int, nargs="+", default=[16, 64], help="channels of PreAct-ResNet18's first stage")
    parser.add_argument("--batch-size", "--batch_size", type=int, default=256)
    parser.add_argument("--memory", action="store_true", help="measure peak memory, too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
