"""The trusted images of a defense: a user's own, or a draw from the clean training set."""

from ..config import DefenseConfig
from ..data import Dataset, Split, trusted_index
from ..datasets.load import load_trusted
from ..device import derived_generator
from ..record import Record
from ..run import Run

NAMED = 5
"""Names of classes in a note; further ones are an ellipsis."""


def trusted_images(
    config: DefenseConfig, found: Record, dataset: Dataset
) -> tuple[Split, tuple[str, ...]]:
    """Load the folder that the user gave, else draw from the clean training set by the seed.

    Returns:
        (the images, notes on the folder).
    """
    if config.trusted_path is not None:
        return load_trusted(config.trusted_path, dataset, found.info["dataset"]["image_size"])
    # Of the clean images: what the attack poisoned is not what a defender can trust.
    index = trusted_index(
        len(dataset.train),
        ratio=config.trusted_ratio,
        count=config.trusted_count,
        generator=derived_generator(config.seed, "trusted"),
    )
    return dataset.train.subset(index), ()


def describe_trusted(
    trusted: Split, config: DefenseConfig, found: Record, dataset: Dataset, run: Run
) -> None:
    """Print how many trusted images there are, and note what limits them."""
    run.say(f"{len(trusted):,} trusted images")

    # A class without trusted images is forgotten by fine-tuning.
    missing = sorted(set(range(dataset.num_classes)) - set(trusted.labels.tolist()))
    if missing:
        names = ", ".join(dataset.class_names[label] for label in missing[:NAMED])
        run.note(
            f"no trusted image of {len(missing)} of {dataset.num_classes} classes"
            f" ({names}{', ...' * (len(missing) > NAMED)}): their accuracy may be lost; give more"
            " trusted images"
        )

    batch_size = getattr(config, "batch_size", 1)
    if batch_size > len(trusted):
        run.note(
            f"batch_size {batch_size} is more than the {len(trusted)} trusted images: all of them"
            " make one batch"
        )

    # Of a training set whose poison nobody knows, a draw may be poisoned, too.
    drawn_from_unknown = config.trusted_path is None and not found.known_poison
    if drawn_from_unknown and found.info.get("has_train", True):
        run.note(
            "the trusted images are drawn from the record's training images, which nobody"
            " vouches for: pass --trusted_path if you can"
        )
