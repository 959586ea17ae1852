"""Relearn: learn the split with labels that are read in it, without the trigger.

Ours: DAU's recovery (docs/methods/dau.md) from the poisoned model. Under batch statistics of the
split alone, the shift that all its images have in common, the trigger's, is removed; the model then
reads what they show. What still gets its own label teaches nothing.

Assumes: the poisoned model, its training set and a split of it (`--split`).

Departs from DAU's: nothing is unlearned before. Images of one class (clean-label poison) lose what
they show together with the trigger, and are read badly.
"""

import dataclasses
from dataclasses import dataclass

from torch import Tensor, nn

from backdoorlab.cli import main
from backdoorlab.config import SplitConfig
from backdoorlab.record import DefenderView
from backdoorlab.repair.unlearning import (
    UnlearningConfig,
    labels_without_trigger,
    plain_loss,
    train_on,
)
from backdoorlab.run import Run

ASSUMES = ("model", "train", "split")


@dataclass(frozen=True, kw_only=True)
class Config(UnlearningConfig, SplitConfig):
    lr: float = 0.01
    """Learning rate; higher forgets more, and costs accuracy."""


def defend(view: DefenderView, config: Config, run: Run) -> nn.Module:
    model, flagged = view.load_model(), view.split

    def read() -> dict[str, Tensor]:
        return {"labels": labels_without_trigger(model, view.train, flagged, False, run)}

    labels = run.cached("labels", read)["labels"]
    changed = labels != view.train.labels.cpu()
    run.note(f"another label was read in {int(changed.sum()):,} of {int(flagged.sum()):,} images")

    # What still shows its own label may be clean, or poison of the target class: it is left out.
    index = (~flagged | changed).nonzero().squeeze(1)
    train = dataclasses.replace(view.train, labels=labels)
    return train_on(
        "relearn",
        config.epochs,
        model,
        train,
        index,
        flagged,
        plain_loss,
        view,
        config,
        run,
    )


if __name__ == "__main__":
    raise SystemExit(main(__file__))
