"""The cost of a step of each defense, against a plain transcription of the published step.

    python performance/defenses.py [--width 16 64] [--json FILE]

The published steps are in published.py. Both sides get the same weights and images, and are
measured alternately. Where both should compute the same numbers, these are compared first: a faster
step that computes something else is no gain. `--memory` reports the peak memory of each side, each
in a process of its own.
"""

import argparse
import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import measure
import published
import torch
from measure import (
    Row,
    busy,
    cifar_network,
    describe_machine,
    fast_bf16,
    fresh_process,
    medians,
    report,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from backdoorlab.data import Augment, Split, to_device
from backdoorlab.device import Exact, choose_device, seed_everything
from backdoorlab.engine import Forward
from backdoorlab.execution.scores import ScoreLog
from backdoorlab.features import extract
from backdoorlab.models import PASSES
from backdoorlab.perturb import frozen
from backdoorlab.poison_search.anti_learning import anti_learn
from backdoorlab.record import DefenderView
from backdoorlab.repair import mesa
from backdoorlab.repair.stacked import Mine
from backdoorlab.run import Run, peak_memory
from backdoorlab.settings import methods

asd: Any = methods.load("defense", "asd").module
dau: Any = methods.load("defense", "dau").module
ibau: Any = methods.load("defense", "ibau").module
bu: Any = methods.load("defense", "bu").module
sau: Any = methods.load("defense", "sau").module

CLASSES = 10

Work = Callable[[], tuple[Tensor, Tensor]]
"""A step on fixed images, which returns the perturbation and the loss."""


def main() -> None:
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    options = _options()
    device = choose_device(options.device)
    caution = "the machine is busy" if busy() else "none"
    header = describe_machine(
        device, data=f"synthetic images, batches of {options.batch_size}", caution=caution
    )
    report(header, _rows(options, device), options.json)


def _rows(options: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    for width in options.width:
        yield from _sau(width, options, device)
        if options.memory:
            yield _memory(width, options)
        yield _dau(width, options, device)
        yield from _ibau(width, options, device)
        yield from _asd(width, options, device)
    yield _bu(options, device)


def _sau(width: int, options: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    precisions: tuple[Exact, ...] = ("fp32", "bf16") if fast_bf16(device) else ("fp32",)
    for precision in precisions:
        published, lean = sau_steps(width, options.batch_size, device, precision)
        if precision == "fp32":
            yield _agreement(published(), lean(), width)
        else:
            published(), lean()

        before = PASSES.forward
        lean()
        passes = (PASSES.forward - before) / options.batch_size

        pairs = measure.in_turn(published, lean, device, options.repetitions)
        slow, fast = medians(pairs)
        yield Row(
            f"SAU published / lean, width {width}, {precision}",
            ">= 2.5",
            tuple(a / b for a, b in pairs),
            detail=(
                f"{1000 * slow:.0f} and {1000 * fast:.0f} ms a step; 24 and {passes:.1f} forwards"
                " an image"
            ),
        )


def _agreement(published: tuple[Tensor, Tensor], lean: tuple[Tensor, Tensor], width: int) -> Row:
    """Compare the first step of both sides.

    Perturbations are signs of gradients: rounding may flip the sign of a gradient near 0.
    """
    same = (published[0] == lean[0]).float().mean().item()
    apart = (published[1] - lean[1]).abs().item() / published[1].abs().item()
    return Row(
        f"SAU: equal pixels of delta, width {width}",
        ">= 99.9 %",
        (same,),
        percent=True,
        detail=f"relative difference of the losses {apart:.1e}",
    )


def sau_steps(
    width: int, batch_size: int, device: torch.device, precision: Exact
) -> tuple[Work, Work]:
    """Build the published step (fp32, torch's default memory format) and ours.

    Each works on its own copy of a pair of models that differ slightly.

    Args:
        width: channels of the network's first stage.
        batch_size: images per step.
        device: where both run.
        precision: of our step.
    """
    seed_everything(0, device)
    poisoned = cifar_network(width, device).eval()
    x = torch.rand(batch_size, 3, 32, 32).to(device, memory_format=torch.channels_last)

    # Batch-norm statistics of these images instead of 0 and 1.
    with torch.no_grad():
        for _ in range(20):
            poisoned.train()(x)
    poisoned.eval()

    model = copy.deepcopy(poisoned)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    y = poisoned(x).argmax(1)

    plain, plain_reference = (
        copy.deepcopy(net).to(memory_format=torch.contiguous_format) for net in (model, poisoned)
    )
    step = published.sau_step(plain, plain_reference)
    return partial(step, x.contiguous(), y), _lean_sau(model, poisoned, x, y, device, precision)


def _lean_sau(
    model: nn.Module,
    poisoned: nn.Module,
    x: Tensor,
    y: Tensor,
    device: torch.device,
    precision: Exact,
) -> Work:
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


def _memory(width: int, options: argparse.Namespace) -> Row:
    """Compare the peak memory of a step above that of models and images."""
    peaks = []
    for side in (0, 1):
        with fresh_process() as process:
            peaks.append(
                process.submit(_peak, side, width, options.batch_size, options.device).result()
            )

    slow, fast = peaks
    detail = (
        f"{slow / 1e6:,.0f} and {fast / 1e6:,.0f} MB above the models and images, batches of"
        f" {options.batch_size}"
    )
    return Row(
        f"SAU peak memory, lean / published, width {width}",
        "-",
        (fast / slow,),
        percent=True,
        detail=detail,
    )


def _peak(side: int, width: int, batch_size: int, device_name: str) -> int:
    device = choose_device(device_name)
    step = sau_steps(width, batch_size, device, "fp32")[side]
    before = peak_memory(device)
    step()
    return peak_memory(device) - before


def _dau(width: int, options: argparse.Namespace, device: torch.device) -> Row:
    """Time DAU's anti-learning.

    Ours trains several heads on features that are computed once; the port trains one head behind
    the whole network.
    """
    count = 10 * options.batch_size
    x = torch.randint(
        0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    split, pool = Split(x, torch.arange(count) % CLASSES), torch.arange(count) % 100 == 0
    seed_everything(0, device)
    model = cifar_network(width, device)
    plain: Any = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    config, run = dau.Config(), Run(Path(), seed=0, device=device)

    def ours() -> None:
        anti_learn(
            extract(model, to_device(split, device), run),
            pool,
            model.get_classifier(),
            config.beta1,
            config,
            run,
        )

    work = partial(
        published.anti_learning,
        plain,
        plain.get_classifier(),
        split,
        pool,
        config.head_epochs,
        options.batch_size,
        options.workers,
    )
    pairs = measure.in_turn(work, ours, device, max(2, options.repetitions // 2))
    slow, fast = medians(pairs)
    return Row(
        f"DAU anti-learning, port / ours, width {width}",
        "-",
        tuple(a / b for a, b in pairs),
        detail=f"{slow:.1f} and {fast:.1f} s for {count:,} images; {config.heads} heads",
    )


def _ibau(width: int, options: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Time a round of I-BAU on one batch, for which both sides find the same delta.

    K = 5 is the published number of Hessian products; K = 0 leaves the implicit term out.
    """
    size = options.batch_size
    x = torch.randint(
        0, 256, (size, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    trusted = Split(x, torch.arange(size) % CLASSES)
    seed_everything(0, device)
    model = cifar_network(width, device).eval()
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    stream = DataLoader(published.Images(trusted), size)
    view = DefenderView("", CLASSES, (3, 32, 32), (), Augment(), dict(model=model, trusted=trusted))
    habits = dict(
        n_rounds=1,
        batch_size=size,
        projected=False,
        clip_box=False,
        solver="fixed_point",
        quirks=True,
    )
    found = []

    def ours(K: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            log = ScoreLog()
            run = Run(Path(folder), seed=0, device=device, callbacks=log.callbacks())
            ibau.defend(view, ibau.Config(K=K, **habits), run)
            found.append(log.history[0]["delta"])

    # Both sides must find the same delta.
    theirs = partial(published.ibau_round, copy.deepcopy(plain), stream, (3, 32, 32))
    wanted = theirs()
    ours(5)
    apart = abs(found[0] - wanted) / wanted

    for K in (5, 0):
        pairs = [
            (
                measure.timed(
                    partial(published.ibau_round, copy.deepcopy(plain), stream, (3, 32, 32)), device
                )[0],
                measure.timed(partial(ours, K), device)[0],
            )
            for _ in range(options.repetitions)
        ]
        slow, fast = medians(pairs)
        yield Row(
            f"I-BAU published / ours, K = {K}, width {width}",
            "-" if K else ">= 2.5",
            tuple(a / b for a, b in pairs),
            detail=(
                f"{slow:.1f} and {fast:.1f} s a round of one batch; relative difference of |delta|"
                f" {apart:.1e}"
            ),
        )


def _asd(width: int, options: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Measure ASD's training in images per second.

    At the start, when the clean pool is the seeds, and later, when it is half of the set.
    """
    seed_everything(0, device)
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (50_000, 3, 32, 32), generator=draws, dtype=torch.uint8)
    split = Split(images, torch.arange(len(images)) % CLASSES)
    array, labels = images.permute(0, 2, 3, 1).contiguous().numpy(), split.labels.numpy()
    model = cifar_network(width, device).train()
    conventional = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    view = DefenderView("", CLASSES, (3, 32, 32), (), Augment(4, True), {})
    placed = to_device(split, device)
    for pool, size in (("100 seeds", 100), ("half of the set", 25_000)):
        clean = torch.zeros(len(split), dtype=torch.bool)
        clean[torch.randperm(len(split), generator=draws)[:size]] = True
        steps = options.asd_iterations
        config, run = (
            asd.Config(iterations=steps, batch_size=64),
            Run(Path(), seed=0, device=device),
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
        # The number of steps is that of a whole run, so that graphs are captured as there.
        forward = Forward(
            model.train(), run, placed, 120 * 1024, 2 * config.batch_size, 3 * config.batch_size
        )

        def ours(
            clean: Tensor = clean,
            config: Any = config,
            run: Run = run,
            optimizer: Any = optimizer,
            forward: Any = forward,
        ) -> None:
            for x, u1, u2 in asd.triples(placed, clean, view, config, run):
                run.step(
                    optimizer, asd.mixmatch(forward, model, x, u1, u2, 1.0, CLASSES, config, run)
                )

        theirs = partial(
            published.asd_epoch,
            conventional,
            array,
            labels,
            clean.numpy(),
            steps,
            64,
            options.workers,
            CLASSES,
        )
        pairs = measure.in_turn(theirs, ours, device, max(2, options.repetitions // 2))
        slow, fast = (3 * 64 * steps / seconds for seconds in medians(pairs))
        yield Row(
            f"ASD published / ours, width {width}, {pool}",
            ">= 3",
            tuple(a / b for a, b in pairs),
            detail=(
                f"{slow:,.0f} and {fast:,.0f} images/s over {steps} steps with the start of the"
                f" epoch; {options.workers} loader workers"
            ),
        )


def _bu(options: argparse.Namespace, device: torch.device) -> Row:
    """Time a step of BU's trigger recovery for ten classes: one after another, and batched."""
    seed_everything(0, device)
    model = cifar_network(16, device).eval()
    x, y = (
        torch.rand(32, 3, 32, 32).to(device, memory_format=torch.channels_last),
        (torch.arange(32) % CLASSES).to(device),
    )
    config, run = bu.Config(), Run(Path(), seed=0, device=device)

    def recovery(count: int) -> Callable[[Tensor], None]:
        generators, mine = (
            mesa.Generators(count, 27, config.hidden).to(device),
            Mine(count, 64, 27, config.hidden).to(device),
        )
        places = mesa.Places(count, (32, 32), 3, config).to(device)
        optimizers = [
            torch.optim.Adam(net.parameters(), lr=config.search_lr) for net in (generators, mine)
        ]

        def step(classes: Tensor) -> None:
            z, other = torch.rand(2, count, len(x), 64, device=device)
            triggers = generators(z)

            # Pull the triggers towards the target; keep their mutual information with the noise.
            _, pull = mesa.reward(
                model,
                x,
                y,
                triggers,
                places,
                classes,
                torch.full((count,), 0.9, device=device),
                (3, 3, 3),
                config,
                run,
            )
            run.step(
                optimizers[0],
                -(pull * triggers).sum() - 0.1 * mine.information(z, other, triggers).sum(),
            )

            # Train the estimator of the mutual information.
            run.step(optimizers[1], mine.loss(z, other, triggers.detach()))

        return step

    classes = torch.arange(CLASSES, device=device)
    together, alone = recovery(CLASSES), recovery(1)

    def one_by_one() -> None:
        for label in classes:
            alone(label[None])

    with frozen(model):
        together(classes)
        one_by_one()
        pairs = measure.in_turn(one_by_one, partial(together, classes), device, options.repetitions)
    slow, fast = medians(pairs)
    return Row(
        "BU recovery, one by one / side by side",
        "-",
        tuple(a / b for a, b in pairs),
        detail=f"{1000 * slow:.0f} and {1000 * fast:.0f} ms for ten classes",
    )


def _options() -> argparse.Namespace:
    parser = measure.options(__doc__)
    parser.add_argument(
        "--width",
        type=int,
        nargs="+",
        default=[16, 64],
        help="channels of PreAct-ResNet18's first stage",
    )
    parser.add_argument("--batch-size", "--batch_size", type=int, default=256)
    parser.add_argument(
        "--asd-iterations",
        "--asd_iterations",
        type=int,
        default=10,
        help="steps of ASD's part of an epoch",
    )
    parser.add_argument(
        "--workers", type=int, default=4, help="loader workers of the published ASD"
    )
    parser.add_argument("--memory", action="store_true", help="measure peak memory, too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
