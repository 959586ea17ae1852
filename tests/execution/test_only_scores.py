"""A method's option may ask for the scores of its finished run, and nothing else."""

from pathlib import Path

import helpers
import pytest

from backdoorlab.errors import UserError
from backdoorlab.record import Record
from backdoorlab.storage import reading

AGAIN = '''"""Same: the poisoned model as it is."""
from dataclasses import dataclass

from torch import nn

from backdoorlab.config import DefenseConfig
from backdoorlab.record import DefenderView
from backdoorlab.run import Run

ASSUMES = ("model",)


@dataclass(frozen=True, kw_only=True)
class Config(DefenseConfig):
    part: str = "all"
    """all, or scores."""

    @property
    def NAME(self) -> bool:
        return self.part == "scores"


def defend(view: DefenderView, config: Config, run: Run) -> nn.Module:
    run.note(f"defended: {config.part}")
    return view.load_model()
'''


@pytest.mark.parametrize(("name", "scored"), [("only_scores", True), ("another_name", False)])
def test_only_scores_calls_no_method_and_writes_nothing(
    name: str, scored: bool, tiny: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under another name the same property is the method's own, and the method is called."""
    record = helpers.copy(tiny, tmp_path / "record")
    (tmp_path / "mine" / "defense").mkdir(parents=True)
    (tmp_path / "mine" / "defense" / "same.py").write_text(AGAIN.replace("NAME", name))
    monkeypatch.setenv("BACKDOORLAB_PLUGINS", str(tmp_path / "mine"))

    if scored:
        with pytest.raises(UserError, match="no finished run to test"):
            helpers.defend("same", record, "--part", "scores")
    first = helpers.defend("same", record)
    assert first is not None and first["notes"] == ["defended: all"]
    folder = record.folder / "defense" / "same" / "seed0"
    before = {path.name: reading.sha256(path) for path in folder.iterdir()}

    again = helpers.defend("same", record, "--part", "scores", "--overwrite", "True")
    assert again is not None and again["after"] == first["after"]
    assert again["notes"] == ["defended: all" if scored else "defended: scores"]
    after = {path.name: reading.sha256(path) for path in folder.iterdir()}
    assert (after == before) == scored
