"""The numbers behind every table and picture, as plain values: nothing here prints, draws or writes.

rows(records)   -> list[Row]          one measured model each: a record as it was attacked, or one run of a defense on it
grouped(rows)   -> list[Group]        the same experiment over seeds; rows that differ in anything else are never together
group.score(m)  -> Summary | None     mean, sd and n of one metric over the seeds of a group
labels(groups)  -> list[Label]        what to call each group, with the settings that tell it from its like
remarks(rows)   -> list[str]          one sentence for each thing that was kept apart or left out
compare(groups) -> list[Compared]     each defense against fine-tuning over attacks: sign-flip test, Holm's correction
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from . import metrics, verify
from .errors import UserError
from .models import STANDARD_WIDTH
from .record import Record, read_result
from .schema import UNKNOWN

Metric = Literal["clean_accuracy", "asr", "robust_accuracy", "der", "tpr", "fpr", "seconds", "peak_memory_bytes", "forward", "backward"]
"""What a Row measures. Scores and rates are fractions in [0, 1]; seconds are without evaluation; forward and backward count images."""

UNDEFENDED = "none"
"""The `defense` of a row that shows a record as it was attacked."""
PLAIN = "plain"
"""The `run` of a row that shows ordinary training on the images of a joint attack: what training-time defenses are compared with."""
BASELINE = "ft"
"""The defense that every other one has to beat."""
IMPLANTED = 0.5
"""Mean ASR from which on an attack counts as implanted; below it there is little to defend."""
NOT_SETTINGS = frozenset(["seed", "score_every", "dataset", "poison_rate", "suspicious", "plain"])
"""Fields of a config that never change a result, or that a row holds under a name of its own."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model that was measured; None where a number does not exist (no ASR without an attack, no split without one)."""

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
    """Against what the method is held to: the attacked model, or for one that trains its own on a joint attack's images, plain training on them."""
    comparable_der: float | None
    """Against the attacked model, whatever the method: what the defenses of one record are told apart by."""
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
    """Canonical JSON of the attack's config without NOT_SETTINGS, plus its code, its precision and the SHA-256 of what was imported; the same text is
    the same experiment."""
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
    """A defense where runs of other seeds are not told from this one: "sau lite" for sau's lite-s0."""
    return f"{defense} {variant(run)}".rstrip()


@dataclass(frozen=True)
class Summary:
    """One metric over the seeds that have it."""

    mean: float
    sd: float | None
    """Sample standard deviation; None for one seed."""
    n: int


@dataclass(frozen=True)
class Group:
    """The same experiment with different seeds. Never empty."""

    rows: tuple[Row, ...]
    """In the order of their seeds, each pair of seeds once."""

    @property
    def first(self) -> Row:
        """Any row, for what all of them share: record settings, data set, attack, defense, assumes."""
        return self.rows[0]

    @property
    def n(self) -> int:
        return len(self.rows)

    def score(self, metric: Metric) -> Summary | None:
        """None where no seed has the number, and for seconds of different devices, which nobody should average."""
        if metric == "seconds" and len({row.device for row in self.rows}) > 1:
            return None
        return summary(getattr(row, metric) for row in self.rows)

    @cached_property
    def worst(self) -> Row:
        """The seed with the lowest DER, or the lowest clean accuracy where there was no attack: one model's numbers, not a mixture."""

        def rank(row: Row) -> tuple[float, float]:
            clean = math.inf if row.clean_accuracy is None else row.clean_accuracy
            return clean if row.der is None else row.der, clean

        return min(self.rows, key=rank)

    @property
    def collapsed(self) -> int:
        """How many seeds lost 20 points of clean accuracy, or half of it."""
        return sum(row.collapsed for row in self.rows)


@dataclass(frozen=True)
class Label:
    """What a table calls a group: the attack and the defense, with whatever tells them from others of the same name in brackets."""

    attack: str
    defense: str


@dataclass(frozen=True)
class Damaged:
    """A result, or a whole record, that is there and cannot be read."""

    record: str
    defense: str
    """"" for the record itself."""
    run: str
    why: str
    """One line that names the file."""


# --- rows --------------------------------------------------------------------------------------------------------


Only = Container[tuple[str, str, str]]
"""(record, defense, run) of the results that are wanted."""


def refuse(damaged: Damaged) -> None:
    """What happens to a damaged result where nobody says otherwise."""
    raise UserError(damaged.why)


def readable(names: Sequence[str], root: Path, on_damage: Callable[[Damaged], None] = refuse) -> list[Record]:
    """The records of these names. A damaged one is left out, if `on_damage` returns; where all are, the first is refused."""
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


def rows(records: Iterable[Record], only: Only | None = None, on_damage: Callable[[Damaged], None] = refuse) -> list[Row]:
    """For each record a row as it was attacked (and one of PLAIN training), then one for each finished result: by method, seed0 before named ones.

    With `only`, those results alone. A damaged one is left out, if `on_damage` returns.
    """
    found = []
    for record in records:
        found += undefended(record)
        found += [defended(record, folder, result) for folder, result in finished(record, only, on_damage)]
    return found


def finished(record: Record, only: Only | None, on_damage: Callable[[Damaged], None]) -> list[tuple[Path, dict[str, Any]]]:
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
    found = [run for run in verify.result_folders(folder) if (run / "result.json").is_file()]
    return sorted(found, key=lambda run: (run.parent.name, not run.name.startswith("seed"), *_natural(run.name)))


def undefended(record: Record) -> list[Row]:
    """The record as it was attacked and, where a joint attack made it, ordinary training on its images."""
    return [_undefended(record), *([_plain(record)] if record.info.get("plain_scores") is not None else [])]


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
    return replace(_undefended(record), run=PLAIN, assumes=("train",), asr_before=plain["asr"], **scores, **costs)


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
    return metrics.collapsed(result["before"], result["after"]) if result.get("before") else bool(result["collapsed"])


def _shared(record: Record) -> dict[str, Any]:
    info = record.info
    architecture = info["architecture"]
    return {
        "record": record.name,
        "attack": info["attack"],
        "dataset": info["dataset"]["name"],
        "fingerprint": info["dataset"]["fingerprint"],
        "architecture": architecture["name"] + (f" w{architecture['width']}" if architecture["width"] not in (None, STANDARD_WIDTH) else ""),
        "poison_rate": _rate(info),
        "seed": info["seed"],
        "asr_before": info["scores"]["asr"],
        "train_size": info["dataset"]["train_size"],
        "attack_settings": _settings(info),
    }


def _rate(info: Mapping[str, Any]) -> float | None:
    """As it was asked for; as it came out where less could be had, or where a share of one class was asked for. None without poison."""
    asked, poisoned, size = info["config"].get("poison_rate"), info.get("poisoned"), info["dataset"]["train_size"]
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
    config = {key: value for key, value in info.get("config", {}).items() if key not in NOT_SETTINGS and (trusts or not key.startswith("trusted_"))}
    if config.get("width") == STANDARD_WIDTH:
        config["width"] = None
    source = {"source": info["source"]["sha256"][:12]} if info.get("source") else {}
    return json.dumps({**config, **source, "code": code(info), "precision": precision(info)}, sort_keys=True)


def code(info: Mapping[str, Any]) -> str | None:
    """Which code made a record or a result; those made before it was kept have their commit instead."""
    commit = info.get("commit")
    return info.get("code") or (f"commit {commit}" if commit else None)


def precision(info: Mapping[str, Any]) -> str:
    """bf16 or fp32, whether it was asked for or found to be fast; UNKNOWN where only `auto` was kept."""
    asked = info.get("config", {}).get("precision", "auto")
    return info.get("precision") or (UNKNOWN if asked == "auto" else asked)


# --- groups ------------------------------------------------------------------------------------------------------


def grouped(found: Iterable[Row]) -> list[Group]:
    """Groups by data set, attack and rate, the undefended first in each. A pair of seeds that is there twice is counted once."""
    seeds: dict[tuple[Any, ...], dict[tuple[int, int], Row]] = defaultdict(dict)
    for row in found:
        seeds[row.key].setdefault((row.seed, -1 if row.defense_seed is None else row.defense_seed), row)
    groups = [Group(tuple(members[pair] for pair in sorted(members))) for members in seeds.values()]
    return sorted(groups, key=lambda group: _order(group.first))


def summary(values: Iterable[float | int | None]) -> Summary | None:
    """Mean and sample standard deviation of the numbers among the values; None without any."""
    numbers = [float(value) for value in values if value is not None]
    if not numbers:
        return None
    sd = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None
    return Summary(math.fsum(numbers) / len(numbers), sd, len(numbers))


def no_better_than_baseline(groups: Sequence[Group]) -> list[bool | None]:
    """For each group: is its DER, over the seeds that both have, no higher than fine-tuning's on the same records, both against the attacked model?

    None where there is no DER, for fine-tuning itself, and where it was not run.
    """
    # A plain run of the baseline speaks for it, where there are several.
    baseline = {group.first.attack_key: group for group in reversed(groups) if group.first.defense == BASELINE}
    answers: list[bool | None] = []
    for group in groups:
        other = baseline.get(group.first.attack_key)
        pairs = [] if other is None or group.first.defense in (BASELINE, UNDEFENDED) else _paired(group, other)
        answers.append(sum(a - b for a, b in pairs) <= 0 if pairs else None)
    return answers


def _paired(group: Group, other: Group) -> list[tuple[float, float]]:
    """Comparable DER of both on the records of the same seed."""
    theirs: dict[int, list[float]] = defaultdict(list)
    for row in other.rows:
        if row.comparable_der is not None:
            theirs[row.seed].append(row.comparable_der)
    found = [(row.comparable_der, theirs[row.seed]) for row in group.rows if row.seed in theirs]
    return [(own, math.fsum(other) / len(other)) for own, other in found if own is not None]


# --- names -------------------------------------------------------------------------------------------------------


def labels(groups: Sequence[Group]) -> list[Label]:
    """One for each group. Two groups of one data set and rate never have the same label."""
    attacks = told_apart({group.first.attack_key: (_attack_family(group.first), _attack_traits(group.first)) for group in groups})
    defenses = told_apart(
        {
            group.first.key: ((*group.first.attack_key, group.first.defense, group.first.variant), _traits(group.first.defense_settings))
            for group in groups
        }
    )
    found = []
    for group in groups:
        row = group.first
        found.append(Label(row.attack + attacks[row.attack_key], row.called + defenses[row.key]))
    return found


def remarks(found: Iterable[Row]) -> list[str]:
    """What a reader should know about the means: experiments of one name that were kept apart, repeats, attacks that did not take."""
    everything = list(found)
    groups = grouped(everything)
    said = []
    for name, traits in (*_families(groups, attack=True), *_families(groups, attack=False)):
        said.append(f"{name}: {len(traits)} experiments that differ in {_listed(_differing(traits))} are kept apart, not averaged")
    counted = {(row.record, row.defense, row.run) for group in groups for row in group.rows}
    repeats = [row for row in everything if (row.record, row.defense, row.run) not in counted]
    for row in repeats:
        what = f"{row.record}'s {row.defense} {row.run}".rstrip() if row.defense != UNDEFENDED else row.record
        said.append(f"{what} repeats a seed of the same experiment, so it is not counted again")
    for group, label in zip(groups, labels(groups), strict=True):
        asr = group.score("asr")
        if group.first.defense == UNDEFENDED and group.first.run != PLAIN and asr is not None and asr.mean < IMPLANTED:
            rate = group.first.poison_rate
            where = f"{label.attack}{'' if rate is None else f' ({100 * rate:g} %)'} on {group.first.dataset}"
            said.append(f"{where} hardly took: ASR {100 * asr.mean:.0f} % before any defense, so its DER says little")
    return said


def _families(groups: Sequence[Group], attack: bool) -> list[tuple[str, list[dict[str, Any]]]]:
    """Groups that share a name -> the traits of each."""
    families: dict[tuple[Any, ...], dict[Any, dict[str, Any]]] = defaultdict(dict)
    names = {}
    for group in groups:
        row = group.first
        if attack:
            family, key, traits, name = _attack_family(row), row.attack_key, _attack_traits(row), f"{row.attack} on {row.dataset}"
        else:
            family, key, traits = (*row.attack_key, row.defense, row.variant), row.key, _traits(row.defense_settings)
            name = f"{row.defense} on {row.dataset}, {row.attack}"
        families[family][key] = traits
        names[family] = name
    return [(names[family], list(members.values())) for family, members in families.items() if len(members) > 1]


def _attack_family(row: Row) -> tuple[Any, ...]:
    return (row.dataset, row.attack, row.poison_rate)


def _attack_traits(row: Row) -> dict[str, Any]:
    return {**_traits(row.attack_settings), "data": row.fingerprint[:8], "architecture": row.architecture}


def _traits(settings: str) -> dict[str, Any]:
    return json.loads(settings) if settings else {}


def told_apart(members: Mapping[Any, tuple[Any, dict[str, Any]]]) -> dict[Any, str]:
    """key -> (family, traits), to key -> " (position=random)" with what differs within the key's family, "" where it is alone."""
    families: dict[Any, list[Any]] = defaultdict(list)
    for key, (family, _) in members.items():
        families[family].append(key)
    found = {}
    for keys in families.values():
        differing = _differing([members[key][1] for key in keys])
        for key in keys:
            traits = members[key][1]
            shown = ", ".join(f"{name}={_short(traits.get(name))}" for name in differing)
            found[key] = f" ({shown})" if shown else ""
    return found


def _differing(traits: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names that do not have the same value in all; what another one says already (a width is in the architecture) is left out."""
    names = sorted({name for one in traits for name in one})
    differing = [name for name in names if len({json.dumps(one.get(name)) for one in traits}) > 1]
    if {"model", "width"} & set(differing):
        differing = [name for name in differing if name != "architecture"]
    return differing


def _short(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, list) else str(value)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _order(row: Row) -> tuple[Any, ...]:
    rate = -1.0 if row.poison_rate is None else row.poison_rate
    place = (row.dataset, row.attack == "none", row.attack, rate, row.architecture, row.fingerprint, row.attack_settings)
    return (*place, row.defense != UNDEFENDED, row.defense, row.variant, row.defense_settings)


def _natural(name: str) -> tuple[str, int]:
    """seed2 before seed10."""
    digits = re.search(r"\d+$", name)
    return (name[: digits.start()], int(digits.group())) if digits else (name, -1)
