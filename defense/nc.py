"""NC: Neural Cleanse.

Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks. B. Wang, Y. Yao, S.
Shan, H. Li, B. Viswanath, H. Zheng, B. Y. Zhao. S&P 2019. https://doi.org/10.1109/SP.2019.00031 .
Written from a description of the published code, whose constants it has; the search's passes and
fine-tuning are BackdoorBench's.

Assumes: the poisoned model and a few trusted images.

  1. For each class, find the smallest mask with which a pattern makes the model see that class
     (backdoorlab/repair/masked_triggers.py).
  2. A class whose mask is much smaller than those of other classes is the target of a backdoor: its
     MAD index, |size - median| / (1.4826 median |size - median|), is above 2.
  3. Fine-tune with the triggers of these classes on a fifth of the images, which keep their labels.
Where no class stands out the model is returned as it was.

Departs: a class whose trigger never works has the whole image for a mask, and is not flagged.
Triggers are used as they were found; BackdoorBench stretches them to [0, 1] and stores them as
images in between. A guard undoes epochs that destroy the model (backdoorlab/repair/guard.py).
masked_triggers.py says where the search departs.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from backdoorlab.cli import main
from backdoorlab.config import DefenseConfig
from backdoorlab.data import to_bytes, to_device
from backdoorlab.record import DefenderView
from backdoorlab.repair.finetuning import FinetuneConfig, finetune
from backdoorlab.repair.masked_triggers import SearchConfig, recover_masks, size
from backdoorlab.run import Run

ASSUMES = ("model", "trusted")


@dataclass(frozen=True, kw_only=True)
class Config(SearchConfig, FinetuneConfig, DefenseConfig):
    index: float = 2.0
    """MAD index above which a small mask is a backdoor's. Less flags more classes."""
    stamped: float = 0.2
    """Share of the images that are fine-tuned with a trigger. More unlearn it sooner."""

    RANGES: ClassVar[dict[str, str]] = {"index": ">= 0", "stamped": "[0, 1]"}


def defend(view: DefenderView, config: Config, run: Run) -> nn.Module:
    model, trusted = view.load_model().eval(), to_device(view.trusted, run.device)
    # Step 1: the smallest trigger of each class.
    masks, patterns = recover_masks(model, trusted, view.num_classes, config, run)
    shown = zip(masks.expand_as(patterns), patterns, masks * patterns, strict=True)
    run.picture("triggers", [to_bytes(torch.stack(row)) for row in shown])

    # Step 2: which masks are too small.
    sizes = size(masks)
    indices, flagged = outliers(sizes, config.index)
    found = zip(view.class_names, sizes, indices, strict=True)
    listed = ", ".join(f"{name} {pixels:.1f} ({index:.1f})" for name, pixels, index in found)
    run.note(f"pixels of the masks (MAD index): {listed}")
    if not flagged.any():
        run.note("no class has a mask that is too small: the model is returned as it was")
        return model
    names = ", ".join(view.class_names[label] for label in flagged.nonzero().flatten().tolist())
    run.note(f"classes with a mask that is too small: {names}")

    # Step 3: unlearn the triggers.
    def stamp(images: Tensor) -> Tensor:
        chosen = torch.rand(len(images), generator=run.generator) < config.stamped
        drawn = torch.randint(int(flagged.sum()), (len(images),), generator=run.generator)
        chosen, drawn = chosen.to(run.device).view(-1, 1, 1, 1), drawn.to(run.device)
        return torch.lerp(images, patterns[flagged][drawn], masks[flagged][drawn] * chosen)

    return finetune(model, trusted, view, config, run, change=stamp)


def outliers(sizes: Tensor, index: float) -> tuple[Tensor, Tensor]:
    """Compute the MAD index of each mask, (K,), and mark the small ones above `index`."""
    median = sizes.quantile(0.5)
    deviation = (sizes - median).abs()
    # Where more than half are of one size, the others are infinitely far away.
    indices = (deviation / (1.4826 * deviation.quantile(0.5))).nan_to_num(0, torch.inf)
    return indices, (sizes < median) & (indices > index)


if __name__ == "__main__":
    raise SystemExit(main(__file__))
