"""Run one defense on a record."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import data, record
from ..config import DefenseConfig
from ..data import Dataset, Split
from ..datasets.load import load_trusted
from ..device import choose_device, derived_generator, keep_freed_memory, seed_everything
from ..errors import UserError
from ..metrics import Evaluator, collapsed, der
from ..record import Record
from ..run import Run, describe_split
from ..settings.methods import Method
from ..settings.parse import Trained, parse
from ..storage import reading, schema, writing
from .environment import environment
from .precision import choose
from .preview import save_sheet
from .stage import Job, costs_of, fresh, made_with, open_stage, publish, tracker_of


def defense_job(method: Method, argv: Sequence[str], prog: str) -> Job:
    """The data set, and with it the YAML file that applies, comes from the record."""

    def trained(config: DefenseConfig) -> Trained:
        info = _record(config).info
        return Trained(info["dataset"]["name"], info["config"].get("epochs"))

    parsed = parse(method.config_class, method.name, "defense", argv, trained, prog)
    return Job(method, parsed.config, parsed)


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
    device = choose_device(config.device)
    dataset = found.dataset(config.dataset_path)
    trusted = _trusted(config, found, dataset) if "trusted" in method.assumes else None
    inputs = {"record": reading.sha256(found.folder / "record.json")}
    if trusted is not None:
        inputs["trusted images"] = reading.tensor_hash(
            {"images": trusted.images, "labels": trusted.labels}
        )
    keep_freed_memory(device)
    architecture = found.info["architecture"]
    network = {
        "architecture": architecture["name"],
        "width": architecture["width"],
        "image_shape": list(dataset.image_shape),
    }
    chosen = choose(config.precision, device, network, found.model)
    with (
        open_stage(target, "result.json", job, inputs, chosen.precision) as stage,
        tracker_of(job, f"{found.name}/{method.name}/{run_name}", stage) as tracker,
    ):
        seed_everything(config.seed, device)
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
        run.say(
            f"{method.name} on record {found.name} ({found.info['attack']}, {dataset.name}),"
            f" {device}, {chosen.describe()}"
        )
        if trusted is not None:
            _describe_trusted(trusted, config, dataset, run)
            if (
                config.trusted_path is None
                and not found.known_poison
                and found.info.get("has_train", True)
            ):
                run.note(
                    "the trusted images are drawn from the record's training images, which nobody"
                    " vouches for: pass --trusted_path if you can"
                )
        if seeds is not None and not found.known_poison:
            run.note(
                "the seeds known to be clean are drawn from the record's training images, which"
                " nobody vouches for"
            )
        before = _before(found, method)
        model = method.module.defend(view, config, run)
        if model is None and subtask != "all":
            run.say(f"subtask {subtask} is done; its files are in {stage}")
            return None
        _refuse_other_network(model, found, method)
        after = run.score(model)
        spent = run.spent()
        final = fresh(stage / "final")
        writing.write_tensors(final / "model.safetensors", model.state_dict())
        run.save_history(final)
        for name, images in run.pictures.items():
            save_sheet(final / f"{name}.png", images)
        if run.flagged is not None:
            decided = {} if run.suspicion is None else {"suspicion": run.suspicion}
            writing.write_tensors(final / "split.safetensors", {"flagged": run.flagged, **decided})
        result = {
            "schema": schema.SCHEMA,
            "attack": found.info["attack"],
            "defense": method.name,
            "dataset": found.info["dataset"]["name"],
            "fingerprint": found.info["dataset"]["fingerprint"],
            "architecture": found.info["architecture"]["name"],
            "assumes": list(method.assumes),
            "config": config.science(),
            "seed": config.seed,
            "trusted": (
                None
                if trusted is None
                else {"count": len(trusted), "sha256": inputs["trusted images"]}
            ),
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
            **costs_of(spent),
            **environment(device),
            **made_with(stage),
            "precision_why": chosen.why,
        }
        writing.write_sealed(final / "result.json", {**result, "files": writing.manifest(final)})
        record.refuse_unreadable(final, record.read_result)
        publish(final, target)
        tracker.final(
            before=result["before"],
            after={**after.summary(), "der": result["der"]},
            split=run.splits.get("split", {}),
            cost={"seconds": spent.seconds, "peak_memory_bytes": spent.peak_memory_bytes},
        )
    return result


def _refuse_other_network(model: Any, found: Record, method: Method) -> None:
    """What a defense leaves is kept as weights of the record's network: whatever is none could not
    be read again."""
    if not isinstance(model, torch.nn.Module):
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


def _before(found: Record, method: Method) -> dict[str, Any]:
    """What a defense is compared with: the poisoned model, or where it trains one itself, what
    training without it gives."""
    if "model" in method.assumes or "plain_scores" not in found.info:
        return found.info["scores"]
    if found.info["plain_scores"] is None:
        raise UserError(
            f"record {found.name!r} was made with --plain False, so nothing says what training on"
            f" its images gives without {method.name}: make it again with --plain True"
        )
    return found.info["plain_scores"]


def _trusted(config: DefenseConfig, found: Record, dataset: Dataset) -> Split:
    """A user's own images, else a draw from the clean training set."""
    if config.trusted_path is not None:
        return load_trusted(config.trusted_path, dataset, found.info["dataset"]["image_size"])
    drawn = derived_generator(config.seed, "trusted")
    return dataset.train.subset(
        data.trusted_index(
            len(dataset.train),
            ratio=config.trusted_ratio,
            count=config.trusted_count,
            generator=drawn,
        )
    )


def _seeds(config: Any, found: Record, dataset: Dataset) -> torch.Tensor:
    """Training samples known to be clean, drawn among those that the attack left alone."""
    drawn = derived_generator(config.seed, "seeds")
    return record.draw_seeds(
        found.train_poison, dataset.train.labels, dataset.num_classes, config.seeds_per_class, drawn
    )


def _describe_trusted(trusted: Split, config: DefenseConfig, dataset: Dataset, run: Run) -> None:
    """How many there are, and what a reader of the table should know about them."""
    run.say(f"{len(trusted):,} trusted images")
    missing = sorted(set(range(dataset.num_classes)) - set(trusted.labels.tolist()))
    if missing:
        names = ", ".join(dataset.class_names[label] for label in missing[:5]) + (
            ", ..." if len(missing) > 5 else ""
        )
        run.note(
            f"no trusted image of {len(missing)} of {dataset.num_classes} classes ({names}): their"
            " accuracy may be lost; give more trusted images"
        )
    batch_size = getattr(config, "batch_size", 1)
    if batch_size > len(trusted):
        run.note(
            f"batch_size {batch_size} is more than the {len(trusted)} trusted images: all of them"
            " make one batch"
        )


def _score_saved(found: Record, target: Path, config: DefenseConfig) -> dict[str, Any]:
    """Score the weights that a finished run saved, and change nothing."""
    if not (target / "result.json").exists():
        raise UserError(f"{target}: no finished run to test; run without --subtask test first")
    device = choose_device(config.device)
    dataset = found.dataset(config.dataset_path)
    result = record.read_result(target)
    model = found.model()
    record.load_weights(model, target / "model.safetensors", result["files"], found.model_shapes())
    after = Evaluator(dataset.test, found.test_poison, dataset.num_classes, device)(
        model.to(device)
    ).summary()
    before = result.get("before", found.info["scores"])
    return {**result, "before": before, "after": after, "der": der(before, after)}


def _record(config: DefenseConfig) -> Record:
    root = record.record_root(config.record_root)
    if not config.result_file:
        known = record.record_names(root)
        raise UserError(
            f"--result_file NAME is missing. Records in {root}: {', '.join(known) or 'none yet'}"
        )
    return Record.load(config.result_file, root)


def report(result: dict[str, Any]) -> str:
    """Two lines a person reads at the end of a defense."""
    before, after = result["before"], result["after"]
    percent = {key: "-" if value is None else f"{100 * value:.2f}" for key, value in after.items()}
    lines = [
        f"clean accuracy {100 * before['clean_accuracy']:.2f} -> {percent['clean_accuracy']} %, ASR"
        f" {'-' if before['asr'] is None else format(100 * before['asr'], '.2f')} ->"
        f" {percent['asr']} %, RA {percent['robust_accuracy']} %, {result['seconds']:.0f} s"
    ]
    if result["split"]:
        lines.append(describe_split(result["split"]))
    if result["collapsed"]:
        lines.append(
            "COLLAPSED: 20 points, or half, of the clean accuracy are lost; a low ASR means nothing"
            " here"
        )
    return "\n".join(lines)
