"""Pictures for a person: the preview of an attack, and sheets of images that methods keep."""

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from ..data import Split
from ..poison import POISON, Poison
from ..storage import writing

COLUMNS, GAIN = 8, 5
"""Images in a row; the factor by which differences are enlarged."""
SCALE, GAP, GROUND = 3, 6, 96
"""Enlargement of an image; pixels between images; grey of the ground, which is neither that of a
white patch nor that of no difference."""
LEAST_SIDE = 24
"""Pixels of a smaller image's side after it was enlarged: recovered triggers have few pixels."""


def save_preview(path: Path, clean: Split, triggered: Poison) -> None:
    """Write a PNG with three rows: clean, triggered, and GAIN times the difference around mid-grey.

    Without a trigger there is only the first row.

    Args:
        path: the file to write.
        clean: the clean test set.
        triggered: the triggered test images; images of kind CROSS are left out.
    """
    # One image of each class shows more than the first eight.
    triggered = triggered.of_kind(POISON)
    index = (
        one_per_class(triggered.original_labels)
        if len(triggered)
        else torch.arange(min(COLUMNS, len(clean)))
    )

    # Differences are shifted to mid-grey, so that darker and brighter pixels are both seen.
    if len(triggered):
        before, after = clean.images[triggered.index[index]], triggered.images[index]
        difference = ((after.int() - before.int()) * GAIN + 128).clamp(0, 255).to(torch.uint8)
        rows = [before, after, difference]
    else:
        rows = [clean.images[index]]
    save_sheet(path, rows)


def save_sheet(path: Path, rows: Sequence[torch.Tensor]) -> None:
    """Write the `sheet` of these rows."""
    writing.write_bytes(path, sheet(rows))


def sheet(rows: Sequence[torch.Tensor]) -> bytes:
    """Draw rows of enlarged images, each uint8 (n, C, H, W) of one size, as a PNG."""
    # All images are enlarged alike.
    channels, height, width = rows[0].shape[1:]
    scale = max(SCALE, LEAST_SIDE // height)
    down, right = scale * height + GAP, scale * width + GAP
    drawn = torch.full(
        (channels, len(rows) * down - GAP, max(map(len, rows)) * right - GAP),
        GROUND,
        dtype=torch.uint8,
    )

    # Rows from above, images from the left; shorter rows end in the ground.
    for r, images in enumerate(rows):
        for c, image in enumerate(images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)):
            drawn[
                :, r * down : r * down + scale * height, c * right : c * right + scale * width
            ] = image

    picture = Image.fromarray(drawn[0].numpy() if channels == 1 else drawn.permute(1, 2, 0).numpy())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def one_per_class(labels: torch.Tensor) -> torch.Tensor:
    """Return positions of the first image of each class, filled up to a row of COLUMNS with
    further images.

    Args:
        labels: int64 (N,).
    """
    first = [int((labels == label).nonzero()[0]) for label in labels.unique()][:COLUMNS]
    rest = [i for i in range(len(labels)) if i not in first][: COLUMNS - len(first)]
    return torch.tensor(first + rest, dtype=torch.int64)
