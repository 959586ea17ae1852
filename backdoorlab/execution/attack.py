"""Run one attack into a record."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from .. import record
from ..config import CleanLabelConfig, JointConfig, TriggerConfig
from ..data import Dataset
from ..datasets.load import load as load_dataset
from ..device import choose_device, keep_freed_memory, seed_everything
from ..errors import UserError, described
from ..poison import POISON, changed_share, check_rate, check_target, left_by_crops
from ..poisoning import Outcome, new_model, poison_and_train, static_attack
from ..record import Record
from ..run import Run
from ..settings.methods import Method
from ..settings.parse import Trained, parse
from .environment import environment
from .precision import choose
from .preview import save_preview
from .stage import Job, costs_of, fresh, made_with, open_stage, publish, tracker_of

CHANCE, CHANCE_OF_TWO = 1.5, 0.6
"""A clean accuracy below the first over the number of classes is that of guessing; of two classes,
below the second."""
WEAK_SNAPSHOT = 0.5
"""An ASR of ordinary training on the stored set below which a joint attack's record says so."""
FAINT = 0.001
"""Share of changed values in triggered images below which a record says so."""


def attack_job(method: Method, argv: Sequence[str], prog: str) -> Job:
    parsed = parse(
        method.config_class,
        method.name,
        "attack",
        argv,
        lambda c: Trained(c.dataset, c.epochs),
        prog,
    )
    return Job(method, parsed.config, parsed)


def run_attack(job: Job) -> Record:
    """Poison, train, score, and publish the record whole."""
    config = job.config
    config.check()
    if not config.save_folder_name:
        raise UserError("--save_folder_name NAME is missing: the record will be record/NAME")
    record.check_name(config.save_folder_name)
    root = record.record_root(config.record_root)
    target = root / config.save_folder_name
    device = choose_device(config.device)
    if isinstance(config, TriggerConfig):
        _check_poisoning(config, job.method.name)
    dataset = load_dataset(
        config.dataset, config.dataset_path, image_size=config.image_size, grey=config.grey
    )
    if isinstance(config, TriggerConfig):
        check_target(config.target_label, dataset.num_classes)
    keep_freed_memory(device)
    network = {
        "architecture": config.model,
        "width": config.width,
        "image_shape": list(dataset.image_shape),
    }
    chosen = choose(config.precision, device, network, partial(new_model, dataset, config))
    with (
        open_stage(
            target, "record.json", job, {"data": dataset.fingerprint}, chosen.precision
        ) as stage,
        tracker_of(job, config.save_folder_name, stage) as tracker,
    ):
        seed_everything(config.seed, device)
        run = Run(
            stage,
            seed=config.seed,
            device=device,
            precision=chosen.precision,
            score_every=config.score_every,
        )
        run.told = tracker.line
        job.say_settings(run)
        run.say(
            f"{job.method.name} on {dataset.name}: {len(dataset.train):,} training images"
            f" {dataset.image_shape}, {device}, {chosen.describe()}"
        )
        seen = set(dataset.train.labels.tolist())
        absent = [name for label, name in enumerate(dataset.class_names) if label not in seen]
        if absent:  # labels 0 and 5 are six classes
            run.note(
                f"{len(absent)} of the {dataset.num_classes} classes have no training image"
                f" ({', '.join(absent[:5])}{', ...' * (len(absent) > 5)})"
            )
        outcome = _attack_function(job.method)(dataset, config, run)
        if not isinstance(outcome, Outcome):
            raise UserError(
                f"{job.method.path}: attack returned {described(outcome)}: expected a"
                " backdoorlab.poisoning.Outcome"
            )
        scores = run.score(outcome.model)
        if scores.asr is not None and scores.clean_accuracy < min(
            CHANCE / dataset.num_classes, CHANCE_OF_TWO
        ):
            run.note(
                f"the model learned nothing (clean accuracy {100 * scores.clean_accuracy:.2f} %):"
                " more epochs, or another --lr"
            )
        costs = costs_of(run.spent())
        joint = (
            {"plain_scores": plain_scores(outcome, dataset, config, run)}
            if isinstance(config, JointConfig)
            else {}
        )
        _note_faint(outcome, dataset, run)
        final = fresh(stage / "final")
        crops = left_by_crops(dataset.train, outcome.train_poison, config.crop_padding)
        if crops and crops["none"] >= 0.01:
            run.note(
                f"random crops cut the whole trigger off in {100 * crops['none']:.1f} % of draws,"
                f" and keep all of it in {100 * crops['whole']:.1f} %"
            )
        info = {
            "attack": "unknown" if getattr(config, "suspicious", False) else job.method.name,
            "known_poison": not getattr(config, "suspicious", False),
            "config": config.science(),
            "dataset": record.describe(dataset, config.image_size, config.grey),
            "architecture": {
                "name": config.model,
                "width": config.width,
                "mean": outcome.model.mean.flatten().tolist(),
                "std": outcome.model.std.flatten().tolist(),
            },
            "num_classes": dataset.num_classes,
            "target": (
                getattr(config, "target_label", None)
                if getattr(config, "label_mode", None) == "all2one"
                else None
            ),
            "seed": config.seed,
            "trigger_in_crops": crops,
            "poisoned": int((outcome.train_poison.kind == POISON).sum()),
            "scores": scores.to_json(),
            **joint,
            "measured": outcome.measured,
            "notes": run.notes,
            **costs,
            **environment(device),
            **made_with(stage),
            "precision_why": chosen.why,
        }
        save_preview(final / "preview.png", dataset.test, outcome.test_poison)
        run.save_history(final)
        record.write(final, info, outcome.model, outcome.train_poison, outcome.test_poison)
        record.refuse_unreadable(final, record.read_folder)
        publish(final, target)
        tracker.final(
            after=scores.summary(),
            cost={key: costs[key] for key in ("seconds", "peak_memory_bytes")},
        )
    return Record.load(config.save_folder_name, root)


def _attack_function(method: Method) -> Callable[[Dataset, Any, Run], Outcome]:
    """The file's own `attack`, else static_attack with what the file defines."""
    pieces: dict[str, Any] = {
        name: method.function(name) for name in ("stamp", "prepare", "victims", "covers")
    }
    return method.function("attack") or (
        lambda dataset, config, run: static_attack(dataset, config, run, **pieces)
    )


def _note_faint(outcome: Outcome, dataset: Dataset, run: Run) -> None:
    """Say where a trigger changes next to nothing."""
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
    outcome: Outcome, dataset: Dataset, config: JointConfig, run: Run
) -> dict[str, Any] | None:
    """Scores of an ordinary model on what a joint attack leaves as its training set; None where the
    user wants none."""
    if not config.plain:
        return None
    before = run.spent().seconds
    model = poison_and_train(
        dataset, config, run, outcome.train_poison, outcome.test_poison, stage="plain"
    ).model
    found = run.score(model).to_json() | {"seconds": round(run.spent().seconds - before, 3)}
    if found["asr"] is not None and found["asr"] < WEAK_SNAPSHOT:
        run.note(
            f"ordinary training on the stored images gives an ASR of {100 * found['asr']:.2f} %:"
            " little for training-time defenses to prevent"
        )
    return found
