"""Folders of users: what is read of them, what is left out, and what is said about it."""

import io
import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from backdoorlab import __main__
from backdoorlab.datasets import decoding, load, readers
from backdoorlab.datasets.inspection import describe_folder
from backdoorlab.datasets.load import load as load_dataset
from backdoorlab.datasets.load import load_trusted, train_files
from backdoorlab.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKDOORLAB_CACHE", str(tmp_path / "cache"))


def picture(value: int, size: tuple[int, int] = (8, 6)) -> Image.Image:
    pixels = np.random.default_rng(value).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), test: str = "test") -> Path:
    """Three training and two test images of each class."""
    for split, count in (("train", 3), (test, 2)):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                picture(10 * label + i + 100 * (split == test)).save(
                    root / split / name / f"{i}.png"
                )
    return root


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def shard(
    file: Path, labels: list[int | None] | None, names: list[str] | None = None, start: int = 0
) -> None:
    """Write a shard with random pictures; `names` go into the schema as `datasets` writes them."""
    cells = [
        {"bytes": encoded(picture(start + i)), "path": None} for i in range(len(labels or [0, 0]))
    ]
    table = pa.table({"image": cells} | ({} if labels is None else {"label": labels}))
    if names is not None:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        said = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": said})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file)


def sizes(root: Path, **options: Any) -> tuple[int, int]:
    found = load_dataset("mine", str(root), **options)
    return len(found.train), len(found.test)


def notes(root: Path) -> str:
    return "\n".join(load_dataset("mine", str(root)).notes)


# --- orientation


def photo(value: int, orientation: int) -> bytes:
    """A photo whose pixels lie as the sensor does, upright only by its EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(value), "PNG", exif=exif)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_as_its_exif_says(orientation: int, tmp_path: Path) -> None:
    data = photo(1, orientation)
    done: list[str] = []
    with Image.open(io.BytesIO(data)) as image:
        wanted = np.asarray(ImageOps.exif_transpose(image)).transpose(2, 0, 1)
        raw = np.asarray(image).transpose(2, 0, 1)
    (tmp_path / "0.png").write_bytes(data)
    assert np.array_equal(decoding.from_bytes(data, tmp_path, None, None, done), wanted)
    assert np.array_equal(decoding.from_file(tmp_path / "0.png", None, None, done), wanted)
    assert np.array_equal(raw, wanted) == (orientation == 1), "a control: something was turned"
    assert done == [decoding.TURNED] * 2 * (orientation != 1)


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "TIFF"])
def test_other_formats_are_turned_too(form: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (8, 16), (200, 200, 200))
    image.paste((0, 0, 0), (0, 0, 8, 8))
    found = decoding.from_bytes(encoded(image, form, exif=exif), tmp_path, None, None)
    assert found.shape == (3, 8, 16), "the sides are exchanged"
    assert found[0, :, :7].mean() > 180 > 40 > found[0, :, 9:].mean(), "the top is on the right"


def test_damaged_exif_leaves_the_pixels(tmp_path: Path) -> None:
    data = encoded(picture(1), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\xff")
    wanted = np.asarray(picture(1)).transpose(2, 0, 1)
    assert np.array_equal(decoding.from_bytes(data, tmp_path, None, None), wanted)


def test_turning_is_said_and_an_older_reading_in_the_cache_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folder(tmp_path / "data")
    upright = load_dataset("mine", str(root))
    for i in range(3):
        (root / "train" / "cat" / f"{i}.png").write_bytes(photo(i, 3))
    found = load_dataset("mine", str(root))
    assert found.notes == ("3 images are turned upright, as their EXIF orientation says",)
    assert found.fingerprint != upright.fingerprint and upright.notes == ()
    assert load_dataset("mine", str(root)).notes == found.notes, "from the cache as well"

    # The reader before turned nothing, and had the number 4.
    assert load.READER_VERSION > 4
    monkeypatch.setattr(load, "READER_VERSION", 4)
    monkeypatch.setattr(decoding, "turn", lambda image: None)
    old = load_dataset("mine", str(root))
    assert old.fingerprint != found.fingerprint
    monkeypatch.undo()
    monkeypatch.setenv("BACKDOORLAB_CACHE", str(tmp_path / "cache"))
    assert load_dataset("mine", str(root)).fingerprint == found.fingerprint


# --- alpha


def drawing(mode: str) -> Image.Image:
    """A black square on transparent ground; only the alpha channel has it."""
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (2, 2, 6, 6))
    if mode == "P":
        indices = Image.fromarray(np.asarray(image)[..., 3] // 255).convert("P")
        indices.putpalette([0, 0, 0] * 2)
        return indices
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_drawn_in_alpha_is_seen_on_white(mode: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"transparency": 0} if mode == "P" else {}
    done: list[str] = []
    data = encoded(drawing(mode), **options)
    found = decoding.from_bytes(data, tmp_path, None, False, done)
    wanted = np.full((8, 8), 255, np.uint8)
    wanted[2:6, 2:6] = 0
    assert np.array_equal(found, np.stack([wanted] * 3)) and done == [decoding.ON_WHITE]
    with Image.open(io.BytesIO(data)) as image:
        assert not np.asarray(image.convert("RGB")).any(), "a control: without alpha all is black"


def test_an_opaque_alpha_channel_changes_nothing(tmp_path: Path) -> None:
    done: list[str] = []
    image = picture(3).convert("RGBA")
    found = decoding.from_bytes(encoded(image), tmp_path, None, None, done)
    assert np.array_equal(found, np.asarray(picture(3)).transpose(2, 0, 1)) and not done


def test_alpha_is_said_and_a_class_of_equal_images_is_refused(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", ("circle", "square"))
    for i in range(3):
        image = Image.new("RGBA", (8, 6), (0, 0, 0, 0))
        image.putpixel((i, i), (0, 0, 0, 255))
        image.save(root / "train" / "square" / f"{i}.png")
    assert notes(root) == "3 images have transparent pixels, and are put on white"
    for i in range(3):
        Image.new("RGB", (8, 6)).save(root / "train" / "square" / f"{i}.png")
    with pytest.raises(UserError, match=r"^class square: all 3 training images are equal"):
        load_dataset("mine", str(root))
    picture(5).save(root / "train" / "square" / "1.png")
    assert sizes(root) == (6, 4), "a control: two equal images of three are no error"


def test_one_image_of_a_class_is_not_equal_to_others() -> None:
    images = np.zeros((2, 1, 4, 4), np.uint8)
    readers.refuse_equal(images, np.array([0, 1]), ("a", "b"))
    with pytest.raises(UserError, match="class b: all 2"):
        readers.refuse_equal(images, np.array([1, 1]), ("a", "b"))


# --- content, not the suffix


def test_content_decides_what_is_an_image(tmp_path: Path) -> None:
    root = folder(tmp_path / "data")
    cat = root / "train" / "cat"
    for name, form in (
        ("a.tif", "TIFF"),
        ("b.jfif", "JPEG"),
        ("c.gif", "GIF"),
        ("d.png", "JPEG"),
        ("e.dat", "PNG"),
        ("f", "WEBP"),
        ("g.JPE", "JPEG"),
    ):
        # GIF has a palette: its first image is read in colour, too.
        (cat / name).write_bytes(encoded(picture(len(name)), form))
    (cat / "notes.txt").write_text("BMP is what this text begins with, and it is no image")
    (cat / "boxes.txt").write_text("0 0 5 5")
    (cat / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (root / "train" / "list.csv").write_text("0.png,cat")
    assert sizes(root) == (13, 4)
    said = notes(root)
    assert said.startswith("4 files or folders are left out: 2 .txt (not an image, such as ")
    assert "1 .heic (HEIC, which is not read, such as 'train/cat/phone.heic')" in said
    assert "1 .csv (not in the folder of a class, such as 'train/list.csv')" in said
    assert len(train_files(str(root)) or []) == 13, "scan names the same files"


def test_a_file_that_claims_to_be_an_image_and_is_none_is_refused(tmp_path: Path) -> None:
    root = folder(tmp_path / "data")
    file = root / "train" / "cat" / "0.tif"
    file.write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"0\.tif: not a readable image"):
        load_dataset("mine", str(root))
    file.rename(file.with_suffix(".jpg"))
    file.with_suffix(".jpg").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    with pytest.raises(UserError, match=r"0\.jpg: not a readable image \(it is HEIC: save it as"):
        load_dataset("mine", str(root))


def test_a_changed_file_without_a_known_suffix_is_another_data_set(tmp_path: Path) -> None:
    root = folder(tmp_path / "data")
    file = root / "train" / "cat" / "extra"
    file.write_bytes(encoded(picture(50)))
    first = load_dataset("mine", str(root)).fingerprint
    file.write_bytes(encoded(picture(51)))
    assert load_dataset("mine", str(root)).fingerprint != first


# --- folders


@pytest.mark.parametrize("service", ["@eaDir", ".AppleDouble", "__MACOSX", ".thumbnails"])
@pytest.mark.parametrize("where", ["", "cat"])
def test_thumbnails_of_file_managers_are_no_images(
    service: str, where: str, tmp_path: Path
) -> None:
    root = folder(tmp_path / "data")
    shutil.copytree(root / "train" / "dog", root / "train" / where / service / "0.png")
    (root / "train" / "cat" / "Thumbs.db").write_bytes(b"x")
    assert load_dataset("mine", str(root)).class_names == ("cat", "dog") and sizes(root) == (6, 4)
    assert ("1 file or folder is left out" in notes(root)) == (not service.startswith("."))
    shutil.copytree(root / "train" / "dog", root / "train" / "cat" / "more")
    assert sizes(root) == (9, 4), "a control: another folder in a class's folder is read"


def test_two_unicode_forms_of_a_name_are_one_class(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    assert composed != decomposed
    root = folder(tmp_path / "data", ("bar", composed))
    (root / "test" / composed).rename(root / "test" / decomposed)
    found = load_dataset("mine", str(root))
    assert found.class_names == ("bar", composed) and found.test.labels.tolist() == [0, 0, 1, 1]
    assert found.notes == ()

    # Both in one split: an archive that was unpacked on two systems.
    (root / "train" / decomposed).mkdir()
    picture(30).save(root / "train" / decomposed / "9.png")
    both = load_dataset("mine", str(root))
    assert both.class_names == found.class_names and both.train.labels.tolist() == [0] * 3 + [1] * 4
    assert "1 classes have two folders whose names differ in their Unicode form" in both.notes[0]

    # Trusted images come from yet another system.
    (tmp_path / "trusted").mkdir()
    shutil.copytree(root / "test" / decomposed, tmp_path / "trusted" / decomposed)
    assert load_trusted(str(tmp_path / "trusted"), both, None)[0].labels.tolist() == [1, 1]


@pytest.mark.parametrize("layout", ["flat", "in a folder", "empty"])
def test_a_test_folder_without_labels_does_not_hide_a_labelled_one(
    layout: str, tmp_path: Path
) -> None:
    root = folder(tmp_path / "data", test="val")
    inner = root / "test" / ("images" if layout == "in a folder" else "")
    inner.mkdir(parents=True)
    if layout != "empty":
        picture(1).save(inner / "0.png")
    assert sizes(root) == (6, 4)
    assert notes(root) == "test/ has no images with labels: val/ is the test set"
    shutil.rmtree(root / "val")
    with pytest.raises(UserError, match=r"no folder of this name in train/|no images"):
        load_dataset("mine", str(root))


def tiny_imagenet(root: Path) -> Path:
    """Two classes in the layout of Tiny ImageNet's archive."""
    classes = ("n01", "n02")
    for label, name in enumerate(classes):
        (root / "train" / name / "images").mkdir(parents=True)
        (root / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t0\t5\t5\n")
        for i in range(2):
            data = encoded(picture(10 * label + i), "JPEG")
            (root / "train" / name / "images" / f"{name}_{i}.JPEG").write_bytes(data)
    for split in ("val", "test"):
        (root / split / "images").mkdir(parents=True)
        for i in range(3):
            data = encoded(picture(100 + i), "JPEG")
            (root / split / "images" / f"{split}_{i}.JPEG").write_bytes(data)
    lines = [f"val_{i}.JPEG\t{classes[label]}\t0\t0\t5\t5" for i, label in enumerate((1, 0, 1))]
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    return root


def test_tiny_imagenets_annotations_are_its_labels(tmp_path: Path) -> None:
    root = tiny_imagenet(tmp_path / "data")
    found = load_dataset("mine", str(root))
    assert found.class_names == ("n01", "n02") and found.train.labels.tolist() == [0, 0, 1, 1]
    assert found.test.labels.tolist() == [1, 0, 1]
    wanted = decoding.from_file(root / "val" / "images" / "val_1.JPEG", None, None)
    assert np.array_equal(found.test.images[1].numpy(), wanted)
    assert found.notes[0] == "test/ has no images with labels: val/ is the test set"
    assert found.notes[1].startswith("2 files or folders are left out: 2 .txt (not an image")

    # Another label in the list is another data set.
    file = root / "val" / "val_annotations.txt"
    file.write_text(file.read_text().replace("val_0.JPEG\tn02", "val_0.JPEG\tn01"))
    assert load_dataset("mine", str(root)).test.labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("val_0.JPEG\tn99\t0", "expected a file name, a tab and a class of train/ in line 1"),
        ("val_0.JPEG", "expected a file name, a tab"),
        ("val_0.JPEG\tn01\nval_7.JPEG\tn01", r"names 1 images that are not there, .*'val_7.JPEG'"),
        ("../../train/n01/images/n01_0.JPEG\tn01", "names 1 images that are not there"),
    ],
)
def test_annotations_that_do_not_fit_are_one_line(text: str, message: str, tmp_path: Path) -> None:
    root = tiny_imagenet(tmp_path / "data")
    (root / "val" / "val_annotations.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        load_dataset("mine", str(root))


def test_tiny_imagenet_that_a_script_sorted_into_classes_is_read(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", test="val")
    (root / "val" / "images").mkdir()
    (root / "val" / "val_annotations.txt").write_text("0.png\tcat\t0\t0\t5\t5\n")
    assert sizes(root) == (6, 4)


# --- layouts of the hub


def test_two_configurations_are_not_one_data_set(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for k, name in enumerate(("coarse", "fine")):
        shard(root / name / "train-00000-of-00001.parquet", [0, 1] * (k + 1), start=10 * k)
        shard(root / name / "test-00000-of-00001.parquet", [1], start=50 + k)
    with pytest.raises(
        UserError, match=r"2 configurations \(coarse, fine\): pass --dataset_config with one of"
    ):
        load_dataset("mine", str(root))
    assert sizes(root, configuration="coarse") == (2, 1)
    assert sizes(root, configuration="fine") == (4, 1)
    with pytest.raises(UserError, match=r"--dataset_config x: .* Known: coarse, fine"):
        load_dataset("mine", str(root), configuration="x")

    # One that is called default is what the hub would read.
    (root / "coarse").rename(root / "default")
    assert sizes(root) == (2, 1)
    assert "of the configurations default, fine, default is read" in notes(root)


CARD = """---
license: mit
configs:
- config_name: fine
  data_files:
  - split: train
    path: data/fine/tr*
  - split: validation
    path: [data/fine/held-*.parquet]
- config_name: coarse
  default: true
  data_files: {train: "**/coarse_tr.parquet", test: data/coarse_te.parquet}
dataset_info:
- config_name: fine
  features:
  - name: image
    dtype: image
  - name: label
    dtype:
      class_label:
        names:
          '0': alpha
          '1': beta
- config_name: coarse
  features:
  - {name: label, dtype: {class_label: {names: [one, two]}}}
---
# A data set
"""


def carded(root: Path) -> Path:
    shard(root / "data" / "fine" / "tr-a.parquet", [0, 1])
    shard(root / "data" / "fine" / "tr-b.parquet", [1], start=5)
    shard(root / "data" / "fine" / "held-0.parquet", [0, 1], start=9)
    shard(root / "data" / "coarse_tr.parquet", [0, 1], start=20)
    shard(root / "data" / "coarse_te.parquet", [0], start=30)
    (root / "README.md").write_text(CARD)
    return root


def test_configurations_splits_and_class_names_come_from_the_card(tmp_path: Path) -> None:
    root = carded(tmp_path / "data")
    assert sizes(root) == (2, 1) and load_dataset("mine", str(root)).class_names == ("one", "two")
    assert "coarse is read, which is the default" in notes(root)
    fine = load_dataset("mine", str(root), configuration="fine")
    assert (len(fine.train), len(fine.test)) == (3, 2) and fine.class_names == ("alpha", "beta")
    (root / "README.md").write_text(CARD.replace("  default: true\n", ""))
    with pytest.raises(UserError, match=r"2 configurations \(coarse, fine\)"):
        load_dataset("mine", str(root))


def test_class_names_of_an_older_repository(tmp_path: Path) -> None:
    root = carded(tmp_path / "data")
    (root / "README.md").write_text(CARD.replace("dataset_info:", "other:"))
    fine = {"features": {"label": {"_type": "ClassLabel", "names": ["hen", "owl"]}}}
    infos = {"fine": fine, "coarse": {"features": {"label": {"_type": "Value"}}}}
    file = root / "dataset_infos.json"
    file.write_text(json.dumps(infos))
    assert load_dataset("mine", str(root), configuration="fine").class_names == ("hen", "owl")
    assert load_dataset("mine", str(root)).class_names == ("0", "1"), "a control: no names there"
    for damaged in ("[", "3", '{"fine": 3, "coarse": 3}', '{"fine": {"features": {}}, "x": 1}'):
        file.write_text(damaged)
        found = load_dataset("mine", str(root), configuration="fine")
        assert found.class_names == ("0", "1"), "a file that says nothing is no error"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("---\nconfigs: [\n---\n", r"README.md: expected YAML between its two lines ---"),
        ("---\nconfigs: 3\n---\n", r"README.md: expected `configs` as a list"),
        ("---\nconfigs: [3]\n---\n", r"README.md: expected `configs` as a list"),
        ("---\nconfigs: [{data_files: [{split: x}]}]\n---\n", r"expected `configs` as a list"),
        ("---\nconfigs: [{data_files: {train: 3}}]\n---\n", r"expected `configs` as a list"),
    ],
)
def test_a_card_that_is_damaged_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    root = carded(tmp_path / "data")
    (root / "README.md").write_text(text)
    with pytest.raises(UserError, match=message):
        load_dataset("mine", str(root))


def test_a_readme_that_is_no_card_is_not_looked_at(tmp_path: Path) -> None:
    root = tmp_path / "data"
    shard(root / "train.parquet", [0, 1])
    shard(root / "test.parquet", [1], start=9)
    (root / "README.md").write_text("# Title\n---\nconfigs: 3\n---\n")
    assert sizes(root) == (2, 1)


@pytest.mark.parametrize("names", [["default"], ["plain_text"], ["a", "default"], ["a", "b"]])
def test_a_converted_branch_is_read(names: list[str], tmp_path: Path) -> None:
    """CONFIG/SPLIT/0000.parquet, as the hub converts other formats; README.md may have come along,
    whose files are on another branch."""
    root = tmp_path / "data"
    for k, name in enumerate(names):
        shard(root / name / "train" / "0000.parquet", [0, 1], start=10 * k)
        shard(root / name / "partial-train" / "0001.parquet", [1], start=10 * k + 5)
        shard(root / name / "test" / "0000.parquet", [0], start=10 * k + 7)
    (root / "README.md").write_text(CARD)
    if names == ["a", "b"]:
        with pytest.raises(UserError, match=r"configurations \(a, b\)"):
            load_dataset("mine", str(root))
    assert sizes(root, configuration="b" if "b" in names else None) == (3, 1)


def test_shards_in_hidden_folders_are_not_read(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for k, place in enumerate((".cache/huggingface", "__MACOSX", "")):
        shard(root / place / "train-00000-of-00001.parquet", [0, 1], start=10 * k)
        shard(root / place / "test-00000-of-00001.parquet", [1], start=10 * k + 5)
    found = load_dataset("mine", str(root))
    assert (len(found.train), len(found.test)) == (2, 1)
    assert np.array_equal(found.train.images[0].numpy(), np.asarray(picture(20)).transpose(2, 0, 1))
    assert found.notes == ()
    (root / ".cache").rename(root / "cache")
    assert "configurations cache/huggingface, default, default is read" in notes(root), "a control"


@pytest.mark.parametrize("labels", [[-1, -1], [None, None], None])
def test_a_test_split_without_labels_does_not_hide_a_validation_split(
    labels: list[int | None] | None, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    shard(root / "data" / "train-00000-of-00001.parquet", [0, 1])
    shard(root / "data" / "test-00000-of-00001.parquet", labels, start=5)
    with pytest.raises(UserError, match="labels of the split test are missing or -1"):
        load_dataset("mine", str(root))
    shard(root / "data" / "validation-00000-of-00001.parquet", [0, 1, 1], start=9)
    assert sizes(root) == (2, 3)
    assert notes(root) == "the split test has no labels: validation is the test set"
    shard(root / "data" / "test-00000-of-00001.parquet", [-1, 1], start=5)
    with pytest.raises(UserError, match=r"labels must be whole numbers from 0 on, found '-1'"):
        load_dataset("mine", str(root))


def test_other_splits_beside_the_two_are_named(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for k, split in enumerate(("train", "test", "validation", "train_extra")):
        shard(root / "data" / f"{split}-00000-of-00001.parquet", [0, 1], start=10 * k)
    assert sizes(root) == (2, 2)
    assert notes(root) == (
        "1 file or folder is left out: 1 .parquet (in none of the splits that are read, such as"
        " 'data/train_extra-00000-of-00001.parquet')"
    )


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("training/a.parquet", "dev/a.parquet"),
        ("x-train.parquet", "x-eval.parquet"),
        ("train-data/a.parquet", "test_data/a.parquet"),
        ("trainset.parquet", "validation2.parquet"),
        ("test_config/train-0.parquet", "test_config/valid-0.parquet"),
        ("snapshots/0a1/data/train-0.parquet", "snapshots/0a1/data/test-0.parquet"),
    ],
)
def test_names_of_files_and_folders_say_the_split(train: str, test: str, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shard(root / train, [0, 1, 0])
    shard(root / test, [1], start=9)
    assert sizes(root) == (3, 1)


def test_names_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "data"
    shard(root / "train" / "test-0.parquet", [0, 1])
    with pytest.raises(UserError, match=r"train/test-0.parquet: its name says training and test"):
        load_dataset("mine", str(root))


def test_class_names_in_the_schema_are_used_and_a_file_of_names_wins(tmp_path: Path) -> None:
    root = tmp_path / "data"
    shard(root / "train.parquet", [0, 1], ["ant", "bee"])
    shard(root / "test.parquet", [1], ["ant", "bee"], start=9)
    assert load_dataset("mine", str(root)).class_names == ("ant", "bee")
    (root / "classes.json").write_text('["a", "b"]')
    assert load_dataset("mine", str(root)).class_names == ("a", "b")
    (root / "classes.json").unlink()
    shard(root / "train.parquet", [0, 1], ["ant"])
    with pytest.raises(UserError, match=r"train\.parquet: 1 class names, but labels up to 1"):
        load_dataset("mine", str(root))
    for damage in (b"{", b"[]", b'{"info": 3}', b'{"info": {"features": {"label": {"names": 3}}}}'):
        table = pq.read_table(root / "train.parquet")
        pq.write_table(
            table.replace_schema_metadata({b"huggingface": damage}), root / "train.parquet"
        )
        assert load_dataset("mine", str(root)).class_names == ("0", "1")


def test_a_configuration_is_a_flag_of_an_attack(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for k, name in enumerate(("coarse", "fine")):
        shard(root / name / "train.parquet", [0, 1] * 8, start=100 * k)
        shard(root / name / "test.parquet", [0, 1] * 2, start=100 * k + 50)
    flags = ("--model", "preactresnet10", "--width", "2", "--epochs", "0", "--score_every", "0")
    data = ("--dataset", "mine", "--dataset_path", str(root), "--image_size", "8")
    with pytest.raises(UserError, match="--dataset_config"):
        helpers.attack("none", "x", tmp_path / "record", *flags, *data)
    record = helpers.attack(
        "none", "x", tmp_path / "record", *flags, *data, "--dataset_config", "fine"
    )
    assert record.dataset(str(root), "fine").fingerprint == record.info["dataset"]["fingerprint"]
    with pytest.raises(UserError, match="was made on other data"):
        record.dataset(str(root), "coarse")


@pytest.mark.parametrize(
    ("make", "path", "message"),
    [
        (folder, True, r"--dataset_config x: expected parquet shards in"),
        (folder, False, r"--dataset_config x: expected a folder .* pass --dataset_path"),
    ],
)
def test_a_configuration_that_nothing_has_is_one_line(
    make: Callable[[Path], Path], path: bool, message: str, tmp_path: Path
) -> None:
    root = make(tmp_path / "data")
    with pytest.raises(UserError, match=message):
        load_dataset("digits", str(root) if path else None, configuration="x")


# --- doctor


def test_doctor_prints_what_it_understood_of_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder(tmp_path / "data", ("10", "9", "cat"), test="val")
    (root / "test").mkdir()
    (root / "train" / "cat" / "0.png").write_bytes(photo(1, 6))
    drawing("RGBA").save(root / "train" / "cat" / "1.png")
    (root / "train" / "cat" / "x.txt").write_text("x")
    (root / "train" / "cat" / "y.png").write_text("no image")
    (root / "words.txt").write_text("x")
    (root / "train" / "cat" / ".DS_Store").write_text("x")
    assert __main__.main(["doctor", "--dataset_path", str(root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"data set    {root}: folders of images",
        "train       train/: 10 images in 10 files",
        "test        val/: 6 images in 6 files",
        "note        test/ has no images with labels: val/ is the test set",
        "sizes       8 x 6 (13), 6 x 8 (1), 8 x 8 (1) (width x height, of 16 images looked at):"
        " pass --image_size N",
        "channels    3 channels",
        "orientation 1 of 16 images looked at is turned upright, as EXIF says",
        "alpha       1 of 16 images looked at is put on white, for an alpha channel",
        lines[8],
        "left out    1 without suffix (hidden or a file manager's, such as 'train/cat/.DS_Store')",
        "left out    1 .txt (not an image, such as 'train/cat/x.txt')",
        "beside      test, words.txt: no images are read from these",
        "classes     3, named by folders in train/: label, train + test images, name",
        "          0       3 + 2       9",
        "          1       3 + 2       10",
        "          2       4 + 2       cat",
    ]
    assert lines[8].startswith(f"damaged     {root}/train/cat/y.png: not a readable image")
    assert not (tmp_path / "cache").exists(), "nothing is decoded or kept"


def test_doctor_prints_what_it_understood_of_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = carded(tmp_path / "data")
    flags = ("--dataset_path", str(root), "--dataset_config", "fine")
    assert __main__.main(["doctor", *flags]) == 0
    out = capsys.readouterr().out
    for line in (
        "train       train: 3 images in 2 files",
        "test        validation: 2 images in 1 files",
        "sizes       8 x 6 (width x height, of 5 images looked at)",
        "orientation none of 5 images looked at is turned upright, as EXIF says",
        "classes     2, named by README.md: label, train + test images, name",
        "          1       2 + 1       beta",
    ):
        assert line in out.splitlines()
    with pytest.raises(UserError, match="no such folder"):
        list(describe_folder(str(tmp_path / "nothing"), None))
