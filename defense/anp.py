"""ANP: Adversarial Neuron Pruning.

Adversarial Neuron Pruning Purifies Backdoored Deep Models. D. Wu, Y. Wang. NeurIPS 2021.
https://arxiv.org/abs/2110.14430 ; constants of the published code.

Assumes: the poisoned model, with batch normalisation, and a few trusted images.

Channels that carry a backdoor are sensitive: noise on their scale and bias makes the model answer
with the target class. Each channel gets a mask in [0, 1] on its scale. A step
  1. draws noise on scales and biases, and ascends the loss by it;
  2. descends the loss by the masks, without and with this noise.
Channels whose mask ends small are pruned: their scale becomes 0.

Departs: the threshold is the highest at which the trusted images lose no more than `tolerance`
(BackdoorBench takes the one of lowest ASR on the test images, the published code prints all of
them). Noise is clipped to its bound after the ascent, which the published code leaves out.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.cli import main
from backdoorlab.config import DefenseConfig
from backdoorlab.data import Batch, to_device
from backdoorlab.engine import random_batches
from backdoorlab.record import DefenderView
from backdoorlab.repair.pruning import Masks, masked, prune_by_masks
from backdoorlab.run import Run

ASSUMES = ("model", "trusted")


@dataclass(frozen=True, kw_only=True)
class Config(DefenseConfig):
    iterations: int = 2000
    """Steps of the masks. More bring more masks to 0 or 1."""
    batch_size: int = 128
    """Trusted images a step, drawn with replacement."""
    lr: float = 0.2
    """Learning rate of the masks."""
    momentum: float = 0.9
    """SGD's momentum."""
    eps: float = 0.4
    """Bound of the noise, as a share of a scale or bias. More noise prunes more channels."""
    noise_steps: int = 1
    """Steps of the ascent, each of length eps / noise_steps. More find worse noise and cost
    time."""
    alpha: float = 0.2
    """Weight of the loss without noise, in [0, 1]; less prunes more channels."""
    threshold_step: float = 0.05
    """Distance of the thresholds that are tried, from 0 up to 1."""
    tolerance: float = 0.05
    """Share of the accuracy on the trusted images that pruning may cost. More prunes more."""

    RANGES: ClassVar[dict[str, str]] = {
        "iterations": ">= 0",
        "batch_size": ">= 2",
        "lr": ">= 0",
        "momentum": ">= 0",
        "eps": ">= 0",
        "noise_steps": ">= 0",
        "alpha": "[0, 1]",
        "threshold_step": "(0, 1]",
        "tolerance": "[0, 1)",
    }


def defend(view: DefenderView, config: Config, run: Run) -> nn.Module:
    trusted = to_device(view.trusted, run.device)
    network = view.load_model().requires_grad_(False)
    masks = Masks(network)
    optimizer = torch.optim.SGD(masks.parameters(), lr=config.lr, momentum=config.momentum)

    # Batch statistics of the masked network move; the pruned model keeps those it came with.
    state: dict[str, Any] = dict(network=network, masks=masks, optimizer=optimizer)
    for batch in random_batches(
        trusted, config.iterations, config.batch_size, run, stage="masks", **state
    ):
        network.train()
        # Step 1: noise that raises the loss of this batch.
        noise = sensitive_noise(network, masks, batch, config, run)
        with run.autocast():
            # Step 2: masks under which the loss is low without the noise and with it.
            plain = masked(network, masks, batch.images).float()
            noisy = masked(network, masks, batch.images, *noise).float()

        # alpha L(m) + (1 - alpha) L(m + n).
        loss = config.alpha * F.cross_entropy(plain, batch.labels)
        loss = loss + (1 - config.alpha) * F.cross_entropy(noisy, batch.labels)
        run.step(optimizer, loss)
        masks.clip()

    # The masks belong to another copy; what is pruned is the model as it came.
    return prune_by_masks(
        view.load_model(), masks, config.threshold_step, config.tolerance, trusted, run
    )


def sensitive_noise(
    network: nn.Module, masks: Masks, batch: Batch, config: Config, run: Run
) -> tuple[list[Tensor], list[Tensor]]:
    """Find noise on scales and biases that raises the loss of a batch.

    Returns:
        noise on the scales and on the biases, within +- eps, one tensor (C,) for each batch
        normalisation.
    """
    sizes = [len(factor) for factor in masks.factors]
    drawn = torch.rand(2 * sum(sizes), generator=run.generator) * 2 - 1
    noise = list((config.eps * drawn).to(run.device).split([*sizes, *sizes]))

    for _ in range(config.noise_steps):
        here = [part.detach().requires_grad_() for part in noise]
        with run.autocast():
            logits = masked(network, masks, batch.images, *halves(here)).float()
        gradients = torch.autograd.grad(F.cross_entropy(logits, batch.labels), here)
        noise = ascended(here, gradients, config.eps / config.noise_steps, config.eps)
    return halves(noise)


def ascended(
    noise: list[Tensor], gradients: tuple[Tensor, ...], length: float, eps: float
) -> list[Tensor]:
    """Go a step along the gradients' signs, and back into [-eps, eps]."""
    pairs = zip(noise, gradients, strict=True)
    return [(part.detach() + length * gradient.sign()).clamp(-eps, eps) for part, gradient in pairs]


def halves(parts: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the first half of a list, and the second."""
    return parts[: len(parts) // 2], parts[len(parts) // 2 :]


if __name__ == "__main__":
    raise SystemExit(main(__file__))
