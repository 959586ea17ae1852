"""What is measured of a run from outside: test scores, the history with them, quality of splits.

A method never holds a `ScoreLog`. Its `Run` gets closures of it (`callbacks`), which return
nothing, so that no attribute leads from the method's side to a score.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor, nn

from ..metrics import Evaluator, Scores, split_quality
from ..poison import Poison
from ..run import Callbacks, Epoch, say, short
from ..storage import writing

Row = dict[str, Any]
"""A line of history: names and values of one epoch."""


class ScoreLog:
    """Evaluator, history and split qualities of one run; part of every checkpoint."""

    def __init__(
        self,
        *,
        train_poison: Poison | None = None,
        score_every: int = 1,
        on_line: Callable[[int, Row], None] | None = None,
    ) -> None:
        """Start with an empty history and without an evaluator.

        Args:
            train_poison: which training images are poisoned; None where nobody knows.
            score_every: epochs between two evaluations, >= 0; 0 evaluates at no epoch's end.
            on_line: called with each line of history and its number, from 1. It cannot change
                the run.
        """
        self.history: list[Row] = []
        self.splits: dict[str, dict[str, Any]] = {}
        self.evaluation_seconds = 0.0
        self._evaluator: Evaluator | None = None
        self._train_poison, self._score_every, self._on_line = train_poison, score_every, on_line

    def callbacks(self) -> Callbacks:
        """Return closures for a `Run`. Bound methods would lead to this object by `__self__`."""

        def watch_scores(evaluator: Evaluator) -> None:
            self._evaluator = evaluator

        # Lambdas: the attributes of a function do not show what it closes over.
        return Callbacks(
            epoch_ended=lambda epoch: self._end_epoch(epoch),
            split_reported=lambda name, flagged, suspicion: self._measure_split(
                name, flagged, suspicion
            ),
            watch_scores=watch_scores,
            save=lambda meta: self._save(meta),
            restore=lambda meta: self._restore(meta),
        )

    def score(self, model: nn.Module) -> Scores:
        """Evaluate a model on the test data, and count the time as evaluation."""
        if self._evaluator is None:
            raise RuntimeError("this run has no evaluator")

        # Evaluation is a cost of the benchmark, not of the method.
        began = time.perf_counter()
        scores = self._evaluator(model)
        self.evaluation_seconds += time.perf_counter() - began
        return scores

    def save_history(self, folder: Path) -> None:
        """Write history.csv, a line for each epoch."""
        frame = pd.DataFrame(self.history)
        writing.write_bytes(folder / "history.csv", frame.to_csv(index=False).encode())

    def _end_epoch(self, epoch: Epoch) -> None:
        # Numbers of a split say how right it is, so the method's own line is copied.
        row = dict(epoch.row)
        for name in epoch.splits:
            if name in self.splits:
                quality = self.splits[name]
                row[f"{name}_flagged"] = quality["flagged"]
                row[f"{name}_missed"] = quality["missed"]

        if epoch.model is not None and self._is_due(epoch):
            row |= self.score(epoch.model).summary()

        # Kept and printed first: a listener may fail.
        self.history.append(row)
        epoch.show(row)
        if self._on_line is not None:
            self._on_line(len(self.history), row)

    def _is_due(self, epoch: Epoch) -> bool:
        if self._evaluator is None or self._score_every == 0:
            return False
        return epoch.last or (epoch.row["epoch"] + 1) % self._score_every == 0

    def _measure_split(self, name: str, flagged: Tensor, suspicion: Tensor | None) -> None:
        # Of a stranger's data set nobody knows the poison: the split can only be counted.
        if self._train_poison is None:
            say(f"{name}: {int(flagged.sum())} of {len(flagged)} flagged; nobody knows how rightly")
            return
        self.splits[name] = quality = split_quality(flagged, self._train_poison, suspicion)
        say(f"{name}: {describe_split(quality)}")

    def _save(self, meta: dict[str, Any]) -> None:
        meta.update(
            history=self.history,
            splits=self.splits,
            evaluation_seconds=self.evaluation_seconds,
        )

    def _restore(self, meta: dict[str, Any]) -> None:
        self.history, self.splits = meta["history"], meta["splits"]
        self.evaluation_seconds = meta["evaluation_seconds"]


def describe_split(quality: Mapping[str, Any]) -> str:
    """Write in one line how many images were flagged, and how many of them rightly."""
    if quality["tpr"] is None:
        return (
            f"{quality['flagged']} flagged, in a training set without poison (FPR"
            f" {short(quality['fpr'])})"
        )
    return (
        f"{quality['flagged']} flagged, precision {short(quality['precision'])}, TPR"
        f" {short(quality['tpr'])}, FPR {short(quality['fpr'])}"
    )


def describe_ranking(quality: Mapping[str, Any]) -> str:
    """Write in one line how well the suspicion ranks the poison."""
    return (
        f"AUROC {short(quality['auroc'])}, average precision {short(quality['average_precision'])},"
        f" TPR {short(quality['tpr_at_fpr_1'])} at FPR .01, {short(quality['tpr_at_fpr_5'])} at FPR"
        " .05"
    )
