"""What would be read of a user's folder, found in seconds and said in a few lines."""

import io
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .decoding import Head, read_head
from .plan import Part, Plan, said
from .readers import plan_folder
from .shards import cell_bytes, image_column

LOOKED_AT = 500
"""Images of a training or test set whose heads are read: enough to see what a folder mixes."""
MOST_LINES = 8
"""Entries of a list that are printed; the rest is a number."""


def describe_folder(path: str, configuration: str | None) -> Iterator[str]:
    """Yield the lines of `doctor --dataset_path`: splits, sizes, what is left out, classes.

    Args:
        path: the user's folder.
        configuration: which of several sets of parquet shards, as --dataset_config names it.

    Raises:
        UserError: the folder is not there, or nothing can be read of it.
    """
    root = Path(path)
    if not root.is_dir():
        raise UserError(
            f"--dataset_path {path}: no such folder. Give a folder with parquet shards or with"
            " train/<class>/*.png"
        )
    # What cannot be read at all is the same error here as in a run.
    plan = plan_folder(root, configuration)
    kind = "parquet shards" if plan.kind == "shards" else "folders of images"
    yield f"data set    {root.resolve()}: {kind}"
    for role, part in (("train", plan.train), ("test", plan.test)):
        yield f"{role:<12}{part.name}: {len(part.labels):,} images in {len(part.files):,} files"
    for note in plan.notes:
        yield f"note        {note}"

    yield from _about_images(plan)
    yield from _about_the_rest(plan)
    yield from _about_classes(plan)


def _about_images(plan: Plan) -> Iterator[str]:
    """Yield lines on sizes, channels, orientation and alpha of a sample of the images."""
    # A damaged image ends a run; here the rest is looked at, too.
    heads, damaged = [], []
    for part in (plan.train, plan.test):
        for name, source in _sample(plan, part):
            try:
                heads.append(read_head(source))
            except UserError as error:
                damaged.append(f"{name}: {error}")
    total = f"of {len(heads) + len(damaged):,} images looked at"

    # What differs between images stops a run unless a flag makes it the same.
    sizes = Counter(f"{head.width} x {head.height}" for head in heads)
    yield f"sizes       {_counted(sizes)} (width x height, {total})" + (
        ": pass --image_size N" * (len(sizes) > 1)
    )

    channels = Counter("1 channel" if head.grey else "3 channels" for head in heads)
    yield f"channels    {_counted(channels)}" + (
        ": pass --grey True or False" * (len(channels) > 1)
    )
    yield f"orientation {_share(heads, 'turned', total)} turned upright, as EXIF says"
    yield f"alpha       {_share(heads, 'alpha', total)} put on white, for an alpha channel"
    for line in damaged[:MOST_LINES]:
        yield f"damaged     {line}"


def _share(heads: list[Head], field: str, total: str) -> str:
    count = sum(getattr(head, field) for head in heads)
    return f"{count:,} {total} {'is' if count == 1 else 'are'}" if count else f"none {total} is"


def _counted(counts: Counter[str]) -> str:
    """Return the most frequent entries with their numbers; a single one without."""
    if len(counts) <= 1:
        return next(iter(counts), "unknown")
    shown = ", ".join(f"{name} ({count:,})" for name, count in counts.most_common(MOST_LINES))
    return f"{shown}, and {len(counts) - MOST_LINES} more" if len(counts) > MOST_LINES else shown


def _sample(plan: Plan, part: Part) -> Iterator[tuple[Path, Any]]:
    """Yield evenly spaced image files, or the first images of every shard: (file, source)."""
    if plan.kind == "images":
        chosen = np.linspace(0, len(part.files) - 1, min(len(part.files), LOOKED_AT))
        yield from ((part.files[i], part.files[i]) for i in chosen.astype(int))
        return
    # Shards are large files: a few images of each are read, from its start.
    each = -(-LOOKED_AT // len(part.files))
    for file in part.files:
        yield from ((file, io.BytesIO(cell_bytes(cell))) for cell in _first_cells(file, each))


def _first_cells(file: Path, count: int) -> Iterable[Any]:
    """Read the first images of a shard, and no more of it than the file needs for that."""
    import pyarrow.parquet as pq

    column = image_column(file)
    batches = pq.ParquetFile(file).iter_batches(batch_size=count, columns=[column])
    return next((batch[column].to_pylist() for batch in batches), [])


def _about_the_rest(plan: Plan) -> Iterator[str]:
    """Yield lines on files that are left out, and on what beside the data is not looked at."""
    kinds = said(plan.left_out, plan.root)
    for kind in kinds[:MOST_LINES]:
        yield f"left out    {kind}"
    if len(kinds) > MOST_LINES:
        yield f"left out    {len(kinds) - MOST_LINES} more kinds of files"
    if not kinds:
        yield "left out    nothing"

    # The folders of the two splits; entries that are left out are above.
    used = {file.relative_to(plan.root).parts[0] for file in _files(plan)}
    names = (entry.name for entry in plan.root.iterdir())
    beside = sorted(name for name in names if name not in used)
    if beside:
        rest = ", ..." * (len(beside) > MOST_LINES)
        yield f"beside      {', '.join(beside[:MOST_LINES])}{rest}: no images are read from these"


def _files(plan: Plan) -> Iterator[Path]:
    yield from plan.train.files
    yield from plan.test.files
    yield from (entry.path for entry in plan.left_out)


def _about_classes(plan: Plan) -> Iterator[str]:
    """Yield one line for each class, in the order of the labels, with its numbers of images."""
    count = len(plan.class_names)
    yield f"classes     {count:,}, named by {plan.names_from}: label, train + test images, name"
    # A class may be in one of the two splits only.
    train, test = (np.bincount(part.labels, minlength=count) for part in (plan.train, plan.test))
    for label, name in enumerate(plan.class_names):
        yield f"{label:>11} {train[label]:>7,} + {test[label]:<6,}  {name}"
