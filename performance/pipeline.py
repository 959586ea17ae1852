"""How fast images reach the model, and what a training step costs.

    python performance/pipeline.py [--dataset cifar10 --dataset_path FOLDER] [--json FILE]

  1. `batches()` with random crops, flips, scaling and the model's normalisation, against a torch
     DataLoader over PIL images
  2. data handling as a share of a training step at width 16
  3. a training step in bf16 against fp32 at width 64
  4. training steps on images that stay in a file, against the same images in memory
  5. a training step that returns freed memory to the system, against one that keeps it, each in a
     process of its own

Each row shows its goal; nothing is asserted, since timings depend on the machine. The two sides of
every ratio are measured alternately, so that other load affects both. The table shows the median
and the range of these ratios. A DataLoader's first batches, and with them the start of its workers,
are left out of its rate. Measure on an idle machine, with as many threads as workers: if cores are
short, the workers are slowed down more than our side.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from measure import (
    Row,
    busy,
    describe_machine,
    fast_bf16,
    fresh_process,
    medians,
    report,
    timed,
    training_step,
)
from published import Images
from torch import Tensor, nn
from torch.utils.data import DataLoader

from backdoorlab.data import Augment, Batch, Split, batches, channel_statistics, mapped, to_device
from backdoorlab.datasets import cache
from backdoorlab.datasets.load import find as find_dataset
from backdoorlab.datasets.load import load as load_dataset
from backdoorlab.device import Exact, choose_device, keep_freed_memory, seed_everything
from backdoorlab.errors import UserError
from backdoorlab.models import Classifier, build

BATCH = 128
AUGMENT = Augment(crop_padding=4, flip=True)
CIFAR_SHAPE = (50_000, 3, 32, 32)


class Nothing(nn.Module):
    """A network that returns its input, so that a Classifier is its normalisation only."""

    def forward_features(self, x: Tensor) -> Tensor:
        return x


def main() -> None:
    options = _options()
    device = choose_device(options.device)
    seed_everything(0, device)
    split, source = _data(options.dataset, options.dataset_path)
    caution = "the machine is busy: row 1 with 2 workers favours our side" if busy() else "none"
    header = describe_machine(
        device,
        data=source,
        caution=caution,
        pairs=f"{options.repetitions} of each comparison, batches of {BATCH}",
    )
    report(header, _rows(split, device, options.repetitions, options.force_bf16), options.json)


def _rows(split: Split, device: torch.device, repetitions: int, force_bf16: bool) -> Iterator[Row]:
    mean, std = channel_statistics(split)
    yield from _data_path(split, device, mean, std, repetitions)
    yield _data_share(split, device, mean, std, repetitions)
    yield _bf16(split, device, mean, std, force_bf16)
    yield _from_file(split, device, mean, std, repetitions)
    yield _kept_memory(device, repetitions)


def _data_path(
    split: Split,
    device: torch.device,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    repetitions: int,
) -> Iterator[Row]:
    count = min(len(split), 50 * BATCH)
    images = Images(split.subset(torch.arange(count)), AUGMENT, (mean, std))
    ours = to_device(split, device)
    layer0 = Classifier(Nothing(), mean, std).to(device)

    def our_rate() -> float:
        seconds, seen = 0.0, 0
        while seconds < 0.5:  # one pass is too short to be timed
            pass_seconds, pass_seen = timed(
                lambda: _normalised(_our_batches(ours, device), layer0), device
            )
            seconds, seen = seconds + pass_seconds, seen + pass_seen
        return seen / seconds

    def loader_rate(workers: int) -> tuple[float, float]:
        """Return images per second after the first batches, and seconds up to the first one."""
        prefetch = 2  # batches per worker, torch's default
        loader = DataLoader(
            images,
            BATCH,
            shuffle=True,
            num_workers=workers,
            drop_last=True,
            pin_memory=device.type == "cuda",
        )
        begin = time.perf_counter()
        stream = iter(loader)
        next(stream)
        first = time.perf_counter() - begin

        # Batches that were made before the clock starts would cost nothing.
        for _ in range(workers * prefetch):
            next(stream)
        seconds, seen = timed(lambda: _moved(stream, device), device)
        return seen / seconds, first

    # Both sides alternately, after one pass to warm up.
    our_rate()
    rates: dict[int, list[tuple[float, float, float]]] = {2: [], 0: []}
    for _ in range(repetitions):
        for workers, found in rates.items():
            found.append((our_rate(), *loader_rate(workers)))

    for workers, found in rates.items():
        a, b, first = medians(found)
        yield Row(
            f"1. batches() / DataLoader, {workers} workers",
            ">= 8" if workers else "-",
            tuple(rate / loader for rate, loader, _ in found),
            detail=(
                f"{a:,.0f} and {b:,.0f} images/s; DataLoader's first batch takes {first:.2f} s, not"
                " counted"
            ),
        )


def _our_batches(split: Split, device: torch.device) -> Iterator[Batch]:
    return batches(
        split,
        BATCH,
        device=device,
        generator=torch.Generator().manual_seed(0),
        augment=AUGMENT,
        drop_last=True,
    )


def _endless(split: Split, device: torch.device) -> Iterator[Batch]:
    while True:
        yield from _our_batches(split, device)


def _seconds_each(call: Callable[[], object], times: int, device: torch.device) -> float:
    """Time a call as the mean over `times` of them, one after the other."""

    def work() -> None:
        for _ in range(times):
            call()

    return timed(work, device)[0] / times


@torch.no_grad()
def _normalised(stream: Iterator[Batch], layer0: Classifier) -> int:
    seen = 0
    for batch in stream:
        seen += len(layer0.forward_features(batch.images))
    return seen


def _moved(stream: Iterator[Any], device: torch.device) -> int:
    seen = 0
    for images, labels in stream:
        seen += len(images.to(device, non_blocking=True))
        labels.to(device, non_blocking=True)
    return seen


def _data_share(
    split: Split,
    device: torch.device,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    repetitions: int,
) -> Row:
    """Compare the time to fetch a batch with that of the whole step.

    Normalisation belongs to the model here, as in training.
    """
    steps = 50 if device.type == "cuda" else 5
    source = to_device(split, device)
    step = _training_step(16, split, mean, std, device, "bf16" if fast_bf16(device) else "fp32")
    count = max(len(source) // BATCH, 1) * BATCH
    stream = _endless(Split(source.images[:count], source.labels[:count]), device)

    def train() -> float:
        return _seconds_each(lambda: step(next(stream)), steps, device)

    def fetch() -> float:
        # One batch is too short to be timed.
        return _seconds_each(lambda: next(stream), 10 * steps, device)

    train()
    pairs = [(fetch(), train()) for _ in range(repetitions)]
    data, whole = medians(pairs)
    return Row(
        "2. data / training step, width 16",
        "<= 10 %",
        tuple(fetching / training for fetching, training in pairs),
        percent=True,
        detail=f"{1000 * data:.2f} and {1000 * whole:.2f} ms a step",
    )


def _from_file(
    split: Split,
    device: torch.device,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    repetitions: int,
) -> Row:
    """Compare training at width 16 from a file in the page cache with training from memory."""
    steps = 200 if device.type == "cuda" else 10
    step = _training_step(16, split, mean, std, device, "bf16" if fast_bf16(device) else "fp32")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "images.npy"
        np.save(file, split.images.cpu().numpy())
        sources = [
            to_device(Split(split.images, split.labels), device),
            Split(mapped(file), split.labels, file),
        ]

        def rate(source: Split) -> float:
            stream = _endless(source, device)
            step(next(stream))
            return BATCH / _seconds_each(lambda: step(next(stream)), steps, device)

        pairs = [(rate(sources[0]), rate(sources[1])) for _ in range(repetitions)]
        sources.clear()

    resident, from_file = medians(pairs)
    return Row(
        "4. training from a file / from memory, width 16",
        ">= 85 %",
        tuple(b / a for a, b in pairs),
        percent=True,
        detail=f"{from_file:,.0f} and {resident:,.0f} images/s",
    )


def _bf16(
    split: Split, device: torch.device, mean: tuple[float, ...], std: tuple[float, ...], force: bool
) -> Row:
    name, goal = "3. fp32 step / bf16 step, width 64", ">= 1.8"
    if not fast_bf16(device) and not force:
        return Row(
            name,
            goal,
            detail=f"bfloat16 is not fast on this {device.type}; --force-bf16 measures it anyway",
        )
    steps, repetitions = (30, 5) if device.type == "cuda" else (1, 3)
    precisions: tuple[Exact, Exact] = ("fp32", "bf16")
    batch = next(_our_batches(to_device(split, device), device))
    single, half = (
        _training_step(64, split, mean, std, device, precision) for precision in precisions
    )

    def seconds(step: Callable[[Batch], None]) -> float:
        return _seconds_each(lambda: step(batch), steps, device)

    single(batch), half(batch)  # the first step selects kernels
    pairs = [(seconds(single), seconds(half)) for _ in range(repetitions)]
    slow, fast = medians(pairs)
    return Row(
        name,
        goal,
        tuple(a / b for a, b in pairs),
        detail=f"{1000 * slow:.1f} and {1000 * fast:.1f} ms a step",
    )


def _kept_memory(device: torch.device, repetitions: int) -> Row:
    name = "5. memory returned / kept, step at width 16"
    if device.type != "cpu":
        return Row(name, "-", detail="torch keeps a GPU's memory by itself")
    with fresh_process() as returning, fresh_process() as keeping:
        pairs = [
            (
                returning.submit(_seconds_a_step, False).result(),
                keeping.submit(_seconds_a_step, True).result(),
            )
            for _ in range(repetitions)
        ]
    slow, fast = medians(pairs)
    return Row(
        name,
        "-",
        tuple(a / b for a, b in pairs),
        detail=f"{1000 * slow:.0f} and {1000 * fast:.0f} ms a step",
    )


def _seconds_a_step(keep: bool, steps: int = 8) -> float:
    """Time a training step; in a process of its own, since malloc's settings cannot be undone."""
    device = torch.device("cpu")
    if keep:
        keep_freed_memory(device)
    split = Split(
        torch.randint(0, 256, (BATCH, *CIFAR_SHAPE[1:]), dtype=torch.uint8),
        torch.arange(BATCH) % 10,
    )
    step, batch = (
        _training_step(16, split, (0.5,) * 3, (0.25,) * 3, device, "fp32"),
        next(_our_batches(split, device)),
    )
    step(batch)
    return _seconds_each(lambda: step(batch), steps, device)


def _training_step(
    width: int,
    split: Split,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device,
    precision: Exact,
) -> Callable[[Batch], None]:
    _, channels, height, _ = split.images.shape
    classes = int(split.labels.max()) + 1
    model = (
        build(
            "preactresnet18",
            num_classes=classes,
            in_chans=channels,
            mean=mean,
            std=std,
            width=width,
            image_size=height,
        )
        .to(device)
        .train()
    )

    step = training_step(model, BATCH, device, precision)
    return lambda batch: step(batch.images, batch.labels)


def _data(name: str, path: str | None) -> tuple[Split, str]:
    """Return training images from `path`, else from the cache, else synthetic ones.

    Nothing is downloaded.

    Args:
        name: data set.
        path: its folder, or None.

    Returns:
        The images, and where they come from.
    """
    if path is not None:
        return load_dataset(name, path).train, f"{name}, from --dataset-path"

    for entry in cache.cached():
        if entry.get("name") == name:
            try:
                found = find_dataset(name, entry["fingerprint"])
            except (KeyError, UserError):
                continue
            return found.train, f"{name}, from the cache"
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, CIFAR_SHAPE, generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, CIFAR_SHAPE[:1], generator=generator)
    return (
        Split(images, labels),
        (
            f"synthetic bytes in the shape of CIFAR-10 ({name} is not in the cache and no path was"
            " given)"
        ),
    )


def _options() -> argparse.Namespace:
    parser = measure.options(__doc__)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument(
        "--dataset-path",
        "--dataset_path",
        default=None,
        help="parquet shards or train/<class>/*.png",
    )
    parser.add_argument(
        "--force-bf16",
        "--force_bf16",
        action="store_true",
        help="measure row 3 even if bfloat16 is slow here",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
