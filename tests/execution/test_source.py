"""The version of the code behind a number: it changes with what computes, and with nothing else."""

import shutil
from pathlib import Path

import helpers
import pytest
from test_run import Stop, interrupt_at

from backdoorlab.execution import code_version
from backdoorlab.record import Record
from backdoorlab.settings import methods


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package and its methods, as another machine has it."""
    for name in ("backdoorlab", "attack", "defense"):
        shutil.copytree(
            helpers.CHECKOUT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    monkeypatch.setattr("backdoorlab.execution.code_version.PACKAGE", tmp_path / "backdoorlab")
    return tmp_path


def versions(root: Path) -> dict[str, str]:
    code_version._imported.cache_clear()
    return {
        path.stem: code_version.code_version(path)
        for path in (
            root / "attack" / "badnet.py",
            root / "defense" / "ft.py",
            root / "defense" / "sau.py",
        )
    }


def append(path: Path) -> None:
    path.write_text(path.read_text() + "\n# changed\n")


def test_the_same_code_has_the_same_version_wherever_it_is(elsewhere: Path) -> None:
    found = versions(elsewhere)
    assert len(set(found.values())) == 3 and all(len(version) == 12 for version in found.values())
    code_version.PACKAGE = helpers.CHECKOUT / "backdoorlab"  # undone with the fixture's own change
    assert versions(helpers.CHECKOUT) == found


@pytest.mark.parametrize(
    ("changed", "whose"),
    [
        ("backdoorlab/engine.py", {"badnet", "ft", "sau"}),
        ("backdoorlab/execution/stage.py", {"badnet", "ft", "sau"}),
        ("backdoorlab/models/preact_resnet.py", {"badnet", "ft", "sau"}),
        ("backdoorlab/triggers.py", {"badnet"}),
        ("backdoorlab/perturb.py", {"sau"}),
        ("backdoorlab/repair/guard.py", {"ft", "sau"}),
        ("backdoorlab/repair/unlearning.py", set()),
        ("backdoorlab/poison_search/pool.py", set()),
        ("defense/ft.py", {"ft"}),
        ("backdoorlab/tables/layout.py", set()),
        ("backdoorlab/bench/driver.py", set()),
        ("backdoorlab/exchange/hub.py", set()),
        ("defense/dau.py", set()),
        ("defense/sau.py", {"sau"}),
        ("backdoorlab/tables/rows.py", set()),
        ("backdoorlab/report/page.py", set()),
        ("backdoorlab/depth/retune.py", set()),
        ("backdoorlab/tables/audits.py", set()),
        ("backdoorlab/exchange/verify.py", set()),
        ("backdoorlab/execution/preview.py", set()),
        ("backdoorlab/cli.py", set()),
        ("backdoorlab/execution/tracking.py", set()),
        ("backdoorlab/execution/precision.py", set()),
        ("backdoorlab/storage/writing.py", set()),
    ],
)
def test_it_changes_with_what_computes(elsewhere: Path, changed: str, whose: set[str]) -> None:
    before = versions(elsewhere)
    append(elsewhere / changed)
    after = versions(elsewhere)
    assert {name for name in before if before[name] != after[name]} == whose


def test_records_and_results_say_it(small: Record) -> None:
    assert small.info["code"] == code_version.code_version(methods.load("attack", "badnet").path)


def test_a_run_that_other_code_began_says_both(
    tiny: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it is in no mean with runs of either."""
    record = helpers.copy(tiny, tmp_path)
    flags = ("--epochs", "3", "--score_every", "0")
    with monkeypatch.context() as patch:
        patch.setattr("backdoorlab.execution.stage.code_version", lambda path: "0" * 12)
        interrupt_at(patch, 3)
        with pytest.raises(Stop):
            helpers.defend("ft", record, *flags)
    result = helpers.defend("ft", record, *flags)
    now = code_version.code_version(methods.load("defense", "ft").path)
    assert result is not None and result["code"] == f"{'0' * 12}+{now}"
    plain = helpers.defend("ft", record, *flags, "--run_name", "again")
    assert plain is not None and plain["code"] == now and plain["after"] == result["after"]
