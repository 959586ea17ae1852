"""Data: every reader, the cache, and batches."""

import io
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from backdoorlab.data import (
    Augment,
    Dataset,
    Split,
    batches,
    channel_statistics,
    fingerprint,
    mapped,
    to_bytes,
    to_device,
    to_float,
    trusted_index,
)
from backdoorlab.datasets import cache as arrays
from backdoorlab.datasets import decoding
from backdoorlab.datasets.load import find as find_dataset
from backdoorlab.datasets.load import load as load_dataset
from backdoorlab.datasets.load import train_files
from backdoorlab.errors import UserError
from backdoorlab.storage import locks

CPU = torch.device("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def on_disk(split: Split, folder: Path) -> Split:
    np.save(folder / "images.npy", split.images.numpy())
    return Split(mapped(folder / "images.npy"), split.labels, folder / "images.npy")


def toy(n: int = 53, channels: int = 3, height: int = 8, width: int = 8) -> Split:
    images = torch.randint(
        0, 256, (n, channels, height, width), dtype=torch.uint8, generator=generator(5)
    )
    return Split(images, torch.arange(n) % 7)


# --- batches


@pytest.mark.parametrize("batch_size", [1, 7, 53, 100])
def test_a_pass_shows_each_image_once(batch_size: int) -> None:
    split = toy()
    seen = list(batches(split, batch_size, device=CPU, generator=generator()))
    index = torch.cat([batch.index for batch in seen])
    assert index.sort().values.tolist() == list(range(53))
    assert not torch.equal(index, torch.arange(53)), "shuffled"
    for batch in seen:
        assert batch.images.dtype == torch.float32
        assert torch.equal(batch.images, split.images[batch.index].float() / 255)
        assert torch.equal(batch.labels, split.labels[batch.index])


def test_without_a_generator_images_come_in_order_and_as_they_are() -> None:
    split = toy()
    seen = list(batches(split, 20, device=CPU))
    assert torch.cat([batch.index for batch in seen]).tolist() == list(range(53))
    assert [len(batch.labels) for batch in seen] == [20, 20, 13]
    assert torch.equal(torch.cat([batch.images for batch in seen]), split.images.float() / 255)


def test_drop_last_leaves_out_a_smaller_batch_only() -> None:
    def sizes(n):
        return [
            len(batch.labels)
            for batch in batches(toy(n), 10, device=CPU, generator=generator(), drop_last=True)
        ]

    assert sizes(53) == [10] * 5
    assert sizes(50) == [10] * 5
    assert sizes(9) == [9], "the only one is kept"


def test_a_last_batch_of_one_image_joins_the_one_before_where_images_are_shuffled() -> None:
    def sizes(n, size, draws):
        return [len(batch.labels) for batch in batches(toy(n), size, device=CPU, generator=draws)]

    assert sizes(21, 10, generator()) == [10, 11] and sizes(21, 10, None) == [10, 10, 1]
    assert (
        sizes(22, 10, generator()) == [10, 10, 2]
        and sizes(1, 10, generator()) == [1]
        and sizes(3, 1, generator()) == [1, 1, 1]
    )


def test_order_is_taken_literally_with_repeats() -> None:
    split, order = toy(), torch.tensor([4, 4, 0, 52, 4, 9])
    seen = list(batches(split, 4, device=CPU, order=order))
    assert torch.cat([batch.index for batch in seen]).tolist() == order.tolist()
    assert torch.equal(
        torch.cat([batch.images for batch in seen]), split.images[order].float() / 255
    )
    shifted = torch.cat(
        [
            batch.images
            for batch in batches(
                split, 6, device=CPU, order=order, generator=generator(1), augment=Augment(3, True)
            )
        ]
    )
    assert not torch.equal(shifted[0], shifted[1]), "two showings of one image are augmented apart"


def test_the_generator_decides_everything() -> None:
    split, augment = toy(), Augment(2, True)

    def run(seed):
        return list(batches(split, 16, device=CPU, generator=generator(seed), augment=augment))

    for a, b in zip(run(3), run(3), strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.index, b.index)
    assert any(not torch.equal(a.index, b.index) for a, b in zip(run(3), run(4), strict=True))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    run(3)
    assert torch.equal(state, torch.get_rng_state()), "the global generator is not touched"


def test_augmentation_does_not_depend_on_the_batch_size() -> None:
    split, augment = toy(), Augment(2, True)
    passes = [
        torch.cat(
            [
                b.images
                for b in batches(split, size, device=CPU, generator=generator(3), augment=augment)
            ]
        )
        for size in (5, 16, 53)
    ]
    assert torch.equal(passes[0], passes[1]) and torch.equal(passes[0], passes[2])


def test_augmentation_without_a_generator_is_a_defect() -> None:
    with pytest.raises(ValueError, match="generator"):
        next(batches(toy(), 5, device=CPU, augment=Augment(2)))


@pytest.mark.parametrize(("padding", "flip"), [(2, False), (0, True), (3, True)])
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 6, 10)])
def test_crop_and_flip_equal_an_image_by_image_reference(
    padding: int, flip: bool, shape: tuple[int, int, int]
) -> None:
    split = toy(40, *shape)
    _, height, width = shape
    draws = generator(11)
    order = torch.randperm(40, generator=draws)
    moves = (
        torch.randint(0, 2 * padding + 1, (2, 40), generator=draws)
        if padding
        else torch.zeros(2, 40, dtype=torch.int64)
    )
    flips = torch.rand(40, generator=draws) < 0.5 if flip else torch.zeros(40, dtype=torch.bool)
    wanted = []
    for k, i in enumerate(order.tolist()):
        frame = np.zeros((shape[0], height + 2 * padding, width + 2 * padding), np.uint8)
        frame[:, padding : padding + height, padding : padding + width] = split.images[i].numpy()
        top, left = int(moves[0, k]), int(moves[1, k])
        crop = frame[:, top : top + height, left : left + width]
        wanted.append(crop[:, :, ::-1].copy() if flips[k] else crop)
    seen = torch.cat(
        [
            b.images
            for b in batches(
                split, 16, device=CPU, generator=generator(11), augment=Augment(padding, flip)
            )
        ]
    )
    assert np.array_equal(to_bytes(seen).numpy(), np.stack(wanted))
    assert not torch.equal(to_bytes(seen), split.images[order]), "something was moved"


def test_half_of_the_images_are_mirrored_and_crops_reach_every_offset() -> None:
    n = 2000
    split = Split(
        torch.arange(1, 5, dtype=torch.uint8).view(1, 1, 2, 2).repeat(n, 1, 1, 1),
        torch.zeros(n, dtype=torch.int64),
    )
    seen = to_bytes(
        torch.cat(
            [
                b.images
                for b in batches(
                    split, 500, device=CPU, generator=generator(), augment=Augment(0, True)
                )
            ]
        )
    )
    assert set(map(tuple, seen.flatten(1).tolist())) == {(1, 2, 3, 4), (2, 1, 4, 3)}
    assert 0.45 < (seen[:, 0, 0, 0] == 2).double().mean() < 0.55
    seen = to_bytes(
        torch.cat(
            [
                b.images
                for b in batches(
                    split, 500, device=CPU, generator=generator(), augment=Augment(1, False)
                )
            ]
        )
    )
    assert len(set(map(tuple, seen.flatten(1).tolist()))) == 9


def test_bytes_round_and_clip_and_never_wrap() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_bytes(to_float(every)), every)
    beyond = torch.tensor([-0.5, 1.5, 0.4999 / 255, 0.5001 / 255]).view(1, 1, 2, 2)
    assert to_bytes(beyond).flatten().tolist() == [0, 255, 0, 1]


def test_a_memory_map_gives_the_same_batches(tmp_path: Path) -> None:
    split = toy()
    resident, from_file = split, on_disk(split, tmp_path)
    for drop_last in (False, True):
        pairs = [
            list(
                batches(
                    s,
                    16,
                    device=CPU,
                    generator=generator(2),
                    augment=Augment(2, True),
                    drop_last=drop_last,
                )
            )
            for s in (resident, from_file)
        ]
        for a, b in zip(*pairs, strict=True):
            assert (
                torch.equal(a.images, b.images)
                and torch.equal(a.labels, b.labels)
                and torch.equal(a.index, b.index)
            )
    assert torch.equal(from_file.images, split.images), "batches do not write into the map"


def test_a_copy_of_a_memory_map_may_be_written_and_the_file_stays(tmp_path: Path) -> None:
    split = toy()
    clean = on_disk(split, tmp_path)
    changed = clean.copy()
    changed.images[[1, 3]], changed.labels[[1, 3]] = 7, 5
    assert (changed.images[[1, 3]] == 7).all() and torch.equal(changed.images[2], split.images[2])
    assert torch.equal(clean.images, split.images) and torch.equal(clean.labels, split.labels)
    assert np.array_equal(np.load(tmp_path / "images.npy"), split.images.numpy())
    seen = torch.cat([batch.images for batch in batches(changed, 16, device=CPU)])
    assert torch.equal(to_bytes(seen), changed.images), (
        "batches come from the changed copy, not from the file"
    )


def test_a_reader_that_stops_early_leaves_no_thread_and_a_failing_fetch_is_heard(
    tmp_path: Path,
) -> None:
    before = threading.active_count()
    stream = batches(on_disk(toy(), tmp_path), 4, device=CPU)
    next(stream)
    assert threading.active_count() == before + 1
    stream.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
    with pytest.raises(IndexError):
        list(batches(on_disk(toy(), tmp_path), 4, device=CPU, order=torch.tensor([0, 10_000])))


MEMORY = """
import sys
from pathlib import Path
import numpy as np, torch
from backdoorlab.data import Augment, Split, batches, mapped
from backdoorlab.poison import Poison

def held():
    status = open("/proc/self/status")
    return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024

file, way = Path(sys.argv[1]), sys.argv[2]
images, labels = mapped(file), torch.zeros(len(np.load(file, mmap_mode="r")), dtype=torch.int64)
clean = Split(images, labels, file if way == "mapped" else None)
index = torch.arange(0, len(labels), 100)
few = torch.zeros(len(index), dtype=torch.int64)
poison = Poison(index, images[index], few, few, few.byte())
generator = torch.Generator().manual_seed(0)
for batch in batches(clean, 64, device=torch.device("cpu"), order=torch.arange(256)):
    pass
before = held()
received = poison.apply(clean)
cpu, augment = torch.device("cpu"), Augment(4, True)
for batch in batches(received, 64, device=cpu, generator=generator, augment=augment):
    pass
print(held() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_set_larger_than_the_memory_it_may_take_is_poisoned_and_read(tmp_path: Path) -> None:
    """Poison 1 % of 96 MB of images and make one shuffled pass: private memory may grow by a
    quarter of their size. Control: a copy in memory."""
    file = tmp_path / "images.npy"
    np.save(file, np.random.default_rng(0).integers(0, 256, (8_000, 3, 64, 64), np.uint8))
    megabytes = file.stat().st_size / 2**20
    grown = {}
    for way in ("mapped", "resident"):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(file), way],
            capture_output=True,
            text=True,
            check=True,
        )
        grown[way] = float(done.stdout)
    assert grown["mapped"] < megabytes / 4 < megabytes * 0.9 < grown["resident"], grown


def test_subset_copies_and_place_keeps_a_cpu_split() -> None:
    split = toy()
    part = split.subset(torch.tensor([3, 1]))
    assert torch.equal(part.images, split.images[[3, 1]]) and part.labels.tolist() == [3, 1]
    part.images[0] = 0
    assert split.images[3].any()
    assert to_device(split, CPU) is split


def test_trusted_images_are_drawn_uniformly_without_replacement() -> None:
    index = trusted_index(1000, ratio=0.0519, count=None, generator=generator())
    assert len(index) == 51, "floor of the share"
    assert torch.equal(index, index.unique()), "sorted, no repeats"
    assert torch.equal(index, trusted_index(1000, ratio=0.0519, count=None, generator=generator()))
    assert not torch.equal(
        index, trusted_index(1000, ratio=0.0519, count=None, generator=generator(1))
    )
    assert len(trusted_index(1000, ratio=0.5, count=7, generator=generator())) == 7, (
        "a count wins over a share"
    )
    assert trusted_index(5, ratio=1.0, count=None, generator=generator()).tolist() == [
        0,
        1,
        2,
        3,
        4,
    ]


@pytest.mark.parametrize(
    ("ratio", "count"),
    [(0.0, None), (1.1, None), (-1.0, None), (0.0001, None), (0.5, 0), (0.5, 1001), (0.5, -3)],
)
def test_a_trusted_set_that_cannot_be_drawn_is_refused(ratio: float, count: int | None) -> None:
    with pytest.raises(UserError, match="trusted"):
        trusted_index(1000, ratio=ratio, count=count, generator=generator())


def test_channel_statistics_are_those_of_numpy() -> None:
    split = toy(200)
    mean, std = channel_statistics(split)
    pixels = split.images.numpy() / 255
    assert np.allclose(mean, pixels.mean((0, 2, 3)), atol=1e-4)
    assert np.allclose(std, pixels.std((0, 2, 3)), atol=1e-4)


# --- fingerprint


def test_the_fingerprint_sees_every_byte_label_name_and_the_order() -> None:
    names = tuple("abcdefg")
    base = fingerprint(toy(), toy(20), names)
    assert base == fingerprint(toy(), toy(20), names)
    changed = []
    for where in ("train", "test"):
        for what in ("pixel", "label", "order"):
            train, test = toy(), toy(20)
            split = train if where == "train" else test
            if what == "pixel":
                split.images[-1, -1, -1, -1] ^= 1
            elif what == "label":
                split.labels[-1] += 1
            else:
                order = torch.arange(len(split)).flip(0)
                split = split.subset(order)
                train, test = (split, test) if where == "train" else (train, split)
            changed.append(fingerprint(train, test, names))
    changed.append(fingerprint(toy(), toy(20), tuple("abcdefh")))
    reshaped = toy()
    changed.append(
        fingerprint(Split(reshaped.images.view(53, 3, 4, 16), reshaped.labels), toy(20), names)
    )
    assert len({base, *changed}) == 9


# --- digits


def test_digits_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKDOORLAB_CACHE", str(tmp_path))
    first = load_dataset("digits")
    monkeypatch.setattr(
        "backdoorlab.datasets.load.digits", lambda *_args, **_options: pytest.fail("decoded again")
    )
    again = find_dataset("digits", first.fingerprint)
    assert (
        torch.equal(again.train.images, first.train.images)
        and again.fingerprint == first.fingerprint
    )
    with pytest.raises(pytest.fail.Exception):  # the control: another size is another entry
        load_dataset("digits", image_size=16)


def test_digits_are_split_by_class_and_without_overlap() -> None:
    from sklearn.datasets import load_digits

    dataset, source = load_dataset("digits"), load_digits()
    assert (len(dataset.train), len(dataset.test), dataset.num_classes, dataset.image_shape) == (
        1442,
        355,
        10,
        (1, 32, 32),
    )
    for label in range(10):
        here, there = (
            int((dataset.train.labels == label).sum()),
            int((dataset.test.labels == label).sum()),
        )
        assert there == (here + there) // 5
        assert here + there == int((source.target == label).sum())
    rows = [
        bytes(image.numpy().tobytes())
        for image in torch.cat([dataset.train.images, dataset.test.images])
    ]
    assert len(rows) == 1797
    assert not set(rows[:1442]) & set(rows[1442:]), "no test image is in the training set"
    assert dataset.fingerprint == load_dataset("digits").fingerprint
    assert load_dataset("digits", image_size=16).image_shape == (1, 16, 16)
    assert load_dataset("digits", image_size=16).fingerprint != dataset.fingerprint


# --- folders and shards


def picture(value: int, size: tuple[int, int] = (12, 12), mode: str = "RGB") -> Image.Image:
    """Make an image of `size` (width, height): a gradient by `value`, different in each channel."""
    rows, columns = np.mgrid[0 : size[1], 0 : size[0]]
    planes = [(value * 7 + k * 31 + rows * 3 + columns * 2) % 256 for k in range(3)]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, form)
    return stream.getvalue()


def image_folder(
    root: Path,
    classes: tuple[str, ...] = ("cat", "dog"),
    test: str | None = "test",
    size: tuple[int, int] = (12, 12),
) -> Path:
    for split, count in (("train", 3), *(((test, 2),) if test else ())):
        for number, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                picture(10 * number + i + (100 if split == test else 0), size).save(
                    folder / f"{i}.png"
                )
    return root


def shards(
    root: Path,
    *,
    column: str = "img",
    label: str = "label",
    form: str = "PNG",
    struct: bool = True,
    train: tuple[int, ...] = (2, 1),
    test: str = "test",
    size: tuple[int, int] = (12, 12),
) -> Path:
    """Write shards in the hub's layout, train-00000-of-0000N.parquet, with the labels 0, 1, 2 in
    turn."""
    root.mkdir(parents=True, exist_ok=True)
    start = 0
    for k, count in enumerate((*train, 2)):
        data = [encoded(picture(start + i, size), form) for i in range(count)]
        cells: list[Any] = [{"bytes": cell, "path": None} for cell in data] if struct else data
        name = f"train-{k:05}-of-{len(train):05}" if k < len(train) else f"{test}-00000-of-00001"
        pq.write_table(
            pa.table({column: cells, label: [(start + i) % 3 for i in range(count)]}),
            root / f"{name}.parquet",
        )
        start += count
    return root


def test_gtsrb_is_the_final_training_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision has an older training set without a third of the images: their number tells which
    of the two is on the disk."""
    folder = tmp_path / "gtsrb"
    for number in (0, 1, 2):
        images = folder / "GTSRB" / "Final_Training" / "Images" / f"{number:05}"
        images.mkdir(parents=True)
        Image.new("RGB", (20 + number, 18), (80 * number, 0, 0)).save(images / "00000_00000.ppm")
        (images / f"GT-{number:05}.csv").write_text("Filename;ClassId\n")
    test = folder / "GTSRB" / "Final_Test" / "Images"
    test.mkdir(parents=True)
    Image.new("RGB", (30, 30), (160, 0, 0)).save(test / "00000.ppm")
    (folder / "GT-final_test.csv").write_text("Filename;Width;Height;ClassId\n00000.ppm;30;30;2\n")
    monkeypatch.setenv("BACKDOORLAB_DATA", str(tmp_path))
    monkeypatch.setattr("backdoorlab.datasets.readers._require_network", lambda name, root: None)
    fetched = []
    monkeypatch.setattr(
        "torchvision.datasets.utils.download_and_extract_archive",
        lambda address, **options: fetched.append(address),
    )
    with pytest.raises(
        UserError, match=r"'gtsrb' could not be downloaded .*expected 39,209 images, found 3"
    ):
        load_dataset("gtsrb", image_size=8)
    assert fetched[0].endswith("GTSRB_Final_Training_Images.zip")
    monkeypatch.setattr("backdoorlab.datasets.readers.GTSRB_SIZE", 3)
    found = load_dataset("gtsrb", image_size=8)
    assert found.train.labels.tolist() == [0, 1, 2] and found.test.labels.tolist() == [2]
    assert found.train.images[:, 0].float().mean((1, 2)).tolist() == [0, 80, 160]


def test_more_images_than_fit_in_memory_are_decoded_into_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(image_folder(tmp_path / "data"))
    small = load_dataset("pets", root)
    monkeypatch.setattr("backdoorlab.datasets.decoding.LARGE", 100)
    monkeypatch.setenv("BACKDOORLAB_CACHE", str(tmp_path / "other"))
    assert isinstance(decoding._room((1, 3, 12, 12)), np.memmap) and not isinstance(
        decoding._room((1, 3, 2, 2)), np.memmap
    )
    large = load_dataset("pets", root)
    assert large.fingerprint == small.fingerprint and torch.equal(
        large.train.images, small.train.images
    )
    assert len(list((tmp_path / "other").iterdir())) == 1, "nothing but the cached data set is left"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(decoding.os, "posix_fallocate", full)
    with pytest.raises(UserError, match="no room for"):
        load_dataset("pets", root, image_size=10)


def test_image_folder_reads_pixels_labels_and_names(tmp_path: Path) -> None:
    dataset = load_dataset("pets", str(image_folder(tmp_path / "data")))
    assert dataset.class_names == ("cat", "dog") and dataset.image_shape == (3, 12, 12)
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1, 1] and dataset.test.labels.tolist() == [
        0,
        0,
        1,
        1,
    ]
    for row, value in zip(dataset.train.images, (0, 1, 2, 10, 11, 12), strict=True):
        assert np.array_equal(row.numpy(), np.asarray(picture(value)).transpose(2, 0, 1))
    assert np.array_equal(
        dataset.test.images[3].numpy(), np.asarray(picture(111)).transpose(2, 0, 1)
    )


def test_classes_that_are_numbers_are_in_numerical_order(tmp_path: Path) -> None:
    dataset = load_dataset("numbers", str(image_folder(tmp_path / "data", ("10", "9", "2"))))
    assert dataset.class_names == ("2", "9", "10")


def test_what_is_hidden_is_neither_a_class_nor_an_image(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data")
    clean = load_dataset("pets", str(folder))
    shutil.copytree(folder / "train" / "cat", folder / "train" / ".ipynb_checkpoints")
    shutil.copytree(folder / "train" / "cat", folder / "train" / "cat" / ".ipynb_checkpoints")
    (folder / "train" / "dog" / "._0.png").write_bytes(b"what a Mac leaves beside a file")
    found = load_dataset("pets", str(folder))
    assert found.class_names == clean.class_names and found.fingerprint == clean.fingerprint
    assert len(train_files(str(folder)) or []) == len(clean.train)
    shutil.copytree(folder / "train" / "cat", folder / "train" / "cat" / "more")
    assert len(load_dataset("pets", str(folder)).train) == 9, (
        "a control: a folder in a class's folder is read"
    )


def test_what_is_linked_is_read_and_a_change_in_it_is_noticed(tmp_path: Path) -> None:
    """Two folders of links to images elsewhere, under one name: they must be two data sets."""
    found = {}
    for name, classes in (("one", ("cat", "dog")), ("two", ("x", "y"))):
        source = image_folder(tmp_path / "disk" / name, classes)
        (tmp_path / name).mkdir()
        for part in ("train", "test"):
            (tmp_path / name / part).symlink_to(source / part)
        found[name] = load_dataset("pets", str(tmp_path / name))
        assert found[name].class_names == classes
    (tmp_path / "disk" / "one" / "train" / "cat" / "more").symlink_to(
        tmp_path / "disk" / "one" / "train" / "dog"
    )
    (tmp_path / "disk" / "one" / "train" / "dog" / "back").symlink_to(
        tmp_path / "disk" / "one" / "train"
    )
    again = load_dataset("pets", str(tmp_path / "one"))
    assert len(again.train) > len(found["one"].train), (
        "a linked folder in a class's folder is read, and a link back to where it lies ends"
    )
    picture(99, (12, 12)).save(next((tmp_path / "disk" / "two" / "train" / "x").glob("*.png")))
    assert load_dataset("pets", str(tmp_path / "two")).fingerprint != found["two"].fingerprint


def test_a_class_may_have_any_name(tmp_path: Path) -> None:
    assert load_dataset(
        "powers", str(image_folder(tmp_path / "data", ("²", "10")))
    ).class_names == ("10", "²")


def test_folders_that_are_no_classes_are_refused(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data", ("emu", "dog"))
    (folder / "train" / "empty").mkdir()
    with pytest.raises(
        UserError, match=r"train/empty: no images .*; each folder in train/ is a class"
    ):
        load_dataset("pets", str(folder))
    (folder / "train" / "empty").rmdir()
    (folder / "test" / "zebra").mkdir()
    with pytest.raises(
        UserError,
        match=(
            "test/zebra: no folder of this name in train/, whose folders are the classes: dog, emu"
        ),
    ):
        load_dataset("pets", str(folder))
    (folder / "test" / "zebra").rmdir()
    shutil.rmtree(folder / "test" / "emu")
    assert load_dataset("pets", str(folder)).test.labels.tolist() == [
        0,
        0,
    ], "a control: a test set may lack a class"


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_other_names_of_a_test_split(tmp_path: Path, name: str) -> None:
    assert len(load_dataset("pets", str(image_folder(tmp_path / "data", test=name))).test) == 4


def test_grey_and_resized(tmp_path: Path) -> None:
    root = str(image_folder(tmp_path / "data", size=(20, 14)))
    assert load_dataset("pets", root).image_shape == (3, 14, 20), "height before width"
    dataset = load_dataset("pets", root, image_size=8, grey=True)
    assert dataset.image_shape == (1, 8, 8)
    wanted = picture(0, (20, 14), "L").resize((8, 8), Image.Resampling.BILINEAR)
    assert np.array_equal(dataset.train.images[0, 0].numpy(), np.asarray(wanted))


@pytest.mark.parametrize("column", ["img", "image"])
@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_shards_in_the_hubs_layout(tmp_path: Path, column: str, form: str) -> None:
    root = shards(tmp_path / "data", column=column, form=form)
    dataset = load_dataset("hub", str(root))
    assert dataset.train.labels.tolist() == [0, 1, 2] and dataset.test.labels.tolist() == [0, 1]
    assert dataset.class_names == ("0", "1", "2")
    if form == "PNG":  # lossless: the pixels are exact, and in the order of the shards
        for i, row in enumerate([*dataset.train.images, *dataset.test.images]):
            assert np.array_equal(row.numpy(), np.asarray(picture(i)).transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("struct", "label", "test"),
    [(False, "label", "test"), (True, "labels", "test"), (True, "fine_label", "validation")],
)
def test_other_layouts_of_shards(tmp_path: Path, struct: bool, label: str, test: str) -> None:
    dataset = load_dataset(
        "hub", str(shards(tmp_path / "data", struct=struct, label=label, test=test))
    )
    assert (len(dataset.train), len(dataset.test)) == (3, 2)
    assert np.array_equal(
        dataset.train.images[2].numpy(), np.asarray(picture(2)).transpose(2, 0, 1)
    )


def test_a_shard_is_of_the_split_that_a_word_of_its_name_says(tmp_path: Path) -> None:
    """ "latest" is no test set: its training images, poisoned ones among them, would be used as
    clean test images."""
    root = shards(tmp_path / "data", test="validation")
    for file in list(root.glob("*.parquet")):
        file.rename(root / f"latest-{file.name}")
    dataset = load_dataset("hub", str(root))
    assert (len(dataset.train), len(dataset.test)) == (3, 2)


def test_no_other_program_is_started_for_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow would start Ghostscript for PostScript, whatever the file is called, and that is a
    stranger's program."""
    from PIL import EpsImagePlugin

    started = []

    def ghostscript(*_: Any, **__: Any) -> Any:
        started.append("gs")
        return Image.new("RGB", (8, 8)).im

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ghostscript)
    file = tmp_path / "0.png"
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    for read in (
        lambda: decoding.from_file(file, None, None),
        lambda: decoding.from_bytes(file.read_bytes(), file, None, None),
    ):
        with pytest.raises(UserError, match="not a readable image"):
            read()
    assert not started
    with Image.open(file) as image:
        image.load()
    assert started, "the control: Pillow itself would"


@pytest.mark.parametrize(
    "content",
    [
        ["aa", "bb", "cc"],
        [{"label": 2, "name": "cc"}, {"label": 0, "name": "aa"}, {"label": 1, "name": "bb"}],
        {"0": "aa", "1": "bb", "2": "cc"},
        {"classes": ["aa", "bb", "cc"]},
        {"names": {"0": "aa", "1": "bb", "2": "cc"}},
    ],
)
def test_class_names_from_classes_json(tmp_path: Path, content: Any) -> None:
    root = shards(tmp_path / "data")
    (root / "classes.json").write_text(json.dumps(content))
    assert load_dataset("hub", str(root)).class_names == ("aa", "bb", "cc")


def _empty(root: Path) -> Path:
    root.mkdir()
    return root


def _no_test(root: Path) -> Path:
    return image_folder(root, test=None)


def _no_images(root: Path) -> Path:
    (root / "train" / "cat").mkdir(parents=True)
    (root / "test" / "cat").mkdir(parents=True)
    return root


def _no_test_shards(root: Path) -> Path:
    shards(root)
    next(root.glob("test*")).unlink()
    return root


def _other_shapes(root: Path) -> Path:
    picture(1, (13, 12)).save(image_folder(root) / "train" / "dog" / "9.png")
    return root


def _not_an_image(root: Path) -> Path:
    (image_folder(root) / "train" / "dog" / "9.png").write_bytes(b"not a picture")
    return root


def _not_parquet(root: Path) -> Path:
    (shards(root) / "train-00000-of-00002.parquet").write_bytes(b"not a table")
    return root


def _bad_cell(root: Path) -> Path:
    shards(root)
    pq.write_table(
        pa.table({"img": [{"bytes": b"no picture", "path": None}] * 2, "label": [0, 1]}),
        root / "train-00000-of-00002.parquet",
    )
    return root


def _few_names(root: Path) -> Path:
    (shards(root) / "classes.json").write_text('["only one"]')
    return root


def _odd_names(root: Path) -> Path:
    (shards(root) / "classes.json").write_text("3")
    return root


def _test_of_another_size(root: Path) -> Path:
    """Test images are decoded separately from training images: their shape must be compared,
    too."""
    for file in image_folder(root).glob("test/*/*.png"):
        picture(1, (24, 24)).save(file)
    return root


def _grey_test(root: Path) -> Path:
    for file in image_folder(root).glob("test/*/*.png"):
        picture(1).convert("L").save(file)
    return root


def _no_bytes(root: Path) -> Path:
    shards(root)
    pq.write_table(
        pa.table({"img": [{"path": "x.png"}] * 2, "label": [0, 1]}),
        root / "train-00000-of-00002.parquet",
    )
    return root


def _names(root: Path, content: str) -> Path:
    (shards(root) / "classes.json").write_text(content)
    return root


def _large_label(root: Path) -> Path:
    shards(root)
    pq.write_table(
        pa.table({"img": [{"bytes": encoded(picture(1)), "path": None}], "label": [10**9]}),
        root / "train-00000-of-00002.parquet",
    )
    return root


def _both_splits(root: Path) -> Path:
    (shards(root) / "train-00000-of-00002.parquet").rename(root / "train-test.parquet")
    return root


def _latin_name(root: Path) -> Path:
    os.rename(image_folder(root) / "train" / "dog", os.fsencode(root / "train") + b"/d\xf6g")
    return root


def _negative_label(root: Path) -> Path:
    shards(root)
    pq.write_table(
        pa.table({"img": [{"bytes": encoded(picture(1)), "path": None}], "label": [-1]}),
        root / "train-00000-of-00002.parquet",
    )
    return root


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_empty, "expected .*parquet shards or train/"),
        (_no_test, "expected test/ or val/ beside train/"),
        (_no_images, "no images"),
        (_no_test_shards, r"expected shards named train\*.parquet and test\*.parquet"),
        (
            lambda root: shards(root, column="picture"),
            "expected a column img or image, found picture",
        ),
        (lambda root: shards(root, label="class"), "expected a column label"),
        (_other_shapes, "different shapes .*--image_size"),
        (_not_an_image, "9.png: not a readable image"),
        (_not_parquet, "train-00000-of-00002.parquet: not a readable parquet file"),
        (_bad_cell, "not a readable image"),
        (_few_names, "classes.json: 1 class names, but labels up to 2"),
        (_odd_names, "classes.json"),
        (_negative_label, "label"),
        (
            _test_of_another_size,
            r"different shapes \(\(3, 12, 12\) and \(3, 24, 24\) .*--image_size",
        ),
        (_grey_test, r"different shapes \(\(3, 12, 12\) and \(1, 12, 12\) .*--grey"),
        (_no_bytes, "not a readable image"),
        (
            lambda root: _names(root, '[{"label": "b", "name": "x"}, {"label": 1, "name": "y"}]'),
            "expected whole numbers as labels beside the names",
        ),
        (lambda root: _names(root, "[" * 100_000), "classes.json: not JSON"),
        (
            _large_label,
            (
                r"found label 1000000000 among \d images: expected the classes as numbers from 0"
                r" on, without gaps"
            ),
        ),
        (_both_splits, r"train-test.parquet: its name says training and test set"),
        (_latin_name, r"d\\xf6g.*: the name is not UTF-8: rename the file or its folder"),
    ],
)
def test_unreadable_data_is_one_line(
    tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_dataset("mine", str(make(tmp_path / "data")))


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_deep_grey_images_are_scaled_and_not_clipped(tmp_path: Path, mode: str) -> None:
    """A reader that clips would make nearly all of these white."""
    shallow = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for name, factor in (("widened", 257), ("shifted", 256)):
        deep = (shallow.astype(np.uint16) * factor).astype(">u2" if mode == "I;16B" else "<u2")
        data = encoded(Image.frombytes(mode, (16, 16), deep.tobytes()), "TIFF")
        assert Image.open(io.BytesIO(data)).mode == mode
        assert np.array_equal(decoding.from_bytes(data, tmp_path / name, None, None), shallow[None])
        assert decoding.from_bytes(data, tmp_path / name, 8, False).shape == (3, 8, 8)
    wanted = decoding.from_bytes(encoded(Image.fromarray(shallow)), tmp_path, None, None)
    assert np.array_equal(wanted, shallow[None]), "a control: 8 bits are left as they are"


def test_a_folder_of_16_bit_pngs_is_that_of_8_bits(tmp_path: Path) -> None:
    found = []
    for name, dtype, factor in (("shallow", np.uint8, 1), ("deep", np.uint16, 257)):
        for split in ("train", "test"):
            for label in ("cat", "dog"):
                place = tmp_path / name / split / label
                place.mkdir(parents=True)
                rng = np.random.default_rng(len(label + split))
                Image.fromarray((rng.integers(0, 256, (8, 8)) * factor).astype(dtype)).save(
                    place / "0.png"
                )
        found.append(load_dataset("pets", str(tmp_path / name)))
    assert found[0].image_shape == (1, 8, 8) and found[0].fingerprint == found[1].fingerprint


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
@pytest.mark.parametrize(("value", "refused"), [(1000, True), (-1, True), (255, False)])
def test_values_that_nothing_says_how_to_scale_are_refused(
    tmp_path: Path, dtype: type, value: int, refused: bool
) -> None:
    pixels: np.ndarray = np.full((8, 8), 7, dtype)
    pixels[0, 0] = value
    file = tmp_path / "0.png"  # what it is, the content says
    file.write_bytes(encoded(Image.fromarray(pixels), "TIFF"))
    for read in (
        lambda: decoding.from_file(file, None, True),
        lambda: decoding.from_bytes(file.read_bytes(), file, None, True),
    ):
        if refused:
            with pytest.raises(
                UserError,
                match=(
                    rf"{file}: .*expected values in 0\.\.255, found (7|-1)\.\.(7|1000) .*save it"
                    r" with 8 bits"
                ),
            ):
                read()
        else:
            assert np.array_equal(read()[0], pixels.astype(np.uint8)), (
                "a control: what fits is read"
            )


def _chunk(kind: bytes, content: bytes) -> bytes:
    return (
        len(content).to_bytes(4, "big")
        + kind
        + content
        + zlib.crc32(kind + content).to_bytes(4, "big")
    )


SOUND = encoded(Image.new("L", (12, 12), 7))
HOSTILE = {
    "much compressed text": (
        SOUND[:33] + _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2 << 20))) + SOUND[33:]
    ),
    "a side of 20,000": (
        SOUND[:8]
        + _chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0))
        + SOUND[33:]
    ),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_an_image_that_pillow_gives_up_on_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "0.png"
    for read in (
        lambda: decoding.from_file(file, None, None),
        lambda: decoding.from_bytes(file.read_bytes(), file, None, None),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=rf"^{file}: .*not a readable image"):
            read()
        file.write_bytes(SOUND)
        assert read().shape == (1, 12, 12), "a control"


@pytest.mark.parametrize(
    ("labels", "refused"),
    [(["cat", "dog"], "'cat'"), ([0.5, 1.0], "'0.5'"), ([0, None], "'None'"), ([0, 1], "")],
)
def test_labels_that_are_no_numbers_are_one_line(
    tmp_path: Path, labels: list[Any], refused: str
) -> None:
    root = shards(tmp_path / "data", train=(2,))
    cells = [{"bytes": encoded(picture(i)), "path": None} for i in range(2)]
    for file in root.glob("*.parquet"):
        pq.write_table(pa.table({"img": cells, "label": labels}), file)
    if refused:
        with pytest.raises(
            UserError, match=f"labels must be whole numbers from 0 on, found {refused}"
        ):
            load_dataset("hub", str(root))
    else:
        assert load_dataset("hub", str(root)).train.labels.tolist() == [0, 1], "a control"


@pytest.mark.parametrize(
    ("last", "said"), [(5, ["5 of the 7 classes have no training image (1, 2, 3, 4, 5)"]), (0, [])]
)
def test_an_attack_says_which_labels_nothing_has(
    tmp_path: Path, last: int, said: list[str]
) -> None:
    """The labels 0 and 6 mean seven classes, five of which no image has."""
    root = shards(tmp_path / "data", train=(4,))
    cells = [{"bytes": encoded(picture(i)), "path": None} for i in range(4)]
    for file in root.glob("*.parquet"):
        pq.write_table(pa.table({"img": cells, "label": [0, 1 + last, 0, 1 + last]}), file)
    flags = (
        "--model",
        "preactresnet10",
        "--width",
        "2",
        "--epochs",
        "0",
        "--poison_rate",
        "0.5",
        "--batch_size",
        "4",
        "--score_every",
        "0",
    )
    record = helpers.attack(
        "badnet", "gap", tmp_path, "--dataset", "hub", "--dataset_path", str(root), *flags
    )
    assert [note for note in record.info["notes"] if "no training image" in note] == said


def test_resizing_makes_one_shape_of_many(tmp_path: Path) -> None:
    assert load_dataset(
        "mine", str(_other_shapes(tmp_path / "data")), image_size=12
    ).image_shape == (3, 12, 12)


# --- names, cache, network


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown data set 'cifar1O'.* Did you mean 'cifar10'"):
        load_dataset("cifar1O")
    with pytest.raises(UserError, match="no such folder"):
        load_dataset("mine", "/no/such/folder")


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("ylecun/mnist", "mnist"),
        ("a\\b", "b"),
        ("..", "mine"),
        ("/", "mine"),
        ("x" * 201, "mine"),
        ("a\n", "mine"),
    ],
)
def test_a_name_that_no_record_may_hold_is_refused_before_anything_is_read(
    tmp_path: Path, name: str, instead: str
) -> None:
    """Otherwise the record's own reader would refuse it, after the training."""
    root = str(image_folder(tmp_path / "data"))
    with pytest.raises(UserError, match=rf"expected a name .* say '{instead}'$"):
        load_dataset(name, root)
    assert load_dataset(instead, root).name == instead, (
        "a control: what is said in its place is taken"
    )


def test_a_test_label_that_training_lacks_is_refused(tmp_path: Path) -> None:
    root = shards(tmp_path / "data")
    image = [{"bytes": encoded(picture(1)), "path": None}]
    file = root / "test-00000-of-00001.parquet"
    pq.write_table(pa.table({"img": image * 2, "label": [1, 3]}), file)
    with pytest.raises(UserError, match=rf"{file}: no training image has the label 3"):
        load_dataset("hub", str(root))
    pq.write_table(pa.table({"img": image * 2, "label": [1, 1]}), file)
    assert load_dataset("hub", str(root)).num_classes == 3, "a control: a test set may lack a class"


def test_missing_data_without_a_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(UserError, match="there is no network to download it: pass --dataset_path"):
        load_dataset("cifar10")


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Dataset, Path]]:
    """Make a data set in a cache of its own, and delete its source."""
    monkeypatch.setenv("BACKDOORLAB_CACHE", str(tmp_path / "cache"))
    dataset = load_dataset("pets", str(image_folder(tmp_path / "data")))
    (folder,) = (tmp_path / "cache").iterdir()
    yield dataset, folder


def test_the_cache_is_found_by_content(cached: tuple[Dataset, Path], tmp_path: Path) -> None:
    dataset, folder = cached
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    again = load_dataset("pets", str(tmp_path / "elsewhere"))
    assert again.fingerprint == dataset.fingerprint
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [folder.name], (
        "the same content is not read twice"
    )
    found = find_dataset("pets", dataset.fingerprint)
    assert (
        torch.equal(found.train.images, dataset.train.images)
        and found.class_names == dataset.class_names
    )
    picture(77).save(tmp_path / "elsewhere" / "train" / "cat" / "0.png")
    assert load_dataset("pets", str(tmp_path / "elsewhere")).fingerprint != dataset.fingerprint
    with pytest.raises(UserError, match="not in the cache"):
        find_dataset("pets", "0" * 64)


def test_two_that_fill_an_empty_cache_at_once_both_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of the other process comes just before ours. Control: a folder there that is no
    data set is replaced."""
    cache, publish = tmp_path / "cache", arrays.publish
    monkeypatch.setenv("BACKDOORLAB_CACHE", str(cache))

    def beaten(stage: Path, folder: Path, ignored: tuple[str, ...] = ()) -> None:
        monkeypatch.setattr("backdoorlab.datasets.cache.publish", publish)
        shutil.copytree(stage, folder, ignore=shutil.ignore_patterns(*ignored))
        (folder / "whose").write_text("the other's")
        publish(stage, folder)

    monkeypatch.setattr("backdoorlab.datasets.cache.publish", beaten)
    dataset = load_dataset("pets", str(image_folder(tmp_path / "data")))
    (folder,) = cache.iterdir()
    assert (folder / "whose").exists() and find_dataset(
        "pets", dataset.fingerprint
    ).fingerprint == dataset.fingerprint
    shutil.rmtree(cache)
    monkeypatch.setattr(
        "backdoorlab.datasets.cache.publish", partial(beaten, ignored=("meta.json",))
    )
    assert load_dataset("pets", str(tmp_path / "data")).fingerprint == dataset.fingerprint
    assert [entry.name for entry in cache.iterdir()] == [folder.name] and not (
        folder / "whose"
    ).exists()


def test_the_cache_sweeps_its_own_stages_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other tools may keep unfinished work in the same folder. Control: what a killed reader left
    is deleted."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("BACKDOORLAB_CACHE", str(cache))
    foreign = [
        "download.partial",
        "run-0123456789abcdef.partial",
        "run-0123456789abcdef.old.partial",
        "pets-0123456789abcdef.17.partial",
        ".x.trash",
    ]
    for name in foreign:
        (cache / name).mkdir(parents=True)
        (cache / name / "thesis.tex").write_text("years of work")
    left, held = (
        cache / "pets-fedcba9876543210.4242.partial",
        cache / "pets-fedcba9876543210.4343.partial",
    )
    for stage in (left, held):
        (stage / "final").mkdir(parents=True)
        (stage / "final" / "train_images.npy").write_bytes(b"half")
    with locks.locked(held):
        load_dataset("pets", str(image_folder(tmp_path / "data")))
    assert not left.exists() and (held / "final").is_dir()
    assert all((cache / name / "thesis.tex").exists() for name in foreign)


def test_a_stage_of_the_cache_that_another_holds_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes of two machines that share a cache may have the same number."""
    monkeypatch.setenv("BACKDOORLAB_CACHE", str(tmp_path / "cache"))
    source = str(image_folder(tmp_path / "data"))
    load_dataset("pets", source)
    (folder,) = (tmp_path / "cache").iterdir()
    shutil.rmtree(folder)
    stage = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    with locks.locked(stage):
        (stage / "final").mkdir()
        with pytest.raises(UserError, match="is being written by process"):
            load_dataset("pets", source)
        assert (stage / "final").is_dir()
        shutil.rmtree(stage / "final")
    load_dataset("pets", source)
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [folder.name]


@pytest.mark.parametrize(
    "file", ["train_images.npy", "train_labels.npy", "test_images.npy", "test_labels.npy"]
)
def test_a_changed_byte_in_the_cache_is_refused(
    cached: tuple[Dataset, Path], tmp_path: Path, file: str
) -> None:
    _, folder = cached
    data = bytearray((folder / file).read_bytes())
    data[-1] ^= 1
    (folder / file).write_bytes(data)
    with pytest.raises(UserError, match=f"{folder.name} is damaged: delete that folder"):
        load_dataset("pets", str(tmp_path / "data"))
    data[-1] ^= 1
    (folder / file).write_bytes(data)
    load_dataset("pets", str(tmp_path / "data"))


def test_a_damaged_cache_entry_is_refused(cached: tuple[Dataset, Path], tmp_path: Path) -> None:
    _, folder = cached
    whole = {name: (folder / name).stat().st_size for name in ("meta.json", "train_images.npy")}
    half = [(name, size // 2) for name, size in whole.items()]
    for damage, kept in (*half, ("train_labels.npy", 0)):
        content = (folder / damage).read_bytes()
        (folder / damage).write_bytes(content[:kept])
        with pytest.raises(UserError, match="damaged"):
            load_dataset("pets", str(tmp_path / "data"))
        (folder / damage).write_bytes(content)
    assert [entry["name"] for entry in arrays.cached()] == ["pets"]


# --- CIFAR-10


@pytest.mark.cifar
@pytest.mark.skipif(
    not helpers.CIFAR10.is_dir(),
    reason="the CIFAR-10 shards are not in shared/data/cifar10 beside the checkout",
)
def test_a_few_rows_of_the_cifar10_shards(tmp_path: Path) -> None:
    root = helpers.few_cifar10(tmp_path / "cifar10", 64, 64)
    dataset = load_dataset("cifar10", str(root))
    assert (len(dataset.train), len(dataset.test)) == (64, 64)
    assert (
        dataset.class_names[:3] == ("airplane", "automobile", "bird") and dataset.num_classes == 10
    )
    assert dataset.image_shape == (3, 32, 32)
    row = pq.read_table(root / "test-00000-of-00001.parquet").to_pylist()[5]
    assert int(dataset.test.labels[5]) == row["label"]
    with Image.open(io.BytesIO(row["img"]["bytes"])) as image:
        assert np.array_equal(
            dataset.test.images[5].numpy(), np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        )
    mean, std = channel_statistics(dataset.train)
    assert np.allclose(mean, (0.4914, 0.4822, 0.4465), atol=0.06) and np.allclose(
        std, (0.247, 0.243, 0.261), atol=0.06
    )
