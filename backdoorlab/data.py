"""Images as bytes in one tensor; `batches()` is the only way from them to a model."""

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UserError

Border = Literal["zero", "reflect"]
AHEAD = 3
"""Batches that a thread fetches in advance, for images that are not on the device already."""


@dataclass(frozen=True)
class Split:
    """Images and labels of a training or test set, on a GPU or in host memory."""

    images: Tensor
    """uint8 (N, C, H, W)."""
    labels: Tensor
    """int64 (N,)."""
    file: Path | None = None
    """The .npy file of which `images` is a private memory map, if any. Only rows that are read take
    memory, and changes do not reach the file."""

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Tensor) -> "Split":
        """Copy the rows of `index`, int64 (M,)."""
        index = index.to(self.images.device)
        return Split(self.images[index], self.labels[index.to(self.labels.device)])

    def copy(self) -> "Split":
        """Return a copy that may be changed.

        The copy of a memory map is another memory map, so only rows that are changed take memory.
        """
        images = self.images.clone() if self.file is None else mapped(self.file)
        return Split(images, self.labels.clone(), self.file)


def mapped(file: Path) -> Tensor:
    """Memory-map a .npy file; changes stay in memory and do not reach the file."""
    return torch.from_numpy(np.load(file, mmap_mode="c"))


@dataclass(frozen=True)
class Dataset:
    """A named data set of clean images."""

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    fingerprint: str
    """SHA-256 of pixels, labels and class names."""
    notes: tuple[str, ...] = ()
    """Sentences on how the images were read, such as what was left out."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


@dataclass(frozen=True)
class Augment:
    """Augmentation of training batches, drawn anew for every image."""

    crop_padding: int = 0
    """Padding before a random crop back to size, in pixels; 0 leaves images in place."""
    flip: bool = False
    """Mirror half of the images."""
    border: Border = "zero"
    """What lies around an image in a crop: zeros, or its own mirror image (reflect)."""


NO_AUGMENT = Augment()


@dataclass(frozen=True)
class Batch:
    """Images of one step, on the device."""

    images: Tensor
    """float32 (B, C, H, W) in [0, 1], channels_last."""
    labels: Tensor
    """int64 (B,)."""
    index: Tensor
    """int64 (B,), positions in the split."""


def to_device(split: Split, device: torch.device) -> Split:
    """Move a split to the device if it takes less than half of the free memory there."""
    if device.type != "cuda":
        return split
    # The other half is left to the model and its activations.
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
    mirrored: Tensor | None = None,
) -> Iterator[Batch]:
    """Iterate once over a split in batches; an empty split has none.

    All random numbers of the pass are drawn at its start.

    Args:
        split: N images.
        batch_size: images per batch. A last batch of a single image joins the one before if images
            are shuffled, because batch normalisation needs two.
        device: where the batches go.
        generator: shuffles the images and augments each of them. None: in order, unchanged.
        augment: crops and mirroring; needs a generator.
        drop_last: leave out a last, smaller batch, unless it is the only one.
        order: int64 (M,), positions with repeats allowed, replaces the shuffle; for methods with a
            sampler of their own.
        mirrored: bool (N,), which images of the split are mirrored, in place of a draw.

    Returns:
        The batches, one after the other.
    """
    if augment != NO_AUGMENT and generator is None:
        raise ValueError("augmentation needs a generator")
    if order is None and generator is None:
        order = torch.arange(len(split))
    elif order is None:
        order = torch.randperm(len(split), generator=generator)

    # All draws of the pass, so that they do not depend on the batch size.
    count, padding = len(order), augment.crop_padding
    moves = flips = None
    if padding and generator is not None:
        moves = torch.randint(0, 2 * padding + 1, (2, count), generator=generator).to(device)
    if mirrored is not None:
        flips = mirrored[order.cpu()].to(device)
    elif augment.flip and generator is not None:
        flips = (torch.rand(count, generator=generator) < 0.5).to(device)

    # Images are fetched as bytes and become floats at the end, on the device.
    order = order.to(split.images.device)
    pieces = _pieces(count, batch_size, drop_last=drop_last, shuffled=generator is not None)
    far = device.type == "cuda" and split.images.device.type == "cpu"
    fetched = _fetched(split, [order[here] for here in pieces], far)
    for here, (index, images, labels) in zip(pieces, fetched, strict=True):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        if moves is not None:
            images = _crop(images, moves[0, here], moves[1, here], padding, augment.border)
        if flips is not None:
            images = _mirrored(images, flips[here])
        yield Batch(to_float(images), labels, index.to(device, non_blocking=True))


def _pieces(count: int, batch_size: int, *, drop_last: bool, shuffled: bool) -> list[slice]:
    """Cut `count` positions into batches, as `batches` describes; none for no position."""
    # Many networks cannot reshape a batch of no image, and there is nothing to ask them.
    if count == 0:
        return []

    ends = list(range(batch_size, count + 1, batch_size))
    if not ends or (count > ends[-1] and not drop_last):
        ends.append(count)
    if shuffled and len(ends) > 1 and ends[-1] - ends[-2] == 1 < batch_size:
        del ends[-2]
    return [slice(begin, end) for begin, end in itertools.pairwise([0, *ends])]


def _mirrored(images: Tensor, flips: Tensor) -> Tensor:
    """Mirror the images of `flips`, bool (B,). uint8 (B, C, H, W) -> same."""
    # Whole images are picked out of both versions; torch.where would go byte by byte.
    either = torch.cat([images, images.flip(3)])
    chosen = torch.arange(len(images), device=images.device) + len(images) * flips
    return either.index_select(0, chosen)


def in_order(split: Split, device: torch.device) -> Iterator[Batch]:
    """Iterate over a split in order, in large batches for models without gradients."""
    return batches(split, 1000 if device.type == "cuda" else 250, device=device)


def _fetched(
    split: Split, wanted: list[Tensor], far: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Fetch index, images and labels of each batch, ahead of time if that takes a while.

    Args:
        split: the images.
        wanted: int64 (B,), positions, for each batch.
        far: whether the images go to a GPU; then they are put into pinned memory.
    """
    if not far and split.file is None:
        return (
            (index, split.images.index_select(0, index), split.labels[index]) for index in wanted
        )
    images = split.images.numpy()

    def fetch(index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # By numpy: torch would start a second set of threads here, which take time from those of
        # the model.
        found = torch.from_numpy(images[index.numpy()])
        return index, found.pin_memory() if far else found, split.labels[index]

    return _in_advance(fetch, wanted)


def _in_advance(
    fetch: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], wanted: list[Tensor]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Return map(fetch, wanted), of which a thread computes AHEAD results in advance."""
    waiting: deque[Future[tuple[Tensor, Tensor, Tensor]]] = deque()
    with ThreadPoolExecutor(1) as thread:
        for index in wanted:
            waiting.append(thread.submit(fetch, index))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def to_float(images: Tensor) -> Tensor:
    """Convert bytes to [0, 1]. uint8 (B, C, H, W) -> float32 (B, C, H, W), channels_last."""
    out = torch.empty_like(images, dtype=torch.float32, memory_format=torch.channels_last)
    # Channel by channel the copy reads H W bytes in a row; at once it would read C in a row.
    for channel in range(images.shape[1]):
        out[:, channel] = images[:, channel]
    return out.div_(255)


def to_bytes(images: Tensor) -> Tensor:
    """Round and clip to bytes. float (B, C, H, W) in [0, 1] -> uint8 (B, C, H, W)."""
    return images.mul(255).round_().clamp_(0, 255).to(torch.uint8)


def _crop(
    images: Tensor, down: Tensor, right: Tensor, padding: int, border: Border = "zero"
) -> Tensor:
    """Crop each image out of a frame of that padding.

    Args:
        images: uint8 (B, C, H, W).
        down: int64 (B,) in [0, 2 padding], first row of the crop in the frame.
        right: int64 (B,) in [0, 2 padding], first column.
        padding: width of the frame in pixels.
        border: what the frame shows.

    Returns:
        uint8 (B, C, H, W).
    """
    frame = _framed(images, padding, border)
    image, channel, row, pixel = frame.stride()
    # One view of all windows, numbered by the memory address of their corner: index_select copies
    # whole rows out of it, while advanced indexing would go byte by byte.
    corners = torch.arange(len(images), device=images.device) * image + down * row + right * pixel
    last = (len(images) - 1) * image + 2 * padding * (row + pixel)
    return frame.as_strided((last + 1, *images.shape[1:]), (1, channel, row, pixel)).index_select(
        0, corners
    )


def _framed(images: Tensor, padding: int, border: Border) -> Tensor:
    """Pad images, uint8 (B, C, H, W), on all sides."""
    if border == "zero":
        return F.pad(images, [padding] * 4)
    # torch does not reflect bytes. The border pixel itself is not repeated.
    height, width = images.shape[2:]
    if padding >= min(height, width):
        raise UserError(
            f"a reflected border of {padding} pixels needs larger images than {height} x {width}:"
            " lower --crop_padding"
        )
    rows, columns = (
        torch.arange(-padding, side + padding, device=images.device).abs()
        for side in (height, width)
    )
    rows = torch.where(rows < height, rows, 2 * (height - 1) - rows)
    columns = torch.where(columns < width, columns, 2 * (width - 1) - columns)
    return images.index_select(2, rows).index_select(3, columns)


def trusted_index(
    size: int, *, ratio: float, count: int | None, generator: torch.Generator
) -> Tensor:
    """Draw the trusted images uniformly, without replacement.

    Args:
        size: images of the clean training set.
        ratio: share of them to draw, in (0, 1].
        count: number of them to draw, in place of the ratio.
        generator: for the draw.

    Returns:
        int64 (M,), increasing positions; M is `count` or floor(ratio * size).

    Raises:
        UserError: if M is 0 or more than `size`.
    """
    # The ratio is checked only where it is used.
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
    """Return the SHA-256 of shapes, pixels, labels and class names; the order of images counts."""
    digest = hashlib.sha256()
    for split in (train, test):
        digest.update(repr(tuple(split.images.shape)).encode())
        digest.update(split.images.numpy().data.cast("B"))
        digest.update(split.labels.numpy().data.cast("B"))
    digest.update("\0".join(class_names).encode())
    return digest.hexdigest()


def channel_statistics(split: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Measure mean and standard deviation of each channel in [0, 1] units.

    At most 10,000 evenly spaced images are read.
    """
    # A sample is enough, and bounds the memory that floats take.
    step = max(1, len(split) // 10_000)
    images = split.images[::step].to(torch.float32).div(255)
    mean, std = images.mean(dim=(0, 2, 3)), images.std(dim=(0, 2, 3)).clamp_min(1e-3)
    rounded = [tuple(round(value, 4) for value in row.tolist()) for row in (mean, std)]
    return rounded[0], rounded[1]
