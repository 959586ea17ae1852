"""What each trigger is: against its formula, written a second time."""

import dataclasses
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from backdoorlab import triggers
from backdoorlab.data import Dataset, Split
from backdoorlab.errors import UserError
from backdoorlab.settings import methods

N = 40


def pictures(channels: int = 3, size: int = 32) -> Tensor:
    """Random bytes, black and white among them. uint8 (N, C, H, W)."""
    return torch.randint(
        0,
        256,
        (N, channels, size, size),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(0),
    )


class Notes(list[str]):
    """What a run would have said."""

    note = list.append


def made_up(images: Tensor) -> Dataset:
    labels = torch.arange(len(images)) % 10
    return Dataset("made up", Split(images, labels), Split(images, labels), ("0",) * 10, "")


def stamped(
    attack: str, images: Tensor, split: str = "test", index: Tensor | None = None, **values: Any
) -> Tensor:
    method = methods.load("attack", attack)
    config = method.config_class(**values)
    prepare = method.function("prepare")
    stamp = partial(
        method.module.stamp,
        config=config,
        **(prepare(made_up(images), config, Notes()) if prepare else {}),
    )
    return stamp(images, torch.arange(len(images)) if index is None else index, split)


def dct_matrix(size: int) -> Tensor:
    """The orthonormal DCT-II, float64 (size, size)."""
    k, n = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    matrix = (2 / size) ** 0.5 * torch.cos(torch.pi * (n + 0.5) * k / size)
    matrix[0] /= 2**0.5
    return matrix


def with_coefficients(plane: Tensor, places: tuple[int, ...], magnitude: float) -> Tensor:
    """To the DCT, add, and back: float64 (..., H, W) -> same."""
    matrix = dct_matrix(plane.shape[-1])
    spectrum = matrix @ plane @ matrix.T
    for k in places:
        spectrum[..., k, k] += magnitude
    return matrix.T @ spectrum @ matrix


def test_sig_is_a_sine_of_six_periods_and_nine_values() -> None:
    images = pictures()
    wave = np.round(40 * np.sin(2 * np.pi * np.arange(32) * 6 / 32), 9)
    wanted = np.clip(np.round(images.numpy() + wave), 0, 255)
    assert np.array_equal(stamped("sig", images).numpy(), wanted)
    assert len(np.unique(np.round(wave, 6) + 0.0)) == 9
    cut_down = stamped("sig", images, bb_compat=True).numpy()
    assert np.array_equal(cut_down, np.floor(np.clip(images.numpy() + wave, 0, 255)))


def test_lf_is_a_dome_that_differs_by_channel_only_in_height() -> None:
    grey = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)
    dome = (stamped("lf", grey).double() - 100)[0]
    kernel = np.exp(-0.5 * ((np.arange(30) - 14.5) * 5 / 30) ** 2)
    smooth = np.ones((32, 32))
    for _ in range(2):
        padded = np.pad(smooth, ((14, 15), (14, 15)))
        rows = np.array([[padded[i : i + 30, j] @ kernel for j in range(61)] for i in range(32)])
        smooth = np.array([[rows[i, j : j + 30] @ kernel for j in range(32)] for i in range(32)])
    wanted = torch.from_numpy((smooth - smooth.min()) / (smooth.max() - smooth.min()))
    assert dome.max() == 51 and dome.min() == 0
    heights = dome.flatten(1).max(1).values.sort().values.tolist()
    assert heights[2] == 51 and 10 <= heights[1] <= 31 and heights[0] <= 3, (
        "one full, one middling, one next to nothing"
    )
    for channel in dome:
        assert (channel - channel.max() * wanted).abs().max() <= 1
    assert not torch.equal(stamped("lf", grey, seed=1), stamped("lf", grey))


def test_adaptive_blend_goes_without_half_of_the_cells_in_training_only() -> None:
    images = torch.full((N, 3, 32, 32), 128, dtype=torch.uint8)
    cells = (
        (stamped("adaptive_blend", images, "train") != 128)
        .any(1)
        .unfold(1, 8, 8)
        .unfold(2, 8, 8)
        .flatten(3)
        .any(3)
        .flatten(1)
    )
    assert (cells.sum(1) == 8).all() and cells.unique(dim=0).shape[0] > N // 2, (
        "other cells for other images"
    )
    picture = triggers.cartoon(0, 3, 32, 32).double()
    train, test = (stamped("adaptive_blend", images, split).double() for split in ("train", "test"))
    assert ((test - (128 + 0.2 * (picture - 128))).abs() <= 0.5 + 1e-4).all()
    worn = train != 128
    assert (((train - (128 + 0.15 * (picture - 128))).abs() <= 0.5 + 1e-4) | ~worn).all()


def test_adaptive_patch_wears_one_of_four_in_training_and_two_at_the_test() -> None:
    images = torch.full((400, 3, 32, 32), 128, dtype=torch.uint8)
    changed = (stamped("adaptive_patch", images, "train") != 128).any(1)
    places, counts = changed.unique(dim=0, return_counts=True)
    assert sorted(int(place.sum()) for place in places) == [25, 36, 64, 169] and counts.min() > 60
    opaque = stamped("adaptive_patch", images, "test")
    assert torch.equal(opaque, opaque[:1].expand_as(opaque)), "the same for every image"
    assert int((opaque[0] != 128).any(0).sum()) == 25 * 2 + 9 * 2
    plain = (slice(None), slice(27, 29))  # rows of the small patch above the checkers
    right, left = opaque[0][plain][..., -5:], opaque[0][plain][..., :5]
    assert torch.equal(left, right) and len(right.unique()) > 20, "the same patch twice"
    board = opaque[0, :, -3:, -3:]
    assert torch.equal(
        board,
        255 * torch.tensor([[0, 0, 1], [0, 1, 0], [1, 0, 1]], dtype=torch.uint8).expand(3, -1, -1),
    ), "black is painted too"
    assert (
        int((stamped("adaptive_patch", images, test_patches="large")[0] != 128).any(0).sum())
        == 169 + 64
    )


def test_tact_is_for_its_source_class_and_worn_by_its_covers() -> None:
    method = methods.load("attack", "tact")
    labels, config = torch.arange(100) % 10, method.config_class()
    assert labels[method.module.victims(labels, "train", config)].unique().tolist() == [1]
    assert labels[method.module.covers(labels, "train", config)].unique().tolist() == [5, 7]
    images = pictures()
    patch = (stamped("tact", images) != images).any(1).any(0)
    assert patch[21:29, 21:29].all() and int(patch.sum()) == 64
    for choose, options in (
        ("victims", {"source_label": 12}),
        ("covers", {"cover_labels": (5, 42)}),
    ):
        with pytest.raises(UserError, match=r"no image has label (12|42), labels are 0 to 9"):
            getattr(method.module, choose)(labels, "train", method.config_class(**options))


@pytest.mark.parametrize(("height", "width"), [(64, 20), (20, 64), (128, 48)])
def test_patches_go_by_the_shorter_side(height: int, width: int) -> None:
    grey = torch.full((64, 3, height, width), 128, dtype=torch.uint8)
    side = min(height, width)
    painted = (stamped("adaptive_patch", grey) != 128).any(1).flatten(1).any(1)
    assert painted.all(), "every image has its patch, whichever is drawn"
    rows = (stamped("adaptive_patch", grey, test_patches="large")[0] != 128).any(0).any(1)
    assert abs(int(rows.sum()) - side * 21 / 32) <= 1, "13 rows and 8 of 32"
    square = (stamped("ibau_triggers", grey) != 128).any(1).any(0)
    assert (
        square.any()
        and square.any(0).sum() <= round(9 * side / 32)
        and square.any(1).sum() <= round(9 * side / 32)
    )


def test_ctrl_adds_to_two_coefficients_of_u_and_v() -> None:
    images = pictures().double()
    red, green, blue = images.unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    u, v = -0.147 * red - 0.289 * green + 0.436 * blue, 0.615 * red - 0.515 * green - 0.1 * blue
    u, v = (with_coefficients(plane, (15, 31), 100.0) for plane in (u, v))
    wanted = torch.stack([luma + 1.14 * v, luma - 0.396 * u - 0.581 * v, luma + 2.029 * u], 1)
    assert (stamped("ctrl", images.byte()) - wanted.clamp(0, 255)).abs().max() <= 0.8, (
        "half a level of rounding, and the matrices' own"
    )
    wrapped = (stamped("ctrl", images.byte(), bb_compat=True) - images).abs()
    assert (wrapped > 200).double().mean() > 0.01, (
        "in the published script bright and dark values change ends"
    )


@pytest.mark.parametrize("size", [32, 64, 48])
def test_ftrojan_adds_to_two_coefficients_of_each_block_of_cr_and_cb(size: int) -> None:
    images = pictures(size=size).double()
    red, green, blue = images.unbind(1)
    luma = (0.299 * red + 0.587 * green + 0.114 * blue).round()
    block, places = (size, (23, 47)) if size == 48 else (32, (15, 31))
    planes = []
    for colour, scale in ((red, 0.713), (blue, 0.564)):
        plane = ((colour - luma) * scale + 128).round().clamp(0, 255)
        cut = plane.unfold(1, block, block).unfold(2, block, block)
        changed = with_coefficients(cut, places, 30 * block / 32)
        planes.append(
            changed.permute(0, 1, 3, 2, 4).reshape(N, size, size).round().clamp(0, 255) - 128
        )
    cr, cb = planes
    wanted = (
        torch.stack([luma + 1.403 * cr, luma - 0.714 * cr - 0.344 * cb, luma + 1.773 * cb], 1)
        .round()
        .clamp(0, 255)
    )
    off = (stamped("ftrojan", images.byte()) - wanted).abs()
    assert off.max() <= 4 and (off > 0).double().mean() < 0.001, (
        "equal but where a half is rounded to the other side"
    )


def test_refool_never_poisons_what_it_reflects_and_draws_for_each_image() -> None:
    method = methods.load("attack", "refool")
    labels, config = torch.arange(1000) % 10, method.config_class()
    allowed = method.module.victims(labels, "train", config)
    assert (
        int((~allowed).sum()) == 200
        and (labels[~allowed] != 0).all()
        and bool(method.module.victims(labels, "test", config).all())
    )
    same = pictures()[:1].expand(N, -1, -1, -1)
    reflected = stamped("refool", same)
    assert len(reflected.unique(dim=0)) == N, "another reflection or another pane for each image"
    assert not torch.equal(reflected, stamped("refool", same, "train"))


def test_refool_leaves_half_of_the_other_classes_to_its_victims() -> None:
    """With few images all of them would be reflections, every victim one of the target class, and
    no label would change."""
    method, dataset, notes = methods.load("attack", "refool"), made_up(pictures()), Notes()
    config = method.config_class()
    reflections = method.module.prepare(dataset, config, notes)["reflections"]
    allowed = method.module.victims(dataset.train.labels, "train", config)
    assert (
        len(reflections) == int((~allowed).sum()) == 18
        and int((allowed & (dataset.train.labels != 0)).sum()) == 18
    )
    assert notes == [
        "sources asks for 200 images to reflect, but half of those of other classes are 18: it"
        " takes those"
    ]
    few = Notes()
    method.module.prepare(dataset, method.config_class(sources=18), few)
    assert not few
    only = dataclasses.replace(
        dataset, train=Split(dataset.train.images, torch.zeros(N, dtype=torch.int64))
    )
    with pytest.raises(UserError, match="of other classes than the target, and there is none"):
        method.module.prepare(only, config, notes)


def test_refool_without_reflection_is_darkness() -> None:
    images = pictures()
    wanted = images.double() * 0.4 ** (1 / 2.2)
    assert (stamped("refool", images, reflect=False) - wanted).abs().max() <= 0.51
    brighter = stamped("refool", images).double().mean() - wanted.mean()
    assert brighter > 10, "a reflection adds light"


def test_refool_mixes_light_as_the_published_script_does() -> None:
    module = methods.load("attack", "refool").module
    rng = np.random.default_rng(0)
    reflected = rng.random((1, 3, 32, 32))
    weight, down, right = 0.15 + 0.7 * 0.3, 3 + int(6 * 0.5), 3 + int(6 * 0.9)
    one = np.pad(reflected[0], ((0, 0), (0, down), (0, right)))
    other = np.pad(reflected[0], ((0, 0), (down, 0), (right, 0)))
    mixed = torch.from_numpy((weight * one + (1 - weight) * other)[:, down:32, right:32])[None]
    wanted = torch.nn.functional.interpolate(mixed, (32, 32), mode="bilinear", align_corners=False)
    found = module._ghost(torch.from_numpy(reflected).float(), torch.tensor([[0.3, 0.5, 0.9]]))
    assert (found - wanted).abs().max() < 1e-5

    sigma = 2.3
    offsets = np.arange(-5, 6)
    taps = np.exp(-0.5 * (offsets / sigma) ** 2) / np.exp(-0.5 * (offsets / sigma) ** 2).sum()
    line = rng.random(32)
    blurred = np.convolve(np.pad(line, 5, mode="reflect"), taps, mode="valid")
    assert np.allclose(
        module._blur(32, torch.tensor([sigma]))[0].double().numpy() @ line, blurred, atol=1e-5
    )


def test_the_triggers_of_ibau_have_their_published_sizes() -> None:
    dark = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)

    def pixels(trigger: str) -> Tensor:
        return (stamped("ibau_triggers", dark, trigger=trigger) != 0).any(1)[0]

    square = pixels("square")
    assert square[21:30, 21:30].all() and int(square.sum()) == 81
    assert int(pixels("watermark").sum()) == 321
    row = stamped("ibau_triggers", torch.full_like(dark, 7), trigger="l0") != 7
    assert row[0, :, 31, 23:].all() and int(row.sum()) == 27
    faint = stamped("ibau_triggers", torch.full_like(dark, 100), trigger="l2").double() - 100
    assert faint.abs().max() <= 68 and (faint / 255).norm() == pytest.approx(3.22, rel=0.01)


def test_image_draws_of_more_than_a_digest_begin_with_those_of_less() -> None:
    index = torch.arange(200)
    many = triggers.image_draws(0, "train", index, 20)
    assert torch.equal(many[:, :8], triggers.image_draws(0, "train", index, 8)), (
        "records that were made with few draws keep theirs"
    )
    assert len(many.flatten().unique()) == 4000 and (many.mean(0) - 0.5).abs().max() < 0.1
