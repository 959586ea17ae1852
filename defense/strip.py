"""STRIP: superpose other images on each training image, and flag those whose class stays.

STRIP: A Defence Against Trojan Attacks on Deep Neural Networks, Y. Gao et al., ACSAC 2019,
https://arxiv.org/abs/1902.06531. A trigger decides the class whatever else is in the image, so the
entropy of the answers on superpositions is low. The threshold is a quantile of the entropies of the
trusted images themselves; 100 superpositions as in backdoor-toolbox's cleanser.

Assumes: the poisoned training set, the model trained on it and a few trusted images.

Departs: images are added as they are, and clipped; backdoor-toolbox adds them after normalisation,
where a pixel can leave its range. By design it misses triggers that a superposition destroys, such
as a faint picture over the whole image.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from backdoorlab.cli import main
from backdoorlab.config import DefenseConfig
from backdoorlab.data import Split, in_order, to_device, to_float
from backdoorlab.detection import Detection
from backdoorlab.record import DefenderView
from backdoorlab.run import Run

ASSUMES = ("model", "train", "trusted")


@dataclass(frozen=True, kw_only=True)
class Config(DefenseConfig):
    overlays: int = 100
    """Trusted images that are superposed on each image; more give less noisy entropies, and cost
    as many forward passes. All of them, where there are fewer."""
    alpha: float = 1.0
    """Weight of the superposed image; higher hides more of the image below."""
    trusted_fpr: float = 0.05
    """Share of the trusted images with an entropy below the threshold, the false alarms to expect;
    higher flags more."""

    RANGES: ClassVar[dict[str, str]] = {
        "overlays": ">= 1",
        "alpha": "> 0",
        "trusted_fpr": "(0, 1)",
    }


def detect(view: DefenderView, config: Config, run: Run) -> Detection:
    model, trusted = view.load_model(), to_device(view.trusted, run.device)
    # The same overlays for all images, so that their entropies can be compared.
    order = torch.randperm(len(trusted), generator=run.generator)[: config.overlays]
    overlays = to_float(trusted.subset(order).images)

    # What clean images give says which entropy is low.
    known = entropies(model, trusted, overlays, config.alpha, run)
    found = entropies(model, to_device(view.train, run.device), overlays, config.alpha, run)
    threshold = known.quantile(config.trusted_fpr)
    run.note(
        f"entropy below {threshold:.3f} nats is flagged; trusted images have {known.mean():.3f}"
    )
    # Low entropy is suspicious: the trigger decides whatever else is in the image.
    return Detection(-found, found < threshold)


@torch.no_grad()
def entropies(model: nn.Module, split: Split, overlays: Tensor, alpha: float, run: Run) -> Tensor:
    """Average the entropy in nats of the answers on superpositions.

    Args:
        model: classifies images.
        split: N images.
        overlays: float (M, C, H, W) in [0, 1], superposed one after the other.
        alpha: their weight.

    Returns:
        float (N,).
    """
    model.eval()
    found = []
    for batch in in_order(split, run.device):
        total = torch.zeros(len(batch.images), device=run.device)
        for overlay in overlays:
            with run.autocast():
                logits = model((batch.images + alpha * overlay).clamp(0, 1))
            total += torch.special.entr(logits.float().softmax(1)).sum(1)
        found.append(total / len(overlays))
    return torch.cat(found)


if __name__ == "__main__":
    raise SystemExit(main(__file__))
