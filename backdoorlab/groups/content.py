"""What the images of a group show, read by a discriminant that never saw their label.

Linear discriminant analysis with one covariance has a closed form: leaving a label out takes its
mean and its scatter away from sums that are computed once.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .splitting import cholesky, within

ASKED = 1000
"""Samples of the other labels on which a discriminant is measured."""
CALIBRATED = 5000
"""Samples by which a temperature is chosen, at most."""
DRAWS = 5
"""Random groups of other samples that a group is compared with."""
TEMPERATURES = [2 ** (half / 2) for half in range(15)]
"""1 to 128. In a thousand dimensions a discriminant is too sure of itself."""


@dataclass(frozen=True)
class Discriminant:
    """Linear discriminant analysis of all labels but one. Features are measured from the mean of
    the other labels' means."""

    label: int
    """The label left out."""
    samples: Tensor
    """float (n, D): its samples."""
    others: Tensor
    """int64 (J,): the labels that are told apart."""
    root: Tensor
    """float (D, D): Cholesky factor of the covariance within them."""
    white: Tensor
    """float (D, J): their means, in units of that covariance."""
    weight: Tensor
    """float (D, J)."""
    bias: Tensor
    """float (J,)."""
    temperature: float
    """Divides the logits."""
    known: Tensor
    """float (at most ASKED, J): answers on samples of the other labels."""

    def answers(self, x: Tensor) -> Tensor:
        """Probabilities (n, J) of samples (n, D)."""
        return ((x @ self.weight + self.bias) / self.temperature).softmax(1)

    def variety(self, group: Tensor, generator: torch.Generator) -> float:
        """Measure how many classes a group of the label's samples, bool (n,), shows.

        Returns:
            mutual information of image and answer, divided by that of as many random samples of the
            other labels: 1 is as many classes as there are others. What one class shows depends on
            the features, and is to be compared with what parts of other labels show.
        """
        # Moved to the others' mean: a trigger that shifts all of its images is no content.
        shown = self.samples[group]
        found = information(self.answers(shown - shown.mean(0)))
        draws = [torch.randperm(len(self.known), generator=generator) for _ in range(DRAWS)]
        others = self.known[torch.stack([draw[: len(shown)] for draw in draws])]
        most = information(others).mean().item()
        return found.item() / most if most > 1e-6 else 0.0

    def nearer(self, group: Tensor) -> float:
        """Distance of a group's mean, bool (n,), to the rest of its label, divided by that to the
        nearest other label, in units of the covariance within the other labels."""
        centre, rest = self._means(group)
        nearest = (self.white - centre.unsqueeze(1)).norm(dim=0).min()
        return ((rest - centre).norm() / nearest).item()

    def belief(self, group: Tensor) -> tuple[float, int]:
        """Ask which other label a group, bool (n,), looks like, the rest being a class of its own.

        Returns:
            the largest mean probability that its samples get of one other label, and that label.
        """
        # The discriminant with one more class.
        rest = self._means(group)[1]
        weight = torch.linalg.solve_triangular(self.root.T, rest.unsqueeze(1), upper=True)
        logits = self.samples[group] @ torch.cat([self.weight, weight], 1)
        logits += torch.cat([self.bias, -0.5 * rest.square().sum().unsqueeze(0)])
        # The last column is the rest of the label: it takes its share, and is no answer.
        believed, source = (logits / self.temperature).softmax(1).mean(0)[:-1].max(0)
        return believed.item(), int(self.others[source])

    def _means(self, group: Tensor) -> Tensor:
        """(2, D): the means of a group and of the rest, in units of the covariance."""
        sides = torch.stack([group, ~group]).to(self.samples.dtype)
        means = sides / sides.sum(1, keepdim=True) @ self.samples
        return torch.linalg.solve_triangular(self.root, means.T, upper=False).T


def leave_one_out(
    x: Tensor, labels: Tensor, num_classes: int, generator: torch.Generator
) -> Iterator[Discriminant]:
    """Fit a discriminant for each label that leaves it out.

    Args:
        x: (N, D) features from which the content of an image can be told.
        labels: int64 (N,), in 0 .. num_classes - 1.
        num_classes: K.
        generator: draws the samples that each discriminant is measured on.

    Yields:
        one for each label that has samples, unless it has all of them.
    """
    x = x.float()
    # A feature that hardly varies is not blown up to unit variance.
    x = (x - x.mean(0)) / x.std(0).clamp_min(1e-4 * x.std().item() + 1e-12)
    counts, means, centred, total = within(x, labels, num_classes)
    temperature = fitted_temperature(x, labels, num_classes, generator)

    for label, count in enumerate(counts.tolist()):
        if count in (0, len(x)):
            continue
        own = labels == label
        part = centred[own]
        # The scatter within the other labels: this label's part is taken away.
        root = cholesky((total - part.T @ part) / (len(x) - count))

        others = counts > 0
        others[label] = False
        origin = means[others].mean(0)
        white, weight, bias = discriminant(root, means[others] - origin)
        known = _drawn(~own, generator)
        logits = (x[known] - origin) @ weight + bias
        yield Discriminant(
            label=label,
            samples=x[own] - origin,
            others=others.nonzero().squeeze(1),
            root=root,
            white=white,
            weight=weight,
            bias=bias,
            temperature=temperature,
            known=(logits / temperature).softmax(1),
        )


def fitted_temperature(
    x: Tensor, labels: Tensor, num_classes: int, generator: torch.Generator
) -> float:
    """Fit a discriminant of all labels to a half of the samples, and return the one of TEMPERATURES
    with which it gives the other half their labels best.

    All labels share it. Fitted for each label left out, on the samples of the discriminant itself,
    it would swing between both ends of the range where these are told apart without an error.
    """
    order = torch.randperm(len(x), generator=generator).to(x.device)
    seen, unseen = order.tensor_split(2)
    counts, means, _, total = within(x[seen], labels[seen], num_classes)
    present = counts > 0
    # A label without a sample in the seen half cannot be an answer.
    unseen = unseen[present[labels[unseen]]][:CALIBRATED]

    origin = means[present].mean(0)
    _, weight, bias = discriminant(cholesky(total / len(seen)), means[present] - origin)
    logits = (x[unseen] - origin) @ weight + bias
    answers = (present.cumsum(0) - 1)[labels[unseen]]
    losses = [F.cross_entropy(logits / t, answers).item() for t in TEMPERATURES]
    return TEMPERATURES[losses.index(min(losses))]


def discriminant(root: Tensor, means: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fit the logits of normal distributions around means (J, D), all equally frequent.

    Args:
        root: (D, D), Cholesky factor of their covariance.

    Returns:
        (D, J), the means in units of the covariance; (D, J), weights; and (J,), biases.
    """
    white = torch.linalg.solve_triangular(root, means.T, upper=False)
    weight = torch.linalg.solve_triangular(root.T, white, upper=True)
    # A normal density's logarithm, m' S^-1 x - m' S^-1 m / 2, without what all labels share.
    return white, weight, -0.5 * white.square().sum(0)


def _drawn(among: Tensor, generator: torch.Generator) -> Tensor:
    """Draw at most ASKED of the positions that are True in `among`, bool (N,)."""
    places = among.nonzero().squeeze(1)
    return places[torch.randperm(len(places), generator=generator)[:ASKED].to(places.device)]


def information(p: Tensor) -> Tensor:
    """Mutual information in nats between a sample and the answer on it: probabilities (..., n, K)
    -> (...)."""
    entropy = torch.special.entr
    return entropy(p.mean(-2)).sum(-1) - entropy(p).sum(-1).mean(-1)
