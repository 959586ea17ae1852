"""Attacks that only poison the training set: from the stamp to the trained model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from . import data, engine, models
from .config import CleanLabelConfig, CoverConfig, TrainingConfig
from .data import Dataset, Split
from .device import derived_generator
from .errors import UserError, described
from .metrics import Evaluator
from .models import Classifier, choose_stem
from .poison import CROSS, POISON, Labels, Poison, Stamp, changed_share, poison_test, poison_train
from .record import build_model
from .run import Run


@dataclass(frozen=True)
class Outcome:
    """What an attack returns."""

    model: Classifier
    """The poisoned model."""
    train_poison: Poison
    """What it was trained on, as far as that differs from the clean training set."""
    test_poison: Poison
    """The triggered test images, on which ASR is measured."""
    measured: Mapping[str, float | None] = field(default_factory=dict)
    """Other facts about the attack, for record.json: accuracy on cross images, ..."""


Choice = Callable[[torch.Tensor, str, Any], torch.Tensor]
"""choice(labels, split, config): int64 (N,), "train" or "test" -> bool (N,), the images that may be
taken."""


def static_attack(
    dataset: Dataset,
    config: Any,
    run: Run,
    stamp: Callable[..., torch.Tensor],
    prepare: Callable[..., dict[str, Any]] | None = None,
    victims: Choice | None = None,
    covers: Choice | None = None,
) -> Outcome:
    """Stamp a share of the training set, then train as usual.

    Args:
        dataset: clean data.
        config: the attack's settings.
        run: the context of the attack.
        stamp: stamp(images, index, split, config, **prepared), uint8 (n, C, H, W) -> same.
        prepare: prepare(dataset, config, run) returns further arguments of the stamp by name.
        victims: the images that the attack is meant for, in either split. None: all; in training
            those of the target class if the attack changes no label.
        covers: the training images that may become cover samples, with the true label. None: all.
            Read if the config has a cover_rate.
    """
    # Some stamps need images to mix in, or a trained network.
    prepared = prepare(dataset, config, run) if prepare else {}
    if not isinstance(prepared, dict):
        raise UserError(
            "prepare(dataset, config, run) must return the stamp's further arguments by name, a"
            f" dict, got {described(prepared)}"
        )

    # Train and test images get the same stamp, each by its own victims.
    fixed: Stamp = partial(stamp, config=config, **prepared)
    labels = Labels(config.target_label, config.label_mode, dataset.num_classes)
    train_poison = _poisoned_training_set(
        dataset.train, fixed, labels, config, run, victims, covers
    )
    meant = _chosen(victims, "victims", dataset.test, "test", config) if victims else None
    test_poison = poison_test(dataset.test, fixed, labels, victims=meant)

    # A trigger that changes nothing would be scored like one that does not work.
    if 0 in (changed_share(dataset.train, train_poison), changed_share(dataset.test, test_poison)):
        raise UserError(
            "the trigger leaves every value of these images as it is, so there is nothing to learn:"
            " make it stronger, see --help"
        )
    return poison_and_train(dataset, config, run, train_poison, test_poison)


def _poisoned_training_set(
    train: Split,
    stamp: Stamp,
    labels: Labels,
    config: Any,
    run: Run,
    victims: Choice | None,
    covers: Choice | None,
) -> Poison:
    """Draw victims and covers and stamp them; rates that cannot be reached are capped and noted."""
    size = len(train)
    pool = (
        _chosen(victims, "victims", train, "train", config)
        if victims
        else torch.ones(size, dtype=torch.bool)
    )
    rate = config.poison_rate
    # A clean-label attack poisons the target class only.
    if isinstance(config, CleanLabelConfig):
        pool = pool & (train.labels == config.target_label)
        if rate is None:
            rate = _share_of_class(config, int(pool.sum())) / size
    cover_rate = config.cover_rate if isinstance(config, CoverConfig) else 0.0

    # Victims and covers are drawn by a generator of their own.
    poison = poison_train(
        train,
        stamp,
        labels,
        poison_rate=rate,
        generator=derived_generator(config.seed, "victims"),
        victims=pool,
        cover_rate=cover_rate,
        covers=_chosen(covers, "covers", train, "train", config) if covers else None,
    )

    _note_rates(poison, rate, cover_rate, size, run)
    if isinstance(config, CleanLabelConfig):
        of_class = int((train.labels == config.target_label).sum())
        _note_clean_label(poison, config.target_label, of_class, size, run)
    return poison


def _note_rates(poison: Poison, rate: float, cover_rate: float, size: int, run: Run) -> None:
    """Note where fewer images were poisoned, or became covers, than the rates ask for."""
    # A rate of no image at all, and one that there are not enough images for.
    found, crossed = (int((poison.kind == kind).sum()) for kind in (POISON, CROSS))
    if cover_rate and not round(cover_rate * size):
        run.note(
            f"cover_rate {cover_rate:g} of {size:,} training images is no image at all: the attack"
            " has no covers"
        )
    for asked, got, what in (
        (round(rate * size), found, "poison_rate"),
        (round(cover_rate * size), crossed, "cover_rate"),
    ):
        if got < asked:
            run.note(
                f"{what} asks for {asked:,} of {size:,} training images, but this attack can have"
                f" {got:,}: it takes those"
            )


def _note_clean_label(poison: Poison, target: int, of_class: int, size: int, run: Run) -> None:
    """Note which share of the target class is poisoned."""
    found = int((poison.kind == POISON).sum())
    said = (
        f"{found:,} images poisoned: {100 * found / of_class:.1f} % of class {target},"
        f" {100 * found / size:.2f} % of the training set"
    )
    # With all of them poisoned, accuracy on that class tells of the trigger, not of the class.
    if found == of_class:
        said += "; no clean one is left, so its clean accuracy measures a missing class"
    run.note(said)


def _chosen(choice: Choice, name: str, split: Split, which: str, config: Any) -> torch.Tensor:
    """Call a method's `victims` or `covers`, and refuse an answer of another shape or type."""
    found = choice(split.labels, which, config)
    if (
        not isinstance(found, torch.Tensor)
        or found.dtype != torch.bool
        or found.shape != split.labels.shape
    ):
        raise UserError(
            f"{name}(labels, {which!r}, config) must return who may be taken, bool ({len(split)},),"
            f" got {described(found)}"
        )
    return found


def _share_of_class(config: CleanLabelConfig, of_class: int) -> float:
    """Turn clean_label_ratio into a number of images."""
    if not of_class:
        raise UserError(
            f"class {config.target_label} has no training image, and this attack poisons no other"
            " class: choose another --target_label"
        )
    if not round(config.clean_label_ratio * of_class):
        raise UserError(
            f"clean_label_ratio {config.clean_label_ratio} of the {of_class:,} training images of"
            f" class {config.target_label} is no image at all: raise --clean_label_ratio"
        )
    return config.clean_label_ratio * of_class


def poison_and_train(
    dataset: Dataset,
    config: TrainingConfig,
    run: Run,
    train_poison: Poison,
    test_poison: Poison,
    stage: str = "train",
) -> Outcome:
    """Train a fresh model on the poisoned training set as usual, and have each epoch scored.

    Args:
        dataset: clean data.
        config: architecture and recipe.
        run: the context of the attack.
        train_poison: the poisoned rows of the training set.
        test_poison: the triggered test images.
        stage: name of the training's stage.
    """
    model = new_model(dataset, config).to(run.device)
    # Epochs of the training are scored on the images that ASR will be measured on.
    run.watch_scores(Evaluator(dataset.test, test_poison, dataset.num_classes, run.device))

    # Only the poisoned rows are copied; the others stay in the map of the data set.
    received = data.to_device(train_poison.apply(dataset.train), run.device)
    engine.train(model, received, config.recipe(), run, stage=stage)
    return Outcome(model, train_poison, test_poison)


def new_model(dataset: Dataset, config: TrainingConfig) -> Classifier:
    """Build the model that the config names, freshly initialised.

    It is normalised by the config's numbers, else by those of the training images.
    """
    # Statistics are measured only if one of the two is not given.
    measured = (
        data.channel_statistics(dataset.train)
        if config.mean is None or config.std is None
        else ((), ())
    )
    mean = measured[0] if config.mean is None else config.mean
    std = measured[1] if config.std is None else config.std
    channels = dataset.image_shape[0]
    if len(mean) != channels or len(std) != channels:
        raise UserError(
            f"--mean and --std need {channels} numbers each for these images, got {len(mean)} and"
            f" {len(std)}"
        )

    architecture = {**network_of(dataset, config), "mean": mean, "std": std}
    model = build_model(architecture, dataset.image_shape, dataset.num_classes)
    models.fit_input(model, dataset.train.images)
    return model


def network_of(dataset: Dataset, config: TrainingConfig) -> dict[str, Any]:
    """Return the network that the config names, as a record describes it.

    Raises:
        UserError: it takes no images of this size. One image was passed through it to find out.
    """
    stem = choose_stem(
        config.stem, config.model, dataset.image_shape, dataset.num_classes, config.width
    )
    # The small stem is not written down: without a word of it, it is that.
    network = {"name": config.model, "width": config.width}
    return network if stem == "small" else network | {"stem": stem}


def train_surrogate(
    dataset: Dataset, config: TrainingConfig, run: Run, epochs: int | None
) -> Classifier:
    """Train a clean model for attacks that need one to make their trigger.

    Args:
        dataset: clean data.
        config: architecture and recipe, those of the attacked model.
        run: the context of the attack.
        epochs: passes over the training set; None for the recipe's.

    Returns:
        The model in evaluation mode.
    """
    model = new_model(dataset, config).to(run.device)
    recipe = config.recipe() if epochs is None else replace(config.recipe(), epochs=epochs)
    engine.train(model, data.to_device(dataset.train, run.device), recipe, run, stage="surrogate")
    return model.eval()
