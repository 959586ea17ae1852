"""SPECTRE: far beyond a robust covariance.

SPECTRE: Defending Against Backdoor Attacks Using Robust Statistics, J. Hayase et al., ICML 2021,
https://arxiv.org/abs/2104.11315. A label's features are whitened by a covariance that leaves out
images of extreme fourth moments (I. Diakonikolas et al., ICML 2017,
https://arxiv.org/abs/1703.00893). What poison adds then stands out, and the QUE score weighs the
directions exponentially by how much (alpha 4). The number of dimensions is the one after whose cut
the mean QUE score of the label is largest. 1.5 times the poison rate is flagged, as in the paper.

Assumes: the poisoned training set and the model trained on it.

Departs: nobody knows the poison rate, so it is assumed to be a tenth of each label, whatever it is;
the published codes pass the true number. Only the label with the largest mean QUE score is flagged;
the authors are told the target label, backdoor-toolbox flags in every label. The mean is that of
the images that are kept, too. Each of ten rounds leaves out a tenth of what may be left out, in
place of a bound on tails: in the published code the share of images on the wrong side of it is
counted. A tenth of the mean variance is added to a covariance.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from backdoorlab.cli import main
from backdoorlab.config import DefenseConfig
from backdoorlab.data import to_device
from backdoorlab.detection import Detection, assumed_share, by_label, highest
from backdoorlab.features import extract
from backdoorlab.groups.splitting import cholesky, main_directions
from backdoorlab.record import DefenderView
from backdoorlab.run import Run

ASSUMES = ("model", "train")
ROUNDS = 10
"""Rounds in which images are left out."""
POWER_STEPS = 50
"""Steps of the power method for the direction of the largest fourth moment."""
SIZES = [size**2 for size in range(1, 11)]
"""Numbers of dimensions that are tried, 1 to 100, as the authors do."""


@dataclass(frozen=True, kw_only=True)
class Config(DefenseConfig):
    assumed_rate: float = 0.1
    """Share of each label that is taken to be poison. It is a guess: the true rate is unknown to a
    defender. More find more of the poison, and more clean images."""
    factor: float = 1.5
    """What is flagged, as a multiple of what is taken to be poison."""
    left_out: float = 2.0
    """Most that the robust covariance leaves out, as a multiple of what is taken to be poison; more
    survive more poison, and know less of the clean images."""
    alpha: float = 4.0
    """How much the QUE score prefers the direction of the largest variance; 0 weighs all alike."""

    RANGES: ClassVar[dict[str, str]] = {
        "assumed_rate": "(0, 0.5)",
        "factor": "> 0",
        "left_out": "[0, 2]",
        "alpha": ">= 0",
    }


class Scored(NamedTuple):
    """One label's QUE scores."""

    scores: Tensor
    """float64 (n,)."""
    mean: float
    """Mean QUE score in all dimensions, whitened by the images that are not flagged."""
    dimensions: int
    """How many were chosen."""


def detect(view: DefenderView, config: Config, run: Run) -> Detection:
    features = extract(view.load_model(), to_device(view.train, run.device), run)
    suspicion = torch.zeros(len(features.labels), device=run.device)
    flagged = torch.zeros_like(suspicion, dtype=torch.bool)

    found = {}
    for label, members in by_label(features.labels, view.num_classes):
        found[label] = scored(features.pooled[members].double(), config)
        suspicion[members] = found[label].scores.float()

    # The target is the label that stands out most.
    target = max(found, key=lambda label: found[label].mean, default=None)
    if target is not None:
        members = (features.labels == target).nonzero().squeeze(1)
        flagged[members] = highest(
            suspicion[members], assumed_share(config.assumed_rate, config.factor)
        )
        means = ", ".join(f"{label} {part.mean:.2f}" for label, part in found.items())
        run.note(
            f"label {target} is taken for the target, in {found[target].dimensions} dimensions;"
            f" mean QUE score of each: {means}"
        )
    return Detection(suspicion, flagged)


def scored(x: Tensor, config: Config) -> Scored:
    """Score one label's features (n, D), in the number of dimensions that stands out most."""
    # Along their main directions, so that the first k dimensions are those of a PCA.
    centred = (x - x.mean(0)).T
    most = min(len(centred), len(x) - 1, SIZES[-1])
    x = (main_directions(centred, most) @ centred).T

    best = Scored(torch.zeros(len(x), dtype=x.dtype, device=x.device), -math.inf, 0)
    for size in [size for size in SIZES if size <= most]:
        part = x[:, :size]
        kept = usual(part, config.assumed_rate, config.left_out)
        scores = que(white(part, kept), config.alpha)

        # What is not flagged whitens all dimensions, in which the cut is judged.
        rest = ~highest(scores, assumed_share(config.assumed_rate, config.factor))
        mean = que(white(x, rest), config.alpha).mean().item()
        if mean > best.mean:
            best = Scored(scores, mean, size)
    return best


def usual(x: Tensor, rate: float, left_out: float) -> Tensor:
    """Leave out images of extreme fourth moments.

    Args:
        x: float64 (n, k).
        rate: share of the images that is taken to be poison.
        left_out: most that is left out, as a multiple of the rate.

    Returns:
        bool (n,): the images that are kept.
    """
    kept = torch.ones(len(x), dtype=torch.bool, device=x.device)
    # The bound of the authors' code on the fourth moment of clean images.
    bound = 1 + 10 * rate * math.log(1 / rate) ** 2
    each = round(left_out * rate * len(x) / ROUNDS)

    for _ in range(ROUNDS if each else 0):
        y = white(x, kept)
        matrix, moment = fourth_moment(y[kept])
        if moment <= bound:
            break
        # Those whose energy along it lies farthest from the median.
        energy = ((y @ matrix) * y).sum(1)
        away = (energy - energy[kept].quantile(0.5)).abs().masked_fill(~kept, -1)
        kept[away.argsort(descending=True, stable=True)[:each]] = False
    return kept


def fourth_moment(y: Tensor) -> tuple[Tensor, float]:
    """Find the symmetric V of length 1 with the largest mean of (y' V y - tr V)^2.

    Args:
        y: float64 (n, k), whitened.

    Returns:
        V (k, k), and that mean, which is 2 for a normal distribution.
    """
    identity = torch.eye(y.shape[1], dtype=y.dtype, device=y.device)
    # The power method starts from the image that lies farthest out.
    far = y[y.square().sum(1).argmax()]
    matrix = torch.outer(far, far) / far.square().sum().clamp_min(1e-12)
    for _ in range(POWER_STEPS):
        excess = ((y @ matrix) * y).sum(1) - matrix.trace()
        moment = excess.square().mean().item()
        matrix = y.T @ (excess.unsqueeze(1) * y) / len(y) - excess.mean() * identity
        matrix = matrix / matrix.norm().clamp_min(1e-12)
    return matrix, moment


def white(x: Tensor, kept: Tensor) -> Tensor:
    """Express all samples (n, k) in units of the covariance of those kept, bool (n,), from their
    mean."""
    centred = x - x[kept].mean(0)
    root = cholesky(torch.cov(centred[kept].T, correction=0).reshape(x.shape[1], x.shape[1]))
    return torch.linalg.solve_triangular(root, centred.T, upper=False).T


def que(y: Tensor, alpha: float) -> Tensor:
    """QUE scores, float64 (n,), of whitened samples (n, k): x' M x / tr M with M = exp(alpha (S -
    I) / (|S| - 1)), where S is their covariance."""
    values, vectors = torch.linalg.eigh(
        torch.cov(y.T, correction=0).reshape(y.shape[1], y.shape[1])
    )
    # Where no direction has more variance than the whitening expects, all weigh alike.
    excess = values[-1] - 1
    if excess <= 1e-6:
        return y.square().mean(1)
    weights = (alpha * (values - values[-1]) / excess).exp()
    return (y @ vectors).square() @ (weights / weights.sum())


if __name__ == "__main__":
    raise SystemExit(main(__file__))
