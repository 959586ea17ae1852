"""What is drawn of the cells, as plain values: the page and the figures for papers draw the same
charts.

A chart has panels, a panel has series or a grid, and under each chart stands a caption that says
what to see. Scores are in percent here. A chart that cannot be drawn has no panel, and says in
`missing` why.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from ..settings import methods
from ..tables.rows import PLAIN, UNDEFENDED
from .artifacts import Cell

LIGHT = ("#AF9100", "#06A873", "#054E91", "#954872", "#7D8CCF", "#862300", "#FF1C55")
DARK = ("#F4D122", "#3BFB8E", "#8FB9FF", "#C21E94", "#4754DB", "#B77900", "#D7164D")
"""Of methods: told apart by people without one of the three cones, too, and from the text colour;
on white and on black. Tests measure it."""
MEASURES_LIGHT = ("#C9149A", "#007D61", "#B07318", "#5B2BD0")
MEASURES_DARK = ("#B53E7A", "#01FF4C", "#5A7314", "#A401FF")
"""Of what is measured of one method, so that no method's colour means a score."""
INK = {"light": "#14213D", "dark": "#E6EDF3"}
PAPER = {"light": "#FFFFFF", "dark": "#14171C"}
SCALE = {
    "light": (PAPER["light"], "#6BAED6", "#08306B"),
    "dark": (PAPER["dark"], "#2F6FA8", "#D6ECFF"),
}
"""Of a grid, from 0 to 100 %: nothing is the background."""
SHAPES = (
    "circle",
    "square",
    "diamond",
    "triangle-up",
    "triangle-down",
    "cross",
    "star",
    "pentagon",
    "hexagon",
)
"""Colours repeat after seven, shapes after nine: 63 looks before the first comes again."""
METHODS = ("asd", "bu", "dau", "ft", "ibau", "sau")
"""Their looks in this order, on every page; methods that are not named here follow in alphabetical
order."""
TEXT = -1
"""The look of what is not a method: an x in the text colour."""
MEASURES = 100
"""Looks from here on are of what is measured."""
MOST_MARKED = 40
"""Points of a line up to which each has its mark."""
BINS = 40
WIDE = 5
"""Largest number over smallest from which on an axis of costs is logarithmic."""

Kind = Literal["points", "line", "dotted", "outline", "bars"]


@dataclass(frozen=True)
class Series:
    """Points in one look; y None is a gap."""

    name: str
    look: int
    """Which colour and shape: TEXT, a method's from 0, or a measure's from MEASURES."""
    kind: Kind
    x: Sequence[float | str]
    y: Sequence[float | str | None]
    hover: Sequence[str] = ()
    """What to say of each point."""
    cells: Sequence[int] = ()
    """Which cell each point is, where a point is a cell."""

    @property
    def marked(self) -> bool:
        """Does each point have a mark, or is it a plain line?"""
        return self.kind == "points" or (
            self.kind in ("line", "dotted") and len(self.x) <= MOST_MARKED
        )


@dataclass(frozen=True)
class Grid:
    """Numbers in rows and columns; None is a hole."""

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    unit: str


@dataclass(frozen=True)
class Panel:
    title: str
    x_label: str = ""
    y_label: str = ""
    series: tuple[Series, ...] = ()
    grid: Grid | None = None
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    log_x: bool = False
    bare: bool = False
    """Axes without a meaning: no numbers at them."""
    lanes: tuple[str, ...] = ()
    """The words on the y axis, from the top, where it has words."""
    cut: float | None = None
    """Where on the x axis a decision was made."""
    large: bool = False
    """What to look at first: higher than others."""


@dataclass(frozen=True)
class Chart:
    name: str
    """Of its file, and of its place on the page."""
    title: str
    caption: str
    panels: tuple[Panel, ...] = ()
    missing: str = ""


def looks(cells: Iterable[Cell]) -> dict[str, int]:
    """Each defense's look, which does not depend on what else is shown."""
    others = {*methods.available("defense"), *(cell.row.defense for cell in cells)} - {
        UNDEFENDED,
        *METHODS,
    }
    return {UNDEFENDED: TEXT} | {
        name: number for number, name in enumerate((*METHODS, *sorted(others)))
    }


def colour(look: int) -> str:
    """The name of a look's colour: ink, look-0, look-1, ..., measure-0, ..."""
    if look == TEXT:
        return "ink"
    return (
        f"measure-{(look - MEASURES) % len(MEASURES_LIGHT)}"
        if look >= MEASURES
        else f"look-{look % len(LIGHT)}"
    )


def shape(look: int) -> str:
    return (
        "x"
        if look == TEXT
        else SHAPES[(look - MEASURES if look >= MEASURES else look) % len(SHAPES)]
    )


def palette(scheme: Literal["light", "dark"]) -> dict[str, str]:
    """Name -> value of every colour of the charts."""
    methods, measures = (LIGHT, MEASURES_LIGHT) if scheme == "light" else (DARK, MEASURES_DARK)
    numbered = {
        f"{family}-{n}": value
        for family, values in (("look", methods), ("measure", measures))
        for n, value in enumerate(values)
    }
    return {
        "ink": INK[scheme],
        "paper": PAPER[scheme],
        **numbered,
        **{f"scale-{n}": value for n, value in enumerate(SCALE[scheme])},
    }


def overview(cells: Sequence[Cell]) -> list[Chart]:
    """The charts over all records."""
    return [accuracy_against_asr(cells), costs(cells)] if cells else []


def of_record(cells: Sequence[Cell]) -> list[Chart]:
    """The charts of one record, whose cells these are, its own first."""
    return [scores(cells), losses(cells), splits(cells), histograms(cells), destinations(cells)]


# --- over all records


def accuracy_against_asr(cells: Sequence[Cell]) -> Chart:
    """One mark a cell; a panel for each data set, and one for cells without an ASR."""
    look = looks(cells)
    panels = []
    for dataset in sorted({cell.row.dataset for cell in cells}):
        attacked = [
            cell for cell in cells if cell.row.dataset == dataset and cell.row.asr is not None
        ]
        if attacked:
            series = _by_defense(
                attacked,
                look,
                lambda c: _percent(c.row.asr),
                lambda c: _percent(c.row.clean_accuracy),
            )
            panels.append(
                Panel(dataset, "ASR %", "clean accuracy %", series, x_range=(-3, 103), large=True)
            )
    control = [cell for cell in cells if cell.row.asr is None]
    if control:
        lanes = tuple(name for name in look if any(cell.row.defense == name for cell in control))
        series = _by_defense(
            control, look, lambda c: _percent(c.row.clean_accuracy), lambda c: c.row.defense
        )
        panels.append(
            Panel(
                "no ASR: no attack, or an unknown trigger",
                "clean accuracy %",
                "",
                series,
                lanes=lanes,
            )
        )
    caption = (
        "One mark for each model that was measured. A defense that works moves the mark of its"
        " attack (x, on the right) to the left without letting it sink: the upper left corner is"
        " best. A mark far below the others bought its low ASR with accuracy."
    )
    return Chart(
        "accuracy_asr", "Clean accuracy against attack success rate", caption, tuple(panels)
    )


def costs(cells: Sequence[Cell]) -> Chart:
    """Seconds, peak memory and image passes, one mark a cell that has the number."""
    look = looks(cells)
    panels = []
    for title, label, value in (
        ("Time", "seconds, without evaluation", lambda c: c.row.seconds),
        (
            "Peak memory",
            "GiB",
            lambda c: c.row.peak_memory_bytes and c.row.peak_memory_bytes / 2**30,
        ),
        ("Image passes, forward and backward", "passes over the training set", _passes),
    ):
        known = [cell for cell in cells if value(cell)]
        lanes = tuple(name for name in look if any(cell.row.defense == name for cell in known))
        if known:
            numbers = [value(cell) or 0 for cell in known]
            wide = max(numbers) > WIDE * min(numbers)
            panels.append(
                Panel(
                    title,
                    label,
                    "",
                    _by_defense(known, look, value, lambda c: c.row.defense),
                    log_x=wide,
                    lanes=lanes,
                )
            )
    caption = (
        "Further left is cheaper; an axis is logarithmic where its numbers differ much. Seconds and"
        " memory belong to the machine that a mark names when pointed at (memory is the whole"
        " process on a CPU, torch's share on a GPU); image passes are the same everywhere. The row"
        " none is the attack's own training."
    )
    return Chart(
        "costs",
        "Time, memory and image passes",
        caption,
        tuple(panels),
        "" if panels else "No cell says what it cost.",
    )


def _passes(cell: Cell) -> float | None:
    row = cell.row
    return (
        None
        if row.forward is None or row.backward is None
        else (row.forward + row.backward) / max(1, row.train_size)
    )


def _by_defense(
    cells: Sequence[Cell], look: dict[str, int], x: Callable[[Cell], Any], y: Callable[[Cell], Any]
) -> tuple[Series, ...]:
    members = defaultdict(list)
    for cell in cells:
        members[cell.row.defense].append(cell)
    return tuple(
        Series(
            name,
            look[name],
            "points",
            [x(c) for c in own],
            [y(c) for c in own],
            [described(c) for c in own],
            [c.number for c in own],
        )
        for name, own in sorted(members.items(), key=lambda member: look[member[0]])
    )


def described(cell: Cell) -> str:
    """What a mark says of itself, line by line."""
    row = cell.row
    scores = (
        f"clean accuracy {_text(_percent(row.clean_accuracy))}, ASR {_text(_percent(row.asr))}, RA"
        f" {_text(_percent(row.robust_accuracy))}"
    )
    lines = [f"{row.record}: {row.attack}, {cell.name}", scores]
    if row.seconds is not None:
        lines.append(f"{row.seconds:,.0f} s on {row.device or 'an unnamed machine'}")
    return "\n".join(
        lines
        + (
            ["COLLAPSED: 20 points, or half, of the clean accuracy are lost"]
            if row.collapsed
            else []
        )
    )


# --- one record

SCORES = {
    "clean_accuracy": ("clean accuracy", MEASURES + 1),
    "asr": ("ASR", MEASURES),
    "robust_accuracy": ("robust accuracy", MEASURES + 2),
}


def scores(cells: Sequence[Cell]) -> Chart:
    """Clean accuracy, ASR and RA epoch by epoch, a panel for each defense with a line for each of
    its runs."""
    panels = []
    for title, runs in _trainings(cells):
        series = _score_series(title, runs)
        if series:
            last = max(float(x) for one in series for x in one.x)
            panels.append(
                Panel(
                    title,
                    "epoch",
                    "%",
                    series,
                    x_range=(-0.03 * last, 1.03 * last),
                    y_range=(-3, 103),
                )
            )
    caption = (
        "A defense starts at epoch 0 with what the attack left. It works where ASR falls while"
        " clean accuracy stays, and robust accuracy, the share of triggered images that get their"
        " true label, rises. Dotted: only the start and the end were measured (--score_every 0)."
        " Several lines of a colour are several runs."
    )
    missing = (
        ""
        if panels
        else "No defense was run, and the attack was scored at its end only (--score_every 0)."
    )
    return Chart("scores", "Scores, epoch by epoch", caption, tuple(panels), missing)


def _score_series(title: str, runs: Sequence[tuple[Cell, pd.DataFrame]]) -> tuple[Series, ...]:
    found = []
    for metric, (name, look) in SCORES.items():
        for cell, history in runs:
            seen = history.dropna(subset=[metric]) if metric in history else history.iloc[:0]
            x, y = (
                [float(at) for at in seen["at"]],
                [100 * float(value) for value in seen[metric]] if len(seen) else [],
            )
            end, before = (
                getattr(cell.row, metric),
                cell.info.get("before", cell.record.info["scores"])[metric],
            )
            measured = bool(x)
            if end is None or (cell.undefended and not measured):
                continue
            last = float(max(1, len(history)))
            if not x or x[-1] < last:
                x, y = [*x, last], [*y, 100 * end]
            if not cell.undefended and before is not None:
                x, y = [0.0, *x], [100 * before, *y]
            found.append(
                Series(
                    name,
                    look,
                    "line" if measured else "dotted",
                    x,
                    y,
                    [f"{title if cell.undefended else cell.name}: {name}"] * len(x),
                )
            )
    return tuple(found)


def losses(cells: Sequence[Cell]) -> Chart:
    """Each run's training loss, a panel for each defense and stage."""
    panels = []
    for title, runs in _trainings(cells):
        known = [(cell, history) for cell, history in runs if "loss" in history]
        for stage in dict.fromkeys(stage for _, history in known for stage in history["stage"]):
            series = []
            for cell, history in known:
                seen = history[history["stage"] == stage].dropna(subset=["loss"])
                x, y = (
                    [float(at) for at in range(1, len(seen) + 1)],
                    [float(value) for value in seen["loss"]],
                )
                if x:
                    series.append(
                        Series(
                            "loss",
                            MEASURES + 3,
                            "line",
                            x,
                            y,
                            [title if cell.undefended else cell.name] * len(x),
                        )
                    )
            if series:
                panels.append(
                    Panel(
                        title + (f", {stage}" if stage not in ("", PLAIN) else ""),
                        "epoch of the stage",
                        "loss",
                        tuple(series),
                    )
                )
    caption = (
        "What each method minimises, on its own scale, so only the shape compares: a line that"
        " still falls at its end was stopped early."
    )
    return Chart(
        "loss", "Training loss", caption, tuple(panels), "" if panels else "No run kept a loss."
    )


RATES = {
    "tpr": ("TPR: share of the poison that is flagged", MEASURES),
    "precision": ("precision", MEASURES + 1),
    "fpr": ("FPR: share of the clean images that is flagged", MEASURES + 2),
}


def splits(cells: Sequence[Cell]) -> Chart:
    """How well each split finds the poison: per epoch where it is made anew in each, and as it was
    reported at the end."""
    caption = (
        "A defense that splits the training set should flag all of the poison (TPR 100) and nothing"
        " else (FPR 0, precision 100). ASD flags the half that it does not trust yet, so its"
        " precision is low by construction: look for a TPR that stays high. DAU reports a small,"
        " pure pool first, then the whole split."
    )
    if not cells[0].record.known_poison:
        return Chart(
            "split",
            "Finding the poison",
            caption,
            missing="Nobody knows which images of this record are poisoned.",
        )
    panels = []
    for cell in cells:
        history = cell.history
        if {"split_flagged", "split_missed"} <= set(history.columns) and len(
            seen := history.dropna(subset=["split_flagged", "split_missed"])
        ) > 1:
            x = [float(at) for at in seen["at"]]
            rates = [
                _rates(cell, float(flagged), float(missed))
                for flagged, missed in zip(seen["split_flagged"], seen["split_missed"], strict=True)
            ]
            series = tuple(
                Series(title, look, "line", x, [rate[key] for rate in rates])
                for key, (title, look) in RATES.items()
            )
            panels.append(
                Panel(f"{cell.name}, epoch by epoch", "epoch", "%", series, y_range=(-3, 103))
            )
    reported = [
        (f"{cell.name}: {name}" if name != "split" else cell.name, quality)
        for cell in cells
        for name, quality in cell.splits.items()
    ]
    if reported:
        known = {
            key: [
                (name, 100 * quality[key])
                for name, quality in reported
                if quality.get(key) is not None
            ]
            for key in RATES
        }
        series = tuple(
            Series(
                title,
                look,
                "bars",
                [rate for _, rate in known[key]],
                [name for name, _ in known[key]],
            )
            for key, (title, look) in RATES.items()
        )
        panels.append(
            Panel(
                "as reported at the end",
                "%",
                "",
                series,
                x_range=(0, 115),
                lanes=tuple(dict.fromkeys(name for name, _ in reported)),
            )
        )
    return Chart(
        "split",
        "Finding the poison",
        caption,
        tuple(panels),
        "" if panels else "No run on this record splits the training set.",
    )


def _rates(cell: Cell, flagged: float, missed: float) -> dict[str, float | None]:
    """TPR, precision and FPR in percent, from how many are flagged and how many poisoned images are
    not."""
    poisoned = int(cell.record.train_poison.mask(cell.row.train_size).sum())
    hit, clean = poisoned - missed, cell.row.train_size - poisoned
    share = lambda part, whole: 100 * part / whole if whole else None
    return {
        "tpr": share(hit, poisoned),
        "precision": share(hit, flagged),
        "fpr": share(flagged - hit, clean),
    }


def histograms(cells: Sequence[Cell]) -> Chart:
    """What a split was decided by, poison and clean images apart, each as a share of its own."""
    panels = []
    for cell in cells:
        if cell.suspicion is not None and cell.suspicion[0].isfinite().any():
            values, poisoned = cell.suspicion
            series = tuple(
                Series(name, look, "outline", *_histogram(values, mask))
                for name, look, mask in (
                    ("poison", MEASURES, poisoned),
                    ("clean", MEASURES + 1, ~poisoned),
                )
                if mask.any()
            )
            panels.append(Panel(cell.name, "suspicion", "% of its own", series, cut=_cut(cell)))
    caption = (
        "The number by which a defense tells poison from clean images, as it saw it last: for DAU"
        " the log of what share of its confidence the anti-learned head lost, cut at the dashed"
        " line (minus the log of its threshold); for ASD the loss by which its last pool was"
        " chosen. The further apart the two outlines, the easier the split. The first and the last"
        " bin hold what lies beyond them, too."
    )
    return Chart(
        "suspicion",
        "What the split is decided by",
        caption,
        tuple(panels),
        "" if panels else "No run on this record kept it.",
    )


def _cut(cell: Cell) -> float | None:
    """Where a run with a threshold on the share of confidence cut."""
    threshold = cell.info.get("config", {}).get("threshold")
    return -math.log(threshold) if isinstance(threshold, float) and 0 < threshold < 1 else None


def _histogram(values: Tensor, mask: Tensor) -> tuple[list[float], list[float]]:
    """Outline of a histogram over the range of all finite values: (edges, percent), two points a
    bin."""
    finite = values[values.isfinite()].float()
    low, high = (
        (
            float(finite.quantile(q))
            if len(finite) < 10_000_000
            else float(finite.min() if q < 0.5 else finite.max())
        )
        for q in (0.001, 0.999)
    )
    high = high if high > low else low + 1
    inside = values[mask].float().nan_to_num(low).clamp(low, high)
    shares = torch.histc(inside, BINS, low, high) / max(1, len(inside))
    edges = torch.linspace(low, high, BINS + 1).tolist()
    return [edge for pair in pairwise(edges) for edge in pair], [
        100 * float(share) for share in shares for _ in range(2)
    ]


def destinations(cells: Sequence[Cell]) -> Chart:
    """Which class triggered images are taken for, before and after each defense."""
    known = [cell for cell in cells if cell.triggered_predictions]
    title, caption = (
        "Where triggered images go",
        (
            "Each row is a model, each cell the share of triggered test images that it takes for"
            " that class: the stronger the colour, the more. Before a defense the target's column"
            " holds nearly all. A removed backdoor spreads them as their true classes are spread;"
            " another column that fills means that the trigger was moved, not removed."
        ),
    )
    if not known:
        return Chart(
            "destinations",
            title,
            caption,
            missing=(
                "There are no triggered images: this record has no attack, or nobody knows the"
                " trigger."
            ),
        )
    columns = class_names(cells[0])
    values = [
        [100 * count / sum(counts) for count in counts]
        for cell in known
        if (counts := cell.triggered_predictions)
    ]
    rows = [
        ("plain training" if cell.row.run else "no defense") if cell.undefended else cell.name
        for cell in known
    ]
    return Chart(
        "destinations",
        title,
        caption,
        (Panel("", "class", "", grid=Grid(rows, columns, values, "% of the triggered images")),),
    )


# --- words


def class_names(cell: Cell) -> list[str]:
    """One short name for each class, the target's with that word."""
    info = cell.record.info
    names = [
        _short(name)
        for name in info["dataset"].get("class_names") or map(str, range(info["num_classes"]))
    ]
    names = [
        f"{number}: {name}" if names.count(name) > 1 else name for number, name in enumerate(names)
    ]
    return [
        f"{name} (target)" if number == info.get("target") else name
        for number, name in enumerate(names)
    ]


def _trainings(cells: Sequence[Cell]) -> list[tuple[str, list[tuple[Cell, pd.DataFrame]]]]:
    """(title, its runs and their epochs): the attack's own first, then ordinary training on its
    images, then each defense."""
    found: dict[str, list[tuple[Cell, pd.DataFrame]]] = {}
    for cell in cells:
        title, history = cell.row.defense, cell.history
        if cell.undefended:  # the epochs of both trainings are kept with the record
            plain, everything = cell.row.run == PLAIN, cells[0].history
            title = "plain training on the snapshot" if plain else "the attack's training"
            history = (
                everything[(everything["stage"] == PLAIN) == plain]
                if "stage" in everything
                else everything.iloc[: 0 if plain else None]
            )
            history = history.assign(at=range(1, len(history) + 1))
        found.setdefault(title, []).append((cell, history))
    return list(found.items())


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"
