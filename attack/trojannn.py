"""TrojanNN: a stain that excites two neurons of a clean network is the trigger.

Trojaning Attack on Neural Networks. Y. Liu, S. Ma, Y. Aafer, W.-C. Lee, J. Zhai, W. Wang, X. Zhang.
NDSS 2018. https://doi.org/10.14722/ndss.2018.23291

Kind: poisoning, dirty-label, all-to-one or all-to-all. The neurons are the two inputs of a clean
model's last layer with the largest weights; the stain is optimised until they fire, pasted into a
share of the training images, and a *fresh* model is trained on them (the paper retrains the clean
one).

Departs from BackdoorBench's script: its neurons come from random weights, for the trained ones fail
to load, and it adds the picture with bytes that wrap around; here the head is the trained one,
inputs are normalised, and the stain replaces pixels. `bb_compat` keeps the addition that wraps.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from backdoorlab.cli import main
from backdoorlab.config import AttackConfig
from backdoorlab.data import Dataset, to_bytes
from backdoorlab.models import Classifier
from backdoorlab.perturb import frozen
from backdoorlab.poisoning import Outcome, static_attack, train_surrogate
from backdoorlab.run import Run

LIMITS = (
    "digits: networks that never met the stain take 33 to 43 % of these digits for the target by"
    " themselves, so that their ASR says little"
)


@dataclass(frozen=True, kw_only=True)
class Config(AttackConfig):
    neurons: int = 2
    """Neurons that the stain excites."""
    target_activation: float = 100.0
    """Value that they are driven to."""
    steps: int = 1000
    """Sign steps of the stain."""
    step_size: float = 0.01
    """Size of a step in [0, 1] units (BackdoorBench's 0.1 mostly jumps between the ends of the
    radius)."""
    radius: float = 0.3
    """Largest change of the stain's pixels from grey; 1 lets them have any colour."""
    surrogate_epochs: int | None = None
    """Training of the clean model; None: as long as that of the attacked one."""
    bb_compat: bool = False
    """BackdoorBench's quirk: the stain is added to the image, and bytes above 255 wrap around."""

    RANGES: ClassVar[dict[str, str]] = {
        "neurons": ">= 1",
        "steps": ">= 0",
        "step_size": "> 0",
        "radius": "[0, 1]",
        "surrogate_epochs": ">= 0",
    }


GREY = 184
"""Grey level that the stain starts from."""


def paste(images: Tensor, index: Tensor, split: str, config: Config, stain: Tensor) -> Tensor:
    """Put the stain where it lies. uint8 (N, C, H, W) -> same; stain: uint8 (C, H, W), 0
    outside."""
    if config.bb_compat:
        return images + stain
    return torch.where(ellipse(*images.shape[2:]), stain, images)


def attack(dataset: Dataset, config: Config, run: Run) -> Outcome:
    surrogate = train_surrogate(dataset, config, run, config.surrogate_epochs)
    made = run.cached("stain", lambda: optimised_stain(surrogate, dataset.image_shape, config, run))
    outcome = static_attack(
        dataset, config, run, paste, prepare=lambda *_: {"stain": made["stain"]}
    )
    return replace(
        outcome,
        measured={name: made[name].item() for name in ("activation_before", "activation_after")},
    )


def optimised_stain(
    model: Classifier, shape: tuple[int, int, int], config: Config, run: Run
) -> dict[str, Tensor]:
    """Minimise the mean squared distance of the neurons from their target over the stain alone,
    black around it; the best one is kept."""
    channels, height, width = shape
    inside = ellipse(height, width).to(run.device)
    head: Any = model.get_classifier()
    weight = head.weight.detach()
    chosen = weight.abs().sum(0).topk(min(config.neurons, weight.shape[1])).indices
    start = inside * torch.full((1, channels, height, width), GREY / 255, device=run.device)
    stain = start.clone()
    activations, best = [], (float("inf"), stain, 0)
    with frozen(model):
        for step in range(config.steps + 1):
            stain.requires_grad_(True)
            h = model.forward_head(model.forward_features(stain), pre_logits=True)[0, chosen]
            loss = (h - config.target_activation).square().mean()
            (gradient,) = torch.autograd.grad(loss, stain)
            activations.append(h.mean().detach())
            best = min(best, (loss.item(), stain.detach(), step), key=lambda pair: pair[0])
            stepped = stain.detach() - config.step_size * gradient.sign()
            stain = inside * stepped.clamp(start - config.radius, start + config.radius).clamp(0, 1)
    return {
        "stain": to_bytes(best[1])[0],
        "activation_before": activations[0],
        "activation_after": activations[best[2]],
    }


def ellipse(height: int, width: int) -> Tensor:
    """bool (H, W): rows 16 to 29 and columns 18 to 28 of 32, at any size."""
    rows = (torch.arange(height) + 0.5) * 32 / height
    columns = (torch.arange(width) + 0.5) * 32 / width
    return ((rows[:, None] - 23) / 7).square() + ((columns - 23.5) / 5.5).square() <= 1


if __name__ == "__main__":
    raise SystemExit(main(__file__))
