"""Side by side: what each defense left of each record, a row for a run, or a row for the mean over
seeds."""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import one_line
from ..record import Record
from ..settings import methods
from ..storage.schema import ASSUMABLE
from . import formats, significance
from . import groups as grouping
from . import rows as measured
from .formats import HOLE, Format, Row, Table
from .groups import BASELINE, Group, Label
from .published import Reported, beside
from .rows import UNDEFENDED, Damaged, Metric

COLUMNS = [
    "record",
    "attack",
    "defense",
    "assumes",
    "clean acc %",
    "ASR %",
    "RA %",
    "DER %",
    "TPR %",
    "FPR %",
    "seconds",
]
SCORES: dict[str, Metric] = {
    "clean acc %": "clean_accuracy",
    "ASR %": "asr",
    "RA %": "robust_accuracy",
    "DER %": "der",
    "TPR %": "tpr",
    "FPR %": "fpr",
    "seconds": "seconds",
}
"""Columns of numbers, and what they show."""
MARK = " †"
"""After the DER of a defense that is no better than fine-tuning."""


# --- a row for each run


def rows(
    records: Iterable[Record], on_damage: Callable[[Damaged], None] = measured.refuse
) -> list[Row]:
    """One row for each record as it was attacked, then one for each known defense; what was not
    run, or is damaged, is a row of holes."""
    found = []
    for record in records:
        damaged: list[Damaged] = []
        every = measured.rows([record], on_damage=damaged.append)
        for one in damaged:
            on_damage(one)
        names = sorted(
            {
                *methods.available("defense"),
                *(row.defense for row in every),
                *(one.defense for one in damaged),
            }
            - {UNDEFENDED}
        )
        for name in (UNDEFENDED, *names):
            shown = [_cells(row) for row in every if row.defense == name]
            shown += [
                _hole(every[0], name, _called(name, one.run))
                for one in damaged
                if one.defense == name
            ]
            found += shown or [_hole(every[0], name, name)]
    return found


def complain(damaged: Sequence[Damaged]) -> int:
    """A line on the other stream for each result that is not shown; the exit code of the
    command."""
    for one in damaged:
        print(one_line(one.why), file=sys.stderr)
    return 2 if damaged else 0


def render(found: Sequence[Row], form: Format) -> str:
    """The rows in one of the four forms, with a trailing newline."""
    return formats.render(Table(COLUMNS, found, list(SCORES), ["record"]), form)


def text(found: Sequence[Row]) -> str:
    """The rows as aligned text."""
    return render(found, "text").removesuffix("\n")


def assumes(words: Sequence[str]) -> str:
    """What a defense needs, in the words of the table."""
    return " + ".join(ASSUMABLE[word].removeprefix("poisoned ") for word in words) or "nothing"


def _cells(row: measured.Row) -> Row:
    return {
        "record": row.record,
        "attack": row.attack,
        "defense": _called(row.defense, row.run) + (" COLLAPSED" if row.collapsed else ""),
        "assumes": _assumes(row),
        **{column: _number(metric, getattr(row, metric)) for column, metric in SCORES.items()},
    }


def _hole(undefended: measured.Row, defense: str, called: str) -> Row:
    shared = {
        "record": undefended.record,
        "attack": undefended.attack,
        "defense": called,
        "assumes": _needs(defense),
    }
    return dict.fromkeys(COLUMNS, HOLE) | shared


def _called(defense: str, run: str) -> str:
    return defense if run in ("", "seed0") else f"{defense} ({run})"


def _needs(defense: str) -> str:
    """What a defense assumes that was not run; a hole for one that is not known here."""
    return (
        assumes(methods.load("defense", defense).assumes)
        if defense in methods.available("defense")
        else HOLE
    )


@dataclass(frozen=True)
class Missing:
    """What was to be run and has no result, in the words of the table of means."""

    dataset: str
    attack: str
    poison_rate: float | None
    defense: str
    """UNDEFENDED where the attack itself is missing."""
    method: str
    record: str | None = field(default=None, compare=False)
    """The attack's finished record, by which the table knows what it calls the attack."""


# --- a row for each mean


def means(
    found: Sequence[measured.Row],
    form: Format = "text",
    *,
    missing: Sequence[Missing] = (),
    worst: bool = False,
) -> Table:
    """Mean ± sd over seeds for each data set, attack, rate and defense; or, with `worst`, the worst
    seed's own numbers.

    What is `missing` is a row of holes. Numbers that others have published stand beside ours where
    there are any.
    """
    groups = grouping.grouped(found)
    labels = grouping.labels(groups)
    weak = grouping.no_better_than_baseline(groups)
    lines: list[dict[str, str]] = []
    for group, label, marked in zip(groups, labels, weak, strict=True):
        lines.append(_mean(group, label, bool(marked), form, worst))
    called = {
        row.record: label.attack
        for group, label in zip(groups, labels, strict=True)
        for row in group.rows
    }
    for one in missing:
        hole = _missing(one, called.get(one.record or "", one.attack))
        like = [
            number
            for number, line in enumerate(lines, 1)
            if all(line[key] == hole[key] for key in ("data", "attack", "poison %"))
        ]
        lines.insert(like[-1] if like else len(lines), hole)
    scores = list(SCORES)
    if form == "csv" and not worst:
        scores = [name for column in SCORES for name in (column, f"{column} sd")]
    columns = [
        "data",
        "attack",
        "poison %",
        "defense",
        "assumes",
        "seed" if worst else "n",
        *scores,
    ]
    if any("reported" in line for line in lines):
        columns.append("reported")
    filled = [{column: line.get(column, HOLE) for column in columns} for line in lines]
    return Table(
        columns,
        filled,
        ["poison %", "n", "seed", *scores],
        ["data", "attack", "poison %"],
        _notes(found, groups, weak, form, worst),
    )


def show(table: Table, form: Format) -> None:
    """Print a table; the notes of a CSV, which has no place for them, go to the other stream."""
    print(formats.render(table, form), end="")
    if form == "csv" and table.notes:
        print("\n".join(table.notes), file=sys.stderr)


def _mean(group: Group, label: Label, weak: bool, form: Format, worst: bool) -> dict[str, str]:
    row = group.worst if worst else group.first
    if worst:
        collapsed = " COLLAPSED" if row.collapsed else ""
    else:
        collapsed = (
            ""
            if not group.collapsed
            else " COLLAPSED" + (f" {group.collapsed} of {group.n}" if group.n > 1 else "")
        )
    cells = {
        "data": row.dataset,
        "attack": label.attack,
        "poison %": _rate(row.poison_rate),
        "defense": label.defense + collapsed,
        "assumes": _assumes(row),
        "n": str(group.n),
        "seed": (
            str(row.seed)
            if row.defense_seed in (None, row.seed)
            else f"{row.seed} / {row.defense_seed}"
        ),
    }
    for column, metric in SCORES.items():
        if worst:
            cells[column] = _number(metric, getattr(row, metric))
            continue
        score = group.score(metric)
        cells[column] = _number(metric, score and score.mean)
        spread = _number(metric, score and score.sd)
        if form == "csv":
            cells[f"{column} sd"] = spread
        elif spread != HOLE:
            cells[column] += f" ± {spread}"
    if weak and form != "csv":
        cells["DER %"] += MARK
    published = [f"{_percents(number)} [{number.key}]" for number in beside(row)]
    return cells | ({"reported": "; ".join(published)} if published else {})


def _missing(one: Missing, attack: str) -> dict[str, str]:
    shown = {
        "data": one.dataset,
        "attack": attack,
        "poison %": _rate(one.poison_rate),
        "defense": one.defense,
    }
    return shown | {"assumes": HOLE if one.method == UNDEFENDED else _needs(one.method), "n": "0"}


def _rate(rate: float | None) -> str:
    return HOLE if rate is None else f"{100 * rate:g}"


def _notes(
    found: Sequence[measured.Row],
    groups: Sequence[Group],
    weak: Sequence[bool | None],
    form: Format,
    worst: bool,
) -> list[str]:
    """What the numbers mean, and what was kept out of them."""
    said = []
    if groups and worst:
        which = (
            "Each row is one model: the seed with the lowest DER (the lowest clean accuracy without"
            " an attack)"
        )
        said.append(f"{which}; the attack's / the defense's where they differ.")
    elif groups:
        said.append("Mean ± standard deviation over n seeds; seconds without evaluation.")
    if groups:
        said.append(
            "RA: triggered images that get their true label. DER: 50 is no effect, 100 is an ASR"
            " from 100 to 0 at no cost in accuracy."
        )
    for dataset in dict.fromkeys(group.first.dataset for group in groups):
        networks = dict.fromkeys(
            f"{row.architecture}, {row.train_size:,} training images"
            for row in found
            if row.dataset == dataset
        )
        said.append(f"{dataset}: {'; '.join(networks)}.")
    if any(weak) and form != "csv":  # whose numbers bear no marks
        said.append(f"†: no better than fine-tuning ({BASELINE}) in DER on the same records.")
    own = dict.fromkeys(row.defense for row in found if row.der != row.comparable_der)
    if own:
        said.append(
            f"DER of {', '.join(own)} on joint attacks: against plain training on the same images;"
            f" against the attacked model, as {BASELINE}'s, where defenses are compared."
        )
    said += [remark + "." for remark in grouping.remarks(found)]
    for compared in significance.compare(groups):
        if compared.comparisons:
            said.append(_tested(compared.comparisons))
        said += [note + "." for note in compared.notes]
    sources = {number.key: number for group in groups for number in beside(group.first)}
    return said + [
        f"[{key}] clean acc / ASR %: {number.source}; {number.protocol}."
        for key, number in sources.items()
    ]


def _tested(comparisons: Sequence[significance.Comparison]) -> str:
    """Each defense's mean lead over fine-tuning on one data set, and what may be concluded."""
    unequal = len({c.attacks for c in comparisons}) > 1

    def lead(c: significance.Comparison) -> str:
        told = [f"{c.attacks} attack{'s' * (c.attacks > 1)}"] if unequal else []
        told += (
            [f"p {c.p:.2g}", f"Holm {c.holm:.2g}"]
            if c.attacks >= significance.fewest_attacks(1)
            else []
        )
        return f"{c.defense} {100 * c.difference:+.2f}" + (f" ({', '.join(told)})" if told else "")

    leads = ", ".join(map(lead, comparisons))
    return (
        f"{comparisons[0].dataset}, DER minus {comparisons[0].baseline}'s, mean over attacks:"
        f" {leads}. {significance.verdict(comparisons)}"
    )


# --- cells


def _assumes(row: measured.Row) -> str:
    return HOLE if row.defense == UNDEFENDED and not row.assumes else assumes(row.assumes)


def _percents(number: Reported) -> str:
    return " / ".join(
        _number(metric, number.scores[metric])
        for metric in ("clean_accuracy", "asr")
        if metric in number.scores
    )


def _number(metric: str, value: Any) -> str:
    if value is None:
        return HOLE
    return f"{value:.0f}" if metric == "seconds" else f"{100 * value:.2f}"
