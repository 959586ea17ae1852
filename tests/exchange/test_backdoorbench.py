"""BackdoorBench records, written here in the format's own layout, and attacks by such files."""

import io
import pickle
import shutil
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from PIL import Image
from test_scripts import complaint

from backdoorlab import models
from backdoorlab.__main__ import main
from backdoorlab.data import Dataset
from backdoorlab.datasets.load import load as load_dataset
from backdoorlab.errors import UserError
from backdoorlab.exchange import backdoorbench, pickles
from backdoorlab.poison import CROSS, POISON
from backdoorlab.record import Record
from backdoorlab.settings import methods
from backdoorlab.storage import reading

Capture = pytest.CaptureFixture[str]
SIDE, TARGET = 16, 3


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits", image_size=SIDE)


def stamped(image: torch.Tensor) -> np.ndarray:
    array = image[0].numpy().copy()
    array[-2:, -2:] = 255
    return array


Labels = Callable[[int, int], int]


def split(
    folder: Path,
    part: str,
    index: list[int],
    clean: Any,
    label_of: Labels,
    *,
    style: str = "./record/X",
    key: Any = np.int64,
    in_memory: bool = False,
) -> dict[str, Any]:
    """Make bd_train or bd_test with its PNGs; `label_of(index, original)` is the attack's label."""
    stored: dict[Any, Any] = {}
    for i in index:
        original = int(clean.labels[i])
        picture = Image.fromarray(stamped(clean.images[i]))
        if in_memory:
            stored[key(i)] = (picture, label_of(i, original), original)
            continue
        place = folder / f"{part}_dataset" / str(original)
        place.mkdir(parents=True, exist_ok=True)
        picture.save(place / f"{i}.png")
        stored[key(i)] = {
            "path": f"{style}/{part}_dataset/{original}/{i}.png",
            "other_info": [label_of(i, original), original],
        }
    marks = np.zeros(len(clean), np.float64)
    marks[index] = 1
    return {
        "bd_data_container": {
            "save_folder_path": None if in_memory else f"{style}/{part}_dataset",
            "save_file_format": ".png",
            "data_dict": stored,
        },
        "poison_indicator": marks,
        "original_index_array": (
            np.arange(len(clean)) if part == "bd_train" else np.array(index, np.int64)
        ),
        "getitem_all": True,
        "getitem_all_switch": False,
        "save_folder_path": None if in_memory else f"{style}/{part}_dataset",
    }


def to_target(_index: int, _original: int) -> int:
    return TARGET


def network(width: int = 4) -> torch.nn.Module:
    torch.manual_seed(1)
    return models.build(
        "preactresnet18", num_classes=10, in_chans=1, mean=[0.0], std=[1.0], width=width
    ).network


def bench(
    folder: Path,
    digits: Dataset,
    *,
    attack: str = "badnet",
    label_of: Labels = to_target,
    prefix: str = "",
    info: Any = None,
    **options: Any,
) -> Path:
    """Make a record of 144 poisoned training images and 60 triggered test images."""
    folder.mkdir(parents=True)
    test = [i for i in range(70) if int(digits.test.labels[i]) != TARGET][:60]
    content = {
        "model_name": "preactresnet18",
        "num_classes": 10,
        "model": OrderedDict(
            (prefix + name, value) for name, value in network().state_dict().items()
        ),
        "data_path": "./data/digits",
        "img_size": (SIDE, SIDE, 1),
        "clean_data": "digits",
        "bd_train": split(
            folder, "bd_train", list(range(0, 1440, 10)), digits.train, label_of, **options
        ),
        "bd_test": split(folder, "bd_test", test, digits.test, to_target, **options),
    }
    torch.save(content, folder / "attack_result.pt")
    settings = {
        "attack": attack,
        "pratio": 0.1,
        "batch_size": 100,
        "random_seed": 4,
        "img_size": (SIDE, SIDE, 1),
        "save_path": "/home/someone/record/X",
    }
    torch.save({**settings, "mean": [0.3], "std": [0.3], **(info or {})}, folder / "info.pickle")
    return folder


def change(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Load a file that this test wrote without safety checks, change it, and write it back."""
    content = torch.load(folder / "attack_result.pt", weights_only=False)
    torch.save(edit(content) or content, folder / "attack_result.pt")


def named_as_numpy_1(file: Path) -> None:
    """Rewrite a file as numpy 1 would have written it."""
    with zipfile.ZipFile(file) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    assert any(
        b"cnumpy._core.multiarray\n" in data for name, data in entries if name.endswith("data.pkl")
    )
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries:
            archive.writestr(
                name,
                (
                    data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
                    if name.endswith("data.pkl")
                    else data
                ),
            )


def bring(folder: Path, name: str = "got", *flags: str) -> int:
    return main(
        ["import", "--from", "backdoorbench", str(folder), "--save_folder_name", name, *flags]
    )


def got(tmp_path: Path, name: str = "got") -> Record:
    return Record.load(name, tmp_path / "record")


def test_the_fixture_is_in_the_layout(digits: Dataset, tmp_path: Path) -> None:
    content = torch.load(bench(tmp_path / "X", digits) / "attack_result.pt", weights_only=False)
    assert (
        len(content["model"]) == 102
        and type(next(iter(content["bd_train"]["bd_data_container"]["data_dict"]))) is np.int64
    )
    assert (
        content["bd_train"]["poison_indicator"].dtype == np.float64
        and len(content["bd_test"]["original_index_array"]) == 60
    )


@pytest.mark.parametrize(
    ("style", "key", "numpy"),
    [
        ("./record/X", np.int64, 2),
        ("./record/X", np.int64, 1),
        ("../record/X", np.int64, 1),
        ("./record/X", int, 1),
        ("../record/X", int, 2),
        ("/home/recordings/record/X", np.int64, 2),
        ("..\\record\\X", int, 2),
    ],
)
def test_every_way_of_writing_one_is_read(
    digits: Dataset, tmp_path: Path, style: str, key: Any, numpy: int
) -> None:
    folder = bench(
        tmp_path / "moved" / "and renamed",
        digits,
        style=style,
        key=key,
        prefix="module." if numpy == 1 else "",
    )
    if numpy == 1:
        named_as_numpy_1(folder / "attack_result.pt")
    assert bring(folder) == 0
    record = got(tmp_path)
    assert torch.equal(record.train_poison.index, torch.arange(0, 1440, 10)) and set(
        record.train_poison.labels.tolist()
    ) == {TARGET}
    assert torch.equal(record.train_poison.original_labels, digits.train.labels[:1440:10])
    for k in (0, 70, 143):
        assert np.array_equal(
            record.train_poison.images[k, 0].numpy(), stamped(digits.train.images[10 * k])
        )
    assert len(record.test_poison) == 60 and TARGET not in record.test_poison.original_labels
    assert (record.train_poison.kind == POISON).all(), (
        "also those of the target class, whose label stays"
    )
    weights = network().state_dict()
    assert all(
        torch.equal(weights[name], value)
        for name, value in record.model().network.state_dict().items()
    )
    info = record.info
    assert (
        info["attack"],
        info["target"],
        info["seed"],
        info["poisoned"],
        info["num_classes"],
    ) == ("badnet", TARGET, 4, 144, 10)
    assert info["architecture"] == {
        "name": "preactresnet18",
        "width": 4,
        "mean": [0.3],
        "std": [0.3],
        "stem": "small",
    }
    assert "someone" not in (record.folder / "record.json").read_text(), (
        "no path of another machine"
    )


def test_images_kept_in_memory_are_read_without_pillow(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bench(tmp_path / "X", digits, in_memory=True)

    def called(*_arguments: Any) -> None:
        raise AssertionError("Pillow was handed a stranger's state")

    monkeypatch.setattr(Image.Image, "__setstate__", called)
    assert bring(folder) == 0
    assert np.array_equal(
        got(tmp_path).train_poison.images[7, 0].numpy(), stamped(digits.train.images[70])
    )


def of_the_first(index: int) -> bool:
    """Return whether an index is among the first 30 % of its batch: 100 images, at the end of the
    1,442 images 42."""
    return index % 100 < (12 if index >= 1400 else 30)


def kept_outside_of_the_first(index: int, original: int) -> int:
    return TARGET if of_the_first(index) else original


def test_cross_images_are_told_from_poison(
    digits: Dataset, tmp_path: Path, capsys: Capture
) -> None:
    """Of the marked images 0, 10, ..., 1430 only those at the start of a batch are poison, some of
    which are of the target class."""
    kinds, said = {}, {}
    for attack in ("wanet", "bpp", None):
        name = str(attack)
        folder = bench(
            tmp_path / name,
            digits,
            label_of=kept_outside_of_the_first,
            info={"attack": attack, "pratio": 0.3},
        )
        assert bring(folder, name) == 0
        kinds[attack], said[attack] = got(tmp_path, name).train_poison, capsys.readouterr().err
    first = torch.tensor([of_the_first(index) for index in kinds["wanet"].index.tolist()])
    own = kinds["wanet"].original_labels == TARGET
    assert (first & own).any() and (~first & own).any(), "the hard cases are there"
    assert not first[-2] and kinds["wanet"].index[-2] == 1420, "and so is the smaller batch"
    assert torch.equal(kinds["wanet"].kind == POISON, first) and torch.equal(
        kinds["wanet"].kind == CROSS, ~first
    )
    assert (
        got(tmp_path, "wanet").info["poisoned"] == int(first.sum())
        and "keep their label" not in said["wanet"]
    )
    for attack in ("bpp", None):
        assert torch.equal(kinds[attack].kind == POISON, first & ~own), (
            "nothing says which images of the target class are poison"
        )
        assert (
            f"{int(own.sum())} marked training images of the target class keep their label"
            in said[attack]
        )


@pytest.mark.parametrize(
    ("attack", "label_of"),
    [("sig", lambda _, original: original), ("badnet", to_target)],
    ids=["clean-label", "dirty-label"],
)
def test_a_static_attack_marks_only_poison(
    attack: str, label_of: Labels, digits: Dataset, tmp_path: Path
) -> None:
    assert bring(bench(tmp_path / "X", digits, attack=attack, label_of=label_of)) == 0
    poison = got(tmp_path).train_poison
    assert (poison.labels == poison.original_labels).any() and (poison.kind == POISON).all()


def test_only_one_of_two_data_sets_of_a_name_can_be_meant(
    digits: Dataset, tmp_path: Path, capsys: Capture
) -> None:
    """A record has no clean images, so two data sets with the same labels cannot be told apart."""
    from test_foreign import write_images

    for folder, images in (
        ("plain", digits),
        (
            "inverted",
            replace(digits, train=replace(digits.train, images=255 - digits.train.images)),
        ),
    ):
        for part, clean in (("train", images.train), ("test", images.test)):
            write_images(tmp_path / folder / part, clean, lambda i: f"{i:04}")
    mine = load_dataset("twins", str(tmp_path / "plain"))
    assert bring(bench(tmp_path / "X", mine), "one", "--dataset", "twins") == 0, "the control"
    load_dataset("twins", str(tmp_path / "inverted"))
    assert bring(tmp_path / "X", "two", "--dataset", "twins") == 2
    assert "the cache has 2 data sets called twins" in complaint(capsys.readouterr().err)
    assert bring(tmp_path / "X", "two", "--dataset_path", str(tmp_path / "plain")) == 0


def test_an_export_that_nobody_could_read_is_refused(
    tiny: Record, tmp_path: Path, capsys: Capture
) -> None:
    record = helpers.copy(tiny, tmp_path / "record")
    helpers.edit_json(
        record.folder / "record.json", dataset={**record.info["dataset"], "name": "my data"}
    )
    assert main(["export", "tiny", "--to", "backdoorbench", str(tmp_path / "out")]) == 2
    assert (
        "the name of the data set" in complaint(capsys.readouterr().err)
        and not (tmp_path / "out").exists()
    )
    with pytest.raises(UserError, match="hold square images, these are 16x20"):
        backdoorbench.refuse_foreign_shapes("digits", 16, 20)
    backdoorbench.refuse_foreign_shapes("digits", 16, 16)


def test_augmentation_goes_out_and_comes_back(small_flags: tuple[str, ...], tmp_path: Path) -> None:
    helpers.attack(
        "badnet", "made", tmp_path / "record", *small_flags, "--crop_padding", "1", "--flip", "True"
    )
    assert main(["export", "made", "--to", "backdoorbench", str(tmp_path / "given")]) == 0
    assert bring(tmp_path / "given") == 0
    assert {key: got(tmp_path).info["config"][key] for key in ("crop_padding", "flip")} == {
        "crop_padding": 1,
        "flip": True,
    }
    assert bring(tmp_path / "given", "other", "--flip", "False") == 0
    assert got(tmp_path, "other").info["config"]["flip"] is False


def test_an_attack_without_a_training_set(digits: Dataset, tmp_path: Path, capsys: Capture) -> None:
    folder = bench(tmp_path / "X", digits, attack="blind")
    change(folder, lambda content: content.update(bd_train=None))
    assert bring(folder) == 0
    assert "stored no poisoned training set" in capsys.readouterr().err
    assert main(["defense", "dau", "--result_file", "got"]) == 2
    assert "was imported without its training set, which this defense needs" in complaint(
        capsys.readouterr().err
    )
    assert main(["defense", "ft", "--result_file", "got", "--epochs", "1"]) == 0
    assert main(["scan", "got"]) == 2


def test_a_record_goes_out_and_comes_back_equal(backdoored: Record, tmp_path: Path) -> None:
    record = helpers.copy(backdoored, tmp_path / "record")
    out = tmp_path / "bb" / "record" / "given"
    assert main(["export", "--to", "backdoorbench", record.name, str(out)]) == 0
    assert bring(out) == 0
    again = got(tmp_path)
    for mine, other in (
        (record.train_poison, again.train_poison),
        (record.test_poison, again.test_poison),
    ):
        for field in fields(mine):
            assert torch.equal(getattr(mine, field.name), getattr(other, field.name)), field.name
    first, second = record.model().state_dict(), again.model().state_dict()
    assert first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )
    for key in ("attack", "dataset", "num_classes", "target", "seed", "poisoned"):
        assert {
            **again.info,
            "dataset": {**again.info["dataset"], "image_size": None, "grey": None},
        }[key] == record.info[key], key
    assert again.info["scores"] == record.info["scores"] and record.info["scores"]["asr"] > 0.9


def test_an_imported_record_shows_the_last_numbers_of_the_other_benchmark(
    backdoored: Record, tmp_path: Path
) -> None:
    """Those of a plain fp32 pass over its files, equal to the image, whatever surrounds ours."""
    record = helpers.copy(backdoored, tmp_path / "record")
    out = tmp_path / "given"
    assert main(["export", "--to", "backdoorbench", record.name, str(out)]) == 0

    # Its triggered test images are PNGs, each with the attacker's and the original label.
    content = torch.load(out / "attack_result.pt", weights_only=False)
    stored = content["bd_test"]["bd_data_container"]["data_dict"].values()
    files = [out.joinpath(*entry["path"].split("/")[-3:]) for entry in stored]
    images = torch.from_numpy(np.stack([np.array(Image.open(file)) for file in files]))[:, None]
    attacked, original = torch.tensor([entry["other_info"] for entry in stored]).T

    model = record.model()
    network = model.network.eval()
    network.load_state_dict(content["model"])
    with torch.no_grad():
        answers = network((images / 255 - model.mean) / model.std).argmax(1)
    asr, robust = (int((answers == labels).sum()) for labels in (attacked, original))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert bring(out) == 0
    scores = got(tmp_path).info["scores"]
    assert scores["asr"] * len(images) == pytest.approx(asr, abs=1e-6)
    assert scores["robust_accuracy"] * len(images) == pytest.approx(robust, abs=1e-6)
    assert 0.9 * len(images) < asr, "it has a backdoor"


def test_what_goes_out_is_in_the_layout(tiny: Record, tmp_path: Path, capsys: Capture) -> None:
    helpers.copy(tiny, tmp_path / "record")
    out = tmp_path / "record_of_theirs" / "given"
    assert main(["export", "--to", "backdoorbench", "tiny", str(out)]) == 0
    assert "copy it there" in capsys.readouterr().out
    with zipfile.ZipFile(out / "attack_result.pt") as archive:
        assert b"numpy._core" not in archive.read("archive/data.pkl"), (
            "numpy 1 has no module of that name"
        )
    content = torch.load(out / "attack_result.pt", weights_only=False)
    assert list(content) == [
        "model_name",
        "num_classes",
        "model",
        "data_path",
        "img_size",
        "clean_data",
        "bd_train",
        "bd_test",
    ]
    assert (
        list(content["model"]) == list(tiny.model().network.state_dict())
        and content["img_size"] == (16, 16, 1)
        and "data" in content["data_path"]
    )
    for part, poison, size in (
        ("bd_train", tiny.train_poison, 1442),
        ("bd_test", tiny.test_poison, 355),
    ):
        found = content[part]
        stored = found["bd_data_container"]["data_dict"]
        assert list(stored) == poison.index.tolist() and all(type(key) is int for key in stored)
        assert found["poison_indicator"].dtype == np.float64 and found[
            "poison_indicator"
        ].shape == (size,)
        assert np.array_equal(np.flatnonzero(found["poison_indicator"]), poison.index.numpy())
        assert found["original_index_array"].dtype == np.int64 and len(
            found["original_index_array"]
        ) == (size if part == "bd_train" else len(poison))
        index, original = int(poison.index[5]), int(poison.original_labels[5])
        assert stored[index] == {
            "path": f"./record/given/{part}_dataset/{original}/{index}.png",
            "other_info": [int(poison.labels[5]), original],
        }
        with Image.open(out / f"{part}_dataset" / str(original) / f"{index}.png") as image:
            assert np.array_equal(np.asarray(image), poison.images[5, 0].numpy())
    assert torch.load(out / "info.pickle", weights_only=True)["pratio"] == pytest.approx(
        0.1, abs=1e-3
    )
    assert {path.name for path in out.parent.iterdir()} == {"given"}, "no stage is left"


@pytest.mark.parametrize(
    ("attack", "own"),
    [
        ("tact", ()),
        ("wanet", ("--plain", "False")),
        ("inputaware", ("--plain", "False", "--mask_epochs", "0", "--generator_width", "4")),
    ],
)
def test_cross_images_come_back_as_such_and_those_whom_the_attack_is_not_meant_for_stay_at_home(
    attack: str, own: tuple[str, ...], tmp_path: Path, capsys: Capture
) -> None:
    """BackdoorBench's attack of that name poisons the first images of a batch, ours random ones."""
    flags = (
        "--width",
        "64",
        "--image_size",
        "8",
        "--epochs",
        "0",
        "--model",
        "preactresnet18",
        "--score_every",
        "0",
    )
    record = helpers.attack(attack, "made", tmp_path / "record", *flags, *own)
    assert main(["export", "made", "--to", "backdoorbench", str(tmp_path / "given")]) == 0
    assert bring(tmp_path / "given") == 0
    back = got(tmp_path)
    for column in fields(record.train_poison):
        assert torch.equal(
            getattr(back.train_poison, column.name), getattr(record.train_poison, column.name)
        ), column.name
    assert (
        0 < int((back.train_poison.kind == CROSS).sum()) < len(back.train_poison)
        and back.info["poisoned"] == record.info["poisoned"]
    )
    assert (
        "backdoorlab_cross" not in (back.folder / "record.json").read_text()
        and "counted as cross" not in capsys.readouterr().err
    )
    assert torch.equal(back.test_poison.index, record.test_poison.of_kind(POISON).index)


def test_nothing_is_overwritten_unasked(tiny: Record, tmp_path: Path, capsys: Capture) -> None:
    helpers.copy(tiny, tmp_path / "record")
    out = tmp_path / "given"
    export = ["export", "tiny", "--to", "backdoorbench", str(out)]
    assert main(export) == 0
    before = reading.sha256(out / "attack_result.pt")
    assert main(export) == 2
    assert "pass --overwrite True" in complaint(capsys.readouterr().err)
    assert (
        main([*export, "--overwrite", "True"]) == 0
        and reading.sha256(out / "attack_result.pt") == before
    ), "and it is the same again"
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.png").write_bytes(b"x")
    assert main([*export[:-1], str(tmp_path / "photos"), "--overwrite", "True"]) == 2
    assert (
        "not ours to replace" in complaint(capsys.readouterr().err)
        and (tmp_path / "photos" / "holiday.png").exists()
    )
    record = reading.sha256(tmp_path / "record" / "tiny" / "record.json")
    assert bring(out, "tiny") == 2
    assert "exists and is finished: choose another name" in complaint(capsys.readouterr().err)
    assert reading.sha256(tmp_path / "record" / "tiny" / "record.json") == record
    assert (
        bring(out, "tiny", "--overwrite", "True") == 0
        and "source" in Record.load("tiny", tmp_path / "record").info
    )
    stage = tmp_path / "record" / "other.partial"
    stage.mkdir()
    (stage / "checkpoint-train.safetensors").write_bytes(b"x")
    assert bring(out, "other") == 2
    assert (
        "holds an unfinished run" in complaint(capsys.readouterr().err)
        and (stage / "checkpoint-train.safetensors").exists()
    )


def test_an_export_does_not_delete_what_it_did_not_write(
    tiny: Record, tmp_path: Path, capsys: Capture
) -> None:
    helpers.copy(tiny, tmp_path / "record")
    out = tmp_path / "given"
    export = ["export", "tiny", "--to", "backdoorbench", str(out), "--overwrite", "True"]
    assert main(export) == 0
    precious = out / "defense" / "anp" / "defense_result.pt"
    precious.parent.mkdir(parents=True)
    precious.write_bytes(b"hours of work")
    assert main(export) == 2
    assert (
        f"{precious} is not part of an export" in complaint(capsys.readouterr().err)
        and precious.read_bytes() == b"hours of work"
    )
    precious.unlink()
    assert main(export) == 0, "a control"


QUICK = {
    "abl": ("--isolation_epochs", "2", "--finetune_epochs", "10", "--unlearn_epochs", "1"),
    "anp": ("--iterations", "5"),
    "asd": (
        "--stage1_epochs",
        "1",
        "--stage2_epochs",
        "1",
        "--stage3_epochs",
        "1",
        "--iterations",
        "2",
    ),
    "bti_dbf": (
        *("--rounds", "1", "--generator_width", "2", "--identity_epochs", "1"),
        *("--mask_epochs", "1", "--invert_epochs", "1", "--unlearn_epochs", "1"),
    ),
    "bu": ("--search_epochs", "1"),
    "dau": (),
    "dbr": ("--train_epochs", "2", "--apart_epochs", "2", "--epochs", "2"),
    "fp": ("--epochs", "1"),
    "fst": ("--batch_size", "24"),  # its last layer begins anew
    "ft": ("--epochs", "1"),
    "ft_sam": ("--epochs", "1"),
    "ibau": ("--n_rounds", "1"),
    "nad": ("--teacher_epochs", "1", "--epochs", "1"),
    "nc": ("--search_epochs", "2", "--epochs", "1"),
    "npd": ("--epochs", "1"),
    "rnp": ("--unlearn_epochs", "2", "--recover_epochs", "2"),
    "sau": ("--n_rounds", "2"),
}


@pytest.mark.parametrize("method", sorted(methods.with_role("defense")))
def test_an_imported_record_runs_under_every_defense(
    method: str, backdoored: Record, tmp_path: Path
) -> None:
    helpers.copy(backdoored, tmp_path / "record")
    assert main(["export", backdoored.name, "--to", "backdoorbench", str(tmp_path / "given")]) == 0
    assert bring(tmp_path / "given") == 0
    result = helpers.defend(method, got(tmp_path), "--score_every", "0", *QUICK.get(method, ()))
    assert result is not None and result["before"]["asr"] > 0.9
    assert method == "asd" or result["after"]["clean_accuracy"] > 0.5, (
        "ASD trains anew, and had no time to"
    )
    if method == "dau":
        assert result["after"]["asr"] < 0.3 and result["split"]["tpr"] > 0.8
        direct = helpers.defend(
            "dau", Record.load(backdoored.name, tmp_path / "record"), "--score_every", "0"
        )
        assert direct is not None and direct["after"] == result["after"], (
            "the detour changes nothing"
        )


# --- attacks by files


class Payload:
    """Object that creates a file when it is unpickled without safety checks."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (Path.touch, (self.canary,))


class Evaluated(Payload):
    def __reduce__(self) -> Any:
        return (eval, (f"__import__('pathlib').Path({str(self.canary)!r}).touch()",))


class System(Payload):
    def __reduce__(self) -> Any:
        import os

        return (os.system, (f"touch '{self.canary}'",))


def in_weights(content: dict[str, Any], payload: Any) -> Any:
    content["model"]["conv1.weight"] = payload


def in_labels(content: dict[str, Any], payload: Any) -> Any:
    next(iter(content["bd_train"]["bd_data_container"]["data_dict"].values()))["other_info"] = [
        payload,
        1,
    ]


def in_objects(content: dict[str, Any], payload: Any) -> Any:
    content["bd_train"]["poison_indicator"] = np.array([payload, 1.0], dtype=object)


def as_attribute(content: dict[str, Any], payload: Any) -> Any:
    content["model"].__dict__["_metadata"] = payload


def as_a_whole(_content: dict[str, Any], payload: Any) -> Any:
    return payload


def as_a_key_beside(content: dict[str, Any], payload: Any) -> Any:
    content["comment"] = payload


PLACES = [in_weights, in_labels, in_objects, as_attribute, as_a_whole, as_a_key_beside]


def zipped(value: Any, file: Path) -> None:
    torch.save(value, file)


def legacy(value: Any, file: Path) -> None:
    torch.save(value, file, _use_new_zipfile_serialization=False)


def newer(value: Any, file: Path) -> None:
    torch.save(value, file, pickle_protocol=4)


def bare(value: Any, file: Path) -> None:
    file.write_bytes(pickle.dumps(value, protocol=0))


def opened(file: Path) -> None:
    """Load a file without safety checks, as a control."""
    try:
        torch.load(file, weights_only=False)
    except Exception:
        pickle.loads(file.read_bytes())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("form", [zipped, legacy, newer, bare])
@pytest.mark.parametrize("kind", [Payload, Evaluated, System])
def test_a_payload_does_not_run(
    place: Any, form: Any, kind: Any, digits: Dataset, tmp_path: Path, capsys: Capture
) -> None:
    canary, control = tmp_path / "canary", tmp_path / "control"
    folder = tmp_path / "X"
    folder.mkdir()
    for payload, file in (
        (kind(canary), folder / "attack_result.pt"),
        (kind(control), tmp_path / "control.pt"),
    ):
        content = {
            "model": OrderedDict({"conv1.weight": torch.zeros(2)}),
            "bd_train": {"bd_data_container": {"data_dict": {1: {"path": "a/b/c"}}}},
        }
        form(place(content, payload) or content, file)
    opened(tmp_path / "control.pt")
    assert control.exists(), "the control: a careless reader runs it"
    assert bring(folder) == 2
    assert "attack_result.pt: refused" in complaint(capsys.readouterr().err)
    assert (
        main(
            [
                "import",
                "--weights",
                str(folder / "attack_result.pt"),
                "--architecture",
                "resnet18",
                "--dataset",
                "digits",
                "--save_folder_name",
                "w",
            ]
        )
        == 2
    )
    assert "refused" in complaint(capsys.readouterr().err)
    assert (
        not canary.exists()
        and not (tmp_path / "record" / "got").exists()
        and not list((tmp_path / "record").glob("*"))
    )


def test_a_payload_in_the_settings_does_not_run(
    digits: Dataset, tmp_path: Path, capsys: Capture
) -> None:
    folder = bench(tmp_path / "X", digits)
    torch.save({"attack": System(tmp_path / "canary")}, folder / "info.pickle")
    assert bring(folder) == 2
    assert "info.pickle: refused, nothing of it was run: it names posix.system" in complaint(
        capsys.readouterr().err
    )
    assert not (tmp_path / "canary").exists()


def test_what_is_looked_at_is_what_is_read(tmp_path: Path) -> None:
    """Our check finds an archive by its end, torch by its beginning, where another file could
    be."""
    old, new = io.BytesIO(), io.BytesIO()
    torch.save({"a": torch.device("cpu")}, old, _use_new_zipfile_serialization=False)
    torch.save({"a": 1}, new)
    file = tmp_path / "both.pt"
    for before in (old.getvalue(), new.getvalue(), b"x"):
        file.write_bytes(before + new.getvalue())
        assert zipfile.is_zipfile(file), "as far as its end goes"
        with pytest.raises(
            UserError, match=r"refused: (not the zip archive|something stands before the archive)"
        ):
            pickles.load(file)
    file.write_bytes(new.getvalue())
    assert pickles.load(file) == {"a": 1}, "a control"


def test_names_that_others_allowed_are_not_allowed_here(tmp_path: Path) -> None:
    import argparse

    torch.serialization.add_safe_globals([argparse.Namespace])
    try:
        torch.save({"a": argparse.Namespace(x=1)}, tmp_path / "a.pt")
        assert torch.load(tmp_path / "a.pt", weights_only=True)["a"].x == 1, (
            "the control: torch itself takes it now"
        )
        with pytest.raises(ValueError, match=r"it names argparse.Namespace"):
            pickles.load(tmp_path / "a.pt")
        torch.save({"a": 1}, tmp_path / "b.pt")
        assert (
            pickles.load(tmp_path / "b.pt") == {"a": 1}
            and argparse.Namespace in torch.serialization.get_safe_globals()
        )
    finally:
        torch.serialization.clear_safe_globals()


def repacked(
    folder: Path,
    compression: int,
    edit: Callable[[str, bytes], bytes] = lambda _name, data: data,
    twice: bool = False,
) -> None:
    file = folder / "attack_result.pt"
    with zipfile.ZipFile(file) as archive:
        entries = [(name, edit(name, archive.read(name))) for name in archive.namelist()]
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in entries:
            archive.writestr(name, data)
        if twice:
            name, data = next(entry for entry in entries if not entry[0].endswith(".pkl"))
            archive.writestr(name.upper(), data)  # torch looks names up without their case


def first_entry(content: dict[str, Any], part: str = "bd_train") -> dict[str, Any]:
    return next(iter(content[part]["bd_data_container"]["data_dict"].values()))


def bomb(width: int, height: int) -> bytes:
    """Make a PNG that claims a size, with almost no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + chunk(b"IDAT", zlib.compress(bytes(10_000)))
        + chunk(b"IEND", b"")
    )


def damage_png(data: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / "bd_train_dataset" / "0" / "0.png").write_bytes(data)


def wide(content: dict[str, Any]) -> None:
    content["model"]["conv1.weight"] = torch.zeros(1).expand(100_000, 1, 3, 3)


def edit_of(change_content: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    return lambda folder: change(folder, change_content)


def update(part: str, **values: Any) -> Callable[[Path], Any]:
    return edit_of(lambda content: content[part].update(values))


def entry(**values: Any) -> Callable[[Path], Any]:
    return edit_of(lambda content: first_entry(content).update(values))


def linked(folder: Path) -> None:
    place = folder / "bd_train_dataset" / "0" / "0.png"
    outside = folder.parent / "outside.png"
    shutil.move(place, outside)
    place.symlink_to(outside)


MISTAKES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no file": (lambda f: (f / "attack_result.pt").unlink(), "expected a BackdoorBench record, a folder with"),
    "no zip": (lambda f: (f / "attack_result.pt").write_bytes(b"hello"), "attack_result.pt: refused: not the zip archive"),
    "cut": (lambda f: (f / "attack_result.pt").write_bytes((f / "attack_result.pt").read_bytes()[:-100]), "attack_result.pt: "),
    "compressed": (lambda f: repacked(f, zipfile.ZIP_DEFLATED), "an archive with compressed or repeated entries"),
    "repeated": (lambda f: repacked(f, zipfile.ZIP_STORED, twice=True), "an archive with compressed or repeated entries"),
    "v1": (edit_of(lambda c: c.update(bd_train={"x": [], "y": [], "original_index": []})), "a record of BackdoorBench v1 (images in lists)"),
    "a list": (edit_of(lambda _: [1]), "expected a dict with model_name"),
    "a key less": (edit_of(lambda c: c.pop("img_size") and None), "not a BackdoorBench v2 record: no img_size in it"),
    "weights": (edit_of(lambda c: c.update(model={"a": 1})), "expected a state dict (names -> tensors), found a dict with 'a'"),
    "other weights": (edit_of(lambda c: c["model"].update({"linear.bias": torch.zeros(7)})), "1 of another shape: linear.bias (7,) instead of (10,)"),
    "expanded weights": (edit_of(wide), "claims shape (100000, 1, 3, 3), more than the file holds"),
    "unknown network": (edit_of(lambda c: c.update(model_name="nonet")), "unknown model 'nonet'"),
    "network as code": (edit_of(lambda c: c.update(model_name="../x")), "model_name must be a name"),
    "classes": (edit_of(lambda c: c.update(num_classes=12)), "the record has 12 classes, digits has 10"),
    "data set": (edit_of(lambda c: c.update(clean_data="celeba")), "unknown data set 'celeba'"),
    "size": (edit_of(lambda c: c.update(img_size=(SIDE, SIDE))), "img_size must be (height, width, channels)"),
    "size of files": (edit_of(lambda c: c.update(img_size=(17, 17, 1))), "a picture of 16x16, expected 17x17 as in img_size"),
    "huge": (edit_of(lambda c: c.update(img_size=(5000, 5000, 1))), "img_size must be a whole number in 1..4096"),
    "claims": (edit_of(lambda c: c["bd_train"].update(poison_indicator=np.zeros(10**6)) or c.update(img_size=(4096, 4096, 3))), "GiB of images"),
    "marks": (update("bd_train", poison_indicator=np.full(1442, 2.0)), "poison_indicator must be a row of 0 and 1"),
    "marks as list": (update("bd_train", poison_indicator=[0.0, 1.0]), "expected poison_indicator as a row of numbers in a numpy array"),
    "marks as objects": (update("bd_train", poison_indicator=np.array([0, 1], dtype=object)), "refused by the safe loader (an array of type 'O8'"),
    "positions": (update("bd_test", original_index_array=np.array([1000])), "original_index_array must hold positions in 0..354"),
    "part of a set": (update("bd_train", original_index_array=np.arange(10)), "only 10 of 1,442 training images are in it"),
    "no files named": (update("bd_train", bd_data_container={}), "expected bd_data_container with a data_dict"),
    "file not named": (edit_of(lambda c: c["bd_train"]["bd_data_container"].update(data_dict={})), "is marked as poisoned, but no file is named"),
    "index": (edit_of(lambda c: c["bd_train"]["bd_data_container"]["data_dict"].update({1442: {}})), "must be a whole number in 0..1441"),
    "text index": (edit_of(lambda c: c["bd_train"]["bd_data_container"]["data_dict"].update(a={})), "an index of data_dict must be a whole number"),
    "label": (entry(other_info=[10, 0]), "a label must be a whole number in 0..9, found 10"),
    "label below": (entry(other_info=[0, -1]), "a label must be a whole number in 0..9, found -1"),
    "label true": (entry(other_info=[True, 0]), "a label must be a whole number in 0..9, found True"),
    "no labels": (entry(other_info=None), "expected a path and other_info"),
    "path up": (entry(path="./record/X/../../etc/passwd/.."), "does not end in <folder>/<label>/<index>.png"),
    "path with dots": (entry(path="record/../../0.png"), "does not end in <folder>/<label>/<index>.png"),
    "short path": (entry(path="0.png"), "does not end in <folder>/<label>/<index>.png"),
    "missing png": (lambda f: (f / "bd_train_dataset" / "0" / "0.png").unlink(), "0.png: missing, but attack_result.pt names it"),
    "linked png": (linked, "it leads out of the record"),
    "png bomb": (damage_png(bomb(30_000, 30_000)), "a picture of 30000x30000, expected 16x16"),
    "large png": (damage_png(bomb(SIDE, SIDE) + bytes(200_000)), "bytes are too many for a PNG of 16x16"),
    "no png": (damage_png(b"GIF89a" + bytes(100)), "0.png: not a PNG file"),
    "cut png": (damage_png(bomb(SIDE, SIDE)[:50]), "0.png: damaged PNG"),
    "other order": (entry(other_info=[TARGET, 7]), "1 of 144 poisoned training images have another true label in the record than in digits"),
    "other size of data": (
        update("bd_train", poison_indicator=np.zeros(1000), original_index_array=np.arange(1000), bd_data_container={"data_dict": {}}),
        "the record was made on 1,000 training images, digits has 1,442",
    ),
    "cross that are no list": (lambda f: torch.save({"backdoorlab_cross": 1}, f / "info.pickle"), "must be a list of positions, found int"),
    "cross below": (lambda f: torch.save({"backdoorlab_cross": [-1]}, f / "info.pickle"), "backdoorlab_cross must be a whole number"),
    "cross that is not there": (lambda f: torch.save({"backdoorlab_cross": [5]}, f / "info.pickle"), "names image 5, which is not marked"),
    "cross of another label": (lambda f: torch.save({"backdoorlab_cross": [0]}, f / "info.pickle"), "or does not keep its label"),
    "settings": (lambda f: torch.save([1], f / "info.pickle"), "info.pickle: expected a dict of settings, found list"),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bench(tmp_path_factory.mktemp("bench") / "X", digits)


@pytest.mark.parametrize("mistake", sorted(MISTAKES))
def test_a_mistake_in_a_record_is_one_line(
    mistake: str, whole: Path, tmp_path: Path, capsys: Capture
) -> None:
    damage, message = MISTAKES[mistake]
    folder = tmp_path / "X"
    shutil.copytree(whole, folder)
    damage(folder)
    assert bring(folder) == 2
    assert message in complaint(capsys.readouterr().err)
    assert not (tmp_path / "record").exists() or not list((tmp_path / "record").iterdir()), (
        "nothing is left behind"
    )


def test_the_undamaged_record_is_read(whole: Path) -> None:
    """Control of the mistakes above."""
    assert bring(whole) == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["import"], "--save_folder_name NAME is missing"),
        (["import", "--save_folder_name", "../x"], "a record name is one folder name"),
        (["import", "--save_folder_name", "x", "--from", "backdoorbench"], "is missing its PATH"),
        (
            ["import", "--save_folder_name", "x", "--from", "backdoorbox", "p"],
            "invalid choice 'backdoorbox'",
        ),
        (["import", "p", "--save_folder_name", "x"], "p: say what it is, --from backdoorbench"),
        (
            [
                "import",
                "p",
                "--save_folder_name",
                "x",
                "--from",
                "backdoorbench",
                "--weights",
                "w.pt",
            ],
            "--weights does not go with --from",
        ),
        (
            ["import", "p", "--save_folder_name", "x", "--from", "backdoorbench"],
            "expected a BackdoorBench record",
        ),
        (["export"], "NAME is missing"),
        (["export", "tiny"], "say what to export"),
        (["export", "tiny", "--to", "backdoorbench"], "is missing its PATH"),
        (["export", "tinny", "--to", "backdoorbench", "p"], "no record 'tinny'"),
        (
            ["export", "tiny", "p", "--to", "backdoorbench", "--defense", "dau"],
            "--defense goes with --weights",
        ),
        (["export", "tiny", "--weights", "w.pt"], "expected a file that ends in .safetensors"),
        (["export", "tiny", "--weights", "/no/such/w.safetensors"], "in a folder that exists"),
        (
            ["export", "tiny", "--weights", "w.safetensors", "--defense", "dau"],
            "has no finished run 'seed0' of 'dau'. Finished: none yet",
        ),
        (["scan"], "NAME is missing"),
        (["scan", "tiny", "--run_name", "long"], "has no finished run 'long' of dau"),
        (["scan", "tiny", "--detector", "los"], "Did you mean 'loss'?"),
        (["scan", "tiny", "--detector", "ft"], "--detector ft: expected one of dau, activation_"),
        (["scan", "tiny", "--detector", "loss", "--run_name", "x"], "finished run 'x' of loss"),
    ],
)
def test_a_mistake_in_a_command_is_one_line(
    argv: list[str], message: str, tiny: Record, tmp_path: Path, capsys: Capture
) -> None:
    helpers.copy(tiny, tmp_path / "record")
    assert main(argv) == 2
    assert message in complaint(capsys.readouterr().err)
    assert [entry.name for entry in (tmp_path / "record").iterdir()] == ["tiny"]


def test_big_endian_and_fortran_arrays_are_read(tmp_path: Path) -> None:
    wanted = {
        "a": np.arange(6, dtype=">i8").reshape(2, 3),
        "b": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "c": np.array([True, False]),
    }
    with_scalars: dict[Any, Any] = {**wanted, np.int32(5): np.float32(0.5)}
    torch.save(with_scalars, tmp_path / "a.pt")
    found = pickles.load(tmp_path / "a.pt")
    assert all(np.array_equal(found[key].values, value) for key, value in wanted.items())
    assert found[5] == 0.5 and type(found[5]) is float
    stream = io.BytesIO(pickles.dump(wanted))
    assert all(
        np.array_equal(value, wanted[key])
        for key, value in torch.load(stream, weights_only=False).items()
    )


def test_no_other_way_to_unpickle_is_in_the_package() -> None:
    found = []
    for file in [
        *(helpers.CHECKOUT / "backdoorlab").rglob("*.py"),
        *(helpers.CHECKOUT / "defense").glob("*.py"),
        *(helpers.CHECKOUT / "attack").glob("*.py"),
    ]:
        for pattern in (
            "weights_only=False",
            "pickle.load",
            "pickle.Unpickler",
            "allow_pickle=True",
            "torch.load(",
            "torch.jit.load",
            "marshal",
        ):
            found += [(file.name, pattern)] if pattern in file.read_text() else []
    assert found == [("pickles.py", "torch.load(")], "one call, with weights_only=True"


def test_a_data_set_of_that_name_in_the_cache_is_taken_if_it_fits(
    digits: Dataset, tmp_path: Path, capsys: Capture
) -> None:
    from test_foreign import write_images

    for part, clean in (("train", digits.train), ("test", digits.test)):
        write_images(tmp_path / "data" / part, clean, lambda i: f"{i:04}")
    mine = load_dataset("mine", str(tmp_path / "data"))
    assert not torch.equal(mine.train.labels, digits.train.labels), (
        "the same images in another order"
    )
    assert bring(bench(tmp_path / "wrong", digits), "wrong", "--dataset", "mine") == 2
    assert "unknown data set 'mine'" in complaint(capsys.readouterr().err)
    assert bring(tmp_path / "wrong", "wrong", "--dataset_path", str(tmp_path / "data")) == 2
    assert "other data, or the same in another order" in complaint(capsys.readouterr().err)
    assert bring(bench(tmp_path / "right", mine), "right", "--dataset", "mine") == 0
    assert got(tmp_path, "right").info["dataset"]["fingerprint"] == mine.fingerprint
