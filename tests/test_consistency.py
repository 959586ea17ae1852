"""FCT: its loss and its metric by hand, and that pushing apart does what it says."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backdoorlab import consistency, models
from backdoorlab.data import Split
from backdoorlab.engine import Recipe
from backdoorlab.features import last_features
from backdoorlab.run import Run

CPU = torch.device("cpu")


def images(count: int, height: int = 8, width: int = 8) -> Split:
    drawn = torch.Generator().manual_seed(0)
    shape = (count, 1, height, width)
    return Split(
        torch.randint(0, 256, shape, dtype=torch.uint8, generator=drawn), torch.arange(count) % 3
    )


def network() -> models.Classifier:
    torch.manual_seed(0)
    return models.build(
        "preactresnet10", num_classes=3, in_chans=1, mean=[0.5], std=[0.5], width=2, image_size=8
    )


def test_alikeness_is_the_mean_cosine_of_the_labels_centres() -> None:
    features = torch.tensor([[3.0, 0.0], [1.0, 0.0], [0.0, 2.0], [-1.0, -1.0]])
    found = consistency.alikeness(features, torch.tensor([5, 5, 1, 2]))
    # Centres (2, 0), (0, 2) and (-1, -1): cosines 0, -1 / sqrt 2 and -1 / sqrt 2, each twice of 9.
    assert float(found) == pytest.approx(2 * (0 - 2 / math.sqrt(2)) / 9)
    assert float(consistency.alikeness(features, torch.zeros(4))) == 0, (
        "one label has nothing to leave"
    )


def test_pushing_apart_lowers_the_cosine_of_the_centres(tmp_path: Path) -> None:
    run, split, model = Run(tmp_path, seed=0, device=CPU), images(48), network()

    def alike() -> float:
        model.eval()
        with torch.no_grad():
            features = last_features(model, split.images.float() / 255)
        return float(consistency.alikeness(features, split.labels))

    before = alike()
    consistency.push_apart(model, split, Recipe(0, 16, 0.0, schedule_epochs=100), 2, run)
    assert abs(alike() - before) < 0.3, "a control: steps of length 0 move batch statistics alone"
    other = Run(tmp_path / "other", seed=0, device=CPU)
    (tmp_path / "other").mkdir()
    consistency.push_apart(model, split, Recipe(0, 16, 0.05, schedule_epochs=100), 8, other)
    assert alike() < before - 0.3


def test_a_turn_by_a_right_angle_and_a_move_are_those_of_torch() -> None:
    square = images(4).images.float()
    quarter = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]]).expand(4, 2, 3)
    still = torch.eye(2, 3).expand(4, 2, 3)
    assert torch.equal(
        consistency.moved(square, torch.stack([quarter, still])), square.rot90(1, (2, 3))
    )
    # A pixel to the right of eight is a quarter of the coordinates' length of 2.
    right = torch.tensor([[1.0, 0.0, -0.25], [0.0, 1.0, 0.0]]).expand(4, 2, 3)
    expected = F.pad(square, (1, 0))[..., :8]
    assert torch.equal(consistency.moved(square, torch.stack([still, right])), expected)


def test_moves_are_rotations_of_pixels_and_whole_pixels_within_the_share() -> None:
    height, width = 20, 30
    generator = torch.Generator().manual_seed(0)
    turns, moves = consistency.drawn_moves(500, (1, height, width), 0.2, generator)
    scale = torch.tensor([width / 2, height / 2])
    pixels = turns[:, :, :2] * scale[:, None] / scale
    torch.testing.assert_close(pixels @ pixels.mT, torch.eye(2).expand(500, 2, 2))
    assert torch.linalg.det(pixels).min() > 0.99, "no image is mirrored"
    assert turns[:, 0, 0].min() < -0.9 and turns[:, 0, 0].max() > 0.9, "any angle"

    shifts = moves[:, :, 2] * scale
    torch.testing.assert_close(shifts, shifts.round())
    assert shifts.abs().amax(0).tolist() == pytest.approx([6.0, 4.0])
    assert consistency.drawn_moves(9, (1, 8, 8), 0.0, generator)[1, :, :, 2].abs().max() == 0, (
        "a control"
    )


def test_the_metric_is_the_mean_squared_difference_of_the_last_features(tmp_path: Path) -> None:
    run, split, model = Run(tmp_path, seed=0, device=CPU), images(5), network()
    still = torch.eye(2, 3).expand(2, 5, 2, 3)
    assert consistency.sensitivity(model, split, still, run).tolist() == [0.0] * 5, (
        "an image moves nowhere"
    )

    half = -torch.eye(2, 3).expand(5, 2, 3)
    found = consistency.sensitivity(model, split, torch.stack([half, still[0]]), run)
    with torch.no_grad():
        here, there = (
            last_features(model, x.contiguous() / 255)
            for x in (split.images.float(), split.images.float().flip(2, 3))
        )
    torch.testing.assert_close(found, (here - there).square().mean(1))
    assert float(found.min()) > 0


class Sees(nn.Module):
    """Features: one pixel of the image, or its mean, which a turn does not change."""

    def __init__(self, corner: bool) -> None:
        super().__init__()
        self.corner = corner

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 0, :3, :3].mean((1, 2))[:, None] if self.corner else x.mean((1, 2, 3))[:, None]

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return x


def test_suspicion_is_high_where_features_hang_on_a_place(tmp_path: Path) -> None:
    """Eight images with a bright corner, and eight with a bright square around the centre."""
    images = torch.zeros(16, 1, 9, 9, dtype=torch.uint8)
    images[:8, 0, :3, :3] = 255
    images[8:, 0, 3:6, 3:6] = 255
    split = Split(images, torch.zeros(16).long())
    run = Run(tmp_path, seed=0, device=CPU)
    moves = consistency.drawn_moves(16, (1, 9, 9), 0.0, run.generator)
    corner: Any = Sees(True)
    found = consistency.sensitivity(corner, split, moves, run)
    assert float(found[:8].mean()) > 0.1 and float(found[8:].max()) == 0
    blind: Any = Sees(False)
    unmoved = consistency.sensitivity(blind, split, moves, run)
    assert float(unmoved[8:].max()) < 0.01 and float(unmoved[:8].mean()) < 0.1 * float(
        found[:8].mean()
    )
