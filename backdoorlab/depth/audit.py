"""audit: what the attacker measures of a defended model. Is the backdoor gone, or only quiet?

Every test runs on the model of a finished result and on three controls: a clean model, exact
purification, and the undefended model. Values are kept after each test, in depth.json beside the
result and in record/<name>/controls/, so that a killed audit goes on.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tyro.conf import Positional

from ..device import choose_device, keep_freed_memory, seed_everything
from ..errors import UserError, one_line, suggest
from ..execution.environment import environment
from ..record import Record, every_name, record_root
from ..storage import locks, reading, schema, writing
from ..tables import audits, layout
from ..tables import rows as measured
from . import batch_statistics, controls, linear_path, reactivate, retune, score, similarity, view
from .controls import CONTROLS
from .view import AttackerView

TESTS = {
    "retune": "P-ASR",
    "statistics": "ASR with new batch statistics",
    "reactivate": "excess re-activation",
    "path": "t50",
    "similarity": "similarity",
}
"""Test -> what its number is called."""


@dataclass(frozen=True)
class Audit:
    """Ask of finished results whether the backdoor is gone, or comes back after a little
    fine-tuning. `table` then shows their depth."""

    names: Positional[tuple[str, ...]] = ()
    """Records to audit. None: all."""
    defense: str = "all"
    """Defenses whose results are audited, separated by commas; all: each that has a result."""
    tests: str = ",".join(TESTS)
    """Tests to make, separated by commas. Only retune is needed for the depth."""
    seed: int = 0
    """Seed of all draws. Another one draws other images for fine-tuning."""
    clean: str | None = None
    """Record of attack none whose model is the clean control. None: a clean model is trained, once
    for each record, which takes as long as the attack's own training."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dataset_path: str | None = None
    """Folder of the data, where the cache has lost them."""
    dataset_config: str | None = None
    """Configuration of parquet shards, where that folder has several."""
    overwrite: bool = False
    """Replace what an audit with other settings has found."""
    record_root: str | None = None
    """Folder of the records. None: $BACKDOORLAB_RECORDS, else record/ of the checkout, else
    ./record."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass
class Subject:
    """A model under test, and the file of its values."""

    path: Path
    kind: str
    """One of CONTROLS, or "result"."""
    load: Callable[[], nn.Module]
    """Returns the model in evaluation mode, on the device."""
    model: str
    """SHA-256 of the audited weights; of the poisoned model's for a control."""
    title: str
    """What lines on it begin with."""
    why: str | None = None
    """Why no test is made of it; None where it can be."""
    tests: dict[str, Any] = field(default_factory=dict)


def audit(options: Audit) -> int:
    """Audit records and print a line for each model; 2 if a result was damaged."""
    wanted = _chosen_tests(options.tests)
    root = record_root(options.record_root)
    device = choose_device(options.device)
    keep_freed_memory(device)

    damaged: list[measured.Damaged] = []
    for name in options.names or every_name(root):
        record = Record.load(name, root)
        found = _results(record, options.defense, damaged.append)
        audit_record(record, found, wanted, options, device)
    return layout.complain(damaged)


def audit_record(
    record: Record,
    results: Sequence[tuple[Path, Mapping[str, Any]]],
    wanted: Sequence[str],
    options: Audit,
    device: torch.device,
    say: Callable[[str], None] = print,
) -> None:
    """Audit results of one record, its controls first.

    Args:
        record: the record.
        results: (folder, content of result.json) of each.
        wanted: names of the tests.
        options: seed, and where data and the clean model are.
        device: where the tests run.
        say: takes a line for each model.
    """
    folder = record.folder / "controls"
    why = view.refusal(record)
    # Without anything to test, no data are loaded and no control is trained.
    if why is not None:
        for target, result in results:
            one = _refused(record, target, result, why)
            _finish(one, {}, options)
            say(f"{one.title}: - ({why})")
        return

    dataset = record.dataset(options.dataset_path, options.dataset_config)
    attacker = AttackerView(record, dataset, device, options.seed)
    with locks.locked(folder):
        of_controls = {one.kind: one for one in _control_subjects(attacker, folder, options)}
        for one in of_controls.values():
            _test(one, attacker, wanted, options)
        for one in of_controls.values():
            _finish(one, of_controls, options)
            say(_line(one))

        for target, result in results:
            one = _subject(record, target, result, device)
            _test(one, attacker, wanted, options)
            _finish(one, of_controls, options)
            say(_line(one))


# --- which models


def _results(
    record: Record, defenses: str, on_damage: Callable[[measured.Damaged], None]
) -> list[tuple[Path, dict[str, Any]]]:
    """The finished results of the defenses that the user named."""
    found = measured.finished(record, None, on_damage)
    if defenses == "all":
        return found

    # A defense without a result would be left out in silence.
    known = sorted({folder.parent.name for folder, _ in found})
    chosen = [word.strip() for word in defenses.split(",") if word.strip()]
    for word in chosen:
        if word not in known:
            raise UserError(
                f"--defense {word}: record {record.name!r} has no finished result of it."
                f"{suggest(word, known)} Finished: {', '.join(known) or 'none'}"
            )
    return [(folder, result) for folder, result in found if folder.parent.name in chosen]


def _chosen_tests(text: str) -> list[str]:
    """Read --tests, in the order of TESTS."""
    # Whatever the user's order, the test that depth needs comes first.
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words:
        if word not in TESTS:
            raise UserError(
                f"--tests {word}: no test of that name.{suggest(word, list(TESTS))} Known:"
                f" {', '.join(TESTS)}"
            )
    if not words:
        raise UserError(f"--tests: expected at least one of {', '.join(TESTS)}")
    return [test for test in TESTS if test in words]


def _control_subjects(attacker: AttackerView, folder: Path, options: Audit) -> list[Subject]:
    """The three controls, none of which is loaded yet."""
    record = attacker.record
    root = record.folder.parent
    # Looked at before anything is trained or tested.
    clean = options.clean
    other = None if clean is None else controls.model_of(Record.load(clean, root), record)
    sources: dict[str, Callable[[], nn.Module]] = {
        "undefended": lambda: record.model().to(attacker.device).eval(),
        "clean": partial(controls.clean_model, attacker, folder, other),
        "exact": partial(controls.exact_purification, attacker, folder),
    }
    model = record.info["files"]["model.safetensors"]["sha256"]
    return [
        Subject(
            folder / f"{kind}.json", kind, cache(sources[kind]), model, f"{record.name} ({kind})"
        )
        for kind in CONTROLS
    ]


def _subject(
    record: Record, folder: Path, result: Mapping[str, Any], device: torch.device
) -> Subject:
    """A defended model, or why it is not worth a test."""
    if measured.defended(record, folder, result).collapsed:
        return _refused(
            record, folder, result, "COLLAPSED: a model that does not work has no depth"
        )

    def load() -> nn.Module:
        return record.model_in(folder, result).to(device).eval()

    return _of_result(record, folder, result, cache(load))


def _refused(record: Record, folder: Path, result: Mapping[str, Any], why: str) -> Subject:
    def nothing() -> nn.Module:
        raise AssertionError("a refused model is not loaded")

    return _of_result(record, folder, result, nothing, why)


def _of_result(
    record: Record,
    folder: Path,
    result: Mapping[str, Any],
    load: Callable[[], nn.Module],
    why: str | None = None,
) -> Subject:
    title = f"{record.name} {folder.parent.name} {folder.name}"
    path = folder / audits.FILE
    return Subject(path, "result", load, audits.weights(result), title, why)


# --- tests


def _test(one: Subject, attacker: AttackerView, wanted: Sequence[str], options: Audit) -> None:
    """Make the tests that are wanted and not kept, and keep each as soon as it is made."""
    one.tests = _kept(one, options)
    if one.why is not None:
        return
    for name in wanted:
        if name not in one.tests:
            began = time.perf_counter()
            one.tests[name] = _made(one, attacker, name)
            _write(one, {}, [], options)
            # Of large data a test takes minutes.
            seconds = time.perf_counter() - began
            print(f"  {one.title}: {name}  seconds {seconds:.1f}", file=sys.stderr, flush=True)

    # A control is compared with itself by other draws, at the one n that depth uses.
    if one.kind in ("undefended", "clean") and "retune" in wanted and "check" not in one.tests:
        one.tests["check"] = _made(one, attacker, "check")
        _write(one, {}, [], options)


def _made(one: Subject, attacker: AttackerView, name: str) -> dict[str, Any]:
    """Make one test; {"why": clause} where this model or record has no such number."""
    why = {
        "retune": retune.refusal,
        "check": retune.refusal,
        "reactivate": reactivate.refusal,
    }.get(name, _no_refusal)(attacker)
    if why is not None:
        return {"why": why}

    # Whatever a network draws by itself is the same in a continued audit.
    seed_everything(attacker.seed, attacker.device)
    if one.kind == "result":
        one.load()  # a damaged file is an error, and no reason for a dash
    try:
        return _run(one.load(), attacker, name)
    except UserError as error:
        return {"why": one_line(str(error))}


def _no_refusal(_attacker: AttackerView) -> str | None:
    return None


def _run(model: nn.Module, attacker: AttackerView, name: str) -> dict[str, Any]:
    """Make one test of a model."""
    match name:
        case "retune":
            return retune.retune(attacker, model)
        case "check":
            return retune.retune(attacker, model, [int(score.COUNT)], retune.CHECKS)
        case "reactivate":
            return reactivate.reactivate(attacker, model)
        case "statistics":
            why = batch_statistics.refusal(model)
            return {"why": why} if why else batch_statistics.batch_statistics(attacker, model)
    # The other two compare with the poisoned model.
    undefended = attacker.record.model().to(attacker.device).eval()
    if name == "path":
        return linear_path.linear_path(attacker, model, undefended)
    why = similarity.refusal(undefended)
    return {"why": why} if why else similarity.similarity(attacker, model, undefended)


# --- what is kept


def _settings(options: Audit) -> dict[str, Any]:
    """What the values depend on besides the models."""
    return {"seed": options.seed, "clean": options.clean}


def _kept(one: Subject, options: Audit) -> dict[str, Any]:
    """Read the tests that an earlier audit made of the same weights by the same settings."""
    if not one.path.is_file():
        return {}
    try:
        found = audits.read_file(one.path)
    except UserError:
        if options.overwrite:
            return {}
        raise
    # A result that was made again leaves its audit behind.
    if found["model"] != one.model:
        return {}
    if found["settings"] != _settings(options):
        if options.overwrite:
            return {}
        was = ", ".join(f"--{key} {value}" for key, value in found["settings"].items())
        raise UserError(
            f"{one.path} was made with other settings ({was}): use the same, or --overwrite True to"
            " replace it"
        )
    return dict(found["tests"])


def _finish(one: Subject, of_controls: Mapping[str, Subject], options: Audit) -> None:
    """Summarise a model's tests beside those of the controls, and write all of it."""
    if one.why is not None:
        _write(one, {}, [one.why], options)
        return
    clean, undefended = (of_controls[kind].tests for kind in ("clean", "undefended"))
    summary = score.summarise(one.tests, clean, undefended)
    _write(one, summary, score.reasons(one.tests, clean, undefended, TESTS), options)


def _write(one: Subject, summary: Mapping[str, Any], why: Sequence[str], options: Audit) -> None:
    # A file that says the same already keeps its time and its machine.
    content = {
        "format": schema.AUDIT_FORMAT,
        "kind": one.kind,
        "model": one.model,
        "settings": _settings(options),
        "tests": one.tests,
        "summary": summary,
        "why": list(why),
    }
    if one.path.is_file():
        try:
            old = reading.read_sealed(one.path)
        except UserError:
            old = {}
        if {key: value for key, value in old.items() if key != "environment"} == content:
            return
    device = choose_device(options.device)
    writing.write_sealed(one.path, {**content, "environment": environment(device)})


def _line(one: Subject) -> str:
    """Write one line on a model: its numbers, or why there are none."""
    found = audits.Audit.of(audits.read_file(one.path))
    words = [f"depth {_number(found.depth)}"]
    words += (
        [f"P-ASR {' '.join(map(_number, found.p_asr))}"]
        if any(value is not None for value in found.p_asr)
        else []
    )
    words += [
        f"{name} {_number(value)}"
        for name, value in (
            ("BN-ASR", found.bn_asr),
            ("excess", found.excess),
            ("t50", found.t50),
            ("similarity", found.similarity),
        )
    ]
    why = f" ({'; '.join(found.why)})" if found.why else ""
    return f"{one.title}: {', '.join(words)}{why}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
