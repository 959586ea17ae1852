"""Cognitive Distillation: a small mask decides.

Distilling Cognitive Backdoor Patterns within an Image, H. Huang et al., ICLR 2023,
https://arxiv.org/abs/2301.10908. For each image a mask in [0, 1] is learned that keeps the logits
where the rest of the image is painted in one random colour, and that is small and smooth. A trigger
decides alone, so its mask is small. Images whose mask is smaller than that of nearly all trusted
images are flagged. Constants are those of the authors' code (total variation counts 10 in their
README).

Assumes: the poisoned training set, the model trained on it and a few trusted images.

Departs: the threshold is a quantile of the trusted images' masks; how the paper chooses its own was
not read. The losses of a batch are summed, not averaged, so that no image's step depends on how
many there are.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from backdoorlab.cli import main
from backdoorlab.config import DefenseConfig
from backdoorlab.data import Split, batches, to_device
from backdoorlab.detection import Detection
from backdoorlab.perturb import frozen
from backdoorlab.record import DefenderView
from backdoorlab.run import Run

ASSUMES = ("model", "train", "trusted")


@dataclass(frozen=True, kw_only=True)
class Config(DefenseConfig):
    steps: int = 100
    """Steps of a mask; more find smaller masks, and cost as many passes of every image."""
    lr: float = 0.1
    """Learning rate of Adam on the masks; higher moves them faster."""
    size_weight: float = 0.01
    """Weight of a mask's sum; higher gives smaller masks, which change the answer more."""
    smooth_weight: float = 1.0
    """Weight of a mask's total variation; higher gives smoother masks."""
    trusted_fpr: float = 0.05
    """Share of the trusted images with a mask below the threshold, the false alarms to expect;
    higher flags more."""
    at_once: int = 256
    """Masks that are learned at once; more are faster and take more memory, and change nothing
    else but the colours that are drawn."""

    RANGES: ClassVar[dict[str, str]] = {
        "steps": ">= 1",
        "lr": "> 0",
        "size_weight": ">= 0",
        "smooth_weight": ">= 0",
        "trusted_fpr": "(0, 1)",
        "at_once": ">= 1",
    }


def detect(view: DefenderView, config: Config, run: Run) -> Detection:
    model = view.load_model()

    def measured(split: Split) -> dict[str, Tensor]:
        return {"sizes": mask_sizes(model, split, config, run)}

    # Read back if the run was killed on its long way.
    known = run.cached("trusted", partial(measured, view.trusted))["sizes"]
    found = run.cached("train", partial(measured, view.train))["sizes"]
    threshold = known.quantile(config.trusted_fpr)
    run.note(
        f"masks smaller than {threshold:.1f} pixels are flagged; those of trusted images have"
        f" {known.mean():.1f}"
    )
    # A small mask is suspicious: a small part decides.
    return Detection(-found, found < threshold)


def mask_sizes(model: nn.Module, split: Split, config: Config, run: Run) -> Tensor:
    """Learn a mask for each image: its sum in pixels, float (N,)."""
    model.eval()
    split = to_device(split, run.device)
    with frozen(model):
        return torch.cat(
            [
                distilled(model, batch.images, config, run).sum((1, 2, 3))
                for batch in batches(split, config.at_once, device=run.device)
            ]
        )


def distilled(model: nn.Module, images: Tensor, config: Config, run: Run) -> Tensor:
    """Learn the masks of a batch: (B, C, H, W) in [0, 1] -> (B, 1, H, W) in (0, 1)."""
    with run.autocast():
        answers = model(images).detach().float()
    # tanh keeps a mask in its range; it starts near the whole image.
    free = torch.ones_like(images[:, :1]).requires_grad_()
    optimizer = torch.optim.Adam([free], lr=config.lr, betas=(0.1, 0.1))

    for _ in range(config.steps):
        mask = (free.tanh() + 1) / 2
        # Another colour at each step, so that no colour stands for the rest.
        drawn = torch.rand(len(images), images.shape[1], 1, 1, generator=run.generator)
        with run.autocast():
            painted = model(images * mask + (1 - mask) * drawn.to(images.device))
        loss = (painted.float() - answers).abs().mean(1)
        loss = loss + config.size_weight * mask.sum((1, 2, 3))
        loss = loss + config.smooth_weight * total_variation(mask)
        optimizer.zero_grad(set_to_none=True)
        loss.sum().backward()
        optimizer.step()
    return (free.detach().tanh() + 1) / 2


def total_variation(mask: Tensor) -> Tensor:
    """Squared differences of neighbouring pixels, summed and divided by the number of pixels:
    (B, 1, H, W) -> (B,)."""
    down, across = mask.diff(dim=2), mask.diff(dim=3)
    pixels = mask[0].numel()
    return (down.square().sum((1, 2, 3)) + across.square().sum((1, 2, 3))) / pixels


if __name__ == "__main__":
    raise SystemExit(main(__file__))
