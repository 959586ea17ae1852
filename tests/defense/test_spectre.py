"""SPECTRE: its formulas against dense matrices, and poison that only whitening shows."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from backdoorlab.ranking import rank_quality
from backdoorlab.settings import methods

SPECTRE: Any = methods.load("defense", "spectre").module
SPECTRAL: Any = methods.load("defense", "spectral").module


def label(shift: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """400 features of one label that vary most along the first of 20 dimensions; 32 are poison and
    moved along the last, in which the label varies little. float64 (n, D), bool (n,)."""
    drawn = torch.Generator().manual_seed(seed)
    scale = torch.linspace(8, 2, 20).double()
    x = torch.randn(400, 20, generator=drawn).double() * scale
    poison = torch.arange(400) % 400 < 32
    x[poison, -1] += shift
    return x, poison


def test_whitening_by_robust_statistics_shows_what_the_main_direction_does_not() -> None:
    x, poison = label(shift=20.0)
    found = SPECTRE.scored(x, SPECTRE.Config())
    robust = rank_quality(found.scores, poison)["auroc"]
    plain = rank_quality(SPECTRAL.outlyingness(x), poison)["auroc"]
    assert robust is not None and plain is not None
    assert robust > 0.95 and plain < 0.7, "the control is Spectral Signatures on the same features"
    # The images that the covariance leaves out are the poison, and few others.
    kept = SPECTRE.usual(x, 0.1, 2.0)
    assert not kept[poison].any() and int((~kept).sum()) <= 80
    # The label stands out: a clean one of the same variances does not.
    clean = SPECTRE.scored(label(shift=0.0)[0], SPECTRE.Config())
    assert found.mean > 1.5 * clean.mean


def test_que_scores_are_those_of_the_matrix_exponential() -> None:
    y = label(shift=30.0)[0][:, ::4] / 5
    covariance = torch.cov(y.T, correction=0)
    largest = torch.linalg.matrix_norm(covariance, 2)
    for alpha in (0.0, 4.0):
        weight = torch.linalg.matrix_exp(alpha * (covariance - torch.eye(5)) / (largest - 1))
        by_hand = ((y @ weight) * y).sum(1) / weight.trace()
        torch.testing.assert_close(SPECTRE.que(y, alpha), by_hand)


def test_the_fourth_moment_is_the_largest_eigenvalue_of_the_dense_tensor() -> None:
    y = SPECTRE.white(label(shift=30.0)[0][:, -4:], torch.ones(400, dtype=torch.bool))
    matrix, moment = SPECTRE.fourth_moment(y)
    columns = (y[:, :, None] * y[:, None, :] - torch.eye(4)).flatten(1)
    values, vectors = torch.linalg.eigh(columns.T @ columns / 400)
    assert moment == pytest.approx(float(values[-1]))
    assert abs(float(vectors[:, -1] @ matrix.flatten())) == pytest.approx(1.0, abs=1e-6)
    # A control: of a normal distribution it is 2, up to chance.
    drawn = torch.randn(20000, 4, generator=torch.Generator().manual_seed(0)).double()
    assert SPECTRE.fourth_moment(drawn)[1] == pytest.approx(2.0, rel=0.1)


def test_clean_images_are_hardly_left_out_and_never_more_than_allowed() -> None:
    clean, _ = label(shift=0.0)
    assert SPECTRE.usual(clean, 0.1, 2.0).all(), "their fourth moment is below the bound"
    poisoned, _ = label(shift=60.0)
    assert int((~SPECTRE.usual(poisoned, 0.1, 0.5)).sum()) == 20
    assert SPECTRE.usual(poisoned, 0.1, 0.0).all()


def test_labels_of_two_alike_images_have_scores() -> None:
    config = replace(SPECTRE.Config(), assumed_rate=0.3)
    assert SPECTRE.scored(torch.ones(2, 3).double(), config).scores.isfinite().all()
