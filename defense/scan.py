"""SCAn: a label whose features fall into two groups, told by how features of trusted images vary.

Demon in the Variant: Statistical Analysis of DNNs for Robust Backdoor Contamination Detection, D.
Tang et al., USENIX Security 2021, https://arxiv.org/abs/1908.00686. A feature vector is the mean of
its class plus a variation with one covariance for all classes; both covariances are fitted to the
trusted images. Each label is cut in two, and J is how much likelier its images are then. A label is
infected if its J lies far above the median of all labels, in units of their median absolute
deviation; of its two groups, the one with fewer trusted images is flagged. Threshold: e, as in
backdoor-toolbox.

Assumes: the poisoned training set, the model trained on it and a few trusted images.

Departs: a tenth of the mean variance is added to the covariance within classes, because a few
images give none that has an inverse; the public codes take a pseudo-inverse, which is blind where
trusted images do not vary. The cut starts at the best one along the main direction, in place of a
random one. Only a J above the median counts; the public codes take its distance, so that a label
may be flagged because it is of one piece. backdoor-toolbox forgets the factor of the class means in
the test of one group, and counts the first trusted image as a training image. The suspicion is
ours, for the paper judges labels: twice the log ratio of an image's likelihoods in its label's two
groups.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from backdoorlab.cli import main
from backdoorlab.config import DefenseConfig
from backdoorlab.data import to_device
from backdoorlab.detection import Detection, by_label
from backdoorlab.errors import UserError
from backdoorlab.features import extract
from backdoorlab.groups.splitting import cholesky, clusters, main_directions, two_means, within
from backdoorlab.record import DefenderView
from backdoorlab.run import Run

ASSUMES = ("model", "train", "trusted")
STEPS = 100
"""Steps of the expectation-maximisation at the most."""
SETTLED = 1e-5
"""Relative change of both covariances at which it ends."""
SAME = 1.4826
"""Standard deviation of a normal distribution in units of its median absolute deviation."""


@dataclass(frozen=True, kw_only=True)
class Config(DefenseConfig):
    threshold: float = 2.718281828459045
    """Normalised J above which a label is infected; higher flags fewer labels."""

    RANGES: ClassVar[dict[str, str]] = {"threshold": "> 0"}


class Variation(NamedTuple):
    """How features vary, in a space that is measured from their mean over the trusted images."""

    origin: Tensor
    """float64 (D,): that mean."""
    between: Tensor
    """float64 (D, D): covariance of the classes' means."""
    root: Tensor
    """float64 (D, D): Cholesky factor of the covariance within classes."""


class Cut(NamedTuple):
    """A label's images in two groups."""

    j: float
    """How much likelier the images are in two groups than in one."""
    ratio: Tensor
    """float64 (n,): twice the log ratio of likelihoods, positive in the suspicious group."""


def detect(view: DefenderView, config: Config, run: Run) -> Detection:
    model = view.load_model()
    known = extract(model, to_device(view.trusted, run.device), run)
    features = extract(model, to_device(view.train, run.device), run)
    variation = fit(known.pooled.double(), known.labels, view.num_classes)
    suspicion = torch.zeros(len(features.labels), dtype=torch.float64, device=run.device)

    # Every label in two groups.
    found = {}
    for label, members in by_label(features.labels, view.num_classes):
        trusted = known.pooled[known.labels == label].double()
        found[label] = cut(features.pooled[members].double(), trusted, variation)
        suspicion[members] = found[label].ratio

    # A label that gains far more by it than most is infected.
    scores = far_above(torch.tensor([part.j for part in found.values()], dtype=torch.float64))
    infected = [
        label
        for label, score in zip(found, scores.tolist(), strict=True)
        if score > config.threshold
    ]
    said = ", ".join(f"{label} {score:.1f}" for label, score in zip(found, scores, strict=True))
    run.note(f"infected labels: {infected or 'none'}; the normalised J of each: {said}")
    judged = torch.isin(features.labels, torch.tensor(infected, device=run.device).long())
    return Detection(suspicion.float(), judged & (suspicion > 0))


def fit(x: Tensor, labels: Tensor, num_classes: int) -> Variation:
    """Fit x = mean of the class + variation, both normal, to trusted features.

    Args:
        x: float64 (N, D).
        labels: int64 (N,), their true labels.
        num_classes: K.
    """
    origin = x.mean(0)
    x = x - origin
    counts, means, _, scatter = within(x, labels, num_classes)
    if int(counts.max()) < 2:
        raise UserError(
            "scan learns from trusted images how those of one class vary, and no class has two of"
            f" them ({len(x)} trusted images): give more (--trusted_ratio, --trusted_count)"
        )
    share = (counts / counts.sum()).to(x.dtype)
    between, inside = means.T @ (share.unsqueeze(1) * means), scatter / len(x)

    for _ in range(STEPS):
        # E step: the classes' means, nearer to 0 where a class has few images.
        before = between, inside
        means = class_means(between, cholesky(inside), x, labels, counts)
        # M step: the covariances of the means and of what is left.
        centred = means - share @ means
        between = centred.T @ (share.unsqueeze(1) * centred)
        left = x - means[labels]
        inside = torch.cov(left.T, correction=0)
        now = between, inside
        if all((a - b).norm() <= SETTLED * b.norm() for a, b in zip(now, before, strict=True)):
            break
    return Variation(origin, between, cholesky(inside))


def class_means(between: Tensor, root: Tensor, x: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """Expect the mean of each class, given its images: float64 (K, D).

    Args:
        between, root: as in `Variation`.
        x: float64 (N, D), measured from the origin.
        labels: int64 (N,).
        counts: int64 (K,), images of each class.
    """
    sums = torch.zeros(len(counts), x.shape[1], dtype=x.dtype, device=x.device)
    sums = sums.index_add_(0, labels, x)
    # between (n between + inside)^-1 times the sum of n images. Where variation within a class is
    # 1 in every direction, and between classes is diagonal, it is a number for each direction.
    values, vectors = torch.linalg.eigh(whitened(root, whitened(root, between).T))
    values = values.clamp_min(0)
    along = whitened(root, sums.T).T @ vectors
    return along * values / (counts.unsqueeze(1) * values + 1) @ vectors.T @ root.T


def cut(x: Tensor, trusted: Tensor, variation: Variation) -> Cut:
    """Cut one label in two, and tell which group is the suspicious one.

    Args:
        x: float64 (n, D), features of its training images.
        trusted: float64 (m, D), features of its trusted images.
        variation: fitted to all trusted images.
    """
    # In units of the variation within a class, likelihoods are distances.
    origin, between, root = variation
    samples = x - origin
    count = torch.tensor([len(x)], device=x.device)
    alike = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    one = class_means(between, root, samples, alike, count)
    samples, one, trusted = (whitened(root, part.T).T for part in (samples, one, trusted - origin))
    centred = samples - samples.mean(0)
    line = (main_directions(centred.T, 1) @ centred.T).squeeze(0)
    upper = clusters(centred, two_means(line))
    if upper.all() or not upper.any():
        return Cut(0.0, torch.zeros_like(line))

    # J: what a group of its own brings to each image.
    means = torch.stack([samples[~upper].mean(0), samples[upper].mean(0)])
    away = squares(samples, means)
    j = (squares(samples, one).squeeze(1) - away.gather(1, upper.long()[:, None]).squeeze(1)).mean()

    # Trusted images are no poison; where they do not decide, the smaller group is suspicious.
    ratio = away[:, 0] - away[:, 1]
    known = squares(trusted, means)
    votes = int((known[:, 1] < known[:, 0]).sum()), int((known[:, 1] >= known[:, 0]).sum())
    sizes = int(upper.sum()), int((~upper).sum())
    return Cut(j.item(), ratio if (votes[0], sizes[0]) < (votes[1], sizes[1]) else -ratio)


def whitened(root: Tensor, columns: Tensor) -> Tensor:
    """Express columns (D, n) in units of a covariance, given its Cholesky factor (D, D)."""
    return torch.linalg.solve_triangular(root, columns, upper=False)


def squares(x: Tensor, means: Tensor) -> Tensor:
    """Squared distances (n, M) of samples (n, D) to means (M, D)."""
    return (x.unsqueeze(1) - means).square().sum(2)


def far_above(j: Tensor) -> Tensor:
    """Distance above the median in units of the median absolute deviation: float64 (K,) -> (K,).

    Of fewer than three values none is far from the others.
    """
    away = j - j.quantile(0.5)
    spread = SAME * away.abs().quantile(0.5)
    return away / spread.clamp_min(1e-12)


if __name__ == "__main__":
    raise SystemExit(main(__file__))
