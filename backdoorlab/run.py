"""What a method is given while it runs: epochs that survive a kill, checked steps, notes.

Scores go one way. A `Run` hands each epoch's model and each reported split to functions of the
executor (`Callbacks`) and gets nothing back. Test scores, the history with them, and the positions
of the poison lie in execution/scores.py, and no attribute of a `Run` leads there (tests/test_run.py
walks all of them).
"""

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .device import Exact, autocast, derived_generator, finite
from .errors import UserError, described
from .metrics import SUMMARY, Evaluator
from .models import PASSES
from .storage import reading, writing
from .storage.reading import FILE_NAME

NAN_CHECK_EVERY = 64
"""Steps between two checks of the loss for NaN on a GPU, where a check waits for the device. On a
CPU every step is checked."""
BETWEEN_CHECKPOINTS = {"cpu": 0.0, "cuda": 20.0}
"""Least seconds between two checkpoints: on a GPU an epoch can be shorter than writing one."""

LONGEST_NAME = 100
"""Letters of a stage's or a picture's name; a file system takes 255 bytes with its ending."""
TAKEN = frozenset(["stage", "epoch", "seconds", *SUMMARY])
"""Columns of the history that a method cannot use for its own values."""


@dataclass
class Progress:
    """What a method has spent so far, evaluation excluded; part of every checkpoint."""

    seconds: float = 0.0
    forward: int = 0
    """Images that passed forward through a network."""
    backward: int = 0
    """Images that passed backward."""
    peak_memory_bytes: int = 0


@dataclass(frozen=True)
class Epoch:
    """What the executor gets at the end of an epoch."""

    row: dict[str, Any]
    """Its line of history without scores: stage, epoch, seconds, watched and logged values."""
    splits: Sequence[str]
    """Names of the splits that were reported in it."""
    model: nn.Module | None
    """The model to score; None where the stage names none."""
    last: bool
    """Whether the stage has no further epoch."""
    show: Callable[[dict[str, Any]], None]
    """Prints a line of history: to the progress bar, or as one line without a terminal."""


@dataclass(frozen=True)
class Callbacks:
    """What the executor does when a run reports something. None of them returns a score.

    They must be closures: the attributes of a bound method lead to its object and its scores.
    """

    epoch_ended: Callable[[Epoch], None]
    """Scores the model and keeps the line of history."""
    split_reported: Callable[[str, Tensor, Tensor | None], None]
    """(name, flagged bool (N,), suspicion float (N,) or None): measures the split against the true
    poison."""
    watch_scores: Callable[[Evaluator], None]
    """Takes the evaluator that scores models from now on."""
    save: Callable[[dict[str, Any]], None]
    """Puts the executor's state into a checkpoint's JSON."""
    restore: Callable[[dict[str, Any]], None]
    """Takes that state back from a checkpoint's JSON."""


def _no_effect(_value: Any) -> None:
    pass


NO_EXECUTOR = Callbacks(
    epoch_ended=lambda epoch: epoch.show(epoch.row),
    split_reported=lambda _name, _flagged, _suspicion: None,
    watch_scores=_no_effect,
    save=_no_effect,
    restore=_no_effect,
)
"""For a run by itself: lines are printed, and nothing is scored or kept."""


def say(text: str) -> None:
    """Print a line for a person to stderr, above the progress bar where there is one."""
    tqdm.write(f"  {text}", file=sys.stderr)


class Run:
    """The context of one attack or defense: epochs, steps, log and notes.

    All of it survives a kill: the same command continues at the last checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        *,
        seed: int,
        device: torch.device,
        precision: Exact = "fp32",
        train_size: int | None = None,
        callbacks: Callbacks = NO_EXECUTOR,
    ) -> None:
        """Start the clock.

        Args:
            folder: where checkpoints lie; what is in it already is continued.
            seed: the seed of `generator`.
            device: where models and batches are.
            precision: what training computes in.
            train_size: number of training images; reported splits must have this length. None
                accepts any length.
            callbacks: what the executor does with epochs and splits.
        """
        self.folder, self.seed, self.device, self.precision = folder, seed, device, precision
        self.generator = derived_generator(seed, "run")
        self.notes: list[str] = []
        self.progress = Progress()
        self.flagged: Tensor | None = None
        self.suspicion: Tensor | None = None
        self.pictures: dict[str, Sequence[Tensor]] = {}
        self._train_size, self._callbacks = train_size, callbacks

        # Values of the epoch that runs.
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = defaultdict(int)
        self._logged: dict[str, Any] = {}
        self._splits: list[str] = []
        self._where, self._ended = "before the first epoch", False

        self._clock = self._saved = time.perf_counter()
        self._passes = (PASSES.forward, PASSES.backward)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    say = staticmethod(say)

    # --- what a method calls

    def autocast(self) -> AbstractContextManager[Any]:
        """Compute forward passes inside in bfloat16 if that is the precision of the run."""
        return autocast(self.device, self.precision)

    def epochs(
        self, stage: str, total: int, *, model: nn.Module | None = None, **state: Any
    ) -> Iterator[int]:
        """Count the epochs of a stage. After each, hand over `model` to be scored, and save.

        On a GPU not every short epoch writes a checkpoint (BETWEEN_CHECKPOINTS); the end of a
        stage always does.

        Args:
            stage: name of the stage, unique in the run; it becomes part of a file name.
            total: number of epochs, >= 0; another number than that of the checkpoint is refused.
            model: scored after each epoch; saved and restored like `state`.
            state: optimizers, schedulers, further models: whatever has a `state_dict` and changes
                from epoch to epoch. What is missing here makes a continued run end elsewhere.

        Yields:
            The number of the epoch, from 0, or from the first one after the checkpoint.
        """
        _check_name("epochs", stage)
        parts = {"model": model, **state} if model is not None else state
        path = self.folder / f"checkpoint-{stage}.safetensors"
        done = self._resumed(path, stage, total, parts)
        left, style = range(done, total), {"disable": None, "leave": False, "unit": "epoch"}
        bar = tqdm(left, desc=stage, initial=done, total=total, **style)

        for epoch in bar:
            # What is watched, logged and reported belongs to one epoch.
            self._where = f"stage {stage}, epoch {epoch}"
            began = time.perf_counter()
            self._sums.clear()
            self._counts.clear()
            self._logged, self._splits = {}, []
            yield epoch

            # Seconds are those of the training alone: scores come after them.
            self._check_finite()
            seconds = round(time.perf_counter() - began, 3)
            row: dict[str, Any] = {"stage": stage, "epoch": epoch, "seconds": seconds}
            row |= {name: self.mean(name) for name in self._sums} | self._logged
            show = partial(self._show, total=total, bar=bar)
            with self.uncharged():
                self._callbacks.epoch_ended(
                    Epoch(row, tuple(self._splits), model, epoch + 1 == total, show)
                )

            # The end of a stage is always saved, for later stages start from it.
            ended, self._ended = self._ended, False
            done = total if ended else epoch + 1
            waited = time.perf_counter() - self._saved
            if done == total or waited >= BETWEEN_CHECKPOINTS[self.device.type]:
                self._save(path, parts, stage=stage, done=done, total=total)
            if ended:
                break
        self._where = f"after stage {stage}"

    def end_stage(self) -> None:
        """Make the current epoch the last of its stage."""
        self._ended = True

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        loss: Tensor,
        gradients: Sequence[Tensor] | None = None,
    ) -> None:
        """Take one descent step and watch the loss; a loss that is not finite stops the run.

        Args:
            optimizer: holds the parameters.
            loss: scalar with a graph.
            gradients: one for each of the optimizer's parameters, in their order; used in place
                of the gradients of `loss`.
        """
        # The parameters' own gradients are replaced, never added to.
        optimizer.zero_grad(set_to_none=True)
        if gradients is None:
            loss.backward()
        else:
            for parameter, gradient in zip(_parameters(optimizer), gradients, strict=True):
                parameter.grad = gradient

        optimizer.step()
        self.watch(loss=loss)

    def watch(self, **values: Tensor) -> None:
        """Average scalars over the epoch, on the device, into its line of history."""
        _check_free("watch", values)

        # Sums stay on the device in float64: `.item()` in each step would wait for a GPU.
        for name, value in values.items():
            value = value.detach()
            self._sums[name] = self._sums[name] + value if name in self._sums else value.double()
            self._counts[name] += 1

        # On a GPU each check waits for the device.
        steps = max(self._counts[name] for name in values)
        if self.device.type == "cpu" or steps % NAN_CHECK_EVERY == 0:
            self._check_finite()

    def mean(self, name: str) -> float:
        """Return the average of a watched value over this epoch so far."""
        return (self._sums[name] / self._counts[name]).item()

    def log(self, **values: float | int | str | None) -> None:
        """Add training-side values to this epoch's line of history."""
        _check_free("log", values)
        for name, value in values.items():
            if value is not None and not isinstance(value, (int, float, str)):
                raise UserError(
                    f"run.log({name}=...): expected a number or a word, got {described(value)}: a"
                    " tensor's number is its .item()"
                )
        self._logged |= values

    @property
    def ending(self) -> bool:
        """Whether the current epoch is the last of its stage by `end_stage`."""
        return self._ended

    def forget(self) -> None:
        """Drop what this epoch has watched and logged so far, and `end_stage`: it is repeated."""
        self._sums.clear()
        self._counts.clear()
        self._logged, self._ended = {}, False

    def cached(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Compute named tensors once; a continued run reads them back.

        The random state after it is restored, too, so that later draws are the same.

        Args:
            name: part of the file's name.
            compute: returns the tensors by name.
        """
        _check_name("cached", name)
        path = self.folder / f"cached-{name}.safetensors"
        # Read back: an earlier start of this run has computed them.
        if path.exists():
            tensors, meta = reading.read_tensors(path)
            with reading.refuse_other_version(path):
                self._restore(tensors, meta)
                return {key: tensors[f"value/{key}"] for key in meta["keys"]}

        # Computed now, and saved with the state in which the run goes on.
        self._where = name
        values = {key: value.cpu() for key, value in compute().items()}
        tensors, meta = self._state()
        tensors |= {f"value/{key}": value for key, value in values.items()}
        writing.write_tensors(path, tensors, keys=list(values), **meta)
        return values

    def note(self, text: str) -> None:
        """Print a sentence and keep it in the result, for the reader of the table."""
        if not isinstance(text, str):
            raise UserError(f"run.note({text!r}): expected a sentence, got {described(text)}")
        # A continued run says again what it noted before.
        if text not in self.notes:
            self.notes.append(text)
            self.say(text)

    def report_split(
        self, flagged: Tensor, name: str = "split", suspicion: Tensor | None = None
    ) -> None:
        """Report which training images a defense flags as poison. They are scored outside.

        Args:
            flagged: bool (N,), over the training set.
            name: "split" for the defense's answer, another name for a step on the way to it.
            suspicion: float (N,), larger is more suspect: the value behind the decision. It is
                kept for a histogram.
        """
        size = self._train_size if self._train_size is not None else len(flagged)
        if (
            not isinstance(flagged, Tensor)
            or flagged.dtype != torch.bool
            or flagged.shape != (size,)
        ):
            raise UserError(
                f"run.report_split: expected who is flagged as bool ({size},), one for each"
                f" training image, got {described(flagged)}"
            )
        if suspicion is not None and suspicion.shape != (size,):
            raise UserError(
                f"run.report_split: expected suspicion as float ({size},), one for each training"
                f" image, got {described(suspicion)}"
            )

        # Only the answer itself is kept beside the result.
        if name == "split":
            self.flagged = flagged.cpu()
            self.suspicion = None if suspicion is None else suspicion.detach().float().cpu()
        self._splits.append(name)
        self._callbacks.split_reported(name, flagged, suspicion)

    def picture(self, name: str, rows: Sequence[Tensor]) -> None:
        """Keep a sheet of images beside the result, as NAME.png.

        Args:
            name: at most 100 letters, digits, and _ . -, as for every file of a result.
            rows: rows of the sheet, each uint8 (n, C, H, W).
        """
        _check_name("picture", name)
        wrong = [images for images in rows if not _are_images(images)]
        if wrong:
            raise UserError(
                f"run.picture({name!r}): expected rows of images, uint8 (n, C, H, W) each, got"
                f" {described(wrong[0])}"
            )
        # On the CPU, so that a sheet takes no memory of a GPU until the end.
        self.pictures[name] = [images.cpu() for images in rows]

    # --- what the executor and attacks call

    def watch_scores(self, evaluator: Evaluator) -> None:
        """Hand over the evaluator that scores models from now on; the run does not keep it."""
        self._callbacks.watch_scores(evaluator)

    @contextmanager
    def uncharged(self) -> Iterator[None]:
        """Leave the time that passes inside out of the method's costs."""
        self._charge()
        try:
            yield
        finally:
            self._clock = time.perf_counter()

    def spent(self) -> Progress:
        """Return seconds without evaluation, image passes and peak memory up to now."""
        self._charge()
        return self.progress

    # --- inside

    def _show(self, row: dict[str, Any], total: int, bar: Any) -> None:
        shown = {name: value for name, value in row.items() if name not in ("stage", "epoch")}
        values = "  ".join(
            f"{name} {short(value)}" for name, value in shown.items() if value is not None
        )
        # Without a terminal there is no bar, but one plain line an epoch.
        if bar.disable:
            self.say(f"{row['stage']} {row['epoch'] + 1}/{total}  {values}")
        else:
            bar.set_postfix_str(values)

    def _check_finite(self) -> None:
        for name, value in self._sums.items():
            if not finite(value):
                raise UserError(
                    f"{name} became {value.item()} in {self._where}, step {self._counts[name]}: the"
                    " run diverged and is stopped; lower the learning rate, or try --precision"
                    " fp32"
                )

    def _charge(self) -> None:
        """Add what was spent since the last call to the costs."""
        now, progress = time.perf_counter(), self.progress
        progress.seconds += now - self._clock
        progress.forward += PASSES.forward - self._passes[0]
        progress.backward += PASSES.backward - self._passes[1]
        progress.peak_memory_bytes = max(progress.peak_memory_bytes, peak_memory(self.device))
        self._clock, self._passes = now, (PASSES.forward, PASSES.backward)

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What every checkpoint holds besides networks: random state, notes, costs, scores."""
        self._charge()
        tensors = {"rng/torch": torch.get_rng_state(), "rng/run": self.generator.get_state()}
        if self.device.type == "cuda":
            tensors["rng/cuda"] = torch.cuda.get_rng_state(self.device)
        if self.flagged is not None:
            tensors["flagged"] = self.flagged
        if self.suspicion is not None:
            tensors["suspicion"] = self.suspicion

        # Scores lie with the executor, which puts them beside.
        meta: dict[str, Any] = {"notes": self.notes, "progress": vars(self.progress)}
        self._callbacks.save(meta)
        return tensors, meta

    def _save(self, path: Path, parts: dict[str, Any], **position: Any) -> None:
        tensors, meta = self._state()
        packed = {
            name: writing.pack(part.state_dict(), tensors, name) for name, part in parts.items()
        }
        writing.write_tensors(path, tensors, state=packed, **position, **meta)
        self._saved = time.perf_counter()

    def _resumed(self, path: Path, stage: str, total: int, parts: dict[str, Any]) -> int:
        """Restore a stage's checkpoint where there is one; return how many epochs are done."""
        if not path.exists():
            return 0
        tensors, meta = reading.read_tensors(path)
        with reading.refuse_other_version(path):
            if meta["total"] != total:
                raise UserError(
                    f"{path}: stage {stage!r} was started with {meta['total']} epochs, not"
                    f" {total}: use --overwrite"
                )

            # Random state is restored last, whatever is drawn until then.
            for name, part in parts.items():
                part.load_state_dict(writing.unpack(meta["state"][name], tensors))
                if isinstance(part, torch.optim.Optimizer):
                    _like_parameters(part)
            self._restore(tensors, meta)
            done = int(meta["done"])

        if 0 < done < total:
            self.say(f"continuing {stage} after epoch {done} of {total}")
        return done

    def _restore(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        torch.set_rng_state(tensors["rng/torch"])
        self.generator.set_state(tensors["rng/run"])
        if self.device.type == "cuda" and "rng/cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng/cuda"], self.device)

        # The time until here was no work of the method, so the clock starts now.
        self._callbacks.restore(meta)
        self.notes, self.progress = meta["notes"], Progress(**meta["progress"])
        self.flagged, self.suspicion = tensors.get("flagged"), tensors.get("suspicion")
        self._clock, self._passes = time.perf_counter(), (PASSES.forward, PASSES.backward)


def _check_name(call: str, name: str) -> None:
    """Refuse a name that cannot be part of a file name."""
    if len(name) > LONGEST_NAME or not FILE_NAME.fullmatch(f"{name}.png"):
        raise UserError(
            f"run.{call}({name!r}): a name is of at most {LONGEST_NAME} letters, digits, and _ . -,"
            f" such as 'my_{call}'"
        )


def _check_free(call: str, names: Iterable[str]) -> None:
    taken = TAKEN.intersection(names)
    if taken:
        raise UserError(
            f"run.{call}({min(taken)}=...): the line of history has a {min(taken)} of its own:"
            " choose another name"
        )


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _like_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Give loaded buffers the memory format of their parameter.

    Fused steps pair the two element by element in memory order.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter).copy_(value)


def _are_images(images: Any) -> bool:
    return isinstance(images, Tensor) and images.dtype == torch.uint8 and images.dim() == 4


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of torch on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    # macOS counts bytes, other systems KiB.
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def short(value: Any) -> str:
    """Write a value in few letters: four digits of a number, "-" for None."""
    if isinstance(value, (float, np.floating)):
        return f"{value:.4g}"
    return "-" if value is None else str(value)
