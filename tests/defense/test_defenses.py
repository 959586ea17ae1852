"""One row a method: the backdoor was there before, and what the method promises holds after."""

from dataclasses import dataclass
from pathlib import Path

import helpers
import pytest
import torch

from backdoorlab.__main__ import main
from backdoorlab.errors import UserError
from backdoorlab.metrics import SUMMARY, VERDICT
from backdoorlab.record import Record
from backdoorlab.settings import methods
from backdoorlab.settings.parse import as_flags, parse_plain
from backdoorlab.storage import reading


@dataclass(frozen=True)
class Row:
    """What a defense promises on the digits BadNets record; None where it promises nothing."""

    flags: tuple[str, ...] = ()
    asr: float | None = None
    """Largest ASR after."""
    drop: float = 0.03
    """Largest loss of clean accuracy."""
    precision: float | None = None
    tpr: float | None = None


ROWS = {
    # On the digits poison is not learned first, so that its first stage isolates clean images.
    "abl": Row(("--isolation_epochs", "2", "--finetune_epochs", "10", "--unlearn_epochs", "1")),
    # Trusted images may lose .05, and 72 of them tell that to two standard errors, .05. ANP leaves
    # an ASR of .00 to .30 on eleven of thirteen models, .9 on two: test_repairs.py has its effect.
    "anp": Row(drop=0.1),
    "asd": Row(asr=0.1, drop=0.05),
    "bnp": Row(),
    "bti_dbf": Row(
        ("--rounds", "1", "--identity_epochs", "20", "--mask_epochs", "20", "--invert_epochs", "5")
    ),
    "bu": Row(asr=0.1, drop=0.05),
    "ep": Row(),
    "clp": Row(),  # layers of 16 channels have few that stand out
    "dbr": Row(("--train_epochs", "2", "--apart_epochs", "2", "--epochs", "2")),
    "dau": Row(asr=0.05, precision=0.9, tpr=0.8),
    "ibau": Row(asr=0.1),
    # .02 to .06 in nine models; a radius of .3 costs .08 to .11, in four of five too much.
    "sau": Row(asr=0.1, drop=0.08),
    "fp": Row(("--epochs", "20", "--batch_size", "24"), drop=0.05),
    "fst": Row(),  # its ASR is 0, and its RA too near to the limit for other processors
    "ft_sam": Row(("--epochs", "10")),
    "nad": Row(("--teacher_epochs", "5", "--epochs", "10")),
    # Few passes are enough to find so small a patch.
    "nc": Row(
        ("--trusted_count", "72", "--search_epochs", "60", "--patience", "3"), asr=0.3, drop=0.08
    ),
    "npd": Row(),
    "rnp": Row(drop=0.1),  # as anp
    "ft": Row(("--epochs", "10")),  # on so small a set, a trigger may well survive fine-tuning
}


def test_every_defense_has_a_row() -> None:
    """Detectors and unlearners have theirs in test_detectors.py."""
    assert set(methods.with_role("defense")) == set(ROWS)


@pytest.mark.parametrize("method", sorted(ROWS))
def test_a_defense_keeps_its_promise(method: str, demo: Record, tmp_path: Path) -> None:
    row, before = ROWS[method], demo.info["scores"]
    assert before["asr"] >= 0.9 and before["clean_accuracy"] >= 0.9, "the backdoor is there"
    record = helpers.copy(demo, tmp_path)
    result = helpers.defend(method, record, "--score_every", "0", *row.flags)
    assert result is not None
    after = result["after"]
    assert result["before"] == {key: before[key] for key in (*SUMMARY, *VERDICT)}
    assert (
        after["clean_accuracy"] >= before["clean_accuracy"] - row.drop and not result["collapsed"]
    )
    if row.asr is not None:
        assert after["asr"] <= row.asr
        assert (
            result["der"] > 1 - row.asr
            and after["robust_accuracy"] > before["robust_accuracy"] + 0.3
        )
    if row.precision is not None:
        assert result["split"]["precision"] >= row.precision
    if row.tpr is not None:
        assert result["split"]["tpr"] >= row.tpr
        flagged = reading.read_tensors(
            record.folder / "defense" / method / "seed0" / "split.safetensors"
        )[0]["flagged"]
        assert int(flagged.sum()) == result["split"]["flagged"]
    saved = reading.read_tensors(
        record.folder / "defense" / method / "seed0" / "model.safetensors"
    )[0]
    original = record.model().state_dict()
    assert any(not torch.equal(original[name], value) for name, value in saved.items()), (
        "the defense did something"
    )
    assert result["assumes"] == list(methods.load("defense", method).assumes)
    assert result["image_passes"]["forward"] > 0 and result["seconds"] > 0
    assert sum(result["triggered_predictions"]) == len(record.test_poison)


def test_dau_returns_a_model_that_was_never_attacked(clean: Record, tmp_path: Path) -> None:
    record = helpers.copy(clean, tmp_path)
    assert record.info["scores"]["clean_accuracy"] >= 0.9
    result = helpers.defend("dau", record, "--score_every", "0")
    assert result is not None and any("no poison found" in note for note in result["notes"])
    saved = reading.read_tensors(record.folder / "defense" / "dau" / "seed0" / "model.safetensors")[
        0
    ]
    original = record.model().state_dict()
    assert saved.keys() == original.keys() and all(
        torch.equal(original[name], value) for name, value in saved.items()
    )
    assert result["after"]["clean_accuracy"] == record.info["scores"]["clean_accuracy"]
    assert result["after"]["asr"] is None and result["der"] is None
    assert result["split"]["flagged"] == 0 and result["split"]["tpr"] is None


PLUGIN = '''"""Shrink: multiply the last layer by a factor, which changes no prediction.

Assumes: the poisoned model.
"""

from dataclasses import dataclass

import torch
from torch import nn

from backdoorlab.cli import main
from backdoorlab.config import DefenseConfig
from backdoorlab.record import DefenderView
from backdoorlab.run import Run

ASSUMES = ("model",)


@dataclass(frozen=True, kw_only=True)
class Config(DefenseConfig):
    factor: float = 0.5
    """What the last layer is multiplied by."""


def defend(view: DefenderView, config: Config, run: Run) -> nn.Module:
    model = view.load_model()
    with torch.no_grad():
        for parameter in model.get_classifier().parameters():
            parameter *= config.factor
    run.note(f"shrunk by {config.factor:g}")
    return model


if __name__ == "__main__":
    raise SystemExit(main(__file__))
'''


def test_a_new_defense_is_one_file(
    tiny: Record,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    record = helpers.copy(tiny, tmp_path / "record")
    (tmp_path / "mine" / "defense").mkdir(parents=True)
    file = tmp_path / "mine" / "defense" / "shrink.py"
    file.write_text(PLUGIN)
    assert main(["list"]) == 0
    assert "shrink" not in capsys.readouterr().out, "unknown without the folder"
    assert main(["defense", "shrink", "--result_file", "tiny"]) == 2
    assert "unknown defense 'shrink'" in capsys.readouterr().err

    here = {"BACKDOORLAB_RECORDS": tmp_path / "record"}
    by_name = helpers.command(
        *("-m", "backdoorlab", "defense", "shrink", "--result_file", "tiny", "--factor", "0.25"),
        cwd=tmp_path,
        env=helpers.child_environment(**here, BACKDOORLAB_PLUGINS=tmp_path / "mine"),
    )
    assert by_name.returncode == 0, by_name.stderr
    by_file = helpers.command(
        file,
        "--result_file",
        "tiny",
        "--run_name",
        "direct",
        cwd=tmp_path,
        env=helpers.child_environment(**here),
    )
    assert by_file.returncode == 0, by_file.stderr
    assert "shrunk by 0.25" in by_name.stderr and "shrunk by 0.5" in by_file.stderr

    original = record.model().state_dict()
    for run, factor in (("seed0", 0.25), ("direct", 0.5)):
        folder = record.folder / "defense" / "shrink" / run
        saved = reading.read_tensors(folder / "model.safetensors")[0]
        assert torch.equal(
            saved["network.linear.weight"], factor * original["network.linear.weight"]
        )
        assert torch.equal(saved["network.conv1.weight"], original["network.conv1.weight"])
        result = reading.read_json(folder / "result.json")
        assert (
            result["after"]["clean_accuracy"] == result["before"]["clean_accuracy"]
            and result["config"]["factor"] == factor
        )

    monkeypatch.setenv("BACKDOORLAB_PLUGINS", str(tmp_path / "mine"))
    assert main(["list"]) == 0
    assert "Shrink: multiply the last layer" in capsys.readouterr().out
    assert main(["table", "--format", "csv"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "shrink" in line]
    assert [row.split(",")[2] for row in rows] == ["shrink", "shrink (direct)"]


def test_a_file_that_was_edited_is_loaded_anew(
    tiny: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one process, as in a notebook: what runs is what the result's code says."""
    record, file = (
        helpers.copy(tiny, tmp_path / "record"),
        tmp_path / "mine" / "defense" / "edited.py",
    )
    file.parent.mkdir(parents=True)
    monkeypatch.setenv("BACKDOORLAB_PLUGINS", str(tmp_path / "mine"))
    made = []
    # Of one length, within a second: what Python's own cache of modules goes by
    for text in ("before", "after!", "after!"):
        file.write_text(
            PLUGIN.replace(
                "model = view.load_model()", f"model = view.load_model()\n    run.note({text!r})"
            )
        )
        result = helpers.defend("edited", record, "--overwrite", "True")
        assert result is not None
        made.append((methods.load("defense", "edited").module, result))
    assert [result["notes"][0] for _, result in made] == ["before", "after!", "after!"]
    assert (
        made[0][1]["code"] != made[1][1]["code"] == made[2][1]["code"] and made[1][0] is made[2][0]
    ), "and only then"


def test_a_method_file_that_cannot_be_read_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine" / "defense" / "folder.py").mkdir(parents=True)
    monkeypatch.setenv("BACKDOORLAB_PLUGINS", str(tmp_path / "mine"))
    with pytest.raises(UserError, match=r"folder.py: cannot be imported \(IsADirectoryError"):
        methods.load("defense", "folder")
    assert "folder" not in methods.available("defense") and "dau" in methods.available("defense")


@pytest.mark.parametrize(
    ("missing", "text"),
    [("ASSUMES", 'ASSUMES = ("model",)'), ("defend", "def defend"), ("Config", "class Config")],
)
def test_a_file_that_lacks_something_says_what(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, text: str
) -> None:
    folder = tmp_path / "mine" / "defense"
    folder.mkdir(parents=True)
    (folder / "partly.py").write_text(
        PLUGIN.replace(text, text.replace(missing, "Something")).replace(
            "config: Config,", "config: DefenseConfig,"
        )
    )
    monkeypatch.setenv("BACKDOORLAB_PLUGINS", str(tmp_path / "mine"))
    with pytest.raises(UserError, match=f"this one lacks {missing}"):
        methods.load("defense", "partly")


def test_an_attack_whose_name_no_record_may_hold_is_refused_before_it_trains(
    tmp_path: Path,
) -> None:
    text = (helpers.CHECKOUT / "attack" / "badnet.py").read_text()
    for name in ("my attack.py", "my_attack.py"):
        (tmp_path / name).write_text(text)
    with pytest.raises(
        UserError, match=r"my attack.py: the file name is the method's name, .* rename the file"
    ):
        methods.from_file("attack", tmp_path / "my attack.py")
    assert methods.from_file("attack", tmp_path / "my_attack.py").name == "my_attack", "a control"


def test_a_defense_called_none_is_refused(tmp_path: Path) -> None:
    """In a table that is the model without a defense."""
    (tmp_path / "none.py").write_text((helpers.CHECKOUT / "defense" / "ft.py").read_text())
    with pytest.raises(
        UserError,
        match=r"none.py: in every table `none` is the model without a defense: rename the file",
    ):
        methods.from_file("defense", tmp_path / "none.py")


def test_a_method_gets_only_what_its_file_assumes(
    tiny: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = helpers.copy(tiny, tmp_path / "record")
    folder = tmp_path / "mine" / "defense"
    folder.mkdir(parents=True)
    (folder / "greedy.py").write_text(
        PLUGIN.replace("model = view.load_model()", "model = view.load_model()\n    view.train")
    )
    monkeypatch.setenv("BACKDOORLAB_PLUGINS", str(tmp_path / "mine"))
    with pytest.raises(PermissionError, match="does not assume 'train'"):
        helpers.defend("greedy", record)
    (folder / "modest.py").write_text(
        (folder / "greedy.py").read_text().replace('("model",)', '("model", "train")')
    )
    assert helpers.defend("modest", record) is not None


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for defenses of one's own."""
    folder = tmp_path / "mine" / "defense"
    folder.mkdir(parents=True)
    monkeypatch.setenv("BACKDOORLAB_PLUGINS", str(tmp_path / "mine"))
    return folder


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on the error stream."""
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (
            "import no_such_package\n",
            "{file}:1: cannot be imported (ModuleNotFoundError: No module named 'no_such_package')",
        ),
        ("x = 1\ndef defend(:\n", "{file}:2: cannot be imported (SyntaxError: "),
        ("\nraise SystemExit(3)\n", "{file}:2: cannot be imported (SystemExit: 3)"),
        (
            PLUGIN.replace('("model",)', '("model", "magic")'),
            (
                "{file}: ASSUMES is a tuple of some of model, train, trusted, seeds, split, found"
                " ('model', 'magic')"
            ),
        ),
        (
            PLUGIN.replace('("model",)', '"model"'),
            (
                "{file}: ASSUMES is a tuple of some of model, train, trusted, seeds, split, found"
                " 'model'"
            ),
        ),
        (PLUGIN.replace("def defend", "def defends"), "{file}: a method file of defense/ defines"),
        (
            PLUGIN.replace('("model",)', '("model", "seeds")'),
            (
                "{file}: expected @dataclass(frozen=True, kw_only=True) above class"
                " Config(SeedsConfig), found <class "
            ),
        ),
        (
            PLUGIN.replace("@dataclass(frozen=True, kw_only=True)", ""),
            "{file}: expected @dataclass(frozen=True, kw_only=True) above class Config(",
        ),
        (
            PLUGIN.replace("Config(DefenseConfig)", "Config"),
            (
                "{file}: expected @dataclass(frozen=True, kw_only=True) above class"
                " Config(DefenseConfig)"
            ),
        ),
        (
            PLUGIN.replace("    factor:", '    RANGES = {"faktor": ">= 0"}\n    factor:'),
            "{file}: RANGES names 'faktor', which is no field of Config. Did you mean 'factor'?",
        ),
        (
            PLUGIN.replace("    factor:", '    RANGES = {"factor": "positive"}\n    factor:'),
            (
                "{file}: RANGES of factor: expected a rule such as '>= 0', '> 0' or '(0, 1]', got"
                " 'positive'"
            ),
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_a_line_and_fails_who_asks_for_it(
    content: str,
    why: str,
    plugins: Path,
    tiny: Record,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    helpers.copy(tiny, tmp_path / "record")
    (plugins / "broken.py").write_text(content)
    why = why.replace("{file}", str(plugins / "broken.py"))
    assert main(["list"]) == 0
    assert said(capsys).startswith(f"  defense broken is left out: {why}")
    assert main(["table"]) == 0 and "broken" not in capsys.readouterr().out
    assert main(["defense", "broken", "--result_file", "tiny"]) == 2
    assert said(capsys).startswith(f"error: {why}")
    assert main(["defense", "brokn", "--result_file", "tiny"]) == 2
    assert "Known: abl, activation_clustering, " in said(capsys)


def test_what_a_users_file_does_wrong_names_the_file(
    plugins: Path, tiny: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = helpers.copy(tiny, tmp_path / "record")
    (plugins / "forgetful.py").write_text(PLUGIN.replace("    return model", ""))
    (plugins / "broken.py").write_text(
        PLUGIN.replace("parameter *= config.factor", "parameter.size(9)")
    )
    left = {
        "wrapped": "nn.Sequential(model)",
        "doubled": "model.double()",
        "compiled": "torch.compile(model)",
        "other": "type(model)(nn.Identity(), [0.0], [1.0])",
    }
    for name, what in left.items():
        (plugins / f"{name}.py").write_text(
            PLUGIN.replace("    return model", f"    return {what}")
        )
    (plugins / "lost.py").write_text(
        PLUGIN.replace("parameter *= config.factor", "parameter *= float('nan')")
    )
    tuples = "    model.forward_head = lambda x, **_: (x, x)\n    return model"
    (plugins / "tuples.py").write_text(PLUGIN.replace("    return model", tuples))
    line = PLUGIN.split("parameter *=")[0].count("\n") + 1
    for name, code, message in (
        (
            "forgetful",
            2,
            (
                f"error: {plugins / 'forgetful.py'}: defend returned NoneType: expected the model"
                " that is left, a torch.nn.Module"
            ),
        ),
        ("broken", 1, f", in {plugins / 'broken.py'}:{line} (pass --debug True to see where)"),
        *(
            (
                name,
                2,
                f"error: {plugins / name}.py: defend returned another network than the record's (",
            )
            for name in left
        ),
        ("lost", 2, "error: the model answers NaN: its training diverged"),
        (
            "tuples",
            2,
            (
                "error: a model answers with one number for each image and class, (N, num_classes),"
                " got tuple"
            ),
        ),
    ):
        assert main(["defense", name, "--result_file", "tiny"]) == code
        last = capsys.readouterr().err.splitlines()[-1]
        assert message in last and not (record.folder / "defense" / name / "seed0").exists()


def test_seeds_and_nested_flags_are_for_plugins_too(
    plugins: Path, tiny: Record, tmp_path: Path
) -> None:
    """A killed run is continued whatever types its flags have: settings are compared as JSON gives
    them back."""
    record = helpers.copy(tiny, tmp_path / "record")
    fields = """    pairs: tuple[tuple[int, int], ...] = ((1, 2),)
    layers: list[int] = field(default_factory=lambda: [1])
    where: Path = Path("x")

    RANGES: ClassVar[dict[str, str]] = {"layers": ">= 1"}
    factor:"""
    text = (
        PLUGIN.replace("    factor:", fields)
        .replace('("model",)', '("model", "train", "seeds")')
        .replace("DefenseConfig", "SeedsConfig")
    )
    text = text.replace(
        "from dataclasses import dataclass",
        "from dataclasses import dataclass, field\nfrom pathlib import Path\nfrom typing import"
        " ClassVar",
    )
    text = text.replace(
        "    model = view.load_model()\n",
        "    model = view.load_model()\n    run.cached('x', dict)\n    assert len(view.seeds) =="
        " view.num_classes * 2\n",
    )
    flags = ("--seeds_per_class", "2", "--pairs", "3", "4", "5", "6", "--where", "y/z")
    (plugins / "nested.py").write_text(
        text.replace("    return model", "    raise KeyboardInterrupt")
    )
    with pytest.raises(KeyboardInterrupt):
        helpers.defend("nested", record, *flags)
    (plugins / "nested.py").write_text(text)
    result = helpers.defend("nested", record, *flags)
    assert (
        result is not None
        and result["config"]["pairs"] == [[3, 4], [5, 6]]
        and result["config"]["where"] == "y/z"
    )
    method = methods.load("defense", "nested")
    given = as_flags(method.config_class, {"pairs": [[3, 4], [5, 6]], "run_name": "--seed"}, "x")
    parsed = parse_plain(method.config_class, given, "x")
    assert parsed.pairs == ((3, 4), (5, 6)) and parsed.run_name == "--seed"
    with pytest.raises(UserError, match="--pairs"):  # and not --layers, which may be empty
        parse_plain(method.config_class, ["--layers", "--pairs", "3"], "x")
    with pytest.raises(UserError, match="layers must be >= 1, got 0"):
        helpers.defend("nested", record, *flags, "--layers", "0", "--run_name", "r")


def test_plugins_that_are_not_looked_at_are_said(
    plugins: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (plugins / "ft.py").write_text(PLUGIN)
    assert methods.load("defense", "ft").path == helpers.CHECKOUT / "defense" / "ft.py"
    assert (
        said(capsys) == f"  {plugins / 'ft.py'} is not used: defense ft is"
        f" {helpers.CHECKOUT / 'defense' / 'ft.py'}. Give the file another name"
    )
    for folder, why in (
        (tmp_path / "nothing", "does not exist"),
        (plugins, "has no folder attack/ or defense/"),
    ):
        monkeypatch.setenv("BACKDOORLAB_PLUGINS", str(folder))
        assert main(["list"]) == 0
        assert said(capsys) == f"  BACKDOORLAB_PLUGINS: {folder} {why}"
