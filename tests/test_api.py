"""The library from Python: the same runs, names and complaints as the commands."""

import re
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
import torch

import backdoorlab as bl
from backdoorlab.errors import UserError
from backdoorlab.exchange.weights import write_weights
from backdoorlab.record import Record
from backdoorlab.tables import layout


def options(flags: tuple[str, ...]) -> dict[str, str]:
    return dict(zip((flag[2:] for flag in flags[::2]), flags[1::2], strict=True))


def test_attack_defend_table(tmp_path: Path, small: Record, small_flags: tuple[str, ...]) -> None:
    record = bl.attack(
        "badnet", save_folder_name="mine", record_root=tmp_path, **options(small_flags)
    )
    assert record.info["scores"] == small.info["scores"], "the same as by the command line"
    result = bl.defend(
        "ft", record, epochs=2, trusted_ratio=0.3, score_every=0, precision="fp32", run_name="two"
    )
    assert (
        result is not None
        and result["config"]["epochs"] == 2
        and (record.folder / "defense" / "ft" / "two" / "result.json").is_file()
    )
    assert (
        bl.defend(
            "ft",
            "mine",
            record_root=tmp_path,
            epochs=2,
            trusted_ratio=0.3,
            score_every=0,
            precision="fp32",
        )
        is not None
    )
    assert (
        bl.table([record])
        == layout.render(layout.rows([record]), "text")
        == bl.table(root=str(tmp_path))
    )
    assert bl.table(record) == bl.table([record]) == bl.table("mine", root=str(tmp_path))
    mean = bl.table(["mine"], root=str(tmp_path), mean=True, format="csv").splitlines()
    assert (
        mean[0].startswith("data,attack,poison %,defense,assumes,n,clean acc %") and len(mean) == 4
    )
    assert "Each row is one model" in bl.table([record], worst=True)


def test_a_damaged_record_is_left_out_unless_it_is_named(
    tmp_path: Path, small: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    sound, torn = (helpers.copy(small, tmp_path / "records", name) for name in ("sound", "torn"))
    (torn.folder / "record.json").write_text("{")
    assert bl.table(root=str(tmp_path / "records")) == bl.table(sound)
    assert "torn" in capsys.readouterr().err
    with pytest.raises(UserError, match="torn"):
        bl.table("torn", root=str(tmp_path / "records"))
    result = sound.folder / "defense" / "ft" / "seed0" / "result.json"
    result.parent.mkdir(parents=True)
    result.write_text("{")
    assert len(re.findall(r"\bft\b", bl.table(sound))) == 1
    assert str(result) in capsys.readouterr().err


def test_mistakes_are_those_of_the_command_line(tmp_path: Path, small: Record) -> None:
    with pytest.raises(UserError, match=r"unknown attack 'badnets'. Did you mean 'badnet'"):
        bl.attack("badnets")
    with pytest.raises(
        UserError, match=r"badnet: unknown key 'poison_rat'. Did you mean 'poison_rate'"
    ):
        bl.attack("badnet", save_folder_name="x", poison_rat=0.1)
    with pytest.raises(UserError, match="poison_rate must lie in"):
        bl.attack("badnet", save_folder_name="x", poison_rate=2, record_root=tmp_path)
    with pytest.raises(UserError, match="exists and is finished"):
        bl.defend("dau", small)
    with pytest.raises(UserError, match="no record 'nobody'"):
        bl.table(["nobody"], root=str(tmp_path))
    with pytest.raises(AttributeError, match="no attribute 'defence'"):
        bl.defence  # noqa: B018


def test_an_exported_model_is_loaded(tmp_path: Path, small: Record) -> None:
    model = small.model().eval()
    write_weights(
        tmp_path / "model.safetensors",
        model,
        architecture=small.info["architecture"],
        image_shape=small.info["dataset"]["image_shape"],
        num_classes=small.info["num_classes"],
    )
    images = torch.rand(2, *small.info["dataset"]["image_shape"])
    loaded = bl.load_exported(tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert set(bl.__all__) == {"UserError", "attack", "defend", "load_exported", "table"}
    assert bl.UserError is UserError


def test_the_package_alone_is_light() -> None:
    """torch takes seconds, and comes with the first of the functions only."""
    code = (
        "import sys, backdoorlab as bl; assert 'torch' not in sys.modules; bl.attack; assert"
        " 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=helpers.CHECKOUT)
