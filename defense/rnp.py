"""RNP: Reconstructive Neuron Pruning.

Reconstructive Neuron Pruning for Backdoor Defense. Y. Li, X. Lyu, X. Ma, N. Koren, L. Lyu, B. Li,
Y.-G. Jiang. ICML 2023. https://arxiv.org/abs/2305.14876 ; constants of the published code.

Assumes: the poisoned model, with batch normalisation, and a few trusted images.

Channels that clean images do not need are found by two opposite steps:
  1. Unlearn the trusted images: ascend their loss by all weights until few are classified right.
     The backdoor is still there.
  2. Recover them on the unlearned model by a mask in [0, 1] on the scale of each channel. Masks of
     the backdoor's channels fall.
Channels of the poisoned model whose mask ends small are pruned: their scale becomes 0.

Departs: the threshold is the highest at which the trusted images lose no more than `tolerance`
(BackdoorBench takes the one of lowest ASR on the test images, the authors' table is read by eye).
Gradients of step 1 are clipped; the published code clips before it has any.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.cli import main
from backdoorlab.config import DefenseConfig
from backdoorlab.data import Split, batches, to_device
from backdoorlab.models import trained_weights
from backdoorlab.record import DefenderView
from backdoorlab.repair.pruning import Masks, masked, prune_by_masks
from backdoorlab.run import Run

ASSUMES = ("model", "trusted")


@dataclass(frozen=True, kw_only=True)
class Config(DefenseConfig):
    unlearn_epochs: int = 20
    """Passes of unlearning, at most."""
    unlearn_lr: float = 0.01
    """Learning rate of unlearning; a tenth of it in the second half."""
    unlearn_until: float = 0.2
    """Accuracy on the trusted images, in training mode, at which unlearning ends. Less unlearns
    more."""
    weight_decay: float = 5e-4
    """L2 penalty in unlearning."""
    clip: float = 20.0
    """Largest length of the gradient in unlearning."""
    recover_epochs: int = 20
    """Passes of the masks. More bring more masks down."""
    recover_lr: float = 0.2
    """Learning rate of the masks."""
    alpha: float = 0.2
    """Weight of the masks' loss."""
    momentum: float = 0.9
    """SGD's momentum in both."""
    batch_size: int = 128
    """Images a step. Smaller batches take more steps."""
    threshold_step: float = 0.05
    """Distance of the thresholds that are tried, from 0 up to 1."""
    tolerance: float = 0.05
    """Share of the accuracy on the trusted images that pruning may cost. More prunes more."""

    RANGES: ClassVar[dict[str, str]] = {
        "unlearn_epochs": ">= 0",
        "unlearn_lr": ">= 0",
        "unlearn_until": "[0, 1]",
        "weight_decay": ">= 0",
        "clip": "> 0",
        "recover_epochs": ">= 0",
        "recover_lr": ">= 0",
        "alpha": "> 0",
        "momentum": ">= 0",
        "batch_size": ">= 1",
        "threshold_step": "(0, 1]",
        "tolerance": "[0, 1)",
    }


def defend(view: DefenderView, config: Config, run: Run) -> nn.Module:
    trusted = to_device(view.trusted, run.device)
    network = view.load_model()
    masks = Masks(network)
    # Steps 1 and 2 spoil a copy, to find out which channels clean images need.
    unlearn(network, trusted, config, run)
    recover(network, masks, trusted, config, run)
    # What is pruned is the model as it came.
    return prune_by_masks(
        view.load_model(), masks, config.threshold_step, config.tolerance, trusted, run
    )


def unlearn(network: nn.Module, trusted: Split, config: Config, run: Run) -> None:
    """Ascend the loss of the trusted images, in place, until few are classified right."""
    weights = trained_weights(network)
    optimizer = torch.optim.SGD(
        weights, lr=config.unlearn_lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(
        optimizer, milestones=[max(1, config.unlearn_epochs // 2)]
    )
    state: dict[str, Any] = dict(network=network, optimizer=optimizer, schedule=schedule)
    for _ in run.epochs("unlearn", config.unlearn_epochs, **state):
        network.train()
        for batch in batches(
            trusted, config.batch_size, device=run.device, generator=run.generator
        ):
            with run.autocast():
                logits = network(batch.images).float()
            # Ascent on clean images: what is left of the network is the backdoor's.
            loss = -F.cross_entropy(logits, batch.labels)
            gradients = torch.autograd.grad(loss, weights, materialize_grads=True)
            run.step(optimizer, loss, clipped(gradients, config.clip))
            run.watch(right=(logits.argmax(1) == batch.labels).double().mean())
        schedule.step()

        # Beyond this point nothing would be left to recover from.
        if run.mean("right") <= config.unlearn_until:
            run.end_stage()


def recover(network: nn.Module, masks: Masks, trusted: Split, config: Config, run: Run) -> None:
    """Learn masks with which the unlearned network classifies the trusted images again."""
    network.requires_grad_(False)
    optimizer = torch.optim.SGD(masks.parameters(), lr=config.recover_lr, momentum=config.momentum)
    state: dict[str, Any] = dict(network=network, masks=masks, optimizer=optimizer)
    for _ in run.epochs("recover", config.recover_epochs, **state):
        network.train()
        for batch in batches(
            trusted, config.batch_size, device=run.device, generator=run.generator
        ):
            with run.autocast():
                logits = masked(network, masks, batch.images).float()
            run.step(optimizer, config.alpha * F.cross_entropy(logits, batch.labels))
            masks.clip()


def clipped(gradients: tuple[Tensor, ...], limit: float) -> list[Tensor]:
    """Shorten gradients together to a Euclidean length of at most `limit`."""
    length = torch.stack([gradient.norm() for gradient in gradients]).norm()
    factor = (limit / length.clamp_min(1e-12)).clamp_max(1)
    return [gradient * factor for gradient in gradients]


if __name__ == "__main__":
    raise SystemExit(main(__file__))
