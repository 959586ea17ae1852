"""IBD-PSC: batch normalisation is scaled up, and images that stay certain are flagged.

IBD-PSC: Input-level Backdoor Detection via Parameter-oriented Scaling Consistency, L. Hou et al.,
ICML 2024, https://arxiv.org/abs/2405.09786. Scales and biases of the last k batch normalisations
are multiplied by 1.5. Clean images are then misclassified, poison is not. The first k is the
smallest with which the model errs on 60 % of the trusted images. The suspicion is the probability
of the class that the model itself gives, averaged over five models, k to k + 4.

Assumes: the poisoned training set, the model trained on it and a few trusted images.

Departs: all images count. The published evaluation keeps triggered images that the attack wins, and
clean ones that are classified correctly. Where no k makes the model err so often, the last five are
taken, and a note says so.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from backdoorlab.cli import main
from backdoorlab.config import DefenseConfig
from backdoorlab.data import Split, in_order, to_device
from backdoorlab.detection import Detection
from backdoorlab.record import DefenderView
from backdoorlab.repair.pruning import accuracy_on, batch_norms
from backdoorlab.run import Run

ASSUMES = ("model", "train", "trusted")


@dataclass(frozen=True, kw_only=True)
class Config(DefenseConfig):
    factor: float = 1.5
    """What scales and biases are multiplied by; higher needs fewer layers."""
    error: float = 0.6
    """Share of the trusted images that the first scaled model must misclassify; higher scales more
    layers."""
    models: int = 5
    """Scaled models that are averaged; more are less noisy."""
    threshold: float = 0.9
    """Suspicion above which an image is flagged; higher flags fewer."""

    RANGES: ClassVar[dict[str, str]] = {
        "factor": "> 1",
        "error": "(0, 1)",
        "models": ">= 1",
        "threshold": "(0, 1)",
    }


def detect(view: DefenderView, config: Config, run: Run) -> Detection:
    model, trusted = view.load_model(), to_device(view.trusted, run.device)
    layers = len(batch_norms(model))

    def error(count: int) -> float:
        return 1 - accuracy_on(scaled(model, count, config.factor), trusted, run)

    # k: the first model that errs often enough, and those after it.
    first = first_above(error, layers, config.error)
    if first is None:
        first = max(1, layers - config.models + 1)
        run.note(
            f"with all {layers} batch normalisations scaled, fewer than {config.error:.0%} of the"
            " trusted images are misclassified, so clean images may look like poison"
        )

    # From k on, as many models as are averaged, or as there are layers to scale.
    counts = range(first, min(first + config.models, layers + 1))
    chosen = [scaled(model, count, config.factor) for count in counts]
    suspicion = consistency(model, chosen, to_device(view.train, run.device), run)
    said = ", ".join(map(str, counts))
    run.note(f"models with the last {said} of {layers} batch normalisations scaled were averaged")
    return Detection(suspicion, suspicion > config.threshold)


def first_above(error: Callable[[int], float], most: int, least: float) -> int | None:
    """Return the smallest number in 1 .. most whose error is more than `least`, or None."""
    return next((count for count in range(1, most + 1) if error(count) > least), None)


@torch.no_grad()
def scaled(model: nn.Module, count: int, factor: float) -> nn.Module:
    """Copy a model, with scales and biases of its last `count` batch normalisations multiplied."""
    changed = copy.deepcopy(model).eval()
    for norm in list(batch_norms(changed).values())[-count:]:
        norm.weight.mul_(factor)
        norm.bias.mul_(factor)
    return changed


@torch.no_grad()
def consistency(model: nn.Module, scaled: list[nn.Module], split: Split, run: Run) -> Tensor:
    """PSC, float (N,) in [0, 1]: the scaled models' mean probability of the class that the model
    gives."""
    model.eval()
    found = []
    for batch in in_order(split, run.device):
        with run.autocast():
            own = model(batch.images).argmax(1, keepdim=True)
            answers = [one(batch.images).float().softmax(1).gather(1, own) for one in scaled]
        found.append(torch.cat(answers, 1).mean(1))
    return torch.cat(found)


if __name__ == "__main__":
    raise SystemExit(main(__file__))
