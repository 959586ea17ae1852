"""Images as bytes in one tensor, and the one way from there to a model: `batches()`."""

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UserError

AHEAD = 3
"""Batches that a thread fetches in advance, where images do not lie on the device already."""


@dataclass(frozen=True)
class Split:
    """images: uint8 (N, C, H, W); labels: int64 (N,). Both may live on a GPU or in host memory."""

    images: Tensor
    labels: Tensor
    file: Path | None = None
    """The .npy file of which `images` is a private memory map: only what is read takes memory, and
    what is written stays out of the file."""

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Tensor) -> "Split":
        """The rows of `index` (int64), copied."""
        index = index.to(self.images.device)
        return Split(self.images[index], self.labels[index.to(self.labels.device)])

    def copy(self) -> "Split":
        """The same rows, free to be written. Of a memory map another one: only the rows that are
        written take memory."""
        return Split(
            self.images.clone() if self.file is None else mapped(self.file),
            self.labels.clone(),
            self.file,
        )


def mapped(file: Path) -> Tensor:
    """The array of a .npy file, read where it is used; writing changes this view alone."""
    return torch.from_numpy(np.load(file, mmap_mode="c"))


@dataclass(frozen=True)
class Dataset:
    """A named data set: clean training and test images, class names, and a fingerprint of every
    byte."""

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    fingerprint: str

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


@dataclass(frozen=True)
class Augment:
    """What a training batch goes through, drawn anew for every image."""

    crop_padding: int = 0
    """Zero padding before a random crop back to size, in pixels; 0 leaves images in place."""
    flip: bool = False
    """Mirror half of the images."""


NO_AUGMENT = Augment()


@dataclass(frozen=True)
class Batch:
    images: Tensor
    """float32 (B, C, H, W) in [0, 1], on the device, channels_last."""
    labels: Tensor
    """int64 (B,), on the device."""
    index: Tensor
    """int64 (B,), on the device: positions in the split."""


def to_device(split: Split, device: torch.device) -> Split:
    """Move a split to the device where it takes less than half of what is free there; else leave it
    in host memory."""
    if device.type != "cuda":
        return split
    free, _ = torch.cuda.mem_get_info(device)
    if split.images.nbytes > free // 2:
        return split
    return Split(split.images.to(device), split.labels.to(device))


def batches(
    split: Split,
    batch_size: int,
    *,
    device: torch.device,
    generator: torch.Generator | None = None,
    augment: Augment = NO_AUGMENT,
    drop_last: bool = False,
    order: Tensor | None = None,
) -> Iterator[Batch]:
    """One pass over a split.

    With a `generator` the order is shuffled and each image augmented on its own, all draws of the
    pass coming from it at once; without one, images come in order and as they are. `order` (int64,
    any length, repeats allowed) replaces the shuffle, for methods with a sampler of their own.
    `drop_last` leaves out a last, smaller batch, unless it is the only one. A last batch of a
    single image joins the one before where images are shuffled: batch normalisation needs two.
    """
    if augment != NO_AUGMENT and generator is None:
        raise ValueError("augmentation needs a generator")
    if order is None:
        order = (
            torch.arange(len(split))
            if generator is None
            else torch.randperm(len(split), generator=generator)
        )
    count = len(order)
    padding = augment.crop_padding
    moves = flips = None
    if padding and generator is not None:
        moves = torch.randint(0, 2 * padding + 1, (2, count), generator=generator).to(device)
    if augment.flip and generator is not None:
        flips = (torch.rand(count, generator=generator) < 0.5).to(device)
    order = order.to(split.images.device)
    ends = list(range(batch_size, count + 1, batch_size))
    if not ends or (count > ends[-1] and not drop_last):
        ends.append(count)
    if generator is not None and len(ends) > 1 and ends[-1] - ends[-2] == 1 < batch_size:
        del ends[-2]
    pieces = [slice(begin, end) for begin, end in itertools.pairwise([0, *ends])]
    far = device.type == "cuda" and split.images.device.type == "cpu"
    for here, (index, images, labels) in zip(
        pieces, _fetched(split, [order[here] for here in pieces], far), strict=True
    ):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        if moves is not None:
            images = _crop(images, moves[0, here], moves[1, here], padding)
        if flips is not None:
            # Whole images are picked out of both; torch.where would go byte by byte.
            either = torch.cat([images, images.flip(3)])
            images = either.index_select(
                0, torch.arange(len(images), device=device) + len(images) * flips[here]
            )
        yield Batch(to_float(images), labels, index.to(device, non_blocking=True))


def in_order(split: Split, device: torch.device) -> Iterator[Batch]:
    """One pass over a split as it is, in batches of a size that suits models without gradients."""
    return batches(split, 1000 if device.type == "cuda" else 250, device=device)


def _fetched(
    split: Split, wanted: list[Tensor], far: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """index, images and labels of each batch; from a file or for another device ahead of time,
    there in memory that it copies from by itself."""
    if not far and split.file is None:
        return (
            (index, split.images.index_select(0, index), split.labels[index]) for index in wanted
        )
    images = split.images.numpy()

    def fetch(index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # By numpy: torch would open a second set of threads here, which wait for work at the
        # expense of the model's.
        found = torch.from_numpy(images[index.numpy()])
        return index, found.pin_memory() if far else found, split.labels[index]

    return _in_advance(fetch, wanted)


def _in_advance(
    fetch: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], wanted: list[Tensor]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """map(fetch, wanted), in the same order, AHEAD of them at work in a thread."""
    waiting: deque[Future[tuple[Tensor, Tensor, Tensor]]] = deque()
    with ThreadPoolExecutor(1) as thread:
        for index in wanted:
            waiting.append(thread.submit(fetch, index))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def to_float(images: Tensor) -> Tensor:
    """uint8 (B, C, H, W) -> float32 in [0, 1], channels_last."""
    out = torch.empty_like(images, dtype=torch.float32, memory_format=torch.channels_last)
    # Runs of H * W pixels; one copy of everything would make runs of C
    for channel in range(images.shape[1]):
        out[:, channel] = images[:, channel]
    return out.div_(255)


def to_bytes(images: Tensor) -> Tensor:
    """float (B, C, H, W) in [0, 1] -> uint8, rounded to nearest and clipped, never wrapped."""
    return images.mul(255).round_().clamp_(0, 255).to(torch.uint8)


def _crop(images: Tensor, down: Tensor, right: Tensor, padding: int) -> Tensor:
    """Shift each image by its own draw in [0, 2 padding] inside a zero frame."""
    frame = F.pad(images, [padding] * 4)
    image, channel, row, pixel = frame.stride()
    # One view of all windows, numbered by where their corner lies in memory: index_select copies
    # whole rows out of it,
    # advanced indexing would go byte by byte.
    corners = torch.arange(len(images), device=images.device) * image + down * row + right * pixel
    last = (len(images) - 1) * image + 2 * padding * (row + pixel)
    return frame.as_strided((last + 1, *images.shape[1:]), (1, channel, row, pixel)).index_select(
        0, corners
    )


def trusted_index(
    size: int, *, ratio: float, count: int | None, generator: torch.Generator
) -> Tensor:
    """Positions of the trusted images in a clean training set of `size`, drawn uniformly without
    replacement: `count`, or floor(ratio * size)."""
    if count is None:
        if not 0 < ratio <= 1:
            raise UserError(f"trusted_ratio must lie in (0, 1], got {ratio}")
        count = int(ratio * size)
    if not 0 < count <= size:
        raise UserError(
            f"the trusted set needs between 1 and {size} images, got {count}: change"
            " --trusted_ratio or --trusted_count"
        )
    return torch.randperm(size, generator=generator)[:count].sort().values


def fingerprint(train: Split, test: Split, class_names: tuple[str, ...]) -> str:
    """SHA-256 over shapes, pixels, labels and class names: equal only for the same data in the same
    order."""
    digest = hashlib.sha256()
    for split in (train, test):
        digest.update(repr(tuple(split.images.shape)).encode())
        digest.update(split.images.numpy().data.cast("B"))
        digest.update(split.labels.numpy().data.cast("B"))
    digest.update("\0".join(class_names).encode())
    return digest.hexdigest()


def channel_statistics(split: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel in [0, 1] units, over at most 10,000 evenly
    spaced images."""
    step = max(1, len(split) // 10_000)
    images = split.images[::step].to(torch.float32).div(255)
    mean, std = images.mean(dim=(0, 2, 3)), images.std(dim=(0, 2, 3)).clamp_min(1e-3)
    return tuple(round(value, 4) for value in mean.tolist()), tuple(
        round(value, 4) for value in std.tolist()
    )
