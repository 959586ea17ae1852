"""Bad teacher: a random teacher for the split, the model itself for the rest.

Can Bad Teaching Induce Forgetting?, V. Chundawat et al., AAAI 2023,
https://arxiv.org/abs/2205.08096. The incompetent teacher is a new network with its first weights,
the competent one is the poisoned model; the loss is the KL divergence at temperature 1.

Assumes: the poisoned model, its training set and a split of it (`--split`).

Departs: SGD on all of the rest, at the budget that all unlearners here share; the paper takes a
part of the rest. The learning rate is that of fine-tuning in BackdoorBench, for the authors' code
was not read.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from backdoorlab.cli import main
from backdoorlab.config import SplitConfig
from backdoorlab.data import NO_AUGMENT, batches, to_device
from backdoorlab.losses import divergence
from backdoorlab.record import DefenderView
from backdoorlab.repair.unlearning import UnlearningConfig, descent, note_what_stays
from backdoorlab.run import Run

ASSUMES = ("model", "train", "split")


@dataclass(frozen=True, kw_only=True)
class Config(UnlearningConfig, SplitConfig):
    lr: float = 0.01
    """Learning rate; higher forgets more, and costs accuracy."""


def defend(view: DefenderView, config: Config, run: Run) -> nn.Module:
    model, train = view.load_model(), to_device(view.train, run.device)
    # The good teacher is the poisoned model, the bad one a network that has learned nothing.
    good, bad = view.load_model().eval(), view.new_model().eval()
    flagged = view.split.to(run.device)
    steps = config.epochs * math.ceil(len(train) / config.batch_size)
    optimizer, scheduler = descent(model, steps, config)

    for _ in run.epochs(
        "teach", config.epochs, model=model, bad=bad, optimizer=optimizer, scheduler=scheduler
    ):
        model.train()
        for batch in batches(
            train,
            config.batch_size,
            device=run.device,
            generator=run.generator,
            augment=view.augment if config.augment else NO_AUGMENT,
        ):
            with run.autocast():
                logits = model(batch.images).float()
                with torch.no_grad():
                    # The student follows the bad teacher on the split, the good one on the rest.
                    taught = torch.where(
                        flagged[batch.index, None], bad(batch.images), good(batch.images)
                    )
            run.step(optimizer, divergence(logits, taught.float()).mean())
            scheduler.step()
    note_what_stays(model, view.train, view.split, run)
    return model


if __name__ == "__main__":
    raise SystemExit(main(__file__))
