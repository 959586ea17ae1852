"""Groups of one label's samples: where their features lie, and how to split them in two."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

RIDGE = 0.1
"""Share of the mean variance that is added to a covariance, so that it has an inverse."""
OUTERMOST = 0.05
"""Share of a label from which a mixture starts."""
SETTLED = 1e-4
"""Change of a probability at which a mixture is fitted."""
STEPS = 100
"""Steps of 2-means at the most; it settles long before."""


class Whitened(NamedTuple):
    """The features of one label, in units of how the samples of all other labels vary."""

    label: int
    members: Tensor
    """int64 (n,): the label's samples, as positions in the whole set."""
    samples: Tensor
    """float64 (D, n): their features, from their own mean."""


def whiten(x: Tensor, labels: Tensor, num_classes: int) -> Iterator[Whitened]:
    """Express each label's features in units of how the *other* labels' samples vary.

    After the statistic of SCAn (Demon in the Variant, Tang et al., USENIX Security 2021): what
    people, poses and light do to an image is alike in all classes; what a trigger does is not.

    Args:
        x: (N, D) features.
        labels: int64 (N,), in 0 .. num_classes - 1.
        num_classes: K.

    Yields:
        what belongs to each label that has samples, unless it has all of them.
    """
    x = x.double()
    counts, _, centred, total = within(x, labels, num_classes)

    for label, count in enumerate(counts.tolist()):
        if count in (0, len(x)):
            continue
        # The within-class covariance of the other labels.
        members = (labels == label).nonzero().squeeze(1)
        part = centred[members]
        root = cholesky((total - part.T @ part) / (len(x) - count))

        samples = torch.linalg.solve_triangular(root, part.T, upper=False)
        yield Whitened(label, members, samples)


def within(x: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum up how samples (N, D) vary within their labels, int64 (N,).

    Returns:
        int64 (K,), samples of each label; (K, D), their means; (N, D), the samples from the mean of
        their own label; and (D, D), the scatter of these.
    """
    counts = torch.bincount(labels, minlength=num_classes)
    means = torch.zeros(num_classes, x.shape[1], dtype=x.dtype, device=x.device)
    means = means.index_add_(0, labels, x) / counts.clamp_min(1).unsqueeze(1)
    centred = x - means[labels]
    return counts, means, centred, centred.T @ centred


def cholesky(covariance: Tensor) -> Tensor:
    """Factor a covariance (D, D), with a tenth of its mean variance added to each."""
    ridge = RIDGE * covariance.diagonal().mean().clamp_min(1e-12)
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    return torch.linalg.cholesky(covariance + ridge * identity)


def main_directions(samples: Tensor, count: int) -> Tensor:
    """(count, D): the directions of length 1 in which whitened samples (D, n) vary most."""
    return torch.linalg.eigh(samples @ samples.T).eigenvectors[:, -count:].flip(1).T


def two_means(x: Tensor) -> Tensor:
    """bool (n,): the upper of the two groups of x (n,) with the least squared distance to their
    means. In one dimension the best cut is found exactly."""
    # The cut with the most variance between the groups, by sums over the ordered values.
    ordered = x.sort().values
    n = len(x)
    below = torch.arange(1, n, device=x.device)
    sums = ordered.cumsum(0)
    between = sums[:-1].square() / below + (sums[-1] - sums[:-1]).square() / (n - below)
    return x > ordered[between.argmax()]


def clusters(x: Tensor, part: Tensor) -> Tensor:
    """Move two clusters of samples (n, D) until each sample is nearest to its own (2-means).

    Args:
        x: the samples.
        part: bool (n,), the first cluster at the start, such as the best cut along a direction.

    Returns:
        bool (n,), the first cluster; none where the samples are a single one.
    """
    for _ in range(STEPS):
        # A cluster without a sample has no centre: then there is one cluster.
        if part.all() or not part.any():
            return torch.zeros_like(part)
        near, far = ((x - x[side].mean(0)).norm(dim=1) for side in (part, ~part))
        before, part = part, near < far
        if torch.equal(before, part):
            break
    return part


def mixture(samples: Tensor, x: Tensor, separation: float) -> list[Tensor]:
    """Fit a mixture of two normal distributions of one spread, from both ends of x.

    2-means cuts a label with a tenth of poison in the middle of its clean part; a mixture finds
    groups of any size. The line on which it lies is the one between its two means, which turns as
    they move.

    Args:
        samples: float64 (D, n), whitened.
        x: float64 (n,), the samples along one direction; a fit starts from the outermost twentieth.
        separation: distance of the means, in standard deviations, below which they are one group.

    Returns:
        for each group that was found, the probability (n,) that a sample belongs to it.
    """
    found = []
    for end in (x, -x):
        p = (end >= end.quantile(1 - OUTERMOST)).to(x.dtype)
        for _ in range(100):
            # M step: the share, the means along the line between them, and the common variance.
            p = p.clamp(1e-9, 1 - 1e-9)
            share, weights = p.mean(), torch.stack([p / p.sum(), (1 - p) / (1 - p).sum()])
            towards = samples @ (weights[0] - weights[1])
            along = towards @ samples / towards.norm()
            means = weights @ along
            square = (along - means[:, None]).square()
            variance = (p * square[0] + (1 - p) * square[1]).mean()

            # E step: the posterior probability of the first group.
            before = p
            p = (share.logit() + (square[1] - square[0]) / (2 * variance)).sigmoid()
            if (p - before).abs().max() < SETTLED:
                break

        group = p > 0.5
        if group.any() and not group.all() and means[0] - means[1] > separation * variance.sqrt():
            found.append(p)
    return found
