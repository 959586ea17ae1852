"""Trusted images: drawn from the training set, or a user's own; what is missing in them is said."""

from pathlib import Path

import helpers
import pytest
import torch
import torchvision
from torch import Tensor

from backdoorlab.datasets.load import load_trusted
from backdoorlab.errors import UserError
from backdoorlab.record import Record


def folder_of(
    images: Tensor, labels: Tensor, folder: Path, names: tuple[str, ...] = tuple("0123456789")
) -> Path:
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        (folder / names[label]).mkdir(parents=True, exist_ok=True)
        torchvision.io.write_png(image, str(folder / names[label] / f"{number:04}.png"))
    return folder


@pytest.fixture
def clean(tiny: Record) -> tuple[Tensor, Tensor]:
    train = tiny.dataset().train
    return train.images[:60], train.labels[:60]


def shards(images: Tensor, labels: Tensor, folder: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    encoded = [bytes(torchvision.io.encode_png(image).numpy()) for image in images]
    folder.mkdir()
    pq.write_table(
        pa.table({"image": [{"bytes": data} for data in encoded], "label": labels.tolist()}),
        folder / "clean.parquet",
    )
    return folder


def test_a_folder_and_shards_give_the_same_images(
    clean: tuple[Tensor, Tensor], tiny: Record, tmp_path: Path
) -> None:
    images, labels = clean
    order = labels.argsort(stable=True)
    for path in (
        folder_of(*clean, tmp_path / "png"),
        shards(images[order], labels[order], tmp_path / "parquet"),
    ):
        found, _ = load_trusted(str(path), tiny.dataset(), 16)
        assert torch.equal(found.images, images[order]) and torch.equal(found.labels, labels[order])


def test_class_folders_may_have_numbers_or_names(
    clean: tuple[Tensor, Tensor], tiny: Record, tmp_path: Path
) -> None:
    from dataclasses import replace

    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    named = replace(tiny.dataset(), class_names=names)
    for path in (
        folder_of(*clean, tmp_path / "names", names),
        folder_of(*clean, tmp_path / "numbers"),
    ):
        assert torch.equal(load_trusted(str(path), named, 16)[0].labels, clean[1].sort().values)


def test_what_is_left_out_of_the_folder_is_said(
    clean: tuple[Tensor, Tensor], tiny: Record, tmp_path: Path
) -> None:
    images = folder_of(*clean, tmp_path / "png")
    assert load_trusted(str(images), tiny.dataset(), 16)[1] == (), "a control: all is read"
    (images / "3" / "camera.mov").write_bytes(b"no image")
    (images / "loose.png").write_bytes(next((images / "3").glob("*.png")).read_bytes())
    found, (note,) = load_trusted(str(images), tiny.dataset(), 16)
    assert len(found) == len(clean[1])
    assert note.startswith("--trusted_path: 2 files or folders are left out: ")
    assert "camera.mov" in note and "loose.png" in note


def test_what_does_not_fit_is_one_line(
    clean: tuple[Tensor, Tensor], tiny: Record, tmp_path: Path
) -> None:
    images, labels = clean
    dataset = tiny.dataset()
    large = folder_of(
        images.repeat_interleave(2, 2).repeat_interleave(2, 3), labels, tmp_path / "large"
    )
    with pytest.raises(
        UserError,
        match=r"expected images of \(1, 16, 16\) \(channels, height, width\), found \(1, 32, 32\)",
    ):
        load_trusted(str(large), dataset, None)
    assert load_trusted(str(large), dataset, 16)[0].images.shape[1:] == (1, 16, 16), (
        "the record's own resizing applies"
    )
    cats = folder_of(images, labels, tmp_path / "cats", tuple(f"cat{i}" for i in range(10)))
    with pytest.raises(
        UserError,
        match=r"expected one folder for each of the 10 classes of digits .*, found cat0, cat1",
    ):
        load_trusted(str(cats), dataset, 16)
    with pytest.raises(UserError, match="digits has 10 classes, found label 12"):
        load_trusted(str(shards(images, labels + 3, tmp_path / "many")), dataset, 16)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="found nothing"):
        load_trusted(str(tmp_path / "empty"), dataset, 16)


def test_a_missing_class_and_a_large_batch_are_said(
    clean: tuple[Tensor, Tensor], tiny: Record, tmp_path: Path
) -> None:
    record = helpers.copy(tiny, tmp_path / "record")
    images, labels = clean
    kept = (labels != 3) & (labels != 7)
    path = folder_of(images[kept], labels[kept], tmp_path / "png")
    flags = ("--n_rounds", "1", "--K", "0", "--delta_steps", "1", "--score_every", "0")
    for run, more, missing, large in (
        ("own", ("--trusted_path", str(path), "--batch_size", "500"), True, True),
        ("drawn", ("--trusted_ratio", "0.2", "--batch_size", "24"), False, False),
    ):
        result = helpers.defend("ibau", record, *flags, *more, "--run_name", run)
        assert result is not None
        notes = " | ".join(result["notes"])
        assert (
            "no trusted image of 2 of 10 classes (3, 7): their accuracy may be lost" in notes
        ) == missing
        assert (
            f"batch_size 500 is more than the {int(kept.sum())} trusted images" in notes
        ) == large
