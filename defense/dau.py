"""DAU: backdoor defense via Decoupled Adversarial Unlearning.

Z. Zhu, Machine Intelligence Laboratory, Harbin Institute of Technology (Shenzhen), 2025. No paper
body is public: the losses, the split rule and the constants are those of the author's MindSpore
port, examples/community/DAU in https://github.com/mindspore-ai/mindarmour;
https://github.com/MiLab-HITSZ/DAU holds a README.

Assumes: the poisoned training set and the model trained on it. No clean image, no oracle. With
`--split` another method's split, or a file's, takes the place of steps 1 to 3.

  1. Pool: find a small set that is almost pure poison.
  2. Anti-learning: with the features fixed, the last layer learns all samples but unlearns the
     pool. The poison outside the pool shares its features and is unlearned with it.
  3. Split: a sample is poison if anti-learning took its label from it.
  4. Unlearning: from the poisoned model, learn the clean part and unlearn the poisoned part by CCE.
  5. Recovery (ours, off by default): learn the poisoned part with the labels that the unlearned
     model reads in it once the trigger's common shift is removed.

Departs from the port, with reasons and effects in docs/methods/dau.md:
  - The port draws its pool from the true poison. Ours is searched for (poison_search/pool.py).
  - Anti-learning runs on cached evaluation-mode features. The median of several heads decides,
    each with its own part of the pool, because one is noisy; their gradients are clipped, because
    at beta = 1000 they overshoot.
  - What anti-learning took is measured against the poisoned model's own probability, not by a fixed
    1 %, which hard clean samples fail from the start.
  - CCE is computed from logits, unclamped: clamped probabilities have no gradient exactly where the
    backdoor is intact. The ascent in `both` is bounded.
  - Guards return the model unchanged where no poison shows or the anti-learned head breaks down.
  - Unlearning crops and flips images as ordinary training does; `--augment False` is the port's.
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from backdoorlab.cli import main
from backdoorlab.config import SplitConfig
from backdoorlab.errors import UserError
from backdoorlab.losses import capped, cce, cross_entropy
from backdoorlab.poison_search.anti_learning import AntiLearningConfig, find_poison
from backdoorlab.record import DefenderView
from backdoorlab.repair.unlearning import (
    UnlearningConfig,
    labels_without_trigger,
    note_what_stays,
    train_on,
)
from backdoorlab.run import Run

ASSUMES = ("model", "train")


@dataclass(frozen=True, kw_only=True)
class Config(AntiLearningConfig, UnlearningConfig, SplitConfig):
    split: str = ""
    """What to unlearn in place of what DAU finds: METHOD, METHOD/RUN, FILE, oracle or none, as for
    unlearners (cce --help). Then nothing is searched for, and no head is trained."""
    subtask: Literal["all", "anti_learning", "unlearning", "test"] = "all"
    """anti_learning ends with the split, unlearning starts at it, test scores the saved model."""
    loss: Literal["cce", "both", "gga"] = "cce"
    """Unlearning loss: cce, gga (gradient ascent), or both = cce + tau gga."""
    alpha2: float = 1.0
    """alpha of unlearning: weight of the clean part."""
    beta2: float = 1.0
    """beta of unlearning: weight of the poisoned part."""
    tau: float = 0.2
    """tau: share of ascent in `both`."""
    ascent_cap: float | None = -math.log(0.0103)
    """Cross-entropy at which the ascent of `both` ends; None, as in the port, never ends it."""
    recovery_epochs: int = 0
    """Passes of recovery (ours): flagged samples are learned with the labels that the unlearned
    model reads in them. More restore the true labels of triggered images; 0 is as published."""

    RANGES: ClassVar[dict[str, str]] = {"recovery_epochs": ">= 0"}

    @property
    def only_scores(self) -> bool:
        return self.subtask == "test"

    def check(self) -> None:
        super().check()
        if self.split and self.subtask == "anti_learning":
            raise UserError(
                f"--split {self.split} takes the place of --subtask anti_learning: leave one of"
                " them out"
            )


def defend(view: DefenderView, config: Config, run: Run) -> nn.Module | None:
    # Steps 1 to 3, which --subtask anti_learning stops after, or a split that was given.
    if config.split:
        flagged, one_class = view.split, False
    else:
        found = run.cached("split", lambda: split(view, config, run))
        flagged, one_class = found["flagged"], bool(found["one_class"])
    if config.subtask == "anti_learning":
        return None
    if not flagged.any():
        return view.load_model()

    # Step 4, and step 5 where it is asked for.
    model = unlearn(view, flagged, config, run)
    note_what_stays(model, view.train, flagged, run)
    if config.recovery_epochs:
        model = recover(model, view, flagged, one_class, config, run)
    return model


def split(view: DefenderView, config: Config, run: Run) -> dict[str, Tensor]:
    """Run steps 1 to 3 for the cache."""
    if config.subtask == "unlearning":
        raise UserError(
            "--subtask unlearning starts from a split, and there is none yet: run --subtask"
            " anti_learning first"
        )
    flagged, one_class = find_poison(view, config, config.batch_size, run)
    return {"flagged": flagged, "one_class": torch.tensor(one_class)}


# --- 4. unlearning


def unlearn(view: DefenderView, flagged: Tensor, config: Config, run: Run) -> nn.Module:
    """Unlearn what is flagged, bool (N,), from the poisoned model."""
    index, model = torch.arange(len(flagged)), view.load_model()
    loss = partial(unlearning_loss, config=config)
    return train_on(
        "unlearn", config.epochs, model, view.train, index, flagged, loss, view, config, run
    )


def unlearning_loss(logits: Tensor, labels: Tensor, poisoned: Tensor, config: Config) -> Tensor:
    """alpha CE on the clean part plus beta times the unlearning loss on the poisoned part, averaged
    over the batch. (B, K), (B,), bool (B,) -> ()."""
    learned = cross_entropy(logits, labels)
    if config.loss == "gga":
        unlearned = -learned
    elif config.loss == "both":
        # Gradient ascent has no end of its own: it is bounded.
        unlearned = cce(logits, labels) - config.tau * capped(learned, config.ascent_cap)
    else:
        unlearned = cce(logits, labels)
    return torch.where(poisoned, config.beta2 * unlearned, config.alpha2 * learned).mean()


# --- 5. recovery


def recover(
    model: nn.Module, view: DefenderView, flagged: Tensor, one_class: bool, config: Config, run: Run
) -> nn.Module:
    """Go on from the unlearned model: learn flagged samples, bool (N,), with the labels that were
    read in them, and unlearn nothing."""

    def read() -> dict[str, Tensor]:
        return {"labels": labels_without_trigger(model, view.train, flagged, one_class, run)}

    labels = run.cached("labels", read)["labels"]

    # What still shows its own label is clean, or poison of the target class. Nobody can tell which,
    # so it teaches nothing.
    index = (~flagged | (labels != view.train.labels.cpu())).nonzero().squeeze(1)
    train, nothing = dataclasses.replace(view.train, labels=labels), torch.zeros_like(flagged)
    loss = partial(unlearning_loss, config=config)
    return train_on(
        "recover", config.recovery_epochs, model, train, index, nothing, loss, view, config, run
    )


if __name__ == "__main__":
    raise SystemExit(main(__file__))
