"""The numbers behind every table and picture, as plain values: nothing here prints, draws or
writes.

rows(records)                -> list[Row]       one measured model each: a record as it was attacked,
                                                or one run of a defense on it
groups.grouped(rows)         -> list[Group]     the same experiment over seeds; rows that differ in
                                                anything else are never together
group.score(m)  -> Summary | None     mean, sd and n of one metric over the seeds of a group
groups.labels(groups)  -> list[Label]        what to call each group, with the settings that tell it from its like
groups.remarks(rows)   -> list[str]          one sentence for each thing that was kept apart or left out
significance.compare(groups) -> list[Compared]     each defense against fine-tuning over attacks: sign-flip test, Holm's correction
"""

import json
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from .. import metrics
from ..errors import UserError
from ..models import STANDARD_WIDTH
from ..record import Record, read_result
from ..record import result_folders as every_result_folder
from ..storage.schema import UNKNOWN

Metric = Literal[
    "clean_accuracy",
    "asr",
    "robust_accuracy",
    "der",
    "tpr",
    "fpr",
    "seconds",
    "peak_memory_bytes",
    "forward",
    "backward",
]
"""What a Row measures. Scores and rates are fractions in [0, 1]; seconds are without evaluation;
forward and backward count images."""

UNDEFENDED = "none"
"""The `defense` of a row that shows a record as it was attacked."""
PLAIN = "plain"
"""The `run` of a row that shows ordinary training on the images of a joint attack: what
training-time defenses are compared with."""
NOT_SETTINGS = frozenset(["seed", "score_every", "dataset", "poison_rate", "suspicious", "plain"])
"""Fields of a config that never change a result, or that a row holds under a name of its own."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model that was measured; None where a number does not exist (no ASR without an attack, no
    split without one)."""

    record: str
    run: str
    """The result's folder below defense/<method>/; "" for the record itself."""
    attack: str
    defense: str
    """The method's name, or UNDEFENDED."""
    assumes: tuple[str, ...]
    dataset: str
    fingerprint: str
    architecture: str
    """preactresnet18, with its width where it is not 64."""
    poison_rate: float | None
    seed: int
    """The attack's."""
    defense_seed: int | None
    clean_accuracy: float | None
    asr: float | None
    robust_accuracy: float | None
    asr_before: float | None
    der: float | None
    """Against what the method is held to: the attacked model, or for one that trains its own on a
    joint attack's images, plain training on them."""
    comparable_der: float | None
    """Against the attacked model, whatever the method: what the defenses of one record are told
    apart by."""
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
    """Canonical JSON of the attack's config without NOT_SETTINGS, plus its code, its precision and
    the SHA-256 of what was imported; the same text is the same experiment."""
    defense_settings: str
    """The same of the defense; "" for a record."""

    @property
    def attack_key(self) -> tuple[Any, ...]:
        """Equal for records that differ in the seed alone."""
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
        """Equal for rows that may enter one mean."""
        return (*self.attack_key, self.defense, self.variant, self.defense_settings)

    @property
    def variant(self) -> str:
        return variant(self.run)

    @property
    def called(self) -> str:
        return called(self.defense, self.run)


def variant(run: str) -> str:
    """A run's name without its seed: "" for seed0, "lite" for lite-s0."""
    return re.sub(r"(^|-)(seed|s)\d+$", "", run)


def called(defense: str, run: str) -> str:
    """A defense where runs of other seeds are not told from this one: "sau lite" for sau's
    lite-s0."""
    return f"{defense} {variant(run)}".rstrip()


@dataclass(frozen=True)
class Damaged:
    """A result, or a whole record, that is there and cannot be read."""

    record: str
    defense: str
    """"" for the record itself."""
    run: str
    why: str
    """One line that names the file."""


# --- rows


Only = Container[tuple[str, str, str]]
"""(record, defense, run) of the results that are wanted."""


def refuse(damaged: Damaged) -> None:
    """What happens to a damaged result where nobody says otherwise."""
    raise UserError(damaged.why)


def readable(
    names: Sequence[str], root: Path, on_damage: Callable[[Damaged], None] = refuse
) -> list[Record]:
    """The records of these names. A damaged one is left out, if `on_damage` returns; where all are,
    the first is refused."""
    found, damaged = [], []
    for name in names:
        try:
            found.append(Record.load(name, root))
        except UserError as error:
            damaged.append(Damaged(name, "", "", str(error)))
            on_damage(damaged[-1])
    if damaged and not found:
        refuse(damaged[0])
    return found


def rows(
    records: Iterable[Record],
    only: Only | None = None,
    on_damage: Callable[[Damaged], None] = refuse,
) -> list[Row]:
    """For each record a row as it was attacked (and one of PLAIN training), then one for each
    finished result: by method, seed0 before named ones.

    With `only`, those results alone. A damaged one is left out, if `on_damage` returns.
    """
    found = []
    for record in records:
        found += undefended(record)
        found += [
            defended(record, folder, result) for folder, result in finished(record, only, on_damage)
        ]
    return found


def finished(
    record: Record, only: Only | None, on_damage: Callable[[Damaged], None]
) -> list[tuple[Path, dict[str, Any]]]:
    """Folder and content of each finished result."""
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
    """Where the finished results below a record's folder lie."""
    found = [run for run in every_result_folder(folder) if (run / "result.json").is_file()]
    return sorted(
        found,
        key=lambda run: (run.parent.name, not run.name.startswith("seed"), *_natural(run.name)),
    )


def undefended(record: Record) -> list[Row]:
    """The record as it was attacked and, where a joint attack made it, ordinary training on its
    images."""
    return [
        _undefended(record),
        *([_plain(record)] if record.info.get("plain_scores") is not None else []),
    ]


def _undefended(record: Record) -> Row:
    info = record.info
    return Row(
        **_shared(record),
        **_costs(info),
        run="",
        defense=UNDEFENDED,
        assumes=(),
        defense_seed=None,
        **{key: info["scores"][key] for key in ("clean_accuracy", "asr", "robust_accuracy")},
        der=None,
        comparable_der=None,
        tpr=None,
        fpr=None,
        collapsed=False,
        defense_settings="",
    )


def _plain(record: Record) -> Row:
    plain = record.info["plain_scores"]
    scores = {key: plain[key] for key in ("clean_accuracy", "asr", "robust_accuracy")}
    costs = dict(seconds=plain["seconds"], forward=None, backward=None, peak_memory_bytes=None)
    return replace(
        _undefended(record),
        run=PLAIN,
        assumes=("train",),
        asr_before=plain["asr"],
        **scores,
        **costs,
    )


def defended(record: Record, folder: Path, result: Mapping[str, Any]) -> Row:
    """One finished result."""
    split = result["split"] or {}
    return Row(
        **_shared(record),
        **_costs(result),
        run=folder.name,
        defense=folder.parent.name,
        assumes=tuple(result["assumes"]),
        defense_seed=result.get("seed"),
        **{key: result["after"][key] for key in ("clean_accuracy", "asr", "robust_accuracy")},
        der=result["der"],
        comparable_der=metrics.der(record.info["scores"], result["after"]),
        tpr=split.get("tpr"),
        fpr=split.get("fpr"),
        collapsed=_collapsed(result),
        defense_settings=_settings(result),
    )


def _collapsed(result: Mapping[str, Any]) -> bool:
    """By today's rule, also for what an older version wrote."""
    return (
        metrics.collapsed(result["before"], result["after"])
        if result.get("before")
        else bool(result["collapsed"])
    )


def _shared(record: Record) -> dict[str, Any]:
    info = record.info
    architecture = info["architecture"]
    return {
        "record": record.name,
        "attack": info["attack"],
        "dataset": info["dataset"]["name"],
        "fingerprint": info["dataset"]["fingerprint"],
        "architecture": (
            architecture["name"]
            + (
                f" w{architecture['width']}"
                if architecture["width"] not in (None, STANDARD_WIDTH)
                else ""
            )
        ),
        "poison_rate": _rate(info),
        "seed": info["seed"],
        "asr_before": info["scores"]["asr"],
        "train_size": info["dataset"]["train_size"],
        "attack_settings": _settings(info),
    }


def _rate(info: Mapping[str, Any]) -> float | None:
    """As it was asked for; as it came out where less could be had, or where a share of one class
    was asked for. None without poison."""
    asked, poisoned, size = (
        info["config"].get("poison_rate"),
        info.get("poisoned"),
        info["dataset"]["train_size"],
    )
    if not poisoned or (asked is not None and poisoned >= round(asked * size)):
        return asked
    return round(poisoned / size, 4)


def _costs(info: Mapping[str, Any]) -> dict[str, Any]:
    passes = info.get("image_passes") or {}
    return {
        "seconds": info.get("seconds"),
        "forward": passes.get("forward"),
        "backward": passes.get("backward"),
        "peak_memory_bytes": info.get("peak_memory_bytes"),
        "device": info.get("device"),
    }


def _settings(info: Mapping[str, Any]) -> str:
    trusts = "trusted" in info.get("assumes", ())  # else nothing comes of how many it is to trust
    config = {
        key: value
        for key, value in info.get("config", {}).items()
        if key not in NOT_SETTINGS and (trusts or not key.startswith("trusted_"))
    }
    if config.get("width") == STANDARD_WIDTH:
        config["width"] = None
    source = {"source": info["source"]["sha256"][:12]} if info.get("source") else {}
    return json.dumps(
        {**config, **source, "code": code(info), "precision": precision(info)}, sort_keys=True
    )


def code(info: Mapping[str, Any]) -> str | None:
    """Which code made a record or a result; those made before it was kept have their commit
    instead."""
    commit = info.get("commit")
    return info.get("code") or (f"commit {commit}" if commit else None)


def precision(info: Mapping[str, Any]) -> str:
    """bf16 or fp32, whether it was asked for or found to be fast; UNKNOWN where only `auto` was
    kept."""
    asked = info.get("config", {}).get("precision", "auto")
    return info.get("precision") or (UNKNOWN if asked == "auto" else asked)


def _natural(name: str) -> tuple[str, int]:
    """seed2 before seed10."""
    digits = re.search(r"\d+$", name)
    return (name[: digits.start()], int(digits.group())) if digits else (name, -1)
