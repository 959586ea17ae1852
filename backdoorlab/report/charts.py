"""What is drawn of the measured models, as plain values. The page and the figures for papers draw
the same charts.

A chart has panels, a panel has series, a grid or a picture, and the caption under a chart says what
to look for. Scores are in percent here. A chart that cannot be drawn has no panel, and `missing`
says why.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from ..metrics import COLLAPSED
from ..tables.rows import PLAIN
from . import looks
from .artifacts import Cell

MOST_MARKED = 40
"""Largest number of points of a line for which each has a mark."""
BINS = 40
"""Bins of a histogram."""
WIDE = 5
"""An axis of costs is logarithmic if its largest number is more than so many times its smallest."""

Kind = Literal["points", "line", "dotted", "outline", "bars"]


@dataclass(frozen=True)
class Series:
    """Points of one colour and shape; where y is None there is a gap."""

    name: str
    look: int
    """Colour and shape, as a number of `looks`."""
    kind: Kind
    x: Sequence[float | str]
    y: Sequence[float | str | None]
    hover: Sequence[str] = ()
    """What each point says when pointed at."""
    cells: Sequence[int] = ()
    """The number of each point's cell, if a point is a cell."""

    @property
    def marked(self) -> bool:
        """Whether each point has a mark; a plain line otherwise."""
        # Marks that touch each other would hide the line.
        few = len(self.x) <= MOST_MARKED
        return self.kind == "points" or (self.kind in ("line", "dotted") and few)


@dataclass(frozen=True)
class Grid:
    """Numbers in rows and columns; None leaves a field empty."""

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    unit: str


@dataclass(frozen=True)
class Panel:
    """A pair of axes with series, a grid, or a picture."""

    title: str
    x_label: str = ""
    y_label: str = ""
    series: tuple[Series, ...] = ()
    grid: Grid | None = None
    picture: bytes | None = field(default=None, repr=False)
    """A PNG."""
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    log_x: bool = False
    bare: bool = False
    """Whether the axes have no meaning, so that no numbers stand at them."""
    lanes: tuple[str, ...] = ()
    """The words on the y axis from the top, if it has words."""
    cut: float | None = None
    """The threshold on the x axis by which the defense decided."""
    large: bool = False
    """Whether it is higher than others, as the panel to look at first."""


@dataclass(frozen=True)
class Chart:
    """Panels under one title, with a caption."""

    name: str
    """Part of the name of its file, and of its id on the page."""
    title: str
    caption: str
    panels: tuple[Panel, ...] = ()
    missing: str = ""
    """Why there is no panel."""

    @property
    def pictured(self) -> bool:
        """Whether its panels are pictures."""
        return any(panel.picture is not None for panel in self.panels)


def overview(cells: Sequence[Cell]) -> list[Chart]:
    """Make the charts over all records."""
    if not cells:
        return []
    audited = any(cell.row.p_asr_5 is not None for cell in cells)
    return [accuracy_against_asr(cells), *([comeback(cells)] if audited else []), costs(cells)]


def of_record(cells: Sequence[Cell]) -> list[Chart]:
    """Make the charts of one record from its cells, of which the undefended one is the first."""
    return [scores(cells), losses(cells), splits(cells), histograms(cells), destinations(cells)]


# --- over all records


def accuracy_against_asr(cells: Sequence[Cell]) -> Chart:
    """Draw clean accuracy against ASR: one mark for each cell, a panel for each data set."""
    look = _looks(cells)
    # Without a model there is no mark, and an oracle is no competitor.
    cells = [cell for cell in cells if cell.row.ranked]

    # Accuracies of different data sets are not on one scale.
    panels = []
    for dataset in sorted({cell.row.dataset for cell in cells}):
        own = [cell for cell in cells if cell.row.dataset == dataset]
        attacked = [cell for cell in own if cell.row.asr is not None]
        if attacked:
            series = _by_defense(
                attacked,
                look,
                x=lambda c: _percent(c.row.asr),
                y=lambda c: _percent(c.row.clean_accuracy),
            )
            panels.append(
                Panel(dataset, "ASR %", "clean accuracy %", series, x_range=(-3, 103), large=True)
            )

    # Cells without an ASR have one axis only; their defenses stand on the other.
    control = [cell for cell in cells if cell.row.asr is None]
    if control:
        series = _by_defense(
            control,
            look,
            x=lambda c: _percent(c.row.clean_accuracy),
            y=lambda c: c.row.defense,
        )

        title = "no ASR: no attack, or an unknown trigger"
        panels.append(Panel(title, "clean accuracy %", series=series, lanes=_lanes(control, look)))

    caption = (
        "One mark for each model that was measured. A defense that works moves the mark of its"
        " attack (x, on the right) to the left without letting it sink: the upper left corner is"
        " best. A mark far below the others bought its low ASR with accuracy."
    )
    return Chart(
        "accuracy_asr", "Clean accuracy against attack success rate", caption, tuple(panels)
    )


def comeback(cells: Sequence[Cell]) -> Chart:
    """Draw the ASR after fine-tuning with five poisoned images against the reported ASR: one mark
    for each audited cell, a panel for each data set."""
    look = _looks(cells)
    audited = [cell for cell in cells if cell.row.ranked and cell.row.p_asr_5 is not None]

    panels = []
    for dataset in sorted({cell.row.dataset for cell in audited}):
        series = _by_defense(
            [cell for cell in audited if cell.row.dataset == dataset],
            look,
            x=lambda c: _percent(c.row.asr),
            y=lambda c: _percent(c.row.p_asr_5),
        )
        panels.append(
            Panel(
                dataset,
                "ASR %, as reported",
                "ASR % after five poisoned images",
                series,
                x_range=(-3, 103),
                y_range=(-3, 103),
                large=True,
            )
        )

    caption = (
        "One mark for each audited model. A mark on the left is a low ASR; the higher it stands,"
        " the more of the backdoor comes back when the model is fine-tuned on a few images, of"
        " which five are poisoned. Removed is the lower left corner; the upper left is only quiet."
    )
    return Chart("comeback", "Is the backdoor gone, or only quiet?", caption, tuple(panels))


def costs(cells: Sequence[Cell]) -> Chart:
    """Draw seconds, peak memory and image passes: one mark for each cell that has the number."""
    look = _looks(cells)
    measures: tuple[tuple[str, str, Callable[[Cell], float | None]], ...] = (
        ("Time", "seconds, without evaluation", lambda c: c.row.seconds),
        ("Peak memory", "GiB", _gibibytes),
        ("Image passes, forward and backward", "passes over the training set", _passes),
    )

    panels = []
    for title, label, value in measures:
        known = [cell for cell in cells if value(cell)]
        if not known:
            continue
        # A logarithmic axis is harder to read, so it is used only where it has to be.
        numbers = [value(cell) or 0 for cell in known]

        panels.append(
            Panel(
                title,
                label,
                series=_by_defense(known, look, x=value, y=lambda c: c.row.defense),
                log_x=max(numbers) > WIDE * min(numbers),
                lanes=_lanes(known, look),
            )
        )

    caption = (
        "Further left is cheaper; an axis is logarithmic where its numbers differ much. Seconds and"
        " memory belong to the machine that a mark names when pointed at (memory is the whole"
        " process on a CPU, torch's share on a GPU); image passes are the same everywhere. The row"
        " none is the attack's own training."
    )
    missing = "" if panels else "No run measured its costs."
    return Chart("costs", "Time, memory and image passes", caption, tuple(panels), missing)


def _gibibytes(cell: Cell) -> float | None:
    return cell.row.peak_memory_bytes and cell.row.peak_memory_bytes / 2**30


def _passes(cell: Cell) -> float | None:
    row = cell.row
    if row.forward is None or row.backward is None:
        return None
    return (row.forward + row.backward) / max(1, row.train_size)


def _looks(cells: Sequence[Cell]) -> dict[str, int]:
    return looks.of_defenses(cell.row.defense for cell in cells)


def _lanes(cells: Sequence[Cell], look: dict[str, int]) -> tuple[str, ...]:
    """The defenses of these cells, in the order of their looks."""
    # A lane without a mark would take space for nothing.
    there = {cell.row.defense for cell in cells}
    return tuple(name for name in look if name in there)


def _by_defense(
    cells: Sequence[Cell], look: dict[str, int], x: Callable[[Cell], Any], y: Callable[[Cell], Any]
) -> tuple[Series, ...]:
    """Make a series of each defense's cells, in the order of their looks."""
    # One series has one colour and shape, and one entry in the legend.
    members = defaultdict(list)
    for cell in cells:
        members[cell.row.defense].append(cell)

    return tuple(
        Series(
            name,
            look[name],
            "points",
            x=[x(cell) for cell in own],
            y=[y(cell) for cell in own],
            hover=[described(cell) for cell in own],
            cells=[cell.number for cell in own],
        )
        for name, own in sorted(members.items(), key=lambda member: look[member[0]])
    )


def described(cell: Cell) -> str:
    """Write what a mark says when pointed at: names, scores, time, and whether it collapsed."""
    row = cell.row
    scores = (
        f"clean accuracy {_text(_percent(row.clean_accuracy))}, ASR {_text(_percent(row.asr))}, RA"
        f" {_text(_percent(row.robust_accuracy))}"
    )
    lines = [f"{row.record}: {row.attack}, {cell.name}", scores]
    if row.seconds is not None:
        lines.append(f"{row.seconds:,.0f} s on {row.device or 'an unnamed machine'}")
    if row.collapsed:
        lines.append(f"COLLAPSED: {COLLAPSED}")
    return "\n".join(lines)


# --- one record, epoch by epoch

SCORES = {
    "clean_accuracy": ("clean accuracy", looks.MEASURES + 1),
    "asr": ("ASR", looks.MEASURES),
    "robust_accuracy": ("robust accuracy", looks.MEASURES + 2),
}
"""Metric -> its name and look."""


def scores(cells: Sequence[Cell]) -> Chart:
    """Draw clean accuracy, ASR and RA by epoch: a panel for each defense, a line for each run."""
    # A mark at epoch 0 or at the last epoch is not cut off by the frame.
    panels = []
    for title, runs in _trainings(cells):
        series = _score_series(title, runs)
        if series:
            last = max(float(x) for one in series for x in one.x)
            x_range = (-0.03 * last, 1.03 * last)
            panels.append(Panel(title, "epoch", "%", series, x_range=x_range, y_range=(-3, 103)))

    caption = (
        "A defense starts at epoch 0 with what the attack left. It works where ASR falls while"
        " clean accuracy stays, and robust accuracy, the share of triggered images that are"
        " classified correctly, rises. Dotted: only the start and the end were measured"
        " (--score_every 0). Several lines of a colour are several runs."
    )

    missing = "No defense was run, and the attack was scored at its end only (--score_every 0)."
    return Chart(
        "scores", "Scores, epoch by epoch", caption, tuple(panels), "" if panels else missing
    )


def _score_series(title: str, runs: Sequence[tuple[Cell, pd.DataFrame]]) -> tuple[Series, ...]:
    """Make a line of each score of each run."""
    found = []
    for metric, (name, look) in SCORES.items():
        for cell, history in runs:
            points = _trajectory(cell, history, metric)
            if points is None:
                continue
            x, y, measured = points
            kind: Kind = "line" if measured else "dotted"
            words = f"{title if cell.undefended else cell.name}: {name}"
            found.append(Series(name, look, kind, x, y, hover=[words] * len(x)))
    return tuple(found)


def _trajectory(
    cell: Cell, history: pd.DataFrame, metric: str
) -> tuple[list[float], list[float], bool] | None:
    """Follow one score of one run from the attack to the end.

    Returns:
        Epochs, percents, and whether the score was measured between start and end. None without a
        score, and for an attack that was scored at its end only.
    """
    seen = history.dropna(subset=[metric]) if metric in history else history.iloc[:0]
    x = [float(at) for at in seen["at"]]
    y = [100 * float(value) for value in seen[metric]] if len(seen) else []
    measured = bool(x)
    end = getattr(cell.row, metric)
    if end is None or (cell.undefended and not measured):
        return None

    # The last score is the result's own, if the last epoch was not scored.
    last = float(max(1, len(history)))
    if not x or x[-1] < last:
        x, y = [*x, last], [*y, 100 * end]

    # A defense starts where the attack ended.
    before = cell.info.get("before", cell.record.info["scores"])[metric]
    if not cell.undefended and before is not None:
        x, y = [0.0, *x], [100 * before, *y]
    return x, y, measured


def losses(cells: Sequence[Cell]) -> Chart:
    """Draw each run's training loss: a panel for each defense and stage."""
    # Stages minimise different losses, so each has a panel.
    panels = []
    for title, runs in _trainings(cells):
        known = [(cell, history) for cell, history in runs if "loss" in history]
        for stage in dict.fromkeys(stage for _, history in known for stage in history["stage"]):
            series = tuple(_loss_series(title, stage, known))
            if series:
                named = title if stage in ("", PLAIN) else f"{title}, {stage}"
                panels.append(Panel(named, "epoch of the stage", "loss", series))

    caption = (
        "What each method minimises, on its own scale, so only the shape compares: a line that"
        " still falls at its end was stopped early."
    )
    missing = "" if panels else "No run kept a loss."
    return Chart("loss", "Training loss", caption, tuple(panels), missing)


def _loss_series(
    title: str, stage: str, runs: Sequence[tuple[Cell, pd.DataFrame]]
) -> Iterator[Series]:
    """Yield the loss of each run that has the stage."""
    for cell, history in runs:
        seen = history[history["stage"] == stage].dropna(subset=["loss"])
        x = [float(at) for at in range(1, len(seen) + 1)]
        y = [float(value) for value in seen["loss"]]
        if x:
            hover = [title if cell.undefended else cell.name] * len(x)
            yield Series("loss", looks.MEASURES + 3, "line", x, y, hover)


def _trainings(cells: Sequence[Cell]) -> list[tuple[str, list[tuple[Cell, pd.DataFrame]]]]:
    """List (title, its runs with their epochs): the attack's own training, ordinary training on its
    images, then each defense."""
    found: dict[str, list[tuple[Cell, pd.DataFrame]]] = {}
    for cell in cells:
        title, history = cell.row.defense, cell.history
        if cell.undefended:
            # The epochs of both trainings are in the record's history.
            plain, everything = cell.row.run == PLAIN, cells[0].history
            title = "plain training on the snapshot" if plain else "the attack's training"
            if "stage" in everything:
                history = everything[(everything["stage"] == PLAIN) == plain]
            else:
                history = everything.iloc[: 0 if plain else None]
            history = history.assign(at=range(1, len(history) + 1))
        found.setdefault(title, []).append((cell, history))
    return list(found.items())


# --- one record, detection

RATES = {
    "tpr": ("TPR: share of the poison that is flagged", looks.MEASURES),
    "precision": ("precision", looks.MEASURES + 1),
    "fpr": ("FPR: share of the clean images that is flagged", looks.MEASURES + 2),
}
"""What a detection is judged by -> its name and look."""


def splits(cells: Sequence[Cell]) -> Chart:
    """Draw how well each defense detects the poison, by epoch and as reported at the end."""
    title, caption = (
        "Finding the poison",
        (
            "A defense that splits the training set should flag all of the poison (TPR 100) and"
            " nothing else (FPR 0, precision 100). ASD flags the half that it does not trust yet,"
            " so its precision is low by construction: look for a TPR that stays high. DAU reports"
            " a small, pure pool first, then the whole split."
        ),
    )
    if not cells[0].record.known_poison:
        missing = "Nobody knows which images of this record are poisoned."
        return Chart("split", title, caption, missing=missing)

    # ASD splits anew in each epoch; the others report a split at their end.
    panels = [panel for cell in cells if (panel := _rates_by_epoch(cell)) is not None]
    panels += _reported_rates(cells)
    missing = "" if panels else "No run on this record splits the training set."
    return Chart("split", title, caption, tuple(panels), missing)


def _rates_by_epoch(cell: Cell) -> Panel | None:
    """The rates of a defense that splits the training set anew in each epoch; None for others."""
    counts = ["split_flagged", "split_missed"]
    if not set(counts) <= set(cell.history.columns):
        return None
    seen = cell.history.dropna(subset=counts)
    if len(seen) <= 1:
        return None

    # The history has counts, from which the rates follow.
    x = [float(at) for at in seen["at"]]
    rates = [
        _rates(cell, float(flagged), float(missed))
        for flagged, missed in zip(*(seen[name] for name in counts), strict=True)
    ]

    series = tuple(
        Series(name, look, "line", x, [rate[key] for rate in rates])
        for key, (name, look) in RATES.items()
    )
    return Panel(f"{cell.name}, epoch by epoch", "epoch", "%", series, y_range=(-3, 103))


def _rates(cell: Cell, flagged: float, missed: float) -> dict[str, float | None]:
    """Compute TPR, precision and FPR in percent.

    Args:
        cell: The run, whose record knows the poison.
        flagged: How many training images are flagged.
        missed: How many poisoned images are not flagged.
    """
    poisoned = int(cell.record.train_poison.mask(cell.row.train_size).sum())
    hit, clean = poisoned - missed, cell.row.train_size - poisoned
    shares = {"tpr": (hit, poisoned), "precision": (hit, flagged), "fpr": (flagged - hit, clean)}
    return {key: 100 * part / whole if whole else None for key, (part, whole) in shares.items()}


def _reported_rates(cells: Sequence[Cell]) -> list[Panel]:
    """A panel of the rates in the results, if any result has them."""
    reported = [
        (cell.name if name == "split" else f"{cell.name}: {name}", quality)
        for cell in cells
        for name, quality in cell.splits.items()
    ]
    if not reported:
        return []

    # A rate that a run does not have, such as the TPR without poison, has no bar.
    series = []
    for key, (title, look) in RATES.items():
        known = [(name, 100 * found[key]) for name, found in reported if found.get(key) is not None]
        rates, names = [rate for _, rate in known], [name for name, _ in known]
        series.append(Series(title, look, "bars", rates, names))

    lanes = tuple(dict.fromkeys(name for name, _ in reported))
    return [
        Panel("as reported at the end", "%", series=tuple(series), x_range=(0, 115), lanes=lanes)
    ]


def histograms(cells: Sequence[Cell]) -> Chart:
    """Draw the suspicion by which each defense split the training set, poison and clean apart."""
    panels = []
    for cell in cells:
        if cell.suspicion is None or not cell.suspicion[0].isfinite().any():
            continue

        # Each kind is a share of its own, as there are far fewer poisoned images.
        values, poisoned = cell.suspicion
        kinds = (
            ("poison", looks.MEASURES, poisoned),
            ("clean", looks.MEASURES + 1, ~poisoned),
        )

        series = tuple(
            Series(name, look, "outline", *_histogram(values, mask))
            for name, look, mask in kinds
            if mask.any()
        )
        panels.append(Panel(cell.name, "suspicion", "% of its own", series, cut=_cut(cell)))

    caption = (
        "The number by which a defense tells poison from clean images, as it saw it last: for DAU"
        " the log of what share of its confidence the anti-learned head lost, cut at the dashed"
        " line (minus the log of its threshold); for ASD the loss by which its last pool was"
        " chosen. The further apart the two outlines, the easier the split. The first and the last"
        " bin also count what lies beyond them."
    )

    missing = "" if panels else "No run on this record kept it."
    return Chart("suspicion", "What the split is decided by", caption, tuple(panels), missing)


def _cut(cell: Cell) -> float | None:
    """The suspicion at which a run with a threshold in (0, 1) split the training set."""
    threshold = cell.info.get("config", {}).get("threshold")
    return -math.log(threshold) if isinstance(threshold, float) and 0 < threshold < 1 else None


def _histogram(values: Tensor, mask: Tensor) -> tuple[list[float], list[float]]:
    """Outline the histogram of the masked values.

    Args:
        values: Float (N,); the bins span the finite ones.
        mask: Bool (N,), of at least one value.

    Returns:
        Edges and percents, two points for each bin.
    """
    # A few values far outside would leave all others in one bin. torch limits the size for which
    # it computes quantiles.
    finite = values[values.isfinite()].float()
    if len(finite) < 10_000_000:
        low, high = (float(finite.quantile(q)) for q in (0.001, 0.999))
    else:
        low, high = float(finite.min()), float(finite.max())
    high = high if high > low else low + 1

    inside = values[mask].float().nan_to_num(low).clamp(low, high)
    shares = torch.histc(inside, BINS, low, high) / max(1, len(inside))
    edges = torch.linspace(low, high, BINS + 1).tolist()
    heights = [100 * float(share) for share in shares]
    return (
        [edge for pair in pairwise(edges) for edge in pair],
        [height for height in heights for _ in range(2)],
    )


# --- one record, predictions


def destinations(cells: Sequence[Cell]) -> Chart:
    """Draw how each model classifies the triggered images: a row for each, a column a class."""
    title, caption = (
        "Where triggered images go",
        (
            "Each row is a model, each cell the share of triggered test images that it classifies"
            " as that class: the stronger the colour, the more. Before a defense nearly all are in"
            " the target's column. A removed backdoor spreads them as their true classes are"
            " spread; another column that fills means that the trigger was moved, not removed."
        ),
    )
    counted = [
        (cell, counts) for cell in cells if (counts := cell.triggered_predictions) is not None
    ]
    if not counted:
        missing = (
            "There are no triggered images: this record has no attack, or nobody knows the trigger."
        )
        return Chart("destinations", title, caption, missing=missing)

    # In percent, as all scores of the charts.
    values = [[100 * count / sum(counts) for count in counts] for _, counts in counted]
    names = [
        ("plain training" if cell.row.run else "no defense") if cell.undefended else cell.name
        for cell, _ in counted
    ]

    grid = Grid(names, class_names(cells[0]), values, "% of the triggered images")
    return Chart("destinations", title, caption, (Panel("", "class", "", grid=grid),))


# --- words


def class_names(cell: Cell) -> list[str]:
    """Give each class of a record a short name that no other class has, and mark the target."""
    info = cell.record.info
    given = info["dataset"].get("class_names") or map(str, range(info["num_classes"]))
    # Names that are equal once they are shortened are told apart by their numbers.
    short = [_short(name) for name in given]
    names = [
        f"{number}: {name}" if short.count(name) > 1 else name for number, name in enumerate(short)
    ]
    return [
        f"{name} (target)" if number == info.get("target") else name
        for number, name in enumerate(names)
    ]


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"
