"""The sentences below a table of means: what its numbers are, what was kept out of them, and what
they show."""

from collections.abc import Iterable, Sequence

from ..errors import UserError
from ..metrics import why_no_asr
from ..record import read_result
from ..storage.schema import DETECTOR
from . import audits, significance
from . import groups as grouping
from .formats import Format
from .groups import BASELINE, Group
from .published import beside
from .rows import ORACLE, Measured, Row, result_folders

ABOUT_ORACLE = (
    f"{ORACLE.strip()}: was given the true poison, which no defender knows; not ranked with others."
)
"""What the mark of an oracle means."""
ABOUT = {
    "depth": (
        "Depth (audit): 1 is a model that was never poisoned, 0 the undefended one, by the ASR"
        " after fine-tuning on a few clean images and 5 poisoned ones (P-ASR 5)."
    ),
    "solved %": (
        "Solved: ASR below 5 %, at most 3 points of clean accuracy lost, RA within 10 points of it,"
        " depth at least .8."
    ),
    "BN-ASR %": "BN-ASR: the ASR after the batch statistics were estimated anew on clean images.",
    "trainings": "Trainings: cost by image passes, in units of one training of the attacked model.",
    "no-attack cost %": (
        "No-attack cost: clean accuracy that the same defense takes from the clean control."
    ),
}
"""Column -> what it is, where its heading does not say so."""


SOURCE = "["
"""Begins a note on where published numbers are from."""


def of_columns(columns: Iterable[str]) -> list[str]:
    """Explain the columns of a table."""
    return [ABOUT[name] for name in columns if name in ABOUT]


def of_controls(records: Iterable[Measured]) -> list[str]:
    """Say what the controls of audited records give."""
    said = []
    for record in records:
        controls = {
            name: audits.read(record.folder / "controls" / f"{kind}.json", record.info)
            for kind, name in CONTROLS.items()
        }
        shown = [f"{name} {_p_asr(found)}" for name, found in controls.items() if found]
        if shown:
            said.append(f"{record.name}, P-ASR % at n = 0, 1, 5, 20: {'; '.join(shown)}.")
    return said


CONTROLS = {
    "undefended": "undefended",
    "clean": "clean model",
    "exact": "exact purification",
}
"""Control of an audit -> its name in a note."""


def _p_asr(found: audits.Audit) -> str:
    return " ".join("-" if value is None else f"{100 * value:.0f}" for value in found.p_asr)


def of_gaps(record: Measured) -> list[str]:
    """Say once for each reason why audited results of a record lack a number."""
    reasons: dict[str, list[str]] = {}
    for folder in result_folders(record.folder):
        # Most results have no audit, and damage was reported when the rows were made.
        if not (folder / audits.FILE).is_file():
            continue
        try:
            found = audits.read(folder / audits.FILE, read_result(folder))
        except UserError:
            continue
        for why in found.why if found else ():
            reasons.setdefault(why, []).append(f"{folder.parent.name} {folder.name}")
    return [f"{record.name}, {', '.join(names)}: {why}." for why, names in reasons.items()]


def solved(groups: Sequence[Group]) -> list[str]:
    """Say for each defense which share of its audited cells is solved, and name the worst."""
    # Of all data sets and attacks together: a share of one cell says little.
    cells: dict[str, list[Row]] = {}
    for group in groups:
        for row in group.rows:
            if row.is_solved is not None:
                cells.setdefault(row.called, []).append(row)
    if not cells:
        return []

    said = []
    for name, rows in cells.items():
        # A cell without a depth collapsed, or failed before depth could matter.
        worst = min(rows, key=lambda row: -1.0 if row.depth is None else row.depth)
        depth = "no depth" if worst.depth is None else f"depth {worst.depth:.2f}"
        count = sum(bool(row.is_solved) for row in rows)
        said.append(f"{name} {count} of {len(rows)} (worst: {worst.record}, {depth})")
    return [f"Solved cells: {', '.join(said)}."]


def below(
    rows: Sequence[Row],
    groups: Sequence[Group],
    weak: Sequence[bool | None],
    form: Format,
    worst: bool,
) -> list[str]:
    """Write the notes of a table of means.

    Args:
        rows: All measured models, those that no group counts included.
        groups: The rows as `groups.grouped` groups them.
        weak: For each group, whether it is no better than fine-tuning; None where that cannot be
            asked.
        form: Format of the table. CSV cells carry no dagger, so it is not explained.
        worst: Whether the table shows the worst seed of each group in place of the mean.

    Returns:
        One or two sentences a note, in the order of the table's columns, published sources last.
    """
    said = _meaning(groups, worst)
    said += [_networks(rows, dataset) for dataset in dict.fromkeys(g.first.dataset for g in groups)]

    # What the marks and the DER of some rows mean.
    if any(weak) and form != "csv":
        said.append(f"†: no better than fine-tuning ({BASELINE}) in DER on the same records.")
    own = dict.fromkeys(row.defense for row in rows if row.der != row.comparable_der)
    if own:
        said.append(
            f"DER of {', '.join(own)} on joint attacks: against plain training on the same images;"
            f" against the attacked model, as {BASELINE}'s, where defenses are compared."
        )

    said += without_asr(
        (row.record, row.attack) for row in rows if row.asr is None and row.kind != DETECTOR
    )
    if any(row.oracle for row in rows):
        said.append(ABOUT_ORACLE)
    if any(row.audit for row in rows):
        said += solved(groups)

    # What was kept apart or left out, and what the comparison shows.
    said += [remark + "." for remark in grouping.remarks(rows)]
    for compared in significance.compare(groups):
        if compared.comparisons:
            said.append(_leads(compared.comparisons))
        said += [note + "." for note in compared.notes]

    # Where the published numbers come from, each source once.
    sources = {number.key: number for group in groups for number in beside(group.first)}
    return said + [
        f"{SOURCE}{key}] clean acc / ASR %: {number.source}; {number.protocol}."
        for key, number in sources.items()
    ]


def without_asr(models: Iterable[tuple[str, str]]) -> list[str]:
    """Say why models have no ASR, in one sentence for each reason.

    Args:
        models: (record, attack) of each model without one.
    """
    names: dict[str, list[str]] = {}
    for record, attack in dict.fromkeys(models):
        names.setdefault(why_no_asr(attack), []).append(record)
    return [
        f"No ASR for {', '.join(records[:5])}{', ...' * (len(records) > 5)}: {why}."
        for why, records in names.items()
    ]


def _meaning(groups: Sequence[Group], worst: bool) -> list[str]:
    """Explain the columns, where the table has rows."""
    if not groups:
        return []

    first = (
        "Each row is one model: the seed with the lowest DER (the lowest clean accuracy without an"
        " attack); the attack's / the defense's where they differ."
        if worst
        else "Mean ± standard deviation over n seeds; seconds without evaluation."
    )
    return [
        first,
        "RA: triggered images that are classified correctly. DER: 50 is no effect, 100 is an ASR"
        " from 100 to 0 at no cost in accuracy.",
    ]


def _networks(rows: Sequence[Row], dataset: str) -> str:
    """Name the networks of a data set, and how many images each was trained on."""
    networks = dict.fromkeys(
        f"{row.architecture}, {row.train_size:,} training images"
        for row in rows
        if row.dataset == dataset
    )
    return f"{dataset}: {'; '.join(networks)}."


def _leads(comparisons: Sequence[significance.Comparison]) -> str:
    """Write each defense's mean lead over fine-tuning on one data set, and the verdict."""
    unequal = len({c.attacks for c in comparisons}) > 1

    def lead(c: significance.Comparison) -> str:
        details = [f"{c.attacks} attack{'s' * (c.attacks > 1)}"] if unequal else []
        # With fewer attacks no p can be small, so none is shown.
        if c.attacks >= significance.fewest_attacks(1):
            details += [f"p {c.p:.2g}", f"Holm {c.holm:.2g}"]
        shown = f" ({', '.join(details)})" if details else ""
        return f"{c.defense} {100 * c.difference:+.2f}{shown}"

    leads = ", ".join(map(lead, comparisons))
    return (
        f"{comparisons[0].dataset}, DER minus {comparisons[0].baseline}'s, mean over attacks:"
        f" {leads}. {significance.verdict(comparisons)}"
    )
