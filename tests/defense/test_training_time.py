"""ABL and D-BR: what is isolated, how an ascent ends, and the metric of D-BR."""

import shutil
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from torch import nn

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
