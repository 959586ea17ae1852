"""A picture of an attack, for a person to look at."""

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from ..data import Split
from ..poison import POISON, Poison
from ..storage import writing

COLUMNS, GAIN = 8, 5
SCALE, GAP, GROUND = 3, 6, 96
"""Enlargement; pixels between images after it; their grey, which is neither a white patch nor the
middle of a difference."""


def save_preview(path: Path, clean: Split, triggered: Poison) -> None:
    """PNG with three rows: clean, triggered, difference times 5 around mid-grey. Without a trigger
    only the first row."""
    triggered = triggered.of_kind(POISON)
    index = (
        _one_per_class(triggered.original_labels)
        if len(triggered)
        else torch.arange(min(COLUMNS, len(clean)))
    )
    if len(triggered):
        before, after = clean.images[triggered.index[index]], triggered.images[index]
        difference = ((after.int() - before.int()) * GAIN + 128).clamp(0, 255).to(torch.uint8)
        rows = [before, after, difference]
    else:
        rows = [clean.images[index]]
    save_sheet(path, rows)


def save_sheet(path: Path, rows: Sequence[torch.Tensor]) -> None:
    """PNG of rows of images, each uint8 (n, C, H, W) of one size, enlarged to be seen."""
    channels, height, width = rows[0].shape[1:]
    scale = max(SCALE, 24 // height)  # recovered triggers have a few pixels only
    down, right = scale * height + GAP, scale * width + GAP
    sheet = torch.full(
        (channels, len(rows) * down - GAP, max(map(len, rows)) * right - GAP),
        GROUND,
        dtype=torch.uint8,
    )
    for r, images in enumerate(rows):
        for c, image in enumerate(images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)):
            sheet[
                :, r * down : r * down + scale * height, c * right : c * right + scale * width
            ] = image
    picture = Image.fromarray(sheet[0].numpy() if channels == 1 else sheet.permute(1, 2, 0).numpy())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    writing.write_bytes(path, buffer.getvalue())


def _one_per_class(labels: torch.Tensor) -> torch.Tensor:
    """Positions of the first image of each class, filled up with further images to a full row."""
    first = [int((labels == label).nonzero()[0]) for label in labels.unique()][:COLUMNS]
    rest = [i for i in range(len(labels)) if i not in first][: COLUMNS - len(first)]
    return torch.tensor(first + rest, dtype=torch.int64)
