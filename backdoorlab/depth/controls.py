"""Two models that say what an audit is worth: a clean one, and one purified with the true trigger.

They are made once a record, and kept in record/<name>/controls/. The third control is the
undefended model itself.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from .. import engine, models
from ..config import TrainingConfig
from ..data import Split, to_device
from ..device import Exact, seed_everything
from ..errors import UserError
from ..models import Classifier
from ..record import Record, shapes_of
from ..run import Run
from ..storage import folders, reading, writing
from ..storage.schema import refuse_difference
from .tuning import fine_tune
from .view import AttackerView

CONTROLS = ("undefended", "clean", "exact")
"""The attacked model, a clean model, and exact purification."""
EPOCHS, LR, BATCH_SIZE = 5, 0.01, 128
"""Of exact purification."""
SHARE = 0.25
"""Share of triggered images in its training set, by repetition where they are fewer."""
MOST = 50_000
"""Clean images in that set, at most."""


def clean_model(view: AttackerView, folder: Path, other: Classifier | None) -> Classifier:
    """Read the clean model, or train it by the record's own recipe on the clean training set.

    Args:
        view: the attacker's side.
        folder: where it is kept; a killed training continues there.
        other: a clean model of the user's (`model_of`), which is taken in its place.

    Raises:
        UserError: nothing says how it is trained.
    """
    if other is not None:
        return other.to(view.device).eval()
    return _kept(view, folder, "clean", lambda: _train(view, folder))


def exact_purification(view: AttackerView, folder: Path) -> Classifier:
    """Read the poisoned model that was fine-tuned with the true trigger, or make it.

    No defense knows the trigger: this is the depth that fine-tuning can reach.

    Args:
        view: the attacker's side.
        folder: where it is kept.

    Raises:
        UserError: no triggered training image has another true label than the target.
    """
    if not len(_triggered(view)):
        raise UserError(
            "exact purification needs triggered training images of other classes than the target,"
            " and this attack has none"
        )
    return _kept(view, folder, "exact", lambda: _purify(view))


def _triggered(view: AttackerView) -> Split:
    """The triggered training images of other classes than the target, with their true labels."""
    poisoned = view.poisoned
    others = poisoned.original_labels != poisoned.labels
    return Split(poisoned.images[others], poisoned.original_labels[others])


def _purify(view: AttackerView) -> Classifier:
    """Fine-tune the poisoned model on clean and on triggered images with their true labels."""
    generator, triggered = view.generator("exact purification"), _triggered(view)
    train = view.dataset.train
    clean = train.subset(torch.randperm(len(train), generator=generator)[:MOST])

    # A rate of 1 % would be too few triggered images to learn anything from.
    wanted = round(len(clean) * SHARE / (1 - SHARE))
    rows = torch.arange(max(wanted, len(triggered))) % len(triggered)
    both = Split(
        torch.cat([clean.images, triggered.images[rows]]),
        torch.cat([clean.labels, triggered.labels[rows]]),
    )

    model = view.record.model().to(view.device)
    fine_tune(
        model,
        to_device(both, view.device),
        epochs=EPOCHS,
        lr=LR,
        batch_size=BATCH_SIZE,
        device=view.device,
        generator=generator,
    )
    return model


def _train(view: AttackerView, folder: Path) -> Classifier:
    """Train the record's network on the clean training set, as its attack trained it."""
    info = view.record.info
    config = info["config"]
    if "epochs" not in config:
        raise UserError(
            "nothing says how a clean model of this imported record is trained: pass --clean with"
            " the name of a record of attack none on the same data and network"
        )
    names = {field.name for field in dataclasses.fields(TrainingConfig)}
    # The attack's own options, such as its trigger, are no part of a recipe.
    known = {name: value for name, value in config.items() if name in names}
    recipe = TrainingConfig(**known).recipe()

    # A killed training continues at its last epoch, from the same start.
    stage = _stage(view, folder)
    writing.make_folder(stage)
    seed_everything(view.seed, view.device)
    model = view.record.new_model()
    models.fit_input(model, view.dataset.train.images)
    precision: Exact = "bf16" if info.get("precision") == "bf16" else "fp32"
    run = Run(stage, seed=view.seed, device=view.device, precision=precision)
    received = to_device(view.dataset.train, view.device)
    engine.train(model.to(view.device), received, recipe, run, stage="clean")
    return model


def _stage(view: AttackerView, folder: Path) -> Path:
    return folder / f"training-s{view.seed}"


def _kept(
    view: AttackerView, folder: Path, kind: str, make: Callable[[], Classifier]
) -> Classifier:
    """Read a control's weights; where they are not there, make and write them.

    Args:
        view: the attacker's side, whose seed is part of the file's name.
        folder: where they are kept.
        kind: "clean" or "exact".
        make: makes the control.
    """
    path, wanted = folder / f"{kind}-s{view.seed}.safetensors", view.record.model_shapes()
    if not path.is_file():
        made = make()
        writing.write_tensors(path, made.state_dict())
        folders.remove(_stage(view, folder))
    # Read back in any case, so that a continued audit starts from the same bytes.
    tensors, _ = reading.read_tensors(path, check=lambda found: refuse_difference(found, wanted))
    model = view.record.new_model()
    model.load_state_dict(tensors)
    return model.to(view.device).eval()


def model_of(other: Record, record: Record) -> Classifier:
    """Return the model of a clean record.

    Args:
        other: the record without an attack.
        record: the audited one.

    Raises:
        UserError: it was attacked, or is of other data or another network.
    """
    if other.info["attack"] != "none":
        raise UserError(
            f"--clean {other.name}: expected a record of attack none, got one of"
            f" {other.info['attack']}"
        )
    data, wanted = other.info["dataset"]["fingerprint"], record.info["dataset"]["fingerprint"]
    if data != wanted:
        raise UserError(
            f"--clean {other.name}: expected the data of {record.name} ({wanted[:12]}), got"
            f" {data[:12]}: take a clean record of the same data set"
        )
    # Weights of the same shapes are the same network, as far as a record says it.
    model = other.model()
    try:
        refuse_difference(shapes_of(model), record.model_shapes())
    except ValueError as error:
        raise UserError(
            f"--clean {other.name}: expected the network of {record.name} ({error}): take a clean"
            " record of the same --model and --width"
        ) from error
    return model
