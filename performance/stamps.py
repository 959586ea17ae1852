"""Seconds to stamp a training set of CIFAR-10's size, for every trigger that needs no network, and
how visible the trigger is on these images (PSNR).

python performance/stamps.py [--dataset-path FOLDER] [--repetitions N] [--json FILE]
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import measure
import torch
from measure import Row, busy, describe_machine, report, timed

from backdoorlab.data import Dataset, Split
from backdoorlab.datasets.load import load as load_dataset
from backdoorlab.poison import Labels, Poison, poison_train, psnr
from backdoorlab.settings import methods

GOAL = 10.0
"""Seconds."""
CPU = torch.device("cpu")


def main() -> None:
    parser = measure.options(__doc__)
    parser.add_argument(
        "--dataset-path",
        "--dataset_path",
        default=None,
        help="CIFAR-10 as parquet shards or train/<class>/*.png; else made-up bytes",
    )
    options = parser.parse_args()

    dataset = (
        _made_up()
        if options.dataset_path is None
        else load_dataset("cifar10", options.dataset_path)
    )
    caution = "the machine is busy: seconds are longer than on an idle one" if busy() else "none"
    header = describe_machine(
        CPU,
        data=f"{len(dataset.train):,} images {dataset.image_shape}, {dataset.name}",
        caution=caution,
    )
    report(header, _rows(dataset, options.repetitions), options.json)


def _rows(dataset: Dataset, repetitions: int) -> Iterator[Row]:
    for name in methods.available("attack"):
        method = methods.load("attack", name)

        # A trigger with `prepare` comes from a network; only refool's are images of the set.
        if method.function("stamp") is None or (
            method.function("prepare") is not None and name != "refool"
        ):
            continue

        variants: list[dict[str, Any]] = [{}]
        if name == "ibau_triggers":
            variants = [{"trigger": trigger} for trigger in method.module.TRIGGERS]

        for values in variants:
            work = partial(_stamp_all, dataset, method.module, method.config_class(**values))
            begin = time.process_time()
            found = [timed(work, CPU) for _ in range(repetitions)]
            spent = (time.process_time() - begin) / repetitions
            visible = psnr(dataset.train, found[0][1])
            yield Row(
                " ".join([name, *values.values()]),
                f"<= {GOAL:.0f} s",
                tuple(seconds for seconds, _ in found),
                detail=f"{spent:.2f} s of the processor; PSNR {visible:.1f} dB",
            )


def _stamp_all(dataset: Dataset, module: Any, config: Any) -> Poison:
    """Stamp every training image, as an attack with a poison rate of 1 does."""
    prepare: Callable[..., dict[str, Any]] | None = getattr(module, "prepare", None)
    stamp = partial(
        module.stamp, config=config, **(prepare(dataset, config, None) if prepare else {})
    )
    return poison_train(
        dataset.train, stamp, Labels(0, "all2one", 10), poison_rate=1.0, generator=torch.Generator()
    )


def _made_up() -> Dataset:
    """Return random images of CIFAR-10's size."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (50_000, 3, 32, 32), generator=generator, dtype=torch.uint8)
    split = Split(images, torch.arange(50_000) % 10)
    return Dataset(
        "made-up bytes", split, split.subset(torch.arange(10)), tuple(map(str, range(10))), ""
    )


if __name__ == "__main__":
    main()
