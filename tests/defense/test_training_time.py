"""ABL and D-BR: what is isolated, how an ascent ends, and the metric of D-BR."""

import math
import shutil
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from torch import nn

from backdoorlab import consistency
from backdoorlab.data import Split
from backdoorlab.errors import UserError
from backdoorlab.losses import cross_entropy
from backdoorlab.record import Record
from backdoorlab.run import Run
from backdoorlab.settings import methods
from backdoorlab.storage import reading

METHOD: dict[str, Any] = {name: methods.load("defense", name).module for name in ("abl", "dbr")}


def new_run(folder: Path) -> Run:
    return Run(folder, seed=0, device=torch.device("cpu"))


def normed() -> nn.Sequential:
    """A small classifier of 1 x 4 x 4 images with batch normalisation."""
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 3))


def few() -> Split:
    drawn = torch.Generator().manual_seed(0)
    return Split(
        torch.randint(256, (12, 1, 4, 4), generator=drawn, dtype=torch.uint8),
        torch.randint(3, (12,), generator=drawn),
    )


# --- ABL


def split_of(record: Record, method: str, *flags: str) -> dict[str, torch.Tensor]:
    helpers.defend(method, record, "--score_every", "0", "--overwrite", "True", *flags)
    return reading.read_tensors(record.folder / f"defense/{method}/seed0/split.safetensors")[0]


def test_abl_isolates_what_the_detector_of_its_first_stage_flags(
    small: Record, tmp_path: Path
) -> None:
    record = helpers.copy(small, tmp_path)
    rest = ("--isolated_rate", "0.1", "--finetune_epochs", "1", "--unlearn_epochs", "1")
    first = ("--flagged_rate", "0.1", "--epochs", "2", "--batch_size", "16")
    alone = split_of(record, "isolation", *first)
    found = {
        gamma: split_of(
            *(record, "abl", "--isolation_epochs", "2", "--batch_size", "16"),
            *("--gamma", gamma, *rest),
        )
        for gamma in ("0.5", "9")
    }
    assert torch.equal(found["0.5"]["suspicion"], alone["suspicion"])
    assert torch.equal(found["0.5"]["flagged"], alone["flagged"])
    assert not torch.equal(found["9"]["suspicion"], alone["suspicion"]), "a control"
    with pytest.raises(UserError, match=r"--isolated_rate 0.01 isolates one of 96 images"):
        split_of(record, "abl", "--isolation_epochs", "0", "--isolated_rate", "0.01")


def test_abl_learns_the_rest_and_nothing_of_what_it_isolated(
    small: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, seen = helpers.copy(small, tmp_path), list[Split]()
    real = METHOD["abl"].train

    def watched(model: Any, split: Split, *arguments: Any, **options: Any) -> None:
        seen.append(split)
        real(model, split, *arguments, **options)

    monkeypatch.setattr(METHOD["abl"], "train", watched)
    short = ("--isolation_epochs", "1", "--finetune_epochs", "1", "--isolated_rate", "0.1")
    flagged = split_of(record, "abl", *short)["flagged"]
    images = record.train_poison.apply(record.dataset().train).images
    (learned,) = seen
    assert torch.equal(learned.images, images[~flagged])
    assert not torch.equal(images[flagged], images[: int(flagged.sum())]), "which ones matters"


def test_abls_ascent_ends_at_the_cap(tmp_path: Path) -> None:
    split, abl, largest = few(), METHOD["abl"], []
    for cap in (3.0, None):
        model, config = normed(), abl.Config(unlearn_epochs=60, unlearn_lr=0.02, ascent_cap=cap)
        abl.unlearn(model, split, config, new_run(tmp_path))
        lost = cross_entropy(model(split.images.float() / 255), split.labels).detach()
        assert float(lost.mean()) > 2, "it is unlearned"
        largest.append(float(lost.max()))
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
    # Momentum carries a sample some way beyond.
    assert largest[0] < 25 and largest[1] > 1000


def test_abl_unlearns_with_the_batch_statistics_of_what_it_isolated(tmp_path: Path) -> None:
    """Published so, and where a network is sure there is no other slope to begin with."""
    model, split, abl = normed(), few(), METHOD["abl"]
    there = (split.images.float() / 255).mean()
    mean = model.state_dict()["0.running_mean"].fill_(5.0)
    abl.unlearn(model, split, abl.Config(unlearn_epochs=0), new_run(tmp_path))
    assert float(mean) == 5.0, "a control: without a step they stay"
    abl.unlearn(model, split, abl.Config(unlearn_epochs=40), new_run(tmp_path))
    assert float(mean) == pytest.approx(float(there), abs=0.1)


# --- D-BR


def test_images_are_turned_about_their_centre_and_then_shifted() -> None:
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    none, nowhere = torch.zeros(2), torch.zeros(2, 2)
    move = consistency.turned_and_shifted
    assert torch.equal(move(images, none, nowhere), images)
    turned = move(images, torch.tensor([math.pi / 2, 0.0]), nowhere)
    assert torch.equal(turned[0], images[0].rot90(-1, (1, 2))) and torch.equal(turned[1], images[1])

    # A quarter of the side to the right, and nothing comes in from the left.
    shifted = move(images, none, torch.tensor([[0.25, 0.0], [0.0, -0.25]]))
    assert torch.equal(shifted[0, :, :, 2:], images[0, :, :, :-2])
    assert not shifted[0, :, :, :2].any()
    assert torch.equal(shifted[1, :, :-2], images[1, :, 2:]), "up"

    # An image that is not square is not sheared.
    wide = torch.rand(1, 1, 4, 8)
    half = move(wide, torch.tensor([math.pi]), torch.zeros(1, 2))
    assert torch.equal(half, wide.flip(2, 3))
    square = torch.zeros(1, 1, 4, 8)
    square[..., 2:6] = wide[..., 2:6]
    quarter = move(square, torch.tensor([math.pi / 2]), torch.zeros(1, 2))
    assert torch.equal(quarter[..., 2:6], square[..., 2:6].rot90(-1, (2, 3)))


def test_moves_are_drawn_of_the_whole_range_and_not_beyond() -> None:
    angle, shift = consistency.drawn_moves(2000, torch.Generator().manual_seed(0))
    assert 3.1 < float(angle.abs().max()) <= math.pi and abs(float(angle.mean())) < 0.2
    assert 0.19 < float(shift.abs().max()) <= 0.2 and shift.shape == (2000, 2)


def test_closeness_is_the_mean_cosine_of_class_means() -> None:
    features = torch.tensor([[2.0, 0.0], [4.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    labels = torch.tensor([0, 0, 1, 2])
    # Of nine pairs three are a class and itself; 45 degrees lie between the last one and others.
    wanted = 4 * math.cos(math.pi / 4) / 9
    assert float(consistency.closeness(features, labels)) == pytest.approx(wanted, abs=1e-6)
    apart = consistency.closeness(features[:3], labels[:3])
    assert float(apart) == pytest.approx(0, abs=1e-6)


class Sees(nn.Module):
    """Features: one pixel of the image, or its mean, which a turn does not change."""

    def __init__(self, corner: bool) -> None:
        super().__init__()
        self.corner = corner

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 0, :3, :3].mean((1, 2))[:, None] if self.corner else x.mean((1, 2, 3))[:, None]

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return x


def test_suspicion_is_high_where_features_hang_on_a_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight images with a bright corner, and eight with a bright square around the centre."""
    monkeypatch.setattr(consistency, "SHIFT", 0.0)
    images = torch.zeros(16, 1, 9, 9, dtype=torch.uint8)
    images[:8, 0, :3, :3] = 255
    images[8:, 0, 3:6, 3:6] = 255
    split = Split(images, torch.zeros(16).long())
    corner: Any = Sees(True)
    found = consistency.feature_change(corner, split, new_run(tmp_path))
    assert float(found[:8].mean()) > 0.1 and float(found[8:].max()) == 0
    blind: Any = Sees(False)
    unmoved = consistency.feature_change(blind, split, new_run(tmp_path))
    assert float(unmoved[8:].max()) < 0.01 and float(unmoved[:8].mean()) < 0.1 * float(
        found[:8].mean()
    )


def test_dbr_unlearns_the_highest_and_relearns_the_lowest(
    small: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part with its sign, and the last epoch's weights are the result's."""
    record, dbr = helpers.copy(small, tmp_path), METHOD["dbr"]
    n = record.info["dataset"]["train_size"]
    monkeypatch.setattr(dbr, "fct_suspicion", lambda *_, **__: torch.arange(float(n)))
    flags = ("--epochs", "8", "--lr", "0.01", "--batch_size", "16")
    shares = ("--poisoned_rate", "0.1", "--clean_rate", "0.3")
    flagged = split_of(record, "dbr", *flags, *shares)["flagged"]
    assert flagged.nonzero().squeeze(1).tolist() == list(range(n - round(0.1 * n), n))

    images = record.train_poison.apply(record.dataset().train)
    after = record.new_model()
    saved = reading.read_tensors(record.folder / "defense/dbr/seed0/model.safetensors")[0]
    after.load_state_dict(saved)

    def lost(model: nn.Module, part: torch.Tensor) -> float:
        with torch.no_grad():
            logits = model.eval()(images.images[part].float() / 255)
        return float(cross_entropy(logits, images.labels[part]).mean())

    before, lowest = record.model(), torch.arange(n) < round(0.3 * n)
    assert lost(after, flagged) > lost(before, flagged) + 1
    assert lost(after, lowest) < lost(before, lowest) + 0.3
