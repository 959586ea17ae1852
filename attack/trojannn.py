"""TrojanNN: a stain that excites two neurons is the trigger.

Trojaning Attack on Neural Networks. Y. Liu, S. Ma, Y. Aafer, W.-C. Lee, J. Zhai, W. Wang, X. Zhang.
NDSS 2018. https://doi.org/10.14722/ndss.2018.23291

Kind: poisoning, dirty-label, all-to-one or all-to-all.

Three steps:
  1. Train a clean model and choose two neurons: the inputs of its last layer with the largest
     weights.
  2. Optimise the stain until these neurons have a high activation.
  3. Paste the stain into a share of the training images and train a *new* model on them. (The paper
     retrains the clean one.)

Departs from BackdoorBench's script: there the neurons come from random weights, because the trained
ones fail to load, and the stain is added in bytes that wrap around. Here the last layer is the
trained one, inputs are normalised, and the stain replaces pixels. `bb_compat` keeps the addition
that wraps around.
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

LIMITS = "digits: clean networks classify 33 to 43 % of them as the target: ASR says little"
GREY = 184
"""Grey level that the stain starts from."""


@dataclass(frozen=True, kw_only=True)
class Config(AttackConfig):
    neurons: int = 2
    """Number of neurons that the stain excites; more are harder to excite together."""
    target_activation: float = 100.0
    """Activation that the stain is optimised for; higher gives a stronger stain."""
    steps: int = 1000
    """Sign-gradient steps of the stain; more come closer to the target activation."""
    step_size: float = 0.01
    """Size of a step in [0, 1] units; higher needs fewer steps and is coarser. BackdoorBench's 0.1
    mostly jumps between the ends of the radius."""
    radius: float = 0.3
    """Largest change of the stain's values from grey, in [0, 1] units; higher is easier to learn
    and to see. 1 allows any colour."""
    surrogate_epochs: int | None = None
    """Epochs of the clean model's training; more make its neurons more meaningful. None: as many as
    --epochs."""
    bb_compat: bool = False
    """Add the stain to the image, with bytes that wrap around, as BackdoorBench does."""

    RANGES: ClassVar[dict[str, str]] = {
        "neurons": ">= 1",
        "steps": ">= 0",
        "step_size": "> 0",
        "radius": "[0, 1]",
        "surrogate_epochs": ">= 0",
    }


def paste(images: Tensor, index: Tensor, split: str, config: Config, stain: Tensor) -> Tensor:
    """Paste the stain into every image.

    Args:
        images: uint8 (N, C, H, W).
        index: not used; every image gets the same trigger.
        split: not used.
        config: the options.
        stain: uint8 (C, H, W), 0 outside of the ellipse.

    Returns:
        uint8 (N, C, H, W).
    """
    if config.bb_compat:
        # Sums of bytes above 255 wrap around.
        return images + stain
    return torch.where(ellipse(*images.shape[2:]), stain, images)


def attack(dataset: Dataset, config: Config, run: Run) -> Outcome:
    """Optimise a stain on a clean model, and train on the poisoned set."""
    # Step 1: a clean model.
    surrogate = train_surrogate(dataset, config, run, config.surrogate_epochs)
    # Step 2: a stain that excites two of its neurons.
    made = run.cached("stain", lambda: optimised_stain(surrogate, dataset.image_shape, config, run))
    # Step 3: a new model, where the paper retrains the clean one.
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
    """Minimise the mean squared distance of the neurons from the target activation.

    Args:
        model: the clean model.
        shape: (C, H, W) of the images.
        config: neurons, target and steps.
        run: for the device.

    Returns:
        "stain": the best one, uint8 (C, H, W), black outside of the ellipse; "activation_before"
        and "activation_after": mean activation of the neurons, scalars.
    """
    channels, height, width = shape
    inside = ellipse(height, width).to(run.device)

    # The inputs of the last layer with the largest sum of absolute weights.
    head: Any = model.get_classifier()
    weight = head.weight.detach()
    chosen = weight.abs().sum(0).topk(min(config.neurons, weight.shape[1])).indices

    # Signed gradient descent within the radius; the step with the smallest loss counts.
    start = inside * torch.full((1, channels, height, width), GREY / 255, device=run.device)
    stain = start.clone()
    activations, best = [], (float("inf"), stain, 0)
    with frozen(model):
        for step in range(config.steps + 1):
            stain.requires_grad_(True)
            # Activations of the neurons: what the last layer receives.
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
    """Return the area of the stain, bool (H, W): rows 16 to 29 and columns 18 to 28 of 32."""
    rows = (torch.arange(height) + 0.5) * 32 / height
    columns = (torch.arange(width) + 0.5) * 32 / width
    return ((rows[:, None] - 23) / 7).square() + ((columns - 23.5) / 5.5).square() <= 1


if __name__ == "__main__":
    raise SystemExit(main(__file__))
