"""CCE: DAU's unlearning by itself, of any split.

Z. Zhu, Machine Intelligence Laboratory, Harbin Institute of Technology (Shenzhen), 2025: step 4 of
defense/dau.py, with its constants. Complementary cross-entropy, -log(1 - p_y), lowers the
probability of the given label; the rest of the training set is learned as it is.

Assumes: the poisoned model, its training set and a split of it (`--split`).
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from backdoorlab.cli import main
from backdoorlab.config import SplitConfig
from backdoorlab.losses import cce, cross_entropy
from backdoorlab.record import DefenderView
from backdoorlab.repair.unlearning import UnlearningConfig, note_what_stays, train_on
from backdoorlab.run import Run

ASSUMES = ("model", "train", "split")


@dataclass(frozen=True, kw_only=True)
class Config(UnlearningConfig, SplitConfig):
    alpha: float = 1.0
    """Weight of learning the rest; higher keeps more accuracy."""
    beta: float = 1.0
    """Weight of unlearning the split; higher forgets more, and costs accuracy."""

    RANGES: ClassVar[dict[str, str]] = {"alpha": ">= 0", "beta": ">= 0"}


def defend(view: DefenderView, config: Config, run: Run) -> nn.Module:
    # From the poisoned model, on all images: DAU's step 4.
    index, model = torch.arange(len(view.train)), view.load_model()
    train_on(
        "unlearn",
        config.epochs,
        model,
        view.train,
        index,
        view.split,
        partial(unlearning_loss, alpha=config.alpha, beta=config.beta),
        view,
        config,
        run,
    )
    note_what_stays(model, view.train, view.split, run)
    return model


def unlearning_loss(
    logits: Tensor, labels: Tensor, forgotten: Tensor, alpha: float, beta: float
) -> Tensor:
    """alpha CE of the rest and beta CCE of the split, averaged over the batch.

    (B, K), (B,), bool (B,) -> ().
    """
    # Each sample has one of the two losses, and the batch has one mean.
    learned = alpha * cross_entropy(logits, labels)
    return torch.where(forgotten, beta * cce(logits, labels), learned).mean()


if __name__ == "__main__":
    raise SystemExit(main(__file__))
