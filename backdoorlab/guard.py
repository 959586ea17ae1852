"""The guard of a repair: where trusted images show harm, back to the weights before it, slower.

A defense that tunes the poisoned model on a few trusted images can destroy it: at a rate that suits
other data, or with an unlucky batch. The defender sees it on these images, so no repair has to end
there. After each epoch
  1. count the trusted images that the model classifies right, as it is used: in evaluation mode,
     without augmentation, in fp32.
  2. If they are too few (`guard_drop`), put weights and learning rate back to where they were
     before the epoch, forget the optimizer's averages, lower the rate, and repeat the epoch.
  3. After `guard_retreats` of these, end the stage with the last good weights.

No random number is drawn for it and no batch statistics move, so that a run in which it never steps
in ends in the same weights as without it.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from .data import Split, in_order
from .run import Run

ENOUGH = 1000
"""Trusted images that are enough: of more, every second, third and so on is classified. With 1,000
the interval is at most 6.2 points wide."""
QUANTILE = 1.96
"""Standard errors of a two-sided interval of 95 %."""
RATES = ("lr", "initial_lr", "max_lr", "min_lr")
"""Entries of an optimizer's parameter group that torch's schedules compute the rate from."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Settings of the guard. A method inherits these fields, which makes them its flags."""

    guard_drop: float | None = 0.15
    """Share of the attacked model's accuracy on the trusted images that a pass may take away; more,
    beyond a 95 % interval, and the pass is repeated from the weights before it at a lower rate.
    Higher lets the method do more harm. None: no guard."""
    guard_factor: float = 0.5
    """What the learning rate is multiplied by at each of these retreats."""
    guard_retreats: int = 6
    """Retreats after which the method ends with the last good weights; more let it find a lower
    rate, and cost a pass each."""

    RANGES: ClassVar[dict[str, str]] = {
        "guard_drop": "(0, 1)",
        "guard_factor": "(0, 1)",
        "guard_retreats": ">= 0",
    }


def guarded_epochs(
    run: Run,
    stage: str,
    total: int,
    trusted: Split,
    config: GuardConfig,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: LRScheduler | None = None,
) -> Iterator[int]:
    """Count epochs as `run.epochs` does, and repeat one that has harmed the model, slower.

    The body of the loop must change nothing but the model, the optimizer and the schedule.

    Args:
        run: the context of the defense.
        stage: name of the stage.
        total: number of epochs, >= 0, repeated ones not counted.
        trusted: images with true labels that show the harm; those that are trained on will do.
        config: how much harm is too much, and what then.
        model: begins as the attacked model, and ends with the last good weights.
        optimizer: its learning rate is lowered.
        schedule: of that rate.

    Yields:
        The number of the epoch, once more for each time that it is repeated.
    """
    states: dict[str, Any] = {"optimizer": optimizer}
    if schedule is not None:
        states["schedule"] = schedule
    if config.guard_drop is None:
        yield from run.epochs(stage, total, model=model, **states)
        return

    guard = _Guard(model, optimizer, schedule, trusted, config, config.guard_drop, run)
    for epoch in run.epochs(stage, total, model=model, **states, guard=guard):
        good = False
        while not good:
            kept = guard.copy()
            yield epoch
            good = guard.is_good() or guard.retreat(kept, epoch)
        run.log(trusted_accuracy=guard.accuracy)


class _Guard:
    """The state of a guarded stage; part of its checkpoint."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: LRScheduler | None,
        trusted: Split,
        config: GuardConfig,
        drop: float,
        run: Run,
    ) -> None:
        """Measure the attacked model. `drop` is the config's `guard_drop`."""
        self._model, self._optimizer, self._schedule = model, optimizer, schedule
        self._config, self._drop, self._run = config, drop, run
        step = math.ceil(len(trusted) / ENOUGH)
        self._judged = trusted.subset(torch.arange(0, len(trusted), step))
        self._retreats = 0
        self._before = self._last = self._now = self._right()

    @property
    def accuracy(self) -> float:
        """Of the last good weights, on the trusted images."""
        return self._last / len(self._judged)

    def is_good(self) -> bool:
        """Measure the model after a pass."""
        self._now = self._right()
        if harmed(self._now, self._before, len(self._judged), self._drop):
            return False
        self._last = self._now
        return True

    def retreat(self, kept: dict[str, Any], epoch: int) -> bool:
        """Undo a pass and lower the rate; end the stage, and return True, if that was too often."""
        # What was watched in the pass, or said of the stage's end, counts no more.
        self._put_back(kept)
        self._run.forget()

        limit, factor = self._config.guard_retreats, self._config.guard_factor
        if self._retreats < limit:
            self._retreats += 1
            self._slow_down()
            self._say(
                epoch,
                f"the pass is repeated at {factor:g} times the learning rate (retreat"
                f" {self._retreats} of {limit})",
            )
            return False

        self._say(epoch, f"the method ends there, after {limit} retreats")
        self._run.end_stage()
        return True

    def state_dict(self) -> dict[str, int]:
        """Return the state for a checkpoint; lowered rates are in optimizer and schedule."""
        return {"retreats": self._retreats, "before": self._before, "last": self._last}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the state of a checkpoint."""
        self._retreats, self._before = state["retreats"], state["before"]
        self._last = state["last"]

    # --- inside

    @torch.no_grad()
    def _right(self) -> int:
        """Count the trusted images that are classified right; every mode is as before then."""
        modes = [(module, module.training) for module in self._model.modules()]
        self._model.eval()
        right = sum(
            int((self._model(batch.images).argmax(1) == batch.labels).sum())
            for batch in in_order(self._judged, self._run.device)
        )
        for module, mode in modes:
            module.training = mode
        return right

    def copy(self) -> dict[str, Any]:
        """Copy what a pass changes, but for the optimizer's averages."""
        groups = [
            {key: group[key] for key in RATES if key in group}
            for group in self._optimizer.param_groups
        ]
        return copy.deepcopy(
            {
                "model": self._model.state_dict(),
                "rates": groups,
                "schedule": self._schedule.state_dict() if self._schedule else None,
            }
        )

    def _put_back(self, kept: dict[str, Any]) -> None:
        """Restore a copy. The optimizer's averages are dropped: they are of a rate too high."""
        self._model.load_state_dict(kept["model"])
        self._optimizer.state.clear()
        for group, rates in zip(self._optimizer.param_groups, kept["rates"], strict=True):
            group.update(rates)
        if self._schedule:
            self._schedule.load_state_dict(kept["schedule"])

    def _slow_down(self) -> None:
        """Multiply the learning rate, now and in what is left of the schedule."""
        factor = self._config.guard_factor
        for group in self._optimizer.param_groups:
            group.update({key: factor * group[key] for key in RATES if key in group})
        if self._schedule and hasattr(self._schedule, "base_lrs"):
            self._schedule.base_lrs = [factor * rate for rate in self._schedule.base_lrs]

    def _say(self, epoch: int, then: str) -> None:
        count = len(self._judged)
        self._run.note(
            f"pass {epoch + 1} left {100 * self._now / count:.1f} % of {count} trusted images"
            f" classified right, the attacked model {100 * self._before / count:.1f} %: the weights"
            f" before it are put back, and {then}"
        )


def harmed(right: int, before: int, count: int, drop: float) -> bool:
    """Tell whether accuracy on the trusted images has fallen by more than chance explains.

    Args:
        right: images that the model classifies right.
        before: images that the attacked model classifies right.
        count: images, >= 1.
        drop: share of the attacked model's accuracy that may be lost, in (0, 1).

    Returns:
        whether even the upper end of the 95 % interval of `right / count` lies below
        (1 - drop) before / count.
    """
    return upper_limit(right, count) < (1 - drop) * before / count


def upper_limit(right: int, count: int) -> float:
    """Return the upper end of Wilson's 95 % interval of a share, https://doi.org/10.2307/2276774.

    It is sensible for few images, too: none right of five is at most .43.
    """
    share, z = right / count, QUANTILE
    spread = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return (share + z**2 / (2 * count) + spread) / (1 + z**2 / count)
