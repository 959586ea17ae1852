"""Beatrix: its matrices by a loop, and correlations that only poison has."""

from typing import Any

import pytest
import torch
from torch import Tensor

from backdoorlab.settings import methods

BEATRIX: Any = methods.load("defense", "beatrix").module


def maps(count: int, seed: int) -> Tensor:
    """Feature maps of six channels at 4 x 4 positions, positive and uncorrelated."""
    drawn = torch.Generator().manual_seed(seed)
    return torch.rand(count, 6, 4, 4, generator=drawn)


def test_the_entries_are_roots_of_sums_of_products_of_powers() -> None:
    x = maps(2, seed=0) * 30 - 10
    found = BEATRIX.gram(x, 3).view(2, 3, 21)
    for power in (1, 2, 3):
        pairs = [(i, j) for i in range(6) for j in range(i, 6)]
        for entry, (i, j) in enumerate(pairs):
            total = float((x[1, i].double() ** power * x[1, j].double() ** power).sum())
            by_hand = abs(total) ** (1 / power) * (1 if total >= 0 else -1)
            assert float(found[1, power - 1, entry]) == pytest.approx(by_hand, rel=1e-3, abs=1e-2)
    # Maps of any size are raised without overflow.
    assert BEATRIX.gram(1e4 * x, 8).isfinite().all()


def test_bounds_are_the_median_and_deviations_around_it() -> None:
    usual = torch.tensor([[1.0, -3.0], [2.0, -3.0], [3.0, -3.0], [4.0, -3.0], [9.0, -3.0]])
    bounds = BEATRIX.bounds_of(usual, 10.0)
    assert bounds.low.tolist() == [-7.0, -3.0] and bounds.high.tolist() == [13.0, -3.0]
    found = BEATRIX.deviation(torch.tensor([[13.0, -3.0], [26.0, -3.0], [5.0, -6.0]]), bounds)
    assert found.tolist() == pytest.approx([0.0, 13 / 13 / 2, 3 / 3 / 2])


def test_images_whose_channels_fire_together_lie_outside_of_the_trusted_images_bounds() -> None:
    usual, clean, poison = BEATRIX.gram(maps(30, 1), 8), maps(40, 2), maps(40, 3)
    # A trigger: two channels are high at one position, and each is no larger than it may be.
    poison[:, :2] *= 0.02
    poison[:, :2, 0, 0] = 0.99
    bounds = BEATRIX.bounds_of(usual, 3.0)
    good, bad = (BEATRIX.deviation(BEATRIX.gram(x, 8), bounds) for x in (clean, poison))
    threshold = BEATRIX.held_out(usual, 3.0).quantile(0.95)
    assert (bad > threshold).all() and bad.min() > good.max()
    assert float((good > threshold).double().mean()) < 0.2, "the control: clean images"
