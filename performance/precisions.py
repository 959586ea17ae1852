"""Training steps in the precision that `--precision auto` picks, against the other precision.

    python performance/precisions.py [--batch_size 128] [--threads N]

It also prints how long picking takes. The cache folder is neither read nor written: every network
is measured anew.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from functools import partial

import torch
from measure import Row, busy, describe_machine, in_turn, options, report, training_step

from backdoorlab.device import Exact, choose_device, keep_freed_memory
from backdoorlab.execution.precision import WORTH_IT, measure
from backdoorlab.models import build

SHAPE = (3, 32, 32)


def main() -> None:
    given = _options()
    device = choose_device(given.device)
    if given.threads:
        torch.set_num_threads(given.threads)
    keep_freed_memory(device)
    header = describe_machine(
        device, caution="the machine is busy" if busy() else "none", batch=str(given.batch_size)
    )
    report(header, _rows(given.batch_size, device, given.repetitions), given.json)


def _rows(batch_size: int, device: torch.device, repetitions: int) -> Iterator[Row]:
    images = torch.rand(batch_size, *SHAPE, device=device).to(memory_format=torch.channels_last)
    labels = torch.arange(batch_size, device=device) % 10
    for name in ("preactresnet10", "preactresnet18"):
        for width in (8, 16, 64):
            new = partial(
                build,
                name,
                num_classes=10,
                in_chans=SHAPE[0],
                mean=[0.5] * 3,
                std=[0.25] * 3,
                width=width,
            )

            # What a run does where nothing was measured before.
            began = time.perf_counter()
            found = measure(new(), SHAPE)
            seconds = time.perf_counter() - began
            picked: Exact = "bf16" if found.ratio < WORTH_IT else "fp32"

            # The steps of a training, in both precisions.
            pair = {
                precision: training_step(new().to(device), batch_size, device, precision)
                for precision in ("bf16", "fp32")
            }
            works = {precision: partial(step, images, labels) for precision, step in pair.items()}
            for work in works.values():
                work()
            times = in_turn(works["fp32"], works["bf16"], device, repetitions)
            ratios = [fp32 / bf16 if picked == "fp32" else bf16 / fp32 for fp32, bf16 in times]
            fp32, bf16 = (1000 * statistics.median(column) for column in zip(*times, strict=True))
            detail = (
                f"{picked}, found in {seconds:.2f} s ({found.describe()}, {found.images} images); a"
                f" step {fp32:.0f} ms in fp32, {bf16:.0f} in bf16"
            )
            yield Row(
                f"picked / other, {name} width {width}", "<= 1.05", tuple(ratios), detail=detail
            )


def _options() -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own number")
    return parser.parse_args()


if __name__ == "__main__":
    main()
