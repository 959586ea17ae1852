"""Detectors and unlearners: a row each, their formulas, what --split may be, and who is ranked."""

from dataclasses import dataclass
from pathlib import Path

import helpers
import pytest
import torch

from backdoorlab.__main__ import main
from backdoorlab.exchange.verify import verify
from backdoorlab.ranking import rank_quality
from backdoorlab.record import Record
from backdoorlab.settings import methods
from backdoorlab.storage import reading


@dataclass(frozen=True)
class Found:
    """What a detector promises on the digits BadNets record; None where it promises nothing."""

    auroc: float | None = None
    tpr: float | None = None
    fpr: float = 1.0


DETECTORS = {
    "activation_clustering": Found(auroc=0.9),
    "anti_learning": Found(auroc=0.9, tpr=0.8, fpr=0.02),
    "isolation": Found(),
    "loss": Found(),
    "spectral": Found(auroc=0.9, tpr=0.5, fpr=0.15),
}


def test_every_detector_has_a_row() -> None:
    assert set(methods.with_role("detector")) == set(DETECTORS)


@pytest.mark.parametrize("method", sorted(DETECTORS))
def test_a_detector_leaves_a_split_and_no_model(
    method: str, backdoored: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    promised, record = DETECTORS[method], helpers.copy(backdoored, tmp_path)
    flags = () if promised.tpr else helpers.short_flags(method)
    result = helpers.defend(method, record, *flags)
    assert result is not None and result["kind"] == "detector"
    folder, split = record.folder / "defense" / method / "seed0", result["split"]
    assert not (folder / "model.safetensors").exists() and result["after"] is None
    saved = reading.read_tensors(folder / "split.safetensors")[0]
    assert saved["flagged"].dtype == torch.bool and int(saved["flagged"].sum()) == split["flagged"]
    truth = record.train_poison.mask(len(saved["flagged"]))
    ranks = rank_quality(saved["suspicion"], truth)
    assert {name: split[name] for name in ranks} == pytest.approx(ranks)
    assert promised.auroc is None or split["auroc"] >= promised.auroc
    assert promised.tpr is None or split["tpr"] >= promised.tpr
    assert split["fpr"] <= promised.fpr

    # It verifies, and stands in the table without a score of a model.
    assert verify(record.name, record.folder.parent).wrong == ()
    assert main(["table", record.name, "--record_root", str(tmp_path), "-f", "csv"]) == 0
    out = capsys.readouterr().out
    header, *lines = (line.split(",") for line in out.splitlines() if line.count(",") > 5)
    (line,) = (dict(zip(header, row, strict=True)) for row in lines if row[2] == method)
    assert line["clean acc %"] == line["ASR %"] == line["DER %"] == ""
    assert float(line["AUROC %"]) == pytest.approx(100 * split["auroc"], abs=0.01)
