"""The triggers of eight attacks in one picture: clean image, triggered image, difference.

    python performance/trigger_sheet.py FILE.png [--dataset cifar10] [--dataset_path FOLDER]

The images are test images of the data set, one for each attack and none of the target class; the
triggers are those of the attacks' own functions, with their default settings (and those of the data
set's preset), and seed 0. Only attacks whose trigger needs no training are drawn. Differences are
enlarged and shifted to mid-grey, as in the preview.png of a record.
"""

import argparse
import io
import sys
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from backdoorlab.data import Dataset
from backdoorlab.datasets.load import load as load_dataset
from backdoorlab.errors import UserError, one_line
from backdoorlab.execution.attack import attack_job
from backdoorlab.execution.preview import GAIN, GROUND
from backdoorlab.settings import methods
from backdoorlab.storage import writing

ATTACKS = ("badnet", "blended", "sig", "lf", "wanet", "bpp", "refool", "adaptive_patch")
ROWS = ("clean", "triggered", f"difference x{GAIN}")
SIDE, GAP, HEAD, MARGIN = 96, 8, 26, 104
"""Side of an image, space between images, height of the names, width of the names of the rows."""
LETTERS = 14
"""Height of the letters in pixels."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--dataset_path", default=None, help="where the images are on disk")
    options = parser.parse_args(argv)
    try:
        dataset = load_dataset(options.dataset, options.dataset_path)
        writing.write_bytes(
            options.file, picture([_shown(dataset, n) for n in range(len(ATTACKS))])
        )
    except UserError as error:
        print(one_line(error), file=sys.stderr)
        return 2
    print(f"{options.file}: {len(ATTACKS)} triggers on {dataset.name}")
    return 0


def _shown(dataset: Dataset, number: int) -> list[Tensor]:
    """Return the images of one column, each uint8 (C, H, W): clean, triggered, difference."""
    name, test = ATTACKS[number], dataset.test
    method = methods.load("attack", name)
    argv = ["--save_folder_name", "none", "--dataset", dataset.name]
    config = attack_job(method, argv, "trigger_sheet").config
    prepare = method.function("prepare")
    prepared = prepare(dataset, config, None) if prepare else {}
    stamp = partial(method.module.stamp, config=config, **prepared)

    # A class for each attack, none of them the target.
    label = 1 + number % (dataset.num_classes - 1)
    index = (test.labels == label).nonzero().flatten()[:1]
    before = test.images[index]
    after = stamp(before.clone(), index, "test")
    difference = ((after.int() - before.int()) * GAIN + 128).clamp(0, 255).to(torch.uint8)
    return [before[0], after[0], difference[0]]


def picture(columns: list[list[Tensor]]) -> bytes:
    """Draw columns of images with the names of attacks and rows: a PNG.

    The ground is grey and the letters are white, so that it can be seen on any page.
    """
    step = SIDE + GAP
    size = (MARGIN + step * len(columns), HEAD + step * len(ROWS))
    sheet = Image.new("RGB", size, (GROUND // 2,) * 3)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(LETTERS)

    for row, name in enumerate(ROWS):
        draw.text((GAP, HEAD + row * step + SIDE // 2), name, "white", font, anchor="lm")
    for column, (name, images) in enumerate(zip(ATTACKS, columns, strict=True)):
        left = MARGIN + column * step
        draw.text((left + SIDE // 2, HEAD // 2), name, "white", font, anchor="mm")
        for row, image in enumerate(images):
            sheet.paste(_enlarged(image), (left, HEAD + row * step))

    stream = io.BytesIO()
    sheet.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _enlarged(image: Tensor) -> Image.Image:
    """Turn uint8 (C, H, W), grey or coloured, into a picture whose pixels are seen."""
    pixels = image.expand(3, -1, -1).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.NEAREST)


if __name__ == "__main__":
    raise SystemExit(main())
