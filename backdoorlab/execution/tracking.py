"""--track: send history and final scores to TensorBoard, Weights & Biases or MLflow as well.

history.csv and result.json are written whatever happens here. A tracker that cannot be started is
one line before the run, and one that fails later is one line in it.
"""

import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..storage import writing

PROJECT = "backdoorlab"
"""What W&B calls a project, and MLflow an experiment."""
PARAMETER = 500
"""Characters of a setting that MLflow gets at most."""
ERROR, START_ERROR = 200, 300
"""Characters of a tracker's own error message that are shown: within a run, and before it."""
Values = Mapping[str, float]


@dataclass(frozen=True)
class Sink:
    """The two functions of a tracker."""

    send: Callable[[int, Values], None]
    """send(step, values): a line of history, step counted from 1."""
    close: Callable[[Values], None]
    """close(values): the final scores, once."""


@contextmanager
def tracked(
    tracker: str,
    folder: str,
    name: str,
    settings: Mapping[str, Any],
    stage: Path,
    say: Callable[[str], None],
) -> Iterator["Tracker"]:
    """Start a tracker, and end it whatever happens.

    Args:
        tracker: none, tensorboard, wandb or mlflow.
        folder: for what it keeps on this machine.
        name: what it calls the run.
        settings: the run's settings.
        stage: the run's unfinished folder, in which its identity survives a kill.
        say: prints a line.
    """
    sink = _start(tracker, Path(folder), name, settings, stage) if tracker != "none" else None
    started = Tracker(sink, tracker, say)
    try:
        yield started
    finally:
        started.end()


class Tracker:
    """A sink that never ends a run: the first failure is printed, and nothing is sent after it."""

    def __init__(self, sink: Sink | None, tracker: str, say: Callable[[str], None]) -> None:
        self._sink, self._tracker, self._say = sink, tracker, say
        self._final: dict[str, float] = {}

    def line(self, step: int, row: Mapping[str, Any]) -> None:
        """Send the numbers of a line of history, named by their stage."""
        # The epoch is the step already; words cannot be drawn.
        numbers = {name: value for name, value in row.items() if _is_number(value)}
        numbers.pop("epoch", None)
        values = {f"{row['stage']}/{name}": float(value) for name, value in numbers.items()}
        self._try(lambda sink: sink.send(step, values))

    def final(self, **groups: Mapping[str, Any]) -> None:
        """Keep scores and costs, by group, until the run ends."""
        self._final = {
            f"{group}/{name}": float(value)
            for group, values in groups.items()
            for name, value in values.items()
            if _is_number(value)
        }

    def end(self) -> None:
        """Send the final values and close the tracker."""
        self._try(lambda sink: sink.close(self._final))
        self._sink = None

    def _try(self, act: Callable[[Sink], None]) -> None:
        # After a failure there is no sink.
        if self._sink is None:
            return
        try:
            act(self._sink)
        except Exception as error:  # whatever a tracker does, the run goes on
            self._sink = None
            first = (str(error).splitlines() or [""])[0][:ERROR]
            self._say(
                f"--track {self._tracker} failed and is left out from here on"
                f" ({type(error).__name__}: {first}); history and result are kept"
            )


def _start(tracker: str, folder: Path, name: str, settings: Mapping[str, Any], stage: Path) -> Sink:
    """Start a tracker, or refuse the run in one line before it begins."""
    start = {"tensorboard": tensorboard, "wandb": wandb, "mlflow": mlflow}[tracker]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return start(folder, name, settings, stage)
    except ImportError as error:
        raise UserError(
            f"--track {tracker} needs {error.name or tracker}: pip install 'backdoorlab[track]', or"
            " leave --track out"
        ) from error
    except Exception as error:
        first = (str(error).splitlines() or [""])[0][:START_ERROR]
        raise UserError(
            f"--track {tracker} could not be started ({type(error).__name__}: {first}): mend it, or"
            " leave --track out"
        ) from error


def tensorboard(folder: Path, name: str, settings: Mapping[str, Any], stage: Path) -> Sink:
    """Write event files in folder/name, for `tensorboard --logdir folder`.

    A continued run purges the lines that it sends again.
    """
    import_module("tensorboard")  # its absence is named before torch's own error
    from torch.utils.tensorboard import SummaryWriter

    (folder / name).mkdir(parents=True, exist_ok=True)
    writers: list[SummaryWriter] = []
    last = [0]

    # Made with the first line, whose step says what is to be purged.
    def writer(purge: int | None) -> SummaryWriter:
        if not writers:
            writers.append(SummaryWriter(str(folder / name), purge_step=purge))
            writers[0].add_text(
                "settings", f"    {json.dumps(dict(settings), sort_keys=True)}", last[0]
            )
        return writers[0]

    def send(step: int, values: Values) -> None:
        last[0] = step
        for key, value in values.items():
            writer(step).add_scalar(key, value, step)
        writer(step).flush()

    def close(values: Values) -> None:
        # A run that was killed after its last epoch sends nothing again, so nothing is purged.
        for key, value in values.items():
            writer(None).add_scalar(key, value, last[0])
        if writers:
            writers[0].close()

    return Sink(send, close)


def wandb(folder: Path, name: str, settings: Mapping[str, Any], stage: Path) -> Sink:
    """Start or resume a run of the project `backdoorlab`.

    WANDB_MODE=offline keeps it in folder/wandb until `wandb sync`.
    """
    import wandb as package

    # Its own lines would break the progress bar.
    options = package.Settings(console="off", silent=True)
    run = package.init(
        project=PROJECT,
        name=name,
        id=_identity(stage),
        resume="allow",
        config=dict(settings),
        dir=str(folder),
        settings=options,
        reinit="create_new",
    )

    # The summary, and not a line: final scores belong to no step.
    def close(values: Values) -> None:
        run.summary.update(dict(values))
        run.finish()

    return Sink(lambda step, values: run.log(dict(values), step=step), close)


def mlflow(folder: Path, name: str, settings: Mapping[str, Any], stage: Path) -> Sink:
    """Start or resume a run of the experiment `backdoorlab`.

    It goes to MLFLOW_TRACKING_URI, else into files below folder/mlruns.
    """
    from mlflow import MlflowClient

    if "MLFLOW_TRACKING_URI" not in os.environ:  # MLflow takes plain files only if this says so
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient(
        os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlruns").absolute().as_uri()
    )
    experiment = client.get_experiment_by_name(PROJECT)
    number = (
        experiment.experiment_id if experiment is not None else client.create_experiment(PROJECT)
    )

    # A continued run is found by its tag; its settings are there already.
    identity = _identity(stage)
    known = client.search_runs(
        [number], filter_string=f"tags.identity = '{identity}'", max_results=1
    )
    run = (
        known[0] if known else client.create_run(number, tags={"identity": identity}, run_name=name)
    )
    if not known:
        for key, value in settings.items():
            client.log_param(run.info.run_id, key, str(value)[:PARAMETER])

    def send(step: int, values: Values) -> None:
        for key, value in values.items():
            client.log_metric(run.info.run_id, key, value, step=step)

    def close(values: Values) -> None:
        for key, value in values.items():
            client.log_metric(run.info.run_id, key, value)
        client.set_terminated(run.info.run_id, "FINISHED" if values else "KILLED")

    return Sink(send, close)


def _identity(stage: Path) -> str:
    """Return the run's identity: the same for a continued run, another for the next one."""
    path = stage / "track.json"
    if not path.exists():
        writing.write_json(path, {"identity": uuid.uuid4().hex})
    return str(json.loads(path.read_text(encoding="utf-8"))["identity"])


def _is_number(value: Any) -> bool:
    """Whether a value can be drawn as a curve."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
