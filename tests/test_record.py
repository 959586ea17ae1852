"""Records: what an attack writes, and the part of it that a defender sees."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch

from backdoorlab.errors import UserError
from backdoorlab.record import (
    DefenderView,
    Record,
    check_name,
    defender_view,
    record_names,
    record_root,
)
from backdoorlab.storage import reading
from backdoorlab.storage.schema import ASSUMABLE

CPU = torch.device("cpu")


def view_of(record: Record, *assumes: str) -> DefenderView:
    dataset = record.dataset()
    return defender_view(
        record,
        dataset,
        assumes,
        dataset.train.subset(torch.arange(20)),
        CPU,
        torch.arange(20),
        torch.arange(len(dataset.train)) < 5,
    )


def tensors_of(value: Any) -> list[torch.Tensor]:
    """List the tensors that can be reached from a value without calling anything."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, torch.nn.Module):
        return []
    if isinstance(value, dict):
        return [t for item in value.values() for t in tensors_of(item)]
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in tensors_of(item)]
    if dataclasses.is_dataclass(value):
        return [
            t for field in dataclasses.fields(value) for t in tensors_of(getattr(value, field.name))
        ]
    return []


def test_a_record_comes_back_equal(tiny: Record) -> None:
    again = Record.load("tiny", tiny.folder.parent)
    for mine, other in (
        (tiny.train_poison, again.train_poison),
        (tiny.test_poison, again.test_poison),
    ):
        for field in dataclasses.fields(mine):
            a, b = getattr(mine, field.name), getattr(other, field.name)
            assert torch.equal(a, b) and a.dtype == b.dtype
    first, second = tiny.model().state_dict(), again.model().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    fresh = tiny.new_model().state_dict()
    assert any(not torch.equal(first[name], fresh[name]) for name in first), (
        "the weights are the trained ones"
    )
    assert again.info == tiny.info


def test_a_record_says_what_was_done(tiny: Record) -> None:
    info = tiny.info
    assert (info["attack"], info["num_classes"], info["target"], info["seed"]) == (
        "badnet",
        10,
        0,
        0,
    )
    assert info["poisoned"] == len(tiny.train_poison) == 144
    assert info["dataset"]["fingerprint"] == tiny.dataset().fingerprint
    assert (
        info["config"]["epochs"] == 1
        and info["config"]["width"] == 4
        and "record_root" not in info["config"]
    )
    assert set(info["scores"]) == {
        "clean_accuracy",
        "asr",
        "robust_accuracy",
        "per_class",
        "triggered_predictions",
        "balanced_accuracy",
        "largest_share",
        "cross",
    }
    assert info["image_passes"]["forward"] == info["image_passes"]["backward"] == 1442 // 64 * 64, (
        "one epoch, evaluation not counted"
    )
    assert {path.name for path in tiny.folder.iterdir() if path.is_file()} == {
        *info["files"],
        "record.json",
    }
    assert (tiny.folder / "preview.png").stat().st_size > 0


def test_the_scores_are_those_of_the_saved_model(tiny: Record) -> None:

    from backdoorlab.metrics import Evaluator

    found = Evaluator(tiny.dataset().test, tiny.test_poison, 10, CPU)(tiny.model())
    assert found.to_json() == tiny.info["scores"]


def test_a_view_holds_no_secret(tiny: Record) -> None:
    view, dataset = view_of(tiny, *ASSUMABLE), tiny.dataset()
    names = {name for name in dir(view) if not name.startswith("_")} | set(view.granted)
    for secret in (
        "poison",
        "index",
        "target",
        "trigger",
        "test",
        "flagged",
        "mask",
        "record",
        "folder",
        "attack",
    ):
        assert not [name for name in names if secret in name], f"{secret} in {names}"
    reachable = tensors_of(view)
    assert reachable, "the training set can be reached, so the search below is not empty"
    for hidden in (
        tiny.train_poison.index,
        tiny.train_poison.mask(len(dataset.train)),
        dataset.test.images,
        tiny.test_poison.images,
    ):
        assert not any(t.shape == hidden.shape and torch.equal(t, hidden) for t in reachable)
    assert not any(
        t.shape[1:] == dataset.test.images.shape[1:] and len(t) == len(dataset.test)
        for t in reachable
    )


def test_a_view_gives_what_was_assumed(tiny: Record) -> None:
    dataset, view = tiny.dataset(), view_of(tiny, "model", "train", "trusted")
    received = tiny.train_poison.apply(dataset.train)
    assert torch.equal(view.train.images, received.images) and torch.equal(
        view.train.labels, received.labels
    )
    assert int((view.train.labels != dataset.train.labels).sum()) > 100, (
        "the training set is the poisoned one"
    )
    assert torch.equal(view.trusted.images, dataset.train.images[:20]) and torch.equal(
        view.trusted.labels, dataset.train.labels[:20]
    )
    assert (view.architecture, view.num_classes, view.image_shape) == (
        "preactresnet10",
        10,
        (1, 16, 16),
    )
    assert view.augment.crop_padding == tiny.info["config"]["crop_padding"]


def given(view: DefenderView, what: str) -> object:
    """What a view gives of a name in ASSUMES; the model by a call, as it is copied."""
    return view.load_model() if what == "model" else getattr(view, what)


@pytest.mark.parametrize("assumed", sorted(ASSUMABLE))
def test_what_is_not_assumed_is_not_there(tiny: Record, assumed: str) -> None:
    view = view_of(tiny, assumed)
    for what in ASSUMABLE:
        if what == assumed:
            assert given(view, what) is not None
        else:
            with pytest.raises(PermissionError, match=f"does not assume '{what}'"):
                given(view, what)
            assert what not in view.granted
    assert view.new_model() is not None, "the architecture is public"


def test_the_model_is_a_fresh_copy_each_time(tiny: Record) -> None:
    view = view_of(tiny, "model")
    first = view.load_model()
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    original, second = tiny.model().state_dict(), view.load_model().state_dict()
    assert all(torch.equal(original[name], second[name]) for name in original)
    assert all(not p.any() for p in first.parameters())


def test_an_unknown_name_is_answered_with_the_known_ones(tiny: Record, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no record 'tinny'.* Did you mean 'tiny'\? Known: tiny"):
        Record.load("tinny", tiny.folder.parent)
    with pytest.raises(UserError, match="There is none yet"):
        Record.load("tiny", tmp_path / "empty")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/a", "a\\b", "a\rb", ".hidden", "x.partial"]
)
def test_a_name_is_one_folder_name(name: str) -> None:
    with pytest.raises(UserError, match="one folder name"):
        check_name(name)
    check_name("badnet_0.1-cifar10")


def test_a_moved_and_renamed_record_works(tiny: Record, tmp_path: Path) -> None:
    moved = helpers.copy(tiny, tmp_path / "elsewhere", "renamed")
    assert moved.name == "renamed" and record_names(tmp_path / "elsewhere") == ["renamed"]
    original, other = tiny.model().state_dict(), moved.model().state_dict()
    assert all(torch.equal(original[name], other[name]) for name in original)
    result = helpers.defend("ft", moved, "--epochs", "1", "--trusted_count", "30")
    assert (
        result is not None and (moved.folder / "defense" / "ft" / "seed0" / "result.json").exists()
    )


@pytest.mark.parametrize(
    "file",
    [
        "model.safetensors",
        "train_poison.safetensors",
        "test_poison.safetensors",
        "preview.png",
        "history.csv",
    ],
)
@pytest.mark.parametrize("damage", ["missing", "flipped", "truncated"])
def test_a_damaged_file_is_one_line_that_names_it(
    tiny: Record, tmp_path: Path, file: str, damage: str
) -> None:
    path = helpers.copy(tiny, tmp_path).folder / file
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with pytest.raises(UserError, match=file) as caught:
        Record.load("tiny", tmp_path)
    assert "\n" not in str(caught.value) and "--overwrite" in str(caught.value)


def edit(folder: Path, **changes: Any) -> None:
    helpers.edit_json(folder / "record.json", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None, "seed": None}, "no seed, scores|no scores, seed"),
        ({"schema": 3}, "schema 3, but this version reads schema 2"),
        ({"files": ["model.safetensors"]}, "record.json: damaged"),
        ({"files": {"model.safetensors": "x"}}, "model.safetensors|record.json"),
        ({"files": {}}, "record.json"),
        ({"dataset": "digits"}, "record.json: damaged"),
    ],
)
def test_a_damaged_record_json_is_one_line(
    tiny: Record, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = helpers.copy(tiny, tmp_path).folder
    edit(folder, **changes)
    with pytest.raises(UserError, match=message):
        Record.load("tiny", tmp_path)


def test_weights_of_another_network_are_refused(tiny: Record, tmp_path: Path) -> None:
    record = helpers.copy(tiny, tmp_path)
    architecture = {**record.info["architecture"], "width": 8}
    edit(record.folder, architecture=architecture)
    with pytest.raises(
        UserError, match=r"model.safetensors: damaged file \(not the weights of preactresnet10"
    ):
        Record.load("tiny", tmp_path).model()


def test_a_record_on_other_data_is_refused(tiny: Record, tmp_path: Path) -> None:
    record = helpers.copy(tiny, tmp_path)
    edit(record.folder, dataset={**record.info["dataset"], "fingerprint": "0" * 64})
    changed = Record.load("tiny", tmp_path)
    with pytest.raises(UserError, match=r"fingerprint 000000000000.*not in the cache"):
        changed.dataset()
    from test_data import image_folder

    with pytest.raises(UserError, match="was made on other data: expected fingerprint"):
        changed.dataset(str(image_folder(tmp_path / "data")))
    assert record.dataset().fingerprint == record.info["dataset"]["fingerprint"]


def test_unfinished_and_foreign_folders_are_no_records(tiny: Record, tmp_path: Path) -> None:
    helpers.copy(tiny, tmp_path, "b")
    helpers.copy(tiny, tmp_path, "a")
    shutil.copytree(tmp_path / "a", tmp_path / "c.partial")
    (tmp_path / "notes").mkdir()
    (tmp_path / "file").write_text("x")
    assert record_names(tmp_path) == ["a", "b"]
    assert record_names(tmp_path / "absent") == []


def test_where_records_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKDOORLAB_RECORDS", str(tmp_path / "env"))
    assert record_root(str(tmp_path / "flag")) == tmp_path / "flag"
    assert record_root() == tmp_path / "env"
    monkeypatch.delenv("BACKDOORLAB_RECORDS")
    assert record_root() == helpers.CHECKOUT / "record"


def test_the_manifest_is_the_files(tiny: Record) -> None:
    for name, entry in tiny.info["files"].items():
        assert (
            reading.sha256(tiny.folder / name) == entry["sha256"]
            and (tiny.folder / name).stat().st_size == entry["size"]
        )


def test_a_file_outside_the_record_is_refused(tiny: Record, tmp_path: Path) -> None:
    folder = helpers.copy(tiny, tmp_path).folder
    (tmp_path / "secret").write_text("x")
    edit(
        folder,
        files={
            **tiny.info["files"],
            "../secret": {"sha256": reading.sha256(tmp_path / "secret"), "size": 1},
        },
    )
    with pytest.raises(UserError, match="secret"):
        Record.load(folder.name, folder.parent)
