"""What a defense costs a model that nobody attacked: clean accuracy lost on the clean control."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import fmean

from .rows import UNDEFENDED, Row

CONTROL = "none"
"""The attack that changes nothing."""


def priced(found: Sequence[Row]) -> list[Row]:
    """Give each row of a defense its no-attack cost, where the same defense ran on a control.

    The control has the same data, network and training as the row's record, the defense the same
    settings; of several seeds it is the mean.

    Args:
        found: rows of records, those of clean controls among them.
    """
    costs = _costs(found)
    return [
        replace(row, no_attack_cost=fmean(same)) if (same := _of(row, costs)) else row
        for row in found
    ]


def _costs(found: Iterable[Row]) -> list[tuple[Row, float]]:
    """Each result on a clean control, and the clean accuracy that it lost, in [-1, 1]."""
    accuracies = [
        (row, row.clean_accuracy)
        for row in found
        if row.attack == CONTROL and row.clean_accuracy is not None
    ]
    before = {row.record: accuracy for row, accuracy in accuracies if row.defense == UNDEFENDED}
    return [
        (row, before[row.record] - after)
        for row, after in accuracies
        if row.defense != UNDEFENDED and row.record in before
    ]


def _of(row: Row, costs: Iterable[tuple[Row, float]]) -> list[float]:
    return [
        cost
        for control, cost in costs
        if _method(row) == _method(control) and _trained_alike(row, control)
    ]


def _method(row: Row) -> tuple[str, ...]:
    return (row.defense, row.variant, row.defense_settings, row.fingerprint, row.architecture)


def _trained_alike(row: Row, control: Row) -> bool:
    """Whether the attacked model was trained as the control was, apart from the poison."""
    settings = json.loads(row.attack_settings)
    plain = json.loads(control.attack_settings)
    return all(settings.get(name) == value for name, value in plain.items() if name != "code")
