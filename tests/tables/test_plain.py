"""What ordinary training on a joint attack's images gives stands beside the attack, in tables and
on the page."""

from pathlib import Path

import helpers
import pytest

from backdoorlab.record import Record
from backdoorlab.report import artifacts, charts
from backdoorlab.tables import groups as grouping
from backdoorlab.tables import layout
from backdoorlab.tables import rows as measured


@pytest.fixture(scope="module")
def record(session_folder: Path) -> Record:
    with helpers.environment(BACKDOORLAB_CACHE=session_folder / "cache"):
        data = (
            "--dataset",
            "small",
            "--dataset_path",
            str(helpers.small_data(session_folder / "plain-data")),
            "--image_size",
            "16",
        )
        flags = (
            "--model",
            "preactresnet10",
            "--width",
            "2",
            "--batch_size",
            "16",
            "--crop_padding",
            "1",
            "--epochs",
            "1",
            "--score_every",
            "0",
        )
        return helpers.attack("wanet", "plain", session_folder / "plain", *data, *flags)


def test_it_is_a_row_of_its_own_that_training_time_defenses_are_compared_with(
    record: Record,
) -> None:
    attacked, plain = measured.rows([record])
    assert (attacked.run, plain.run) == ("", measured.PLAIN) and plain.assumes == ("train",)
    assert (
        plain.asr == record.info["plain_scores"]["asr"]
        and attacked.asr == record.info["scores"]["asr"]
    )
    assert len(grouping.grouped([attacked, plain])) == 2, "never in one mean"
    shown = [row for row in layout.rows([record]) if row["defense"].text.startswith("none")]
    assert [row["defense"].text for row in shown] == ["none", "none (plain)"]
    assert shown[1]["assumes"].text == "training set"


def test_the_page_draws_it(record: Record) -> None:
    attacked, plain = found = artifacts.gather([record])
    assert (
        plain.undefended
        and plain.triggered_predictions == record.info["plain_scores"]["triggered_predictions"]
    )
    assert not plain.pictures and attacked.pictures
    assert any(chart.panels for chart in (*charts.overview(found), *charts.of_record(found)))
    (panel,) = charts.destinations(found).panels
    assert panel.grid is not None and panel.grid.rows == ["no defense", "plain training"]
