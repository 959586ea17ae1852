"""One attack or one defense from start to finish: resumable, scored from outside, published whole.

A method sees a `Run`: `epochs`, `step`, `log`, `once`, `note`, `report_split`. Scores go one way,
into the log; nothing that a method calls returns one. What the runner reads of a run (`history`,
`splits`, `score`) is not for methods, and tests/test_run.py looks that none of ours does.
"""

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .device import Exact, autocast, derived_generator, finite
from .errors import UserError, described
from .metrics import SUMMARY, Evaluator, Scores, split_quality
from .models import PASSES
from .poison import Poison
from .storage import reading, writing
from .storage.reading import FILE_NAME

NAN_CHECK_EVERY = 64
"""Steps between two looks at the loss on a GPU, where each look waits for the device; on a CPU
every step is looked at."""
BETWEEN_CHECKPOINTS = {"cpu": 0.0, "cuda": 20.0}
"""Seconds from which on another epoch's end writes a checkpoint: on a GPU an epoch can be shorter
than writing one."""

LONGEST_NAME = 100
"""Letters of a stage's or a picture's name; a file system takes 255 bytes with its ending."""
TAKEN = frozenset(["stage", "epoch", "seconds", *SUMMARY])
"""What every line of history says by itself."""


@dataclass
class Progress:
    """What a run has spent and said so far; part of every checkpoint."""

    seconds: float = 0.0
    evaluation_seconds: float = 0.0
    forward: int = 0
    backward: int = 0
    peak_memory_bytes: int = 0


def say(text: str) -> None:
    """A line for a person, above the progress bar where there is one."""
    tqdm.write(f"  {text}", file=sys.stderr)


class Run:
    """What a method needs while it runs. Everything here survives a kill: the same command
    continues at the last checkpoint."""

    def __init__(
        self,
        folder: Path,
        *,
        seed: int,
        device: torch.device,
        precision: Exact = "fp32",
        train_poison: Poison | None = None,
        train_size: int | None = None,
        score_every: int = 1,
    ) -> None:
        self.folder, self.seed, self.device, self.precision = folder, seed, device, precision
        self.generator = derived_generator(seed, "run")
        self.history: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.splits: dict[str, dict[str, Any]] = {}
        self.progress = Progress()
        self.flagged: Tensor | None = None
        self.suspicion: Tensor | None = None
        self.pictures: dict[str, Sequence[Tensor]] = {}
        self.told: Callable[[int, dict[str, Any]], None] | None = None
        """Hears of each line of history and its place, from 1; without effect on the run."""
        self._evaluator: Evaluator | None = None
        self._train_poison, self._train_size, self._score_every = (
            train_poison,
            train_size,
            score_every,
        )
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = defaultdict(int)
        self._logged: dict[str, Any] = {}
        self._where, self._ended = "before the first epoch", False
        self._clock = self._saved = time.perf_counter()
        self._passes = (PASSES.forward, PASSES.backward)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    say = staticmethod(say)

    # --- what a method calls

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 for the forward passes inside where the run computes in it."""
        return autocast(self.device, self.precision)

    def epochs(
        self, stage: str, total: int, *, model: nn.Module | None = None, **state: Any
    ) -> Iterator[int]:
        """Count `total` epochs of a stage; score `model`, add a line of history and write a
        checkpoint (on a GPU now and then) after each.

        `model` and everything in `state` (optimizers, schedulers, further models: whatever has a
        `state_dict`) is saved, and put back when the run is started again.
        """
        _check_name("epochs", stage)
        parts = {"model": model, **state} if model is not None else state
        path = self.folder / f"checkpoint-{stage}.safetensors"
        done = 0
        if path.exists():
            tensors, meta = reading.read_tensors(path)
            if meta["total"] != total:
                raise UserError(
                    f"{path}: stage {stage!r} was started with {meta['total']} epochs, not {total}:"
                    " use --overwrite"
                )
            for name, part in parts.items():
                part.load_state_dict(writing.unpack(meta["state"][name], tensors))
                if isinstance(part, torch.optim.Optimizer):
                    _like_parameters(part)
            self._restore(tensors, meta)
            done = meta["done"]
            if 0 < done < total:
                self.say(f"continuing {stage} after epoch {done} of {total}")
        bar = tqdm(
            range(done, total),
            desc=stage,
            initial=done,
            total=total,
            disable=None,
            leave=False,
            unit="epoch",
        )
        for epoch in bar:
            self._where = f"stage {stage}, epoch {epoch}"
            began = time.perf_counter()
            self._sums.clear()
            self._counts.clear()
            self._logged = {}
            yield epoch
            self._check_finite()
            row: dict[str, Any] = {
                "stage": stage,
                "epoch": epoch,
                "seconds": round(time.perf_counter() - began, 3),
            }
            row |= {name: self.mean(name) for name in self._sums} | self._logged
            if model is not None and self._scores_due(epoch, total):
                row |= self.score(model).summary()
            self.history.append(row)
            self._describe(row, total, bar)
            self._tell(row)
            ended, self._ended = self._ended, False
            done = total if ended else epoch + 1
            if (
                done == total
                or time.perf_counter() - self._saved >= BETWEEN_CHECKPOINTS[self.device.type]
            ):
                self._save(path, parts, stage=stage, done=done, total=total)
            if ended:
                break
        self._where = f"after stage {stage}"

    def end_stage(self) -> None:
        """Let the epoch that runs be the last of its stage."""
        self._ended = True

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        loss: Tensor,
        gradients: Sequence[Tensor] | None = None,
    ) -> None:
        """One descent step; the loss is watched, and a loss that is no number stops the run.

        `gradients`, one for each of the optimizer's parameters in their order, are stepped along
        instead of the loss's own.
        """
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
        for name, value in values.items():
            value = value.detach()
            self._sums[name] = self._sums[name] + value if name in self._sums else value.double()
            self._counts[name] += 1
        steps = max(self._counts[name] for name in values)
        if self.device.type == "cpu" or steps % NAN_CHECK_EVERY == 0:
            self._check_finite()

    def mean(self, name: str) -> float:
        """The average so far of a watched training-side value in this epoch."""
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

    def cached(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Compute named tensors, or read what an earlier, killed start of this run computed."""
        _check_name("cached", name)
        path = self.folder / f"cached-{name}.safetensors"
        if path.exists():
            tensors, meta = reading.read_tensors(path)
            self._restore(tensors, meta)
            return {key: tensors[f"value/{key}"] for key in meta["keys"]}
        self._where = name
        values = {key: value.cpu() for key, value in compute().items()}
        tensors, meta = self._state()
        tensors |= {f"value/{key}": value for key, value in values.items()}
        writing.write_tensors(path, tensors, keys=list(values), **meta)
        return values

    def note(self, text: str) -> None:
        """Say a sentence and keep it in the result: what a reader of the table should know."""
        if not isinstance(text, str):
            raise UserError(f"run.note({text!r}): expected a sentence, got {described(text)}")
        if text not in self.notes:
            self.notes.append(text)
            self.say(text)

    def report_split(
        self, flagged: Tensor, name: str = "split", suspicion: Tensor | None = None
    ) -> None:
        """Score a bool (N,) mask over the training set that claims to be the poison. Returns
        nothing.

        `suspicion`, float (N,), the larger the more suspect, is what the mask was decided by; it is
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
        if name == "split":
            self.flagged = flagged.cpu()
            self.suspicion = None if suspicion is None else suspicion.detach().float().cpu()
        if self._train_poison is not None:
            self.splits[name] = quality = split_quality(flagged, self._train_poison)
            self._logged |= {
                f"{name}_flagged": quality["flagged"],
                f"{name}_missed": quality["missed"],
            }
            self.say(f"{name}: {describe_split(quality)}")
        else:
            self.say(
                f"{name}: {int(flagged.sum())} of {len(flagged)} flagged; nobody knows how rightly"
            )

    def picture(self, name: str, rows: Sequence[Tensor]) -> None:
        """Keep a sheet of images beside the result, as NAME.png; each row uint8 (n, C, H, W).

        NAME: at most 100 letters, digits, and _ . -, for a result holds files of no other name.
        """
        _check_name("picture", name)
        wrong = [
            images
            for images in rows
            if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.dim() != 4
        ]
        if wrong:
            raise UserError(
                f"run.picture({name!r}): expected rows of images, uint8 (n, C, H, W) each, got"
                f" {described(wrong[0])}"
            )
        self.pictures[name] = [images.cpu() for images in rows]

    # --- what the runner calls

    def watch_scores(self, evaluator: Evaluator) -> None:
        """Score models with this from now on."""
        self._evaluator = evaluator

    def score(self, model: nn.Module) -> Scores:
        """Evaluate; the time is not charged to the method."""
        if self._evaluator is None:
            raise RuntimeError("this run has no evaluator")
        self._charge()
        began = time.perf_counter()
        scores = self._evaluator(model)
        self.progress.evaluation_seconds += time.perf_counter() - began
        self._clock = time.perf_counter()
        return scores

    def spent(self) -> Progress:
        """Seconds without evaluation, image passes and peak memory up to now."""
        self._charge()
        return self.progress

    def save_history(self, folder: Path) -> None:
        frame = pd.DataFrame(self.history)
        writing.write_bytes(folder / "history.csv", frame.to_csv(index=False).encode())

    # --- inside

    def _scores_due(self, epoch: int, total: int) -> bool:
        if self._evaluator is None or self._score_every == 0:
            return False
        return (epoch + 1) % self._score_every == 0 or epoch + 1 == total

    def _describe(self, row: dict[str, Any], total: int, bar: Any) -> None:
        values = "  ".join(
            f"{name} {_short(value)}"
            for name, value in row.items()
            if name not in ("stage", "epoch") and value is not None
        )
        if bar.disable:  # no terminal: one plain line an epoch
            self.say(f"{row['stage']} {row['epoch'] + 1}/{total}  {values}")
        else:
            bar.set_postfix_str(values)

    def _tell(self, row: dict[str, Any]) -> None:
        """The time that a listener takes is not charged to the method."""
        if self.told is not None:
            self._charge()
            self.told(len(self.history), row)
            self._clock = time.perf_counter()

    def _check_finite(self) -> None:
        for name, value in self._sums.items():
            if not finite(value):
                raise UserError(
                    f"{name} became {value.item()} in {self._where}, step {self._counts[name]}: the"
                    " run diverged and is stopped; lower the learning rate, or try --precision"
                    " fp32"
                )

    def _charge(self) -> None:
        now, progress = time.perf_counter(), self.progress
        progress.seconds += now - self._clock
        progress.forward += PASSES.forward - self._passes[0]
        progress.backward += PASSES.backward - self._passes[1]
        progress.peak_memory_bytes = max(progress.peak_memory_bytes, peak_memory(self.device))
        self._clock, self._passes = now, (PASSES.forward, PASSES.backward)

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        self._charge()
        tensors = {"rng/torch": torch.get_rng_state(), "rng/run": self.generator.get_state()}
        if self.device.type == "cuda":
            tensors["rng/cuda"] = torch.cuda.get_rng_state(self.device)
        meta = dict(
            history=self.history, notes=self.notes, splits=self.splits, progress=vars(self.progress)
        )
        tensors |= {
            name: value
            for name, value in (("flagged", self.flagged), ("suspicion", self.suspicion))
            if value is not None
        }
        return tensors, meta

    def _save(self, path: Path, parts: dict[str, Any], **position: Any) -> None:
        tensors, meta = self._state()
        packed = {
            name: writing.pack(part.state_dict(), tensors, name) for name, part in parts.items()
        }
        writing.write_tensors(path, tensors, state=packed, **position, **meta)
        self._saved = time.perf_counter()

    def _restore(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        torch.set_rng_state(tensors["rng/torch"])
        self.generator.set_state(tensors["rng/run"])
        if self.device.type == "cuda" and "rng/cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng/cuda"], self.device)
        self.history, self.notes, self.splits = meta["history"], meta["notes"], meta["splits"]
        self.progress = Progress(**meta["progress"])
        self.flagged, self.suspicion = tensors.get("flagged"), tensors.get("suspicion")
        self._clock, self._passes = time.perf_counter(), (PASSES.forward, PASSES.backward)


def _check_name(call: str, name: str) -> None:
    """Names become names of files."""
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
    """Give loaded buffers their parameter's memory format: fused steps pair them element by element
    in memory order."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter).copy_(value)


def describe_split(quality: dict[str, Any]) -> str:
    """One line a person reads: how many were flagged, and how right that was."""
    if quality["tpr"] is None:
        return (
            f"{quality['flagged']} flagged, in a training set without poison (FPR"
            f" {_short(quality['fpr'])})"
        )
    return (
        f"{quality['flagged']} flagged, precision {_short(quality['precision'])}, TPR"
        f" {_short(quality['tpr'])}, FPR {_short(quality['fpr'])}"
    )


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch held on the GPU, or that the process held in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _short(value: Any) -> str:
    if isinstance(value, (float, np.floating)):
        return f"{value:.4g}"
    return "-" if value is None else str(value)
