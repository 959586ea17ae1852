"""--track: a run's lines of history and its final scores go to TensorBoard, Weights & Biases or
MLflow as well.

history.csv and result.json are written whatever happens here: a tracker that cannot be started is
one line before the run, and one that fails later is one line in it.
"""

import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..storage import writing

PROJECT = "backdoorlab"
"""What W&B calls a project, and MLflow an experiment."""
PARAMETER = 500
"""Characters of a setting that MLflow is told."""
Values = Mapping[str, float]


@dataclass(frozen=True)
class Sink:
    """Where numbers go: `send(step, values)` for a line of history, step counted from 1;
    `close(values)` once, with the final scores."""

    send: Callable[[int, Values], None]
    close: Callable[[Values], None]


@contextmanager
def tracked(
    tracker: str,
    folder: str,
    name: str,
    settings: Mapping[str, Any],
    stage: Path,
    say: Callable[[str], None],
) -> Iterator["Tracker"]:
    """The tracker for a run called `name`; `stage` is the run's unfinished folder, in which its
    identity survives a kill."""
    told = Tracker(
        _start(tracker, Path(folder), name, settings, stage) if tracker != "none" else None,
        tracker,
        say,
    )
    try:
        yield told
    finally:
        told.end()


class Tracker:
    """A sink that never ends a run: the first failure is said, and nothing is sent after it."""

    def __init__(self, sink: Sink | None, tracker: str, say: Callable[[str], None]) -> None:
        self._sink, self._tracker, self._say = sink, tracker, say
        self._final: dict[str, float] = {}

    def line(self, step: int, row: Mapping[str, Any]) -> None:
        """A line of history; its numbers are named by its stage."""
        values = {
            f"{row['stage']}/{name}": float(value)
            for name, value in row.items()
            if name != "epoch" and _is_number(value)
        }
        self._try(lambda sink: sink.send(step, values))

    def final(self, **groups: Mapping[str, Any]) -> None:
        """Scores before and after, and what the run cost: sent when the run ends."""
        self._final = {
            f"{group}/{name}": float(value)
            for group, values in groups.items()
            for name, value in values.items()
            if _is_number(value)
        }

    def end(self) -> None:
        self._try(lambda sink: sink.close(self._final))
        self._sink = None

    def _try(self, act: Callable[[Sink], None]) -> None:
        if self._sink is None:
            return
        try:
            act(self._sink)
        except Exception as error:  # whatever a tracker does, the run goes on
            self._sink = None
            first = (str(error).splitlines() or [""])[0][:200]
            self._say(
                f"--track {self._tracker} failed and is left out from here on"
                f" ({type(error).__name__}: {first}); history and result are kept"
            )


def _start(tracker: str, folder: Path, name: str, settings: Mapping[str, Any], stage: Path) -> Sink:
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
        first = (str(error).splitlines() or [""])[0][:300]
        raise UserError(
            f"--track {tracker} could not be started ({type(error).__name__}: {first}): mend it, or"
            " leave --track out"
        ) from error


def tensorboard(folder: Path, name: str, settings: Mapping[str, Any], stage: Path) -> Sink:
    """Event files in folder/name, for `tensorboard --logdir folder`. A run that is continued purges
    what it sends again."""
    import tensorboard as _
    from torch.utils.tensorboard import SummaryWriter

    (folder / name).mkdir(parents=True, exist_ok=True)
    writers: list[SummaryWriter] = []

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
        # A run that was killed after its last epoch has nothing to send again, so nothing to purge
        for key, value in values.items():
            writer(None).add_scalar(key, value, last[0])
        if writers:
            writers[0].close()

    last = [0]
    return Sink(send, close)


def wandb(folder: Path, name: str, settings: Mapping[str, Any], stage: Path) -> Sink:
    """A run of the project `backdoorlab`; WANDB_MODE=offline keeps it in folder/wandb until `wandb
    sync`."""
    import wandb as package

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

    def close(values: Values) -> None:
        run.summary.update(dict(values))
        run.finish()

    return Sink(lambda step, values: run.log(dict(values), step=step), close)


def mlflow(folder: Path, name: str, settings: Mapping[str, Any], stage: Path) -> Sink:
    """A run of the experiment `backdoorlab` at MLFLOW_TRACKING_URI, else in files below
    folder/mlruns."""
    from mlflow import MlflowClient

    if "MLFLOW_TRACKING_URI" not in os.environ:  # MLflow wants to hear that plain files are meant
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient(
        os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlruns").absolute().as_uri()
    )
    experiment = client.get_experiment_by_name(PROJECT)
    number = (
        experiment.experiment_id if experiment is not None else client.create_experiment(PROJECT)
    )
    identity = _identity(stage)
    known = client.search_runs(
        [number], filter_string=f"tags.identity = '{identity}'", max_results=1
    )
    run = (
        known[0] if known else client.create_run(number, tags={"identity": identity}, run_name=name)
    )
    for key, value in settings.items() if not known else ():
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
    """The same for a run that is continued, another for the next one."""
    path = stage / "track.json"
    if not path.exists():
        writing.write_json(path, {"identity": uuid.uuid4().hex})
    return str(json.loads(path.read_text(encoding="utf-8"))["identity"])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
