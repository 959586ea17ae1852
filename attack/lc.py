"""LC: hard-to-learn target-class images with corner patches.

Label-Consistent Backdoor Attacks. A. Turner, D. Tsipras, A. Madry. 2019.
https://arxiv.org/abs/1912.02771

Kind: poisoning, clean-label. An untargeted PGD attack on a surrogate makes images of the target
class hard to recognise, and each gets a checkered patch in every corner. So the model learns the
patches. At test time the patches alone are the trigger. They mirror each other, so a flipped image
has them, too.

Departs from the authors' code: the surrogate is trained here in the ordinary way (there:
adversarial training), and PGD runs on the poisoned images only.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoorlab.cli import main
from backdoorlab.config import CleanLabelConfig
from backdoorlab.data import Dataset, to_bytes, to_float
from backdoorlab.errors import UserError
from backdoorlab.models import Classifier
from backdoorlab.perturb import frozen
from backdoorlab.poisoning import Outcome, static_attack, train_surrogate
from backdoorlab.run import Run

LIMITS = "digits: ASR 0 at eps 16/255 and at 0.4, because a zero is known by its shape"
CORNER = torch.tensor([[1, -1, -1], [-1, 1, -1], [1, -1, 1]])
"""Signs of the top left patch."""


@dataclass(frozen=True, kw_only=True)
class Config(CleanLabelConfig):
    eps: float = 16 / 255
    """Largest change of a value of a poisoned image, in [0, 1] units; higher makes the patches
    easier to learn and the images look stranger."""
    pgd_steps: int = 100
    """Steps of PGD; more make the images harder to recognise."""
    pgd_lr: float = 1.5 / 255
    """Size of a step of PGD in [0, 1] units; higher needs fewer steps and is coarser."""
    amplitude: float = 1.0
    """Strength of the patches, in (0, 1]; higher is easier to learn and to see. 1 paints black and
    white, 32/255 is the paper's faint version."""
    surrogate_epochs: int = 30
    """Epochs of the surrogate's training; more make the perturbations fit real models better."""

    RANGES: ClassVar[dict[str, str]] = {
        "eps": "[0, 1]",
        "pgd_steps": ">= 0",
        "pgd_lr": ">= 0",
        "amplitude": "(0, 1]",
        "surrogate_epochs": ">= 0",
    }


def corner(height: int, width: int) -> Tensor:
    """Return the signs of the top left patch on images of that size, 3x3 for 32 pixels."""
    patch = CORNER.repeat_interleave(max(1, round(height / 32)), 0).repeat_interleave(
        max(1, round(width / 32)), 1
    )
    if height < len(patch) or width < patch.shape[1]:
        raise UserError(
            f"the corner patches of {len(patch)}x{patch.shape[1]} pixels do not fit on"
            f" {height}x{width} images: use --image_size"
        )
    return patch


def corners(images: Tensor, config: Config) -> Tensor:
    """Add the patches in all corners and clip. uint8 (N, C, H, W) -> same."""
    height, width = images.shape[2:]
    patch = corner(height, width)
    signs, (down, right) = torch.zeros(height, width, dtype=torch.int), patch.shape
    # The patches on the right mirror those on the left, so that a flip changes nothing.
    signs[:down, :right] = signs[-down:, :right] = patch
    signs[:down, -right:] = signs[-down:, -right:] = patch.flip(1)
    # Added and clipped: at amplitude 1 each marked pixel is black or white.
    return (images + (255 * config.amplitude * signs).round().int()).clamp(0, 255).to(torch.uint8)


def stamp_class(images: Tensor, index: Tensor, split: str, config: Config, harden: Any) -> Tensor:
    """Add the patches; training images are made hard to recognise first.

    Args:
        images: uint8 (N, C, H, W).
        index: int64 (N,), positions in the split.
        split: "train" or "test".
        config: the options.
        harden: images, index -> images with the perturbation, uint8 (N, C, H, W).

    Returns:
        uint8 (N, C, H, W).
    """
    # Test images are not hardened: the patches alone are the trigger.
    return corners(harden(images, index) if split == "train" else images, config)


def attack(dataset: Dataset, config: Config, run: Run) -> Outcome:
    """Train a surrogate, perturb images against it, and train on the poisoned set."""
    corner(*dataset.image_shape[1:])  # raises for images that are too small, before any training
    surrogate = train_surrogate(dataset, config, run, config.surrogate_epochs)

    def harden(images: Tensor, index: Tensor) -> Tensor:
        labels = dataset.train.labels[index]
        # PGD is the costly part, so a resumed run reads its images back.
        made = run.cached(
            f"hardened-{int(index[0])}",
            lambda: {"images": hardened(surrogate, images, labels, config, run)},
        )
        return made["images"]

    return static_attack(dataset, config, run, partial(stamp_class, harden=harden))


def hardened(model: Classifier, images: Tensor, labels: Tensor, config: Config, run: Run) -> Tensor:
    """Make images hard to recognise: PGD away from the true label within an L-infinity ball.

    Args:
        model: the surrogate.
        images: uint8 (N, C, H, W); PGD starts from them.
        labels: int64 (N,), the true labels.
        config: radius, steps and step size.
        run: for device and precision.

    Returns:
        uint8 (N, C, H, W).
    """
    parts = []
    with frozen(model):
        for image, label in zip(images.split(250), labels.split(250), strict=True):
            clean, given = to_float(image).to(run.device), label.to(run.device)
            # PGD from the image itself, as published: no random start.
            x = clean
            for _ in range(config.pgd_steps):
                x = x.detach().requires_grad_(True)
                with run.autocast():
                    logits = model(x)
                (gradient,) = torch.autograd.grad(F.cross_entropy(logits.float(), given), x)
                # Up the loss of the true label, then back into the ball around the clean image.
                moved = x.detach() + config.pgd_lr * gradient.sign()
                x = moved.clamp(clean - config.eps, clean + config.eps).clamp(0, 1)
            parts.append(to_bytes(x.detach()).cpu())
    return torch.cat(parts)


if __name__ == "__main__":
    raise SystemExit(main(__file__))
