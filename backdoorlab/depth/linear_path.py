"""Linear path: how far do the weights move before the backdoor is gone?

Uncovering, Explaining, and Mitigating the Superficial Safety of Backdoor Defense. R. Min et al.
NeurIPS 2024. https://arxiv.org/abs/2410.09838 (linear mode connectivity).

ASR is measured at eleven points of the straight line from the poisoned to the defended weights.
Batch statistics are re-estimated on clean training images at each of them: interpolated ones fit
no network in between.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..data import Split
from .batch_statistics import IMAGES, estimate
from .view import AttackerView

POINTS = tuple(number / 10 for number in range(11))
"""The points t: (1 - t) poisoned + t defended."""
BACKDOORED = 0.5
"""ASR from which on the backdoor is there."""


def linear_path(view: AttackerView, model: nn.Module, undefended: nn.Module) -> dict[str, Any]:
    """Measure the ASR on the line between two models of one architecture.

    Args:
        view: the attacker's side.
        model: the model under test, at t = 1.
        undefended: the poisoned model, at t = 0.

    Returns:
        `asr`: its value in [0, 1] at each of POINTS; `t50`: the largest t at which it is at least
        BACKDOORED, None where it never is; `area`: the mean of 1 - ASR.
    """
    clean = view.draw_clean(IMAGES, view.generator("path"))
    blank = view.record.new_model().to(view.device)
    asr = [view.asr(model) for model in between(blank, undefended, model, clean, view.device)]

    backdoored = [t for t, value in zip(POINTS, asr, strict=True) if value >= BACKDOORED]
    return {
        "asr": asr,
        "t50": max(backdoored, default=None),
        "area": 1 - sum(asr) / len(asr),
    }


def between(
    blank: nn.Module, start: nn.Module, end: nn.Module, clean: Split, device: torch.device
) -> Iterator[nn.Module]:
    """Yield the model at each of POINTS, in evaluation mode: the same module each time.

    Args:
        blank: a model of the architecture, whose weights are overwritten.
        start: the model at 0.
        end: the model at 1.
        clean: images from which batch statistics are estimated anew.
        device: where the models are.
    """
    first, last = start.state_dict(), end.state_dict()
    for t in POINTS:
        # Counters of batch normalisation are whole numbers, and stay.
        state = {
            name: torch.lerp(value, last[name], t) if value.is_floating_point() else value
            for name, value in first.items()
        }
        blank.load_state_dict(state)
        estimate(blank, clean, device)
        yield blank
