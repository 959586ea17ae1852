"""The unfinished folder of a run: locked, continued only by the same settings, published whole."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..device import Exact
from ..errors import UserError
from ..run import Run, say
from ..settings.methods import Method
from ..settings.parse import Parsed
from ..storage import folders, locks, reading, schema, writing
from ..storage.staging import refuse_existing, refuse_foreign
from .code_version import code_version

if TYPE_CHECKING:
    from .tracking import Tracker
CONTINUED = ("checkpoint-*.safetensors", "cached-*.safetensors")
"""The files of an unfinished run that it goes on from."""


@dataclass(frozen=True)
class Job:
    """A method with its config, ready to run."""

    method: Method
    config: Any
    parsed: Parsed | None = None

    def say_settings(self, run: Run) -> None:
        if self.parsed is not None and self.parsed.origins:
            run.say(f"settings: {self.parsed.describe()}; all others are defaults, see --help")


def tracker_of(job: Job, name: str, stage: Path) -> AbstractContextManager["Tracker"]:
    """Who else hears of a run; the import waits until someone asks, as the trackers are no part of
    what makes a number."""
    from .tracking import tracked

    return tracked(
        job.config.track, job.config.track_folder, name, job.config.science(), stage, say
    )


@contextmanager
def open_stage(
    target: Path, done: str, job: Job, inputs: Mapping[str, str], computes_in: Exact
) -> Iterator[Path]:
    """The unfinished folder of a run beside its target: locked, and continued only by the same
    settings on the same inputs (name -> SHA-256).

    A run that overwrites is continued by the same command only, while what it is to replace is what
    it was when the run began.
    """
    config = job.config
    refuse_existing(target, done, config.overwrite)
    folders.tidy(target.parent)
    folders.sweep(target.parent, partial(_worthless, done=done))
    path = target.with_name(f"{target.name}.partial")
    with locks.locked(path):
        refuse_existing(target, done, config.overwrite)
        for torn in path.glob(".*.tmp"):
            folders.remove(torn)
        settings = {"method": job.method.name, "config": config.science(), "inputs": dict(inputs)}
        made = {"code": code_version(job.method.path), "precision": computes_in}
        marker = path / "run.json"
        finished = _checksum(target / done) if config.overwrite else None
        # With nothing to replace, the flag changes nothing
        replaces = {} if finished is None else {"replaces": finished}
        wanted = {**settings, **replaces, "code": made["code"]}
        if (
            marker.exists()
            and _begun(path)
            and (not config.overwrite or _was_begun_by(path, wanted))
        ):
            begun = reading.read_json(marker)
            begun.pop("replaces", None)
            begun.setdefault("inputs", settings["inputs"])  # one of an older version does not say
            before = {
                "code": begun.pop("code", "?"),
                "precision": begun.pop("precision", schema.UNKNOWN),
            }
            _check_same(path, begun, settings)
            made = {
                key: old if old.split("+")[-1] == made[key] else f"{old}+{made[key]}"
                for key, old in before.items()
            }
        else:
            refuse_foreign(path, marker.name)
            for entry in list(path.iterdir()):
                folders.remove(entry)
        writing.write_json(marker, {**settings, **made, **replaces})
        try:
            yield path
        except BaseException:
            if not _begun(path):
                folders.remove(path)
            raise


def made_with(stage: Path) -> dict[str, str]:
    """Which code a run is made by, and in which precision: one, or all of them, where one went on
    with what another had begun."""
    begun = reading.read_json(stage / "run.json")
    return {key: begun[key] for key in ("code", "precision")}


def _begun(path: Path) -> bool:
    """Whether an unfinished run has anything worth continuing."""
    return any(any(path.glob(pattern)) for pattern in CONTINUED)


def _worthless(stage: Path, done: str) -> bool:
    """Whether a stage that nobody holds is ours and will never be continued: it holds no
    checkpoint, or its run is finished."""
    names = {entry.name for entry in stage.iterdir()}
    ours = "run.json" in names or not names
    finished = stage.with_name(stage.name.removesuffix(".partial")) / done
    return ours and (
        not _begun(stage) or (finished.exists() and not _is_to_replace(stage, finished))
    )


def _is_to_replace(stage: Path, finished: Path) -> bool:
    """Whether the unfinished run was begun with --overwrite True over this very result."""
    try:
        return reading.read_json(stage / "run.json").get("replaces") == _checksum(finished)
    except (UserError, OSError):
        return False


def _was_begun_by(path: Path, wanted: dict[str, Any]) -> bool:
    """Whether an unfinished run was begun with all that is wanted, and can be read: --overwrite
    True starts again what cannot."""
    try:
        if not wanted.items() <= reading.read_json(path / "run.json").items():
            return False
        for pattern in CONTINUED:
            for saved in path.glob(pattern):
                reading.read_tensors(saved)
    except UserError:
        return False
    return True


def _checksum(finished: Path) -> str | None:
    """SHA-256 of the file that says a run is done; None where there is none."""
    return reading.sha256(finished) if finished.exists() else None


def _check_same(path: Path, begun: dict[str, Any], now: dict[str, Any]) -> None:
    if begun == now:
        return
    old, new = begun.get("config", {}), now["config"]
    changed = [
        f"{key} {old.get(key)} -> {new.get(key)}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]
    changed += [
        f"other {name}"
        for name, value in now["inputs"].items()
        if begun["inputs"].get(name) != value
    ]
    changed = changed or [f"{begun.get('method')} -> {now['method']}"]
    raise UserError(
        f"{path} holds an unfinished run with other settings ({', '.join(changed)}):"
        " use the same settings to continue it, --overwrite True to start again, or another name"
    )


def publish(final: Path, target: Path) -> None:
    """Put a finished folder in its place, then drop the stage around it."""
    folders.put(final, target)
    folders.remove(final.parent)


def fresh(folder: Path) -> Path:
    folders.remove(folder)
    folder.mkdir()
    return folder


def costs_of(spent: Any) -> dict[str, Any]:
    return {
        "seconds": round(spent.seconds, 3),
        "evaluation_seconds": round(spent.evaluation_seconds, 3),
        "image_passes": {"forward": spent.forward, "backward": spent.backward},
        "peak_memory_bytes": spent.peak_memory_bytes,
    }
