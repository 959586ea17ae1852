"""The unfinished folder of a run: locked, continued only by the same settings, published whole."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..device import Exact
from ..errors import UserError
from ..record import Record
from ..run import Progress, Run, say
from ..settings.methods import Method
from ..settings.parse import Parsed
from ..storage import folders, locks, reading, writing
from ..storage.staging import refuse_existing, refuse_foreign
from .code_version import code_version
from .environment import described, machine

if TYPE_CHECKING:
    from .tracking import Tracker

MARKER = "run.json"
"""The file of a stage that says by which settings it was begun."""
CONTINUED = ("checkpoint-*.safetensors", "cached-*.safetensors")
"""The files from which an unfinished run continues."""
MADE = ("code", "precision", "machines")
"""What MARKER says of how a run is made, beside its settings: it may change on the way."""


@dataclass(frozen=True)
class Job:
    """A method with its config, ready to run."""

    method: Method
    config: Any
    parsed: Parsed | None = None
    """Where the settings came from."""
    record: Record | None = None
    """The record that a defense runs on, read and verified once, when its settings were parsed.
    None for an attack; a defense then reads it by its config."""

    def say_settings(self, run: Run) -> None:
        """Print every setting that is not a default."""
        if self.parsed is not None and self.parsed.origins:
            run.say(f"settings: {self.parsed.describe()}; all others are defaults, see --help")


def tracker_of(job: Job, name: str, stage: Path) -> AbstractContextManager["Tracker"]:
    """Start what --track names for a run called `name`."""
    # Trackers are no part of what makes a number: imported here, they stay out of its version.
    from .tracking import tracked

    return tracked(
        job.config.track, job.config.track_folder, name, job.config.science(), stage, say
    )


@contextmanager
def open_stage(
    target: Path,
    done: str,
    job: Job,
    inputs: Mapping[str, str],
    computes_in: Exact,
    device: torch.device,
) -> Iterator[Path]:
    """Open the unfinished folder of a run beside its target, and lock it.

    What is in it is continued by the same settings on the same inputs only. A run that overwrites
    is continued by the same command only, and only if the result that it will replace has not
    changed since it began.

    Args:
        target: folder of the finished record or result.
        done: name of the file whose presence in `target` means done.
        job: the method with its settings.
        inputs: name -> SHA-256 of what the run starts from.
        computes_in: the precision of training.
        device: where the run trains.

    Yields:
        The folder `<target>.partial`. It is removed after an error if it holds nothing to continue.
    """
    config = job.config
    other = {"attack": "--save_folder_name", "defense": "--run_name"}[job.method.kind]
    refuse_existing(target, done, config.overwrite, other)
    folders.tidy(target.parent)
    folders.sweep(target.parent, partial(_worthless, done=done))
    path = target.with_name(f"{target.name}.partial")
    with locks.locked(path):
        # Another process may have finished while this one waited for the lock.
        refuse_existing(target, done, config.overwrite, other)
        for torn in path.glob(".*.tmp"):
            folders.remove(torn)

        # What must be the same to continue, and what may differ but is said.
        settings = {"method": job.method.name, "config": config.science(), "inputs": dict(inputs)}
        made = _made(job, computes_in, device)
        finished = _checksum(target / done) if config.overwrite else None
        # With nothing to replace, the flag changes nothing.
        replaces = {} if finished is None else {"replaces": finished}

        wanted = {**settings, **replaces, "code": made["code"]}
        if _is_continued(path, wanted, config.overwrite):
            made = _continued(path, settings, made)
        else:
            refuse_foreign(path, MARKER)
            for entry in list(path.iterdir()):
                folders.remove(entry)
        writing.write_json(path / MARKER, {**settings, **made, **replaces})

        # A stage without a checkpoint would only be in the way.
        try:
            yield path
        except BaseException:
            if not _begun(path):
                folders.remove(path)
            raise


def _made(job: Job, computes_in: Exact, device: torch.device) -> dict[str, Any]:
    """Return the entries of MADE for a run that begins here."""
    code = code_version(job.method.path)
    return {"code": code, "precision": computes_in, "machines": [machine(device)]}


def _is_continued(path: Path, wanted: dict[str, Any], overwrite: bool) -> bool:
    """Whether there is something to continue; with --overwrite True only what is `wanted`."""
    if not (path / MARKER).exists() or not _begun(path):
        return False
    return not overwrite or _was_begun_by(path, wanted)


def _continued(path: Path, settings: dict[str, Any], made: dict[str, Any]) -> dict[str, Any]:
    """Refuse other settings; return by which code, in which precision and where a run is made.

    Code and precision are joined by "+" where they differ from what began the run. Each machine
    that differs from the one before is added to the list.
    """
    begun = reading.read_json(path / MARKER)
    begun.pop("replaces", None)
    with reading.refuse_other_version(path / MARKER):
        before = {key: begun.pop(key) for key in MADE}
        _check_same(path, begun, settings)

    joined = {
        key: old if old.split("+")[-1] == made[key] else f"{old}+{made[key]}"
        for key, old in before.items()
        if key != "machines"
    }
    here = [] if before["machines"][-1:] == made["machines"] else made["machines"]
    return {**joined, "machines": before["machines"] + here}


def made_with(stage: Path) -> dict[str, str]:
    """Return by which code and in which precision a run is made; "a+b" where b continued a."""
    begun = reading.read_json(stage / MARKER)
    return {key: begun[key] for key in ("code", "precision")}


def made_on(stage: Path) -> dict[str, Any]:
    """Return device, versions and commit of a run; "a -> b" where it was continued on b."""
    return described(reading.read_json(stage / MARKER)["machines"])


def _begun(path: Path) -> bool:
    """Whether an unfinished run has a checkpoint."""
    return any(any(path.glob(pattern)) for pattern in CONTINUED)


def _worthless(stage: Path, done: str) -> bool:
    """Whether an unlocked stage is ours and will never be continued.

    That is so if it has no checkpoint, or its run is finished.
    """
    # A folder of somebody else that happens to end in .partial is never swept.
    names = {entry.name for entry in stage.iterdir()}
    ours = MARKER in names or not names
    finished = stage.with_name(stage.name.removesuffix(".partial")) / done
    return ours and (
        not _begun(stage) or (finished.exists() and not _is_to_replace(stage, finished))
    )


def _is_to_replace(stage: Path, finished: Path) -> bool:
    """Whether the unfinished run was begun with --overwrite True over this very result."""
    try:
        return reading.read_json(stage / MARKER).get("replaces") == _checksum(finished)
    except (UserError, OSError):
        return False


def _was_begun_by(path: Path, wanted: dict[str, Any]) -> bool:
    """Whether an unfinished run was begun with all that is wanted, and can be read.

    --overwrite True starts again what cannot be read.
    """
    try:
        begun = reading.read_json(path / MARKER)
        if not (wanted.items() <= begun.items() and begun.keys() >= set(MADE)):
            return False
        for pattern in CONTINUED:
            for saved in path.glob(pattern):
                reading.read_tensors(saved)
    except UserError:
        return False
    return True


def _checksum(finished: Path) -> str | None:
    """SHA-256 of the file whose presence means done; None where there is none."""
    return reading.sha256(finished) if finished.exists() else None


def _check_same(path: Path, begun: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to continue with other settings, and list what differs."""
    if begun == now:
        return

    # Settings by name, else inputs, else the method itself.
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


def put_in_place(final: Path, target: Path) -> None:
    """Rename a finished folder to its target, then remove the stage around it."""
    folders.put(final, target)
    folders.remove(final.parent)


def fresh(folder: Path) -> Path:
    """Make a folder, empty even if there was one."""
    folders.remove(folder)
    folder.mkdir()
    return folder


def costs_of(spent: Progress, evaluation_seconds: float) -> dict[str, Any]:
    """Return what a run cost, as records and results say it."""
    return {
        "seconds": round(spent.seconds, 3),
        "evaluation_seconds": round(evaluation_seconds, 3),
        "image_passes": {"forward": spent.forward, "backward": spent.backward},
        "peak_memory_bytes": spent.peak_memory_bytes,
    }


def flattened(facts: Any, groups: Collection[str]) -> dict[str, Any]:
    """Return a dataclass's fields as a dict; a field in `groups` gives its own entries instead."""
    flat: dict[str, Any] = {}
    for name, value in vars(facts).items():
        flat |= value if name in groups else {name: value}
    return flat
