"""NPD: neural polarizer.

Neural Polarizer: A Lightweight and Effective Backdoor Defense via Purifying Poisoned Features. M.
Zhu, S. Wei, H. Zha, B. Wu. NeurIPS 2023. https://arxiv.org/abs/2306.16697 . Written from a
description of BackdoorBench's code, whose constants it has: the paper itself was not read.

Assumes: the poisoned model, with a batch normalisation after a convolution, and a few trusted
images.

A polarizer lets light of one direction pass. Here it is a layer, a 1x1 convolution and a batch
normalisation in front of a late convolution, which is to let the features of the image pass and not
those of a trigger. It alone is trained; all else is frozen.
  1. Perturb trusted images, within a ball, towards the class that comes second: this stands for a
     trigger.
  2. Train the layer so that clean images keep their label (CE), and perturbed ones get the class
     that the poisoned model sees in the clean image (CE), and neither the likeliest wrong class nor
     the one they were perturbed to (-log(1 - p)).

The result is a network as it was: both parts of the layer are linear in evaluation mode, so they
are folded into the convolution behind them and into what that one's normalisation subtracts.

Departs: so that the fold is exact, the convolution's padding passes the layer, too. The layer
begins as the identity also in training mode, because its scale and bias are those of the trusted
images; so the published warm-up is left out. It is put before the last convolution whose output
enters a batch normalisation; the published code knows PreAct-ResNet18, where that is the same
place. Perturbations are taken with the running statistics, and perturbed images stay images. A
guard undoes epochs that destroy the model (backdoorlab/repair/guard.py).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.cli import main
from backdoorlab.config import DefenseConfig
from backdoorlab.data import to_device
from backdoorlab.losses import cce
from backdoorlab.perturb import frozen, project
from backdoorlab.record import DefenderView
from backdoorlab.repair.finetuning import augmented_batches
from backdoorlab.repair.guard import GuardConfig, guarded_epochs
from backdoorlab.repair.inserted_layer import fold, inserted, place
from backdoorlab.run import Run

ASSUMES = ("model", "trusted")


@dataclass(frozen=True, kw_only=True)
class Config(GuardConfig, DefenseConfig):
    epochs: int = 50
    """Passes over the trusted images. More filter more of the backdoor."""
    lr: float = 0.01
    """SGD's learning rate."""
    momentum: float = 0.9
    """SGD's momentum."""
    weight_decay: float = 5e-4
    """L2 penalty."""
    batch_size: int = 128
    """Images a step. Smaller batches take more steps."""
    radius: float = 3.0
    """Largest Euclidean length of a perturbation, in units of normalised images. More stands for
    stronger triggers, and costs clean accuracy."""
    perturb_steps: int = 2
    """Steps of the perturbation, at most."""
    perturb_lr: float = 0.1
    """Change of each pixel in a step, in units of normalised images."""
    fooled: float = 0.6
    """Share of a batch that is classified as the second class at which its perturbation ends."""
    own_weight: float = 0.4
    """Weight of the poisoned model's class on perturbed images."""
    wrong_weight: float = 0.4
    """Weight of the likeliest wrong class on them."""
    second_weight: float = 0.4
    """Weight of the class that they were perturbed to."""

    RANGES: ClassVar[dict[str, str]] = {
        "epochs": ">= 0",
        "lr": ">= 0",
        "momentum": ">= 0",
        "weight_decay": ">= 0",
        "batch_size": ">= 1",
        "radius": ">= 0",
        "perturb_steps": ">= 0",
        "perturb_lr": ">= 0",
        "fooled": "[0, 1]",
        "own_weight": ">= 0",
        "wrong_weight": ">= 0",
        "second_weight": ">= 0",
    }


def defend(view: DefenderView, config: Config, run: Run) -> nn.Module:
    model, poisoned = view.load_model(), view.load_model().eval()
    trusted = to_device(view.trusted, run.device)
    convolution, norm = place(model, torch.full((1, *view.image_shape), 0.5, device=run.device))

    with frozen(model), inserted(model, convolution, trusted, run) as network:
        optimizer = torch.optim.SGD(
            network.layer.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        for _ in guarded_epochs(
            run, "polarize", config.epochs, trusted, config, network, optimizer
        ):
            for batch in augmented_batches(trusted, view, config.batch_size, run):
                x, y = batch.images, batch.labels
                network.eval()
                seen, second = perturbed(network, model.std, x, config, run)
                with torch.no_grad(), run.autocast():
                    own = poisoned(x).argmax(1)

                # Batch statistics are the layer's alone, of clean and perturbed images together.
                network.layer.train()
                with run.autocast():
                    clean, fooled = network(torch.cat([x, seen])).float().chunk(2)
                wrong = fooled.detach().scatter(1, y[:, None], -torch.inf).argmax(1)
                loss = F.cross_entropy(clean, y) + (
                    config.own_weight * F.cross_entropy(fooled, own)
                    + config.wrong_weight * cce(fooled, wrong).mean()
                    + config.second_weight * cce(fooled, second).mean()
                )
                run.step(optimizer, loss)
    fold(network.layer, convolution, norm)
    return model


def perturbed(
    network: nn.Module, std: Tensor, x: Tensor, config: Config, run: Run
) -> tuple[Tensor, Tensor]:
    """Move images, (B, C, H, W), towards their second class; return them and that class, (B,)."""
    with torch.no_grad(), run.autocast():
        second = network(x).topk(2, 1).indices[:, 1]
    seen, delta = x, torch.zeros_like(x)
    for _ in range(config.perturb_steps):
        seen = seen.detach().requires_grad_()
        with run.autocast():
            logits = network(seen).float()
        if (logits.argmax(1) == second).float().mean() >= config.fooled:
            break
        (slope,) = torch.autograd.grad(F.cross_entropy(logits, second), seen)
        # delta is in units of normalised images, and so is the ball.
        delta = project(delta - config.perturb_lr * slope.sign(), "l2", config.radius)
        seen = (x + delta * std).clamp(0, 1)
    return seen.detach(), second


if __name__ == "__main__":
    raise SystemExit(main(__file__))
