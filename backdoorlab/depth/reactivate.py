"""Re-activation: does one small perturbation of all triggered images bring the backdoor back?

Breaking the False Sense of Security in Backdoor Defense through Re-Activation Attack. M. Zhu,
S. Liang, B. Wu. NeurIPS 2024. https://arxiv.org/abs/2405.16134 (white box, universal).

A perturbation within L-inf RADIUS is optimised on triggered training images, and measured on
triggered test images. Any network can be perturbed so to some degree. Two controls say how far: the
same optimisation without the trigger, and a clean model. Departs: STEPS steps along the gradient's
sign in place of some thousands along the gradient itself, so that a CPU needs seconds.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Split, batches
from ..models import paused
from .view import AttackerView, too_few

RADIUS = 0.05
"""Largest change of a pixel in [0, 1] units."""
STEPS, STEP = 50, 0.01
"""Steps of the optimisation, and the change of a pixel in each."""
IMAGES, BATCH_SIZE = 500, 64
"""Training images that it sees at most, and images per step."""
LEAST = 20
"""Poisoned images of other classes that it takes at least."""


def refusal(view: AttackerView) -> str | None:
    """Say why there are not images enough; None where there are."""
    # An image of the target class needs no perturbation, as in clean-label attacks.
    return too_few(len(_of_other_classes(view)), LEAST, " of other classes")


def reactivate(view: AttackerView, model: nn.Module) -> dict[str, Any]:
    """Measure the ASR under the best universal perturbation, with and without the trigger.

    Args:
        view: the attacker's side.
        model: the model under test, in evaluation mode.

    Returns:
        `asr`: share of perturbed triggered test images that are classified as the target;
        `asr_without_trigger`: the same of these images without the trigger, under a perturbation
        of their own; `robust_accuracy`: share of the former that are classified correctly.
    """
    chosen = _of_other_classes(view)
    order = torch.randperm(len(chosen), generator=view.generator("reactivate"))[:IMAGES]
    chosen = chosen[order]
    labels = view.poisoned.labels[chosen]

    # Twice the same, once on triggered images and once on the same images without the trigger.
    triggered = Split(view.poisoned.images[chosen], labels)
    plain = Split(view.dataset.train.images[view.poisoned.index[chosen]], labels)
    with_trigger = _perturbation(view, model, triggered)
    without = _perturbation(view, model, plain)

    # Measured on test images that no step has seen.
    answers = _answers(view, model, view.triggered.images, with_trigger)
    others = _answers(view, model, view.untriggered.images, without)
    return {
        "asr": _share(answers == view.target),
        "asr_without_trigger": _share(others == view.target),
        "robust_accuracy": _share(answers == view.triggered.original_labels),
    }


def excess(found: dict[str, Any], clean: dict[str, Any]) -> float:
    """Return by how much a model's ASR exceeds that of both controls.

    Args:
        found: what `reactivate` returns of the model.
        clean: the same of a clean model.
    """
    return found["asr"] - max(found["asr_without_trigger"], clean["asr"])


def _of_other_classes(view: AttackerView) -> Tensor:
    """Rows of the poisoned images whose true label is not the target, int64 (M,)."""
    return (view.poisoned.original_labels != view.poisoned.labels).nonzero().squeeze(1)


def _perturbation(view: AttackerView, model: nn.Module, split: Split) -> Tensor:
    """Optimise one perturbation of all images towards their labels. -> float (1, C, H, W)."""
    generator = view.generator("reactivate perturbation")
    shape = (1, *split.images.shape[1:])
    delta = ((2 * torch.rand(shape, generator=generator) - 1) * RADIUS).to(view.device)
    done = 0
    with paused():
        while done < STEPS:
            for batch in batches(split, BATCH_SIZE, device=view.device, generator=generator):
                if done == STEPS:
                    break
                delta = _stepped(model, batch.images, batch.labels, delta)
                done += 1
    return delta


def _stepped(model: nn.Module, images: Tensor, labels: Tensor, delta: Tensor) -> Tensor:
    """Take one step down the published loss, and stay within RADIUS."""
    delta = delta.detach().requires_grad_()
    logits = model((images + delta).clamp(0, 1))
    # The likeliest other class is pushed down besides.
    shares = logits.softmax(1)
    rival = shares.scatter(1, labels[:, None], 0).max(1).values
    loss = F.cross_entropy(logits, labels) - torch.log(1.0001 - rival).mean()
    (slope,) = torch.autograd.grad(loss, delta)
    return (delta.detach() - STEP * slope.sign()).clamp(-RADIUS, RADIUS)


def _answers(view: AttackerView, model: nn.Module, images: Tensor, delta: Tensor) -> Tensor:
    """Classify perturbed images. uint8 (N, C, H, W) -> int64 (N,)."""
    labels = torch.zeros(len(images), dtype=torch.int64)
    found = []
    with torch.inference_mode(), paused():
        for batch in batches(Split(images, labels), 250, device=view.device):
            found.append(model((batch.images + delta).clamp(0, 1)).argmax(1).cpu())
    return torch.cat(found)


def _share(hits: Tensor) -> float:
    return hits.double().mean().item()
