"""Attacks against defenses: one row for each attack, one column for each defense.

A cell has clean accuracy / ASR / RA, and the depth where it was audited. The heat map
(`report/heat_map`) is drawn from the same boards.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from . import groups as grouping
from .formats import EMPTY, Cell, Table
from .groups import BASELINE, Group
from .rows import PLAIN, UNDEFENDED, Metric, Row

SCORES: tuple[Metric, ...] = ("clean_accuracy", "asr", "robust_accuracy")
"""What a cell has, in this order."""


@dataclass(frozen=True)
class Board:
    """The groups of one data set and one network, by attack and defense."""

    dataset: str
    architecture: str
    attacks: tuple[str, ...]
    """In alphabetical order, the clean control last; with the rate where it is not the board's."""
    defenses: tuple[str, ...]
    """UNDEFENDED first, then fine-tuning, the others in alphabetical order."""
    cells: Mapping[tuple[str, str], Group]
    """(attack, defense) -> what was measured; nothing for what was not run."""
    rate: float | None
    """The poison rate of most attacks."""


def boards(found: Sequence[Row]) -> list[Board]:
    """Arrange measured models, a board for each data set and network.

    Left out are detectors, which leave no model; what was given the true poison; and ordinary
    training on the images of a training-controlled attack.
    """
    kept = [row for row in found if row.ranked and row.run != PLAIN]
    groups = grouping.grouped(kept)
    labels = grouping.labels(groups)

    # Names are those of the table of means, so that no two experiments share a cell.
    by_data: dict[tuple[str, str], list[tuple[Group, grouping.Label]]] = {}
    for group, label in zip(groups, labels, strict=True):
        place = (group.first.dataset, group.first.architecture)
        by_data.setdefault(place, []).append((group, label))
    return [_board(*place, members) for place, members in by_data.items()]


def _board(
    dataset: str, architecture: str, members: Sequence[tuple[Group, grouping.Label]]
) -> Board:
    rates = Counter(group.first.poison_rate for group, _ in members if _attacked(group))
    usual = max(rates, key=lambda rate: rates[rate], default=None)
    cells = {(label.attack + _rate(group, usual), label.defense): group for group, label in members}
    return Board(
        dataset=dataset,
        architecture=architecture,
        attacks=tuple(dict.fromkeys(attack for attack, _ in cells)),
        defenses=ordered(defense for _, defense in cells),
        cells=cells,
        rate=usual,
    )


def ordered(defenses: Iterable[str]) -> tuple[str, ...]:
    """Put UNDEFENDED first, then fine-tuning, then the others in alphabetical order."""
    return tuple(
        sorted(set(defenses), key=lambda name: (name != UNDEFENDED, name != BASELINE, name))
    )


def _attacked(group: Group) -> bool:
    return group.first.attack != "none"


def _rate(group: Group, usual: float | None) -> str:
    """Say the rate of an attack where it is not the board's."""
    rate = group.first.poison_rate
    return "" if rate in (None, usual) or not _attacked(group) else f", {100 * rate:g} %"


def table(found: Sequence[Row]) -> Table:
    """Make the table of `python -m backdoorlab table --wide True`."""
    every = boards(found)
    # All boards share the columns, so that they are one table.
    defenses = ordered(name for board in every for name in board.defenses)
    lines = [
        {
            "data": Cell(board.dataset),
            "attack": Cell(attack),
            **{name: _cell(board.cells.get((attack, name))) for name in defenses},
        }
        for board in every
        for attack in board.attacks
    ]
    columns = ["data", "attack", *defenses]
    return Table(columns, lines, numbers=defenses, block=["data"], notes=_notes(every))


def _cell(group: Group | None) -> Cell:
    """Write "98.3 / 0.0 / 98.1", the depth, and the mark of a destroyed model."""
    if group is None:
        return EMPTY
    # One cell holds what is compared: what the defense costs, stops, and gives back.
    numbers = [group.score(metric) for metric in SCORES]
    text = " / ".join("-" if one is None else f"{100 * one.mean:.1f}" for one in numbers)
    depth = group.score("depth")
    if depth is not None and group.first.defense != UNDEFENDED:
        text += f" ({depth.mean:.2f})"
    seeds = f" n={group.n}" if group.n > 1 else ""
    return Cell(text + seeds + " COLLAPSED" * bool(group.collapsed))


def _notes(every: Sequence[Board]) -> list[str]:
    """Say what the cells are, and what all rows of a board share."""
    if not every:
        return []
    said = [
        "Clean accuracy / ASR / RA in percent, in brackets the depth where it was audited; - was"
        " not run."
    ]
    groups = [group for board in every for group in board.cells.values()]
    if any(group.n > 1 for group in groups):
        said.append("n: a mean over so many seeds; one seed where nothing is said.")
    else:
        said.append("One seed.")
    said += [
        f"{board.dataset}: {board.architecture},"
        f" {next(iter(board.cells.values())).first.train_size:,} training images"
        + ("." if board.rate is None else f", {100 * board.rate:g} % poison where no rate is said.")
        for board in every
    ]
    return said
