"""Run one attack into a record, or one defense on a record."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import config as configs
from . import data, datasets, engine, files, models, precision, record, schema
from .config import CleanLabelConfig, CoverConfig, DefenseConfig, JointConfig, Parsed, Trained, TrainingConfig, TriggerConfig
from .data import Dataset, Split
from .engine import Exact
from .errors import UserError, described
from .metrics import Evaluator, collapsed, der
from .models import Classifier
from .poison import CROSS, POISON, Labels, Poison, Stamp, changed_share, check_rate, check_target, left_by_crops, poison_test, poison_train
from .preview import save_preview, save_sheet
from .record import Record
from .registry import Method
from .run import Run, describe_split, environment, say
from .source import code_version
from .staging import refuse_existing, refuse_foreign

if TYPE_CHECKING:
    from .tracking import Told

CHANCE, CHANCE_OF_TWO = 1.5, 0.6
"""A clean accuracy below the first over the number of classes is that of guessing; of two classes, below the second."""
WEAK_SNAPSHOT = 0.5
"""An ASR of ordinary training on the stored set below which a joint attack's record says so."""
CONTINUED = ("checkpoint-*.safetensors", "once-*.safetensors")
"""The files of an unfinished run that it goes on from."""
FAINT = 0.001
"""Share of changed values in triggered images below which a record says so."""


@dataclass(frozen=True)
class Outcome:
    """What an attack leaves: the poisoned model, what it was trained on, and the images that ASR is measured on."""

    model: Classifier
    train_poison: Poison
    test_poison: Poison
    measured: dict[str, float | None] = field(default_factory=dict)
    """Other facts about the attack, for record.json: accuracy on cross images, PSNR, ..."""


@dataclass(frozen=True)
class Job:
    """A method with its config, ready to run."""

    method: Method
    config: Any
    parsed: Parsed | None = None

    def say_settings(self, run: Run) -> None:
        if self.parsed is not None and self.parsed.origins:
            run.say(f"settings: {self.parsed.describe()}; all others are defaults, see --help")


def attack_job(method: Method, argv: Sequence[str], prog: str) -> Job:
    parsed = configs.parse(method.config_class, method.name, "attack", argv, lambda c: Trained(c.dataset, c.epochs), prog)
    return Job(method, parsed.config, parsed)


def defense_job(method: Method, argv: Sequence[str], prog: str) -> Job:
    """The data set, and with it the YAML file that applies, comes from the record."""

    def trained(config: DefenseConfig) -> Trained:
        info = _record(config).info
        return Trained(info["dataset"]["name"], info["config"].get("epochs"))

    parsed = configs.parse(method.config_class, method.name, "defense", argv, trained, prog)
    return Job(method, parsed.config, parsed)


# --- attack ------------------------------------------------------------------------------------------------------


def run_attack(job: Job) -> Record:
    """Poison, train, score, and publish the record whole."""
    config = job.config
    config.check()
    if not config.save_folder_name:
        raise UserError("--save_folder_name NAME is missing: the record will be record/NAME")
    record.check_name(config.save_folder_name)
    root = record.record_root(config.record_root)
    target = root / config.save_folder_name
    device = engine.choose_device(config.device)
    if isinstance(config, TriggerConfig):
        _check_poisoning(config, job.method.name)
    dataset = datasets.load(config.dataset, config.dataset_path, image_size=config.image_size, grey=config.grey)
    if isinstance(config, TriggerConfig):
        check_target(config.target_label, dataset.num_classes)
    engine.keep_freed_memory(device)
    network = {"architecture": config.model, "width": config.width, "image_shape": list(dataset.image_shape)}
    chosen = precision.choose(config.precision, device, network, partial(new_model, dataset, config))
    with (
        _stage(target, "record.json", job, {"data": dataset.fingerprint}, chosen.precision) as stage,
        _tracked(job, config.save_folder_name, stage) as tracker,
    ):
        engine.seed_everything(config.seed, device)
        run = Run(stage, seed=config.seed, device=device, precision=chosen.precision, score_every=config.score_every)
        run.told = tracker.line
        job.say_settings(run)
        run.say(f"{job.method.name} on {dataset.name}: {len(dataset.train):,} training images {dataset.image_shape}, {device}, {chosen.describe()}")
        seen = set(dataset.train.labels.tolist())
        absent = [name for label, name in enumerate(dataset.class_names) if label not in seen]
        if absent:  # labels 0 and 5 are six classes
            run.note(
                f"{len(absent)} of the {dataset.num_classes} classes have no training image ({', '.join(absent[:5])}{', ...' * (len(absent) > 5)})"
            )
        outcome = _attack_function(job.method)(dataset, config, run)
        if not isinstance(outcome, Outcome):
            raise UserError(f"{job.method.path}: attack returned {described(outcome)}: expected a backdoorlab.runner.Outcome")
        scores = run.score(outcome.model)
        if scores.asr is not None and scores.clean_accuracy < min(CHANCE / dataset.num_classes, CHANCE_OF_TWO):
            run.note(f"the model learned nothing (clean accuracy {100 * scores.clean_accuracy:.2f} %): more epochs, or another --lr")
        costs = _costs(run.spent())
        joint = {"plain_scores": plain_scores(outcome, dataset, config, run)} if isinstance(config, JointConfig) else {}
        _note_faint(outcome, dataset, run)
        final = _fresh(stage / "final")
        crops = left_by_crops(dataset.train, outcome.train_poison, config.crop_padding)
        if crops and crops["none"] >= 0.01:
            run.note(
                f"random crops cut the whole trigger off in {100 * crops['none']:.1f} % of draws, and keep all of it in {100 * crops['whole']:.1f} %"
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
            "target": getattr(config, "target_label", None) if getattr(config, "label_mode", None) == "all2one" else None,
            "seed": config.seed,
            "trigger_in_crops": crops,
            "poisoned": int((outcome.train_poison.kind == POISON).sum()),
            "scores": scores.to_json(),
            **joint,
            "measured": outcome.measured,
            "notes": run.notes,
            **costs,
            **environment(device),
            **_made_with(stage),
            "precision_why": chosen.why,
        }
        save_preview(final / "preview.png", dataset.test, outcome.test_poison)
        run.save_history(final)
        record.write(final, info, outcome.model, outcome.train_poison, outcome.test_poison)
        record.refuse_unreadable(final, record.read_folder)
        _publish(final, target)
        tracker.final(after=scores.summary(), cost={key: costs[key] for key in ("seconds", "peak_memory_bytes")})
    return Record.load(config.save_folder_name, root)


def _attack_function(method: Method) -> Callable[[Dataset, Any, Run], Outcome]:
    """The file's own `attack`, else static_attack with what the file defines."""
    pieces: dict[str, Any] = {name: method.function(name) for name in ("stamp", "prepare", "victims", "covers")}
    return method.function("attack") or (lambda dataset, config, run: static_attack(dataset, config, run, **pieces))


Choice = Callable[[torch.Tensor, str, Any], torch.Tensor]
"""choice(labels, split, config): int64 (N,), "train" or "test" -> bool (N,), the images that may be taken."""


def static_attack(
    dataset: Dataset,
    config: Any,
    run: Run,
    stamp: Callable[..., torch.Tensor],
    prepare: Callable[..., dict[str, Any]] | None = None,
    victims: Choice | None = None,
    covers: Choice | None = None,
) -> Outcome:
    """Any attack that is a function of images: stamp a share of the training set, then train in the ordinary way.

    prepare(dataset, config, run): what the stamp needs besides config and seed, as its keyword arguments.
    victims: whom the attack is meant for, in either split; default everyone, or the target class in training where the attack keeps labels.
    covers: who may be stamped with the true label in training; default everyone. Read where the config has a cover_rate.
    """
    prepared = prepare(dataset, config, run) if prepare else {}
    if not isinstance(prepared, dict):
        raise UserError(f"prepare(dataset, config, run) must return the stamp's further arguments by name, a dict, got {described(prepared)}")
    fixed: Stamp = partial(stamp, config=config, **prepared)
    labels = Labels(config.target_label, config.label_mode, dataset.num_classes)
    train_poison = _poisoned_training_set(dataset.train, fixed, labels, config, run, victims, covers)
    meant = _chosen(victims, "victims", dataset.test, "test", config) if victims else None
    test_poison = poison_test(dataset.test, fixed, labels, victims=meant)
    if 0 in (changed_share(dataset.train, train_poison), changed_share(dataset.test, test_poison)):
        raise UserError("the trigger leaves every value of these images as it is, so there is nothing to learn: make it stronger, see --help")
    return poison_and_train(dataset, config, run, train_poison, test_poison)


def _poisoned_training_set(
    train: Split, stamp: Stamp, labels: Labels, config: Any, run: Run, victims: Choice | None, covers: Choice | None
) -> Poison:
    """Draw victims and covers; what cannot be had is capped, and said."""
    size = len(train)
    pool = _chosen(victims, "victims", train, "train", config) if victims else torch.ones(size, dtype=torch.bool)
    if isinstance(config, CleanLabelConfig):
        pool = pool & (train.labels == config.target_label)
        rate = config.poison_rate if config.poison_rate is not None else _share_of_class(config, int(pool.sum())) / size
    else:
        rate = config.poison_rate
    cover_rate = config.cover_rate if isinstance(config, CoverConfig) else 0.0
    free = _chosen(covers, "covers", train, "train", config) if covers else None
    drawn = engine.derived_generator(config.seed, "victims")
    poison = poison_train(train, stamp, labels, poison_rate=rate, generator=drawn, victims=pool, cover_rate=cover_rate, covers=free)
    found, crossed = (int((poison.kind == kind).sum()) for kind in (POISON, CROSS))
    if cover_rate and not round(cover_rate * size):
        run.note(f"cover_rate {cover_rate:g} of {size:,} training images is no image at all: the attack has no covers")
    for asked, got, what in ((round(rate * size), found, "poison_rate"), (round(cover_rate * size), crossed, "cover_rate")):
        if got < asked:
            run.note(f"{what} asks for {asked:,} of {size:,} training images, but this attack can have {got:,}: it takes those")
    if isinstance(config, CleanLabelConfig):
        of_class = int((train.labels == config.target_label).sum())
        shares = f"{100 * found / of_class:.1f} % of class {config.target_label}, {100 * found / size:.2f} % of the training set"
        said = f"{found:,} images poisoned: {shares}"
        run.note(said if found < of_class else f"{said}; no clean one is left, so its clean accuracy measures a missing class")
    return poison


def _chosen(choice: Choice, name: str, split: Split, which: str, config: Any) -> torch.Tensor:
    found = choice(split.labels, which, config)
    if not isinstance(found, torch.Tensor) or found.dtype != torch.bool or found.shape != split.labels.shape:
        raise UserError(f"{name}(labels, {which!r}, config) must return who may be taken, bool ({len(split)},), got {described(found)}")
    return found


def _share_of_class(config: CleanLabelConfig, of_class: int) -> float:
    """clean_label_ratio as a number of images."""
    if not of_class:
        raise UserError(f"class {config.target_label} has no training image, and this attack poisons no other class: choose another --target_label")
    if not round(config.clean_label_ratio * of_class):
        raise UserError(
            f"clean_label_ratio {config.clean_label_ratio} of the {of_class:,} training images of class {config.target_label} is no image at all:"
            " raise --clean_label_ratio"
        )
    return config.clean_label_ratio * of_class


def _note_faint(outcome: Outcome, dataset: Dataset, run: Run) -> None:
    """Say where a trigger changes next to nothing."""
    for name, clean, poison in (("training", dataset.train, outcome.train_poison), ("test", dataset.test, outcome.test_poison)):
        share = changed_share(clean, poison)
        if share is not None and share < FAINT:
            run.note(f"the trigger changes {100 * share:.3f} % of the values of the poisoned {name} images: next to nothing to learn")


def _check_poisoning(config: Any, name: str) -> None:
    """Refuse rates and labels that no data set would make right."""
    if getattr(config, "poison_rate", None) is not None:
        check_rate(config.poison_rate)
    if isinstance(config, CleanLabelConfig) and config.label_mode != "all2one":
        raise UserError(f"{name} changes no label, so it has one target: expected --label_mode all2one, got {config.label_mode}")


def poison_and_train(dataset: Dataset, config: TrainingConfig, run: Run, train_poison: Poison, test_poison: Poison, stage: str = "train") -> Outcome:
    """Train a fresh model on the poisoned set in the ordinary way, scored after each epoch."""
    model = new_model(dataset, config).to(run.device)
    run.watch_scores(Evaluator(dataset.test, test_poison, dataset.num_classes, run.device))
    received = data.place(train_poison.apply(dataset.train), run.device)
    engine.train(model, received, config.recipe(), run, stage=stage)
    return Outcome(model, train_poison, test_poison)


def plain_scores(outcome: Outcome, dataset: Dataset, config: JointConfig, run: Run) -> dict[str, Any] | None:
    """Scores of an ordinary model on what a joint attack leaves as its training set; None where the user wants none."""
    if not config.plain:
        return None
    before = run.spent().seconds
    model = poison_and_train(dataset, config, run, outcome.train_poison, outcome.test_poison, stage="plain").model
    found = run.score(model).to_json() | {"seconds": round(run.spent().seconds - before, 3)}
    if found["asr"] is not None and found["asr"] < WEAK_SNAPSHOT:
        run.note(f"ordinary training on the stored images gives an ASR of {100 * found['asr']:.2f} %: little for training-time defenses to prevent")
    return found


def new_model(dataset: Dataset, config: TrainingConfig) -> Classifier:
    """The model that the config names, freshly initialised, normalised by the config's numbers or the data's own."""
    measured = data.channel_statistics(dataset.train) if config.mean is None or config.std is None else ((), ())
    mean = measured[0] if config.mean is None else config.mean
    std = measured[1] if config.std is None else config.std
    channels = dataset.image_shape[0]
    if len(mean) != channels or len(std) != channels:
        raise UserError(f"--mean and --std need {channels} numbers each for these images, got {len(mean)} and {len(std)}")
    return models.build(
        config.model,
        num_classes=dataset.num_classes,
        in_chans=channels,
        mean=mean,
        std=std,
        width=config.width,
        image_size=dataset.image_shape[1],
    )


# --- defense -----------------------------------------------------------------------------------------------------


def run_defense(job: Job) -> dict[str, Any] | None:
    """Defend a record and write result.json; None where a subtask stops earlier."""
    config: DefenseConfig = job.config
    config.check()
    found = _record(config)
    method, run_name = job.method, config.run_name or f"seed{config.seed}"
    if not schema.WORD.fullmatch(run_name):
        raise UserError(f"--run_name {run_name}: expected letters, digits, and _ . + - within")
    record.check_name(run_name)
    target = found.folder / "defense" / method.name / run_name
    subtask = getattr(config, "subtask", "all")
    if subtask == "test":
        return _score_saved(found, target, config)
    device = engine.choose_device(config.device)
    dataset = found.dataset(config.dataset_path)
    trusted = _trusted(config, found, dataset) if "trusted" in method.assumes else None
    inputs = {"record": files.sha256(found.folder / "record.json")}
    if trusted is not None:
        inputs["trusted images"] = files.tensor_hash({"images": trusted.images, "labels": trusted.labels})
    engine.keep_freed_memory(device)
    architecture = found.info["architecture"]
    network = {"architecture": architecture["name"], "width": architecture["width"], "image_shape": list(dataset.image_shape)}
    chosen = precision.choose(config.precision, device, network, found.model)
    with (
        _stage(target, "result.json", job, inputs, chosen.precision) as stage,
        _tracked(job, f"{found.name}/{method.name}/{run_name}", stage) as tracker,
    ):
        engine.seed_everything(config.seed, device)
        run = Run(
            stage,
            seed=config.seed,
            device=device,
            precision=chosen.precision,
            train_poison=found.train_poison if found.known_poison else None,
            train_size=len(dataset.train),
            score_every=config.score_every,
        )
        run.told = tracker.line
        run.watch_scores(Evaluator(dataset.test, found.test_poison, dataset.num_classes, device))
        seeds = _seeds(config, found, dataset) if "seeds" in method.assumes else None
        view = record.defender_view(found, dataset, method.assumes, trusted, device, seeds)
        job.say_settings(run)
        run.say(f"{method.name} on record {found.name} ({found.info['attack']}, {dataset.name}), {device}, {chosen.describe()}")
        if trusted is not None:
            _describe_trusted(trusted, config, dataset, run)
            if config.trusted_path is None and not found.known_poison and found.info.get("has_train", True):
                run.note("the trusted images are drawn from the record's training images, which nobody vouches for: pass --trusted_path if you can")
        if seeds is not None and not found.known_poison:
            run.note("the seeds known to be clean are drawn from the record's training images, which nobody vouches for")
        before = _before(found, method)
        model = method.module.defend(view, config, run)
        if model is None and subtask != "all":
            run.say(f"subtask {subtask} is done; its files are in {stage}")
            return None
        _refuse_other_network(model, found, method)
        after = run.score(model)
        spent = run.spent()
        final = _fresh(stage / "final")
        files.write_tensors(final / "model.safetensors", model.state_dict())
        run.save_history(final)
        for name, images in run.pictures.items():
            save_sheet(final / f"{name}.png", images)
        if run.flagged is not None:
            decided = {} if run.suspicion is None else {"suspicion": run.suspicion}
            files.write_tensors(final / "split.safetensors", {"flagged": run.flagged, **decided})
        result = {
            "schema": record.SCHEMA,
            "attack": found.info["attack"],
            "defense": method.name,
            "dataset": found.info["dataset"]["name"],
            "fingerprint": found.info["dataset"]["fingerprint"],
            "architecture": found.info["architecture"]["name"],
            "assumes": list(method.assumes),
            "config": config.science(),
            "seed": config.seed,
            "trusted": None if trusted is None else {"count": len(trusted), "sha256": inputs["trusted images"]},
            "before": {key: before[key] for key in ("clean_accuracy", "asr", "robust_accuracy")},
            "after": after.summary(),
            "der": der(before, after.summary()),
            "collapsed": collapsed(before, after.summary()),
            "per_class": after.per_class,
            "cross": after.cross,
            "triggered_predictions": after.triggered_predictions,
            "split": run.splits.get("split"),
            "splits": run.splits,
            "notes": run.notes,
            **_costs(spent),
            **environment(device),
            **_made_with(stage),
            "precision_why": chosen.why,
        }
        files.write_sealed(final / "result.json", {**result, "files": files.manifest(final)})
        record.refuse_unreadable(final, record.read_result)
        _publish(final, target)
        tracker.final(
            before=result["before"],
            after={**after.summary(), "der": result["der"]},
            split=run.splits.get("split", {}),
            cost={"seconds": spent.seconds, "peak_memory_bytes": spent.peak_memory_bytes},
        )
    return result


def _refuse_other_network(model: Any, found: Record, method: Method) -> None:
    """What a defense leaves is kept as weights of the record's network: whatever is none could not be read again."""
    if not isinstance(model, torch.nn.Module):
        raise UserError(f"{method.path}: defend returned {type(model).__name__}: expected the model that is left, a torch.nn.Module")
    try:
        schema.refuse_difference(record.shapes_of(model), found.model_shapes())
    except ValueError as error:
        raise UserError(
            f"{method.path}: defend returned another network than the record's ({error}): expected view.model or view.new_model() with other weights"
        ) from error


def _before(found: Record, method: Method) -> dict[str, Any]:
    """What a defense is compared with: the poisoned model, or where it trains one itself, what training without it gives."""
    if "model" in method.assumes or "plain_scores" not in found.info:
        return found.info["scores"]
    if found.info["plain_scores"] is None:
        raise UserError(
            f"record {found.name!r} was made with --plain False, so nothing says what training on its images gives without {method.name}:"
            " make it again with --plain True"
        )
    return found.info["plain_scores"]


def _tracked(job: Job, name: str, stage: Path) -> AbstractContextManager["Told"]:
    """Who else hears of a run; the import waits until someone asks, as the trackers are no part of what makes a number."""
    from .tracking import tracked

    return tracked(job.config.track, job.config.track_folder, name, job.config.science(), stage, say)


def _trusted(config: DefenseConfig, found: Record, dataset: Dataset) -> Split:
    """A user's own images, else a draw from the clean training set."""
    if config.trusted_path is not None:
        return datasets.load_trusted(config.trusted_path, dataset, found.info["dataset"]["image_size"])
    drawn = engine.derived_generator(config.seed, "trusted")
    return dataset.train.subset(data.trusted_index(len(dataset.train), ratio=config.trusted_ratio, count=config.trusted_count, generator=drawn))


def _seeds(config: Any, found: Record, dataset: Dataset) -> torch.Tensor:
    """Training samples known to be clean, drawn among those that the attack left alone."""
    drawn = engine.derived_generator(config.seed, "seeds")
    return record.draw_seeds(found.train_poison, dataset.train.labels, dataset.num_classes, config.seeds_per_class, drawn)


def _describe_trusted(trusted: Split, config: DefenseConfig, dataset: Dataset, run: Run) -> None:
    """How many there are, and what a reader of the table should know about them."""
    run.say(f"{len(trusted):,} trusted images")
    missing = sorted(set(range(dataset.num_classes)) - set(trusted.labels.tolist()))
    if missing:
        names = ", ".join(dataset.class_names[label] for label in missing[:5]) + (", ..." if len(missing) > 5 else "")
        run.note(
            f"no trusted image of {len(missing)} of {dataset.num_classes} classes ({names}): their accuracy may be lost; give more trusted images"
        )
    batch_size = getattr(config, "batch_size", 1)
    if batch_size > len(trusted):
        run.note(f"batch_size {batch_size} is more than the {len(trusted)} trusted images: all of them make one batch")


def _score_saved(found: Record, target: Path, config: DefenseConfig) -> dict[str, Any]:
    """Score the weights that a finished run saved, and change nothing."""
    if not (target / "result.json").exists():
        raise UserError(f"{target}: no finished run to test; run without --subtask test first")
    device = engine.choose_device(config.device)
    dataset = found.dataset(config.dataset_path)
    result = record.read_result(target)
    model = found.model()
    record.load_weights(model, target / "model.safetensors", result["files"], found.model_shapes())
    after = Evaluator(dataset.test, found.test_poison, dataset.num_classes, device)(model.to(device)).summary()
    before = result.get("before", found.info["scores"])
    return {**result, "before": before, "after": after, "der": der(before, after)}


# --- folders -----------------------------------------------------------------------------------------------------


def _record(config: DefenseConfig) -> Record:
    root = record.record_root(config.record_root)
    if not config.result_file:
        known = record.record_names(root)
        raise UserError(f"--result_file NAME is missing. Records in {root}: {', '.join(known) or 'none yet'}")
    return Record.load(config.result_file, root)


@contextmanager
def _stage(target: Path, done: str, job: Job, inputs: Mapping[str, str], computes_in: Exact) -> Iterator[Path]:
    """The unfinished folder of a run beside its target: locked, and continued only by the same settings on the same inputs (name -> SHA-256).

    A run that overwrites is continued by the same command only, while what it is to replace is what it was when the run began.
    """
    config = job.config
    refuse_existing(target, done, config.overwrite)
    files.tidy(target.parent)
    files.sweep(target.parent, partial(_worthless, done=done))
    path = target.with_name(f"{target.name}.partial")
    with files.locked(path):
        refuse_existing(target, done, config.overwrite)
        for torn in path.glob(".*.tmp"):
            files.remove(torn)
        settings = {"method": job.method.name, "config": config.science(), "inputs": dict(inputs)}
        made = {"code": code_version(job.method.path), "precision": computes_in}
        marker = path / "run.json"
        finished = _checksum(target / done) if config.overwrite else None
        replaces = {} if finished is None else {"replaces": finished}  # with nothing to replace, the flag changes nothing
        wanted = {**settings, **replaces, "code": made["code"]}
        if marker.exists() and _begun(path) and (not config.overwrite or _was_begun_by(path, wanted)):
            begun = files.read_json(marker)
            begun.pop("replaces", None)
            begun.setdefault("inputs", settings["inputs"])  # one of an older version does not say
            before = {"code": begun.pop("code", "?"), "precision": begun.pop("precision", schema.UNKNOWN)}
            _check_same(path, begun, settings)
            made = {key: old if old.split("+")[-1] == made[key] else f"{old}+{made[key]}" for key, old in before.items()}
        else:
            refuse_foreign(path, marker.name)
            for entry in files.entries(path):
                files.remove(entry)
        files.write_json(marker, {**settings, **made, **replaces})
        try:
            yield path
        except BaseException:
            if not _begun(path):
                files.remove(path)
            raise


def _made_with(stage: Path) -> dict[str, str]:
    """Which code a run is made by, and in which precision: one, or all of them, where one went on with what another had begun."""
    begun = files.read_json(stage / "run.json")
    return {key: begun[key] for key in ("code", "precision")}


def _begun(path: Path) -> bool:
    """Whether an unfinished run has anything worth continuing."""
    return any(any(path.glob(pattern)) for pattern in CONTINUED)


def _worthless(stage: Path, done: str) -> bool:
    """Whether a stage that nobody holds is ours and will never be continued: it holds no checkpoint, or its run is finished."""
    names = {entry.name for entry in stage.iterdir()}
    ours = "run.json" in names or names <= {files.HOLDER}
    finished = stage.with_name(stage.name.removesuffix(".partial")) / done
    return ours and (not _begun(stage) or (finished.exists() and not _is_to_replace(stage, finished)))


def _is_to_replace(stage: Path, finished: Path) -> bool:
    """Whether the unfinished run was begun with --overwrite True over this very result."""
    try:
        return files.read_json(stage / "run.json").get("replaces") == _checksum(finished)
    except (UserError, OSError):
        return False


def _was_begun_by(path: Path, wanted: dict[str, Any]) -> bool:
    """Whether an unfinished run was begun with all that is wanted, and can be read: --overwrite True starts again what cannot."""
    try:
        if not wanted.items() <= files.read_json(path / "run.json").items():
            return False
        for pattern in CONTINUED:
            for saved in path.glob(pattern):
                files.read_tensors(saved)
    except UserError:
        return False
    return True


def _checksum(finished: Path) -> str | None:
    """SHA-256 of the file that says a run is done; None where there is none."""
    return files.sha256(finished) if finished.exists() else None


def _check_same(path: Path, begun: dict[str, Any], now: dict[str, Any]) -> None:
    if begun == now:
        return
    old, new = begun.get("config", {}), now["config"]
    changed = [f"{key} {old.get(key)} -> {new.get(key)}" for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    changed += [f"other {name}" for name, value in now["inputs"].items() if begun["inputs"].get(name) != value]
    changed = changed or [f"{begun.get('method')} -> {now['method']}"]
    raise UserError(
        f"{path} holds an unfinished run with other settings ({', '.join(changed)}):"
        " use the same settings to continue it, --overwrite True to start again, or another name"
    )


def _publish(final: Path, target: Path) -> None:
    """Put a finished folder in its place, then drop the stage around it."""
    files.put(final, target)
    files.remove(final.parent)


def _fresh(folder: Path) -> Path:
    files.remove(folder)
    folder.mkdir()
    return folder


def _costs(spent: Any) -> dict[str, Any]:
    return {
        "seconds": round(spent.seconds, 3),
        "evaluation_seconds": round(spent.evaluation_seconds, 3),
        "image_passes": {"forward": spent.forward, "backward": spent.backward},
        "peak_memory_bytes": spent.peak_memory_bytes,
    }


def report(result: dict[str, Any]) -> str:
    """Two lines a person reads at the end of a defense."""
    before, after = result["before"], result["after"]
    percent = {key: "-" if value is None else f"{100 * value:.2f}" for key, value in after.items()}
    lines = [
        f"clean accuracy {100 * before['clean_accuracy']:.2f} -> {percent['clean_accuracy']} %,"
        f" ASR {'-' if before['asr'] is None else format(100 * before['asr'], '.2f')} -> {percent['asr']} %,"
        f" RA {percent['robust_accuracy']} %, {result['seconds']:.0f} s"
    ]
    if result["split"]:
        lines.append(describe_split(result["split"]))
    if result["collapsed"]:
        lines.append("COLLAPSED: 20 points, or half, of the clean accuracy are lost; a low ASR means nothing here")
    return "\n".join(lines)
