"""--split of unlearners: what it may be, what is refused, what the result and the tables say."""

import shutil
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import safetensors.torch
import torch
from test_run import Stop, interrupt_at, reachable, says_poison

from backdoorlab.__main__ import main
from backdoorlab.errors import UserError
from backdoorlab.execution.splits import resolve
from backdoorlab.poison import CROSS, Poison
from backdoorlab.record import Record
from backdoorlab.report import artifacts, charts
from backdoorlab.settings import methods
from backdoorlab.storage import reading
from backdoorlab.tables import groups, matrix, rows, significance

N = 96
"""Training images of the record `small`."""


def digest(record: Record) -> str:
    return reading.sha256(record.folder / "record.json")


def given(record: Record, word: str, seed: int = 0) -> torch.Tensor:
    return resolve(word, record, digest(record), seed).flagged


@pytest.fixture
def record(small: Record, tmp_path: Path) -> Record:
    return helpers.copy(small, tmp_path)


# --- oracle


def test_an_oracle_is_the_poison_or_a_part_of_it_or_more(record: Record) -> None:
    poison = record.train_poison.mask(N)
    size = int(poison.sum())
    assert torch.equal(given(record, "oracle"), poison)
    assert torch.equal(given(record, "oracle:1"), poison)
    part = given(record, "oracle:0.5")
    assert int(part.sum()) == round(size / 2) and not (part & ~poison).any()
    assert torch.equal(part, given(record, "oracle:0.5")), "drawn with the seed"
    assert not torch.equal(part, given(record, "oracle:0.5", seed=1))
    assert int(given(record, "oracle:0.0001").sum()) == 1, "at least one"

    more = given(record, "oracle+0.1")
    assert (more & poison).sum() == size
    assert int((more & ~poison).sum()) == round(0.1 * (N - size))
    both = given(record, "oracle:0.5+0.1")
    assert int((both & poison).sum()) == round(size / 2) and int((both & ~poison).sum()) > 0
    assert resolve("oracle:0.5", record, "", 0).oracle and not resolve("none", record, "", 0).oracle
    assert not given(record, "none").any()


def test_an_oracle_leaves_cover_samples_alone(record: Record) -> None:
    kind = record.train_poison.kind.clone()
    kind[0] = CROSS
    poison = Poison(**{**vars(record.train_poison), "kind": kind})
    other = Record(record.folder, record.info, poison, record.test_poison)
    assert not given(other, "oracle")[poison.index[0]]


@pytest.mark.parametrize(
    "word", ["oracle:0", "oracle:2", "oracle:x", "oracle+1", "oracle+", "oracle:1:1"]
)
def test_an_oracle_of_no_share_is_refused(word: str, record: Record) -> None:
    with pytest.raises(UserError, match=r"expected oracle, oracle:SHARE of the poison"):
        given(record, word)


def test_an_oracle_where_nobody_knows_the_poison_is_refused(record: Record) -> None:
    unknown = {**record.info, "known_poison": False}
    other = Record(record.folder, unknown, record.train_poison, record.test_poison)
    with pytest.raises(UserError, match="nobody knows which training images of record 'small'"):
        given(other, "oracle")
    assert not given(other, "none").any(), "a control: nothing needs no oracle"


# --- files


def write(path: Path, mask: torch.Tensor, index: bool) -> None:
    value = mask.nonzero().squeeze(1) if index else mask
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({"flagged" if index else "mine": value}, path)
    elif path.suffix == ".npy":
        np.save(path, value.numpy())
    else:
        path.write_text("flagged\n" + "\n".join(map(str, value.tolist())))


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("ending", [".safetensors", ".npy", ".csv"])
def test_a_file_of_bools_or_positions_is_a_split(
    ending: str, index: bool, record: Record, tmp_path: Path
) -> None:
    mask = torch.rand(N, generator=torch.Generator().manual_seed(0)) < 0.2
    write(tmp_path / f"mine{ending}", mask, index)
    found = resolve(str(tmp_path / f"mine{ending}"), record, digest(record), 0)
    assert torch.equal(found.flagged, mask) and found.name == f"mine{ending}" and not found.oracle
    np.save(tmp_path / "ones.npy", mask.numpy().astype(np.int64))
    assert torch.equal(given(record, str(tmp_path / "ones.npy")), mask), "0 and 1 of its length"


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (np.zeros(N + 1, bool), r"expected bool \(96,\).*got bool \(97,\): it is of another data"),
        (np.zeros((N, 1), bool), r"expected bool \(96,\).*got bool \(96, 1\)"),
        (np.full(N, np.nan), r"expected bool \(96,\).*got float64 \(96,\)"),
        (np.zeros(0, np.int64), "empty: .*--split none"),
        (np.array([3, N]), "position 96 is outside the training set of 96 images"),
        (np.array([-1, 3]), "position -1 is outside"),
        (np.array([3, 4, 3]), "a position is there twice"),
        (np.ones(N, bool), "flags all 96 training images"),
        (np.array(["a", "b"]), "cannot be read"),
        (np.array([{}], dtype=object), "cannot be read .*allow_pickle"),
    ],
)
def test_a_file_that_is_no_split_of_this_set_is_one_line(
    value: Any, why: str, record: Record, tmp_path: Path
) -> None:
    np.save(tmp_path / "mine.npy", value)
    with pytest.raises(UserError, match=why) as caught:
        given(record, str(tmp_path / "mine.npy"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"), [("a.safetensors", b"x"), ("a.npy", b""), ("a.csv", b"head\n1.5\n")]
)
def test_a_damaged_file_is_one_line(
    name: str, content: bytes, record: Record, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="cannot be read") as caught:
        given(record, str(tmp_path / name))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        given(record, str(tmp_path / f"no{name}"))


# --- methods


def test_the_split_of_a_method_is_that_of_its_run_with_the_same_seed(record: Record) -> None:
    helpers.defend("loss", record)
    helpers.defend("loss", record, "--run_name", "half", "--flagged_rate", "0.5")
    for word, run in (("loss", "seed0"), ("loss/half", "half")):
        saved = reading.read_tensors(record.folder / f"defense/loss/{run}/split.safetensors")[0]
        assert torch.equal(given(record, word), saved["flagged"])
    with pytest.raises(UserError, match=r"has no finished run 'seed1' of loss.*small: loss"):
        given(record, "loss", seed=1)
    for word in ("loss/other", "los", "../small", "loss/../x", "/"):
        with pytest.raises(UserError, match="has no finished"):
            given(record, word)
    with pytest.raises(UserError, match="--split is missing: expected METHOD"):
        given(record, "")


def test_a_result_without_a_split_or_of_another_record_is_refused(
    record: Record, tmp_path: Path
) -> None:
    helpers.defend("ft", record, "--epochs", "0")
    with pytest.raises(UserError, match=r"ft reports no split\. Methods with a split on small: "):
        given(record, "ft")

    # Copied from a record of other poison on the same data.
    helpers.defend("loss", record)
    other = helpers.copy(record, tmp_path, "other")
    shutil.copytree(record.folder / "defense", other.folder / "defense")
    assert resolve("loss", other, digest(other), 0).flagged.any(), "a control: the same record.json"
    with pytest.raises(UserError, match=r"is a result on another record: run loss on 'other'"):
        resolve("loss", other, "0" * 64, 0)


# --- runs and tables


def test_an_unlearner_says_whose_split_it_forgot(
    record: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    helpers.defend("loss", record, "--flagged_rate", "0.2")
    short = ("--epochs", "1", "--score_every", "0")
    helpers.defend("ft", record, "--epochs", "1", "--trusted_ratio", "0.3")
    found = {
        word: helpers.defend("finetune_kept", record, *short, "--split", word)
        for word in ("loss", "oracle", "oracle:0.5", "oracle+0.1", "none")
    }
    for word, result in found.items():
        assert result is not None and result["kind"] == "unlearner"
        mask = resolve(word, record, digest(record), 0)
        assert result["given_split"] == {
            "name": word,
            "sha256": mask.sha256,
            "oracle": word.startswith("oracle"),
        }
        assert result["split"]["flagged"] == int(mask.flagged.sum())
    runs = {path.name for path in (record.folder / "defense/finetune_kept").iterdir()}
    wanted = ("loss", "oracle", "oracle-0.5", "oracle+0.1", "none")
    assert runs == {f"{word}-seed0" for word in wanted}

    # Marked in both tables, and never ranked.
    root = ("--record_root", str(record.folder.parent))
    for flags in ((), ("--mean", "True")):
        assert main(["table", "small", *root, *flags]) == 0
        out = capsys.readouterr().out
        lines = [
            line
            for line in out.splitlines()
            if line.startswith("small  ") and "finetune_kept" in line
        ]
        marked = [line for line in lines if " ORACLE" in line]
        assert len(lines) == 5 and len(marked) == 3
        assert all("oracle" in line for line in marked) and "no defender knows" in out
    measured = rows.rows([record])
    found_groups = groups.grouped(measured)
    answers = groups.no_better_than_baseline(found_groups)
    for group, weak in zip(found_groups, answers, strict=True):
        first = group.first
        assert first.ranked == (not first.oracle and first.kind != "detector")
        assert weak is None or first.ranked
    assert any(row.oracle and row.comparable_der is not None for row in measured), "a control"
    compared = significance.compare(found_groups)
    assert "ORACLE" not in repr(compared) and "oracle" not in repr(compared)


@pytest.mark.parametrize("word", ["loss", "oracle"])
def test_an_unlearner_without_an_oracle_cannot_reach_the_poison(
    word: str, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By no attribute of its view, run or config; a control: with an oracle it is view.split."""
    helpers.defend("loss", record)
    loaded, found = methods.load("defense", "ssd"), list[object]()
    real = loaded.module.defend

    def defend(view: Any, config: Any, run: Any) -> Any:
        model = real(view, config, run)
        found.extend(reachable(view, run, config))
        return model

    monkeypatch.setattr(loaded.module, "defend", defend)
    helpers.defend("ssd", record, "--split", word)
    index = record.train_poison.index
    tensors = [value for value in found if isinstance(value, torch.Tensor)]
    assert len(tensors) > 10
    assert any(says_poison(value, index) for value in tensors) == (word == "oracle")


def test_the_matrix_has_the_oracle_on_top_and_a_column_for_each_unlearner(
    record: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    root = ("--record_root", str(record.folder.parent))
    helpers.defend("loss", record)
    helpers.defend("spectral", record)
    for word in ("loss", "oracle", "oracle:0.5", "none"):
        helpers.defend("ssd", record, "--split", word)
    helpers.defend("finetune_kept", record, "--split", "loss", "--epochs", "1")
    again = ("--split", "loss", "--epochs", "1", "--seed", "0", "--run_name", "again")
    helpers.defend("finetune_kept", record, *again)
    assert main(["matrix", "small", *root, "-f", "csv"]) == 0
    said = capsys.readouterr()
    header, *lines = (line.split(",") for line in said.out.splitlines())
    assert header == ["record", "split", "TPR %", "FPR %", "AUROC %", "finetune_kept", "ssd"]
    names = [line[1] for line in lines]
    assert names[:3] == ["(no unlearning)", "oracle ORACLE", "oracle:0.5 ORACLE"]
    assert names[3:] == ["loss", "none", "spectral"]
    table = {line[1]: dict(zip(header, line, strict=True)) for line in lines}
    assert float(table["oracle ORACLE"]["TPR %"]) == 100
    assert table["loss"]["AUROC %"] and table["loss"]["ssd"].count("/") == 2
    assert not table["spectral"]["ssd"] and not table["oracle ORACLE"]["finetune_kept"]
    assert "1 further runs" in said.err and "no defender knows" in said.err

    tuned = [row for row in rows.rows([record]) if row.defense == "finetune_kept"]
    shown = matrix._usual(tuned)
    assert len(tuned) == 2 and shown is not None and shown.run == "loss-seed0"

    # The page has them, too: marked, and without a mark in the chart of accuracy and ASR.
    page = record.folder.parent / "page.html"
    assert main(["report", "small", *root, "--html", str(page)]) == 0
    text = page.read_text()
    assert "ssd oracle-seed0 ORACLE" in text and "AUROC" in text
    cells = artifacts.gather([record])
    panels = charts.accuracy_against_asr(cells).panels
    drawn = [cells[n].row for panel in panels for one in panel.series for n in one.cells]
    assert drawn and not any(row.oracle or row.kind == "detector" for row in drawn)


def test_a_split_that_flags_nothing_returns_the_model(record: Record) -> None:
    result = helpers.defend("retrain", record, "--split", "none")
    assert result is not None
    assert result["notes"] == ["the split none flags nothing, so the model is returned as it was"]
    saved, original = (
        reading.read_tensors(folder / "model.safetensors")[0]
        for folder in (record.folder / "defense/retrain/none-seed0", record.folder)
    )
    assert all(torch.equal(original[name], value) for name, value in saved.items())


def test_dau_with_a_split_is_its_second_half_on_that_split(
    record: Record, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """CCE of the split, weight by weight; nothing is searched for."""
    helpers.defend("loss", record, "--flagged_rate", "0.2")
    helpers.defend("loss", record, "--flagged_rate", "0.3", "--run_name", "other")
    dau, flags = methods.load("defense", "dau").module, ("--epochs", "2", "--score_every", "0")

    def never(*_: Any) -> None:
        raise AssertionError("the first half ran")

    with monkeypatch.context() as patch:
        patch.setattr(dau, "find_poison", never)
        found = {
            word: helpers.defend("dau", record, *flags, "--split", word)
            for word in ("loss", "loss/other", "oracle")
        }
        with pytest.raises(AssertionError, match="the first half ran"):
            helpers.defend("dau", record, *flags, "--run_name", "alone")
    helpers.defend("cce", record, *flags, "--split", "loss")
    weights = {
        run: reading.read_tensors(record.folder / "defense" / run / "model.safetensors")[0]
        for run in ("cce/loss-seed0", "dau/loss-seed0", "dau/loss-other-seed0")
    }
    halves = weights.pop("cce/loss-seed0")
    same = [
        all(torch.equal(halves[name], value) for name, value in each.items())
        for each in weights.values()
    ]
    assert same == [True, False], "another split gives another model"

    # Whose split it was, and an oracle's mark, as of an unlearner.
    for word, result in found.items():
        assert result is not None and "split" in result["assumes"]
        assert result["given_split"]["name"] == word
        assert result["given_split"]["oracle"] == (word == "oracle")
        assert result["split"]["flagged"] == int(given(record, word).sum())
    assert found["oracle"] is not None and found["oracle"]["split"]["tpr"] == 1.0
    ranked = {row.split: row.ranked for row in rows.rows([record]) if row.defense == "dau"}
    assert ranked == {"loss": True, "loss/other": True, "oracle": False}
    root = ("--record_root", str(record.folder.parent))
    assert main(["table", "small", *root]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "  dau " in line]
    assert [" ORACLE" in line for line in lines] == ["  oracle  " in line for line in lines]
    assert sum(" ORACLE" in line for line in lines) == 1

    with pytest.raises(UserError, match="--split loss takes the place of --subtask anti_learning"):
        helpers.defend("dau", record, "--subtask", "anti_learning", "--split", "loss")


def test_an_unfinished_run_is_continued_with_the_same_split_only(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--split", "loss", "--epochs", "2", "--batch_size", "16", "--score_every", "0")
    helpers.defend("loss", record)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 8)
        with pytest.raises(Stop):
            helpers.defend("finetune_kept", record, *flags)
    helpers.defend("loss", record, "--flagged_rate", "0.5", "--overwrite", "True")
    with pytest.raises(UserError, match=r"unfinished run with other settings \(other split\)"):
        helpers.defend("finetune_kept", record, *flags)
    helpers.defend("loss", record, "--overwrite", "True")
    assert helpers.defend("finetune_kept", record, *flags) is not None, "a control"


def test_a_detector_of_a_record_without_poison_has_a_false_alarm_and_no_ranking(
    small_flags: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = small_flags.index("--patch_size")
    record = helpers.attack("none", "clean", tmp_path, *small_flags[:cut], *small_flags[cut + 4 :])
    root = ("--record_root", str(tmp_path))
    assert main(["defense", "spectral", "--result_file", "clean", *root]) == 0
    assert "in a training set without poison (FPR" in capsys.readouterr().out
    result = reading.read_json(record.folder / "defense/spectral/seed0/result.json")
    assert result["split"]["auroc"] is None and result["split"]["fpr"] > 0.1
    assert main(["table", "clean", *root]) == 0
    assert " - " in capsys.readouterr().out
    oracle = helpers.defend("ssd", record, "--split", "oracle")
    assert oracle is not None and "flags nothing" in oracle["notes"][0]


def test_a_bad_split_loses_nothing(record: Record, tmp_path: Path) -> None:
    for word in ("", "nobody", "oracle:9", str(tmp_path / "no.npy")):
        with pytest.raises(UserError):
            helpers.defend("ssd", record, "--split", word)
    assert not (record.folder / "defense" / "ssd").exists()


DETECTOR = '''"""Odd: flag every tenth image."""

from dataclasses import dataclass

import torch

from backdoorlab.config import DefenseConfig
from backdoorlab.detection import Detection
from backdoorlab.record import DefenderView
from backdoorlab.run import Run

ASSUMES = ("train",)


@dataclass(frozen=True, kw_only=True)
class Config(DefenseConfig):
    pass


def detect(view: DefenderView, config: Config, run: Run) -> Detection:
    suspicion = -(torch.arange(len(view.train)) % 10.0)
    return Detection(suspicion, suspicion == 0)
'''
UNLEARNER = '''"""Zero: forget by setting the last layer to 0."""

from dataclasses import dataclass

import torch
from torch import nn

from backdoorlab.config import SplitConfig
from backdoorlab.record import DefenderView
from backdoorlab.run import Run

ASSUMES = ("model", "split")


@dataclass(frozen=True, kw_only=True)
class Config(SplitConfig):
    pass


def defend(view: DefenderView, config: Config, run: Run) -> nn.Module:
    model = view.load_model()
    run.note(f"{int(view.split.sum())} images of {len(view.split)}")
    with torch.no_grad():
        for parameter in model.get_classifier().parameters():
            parameter.zero_()
    return model
'''


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "mine" / "defense"
    folder.mkdir(parents=True)
    (folder / "odd.py").write_text(DETECTOR)
    (folder / "zero.py").write_text(UNLEARNER)
    monkeypatch.setenv("BACKDOORLAB_PLUGINS", str(tmp_path / "mine"))
    return folder


def test_a_new_detector_and_a_new_unlearner_are_one_file_each(
    plugins: Path, record: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    root = ("--record_root", str(record.folder.parent))
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    repairs, _, others = out.partition("\ndetectors,")
    detectors, _, unlearners = others.partition("\nunlearners,")
    for name, listed in (("ft", repairs), ("odd", detectors), ("zero", unlearners)):
        assert f"\n{name} " in listed and out.count(f"\n{name} ") == 1
    assert main(["defense", "odd", "--result_file", "small", *root]) == 0
    assert "10 flagged" in capsys.readouterr().out
    assert main(["defense", "zero", "--result_file", "small", "--split", "odd", *root]) == 0
    assert "10 images of 96" in capsys.readouterr().err
    assert main(["table", "small", *root, "-f", "csv"]) == 0
    header, *lines = (line.split(",") for line in capsys.readouterr().out.splitlines())
    found = [dict(zip(header, line, strict=True)) for line in lines]
    table = {line["defense"].removesuffix(" COLLAPSED"): line for line in found}
    assert table["odd"]["clean acc %"] == "" and table["odd"]["AUROC %"] != ""
    assert table["zero (odd-seed0)"]["split"] == "odd"
    assert table["zero (odd-seed0)"]["TPR %"] == table["odd"]["TPR %"]


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("return Detection(", "return (", None),
        ("Detection(suspicion,", "Detection(suspicion.log(),", "is NaN or infinite for 96 of 96"),
        ("suspicion == 0)", "suspicion)", "flagged as float32"),
        ("Detection(suspicion,", "Detection(suspicion[:5],", r"suspicion as float32 \(5,\)"),
        ("Detection(suspicion,", "Detection(suspicion.long(),", "suspicion as int64"),
        (
            "return Detection(suspicion, suspicion == 0)",
            "return suspicion",
            "detect returned float",
        ),
        ("return Detection(suspicion, suspicion == 0)", "pass", "detect returned NoneType"),
    ],
)
def test_what_a_detector_returns_is_checked(
    old: str, new: str, why: str | None, plugins: Path, record: Record
) -> None:
    (plugins / "odd.py").write_text(DETECTOR.replace(old, new))
    if why is None:
        assert helpers.defend("odd", record) is not None
        return
    with pytest.raises(UserError, match=why):
        helpers.defend("odd", record)
    assert not (record.folder / "defense" / "odd" / "seed0").exists()


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("both", DETECTOR + "\n\ndef defend(view, config, run):\n    pass\n", "make two files"),
        ("blind", DETECTOR.replace('"train",', '"model",'), "a detector looks at the training set"),
        ("told", DETECTOR.replace('"train",', '"train", "split"'), "gets no split"),
        (
            "half",
            UNLEARNER.replace('"split")', '"split", "seeds")'),
            r"Config\(SeedsConfig, SplitConfig\)",
        ),
        (
            "plain",
            UNLEARNER.replace("SplitConfig", "DefenseConfig"),
            r"class Config\(SplitConfig\)",
        ),
    ],
)
def test_a_file_that_is_no_such_method_is_one_line(
    name: str, text: str, why: str, plugins: Path
) -> None:
    (plugins / f"{name}.py").write_text(text)
    with pytest.raises(UserError, match=why):
        methods.load("defense", name)


def test_a_method_without_split_in_assumes_gets_none(plugins: Path, record: Record) -> None:
    (plugins / "greedy.py").write_text(DETECTOR.replace("-(torch", "view.split * -(torch"))
    with pytest.raises(PermissionError, match="does not assume 'split'"):
        helpers.defend("greedy", record)


def test_weights_of_a_detector_cannot_be_exported(
    record: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    helpers.defend("loss", record)
    command = ["export", "small", "--record_root", str(record.folder.parent)]
    command += ["--defense", "loss", "--weights", str(tmp_path / "w.safetensors")]
    assert main(command) == 2
    assert "a detector leaves a split and no model" in capsys.readouterr().err
    assert methods.load("defense", "loss").role == "detector"
