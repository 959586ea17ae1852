"""Random label: learn the split with other labels, drawn at random.

The relabelling of Amnesiac Machine Learning, L. Graves, V. Nagisetty and V. Ganesh, AAAI 2021,
https://arxiv.org/abs/2010.10981. The rate is that of fine-tuning in BackdoorBench.

Assumes: the poisoned model, its training set and a split of it (`--split`).

Departs: the labels are drawn once, and all of the training set is trained on, at the budget that
all unlearners here share.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backdoorlab.cli import main
from backdoorlab.config import SplitConfig
from backdoorlab.record import DefenderView
from backdoorlab.repair.unlearning import UnlearningConfig, plain_loss, train_on
from backdoorlab.run import Run

ASSUMES = ("model", "train", "split")


@dataclass(frozen=True, kw_only=True)
class Config(UnlearningConfig, SplitConfig):
    lr: float = 0.01
    """Learning rate; higher forgets more, and costs accuracy."""


def defend(view: DefenderView, config: Config, run: Run) -> nn.Module:
    labels = relabelled(view.train.labels.cpu(), view.split, view.num_classes, run.generator)
    train, index = dataclasses.replace(view.train, labels=labels), torch.arange(len(labels))
    model = view.load_model()
    return train_on(
        "relabel",
        config.epochs,
        model,
        train,
        index,
        view.split,
        plain_loss,
        view,
        config,
        run,
    )


def relabelled(
    labels: Tensor, forgotten: Tensor, num_classes: int, generator: torch.Generator
) -> Tensor:
    """Draw another label for each forgotten sample, all others being equally likely.

    int64 (N,), bool (N,) -> int64 (N,).
    """
    # A step of 1 to K - 1 around the circle of labels never ends where it began.
    steps = torch.randint(1, max(2, num_classes), labels.shape, generator=generator)
    return torch.where(forgotten, (labels + steps) % num_classes, labels)


if __name__ == "__main__":
    raise SystemExit(main(__file__))
