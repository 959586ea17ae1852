"""The clean data set stays as it is: an attack returns what it changed."""

from pathlib import Path

import helpers
import pytest

from backdoorlab.errors import UserError

MINE = '''"""Mine: what plain training gives, on images that may have been changed in place."""
from dataclasses import dataclass

from backdoorlab.config import AttackConfig
from backdoorlab.poison import no_poison
from backdoorlab.poisoning import poison_and_train


@dataclass(frozen=True, kw_only=True)
class Config(AttackConfig):
    pass


def attack(dataset, config, run):
    CHANGE
    return poison_and_train(
        dataset, config, run, no_poison(dataset.train), no_poison(dataset.test)
    )
'''


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ("dataset.train.images[:9] = 255", True),
        ("dataset.test.labels[0] += 1", True),
        ("dataset.train.images.clone()[:9] = 255", False),
    ],
)
def test_an_attack_that_changes_the_clean_data_in_place_is_refused(
    change: str, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine" / "attack").mkdir(parents=True)
    (tmp_path / "mine" / "attack" / "mine.py").write_text(MINE.replace("CHANGE", change))
    monkeypatch.setenv("BACKDOORLAB_PLUGINS", str(tmp_path / "mine"))
    if not refused:
        assert helpers.attack("mine", "made", tmp_path, "--epochs", "1").info["attack"] == "mine"
        return
    with pytest.raises(UserError, match="changed the clean data set in place"):
        helpers.attack("mine", "made", tmp_path, "--epochs", "1")
    assert not (tmp_path / "made").exists()
