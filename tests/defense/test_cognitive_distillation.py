"""Cognitive Distillation: masks of a model of which is known what it looks at."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backdoorlab.data import Split
from backdoorlab.run import Run
from backdoorlab.settings import methods

CD: Any = methods.load("defense", "cognitive_distillation").module


class Looks(nn.Module):
    """Logits that depend on the image's first pixel where that is white, else on all rows."""

    def forward(self, x: Tensor) -> Tensor:
        corner = (x[:, 0, 0, :1] - 0.9).clamp_min(0) * 100
        rows = x[:, 0].mean(2) * 20
        return torch.cat([corner, (1 - corner / 10) * rows], 1)


def pictures(count: int = 12) -> tuple[Tensor, Tensor]:
    """uint8 (N, 1, 6, 6) of which the first half have a white first pixel, and bool (N,)."""
    drawn = torch.Generator().manual_seed(0)
    images = torch.randint(40, 200, (count, 1, 6, 6), dtype=torch.uint8, generator=drawn)
    marked = torch.arange(count) < count // 2
    images[marked, 0, 0, 0] = 255
    return images, marked


def run_in(folder: Path) -> Run:
    return Run(folder, seed=0, device=torch.device("cpu"))


def test_a_mask_keeps_what_decides_and_is_smaller_where_a_pixel_does(tmp_path: Path) -> None:
    images, marked = pictures()
    config = replace(CD.Config(), smooth_weight=0.0, size_weight=0.03)
    masks = CD.distilled(Looks(), images.float() / 255, config, run_in(tmp_path))
    assert masks[marked, 0, 0, 0].min() > 0.9, "the pixel that decides stays"
    sizes = masks.sum((1, 2, 3))
    assert sizes[marked].max() < sizes[~marked].min()
    # A control: where nothing asks for a small mask, it stays near the whole image.
    wide = replace(config, size_weight=0.0)
    sizes = CD.distilled(Looks(), images.float() / 255, wide, run_in(tmp_path)).sum((1, 2, 3))
    assert float(sizes[marked].mean()) > 18


def test_an_images_mask_does_not_depend_on_its_batch(tmp_path: Path) -> None:
    """But for the colours: here the model looks at no colour where the mask is 0."""
    images, _ = pictures()
    split = Split(images, torch.zeros(12, dtype=torch.int64))

    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0 * x.flatten(1)[:, :3]

    small, large = (
        CD.mask_sizes(Constant(), split, replace(CD.Config(), at_once=size), run_in(tmp_path))
        for size in (5, 12)
    )
    torch.testing.assert_close(small, large)
    assert float(large.max()) < 5, "nothing decides, so that nothing stays"


def test_total_variation_is_the_sum_of_squared_steps_over_pixels() -> None:
    mask = torch.tensor([[[[0.0, 1.0], [0.5, 0.5]]]])
    assert CD.total_variation(mask).tolist() == pytest.approx([(1 + 0 + 0.25 + 0.25) / 4])
    assert CD.total_variation(torch.ones(2, 1, 3, 3)).tolist() == [0.0, 0.0]
