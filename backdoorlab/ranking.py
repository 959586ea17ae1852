"""How well a suspicion ranks the poison, whatever threshold a method flags by: AUROC, average
precision, and the TPR at a small FPR."""

import torch
from torch import Tensor

SMALL = {"tpr_at_fpr_1": 0.01, "tpr_at_fpr_5": 0.05}
"""Name of a score -> the largest share of clean images that may be flagged for it."""
RANKS = ("auroc", "average_precision", *SMALL)
"""The scores that `rank_quality` returns."""


def rank_quality(suspicion: Tensor, poisoned: Tensor) -> dict[str, float | None]:
    """Measure a ranking against the true poison.

    Args:
        suspicion: float (N,), higher is more suspicious.
        poisoned: bool (N,), the true poison.

    Returns:
        RANKS in [0, 1]; all None where there is no poison, or nothing else. `auroc` is the
        probability that a poisoned image is more suspicious than a clean one, where a tie counts
        half.
    """
    positives, negatives = int(poisoned.sum()), int((~poisoned).sum())
    if not positives or not negatives:
        return dict.fromkeys(RANKS)

    # Rates at each threshold, from (0, 0) on. Trapezoids count ties half.
    hits, alarms = _counts(suspicion.detach().cpu(), poisoned.cpu())
    tpr, fpr = hits / positives, alarms / negatives
    auroc = torch.trapezoid(tpr, fpr)

    # Each threshold's precision, weighted by the poison that it adds.
    precision = hits[1:] / (hits[1:] + alarms[1:])
    found = {"auroc": auroc, "average_precision": (tpr.diff() * precision).sum()}
    found |= {name: tpr[fpr <= most].max() for name, most in SMALL.items()}
    return {name: value.item() for name, value in found.items()}


def _counts(suspicion: Tensor, poisoned: Tensor) -> tuple[Tensor, Tensor]:
    """Count poisoned and clean images at or above each threshold: float64 (T + 1,) each, from 0
    on, where T is the number of different values."""
    order = suspicion.argsort(descending=True, stable=True)
    values, hit = suspicion[order], poisoned[order].double()

    # A threshold falls after the last of equal values.
    last = torch.cat([values[1:] != values[:-1], torch.ones(1, dtype=torch.bool)])
    start = torch.zeros(1, dtype=torch.float64)
    hits, alarms = hit.cumsum(0)[last], (1 - hit).cumsum(0)[last]
    return torch.cat([start, hits]), torch.cat([start, alarms])
