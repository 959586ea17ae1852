"""Run one defense on a record: prepare, execute, publish."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import torch
from torch import nn

from .. import record
from ..config import DefenseConfig, SplitConfig
from ..data import Dataset, Split
from ..detection import checked
from ..device import choose_device, derived_generator, keep_freed_memory, seed_everything
from ..errors import UserError
from ..metrics import COLLAPSED, SUMMARY, VERDICT, Evaluator, Scores, collapsed, der, why_no_asr
from ..record import DefenderView, Record
from ..run import Run
from ..settings.methods import Method, Role
from ..settings.parse import Trained, parse
from ..storage import reading, schema, writing
from .precision import Choice, choose
from .preview import save_sheet
from .scores import Row, ScoreLog, describe_ranking, describe_split
from .splits import Given, is_file, resolve
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
from .trusted import describe_trusted, trusted_images


@dataclass(frozen=True)
class Prepared:
    """A defense with its record, data and device, before anything is written."""

    job: Job
    record: Record
    target: Path
    """The folder of the result to write."""
    dataset: Dataset
    """The clean data that the record was made from."""
    trusted: Split | None
    trusted_notes: Sequence[str]
    """Notes on the user's folder of trusted images."""
    inputs: Mapping[str, str]
    """Name -> SHA-256 of what the run starts from."""
    device: torch.device
    choice: Choice
    """The precision of training, and why."""
    given: Given | None = None
    """The split that is to be forgotten, where the user gave one."""

    @property
    def method(self) -> Method:
        return self.job.method

    @property
    def assumes(self) -> tuple[str, ...]:
        """What the method gets: all that it assumes, and a split where it may have one."""
        own = self.method.assumes
        return own if self.given is None or "split" in own else (*own, "split")


@dataclass(frozen=True)
class Result:
    """What result.json says, in its order; the files' checksums are added when it is written."""

    schema: int
    attack: str
    defense: str
    dataset: str
    fingerprint: str
    architecture: str
    assumes: Sequence[str]
    config: Mapping[str, Any]
    seed: int
    trusted: Mapping[str, Any] | None
    """Number and SHA-256 of the trusted images."""
    kind: Role
    record: str
    """SHA-256 of the record.json that was defended."""
    given_split: Mapping[str, Any] | None
    """Name and SHA-256 of the split that was to be forgotten, and whether an oracle made it."""
    before: Mapping[str, float | None] | None
    """Scores of what the defense is compared with. None for a detector, as those that follow."""
    after: Mapping[str, float | None] | None
    der: float | None
    collapsed: bool
    per_class: Mapping[str, Any] | None
    cross: Mapping[str, float | None] | None
    triggered_predictions: Sequence[int] | None
    split: Mapping[str, Any] | None
    """Quality of the split that the defense answers with, or that it was given."""
    splits: Mapping[str, Mapping[str, Any]]
    """The same of every split that it reported, by name."""
    notes: Sequence[str]
    costs: Mapping[str, Any]
    environment: Mapping[str, Any]
    made_with: Mapping[str, Any]
    precision_why: str

    def to_json(self) -> dict[str, Any]:
        """Return the content of result.json, the entries of groups at its top."""
        return flattened(self, groups=("costs", "environment", "made_with"))


def defense_job(method: Method, argv: Sequence[str], prog: str) -> Job:
    """Parse the command line of a defense and read its record, once.

    The data set, and with it the YAML file that applies, comes from the record.

    Args:
        method: the defense.
        argv: flags and values.
        prog: the command's name, for --help.
    """
    # The parser asks for the record up to twice, and the run needs it again.
    read_once = cache(_read_record)

    def trained(config: DefenseConfig) -> Trained:
        info = read_once(config.result_file, config.record_root).info
        return Trained(info["dataset"]["name"], info["config"].get("epochs"))

    parsed = parse(method.config_class, method.name, "defense", argv, trained, prog)
    config = parsed.config
    return Job(method, config, parsed, read_once(config.result_file, config.record_root))


def run_defense(job: Job) -> dict[str, Any] | None:
    """Defend a record and write result.json.

    Returns:
        The content of result.json; None where the method stops early by its own options.
    """
    config: DefenseConfig = job.config
    config.check()
    found = job.record or _read_record(config.result_file, config.record_root)
    target = _target(found, job)
    if config.only_scores:
        return _score_saved(found, target, config)

    prepared = prepare(job, found, target)
    name = f"{found.name}/{job.method.name}/{target.name}"
    precision = prepared.choice.precision
    with (
        open_stage(
            target, "result.json", job, prepared.inputs, precision, prepared.device
        ) as stage,
        tracker_of(job, name, stage) as tracker,
    ):
        run, log = start(prepared, stage, tracker.line)
        # The stage keeps its checkpoints where the method stops early.
        finished = execute(prepared, run, log)
        if finished is None:
            run.say(f"{job.method.name} stopped early; its files are in {stage}")
            return None
        model, result = finished
        publish(prepared, model, result, run, log)
        _track(result, run, tracker.final)
    return result.to_json()


def prepare(job: Job, found: Record, target: Path) -> Prepared:
    """Load the data and the trusted images, and choose device and precision.

    Args:
        job: the defense with its settings.
        found: the record to defend.
        target: the folder of the result to write.
    """
    config: Any = job.config
    device = choose_device(config.device)
    dataset = found.dataset(config.dataset_path, config.dataset_config)

    # A continued run must start from the same record and the same trusted images.
    inputs = {"record": reading.sha256(found.folder / "record.json")}

    trusted, notes = None, tuple[str, ...]()
    if "trusted" in job.method.assumes:
        trusted, notes = trusted_images(config, found, dataset)
        images = {"images": trusted.images, "labels": trusted.labels}
        inputs["trusted images"] = reading.tensor_hash(images)

    # An unlearner needs a split; a defense with the option may have one.
    given = None
    if "split" in job.method.assumes or (isinstance(config, SplitConfig) and config.split):
        given = resolve(config.split, found, inputs["record"], config.seed)
        inputs["split"] = given.sha256

    # Where the precision is measured, the record's own network is timed.
    keep_freed_memory(device)
    architecture = found.info["architecture"]
    choice = choose(
        config.precision,
        device,
        found.model,
        name=architecture["name"],
        width=architecture["width"],
        image_shape=dataset.image_shape,
        stem=architecture.get("stem", "small"),
    )
    return Prepared(job, found, target, dataset, trusted, notes, inputs, device, choice, given)


def start(
    prepared: Prepared, stage: Path, on_line: Callable[[int, Row], None] | None = None
) -> tuple[Run, ScoreLog]:
    """Seed everything, and make the run of a method and the log of its scores.

    Args:
        prepared: the defense.
        stage: the open folder of the unfinished run.
        on_line: called with each line of history and its number, from 1.
    """
    config, found = prepared.job.config, prepared.record
    seed_everything(config.seed, prepared.device)
    log = ScoreLog(
        train_poison=found.train_poison if found.known_poison else None,
        score_every=config.score_every,
        on_line=on_line,
    )

    # The method gets the run alone, from which nothing leads to the log.
    run = Run(
        stage,
        seed=config.seed,
        device=prepared.device,
        precision=prepared.choice.precision,
        train_size=len(prepared.dataset.train),
        callbacks=log.callbacks(),
    )
    return run, log


def execute(prepared: Prepared, run: Run, log: ScoreLog) -> tuple[nn.Module | None, Result] | None:
    """Run the method and score the model that it returns; None where it stops early.

    A detector returns no model, and its split is measured in place of one.
    """
    found, method, dataset = prepared.record, prepared.method, prepared.dataset
    # The evaluator goes to the score log; the run does not keep it.
    evaluator = Evaluator(dataset.test, found.test_poison, dataset.num_classes, prepared.device)
    run.watch_scores(evaluator)
    view = view_of(prepared, run)
    if method.role == "detector":
        detection = checked(
            method.module.detect(view, prepared.job.config, run), len(dataset.train), method.path
        )
        # A detector's code may have reported the same before.
        told = None if run.suspicion is None else run.flagged
        if told is None or not torch.equal(told, detection.flagged):
            run.report_split(detection.flagged, suspicion=detection.suspicion)
        costs = costs_of(run.spent(), log.evaluation_seconds)
        return None, _result(prepared, None, None, costs, run, log)
    before = _before(found, method)

    model = _defended(prepared, view, run)
    # None is an answer only of a method that announces it: from others it is a forgotten return.
    if model is None and _may_stop_early(method.module.defend):
        return None
    _refuse_other_network(model, found, method)

    with run.uncharged():
        after = log.score(model)
    costs = costs_of(run.spent(), log.evaluation_seconds)
    return model, _result(prepared, before, after, costs, run, log)


def _defended(prepared: Prepared, view: DefenderView, run: Run) -> Any:
    """Run a defense or an unlearner. A given split that flags nothing leaves nothing to forget: the
    model is then returned as it was."""
    given, method = prepared.given, prepared.method
    if given is not None:
        run.report_split(given.flagged)
        if not given.flagged.any():
            run.note(f"the split {given.name} flags nothing, so the model is returned as it was")
            return prepared.record.model().to(prepared.device)
    return method.module.defend(view, prepared.job.config, run)


def publish(
    prepared: Prepared, model: nn.Module | None, result: Result, run: Run, log: ScoreLog
) -> None:
    """Write weights, history, split and result into a folder, and put it in its place."""
    final = fresh(run.folder / "final")
    if model is not None:
        writing.write_tensors(final / "model.safetensors", model.state_dict())
    log.save_history(final)

    # What the method reported on its way.
    for name, images in run.pictures.items():
        save_sheet(final / f"{name}.png", images)
    if run.flagged is not None and prepared.given is None:
        decided = {} if run.suspicion is None else {"suspicion": run.suspicion}
        writing.write_tensors(final / "split.safetensors", {"flagged": run.flagged, **decided})

    # Last, for its presence means done, and it lists all other files.
    content = {**result.to_json(), "files": writing.manifest(final)}
    writing.write_sealed(final / "result.json", content)
    record.refuse_unreadable(final, record.read_result)
    put_in_place(final, prepared.target)


def _target(found: Record, job: Job) -> Path:
    """Where the result is to lie."""
    run_name = run_of(job.config)
    if not schema.WORD.fullmatch(run_name):
        raise UserError(f"--run_name {run_name}: expected letters, digits, and _ . + - within")
    record.check_name(run_name)
    return found.folder / "defense" / job.method.name / run_name


def run_of(config: DefenseConfig) -> str:
    """Name a result: --run_name, else by its seed and by the given split, as several may be
    forgotten."""
    if config.run_name:
        return config.run_name
    split = getattr(config, "split", "")
    # A file goes by its own name, without its folder.
    plain = re.sub(r"[^A-Za-z0-9_.+\-]", "-", Path(split).name if is_file(split) else split)
    return f"{plain}-seed{config.seed}" if plain else f"seed{config.seed}"


def view_of(prepared: Prepared, run: Run) -> DefenderView:
    """Cut the record down to what the method assumes, and print what it gets."""
    found, method, config = prepared.record, prepared.method, prepared.job.config
    dataset, trusted = prepared.dataset, prepared.trusted
    # What the method does not assume is not drawn.
    seeds = _seeds(config, found, dataset) if "seeds" in method.assumes else None
    split = None if prepared.given is None else prepared.given.flagged.clone()
    view = record.defender_view(
        found, dataset, prepared.assumes, trusted, prepared.device, seeds, split
    )

    prepared.job.say_settings(run)
    run.say(
        f"{method.name} on record {found.name} ({found.info['attack']}, {dataset.name}),"
        f" {prepared.device}, {prepared.choice.describe()}"
    )

    # What limits the result goes into its notes.
    for note in prepared.trusted_notes:
        run.note(note)
    if trusted is not None:
        describe_trusted(trusted, config, found, dataset, run)
    if seeds is not None and not found.known_poison:
        run.note(
            "the seeds known to be clean are drawn from the record's training images, which"
            " nobody vouches for"
        )
    return view


def _result(
    prepared: Prepared,
    before: Mapping[str, Any] | None,
    after: Scores | None,
    costs: Mapping[str, Any],
    run: Run,
    log: ScoreLog,
) -> Result:
    info, config, trusted = prepared.record.info, prepared.job.config, prepared.trusted
    # A detector has no scores. Records of older versions lack some of them.
    outcome = None if after is None else after.outcome()
    keys = (*SUMMARY, *VERDICT)
    compared = None if before is None else {key: before[key] for key in keys if key in before}
    # Settings and inputs come first, then scores, then costs and environment.
    return Result(
        schema=schema.SCHEMA,
        attack=info["attack"],
        defense=prepared.method.name,
        dataset=info["dataset"]["name"],
        fingerprint=info["dataset"]["fingerprint"],
        architecture=info["architecture"]["name"],
        assumes=list(prepared.assumes),
        config=config.science(),
        seed=config.seed,
        trusted=(
            None
            if trusted is None
            else {"count": len(trusted), "sha256": prepared.inputs["trusted images"]}
        ),
        kind=prepared.method.role,
        record=prepared.inputs["record"],
        given_split=None if prepared.given is None else prepared.given.to_json(),
        before=compared,
        after=outcome,
        der=None if before is None or outcome is None else der(before, outcome),
        collapsed=before is not None and outcome is not None and collapsed(before, outcome),
        per_class=None if after is None else after.per_class,
        cross=None if after is None else after.cross,
        triggered_predictions=None if after is None else after.triggered_predictions,
        split=log.splits.get("split"),
        splits=log.splits,
        notes=run.notes,
        costs=costs,
        environment=made_on(run.folder),
        made_with=made_with(run.folder),
        precision_why=prepared.choice.why,
    )


def _track(result: Result, run: Run, final: Callable[..., None]) -> None:
    """Send the final scores and costs to the tracker."""
    final(
        before=result.before or {},
        after={**(result.after or {}), "der": result.der},
        split=result.split or {},
        cost={
            "seconds": run.progress.seconds,
            "peak_memory_bytes": run.progress.peak_memory_bytes,
        },
    )


def _may_stop_early(defend: Callable[..., Any]) -> bool:
    """Whether the annotation of `defend` says that it may return None."""
    try:
        hint = get_type_hints(defend).get("return")
    except NameError:  # a name that is imported for type checkers only
        return False
    return NoneType in get_args(hint)


def _refuse_other_network(model: Any, found: Record, method: Method) -> None:
    """Refuse what cannot be kept as weights of the record's network, and so not be read again."""
    if not isinstance(model, nn.Module):
        raise UserError(
            f"{method.path}: defend returned {type(model).__name__}: expected the model that is"
            " left, a torch.nn.Module"
        )
    try:
        schema.refuse_difference(record.shapes_of(model), found.model_shapes())
    except ValueError as error:
        raise UserError(
            f"{method.path}: defend returned another network than the record's ({error}): expected"
            " view.load_model() or view.new_model() with other weights"
        ) from error


def _before(found: Record, method: Method) -> Mapping[str, Any]:
    """The scores that a defense is compared with.

    They are those of the poisoned model. Where a defense trains a model itself and the attack
    controlled its own training, they are those of ordinary training on the same images.
    """
    if "model" in method.assumes or "plain_scores" not in found.info:
        scores: Mapping[str, Any] = found.info["scores"]
        return scores
    if found.info["plain_scores"] is None:
        raise UserError(
            f"record {found.name!r} was made with --plain False, so nothing says what training on"
            f" its images gives without {method.name}: make it again with --plain True"
        )
    plain: Mapping[str, Any] = found.info["plain_scores"]
    return plain


def _seeds(config: Any, found: Record, dataset: Dataset) -> torch.Tensor:
    """Training samples known to be clean, drawn among those that the attack left alone."""
    drawn = derived_generator(config.seed, "seeds")
    return record.draw_seeds(
        found.train_poison, dataset.train.labels, dataset.num_classes, config.seeds_per_class, drawn
    )


def _score_saved(found: Record, target: Path, config: DefenseConfig) -> dict[str, Any]:
    """Score the weights that a finished run saved, and change nothing."""
    if not (target / "result.json").exists():
        raise UserError(f"{target}: no finished run to test; finish one first")
    device = choose_device(config.device)
    dataset = found.dataset(config.dataset_path, config.dataset_config)
    result = record.read_result(target)
    model = found.model()
    record.load_weights(model, target / "model.safetensors", result["files"], found.model_shapes())

    # Its scores before the defense are those of the finished run.
    evaluator = Evaluator(dataset.test, found.test_poison, dataset.num_classes, device)
    after = evaluator(model.to(device)).outcome()
    before = result.get("before", found.info["scores"])
    return {**result, "before": before, "after": after, "der": der(before, after)}


def _read_record(name: str, root: str | None) -> Record:
    """Read and verify a record by the flags --result_file and --record_root."""
    folder = record.record_root(root)
    if not name:
        known = record.record_names(folder)
        raise UserError(
            f"--result_file NAME is missing. Records in {folder}: {', '.join(known) or 'none yet'}"
        )
    return Record.load(name, folder)


def report(result: Mapping[str, Any]) -> str:
    """Write two or three lines for a person at the end of a defense."""
    before, after = result["before"], result["after"]
    if after is None:
        return _report_detection(result)

    def change(score: str) -> str:
        return f"{100 * before[score]:.2f} -> {100 * after[score]:.2f} %"

    # ASR and RA are missing together: both are of the triggered images.
    accuracy = f"clean accuracy {change('clean_accuracy')}"
    triggered = (
        f"no ASR ({why_no_asr(result['attack'])})"
        if None in (before["asr"], after["asr"])
        else f"ASR {change('asr')}, RA {100 * after['robust_accuracy']:.2f} %"
    )
    lines = [f"{accuracy}, {triggered}, {result['seconds']:.0f} s"]
    if result["split"]:
        lines.append(describe_split(result["split"]))
    if result["collapsed"]:
        lines.append(f"COLLAPSED: {COLLAPSED}; a low ASR means nothing here")
    return "\n".join(lines)


def _report_detection(result: Mapping[str, Any]) -> str:
    """Write two lines for a person at the end of a detector, which left a split and no model."""
    split = result["split"]
    if split is None:
        return f"split kept, nobody knows how right it is, {result['seconds']:.0f} s"
    # Without poison there is nothing to rank.
    ranked = [describe_ranking(split)] if split["auroc"] is not None else []
    return "\n".join([f"{describe_split(split)}, {result['seconds']:.0f} s", *ranked])
