"""The numbers behind every table and chart, as plain values. Nothing here prints, draws or writes.

rows(records) -> list[Row]
    One measured model each: a record as it was attacked, or one run of a defense on it.
groups.grouped(rows) -> list[Group]
    The same experiment over seeds. Rows that differ in anything else are in different groups.
group.score(metric) -> Summary | None
    Mean, standard deviation and n of one metric over the seeds of a group.
groups.labels(groups) -> list[Label]
    What to call each group: its names, and the settings by which it differs from others.
groups.remarks(rows) -> list[str]
    One sentence for each experiment that was kept apart or left out.
significance.compare(groups) -> list[Compared]
    Each defense against fine-tuning over attacks: sign-flip test and Holm's correction.
"""

import json
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from .. import metrics
from ..errors import UserError
from ..models import STANDARD_WIDTH
from ..record import Record, read_result
from ..record import result_folders as every_result_folder
from ..storage.schema import DETECTOR, UNKNOWN
from . import audits

Metric = Literal[
    "clean_accuracy",
    "asr",
    "robust_accuracy",
    "der",
    "tpr",
    "fpr",
    "auroc",
    "seconds",
    "peak_memory_bytes",
    "forward",
    "backward",
    "depth",
    "solved",
    "p_asr_0",
    "p_asr_1",
    "p_asr_5",
    "p_asr_20",
    "bn_asr",
    "excess",
    "t50",
    "similarity",
    "psnr",
    "trainings",
    "no_attack_cost",
]
"""What a Row measures. Scores and rates are fractions in [0, 1]. Seconds are without evaluation.
`forward` and `backward` count images. From `depth` to `similarity`, an audit measured them
(audits.py). `psnr` is in dB, of an attack's triggered test images; `trainings` are trainings of the
model, and `no_attack_cost` is clean accuracy lost, in [-1, 1]."""

UNDEFENDED = "none"
"""The `defense` of a row that shows a record as it was attacked."""
PLAIN = "plain"
"""The `run` of a row of ordinary training on the images of a training-controlled attack: the model
that training-time defenses are compared with."""
ORACLE = " ORACLE"
"""After the name of an unlearner that was given the true poison, or a part of it."""
NOT_SETTINGS = frozenset(["seed", "score_every", "dataset", "poison_rate", "suspicious", "plain"])
"""Fields of a config that never change a result, or that are fields of a Row."""


class Measured(Protocol):
    """What a table needs of a record: a `Record` has it, and so has what a store keeps of one."""

    @property
    def folder(self) -> Path: ...

    @property
    def info(self) -> Mapping[str, Any]:
        """record.json."""

    @property
    def name(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured model.

    A number that does not exist is None: there is no ASR without an attack, and no TPR without a
    split of the training set.
    """

    record: str
    run: str
    """Name of the result's folder in defense/<method>/; "" for the record itself."""
    attack: str
    defense: str
    """The method's name, or UNDEFENDED."""
    assumes: tuple[str, ...]
    dataset: str
    fingerprint: str
    architecture: str
    """Name of the network, with its width if that is not 64: "preactresnet10 w16"."""
    poison_rate: float | None
    seed: int
    """Seed of the attack."""
    defense_seed: int | None
    clean_accuracy: float | None
    asr: float | None
    robust_accuracy: float | None
    asr_before: float | None
    der: float | None
    """DER against the model that the method is measured by: the attacked model or, for a method
    that trains its own on the images of a training-controlled attack, plain training on them."""
    comparable_der: float | None
    """DER against the attacked model for every method, so that the defenses of one record can be
    compared."""
    tpr: float | None
    fpr: float | None
    collapsed: bool
    seconds: float | None
    forward: int | None
    backward: int | None
    peak_memory_bytes: int | None
    train_size: int
    device: str | None
    attack_settings: str
    """JSON, keys sorted, of the attack's config without NOT_SETTINGS, its code, its precision and
    the SHA-256 of imported files. Equal texts are equal experiments."""
    defense_settings: str
    """The same for the defense; "" for a record."""
    auroc: float | None = None
    """Of the suspicion by which a split was made; None where none was kept."""
    kind: str = "defense"
    """defense, detector (a split and no model) or unlearner (a model that forgot a split)."""
    split: str = ""
    """Whose split an unlearner forgot; "" for all others."""
    oracle: bool = False
    """Whether that split was made from the true poison, which no defender knows."""
    audit: audits.Audit | None = None
    """What an audit found; None where none was made."""
    psnr: float | None = None
    """Of the triggered test images; None for a defense, and where nobody measured it."""
    trainings: float | None = None
    """Cost in units of one plain training of the attacked model, by image passes: a forward pass
    counts once, a backward pass twice."""
    no_attack_cost: float | None = None
    """Clean accuracy that the same defense takes from the clean control (clean_control.py)."""
    is_solved: bool | None = None
    """Whether the defense did all that it is for (`audits.solved`); None where an audit is
    missing, or has no depth."""

    @property
    def _audited(self) -> audits.Audit:
        return audits.NOTHING if self.audit is None else self.audit

    @property
    def depth(self) -> float | None:
        return self._audited.depth

    @property
    def solved(self) -> float | None:
        """1 or 0, of which a mean is the share of solved cells."""
        return None if self.is_solved is None else float(self.is_solved)

    @property
    def p_asr_0(self) -> float | None:
        return self._audited.p_asr[0]

    @property
    def p_asr_1(self) -> float | None:
        return self._audited.p_asr[1]

    @property
    def p_asr_5(self) -> float | None:
        return self._audited.p_asr[2]

    @property
    def p_asr_20(self) -> float | None:
        return self._audited.p_asr[3]

    @property
    def bn_asr(self) -> float | None:
        return self._audited.bn_asr

    @property
    def excess(self) -> float | None:
        return self._audited.excess

    @property
    def t50(self) -> float | None:
        return self._audited.t50

    @property
    def similarity(self) -> float | None:
        return self._audited.similarity

    @property
    def attack_key(self) -> tuple[Any, ...]:
        """A key that is equal for records that differ in the seed only."""
        return (
            self.dataset,
            self.fingerprint,
            self.architecture,
            self.attack,
            -1.0 if self.poison_rate is None else self.poison_rate,
            self.attack_settings,
        )

    @property
    def key(self) -> tuple[Any, ...]:
        """A key that is equal for rows whose mean may be taken."""
        return (*self.attack_key, self.defense, self.variant, self.defense_settings)

    @property
    def variant(self) -> str:
        """The run's name without its seed."""
        return variant(self.run)

    @property
    def called(self) -> str:
        """The defense, followed by its variant, and by the mark of an oracle."""
        return called(self.defense, self.run) + ORACLE * self.oracle

    @property
    def ranked(self) -> bool:
        """Whether the row may be compared with those of defenses: it has a model, and no oracle."""
        return self.kind != DETECTOR and not self.oracle


def variant(run: str) -> str:
    """Remove the seed from a run's name: "seed0" -> "", "lite-s0" -> "lite"."""
    return re.sub(r"(^|-)(seed|s)\d+$", "", run)


def called(defense: str, run: str) -> str:
    """Name a defense without its seed: ("sau", "lite-s0") -> "sau lite"."""
    return f"{defense} {variant(run)}".rstrip()


@dataclass(frozen=True)
class Damaged:
    """A result, or a whole record, that exists but cannot be read."""

    record: str
    defense: str
    """"" for the record itself."""
    run: str
    why: str
    """One line for the user that names the file."""


# --- rows


Only = Container[tuple[str, str, str]]
"""The results to show, as (record, defense, run)."""


@dataclass(frozen=True)
class OfMethods:
    """All results of some methods, as an `Only`."""

    methods: tuple[str, ...]

    def __contains__(self, place: object) -> bool:
        return isinstance(place, tuple) and place[1] in self.methods


def refuse(damaged: Damaged) -> None:
    """Raise a UserError for a damaged result; the default of every `on_damage`."""
    raise UserError(damaged.why)


def readable(
    names: Sequence[str], root: Path, on_damage: Callable[[Damaged], None] = refuse
) -> list[Record]:
    """Load records, leaving out the damaged ones.

    Args:
        names: Names of records.
        root: The folder that contains them.
        on_damage: Called with each damaged record; the default raises.

    Raises:
        UserError: All records are damaged.
    """
    found, damaged = [], []

    for name in names:
        try:
            found.append(Record.load(name, root))
        except UserError as error:
            damaged.append(Damaged(name, "", "", str(error)))
            on_damage(damaged[-1])

    # A table of nothing would hide that something is wrong.
    if damaged and not found:
        refuse(damaged[0])
    return found


def rows(
    records: Iterable[Measured],
    only: Only | None = None,
    on_damage: Callable[[Damaged], None] = refuse,
) -> list[Row]:
    """Make a row of each measured model.

    Args:
        records: The records to read.
        only: Results to read; None means all that are finished.
        on_damage: Called with each damaged result, which is then left out. The default raises.

    Returns:
        For each record: the attacked model, PLAIN training if there was any, then the results
        by method, seeds before named runs.
    """
    # The attacked model comes first, so that readers find it as the record's own row.
    found = []
    for record in records:
        found += undefended(record)
        for folder, result in finished(record, only, on_damage):
            # A damaged audit leaves its result out, as it may hide what it found.
            try:
                found.append(defended(record, folder, result))
            except UserError as error:
                on_damage(Damaged(record.name, folder.parent.name, folder.name, str(error)))
    return found


def finished(
    record: Measured, only: Only | None, on_damage: Callable[[Damaged], None]
) -> list[tuple[Path, dict[str, Any]]]:
    """Read the finished results of a record: (folder, content of result.json).

    Args:
        record: The record that was defended.
        only: Results to read; None means all that are finished.
        on_damage: Called with each damaged result, which is then left out.
    """
    found = []
    for folder in result_folders(record.folder):
        place = (record.name, folder.parent.name, folder.name)
        if only is None or place in only:
            try:
                found.append((folder, read_result(folder)))
            except UserError as error:
                on_damage(Damaged(*place, str(error)))
    return found


def result_folders(folder: Path) -> list[Path]:
    """List the folders of a record's finished results: by method, seeds before named runs."""
    # result.json is written last, so a result that has one is finished.
    found = [run for run in every_result_folder(folder) if (run / "result.json").is_file()]
    return sorted(
        found,
        key=lambda run: (run.parent.name, not run.name.startswith("seed"), *_natural(run.name)),
    )


def undefended(record: Measured) -> list[Row]:
    """Make the row of the attacked model, and that of plain training if the attack controls the
    training."""
    plain = record.info.get("plain_scores") is not None
    return [_undefended(record), *([_plain(record)] if plain else [])]


def _undefended(record: Measured) -> Row:
    info = record.info
    return Row(
        **_shared(record),
        **_costs(info, info),
        run="",
        defense=UNDEFENDED,
        assumes=(),
        defense_seed=None,
        **{key: info["scores"][key] for key in metrics.SUMMARY},
        der=None,
        comparable_der=None,
        tpr=None,
        fpr=None,
        collapsed=False,
        defense_settings="",
        audit=audits.read(record.folder / "controls" / "undefended.json", info),
        psnr=(info.get("measured") or {}).get("psnr"),
    )


def _plain(record: Measured) -> Row:
    plain = record.info["plain_scores"]
    scores = {key: plain[key] for key in metrics.SUMMARY}
    # Of plain training nothing but its time was measured.
    costs = dict(
        seconds=plain["seconds"],
        forward=None,
        backward=None,
        trainings=None,
        peak_memory_bytes=None,
    )
    return replace(
        _undefended(record),
        audit=None,
        run=PLAIN,
        assumes=("train",),
        asr_before=plain["asr"],
        **scores,
        **costs,
    )


def defended(record: Measured, folder: Path, result: Mapping[str, Any]) -> Row:
    """Make the row of one finished result.

    Args:
        record: The record that was defended.
        folder: The result's folder, defense/<method>/<run>.
        result: Content of its result.json.
    """
    # Only some defenses split the training set, and a detector has no other scores.
    split, given = result["split"] or {}, result.get("given_split") or {}
    none: dict[str, Any] = dict.fromkeys(metrics.SUMMARY)
    after: Mapping[str, Any] = result["after"] or none
    collapsed = _collapsed(result)
    audit = audits.read(folder / audits.FILE, result)
    before = result.get("before") or record.info["scores"]
    solved = None if audit is None else audits.solved(before, after, collapsed, audit.depth)
    return Row(
        **_shared(record),
        **_costs(result, record.info),
        run=folder.name,
        defense=folder.parent.name,
        assumes=tuple(result["assumes"]),
        defense_seed=result.get("seed"),
        **{key: after[key] for key in metrics.SUMMARY},
        der=result["der"],
        comparable_der=metrics.der(record.info["scores"], after),
        tpr=split.get("tpr"),
        fpr=split.get("fpr"),
        auroc=split.get("auroc"),
        collapsed=collapsed,
        defense_settings=_settings(result),
        audit=audit,
        is_solved=solved,
        kind=result.get("kind", "defense"),
        split=given.get("name", ""),
        oracle=given.get("oracle", False),
    )


def _collapsed(result: Mapping[str, Any]) -> bool:
    """Ask whether the defense destroyed the model, by today's rule where its scores are there."""
    # Older versions had another rule, so what they wrote is read only if it is all there is.
    if result.get("before"):
        return metrics.collapsed(result["before"], result["after"])
    return bool(result["collapsed"])


def _shared(record: Measured) -> dict[str, Any]:
    """The fields that all rows of a record have in common."""
    info = record.info
    name, width = info["architecture"]["name"], info["architecture"]["width"]
    return {
        "record": record.name,
        "attack": info["attack"],
        "dataset": info["dataset"]["name"],
        "fingerprint": info["dataset"]["fingerprint"],
        "architecture": name if width in (None, STANDARD_WIDTH) else f"{name} w{width}",
        "poison_rate": _rate(info),
        "seed": info["seed"],
        "asr_before": info["scores"]["asr"],
        "train_size": info["dataset"]["train_size"],
        "attack_settings": _settings(info),
    }


def _rate(info: Mapping[str, Any]) -> float | None:
    """The share of the training set that is poisoned; None without poison.

    It is the config's, or the share that was reached if fewer images could be poisoned, or if the
    config gives a share of one class.
    """
    asked, poisoned = info["config"].get("poison_rate"), info.get("poisoned")
    size = info["dataset"]["train_size"]

    # Without a count of poisoned images, the config's rate is all there is.
    if not poisoned or (asked is not None and poisoned >= round(asked * size)):
        return asked
    return round(poisoned / size, 4)


def _costs(info: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    # Older records have no count of images.
    passes = info.get("image_passes") or {}
    return {
        "seconds": info.get("seconds"),
        "forward": passes.get("forward"),
        "backward": passes.get("backward"),
        "trainings": _trainings(record, passes),
        "peak_memory_bytes": info.get("peak_memory_bytes"),
        "device": info.get("device"),
    }


def _trainings(record: Mapping[str, Any], passes: Mapping[str, int]) -> float | None:
    """Divide image passes by those of a plain training of the record's model."""
    epochs = record.get("config", {}).get("epochs")
    if not epochs or not passes:
        return None
    return (passes["forward"] + 2 * passes["backward"]) / (
        3 * epochs * record["dataset"]["train_size"]
    )


def _settings(info: Mapping[str, Any]) -> str:
    """Write the settings that make an experiment what it is as JSON."""
    config = {
        key: value for key, value in info.get("config", {}).items() if key not in NOT_SETTINGS
    }

    # How many images to trust changes nothing for a method that trusts none.
    if "trusted" not in info.get("assumes", ()):
        config = {key: value for key, value in config.items() if not key.startswith("trusted_")}

    # The standard width and none at all are the same network.
    if config.get("width") == STANDARD_WIDTH:
        config["width"] = None
    source = {"source": info["source"]["sha256"][:12]} if info.get("source") else {}
    made = {"code": code(info), "precision": precision(info)}
    return json.dumps({**config, **source, **made}, sort_keys=True)


def code(info: Mapping[str, Any]) -> str | None:
    """Return the version of the code that made a record or a result.

    It is the commit for those that are older than code versions, and None if neither was kept.
    """
    # A code version changes with what computes, a commit with every file.
    commit = info.get("commit")
    return info.get("code") or (f"commit {commit}" if commit else None)


def precision(info: Mapping[str, Any]) -> str:
    """Return the precision that a record or a result was computed in.

    "bf16", "fp32", or both joined by "+"; UNKNOWN if nothing but `auto` was kept.
    """
    # What `auto` became is kept apart from the config, which has the word itself.
    asked = info.get("config", {}).get("precision", "auto")
    return info.get("precision") or (UNKNOWN if asked == "auto" else asked)


def _natural(name: str) -> tuple[str, int]:
    """A key that sorts seed2 before seed10."""
    # As text, seed10 would come before seed2.
    digits = re.search(r"\d+$", name)
    return (name[: digits.start()], int(digits.group())) if digits else (name, -1)
