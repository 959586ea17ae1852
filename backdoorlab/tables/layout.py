"""Records and defenses side by side: a row for each run, or a row for each mean over seeds."""

import itertools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import UserError, one_line, suggest
from ..settings import methods
from ..storage.schema import ASSUMABLE, DETECTOR
from . import clean_control, formats, notes
from . import groups as grouping
from . import rows as measured
from .formats import EMPTY, Cell, Format, Row, Table
from .groups import Group, Label
from .published import Reported, beside
from .rows import ORACLE, UNDEFENDED, Damaged, Metric

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
"""Columns of numbers, and the metric that each shows."""
AUDITED: dict[str, Metric] = {
    "depth": "depth",
    "solved %": "solved",
    "P-ASR 0 %": "p_asr_0",
    "P-ASR 1 %": "p_asr_1",
    "P-ASR 5 %": "p_asr_5",
    "P-ASR 20 %": "p_asr_20",
    "BN-ASR %": "bn_asr",
    "excess %": "excess",
    "t50": "t50",
    "similarity": "similarity",
}
"""The same of audits: columns that a table has where a model was audited."""
FURTHER: dict[str, Metric] = {
    "trainings": "trainings",
    "no-attack cost %": "no_attack_cost",
    "PSNR dB": "psnr",
}
"""Columns that a table has only where they are asked for."""
SUMMARIES = ("depth", "solved %")
"""Those of AUDITED that sum up the others."""
AS_THEY_ARE = ("depth", "t50", "similarity", "trainings", "psnr")
"""Metrics that are no percentages."""
RANKING: dict[str, Metric] = {"AUROC %": "auroc"}
"""Further columns of numbers, shown beside FPR where there is a detector."""
MARK = " †"
"""After the DER of a defense that is no better than fine-tuning."""
COLLAPSED = " COLLAPSED"
"""After the name of a defense: 20 points, or half, of the clean accuracy lost."""


def table(
    records: Iterable[measured.Measured],
    form: Format = "text",
    *,
    mean: bool = False,
    worst: bool = False,
    missing: bool = True,
    columns: str | None = None,
    only: measured.Only | None = None,
    on_damage: Callable[[Damaged], None] = measured.refuse,
) -> Table:
    """Make the table of `python -m backdoorlab table`.

    Args:
        records: The records to show.
        form: Format that it will be written in.
        mean: Show the mean over seeds of each experiment in place of each run.
        worst: As `mean`, but show the worst seed's own numbers.
        missing: Show each known defense that was not run as a row without numbers.
        columns: The columns to show, separated by commas; None for all.
        only: The results to show beside the attacked models; None for all.
        on_damage: Called with each damaged result, which is then left out. The default raises.

    Returns:
        A row for each run, or for each experiment.
    """
    further = () if columns is None else tuple(FURTHER)
    if mean or worst:
        found = measured.rows(records, only, on_damage)
        return with_columns(means(found, form, worst=worst, further=further), columns)

    every = list(records)
    controls = notes.of_controls(every)
    gaps = [note for record in every for note in notes.of_gaps(record)]
    shown = rows(every, on_damage, missing, only)
    made = with_columns(_of_runs(shown, further), columns)
    # What is said of audits goes with the columns that have it.
    audited = {name for name in made.columns if name in AUDITED}
    said = [*(controls if audited - {*SUMMARIES} else []), *(gaps if audited else [])]
    return replace(made, notes=[*made.notes, *said])


def with_columns(table: Table, columns: str | None) -> Table:
    """Keep some columns of a table, in the order given.

    Args:
        table: the whole table.
        columns: headings, separated by commas; units (%, dB) and capitals may be left out. None
            keeps all.

    Raises:
        UserError: the table has no such column.
    """
    if columns is None:
        return table
    known = {_heading(name): name for name in table.columns}
    wanted = [_heading(name) for name in columns.split(",")]
    for name in wanted:
        if name not in known:
            raise UserError(f"no column {name!r}.{suggest(name, known)} Known: {', '.join(known)}")
    kept = [known[name] for name in dict.fromkeys(wanted)]
    # What explains a column goes with it, and so do the sources of published numbers.
    gone = notes.of_columns(name for name in table.columns if name not in kept)
    if "reported" not in kept:
        gone += [note for note in table.notes if note.startswith(notes.SOURCE)]
    return replace(
        table,
        columns=kept,
        numbers=[name for name in table.numbers if name in kept],
        notes=[note for note in table.notes if note not in gone],
    )


def _heading(name: str) -> str:
    return name.strip().lower().removesuffix("%").removesuffix("db").strip()


def show(table: Table, form: Format) -> None:
    """Print a table. Notes go to standard error where the format, CSV, has no place for them."""
    print(formats.render(table, form), end="")
    if form == "csv" and table.notes:
        print("\n".join(table.notes), file=sys.stderr)


def complain(damaged: Sequence[Damaged]) -> int:
    """Print a line on standard error for each damaged result; return the command's exit code."""
    for one in damaged:
        print(one_line(one.why), file=sys.stderr)
    return 2 if damaged else 0


# --- a row for each run


def rows(
    records: Iterable[measured.Measured],
    on_damage: Callable[[Damaged], None] = measured.refuse,
    missing: bool = True,
    only: measured.Only | None = None,
) -> list[Row]:
    """List each record as it was attacked, then each known defense on it.

    A defense that was not run, or whose result is damaged, is a row without numbers; without
    `missing`, only those that are damaged are. `on_damage` is called with each damaged result; the
    default raises. `only` has the results to show; None is all.
    """
    read: list[tuple[list[measured.Row], list[Damaged]]] = []
    for record in records:
        # Damage is kept first, as each damaged result is a row, too.
        damaged: list[Damaged] = []
        read.append((measured.rows([record], only, damaged.append), damaged))
        for one in damaged:
            on_damage(one)

    # A record's rows say what the defenses cost on another record, the clean control.
    priced = iter(clean_control.priced([row for every, _ in read for row in every]))
    shown = ((list(itertools.islice(priced, len(every))), damaged) for every, damaged in read)
    wanted = methods.with_role("defense") if missing else ()
    return [row for every, damaged in shown for row in _of_record(every, damaged, wanted, only)]


def _of_record(
    every: Sequence[measured.Row],
    damaged: Sequence[Damaged],
    wanted: Iterable[str],
    only: measured.Only | None,
) -> list[Row]:
    """Show the rows of one record, by method; `wanted` are shown where they were not run, too."""
    # A defense that is not installed here is shown if it has a result.
    # Detectors and unlearners have a row for each result only.
    known = {
        *(name for name in wanted if only is None or (every[0].record, name, "") in only),
        *(row.defense for row in every),
        *(one.defense for one in damaged),
    }

    found = []
    for name in (UNDEFENDED, *sorted(known - {UNDEFENDED})):
        shown = [_run(row) for row in every if row.defense == name]
        shown += [
            _not_run(every[0], name, _called(name, one.run))
            for one in damaged
            if one.defense == name
        ]
        found += shown or [_not_run(every[0], name, name)]
    return found


def render(found: Sequence[Row], form: Format) -> str:
    """Write rows of runs in one of the four formats, with a newline at the end."""
    return formats.render(_of_runs(found), form)


def text(found: Sequence[Row]) -> str:
    """Write rows of runs as aligned text, without a newline at the end."""
    return render(found, "text").removesuffix("\n")


def assumes(words: Sequence[str]) -> str:
    """Say what a defense assumes: ("model", "train") -> "model + training set"."""
    return " + ".join(ASSUMABLE[word].removeprefix("poisoned ") for word in words) or "nothing"


def _of_runs(found: Sequence[Row], further: Iterable[str] = ()) -> Table:
    # Of a defense that was not run, nothing is known at all.
    without = [
        (row["record"].text, row["attack"].text)
        for row in found
        if row["ASR %"] == EMPTY != row["clean acc %"]
    ]
    # Columns of audits are there where one was made: depth, and whatever has a number.
    audited = [
        name
        for name in AUDITED
        if any(name in row and (name == "depth" or row[name] != EMPTY) for row in found)
    ]
    columns = [*_with_extras(COLUMNS, found), *audited, *further]
    numbers = [*SCORES, *RANKING, *FURTHER, *audited]
    oracles = any(ORACLE in row["defense"].text for row in found)
    return Table(
        columns,
        [{column: row.get(column, EMPTY) for column in columns} for row in found],
        numbers=[column for column in columns if column in numbers],
        block=["record"],
        notes=[
            *notes.without_asr(without),
            *[notes.ABOUT_ORACLE] * oracles,
            *notes.of_columns(columns),
        ],
    )


def _with_extras(columns: Sequence[str], rows: Iterable[Mapping[str, Cell]]) -> list[str]:
    """Add the columns that only tables with detectors or unlearners have."""
    # A cell is there only if its row has something to say in it.
    there = {column for row in rows for column in row}
    found = list(columns)
    if "split" in there:
        found.insert(found.index("defense") + 1, "split")
    for column in reversed([column for column in RANKING if column in there]):
        found.insert(found.index("FPR %") + 1, column)
    return found


def _run(row: measured.Row) -> Row:
    return {
        "record": Cell(row.record),
        "attack": Cell(row.attack),
        "defense": Cell(
            _called(row.defense, row.run) + ORACLE * row.oracle + COLLAPSED * row.collapsed
        ),
        "assumes": _assumes(row),
        **_own_scores(row),
        **_own_scores(row, FURTHER),
        **(_own_scores(row, AUDITED) if row.audit else {}),
        **_extras(row),
    }


def _extras(row: measured.Row) -> dict[str, Cell]:
    """Whose split an unlearner forgot, or how well a detector ranks the poison."""
    if row.kind == DETECTOR:
        return {column: _number(metric, getattr(row, metric)) for column, metric in RANKING.items()}
    return {"split": Cell(row.split)} if row.split else {}


def _not_run(undefended: measured.Row, defense: str, called: str) -> Row:
    """A row without numbers, beside a record's own row."""
    shared = {
        "record": Cell(undefended.record),
        "attack": Cell(undefended.attack),
        "defense": Cell(called),
        "assumes": _needs(defense),
    }
    return dict.fromkeys(COLUMNS, EMPTY) | shared


def _called(defense: str, run: str) -> str:
    return defense if run in ("", "seed0") else f"{defense} ({run})"


def _needs(defense: str) -> Cell:
    """What a defense that was not run assumes; EMPTY for one that is not known here."""
    try:
        return Cell(assumes(methods.load("defense", defense).assumes))
    except UserError:
        return EMPTY


# --- a row for each mean


@dataclass(frozen=True)
class Missing:
    """An attack or a defense that was to be run and has no result, in the words of the table of
    means."""

    dataset: str
    attack: str
    poison_rate: float | None
    defense: str
    """UNDEFENDED where the attack itself is missing."""
    method: str
    record: str | None = field(default=None, compare=False)
    """The attack's finished record, by which the table finds its name for the attack."""


def means(
    found: Sequence[measured.Row],
    form: Format = "text",
    *,
    missing: Sequence[Missing] = (),
    worst: bool = False,
    further: Sequence[str] = (),
) -> Table:
    """Show mean ± standard deviation over seeds for each data set, attack, rate and defense.

    Numbers that others have published stand beside ours in a column of their own, if there are any.

    Args:
        found: The measured models.
        form: Format that the table will be written in; CSV has columns for standard deviations.
        missing: What was to be run and has no result. Each is a row without numbers, below the
            rows of its attack, or at the end.
        worst: Show the worst seed's own numbers in place of the mean.
        further: Columns of FURTHER to add.

    Returns:
        The table. The value of a mean is not rounded; a score's is a fraction.
    """
    found = clean_control.priced(found)
    groups = grouping.grouped(found)
    labels = grouping.labels(groups)
    weak = grouping.no_better_than_baseline(groups)

    # A row for each experiment; a missing one is called as the table calls its attack.
    lines: list[dict[str, Cell]] = []
    called: dict[str, str] = {}
    for group, label, marked in zip(groups, labels, weak, strict=True):
        lines.append(_experiment(group, label, bool(marked), form, worst))
        called |= {row.record: label.attack for row in group.rows}
    for one in missing:
        _insert(lines, _missing(one, called.get(one.record or "", one.attack)))

    # Numbers that are read by programs have a column each.
    shown = {**SCORES, **AUDITED} if any(row.audit for row in found) else SCORES
    scores = list(shown)
    if form == "csv" and not worst:
        scores = [name for column in shown for name in (column, f"{column} sd")]
    count = "seed" if worst else "n"
    columns = ["data", "attack", "poison %", "defense", "assumes", count, *scores, *further]
    columns = _with_extras(columns, lines)
    if any("reported" in line for line in lines):
        columns.append("reported")

    return Table(
        columns,
        [{column: line.get(column, EMPTY) for column in columns} for line in lines],
        numbers=["poison %", "n", "seed", *scores, *RANKING, *further],
        block=["data", "attack", "poison %"],
        notes=[*notes.below(found, groups, weak, form, worst), *notes.of_columns(columns)],
    )


def _experiment(
    group: Group, label: Label, weak: bool, form: Format, worst: bool
) -> dict[str, Cell]:
    """The cells of one experiment: what was run, how often, its scores and published numbers."""
    row = group.worst if worst else group.first
    # A mean says how many of its seeds collapsed.
    collapsed = COLLAPSED * (row.collapsed if worst else bool(group.collapsed))
    if collapsed and not worst and group.n > 1:
        collapsed += f" {group.collapsed} of {group.n}"

    cells = {
        "data": Cell(row.dataset),
        "attack": Cell(label.attack),
        "poison %": _rate(row.poison_rate),
        "defense": Cell(label.defense + collapsed),
        "assumes": _assumes(row),
        "n": Cell(str(group.n), float(group.n)),
        "seed": _seed(row),
        **(_own_scores(row, EVERY) if worst else _mean_scores(group, form)),
        **(_extras(row) if row.split or worst else _mean_ranking(group)),
    }
    # A number in a CSV bears no mark.
    if weak and form != "csv":
        cells["DER %"] = _followed(cells["DER %"], MARK)

    published = [f"{_percents(number)} [{number.key}]" for number in beside(row)]
    return cells | ({"reported": Cell("; ".join(published))} if published else {})


EVERY: dict[str, Metric] = {**SCORES, **AUDITED, **FURTHER}


def _own_scores(row: measured.Row, shown: Mapping[str, Metric] = SCORES) -> dict[str, Cell]:
    return {column: _number(metric, getattr(row, metric)) for column, metric in shown.items()}


def _mean_scores(group: Group, form: Format) -> dict[str, Cell]:
    """Means over seeds; the standard deviation follows in the same cell, in CSV in the next."""
    cells: dict[str, Cell] = {}
    for column, metric in EVERY.items():
        score = group.score(metric)
        mean = _number(metric, score and score.mean)
        # A no-attack cost is that of all seeds, and cost and PSNR hardly depend on one.
        spread = EMPTY if column in FURTHER else _number(metric, score and score.sd)
        if form == "csv":
            cells |= {column: mean, f"{column} sd": spread}
        else:
            cells[column] = mean if spread == EMPTY else _followed(mean, f" ± {spread.text}")
    return cells


def _mean_ranking(group: Group) -> dict[str, Cell]:
    """Mean of how well a detector ranks the poison; nothing for other rows."""
    if group.first.kind != DETECTOR:
        return {}
    means = {column: group.score(metric) for column, metric in RANKING.items()}
    return {column: _number(RANKING[column], mean and mean.mean) for column, mean in means.items()}


def _missing(one: Missing, attack: str) -> dict[str, Cell]:
    return {
        "data": Cell(one.dataset),
        "attack": Cell(attack),
        "poison %": _rate(one.poison_rate),
        "defense": Cell(one.defense),
        "assumes": EMPTY if one.method == UNDEFENDED else _needs(one.method),
        "n": Cell("0", 0.0),
    }


def _insert(lines: list[dict[str, Cell]], new: dict[str, Cell]) -> None:
    """Put a row below the last one of its attack, or at the end."""

    def block(line: Mapping[str, Cell]) -> list[str]:
        return [line[column].text for column in ("data", "attack", "poison %")]

    # Rows of an attack are one block, so its last row ends the block.
    like = [number for number, line in enumerate(lines, 1) if block(line) == block(new)]
    lines.insert(like[-1] if like else len(lines), new)


# --- cells


def _number(metric: str, value: Any) -> Cell:
    """Seconds and AS_THEY_ARE as they are, fractions in percent; EMPTY for None."""
    if value is None:
        return EMPTY
    if metric in AS_THEY_ARE:
        return Cell(f"{value:.2f}", value)
    return Cell(f"{value:.0f}" if metric == "seconds" else f"{100 * value:.2f}", value)


def _followed(cell: Cell, text: str) -> Cell:
    return replace(cell, text=cell.text + text)


def _rate(rate: float | None) -> Cell:
    # 0.07 as a percent would be 7.000000000000001.
    return EMPTY if rate is None else Cell(f"{100 * rate:g}", round(100 * rate, 6))


def _seed(row: measured.Row) -> Cell:
    """The attack's seed, followed by the defense's where it is another."""
    same = row.defense_seed in (None, row.seed)
    return Cell(str(row.seed) if same else f"{row.seed} / {row.defense_seed}", float(row.seed))


def _assumes(row: measured.Row) -> Cell:
    attacked = row.defense == UNDEFENDED and not row.assumes
    return EMPTY if attacked else Cell(assumes(row.assumes))


def _percents(number: Reported) -> str:
    return " / ".join(
        _number(metric, number.scores[metric]).text
        for metric in ("clean_accuracy", "asr")
        if metric in number.scores
    )
