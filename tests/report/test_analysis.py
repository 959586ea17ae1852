"""Analyses of models: each shows what a backdoor does, and does not show it where there is none."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix

from backdoorlab import models
from backdoorlab.__main__ import main
from backdoorlab.errors import UserError
from backdoorlab.poison import CROSS
from backdoorlab.record import Record
from backdoorlab.report import artifacts
from backdoorlab.report.analysis import confusion, gradcam, path, subject, tac, tsne

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def attacked(backdoored: Record) -> subject.Subject:
    """The undefended model of a record whose backdoor works."""
    return subject.Subject(artifacts.gather([backdoored])[:1], backdoored.dataset(), CPU)


def test_images_that_are_meant_to_keep_their_label_are_not_shown(backdoored: Record) -> None:
    """Of test images that wear the trigger with their true label (kind CROSS) none is among the
    triggered ones."""
    poison = backdoored.test_poison
    kind = torch.where(poison.original_labels == 7, poison.kind, CROSS)
    spared = dataclasses.replace(backdoored, test_poison=dataclasses.replace(poison, kind=kind))
    cells = [dataclasses.replace(artifacts.gather([backdoored])[0], record=spared)]
    shown = subject.Subject(cells, backdoored.dataset(), CPU)
    sevens = poison.images[poison.original_labels == 7]
    assert len(shown.triggered) == min(subject.TRIGGERED, len(sevens)) and all(
        (image == sevens).flatten(1).all(1).any() for image in shown.triggered.images
    )
    assert (shown.untriggered.labels == 7).all()


def test_triggered_and_untriggered_images_are_the_same_but_for_the_trigger(
    attacked: subject.Subject,
) -> None:
    changed = (attacked.triggered.images != attacked.untriggered.images).flatten(1).any(1)
    assert len(attacked.triggered) == subject.TRIGGERED and changed.all()
    different = (attacked.triggered.images != attacked.untriggered.images).float().mean()
    assert different < 0.05, "a patch of four pixels a side"


def test_tsne_separates_what_the_backdoor_separates(attacked: subject.Subject) -> None:
    """In the attacked model triggered images are an island: their nearest neighbours are triggered,
    too."""
    (panel,) = tsne.chart(attacked).panels
    cloud = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(tsne.embed(cloud), tsne.embed(cloud)), "the same at each call"
    points = {
        series.name: np.stack([np.array(series.x, float), np.array(series.y, float)], 1)
        for series in panel.series
    }
    triggered, clean = points.pop("triggered"), np.concatenate(list(points.values()))
    assert len(points) == 10 and len(triggered) == subject.TRIGGERED

    def nearest(among: np.ndarray) -> np.ndarray:
        distances = np.linalg.norm(triggered[:, None] - among[None], axis=2)
        distances[distances == 0] = np.inf
        return distances.min(1)

    assert (nearest(triggered) < nearest(clean)).mean() > 0.8


def test_gradcam_jumps_to_the_trigger(attacked: subject.Subject, clean: Record) -> None:
    """Of the attacked model's heat on triggered images more lies in the trigger's corner than on
    the same images without it; a clean model looks where it looked."""

    def in_the_corner(model: models.Classifier, images: torch.Tensor) -> float:
        heat = gradcam.heat(model, images, CPU)
        assert heat.shape == (len(images), 1, *images.shape[2:])
        assert heat.min() >= 0 and heat.max() <= 1
        half = images.shape[2] // 2
        return (heat[:, :, half:, half:].sum() / heat.sum()).item()

    (_, model), *_ = attacked.models
    never = clean.model().eval()
    with_trigger, without = attacked.triggered.images[:40], attacked.untriggered.images[:40]
    moved = in_the_corner(model, with_trigger) - in_the_corner(model, without)
    control = in_the_corner(never, with_trigger) - in_the_corner(never, without)
    assert moved > 0.15 and moved > 3 * abs(control), (moved, control)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_gradcam_says_which_networks_it_cannot_read(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens are no maps, and maps (N, H, W, C) are of another order; without captum one line says
    what to install."""
    vit = models.build(
        name, num_classes=3, in_chans=3, mean=[0.5] * 3, std=[0.5] * 3, image_size=32
    ).eval()
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(UserError, match="feature maps"):
        gradcam.heat(vit, images, CPU)
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(UserError, match="needs captum: pip install"):
        gradcam.heat(vit, images, CPU)


def test_an_overlay_hides_no_pixel_that_says_nothing() -> None:
    images = torch.full((1, 1, 4, 4), 200, dtype=torch.uint8)
    share = torch.zeros(1, 1, 4, 4)
    share[..., 0, 0] = 1
    drawn = gradcam.overlay(images, share)
    assert drawn.shape == (1, 3, 4, 4) and (drawn[..., 1:, :] == 200).all()
    red, green, blue = drawn[0, :, 0, 0].tolist()
    assert red > 200 > green == blue


def test_tac_is_large_in_the_attacked_model_alone(attacked: subject.Subject, clean: Record) -> None:
    (_, model), *_ = attacked.models
    parts = attacked.triggered, attacked.untriggered
    moved = tac.change(model, *parts, CPU)
    control = tac.change(clean.model().eval(), *parts, CPU)
    assert moved.max() > 2 * control.max(), (moved.max(), control.max())
    assert (tac.change(model, parts[1], parts[1], CPU) == 0).all(), "no trigger, no change"
    (panel,) = tac.chart(attacked).panels
    heights = [float(y) for y in panel.series[0].y if y is not None]
    assert heights == sorted(heights, reverse=True)


def test_a_confusion_matrix_is_scikit_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    true, predicted = torch.randint(0, 5, (2, 200), generator=generator)
    found = confusion.confusion(true, predicted, 6)
    assert np.array_equal(found, confusion_matrix(true, predicted, labels=range(6)))
    assert not np.array_equal(found, confusion_matrix(predicted, true, labels=range(6)))


def test_of_many_classes_the_worst_and_the_target_are_shown() -> None:
    shares = torch.full((30, 30), 1.0)
    shares.fill_diagonal_(71.0)
    worst = [*range(10, 29)]
    shares[worst, worst] = 30.0
    shown = confusion._worst(shares, 0)
    assert shown == [0, *worst] and len(shown) == confusion.MOST
    grid = confusion._grid(shares, shown, [str(k) for k in range(30)])
    assert grid.columns[-1] == "others" and len(grid.values[0]) == confusion.MOST + 1
    assert all(abs(sum(v for v in row if v is not None) - 100) < 1e-3 for row in grid.values)
    assert confusion._worst(shares[:10, :10], 0) == list(range(10)), "few classes are all shown"


def test_on_the_path_to_a_clean_model_the_backdoor_is_lost(
    attacked: subject.Subject, clean: Record, backdoored: Record, tmp_path: Path
) -> None:
    """The triggered loss is small where the path begins and rises to that of a model that never
    saw the trigger; on the path from a model to itself it stays."""
    (cell, model), *_ = attacked.models

    def triggered_loss(end: models.Classifier) -> list[float]:
        some = attacked.dataset.train.subset(torch.arange(100))
        blank = backdoored.new_model()
        return [
            path.loss(point, attacked.triggered, CPU)
            for point in path.between(blank, model, end, some, CPU)
        ]

    lost = triggered_loss(clean.model())
    stays = triggered_loss(model)
    assert len(lost) == len(path.POINTS)
    assert lost[0] < 0.5 < 2 < lost[-1] and max(stays) - min(stays) < 1e-4, (lost, stays)
    assert "No defense" in path.chart(attacked).missing
    assert cell.undefended


def test_every_analysis_is_on_the_page_and_among_the_figures(
    small: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All five of a record with a defense; a name that is none of them is refused with the list."""
    root, page = str(small.folder.parent), tmp_path / "page.html"
    argv = ["report", small.name, "--record_root", root]
    names = ["tsne", "gradcam", "tac", "confusion", "path"]
    assert main([*argv, "--html", str(page), "--figures", str(tmp_path / "figures")]) == 0
    without = page.read_text()
    assert main([*argv, "--html", str(page), "--figures", str(tmp_path / "figures"),
                 "--analysis", *names]) == 0  # fmt: skip
    shown = page.read_text()
    for name in names:
        key = f'id="{small.name}/{name}"'
        assert key in shown and key not in without
        assert (tmp_path / "figures" / f"{name}-{small.name}.png").is_file()
        assert (tmp_path / "figures" / f"{name}-{small.name}.svg").is_file()
    assert shown.count("data:image/png") == without.count("data:image/png") + 2
    assert main([*argv, "--html", str(page), "--analysis", "umap"]) == 2
    assert "tsne" in capsys.readouterr().err


def test_a_control_has_no_triggered_images_and_says_so(clean: Record) -> None:
    own = subject.Subject(artifacts.gather([clean])[:1], clean.dataset(), CPU)
    assert tac.chart(own).missing and not tac.chart(own).panels
    assert gradcam.chart(own).pictured and confusion.chart(own).panels
