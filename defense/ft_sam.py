"""FT-SAM: sharpness-aware fine-tuning on the trusted images.

Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware Minimization. M. Zhu, S. Wei, L.
Shen, Y. Fan, B. Wu. ICCV 2023. https://arxiv.org/abs/2304.11823

Assumes: the poisoned model and a few trusted images.

Fine-tuning moves the weights of a backdoor little, for on clean images they have no gradient. A
step here takes the gradient where the loss is worst nearby, w + e, and applies it at w. e is
longer for large weights, which are the backdoor's: e = rho w^2 g / || |w| g ||, elementwise
(adaptive SAM).

Departs: the cosine of the learning rate falls once, over all epochs; BackdoorBench steps a cosine
of 100 epochs after each batch, so that it swings. Batch statistics are those of the first pass, as
there. A guard undoes epochs that destroy the model (backdoorlab/repair/guard.py).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.cli import main
from backdoorlab.config import DefenseConfig
from backdoorlab.data import Batch, to_device
from backdoorlab.engine import Forward
from backdoorlab.models import trained_weights
from backdoorlab.record import DefenderView
from backdoorlab.repair.finetuning import (
    FinetuneConfig,
    augmented_batches,
    make_cosine,
    make_forward,
    make_sgd,
)
from backdoorlab.repair.guard import guarded_epochs
from backdoorlab.run import Run

ASSUMES = ("model", "trusted")


@dataclass(frozen=True, kw_only=True)
class Config(FinetuneConfig, DefenseConfig):
    rho: float = 2.0
    """Length of the ascent, in units of the weights. More moves the weights further, removes more
    of the backdoor and costs clean accuracy. 0: fine-tuning."""
    label_smoothing: float = 0.1
    """Share of a label's weight that is spread over the other classes, at most that of a uniform
    distribution."""

    RANGES: ClassVar[dict[str, str]] = {"rho": ">= 0", "label_smoothing": "[0, 0.5]"}


def defend(view: DefenderView, config: Config, run: Run) -> nn.Module:
    model, trusted = view.load_model(), to_device(view.trusted, run.device)
    optimizer = make_sgd(model, config)
    schedule = make_cosine(optimizer, config.epochs)
    # Each step passes its images twice.
    forward = make_forward(model, trusted, config.batch_size, 2 * config.epochs, run)

    for _ in guarded_epochs(
        run, "finetune", config.epochs, trusted, config, model, optimizer, schedule
    ):
        model.train()
        for batch in augmented_batches(trusted, view, config.batch_size, run):
            sharpness_aware_step(model, optimizer, forward, batch, view.num_classes, config, run)
        schedule.step()
    return model


def sharpness_aware_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    forward: Forward,
    batch: Batch,
    classes: int,
    config: Config,
    run: Run,
) -> None:
    """Descend at w along the gradient at w + e.

    Args:
        model: w, in training mode.
        optimizer: of its trained weights, in their order.
        forward: passes images through the model.
        batch: trusted images.
        classes: K.
        config: rho and label smoothing.
        run: the context of the defense.
    """
    weights = trained_weights(model)

    def loss_here() -> Tensor:
        logits = forward(batch.images).float()
        smoothing = torch_smoothing(config.label_smoothing, classes)
        return F.cross_entropy(logits, batch.labels, label_smoothing=smoothing)

    # The first pass also moves the batch statistics.
    loss = loss_here()
    gradients = torch.autograd.grad(loss, weights, materialize_grads=True)
    # The gradient at w + e, with the batch statistics that the first pass left.
    with moved(weights, ascent(weights, gradients, config.rho)), still_statistics(model):
        gradients = torch.autograd.grad(loss_here(), weights, materialize_grads=True)
    # It is applied at w: the weights have come back.
    run.step(optimizer, loss, gradients)


def torch_smoothing(share: float, classes: int) -> float:
    """Return torch's label smoothing, which also spreads weight to the label itself, that leaves
    the label 1 - share."""
    return min(1.0, share * classes / (classes - 1))


@torch.no_grad()
def ascent(weights: Sequence[Tensor], gradients: Sequence[Tensor], rho: float) -> list[Tensor]:
    """Compute e = rho w^2 g / || |w| g ||, one tensor for each weight; 0 where all of it is 0."""
    pairs = list(zip(weights, gradients, strict=True))
    length = torch.stack([(weight * gradient).norm() for weight, gradient in pairs]).norm()
    factor = rho / length.clamp_min(1e-12)
    return [weight.square() * gradient * factor for weight, gradient in pairs]


@contextmanager
def moved(weights: Sequence[Tensor], by: Sequence[Tensor]) -> Iterator[None]:
    """Add to the weights inside. They come back exactly, from a copy."""
    before = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        torch._foreach_add_(list(weights), list(by))
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(list(weights), before)


@contextmanager
def still_statistics(model: nn.Module) -> Iterator[None]:
    """Put the running statistics of batch normalisation back at the end."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, kept in before:
            buffer.copy_(kept)


if __name__ == "__main__":
    raise SystemExit(main(__file__))
