"""The guard of a repair: where trusted images show harm, back to the last good weights, slower.

A defense that tunes the poisoned model on a few trusted images can destroy it: at a rate that suits
other data, or with an unlucky batch. The defender sees it on these images, so no repair has to end
there. After each epoch
  1. count the trusted images that the model classifies right, as it is used: in evaluation mode,
     without augmentation, in fp32.
  2. If they are about as many as the attacked model's (`guard_drop`), remember these weights.
  3. If they are far fewer (`guard_dip`), or it was the last epoch and they are fewer, put back
     the weights remembered last, with the learning rate of that time made lower, forget the
     optimizer's averages, and go through the epochs since then again.
  4. After `guard_retreats` of these, end the stage with the weights remembered last.

The limit in between is a wide one because methods that unlearn lose accuracy and win it back.
No random number is drawn for it and no batch statistics move, so that a run in which it never steps
in ends in the same weights as without it.
"""

import copy
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from ..data import Split, in_order
from ..run import Run

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
    """Share of the attacked model's accuracy on the trusted images that the method may cost in the
    end. If it costs more, beyond a 95 % interval, it goes back to its last good weights, and goes
    on at a lower rate. Higher lets it do more harm. None: no guard."""
    guard_dip: float = 0.5
    """The same share before the last epoch; higher waits longer for accuracy to come back."""
    guard_factor: float = 0.5
    """What the learning rate is multiplied by each time that it goes back."""
    guard_retreats: int = 6
    """Times that it may go back, before it ends with its last good weights. More let it find a
    lower rate, and cost the epochs that are repeated."""

    RANGES: ClassVar[dict[str, str]] = {
        "guard_drop": "(0, 1)",
        "guard_dip": "(0, 1)",
        "guard_factor": "(0, 1)",
        "guard_retreats": ">= 0",
    }


def guarded_epochs(
    run: Run,
    stage: str,
    total: int,
    trusted: Split,
    config: GuardConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: LRScheduler | None = None,
) -> Iterator[int]:
    """Count epochs as `run.epochs` does, and repeat those that have harmed the model, slower.

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
        The number of the epoch, once more each time that it is repeated.
    """
    states: dict[str, Any] = {"optimizer": optimizer}
    if schedule is not None:
        states["schedule"] = schedule
    # Turned off: ordinary epochs.
    if config.guard_drop is None:
        yield from run.epochs(stage, total, model=model, **states)
        return

    guard = _Guard(model, optimizer, schedule, trusted, config, config.guard_drop, run)
    for epoch in run.epochs(stage, total, model=model, **states, guard=guard):
        # Behind `epoch` after a retreat: epochs since the good one are gone through again.
        at = epoch
        while at <= epoch:
            yield at
            if not guard.judge(at, last=at + 1 == total or run.ending):
                at = guard.retreat(at)
            elif run.ending:
                break
            else:
                at += 1
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
        """Measure and remember the attacked model. `drop` is the config's `guard_drop`."""
        self._model, self._optimizer, self._schedule = model, optimizer, schedule
        self._run, self._drop, self._dip = run, drop, config.guard_dip
        self._factor, self._limit = config.guard_factor, config.guard_retreats
        # Evenly spread, because images may stand in the order of their classes.
        step = math.ceil(len(trusted) / ENOUGH)
        self._judged = trusted.subset(torch.arange(0, len(trusted), step))

        self._retreats = 0
        self._before = self._now = self._right()
        self._good = self._copy(0)

    @property
    def accuracy(self) -> float:
        """Accuracy of the model on the trusted images, when it was judged last."""
        return self._now / len(self._judged)

    def judge(self, epoch: int, *, last: bool) -> bool:
        """Measure the model after an epoch; tell whether the stage may go on, or end, with it."""
        self._now, count = self._right(), len(self._judged)
        # Weights that do no harm are what a retreat goes back to.
        if not harmed(self._now, self._before, count, self._drop):
            self._good = self._copy(epoch + 1)
            return True
        # In between more may be lost than in the end, but not without limit.
        return not last and not harmed(self._now, self._before, count, self._dip)

    def retreat(self, epoch: int) -> int:
        """Go back to the last good weights, at a lower rate.

        Returns:
            the epoch to go on with; one that is never reached if it was tried too often.
        """
        left, given_up = self.accuracy, self._retreats >= self._limit
        self._put_back(self._good)

        # What was watched since then, and that the stage should end, counts no more.
        self._run.forget()
        back = int(self._good["epoch"])
        where = f"as they were after epoch {back}" if back else "of the attacked model"
        if given_up:
            then = f"the method ends with them, after {self._limit} retreats"
            self._run.end_stage()
        else:
            self._retreats += 1
            self._slow_down()
            then = (
                f"the epochs since then are repeated at {self._factor:g} times the learning"
                f" rate (retreat {self._retreats} of {self._limit})"
            )
        count = len(self._judged)
        self._run.note(
            f"epoch {epoch + 1} left {100 * left:.1f} % of {count} trusted images classified right,"
            f" the attacked model {100 * self._before / count:.1f} %: the weights {where} are put"
            f" back, and {then}"
        )
        return sys.maxsize if given_up else back

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {
            "retreats": self._retreats,
            "before": self._before,
            "now": self._now,
            "good": self._good,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        self._retreats, self._before = state["retreats"], state["before"]
        self._now, self._good = state["now"], state["good"]

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

    def _copy(self, epoch: int) -> dict[str, Any]:
        """Copy what epochs change, but for the optimizer's averages; `epoch` is the next one."""
        groups = [
            {key: group[key] for key in RATES if key in group}
            for group in self._optimizer.param_groups
        ]
        return copy.deepcopy(
            {
                "epoch": epoch,
                "right": self._now,
                "model": dict(self._model.state_dict()),
                "rates": groups,
                "schedule": self._schedule.state_dict() if self._schedule else None,
            }
        )

    def _put_back(self, good: dict[str, Any]) -> None:
        """Restore a copy. The optimizer's averages are dropped: they are of a rate too high."""
        self._now = good["right"]
        self._model.load_state_dict(good["model"])
        self._optimizer.state.clear()
        for group, rates in zip(self._optimizer.param_groups, good["rates"], strict=True):
            group.update(rates)
        if self._schedule:
            self._schedule.load_state_dict(copy.deepcopy(good["schedule"]))

    def _slow_down(self) -> None:
        """Multiply the learning rate, now and in what is left of the schedule."""
        for group in self._optimizer.param_groups:
            group.update({key: self._factor * group[key] for key in RATES if key in group})
        if self._schedule and hasattr(self._schedule, "base_lrs"):
            self._schedule.base_lrs = [self._factor * rate for rate in self._schedule.base_lrs]

        # Another retreat begins with the rate that this one has lowered.
        self._good = self._copy(self._good["epoch"])


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
