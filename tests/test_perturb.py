"""Projections and steps against their definitions."""

import math

import pytest
import torch
from torch import nn

from backdoorlab.perturb import frozen, l2, project, same_reach, steepest

DRAWS = torch.Generator().manual_seed(0)
DELTA = torch.randn(5, 3, 4, 4, generator=DRAWS)


def test_projection_is_the_nearest_point_of_each_ball() -> None:
    inside = project(DELTA, "linf", 0.2)
    assert inside.abs().max() <= 0.2 and torch.equal(inside, DELTA.clamp(-0.2, 0.2))
    ball = project(DELTA, "l2", 2.0)
    assert torch.allclose(l2(ball), torch.full((5, 1, 1, 1), 2.0)), (
        "all were outside, all are on the surface"
    )
    nearest = (DELTA - ball).flatten(1).norm(dim=1)
    for _ in range(50):
        other = project(torch.randn(DELTA.shape, generator=DRAWS), "l2", 2.0)
        assert ((DELTA - other).flatten(1).norm(dim=1) >= nearest - 1e-5).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_what_is_inside_stays(norm: str) -> None:
    assert torch.equal(project(DELTA, norm, 1e3), DELTA)  # type: ignore[arg-type]
    assert torch.equal(project(DELTA, norm, math.inf), DELTA)  # type: ignore[arg-type]
    assert torch.equal(project(torch.zeros(2, 1, 3, 3), norm, 0.1), torch.zeros(2, 1, 3, 3))  # type: ignore[arg-type]


def test_the_steepest_step_has_size_one_and_beats_every_other() -> None:
    for norm, size in (
        ("linf", lambda d: d.flatten(1).abs().amax(1)),
        ("l2", lambda d: d.flatten(1).norm(dim=1)),
    ):
        step = steepest(DELTA, norm)  # type: ignore[arg-type]
        assert torch.allclose(size(step), torch.ones(5))
        best = (DELTA * step).flatten(1).sum(1)
        for _ in range(50):
            other = torch.randn(DELTA.shape, generator=DRAWS)
            other = other / size(other).view(-1, 1, 1, 1)
            assert ((DELTA * other).flatten(1).sum(1) <= best + 1e-5).all()
        assert not steepest(torch.zeros(2, 1, 3, 3), norm).any(), "no slope, no step"  # type: ignore[arg-type]


def test_the_l2_ball_of_the_same_reach_just_holds_the_cube() -> None:
    corner = torch.full((1, 3, 4, 4), 0.2)
    radius = same_reach(0.2, (3, 4, 4))
    assert torch.allclose(project(corner, "l2", radius), corner) and l2(
        corner
    ).item() == pytest.approx(radius)


def test_frozen_weights_get_no_gradient_and_are_trainable_again() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2))
    model[0].bias.requires_grad_(False)
    x = DELTA.clone().requires_grad_()
    with frozen(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
        model(x).sum().backward()
    assert x.grad is not None and all(parameter.grad is None for parameter in model.parameters())
    model(x).sum().backward()
    assert [parameter.grad is not None for parameter in model.parameters()] == [
        True,
        False,
        True,
        True,
    ], "what was off stays off"
