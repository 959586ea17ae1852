"""--track: what a run sends is read back from each tracker, and nothing about the run depends on
it."""

import importlib.util
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import helpers
import pandas as pd
import pytest

from backdoorlab.errors import UserError
from backdoorlab.execution import tracking
from backdoorlab.record import Record
from backdoorlab.run import Run
from backdoorlab.storage import reading

SHORT = ("--trusted_ratio", "0.3", "--epochs", "3")
SENT = ("loss", "clean_accuracy", "asr", "robust_accuracy")
pytestmark = pytest.mark.filterwarnings("ignore")  # the trackers' own


def needs(module: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        importlib.util.find_spec(module) is None,
        reason=f"{module} is not installed: pip install -e '.[track]'",
    )


def history(record: Record, run: str) -> pd.DataFrame:
    return pd.read_csv(record.folder / "defense" / "ft" / run / "history.csv")


def run(record: Record, tracker: str, folder: Path, *flags: str) -> dict[str, Any]:
    result = helpers.defend(
        "ft",
        record,
        *SHORT,
        "--run_name",
        tracker,
        "--track",
        tracker,
        "--track_folder",
        str(folder),
        *flags,
    )
    assert result is not None
    return result


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """tag -> [(step, value)] as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return {
        tag: [(event.step, event.value) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


@needs("tensorboard")
def test_tensorboard_reads_what_history_and_result_hold(small: Record, tmp_path: Path) -> None:
    record = helpers.copy(small, tmp_path)
    result = run(record, "tensorboard", tmp_path / "runs")
    read = scalars(tmp_path / "runs" / "small" / "ft" / "tensorboard")
    kept = history(record, "tensorboard")
    for name in SENT:
        assert read[f"finetune/{name}"] == [
            (step + 1, pytest.approx(value, rel=1e-6)) for step, value in enumerate(kept[name])
        ]
    assert read["after/asr"][0][1] == pytest.approx(result["after"]["asr"]) and read["before/asr"][
        0
    ][1] == pytest.approx(result["before"]["asr"])
    assert read["cost/seconds"][0][1] == pytest.approx(result["seconds"], abs=1e-3)


@needs("tensorboard")
def test_a_continued_run_has_each_step_once(
    small: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = helpers.copy(small, tmp_path)

    class Stop(BaseException):
        pass

    save = Run._save

    def stop(self: Run, path: Path, parts: dict[str, Any], **position: Any) -> None:
        """Sent, but stopped before the checkpoint of the second epoch: this line will be sent
        again."""
        if position["done"] == 2:
            raise Stop
        save(self, path, parts, **position)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_save", stop)
        with pytest.raises(Stop):
            run(record, "tensorboard", tmp_path / "runs")
    place = tmp_path / "runs" / "small" / "ft" / "tensorboard"
    assert [step for step, _ in scalars(place)["finetune/loss"]] == [1, 2], (
        "it was stopped after two"
    )
    run(record, "tensorboard", tmp_path / "runs")
    assert [step for step, _ in scalars(place)["finetune/loss"]] == [1, 2, 3]


@needs("mlflow")
def test_mlflow_reads_what_history_and_result_hold(
    small: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    record = helpers.copy(small, tmp_path)
    result = run(record, "mlflow", tmp_path / "runs")
    from mlflow import MlflowClient

    client = MlflowClient((tmp_path / "runs" / "mlruns").as_uri())
    experiment = client.get_experiment_by_name(tracking.PROJECT)
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert (
        found.info.status == "FINISHED"
        and found.info.run_name == "small/ft/mlflow"
        and found.data.params["epochs"] == "3"
    )
    kept = history(record, "mlflow")
    for name in SENT:
        read = sorted(
            (metric.step, metric.value)
            for metric in client.get_metric_history(found.info.run_id, f"finetune/{name}")
        )
        assert read == [(step + 1, pytest.approx(value)) for step, value in enumerate(kept[name])]
    assert found.data.metrics["after/asr"] == pytest.approx(result["after"]["asr"])


def log_records(content: bytes) -> Iterator[bytes]:
    """The messages in a .wandb file: a LevelDB log, in blocks of 32 KiB, behind seven bytes of its
    own."""
    place, parts = 7, b""
    while place < len(content):
        left = 32768 - place % 32768
        if left < 7:  # the rest of a block in which no header fits
            place += left
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


@needs("wandb")
def test_wandb_keeps_a_run_offline(
    small: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    record = helpers.copy(small, tmp_path)
    run(record, "wandb", tmp_path / "runs")
    (kept,) = (tmp_path / "runs" / "wandb").glob("offline-run-*/run-*.wandb")
    from wandb.proto import wandb_internal_pb2

    seen: list[float] = []
    final: dict[str, str] = {}
    for data in log_records(kept.read_bytes()):
        message = getattr(wandb_internal_pb2, "Record")()  # noqa: B009
        message.ParseFromString(data)
        row = {
            item.key or "/".join(item.nested_key): item.value_json for item in message.history.item
        }
        if "finetune/loss" in row:
            seen.append(float(row["finetune/loss"]))
        final |= {
            item.key or "/".join(item.nested_key): item.value_json
            for item in message.summary.update
        }
    assert seen == [pytest.approx(value) for value in history(record, "wandb")["loss"]]
    assert float(final["after/asr"]) == pytest.approx(
        reading.read_json(record.folder / "defense/ft/wandb/result.json")["after"]["asr"]
    )


def install(monkeypatch: pytest.MonkeyPatch, send: Any) -> None:
    monkeypatch.setattr(
        "backdoorlab.execution.tracking.tensorboard",
        lambda folder, name, settings, stage: tracking.Sink(send, lambda values: None),
    )


def test_tracking_changes_no_number(
    small: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = helpers.copy(small, tmp_path)
    sent: list[tuple[int, Mapping[str, float]]] = []
    install(monkeypatch, lambda step, values: sent.append((step, values)))
    with_it = run(record, "tensorboard", tmp_path / "runs")
    without = helpers.defend("ft", record, *SHORT)
    assert without is not None and [step for step, _ in sent] == [1, 2, 3]
    folder = record.folder / "defense" / "ft"
    assert reading.sha256(folder / "tensorboard" / "model.safetensors") == reading.sha256(
        folder / "seed0" / "model.safetensors"
    )
    assert with_it["config"] == without["config"], (
        "where numbers are shown is no setting of the science"
    )


def test_a_tracker_that_fails_is_one_line_and_the_run_goes_on(
    small: Record,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    record = helpers.copy(small, tmp_path)
    calls: list[int] = []

    def send(step: int, values: Mapping[str, float]) -> None:
        calls.append(step)
        raise ConnectionError("the server is gone\nand more")

    install(monkeypatch, send)
    result = run(record, "tensorboard", tmp_path / "runs")
    said = [line for line in capsys.readouterr().err.splitlines() if "--track" in line]
    assert calls == [1] and len(said) == 1 and "the server is gone" in said[0]
    assert result["after"]["clean_accuracy"] > 0 and len(history(record, "tensorboard")) == 3


@pytest.mark.parametrize(
    ("tracker", "module"),
    [("tensorboard", "tensorboard"), ("wandb", "wandb"), ("mlflow", "mlflow")],
)
def test_a_missing_tracker_is_one_line_before_the_run(
    tracker: str, module: str, small: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    record = helpers.copy(small, tmp_path)
    with pytest.raises(
        UserError, match=rf"--track {tracker} needs {module}: pip install 'backdoorlab\[track\]'"
    ):
        run(record, tracker, tmp_path / "runs")
    assert not (record.folder / "defense").exists() or not list(
        (record.folder / "defense").rglob("*.json")
    )


def test_a_tracker_that_cannot_be_started_is_one_line(
    small: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"could not be started"):
        run(helpers.copy(small, tmp_path), "tensorboard", tmp_path / "file")
