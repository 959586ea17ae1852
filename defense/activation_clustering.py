"""Activation Clustering: two clusters in each label, of which the smaller one is flagged.

Detecting Backdoor Attacks on Deep Neural Networks by Activation Clustering, B. Chen et al., SafeAI
2019, https://arxiv.org/abs/1811.03728. Ten dimensions as in the paper; the size rule is that of
backdoor-toolbox, where ART and BackdoorBench flag the smaller cluster of every label.

Assumes: the poisoned training set and the model trained on it.

Departs: PCA in place of ICA. 2-means starts at the best cut along the first direction, so that no
draw decides. The suspicion is ours, for the paper has none: how much nearer a sample is to the
centre of its label's smaller cluster, weighted with how well the label's clusters are apart.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from backdoorlab.cli import main
from backdoorlab.config import DefenseConfig
from backdoorlab.data import to_device
from backdoorlab.detection import Detection, by_label
from backdoorlab.features import extract
from backdoorlab.groups.splitting import clusters, main_directions, two_means
from backdoorlab.record import DefenderView
from backdoorlab.run import Run

ASSUMES = ("model", "train")


@dataclass(frozen=True, kw_only=True)
class Config(DefenseConfig):
    dimensions: int = 10
    """Directions of the largest variance in which a label is split; more keep more of the
    features, and more noise."""
    largest_share: float = 0.35
    """Share of a label up to which its smaller cluster is flagged; more also flag labels that fall
    into two halves by chance."""

    RANGES: ClassVar[dict[str, str]] = {"dimensions": ">= 1", "largest_share": "(0, 0.5]"}


def detect(view: DefenderView, config: Config, run: Run) -> Detection:
    features = extract(view.load_model(), to_device(view.train, run.device), run)
    suspicion = torch.zeros(len(features.labels), device=run.device)
    flagged = torch.zeros_like(suspicion, dtype=torch.bool)

    for _, members in by_label(features.labels, view.num_classes):
        # One label's features along their main directions, in two clusters.
        margin = cluster(features.pooled[members].double(), config.dimensions)
        # Ours: where the clusters lie far apart, their samples count for more.
        suspicion[members] = (margin * margin.abs().mean()).float()
        # backdoor-toolbox's size rule: two parts of about one size are no poison.
        if (margin > 0).double().mean() <= config.largest_share:
            flagged[members] = margin > 0
    return Detection(suspicion, flagged)


def cluster(x: Tensor, dimensions: int) -> Tensor:
    """Split one label's features (n, D) in two.

    Returns:
        float64 (n,) in [-1, 1]: positive in the smaller cluster, 1 at its centre.
    """
    centred = (x - x.mean(0)).T
    x = (main_directions(centred, min(dimensions, len(centred))) @ centred).T
    # The start is the best cut along the first direction, which draws nothing at random.
    small = clusters(x, two_means(x[:, 0]))
    if not small.any():
        return torch.zeros(len(x), dtype=x.dtype, device=x.device)
    near, far = ((x - x[part].mean(0)).norm(dim=1) for part in (small, ~small))
    margin = (far - near) / torch.maximum(far, near).clamp_min(1e-12)
    return margin if small.sum() * 2 <= len(x) else -margin


if __name__ == "__main__":
    raise SystemExit(main(__file__))
