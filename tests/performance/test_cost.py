"""The cost model of docs/results/cost.md against counted passes."""

from typing import Any

import helpers
import pytest

from backdoorlab.record import Record


@pytest.fixture(scope="module")
def cost() -> Any:
    return helpers.script("performance/cost.py")


def test_formulas_are_what_is_counted(cost: Any, small: Record, tmp_path: Any) -> None:
    """DAU, I-BAU and FT exactly, BU but for chance, SAU as an upper bound."""
    copied = helpers.copy(small, tmp_path)
    setting = cost.Setting(copied.info["dataset"]["train_size"], 0, copied.info["num_classes"])
    dau = helpers.defend(
        "dau",
        copied,
        *helpers.short_flags("dau"),
        "--recovery_epochs",
        "0",
        "--pool",
        "model_loss",
        "--breakdown",
        "2",
        # Flags all that is not certain: the record's model is next to untrained.
        "--relative",
        "False",
        "--threshold",
        "0.9",
    )
    assert dau is not None and dau["split"]["flagged"], (
        "without poison found, it ends after the features"
    )
    assert cost.dau(dau["config"], setting) == (
        dau["image_passes"]["forward"],
        dau["image_passes"]["backward"],
    )
    for method, low, high in (
        ("ft", 1.0, 1.0),
        ("sau", 0.5, 1.0),
        ("ibau", 1.0, 1.0),
        ("bu", 0.9, 1.1),
    ):
        result = helpers.defend(method, copied, *helpers.short_flags(method))
        assert result is not None
        setting = cost.Setting(setting.n, result["trusted"]["count"], setting.classes)
        for formula, name in zip(
            cost.COSTS[method](result["config"], setting), ("forward", "backward"), strict=True
        ):
            assert low * formula <= result["image_passes"][name] <= high * formula, method


def test_operations_are_counted_on_the_network(cost: Any) -> None:
    """ResNet-50's published 4.1 billion multiplications, and four times as many for twice the
    side."""
    assert cost.operations("resnet50", 224, 1000) / 2 == pytest.approx(4.09e9, rel=0.01)
    assert cost.operations("preactresnet18", 64, 10) / cost.operations(
        "preactresnet18", 32, 10
    ) == pytest.approx(4, rel=0.001)


def test_a_grid_costs_the_sum_of_its_cells(
    cost: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """One attack by hand, twice as much for two rates, and half the hours for two jobs."""
    entry = "cifar10: {model: preactresnet10, width: 8, epochs: 3}"
    file = tmp_path / "grid.yaml"

    def shown(rates: str, jobs: int) -> list[str]:
        file.write_text(
            f"datasets:\n  - {entry}\nattacks: [badnet]\ndefenses: [ft, clp]\n"
            f"poison_rates: {rates}\nseeds: [0]\n"
        )
        cost.of_grid(str(file), 0.1, jobs)
        return capsys.readouterr().out.splitlines()

    once, twice = shown("[0.1]", 1), shown("[0.1, 0.2]", 2)
    by_hand = 3 * 50_000 * 3 * cost.operations("preactresnet10", 32, 10, 8) / 1e15
    line = "| cifar10, preactresnet10 w8, attack | {} | {:.3g} | {:.3g} |"
    assert once[2] == line.format(1, by_hand, by_hand / 0.1 / 3.6)
    assert twice[2] == line.format(2, by_hand, by_hand / 0.1 / 3.6)
    assert once[-1] == "Not counted: clp."
