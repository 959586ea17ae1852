"""A user's own model and data: imported, defended, scanned, and exported."""

import csv
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_scripts import complaint

from backdoorlab import models
from backdoorlab.__main__ import main
from backdoorlab.data import Split
from backdoorlab.datasets.load import load as load_dataset
from backdoorlab.exchange import scan
from backdoorlab.exchange.weights import describe, load_exported, write_weights
from backdoorlab.record import DefenderView, Record
from backdoorlab.run import Run
from backdoorlab.storage import reading

Capture = pytest.CaptureFixture[str]


def write_images(root: Path, split: Split, name_of: Callable[[int], str]) -> None:
    """Write images as <label>/<name>.png, grey or RGB."""
    for i, (image, label) in enumerate(zip(split.images, split.labels.tolist(), strict=True)):
        (root / str(label)).mkdir(parents=True, exist_ok=True)
        array = image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
        Image.fromarray(array).save(root / str(label) / f"{name_of(i)}.png")


@pytest.fixture(scope="module")
def disk(backdoored: Record, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a stranger's files: poisoned images, a model trained on them, and triggered images."""
    root = tmp_path_factory.mktemp("disk")
    dataset = load_dataset("digits")
    poisoned = set(backdoored.train_poison.index.tolist())
    write_images(
        root / "data" / "train",
        backdoored.train_poison.apply(dataset.train),
        lambda i: f"{'odd' if i in poisoned else 'fine'}{i:04}",
    )
    write_images(root / "data" / "test", dataset.test, str)
    write_images(
        root / "triggered",
        Split(backdoored.test_poison.images, backdoored.test_poison.original_labels),
        str,
    )
    write_images(root / "trusted", dataset.test.subset(torch.arange(60)), str)
    model = backdoored.model()
    torch.save(
        {
            "epoch": 8,
            "state_dict": OrderedDict(
                (f"module.{k}", v) for k, v in model.network.state_dict().items()
            ),
        },
        root / "model.pt",
    )
    save_file(
        {name: tensor.contiguous() for name, tensor in model.network.state_dict().items()},
        root / "model.safetensors",
    )
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        root / "with_normalisation.safetensors",
    )
    return root


def bring(disk: Path, name: str = "own", *flags: str, weights: str = "model.pt") -> int:
    """Run `import` as a user types it; the data set's name selects its settings."""
    data = ["--dataset", "digits", "--dataset_path", str(disk / "data")]
    return main(
        [
            "import",
            "--weights",
            str(disk / weights),
            "--save_folder_name",
            name,
            "--architecture",
            "preactresnet10",
            *data,
            *flags,
        ]
    )


def normalisation(record: Record) -> list[str]:
    return [
        flag
        for key in ("mean", "std")
        for flag in (f"--{key}", *map(str, record.info["architecture"][key]))
    ]


def got(tmp_path: Path, name: str = "own") -> Record:
    return Record.load(name, tmp_path / "record")


def flagged(scan: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((scan / "flagged.csv").read_text().splitlines()))


@pytest.mark.parametrize(
    "weights", ["model.pt", "model.safetensors", "with_normalisation.safetensors"]
)
def test_a_model_from_elsewhere_is_the_same_model(
    weights: str, disk: Path, backdoored: Record, tmp_path: Path, capsys: Capture
) -> None:
    assert bring(disk, "own", *normalisation(backdoored), weights=weights) == 0
    shown = capsys.readouterr()
    assert re.search(r"^own +unknown +none +- +\d\d\.\d\d( +-){6}$", shown.out, re.M), (
        "clean accuracy, and nothing that nobody knows"
    )
    assert "is not known" in shown.err
    record = got(tmp_path)
    assert (
        record.info["scores"]["clean_accuracy"] == backdoored.info["scores"]["clean_accuracy"]
        and record.info["scores"]["asr"] is None
    )
    mine, other = backdoored.model().state_dict(), record.model().state_dict()
    assert all(torch.allclose(mine[name], other[name], atol=1e-6) for name in mine)
    assert (
        not record.known_poison and len(record.train_poison) == 0 and record.info["poisoned"] == 0
    )
    assert str(disk) not in (record.folder / "record.json").read_text(), "no path"


def test_weights_that_are_no_numbers_are_refused(
    disk: Path, tmp_path: Path, capsys: Capture
) -> None:
    """The argmax of NaN is the first class, so such a model is as accurate as a constant."""
    found = torch.load(disk / "model.pt", weights_only=True)
    found["state_dict"]["module.conv1.weight"][0] = float("nan")
    torch.save(found, disk / "lost.pt")
    assert bring(disk, "lost", weights="lost.pt") == 2
    assert (
        "lost.pt: conv1.weight contains NaN or infinity" in complaint(capsys.readouterr().err)
        and not (tmp_path / "record" / "lost").exists()
    )


def test_an_export_that_describes_another_network_is_refused_before_it_is_built(
    tmp_path: Path,
) -> None:
    model = models.build(
        "preactresnet10", num_classes=3, in_chans=1, mean=[0.5], std=[0.5], width=2, image_size=16
    )
    told = {"name": "preactresnet10", "width": 2, "mean": [0.5], "std": [0.5], "stem": "small"}
    file = tmp_path / "x.safetensors"
    for change in ({"width": 10**6}, {"name": 5}, {"std": [10**400]}, {"mean": [0.5, 0.5]}, {}):
        write_weights(
            file, model, architecture={**told, **change}, image_shape=[1, 16, 16], num_classes=3
        )
        if change:
            with pytest.raises(ValueError, match=r"damaged file|nothing usable"):
                load_exported(file)
    assert load_exported(file)(torch.rand(2, 1, 16, 16)).shape == (2, 3), "a control"


def test_a_usual_normalisation_is_found(disk: Path, tmp_path: Path, capsys: Capture) -> None:
    assert bring(disk) == 0
    assert (
        "normalisation and stem chosen by accuracy on 1,000 training images: the data's own"
        in capsys.readouterr().err
    )
    assert got(tmp_path).info["scores"]["clean_accuracy"] > 0.9
    assert bring(disk, "wrong", "--mean", "50", "--std", "0.01") == 0
    assert "is near chance: probably another normalisation" in capsys.readouterr().err


def test_a_suspicious_data_set_and_model_are_cleaned_and_looked_at(
    disk: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert (
        bring(disk, "own", "--triggered_path", str(disk / "triggered"), "--target_label", "0") == 0
    )
    before = got(tmp_path).info["scores"]
    assert before["asr"] > 0.9, "the triggered images lead to the class"
    assert main(["scan", "own", "--dataset_path", str(disk / "data")]) == 0
    shown = capsys.readouterr()
    assert re.search(r"DAU flags \d+ of the 1,442 training images of own", shown.out) and re.search(
        r"label 0: \d+ of \d+: train/0/", shown.out
    )
    assert "nobody knows how rightly" in shown.err and "TPR" not in shown.err
    scan = tmp_path / "record" / "own" / "scan"
    with Image.open(scan / "flagged.png") as sheet:
        assert sheet.width > 500 and sheet.height >= 100
    rows = flagged(scan)
    odd = sum("odd" in row["file"] for row in rows)
    assert odd / len(rows) > 0.7 and odd > 0.8 * 144, (
        "most of what is flagged is the poison, and most of the poison is flagged"
    )
    train = load_dataset("digits", str(disk / "data")).train
    row = rows[len(rows) // 2]
    with Image.open(disk / "data" / row["file"]) as image:
        assert list(image.getdata()) == train.images[int(row["index"])].flatten().tolist(), (
            "file and position are the same image"
        )

    result = helpers.defend("dau", got(tmp_path), "--score_every", "0")
    assert (
        result is not None
        and result["after"]["asr"] < 0.3
        and result["split"] is None
        and result["splits"] == {}
    )
    assert main(["table", "own"]) == 0
    assert re.search(
        r"^own +unknown +dau +model \+ training set +\d\d\.\d\d +\d+\.\d\d +\d\d\.\d\d +\d\d\.\d\d"
        r" +- +- +\d+$",
        capsys.readouterr().out,
        re.M,
    )
    assert main(["scan", "own", "--run_name", "seed0", "--out", str(tmp_path / "seen")]) == 0, (
        "a finished run is read"
    )
    assert (tmp_path / "seen" / "flagged.csv").exists()


def test_a_scan_is_repeated_but_not_overwritten(
    disk: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert bring(disk) == 0 and main(["scan", "own"]) == 0
    scan = tmp_path / "record" / "own" / "scan"
    before = {path.name: path.read_bytes() for path in scan.iterdir()}
    assert (
        main(["scan", "own"]) == 0
        and {path.name: path.read_bytes() for path in scan.iterdir()} == before
    )
    capsys.readouterr()
    assert main(["scan", "own", "--dataset_path", str(disk / "data")]) == 2, (
        "now with file names, so another list"
    )
    assert "pass --overwrite True" in complaint(capsys.readouterr().err)
    (scan / "mine").mkdir()
    (scan / "mine" / "looked_at.txt").write_text("precious")
    assert main(["scan", "own", "--dataset_path", str(disk / "data"), "--overwrite", "True"]) == 0
    assert (scan / "mine" / "looked_at.txt").read_text() == "precious", (
        "what a scan does not write, it does not delete"
    )
    assert (scan / "flagged.csv").read_bytes() != before["flagged.csv"] and (
        scan / "flagged.png"
    ).read_bytes() == before["flagged.png"]
    named = (scan / "flagged.csv").read_bytes()
    assert main(["scan", "own"]) == 0 and (scan / "flagged.csv").read_bytes() == named, (
        "the same list, of which it knows less"
    )


def test_a_suspicious_model_is_cleaned_with_trusted_images(
    disk: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert (
        bring(disk, "own", "--triggered_path", str(disk / "triggered"), "--target_label", "0") == 0
    )
    for method, flags in (
        ("sau", ("--n_rounds", "2")),
        ("ibau", ("--n_rounds", "1")),
        ("ft", ("--epochs", "1")),
    ):
        assert (
            main(
                [
                    "defense",
                    method,
                    "--result_file",
                    "own",
                    *flags,
                    "--trusted_path",
                    str(disk / "trusted"),
                ]
            )
            == 0
        )
        result = reading.read_json(
            tmp_path / "record" / "own" / "defense" / method / "seed0" / "result.json"
        )
        assert (
            result["trusted"]["count"] == 60
            and result["after"]["clean_accuracy"] > 0.5
            and not any("vouches" in note for note in result["notes"])
        )
    assert (
        main(["defense", "ft", "--result_file", "own", "--epochs", "1", "--run_name", "drawn"]) == 0
    )
    assert "which nobody vouches for" in capsys.readouterr().err, (
        "without images of their own, the user is told"
    )


def test_a_suspicious_data_set_alone_is_an_unknown_attack(
    disk: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Train on suspicious data: what a defense detects in them does not count as a mistake."""
    assert (
        main(
            [
                "import",
                "--dataset",
                "digits",
                "--dataset_path",
                str(disk / "data"),
                "--save_folder_name",
                "mine",
            ]
        )
        == 2
    )
    line = complaint(capsys.readouterr().err)
    assert (
        "For a suspicious data set without a model, train one on it: python attack/none.py"
        " --suspicious True" in line
    )
    flags = line.split("attack/none.py ")[1].split()
    assert flags[-2:] == ["--save_folder_name", "mine"]
    for name, given in (("mine", flags[:-2]), ("control", flags[2:-2])):
        record = helpers.attack("none", name, tmp_path / "record", *given, *helpers.TINY)
        result = helpers.defend(
            "dau",
            record,
            "--pool",
            "model_loss",
            "--score_every",
            "0",
            "--epochs",
            "1",
            "--head_epochs",
            "1",
        )
        assert result is not None
        if name == "mine":
            assert (
                record.info["attack"] == "unknown"
                and not record.known_poison
                and result["split"] is None
            )
        else:
            assert record.info["attack"] == "none" and result["split"]["fpr"] is not None


def test_a_suspicious_data_set_alone_is_searched(disk: Path, tmp_path: Path) -> None:
    flags = (
        "--dataset",
        "digits",
        "--dataset_path",
        str(disk / "data"),
        "--epochs",
        "12",
        "--score_every",
        "0",
    )
    record = helpers.attack("none", "mine", tmp_path / "record", "--suspicious", "True", *flags)
    assert main(["scan", "mine", "--dataset_path", str(disk / "data")]) == 0
    rows = flagged(record.folder / "scan")
    odd = sum("odd" in row["file"] for row in rows)
    assert odd >= 0.8 * 144 and odd >= 0.9 * len(rows)


def test_a_scan_by_another_detector_shows_what_its_own_command_flags(
    tiny: Record, tmp_path: Path, capsys: Capture
) -> None:
    record = helpers.copy(tiny, tmp_path / "record")
    assert main(["scan", "tiny", "--detector", "loss", "--out", str(tmp_path / "seen")]) == 0
    assert "loss flags 14 of the 1,442 training images of tiny" in capsys.readouterr().out
    run = record.folder / "defense" / "loss" / "seed0"
    split = reading.read_tensors(run / "split.safetensors")[0]
    listed = [int(row["index"]) for row in flagged(tmp_path / "seen")]
    assert listed == split["flagged"].nonzero().squeeze(1).tolist() and len(listed) == 14

    # The next scan reads that run, and has a folder beside that of DAU's.
    before = (run / "result.json").stat().st_mtime_ns
    assert main(["scan", "tiny", "--detector", "loss"]) == 0
    assert (run / "result.json").stat().st_mtime_ns == before
    assert (record.folder / "scan-loss" / "flagged.png").exists()
    assert not (record.folder / "scan").exists() and not (record.folder / "defense/dau").exists()


def test_a_scan_asks_for_what_a_detector_lacks(disk: Path, tmp_path: Path, capsys: Capture) -> None:
    assert bring(disk) == 0
    capsys.readouterr()
    wanted = ["scan", "own", "--detector", "scan"]
    assert main(wanted) == 2
    line = complaint(capsys.readouterr().err)
    assert line.startswith("error: scan assumes trusted images, and nobody vouches for those of")
    assert "--trusted_path FOLDER" in line
    assert not (got(tmp_path).folder / "defense").exists()
    # Controls: with them it runs, and a detector that assumes none runs without.
    assert main([*wanted, "--trusted_path", str(disk / "trusted")]) == 0
    assert main(["scan", "own", "--detector", "spectral"]) == 0


def test_a_scan_says_when_nothing_was_found(tiny: Record, tmp_path: Path, capsys: Capture) -> None:
    record = helpers.copy(tiny, tmp_path / "record")
    blind = ("--many_classes", "1e9", "--apart", "1e9", "--nearer", "1e9")
    result = helpers.defend("dau", record, "--score_every", "0", *blind)
    assert result is not None and result["split"]["flagged"] == 0
    capsys.readouterr()
    assert main(["scan", "tiny"]) == 0
    learned, first, *why = capsys.readouterr().out.splitlines()
    assert learned.startswith("the model classifies ")
    assert first == "nothing found: DAU flags none of the 1,442 training images of tiny"
    assert why == [f"  {note}" for note in result["notes"]] and any(
        "no poison found: no label has a group" in line for line in why
    )
    assert not (record.folder / "scan").exists()


def test_a_scan_says_why_a_search_ended_without_a_find(
    small: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """A pool may have been found without effect on the model."""
    helpers.copy(small, tmp_path / "record")
    data = str(small.folder.parent.parent / "small-data")

    def refuse(view: DefenderView, _config: Any, _size: int, run: Run) -> tuple[torch.Tensor, bool]:
        run.note("a pool of 9 was found, but the head broke down")
        return torch.zeros(len(view.train), dtype=torch.bool), False

    monkeypatch.setattr("backdoorlab.exchange.scan.find_poison", refuse)
    for _ in range(2):
        assert main(["scan", "small", "--dataset_path", data]) == 0
        guesses, _, *why = capsys.readouterr().out.splitlines()
        assert why == ["  a pool of 9 was found, but the head broke down"], (
            "now, and from the earlier search"
        )
        assert (
            guesses.startswith("this scan tells nothing") and "train it longer" in guesses.lower()
        )


@pytest.mark.parametrize(("accuracy", "doubted"), [(0.6, True), (0.95, False)])
def test_flags_of_a_model_that_gets_more_wrong_are_doubted(
    accuracy: float, doubted: bool, tiny: Record, tmp_path: Path, capsys: Capture
) -> None:
    """A tenth of the images are flagged."""
    record = helpers.copy(tiny, tmp_path)
    scores = {**record.info["scores"], "clean_accuracy": accuracy}
    helpers.edit_json(record.folder / "record.json", scores=scores)
    flagged = torch.arange(1000) % 10 == 0
    scan._say_what_was_learned(Record.load(record.name, tmp_path), flagged)
    said = capsys.readouterr().out
    assert f"{accuracy:.1%} of the clean test images right" in said
    assert ("gets more images wrong than are flagged" in said) == doubted


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make RGB images of 72 pixels in three classes, and an untrained resnet18 of timm."""
    root = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        images = torch.randint(0, 256, (6, 3, 72, 72), dtype=torch.uint8, generator=generator)
        write_images(root / "photos" / split, Split(images, torch.arange(6) % 3), str)
    torch.manual_seed(0)
    torch.save(timm.create_model("resnet18", num_classes=3).state_dict(), root / "model.pth")
    return root


def from_photos(photos: Path, *flags: str, architecture: str = "resnet18") -> int:
    start = [
        "import",
        "--weights",
        str(photos / "model.pth"),
        "--save_folder_name",
        "own",
        "--architecture",
        architecture,
    ]
    return main([*start, "--dataset_path", str(photos / "photos"), *flags])


def test_the_documentation_loads_what_was_exported(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Run the lines of docs/howto/suspicious_model.md, on weights after a defense."""
    text = (helpers.CHECKOUT / "docs" / "howto" / "suspicious_model.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    example = next(block for block in blocks if "load_file" in block)
    assert (
        len(
            [
                line
                for line in example.splitlines()
                if line and not line.startswith(("import", "from"))
            ]
        )
        == 2
    )
    monkeypatch.chdir(tmp_path)
    assert (
        from_photos(photos, "--mean", "0.485", "0.456", "0.406", "--std", "0.229", "0.224", "0.225")
        == 0
    )
    assert (
        main(["defense", "ft", "--result_file", "own", "--epochs", "1", "--trusted_ratio", "1"])
        == 0
    )
    assert main(["export", "own", "--defense", "ft", "--weights", "purified.safetensors"]) == 0
    assert "mean [0.485, 0.456, 0.406] and std [0.229, 0.224, 0.225]" in capsys.readouterr().out
    scope: dict[str, Any] = {}
    exec(example.replace("num_classes=10", "num_classes=3"), scope)
    images = torch.rand(4, 3, 72, 72, generator=torch.Generator().manual_seed(2))
    ours = got(tmp_path).model()
    ours.load_state_dict(
        reading.read_tensors(
            tmp_path / "record" / "own" / "defense" / "ft" / "seed0" / "model.safetensors"
        )[0]
    )
    ours.eval()
    with torch.no_grad():
        theirs = scope["model"].eval()((images - ours.mean) / ours.std)
        assert torch.allclose(ours(images), theirs, atol=1e-4)
        assert torch.allclose(load_exported("purified.safetensors")(images), theirs, atol=1e-4)
        attacked = got(tmp_path).model().eval()(images)
    assert not torch.allclose(attacked, theirs, atol=1e-2), "the defense did change the weights"


def test_exported_weights_have_plain_names_and_come_back(
    backdoored: Record, tmp_path: Path, capsys: Capture
) -> None:
    helpers.copy(backdoored, tmp_path / "record")
    file = tmp_path / "attacked.safetensors"
    assert main(["export", backdoored.name, "--weights", str(file)]) == 0
    assert "load_exported" in capsys.readouterr().out
    network = backdoored.model().network.state_dict()
    loaded = load_file(file)
    assert loaded.keys() == network.keys() and all(
        torch.equal(loaded[name], network[name]) for name in network
    )
    content = file.read_bytes()
    assert main(["export", backdoored.name, "--weights", str(file)]) == 2
    assert "pass --overwrite True to replace it" in complaint(capsys.readouterr().err)
    assert (
        main(["export", backdoored.name, "--weights", str(file), "--overwrite", "True"]) == 0
        and file.read_bytes() == content
    )
    assert (
        main(
            ["import", "--weights", str(file), "--dataset", "digits", "--save_folder_name", "again"]
        )
        == 0
    )
    again = got(tmp_path, "again")
    assert again.info["architecture"] == {**backdoored.info["architecture"], "stem": "small"}
    assert again.info["scores"]["clean_accuracy"] == backdoored.info["scores"]["clean_accuracy"]
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert (
        main(["import", "--weights", str(file), "--dataset", "digits", "--save_folder_name", "x"])
        == 2
    )
    assert "damaged file" in complaint(capsys.readouterr().err)


def test_a_small_image_keeps_the_stem_that_the_model_had(tmp_path: Path) -> None:
    """A model of timm's own on 16 pixels does not get the stem that our attacks use there."""
    dataset = load_dataset("digits", image_size=16)
    torch.manual_seed(0)
    stock = timm.create_model("resnet18", num_classes=10, in_chans=1)
    torch.save(stock.state_dict(), tmp_path / "stock.pth")
    start = [
        "import",
        "--architecture",
        "resnet18",
        "--dataset",
        "digits",
        "--image_size",
        "16",
        "--mean",
        "0",
        "--std",
        "1",
    ]
    images = dataset.test.images[:8].float() / 255
    assert (
        main(
            [
                *start,
                "--weights",
                str(tmp_path / "stock.pth"),
                "--save_folder_name",
                "own",
                "--stem",
                "stock",
            ]
        )
        == 0
    )
    record = got(tmp_path)
    assert record.info["architecture"]["stem"] == "stock"
    small = models.build(
        "resnet18", num_classes=10, in_chans=1, mean=[0.0], std=[1.0], image_size=16
    )
    small.network.load_state_dict(stock.state_dict())
    with torch.no_grad():
        theirs = stock.eval()(images)
        assert torch.allclose(record.model().eval()(images), theirs, atol=1e-4)
        assert not torch.allclose(small.eval()(images), theirs, atol=1e-2), (
            "the control: the other stem makes another model of the same weights"
        )


@pytest.mark.parametrize(
    ("name", "side", "expected"),
    [
        ("resnet18", 16, "conv1.stride = (1, 1), maxpool = Identity()"),
        ("mobilenetv3_small_050", 32, "conv_stem.stride = (1, 1)"),
        ("vit_tiny_patch16_224", 32, "img_size=32).load_state_dict"),
        ("resnet18", 80, "num_classes=4, in_chans=1).load_state_dict"),
        ("convnext_atto", 32, "load_exported(PATH)"),  # has a stem of another shape there
        ("preactresnet10", 32, "load_exported(PATH)"),
    ],
)
def test_what_is_said_about_loading_an_export_is_true(name: str, side: int, expected: str) -> None:
    """Tested with grey images, for which timm's networks are not made."""
    model = models.build(
        name,
        num_classes=4,
        in_chans=1,
        mean=[0.5],
        std=[0.2],
        image_size=side,
        width=4 if name in models.OWN else None,
    ).eval()
    architecture = {
        "name": name,
        "width": 4 if name in models.OWN else None,
        "mean": [0.5],
        "std": [0.2],
    }
    said = describe(
        {"architecture": architecture, "image_shape": [1, side, side], "num_classes": 4}
    )
    assert expected in said
    call = re.search(r"timm\.create_model\(.*?\)", said)
    assert (call is None) == (expected == "load_exported(PATH)")
    if call is not None:
        stock = eval(call[0])
        stock.load_state_dict(model.network.state_dict())
        for part, stride in re.findall(r"(\w+)\.stride = (\(1, 1\))", said):
            stock.get_submodule(part).stride = eval(stride)
        if "maxpool = Identity()" in said:
            stock.maxpool = torch.nn.Identity()
        x = torch.rand(2, 1, side, side)
        with torch.no_grad():
            assert torch.allclose(stock.eval()((x - 0.5) / 0.2), model(x), atol=1e-4)


def plain(value: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(value, path)


WEIGHTS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "absent": ("a.pt", lambda _: None, "a.pt: no such file"),
    "a whole model": (
        "a.pt",
        plain(torch.nn.Linear(2, 2)),
        "torch.nn.modules.linear.Linear, which weights and images do not need",
    ),
    "text": ("a.pt", lambda path: path.write_text("hello"), "refused: not the zip archive"),
    "empty": (
        "a.pt",
        plain({}),
        "expected a state dict (names -> tensors), found a dict with nothing in it",
    ),
    "a number": ("a.pt", plain(3), "expected a state dict (names -> tensors), found int"),
    "another network": (
        "a.pt",
        plain({"fc.weight": torch.zeros(2, 2)}),
        "not the weights of preactresnet10 for 10 classes and images of 1 channels",
    ),
    "torchscript": (
        "a.pt",
        lambda path: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path),
        "expected one data.pkl in it, found",
    ),
    "cut safetensors": (
        "a.safetensors",
        lambda path: path.write_bytes(b"\x09\x00\x00\x00\x00\x00\x00\x00{}"),
        "not readable as safetensors",
    ),
    "a pickle with another suffix": ("a.safetensors", plain({}), "not readable as safetensors"),
    "no tensor": ("a.safetensors", lambda path: save_file({}, path), "no tensor in it"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("mistake", sorted(WEIGHTS))
def test_weights_that_are_none_are_one_line(mistake: str, tmp_path: Path, capsys: Capture) -> None:
    name, make, message = WEIGHTS[mistake]
    make(tmp_path / name)
    start = [
        "import",
        "--weights",
        str(tmp_path / name),
        "--dataset",
        "digits",
        "--save_folder_name",
        "own",
    ]
    assert main([*start, "--architecture", "preactresnet10"]) == 2
    assert message in complaint(capsys.readouterr().err)
    assert not list((tmp_path / "record").iterdir()), "nothing is left behind"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--architecture", "resnet81"], "unknown model 'resnet81'. Did you mean"),
        (["--architecture", "preactresnet18"], "not the weights of preactresnet18"),
        (
            ["--mean", "0.5"],
            "--mean and --std need 1 numbers each for these images, std above 0, got 1 and 0",
        ),
        (["--mean", "0.5", "--std", "0"], "std above 0"),
        (
            ["--mean", "1e20", "--std", "1"],
            "nothing usable on architecture mean): change what makes it so",
        ),
        (["--dataset_path", "/no/such/folder"], "--dataset_path /no/such/folder: no such folder"),
        (["--image_size", "0"], "image_size"),
        (["--crop_padding", "-1"], "crop_padding must be >= 0"),
        (
            ["--target_label", "1"],
            "--target_label N is the target of the images in --triggered_path FOLDER, which is",
        ),
        (
            ["--triggered_path", "/no/such/folder"],
            "--triggered_path /no/such/folder: no such folder",
        ),
        (
            ["--triggered_path", "{triggered}"],
            (
                "--triggered_path needs --target_label N, the class that the trigger is to lead to."
                " The model classifies"
            ),
        ),
        (
            ["--triggered_path", "{triggered}", "--target_label", "10"],
            "target_label must lie in 0..9",
        ),
        (["--device", "gpu"], "--device gpu: expected auto, cpu, cuda or cuda:N"),
        (["--stem", "large"], "stem"),
        (["--wieghts", "x"], "unknown flag --wieghts. Did you mean --weights"),
    ],
)
def test_a_mistake_in_an_import_is_one_line(
    flags: list[str], message: str, disk: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert (
        bring(
            disk, "own", *(flag.replace("{triggered}", str(disk / "triggered")) for flag in flags)
        )
        == 2
    )
    assert message in complaint(capsys.readouterr().err)
    assert not (tmp_path / "record").exists() or not list((tmp_path / "record").iterdir())


def test_a_network_must_be_named(disk: Path, capsys: Capture) -> None:
    assert (
        main(
            [
                "import",
                "--weights",
                str(disk / "model.pt"),
                "--dataset",
                "digits",
                "--save_folder_name",
                "own",
            ]
        )
        == 2
    )
    assert "--architecture NAME is missing" in complaint(capsys.readouterr().err)
    assert (
        main(
            [
                "import",
                "--weights",
                str(disk / "model.pt"),
                "--architecture",
                "preactresnet10",
                "--save_folder_name",
                "own",
            ]
        )
        == 2
    )
    assert "--dataset_path FOLDER is missing" in complaint(capsys.readouterr().err)


def test_triggered_images_of_the_target_class_do_not_count(
    disk: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert (
        bring(disk, "own", "--triggered_path", str(disk / "data" / "test"), "--target_label", "3")
        == 0
    )
    record = got(tmp_path)
    assert "36 triggered images are of the target class" in capsys.readouterr().err
    assert (
        len(record.test_poison) == 355 - 36
        and 3 not in record.test_poison.original_labels
        and record.info["scores"]["asr"] < 0.1
    )
    assert record.info["target"] == 3
    assert main(["export", "own", "--to", "backdoorbench", str(tmp_path / "out")]) == 2
    assert "does not know which test images its triggered ones were" in complaint(
        capsys.readouterr().err
    )
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "3").symlink_to(disk / "data" / "test" / "3")
    assert bring(disk, "x", "--triggered_path", str(tmp_path / "only"), "--target_label", "3") == 2
    assert "images are of the target class 3, so no ASR can be measured" in complaint(
        capsys.readouterr().err
    )
