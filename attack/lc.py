"""LC: label-consistent poisoning. Images of the target class are made hard to recognise, so that
their small corner patches are learnt.

Label-Consistent Backdoor Attacks. A. Turner, D. Tsipras, A. Madry. 2019.
https://arxiv.org/abs/1912.02771

Kind: poisoning, clean-label. Images of the target class are moved by an untargeted PGD attack on a
surrogate and get a checkered patch in each corner; at test time the patches alone are the trigger.
The patches mirror each other, so that flipped images still carry them.

Departs from the authors' code: the surrogate is an ordinary model trained here (theirs are trained
against adversaries), and PGD runs on the poisoned images only.
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

LIMITS = (
    "digits: ASR 0 at the published eps of 16/255 and at 0.4, because a zero is known by its shape"
)
CORNER = torch.tensor([[1, -1, -1], [-1, 1, -1], [1, -1, 1]])
"""Signs of the top left patch."""


@dataclass(frozen=True, kw_only=True)
class Config(CleanLabelConfig):
    eps: float = 16 / 255
    """Bound of the perturbation of poisoned images in [0, 1] units; higher makes the patches easier
    to learn and the images odder."""
    pgd_steps: int = 100
    """Steps of PGD."""
    pgd_lr: float = 1.5 / 255
    """Size of a step."""
    amplitude: float = 1.0
    """Strength of the patches: 1 paints black and white, 32/255 is the paper's faint version."""
    surrogate_epochs: int = 30
    """Training of the surrogate."""

    RANGES: ClassVar[dict[str, str]] = {
        "eps": "[0, 1]",
        "pgd_steps": ">= 0",
        "pgd_lr": ">= 0",
        "amplitude": "(0, 1]",
        "surrogate_epochs": ">= 0",
    }


def corner(height: int, width: int) -> Tensor:
    """Signs of the top left patch on images of that size, 3x3 on those of 32 pixels."""
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
    """Add the patches and clip. uint8 (N, C, H, W) -> same."""
    height, width = images.shape[2:]
    patch = corner(height, width)
    signs, (down, right) = torch.zeros(height, width, dtype=torch.int), patch.shape
    signs[:down, :right] = signs[-down:, :right] = patch
    signs[:down, -right:] = signs[-down:, -right:] = patch.flip(1)
    return (images + (255 * config.amplitude * signs).round().int()).clamp(0, 255).to(torch.uint8)


def stamp_class(images: Tensor, index: Tensor, split: str, config: Config, harden: Any) -> Tensor:
    """Training images are hardened first, test images get the patches alone. uint8 (N, C, H, W) ->
    same."""
    return corners(harden(images, index) if split == "train" else images, config)


def attack(dataset: Dataset, config: Config, run: Run) -> Outcome:
    corner(*dataset.image_shape[1:])  # refused before a surrogate is trained
    surrogate = train_surrogate(dataset, config, run, config.surrogate_epochs)

    def harden(images: Tensor, index: Tensor) -> Tensor:
        labels = dataset.train.labels[index]
        made = run.cached(
            f"hardened-{int(index[0])}",
            lambda: {"images": hardened(surrogate, images, labels, config, run)},
        )
        return made["images"]

    return static_attack(dataset, config, run, partial(stamp_class, harden=harden))


def hardened(model: Classifier, images: Tensor, labels: Tensor, config: Config, run: Run) -> Tensor:
    """PGD away from the true label within an L-infinity ball, from the image itself. uint8 (N, C,
    H, W) -> same."""
    parts = []
    with frozen(model):
        for image, label in zip(images.split(250), labels.split(250), strict=True):
            clean, given = to_float(image).to(run.device), label.to(run.device)
            x = clean
            for _ in range(config.pgd_steps):
                x = x.detach().requires_grad_(True)
                with run.autocast():
                    logits = model(x)
                (gradient,) = torch.autograd.grad(F.cross_entropy(logits.float(), given), x)
                moved = x.detach() + config.pgd_lr * gradient.sign()
                x = moved.clamp(clean - config.eps, clean + config.eps).clamp(0, 1)
            parts.append(to_bytes(x.detach()).cpu())
    return torch.cat(parts)


if __name__ == "__main__":
    raise SystemExit(main(__file__))
