"""The sentences below a table of means: what its numbers are, what was kept out of them, and what
they show."""

from collections.abc import Iterable, Sequence

from ..metrics import why_no_asr
from ..storage.schema import DETECTOR
from . import groups as grouping
from . import significance
from .formats import Format
from .groups import BASELINE, Group
from .published import beside
from .rows import ORACLE, Row

ABOUT_ORACLE = (
    f"{ORACLE.strip()}: was given the true poison, which no defender knows; not ranked with others."
)
"""What the mark of an oracle means."""


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

    # What was kept apart or left out, and what the comparison shows.
    said += [remark + "." for remark in grouping.remarks(rows)]
    for compared in significance.compare(groups):
        if compared.comparisons:
            said.append(_leads(compared.comparisons))
        said += [note + "." for note in compared.notes]

    # Where the published numbers come from, each source once.
    sources = {number.key: number for group in groups for number in beside(group.first)}
    return said + [
        f"[{key}] clean acc / ASR %: {number.source}; {number.protocol}."
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
