"""What a defense costs where there is nothing to defend, and what it costs in trainings."""

import json
from typing import Any

import pytest
from test_results import row

from backdoorlab.record import Record
from backdoorlab.tables import clean_control, rows
from backdoorlab.tables import groups as grouping

TRAINING = {"lr": 0.1, "epochs": 3, "precision": "fp32"}
POISONED = {**TRAINING, "code": "of badnet", "patch_size": 3}


def of(attack: str, defense: str, accuracy: float, seed: int = 0, **values: Any) -> Any:
    settings = POISONED if attack == "badnet" else {**TRAINING, "code": "of none"}
    plain: dict[str, Any] = {"attack_settings": json.dumps(settings), "clean_accuracy": accuracy}
    return row(defense, seed, attack, **(plain | values))


def test_it_is_the_accuracy_lost_on_the_control_over_its_seeds() -> None:
    controls = [
        of("none", defense, accuracy, seed)
        for seed, accuracies in enumerate(((0.9, 0.8), (0.9, 0.7)))
        for defense, accuracy in zip(("none", "ft"), accuracies, strict=True)
    ]
    before, after = clean_control.priced([of("badnet", "none", 0.9), of("badnet", "ft", 0.6)])
    assert before.no_attack_cost is None is after.no_attack_cost, "no control was run"

    found = clean_control.priced([*controls, of("badnet", "none", 0.9), of("badnet", "ft", 0.6)])
    assert [one.no_attack_cost for one in found[-2:]] == [None, pytest.approx(0.15)]
    (group,) = grouping.grouped(found[-1:])
    score = group.score("no_attack_cost")
    assert score is not None and score.mean == pytest.approx(0.15)


@pytest.mark.parametrize(
    "values",
    [
        {"attack_settings": json.dumps({**POISONED, "epochs": 4})},
        {"fingerprint": "b" * 64},
        {"architecture": "preactresnet10 w8"},
        {"defense_settings": json.dumps({"code": "c0de", "lr": 0.5})},
        {"defense": "sau"},
        {"run": "lite-s0"},
    ],
)
def test_another_training_data_network_or_setting_has_another_control(
    values: dict[str, Any],
) -> None:
    controls = [of("none", "none", 0.9), of("none", "ft", 0.8)]
    same = clean_control.priced([*controls, of("badnet", "ft", 0.6)])[-1]
    changed: dict[str, Any] = {"attack": "badnet", "defense": "ft", "accuracy": 0.6, **values}
    other = clean_control.priced([*controls, of(**changed)])
    assert same.no_attack_cost == pytest.approx(0.1), "a control"
    assert other[-1].no_attack_cost is None


def test_cost_is_counted_in_trainings_of_the_model(small: Record) -> None:
    """A training that sees each image once an epoch is one; an older record has no count."""
    info = small.info
    seen = info["config"]["epochs"] * info["dataset"]["train_size"]
    passes = {"image_passes": {"forward": seen, "backward": seen}}

    def trainings(**changes: Any) -> float | None:
        changed = Record(small.folder, {**info, **changes}, small.train_poison, small.test_poison)
        return rows.undefended(changed)[0].trainings

    assert trainings(**passes) == 1
    assert trainings(image_passes={"forward": 3 * seen, "backward": 0}) == 1
    assert trainings(**passes, config={**info["config"], "epochs": None}) is None
    assert trainings(image_passes=None) is None
    own = rows.undefended(small)[0].trainings
    assert own is not None and 0.8 < own <= 1, "the last batch of an epoch may be left out"
