"""Run one attack into a record: prepare, execute, publish."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import record
from ..config import CleanLabelConfig, JointConfig, TriggerConfig
from ..data import Dataset
from ..datasets.load import load as load_dataset
from ..device import choose_device, keep_freed_memory, seed_everything
from ..errors import UserError, described
from ..metrics import Scores, learned_nothing
from ..poison import POISON, changed_share, check_rate, check_target, left_by_crops, psnr
from ..poisoning import Outcome, network_of, new_model, poison_and_train, static_attack
from ..record import Record
from ..run import Run
from ..settings.methods import Method
from ..settings.parse import Trained, parse
from .precision import Choice, choose
from .preview import save_preview
from .scores import ScoreLog
from .stage import (
    Job,
    costs_of,
    flattened,
    fresh,
    made_on,
    made_with,
    open_stage,
    put_in_place,
    tracker_of,
)

WEAK_SNAPSHOT = 0.5
"""ASR of ordinary training on a joint attack's snapshot below which its record has a note."""
FAINT = 0.001
"""Share of changed values in triggered images below which a record has a note."""
CUT_OFF = 0.01
"""Share of random crops without any of the trigger from which on a record has a note."""


@dataclass(frozen=True)
class Prepared:
    """An attack with its data and its device, before anything is written."""

    job: Job
    root: Path
    """Folder of records."""
    dataset: Dataset
    device: torch.device
    choice: Choice
    """The precision of training, and why."""

    @property
    def target(self) -> Path:
        """The folder of the record to write."""
        return self.root / self.job.config.save_folder_name


@dataclass(frozen=True)
class RecordInfo:
    """What record.json says, in its order; `record.write` adds the files' checksums."""

    attack: str
    """Name of the method; "unknown" for a data set of which nobody knows what was done to it."""
    known_poison: bool
    config: Mapping[str, Any]
    dataset: Mapping[str, Any]
    architecture: Mapping[str, Any]
    num_classes: int
    target: int | None
    """The target label; None where there is none, or several."""
    seed: int
    trigger_in_crops: Mapping[str, float] | None
    """Shares of random crops with the whole trigger, a part of it, and none of it."""
    poisoned: int
    """Number of poisoned training images, cover samples not counted."""
    scores: Mapping[str, Any]
    joint: Mapping[str, Any]
    """`plain_scores` of a joint attack; empty for any other."""
    measured: Mapping[str, float | None]
    notes: Sequence[str]
    costs: Mapping[str, Any]
    environment: Mapping[str, Any]
    made_with: Mapping[str, Any]
    precision_why: str

    def to_json(self) -> dict[str, Any]:
        """Return the content of record.json, the entries of groups at its top."""
        return flattened(self, groups=("joint", "costs", "environment", "made_with"))


def attack_job(method: Method, argv: Sequence[str], prog: str) -> Job:
    """Parse the command line of an attack.

    Args:
        method: the attack.
        argv: flags and values.
        prog: the command's name, for --help.
    """

    def trained(config: Any) -> Trained:
        return Trained(config.dataset, config.epochs)

    parsed = parse(method.config_class, method.name, "attack", argv, trained, prog)
    return Job(method, parsed.config, parsed)


def run_attack(job: Job) -> Record:
    """Poison, train, score, and publish the record whole."""
    prepared = prepare(job)
    config, inputs = job.config, {"data": prepared.dataset.fingerprint}
    precision = prepared.choice.precision

    with (
        open_stage(
            prepared.target, "record.json", job, inputs, precision, prepared.device
        ) as stage,
        tracker_of(job, config.save_folder_name, stage) as tracker,
    ):
        seed_everything(config.seed, prepared.device)
        log = ScoreLog(score_every=config.score_every, on_line=tracker.line)
        run = Run(
            stage,
            seed=config.seed,
            device=prepared.device,
            precision=precision,
            callbacks=log.callbacks(),
        )
        outcome, scores, info = execute(prepared, run, log)
        publish(prepared, outcome, info, log, stage)
        costs = {key: info.costs[key] for key in ("seconds", "peak_memory_bytes")}
        # Trackers get the final scores only once the record is in its place.
        tracker.final(after=scores.summary(), cost=costs)
    return Record.load(config.save_folder_name, prepared.root)


def prepare(job: Job) -> Prepared:
    """Check the settings, load the data and choose device and precision."""
    config = job.config
    config.check()
    if not config.save_folder_name:
        raise UserError("--save_folder_name NAME is missing: the record will be record/NAME")
    record.check_name(config.save_folder_name)

    root = record.record_root(config.record_root)
    device = choose_device(config.device)

    # What no data set would make right is refused before the data are loaded.
    if isinstance(config, TriggerConfig):
        _check_poisoning(config, job.method.name)
    dataset = load_dataset(
        config.dataset,
        config.dataset_path,
        image_size=config.image_size,
        grey=config.grey,
        configuration=config.dataset_config,
    )
    if isinstance(config, TriggerConfig):
        check_target(config.target_label, dataset.num_classes)

    # One image goes through the network before anything that takes long.
    built = network_of(dataset, config)

    # Where the precision is measured, an untrained network of the same shape tells the speed.
    keep_freed_memory(device)
    choice = choose(
        config.precision,
        device,
        partial(new_model, dataset, config),
        name=config.model,
        width=config.width,
        image_shape=dataset.image_shape,
        stem=built.get("stem", "small"),
    )
    return Prepared(job, root, dataset, device, choice)


def execute(prepared: Prepared, run: Run, log: ScoreLog) -> tuple[Outcome, Scores, RecordInfo]:
    """Run the method and measure what it leaves.

    Returns:
        What the attack leaves, the scores of its model, and the content of record.json.
    """
    job, dataset, config = prepared.job, prepared.dataset, prepared.job.config
    _introduce(prepared, run)

    # The attack's own file decides what happens; it returns, and scores nothing.
    given = _changes(dataset)
    outcome = _attack_function(job.method)(dataset, config, run)
    if _changes(dataset) != given:
        raise UserError(
            f"{job.method.path}: the attack changed the clean data set in place, by which it is"
            " scored: expected changed images in its Outcome; change a copy, images.clone()"
        )
    if not isinstance(outcome, Outcome):
        raise UserError(
            f"{job.method.path}: attack returned {described(outcome)}: expected a"
            " backdoorlab.poisoning.Outcome"
        )

    # The model is scored once more, at the end, whatever score_every is.
    with run.uncharged():
        scores = log.score(outcome.model)
    _note_nothing_learned(scores, dataset, run)
    _note_no_asr(scores, config, run)
    # The model trained for comparison is no part of the attack's costs.
    costs = costs_of(run.spent(), log.evaluation_seconds)
    joint = (
        {"plain_scores": plain_scores(outcome, dataset, config, run, log)}
        if isinstance(config, JointConfig)
        else {}
    )

    # What a reader should know of the trigger.
    _note_faint(outcome, dataset, run)
    crops = left_by_crops(dataset.train, outcome.train_poison, config.crop_padding)
    _note_cut_off(crops, run)
    return outcome, scores, _info(prepared, outcome, scores, joint, crops, costs, run)


def publish(
    prepared: Prepared, outcome: Outcome, info: RecordInfo, log: ScoreLog, stage: Path
) -> None:
    """Write the record into the stage, read it back, and put it in its place."""
    final = fresh(stage / "final")
    save_preview(final / "preview.png", prepared.dataset.test, outcome.test_poison)
    log.save_history(final)
    record.write(final, info.to_json(), outcome.model, outcome.train_poison, outcome.test_poison)
    # A record that cannot be read would stop every table.
    record.refuse_unreadable(final, record.read_folder)
    put_in_place(final, prepared.target)


def _info(
    prepared: Prepared,
    outcome: Outcome,
    scores: Scores,
    joint: Mapping[str, Any],
    crops: Mapping[str, float] | None,
    costs: Mapping[str, Any],
    run: Run,
) -> RecordInfo:
    dataset, config = prepared.dataset, prepared.job.config
    # A suspicious data set was not poisoned here: nobody knows where its poison is.
    suspicious = getattr(config, "suspicious", False)
    one_target = getattr(config, "label_mode", None) == "all2one"

    # Settings come first, then scores, then costs and environment.
    return RecordInfo(
        attack="unknown" if suspicious else prepared.job.method.name,
        known_poison=not suspicious,
        config=config.science(),
        dataset=record.describe(dataset, config.image_size, config.grey),
        architecture={
            **network_of(dataset, config),
            "mean": outcome.model.mean.flatten().tolist(),
            "std": outcome.model.std.flatten().tolist(),
        },
        num_classes=dataset.num_classes,
        target=getattr(config, "target_label", None) if one_target else None,
        seed=config.seed,
        trigger_in_crops=crops,
        poisoned=int((outcome.train_poison.kind == POISON).sum()),
        scores=scores.to_json(),
        joint=joint,
        measured={"psnr": psnr(dataset.test, outcome.test_poison), **outcome.measured},
        notes=run.notes,
        costs=costs,
        environment=made_on(run.folder),
        made_with=made_with(run.folder),
        precision_why=prepared.choice.why,
    )


def _introduce(prepared: Prepared, run: Run) -> None:
    """Print what is run on what, and note how the images were read and which classes have none."""
    dataset = prepared.dataset
    prepared.job.say_settings(run)
    run.say(
        f"{prepared.job.method.name} on {dataset.name}: {len(dataset.train):,} training images"
        f" {dataset.image_shape}, {prepared.device}, {prepared.choice.describe()}"
    )
    for note in dataset.notes:
        run.note(note)
    # Folders named 0 and 5 make six classes, four of them without images.
    seen = set(dataset.train.labels.tolist())
    absent = [name for label, name in enumerate(dataset.class_names) if label not in seen]
    if absent:
        run.note(
            f"{len(absent)} of the {dataset.num_classes} classes have no training image"
            f" ({', '.join(absent[:5])}{', ...' * (len(absent) > 5)})"
        )


def _changes(dataset: Dataset) -> list[int]:
    """Count the changes in place of each tensor of the data, as torch does."""
    splits = (dataset.train, dataset.test)
    return [tensor._version for split in splits for tensor in (split.images, split.labels)]


def _attack_function(method: Method) -> Callable[[Dataset, Any, Run], Outcome]:
    """The file's own `attack`, else static_attack with what the file defines."""
    pieces: dict[str, Any] = {
        name: method.function(name) for name in ("stamp", "prepare", "victims", "covers")
    }
    return method.function("attack") or (
        lambda dataset, config, run: static_attack(dataset, config, run, **pieces)
    )


def _note_nothing_learned(scores: Scores, dataset: Dataset, run: Run) -> None:
    """Note a model that does little better than guessing, or than a constant answer."""
    if learned_nothing(scores, dataset.num_classes):
        balanced, share = scores.balanced_accuracy or 0.0, scores.largest_share or 0.0
        run.note(
            f"the model learned nothing (clean accuracy {100 * scores.clean_accuracy:.2f} %, mean"
            f" over classes {100 * balanced:.2f} %, {100 * share:.2f} % of the test images"
            " classified as one class): more epochs, or another --lr"
        )


def _note_no_asr(scores: Scores, config: Any, run: Run) -> None:
    """Note an attack that no test image shows."""
    if scores.asr is None and isinstance(config, TriggerConfig):
        run.note(
            "no ASR: no test image could be triggered, as all are of the target class or none is"
            " one that the attack changes"
        )


def _note_faint(outcome: Outcome, dataset: Dataset, run: Run) -> None:
    """Note a trigger that changes next to nothing."""
    for name, clean, poison in (
        ("training", dataset.train, outcome.train_poison),
        ("test", dataset.test, outcome.test_poison),
    ):
        share = changed_share(clean, poison)
        if share is not None and share < FAINT:
            run.note(
                f"the trigger changes {100 * share:.3f} % of the values of the poisoned {name}"
                " images: next to nothing to learn"
            )


def _note_cut_off(crops: Mapping[str, float] | None, run: Run) -> None:
    """Note a trigger that random crops cut off."""
    if crops and crops["none"] >= CUT_OFF:
        run.note(
            f"random crops cut the whole trigger off in {100 * crops['none']:.1f} % of draws,"
            f" and keep all of it in {100 * crops['whole']:.1f} %"
        )


def _check_poisoning(config: Any, name: str) -> None:
    """Refuse rates and labels that no data set would make right."""
    if getattr(config, "poison_rate", None) is not None:
        check_rate(config.poison_rate)
    if isinstance(config, CleanLabelConfig) and config.label_mode != "all2one":
        raise UserError(
            f"{name} changes no label, so it has one target: expected --label_mode all2one, got"
            f" {config.label_mode}"
        )


def plain_scores(
    outcome: Outcome, dataset: Dataset, config: JointConfig, run: Run, log: ScoreLog
) -> dict[str, Any] | None:
    """Score an ordinary model trained on the snapshot of a joint attack.

    It is what defenses that train from the snapshot are compared with.

    Returns:
        Its scores and the seconds of its training; None where the user wants none.
    """
    if not config.plain:
        return None

    # An ordinary training, under a stage of its own.
    before = run.spent().seconds
    model = poison_and_train(
        dataset, config, run, outcome.train_poison, outcome.test_poison, stage="plain"
    ).model
    seconds = round(run.spent().seconds - before, 3)

    found = log.score(model).to_json() | {"seconds": seconds}
    if found["asr"] is not None and found["asr"] < WEAK_SNAPSHOT:
        run.note(
            f"ordinary training on the stored images gives an ASR of {100 * found['asr']:.2f} %:"
            " little for training-time defenses to prevent"
        )
    return found
