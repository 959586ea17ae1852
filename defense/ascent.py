"""Ascent: gradient ascent on the split, descent on the rest.

ABL's unlearning (Anti-Backdoor Learning, Y. Li et al., NeurIPS 2021,
https://arxiv.org/abs/2110.11571), which ascends on the split alone; with descent on the rest it is
DAU's `gga`. The rate is that of ABL's code.

Assumes: the poisoned model, its training set and a split of it (`--split`).

Departs: the ascent of a sample ends at `--ascent_cap`, because it has no bound of its own and
destroys the model. None is as published.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from backdoorlab.cli import main
from backdoorlab.config import SplitConfig
from backdoorlab.losses import capped, cross_entropy
from backdoorlab.record import DefenderView
from backdoorlab.repair.unlearning import UnlearningConfig, note_what_stays, train_on
from backdoorlab.run import Run

ASSUMES = ("model", "train", "split")


@dataclass(frozen=True, kw_only=True)
class Config(UnlearningConfig, SplitConfig):
    lr: float = 5e-4
    """Learning rate; higher forgets more, and costs accuracy."""
    ascent_cap: float | None = 10.0
    """Cross-entropy of a sample at which its ascent ends; higher forgets more surely, and costs
    accuracy. None never ends it."""

    RANGES: ClassVar[dict[str, str]] = {"ascent_cap": "> 0"}


def defend(view: DefenderView, config: Config, run: Run) -> nn.Module:
    # On all training images: the loss tells the split from the rest.
    index, model = torch.arange(len(view.train)), view.load_model()
    train_on(
        "ascend",
        config.epochs,
        model,
        view.train,
        index,
        view.split,
        partial(ascent_loss, cap=config.ascent_cap),
        view,
        config,
        run,
    )
    note_what_stays(model, view.train, view.split, run)
    return model


def ascent_loss(logits: Tensor, labels: Tensor, forgotten: Tensor, cap: float | None) -> Tensor:
    """CE of the rest less CE of the split up to `cap`, averaged: (B, K), (B,), bool (B,) -> ()."""
    learned = cross_entropy(logits, labels)
    return torch.where(forgotten, -capped(learned, cap), learned).mean()


if __name__ == "__main__":
    raise SystemExit(main(__file__))
