"""Detectors and unlearners: a row each, their formulas, what --split may be, and who is ranked."""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch

from backdoorlab.__main__ import main
from backdoorlab.data import Split
from backdoorlab.detection import highest
from backdoorlab.exchange.verify import verify
from backdoorlab.losses import divergence
from backdoorlab.ranking import rank_quality
from backdoorlab.record import Record
from backdoorlab.run import Run
from backdoorlab.settings import methods
from backdoorlab.storage import reading


@dataclass(frozen=True)
class Found:
    """What a detector promises on the digits BadNets record; None where it promises nothing."""

    auroc: float | None = None
    tpr: float | None = None
    fpr: float = 1.0
    record: str = "backdoored"
    """The fixture that it is tried on."""


DETECTORS = {
    # With 10 % poison half of the target label is poison, and which half is smaller is chance.
    "activation_clustering": Found(auroc=0.65, tpr=0.5, fpr=0.15, record="sparse"),
    "beatrix": Found(),
    "cognitive_distillation": Found(),
    "fct": Found(),  # turned digits are other digits, so that clean features move, too
    "ibd_psc": Found(),  # on eight batch normalisations and digits it tells little apart
    "anti_learning": Found(auroc=0.9, tpr=0.8, fpr=0.02),
    "isolation": Found(),
    "loss": Found(),
    "scan": Found(auroc=0.9, tpr=0.8, fpr=0.1),
    "scale_up": Found(),  # digits are black and white, and hardly change by scaling
    "spectral": Found(auroc=0.7, fpr=0.16),
    "spectre": Found(fpr=0.05),  # half of the target label is poison, which no trimming survives
    "strip": Found(auroc=0.9, fpr=0.15),
}


@pytest.fixture(scope="module")
def sparse(session_folder: Path) -> Record:
    """A BadNets record with 5 % poison: a third of the target label."""
    with helpers.environment(BACKDOORLAB_CACHE=session_folder / "cache"):
        flags = (*helpers.WORKING, "--patch_size", "4", "--poison_rate", "0.05")
        return helpers.attack("badnet", "sparse", session_folder / "sparse", *flags)


def test_every_detector_has_a_row() -> None:
    assert set(methods.with_role("detector")) == set(DETECTORS)


@pytest.mark.parametrize("method", sorted(DETECTORS))
def test_a_detector_leaves_a_split_and_no_model(
    method: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    promised = DETECTORS[method]
    record = helpers.copy(request.getfixturevalue(promised.record), tmp_path)
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


@dataclass(frozen=True)
class Left:
    """What an unlearner promises with the true poison; None where it promises nothing."""

    asr: float | None = None
    """Largest ASR after."""
    drop: float = 0.05
    """Largest loss of clean accuracy."""
    flags: tuple[str, ...] = ("--epochs", "2")


UNLEARNERS = {
    "ascent": Left(flags=("--epochs", "1")),
    "bad_teacher": Left(asr=0.2),
    "cce": Left(asr=0.2),
    "finetune_kept": Left(flags=("--epochs", "1")),
    "random_label": Left(asr=0.2),
    "relearn": Left(asr=0.3),
    "retrain": Left(asr=0.1, drop=0.1, flags=("--epochs", "4")),
    "scrub": Left(flags=("--epochs", "1")),
    "ssd": Left(flags=()),
}


def test_every_unlearner_has_a_row() -> None:
    assert set(methods.with_role("unlearner")) == set(UNLEARNERS)


@pytest.mark.parametrize("method", sorted(UNLEARNERS))
def test_an_unlearner_keeps_its_promise(method: str, backdoored: Record, tmp_path: Path) -> None:
    row, record = UNLEARNERS[method], helpers.copy(backdoored, tmp_path)
    before = record.info["scores"]
    assert before["asr"] >= 0.9, "the backdoor is there"
    flags = ("--split", "oracle", "--score_every", "0", *row.flags)
    result = helpers.defend(method, record, *flags)
    assert result is not None and result["kind"] == "unlearner"
    after = result["after"]
    assert after["clean_accuracy"] >= before["clean_accuracy"] - row.drop
    assert row.asr is None or after["asr"] <= row.asr
    saved, original = (
        reading.read_tensors(folder / "model.safetensors")[0]
        for folder in (record.folder / "defense" / method / "oracle-seed0", record.folder)
    )
    assert any(not torch.equal(original[name], value) for name, value in saved.items())


# --- formulas


def brute_force(suspicion: list[float], poisoned: list[bool]) -> dict[str, float]:
    """Every pair for AUROC, every threshold for the others."""
    pairs = [
        (a > b) + (a == b) / 2
        for a, b in itertools.product(
            [s for s, bad in zip(suspicion, poisoned, strict=True) if bad],
            [s for s, bad in zip(suspicion, poisoned, strict=True) if not bad],
        )
    ]
    points, last, precision = [(0.0, 0.0)], 0.0, 0.0
    for threshold in sorted(set(suspicion), reverse=True):
        taken = [bad for s, bad in zip(suspicion, poisoned, strict=True) if s >= threshold]
        tpr = sum(taken) / sum(poisoned)
        points.append(((len(taken) - sum(taken)) / (len(poisoned) - sum(poisoned)), tpr))
        precision += (tpr - last) * sum(taken) / len(taken)
        last = tpr
    return {
        "auroc": sum(pairs) / len(pairs),
        "average_precision": precision,
        "tpr_at_fpr_1": max(tpr for fpr, tpr in points if fpr <= 0.01),
        "tpr_at_fpr_5": max(tpr for fpr, tpr in points if fpr <= 0.05),
    }


@pytest.mark.parametrize("levels", [3, 1000])
def test_rank_quality_is_what_counting_every_pair_gives(levels: int) -> None:
    """With many ties and without."""
    drawn = torch.Generator().manual_seed(levels)
    poisoned = torch.rand(120, generator=drawn) < 0.3
    suspicion = torch.randint(levels, (120,), generator=drawn).float() + 0.3 * levels * poisoned
    found = rank_quality(suspicion, poisoned)
    assert found == pytest.approx(brute_force(suspicion.tolist(), poisoned.tolist()))
    assert found["auroc"] is not None and 0.5 < found["auroc"] < 1


def test_rank_quality_of_the_perfect_the_blind_and_the_clean() -> None:
    poisoned = torch.tensor([False, True, False, True])
    assert set(rank_quality(poisoned.float(), poisoned).values()) == {1.0}
    assert rank_quality(-poisoned.float(), poisoned)["auroc"] == 0.0
    blind = rank_quality(torch.zeros(4), poisoned)
    assert (blind["auroc"], blind["average_precision"], blind["tpr_at_fpr_5"]) == (0.5, 0.5, 0.0)
    assert set(rank_quality(torch.rand(4), torch.zeros(4, dtype=torch.bool)).values()) == {None}


def test_highest_flags_at_least_one_and_never_all() -> None:
    suspicion = torch.tensor([0.1, 0.9, 0.5, 0.7])
    assert highest(suspicion, 0.5).tolist() == [False, True, False, True]
    assert highest(suspicion, 1e-9).tolist() == [False, True, False, False]
    assert int(highest(suspicion, 0.999).sum()) == 3


def test_activation_clustering_parts_two_gaussian_clusters() -> None:
    module = methods.load("defense", "activation_clustering").module
    drawn = torch.Generator().manual_seed(0)
    x = torch.randn(200, 20, generator=drawn, dtype=torch.float64)
    x[:30, 3] += 12
    margin = module.cluster(x, 10)
    assert (margin > 0).nonzero().squeeze(1).tolist() == list(range(30))
    assert float(margin.max()) < 1 and float(margin.min()) > -1
    # A control: one cluster is cut in two halves, which are too large to be flagged.
    halves = module.cluster(torch.randn(200, 20, generator=drawn, dtype=torch.float64), 10) > 0
    assert 0.35 < float(halves.double().mean()) <= 0.5
    assert module.cluster(torch.zeros(5, 3, dtype=torch.float64), 10).tolist() == [0.0] * 5


def test_spectral_scores_are_those_of_numpys_svd() -> None:
    module = methods.load("defense", "spectral").module
    x = torch.randn(40, 7, generator=torch.Generator().manual_seed(0))
    centred = x.double().numpy() - x.double().numpy().mean(0)
    first = np.linalg.svd(centred)[2][0]
    np.testing.assert_allclose(module.outlyingness(x).numpy(), (centred @ first) ** 2)


def test_ssd_dampens_a_linear_model_by_its_closed_form(tmp_path: Path) -> None:
    """Of softmax regression the gradient of an image is (p - y) x, so importance is known."""
    module = methods.load("defense", "ssd").module
    images = torch.randint(256, (6, 1, 2, 2), dtype=torch.uint8)
    split = Split(images, torch.tensor([0, 1, 2, 0, 1, 2]))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3, bias=False))
    run = Run(tmp_path, seed=0, device=torch.device("cpu"))
    found = module.importance(model, split, 1, run)[0]

    x = (images.float() / 255).flatten(1)
    residual = model(x).softmax(1) - torch.nn.functional.one_hot(split.labels, 3)
    by_hand = (residual[:, :, None] * x[:, None]).square().mean(0)
    torch.testing.assert_close(found, by_hand.detach())

    to_split = torch.tensor([30.0, 9.0, 0.0, 40.0])
    to_all = torch.tensor([1.0, 1.0, 0.0, 2.0])
    scale = module.factors(to_split, to_all, alpha=10.0, dampening=1.0)
    torch.testing.assert_close(scale, torch.tensor([1 / 30, 1.0, 1.0, 1 / 20]))
    assert module.factors(to_split, to_all, alpha=10.0, dampening=50.0).tolist() == [1.0] * 4


class Answers(torch.nn.Module):
    """Logits `sure` for the class that is the brightest corner pixel's column, 0 for others."""

    def __init__(self, sure: float) -> None:
        super().__init__()
        self.sure = sure

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.sure * torch.nn.functional.one_hot(x[:, 0, 0].argmax(1), 4).float()


def test_strips_entropy_is_0_of_a_sure_model_and_log_k_of_an_unsure_one(tmp_path: Path) -> None:
    module = methods.load("defense", "strip").module
    run = Run(tmp_path, seed=0, device=torch.device("cpu"))
    split = Split(torch.randint(256, (5, 1, 4, 4), dtype=torch.uint8), torch.zeros(5).long())
    overlays = torch.rand(3, 1, 4, 4)
    for sure, expected in ((1e4, 0.0), (0.0, math.log(4))):
        found = module.entropies(Answers(sure), split, overlays, 1.0, run)
        assert found.tolist() == pytest.approx([expected] * 5, abs=1e-5)


def test_strip_adds_pixels_and_clips_them(tmp_path: Path) -> None:
    """A dark image takes the overlay's class; a white pixel keeps its own wherever it is first."""
    module, seen = methods.load("defense", "strip").module, list[torch.Tensor]()

    class Watching(Answers):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return super().forward(x)

    run = Run(tmp_path, seed=0, device=torch.device("cpu"))
    split = Split(torch.full((1, 1, 4, 4), 204, dtype=torch.uint8), torch.zeros(1).long())
    module.entropies(Watching(1.0), split, torch.tensor([0.1, 0.6]).view(2, 1, 1, 1), 0.5, run)
    values = [float(x.mean()) for x in seen]
    assert values == pytest.approx([0.85, 1.0])


def test_scale_up_counts_the_factors_with_which_a_class_stays(tmp_path: Path) -> None:
    """Of rows .3 and .25 the first is brighter until both are clipped, where the first column of
    equal ones is the answer."""
    module = methods.load("defense", "scale_up").module
    run = Run(tmp_path, seed=0, device=torch.device("cpu"))
    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    images[0, 0, 0] = torch.tensor([60, 80, 0, 0], dtype=torch.uint8)
    images[1, 0, 0] = torch.tensor([80, 60, 0, 0], dtype=torch.uint8)
    split = Split(images, torch.zeros(2).long())
    found = module.consistency(Answers(1.0), split, (2.0, 3.0, 5.0, 9.0), run)
    assert found.tolist() == [0.5, 1.0], "5 and 9 times 60 and 80 are both more than 255"


def test_ibd_psc_scales_the_last_layers_of_a_copy() -> None:
    module = methods.load("defense", "ibd_psc").module
    norms = [torch.nn.BatchNorm2d(2) for _ in range(3)]
    model = torch.nn.Sequential(*norms)
    for norm in norms:
        torch.nn.init.constant_(norm.bias, 0.5)
    changed = module.scaled(model, 2, 1.5)
    assert [norm.weight[0].item() for norm in changed] == [1.0, 1.5, 1.5]
    assert [norm.bias[0].item() for norm in changed] == [0.5, 0.75, 0.75]
    assert all(norm.weight[0].item() == 1 for norm in norms), "the model itself stays"
    errors = {1: 0.1, 2: 0.6, 3: 0.7, 4: 0.2}
    assert module.first_above(errors.__getitem__, 4, 0.6) == 3
    assert module.first_above(errors.__getitem__, 2, 0.6) is None


def test_a_random_label_is_never_the_old_one() -> None:
    module = methods.load("defense", "random_label").module
    labels = torch.arange(3000) % 5
    forgotten = torch.arange(3000) < 2000
    drawn = module.relabelled(labels, forgotten, 5, torch.Generator().manual_seed(0))
    assert torch.equal(drawn[2000:], labels[2000:]) and not (drawn == labels)[:2000].any()
    steps = torch.bincount((drawn - labels)[:2000] % 5, minlength=5)
    assert steps[0] == 0 and int(steps[1:].min()) > 400, "all others are equally likely"


def test_divergence_is_torchs() -> None:
    drawn = torch.Generator().manual_seed(0)
    logits, taught = torch.randn(2, 9, 4, generator=drawn)
    wanted = torch.nn.functional.kl_div(
        (logits / 4).log_softmax(1), (taught / 4).softmax(1), reduction="none"
    ).sum(1)
    torch.testing.assert_close(divergence(logits, taught, 4.0), 16 * wanted)
    assert float(divergence(logits, logits).abs().max()) < 1e-6
