"""SCAn: its formulas against the densities that they come from, and a poisoned label."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from backdoorlab.errors import UserError
from backdoorlab.settings import methods

SCAN: Any = methods.load("defense", "scan").module
LABELS, SIDES = 7, 6


def spread() -> Tensor:
    """Square root of a covariance in which features are correlated."""
    drawn = torch.Generator().manual_seed(1)
    return torch.eye(SIDES).double() + 0.4 * torch.randn(SIDES, SIDES, generator=drawn).double()


def sampled(each: int, seed: int, moved: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Features of LABELS classes with one covariance; a third of class 2 is moved along a line.

    Returns float64 (N, D), int64 (N,), and bool (N,), what was moved.
    """
    drawn = torch.Generator().manual_seed(seed)
    means = 6 * torch.randn(LABELS, SIDES, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.arange(LABELS).repeat_interleave(each)
    noise = torch.randn(len(labels), SIDES, generator=drawn).double()
    poison = (labels == 2) & (torch.arange(len(labels)) % 3 == 0)
    noise[poison, 1] += moved
    return means[labels] + noise @ spread().T, labels, poison


def infection(moved: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The normalised J of each label, the suspicion of each image, the labels, and what was
    moved."""
    known, trusted_labels, _ = sampled(20, seed=5)
    x, labels, poison = sampled(90, seed=6, moved=moved)
    variation = SCAN.fit(known, trusted_labels, LABELS)
    cuts = [
        SCAN.cut(x[labels == label], known[trusted_labels == label], variation)
        for label in range(LABELS)
    ]
    scores = SCAN.far_above(torch.tensor([part.j for part in cuts], dtype=torch.float64))
    return scores, torch.cat([part.ratio for part in cuts]), labels, poison


def test_the_label_that_holds_two_groups_is_found_and_the_moved_group_in_it() -> None:
    scores, suspicion, labels, poison = infection(moved=9.0)
    assert (scores > 2.718281828459045).nonzero().squeeze(1).tolist() == [2]
    assert torch.equal((suspicion > 0) & (labels == 2), poison)
    assert suspicion[poison].min() > suspicion[~poison].max(), "the poison ranks first of all"

    # A control: of labels that are all of one piece, this one is no more than the others.
    scores, *_ = infection(moved=0.0)
    assert float(scores[2]) < 2.718281828459045


def test_the_expected_class_means_are_those_of_the_joint_density() -> None:
    """The images of a class are correlated by their common mean: m D numbers, one density."""
    x, labels, _ = sampled(3, seed=2)
    x = x - x.mean(0)
    between, inside = 4 * torch.eye(SIDES).double(), spread() @ spread().T
    counts = torch.bincount(labels, minlength=LABELS)
    found = SCAN.class_means(between, torch.linalg.cholesky(inside), x, labels, counts)

    ones, single = torch.ones(3, 3).double(), torch.eye(3).double()
    joint = torch.kron(ones, between) + torch.kron(single, inside)
    toward = torch.kron(torch.ones(1, 3).double(), between) @ torch.linalg.inv(joint)
    by_hand = torch.stack([toward @ x[labels == label].flatten() for label in range(LABELS)])
    torch.testing.assert_close(found, by_hand)


def test_j_and_the_suspicion_are_log_ratios_of_likelihoods() -> None:
    known, trusted_labels, _ = sampled(20, seed=5)
    x, labels, poison = sampled(30, seed=6, moved=9.0)
    variation = SCAN.fit(known, trusted_labels, LABELS)
    own, moved = x[labels == 2], poison[labels == 2]
    found = SCAN.cut(own, known[trusted_labels == 2], variation)

    def likely(mean: Tensor) -> Tensor:
        covariance = variation.root @ variation.root.T
        return MultivariateNormal(mean, covariance).log_prob(own)

    one = SCAN.class_means(
        variation.between,
        variation.root,
        own - variation.origin,
        torch.zeros(30, dtype=torch.int64),
        torch.tensor([30]),
    )[0]
    two = likely(own[moved].mean(0)), likely(own[~moved].mean(0))
    torch.testing.assert_close(found.ratio, 2 * (two[0] - two[1]))
    gained = torch.where(moved, *two) - likely(one + variation.origin)
    assert found.j == pytest.approx(2 * float(gained.mean()))


def test_the_group_with_fewer_trusted_images_is_the_suspicious_one() -> None:
    known, trusted_labels, _ = sampled(20, seed=5)
    x, labels, poison = sampled(30, seed=6, moved=9.0)
    variation = SCAN.fit(known, trusted_labels, LABELS)
    own, moved = x[labels == 2], poison[labels == 2]
    for trusted, suspicious in ((own[~moved], moved), (own[moved], ~moved), (own[:0], moved)):
        found = SCAN.cut(own, trusted, variation)
        assert torch.equal(found.ratio > 0, suspicious), "without any it is the smaller group"


def test_a_label_that_is_far_below_the_median_is_not_infected() -> None:
    """The public codes take the distance from the median, on either side."""
    scores = SCAN.far_above(torch.tensor([1.0, 1.1, 0.9, 1.2, 0.8, -7.0, 9.0]).double())
    assert scores.tolist() == pytest.approx(
        [value / (SCAN.SAME * 0.2) for value in (0, 0.1, -0.1, 0.2, -0.2, -8, 8)]
    )
    assert float(SCAN.far_above(torch.tensor([1.0, 5.0]).double()).max()) < 1, "two say nothing"


def test_trusted_images_that_show_no_variation_are_refused() -> None:
    x, labels, _ = sampled(1, seed=0)
    with pytest.raises(UserError, match="no class has two of them"):
        SCAN.fit(x, labels, LABELS)
